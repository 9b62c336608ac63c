"""Ministral 3 as a text model, and the two other kinds of directory that hold one.

Bridge knows it inside its vision-language model, and in a diffusion model whose sizes it does not read
from the file.  All three are one Megatron model; they differ in where its settings and tensors are.
"""

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.mistral.mistral_bridge import MistralBridge
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration

from nemodiff_train.model.families import NEMOTRON, VISION_LANGUAGE, stored_name


class Ministral3TextBridge(MistralBridge):
    """``Ministral3ForCausalLM``: Mistral's weights, YaRN positions, and a query scale by position.

    The query scale is not a matter of weights; :func:`nemodiff_train.model.provider.tri_mode` reads it.
    """

    architecture = "Ministral3ForCausalLM"

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        """Megatron's configuration for the model.

        Mistral's own version knows one fixed rope scaling; the general one reads YaRN from the file.
        """
        provider = MegatronModelBridge.provider_bridge(self, hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Mistral's mappings, with the tensors' names in a directory of this architecture."""
        mappings: list[Any] = list(super().mapping_registry())
        for mapping in mappings:
            named = mapping.hf_param
            mapping.hf_param = (
                stored_name(self.architecture, named)
                if isinstance(named, str)
                else {part: stored_name(self.architecture, name) for part, name in named.items()}
            )
        return MegatronMappingRegistry(*mappings)


class NemotronLabsDiffusionBridge(Ministral3TextBridge):
    """A NemotronLabsDiffusion model; takes the place of Bridge's own, which assumes one rope scaling."""

    architecture = NEMOTRON


class Ministral3TowerBridge(Ministral3TextBridge):
    """The language model of a vision-language Ministral 3; takes the place of Bridge's own, which has all of it."""

    architecture = VISION_LANGUAGE


def register() -> None:
    """Make AutoBridge use these converters, also in the place of Bridge's own for the same architectures."""
    for source, model_type, bridge in (
        (Ministral3ForCausalLM, "ministral3", Ministral3TextBridge),
        (NEMOTRON, "nemotron_labs_diffusion", NemotronLabsDiffusionBridge),
        (Mistral3ForConditionalGeneration, "mistral3", Ministral3TowerBridge),
    ):
        MegatronModelBridge.register_bridge(source=source, target=GPTModel, model_type=model_type)(bridge)
