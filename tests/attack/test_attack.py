"""An attack on the service: right answers, bounded memory, nothing internal said, and others are served meanwhile."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.attack.hostile import ATTACKS, Attack, photo
from tests.attack.serving import Served, served

TIMEOUT_S = 120
CLIENTS = 4
# an address, a path, a library, a line of a traceback
INTERNAL = re.compile(
    r"0x[0-9a-f]{4}|object at|no module|(/\w+){3}|opencv|pillow|\bpil\b|cv2|traceback|\.py\b", re.IGNORECASE
)
# what 4 clients may take at a time: bodies of 16 MB and, decoded, 49 Mpx of 3 bytes, and as much again while they are copied
MAX_GROWTH_MB = 4 * (16 + 150) * 2


@pytest.fixture(scope="module")
def service(tiny_weights: Path) -> Iterator[Served]:
    with served(tiny_weights) as running:
        yield running


class Neighbours:
    """Clients that send good images all the time, until the context ends."""

    def __init__(self, url: str) -> None:
        self.statuses: list[int] = []
        self._url, self._is_over = url, threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Neighbours:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _send(self) -> None:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            while not self._is_over.is_set():
                response = client.post(
                    f"{self._url}/v1/detect", content=photo(), headers={"Content-Type": "image/jpeg"}
                )
                self.statuses.append(response.status_code)


def complaint(url: str, attack: Attack) -> str | None:
    """What is wrong with the answer to an attack."""
    with httpx.Client(timeout=TIMEOUT_S) as client:
        try:
            response = client.post(f"{url}/v1/detect", content=attack.content(), headers=attack.headers)
        except httpx.TransportError as error:
            # the answer came, and the connection was closed, before all was sent
            return None if attack.statuses == (413,) else f"{attack.name}: {error!r}"
    if response.status_code not in attack.statuses:
        return f"{attack.name}: {response.status_code} {response.text}"
    if response.status_code == 200:
        return None
    if response.headers["content-type"] != "application/problem+json":
        return f"{attack.name}: {response.headers['content-type']}"
    if INTERNAL.search(response.json()["detail"]) or len(response.text) > 1000:
        return f"{attack.name}: tells {response.text}"
    return None


def test_attacks_are_answered_and_nobody_else_notices(service: Served) -> None:
    before_mb = service.peak_mb()

    with Neighbours(service.url) as neighbours, ThreadPoolExecutor(CLIENTS) as pool:
        complaints = list(pool.map(lambda attack: complaint(service.url, attack), ATTACKS))
        assert httpx.get(f"{service.url}/livez", timeout=TIMEOUT_S).status_code == 200

    assert [each for each in complaints if each is not None] == []
    assert neighbours.statuses
    assert set(neighbours.statuses) == {200}
    assert service.peak_mb() - before_mb < MAX_GROWTH_MB


def test_uploads_that_end_early_leave_nothing_behind(service: Served) -> None:
    """The service counts the bytes that it holds: those of clients that went away are given back."""
    address = httpx.URL(service.url)
    begin = (
        b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 16000000\r\n\r\n"
    )

    def half(_: int) -> None:
        import socket

        with socket.create_connection((address.host, address.port or 80)) as connection:
            connection.sendall(begin + bytes(12_000_000))

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(half, range(100)))  # 1.2 GB in all, and 1 GB may be held
    response = httpx.post(
        f"{service.url}/v1/detect",
        content=photo(),
        headers={"Content-Type": "image/jpeg"},
        timeout=TIMEOUT_S,
    )
    assert response.status_code == 200, response.text
