"""Ministral 3 as a text model, which Bridge knows only inside its vision-language model."""

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.mistral.mistral_bridge import MistralBridge
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Ministral3ForCausalLM


@MegatronModelBridge.register_bridge(source=Ministral3ForCausalLM, target=GPTModel, model_type="ministral3")
class Ministral3TextBridge(MistralBridge):
    """``Ministral3ForCausalLM``: Mistral's weights, YaRN positions, and a query scale by position.

    The query scale is not a matter of weights; :func:`nemodiff_train.model.provider.tri_mode` reads it.
    """

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        """Megatron's configuration for the model.

        Mistral's own version knows one fixed rope scaling; the general one reads YaRN from the file.
        """
        provider = MegatronModelBridge.provider_bridge(self, hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        return provider
