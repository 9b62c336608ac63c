"""``nemodiff env``: the page is there, whatever is missing or broken."""

import os
import subprocess
import sys

import pytest

from nemodiff_train.cli import main
from nemodiff_train.runtime.versions import pinned

WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
from nemodiff_train.cli import main
sys.exit(main(["env"]))
"""


def page(without: str, **environment: str) -> str:
    """Return the page of a process without some modules; it must end well."""
    command = [sys.executable, "-c", WITHOUT, without]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert pinned()["megatron-core"] in lines["megatron-core"] and "as tested" in lines["megatron-core"]
    for name in ("Python", "joint attention", "gradient_accumulation_fusion", "optimizer", "C compiler", "fp8"):
        assert name in lines
    assert not any("REFUSED" in line for line in lines.values())


@pytest.mark.parametrize("package", ["torch", "rich", "packaging"])
def test_missing_packages_are_lines(package: str) -> None:
    said = page(package)
    refused = [line for line in said.splitlines() if "REFUSED" in line]
    assert package in refused[0] and "ModuleNotFoundError" in refused[0]
    assert pinned()["megatron-core"] in said and "A run may ask for" in said


def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    """As after ``| head``."""
    ended, pipe = os.pipe()
    os.close(ended)
    done = subprocess.run([sys.executable, "-m", "nemodiff_train", "env"], stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")


def test_gpu_without_cuda_is_refused_and_keys_are_not_shown() -> None:
    said = page("nothing", SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="0", WANDB_API_KEY="secret")
    assert "REFUSED                       UserError: this machine has a GPU, but CUDA does not work" in said
    assert "SLURM_GPUS_ON_NODE=2" in said and "secret" not in said
