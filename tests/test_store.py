"""The record of runs: what is written is found again, in order, after any end; and who has to go when room is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightrun
from lightrun import (
    Ask,
    Conflict,
    Evictor,
    NotFound,
    Run,
    RunRequest,
    Settings,
    StartError,
    Store,
    Unavailable,
    Upload,
    choose_victims,
    parse_timestamp,
    timestamp,
    whole_state,
)

ARTIFACTS = [{"path": "a", "bytes": 1000, "type": "file"}, {"path": "b", "bytes": 0, "type": "directory"}]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


def run_named(name: str, **fields: Any) -> Run:
    """A run that has just been accepted."""
    return dataclasses.replace(Run(name, "alpine", time.time(), waited=False), **fields)


def finished(store: Store, name: str, frames: bytes = b"", **fields: Any) -> Run:
    """A run that has been accepted and has succeeded."""
    run = run_named(name, **fields)
    store.add(run)
    ended = dataclasses.replace(run, reason="exited", exit_code=0, finished=run.created + 1)
    store.finish(ended, frames)
    return ended


def ids(heads: list[str]) -> list[str]:
    """The ids of some heads."""
    return [json.loads(head)["id"] for head in heads]


# ---------------------------------------------------------------- What is written is found again


def test_a_run_from_acceptance_to_its_end(store: Store) -> None:
    run = run_named("one")
    store.add(run)
    assert json.loads(store.head("one")) == run.head()
    store.begin("one")
    ended = dataclasses.replace(
        run, reason="exited", exit_code=3, finished=run.created + 2, artifacts=ARTIFACTS,
        extracted=[{"from": "a", "status": "ok", "bytes": 1000}],
    )  # fmt: skip
    store.finish(ended, b"frames\0\xff")
    assert json.loads(store.head("one")) == ended.head()
    assert store.tail("one") == {"artifacts": ARTIFACTS, "extracted": ended.extracted}
    assert store.frames("one") == b"frames\0\xff"


def test_all_of_it_survives_the_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = finished(store, "one", b"log", artifacts=ARTIFACTS)
    state_id, usage = store.id, store.usage()
    store.close()
    again = Store(tmp_path)
    assert (again.id, again.usage()) == (state_id, usage)
    assert json.loads(again.head("one")) == run.head()
    assert again.frames("one") == b"log"
    again.close()


def test_a_callback_is_owed_until_it_is_settled(tmp_path: Path) -> None:
    store, pending = Store(tmp_path), {"status": "pending", "attempts": 0}
    run = run_named("one", callback=pending)
    store.add(run, request=b"the request")
    store.finish(dataclasses.replace(run, reason="exited", exit_code=0, finished=run.created), b"", b"its secret")
    assert [(name, due) for name, due, _ in store.owed()] == [("one", 0)]
    assert list(store.removable()) == []
    store.attempted("one", {**pending, "attempts": 1}, 1234.5)
    store.close()
    again = Store(tmp_path)
    assert [(name, due) for name, due, _ in again.owed()] == [("one", 1234.5)]
    assert again.callback("one") == b"its secret"
    again.attempted("one", {"status": "delivered", "attempts": 2}, None)
    assert json.loads(again.head("one"))["callback"] == {"status": "delivered", "attempts": 2}
    assert again.owed() == []
    assert again.callback("one") is None
    assert [name for name, _ in again.removable()] == ["one"]
    again.close()


def test_an_unfinished_run_can_be_taken_up_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finished(store, "over")
    store.add(run_named("one"), request=b"body")
    store.begin("one", "a meter", "a hand-out")
    store.ask("one", lambda before: f"asked after {before}")
    store.add(run_named("two", waited=True))
    store.fed("two")
    store.close()
    again = Store(tmp_path)
    rows = [(json.loads(head)["id"], *marks) for head, *marks in again.unfinished()]
    assert rows == [("one", 0, 1, 0, "asked after None", "a meter", "a hand-out"), ("two", 1, 0, 1, None, None, None)]
    assert (again.request("one"), again.request("two")) == (b"body", None)
    again.take_back("one")
    assert again.unfinished()[0][2:] == (0, 0, "asked after None", None, None)
    again.finish(run_named("one", reason="lost"), b"")
    assert again.request("one") is None
    assert len(again.unfinished()) == 1
    again.close()


def test_tidying_removes_what_belongs_to_no_run(store: Store, tmp_path: Path) -> None:
    known, unknown = str(uuid.uuid4()), str(uuid.uuid4())
    finished(store, known)
    artifacts = tmp_path / "artifacts"
    for name in (known, unknown, f"{unknown}.partial", "somebody-elses"):
        (artifacts / name).mkdir(parents=True)
    secret = tmp_path / "state/secrets" / unknown
    secret.write_text("x")
    store.tidy(artifacts)
    assert {path.name for path in artifacts.iterdir()} == {known, "somebody-elses"}
    assert not secret.exists()


def test_an_idempotency_key_finds_its_run_as_long_as_that_lives(store: Store) -> None:
    store.add(run_named("one"), "key", "digest")
    assert store.find_key("key") == ("one", "digest")
    assert store.find_key("other") is None
    with pytest.raises(Unavailable):
        store.add(run_named("two"), "key", "digest")
    store.finish(run_named("one", reason="exited", exit_code=0), b"")
    store.delete("one")
    assert store.find_key("key") is None


# ---------------------------------------------------------------- Lists


def test_lists_are_newest_first_by_acceptance(store: Store) -> None:
    for number in range(5):
        store.add(run_named(str(number), created=100.0 - number))  # the clock may go backwards
    assert ids(store.heads(None, None, 100)) == ["4", "3", "2", "1", "0"]
    assert ids(store.heads(None, None, 2)) == ["4", "3"]
    assert ids(store.heads(None, "3", 2)) == ["2", "1"]
    assert ids(store.heads(None, "0", 2)) == []


def test_lists_by_status(store: Store) -> None:
    finished(store, "old")
    store.add(run_named("running"))
    store.add(run_named("failed"))
    store.finish(run_named("failed", reason="timeout", exit_code=137), b"")
    finished(store, "new")
    assert ids(store.heads("succeeded", None, 100)) == ["new", "old"]
    assert ids(store.heads("succeeded", "failed", 100)) == ["old"]
    assert ids(store.heads("running", None, 100)) == ["running"]
    assert ids(store.heads("failed", None, 100)) == ["failed"]
    assert ids(store.heads("cancelled", None, 100)) == []


def test_order_survives_the_deletion_of_the_newest(store: Store) -> None:
    finished(store, "one")
    finished(store, "two")
    store.delete("two")
    finished(store, "three")
    assert ids(store.heads(None, None, 100)) == ["three", "one"]


# ---------------------------------------------------------------- Forgetting


def test_only_finished_runs_can_be_deleted(store: Store) -> None:
    store.add(run_named("one"))
    with pytest.raises(Conflict) as caught:
        store.delete("one")
    assert (caught.value.status, caught.value.code) == (409, "running")
    finished(store, "two")
    store.delete("two")
    for look in (store.head, store.tail, store.delete):
        with pytest.raises(NotFound):
            look("two")
    assert store.head("one")


def test_unknown_runs_are_not_found(store: Store) -> None:
    looks: list[Callable[[], Any]] = [
        lambda: store.head("x"), lambda: store.tail("x"), lambda: store.frames("x"), lambda: store.delete("x"),
        lambda: store.heads(None, "x", 1),
    ]  # fmt: skip
    for look in looks:
        with pytest.raises(NotFound):
            look()


def test_secrets_are_the_users_own_and_go_with_the_run(store: Store, tmp_path: Path) -> None:
    store.add(run_named("one"), request=b"a very secret value")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and b"very secret" in path.read_bytes()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600]
    store.finish(run_named("one", reason="exited", exit_code=0), b"")
    assert not files[0].exists()


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "in a file"])
def test_an_upload_does_not_stay_without_its_request(store: Store, tmp_path: Path, large: bool) -> None:
    secrets = tmp_path / "state/secrets"
    (secrets / "one").mkdir()  # in the way of the request
    body = secrets / "upload-1"
    body.write_bytes(b'--x\r\nContent-Disposition: form-data; name="run"\r\n\r\n{}\r\n--x--\r\n')
    file = body.open("rb") if large else io.BytesIO(body.read_bytes())
    with file, contextlib.closing(Upload.parse(file, "multipart/form-data; boundary=x")) as upload, pytest.raises(Unavailable):
        store.add(run_named("one"), request=b"body", upload=upload)
    assert {path.name for path in secrets.iterdir()} == {"one", "upload-1"}
    with pytest.raises(NotFound):
        store.head("one")


def test_nothing_of_a_deleted_run_stays_in_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finished(store, "one", b"a very secret line of a log")
    store.delete("one")
    store.close()
    assert not any(b"very secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_usage_counts_finished_runs_in_full(store: Store) -> None:
    store.add(run_named("running"))
    assert store.usage() == (0, 0)
    finished(store, "one", bytes(5000), artifacts=ARTIFACTS)
    size, count = store.usage()
    assert count == 1
    assert 6000 < size < 8000
    assert list(store.removable()) == [("one", size)]
    store.delete("one")
    assert store.usage() == (0, 0)


def test_usage_is_right_after_many_threads(store: Store) -> None:
    def work(name: str) -> None:
        for number in range(20):
            finished(store, f"{name}{number}", bytes(100))
            if number % 2:
                store.delete(f"{name}{number}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = list(store.removable())
    assert len(left) == 40
    assert store.usage() == (sum(size for _, size in left), 40)


def test_removable_runs_are_oldest_first_page_by_page(store: Store) -> None:
    for number in range(250):
        finished(store, str(number))
    assert [name for name, _ in store.removable()] == [str(number) for number in range(250)]
    for name, _ in store.removable():
        store.delete(name)
    assert store.usage() == (0, 0)


# ---------------------------------------------------------------- The state dir


def test_the_state_dir_is_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    Store(tmp_path / "state").close()
    Store(tmp_path / "other/deeper").close()
    for folder in ("state", "other/deeper"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_one_daemon_for_one_state_dir(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="another lightrun"):
        Store(tmp_path / "state")
    store.close()
    again = Store(tmp_path / "state")
    again.close()


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "lightrun.db") as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(StartError, match="newer"):
        Store(tmp_path)


def test_a_state_dir_of_the_first_build_opens_with_its_runs(tmp_path: Path) -> None:
    """Its schema was the first, and it kept the client's own body for a run that is to survive."""
    (tmp_path / "secrets").mkdir()
    run, over = run_named("one"), dataclasses.replace(run_named("two"), reason="exited", exit_code=0, finished=time.time())
    with contextlib.closing(sqlite3.connect(tmp_path / "lightrun.db", isolation_level=None)) as database:
        database.executescript(lightrun.SCHEMA[0] + "PRAGMA user_version=1;")
        database.execute("INSERT INTO meta VALUES ('state', 'kept')")
        row = "INSERT INTO runs (id, status, size, waited, begun, head) VALUES (?, ?, ?, 0, 1, ?)"
        database.execute(row, ("one", "running", 0, json.dumps(run.head())))
        database.execute(row, ("two", "succeeded", 123, json.dumps(over.head())))
        database.execute("INSERT INTO details VALUES ('two', '{}', ?)", (b"",))
    body = b'{"image": "alpine", "entrypoint": ["cat"], "stdin": "in", "files": {"a": {"base64": "eA=="}}, "memory": "4g"}'
    (tmp_path / "secrets" / "one").write_bytes(body)
    with contextlib.closing(Store(tmp_path)) as store:
        assert (store.id, store.usage()) == ("kept", (123, 1))
        assert [json.loads(head)["id"] for head, *_ in store.unfinished()] == ["one"]
        request = RunRequest.unpack(store.request("one"), "alpine")
        assert (request.command, request.stdin, request.files, request.memory) == (["cat"], b"in", {"a": b"x"}, 4 << 30)
        store.delete("two")
        assert store.usage() == (0, 0)
    with contextlib.closing(Store(tmp_path)) as store:
        assert store.usage() == (0, 0)


