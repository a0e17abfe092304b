"""A proxy before a real engine that breaks any of its calls in any way, and the matrix of runs that must survive it.

test_faults.py runs a sample; `python3 tests/faults.py --all` every cell, in the tests' `.venv` (`--help` tells the rest).
A cell is a call, a point, a fault, a kind of run and a mode; what must be true of each one is the contract (SPEC 2 and 6), and
nothing here knows how lightrun keeps it. One constant of the module is lowered, so that silence need not last a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import operator
import os
import queue
import random
import re
import select
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__" and sys.prefix == sys.base_prefix:  # Not the tests' own Python: go on in that.
    python = str(Path(sys.path[0], ".venv/bin/python"))
    os.execv(python, [python, *sys.argv])

import docker
import psutil

from conftest import ROOT, Daemon, Response, eventually
from engine import EngineApi, engine_host, ensure_engine
from images import Registry, make_image, remove_image

# ---------------------------------------------------------------- The proxy

NAMES = [
    (re.compile(rf"{method} (/v[0-9.]+)?/{path}"), name)
    for method, path, name in (
        ("POST", r"containers/create\b", "create"), ("PUT", r"containers/[^/]+/archive\b", "put"),
        ("HEAD", r"containers/[^/]+/archive\b", "look"), ("GET", r"containers/[^/]+/archive\b", "archive"),
        ("POST", r"containers/[^/]+/attach\?\S*stdin=1\S*stdout=1", "hand-out"),
        ("POST", r"containers/[^/]+/attach\?\S*stdout=[1tT]", "attach"), ("POST", r"containers/[^/]+/attach\b", "stdin"),
        ("POST", r"containers/[^/]+/start\b", "start"), ("GET", r"containers/json\b", "list"),
        ("GET", r"containers/[^/]+/json\b", "inspect"), ("POST", r"containers/[^/]+/wait\b", "wait"),
        ("POST", r"containers/[^/]+/exec\b", "exec"), ("POST", r"exec/[^/]+/start\b", "exec-start"),
        ("GET", r"exec/[^/]+/json\b", "exec-state"), ("POST", r"containers/[^/]+/kill\b", "kill"),
        ("GET", r"containers/[^/]+/logs\b", "logs"),
        ("DELETE", r"containers/[^/]+", "remove"), ("POST", r"images/create\b", "pull"), ("GET", r"images/\S+/json\b", "image"),
        ("GET", r"version\b", "version"), ("GET", r"info\b", "info"), ("GET", r"events\b", "events"),
        (r"\w+", r"networks\b", "networks"),
    )
]  # fmt: skip
FEEDS = {"stdin", "hand-out"}  # carry what is sent to a container, where their middle is
DUPLEX = {*FEEDS, "exec-start"}  # carry it as well
STREAMS = {"attach", *DUPLEX, "logs", "archive", "pull", "wait", "events"}  # passed on in pieces; other answers are held whole
HTML = b"<html><body>This is not what an engine says.</body></html>"
TRICKLE_SECONDS = 0.01  # a byte
TIME = re.compile(rb"(?!0001)(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?=\.?\d*(Z|[+-]\d\d:\d\d))")
DATE = re.compile(rb"(?<=Date: )\w+, (\d+ \w+ \d+ \d\d:\d\d:\d\d) GMT")


def canned(call: str, fault: str) -> bytes:
    """What a client gets in place of the engine's answer."""
    if fault == "garbage":
        return b"\x16\x03\x01 this is not HTTP \xff\r\n\r\n"
    status, kind, body = {
        "500": ("500 Internal Server Error", "application/json", b'{"message": "injected"}'),
        "502": ("502 Bad Gateway", "text/html", HTML), "503": ("503 Service Unavailable", "text/html", HTML),
        "504": ("504 Gateway Timeout", "text/html", HTML), "html": ("200 OK", "text/html", HTML),
        "cut": ("200 OK", "application/json", b'{"Id": "abc", "State": {"Runn'), "odd": ("206 Partial", "text/plain", b""),
        "shape": ("200 OK", "application/json", b"{}" if call in {"list", "networks"} else b"[]"),
    }[fault]  # fmt: skip
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


@dataclasses.dataclass
class Rule:
    """One fault: which call, where, how often. `path` is looked for in the URL; `after` is where the middle is, in bytes."""

    call: str
    point: str
    fault: str
    times: float = math.inf
    path: str = ""
    after: int | None = None
    hits: int = 0
    held: int = 0  # connections that hang now
    first: float = math.inf  # monotonic time of the first hit
    mended: threading.Event = dataclasses.field(default_factory=threading.Event)


