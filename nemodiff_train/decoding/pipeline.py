"""A model on one process or over a pipeline, as one function from tokens to logits."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.attention.cache import DecodeBatch
from nemodiff_train.decoding.forward import can_fast_forward, fast_forward, logits_at


class PipelineRunner:
    """Runs the model chunks of all pipeline ranks one after another.

    Every rank of a pipeline calls it with the same tokens and gets the same logits.

    Args:
        model: A Megatron GPT model made by ``TriModeModelProvider``, or this rank's model chunks in order.
    """

    def __init__(self, model: Any) -> None:
        self.chunks = [unwrap_model(chunk) for chunk in (model if isinstance(model, list) else [model])]
        self.config = self.chunks[0].config
        self.device = next(self.chunks[0].parameters()).device
        self.layers = sum(len(chunk.decoder.layers) for chunk in self.chunks)
        self._plain = all(can_fast_forward(chunk) for chunk in self.chunks)
        self._group = self.chunks[0].pg_collection.pp
        self._rank, self._size = self._group.rank(), self._group.size()

    def __call__(self, tokens: Tensor, cached: DecodeBatch, places: Tensor | None = None) -> Tensor:
        """Run new tokens behind a cache.

        Args:
            tokens: [batch, new].
            cached: Where they lie and what they see.
            places: [batch, k] of the new tokens whose logits are wanted; None for all.

        Returns:
            [batch, k or new, padded vocab] logits.
        """
        passed: Tensor | None = None
        stages = len(self.chunks) * self._size
        for stage in range(stages):
            chunk, owner = divmod(stage, self._size)
            if owner != self._rank:
                continue
            if stage:
                passed = self._receive(tokens, stage) if self._size > 1 else passed
                self.chunks[chunk].set_input_tensor(passed)
            passed = self._run(self.chunks[chunk], tokens, cached, places)
            if self._size > 1 and stage + 1 < stages:
                dist.send(passed.contiguous(), self._global(stage + 1), self._group)
        return self._share(tokens if places is None else places, passed)

    def _run(self, chunk: Any, tokens: Tensor, cached: DecodeBatch, places: Tensor | None) -> Tensor:
        chunk.attention_state.decode_batch = cached
        try:
            if self._plain:
                return fast_forward(chunk, tokens, places)
            output: Tensor = chunk(
                input_ids=tokens,
                position_ids=cached.positions,
                attention_mask=None,
                output_processor=lambda **stage: logits_at(stage["hidden_states"], places, chunk),
            )
            return output
        finally:
            chunk.attention_state.decode_batch = None

    def _receive(self, tokens: Tensor, stage: int) -> Tensor:
        shape = (tokens.shape[1], tokens.shape[0], self.config.hidden_size)
        states = torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device)
        dist.recv(states, self._global(stage - 1), self._group)
        return states

    def _global(self, stage: int) -> int:
        """Global rank of the process that has a stage."""
        return dist.get_global_rank(self._group, stage % self._size)

    def _share(self, places: Tensor, logits: Tensor | None) -> Tensor:
        """The last stage's logits, one for each of ``places``, on every rank."""
        if self._size > 1:
            last = self._rank == self._size - 1
            if not last:
                width = self.chunks[0].vocab_size
                logits = torch.empty(*places.shape, width, dtype=self.config.pipeline_dtype, device=self.device)
            assert logits is not None
            logits = logits.contiguous()
            dist.broadcast(logits, self._global(self._size - 1), self._group)
        assert logits is not None
        return logits