def test_a_request_is_kept_as_it_was_checked(tmp_path: Path) -> None:
    body = {"image": "alpine", "files": {"é": {"base64": "/wA="}}, "input": {"a": "ü"}, "env": {"A": "é"}, "timeout": 5}
    request = RunRequest.parse(json.dumps({**body, "detached": True}).encode(), Settings())
    assert RunRequest.unpack(request.pack(), "other") == request
    for gone in (None, b"spoilt", request.pack()[:-1], b"{}", b"[]", b"null"):
        spoilt = RunRequest.unpack(gone, "other")
        assert (spoilt.image, spoilt.reference, spoilt.command) == ("other", "", None)


def test_a_cancel_is_not_overridden_by_a_stop(store: Store) -> None:
    store.add(run_named("one"), request=b"{}")
    store.ask("one", Ask("stopped").recorded)
    store.ask("one", Ask("cancelled").recorded)
    store.ask("one", Ask("stopped", "SIGTERM").recorded)
    ((*_, asked, _, _),) = store.unfinished()
    assert Ask.parse(asked) == Ask("cancelled")


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lightrun.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StartError, match="not a database"):
        Store(tmp_path)


# ---------------------------------------------------------------- The state of a run


@pytest.mark.parametrize(
    ("reason", "exit_code", "waited", "status"),
    [
        (None, None, True, "running"),
        ("exited", 0, True, "succeeded"),
        ("exited", 1, True, "failed"),
        ("exited", 137, True, "failed"),
        ("stopped", 0, False, "succeeded"),
        ("stopped", 143, False, "failed"),
        ("stopped", None, False, "failed"),
        ("timeout", 0, False, "failed"),
        ("oom", 137, False, "failed"),
        ("cancelled", 0, False, "cancelled"),
        ("cancelled", None, True, "cancelled"),
        ("interrupted", 137, True, "cancelled"),
        ("interrupted", 137, False, "failed"),
        ("pull_failed", None, False, "failed"),
        ("start_failed", None, False, "failed"),
        ("lost", None, False, "failed"),
        ("engine_error", None, False, "failed"),
    ],
)
def test_the_status_follows_from_the_reason(reason: str | None, exit_code: int | None, waited: bool, status: str) -> None:
    assert run_named("x", reason=reason, exit_code=exit_code, waited=waited).status == status


