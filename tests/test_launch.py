"""Batch scripts: what ``nemodiff launch`` prints, and whether a shell would take them all."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemodiff_train.cli import main, parse

ROOT = Path(__file__).parents[1]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
WORDS = ["launch", "--slurm", "ministral3", "--nodes", "4", "--dry-run"]


def shellcheck(*files: Path) -> None:
    done = subprocess.run([SHELLCHECK, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_sound() -> None:
    shellcheck(*sorted((ROOT / "slurm").glob("*.s*")))


def test_printed_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*WORDS, "--after", "17", "--time", "1-12", "size=8b", "data=a b;rm c"]) == 0
    text = capsys.readouterr().out
    for line in ("--nodes=4", "--time=1-12", "--dependency=afterok:17", "--signal=B:USR1@300", "--requeue"):
        assert f"\n#SBATCH {line}\n" in text
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    shellcheck(script)
    words = text[: text.index("SCRIPTS=")] + "printf '%s\\n' \"$@\""
    told = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["ministral3", "size=8b", "data=a b;rm c"]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ([*WORDS, "--nodes", "0"], "--nodes 0"),
        ([*WORDS, "--time", "soon"], "--time soon"),
        ([*WORDS, "--name", "a\nb"], "--name"),
        ([*WORDS, "hello"], "key=value"),
        ([*WORDS, "--nods", "2"], "--nods"),
        (["launch", "ministral3"], "--slurm"),
        (["train", "ministral3", "--gpus", "8"], "--dry-run"),
        (["train", "ministral3", "--dry-run", "--gpus", "0"], "above 0"),
    ],
)
def test_refusals(words: list[str], needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert needle in capsys.readouterr().err


def test_settings_may_follow_options() -> None:
    assert parse(["train", "x", "a=1", "--gpus", "8", "b=2"]).settings == ["a=1", "b=2"]
