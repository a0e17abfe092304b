"""What lightrun costs: `python3 tests/benchmark.py [--short] [--json FILE] [--only NAME …]` prints a table of measurements.

It needs an engine, Python's standard library and the docker SDK; without the SDK it goes on in the tests' `.venv`. The
daemons under test run from lightrun.pyz, with state dirs of their own. What is compared is measured in turn, so that a
machine's drift cancels, and a ratio is the median of the ratios of neighbours. Nothing is judged here: the column `bar`
says what the project wants to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.client
import io
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import docker
except ImportError:  # Not the tests' Python: go on in theirs.
    python = str(Path(sys.path[0], ".venv/bin/python"))
    os.execv(python, [python, *sys.argv])

import psutil

import lightrun
from engine import IMAGE, EngineApi, EngineError, UnixConnection, engine_host, ensure_engine, ensure_image

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024
PYTHON_IMAGE = "lightrun/python:latest"
START_SECONDS = 30.0
SETTLE_SECONDS = 180.0
POLL_SECONDS = 0.003
PYTHON: dict[str, Any] = {"image": PYTHON_IMAGE, "entrypoint": ["python3", "-c", "print(1)"]}
PLAIN: dict[str, Any] = {"image": IMAGE, "entrypoint": ["true"]}
FILES: dict[str, Any] = {"image": IMAGE, "files": {"in": "hello\n"}, "entrypoint": ["cp", "in", "out"], "extract": ["out"]}
LIMITS = (
    "--init", "--network", "lightrun", "--memory", "512m", "--memory-swap", "512m", "--cpus", "1", "--pids-limit", "100",
    "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
)  # fmt: skip


class BenchmarkError(Exception):
    """What was measured did not happen."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is the value to the baseline's, pair by pair."""

    what: str
    value: float
    unit: str
    against: str = ""
    baseline: float | None = None
    ratio: float | None = None
    bar: str = ""


def compare(what: str, ours: Sequence[float], against: str, theirs: Sequence[float], unit: str = "ms", bar: str = "") -> Row:
    """The row of two series that were measured in turn."""
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return Row(what, statistics.median(ours), unit, against, statistics.median(theirs), ratio, bar)


def rate(size: int, call: Callable[[], object]) -> float:
    """How many MB a second a call moves that moves `size` bytes."""
    return size / 1e3 / milliseconds(call)


def in_turn(rounds: int, calls: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Make every call once a round, each round beginning with another one; what they return, by name."""
    names = list(calls)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(calls[name]())
    return measured


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def until(condition: Callable[[], Any], what: str, seconds: float = SETTLE_SECONDS) -> None:
    """Wait for something. Raises BenchmarkError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what}: not within {seconds:g} s")
        time.sleep(POLL_SECONDS)


# ---------------------------------------------------------------- Daemons and clients


class Client:
    """One connection to a daemon, kept open."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def open(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the answer, to be read."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, body, headers)
        with self._connection.getresponse() as response:
            yield response

    def call(self, method: str, path: str, value: Any = None) -> Any:
        """Send a request; the JSON of the answer, None for an empty one. Raises BenchmarkError for a refusal."""
        with self.open(method, path, None if value is None else json.dumps(value).encode()) as response:
            answer = response.read()
        if response.status >= 400:
            raise BenchmarkError(f"{method} {path}: {response.status} {answer.decode(errors='replace')}")
        return json.loads(answer) if answer else None

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run a request to its end; its state. Raises BenchmarkError when the run fails or keeps nothing."""
        state: dict[str, Any] = self.call("POST", "/run", request)
        if request.get("detached"):
            state = self.call("GET", f"{state['url']}?wait=60000")
        if state["status"] != "succeeded" or ("extract" in request and not state.get("artifacts")):
            raise BenchmarkError(f"a run failed: {state}")
        return state


