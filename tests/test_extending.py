"""docs/extending.md works as it is written: its blocks are one file that trains, decodes and converts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemodiff_train.cli import main
from nemodiff_train.errors import UserError
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.noise import MASK_SAMPLINGS, WEIGHTINGS, Key, NoiseInputs, draw_noise
from nemodiff_train.validation.objective import objective_problems
from tests import small
from tests.test_docs import ROOT, blocks
from tools.support.ranks import Jobs, RankPool, run_commands

PAGE = ROOT / "docs" / "extending.md"
SETTINGS = [
    "precision=fp32", "model.tensor_model_parallel_size=1", "model.pipeline_model_parallel_size=1",
    "dataset.seq_length=64", "objective.block_size=16", "train.train_iters=2", "train.global_batch_size=2",
    "train.micro_batch_size=1", "evaluation.interval=1", "evaluation.max_new_tokens=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's file, and a model of the page's family."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "own.py").write_text("\n\n".join(blocks(PAGE, "python")))
    small.qwen3(folder / "house")
    config = folder / "house" / "config.json"
    named = {"model_type": "house", "architectures": ["HouseForCausalLM"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    return folder


EXTENDED = ["--extend", "own.py"]
JOBS = {
    "import": [["convert", "import", "house", "imported", "--mask-token", small.MASK, *EXTENDED]],
    "train": [["train", "own.py", "start_from=imported", "data=mock", "output=out", *SETTINGS]],
    "score": [
        ["eval", "out/checkpoints", "--task", "capitals", "--modes", "ar,lookup", "--max-new-tokens", "20",
         "--output", "report", *EXTENDED],
        ["convert", "export", "out/checkpoints", "back", *EXTENDED],
    ],
}  # fmt: skip


def test_a_file_adds_a_schedule_a_mode_a_task_and_a_family(folder: Path, ranks: RankPool) -> None:
    runs, before = Jobs(ranks, folder), None
    for name, commands in JOBS.items():
        runs.add(name, 1, run_commands, after=before, folder=str(folder), commands=commands)
        before = name
    assert [code for name in JOBS for code in runs[name]] == [0] * 4
    steps = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and {"eval/tpf/lookup", "eval/accuracy/lookup", "diffusion_loss"} <= set(steps[-1])
    report = json.loads((folder / "report" / "metrics.json").read_text())
    assert report["task"] == "capitals" and report["modes"]["lookup"]["identical_to_ar"] == 1.0
    exported = json.loads((folder / "back" / "config.json").read_text())
    assert exported["architectures"] == ["HouseForCausalLM"] and exported["model_type"] == "house"


def test_without_the_file_its_names_are_unknown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "import", str(folder / "house"), str(folder / "refused")]) == 2
    assert "HouseForCausalLM is not supported" in capsys.readouterr().err
    assert main(["generate", str(folder / "house"), "a", "--extend", str(folder / "none.py")]) == 2
    assert "no recipe file" in capsys.readouterr().err
    (said,) = objective_problems(ObjectiveConfig(mask_sampling="later_mor"), 64)
    assert said.startswith("objective.mask_sampling is 'later_mor'; use 'bernoulli', 'exact'")


@pytest.fixture
def later_more(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's schedule and weighting, run by themselves."""
    defined: dict[str, Any] = {}
    exec("\n".join(blocks(PAGE, "python")[:2]), defined)
    for table, name in ((MASK_SAMPLINGS, "later_more"), (WEIGHTINGS, "at_most_ten")):
        monkeypatch.setitem(table, name, table.pop(name))  # type: ignore[attr-defined, index]
    return defined["later_more"]


def test_a_schedule_is_undone_by_its_weights(later_more: Any) -> None:
    """The mean weight of a position over all draws is 1, masked or not; a weighting of one's own is what it says."""
    objective = ObjectiveConfig(block_size=8, mask_sampling="later_more", min_noise_level=0.1)
    assert not [*objective_problems(objective, 16)]
    blocks, everywhere = np.arange(16) // 8, np.full(16, True)
    draws = [draw_noise(Key(1, 0, index), everywhere, blocks, objective, 8, 1, None) for index in range(20_000)]
    weights = np.concatenate([each.weight for each in draws])
    assert np.abs(weights.mean(0) - 1).max() < 6 * weights.std(0).max() / len(weights) ** 0.5
    masked = np.concatenate([each.masked for each in draws]).mean(0)
    assert masked[7] > 2 * masked[0]
    objective.weighting = "at_most_ten"
    assert draw_noise(Key(1, 0, 0), everywhere, blocks, objective, 8, 1, None).weight.max() <= 10


def wrong_probability(draw: np.random.Generator, inputs: NoiseInputs) -> Any:
    return draw.random(len(inputs.levels)) < 0.7 * inputs.levels, inputs.levels


def own_randomness(draw: np.random.Generator, inputs: NoiseInputs) -> Any:
    return np.random.default_rng().random(len(inputs.levels)) < inputs.levels, inputs.levels


def never_the_first(draw: np.random.Generator, inputs: NoiseInputs) -> Any:
    probability = inputs.levels * (np.arange(len(inputs.levels)) > 0)
    return draw.random(len(inputs.levels)) < probability, probability


def no_probability(draw: np.random.Generator, inputs: NoiseInputs) -> Any:
    return draw.random(len(inputs.levels)) < inputs.levels


def a_mistake(draw: np.random.Generator, inputs: NoiseInputs) -> Any:
    return inputs.level


SAID = {
    wrong_probability: "return the probability with which it is masked",
    own_randomness: "draw from the one that it is given",
    never_the_first: "not above 0",
    no_probability: "one for each level",
    a_mistake: "fails: AttributeError",
}


@pytest.mark.parametrize("sampling", SAID)
def test_a_schedule_that_owes_something_is_refused(sampling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MASK_SAMPLINGS, "own", sampling)
    (said,) = objective_problems(ObjectiveConfig(block_size=8, mask_sampling="own"), 16)
    assert said.startswith("objective.mask_sampling=own ") and SAID[sampling] in said, said
    assert not [*objective_problems(ObjectiveConfig(block_size=8, mask_sampling="own", stage="ar"), 16)]


def test_a_mistake_in_the_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.py").write_text("x = 1\nMODES['a'] = 2\n")
    assert main(["generate", str(folder / "house"), "a", "--extend", str(folder / "bad.py")]) == 2
    assert "bad.py', line 2: NameError" in capsys.readouterr().err
    with pytest.raises(UserError, match="no recipe file"):
        from nemodiff_train.config.recipes import run_file

        run_file(folder / "none.py")
