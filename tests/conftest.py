"""What the tests share: an engine, the zip application, daemons, a callback receiver, and a check that nothing is left.

A test takes `daemon` and calls it: `lightrun = daemon("--max-concurrent", "2")` starts one on a free port with a state
dir, a home and a temporary folder of its own. It ends with the test, and whatever it left is an error.

The whole suite runs in several workers at once (pytest-xdist), which share the engine; a part of it, named by a file or
`-k`, runs in one process. `-n` says otherwise. A test that takes a fixture of its module's scope runs in one worker with
the others that take it, in their order; any other test may run anywhere, beside any. So a test must look at what is its
own: its daemon's containers, not all of them. A test that cannot, because it judges times or ratios that a busy machine
spoils, looks at the whole disk, or changes what the others use, says so:

    @pytest.mark.alone("judges latencies")

While it runs, no other test does; these tests come last, one after the other, and make the suite longer by all they take.
Tests with a `timeout` of their own are taken for the longest, and come first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import email.message
import fcntl
import functools
import http.client
import http.server
import json as jsonlib
import os
import shutil
import signal
import socket as socketlib
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import docker
import hypothesis
import psutil
import pytest

import lightrun
from engine import IMAGE, EngineApi, UnixConnection, engine_host
from images import Registry, user_id_image, user_name_image
from images import free_port as free_port

ROOT = Path(__file__).resolve().parent.parent
LABEL_STATE: str = getattr(lightrun, "LABEL_STATE", "lightrun.state")
LABEL_RUN: str = getattr(lightrun, "LABEL_RUN", "lightrun.run")
NETWORK = "lightrun"
START_SECONDS = 30.0
STOP_SECONDS = 20.0
SETTLE_SECONDS = 20.0
WORKERS = 2 + (os.cpu_count() or 1)  # More than there are cores: a test waits for the engine half of its time.
SESSION_VARIABLE = "LIGHTRUN_TEST_SESSION"
ALONE = "alone"
# In the session's folder, for all workers.
GROUPS_FILE, USERS_FILE, BEFORE_FILE = "groups", "users", "before"
# What a daemon gets of this process's environment; all else is the test's to give.
KEPT_VARIABLES = ("PATH", "LANG", "DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")

# Root that may not do everything.
TAMED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")

# An unclosed file shows in the daemon's log, but is nobody's error when the process ends anyway.
WARNINGS = ("-W", "error", "-W", "default::ResourceWarning")

# A machine with two busy cores misses any deadline now and then.
hypothesis.settings.register_profile("lightrun", deadline=None, print_blob=True)
hypothesis.settings.load_profile("lightrun")


# ---------------------------------------------------------------- Waiting


def eventually(condition: Callable[[], Any], timeout: float = SETTLE_SECONDS, interval: float = 0) -> Any:
    """Call `condition` until what it returns is true, and return that; the last value, true or not, when time is up.

    Without an interval it looks often at first, and then less: what it asks costs the daemon and the engine time.
    """
    began = time.monotonic()
    while not (value := condition()) and (waited := time.monotonic() - began) < timeout:
        time.sleep(min(interval or min(0.02 + waited / 20, 0.15), timeout - waited))
    return value


def longer(*cases: Any) -> list[Any]:
    """These cases of a parametrized test in the long form only."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long) for case in cases]


def certify_localhost(folder: Path) -> None:
    """Make a certificate for localhost that signs itself: the files `cert` and `key`."""
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x -keyout key -out cert"
    subprocess.run([*line.split(), "-addext", "subjectAltName=DNS:localhost"], cwd=folder, check=True, capture_output=True)


# ---------------------------------------------------------------- The session's folder, and nothing left in it


def pytest_configure(config: pytest.Config) -> None:
    """Put every temporary file under one folder, each worker's apart. Names are short: Unix socket paths end at 107 bytes."""
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    if worker is None:
        os.environ[SESSION_VARIABLE] = tempfile.mkdtemp(prefix="lightrun-test-")
    folder = session_folder() / (worker["workerid"] if worker else "main")
    folder.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    config.option.basetemp = session_folder() / f"{folder.name}-pytest"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # So a shell starts what runs in the background; children inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove that folder, after the workers, with pytest's own below it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(session_folder(), ignore_errors=True)


