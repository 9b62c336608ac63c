"""From prompts to a trained sampler: references, trajectories, two rounds of training, and the choice of its cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import batched

import torch
from torch import Tensor

from nemodiff_train.console import LoopProgress
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.diffusion import has_seeds
from nemodiff_train.decoding.loading import DecodingModel
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.trajectories import Judge, ReferenceBlock, Trajectories, record, reference_blocks
from nemodiff_train.distributed import from_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity
from nemodiff_train.sampler.description import Description, Point
from nemodiff_train.sampler.features import FEATURES
from nemodiff_train.sampler.network import SlotNetwork
from nemodiff_train.sampler.storage import TrainedSampler
from nemodiff_train.sampler.training import States, fit

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Probabilities that the finished sampler is tried at, and the policy ``threshold`` beside it."""
HELD_OUT = 5
"""One prompt per so many is held out from training, and judges the result."""
_HIGHEST = 5.0
"""Log-odds up to which the cuts of training trajectories are drawn, from 0: probabilities of 0.5 to 0.993."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Settings of a sampler's training."""

    trajectories: int = 2000
    """Blocks to decode for training, those of both rounds together."""
    steps: int = 500
    """Optimizer steps of the second round; the first has half as many."""
    layers: int = 4
    width: int = 384
    batch_size: int = 64
    """Blocks decoded together."""
    seed: int = 0
    """Seed of the draws and of the network."""


def confidence(features: Tensor) -> Tensor:
    """Return the model's own probability of each slot's token: the judge of the policy ``threshold``."""
    return features[..., list(FEATURES).index("probability")]


