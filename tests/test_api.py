"""The HTTP API on a real engine: what goes into a run, what comes out, and what every wrong request is told."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import socket
import sqlite3
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import pytest

import lightrun
from conftest import Daemon, DaemonFactory, Response, eventually
from engine import IMAGE, EngineApi
from images import Registry
from lightrun import parse_timestamp

SLEEP = "sleep 60"
NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def api(module_daemon: DaemonFactory) -> Daemon:
    """A daemon with its defaults."""
    return module_daemon()


@pytest.fixture(scope="module")
def small(module_daemon: DaemonFactory) -> Daemon:
    """A daemon with one place to run and one to queue, and low limits."""
    return module_daemon(
        "--max-concurrent", "1", "--queue", "1", "--log-limit", "1k", "--extract-limit", "1000", "--body-limit", "64k",
        "--memory", "64m", "--cpus", "0.5", "--pids", "50", "--allow-image", "docker.io/lightrun/*",
    )  # fmt: skip


def get(daemon: Daemon, path: str, **headers: str) -> Response:
    """GET a path."""
    return daemon.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def post(daemon: Daemon, path: str) -> Response:
    """POST without a body."""
    return daemon.request("POST", path)


def logs(daemon: Daemon, run: str, query: str = "") -> bytes:
    """The raw log of a run."""
    response = get(daemon, f"/runs/{run}/logs{query}")
    assert response.headers["Content-Type"] == "application/octet-stream"
    return response.body


def artifact(daemon: Daemon, run: str, path: str) -> bytes:
    """A file that a run left."""
    response = get(daemon, f"/runs/{run}/artifacts/{quote(path)}")
    assert response.status == 200, response.text
    return response.body


def is_error(response: Response, status: int, code: str) -> bool:
    """Whether an answer is this error, as JSON."""
    assert response.headers["Content-Type"] == "application/json"
    assert (response.status, response.json()["error"]) == (status, code), response.text
    return True


def image_id(name: str) -> str:
    """The engine's id of an image."""
    return str((EngineApi().inspect_image(name) or {})["Id"])


def running(daemon: Daemon, run: str) -> dict[str, Any]:
    """The state of a run whose container has started."""
    return daemon.wait_for(run, lambda state: state.get("phase") == "running")


# ---------------------------------------------------------------- What a run returns


def test_the_final_state(api: Daemon) -> None:
    before = time.time()
    # The engine notes a start some ms after it.
    state = api.run(entrypoint="echo hello; echo oops >&2; sleep 0.25", files={"in.txt": "x"}, extract=["in.txt"])
    assert state.keys() == {
        "id", "status", "reason", "image", "imageId", "createdAt", "startedAt", "finishedAt", "exitCode", "durationMs", "timings",
        "logs", "logsTruncated", "artifacts", "extracted", "usage",
    }  # fmt: skip
    assert (state["status"], state["reason"], state["exitCode"], state["image"]) == ("succeeded", "exited", 0, IMAGE)
    assert state["imageId"] == image_id(IMAGE)
    assert sorted(state["logs"]) == ["hello", "oops"]
    assert state["logsTruncated"] is False
    created, started, finished = (parse_timestamp(state[name]) for name in ("createdAt", "startedAt", "finishedAt"))
    assert before - 0.01 <= created <= started <= finished <= time.time() + 0.01
    assert state["durationMs"] == pytest.approx((finished - created) * 1000, abs=2)
    timings = state["timings"]
    assert timings.keys() == {"queue", "pull", "start", "run", "extract"}
    assert timings["run"] >= 200
    assert timings["run"] <= (finished - started) * 1000 + 1  # as the engine tells both; it notices the exit later
    # A busy engine says that it has started a container long after it has.
    assert timings["queue"] + timings["pull"] + timings["start"] + timings["extract"] <= state["durationMs"] + 2
    assert timings["run"] + timings["extract"] <= (finished - started) * 1000 + 2
    assert state == api.state(state["id"])


@pytest.mark.parametrize(
    ("entrypoint", "code", "lines"),
    [
        ("exit 3", 3, []),
        ("exit 137", 137, []),
        ("kill -9 $$", 137, []),
        ("kill -TERM $$", 143, []),
        (["echo", "$HOME", "a b", ""], 0, ["$HOME a b "]),
        (["sh", "-c", "echo $0 $1", "zero", "one"], 0, ["zero one"]),
    ],
)
def test_entrypoints(api: Daemon, entrypoint: Any, code: int, lines: list[str]) -> None:
    state = api.run(entrypoint=entrypoint)
    assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", code, lines)
    assert state["status"] == ("failed" if code else "succeeded")


@pytest.mark.parametrize("entrypoint", [["no-such-program"], ["/no/such"], "no-such-program"])
def test_a_missing_program_is_exit_code_127(api: Daemon, entrypoint: Any) -> None:
    state = api.run(entrypoint=entrypoint)
    assert (state["status"], state["reason"], state["exitCode"]) == ("failed", "exited", 127)
    assert state["logs"]


def test_without_an_entrypoint_the_images_own_command_runs(api: Daemon) -> None:
    assert api.run(stdin="echo from $0")["logs"] == ["from sh"]


def test_setup_runs_before_in_the_same_shell(api: Daemon) -> None:
    state = api.run(setup=["cd /tmp", "x='a  b'", 'f() { echo "f $1"; }', "export Y=2"], entrypoint='pwd; f "$x"; env|grep ^Y')
    assert state["logs"] == ["/tmp", "f a  b", "Y=2"]


@pytest.mark.parametrize(("command", "code"), [("(exit 4)", 4), ("exit 5", 5), ("no-such-program", 127)])
def test_a_failing_setup_ends_the_run(api: Daemon, command: str, code: int) -> None:
    state = api.run(setup=["echo one", command, "echo two"], entrypoint="echo three")
    assert (state["reason"], state["exitCode"]) == ("exited", code)
    assert logs(api, state["id"], "?stream=stdout") == b"one\n"


def test_a_syntax_error_in_setup_ends_the_run(api: Daemon) -> None:
    state = api.run(setup=["echo one", "if ("], entrypoint="echo three")
    assert state["status"] == "failed"
    assert state["exitCode"] != 0
    assert logs(api, state["id"], "?stream=stdout") == b"one\n"


# ---------------------------------------------------------------- Files, env and stdin in


