"""The batch scripts on a real SLURM of one node: preemption, requeueing, arrays and dependencies.

Skipped where SLURM and MUNGE are not installed; docs/cluster.md says how to run it.
"""

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
        """Run a command in the folder; return its output."""
        done = subprocess.run(
            list(map(str, words)), cwd=self.folder, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def launch(self, output: str, *settings: str) -> int:
        """Submit the recipe with ``nemodiff launch``; return the job."""
        words = [f"output={output}", f"train.train_iters={STEPS}", *settings]
        program = (sys.executable, "-m", "nemodiff_train")
        printed = self(*program, "launch", "recipe.py", *words, "--slurm", "--time", "1:00:00", "--name", output)
        return int(printed.rpartition(" ")[2])

    def state(self, job: int | str) -> str:
        """Return the state of a job, such as RUNNING, PENDING or COMPLETED."""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def restarts(self, job: int) -> int:
        """Return how often a job was put back into the queue."""
        found = re.search(r"Restarts=(\d+)", self("scontrol", "show", "job", job))
        assert found is not None
        return int(found[1])

    def wait(self, happened: Callable[[], bool], *names: str, job: int | str = "", seconds: int = 900) -> None:
        """Wait until something has happened; fail with the logs.

        Args:
            happened: Returns whether it has.
            names: Names of the jobs whose logs are shown.
            job: Fail as soon as this job has ended and nothing has happened.
            seconds: Fail after this time.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            over = bool(job) and self.state(job) in ENDED and not happened()
            assert time.monotonic() < deadline and not over, self.logs(*names)
            time.sleep(0.2)

    def finish(self, job: int | str, name: str, state: str = "COMPLETED") -> None:
        """Wait for the end of a job, in a state."""
        self.wait(lambda: self.state(job) in ENDED, name)
        assert self.state(job) == state, self.logs(name)

    def logs(self, *names: str) -> str:
        """Return the ends of the jobs' logs."""
        found = [path for name in names for path in sorted(self.folder.glob(f"{name}*.log"))]
        return "\n".join(f"{path.name}:\n{path.read_text()[-4000:]}" for path in found)

    def lines(self, output: str) -> list[dict[str, float]]:
        """Return the figures that a run has recorded so far, repeated steps included."""
        folder = self.folder / output
        return small.figures(folder) if (folder / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("it's a place")  # what a shell would take apart
    small.qwen3(folder / "model")
    small.data(folder / "data")
    (folder / "recipe.py").write_text(
        "from tests import small\n\n\n"
        "def recipe(output):\n"
        "    config = small.recipe('model', 'data', output, seq_length=256)\n"
        "    config.checkpoint.save_interval = 5\n"
        "    config.diagnostics.loss_interval = 1\n"  # figures over several steps would lack those before a stop
        "    return config\n"
    )
    (folder / "slurm").symlink_to(ROOT / "slurm")
    with cluster() as environment:
        yield Site(folder, environment)


def figures(lines: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Return the figures of every step, as the last start recorded them."""
    return {int(line["step"]): line for line in lines}


def test_preempted_training_ends_as_if_it_had_not_been(site: Site) -> None:
    def trained() -> int:
        return max(figures(site.lines("preempted")), default=0)

    job = site.launch("preempted")
    site.wait(lambda: trained() >= 3, "preempted", job=job)
    site("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends before the time limit
    site.wait(lambda: site.restarts(job) == 1, "preempted", job=job)
    stopped = trained()
    assert stopped < STEPS, "the run was over before it was preempted"

    site.wait(lambda: trained() >= stopped + 8, "preempted", job=job)
    site("scontrol", "requeue", job)  # what preemption does
    site.wait(lambda: site.state(job) == "PENDING", "preempted")
    assert trained() < STEPS, "the run was over before it was put back into the queue"
    site.finish(job, "preempted")
    assert site.restarts(job) >= 2

    whole = site.launch("whole")
    site.finish(whole, "whole")
    assert site.restarts(whole) == 0
    found, expected = (figures(site.lines(name)) for name in ("preempted", "whole"))
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert {"loss", "ar_loss", "diffusion_loss", "masked_fraction", "grad_norm"} <= set(expected[STEPS])
    assert found == expected


def test_array_is_merged(site: Site) -> None:
    folder = site.folder / "corpus"
    folder.mkdir()
    for number, start in enumerate(range(0, len(TEXTS), 100)):
        write_jsonl(folder / f"{number}.jsonl", [{"text": text} for text in TEXTS[start : start + 100]])
    job = site(ROOT / "slurm" / "data.sh", "corpus", "model", "prepared", "--time=10")
    site.finish(job, "nemodiff")
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
    jobs = [line.split()[0] for line in site(ROOT / "slurm" / "chain.sh", "chain").splitlines()]
    site.wait(lambda: all(site.state(job) in ENDED for job in jobs), "first", "bad")
    assert [site.state(job) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert "no such manifest" in (site.folder / f"bad-{jobs[1]}.log").read_text()


SMALLER = {
    "models/ministral-8b": "model",
    "data/corpus": "data",
    "--nodes=4 --time=1-00": "--nodes=1 --time=10",
    "--gpus=1 ": "",
    "ministral3_8b_joint": "joint.py",
    "train.sbatch drafter": "train.sbatch drafter.py",
    "--task gsm8k": "--task task.jsonl --max-new-tokens 8",
}
"""Parts of the documented chain, and what replaces them on a small machine."""
PAGES = {
    "joint": "config = small.recipe(start_from, data, output)",
    "drafter": "config = small.drafter(start_from, data, output)",
}


def test_chain_of_the_documentation(site: Site) -> None:
    """Conversion, training, evaluation, drafter and export, in the order of docs/cluster.md."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    chain = text[text.index("# from a published model") :].partition("```")[0]
    for large, little in SMALLER.items():
        assert large in chain, f"docs/cluster.md has no '{large}' any more"
        chain = chain.replace(large, little)
    (site.folder / "whole-chain").write_text(chain)
    (site.folder / "task.jsonl").write_text('{"prompt": "the quick", "answer": "1"}\n' * 2)
    for name, line in PAGES.items():
        (site.folder / f"{name}.py").write_text(
            "from tests import small\n\n\n"
            "def recipe(start_from, data, output):\n"
            f"    {line}\n"
            "    config.train.train_iters = 2\n"
            "    return config\n"
        )
    jobs = [line.split()[0] for line in site(ROOT / "slurm" / "chain.sh", "whole-chain").splitlines()]
    assert len(jobs) == 5
    for job in jobs:
        site.finish(job, f"nemodiff*-{job}")
    assert (site.folder / "runs" / "joint" / "gsm8k" / "report.html").is_file()
    assert any((site.folder / "runs" / "drafter" / "checkpoints").glob("iter_*"))
    assert (site.folder / "models" / "tri-mode" / "config.json").is_file()
