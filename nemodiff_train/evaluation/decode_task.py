"""Decode a task in every mode, and score it."""

import time
from collections.abc import Sequence
from itertools import batched

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from nemodiff_train.console import progress_bar
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.loading import DecodingModel
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.decoding.prompts import encode_prompts
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble
from nemodiff_train.evaluation.prompts import Task
from nemodiff_train.evaluation.records import DecodeRecord
from nemodiff_train.evaluation.settings import EvaluationSettings, relevant_settings, settings_of
from nemodiff_train.evaluation.unfinished import UnfinishedRecords


def evaluate(
    loaded: DecodingModel,
    task: Task,
    evaluation_settings: EvaluationSettings,
    checkpoint: str,
    shown: bool | None = None,
    unfinished: UnfinishedRecords | None = None,
) -> Evaluation:
    """Decode every prompt in every mode, score, and reduce.

    Args:
        loaded: Model, tokenizer and decoding settings.
        task: Prompts and scorer.
        evaluation_settings: Modes and settings.
        checkpoint: Name for the report.
        shown: Whether this process shows progress; by default rank 0 does.
        unfinished: Log of what is decoded; prompts that it holds are not decoded again.
    """
    prompts = encode_prompts(loaded.tokenizer, [prompt.prompt for prompt in task.prompts], evaluation_settings.chat)
    settings = loaded.settings.stopping_at(prompts.end_of_turn)
    headline: list[Run] = []
    sweep: list[Run] = []
    for mode in evaluation_settings.modes:
        grid = settings_of(mode, settings, evaluation_settings)
        runs = [
            _run(loaded.model, prompts.tokens, mode, point, evaluation_settings.batch_size, shown, unfinished)
            for point in grid
        ]
        headline.append(runs[grid.index(settings)])
        sweep += runs if len(runs) > 1 else []
    return assemble(
        checkpoint,
        task,
        headline,
        settings.text,
        settings={"max_new_tokens": settings.max_new_tokens, "batch_size": evaluation_settings.batch_size},
        sweep=sweep,
    )


def _run(
    model: list[GPTModel],
    prompts: Sequence[list[int]],
    mode: str,
    settings: DecodingSettings,
    batch_size: int,
    shown: bool | None,
    unfinished: UnfinishedRecords | None,
) -> Run:
    """Decode this data-parallel replica's prompts, and gather the records of all."""
    values = {name: getattr(settings, name) for name in relevant_settings(mode, settings)}
    swept = [f"{values[name]:g}" for name in ("block_size", "threshold") if name in values]
    replicas: dist.ProcessGroup = parallel_state.get_data_parallel_group()
    records = unfinished.records_of_mode(mode, values) if unfinished is not None else []
    decoded_before = {record.prompt_index for record in records}
    share = range(replicas.rank(), len(prompts), replicas.size())
    numbers = [number for number in share if number not in decoded_before]
    with progress_bar(shown=shown) as progress:
        bar = progress.add_task(f"decoding ({', '.join([mode, *swept])})", total=len(numbers))
        for batch in batched(numbers, batch_size):
            decoded = _decode_batch(model, [prompts[number] for number in batch], batch, mode, settings)
            if unfinished is not None:
                unfinished.add(mode, values, decoded)
            records += decoded
            progress.advance(bar, len(batch))
    by_replica = [records] * replicas.size()
    if replicas.size() > 1:
        dist.all_gather_object(by_replica, records, group=replicas)
    by_prompt = {record.prompt_index: record for part in by_replica for record in part}
    return Run(mode, values, [by_prompt[index] for index in sorted(by_prompt)])


def _decode_batch(
    model: list[GPTModel], prompts: list[list[int]], numbers: Sequence[int], mode: str, settings: DecodingSettings
) -> list[DecodeRecord]:
    started = time.perf_counter()
    generations, session = decode(model, prompts, mode, settings, numbers)
    rows = len(prompts)
    seconds = (time.perf_counter() - started) / rows
    return [
        DecodeRecord(
            prompt_index=number,
            tokens=generation.tokens,
            forwards=path_forwards(generation, session.forwards[row]),
            cycles=generation.cycles,
            seconds=seconds,
            seconds_by_kind={kind: spent / rows for kind, spent in session.seconds.items()},
            steps=generation.steps,
        )
        for row, (number, generation) in enumerate(zip(numbers, generations, strict=True))
    ]
