"""The batch scripts on a real SLURM of one node: preemption, requeueing, arrays and dependencies.

Skipped where SLURM and MUNGE are not installed; docs/cluster.md says how to run it.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemodiff_train.data.manifest import Manifest
from tests import small
from tests.cluster import cluster, missing
from tests.prepared import TEXTS, digests, run, write_jsonl

ROOT = Path(__file__).parents[1]
STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no SLURM here: {', '.join(missing())} missing")


class Site:
    """A working folder on the cluster, and SLURM's commands in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        own = {"PYTHONPATH": str(ROOT), "WORK": str(folder), "VENV": sys.prefix, "GPUS_PER_NODE": "2"}
        self._environment = {**environment, **own, "OMP_NUM_THREADS": "1", "SCRIPTS": str(ROOT / "slurm")}
        for name in [name for name in self._environment if name.startswith("PYTEST_")]:
            del self._environment[name]

    def __call__(self, *words: object) -> str:
        """Run a command in the folder; returns its output."""
        done = subprocess.run(
            list(map(str, words)), cwd=self.folder, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def launch(self, output: str, *settings: str) -> int:
        """Submit the recipe as ``nemodiff launch`` does; returns the job."""
        words = [f"output={output}", f"train.train_iters={STEPS}", *settings]
        program = (sys.executable, "-m", "nemodiff_train")
        told = self(*program, "launch", "recipe.py", *words, "--slurm", "--time", "1:00:00", "--name", output)
        return int(told.rpartition(" ")[2])

    def state(self, job: int | str) -> str:
        """Such as RUNNING, PENDING or COMPLETED."""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def restarts(self, job: int) -> int:
        """How often a job was put back into the queue."""
        found = re.search(r"Restarts=(\d+)", self("scontrol", "show", "job", job))
        assert found is not None
        return int(found[1])

    def wait(self, happened: Callable[[], bool], *logs: str, seconds: int = 900) -> None:
        """Until something is so; fails with the logs of the jobs."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, [
                path.read_text()[-4000:] for log in logs for path in self.folder.glob(f"{log}*.log")
            ]
            time.sleep(0.2)

    def lines(self, output: str) -> list[dict[str, float]]:
        """What a run has told so far, repeated steps included."""
        path = self.folder / output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("work")
    small.qwen3(folder / "model")
    small.data(folder / "data")
    (folder / "recipe.py").write_text(
        "from tests import small\n\n\n"
        "def recipe(output):\n"
        "    config = small.recipe('model', 'data', output, seq_length=256)\n"
        "    config.checkpoint.save_interval = 5\n"
        "    return config\n"
    )
    with cluster() as environment:
        yield Site(folder, environment)


TOLD = ("loss", "ar loss", "diffusion loss", "masked share", "gradient norm")


def losses(lines: list[dict[str, float]]) -> dict[int, list[float]]:
    """Of every step, as the last start told them."""
    return {int(line["step"]): [line[name] for name in TOLD] for line in lines}


def test_preempted_training_ends_as_if_it_had_not_been(site: Site) -> None:
    job = site.launch("preempted")
    site.wait(lambda: len(losses(site.lines("preempted"))) >= 3, "preempted")
    site("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends before the time limit
    site.wait(lambda: site.restarts(job) == 1 or site.state(job) in ENDED, "preempted")
    stopped = max(losses(site.lines("preempted")))
    assert stopped < STEPS, "the run was over before it was preempted"

    site.wait(lambda: max(losses(site.lines("preempted"))) >= stopped + 8, "preempted")
    site("scontrol", "requeue", job)  # what preemption does
    site.wait(lambda: site.state(job) == "PENDING", "preempted")
    assert max(losses(site.lines("preempted"))) < STEPS, "the run was over before it was put back into the queue"
    site.wait(lambda: site.state(job) in ENDED, "preempted")
    assert (site.state(job), site.restarts(job) >= 2) == ("COMPLETED", True)

    whole = site.launch("whole")
    site.wait(lambda: site.state(whole) in ENDED, "whole")
    assert (site.state(whole), site.restarts(whole)) == ("COMPLETED", 0)
    found, expected = (losses(site.lines(name)) for name in ("preempted", "whole"))
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert found == expected


def test_array_is_merged(site: Site) -> None:
    folder = site.folder / "corpus"
    folder.mkdir()
    for number, start in enumerate(range(0, len(TEXTS), 100)):
        write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in TEXTS[start : start + 100]])
    job = site(ROOT / "slurm" / "data.sh", "corpus", "model", "prepared", "--time=10")
    site.wait(lambda: site.state(job) in ENDED, "nemodiff")
    assert site.state(job) == "COMPLETED"
    assert run(folder, str(site.folder / "model"), site.folder / "once") == 0
    found, expected = (digests(site.folder / name) for name in ("prepared", "once"))
    assert {**found, ".json": ""} == {**expected, ".json": ""}  # the manifests name other inputs
    manifest = Manifest.read(str(site.folder / "prepared"))
    assert manifest is not None
    assert [source.path for source in manifest.inputs] == [f"corpus/{number}.jsonl" for number in range(3)]


def test_chain_stops_where_a_job_fails(site: Site) -> None:
    inspected = {"first": "prepared", "bad": "nothing", "never": "prepared"}
    lines = [f"--job-name={name} slurm/task.sbatch data inspect {data}" for name, data in inspected.items()]
    (site.folder / "chain").write_text("# a chain\n\n" + "\n".join(lines))
    (site.folder / "slurm").symlink_to(ROOT / "slurm")
    jobs = [line.split()[0] for line in site(ROOT / "slurm" / "chain.sh", "chain").splitlines()]
    site.wait(lambda: all(site.state(job) in ENDED for job in jobs), "first", "bad")
    assert [site.state(job) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert "no such manifest" in (site.folder / f"bad-{jobs[1]}.log").read_text()
