"""The two modules that a Megatron GPT model is given to become tri-mode."""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nemodiff_train.attention import kernels
from nemodiff_train.attention.context_parallel import KeyQueryLayout
from nemodiff_train.attention.state import AttentionSettings, AttentionState


class TriModeAttention(MegatronModule):
    """Megatron's ``core_attention``: over a training sample, or against a cache.

    Megatron applies rotary positions, QK norms and projections around it as for any GPT model.
    The state is shared by all layers of a model; ``TriModeModelProvider.provide`` sets it.
    """

    def __init__(
        self,
        config: AttentionSettings,
        layer_number: int,
        *unused: object,
        softmax_scale: float | None = None,
        **also_unused: object,
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
        *unused: object,
        **also_unused: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: [positions, batch, heads, head_dim].
            key: [positions, batch, kv_heads, head_dim].
            value: Likewise.
            attention_mask: The segment ids [batch, 3, L] of training samples with documents or changing blocks;
                Megatron carries its attention mask through pipelining and recomputation.
            unused: Megatron's further positional arguments.
            also_unused: Megatron's further keyword arguments.

        Returns:
            [positions, batch, heads * head_dim].
        """
        config, state, batch = self.config, self.state, self.state.decode_batch
        query = self._scale_by_position(query, attention_mask)
        if batch is not None:
            q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
            k, v = batch.extend(self.layer_number, k, v)
            output = kernels.attend_cached(q, k, v, batch.mask, batch.causal, self.softmax_scale)
        else:
            plan = state.plan(config, len(query), attention_mask, query.device)
            if state.context_group is not None and state.shard.size > 1:
                key, value = exchange_keys(key, value, plan.layout, state.context_group)
            q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
            kernel = kernels.select_kernel(
                query.device, plan.causal, config.attention_kernel, config.attention_tile, config.attention_options
            )
            output = kernels.attend(q, k, v, plan, self.softmax_scale, kernel)
        return output.permute(2, 0, 1, 3).flatten(2)  # from [batch, heads, positions, head_dim]

    def _scale_by_position(self, query: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Apply Ministral 3's query scale, 1 + beta * ln(1 + floor(position / original length)).

        All views of a training sample scale alike. The factor is exactly 1 below the original length. (Llama 4's
        temperature tuning.)
        """
        beta = self.config.query_scale_beta
        if not beta:
            return query
        positions = self.state.positions(self.config, len(query), segment_ids, query.device)
        # [positions, batch or 1], then broadcast over heads and head_dim.
        scale = 1 + beta * torch.log1p(torch.floor(positions.T / self.config.query_scale_original_length))
        return query * scale[:, :, None, None].to(query.dtype)


def exchange_keys(key: Tensor, value: Tensor, layout: KeyQueryLayout, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Exchange the clean and the halo keys and values of context-parallel ranks in one collective.

    Noisy positions other than the halo stay where they are. The backward pass is one reduce-scatter.

    Args:
        key: [positions, batch, kv_heads, head_dim], this rank's.
        value: Likewise.
        layout: Which of them to send, and the order of what is received.
        group: The context-parallel process group.

    Returns:
        Keys and values in the order of the layout's keys: [keys, batch, kv_heads, head_dim] each.
    """
    sent = torch.stack([key[layout.sent], value[layout.sent]], dim=1)  # [sent, 2, batch, kv_heads, head_dim]
    gathered = gather_from_sequence_parallel_region(sent, tensor_parallel_output_grad=True, group=group)
    received = gathered[layout.received]  # [halo + L, 2, batch, kv_heads, head_dim]
    noisy = slice(0, len(layout.key_view) - len(layout.received))  # the rank's own
    return torch.cat([key[noisy], received[:, 0]]), torch.cat([value[noisy], received[:, 1]])


class PositionLookupRotary(nn.Module):
    """Rotary angles by position in the sample instead of by index in the tensor.

    Wraps the model's own rotary embedding: its table is computed once and looked up with 0 .. L-1 for each view of a
    training sample, or with each row's own positions in decoding.
    """

    factor = 1.0
    """What a rope scaling multiplies sine and cosine by (YaRN's attention factor)."""

    def __init__(self, rotary: RotaryEmbedding, config: AttentionSettings, state: AttentionState) -> None:
        super().__init__()
        self.rotary = rotary
        self.config = config
        self.state = state

    def get_rotary_seq_len(self, *args: object, **kwargs: object) -> int:
        """Return the number of positions of a forward, as the wrapped embedding does."""
        return int(self.rotary.get_rotary_seq_len(*args, **kwargs))

    def forward(self, positions: int, **unused: object) -> Tensor:
        """Look up the angles of a forward.

        Args:
            positions: Number of positions, over all context-parallel ranks.
            unused: Megatron's further arguments.

        Returns:
            [positions of this rank, batch or 1, 1, head_dim] fp32.
        """
        state = self.state
        # [n, 1, 1, head_dim] angles of positions 0 .. n - 1, for a power of two n that covers all of the forward's.
        needed = positions if state.decode_batch is None else state.decode_batch.position_end
        size = 1 << max(needed - 1, 255).bit_length()
        if size not in state.rotary_tables:
            state.rotary_tables[size] = self.rotary.get_emb(size)
        table = state.rotary_tables[size]
        queries = positions // state.shard.size
        index = state.positions(self.config, queries, state.rotary_segment_ids, table.device)
        return table[:, 0, 0][index.T][:, :, None]
