"""The model: any GPT that Bridge builds for a family, with its core attention replaced."""

import importlib.util
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.utils import get_pg_rank
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.modules import PositionLookupRotary, TriModeAttention
from nemodiff_train.attention.state import AttentionState
from nemodiff_train.errors import UserError
from nemodiff_train.model.families import HFConfig
from nemodiff_train.model.norm import head_norm, replicated_norm
from nemodiff_train.model.recompute import recompute_activations
from nemodiff_train.runtime.patches import leave_out_extra_state, multiply_angles

SCALINGS = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_type`` whose frequencies do not depend on the length of the text."""

LAYERS: Literal["local", "transformer_engine"] = "transformer_engine" if HAVE_TE else "local"
"""Implementation of the layers in training on this machine; both have weights of the same names."""

register_allowed_target_prefix("nemodiff_train")  # Bridge builds the saved configuration by name


def tri_mode_layer_spec(
    config: "TriModeModelProvider", vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the family's transformer layer with :class:`TriModeAttention` as its core attention.

    The layers are Transformer Engine's or, with ``config.transformer_impl`` ``local``, Megatron-Core's own with this
    package's norms.

    Args:
        config: The model's configuration.
        vp_stage: Index of the model chunk on this rank, with virtual pipeline stages.
    """
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = TriModeAttention
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = replicated_norm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = head_norm
    attention.core_attention = TriModeAttention
    # Given a single layer, Core would select the final norm by itself.
    stage = get_pg_rank(config._pg_collection.pp) if config._pg_collection else None
    layers = get_num_layers_to_build(config, vp_stage, stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=replicated_norm)


