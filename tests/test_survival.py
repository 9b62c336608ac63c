"""A training survives kills at any moment of a save, damaged files, bad gradients, signals, hangs, endless restarts.

Runs are those of the command line, most of them on two ranks.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemodiff_train.cli import main
from nemodiff_train.config.defaults import checkpoints
from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import CHECKSUMS, damage, files_of, iterations, mark_of
from nemodiff_train.model.loading import load_model
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.resilience.checkpoints import latest_complete
from nemodiff_train.validation.settings import section_problems
from tools.support import faults, layouts, small
from tools.support.ranks import RankPool, World

STEPS = 6


class Bench:
    """A model and data in a folder, and runs that train one on the other."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self.folder = folder
        self.ranks = ranks
        faults.furnish(folder)

    def words(self, name: str, *more: str) -> list[str]:
        """Return the arguments of a run."""
        return [*faults.words(self.folder, self.folder / name, steps=STEPS, interval=2, kept=2), *more]

    def train(self, name: str, *more: str, world: int = 2, **fault: Any) -> tuple[list[int], str]:
        """Train; return exit codes by rank and what the ranks printed."""
        running = self.start(name, *more, world=world, **fault)
        return self.ranks.wait(running), running.output()

    def start(self, name: str, *more: str, world: int = 2, log: str = "", **fault: Any) -> World:
        """Start the ranks of a training."""
        logs = self.folder / "logs"
        return self.ranks.start(log or name, world, faults.train, logs=logs, words=self.words(name, *more), **fault)

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Return the figures of every step, without those that depend on the clock."""
        return small.figures(self.folder / name)

    def checkpoints(self, name: str) -> Path:
        return self.folder / name / "checkpoints"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Bench:
    return Bench(tmp_path_factory.mktemp("survival"), ranks)


@pytest.fixture(scope="module")
def reference(bench: Bench) -> list[dict[str, Any]]:
    """The steps of a run that nothing happens to."""
    assert bench.train("reference")[0] == [0, 0]
    steps = bench.steps("reference")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [folder.name for folder in iterations(bench.checkpoints("reference"))] == ["iter_0000006", "iter_0000004"]
    return steps


BACKGROUND = "checkpoint.async_save=true"


KILLS: dict[str, list[tuple[str, int, int, int]]] = {
    "of a run that goes on": [
        ("before shard", 0, 4, 2),
        ("mid-shard", 1, 4, 2),
        ("before manifest", 0, 4, 2),
        ("before publication", 0, 4, 2),
        ("before tracker", 0, 4, 4),
        ("before cleanup", 0, 6, 6),
    ],
    "in a cleanup": [("mid-cleanup", 0, 2, 6)],
}
"""Moments of a save, each in a start that goes on from the one before: the rank that is killed, the step of the
checkpoint, and the step of the newest one that is whole then."""


@pytest.mark.parametrize("saving", ["checkpoint.async_save=false", BACKGROUND])
@pytest.mark.parametrize("kills", KILLS)
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(
    bench: Bench, reference: list[dict[str, Any]], kills: str, saving: str
) -> None:
    name = f"{kills} {saving}"
    folder = bench.checkpoints(name)
    unfinished = False
    for fault, rank, step, newest in KILLS[kills]:
        codes, output = bench.train(name, saving, "resilience.restarts=9", fault=fault, rank=rank, step=step)
        assert codes[rank] == -signal.SIGKILL, (fault, output)
        assert ("damaged-iter_" in output) == unfinished, fault
        assert Checkpoint.open(folder).verify_contents().iteration.name == f"iter_{newest:07d}", fault
        unfinished = newest < step
    codes, output = bench.train(name, saving)
    assert codes == [0, 0], output
    assert (folder / "iter_0000002").exists() == (fault == "before cleanup")  # nothing is saved any more
    assert bench.steps(name) == reference
    assert damage(Checkpoint.open(folder).iteration) is None
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


def test_saved_in_the_background_is_what_the_step_had(bench: Bench, reference: list[dict[str, Any]]) -> None:
    """Training goes on while the file is written, and changes nothing in it."""
    codes, output = bench.train("background", BACKGROUND)
    assert codes == [0, 0], output
    assert bench.steps("background") == reference
    for step in (4, 6):
        kept, written = (
            json.loads((bench.checkpoints(name) / f"iter_{step:07d}" / CHECKSUMS).read_text())
            for name in ("reference", "background")
        )
        shards = [name for name in kept if name.endswith(".distcp")]
        assert shards and all(kept[name] == written[name] for name in shards)


def test_a_writer_that_is_killed_stops_the_run(bench: Bench, reference: list[dict[str, Any]]) -> None:
    codes, output = bench.train("no writer", BACKGROUND, fault="no writer", rank=1, step=4)
    assert codes[1] == 1
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: ")]
    assert "iter_0000004' on rank 1 is gone (exit code -9)" in line
    assert bench.train("no writer", BACKGROUND)[0] == [0, 0]
    assert bench.steps("no writer") == reference


def stopped(codes: list[int]) -> bool:
    """Return whether the first rank failed, and the other with it or by the launcher."""
    return codes[0] == 1 and codes[1] in (1, -signal.SIGTERM, -signal.SIGKILL)


def truncate(file: Path) -> str:
    os.truncate(file, file.stat().st_size // 2)
    return "bytes"


def flip(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "has changed"


def delete(file: Path) -> str:
    file.unlink()
    return "is missing"


@pytest.fixture
def copied(bench: Bench, reference: Any, tmp_path: Path) -> Path:
    """The checkpoints of the run that nothing happened to, 4 and 6."""
    shutil.copytree(bench.checkpoints("reference"), tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("harm", [truncate, flip, delete])
@pytest.mark.parametrize("which", ["run_config.yaml", "train_state.pt", "shard"])
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(
    copied: Path, harm: Any, which: str, capfd: pytest.CaptureFixture[str]
) -> None:

    iteration = copied / "iter_0000006"
    file = iteration / (files_of(iteration)[0] if which == "shard" else which)
    words = harm(file)
    assert Checkpoint.open(copied).verify_contents().iteration.name == "iter_0000004"
    newest = latest_complete(copied)
    assert newest is not None and newest.name == "iter_0000004"
    output = capfd.readouterr().err
    assert "iter_0000006" in output and f"'{file.name}'" in output and words in output
    assert (copied / "damaged-iter_0000006").is_dir() and not iteration.exists()
    assert (copied / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert (copied / "latest_train_state.pt").read_bytes() == (newest / "train_state.pt").read_bytes()


def test_settings_and_weights_are_of_one_iteration(copied: Path) -> None:
    """Where a shard of the newest is damaged, both are the older one's, which may have other settings."""
    older, newest = copied / "iter_0000004", copied / "iter_0000006"
    config = older / "run_config.yaml"
    config.write_text(config.read_text().replace("mask_token_id: 1", "mask_token_id: 2"))
    (older / CHECKSUMS).unlink()
    flip(newest / files_of(newest)[0])
    checkpoint = Checkpoint.open(copied)
    provider = model_from(checkpoint)
    assert (checkpoint.iteration, provider.mask_token_id) == (newest, 1)
    assert load_model(checkpoint, provider=provider).provider.mask_token_id == 2


