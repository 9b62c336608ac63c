"""One model chunk as plain functions of its weights, for decoding."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def can_fast_forward(chunk: Any) -> bool:
    """Whether :func:`fast_forward` can take the place of a model chunk's own forward.

    It knows Megatron-Core's own layers and a drafter's; those of Transformer Engine, other adapters, and key heads
    that tensor-parallel ranks share are left to Megatron.
    """
    config = chunk.config
    layers = [
        (
            layer.self_attention.linear_qkv,
            _without_drafter(layer.self_attention.linear_proj),
            layer.mlp.linear_fc1,
            layer.mlp.linear_fc2,
        )
        for layer in chunk.decoder.layers
    ]
    kinds = (ColumnParallelLinear, RowParallelLinear) * 2
    return (
        all(type(linear) is kind for found in layers for linear, kind in zip(found, kinds, strict=True))
        and config.num_query_groups >= config.tensor_model_parallel_size
        and not config.rotary_interleaved
        and not config.fp32_residual_connection
    )


def fast_forward(chunk: Any, tokens: Tensor, places: Tensor | None) -> Tensor:
    """The chunk's forward.

    Megatron's modules are made for training: each linear layer is an autograd function that looks up groups and
    environment variables, and each layer takes the sine and cosine of the rotary angles again.  For one token
    of a small model that costs more than the arithmetic.

    Args:
        chunk: A Megatron GPT model for which :func:`can_fast_forward` holds, its attention state set for this pass and
            its input tensor to the states of the stage before.
        tokens: [batch, new].
        places: [batch, k] of the new tokens whose logits are wanted; None for all.

    Returns:
        [batch, k or new, padded vocab] logits on the last stage, else [new, batch, hidden] states.
    """
    states = chunk.decoder.input_tensor
    if chunk.pre_process:
        states = chunk.embedding.word_embeddings(tokens).transpose(0, 1)
    rotary = _rotary(chunk, tokens.shape[1], states.dtype)
    for layer in chunk.decoder.layers:
        states = states + _attention(layer.self_attention, layer.input_layernorm(states), rotary)
        states = states + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(states))
    if not chunk.post_process:
        return states
    return logits_at(chunk.decoder.final_layernorm(states), places, chunk)


def logits_at(states: Tensor, places: Tensor | None, chunk: Any) -> Tensor:
    """Logits [batch, k or new, padded vocab] of [new, batch, hidden] final states, at [batch, k] places or all."""
    if places is not None:  # the logits of a long prompt would be larger than the model
        states = states.gather(0, places.T[..., None].expand(-1, -1, states.shape[2]))
    shared = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    logits: Tensor = chunk.output_layer(states, weight=shared, runtime_gather_output=True)[0]
    return logits.transpose(0, 1)


def _rotary(chunk: Any, new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, and sines negated in the first half: each [new, batch or 1, 1, head_dim]."""
    angles = chunk.rotary_pos_emb(new)
    angles, factor = angles if isinstance(angles, tuple) else (angles, 1.0)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos.to(dtype), sin.to(dtype)


def _attention(attention: Any, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    projection = attention.linear_qkv
    groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    mixed = F.linear(states, projection.weight, projection.bias)
    mixed = mixed.view(*mixed.shape[:2], groups, -1, width)  # a group's queries, its key, its value
    query, key, value = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    out = attention.core_attention(_rotated(query, *rotary), _rotated(key, *rotary), value)
    return _attention_output(attention.linear_proj, out)


def _attention_output(projection: Any, states: Tensor) -> Tensor:
    if not _drafts(projection):
        return _row_parallel(projection, states)
    out, correction = _row_parallel(projection.to_wrap, states), projection.correction(states)
    return out if correction is None else out + correction


def _drafts(projection: Any) -> bool:
    """Whether it is a ``DraftProjection``, whose class can be imported only where the host is prepared."""
    return hasattr(projection, "correction")


def _without_drafter(projection: Any) -> Any:
    return projection.to_wrap if _drafts(projection) else projection


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [new, batch, heads, head_dim]; dimensions past the angles' stay as they are (partial rotary)."""
    size = cos.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _feed_forward(mlp: Any, states: Tensor) -> Tensor:
    inner = F.linear(states, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
    if mlp.config.gated_linear_unit:
        gate, up = inner.chunk(2, dim=-1)
        inner = mlp.activation_func(gate).mul_(up)
    else:
        inner = mlp.activation_func(inner)
    return _row_parallel(mlp.linear_fc2, inner)


def _row_parallel(linear: Any, states: Tensor) -> Tensor:
    """A projection whose input the tensor-parallel ranks hold in parts."""
    out = F.linear(states, linear.weight)
    if linear.tp_group.size() > 1:
        dist.all_reduce(out, group=linear.tp_group)
    return out