def test_the_state_shows_what_is_known() -> None:
    run = run_named("x", created=1_700_000_000.0)
    assert run.head() == {
        "id": "x", "status": "running", "phase": "queued", "image": "alpine", "createdAt": "2023-11-14T22:13:20.000Z",
        "logsTruncated": False,
    }  # fmt: skip
    ended = dataclasses.replace(run, reason="exited", exit_code=0, started=run.created + 0.1, finished=run.created + 0.5)
    state = whole_state(ended.head(), ended.tail(), b"\x01\0\0\0\0\0\0\x02a\n")
    assert state["durationMs"] == 500
    assert (state["startedAt"], state["finishedAt"]) == ("2023-11-14T22:13:20.100Z", "2023-11-14T22:13:20.500Z")
    assert state["timings"].keys() == {"queue", "pull", "start", "run", "extract"}
    assert not state.keys() & {"phase", "error", "oomKilled", "callback", "artifacts", "extracted", "imageId"}


@given(st.integers(0, 4_000_000_000_000))
def test_times_are_milliseconds(milliseconds: int) -> None:
    assert round(parse_timestamp(timestamp(milliseconds / 1000)) * 1000) == milliseconds


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("2024-02-29T00:00:00Z", 0), ("2024-02-29T00:00:00.5Z", 0.5), ("2024-02-29T00:00:00.123456789Z", 0.123456789)],
)
def test_the_engines_times_are_read(text: str, fraction: float) -> None:
    assert parse_timestamp(text) == pytest.approx(1_709_164_800 + fraction)


