"""From prompts to a trained sampler: references, trajectories, two rounds of training, and its threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import batched

import torch
from torch import Tensor

from nemodiff_train.console import LoopProgress
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.diffusion import has_known_first_token
from nemodiff_train.decoding.loading import DecodingModel
from nemodiff_train.decoding.trajectories import (
    ConfidenceFunction,
    ReferenceBlock,
    Trajectories,
    record,
    reference_blocks,
)
from nemodiff_train.distributed import from_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity
from nemodiff_train.sampler.description import Description, Point
from nemodiff_train.sampler.features import FEATURES
from nemodiff_train.sampler.network import SlotNetwork
from nemodiff_train.sampler.storage import TrainedSampler
from nemodiff_train.sampler.training import States, fit

Blocks = Sequence[ReferenceBlock]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Probabilities that the finished sampler is tried at, and the policy ``threshold`` beside it."""
HELD_OUT = 5
"""One prompt per so many is held out from training, and tests the result."""
_HIGHEST = 5.0
"""Log-odds up to which the thresholds of training trajectories are drawn, from 0: probabilities of 0.5 to 0.993."""


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


def model_confidence(features: Tensor) -> Tensor:
    """Return the model's own probability of each slot's token: the confidence of the policy ``threshold``."""
    return features[..., list(FEATURES).index("probability")]


def train_sampler(
    loaded: DecodingModel, prompts: Sequence[list[int]], options: SamplerOptions, checkpoint: Checkpoint, task: str
) -> TrainedSampler:
    """Train a sampler for a model on prompts, which no evaluation of it should have.

    Args:
        loaded: The model, and settings whose block size and limit on new tokens are taken.
        prompts: Token ids.
        options: How much of it.
        checkpoint: The model's, for the record.
        task: Where the prompts came from, for the record.

    Raises:
        UserError: There are too few prompts, or the model's answers to them have no whole block.
    """
    by_prompt = references(loaded, prompts, options.batch_size)
    held_out = [block for blocks in by_prompt[::HELD_OUT] for block in blocks]
    train = [block for number, blocks in enumerate(by_prompt) if number % HELD_OUT for block in blocks]
    if not held_out or not train:
        raise UserError("too few answers end or fill a block; give more prompts, or a higher --max-new-tokens")
    recorder = _Recorder(loaded, options.batch_size, torch.Generator().manual_seed(options.seed))
    device = loaded.device
    torch.manual_seed(options.seed)
    network = SlotNetwork(loaded.settings.block_size, options.layers, options.width).to(device)

    def trained_confidence(features: Tensor) -> Tensor:
        return network(features).sigmoid()

    states: list[States] = []
    rounds: tuple[tuple[ConfidenceFunction, int], ...] = (
        (model_confidence, (options.steps + 1) // 2),
        (trained_confidence, options.steps),
    )
    count = (options.trajectories + 1) // 2
    for number, (confidence, steps) in enumerate(rounds, 1):
        states.append(recorder.drawn(f"trajectories, round {number}", train, count, confidence))
        _train(network, States.joined(states), steps, options, f"training, round {number}")
    trained = recorder.points("held-out blocks, trained", held_out, trained_confidence, THRESHOLDS)
    threshold_policy = recorder.points("held-out blocks, threshold", held_out, model_confidence, THRESHOLDS)
    (oracle,) = recorder.points("held-out blocks, oracle", held_out, None, (0.5,))
    description = Description(
        block_size=network.block_size,
        layers=network.layers,
        width=network.width,
        features=list(FEATURES),
        threshold=select_threshold(trained, threshold_policy),
        checkpoint=str(checkpoint.iteration),
        checksum=identity(checkpoint.iteration),
        task=task,
        trajectories=options.trajectories,
        trained=trained,
        threshold_policy=threshold_policy,
        oracle=oracle.tokens_per_forward,
    )
    return TrainedSampler(network, description)


def references(loaded: DecodingModel, prompts: Sequence[list[int]], batch_size: int) -> list[list[ReferenceBlock]]:
    """Let the model answer prompts carefully, and return the blocks of each answer.

    Mode ``ar`` where the model has it; else block diffusion, one position per forward.
    """
    settings, config = loaded.settings, loaded.config
    layout = {
        "blocks_from_text_start": config.clean_attention == "block_causal",
        "known_first_token": has_known_first_token(config),
    }
    mode = "diffusion" if layout["blocks_from_text_start"] else "ar"
    careful = replace(settings, policy="fixed", steps=settings.block_size)
    blocks = []
    with LoopProgress("reference answers", len(prompts)) as progress:
        for batch in batched(prompts, batch_size):
            answers, _ = decode(loaded.model, batch, mode, careful)
            for prompt, answer in zip(batch, answers, strict=True):
                blocks.append(reference_blocks(prompt, answer, settings.block_size, **layout))
            progress.advance(len(batch))
    return blocks


def select_threshold(trained: Sequence[Point], threshold_policy: Sequence[Point]) -> float:
    """Return the lowest threshold with no larger share of wrong tokens than the policy ``threshold`` has at its best.

    Where none is as good, return the lowest of the sampler's own best.
    """
    bound = max(min(point.wrong for point in points) for points in (trained, threshold_policy))
    return next(point.threshold for point in trained if point.wrong <= bound)


@dataclass(frozen=True)
class _Recorder:
    """Decodes blocks in batches."""

    loaded: DecodingModel
    batch_size: int
    draw: torch.Generator

    def drawn(self, description: str, blocks: Blocks, count: int, confidence: ConfidenceFunction) -> States:
        """Return the states of so many blocks, each decoded as often as any other, at thresholds that are drawn."""
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(blocks), generator=self.draw).tolist()
        thresholds = (_HIGHEST * torch.rand(count, generator=self.draw)).sigmoid()
        blocks = [blocks[index] for index in order[:count]]
        with LoopProgress(description, count) as progress:
            parts = self._decoded(blocks, confidence, thresholds, progress.advance)
        return States.joined([part.states for part in parts])

    def points(
        self, description: str, blocks: Blocks, confidence: ConfidenceFunction | None, thresholds: Sequence[float]
    ) -> list[Point]:
        """Decode blocks at every threshold, and sum up."""
        points = []
        with LoopProgress(description, len(thresholds) * len(blocks)) as progress:
            for threshold in thresholds:
                parts = self._decoded(blocks, confidence, torch.full((len(blocks),), threshold), progress.advance)
                tokens, forwards = sum(part.tokens for part in parts), sum(part.forwards for part in parts)
                wrong = sum(part.wrong for part in parts)
                points.append(Point(threshold=threshold, tokens_per_forward=tokens / forwards, wrong=wrong / tokens))
        return points

    def _decoded(
        self,
        blocks: Blocks,
        confidence: ConfidenceFunction | None,
        thresholds: Tensor,
        advance: Callable[[int], None],
    ) -> list[Trajectories]:
        parts = []
        for batch in batched(range(len(blocks)), self.batch_size):
            batch_blocks, batch_thresholds = [blocks[index] for index in batch], thresholds[list(batch)]
            block_size = self.loaded.settings.block_size
            parts.append(record(self.loaded.model, batch_blocks, block_size, confidence, batch_thresholds))
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
