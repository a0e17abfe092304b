"""Hostile processes and images: each ends as SPEC 2 says, and neither the daemon nor another run suffers for it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest

from conftest import LABEL_RUN, LABEL_STATE, Daemon, DaemonFactory, eventually
from engine import DEFAULT_HOST, ENGINE_PIDFILE, IMAGE, EngineApi, engine_host
from images import make_image, remove_image

MIB = 1 << 20
# What "at once" means on a machine with two busy cores, where an idle daemon takes 2 to 20 ms.
AT_ONCE_SECONDS = 3.0
ENGINE_CONFIGURATION = Path("/etc/docker/daemon.json")
# gVisor as a run can do with it, and as it is by itself.
RUNSC, RUNSC_ALONE = "runsc", "runsc-overlaid"

MakeImage = Callable[..., str]


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory) -> Daemon:
    """A daemon whose runs may have 50 processes."""
    return module_daemon("--pids", "50")


@pytest.fixture
def image(engine_api: EngineApi) -> Iterator[MakeImage]:
    """A function that makes images of Dockerfile instructions; they go with the test."""
    made: list[str] = []

    def make(*instructions: str) -> str:
        made.append(make_image(engine_api, f"lightrun/hostile-{uuid.uuid4().hex}:latest", *instructions))
        return made[-1]

    yield make
    for name in made:
        remove_image(engine_api, name)


def seconds_of(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def outcome(state: dict[str, Any]) -> tuple[str, str, int | None]:
    """Status, reason and exit code."""
    return state["status"], state["reason"], state.get("exitCode")


# ---------------------------------------------------------------- Processes


@pytest.mark.alone("would spoil what others measure")
def test_a_process_bomb_hurts_nobody_else(lightrun: Daemon, engine: docker.APIClient) -> None:
    # What cannot fork ends, and so makes room for what can: this stays at the limit.
    bomb = "b() { b | b; b; }; (while :; do (b); done) 2> /dev/null & exec sleep 100"
    run = lightrun.detach(entrypoint=bomb, timeout=5000)
    lightrun.wait_for(run, lambda state: state.get("phase") == "running")
    assert eventually(lambda: len(engine.top(f"lightrun-{run}")["Processes"]) > 40, 3), "the bomb did not go off"
    assert outcome(lightrun.run(entrypoint="sleep 0.1 & wait; echo fine")) == ("succeeded", "exited", 0)
    assert seconds_of(lambda: lightrun.request("GET", "/health")) < AT_ONCE_SECONDS
    assert eventually(lambda: len(engine.top(f"lightrun-{run}")["Processes"]) > 25, 3), "the bomb ended early"
    assert outcome(lightrun.wait(run)) == ("failed", "timeout", 137)
    assert eventually(lambda: not lightrun.containers())


@pytest.mark.long
def test_tiny_pieces_of_two_streams_cost_no_memory(daemon: DaemonFactory) -> None:
    lightrun = daemon("--log-limit", "64k")
    lightrun.run(entrypoint="echo warm; echo up >&2")
    process = psutil.Process(lightrun.pid)
    before, most, slowest = process.memory_info().rss, 0, 0.0
    run = lightrun.detach(entrypoint="while :; do printf a; printf b >&2; done", cpuTime=3000)
    while lightrun.state(run)["status"] == "running":
        slowest = max(slowest, seconds_of(lambda: lightrun.state(run)), seconds_of(lambda: lightrun.request("GET", "/health")))
        most = max(most, process.memory_info().rss)
        time.sleep(0.2)
    state = lightrun.state(run)
    assert outcome(state) == ("failed", "cpu_limit", 137)
    assert state["logsTruncated"], "the run did not write enough to tell"
    assert {line[0] + str(set(line)) for line in state["logs"]} <= {"a{'a'}", "b{'b'}"}
    assert slowest < AT_ONCE_SECONDS
    assert most - before < 32 * MIB, f"{(most - before) / MIB:.1f} MiB more"


def test_a_run_that_closes_its_output_goes_on(lightrun: Daemon) -> None:
    script = "echo before; exec > /dev/null 2>&1 < /dev/null; exec 1>&- 2>&-; sleep 1; echo x > f; exit 3"
    state = lightrun.run(entrypoint=script, extract=["f"], extractOn="exit")
    assert (*outcome(state), state["logs"]) == ("failed", "exited", 3, ["before"])
    assert state["timings"]["run"] >= 700  # a busy engine is late to say when it started
    assert state["extracted"][0]["status"] == "ok"


def test_an_end_whose_children_hold_the_output_is_an_end(lightrun: Daemon) -> None:
    state = lightrun.run(entrypoint="setsid sleep 100 & echo parent", timeout=30_000)
    assert (*outcome(state), state["logs"]) == ("succeeded", "exited", 0, ["parent"])


def test_a_run_that_ignores_signals_is_killed(lightrun: Daemon) -> None:
    script = "trap '' TERM INT HUP QUIT USR1; echo ready; while :; do sleep 1; done"
    run = lightrun.detach(entrypoint=script)
    lightrun.wait_for(run, lambda state: state.get("logs") == ["ready"])
    assert lightrun.request("POST", f"/runs/{run}/stop", json={"grace": 300}).status == 204
    assert outcome(lightrun.wait(run, 15)) == ("failed", "stopped", 137)


def test_stdin_that_is_never_read_holds_up_no_end(lightrun: Daemon) -> None:
    text, threads = "x" * (3 * MIB), psutil.Process(lightrun.pid).num_threads
    before = threads()
    assert outcome(lightrun.run(stdin=text, entrypoint=["sleep", "100"], timeout=500)) == ("failed", "timeout", 137)
    run = lightrun.detach(stdin=text, entrypoint="echo ready; sleep 100")
    lightrun.wait_for(run, lambda state: state.get("logs") == ["ready"])
    assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
    assert lightrun.wait(run, 15)["reason"] == "cancelled"
    assert eventually(lambda: threads() <= before), "a thread that feeds stdin is left"


# ---------------------------------------------------------------- Images


def test_an_entrypoint_that_is_missing(lightrun: Daemon, image: MakeImage) -> None:
    name = image('ENTRYPOINT ["/no/such/program"]')
    assert outcome(lightrun.run(image=name)) == ("failed", "exited", 127)
    assert lightrun.run(image=name, entrypoint="echo its own")["logs"] == ["its own"]


@pytest.mark.parametrize("user", ["nobody-knows", "app:no-group", "-1"])
def test_a_user_that_is_unknown(lightrun: Daemon, image: MakeImage, user: str) -> None:
    state = lightrun.run(image=image(f"USER {user}"), files={"f": "x"}, entrypoint="cat f")
    assert outcome(state) == ("failed", "start_failed", None)
    assert state["error"]
    assert eventually(lambda: not lightrun.containers())


def test_an_images_health_check_never_runs(lightrun: Daemon, image: MakeImage, engine_api: EngineApi) -> None:
    name = image("HEALTHCHECK --interval=100ms --timeout=1s CMD touch /checked")
    assert (engine_api.inspect_image(name) or {})["Config"]["Healthcheck"]["Test"] == ["CMD-SHELL", "touch /checked"]
    assert outcome(lightrun.run(image=name, entrypoint="sleep 1.5; test ! -e /checked")) == ("succeeded", "exited", 0)


@pytest.mark.parametrize("user", ["root", "1000"])
def test_a_volume_at_the_workdir(lightrun: Daemon, image: MakeImage, engine: docker.APIClient, user: str) -> None:
    run = lightrun.detach(
        image=image("VOLUME /app", f"USER {user}"), files={"f": "in", "d/g": "deep"}, extract=["."],
        entrypoint="cat f d/g; echo new > new; echo more >> f; echo; sleep 1",
    )  # fmt: skip
    lightrun.wait_for(run, lambda state: state.get("logs") == ["indeep"])
    (volume,) = engine.inspect_container(f"lightrun-{run}")["Mounts"]
    state = lightrun.wait(run)
    assert outcome(state) == ("succeeded", "exited", 0)
    assert [(entry["path"], entry["bytes"]) for entry in state["artifacts"]] == [("d", 0), ("d/g", 4), ("f", 7), ("new", 4)]
    assert eventually(lambda: not engine.volumes(filters={"name": volume["Name"]})["Volumes"])


@pytest.fixture
def stop_signal_image(engine: docker.APIClient, engine_api: EngineApi) -> Iterator[str]:
    """An image that wants to be stopped by SIGKILL, which only a commit can make."""
    container = engine.create_container(IMAGE, ["true"])["Id"]
    repository = f"lightrun/hostile-{uuid.uuid4().hex}"
    try:
        engine.commit(container, repository, "latest", conf={"StopSignal": "SIGKILL"})
    finally:
        engine.remove_container(container)
    yield f"{repository}:latest"
    remove_image(engine_api, f"{repository}:latest")


def test_an_images_stop_signal_is_not_ours(lightrun: Daemon, stop_signal_image: str, engine_api: EngineApi) -> None:
    assert (engine_api.inspect_image(stop_signal_image) or {})["Config"]["StopSignal"] == "SIGKILL"
    script = "trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    run = lightrun.detach(image=stop_signal_image, entrypoint=script)
    lightrun.wait_for(run, lambda state: state.get("logs") == ["ready"])
    assert lightrun.request("POST", f"/runs/{run}/stop").status == 204
    state = lightrun.wait(run)
    assert (*outcome(state), state["logs"]) == ("failed", "stopped", 7, ["ready", "term"])


def test_an_empty_path(lightrun: Daemon, image: MakeImage) -> None:
    name = image("ENV PATH=")
    state = lightrun.run(image=name, entrypoint=["/bin/echo", "found"])
    assert (*outcome(state), state["logs"]) == ("succeeded", "exited", 0, ["found"])
    assert lightrun.run(image=name, entrypoint="echo x")["reason"] in {"exited", "start_failed"}


def test_the_workdir_is_the_requests(lightrun: Daemon, image: MakeImage) -> None:
    name = image("WORKDIR /proc/self/cwd/../../etc")
    assert lightrun.run(image=name, files={"f": "x"}, entrypoint="pwd; ls")["logs"] == ["/app", "f"]
    assert lightrun.run(image=name, entrypoint="pwd")["logs"] == ["/app"]


# ---------------------------------------------------------------- Labels


def test_a_strangers_container_is_never_removed(daemon: DaemonFactory, image: MakeImage, engine: docker.APIClient) -> None:
    lightrun = daemon()
    run = lightrun.detach(entrypoint="sleep 100")
    lightrun.wait_for(run, lambda state: state.get("phase") == "running")
    own = engine.inspect_container(f"lightrun-{run}")["Config"]["Labels"]
    with contextlib.ExitStack() as stack:
        name = image(f'LABEL "{LABEL_STATE}"="{own[LABEL_STATE]}" "{LABEL_RUN}"="{run}"')
        strangers = []
        for number, run_id in enumerate((run, str(uuid.uuid4()), "", "../x")):
            labels = {**own, LABEL_RUN: run_id} if number else {}  # the first has them from its image alone
            called = f"stranger-{uuid.uuid4().hex}"
            strangers.append(engine.create_container(name, ["sleep", "1000"], name=called, labels=labels)["Id"])
            stack.callback(engine.remove_container, strangers[-1], force=True)
            if number % 2:
                engine.start(strangers[-1])
        assert {entry["Id"] for entry in lightrun.containers()} > set(strangers)
        assert lightrun.run(image=name, entrypoint="echo ran")["logs"] == ["ran"]  # that one is ours, and goes
        lightrun.kill()
        lightrun.start()
        lightrun.stop()
        lightrun.start()
        assert lightrun.state(run)["status"] == "running"
        assert eventually(lambda: {entry["Id"] for entry in lightrun.containers()} - set(strangers))
        assert lightrun.request("POST", f"/runs/{run}/cancel").status == 204
        assert lightrun.wait(run)["reason"] == "cancelled"
        assert eventually(lambda: {entry["Id"] for entry in lightrun.containers()} == set(strangers))
        assert lightrun.request("DELETE", f"/runs/{run}").status == 204
        time.sleep(1)  # what a daemon would still do by itself
        assert [engine.inspect_container(container)["State"]["Running"] for container in strangers] == [False, True] * 2


# ---------------------------------------------------------------- gVisor


@pytest.fixture(scope="module")
def runsc(engine: docker.APIClient) -> Iterator[str]:
    """The runtime runsc, which the machine's engine knows for as long as the module runs."""
    ours = engine_host() == DEFAULT_HOST and ENGINE_PIDFILE.exists()
    if not ours and not _knows_runsc(engine):
        pytest.skip(f"not the engine of {ENGINE_PIDFILE}: it cannot be told of runsc")
    with contextlib.ExitStack() as stack:
        if ours:
            lock = stack.enter_context(ENGINE_PIDFILE.open())
            fcntl.flock(lock, fcntl.LOCK_EX)  # another session may do the same
        if _knows_runsc(engine):
            yield RUNSC
            return
        program = shutil.which("runsc")
        if not program:
            pytest.skip("runsc is missing: apt-get install runsc")
        if os.geteuid() != 0:
            pytest.skip("root is missing, to tell the engine of runsc")
        before = ENGINE_CONFIGURATION.read_text() if ENGINE_CONFIGURATION.exists() else None
        configuration = json.loads(before or "{}")
        runtimes = configuration.get("runtimes", {})
        # Debian's runsc takes every network namespace of a newer kernel for the host's, and refuses; without one it works.
        args = ["--network=none"]
        own = {
            RUNSC: {"path": program, "runtimeArgs": [*args, "--overlay2=none"]},
            RUNSC_ALONE: {"path": program, "runtimeArgs": args},
        }
        try:
            _configure(engine, {**configuration, "runtimes": {**runtimes, **own}}, known=True)
            yield RUNSC
        finally:
            try:  # An engine forgets a runtime only when it is given others.
                _configure(engine, {**configuration, "runtimes": runtimes}, known=False)
            finally:
                if before is None:
                    ENGINE_CONFIGURATION.unlink()
                else:
                    ENGINE_CONFIGURATION.write_text(before)


