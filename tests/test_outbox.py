"""The outbox: callbacks that are owed arrive, in their own time, whatever happens to the daemon or the other receivers.

One attempt by itself is tested in test_callbacks.py.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import email.utils
import gc
import http.server
import json
import re
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from standardwebhooks import Webhook

import lightrun as module
from conftest import ROOT, Daemon, DaemonFactory, Received, Receiver, eventually, free_port, longer
from engine import IMAGE

DELAYS = (0.4, 0.8, 1.2, 1.6, 2.0)
QUICK = {"LIGHTRUN_DELAYS": " ".join(map(str, DELAYS))}
# What most of these runs ask for: their ends are told as any other is, and come at once, without a container.
ABSENT, NO_PULL = "lightrun/no-such-image", ("--pull", "never")


@pytest.fixture(scope="session")
def pyz() -> Path:
    """Instead of the zip: the daemon whose retries can be made quick."""
    return ROOT / "tests/launcher.py"


@pytest.fixture(scope="module")
def shared(module_daemon: DaemonFactory) -> Daemon:
    """One daemon for all tests that need no start or end of theirs."""
    return module_daemon(*NO_PULL, env=QUICK)


@pytest.fixture
def other() -> Iterator[Receiver]:
    """A second receiver, at another port."""
    started = Receiver()
    yield started
    started.close()


@pytest.fixture
def trickle() -> Iterator[str]:
    """The URL of a receiver whose answer comes a byte at a time and never ends."""
    ended = threading.Event()

    def drip(client: socket.socket) -> None:
        with client:
            try:
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                    client.sendall(bytes([byte]))
                    if ended.wait(0.5):
                        return
            except OSError:  # It was given up.
                pass

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                break
            threads.append(threading.Thread(target=drip, args=(client,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def call_back(lightrun: Daemon, url: str, **fields: Any) -> str:
    """A run that ends at once, and is to tell this URL."""
    return lightrun.detach(**{"image": ABSENT, "callbackUrl": url, **fields})


def callback(lightrun: Daemon, run: str, status: str, timeout: float = 20) -> dict[str, Any]:
    """The run's callback once it has this status."""
    state = lightrun.wait_for(run, lambda state: state["callback"]["status"] == status, timeout)
    return dict(state["callback"])


def attempts(requests: list[Received], run: str) -> list[int]:
    """The numbers of the attempts for one run."""
    return [int(got.headers["X-Light-Run-Attempt"]) for got in requests if got.headers["X-Light-Run-Id"] == run]


# ---------------------------------------------------------------- The schedule


def test_the_real_schedule() -> None:
    assert module.CALLBACK_DELAYS == (1, 5, 30, 120, 600)
    assert module.CALLBACK_SECONDS == 10
    assert module.MAX_RETRY_AFTER_SECONDS == 600


def test_retries_until_the_last_one(shared: Daemon, receiver: Receiver) -> None:
    for status in (500, 503, 408, 425, 429, 502):
        receiver.answer(status)
    run = call_back(shared, receiver.url)
    assert callback(shared, run, "failed") == {"status": "failed", "attempts": 6, "lastError": "answered 502"}
    got = receiver.wait(6)
    assert attempts(got, run) == [1, 2, 3, 4, 5, 6]
    assert {request.body for request in got} == {got[0].body}
    for earlier, later, delay in zip(got, got[1:], DELAYS, strict=False):
        assert delay <= later.time - earlier.time < 1.25 * delay + 0.5
    state = json.loads(got[0].body)
    final = shared.state(run)
    del final["callback"]
    assert state == final


def test_the_state_tells_how_it_stands(shared: Daemon, receiver: Receiver) -> None:
    receiver.answer(500, delay=0.5)
    run = call_back(shared, receiver.url)
    shared.wait(run)
    assert shared.state(run)["callback"] == {"status": "pending", "attempts": 0}
    pending = shared.wait_for(run, lambda state: state["callback"]["attempts"] == 1)["callback"]
    assert pending == {"status": "pending", "attempts": 1, "lastError": "answered 500"}
    delivered = callback(shared, run, "delivered")
    assert (delivered["status"], delivered["attempts"]) == ("delivered", 2)
    (listed,) = [state for state in shared.request("GET", "/runs").json() if state["id"] == run]
    assert listed["callback"] == delivered


