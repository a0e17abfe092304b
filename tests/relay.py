"""A socket before the engine's, for tests of how lightrun reaches one, and of one that hangs."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from engine import engine_host


class Relay:
    """Passes on what comes through a socket that listens. Frozen, it takes what comes and passes nothing on. Of what the
    engine says, `said` may be replaced by something else of the same length."""

    def __init__(self, listening: socket.socket, said: bytes = b"", instead: bytes = b"") -> None:
        assert len(said) == len(instead)
        self._said, self._instead = said, instead
        self._thawed = threading.Event()
        self._thawed.set()
        self._listening, self._open = listening, [listening]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """What the daemon calls this engine."""
        address = self._listening.getsockname()
        return f"unix://{address}" if isinstance(address, str) else f"tcp://{address[0]}:{address[1]}"

    def freeze(self) -> None:
        """Hang."""
        self._thawed.clear()

    def drop(self) -> None:
        """Drop all connections; new ones are taken."""
        for each in self._open[1:]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drop everything."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thawed.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listening.accept()[0], socket.socket(socket.AF_UNIX)
                self._open += [near, far]
                far.connect(urlsplit(engine_host()).path)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._thawed.wait()
                sink.sendall(data.replace(self._said, self._instead) if self._said else data)
            sink.shutdown(socket.SHUT_WR)


def unix_socket(path: str) -> socket.socket:
    """A Unix socket that listens."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(100)
    return listening
