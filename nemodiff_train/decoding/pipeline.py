"""A model on one process or over a pipeline, as one function from tokens to logits."""

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.attention.cache import DecodeBatch
from nemodiff_train.decoding.forward import can_fast_forward, fast_forward, logits_at
from nemodiff_train.model.path_selector import SelectorTables
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective.drafts import DraftKind


class PipelineRunner:
    """Runs the model chunks of all pipeline ranks one after another.

    Every rank of a pipeline calls it with the same tokens and gets the same logits.

    Args:
        model: This pipeline rank's chunks of a Megatron GPT model made by ``TriModeModelProvider``, or the model.
    """

    def __init__(self, model: GPTModel | list[GPTModel]) -> None:
        self.chunks: list[GPTModel] = [
            unwrap_model(chunk) for chunk in (model if isinstance(model, list) else [model])
        ]
        self.config: TriModeModelProvider = self.chunks[0].config
        self.device: torch.device = next(self.chunks[0].parameters()).device
        self.draft_kind: DraftKind = self.chunks[0].attention_state.draft_kind
        self.selector_tables: SelectorTables | None = self.chunks[0].selector_tables
        self.layers = sum(len(chunk.decoder.layers) for chunk in self.chunks)
        self._fast = all(can_fast_forward(chunk) for chunk in self.chunks)
        self._group: dist.ProcessGroup = self.chunks[0].pg_collection.pp
        self._rank, self._size = self._group.rank(), self._group.size()

    def __call__(self, tokens: Tensor, batch: DecodeBatch, indices: Tensor | None = None) -> Tensor:
        """Run new tokens after the cached ones.

        Args:
            tokens: [batch, new] token ids.
            batch: Their positions and attention.
            indices: [batch, k] indices of the new tokens whose logits are wanted; None for all.

        Returns:
            What :func:`~nemodiff_train.decoding.forward.logits_at` returns.
        """
        output: Tensor | None = None  # the last stage's [new, batch, hidden] states, then the logits
        stages = len(self.chunks) * self._size
        for stage in range(stages):  # stage s is chunk s // size of rank s % size
            chunk_index, owner = divmod(stage, self._size)
            if owner != self._rank:
                continue
            chunk = self.chunks[chunk_index]
            if stage:
                if self._size > 1:
                    output = self._empty(tokens.shape[1], tokens.shape[0], self.config.hidden_size)
                    dist.recv(output, self._owner(stage - 1), self._group)
                chunk.set_input_tensor(output)
            output = self._run(chunk, tokens, batch, indices)
            if self._size > 1 and stage + 1 < stages:
                dist.send(output.contiguous(), self._owner(stage + 1), self._group)
        if self._size > 1:  # give every rank what the last stage has computed
            if self._rank != self._size - 1:
                contexts = self.selector_tables.rank if self.selector_tables is not None and batch.is_draft else 0
                shape = (tokens if indices is None else indices).shape
                output = self._empty(*shape, self.config.vocab_size + contexts)
            assert output is not None  # the last rank has run the last stage
            output = output.contiguous()
            dist.broadcast(output, self._owner(self._size - 1), self._group)
        assert output is not None
        return output

    def _run(self, chunk: GPTModel, tokens: Tensor, batch: DecodeBatch, indices: Tensor | None) -> Tensor:
        """Return what :func:`fast_forward` does, by it or by Megatron's modules."""
        chunk.attention_state.decode_batch = batch
        try:
            if self._fast:
                return fast_forward(chunk, tokens, indices)
            output: Tensor = chunk(
                input_ids=tokens,
                position_ids=batch.positions,
                attention_mask=None,
                output_processor=lambda **stage: logits_at(stage["hidden_states"], indices, chunk),
            )
            return output
        finally:
            chunk.attention_state.decode_batch = None

    def _empty(self, *shape: int) -> Tensor:
        """Return memory for what another rank sends."""
        return torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device)

    def _owner(self, stage: int) -> int:
        """Return the global rank of the process that runs a stage."""
        return dist.get_global_rank(self._group, stage % self._size)