def test_refused_connections_are_retried(shared: Daemon) -> None:
    port = free_port()
    run = call_back(shared, f"http://127.0.0.1:{port}/")
    shared.wait_for(run, lambda state: state["callback"]["attempts"] >= 2)
    receiver = socket.create_server(("127.0.0.1", port))
    with receiver:
        client, _ = receiver.accept()
        with client:
            client.settimeout(5)
            assert b"X-Light-Run-Attempt: " in client.recv(65536)
            client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert callback(shared, run, "delivered")["attempts"] >= 3


def test_other_answers_are_final(shared: Daemon, receiver: Receiver) -> None:
    statuses = (301, 307, 400, 404, 410)
    for status in statuses:
        receiver.answer(status, {"Location": receiver.url, "Retry-After": "0"})
        run = call_back(shared, receiver.url)
        assert callback(shared, run, "failed") == {"status": "failed", "attempts": 1, "lastError": f"answered {status}"}
    assert not eventually(lambda: len(receiver.requests) > len(statuses), 0.7)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(shared: Daemon, receiver: Receiver, status: int) -> None:
    receiver.answer(status, {"Retry-After": "2"})
    run = call_back(shared, receiver.url)
    first, second = receiver.wait(2)
    assert 2 <= second.time - first.time < 3
    assert callback(shared, run, "delivered")["attempts"] == 2


def test_standard_webhooks(shared: Daemon, receiver: Receiver) -> None:
    key = base64.b64encode(secrets.token_bytes(24)).decode()
    receiver.answer(500)
    receiver.answer(500)
    run = call_back(shared, receiver.url, callbackSecret=f"whsec_{key}")
    got = receiver.wait(3)
    for request in got:
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert Webhook(key).verify(request.body, headers)["id"] == run
        assert headers["webhook-id"] == run
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 10
        assert headers["x-light-run-signature"] == module.signature(f"whsec_{key}", request.body)
    stamps = [int(request.headers["webhook-timestamp"]) for request in got]
    assert stamps[0] < stamps[-1]


# ---------------------------------------------------------------- Restarts


@pytest.mark.long
@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["SIGKILL", "SIGTERM"])
def test_attempts_go_on_after_a_restart(daemon: DaemonFactory, receiver: Receiver, killed: bool) -> None:
    lightrun = daemon(*NO_PULL, env={"LIGHTRUN_DELAYS": "4 0.2 0.2"})
    for _ in range(3):
        receiver.answer(500)
    run = call_back(lightrun, receiver.url, callbackSecret="0123456789abcdef")
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    if killed:
        lightrun.kill()
    else:
        assert lightrun.stop() == 0
    lightrun.start()
    assert lightrun.state(run)["callback"] == {"status": "pending", "attempts": 1, "lastError": "answered 500"}
    assert callback(lightrun, run, "delivered")["attempts"] == 4
    got = receiver.wait(4)
    assert attempts(got, run) == [1, 2, 3, 4]
    assert len({(request.body, request.headers["X-Light-Run-Signature"]) for request in got}) == 1
    assert 4 <= got[1].time - got[0].time < 6.5


@pytest.mark.parametrize(
    "trap",
    [
        "Store.finish after 1", "deliver after 1", "Store.attempted before 1",
        *longer("Callbacks.owe before 1", "Callbacks._attempt before 1", "deliver before 1", "Store.attempted after 1"),
    ],
)  # fmt: skip
def test_kill_around_an_attempt(daemon: DaemonFactory, receiver: Receiver, trap: str) -> None:
    lightrun = daemon(*NO_PULL, env={"LIGHTRUN_TRAP": trap})
    run = call_back(lightrun, receiver.url)
    assert lightrun.process.wait(30) == -9
    early = len(receiver.requests)
    assert early == (trap in {"deliver after 1", "Store.attempted before 1", "Store.attempted after 1"})
    lightrun.env["LIGHTRUN_TRAP"] = ""
    lightrun.start()
    assert callback(lightrun, run, "delivered")["attempts"] == 1
    got = receiver.wait()
    assert len(got) <= 2
    assert len(got) == 1 + early - (trap == "Store.attempted after 1")
    assert {request.body for request in got} == {got[0].body}
    assert eventually(lambda: not list((lightrun.state_dir / "secrets").iterdir()))


