"""A second command in a run that stays: what it sees, how it ends, and that each end is told as it was."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

import faults
import lightrun
from conftest import ROOT, Daemon, DaemonFactory, Response, eventually, longer
from engine import IMAGE, engine_host
from faults import Proxy

NDJSON, RAW = {"Accept": "application/x-ndjson"}, {"Accept": "application/octet-stream"}
SOON_SECONDS = 8.0  # for an answer that waits for an engine which waits 2 s for what others keep open


@pytest.fixture(scope="session")
def pyz() -> Path:
    """Instead of the zip: the daemon that can be told where to die."""
    return ROOT / "tests/launcher.py"


@pytest.fixture(scope="module")
def shared(module_daemon: DaemonFactory) -> Daemon:
    return module_daemon(socket=True)


Sandbox = Callable[..., str]


@contextlib.contextmanager
def sandboxes(default: Callable[[], Daemon]) -> Iterator[Sandbox]:
    """A function that starts runs which wait for commands; what goes on at the end is cancelled."""
    made: list[tuple[Daemon, str]] = []

    def start(on: Daemon | None = None, **fields: Any) -> str:
        daemon = on or default()
        run = daemon.detach(**{name: value for name, value in {"idle": 60_000, **fields}.items() if value is not None})
        made.append((daemon, run))
        daemon.wait_for(run, lambda state: state.get("phase") == "running")
        return run

    yield start
    for daemon, run in made:
        if daemon.running:
            daemon.request("POST", f"/runs/{run}/cancel")
            daemon.wait(run)


@pytest.fixture
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandboxes(lambda: request.getfixturevalue("shared")) as start:
        yield start


@pytest.fixture(scope="module")
def room(shared: Daemon) -> Iterator[str]:
    """A run that waits, for tests that leave nothing in it."""
    with sandboxes(lambda: shared) as start:
        yield start(files={"note": "from the run\n"}, env={"KEPT": "of the run"}, idle=900_000)


def post(daemon: Daemon, run: str, headers: dict[str, str] | None = None, **fields: Any) -> Response:
    return daemon.request("POST", f"/runs/{run}/exec", json=fields, headers=headers)


def execute(daemon: Daemon, run: str, entrypoint: str | list[str], **fields: Any) -> dict[str, Any]:
    """Run a command, and what became of it."""
    response = post(daemon, run, entrypoint=entrypoint, **fields)
    assert response.status == 200, response.text
    state: dict[str, Any] = response.json()
    return state


def lines(daemon: Daemon, run: str, entrypoint: str | list[str], **fields: Any) -> list[str]:
    """The output of a command that ends well."""
    state = execute(daemon, run, entrypoint, **fields)
    assert (state["reason"], state["exitCode"], state["logsTruncated"]) == ("exited", 0, False), state
    logs: list[str] = state["logs"]
    return logs


def processes(daemon: Daemon, run: str) -> list[str]:
    """The command lines in a run's container, but for its init and what asks."""
    script = 'for p in /proc/[0-9]*; do [ $p = /proc/$$ ] || { tr "\\0" " " < $p/cmdline; echo; }; done 2>/dev/null'
    return [line.strip() for line in lines(daemon, run, script) if line.strip() and "docker-init" not in line]


# ---------------------------------------------------------------- The three answers


def test_as_json(shared: Daemon, room: str) -> None:
    state = execute(shared, room, "echo out; echo err >&2; exit 3")
    took = state.pop("durationMs")
    assert sorted(state.pop("logs")) == ["err", "out"]
    assert state == {"reason": "exited", "exitCode": 3, "logsTruncated": False}
    assert 0 < took < 60_000
    split = execute(shared, room, "echo out; echo err >&2; printf 'last'", splitLogs=True)
    assert (split["stdout"], split["stderr"], "logs" in split) == ("out\nlast", "err\n", False)


def test_as_it_happens(shared: Daemon, room: str) -> None:
    script = "echo one; sleep 0.5; printf two; exit 4"
    events, told = [], []
    with shared.open("POST", f"/runs/{room}/exec", json={"entrypoint": script}, headers=NDJSON) as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
        while line := response.readline():
            events.append(json.loads(line))
            told.append(time.monotonic())
    assert events[:-1] == [
        {"event": "started"}, {"event": "log", "stream": "stdout", "line": "one"},
        {"event": "log", "stream": "stdout", "line": "two"},
    ]  # fmt: skip
    assert events[-1]["event"] == "finished"
    assert (events[-1]["exec"]["exitCode"], events[-1]["exec"]["logs"]) == (4, ["one", "two"])
    assert told[2] - told[1] > 0.3


def test_as_bytes(shared: Daemon, room: str) -> None:
    response = post(shared, room, RAW, entrypoint="printf 'a\\377b'; echo err >&2; exit 5")
    assert (response.status, response.body) == (200, b"a\xffb")
    assert response.headers["Content-Type"] == "application/octet-stream"
    response = post(shared, room, RAW, entrypoint="echo err >&2; exit 5")
    assert (response.body, response.headers["X-Exit-Code"], response.headers["X-Reason"]) == (b"", "5", "exited")


@pytest.mark.long
def test_as_bytes_that_take_a_while(shared: Daemon, room: str) -> None:
    """The exit code follows the body then."""
    body = json.dumps({"entrypoint": "echo a; sleep 1; echo b; exit 6"})
    command = ["curl", "-s", "-i", "--raw", "--unix-socket", str(shared.socket), "-d", body]
    command += ["-H", "Content-Type: application/json", "-H", "Accept: application/octet-stream", f"http://x/runs/{room}/exec"]
    head, _, rest = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.partition(b"\r\n\r\n")
    assert b"Trailer: X-Exit-Code, X-Reason" in head
    assert b"X-Exit-Code:" not in head
    assert rest == b"2\r\na\n\r\n2\r\nb\n\r\n0\r\nX-Exit-Code: 6\r\nX-Reason: exited\r\n\r\n"
    assert post(shared, room, RAW, entrypoint="echo a; sleep 1; echo b").body == b"a\nb\n"