FILES: dict[str, bytes] = {
    "a.txt": b"text without a newline",
    "deep/er/f": b"",
    "näme with spaces/日本語 😀.txt": "é\n".encode(),
    "-rf": b"a name like an option",
    "q\"'`$(x)": b"a name for a shell",
    "line\nend\n": b"a name of two lines",
    "all": bytes(range(256)),
    "x" * 255: b"a long name",
    "/".join(["y" * 100] * 5) + "/z": b"a long path",
    "big": os.urandom(3 << 20),
}


def test_files_go_in_and_out_bit_for_bit(api: Daemon) -> None:
    sent = {path: {"base64": base64.b64encode(content).decode()} for path, content in FILES.items()}
    state = api.run(files=sent, entrypoint="sha256sum big; mkdir /out; cp -r . /out", extract=["/out"])
    assert state["logs"] == [hashlib.sha256(FILES["big"]).hexdigest() + "  big"]
    assert state["extracted"] == [{"from": "/out", "status": "ok", "bytes": sum(map(len, FILES.values()))}]
    listed = {entry["path"]: entry["bytes"] for entry in state["artifacts"] if entry["type"] == "file"}
    assert listed == {path: len(content) for path, content in FILES.items()}
    assert [entry["path"] for entry in state["artifacts"]] == sorted(entry["path"] for entry in state["artifacts"])
    assert {path: artifact(api, state["id"], path) for path in FILES} == FILES


def test_text_files_are_utf8(api: Daemon) -> None:
    state = api.run(files={"f": "é\r\n\t"}, entrypoint=["cat", "f"])
    assert logs(api, state["id"]) == "é\r\n\t".encode()


@pytest.mark.long
def test_ten_thousand_files(api: Daemon) -> None:
    files = {f"{number % 100}/{number}": str(number) for number in range(10_000)}
    assert api.run(files=files, entrypoint="find . -type f | wc -l; cat 42/4242")["logs"] == ["10000", "4242"]


ENV = {
    "PLAIN": "x",
    "EMPTY": "",
    "SHELL_TEXT": "$(id) `id` ${PATH} $$ ! * ? ~ \\ \" ' ; & | < > # a  b",
    "LINES": "one\ntwo\r\n\n",
    "EQUALS": "=a=b=",
    "UNICODE": "é😀\x7f\x01\ufeff",
    "LONG": "x" * 100_000,
    "_": "",
    "PATH": "/custom:/bin:/usr/bin",
}


def test_env_reaches_the_process_byte_for_byte(api: Daemon) -> None:
    state = api.run(env=ENV, entrypoint=["cat", "/proc/self/environ"])
    seen = dict(pair.split(b"=", 1) for pair in logs(api, state["id"]).split(b"\0") if pair)
    assert {name: seen[name.encode()] for name in ENV} == {name: value.encode() for name, value in ENV.items()}


@pytest.mark.parametrize("value", [None, {"a": [1, "é\n"]}, ""])
def test_input_is_json_on_stdin(api: Daemon, value: Any) -> None:
    assert json.loads(logs(api, api.run(input=value, entrypoint=["cat"])["id"])) == value


@pytest.mark.parametrize("text", ["", "x", "é\nno newline"])
def test_stdin_arrives_and_ends(api: Daemon, text: str) -> None:
    assert logs(api, api.run(stdin=text, entrypoint=["cat"])["id"]) == text.encode()


def test_three_megabytes_of_stdin(api: Daemon) -> None:
    text = "0123456789abcdef" * (3 << 16)
    assert api.run(stdin=text, entrypoint="wc -c; sleep 0.1")["logs"] == [str(3 << 20)]


def test_stdin_that_nobody_reads_holds_up_nothing(api: Daemon) -> None:
    state = api.run(stdin="x" * (3 << 20), entrypoint="echo done")
    assert (state["status"], state["logs"]) == ("succeeded", ["done"])
    assert api.run(stdin="x" * (3 << 20), entrypoint="head -c 1")["logs"] == ["x"]


def test_without_stdin_there_is_an_end_of_file(api: Daemon) -> None:
    assert api.run(entrypoint="cat; echo end")["logs"] == ["end"]


@pytest.mark.parametrize("workdir", ["/app", "/not/yet there", "/tmp"])
def test_the_workdir(api: Daemon, workdir: str) -> None:
    state = api.run(workdir=workdir, files={"f": "x"}, entrypoint="pwd; cat f; touch g", extract=["f", workdir + "/g"])
    assert state["logs"] == [workdir, "x"]
    assert [entry["status"] for entry in state["extracted"]] == ["ok", "ok"]


# ---------------------------------------------------------------- Logs


def test_logs_are_exact_to_the_byte(api: Daemon) -> None:
    state = api.run(files={"f": {"base64": base64.b64encode(bytes(range(256)) * 400).decode()}}, entrypoint="cat f; printf end")
    assert logs(api, state["id"]) == bytes(range(256)) * 400 + b"end"


def test_logs_by_stream_and_by_tail(api: Daemon) -> None:
    run = api.run(entrypoint="echo 1; echo 2; printf 3; printf e >&2")["id"]
    assert logs(api, run, "?stream=stdout") == b"1\n2\n3"
    assert logs(api, run, "?stream=stderr") == b"e"
    assert logs(api, run, "?stream=stdout&tail=2") == b"2\n3"
    assert logs(api, run, "?stream=stdout&tail=0") == b""


def test_the_newest_log_bytes_are_kept(small: Daemon) -> None:
    state = small.run(entrypoint="seq 1 2000")
    assert state["logsTruncated"] is True
    assert logs(small, state["id"]) == "".join(f"{number}\n" for number in range(1, 2001)).encode()[-1024:]
    assert state["logs"][-1] == "2000"
    assert state["exitCode"] == 0


def test_a_running_run_says_that_its_log_is_truncated(small: Daemon) -> None:
    run = small.detach(entrypoint="seq 1 400; sleep 60")
    running(small, run)
    time.sleep(0.5)
    state = small.state(run)
    assert (state["logsTruncated"], state["logs"][-1]) == (True, "400")
    post(small, f"/runs/{run}/cancel")
    small.wait(run)


# ---------------------------------------------------------------- How a run can end


def test_timeout(api: Daemon) -> None:
    state = api.run(entrypoint="echo begun; sleep 60", timeout=500)
    assert (state["status"], state["reason"], state["exitCode"], state["logs"]) == ("failed", "timeout", 137, ["begun"])
    assert state["error"]
    assert 500 <= state["timings"]["run"] < 10_000


def test_out_of_memory(api: Daemon) -> None:
    state = api.run(entrypoint="x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo never", memory="16m")
    assert (state["status"], state["reason"], state["exitCode"], state["oomKilled"]) == ("failed", "oom", 137, True)
    assert state["error"]
    assert "never" not in state["logs"]


