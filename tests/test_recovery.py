"""A daemon that is killed, or told to stop, at the worst moment: every accepted run still ends once, and nothing stays."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import operator
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

import lightrun as module
import soak
from conftest import HELD, LABEL_RUN, LABEL_STATE, ROOT, Daemon, DaemonFactory, Receiver, Response, eventually, longer, release
from engine import IMAGE
from faults import Proxy
from lightrun import parse_timestamp

KILLED = -9


@pytest.fixture(scope="session")
def pyz() -> Path:
    """Instead of the zip: the daemon that can be told where to die."""
    return ROOT / "tests/launcher.py"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(16) as threads:
        yield threads


def restart(lightrun: Daemon, trap: str = "") -> None:
    """Start the daemon again, after its kill, with this trap."""
    lightrun.env["LIGHTRUN_TRAP"] = trap
    lightrun.start()


def dies(lightrun: Daemon) -> None:
    """Wait for the trap."""
    assert lightrun.process.wait(20) == KILLED


def reset(call: Callable[[], Any]) -> None:
    """Make a call that the daemon's death cuts off."""
    with pytest.raises((OSError, http.client.HTTPException)):
        call()


def started(lightrun: Daemon, run: str, line: str = "") -> dict[str, Any]:
    """Wait until the command runs, and has printed a line."""
    return lightrun.wait_for(run, lambda state: "startedAt" in state and (not line or line in state["logs"]))


def client(pool: ThreadPoolExecutor, lightrun: Daemon, key: str = "", **fields: Any) -> Future[Response]:
    """A client that waits for its run."""
    headers = {"Idempotency-Key": key} if key else {}
    return pool.submit(lightrun.request, "POST", "/run", {"image": IMAGE, **fields}, headers=headers)


def only_run(lightrun: Daemon) -> str:
    """The id of the one run there is, once it has started."""
    assert eventually(lambda: any("startedAt" in run for run in lightrun.request("GET", "/runs").json()))
    (run,) = lightrun.request("GET", "/runs").json()
    return str(run["id"])


def seconds(state: dict[str, Any], first: str, last: str) -> float:
    """From one time of a state to another."""
    times = [datetime.datetime.fromisoformat(state[name].replace("Z", "+00:00")) for name in (first, last)]
    return (times[1] - times[0]).total_seconds()


def state_id(lightrun: Daemon) -> str:
    """What this daemon's containers are labelled with."""
    with contextlib.closing(sqlite3.connect(lightrun.state_dir / "lightrun.db")) as database:
        return str(database.execute("SELECT value FROM meta WHERE name = 'state'").fetchone()[0])


def fed(lightrun: Daemon, run: str) -> bool:
    """Whether it is recorded that the run has its stdin."""
    with contextlib.closing(sqlite3.connect(lightrun.state_dir / "lightrun.db")) as database:
        return bool(database.execute("SELECT fed FROM runs WHERE id = ?", (run,)).fetchone()[0])


def folders(lightrun: Daemon) -> set[str]:
    """What lies in the artifacts dir, but for the marker."""
    return {path.name for path in (lightrun.state_dir / "artifacts").iterdir()} - {".lightrun"}


