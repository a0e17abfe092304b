"""What a run used, and the limits that a grader needs: figures of CPU and memory, cpuTime, outputLimit, splitLogs, fileSize."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

import lightrun
from conftest import HELD, ROOT, Daemon, DaemonFactory, eventually, release
from engine import IMAGE
from faults import Proxy
from relay import Relay, unix_socket

COLD_MS = 60  # what a cold start adds to cpuMs, at most, on a machine that is busy: README
COLD_BYTES = 16 << 20  # and to memoryPeakBytes
MIB = 1 << 20

# Burn CPU until the process itself, or all together, have used so much, and tell how much it was. `times` says it in ticks
# of 10 ms, so the shell counts its own work instead: /proc/self/schedstat is in nanoseconds.
BURN = r"""
burn() {
  while read used rest < /proc/self/task/$1/schedstat && [ $((used / 1000000)) -lt $2 ]; do
    i=0; while [ $i -lt 200 ]; do i=$((i+1)); done
  done
  echo $used
}
"""
BURN_ONE = BURN + "burn $$ %d"
BURN_CHILDREN = (
    BURN
    + r"""
n=0; while [ $n -lt 30 ]; do sh -c "$BURNER"' burn $$ %d' & n=$((n+1)); done; wait
"""
)
BURN_ORPHAN = r"""
(setsid sh -c "$BURNER"' burn $$ %d > told' &) ; while ! [ -s told ]; do sleep 0.05; done; cat told
"""


@pytest.fixture(scope="module")
def metered(module_daemon: DaemonFactory) -> Daemon:
    """A daemon whose runs have no network."""
    daemon = module_daemon("--max-concurrent", "4")
    assert daemon.request("GET", "/health").json()["usage"] is True
    return daemon


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A machine that has something else to do."""
    burners = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def told_ms(state: dict[str, Any]) -> float:
    """What the burners of a run say that they have used."""
    return sum(map(int, state["logs"])) / 1e6


# ---------------------------------------------------------------- Figures


@pytest.mark.parametrize(
    ("ms", "loaded"),
    [pytest.param(20, False, marks=pytest.mark.long), (20, True), (300, True), (1000, False),
     pytest.param(3000, False, marks=pytest.mark.long)],
)  # fmt: skip
def test_cpu_of_one_process(metered: Daemon, ms: int, loaded: bool) -> None:
    with busy() if loaded else contextlib.nullcontext():
        state = metered.run(entrypoint=BURN_ONE % (ms))
    told = told_ms(state)
    assert told >= ms
    assert told - 10 <= state["usage"]["cpuMs"] <= told * 1.03 + 10 + COLD_MS