# ---------------------------------------------------------------- Who has to go


CANDIDATES = st.lists(st.tuples(st.uuids().map(str), st.integers(0, 50)), max_size=12, unique_by=lambda pair: pair[0])


@given(CANDIDATES, st.integers(-10, 300), st.integers(-3, 14))
def test_the_oldest_go_until_all_fits(candidates: list[tuple[str, int]], excess_bytes: int, excess_runs: int) -> None:
    victims = list(choose_victims(candidates, excess_bytes, excess_runs))
    allowed = [name for name, _ in candidates]
    sizes = dict(candidates)
    assert victims == allowed[: len(victims)]

    def fits(gone: list[str]) -> bool:
        return sum(sizes[name] for name in gone) >= excess_bytes and len(gone) >= excess_runs

    assert fits(victims) or victims == allowed
    assert not victims or not fits(victims[:-1])


def test_no_more_candidates_are_looked_at_than_needed() -> None:
    def candidates() -> Iterator[tuple[str, int]]:
        yield "one", 10
        yield "two", 10
        raise AssertionError("looked too far")

    victims = choose_victims(candidates(), 10, 0)
    assert next(victims) == "one"
    assert list(victims) == []


@pytest.mark.parametrize("order", [*itertools.permutations(("one", "two", "three"))])
def test_runs_that_end_beside_each_other_outlive_each_others_evictions(store: Store, tmp_path: Path, order: list[str]) -> None:
    """In whatever order these come, the last one stays."""
    evictor = Evictor(store, Settings(state_dir=tmp_path / "state", keep=1))
    for name in ("one", "two", "three"):
        finished(store, name)
        evictor.ended(name)
    for count, name in enumerate(order, 1):
        evictor.evict(name)
        kept = {each for each in ("one", "two", "three") if each == "three" or each not in order[:count]}
        assert set(ids(store.heads(None, None, 10))) == kept
