"""Whatever the engine does at whatever call, and whatever its clock says: the fault matrix, and single faults looked at closely.

The matrix here is a sample, of another seed with `LIGHTRUN_FAULT_SEED=7`; `python3 tests/faults.py --all` is every cell.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import http.client
import itertools
import json
import os
import socket
import ssl
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faults
import lightrun as lightrun_module
from conftest import Daemon, DaemonFactory, certify_localhost, eventually, longer
from engine import IMAGE, EngineApi, UnixConnection
from faults import Proxy
from images import Registry, remove_image

SEED = int(os.environ.get("LIGHTRUN_FAULT_SEED", "0"))
CELLS = int(os.environ.get("LIGHTRUN_FAULT_CELLS", "4"))
Proxied = Callable[..., tuple[Daemon, Proxy]]
NDJSON = {"Accept": "application/x-ndjson"}
END_SECONDS = 20.0  # for what has to notice a fault first
HEARD_SECONDS = 5.5
PATIENT_SECONDS = 8.0


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    """The proxies of a test, which outlive its daemons."""
    made: list[Proxy] = []
    yield made
    for proxy in made:
        proxy.close()


@pytest.fixture
def proxied(proxies: list[Proxy], daemon: DaemonFactory) -> Iterator[Proxied]:
    """A function that starts daemons, each behind a proxy of its own; what still is broken at the end is mended first."""

    def make(*options: str) -> tuple[Daemon, Proxy]:
        proxies.append(Proxy())
        lightrun = daemon("--docker-host", proxies[-1].host, *options, start=False, socket=True)
        return faults.lowered(lightrun).start(), proxies[-1]

    yield make
    for proxy in proxies:
        proxy.mend()


def detach(lightrun: Daemon, script: str, **fields: Any) -> str:
    """A detached run that needs no network."""
    return lightrun.detach(entrypoint=script, network="none", **fields)


def moment(state: dict[str, Any], name: str) -> float:
    """A time of a state, in seconds."""
    return datetime.datetime.fromisoformat(state[name].replace("Z", "+00:00")).timestamp()


# ---------------------------------------------------------------- The matrix


@pytest.mark.timeout(400)
def test_sample_of_the_matrix(engine: docker.APIClient) -> None:
    copy = faults.Cell("detached", "cancel", "logs", "mid", "silent")  # no sample is to miss it: it once took 15 s
    failures = faults.run_cells(engine, [copy, *faults.sample(faults.all_cells(), SEED, CELLS)], 4)
    assert not failures, "\n".join(sorted(failures))


@pytest.mark.long
@pytest.mark.parametrize("tcp", [False, pytest.param(True, marks=pytest.mark.long)], ids=["unix", "tcp"])
def test_the_proxy_injects_what_it_says(engine: docker.APIClient, tcp: bool) -> None:
    proxy = Proxy(tcp)

    def seen(point: str = "", fault: str = "", times: int = 1) -> Any:
        """Status and JSON that a client gets, or the error; what never comes is not waited for as long as what is slow."""
        patience = 0.4 if fault in {"silent", "hang"} else 5
        if fault:
            proxy.inject("version", point, fault, times)
        host, port = proxy.host.removeprefix("tcp://"), None
        connection = http.client.HTTPConnection(host, port, timeout=patience) if tcp else UnixConnection(host[7:], patience)
        try:
            connection.request("GET", "/version")
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())["Version"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            return type(error)
        except (TypeError, LookupError):
            return "shape"
        finally:
            connection.close()

    try:
        fine = seen()
        assert fine == (200, EngineApi().version())
        for point in ("before", "after"):
            assert seen(point, "close") is http.client.RemoteDisconnected
            assert seen(point, "reset") is ConnectionResetError
            assert seen(point, "silent") is seen(point, "hang") is TimeoutError
            assert seen(point, "garbage") is http.client.BadStatusLine
            assert {seen(point, fault) for fault in ("html", "cut", "502", "odd")} == {json.JSONDecodeError}
            assert seen(point, "shape") == "shape"
        assert seen("mid", "close") is http.client.IncompleteRead
        assert seen("mid", "reset") is ConnectionResetError
        assert seen("mid", "silent") is seen("mid", "hang") is TimeoutError
        began = time.monotonic()
        assert seen("mid", "trickle") == fine
        assert time.monotonic() - began > 2
        assert proxy.count("version") == 1 + 2 * 10 + 5
        proxy.mend()
        assert seen() == fine
        proxy.inject("any", "before", "refuse")
        assert seen() is ConnectionRefusedError
        proxy.mend()
        assert seen() == fine
    finally:
        proxy.close()


# ---------------------------------------------------------------- Output


@pytest.mark.parametrize("how", ["end", pytest.param("reset", marks=pytest.mark.long)])
def test_output_that_ends_early(proxied: Proxied, how: str) -> None:
    """The log is whole all the same; who follows it gets all of it, or an error that cannot be overlooked."""
    lightrun, proxy = proxied("--max-concurrent", "2")
    lines = [f"line {number}" for number in range(8)]
    script = "i=0; while [ $i -lt 8 ]; do echo line $i; echo err $i >&2; sleep 0.3; i=$((i+1)); done; exit 3"
    proxy.inject("attach", "mid", how, times=2, after=100)

    def read(opened: Any) -> tuple[list[bytes], bool]:
        """The lines of an answer, and whether it seems to be all."""
        got: list[bytes] = []
        try:
            with opened as response:
                while line := response.readline():
                    got.append(line)
        except (OSError, http.client.HTTPException):
            return got, False
        return got, True

    body = {"image": IMAGE, "entrypoint": script, "network": "none"}
    with ThreadPoolExecutor(1) as pool:
        live = pool.submit(read, lightrun.open("POST", "/run", json=body, headers=NDJSON))
        run = detach(lightrun, script)
        lightrun.wait_for(run, lambda state: state["logs"])
        raw, whole = read(lightrun.open("GET", f"/runs/{run}/logs?follow=true&stream=stdout"))
    text, wanted = b"".join(raw).decode(), "".join(f"{line}\n" for line in lines)
    assert text == wanted if whole else wanted.startswith(text)
    events = [json.loads(line) for line in live.result()[0]]
    for stream, each in (("stdout", lines), ("stderr", [f"err {number}" for number in range(8)])):
        got = [event["line"] for event in events if event.get("stream") == stream]
        assert got == each[: len(got)]
        assert got == each or events[-1]["event"] != "finished"
    for state in (lightrun.wait(run), *(event["run"] for event in events if event["event"] == "finished")):
        assert (state["reason"], state["exitCode"], state["logsTruncated"]) == ("exited", 3, False)
        assert [line for line in state["logs"] if line.startswith("line")] == lines
        assert len(state["logs"]) == 16


@pytest.mark.long
def test_output_that_falls_silent(proxied: Proxied) -> None:
    """No FIN ever comes: the container's end is noticed, and what is asked of the run is done."""
    lightrun, proxy = proxied("--max-concurrent", "4")
    proxy.inject("attach", "mid", "silent")
    ended = detach(lightrun, "echo ready; sleep 1; exit 3")
    late, cancelled, stopped = (detach(lightrun, "echo ready; sleep 60", timeout=ms) for ms in (3000, 60_000, 60_000))
    for run, action in ((cancelled, "cancel"), (stopped, "stop")):
        lightrun.wait_for(run, lambda state: "startedAt" in state)
        assert eventually(lambda: proxy.count("start") == 4)
        assert lightrun.request("POST", f"/runs/{run}/{action}").status == 204
        assert lightrun.wait(run, HEARD_SECONDS)["reason"] == {"cancel": "cancelled", "stop": "stopped"}[action]
    assert lightrun.wait(late, 3 + END_SECONDS)["reason"] == "timeout"
    state = lightrun.wait(ended, END_SECONDS)
    assert (state["reason"], state["exitCode"]) == ("exited", 3)
    for run in (ended, late):
        state = lightrun.state(run)
        assert state["logs"] == ["ready"] or state["logsTruncated"]


