"""Engines of other kinds: what lightrun takes them for, and in the long form the smoke on Podman itself."""

from __future__ import annotations

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
from lightrun import LABEL_RUN, LABEL_STATE, Image, Traits, container_environment
from matrix import ENGINE_HEAD, KINDS, HousedEngine, Row
from smoke import COUNT, Lightrun, eventually, smoke

DOCKER = {"Plugins": {"Log": ["awslogs", "json-file", "local"]}}
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
