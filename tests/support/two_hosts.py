"""Two hosts on this machine: network namespaces with a cable between them, and host names of their own. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from tests.helpers import ACCELERATE, ROOT, environment, skip_if_quick

ADDRESSES = ("10.73.0.1", "10.73.0.2")
LINK = "cable0"  # on both


class TwoHosts:
    """Their namespaces exist while this does.

    Args:
        name: part of the names of namespaces and links, which are the machine's.
    """

    def __init__(self, name: str) -> None:
        self.namespaces = (f"{name}0", f"{name}1")
        self._ip("link", "add", f"{name}v0", "type", "veth", "peer", "name", f"{name}v1")
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            link = f"{name}v{namespace[-1]}"
            self._ip("netns", "add", namespace)
            self._ip("link", "set", link, "netns", namespace)
            self._ip("-n", namespace, "link", "set", link, "name", LINK)
            self._ip("-n", namespace, "addr", "add", f"{address}/24", "dev", LINK)
            self._ip("-n", namespace, "link", "set", LINK, "up")
            self._ip("-n", namespace, "link", "set", "lo", "up")

    def start(self, host: int, command: Sequence[str], **more: str) -> subprocess.Popen[str]:
        """Start a command on one of them, with the interface for gloo, unless `more` says otherwise."""
        skip_if_quick()
        inside = f'hostname host{host}; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.namespaces[host]}", "unshare", "--uts", "sh", "-c", inside, "sh"]
        variables = environment(**{"GLOO_SOCKET_IFNAME": LINK, **more})
        return subprocess.Popen([*enter, *command], text=True, cwd=ROOT, env=variables, stdout=PIPE, stderr=STDOUT)

    def torchrun(self, host: int, *arguments: str, hosts: int = 2, **more: str) -> subprocess.Popen[str]:
        """Two ranks on a host, of `hosts` that are to come."""
        meeting = ["--master_addr", ADDRESSES[0], "--master_port", "29507"]
        launch = [
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(hosts),
            "--node_rank",
            str(host),
            "--nproc_per_node",
            "2",
        ]
        return self.start(host, [sys.executable, *launch, *meeting, *arguments], **more)

    def accelerate(self, host: int, file: Path, *arguments: str) -> subprocess.Popen[str]:
        """What a launch file says, on a host."""
        meeting = ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29507"]
        launch = [ACCELERATE, "launch", "--config_file", str(file), "--machine_rank", str(host), *meeting]
        return self.start(host, [*launch, *arguments])

    def ranks(self, host: int, *arguments: str, **more: str) -> list[subprocess.Popen[str]]:
        """Two ranks on a host without a launcher, as srun starts them."""
        group = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29507"}
        return [
            self.start(host, [sys.executable, *arguments], **group, RANK=str(2 * host + n), LOCAL_RANK=str(n), **more)
            for n in range(2)
        ]

    def pull_the_cable(self) -> None:
        """Nothing passes between them any more, and nobody is told."""
        self._ip("-n", self.namespaces[1], "link", "set", LINK, "down")

    def remove(self) -> None:
        """Both, and the cable with them."""
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Skips the test where there can be none."""
    if sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        pytest.skip("network namespaces need Linux, root, ip and nsenter")
    try:
        hosts = TwoHosts(f"gpt{os.getpid() % 100_000}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    try:
        for host in (0, 1):
            output, _ = (entered := hosts.start(host, ["hostname"])).communicate(timeout=60)
            if entered.returncode or output.strip() != f"host{host}":
                pytest.skip(f"no host names of their own here: {output.strip()}")
        yield hosts
    finally:
        hosts.remove()