def files_with(folder: Path, text: str) -> list[str]:
    """Which files below a folder hold a text."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in paths if text.encode() in path.read_bytes()]


# ---------------------------------------------------------------- kill -9


def test_running_container_is_adopted(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    run = lightrun.detach(entrypoint="echo before; sleep 2; echo after; echo kept > out.txt", extract=["out.txt"])
    before = started(lightrun, run, "before")
    lightrun.kill()
    restart(lightrun)
    assert before["startedAt"] == started(lightrun, run, "before")["startedAt"]
    state = lightrun.wait(run)
    assert (state["reason"], state["exitCode"], state["status"]) == ("exited", 0, "succeeded")
    assert (state["logs"], state["logsTruncated"]) == (["before", "after"], False)
    assert state["startedAt"] == before["startedAt"]
    assert state["createdAt"] == before["createdAt"]
    assert state["timings"].keys() == {"run", "extract"}  # what the earlier daemon spent is not known
    assert lightrun.request("GET", f"/runs/{run}/artifacts/out.txt").text == "kept\n"


def test_adopted_runs_keep_their_deadline(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    soon, past = (lightrun.detach(entrypoint="echo begun; sleep 30", timeout=timeout) for timeout in (6000, 1500))
    for run in (soon, past):
        started(lightrun, run)
    lightrun.kill()
    eventually(lambda: False, 3)
    restart(lightrun)
    adopted = time.time()
    states = [lightrun.wait(run) for run in (soon, past)]
    for state in states:
        assert (state["reason"], state["status"], state["exitCode"]) == ("timeout", "failed", 137)
    assert 6 <= seconds(states[0], "startedAt", "finishedAt") < 9, "the time began again"
    assert parse_timestamp(states[1]["finishedAt"]) - adopted < 2.5


def test_container_that_ended_meanwhile(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon()
    run = lightrun.detach(
        entrypoint="sleep 1; echo out; echo err >&2; printf kept > out.txt; exit 3", timeout=1500,
        extract=["out.txt"], extractOn="exit", callbackUrl=receiver.url,
    )  # fmt: skip
    started(lightrun, run)
    lightrun.kill()
    assert eventually(lambda: lightrun.containers()[0]["State"] == "exited")
    eventually(lambda: False, 1)  # Its time is up long since; it was in time all the same.
    restart(lightrun)
    state = lightrun.wait(run)
    assert (state["reason"], state["exitCode"], state["status"]) == ("exited", 3, "failed")
    assert sorted(state["logs"]) == ["err", "out"]
    assert lightrun.request("GET", f"/runs/{run}/logs?stream=stderr").text == "err\n"
    assert state["artifacts"] == [{"path": "out.txt", "bytes": 4, "type": "file"}]
    assert receiver.wait()[0].body == lightrun.request("GET", f"/runs/{run}").body.split(b',"callback":')[0] + b"}"


@pytest.mark.parametrize("trap", ["Extraction._move_in after 1", *longer("Extraction._write after 1", "Store.finish before 1")])
def test_kill_during_extraction(daemon: DaemonFactory, trap: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": trap})
    script = "mkdir d; echo 1 > d/a; echo 2 > d/b; echo 3 > c; echo done"
    run = lightrun.detach(entrypoint=script, extract=["d", "c", "none"])
    dies(lightrun)
    restart(lightrun)
    state = lightrun.wait(run)
    assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 0, ["done"])
    assert [entry["path"] for entry in state["artifacts"]] == ["a", "b", "c"]
    assert [entry["status"] for entry in state["extracted"]] == ["ok", "ok", "missing"]
    assert folders(lightrun) == {run}
    assert sorted(path.name for path in (lightrun.state_dir / "artifacts" / run).iterdir()) == ["a", "b", "c"]


def test_vanished_container_is_lost(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    lightrun = daemon()
    run = lightrun.detach(entrypoint="echo out; sleep 30")
    started(lightrun, run, "out")
    lightrun.kill()
    engine.remove_container(f"lightrun-{run}", force=True)
    restart(lightrun)
    state = lightrun.wait(run)
    assert (state["reason"], state["status"]) == ("lost", "failed")
    assert state["error"]
    assert (state["logs"], state["logsTruncated"]) == ([], True)
    assert "exitCode" not in state


def test_kill_while_a_run_is_brought_up_again(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    """Its container vanished before it could be started: the next one has the files, too, and is the one that is run."""
    with contextlib.closing(Proxy()) as proxy:
        lightrun = daemon("--docker-host", proxy.host, env={"LIGHTRUN_TRAP": "Engine.put before 2"})
        rule = proxy.inject("start", "before", "hang", times=1)
        run = lightrun.detach(entrypoint="cat file", files={"file": "here\n"})
        assert eventually(lambda: rule.held)
        engine.remove_container(f"lightrun-{run}")
        proxy.mend()
        dies(lightrun)
        restart(lightrun)
        state = lightrun.wait(run)
        assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 0, ["here"])
        lightrun.stop()


def test_queue_and_its_order_survive(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1")
    runs = [lightrun.detach(entrypoint=["echo", str(number)]) for number in range(5)]
    lightrun.kill()
    restart(lightrun)
    states = [lightrun.wait(run) for run in runs]
    assert [state["reason"] for state in states] == ["exited"] * 5
    assert [state["logs"] for state in states] == [[str(number)] for number in range(5)]
    starts = [state["startedAt"] for state in states]
    assert starts == sorted(starts)
    assert [run["id"] for run in lightrun.request("GET", "/runs").json()] == runs[::-1]


def test_a_queued_run_whose_request_was_spoilt_never_starts(daemon: DaemonFactory) -> None:
    """Not even with the image's own command."""
    lightrun = daemon("--max-concurrent", "1")
    first, queued = lightrun.detach(entrypoint="sleep 60"), lightrun.detach(entrypoint="echo never")
    started(lightrun, first)
    lightrun.kill()
    (lightrun.state_dir / "secrets" / queued).write_bytes(b"spoilt")
    restart(lightrun)
    assert lightrun.request("POST", f"/runs/{first}/cancel").status == 204
    state = lightrun.wait(queued)
    assert (state["reason"], state["status"], state["logs"]) == ("start_failed", "failed", [])
    assert "its request is gone" in state["error"]
    assert "startedAt" not in state
    assert lightrun.wait(first)["reason"] == "cancelled"