@pytest.mark.parametrize("ms", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_cpu_of_children(metered: Daemon, ms: int) -> None:
    """Each starts a shell of its own, which costs some 2 ms beside what it tells."""
    with busy():
        state = metered.run(entrypoint=BURN_CHILDREN % (ms // 30), env={"BURNER": BURN})
    told = told_ms(state)
    assert len(state["logs"]) == 30
    assert told - 10 <= state["usage"]["cpuMs"] <= told * 1.03 + 10 + COLD_MS + 30 * 4


def test_cpu_of_an_orphan(metered: Daemon) -> None:
    state = metered.run(entrypoint=BURN_ORPHAN % (300), env={"BURNER": BURN})
    told = told_ms(state)
    assert told - 10 <= state["usage"]["cpuMs"] <= told * 1.03 + 40 + COLD_MS


@pytest.mark.long
def test_a_sleeper_is_not_charged(metered: Daemon) -> None:
    state = metered.run(entrypoint="sleep 2", cpuTime=200)
    assert (state["reason"], state["usage"]["cpuMs"] <= 10 + COLD_MS) == ("exited", True)


@pytest.mark.parametrize("size", [50, 200])
def test_touched_memory(metered: Daemon, size: int) -> None:
    state = metered.run(entrypoint=f"dd if=/dev/zero of=/dev/null bs={size}M count=1")
    assert size * MIB <= state["usage"]["memoryPeakBytes"] <= size * MIB + COLD_BYTES


def test_one_run_is_not_charged_for_the_one_before(metered: Daemon) -> None:
    metered.run(entrypoint="dd if=/dev/zero of=/dev/null bs=200M count=1; " + BURN_ONE % (500))
    for _ in range(3):  # the slot of the first is taken again as soon as it is free
        usage = metered.run(entrypoint="true")["usage"]
        assert usage["cpuMs"] <= 10 + COLD_MS
        assert usage["memoryPeakBytes"] <= COLD_BYTES


def test_runs_beside_each_other_are_counted_apart(metered: Daemon) -> None:
    runs = [metered.detach(entrypoint=BURN_ONE % (ms)) for ms in (600, 50, 300, 50)]
    for run in runs:
        state = metered.wait(run)
        told = told_ms(state)
        assert told - 10 <= state["usage"]["cpuMs"] <= told * 1.03 + 10 + COLD_MS


def test_where_it_is_told(metered: Daemon, receiver: Any) -> None:
    run = metered.detach(entrypoint="true", callbackUrl=receiver.url)
    usage = metered.wait(run)["usage"]
    assert set(usage) == {"cpuMs", "memoryPeakBytes"}
    [request] = receiver.wait()
    assert json.loads(request.body)["usage"] == usage
    assert next(state for state in metered.request("GET", "/runs").json() if state["id"] == run)["usage"] == usage
    assert f"cpuMs={usage['cpuMs']} memoryPeakBytes={usage['memoryPeakBytes']}" in metered.log()


def test_runs_that_are_killed_have_it_too(metered: Daemon) -> None:
    timeout = metered.run(entrypoint="while :; do :; done", timeout=2000)  # of which a busy machine gives it a part
    assert timeout["reason"] == "timeout"
    assert timeout["usage"]["cpuMs"] >= 300
    run = metered.detach(entrypoint="while :; do :; done")
    metered.wait_for(run, lambda state: "startedAt" in state)
    metered.request("POST", f"/runs/{run}/cancel")
    assert "cpuMs" in metered.wait(run)["usage"]


@pytest.mark.long
def test_an_adopted_run_is_counted_from_its_start(daemon: DaemonFactory) -> None:
    daemon_ = daemon()
    run = daemon_.detach(entrypoint=BURN_ONE % (400) + "; sleep 3; " + BURN_ONE % (800))
    daemon_.wait_for(run, lambda state: state["logs"])
    daemon_.kill()
    daemon_.start()
    other = daemon_.run(entrypoint="true")  # which must have a slot of its own
    state = daemon_.wait(run)
    told = max(map(int, state["logs"])) / 1e6
    assert told - 10 <= state["usage"]["cpuMs"] <= told * 1.03 + 10 + COLD_MS
    assert "memoryPeakBytes" in state["usage"]
    assert other["usage"]["cpuMs"] <= 10 + COLD_MS


@pytest.mark.long
def test_adopted_runs_keep_their_limit_of_cpu(daemon: DaemonFactory) -> None:
    daemon_ = daemon()
    run = daemon_.detach(entrypoint="echo begun; sleep 2; while :; do :; done", cpuTime=700)
    daemon_.wait_for(run, lambda state: state["logs"])
    daemon_.kill()
    daemon_.start()
    state = daemon_.wait(run)
    assert (state["reason"], 700 <= state["usage"]["cpuMs"] <= 900) == ("cpu_limit", True)


# ---------------------------------------------------------------- Out of memory

OOM_CHILD = "tail /dev/zero; exit 3"


def test_every_kill_for_want_of_memory_is_told(metered: Daemon) -> None:
    with busy(), ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda _: metered.run(entrypoint=OOM_CHILD, memory="20m"), range(4)))
    assert [(state["reason"], state.get("oomKilled"), state["exitCode"]) for state in states] == [("oom", True, 3)] * 4


def test_memory_that_suffices_is_no_want(metered: Daemon) -> None:
    """Pages of files fill the limit, and are given back."""
    state = metered.run(entrypoint="dd if=/dev/zero of=big bs=1M count=60; exit 3", memory="20m")
    assert (state["reason"], state.get("oomKilled"), state["exitCode"]) == ("exited", None, 3)
    assert state["usage"]["memoryPeakBytes"] <= 21 * MIB


# ---------------------------------------------------------------- cpuTime


@pytest.mark.alone("judges how soon a kill comes")
@pytest.mark.parametrize(("cpus", "loops"), [(1, 1), pytest.param(0.5, 1, marks=pytest.mark.long), (2, 3)])
def test_cpu_time_is_kept_to(daemon: DaemonFactory, cpus: float, loops: int) -> None:
    lightrun_ = daemon("--cpus", "2")
    burn = "while :; do :; done & " * (loops - 1) + "echo begun; while :; do :; done"
    state = lightrun_.run(entrypoint=burn, cpuTime=600, cpus=cpus)
    assert (state["status"], state["reason"], state["exitCode"]) == ("failed", "cpu_limit", 137)
    assert (state["error"], state["logs"]) == ("killed after its 600 ms of CPU time", ["begun"])
    assert 600 <= state["usage"]["cpuMs"] <= 600 + 100 * cpus


@pytest.mark.alone("judges how soon a kill comes")
def test_cpu_time_of_many_processes(metered: Daemon) -> None:
    fork = "while :; do (i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done); done"
    state = metered.run(entrypoint=fork, cpuTime=500, extract=["out"], extractOn="exit")
    assert (state["reason"], state["extracted"]) == ("cpu_limit", [{"from": "out", "status": "missing"}])
    assert 500 <= state["usage"]["cpuMs"] <= 600


def test_a_limit_of_cpu_leaves_what_was_asked_for(metered: Daemon) -> None:
    state = metered.run(entrypoint="echo x > out; while :; do :; done", cpuTime=300, extract=["out"], extractOn="exit")
    assert (state["reason"], state["artifacts"]) == ("cpu_limit", [{"path": "out", "bytes": 2, "type": "file"}])


@pytest.mark.parametrize("value", [0, -1, 3_600_001, 1.5, "10s", True, None])
def test_what_is_no_cpu_time(metered: Daemon, value: Any) -> None:
    response = metered.request("POST", "/run", json={"image": IMAGE, "cpuTime": value})
    assert (response.status, response.json()["details"][0]["path"]) == (400, ["cpuTime"])


def test_openapi_tells_that_it_can_be_had(metered: Daemon) -> None:
    schema = metered.request("GET", "/openapi.json").json()["components"]["schemas"]["RunRequest"]["properties"]["cpuTime"]
    assert (schema["minimum"], schema["maximum"], "not" in schema) == (1, 3_600_000, False)


def test_a_remote_engine_has_no_figures(daemon: DaemonFactory) -> None:
    with contextlib.closing(Relay(socket.create_server(("127.0.0.1", 0)))) as relay:
        remote = daemon("--docker-host", relay.url)
        state = remote.run(entrypoint=OOM_CHILD, memory="20m")
        assert "usage" not in state
        assert "usage" not in remote.request("GET", "/health").json()
        response = remote.request("POST", "/run", json={"image": IMAGE, "cpuTime": 1000})
        said = "cannot be kept to here: lightrun does not see the cgroups of its engine"
        assert (response.status, response.json()["details"]) == (400, [{"path": ["cpuTime"], "message": said}])
        schema = remote.request("GET", "/openapi.json").json()["components"]["schemas"]["RunRequest"]["properties"]
        assert schema["cpuTime"]["not"] == {}
        remote.stop()


# ---------------------------------------------------------------- Limits that are not there


@contextlib.contextmanager
def engine_without(what: str, folder: Path) -> Iterator[str]:
    """An engine that says so of itself, as a rootless one does."""
    said, instead = (f'"{what}":{value}'.encode() for value in ("true", "null"))
    with contextlib.closing(Relay(unix_socket(str(folder / "engine")), said, instead)) as relay:
        yield relay.url


@pytest.mark.parametrize(("what", "option"), [("MemoryLimit", "memory"), ("CpuCfsQuota", "cpus"), ("PidsLimit", "pids")])
def test_an_engine_that_does_not_limit(daemon: DaemonFactory, tmp_path: Path, what: str, option: str) -> None:
    with engine_without(what, tmp_path) as url:
        lightrun_ = daemon("--docker-host", url, start=False).start(wait=False)
        assert lightrun_.process.wait(20) == 1
    assert lightrun_.log().splitlines() == [f"lightrun: --{option}: the engine cannot limit that (its {what} is false)"]


def test_an_engine_that_does_not_limit_swap(daemon: DaemonFactory, tmp_path: Path) -> None:
    with engine_without("SwapLimit", tmp_path) as url:
        lightrun_ = daemon("--docker-host", url)
        assert "the engine does not limit swap" in lightrun_.log()
        lightrun_.stop()


@pytest.mark.parametrize(("source", "name"), [("-", b"plain"), ("none", "a\u2028b".encode()), ("none", b"\xff\x85")])
def test_mounts_of_any_name_hide_no_cgroups(tmp_path: Path, source: str, name: bytes) -> None:
    """In a mount namespace of its own, which nobody else sees."""
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    script = 'mount -t tmpfs -- "$1" "$2" && exec "$3" -c "import lightrun; print(lightrun.cgroup_mounts())"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", source, str(folder), sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{lightrun.cgroup_mounts()}\n", done.stderr
    assert lightrun.cgroup_mounts()


# ---------------------------------------------------------------- Slots


def state_of(daemon: Daemon) -> str:
    """The id of its state dir."""
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "lightrun.db")) as database:
        return str(database.execute("SELECT value FROM meta WHERE name = 'state'").fetchone()[0])


