"""The outbox: callbacks that are owed arrive, in their own time, whatever happens to the daemon or the other receivers.

One attempt by itself is tested in test_callbacks.py.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

import lightrun as module
from conftest import ROOT, Daemon, DaemonFactory, Received, Receiver, eventually, free_port

DELAYS = (0.4, 0.8, 1.2, 1.6, 2.0)
QUICK = {"LIGHTRUN_DELAYS": " ".join(map(str, DELAYS))}


@pytest.fixture(scope="session")
def pyz() -> Path:
    """Instead of the zip: the daemon whose retries can be made quick."""
    return ROOT / "tests/launcher.py"


@pytest.fixture(scope="module")
def shared(module_daemon: DaemonFactory) -> Daemon:
    """One daemon for all tests that need no start or end of theirs."""
    return module_daemon("--pull", "never", env=QUICK)


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
    """A short run that is to tell this URL."""
    return lightrun.detach(entrypoint=["echo", "hi"], network="none", callbackUrl=url, **fields)


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


@pytest.mark.parametrize("status", [301, 307, 400, 404, 410])
def test_other_answers_are_final(shared: Daemon, receiver: Receiver, status: int) -> None:
    receiver.answer(status, {"Location": receiver.url, "Retry-After": "0"})
    run = call_back(shared, receiver.url)
    assert callback(shared, run, "failed") == {"status": "failed", "attempts": 1, "lastError": f"answered {status}"}
    assert not eventually(lambda: len(receiver.requests) > 1, 0.7)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(shared: Daemon, receiver: Receiver, status: int) -> None:
    receiver.answer(status, {"Retry-After": "3"})
    run = call_back(shared, receiver.url)
    first, second = receiver.wait(2)
    assert 3 <= second.time - first.time < 4
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


@pytest.mark.parametrize("killed", [True, False], ids=["SIGKILL", "SIGTERM"])
def test_attempts_go_on_after_a_restart(daemon: DaemonFactory, receiver: Receiver, killed: bool) -> None:
    lightrun = daemon(env={"LIGHTRUN_DELAYS": "5 0.2 0.2"})
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
    assert 5 <= got[1].time - got[0].time < 7.5


@pytest.mark.parametrize(
    "trap",
    [
        "Store.finish after 1", "Callbacks.owe before 1", "Callbacks._attempt before 1", "deliver before 1", "deliver after 1",
        "Store.attempted before 1", "Store.attempted after 1",
    ],
)  # fmt: skip
def test_kill_around_an_attempt(daemon: DaemonFactory, receiver: Receiver, trap: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": trap})
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


# ---------------------------------------------------------------- Receivers that hurt nobody else


def test_dead_and_slow_receivers_delay_no_other(daemon: DaemonFactory, receiver: Receiver, other: Receiver, trickle: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_DELAYS": "30"})
    other.default = type(other.default)(delay=8)
    dead = f"http://127.0.0.1:{free_port()}/"
    slow = [call_back(lightrun, url) for _ in range(6) for url in (dead, trickle, other.url)]
    for run in slow:
        lightrun.wait(run)
    runs = []
    for _ in range(8):
        runs.append(call_back(lightrun, receiver.url))
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


# ---------------------------------------------------------------- Deletion and eviction


def test_deletion_drops_what_is_owed(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(500)
    run = call_back(shared, receiver.url)
    shared.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    assert shared.request("DELETE", f"/runs/{run}").status == 204
    seen = len(receiver.requests)
    assert not eventually(lambda: len(receiver.requests) > seen + 1, 2)
    assert not list((shared.state_dir / "secrets").glob(f"{run}*"))


def test_deleted_runs_hold_up_no_other_of_their_receiver(shared: Daemon, receiver: Receiver) -> None:
    receiver.default = type(receiver.default)(delay=6)
    runs = []
    for _ in range(9):  # One after the other, so that they wait in this order.
        runs.append(call_back(shared, receiver.url, image="lightrun/no-such-image"))  # which ends at once
        shared.wait(runs[-1])
    begun = {request.headers["X-Light-Run-Id"] for request in receiver.wait(4)}
    parked = [run for run in runs if run not in begun]
    for run in parked[:-1]:
        assert shared.request("DELETE", f"/runs/{run}").status == 204
    receiver.default = type(receiver.default)()
    assert callback(shared, parked[-1], "delivered")["attempts"] == 1
    assert {request.headers["X-Light-Run-Id"] for request in receiver.requests} == {*begun, parked[-1]}


def test_eviction_spares_runs_that_owe(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon("--keep", "1", env={"LIGHTRUN_DELAYS": "8"})
    receiver.answer(500)
    owing = call_back(lightrun, receiver.url)
    lightrun.wait_for(owing, lambda state: state["callback"]["attempts"] == 1)
    others = [lightrun.run(network="none", entrypoint=["true"])["id"] for _ in range(3)]
    assert eventually(lambda: len(lightrun.request("GET", "/runs").json()) == 2)
    assert {state["id"] for state in lightrun.request("GET", "/runs").json()} == {owing, others[-1]}
    callback(lightrun, owing, "delivered")
    last = lightrun.run(network="none", entrypoint=["true"])["id"]
    assert eventually(lambda: [state["id"] for state in lightrun.request("GET", "/runs").json()] == [last])
