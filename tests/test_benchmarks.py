"""Published benchmark formats, programs that are run, and lm-evaluation-harness."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.benchmarks import boxed, latex, math, program
from nemodiff_train.evaluation.sandbox import passes
from nemodiff_train.evaluation.tasks import load_task

ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How much is 2 + 3?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"},
    "math-500": {"problem": "Half of one?", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 1},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """Add."""\n',
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    },
    "mbpp": {"task_id": 11, "text": "Add two numbers.", "code": "", "test_list": ["assert add(2, 3) == 5"]},
    "speed-bench": {"question_id": 1, "category": "coding", "turns": ["Write a loop.", "Now another."]},
}
RIGHT = {
    "gsm8k": " 2 + 3 makes 5",
    "math-500": "so $\\boxed{\\dfrac12}$.",
    "humaneval": "    return a + b\n\ndef other():\n    return 1 / 0\n",
    "mbpp": "def add(a, b):\n    return a + b\n```\nThat is all.",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_read_and_scored(data: Path, name: str) -> None:
    task = load_task(name, source=str(data / f"{name}.jsonl"), run_code=True)
    (prompt,) = task.prompts
    if name == "speed-bench":
        assert (prompt.prompt, prompt.answer, prompt.category) == ("Write a loop.", None, "coding")
        assert task.score(0, "anything") is None
        return
    assert task.score(0, RIGHT[name]) is True
    assert task.score(0, RIGHT[name].replace("a + b", "a - b").replace("5", "6").replace("12", "13")) is False


def test_parquet_and_folders(data: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.Table.from_pylist([ROWS["gsm8k"]] * 3), folder / f"{number}.parquet")
    assert len(load_task("gsm8k", source=str(folder)).prompts) == 6
    assert len(load_task("gsm8k", source=str(folder), count=4).prompts) == 4


@pytest.mark.parametrize(
    ("name", "source", "run_code", "words"),
    [
        ("humaneval", "humaneval.jsonl", False, "--run-code"),
        ("gsm8k", "mbpp.jsonl", True, "'question'"),
        ("gsm8k", "absent.jsonl", True, "absent.jsonl"),
        ("gsm8k", "folder", True, "no .jsonl"),
        ("gms8k", None, True, "gsm8k"),
    ],
)
def test_refusals(data: Path, name: str, source: str | None, run_code: bool, words: str) -> None:
    (data / "folder").mkdir()
    with pytest.raises(UserError, match=words):
        load_task(name, source=source and str(data / source), run_code=run_code)


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("\\boxed{42}", "42"),
        ("\\boxed{1,234}", "1234"),
        ("\\boxed{ \\left( 3, \\frac{\\pi}{2} \\right) }", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\boxed{x = \\tfrac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{10\\%}", "10"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{.5}", "0.5"),
    ],
)
def test_equal_answers_of_math(found: str, answer: str) -> None:
    assert math(found, answer)


def test_unequal_answers_of_math() -> None:
    assert boxed("\\boxed{\\frac{1}{2}") is None and not math("the answer is 42", "42")
    for found, answer in (("\\boxed{42}", "24"), ("\\boxed{-1}", "1"), ("\\boxed{(1,2)}", "(2,1)")):
        assert not math(found, answer)
    assert latex("$\\frac12$") == "\\frac{1}{2}"


def test_the_program_in_an_answer() -> None:
    prompt = "def f():\n"
    assert program(prompt, "    return 1\nprint(f())") == "def f():\n    return 1"
    assert program(prompt, "Here:\n```python\ndef f():\n    return 2\n```\nDone") == "def f():\n    return 2\n"
    assert program("Task\n```python\n", "x = 1\n```\nmore") == "x = 1\n"


PROGRAMS = {
    "wrong": "assert 1 == 2",
    "a syntax error": "def",
    "an early exit": "import sys; sys.exit(0)",
    "endless": "while True: pass",
    "asleep": "import time; time.sleep(60)",
    "a memory hog": "x = bytearray(3 * 2**30)",
    "a socket": "import socket; socket.socket()",
    "a process": "import subprocess; subprocess.run(['true'])",
    "a fork": "import os; os.fork()",
    "a file elsewhere": "open('/tmp/nemodiff-escaped', 'w').write('x')",
    "a deletion": "import os; os.remove('program.py')",
    "a secret": "import os; assert 'HOME' in os.environ",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_fails_or_is_stopped(name: str) -> None:
    started = time.perf_counter()
    assert not passes(PROGRAMS[name], seconds=3)
    assert time.perf_counter() - started < 20
    assert not Path("/tmp/nemodiff-escaped").exists()


def test_a_program_that_passes(tmp_path: Path) -> None:
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("nemodiff-code-*"))
    assert passes("import math, collections\nopen('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'")
    assert set(Path(tempfile.gettempdir()).glob("nemodiff-code-*")) == before
