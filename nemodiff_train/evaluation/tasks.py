"""Tasks by name: a JSONL file of the user's, a benchmark, or the built-in arithmetic problems."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator

from nemodiff_train.errors import UserError, nearest
from nemodiff_train.evaluation.arithmetic import Split, problems
from nemodiff_train.evaluation.benchmarks import BENCHMARKS, load_benchmark
from nemodiff_train.evaluation.prompts import Prompt, Task
from nemodiff_train.evaluation.records import read_jsonl
from nemodiff_train.evaluation.scorers import last_number, make_scorer, numeric


class _AnsweredPrompt(Prompt):
    answer: str = Field(min_length=1)


class _NumericPrompt(_AnsweredPrompt):
    @field_validator("answer")
    @classmethod
    def _has_number(cls, answer: str) -> str:
        if last_number(answer) is None:
            raise ValueError("no number in it; use the scorer 'exact' or 'regex'")
        return answer


def load_task(
    name: str,
    *,
    scorer: str = "numeric",
    pattern: str | None = None,
    count: int | None = None,
    source: str | None = None,
    run_code: bool = False,
) -> Task:
    """Load a task by the path of a JSONL file, or by the name of a built-in task or benchmark.

    Args:
        name: Path of a file of ``{"prompt": ..., "answer": ...}`` lines, with other fields ignored; it ends in
            ``.jsonl`` or exists. Else a name in ``TASKS`` or ``BENCHMARKS``.
        scorer: How a file's prompts are scored; other tasks bring their own scorer.
        pattern: The regular expression of the scorer ``regex``.
        count: Number of prompts to take, from the first (default: all; 200 of a built-in task).
        source: Where a benchmark's rows are; see :func:`~nemodiff_train.evaluation.benchmarks.load_benchmark`.
        run_code: Whether programs that the model writes may be run.

    Raises:
        UserError: Unknown task, unreadable file, bad scorer or count; ``file:line`` of a malformed line, a missing or
            empty field, or an answer without a number where the scorer is ``numeric``.
    """
    if count is not None and count < 1:
        raise UserError(f"--count (evaluation.count) is {count}; use 1 or more")
    path = Path(name)
    if path.suffix == ".jsonl" or path.is_file():
        score = make_scorer(scorer, pattern)
        prompts = read_jsonl(path, _NumericPrompt if scorer == "numeric" else _AnsweredPrompt)
        return Task(path.stem, [*prompts[:count]], score)
    if name in BENCHMARKS:
        return load_benchmark(name, source, count, run_code)
    if name in TASKS:
        return TASKS[name](count)
    known = [*TASKS, *BENCHMARKS]
    raise UserError(f"unknown task '{name}'; known: {', '.join(known)}, or a .jsonl file.{nearest(name, known)}")


BUILT_IN = ("arithmetic", "questions")
"""Names of the built-in tasks, which have the same problems; ``questions`` leaves out the words around them."""


def built_in_prompts(name: str, split: Split, count: int, seed: int) -> list[Prompt]:
    """Draw prompts of a task of :data:`BUILT_IN`; see :func:`~nemodiff_train.evaluation.arithmetic.problems`."""
    return [
        Prompt(prompt=problem.prompt if name == "arithmetic" else problem.question, answer=problem.answer)
        for problem in problems(split, count, seed)
    ]


def _arithmetic(name: str, count: int | None) -> Task:
    return Task(name, built_in_prompts(name, "test", count or 200, seed=0), numeric)


TASKS: dict[str, Callable[[int | None], Task]] = {name: partial(_arithmetic, name) for name in BUILT_IN}
"""Tasks by name: functions of the number of prompts, None for as many as it likes; a recipe may add its own.

Those here are held-out arithmetic problems; ``questions`` are without the words around them, for ``--chat``.
"""