def test_a_child_that_is_killed_for_memory_is_told_but_fails_nothing(api: Daemon) -> None:
    state = api.run(entrypoint="sh -c 'x=$(head -c 60000000 /dev/zero | tr \"\\0\" x)'; echo on", memory="16m")
    assert (state["status"], state["reason"], state["exitCode"], state["oomKilled"]) == ("succeeded", "exited", 0, True)


def test_a_start_that_fails(api: Daemon) -> None:
    state = api.run(files={"f/x": ""}, workdir="/bin/busybox")  # a file, where a folder is needed
    assert (state["status"], state["reason"]) == ("failed", "start_failed")
    assert state["error"]
    assert not state.keys() & {"exitCode", "startedAt"}


# ---------------------------------------------------------------- Detached runs, cancel, delete


def test_a_detached_run(api: Daemon) -> None:
    response = api.request("POST", "/run", json={"image": IMAGE, "entrypoint": "echo x; sleep 1; echo y", "detached": True})
    run = response.json()["id"]
    assert (response.status, response.headers["Location"]) == (202, f"/runs/{run}")
    assert response.json() == {"id": run, "status": "running", "url": f"/runs/{run}"}
    state = api.wait_for(run, lambda state: state["logs"])
    assert (state["status"], state["phase"], state["logs"]) == ("running", "running", ["x"])
    assert not state.keys() & {"reason", "exitCode", "finishedAt", "durationMs", "artifacts"}
    assert api.wait(run)["logs"] == ["x", "y"]


def test_cancel_of_a_running_container(api: Daemon) -> None:
    run = api.detach(entrypoint="echo begun; " + SLEEP, extract=["/etc/passwd"], extractOn="exit")
    api.wait_for(run, lambda state: state["logs"])
    assert post(api, f"/runs/{run}/cancel").status == 204
    state = api.wait(run, 10)
    assert (state["status"], state["reason"], state["exitCode"], state["logs"]) == ("cancelled", "cancelled", 137, ["begun"])
    assert state["error"]
    assert "artifacts" not in state
    assert state["extracted"] == [{"from": "/etc/passwd", "status": "skipped", "message": "cancelled"}]
    assert is_error(post(api, f"/runs/{run}/cancel"), 409, "not_running")


def test_cancel_at_once(api: Daemon) -> None:
    for pause in (0, 0.05, 0.1, 0.2, 0.3):
        run = api.detach(entrypoint=SLEEP)
        time.sleep(pause)
        assert post(api, f"/runs/{run}/cancel").status == 204
        state = api.wait(run, 10)
        assert (state["status"], state["reason"]) == ("cancelled", "cancelled")
    assert eventually(lambda: not api.containers())


def test_cancel_of_a_queued_run(small: Daemon) -> None:
    first, second = small.detach(entrypoint=SLEEP), small.detach(entrypoint=SLEEP)
    running(small, first)
    assert small.state(second)["phase"] == "queued"
    assert post(small, f"/runs/{second}/cancel").status == 204
    state = small.wait(second, 5)
    assert (state["status"], state["reason"]) == ("cancelled", "cancelled")
    assert not state.keys() & {"exitCode", "startedAt"}
    assert small.state(first)["status"] == "running"
    assert post(small, f"/runs/{first}/cancel").status == 204
    small.wait(first)