def session_folder() -> Path:
    """The folder of the whole session, which all workers know."""
    return Path(os.environ[SESSION_VARIABLE])


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """For what only one worker may do at a time."""
    with (session_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session when a process, or a file in its temporary folder, outlives its test."""
    yield
    eventually(lambda: not _child_processes())
    assert not _child_processes(), "processes left"
    left = [path.name for path in Path(tempfile.gettempdir()).iterdir()]
    assert not left, "temporary files left"


def _child_processes() -> list[str]:
    children = psutil.Process().children(recursive=True)
    return [f"{child.pid} {child.name()}" for child in children if child.is_running()]


# ---------------------------------------------------------------- Several workers


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several workers, unless the command line picks tests or says how many."""
    option = config.option
    lists = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not getattr(option, "lf", False)
    picked = not lists or option.keyword or option.markexpr not in {"", "not long"}
    if option.numprocesses is None and not (picked or option.usepdb or option.collectonly or hasattr(config, "workerinput")):
        option.numprocesses = WORKERS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, put each group of tests together, and the groups in the order in which they are to be begun."""
    if not hasattr(config, "workerinput"):
        return
    groups = {item.nodeid: _group(item) for item in items}
    members = collections.Counter(groups.values())
    patience = dict.fromkeys(members, 0.0)
    for item in items:
        limit = item.get_closest_marker("timeout")
        patience[groups[item.nodeid]] = max(patience[groups[item.nodeid]], limit.args[0] if limit else 0)
    names = sorted(members, key=lambda name: (name == ALONE, -patience[name], -members[name]))
    order = {name: number for number, name in enumerate(names)}
    items.sort(key=lambda item: order[groups[item.nodeid]])
    with exclusive("order"):  # All workers write the same.
        (session_folder() / GROUPS_FILE).write_text(jsonlib.dumps(groups))


def _group(item: pytest.Item) -> str:
    """What a test shares a worker with: those that are to be alone, those that take fixtures of its module's, or nothing."""
    if item.get_closest_marker(ALONE):
        return ALONE
    module = item.nodeid.partition("::")[0]
    assert isinstance(item, pytest.Function)
    definitions = [each[-1] for each in item._fixtureinfo.name2fixturedefs.values()]
    return module if any(each.scope == "module" and each.baseid == module for each in definitions) else item.nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out the groups in the order of the tests: like `--dist loadgroup`, but the group is not in the test's name."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda test: _recorded_groups()[test]
    return scheduler


@functools.cache
def _recorded_groups() -> dict[str, str]:
    groups: dict[str, str] = jsonlib.loads((session_folder() / GROUPS_FILE).read_text())
    return groups


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let no test run beside one that is to be alone. Outside of everything, so that no time limit counts the waiting."""
    alone = item.get_closest_marker(ALONE) is not None
    with (session_folder() / "room.lock").open("w") as room:
        with exclusive("gate"):  # Held while waiting for the room: who wants to be alone is not overtaken for ever.
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


# ---------------------------------------------------------------- The engine


@pytest.fixture(scope="session")
def engine_api() -> EngineApi:
    """A running engine with IMAGE on it, brought up when need be. Fails when none can be had."""
    with exclusive("engine"):
        done = subprocess.run([sys.executable, ROOT / "tests/engine.py"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(done.stderr, pytrace=False)
    return EngineApi()


@pytest.fixture(scope="session")
def engine(engine_api: EngineApi) -> Iterator[docker.APIClient]:
    """The engine through the docker SDK; at its end, whatever the tests left on it is an error."""
    client = docker.APIClient(engine_host(), version="auto")
    before = session_folder() / BEFORE_FILE
    try:
        with exclusive("engine"):
            if _engine_users(+1) == 1:
                networks = _network_names(client)
                before.write_text(jsonlib.dumps([sorted(networks), sorted(_dangling_volumes(client))]))
                if NETWORK not in networks:  # Else many daemons would make it at once. test_socket.py has two that do.
                    client.create_network(NETWORK, "bridge", lightrun.NETWORK_OPTIONS, labels={LABEL_STATE: ""})
        yield client
        containers = [entry["Names"] for entry in Daemon.all_containers(client)]
        with exclusive("engine"):
            if _engine_users(-1) == 0:  # The other workers need it no more: networks and volumes of theirs are gone too.
                _assert_left_as_it_was(client, *map(set, jsonlib.loads(before.read_text())))
        assert not containers, "containers left"
    finally:
        client.close()


def _engine_users(change: int) -> int:
    """How many workers have the engine in use, after a change."""
    file = session_folder() / USERS_FILE
    count = int(file.read_text() if file.exists() else 0) + change
    file.write_text(str(count))
    return count


def _assert_left_as_it_was(client: docker.APIClient, networks: set[str], volumes: set[str]) -> None:
    """There are no more networks and volumes than there were."""
    if NETWORK not in networks:
        with contextlib.suppress(docker.errors.APIError):  # Never made, or another session's daemon uses it by now.
            client.remove_network(NETWORK)
    assert not {name for name in _network_names(client) - networks - {NETWORK} if name.startswith("lightrun")}
    # Another user's run may have a volume between two containers of its own: look again before calling it ours.
    eventually(lambda: not _dangling_volumes(client) - volumes)
    assert not _dangling_volumes(client) - volumes, "volumes left"


@pytest.fixture(scope="session")
def uid_image(engine_api: EngineApi) -> str:
    """An image that runs as user 1000, by number."""
    with exclusive("engine"):
        return user_id_image(engine_api)


@pytest.fixture(scope="session")
def user_image(engine_api: EngineApi) -> str:
    """An image that runs as user `app`, by name, in a work directory that belongs to root."""
    with exclusive("engine"):
        return user_name_image(engine_api)


@pytest.fixture
def registry(engine: docker.APIClient) -> Iterator[Registry]:
    """A registry that takes everybody."""
    with Registry() as started:
        yield started


@pytest.fixture
def private_registry(engine: docker.APIClient) -> Iterator[Registry]:
    """A registry that asks for a name and a password."""
    with Registry("someone", "correct horse") as started:
        yield started


def _network_names(client: docker.APIClient) -> set[str]:
    return {str(network["Name"]) for network in client.networks()}


def _dangling_volumes(client: docker.APIClient) -> set[str]:
    return {str(volume["Name"]) for volume in client.volumes(filters={"dangling": True})["Volumes"] or ()}


# ---------------------------------------------------------------- The daemon


@pytest.fixture(scope="session")
def built() -> Path:
    """lightrun.pyz, built once from the working tree, in a place where no later build replaces it under a running daemon."""
    copy = session_folder() / "lightrun.pyz"
    with exclusive("build"):
        if not copy.exists():
            done = subprocess.run([sys.executable, ROOT / "build_zipapp.py"], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.fail(done.stderr, pytrace=False)
            shutil.copy2(ROOT / "lightrun.pyz", copy)
    return copy


@pytest.fixture(scope="session")
def pyz(built: Path) -> Path:
    """What daemons run: what is in lightrun.pyz, unpacked and compiled once, since each start compiles it all otherwise."""
    folder = session_folder() / "lightrun"
    with exclusive("build"):
        if not folder.exists():
            with zipfile.ZipFile(built) as archive:
                archive.extractall(folder)
            shutil.rmtree(folder / "lightrun")  # which is there for zips; the module beside it is the same
            subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Response:
    """An HTTP answer, read to its end."""

    status: int
    headers: email.message.Message
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return jsonlib.loads(self.body)

    @property
    def text(self) -> str:
        """The body as UTF-8 text."""
        return self.body.decode()


class Daemon:
    """One lightrun process, and a client for it. `start` may follow `stop` and `kill`: same state dir, same address."""

    # The state ids of every daemon of this session: by them the final check knows our containers from other people's.
    state_ids: ClassVar[set[str]] = set()

    def __init__(
        self, pyz: Path, client: docker.APIClient, options: tuple[str, ...], *, socket: bool = False,
        env: Mapping[str, str] | None = None, state_dir: Path | None = None, python: str | Path = sys.executable,
    ) -> None:  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(prefix="d-"))
        self.home, self.temporary = self.folder / "home", self.folder / "tmp"
        self.home.mkdir()
        self.temporary.mkdir()
        self.state_dir = state_dir or self.folder / "state"
        self.socket = self.folder / "s" if socket else None
        self.port = 0 if socket else free_port()
        self.url = "" if socket else f"http://127.0.0.1:{self.port}"
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        threads = {"LIGHT_RUN_MAX_WAITING": "32"}  # as many as by default would take a third of the time to start
        self.env = {**kept, **threads, "HOME": str(self.home), "TMPDIR": str(self.temporary), **(env or {})}
        address = ["--socket", str(self.socket)] if socket else ["--port", str(self.port)]
        state = [] if "--state-dir" in options else ["--state-dir", str(self.state_dir)]
        self.command = [str(python), *WARNINGS, str(pyz), "serve", *address, *state, *options]
        self.token = options[options.index("--token") + 1] if "--token" in options else self.env.get("LIGHT_RUN_TOKEN")
        self.may_log_tracebacks = False
        # What `run` and `detach` ask for, unless told otherwise. A network is a third of what a run costs.
        self.fields: dict[str, Any] = {"image": IMAGE, "network": "none"}
        self._client = client
        self._own_ids: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None

    # Its life

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The latest process, running or not."""
        assert self._process is not None, "the daemon was never started"
        return self._process

    @property
    def pid(self) -> int:
        """The latest process's id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, wait: bool = True) -> Daemon:
        """Start the process; return when it answers /health with any status, or at once without `wait`."""
        assert not self.running, "the daemon is running"
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        if wait and not eventually(lambda: not self.running or self.healthy(), START_SECONDS):
            raise AssertionError(f"the daemon does not answer:\n{self.log()}")
        assert not wait or self.running, f"the daemon ended with {self.process.returncode}:\n{self.log()}"
        return self

    def healthy(self) -> bool:
        """Whether /health gives an answer."""
        try:
            return self.request("GET", "/health", timeout=5).status in (200, 503)
        except (OSError, http.client.HTTPException):
            return False

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def log(self) -> str:
        """What every process of this daemon has written to standard output and standard error."""
        return (self.folder / "log").read_text(errors="replace")

    # Talking to it

    def request(
        self, method: str, path: str, json: Any = None, body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None, timeout: float = 60,
    ) -> Response:  # fmt: skip
        """Send one request and read the answer. `json` brings its Content-Type, `body` does not. No token is added."""
        with self.open(method, path, json, body, headers, timeout) as response:
            return Response(response.status, response.headers, response.read())

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, json: Any = None, body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None, timeout: float = 60,
    ) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
        """Like `request`, but hand out the answer as soon as its headers are there, to read it as it comes."""
        sent = dict(headers or {})
        if json is not None:
            body = jsonlib.dumps(json).encode()
            sent = {"Content-Type": "application/json", **sent}
        connection = self._connection(timeout)
        try:
            connection.request(method, path, body, sent)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def connect(self, timeout: float = 30) -> socketlib.socket:
        """A raw connection, for what an HTTP client would not send. The caller closes it."""
        connection = self._connection(timeout)
        connection.connect()
        return connection.sock

    def online(self) -> Daemon:
        """Let `run` and `detach` ask for the usual network."""
        del self.fields["network"]
        return self

    def run(self, **fields: Any) -> dict[str, Any]:
        """POST /run and return the final state."""
        response = self.request("POST", "/run", json={**self.fields, **fields}, headers=self._authorization())
        assert response.status == 200, response.text
        state: dict[str, Any] = response.json()
        return state

    def detach(self, **fields: Any) -> str:
        """POST /run, detached, and return the run's id."""
        fields = {**self.fields, "detached": True, **fields}
        response = self.request("POST", "/run", json=fields, headers=self._authorization())
        assert response.status == 202, response.text
        return str(response.json()["id"])

    def state(self, run: str) -> dict[str, Any]:
        """The state of a run."""
        response = self.request("GET", f"/runs/{run}", headers=self._authorization())
        assert response.status == 200, response.text
        state: dict[str, Any] = response.json()
        return state

    def wait(self, run: str, timeout: float = 30) -> dict[str, Any]:
        """Poll a run until it is no longer running, and return its state."""
        return self.wait_for(run, lambda state: state["status"] != "running", timeout)

    def wait_for(self, run: str, reached: Callable[[dict[str, Any]], Any], timeout: float = 30) -> dict[str, Any]:
        """Poll a run until `reached(state)`, and return that state."""
        state: dict[str, Any] = {}

        def look() -> bool:
            state.clear()
            state.update(self.state(run))
            return bool(reached(state))

        assert eventually(look, timeout), f"run {run} is still {state}\n{self.log()}"
        return state

    # What it leaves

    def containers(self) -> list[dict[str, Any]]:
        """This daemon's containers on the machine's engine, in any state, as the engine lists them."""
        return [entry for entry in _labelled(self._client) if self._owns(entry["Labels"][LABEL_STATE])]

    @classmethod
    def all_containers(cls, client: docker.APIClient) -> list[dict[str, Any]]:
        """The containers of every daemon of this session."""
        return [entry for entry in _labelled(client) if entry["Labels"][LABEL_STATE] in cls.state_ids]

    def close(self) -> None:
        """Stop the daemon and remove everything of it; raise AssertionError for what should not have been there."""
        try:
            problems = [*self._leaked_containers(), *self._stop_problems(), *self._logged_tracebacks()]
        finally:
            self._remove()
        assert not problems, "\n".join(problems)

    def _remove(self) -> None:
        if self.running:
            self.kill()
        for entry in self.containers():
            with contextlib.suppress(docker.errors.NotFound):
                self._client.remove_container(entry["Id"], v=True, force=True)
        for root in set(lightrun.cgroup_mounts().values()):  # the slots of one that was killed
            for state in self._own_ids:
                for folder in (*(root / "lightrun" / state[:12]).glob("[0-9]*"), root / "lightrun" / state[:12]):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
        shutil.rmtree(self.folder)

    def _leaked_containers(self) -> list[str]:
        """A run that has ended has no container; its removal follows the answer, and gets some time."""
        if not self.running:
            return []
        self.process.send_signal(signal.SIGCONT)
        idle: list[str] = []

        def clean() -> bool:
            idle[:] = self._idle_containers()  # of one look: a run that ends after it has its time, too
            return not idle

        eventually(clean)
        return [f"the container of run {run} leaked: {self._story(run)}" for run in idle]

    def _story(self, run: str) -> str:
        """What the engine and the daemon say of a run whose container leaked."""
        state = [entry["Status"] for entry in self.containers() if entry["Labels"].get(LABEL_RUN) == run]
        return "\n".join([f"{state}, {self.request('GET', f'/runs/{run}', headers=self._authorization()).body!r}", self.log()])

    def _idle_containers(self) -> list[str]:
        try:
            response = self.request("GET", "/runs?status=running&limit=1000", headers=self._authorization())
        except (OSError, http.client.HTTPException):
            return []
        running = {state["id"] for state in response.json()} if response.status == 200 else set()
        cold = [entry for entry in self.containers() if not entry["Command"].startswith(lightrun.SHIM)]  # the others may wait
        return [run for entry in cold if (run := entry["Labels"].get(LABEL_RUN)) not in running]

    def _stop_problems(self) -> list[str]:
        if not self.running:
            return []
        try:
            code = self.stop()
        except subprocess.TimeoutExpired:
            return [f"SIGTERM did not end the daemon:\n{self.log()}"]
        problems = [] if code == 0 else [f"SIGTERM ended the daemon with {code}:\n{self.log()}"]
        warm = [entry["Status"] for entry in self.containers() if entry["Command"].startswith(lightrun.SHIM)]
        return problems + ([f"warm containers left: {warm}\n{self.log()}"] if warm else [])

    def _logged_tracebacks(self) -> list[str]:
        if self.may_log_tracebacks or self._process is None or "Traceback" not in self.log():
            return []
        return [f"the log holds a traceback:\n{self.log()}"]

    def _owns(self, state_id: str) -> bool:
        """Whether a container's label names this daemon's state dir: then the id stands in one of the files there."""
        if state_id in self._own_ids:
            return True
        files = [path for path in self.state_dir.glob("*") if path.is_file()] if self.state_dir.is_dir() else []
        if not any(state_id.encode() in path.read_bytes() for path in files):
            return False
        self._own_ids.add(state_id)
        self.state_ids.add(state_id)
        return True

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self.socket:
            return UnixConnection(str(self.socket), timeout)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)


