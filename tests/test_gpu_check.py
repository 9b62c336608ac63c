"""``tools/gpu_check``, rehearsed: its order, its page, and what it does without a GPU."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHECK = str(ROOT / "tools" / "gpu_check")


@pytest.fixture(scope="module")
def check() -> dict[str, Any]:
    return runpy.run_path(CHECK)


def test_steps_fill_ten_minutes_and_the_first_come_first(check: dict[str, Any]) -> None:
    steps = check["_steps"]()
    assert 540 <= sum(step.seconds for step in steps) <= 570
    assert [step.name for step in steps[:4]] == ["machine", "kernels", "training", "3B at 4096"]
    assert all(step.settles and step.passes for step in steps)


def test_a_rehearsal(check: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded as they end, and what needs a failed one is left out; the real ones take minutes."""
    commands = {"fine": "print('seen')", "broken": "raise SystemExit('a reason')", "after": "print('never')"}
    steps = [
        check["Step"](name, 20, "", "", ["-c", text], ["-c", text], figures=False, needed=True)
        for name, text in commands.items()
    ]
    monkeypatch.setitem(check["main"].__globals__, "_steps", lambda: steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--output", str(tmp_path)])
    assert check["main"]() == 1
    page, found = (tmp_path / "gpu-check.md").read_text(), json.loads((tmp_path / "gpu-check.json").read_text())
    outcomes = [each["outcome"] for each in found["steps"]]
    assert found["machine"]["gpus"] == 0 and outcomes == ["passed", "failed", "left out: needs 'broken'"]
    assert "A rehearsal on a CPU" in page and "seen" in page and "a reason" in page and "never" not in page


def test_page_of_the_3b(check: dict[str, Any]) -> None:
    """Each length beside an AR step and the example's method; what did not fit is absent; then what is published."""
    kinds = {
        "ar": {"seconds": 0.5, "peak_mib": 20480.0, "tokens_per_second": 8192.0},
        "joint": {
            "seconds": 1.0,
            "peak_mib": 30720.0,
            "tokens_per_second": 4096.0,
            "mfu": 0.412,
            "planned_mib": 32768.0,
        },
        "reference": {"seconds": 2.0, "peak_mib": 61440.0, "tokens_per_second": 2048.0, "mfu": 0.206},
    }
    result, step = check["Result"], {step.name: step for step in check["_steps"]()}
    results = [
        result(step["3B at 4096"], "passed", 60.0, {"steps": kinds, "profile": []}),
        result(step["3B at 65536"], "passed", 60.0, {"steps": {"joint": kinds["joint"]}, "profile": []}),
    ]
    page = list(check["_page"]({"gpu": "NVIDIA H100", "gpus": 8}, results, False))
    assert "| 4096 | joint | 4096 | 41.2% | 30.0 | 32.0 | 2.00 |" in page
    assert "| 4096 | reference | 2048 | 20.6% | 60.0 |  | 4.00 |" in page
    assert "| 65536 | joint | 4096 | 41.2% | 30.0 | 32.0 |  |" in page
    assert any("22152" in line and "38.8%" in line for line in page)


def test_refusals(check: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, needle in (
        (["--only", "nothing"], "known: machine"),
        (["--wheels", str(tmp_path)], "holds no wheels"),
        (["--collect", str(tmp_path / "wheels")], "has no pip"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(sys, "argv", ["gpu_check", "--rehearse", *words])
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            check["main"]()
        assert left.value.code == 2 and needle in capsys.readouterr().err
