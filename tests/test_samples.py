"""Training samples shown before a training, and made-up text in the place of data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemodiff_train.cli import main
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small.run_inputs(tmp_path_factory.mktemp("samples"))
    (folder / "chat.py").write_text("from tests.small import chat as recipe\n")
    return folder


def show(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str, recipe: str = "recipe.py") -> int:
    monkeypatch.chdir(folder)
    return main(["data", "show", recipe, "start_from=model", "output=out", *words])


def test_text_is_shown_as_it_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemodiff_train.config.recipes import load_recipe
    from nemodiff_train.training.samples import first_samples

    before = sorted(os.listdir(folder))
    words = ["data=data", "dataset.reset_attention_mask=true", "objective.noise_granularity=block"]
    assert show(folder, monkeypatch, *words, "--count", "3") == 0
    page = capsys.readouterr().out
    assert page.count("\nsample ") == 3 and "\x1b" not in page and sorted(os.listdir(folder)) == before
    config = load_recipe("recipe.py", ["start_from=model", "output=out", *words])
    config.propagate()
    parts = page.split("\nsample ")[1:]
    for text, sample in zip(parts, first_samples(config, 3), strict=True):
        noisy, clean = sample["tokens"].view(2, 64)
        lines = [line for line in text.splitlines() if "document" in line]
        assert text.count("⟦") == int((noisy != clean).sum())
        assert text.count("¶") == int((clean == 0).sum())
        assert len(lines) == len(set(sample["segment_ids"][1].tolist()))
        weights = [f"{float(found):.2f}" for found in re.findall(r" w ([\d.]+)", text)]
        assert set(weights) == {f"{weight:.2f}" for weight in sample["loss_mask"][:64].tolist() if weight}


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("chat.py", ["data=mock"], "data=mock is text"),
        ("recipe.py", ["data=data", "dataset.data=[mock,data]"], "the only data of a run"),
        ("recipe.py", ["data=nowhere"], "nowhere"),
        ("recipe.py", ["data=data", "--count", "0"], "--count: '0'"),
    ],
)
def test_refusals(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    words: list[str],
    said: str,
) -> None:
    assert show(folder, monkeypatch, *words, recipe=recipe) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and lines[-1].startswith("nemodiff: error: ")


def test_made_up_text_needs_no_data(folder: Path) -> None:
    words = ["start_from=model", "data=mock", "output=mocked", "train.train_iters=2", "dataset.eod_mask_loss=true"]
    command = [sys.executable, "-m", "nemodiff_train", "train", "recipe.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in (folder / "mocked" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures] == [1, 2] and figures[1]["diffusion_loss"] > 0


def test_made_up_text_holds_no_mask_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff_train.config.recipes import load_recipe
    from nemodiff_train.training.samples import first_samples

    monkeypatch.chdir(folder)
    words = ["start_from=model", "data=mock", "output=out", "seq_length=1024", "mixed_precision=fp16_mixed"]
    config = load_recipe("recipe.py", words)
    assert config.mixed_precision == "fp16_mixed"  # the field without a section, and so without a dot
    config.propagate()
    clean = [sample["tokens"][-1024:] for sample in first_samples(config, 4)]
    rows = config.model.vocab_size
    assert all(int(tokens.max()) < rows and config.model.mask_token_id not in tokens.tolist() for tokens in clean)
    assert {int(token) for tokens in clean for token in tokens} > set(range(20, 100))