def test_bytes_of_one_that_is_killed(shared: Daemon, room: str) -> None:
    response = post(shared, room, RAW, entrypoint="sleep 30", timeout=300)
    assert (response.body, response.headers["X-Reason"], response.headers["X-Exit-Code"]) == (b"", "timeout", "137")


# ---------------------------------------------------------------- What it sees


def test_the_world_of_the_run(shared: Daemon, room: str) -> None:
    assert lines(shared, room, "cat note; pwd; echo $KEPT; umask; id -u") == ["from the run", "/app", "of the run", "0022", "0"]
    assert lines(shared, room, "touch /left; echo $$ > /pid") == []
    assert lines(shared, room, "ls /left && rm /left /pid && ls") == ["/left", "note"]


def test_arguments_and_environment_are_exact(shared: Daemon, room: str) -> None:
    odd = ["sh", "-c", 'for a in "$0" "$@"; do printf "%s\\0" "$a"; done', "", "a b", "$HOME", "ü\n", "'\"\\", "*"]
    response = post(shared, room, RAW, entrypoint=odd)
    assert response.body.split(b"\0")[:-1] == [each.encode() for each in odd[3:]]
    env = {"A": " x  y ", "NEW_LINE": "a\nb", "KEPT": "of the exec", "EMPTY": "", "U": "ü", "HOME": "/else"}
    response = post(shared, room, RAW, entrypoint=["cat", "/proc/self/environ"], env=env)
    told = dict(each.split("=", 1) for each in response.body.decode().split("\0") if each)
    assert {name: told[name] for name in env} == env
    own = post(shared, room, RAW, entrypoint=["cat", "/proc/self/environ"]).body.decode().split("\0")
    assert {"KEPT=of the run", "HOME=/root"} <= set(own)
    assert len(own) == len(set(own))
    long = ["sh", "-c", "echo $#", *["y" * 99_999] * 15]
    assert lines(shared, room, long) == ["14"]
    many = {f"V{number}": "x" * 1000 for number in range(300)}  # more than one piece of what the shim tells
    response = post(shared, room, RAW, entrypoint=["cat", "/proc/self/environ"], env=many)
    assert many.items() <= dict(each.split("=", 1) for each in response.body.decode().split("\0") if each).items()


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, b""), ({"stdin": ""}, b""), ({"stdin": "text"}, b"text"), ({"input": {"a": 1.50}}, b'{"a":1.5}'),
        ({"stdin": {"base64": base64.b64encode(bytes(range(256)) * 1000).decode()}}, bytes(range(256)) * 1000),
    ],
)  # fmt: skip
def test_stdin(shared: Daemon, room: str, given: dict[str, Any], seen: bytes) -> None:
    """Nothing but the exec's own bytes reaches it, and then comes its end."""
    assert post(shared, room, RAW, entrypoint=["cat"], **given).body.replace(b" ", b"") == seen.replace(b" ", b"")
    assert lines(shared, room, "ls /proc/$$/fd; :", **given) == ["0", "1", "2"]


def test_stdin_that_is_not_read(shared: Daemon, room: str) -> None:
    body = {"base64": base64.b64encode(bytes(3_000_000)).decode()}
    assert lines(shared, room, ["echo", "done"], stdin=body) == ["done"]


def test_stdin_that_is_closed(shared: Daemon, room: str) -> None:
    body = {"base64": base64.b64encode(bytes(3_000_000)).decode()}
    state = execute(shared, room, "exec <&-; sleep 2; echo goes on; exit 3", stdin=body)
    assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 3, ["goes on"])


def test_one_after_the_other(daemon: DaemonFactory, sandbox: Sandbox) -> None:
    """Whoever has an answer may ask again at once."""
    own = daemon("--max-exec", "1", socket=True)
    run = sandbox(on=own)
    for number in range(15):
        assert lines(own, run, f"echo {number}") == [str(number)]


def test_workdir(shared: Daemon, room: str) -> None:
    assert lines(shared, room, "pwd", workdir="/made/for/it") == ["/made/for/it"]
    assert lines(shared, room, "pwd; cd ..; rmdir it; cd /; rmdir /made/for /made", workdir="/made/for/it") == ["/made/for/it"]
    for bad in ("/proc/1", "relative", "/", "/a/../b"):
        response = post(shared, room, entrypoint="true", workdir=bad)
        assert (response.status, response.json()["details"][0]["path"]) == (400, ["workdir"])
    response = post(shared, room, entrypoint="true", workdir="/app/note")
    assert response.status == 400
    assert response.json()["details"] == [
        {"path": ["workdir"], "message": "cannot be made, or is not a folder that the run's user may enter"}
    ]


def test_the_sandbox_is_the_same(shared: Daemon, sandbox: Sandbox) -> None:
    """Seen from inside, beside what the run's own program sees."""
    script = (
        "grep -E '^(Cap|NoNewPrivs|Seccomp|Uid|Gid|Groups)' /proc/self/status; cat /proc/self/limits; cat /proc/self/cgroup; "
        "ls -l /proc/self/ns | sed 's/.*-> //'; cat /proc/self/oom_score_adj"
    )
    run = sandbox(entrypoint=f"({script}) > /tmp.own; mv /tmp.own own; sleep 60", fileSize="1m", memory="64m", pids=50)
    own = lines(shared, run, "until test -e own; do sleep 0.1; done; cat own")
    assert lines(shared, run, script) == own
    assert any(line == "NoNewPrivs:\t1" for line in own)
    assert execute(shared, run, "head -c 2000000 /dev/zero > big")["exitCode"] == 153
    assert "can't fork" in " ".join(execute(shared, run, "for i in $(seq 60); do sleep 20 & done", timeout=5000)["logs"])


