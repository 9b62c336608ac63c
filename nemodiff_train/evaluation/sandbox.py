"""Run a model's code to see whether it passes its tests, in a sandbox of the kernel's namespaces.

A program can read files and write none but in a scratch folder in memory; it has no network, no sight of other
processes, no devices, no rights, an empty environment, and limits on time, memory, processes and what it writes.  All
that it starts ends with it, and it ends with the evaluation.  Where the kernel does not allow this, nothing is run.
"""

import functools
import secrets
import subprocess
import sys

from nemodiff_train.errors import UserError

SECONDS = 10  # of processor time, and, with the time to start Python, on the clock
_MEMORY = 2**30  # bytes of address space of each process
_SCRATCH = 2**26  # bytes that a program may write
_PROCESSES = 32
_START_SECONDS = 10  # that a busy machine takes to start Python twice

# `setpriv` ends the whole with this process; in its namespaces it is root, without the rights of root outside.
_NAMESPACES = (
    "setpriv", "--pdeathsig", "KILL", "unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc",
    "--uts", "--fork", "--kill-child",
)  # fmt: skip
_WITHOUT_RIGHTS = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")

# The root of the namespaces lays out the file system.  The scratch folder is `/tmp`; what has sockets of services,
# processes or devices is empty, but for `/dev/null`.  A Python that is installed in `/tmp` stays there.
_PREPARE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(failed):
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def mount(source, target, kind, flags, options=None):
    check(libc.mount(source, target, kind, flags, options))
def change(path, on, off, below=0):  # mount_setattr
    check(libc.syscall(442, -100, path, below, (ctypes.c_uint64 * 4)(on, off, 0, 0), 32))
BIND, MOVE, RECURSIVE, NO_SUID_NO_DEVICES = 4096, 8192, 16384, 6
READ_ONLY, NO_DEVICES, ALL_BELOW = 1, 4, 0x8000
pythons = {path: os.open(path, os.O_PATH) for path in (sys.prefix, sys.base_prefix) if path.startswith("/tmp/")}
mount(b"scratch", b"/tmp", b"tmpfs", NO_SUID_NO_DEVICES, b"mode=1777,nr_inodes=4096,size=" + sys.argv[1].encode())
for path, descriptor in pythons.items():
    os.makedirs(path, exist_ok=True)
    mount(f"/proc/self/fd/{descriptor}".encode(), path.encode(), None, BIND | RECURSIVE)
try:  # root outside is not held by a limit on its processes, but by one on their numbers, from Linux 6.14 on
    mount(b"proc", b"/proc", b"proc", NO_SUID_NO_DEVICES)
    with open("/proc/sys/kernel/pid_max", "w") as file:
        file.write("301")
except OSError:
    pass
open("/tmp/null", "w").close()
mount(b"/dev/null", b"/tmp/null", None, BIND)
for folder in (b"/dev", b"/proc", b"/run"):
    mount(b"nothing", folder, b"tmpfs", NO_SUID_NO_DEVICES)
open("/dev/null", "w").close()
mount(b"/tmp/null", b"/dev/null", None, MOVE)
os.remove("/tmp/null")
change(b"/", READ_ONLY | NO_DEVICES, 0, ALL_BELOW)
change(b"/tmp", 0, READ_ONLY)
change(b"/dev/null", 0, NO_DEVICES)
os.chdir("/tmp")
os.execvp(sys.argv[2], sys.argv[2:])
"""

# What it prints at the end of the program no program knows beforehand: leaving early is not passing.
_RUN = """
import os, resource, sys
token, _, program = sys.stdin.read().partition("\\n")
report, nowhere = os.dup(1), os.open("/dev/null", os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nowhere, number)
for limit in sys.argv[1:]:
    name, _, value = limit.partition("=")
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
os.write(report, token.encode())
"""


@functools.cache
def check_sandbox() -> None:
    """Refuse to run programs where the kernel does not allow the sandbox.

    Raises:
        UserError: Says so, and what to do.
    """
    try:
        works = passes("import tempfile; tempfile.TemporaryFile().write(b'x')")
    except OSError:  # util-linux is not installed
        works = False
    if not works:
        raise UserError(
            "programs run in a sandbox of user namespaces (unshare, setpriv), which this machine does not allow; use "
            "one that does, or in a container of its own 'nemodiff lm-eval --tasks humaneval "
            "--confirm_run_unsafe_code', which has no sandbox"
        )


def passes(program: str) -> bool:
    """Return whether a Python program runs to its end without an error; :func:`check_sandbox` comes first.

    Args:
        program: Source text.
    """
    token = secrets.token_hex()
    python = (sys.executable, "-I", "-B", "-c")
    limits = {"AS": _MEMORY, "CPU": SECONDS, "NPROC": _PROCESSES, "CORE": 0}
    words = [f"{name}={value}" for name, value in limits.items()]
    run = [*_NAMESPACES, *python, _PREPARE, str(_SCRATCH), *_WITHOUT_RIGHTS, *python, _RUN, *words]
    try:
        done = subprocess.run(
            run,
            input=f"{token}\n{program}".encode(errors="surrogateescape"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            timeout=SECONDS + _START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout == token.encode()
