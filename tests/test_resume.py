"""A run that goes on with other settings: taken over and said, or refused, by the run and by its dry run alike."""

import math
import shutil
from pathlib import Path

import pytest
import yaml

from nemodiff_train.cli import main
from tools.support import faults, small
from tools.support.ranks import RankPool

STEPS, SAVED = 8, 4


class Runs:
    """Runs of one process from one model, and the first half of one of them."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self.folder, self.ranks = folder, ranks
        faults.furnish(folder)
        code, said = self.train("first", f"train.exit_interval={SAVED}")
        assert code == 0 and f"training: joint stage, from {folder}" in said and f"; {STEPS} steps of 8 x " in said

    def words(self, name: str, *more: str) -> list[str]:
        return [*faults.words(self.folder, self.folder / name, steps=STEPS, interval=2, kept=2), *more]

    def train(self, name: str, *more: str) -> tuple[int, str]:
        """Return the exit code and what was printed, on one line."""
        world = self.ranks.start(name, 1, faults.train, logs=self.folder / "logs", words=self.words(name, *more))
        (code,) = self.ranks.wait(world)
        return code, " ".join(world.output().split())

    def copy(self, name: str) -> str:
        shutil.copytree(self.folder / "first", self.folder / name)
        return name

    def rates(self, name: str) -> list[float]:
        """Return the learning rate of every step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / name / "tensorboard"))
        events.Reload()
        by_step = {event.step: event.value for event in events.Scalars("learning-rate")}
        return [by_step[step] for step in sorted(by_step)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), ranks)


def cosine(step: int, steps: int, peak: float, floor: float = 1e-4, warmup: int = 1) -> float:
    """The learning rate after so many steps, which Megatron logs with the last of them."""
    if step <= warmup:
        return peak * step / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(
    ("name", "changed", "steps", "peak"),
    [
        ("longer", ["train.train_iters=12"], 12, 1e-3),
        ("shorter", ["train.train_iters=6"], 6, 1e-3),
        ("another rate", ["optimizer.lr=4e-4"], STEPS, 4e-4),
        ("a larger batch", ["train.global_batch_size=16"], STEPS, 1e-3),
        ("a smaller batch", ["train.global_batch_size=2", "optimizer.adam_beta1=0.5"], STEPS, 1e-3),
    ],
)
def test_what_a_run_takes_over(runs: Runs, name: str, changed: list[str], steps: int, peak: float) -> None:
    code, said = runs.train(
        runs.copy(name), *changed, "logger.tensorboard_dir=" + str(runs.folder / name / "tensorboard")
    )
    assert code == 0 and "Traceback" not in said
    assert f"resumes from step {SAVED} with changed settings: " in said and "new schedule at step 4" in said
    assert all(word.partition("=")[0] in said for word in changed)
    assert f"training: joint stage, from step {SAVED}; {steps} steps of " in said
    assert [line["step"] for line in small.figures(runs.folder / name)] == [*range(1, steps + 1)]
    expected = [cosine(step, steps, peak) for step in range(SAVED + 1, steps + 1)]
    assert runs.rates(name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["objective.block_size=8"], "objective.block_size is 8, but '"),
        (["objective.alpha=0.5"], "objective.alpha is 0.5, but '"),
        (["objective.stage=ar"], "objective.stage is ar, but '"),
        (["objective.mask_token='<eod>'"], "objective.mask_token is <eod>, but '"),
        (["model.rotary_base=5000"], "model.rotary_base is 5000, but '"),
        (["optimizer.optimizer=sgd"], "optimizer.optimizer is sgd, but '"),
        (["mixed_precision=bf16_mixed"], "mixed_precision is bf16_mixed, but '"),
        (["train.train_iters=2"], "is at step 4; use more steps"),
    ],
)
def test_what_it_refuses(runs: Runs, words: list[str], needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *runs.words("first", *words), "--dry-run"]) == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert needle in page
    if words[0].startswith("objective.block_size"):
        code, said = runs.train("first", *words)
        assert code == 2 and needle in said and "another run with start_from=" in said


def test_nothing_has_changed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison knows what is given, not what Bridge makes of it."""
    for named in ([], ["mixed_precision=fp32"]):  # the second names what the run has begun in
        assert main(["train", *runs.words("first", f"train.exit_interval={SAVED}", *named), "--dry-run"]) == 0
        page = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"resumes from step {SAVED} with the settings it was saved with" in page
    assert main(["train", *runs.words("first", "train.global_batch_size=4"), "--dry-run"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"train.exit_interval {SAVED} -> None, train.global_batch_size 8 -> 4; the learning rate" in page


def test_it_goes_on_from_the_step_that_is_asked_for(runs: Runs) -> None:
    """Its settings are compared with those of that step, which later ones may have changed."""
    name, all_kept = runs.copy("back"), "checkpoint.most_recent_k=-1"
    assert runs.train(name, all_kept, "optimizer.lr=4e-4", "train.global_batch_size=4")[0] == 0
    assert runs.train("straight")[0] == 0
    code, said = runs.train(name, all_kept, f"checkpoint.ckpt_step={SAVED}")
    assert code == 0 and "Traceback" not in said
    assert f"resumes from step {SAVED} with changed settings: " in said and "optimizer.lr" not in said
    assert small.figures(runs.folder / name) == small.figures(runs.folder / "straight")
    code, said = runs.train(name, all_kept, "checkpoint.ckpt_step=5")
    assert code == 2 and "checkpoint.ckpt_step=5: there is no such checkpoint in" in said


def test_the_precision_of_a_run_from_elsewhere_is_kept(runs: Runs) -> None:
    """Its checkpoints do not hold the settings that it was given."""
    runs.copy("elsewhere")
    for file in (runs.folder / "elsewhere" / "checkpoints").glob("iter_*/run_config.yaml"):
        (file.parent / "checksums.json").unlink()
        config = yaml.safe_load(file.read_text())
        del config["requested_settings"]
        file.write_text(yaml.safe_dump(config))
    code, said = runs.train("elsewhere", "mixed_precision=bf16_mixed")
    assert code == 2 and "mixed_precision is bf16_mixed, but '" in said and "Traceback" not in said
