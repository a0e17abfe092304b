"""Signals: how the daemon ends, who still gets an answer, and what SIGHUP does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

from conftest import HELD, TAMED, Daemon, DaemonFactory, Response, eventually, longer, release
from engine import IMAGE, engine_host
from lightrun import Ask, Killing
from relay import Relay, unix_socket

MIB = 1 << 20
LONG = {"image": IMAGE, "entrypoint": "echo ready; sleep 60", "network": "none"}
NDJSON = {"Accept": "application/x-ndjson"}
# What the daemon may take beyond --drain: to record what it killed, for the last answers, for a busy machine.
KILL_SECONDS, LATE_SECONDS = 5, 4


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(60) as threads:
        yield threads


def waiting(pool: ThreadPoolExecutor, daemon: Daemon, count: int = 1, **fields: Any) -> list[Future[Response]]:
    """Clients that wait for runs, each of which has started."""
    begun = [pool.submit(daemon.request, "POST", "/run", {**LONG, **fields}) for _ in range(count)]

    def all_started() -> bool:
        runs = daemon.request("GET", "/runs?limit=1000").json()
        return bool(sum(run.get("phase") == "running" for run in runs) >= count)

    assert eventually(all_started, 60), daemon.log()
    return begun


def ended(daemon: Daemon, most: float) -> float:
    """The seconds until the daemon has ended, at most that many, with exit code 0."""
    began = time.monotonic()
    assert daemon.process.wait(60) == 0, daemon.log()
    took = time.monotonic() - began
    assert took < most, f"took {took:.1f} s\n{daemon.log()}"
    return took


def terminate(daemon: Daemon) -> None:
    """SIGTERM, which is heard when this returns."""
    daemon.process.terminate()
    assert eventually(lambda: "going down" in daemon.log())


def test_a_deadline_far_away_puts_off_no_kill() -> None:
    """It may become known after a stop: that of a container that was just taken up, or has just started."""
    killing, asked = Killing(), Ask("stopped", "SIGTERM", 0)
    assert not killing.due(None)
    assert killing.due(asked)
    assert (killing.signal, killing.reason) == ("SIGTERM", "stopped")
    killing.next(answered=True)
    killing.by(time.monotonic() + 3600)
    assert killing.due(asked)
    assert (killing.signal, killing.reason) == ("SIGKILL", "stopped")


# ---------------------------------------------------------------- Who waits


def test_every_waiting_client_gets_its_answer(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon("--drain", "2s")
    answers = waiting(pool, lightrun, 4)
    terminate(lightrun)
    states = [answer.result().json() for answer in answers]
    assert [(state["reason"], state["status"], state["exitCode"]) for state in states] == [("interrupted", "cancelled", 137)] * 4
    ended(lightrun, 2 + KILL_SECONDS + LATE_SECONDS)


@pytest.mark.long
def test_the_drain_is_long_enough_for_a_run(daemon: DaemonFactory, pool: ThreadPoolExecutor, engine: docker.APIClient) -> None:
    lightrun = daemon("--drain", "1m")
    answers = waiting(pool, lightrun, entrypoint=f"echo ready; {HELD}; echo done")
    (run,) = (each["id"] for each in lightrun.request("GET", "/runs").json())
    terminate(lightrun)
    assert not eventually(answers[0].done, 1)
    release(engine, run)
    state = answers[0].result().json()
    assert (state["reason"], state["logs"]) == ("exited", ["ready", "done"])
    ended(lightrun, LATE_SECONDS)


def test_an_idle_daemon_ends_at_once(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    """Connections that have asked nothing, or not all of it, have no claim; nor has a detached run."""
    lightrun = daemon()
    run = lightrun.detach(**{**LONG, "entrypoint": HELD})
    lightrun.wait_for(run, lambda state: state.get("phase") == "running")
    idle = http.client.HTTPConnection("127.0.0.1", lightrun.port, timeout=10)
    with contextlib.closing(idle), lightrun.connect() as half:
        half.sendall(b"GET /runs HTTP/1.1\r\nHost: loc")
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        terminate(lightrun)
        ended(lightrun, LATE_SECONDS)
        assert idle.sock.recv(100) == b""
    lightrun.start()
    release(engine, run)
    assert lightrun.wait(run)["reason"] == "exited"


def test_who_waits_for_a_run_that_goes_on(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    """?wait answers what there is when the time is up; a stream breaks off, and can be told from one that has ended."""
    lightrun = daemon("--drain", "2s")
    run = lightrun.detach(**LONG)
    lightrun.wait_for(run, lambda state: state["logs"])
    waiter = pool.submit(lightrun.request, "GET", f"/runs/{run}?wait=60000")
    with lightrun.open("GET", f"/runs/{run}/logs?follow=true") as follower:
        assert follower.read1(100) == b"ready\n"
        terminate(lightrun)
        state = waiter.result()
        assert (state.status, state.json()["status"]) == (200, "running")
        with pytest.raises(http.client.IncompleteRead):
            follower.read()
    ended(lightrun, LATE_SECONDS)
    lightrun.start()
    assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
    assert lightrun.wait(run)["reason"] == "cancelled"


def test_who_waits_for_a_run_that_ends_in_time(
    daemon: DaemonFactory, pool: ThreadPoolExecutor, engine: docker.APIClient
) -> None:
    lightrun = daemon("--drain", "1m")
    run = lightrun.detach(**{**LONG, "entrypoint": f"echo ready; {HELD}; echo done"})
    lightrun.wait_for(run, lambda state: state["logs"])
    waiter = pool.submit(lightrun.request, "GET", f"/runs/{run}?wait=60000")
    with lightrun.open("GET", f"/runs/{run}/logs?follow=true") as follower:
        assert follower.read1(100) == b"ready\n"
        terminate(lightrun)
        release(engine, run)
        assert follower.read() == b"done\n"
    assert waiter.result().json()["reason"] == "exited"
    ended(lightrun, LATE_SECONDS)


def test_a_live_run_is_told_to_its_end(daemon: DaemonFactory) -> None:
    lightrun = daemon("--drain", "2s")
    with lightrun.open("POST", "/run", json=LONG, headers=NDJSON) as response:
        events = (json.loads(line) for line in response)
        assert next(event for event in events if event["event"] == "log")["line"] == "ready"
        terminate(lightrun)
        last = list(events)[-1]
    assert (last["event"], last["run"]["reason"]) == ("finished", "interrupted")
    ended(lightrun, KILL_SECONDS + LATE_SECONDS)


# ---------------------------------------------------------------- Who reads, slowly or not at all


@pytest.fixture(scope="module")
def download() -> dict[str, Any]:
    """A run that leaves more than any buffer of the kernel holds."""
    script = f"head -c {20 * MIB} /dev/zero > big; head -c {MIB} /dev/zero | tr '\\0' x"
    return {"entrypoint": script, "extract": ["big"], "network": "none"}


@pytest.mark.parametrize(("path", "size"), [("/artifacts/big", 20 * MIB), ("/logs", MIB)])
def test_an_answer_on_its_way_arrives_whole(daemon: DaemonFactory, download: dict[str, Any], path: str, size: int) -> None:
    lightrun = daemon("--drain", "30s")
    run = lightrun.run(**download)["id"]
    with lightrun.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(f"GET /runs/{run}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            terminate(lightrun)
            assert len(response.read()) == size
        ended(lightrun, LATE_SECONDS)


@pytest.mark.long
def test_who_never_reads_has_until_the_end_of_the_drain(daemon: DaemonFactory, download: dict[str, Any]) -> None:
    lightrun = daemon("--drain", "2s")
    run = lightrun.run(**download)["id"]
    with lightrun.connect() as connection:
        connection.sendall(f"GET /runs/{run}/artifacts/big HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        terminate(lightrun)
        assert ended(lightrun, 2 + LATE_SECONDS) > 1
    assert "did not take their answers" in lightrun.log()


# ---------------------------------------------------------------- What comes late


def test_what_is_said_from_the_signal_on(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon("--drain", "4s")
    kept = lightrun.run(entrypoint="true", network="none")["id"]
    answers = waiting(pool, lightrun)
    terminate(lightrun)
    health = lightrun.request("GET", "/health")
    assert (health.status, health.json()["status"], health.json()["docker"]) == (503, "stopping", True)
    described = lightrun.request("GET", "/openapi.json").json()["components"]["schemas"]["Health"]
    assert "stopping" in described["properties"]["status"]["enum"]
    for fields in ({}, {"detached": True}):
        refused = lightrun.request("POST", "/run", {**LONG, **fields})
        assert (refused.status, refused.json()["error"]) == (503, "stopping")
        assert int(refused.headers["Retry-After"]) > 0
    state = lightrun.request("GET", f"/runs/{kept}")
    assert (state.status, state.headers["Connection"]) == (200, "close")
    assert lightrun.request("DELETE", f"/runs/{kept}").status == 204
    assert answers[0].result().json()["reason"] == "interrupted"
    ended(lightrun, KILL_SECONDS + LATE_SECONDS)


def test_a_late_request_gets_an_answer_or_no_connection(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    """Clients that never stop asking: the daemon ends all the same, and tells nobody of a database that is closed."""
    lightrun = daemon("--drain", "3s")
    kept = lightrun.run(entrypoint="true", network="none")["id"]
    requests = [
        ("GET", "/runs", None),
        ("GET", f"/runs/{kept}", None),
        ("POST", "/run", {"image": IMAGE, "entrypoint": "true", "network": "none", "detached": True}),
        ("POST", f"/runs/{kept}/cancel", None),
        ("GET", "/health", None),
    ]
    told: list[tuple[int, str]] = []

    def ask(method: str, path: str, body: Any) -> None:
        while lightrun.running:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the end
                answer = lightrun.request(method, path, json=body)
                told.append((answer.status, answer.json()["error"] if answer.status in (500, 503) and path == "/run" else ""))

    clients = [pool.submit(ask, *request) for request in requests]
    assert eventually(lambda: len(told) > 20)
    terminate(lightrun)
    ended(lightrun, 3 + LATE_SECONDS)
    for client in clients:
        client.result()
    assert {status for status, _ in told} <= {200, 202, 204, 409, 503}
    assert {error for _, error in told} <= {"", "stopping", "busy"}
    lightrun.start()
    for run in lightrun.request("GET", "/runs?limit=1000").json():
        assert lightrun.wait(run["id"], 60)["reason"] == "exited"


@pytest.mark.long
def test_a_hung_engine_costs_one_deadline_for_all(daemon: DaemonFactory, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Their ends cannot be recorded: no answer is made up, and the next start ends them."""
    relay = Relay(unix_socket(str(tmp_path / "engine")))
    lightrun = daemon("--drain", "2s", "--docker-host", relay.url, start=False)
    with contextlib.closing(relay):
        lightrun.start()
        answers = waiting(pool, lightrun, 3)
        relay.freeze()
        terminate(lightrun)
        ended(lightrun, 2 + KILL_SECONDS + LATE_SECONDS)
        for answer in answers:
            with pytest.raises((OSError, http.client.HTTPException)):
                answer.result()
    lightrun.command[-1] = engine_host()
    lightrun.start()
    for run in lightrun.request("GET", "/runs").json():
        assert lightrun.wait(run["id"])["reason"] == "interrupted"