ONCE = "sleep 0.3; head -c 20000000 /dev/zero; exit 3"
FLOODS = {
    "timeout": ("kill", "cat /dev/zero", {"timeout": 700}, ("timeout", 137)),
    "outputLimit": ("kill", "cat /dev/zero", {"outputLimit": 65536}, ("output_limit", 137)),
    "end": ("inspect", ONCE, {}, ("exited", 3)),
    "exec": ("exec-state", ONCE, {}, ("exited", 3)),
}


@pytest.mark.parametrize("flood", ["timeout", "exec", *longer("end", "outputLimit")])
def test_a_flood_is_read_while_the_engine_is_asked(proxied: Proxied, flood: str) -> None:
    """An engine has no answer to a kill or a look as long as nobody takes the container's last output."""
    call, script, fields, expected = FLOODS[flood]
    lightrun, proxy = proxied()
    with ThreadPoolExecutor() as pool:
        if flood == "exec":
            run = lightrun.detach(idle=60_000, network="none")
            lightrun.wait_for(run, lambda state: state["phase"] == "running")
            rule = proxy.inject(call, "before", "hang", times=1)
            done = pool.submit(lambda: lightrun.request("POST", f"/runs/{run}/exec", json={"entrypoint": script}).json())
        else:
            rule = proxy.inject(call, "before", "hang", times=1)
            run = detach(lightrun, script, **fields)
            done = pool.submit(lightrun.wait, run)
        assert eventually(lambda: rule.held)
        time.sleep(1)  # of cat, enough to fill whatever lies on the way
        proxy.mend()
        state = done.result(END_SECONDS)
    assert (state["reason"], state["exitCode"]) == expected
    assert "did not answer" not in lightrun.log()
    if flood == "exec":
        assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
        lightrun.wait(run)