class Daemon:
    """One lightrun from the zip, on TCP or on a Unix socket."""

    def __init__(self, pyz: Path, options: Sequence[str] = (), *, unix: bool = False, state_dir: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="b-"))  # a short name: socket paths end at 107 bytes
        self.state_dir = state_dir or self.folder / "state"
        self.unix = unix
        self._port = 0
        if not unix:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = int(probe.getsockname()[1])
        address = ["--socket", str(self.folder / "s")] if unix else ["--port", str(self._port)]
        self._command = [sys.executable, str(pyz), "serve", *address, "--state-dir", str(self.state_dir), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; the ms until it answers /health."""
        began = time.perf_counter()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._answers, f"the first answer of {self._command}, which wrote {self.log()}", START_SECONDS)
        return (time.perf_counter() - began) * 1000

    def stop(self) -> None:
        """End it, with patience."""
        if self._process:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)
            self._process = None

    def log(self) -> str:
        """The end of what it wrote."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    @property
    def url(self) -> str:
        """Where it listens on TCP."""
        return f"http://127.0.0.1:{self._port}"

    def client(self) -> Client:
        """A new connection."""
        if self.unix:
            return Client(UnixConnection(str(self.folder / "s"), SETTLE_SECONDS))
        return Client(http.client.HTTPConnection("127.0.0.1", self._port, timeout=SETTLE_SECONDS))

    def _answers(self) -> bool:
        try:
            with self.client() as client, client.open("GET", "/health") as response:
                return response.status == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def state_id(self) -> str:
        """What its containers are labelled with."""
        with contextlib.closing(sqlite3.connect(self.state_dir / "lightrun.db")) as database:
            return str(database.execute("SELECT value FROM meta WHERE name = 'state'").fetchone()[0])

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    def cpu(self) -> float:
        """Milliseconds of CPU that it has used, in steps of 10."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")

    def memory(self, line: str = "VmRSS") -> float:
        """MB of memory that it has, or with `VmHWM` had at most."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(text.split()[1]) for text in status.splitlines() if text.startswith(line)) * 1024 / 1e6

    def forget_peak(self) -> None:
        """Let the peak of its memory begin anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def holds(self) -> dict[str, float]:
        """Memory, threads and descriptors."""
        process = Path(f"/proc/{self.pid}")
        threads, descriptors = (sum(1 for _ in (process / name).iterdir()) for name in ("task", "fd"))
        return {"MB": self.memory(), "threads": threads, "descriptors": descriptors}


class Bench:
    """What the measurements share: the daemons, the engine, and whether to be short."""

    def __init__(self, pyz: Path, short: bool) -> None:
        self.pyz, self.short = pyz, short
        host = engine_host()
        self.api = docker.APIClient(host, version="auto", timeout=60)
        self.api.trust_env = False
        self.engine_label = uuid.uuid4().hex
        self.settings = lightrun.Settings()
        self.engine = lightrun.Engine(self.settings, self.engine_label)
        self.image = self.engine.image(IMAGE)
        self._labels = [self.engine_label]
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the daemons, then remove what containers are left."""
        try:
            self._opened.close()
        finally:
            for label in self._labels:
                for container in self.containers(label):
                    self.api.remove_container(container, v=True, force=True)
            self.api.close()

    def pick(self, short: int, long: int) -> int:
        """A number of something, by the form that was asked for."""
        return short if self.short else long

    def daemon(self, *options: str, unix: bool = False, state_dir: Path | None = None) -> Daemon:
        """A daemon that runs, until it is stopped or everything ends."""
        daemon = Daemon(self.pyz, options, unix=unix, state_dir=state_dir)
        self._opened.callback(daemon.stop)
        daemon.start()
        self._labels.append(daemon.state_id)
        return daemon

    @functools.cached_property
    def tcp(self) -> Daemon:
        """The daemon on TCP that most measurements use."""
        return self.daemon()

    @functools.cached_property
    def unix(self) -> Daemon:
        """The one on a Unix socket."""
        return self.daemon(unix=True)

    def containers(self, label: str) -> list[str]:
        """The ids of all containers of a state dir."""
        found = self.api.containers(all=True, quiet=True, filters={"label": [f"lightrun.state={label}"]})
        return [about["Id"] for about in found]

    def run(self, daemon: Daemon, client: Client, request: Mapping[str, Any]) -> float:
        """The ms of one run. The next thing begins when its container has gone, which the client need not wait for."""
        took = milliseconds(lambda: client.run(request))
        until(lambda: not self.containers(daemon.state_id), "the removal of a container")
        return took

    def request(self, body: Mapping[str, Any]) -> lightrun.RunRequest:
        """What lightrun makes of a body."""
        return lightrun.RunRequest.parse(json.dumps(body).encode(), self.settings)

    def bare_run(self, request: lightrun.RunRequest, slot: lightrun.Slot | None = None) -> tuple[float, float]:
        """The ms of the engine calls of a run, in a straight line: all of them, and without the removal at the end. With
        what counts its usage, if there is a slot."""
        began = time.perf_counter()
        container = self.engine.create(str(uuid.uuid4()), self.image, request, slot.parent if slot else "")
        if request.files:
            root = str(request.workdir)[1:]
            contents = {f"{root}/{path}": data for path, data in request.files.items() if isinstance(data, bytes)}
            entries = [lightrun.Entry(path, content=data, size=len(data)) for path, data in contents.items()]
            tar = b"".join(
                lightrun.put_tar(entries, (0, 0), lightrun.Tree(request, None, ROOT, lambda _: []).pieces, time.time())
            )
            self.api.put_archive(container, "/", tar)
        output = self.api.attach(container, stream=True)
        if slot:
            slot.begin()
        self.api.start(container)
        if slot:
            slot.started()
        for _ in output:
            pass
        code = self.api.wait(container)["StatusCode"]
        if slot and set(slot.usage()) != {"cpuMs", "memoryPeakBytes"}:
            raise BenchmarkError("the usage of a bare run cannot be had")
        for path, _ in request.extract:
            pieces, _ = self.api.get_archive(container, f"{request.workdir}/{path}")
            with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
                archive.getmembers()
        kept = (time.perf_counter() - began) * 1000
        self.api.remove_container(container, v=True, force=True)
        if code != 0:
            raise BenchmarkError(f"a bare run ended with {code}")
        return (time.perf_counter() - began) * 1000, kept

    def docker_run(self, request: Mapping[str, Any] = PLAIN) -> float:
        """The ms of `docker run --rm` with lightrun's limits."""
        label = f"--label=lightrun.state={self.engine_label}"
        return milliseconds(lambda: self.docker("run", "--rm", label, *LIMITS, request["image"], *request["entrypoint"]))

    def has_python(self) -> bool:
        """Whether there is an image of Debian's Python; made of its packages when there is none and there is time."""
        api = EngineApi()
        if not self.short and not api.inspect_image(PYTHON_IMAGE) and shutil.which("debootstrap"):
            with tempfile.TemporaryDirectory(prefix="python-") as root:
                packages = ["debootstrap", "--variant=minbase", "--include=python3", "stable", root]
                subprocess.run(packages, stdout=subprocess.DEVNULL, check=True)
                archive = subprocess.run(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE, check=True).stdout
            api.import_image(archive, PYTHON_IMAGE, [])
        return bool(api.inspect_image(PYTHON_IMAGE))

    @staticmethod
    def docker(*arguments: str) -> None:
        """The command line client."""
        done = subprocess.run(["docker", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchmarkError(f"docker {arguments[0]}: {done.stderr}")


# ---------------------------------------------------------------- The measurements


def measure_runs(bench: Bench) -> list[Row]:
    """One run at a time, against the bare engine calls and `docker run`."""
    kept: dict[str, list[float]] = {"files": [], "plain": []}
    requests = {"files": FILES, "plain": PLAIN}
    parsed = {name: bench.request(body) for name, body in requests.items()}

    def bare(name: str) -> float:
        whole, without_removal = bench.bare_run(parsed[name])
        kept[name].append(without_removal)
        return whole

    slots = lightrun.Slots(bench.engine, bench.engine_label)
    slot = slots.take()
    with bench.tcp.client() as tcp, bench.unix.client() as unix:
        calls: dict[str, Callable[[], float]] = {}
        for name, body in requests.items():
            calls[f"{name} tcp"] = functools.partial(bench.run, bench.tcp, tcp, body)
            calls[f"{name} bare"] = functools.partial(bare, name)
            calls[f"{name} unix"] = functools.partial(bench.run, bench.unix, unix, body)
        calls["docker run"] = bench.docker_run
        calls["metered"] = lambda: bench.bare_run(parsed["plain"], slot)[0]
        in_turn(1, calls)
        for warm in kept.values():
            warm.clear()
        took = in_turn(bench.pick(1, 30), calls)
    rows = []
    for name, transport in itertools.product(requests, ("tcp", "unix")):
        what, ours = f"{name} run, {transport}", took[f"{name} {transport}"]
        rows.append(compare(what, ours, "bare calls", took[f"{name} bare"], bar="≤ 1.05"))
        rows.append(compare(what, ours, "bare calls but the removal", kept[name]))
    for transport in ("tcp", "unix"):
        row = compare(f"plain run, {transport}", took[f"plain {transport}"], "docker run --rm", took["docker run"])
        rows.append(dataclasses.replace(row, bar="≤ 1.0"))
    if slot:
        slots.give_back(slot)
        slots.sweep()
        rows.append(compare("plain bare calls with usage", took["metered"], "without", took["plain bare"], bar="≤ 1.02"))
    return rows


def drive(clients: int, runs: int, make: Callable[[contextlib.ExitStack], Callable[[], object]]) -> tuple[float, int]:
    """Make `runs` calls from as many threads as there are clients: the seconds that took, and how many failed."""
    numbers = iter(range(runs))
    lock, failures = threading.Lock(), []

    def client() -> None:
        with contextlib.ExitStack() as opened:
            call = make(opened)
            while True:
                with lock:
                    if next(numbers, None) is None:
                        return
                try:
                    call()
                except (BenchmarkError, OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
                    failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, len(failures)


def measure_warm(bench: Bench) -> list[Row]:
    """Runs in warm containers, of which there are four of an image before each, and what these cost while they wait."""
    pool, images = 4, [IMAGE, *[PYTHON_IMAGE] * bench.has_python()]
    warm = bench.daemon(*(word for image in images for word in ("--warm", f"{image}={pool}")))

    def waiting(image: str = "") -> list[str]:
        names = {"label": [f"lightrun.state={warm.state_id}"], "status": ["running"], **({"ancestor": image} if image else {})}
        return [about["Id"] for about in bench.api.containers(filters=names) if about["Command"].startswith(lightrun.SHIM)]

    def fill() -> None:
        full = pool * len(images)
        until(lambda: len(waiting()) == full and len(bench.containers(warm.state_id)) == full, "pools that are full")
        time.sleep(0.2)

    def run(client: Client, request: Mapping[str, Any]) -> float:
        fill()
        state: dict[str, Any] = {}
        took = milliseconds(lambda: state.update(client.run(request)))
        if not state.get("warm"):
            raise BenchmarkError(f"a run started cold: {state}")
        return took

    with warm.client() as client, bench.tcp.client() as cold:
        requests = {"plain": PLAIN, "files": FILES, "detached": {**PLAIN, "detached": True}}
        calls: dict[str, Callable[[], float]] = {"docker run": bench.docker_run}
        for name, request in requests.items():
            calls[name] = functools.partial(run, client, request)
            calls[f"{name}, cold"] = functools.partial(bench.run, bench.tcp, cold, request)
        if PYTHON_IMAGE in images:
            calls |= {"python": lambda: run(client, PYTHON), "docker run python": lambda: bench.docker_run(PYTHON)}
        in_turn(1, calls)
        took = in_turn(bench.pick(1, 40), calls)
    fill()
    time.sleep(1)
    figures = [_processes_of(set(waiting(IMAGE)))]
    time.sleep(10)
    figures.append(_processes_of(set(waiting(IMAGE))))
    rates = in_turn(bench.pick(1, 5), {"warm": lambda: _steady_rate(bench, warm), "cold": lambda: _steady_rate(bench, bench.tcp)})
    warm.stop()
    rows = [
        compare("plain run, warm", took["plain"], "docker run --rm", took["docker run"], bar="≤ 0.20"),
        compare("run with files, warm", took["files"], "docker run --rm", took["docker run"], bar="≤ 0.40"),
        *(compare(f"{name} run, warm", took[name], "cold", took[f"{name}, cold"]) for name in requests),
        Row(f"memory of {pool} warm containers", figures[1][0], "MB", bar="≤ 40 MB"),
        Row(f"CPU in 10 s of {pool} warm containers", figures[1][1] - figures[0][1], "ms", bar="≤ 10 ms"),
        compare("8 clients with pools", rates["warm"], "without", rates["cold"], "runs/s", "≥ 1.0"),
    ]
    if "python" in took:
        rows.append(compare("Python run, warm", took["python"], "docker run --rm", took["docker run python"], bar="≤ 0.22"))
    return rows


def measure_exec(bench: Bench) -> list[Row]:
    """The loop of an agent: snippets one after the other in one run, beside `docker exec` in the same container."""
    daemon = bench.daemon()
    with daemon.client() as client:
        run = client.call("POST", "/run", {"image": IMAGE, "detached": True, "idle": 600_000})["id"]
        until(lambda: client.call("GET", f"/runs/{run}").get("phase") == "running", "a run that waits")
        (container,) = bench.containers(daemon.state_id)

        def command() -> None:
            if (answer := client.call("POST", f"/runs/{run}/exec", {"entrypoint": ["true"]})).get("exitCode") != 0:
                raise BenchmarkError(f"a command failed: {answer}")

        calls = {
            "exec": lambda: milliseconds(command), "docker run": bench.docker_run,
            "docker exec": lambda: milliseconds(lambda: bench.docker("exec", container, "true")),
        }  # fmt: skip
        in_turn(1, calls)
        took = in_turn(bench.pick(1, 30), calls)
        client.call("POST", f"/runs/{run}/cancel")
    daemon.stop()
    return [
        compare("command in a run that stays", took["exec"], "docker run --rm", took["docker run"], bar="≤ 0.25"),
        compare("command in a run that stays", took["exec"], "docker exec", took["docker exec"]),
    ]


def _steady_rate(bench: Bench, daemon: Daemon) -> float:
    """Plain runs a second of eight clients that have begun already."""

    def client(opened: contextlib.ExitStack) -> Callable[[], object]:
        return functools.partial(opened.enter_context(daemon.client()).run, PLAIN)

    for runs in (8, bench.pick(8, 64)):
        seconds, failures = drive(8, runs, client)
        if failures:
            raise BenchmarkError(f"{failures} runs failed")
    return runs / seconds


def _processes_of(containers: set[str]) -> tuple[float, float]:
    """MB that only they hold and ms of CPU so far, of all processes of containers and of those that watch over them."""
    memory, cpu = 0.0, 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "-id" in words and words[words.index("-id") + 1] in containers:
                for each in [process, *process.children(recursive=True)]:
                    memory += each.memory_full_info().uss / 1e6
                    cpu += 1000 * sum(each.cpu_times()[:2])
    return memory, cpu


def measure_throughput(bench: Bench) -> list[Row]:
    """Runs a second of parallel clients, until the last container has gone, against as many `docker run --rm`."""
    rows = []

    def client(opened: contextlib.ExitStack) -> Callable[[], object]:
        return functools.partial(opened.enter_context(bench.tcp.client()).run, PLAIN)

    for clients in (4,) if bench.short else (1, 2, 4, 8, 16):
        runs = bench.pick(clients, max(16, 2 * clients))
        failed = {"lightrun": 0, "docker": 0}

        def lightrun_runs(clients: int = clients, runs: int = runs, failed: dict[str, int] = failed) -> float:
            seconds, failures = drive(clients, runs, client)
            seconds += milliseconds(lambda: until(lambda: not bench.containers(bench.tcp.state_id), "removals")) / 1000
            failed["lightrun"] += failures
            return runs / seconds

        def docker_runs(clients: int = clients, runs: int = runs, failed: dict[str, int] = failed) -> float:
            seconds, failures = drive(clients, runs, lambda _: bench.docker_run)
            failed["docker"] += failures
            return runs / seconds

        rounds = bench.pick(1, 3)
        rates = in_turn(rounds, {"lightrun": lightrun_runs, "docker": docker_runs})
        bar = "≥ 1.0" if clients == 8 else ""
        what = f"throughput, {clients} clients"
        rows.append(compare(what, rates["lightrun"], "docker run --rm", rates["docker"], "runs/s", bar))
        share = [100 * failed[who] / (runs * rounds) for who in ("lightrun", "docker")]
        rows.append(Row(f"failures, {clients} clients", share[0], "%", "docker run --rm", share[1]))
    return rows


def measure_own_cost(bench: Bench) -> list[Row]:
    """What lightrun adds to a run: CPU, and the time that the run's own timings do not account for."""
    cpu, bare_cpu, outside = 0.0, 0.0, []
    rounds = bench.pick(1, 50)
    plain = bench.request(PLAIN)
    with bench.tcp.client() as client:
        client.run(PLAIN)
        for _ in range(rounds):
            until(lambda: not bench.containers(bench.tcp.state_id), "the removal of a container")
            before, began = bench.tcp.cpu(), time.perf_counter()
            state = client.run(PLAIN)
            took = (time.perf_counter() - began) * 1000
            outside.append(took - sum(state["timings"].values()))
            until(lambda: not bench.containers(bench.tcp.state_id), "the removal of a container")
            cpu += bench.tcp.cpu() - before
            process_time = time.process_time()
            bench.bare_run(plain)
            bare_cpu += (time.process_time() - process_time) * 1000
    return [
        Row("lightrun's CPU a run", cpu / rounds, "ms", "bare calls by the SDK", bare_cpu / rounds, cpu / bare_cpu),
        Row("outside queue, start, run, extract", statistics.median(outside), "ms"),
    ]


def measure_memory(bench: Bench) -> list[Row]:
    """What an idle daemon holds, and one with many running containers."""
    count = bench.pick(4, 100)
    daemon = bench.daemon("--max-concurrent", str(count), "--queue", "100")
    idle = daemon.holds()
    with daemon.client() as client:
        request = {"image": IMAGE, "entrypoint": ["sleep", "1000"], "memory": "16m", "network": "none", "detached": True}
        ids = [client.call("POST", "/run", request)["id"] for _ in range(count)]

        def running() -> bool:
            states = client.call("GET", "/runs?limit=1000")
            if any(state["status"] != "running" for state in states):
                raise BenchmarkError(f"a run ended early: {states}")
            return all(state["phase"] == "running" for state in states)

        until(running, f"{count} running containers")
        time.sleep(1)
        before = daemon.cpu()
        time.sleep(5)
        cpu, loaded = daemon.cpu() - before, daemon.holds()
        rows = [Row(f"{name}, idle", idle[name], name) for name in idle]
        rows += [Row(f"{name} with {count} running", loaded[name], name, "idle", idle[name]) for name in loaded]
        rows.append(Row(f"memory that {count} running add", loaded["MB"] - idle["MB"], "MB", bar="≤ 60 MB for 100"))
        rows.append(Row(f"CPU in 5 s with {count} running", cpu, "ms", bar="none"))
        rows += _followers(bench, daemon, ids[0])
        for run_id in ids:
            client.call("POST", f"/runs/{run_id}/cancel")
        until(lambda: not bench.containers(daemon.state_id), "the removal of all containers")
    daemon.stop()
    return rows


def _followers(bench: Bench, daemon: Daemon, run_id: str) -> list[Row]:
    """What many followers of one log add."""
    count = bench.pick(10, 100)
    before = daemon.holds()
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            client = opened.enter_context(daemon.client())
            opened.enter_context(client.open("GET", f"/runs/{run_id}/logs?follow=true"))
        time.sleep(0.5)
        with_them = daemon.holds()
    return [Row(f"{name} that {count} followers add", with_them[name] - before[name], name) for name in before]


def measure_many_runs(bench: Bench) -> list[Row]:
    """Whether memory grows with the runs that were."""
    runs, daemon = bench.pick(3, 300), bench.tcp

    def client(opened: contextlib.ExitStack) -> Callable[[], object]:
        return functools.partial(opened.enter_context(daemon.client()).run, PLAIN)

    drive(8, 8, client)
    before = daemon.holds()
    drive(8, runs, client)
    until(lambda: not bench.containers(daemon.state_id), "the removal of all containers")
    after = daemon.holds()
    return [Row(f"{name} after {runs} more runs", after[name], name, "before", before[name]) for name in after]


def finished(run: lightrun.Run) -> lightrun.Run:
    """The same run, after its end."""
    return dataclasses.replace(run, reason="exited", exit_code=0, started=run.created, finished=run.created + 0.3)


def fill(state_dir: Path, count: int) -> list[str]:
    """Make a state dir with finished runs, all copies of one; their ids."""
    store = lightrun.Store(state_dir)
    run = lightrun.Run(str(uuid.uuid4()), IMAGE, time.time(), waited=False)
    store.add(run)
    store.finish(finished(run), b"")
    store.close()
    ids = [run.id, *(str(uuid.uuid4()) for _ in range(count - 1))]
    with contextlib.closing(sqlite3.connect(state_dir / "lightrun.db")) as database:
        database.row_factory = sqlite3.Row
        for table in ("runs", "details"):
            row = dict(database.execute(f"SELECT * FROM {table}").fetchone())
            row.pop("seq", None)
            text = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
            for name in ids[1:]:
                values = [value.replace(run.id, name) if isinstance(value, str) else value for value in row.values()]
                database.execute(text, values)
        database.execute("UPDATE kept SET bytes = bytes * ?, runs = ?", (count, count))
        database.commit()
    return ids


def measure_stored(bench: Bench) -> list[Row]:
    """State, list and health with many stored runs against few."""
    few, many = 100, bench.pick(1_000, 100_000)
    calls: dict[str, Callable[[], float]] = {}

    def ask(client: Client, paths: Sequence[str]) -> float:
        path = random.choice(paths)
        return milliseconds(lambda: client.call("GET", path))

    with contextlib.ExitStack() as opened:
        for count in (few, many):
            state_dir = Path(tempfile.mkdtemp(prefix="stored-")) / "state"
            ids = fill(state_dir, count)
            daemon = bench.daemon("--keep", "1000000", state_dir=state_dir)
            opened.callback(daemon.stop)
            client = opened.enter_context(daemon.client())

            calls[f"state {count}"] = functools.partial(ask, client, [f"/runs/{name}" for name in ids])
            calls[f"list {count}"] = functools.partial(ask, client, ["/runs"])
            calls[f"filtered list {count}"] = functools.partial(ask, client, ["/runs?status=failed"])
            calls[f"health {count}"] = functools.partial(ask, client, ["/health"])
        took = in_turn(bench.pick(10, 300), calls)
    return [
        compare(f"{what}, {many:,} stored", took[f"{what} {many}"], f"{few} stored", took[f"{what} {few}"], bar="≤ 1.2")
        for what in ("state", "list", "filtered list", "health")
    ]


def measure_eviction(bench: Bench) -> list[Row]:
    """The eviction of one run, and the look that finds nothing to do, with many stored files against few."""
    few, many = 10, bench.pick(1_000, 100_000)
    calls: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as opened:
        for count in (few, many):
            state_dir = Path(tempfile.mkdtemp(prefix="evicted-")) / "state"
            fill(state_dir, count)
            store = lightrun.Store(state_dir)
            opened.callback(store.close)
            settings = lightrun.Settings(state_dir=state_dir, keep=count)
            settings.artifacts_root().mkdir(parents=True, exist_ok=True)

            def evict(
                fresh: int, store: lightrun.Store = store, settings: lightrun.Settings = settings, count: int = count
            ) -> float:
                for _ in range(fresh):
                    run = lightrun.Run(str(uuid.uuid4()), IMAGE, time.time(), waited=True)
                    store.add(run)
                    store.finish(finished(run), b"")
                took = milliseconds(lambda: lightrun.Evictor(store, settings).evict())
                if store.usage()[1] != count:
                    raise BenchmarkError(f"eviction left {store.usage()[1]} runs, not {count}")
                return took

            calls[f"eviction of a run {count}"] = functools.partial(evict, 1)
            calls[f"eviction of none {count}"] = functools.partial(evict, 0)
        took = in_turn(bench.pick(15, 100), calls)
    return [
        compare(f"{what}, {many:,} stored", took[f"{what} {many}"], f"{few} stored", took[f"{what} {few}"], bar="≤ 1.2")
        for what in ("eviction of a run", "eviction of none")
    ]


class PlainServer:
    """A process that does with a connection what has to be done at least: send a file, or take all that comes."""

    def __init__(self, file: Path, listener: socket.socket) -> None:
        self._address = listener.getsockname()
        self._family = listener.family
        arguments = [str(file), str(listener.fileno())]
        source = "import sys, benchmark; benchmark.serve_plainly(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", source, *arguments], pass_fds=[listener.fileno()], cwd=Path(__file__).parent
        )

    def __enter__(self) -> PlainServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def connect(self) -> socket.socket:
        """A connection to it."""
        connection = socket.socket(self._family)
        connection.connect(self._address)
        return connection

    def download(self, buffer: bytearray) -> int:
        """Have the file sent; its size."""
        with self.connect() as connection:
            connection.sendall(b"d")
            return sum(iter(lambda: connection.recv_into(buffer), 0))

    def upload(self, content: bytes) -> None:
        """Send something, and wait until it has arrived."""
        with self.connect() as connection:
            connection.sendall(b"u")
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)


def serve_plainly(file: str, listener: str) -> None:
    """The other side of PlainServer."""
    with socket.socket(fileno=int(listener)) as server, Path(file).open("rb") as content:
        buffer = bytearray(MIB)
        while True:
            connection, _ = server.accept()
            with connection:
                if connection.recv(1) == b"d":
                    connection.sendfile(content)
                    content.seek(0)
                else:
                    while connection.recv_into(buffer):
                        pass
                    connection.sendall(b".")


def measure_artifacts(bench: Bench) -> list[Row]:
    """Extraction against `docker cp`; the download of an artifact against a plain file server on the same kind of socket."""
    size = bench.pick(8, 400) * MIB
    command = ["dd", "if=/dev/zero", "of=/app/big", "bs=1M", f"count={size // MIB}"]
    rounds = bench.pick(1, 5)
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="copies-"))
    name = f"lightrun-bench-{uuid.uuid4().hex}"
    label = f"--label=lightrun.state={bench.engine_label}"
    bench.docker("run", "--name", name, label, "--workdir", "/app", IMAGE, *command)
    request = {"image": IMAGE, "entrypoint": command, "extract": ["big"], "network": "none"}
    kept: dict[Daemon, str] = {}

    def extract(daemon: Daemon, client: Client) -> float:
        if daemon in kept:
            client.call("DELETE", f"/runs/{kept[daemon]}")
        state = client.run(request)
        kept[daemon] = state["id"]
        until(lambda: not bench.containers(daemon.state_id), "the removal of a container")
        return size / 1e3 / float(state["timings"]["extract"])

    def copy() -> float:
        (folder / "big").unlink(missing_ok=True)
        return rate(size, lambda: bench.docker("cp", f"{name}:/app/big", str(folder)))

    with bench.tcp.client() as tcp, bench.unix.client() as unix:
        bench.tcp.forget_peak()
        before = bench.tcp.memory()
        rates = in_turn(rounds, {"lightrun": lambda: extract(bench.tcp, tcp), "docker cp": copy})
        rows.append(compare("extraction", rates["lightrun"], "docker cp", rates["docker cp"], "MB/s"))
        rows.append(Row("peak memory that extraction adds", bench.tcp.memory("VmHWM") - before, "MB"))
        extract(bench.unix, unix)
        for transport, daemon, client in (("tcp", bench.tcp, tcp), ("unix", bench.unix, unix)):
            rows += _downloads(bench, daemon, client, f"/runs/{kept[daemon]}/artifacts/big", transport, folder / "big")
    (folder / "big").unlink()
    return rows


