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
from nemodiff_train.decoding.loading import Opened
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble
from nemodiff_train.evaluation.records import Decoded
from nemodiff_train.evaluation.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate."""

    modes: tuple[str, ...] = ("ar", "diffusion", "linear")
    thresholds: tuple[float, ...] = ()
    """Diffusion thresholds besides the settings' own, for the accuracy against TPF curve."""
    batch_size: int = 32
    """Prompts decoded together."""


def evaluate(opened: Opened, task: Task, plan: Plan, checkpoint: str, shown: bool | None = None) -> Evaluation:
    """Decode every prompt in every mode, score, and reduce.

    Args:
        opened: Model, tokenizer and decoding settings.
        checkpoint: Name for the report.
        shown: Whether this process shows progress; by default rank 0 does.
    """
    model, tokenizer, settings = opened.model, opened.tokenizer, opened.settings
    prompts = [tokenizer(prompt.prompt, add_special_tokens=False)["input_ids"] for prompt in task.prompts]
    sweep = sorted({settings.threshold, *plan.thresholds}) if "diffusion" in plan.modes else []
    jobs = [(mode, settings) for mode in plan.modes if mode != "diffusion"]
    jobs += [("diffusion", replace(settings, threshold=threshold)) for threshold in sweep]
    runs = [_run(model, prompts, mode, chosen, plan.batch_size, shown) for mode, chosen in jobs]
    by_threshold = dict(zip(sweep, (run for run in runs if run.mode == "diffusion"), strict=True))
    others = {run.mode: run for run in runs if run.mode != "diffusion"}
    headline = {**others, **({"diffusion": by_threshold[settings.threshold]} if sweep else {})}
    return assemble(
        checkpoint,
        task,
        [headline[mode] for mode in plan.modes],
        settings.text,
        settings={"max_new_tokens": settings.max_new_tokens, "batch_size": plan.batch_size},
        sweep=by_threshold if len(by_threshold) > 1 else None,
    )


def _run(
    model: Any, prompts: Sequence[list[int]], mode: str, settings: DecodingSettings, batch: int, shown: bool | None
) -> Run:
    named: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    if mode != "ar":
        named["block_size"] = settings.block_size
    if mode == "diffusion":
        named["threshold"] = settings.threshold
    label = f"decoding ({mode})" if mode != "diffusion" else f"decoding ({mode}, {settings.threshold:g})"
    decoded: list[Decoded] = []
    replicas = parallel_state.get_data_parallel_group()
    own = range(replicas.rank(), len(prompts), replicas.size())
    with progress_bar(shown=shown) as progress:
        bar = progress.add_task(label, total=len(own))
        for indices in batched(own, batch):
            decoded.extend(_decode_batch(model, [prompts[i] for i in indices], indices, mode, settings))
            progress.update(bar, completed=len(decoded))
    return Run(mode, named, _from_all(decoded, replicas))


def _from_all(decoded: list[Decoded], replicas: Any) -> list[Decoded]:
    """The records of every data-parallel replica, in the order of the prompts."""
    if replicas.size() == 1:
        return decoded
    everyone: list[list[Decoded]] = [[] for _ in range(replicas.size())]
    dist.all_gather_object(everyone, decoded, group=replicas)
    return sorted((record for part in everyone for record in part), key=lambda record: record.prompt_index)


def _decode_batch(
    model: Any, prompts: list[list[int]], indices: Sequence[int], mode: str, settings: DecodingSettings
) -> list[Decoded]:
    started = time.perf_counter()
    generations, session = decode(model, prompts, mode, settings, list(indices))
    rows = len(prompts)
    seconds = (time.perf_counter() - started) / rows
    return [
        Decoded(
            prompt_index=index,
            tokens=generation.tokens,
            forwards=path_forwards(generation, session.forwards[row]),
            accepted=generation.accepted,
            drafted=generation.agreed,
            proposed=generation.drafts,
            acceptance=generation.acceptance,
            seconds=seconds,
            seconds_by_kind={kind: spent / rows for kind, spent in session.seconds.items()},
            steps=generation.steps,
        )
        for row, (index, generation) in enumerate(zip(indices, generations, strict=True))
    ]
