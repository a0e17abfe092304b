"""Warm containers: a run in one sees the same world as a cold one, and none is left behind."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import math
import re
import shutil
import subprocess
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest

import lightrun
from conftest import ROOT, Daemon, DaemonFactory, Receiver, eventually, longer
from engine import IMAGE, EngineApi, PrivateEngine, engine_host
from images import Registry, make_image
from relay import Relay, unix_socket
from soak import Counter
from test_files import run as upload
from test_uploads import member, tar

COMMAND_IMAGE = "lightrun/busybox-command:latest"
VOLUME_IMAGE = "lightrun/busybox-warm-volume:latest"


@pytest.fixture(scope="session")
def pyz() -> Path:
    """Instead of the zip: the daemon that can be told where to die."""
    return ROOT / "tests/launcher.py"


# ---------------------------------------------------------------- The shim


@pytest.mark.parametrize(("name", "tools"), [("x86_64", ""), ("aarch64", "aarch64-linux-gnu-")])
def test_the_code_is_what_its_source_says(tmp_path: Path, name: str, tools: str) -> None:
    machine = lightrun.MACHINES[name]
    (tmp_path / "shim.s").write_text(machine.source + "\n")
    subprocess.run([f"{tools}as", "-o", tmp_path / "shim.o", tmp_path / "shim.s"], check=True)
    subprocess.run([f"{tools}objcopy", "-O", "binary", "-j", ".text", tmp_path / "shim.o", tmp_path / "shim"], check=True)
    assert (tmp_path / "shim").read_bytes().hex() == machine.code
    instructions = [line for line in machine.source.splitlines() if re.match(r"(\w+:)?\s+[a-z]", line) and ".intel" not in line]
    assert all("#" in line or "//" in line for line in instructions)


def test_the_shim_is_a_program() -> None:
    """`file` and the kernel take it for what it is."""
    for machine in lightrun.MACHINES.values():
        program = lightrun.shim(machine)
        assert program[:4] == b"\x7fELF"
        assert len(program) < 400


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "a=0", "a=-1", "a=x", "a=101", "=1", "a b=1", "a=1/", "a=1/a b"]
)  # fmt: skip
def test_what_is_no_pool(text: str) -> None:
    with pytest.raises(lightrun.UsageError, match="--warm: must be"):
        lightrun.read_settings({"warm": [text]}, {})


def test_pools_are_bounded_together() -> None:
    assert lightrun.read_settings({"warm": ["a=60", "b=40/none"]}, {}).warm == ("a=60", "b=40/none")
    with pytest.raises(lightrun.UsageError, match="at most 100"):
        lightrun.read_settings({"warm": ["a=60", "b=41"]}, {})


@pytest.mark.parametrize("image", ["Alpine=1", "a=1/host", "a=1/secret"])
def test_a_pool_that_no_request_could_ask_for(daemon: DaemonFactory, image: str) -> None:
    refused = daemon("--warm", image, start=False).start(wait=False)
    assert refused.process.wait(20) == 2
    assert refused.log().startswith("lightrun: --warm")


# ---------------------------------------------------------------- Cold and warm


@pytest.fixture(scope="module")
def command_image(engine_api: EngineApi) -> str:
    """An image with an entrypoint, a command and an environment of its own."""
    lines = (
        'ENTRYPOINT ["sh", "-c", "echo $0 $1 $GREETING; env"]',
        'CMD ["zero", "one two"]',
        "ENV GREETING=hello",
        "ENV PATH=/bin",
    )
    return make_image(engine_api, COMMAND_IMAGE, *lines)


@pytest.fixture(scope="module")
def volume_image(engine_api: EngineApi) -> str:
    """An image whose workdir holds a volume."""
    return make_image(engine_api, VOLUME_IMAGE, "VOLUME /app/data")


@pytest.fixture(scope="module")
def static_image(engine_api: EngineApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image that is one program, without a shell."""
    root = tmp_path_factory.mktemp("static")
    shutil.copy(str(shutil.which("busybox")), root / "cat")
    client = docker.APIClient(engine_host(), version="auto")
    with contextlib.closing(client):
        archive = subprocess.run(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE, check=True).stdout
        client.import_image_from_data(archive, repository="lightrun/static", tag="latest")
        yield "lightrun/static:latest"
        client.remove_image("lightrun/static:latest", force=True)


