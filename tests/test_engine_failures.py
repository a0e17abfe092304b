"""The engine goes away, hangs or comes late; a disk is full. lightrun stays up, loses nothing and goes on by itself.

Engines are private ones, so that nobody else's is disturbed; disks are small tmpfs.
"""

from __future__ import annotations

import contextlib
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

from conftest import HELD, Daemon, DaemonFactory, eventually, release
from engine import IMAGE, PrivateEngine

AT_ONCE = 0.5  # seconds for what must not wait for the engine
AWAY_SECONDS = 12


@pytest.fixture(scope="module")
def plain() -> Iterator[PrivateEngine]:
    """An engine whose containers end with it."""
    with PrivateEngine() as started:
        yield started


@pytest.fixture(scope="module")
def live() -> Iterator[PrivateEngine]:
    """An engine whose containers go on without it."""
    with PrivateEngine("--live-restore") as started:
        yield started


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs mounted on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on a disk."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds it took."""
    began = time.monotonic()
    return call(), time.monotonic() - began


def started(lightrun: Daemon, line: str, **fields: Any) -> str:
    """A detached run that has printed a line."""
    run = lightrun.detach(network="none", **fields)
    lightrun.wait_for(run, lambda state: line in state["logs"])
    return run


def refuses(lightrun: Daemon) -> bool:
    """Whether a run is refused for want of an engine; one that is accepted all the same is cancelled."""
    answer = lightrun.request("POST", "/run", {"image": IMAGE, "network": "none", "detached": True, "entrypoint": ["true"]})
    if answer.status == 202:
        lightrun.request("POST", f"/runs/{answer.json()['id']}/cancel")
        return False
    assert (answer.status, answer.json()["error"]) == (503, "engine_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    return True


def is_fine(lightrun: Daemon) -> None:
    """Runs are taken and succeed again, before long."""

    def succeeds() -> bool:
        body = {"image": IMAGE, "network": "none", "entrypoint": "echo fine; echo kept > x", "extract": ["x"]}
        answer = lightrun.request("POST", "/run", body)
        return answer.status == 200 and answer.json()["logs"] == ["fine"] and bool(answer.json()["artifacts"])

    assert eventually(succeeds, 10, 0.5), lightrun.log()
    health = lightrun.request("GET", "/health")
    assert (health.status, health.json()["docker"], health.json()["status"]) == (200, True, "ok")


# ---------------------------------------------------------------- The engine


def test_restart_with_live_restore(daemon: DaemonFactory, live: PrivateEngine) -> None:
    """Away for a while: running containers go on, the queue waits, and nothing new is taken."""
    lightrun = daemon("--docker-host", live.host, "--max-concurrent", "2")
    script = "cat; sleep 3; echo meanwhile; {}; echo end; echo kept > x"
    long = started(lightrun, "in", entrypoint=script.format(HELD), stdin="in\n", extract=["x"])
    short = started(lightrun, "in", entrypoint=script.format("sleep 2"), stdin="in\n", extract=["x"])
    queued = lightrun.detach(network="none", entrypoint="echo queued")
    live.stop()
    began = time.monotonic()
    health, took = timed(lambda: lightrun.request("GET", "/health"))
    assert (health.status, health.json()["docker"], health.json()["status"]) == (503, False, "unavailable")
    assert took < 2.5
    assert eventually(lambda: refuses(lightrun))
    eventually(lambda: False, AWAY_SECONDS - (time.monotonic() - began))
    assert {lightrun.state(run)["status"] for run in (long, short, queued)} == {"running"}
    live.start()
    with contextlib.closing(docker.APIClient(live.host, version="auto")) as client:
        release(client, long)
    for run in (long, short):
        state = lightrun.wait(run)
        # Newer engines say 255 of a container that ended while they and their containerd were away.
        may_be_lost = run == short and not live.api.version().startswith("20.10.")
        assert (state["reason"], state["exitCode"]) in {("exited", 0), ("exited", 255 if may_be_lost else 0)}
        if state["exitCode"] == 0:
            assert state["artifacts"] == [{"path": "x", "bytes": 5, "type": "file"}]
        # What a container wrote is lost to an engine (20.10) that was away at its end.
        assert state["logs"] == ["in", "meanwhile", "end"] or (run == short and state["logsTruncated"]), state
    assert lightrun.wait(queued)["logs"] == ["queued"]
    is_fine(lightrun)


@pytest.mark.long
@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "kill"])
def test_restart_without_live_restore(daemon: DaemonFactory, plain: PrivateEngine, how: str) -> None:
    lightrun = daemon("--docker-host", plain.host, "--max-concurrent", "1")
    run = started(lightrun, "in", entrypoint="echo in; sleep 60; echo end")
    queued = lightrun.detach(network="none", entrypoint="echo queued")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(lightrun.run, network="none", entrypoint="echo waiting")
        getattr(plain, how)()
        plain.start()
        state = lightrun.wait(run)
        assert state["status"] == "failed"
        assert state["reason"] in ("exited", "engine_error"), state
        assert state["logs"] == ["in"]
        assert state.get("exitCode") != 0
        assert lightrun.wait(queued)["logs"] == ["queued"]
        assert waiting.result()["reason"] in ("exited", "engine_error")
    is_fine(lightrun)


