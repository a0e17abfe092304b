"""Many clients, slow clients, idle clients: whatever they do, the control routes answer at once and memory stays flat."""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from conftest import Daemon, DaemonFactory, Response, eventually
from engine import IMAGE

MIB = 1024 * 1024
SLEEP = {"entrypoint": "echo ready; sleep 100", "network": "none"}
# What "at once" means on a machine with two busy cores, where an idle daemon takes 2 to 20 ms.
AT_ONCE_SECONDS = 3.0


@pytest.fixture(autouse=True)
def many_descriptors() -> None:
    """This process opens as many connections as the daemon holds, and the daemon inherits its limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def connections(daemon: Daemon, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections on each of which the same bytes were sent, and nothing was read."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(daemon.connect()))
            opened[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # The kernel reads up to 32 MB otherwise.
            opened[-1].sendall(sent)
        yield opened


def get(path: str) -> bytes:
    """A request as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def answer(connection: socket.socket) -> Response:
    """The answer to what was sent, read to its end."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return Response(response.status, response.headers, response.read())


def timed(call: Callable[[], Response], *statuses: int) -> float:
    """The seconds that a request takes."""
    began = time.monotonic()
    assert call().status in statuses
    return time.monotonic() - began


def queued(daemon: Daemon, count: int) -> list[str]:
    """Runs that wait for another to end."""
    return [daemon.detach(entrypoint="true", network="none") for _ in range(count)]


def cancel(daemon: Daemon, run: str) -> Response:
    """Cancel a run."""
    return daemon.request("POST", f"/runs/{run}/cancel")


def latencies(daemon: Daemon, busy: str, count: int = 15) -> dict[str, float]:
    """The median seconds of each control route, on a daemon with one worker, which `busy` has."""
    runs = queued(daemon, count)
    paths = {"health": "/health", "state": f"/runs/{busy}", "list": "/runs?limit=10"}
    times = {
        name: [timed(lambda path=path: daemon.request("GET", path), 200) for _ in runs]  # type: ignore[misc]
        for name, path in paths.items()
    }
    times["cancel"] = [timed(lambda run=run: cancel(daemon, run), 204) for run in runs]  # type: ignore[misc]
    for run in runs:
        daemon.wait(run)
    times["delete"] = [timed(lambda run=run: daemon.request("DELETE", f"/runs/{run}"), 204) for run in runs]  # type: ignore[misc]
    return {name: statistics.median(each) for name, each in times.items()}


def assert_control_routes_answer(daemon: Daemon, run: str) -> None:
    """Every control route answers at once."""
    routes = [("GET", "/health", 200), ("GET", f"/runs/{run}", 200), ("GET", "/runs", 200), ("POST", f"/runs/{run}/cancel", 409)]
    for method, path, status in routes:
        took = timed(lambda method=method, path=path: daemon.request(method, path, timeout=15), status)  # type: ignore[misc]
        assert took < AT_ONCE_SECONDS, f"{method} {path} took {took:.1f} s"


def end(daemon: Daemon, run: str) -> None:
    """Cancel a run and see it end."""
    assert cancel(daemon, run).status == 204
    daemon.wait(run)


# ---------------------------------------------------------------- Clients that wait


@pytest.mark.alone("compares latencies")
def test_control_routes_do_not_feel_300_waiting_clients(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1", "--max-waiting", "320")
    busy = lightrun.detach(**SLEEP)
    lightrun.wait_for(busy, lambda state: state["logs"])
    latencies(lightrun, busy, 3)
    idle = latencies(lightrun, busy)
    wait, follow = get(f"/runs/{busy}?wait=60000"), get(f"/runs/{busy}/logs?follow=true")
    with connections(lightrun, 150, wait), connections(lightrun, 150, follow) as followers:
        assert all(connection.recv(4096).startswith(b"HTTP/1.1 200 ") for connection in followers)
        loaded = latencies(lightrun, busy)
        slow = {name: (idle[name], loaded[name]) for name in idle if loaded[name] > 5 * idle[name] + 0.05}
        assert not slow, f"seconds, idle and loaded: {slow}"
        end(lightrun, busy)


def test_every_waiting_client_gets_the_end(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-waiting", "320")
    run = lightrun.detach(**SLEEP)
    with connections(lightrun, 300, get(f"/runs/{run}?wait=60000")) as waiting:
        time.sleep(1)
        assert cancel(lightrun, run).status == 204
        assert {answer(connection).json()["status"] for connection in waiting} == {"cancelled"}
    lightrun.wait(run)


def test_who_finds_no_place_is_told_so(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-waiting", "2")
    kept = lightrun.run(entrypoint="echo a > a", extract=["a"], network="none")["id"]
    run = lightrun.detach(**SLEEP)

    def waiting() -> list[Response]:
        body = {"image": IMAGE, "entrypoint": "true", "network": "none"}
        return [
            lightrun.request("GET", f"/runs/{run}?wait=100"),
            lightrun.request("GET", f"/runs/{kept}/artifacts", headers={"Accept": "application/x-tar"}),
            lightrun.request("POST", "/run", json=body),
            lightrun.request("POST", "/run", json=body, headers={"Accept": "application/x-ndjson"}),
            lightrun.request("POST", "/run", json=body, headers={"Idempotency-Key": "key"}),
        ]

    with connections(lightrun, 2, get(f"/runs/{run}/logs?follow=true")) as followers:
        assert [connection.recv(12) for connection in followers] == [b"HTTP/1.1 200"] * 2
        before = len(lightrun.request("GET", "/runs").json())
        for response in [*waiting(), lightrun.request("GET", f"/runs/{run}/logs?follow=true")]:
            assert (response.status, response.json()["error"]) == (503, "busy")
            assert int(response.headers["Retry-After"]) > 0
        assert len(lightrun.request("GET", "/runs").json()) == before
        assert_control_routes_answer(lightrun, kept)
        assert lightrun.request("GET", f"/runs/{kept}/artifacts/a").body == b"a\n"
        assert lightrun.wait(lightrun.detach(entrypoint="true", network="none"))["status"] == "succeeded"
    assert eventually(lambda: lightrun.request("GET", f"/runs/{run}?wait=1").status == 200)
    assert [response.status for response in waiting()] == [200] * 5
    end(lightrun, run)


@pytest.mark.long
def test_a_hundred_followers_get_every_byte(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-waiting", "100")
    script = "sleep 2; i=0; while [ $i -lt 100 ]; do echo line $i; sleep 0.02; i=$((i+1)); done; printf end"
    printed = "".join(f"line {number}\n" for number in range(100)).encode() + b"end"
    run = lightrun.detach(entrypoint=script, network="none")
    with ThreadPoolExecutor(100) as pool:
        answers = pool.map(lambda _: lightrun.request("GET", f"/runs/{run}/logs?follow=true"), range(100))
        assert {(answer.status, answer.body) for answer in answers} == {(200, printed)}


# ---------------------------------------------------------------- Clients that do nothing


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "sent"),
    [
        (2000, b""),
        (300, b"GET /runs HTTP/1.1\r\nHost: localh"),
        (300, b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"),
        (300, b"POST /run HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"),
    ],
    ids=["idle", "headers", "body", "chunk"],
)
def test_stalled_connections_do_no_harm(daemon: DaemonFactory, count: int, sent: bytes) -> None:
    lightrun = daemon("--max-waiting", "4")
    process = psutil.Process(lightrun.pid)
    run = lightrun.run(entrypoint="true", network="none")["id"]
    before = process.num_fds()
    with connections(lightrun, count, sent) as opened:
        assert eventually(lambda: process.num_fds() >= count, 60)
        assert_control_routes_answer(lightrun, run)
        assert lightrun.run(entrypoint="true", network="none")["status"] == "succeeded"
        if not sent:
            for connection in opened[::100]:
                connection.sendall(get("/health"))
                assert connection.recv(12) == b"HTTP/1.1 200"
    assert eventually(lambda: process.num_fds() <= before + 10), "descriptors stay open"


# ---------------------------------------------------------------- Clients that read nothing

DOWNLOAD_BYTES = 20 * MIB


@pytest.fixture(scope="module")
def narrow(module_daemon: DaemonFactory) -> Daemon:
    """A daemon with twenty threads."""
    return module_daemon("--max-waiting", "4")


@pytest.fixture(scope="module")
def download(narrow: Daemon) -> str:
    """A run that kept a big file and has a long log."""
    script = f"head -c {DOWNLOAD_BYTES} /dev/zero > big; head -c {MIB} /dev/zero"
    return str(narrow.run(entrypoint=script, extract=["big"], network="none")["id"])


@pytest.mark.parametrize("path", ["artifacts/big", "logs"])
def test_slow_readers_hold_no_thread(narrow: Daemon, download: str, path: str) -> None:
    with connections(narrow, 40, get(f"/runs/{download}/{path}")):
        time.sleep(1)
        assert_control_routes_answer(narrow, download)


@pytest.mark.parametrize(("path", "repeats"), [("artifacts/big", 3), ("logs", 30)], ids=["file", "log"])
def test_pipelining_slow_readers_hold_no_thread(narrow: Daemon, download: str, path: str, repeats: int) -> None:
    with connections(narrow, 40, get(f"/runs/{download}/{path}") * repeats):
        time.sleep(1)
        assert_control_routes_answer(narrow, download)


@pytest.mark.long
def test_a_slow_reader_gets_it_all(narrow: Daemon, download: str) -> None:
    with narrow.open("GET", f"/runs/{download}/artifacts/big") as response:
        time.sleep(2)
        assert len(response.read()) == DOWNLOAD_BYTES


def test_slow_readers_of_streams_only_take_their_places(narrow: Daemon, download: str) -> None:
    tar = get(f"/runs/{download}/artifacts").replace(b"Host:", b"Accept: application/x-tar\r\nHost:")
    with connections(narrow, 4, tar) as readers:
        assert [connection.recv(12) for connection in readers] == [b"HTTP/1.1 200"] * 4
        assert narrow.request("POST", "/run", json={"image": IMAGE}).status == 503
        assert_control_routes_answer(narrow, download)
    assert eventually(lambda: narrow.request("POST", "/run", json={"image": IMAGE}).status == 200)


# ---------------------------------------------------------------- Memory


def rss(daemon: Daemon) -> int:
    """Bytes of memory that the daemon has."""
    return int(psutil.Process(daemon.pid).memory_info().rss)


@pytest.mark.long
def test_memory_is_flat_over_many_calls(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    run = lightrun.run(entrypoint="echo hello > a", extract=["a"], network="none")["id"]
    requests: list[tuple[str, str, Any]] = [
        ("GET", "/health", None),
        ("GET", "/runs", None),
        ("GET", f"/runs/{run}", None),
        ("GET", f"/runs/{run}/logs?follow=true", None),
        ("GET", f"/runs/{run}/artifacts/a", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nothing", None),
        ("POST", "/run", {"image": "x" * 1000, "unknown": 1}),
        ("POST", f"/runs/{run}/cancel", None),
        ("DELETE", "/runs", None),
    ]

    def rounds(count: int) -> None:
        for _ in range(count):
            for method, path, body in requests:
                assert lightrun.request(method, path, json=body).status < 500

    rounds(20)
    before = rss(lightrun)
    rounds(30)
    assert rss(lightrun) - before < 4 * MIB


@pytest.mark.long
def test_memory_is_flat_over_many_lists(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1")
    busy = lightrun.detach(**SLEEP)
    for run in queued(lightrun, 100):
        assert cancel(lightrun, run).status == 204
        lightrun.wait(run)

    def lists(count: int) -> None:
        for _ in range(count):
            assert len(lightrun.request("GET", "/runs?limit=1000").json()) == 101

    lists(20)
    before = rss(lightrun)
    lists(100)
    assert rss(lightrun) - before < 4 * MIB
    end(lightrun, busy)


@pytest.mark.long
@pytest.mark.parametrize("path", ["", "/logs"])
def test_answers_that_nobody_reads_wait_on_disk(daemon: DaemonFactory, path: str) -> None:
    lightrun = daemon("--max-waiting", "320")
    run = lightrun.run(entrypoint=f"head -c {MIB} /dev/zero | tr '\\0' x", network="none")["id"]
    whole = lightrun.request("GET", f"/runs/{run}{path}").body
    with connections(lightrun, 20, get(f"/runs/{run}{path}")):
        time.sleep(1)
    before = rss(lightrun)
    with connections(lightrun, 300, get(f"/runs/{run}{path}")) as readers:
        assert all(reader.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 200" for reader in readers)
        assert_control_routes_answer(lightrun, run)
        assert rss(lightrun) - before < 100 * MIB
        assert answer(readers[0]).body == answer(readers[-1]).body == whole
    assert not [entry for entry in lightrun.state_dir.iterdir() if entry.name.startswith("tmp")]


# ---------------------------------------------------------------- Descriptors


@pytest.mark.long
def test_without_descriptors_connections_wait(daemon: DaemonFactory) -> None:
    """None is lost, the log says it once, and what is connected is served."""
    lightrun = daemon()
    process = psutil.Process(lightrun.pid)
    with connections(lightrun, 1) as [connected]:
        most, (_, hard) = process.num_fds() + 5, resource.prlimit(lightrun.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(lightrun.pid, resource.RLIMIT_NOFILE, (most, hard))
        with connections(lightrun, 30, get("/runs")) as waiting:
            assert eventually(lambda: process.num_fds() >= most)
            size, spent = len(lightrun.log()), sum(process.cpu_times()[:2])
            time.sleep(3)
            assert len(lightrun.log()) - size < 3000
            assert sum(process.cpu_times()[:2]) - spent < 1.5
            connected.sendall(get("/runs"))
            assert answer(connected).status == 200
            assert lightrun.log().count("new connections must wait: Too many open files") == 1
            resource.prlimit(lightrun.pid, resource.RLIMIT_NOFILE, (hard, hard))
            assert [answer(each).status for each in waiting] == [200] * 30
    assert lightrun.run(entrypoint="true", network="none")["status"] == "succeeded"


def test_no_more_connections_than_descriptors_allow(daemon: DaemonFactory) -> None:
    """Those that are too many wait for their turn."""
    lightrun = daemon(start=False)
    lightrun.command = ["prlimit", "--nofile=300", *lightrun.command]
    lightrun.start()
    with connections(lightrun, 100) as idle, connections(lightrun, 20, get("/runs")) as late:
        assert eventually(lambda: "new connections must wait: 100 are open" in lightrun.log())
        for connection in idle:
            connection.close()
        assert [answer(connection).status for connection in late] == [200] * 20
        assert lightrun.run(entrypoint="true", network="none")["status"] == "succeeded"
    assert lightrun.log().count("new connections must wait") == 1


# ---------------------------------------------------------------- Bursts


def test_a_burst_is_answered_by_results_or_busy(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "4", "--queue", "8")
    body = {"image": IMAGE, "entrypoint": ["echo", "hello"], "network": "none"}
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: lightrun.request("POST", "/run", json=body), range(40)))
    done = [answer.json() for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(done) >= 12
    assert {(run["status"], *run["logs"]) for run in done} == {("succeeded", "hello")}
    assert len({run["id"] for run in done}) == len(done)
    assert {(answer.status, answer.json()["error"]) for answer in refused} <= {(503, "busy")}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert len(lightrun.request("GET", "/runs?limit=1000").json()) == len(done)
    assert eventually(lambda: not lightrun.containers())
    assert lightrun.request("GET", "/health").json()["runs"] == {"running": 0, "queued": 0}