@pytest.fixture(scope="module")
def pair(
    module_daemon: DaemonFactory, uid_image: str, user_image: str, command_image: str, volume_image: str, static_image: str
) -> tuple[Daemon, Daemon]:
    """A daemon whose runs start cold, and one that has a warm container of each image."""
    images = (uid_image, user_image, command_image, volume_image, static_image)
    pools = [argument for image in images for argument in ("--warm", f"{image}=1/none")]
    warm = module_daemon("--warm", f"{IMAGE}=2/none", *pools)
    return module_daemon(), warm


def waiting(daemon: Daemon) -> list[dict[str, Any]]:
    """The warm containers that wait for a run."""
    return [entry for entry in daemon.containers() if entry["Command"].startswith(lightrun.SHIM) and entry["State"] == "running"]


def run_warm(daemon: Daemon, parts: dict[str, bytes] | None = None, **fields: Any) -> dict[str, Any]:
    """A run in a warm container, as soon as one of that image is there."""
    found = EngineApi().inspect_image(fields.get("image", IMAGE))
    assert found
    image = found["Id"]
    assert eventually(lambda: any(entry["ImageID"] == image for entry in waiting(daemon)), 60)
    for _ in range(50):  # until it is known to the pool as well
        state: dict[str, Any] = upload(daemon, parts, **fields) if parts else daemon.run(**fields)
        if state.get("warm"):
            return state
        time.sleep(0.2)
    raise AssertionError(f"no warm run: {state}\n{daemon.log()}")


def told(daemon: Daemon, state: dict[str, Any]) -> dict[str, Any]:
    """What a run tells, without what differs between any two of them."""
    about: dict[str, Any] = {
        name: state.get(name) for name in ("reason", "exitCode", "oomKilled", "error", "artifacts", "extracted")
    }
    for stream in ("stdout", "stderr"):
        text = daemon.request("GET", f"/runs/{state['id']}/logs?stream={stream}").text
        text = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b", "<container>", text)
        text = re.sub(r"(pipe|socket|mnt|pid|net|ipc|uts|cgroup|user):\[\d+\]", r"\1", text)
        text = re.sub(r"tini \(\d+\)", "tini", text)
        about[stream] = re.sub(r"(?m)^overlay .*$|lightrun/\S+", "<engine>", text)
    return about


