"""Tasks and scorers: what counts as right, and what is refused."""

from pathlib import Path

import pytest

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.arithmetic import problems
from nemodiff_train.evaluation.scorers import last_number, make_scorer
from nemodiff_train.evaluation.tasks import load_task


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234", "1234"),
        ("it costs $5.", "5"),
        ("from 3 to -7", "-7"),
        ("x = \N{MINUS SIGN}2.50", "-2.5"),
        ("a loss of -$1,000.25!", "-1000.25"),
        ("10-4", "4"),
        ("(2)-3", "3"),
        ("1,2,3", "3"),
        ("$.75", "0.75"),
        ("007", "7"),
        ("none here", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (found is None) if number is None else (make_scorer("numeric")(text, number))


def test_scorers() -> None:
    numeric, exact = make_scorer("numeric"), make_scorer("exact")
    assert numeric("18.00", "#### 18") and not numeric("none", "18") and not numeric("18.01", "18")
    assert not numeric("none", "none")
    assert exact(" Paris\n", "Paris") and not exact("paris", "Paris")
    boxed = make_scorer("regex", r"boxed\{(\w+)\}|(x)")
    assert boxed(r"\boxed{12} \boxed{13}", "12") and not boxed("12", "12") and not boxed("x", "x")


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("numerical", None, "Did you mean 'numeric'"),
        ("regex", None, "goes with the scorer 'regex'"),
        ("exact", "(a)", "goes with the scorer 'regex'"),
        ("regex", "(a", "not a regular expression"),
        ("regex", "a", "has no group"),
    ],
)
def test_bad_scorers(name: str, pattern: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scorer(name, pattern)


def test_task_from_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('\ufeff{"prompt": "2+2=", "answer": "4", "id": 1}\n\n{"prompt": "3=", "answer": "3"}\n')
    task = load_task(str(path))
    assert task.name == "mine" and [prompt.answer for prompt in task.prompts] == ["4", "3"]
    assert task.score(0, "it is 4.") and not task.score(1, "4")
    assert len(load_task(str(path), count=1).prompts) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n', r"bad.jsonl:2': answer: field required"),
        (b'{"prompt": "", "answer": "1"}\n', r"bad.jsonl:1': prompt is .*: string should have at least 1"),
        (b'{"prompt": "a", "answer": 1}\n', r"bad.jsonl:1': answer is 1: input should be a valid string"),
        (b'{"prompt": "a", "answer": "x"}\n', r"bad.jsonl:1': answer is .*no number in it"),
        (b"\n\n{oops\n", r"bad.jsonl:3': invalid JSON"),
        (b'{"prompt": "\xff"}\n', r"bad.jsonl:1: not UTF-8 at byte 13"),
        (b"\n", r"bad.jsonl is empty"),
    ],
)
def test_bad_task_files(tmp_path: Path, lines: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines)
    with pytest.raises(UserError, match=message) as raised:
        load_task(str(path))
    assert "\n" not in str(raised.value)


def test_bad_task_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="Did you mean 'arithmetic'"):
        load_task("aritmetic")
    with pytest.raises(UserError, match=r"--count \(evaluation.count\) is 0; use 1 or more"):
        load_task("arithmetic", count=0)


def test_arithmetic_takes_test_problems() -> None:
    expected = problems("test", 2, 0)
    task = load_task("arithmetic", count=2)
    assert [prompt.prompt for prompt in task.prompts] == [problem.prompt for problem in expected]
    assert task.score(1, f"that makes {expected[1].answer}.") and not task.score(1, "that makes 1000.")
    asked = load_task("questions", count=2)
    assert [prompt.prompt for prompt in asked.prompts] == [problem.question for problem in expected]
