"""The two modules that a Megatron GPT model is given to become tri-mode."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nemodiff_train.attention import kernels
from nemodiff_train.attention.context_parallel import gather_keys
from nemodiff_train.attention.selection import Kernel, select_kernel
from nemodiff_train.attention.state import AttentionState


class TriModeAttention(MegatronModule):
    """Megatron's ``core_attention``: over a training sample, or against a cache.

    Megatron applies rotary positions, QK norms and projections around it as for any GPT model.
    The state is shared by all layers of a model; ``TriModeModelProvider.provide`` sets it.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *unused: Any,
        softmax_scale: float | None = None,
        **also_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.state = AttentionState()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *unused: Any,
        **also_unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [positions, batch, heads, head_dim].
            key: [positions, batch, kv_heads, head_dim]; ``value`` likewise.
            attention_mask: The ``segment_ids`` [batch, 3, L] of training samples with documents or changing
                blocks; Megatron carries its attention mask through pipelining and recomputation.

        Returns:
            [positions, batch, heads * head_dim].
        """
        cached = self.state.decode_batch
        query = self._scaled_by_position(query, attention_mask)
        if cached is not None:
            q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
            k, v = cached.extend(self.layer_number, k, v)
            out = kernels.attend_cached(q, k, v, cached.mask, self.softmax_scale)
        else:
            plan = self.state.plan(self.config, len(query), attention_mask, query.device)
            if self.state.shard.size > 1:
                key, value = gather_keys(key, value, plan, self.state.context_group)
            q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
            kernel = self._kernel(query.device, plan.causal)
            out = kernels.attend(q, k, v, plan, self.softmax_scale, kernel)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _kernel(self, device: torch.device, causal: bool) -> Kernel:
        config = self.config
        return select_kernel(device, causal, config.attention_kernel, config.attention_tile, config.attention_options)

    def _scaled_by_position(self, query: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Ministral 3's query scale, 1 + beta * ln(1 + floor(position / original length)).

        Positions are places in the text, so all views of a training sample scale alike; it is
        exactly 1 below the original length (Llama 4's temperature tuning).
        """
        beta = self.config.query_scale_beta
        if not beta:
            return query
        cached = self.state.decode_batch
        if cached is None:
            place = self.state.positions(self.config, len(query), segment_ids, query.device).T
        else:
            place = cached.positions.T
        scale = 1 + beta * torch.log1p(torch.floor(place / self.config.query_scale_original_length))
        return query * scale[:, :, None, None].to(query.dtype)


class PositionLookupRotary(nn.Module):
    """Rotary angles by place in the text instead of by position in the tensor.

    Wraps the model's own rotary embedding (RoPE, YaRN, ...): its table is computed once and looked up
    with 0 .. L-1 for each view of a training sample, or with each row's own positions in decoding.
    """

    def __init__(self, rotary: Any, config: Any, state: AttentionState) -> None:
        super().__init__()
        self.rotary = rotary
        self.config = config
        self.state = state

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return int(self.rotary.get_rotary_seq_len(*args, **kwargs))

    def forward(self, positions: int, **unused: Any) -> Any:
        """Angles for this forward: [positions, batch or 1, 1, head_dim], fp32.

        Returns:
            The angles, with YaRN's magnitude factor where the wrapped embedding returns one.
        """
        cached = self.state.decode_batch
        table, factor = self._table(positions if cached is None else cached.visible)
        if cached is None:
            own = positions // self.state.shard.size
            place = self.state.positions(self.config, own, self.state.rotary_segment_ids, table.device)
        else:
            place = cached.positions
        angles = table[:, 0, 0][place.T][:, :, None]
        return angles if factor is None else (angles, factor)

    def _table(self, at_least: int) -> tuple[Tensor, float | None]:
        """Angles of places 0 .. n-1 with n >= ``at_least``: [n, 1, 1, head_dim]."""
        size = 1 << max(at_least - 1, 255).bit_length()
        if size not in self.state.tables:
            self.state.tables[size] = self.rotary.get_emb(size)
        table = self.state.tables[size]
        return table if isinstance(table, tuple) else (table, None)