class Request:
    """A request as it lies in its socket: the head is read, the blank line after it and the body are not yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.head = sock, b""
        while (following := sock.recv(2, socket.MSG_PEEK)) != b"\r\n":
            if not following:
                raise EOFError
            self.head += self._line()
        self.method, self.target, _ = (first := self.head.partition(b"\r\n")[0].decode("latin-1")).split(" ")
        self.headers = header_fields(self.head)
        self.call = next((name for pattern, name in NAMES if pattern.match(first)), "other")

    def rest(self, spare: bool) -> bytes:
        """The blank line and the body. With `spare` the last byte stays unread: closing a Unix socket then is a reset."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self._take(2 + int(self.headers.get("content-length", 0)), spare)
        data = self._take(2)
        while True:
            data += (line := self._line())
            size = int(line, 16)
            data += self._take(size + 2, spare and not size)
            if not size:
                return data

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += self._take(1)
        return line

    def _take(self, count: int, spare: bool = False) -> bytes:
        data = b""
        while left := count - spare - len(data):
            if not (piece := self._sock.recv(left)):
                raise EOFError
            data += piece
        return data + self._sock.recv(1, socket.MSG_PEEK) if spare else data


class Proxy:
    """Stands before the engine on a Unix socket or a TCP port, and passes everything on but for what `inject` says.

    `calls` has the time, name and URL of every request, `said` time, name and status of what the engine itself answered.
    `clock` is how many seconds the engine's clock seems to be ahead.
    """

    def __init__(self, tcp: bool = False) -> None:
        self._engine, self.tcp, self.clock = engine_host().removeprefix("unix://"), tcp, 0.0
        self._folder = tempfile.mkdtemp(prefix="p-")
        self._address: Any = ("127.0.0.1", 0) if tcp else f"{self._folder}/s"
        self.calls: list[tuple[float, str, str]] = []
        self.said: list[tuple[float, str, int]] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()  # held while a rule is looked for and counted, or taken away
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()
        self._listen()

    @property
    def host(self) -> str:
        """What to tell `--docker-host`."""
        return f"tcp://127.0.0.1:{self._address[1]}" if self.tcp else f"unix://{self._address}"

    def inject(
        self, call: str, point: str, fault: str, times: float = math.inf, path: str = "", after: int | None = None
    ) -> Rule:
        """Break a call (`any` is each). Points: `before` the engine hears of it, `after` it has answered, `mid` its answer.

        close, reset, hang (goes on when mended), silent (never does), end (a clean end, too early), trickle, frame0, frame3,
        what `canned` knows, and refuse: nobody listens, and what is open is cut off.
        """
        rule = Rule(call, point, fault, times, path, after)
        if fault == "refuse":
            rule.hits, rule.first = 1, time.monotonic()
            self._cut_off()
        self._rules.append(rule)
        return rule

    def mend(self) -> None:
        """No fault any more; what hangs goes on."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.mended.set()
            if rule.fault == "refuse":
                self._listen()

    def forget(self) -> None:
        """Count from nothing."""
        self.calls, self.said = [], []

    def count(self, call: str, seconds: float = math.inf) -> int:
        """How often the call came within the last seconds."""
        now = time.monotonic()
        return sum(name == call and now - at < seconds for at, name, _ in list(self.calls))

    def busiest(self, seconds: float) -> int:
        """The most calls of one name and URL within that time."""
        calls: dict[tuple[str, str], list[float]] = {}
        for at, name, target in list(self.calls):
            calls.setdefault((name, target), []).append(at)
        return max((sum(first <= at < first + seconds for at in times) for times in calls.values() for first in times), default=0)

    def close(self) -> None:
        """End every connection and thread."""
        self._closing.set()
        self._cut_off()
        for thread in list(self._threads):
            thread.join()
        Path(self._folder, "s").unlink(missing_ok=True)
        Path(self._folder).rmdir()

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_INET if self.tcp else socket.AF_UNIX)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        Path(self._folder, "s").unlink(missing_ok=True)
        self._listener.bind(self._address)
        self._address = self._listener.getsockname()
        self._listener.listen(128)
        self._spawn(self._accept, self._listener)

    def _cut_off(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        def run() -> None:
            with contextlib.suppress(OSError, EOFError, ValueError):  # Either end left, or was told to.
                target(*arguments)
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run)
        self._threads.add(thread)
        thread.start()
        return thread

    @contextlib.contextmanager
    def _known(self, sock: socket.socket) -> Iterator[None]:
        self._sockets.add(sock)
        try:
            yield
        finally:
            self._sockets.discard(sock)
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with self._known(client):
            while not self._closing.is_set() and self._exchange(client, Request(client)):
                pass

    def _rule(self, request: Request, handed_out: bool = False) -> Rule:
        """The fault that this request meets, counted; a warm container's connection is old when something is handed out."""
        with self._lock:
            now = time.monotonic()
            if not handed_out:
                self.calls.append((now, request.call, request.target))
            for rule in self._rules:
                fits = rule.call in {request.call, "any"} and re.search(rule.path, request.target)
                if handed_out != ((rule.call, rule.point) == ("hand-out", "mid")):
                    continue
                if fits and rule.hits < rule.times:
                    rule.hits, rule.first = rule.hits + 1, min(rule.first, now)
                    return rule
        return Rule("", "", "")

    def _exchange(self, client: socket.socket, request: Request) -> bool:
        """One request and its answer; whether another may follow."""
        rule = self._rule(request)
        rest = request.rest(rule.fault == "reset" and (request.call not in DUPLEX or rule.point == "before"))
        if rule.point == "before" and not self._strike(client, request, rule):
            return False
        upstream, over = socket.socket(socket.AF_UNIX), threading.Event()
        with self._known(upstream):
            upstream.connect(self._engine)
            upstream.sendall(request.head + rest)
            watcher = self._spawn(self._watch, client, upstream, request, rule, over)
            try:
                return self._answer(client, upstream, request, rule)
            finally:
                over.set()
                watcher.join()

    def _watch(self, client: socket.socket, upstream: socket.socket, request: Request, rule: Rule, over: threading.Event) -> None:
        """Notice that a client leaves; pass on what it sends to a container's stdin, where the middle is in what it sends."""
        feeds, mid = request.call in DUPLEX, rule.point == "mid" and request.call in FEEDS
        poll = select.poll()
        poll.register(client, select.POLLIN if feeds else select.POLLRDHUP)
        while not over.is_set():
            for _, event in poll.poll(20):
                slow = rule.fault == "trickle" and not rule.mended.is_set()
                if not feeds or not event & select.POLLIN:
                    upstream.shutdown(socket.SHUT_RDWR)
                    return
                if request.call == "hand-out" and not mid:
                    rule = self._rule(request, handed_out=True)
                    mid, slow = rule.point == "mid", rule.fault == "trickle"
                if data := client.recv(1 if slow else rule.after or 1000 if mid else 65536):
                    upstream.sendall(data)
                    if slow:
                        rule.mended.wait(TRICKLE_SECONDS)
                    elif mid and rule.fault != "trickle" and not self._strike(client, request, rule):
                        upstream.shutdown(socket.SHUT_RDWR)
                        return
                    mid = mid and slow
                else:
                    upstream.shutdown(socket.SHUT_WR)
                    poll.modify(client, 0)

    def _answer(self, client: socket.socket, upstream: socket.socket, request: Request, rule: Rule) -> bool:
        with contextlib.closing(upstream.makefile("rb")) as reader:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := reader.readline()):
                    raise EOFError
                head += line
            status, headers = int(head.split()[1]), header_fields(head)
            self.said.append((time.monotonic(), request.call, status))
            if rule.point == "after" and rule.fault != "trickle" and not self._strike(client, request, rule):
                return False
            bodiless = request.method == "HEAD" or status in {204, 304}
            body = iter(()) if bodiless else pieces(reader, headers)
            chunked = headers.get("transfer-encoding") == "chunked"
            goes_on = self._pass_on(client, request, rule, DATE.sub(self._moved_date, head), body, chunked)
            return goes_on and (bodiless or chunked or "content-length" in headers)

    def _pass_on(
        self, client: socket.socket, request: Request, rule: Rule, head: bytes, body: Iterable[bytes], chunked: bool
    ) -> bool:
        """Send an answer, with the fault in its middle; whether it was sent to its end."""
        slow = (rule.fault, rule.point) == ("trickle", "after")

        def coded(piece: bytes) -> bytes:
            return b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece

        def send(data: bytes) -> None:
            for each in (data[at : at + 1] for at in range(len(data))) if slow and not rule.mended.is_set() else [data]:
                client.sendall(each)
                if slow:
                    rule.mended.wait(TRICKLE_SECONDS)

        if request.call not in STREAMS:
            whole = TIME.sub(self._moved, b"".join(body))
            # The middle of an answer without a body is that of its head.
            head, body, chunked = (head, [whole], chunked) if whole else (b"", [head + coded(b"")], False)
        parts: Iterable[bytes | None] = body
        if rule.fault.startswith("frame"):
            frame = bytes([int(rule.fault[-1]), 0, 0, 0, 0, 0, 0, 6]) + b"alien\n"
            parts = itertools.chain([frame], body, [frame])
        elif rule.point == "mid" and request.call not in FEEDS:
            parts = divided(iter(body), rule.after)
        send(head)
        for piece in parts:
            if piece:
                send(coded(piece))
            elif piece is None:
                send(coded(b"") if rule.fault == "end" else b"")
                slow = rule.fault == "trickle"
                if not slow and not self._strike(client, request, rule):
                    return False
        send(coded(b""))
        return True

    def _strike(self, client: socket.socket, request: Request, rule: Rule) -> bool:
        """Do the fault; whether all goes on as if nothing had been."""
        if rule.fault in {"hang", "silent"}:
            gone = select.poll()
            gone.register(client, select.POLLRDHUP)
            rule.held += 1
            while not self._closing.is_set() and not gone.poll(20):
                if rule.fault == "hang" and rule.mended.is_set():
                    break
            rule.held -= 1
            return rule.fault == "hang" and rule.mended.is_set()
        if rule.fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif rule.fault not in {"close", "end", "refuse"}:
            client.sendall(canned(request.call, rule.fault))
        return False

    def _moved(self, match: re.Match[bytes]) -> bytes:
        when = datetime.datetime.fromisoformat(match[1].decode()) + datetime.timedelta(seconds=self.clock)
        return when.isoformat().encode()

    def _moved_date(self, match: re.Match[bytes]) -> bytes:
        when = datetime.datetime.strptime(match[1].decode(), "%d %b %Y %H:%M:%S") + datetime.timedelta(seconds=self.clock)
        return when.strftime("%a, %d %b %Y %H:%M:%S GMT").encode()