BIG = base64.b64encode(bytes(range(256)) * (28 << 10)).decode()
NAMES = "sed 's/ [A-Z].*//'"  # without the times of `ls -l`
LOOK_AROUND = f"find . | sort; cat a/b/c 'ü x'; ls -l . a/b | {NAMES}"
MAKE = "mkdir -p e/f; echo x > e/f/g; ln -s f e/h; echo y > i; chmod +x i"
# One run tells many things, each under its name.
WORLD = {
    "who": "id; umask",
    "environment": r"tr '\0' '\n' < /proc/$$/environ",
    "home": "echo ~ $HOME",
    "the folder": f"pwd; ls -la | {NAMES}; ls -ld / .. | {NAMES}",
    "descriptors": "ls /proc/$$/fd; for n in 0 1 2; do readlink /proc/$$/fd/$n; done",
    "standing": "grep -E '^(Uid|Gid|Groups|Umask|Sig[PBIC]|Shd|Cap|NoNew|Seccomp|Threads|Cpus_|Mems)' /proc/$$/status",
    "standing of a program": "grep -E '^(Sig[PBIC]|Cap|Groups)' /proc/self/status",
    "limits": "cat /proc/$$/limits",
    "mounts": "cut -d' ' -f1-4 /proc/mounts | sort",
    "cgroups": "cut -d: -f2 /proc/self/cgroup",
    "namespaces": "ls /proc/self/ns",
    "the first process": "cat /proc/1/comm",
    "processes": "ls /proc > /tmp/processes; grep -c '^[0-9]' /tmp/processes; rm /tmp/processes",
    "priority": "cat /proc/$$/oom_score_adj /proc/$$/timerslack_ns; cut -d' ' -f17-19 /proc/$$/stat",
    "terminal": "for n in 0 1 2; do test -t $n; echo $?; done; tty",
    "network": "ls /sys/class/net; cat /etc/resolv.conf; hostname | wc -c; cut -f1 /etc/hosts",
    "name": r"cat /proc/$$/comm; tr '\0' '|' < /proc/$$/cmdline",
    "no input": "wc -c",
    "what is refused": "mount -t tmpfs x /mnt; chroot / true; mknod /x c 1 3; echo $?",
}
TELL = "exec 2>&1; " + "; ".join(f"echo '== {name}'; {command}" for name, command in WORLD.items())
PROBES: dict[str, dict[str, Any]] = {
    "the world": {"entrypoint": ["sh", "-c", TELL, "a b", "", "ü", "\n", "$x"],
                  "env": {"B": "1", "A": "two words", "E": "", "Z": "é="}},
    "environment": {"entrypoint": ["cat", "/proc/self/environ"],
                    "env": {"PATH": "/bin:", "HOSTNAME": "h", "C": "c\n", "HOME": "/tmp"}},
    "empty home": {"entrypoint": ["cat", "/proc/self/environ"], "env": {"A": "a", "HOME": "", "B": "b"}},
    "workdir, empty input": {
        "entrypoint": f"pwd; ls -ld . .. ../.. | {NAMES}; readlink /proc/self/fd/0 | cut -d: -f1; wc -c",
        "workdir": "/some/new//./folder/", "stdin": "",
    },
    "input as JSON": {"entrypoint": ["cat"], "input": {"a": [1, None, "ü"]}},
    "3 MB of input": {"entrypoint": "md5sum; wc -c < /dev/null", "stdin": "0123456789abcde\n" * (3 << 16)},
    "3 MB that are not read": {"entrypoint": "sleep 0.2; echo done", "stdin": "0123456789abcde\n" * (3 << 16)},
    "3 MB of which a line is read": {"entrypoint": "read line; echo $line; exit 4", "stdin": "0123456789abcde\n" * (3 << 16)},
    "exit code 255": {"entrypoint": "exit 255"},
    "exit code 125 after input": {"entrypoint": ["sh", "-c", "exit 125"], "stdin": "x"},
    **{f"signal {name}": {"entrypoint": f"kill -{name} $$; sleep 1"} for name in ("KILL", "SEGV")},
    "no program": {"entrypoint": ["nosuch", "x"]},
    "no program at a path": {"entrypoint": ["/no/such"]},
    "a folder for a program": {"entrypoint": ["/tmp"]},
    "a file that is no program": {"entrypoint": ["/etc/passwd"]},
    "a script, files, extract, exit code 3": {
        "entrypoint": ["./s", "1"],
        "files": {
            "s": f"#!/bin/sh\necho $0 $1; cat /proc/$$/comm; {LOOK_AROUND}; {MAKE}; exit 3", "a/b/c": "1", "ü x": "2", "d": "",
        },
        "extract": ["e", "i", "no"], "extractOn": "exit",
    },
    "a script by PATH": {"entrypoint": ["s", "1"], "files": {"s": "#!/bin/sh\necho $0 $1"}, "env": {"PATH": "/bin:/app"}},
    "a script without #!": {"entrypoint": ["./s", "1"], "files": {"s": "echo $0 $1"}},
    "files over the image's": {"entrypoint": f"cat passwd; ls -l passwd | {NAMES}", "workdir": "/etc",
                               "files": {"passwd": "mine"}},
    "2,000 files, and one of 7 MB": {
        "entrypoint": "find . -type f | wc -l; cat $(find . -type f | sort) | md5sum; md5sum big",
        "files": {"big": {"base64": BIG}, **{f"{n % 40}/{n}": f"file {n}" for n in range(2000)}},
    },
    "20 MB of output": {"entrypoint": "i=0; while [ $i -lt 20 ]; do cat block; i=$((i+1)); done | tee /dev/stderr | md5sum",
                        "files": {"block": ("x" * 1000 + "\n") * 1000}},
    "out of memory": {"entrypoint": "tail /dev/zero"},
    "limit of output": {"entrypoint": "yes", "outputLimit": 1000},
    "children": {"entrypoint": "(sleep 60; echo late) & (setsid sleep 60 &) ; (sleep 0.3; echo waited for) & wait $!; echo end"},
    # The shell itself forks but once, before there is a bomb.
    "a bomb": {"entrypoint": "f() { f | f & }; (f) 2>/dev/null & i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo alive"},
}  # fmt: skip


SHORT = {
    "the world", "environment", "3 MB of input", "no program", "a file that is no program", "out of memory", "children",
    "a script, files, extract, exit code 3", "files over the image's", "20 MB of output",
}  # fmt: skip


def probes() -> Iterator[Any]:
    """Each probe of the plain image, and some of the others."""
    for name, fields in PROBES.items():
        yield pytest.param("", fields, id=name, marks=[] if name in SHORT else [pytest.mark.long])
    for image in ("uid_image", "user_image", "volume_image"):
        for name in ("the world", "no program"):
            short = (name, image) == ("the world", "user_image")
            yield pytest.param(image, PROBES[name], id=f"{name}, {image}", marks=[] if short else [pytest.mark.long])
    yield pytest.param("volume_image", {"entrypoint": "echo x > data/y; ls -la data | sed 's/ [A-Z].*//'"}, id="volume")
    yield pytest.param("command_image", {}, id="the image's own command", marks=pytest.mark.long)
    yield pytest.param("command_image", {"env": {"GREETING": "bye", "A": "b"}}, id="the image's own command and variables")
    yield pytest.param("static_image", {"entrypoint": ["/cat", "/etc/hostname", "-"], "stdin": "x"}, id="no shell, input")
    yield pytest.param("static_image", {"entrypoint": "true"}, id="no shell, script")


