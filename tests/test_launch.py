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
GIVEN = ["start_from=m", "data=d", "output=o"]


def shellcheck(*files: Path) -> None:
    done = subprocess.run([SHELLCHECK, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_sound() -> None:
    shellcheck(*sorted((ROOT / "slurm").glob("*.s*")))


@pytest.mark.parametrize("words", [["chain.sh", "README.md"], ["data.sh", "docs", "model", "data"]])
def test_scripts_without_slurm_say_so(words: list[str], tmp_path: Path) -> None:
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    command = [shutil.which("bash") or "bash", f"slurm/{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    line = f"slurm/{words[0]}: error: no sbatch on this machine; run it where jobs are submitted\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_printed_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--after", "17", "--time", "1-12", "--partition", "gpu", "--account", "me", "--gres", "gpu:h100:8"]
    assert main([*WORDS, *options, "data=a b;rm c", "start_from=m", "output=o"]) == 0
    text = capsys.readouterr().out
    lines = ("--nodes=4", "--time=1-12", "--dependency=afterok:17", "--signal=B:USR1@300", "--requeue")
    for line in (*lines, "--partition=gpu", "--account=me", "--gres=gpu:h100:8"):
        assert f"\n#SBATCH {line}\n" in text
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    shellcheck(script)
    words = text[: text.index("SCRIPTS=")] + "printf '%s\\n' \"$@\""
    told = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["ministral3_8b_joint", "data=a b;rm c", "start_from=m", "output=o"]


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
    assert main([*(word for word in WORDS if word != "--dry-run"), *GIVEN]) == 2
    said = capsys.readouterr().err
    assert str(read_only) in said and "cannot be written to" in said
    assert main([*WORDS, *GIVEN]) == 0  # printing needs no place


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ([*WORDS, "--nodes", "0"], "--nodes: '0'"),
        ([*WORDS, "--time", "soon"], "--time soon"),
        ([*WORDS, "--name", "a\nb"], "--name"),
        ([*WORDS, "hello"], "key=value"),
        ([*WORDS, "--nods", "2"], "--nods"),
        ([*WORDS, *GIVEN, "--partition", "a b"], "--partition a b"),
        ([*WORDS, *GIVEN, "--gres", "gpu:8\n#SBATCH --qos=x"], "--gres"),
        ([*WORDS, "data=d"], "needs start_from=..., output=..."),
        ([*WORDS, *GIVEN, "mask_tokn=x"], "Did you mean 'mask_token'?"),
        (["launch", "--slurm", "joint", "--dry-run", *GIVEN, "precison=fp32"], "Did you mean 'precision'?"),
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


STEP = """
source "$1/slurm/site.env"; source "$1/slurm/common.sh"
srun() { printf '%s\\n' "$@"; }
step python x
"""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--kill-on-bad-exit=1|python|x"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "--kill-on-bad-exit=1|--gres=gpu:4|python|x"),
        ({"SLURM_GPUS_ON_NODE": "4", "STEP_GPUS": ""}, "--kill-on-bad-exit=1|python|x"),
        (
            {"STEP_GPUS": "--gpus-per-node=8", "CONTAINER": "a b.sif", "MOUNTS": "/data:/data"},
            "--kill-on-bad-exit=1|--gpus-per-node=8|apptainer|exec|--nv|--bind|/data:/data|--pwd|/w|a b.sif|python|x",
        ),
        (
            {"CONTAINER": "nemo+1"},
            "--kill-on-bad-exit=1|--container-image=nemo+1|--container-mounts=/w:/w|--container-workdir=/w|python|x",
        ),
    ],
)
def test_step_asks_for_gpus_and_runs_in_the_container(given: dict[str, str], words: str) -> None:
    environment = {"PATH": os.environ["PATH"], "WORK": "/w", **given}
    command = ["bash", "-euo", "pipefail", "-c", STEP, "x", str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == words.split("|"), done.stderr
