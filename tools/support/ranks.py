"""Run functions on several ranks that start at once: one process imports Bridge and forks the ranks of every job.

Importing Bridge is most of what a short job would take; a fork has it already. A job is kept as torchrun keeps one:
when a rank fails, the others are ended.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, TextIO

import psutil

from nemodiff_train.distributed import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL for the ranks that outlive a failed one."""

PRELOADED = (
    "antlr4.LL1Analyzer",
    "hydra",
    "megatron.bridge.models.mla_provider",
    "megatron.bridge.models.qwen.qwen3_bridge",
    "megatron.bridge.training.pretrain",
    "megatron.bridge.training.utils.omegaconf_utils",
    "megatron.core.datasets.helpers",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.tokenizers.text.models",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.serialization",
    "torch.utils.tensorboard",
    "transformers.models.ministral3.modeling_ministral3",
    "transformers.models.qwen3.modeling_qwen3",
)
"""Modules that jobs import late, besides those of the package."""
NOT_PRELOADED = ("__main__", "lm_eval")
"""Ends of the names of modules of the package that no job needs."""


class RankError(Exception):
    """A job of which a rank failed; the message ends with what the ranks printed last."""


class World:
    """The ranks of one running job."""

    def __init__(self, name: str, pids: list[int], logs: Path) -> None:
        self.name = name
        self.pids = pids
        self.logs = logs
        self.codes: dict[int, int] = {}
        """Exit codes by rank; a rank killed by a signal has minus its number."""

    def send(self, rank: int, signal_number: int) -> None:
        """Send a signal to a rank, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if rank not in self.codes:
                os.kill(self.pids[rank], signal_number)

    def send_all(self, signal_number: int) -> None:
        """Send a signal to every rank that has not ended."""
        for rank in range(len(self.pids)):
            self.send(rank, signal_number)

    def output(self) -> str:
        """Return everything that the ranks have printed, rank by rank."""
        return "".join(_log_file(self.logs, self.name, rank).read_text() for rank in range(len(self.pids)))

    def result(self) -> Any:
        """Return what the function returned on rank 0."""
        return json.loads(_result_file(self.logs, self.name).read_text())


class RankPool:
    """The process that forks ranks; a context manager.

    Args:
        logs: Folder for the logs of jobs that name no other, ``JOB.rankN.log``, and for the pool's own log.
        packages: Folders of packages that are to be found as if they were installed.
    """

    def __init__(self, logs: Path, packages: Sequence[Path] = ()) -> None:
        self.logs = logs.absolute()
        self._path = os.pathsep.join(map(str, (ROOT, *packages)))
        self._running: dict[int, tuple[World, int]] = {}
        self._started: queue.Queue[list[int]] = queue.Queue()
        self._lock = threading.Lock()

    def __enter__(self) -> "RankPool":
        self.logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": self._path, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.support.ranks"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.logs / "pool.log").open("w"),
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for world, rank in list(self._running.values()):
            world.send(rank, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def start(
        self, name: str, world_size: int, function: Callable[..., Any], *, logs: Path | None = None, **arguments: Any
    ) -> World:
        """Fork the ranks of a job, each of which calls a function.

        Args:
            name: Name of the job's logs; unique in their folder.
            world_size: Number of ranks.
            function: Function of a module; what it returns on rank 0 has to be JSON.
            logs: Folder for the logs; None for the pool's.
            **arguments: Arguments of the function, as JSON.
        """
        assert self._process.stdin is not None
        logs = (logs or self.logs).absolute()
        logs.mkdir(parents=True, exist_ok=True)
        job = _Job(name, world_size, f"{function.__module__}:{function.__name__}", arguments, str(logs))
        with self._lock:
            print(json.dumps(vars(job)), file=self._process.stdin, flush=True)
            pids = self._started.get(timeout=300)
            world = World(name, pids, logs)
            self._running.update({pid: (world, rank) for rank, pid in enumerate(pids)})
        return world

    def wait(self, world: World, timeout: float = 300.0, during: Callable[[World], None] | None = None) -> list[int]:
        """Wait for a job, and end what is left of it when a rank has failed.

        Args:
            world: Job returned by :meth:`start`.
            timeout: Seconds after which the job is killed and the wait fails.
            during: Called every 10 ms while the job runs.

        Returns:
            Exit codes by rank.

        Raises:
            RankError: The job took longer than the timeout.
        """
        deadline, failed_at = time.monotonic() + timeout, 0.0
        while len(world.codes) < len(world.pids):
            if during is not None:
                during(world)
            now = time.monotonic()
            if any(world.codes.values()) and not failed_at:
                failed_at = now
                world.send_all(signal.SIGTERM)
            if now > deadline or (failed_at and now > failed_at + GRACE):
                world.send_all(signal.SIGKILL)
            if now > deadline + 30:
                break
            time.sleep(0.01)
        if time.monotonic() > deadline:
            raise RankError(f"job '{world.name}' took more than {timeout:g} s; its logs are in {world.logs}")
        return [world.codes[rank] for rank in range(len(world.pids))]

    def processes(self) -> list[str]:
        """Return the command lines of all processes below the pool: ranks, and what ranks have started or left."""
        lines = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or nobody has waited for it yet
                lines.append(" ".join(child.cmdline()))
        return lines

    def run(self, name: str, world_size: int, function: Callable[..., Any], **options: Any) -> tuple[list[int], str]:
        """Start a job and wait for it; return exit codes by rank and what the ranks printed."""
        world = self.start(name, world_size, function, **options)
        return self.wait(world), world.output()

    def call(
        self, name: str, world_size: int, function: Callable[..., Any], *, timeout: float = 300.0, **options: Any
    ) -> Any:
        """Start a job and wait for it, ``timeout`` seconds at most; return what the function returned on rank 0.

        Raises:
            RankError: A rank failed.
        """
        world = self.start(name, world_size, function, **options)
        codes = self.wait(world, timeout)
        if any(codes):
            raise RankError(f"job '{name}': exit codes {codes}\n{world.output()[-6000:]}")
        return world.result()

    def _listen(self) -> None:
        """Take the answers of the process that forks: process ids of a job, or the end of one rank."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "pids" in answer:
                self._started.put(answer["pids"])
                continue
            with self._lock:
                world, rank = self._running.pop(answer["pid"])
            world.codes[rank] = answer["code"]