def test_cancel_of_a_pull(api: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a registry that never answers
        run = api.detach(image=f"127.0.0.1:{silent.getsockname()[1]}/x")
        api.wait_for(run, lambda state: state.get("phase") == "pulling")
        assert post(api, f"/runs/{run}/cancel").status == 204
        assert api.wait(run, 5)["reason"] == "cancelled"


def test_delete(api: Daemon) -> None:
    run = api.detach(entrypoint="echo x > f; sleep 2", extract=["f"])
    assert is_error(api.request("DELETE", f"/runs/{run}"), 409, "running")
    api.wait(run)
    assert (api.state_dir / "artifacts" / run / "f").exists()
    assert api.request("DELETE", f"/runs/{run}").status == 204
    assert not (api.state_dir / "artifacts" / run).exists()
    for path in ("", "/logs", "/artifacts", "/artifacts/f"):
        assert is_error(get(api, f"/runs/{run}{path}"), 404, "not_found")
    assert is_error(api.request("DELETE", f"/runs/{run}"), 404, "not_found")
    assert run not in [state["id"] for state in get(api, "/runs?limit=1000").json()]


def test_a_run_that_nobody_waits_for_any_more_is_cancelled(api: Daemon) -> None:
    run = _abandoned(api, "POST", "/run", {"image": IMAGE, "entrypoint": SLEEP})
    assert api.wait(run, 10)["reason"] == "cancelled"


def test_a_run_goes_on_as_long_as_somebody_waits(api: Daemon) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(api.run, entrypoint="sleep 2; echo done", env={"A": "somebody"})
        run = eventually(lambda: [state["id"] for state in get(api, "/runs?status=running").json()])[0]
        _abandoned(api, "GET", f"/runs/{run}?wait=60000")
        assert answer.result()["logs"] == ["done"]


def _abandoned(daemon: Daemon, method: str, path: str, body: Any = None) -> str:
    """The newest run, once a client that asked for this has left."""
    content = json.dumps(body).encode() if body else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with daemon.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        run = eventually(lambda: [state["id"] for state in get(daemon, "/runs?status=running&limit=1").json()])[0]
        running(daemon, run)
    return str(run)


def test_runs_are_concurrent(api: Daemon) -> None:
    runs = [api.detach(entrypoint="sleep 2") for _ in range(4)]
    states = [api.wait(run) for run in runs]
    assert all(state["status"] == "succeeded" for state in states)
    assert max(state["startedAt"] for state in states) < min(state["finishedAt"] for state in states)


def test_busy(small: Daemon) -> None:
    runs = [small.detach(entrypoint=SLEEP), small.detach(entrypoint=SLEEP)]
    for detached in (True, False):
        response = small.request("POST", "/run", json={"image": IMAGE, "detached": detached})
        assert is_error(response, 503, "busy")
        assert int(response.headers["Retry-After"]) > 0
    assert get(small, "/health").json()["runs"] == {"running": 1, "queued": 1}
    for run in reversed(runs):
        post(small, f"/runs/{run}/cancel")
        small.wait(run, 10)
    assert eventually(lambda: small.request("POST", "/run", json={"image": IMAGE}).status == 200)


def test_what_was_accepted_is_never_told_by_a_503(daemon: DaemonFactory) -> None:
    """A balancer would take it for a sign that nothing was accepted, and run it elsewhere."""
    api = daemon()

    def posted(detached: bool, key: str) -> Response:
        body = {"image": IMAGE, "entrypoint": "true", "detached": detached}
        return api.request("POST", "/run", json=body, headers={"Idempotency-Key": key})

    runs = {detached: posted(detached, f"key {detached}").json()["id"] for detached in (False, True)}
    api.wait(runs[True])
    with contextlib.closing(sqlite3.connect(api.state_dir / "lightrun.db", isolation_level=None)) as database:
        for column in ("runs RENAME COLUMN head TO away", "details RENAME COLUMN tail TO away"):
            database.execute(f"ALTER TABLE {column}")
            for detached, run in runs.items():
                response = posted(detached, f"key {detached}")
                if detached and "head" not in column:  # is all that this answer needs
                    assert response.status == 202
                    continue
                assert is_error(response, 500, "storage_error")
                assert (response.json()["id"], response.headers["Retry-After"]) == (run, None)
            if "head" in column:
                assert is_error(posted(True, "another key"), 503, "storage_unavailable")
            table, _, _, name, _, _ = column.split()
            database.execute(f"ALTER TABLE {table} RENAME COLUMN away TO {name}")
    for detached, run in runs.items():
        response = posted(detached, f"key {detached}")
        assert (response.status, response.json()["id"]) == (202 if detached else 200, run)


# ---------------------------------------------------------------- Lists


def test_lists(daemon: DaemonFactory) -> None:
    api = daemon()
    assert get(api, "/runs").json() == []
    codes = [0, 1, 0, 1]
    runs = [api.run(entrypoint=f"echo x > f; exit {code}", extract=["f"])["id"] for code in codes]
    last = api.detach(entrypoint=SLEEP)
    newest_first = [last, *reversed(runs)]

    def listed(query: str) -> tuple[list[str], str | None]:
        response = get(api, "/runs" + query)
        assert response.status == 200, response.text
        return [state["id"] for state in response.json()], response.headers["Link"]

    assert listed("") == (newest_first, None)
    assert listed("?status=failed") == ([runs[3], runs[1]], None)
    assert listed("?status=running") == ([last], None)
    assert listed("?status=cancelled") == ([], None)
    assert listed("?limit=5") == (newest_first, None)
    assert listed(f"?before={runs[1]}") == ([runs[0]], None)
    assert listed(f"?before={runs[0]}") == ([], None)
    page, link = listed("?status=succeeded&limit=1")
    assert page == [runs[2]]
    assert link
    assert link.endswith('>; rel="next"')
    assert listed(link.removeprefix("</runs").partition(">")[0]) == ([runs[0]], None)
    state = get(api, f"/runs?before={runs[1]}").json()[0]
    assert state == {name: value for name, value in api.state(runs[0]).items() if name not in {"logs", "artifacts", "extracted"}}
    post(api, f"/runs/{last}/cancel")
    api.wait(last)


@pytest.mark.parametrize(
    "query",
    [
        "status=x", "status=", "limit=0", "limit=1001", "limit=x", "limit=", "limit=1&limit=2", "before=x", f"before={NOBODY}",
        "x=1", "limit", "Limit=1", "limit=1.0", "limit=%31%00", "limit=%ff", "wait=1",
    ],
)  # fmt: skip
def test_unknown_query_values(api: Daemon, query: str) -> None:
    assert is_error(get(api, f"/runs?{query}"), 400, "bad_request")


# ---------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/runs/", 404, "not_found"),
        ("GET", f"/runs/{NOBODY}", 404, "not_found"),
        ("GET", f"/runs/{NOBODY}/logs", 404, "not_found"),
        ("GET", f"/runs/{NOBODY}/artifacts", 404, "not_found"),
        ("GET", f"/runs/{NOBODY}/artifacts/x", 404, "not_found"),
        ("GET", f"/runs/{NOBODY}/nope", 404, "not_found"),
        ("GET", "/runs/..%2f..%2fetc", 404, "not_found"),
        ("GET", "/runs/%00", 404, "not_found"),
        ("POST", f"/runs/{NOBODY}/cancel", 404, "not_found"),
        ("POST", f"/runs/{NOBODY}/stop", 404, "not_found"),
        ("DELETE", f"/runs/{NOBODY}", 404, "not_found"),
        ("GET", "/run", 405, "method_not_allowed"),
        ("PUT", "/runs", 405, "method_not_allowed"),
        ("BREW", "/health", 405, "method_not_allowed"),
        ("GET", "/%ff", 400, "bad_request"),
        ("POST", "/run?x=1", 400, "bad_request"),
        ("GET", "/health?x=1", 400, "bad_request"),
    ],
)
def test_errors_are_json(api: Daemon, method: str, path: str, status: int, code: str) -> None:
    assert is_error(api.request(method, path), status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/run", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("DELETE", "/runs", {"GET", "HEAD"}),
        ("PATCH", f"/runs/{NOBODY}", {"GET", "HEAD", "DELETE"}),
        ("GET", f"/runs/{NOBODY}/cancel", {"POST"}),
        ("PUT", f"/runs/{NOBODY}/artifacts/x", {"GET", "HEAD"}),
    ],
)
def test_405_says_what_is_allowed(api: Daemon, method: str, path: str, allowed: set[str]) -> None:
    response = api.request(method, path)
    assert is_error(response, 405, "method_not_allowed")
    told = set(response.headers["Allow"].replace(" ", "").split(","))
    assert told | {"HEAD"} == allowed | {"HEAD"}


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_only_json_is_taken(api: Daemon, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert is_error(api.request("POST", "/run", body=b'{"image": "x"}', headers=headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_called_so_in_many_ways(api: Daemon, kind: str) -> None:
    body = json.dumps({"image": IMAGE, "nope": 1})
    assert is_error(api.request("POST", "/run", body=body, headers={"Content-Type": kind}), 400, "bad_request")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"{}", b'{"image": 5}', b'{"image": "A B"}', b'{"image": "x", "timout": 1}', b"\xff",
        b"[" * 50_000,
        b'{"image": "x", "image": "x"}', b'{"image": "x", "timeout": true}', b'{"image": "x", "timeout": NaN}',
        b'{"image": "x", "cpus": 1e999}', b'{"image": "x", "stdin": "\\u0000"}', b'{"image": "x", "stdin": "\\ud800"}',
        b'{"image": "x", "files": {"../x": ""}}', b'{"image": "x", "files": {"a": "", "a/b": ""}}',
        b'{"image": "x", "files": {"": ""}}',
        b'{"image": "x", "setup": ["x"]}', b'{"image": "x", "workdir": "/proc/x"}', b'{"image": "x", "network": "host"}',
        b'{"image": "x", "memory": "1g"}', b'{"image": "x", "cpus": 2}', b'{"image": "x", "pids": 101}',
        b'{"image": "x", "env": {"A B": ""}}', b'{"image": "x", "extract": [".."]}', b'{"image": "x", "callbackUrl": "http://x"}',
        b'{"image": "x", "input": 1, "stdin": ""}', b'{"image": "x", "callbackSecret": "0123456789abcdef"}',
    ],
    ids=lambda body: repr(body[:50]),
)  # fmt: skip
def test_a_bad_body_is_told_its_problems(api: Daemon, body: bytes) -> None:
    response = api.request("POST", "/run", body=body, headers={"Content-Type": "application/json"})
    assert is_error(response, 400, "bad_request")
    assert all(detail["message"] and isinstance(detail["path"], list) for detail in response.json()["details"])
    assert response.json()["details"]


def test_what_the_operator_does_not_allow(small: Daemon) -> None:
    for fields in ({"image": "alpine"}, {"image": IMAGE, "network": "bridge"}):
        assert is_error(small.request("POST", "/run", json=fields), 403, "not_allowed")
    assert is_error(small.request("POST", "/run", json={"image": IMAGE, "memory": "65m"}), 400, "bad_request")


@pytest.mark.parametrize("lines", ["nonsense", "GET / HTTP/1.1\r\nno colon", "GET / HTTP/1.1\r\nContent-Length: x"])
def test_what_is_no_http_is_400(api: Daemon, lines: str) -> None:
    assert is_error(raw(api, f"{lines}\r\n\r\n".encode()), 400, "bad_request")


def test_too_many_header_bytes_are_431(api: Daemon) -> None:
    response = raw(api, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300_000 + b"\r\n\r\n")
    assert response.status == 431
    assert response.headers["Content-Type"] == "application/json"
    assert response.json()["error"]


def test_a_body_over_the_limit_is_413_before_it_is_sent(small: Daemon) -> None:
    head = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    assert is_error(raw(small, head.format(65_537).encode()), 413, "too_large")
    body = b'{"image": 1, "stdin": "' + b"x" * 65_000
    body += b"x" * (65_534 - len(body)) + b'"}'
    assert is_error(raw(small, head.format(65_536).encode() + body), 400, "bad_request")


def test_a_chunked_body_over_the_limit_is_413_when_it_passes_it(small: Daemon) -> None:
    head = b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"8000\r\n" + b" " * 0x8000 + b"\r\n" + b"8001\r\n" + b" " * 0x8001 + b"\r\n"
    assert is_error(raw(small, head + chunks), 413, "too_large")
    assert is_error(raw(small, head + b"2\r\n{}\r\n0\r\n\r\n"), 400, "bad_request")


def raw(daemon: Daemon, sent: bytes) -> Response:
    """The answer to these bytes, with the connection left open for more."""
    with daemon.connect(5) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return Response(response.status, response.headers, response.read())


def test_pipelined_and_kept_alive_requests_are_answered_in_turn(api: Daemon) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with api.connect(5) as connection:
        connection.sendall(request * 3)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 3:
            piece = connection.recv(65536)
            assert piece
            received += piece


def test_health(api: Daemon) -> None:
    health = get(api, "/health").json()
    assert health.keys() == {"status", "docker", "version", "engine", "runs", "usage"}
    assert (health["status"], health["docker"]) == ("ok", True)
    assert health["engine"].keys() == {"version", "apiVersion"}
    assert health["runs"].keys() == {"running", "queued"}


# ---------------------------------------------------------------- Token and Host


@pytest.fixture(scope="module")
def guarded(module_daemon: DaemonFactory, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """A daemon with two tokens in a file."""
    file = tmp_path_factory.mktemp("token") / "tokens"
    file.write_text("first-token\nsecond-töken\n")
    return module_daemon("--token-file", str(file))


@pytest.mark.parametrize("token", ["first-token", "second-töken"])
def test_each_token_opens(guarded: Daemon, token: str) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {token}".encode().decode("latin-1")}
        assert guarded.request("GET", "/runs", headers=headers).status == 200


@pytest.mark.parametrize(
    "value",
    [
        None, "", "Bearer", "Bearer ", "Bearer wrong", "first-token", "Basic first-token", "Bearer first-token x",
        "Bearer first-toke", "Bearer first-token second-t\xf6ken", "Bearer \xff\xfe", "Bearer " + "x" * 10_000,
    ],
)  # fmt: skip
def test_anything_else_is_401(guarded: Daemon, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    for method, path in (("GET", "/runs"), ("POST", "/run"), ("GET", "/nope"), ("GET", "/openapi.json"), ("BREW", "/runs")):
        response = guarded.request(method, path, headers=headers)
        assert is_error(response, 401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_health_needs_no_token(guarded: Daemon) -> None:
    assert get(guarded, "/health").status == 200
    assert guarded.request("HEAD", "/health").status == 200


def test_401_does_not_wait_for_the_body(guarded: Daemon) -> None:
    for more in (b"", b"Expect: 100-continue\r\n"):
        head = b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%bContent-Length: 1000000\r\n\r\n" % more
        assert is_error(raw(guarded, head), 401, "unauthorized")


def test_no_token_stands_in_the_log(guarded: Daemon) -> None:
    get(guarded, "/runs", Authorization="Bearer first-token")
    get(guarded, "/runs", Authorization="Bearer a-wrong-one")
    assert not any(token in guarded.log() for token in ("first-token", "second-t", "a-wrong-one"))


def test_with_a_token_any_host_is_served(guarded: Daemon) -> None:
    assert get(guarded, "/runs", Authorization="Bearer first-token", Host="evil.example").status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:80", "a.b.localhost", "127.0.0.1:9", "127.255.0.3", "[::1]", "[::1]:3000"]
)
def test_names_of_this_machine_are_served(api: Daemon, host: str) -> None:
    assert get(api, "/health", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.1", "0.0.0.0", "[::2]", "notlocalhost",
        "localhost@evil.example", "localhost:x", "169.254.169.254", "2130706433", "[::ffff:127.0.0.1].evil", "a b",
    ],
)  # fmt: skip
def test_other_names_are_refused(api: Daemon, host: str) -> None:
    for path in ("/health", "/runs", "/nope"):
        assert is_error(get(api, path, Host=host), 403, "forbidden")


def test_no_name_at_all_is_refused(api: Daemon) -> None:
    assert raw(api, b"GET /runs HTTP/1.0\r\n\r\n").status == 403
    assert raw(api, b"GET /runs HTTP/1.1\r\nHost:\r\n\r\n").status == 403


# ---------------------------------------------------------------- What is extracted


MAKE = "mkdir -p d/sub; echo ab > f; printf 12 > d/g; printf x > d/sub/h; touch empty; ln -s f link; ln -s /etc d/l; mkfifo d/p"


def test_extracted_tells_each_entrys_fate(small: Daemon) -> None:
    paths = ["f", "./d/", "/app/missing", "link", "f", "empty", "big", "d/p", "d/g/"]
    state = small.run(entrypoint=MAKE + "; head -c 1001 /dev/zero > big", extract=paths)
    assert (state["status"], state["reason"]) == ("succeeded", "exited")
    fates = state["extracted"]
    assert [entry["from"] for entry in fates] == paths
    assert [entry["status"] for entry in fates][:8] == ["ok", "ok", "missing", "error", "error", "ok", "error", "error"]
    assert fates[0] == {"from": "f", "status": "ok", "bytes": 3}
    assert fates[1] == {"from": "./d/", "status": "ok", "bytes": 3, "skipped": 2}
    assert all(entry["message"] for entry in fates if entry["status"] == "error")
    names = ["empty", "f", "g", "sub", "sub/h"]
    assert [entry["path"] for entry in state["artifacts"]] == names
    kept = small.state_dir / "artifacts" / state["id"]
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*")) == names
    assert {path.name for path in kept.parent.iterdir() if path.name.endswith(".partial")} == set()


@pytest.mark.parametrize(
    ("entrypoint", "more", "reason"),
    [("exit 3", {}, "exited"), (SLEEP, {"timeout": 400}, "timeout"), ("x=$(tr '\\0' x < /dev/zero)", {"memory": "16m"}, "oom")],
)
def test_extract_on_exit(api: Daemon, entrypoint: str, more: dict[str, Any], reason: str) -> None:
    state = api.run(entrypoint=f"echo x > f; {entrypoint}", extract=["f"], extractOn="exit", **more)
    assert (state["reason"], state["status"]) == (reason, "failed")
    assert state["extracted"] == [{"from": "f", "status": "ok", "bytes": 2}]


def test_nothing_is_extracted_after_a_failure(api: Daemon) -> None:
    state = api.run(entrypoint="echo x > f; exit 1", extract=["f"])
    assert "artifacts" not in state
    assert get(api, f"/runs/{state['id']}/artifacts").json() == []
    assert not (api.state_dir / "artifacts" / state["id"]).exists()


# ---------------------------------------------------------------- Downloads


@pytest.fixture(scope="module")
def kept(api: Daemon) -> str:
    """The URL of a run's artifacts."""
    files = {'d/é "q".txt': "0123456789", "d/sub/x": "x", "top": "t", "d/empty": ""}
    return f"/runs/{api.run(files=files, entrypoint='true', extract=['.'])['id']}/artifacts"


FILE = "/d/%C3%A9%20%22q%22.txt"


def test_a_download(api: Daemon, kept: str) -> None:
    response = get(api, kept + FILE)
    assert (response.status, response.body) == (200, b"0123456789")
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Length"] == "10"
    assert response.headers["Content-Disposition"] == "attachment; filename=\"_ _q_.txt\"; filename*=UTF-8''%C3%A9%20%22q%22.txt"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["ETag"].startswith('"')
    assert response.headers["Last-Modified"].endswith("GMT")
    assert get(api, kept + "/d/empty").body == b""


@pytest.mark.parametrize(
    ("value", "body", "shown"),
    [("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=8-", b"89", "bytes 8-9/10"), ("bytes=-1", b"9", "bytes 9-9/10"),
     ("bytes=0-99", b"0123456789", "bytes 0-9/10")],
)  # fmt: skip
def test_one_range(api: Daemon, kept: str, value: str, body: bytes, shown: str) -> None:
    response = get(api, kept + FILE, Range=value)
    assert (response.status, response.body) == (206, body)
    assert (response.headers["Content-Range"], response.headers["Content-Length"]) == (shown, str(len(body)))


@pytest.mark.parametrize("value", ["bytes=1-2,4-5", "bytes=4-2", "lines=1-2", "bytes=x"])
def test_other_ranges_are_ignored(api: Daemon, kept: str, value: str) -> None:
    assert get(api, kept + FILE, Range=value).status == 200


def test_a_range_outside_is_416(api: Daemon, kept: str) -> None:
    response = get(api, kept + FILE, Range="bytes=10-")
    assert is_error(response, 416, "range_not_satisfiable")
    assert response.headers["Content-Range"] == "bytes */10"


def test_conditional_requests(api: Daemon, kept: str) -> None:
    response = get(api, kept + FILE)
    tag, date = response.headers["ETag"], response.headers["Last-Modified"]
    past, future = "Sat, 01 Jan 2000 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
    cases: list[tuple[int, dict[str, str]]] = [
        (304, {"If_None_Match": tag}), (304, {"If_None_Match": "*"}), (304, {"If_None_Match": f'"x", W/{tag}'}),
        (200, {"If_None_Match": '"x"'}), (304, {"If_Modified_Since": date}), (304, {"If_Modified_Since": future}),
        (200, {"If_Modified_Since": past}), (200, {"If_Modified_Since": "nonsense"}),
        (200, {"If_None_Match": '"x"', "If_Modified_Since": date}),
        (200, {"If_Match": tag}), (200, {"If_Match": "*"}), (412, {"If_Match": '"x"'}), (412, {"If_Unmodified_Since": past}),
        (200, {"If_Unmodified_Since": date}), (412, {"If_Match": '"x"', "If_None_Match": tag}),
        (206, {"Range": "bytes=0-1", "If_Range": tag}), (200, {"Range": "bytes=0-1", "If_Range": '"x"'}),
        (206, {"Range": "bytes=0-1", "If_Range": date}), (200, {"Range": "bytes=0-1", "If_Range": past}),
        (200, {"Range": "bytes=10-", "If_Range": '"x"'}), (304, {"Range": "bytes=0-1", "If_None_Match": tag}),
    ]  # fmt: skip
    for status, headers in cases:
        response = get(api, kept + FILE, **headers)
        assert response.status == status, headers
        assert response.headers["ETag"] == tag
        assert status != 304 or response.body == b""


def test_folders_list_their_direct_children(api: Daemon, kept: str) -> None:
    everything = get(api, kept).json()
    assert [entry["path"] for entry in everything] == ["d", "d/empty", "d/sub", "d/sub/x", 'd/é "q".txt', "top"]
    for path in ("/d", "/d/"):
        children = get(api, kept + path).json()
        assert children == [entry for entry in everything if entry["path"] in {"d/empty", "d/sub", 'd/é "q".txt'}]
    assert get(api, kept + "/d/sub").json() == [{"path": "d/sub/x", "bytes": 1, "type": "file", "mode": "755"}]


@pytest.mark.parametrize(
    "path", ["/..", "/../x", "/%2e%2e/x", "/.%2E", "/d/..%2fx", "/d/../../x", "/d%2f%2e%2e", "/..%2f..%2fetc/passwd", "/d/../top"]
)
def test_a_dotdot_segment_is_400_however_encoded(api: Daemon, kept: str, path: str) -> None:
    assert is_error(get(api, kept + path), 400, "bad_request")


@pytest.mark.parametrize(
    "path",
    [
        "/x", "/d/x", "/top/x", "/...", "/%00", "/d%00", "/%2fetc%2fpasswd", "//etc/passwd", "/d//sub", "/d%5csub",
        "/" + "x" * 3000,
        "/.", "/d/.", "/%2e/top",
    ],
)  # fmt: skip
def test_what_was_not_kept_is_404(api: Daemon, kept: str, path: str) -> None:
    assert is_error(get(api, kept + path), 404, "not_found")


def test_all_of_them_as_one_tar(api: Daemon, kept: str) -> None:
    response = get(api, kept, Accept="application/x-tar")
    assert response.headers["Content-Type"] == "application/x-tar"
    assert response.headers["Content-Disposition"].startswith("attachment;")
    with tarfile.open(fileobj=io.BytesIO(response.body)) as archive:
        found = {member.name: (member.isdir(), member.size) for member in archive}
    assert found == {entry["path"]: (entry["type"] == "directory", entry["bytes"]) for entry in get(api, kept).json()}


def test_get_routes_answer_head(api: Daemon, kept: str) -> None:
    for path in ("/health", "/runs?limit=1", kept, kept + FILE, kept + "/d", kept.removesuffix("/artifacts"), "/nope"):
        head, full = api.request("HEAD", path), get(api, path)
        assert (head.status, head.body) == (full.status, b"")
        for name in ("Content-Type", "Content-Length", "ETag"):
            assert head.headers[name] == full.headers[name]
    assert api.request("HEAD", kept, headers={"Accept": "application/x-tar"}).status == 200


# ---------------------------------------------------------------- Old runs go


def test_runs_over_the_number_go(daemon: DaemonFactory) -> None:
    api = daemon("--keep", "2")
    runs = [api.run(entrypoint="echo x > f", extract=["f"])["id"] for _ in range(4)]
    assert eventually(lambda: {state["id"] for state in get(api, "/runs").json()} == set(runs[2:]))
    assert eventually(lambda: _folders(api) == set(runs[2:]))


def test_runs_over_the_bytes_go(daemon: DaemonFactory) -> None:
    api = daemon("--max-artifacts-bytes", "10k")
    runs = [api.run(entrypoint="head -c 6000 /dev/zero > f", extract=["f"])["id"] for _ in range(3)]
    assert eventually(lambda: _folders(api) == {runs[2]})
    last = api.run(entrypoint="head -c 20000 /dev/zero > f", extract=["f"])["id"]
    assert eventually(lambda: _folders(api) == {last})  # the run that just finished stays, however large
    assert [state["id"] for state in get(api, "/runs").json()] == [last]
    assert len(artifact(api, last, "f")) == 20_000


def _folders(daemon: Daemon) -> set[str]:
    return {path.name for path in (daemon.state_dir / "artifacts").iterdir() if not path.name.startswith(".")}


# ---------------------------------------------------------------- Images: users and pulls


@pytest.mark.parametrize(
    ("image", "workdir"),
    [("uid_image", "/app"), ("uid_image", "/deep/er"), ("user_image", "/app"), ("user_image", "/srv"),
     pytest.param("uid_image", "/srv", marks=pytest.mark.long), pytest.param("user_image", "/deep/er", marks=pytest.mark.long)],
)  # fmt: skip
def test_images_of_other_users_can_work(api: Daemon, request: pytest.FixtureRequest, image: str, workdir: str) -> None:
    state = api.run(
        image=request.getfixturevalue(image), workdir=workdir, files={"run.sh": "echo ran", "d/f": "x"}, extract=["new", "d"],
        entrypoint="id -u; ./run.sh; echo more >> d/f; echo new > new; touch d/g; rm run.sh; cat d/f",
    )  # fmt: skip
    assert state["logs"] == ["1000", "ran", "xmore"]
    assert state["exitCode"] == 0
    assert [entry["status"] for entry in state["extracted"]] == ["ok", "ok"]


def test_another_users_workdir_without_files(api: Daemon, user_image: str) -> None:
    assert api.run(image=user_image, entrypoint="touch x && ls")["logs"] == ["x"]


def test_a_missing_image_is_pulled_once(api: Daemon, registry: Registry) -> None:
    image = registry.push(IMAGE, "some/tool:1")
    pushed = registry.pulls()  # an engine asks when it pushes, too
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda number: api.run(image=image, entrypoint=f"echo {number}"), range(4)))
    assert [state["logs"] for state in states] == [["0"], ["1"], ["2"], ["3"]]
    assert {state["image"] for state in states} == {image}
    assert max(state["timings"]["pull"] for state in states) > 0
    first = registry.pulls() - pushed
    assert first > 0
    assert api.run(image=image, entrypoint="true")["timings"]["pull"] == 0
    assert registry.pulls() - pushed == first
    alone = registry.push(IMAGE, "other/tool:1")
    before = registry.pulls()
    api.run(image=alone, entrypoint="true")
    assert first == registry.pulls() - before


