"""Published benchmarks in their own formats: what to ask, and how an answer is judged."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.sandbox import passes
from nemodiff_train.evaluation.scorers import Scorer, numeric
from nemodiff_train.evaluation.tasks import Prompt, Task

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How the rows of one benchmark become prompts."""

    hub: tuple[str, str | None, str]
    """Name, configuration and split on the Hugging Face hub."""
    fields: tuple[str, ...]
    """What a row must have."""
    prompt: Callable[[Row], Prompt]
    scorer: Scorer | None = None
    """None where answers are programs, or where there are none."""
    code: bool = False
    """Answers are programs that have to be run."""


def load_benchmark(name: str, source: str | None, count: int | None, run_code: bool) -> Task:
    """Read a benchmark as a task.

    Args:
        name: One of :data:`BENCHMARKS`.
        source: A JSONL or Parquet file, a directory of them, or a hub name; None for the benchmark's own hub name.
        count: Rows to take, from the first.
        run_code: Whether the user allows that the model's programs are run.

    Raises:
        UserError: Nothing can be read, a field is missing, or programs would have to be run without leave.
    """
    benchmark = BENCHMARKS[name]
    if benchmark.code and not run_code:
        raise UserError(f"task '{name}' runs programs that the model writes; allow it with --run-code")
    rows = _rows(source, benchmark)
    prompts = []
    for number, row in enumerate(rows):
        if count is not None and number >= count:
            break
        missing = [field for field in benchmark.fields if row.get(field) is None]
        if missing:
            raise UserError(f"row {number} of {source or benchmark.hub[0]} has no '{missing[0]}', as '{name}' has")
        prompts.append(benchmark.prompt(row))
    if not prompts:
        raise UserError(f"{source or benchmark.hub[0]} has no rows")
    if benchmark.code:
        return CodeTask(name, prompts)
    return Task(name, prompts, benchmark.scorer)


def _rows(source: str | None, benchmark: Benchmark) -> Iterable[Row]:
    import datasets

    name, configuration, split = benchmark.hub
    path = Path(source) if source else None
    try:
        if path is not None and path.exists():
            there = sorted(path.rglob("*.*")) if path.is_dir() else [path]
            kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
            known = [file for file in there if file.suffix in kinds]
            if not known:
                raise UserError(f"'{source}' has no .jsonl, .json or .parquet file")
            kind = kinds[known[0].suffix]
            return datasets.load_dataset(
                kind, data_files=[str(f) for f in known if kinds[f.suffix] == kind], split="train"
            )
        if path is not None and (path.suffix or path.is_absolute()):
            raise UserError(f"there is no file '{source}'")
        return datasets.load_dataset(source or name, configuration if source is None else None, split=split)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, damaged files
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read '{source or name}': {reason}; --data takes a local file as well") from error


class CodeTask(Task):
    """A task whose answers are programs: right if they pass the tests."""

    def score(self, prompt_index: int, text: str) -> bool | None:
        """Run what the model wrote behind the prompt, then the tests."""
        prompt = self.prompts[prompt_index]
        assert prompt.answer is not None  # every row of a code benchmark has tests
        return passes(f"{program(prompt.prompt, text)}\n\n{prompt.answer}\n")


def program(prompt: str, text: str) -> str:
    """The program in an answer: the fenced block that the prompt opened or the answer holds, or the prompt's code.

    A plain continuation is cut where the function ends: at the first line that starts in the first column
    with something else than a decorator, a definition it begins with, or a bracket.
    """
    if prompt.rstrip().endswith("```python"):
        return text.partition("```")[0]
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    if fenced:
        return fenced[1]
    end = re.search(r"\n(?=(?:def|class|if|print|assert|import|from|#|@)\b|[#@])", text)
    return prompt + (text[: end.start()] if end else text)


def boxed(text: str) -> str | None:
    r"""What is inside the last ``\boxed{}`` of a text, braces balanced."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for place in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def latex(text: str) -> str:
    """A LaTeX answer without what does not change its meaning: spacing, sizes, units, optional braces."""
    text = text.strip().strip("$").rstrip(".")
    for pattern, to in _LATEX:
        text = re.sub(pattern, to, text)
    return text


_LATEX = (
    (r"\\(?:left|right|displaystyle|limits|,|!|;|:|quad|qquad)(?![a-zA-Z])", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    (r"\\sqrt([0-9a-z])", r"\\sqrt{\1}"),
    (r"\^\{?\\circ\}?|\\%|%|\\\$", ""),
    (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\\ |\s", ""),
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"^[a-zA-Z]=", ""),
)


def math(text: str, answer: str) -> bool:
    r"""The last ``\boxed{}`` equals the answer, as LaTeX or as numbers."""
    found = boxed(text)
    if found is None:
        return False
    return latex(found) == latex(answer) or (_is_number(answer) and numeric(found, answer))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9][0-9,]*(\.[0-9]+)?", text.strip()) is not None


def _gsm8k(row: Row) -> Prompt:
    return Prompt(prompt=f"Question: {row['question']}\nAnswer:", answer=row["answer"].rpartition("####")[2].strip())


def _math(row: Row) -> Prompt:
    ask = f"Problem: {row['problem']}\nSolve it and put the final answer into \\boxed{{}}.\nSolution:"
    return Prompt(prompt=ask, answer=row["answer"], category=row.get("subject"))


def _humaneval(row: Row) -> Prompt:
    return Prompt(prompt=row["prompt"], answer=f"{row['test']}\n\ncheck({row['entry_point']})")


def _mbpp(row: Row) -> Prompt:
    tests = "\n".join(row["test_list"])
    ask = f"Task: {row.get('text') or row['prompt']}\nThe program has to pass:\n{tests}\n\n```python\n"
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    return Prompt(prompt=ask, answer=f"{setup}\n{tests}")


def _speed(row: Row) -> Prompt:
    turns = row.get("turns") or row.get("messages")
    first = turns[0] if turns else None
    text = first.get("content") if isinstance(first, Mapping) else first
    if not text:
        raise UserError("a row has neither 'turns' nor 'messages' with a first turn, as 'speed-bench' has")
    return Prompt(prompt=text, category=row.get("category"))


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(("openai/gsm8k", "main", "test"), ("question", "answer"), _gsm8k, numeric),
    "math-500": Benchmark(("HuggingFaceH4/MATH-500", None, "test"), ("problem", "answer"), _math, math),
    "humaneval": Benchmark(
        ("openai/openai_humaneval", None, "test"), ("prompt", "test", "entry_point"), _humaneval, code=True
    ),
    "mbpp": Benchmark(("google-research-datasets/mbpp", "full", "test"), ("test_list",), _mbpp, code=True),
    "speed-bench": Benchmark(("nvidia/SPEED-Bench", "qualitative", "test"), (), _speed),
}
