"""Several daemons behind a real HAProxy, with the configuration that the README gives: three nodes, of which one is on a Unix
socket and one has an engine of its own, and clients that count what is lost, run twice or sent to the wrong node."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

import lightrun
from conftest import KEPT_VARIABLES, ROOT, Daemon, DaemonFactory, Receiver, certify_localhost, eventually, free_port, longer
from engine import IMAGE, PrivateEngine

README = (ROOT / "README.md").read_text("utf-8")
TOKEN = "sesame"
TOKENS = f"{TOKEN}\nsmall small-token max=1 queue=0\n"
NODES = ("a", "b", "c")
CLIENTS = 6
NO_KEY, KEY = False, True
KINDS = tuple(itertools.product(("waiting", "detached"), (NO_KEY, KEY)))
BACK_SECONDS = 15  # until HAProxy's checks have seen that a node is back
Certificate = tuple[Path, Path]  # for clients; for HAProxy, with the key


class HAProxy:
    """A real one, master and worker, with the configuration of the README at other addresses."""

    def __init__(self, folder: Path, nodes: dict[str, Daemon], certificate: Path) -> None:
        (self.configuration,) = re.findall(r"(?s)<!-- haproxy -->\n```haproxy\n(.*?)```\n", README)
        self.port, self.metrics = free_port(), free_port()
        self.socket = folder / "admin"
        for number, (name, node) in enumerate(nodes.items(), 1):
            self.replace(f"server {name} 10.0.0.{number}:3000", f"server {name} {address(node)}", 3)
        self.replace("bind :443 ssl crt /etc/haproxy/lightrun.pem", f"bind 127.0.0.1:{self.port} ssl crt {certificate}")
        self.replace("stats socket /run/haproxy/admin.sock", f"stats socket {self.socket}")
        self.replace("127.0.0.1:8405", f"127.0.0.1:{self.metrics}")
        self.replace("    user haproxy\n    group haproxy\n", "")  # who may not look into the tests' folders
        self._file, self._log = folder / "haproxy.cfg", folder / "log"
        self._write()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(["haproxy", "-W", "-f", self._file], stdout=log, stderr=log)
        assert eventually(self._serves), self.log()

    def replace(self, old: str, new: str, times: int = 1) -> None:
        """Change the configuration where it says `old`."""
        assert self.configuration.count(old) == times, old
        self.configuration = self.configuration.replace(old, new)

    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    def reload(self) -> None:
        """Have it take the configuration as it is now; what its old worker has in hand, that ends."""
        self._write()
        before = self.tell("show info").partition("Pid: ")[2].split()[0]
        self._process.send_signal(signal.SIGUSR2)
        assert eventually(lambda: self.tell("show info").partition("Pid: ")[2].split()[:1] not in ([], [before])), self.log()

    @contextlib.contextmanager
    def changed(self, old: str, new: str, times: int = 1) -> Iterator[None]:
        """Have it run with another configuration for some time."""
        kept = self.configuration
        self.replace(old, new, times)
        self.reload()
        try:
            yield
        finally:
            self.configuration = kept
            self.reload()

    def tell(self, command: str) -> str:
        """Its answer to a command of its own, "" when there is none."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))
            client.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()
        return ""

    def up(self, backend: str) -> set[str]:
        """The servers of a backend that get requests."""
        return {row[1] for row in self._servers(backend) if row[17].startswith(("UP", "no check"))}

    def busy(self, backend: str, server: str) -> int:
        """How many requests a server has now."""
        return sum(int(row[4]) for row in self._servers(backend) if row[1] == server)

    def _servers(self, backend: str) -> list[list[str]]:
        rows = [line.split(",") for line in self.tell("show stat").splitlines()]
        return [row for row in rows if row[:1] == [backend] and row[1] != "BACKEND"]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(10)

    def _write(self) -> None:
        self._file.write_text(self.configuration)
        checked = subprocess.run(["haproxy", "-c", "-q", "-f", self._file], capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    def _serves(self) -> bool:
        return self.up("new") == set(NODES) and all(self.up(f"node_{node}") for node in NODES)


def address(node: Daemon) -> str:
    """Where a node is, for HAProxy."""
    return f"unix@{node.socket}" if node.socket else f"127.0.0.1:{node.port}"


@dataclasses.dataclass
class Fleet:
    """Three daemons and what stands before them."""

    nodes: dict[str, Daemon]
    proxy: HAProxy
    certificate: Path

    @property
    def url(self) -> str:
        """The address of all of them."""
        return f"https://localhost:{self.proxy.port}"

    def request(
        self, method: str, path: str, fields: dict[str, Any] | None = None, token: str = TOKEN, **headers: str
    ) -> requests.Response:
        """Send a request through the proxy; of a header's name `_` stands for `-`."""
        sent = {"Authorization": f"Bearer {token}", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return requests.request(method, self.url + path, json=fields, headers=sent, verify=str(self.certificate), timeout=90)

    def post(self, key: str | None = None, to: str = "", token: str = TOKEN, **fields: Any) -> requests.Response:
        """Send a run, by a node's path if it is named."""
        path = f"/nodes/{to}/run" if to else "/run"
        headers = {"Idempotency_Key": key} if key else {}
        return self.request("POST", path, {"image": IMAGE, "network": "none", **fields}, token, **headers)

    def wait(self, run: str) -> dict[str, Any]:
        """The state of a run at its end, asked for through the proxy."""
        state: dict[str, Any] = {}

        def ended() -> bool:
            answer = self.request("GET", f"/runs/{run}")
            assert answer.status_code in (200, 503), answer.text  # its node may be away
            state.update(answer.json())
            return answer.status_code == 200 and state["status"] != "running"

        assert eventually(ended, 60), state
        return state

    def records(self, label: str) -> list[tuple[str, dict[str, Any]]]:
        """What each node has of the runs with a label, by its own word."""
        return [(name, state) for name, node in self.nodes.items() for state in listed(node, label)]

    def restart(self, name: str) -> None:
        """Start a node that has ended, and wait until HAProxy knows it."""
        self.nodes[name].start()
        self.all_up()

    def all_up(self) -> None:
        """Wait until HAProxy takes every node for good."""
        assert eventually(lambda: self.proxy.up("new") == set(NODES), BACK_SECONDS)
        assert eventually(lambda: all(self.proxy.up(f"node_{node}") for node in NODES), BACK_SECONDS)


def listed(node: Daemon, label: str) -> list[dict[str, Any]]:
    """A node's runs with a label."""
    found: list[dict[str, Any]] = node.request("GET", f"/runs?label={label}&limit=1000", headers=node._authorization()).json()
    return found


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """One for localhost that signs itself."""
    folder = tmp_path_factory.mktemp("certificate")
    certify_localhost(folder)
    (folder / "both").write_bytes((folder / "cert").read_bytes() + (folder / "key").read_bytes())
    return folder / "cert", folder / "both"


@pytest.fixture(scope="module")
def far_engine() -> Iterator[PrivateEngine]:
    """The engine of the third node."""
    with PrivateEngine() as started:
        yield started


@pytest.fixture(scope="module")
def fleet(
    pyz: Path, engine: docker.APIClient, far_engine: PrivateEngine, certificate: Certificate,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:  # fmt: skip
    """All of it. Each test leaves every node up."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "tokens").write_text(TOKENS)
    (folder / "tokens").chmod(0o600)
    options = ("--token-file", str(folder / "tokens"), "--trust-proxy")
    with contextlib.closing(docker.APIClient(far_engine.host, version="auto")) as far, ThreadPoolExecutor(3) as together:
        nodes = {
            "a": Daemon(pyz, engine, (*options, "unix", "--node", "a"), socket=True),
            "b": Daemon(pyz, engine, (*options, "127.0.0.1", "--node", "b")),
            "c": Daemon(pyz, far, (*options, "127.0.0.1", "--node", "c", "--docker-host", far_engine.host)),
        }
        try:
            for node in nodes.values():
                node.token = TOKEN
                node.start()
            with contextlib.closing(HAProxy(folder, nodes, certificate[1])) as proxy:
                yield Fleet(nodes, proxy, certificate[0])
        finally:
            list(together.map(Daemon.close, nodes.values()))  # each stays for a while


# ---------------------------------------------------------------- One run


def test_ids_tell_the_node_everywhere(fleet: Fleet, receiver: Receiver) -> None:
    """In the state, events, callbacks, containers, artifacts, references and the pages of a list."""
    secret = "whsec_" + "c2VjcmV0" * 4
    fields: dict[str, Any] = {"callbackUrl": receiver.url, "callbackSecret": secret}
    fields |= {"entrypoint": "echo 1 > out; sleep 0.3", "extract": ["out"], "detached": True}
    made = fleet.post("made", to="b", **fields).json()["id"]
    assert re.fullmatch(r"b_[0-9a-f-]{36}", made)
    assert str(uuid.UUID(made[2:])) == made[2:]
    assert eventually(lambda: f"/lightrun-{made}" in [name for entry in fleet.nodes["b"].containers() for name in entry["Names"]])
    assert fleet.wait(made)["artifacts"][0]["path"] == "out"
    (called,) = receiver.wait()
    assert (called.headers["webhook-id"], json.loads(called.body)["id"]) == (made, made)
    assert fleet.request("GET", f"/runs/{made}/artifacts/out").content == b"1\n"
    used = fleet.post(to="b", entrypoint=["cat", "again"], files={"again": {"artifact": f"{made}/out"}}).json()
    assert used["logs"] == ["1"]
    assert fleet.post(to="b", key="made", entrypoint=["true"]).status_code == 409
    assert [state["id"] for state in fleet.request("GET", f"/runs?before={used['id']}&limit=1").json()] == [made]
    assert [state["id"] for state in fleet.request("GET", f"/runs?id={made[:9]}").json()] == [made]
    events = [json.loads(line) for line in fleet.request("GET", f"/runs/{made}/events").text.splitlines()]
    assert (events[0]["id"], events[-1]["run"]["id"]) == (made, made)
    for path in ("/runs/d_" + made[2:], "/runs/" + made[2:], "/nodes/d/runs", "/nodes/b", "/nowhere", "/runs"):
        answer = fleet.request("GET", path)
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found"), path
    assert fleet.request("DELETE", f"/runs/{made}").status_code == 204
    assert fleet.request("GET", f"/runs/{made}").status_code == 404


def test_without_a_name_nothing_changes(daemon: DaemonFactory) -> None:
    own = daemon(socket=True)
    assert "node" not in own.request("GET", "/health").json()
    run = own.run(entrypoint=["true"])["id"]
    assert str(uuid.UUID(run)) == run


@pytest.mark.long
def test_a_daemon_may_get_a_name_later(daemon: DaemonFactory) -> None:
    """Runs of both forms are known, kept and cleared away."""
    own = daemon("--artifacts-dir", "artifacts", socket=True)
    fields = {"entrypoint": "echo 1 > out", "extract": ["out"]}
    plain = own.run(**fields)["id"]
    own.stop()
    folder = own.folder / "artifacts"
    strays = [folder / f"{prefix}{uuid.uuid4()}{end}" for prefix in ("", "a_", "b-2_") for end in ("", ".partial")]
    foreign = [folder / name for name in ("notes", f"-a_{uuid.uuid4()}", f"A_{uuid.uuid4()}")]
    for each in strays + foreign:
        each.mkdir()
    own.command += ["--node", "a", "--leave", "0s"]
    own.start()
    named = own.run(**fields)["id"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {plain, named, *(each.name for each in foreign)}
    assert [state["id"] for state in own.request("GET", f"/runs?before={named}").json()] == [plain]
    assert own.run(entrypoint=["cat", "x/out"], files={"x": {"artifact": f"{plain}/"}})["logs"] == ["1"]
    assert own.run(entrypoint=["cat", "x/out"], files={"x": {"artifact": f"{named}/"}})["logs"] == ["1"]


@pytest.mark.long
def test_a_daemon_that_leaves_takes_what_still_comes(daemon: DaemonFactory) -> None:
    own = daemon("--node", "a", "--leave", "2s", socket=True)
    assert own.request("GET", "/health").json()["node"] == "a"
    own.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert eventually(lambda: own.request("GET", "/health").status == 503, 1)
    health = own.request("GET", "/health").json()
    assert (health["status"], health["node"], health["docker"]) == ("stopping", "a", True)
    assert own.run(entrypoint=["echo", "late"])["logs"] == ["late"]
    assert own.request("POST", "/run", {**own.fields, "entrypoint": ["true"], "detached": True}).status == 202
    assert own.process.wait(20) == 0
    assert 2 <= time.monotonic() - began < 10


@pytest.mark.parametrize(("options", "stays"), [((), False), (("--node", "a"), True), (("--node", "a", "--leave", "0s"), False)])
def test_how_long_a_daemon_stays(daemon: DaemonFactory, options: tuple[str, ...], stays: bool) -> None:
    own = daemon(*options, socket=True)
    began = time.monotonic()
    assert own.stop() == 0
    assert (time.monotonic() - began > lightrun.LEAVE_SECONDS) == stays


def test_a_second_signal_does_not_wait(daemon: DaemonFactory) -> None:
    own = daemon("--leave", "1h", socket=True)
    own.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: own.request("GET", "/health").status == 503)
    own.process.send_signal(signal.SIGTERM)
    assert own.process.wait(5) == 1


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a.b", "a" * 64, "ä", "a\n", "a b", "_"])
def test_names_that_are_none(daemon: DaemonFactory, name: str) -> None:
    own = daemon(f"--node={name}", start=False).start(wait=False)
    assert own.process.wait(20) == 2
    assert "--node: must be 1 to 63 of a to z, 0 to 9 and -" in own.log()


@pytest.mark.parametrize("name", ["a--b", "a" * 63, *longer("a", "7", "node-17")])
def test_names(daemon: DaemonFactory, name: str) -> None:
    own = daemon("--leave", "0s", env={"LIGHT_RUN_NODE": name}, socket=True)
    run = own.run(entrypoint=["true"], extract=["/etc/passwd"])["id"]
    assert run.startswith(f"{name}_")
    assert own.request("GET", f"/runs/{run}/artifacts/passwd").status == 200


@pytest.fixture
def command(fleet: Fleet, built: Path, tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command of the client through the proxy, and returns what it printed."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    env = {**kept, "HOME": str(tmp_path), "LIGHT_RUN_TOKEN": TOKEN, "SSL_CERT_FILE": str(fleet.certificate)}

    def run(*arguments: str, at: str = "") -> str:
        line, variables = [sys.executable, str(built), *arguments], {**env, "LIGHT_RUN_URL": fleet.url + at}
        return subprocess.run(line, env=variables, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout

    return run


def test_the_client_goes_through_it(fleet: Fleet, command: Callable[..., str], tmp_path: Path) -> None:
    """`lightrun run` with files in and out, and the commands beside it, with a run's own id and with the beginning of one."""
    (tmp_path / "in").write_text("1\n")
    assert command("run", "--network", "none", "--file", "in", "--extract", "out", IMAGE, "--shell", "cat in; cp in out") == "1\n"
    assert (tmp_path / "out").read_text() == "1\n"
    run = command("run", "--network", "none", "--detach", IMAGE, "--", "echo", "2").strip()
    fleet.wait(run)
    assert command("logs", run) == command("logs", run[:12]) == "2\n"
    assert run[:10] in command("ps", "--all", at=f"/nodes/{run[0]}")
    command("rm", run)
    assert fleet.request("GET", f"/runs/{run}").status_code == 404


# ---------------------------------------------------------------- Many runs


@dataclasses.dataclass
class Storm:
    """Numbered runs from several clients at a time, and what was told of each."""

    fleet: Fleet
    label: str
    told: dict[int, requests.Response] = dataclasses.field(default_factory=dict)
    again: int = 0  # requests with a key that were repeated by the client

    def run(self, numbers: range, disturb: Callable[[], None]) -> None:
        """Send them all, with a disturbance meanwhile."""
        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        with ThreadPoolExecutor(CLIENTS) as clients:
            self.told |= zip(numbers, clients.map(self.send, numbers), strict=True)
        disturbing.join()

    def send(self, number: int) -> requests.Response:
        """One run of the four kinds; with a key it is repeated as clients may, since nothing runs twice then."""
        how, keyed = KINDS[number % len(KINDS)]
        key = f"{self.label}-{number}" if keyed else None
        for _ in range(60):
            answer = self.fleet.post(
                key, entrypoint=f"sleep 0.2; echo {number}", labels={"storm": self.label, "number": str(number)},
                detached=how == "detached",
            )  # fmt: skip
            if key is None or answer.status_code < 500:
                break
            self.again += 1
            time.sleep(0.5)
        return answer

    def counts(self) -> collections.Counter[str]:
        """What became of them, by the word of the nodes and through the proxy."""
        found: collections.Counter[str] = collections.Counter()
        for number, answer in self.told.items():
            if answer.status_code not in (200, 202):
                keyed = KINDS[number % len(KINDS)][1]
                found["told" if not keyed and answer.status_code == 502 else f"refused with {answer.status_code}"] += 1
                continue
            state = self.fleet.wait(answer.json()["id"])
            good = (state["reason"], state["exitCode"], state["logs"]) == ("exited", 0, [str(number)])
            found["good" if good else f"ended {state['reason']}"] += 1
        records = self.fleet.records(f"storm={self.label}")
        ran = collections.Counter(state["labels"]["number"] for _, state in records)
        found["twice"] = sum(count - 1 for count in ran.values())
        found["lost"] = sum(answer.ok and str(number) not in ran for number, answer in self.told.items())
        found["misrouted"] = sum(not state["id"].startswith(f"{name}_") for name, state in records)
        return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("runs", "kills"), [(60, ["b"]), pytest.param(300, ["a", "b", "c"], marks=pytest.mark.long)], ids=["short", "long"]
)  # fmt: skip
def test_nothing_is_lost_when_a_node_is_killed(fleet: Fleet, runs: int, kills: list[str]) -> None:
    """`kill -9`, and it is back a moment later. A run that is waited for without a key may be told to have failed, as HAProxy
    cannot know whether the node had taken it: once for each client at most."""
    storm = Storm(fleet, uuid.uuid4().hex)
    for part, name in enumerate(kills):
        numbers = range(part * runs // len(kills), (part + 1) * runs // len(kills))

        def disturb(name: str = name, enough: int = numbers.start + len(numbers) // 4) -> None:
            label = f"storm={storm.label}"
            assert eventually(lambda: len(fleet.records(label)) >= enough and listed(fleet.nodes[name], label), 60)
            fleet.nodes[name].kill()
            time.sleep(1)  # away for some time
            fleet.nodes[name].start()

        storm.run(numbers, disturb)
        fleet.all_up()
    counts = storm.counts()
    told = counts.pop("told", 0)
    print(f"{runs} runs, {len(kills)} kills: {dict(counts)}, told that a node had failed: {told}, repeated: {storm.again}")
    assert (counts.pop("good") + told, told <= CLIENTS * len(kills)) == (runs, True)
    assert counts == {"twice": 0, "lost": 0, "misrouted": 0}, fleet.proxy.log()


# ---------------------------------------------------------------- A node that fails


@contextlib.contextmanager
def only(fleet: Fleet, name: str) -> Iterator[None]:
    """Let new runs without a key go to one node for now, until it is not there."""
    for other in set(NODES) - {name}:
        fleet.proxy.tell(f"set server new/{other} weight 0")
    try:
        yield
    finally:
        for each in NODES:
            fleet.proxy.tell(f"set server new/{each} weight 100%")


def by_curl(fleet: Fleet, fields: dict[str, Any], *options: str) -> list[str]:
    """A line of curl that posts a run, after a request of another kind."""
    body = json.dumps({"image": IMAGE, "network": "none", **fields})
    posted = ["-w", " %{http_code}", "-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json", "-d", body]
    always = ["-s", "--cacert", str(fleet.certificate), *options]
    return ["curl", *always, "-o", "/dev/null", f"{fleet.url}/health", "--next", *always, *posted, f"{fleet.url}/run"]


@pytest.mark.parametrize("how", ["runs", "stopped before it answers", "--http1.1", "--http2"])
def test_a_node_that_dies_with_a_request(fleet: Fleet, how: str) -> None:
    """Without a key nobody can know whether it runs, so no other node gets it, and the client is told: also curl, which would
    send it again if a connection that it has used before were closed without a word."""
    label = uuid.uuid4().hex
    taken = how != "stopped before it answers"

    def post() -> tuple[int, str]:
        fields: dict[str, Any] = {"entrypoint": "sleep 5", "labels": {"test": label}}
        if how.startswith("--"):
            done = subprocess.run(by_curl(fleet, fields, how), stdout=subprocess.PIPE, text=True, check=True)
            body, _, code = done.stdout.rpartition(" ")
            return int(code), body
        answer = fleet.post(**fields)
        return answer.status_code, answer.text

    with only(fleet, "a"), ThreadPoolExecutor(1) as client:
        if not taken:
            fleet.nodes["a"].process.send_signal(signal.SIGSTOP)
        answer = client.submit(post)
        if taken:
            assert eventually(lambda: fleet.records(f"test={label}"))
        else:
            assert eventually(lambda: fleet.proxy.busy("new", "a"))
            time.sleep(0.2)  # the request is in its socket
        fleet.nodes["a"].kill()
        status, text = answer.result()
    fleet.restart("a")
    assert [name for name, _ in fleet.records(f"test={label}")] == (["a"] if taken else [])
    assert (status, json.loads(text)["error"]) == (502, "node_failed")


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("b", marks=pytest.mark.long), "c"])
def test_a_node_that_dies_with_a_key(fleet: Fleet, name: str) -> None:
    """The same node is asked again until it is back, and the run goes on; the client sees nothing of it."""
    label = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as client:
        keys = (f"{label}-{number}" for number in itertools.count())
        # a key that is hashed to this node: told by a run of the same key that ends at once
        key = next(key for key in keys if fleet.post(key, entrypoint=["true"]).json()["id"].startswith(name))
        fleet.request("DELETE", f"/runs/{fleet.post(key, entrypoint=['true']).json()['id']}")
        answer = client.submit(fleet.post, key, entrypoint="sleep 3; echo done", labels={"test": label})
        assert eventually(lambda: any(state.get("startedAt") for _, state in fleet.records(f"test={label}")))
        fleet.nodes[name].kill()
        time.sleep(1)
        fleet.restart(name)
        state = answer.result().json()
    assert (answer.result().status_code, state["logs"], state["id"][0]) == (200, ["done"], name)
    assert [(node, each["id"]) for node, each in fleet.records(f"test={label}")] == [(name, state["id"])]


@pytest.mark.parametrize("key", [",x{}", "A b={};c", *longer(", , {}", "{},", '"{}"', "x" * 160 + "{}")])
def test_odd_keys_have_one_node_as_well(fleet: Fleet, key: str) -> None:
    key = key.format(uuid.uuid4().hex)
    assert len({fleet.post(key, entrypoint=["true"]).json()["id"] for _ in range(4)}) == 1


@pytest.mark.long
def test_a_key_whose_node_stays_away(fleet: Fleet) -> None:
    """The client is told that it may have the run."""
    label, patience = uuid.uuid4().hex, "    retries 20 "
    key = next(key for key in map(str, itertools.count()) if fleet.post(label + key, entrypoint=["true"]).json()["id"][0] == "b")
    fleet.nodes["b"].kill()
    with fleet.proxy.changed(patience, "    retries 2 "):
        answer = fleet.post(label + key, entrypoint=["true"])
    assert (answer.status_code, answer.json()["error"], answer.headers["Retry-After"]) == (503, "node_unavailable", "5")
    assert "may have the run" in answer.json()["message"]
    fleet.restart("b")
    assert fleet.post(label + key, entrypoint=["true"]).json()["id"][0] == "b"


@pytest.mark.long
def test_a_node_that_gets_another_name(fleet: Fleet) -> None:
    """Its old runs keep their ids, and are found through the backend of the old name."""
    fields: dict[str, Any] = {"entrypoint": "echo 1 > out", "extract": ["out"]}
    runs = [fleet.post(to="b", **fields).json()["id"] for _ in range(2)]
    (backend,) = re.findall(r"(?s)(backend node_b\n.*?)\n\n", fleet.proxy.configuration)
    old = backend.replace('"node":"b"', '"node":"bb"')
    fleet.nodes["b"].stop()
    named = fleet.nodes["b"].command.index("b")
    fleet.nodes["b"].command[named] = "bb"
    with fleet.proxy.changed(backend, old + "\n\n" + old.replace("node_b\n", "node_bb\n")):
        fleet.nodes["b"].start()
        assert eventually(lambda: fleet.proxy.up("node_b") and fleet.proxy.up("node_bb"), BACK_SECONDS)
        new = fleet.post(to="bb", entrypoint=["cat", "again"], files={"again": {"artifact": f"{runs[0]}/out"}}).json()
        assert (new["id"][:3], new["logs"]) == ("bb_", ["1"])
        assert fleet.request("GET", f"/runs/{runs[0]}/artifacts/out").content == b"1\n"
        first = fleet.request("GET", "/nodes/bb/runs?limit=2")
        assert [state["id"] for state in first.json()] == [new["id"], runs[1]]
        assert fleet.request("GET", first.links["next"]["url"]).json()[0]["id"] == runs[0]
        fleet.nodes["b"].stop()
    fleet.nodes["b"].command[named] = "b"
    fleet.restart("b")
    assert fleet.request("GET", f"/runs/{runs[0]}").status_code == 200


@pytest.mark.long
def test_the_client_outlives_a_node(fleet: Fleet, command: Callable[..., str]) -> None:
    """`kill -9` of the node that has its run: not a line is lost or comes twice."""
    label, script = uuid.uuid4().hex, "for i in $(seq 60); do echo $i; sleep 0.1; done"
    with ThreadPoolExecutor(1) as client:
        printed = client.submit(command, "run", "--network", "none", "--label", f"test={label}", IMAGE, "--shell", script)
        ((name, _),) = eventually(lambda: [each for each in fleet.records(f"test={label}") if each[1].get("startedAt")])
        fleet.nodes[name].kill()
        assert eventually(lambda: name not in fleet.proxy.up(f"node_{name}"))
        fleet.restart(name)
        assert printed.result().split() == [str(number) for number in range(1, 61)]


def test_runs_of_a_node_that_is_away(fleet: Fleet) -> None:
    """They are answered 503 until it is back, and no other node is asked."""
    run = fleet.post(to="b", entrypoint=["echo", "1"]).json()["id"]
    fleet.nodes["b"].kill()
    assert eventually(lambda: fleet.proxy.up("new") == {"a", "c"})
    for path in (f"/runs/{run}", f"/runs/{run}/logs", f"/runs?before={run}", "/nodes/b/runs"):
        answer = fleet.request("GET", path)
        assert (answer.status_code, answer.json()["error"], answer.headers["Retry-After"]) == (503, "node_unavailable", "5")
    assert fleet.request("GET", "/health").json() == {"status": "ok", "nodes": 2}
    assert fleet.post(entrypoint=["true"]).status_code == 200
    fleet.restart("b")
    assert fleet.request("GET", f"/runs/{run}").json()["logs"] == ["1"]


@pytest.mark.long
def test_addresses_that_were_swapped(fleet: Fleet) -> None:
    """A name that leads to another node answers 503, not that node's 404."""
    run = fleet.post(to="b", entrypoint=["true"]).json()["id"]
    here, there = (f"server {name} {address(fleet.nodes[name])} check inter 2s" for name in ("b", "c"))
    with fleet.proxy.changed(here, there.replace("server c", "server b")):
        assert eventually(lambda: not fleet.proxy.up("node_b"))
        assert fleet.request("GET", f"/runs/{run}").status_code == 503
    fleet.all_up()
    assert fleet.request("GET", f"/runs/{run}").status_code == 200


# ---------------------------------------------------------------- A node that is full, or goes


@pytest.mark.long
def test_a_full_node(fleet: Fleet) -> None:
    """Its 503 sends a new run to another; when all are full, the client gets their word. A key stays at its node."""
    label = uuid.uuid4().hex

    def places() -> int:
        told = [node.request("GET", "/metrics", headers=node._authorization()).text for node in fleet.nodes.values()]
        return sum(int(re.findall(r"(?m)^lightrun_places_taken (\d+)$", each)[0]) for each in told)

    small = functools.partial(fleet.post, token="small-token")
    with contextlib.ExitStack() as held:
        runs: dict[str, str] = {}
        for name in NODES:
            for _ in range(3 * len(runs)):  # wherever it comes first, it ends at a node that has room
                assert small(entrypoint=["true"]).status_code == 200
                assert eventually(lambda: places() == len(runs))
            hold = functools.partial(small, to=name, entrypoint="sleep 60", detached=True)
            runs[name] = eventually(lambda: hold().json().get("id"))  # noqa: B023
            held.callback(fleet.request, "POST", f"/runs/{runs[name]}/cancel")
        answer = small(entrypoint=["true"])
        assert (answer.status_code, answer.json()["error"]) == (503, "busy")
        assert "small" in answer.json()["message"]
        assert fleet.post(entrypoint=["true"]).status_code == 200
        for name in "ab":
            assert fleet.request("POST", f"/runs/{runs[name]}/cancel").ok
            fleet.wait(runs[name])
        keyed = [small(f"{label}-{number}", entrypoint=["true"]) for number in range(9)]
        assert {answer.status_code for answer in keyed} == {200, 503}
        assert not any(answer.ok and answer.json()["id"][0] == "c" for answer in keyed)
    fleet.wait(runs["c"])


def steady(fleet: Fleet, disturb: Callable[[], None]) -> collections.Counter[int]:
    """The status codes of runs that three clients send one after the other, from before a disturbance until after it."""
    over, statuses = threading.Event(), collections.Counter[int]()

    def send() -> None:
        while not over.is_set():
            statuses[fleet.post(entrypoint=["true"]).status_code] += 1

    with ThreadPoolExecutor(3) as clients:
        sent = [clients.submit(send) for _ in range(3)]
        try:
            assert eventually(lambda: statuses.total() > 3)
            disturb()
            enough = statuses.total() + 6
            assert eventually(lambda: statuses.total() > enough)
        finally:
            over.set()
    for each in sent:
        each.result()
    return statuses


def test_a_node_that_drains(fleet: Fleet) -> None:
    """SIGTERM: who waits for a run is answered, new runs go elsewhere, and nobody hears of it."""
    with ThreadPoolExecutor(1) as client:
        waited = client.submit(fleet.post, to="a", entrypoint="sleep 5; echo done")

        def disturb() -> None:
            assert eventually(lambda: fleet.nodes["a"].request("GET", "/health").json()["runs"]["running"])
            assert fleet.nodes["a"].stop() == 0
            fleet.restart("a")

        assert set(steady(fleet, disturb)) == {200}
        assert waited.result().json()["logs"] == ["done"]


@pytest.mark.long
def test_a_reload(fleet: Fleet) -> None:
    """New runs go no more to a node that was taken out; what it has, and who waits through the old worker, is answered."""
    run = fleet.post(to="b", entrypoint=["echo", "1"]).json()["id"]
    server = f"    server b {address(fleet.nodes['b'])}\n"
    with ThreadPoolExecutor(1) as client, contextlib.ExitStack() as stack:
        waited = client.submit(fleet.post, entrypoint="sleep 3; echo done", labels={"test": "reload"})
        assert eventually(lambda: fleet.records("test=reload"))

        def disturb() -> None:
            stack.enter_context(fleet.proxy.changed(server, ""))

        assert set(steady(fleet, disturb)) == {200}
        assert waited.result().json()["logs"] == ["done"]
        assert fleet.proxy.up("new") <= {"a", "c"}
        assert fleet.request("GET", f"/runs/{run}").json()["logs"] == ["1"]
        assert {fleet.post(entrypoint=["true"]).json()["id"][0] for _ in range(4)} <= {"a", "c"}
    fleet.all_up()


# ---------------------------------------------------------------- A client that leaves


def over_tls(fleet: Fleet, fields: dict[str, Any], accept: str = "*/*") -> ssl.SSLSocket:
    """A connection with a request sent."""
    body = json.dumps({"image": IMAGE, "network": "none", **fields}).encode()
    head = f"POST /run HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nAccept: {accept}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    context = ssl.create_default_context(cafile=fleet.certificate)
    connection = context.wrap_socket(socket.create_connection(("127.0.0.1", fleet.proxy.port)), server_hostname="localhost")
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("how", ["closes", "dies", *longer("resets", "leaves events")])
def test_a_client_that_leaves_cancels_its_run(fleet: Fleet, how: str) -> None:
    label = uuid.uuid4().hex
    fields = {"entrypoint": "echo ready; sleep 60", "labels": {"test": label}}
    if how == "dies":
        client: Any = subprocess.Popen(by_curl(fleet, fields))
    else:
        client = over_tls(fleet, fields, "application/x-ndjson" if how == "leaves events" else "*/*")
        if how == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with client:
        ((node, state),) = eventually(lambda: [each for each in fleet.records(f"test={label}") if each[1].get("startedAt")])
        if how == "dies":
            client.kill()
    ended = fleet.nodes[node].wait(state["id"], 5)
    assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled")


# ---------------------------------------------------------------- What an operator sees


def test_what_an_operator_sees(fleet: Fleet) -> None:
    """HAProxy's own figures, each node's, and the client's address in the node's log."""
    own = requests.get(f"http://127.0.0.1:{fleet.proxy.metrics}/metrics", timeout=10).text
    assert re.search(r'haproxy_server_status\{proxy="new",server="a",state="UP"\} 1', own)
    for name in NODES:
        assert "lightrun_engine_up 1" in fleet.request("GET", f"/nodes/{name}/metrics").text
        assert fleet.request("GET", f"/nodes/{name}/health").json()["node"] == name
    unknown = f"a_{uuid.uuid4()}"
    fleet.request("GET", f"/runs/{unknown}", X_Forwarded_For="203.0.113.9")  # forged: HAProxy puts the client's behind it
    (line,) = eventually(lambda: [line for line in fleet.nodes["a"].log().splitlines() if unknown in line])
    assert "INFO 127.0.0.1 GET" in line
    assert "203.0.113.9" not in line
    assert fleet.request("GET", "/openapi.json").json()["openapi"]
    for path in ("/run", "/nodes/a/runs"):
        assert fleet.request("POST" if path == "/run" else "GET", path, token="wrong").status_code == 401


@pytest.mark.long
def test_a_large_body(fleet: Fleet) -> None:
    """More than HAProxy's buffer: sent once, and whole."""
    text = "x" * 3_000_000
    state = fleet.post(entrypoint="wc -c < in", files={"in": text}).json()
    assert state["logs"] == ["3000000"]
    answer = fleet.post(files={"in": text * 4})
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
    answer = fleet.post(files={"in": text}, token="wrong")
    assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
