"""What a user sees of lightrun, as some forty checks through HTTP, for tests/matrix.py: each is a small function that is true to
its name, or raises AssertionError. All share one daemon, which is started with OPTIONS."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json as jsonlib
import os
import random
import re
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import IMAGE, EngineApi, children
from images import free_port, user_name_image

OPTIONS = (
    "--log-limit", "32m", "--extract-limit", "64m", "--memory", "128m", "--pids", "64", "--max-waiting", "32",
    "--warm", f"{IMAGE}=1/none",
)  # fmt: skip
LABEL = "lightrun.state"
SECONDS = 30.0  # for whatever is waited for
HELD = "until test -e /tmp/released; do sleep 0.1; done"
# The eight that docs and SPEC 5 name: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE.
CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10))


class Lightrun:
    """A daemon in a folder of its own: how to run its Python, the zip, and where the engine is."""

    def __init__(self, python: Sequence[str], pyz: Path, host: str, folder: Path, options: Sequence[str]) -> None:
        self.folder, self.port = folder, free_port()
        copy = folder / "lightrun.pyz"
        copy.write_bytes(pyz.read_bytes())
        address = ["--port", str(self.port), "--state-dir", str(folder / "state")]
        self._command = [*python, "-W", "error", "-W", "default::ResourceWarning", str(copy), "serve", *address, *options]
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "DOCKER_HOST": host}
        self._process: subprocess.Popen[bytes] | None = None
        self.user_image = ""
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        eventually(lambda: process.poll() is not None or self._healthy(), "an answer of /health")
        assert process.poll() is None, self.log()

    def kill(self) -> None:
        """SIGKILL."""
        self._send(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        return self._send(signal.SIGTERM)

    def _send(self, signum: signal.Signals) -> int:
        assert self._process
        inside = children(self._process.pid) if self._command[0] == "nsenter" else [self._process.pid]
        os.kill(inside[0], signum)
        return self._process.wait(SECONDS)

    def log(self) -> str:
        """What it has written."""
        return (self.folder / "log").read_text(errors="replace")

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request("GET", "/health")[0] == 200
        return False

    def request(
        self, method: str, path: str, json: Any = None, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """One request; status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2 * SECONDS)
        if json is not None:
            body, headers = jsonlib.dumps(json).encode(), {"Content_Type": "application/json", **headers}
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> bytes:
        """The body of a 200."""
        status, body = self.request("GET", path)
        assert status == 200, body
        return body

    def run(self, entrypoint: str | list[str] | None = None, **fields: Any) -> dict[str, Any]:
        """POST /run; the final state. No network unless one is asked for: `network=None` is the usual one."""
        status, body = self.request("POST", "/run", self._fields(entrypoint, fields))
        assert status == 200, body
        state: dict[str, Any] = jsonlib.loads(body)
        return state

    def detach(self, entrypoint: str | None = None, **fields: Any) -> str:
        """The same, detached, up to the phase `running`; its id."""
        status, body = self.request("POST", "/run", self._fields(entrypoint, {"detached": True, **fields}))
        assert status == 202, body
        run = str(jsonlib.loads(body)["id"])
        eventually(lambda: self.state(run).get("phase", "running") == "running", f"run {run} runs")
        assert self.state(run)["status"] == "running", self.state(run)
        return run

    @staticmethod
    def _fields(entrypoint: Any, fields: dict[str, Any]) -> dict[str, Any]:
        wanted = {"image": IMAGE, "network": "none", "entrypoint": entrypoint, **fields}
        return {name: value for name, value in wanted.items() if value is not None}

    def state(self, run: str) -> dict[str, Any]:
        """As GET tells it."""
        state: dict[str, Any] = jsonlib.loads(self.get(f"/runs/{run}"))
        return state

    def ended(self, run: str) -> dict[str, Any]:
        """The state when it has ended."""
        eventually(lambda: self.state(run)["status"] != "running", f"run {run} ends")
        return self.state(run)

    def post(self, path: str, json: Any = None) -> None:
        """What is answered with 204."""
        status, body = self.request("POST", path, json)
        assert status == 204, body

    def execute(self, run: str, entrypoint: str, **fields: Any) -> dict[str, Any]:
        """A command in a run that goes on."""
        status, body = self.request("POST", f"/runs/{run}/exec", {"entrypoint": entrypoint, **fields})
        assert status == 200, body
        outcome: dict[str, Any] = jsonlib.loads(body)
        return outcome

    @property
    def tells_usage(self) -> bool:
        """Whether figures can be had."""
        return bool(jsonlib.loads(self.get("/health")).get("usage"))


