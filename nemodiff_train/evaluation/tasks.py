"""Prompt sets with answers: a JSONL file of the user's, or a built-in task."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nemodiff_train.errors import UserError, nearest
from nemodiff_train.evaluation.records import read_jsonl
from nemodiff_train.evaluation.scorers import Scorer, last_number, make_scorer


class Prompt(BaseModel):
    """One prompt as the model reads it, and the answer its continuation is scored against."""

    model_config = ConfigDict(frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    category: str | None = None


class _AnsweredPrompt(Prompt):
    answer: str = Field(min_length=1)


class _NumericPrompt(_AnsweredPrompt):
    @field_validator("answer")
    @classmethod
    def _has_number(cls, answer: str) -> str:
        if last_number(answer) is None:
            raise ValueError("no number in it; use the scorer 'exact' or 'regex'")
        return answer


@dataclass(frozen=True)
class Task:
    """A named prompt set and the rule that scores it."""

    name: str
    prompts: list[Prompt]
    scorer: Scorer | None = None
    """None where prompts have no answers, or where a subclass scores."""

    def score(self, prompt_index: int, text: str) -> bool | None:
        """Whether ``text`` answers the prompt at ``prompt_index``; None if it has no answer."""
        answer = self.prompts[prompt_index].answer
        return None if answer is None or self.scorer is None else self.scorer(text, answer)


def load_task(
    name: str,
    *,
    scorer: str = "numeric",
    pattern: str | None = None,
    count: int | None = None,
    seed: int = 0,
    source: str | None = None,
    run_code: bool = False,
) -> Task:
    """Find a task by the path of a JSONL file, or by the name of a built-in task or benchmark.

    Args:
        name: A path that ends in ``.jsonl`` (or is a file), else a name in ``BUILT_IN``.
        scorer: How a file's prompts are scored; a built-in task brings its own scorer.
        pattern: The regular expression of the scorer ``regex``.
        count: Prompts to take, from the start of the file (all by default; 200 for a built-in task).
        seed: Draws the prompts of a built-in task.
        source: Where a benchmark's rows are; see :func:`~nemodiff_train.evaluation.benchmarks.load_benchmark`.
        run_code: Whether programs that the model writes may be run.

    Raises:
        UserError: Unknown task, unreadable file, bad scorer or count.
    """
    if count is not None and count < 1:
        raise UserError(f"the number of prompts must be at least 1, not {count}")
    path = Path(name)
    if path.suffix == ".jsonl" or path.is_file():
        return task_from_file(path, scorer, pattern, count)
    from nemodiff_train.evaluation.benchmarks import BENCHMARKS, load_benchmark

    if name in BENCHMARKS:
        return load_benchmark(name, source, count, run_code)
    if name not in BUILT_IN:
        known = ", ".join([*BUILT_IN, *BENCHMARKS])
        raise UserError(
            f"unknown task '{name}'; known: {known}, or a .jsonl file.{nearest(name, [*BUILT_IN, *BENCHMARKS])}"
        )
    return BUILT_IN[name](count or 200, seed)


def task_from_file(path: Path, scorer: str, pattern: str | None = None, count: int | None = None) -> Task:
    """Read a file of ``{"prompt": ..., "answer": ...}`` lines; further fields are ignored.

    Raises:
        UserError: Names ``file:line`` for a malformed line, a missing or empty field, or an answer
            without a number where the scorer is ``numeric``.
    """
    score = make_scorer(scorer, pattern)
    rows: list[Prompt] = [*read_jsonl(path, _NumericPrompt if scorer == "numeric" else _AnsweredPrompt)]
    return Task(path.stem, rows[:count], score)


def arithmetic(count: int, seed: int) -> Task:
    """The demo's held-out arithmetic problems, scored by the last number."""
    problems = importlib.import_module("nemodiff_train.demo.arithmetic").problems("test", count, seed)
    prompts = [Prompt(prompt=problem.prompt, answer=problem.answer) for problem in problems]
    return Task("arithmetic", prompts, make_scorer("numeric"))


def questions(count: int, seed: int) -> Task:
    """The same problems without the words around them, for ``--chat``."""
    problems = importlib.import_module("nemodiff_train.demo.arithmetic").problems("test", count, seed)
    prompts = [Prompt(prompt=problem.messages()[0]["content"], answer=problem.answer) for problem in problems]
    return Task("questions", prompts, make_scorer("numeric"))


BUILT_IN: dict[str, Callable[[int, int], Task]] = {"arithmetic": arithmetic, "questions": questions}