class DaemonFactory(Protocol):
    """What the `daemon` fixture is."""

    def __call__(
        self, *options: str, socket: bool = False, env: Mapping[str, str] | None = None, state_dir: Path | None = None,
        python: str | Path = sys.executable, start: bool = True,
    ) -> Daemon: ...  # fmt: skip


@pytest.fixture
def daemon(pyz: Path, engine: docker.APIClient) -> Iterator[DaemonFactory]:
    """A function that starts daemons; all end with the test."""
    with _daemon_factory(pyz, engine) as make:
        yield make


@pytest.fixture(scope="module")
def module_daemon(pyz: Path, engine: docker.APIClient) -> Iterator[DaemonFactory]:
    """The same for daemons that the tests of a module share."""
    with _daemon_factory(pyz, engine) as make:
        yield make


@contextlib.contextmanager
def _daemon_factory(pyz: Path, engine: docker.APIClient) -> Iterator[DaemonFactory]:
    made: list[Daemon] = []

    def make(
        *options: str, socket: bool = False, env: Mapping[str, str] | None = None, state_dir: Path | None = None,
        python: str | Path = sys.executable, start: bool = True,
    ) -> Daemon:  # fmt: skip
        made.append(Daemon(pyz, engine, options, socket=socket, env=env, state_dir=state_dir, python=python))
        return made[-1].start() if start else made[-1]

    with contextlib.ExitStack() as stack:
        yield make
        for each in made:
            stack.callback(each.close)


