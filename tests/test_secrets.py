"""No token, secret, env value, stdin or file content is told to anybody, nor left on the disk (SPEC 5, last point).

Every secret place holds a canary of its own, which is then searched for as it is, as base64 and as hex.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from conftest import Daemon, DaemonFactory, Receiver, Response, eventually, free_port, longer
from engine import IMAGE
from images import Registry

PLACES = ("token", "callbackSecret", "callbackUrl", "env", "file", "stdin", "input", "password")
CANARIES = {place: f"CANARY{place}Zq7xW3" for place in PLACES}
JSON = {"Content-Type": "application/json"}


def spellings(canary: str) -> Iterator[bytes]:
    """A canary as text, as hex, and as base64 wherever in the encoded text it begins."""
    data = canary.encode()
    yield data
    yield data.hex().encode()
    for before in range(3):
        head, tail = -(-before * 8 // 6), (before + len(data)) % 3  # characters and bytes that neighbours share
        yield base64.b64encode(bytes(before) + data)[head : (before + len(data) - tail) // 3 * 4]


SPELLINGS = {place: list(spellings(canary)) for place, canary in CANARIES.items()}


def leaks(data: bytes | str) -> list[str]:
    """The places whose canaries are in this, whatever the case."""
    raw = (data.encode(errors="replace") if isinstance(data, str) else data).lower()
    return [place for place, texts in SPELLINGS.items() if any(text.lower() in raw for text in texts)]


@pytest.mark.parametrize("encode", [bytes, lambda text: text.hex().encode(), base64.b64encode])
@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_the_search_finds_every_canary(encode: Any, before: bytes) -> None:
    for place, canary in CANARIES.items():
        assert leaks(encode(before + canary.encode() + b"yz")) == [place]


# ---------------------------------------------------------------- A daemon that knows every secret


@pytest.fixture(scope="module")
def locked(engine: docker.APIClient) -> Iterator[Registry]:
    """A registry whose password is a canary."""
    with Registry("someone", CANARIES["password"]) as started:
        yield started


@pytest.fixture(scope="module")
def locked_image(locked: Registry) -> str:
    """An image in that registry."""
    return locked.push(IMAGE, "some/tool:1")


def guarded(make: DaemonFactory, registry: Registry, folder: Path, *options: str) -> Daemon:
    """A daemon with a canary as its token and in its Docker configuration."""
    (folder / "tokens").write_text(CANARIES["token"] + "\n")
    daemon = make("--token-file", str(folder / "tokens"), "--callback-allow", "127.0.0.1", *options)
    daemon.token = CANARIES["token"]
    registry.write_docker_config(daemon.home)
    return daemon


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory, locked: Registry, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """Such a daemon. Its log is text; that of the daemons with a test of their own is JSON."""
    return guarded(module_daemon, locked, tmp_path_factory.mktemp("token"))


def ask(daemon: Daemon, method: str, path: str, **more: Any) -> Response:
    """A request with the token."""
    headers = {"Authorization": f"Bearer {daemon.token}", **more.pop("headers", {})}
    return daemon.request(method, path, headers=headers, **more)


def secrets(receiver: Receiver) -> list[dict[str, Any]]:
    """The fields of two requests that hold a canary in every place."""
    fields = {
        "image": IMAGE, "detached": True, "env": {"S": CANARIES["env"]},
        "files": {"f": CANARIES["file"], "g": {"base64": base64.b64encode(CANARIES["file"].encode()).decode()}},
        "callbackUrl": f"{receiver.url}?key={CANARIES['callbackUrl']}", "callbackSecret": CANARIES["callbackSecret"],
    }  # fmt: skip
    return [{**fields, "stdin": CANARIES["stdin"]}, {**fields, "input": {"deep": [CANARIES["input"]]}}]


def told(daemon: Daemon) -> dict[str, list[str]]:
    """Where the daemon tells a canary."""
    runs = ask(daemon, "GET", "/runs?limit=1000")
    places: dict[str, bytes | str] = {
        "log": daemon.log(), "cmdline": Path(f"/proc/{daemon.pid}/cmdline").read_bytes(), "/runs": runs.body,
        **{path: ask(daemon, "GET", path).body for path in ("/health", "/openapi.json")},
    }  # fmt: skip
    for run in runs.json():
        for path in (f"/runs/{run['id']}", f"/runs/{run['id']}/logs", f"/runs/{run['id']}/artifacts"):
            places[path] = ask(daemon, "GET", path).body
    return {name: found for name, data in places.items() if (found := leaks(data))}


def kept(daemon: Daemon, running: bool = False) -> dict[str, list[str]]:
    """Files with a canary, but for the Docker configuration, and for the requests of runs that are not finished."""
    found = {}
    for path in (path for root in (daemon.state_dir, daemon.home, daemon.temporary) for path in root.rglob("*")):
        if path == daemon.home / ".docker/config.json" or (running and path.parent == daemon.state_dir / "secrets"):
            continue
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if places := leaks(path.read_bytes()) + leaks(path.name):
                found[str(path)] = places
    return found


def settled(daemon: Daemon, run: str) -> dict[str, Any]:
    """The state of a run that is finished, and its callback too."""
    return daemon.wait_for(run, lambda state: state["status"] != "running" and state["callback"]["status"] != "pending")


def nothing_is_left(daemon: Daemon) -> None:
    """Nobody was told a secret, and none is on the disk when all is done."""
    assert told(daemon) == {}
    eventually(lambda: not any((daemon.state_dir / "secrets").iterdir()))
    assert kept(daemon) == {}


# ---------------------------------------------------------------- Runs, whatever becomes of them


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"entrypoint": "echo out > o; echo $S | wc -c; cat f - | wc -c", "extract": ["o"]}, "exited"),
        *longer(({"entrypoint": "exit 3", "extract": ["."], "extractOn": "exit", "workdir": "/tmp/w"}, "exited"),
                ({"entrypoint": ["no-such-program"]}, "exited")),
        ({"entrypoint": "sleep 60", "timeout": 300}, "timeout"),
        ({"entrypoint": "true", "workdir": "/bin/busybox"}, "start_failed"),
        ({"image": "127.0.0.1:1/x"}, "pull_failed"),
    ],
)  # fmt: skip
def test_runs(lightrun: Daemon, receiver: Receiver, fields: dict[str, Any], reason: str) -> None:
    runs = [lightrun.detach(**{**common, **fields}) for common in secrets(receiver)]
    assert [settled(lightrun, run)["reason"] for run in runs] == [reason] * 2
    if "." in fields.get("extract", ()):  # which the client asked for
        for run in runs:
            assert ask(lightrun, "GET", f"/runs/{run}/artifacts/f").text == CANARIES["file"]
            assert ask(lightrun, "DELETE", f"/runs/{run}").status == 204
    for request in receiver.requests:
        assert CANARIES["callbackUrl"] in request.path
        assert not leaks(request.body + str(request.headers).encode())
    nothing_is_left(lightrun)


def test_pulls_with_a_password(lightrun: Daemon, receiver: Receiver, locked: Registry, locked_image: str) -> None:
    for image, reason in ((f"{locked.address}/no/such:1", "pull_failed"), (locked_image, "exited")):
        run = lightrun.detach(**{**secrets(receiver)[0], "image": image, "entrypoint": "true"})
        assert settled(lightrun, run)["reason"] == reason
    nothing_is_left(lightrun)


def test_a_password_that_is_wrong(daemon: DaemonFactory, locked: Registry, tmp_path: Path) -> None:
    """Even a Docker configuration that nobody can read stands in no message."""
    lightrun, image = guarded(daemon, locked, tmp_path, "--log-format", "json"), f"{locked.address}/some/other:1"
    config = lightrun.home / ".docker/config.json"
    wrong = [f"someone:{CANARIES['password']}x", CANARIES["password"], f"{CANARIES['password']}:\xff"]
    for auth in (*(base64.b64encode(text.encode("latin-1")).decode() for text in wrong), CANARIES["password"] + "!"):
        config.write_text(json.dumps({"auths": {locked.address: {"auth": auth}}}))
        assert lightrun.run(image=image, entrypoint="true")["reason"] == "pull_failed"
    for text in (f'{{"auths": "{CANARIES["password"]}', f'{{"auths": {{"{CANARIES["password"]}": 1}}}}'):
        config.write_text(text)
        assert lightrun.run(image=image, entrypoint="true")["reason"] == "pull_failed"
    nothing_is_left(lightrun)


def test_a_run_while_it_runs(lightrun: Daemon, engine: docker.APIClient, receiver: Receiver) -> None:
    runs = [lightrun.detach(**common, entrypoint="sleep 60") for common in secrets(receiver)]
    for run in runs:
        lightrun.wait_for(run, lambda state: state.get("phase") == "running")
        about = engine.inspect_container(f"lightrun-{run}")
        assert not leaks(json.dumps([about["Name"], about["Config"]["Labels"], about["Config"]["Hostname"]]))
    assert len(lightrun.containers()) == 2
    for entry in (*lightrun.containers(), *engine.networks()):
        assert not leaks(json.dumps({name: value for name, value in entry.items() if name != "Command"}))
    assert (told(lightrun), kept(lightrun, running=True)) == ({}, {})
    for run in runs:
        assert ask(lightrun, "POST", f"/runs/{run}/cancel").status == 204
        assert settled(lightrun, run)["reason"] == "cancelled"
    nothing_is_left(lightrun)


def test_a_live_run_and_a_large_one(lightrun: Daemon) -> None:
    """A body of this size waits in a temporary file."""
    fields = {"image": IMAGE, "env": {"S": CANARIES["env"]}, "stdin": CANARIES["stdin"] * 100_000, "entrypoint": "wc -c"}
    response = ask(lightrun, "POST", "/run", json=fields, headers={"Accept": "application/x-ndjson"})
    assert json.loads(response.body.splitlines()[-1])["run"]["logs"] == [str(len(str(fields["stdin"])))]
    assert not leaks(response.body)
    nothing_is_left(lightrun)


# ---------------------------------------------------------------- Refusals


ENV, FILE, STDIN, INPUT = (CANARIES[place] for place in ("env", "file", "stdin", "input"))
URL, SECRET = "http://127.0.0.1/?key=" + CANARIES["callbackUrl"], CANARIES["callbackSecret"]
BAD: list[dict[str, Any]] = [
    {"env": {"1": ENV, "A B": ENV, "C": [ENV], "D": {"x": ENV}, "E": ENV + "\0", "F": ENV + "\ud800"}},
    {"env": [ENV]}, {"env": ENV}, {"env": {"A": ENV * 10_000}},
    {"files": {"../x": FILE, "a": [FILE], "b": {"base64": FILE + "!"}}},
    {"files": {"c": {"text": FILE}, "d": FILE + "\0", "e": "\ud800" + FILE}},
    {"files": [FILE]}, {"files": FILE}, {"files": {"a": FILE, "a/b": FILE}},
    {"stdin": [STDIN]}, {"stdin": {"x": STDIN}}, {"stdin": STDIN + "\0"}, {"stdin": STDIN, "input": INPUT},
    {"input": INPUT + "\0"}, {"input": {"a": [INPUT, "\0"]}}, {"input": {INPUT + "\0": 1}}, {"input": {INPUT: "\0"}},
    {"input": {INPUT: {INPUT: json.loads("[" * 110 + "1" + "]" * 110)}}},
    {"callbackUrl": URL}, {"callbackUrl": [URL], "detached": True}, {"callbackUrl": "ftp" + URL, "detached": True},
    {"callbackUrl": URL + " x", "detached": True}, {"callbackUrl": URL + "x" * 2048, "detached": True},
    {"callbackUrl": f"http://u:{CANARIES['callbackUrl']}@127.0.0.1/", "detached": True},
    {"callbackSecret": SECRET}, {"callbackSecret": [SECRET], "callbackUrl": URL, "detached": True},
    {"callbackSecret": SECRET * 20, "callbackUrl": URL, "detached": True},
    {"callbackSecret": "whsec_" + SECRET + "!", "callbackUrl": URL, "detached": True},
]  # fmt: skip


def refused(daemon: Daemon, response: Response, status: int) -> None:
    """An error answer without a secret."""
    assert response.status == status, response.text
    assert not leaks(response.body + str(response.headers).encode())


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: repr(fields)[:60])
def test_bad_requests(lightrun: Daemon, fields: dict[str, Any]) -> None:
    refused(lightrun, ask(lightrun, "POST", "/run", json={"image": IMAGE, **fields}), 400)


def test_bodies_that_are_no_json(lightrun: Daemon, receiver: Receiver) -> None:
    body = json.dumps(secrets(receiver)[0])
    not_json = body.replace(": ", "= "), body.replace("}", ',"x":NaN}'), body.replace("}", ',"S":1,"S":1}'), body + "\xff"
    for broken in (body[:-1], body + body, "x" + body, *not_json):
        refused(lightrun, ask(lightrun, "POST", "/run", body=broken.encode("latin-1"), headers=JSON), 400)
    refused(lightrun, ask(lightrun, "POST", "/run", body=body), 415)


def test_other_refusals(lightrun: Daemon, receiver: Receiver) -> None:
    fields = secrets(receiver)[0]
    for authorization in ("Bearer {}x", "Basic {}", "{}", "Bearer x {}"):
        headers = {"Authorization": authorization.format(lightrun.token)}
        refused(lightrun, lightrun.request("POST", "/run", json=fields, headers=headers), 401)
    refused(lightrun, lightrun.request("GET", f"/runs?token={lightrun.token}"), 401)
    elsewhere = fields["callbackUrl"].replace("127.0.0.1", "localhost")
    refused(lightrun, ask(lightrun, "POST", "/run", json={**fields, "callbackUrl": elsewhere}), 403)
    refused(lightrun, ask(lightrun, "POST", "/run", json={**fields, "network": "bridge"}), 403)
    refused(lightrun, ask(lightrun, "GET", f"/runs/{'0' * 36}?wait=1"), 404)
    refused(lightrun, ask(lightrun, "POST", "/runs", json=fields), 405)
    refused(lightrun, ask(lightrun, "POST", "/runs/x/run", json=fields), 404)
    nothing_is_left(lightrun)


def test_conflicts(lightrun: Daemon, receiver: Receiver) -> None:
    fields = {**secrets(receiver)[0], "entrypoint": "true"}
    key = {"Idempotency-Key": "a key"}
    response = ask(lightrun, "POST", "/run", json=fields, headers=key)
    assert response.status == 202
    run = response.json()["id"]
    refused(lightrun, ask(lightrun, "POST", "/run", json={**fields, "entrypoint": "false"}, headers=key), 409)
    settled(lightrun, run)
    refused(lightrun, ask(lightrun, "POST", f"/runs/{run}/stop", json={"signal": "SIGINT"}), 409)
    assert ask(lightrun, "DELETE", f"/runs/{run}").status == 204
    nothing_is_left(lightrun)


# ---------------------------------------------------------------- Callbacks that fail, and a daemon that is killed


@pytest.mark.long
def test_a_callback_that_fails(lightrun: Daemon, receiver: Receiver) -> None:
    receiver.answer(500, body=CANARIES["callbackUrl"].encode())
    receiver.answer(302, {"Location": receiver.url + "?" + CANARIES["callbackUrl"]}, body=CANARIES["callbackSecret"].encode())
    run = lightrun.detach(**secrets(receiver)[0], entrypoint="true")
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    assert (told(lightrun), kept(lightrun, running=True)) == ({}, {})
    assert settled(lightrun, run)["callback"]["status"] == "failed"
    assert [Path(path).name for path in kept(lightrun)] == [f"{run}.callback"]  # it may be sent again
    assert ask(lightrun, "DELETE", f"/runs/{run}").status == 204
    nothing_is_left(lightrun)


@pytest.mark.long
def test_callbacks_that_nobody_takes(lightrun: Daemon, receiver: Receiver) -> None:
    """What is owed stays for the next attempts, until its run is deleted."""
    fields = secrets(receiver)[0]
    urls = (fields["callbackUrl"].replace("http:", "https:"), f"http://127.0.0.1:{free_port()}/?{CANARIES['callbackUrl']}")
    for url in urls:
        run = lightrun.detach(**{**fields, "callbackUrl": url}, entrypoint="true")
        lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
        assert (told(lightrun), kept(lightrun, running=True)) == ({}, {})
        assert ask(lightrun, "DELETE", f"/runs/{run}").status == 204
    nothing_is_left(lightrun)


def is_fed(daemon: Daemon, run: str) -> bool:
    """Whether it is recorded that the run's stdin was written whole; without that a restart interrupts it."""
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "lightrun.db")) as database:
        return bool(database.execute("SELECT fed FROM runs WHERE id = ?", [run]).fetchone()[0])


