"""Published benchmarks in their own formats: prompts, and how an answer is scored."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.prompts import Prompt, Task
from nemodiff_train.evaluation.sandbox import check_sandbox, passes
from nemodiff_train.evaluation.scorers import Scorer, numeric

Row = Mapping[str, Any]

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Benchmark:
    """Source of a benchmark's rows, and how they become prompts."""

    hub: tuple[str, str | None]
    """Name and configuration on the Hugging Face hub; the split is ``test``."""
    prompt: Callable[[Row], Prompt]
    """Makes a prompt of a row; raises KeyError where the row lacks a field."""
    scorer: Scorer | None = None
    """None where answers are programs, or where prompts have no answers."""
    code: bool = False
    """Whether answers are programs that have to be run."""


def load_benchmark(name: str, source: str | None, count: int | None, run_code: bool) -> Task:
    """Read a benchmark as a task.

    Args:
        name: One of :data:`BENCHMARKS`.
        source: A JSONL or Parquet file, a directory of them, or a hub name; None for the benchmark's own hub name.
        count: Number of rows to take, from the first; None for all.
        run_code: Whether the user allows that the model's programs are run.

    Raises:
        UserError: Nothing can be read, a field is missing, or programs may or can not be run.
    """
    benchmark = BENCHMARKS[name]
    if benchmark.code and not run_code:
        raise UserError(f"task '{name}' runs programs that the model writes; allow it with --run-code")
    if benchmark.code:
        check_sandbox()
    prompts: list[Prompt] = []
    for number, row in enumerate(_rows(source, benchmark)):
        if number == count:
            break
        where = f"row {number} of {source or benchmark.hub[0]}"
        try:  # a field that only other rows have is None here
            prompts.append(benchmark.prompt({key: value for key, value in row.items() if value is not None}))
        except KeyError as error:
            raise UserError(f"{where} has no {error}; name the rows of '{name}' with --data") from None
        except (TypeError, AttributeError, IndexError, ValidationError):
            raise UserError(f"{where} does not have the form of '{name}'; name its rows with --data") from None
    if not prompts:
        raise UserError(f"{source or benchmark.hub[0]} has no rows; name the rows of '{name}' with --data")
    return CodeTask(name, prompts) if benchmark.code else Task(name, prompts, benchmark.scorer)


def _rows(source: str | None, benchmark: Benchmark) -> Iterable[Row]:
    import datasets  # a second of start-up, for benchmarks alone

    name, configuration = benchmark.hub if source is None else (source, None)
    path = Path(name)
    files: list[Path] = []
    try:
        if source is not None and path.exists():
            candidates = sorted(path.rglob("*.*")) if path.is_dir() else [path]
            files = [file for file in candidates if file.suffix in _READERS]
            if not files:
                raise UserError(
                    f"'{path}' has no .jsonl, .json or .parquet file; --data takes a file or folder of rows"
                )
        elif source is not None and (path.suffix or path.is_absolute()):
            raise UserError(f"there is no file '{source}'; --data takes a file or folder of rows")
        if not files:
            return datasets.load_dataset(name, configuration, split="test")
        reader = _READERS[files[0].suffix]
        readable = [str(file) for file in files if _READERS[file.suffix] == reader]
        return datasets.load_dataset(reader, data_files=readable, split="train")
    except UserError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, damaged files
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read '{name}': {reason}; --data takes a local file as well") from error


class CodeTask(Task):
    """A task whose answers are programs: right if they pass the tests."""

    def score(self, prompt_index: int, text: str) -> bool | None:
        """Run the program in the model's text, then the tests."""
        prompt = self.prompts[prompt_index]
        assert prompt.answer is not None  # every row of a code benchmark has tests
        return passes(f"{program(prompt.prompt, text)}\n\n{prompt.answer}\n")