@pytest.mark.parametrize(("image", "fields"), list(probes()))
def test_the_same_world(request: pytest.FixtureRequest, pair: tuple[Daemon, Daemon], image: str, fields: dict[str, Any]) -> None:
    cold, warm = pair
    body = {**fields, "image": request.getfixturevalue(image) if image else IMAGE}
    first = cold.run(**body)
    assert "warm" not in first
    told_cold, told_warm = told(cold, first), told(warm, run_warm(warm, **body))
    if fields is PROBES["empty home"] and _runc_version() >= (1, 3):  # which puts the home that it finds behind all else
        assert told_cold["stdout"].endswith("\0HOME=/root\0")
        for each in (told_cold, told_warm):
            each["stdout"] = sorted(each["stdout"].split("\0"))
    assert told_warm == told_cold


def test_a_name_that_is_not_utf_8_goes_into_a_folder_of_the_image(pair: tuple[Daemon, Daemon]) -> None:
    parts = {"tar": tar(member("d\udcff/f\udcfe", b"odd"))}
    state = run_warm(pair[1], parts, workdir="/tmp", entrypoint="cat d*/f*")
    assert (state["reason"], state["logs"]) == ("exited", ["odd"]), state


def _runc_version() -> tuple[int, ...]:
    """Of the engine, which need not say it; then it is taken for an old one."""
    components = json.loads(EngineApi().call("GET", "/version")).get("Components") or []
    said = next((component["Version"] for component in components if component["Name"] == "runc"), "")
    return tuple(int(number) for number in re.findall(r"\d+", said)[:2])


@pytest.mark.parametrize("mode", [0o500, *longer(0o700)])
def test_a_tar_says_how_the_workdir_is(pair: tuple[Daemon, Daemon], uid_image: str, mode: int) -> None:
    """For another user than root it is there before, and so it is in a warm container."""
    parts = {"tar": tar(member("./", kind=tarfile.DIRTYPE, mode=mode), member("./a", b"b"))}
    fields = {"image": uid_image, "entrypoint": "stat -c '%a %u %Y' . a; cat a"}
    cold, warm = pair
    state = upload(cold, parts, **fields)
    assert state["logs"][0] == f"{mode:o} 1000 1600000000"
    assert told(warm, run_warm(warm, parts, **fields)) == told(cold, state)


def test_forty_things_are_compared() -> None:
    assert len(PROBES) + len(WORLD) >= 40


def test_a_stop_is_heard(pair: tuple[Daemon, Daemon]) -> None:
    _, warm = pair
    eventually(lambda: waiting(warm))
    fields = {
        **warm.fields,
        "image": IMAGE,
        "entrypoint": "trap 'echo bye; exit 3' TERM; echo begun; while :; do sleep 0.1; done",
    }
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(warm.run, **fields)
        run = eventually(lambda: [each["id"] for each in warm.request("GET", "/runs?status=running").json()])[0]
        warm.wait_for(run, lambda state: state["logs"])
        assert warm.request("POST", f"/runs/{run}/stop").status == 204
        state = answer.result()
    assert (state["reason"], state["exitCode"], state["logs"]) == ("stopped", 3, ["begun", "bye"])


