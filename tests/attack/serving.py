"""A service in a process of its own, whose memory can be measured: the real routes and replica on uvicorn, without Ray.

python -m tests.attack.serving WEIGHTS      prints its port when it serves
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Served:
    """A service that runs.

    Attributes:
        url: without a slash at its end.
        pid: of its process.
    """

    url: str
    pid: int

    def peak_mb(self) -> float:
        """The most memory that it ever had resident."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024


@contextlib.contextmanager
def served(weights: Path) -> Iterator[Served]:
    """Serves weights until the context ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "tests.attack.serving", str(weights)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = next((line for line in process.stdout if line.startswith("port ")), None)
            assert port is not None, "the service ended before it served: its output tells why"
            yield Served(f"http://127.0.0.1:{int(port.split()[1])}", process.pid)
        finally:
            process.kill()


async def serve(weights: str) -> None:
    import uvicorn

    from raypar.serve.api import Answer, build_api
    from raypar.serve.body import Limits
    from raypar.serve.problem import BadImageError
    from raypar.serve.replica import Replica

    replica = Replica({}, "cpu")
    await replica.reconfigure({"weights": weights})

    async def detect(*args: Any) -> Answer:
        answer = await replica.detect(*args)
        if isinstance(answer, BadImageError):
            raise answer
        return answer

    async def is_ready() -> bool:
        return True

    api = build_api(detect, detect, replica.info, Limits(), is_ready=is_ready)
    sock = socket.create_server(("127.0.0.1", 0))
    print(f"port {sock.getsockname()[1]}", flush=True)
    await uvicorn.Server(uvicorn.Config(api, log_level="critical")).serve(sockets=[sock])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
