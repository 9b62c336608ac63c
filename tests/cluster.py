"""A SLURM cluster of one node, this machine, for a test: its own munged, slurmctld and slurmd."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nemodiff_train.distributed import ReservedPort

PROGRAMS = ("munge", "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")

# A job that is put back into the queue may start again when its credential has expired: 5 seconds, not 2 minutes.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that a cluster takes and this machine lacks."""
    search = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    return [name for name in PROGRAMS if shutil.which(name, path=search) is None]


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start the three daemons; yields the environment in which SLURM's commands speak to them."""
    # Not pytest's folder: munged refuses a socket in a folder that others cannot reach.
    with TemporaryDirectory(prefix="slurm-") as name:
        Path(name).chmod(0o755)
        with _running(Path(name)) as environment:
            yield environment


@contextmanager
def _running(folder: Path) -> Iterator[dict[str, str]]:
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    ports = [ReservedPort() for _ in range(2)]
    values = {
        "host": socket.gethostname(),
        "ports": [port.number for port in ports],
        "user": getpass.getuser(),
        "folder": folder,
    }
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values, cores=os.cpu_count()))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in _daemons(folder):
            log = (folder / f"{command[0]}.out").open("wb")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                _wait_for(folder / "munge.socket", folder / "munged.out")
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, capture_output=True, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _daemons(folder: Path) -> list[list[str]]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = ("key-file", "log-file", "pid-file", "seed-file")
    files = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    return [munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]]


def _wait_for(socket_file: Path, log: Path) -> None:
    """SLURM's daemons give up where munged does not answer yet."""
    deadline = time.monotonic() + 30
    while subprocess.run(["munge", "-n", "-S", socket_file], capture_output=True).returncode:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while "idle" not in _tell(environment, "sinfo", "--noheader", "--format=%t"):
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in folder.glob("slurm*.log")]
        time.sleep(0.5)


def _tell(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30).stdout
