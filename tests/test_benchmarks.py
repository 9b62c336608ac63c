"""Published benchmark formats, how their answers are judged, and the programs that are run."""

import json
import os
import socket
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation import sandbox
from nemodiff_train.evaluation.benchmarks import boxed, latex, math, program
from nemodiff_train.evaluation.sandbox import check_sandbox, passes
from nemodiff_train.evaluation.scorers import numeric
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
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{-\\frac{6}{4}}", "\\frac{-3}{2}"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("\\boxed{10{,}000}", "10,\\!000"),
        ("\\boxed 7$ is it", "7"),
        ("\\fbox{3/4}", "\\frac34"),
        ("\\boxed{\\frac 12}", "\\frac{1}{2}"),
        ("\\boxed{\\frac1{72}}", "\\frac{1}{72}"),
        ("\\boxed{\\frac{\\sqrt 3}2}", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{\\frac ab}", "\\frac{a}{b}"),
        ("\\boxed{2516_{8}+x^{2}}", "2516_8+x^2"),
        ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("\\boxed{42\\ \\text{cm}}", "42"),
        ("\\boxed{\\bigl(3, \\mathbf{x} \\ge 90\\degree\\bigr)}", "(3,x\\geq 90^\\circ)"),
        ("\\boxed{+5}", "5"),
        ("\\boxed{\u22125}", "-5"),
    ],
)
def test_equal_answers_of_math(found: str, answer: str) -> None:
    assert math(found, answer)


UNEQUAL = [
    ("42", "24"),
    ("-1", "1"),
    ("(1,2)", "(2,1)"),
    ("\\frac{3}{12}", "12"),
    ("\\frac{12}{5}", "12"),
    ("2^{12}", "12"),
    ("1, 2, 12", "12"),
    ("x > 12", "12"),
    ("12x", "12"),
    ("3 \\text{ or } 12", "12"),
    ("\\sqrt{12}", "12"),
    ("12!", "12"),
    ("7/0", "7"),
    ("x^{12}", "x^12"),
    ("\\frac{1}{23}", "\\frac123"),
]


def test_unequal_answers_of_math() -> None:
    assert boxed("\\boxed{\\frac{1}{2}") is None and not math("the answer is 42", "42")
    assert [pair for pair in UNEQUAL if math(f"\\boxed{{{pair[0]}}}", pair[1])] == []
    assert latex("$\\frac12$") == "\\frac{1}{2}"
    assert not math("\\boxed{12\\text{ million}}", "12")  # no unit, though the harness takes it for one


