"""The embedding of the mask token: a look at it before training, and a remedy for one that has decayed."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.console import console
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.noise import EMBEDDINGS
from nemodiff_train.objective.noise import generator as draw
from nemodiff_train.objective.schedule import embedding_noise_at
from nemodiff_train.training.step import ForwardStep

# A row that never occurred in pretraining is pulled towards zero by weight decay.
DECAYED = 0.1


class MaskEmbedding(Callback):
    """Says so when the mask token's row has decayed, and adds noise to it early in training when asked.

    LLaDA2.0 (arXiv 2512.15745) reports that the row has decayed towards zero in AR pretraining, which
    blows gradients up at high noise levels, and adds Gaussian noise to the embedding's output there.

    Args:
        step: The forward step, which knows the micro-batch that is running.
    """

    def __init__(self, step: ForwardStep) -> None:
        self.step = step

    def on_train_start(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        first = unwrap_model(context.model[0])
        if config.objective.stage != "joint" or not first.pre_process:
            return
        table = first.embedding.word_embeddings
        mask, others = root_mean_squares(table, config.model.mask_token_id, config.model.vocab_size)
        if context.state.train_state.step == 0 and mask < DECAYED * others and dist.get_rank() == 0:
            console.print(
                f"[yellow]the embedding of mask token {config.model.mask_token_id} is {mask / others:.1%} of the "
                "other rows' size, which can make gradients large at high noise levels; "
                "objective.mask_embedding_noise=1 adds noise to it early in training[/yellow]"
            )
        if config.objective.mask_embedding_noise:
            self._add_noise(context, table, first.attention_state.shard, others)

    def _add_noise(self, context: CallbackContext, table: Any, shard: ContextParallelShard, size: float) -> None:
        config: Any = context.state.cfg

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            std = size * embedding_noise_at(config.objective, context.state.train_state.step)
            if not module.training or not std:
                return output
            return output + std * self._noise(config, module, shard, inputs[0], output)

        table.register_forward_hook(hook)

    def _noise(self, config: Any, table: Any, shard: ContextParallelShard, tokens: Tensor, output: Tensor) -> Tensor:
        """Standard normal noise at masked places, 0 elsewhere, of the shape of the embedding's output."""
        assert self.step.batch is not None  # a stage that embeds tokens has them
        length = config.dataset.seq_length
        noise = torch.stack([_gaussian(config.objective, int(i), length, output) for i in self.step.batch["index"]])
        own = torch.cat([view * length + shard.positions(length) for view in range(config.objective.noisy_views)])
        noise = noise[:, own.to(noise.device)] * (tokens[:, : len(own)] == config.model.mask_token_id)[..., None]
        noise = torch.nn.functional.pad(noise, (0, 0, 0, tokens.shape[1] - len(own)))
        if table.reduce_scatter_embeddings:  # sequence parallel: [positions / tensor ranks, batch, hidden]
            noise = noise.transpose(0, 1).chunk(table.tp_group.size())[table.tp_group.rank()]
        return noise.to(output.dtype)


def _gaussian(objective: ObjectiveConfig, index: int, length: int, like: Tensor) -> Tensor:
    """[views * length, hidden] noise of one sample, a function of the seed and the sample alone."""
    seed = int(draw(objective.seed, EMBEDDINGS, index).integers(2**63))
    generator = torch.Generator(like.device).manual_seed(seed)
    shape = (objective.noisy_views * length, like.shape[-1])
    return torch.randn(shape, generator=generator, device=like.device)


def root_mean_squares(table: Any, row: int, rows: int) -> tuple[float, float]:
    """Root mean square of one row of a vocabulary-parallel embedding, and of the vocabulary's other rows.

    Args:
        table: Megatron's ``VocabParallelEmbedding``.
        row: Id of the token.
        rows: Tokens of the vocabulary; rows behind them are padding.
    """
    start, end = table.vocab_start_index, min(table.vocab_end_index, rows)
    squares = table.weight.detach()[: max(end - start, 0)].float().square().mean(-1)
    own = squares[row - start] if start <= row < end else squares.new_zeros(())
    both = torch.stack([own, squares.sum()])
    dist.all_reduce(both, group=table.tp_group)
    mask, total = both.tolist()
    return mask**0.5, ((total - mask) / (rows - 1)) ** 0.5