def plain_listener(folder: Path, unix: bool) -> socket.socket:
    """A socket of the same kind as the daemon's."""
    listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    listener.bind(str(folder / uuid.uuid4().hex) if unix else ("127.0.0.1", 0))
    listener.listen()
    return listener


def _downloads(bench: Bench, daemon: Daemon, client: Client, path: str, transport: str, file: Path) -> list[Row]:
    size, buffer = file.stat().st_size, bytearray(MIB)

    def check(received: int) -> None:
        if received != size:
            raise BenchmarkError(f"{received} of {size} bytes were received")

    def from_daemon() -> None:
        with client.open("GET", path) as response:
            check(sum(iter(lambda: response.readinto(buffer), 0)))

    with plain_listener(daemon.folder, daemon.unix) as listener, PlainServer(file, listener) as server:
        server.download(buffer)
        daemon.forget_peak()
        before = daemon.memory()
        rates = in_turn(bench.pick(1, 15), {
            "lightrun": lambda: rate(size, from_daemon),
            "plain": lambda: rate(size, lambda: check(server.download(buffer))),
        })  # fmt: skip
    return [
        compare(f"download, {transport}", rates["lightrun"], "plain sendfile", rates["plain"], "MB/s", "≥ 300 MB/s"),
        Row(f"peak memory that downloads add, {transport}", daemon.memory("VmHWM") - before, "MB", bar="flat"),
    ]