def test_no_silent_start_from_the_beginning(copied: Path) -> None:

    for iteration in iterations(copied):
        flip(iteration / "train_state.pt")
    with pytest.raises(UserError, match=r"iter_0000006'.*train_state.*iter_0000004'.*train_state"):
        latest_complete(copied)
    assert len(iterations(copied)) == 2  # nothing is renamed: the next start says the same
    with pytest.raises(UserError, match="iter_0000004"):
        latest_complete(copied, step=4)
    shutil.rmtree(copied / "iter_0000004")
    (copied / "iter_0000006").rename(copied / "damaged-iter_0000006")
    with pytest.raises(UserError, match="damaged-iter_0000006"):
        latest_complete(copied)


def test_only_an_unfinished_first_checkpoint_is_a_beginning(copied: Path) -> None:

    for iteration in iterations(copied):
        mark_of(iteration).touch()
    assert latest_complete(copied) is None
    assert not list(copied.glob("latest_*")) and not iterations(copied)
    assert latest_complete(copied) is None  # and again: what was set aside was never complete


def test_what_is_pruned_and_kept(tmp_path: Path) -> None:
    from nemodiff_train.resilience.checkpoints import prune

    for step in range(10, 80, 10):
        (tmp_path / f"iter_{step:07d}").mkdir()
    mark_of(tmp_path / "iter_0000070").touch()
    prune(tmp_path, 0, 0)
    assert len(iterations(tmp_path)) == 7
    prune(tmp_path, 2, 30)
    assert [int(folder.name[5:]) for folder in iterations(tmp_path)] == [70, 60, 50, 30]