_FENCE = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[ \t]*(?P<language>[^\s`]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_PYTHON = re.compile(r"[{.]*(?:py|python)[0-9.]*\}?", re.IGNORECASE)


def program(prompt: str, text: str) -> str:
    """Return the program in an answer.

    It is the first fenced block that defines what is asked for, else the first block; blocks of Python come before
    those without a language, and other languages are left out. A block that begins with an indented line follows the
    prompt, another one follows what the prompt has before its last function. Without a block, the answer continues
    the prompt, up to the first line that starts in the first column with a statement or comment.

    Args:
        prompt: The prompt, which may end in code or in an open fence.
        text: The model's continuation.
    """
    text = text.replace("\r\n", "\n")
    if prompt.rstrip().endswith("```python") and (opened := text.partition("```")[0]).strip():
        return opened
    matches = list(_FENCE.finditer(text))
    named = [match["code"] for match in matches if _PYTHON.fullmatch(match["language"])]
    unnamed = [match["code"] for match in matches if not match["language"]]
    functions = list(re.finditer(r"^(?:async )?def (\w+)", prompt, re.MULTILINE))
    if blocks := [code for code in named + unnamed if code.strip()]:
        asked = rf"^(?:async )?def {functions[-1][1]}\b" if functions else r"\A"
        block = next((code for code in blocks if re.search(asked, code, re.MULTILINE)), blocks[0])
        if block.lstrip("\n").startswith((" ", "\t")):
            return prompt + block
        return (prompt[: functions[-1].start()] if functions else "") + block
    end = re.search(r"\n(?=(?:def|class|if|print|assert|import|from)\b|[#@])", text)
    return prompt + (text[: end.start()] if end else text)


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}`` of a text, braces balanced; None without one."""
    boxes = list(re.finditer(r"\\f?box(?:ed)?\s*(?P<brace>\{)?", text))
    if not boxes:
        return None
    begin = boxes[-1].end()
    if not boxes[-1]["brace"]:
        return re.split(r"[\s$]", text[begin:])[0]
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


_MULTIPLES = "(?:hundred|thousand|million|billion|trillion|dozen)"  # words after a number that are not units
# Rewritings of a LaTeX answer that keep its meaning: spacing, sizes, units, text, optional braces, separators.
_LATEX = (
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|,|!|;|:|quad|qquad)(?![a-zA-Z])|(?<!\\)\\ ", ""),
    ("\N{MINUS SIGN}", "-"),
    (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\([dt]binom)", r"\\binom"),
    (r"\\(le|ge|ne)q?(?![a-zA-Z])", r"\\\1q"),
    (r"(?<=[0-9}])\s*\\(?:text|mathrm|textbf|mbox)\{(?!\s*" + _MULTIPLES + r")[^{}]*\}(?:\^[0-9]|\^\{[0-9]\})?$", ""),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\(sqrt|frac|binom)(?:\s*(?=[0-9])|\s+)([0-9a-zA-Z])", r"\\\1{\2}"),
    (r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"\^\{?\\circ\}?|\\degree|\\%|%|\\\$", ""),
    (r"([\^_])\{([0-9a-zA-Z])\}", r"\1\2"),
    (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\s", ""),
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"^[a-zA-Z]=", ""),
)
_FRACTION = re.compile(r"(-?)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}")


def latex(text: str) -> str:
    """Return a LaTeX answer without what does not change its meaning: spacing, sizes, units, optional braces."""
    text = text.strip().strip("$").rstrip(".")
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return text


def math(text: str, answer: str) -> bool:
    r"""Return whether the last ``\boxed{}`` equals the answer: as LaTeX, or both as numbers written out in full."""
    content = boxed(text)
    if content is None:
        return False
    stated, expected = latex(content), latex(answer)
    number = _number(stated)
    return stated == expected or (number is not None and number == _number(expected))


def _number(text: str) -> Fraction | None:
    """Return the value of a text that is nothing but an integer, a decimal or a fraction."""
    if match := _FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}".replace("--", "")
    try:
        return Fraction(text) if re.fullmatch(r"[-+]?[0-9]+(?:\.[0-9]+|/[0-9]+)?", text) else None
    except ZeroDivisionError:
        return None


def _gsm8k(row: Row) -> Prompt:
    return Prompt(prompt=f"Question: {row['question']}\nAnswer:", answer=row["answer"].rpartition("####")[2].strip())


def _math(row: Row) -> Prompt:
    prompt = f"Problem: {row['problem']}\nSolve it and put the final answer into \\boxed{{}}.\nSolution:"
    return Prompt(prompt=prompt, answer=row["answer"], category=row.get("subject"))


def _humaneval(row: Row) -> Prompt:
    return Prompt(prompt=row["prompt"], answer=f"{row['test']}\n\ncheck({row['entry_point']})")


def _mbpp(row: Row) -> Prompt:
    tests = "\n".join(row["test_list"])
    prompt = f"Task: {row.get('text') or row['prompt']}\nThe program has to pass:\n{tests}\n\n```python\n"
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    return Prompt(prompt=prompt, answer=f"{setup}\n{tests}")


def _speed(row: Row) -> Prompt:
    first = (row.get("turns") or row["messages"])[0]
    return Prompt(prompt=first["content"] if isinstance(first, Mapping) else first, category=row.get("category"))


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(("openai/gsm8k", "main"), _gsm8k, numeric),
    "math-500": Benchmark(("HuggingFaceH4/MATH-500", None), _math, math),
    "humaneval": Benchmark(("openai/openai_humaneval", None), _humaneval, code=True),
    "mbpp": Benchmark(("google-research-datasets/mbpp", "full"), _mbpp, code=True),
    "speed-bench": Benchmark(("nvidia/SPEED-Bench", "qualitative"), _speed),
}