def _knows_runsc(engine: docker.APIClient) -> bool:
    return RUNSC in engine.info()["Runtimes"]


def _configure(engine: docker.APIClient, configuration: dict[str, Any], *, known: bool) -> None:
    """Have the engine read its configuration again, which stops nothing."""
    ENGINE_CONFIGURATION.parent.mkdir(exist_ok=True)
    ENGINE_CONFIGURATION.write_text(json.dumps(configuration))
    os.kill(int(ENGINE_PIDFILE.read_text()), signal.SIGHUP)
    assert eventually(lambda: _knows_runsc(engine) is known), "the engine took no notice"


@pytest.fixture(scope="module")
def gvisor(module_daemon: DaemonFactory, runsc: str) -> Daemon:
    """A daemon whose runs are under gVisor."""
    lightrun = module_daemon("--runtime", runsc)
    state = lightrun.run(entrypoint="dmesg | head -n 5", network="none")
    if state["reason"] == "start_failed":
        pytest.skip(f"a kernel or cgroups that runsc can work with are missing: {state['error']}")
    assert "gVisor" in "".join(state["logs"])
    assert "--overlay2" not in lightrun.log()
    return lightrun


def test_gvisor_that_keeps_files_to_itself_is_warned_of(daemon: DaemonFactory, runsc: str, engine: docker.APIClient) -> None:
    if RUNSC_ALONE not in engine.info()["Runtimes"]:
        pytest.skip(f"a runtime {RUNSC_ALONE}, gVisor without --overlay2=none, is missing in this engine")
    warning = f'runtime {RUNSC_ALONE}: files that a run has changed may be kept old, or not at all; add "--overlay2=none"'
    assert warning in daemon("--runtime", RUNSC_ALONE).log()


