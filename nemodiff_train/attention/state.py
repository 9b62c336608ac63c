"""State that the attention modules of one model share during a forward pass."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemodiff_train.attention.cache import DecodeBatch
from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.plan import AttentionPlan, segmented_plan, uniform_plan
from nemodiff_train.objective.drafts import DRAFT_KINDS, DraftKind

# More than a pipeline rank has micro-batches in flight in most layouts; a plan that is missing is constructed again.
PLANS_KEPT = 16


class AttentionSettings(Protocol):
    """What attention reads of a model's configuration, of which ``TriModeModelProvider`` documents the fields."""

    noisy_views: int
    block_size: int
    largest_block: int
    clean_attention: str
    causal_noise: bool
    attention_kernel: str
    attention_tile: int
    attention_options: dict[str, Any]
    query_scale_beta: float
    query_scale_original_length: int


@dataclass
class AttentionState:
    """Shared by every attention module and the rotary embedding of one model.

    Decoding sets ``decode_batch`` for the length of one forward. In training nothing changes from one micro-batch to
    the next but the segment ids, which travel as Megatron's attention mask instead: recomputation and pipelining run
    layers of one micro-batch between those of another.
    """

    decode_batch: DecodeBatch | None = None
    shard: ContextParallelShard = field(default_factory=ContextParallelShard)
    """This process's context-parallel shard."""
    context_group: ProcessGroup | None = None
    """The process group of context parallelism."""
    rotary_tables: dict[int, Tensor] = field(default_factory=dict)
    """Rotary angles by number of positions, as the model's own embedding returns them."""
    rotary_segment_ids: Tensor | None = None
    """The segment ids of the micro-batch that is about to run forward, for the rotary embedding."""
    draft_kind: DraftKind = DRAFT_KINDS["nemotron"]
    """Kind of the drafts of the model's drafter, and of a model without one."""
    plans: dict[tuple[int, ...], tuple[Tensor, AttentionPlan]] = field(default_factory=dict)
    """Plans of the last few micro-batches, by the address and shape of their segment ids."""

    def draft_range(self, positions: int, views: int) -> tuple[int, int]:
        """Return the first position and the end of a forward's drafts: of the noisy views, or of a draft forward.

        Args:
            positions: Number of positions of the forward.
            views: Noisy views of a training sample.
        """
        if self.decode_batch is None:
            return 0, positions * views // (views + 1)
        if not self.decode_batch.is_draft:
            return 0, 0
        return int(not self.draft_kind.known_token_in_block), positions

    def plan(
        self, config: AttentionSettings, queries: int, segment_ids: Tensor | None, device: torch.device
    ) -> AttentionPlan:
        """Return who attends to whom in a training forward.

        Args:
            config: The model's configuration.
            queries: Number of queries on this rank.
            segment_ids: [batch, 3, L] of :class:`~nemodiff_train.objective.sample.SampleMaker`, or None where
                samples are one document with blocks of one size.
            device: Where the plan is needed.
        """
        views, shard, causal_noise = config.noisy_views, self.shard, config.causal_noise
        block_causal = config.clean_attention == "block_causal" and views > 0
        if segment_ids is None:
            length = queries * shard.size // (views + 1)
            return uniform_plan(views, length, config.block_size, block_causal, shard, device, causal_noise)
        key = (segment_ids.data_ptr(), *segment_ids.shape)
        if key not in self.plans:
            while len(self.plans) >= PLANS_KEPT:
                self.plans.pop(next(iter(self.plans)))
            plan = segmented_plan(views, segment_ids, block_causal, config.largest_block, shard, causal_noise)
            self.plans[key] = (segment_ids, plan)  # holding the tensor keeps its address from being used again
        return self.plans[key][1]

    def positions(
        self, config: AttentionSettings, queries: int, segment_ids: Tensor | None, device: torch.device
    ) -> Tensor:
        """Return the position of every query of a forward on this rank: [batch or 1, queries].

        Args:
            config: The model's configuration.
            queries: Number of queries on this rank.
            segment_ids: As :meth:`plan` takes them, in training.
            device: Where the positions are needed.
        """
        if self.decode_batch is not None:
            return self.decode_batch.positions
        copies = config.noisy_views + 1
        index = self.shard.positions(queries * self.shard.size // copies, device)  # [L / size]
        positions = index[None] if segment_ids is None else segment_ids[:, 2, index].long()
        return positions.repeat(1, copies)