def measure_upload(bench: Bench) -> list[Row]:
    """A file of 9 MiB: sent and refused, which is all but the run; and put into a run, against the bare calls."""
    text = "x" * (9 * MIB)
    refused = json.dumps({"image": "NO IMAGE", "files": {"in": text}}).encode()
    large = {**FILES, "files": {"in": text}}
    parsed = bench.request(large)
    rows = []

    def send(client: Client) -> None:
        with client.open("POST", "/run", refused) as response:
            response.read()
        if response.status != 400:
            raise BenchmarkError(f"an upload that should be refused: {response.status}")

    with bench.tcp.client() as tcp, bench.unix.client() as unix:
        for transport, daemon, client in (("tcp", bench.tcp, tcp), ("unix", bench.unix, unix)):
            with plain_listener(daemon.folder, daemon.unix) as listener, PlainServer(Path(os.devnull), listener) as server:
                server.upload(refused)
                rates = in_turn(bench.pick(1, 20), {
                    "lightrun": functools.partial(rate, len(refused), functools.partial(send, client)),
                    "plain": functools.partial(rate, len(refused), functools.partial(server.upload, refused)),
                })  # fmt: skip
            what = f"upload taken and checked, {transport}"
            rows.append(compare(what, rates["lightrun"], "plain copy", rates["plain"], "MB/s"))
        runs = in_turn(bench.pick(1, 15), {
            "lightrun": lambda: bench.run(bench.tcp, tcp, large), "bare": lambda: bench.bare_run(parsed)[0],
        })  # fmt: skip
    rows.append(compare("run with a file of 9 MiB in and out, tcp", runs["lightrun"], "bare calls", runs["bare"]))
    return rows


