"""Runs watched and steered while they happen: events, logs, ?wait, stop, cancel, clients that leave, idempotency keys."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

import lightrun
from conftest import LABEL_RUN, Daemon, DaemonFactory, Response, eventually, longer
from engine import IMAGE, EngineApi, find_busybox, root_filesystem
from images import Registry, remove_image

NDJSON = {"Accept": "application/x-ndjson"}
LIVE_LIMIT = 16 * 1024
MIB = 1024 * 1024
# Ends by itself, in case a test does not end it; an init passes signals on at once.
LONG = "echo ready; sleep 60"
TRAPPED = "trap 'echo bye; exit {code}' {signal}; echo ready; i=0; while [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done"
Event = dict[str, Any]


@pytest.fixture(scope="module")
def lightrun_tcp(module_daemon: DaemonFactory) -> Daemon:
    """A daemon that these tests share."""
    return module_daemon("--max-concurrent", "6")


@pytest.fixture(scope="module")
def lightrun_unix(module_daemon: DaemonFactory) -> Daemon:
    """Another one, on a Unix socket."""
    return module_daemon(socket=True)


def request_body(entrypoint: str | list[str], **fields: Any) -> dict[str, Any]:
    """A request that needs no network."""
    return {"image": IMAGE, "entrypoint": entrypoint, "network": "none", **fields}


@contextlib.contextmanager
def live(daemon: Daemon, entrypoint: str | list[str], **fields: Any) -> Iterator[Iterator[Event]]:
    """POST a live run and hand out its events as they come."""
    with daemon.open("POST", "/run", json=request_body(entrypoint, **fields), headers=NDJSON) as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
        yield (json.loads(line) for line in response)


def all_events(daemon: Daemon, entrypoint: str | list[str], **fields: Any) -> list[Event]:
    """The events of a live run."""
    with live(daemon, entrypoint, **fields) as events:
        return list(events)


def log_bytes(daemon: Daemon, run: str, query: str = "") -> bytes:
    """What /logs answers."""
    response = daemon.request("GET", f"/runs/{run}/logs{query}")
    assert (response.status, response.headers["Content-Type"]) == (200, "application/octet-stream")
    return response.body


def ready(daemon: Daemon, run: str) -> dict[str, Any]:
    """Wait until the run has printed something."""
    return daemon.wait_for(run, lambda state: state["logs"])


def post(daemon: Daemon, run: str, action: str, json: Any = None) -> int:
    """The status of a stop or cancel."""
    return daemon.request("POST", f"/runs/{run}/{action}", json=json).status


def patched(daemon: DaemonFactory, folder: Path, assignment: str, *options: str) -> Daemon:
    """A daemon in which a constant of the module has another value."""
    started = daemon(*options, start=False)
    at = started.command.index("serve") - 1
    launcher = folder / "launcher.py"
    launcher.write_text(
        f"import sys\nsys.path.insert(0, {started.command[at]!r})\n"
        f"import lightrun\nlightrun.{assignment}\nsys.exit(lightrun.main())\n"
    )
    started.command[at] = str(launcher)
    return started.start()


# ---------------------------------------------------------------- A live run


def test_live_run_from_accepted_to_finished(lightrun_tcp: Daemon) -> None:
    accepted, started, *logs, finished = all_events(lightrun_tcp, "echo out; sleep 0.3; echo err >&2; exit 3")
    assert accepted.keys() == {"event", "id"}
    assert (accepted["event"], started, finished["event"]) == ("accepted", {"event": "started"}, "finished")
    assert logs == [
        {"event": "log", "stream": "stdout", "line": "out"},
        {"event": "log", "stream": "stderr", "line": "err"},
    ]
    assert finished.keys() == {"event", "run"}
    assert finished["run"]["exitCode"] == 3
    assert finished["run"] == lightrun_tcp.state(accepted["id"])


def test_lines_arrive_as_they_are_printed(lightrun_tcp: Daemon) -> None:
    with live(lightrun_tcp, "echo one; sleep 2; echo two") as events:
        run = next(events)["id"]
        assert next(event for event in events if event["event"] == "log")["line"] == "one"
        first = time.monotonic()
        state = lightrun_tcp.state(run)
        assert (state["status"], state["phase"], state["logs"]) == ("running", "running", ["one"])
        assert next(events)["line"] == "two"
        assert time.monotonic() - first > 1
        assert [event["event"] for event in events] == ["finished"]


def test_accepted_comes_while_the_run_is_queued(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1")
    blocker = lightrun.detach(entrypoint=LONG, network="none")
    with live(lightrun, "echo hello") as events:
        run = next(events)["id"]
        assert lightrun.state(run)["phase"] == "queued"
        assert post(lightrun, blocker, "cancel") == 204
        assert [event["event"] for event in events] == ["started", "log", "finished"]
    lightrun.wait(blocker)


LONG_LINES = ["x" * LIVE_LIMIT, "x" * (LIVE_LIMIT + 1), "y" * 100_000, "a" + "é" * 30_000, "\N{SNAKE}" * 10_000]


@pytest.mark.parametrize(
    "text", ["\n".join([*LONG_LINES, "last\n"]), *longer(*LONG_LINES)], ids=["all", "limit", "over", "long", "two", "four"]
)
def test_long_lines_come_in_pieces(lightrun_tcp: Daemon, text: str) -> None:
    files = {"text": text}
    logs = [event for event in all_events(lightrun_tcp, ["cat", "text"], files=files) if event["event"] == "log"]
    lines, pieces = [], ""
    for event in logs:
        assert len(event["line"].encode()) <= LIVE_LIMIT
        assert event.keys() <= {"event", "stream", "line", "partial"}
        pieces += event["line"]
        if not event.get("partial"):
            lines.append(pieces)
            pieces = ""
        else:
            assert event["partial"] is True
    assert not pieces, "the last piece of a line is not marked partial"
    assert lines == text.splitlines()


def test_bytes_that_are_not_text_are_replaced(lightrun_tcp: Daemon) -> None:
    events = all_events(lightrun_tcp, r"printf 'a\377b\n\0c\n'")
    assert [event["line"] for event in events if event["event"] == "log"] == ["a\ufffdb", "\0c"]
    assert events[-1]["run"]["logs"] == ["a\ufffdb", "\0c"]


def test_streams_are_told_apart_without_newlines(lightrun_tcp: Daemon) -> None:
    events = all_events(lightrun_tcp, "printf a; printf 1 >&2; sleep 0.2; printf b; printf 2 >&2")
    logs = {event["stream"]: event["line"] for event in events if event["event"] == "log"}
    assert logs == {"stdout": "ab", "stderr": "12"}


def test_a_silent_run_pings(daemon: DaemonFactory, tmp_path: Path) -> None:
    lightrun = patched(daemon, tmp_path, "PING_SECONDS = 0.5")
    began = time.monotonic()
    kinds = [event["event"] for event in all_events(lightrun, "sleep 2; echo a")]
    assert 2 <= kinds.count("ping") <= (time.monotonic() - began) / 0.5
    assert [kind for kind in kinds if kind != "ping"] == ["accepted", "started", "log", "finished"]
    assert kinds[0] == "accepted"


def test_pings_come_after_fifteen_seconds() -> None:
    assert lightrun.PING_SECONDS == 15


@pytest.fixture
def pullable(engine_api: EngineApi, registry: Registry) -> str:
    """An image of 8 MB that is only on a registry."""
    archive = io.BytesIO(root_filesystem(find_busybox()[0]))
    with tarfile.open(fileobj=archive, mode="a") as tar:
        info = tarfile.TarInfo("blob")
        info.size = 8 * MIB
        tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    name = f"lightrun/pullable-{uuid.uuid4().hex[:8]}:latest"
    engine_api.import_image(archive.getvalue(), name, ["ENV PATH=/bin", 'CMD ["sh"]'])
    try:
        return registry.push(name, "pullable:1")
    finally:
        remove_image(engine_api, name)


def test_a_pull_is_told_with_its_progress(lightrun_tcp: Daemon, pullable: str) -> None:
    events = all_events(lightrun_tcp, "echo here", image=pullable)
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-3:]) == ("accepted", ["started", "log", "finished"])
    assert set(kinds[1:-3]) == {"pulling"}
    assert any(event.get("status") for event in events if event["event"] == "pulling")
    run = events[-1]["run"]
    assert run["reason"] == "exited"
    assert run["timings"]["pull"] > 0


def test_a_failed_pull_is_told(lightrun_tcp: Daemon, registry: Registry) -> None:
    events = all_events(lightrun_tcp, "true", image=f"{registry.address}/absent:1")
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("accepted", "finished")
    assert set(kinds[1:-1]) <= {"pulling"}
    run = events[-1]["run"]
    assert (run["status"], run["reason"], "exitCode" in run) == ("failed", "pull_failed", False)


def test_a_live_run_that_is_not_accepted_is_plain_json(lightrun_tcp: Daemon) -> None:
    response = lightrun_tcp.request("POST", "/run", json={"image": IMAGE, "tiemout": 1}, headers=NDJSON)
    assert (response.status, response.headers["Content-Type"]) == (400, "application/json")
    assert response.json()["details"][0]["path"] == ["tiemout"]


def test_a_detached_run_is_not_streamed(lightrun_tcp: Daemon) -> None:
    response = lightrun_tcp.request("POST", "/run", json=request_body("true", detached=True), headers=NDJSON)
    assert (response.status, response.headers["Content-Type"]) == (202, "application/json")
    lightrun_tcp.wait(response.json()["id"])


# ---------------------------------------------------------------- Logs


@pytest.fixture(scope="module")
def printed(lightrun_tcp: Daemon) -> str:
    """A finished run that printed bytes on both streams, without a last newline on either."""
    run = lightrun_tcp.run(entrypoint=r"printf 'a\nb\n\nc'; sleep 0.3; printf 'x\0\377\ny\r\nz' >&2", network="none")
    return str(run["id"])


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("", b"a\nb\n\ncx\0\xff\ny\r\nz"),
        ("?stream=stdout", b"a\nb\n\nc"),
        ("?stream=stderr", b"x\0\xff\ny\r\nz"),
        ("?stream=stdout&tail=0", b""),
        ("?stream=stdout&tail=1", b"c"),
        ("?stream=stdout&tail=2", b"\nc"),
        ("?stream=stdout&tail=3", b"b\n\nc"),
        ("?stream=stdout&tail=100", b"a\nb\n\nc"),
        ("?tail=2", b"y\r\nz"),
        ("?stream=stderr&follow=true", b"x\0\xff\ny\r\nz"),
        ("?follow=false&tail=1", b"z"),
        ("?follow=true&tail=1", b"z"),
    ],
)
def test_logs_are_raw(lightrun_tcp: Daemon, printed: str, query: str, answer: bytes) -> None:
    assert log_bytes(lightrun_tcp, printed, query) == answer


def test_tail_counts_a_last_line_with_its_newline(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.run(entrypoint=["printf", r"a\nb\nc\n"], network="none")["id"]
    assert [log_bytes(lightrun_tcp, run, f"?tail={count}") for count in (0, 1, 2)] == [b"", b"c\n", b"b\nc\n"]


def test_lines_of_the_state(lightrun_tcp: Daemon, printed: str) -> None:
    assert sorted(lightrun_tcp.state(printed)["logs"]) == sorted(["a", "b", "", "c", "x\0\ufffd", "y\r", "z"])


def test_logs_answer_head(lightrun_tcp: Daemon, printed: str) -> None:
    response = lightrun_tcp.request("HEAD", f"/runs/{printed}/logs")
    assert (response.status, response.body, response.headers["Content-Length"]) == (200, b"", "14")


@pytest.mark.parametrize(
    "query",
    ["stream=stdin", "stream=", "tail=-1", "tail=x", "tail=", "tail=1e3", "follow=1", "foo=1", "tail=1&tail=2"],
)
def test_bad_queries(lightrun_tcp: Daemon, printed: str, query: str) -> None:
    response = lightrun_tcp.request("GET", f"/runs/{printed}/logs?{query}")
    assert response.status == 400
    assert response.json()["details"][0]["path"] == ["query", query.split("=")[0]]


def test_a_running_run_shows_its_logs_so_far(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="printf 'one\ntw'; sleep 60", network="none")
    assert ready(lightrun_tcp, run)["logs"] == ["one", "tw"]
    assert log_bytes(lightrun_tcp, run) == b"one\ntw"
    assert log_bytes(lightrun_tcp, run, "?tail=1") == b"tw"
    assert post(lightrun_tcp, run, "cancel") == 204
    assert lightrun_tcp.wait(run)["logs"] == ["one", "tw"]


def test_logs_outlive_the_container_and_the_daemon(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    run = lightrun.run(entrypoint="printf 'a\nb'", network="none")["id"]
    assert eventually(lambda: not lightrun.containers())
    assert log_bytes(lightrun, run) == b"a\nb"
    lightrun.stop()
    lightrun.start()
    assert log_bytes(lightrun, run) == b"a\nb"
    assert lightrun.state(run)["logs"] == ["a", "b"]
    assert lightrun.request("DELETE", f"/runs/{run}").status == 204
    assert lightrun.request("GET", f"/runs/{run}/logs").status == 404


def test_the_newest_bytes_are_kept(daemon: DaemonFactory) -> None:
    lightrun = daemon("--log-limit", "2k")
    whole = "".join(f"line {number}\n" for number in range(1, 3001)).encode()
    run = lightrun.run(entrypoint='i=1; while [ $i -le 3000 ]; do echo "line $i"; i=$((i+1)); done', network="none")
    assert (run["status"], run["logsTruncated"]) == ("succeeded", True)
    assert log_bytes(lightrun, run["id"]) == whole[-2048:]
    assert run["logs"] == whole[-2048:].decode().splitlines()
    assert log_bytes(lightrun, run["id"], "?tail=1") == b"line 3000\n"
    exact = lightrun.run(entrypoint=["head", "-c", "2048", "/dev/zero"], network="none")
    assert (exact["logsTruncated"], log_bytes(lightrun, exact["id"])) == (False, bytes(2048))
    over = lightrun.run(entrypoint=["head", "-c", "2049", "/dev/zero"], network="none")
    assert (over["logsTruncated"], log_bytes(lightrun, over["id"])) == (True, bytes(2048))


def test_followers_get_every_byte_whenever_they_join(lightrun_tcp: Daemon) -> None:
    script = "i=0; while [ $i -lt 40 ]; do echo $i; echo e$i >&2; sleep 0.05; i=$((i+1)); done; printf end"
    out = "".join(f"{number}\n" for number in range(40)).encode() + b"end"
    err = "".join(f"e{number}\n" for number in range(40)).encode()
    run = lightrun_tcp.detach(entrypoint=script, network="none")

    def follow(delay: float, query: str) -> bytes:
        time.sleep(delay)
        return log_bytes(lightrun_tcp, run, "?follow=true" + query)

    with ThreadPoolExecutor() as pool:
        outs = [pool.submit(follow, delay, "&stream=stdout") for delay in (0, 0.5, 1, 1.5)]
        errs = [pool.submit(follow, delay, "&stream=stderr") for delay in (0, 1.2)]
        both = [pool.submit(follow, delay, "") for delay in (0.2, 1.1)]
        tail = pool.submit(follow, 1.3, "&stream=stdout&tail=1").result()
        assert [each.result() for each in outs] == [out] * 4
        assert [each.result() for each in errs] == [err] * 2
        assert {len(each.result()) for each in both} == {len(out) + len(err)}
    assert out.endswith(tail)
    assert b"end" in tail


def test_a_follower_sees_bytes_as_they_are_printed(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="printf one; sleep 2; printf two", network="none")
    with lightrun_tcp.open("GET", f"/runs/{run}/logs?follow=true") as response:
        assert response.read(3) == b"one"
        assert lightrun_tcp.state(run)["status"] == "running"
        assert response.read() == b"two"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_short_runs_six_at_a_time_lose_no_byte(lightrun_tcp: Daemon) -> None:
    def lost(number: int) -> str:
        text = f"{number}:" + "0123456789abcdef"[number % 16] * (number * 97 % 5000)
        run = lightrun_tcp.run(entrypoint=["printf", "%s", text], network="none")
        kept = log_bytes(lightrun_tcp, run["id"]).decode()
        return "" if kept == text and run["logs"] == [text] else f"{number}: {len(kept)} of {len(text)} bytes"

    with ThreadPoolExecutor(6) as pool:
        assert not [problem for problem in pool.map(lost, range(18)) if problem]


def test_random_bytes_come_back_bit_for_bit(lightrun_tcp: Daemon) -> None:
    noise = random.Random(3).randbytes(300_000)
    files = {"noise": {"base64": base64.b64encode(noise).decode()}}
    run = lightrun_tcp.run(entrypoint="cat noise; cat noise >&2", files=files, network="none")
    assert run["logsTruncated"] is False
    assert log_bytes(lightrun_tcp, run["id"], "?stream=stdout") == noise
    assert log_bytes(lightrun_tcp, run["id"], "?stream=stderr") == noise


# ---------------------------------------------------------------- A flood

BLOCK = "".join(f"{number:098}x\n" for number in range(10_000))
PRINT_BLOCKS = "sleep 1; i=0; while [ $i -lt {count} ]; do cat block; i=$((i+1)); done; echo last"
# More than what a follower may be behind in the tests that say so, and what the kernel may hold.
SMALL_BLOCKS = 30
SMALL_FLOOD = PRINT_BLOCKS.format(count=SMALL_BLOCKS)
SMALL_FLOODED = BLOCK.encode() * SMALL_BLOCKS + b"last\n"
FLOOD = {"entrypoint": PRINT_BLOCKS.format(count=60), "files": {"block": BLOCK}, "network": "none"}
FLOODED = BLOCK.encode() * 60 + b"last\n"


class Watchman:
    """Looks at a process's memory until closed; `risen` is how far its RSS rose above what it was, in bytes."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._most = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    def __enter__(self) -> Watchman:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def risen(self) -> int:
        """Bytes."""
        return self._most - self._before