def test_a_client_that_leaves(pair: tuple[Daemon, Daemon]) -> None:
    _, warm = pair
    eventually(lambda: waiting(warm))
    body = json.dumps({"image": IMAGE, "network": "none", "entrypoint": "echo begun; sleep 60"}).encode()
    with warm.connect() as connection:
        connection.sendall(b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
        run = eventually(lambda: [each["id"] for each in warm.request("GET", "/runs?status=running").json()])[0]
        warm.wait_for(run, lambda state: state["logs"])
    assert warm.wait(run)["reason"] == "cancelled"


# ---------------------------------------------------------------- Honest figures


def test_a_warm_run_is_timed_from_its_hand_out(pair: tuple[Daemon, Daemon]) -> None:
    _, warm = pair
    eventually(lambda: waiting(warm))
    time.sleep(1)
    began = time.time()
    state = run_warm(warm, entrypoint="sleep 0.5")
    started = lightrun.parse_timestamp(state["startedAt"])
    assert began - 0.01 <= started
    assert 450 <= state["timings"]["run"] <= state["durationMs"]
    assert state["usage"]["cpuMs"] <= 15
    burnt = run_warm(warm, entrypoint="i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; cat /proc/$$/schedstat")
    told_ms = int(burnt["logs"][0].split()[0]) / 1e6
    assert told_ms - 10 <= burnt["usage"]["cpuMs"] <= told_ms * 1.03 + 15


def test_which_runs_start_cold(pair: tuple[Daemon, Daemon], uid_image: str) -> None:
    """Those that would have made another container, or must survive lightrun with a stdin that is to be written first."""
    _, warm = pair
    for fields in ({"memory": "64m"}, {"cpus": 0.5}, {"pids": 50}, {"fileSize": "1m"}, {"image": uid_image, "workdir": "/new"}):
        eventually(lambda: len(waiting(warm)) >= 7, 60)
        state = warm.run(**{"entrypoint": "true", **fields})
        assert (state["status"], "warm" in state) == ("succeeded", False)
    eventually(lambda: len(waiting(warm)) >= 7, 60)
    state = warm.wait(warm.detach(entrypoint="wc -c", stdin="x" * (lightrun.PIPE_BYTES + 1)))
    assert (state["logs"], "warm" in state) == (["65537"], False)


def test_misses_are_counted_by_what_was_in_the_way(engine: docker.APIClient) -> None:
    settings, state_id = lightrun.Settings(warm=(f"{IMAGE}=1/none",)), uuid.uuid4().hex
    ours = lightrun.Engine(settings, state_id)
    slots = lightrun.Slots(ours, state_id)
    busy = threading.Event()
    pools = lightrun.Pools(settings, ours, lightrun.Layout(), slots, busy.is_set, lambda: None)
    image = ours.image(IMAGE)

    def take(about: lightrun.Image = image, lasting: bool = False, **fields: Any) -> lightrun.Warm | None:
        body = {"image": IMAGE, "network": "none", **fields}
        request = lightrun.RunRequest.parse(json.dumps({name: each for name, each in body.items() if each}).encode(), settings)
        return pools.take(about, request, lasting)

    tried: dict[str, dict[str, Any]] = {
        "image": {"about": dataclasses.replace(image, id="sha256:1"), "image": "lightrun/other", "network": None},
        "network": {"network": None}, "limits": {"memory": "64m"},
        "user": {"about": dataclasses.replace(image, user="1000"), "files": {"a": "b"}},
        "command": {"about": dataclasses.replace(image, command=())},
        "environment": {"about": dataclasses.replace(image, env=("HOME=/x",)), "env": {"HOME": ""}},
        "stdin": {"lasting": True, "stdin": "x" * (lightrun.PIPE_BYTES + 1)}, "empty": {},
    }  # fmt: skip
    for fields in tried.values():
        assert take(**fields) is None
    assert pools.counts == dict.fromkeys(tried, 1)
    assert set(tried) | {"failed"} == set(lightrun.MISSES)
    busy.set()
    pools.start()
    try:
        assert not eventually(take, 4, 0.3), "a pool was filled at the cost of runs"
        busy.clear()
        taken = eventually(lambda: take(stdin="x" * (lightrun.PIPE_BYTES + 1)), 60, 0.3)
        assert taken.pool.image == "docker.io/" + IMAGE
        assert taken.alive
        pools.discard(taken)
    finally:
        pools.stop(time.monotonic() + 10)
        slots.sweep()
    assert not engine.containers(all=True, filters={"label": [f"{lightrun.LABEL_STATE}={state_id}"]})


# ---------------------------------------------------------------- Runs that survive lightrun

SURVIVOR: dict[str, Any] = {
    "entrypoint": "cat; cat a/b; sleep 1; echo end; exit 3", "stdin": "in\n", "files": {"a/b": "file\n"}, "detached": True,
}  # fmt: skip


def full(daemon: Daemon, count: int = 1) -> Daemon:
    """Wait until the pool has so many containers, and knows them. The first of all only tells the home, and goes at once."""
    seen: list[set[str]] = []

    def stays() -> bool:
        seen.append({entry["Id"] for entry in waiting(daemon)})
        return len(seen) > 3 and len(seen[-1]) == count and seen[-1] == seen[-2] == seen[-3]

    assert eventually(stays, 60, 0.5)
    return daemon


def restart(daemon: Daemon, trap: str = "") -> None:
    """Start it again, with another trap or none."""
    daemon.env["LIGHTRUN_TRAP"] = trap
    daemon.start(wait=not trap)


@pytest.mark.long
def test_detached_and_keyed_runs_are_warm_too(pair: tuple[Daemon, Daemon]) -> None:
    _, warm = pair
    for length in (0, 1, lightrun.PIPE_BYTES):
        full(warm, 7)
        state = warm.wait(warm.detach(entrypoint="wc -c; cat a", files={"a": "b\n"}, stdin="x" * length))
        assert (state["logs"], state["exitCode"], state.get("warm")) == ([str(length), "b"], 0, True)
    full(warm, 7)
    fields = {**warm.fields, "entrypoint": "readlink /proc/self/fd/0; echo once; exit 5"}
    states = [warm.request("POST", "/run", fields, headers={"Idempotency-Key": "k"}).json() for _ in range(2)]
    assert states[0] == states[1]
    assert (states[0]["logs"], states[0]["exitCode"], states[0].get("warm")) == (["/dev/null", "once"], 5, True)


@pytest.mark.long
def test_an_adopted_run(daemon: DaemonFactory) -> None:
    """It keeps its deadline, which does not count from its container's start, its log, its stdin and its exit code."""
    lightrun_ = full(daemon("--warm", f"{IMAGE}=4/none"), 4)
    time.sleep(3)
    runs = [
        lightrun_.detach(entrypoint="cat; echo before; sleep 4; echo after; echo x > y; exit 0", stdin="in\n", extract=["y"]),
        lightrun_.detach(entrypoint="sleep 60", timeout=4000),
        lightrun_.detach(entrypoint="sleep 1; exit 125"),
        lightrun_.detach(entrypoint="printf '\\0out\\n'; sleep 1; exit 125"),
    ]
    before = [lightrun_.wait_for(run, lambda state: "startedAt" in state) for run in runs]
    lightrun_.wait_for(runs[0], lambda state: "before" in state["logs"])
    lightrun_.kill()
    time.sleep(2)
    restart(lightrun_)
    states = [lightrun_.wait(run) for run in runs]
    assert [state.get("warm") for state in states] == [True] * 4
    moments = [[lightrun.parse_timestamp(state["startedAt"]) for state in each] for each in (states, before)]
    assert all(abs(after - first) < 0.25 for after, first in zip(*moments, strict=True))  # a clock may be slewed
    assert [(state["reason"], state["exitCode"]) for state in states] == [
        ("exited", 0), ("timeout", 137), ("exited", 125), ("exited", 125),
    ]  # fmt: skip
    assert 4000 <= states[1]["timings"]["run"] < 6500  # 7,000 or more, were it counted from the adoption
    assert 1000 <= states[2]["timings"]["run"] < 3000
    logs = [lightrun_.request("GET", f"/runs/{run}/logs").body for run in runs]
    assert logs == [b"in\nbefore\nafter\n", b"", b"", b"\0out\n"]
    assert not any(state["logsTruncated"] for state in states)
    assert lightrun_.request("GET", f"/runs/{runs[0]}/artifacts/y").body == b"x\n"
    assert eventually(lambda: len(waiting(lightrun_)) == len(lightrun_.containers()) == 4, 60)


@pytest.mark.parametrize(
    ("traps", "is_warm"),
    [
        (("Store.begin after 1",), False),  # it is known that it was handed out, but not whether whole
        (("Runner._became after 1",), True),
        *longer(
            (("Pools.hand_out before 1",), None), (("Store.begin before 1",), None),
            (("Store.begin after 1", "Store.take_back before 1"), False),
            (("Store.begin after 1", "Store.take_back after 1"), None),
            (("Store.begin after 1", "Runner._hand_out after 1"), None), (("Pools.hand_out after 1",), True),
            (("Runner._became after 1", "Runner._has_become after 1"), True), (("Runner._feed after 1",), True),
            (("Store.finish before 1",), True),
        ),
    ],
)  # fmt: skip
def test_a_kill_at_each_step(daemon: DaemonFactory, traps: tuple[str, ...], is_warm: bool | None) -> None:
    """The run's program begins once: in the warm container if it was told to, and else in one of its own."""
    with contextlib.closing(Counter()) as counter:
        lightrun_ = full(daemon("--warm", f"{IMAGE}=1", env={"LIGHTRUN_TRAP": traps[0]}).online())
        tell = f"echo run | nc -w 20 $(ip route | awk '/default/ {{print $3}}') {counter.port} > /dev/null; "
        body = {"image": IMAGE, **SURVIVOR, "entrypoint": tell + SURVIVOR["entrypoint"]}
        with contextlib.suppress(OSError, http.client.HTTPException):  # it may die before it has answered
            assert lightrun_.request("POST", "/run", body).status == 202
        for trap in (*traps[1:], ""):
            assert lightrun_.process.wait(20) == -9
            restart(lightrun_, trap)
        [run] = lightrun_.request("GET", "/runs").json()
        state = lightrun_.wait(run["id"])
        assert (state["reason"], state["exitCode"], state["logs"]) == ("exited", 3, ["in", "file", "end"])
        assert lightrun_.request("GET", f"/runs/{run['id']}/logs").body == b"in\nfile\nend\n"
        assert counter.starts == {"run": 1}
        assert is_warm in {None, state.get("warm", False)}
        assert eventually(lambda: len(waiting(lightrun_)) == len(lightrun_.containers()) == 1, 60)


# ---------------------------------------------------------------- Pools come and go


def test_pools_fill_and_leave_nothing(daemon: DaemonFactory) -> None:
    lightrun_ = daemon("--warm", f"{IMAGE}=3/none")
    assert eventually(lambda: len(waiting(lightrun_)) == 3, 60)
    runs = [run_warm(lightrun_, entrypoint=f"echo {number}")["logs"] for number in range(4)]
    assert runs == [[str(number)] for number in range(4)]
    assert eventually(lambda: len(waiting(lightrun_)) == 3, 60)
    assert lightrun_.stop() == 0
    assert lightrun_.containers() == []


def test_a_kill_leaves_nothing(daemon: DaemonFactory) -> None:
    lightrun_ = daemon("--warm", f"{IMAGE}=2/none")
    assert eventually(lambda: len(waiting(lightrun_)) == 2, 60)
    with ThreadPoolExecutor() as pool:
        cut = pool.submit(
            lightrun_.request, "POST", "/run", {"image": IMAGE, "network": "none", "entrypoint": "echo begun; sleep 60"}
        )
        run = eventually(lambda: [each["id"] for each in lightrun_.request("GET", "/runs?status=running").json()])[0]
        lightrun_.wait_for(run, lambda state: state["logs"])
        lightrun_.kill()
        assert isinstance(cut.exception(), Exception)
    old = {entry["Id"] for entry in lightrun_.containers()}
    assert eventually(lambda: len(waiting(lightrun_)) <= 1), "the shims do not end with their input"  # but the program runs on
    lightrun_.start()
    assert lightrun_.wait(run)["reason"] == "interrupted"
    assert eventually(lambda: not old & {entry["Id"] for entry in lightrun_.containers()}, 30)
    assert eventually(lambda: len(waiting(lightrun_)) == 2, 60)


def test_an_image_that_changes(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    engine.tag(IMAGE, "lightrun/changing", "1")
    try:
        lightrun_ = daemon("--warm", "lightrun/changing:1=1/none")
        before = run_warm(lightrun_, image="lightrun/changing:1", entrypoint="true")
        make_image(EngineApi(), "lightrun/changing:1", "ENV NEW=1")
        after = lightrun_.run(image="lightrun/changing:1", entrypoint="echo $NEW")
        assert (after["logs"], "warm" in after, after["imageId"] == before["imageId"]) == (["1"], False, False)
        assert run_warm(lightrun_, image="lightrun/changing:1", entrypoint="echo $NEW")["logs"] == ["1"]
        lightrun_.stop()
    finally:
        engine.remove_image("lightrun/changing:1", force=True)


@pytest.mark.long
def test_a_missing_image_is_pulled(daemon: DaemonFactory, registry: Registry) -> None:
    image = registry.push(IMAGE, "warm/image:1")
    lightrun_ = daemon("--warm", f"{image}=1/none")
    assert run_warm_when_there(lightrun_, image)["logs"] == ["x"]
    lightrun_.stop()


def run_warm_when_there(daemon: Daemon, image: str) -> dict[str, Any]:
    """The same for an image that is not there yet."""
    assert eventually(lambda: waiting(daemon), 60)
    return run_warm(daemon, image=image, entrypoint="echo x")


@pytest.mark.long
def test_an_image_that_is_not_to_be_had(daemon: DaemonFactory) -> None:
    """It is asked for less and less often, whatever becomes of the other pools."""
    lightrun_ = daemon("--warm", "lightrun/nosuch=1/none", "--warm", f"{IMAGE}=1/none", "--pull", "never")
    missing, began = "no warm container of docker.io/lightrun/nosuch:latest", time.monotonic()
    assert eventually(lambda: missing in lightrun_.log())
    for _ in range(10):
        assert eventually(lambda: "lightrun_warm_containers 1" in lightrun_.request("GET", "/metrics").text, 60)
        assert lightrun_.run(entrypoint="true")["warm"]
    assert lightrun_.log().count(missing) <= 2 + math.log2(2 + time.monotonic() - began)  # pauses double, from 2 s on
    lightrun_.stop()


@pytest.mark.long
def test_a_restarted_engine(daemon: DaemonFactory) -> None:
    with PrivateEngine() as private:
        lightrun_ = daemon("--docker-host", private.host, "--warm", f"{IMAGE}=2/none")
        assert eventually(lambda: lightrun_.run(entrypoint="true").get("warm"), 60, 0.5)
        private.stop()
        private.start()
        assert eventually(lambda: lightrun_.request("GET", "/health").status == 200, 30)
        body = {**lightrun_.fields, "entrypoint": "echo x"}  # refused until lightrun has looked at the engine again, too
        assert eventually(lambda: lightrun_.request("POST", "/run", json=body).json().get("warm"), 90, 0.5)
        lightrun_.stop()


def test_a_warm_container_that_was_killed(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    """It is not handed out, and replaced."""
    lightrun_ = daemon("--warm", f"{IMAGE}=1/none")
    run_warm(lightrun_, entrypoint="true")
    time.sleep(1)  # until what it had is gone
    [entry] = eventually(lambda: waiting(lightrun_), 60)
    time.sleep(0.5)
    engine.kill(entry["Id"])
    assert eventually(lambda: not waiting(lightrun_))
    assert lightrun_.run(entrypoint="echo x")["logs"] == ["x"]
    assert run_warm(lightrun_, entrypoint="echo y")["logs"] == ["y"]


@pytest.mark.long
def test_a_connection_that_breaks(daemon: DaemonFactory, tmp_path: Path) -> None:
    """The output of a warm run goes on from the engine's copy, without what the shim printed before the program."""
    with contextlib.closing(Relay(unix_socket(str(tmp_path / "engine")))) as relay:
        lightrun_ = daemon("--docker-host", relay.url, "--warm", f"{IMAGE}=1/none")
        fields = {**lightrun_.fields, "entrypoint": "echo one; sleep 2; echo two; exit 3"}
        run_warm(lightrun_, entrypoint="true")
        assert eventually(lambda: waiting(lightrun_), 60)
        time.sleep(2)  # until the pool has it
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(lightrun_.run, **fields)
            run = eventually(lambda: [each["id"] for each in lightrun_.request("GET", "/runs?status=running").json()])[0]
            lightrun_.wait_for(run, lambda state: state["logs"])
            relay.drop()
            state = answer.result()
        assert (state["warm"], state["reason"], state["exitCode"]) == (True, "exited", 3)
        assert (state["logs"], state["logsTruncated"]) == (["one", "two"], False)
        assert lightrun_.request("GET", f"/runs/{run}/logs").body == b"one\ntwo\n"
        assert run_warm(lightrun_, entrypoint="echo x")["logs"] == ["x"]
        lightrun_.stop()


@pytest.mark.long
def test_folders_that_cannot_be_made(daemon: DaemonFactory) -> None:
    """The shim gives up, nothing has run, and the engine says what is wrong."""
    lightrun_ = daemon("--warm", f"{IMAGE}=1/none")
    assert eventually(lambda: waiting(lightrun_), 60)
    time.sleep(0.5)
    state = lightrun_.run(entrypoint="echo x", workdir="/etc/passwd/below")
    assert (state["reason"], "warm" in state) == ("start_failed", False)
    full = lightrun_.run(entrypoint="ls", files={"passwd/x": "y"}, workdir="/etc")
    assert full["reason"] in {"exited", "start_failed"}


@pytest.mark.long
def test_many_at_once(daemon: DaemonFactory, receiver: Receiver) -> None:
    """More runs than warm containers, some that leave: each has its own output."""
    lightrun_ = daemon("--warm", f"{IMAGE}=3/none", "--max-concurrent", "4")
    assert eventually(lambda: len(waiting(lightrun_)) == 3, 60)
    lock, warm = threading.Lock(), []

    def run(number: int) -> None:
        state = lightrun_.run(entrypoint="cat; cat n", stdin=f"{number}\n", files={"n": f"{number}\n"})
        assert state["logs"] == [str(number)] * 2
        with lock:
            warm.append(state.get("warm", False))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(12)))
    assert any(warm)
    lightrun_.stop()
    assert lightrun_.containers() == []
