"""Mistral and Ministral 3 as text models, and the two other kinds of directory that hold the latter.

Bridge takes a Mistral's activation for granted, and supports Ministral 3 inside its vision-language model, and in a
diffusion model whose sizes it does not read from the file. All are one Megatron model; they differ in where its
settings and tensors are.
"""

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.mistral.mistral_bridge import MistralBridge
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration, MistralForCausalLM

from nemodiff_train.model.families import NEMOTRON, VISION_LANGUAGE, stored_name


class Ministral3TextBridge(MistralBridge):
    """``Ministral3ForCausalLM``: Mistral's weights, YaRN, and a query scale that depends on the position.

    The query scale has no weights; :func:`nemodiff_train.model.provider.tri_mode` reads it from the file.
    """

    architecture = "Ministral3ForCausalLM"

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        """Return Megatron's configuration of the model.

        Mistral's own version assumes an activation and one rope scaling; the general one reads the file.
        """
        provider = MegatronModelBridge.provider_bridge(self, hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return Mistral's mappings, with the names that tensors have in a directory of this architecture."""
        mappings = list(super().mapping_registry())
        for mapping in mappings:
            names = mapping.hf_param
            mapping.hf_param = (
                stored_name(self.architecture, names)
                if isinstance(names, str)
                else {part: stored_name(self.architecture, name) for part, name in names.items()}
            )
        return MegatronMappingRegistry(*mappings)


class MistralTextBridge(Ministral3TextBridge):
    """``MistralForCausalLM``; replaces Bridge's own bridge, which does not read the activation."""

    architecture = "MistralForCausalLM"


class NemotronLabsDiffusionBridge(Ministral3TextBridge):
    """A NemotronLabsDiffusion model; replaces Bridge's own bridge, which assumes one rope scaling."""

    architecture = NEMOTRON


class Ministral3TowerBridge(Ministral3TextBridge):
    """The language model of a vision-language Ministral 3; replaces Bridge's own bridge, which has all of it."""

    architecture = VISION_LANGUAGE


def register() -> None:
    """Make AutoBridge use these converters, also in the place of Bridge's own for the same architectures."""
    for source, model_type, bridge in (
        (MistralForCausalLM, "mistral", MistralTextBridge),
        (Ministral3ForCausalLM, "ministral3", Ministral3TextBridge),
        (NEMOTRON, "nemotron_labs_diffusion", NemotronLabsDiffusionBridge),
        (Mistral3ForConditionalGeneration, "mistral3", Ministral3TowerBridge),
    ):
        MegatronModelBridge.register_bridge(source=source, target=GPTModel, model_type=model_type)(bridge)