@dataclass
class TriModeModelProvider(GPTModelProvider):
    """A GPT model that attends causally, over doubled sequences, or against a cache.

    Make one from a pretrained family with :func:`tri_mode`. The fields below are saved in every checkpoint, so that
    it can be decoded and exported without the recipe that trained it.
    """

    transformer_layer_spec: Any = tri_mode_layer_spec

    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] = LAYERS
    """Implementation of the layers: ``local`` for decoding, which runs the weights without the modules
    (:func:`~nemodiff_train.decoding.forward.fast_forward`)."""
    pipeline_dtype: torch.dtype | None = None
    """Format in which pipeline stages exchange activations; None for that of the parameters."""
    noisy_views: int = 0
    """Number of noisy views of a training sample; 0 for plain AR training. Set from the objective, like the next four
    fields."""
    block_size: int = 32
    """Positions per diffusion block."""
    largest_block: int = 32
    """Maximum number of positions per block in training, where the block size changes from step to step."""
    clean_attention: str = "causal"
    """What a clean position sees: ``causal`` or ``block_causal``."""
    causal_noise: bool = False
    """A noisy position sees its block up to itself alone, as the drafts of some drafters do."""
    shift: bool = False
    """Position i of a block predicts token i + 1."""
    recompute_elementwise: bool = True
    """Recompute the outputs of norms and of the gated activation in the backward pass instead of keeping them."""
    attention_kernel: str = "auto"
    """``auto``, or ``flash`` for FlexAttention's FlashAttention 4 backend; see
    :func:`~nemodiff_train.attention.kernels.select_kernel`. Belongs to a run, like the next two fields."""
    attention_tile: int = 0
    """Number of queries, and of keys, per tile of FlexAttention's block mask; 0 for the kernel's default."""
    attention_options: dict[str, Any] = field(default_factory=dict)
    """More ``kernel_options`` for FlexAttention, such as ``{"fwd_BLOCK_N": 64}``."""
    mask_token_id: int | None = None
    """Id of the mask token; None until a joint stage has been trained."""
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    """``rope_parameters`` of the ``config.json``; a scaling in it is computed as Transformers does, not as Megatron's
    own settings say. Empty for none."""
    query_scale_beta: float = 0.0
    """Ministral 3's position-dependent query scale (``llama_4_scaling_beta``); 0 for none."""
    query_scale_original_length: int = 16384
    """Position from which on the query scale differs from 1."""
    hf_config: HFConfig = field(default_factory=dict)
    """The ``config.json`` that the weights came with, unchanged; an export writes it back."""
    hf_generation_config: HFConfig = field(default_factory=dict)
    """The ``generation_config.json`` that the weights came with."""
    origin: HFConfig = field(default_factory=dict)
    """Name and licence of the Hugging Face model that the weights came from, for a model card."""

    def add_stop_token(self, token: int | None) -> None:
        """Let decoding end at one more token, here and where the model is exported to."""
        configured = self.hf_generation_config.get("eos_token_id", self.hf_config.get("eos_token_id"))
        stop_tokens = configured if isinstance(configured, list) else [] if configured is None else [configured]
        if token is not None and token not in stop_tokens:
            self.hf_generation_config = {**self.hf_generation_config, "eos_token_id": [*stop_tokens, token]}

    def finalize(self) -> None:
        """Complete the settings that follow from others."""
        # Core asks for it with pipeline stages, and Bridge sets it from a precision recipe alone.
        self.pipeline_dtype = self.pipeline_dtype or self.params_dtype
        super().finalize()  # derives the number of virtual stages if only a pipeline layout gives it
        # Core's default, one batch of exchanges between neighbouring stages, pairs sends and receives of the same
        # two ranks by their order. With two ranks and virtual stages the next and the previous stage are on the same
        # rank: activations sent forward and gradients sent backward in one batch arrive swapped, silently, and the
        # model trains on nonsense. Exchanges issued one by one are paired by direction. Megatron-LM's arguments do
        # the same; Bridge leaves it to the user. Without virtual stages Core supports batches only.
        self.overlap_p2p_comm = bool(self.virtual_pipeline_model_parallel_size)
        self.batch_p2p_comm = not self.overlap_p2p_comm

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build this rank's part of the model."""
        # Pad the vocabulary to equal parts per tensor-parallel rank, and not at all in one process. Bridge turns this
        # off where the model's own vocabulary is larger than the tokenizer's.
        self.should_pad_vocab, self.make_vocab_size_divisible_by = True, 1
        model = super().provide(pre_process, post_process, vp_stage)
        context_group = model.pg_collection.cp
        shard = ContextParallelShard(context_group.rank(), context_group.size())
        state = AttentionState(shard=shard, context_group=context_group)
        for module in model.modules():
            if isinstance(module, TriModeAttention):
                module.state = state
        model.rotary_pos_emb = PositionLookupRotary(model.rotary_pos_emb, self, state)
        with torch.device("cpu"):  # a dry run builds the model without memory, where nothing can be copied from
            scaling = _rope_scaling(self)
        if scaling:
            rotary = model.rotary_pos_emb
            rotary.rotary.inv_freq, rotary.factor = scaling[0].to(rotary.rotary.inv_freq.device), scaling[1]
            for layer in model.decoder.layers:
                multiply_angles(layer.self_attention, rotary.factor)
        model.attention_state, model.selector_tables = state, None  # the second is for decoding with a path selector
        recompute_activations(model)
        if not self.fp8 and not self.fp4:
            leave_out_extra_state(model)
        return model


def tri_mode(source: GPTModelProvider, hf_config: HFConfig) -> TriModeModelProvider:
    """Turn the provider that Bridge returns for a family into a tri-mode one; nothing else about it changes.

    Args:
        source: The provider that ``AutoBridge.to_megatron_provider(load_weights=False)`` returned.
        hf_config: The model's Hugging Face configuration as a dictionary, complete with defaults.

    Raises:
        UserError: The family has attention or layers that are not supported.
    """
    _refuse_unsupported(source, hf_config)
    copied = {f.name for f in fields(TriModeModelProvider) if f.init}
    copied -= {"transformer_layer_spec", "transformer_impl", "hf_config"}
    values = {f.name: getattr(source, f.name) for f in fields(source) if f.name in copied}
    provider = TriModeModelProvider(**values)
    rope = hf_config.get("rope_parameters") or {}
    provider.query_scale_beta = rope.get("llama_4_scaling_beta") or 0.0
    if provider.query_scale_beta:
        provider.query_scale_original_length = rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "yarn" and rope.get("factor") is None:
        rope = {**rope, "factor": hf_config["max_position_embeddings"] / rope["original_max_position_embeddings"]}
    # Plain angles for Megatron; provide() scales them. Its own scalings know some settings only, and some forms.
    provider.rope_parameters, provider.position_embedding_type = rope, "rope"
    provider.seq_len_interpolation_factor, provider.rope_scaling = None, False
    provider.attention_dropout = provider.hidden_dropout = 0.0
    return provider


