"""A TCP link to a server that can be cut: then connections end, and new ones are closed at once."""

from __future__ import annotations

import contextlib
import socket
import threading


class Link:
    """Passes bytes on between whoever connects to its address and a server.

    Args:
        host, port: of the server.

    Attributes:
        address: host:port to connect to.
        num_refused: connections that were closed at once, since the last cut.
    """

    def __init__(self, host: str, port: int):
        self.server, self.is_cut, self.num_refused = (host, port), False, 0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut, self.num_refused = True, 0
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                if self.is_cut:
                    self.num_refused += 1
                    client.close()
                    continue
                server = socket.create_connection(self.server)
                for ends in ((client, server), (server, client)):
                    self._open.add(ends[0])
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()
