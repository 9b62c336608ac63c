"""Decode a task in every mode."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

from nemodiff_train.console import progress_bar
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.loading import Opened
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble
from nemodiff_train.evaluation.records import Decoded
from nemodiff_train.evaluation.tasks import Task

# The settings that matter to a mode; one that is not named here depends on the block size.
USED = {"ar": ("max_new_tokens",), "diffusion": ("max_new_tokens", "block_size", "threshold")}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate."""

    modes: tuple[str, ...] = ("ar", "diffusion", "linear")
    thresholds: tuple[float, ...] = ()
    """Thresholds besides the settings' own, for the curve of accuracy against TPF."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes besides the settings' own; each is combined with each threshold."""
    batch_size: int = 32
    """Prompts decoded together."""


def evaluate(opened: Opened, task: Task, plan: Plan, checkpoint: str) -> Evaluation:
    """Decode every prompt in every mode, score, and reduce.

    Args:
        opened: Model, tokenizer and decoding settings.
        checkpoint: Name for the report.
    """
    model, tokenizer, settings = opened.model, opened.tokenizer, opened.settings
    prompts = [tokenizer(prompt.prompt, add_special_tokens=False)["input_ids"] for prompt in task.prompts]
    headline, sweep = [], []
    for mode in plan.modes:
        chosen = settings_of(mode, settings, plan)
        runs = [_run(model, prompts, mode, each, plan.batch_size) for each in chosen]
        headline.append(runs[chosen.index(settings)])
        sweep += runs if len(runs) > 1 else []
    return assemble(
        checkpoint,
        task,
        headline,
        lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        settings={"max_new_tokens": settings.max_new_tokens, "batch_size": plan.batch_size},
        sweep=sweep,
    )


def settings_of(mode: str, settings: DecodingSettings, plan: Plan) -> list[DecodingSettings]:
    """All settings that a mode is decoded with: the grid of the plan, as far as the mode depends on it."""
    used = _used(mode)
    sizes = {settings.block_size, *(plan.block_sizes if "block_size" in used else ())}
    thresholds = {settings.threshold, *(plan.thresholds if "threshold" in used else ())}
    return [
        replace(settings, block_size=size, threshold=threshold)
        for size in sorted(sizes)
        for threshold in sorted(thresholds)
    ]


def _used(mode: str) -> tuple[str, ...]:
    """The settings that a mode's output or its forwards depend on."""
    return USED.get(mode, ("max_new_tokens", "block_size"))


def _run(model: Any, prompts: Sequence[list[int]], mode: str, settings: DecodingSettings, batch: int) -> Run:
    named: dict[str, Any] = {name: getattr(settings, name) for name in _used(mode)}
    swept = [f"{named[name]:g}" for name in ("block_size", "threshold") if name in named]
    label = f"decoding ({', '.join([mode, *swept])})"
    decoded: list[Decoded] = []
    with progress_bar() as progress:
        bar = progress.add_task(label, total=len(prompts))
        for indices in batched(range(len(prompts)), batch):
            decoded.extend(_decode_batch(model, [prompts[i] for i in indices], indices, mode, settings))
            progress.update(bar, completed=len(decoded))
    return Run(mode, named, decoded)


def _decode_batch(
    model: Any, prompts: list[list[int]], indices: Iterable[int], mode: str, settings: DecodingSettings
) -> list[Decoded]:
    started = time.perf_counter()
    generations, session = decode(model, prompts, mode, settings)
    seconds = (time.perf_counter() - started) / len(prompts)
    return [
        Decoded(
            prompt_index=index,
            tokens=generation.tokens,
            forwards=dict(session.forwards[row]),
            accepted=generation.accepted,
            drafted=generation.agreed,
            proposed=generation.drafts,
            seconds=seconds,
            steps=generation.steps,
        )
        for row, (index, generation) in enumerate(zip(indices, generations, strict=True))
    ]
