"""Batch scripts: what ``nemodiff launch`` prints, and whether a shell would take them all."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slurm
from nemodiff_train.cli import main, parse

ROOT = Path(__file__).parents[1]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
WORDS = ["launch", "--slurm", "ministral3_8b_joint", "--nodes", "4", "--dry-run"]


def shellcheck(*files: Path) -> None:
    done = subprocess.run([SHELLCHECK, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_sound() -> None:
    shellcheck(*sorted((ROOT / "slurm").glob("*.s*")))


def test_printed_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*WORDS, "--after", "17", "--time", "1-12", "data=a b;rm c"]) == 0
    text = capsys.readouterr().out
    for line in ("--nodes=4", "--time=1-12", "--dependency=afterok:17", "--signal=B:USR1@300", "--requeue"):
        assert f"\n#SBATCH {line}\n" in text
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    shellcheck(script)
    words = text[: text.index("SCRIPTS=")] + "printf '%s\\n' \"$@\""
    told = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["ministral3_8b_joint", "data=a b;rm c"]


HARD = ["data=it's here", 'name="a b"', "path=$HOME/`id`", "two=a\nb", "caf\u00e9=\\"]


def test_no_word_is_taken_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'it\'s "installed" here'
    shutil.copytree(ROOT / "slurm", folder)
    monkeypatch.setattr(slurm, "__path__", [str(folder)])
    assert main([*WORDS[:2], "my recipe's.py", *WORDS[3:], *HARD]) == 0
    text = capsys.readouterr().out
    beginning = text[: text.index("# shellcheck source")] + 'printf \'%s\\0\' "$SCRIPTS" "$@"'
    told = subprocess.run(["bash", "-c", beginning], capture_output=True, text=True, check=True).stdout
    assert told.split("\0")[:-1] == [str(folder), "my recipe's.py", *HARD]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in that this user cannot write to; root becomes another user for that."""
    tmp_path.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield tmp_path
    os.seteuid(user)
    tmp_path.chmod(0o755)


def test_submitting_from_a_read_only_folder(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in WORDS if word != "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert str(read_only) in said and "cannot be written to" in said
    assert main(WORDS) == 0  # printing needs no place


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ([*WORDS, "--nodes", "0"], "--nodes 0"),
        ([*WORDS, "--time", "soon"], "--time soon"),
        ([*WORDS, "--name", "a\nb"], "--name"),
        ([*WORDS, "hello"], "key=value"),
        ([*WORDS, "--nods", "2"], "--nods"),
        (["launch", "ministral3_8b_joint"], "--slurm"),
        (["train", "ministral3_8b_joint", "--gpus", "8"], "--dry-run"),
        (["train", "ministral3_8b_joint", "--dry-run", "--gpus", "0"], "above 0"),
    ],
)
def test_refusals(words: list[str], needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert needle in capsys.readouterr().err


def test_settings_may_follow_options() -> None:
    assert parse(["train", "x", "a=1", "--gpus", "8", "b=2"]).settings == ["a=1", "b=2"]
