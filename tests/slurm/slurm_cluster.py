"""A real SLURM of one controller and two nodes, all on this machine, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.ports import free_ports

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "setpriv")
NODES = ("n1", "n2")
# A machine under load may be 20 times slower than an idle one.
PATIENCE = 500.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# The nodes say that they have more cores than this machine.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
# A loaded machine takes its time, to answer and to save.
MessageTimeout=60
KillWait=120
MinJobAge=7200
# Otherwise a job whose time has come is begun by a look at the queue every minute.
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str | None:
    """Make the programs available; a reason when that cannot be."""
    # Daemons are in sbin, which not everyone has on the PATH.
    os.environ["PATH"] = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    if not any(shutil.which(program) is None for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return "no apt-get to install SLURM with"
    environment = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        # Services of the packages are not started: not at this run level.
        "RUNLEVEL": "1",
    }
    options = ["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", "--quiet", "--yes"]
    for command in (
        ["apt-get", *options, "update"],
        ["apt-get", *options, "install", "--no-install-recommends", *PACKAGES],
    ):
        # Not killed for being slow: that is how an installation is left half done.
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines()
            return f"{' '.join(command)} failed: {said[-1] if said else result.returncode}"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not there after the installation: {', '.join(missing)}" if missing else None


def wait_until(
    happened: Callable[[], Any], what: str, told: Callable[[], str], seconds: float = PATIENCE
) -> Any:
    """The first true value of ``happened``; fails with what ``told`` knows."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{told()}"
        time.sleep(0.2)
    return value


class Cluster:
    """Jobs on the two nodes. Made by :func:`open_cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = kept | {
            "SLURM_CONF": str(self.configuration),
            "VIRTUAL_ENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / node).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0], folder=self.folder, ports=free_ports(3)
            ),
            encoding="utf-8",
        )
        files = {
            "--key-file": "munge.key",
            "--socket": "munge.socket",
            "--pid-file": "munge.pid",
            "--log-file": "munge.log",
            "--seed-file": "munge.seed",
        }
        places = [f"{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *places])
        wait_until((self.folder / "munge.socket").exists, "munged", self.told)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.configuration)])
        for node in NODES:
            self.start_node(node)
        wait_until(self._nodes_are_idle, "both nodes idle", self.told)

    def start_node(self, node: str) -> None:
        self._daemon(node, ["slurmd", "-D", "-N", node, "-f", str(self.configuration)])

    def kill_node(self, node: str) -> None:
        """SIGKILL to its slurmd; what it started lives on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def kill_tasks(self, node: str) -> None:
        """SIGKILL to the processes that train on a node."""
        found = self._processes(f"SLURMD_NODENAME={node}", "RANK=")
        assert found, self.told()
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                # It ends with the tests, also when those are killed.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _nodes_are_idle(self) -> bool:
        states = self.ask("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def ask(self, *command: str, check: bool = True) -> str:
        """The output of one of SLURM's commands."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or result.returncode == 0, f"{command}: {result.stderr}\n{self.told()}"
        return result.stdout

    def submit(self, *arguments: str) -> str:
        """The number of the job that launch/slurm.sh submits."""
        return self.ask(str(REPOSITORY / "launch" / "slurm.sh"), *arguments).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says; of one task of an array: ``12_0``."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def hurry(self, job: str) -> None:
        """A requeued job waits two minutes for all of it to be gone; here less will do."""
        self.ask("scontrol", "update", f"jobid={job}", "starttime=now+5seconds")

    def wait_for_end(self, job: str) -> dict[str, str]:
        """The facts of the job when it has ended."""

        def ended() -> dict[str, str] | None:
            facts = self.facts(job)
            return facts if facts["JobState"] in ENDED else None

        facts: dict[str, str] = wait_until(ended, f"end of job {job}", self.told)
        return facts

    def told(self) -> str:
        """The end of every log, for a failed test."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        jobs = self.folder.glob("jobs/**/logs/*.log")
        parts = [
            f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in [*logs, *jobs]
        ]
        return "\n".join([*parts, self.ask("scontrol", "show", "job", check=False)[-3000:]])

    def stop(self) -> None:
        """End all jobs, then the daemons, then whatever is left."""
        if self._daemons:
            self.ask("scancel", "--state=PENDING", "--user=root", check=False)
            self.ask("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
            daemon.kill()
            daemon.wait()
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _processes(self, *variables: str) -> list[int]:
        """Living processes that this SLURM started, by variables of their environment."""
        marks = [f"SLURM_CONF={self.configuration}", *variables]
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    held = (folder / "environ").read_text(errors="replace").split("\0")
                    if all(any(one.startswith(mark) for one in held) for mark in marks):
                        found.append(int(folder.name))
        return found


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """Started, and gone without a trace afterwards."""
    # Not pytest's folder: the path of a socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