_OF_A_RUN = (
    "tensor_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel", "context_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "microbatch_group_size_per_vp_stage",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout",
    "attention_kernel", "attention_tile", "attention_options", "transformer_impl", "perform_initialization",
    "use_cpu_initialization", "enable_cuda_graph", "use_te_rng_tracker",
)  # fmt: skip
"""Fields that belong to a machine and a run: parallelism, kernels, initialization."""
_PREFIXES_OF_A_RUN = ("fp8", "fp4", "tp_comm_", "cuda_graph_", "recompute_")
"""Beginnings of more of them: precision, overlap, recomputation."""


def reset_parallelism(provider: TriModeModelProvider) -> None:
    """Reset the settings of parallelism, kernels and the machine to their defaults.

    A checkpoint holds those that trained it, and every run has its own.
    """
    for setting in fields(provider):
        if setting.name in _OF_A_RUN or setting.name.startswith(_PREFIXES_OF_A_RUN):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            setattr(provider, setting.name, default)


def _refuse_unsupported(source: GPTModelProvider, hf_config: HFConfig) -> None:
    name = (hf_config.get("architectures") or [type(source).__name__])[0]
    rope = hf_config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    layer_types = hf_config.get("layer_types")
    has_window = hf_config.get("sliding_window") is not None or getattr(source, "window_size", None) is not None
    features = {
        "its own model class": type(source).provide is not GPTModelProvider.provide,
        "mixture of experts": source.num_moe_experts is not None,
        "latent attention": source.multi_latent_attention,
        "sliding-window attention": "sliding_attention" in layer_types if layer_types else has_window,
        "multi-token prediction": bool(source.mtp_num_layers),
        "biases in attention outputs": source.add_bias_linear,
        f"rope scaling '{kind}', whose angles depend on the length of the text": kind not in SCALINGS,
        "rope scaling of a part of each head": kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    unsupported = [feature for feature, present in features.items() if present]
    if unsupported:
        raise UserError(f"{name} is not supported: it has {', '.join(unsupported)}; use a dense GPT-like decoder.")


def fit_to_host(provider: TriModeModelProvider) -> None:
    """Set the fused kernels that this machine has, whatever the checkpoint says; called at every start."""
    provider.transformer_impl = LAYERS
    # Megatron's SwiGLU is one function in plain torch, which keeps only its input for the backward pass.
    swiglu = provider.gated_linear_unit and provider.activation_func is F.silu
    provider.bias_activation_fusion = swiglu and not provider.add_bias_linear
    provider.bias_dropout_fusion = provider.persist_layer_norm = HAVE_TE
    # An extension of Apex's, which Core's output layer asks for even where Transformer Engine has one of its own.
    provider.gradient_accumulation_fusion = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    # Transformer Engine's kernel knows no factor; a forward whose rows differ in angles is left to Core's own.
    scaling = _rope_scaling(provider)
    provider.apply_rope_fusion = HAVE_TE and (scaling is None or scaling[1] == 1)
    # The head and the attention are this package's.
    provider.cross_entropy_loss_fusion = provider.masked_softmax_fusion = False


def _rope_scaling(provider: TriModeModelProvider) -> tuple[Tensor, float] | None:
    """Return the frequencies [head_dim / 2] fp32 of a scaled rotary embedding, and the factor of sine and cosine.

    Both are those of Transformers' own functions. Without a scaling, return None.
    """
    rope = provider.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    config: Any = PreTrainedConfig()
    config.max_position_embeddings = rope.get("original_max_position_embeddings")
    head_dim = provider.kv_channels or provider.hidden_size // provider.num_attention_heads  # None until finalize()
    config.rope_parameters, config.head_dim = rope, head_dim
    config.hidden_size, config.num_attention_heads = head_dim, 1  # looked up, but head_dim is used
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)