def test_run_of_a_waiting_client_is_interrupted(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon("--max-concurrent", "1")
    waiting = client(pool, lightrun, entrypoint="echo here; sleep 30")
    run = only_run(lightrun)
    queued = client(pool, lightrun, entrypoint="echo never")
    assert eventually(lambda: len(lightrun.request("GET", "/runs").json()) == 2)
    lightrun.kill()
    reset(waiting.result)
    reset(queued.result)
    restart(lightrun)
    for entry in lightrun.request("GET", "/runs").json():
        state = lightrun.wait(entry["id"], 10)
        assert (state["reason"], state["status"]) == ("interrupted", "cancelled")
        assert state["error"]
        assert (state.get("exitCode"), state["logs"]) == ((137, ["here"]) if entry["id"] == run else (None, []))
    assert eventually(lambda: not lightrun.containers())


@pytest.mark.long
def test_stdin_that_was_not_written_whole(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    blocked = lightrun.detach(entrypoint="sleep 30", stdin="x" * 8_000_000)
    whole = lightrun.detach(entrypoint="wc -c; sleep 3; echo end", stdin="x" * 100_000)
    started(lightrun, blocked)
    started(lightrun, whole, "100000")
    with contextlib.closing(sqlite3.connect(lightrun.state_dir / "lightrun.db")) as database:  # else it is taken for cut
        assert eventually(lambda: database.execute("SELECT fed FROM runs WHERE id = ?", (whole,)).fetchone() == (1,))
    lightrun.kill()
    restart(lightrun)
    state = lightrun.wait(blocked, 10)
    assert (state["reason"], state["status"], state["exitCode"]) == ("interrupted", "failed", 137)
    state = lightrun.wait(whole)
    assert (state["reason"], state["logs"]) == ("exited", ["100000", "end"])


def test_keyed_run_survives_for_the_retry(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon()
    fields = {"entrypoint": "echo one; sleep 2; echo two"}
    waiting = client(pool, lightrun, "key", **fields)
    run = only_run(lightrun)
    lightrun.kill()
    reset(waiting.result)
    restart(lightrun)
    state = client(pool, lightrun, "key", **fields).result().json()
    assert (state["id"], state["reason"], state["logs"]) == (run, "exited", ["one", "two"])
    assert client(pool, lightrun, "key", entrypoint="other").result().status == 409


def test_key_of_an_answer_that_was_never_sent(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": "Store.add after 1"})
    reset(client(pool, lightrun, "key", entrypoint="echo once", detached=True).result)
    dies(lightrun)
    restart(lightrun)
    again = client(pool, lightrun, "key", entrypoint="echo once", detached=True).result()
    assert again.status == 202
    assert lightrun.wait(again.json()["id"])["logs"] == ["once"]
    assert len(lightrun.request("GET", "/runs").json()) == 1


@pytest.mark.long
@pytest.mark.parametrize(("how", "reason", "status"), [("cancel", "cancelled", "cancelled"), ("stop", "stopped", "failed")])
def test_recorded_wish_is_fulfilled(daemon: DaemonFactory, how: str, reason: str, status: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": "Engine.kill before 1"})
    run = lightrun.detach(entrypoint="echo here; sleep 30")
    started(lightrun, run, "here")
    with contextlib.suppress(OSError, http.client.HTTPException):  # The trap may be quicker than the answer.
        assert lightrun.request("POST", f"/runs/{run}/{how}").status == 204
    dies(lightrun)
    restart(lightrun)
    state = lightrun.wait(run, 10)
    assert (state["reason"], state["status"], state["logs"]) == (reason, status, ["here"])
    assert state["exitCode"] in (137, 143)


def test_queued_run_whose_cancel_was_recorded_never_starts(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "1", env={"LIGHTRUN_TRAP": "Store.ask after 1"})
    first, queued = lightrun.detach(entrypoint="sleep 2"), lightrun.detach(entrypoint="echo never")
    reset(lambda: lightrun.request("POST", f"/runs/{queued}/cancel"))
    dies(lightrun)
    restart(lightrun)
    state = lightrun.wait(queued)
    assert (state["reason"], state["status"], state["logs"]) == ("cancelled", "cancelled", [])
    assert "startedAt" not in state
    assert lightrun.wait(first)["reason"] == "exited"


@pytest.mark.long
def test_adopted_logs_beyond_the_limit_say_so(daemon: DaemonFactory) -> None:
    lightrun = daemon("--log-limit", "10k")
    long = "i=0; while [ $i -lt {} ]; do echo line $i; i=$((i+1)); done; echo said; sleep 2; echo end"
    runs = {lines: lightrun.detach(entrypoint=long.format(lines)) for lines in (300, 20_000)}
    for run in runs.values():
        started(lightrun, run, "said")
    lightrun.kill()
    restart(lightrun)
    for lines, run in runs.items():
        state = lightrun.wait(run)
        everything = [*(f"line {number}" for number in range(lines)), "said", "end"]
        kept = lightrun.request("GET", f"/runs/{run}/logs").body
        assert ("\n".join(everything) + "\n").encode().endswith(kept)
        assert state["logs"][-50:] == everything[-50:]
        assert state["logsTruncated"] is (lines == 20_000)
        assert len(kept) == (10240 if lines == 20_000 else sum(len(line) + 1 for line in everything))


def test_strays_go_and_strangers_stay(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    lightrun, neighbour = daemon(), daemon()
    ours, theirs = lightrun.detach(entrypoint="sleep 3; echo ours"), neighbour.detach(entrypoint="sleep 3; echo theirs")
    started(lightrun, ours)
    started(neighbour, theirs)
    own, foreign = state_id(lightrun), uuid.uuid4().hex
    lightrun.kill()
    stray = str(uuid.uuid4())
    makings: list[tuple[str | None, dict[str, str]]] = [
        (f"lightrun-{stray}", {LABEL_STATE: own, LABEL_RUN: stray}),
        (None, {LABEL_STATE: own, LABEL_RUN: stray}),  # Somebody may run an image that carries such labels.
        (None, {LABEL_STATE: foreign, LABEL_RUN: ours}),
        (None, {LABEL_RUN: ours}),
    ]
    made = [engine.create_container(IMAGE, "true", name=name, labels=labels)["Id"] for name, labels in makings]
    artifacts = lightrun.state_dir / "artifacts"
    strays, strangers = [str(uuid.uuid4()), f"{uuid.uuid4()}.partial"], ["notes", "lost+found"]
    for name in (*strays, *strangers):
        (artifacts / name / "deep").mkdir(parents=True)
        (artifacts / name / "deep" / "file").write_text("x")
    (artifacts / "file").write_text("x")
    (lightrun.state_dir / "secrets" / str(uuid.uuid4())).write_text("x")
    try:
        restart(lightrun)
        assert lightrun.wait(ours)["logs"] == ["ours"]
        assert neighbour.wait(theirs)["logs"] == ["theirs"]
        assert eventually(lambda: [entry["Id"] for entry in lightrun.containers()] == [made[1]])
        left = {entry["Id"] for entry in engine.containers(all=True)}
        assert [container in left for container in made] == [False, True, True, True]
    finally:
        for container in made[1:]:
            engine.remove_container(container, force=True)
    assert folders(lightrun) == {*strangers, "file"}
    assert (artifacts / "notes/deep/file").read_text() == "x"
    assert not list((lightrun.state_dir / "secrets").iterdir())


@pytest.mark.parametrize("killed", [True, *longer(False)])
def test_secrets_go_with_the_run(daemon: DaemonFactory, receiver: Receiver, killed: bool) -> None:
    canary = uuid.uuid4().hex
    lightrun = daemon(env={"LIGHTRUN_DELAYS": "0.5 0.5"})
    receiver.answer(500)
    secrets = lightrun.state_dir / "secrets"
    run = lightrun.detach(
        entrypoint="sleep 1; test $(cat file) = $SECRET; cat > in", env={"SECRET": canary}, files={"file": canary},
        stdin=canary, callbackUrl=f"{receiver.url}?token={canary}", callbackSecret=canary,
    )  # fmt: skip
    started(lightrun, run)
    assert files_with(lightrun.state_dir, canary) == [f"secrets/{run}"]
    assert (secrets.stat().st_mode & 0o777, (secrets / run).stat().st_mode & 0o777) == (0o700, 0o600)
    if killed:
        assert eventually(lambda: fed(lightrun, run))
        lightrun.kill()
        restart(lightrun)
    assert lightrun.wait(run)["reason"] == "exited"
    lightrun.wait_for(run, lambda state: state["callback"]["status"] == "delivered")
    assert eventually(lambda: not list(secrets.iterdir()))
    assert files_with(lightrun.state_dir, canary) == []
    assert canary not in lightrun.log()
    assert all(canary not in request.body.decode() for request in receiver.wait(2))


# ---------------------------------------------------------------- the very first start


@pytest.mark.parametrize("trap", ["Store._prepare after 1", *longer("Store._prepare before 1", "_claim_artifacts_dir before 1")])
def test_kill_during_the_first_start(daemon: DaemonFactory, trap: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": trap}, start=False).start(wait=False)
    dies(lightrun)
    restart(lightrun)
    assert lightrun.run(entrypoint="echo fine")["logs"] == ["fine"]


def test_kill_while_the_artifacts_dir_was_claimed(daemon: DaemonFactory) -> None:
    lightrun = daemon(start=False)
    (lightrun.state_dir / "artifacts").mkdir(parents=True)
    (lightrun.state_dir / "artifacts" / ".lightrun.new").touch()
    assert lightrun.start().run(entrypoint="echo fine")["logs"] == ["fine"]
    assert not folders(lightrun)


# ---------------------------------------------------------------- SIGTERM


def test_sigterm_drains(daemon: DaemonFactory, pool: ThreadPoolExecutor, engine: docker.APIClient) -> None:
    lightrun = daemon("--drain", "6s")
    detached = lightrun.detach(entrypoint=f"echo start; {HELD}; echo end")
    quick = client(pool, lightrun, entrypoint="sleep 3; echo quick")
    slow = client(pool, lightrun, entrypoint="echo slow; sleep 60")
    keyed = client(pool, lightrun, "key", entrypoint=f"echo key; {HELD}; echo more")
    assert eventually(lambda: sum("startedAt" in run for run in lightrun.request("GET", "/runs").json()) == 4)
    lightrun.process.terminate()
    began = time.monotonic()
    assert eventually(lambda: "going down" in lightrun.log())
    body = {"image": IMAGE, "entrypoint": "true", "detached": True}
    refused = eventually(lambda: (answer := lightrun.request("POST", "/run", body)).status == 503 and answer)
    assert refused.json()["error"] == "stopping"
    assert int(refused.headers["Retry-After"]) > 0
    assert lightrun.request("GET", f"/runs/{detached}").status == 200
    state = quick.result().json()
    assert (state["reason"], state["logs"]) == ("exited", ["quick"])
    state = slow.result().json()
    assert (state["reason"], state["status"], state["logs"], state["exitCode"]) == ("interrupted", "cancelled", ["slow"], 137)
    assert 5 < time.monotonic() - began < 10
    assert lightrun.process.wait(10) == 0
    reset(keyed.result)
    assert {entry["State"] for entry in lightrun.containers()} == {"running"}
    assert len(lightrun.containers()) == 2
    restart(lightrun)
    for container in lightrun.containers():
        release(engine, container["Labels"][LABEL_RUN])
    assert lightrun.wait(detached)["logs"] == ["start", "end"]
    again = client(pool, lightrun, "key", entrypoint=f"echo key; {HELD}; echo more").result().json()
    assert (again["reason"], again["logs"]) == ("exited", ["key", "more"])


def test_second_sigterm_ends_it_at_once(daemon: DaemonFactory, pool: ThreadPoolExecutor) -> None:
    lightrun = daemon()
    waiting = client(pool, lightrun, entrypoint="sleep 60")
    run = only_run(lightrun)
    lightrun.process.terminate()
    assert eventually(lambda: "going down" in lightrun.log())
    lightrun.process.terminate()
    lightrun.process.wait(2)
    reset(waiting.result)
    restart(lightrun)
    assert lightrun.wait(run)["reason"] == "interrupted"


@pytest.mark.long
def test_restart_under_load_loses_nothing(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "4")
    accepted: dict[str, str] = {}

    def submit() -> None:
        for number in range(20):
            body = {"image": IMAGE, "entrypoint": ["echo", str(number)], "network": "none", "detached": True}
            key = {"Idempotency-Key": f"n{number}"}

            def once(body: dict[str, Any] = body, key: dict[str, str] = key) -> str | None:
                try:
                    answer = lightrun.request("POST", "/run", body, headers=key)
                except (OSError, http.client.HTTPException):
                    return None
                return str(answer.json()["id"]) if answer.status == 202 else None

            accepted[str(number)] = eventually(once, 30)

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        for _ in range(3):
            eventually(lambda: False, 0.5)
            assert lightrun.stop() == 0
            lightrun.start()
    finally:
        thread.join()
    for number, run in accepted.items():
        state = lightrun.wait(run, 60)
        assert (state["reason"], state["logs"]) == ("exited", [number])
    assert len(set(accepted.values())) == 20


ENDLESS = "echo begun; sleep 60"
ACTIONS = {"cancelled": "cancel", "stopped": "stop"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"timeout": 1500}, "timeout"), ({}, "stopped"),
        *longer(({"outputLimit": 3}, "output_limit"), ({"cpuTime": 500, "entrypoint": "while :; do :; done"}, "cpu_limit"),
                ({}, "cancelled")),
    ],
)  # fmt: skip
def test_kill_between_a_signal_and_its_record(daemon: DaemonFactory, fields: dict[str, Any], reason: str) -> None:
    """What the engine was told to kill for is known, though not by us."""
    lightrun = daemon(env={"LIGHTRUN_TRAP": "Engine.kill after 1"})
    run = lightrun.detach(**{"entrypoint": ENDLESS, **fields})
    if not fields:
        started(lightrun, run)
        with contextlib.suppress(OSError, http.client.HTTPException):
            lightrun.request("POST", f"/runs/{run}/{ACTIONS[reason]}")
    dies(lightrun)
    restart(lightrun)
    assert lightrun.wait(run)["reason"] == reason


# ---------------------------------------------------------------- eviction and deletion


@pytest.mark.parametrize("trap", ["Store.delete after 1", *longer("Store.delete before 1", "Store._drop_secret before 4")])
def test_kill_during_deletion(daemon: DaemonFactory, receiver: Receiver, trap: str) -> None:
    lightrun = daemon(env={"LIGHTRUN_TRAP": trap})
    run = lightrun.detach(entrypoint="echo x > x", extract=["x"], callbackUrl=receiver.url)
    lightrun.wait_for(run, lambda state: state["callback"]["status"] == "delivered")
    reset(lambda: lightrun.request("DELETE", f"/runs/{run}"))
    dies(lightrun)
    restart(lightrun)
    left = lightrun.request("GET", f"/runs/{run}").status == 200
    assert left is trap.startswith("Store.delete before")
    assert folders(lightrun) == ({run} if left else set())
    assert not list((lightrun.state_dir / "secrets").iterdir())


@pytest.mark.parametrize("when", ["after", *longer("before")])
def test_kill_during_eviction(daemon: DaemonFactory, when: str) -> None:
    lightrun = daemon("--keep", "2", env={"LIGHTRUN_TRAP": f"Store.delete {when} 1"})
    runs = []
    for _ in range(3):
        runs.append(lightrun.detach(entrypoint="echo x > x", extract=["x"], network="none"))
        with contextlib.suppress(OSError, http.client.HTTPException):  # The third evicts, which is the end.
            lightrun.wait(runs[-1])
    dies(lightrun)
    restart(lightrun)
    kept = [state["id"] for state in lightrun.request("GET", "/runs").json()]
    assert folders(lightrun) == set(kept)
    assert set(kept) == set(runs[1:] if when == "after" else runs)
    last = lightrun.run(entrypoint="echo x > x", extract=["x"])["id"]
    assert eventually(lambda: len(lightrun.request("GET", "/runs").json()) == 2)
    assert folders(lightrun) == {runs[-1], last}


# ---------------------------------------------------------------- All of it at once


@pytest.mark.parametrize("name", [*soak.STEPS, *soak.WARM_STEPS])
def test_every_step_of_the_soak_is_there(name: str) -> None:
    """A kill waits at one of them by chance."""
    assert callable(operator.attrgetter(name)(module))


@pytest.mark.timeout(240)
def test_soak(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    """The short form of tests/soak.py: see there."""
    killed = daemon(*soak.OPTIONS, env=soak.ENVIRONMENT, start=False)
    soak.Soak(killed, engine, kills=4, seed=time.time_ns()).run()
