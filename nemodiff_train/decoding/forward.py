"""One model chunk as plain functions of its weights, for decoding."""

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from nemodiff_train.attention.state import AttentionState
from nemodiff_train.model.draft_adapter import DraftLinear


def can_fast_forward(chunk: GPTModel) -> bool:
    """Return whether :func:`fast_forward` can take the place of a model chunk's own forward.

    It knows Megatron-Core's own layers and a drafter's; those of Transformer Engine, other adapters, and key heads
    that tensor-parallel ranks share are left to Megatron.
    """
    config = chunk.config
    layers = chunk.decoder.layers
    columns = [linear for layer in layers for linear in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1)]
    rows = [linear for layer in layers for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2)]
    return (
        all(type(_base(linear)) is ColumnParallelLinear for linear in columns)
        and all(type(_base(linear)) is RowParallelLinear for linear in rows)
        and config.num_query_groups >= config.tensor_model_parallel_size
        and not config.rotary_interleaved
        and not config.fp32_residual_connection
    )


def fast_forward(chunk: GPTModel, tokens: Tensor, indices: Tensor | None) -> Tensor:
    """Run a chunk's forward.

    Megatron's modules are made for training: each linear layer is an autograd function that looks up groups and
    environment variables, and each layer takes the sine and cosine of the rotary angles again.  For one token
    of a small model that costs more than the arithmetic.

    Args:
        chunk: A model chunk for which :func:`can_fast_forward` holds, its attention state set for this forward and
            its input tensor set to the states of the stage before.
        tokens: [batch, new] token ids.
        indices: [batch, k] indices of the new tokens whose logits are wanted; None for all.

    Returns:
        What :func:`logits_at` returns on the last stage, else [new, batch, hidden] states.
    """
    states: Tensor = chunk.decoder.input_tensor
    if chunk.pre_process:
        states = chunk.embedding.word_embeddings(tokens).transpose(0, 1)
    rotary = _rotary(chunk, tokens.shape[1], states.dtype)
    for layer in chunk.decoder.layers:  # pre-norm residual blocks on [new, batch, hidden]
        states = states + _attention(layer.self_attention, layer.input_layernorm(states), rotary)
        states = states + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(states))
    if not chunk.post_process:
        return states
    return logits_at(chunk.decoder.final_layernorm(states), indices, chunk)


def logits_at(states: Tensor, indices: Tensor | None, chunk: GPTModel) -> Tensor:
    """Return the logits of some final states; those of a long prompt would be larger than the model.

    Args:
        states: [new, batch, hidden].
        indices: [batch, k] into the first dimension; None for all.
        chunk: The last pipeline stage.

    Returns:
        [batch, k or new, vocab]; in a draft forward of a model with a path selector, the contexts of its scores come
        after the logits: [batch, k or new, vocab + rank].
    """
    if indices is not None:
        states = states.gather(0, indices.T[..., None].expand(-1, -1, states.shape[2]))
    shared = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    logits: Tensor = chunk.output_layer(states, weight=shared, runtime_gather_output=True)[0]
    logits = logits[..., : chunk.config.vocab_size]  # the weight is padded
    state: AttentionState = chunk.attention_state
    if chunk.selector_tables is not None and state.decode_batch is not None and state.decode_batch.is_draft:
        logits = torch.cat([logits, chunk.selector.contexts(states)], dim=-1)
    return logits.transpose(0, 1)


def _rotary(chunk: GPTModel, new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines, and sines negated in the first half: each [new, batch or 1, 1, head_dim]."""
    angles, factor = chunk.rotary_pos_emb(new), chunk.rotary_pos_emb.factor
    cos, sin = angles.cos() * factor, angles.sin() * factor
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos.to(dtype), sin.to(dtype)


def _attention(attention: SelfAttention, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the attention output [new, batch, hidden] of normalised states [new, batch, hidden]."""
    projection = attention.linear_qkv
    groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    mixed = _column_parallel(projection, states)
    # [new, batch, group, heads, head_dim]: the queries of a key head, then its key and its value.
    mixed = mixed.view(*mixed.shape[:2], groups, -1, width)
    query, key, value = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    out = attention.core_attention(_rotate(query, *rotary), _rotate(key, *rotary), value)
    return _row_parallel(attention.linear_proj, out)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [new, batch, heads, head_dim]; dimensions past the angles' stay as they are (partial rotary)."""
    size = cos.shape[-1]
    rotated, rest = heads[..., :size], heads[..., size:]
    # x cos + swap(x) sin, where swap exchanges the halves and ``sin`` holds the minus sign of the first.
    rotated = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def _feed_forward(mlp: MLP, states: Tensor) -> Tensor:
    """Return the feed-forward output [new, batch, hidden] of normalised states [new, batch, hidden]."""
    inner = _column_parallel(mlp.linear_fc1, states)
    if mlp.config.gated_linear_unit:  # the gate's rows, then the up projection's
        gate, up = inner.chunk(2, dim=-1)
        inner = mlp.activation_func(gate).mul_(up)
    else:
        inner = mlp.activation_func(inner)
    return _row_parallel(mlp.linear_fc2, inner)


def _column_parallel(linear: nn.Module, states: Tensor) -> Tensor:
    """Project [new, batch, inputs] to this tensor-parallel rank's part of the outputs."""
    base = _base(linear)
    return _corrected(linear, states, F.linear(states, base.weight, base.bias))


def _row_parallel(linear: nn.Module, states: Tensor) -> Tensor:
    """Project states whose last dimension is split over the tensor-parallel ranks, and sum over the ranks."""
    base = _base(linear)
    out = F.linear(states, base.weight)
    if base.tp_group.size() > 1:
        dist.all_reduce(out, group=base.tp_group)
    return _corrected(linear, states, out)


def _base(linear: nn.Module) -> ColumnParallelLinear | RowParallelLinear:
    """Return a linear layer without its drafter's adapters."""
    base = linear.to_wrap if isinstance(linear, DraftLinear) else linear
    return cast(ColumnParallelLinear | RowParallelLinear, base)


def _corrected(linear: nn.Module, states: Tensor, out: Tensor) -> Tensor:
    """Return a linear layer's output, with what its drafter's adapters add."""
    correction = linear.correction(states, len(states)) if isinstance(linear, DraftLinear) else None
    return out if correction is None else out + correction
