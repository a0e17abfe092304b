"""The soak: detached runs of many kinds are submitted while the daemon is killed again and again, and none is lost.

test_recovery.py runs the short form; `python3 tests/soak.py --kills 100` the long one, in the tests' `.venv`, and with `--warm`
one in which most runs get a warm container. Some kills are random ones; the others happen before or after a named step of a
run, by tests/launcher.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.client
import itertools
import json
import operator
import os
import random
import socketserver
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__" and sys.prefix == sys.base_prefix:  # Not the tests' own Python: go on in that.
    python = str(Path(sys.path[0], ".venv/bin/python"))
    os.execv(python, [python, *sys.argv])

import docker

import lightrun
from conftest import ROOT, Answer, Daemon, Receiver, eventually
from engine import EngineApi, engine_host, ensure_engine
from images import make_image

LAUNCHER = ROOT / "tests/launcher.py"
IMAGE = "lightrun/soak:latest"  # has a volume, which must go with each container
OPTIONS = ("--max-concurrent", "6")
POOL = 3
WARM = ("--warm", f"{IMAGE}={POOL}")
ENVIRONMENT = {"LIGHTRUN_DELAYS": "0.3 " * 20}
STEPS = (
    "Store.add", "Store.begin", "Store.fed", "Store.ask", "Store.finish", "Store.attempted", "Store.delete",
    "Store._write_secret", "Store._drop_secret", "Store.tidy", "Engine.image", "Engine.create", "Engine.put",
    "Engine.attach", "Engine.open_stdin", "Engine.start", "Engine.inspect", "Engine.wait", "Engine.kill",
    "Engine.kept_output", "Engine.archive", "Engine.remove", "Engine.left", "Extraction.keep", "Extraction._write",
    "Extraction._move_in", "Callbacks.owe", "Callbacks._attempt", "deliver", "Runner.recover", "Runner._launch",
    "Runner._bring_up", "Runner._watch", "Runner._conclude", "Runner._record", "Evictor.remove", "Evictor.evict", "remove_tree",
)  # fmt: skip
WARM_STEPS = (
    "Pools.take", "Pools.hand_out", "Pools.forget", "Runner._hand_out", "Runner._became", "Runner._has_become",
    "Runner._take_back", "Store.take_back", "Slots.vacate", "Engine.attach",
    "Engine.start", "Engine.inspect", "Engine.kept_output", "Store.begin", "Store.finish", "Runner._watch", "Runner._record",
)  # fmt: skip
OUTSTANDING, WARM_OUTSTANDING = 10, 3  # runs on their way at a time
TRAP_SECONDS, WARM_SECONDS = 2.0, 6.0  # how long a trap may take to be reached; the kill is a random one then
END_SECONDS = 90.0


class Counter(socketserver.ThreadingTCPServer):
    """Counts the starts of each command: the command itself connects, from inside of its container, and says its name."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.starts: collections.Counter[str] = collections.Counter()
        counter = self

        class Handler(socketserver.StreamRequestHandler):
            """One name a connection."""

            def handle(self) -> None:
                counter.starts[self.rfile.readline(100).decode().strip()] += 1

        super().__init__(("", 0), Handler)
        self.port = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()
        self._thread.join()


@dataclasses.dataclass
class Kind:
    """A kind of run: what is sent, and what must come of it."""

    script: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    exit_code: int = 0
    stdout: str = ""
    stderr: str = ""
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[str, ...] = ("exited",)  # reasons; without `exited` among them its killed container may have been one
    chore: str = ""  # what the client does to it: cancel, stop, delete