# ---------------------------------------------------------------- SIGHUP, and signals that come early


def authorized(daemon: Daemon, token: str) -> bool:
    """Whether the daemon knows this token."""
    return daemon.request("GET", "/runs", headers={"Authorization": f"Bearer {token}"}).status == 200


def hang_up(daemon: Daemon, said: str) -> None:
    """SIGHUP, and what the daemon says to it."""
    before = daemon.log().count(said)
    daemon.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: daemon.log().count(said) > before), daemon.log()


def test_sighup_reads_the_tokens_again(daemon: DaemonFactory, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n")
    lightrun = daemon("--token-file", str(tokens), "--token", "always")
    tokens.write_text("second\nthird\n")
    assert authorized(lightrun, "first")
    hang_up(lightrun, "was read again")
    known = ("always", "first", "second", "third")
    assert [authorized(lightrun, token) for token in known] == [True, False, True, True]
    lightrun.token = "always"


@pytest.mark.parametrize("spoil", ["empty", "blank", "binary", "huge", "missing", "folder", "pipe", "shut"])
def test_a_bad_token_file_changes_nothing(daemon: DaemonFactory, tmp_path: Path, spoil: str) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n")
    lightrun = daemon("--token-file", str(tokens), start=False)
    lightrun.command = [*TAMED, *lightrun.command]
    lightrun.start()
    lightrun.token = "first"
    if spoil == "shut":
        tmp_path.chmod(0)
    else:
        tokens.unlink()
    contents = {"empty": b"", "blank": b"\n \n", "binary": b"\xff\xfe\n", "huge": b"x" * 2 * MIB}
    if spoil in contents:
        tokens.write_bytes(contents[spoil])
    elif spoil == "folder":
        tokens.mkdir()
    elif spoil == "pipe":
        os.mkfifo(tokens)
    hang_up(lightrun, "the tokens stay" if spoil == "shut" else "token-file")
    assert authorized(lightrun, "first")
    assert not authorized(lightrun, "")


def test_sighup_without_a_token_file_is_ignored(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    hang_up(lightrun, "SIGHUP")
    assert lightrun.run(entrypoint="true", network="none")["reason"] == "exited"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), *longer((signal.SIGHUP, None), (signal.SIGINT, 0))],
    ids=lambda value: str(value),
)
def test_a_signal_while_it_starts(daemon: DaemonFactory, tmp_path: Path, number: signal.Signals, code: int | None) -> None:
    """It is kept until there is a daemon that can heed it: here the engine hangs at the first question."""
    relay = Relay(unix_socket(str(tmp_path / "engine")))
    relay.freeze()
    with contextlib.closing(relay):
        lightrun = daemon("--docker-host", relay.url, start=False).start(wait=False)
        assert eventually(lambda: (lightrun.state_dir / "lightrun.db").exists())
        lightrun.process.send_signal(number)
        if code is None:
            assert eventually(lambda: "SIGHUP" in lightrun.log())
            lightrun.process.terminate()
        assert lightrun.process.wait(20) == 0, lightrun.log()