def test_an_image_that_the_registry_does_not_have(api: Daemon, registry: Registry) -> None:
    state = api.run(image=f"{registry.address}/no/such:1")
    assert (state["status"], state["reason"]) == ("failed", "pull_failed")
    assert state["error"]
    assert not state.keys() & {"exitCode", "startedAt", "imageId"}


def test_a_registry_that_wants_a_password(daemon: DaemonFactory, private_registry: Registry) -> None:
    api, image = daemon(), private_registry.push(IMAGE, "some/tool:1")
    state = api.run(image=image)
    assert (state["reason"], private_registry.password in json.dumps(state)) == ("pull_failed", False)
    private_registry.write_docker_config(api.home)
    assert api.run(image=image, entrypoint="echo in")["logs"] == ["in"]
    assert private_registry.password not in api.log()


MINE, OTHERS = {"Username": "me", "Password": "s"}, {"username": "other", "password": "o"}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("""echo '{"Username": "me", "Secret": "s"}'""", MINE),
        ("""echo '{"Username": "<token>", "Secret": "s"}'""", {"IdentityToken": "s"}),
        ("echo credentials not found in native keychain; exit 1", OTHERS), ("""echo '{"Username": "", "Secret": ""}'""", OTHERS),
        ("echo locked; exit 1", {}), ("echo nonsense", {}), ("""sleep 2; echo '{"Username": "me", "Secret": "s"}'""", {}),
    ],
    ids=["good", "token", "not found", "empty", "failed", "nonsense", "hung"],
)  # fmt: skip
def test_the_credentials_of_a_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, told: dict[str, str]
) -> None:
    """Where it has none, those of the file; where it fails, or takes too long, none, and the log says whose fault it is."""
    helper = tmp_path / "docker-credential-test"
    helper.write_text(f"#!/bin/sh\n{script}\n")
    helper.chmod(0o755)
    auths = {"registry.test": {"auth": base64.b64encode(b"other:o").decode()}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths, "credsStore": "test"}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if "sleep" in script:
        monkeypatch.setattr(lightrun, "ENGINE_SECONDS", 0.3)
    header = lightrun._credentials("registry.test/some/tool")
    found = json.loads(base64.urlsafe_b64decode(header)) if header else {}
    assert found.items() >= told.items()
    assert bool(found) == bool(told) == (helper.name not in caplog.text)
    assert len(caplog.records) == (not told)