def train_sampler(
    opened: DecodingModel, prompts: Sequence[list[int]], options: SamplerOptions, checkpoint: Checkpoint, task: str
) -> TrainedSampler:
    """Train a sampler for a model on prompts, which no evaluation of it should have.

    Args:
        opened: The model, and settings whose block size and limit on new tokens are taken.
        prompts: Token ids.
        options: How much of it.
        checkpoint: The model's, for the record.
        task: Where the prompts came from, for the record.

    Raises:
        UserError: There are too few prompts, or the model's answers to them have no whole block.
    """
    by_prompt = references(opened, prompts, options.batch_size)
    held_out = [block for blocks in by_prompt[::HELD_OUT] for block in blocks]
    train = [block for number, blocks in enumerate(by_prompt) if number % HELD_OUT for block in blocks]
    if not held_out or not train:
        raise UserError("too few answers end or fill a block; give more prompts, or a higher --max-new-tokens")
    recorder = _Recorder(opened, options.batch_size, torch.Generator().manual_seed(options.seed))
    device = PipelineRunner(opened.model).device
    torch.manual_seed(options.seed)
    network = SlotNetwork(opened.settings.block_size, options.layers, options.width).to(device)

    def trained_judge(features: Tensor) -> Tensor:
        return network(features).sigmoid()

    states: list[States] = []
    rounds: tuple[tuple[Judge, int], ...] = ((confidence, (options.steps + 1) // 2), (trained_judge, options.steps))
    for number, (judge, steps) in enumerate(rounds, 1):
        states.append(recorder.drawn(f"trajectories, round {number}", train, (options.trajectories + 1) // 2, judge))
        _train(network, States.joined(states), steps, options, f"training, round {number}")
    trained = recorder.points("held-out blocks, trained", held_out, trained_judge, CUTS)
    threshold = recorder.points("held-out blocks, threshold", held_out, confidence, CUTS)
    (oracle,) = recorder.points("held-out blocks, oracle", held_out, None, (0.5,))
    description = Description(
        block_size=network.block_size,
        layers=network.layers,
        width=network.width,
        features=list(FEATURES),
        cut=choose_cut(trained, threshold),
        checkpoint=str(checkpoint.iteration),
        checksum=identity(checkpoint.iteration),
        task=task,
        trajectories=options.trajectories,
        trained=trained,
        threshold=threshold,
        oracle=oracle.tokens_per_forward,
    )
    return TrainedSampler(network, description)


def references(opened: DecodingModel, prompts: Sequence[list[int]], batch_size: int) -> list[list[ReferenceBlock]]:
    """Let the model answer prompts carefully, and return the blocks of each answer.

    Mode ``ar`` where the model has it; else block diffusion, one position a forward.
    """
    settings, config = opened.settings, PipelineRunner(opened.model).config
    on_grid, seeds = config.clean_attention == "block_causal", has_seeds(config)
    careful = replace(settings, policy="fixed", steps=settings.block_size)
    blocks = []
    with LoopProgress("reference answers", len(prompts)) as progress:
        for batch in batched(prompts, batch_size):
            answers, _ = decode(opened.model, batch, "diffusion" if on_grid else "ar", careful)
            for prompt, answer in zip(batch, answers, strict=True):
                blocks.append(reference_blocks(prompt, answer, settings.block_size, on_grid=on_grid, seeds=seeds))
            progress.advance(len(batch))
    return blocks


def choose_cut(trained: Sequence[Point], threshold: Sequence[Point]) -> float:
    """Return the lowest cut with no larger share of wrong tokens than the policy ``threshold`` has at its best.

    Where no cut is as good, return the lowest of the sampler's own best.
    """
    bound = max(min(point.wrong for point in points) for points in (trained, threshold))
    return next(point.cut for point in trained if point.wrong <= bound)


@dataclass(frozen=True)
class _Recorder:
    """Decodes blocks in batches."""

    opened: DecodingModel
    batch_size: int
    draw: torch.Generator

    def drawn(self, description: str, blocks: Sequence[ReferenceBlock], count: int, judge: Judge) -> States:
        """Return the states of so many blocks, each decoded as often as any other, at cuts that are drawn."""
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(blocks), generator=self.draw).tolist()
        cuts = (_HIGHEST * torch.rand(count, generator=self.draw)).sigmoid()
        with LoopProgress(description, count) as progress:
            parts = self._decoded([blocks[index] for index in order[:count]], judge, cuts, progress.advance)
        return States.joined([part.states for part in parts])

    def points(
        self, description: str, blocks: Sequence[ReferenceBlock], judge: Judge | None, cuts: Sequence[float]
    ) -> list[Point]:
        """Decode blocks at every cut, and sum up."""
        points = []
        with LoopProgress(description, len(cuts) * len(blocks)) as progress:
            for cut in cuts:
                parts = self._decoded(blocks, judge, torch.full((len(blocks),), cut), progress.advance)
                tokens, forwards = sum(part.tokens for part in parts), sum(part.forwards for part in parts)
                wrong = sum(part.wrong for part in parts)
                points.append(Point(cut=cut, tokens_per_forward=tokens / forwards, wrong=wrong / tokens))
        return points

    def _decoded(
        self, blocks: Sequence[ReferenceBlock], judge: Judge | None, cuts: Tensor, advance: Callable[[int], None]
    ) -> list[Trajectories]:
        parts = []
        for batch in batched(range(len(blocks)), self.batch_size):
            batch_blocks, batch_cuts = [blocks[index] for index in batch], cuts[list(batch)]
            block_size = self.opened.settings.block_size
            parts.append(record(self.opened.model, batch_blocks, block_size, judge, batch_cuts))
            advance(len(batch))
        return parts


def _train(network: SlotNetwork, states: States, steps: int, options: SamplerOptions, description: str) -> None:
    """Train a network, in place, on rank 0, and give all ranks its weights: they have to decide alike to the bit."""

    def fitted() -> dict[str, Tensor]:
        with LoopProgress(description, steps) as progress:
            for _ in fit(network, states, steps=steps, batch_size=32, learning_rate=1e-3, seed=options.seed):
                progress.advance(1)
        return {name: tensor.cpu() for name, tensor in network.state_dict().items()}

    network.load_state_dict(from_main_process(fitted))
    network.eval()