def measure_tar(bench: Bench) -> list[Row]:
    """A tar of one large file in a form, from the first byte to the end of its run, less what a run with an empty tar takes;
    against the engine's own taking of it (`docker cp`). What it adds to the memory."""
    size = bench.pick(20, 200) * MIB
    daemon = bench.daemon("--body-limit", "1g", "--memory", "1g")

    def tar_of(content: bytes) -> Path:
        path = daemon.folder / f"{len(content)}.tar"
        info = tarfile.TarInfo("large")
        info.size = len(content)
        with tarfile.open(path, "w") as archive:
            archive.addfile(info, io.BytesIO(content))
        return path

    large, empty = tar_of(os.urandom(size)), tar_of(b"")

    def send(tar: Path) -> None:
        run = json.dumps({"image": IMAGE, "network": "none", "entrypoint": "test -f large"})
        command = ["curl", "-sS", "-F", f"run={run}", "-F", f"tar=@{tar}", f"{daemon.url}/run"]
        done = subprocess.run(command, capture_output=True, check=True)
        if json.loads(done.stdout)["status"] != "succeeded":
            raise BenchmarkError(f"a run with a tar failed: {done.stdout.decode()}")

    def put() -> float:
        container = bench.engine.create(str(uuid.uuid4()), bench.image, bench.request({"image": IMAGE}))
        with large.open("rb") as file:
            took = milliseconds(lambda: bench.api.put_archive(container, "/", file))
        bench.api.remove_container(container, v=True, force=True)
        return size / 1e3 / took

    send(empty)
    before = daemon.memory()
    daemon.forget_peak()
    base = statistics.median(milliseconds(lambda: send(empty)) for _ in range(bench.pick(1, 5)))
    rates = in_turn(bench.pick(1, 5), {
        "lightrun": lambda: size / 1e3 / max(1.0, milliseconds(lambda: send(large)) - base), "docker cp": put,
    })  # fmt: skip
    return [
        compare(f"tar of {size // MIB} MiB in", rates["lightrun"], "docker cp", rates["docker cp"], "MB/s", "≥ 150 MB/s"),
        Row("peak memory that it adds", daemon.memory("VmHWM") - before, "MB", bar="flat"),
    ]