@pytest.mark.long
def test_a_flood_costs_little_memory(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    lightrun.run(entrypoint="true", network="none")
    with Watchman(lightrun.pid) as watchman:
        run = lightrun.run(**FLOOD)
    assert (run["status"], run["reason"], run["logsTruncated"]) == ("succeeded", "exited", True)
    assert run["logs"][-1] == "last"
    assert log_bytes(lightrun, run["id"]) == FLOODED[-MIB:]
    assert watchman.risen < 60 * MIB


@pytest.mark.long
def test_a_polled_flood_costs_little_memory(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    lightrun.run(entrypoint="true", network="none")
    with Watchman(lightrun.pid) as watchman:
        state = lightrun.wait(lightrun.detach(**FLOOD), timeout=60)
    assert state["logs"][-1] == "last"
    assert watchman.risen < 40 * MIB


@pytest.mark.long
def test_slow_followers_of_a_flood_cost_little_memory_and_lose_nothing(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    lightrun.run(entrypoint="true", network="none")
    with Watchman(lightrun.pid) as watchman, contextlib.ExitStack() as followers:
        run = lightrun.detach(**FLOOD)
        slow = [followers.enter_context(lightrun.open("GET", f"/runs/{run}/logs?follow=true")) for _ in range(8)]
        # Nobody reads meanwhile: the program is not held up.
        state = lightrun.request("GET", f"/runs/{run}?wait=60000").json()
        assert (state["status"], state["logs"][-1], state["logsTruncated"]) == ("succeeded", "last", True)
        wanted = hashlib.sha256(FLOODED).hexdigest()
        assert [hashlib.sha256(response.read()).hexdigest() for response in slow] == [wanted] * 8
    assert watchman.risen < 60 * MIB


@pytest.mark.long
def test_a_live_flood_costs_little_memory_and_loses_nothing(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    lightrun.run(entrypoint="true", network="none")
    flood = PRINT_BLOCKS.format(count=10)
    with Watchman(lightrun.pid) as watchman, live(lightrun, flood, files={"block": BLOCK}) as events:
        next(events)
        time.sleep(3)
        logs = [event["line"] for event in events if event["event"] == "log"]
    assert logs == BLOCK.splitlines() * 10 + ["last"]
    assert watchman.risen < 60 * MIB


FALL_BEHIND = "MAX_BEHIND_BYTES = lightrun.SEGMENT_BYTES = 8 << 20"  # quick ones fall behind by some, on a busy machine


def test_a_follower_that_is_too_slow_is_cut_off_with_an_error_and_the_others_are_not(
    daemon: DaemonFactory, tmp_path: Path
) -> None:
    lightrun = patched(daemon, tmp_path, FALL_BEHIND)
    run = lightrun.detach(**{**FLOOD, "entrypoint": SMALL_FLOOD})
    with ThreadPoolExecutor() as pool, lightrun.open("GET", f"/runs/{run}/logs?follow=true") as stuck:
        quick = [pool.submit(log_bytes, lightrun, run, "?follow=true") for _ in range(2)]
        assert [hashlib.sha256(each.result()).digest() for each in quick] == [hashlib.sha256(SMALL_FLOODED).digest()] * 2
        assert lightrun.wait(run)["reason"] == "exited"
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            stuck.read()


@pytest.mark.long
def test_a_live_client_that_is_too_slow_gets_a_gap_and_its_run_goes_on(daemon: DaemonFactory, tmp_path: Path) -> None:
    lightrun = patched(daemon, tmp_path, FALL_BEHIND)
    with live(lightrun, f"{SMALL_FLOOD}; sleep 3; echo after", files=FLOOD["files"]) as events:
        run = next(events)["id"]
        assert eventually(lambda: log_bytes(lightrun, run, "?tail=1") == b"last\n", timeout=60)
        told = list(events)
    assert (told[-1]["run"]["status"], told[-1]["run"]["reason"]) == ("succeeded", "exited")
    assert told[-2]["line"] == "after"
    parts = [list(part) for gap, part in itertools.groupby(told[1:-2], lambda event: event["event"] == "gap") if not gap]
    assert len(parts) > 1, "there was no gap"
    for part in parts:  # each without a hole, but for the lines that were cut
        numbers = [int(event["line"][:-1]) for event in part[1:-1] if event["event"] == "log" and event["line"] != "last"]
        assert numbers == [(numbers[0] + count) % 10_000 for count in range(len(numbers))]


@pytest.mark.long
def test_a_disk_that_fills_cuts_followers_off_and_not_the_run(daemon: DaemonFactory) -> None:
    lightrun = daemon(start=False)
    lightrun.state_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(lightrun.state_dir)], check=True)
    try:
        lightrun.start()
        with live(lightrun, f"{FLOOD['entrypoint']}; sleep 3; echo after", files=FLOOD["files"]) as events:
            run = next(events)["id"]
            with lightrun.open("GET", f"/runs/{run}/logs?follow=true") as stuck:
                assert eventually(lambda: log_bytes(lightrun, run, "?tail=1") == b"last\n", timeout=60)
                told = list(events)
                with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                    stuck.read()
        assert "gap" in {event["event"] for event in told}
        assert (told[-2].get("line"), told[-1]["run"]["reason"]) == ("after", "exited")
        lightrun.stop()
    finally:
        lightrun.kill()
        subprocess.run(["umount", str(lightrun.state_dir)], check=True)


# ---------------------------------------------------------------- ?wait


def test_wait_answers_when_the_run_ends(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="sleep 2", network="none")
    began = time.monotonic()
    state = lightrun_tcp.request("GET", f"/runs/{run}?wait=30000").json()
    assert (state["status"], time.monotonic() - began < 15) == ("succeeded", True)
    assert lightrun_tcp.request("GET", f"/runs/{run}?wait=60000").json() == state


def test_wait_answers_when_the_time_is_up(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint=LONG, network="none")
    began = time.monotonic()
    state = lightrun_tcp.request("GET", f"/runs/{run}?wait=700").json()
    assert state["status"] == "running"
    assert 0.7 <= time.monotonic() - began < 5
    assert lightrun_tcp.request("GET", f"/runs/{run}?wait=0").json()["status"] == "running"
    assert post(lightrun_tcp, run, "cancel") == 204
    assert lightrun_tcp.request("GET", f"/runs/{run}?wait=30000").json()["status"] == "cancelled"


@pytest.mark.parametrize("wait", ["-1", "60001", "1.5", "x", ""])
def test_wait_is_bounded(lightrun_tcp: Daemon, printed: str, wait: str) -> None:
    assert lightrun_tcp.request("GET", f"/runs/{printed}?wait={wait}").status == 400


# ---------------------------------------------------------------- Stop and cancel


@pytest.mark.parametrize(
    ("wanted", "name", "code", "status"),
    [
        (None, "TERM", 3, "failed"),
        ({}, "TERM", 0, "succeeded"),
        *longer(({"signal": "SIGINT"}, "INT", 7, "failed"), ({"signal": "SIGUSR1", "grace": 20_000}, "USR1", 0, "succeeded")),
    ],
)
def test_stop_leaves_the_program_its_own_exit_code(
    lightrun_tcp: Daemon, wanted: Any, name: str, code: int, status: str
) -> None:
    run = lightrun_tcp.detach(entrypoint=TRAPPED.format(code=code, signal=name), network="none")
    ready(lightrun_tcp, run)
    assert post(lightrun_tcp, run, "stop", wanted) == 204
    state = lightrun_tcp.wait(run)
    assert (state["status"], state["reason"], state["exitCode"]) == (status, "stopped", code)
    assert state["logs"] == ["ready", "bye"]
    assert state["error"]


@pytest.mark.parametrize(("grace", "least"), [(1000, 1.0), (0, 0.0)])
def test_stop_kills_after_the_grace(lightrun_tcp: Daemon, grace: int, least: float) -> None:
    run = lightrun_tcp.detach(entrypoint="trap '' TERM; echo ready; sleep 60", network="none")
    ready(lightrun_tcp, run)
    began = time.monotonic()
    assert post(lightrun_tcp, run, "stop", {"grace": grace}) == 204
    state = lightrun_tcp.wait(run)
    assert (state["status"], state["reason"], state["exitCode"]) == ("failed", "stopped", 137)
    assert least <= time.monotonic() - began < least + 8


def test_stop_ends_a_program_without_handlers_at_once(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="echo ready; sleep 60; echo no", network="none")
    ready(lightrun_tcp, run)
    assert post(lightrun_tcp, run, "stop") == 204
    state = lightrun_tcp.wait(run, timeout=8)
    assert (state["reason"], state["exitCode"], state["logs"]) == ("stopped", 143, ["ready"])


def test_a_later_stop_may_be_harder(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="trap '' TERM; echo ready; sleep 60", network="none")
    ready(lightrun_tcp, run)
    assert post(lightrun_tcp, run, "stop", {"grace": 300_000}) == 204
    assert post(lightrun_tcp, run, "stop", {"grace": 200}) == 204
    state = lightrun_tcp.wait(run, timeout=10)
    assert (state["reason"], state["exitCode"]) == ("stopped", 137)


def test_a_cancel_overrides_a_stop(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="trap '' TERM; echo ready; sleep 60", network="none")
    ready(lightrun_tcp, run)
    assert post(lightrun_tcp, run, "stop", {"grace": 300_000}) == 204
    assert post(lightrun_tcp, run, "cancel") == 204
    state = lightrun_tcp.wait(run, timeout=10)
    assert (state["status"], state["reason"], state["exitCode"]) == ("cancelled", "cancelled", 137)


def test_nothing_overrides_a_cancel(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1")
    blocker = lightrun.detach(entrypoint=LONG, network="none")
    ready(lightrun, blocker)
    assert post(lightrun, blocker, "cancel") == 204
    assert post(lightrun, blocker, "cancel") in (204, 409)
    assert post(lightrun, blocker, "stop") in (204, 409)
    assert lightrun.wait(blocker)["reason"] == "cancelled"


@pytest.mark.parametrize(
    ("action", "status", "reason"), [("cancel", "cancelled", "cancelled"), ("stop", "failed", "stopped")]
)
def test_a_queued_run_ends_at_once(daemon: DaemonFactory, action: str, status: str, reason: str) -> None:
    lightrun = daemon("--max-concurrent", "1", "--queue", "2")
    blocker = lightrun.detach(entrypoint=LONG, network="none")
    queued = lightrun.detach(entrypoint="echo never", network="none")
    assert lightrun.state(queued)["phase"] == "queued"
    assert post(lightrun, queued, action) == 204
    lightrun.wait(queued, timeout=5)
    state = lightrun.state(queued)
    assert (state["status"], state["reason"], state["logs"]) == (status, reason, [])
    assert not state.keys() & {"exitCode", "startedAt", "phase"}
    assert lightrun.state(blocker)["status"] == "running"
    assert post(lightrun, blocker, "cancel") == 204
    lightrun.wait(blocker)


@pytest.mark.parametrize(("action", "reason"), [("cancel", "cancelled"), ("stop", "stopped")])
def test_a_pull_that_hangs_is_given_up(lightrun_tcp: Daemon, action: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # A registry that never answers.
        lightrun = lightrun_tcp
        run = lightrun.detach(image=f"127.0.0.1:{silent.getsockname()[1]}/x:1", entrypoint="true", network="none")
        lightrun.wait_for(run, lambda state: state["phase"] == "pulling")
        assert post(lightrun, run, action) == 204
        state = lightrun.wait(run, timeout=5)
        assert (state["reason"], "startedAt" in state) == (reason, False)


@pytest.mark.parametrize("action", ["stop", "cancel"])
def test_a_finished_run_is_not_running(lightrun_tcp: Daemon, printed: str, action: str) -> None:
    response = lightrun_tcp.request("POST", f"/runs/{printed}/{action}")
    assert (response.status, response.json()["error"]) == (409, "not_running")
    response = lightrun_tcp.request("POST", f"/runs/{uuid.uuid4()}/{action}")
    assert (response.status, response.json()["error"]) == (404, "not_found")


BAD_STOPS: list[tuple[Any, list[str]]] = [
    ({"signal": "TERM"}, ["signal"]),
    ({"signal": 15}, ["signal"]),
    ({"signal": "SIGNOPE"}, ["signal"]),
    ({"grace": -1}, ["grace"]),
    ({"grace": 300_001}, ["grace"]),
    ({"grace": True}, ["grace"]),
    ({"grace": 1.5}, ["grace"]),
    ({"garce": 1}, ["garce"]),
    ([], []),
]


def test_a_bad_stop_is_refused_and_stops_nothing(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint=LONG, network="none")
    ready(lightrun_tcp, run)
    for wanted, path in BAD_STOPS:
        response = lightrun_tcp.request("POST", f"/runs/{run}/stop", json=wanted)
        assert (response.status, response.json()["details"][0]["path"]) == (400, path), wanted
    assert lightrun_tcp.request("POST", f"/runs/{run}/stop", body='{"grace": 1}').status == 415
    assert lightrun_tcp.state(run)["status"] == "running"
    assert post(lightrun_tcp, run, "cancel") == 204
    lightrun_tcp.wait(run)


def test_delete_waits_for_the_end(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint=LONG, network="none")
    response = lightrun_tcp.request("DELETE", f"/runs/{run}")
    assert (response.status, response.json()["error"]) == (409, "running")
    assert post(lightrun_tcp, run, "cancel") == 204
    lightrun_tcp.wait(run)
    assert lightrun_tcp.request("DELETE", f"/runs/{run}").status == 204
    assert lightrun_tcp.request("DELETE", f"/runs/{run}").status == 404


@pytest.mark.alone("cancels within milliseconds")
def test_an_early_cancel_never_lets_the_command_run(lightrun_tcp: Daemon, engine: docker.APIClient) -> None:
    since = int(time.time()) - 1
    runs = []
    for number in range(12):
        run = lightrun_tcp.detach(entrypoint="echo ran", files={"a": "b"}, network="none")
        time.sleep(0.002 * (number % 4))
        assert post(lightrun_tcp, run, "cancel") == 204
        runs.append(run)
    states = [lightrun_tcp.wait(run) for run in runs]
    assert {(state["status"], state["reason"]) for state in states} == {("cancelled", "cancelled")}
    assert not [state["id"] for state in states if state["logs"]]
    started = {
        event["Actor"]["Attributes"].get(LABEL_RUN)
        for event in engine.events(since, int(time.time()) + 1, {"type": "container", "event": "start"}, decode=True)
    }
    assert not started & set(runs)


def test_a_command_that_ends_with_137_by_itself_has_exited(lightrun_tcp: Daemon) -> None:
    for command in ("exit 137", "kill -9 $$"):
        run = lightrun_tcp.run(entrypoint=command, network="none")
        assert (run["status"], run["reason"], run["exitCode"]) == ("failed", "exited", 137)
        assert "oomKilled" not in run
        assert "error" not in run


# ---------------------------------------------------------------- Clients that leave


def close(connection: socket.socket) -> None:
    """Leave for good."""
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Say no more, and listen on."""
    connection.shutdown(socket.SHUT_WR)


def send(daemon: Daemon, method: str, path: str, body: Any = None, *headers: str) -> socket.socket:
    """A connection on which a request was sent."""
    content = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}", *headers]
    connection = daemon.connect()
    connection.sendall("\r\n".join([*head, "Content-Type: application/json", "", ""]).encode() + content)
    return connection


def running(daemon: Daemon) -> list[str]:
    """The ids of runs that have not ended."""
    return [state["id"] for state in daemon.request("GET", "/runs?status=running").json()]


def appeared(daemon: Daemon, before: list[str]) -> str:
    """The id of the one run that was not there before, once its command runs."""
    found = eventually(lambda: set(running(daemon)) - set(before))
    assert len(found) == 1
    ready(daemon, str(*found))
    return str(*found)


def ways_to_leave() -> Iterator[Any]:
    """All of them; the short form has half, with every pair of two things."""
    ways = itertools.product(
        enumerate(["lightrun_tcp", "lightrun_unix"]),
        enumerate(["application/json", "application/x-ndjson"]),
        enumerate([close, half_close]),
    )
    for way in ways:
        odd = sum(number for number, _ in way) % 2
        yield pytest.param(*(each for _, each in way), marks=[pytest.mark.long] if odd else [])


@pytest.mark.parametrize(("transport", "accept", "leave"), list(ways_to_leave()))
def test_a_client_that_leaves_cancels_its_run(
    request: pytest.FixtureRequest, transport: str, accept: str, leave: Callable[[socket.socket], None]
) -> None:
    daemon: Daemon = request.getfixturevalue(transport)
    before = running(daemon)
    with send(daemon, "POST", "/run", request_body(LONG), f"Accept: {accept}") as connection:
        run = appeared(daemon, before)
        leave(connection)
        state = daemon.wait(run, timeout=10)
    assert (state["status"], state["reason"], state["logs"]) == ("cancelled", "cancelled", ["ready"])


def test_a_client_that_leaves_early_cancels_its_run(lightrun_tcp: Daemon) -> None:
    known = {state["id"] for state in lightrun_tcp.request("GET", "/runs?limit=1000").json()}
    for _ in range(5):
        send(lightrun_tcp, "POST", "/run", request_body(LONG)).close()

    def reasons() -> set[str | None]:
        states = lightrun_tcp.request("GET", "/runs?limit=1000").json()
        return {state.get("reason") for state in states if state["id"] not in known}

    assert eventually(lambda: None not in reasons())
    time.sleep(0.5)  # A request that is late has its run begin now.
    assert eventually(lambda: None not in reasons())
    assert reasons() <= {"cancelled"}


def test_a_client_that_leaves_the_queue_frees_its_place(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1", "--queue", "1")
    blocker = lightrun.detach(entrypoint=LONG, network="none")
    ready(lightrun, blocker)
    connection = send(lightrun, "POST", "/run", request_body("true"))
    assert eventually(lambda: lightrun.request("GET", "/health").json()["runs"]["queued"] == 1)
    assert lightrun.request("POST", "/run", json=request_body("true")).json()["error"] == "busy"
    connection.close()
    queued = eventually(lambda: lightrun.request("POST", "/run", json=request_body("true", detached=True)).status == 202)
    assert queued
    assert post(lightrun, blocker, "cancel") == 204
    assert eventually(lambda: not running(lightrun))


def test_a_run_is_kept_while_another_client_waits_for_it(lightrun_tcp: Daemon) -> None:
    before = running(lightrun_tcp)
    first = send(lightrun_tcp, "POST", "/run", request_body(LONG), "Accept: application/x-ndjson")
    run = appeared(lightrun_tcp, before)
    with send(lightrun_tcp, "GET", f"/runs/{run}?wait=60000") as second:
        time.sleep(0.5)
        first.close()
        time.sleep(1.5)
        assert lightrun_tcp.state(run)["status"] == "running"
        second.close()
        assert lightrun_tcp.wait(run, timeout=10)["reason"] == "cancelled"


@pytest.mark.long
def test_a_run_is_kept_when_the_other_client_leaves(lightrun_tcp: Daemon) -> None:
    before = running(lightrun_tcp)
    with send(lightrun_tcp, "POST", "/run", request_body("echo ready; sleep 4")) as first:
        run = appeared(lightrun_tcp, before)
        send(lightrun_tcp, "GET", f"/runs/{run}?wait=60000").close()
        assert lightrun_tcp.request("GET", f"/runs/{run}?wait=300").json()["status"] == "running"
        with http.client.HTTPResponse(first) as response:
            response.begin()
            assert json.loads(response.read())["status"] == "succeeded"


def test_a_detached_run_needs_nobody(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="echo ready; sleep 2", network="none")
    ready(lightrun_tcp, run)
    send(lightrun_tcp, "GET", f"/runs/{run}?wait=60000").close()
    send(lightrun_tcp, "GET", f"/runs/{run}/logs?follow=true").close()
    assert lightrun_tcp.wait(run)["status"] == "succeeded"


def test_who_leaves_a_silent_run_frees_the_place_at_once(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-waiting", "1")
    run = lightrun.detach(entrypoint=LONG, network="none")
    ready(lightrun, run)

    def answer() -> Response:
        return lightrun.request("GET", f"/runs/{run}?wait=1")

    paths = ("/logs?follow=true", "/logs?follow=true&stream=stderr", "?wait=60000")
    for path, leave in itertools.product(paths, (close, half_close)):
        with send(lightrun, "GET", f"/runs/{run}{path}") as connection:
            assert eventually(lambda: answer().status == 503)
            busy = answer()
            assert (busy.json()["error"], int(busy.headers["Retry-After"]) > 0) == ("busy", True)
            leave(connection)
            assert eventually(lambda: answer().status == 200, timeout=2), (path, leave)
    assert post(lightrun, run, "cancel") == 204
    lightrun.wait(run)


# ---------------------------------------------------------------- Idempotency keys


def keyed(daemon: Daemon, key: str, body: dict[str, Any], **headers: str) -> Response:
    """POST a run with a key."""
    return daemon.request("POST", "/run", json=body, headers={"Idempotency-Key": key, **headers})


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return f"key {uuid.uuid4()} ~!"


def test_concurrent_repeats_join_one_run(lightrun_tcp: Daemon, key: str) -> None:
    body = request_body("date +%s%N; sleep 1")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: keyed(lightrun_tcp, key, body), range(6)))
        live_answers = list(pool.map(lambda _: keyed(lightrun_tcp, key, body, **NDJSON), range(2)))
    assert {answer.status for answer in answers} == {200}
    states = [answer.json() for answer in answers]
    states += [json.loads(answer.body.splitlines()[-1])["run"] for answer in live_answers]
    assert all(state == states[0] for state in states)
    assert states[0]["status"] == "succeeded"


def test_a_live_repeat_joins_a_running_run(lightrun_tcp: Daemon, key: str) -> None:
    body = request_body("echo one; sleep 2; echo two")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(keyed, lightrun_tcp, key, body)
        time.sleep(1)
        events = [json.loads(line) for line in keyed(lightrun_tcp, key, body, **NDJSON).body.splitlines()]
    assert [event["line"] for event in events if event["event"] == "log"] == ["one", "two"]
    assert events[-1]["run"] == first.result().json()


def test_a_repeat_after_the_end_returns_the_same_state(lightrun_tcp: Daemon, key: str) -> None:
    body = request_body("echo hello; exit 4")
    first = keyed(lightrun_tcp, key, body)
    again = keyed(lightrun_tcp, key, body)
    assert (again.status, again.json()) == (200, first.json())
    events = [json.loads(line) for line in keyed(lightrun_tcp, key, body, **NDJSON).body.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "started", "log", "finished"]
    assert events[-1]["run"] == first.json()


def test_another_body_conflicts(lightrun_tcp: Daemon, key: str) -> None:
    keyed(lightrun_tcp, key, request_body("true"))
    for body in (request_body("false"), request_body("true", timeout=1000)):
        response = keyed(lightrun_tcp, key, body)
        assert (response.status, response.json()["error"]) == (409, "conflict")


def test_detached_repeats_have_one_id(lightrun_tcp: Daemon, key: str) -> None:
    body = request_body("sleep 1", detached=True)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: keyed(lightrun_tcp, key, body), range(4)))
    assert {(answer.status, answer.headers["Location"]) for answer in answers} == {(202, answers[0].json()["url"])}
    assert {answer.json()["status"] for answer in answers} == {"running"}
    state = lightrun_tcp.wait(answers[0].json()["id"])
    late = keyed(lightrun_tcp, key, body)
    assert (late.status, late.json()) == (202, {"id": state["id"], "status": "succeeded", "url": f"/runs/{state['id']}"})


def test_a_key_goes_with_its_run(lightrun_tcp: Daemon, key: str) -> None:
    first = keyed(lightrun_tcp, key, request_body("true")).json()["id"]
    assert lightrun_tcp.request("DELETE", f"/runs/{first}").status == 204
    second = keyed(lightrun_tcp, key, request_body("exit 1")).json()
    assert (second["id"] != first, second["exitCode"]) == (True, 1)


@pytest.mark.parametrize("accept", ["application/json", *longer("application/x-ndjson")])
def test_a_run_with_a_key_outlives_its_clients(lightrun_tcp: Daemon, key: str, accept: str) -> None:
    body, before = request_body("echo ready; sleep 2; echo done"), running(lightrun_tcp)
    content = json.dumps(body)
    with send(lightrun_tcp, "POST", "/run", body, f"Idempotency-Key: {key}", f"Accept: {accept}"):
        run = appeared(lightrun_tcp, before)
    state = lightrun_tcp.request(
        "POST", "/run", body=content, headers={"Idempotency-Key": key, "Content-Type": "application/json"}
    ).json()
    assert (state["id"], state["status"], state["logs"]) == (run, "succeeded", ["ready", "done"])


@pytest.mark.parametrize("key", ["x" * 201, "a\tb", "\u00e9", ""])
def test_keys_are_printable(lightrun_tcp: Daemon, key: str) -> None:
    body = request_body("true", detached=True)
    with send(lightrun_tcp, "POST", "/run", body, f"Idempotency-Key: {key}") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("key", ["x" * 200, "!", "a b", "~"])
def test_every_printable_key_will_do(lightrun_tcp: Daemon, key: str) -> None:
    absent = {**request_body("true"), "image": "127.0.0.1:1/absent"}  # ends at once, without a container
    assert keyed(lightrun_tcp, key, absent).status == 200


# ---------------------------------------------------------------- Coming back to a log


def test_events_of_a_run_in_progress_and_of_one_that_has_ended(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="echo out; echo err >&2; sleep 1; echo more; exit 3")
    lightrun_tcp.wait_for(run, lambda state: state["logs"])
    live, after = (lightrun_tcp.request("GET", f"/runs/{run}/events") for _ in range(2))
    for response in (live, after):
        assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
        events = [json.loads(line) for line in response.body.splitlines()]
        assert [event["event"] for event in events] == ["accepted", "started", "log", "log", "log", "finished"]
        assert (events[0]["id"], events[-1]["run"]["exitCode"], events[-2]["line"]) == (run, 3, "more")
    refused = lightrun_tcp.run(image="lightrun/none:1")["id"]
    events = [json.loads(line) for line in lightrun_tcp.request("GET", f"/runs/{refused}/events").body.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "finished"]
    assert lightrun_tcp.request("GET", f"/runs/{'0' * 36}/events").status == 404


def test_events_that_lack_the_beginning_say_so(daemon: DaemonFactory) -> None:
    lightrun = daemon("--log-limit", "1k")
    run = lightrun.run(entrypoint="seq 1 1000")["id"]
    events = [json.loads(line)["event"] for line in lightrun.request("GET", f"/runs/{run}/events").body.splitlines()]
    assert events[:3] == ["accepted", "gap", "started"]


def test_a_run_that_is_over_before_its_follower_looks_has_started_too(tmp_path: Path) -> None:
    settings = lightrun.Settings(state_dir=tmp_path)
    store, metrics = lightrun.Store(tmp_path), lightrun.Metrics()
    engine, evictor = lightrun.Engine(settings, store.id), lightrun.Evictor(store, settings)
    callbacks = lightrun.Callbacks(store, ())
    runner = lightrun.Runner(settings, store, engine, evictor, callbacks, metrics)
    execs = lightrun.Execs(settings, store, engine, evictor, runner.tree, metrics)
    api = lightrun.Api(settings, store, engine, runner, execs, evictor, callbacks, metrics)
    request = lightrun.RunRequest.parse(json.dumps(request_body("true")).encode(), settings)
    run, job = runner.submit(request, None, str)
    assert job
    events = api._events(lightrun.Call({}, {}, threading.Event()), run, job, True)
    early = [next(events), next(events)]
    assert job.done.wait(20)
    assert [event["event"] for event in (*early, *events) if event] == ["accepted", "started", "finished"]
    assert eventually(lambda: not runner.places.taken())
    store.close()


def test_output_that_is_lost_at_the_end_is_a_gap_there(lightrun_tcp: Daemon, engine: docker.APIClient) -> None:
    run = lightrun_tcp.detach(entrypoint=LONG, network="none")
    ready(lightrun_tcp, run)
    lightrun_tcp.process.send_signal(signal.SIGSTOP)  # else it may see how the container ends
    engine.remove_container(f"lightrun-{run}", force=True)
    lightrun_tcp.process.send_signal(signal.SIGCONT)
    state = lightrun_tcp.wait(run)
    assert (state["reason"], state["logs"], state["logsTruncated"]) == ("lost", ["ready"], True)
    events = [json.loads(line)["event"] for line in lightrun_tcp.request("GET", f"/runs/{run}/events").body.splitlines()]
    assert events == ["accepted", "gap", "started", "log", "gap", "finished"]


def since(daemon: Daemon, run: str, start: int, more: str = "") -> tuple[int, bytes]:
    response = daemon.request("GET", f"/runs/{run}/logs?from={start}{more}")
    return response.status, response.body


def test_logs_from_a_byte(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint="printf abc; printf 123 >&2; sleep 2; printf def; printf 456 >&2")
    lightrun_tcp.wait_for(run, lambda state: len("".join(state["logs"])) == 6)
    assert since(lightrun_tcp, run, 1, "&stream=stdout") == (200, b"bc")
    assert since(lightrun_tcp, run, 3, "&stream=stdout") == (200, b"")
    assert since(lightrun_tcp, run, 4, "&stream=stdout")[0] == 410
    assert since(lightrun_tcp, run, 2, "&stream=stdout&follow=true") == (200, b"cdef")
    for start, rest in ((0, b"123456"), (3, b"456"), (6, b"")):
        assert since(lightrun_tcp, run, start, "&stream=stderr") == (200, rest)
        assert since(lightrun_tcp, run, start, "&stream=stderr&follow=true") == (200, rest)
    whole = lightrun_tcp.request("GET", f"/runs/{run}/logs").body
    for start in range(13):
        assert since(lightrun_tcp, run, start) == (200, whole[start:])
    gone = lightrun_tcp.request("GET", f"/runs/{run}/logs?from=13")
    assert (gone.status, gone.json()["error"], gone.json()["message"]) == (410, "gone", "bytes 0 to 12 are kept")
    for bad in ("from=-1", "from=x", "from=1&tail=1"):
        assert lightrun_tcp.request("GET", f"/runs/{run}/logs?{bad}").status == 400


def test_what_was_dropped_is_gone(daemon: DaemonFactory) -> None:
    lightrun = daemon("--log-limit", "1k")
    run = lightrun.run(entrypoint="seq -w 1 1000; echo err >&2")["id"]  # 5,000 bytes
    assert since(lightrun, run, 3976, "&stream=stdout") == (200, lightrun.request("GET", f"/runs/{run}/logs?stream=stdout").body)
    assert since(lightrun, run, 4990, "&stream=stdout") == (200, b"0999\n1000\n"[-10:])
    assert since(lightrun, run, 3975, "&stream=stdout")[0] == 410
    assert since(lightrun, run, 0, "&stream=stderr") == (200, b"err\n")
    assert since(lightrun, run, 5000)[0] == 410


def test_a_follower_comes_back_after_kill_9(daemon: DaemonFactory) -> None:
    """Not a byte of a stream is lost or told twice; between two streams the order may have changed."""
    lightrun = daemon()
    run = lightrun.detach(entrypoint="for i in $(seq 1 60); do echo line $i; echo err >&2; sleep 0.05; done")
    lightrun.wait_for(run, lambda state: len(state["logs"]) > 10)
    with lightrun.open("GET", f"/runs/{run}/logs?follow=true&stream=stdout") as response:
        first = response.read(40)
    lightrun.kill()
    lightrun.start()
    assert since(lightrun, run, 0)[0] == 410
    status, rest = since(lightrun, run, len(first), "&stream=stdout&follow=true")
    assert (status, first + rest) == (200, b"".join(b"line %d\n" % number for number in range(1, 61)))
    lightrun.wait(run)
    assert since(lightrun, run, len(first), "&stream=stdout") == (200, rest)
    assert since(lightrun, run, 0)[0] == 410


# ---------------------------------------------------------------- Events with bytes


def pieces(daemon: Daemon, run: str, query: str = "") -> tuple[dict[str, bytes], list[Event]]:
    """What events with bytes say of each stream, put together by where they say that it stands; and all events."""
    response = daemon.request("GET", f"/runs/{run}/events?encoding=base64{query}")
    assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
    events, told = [json.loads(line) for line in response.body.splitlines()], {"stdout": bytearray(), "stderr": bytearray()}
    for event in events:
        if event["event"] == "log":
            text = told[event["stream"]]
            text.extend(bytes(event["at"] - len(text)))
            assert event["at"] == len(text)
            text += base64.b64decode(event["base64"])
    return {stream: bytes(text) for stream, text in told.items()}, events


def test_events_have_the_bytes_on_request(lightrun_tcp: Daemon) -> None:
    script = r"printf 'a\r\377'; printf 'no end' >&2; sleep 0.4; printf 'b\n'; exit 3"
    run = lightrun_tcp.detach(entrypoint=script, network="none")
    whole = {"stdout": b"a\r\xffb\n", "stderr": b"no end"}
    live, events = pieces(lightrun_tcp, run)
    assert live == whole
    assert sum(event["event"] == "log" and event["stream"] == "stdout" for event in events) == 2  # as they came
    assert (events[-1]["event"], events[-1]["run"]["exitCode"]) == ("finished", 3)
    assert pieces(lightrun_tcp, run)[0] == whole
    with live_pieces(lightrun_tcp, script) as posted:
        out = [base64.b64decode(event["base64"]) for event in posted if event.get("stream") == "stdout"]
        assert b"".join(out) == whole["stdout"]


@contextlib.contextmanager
def live_pieces(daemon: Daemon, entrypoint: str) -> Iterator[Iterator[Event]]:
    """POST a live run whose events have bytes."""
    with daemon.open("POST", "/run?encoding=base64", json=request_body(entrypoint), headers=NDJSON) as response:
        yield (json.loads(line) for line in response)


def test_events_with_bytes_tell_where_they_stand(lightrun_tcp: Daemon) -> None:
    size = 3 * MIB
    run = lightrun_tcp.run(entrypoint=f"echo early >&2; head -c {size} /dev/urandom; sleep 0.3; echo late >&2", network="none")
    told, events = pieces(lightrun_tcp, run["id"])
    assert (told["stderr"], len(told["stdout"])) == (b"early\nlate\n", size)
    first = next(event["at"] for event in events if event.get("stream") == "stdout")
    assert (first, events[1]) == (size - MIB, {"event": "gap"})
    assert told["stdout"][first:] == log_bytes(lightrun_tcp, run["id"], "?stream=stdout")


def test_events_so_far(lightrun_tcp: Daemon) -> None:
    run = lightrun_tcp.detach(entrypoint=LONG, network="none")
    ready(lightrun_tcp, run)
    told, events = pieces(lightrun_tcp, run, "&follow=false")
    assert (told["stdout"], [event["event"] for event in events]) == (b"ready\n", ["accepted", "started", "log", "running"])
    assert post(lightrun_tcp, run, "cancel") == 204
    lightrun_tcp.wait(run)
    events = [json.loads(line) for line in lightrun_tcp.request("GET", f"/runs/{run}/events?follow=false").body.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "started", "log", "finished"]
    for query in ("encoding=hex", "follow=1", "from=0", "encoding=base64&encoding=base64"):
        assert lightrun_tcp.request("GET", f"/runs/{run}/events?{query}").status == 400, query


@pytest.mark.long
def test_where_bytes_stand_survives_a_kill_or_is_not_told(daemon: DaemonFactory) -> None:
    """The engine's copy of a log, from which an adopted run is read, is whole only while it is small."""
    lightrun = daemon("--log-limit", "64k")
    lines = "yes $(printf %0999d 7) | head -c 100000; echo ready >&2; sleep 3; echo end"
    short = lightrun.detach(entrypoint=lines, network="none")
    flood = "i=0; while [ $i -lt 40 ]; do yes | head -c 65536; i=$((i+1)); done; echo ready >&2; sleep 3; echo end"
    long = lightrun.detach(entrypoint=flood, network="none")
    for run in (short, long):
        lightrun.wait_for(run, lambda state: "ready" in state["logs"])
    lightrun.kill()
    lightrun.start()
    for run in (short, long):
        lightrun.wait(run)
    told, _ = pieces(lightrun, short)
    assert (len(told["stdout"]), told["stdout"][-4:], told["stderr"]) == (100_004, b"end\n", b"ready\n")
    response = lightrun.request("GET", f"/runs/{long}/events?encoding=base64")
    events = [json.loads(line) for line in response.body.splitlines()]
    logs = [event for event in events if event["event"] == "log"]
    assert logs
    assert not [event for event in logs if "at" in event]
    assert lightrun.request("GET", f"/runs/{long}/logs?stream=stdout&from=2600000").status == 410