def header_fields(head: bytes) -> dict[str, str]:
    """The fields of a request's or an answer's head, in lower case."""
    return dict(field.lower().split(": ", 1) for field in head.decode("latin-1").splitlines() if ": " in field)


def pieces(reader: Any, headers: dict[str, str]) -> Iterator[bytes]:
    """The body of an answer. Raises ValueError when a chunked one is not whole."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(reader.readline(), 16):
            yield reader.read(size)
            reader.readline()
        reader.readline()
        return
    left = int(headers.get("content-length", sys.maxsize))
    while left and (piece := reader.read1(min(left, 65536))):
        left -= len(piece)
        yield piece


def divided(body: Iterator[bytes], after: int | None) -> Iterator[bytes | None]:
    """A body with None in its middle: in half of the first piece, or after so many bytes."""
    for piece in body:
        cut = max(1, len(piece) // 2) if after is None else after
        if cut <= len(piece):
            yield from (piece[:cut], None, piece[cut:])
            yield from body
        else:
            after = cut - len(piece)
            yield piece


# ---------------------------------------------------------------- The cells

IMAGE = "lightrun/faults:latest"  # has a volume, which must go with each container
LOWERED = {"ENGINE_SECONDS": 10}  # constants of the module: what a silent call may cost
HEARD_SECONDS = 5.0  # SPEC 6: a cancel
FAULT_SECONDS = 3.0  # how long a fault lasts, from its first hit
ENDED_SECONDS = 40.0  # from then on, for anything
SETTLED_SECONDS = 20.0
MOST_CALLS = 10  # of one URL within 2 s: about 5 a second
STDIN = "x" * 300_000
FLOOD = "yes $(printf %01000d 7)"  # ever the same line; no other begins like it
EVERY, EXTRACTS = ("image", "create", "attach", "start", "inspect", "wait"), ("put", "look", "archive")
AT_START = ("version", "info", "list", "networks")  # asked when the daemon starts, or once by each
KINDS = {
    "waiting": (*EVERY, "remove", "kill", "any", "logs"), "detached": (*EVERY, "remove", "kill", "any", "logs", *AT_START),
    "keyed": (*EVERY, "put", "kill", "any"), "stdin": (*EVERY, "stdin", "kill", "any", "logs"),
    "extract": (*EVERY, *EXTRACTS, "kill", "any"), "pull": (*EVERY, "pull", "kill"),
    "warm": ("hand-out", "logs", "inspect", "start", "remove", "kill", "any"),
    "flood": ("attach", "inspect", "wait", "logs", "remove", "kill", "any"),
}  # fmt: skip
SHARED = ("close", "reset", "hang", "silent", "garbage")
ANSWERS = ("500", "502", "503", "504", "html", "cut", "shape", "odd")
POINTS = {"before": (*SHARED, *ANSWERS), "after": (*SHARED, *ANSWERS, "trickle"), "mid": (*SHARED, "trickle")}
MORE = {
    **{(call, "mid"): ("end",) for call in ("archive", "pull", "wait")}, ("any", "before"): ("refuse",),
    **{(call, "mid"): ("end", "frame0", "frame3") for call in ("attach", "logs")},
}  # fmt: skip
# The fault is there once; for FAULT_SECONDS; until the end that is asked for, or that the run's own timeout means.
MODES = ("once", "held", "cancel", "stop", "timeout")
REASONS = {
    "succeeded": {"exited", "stopped", "idle"}, "cancelled": {"cancelled", "interrupted"},
    "failed": {
        "exited", "stopped", "timeout", "oom", "interrupted", "pull_failed", "start_failed", "lost", "engine_error",
    },
}  # fmt: skip
CODELESS = {"pull_failed", "start_failed", "lost"}
CODED = {"exited", "stopped", "timeout", "oom"}
SIGNALLED = {"timeout", "cancelled", "stopped"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix. Without a call there is no fault."""

    kind: str
    mode: str
    call: str = ""
    point: str = ""
    fault: str = ""

    def __str__(self) -> str:
        if not self.call:
            return f"{self.kind} run, no fault, {self.mode}"
        return f"{self.kind} run, {self.fault} at {self.call} ({self.point}), {self.mode}"

    @property
    def endless(self) -> bool:
        """Whether its program goes on until it is killed."""
        return self.mode not in {"once", "held"} and self.call != "archive"

    def parts(self) -> set[tuple[str, str]]:
        """What a sample must have first of all."""
        return {("call", self.call), ("fault", self.fault), ("kind", self.kind), ("mode", self.mode)}

    def pairs(self) -> set[tuple[str, str]]:
        """What a sample that has this cell need not look for again."""
        return {(self.fault, self.point), (self.call, str(self.mode == "cancel"))}


