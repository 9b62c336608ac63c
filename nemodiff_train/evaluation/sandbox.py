"""Run a model's code to see whether it passes its tests.

A subprocess with limits on time, memory and output, an empty environment, a folder of its own that is
removed, and an audit hook that refuses sockets, further processes, and writing elsewhere.  It ends with the
evaluation, however that ends.  That contains mistakes, not code that means harm: run such evaluations in
a container.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY = 2**30

_GUARD = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != {parent}:
    sys.exit(1)
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
_home = os.path.realpath(os.getcwd()) + os.sep
def _audit(event, arguments, home=_home, real=os.path.realpath, refused=(
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "ctypes.", "os.remove",
    "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "shutil.",
)):
    if event.startswith(refused):
        raise PermissionError(event)
    if event == "open":
        path, mode, flags = (*arguments, None, None)[:3]
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and not (isinstance(path, (str, bytes)) and real(os.fsdecode(path)).startswith(home)):
            raise PermissionError(event)
sys.addaudithook(_audit)
exec(compile(open("program.py").read(), "program.py", "exec"), {{"__name__": "__main__"}})
sys.exit({reached})
"""

# Exit status of a program that ran to its end; one that exits earlier has not passed the tests after it.
REACHED_END = 77


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether a Python program runs to its end without an error.

    Args:
        program: Source text.
        seconds: Limit on wall-clock and CPU time.
        memory: Limit on its address space in bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="nemodiff-code-"))
    try:
        (folder / "program.py").write_text(program)
        limits = {"memory": memory, "seconds": seconds, "reached": REACHED_END, "parent": os.getpid()}
        (folder / "guard.py").write_text(_GUARD.format(**limits))
        return _exit_status(folder, seconds) == REACHED_END
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exit_status(folder: Path, seconds: int) -> int | None:
    process = subprocess.Popen(
        [*_without_network(), sys.executable, "-I", "-B", "guard.py"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _without_network() -> list[str]:
    """Return the command that takes the network away from a process, empty where an ordinary user may not."""
    prefix = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else []
