"""/openapi.json is valid, names what is there, and every answer keeps to it; schemathesis looks for one that does not.

`LIGHTRUN_FUZZ_EXAMPLES=1500 python3 tests/run.py tests/test_openapi.py` is the long form: more than 10,000 requests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openapi_spec_validator
import psutil
import pytest

import lightrun
from conftest import ROOT, Daemon, DaemonFactory, Response, eventually
from engine import IMAGE

TOKEN = "a-token-for-openapi"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
TAR, NDJSON = {"Accept": "application/x-tar"}, {"Accept": "application/x-ndjson"}
NOBODY = "00000000-0000-4000-8000-000000000000"
HELLO = {"image": IMAGE, "entrypoint": "echo hello", "network": "none"}
EXAMPLES = int(os.environ.get("LIGHTRUN_FUZZ_EXAMPLES", "4"))
MIB = 1024 * 1024


def paths_of_routes() -> set[tuple[str, str]]:
    """Method and path of every route, the path as OpenAPI writes it."""
    return {(route.method.lower(), re.sub(r"<(\w+)(:path)?>", r"{\1}", route.path)) for route in lightrun.ROUTES}


class Session:
    """Sends requests to a daemon and holds every answer against its document."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.authorization = AUTHORIZED if daemon.token else {}
        self.document: dict[str, Any] = daemon.request("GET", "/openapi.json", headers=self.authorization).json()
        self.met: set[tuple[str, str, str]] = set()

    def send(self, method: str, path: str, json: Any = None, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
        """Send a request with the token and check the answer."""
        response = self.daemon.request(method, path, json=json, headers={**self.authorization, **(headers or {})}, **more)
        self.check(method, path, response)
        return response

    def check(self, method: str, path: str, response: Response) -> None:
        """The status, the media type and the body of an answer stand in the document."""
        template = self._template(path.partition("?")[0])
        operation = self.document["paths"][template].get(("GET" if method == "HEAD" else method).lower())
        assert operation, f"{method} {template} is not documented"
        assert str(response.status) in operation["responses"], f"{method} {template}: {response.status} is not documented"
        self.met.add((operation["operationId"], str(response.status), response.headers.get_content_type()))
        content = operation["responses"][str(response.status)].get("content", {})
        if method == "HEAD" or not (content or response.body):
            return
        kind = response.headers.get_content_type()
        assert kind in content, f"{method} {template}: {response.status} with {kind} is not documented"
        texts = response.body.splitlines() if kind == "application/x-ndjson" else [response.body]
        for text in texts if kind.endswith("json") else []:
            self._validate(content[kind]["schema"], text)

    def _template(self, path: str) -> str:
        """The documented path that fits; the one with the fewest variables when several do."""
        patterns: dict[str, str] = {each: re.sub(r"\\{\w+\\}", "[^/]+", re.escape(each)) for each in self.document["paths"]}
        patterns = {each: pattern + "(/.*)?" if each.endswith("{path}") else pattern for each, pattern in patterns.items()}
        fitting = [each for each in patterns if re.fullmatch(patterns[each], path)]
        return min(fitting, key=lambda each: each.count("{"))

    def _validate(self, schema: dict[str, Any], text: bytes) -> None:
        whole = {**schema, "components": self.document["components"]}
        checker = jsonschema.Draft202012Validator(whole, format_checker=jsonschema.FormatChecker())
        checker.validate(json.loads(text))


@pytest.fixture(scope="module")
def session_open(module_daemon: DaemonFactory) -> Session:
    """A daemon without a token, with little room."""
    narrow = ("--max-waiting", "1", "--max-concurrent", "2", "--queue", "1", "--body-limit", "2k")
    return Session(module_daemon(*narrow, "--allow-image", "*/lightrun/*"))


@pytest.fixture(scope="module")
def session_guarded(module_daemon: DaemonFactory) -> Session:
    """A daemon with a token."""
    return Session(module_daemon("--token", TOKEN, "--pull", "never"))


# ---------------------------------------------------------------- The document


def test_the_document_is_valid(session_open: Session, session_guarded: Session) -> None:
    for session in (session_open, session_guarded):
        openapi_spec_validator.validate(session.document)
        assert session.document["openapi"].startswith("3.1.")
        assert session.document["info"]["version"] == lightrun.__version__


def test_the_document_has_the_routes_that_exist(session_open: Session) -> None:
    documented = {(method, path) for path, item in session_open.document["paths"].items() for method in item}
    assert documented == paths_of_routes()
    names = [operation["operationId"] for item in session_open.document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_every_route_takes_documented_methods_only(session_open: Session) -> None:
    for path, item in session_open.document["paths"].items():
        for method in {"get", "head", "post", "put", "delete", "patch", "options"} - item.keys():
            if method == "head" and "get" in item:
                continue
            response = session_open.daemon.request(method.upper(), re.sub(r"\{\w+\}", "x", path))
            assert response.status == 405, f"{method} {path}"
            allowed = {each.strip().lower() for each in response.headers["Allow"].split(",")}
            assert allowed - {"head"} == item.keys()
            assert method == "head" or response.json()["error"] == "method_not_allowed"


def test_security_is_there_when_there_is_a_token(session_open: Session, session_guarded: Session) -> None:
    assert session_open.document.get("security", []) == []
    assert "securitySchemes" not in session_open.document["components"]
    schemes = session_guarded.document["components"]["securitySchemes"]
    assert [(scheme["type"], scheme["scheme"]) for scheme in schemes.values()] == [("http", "bearer")]
    assert session_guarded.document["security"] == [{name: []} for name in schemes]
    for path, item in session_guarded.document["paths"].items():
        for operation in item.values():
            assert operation.get("security") == ([] if path == "/health" else None)


def test_requests_are_described_by_the_table_that_validates_them(session_guarded: Session) -> None:
    schemas = session_guarded.document["components"]["schemas"]
    described = {name: schema for name, schema in schemas["RunRequest"].items() if name != "examples"}
    assert described == json.loads(json.dumps(lightrun.request_schema(lightrun.Settings())))
    for name in lightrun.EXEC_FIELDS:
        more = {"workdir", "timeout"} & {name}  # these two are described in other words
        assert more or schemas["ExecRequest"]["properties"][name] == described["properties"][name]
    assert schemas["Stop"]["properties"] == json.loads(json.dumps(lightrun.STOP_SCHEMA["properties"]))


def test_limits_of_the_operator_are_in_the_document(daemon: DaemonFactory) -> None:
    fields = Session(daemon("--memory", "64m", "--cpus", "0.5", "--pids", "7")).document["components"]["schemas"]["RunRequest"]
    assert fields["properties"]["cpus"]["maximum"] == 0.5
    assert fields["properties"]["pids"]["maximum"] == 7
    assert fields["properties"]["memory"]["anyOf"][0]["maximum"] == 64 * MIB


def test_examples_are_valid(session_guarded: Session) -> None:
    schemas = session_guarded.document["components"]["schemas"]
    examples = [(schema, example) for schema in schemas.values() for example in schema.get("examples", [])]
    assert examples
    for schema, example in examples:
        jsonschema.Draft202012Validator({**schema, "components": {"schemas": schemas}}).validate(example)
    for example in schemas["RunRequest"]["examples"]:
        lightrun.RunRequest.parse(json.dumps(example).encode(), lightrun.Settings())


# ---------------------------------------------------------------- Answers


@pytest.fixture(scope="module")
def finished(session_open: Session) -> str:
    """A run that kept a file and a folder."""
    body = {**HELLO, "entrypoint": "mkdir d; echo a > d/a; echo b > b", "extract": ["/app", "b", "no"]}
    return str(session_open.send("POST", "/run", body).json()["id"])


FATES: dict[str, dict[str, Any]] = {
    "timeout": {"entrypoint": "sleep 60", "timeout": 300},
    "pull_failed": {"image": "lightrun/no:1"},
}


def test_results_are_documented(session_open: Session, finished: str) -> None:
    send, run = session_open.send, f"/runs/{finished}"
    events = send("POST", "/run", {**HELLO, "entrypoint": "echo a; echo b >&2; exit 3"}, NDJSON)
    assert (events.status, events.headers["Content-Type"]) == (200, "application/x-ndjson")
    for reason, fields in FATES.items():
        assert send("POST", "/run", {**HELLO, **fields}).json()["reason"] == reason
    lists = ("/runs", "/runs?limit=1&status=failed&label=a=b")
    for path in ("/health", "/metrics", *lists, "/openapi.json", run, f"{run}/logs", f"{run}/artifacts"):
        assert [send(method, path).status for method in ("GET", "HEAD")] == [200, 200]
    assert send("GET", f"{run}/artifacts", headers=TAR).headers["Content-Type"] == "application/x-tar"
    assert send("GET", f"{run}/logs?follow=true&stream=stdout&tail=1").status == 200
    assert [send("GET", f"{run}/logs?from={start}").status for start in (0, 9)] == [200, 410]
    assert send("GET", f"{run}/events").status == 200
    file = send("GET", f"{run}/artifacts/b")
    assert (file.status, send("GET", f"{run}/artifacts/d").json()[0]["path"]) == (200, "d/a")
    conditions = {"Range": "bytes=0-0"}, {"Range": "bytes=9-"}, {"If-None-Match": file.headers["ETag"]}, {"If-Match": '"no"'}
    statuses = [send("GET", f"{run}/artifacts/b", headers=condition).status for condition in conditions]
    assert statuses == [206, 416, 304, 412]


def test_detached_runs_are_documented(session_open: Session) -> None:
    send = session_open.send
    accepted = send("POST", "/run", {**HELLO, "entrypoint": "sleep 60", "detached": True, "callbackUrl": "http://127.0.0.1:9/"})
    assert accepted.status == 202
    run = accepted.json()["url"]
    assert send("GET", f"{run}?wait=200").status == 200
    assert send("GET", "/runs?status=running").json()[0]["id"] == accepted.json()["id"]
    assert send("DELETE", run).status == 409
    assert eventually(lambda: send("GET", run).json().get("phase") == "running")
    for headers in ({}, NDJSON, {"Accept": "application/octet-stream"}):
        assert send("POST", f"{run}/exec", {"entrypoint": "echo a; exit 3"}, headers).status == 200
    assert send("POST", f"{run}/stop", {"signal": "SIGKILL", "grace": 0}).status == 204
    assert eventually(lambda: send("GET", run).json()["status"] == "failed")
    assert [send("POST", f"{run}/{action}").status for action in ("stop", "cancel")] == [409, 409]
    assert send("POST", f"{run}/exec", {"entrypoint": "true"}).status == 409
    assert send("DELETE", run).status == 204
    nowhere = f"{session_open.daemon.url}/nothing"  # answers 404, which is final
    run = send("POST", "/run", {**HELLO, "entrypoint": "true", "detached": True, "callbackUrl": nowhere}).json()["url"]
    assert eventually(lambda: send("GET", run).json().get("callback", {}).get("status") == "failed")
    assert send("POST", f"{run}/callback").status == 204
    run = send("POST", "/run", {**HELLO, "entrypoint": "sleep 60", "detached": True, "labels": {"a": "b"}}).json()["url"]
    assert send("POST", f"{run}/callback").status == 409
    assert send("POST", f"{run}/cancel").status == 204
    assert eventually(lambda: send("GET", run).json()["status"] == "cancelled")


def test_refusals_are_documented(session_open: Session, session_guarded: Session, finished: str) -> None:
    send = session_open.send
    for method, path in paths_of_routes():
        path = path.replace("{run_id}", finished).replace("{path}", "b")
        for headers, status in (({"Host": "evil.example"}, 403), ({"X": "x" * 70_000}, 431), ({"Content-Length": "999999"}, 413)):
            assert send(method.upper(), path, headers=headers).status == status
        assert send(method.upper(), path + "?no=1").status == 400
        response = session_guarded.daemon.request(method.upper(), path)
        session_guarded.check(method.upper(), path, response)
        assert response.status == (200 if path == "/health" else 401)
        if finished in path:
            assert send(method.upper(), path.replace(finished, NOBODY)).status == 404
    assert send("GET", f"/runs/{finished}/artifacts/nothing").status == 404
    assert send("GET", f"/runs/{finished}/artifacts/%2e%2e/b").status == 400
    for path in ("/run", f"/runs/{finished}/stop", f"/runs/{finished}/exec"):
        assert send("POST", path, body="a").status == 415
        assert send("POST", path, body="{", headers=JSON).status == 400
    assert send("POST", "/run", {"image": "alpine"}).json()["error"] == "not_allowed"
    for body, status in ((HELLO, 200), ({**HELLO, "timeout": 1000}, 409)):
        assert send("POST", "/run", body, {"Idempotency-Key": "a key"}).status == status


def test_being_busy_is_documented(session_open: Session, finished: str) -> None:
    send = session_open.send
    assert eventually(lambda: not session_open.daemon.containers())  # Until then a finished run has its place.
    runs = [send("POST", "/run", {**HELLO, "entrypoint": "echo; sleep 60", "detached": True}).json()["url"] for _ in range(3)]
    assert send("POST", "/run", {**HELLO, "detached": True}).json()["error"] == "busy"
    with session_open.daemon.open("GET", f"{runs[0]}/logs?follow=true"):
        assert send("GET", f"{runs[1]}/logs?follow=true").status == 503
        assert send("GET", f"{runs[1]}/events").status == 503
        assert send("GET", f"{runs[1]}?wait=1").status == 503
        assert send("GET", f"/runs/{finished}/artifacts", headers=TAR).status == 503
        assert send("POST", "/run", HELLO).status == 503
        assert send("POST", f"{runs[0]}/exec", {"entrypoint": "true"}).status == 503
    assert [send("POST", f"{run}/cancel").status for run in runs] == [204] * 3
    assert eventually(lambda: not send("GET", "/runs?status=running").json())


def test_an_absent_engine_is_documented(daemon: DaemonFactory, tmp_path: Path) -> None:
    session = Session(daemon("--docker-host", f"unix://{tmp_path}/none"))
    assert eventually(lambda: session.send("GET", "/health").status == 503)
    assert session.send("POST", "/run", HELLO).status in (200, 503)


# What a test cannot bring about at will: lightrun failing, and a disk that is full.
RARE = {"500"}


def test_every_documented_status_was_met(session_open: Session, session_guarded: Session) -> None:
    """Runs last of these: the session above met them all."""
    met = {(name, status) for name, status, _ in session_open.met | session_guarded.met}
    missing = [
        (operation["operationId"], status)
        for item in session_open.document["paths"].values()
        for operation in item.values()
        for status in operation["responses"]
        if status not in RARE and (operation["operationId"], status) not in met
    ]
    unreadable = {(name, "503") for name in ("runs", "artifact", "delete", "cancel", "stop", "callback", "metrics")}
    assert set(missing) <= {("health", "401"), ("health", "503")} | unreadable


# ---------------------------------------------------------------- schemathesis


def _disturbances(daemon: Daemon) -> Iterator[str]:
    """Lines of the log that say that lightrun failed."""
    return (line for line in daemon.log().splitlines() if re.search(r" 50[0124] \d+ ms$|: 50[0124]$|Traceback|uncaptured", line))


@pytest.mark.timeout(240 + 12 * EXAMPLES)
def test_schemathesis_finds_no_answer_outside_the_document(daemon: DaemonFactory, tmp_path: Path) -> None:
    lightrun = daemon("--token", TOKEN, "--pull", "never", "--max-concurrent", "8", "--memory", "64m")
    run = lightrun.run(entrypoint="echo a; mkdir d; echo b > d/b", extract=["d"], network="none")["id"]
    process = psutil.Process(lightrun.pid)
    # `positive_data_acceptance` cannot apply: the rules between fields (input or stdin, setup with an entrypoint), and
    # those of formats, give a 400 that JSON Schema does not foresee. `object_level_authorization` needs users of different
    # rights; lightrun has one right. `ensure_resource_availability` takes a run that was deleted by an id out of `GET /runs`
    # for one that was lost. Its usual `max_response_time`, 10 s, is little for a container on a busy machine. 503 is
    # documented, and what a busy daemon must say.
    excluded = "positive_data_acceptance,object_level_authorization,ensure_resource_availability"
    (tmp_path / "schemathesis.toml").write_text(
        '[checks]\nmax_response_time = 60\n[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
    )
    environment = {
        **os.environ, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "LIGHTRUN_FUZZ_RUN": run, "LIGHTRUN_FUZZ_PATH": "b",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("st")), "--config-file", str(tmp_path / "schemathesis.toml"),
        "run", f"{lightrun.url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", "--checks", "all",
        "--exclude-checks", excluded, "--max-examples", str(EXAMPLES), "--request-timeout", "60", "--no-color",
        "--suppress-health-check", "all", "--generation-database", "none", "--continue-on-failure",
        "--phases", "coverage,fuzzing" if EXAMPLES < 100 else "examples,coverage,fuzzing,stateful",
    ]  # fmt: skip
    before = process.memory_info().rss
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, f"{done.stderr}\n{lightrun.log()[-20_000:]}"
    tested = re.search(r"(\d+) generated", done.stdout)
    assert tested
    assert int(tested[1]) > 7 * EXAMPLES  # There are few requests for a route without parameters.
    assert not list(_disturbances(lightrun))
    risen = process.memory_info().rss - before
    print(f"{tested[0]}; RSS rose by {risen / MIB:.1f} MiB")
    assert risen < 40 * MIB
    for state in lightrun.request("GET", "/runs?status=running&limit=1000", headers=AUTHORIZED).json():
        lightrun.request("POST", f"/runs/{state['id']}/cancel", headers=AUTHORIZED)
    assert eventually(lambda: not lightrun.containers(), timeout=60)