def all_cells() -> Iterator[Cell]:
    """Every cell that means something."""
    for kind, calls in KINDS.items():
        yield from (Cell(kind, mode) for mode in MODES if mode != "held")
        for call, (point, faults), mode in itertools.product(calls, POINTS.items(), MODES):
            for fault in (*faults, *MORE.get((call, point), ())):
                if _means_something(call, point, fault, mode):
                    yield Cell(kind, mode, call, point, fault)


def _means_something(call: str, point: str, fault: str, mode: str) -> bool:
    late, ended = call in {"archive", "look", "remove"}, mode in {"cancel", "stop", "timeout"}
    return not (
        (call == "any" and (point != "before" or mode == "once"))
        or (call in FEEDS and point == "mid" and fault == "garbage")
        or (call == "hand-out" and point != "mid" and (fault not in {"close", "500", "hang"} or mode == "timeout"))
        or (call == "kill" and not ended)
        or (late and ended and (call, mode) != ("archive", "cancel"))
        or (call in AT_START and mode not in {"held", "cancel"})
    )


def sample(cells: Iterable[Cell], seed: int, most: int) -> list[Cell]:
    """A few cells with as many calls, faults, kinds and modes as can be, then with pairs of them, that don't take long."""
    left = [cell for cell in cells if cell.fault not in {"silent", "trickle"} or cell.mode == "cancel" or cell.call == "attach"]
    random.Random(seed).shuffle(left)
    chosen: list[Cell] = []
    seen: set[tuple[str, str]] = set()

    def news(cell: Cell) -> tuple[int, int]:
        return len(cell.parts() - seen), len(cell.pairs() - seen)

    while len(chosen) < most and any(news(best := max(left, key=news))):
        chosen.append(best)
        seen |= best.parts() | best.pairs()
    return chosen