# ---------------------------------------------------------------- Clocks that are set


class Clock:
    """The wall clock of a daemon, which is set while it runs. Its monotonic clock is the real one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
        self.env = {
            "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_CACHE_DURATION": "1",  # seconds
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else locks with a timeout stall
        }  # fmt: skip

    def set(self, seconds: float) -> None:
        """Let it be ahead by so much, within a second."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+}\n")
        fresh.replace(self._file)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """A clock that is right, until it is set."""
    return Clock(tmp_path / "clock")


def time_of(lightrun: Daemon) -> float:
    """A daemon's own time of day."""
    return email.utils.parsedate_to_datetime(lightrun.request("GET", "/health").headers["Date"]).timestamp()


DAY = 24 * 3600


@pytest.mark.parametrize("step", [-DAY, *(pytest.param(step, marks=pytest.mark.long) for step in (DAY, -7))])
def test_a_clock_that_is_set_changes_no_delay(
    daemon: DaemonFactory, receiver: Receiver, other: Receiver, clock: Clock, step: int
) -> None:
    lightrun = daemon(*NO_PULL, env={**clock.env, "LIGHTRUN_DELAYS": "3 0.2"})
    for _ in range(2):
        receiver.answer(500)
    key = base64.b64encode(secrets.token_bytes(24)).decode()
    run = call_back(lightrun, receiver.url, callbackSecret=f"whsec_{key}")
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    clock.set(step)
    assert eventually(lambda: abs(time_of(lightrun) - time.time() - step) < 3, 3)
    call_back(lightrun, other.url)  # has the outbox look what is due
    other.wait()
    got = receiver.wait(3)
    assert 3 <= got[1].time - got[0].time < 6
    assert got[2].time - got[1].time < 3
    assert callback(lightrun, run, "delivered")["attempts"] == 3
    for request, ahead in zip(got, (0, step, step), strict=True):  # who verifies them compares with the time of day
        assert abs(int(request.headers["webhook-timestamp"]) - time.time() - ahead) < 20


@pytest.mark.long
@pytest.mark.parametrize(("delays", "retry_after"), [pytest.param("1 1 2.4", "1", marks=pytest.mark.long), ("1 1 1", "3")])
def test_a_clock_that_was_set_back_before_a_restart(
    daemon: DaemonFactory, receiver: Receiver, clock: Clock, delays: str, retry_after: str
) -> None:
    """What was due at a time that is far ahead now is due after the longest delay that there can be, 3 s here."""
    lightrun = daemon(*NO_PULL, env={**clock.env, "LIGHTRUN_DELAYS": delays, "LIGHTRUN_MAX_RETRY_AFTER": retry_after})
    receiver.answer(500)
    receiver.answer(500)
    run = call_back(lightrun, receiver.url)
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    lightrun.kill()
    clock.set(-DAY)
    begun = time.monotonic()
    lightrun.start()
    got = receiver.wait(3)
    assert 3 <= got[1].time - begun < 13
    assert 1 <= got[2].time - got[1].time < 4
    assert callback(lightrun, run, "delivered")["attempts"] == 3


@pytest.mark.long
def test_a_date_to_come_again_is_by_the_receivers_clock(daemon: DaemonFactory, receiver: Receiver, clock: Clock) -> None:
    clock.set(DAY)
    lightrun = daemon(*NO_PULL, env={**clock.env, "LIGHTRUN_DELAYS": "0.1 0.1"})
    receiver.answer(503, {"Retry-After": email.utils.formatdate(time.time() + 6, usegmt=True)})
    run = call_back(lightrun, receiver.url)
    first, second = receiver.wait(2)
    assert 2 < second.time - first.time < 7
    assert callback(lightrun, run, "delivered")["attempts"] == 2


