"""What a command has started ends with it, even where it is killed and can end nothing itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import small
from tests.prepared import write_jsonl

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Until what is left has ended: the limit of a conversation and five seconds, on a busy machine."""

ENDLESS = (
    "{% if messages[0].content == 'endless' %}"
    + "{% for i in range(99999) %}" * 3
    + "{% endfor %}" * 3
    + "{% endif %}{{ messages[0].content }}"
)
RENDERING = """
import sys
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import load_tokenizer
chat = ChatTemplate(load_tokenizer(sys.argv[1]))
chat([{"role": "user", "content": "hello"}])
open("begun", "w").close()
chat([{"role": "user", "content": "endless"}])
"""
WAITING = "import subprocess\nsubprocess.run(['sleep', '3600'])\n"
RUNNING = f"""
from nemodiff_train.evaluation import sandbox
sandbox.SECONDS = 3600
sandbox.passes({WAITING!r})
"""
PREPARING = """
import sys
from nemodiff_train.cli import main
main(["data", "prepare", "chat.jsonl", "--chat", "--tokenizer", sys.argv[1], "--output", "out", "--workers", "2"])
"""


def below(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
    found: set[int] = set()
    ahead = {pid}
    while ahead:
        ahead = {child for child, parent in parents.items() if parent in ahead} - found
        found |= ahead
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def words(pid: int) -> list[str]:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def wait(happened: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.1)
    return happened()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orphans") / "model"
    small.tokenizer(folder)
    (folder / "chat_template.jinja").write_text(ENDLESS)
    return folder


@pytest.mark.parametrize(
    ("program", "processes"),
    [(RENDERING, 1), (RUNNING, 1), (PREPARING, 4)],  # what forks workers, a worker, and its chat template
    ids=["chat template", "a model's program", "preparation of conversations"],
)
def test_nothing_is_left_of_a_killed_command(program: str, processes: int, model: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "endless"}, {"role": "assistant", "content": "a"}]
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": said}] * 200)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen([sys.executable, "-c", program, str(model)], cwd=tmp_path, env=environment)
    started: set[int] = set()

    def at_work() -> bool:
        started.update(below(command.pid))
        alive = [pid for pid in started if lives(pid)]
        if program is PREPARING:
            return len(alive) >= processes and any("nemodiff_train.data.template" in words(pid) for pid in alive)
        if program is RUNNING:
            return any("sleep" in words(pid) for pid in alive)
        return len(alive) >= processes and any(tmp_path.rglob("begun"))

    try:
        assert wait(at_work, 300) and command.poll() is None
        time.sleep(1)  # into the endless part
        started |= below(command.pid)
    finally:
        command.kill()
        command.wait()
    assert wait(lambda: not any(map(lives, started)), SECONDS), [words(pid) for pid in started if lives(pid)]


UNGUARDED = """
print("begun")
import multiprocessing, os
from nemodiff_train.processes import without_main_module
with without_main_module():
    started = multiprocessing.get_context("spawn").Process(target=os.getpid)
    started.start()
started.join()
print(started.exitcode)
"""


def test_a_helper_does_not_run_its_program_again(tmp_path: Path) -> None:
    """A script without a guard would begin once more in every process that Python spawns."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command, environment = [sys.executable, "script.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("begun\n0\n", 0), done.stderr


def test_a_save_does_not_wait_for_a_dead_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may end before it has taken over what is to be written: for want of memory, for example."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    for name in ("process", "queue", "preload_q", "comp_q"):
        monkeypatch.setattr(PersistentAsyncCaller, f"_persistent_{name}", None)
    writer = PersistentAsyncCaller._get_process(0)
    waiting: Any = PersistentAsyncCaller._persistent_preload_q
    waiting.put(0)
    writer.kill()
    waiting.join()
    assert not writer.is_alive()


DROPPED = """
import os, signal, time
from nemodiff_train.signals import exit_on_signals
exit_on_signals(signal.SIGUSR1)
class Callback:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
Callback()
time.sleep(60)
print("went on")
"""


def test_a_signal_is_not_lost_in_a_callback() -> None:
    """What is raised while Python collects an object, or forks, is dropped with a traceback."""
    done = subprocess.run([sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True)
    line = "nemodiff: SIGUSR1 before the first step; repeat the command to resume\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", line)


def test_a_signal_prints_nothing_while_something_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's writers refuse to be entered by a handler that has interrupted them."""
    from megatron.bridge.training.utils import sig_utils

    from nemodiff_train.runtime import patches

    patches.silence_signal_handlers(sig_utils)
    with sig_utils.DistributedSignalHandler(signal.SIGUSR1) as handler:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert handler._signal_received and capsys.readouterr().out == ""