@pytest.mark.long
def test_a_flood_of_short_lines_is_soon_over(daemon: DaemonFactory) -> None:
    """An engine tells its copy of a log line by line."""
    lightrun = daemon()
    run = lightrun.detach(entrypoint=["yes"])
    lightrun.wait_for(run, lambda state: "startedAt" in state)
    time.sleep(4)  # of yes: enough for the copy to be full
    assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
    state = lightrun.wait(run, 9)
    assert (state["reason"], state["logsTruncated"]) == ("cancelled", True)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=30), st.lists(st.integers(1, 50), min_size=1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunks_are_read_however_they_come(body: list[bytes], cuts: list[int], whole: bool) -> None:
    """As http.client reads them, and a body that is cut off is told from one that ends."""
    ours, theirs = socket.socketpair()
    text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    text += b"".join(b"%x;a=1\r\n%b\r\n" % (len(each), each) for each in body) + b"0\r\n\r\n" * whole

    def send() -> None:
        with theirs:
            theirs.recv(65536)
            at = 0
            for count in itertools.cycle(cuts):
                theirs.sendall(text[at : at + count])
                at += count
                if at >= len(text):
                    return

    sender = threading.Thread(target=send)
    sender.start()
    wire = lightrun_module.Wire(ours, 10)
    with contextlib.closing(lightrun_module.Reply(wire, lightrun_module.exchange(wire, "GET", "/", {}, b""))) as reply:
        got = b""
        try:
            while data := reply.next(seconds=10):
                got += data
            assert whole
        except lightrun_module.EngineAbsent:
            assert not whole
    sender.join()
    assert got == b"".join(body)


def test_half_of_a_tls_record_is_no_silence(tmp_path: Path) -> None:
    certify_localhost(tmp_path)
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(tmp_path / "cert"))
    theirs.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    near, far = socket.socketpair()
    sent, received = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = theirs.wrap_bio(received, sent, server_side=True)

    def shake_hands() -> None:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                server.do_handshake()
                return far.sendall(sent.read())
            far.sendall(sent.read())
            received.write(far.recv(65536))

    def send(*pieces: bytes) -> None:
        for piece in pieces:
            far.sendall(piece)
            assert eventually(lambda: not fcntl.ioctl(far, termios.TIOCOUTQ, bytes(4)).strip(b"\0"))  # it was read

    with far, contextlib.closing(lightrun_module.Wire(near, 10)) as wire, ThreadPoolExecutor() as pool:
        shaking = pool.submit(shake_hands)
        wire.secure(ours, "localhost")
        shaking.result()
        server.write(b"whole")
        record = sent.read()
        sending = pool.submit(send, record[:3], record[3:10], record[10:])
        assert wire.ready(-1, 10)
        assert wire.read(5) == b"whole"
        sending.result()
        server.write(b"half")
        far.sendall(sent.read()[:10])
        assert not wire.ready(-1, 0.01)


