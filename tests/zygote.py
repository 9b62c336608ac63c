"""Gangs that start at once: one process imports Bridge, and forks the ranks of every gang.

A gang is kept as torchrun keeps one: when a rank fails, the others are ended.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

from nemodiff_train.distributed import free_port

GRACE = 1.0  # seconds between SIGTERM and SIGKILL for the ranks that are left


class Gang:
    """The ranks of one job."""

    def __init__(self, name: str, pids: list[int], log: Path) -> None:
        self.name = name
        self.pids = pids
        self.log = log
        self.codes: dict[int, int] = {}
        """Exit codes by rank; minus the signal's number for one that was killed."""

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank that is still there."""
        with contextlib.suppress(ProcessLookupError):
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def said(self) -> str:
        """What all ranks have written."""
        return "".join(file.read_text() for file in sorted(self.log.glob(f"{self.name}.rank*.log")))


class Zygote:
    """The process that forks; a context manager.

    Args:
        folder: Logs of the gangs, ``NAME.rankK.log``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gangs: dict[int, tuple[Gang, int]] = {}
        self.started: queue.Queue[list[int]] = queue.Queue()
        self.lock = threading.Condition()

    def __enter__(self) -> "Zygote":
        self.folder.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(self.folder.absolute())],
            env=environment,
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "zygote.log").open("w"),
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for gang, rank in list(self.gangs.values()):
            gang.send(rank, signal.SIGKILL)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def start(self, name: str, world: int, function: str, **arguments: Any) -> Gang:
        """Fork a gang; every rank calls ``module:function`` of tests/ and exits with what that returns."""
        assert self.process.stdin is not None
        job = {"name": name, "world": world, "function": function, "arguments": arguments}
        with self.lock:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            pids = self.started.get(timeout=300)
            gang = Gang(name, pids, self.folder)
            self.gangs.update({pid: (gang, rank) for rank, pid in enumerate(pids)})
        return gang

    def wait(self, gang: Gang, timeout: float = 120.0, during: Callable[[Gang], None] | None = None) -> list[int]:
        """Wait for a gang, and end what is left of it when a rank has failed.

        Args:
            gang: Of :meth:`start`.
            timeout: Seconds.
            during: Called again and again while the gang runs.

        Returns:
            Exit codes by rank.
        """
        end, failed_at = time.monotonic() + timeout, 0.0
        while len(gang.codes) < len(gang.pids):
            if during is not None:
                during(gang)
            now = time.monotonic()
            if any(gang.codes.values()) and not failed_at:
                failed_at = now
                self._signal_rest(gang, signal.SIGTERM)
            if now > end or (failed_at and now > failed_at + GRACE):
                self._signal_rest(gang, signal.SIGKILL)
            assert now < end + 30, f"gang '{gang.name}' did not end; see {self.folder}"
            time.sleep(0.01)
        assert time.monotonic() < end, f"gang '{gang.name}' took more than {timeout:g} s; see {self.folder}"
        return [gang.codes[rank] for rank in range(len(gang.pids))]

    def run(self, name: str, world: int, function: str, **arguments: Any) -> tuple[list[int], str]:
        """Start and wait; exit codes by rank, and what the ranks said."""
        gang = self.start(name, world, function, **arguments)
        codes = self.wait(gang)
        return codes, gang.said()

    def _signal_rest(self, gang: Gang, number: int) -> None:
        for rank in range(len(gang.pids)):
            gang.send(rank, number)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            if "pids" in told:
                self.started.put(told["pids"])
                continue
            with self.lock:
                gang, rank = self.gangs.pop(told["pid"])
            gang.codes[rank] = told["code"]


def _serve(folder: Path) -> None:
    """Fork gangs as asked on standard input, and tell of their ends on standard output."""
    ranks: set[int] = set()
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    pending = ""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            read = os.read(0, 1 << 16).decode()
            if not read:
                return
            pending += read
            *lines, pending = pending.split("\n")
            for line in lines:
                job = json.loads(line)
                port = str(free_port())
                pids = [_fork(job, folder, rank, port, said) for rank in range(job["world"])]
                ranks |= set(pids)
                print(json.dumps({"pids": pids}), file=said, flush=True)
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.discard(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # its helper for saving, which a killed rank leaves behind
                print(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}), file=said, flush=True)


def _fork(job: dict[str, Any], folder: Path, rank: int, port: str, said: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        said.close()
        os.setpgid(0, 0)
        log = os.open(folder / f"{job['name']}.rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        world = str(job["world"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        _fork_helper_for_saving()
        module, function = job["function"].split(":")
        code = getattr(importlib.import_module(f"tests.{module}"), function)(**job["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_helper_for_saving() -> None:
    """Megatron starts processes for its saves and their results, which would import torch anew; a fork has it."""
    import torch
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    fork: Any = torch.multiprocessing.get_context("fork")
    setattr(async_utils, "mp", SimpleNamespace(get_context=lambda mode: fork))  # noqa: B010
    manager: Any = fork.Manager()
    setattr(filesystem_async, "_results_queue", manager.Queue())  # noqa: B010


def main() -> None:
    """The process that forks."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    import torch

    torch.set_num_threads(1)
    for module in ("training.run", "validation.dry_run", "config.recipes", "drafter.step"):
        importlib.import_module(f"nemodiff_train.{module}")
    importlib.import_module("tests.faults")
    importlib.import_module("megatron.bridge.training.pretrain")
    for module in ("transformers", "hydra", "megatron.bridge.training.utils.omegaconf_utils", "tensorboard"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported stays as it is in every fork
    _serve(Path(sys.argv[1]))


if __name__ == "__main__":  # checkpoint saving spawns a process that imports this file again
    main()