@pytest.mark.parametrize("image", ["uid_image", "user_image"])
def test_the_images_user(shared: Daemon, sandbox: Sandbox, image: str, request: pytest.FixtureRequest) -> None:
    run = sandbox(image=request.getfixturevalue(image), workdir="/app")
    assert lines(shared, run, "touch here; ls -l here | cut -c1-10; pwd") == ["-rw-r--r--", "/app"]
    assert lines(shared, run, "id -u") != ["0"]
    assert execute(shared, run, "sleep 60", timeout=300)["reason"] == "timeout"
    assert "sleep 60" not in processes(shared, run)
    response = post(shared, run, entrypoint="true", workdir="/root/below")
    assert response.status == 400


def test_an_image_without_a_shell(shared: Daemon, sandbox: Sandbox, engine: docker.APIClient, tmp_path: Path) -> None:
    """A run that waits, a command and its end need nothing of the image."""
    shutil.copy(str(shutil.which("busybox")), tmp_path / "cat")
    archive = subprocess.run(["tar", "-C", tmp_path, "-c", "."], stdout=subprocess.PIPE, check=True).stdout
    engine.import_image_from_data(archive, repository="lightrun/exec-static", tag="latest")
    try:
        run = sandbox(image="lightrun/exec-static:latest")
        assert lines(shared, run, ["/cat"], stdin="through") == ["through"]
        killed = execute(shared, run, ["/cat", "/dev/zero"], timeout=300)
        assert (killed["reason"], killed["exitCode"]) == ("timeout", 137)
        assert execute(shared, run, "true")["exitCode"] == 127
        shared.request("POST", f"/runs/{run}/stop")
        assert shared.wait(run)["reason"] == "stopped"
    finally:
        engine.remove_image("lightrun/exec-static:latest", force=True)


def test_a_program_that_is_not_there(shared: Daemon, room: str) -> None:
    state = execute(shared, room, ["nosuch", "a"])
    assert (state["exitCode"], state["reason"]) == (127, "exited")
    assert "nosuch" in state["logs"][0]
    assert execute(shared, room, ["/app"])["exitCode"] == 126


def test_an_exit_code_that_engines_give_too(shared: Daemon, sandbox: Sandbox) -> None:
    """It is the program's own all the same, and what the program leaves behind goes on as after any other."""
    run = sandbox()
    state = execute(shared, run, f"sleep 105 >/dev/null 2>&1 & exit {lightrun.ATTACH_BROKE}")
    assert (state["reason"], state["exitCode"], state["logsTruncated"]) == ("exited", lightrun.ATTACH_BROKE, False)
    assert "sleep 105" in processes(shared, run)


@pytest.mark.long
def test_the_shim_may_go(shared: Daemon, sandbox: Sandbox) -> None:
    """A program may remove or replace it: then commands are run without."""
    run = sandbox()
    assert lines(shared, run, f"rm {lightrun.SHIM}; echo gone") == ["gone"]
    assert lines(shared, run, "echo back") == ["back"]
    assert lines(shared, run, f"ln -s /bin/true {lightrun.SHIM}") == []
    assert lines(shared, run, "echo back") == ["back"]
    state = execute(shared, run, f"rm -f {lightrun.SHIM}; sleep 60", timeout=500)
    assert state["reason"] == "timeout"


def test_a_run_without_idle(shared: Daemon, sandbox: Sandbox) -> None:
    """Nothing is put into a container that runs; what the engine alone can do is enough."""
    run = shared.detach(entrypoint="sleep 1000", files={"note": "x\n"}, env={"KEPT": "of the run"})
    shared.wait_for(run, lambda state: state.get("phase") == "running")
    try:
        assert lines(shared, run, "cat note; pwd; echo $KEPT $MORE; cat", env={"MORE": "and more"}, stdin="in\n") == [
            "x", "/app", "of the run and more", "in",
        ]  # fmt: skip
        assert lines(shared, run, "pwd", workdir="/bin") == ["/bin"]
        for missing in ("/no/such", "/app/note"):
            response = post(shared, run, entrypoint="true", workdir=missing)
            assert (response.status, response.json()["details"][0]["path"]) == (400, ["workdir"])
        state = execute(shared, run, "sleep 101 & setsid sleep 102 >/dev/null 2>&1 & sleep 103", timeout=500)
        assert (state["reason"], state["exitCode"]) == ("timeout", 137)
        assert sorted(processes(shared, run)) == ["sleep 1000", "sleep 102"]
        for _ in range(2):
            state = execute(shared, run, "sleep 60", timeout=1)
            assert (state["reason"], state["exitCode"]) == ("timeout", 137)
        state = execute(shared, run, ["nosuch"])
        assert (state["reason"], "nosuch" in state["logs"][0]) == ("exited", True)
        assert state["exitCode"] in {126, 127}
        assert lines(shared, run, "ls -a / | grep -c lightrun || true") == ["0"]
    finally:
        shared.request("POST", f"/runs/{run}/cancel")


@pytest.mark.long
def test_a_script_without_a_first_line_is_killed(shared: Daemon, sandbox: Sandbox) -> None:
    """The init runs it by a shell, and gives it a process group of its own."""
    run = sandbox(files={"script": "sleep 104\n"})
    state = execute(shared, run, ["./script"], timeout=500)
    assert (state["reason"], state["exitCode"]) == ("timeout", 137)
    assert eventually(lambda: processes(shared, run) == [lightrun.SHIM])


@pytest.mark.long
def test_a_shim_kills_where_we_cannot(shared: Daemon, sandbox: Sandbox, engine: docker.APIClient) -> None:
    """As on a machine far away: by kill(2) in the container, and the child of an init too."""
    run = sandbox(files={"script": "sleep 104\n"})
    view = lightrun.Engine(lightrun.Settings(), "")
    machine = view.machine()
    assert machine
    with ThreadPoolExecutor() as pool:
        for entrypoint in (["sleep", "104"], ["./script"]):
            going = pool.submit(execute, shared, run, entrypoint)
            assert eventually(lambda: any("sleep 104" in each for each in top(shared, run)))
            with contextlib.closing(sqlite3.connect(shared.state_dir / "lightrun.db")) as database:
                [(pid,)] = database.execute("SELECT pid FROM execs WHERE run = ?", [run]).fetchall()
            lightrun.Execs._kill_there(view, machine, container(shared, run), pid)
            assert (going.result()["exitCode"], going.result()["reason"]) == (137, "exited")
            assert eventually(lambda: processes(shared, run) == [lightrun.SHIM])