# ---------------------------------------------------------------- A place to try them


class Bench:
    """A daemon behind a proxy, on which one cell is tried after the other. A daemon that failed one is replaced."""

    def __init__(self, client: docker.APIClient, registry: Registry, number: int) -> None:
        self.proxy = Proxy(tcp=number % 2 == 1)
        self.pulled = registry.push(IMAGE, f"faults/{number}:1")
        self.problems: list[str] = []
        self._client, self._api = client, EngineApi()
        self._daemon: Daemon | None = None
        self._warm = False  # it has a warm container
        self._pool = ThreadPoolExecutor(2)

    def close(self) -> list[str]:
        """End it all; what was wrong at the very end."""
        self.problems = []
        self.proxy.mend()
        self._discard()
        self.proxy.close()
        self._pool.shutdown()
        return self.problems

    def try_(self, cell: Cell) -> list[str]:
        """What is wrong in a cell."""
        self.problems, began = [], time.monotonic()
        try:
            self._try(cell)
        except Exception as error:  # whatever a broken daemon does to its client
            self.problems.append(f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            self.proxy.mend()
        if self.problems:
            self._discard()
        return [f"{problem} [{time.monotonic() - began:.0f} s{', tcp' * self.proxy.tcp}]" for problem in self.problems]

    def daemon(self, warm: bool) -> Daemon:
        """The daemon, with a warm container or without, started if there is none."""
        if self._warm != warm:
            self._discard()
        if self._daemon is None:
            self._warm = warm
            options = ("--docker-host", self.proxy.host, "--max-concurrent", "1", "--queue", "0")
            pool = ("--warm", f"{IMAGE}=1/none") if warm else ()
            self._daemon = daemon = lowered(Daemon(ROOT, self._client, (*options, *pool), socket=True))
            daemon.start()
            fields = {"image": IMAGE, "entrypoint": ["true"]}
            first = warm and eventually(lambda: daemon.run(**fields).get("warm"), 60, 0.5)  # until the pool has what stays
            self._must(first == warm, "no warm run")
        return self._daemon

    def _discard(self) -> None:
        if daemon := self._daemon:
            self._daemon, daemon.may_log_tracebacks = None, True
            if self.problems:
                daemon.kill()
            try:
                daemon.close()
            except AssertionError as error:
                self.problems.append(str(error)[:300])

    def _must(self, truth: Any, problem: str) -> None:
        if not truth:
            self.problems.append(problem)

    def _try(self, cell: Cell) -> None:
        if cell.call in AT_START:
            self._discard()
        if cell.kind == "pull":
            remove_image(self._api, self.pulled)
        self.proxy.forget()
        rule = self._inject(cell) if cell.call in AT_START else None
        daemon = self.daemon(cell.kind == "warm")
        self._must(self._is_full(daemon), "no warm container")
        level, logged = self._level(daemon), len(daemon.log())
        if cell.call not in {*AT_START, "any"}:
            rule = self._inject(cell)
        answer, run = self._submit(daemon, cell)
        if run:
            if cell.call == "any":
                daemon.wait_for(run, lambda state: "startedAt" in state, SETTLED_SECONDS)
                rule = self._inject(cell)
            asked = self._see_to_end(daemon, cell, rule, run)
            state = daemon.state(run)
            if state["status"] == "running":
                self._must(False, f"no end: {state}")
                return
            if cell.call == "remove" and rule:  # which follows the end
                eventually(lambda: time.monotonic() - rule.first > (FAULT_SECONDS if cell.mode == "held" else 0))
            self.proxy.mend()
            self._judge(daemon, cell, state, asked)
            self._judge_log(daemon, cell, state)
            self._judge_answer(daemon, cell, state, answer)
        self.proxy.mend()
        self._must(self.proxy.busiest(2) <= MOST_CALLS, f"{self.proxy.busiest(2)} calls of a kind in 2 s")
        self._must(eventually(lambda: self._next_succeeds(daemon), SETTLED_SECONDS, 0.3), "the next run does not succeed")
        self._must(eventually(lambda: len(daemon.containers()) == self._warm, SETTLED_SECONDS), "its container stays")
        self._must("Traceback" not in (log := daemon.log()[logged:]), f"a traceback: {re.findall(r'(?m)^[A-Za-z.]+: .*', log)}")
        if cell.call not in AT_START:
            self._must(self._is_full(daemon), "no warm container again")
            back = eventually(lambda: all(map(operator.le, self._level(daemon), level)), SETTLED_SECONDS)
            self._must(back, f"threads and descriptors: {level} before, {self._level(daemon)} after")
        self._must(not run or daemon.state(run) == state, "its state changed after the end")

    def _is_full(self, daemon: Daemon) -> bool:
        """Whether a warm container is there, if there is to be one, and stays."""
        seen: list[list[str]] = []

        def stays() -> bool:
            seen.append([each["Id"] for each in daemon.containers() if each["State"] == "running"])
            return len(seen) > 3 and len(seen[-1]) == 1 and seen[-1] == seen[-2] == seen[-3]

        return not self._warm or bool(eventually(stays, SETTLED_SECONDS, 0.3))

    def _inject(self, cell: Cell) -> Rule | None:
        if cell.call == "logs":
            broken = ("hand-out", "mid", "close") if cell.kind == "warm" else ("attach", "mid", "end")
            self.proxy.inject(*broken, times=1, after=1 << 20 if cell.kind == "warm" else None)  # when it was handed out whole
        return self.proxy.inject(cell.call, cell.point, cell.fault, 1 if cell.mode == "once" else math.inf) if cell.call else None

    @staticmethod
    def _level(daemon: Daemon) -> tuple[int, int]:
        process = psutil.Process(daemon.pid)
        return process.num_threads(), process.num_fds()

    @staticmethod
    def _next_succeeds(daemon: Daemon) -> bool:
        answer = daemon.request("POST", "/run", {"image": IMAGE, "network": "none", "entrypoint": "echo fine"})
        return answer.status == 200 and (answer.json()["status"], answer.json()["logs"]) == ("succeeded", ["fine"])

    def _submit(self, daemon: Daemon, cell: Cell) -> tuple[Future[Response], str | None]:
        """Send the run as its kind of client does; its answer, and its id unless it was refused."""
        last = "sleep 60" if cell.endless else "sleep 0.7; echo more"
        feed = "wc -c; " if cell.kind == "stdin" else ""
        if cell.kind == "flood":
            feed = f"{FLOOD}; " if cell.endless else f"{FLOOD} | head -n 20000; "
        body: dict[str, Any] = {"image": IMAGE, "entrypoint": f"echo out; echo err >&2; {feed}{last}; exit 3"}
        body |= {} if cell.call == "networks" else {"network": "none"}
        body |= {"detached": True} if cell.kind not in {"waiting", "keyed"} else {}
        body |= {"files": {"a/b": "c"}} if cell.kind in {"keyed", "extract"} else {}
        body |= {"extract": ["a", "/app/a/b"], "extractOn": "exit"} if cell.kind == "extract" else {}
        body |= {"stdin": STDIN} if cell.kind == "stdin" else {}
        body |= {"image": self.pulled} if cell.kind == "pull" else {}
        body |= {"timeout": 2000} if cell.mode == "timeout" else {}
        self._sent = body, {"Idempotency-Key": uuid.uuid4().hex} if cell.kind == "keyed" else {}
        self._sent_at = time.monotonic()
        known = {state["id"] for state in daemon.request("GET", "/runs?limit=1").json()}
        answer = self._pool.submit(daemon.request, "POST", "/run", *self._sent[:1], headers=self._sent[1], timeout=120)

        def new() -> list[str]:
            return [state["id"] for state in daemon.request("GET", "/runs?limit=1").json() if state["id"] not in known]

        eventually(lambda: answer.done() or new(), SETTLED_SECONDS)
        if answer.done() and answer.result().status == 503:
            self._must("Retry-After" in answer.result().headers, "a 503 without Retry-After")
            self._must(not new(), "a 503, and a run was accepted")
            return answer, None
        return answer, new()[0]

    def _see_to_end(self, daemon: Daemon, cell: Cell, rule: Rule | None, run: str) -> bool:
        """Ask for an end, and mend, each in its time; whether the end was asked for before it came."""
        began, ready, asked, heard = time.monotonic(), math.inf, math.inf, False
        while (state := daemon.state(run))["status"] == "running" and time.monotonic() - began < ENDED_SECONDS:
            now = time.monotonic()
            ready = min(ready, now) if "startedAt" in state else ready
            hit = rule.first if rule else ready
            if cell.mode not in {"cancel", "stop"}:
                if now - hit > FAULT_SECONDS:
                    self.proxy.mend()
            elif asked == math.inf and now - min(hit, ready) > FAULT_SECONDS / 2:
                action = daemon.request("POST", f"/runs/{run}/{cell.mode}")
                asked, heard = time.monotonic(), action.status == 204
                answered = f"{cell.mode} answered {action.status} after {asked - now:.1f} s"
                self._must(action.status in {204, 409} and asked - now < 1, answered)
            elif now - asked > HEARD_SECONDS + 0.3 and not (rule and rule.mended.is_set()):
                excused = cell.call in {"kill", "any"} and cell.point == "before" and self._starts(cell, state)
                self._must(excused or cell.mode == "stop", "a cancel was not heard within 5 s")
                self.proxy.mend()
            time.sleep(0.1)
        return heard

    def _starts(self, cell: Cell, state: dict[str, Any]) -> list[float]:
        """When the run's program began; with a pool the engine starts other containers as well, and the run says it."""
        return [self._sent_at] * ("startedAt" in state) if cell.kind == "warm" else self._said("start")

    def _said(self, call: str) -> list[float]:
        """When the engine took the call."""
        return [at for at, name, status in list(self.proxy.said) if (name, status) == (call, 204)]

    def _was_signalled(self, run: str) -> bool:
        """Whether the engine remembers a signal, of which the answer may have come too late for anybody to hear it."""
        filters = {"container": [f"lightrun-{run}"], "event": ["kill"]}
        return any(self._client.events(since=int(time.time()) - 300, until=int(time.time()) + 1, filters=filters))

    def _judge(self, daemon: Daemon, cell: Cell, state: dict[str, Any], asked: bool) -> None:
        """Reason and exit code, against what the engine did and what an absence may cost."""
        reason, code = state.get("reason"), state.get("exitCode")
        started, killed = self._starts(cell, state), self._said("kill") or self._was_signalled(state["id"])
        said = f"{state['status']}, {reason}, {code}, {state.get('error')}"
        self._must(reason in REASONS.get(state["status"], ()), f"not in SPEC 2: {said}")
        self._must(code is None or reason not in CODELESS, f"an exit code: {said}")
        self._must(code is not None or reason not in CODED or (reason == "stopped" and not started), f"no exit code: {said}")
        true = {None, *(() if cell.endless else (3,)), *((137, 143) if killed else ())}
        self._must(code in true and state["status"] != "succeeded", f"a guess: {said}")
        removed = "removed" in state.get("error", "") and self._said("remove")  # which kills as well
        self._must(reason not in SIGNALLED or killed or removed or not started, f"the engine took no signal: {said}")
        self._must(len(started) <= 1, f"it ran {len(started)} times: {said}")
        if cell.fault == "500" or (cell.call == "kill" and cell.point != "before"):
            return  # A refusal may end a run; a signal whose answer was lost may be told either way.
        wanted = {"once": "exited", "held": "exited", "cancel": "cancelled", "stop": "stopped", "timeout": "timeout"}[cell.mode]
        fits = {wanted} if asked or cell.mode not in {"cancel", "stop"} else REASONS["failed"]
        fits |= {"exited"} if cell.call == "archive" else set()
        fits |= {"engine_error"} if cell.kind == "waiting" and not started else set()  # It need not wait for the engine.
        fits |= {"interrupted"} if cell.kind == "stdin" and cell.call else set()
        self._must(reason in fits, f"not {wanted}: {said}")
        if cell.kind == "extract" and reason == "exited":
            self._judge_artifacts(daemon, cell, state, asked)

    def _judge_artifacts(self, daemon: Daemon, cell: Cell, state: dict[str, Any], asked: bool) -> None:
        if asked:
            self._must(not state.get("artifacts"), "artifacts of a run that was cancelled")
            return
        self._must([entry["status"] for entry in state["extracted"]] == ["ok", "error"], f"extracted: {state['extracted']}")
        kept = daemon.request("GET", f"/runs/{state['id']}/artifacts/b")
        self._must((kept.status, kept.body) == (200, b"c"), f"an artifact is {kept.body!r}")

    def _judge_log(self, daemon: Daemon, cell: Cell, state: dict[str, Any]) -> None:
        """Exact, or said not to be; and then no line twice, and none that the program never wrote."""
        started, killed, exact = self._starts(cell, state), self._said("kill"), not state["logsTruncated"]
        lines = ["out", *(["300000"] if cell.kind == "stdin" else []), *([] if cell.endless else ["more"])]
        for stream, whole in (("stdout", lines), ("stderr", ["err"])):
            log = daemon.request("GET", f"/runs/{state['id']}/logs?stream={stream}").text
            log = re.sub(r"^0+7?(\n|$)", "", log, flags=re.MULTILINE) if cell.kind == "flood" else log
            fits = [whole] if state["reason"] == "exited" else [whole[:count] for count in range(len(whole) + 1)]
            if started and killed and killed[0] - started[0] > 1:
                fits = [each for each in fits if each]  # There was time for the first line.
            if state["reason"] != "exited":  # Of a run that was killed, stdin may have been cut short.
                log = re.sub(r"^\d+$", "300000", log, flags=re.MULTILINE)
            got, texts = log.splitlines(), ["".join(f"{line}\n" for line in each) for each in fits]
            self._must(not exact or log in texts, f"{stream} is not exact: {log!r}")
            self._must(len(set(got)) == len(got) and set(got) <= set(whole), f"{stream} has what was not written: {log!r}")

    def _judge_answer(self, daemon: Daemon, cell: Cell, state: dict[str, Any], answer: Future[Response]) -> None:
        """The client that waited has the final state; a repeat with the key gets it again."""
        response = answer.result(timeout=10)
        if cell.kind not in {"waiting", "keyed"}:
            self._must(response.status == 202, f"answered {response.status}")
            return
        self._must((response.status, response.json()) == (200, state), f"answered {response.status}: {response.text[:200]}")
        if cell.kind == "keyed":
            again = daemon.request("POST", "/run", self._sent[0], headers=self._sent[1])
            self._must((again.status, again.json()) == (200, state), f"the key gives {again.status}: {again.text[:200]}")


def lowered(daemon: Daemon) -> Daemon:
    """Have a daemon that is not started yet run from a copy of the source with the constants of LOWERED."""
    source, copy = (ROOT / "lightrun.py").read_text(), daemon.folder / "lightrun.py"
    for name, value in LOWERED.items():
        source, count = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", source)
        assert count == 1
    copy.write_text(source)
    daemon.command[daemon.command.index("serve") - 1] = str(copy)
    return daemon


def run_cells(
    client: docker.APIClient, cells: list[Cell], benches: int, told: Callable[[str], None] = lambda _line: None
) -> list[str]:
    """Try cells on some benches at a time; a line for each failure."""
    make_image(EngineApi(), IMAGE, "VOLUME /data")
    failures: list[str] = []
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)

    def work(bench: Bench) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                cell = waiting.get_nowait()
                problems = bench.try_(cell)
                told(f"{'FAILED' if problems else 'passed'} {cell}")
                failures.extend(f"{cell}: {problem}" for problem in problems)
        failures.extend(f"at the end: {problem}" for problem in bench.close())

    with Registry() as registry, ThreadPoolExecutor(benches) as pool:
        list(pool.map(work, [Bench(client, registry, number) for number in range(benches)]))
    eventually(lambda: not Daemon.all_containers(client))
    return failures + [f"left on the engine: {each['Names']}" for each in Daemon.all_containers(client)]