KINDS = [
    Kind("echo out; echo err >&2; echo last", stdout="out\nlast\n", stderr="err\n"),
    Kind(
        "cat a/b c; mkdir d; cp c d/e; printf 12 > d/f; sleep 0.3", {"files": {"a/b": "1\n", "c": "2\n"}, "extract": ["d", "c"]},
        stdout="1\n2\n", artifacts={"e": "2\n", "f": "12", "c": "2\n"},
    ),
    Kind("echo no; printf 3 > x; exit 7", {"extract": ["x"], "extractOn": "exit"}, 7, stdout="no\n", artifacts={"x": "3"}),
    Kind("wc -c; sleep 0.5", {"stdin": "x" * 100_000}, stdout="100000\n", ends=("exited", "interrupted")),
    Kind("wc -c; sleep 0.5", {"stdin": "x" * 10_000}, stdout="10000\n", ends=("exited", "interrupted")),
    Kind("echo early; sleep 2.5; echo late", stdout="early\nlate\n"),
    Kind("sleep 60", {"timeout": 1500}, ends=("timeout",)),
    Kind("sleep 60", ends=("cancelled",), chore="cancel"),
    Kind("sleep 60", ends=("stopped",), chore="stop"),
    Kind("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done", stdout="".join(f"line {n}\n" for n in range(3000))),
    Kind("echo x > x; test $SECRET", {"env": {"SECRET": "s"}, "extract": ["x"]}, artifacts={"x": "x\n"}, chore="delete"),
]  # fmt: skip


