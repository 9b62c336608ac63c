"""The embedding of the mask token: a check before training, and a remedy for a row that has decayed."""

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.console import warn
from nemodiff_train.distributed import is_main_process
from nemodiff_train.objective.noise import EMBEDDINGS, generator
from nemodiff_train.objective.schedule import embedding_noise_at

DECAYED = 0.1
"""Size of the row, relative to the others, below which it counts as decayed.  Weight decay pulls a row that never
occurred in pretraining towards zero."""


class MaskEmbedding(Callback):
    """Warn when the mask token's row has decayed, and add noise to it early in training when asked.

    LLaDA2.0 (arXiv 2512.15745) reports that the row has decayed towards zero in AR pretraining, which makes gradients
    explode at high noise levels, and adds Gaussian noise to the embedding's output there.

    Args:
        step_context: Knows the samples of the micro-batch that runs forward.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context

    def on_train_start(self, context: CallbackContext) -> None:
        config, first = config_of(context.state), unwrap_model(context.model[0])
        if not config.has_masks or not first.pre_process:
            return
        embedding, mask_token_id = first.embedding.word_embeddings, config.model.mask_token_id
        mask, others = _root_mean_squares(embedding, mask_token_id, config.model.vocab_size)
        if context.state.train_state.step == 0 and mask < DECAYED * others and is_main_process():
            warn(
                f"the embedding of mask token {mask_token_id} is {mask / others:.1%} of the "
                "other rows' size, which can make gradients large at high noise levels; "
                "objective.mask_embedding_noise=1 adds noise to it early in training"
            )
        if not config.objective.mask_embedding_noise:
            return

        def add_noise(module: VocabParallelEmbedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            std = others * embedding_noise_at(config.objective, context.state.train_state.step)
            if not module.training or not std:
                return output
            return output + std * self._noise(config, module, first.attention_state.shard, inputs[0], output)

        embedding.register_forward_hook(add_noise)

    def _noise(
        self,
        config: TriModeConfig,
        embedding: VocabParallelEmbedding,
        shard: ContextParallelShard,
        tokens: Tensor,
        output: Tensor,
    ) -> Tensor:
        """Return standard normal noise at masked positions, 0 elsewhere, of the shape of the embedding's output.

        ``tokens`` are [batch, (V + 1) L / ranks] ids of a context-parallel rank; ``output`` is
        [batch, (V + 1) L / ranks, hidden], or under sequence parallel [its positions, batch, hidden].
        """
        objective, length, indices = config.objective, config.dataset.seq_length, self.step_context.sample_indices
        assert indices is not None  # a stage that embeds tokens has read them
        # Noise of whole samples, [batch, V L, hidden]: a function of the seed and the sample alone.
        samples = []
        for index in indices:
            seed = int(generator(objective.seed, EMBEDDINGS, int(index)).integers(2**63))
            draw = torch.Generator(output.device).manual_seed(seed)
            shape = (objective.noisy_views * length, output.shape[-1])
            samples.append(torch.randn(shape, generator=draw, device=output.device))
        # This rank's positions of every view, where they are masked; then zeros for the clean half.
        views = range(objective.noisy_views)
        local_positions = torch.cat([view * length + shard.positions(length) for view in views])
        masked = tokens[:, : len(local_positions)] == config.model.mask_token_id
        noise = torch.stack(samples)[:, local_positions.to(output.device)] * masked[..., None]
        noise = torch.nn.functional.pad(noise, (0, 0, 0, tokens.shape[1] - len(local_positions)))
        if embedding.reduce_scatter_embeddings:  # sequence parallel: [positions / tensor ranks, batch, hidden]
            noise = noise.transpose(0, 1).chunk(embedding.tp_group.size())[embedding.tp_group.rank()]
        return noise.to(output.dtype)


def _root_mean_squares(embedding: VocabParallelEmbedding, row: int, rows: int) -> tuple[float, float]:
    """Return the root mean square of one row of an embedding, and of the others of a vocabulary of ``rows`` rows."""
    start, end = embedding.vocab_start_index, min(embedding.vocab_end_index, rows)
    # Mean squares of this rank's rows, [rows / tensor-parallel size]; those after the vocabulary are padding.
    squares = embedding.weight.detach()[: max(end - start, 0)].float().square().mean(-1)
    of_row = squares[row - start] if start <= row < end else squares.new_zeros(())
    # The square of the row, and the sum over all rows: [2], added over tensor-parallel ranks.
    totals = torch.stack([of_row, squares.sum()])
    dist.all_reduce(totals, group=embedding.tp_group)
    mask, total = totals.tolist()
    return mask**0.5, ((total - mask) / (rows - 1)) ** 0.5