def measure_start(bench: Bench) -> list[Row]:
    """`--version`, and the first answer of a daemon."""

    def version() -> None:
        subprocess.run([sys.executable, str(bench.pyz), "--version"], stdout=subprocess.DEVNULL, check=True)

    def first_answer() -> float:
        daemon = Daemon(bench.pyz)
        try:
            return daemon.start()
        finally:
            daemon.stop()

    def bare_python() -> float:
        return milliseconds(lambda: subprocess.run([sys.executable, "-c", ""], check=True))

    rounds = bench.pick(2, 20)
    took = in_turn(rounds, {"version": lambda: milliseconds(version), "python": bare_python})
    answers = [first_answer() for _ in range(bench.pick(1, 10))]
    return [
        compare("--version", took["version"], "python -c ''", took["python"], bar="≤ 100 ms"),
        Row("first answer from the zip", statistics.median(answers), "ms", bar="≤ 1,000 ms"),
    ]


MEASUREMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    "start": measure_start,
    "runs": measure_runs,
    "warm": measure_warm,
    "exec": measure_exec,
    "throughput": measure_throughput,
    "own_cost": measure_own_cost,
    "memory": measure_memory,
    "many_runs": measure_many_runs,
    "stored": measure_stored,
    "eviction": measure_eviction,
    "artifacts": measure_artifacts,
    "upload": measure_upload,
    "tar": measure_tar,
}


