"""Decode a task in every mode."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nemodiff_train.console import progress_bar
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.decoding.prompts import prompt_tokens
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble
from nemodiff_train.evaluation.records import DecodeRecord
from nemodiff_train.evaluation.tasks import Task
from nemodiff_train.model.loading import LoadedModel

# What decides which places a denoising forward fixes.
OF_POLICY = {"threshold": "threshold", "leftmost": "threshold", "entropy": "entropy_bound", "fixed": "steps"}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What to evaluate."""

    modes: tuple[str, ...] = ("ar", "diffusion", "linear")
    thresholds: tuple[float, ...] = ()
    """Thresholds besides the settings' own, for the curve of accuracy against TPF."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes besides the settings' own; each is combined with each threshold."""
    batch_size: int = 32
    """Prompts decoded together."""
    chat: bool = False
    """Prompts are put into the tokenizer's chat template, as what a user says."""


def evaluate(
    opened: LoadedModel, task: Task, plan: EvaluationSettings, checkpoint: str, shown: bool | None = None
) -> Evaluation:
    """Decode every prompt in every mode, score, and reduce.

    Args:
        opened: Model, tokenizer and decoding settings.
        checkpoint: Name for the report.
        shown: Whether this process shows progress; by default rank 0 does.
    """
    model, tokenizer, settings = opened.model, opened.tokenizer, opened.settings
    prompts = prompt_tokens(tokenizer, [prompt.prompt for prompt in task.prompts], plan.chat)
    headline, sweep = [], []
    for mode in plan.modes:
        chosen = settings_of(mode, settings, plan)
        runs = [_run(model, prompts, mode, each, plan.batch_size, shown) for each in chosen]
        headline.append(runs[chosen.index(settings)])
        sweep += runs if len(runs) > 1 else []
    return assemble(
        checkpoint,
        task,
        headline,
        settings.text,
        settings={"max_new_tokens": settings.max_new_tokens, "batch_size": plan.batch_size},
        sweep=sweep,
    )


def settings_of(mode: str, settings: DecodingSettings, plan: EvaluationSettings) -> list[DecodingSettings]:
    """All settings that a mode is decoded with: the grid of the plan, as far as the mode depends on it."""
    used = _used(mode, settings)
    sizes = {settings.block_size, *(plan.block_sizes if "block_size" in used else ())}
    thresholds = {settings.threshold, *(plan.thresholds if "threshold" in used else ())}
    return [
        replace(settings, block_size=size, threshold=threshold)
        for size in sorted(sizes)
        for threshold in sorted(thresholds)
    ]


def _used(mode: str, settings: DecodingSettings) -> tuple[str, ...]:
    """The settings that a mode's output or its forwards depend on."""
    used: tuple[str, ...] = ("max_new_tokens",)
    if mode != "ar":
        used += ("block_size",)
    if mode == "diffusion":
        used += ("policy", OF_POLICY[settings.policy])
    if settings.temperature:
        used += ("temperature", "top_k", "top_p", "seed")
    return used


def _run(
    model: Any, prompts: Sequence[list[int]], mode: str, settings: DecodingSettings, batch: int, shown: bool | None
) -> Run:
    named = {name: getattr(settings, name) for name in _used(mode, settings)}
    swept = [f"{named[name]:g}" for name in ("block_size", "threshold") if name in named]
    label = f"decoding ({', '.join([mode, *swept])})"
    decoded: list[DecodeRecord] = []
    replicas = parallel_state.get_data_parallel_group()
    own = range(replicas.rank(), len(prompts), replicas.size())
    with progress_bar(shown=shown) as progress:
        bar = progress.add_task(label, total=len(own))
        for indices in batched(own, batch):
            decoded.extend(_decode_batch(model, [prompts[i] for i in indices], indices, mode, settings))
            progress.update(bar, completed=len(decoded))
    return Run(mode, named, _from_all(decoded, replicas))


def _from_all(decoded: list[DecodeRecord], replicas: Any) -> list[DecodeRecord]:
    """The records of every data-parallel replica, in the order of the prompts."""
    if replicas.size() == 1:
        return decoded
    everyone: list[list[DecodeRecord]] = [[] for _ in range(replicas.size())]
    dist.all_gather_object(everyone, decoded, group=replicas)
    return sorted((record for part in everyone for record in part), key=lambda record: record.prompt_index)


def _decode_batch(
    model: Any, prompts: list[list[int]], indices: Sequence[int], mode: str, settings: DecodingSettings
) -> list[DecodeRecord]:
    started = time.perf_counter()
    generations, session = decode(model, prompts, mode, settings, list(indices))
    rows = len(prompts)
    seconds = (time.perf_counter() - started) / rows
    return [
        DecodeRecord(
            prompt_index=index,
            tokens=generation.tokens,
            forwards=path_forwards(generation, session.forwards[row]),
            cycles=generation.cycles,
            seconds=seconds,
            seconds_by_kind={kind: spent / rows for kind, spent in session.seconds.items()},
            steps=generation.steps,
        )
        for row, (index, generation) in enumerate(zip(indices, generations, strict=True))
    ]