@pytest.mark.long
def test_hung_engine(daemon: DaemonFactory, plain: PrivateEngine) -> None:
    lightrun = daemon("--docker-host", plain.host)
    run = started(lightrun, "in", entrypoint="echo in; sleep 60")
    quick = started(lightrun, "in", entrypoint="echo in; sleep 3; echo end")
    plain.pause()
    try:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(timed, lambda: lightrun.request("GET", "/health")) for _ in range(4)]
            for path in ("/runs", f"/runs/{run}", f"/runs/{run}/logs"):
                answer, took = timed(lambda path=path: lightrun.request("GET", path))  # type: ignore[misc]
                assert (answer.status, took < AT_ONCE) == (200, True)
            answer, took = timed(lambda: lightrun.request("POST", f"/runs/{run}/cancel"))
            assert (answer.status, took < AT_ONCE) == (204, True)
            for future in asked:
                health, took = future.result()
                assert took < 2.6
        health, took = timed(lambda: lightrun.request("GET", "/health"))
        assert (health.status, took < 2.6) == (503, True)
        assert lightrun.state(run)["status"] == "running"
        eventually(lambda: False, 3)
    finally:
        plain.resume()
    state = lightrun.wait(run)
    assert (state["reason"], state["status"], state["logs"]) == ("cancelled", "cancelled", ["in"])
    state = lightrun.wait(quick)
    assert (state["reason"], state["logs"]) == ("exited", ["in", "end"])
    is_fine(lightrun)


@pytest.mark.long
def test_start_under_a_hung_engine(daemon: DaemonFactory, plain: PrivateEngine) -> None:
    lightrun = daemon("--docker-host", plain.host)
    run = started(lightrun, "in", entrypoint="echo in; sleep 8; echo end")
    lightrun.kill()
    plain.pause()
    try:
        lightrun.start()
        for _ in range(3):
            health, took = timed(lambda: lightrun.request("GET", "/health"))
            assert (health.status, health.json()["docker"]) == (503, False)
            assert took < 2.6
        assert lightrun.state(run)["status"] == "running"
        assert eventually(lambda: refuses(lightrun))
    finally:
        plain.resume()
    state = lightrun.wait(run)
    assert (state["reason"], state["logs"]) == ("exited", ["in", "end"])
    is_fine(lightrun)


def test_engine_that_comes_after_lightrun(daemon: DaemonFactory, plain: PrivateEngine, tmp_path: Path) -> None:
    place = tmp_path / "s"
    lightrun = daemon("--docker-host", f"unix://{place}")
    health, took = timed(lambda: lightrun.request("GET", "/health"))
    assert (health.status, health.json()["docker"], took < AT_ONCE) == (503, False, True)
    assert eventually(lambda: refuses(lightrun))
    place.symlink_to(plain.socket)
    is_fine(lightrun)