# In a script: wait to be released.
HELD = "until test -e /released; do sleep 0.1; done"


def release(client: docker.APIClient, run: str) -> None:
    """Let the script of a run that is HELD go on."""
    client.exec_start(client.exec_create(f"lightrun-{run}", ["touch", "/released"])["Id"])


def _labelled(client: docker.APIClient) -> list[dict[str, Any]]:
    return list(client.containers(all=True, filters={"label": LABEL_STATE}))


# ---------------------------------------------------------------- A receiver of callbacks


@dataclasses.dataclass(frozen=True)
class Received:
    """A request that the receiver got; `time` is time.monotonic() when its body was complete."""

    method: str
    path: str
    headers: email.message.Message
    body: bytes
    time: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the receiver says to one request: after `delay` seconds, `status`, or no answer at all when that is 0."""

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0
    body: bytes = b""


class Receiver:
    """An HTTP server on 127.0.0.1 that records what it gets. It answers with `answers` in turn, then with `default`."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.answers: collections.deque[Answer] = collections.deque()
        self.default = Answer()
        self._closing = threading.Event()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Every method is the same to it."""

            def do_POST(self) -> None:
                receiver._handle(self)

            do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = True
        self._server.daemon_threads = False
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def answer(
        self, status: int = 200, headers: Mapping[str, str] | None = None, delay: float = 0, body: bytes = b""
    ) -> None:
        """Queue an answer for one request."""
        self.answers.append(Answer(status, headers or {}, delay, body))

    def wait(self, count: int = 1, timeout: float = 15) -> list[Received]:
        """Return the requests once there are `count`."""
        assert eventually(lambda: len(self.requests) >= count, timeout), f"{len(self.requests)} requests, not {count}"
        return list(self.requests)

    def close(self) -> None:
        """Stop listening; delayed answers are given at once. Connections are refused from now on."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        if len(body) < length:  # Whoever sent it was killed.
            return
        answer = self.answers.popleft() if self.answers else self.default
        self.requests.append(Received(handler.command, handler.path, handler.headers, body, time.monotonic()))
        self._closing.wait(answer.delay)
        if not answer.status:
            return
        with contextlib.suppress(OSError):  # The client did not wait.
            handler.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(answer.body)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of callbacks."""
    started = Receiver()
    yield started
    started.close()