def slots(state_id: str) -> set[str]:
    """The cgroups of a state dir, in all hierarchies."""
    roots = {path / "lightrun" / state_id[:12] for path in set(lightrun.cgroup_mounts().values())}
    return {f"{path.relative_to(root)}" for root in roots for path in root.rglob("*") if path.is_dir()}


def test_nothing_is_left_but_the_slots(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    lightrun_ = daemon("--max-concurrent", "3")
    state_id = state_of(lightrun_)
    runs = [lightrun_.detach(entrypoint="true") for _ in range(6)]
    for run in runs:
        lightrun_.wait(run)
    assert slots(state_id) == {"0", "1", "2"}
    running = lightrun_.detach(entrypoint=f"{HELD}; echo done")
    lightrun_.wait_for(running, lambda state: "startedAt" in state)
    lightrun_.kill()
    lightrun_.start()
    release(engine, running)
    assert lightrun_.wait(running)["logs"] == ["done"]
    assert {name for name in slots(state_id) if "/" not in name} <= {"0", "1", "2"}
    assert eventually(lambda: not any("/" in name for name in slots(state_id)))
    lightrun_.stop()
    assert slots(state_id) == set()


def test_the_slot_of_a_container_that_the_keeper_removes_is_given_back(daemon: DaemonFactory) -> None:
    with contextlib.closing(Proxy()) as proxy:
        lightrun_ = daemon("--docker-host", proxy.host)
        proxy.inject("remove", "before", "500")
        lightrun_.run(entrypoint="true")
        assert len(lightrun_.containers()) == 1
        proxy.mend()
        assert eventually(lambda: not lightrun_.containers())
        lightrun_.run(entrypoint="true")
        assert slots(state_of(lightrun_)) == {"0"}
        lightrun_.stop()


@pytest.mark.long
def test_a_slot_waits_for_the_run_in_it(daemon: DaemonFactory) -> None:
    lightrun_ = daemon()
    run = lightrun_.detach(entrypoint=BURN_ONE % (300) + "; sleep 2")
    lightrun_.wait_for(run, lambda state: state["logs"])
    lightrun_.stop()
    assert "0" in slots(state_of(lightrun_))
    time.sleep(2)  # it ends without us
    lightrun_.start()
    state = lightrun_.wait(run)
    assert told_ms(state) - 10 <= state["usage"]["cpuMs"] <= told_ms(state) * 1.03 + 10 + COLD_MS


def test_version_2_counts_cpu() -> None:
    """The figures of a cgroup of version 2, which this machine's engine does not use, of a process that is put into it."""
    root = lightrun.cgroup_mounts().get("")
    if root is None or os.geteuid() != 0:
        pytest.skip("a hierarchy of cgroup version 2 that may be written to is missing")
    folder = root / f"lightrun-test-{os.getpid()}"
    folder.mkdir()
    try:
        slot = lightrun.Slot("", folder, folder, {"driver": "cgroupfs", "slot": 0})
        burn = 'echo $$ > "$1/cgroup.procs"; while read used rest < /proc/$$/schedstat && [ $used -lt 300000000 ]; do :; done'
        slot.begin()
        for _ in range(2):  # the second is counted by itself
            subprocess.run(["sh", "-c", burn, "sh", folder], check=True)
            assert 290e6 <= (slot.cpu_time() or 0) <= 360e6
            assert slot.usage().keys() <= {"cpuMs", "memoryPeakBytes"}
            slot.begin()
        assert slot.cpu_time() == 0
        slot.end()
    finally:
        folder.rmdir()


@pytest.mark.parametrize(
    ("driver", "number", "path"),
    [("cgroupfs", (3,), "lightrun/0123/3"), ("cgroupfs", (), "lightrun/0123"),
     ("systemd", (3,), "lightrun.slice/lightrun-0123.slice/lightrun-0123-3.slice"),
     ("systemd", (), "lightrun.slice/lightrun-0123.slice")],
)  # fmt: skip
def test_where_slots_are(driver: str, number: tuple[int, ...], path: str) -> None:
    """As systemd.slice(5) has it: a dash in a name is a step down."""
    slots_ = object.__new__(lightrun.Slots)
    slots_._names = ("lightrun", "0123")
    assert slots_._path(driver, *number) == Path(path)


# ---------------------------------------------------------------- outputLimit and splitLogs


@pytest.mark.parametrize("limit", [0, 1, 1000, 100_000])
def test_output_over_its_limit(metered: Daemon, limit: int) -> None:
    state = metered.run(entrypoint="while :; do echo 0123456789; done", outputLimit=limit, extract=["x"], extractOn="exit")
    assert (state["status"], state["reason"], state["exitCode"]) == ("failed", "output_limit", 137)
    assert (state["error"], state["logsTruncated"]) == (f"killed after its {limit} bytes of output", True)
    assert state["extracted"] == [{"from": "x", "status": "missing"}]
    kept = metered.request("GET", f"/runs/{state['id']}/logs").body
    assert kept == (b"0123456789\n" * (limit // 11 + 1))[:limit]


def test_output_up_to_its_limit(metered: Daemon) -> None:
    state = metered.run(entrypoint="printf 12345; printf 67890 >&2", outputLimit=10, splitLogs=True)
    assert (state["reason"], state["stdout"], state["stderr"], state["logsTruncated"]) == ("exited", "12345", "67890", False)
    over = metered.run(entrypoint="printf 12345; printf 678901 >&2; sleep 30", outputLimit=10, splitLogs=True)
    assert over["reason"] == "output_limit"
    assert len(over["stdout"] + over["stderr"]) == 10


def test_followers_get_what_the_limit_allows(metered: Daemon) -> None:
    run = metered.detach(entrypoint="sleep 1; while :; do echo 0123456789; done", outputLimit=50_000)
    metered.wait_for(run, lambda state: "startedAt" in state)
    followed = metered.request("GET", f"/runs/{run}/logs?follow=true").body
    assert followed == (b"0123456789\n" * 5000)[:50_000]
    assert metered.wait(run)["reason"] == "output_limit"


@pytest.mark.long
def test_a_limit_of_output_survives_a_kill(daemon: DaemonFactory) -> None:
    lightrun_ = daemon()
    run = lightrun_.detach(entrypoint="echo begun; sleep 3; while :; do echo 0123456789; done", outputLimit=1000)
    lightrun_.wait_for(run, lambda state: state["logs"])
    lightrun_.kill()
    lightrun_.start()
    state = lightrun_.wait(run)
    assert state["reason"] == "output_limit"
    assert lightrun_.request("GET", f"/runs/{run}/logs").body == (b"begun\n" + b"0123456789\n" * 100)[:1000]


def test_a_cancel_overrides_a_limit(metered: Daemon) -> None:
    """A run that is over a limit and copied out is dropped all the same."""
    fill = "dd if=/dev/zero of=big bs=1M count=400 2>&-; echo over; while :; do :; done"
    run = metered.detach(entrypoint=fill, outputLimit=1, extract=["big"], extractOn="exit", timeout=60_000)
    metered.wait_for(run, lambda state: state.get("phase") in {"extracting", None}, timeout=60)
    metered.request("POST", f"/runs/{run}/cancel")
    state = metered.wait(run)
    if state["extracted"][0]["status"] != "ok":  # else it was quicker
        assert "artifacts" not in state


def test_split_logs(metered: Daemon) -> None:
    run = metered.detach(entrypoint=r"printf 'a\nb'; printf '\377e' >&2; sleep 1", splitLogs=True)
    metered.wait_for(run, lambda state: state.get("stdout") == "a\nb" and state.get("stderr") == "\ufffde")
    state = metered.wait(run)
    assert (state["stdout"], state["stderr"], "logs" in state, state["logsTruncated"]) == ("a\nb", "\ufffde", False, False)
    assert "splitLogs" not in state
    assert "logs" not in metered.request("GET", "/runs").json()[0]


# ---------------------------------------------------------------- fileSize


def test_a_file_over_its_size(daemon: DaemonFactory) -> None:
    lightrun_ = daemon("--file-size", "2m")
    write = "dd if=/dev/zero of=big bs=1M count={}"
    assert lightrun_.run(entrypoint=write.format(2))["exitCode"] == 0
    assert lightrun_.run(entrypoint=write.format(3))["exitCode"] == 153  # 128 and SIGXFSZ
    assert lightrun_.run(entrypoint=write.format(2), fileSize="1m")["exitCode"] == 153
    for more in ("3m", 2 * MIB + 1):
        response = lightrun_.request("POST", "/run", json={"image": IMAGE, "fileSize": more})
        assert (response.status, response.json()["details"][0]["path"]) == (400, ["fileSize"])


def test_core_dumps_are_off(metered: Daemon) -> None:
    state = metered.run(entrypoint="ulimit -Hc; ulimit -Sc; ulimit -f; kill -SEGV $$", extract=["core"], extractOn="exit")
    assert (state["logs"], state["exitCode"]) == (["0", "0", "unlimited"], 128 + signal.SIGSEGV)
    assert state["extracted"] == [{"from": "core", "status": "missing"}]
    assert metered.run(entrypoint="ulimit -f", fileSize=5 * 512)["logs"] == ["5"]