def test_pull_never(daemon: DaemonFactory, registry: Registry) -> None:
    api, image = daemon("--pull", "never"), registry.push(IMAGE, "some/tool:1")
    assert api.run(image=image)["reason"] == "pull_failed"
    assert api.run(entrypoint="true")["status"] == "succeeded"


def test_pull_always(daemon: DaemonFactory, registry: Registry, engine: docker.APIClient, uid_image: str) -> None:
    api, image = daemon("--pull", "always"), registry.push(uid_image, "some/tool:1")
    engine.tag(IMAGE, image.removesuffix(":1"), "1")  # what is here is not what the registry has
    state = api.run(image=image, entrypoint="id -u")
    assert (state["logs"], state["imageId"]) == (["1000"], image_id(uid_image))
    assert api.run(entrypoint="true")["reason"] == "pull_failed"  # no registry has it


# ---------------------------------------------------------------- Web pages


@pytest.mark.parametrize(
    "header", ["Origin: null", "Origin: http://localhost:3000", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"]
)
@pytest.mark.parametrize("method", ["POST /run", "DELETE /runs/x", "POST /runs/x/cancel"])
def test_a_page_cannot_post_to_an_open_daemon(api: Daemon, header: str, method: str) -> None:
    head = f"{method} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    assert is_error(raw(api, head.encode()), 403, "forbidden")


def test_who_is_no_page_may_post(api: Daemon, guarded: Daemon) -> None:
    ours = {"Content-Type": "application/json", "Sec-Fetch-Site": "same-origin"}
    assert is_error(api.request("POST", "/run", body=b"{}", headers=ours), 400, "bad_request")
    assert api.request("GET", "/runs", headers={"Origin": "http://elsewhere"}).status == 200
    foreign = {"Content-Type": "application/json", "Origin": "http://elsewhere", "Authorization": "Bearer first-token"}
    assert is_error(guarded.request("POST", "/run", body=b"{}", headers=foreign), 400, "bad_request")


def test_what_was_not_tried_to_keep_is_told(api: Daemon) -> None:
    failed = api.run(entrypoint="echo x > x; exit 3", extract=["x", "y"])
    assert failed["extracted"] == [
        {"from": path, "status": "skipped", "message": "exit code 3, and extractOn is success"} for path in ("x", "y")
    ]
    late = api.run(entrypoint="sleep 60", extract=["x"], timeout=500)
    assert late["extracted"] == [{"from": "x", "status": "skipped", "message": "timeout, and extractOn is success"}]
    absent = api.run(image="lightrun/nosuch", extract=["x"])
    assert absent["extracted"] == [{"from": "x", "status": "skipped", "message": absent["reason"]}]


def test_runs_by_the_beginning_of_their_id(api: Daemon) -> None:
    runs = [api.run(entrypoint="true", labels={"of": "beginnings"})["id"] for _ in range(3)]

    def found(query: str) -> list[str]:
        return [state["id"] for state in api.request("GET", f"/runs?{query}").json()]

    for run in runs:
        assert found(f"id={run}") == found(f"id={run[:13]}") == found(f"id={run[:13]}&label=of=beginnings") == [run]
        assert not found(f"id={run[:13]}&label=of=others")
        assert not found(f"id={run}0")
    assert set(runs) <= {run for digit in "0123456789abcdef" for run in found(f"id={digit}&limit=1000")}
    assert found(f"id={runs[1][:13]}&before={runs[2]}") == [runs[1]]
    assert not found(f"id={runs[1][:13]}&before={runs[0]}")
    for wrong in ("", "%2A", "A", "a" * 101, "a_%"):
        assert api.request("GET", f"/runs?id={wrong}").status == 400


def test_a_tar_of_some_artifacts(api: Daemon) -> None:
    script = "mkdir -p out/deep/er out/deeper; echo 1 > out/deep/er/a; echo 2 > out/deeper/b; chmod +x out/deep/er/a"
    run = api.run(entrypoint=script, extract=["out"])["id"]

    def names(path: str) -> dict[str, int]:
        response = get(api, f"/runs/{run}/artifacts/{path}", Accept="application/x-tar")
        assert (response.status, response.headers["Content-Type"]) == (200, "application/x-tar")
        with tarfile.open(fileobj=io.BytesIO(response.body)) as tar:
            return {member.name: member.mode for member in tar}

    assert names("deep").keys() == names("deep/").keys() == {"deep", "deep/er", "deep/er/a"}
    assert names("deep/er") == {"er": 0o755, "er/a": 0o755}
    assert names("deeper/b") == {"b": 0o644}
    assert get(api, f"/runs/{run}/artifacts/dee", Accept="application/x-tar").status == 404
    assert get(api, f"/runs/{run}/artifacts/deeper/b").body == b"2\n"