@pytest.mark.long
def test_a_clock_that_is_set_cuts_no_upload(daemon: DaemonFactory, clock: Clock) -> None:
    """waitress looks each 30 s for connections on which nothing has come for 120 s."""
    lightrun = daemon(*NO_PULL, env=clock.env)
    with lightrun.connect() as connection:
        head = b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
        connection.sendall(head + b"{")
        clock.set(3600)
        assert eventually(lambda: time_of(lightrun) - time.time() > 3000, 3)
        connection.settimeout(35)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.sendall(b"}")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


# ---------------------------------------------------------------- What the disk does


@pytest.mark.long
def test_what_cannot_be_read_for_a_while_is_sent_later(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon(*NO_PULL, env={"LIGHTRUN_DELAYS": "1"})
    lightrun.may_log_tracebacks = True
    receiver.answer(500)
    run = call_back(lightrun, receiver.url)
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    file = lightrun.state_dir / "secrets" / f"{run}.callback"
    file.rename(lightrun.state_dir / "aside")
    file.mkdir()
    assert eventually(lambda: f"callback of run {run}\n" in lightrun.log())
    file.rmdir()
    (lightrun.state_dir / "aside").rename(file)
    assert callback(lightrun, run, "delivered")["attempts"] == 2


@pytest.mark.long
def test_an_outcome_that_cannot_be_written_for_a_while_is_written_later(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(delay=1)
    run = call_back(shared, receiver.url)
    receiver.wait()
    with contextlib.closing(sqlite3.connect(shared.state_dir / "lightrun.db", isolation_level=None)) as database:
        database.execute("ALTER TABLE runs RENAME COLUMN due TO away")
        try:
            assert eventually(lambda: f"callback of run {run}: " in shared.log())
            assert callback(shared, run, "pending")["attempts"] == 0
        finally:
            database.execute("ALTER TABLE runs RENAME COLUMN away TO due")
    assert callback(shared, run, "delivered")["attempts"] == 1
    assert len(receiver.requests) == 1


# ---------------------------------------------------------------- Receivers that hurt nobody else


@pytest.mark.long
def test_dead_and_slow_receivers_delay_no_other(daemon: DaemonFactory, receiver: Receiver, other: Receiver, trickle: str) -> None:
    lightrun = daemon(*NO_PULL, env={"LIGHTRUN_DELAYS": "30"})
    other.default = type(other.default)(delay=8)
    dead = f"http://127.0.0.1:{free_port()}/"
    slow = [call_back(lightrun, url) for _ in range(6) for url in (dead, trickle, other.url)]
    for run in slow:
        lightrun.wait(run)
    runs = []
    for _ in range(4):
        runs.append(call_back(lightrun, receiver.url, image=IMAGE, entrypoint=["echo", "hi"]))
        ended = lightrun.wait(runs[-1])
        assert ended["durationMs"] < 5000
        assert eventually(lambda: attempts(receiver.requests, runs[-1]) == [1], 2)
    trickled = lightrun.wait_for(slow[1], lambda state: state["callback"]["attempts"] == 1, 15)["callback"]
    assert trickled["status"] == "pending"
    assert re.match("no answer", trickled["lastError"])


def test_many_to_one_receiver_all_arrive(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(delay=0.2)
    runs = [call_back(shared, receiver.url) for _ in range(15)]
    for run in runs:
        assert callback(shared, run, "delivered")["attempts"] == 1
    assert sorted(request.headers["X-Light-Run-Id"] for request in receiver.requests) == sorted(runs)


@pytest.mark.long
def test_a_receiver_that_is_well_again_gets_several_at_a_time(shared: Daemon, receiver: Receiver) -> None:
    receiver.answer(500)
    receiver.answer(200, delay=4)  # while the others come to wait behind it
    receiver.default = type(receiver.default)(delay=1)
    runs = [call_back(shared, receiver.url)]
    receiver.wait(2)
    with ThreadPoolExecutor() as pool:
        runs += pool.map(lambda _: call_back(shared, receiver.url), range(10))
    for run in runs:
        callback(shared, run, "delivered", 40)
    began = [request.time for request in receiver.requests[1:]]
    assert began[1] - began[0] > 3
    assert max(sum(0 <= other - begun < 1 for other in began) for begun in began) == module.MAX_DELIVERIES_EACH


def strings(thing: Any, seen: set[int]) -> Iterator[str]:
    """Every text that an object holds, itself or by what it refers to."""
    if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, threading.Thread)):
        return
    seen.add(id(thing))
    if isinstance(thing, str):
        yield thing
    for other in gc.get_referents(thing):
        yield from strings(other, seen)


def test_nothing_is_kept_of_receivers_that_are_owed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs to ever new hosts, each of which answers in its own way."""
    monkeypatch.setattr(module, "CALLBACK_DELAYS", (0.1, 0.1))
    monkeypatch.setattr(module.log, "disabled", True)  # pytest would keep what is logged, errors and all
    store = module.Store(tmp_path)
    hosts = [f"127.0.{number}.1" for number in range(60)]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response((200, 404, 500)[int(self.headers["Host"].split(".")[2]) % 3])
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        callbacks = module.Callbacks(store, ())
        for host in hosts:
            run = module.Run(host, "image", time.time(), waited=False, callback={"status": "pending", "attempts": 0})
            store.add(run)
            run.reason, run.exit_code, run.finished = "exited", 0, time.time()
            about = {"url": f"http://{host}:{server.server_port}/", "secret": None}
            store.finish(run, b"", json.dumps(about).encode() + b"\n{}")
            callbacks.owe(host)
        assert eventually(lambda: not store.owed())
        server.shutdown()
        thread.join()
    outcomes = collections.Counter(json.loads(store.head(host))["callback"]["attempts"] for host in hosts)
    assert outcomes == {1: 40, 3: 20}

    def names() -> set[str]:
        return {text.partition(":")[0] for text in strings(vars(callbacks), {id(store)}) if text.startswith("127.0.")}

    assert eventually(lambda: len(names()) <= 1, 2), names()  # the dispatcher may not have let go of the last one
    store.close()


# ---------------------------------------------------------------- Deletion and eviction


def test_deletion_drops_what_is_owed(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(500)
    run = call_back(shared, receiver.url)
    shared.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    assert shared.request("DELETE", f"/runs/{run}").status == 204
    seen = len(receiver.requests)
    assert not eventually(lambda: len(receiver.requests) > seen + 1, 2)
    assert not list((shared.state_dir / "secrets").glob(f"{run}*"))


@pytest.mark.long
def test_deleted_runs_hold_up_no_other_of_their_receiver(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(delay=4)
    runs = []
    for _ in range(9):  # One after the other, so that they wait in this order.
        runs.append(call_back(shared, receiver.url))
        shared.wait(runs[-1])
    begun = {request.headers["X-Light-Run-Id"] for request in receiver.wait(4)}
    parked = [run for run in runs if run not in begun]
    for run in parked[:-1]:
        assert shared.request("DELETE", f"/runs/{run}").status == 204
    receiver.default = type(receiver.default)()
    assert callback(shared, parked[-1], "delivered")["attempts"] == 1
    assert {request.headers["X-Light-Run-Id"] for request in receiver.requests} == {*begun, parked[-1]}


def test_eviction_spares_runs_that_owe(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon(*NO_PULL, "--keep", "1", env={"LIGHTRUN_DELAYS": " ".join(["1"] * 60)})
    receiver.default = type(receiver.default)(500)
    owing = call_back(lightrun, receiver.url)
    lightrun.wait_for(owing, lambda state: state["callback"]["attempts"] == 1)
    others = [lightrun.run(image=ABSENT)["id"] for _ in range(3)]
    assert eventually(lambda: len(lightrun.request("GET", "/runs").json()) == 2)
    assert {state["id"] for state in lightrun.request("GET", "/runs").json()} == {owing, others[-1]}
    receiver.default = type(receiver.default)()
    callback(lightrun, owing, "delivered")
    last = lightrun.run(image=ABSENT)["id"]
    assert eventually(lambda: [state["id"] for state in lightrun.request("GET", "/runs").json()] == [last])
