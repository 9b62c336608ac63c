"""Attention compiles to machine code for Hopper, once per run, and fits its shared memory; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = "" if os.environ.get("NEMODIFF_ALL") else "ministral3_3b"
"""Every shape of the shipped recipes takes a minute or two on a core each."""


def test_kernels_of_the_recipes(tmp_path: Path) -> None:
    """In a process of its own, which believes in a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    words = [str(ROOT / "tools/bench/compile"), "--only", CASES, "--json", str(tmp_path / "kernels.json")]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["compilations"].pop("ten lengths") == 20  # more than torch's limit of 8 for one function
    # One kernel for training and one for validation, whatever documents and blocks the samples have.
    assert len(found["compilations"]) == 3 and max(found["compilations"].values()) <= 2, found["compilations"]
    kernels = found["kernels"]
    assert {kernel["name"] for kernel in kernels} == {"forward", "backward"}
    for kernel in kernels:
        assert 0 < kernel["shared"] <= 232_448 and kernel["stack"] < 2_000, kernel