def eventually(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition."""
    late = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < late, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.1)


def expect(state: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The state, if it has these fields."""
    found = {name: state.get(name) for name in fields}
    assert found == fields, f"{found}, {state.get('error')}, {state.get('logs')}"
    return state


def base(data: bytes) -> dict[str, str]:
    """Bytes in a request."""
    return {"base64": base64.b64encode(data).decode()}


BINARY = random.Random(1).randbytes(1_000_000)
TEXT = b"\n".join(BINARY[start : start + 500].hex().encode() for start in range(0, 500_000, 500)) + b"\n"

# ---------------------------------------------------------------- How a program ends


def exit_code_0(at: Lightrun) -> None:
    expect(at.run("true"), status="succeeded", reason="exited", exitCode=0, logsTruncated=False)


def exit_code_7(at: Lightrun) -> None:
    expect(at.run("exit 7"), status="failed", reason="exited", exitCode=7)


def missing_program_127(at: Lightrun) -> None:
    expect(at.run(["/nothing/here"]), status="failed", reason="exited", exitCode=127)


def not_executable_126(at: Lightrun) -> None:
    expect(at.run("exec /etc/passwd"), status="failed", reason="exited", exitCode=126)


def ended_by_a_signal(at: Lightrun) -> None:
    expect(at.run("kill -TERM $$"), status="failed", reason="exited", exitCode=143)
    expect(at.run("kill -KILL $$"), status="failed", reason="exited", exitCode=137)


def timeout(at: Lightrun) -> None:
    expect(at.run("echo begun; sleep 100", timeout=1000), status="failed", reason="timeout", exitCode=137, logs=["begun"])


def cancel(at: Lightrun) -> None:
    run = at.detach("sleep 100")
    at.post(f"/runs/{run}/cancel")
    expect(at.ended(run), status="cancelled", reason="cancelled")


def stop_with_its_own_exit_code(at: Lightrun) -> None:
    run = at.detach("trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    eventually(lambda: at.get(f"/runs/{run}/logs") == b"ready\n", "it is ready")
    at.post(f"/runs/{run}/stop")
    expect(at.ended(run), reason="stopped", exitCode=5)


def stop_of_the_deaf(at: Lightrun) -> None:
    run = at.detach("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    eventually(lambda: at.get(f"/runs/{run}/logs") == b"ready\n", "it is ready")
    at.post(f"/runs/{run}/stop", {"grace": 500})
    expect(at.ended(run), reason="stopped", exitCode=137)


def setup_that_fails(at: Lightrun) -> None:
    state = expect(at.run("echo no", setup=["true", "exit 3"]), reason="exited", exitCode=3)
    assert "setup[1]" in state["error"], state


# ---------------------------------------------------------------- Limits


def out_of_memory(at: Lightrun) -> None:
    expect(at.run("head -c 300m /dev/zero | tail | wc -c; exit 9", memory="32m"), oomKilled=True)
    expect(at.run(["tail", "/dev/zero"], memory="32m"), reason="oom", exitCode=137)


def limit_of_processes(at: Lightrun) -> None:
    state = at.run("for n in $(seq 30); do sleep 5 & done; echo all", pids=12)
    assert state["exitCode"] != 0 or "all" not in state["logs"], state


def size_of_a_file(at: Lightrun) -> None:
    expect(at.run(["dd", "if=/dev/zero", "of=/tmp/large", "bs=1M", "count=3"], fileSize="1m"), exitCode=153)


def limit_of_output(at: Lightrun) -> None:
    expect(at.run(["yes"], outputLimit=100_000), status="failed", reason="output_limit")


def cpu_figures(at: Lightrun) -> None:
    assert at.tells_usage, "/health tells no usage"
    used = at.run("end=$(($(date +%s) + 2)); while test $(date +%s) -lt $end; do :; done", cpus=0.5)["usage"]["cpuMs"]
    assert 400 <= used <= 1600, f"{used} ms of half a CPU in 1 to 2 s"


def cpu_time(at: Lightrun) -> None:
    expect(at.run("while :; do :; done", cpuTime=500), status="failed", reason="cpu_limit")


# ---------------------------------------------------------------- Output and input


def both_streams_apart(at: Lightrun) -> None:
    expect(at.run("echo out; echo err >&2; echo -n last", splitLogs=True), stdout="out\nlast", stderr="err\n")


def binary_output_exact(at: Lightrun) -> None:
    run = at.run("cat f; cat f >&2", files={"f": base(BINARY)})["id"]
    for stream in ("stdout", "stderr"):
        assert at.get(f"/runs/{run}/logs?stream={stream}") == BINARY, "not what was written"


def output_of_20_mb_exact(at: Lightrun) -> None:
    script = "for n in $(seq 20); do cat f; echo $n; done"
    run = expect(at.run(script, files={"f": TEXT.decode()}), exitCode=0, logsTruncated=False)["id"]
    expected = b"".join(TEXT + b"%d\n" % number for number in range(1, 21))
    assert at.get(f"/runs/{run}/logs?stream=stdout") == expected, "not what was written"


def output_followed(at: Lightrun) -> None:
    run, told = at.detach(f"echo first; {HELD}; echo last"), []
    follower = threading.Thread(target=lambda: told.append(at.get(f"/runs/{run}/logs?follow=true")))
    follower.start()
    at.execute(run, "touch /tmp/released")
    follower.join(SECONDS)
    assert told == [b"first\nlast\n"], told


def events_as_they_happen(at: Lightrun) -> None:
    fields = {"image": IMAGE, "network": "none", "entrypoint": "echo hello"}
    _, body = at.request("POST", "/run", fields, Accept="application/x-ndjson")
    events = [jsonlib.loads(line) for line in body.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "started", "log", "finished"], events
    expect(events[-1]["run"], exitCode=0, logs=["hello"])


def stdin_whole(at: Lightrun) -> None:
    run = at.run(["cat"], stdin=base(BINARY))["id"]
    assert at.get(f"/runs/{run}/logs?stream=stdout") == BINARY, "not what was sent"


def stdin_unread(at: Lightrun) -> None:
    expect(at.run("exit 4", stdin=base(BINARY)), reason="exited", exitCode=4)


def input_as_json(at: Lightrun) -> None:
    expect(at.run(["cat"], input={"a": [1, None]}), logs=['{"a": [1, null]}'])


def environment(at: Lightrun) -> None:
    expect(at.run('echo "$A|$B"', env={"A": "x y\n'\"$z", "B": "é"}, splitLogs=True), stdout="x y\n'\"$z|é\n")


# ---------------------------------------------------------------- Files


def tree_in(at: Lightrun) -> None:
    state = at.run("cat a/b/c; stat -c '%a %u' a/b/c; pwd", files={"a/b/c": "deep\n"}, workdir="/some/where")
    expect(state, logs=["deep", "755 0", "/some/where"], exitCode=0)


def tar_in(at: Lightrun) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, mode, target in (
            ("bin/tool", tarfile.REGTYPE, 0o750, ""), ("soft", tarfile.SYMTYPE, 0o777, "bin/tool"),
            ("hard", tarfile.LNKTYPE, 0o750, "bin/tool"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname, member.mtime = kind, mode, target, 1_600_000_000
            content = b"#!/bin/sh\necho ran\n" if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    fields = {"image": IMAGE, "network": "none", "entrypoint": "./soft; stat -c '%a %h %Y' hard; readlink soft"}
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode() + part + b"\r\n"
        for name, part in (("run", jsonlib.dumps(fields).encode()), ("tar", buffer.getvalue()))
    )
    status, answer = at.request("POST", "/run", body=body + b"--x--\r\n", Content_Type="multipart/form-data; boundary=x")
    assert status == 200, answer
    expect(jsonlib.loads(answer), exitCode=0, logs=["ran", "750 2 1600000000", "bin/tool"])


def files_of_another_user(at: Lightrun) -> None:
    script = "id -u; cat f; ./f 2>/dev/null; touch new && stat -c %u f new"
    expect(at.run(script, image=at.user_image, files={"f": "mine\n"}), logs=["1000", "mine", "1000", "1000"], exitCode=0)


def artifacts_out(at: Lightrun) -> None:
    script = "mkdir -p out/deep; cat f > out/deep/f; chmod 700 out/deep/f; ln -s f out/link; echo 1 > one"
    state = at.run(script, files={"f": base(BINARY)}, extract=["out", "one", "/nothing"])
    told = [(entry["status"], entry.get("skipped", 0)) for entry in state["extracted"]]
    assert told == [("ok", 1), ("ok", 0), ("missing", 0)], state["extracted"]
    assert [entry["path"] for entry in state["artifacts"]] == ["deep", "deep/f", "one"], state["artifacts"]
    assert at.get(f"/runs/{state['id']}/artifacts/deep/f") == BINARY, "not what was written"
    expect(at.run("cat g", files={"g": {"artifact": f"{state['id']}/one"}}), logs=["1"])


def artifacts_after_a_failure(at: Lightrun) -> None:
    for number in range(5):  # some engines have copied out nothing, now and then
        state = at.run(f"echo {number} > report; exit 2", extract=["report"], extractOn="exit")
        assert state["extracted"][0]["status"] == "ok", state["extracted"]
        assert at.get(f"/runs/{state['id']}/artifacts/report") == f"{number}\n".encode()
    state = at.run("echo late > report; sleep 100", extract=["report"], extractOn="exit", timeout=1000)
    assert state["extracted"][0]["status"] == "ok", state["extracted"]


# ---------------------------------------------------------------- The sandbox, from inside

STATUS = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status"


def _status(state: dict[str, Any]) -> dict[str, int]:
    pairs = [line.split(":") for line in expect(state, exitCode=0)["logs"]]
    return {name: int(value, 16) for name, value in pairs}


def capabilities_of_root(at: Lightrun) -> None:
    found = _status(at.run(STATUS))
    wanted = {"CapInh": 0, "CapPrm": CAPABILITIES, "CapEff": CAPABILITIES, "CapBnd": CAPABILITIES, "CapAmb": 0}
    assert {name: found[name] for name in wanted} | {"CapInh": 0} == wanted, {name: hex(found[name]) for name in wanted}


def capabilities_of_others(at: Lightrun) -> None:
    found = _status(at.run(STATUS, image=at.user_image))
    assert not found["CapAmb"] | found["CapEff"] | found["CapPrm"], {name: hex(value) for name, value in found.items()}
    assert found["CapBnd"] & ~CAPABILITIES == 0, hex(found["CapBnd"])


def capabilities_of_others_in_exec(at: Lightrun) -> None:
    run = at.detach(f"{STATUS}; sleep 100", image=at.user_image)
    found = _status(at.execute(run, STATUS))
    at.post(f"/runs/{run}/cancel")
    assert not found["CapAmb"] | found["CapEff"] | found["CapPrm"], {name: hex(value) for name, value in found.items()}


def no_new_privileges(at: Lightrun) -> None:
    for image in (IMAGE, at.user_image):
        found = _status(at.run(STATUS, image=image))
        assert (found["NoNewPrivs"], found["Seccomp"]) == (1, 2), found


def kernel_masked(at: Lightrun) -> None:
    script = """
        for path in /proc/kcore /proc/keys /proc/timer_list; do
            head -c 1 $path 2>/dev/null | grep -q . && echo "$path is read"
        done
        for path in /proc/sysrq-trigger /proc/sys/kernel/hostname /sys/kernel/profiling /sys/fs/cgroup/*/tasks; do
            (echo x > $path) 2>/dev/null && echo "$path is written"
        done
        for path in /dev/mem /dev/kmsg /dev/sda /dev/vda; do test -b $path && echo "$path is there"; done
        mount -t tmpfs tmpfs /mnt 2>/dev/null && echo mounted
        mknod /tmp/node b 7 0 2>/dev/null && echo made
        true"""
    expect(at.run(script), logs=[], exitCode=0)


def init_and_no_core(at: Lightrun) -> None:
    expect(at.run("test $$ != 1 && grep -qv '^sh$' /proc/1/comm && ulimit -c && ulimit -H -c"), exitCode=0, logs=["0", "0"])


def no_network(at: Lightrun) -> None:
    expect(at.run("ls /sys/class/net"), logs=["lo"])


def isolated_network(at: Lightrun) -> None:
    ask = r"printf 'GET /f HTTP/1.0\r\n\r\n' | nc -w 2 {} 8000"
    serve = "mkdir -p /tmp/w && echo hello > /tmp/w/f && httpd -p 8000 -h /tmp/w && hostname -i && ip route | grep -c default"
    first = at.detach(f"{serve}; {ask.format('$(hostname -i)')}; {HELD}", network=None)
    eventually(lambda: b"hello" in at.get(f"/runs/{first}/logs"), "it serves itself")
    address, routes, *_ = at.get(f"/runs/{first}/logs").decode().split()
    assert routes == "1", "there is no way out"
    state = at.run(f"{ask.format(address)}; hostname -i", network=None, splitLogs=True)
    assert re.fullmatch(r"\d+(\.\d+){3}\n", state["stdout"]), state
    at.post(f"/runs/{first}/cancel")
    at.ended(first)


# ---------------------------------------------------------------- Runs that stay


def exec_with_input(at: Lightrun) -> None:
    run = at.detach("sleep 100")
    outcome = at.execute(run, "cat; echo err >&2; exit 6", stdin="given\n", splitLogs=True)
    expect(outcome, reason="exited", exitCode=6, stdout="given\n", stderr="err\n")
    big = at.execute(run, "cat | wc -c", stdin=base(BINARY))
    expect(big, exitCode=0, logs=["1000000"])
    at.post(f"/runs/{run}/cancel")


def exec_with_timeout(at: Lightrun) -> None:
    run = at.detach("sleep 100")
    expect(at.execute(run, "sleep 77", timeout=500), reason="timeout")
    eventually(lambda: "sleep 77" not in "\n".join(at.execute(run, "ps")["logs"]), "its processes are gone")
    at.post(f"/runs/{run}/cancel")
    expect(at.ended(run), reason="cancelled")


def exec_after_the_end(at: Lightrun) -> None:
    run = at.run("true")["id"]
    status, body = at.request("POST", f"/runs/{run}/exec", {"entrypoint": "true"})
    assert status == 409, body


def idle_sandbox(at: Lightrun) -> None:
    run = at.detach(idle=2000, extract=["f"])
    expect(at.execute(run, "echo kept > f"), exitCode=0)
    state = expect(at.ended(run), status="succeeded", reason="idle")
    assert at.get(f"/runs/{run}/artifacts/f") == b"kept\n", state


def warm_start(at: Lightrun) -> None:
    eventually(lambda: b"\nlightrun_warm_containers 1" in at.get("/metrics"), "a container is warm")
    script = "cat f; echo $A; pwd; id -u; cat"
    state = at.run(script, files={"f": "file\n"}, env={"A": "b"}, stdin="in\n", extract=["f"])
    expect(state, warm=True, exitCode=0, logs=["file", "b", "/app", "0", "in"])
    assert state["extracted"][0]["status"] == "ok", state["extracted"]


# ---------------------------------------------------------------- Around runs


def eight_at_once(at: Lightrun) -> None:
    states: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: states.append(at.run("echo $((6 * 7))", network=None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state["logs"] for state in states] == [["42"]] * 8, states


def idempotency_key(at: Lightrun) -> None:
    body = {"image": IMAGE, "network": "none", "entrypoint": "cat /proc/sys/kernel/random/uuid"}
    first, second = (at.request("POST", "/run", body, Idempotency_Key="smoke") for _ in range(2))
    assert first == second, (first, second)


def adopted_after_kill_9(at: Lightrun) -> None:
    run = at.detach(f"seq 1000; {HELD}; seq 1001 2000; exit 3")
    other = at.detach("echo brief; sleep 1; exit 4", network=None)
    eventually(lambda: at.get(f"/runs/{other}/logs") == b"brief\n", "it has begun")
    at.kill()
    at.start()
    expect(at.ended(other), reason="exited", exitCode=4, logs=["brief"])
    eventually(lambda: at.state(run).get("phase") == "running", "it was adopted")
    at.execute(run, "touch /tmp/released")
    expect(at.ended(run), reason="exited", exitCode=3, logs=[str(number) for number in range(1, 2001)])


def waiting_when_killed(at: Lightrun) -> None:
    def wait() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            at.run("sleep 100", labels={"who": "waiting"})

    waiting = threading.Thread(target=wait)
    waiting.start()
    listed = "/runs?label=who%3Dwaiting"
    eventually(lambda: [run for run in jsonlib.loads(at.get(listed)) if run.get("phase") == "running"], "it runs")
    at.kill()
    waiting.join()
    at.start()
    eventually(lambda: jsonlib.loads(at.get(listed))[0]["status"] != "running", "it ends")
    expect(jsonlib.loads(at.get(listed))[0], reason="interrupted", status="cancelled")


CHECKS: dict[str, Callable[[Lightrun], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        exit_code_0, exit_code_7, missing_program_127, not_executable_126, ended_by_a_signal, timeout, cancel,
        stop_with_its_own_exit_code, stop_of_the_deaf, setup_that_fails, out_of_memory, limit_of_processes, size_of_a_file,
        limit_of_output, cpu_figures, cpu_time, both_streams_apart, binary_output_exact, output_of_20_mb_exact,
        output_followed, events_as_they_happen, stdin_whole, stdin_unread, input_as_json, environment, tree_in, tar_in,
        files_of_another_user, artifacts_out, artifacts_after_a_failure, capabilities_of_root, capabilities_of_others,
        capabilities_of_others_in_exec, no_new_privileges, kernel_masked, init_and_no_core, no_network, isolated_network,
        exec_with_input, exec_with_timeout, exec_after_the_end, idle_sandbox, warm_start, eight_at_once, idempotency_key,
        adopted_after_kill_9, waiting_when_killed,
    )
}  # fmt: skip
# Beside these, when the daemon has ended.
LAST = ("nothing is left", "a clean end")
COUNT = len(CHECKS) + len(LAST)


def smoke(serve: Callable[..., Lightrun], api: EngineApi, only: str = "") -> dict[str, str]:
    """Every check, of which those that failed are returned with one line each. Raises AssertionError without a daemon."""
    networks, volumes = _networks(api), _volumes(api)
    image = user_name_image(api)
    at, failed = serve(*OPTIONS), {}
    at.user_image = image
    own = _state_id(at)
    try:
        for name, check in CHECKS.items():
            if not re.search(only, name):
                continue
            try:
                check(at)
            except (AssertionError, OSError, http.client.HTTPException, LookupError, ValueError) as error:
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for run in jsonlib.loads(at.get("/runs?status=running")):  # of a check that failed
                at.request("POST", f"/runs/{run['id']}/cancel")
        failed |= _last(at, api, own, networks, volumes)
    finally:
        with contextlib.suppress(LookupError, ProcessLookupError):
            at.kill()
    return failed


def _last(at: Lightrun, api: EngineApi, own: str, networks: set[str], volumes: set[str]) -> dict[str, str]:
    """What is left, and how the daemon ended."""
    failed: dict[str, str] = {}
    left: list[str] = []

    def clean() -> bool:
        left[:] = [*_containers(api, own), *(_networks(api) - networks - {"lightrun"}), *(_volumes(api) - volumes)]
        return not left

    with contextlib.suppress(AssertionError):  # what a run has goes after its end, and a warm container waits
        eventually(lambda: not jsonlib.loads(at.get("/runs?status=running")), "no run goes on")
        eventually(lambda: len(_containers(api, own)) <= 1, "their containers are gone")
    code = at.stop()
    try:
        eventually(clean, "containers, networks, volumes")
    except AssertionError:
        failed["nothing is left"] = ", ".join(left)
    if code != 0 or "Traceback" in at.log():
        failed["a clean end"] = f"exit code {code}, log: {at.log()[-300:]}"
    return failed


def _state_id(at: Lightrun) -> str:
    """By which the daemon's containers are known from those of others."""
    return (at.folder / "state/artifacts/.lightrun").read_text().strip()


def _containers(api: EngineApi, own: str) -> list[str]:
    found = jsonlib.loads(api.call("GET", "/containers/json?all=1"))
    return [str(entry["Names"]) for entry in found if (entry.get("Labels") or {}).get(LABEL) == own]


def _networks(api: EngineApi) -> set[str]:
    return {str(network["Name"]) for network in jsonlib.loads(api.call("GET", "/networks"))}


def _volumes(api: EngineApi) -> set[str]:
    return {str(volume["Name"]) for volume in jsonlib.loads(api.call("GET", "/volumes"))["Volumes"] or ()}