# ---------------------------------------------------------------- The command


HEAD = "| measurement | lightrun | against | it takes | ratio | bar |\n|---|---:|---|---:|---:|---|"


def lines(rows: Sequence[Row]) -> str:
    """Rows as lines of a Markdown table."""

    def number(value: float | None, unit: str = "") -> str:
        if value is None:
            return ""
        return f"{value:,.{0 if abs(value) >= 100 or value == int(value) else 1}f} {unit}".strip()

    written = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        value, baseline = number(row.value, row.unit), number(row.baseline, row.unit)
        written.append(f"| {row.what} | {value} | {row.against} | {baseline} | {ratio} | {row.bar} |")
    return "\n".join(written)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "engine": EngineApi().version(),
        "lightrun": lightrun.__version__,
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def build(folder: Path) -> Path:
    """The zip application of this tree, in a place where no other build replaces it."""
    subprocess.run([sys.executable, str(ROOT / "build_zipapp.py")], stdout=subprocess.DEVNULL, check=True)
    pyz = folder / "lightrun.pyz"
    pyz.write_bytes((ROOT / "lightrun.pyz").read_bytes())
    return pyz


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds and smaller numbers: half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME",
                        help=f"only these measurements: {', '.join(MEASUREMENTS)}")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        ensure_engine()
        ensure_image(EngineApi())
    except EngineError as error:
        print(f"tests/benchmark.py: {error}", file=sys.stderr)
        return 1
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that daemons and containers go too
    temporary = tempfile.gettempdir()
    figures: dict[str, Any] = {"machine": machine(), "short": options.short, "measurements": {}}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()), HEAD, sep="\n\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        try:
            with Bench(build(Path(folder)), options.short) as bench:
                for name in options.only:
                    began = time.monotonic()
                    measured = MEASUREMENTS[name](bench)
                    print(lines(measured), flush=True)
                    figures["measurements"][name] = [dataclasses.asdict(row) for row in measured]
                    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        finally:
            tempfile.tempdir = os.environ["TMPDIR"] = temporary
    figures["machine"]["load at the end"] = [round(load, 1) for load in os.getloadavg()]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