@pytest.mark.parametrize("which", ["shard", "run_config.yaml"])
def test_a_damaged_newest_checkpoint_costs_one_interval(
    bench: Bench, reference: list[dict[str, Any]], which: str
) -> None:
    name = f"flipped {which}"
    shutil.copytree(bench.folder / "reference", bench.folder / name)
    iteration = bench.checkpoints(name) / "iter_0000006"
    flip(iteration / (files_of(iteration)[0] if which == "shard" else which))
    codes, output = bench.train(name)
    assert codes == [0, 0] and "has changed since it was saved" in output
    assert bench.steps(name) == reference


def test_generate_takes_the_newest_whole_checkpoint(
    bench: Bench, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flip(copied / "iter_0000006" / files_of(copied / "iter_0000006")[0])
    assert main(["generate", str(copied), "the", "--max-new-tokens", "4"]) == 0
    output = " ".join(capfd.readouterr().err.split())
    assert "iter_0000006' is damaged" in output and "iter_0000004" in output


@pytest.mark.parametrize("saving", ["checkpoint.async_save=false", BACKGROUND])
def test_a_full_disk_is_one_line_and_costs_nothing(
    bench: Bench, reference: list[dict[str, Any]], saving: str
) -> None:
    name = f"full {saving}"
    codes, output = bench.train(name, saving, fault="full disk", rank=1, step=4)
    assert stopped(codes)
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: ")]
    assert "iter_0000004" in line and "could not be saved" in line and "'iter_0000002' is intact" in line
    assert not (bench.checkpoints(name) / "iter_0000004").exists()
    assert bench.train(name, saving)[0] == [0, 0]
    assert bench.steps(name) == reference


@pytest.mark.parametrize("saving", ["checkpoint.async_save=false", BACKGROUND])
def test_a_folder_that_is_removed_costs_no_traceback(bench: Bench, saving: str) -> None:
    """What is saved later makes the folder again; what is being saved is lost with it, which is said."""
    codes, output = bench.train(f"removed {saving}", saving, fault="no folder", rank=0, step=3)
    assert "Traceback" not in output
    if saving == BACKGROUND:
        assert 1 in codes and "its folder was removed; repeat the command" in output
    else:
        assert codes == [0, 0] and Checkpoint.open(bench.checkpoints(f"removed {saving}")).verify_contents()


def test_a_disk_too_full_for_a_log_is_one_line(bench: Bench) -> None:
    (bench.folder / "no log").mkdir()
    (bench.folder / "no log" / "train.log").symlink_to("/dev/full")
    codes, output = bench.train("no log", world=1)
    assert codes == [1] and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: ")]
    assert f"the disk of '{bench.folder / 'no log'}' is full" in line


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_nan_on_one_rank_stops_every_rank_before_the_update(bench: Bench, layout: str) -> None:
    name = f"nan stop {layout}"
    sizes = ["model.tensor_model_parallel_size=2"] if layout == "tensor" else []
    codes, output = bench.train(name, *sizes, fault="nan", rank=1, step=3)
    assert stopped(codes)
    place = "stage 0, replica 1, tensor rank 0" if layout == "data" else "stage 0, replica 0, tensor rank 1"
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: ")]
    assert f"step 3: gradient not finite on rank 1 ({place})" in line and "resilience.on_non_finite=skip" in line
    assert [step["step"] for step in bench.steps(name)] == [1, 2]
    assert "Traceback" not in output


def test_a_skipped_update_changes_nothing(bench: Bench, reference: list[dict[str, Any]]) -> None:
    policy = ("resilience.on_non_finite=skip", "resilience.replica_check_interval=1")
    codes, output = bench.train("nan skip", *policy, fault="nan", rank=1, step=3)
    assert codes == [0, 0], output
    assert bench.train("skipped", "train.iterations_to_skip=[3]")[0] == [0, 0]
    found = bench.steps("nan skip")
    assert found[2]["grad_norm"] is None and found[2]["skipped/non_finite"] == 1
    assert found[:2] == reference[:2] and found[3:] == bench.steps("skipped")[2:]


SPIKES = ("resilience.spike_factor=10", "resilience.spike_window=2", "checkpoint.save_interval=3")


def test_a_spike_is_skipped(bench: Bench) -> None:
    codes, output = bench.train("spike skip", *SPIKES, fault="spike", rank=0, step=5)
    assert codes == [0, 0] and "step 5: gradient norm" in output
    assert bench.train("spike skipped", *SPIKES, "train.iterations_to_skip=[5]")[0] == [0, 0]
    assert bench.steps("spike skip")[5] == bench.steps("spike skipped")[4]


def test_a_rollback_is_as_if_the_steps_since_the_checkpoint_had_not_been(bench: Bench) -> None:
    """Also to a checkpoint that is still being written in the background."""
    assert bench.train("never trained", *SPIKES, "train.iterations_to_skip=[4,5]")[0] == [0, 0]
    for fault, saving in (("spike", "checkpoint.async_save=false"), ("spike while saving", BACKGROUND)):
        rollback = (*SPIKES, "resilience.on_spike=rollback", saving)
        codes, output = bench.train(fault, *rollback, fault=fault, rank=1, step=5)
        assert codes == [0, 0] and "rolled back to step 3" in output
        found = bench.steps(fault)
        assert [step["step"] for step in found] == list(range(1, STEPS + 1))
        assert found[5] == bench.steps("never trained")[3]


def test_a_rollback_needs_a_checkpoint(bench: Bench) -> None:
    codes, output = bench.train("no way back", "resilience.on_non_finite=rollback", fault="nan", rank=0, step=1)
    assert stopped(codes) and "no checkpoint to roll back to" in output and "resilience.on_non_finite=skip" in output


def test_too_many_consecutive_skips_stop_the_run(bench: Bench) -> None:
    codes, output = bench.train(
        "skips", "resilience.on_non_finite=skip", "resilience.max_consecutive_skips=0", fault="nan", step=3
    )
    assert stopped(codes) and "resilience.max_consecutive_skips" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_ends_with_0(bench: Bench, number: int) -> None:
    name = f"signal {number}"
    long = ("train.train_iters=100000", "checkpoint.save_interval=100000")
    world = bench.start(name, *long)
    assert bench.ranks.wait(world, during=once_trained(bench.folder / name, 3, rank=1, number=number)) == [0, 0]
    last = bench.steps(name)[-1]["step"]
    assert Checkpoint.open(bench.checkpoints(name)).verify_contents().iteration.name == f"iter_{last:07d}"
    assert f"stopped after step {last}" in world.output() and "Traceback" not in world.output()
    (start,) = json.loads((bench.folder / name / "restarts.json").read_text())
    assert start["ended"] == "terminated"
    status = json.loads((bench.folder / name / "status.json").read_text())
    assert status["step"] == last and status["phase"] == "ended"


def once_trained(output: Path, steps: int, rank: int, number: int) -> Any:
    """Return a function that signals a rank as soon as a number of steps is recorded."""
    sent: list[int] = []

    def watch(world: World) -> None:
        metrics = output / "metrics.jsonl"
        if not sent and metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
            sent.append(number)
            world.send(rank, number)

    return watch


def test_a_signal_to_every_process_of_a_step_saves(bench: Bench) -> None:
    """As a scheduler sends it: those that write the checkpoints get it too, and write the last one."""
    long = ("train.train_iters=100000", "checkpoint.save_interval=2", BACKGROUND)
    sent: list[int] = []

    def to_all(world: World) -> None:
        if not sent and iterations(bench.checkpoints("step")):
            helpers = [child.pid for pid in world.pids for child in psutil.Process(pid).children(recursive=True)]
            sent.extend(helpers)
            for pid in (*helpers, *world.pids):
                os.kill(pid, signal.SIGTERM)

    world = bench.start("step", *long)
    assert bench.ranks.wait(world, during=to_all) == [0, 0], world.output()
    assert len(sent) >= 2 * len(world.pids)  # of each rank, what writes, and what holds the results
    last = bench.steps("step")[-1]["step"]
    assert Checkpoint.open(bench.checkpoints("step")).verify_contents().iteration.name == f"iter_{last:07d}"
    assert "Traceback" not in world.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_is_no_failed_start(bench: Bench, number: int) -> None:
    """The ranks wait for each other in set-up; what tells them to end is told to both."""
    name = f"early {number}"
    world = bench.start(name, "resilience.restarts=1", fault="hang in set-up", rank=1)
    sent: list[int] = []

    def once_it_hangs(world: World) -> None:
        if not sent and faults.HANGS in world.output() and (bench.folder / name / "status.json").exists():
            sent.append(number)
            for rank in (0, 1):
                world.send(rank, number)

    code = 130 if number == signal.SIGINT else 0
    codes = bench.ranks.wait(world, during=once_it_hangs)
    assert codes[1] == code and codes[0] in (0, code)  # the first rank may be in a collective, and be ended
    assert "before the first step" in world.output() and "Traceback" not in world.output()
    (start,) = json.loads((bench.folder / name / "restarts.json").read_text())
    assert start["ended"] == "terminated"


def test_a_signal_between_setup_and_the_first_step(bench: Bench) -> None:
    """One rank is still in set-up, where it may leave, when the other is about to begin the step."""
    world = bench.start("handover", "resilience.restarts=1", fault="told at the last moment", rank=1)

    def once_it_waits(world: World) -> None:
        if faults.HANGS in world.output() and "handover" not in sent:
            sent.append("handover")
            world.send(0, signal.SIGTERM)

    sent: list[str] = []
    assert bench.ranks.wait(world, during=once_it_waits) == [0, 0]
    assert "before the first step" in world.output() and "Traceback" not in world.output()


def test_a_rank_that_stands_still_in_setup_is_noticed(bench: Bench) -> None:
    codes, output = bench.train("standing", "resilience.setup_timeout=8", fault="hang in set-up", rank=1)
    assert 1 in codes  # the clock of the other may have begun later: it is told to end
    rank = codes.index(1)
    assert f"rank {rank}: no progress for 8 s, in step 1 (setup)" in output
    stacks = (bench.folder / "standing" / "stacks" / f"rank_{rank}.txt").read_text()
    assert "in step 1 (setup), at " in stacks and "nemodiff_train/training/run.py" in stacks


def test_a_second_interrupt_ends_at_once(bench: Bench) -> None:
    world = bench.start("twice", "resilience.hang_timeout=0", fault="hang", rank=1, step=3)

    def interrupt(world: World) -> None:
        if faults.HANGS in world.output():
            world.send(0, signal.SIGINT)

    assert bench.ranks.wait(world, during=interrupt)[0] == 130
    assert "Ctrl-C again ends at once" in world.output() and "Traceback" not in world.output().partition("rank1")[0]


def test_two_starts_of_one_run(bench: Bench) -> None:
    """The second is refused, and the first goes on as if nothing had been; the lock ends with its process."""
    long = ("train.train_iters=100000", "checkpoint.save_interval=100000")
    refused: list[tuple[list[int], str]] = []

    def start_again(world: World) -> None:
        if not refused and (bench.folder / "once" / "metrics.jsonl").exists():
            second = bench.start("once", *long, world=1, log="again")
            refused.append((bench.ranks.wait(second), second.output()))
            world.send_all(signal.SIGKILL)

    first = bench.start("once", *long, world=1)
    assert bench.ranks.wait(first, during=start_again) == [-signal.SIGKILL]
    ((codes, output),) = refused
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: error")]
    assert codes == [2] and "is being written by process" in line
    assert bench.train("once", world=1)[0] == [0]


def test_a_hanging_rank_leaves_every_ranks_stacks(bench: Bench) -> None:
    codes, output = bench.train("hang", "resilience.hang_timeout=8", fault="hang", rank=1, step=3)
    assert codes == [1, 1]
    stacks = [(bench.folder / "hang" / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("no progress for 8 s, in step 3 (step)" in stack for stack in stacks)
    assert "faults.py" in stacks[1] and "finish_grad_sync" in stacks[0]
    (start,) = json.loads((bench.folder / "hang" / "restarts.json").read_text())
    assert "no progress" in start["ended"] and "rank_1.txt" in output


def test_a_signal_ends_a_rank_that_hangs(bench: Bench) -> None:
    name = "hang and signal"
    settings = ("resilience.hang_timeout=0", "resilience.exit_grace=1")
    world = bench.start(name, *settings, fault="hang", rank=1, step=3)

    def when_it_hangs(world: World) -> None:
        if faults.HANGS in world.output():
            world.send(0, signal.SIGTERM)

    assert bench.ranks.wait(world, during=when_it_hangs)[0] == 1
    assert "not ended 1 s after the signal" in (bench.folder / name / "stacks" / "rank_0.txt").read_text()


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_a_flipped_bit_of_a_replica_is_found(bench: Bench, layout: str) -> None:
    more = ["model.tensor_model_parallel_size=2"] if layout == "tensor" else []
    name = f"drift {layout}"
    codes, output = bench.train(name, *more, "resilience.replica_check_interval=1", fault="flip", rank=1, step=3)
    assert stopped(codes), output
    assert "step 3: replicas of 'decoder.final_layernorm.weight' differ: rank 0 and rank 1" in output


@pytest.mark.parametrize("layout", ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"])
def test_no_drift_where_nothing_drifts(bench: Bench, layout: str) -> None:
    name = f"steady {layout.partition('_')[0]}"
    assert bench.train(name, layout, "resilience.replica_check_interval=1")[0] == [0, 0]


SHARDED = (*layouts.SHARDED, "checkpoint.dist_ckpt_optim_fully_reshardable=true")
JOURNEYS: dict[str, list[tuple[int, tuple[str, ...]]]] = {
    "tp2_pp2_one": [(2, (*layouts.TP2,)), (2, (*layouts.PP2,)), (1, ())],
    "one_cp2_dp2": [(1, ()), (2, (*layouts.CP2,)), (2, ())],
    "sharded_tp2_dp2_pp2": [
        (2, (*layouts.TP2, *SHARDED, BACKGROUND)),
        (2, (*SHARDED, BACKGROUND)),
        (2, (*layouts.PP2, *SHARDED)),
    ],
    "sharded_dp2_sp2pp2_one": [
        (2, SHARDED),
        (4, (*layouts.SP2, *layouts.PP2, *SHARDED)),
        (1, SHARDED),
    ],
}
"""Ranks and settings of the three starts of a run, two steps each."""


@pytest.fixture(scope="module")
def alone(bench: Bench) -> list[dict[str, Any]]:
    """The steps of an uninterrupted run on one rank."""
    assert bench.train("alone", world=1)[0] == [0]
    return bench.steps("alone")


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_run_goes_on_under_other_layouts(bench: Bench, alone: list[dict[str, Any]], journey: str) -> None:
    for world, settings in JOURNEYS[journey]:
        codes, output = bench.train(journey, "train.exit_interval=2", *settings, world=world)
        assert codes == [0] * world, output
    found = bench.steps(journey)
    assert len(found) == len(alone) == STEPS
    for mine, expected in zip(found, alone, strict=True):
        assert mine == pytest.approx(expected, rel=layouts.TOLERANCE)


def test_recipes_save_for_any_layout() -> None:
    assert checkpoints("runs/a", None, every=10).dist_ckpt_optim_fully_reshardable


@pytest.mark.parametrize(
    ("before", "after", "needles"),
    [
        (
            (*layouts.TP2, *layouts.SHARDED),
            (*layouts.PP2, *layouts.SHARDED),
            ["tensor_model", "fully_reshardable=true", "start_from="],
        ),
        (SHARDED, (), ["optimizer.use_distributed_optimizer=true", "output=NEW"]),
        ((), SHARDED, ["optimizer.use_distributed_optimizer=false", "output=NEW"]),
    ],
    ids=["not_reshardable", "sharded_then_plain", "plain_then_sharded"],
)
def test_what_cannot_go_on_is_refused(
    bench: Bench, before: tuple[str, ...], after: tuple[str, ...], needles: list[str]
) -> None:
    name = f"refused {needles[0]}"
    assert bench.train(name, "train.exit_interval=2", *before)[0] == [0, 0]
    codes, output = bench.train(name, *after)
    assert codes == [2, -signal.SIGTERM], output
    (line,) = [line for line in output.splitlines() if line.startswith("nemodiff: error: ")]
    assert "iter_0000002" in line and all(needle in line for needle in needles)
    assert "Traceback" not in output
    assert len(bench.steps(name)) == 2  # nothing is written, and the first way still goes on
    assert bench.train(name, *before)[0] == [0, 0]


def test_starts_without_progress_end(bench: Bench) -> None:
    limit = "resilience.restarts=2"
    for start in range(2):
        codes, output = bench.train("loop", limit, world=1, fault="crash", step=3)
        assert codes == [1], (start, output)
    # Both ended after the checkpoint of step 2: the first made progress, so one more may fail.
    assert bench.train("loop", limit, world=1, fault="crash", step=3)[0] == [1]
    codes, output = bench.train("loop", limit, world=1)
    assert codes == [1] and "the last 2 starts resumed from step 2" in output and "out of luck" in output
    (bench.folder / "loop" / "restarts.json").unlink()
    assert bench.train("loop", limit, world=1)[0] == [0]


def test_metrics_are_cut_where_a_resume_begins(tmp_path: Path) -> None:
    from nemodiff_train.resilience.gradient_guard import recorded_norms
    from nemodiff_train.training.callbacks.run_log import drop_after

    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "grad_norm": step / 3 if step != 2 else None}) for step in range(1, 7)]
    file.write_text("\n".join(lines) + '\n{"step": 7, "gra')
    drop_after(file, 9)
    assert file.read_text().splitlines() == lines
    drop_after(file, 4)
    assert file.read_text() == "\n".join(lines[:4]) + "\n"
    assert recorded_norms(file, 2) == [3 / 3, 4 / 3]


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"on_spike": "ignore"}, "on_spike"),
        ({"spike_factor": 0.5}, "spike_factor"),
        ({"spike_window": 1}, "spike_window"),
        ({"exit_grace": 0}, "exit_grace"),
        ({"hang_timeout": -1}, "hang_timeout"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], output: str) -> None:
    (line,) = section_problems("resilience", ResilienceConfig(**changes))
    assert output in line


def test_every_published_file_has_a_checksum(bench: Bench, reference: Any) -> None:
    iteration = Checkpoint.open(bench.checkpoints("reference")).iteration
    entries = json.loads((iteration / CHECKSUMS).read_text())
    assert sorted(entries) == sorted(files_of(iteration))
    assert any(name.endswith(".distcp") for name in entries)


def test_no_process_is_left(bench: Bench) -> None:
    """What writes the checkpoints of a rank ends with it, whatever has ended the rank."""
    end = time.monotonic() + 60
    while (left := bench.ranks.processes()) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