def main(arguments: list[str] | None = None) -> int:
    """Run cells, print a table of the failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every cell; without it, the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of the sample (default 0)")
    parser.add_argument("--count", type=int, help="at most so many cells")
    parser.add_argument("--match", default="", help="only cells whose words match this regular expression")
    parser.add_argument("--benches", type=int, default=4, help="daemons at a time (default 4)")
    parser.add_argument("--list", action="store_true", help="only print the cells")
    options = parser.parse_args(arguments)
    cells = [cell for cell in all_cells() if re.search(options.match, str(cell))]
    if options.all:
        random.Random(options.seed).shuffle(cells)
    else:
        cells = sample(cells, options.seed, len(cells))
    cells = cells[: options.count]
    if options.list:
        print(*cells, f"{len(cells)} cells", sep="\n")
        return 0
    ensure_engine()
    began = time.monotonic()
    client = docker.APIClient(engine_host(), version="auto")
    with tempfile.TemporaryDirectory(prefix="f-") as tempfile.tempdir, contextlib.closing(client):
        failures = run_cells(client, cells, options.benches, lambda line: print(line, flush=True))
    failed = len({failure.partition(": ")[0] for failure in failures})
    print(*sorted(failures), f"{len(cells)} cells, {failed} failed, {time.monotonic() - began:.0f} s", sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