@pytest.mark.parametrize("busy", [True, *longer(False)])
def test_a_kill_of_which_nothing_is_heard(proxied: Proxied, engine: docker.APIClient, busy: bool) -> None:
    """Whose signal ended the run is known from the engine's events, or when it has forgotten those, from the exit code."""
    lightrun, proxy = proxied()
    proxy.inject("kill", "after", "close")
    asked = proxy.inject("events", "before", "hang", path="kill")
    run = detach(lightrun, "sleep 60", timeout=500)
    assert eventually(lambda: asked.held)
    if busy:
        name = "lightrun/events:latest"
        for _ in range(130):  # two events each
            engine.tag(IMAGE, name)
            engine.remove_image(name)
    proxy.mend()
    state = lightrun.wait(run, END_SECONDS)
    assert (state["reason"], state["exitCode"]) == ("timeout", 137)


@pytest.mark.parametrize("stream", [pytest.param(0, marks=pytest.mark.long), 3])
def test_alien_frames_in_the_log_copy(proxied: Proxied, stream: int) -> None:
    lightrun, proxy = proxied()
    run = detach(lightrun, "echo ready; sleep 3; echo done; exit 3")
    lightrun.wait_for(run, lambda state: state["logs"])
    lightrun.kill()
    rule = proxy.inject("logs", "mid", f"frame{stream}")
    lightrun.start()
    state = lightrun.wait(run)
    assert rule.hits
    assert (state["reason"], state["exitCode"], state["logs"], state["logsTruncated"]) == ("exited", 3, ["ready", "done"], True)
    events = [json.loads(line)["event"] for line in lightrun.request("GET", f"/runs/{run}/events").body.splitlines()]
    assert events == ["accepted", "gap", "started", "log", "log", "gap", "finished"]
    assert lightrun.request("GET", f"/runs/{run}/logs").body == b"ready\ndone\n"


# ---------------------------------------------------------------- Calls


def test_a_call_that_always_breaks(proxied: Proxied) -> None:
    """While the engine says its version all the same: it is asked again with pauses that don't shrink, and not for nothing."""

    def tried(call: str, lightrun: Daemon, proxy: Proxy) -> None:
        rule = proxy.inject(call, "before", "502")
        run = detach(lightrun, "echo x > x; exit 3", extract=["x"], extractOn="exit")
        assert eventually(lambda: rule.hits), call
        eventually(lambda: False, PATIENT_SECONDS)
        last = proxy.count(call, PATIENT_SECONDS / 2)
        assert proxy.busiest(1) <= 5, call
        assert 0 < last <= rule.hits - last + 1, (call, rule.hits, last)
        assert lightrun.request("GET", "/health").json()["docker"] is True
        proxy.mend()
        state = lightrun.wait(run, END_SECONDS)
        assert (state["reason"], state["exitCode"], len(state["artifacts"])) == ("exited", 3, 1), (call, state)

    calls = [(call, *proxied()) for call in ("create", "start", "inspect", "archive")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: tried(*each), calls))


def test_break_while_pulling(proxied: Proxied, registry: Registry) -> None:
    """An absence while pulling costs no run, as while creating; one that is silent costs no thread for longer than its run."""
    lightrun, proxy = proxied()
    image = registry.push(IMAGE, "faults/pull:1")
    for point, fault in (("before", "502"), ("after", "close"), ("mid", "reset"), ("mid", "end")):
        proxy.inject("pull", point, fault, times=1)
        state = lightrun.wait(detach(lightrun, "echo fine", image=image), END_SECONDS)
        assert (state["status"], state["logs"]) == ("succeeded", ["fine"]), (point, fault, state)
        remove_image(EngineApi(), image)
    process = psutil.Process(lightrun.pid)
    threads = process.num_threads()
    rule = proxy.inject("pull", "mid", "silent")
    run = detach(lightrun, "true", image=image)
    assert eventually(lambda: rule.held)
    assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
    assert lightrun.wait(run, HEARD_SECONDS)["reason"] == "cancelled"
    assert eventually(lambda: not rule.held and process.num_threads() <= threads, 2 * HEARD_SECONDS), "the pull goes on"


