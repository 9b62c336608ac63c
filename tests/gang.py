"""One gang of processes for every test that needs several.

Importing Bridge takes about 20 seconds a process, so the processes are started once; each takes the
jobs it has a rank in, one after another, and starts and ends the process groups of each by itself.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemodiff_train.distributed import free_port

SIZE = 4


@dataclass
class Job:
    """A function to run on the first ``world`` processes of the gang."""

    name: str
    world: int
    function: str
    """``module:function`` under tests/."""
    arguments: dict[str, Any] = field(default_factory=dict)


def run(jobs: list[Job], folder: Path) -> dict[str, Any]:
    """Run jobs in order and return what rank 0 of each returned, by name.

    A job that raised returns ``{"error": traceback}``; the others still run.
    """
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gang", str(folder), str(rank)],
            env=environment,
            stdout=(folder / f"rank{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(max(job.world for job in jobs))
    ]
    for process in processes:
        process.wait(timeout=1400)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    missing = [job.name for job in jobs if job.name not in results]
    assert not missing, f"jobs without a result: {missing}; see {folder}/rank*.log"
    return results


def _rendezvous(folder: Path, name: str, rank: int) -> str:
    """The port rank 0 chose for a job, told to the others through a file."""
    path = folder / f"port-{name}"
    if rank == 0:
        temporary = path.with_suffix(".new")
        temporary.write_text(str(free_port()))
        temporary.rename(path)
    while not path.exists():
        time.sleep(0.02)
    return path.read_text()


def _take_part(job: dict[str, Any], folder: Path, rank: int) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job["world"]),
        LOCAL_WORLD_SIZE=str(job["world"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=_rendezvous(folder, job["name"], rank),
    )
    module, function = job["function"].split(":")
    try:
        result = getattr(importlib.import_module(f"tests.{module}"), function)(**job["arguments"])
    except BaseException:
        result = {"error": traceback.format_exc()}
        print(result["error"], flush=True)
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    if rank == 0:
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{job['name']}.json").write_text(json.dumps(result))


def main() -> None:
    """One process of the gang."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    for job in json.loads((folder / "jobs.json").read_text()):
        if rank < job["world"]:
            _take_part(job, folder, rank)


if __name__ == "__main__":  # checkpoint saving spawns a process that imports this file again
    main()