@pytest.mark.long
def test_a_daemon_that_is_killed(daemon: DaemonFactory, receiver: Receiver, locked: Registry, tmp_path: Path) -> None:
    """Once with a run that is running, one that waits for its place, and a callback that is owed; then when all is done."""
    lightrun = guarded(daemon, locked, tmp_path, "--log-format", "json", "--max-concurrent", "1")
    receiver.answer(500)
    fed, waiting = secrets(receiver)
    owed = lightrun.detach(**fed, entrypoint="true")
    lightrun.wait_for(owed, lambda state: state["callback"]["attempts"] == 1)
    runs = [lightrun.detach(**fields, entrypoint="cat > /dev/null; sleep 2") for fields in (fed, waiting)]
    assert eventually(lambda: is_fed(lightrun, runs[0]))
    lightrun.kill()
    assert kept(lightrun, running=True) == {}
    assert all(path.stat().st_mode & 0o077 == 0 for path in (lightrun.state_dir / "secrets").iterdir())
    lightrun.start()
    assert (told(lightrun), kept(lightrun, running=True)) == ({}, {})
    for run in (owed, *runs):
        state = settled(lightrun, run)
        assert (state["reason"], state["callback"]["status"]) == ("exited", "delivered")
    nothing_is_left(lightrun)
    lightrun.kill()
    assert kept(lightrun) == {}
