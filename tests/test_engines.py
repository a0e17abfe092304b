"""Engines of other kinds: what lightrun takes them for, and in the long form the smoke on Podman itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightrun
import matrix
from engine import EngineApi, EngineError, ensure_image
from lightrun import LABEL_RUN, LABEL_STATE, Engine, EngineAbsent, Image, Settings, Traits, container_environment
from matrix import ENGINE_HEAD, KINDS, HousedEngine, Row
from smoke import COUNT, Lightrun, eventually, smoke
from test_client import Liar, answers

DOCKER = {"Plugins": {"Log": ["awslogs", "json-file", "local"]}}
INFO = b'{"Architecture": "x86_64", "NCPU": 2}'
PODMAN = {"BuildahVersion": "1.39.3", "Plugins": {"Log": ["k8s-file", "none", "passthrough", "journald"]}}


def test_what_docker_is_taken_for() -> None:
    assert Traits.of(DOCKER) == Traits("local", True, True, True, True, True, True, True)


def test_what_podman_is_taken_for() -> None:
    assert Traits.of(PODMAN) == Traits("json-file", False, False, False, False, False, False, False)


def test_the_machines_engine_is_a_docker(engine_api: EngineApi) -> None:
    assert Traits.of(json.loads(engine_api.call("GET", "/info"))).keeps_apart


def test_variables_of_an_engine_of_its_own_come_before_those_of_the_request() -> None:
    image = Image("sha256:0", "", "/", ("LANG=C",), ("sh",))
    given = {"container": "podman", "HOME": "/root"}
    assert container_environment(image, "host", given, {"container": "mine"}) == [
        f"PATH={lightrun.DEFAULT_PATH}", "HOSTNAME=host", "container=mine", "LANG=C", "HOME=/root",
    ]  # fmt: skip


def test_engines_are_known_by_name() -> None:
    done = subprocess.run([sys.executable, matrix.__file__, "--list"], capture_output=True, text=True)
    assert done.stdout.split() == list(KINDS)
    done = subprocess.run([sys.executable, matrix.__file__, "docker-1.0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no engine is called docker-1.0" in done.stderr


def test_rows_of_the_table_are_replaced_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- engines -->\n<!-- /engines -->\nafter\n")
    monkeypatch.setattr(matrix, "README", readme)
    first = Row("podman-4.3", ("Podman 4.3.1", "overlay, v1"), {"a | b": "why"})
    docker = Row("docker-20.10", ("Docker", "overlay2, v1"), {})
    second = Row("podman-4.3", ("Podman 4.3.2", "vfs, v2"), {"x": ""})
    for row in (first, docker, second):
        matrix.write("engines", ENGINE_HEAD, [row.cells])
    before, *table, after = readme.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-2]] for line in table[1:-1]]
    assert (before, after) == ("before", "after")
    assert rows[0] == list(ENGINE_HEAD[:-1])
    assert rows[2:] == [
        ["docker-20.10", "Docker", "overlay2, v1", f"{COUNT} of {COUNT}", "nothing"],
        ["podman-4.3", "Podman 4.3.2", "vfs, v2", f"{COUNT - 1} of {COUNT}", "x"],
    ]
    readme.write_text("no table\n")
    with pytest.raises(EngineError):
        matrix.write("engines", ENGINE_HEAD, [first.cells])


# ---------------------------------------------------------------- Answers that no engine gives, or another one


def version(api: str) -> bytes:
    """What an engine of this API version says of it."""
    return answers(json.dumps({"Version": "x", "ApiVersion": api}).encode())


@pytest.fixture
def lies() -> dict[str, bytes]:
    """What the engine answers, by the first line of a request."""
    return {"GET /version": version("1.41")}


@pytest.fixture
def liar(lies: dict[str, bytes]) -> Iterator[Engine]:
    """The engine that does so."""
    with contextlib.closing(Liar(lies)) as lying:
        yield Engine(Settings(docker_host=lying.url.replace("http", "tcp")), "")


def test_an_engine_of_another_version_is_asked_for_it_again(lies: dict[str, bytes], liar: Engine) -> None:
    """It was exchanged under a daemon that goes on, for one that is older."""
    refusal = json.dumps({"message": "client version 1.51 is too new. Maximum supported API version is 1.41"}).encode()
    lies |= {"GET /version": version("1.51"), "GET /v1.51": answers(refusal, b"400 Bad Request"), "GET /v1.41": answers(INFO)}
    assert liar.version()["apiVersion"] == "1.51"
    lies["GET /version"] = version("1.41")
    with pytest.raises(EngineAbsent):
        liar.about()
    assert liar.about() == json.loads(INFO)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"Running": true, "ExitCode": null, "Pid": 1e999, "ContainerID": "x"}'], ids=["deep", "infinite"]
)
def test_an_answer_that_cannot_be_understood_is_none(lies: dict[str, bytes], liar: Engine, body: bytes) -> None:
    lies["GET /v1.41/exec/x"] = answers(body)
    with pytest.raises(EngineAbsent):
        liar.command("x")


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"x": 1}'])
def test_what_is_no_description_of_an_engine_is_not_remembered(lies: dict[str, bytes], liar: Engine, body: bytes) -> None:
    lies["GET /v1.41/info"] = answers(body)
    with pytest.raises(EngineAbsent):
        liar.about()
    lies["GET /v1.41/info"] = answers(INFO)
    assert liar.about() == json.loads(INFO)


# ---------------------------------------------------------------- Podman itself: minutes, and debootstrap at the first time


@pytest.fixture(scope="module")
def podman() -> Iterator[HousedEngine]:
    """Debian 13's."""
    engine = HousedEngine(KINDS["podman-5.4"])
    with engine:
        ensure_image(engine.api)
        yield engine


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_smoke_on_podman(podman: HousedEngine, built: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python = [*podman.beside(), sys.executable]
        failed = smoke(lambda *options: Lightrun(python, built, podman.host, Path(folder), options), podman.api)
    assert failed.keys() <= {"missing program 127"}, failed


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_network_that_an_earlier_daemon_left_is_removed(podman: HousedEngine, built: Path) -> None:
    def networks() -> set[str]:
        return {network["Name"] for network in json.loads(podman.api.call("GET", "/networks"))}

    run = str(uuid.uuid4())
    with tempfile.TemporaryDirectory() as folder:
        at = Lightrun([sys.executable], built, podman.host, Path(folder), [])
        try:
            at.kill()
            labels = {LABEL_STATE: (Path(folder) / "state/artifacts/.lightrun").read_text(), LABEL_RUN: run}
            for name, own in ((f"lightrun-{run}", labels), ("lightrun-other", labels), (f"lightrun-{uuid.uuid4()}", {})):
                body = json.dumps({"Name": name, "Labels": own}).encode()
                podman.api.call("POST", "/networks/create", body, {"Content-Type": "application/json"})
            before = networks()
            at.start()
            eventually(lambda: f"lightrun-{run}" not in networks(), "it is gone")
            assert networks() == before - {f"lightrun-{run}"}
        finally:
            at.kill()
    for name in before - {"bridge", "podman", f"lightrun-{run}"}:
        podman.api.call("DELETE", f"/networks/{name}")