# ---------------------------------------------------------------- Standard error


def errors_to(daemon: Daemon, sink: int) -> subprocess.Popen[bytes]:
    """Start a daemon that writes its log to this descriptor."""
    process = subprocess.Popen(
        daemon.command, env=daemon.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sink, cwd=daemon.folder
    )
    daemon._process = process
    (daemon.folder / "log").touch()
    assert eventually(daemon.healthy)
    return process


def read_until(descriptor: int, found: Callable[[bytes], bool]) -> bytes:
    """What comes out of a pipe, until it is as wanted."""
    received = b""
    os.set_blocking(descriptor, False)

    def look() -> bool:
        nonlocal received
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(descriptor, 65536):
                received += piece
        return found(received)

    assert eventually(look), received[-2000:]
    return received


def told_or_lost(received: bytes) -> int:
    """How many requests a log of JSON tells of, and how many lines of it are said to be lost."""
    whole, _, _ = received.rpartition(b"\n")
    messages = [json.loads(line)["message"] for line in whole.splitlines()]
    return sum(int(message.split()[0]) if message.endswith("nobody took them") else " 404 " in message for message in messages)


def chatter(daemon: Daemon, count: int) -> None:
    """Requests that make long lines in the log."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    with contextlib.closing(connection):
        for _ in range(count):
            connection.request("GET", "/" + "x" * 1000)
            assert connection.getresponse().read()


@pytest.mark.long
@pytest.mark.parametrize("nonblocking", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_log_that_nobody_reads_stops_nothing(daemon: DaemonFactory, nonblocking: bool) -> None:
    lightrun = daemon("--log-format", "json", start=False)
    source, sink = os.pipe()
    os.set_blocking(sink, not nonblocking)
    try:
        errors_to(lightrun, sink)
        os.close(sink)
        chatter(lightrun, 2000)  # Some 2.2 MB, and a pipe takes 64 KiB.
        assert lightrun.run(entrypoint="true", network="none")["reason"] == "exited"
        received = read_until(source, lambda received: told_or_lost(received) >= 2000)
        assert told_or_lost(received) < 2010
        assert b"nobody took them" in received
        chatter(lightrun, 1)
        read_until(source, lambda received: b" 404 " in received)
        chatter(lightrun, 200)
        lightrun.process.terminate()
        assert lightrun.process.wait(10) == 0  # with a full pipe again
    finally:
        os.close(source)


def test_a_log_that_cannot_be_written_stops_nothing(daemon: DaemonFactory) -> None:
    """A reader that has gone (EPIPE), and a disk that is full."""
    for target in ("pipe", "/dev/full"):
        lightrun = daemon(start=False)
        if target == "pipe":
            source, sink = os.pipe()
            os.close(source)
        else:
            sink = os.open(target, os.O_WRONLY)
        errors_to(lightrun, sink)
        os.close(sink)
        chatter(lightrun, 50)
        assert lightrun.run(entrypoint="true", network="none")["reason"] == "exited"
        assert lightrun.stop() == 0


def test_what_is_said_last_is_written(daemon: DaemonFactory) -> None:
    """A reader that is slow gets the whole log, whose end is queued when the daemon ends."""
    lightrun = daemon(start=False)
    source, sink = os.pipe()
    try:
        errors_to(lightrun, sink)
        os.close(sink)
        chatter(lightrun, 100)
        lightrun.process.terminate()
        received = read_until(source, lambda received: b"going down" in received)
        assert received.count(b" 404 ") == 100
        assert lightrun.process.wait(10) == 0
    finally:
        os.close(source)


def test_closed_standard_streams_are_no_files_of_the_daemon(daemon: DaemonFactory) -> None:
    """Else the database would be opened as descriptor 2, and the log be written into it."""
    lightrun = daemon(start=False)
    lightrun._process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *lightrun.command], env=lightrun.env, cwd=lightrun.folder
    )
    (lightrun.folder / "log").touch()
    assert eventually(lightrun.healthy)
    descriptors = Path(f"/proc/{lightrun.pid}/fd")
    assert {str((descriptors / name).readlink()) for name in "012"} == {"/dev/null"}
    assert lightrun.run(entrypoint="true", network="none")["reason"] == "exited"
    assert lightrun.stop() == 0