def test_full_disk_of_the_engine(daemon: DaemonFactory) -> None:
    private = PrivateEngine()
    with small_disk(private.folder / "data", "64m"), private:
        lightrun = daemon("--docker-host", private.host)
        is_fine(lightrun)
        hog = started(lightrun, "full", entrypoint="dd if=/dev/zero of=/fill bs=64k; echo full; sleep 60")
        state = lightrun.run(network="none", entrypoint="cat", files={"big": "x" * 1_000_000}, stdin="x")
        assert (state["status"], state["reason"]) == ("failed", "start_failed"), state
        assert "space" in state["error"]
        assert lightrun.request("POST", f"/runs/{hog}/cancel").status == 204
        assert lightrun.wait(hog)["reason"] == "cancelled"
        is_fine(lightrun)
    shutil.rmtree(private.folder)  # which still held the disk when the engine closed


# ---------------------------------------------------------------- lightrun's own disk


def test_full_artifacts_volume(daemon: DaemonFactory, tmp_path: Path) -> None:
    with small_disk(tmp_path / "artifacts", "2m") as disk:
        lightrun = daemon("--artifacts-dir", str(disk))
        script = "mkdir d; head -c 3000000 /dev/zero > d/big; cp d/big big; echo 1 > d/a; echo 1 > small"
        state = lightrun.run(network="none", entrypoint=script, extract=["d", "small", "big"])
        assert (state["reason"], state["status"]) == ("exited", "succeeded")
        assert [entry["status"] for entry in state["extracted"]] == ["error", "ok", "error"]
        assert "No space left" in state["extracted"][0]["message"]
        assert state["artifacts"] == [{"path": "small", "bytes": 2, "type": "file"}]
        left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.name != ".lightrun")
        assert left == [state["id"], f"{state['id']}/small"]
        is_fine(lightrun)
        assert lightrun.stop() == 0


def test_full_state_dir(daemon: DaemonFactory, tmp_path: Path) -> None:
    """Ends that cannot be recorded wait for room: none is lost, and the database stays whole."""
    with small_disk(tmp_path / "state", "8m") as disk:
        lightrun = daemon("--artifacts-dir", str(tmp_path / "artifacts"), state_dir=disk)
        script = "echo in; sleep 2; head -c 600000 /dev/zero | tr '\\0' x; sleep {}"
        run, cancelled = (started(lightrun, "in", entrypoint=script.format(seconds)) for seconds in (0, 60))
        filler = fill(disk)
        containers = eventually(lambda: [entry for entry in lightrun.containers() if entry["State"] == "exited"])
        assert len(containers) == 1
        eventually(lambda: False, 3)
        assert lightrun.state(run)["status"] == "running"
        assert len(lightrun.containers()) == 2
        answer = lightrun.request("POST", "/run", {"image": IMAGE, "detached": True, "stdin": "x" * 100_000})
        assert (answer.status, answer.json()["error"]) == (503, "storage_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert lightrun.request("GET", "/runs").status == 200
        assert lightrun.request("GET", "/health").status == 200
        lightrun.kill()
        filler.unlink()
        lightrun.start()
        state = lightrun.wait(run)
        assert (state["reason"], state["exitCode"]) == ("exited", 0)
        assert state["logs"] == ["in", "x" * 600_000]
        filler = fill(disk)
        assert lightrun.request("POST", f"/runs/{cancelled}/cancel").status in (204, 503)
        eventually(lambda: False, 3)
        assert lightrun.state(cancelled)["status"] == "running"
        filler.unlink()
        assert lightrun.wait(cancelled)["reason"] == "cancelled"
        is_fine(lightrun)
        with contextlib.closing(sqlite3.connect(disk / "lightrun.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert lightrun.stop() == 0