def test_judgements_are_those_of_the_harness_where_it_has_the_task() -> None:
    """Stated differences apart: ours reads a subtraction as one, and thousands, units and fractions as numbers."""
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    for found, answer in UNEQUAL:
        assert not is_equiv(found, answer)
    for found, answer in (
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\left(3,4\\right)", "(3,4)"),
        ("k = 5", "5"),
        ("3/4", "\\frac34"),
    ):
        assert is_equiv(found, answer) and math(f"\\boxed{{{found}}}", answer)
    flexible = RegexFilter(regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    texts = ["so 1,234 it is", "from 3 to -7", "#### 18", "it costs $5", "3 and then 12 apples", "2 + 3 = 5\nNext"]
    for text, (theirs,) in zip(texts, flexible.apply([[text] for text in texts], []), strict=True):
        assert numeric(text, theirs.replace("$", ""))


GOOD = "def add(a, b):\n    return a + b\n"
ANSWERS = {
    "py": f"```py\n{GOOD}```\nDone.",
    "Python with words": f"```Python title=x\n{GOOD}```",
    "python3.12": f"``` python3.12\n{GOOD}```",
    "attributes": f"```{{.python}}\n{GOOD}```",
    "tildes": f"~~~python\n{GOOD}~~~",
    "in a list": "1. So:\n   ```python\ndef add(a, b):\n    return a + b\n   ```",
    "returns": f"```python\n{GOOD}```\n".replace("\n", "\r\n"),
    "after a shell": f"```sh\npip install x\n```\nThen\n```\n{GOOD}```",
    "after what it prints": f"```\n3\n```\nby\n```\n{GOOD}```",
    "after an example": f"```python\nprint(add(1, 2))\n```\nwith\n```python\n{GOOD}```",
    "never closed": f"```python\n{GOOD}",
    "the body alone": "```python\n    return a + b\n```",
    "of a helper in the prompt": "```python\ndef add(a: Number, b: Number):\n    return double(a) / 2 + b\n```",
    "a fence in a fence": f"````python\n{GOOD}````",
    "no block": "    return a + b\n\nprint(add(1, 2) / 0)",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_program_in_an_answer(name: str) -> None:
    prompt = (
        "Number = float\n\ndef double(x: Number) -> Number:\n    return 2 * x\n\n\n"
        'def add(a: Number, b: Number) -> Number:\n    """Add."""\n'
    )
    scope: dict[str, Any] = {}
    exec(program(prompt, ANSWERS[name]), scope)
    assert scope["add"](2, 3) == 5


def test_the_program_behind_an_open_fence() -> None:
    assert program("Task\n```python\n", "x = 1\n```\nmore") == "x = 1\n"
    assert program("Task\n```python\n", "```python\nx = 1\n```\nmore") == "x = 1\n"
    assert program("def f():\n", "```bash\nls\n```") == "def f():\n```bash\nls\n```"  # no program at all: it fails


PROGRAMS = {
    "wrong": "assert 1 == 2",
    "a syntax error": "def",
    "an early exit": "import sys; sys.exit(0)",
    "the exit code of another sandbox": "import sys; sys.exit(77)",
    "an exit without clean-up": "import os; print(77); os._exit(0)",
    "endless": "while True: pass",
    "asleep": "import time; time.sleep(60)",
    "a memory hog": "x = bytearray(3 * 2**30)",
    "the network": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "a file elsewhere": "open('{folder}/escaped', 'w').write('x')",
    "a file in a home": "import os; open('/root/nemodiff-escaped', 'w')",
    "a fifo elsewhere": "import os; os.mkfifo('{folder}/escaped')",
    "a database elsewhere": "import sqlite3; sqlite3.connect('{folder}/escaped').execute('create table t (x)')",
    "a deletion elsewhere": "import os; os.remove('{folder}/mine')",
    "too much": "open('x', 'wb').write(b'x' * (1 << 27))",
    "a foreign process": "import os; os.kill({pid}, 0)",
    "a look at others": "import os; assert os.listdir('/proc')",
    "a mount": "import subprocess; subprocess.run(['mount', '-o', 'remount,rw', '/'], check=True)",
    "a device": "import os; os.mknod('d', 0o60600, os.makedev(254, 0)); open('d')",
    "a secret": "import os; assert 'HOME' in os.environ",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_fails_or_is_stopped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 3)
    (tmp_path / "mine").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"port": server.getsockname()[1], "folder": tmp_path, "pid": os.getpid()}
        assert not passes(PROGRAMS[name].format(**values))
    assert os.listdir(tmp_path) == ["mine"]


def test_a_program_that_passes() -> None:
    assert passes("import math, collections\nopen('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'")
    assert passes("import tempfile\nwith tempfile.NamedTemporaryFile('w') as file:\n    file.write('x')")
    assert passes("import subprocess\nassert subprocess.run(['echo', 'x'], capture_output=True).stdout == b'x\\n'")
    # what it starts does not outlive it
    waiting = f"nemodiff-left-{os.getpid()}"
    assert passes(f"import subprocess\nsubprocess.Popen(['sleep', '100', '{waiting}'], start_new_session=True)")
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if waiting.encode() in line]


def test_no_program_is_run_without_a_sandbox(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemodiff_train.evaluation.sandbox._NAMESPACES", ("false",))
    check_sandbox.cache_clear()
    try:
        with pytest.raises(UserError, match=r"this machine does not allow; .* --confirm_run_unsafe_code"):
            load_task("humaneval", source=str(data / "humaneval.jsonl"), run_code=True)
    finally:
        check_sandbox.cache_clear()


def test_a_python_below_the_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone in ``/tmp`` has its environment there, which the scratch folder covers; it is only read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        monkeypatch.setattr(sys, "executable", f"{folder}/bin/python")
        assert passes(f"import sys; assert sys.prefix == {folder!r}")
        assert not passes("import sys; open(sys.prefix + '/written', 'w')")
        assert not Path(folder, "written").exists()