def test_a_shim_that_tells_of_no_group(shared: Daemon, sandbox: Sandbox) -> None:
    run, view = sandbox(), lightrun.Engine(lightrun.Settings(), "")
    fake = "printf /sbin/tini; head -c 118 /dev/zero; printf abc; head -c 125 /dev/zero; exec cat >/dev/null"
    replace(shared, run, fake)
    machine = view.machine()
    assert machine
    with pytest.raises(lightrun.EngineAbsent, match="cannot be understood"):
        lightrun.Execs._kill_there(view, machine, container(shared, run), 104)


def test_nothing_of_others_is_killed() -> None:
    assert not lightrun.kill_here(os.getpid(), "0" * 64)
    assert not lightrun.kill_here(os.getpid(), "")
    assert not lightrun.kill_here(1, "")
    assert not lightrun.kill_here(4_000_000, "a")


def replace(daemon: Daemon, run: str, fake: str) -> None:
    """Put a script in the shim's place."""
    write = f"rm -rf {lightrun.SHIM}; printf '%s\\n' '#!/bin/sh' '{fake}' > {lightrun.SHIM}; chmod 755 {lightrun.SHIM}"
    assert lines(daemon, run, write) == []


@pytest.mark.parametrize(
    "fake",
    [
        "printf 99; exec yes AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "exit 0",
        *longer("yes & exec cat >/dev/null", "exec sleep 600", "cat",
                "printf 99999999999999999999999999999999; head -c 16384 /dev/zero; sleep 1"),
    ],
)  # fmt: skip
def test_a_shim_that_was_replaced(shared: Daemon, sandbox: Sandbox, fake: str) -> None:
    """Nothing hangs, and commands are run without it."""
    run = sandbox()
    replace(shared, run, fake)
    began = time.monotonic()
    assert lines(shared, run, "echo hello") == ["hello"]
    assert time.monotonic() - began < 15
    state = execute(shared, run, "sleep 60", timeout=300)
    assert (state["reason"], state["exitCode"]) == ("timeout", 137)


