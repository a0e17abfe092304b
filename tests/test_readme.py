"""README's commands, run as they stand there, but for the address and the patience. A comment `<!-- run -->` marks them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightrun
from conftest import ROOT, Daemon, DaemonFactory, eventually

README = (ROOT / "README.md").read_text("utf-8")
SECRET = "a secret of this test"


def _blocks(mark: str) -> list[str]:
    """The shell commands below `<!-- mark -->`."""
    return re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```\n", README, re.DOTALL)


def _block(language: str, text: str) -> str:
    """The one block of this language that holds a text."""
    found = [block for block in re.findall(rf"```{language}\n(.*?)```\n", README, re.DOTALL) if text in block]
    assert len(found) == 1
    return str(found[0])


def _shell(script: str, folder: Path, *arguments: str) -> str:
    """What a script writes to standard output; any command that fails is an error."""
    line = ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _outputs(started: Daemon, folder: Path) -> list[list[str]]:
    """The lines that each block has written. They run in one shell, as the page says, and so share its variables.

    Two seconds may be little for a container on a busy machine.
    """
    script = "echo; echo NEXT\n".join(_blocks("run")).replace("localhost:3000", f"localhost:{started.port}")
    out = _shell(script.replace("timeout 2 ", "timeout 5 "), folder)
    return [[line for line in part.splitlines() if line] for part in out.split("NEXT\n")]


def _objects(line: str) -> list[dict[str, Any]]:
    """JSON objects that follow each other without a newline, as curl prints answers."""
    decoder, objects, offset = json.JSONDecoder(), [], 0
    while offset < len(line) and line[offset] == "{":
        value, offset = decoder.raw_decode(line, offset)
        objects.append(value)
    return objects


def test_the_commands_work(daemon: DaemonFactory, tmp_path: Path) -> None:
    first, live, watch, stop, twice = _outputs(daemon(), tmp_path)
    told = json.loads(_block("json", '"logs": ["Hello, world"]'))
    answer = json.loads("".join(first))
    for name in ("status", "reason", "exitCode", "image", "logs", "logsTruncated", "artifacts", "extracted"):
        assert answer[name] == told[name]
    assert told.keys() <= answer.keys()

    events = [json.loads(line) for line in live]
    told_events = [json.loads(line) for line in _block("json", '"event": "accepted"').splitlines()]
    assert [_essence(event) for event in events] == [_essence(event) for event in told_events]

    assert [state["status"] for state in _objects(watch[0])] == ["running", "running"]
    assert re.search(r"(?m)(^|\})tick 1$", "\n".join(watch))

    state, told = json.loads("".join(stop)), json.loads(_block("json", '"bye"'))
    assert [state[name] for name in ("status", "reason", "exitCode")] == [told[name] for name in ("status", "reason", "exitCode")]
    assert (state["logs"][0], state["logs"][-1]) == (told["logs"][0], told["logs"][-1])

    once, again = _objects("".join(twice))
    assert once == again


def _essence(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in {"id", "run"}}


def test_the_socket_command_works(daemon: DaemonFactory, tmp_path: Path) -> None:
    started = daemon(socket=True)
    (block,) = _blocks("run socket")
    answer = json.loads(_shell(block.replace("/tmp/lightrun.sock", str(started.socket)), tmp_path))
    told = json.loads(_block("json", '"logs": ["0"]'))
    assert {**told, "id": answer["id"]}.items() <= answer.items()


def test_files_go_from_run_to_run(daemon: DaemonFactory, tmp_path: Path) -> None:
    started = daemon()
    (block,) = _blocks("run files")
    out = _shell(block.replace("localhost:3000", f"localhost:{started.port}"), tmp_path)
    first = json.loads((tmp_path / "first.json").read_text())
    assert (first["logs"], first["exitCode"]) == (["world"], 0)
    assert [entry["path"] for entry in first["artifacts"]] == ["built", "built/bin", "built/bin/tool"]
    assert out.strip() == _block("json", '"built for you"').strip()


def test_commands_follow_each_other_in_a_run(daemon: DaemonFactory, tmp_path: Path) -> None:
    started = daemon()
    (block,) = _blocks("run exec")
    out = _shell(block.replace("localhost:3000", f"localhost:{started.port}"), tmp_path)
    seen = _objects(out.strip())
    told = [json.loads(line) for line in _block("json", '"through').splitlines()]
    assert [{**answer, "durationMs": 0} for answer in seen] == [{**answer, "durationMs": 0} for answer in told]
    assert (tmp_path / "sorted").read_text() == "4\n3\n"
    (run,) = started.request("GET", "/runs").json()
    assert started.wait(run["id"])["reason"] == "cancelled"
    assert eventually(lambda: not started.containers())


# ---------------------------------------------------------------- The client


def _at_a_shell(mark: str, started: Daemon, built: Path, folder: Path, home: Path) -> str:
    """What a block that calls `lightrun` writes, with standard error where the two meet on a terminal."""
    (block,) = _blocks(mark)
    assert started.socket
    variables = f"export HOME={home} LIGHT_RUN_URL=unix://{started.socket}; exec 2>&1\n"
    return _shell(f'{variables}lightrun() {{ {sys.executable} {built} "$@"; }}\n{block}', folder)


def test_the_client_works_as_it_says(daemon: DaemonFactory, built: Path, tmp_path: Path) -> None:
    out = _at_a_shell("run shell", daemon(socket=True), built, tmp_path, tmp_path)
    told = _block("text", "exit code 124")
    *lines, row = out.strip().splitlines()
    *told_lines, told_row = told.strip().splitlines()
    assert lines == told_lines
    for each in (row, told_row):
        assert [each.split()[index] for index in (1, 2, 3, 6)] == ["lightrun/busybox", "succeeded", "0", "who=me"]


@pytest.mark.parametrize("code", [0, 3])
def test_the_ci_job_works_as_it_says(daemon: DaemonFactory, built: Path, tmp_path: Path, code: int) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/tests.sh").write_text(f"echo '<testsuite/>'; exit {code}")
    (block,) = _blocks("run ci")
    started = daemon(socket=True)
    env = {"HOME": str(tmp_path), "LIGHT_RUN_URL": f"unix://{started.socket}", "PATH": os.environ["PATH"], "CI": "true"}
    script = f'lightrun() {{ {sys.executable} {built} "$@"; }}\n{block}'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(rf"lightrun: run .*, exit code {code}, .*MiB of memory\n", done.stderr)
    kept = {path.name: path.read_text() for path in (tmp_path / "work/artifacts").iterdir()}
    assert kept == {"junit.xml": "<testsuite/>\n", "coverage": "87%\n"}


def test_the_library_works_as_it_says(daemon: DaemonFactory, built: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"<!-- run python -->\n```python\n(.*?)```\n", README, re.DOTALL)
    (tmp_path / "lightrun.pyz").symlink_to(built)
    env = {"HOME": str(tmp_path), "LIGHT_RUN_URL": f"unix://{daemon(socket=True).socket}"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == _block("text", "as it comes\\n")


# ---------------------------------------------------------------- A class


PROGRAMS = {  # and what the grader sees: reason, exit code, whether the output is right
    "read a b; echo $((a + b))": ("exited", "0", "true"),
    "read a b; echo $((a - b))": ("exited", "0", "false"),
    "read a b; echo $((a / 0))": ("exited", "2", "false"),
    "dd if=/dev/zero of=big bs=1M count=11": ("exited", "153", "false"),
    "while :; do :; done": ("cpu_limit", "137", "false"),
    "read a b; read c; sleep 60": ("timeout", "137", "false"),
    "tail /dev/zero": ("oom", "137", "false"),
    "yes": ("output_limit", "137", "false"),
}


def test_a_class_is_graded(daemon: DaemonFactory, tmp_path: Path) -> None:
    started = daemon("--max-concurrent", "4")
    (tmp_path / "question").write_text("3 4\n")
    (tmp_path / "answer").write_text("7\n")
    (tmp_path / "class").mkdir()
    wanted = {}
    for number, program in enumerate([*PROGRAMS] + [next(iter(PROGRAMS))] * (10 - len(PROGRAMS))):
        (tmp_path / f"class/{number}.sh").write_text(program)
        wanted[f"class/{number}.sh.json"] = PROGRAMS[program]
    (block,) = _blocks("run graders")
    lines = _shell(block.replace("localhost:3000", f"localhost:{started.port}"), tmp_path).splitlines()
    seen = {name: tuple(verdict) for name, *verdict, _ in (line.split("\t") for line in lines)}
    assert seen == wanted
    assert all(int(line.split("\t")[-1]) <= 1200 for line in lines)
    reasons = re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`.*?) \|", README[README.index("| result | verdict |") :])))
    assert set(lightrun.REASONS) - {"stopped", "cancelled", "idle"} <= set(reasons)


@pytest.mark.parametrize("body", [b"", b'{"id": "1"}', "ü\n".encode()])
def test_callbacks_are_verified_as_told(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_bytes(body)
    header = lightrun.signature(SECRET, body)
    names: dict[str, Any] = {}
    exec(_block("python", "def is_genuine"), names)
    assert names["is_genuine"](SECRET, body, header)
    assert not names["is_genuine"](SECRET, body, header[:-1] + "é")
    assert not names["is_genuine"](SECRET, body + b" ", header)
    script = "secret=$1 header=$2\n" + _block("sh", "openssl dgst")
    assert _shell(script, tmp_path, SECRET, header) == "genuine\n"
    assert _shell(script + "true\n", tmp_path, SECRET, "sha256=0") == ""


def test_the_token_command_makes_one_token(tmp_path: Path) -> None:
    command = _block("sh", "token_urlsafe").splitlines()[0]
    _shell(command, tmp_path)
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"[\w-]{43}\n", (tmp_path / "tokens").read_text())


def test_the_json_blocks_are_json() -> None:
    for block in re.findall(r"```json\n(.*?)```\n", README, re.DOTALL):
        for value in block.splitlines() if block.startswith(('{"event"', '{"reason"')) else [block]:
            json.loads(value)