class Soak:
    """One soak. `figures` are there after `run`, which raises AssertionError for whatever was lost or left."""

    def __init__(self, daemon: Daemon, client: docker.APIClient, kills: int, seed: int, warm: bool = False) -> None:
        self.daemon, self.kills, self.random = daemon, kills, random.Random(seed)
        self._steps = WARM_STEPS if warm else STEPS
        self._most, self._seconds = (WARM_OUTSTANDING, WARM_SECONDS) if warm else (OUTSTANDING, TRAP_SECONDS)
        self.figures: dict[str, Any] = {"seed": seed}
        self._client = client
        self._accepted: dict[str, tuple[str, Kind]] = {}  # run → name, kind
        self._doubtful = 0  # sent without a key, and never answered
        self._ended: set[str] = set()
        self._chores: list[Callable[[], bool]] = []
        self._enough = threading.Event()

    def run(self) -> None:
        """Submit and kill, then let all end and look at everything."""
        make_image(EngineApi(), IMAGE, "VOLUME /data")
        began, volumes = time.monotonic(), self._volumes()
        with contextlib.closing(Counter()) as self._counter, contextlib.closing(Receiver()) as self._receiver:
            submitter = threading.Thread(target=self._submit)
            submitter.start()
            try:
                self._kill()
                self.daemon.env["LIGHTRUN_TRAP"] = ""
                self.daemon.start()
            finally:
                self._enough.set()
                submitter.join()
            restarted = time.monotonic()
            self._look_for_ends(END_SECONDS)
            self.figures |= {"seconds": round(time.monotonic() - began), "seconds to end": round(time.monotonic() - restarted, 1)}
            self._verify_runs()
            self._verify_nothing_left(volumes)

    # The daemon dies

    def _kill(self) -> None:
        steps = [f"{step} {when}" for step in self._steps for when in ("before", "after")]
        traps = itertools.cycle(self.random.sample(steps, len(steps)))
        at_step, at_random, missed = 0, 0, 0
        for number in range(self.kills):
            trap = next(traps) if number % 4 else ""
            self.daemon.env["LIGHTRUN_TRAP"] = f"{trap} {self.random.choice((1, 1, 2, 4))}" if trap else ""
            self.daemon.start(wait=False)
            try:
                self.daemon.process.wait(self._seconds * (1 if trap else self.random.uniform(0.1, 1)))
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                at_random, missed = at_random + 1, missed + bool(trap)
            else:
                assert self.daemon.process.returncode == -9, self.daemon.log()[-3000:]
                at_step += 1
        self.figures |= {"kills": at_step + at_random, "at a step": at_step, "at random": at_random, "traps not reached": missed}

    # The client

    def _request(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """Status and JSON of the answer; 0 when there is none."""
        try:
            answer = self.daemon.request(method, path, body, headers={"Idempotency-Key": key} if key else {}, timeout=10)
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
            return 0, None
        return answer.status, answer.json() if answer.body else None

    def _submit(self) -> None:
        """Keep some runs on their way; do what is to be done to them."""
        kinds = itertools.cycle(KINDS)
        pending: tuple[Kind, str, dict[str, Any], str] | None = None
        while pending or not self._enough.is_set():
            if pending is None and len(self._accepted) - len(self._ended) < self._most:
                pending = self._new_run(next(kinds))
            if pending and self._post(*pending):
                pending = None
            self._chores_done()
        assert eventually(self._chores_done, END_SECONDS), "chores left"

    def _chores_done(self) -> bool:
        self._look_for_ends(0)
        self._chores = [chore for chore in self._chores if not chore()]
        return not self._chores

    def _new_run(self, kind: Kind) -> tuple[Kind, str, dict[str, Any], str]:
        name = uuid.uuid4().hex
        gateway = "$(ip route | awk '/default/ {print $3}')"
        script = f"echo {name} | nc -w 20 {gateway} {self._counter.port} > /dev/null; {kind.script}"
        body = {"image": IMAGE, "entrypoint": script, "detached": True, "timeout": 90_000, **kind.fields}
        body |= {"callbackUrl": self._receiver.url, "callbackSecret": name}
        if self.random.random() < 0.3:
            self._receiver.answers.append(Answer(503))
        return kind, name, body, name if self.random.random() < 0.7 else ""

    def _post(self, kind: Kind, name: str, body: dict[str, Any], key: str) -> bool:
        """Whether this is settled: a run without a key is not sent twice."""
        status, answer = self._request("POST", "/run", body, key)
        assert status in (0, 202, 503), (status, answer)
        if status == 202:
            assert answer["id"] not in self._accepted
            self._accepted[answer["id"]] = (name, kind)
            if kind.chore == "delete":
                self._chores.append(lambda: self._deleted(answer["id"]))
            elif kind.chore:
                due = time.monotonic() + self.random.uniform(0, 2)
                self._chores.append(lambda: time.monotonic() > due and self._asked(answer["id"], kind.chore))
        self._doubtful += status == 0 and not key
        return status == 202 or (status == 0 and not key)

    def _asked(self, run: str, what: str) -> bool:
        status, _ = self._request("POST", f"/runs/{run}/{what}", {"grace": 0} if what == "stop" else None)
        assert status in (0, 204, 409, 503), status
        return status in (204, 409)

    def _deleted(self, run: str) -> bool:
        if run not in self._ended:
            return False
        status, _ = self._request("DELETE", f"/runs/{run}")
        return status in (204, 404)

    def _look_for_ends(self, seconds: float) -> None:
        """Note which runs have ended; with some seconds, wait for all and for their callbacks."""

        def all_ended() -> bool:
            status, states = self._request("GET", "/runs?limit=1000")
            settled = {run["id"] for run in states or () if run["status"] != "running"}
            self._ended |= settled & set(self._accepted)
            return (
                status == 200 and all(run["callback"]["status"] == "delivered" for run in states) and len(settled) == len(states)
            )

        assert eventually(all_ended, seconds) or not seconds, "runs or callbacks left"
        if not seconds:
            time.sleep(0.1)

    # What must be true at the end

    def _verify_runs(self) -> None:
        _, states = self._request("GET", "/runs?limit=1000")
        rows = {str(run["id"]) for run in states}
        deleted = {run for run, (_, kind) in self._accepted.items() if kind.chore == "delete"}
        assert set(self._accepted) - rows == deleted, "acknowledged runs are gone, or deleted ones are not"
        assert len(rows - set(self._accepted)) <= self._doubtful, "rows of nobody"
        bodies = collections.defaultdict(list)
        for request in self._receiver.requests:
            bodies[str(request.headers["X-Light-Run-Id"])].append(request)
        reasons: collections.Counter[str] = collections.Counter()
        warm = 0
        for run in sorted(rows | deleted):
            got = bodies[run]
            assert got, f"run {run}: no callback"
            assert len({request.body for request in got}) == 1, f"run {run}: its callbacks differ"
            numbers = [int(request.headers["X-Light-Run-Attempt"]) for request in got]
            assert numbers == sorted(numbers)
            state = json.loads(got[0].body)
            reasons[state["reason"]] += 1
            warm += "warm" in state
            if run in rows:
                final = self.daemon.state(run)
                assert final.pop("callback")["status"] == "delivered"
                assert state == final, f"run {run}: its callback is not its state"
            if run in self._accepted:
                name, kind = self._accepted[run]
                self._verify_run(state, kind, self._counter.starts[name], kept=run in rows)
        self.figures |= {
            "runs": len(rows | deleted), "never acknowledged": len(rows - set(self._accepted)), "reasons": dict(reasons),
            "warm": warm, "callbacks": len(self._receiver.requests), "starts": self._counter.starts.total(),
        }  # fmt: skip

    def _verify_run(self, state: dict[str, Any], kind: Kind, starts: int, kept: bool) -> None:
        run, said = state["id"], f"{state}\nstarts: {starts}"
        # A kill -9 between the signal and its record leaves what the engine says: 137.
        killed = "exited" not in kind.ends and (state["reason"], state.get("exitCode")) in {("exited", 137), ("exited", 143)}
        assert state["reason"] in kind.ends or killed, said
        assert state["logsTruncated"] is False, said
        if state["reason"] != "exited" or killed:
            assert starts <= 1, said
            return
        assert (starts, state["exitCode"]) == (1, kind.exit_code), said
        assert sorted(state["logs"]) == sorted((kind.stdout + kind.stderr).splitlines()), said
        assert {entry["path"] for entry in state.get("artifacts", ())} == set(kind.artifacts), said
        if kept:
            for stream, text in (("stdout", kind.stdout), ("stderr", kind.stderr)):
                assert self.daemon.request("GET", f"/runs/{run}/logs?stream={stream}").text == text, said
            for path, text in kind.artifacts.items():
                assert self.daemon.request("GET", f"/runs/{run}/artifacts/{path}").text == text, said

    def _verify_nothing_left(self, volumes: set[str]) -> None:
        daemon = self.daemon
        shims = operator.itemgetter("Command")
        assert eventually(lambda: {shims(each) for each in daemon.containers()} <= {lightrun.SHIM}), "containers left"
        assert eventually(lambda: len(daemon.containers()) <= POOL), "more warm containers than there may be"
        assert eventually(lambda: not self._volumes() - volumes), "volumes left"
        assert [each["Name"] for each in self._client.networks(names=["lightrun"])].count("lightrun") == 1
        assert not list((daemon.state_dir / "secrets").iterdir()), "secrets left"
        _, states = self._request("GET", "/runs?limit=1000")
        with_artifacts = {run["id"] for run in states if daemon.state(run["id"]).get("artifacts")}
        folders = {path.name for path in (daemon.state_dir / "artifacts").iterdir()} - {".lightrun"}
        assert folders == with_artifacts, "folders and records differ"
        with contextlib.closing(sqlite3.connect(daemon.state_dir / "lightrun.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert database.execute("SELECT count(*) FROM runs").fetchone() == (len(states),)
            assert database.execute("SELECT count(*) FROM details").fetchone() == (len(states),)

    def _volumes(self) -> set[str]:
        return {volume["Name"] for volume in self._client.volumes(filters={"dangling": True})["Volumes"] or ()}


def main(arguments: list[str] | None = None) -> int:
    """The long form; prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--warm", action="store_true", help="with a pool of warm containers")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args(arguments)
    ensure_engine()
    with tempfile.TemporaryDirectory(prefix="soak-") as tempfile.tempdir:
        client = docker.APIClient(engine_host(), version="auto")
        with contextlib.closing(client):
            daemon = Daemon(LAUNCHER, client, (*OPTIONS, *WARM * options.warm), env=ENVIRONMENT)
            soak = Soak(daemon, client, options.kills, options.seed, options.warm)
            try:
                soak.run()
            except AssertionError:
                print("\n".join(line for line in daemon.log().splitlines() if "127.0.0.1" not in line)[-20_000:])
                raise
            finally:
                print(json.dumps(soak.figures, indent=1))
                daemon.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
