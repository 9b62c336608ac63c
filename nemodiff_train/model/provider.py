"""The model: whatever GPT that Bridge builds for a family, with its core attention replaced."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec

from nemodiff_train.attention.modules import PlacedRotary, TriModeAttention
from nemodiff_train.attention.plan import share_of
from nemodiff_train.attention.state import AttentionState
from nemodiff_train.errors import UserError

register_allowed_target_prefix("nemodiff_train")  # Bridge builds the saved configuration by name


def tri_mode_layer_spec(config: "TriModeModelProvider") -> ModuleSpec:
    """The family's transformer layer with :class:`TriModeAttention` as its core attention.

    Transformer Engine's layers where it is installed, else Megatron-Core's own.
    """
    if HAVE_TE:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = TriModeAttention
    return spec


@dataclass
class TriModeModelProvider(GPTModelProvider):
    """A GPT model that attends causally, over doubled sequences, or against a cache.

    Make one from a pretrained family with :func:`tri_mode`; the extra fields are saved in every
    checkpoint, so that it can be decoded and exported without the recipe that trained it.
    """

    transformer_layer_spec: Any = tri_mode_layer_spec

    noisy_views: int = 0
    """Noisy halves of a training sample; 0 for plain AR training. Set from the objective, as the next four are."""
    block_size: int = 32
    """Places per diffusion block."""
    largest_block: int = 32
    """Most places of a block in training, where the size changes from step to step."""
    clean_half: str = "causal"
    """What a clean place sees: ``causal`` or ``block_causal``."""
    shift: bool = False
    """Place i of a block predicts token i + 1."""
    mask_token_id: int | None = None
    """Id of the mask token; None until a joint stage has been trained."""
    query_scale_beta: float = 0.0
    """Ministral 3's position-dependent query scale (``llama_4_scaling_beta``); 0 for none."""
    query_scale_original_length: int = 16384
    """Positions from which the query scale leaves 1."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """The Hugging Face configuration the weights came from; an export writes it back."""
    hf_generation_config: dict[str, Any] = field(default_factory=dict)
    """The ``generation_config.json`` that came with it."""

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build this rank's part of the model."""
        model = super().provide(pre_process, post_process, vp_stage)
        context_group = model.pg_collection.cp
        state = AttentionState(share=share_of(context_group), context_group=context_group)
        for module in model.modules():
            if isinstance(module, TriModeAttention):
                module.state = state
        model.rotary_pos_emb = PlacedRotary(model.rotary_pos_emb, self, state)
        model.attention_state = state
        return model


def tri_mode(source: GPTModelProvider, hf_config: dict[str, Any]) -> TriModeModelProvider:
    """Make the provider that Bridge returns for a family tri-mode; nothing else about it changes.

    Args:
        source: What ``AutoBridge.to_megatron_provider(load_weights=False)`` returned.
        hf_config: The model's Hugging Face configuration as a dictionary.

    Raises:
        UserError: The family needs attention or layers that the method has not been given.
    """
    _refuse_unsupported(source, hf_config)
    known = {f.name for f in fields(TriModeModelProvider) if f.init} - {"transformer_layer_spec", "hf_config"}
    values = {f.name: getattr(source, f.name) for f in fields(source) if f.name in known}
    provider = TriModeModelProvider(**values, hf_config=hf_config)
    rope = hf_config.get("rope_parameters") or {}
    provider.query_scale_beta = rope.get("llama_4_scaling_beta") or 0.0
    if provider.query_scale_beta:
        provider.query_scale_original_length = rope["original_max_position_embeddings"]
    if provider.position_embedding_type == "yarn":
        # Transformers rounds YaRN's correction range unless the file says otherwise; Bridge's default
        # of None would not.
        provider.yarn_correction_range_round_to_int = rope.get("truncate", True)
    provider.attention_dropout = provider.hidden_dropout = 0.0
    provider.apply_rope_fusion = False  # the fused kernel takes one angle a position; rows may differ here
    return provider


def _refuse_unsupported(source: GPTModelProvider, hf_config: dict[str, Any]) -> None:
    name = (hf_config.get("architectures") or [type(source).__name__])[0]
    reasons = {
        "its own model class": type(source).provide is not GPTModelProvider.provide,
        "mixture of experts": source.num_moe_experts is not None,
        "latent attention": source.multi_latent_attention,
        "sliding-window attention": getattr(source, "window_size", None) is not None
        or "sliding_attention" in (hf_config.get("layer_types") or []),
        "multi-token prediction": bool(source.mtp_num_layers),
        "biases in attention outputs": source.add_bias_linear,
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise UserError(f"{name} is not supported: it has {', '.join(found)}; use a dense GPT-like decoder.")


def run_without_fusions(provider: TriModeModelProvider) -> None:
    """Turn off the kernels that need CUDA extensions, for a machine that lacks them."""
    for name in (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    ):
        setattr(provider, name, False)
    provider.pipeline_dtype = provider.pipeline_dtype or torch.float32
