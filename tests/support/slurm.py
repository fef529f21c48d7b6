"""A Slurm of two nodes on this machine: Debian's daemons in two network namespaces. Linux, as root."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.two_hosts import ADDRESSES, TwoHosts, two_hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIGURATION = """ClusterName=test
SlurmctldHost=host0({controller})
AuthInfo=socket={root}/munge.socket
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=40
KillWait=120
NodeName=host0 NodeAddr={controller} CPUs=2
NodeName=host1 NodeAddr={other} CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Its daemons run while this does.

    Args:
        hosts: the nodes; the controller is on the first.
        root: directory of its files.
    """

    def __init__(self, hosts: TwoHosts, root: Path) -> None:
        self.hosts, self.root = hosts, root
        for name in ("state", "spool-host0", "spool-host1"):
            (root / name).mkdir()
        controller, other = ADDRESSES
        configuration = CONFIGURATION.format(root=root, controller=controller, other=other)
        (root / "slurm.conf").write_text(configuration, encoding="utf-8")
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
        key = root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        root.chmod(0o755)
        munge = [
            f"--{what}={root}/munge.{what.split('-')[0]}"
            for what in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        ]
        self.daemons = [
            hosts.start(0, ["munged", "--foreground", "--force", *munge]),
            self._start(0, ["slurmctld", "-D"]),
            *(self._start(host, ["slurmd", "-D", "-N", f"host{host}"]) for host in (0, 1)),
        ]

    def _start(self, host: int, command: Sequence[str]) -> subprocess.Popen[str]:
        return self.hosts.start(host, command, SLURM_CONF=f"{self.root}/slurm.conf")

    def kill_node(self, host: int) -> None:
        """The daemon of a node and all that runs there, without a word, as when its power is gone."""
        listed = subprocess.run(["ip", "netns", "pids", self.hosts.namespaces[host]], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def start_node(self, host: int) -> None:
        """The daemon of a node that was killed."""
        self.daemons.append(self._start(host, ["slurmd", "-D", "-N", f"host{host}"]))

    def run(self, *command: str) -> str:
        """What a command of Slurm's says."""
        process = self._start(0, command)
        output, _ = process.communicate(timeout=60)
        return output

    def wait_for_nodes(self) -> None:
        """Until both are idle."""
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"])

    def submit(self, *arguments: str) -> str:
        """The number of the job."""
        output = self.run("sbatch", *arguments)
        found = re.search(r"Submitted batch job (\d+)", output)
        assert found, output
        return found[1]

    def state_of(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job)))

    def wait(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        """Until something holds. What did not is told with the jobs and the end of each log."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = (f"{log.name}:\n{log.read_text('utf-8', 'replace')[-1500:]}" for log in self.root.glob("*.log"))
                pytest.fail("\n".join(["waited in vain", self.run("scontrol", "show", "job"), *logs]))
            time.sleep(1)

    def stop(self) -> None:
        """All daemons, and what they run."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextmanager
def slurm(root: Path) -> Iterator[Slurm]:
    """Skips the test where there can be none."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"Slurm needs {', '.join(missing)}: Debian's slurmctld, slurmd, slurm-client and munge")
    with two_hosts() as hosts:
        cluster = Slurm(hosts, root)
        try:
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.stop()