def test_one_container_that_cannot_be_removed(proxied: Proxied, engine: docker.APIClient) -> None:
    """The sweep goes on to the others, now and after a restart, and gets to that one in the end."""
    lightrun, proxy = proxied()
    proxy.inject("remove", "before", "500")
    for _ in range(4):
        lightrun.wait(detach(lightrun, "true"))
    left = lightrun.containers()
    assert len(left) == 4
    stuck = left[1]
    proxy.mend()
    proxy.inject("remove", "before", "500", path=f"{stuck['Id']}|{stuck['Names'][0][1:]}")
    assert eventually(lambda: [each["Id"] for each in lightrun.containers()] == [stuck["Id"]], END_SECONDS)
    assert lightrun.run(network="none", entrypoint="true")["status"] == "succeeded"
    assert eventually(lambda: [each["Id"] for each in lightrun.containers()] == [stuck["Id"]], END_SECONDS)
    proxy.mend()
    assert eventually(lambda: not lightrun.containers(), END_SECONDS)


@pytest.mark.long
def test_an_absence_while_one_cannot_be_removed(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pause until that is tried again: runs are accepted as soon as the engine is back."""
    monkeypatch.setitem(faults.LOWERED, "RETRY_SECONDS", 0.2)
    lightrun, proxy = proxied()
    proxy.inject("remove", "before", "500")
    run = lightrun.run(network="none", entrypoint="true")["id"]
    assert eventually(lambda: lightrun.log().count(f"container of run {run}: ") == 6, END_SECONDS)  # the next pause is 6.4 s
    proxy.inject("any", "before", "refuse")
    first = detach(lightrun, "true")  # which sees that it is away
    assert eventually(lambda: "lightrun_engine_up 0" in lightrun.request("GET", "/metrics").text)
    proxy.mend()
    body = {"image": IMAGE, "entrypoint": "true", "network": "none", "detached": True}
    accepted = eventually(lambda: (answer := lightrun.request("POST", "/run", body)).status == 202 and answer.json()["id"], 3)
    assert accepted, "the keeper sleeps on"
    for run in (first, accepted):
        assert lightrun.wait(run)["status"] == "succeeded"


def test_a_container_that_vanishes_while_its_artifacts_are_copied(proxied: Proxied, engine: docker.APIClient) -> None:
    lightrun, proxy = proxied()
    rule = proxy.inject("archive", "before", "hang")
    run = detach(lightrun, "echo x > x; exit 3", extract=["x"], extractOn="exit")
    assert eventually(lambda: rule.held)
    engine.remove_container(f"lightrun-{run}", force=True)
    proxy.mend()
    state = lightrun.wait(run)
    assert (state["reason"], state["exitCode"]) == ("exited", 3)
    assert state["extracted"] == [{"from": "x", "status": "error", "message": "the container vanished"}]


# ---------------------------------------------------------------- Clocks


@pytest.mark.parametrize("differences", [(-3600.0, 60.0), pytest.param((-60.0, 3600.0), marks=pytest.mark.long)])
def test_clocks_that_differ(proxied: Proxied, differences: tuple[float, float]) -> None:
    """By a minute or an hour, either way: a fresh run and an adopted one get their time, no less and not much more."""

    def tried(clock: float, lightrun: Daemon, proxy: Proxy) -> None:
        quick, late = (detach(lightrun, f"sleep {seconds}; exit 3", timeout=2500) for seconds in (1, 60))
        ends = [lightrun.wait(run, END_SECONDS) for run in (quick, late)]
        quick, late = (detach(lightrun, f"sleep {seconds}; exit 3", timeout=6000) for seconds in (3, 60))
        for run in (quick, late):
            lightrun.wait_for(run, lambda state: "startedAt" in state)
        lightrun.kill()
        lightrun.start()
        ends += [lightrun.wait(run, END_SECONDS) for run in (quick, late)]
        for state, reason, least in zip(ends, ("exited", "timeout") * 2, (1, 2.5, 3, 6), strict=True):
            seconds = state["timings"]["run"] / 1000
            said = (clock, state)
            assert (state["reason"], state["exitCode"]) == (reason, 3 if reason == "exited" else 137), said
            assert least - 0.4 <= seconds < least + 5, said
            assert moment(state, "createdAt") <= moment(state, "startedAt") < moment(state, "finishedAt"), said
            assert moment(state, "startedAt") + seconds <= moment(state, "finishedAt") + 0.01, said
            assert abs(moment(state, "createdAt") - time.time()) < 60, said

    clocks = []
    for clock in differences:
        lightrun, proxy = proxied()
        proxy.clock = clock
        clocks.append((clock, lightrun, proxy))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: tried(*each), clocks))