@pytest.mark.long
def test_a_folder_in_the_shims_place(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox()
    state = execute(shared, run, f"rm -f {lightrun.SHIM}; mkdir -p {lightrun.SHIM}/a; sleep 60", timeout=500)
    assert (state["reason"], state["durationMs"] < 5000) == ("timeout", True)
    assert lines(shared, run, "echo goes on") == ["goes on"]


@pytest.mark.long
def test_a_cancel_while_a_shim_does_not_answer(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox()
    fake = f"rm {lightrun.SHIM}; printf '#!/bin/sh\nprintf 99; exec yes AAAAAAAAAAAAAAAAAAAAAA\n' > {lightrun.SHIM}"
    assert lines(shared, run, f"{fake}; chmod 755 {lightrun.SHIM}") == []
    with ThreadPoolExecutor() as pool:
        going = pool.submit(post, shared, run, entrypoint="true")
        time.sleep(1)
        shared.request("POST", f"/runs/{run}/cancel")
        began = time.monotonic()
        assert shared.wait(run)["reason"] == "cancelled"
        assert time.monotonic() - began < 6
        assert going.result().status in {409, 503} or going.result().json()["reason"] in {"run_ended", "exited"}


def test_a_workdir_that_was_removed(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox(files={"x": "1"})
    assert lines(shared, run, "rm -rf /app") == []
    assert post(shared, run, entrypoint="pwd").json()["details"][0]["path"] == ["workdir"]
    assert lines(shared, run, "pwd", workdir="/app") == ["/app"]
    assert lines(shared, run, "pwd") == ["/app"]


@pytest.mark.long
def test_memory_that_is_full_keeps_no_timeout_off(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox(memory="64m")
    state = execute(shared, run, "dd if=/dev/zero of=/dev/shm/f bs=1M count=60 2>/dev/null; sleep 100", timeout=3000)
    assert state["durationMs"] < 12_000
    assert (state["reason"], state["exitCode"]) in {("timeout", 137), ("exited", 137)}


def test_output_limit_on_stderr(shared: Daemon, room: str) -> None:
    for _ in range(8):
        state = execute(shared, room, "echo hi >&2; sleep 20", outputLimit=1, splitLogs=True)
        assert (state["reason"], state["stderr"]) == ("output_limit", "h")
        assert state["durationMs"] < SOON_SECONDS * 1000


@pytest.mark.long
def test_json_spools_nothing(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox(memory="64m")

    def spooled() -> int:
        found = 0
        for path in Path(f"/proc/{shared.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += path.stat().st_size if "(deleted)" in str(path.readlink()) else 0
        return found

    with ThreadPoolExecutor() as pool:
        going = pool.submit(execute, shared, run, "head -c 100000000 /dev/zero; sleep 1")
        most = 0
        while not going.done():
            most = max(most, spooled())
            time.sleep(0.05)
    assert going.result()["logsTruncated"]
    assert most < 10_000_000


@pytest.mark.long
def test_stderr_alone_does_not_hold_back_the_head(shared: Daemon, room: str) -> None:
    script = "i=0; while [ $i -lt 40 ]; do echo x >&2; sleep 0.5; i=$((i+1)); done"
    began = time.monotonic()
    with shared.open("POST", f"/runs/{room}/exec", json={"entrypoint": script}, headers=RAW) as response:
        assert time.monotonic() - began < 17
        assert response.status == 200


# ---------------------------------------------------------------- Large, many


def test_20_mb_each_way(shared: Daemon, sandbox: Sandbox) -> None:
    made = shared.run(entrypoint="head -c 20000000 /dev/urandom > big; sha256sum big | cut -c1-64", extract=["big"])
    run = sandbox(memory="256m")
    response = post(shared, run, RAW, entrypoint=["cat"], stdin={"artifact": f"{made['id']}/big"})
    assert response.status == 200
    assert hashlib.sha256(response.body).hexdigest() == made["logs"][0]
    counted = lines(shared, run, "sha256sum | cut -c1-64", stdin={"artifact": f"{made['id']}/big"})
    assert counted == made["logs"]
    missing = post(shared, run, entrypoint=["cat"], stdin={"artifact": f"{made['id']}/nosuch"})
    assert (missing.status, missing.json()["details"][0]["path"]) == (400, ["stdin", "artifact"])


def test_16_at_once(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox()

    def one(number: int) -> dict[str, Any]:
        return execute(shared, run, f"echo {number}; while ! test -e /go; do sleep 0.1; done; echo {number} again; exit {number}")

    with ThreadPoolExecutor(16) as pool:
        going = [pool.submit(one, number) for number in range(16)]
        assert eventually(lambda: sum("test -e /go" in each for each in top(shared, run)) == 16, 30)
        refused = post(shared, run, entrypoint="true")
        assert (refused.status, refused.json()["error"], refused.headers["Retry-After"]) == (503, "busy", "1")
        assert "--max-exec" in refused.json()["message"]
        release(shared, run)
        states = [each.result() for each in going]
    assert [(state["exitCode"], state["logs"]) for state in states] == [(n, [str(n), f"{n} again"]) for n in range(16)]
    assert lines(shared, run, "echo room again") == ["room again"]


def container(daemon: Daemon, run: str) -> str:
    return next(str(each["Id"]) for each in daemon.containers() if each["Labels"]["lightrun.run"] == run)


def top(daemon: Daemon, run: str) -> list[str]:
    """The processes of a run's container, as the engine lists them."""
    client = docker.APIClient(engine_host(), version="auto")
    with contextlib.closing(client):
        return [row[-1] for row in client.top(container(daemon, run))["Processes"]]


def release(daemon: Daemon, run: str) -> None:
    """Make /go, not by lightrun."""
    client = docker.APIClient(engine_host(), version="auto")
    with contextlib.closing(client):
        client.exec_start(client.exec_create(container(daemon, run), ["touch", "/go"])["Id"])


# ---------------------------------------------------------------- How it ends


def test_a_timeout_kills_its_group_and_nothing_else(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox(entrypoint="sleep 1000")
    script = "echo begun; sleep 101 & setsid sleep 102 >/dev/null 2>&1 & sleep 103"
    state = execute(shared, run, script, timeout=500)
    assert (state["reason"], state["exitCode"], state["logs"]) == ("timeout", 137, ["begun"])
    assert state["error"] == "killed after its timeout of 500 ms"
    assert 500 <= state["durationMs"] < 500 + SOON_SECONDS * 1000
    assert sorted(processes(shared, run)) == ["sleep 1000", "sleep 102"]


@pytest.mark.parametrize("headers", [{}, NDJSON, RAW], ids=["json", "ndjson", "raw"])
def test_a_client_that_leaves(shared: Daemon, sandbox: Sandbox, headers: dict[str, str]) -> None:
    run = sandbox()
    body = {"entrypoint": "echo begun; echo $$ > /begun; sleep 104"}
    with contextlib.closing(shared.connect()) as sock:
        text = json.dumps(body)
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /runs/{run}/exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{fields}"
        sock.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        assert eventually(lambda: any("sleep 104" in each for each in top(shared, run)))
    assert eventually(lambda: not any("sleep 104" in each for each in top(shared, run)), SOON_SECONDS)
    assert shared.state(run)["phase"] == "running"
    assert lines(shared, run, "echo still here") == ["still here"]


def test_output_limit(shared: Daemon, room: str) -> None:
    state = execute(shared, room, "yes 0123456", outputLimit=1000, splitLogs=True)
    assert (state["reason"], state["logsTruncated"]) == ("output_limit", True)
    assert state["stdout"] == "0123456\n" * 125
    assert execute(shared, room, "printf 1234", outputLimit=4)["reason"] == "exited"


def test_a_flood_is_kept_from_its_end(shared: Daemon, room: str) -> None:
    state = execute(shared, room, "seq 1 400000")
    assert (state["exitCode"], state["logsTruncated"], state["logs"][-1]) == (0, True, "400000")
    response = post(shared, room, RAW, entrypoint="seq 1 400000")
    assert response.body == b"".join(b"%d\n" % number for number in range(1, 400_001))


def test_out_of_memory(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox(memory="32m")
    state = execute(shared, run, ["sh", "-c", "x=0123456789; while :; do x=$x$x; done"])
    assert (state["reason"], state["exitCode"], state.get("oomKilled")) == ("exited", 137, True)
    assert "oomKilled" not in execute(shared, run, "kill -9 $$")
    assert lines(shared, run, "echo it goes on") == ["it goes on"]


def test_a_child_that_holds_its_output(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox()
    began = time.monotonic()
    state = execute(shared, run, "sleep 105 & echo done; exit 7")
    assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 7, ["done"])
    assert time.monotonic() - began < SOON_SECONDS
    assert "sleep 105" in processes(shared, run)  # it lives until the run ends


def test_one_that_closes_its_output(shared: Daemon, room: str) -> None:
    state = execute(shared, room, "echo told; exec >&- 2>&-; sleep 2; exit 8")
    assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 8, ["told"])
    assert state["durationMs"] > 1900


@pytest.mark.long
@pytest.mark.parametrize("how", ["cancel", "stop", "own end"])
def test_a_run_that_ends_under_it(shared: Daemon, sandbox: Sandbox, how: str) -> None:
    run = sandbox(entrypoint="until test -e /go; do sleep 0.1; done")
    with ThreadPoolExecutor() as pool:
        going = [pool.submit(execute, shared, run, "echo begun; sleep 60") for _ in range(2)]
        assert eventually(lambda: sum("sleep 60" in each for each in top(shared, run)) >= 2)
        if how == "own end":
            release(shared, run)
        else:
            assert shared.request("POST", f"/runs/{run}/{how}").status == 204
        for state in (each.result() for each in going):
            assert (state["reason"], "exitCode" in state) == ("run_ended", False), state
            assert state["logs"] == ["begun"]
    assert shared.wait(run)["reason"] == {"cancel": "cancelled", "stop": "stopped", "own end": "exited"}[how]
    response = post(shared, run, entrypoint="true")
    assert (response.status, response.json()["error"]) == (409, "not_running")


def test_sigterm_leaves_them_time_and_then_kills_them(daemon: DaemonFactory, sandbox: Sandbox) -> None:
    own = daemon("--drain", "5s", socket=True)
    run = sandbox(on=own)
    with ThreadPoolExecutor() as pool:
        quick = pool.submit(execute, own, run, "sleep 1.5; echo in time")
        slow = pool.submit(execute, own, run, "sleep 60")
        assert eventually(lambda: {"sleep 1.5", "sleep 60"} <= set(top(own, run)))
        assert own.stop() == 0
        assert quick.result()["logs"] == ["in time"]
        assert (slow.result()["reason"], slow.result()["error"]) == ("cancelled", "killed because lightrun goes down")
    own.start()
    own.wait_for(run, lambda state: state.get("phase") == "running")
    assert [each for each in processes(own, run) if each.startswith("sleep")] == []


@pytest.mark.parametrize("fields", [{}, {"entrypoint": "sleep 1000", "idle": None}], ids=["idle", "plain"])
@pytest.mark.parametrize("where", ["after 1", *longer("", "before 1")])
def test_kill_9_leaves_no_command(daemon: DaemonFactory, sandbox: Sandbox, where: str, fields: dict[str, Any]) -> None:
    """The run is adopted; commands have no client any more and are killed by the next daemon, or never began."""
    own = daemon(socket=True, env={"LIGHTRUN_TRAP": f"Store.begin_exec {where}"} if where else {})
    run = sandbox(on=own, **fields)
    with ThreadPoolExecutor() as pool:
        going = pool.submit(execute, own, run, "echo x >> /begun; setsid sleep 106 & sleep 107")
        if not where:
            assert eventually(lambda: any("sleep 107" in each for each in top(own, run)))
            own.kill()
        with pytest.raises((OSError, http.client.HTTPException)):
            going.result()
    own.process.wait(20)
    own.env.pop("LIGHTRUN_TRAP", None)
    own.start()
    time.sleep(0.5)
    assert own.state(run)["status"] == "running", (own.state(run), own.log())
    assert eventually(lambda: not any("sleep 107" in each for each in top(own, run)), SOON_SECONDS)
    own.wait_for(run, lambda state: state.get("phase") == "running")
    assert lines(own, run, "cat /begun 2>/dev/null; echo adopted") == [*["x"] * (not where), "adopted"]
    assert any("sleep 106" in each for each in top(own, run)) == (not where)  # which is in a session of its own


# ---------------------------------------------------------------- Idle


def test_idle_ends_a_run(shared: Daemon) -> None:
    run = shared.detach(idle=1500, files={"a": "1"}, extract=["out"])
    shared.wait_for(run, lambda state: state.get("phase") == "running")
    assert lines(shared, run, "sleep 2; echo made > out; echo long enough") == ["long enough"]
    began = time.monotonic()
    state = shared.wait(run)
    assert time.monotonic() - began < 1.5 + SOON_SECONDS
    assert (state["status"], state["reason"], state["exitCode"]) == ("succeeded", "idle", 143)
    assert [entry["path"] for entry in state["artifacts"]] == ["out"]
    assert state["error"] == "ended after 1500 ms in which nothing was run in it"


@pytest.mark.long
def test_idle_of_a_run_with_a_program(shared: Daemon) -> None:
    """Its own program counts for nothing; one that hears SIGTERM has a moment."""
    state = shared.wait(shared.detach(idle=1000, entrypoint="trap 'echo bye; exit 9' TERM; while :; do sleep 0.1; done"))
    assert (state["reason"], state["status"], state["exitCode"], state["logs"]) == ("idle", "succeeded", 9, ["bye"])
    state = shared.wait(shared.detach(idle=1000, entrypoint="trap '' TERM; while :; do sleep 0.1; done"))
    assert (state["reason"], state["exitCode"]) == ("idle", 137)
    state = shared.wait(shared.detach(idle=60_000, entrypoint="exit 3"))
    assert (state["reason"], state["exitCode"]) == ("exited", 3)


def test_a_stop_of_a_run_that_waits(shared: Daemon, sandbox: Sandbox) -> None:
    run = sandbox()
    shared.request("POST", f"/runs/{run}/stop")
    state = shared.wait(run)
    assert (state["reason"], state["exitCode"]) == ("stopped", 143)


def test_a_timeout_of_a_run_that_waits(shared: Daemon) -> None:
    state = shared.wait(shared.detach(idle=60_000, timeout=700))
    assert (state["reason"], state["exitCode"]) == ("timeout", 137)


@pytest.mark.long
def test_idle_counts_on_after_kill_9(daemon: DaemonFactory) -> None:
    own = daemon(socket=True)
    run = own.detach(idle=2000)
    own.wait_for(run, lambda state: state.get("phase") == "running")
    own.kill()
    own.start()
    assert own.wait(run)["reason"] == "idle"


def test_warm_runs_wait_too(daemon: DaemonFactory, sandbox: Sandbox) -> None:
    own = daemon("--warm", f"{IMAGE}=1/none", socket=True)
    assert eventually(lambda: "lightrun_warm_containers 1" in own.request("GET", "/metrics").text)
    run = sandbox(on=own, files={"a": "1\n"}, env={"OF": "the run", "TOO": "x"})
    assert own.state(run)["warm"]
    assert lines(own, run, "cat a; pwd; echo $OF $TOO", env={"TOO": "of the exec"}) == ["1", "/app", "the run of the exec"]
    assert execute(own, run, "sleep 60", timeout=200)["reason"] == "timeout"


# ---------------------------------------------------------------- Requests


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, ["entrypoint"]), ({"entrypoint": []}, ["entrypoint"]), ({"entrypoint": "true", "image": "a"}, ["image"]),
        ({"entrypoint": "true", "setup": ["a"]}, ["setup"]), ({"entrypoint": "true", "timeout": 0}, ["timeout"]),
        ({"entrypoint": "true", "timeout": 3_600_001}, ["timeout"]), ({"entrypoint": "true", "env": {"a b": ""}}, ["env", "a b"]),
        ({"entrypoint": "true", "stdin": "a", "input": 1}, ["stdin"]), ({"entrypoint": "a\0b"}, ["entrypoint"]),
        ({"entrypoint": "true", "detached": True}, ["detached"]), ({"entrypoint": "true", "idle": 1000}, ["idle"]),
        ({"entrypoint": "true", "stdin": {"artifact": "0" * 36 + "/a"}}, ["stdin", "artifact"]),
    ],
)  # fmt: skip
def test_what_is_refused(shared: Daemon, room: str, fields: dict[str, Any], path: list[str]) -> None:
    response = post(shared, room, **fields)
    assert response.status == 400
    assert [problem["path"] for problem in response.json()["details"]] == [path]


def test_what_is_not_there(shared: Daemon, room: str) -> None:
    assert post(shared, "0" * 36, entrypoint="true").status == 404
    ended = shared.run(entrypoint="true")["id"]
    response = post(shared, ended, entrypoint="true")
    assert (response.status, response.json()["error"]) == (409, "not_running")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert shared.request("POST", f"/runs/{room}/exec", body=b"--x--", headers=form).status == 415
    assert shared.request("GET", f"/runs/{room}/exec").status == 405


def test_a_run_that_has_not_started(daemon: DaemonFactory, sandbox: Sandbox) -> None:
    own = daemon("--max-concurrent", "1", socket=True)
    sandbox(on=own)
    queued = own.detach(idle=60_000)
    response = post(own, queued, entrypoint="true")
    assert (response.status, response.json()["error"]) == (409, "not_running")
    own.request("POST", f"/runs/{queued}/cancel")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"idle": 1000}, ["idle"]), ({"idle": 999, "detached": True}, ["idle"]),
        ({"idle": 86_400_001, "detached": True}, ["idle"]), ({"idle": 1000, "detached": True, "stdin": "a"}, ["stdin"]),
        ({"idle": 1000, "detached": True, "input": None}, ["input"]),
        ({"idle": 1000, "detached": True, "setup": ["a"]}, ["setup"]),
    ],
)  # fmt: skip
def test_idle_requests_that_are_refused(shared: Daemon, fields: dict[str, Any], path: list[str]) -> None:
    response = shared.request("POST", "/run", json={"image": IMAGE, **fields})
    assert response.status == 400
    assert [problem["path"] for problem in response.json()["details"]] == [path]


def test_longer_timeouts(daemon: DaemonFactory) -> None:
    own = daemon("--max-timeout", "2h", "--max-exec", "1", socket=True)
    schema = own.request("GET", "/openapi.json").json()["components"]["schemas"]
    for name in ("RunRequest", "ExecRequest"):
        assert schema[name]["properties"]["timeout"]["maximum"] == 7_200_000
    assert own.request("POST", "/run", json={"image": IMAGE, "timeout": 7_200_001}).status == 400
    assert lightrun.RunRequest.parse(b'{"image": "a", "detached": true, "idle": 1000}', lightrun.Settings()).timeout == 3600
    short = lightrun.Settings(max_timeout=10)
    assert lightrun.RunRequest.parse(b'{"image": "a", "entrypoint": "true"}', short).timeout == 10


def test_what_waits_survives_being_stored() -> None:
    request = lightrun.RunRequest.parse(b'{"image": "a", "detached": true, "idle": 1500}', lightrun.Settings())
    assert lightrun.RunRequest.unpack(request.pack(), "a") == request
    assert (request.waits, request.idle) == (True, 1.5)


# ---------------------------------------------------------------- A broken engine


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before the engine, which outlives the daemon behind it."""
    with contextlib.closing(Proxy()) as made:
        yield made


@pytest.fixture
def broken(proxy: Proxy, daemon: DaemonFactory) -> tuple[Daemon, Proxy]:
    """A daemon behind it."""
    return faults.lowered(daemon("--docker-host", proxy.host, start=False, socket=True)).start(), proxy


FEW = (("before", "close"), ("before", "500"), ("after", "reset"), ("after", "cut"), ("after", "silent"))
EVERY = tuple(itertools.product(("before", "after"), ("close", "reset", "garbage", "500", "502", "html", "cut", "silent")))


def ways_to_break() -> Iterator[Any]:
    """Each call in each kind of run, in every way; the short form has one, in a few."""
    kinds: dict[str, dict[str, Any]] = {"idle": {}, "plain": {"entrypoint": "sleep 1000", "idle": None}}
    for call, kind in itertools.product(("exec", "exec-start", "exec-state"), kinds):
        short = (call, kind) == ("exec-start", "plain")
        if short:
            yield pytest.param(FEW, call, kinds[kind], id=f"few-{call}-{kind}")
        yield pytest.param(EVERY, call, kinds[kind], id=f"every-{call}-{kind}", marks=pytest.mark.long)


@pytest.mark.parametrize(("breaks", "call", "fields"), list(ways_to_break()))
def test_any_call_may_break(
    broken: tuple[Daemon, Proxy], sandbox: Sandbox, call: str, breaks: tuple[tuple[str, str], ...], fields: dict[str, Any]
) -> None:
    """An answer comes, nothing in it is made up, and the run and its places are as before."""
    own, proxy = broken
    run = sandbox(on=own, **fields)
    for point, fault in breaks:
        rule = proxy.inject(call, point, fault, times=2)
        began = time.monotonic()
        response = post(own, run, entrypoint="echo x >> /ran; echo told; exit 7", timeout=4000)
        took = time.monotonic() - began
        proxy.mend()
        assert rule.hits, (call, point, fault)
        assert took < 45, (call, point, fault)
        answer = response.json()
        if response.status == 200 and answer["reason"] == "exited":
            assert answer["exitCode"] == 7, (call, point, fault)
            assert answer["logs"] == ["told"] or answer["logsTruncated"], (call, point, fault)
        elif response.status == 200:
            assert answer["reason"] in {"engine_error", "timeout"}, (point, fault, answer)
            assert answer["error"]
        else:
            assert (response.status, answer["error"]) == (503, "engine_unavailable"), (point, fault, answer)
            time.sleep(1)
            assert lines(own, run, "cat /ran 2>/dev/null; true") == [], (call, point, fault)  # nothing was accepted
        assert lines(own, run, "rm -f /ran; echo again") == ["again"], (call, point, fault)
    assert own.state(run)["phase"] == "running"


@pytest.mark.long
def test_an_engine_on_tcp(daemon: DaemonFactory, sandbox: Sandbox) -> None:
    """One that may be far away: what is to end is killed from inside its container, or `error` says that it was not."""
    with contextlib.closing(Proxy(tcp=True)) as proxy:
        own = daemon("--docker-host", proxy.host, socket=True)
        run = sandbox(on=own, files={"script": "sleep 104\n"})
        assert lines(own, run, ["cat"], stdin="x" * 200_000) == ["x" * 200_000]
        for entrypoint in (["sleep", "104"], ["./script"]):
            state = execute(own, run, entrypoint, timeout=500)
            assert (state["reason"], state["exitCode"]) == ("timeout", 137)
        assert eventually(lambda: processes(own, run) == [lightrun.SHIM])
        plain = own.detach(entrypoint="sleep 1000")
        own.wait_for(plain, lambda state: state.get("phase") == "running")
        state = execute(own, plain, "sleep 5", timeout=500)
        assert (state["reason"], "exitCode" in state, state["logsTruncated"]) == ("timeout", False, True)
        assert state["error"].endswith("but it could not be killed, and may go on until its run ends")
        for each in (run, plain):
            own.request("POST", f"/runs/{each}/cancel")
            own.wait(each)
        own.stop()


@pytest.mark.parametrize("fault", ["reset", *(pytest.param(each, marks=pytest.mark.long) for each in ("close", "silent"))])
def test_output_that_breaks(broken: tuple[Daemon, Proxy], sandbox: Sandbox, fault: str) -> None:
    """What is missing is told, and the exit code is the engine's."""
    own, proxy = broken
    run = sandbox(on=own)
    lines(own, run, "true")
    proxy.inject("exec-start", "mid", fault, times=1, after=17_000)
    script = "for i in $(seq 20); do echo $i; sleep 0.1; done; seq 1 10000; exit 3"
    state = execute(own, run, script, timeout=20_000)
    proxy.mend()
    assert state["logsTruncated"] or len(state["logs"]) == 10_020
    assert (state["reason"], state.get("exitCode")) in {("exited", 3), ("engine_error", None)}, state
    assert eventually(lambda: processes(own, run) == [lightrun.SHIM], SOON_SECONDS)


@pytest.mark.parametrize("script", ["echo x > /begun", *longer("echo x > /begun; sleep 104")])
def test_output_that_breaks_before_the_first_word(broken: tuple[Daemon, Proxy], sandbox: Sandbox, script: str) -> None:
    """Nobody is told that a command could not be started which was, and none goes on."""
    own, proxy = broken
    for frames in (2, 3, 4):  # in which the engine passes on what the shim tells first, more or less
        run, after = sandbox(on=own), 32 + lightrun.ENVIRONMENT_PIECE + 8 * frames + 1
        proxy.inject("exec-start", "mid", "close", times=1, after=after)
        response = post(own, run, entrypoint=script, timeout=3000)
        proxy.mend()
        begun = lines(own, run, "test ! -e /begun || echo begun") == ["begun"]
        assert not begun or (response.status == 200 and "could not be started" not in response.text), (frames, response.text)
        assert not any("sleep 104" in each for each in processes(own, run))


def test_an_earlier_command_is_not_asked_for_all_the_time(broken: tuple[Daemon, Proxy], sandbox: Sandbox) -> None:
    own, proxy = broken
    run = sandbox(on=own)
    with ThreadPoolExecutor() as pool:
        going = pool.submit(execute, own, run, "sleep 107")
        assert eventually(lambda: any("sleep 107" in each for each in top(own, run)))
        own.kill()
        assert going.exception()
    rule = proxy.inject("exec-state", "before", "close")
    own.start()
    assert eventually(lambda: rule.hits)
    assert not eventually(lambda: rule.hits > 4, 2)
    proxy.mend()
    assert eventually(lambda: processes(own, run) == [lightrun.SHIM])


@pytest.mark.long
def test_a_client_that_leaves_a_hung_engine(broken: tuple[Daemon, Proxy], sandbox: Sandbox) -> None:
    own, proxy = broken
    run = sandbox(on=own)
    proxy.inject("exec-start", "before", "hang", times=1)
    with contextlib.closing(own.connect()) as sock:
        text = json.dumps({"entrypoint": "echo ran > /ran"})
        head = f"POST /runs/{run}/exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        assert eventually(lambda: proxy.count("exec-start"))
    time.sleep(1)
    proxy.mend()
    time.sleep(1)
    assert lines(own, run, "ls /ran 2>/dev/null; echo none") == ["none"]