def test_gvisor_files_go_in_and_come_out(gvisor: Daemon) -> None:
    content = {f"d/{number}": f"{number}\n" for number in range(50)}
    state = gvisor.run(
        files={**content, "in": "in"}, stdin="from stdin", extract=["/out", "in"],
        entrypoint="cat in -; mkdir /out; cp -r d /out; ln -s /etc/passwd /out/link; mkfifo /out/pipe",
    )  # fmt: skip
    assert (*outcome(state), state["logs"]) == ("succeeded", "exited", 0, ["infrom stdin"])
    out, single = state["extracted"]
    assert (out["status"], out["bytes"], single["status"]) == ("ok", sum(map(len, content.values())), "ok"), state["extracted"]
    kept = gvisor.state_dir / "artifacts" / state["id"]
    assert {name: (kept / name).read_text() for name in content} == content


@pytest.mark.long
def test_gvisor_ends(gvisor: Daemon) -> None:
    assert outcome(gvisor.run(entrypoint="exit 3")) == ("failed", "exited", 3)
    assert outcome(gvisor.run(entrypoint=["no-such-program"])) == ("failed", "exited", 127)
    assert outcome(gvisor.run(entrypoint="sleep 100", timeout=1500)) == ("failed", "timeout", 137)
    run = gvisor.detach(entrypoint="trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done")
    gvisor.wait_for(run, lambda state: state.get("logs") == ["ready"])
    assert gvisor.request("POST", f"/runs/{run}/stop").status == 204
    assert outcome(gvisor.wait(run)) == ("failed", "stopped", 7)


def test_gvisor_out_of_memory(gvisor: Daemon) -> None:
    state = gvisor.run(entrypoint="dd if=/dev/zero of=/dev/null bs=200M count=1", memory="64m", timeout=60_000)
    assert outcome(state)[:2] == ("failed", "oom")
