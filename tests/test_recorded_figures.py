"""Ten steps of every objective train exactly as recorded: figures that no refactoring may change.

Run this file as a program to record them again, after a change of the method that is meant.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.objective.presets import preset
from nemodiff_train.runtime import init_runtime
from tests import jobs, small
from tools.support.ranks import RankPool

FILE = Path(__file__).with_name("recorded_figures.json")
TOLERANCE = 2e-6
"""Relative; on the machine that recorded them the figures are equal bit for bit."""

SETTINGS = ["checkpoint.save_interval=0", "train.micro_batch_size=4"]
PRESETS = ("nemotron", "efficient_dlm", "tidar", "set_block", "fast_dllm_v2", "bd3")
SWITCHES = {
    "automodel": ["objective.reduction=automodel"],
    "bridge": ["objective.reduction=bridge"],
    "documents": ["dataset.reset_attention_mask=true", "dataset.eod_mask_loss=true"],
}


def _run(folder: Path, name: str, settings: list[str], recipe: str = "recipe", **arguments: Any) -> list[Any]:
    found = jobs.train(
        output=str(folder / name),
        settings=[*SETTINGS, *settings],
        recipe=recipe,
        start_from=arguments.pop("start_from", str(folder / "qwen3")),
        data=str(folder / "data"),
        **arguments,
    )
    apart = ("tokens_per_second", "seconds", "step", "tokens", "learning_rate")  # of the clock, or of the settings
    return [{key: value for key, value in step.items() if key not in apart} for step in found["steps"]]


def _overrides(name: str) -> list[str]:
    return [f"objective.{key}={value}" for key, value in vars(preset(name)).items() if value is not None]


def train_everything(folder: str | Path) -> dict[str, list[Any]]:
    """Return the figures of every step, by objective."""
    folder = Path(folder)
    init_runtime()
    small.qwen3(folder / "qwen3", num_hidden_layers=4)
    small.data(folder / "data")
    figures = {name: _run(folder, name, _overrides(name)) for name in PRESETS}
    for name, settings in SWITCHES.items():
        figures[name] = _run(folder, name, settings)
    figures["ar"] = _run(folder, "ar", [], stage="ar")
    _run(folder, "base", ["checkpoint.save_interval=10"])
    base = str(folder / "base" / "checkpoints")
    figures["drafter"] = _run(folder, "drafter", [], recipe="drafter", start_from=base)
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("recorded")
    figures: dict[str, list[Any]] = ranks.call("train", 1, train_everything, logs=folder, folder=str(folder))
    return figures


@pytest.mark.parametrize("name", [*PRESETS, *SWITCHES, "ar", "drafter"])
def test_ten_steps_train_as_recorded(figures: dict[str, list[Any]], name: str) -> None:
    expected = json.loads(FILE.read_text())[name]
    assert len(figures[name]) == len(expected) == 10
    for found, recorded in zip(figures[name], expected, strict=True):
        assert found == pytest.approx(recorded, rel=TOLERANCE, abs=1e-12)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(train_everything(Path(folder)), indent=1) + "\n")