class Jobs:
    """Jobs by name, each run when its result is first asked for.

    Args:
        pool: Where they run.
        folder: Folder of the jobs' files; logs go to ``logs`` in it.
    """

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self._jobs: dict[str, Callable[[], Any]] = {}
        self._results: dict[str, Any] = {}

    def add(
        self,
        name: str,
        world_size: int,
        function: Callable[..., Any],
        after: str | None = None,
        **arguments: Any,
    ) -> None:
        """Add a job.

        Args:
            name: Name of the job.
            world_size: Number of ranks.
            function: See :meth:`RankPool.start`.
            after: Name of the job whose files it reads, which is run first.
            **arguments: Arguments of the function.
        """

        def run() -> Any:
            if after is not None:
                self[after]
            return self.pool.call(name, world_size, function, logs=self.folder / "logs", **arguments)

        self._jobs[name] = run

    def __getitem__(self, name: str) -> Any:
        """Return what a job returned on rank 0, after running it if it has not run.

        Raises:
            RankError: A rank failed, now or when the job ran.
        """
        if name not in self._results:
            try:
                self._results[name] = self._jobs[name]()
            except RankError as error:
                self._results[name] = error
        result = self._results[name]
        if isinstance(result, RankError):
            raise result
        return result

    def checkpoints(self, name: str) -> str:
        """Return the folder of the checkpoints of a training job, after running it if it has not run."""
        assert self[name]
        return str(self.folder / name / "checkpoints")

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)


def run_commands(folder: str, commands: list[list[str]]) -> list[int]:
    """Run commands of ``nemodiff`` in a folder, one after another; return their exit codes."""
    from nemodiff_train.cli import main

    os.chdir(folder)
    return [main(words) for words in commands]


@dataclass(frozen=True)
class _Job:
    """What the process that forks is asked for."""

    name: str
    world_size: int
    function: str
    """``module:function``."""
    arguments: dict[str, Any]
    logs: str


def _log_file(logs: Path, name: str, rank: int) -> Path:
    return logs / f"{name}.rank{rank}.log"


def _result_file(logs: Path, name: str) -> Path:
    return logs / f"{name}.json"


def _wait_for_any() -> tuple[int, int]:
    """Return the process id and status of a child that has ended, or twice 0."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _serve() -> None:
    """Fork ranks as asked on standard input, and report their process ids and ends on standard output."""
    # What a killed rank has started becomes a child of this process, where `RankPool.processes` finds it.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    ranks: dict[int, ReservedPort] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    pending = ""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            received = os.read(0, 1 << 16).decode()
            if not received:
                return
            *lines, pending = (pending + received).split("\n")
            for line in lines:
                job, port = _Job(**json.loads(line)), ReservedPort()
                pids = [_fork(job, rank, port.number, answers) for rank in range(job.world_size)]
                ranks |= dict.fromkeys(pids, port)
                print(json.dumps({"pids": pids}), file=answers, flush=True)
        while (ended := _wait_for_any())[0]:
            pid, status = ended
            if pid in ranks:
                del ranks[pid]
                print(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


def _fork(job: _Job, rank: int, port: int, answers: TextIO) -> int:
    """Fork one rank; return its process id, when its log exists."""
    logs = Path(job.logs)
    log = os.open(_log_file(logs, job.name, rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    code = 1
    try:
        answers.close()
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        size = str(job.world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        _fork_helper_for_saving()
        module, function = job.function.split(":")
        result = getattr(importlib.import_module(module), function)(**job.arguments)
        if rank == 0:
            _result_file(logs, job.name).write_text(json.dumps(result))
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_helper_for_saving() -> None:
    """Have Megatron fork the processes of its saves, which it would spawn to import torch anew."""
    import torch
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    fork: Any = torch.multiprocessing.get_context("fork")
    setattr(async_utils, "mp", SimpleNamespace(get_context=lambda mode: fork))  # noqa: B010
    filesystem_async.get_write_results_queue("fork")  # the one that later saves find


def _preload() -> None:
    """Import what jobs import, so that no rank has to."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    import torch

    import nemodiff_train

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(nemodiff_train.__path__, "nemodiff_train."):
        if not module.name.endswith(NOT_PRELOADED):
            importlib.import_module(module.name)
    # Torch imports its compiler and defines operators at the first use of these.
    torch.empty(2, device="meta").normal_()
    torch.optim.Adam([torch.zeros(1)]).step()
    gc.collect()
    gc.freeze()  # what is imported stays as it is in every fork


if __name__ == "__main__":  # checkpoint saving spawns a process that imports this file again
    _preload()
    _serve()
