"""Hosts on one machine: each with a network, processes, a name, a ``/tmp``, a ``/dev/shm`` and a home of its own.

A host is a process in namespaces of its own, which is process 1 there: a SIGKILL to it is the end of all that runs on the host, and the
kernel takes namespaces and interfaces away. Hosts are joined by a bridge; this process is on it too, and serves their storage.

What hosts share: the installed programs, read only in what they do, and what they reach through the network.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.conftest import ENVIRONMENT, REPOSITORY

CREATE = [
    "unshare",
    "--net",
    "--mount",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--mount-proc",
    "--propagation",
    "private",
]
INIT = "while :; do sleep 3600 & wait $!; done"  # adopts orphans and waits for them, as process 1 must
DECOY = "192.0.2"  # what a host's own name stands for: an interface that leads nowhere

# /tmp is the host's own; what the programs are in stays visible below it.
FURNISH = """
set -e
hostname {name}
new=$(mktemp -d)
mount -t tmpfs -o size=2g tmpfs "$new"
for kept in {kept}; do mkdir -p "$new${{kept#/tmp}}"; mount --bind "$kept" "$new${{kept#/tmp}}"; done
mount --move "$new" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir /tmp/home /tmp/work
printf '127.0.0.1 localhost\\n{decoy} {name}\\n' > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
ip link set lo up
ip link add aaa0 type veth peer name aaa1
ip address add {decoy}/24 dev aaa0
ip link set aaa0 up
ip link set aaa1 up
ip address add {address}/24 dev uplink
ip link set uplink up
"""


def missing() -> str | None:
    """Why this machine cannot have such hosts; nothing when it can."""
    if os.geteuid() != 0:
        return "hosts of one's own need root"
    for program in ("ip", "unshare", "nsenter", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"hosts of one's own need the program '{program}' (Debian: apt-get install iproute2 util-linux hostname)"
    script = "mount -t tmpfs tmpfs /mnt && ip link add one type veth peer name two && ip link add three type bridge"
    tried = subprocess.run([*CREATE, "bash", "-c", script], capture_output=True, text=True)
    return (
        None
        if tried.returncode == 0
        else f"this machine does not allow hosts of one's own: {tried.stderr.strip()[-200:]}"
    )


class Lan:
    """A bridge, this process's address on it, and the hosts."""

    def __init__(self) -> None:
        number = os.getpid()
        self.bridge, self.prefix = f"lan{number}", f"10.{100 + number // 256 % 100}.{number % 256}"
        self.address = f"{self.prefix}.254"
        self.hosts: list[Host] = []
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def host(self, name: str, variables: Mapping[str, str]) -> Host:
        """Another host, up and without Ray."""
        number = len(self.hosts) + 1
        made = Host(
            name, f"{self.prefix}.{number}", f"v{number}-{os.getpid()}", {**variables, **_variables()}
        )
        self.hosts.append(made)
        made.boot(self.bridge)
        return made

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        run("ip", "link", "delete", self.bridge)


class Host:
    """One of them.

    Args:
        name: its host name.
        address: its IP address.
        cable: the name of its link's end at the bridge.
        variables: of everything that runs on it.
    """

    def __init__(self, name: str, address: str, cable: str, variables: Mapping[str, str]):
        self.name, self.address, self.cable, self.variables = name, address, cable, dict(variables)
        self.decoy = f"{DECOY}.{address.rpartition('.')[2]}"
        self.process_1 = 0

    def boot(self, bridge: str) -> None:
        """Makes the host and plugs it in."""
        outer = subprocess.Popen(
            [*CREATE, "bash", "-c", INIT], start_new_session=True, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: psutil.Process(outer.pid).children() != [], 10, "process 1 does not start")
        self.process_1 = psutil.Process(outer.pid).children()[0].pid
        self._outer = outer
        run(
            "ip",
            "link",
            "add",
            self.cable,
            "type",
            "veth",
            "peer",
            "name",
            "uplink",
            "netns",
            str(self.process_1),
        )
        run("ip", "link", "set", self.cable, "master", bridge, "up")
        kept = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), REPOSITORY}
        below_tmp = " ".join(shlex.quote(str(path)) for path in sorted(kept) if path.is_relative_to("/tmp"))
        self.run(
            FURNISH.format(name=self.name, kept=below_tmp, decoy=self.decoy, address=self.address), cwd="/"
        )

    def command(self, script: str, cwd: str = "/tmp/work") -> list[str]:
        """A command of this machine that runs a shell script on the host."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        inner = ["env", "-i", *variables, "bash", "-c", f"cd {cwd}\n{script}"]
        return [
            "nsenter",
            "--target",
            str(self.process_1),
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            *inner,
        ]

    def run(self, script: str, cwd: str = "/tmp/work", timeout_s: float = 120) -> str:
        """Runs a script on the host to its end; returns what it printed."""
        done = subprocess.run(
            self.command(script, cwd),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{self.name}: {script}: {done.stdout[-3000:]}"
        return done.stdout

    def start(self, script: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts a script on the host; what it prints goes to a file of this machine."""
        with log.open("wb") as file:
            return subprocess.Popen(self.command(script), stdout=file, stderr=file, start_new_session=True)

    def start_ray(self, head: str | None = None, num_cpus: int = 0) -> None:
        """``ray start``: the head, or a node of the head at that address."""
        role = f"--address={head}:6379" if head else "--head --port=6379 --include-dashboard=false"
        self.run(f"ray start {role} --node-ip-address={self.address} --num-cpus={num_cpus} --object-store-memory={150 << 20} "
                 "--disable-usage-stats")  # fmt: skip

    def cut(self) -> None:
        """Nothing gets to the host or from it any more, and nobody is told."""
        run("ip", "link", "set", self.cable, "down")

    def kill(self) -> None:
        """SIGKILL to everything on it, at once."""
        if self.process_1:
            os.kill(self.process_1, signal.SIGKILL)
            self._outer.wait()
            self.process_1 = 0


def _variables() -> dict[str, str]:
    """Of every process on a host: what tests set, and places on the host itself."""
    return {
        **{name: value for name, value in ENVIRONMENT.items() if name != "RAY_AUTH_MODE"},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": "/tmp/home",
        "YOLO_CONFIG_DIR": "/tmp/home",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
    }


def run(*command: str) -> None:
    """A command of this machine."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def wait_until(what: Callable[[], bool], timeout_s: float, why: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)
