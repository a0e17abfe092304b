"""The client: `lightrun run` and the commands beside it as a person uses them, and `lightrun.Client` as a library."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import marshal
import os
import pty
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

import lightrun
from conftest import KEPT_VARIABLES, ROOT, Daemon, DaemonFactory, certify_localhost, eventually, free_port, longer
from engine import IMAGE
from images import Registry

OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
README = (ROOT / "README.md").read_text("utf-8")
MIB = 1 << 20
OFFLINE = ("--network", "none")
IMPORT_SECONDS = 0.25
HEAVY = {"bottle", "waitress", "docker", "requests"}
LONG = "echo ready; sleep 60"
TICKS = "while :; do echo y; sleep 0.1; done"


@pytest.fixture(scope="module")
def shared(module_daemon: DaemonFactory) -> Daemon:
    """A daemon that these tests share."""
    return module_daemon(socket=True)


@pytest.fixture(scope="module")
def shared_tcp(module_daemon: DaemonFactory) -> Daemon:
    """Another one, on TCP with a token."""
    return module_daemon("--token", "sesame")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the compiled module is kept: else each command would take its time to compile it."""
    return tmp_path_factory.mktemp("home")


def url_of(daemon: Daemon) -> str:
    """What a client calls a daemon."""
    return f"unix://{daemon.socket}" if daemon.socket else daemon.url


class Ended:
    """A command that has ended."""

    def __init__(self, process: subprocess.Popen[bytes], out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = process.returncode, out, err.decode()


class Command(Protocol):
    """What the `command` fixture is."""

    def __call__(
        self, *arguments: str | Path, on: Daemon | None = None, stdin: bytes | None = None, timeout: float = 60,
        variables: dict[str, str] | None = None,
    ) -> Ended: ...  # fmt: skip


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(built: Path, home: Path, shared: Daemon, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a command of the built zip; none outlives its test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(
        *arguments: str | Path, on: Daemon | None = None, python: tuple[str, ...] = ("-W", "error"),
        variables: dict[str, str] | None = None, **options: Any,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        env = {**kept, "HOME": str(home), "LIGHT_RUN_URL": url_of(on or shared), **(variables or {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, *python, str(built), *map(str, arguments)]
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path, **{**pipes, **options}))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


@pytest.fixture
def command(start: Start) -> Command:
    """A function that runs a command to its end."""

    def run(
        *arguments: str | Path, on: Daemon | None = None, stdin: bytes | None = None, timeout: float = 60,
        variables: dict[str, str] | None = None,
    ) -> Ended:  # fmt: skip
        process = start(*arguments, on=on, variables=variables)
        return Ended(process, *process.communicate(stdin, timeout))

    return run


def only_run(daemon: Daemon, label: str) -> dict[str, Any]:
    """The state of the one run with this label, when there is one."""
    found = eventually(lambda: daemon.request("GET", f"/runs?label={label}", headers=daemon._authorization()).json())
    assert len(found) == 1
    return daemon.state(found[0]["id"])


def running(daemon: Daemon, label: str) -> str:
    """The id of the one run with this label, when its command has printed something."""
    run: str = only_run(daemon, label)["id"]
    daemon.wait_for(run, lambda state: state["logs"])
    return run


# ---------------------------------------------------------------- run: the streams and the exit code


def test_it_is_as_docker_run(command: Command) -> None:
    done = command("run", *OFFLINE, IMAGE, "--", "sh", "-c", "printf out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, b"out", "err\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((IMAGE, "--", "true"), 0, r"^$"),
        ((IMAGE, "--shell", "kill -9 $$"), 137, r"^$"),
        ((IMAGE, "--", "/no/such/program"), 127, r"/no/such/program"),
        ((IMAGE, "--timeout", "300ms", "--", "sleep", "60"), 124, r"^lightrun: timeout: .*\n$"),
        ((IMAGE, "--output-limit", "5", "--shell", "yes"), 137, r"^lightrun: output_limit: .*\n$"),
        ((IMAGE, "--setup", "exit 3", "--shell", "true"), 3, r"setup\[0\] failed with exit code 3\n$"),
        (("127.0.0.1:1/absent", "--", "true"), 125, r"^lightrun: pull_failed: .*\n$"),
        ((IMAGE, "--workdir", "/bin/sh", "--", "true"), 125, r"^lightrun: start_failed: .*\n$"),
        ((IMAGE, "--memory", "1", "--env", "1=2", "--", "true"), 125, r"^lightrun: --env\.1: .*; --memory: .*\n$"),
        ((IMAGE, "--timeout", "300", "--", "true"), 125, r"^lightrun: .*--timeout: must be a duration.*\n$"),
        ((IMAGE, "echo", "hi"), 125, r"^lightrun: what to do with echo\? The command stands behind --: .*\n$"),
        ((IMAGE, "--dir", "/no/such", "--", "true"), 125, r"^lightrun: /no/such: .*\n$"),
        ((IMAGE, "--network", "other", "--", "true"), 125, r"^lightrun: .*--allow-network.*\n$"),
        *longer(
            ((IMAGE, "--workdir", "app", "--", "true"), 125, r"^lightrun: --workdir: must be an absolute path.*\n$"),
            ((IMAGE, "--label", "x", "--", "true"), 125, r"^lightrun: .*--label: must be NAME=VALUE\n$"),
            ((IMAGE, "--pids", "many", "--", "true"), 125, r"^lightrun: .*--pids.*\n$"),
            ((IMAGE, "--nope", "--", "true"), 125, r"^lightrun: what to do with --nope\? .*\n$"),
            ((IMAGE, "--shell", "true", "--", "true"), 125, r"^lightrun: --shell and a command .*\n$"),
            ((), 125, r"^lightrun: .*IMAGE\n$"),
            ((IMAGE, "--file", "x=/no/such", "--", "true"), 125, r"^lightrun: /no/such: .*\n$"),
            ((IMAGE, "--network", "host", "--", "true"), 125, r"^lightrun: --network: .*\n$"),
            ((IMAGE, "--url", "ftp://x", "--", "true"), 125, r"^lightrun: the URL must be .*\n$"),
            ((IMAGE, "--token-file", "/no/such", "--", "true"), 125, r"^lightrun: /no/such: cannot be read: .*\n$"),
        ),
    ],
)
def test_exit_codes(command: Command, arguments: tuple[str, ...], code: int, says: str) -> None:
    network = () if "--network" in arguments or not arguments else OFFLINE
    done = command("run", *network, *arguments)
    assert re.search(says, done.err), done.err
    assert (done.code, done.out if code != 137 else b"") == (code, b"")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "unix:///no/such/socket", "http://no.such.host.invalid"])
def test_no_daemon_is_told_at_once(command: Command, address: str) -> None:
    began = time.monotonic()
    done = command("run", IMAGE, "--", "true", variables={"LIGHT_RUN_URL": address.format(port=free_port())})
    assert (done.code, done.err.startswith("lightrun: no daemon answers at ")) == (125, True)
    assert time.monotonic() - began < 20


def test_what_is_not_lightrun_is_told(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            near = server.accept()[0]
            with near:
                near.recv(65536)
                near.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ok>")

        threading.Thread(target=answer, daemon=True).start()
        done = command("ps", variables={"LIGHT_RUN_URL": f"http://127.0.0.1:{server.getsockname()[1]}"})
    assert (done.code, "is not lightrun" in done.err, "Traceback" in done.err) == (1, True, False)


def test_streams_are_exact(command: Command, shared_tcp: Daemon) -> None:
    """20 MB to stdout, more than is kept, and 3 MB to stderr meanwhile."""
    script = "yes 0123456789abcde | head -c 3200000 >&2 & head -c 20000000 /dev/urandom | tee /tmp/x; wait; sha256sum /tmp/x >&2"
    done = command("run", *OFFLINE, IMAGE, "--shell", script, on=shared_tcp, variables={"LIGHT_RUN_TOKEN": "sesame"})
    assert (done.code, len(done.out)) == (0, 20_000_000)
    assert done.err == 200_000 * "0123456789abcde\n" + f"{hashlib.sha256(done.out).hexdigest()}  /tmp/x\n"


def test_parts_of_lines_come_as_they_are_written(start: Start, shared: Daemon) -> None:
    process = start("run", *OFFLINE, "--label", "test=parts", IMAGE, "--shell", r"printf '10%%\r'; sleep 60")
    assert process.stdout
    assert os.read(process.stdout.fileno(), 100) == b"10%\r"
    shared.request("POST", f"/runs/{running(shared, 'test=parts')}/cancel")
    assert process.wait(20) == 137


def test_a_pipe_that_does_not_block_is_waited_for(start: Start) -> None:
    """As some shells leave it: every byte comes all the same."""
    near, far = os.pipe()
    os.set_blocking(far, False)
    process = start("run", *OFFLINE, IMAGE, "--", "head", "-c", "3000000", "/dev/zero", stdout=far)
    os.close(far)
    time.sleep(1)  # it is full by then
    with os.fdopen(near, "rb") as out:
        assert len(out.read()) == 3_000_000
    assert process.wait(20) == 0


def test_standard_input_that_does_not_block_is_waited_for(start: Start) -> None:
    """Nothing is there at first, and then a part of it."""
    near, far = os.pipe()
    os.set_blocking(near, False)
    process = start("run", *OFFLINE, "-i", IMAGE, "--", "cat", stdin=near)
    with os.fdopen(far, "wb", buffering=0) as pipe:
        assert eventually(lambda: heeds(process, signal.SIGTERM) and psutil.Process(process.pid).status() == "sleeping")
        pipe.write(b"one ")
        assert eventually(lambda: fcntl.ioctl(near, termios.FIONREAD, bytes(4)) == bytes(4)), "it was not read"
        pipe.write(b"two")
    os.close(near)
    assert (process.communicate(timeout=20), process.returncode) == ((b"one two", b""), 0)


def test_stdin_is_sent_only_when_asked(command: Command) -> None:
    data = random.Random(1).randbytes(6 * MIB)
    for url in ((), ("-i",), ("--interactive",)):
        done = command("run", *OFFLINE, *url, IMAGE, "--", "sha256sum", stdin=data)
        assert done.out.split()[0].decode() == hashlib.sha256(data if url else b"").hexdigest()


@pytest.mark.long
def test_a_loop_that_reads_keeps_its_lines(built: Path, shared: Daemon, home: Path) -> None:
    script = f'while read line; do {sys.executable} {built} run --network none {IMAGE} -- echo "got $line"; done'
    env = {**os.environ, "HOME": str(home), "LIGHT_RUN_URL": url_of(shared)}
    done = subprocess.run(["sh", "-c", script], input="1\n2\n3\n", env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "got 1\ngot 2\ngot 3\n"


def test_environment_and_options_reach_the_program(command: Command, shared: Daemon) -> None:
    done = command(
        "run", "--network=none", "--env", "A=1", "--env", "B", "--env", "C=x=y z", "--env", "ABSENT", "--workdir", "/srv/w",
        "--label", "test=options", "--label", "b=c=d", "--memory", "32m", "--cpus", "0.5", "--pids", "20", "--file-size", "1m",
        "--cpu-time", "10s", IMAGE, "--shell", 'echo "$A $B $C ${ABSENT-none} $(pwd)"; ulimit -f', variables={"B": "from here"},
    )  # fmt: skip
    assert (done.code, done.out) == (0, b"1 from here x=y z none /srv/w\n2048\n")
    assert only_run(shared, "b=c%3Dd")["labels"] == {"test": "options", "b": "c=d"}


def test_usage_is_one_line(command: Command) -> None:
    done = command("run", *OFFLINE, "--usage", IMAGE, "--", "true")
    assert re.fullmatch(
        r"lightrun: run [0-9a-f-]{36}, exited, exit code 0, \d+ ms \(.*run \d+ ms.*\), \d+ ms of CPU, [\d.]+ MiB of memory\n",
        done.err,
    )


def test_the_images_own_command(command: Command) -> None:
    assert command("run", *OFFLINE, IMAGE).code == 0  # sh, without anything to read


def test_detached(command: Command, shared: Daemon) -> None:
    done = command("run", *OFFLINE, "--detach", IMAGE, "--shell", "sleep 1; echo later")
    run = done.out.decode().strip()
    assert (done.code, done.err, done.out) == (0, "", f"{run}\n".encode())
    assert shared.wait(run)["logs"] == ["later"]


def test_tokens(command: Command, shared_tcp: Daemon, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\nteam sesame max=3\nother\n")
    line = ("run", *OFFLINE, IMAGE, "--", "echo", "hi")
    for arguments, variables in [
        (("--token", "sesame"), {}), (("--token-file", "token"), {}), ((), {"LIGHT_RUN_TOKEN": "sesame"}),
        ((), {"LIGHT_RUN_TOKEN_FILE": str(tmp_path / "token")}), (("--token", "sesame"), {"LIGHT_RUN_TOKEN": "wrong"}),
    ]:  # fmt: skip
        assert command(line[0], *arguments, *line[1:], on=shared_tcp, variables=variables).out == b"hi\n"
    for arguments in ((), ("--token", "wrong"), ("--token", "w\u00fcst")):
        done = command(line[0], *arguments, *line[1:], on=shared_tcp)
        assert (done.code, done.out, done.err.count("\n")) == (125, b"", 1)


# ---------------------------------------------------------------- run: files


def tree(folder: Path) -> dict[str, tuple[bytes | None, bool]]:
    """What is in a folder: content, None for folders, and whether it may be executed."""
    found = {}
    for path in folder.rglob("*"):
        content = None if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = content, content is not None and os.access(path, os.X_OK)
    return found


@pytest.mark.long
def test_a_large_folder_in_and_out(command: Command, tmp_path: Path) -> None:
    """2,000 files with all kinds of names, in one command."""
    source, dice = tmp_path / "in", random.Random(2)
    for number in range(2_000):
        path = source / f"d{number % 40}" / f"{dice.choice(['a', 'ü', ' ', '-x', '*', ':', 'a' * 90])}{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dice.randbytes(dice.choice([0, 1, 512, 3000])))
        path.chmod(dice.choice([0o644, 0o755, 0o600]))
    (source / "empty").mkdir()
    done = command(
        "run", *OFFLINE, "--dir", "in", "--extract", ".:all", "--output", "out", IMAGE, "--shell", "find . -type f | wc -l"
    )
    assert (done.code, done.out.strip(), done.err) == (0, b"2000", "")
    assert tree(tmp_path / "out/all") == tree(source)


def test_single_files(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("echo ran; cat data/b")
    (tmp_path / "a.sh").chmod(0o755)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b").write_text("of the folder")
    (tmp_path / "link").symlink_to("a.sh")
    (tmp_path / "c").write_bytes(b"\0\xff")
    done = command("run", *OFFLINE, "--file", "a.sh", "--file", "data/b=c", IMAGE, "--", "./a.sh")
    assert (done.code, done.out) == (0, b"ran\n\0\xff")
    done = command(
        "run", *OFFLINE, "--dir", "in", "--file", "b=c", "--file", "x=link", IMAGE, "--shell", "cat b; ./x | head -n 1"
    )
    assert (done.code, done.out) == (0, b"\0\xffran\n")


def test_what_dockerignore_names_stays_here(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in (
        ".git/config",
        "a.pyc",
        "b.py",
        "deep/a.pyc",
        "deep/er/c.log",
        "build/x",
        "build/keep",
        "docs/a",
        "temp1/x",
        "#x",
        "sub/.git",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / ".dockerignore").write_text("# a comment\n\n**/*.pyc\n/build\n!build/keep\n deep/*/*.log \ndocs/\ntemp?\n")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--shell", "find . -type f | sort")
    assert done.out.decode().split() == ["./#x", "./.dockerignore", "./b.py", "./build/keep", "./sub/.git"]
    (source / ".dockerignore").write_text("!.git\n*\n!b.*\n!.git/**\n")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--shell", "find . -type f | sort")
    assert done.out.decode().split() == ["./.git/config", "./b.py"]


@pytest.mark.parametrize(
    ("pattern", "matches", "spares"),
    [
        ("a/b", ["a/b", "a/b/c"], ["a", "b", "a/bc", "x/a/b"]),
        ("*", ["a", ".b", "a/b"], []),
        ("*/*.c", ["a/x.c", "a/x.c/y"], ["x.c", "a/b/x.c"]),
        ("**/x", ["x", "a/x", "a/b/x", "a/x/y"], ["ax", "xa"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["az", "a/bz"]),
        ("[a-c]?", ["ax", "b1"], ["a", "d1", "abc"]),
        ("[^a]x", ["bx"], ["ax", "x"]),
        (r"\*", ["*"], ["a"]),
        ("a.b", ["a.b"], ["aXb"]),
        ("./a//b/../c", ["a/c"], ["a/b"]),
        ("a[b", ["a[b"], ["ab"]),
    ],
)
def test_patterns_of_dockerignore(tmp_path: Path, pattern: str, matches: list[str], spares: list[str]) -> None:
    (tmp_path / ".dockerignore").write_text(pattern)
    ignored = lightrun.DockerIgnore(tmp_path)
    assert [name for name in matches + spares if ignored.matches(name)] == matches


def test_links_of_a_folder(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "file").write_text("x")
    (source / "link").symlink_to("file")
    os.link(source / "file", source / "hard")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--shell", "readlink link; cat hard; stat -c %h file")
    assert (done.code, done.out) == (0, b"file\nx2\n")
    (source / "out").symlink_to("/etc/passwd")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--", "true")
    assert (done.code, "out" in done.err) == (125, True)
    (source / "out").unlink()
    os.mkfifo(source / "pipe")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--", "true")
    assert (done.code, "in/pipe is neither a file, a folder nor a link" in done.err) == (125, True)


def test_a_body_over_the_limit_is_told(command: Command, tmp_path: Path, shared: Daemon, shared_tcp: Daemon) -> None:
    (tmp_path / "large").write_bytes(bytes(40 * MIB))
    for daemon in (shared, shared_tcp):
        began = time.monotonic()
        done = command(
            "run", *OFFLINE, "--file", "large", IMAGE, "--", "true", on=daemon, variables={"LIGHT_RUN_TOKEN": daemon.token or ""}
        )
        assert (done.code, "--body-limit" in done.err) == (125, True), done.err
        assert time.monotonic() - began < 20


MAKES_FILES = "mkdir -p out/deep; echo 1 > out/a; echo 2 > out/deep/b; chmod +x out/a; ln -s /etc/passwd out/link; exit 4"


def test_artifacts_come_whatever_the_exit_code(command: Command, tmp_path: Path) -> None:
    done = command("run", *OFFLINE, "--extract", "out", "--output", "got/here", IMAGE, "--shell", MAKES_FILES)
    assert done.code == 4
    assert tree(tmp_path / "got/here") == {"a": (b"1\n", True), "deep": (None, False), "deep/b": (b"2\n", False)}


def test_artifacts_that_are_missing_are_told(command: Command) -> None:
    done = command("run", *OFFLINE, "--extract", "no", "--extract", "/etc/hostname:h", IMAGE, "--", "true")
    assert (done.code, done.err) == (125, "lightrun: --extract no: missing\n")
    assert command("run", *OFFLINE, "--extract", "no", IMAGE, "--shell", "exit 3").code == 3
    assert command("run", *OFFLINE, "--extract", "no", "--extract-on", "success", IMAGE, "--shell", "exit 3").code == 3


def test_nothing_is_overwritten_unless_asked(command: Command, tmp_path: Path, shared: Daemon) -> None:
    line = (
        "run",
        *OFFLINE,
        "--label",
        "test=overwrite",
        "--extract",
        "out",
        IMAGE,
        "--shell",
        "mkdir out; echo new | tee out/a > out/b",
    )
    (tmp_path / "b").write_text("old")
    done = command(*line)
    assert (done.code, "b is there already" in done.err) == (125, True)
    assert tree(tmp_path) == {"b": (b"old", False)}
    run = only_run(shared, "test=overwrite")["id"]
    assert f"lightrun cp {run}" in done.err
    assert command("cp", run, ".").code == 1
    assert command("cp", run[:13], "new").code == 0
    assert tree(tmp_path / "new") == {"a": (b"new\n", False), "b": (b"new\n", False)}
    (tmp_path / "other").write_text("other")
    (tmp_path / "b").unlink()
    os.link(tmp_path / "other", tmp_path / "b")
    assert command("cp", "--overwrite", run, ".").code == 0
    assert ((tmp_path / "b").read_text(), (tmp_path / "other").read_text()) == ("new\n", "other")
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    done = command("cp", "--overwrite", run, ".")
    assert (done.code, "a is there already" in done.err) == (1, True)


def test_nothing_is_written_through_a_link(command: Command, tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    (here / "deep").symlink_to(elsewhere)
    line = (
        "run",
        *OFFLINE,
        "--extract",
        "out",
        "--output",
        "here",
        "--overwrite",
        IMAGE,
        "--shell",
        MAKES_FILES.replace("exit 4", "true"),
    )
    done = command(*line)
    assert (done.code, "deep is there already, and is not a folder" in done.err) == (125, True)
    assert (list(elsewhere.iterdir()), sorted(path.name for path in here.iterdir())) == ([], ["deep"])
    (here / "deep").unlink()
    (here / "a").symlink_to(elsewhere / "victim")
    assert command(*line).code == 0
    assert (list(elsewhere.iterdir()), (here / "a").is_symlink(), (here / "a").read_text()) == ([], False, "1\n")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"evil") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content) if kind == tarfile.REGTYPE else 0, 0o7777
    return info, content


@pytest.mark.parametrize(
    "members",
    [
        [member("../x")], [member("/x")], [member("a/../../x")], [member("a/./x")], [member("a//x")],
        [member("..", tarfile.DIRTYPE)], [member("x", tarfile.SYMTYPE, "/etc/passwd")],
        [member("x", tarfile.LNKTYPE, "/etc/passwd")], [member("x", tarfile.CHRTYPE)], [member("x", tarfile.FIFOTYPE)],
        [member("fine"), member("x", tarfile.SYMTYPE, ".."), member("x/y")],
        [member("a"), member("a/b")], [member("x"), member("x")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_tar_of_an_evil_daemon(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], overwrite: bool) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    file.seek(0)
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(lightrun.NotWritten):
        lightrun.unpack(file, folder, overwrite)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- run: signals, pipes, connections that break


def heeds(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now."""
    caught = re.search(r"SigCgt:\t(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    assert caught
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cancels_the_run(start: Start, shared: Daemon, number: signal.Signals, code: int) -> None:
    label = f"test=signal-{number}"
    process = start("run", *OFFLINE, "--label", label, IMAGE, "--shell", LONG)
    run = running(shared, label)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, b"ready\n", b"lightrun: cancelling; a second signal leaves it\n")
    assert shared.state(run)["reason"] == "cancelled"


@pytest.mark.long
def test_a_second_signal_leaves_at_once(start: Start, daemon: DaemonFactory) -> None:
    own = daemon(socket=True)
    process = start("run", *OFFLINE, "--label", "test=leave", IMAGE, "--shell", LONG, on=own)
    run = running(own, "test=leave")
    own.process.send_signal(signal.SIGSTOP)  # it does not answer
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    own.process.send_signal(signal.SIGCONT)
    own.request("POST", f"/runs/{run}/cancel")
    own.wait(run)


def test_a_signal_while_stdin_is_read_starts_nothing(start: Start, shared: Daemon) -> None:
    process = start("run", *OFFLINE, "-i", "--label", "test=none", IMAGE, "--", "cat")
    assert eventually(lambda: heeds(process, signal.SIGTERM))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert shared.request("GET", "/runs?label=test=none").json() == []


def test_a_reader_that_leaves_ends_the_run(start: Start, shared: Daemon) -> None:
    process = start("run", *OFFLINE, "--label", "test=head", IMAGE, "--shell", TICKS)
    assert process.stdout
    assert os.read(process.stdout.fileno(), 2) == b"y\n"
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr
    assert process.stderr.read() == b""
    assert shared.wait(only_run(shared, "test=head")["id"])["reason"] == "cancelled"


def test_a_full_disk_ends_the_run(start: Start, shared: Daemon) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start("run", *OFFLINE, "--label", "test=full", IMAGE, "--shell", TICKS, stdout=full)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (125, b"lightrun: the output cannot be written: No space left on device\n")
    assert shared.wait(only_run(shared, "test=full")["id"])["reason"] == "cancelled"


class Breaker:
    """A TCP port before a daemon that breaks connections after so many bytes of answers, again and again. With TLS, if there is
    a context; what paths begin with is taken away."""

    def __init__(
        self, daemon: Daemon, every: int, tls: ssl.SSLContext | None = None, prefix: bytes = b"", pause: float = 0
    ) -> None:  # fmt: skip
        self._daemon, self.every, self.broken, self._tls, self._prefix = daemon, every, 0, tls, prefix
        self._pause, self.passed = pause, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more."""
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listening.accept()[0]
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._between(self._tls.wrap_socket(near, server_side=True) if self._tls else near)

    def _between(self, near: socket.socket) -> None:
        with near, self._daemon.connect() as far:
            threading.Thread(target=self._pass_on, args=(near, far), daemon=True).start()
            left = self.every
            while left > 0 and (data := far.recv(min(left, 65536))):
                near.sendall(data)
                left -= len(data)
                self.passed += len(data)
                time.sleep(self._pause)
            if left <= 0:
                self.broken += 1
            near.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data.replace(b" " + self._prefix, b" ", 1) if self._prefix else data)


@pytest.mark.parametrize(("every", "size"), [(30_001, 60_000), (300_001, 900_000)])
def test_connections_that_break_lose_nothing(command: Command, shared: Daemon, every: int, size: int) -> None:
    """Output as it comes, in the order of the two streams, over many connections."""
    noise = f"dd if=/dev/urandom bs=500 count={size // 500} 2> /dev/null"
    script = f"{noise} | tee o; echo err >&2; sleep 0.5; printf x; sha256sum < o; exit 3"
    with contextlib.closing(Breaker(shared, every)) as breaker:
        done = command("run", *OFFLINE, IMAGE, "--shell", script, variables={"LIGHT_RUN_URL": breaker.url})
    assert (done.code, done.err) == (3, "err\n")
    assert breaker.broken > 2
    assert done.out[size:] == f"x{hashlib.sha256(done.out[:size]).hexdigest()}  -\n".encode()


def test_a_url_may_be_https_and_have_a_path(command: Command, shared_tcp: Daemon, tmp_path: Path) -> None:
    """A proxy with TLS, which passes on what lies below /runs-here."""
    certify_localhost(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with contextlib.closing(Breaker(shared_tcp, MIB, context, b"/runs-here")) as proxy:
        url = proxy.url.replace("http://127.0.0.1", "https://localhost") + "/runs-here/"
        variables = {"LIGHT_RUN_URL": url, "LIGHT_RUN_TOKEN": "sesame"}
        trusted = {**variables, "SSL_CERT_FILE": str(tmp_path / "cert")}
        assert command("run", *OFFLINE, IMAGE, "--", "echo", "hi", variables=trusted).out == b"hi\n"
        done = command("run", *OFFLINE, IMAGE, "--", "echo", "hi", variables=variables)
    assert (done.code, done.out, "certificate verify failed" in done.err) == (125, b"", True)


@pytest.mark.long
def test_a_connection_that_always_breaks_ends_in_an_error(command: Command, shared: Daemon) -> None:
    with contextlib.closing(Breaker(shared, 120)) as breaker:
        began = time.monotonic()
        done = command("ps", variables={"LIGHT_RUN_URL": breaker.url}, timeout=120)
    assert (done.code, "broke" in done.err) == (1, True)
    assert 30 < time.monotonic() - began < 100


def test_artifacts_come_over_connections_that_break(command: Command, shared: Daemon, tmp_path: Path) -> None:
    run = shared.run(entrypoint="head -c 3000000 /dev/urandom > o; sha256sum < o", extract=["o"])
    breaker = Breaker(shared, 400_000)

    def mend() -> None:
        if eventually(lambda: breaker.broken >= 2):
            breaker.every = 10 * MIB

    threading.Thread(target=mend, daemon=True).start()
    with contextlib.closing(breaker):
        assert command("cp", run["id"], "out", variables={"LIGHT_RUN_URL": breaker.url}).code == 0
    assert hashlib.sha256((tmp_path / "out/o").read_bytes()).hexdigest() == run["logs"][0].split()[0]


def test_a_daemon_that_is_killed_loses_no_byte(start: Start, daemon: DaemonFactory) -> None:
    own = daemon()
    script = "i=0; while [ $i -lt 300 ]; do echo $i; echo e$i >&2; sleep 0.02; i=$((i+1)); done; exit 6"
    process = start("run", *OFFLINE, "--label", "test=killed", IMAGE, "--shell", script, on=own)
    running(own, "test=killed")
    for pause in (0.5, 3):
        own.kill()
        time.sleep(pause)
        own.start()
        time.sleep(0.3)
    out, err = process.communicate(timeout=60)
    assert out.decode().split() == [str(number) for number in range(300)]
    assert err.decode().split() == [f"e{number}" for number in range(300)]
    assert process.returncode == 6


@pytest.mark.long
def test_a_daemon_that_restarts_is_waited_for(start: Start, daemon: DaemonFactory) -> None:
    """SIGTERM, with a run on its way and another about to be sent."""
    own = daemon("--drain", "0s", socket=True)
    process = start("run", *OFFLINE, "--label", "test=restart", IMAGE, "--shell", "echo a; sleep 4; echo b", on=own)
    running(own, "test=restart")
    own.stop()
    own.start()
    assert (process.communicate(timeout=60)[0], process.returncode) == (b"a\nb\n", 0)


def test_a_post_whose_answer_is_lost_runs_once(command: Command, shared: Daemon) -> None:
    """The connection breaks between the run's acceptance and the answer."""
    breaker = Breaker(shared, 10)

    def mend() -> None:
        if eventually(lambda: breaker.broken >= 2):
            breaker.every = MIB

    threading.Thread(target=mend, daemon=True).start()
    with contextlib.closing(breaker):
        done = command(
            "run", *OFFLINE, "--label", "test=once", IMAGE, "--", "echo", "hi", variables={"LIGHT_RUN_URL": breaker.url}
        )
    assert (done.code, done.out) == (0, b"hi\n")
    assert only_run(shared, "test=once")["exitCode"] == 0


def test_output_that_nobody_reads_after_the_end(start: Start) -> None:
    process = start("run", *OFFLINE, IMAGE, "--", "head", "-c", "900000", "/dev/zero")
    assert process.stdout
    time.sleep(2)  # the run has ended, and the pipe is full
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr
    assert process.stderr.read() == b""


def test_a_signal_before_the_id_is_known_cancels_too(start: Start, daemon: DaemonFactory) -> None:
    own = daemon(socket=True)
    own.process.send_signal(signal.SIGSTOP)
    for detach in ((), ("--detach",)):
        process = start("run", *OFFLINE, *detach, IMAGE, "--shell", LONG, on=own)
        assert eventually(lambda: heeds(process, signal.SIGTERM))  # noqa: B023
        time.sleep(0.5)  # the request is on its way
        process.send_signal(signal.SIGINT)
        own.process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 130
        assert eventually(lambda: own.request("GET", "/runs?status=running").json() == [])  # --detach waits for no end
        own.process.send_signal(signal.SIGSTOP)
    own.process.send_signal(signal.SIGCONT)
    assert {state["reason"] for state in own.request("GET", "/runs").json()} == {"cancelled"}


@pytest.mark.parametrize("arguments", [("logs", "-f"), ("stop", "--grace", "20s")])
def test_a_signal_ends_a_command_that_waits(start: Start, shared: Daemon, arguments: tuple[str, ...]) -> None:
    run = shared.detach(entrypoint="trap '' TERM; echo ready; while :; do sleep 0.1; done")
    shared.wait_for(run, lambda state: state["logs"])
    process = start(*arguments, run)
    assert eventually(lambda: heeds(process, signal.SIGTERM))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.stderr
    assert process.stderr.read() == b""
    shared.request("POST", f"/runs/{run}/cancel")
    shared.wait(run)


@pytest.mark.long
def test_what_is_ignored_stays_ignored(start: Start, sandbox: str) -> None:
    """As under nohup."""
    ignoring: Any = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    for line in (("exec", sandbox), ("run", *OFFLINE, IMAGE)):
        process = start(*line, "--shell", "echo ready; sleep 1; exit 5", preexec_fn=ignoring)
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 5


@pytest.mark.parametrize("signals", [1, *longer(2)])
def test_a_signal_while_artifacts_come_leaves_no_half_file(start: Start, shared: Daemon, tmp_path: Path, signals: int) -> None:
    run = shared.run(entrypoint="head -c 30000000 /dev/urandom > o", extract=["o"])["id"]
    with contextlib.closing(Breaker(shared, 30 * MIB, pause=0.02)) as slow:
        process = start("cp", run, "out", variables={"LIGHT_RUN_URL": slow.url})
        assert eventually(lambda: slow.passed > 2 * MIB)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_order_whose_answer_is_lost_was_obeyed(command: Command, shared: Daemon) -> None:
    for name in ("cancel", "stop", "rm"):
        run = shared.detach(entrypoint="exec sleep 60" if name != "rm" else "true")
        if name == "rm":
            shared.wait(run)
        breaker = Breaker(shared, 5)  # no answer comes through, until two were lost

        def mend(breaker: Breaker = breaker) -> None:
            if eventually(lambda: breaker.broken >= 2):
                breaker.every = MIB

        threading.Thread(target=mend, daemon=True).start()
        with contextlib.closing(breaker):
            done = command(name, run, variables={"LIGHT_RUN_URL": breaker.url})
        assert (done.code, done.out.decode().strip(), done.err) == (0, run, "")


@pytest.mark.long
def test_what_cannot_be_joined_does_not_come_twice(start: Start, daemon: DaemonFactory, tmp_path: Path) -> None:
    """More output than the engine's copy holds, and then a daemon that is killed."""
    own = daemon("--log-limit", "64k", socket=True)
    script = "i=0; while [ $i -lt 60000 ]; do echo line $i; i=$((i+1)); done; echo ready >&2; sleep 4; echo end"
    with (tmp_path / "out").open("wb") as out:
        process = start("run", *OFFLINE, "--label", "test=join", IMAGE, "--shell", script, on=own, stdout=out)
        assert process.stderr
        assert process.stderr.readline() == b"ready\n"
        # The engine reads the two streams beside each other.
        assert eventually(lambda: (tmp_path / "out").read_bytes().endswith(b"\nline 59999\n"))
        own.kill()
        own.start()
        err = process.communicate(timeout=60)[1].decode()
    lines = (tmp_path / "out").read_text().split("\n")
    assert lines[:60_000] == [f"line {number}" for number in range(60_000)]
    assert (process.returncode, "some of the output is missing" in err, lines[60_000:]) == (125, True, [""])


# ---------------------------------------------------------------- A daemon that is none


ID = "00000000-0000-4000-8000-000000000000"
STATE = {"id": ID, "status": "succeeded", "reason": "exited", "exitCode": 0, "logsTruncated": False}


def answers(body: bytes, head: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def events(*told: Any) -> dict[str, bytes]:
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in told]
    return {"POST /run": answers(json.dumps({"id": ID}).encode()), "GET /runs/": answers(b"\n".join([*lines, b""]))}


LOG = {"event": "log", "stream": "stdout", "at": 0, "base64": "aGk="}
LIES: dict[str, dict[str, bytes]] = {
    "a list": {"POST /run": answers(b"[]")},
    "nothing": {"POST /run": answers(b"")},
    "204": {"POST /run": answers(b"", b"204 No Content")},
    "a deep answer": {"POST /run": answers(b"[" * 100_000)},
    "another id": {"POST /run": answers(b'{"id": "\\u001b[2J"}')},
    "an evil id": {"POST /run": answers(b'{"id": "../../x"}')},
    "odd details": {"POST /run": answers(b'{"details": ["a"]}', b"400 Bad Request")},
    "odd paths": {"POST /run": answers(b'{"details": [{"path": 5, "message": 1}]}', b"400 Bad Request")},
    "not HTTP": {"POST /run": b"SSH-2.0-OpenSSH_9.2\r\n"},
    "a redirect": {"POST /run": answers(b"", b"302 Found\r\nLocation: http://elsewhere")},
    "a page": {"POST /run": answers(b"<html>", b"404 Not Found")},
    "events that are none": events([1]),
    "an event of no kind": events({"event": []}),
    "a log of nothing": events({"event": "log"}),
    "a log of another stream": events({**LOG, "stream": "stdin"}),
    "a log that is not base64": events({**LOG, "base64": "%"}),
    "a log from before its beginning": events({**LOG, "at": -3}),
    "a log from a text": events({**LOG, "at": "0"}),
    "an end without a run": events({"event": "finished"}),
    "an end without a reason": events({"event": "finished", "run": {}}),
    "an exit code that a shell has not": events({"event": "finished", "run": {**STATE, "exitCode": 256}}),
    "an exit code that is none": events({"event": "finished", "run": {**STATE, "exitCode": None}}),
}  # fmt: skip


class Liar:
    """Answers each request by what its first line begins with; where there are several answers, with each in turn."""

    def __init__(self, lies: Mapping[str, bytes | list[bytes]]) -> None:
        self._lies = lies
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """No more."""
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._listening.accept()[0] as near:
                    asked = near.recv(65536).decode()
                    for beginning, answer in self._lies.items():
                        if asked.startswith(beginning):
                            near.sendall(answer if isinstance(answer, bytes) else answer.pop(0))
                            near.shutdown(socket.SHUT_WR)
                            near.settimeout(1)
                            with contextlib.suppress(OSError):
                                near.recv(65536)


@pytest.mark.parametrize("lie", list(LIES))
def test_a_daemon_that_lies(lie: str, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Liar(LIES[lie])) as liar:
        code = main_here("run", "--url", liar.url, IMAGE, "--", "true")
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n"), "\x1b" in err, err[:10]) == (125, "", 1, False, "lightrun: "), err


def test_an_order_whose_answer_was_lost_is_only_obeyed_if_it_could_be(capfd: pytest.CaptureFixture[str]) -> None:
    """What the repeat of it is told: that there is no such run, or that it has ended, is as good as that it was done."""
    for name, order, status, code in [
        ("rm", f"DELETE /runs/{ID}", b"409 Conflict", "running"), ("rm", f"DELETE /runs/{ID}", b"409 Conflict", "in_use"),
        ("rm", f"DELETE /runs/{ID}", b"404 Not Found", "not_found"),
        ("cancel", f"POST /runs/{ID}/cancel", b"409 Conflict", "in_use"),
        ("cancel", f"POST /runs/{ID}/cancel", b"409 Conflict", "not_running"),
        ("stop", f"POST /runs/{ID}/stop", b"409 Conflict", "running"),
        ("stop", f"POST /runs/{ID}/stop", b"409 Conflict", "not_running"),
    ]:  # fmt: skip
        refusal = answers(json.dumps({"error": code, "message": "it is so"}).encode(), status)
        lies: dict[str, bytes | list[bytes]] = {order: [b"", refusal], "GET /runs/": answers(json.dumps(STATE).encode())}
        with contextlib.closing(Liar(lies)) as liar:
            failed = main_here(name, "--url", liar.url, ID)
        wanted = (0, f"{ID}\n", "") if code.startswith("not_") else (1, "", f"lightrun: {ID}: it is so\n")
        assert (failed, *capfd.readouterr()) == wanted, (name, code)


GAP, BEGUN = {"event": "gap"}, {"event": "accepted", "id": ID}


@pytest.mark.parametrize(
    ("told", "complete", "exec_complete"),
    [
        ([BEGUN, LOG, {**LOG, "at": 2}], True, True),
        ([BEGUN, GAP, LOG, LOG, {**LOG, "at": 1, "base64": "aWhp"}], True, False),
        ([GAP, LOG, {**LOG, "base64": "aGloaQ=="}], True, False),
        ([BEGUN, LOG, GAP, {**LOG, "at": 2}], False, False),
        ([BEGUN, LOG, {**LOG, "at": 2}, GAP], False, False),
    ],
    ids=["whole", "again", "longer", "gap", "end"],
)
def test_what_comes_again_is_not_told_twice(told: list[Any], complete: bool, exec_complete: bool) -> None:
    """Nor is a gap at the beginning of a run's events one in its output; those of an exec have no other beginning."""
    lies = events(*told, {"event": "finished", "run": STATE})
    heard: list[bytes] = []
    with contextlib.closing(Liar(lies)) as liar:
        kept = lightrun.Client(liar.url).run(IMAGE)
        lightrun.Client(liar.url).run(IMAGE, on_output=lambda _, data: heard.append(data))
    assert (kept.stdout, b"".join(heard), kept.complete, kept.exit_code) == (b"hihi", b"hihi", complete, 0)
    lies = {"POST /runs/": events(*told, {"event": "finished", "exec": STATE})["GET /runs/"]}
    with contextlib.closing(Liar(lies)) as liar:
        done = lightrun.Client(liar.url).exec(ID, "true")
    assert (done.stdout, done.complete, done.reason) == (b"hihi", exec_complete, "exited")


@pytest.mark.long
def test_artifacts_that_are_cut_are_not_all(command: Command, tmp_path: Path) -> None:
    """By a proxy that tells no length, or another one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in (member("a"), member("b")):
            tar.addfile(info, io.BytesIO(content))
    state = {**STATE, "artifacts": [{"path": "a", "bytes": 4, "type": "file"}]}
    cut = file.getvalue()[:1024]
    for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + cut, b"HTTP/1.0 200 OK\r\n\r\n" + cut):
        lies = {f"GET /runs/{ID}/artifacts": answer, "GET /runs/": answers(json.dumps(state).encode())}
        with contextlib.closing(Liar(lies)) as liar:
            process_ended = command("cp", ID, "out", variables={"LIGHT_RUN_URL": liar.url}, timeout=100)
        assert (process_ended.code, "the connection to the daemon broke" in process_ended.err) == (1, True)
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- A terminal


def test_a_pull_shows_on_a_terminal_only(start: Start, command: Command, shared: Daemon) -> None:
    with Registry() as registry:
        image = registry.push(IMAGE, "some/tool:1")
        near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        process = start("run", *OFFLINE, image, "--", "echo", "hi", stderr=far)
        os.close(far)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: all have left the terminal
            while data := os.read(near, 65536):
                shown += data
        os.close(near)
        assert process.communicate(timeout=30)[0] == b"hi\n"
        lines = shown.split(b"\r\x1b[K")
        assert len(lines) > 2
        assert (lines[0], lines[-1]) == (b"", b"")
        assert max(map(len, lines)) < 40
        assert b"\n" not in shown
        other = registry.push(IMAGE, "other/tool:1")
        done = command("run", *OFFLINE, other, "--", "echo", "hi")
        assert (done.out, done.err) == (b"hi\n", "")


# ---------------------------------------------------------------- The commands beside run


def test_a_runs_life_by_commands(command: Command, shared: Daemon) -> None:
    script = "echo out; echo err >&2; echo x > f; trap 'exit 5' TERM; while :; do sleep 0.1; done"
    done = command("run", *OFFLINE, "-d", "--label", "test=life", "--extract", "f", IMAGE, "--shell", script)
    run = done.out.decode().strip()
    assert run == running(shared, "test=life")
    table = command("ps").out.decode().splitlines()
    assert table[0].split() == ["ID", "IMAGE", "STATUS", "EXIT", "CREATED", "TOOK", "LABELS"]
    row = next(line for line in table if run.startswith(line.split()[0]))
    assert row.split()[1:3] + row.split()[-1:] == [IMAGE, "running", "test=life"]
    told = command("ps", "--json", "--label", "test=life").out.splitlines()
    assert [json.loads(line)["id"] for line in told] == [run]
    assert command("ps", "-q", "--label", "test=life").out == f"{run}\n".encode()
    done = command("logs", run[:13])
    assert (done.code, done.out, done.err) == (0, b"out\n", "err\n")
    done = command("rm", run)
    assert (done.code, "run" in done.err, done.out) == (1, True, b"")
    done = command("cp", run, ".")
    assert (done.code, "has not ended" in done.err) == (1, True)
    done = command("exec", run[:20], "--", "cat", "f")
    assert (done.code, done.out) == (0, b"x\n")
    done = command("stop", "--grace", "20s", run)
    assert (done.code, done.out, done.err) == (0, f"{run}\n".encode(), "")
    assert (shared.state(run)["reason"], shared.state(run)["exitCode"]) == ("stopped", 5)
    assert command("ps", "-q", "--label", "test=life").out == b""
    assert command("ps", "-aq", "--label", "test=life").out == f"{run}\n".encode()
    assert "failed (stopped)" in command("ps", "-a").out.decode()
    done = command("logs", "-f", run)
    assert (done.out, done.err) == (b"out\n", "err\n")
    done = command("stop", run, "no-such", run[:8] + "zz")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, b"", 3)
    assert command("rm", run).out == f"{run}\n".encode()
    done = command("logs", run)
    assert (done.code, done.err) == (1, "lightrun: there is no such run\n")


def test_cancel(command: Command, shared: Daemon) -> None:
    runs = [shared.detach(entrypoint=LONG) for _ in range(2)]
    done = command("cancel", *runs)
    assert (done.code, done.out.decode().split()) == (0, runs)
    assert {shared.state(run)["reason"] for run in runs} == {"cancelled"}


def test_logs_follow_a_run(start: Start, shared: Daemon) -> None:
    run = shared.detach(entrypoint="printf a; sleep 1; printf b; sleep 1; echo c >&2; exit 9")
    process = start("logs", "--follow", run)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"ab", b"c\n")


def test_logs_that_are_not_whole_say_so(command: Command, shared: Daemon) -> None:
    run = shared.run(entrypoint="head -c 3000000 /dev/zero")["id"]
    done = command("logs", run)
    assert (done.code, len(done.out), done.err) == (0, MIB, "lightrun: not all of the output is kept\n")


def test_an_id_must_be_one_runs(command: Command, shared: Daemon) -> None:
    runs = sorted(shared.run(image="127.0.0.1:1/absent")["id"] for _ in range(20))
    ambiguous = next(a[0] for a, b in itertools.pairwise(runs) if a[0] == b[0])
    for wrong, why in (
        (ambiguous, "more than one run begins with"),
        ("zzz", "there is no run zzz"),
        ("%", "there is no run %"),
        ("", ""),
    ):
        done = command("logs", wrong)
        assert (done.code, why in done.err, done.err.count("\n")) == (1, True, 1)


@pytest.mark.long
def test_ps_pages_through_many(command: Command, module_daemon: DaemonFactory) -> None:
    own = module_daemon("--queue", "2000", "--pull", "never", socket=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: own.detach(image="absent"), range(1_005)))
    found = command("ps", "-aq", "--limit", "100000", on=own).out.split()
    assert len(found) == len(set(found)) == 1_005
    assert command("ps", "-aqn", "1001", on=own).out.split() == found[:1_001]
    assert command("ps", "-aqn", "7", on=own).out.split() == found[:7]


def test_cp_of_a_path(command: Command, shared: Daemon, tmp_path: Path) -> None:
    script = "mkdir -p out/deep; echo 1 > out/deep/a; echo 2 > out/b"
    run = shared.run(entrypoint=script, extract=["out"])["id"]
    assert command("cp", f"{run}:deep", "one").code == 0
    assert tree(tmp_path / "one") == {"deep": (None, False), "deep/a": (b"1\n", False)}
    assert command("cp", f"{run}:deep/a", "two").code == 0
    assert tree(tmp_path / "two") == {"a": (b"1\n", False)}
    done = command("cp", f"{run}:nope", "three")
    assert (done.code, done.err, (tmp_path / "three").exists()) == (1, "lightrun: there is no such artifact\n", False)


def test_a_table_into_a_pipe_that_closes(start: Start) -> None:
    process = start("ps", "-a")
    assert process.stdout
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr
    assert process.stderr.read() == b""


def test_a_table_onto_a_full_disk(start: Start) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start("ps", stdout=full)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, b"lightrun: No space left on device\n")


# ---------------------------------------------------------------- exec


@pytest.fixture(scope="module")
def sandbox(shared: Daemon) -> Iterator[str]:
    """A run that stays."""
    run = shared.detach(idle=900_000)
    shared.wait_for(run, lambda state: state.get("phase") == "running")
    yield run
    shared.request("POST", f"/runs/{run}/cancel")
    shared.wait(run)


def test_exec(command: Command, sandbox: str) -> None:
    data = random.Random(3).randbytes(2 * MIB)
    script = "cat > x; sha256sum x; echo $A >&2; exit 3"
    done = command("exec", "-i", "--env", "A=1", "--workdir", "/tmp", sandbox, "--shell", script, stdin=data)
    assert (done.code, done.out.split()[0].decode(), done.err) == (3, hashlib.sha256(data).hexdigest(), "1\n")
    done = command("exec", sandbox, "--", "head", "-c", "20000000", "/dev/zero")
    assert (done.code, done.out) == (0, bytes(20_000_000))
    done = command("exec", "--timeout", "300ms", sandbox, "--", "sleep", "60")
    assert (done.code, done.err.startswith("lightrun: timeout")) == (124, True)
    for arguments in ((sandbox,), (sandbox, "cat"), (sandbox, "--timeout", "0s", "--", "true"), ("zz", "--", "true")):
        done = command("exec", *arguments)
        assert (done.code, done.err.startswith("lightrun: "), done.err.count("\n")) == (125, True, 1)


def test_a_signal_ends_an_exec(start: Start, shared: Daemon, sandbox: str) -> None:
    process = start("exec", sandbox, "--shell", "echo ready; exec sleep 117")
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130

    def sleeps() -> bool:
        body = {"entrypoint": ["ps", "-o", "args"]}
        return "sleep 117" in "\n".join(shared.request("POST", f"/runs/{sandbox}/exec", json=body).json()["logs"])

    assert eventually(lambda: not sleeps(), timeout=20)


# ---------------------------------------------------------------- Odd input


def main_here(*arguments: str) -> int:
    """A command in this process: one of its own costs a quarter of a second before it does anything."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            return lightrun.main(list(arguments))
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.long
def test_odd_input_is_one_line(
    command: Command, shared: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in"
    deep = source / "/".join(["a"] * 1_100)
    source.mkdir()
    (source / "f").write_text("x")
    run = ("run", *OFFLINE)
    for pattern in (b"[z-a]", b"[b-a]x"):
        (source / ".dockerignore").write_bytes(pattern)
        done = command(*run, "--dir", "in", IMAGE, "--", "true")
        assert (done.code, done.err.count("\n"), ".dockerignore: the pattern" in done.err) == (125, 1, True), done.err
    (source / ".dockerignore").write_bytes(b"caf\xe9\n[\\d]x\n[[:alpha:]]q\n")
    for name in (b"caf\xe9", b"1x", b"dx"):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(b"")
    done = command(*run, "--dir", "in", IMAGE, "--", "ls")
    assert (done.code, done.out, done.err) == (0, b"1x\nf\n", "")
    (source / ".dockerignore").unlink()
    os.mkfifo(source / ".dockerignore")
    assert command(*run, "--dir", "in", IMAGE, "--", "ls").code == 125
    (source / ".dockerignore").unlink()
    subprocess.run(["mkdir", "-p", deep], check=True)
    done = command(*run, "--dir", "in", IMAGE, "--shell", "find . -type d | wc -l")
    subprocess.run(["rm", "-r", source / "a"], check=True)
    assert (done.code, done.out, done.err) == (0, b"1101\n", "")
    for arguments, says in [
        (("--file", "x=in"), "in is not a file"), (("--file", "x="), "must be PATH"),
        (("--file", "/etc/hostname"), "must be relative"), (("--file", "x=in/f", "--file", "x=in/f"), "a path stands twice"),
        (("--dir", ""), "is empty"), (("--output", ""), "is empty"), (("--file", "x=/dev/null"), "/dev/null is not a file"),
        (("--env", "A=\udcff"), "must be UTF-8"), (("--label", "a=\udcff"), "must be UTF-8"), (("--cpus", "nan"), "JSON"),

    ]:  # fmt: skip
        code = main_here(*run, *arguments, "--url", url_of(shared), IMAGE, "--", "true")
        err = capfd.readouterr().err
        assert (code, err.count("\n"), says in err) == (125, 1, True), (arguments, err)
    done = command(*run, IMAGE, "--", "printf", "\udcff")
    assert (done.code, "must be UTF-8" in done.err) == (125, True)


@pytest.mark.parametrize(("line", "code"), [(("ps",), 2), (("run", IMAGE, "--", "true"), 125)])
def test_a_token_file_in_a_home_that_is_not_known(
    line: tuple[str, ...], code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "~nosuchuser/token"
    assert main_here(line[0], "--token-file", path, *line[1:]) == code
    monkeypatch.setenv("LIGHT_RUN_TOKEN_FILE", path)
    assert main_here(*line) == code
    assert re.fullmatch(f"(lightrun: {path}: cannot be read: .* home .*\n){{2}}", capfd.readouterr().err)


def test_names_that_are_not_utf_8_are_sent_as_they_are(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\udcffb").write_text("x")
    done = command("run", *OFFLINE, "--dir", "in", IMAGE, "--shell", "printf %s * | od -An -c")
    assert (done.code, done.out.split()) == (0, [b"a", b"377", b"b"])


def test_standard_input_that_is_closed_is_empty(start: Start) -> None:
    closed: Any = lambda: os.close(0)  # noqa: E731
    process = start("run", *OFFLINE, "-i", IMAGE, "--", "wc", "-c", preexec_fn=closed, stdin=None)
    assert process.communicate(timeout=20) == (b"0\n", b"")


def test_an_ascii_terminal(command: Command, shared: Daemon) -> None:
    shared.run(entrypoint="true", labels={"test": "\u00fc\u2192"})
    for line in (("ps", "-a", "--label", "test=\u00fc\u2192"), ("run", "--help")):
        done = command(*line, variables={"PYTHONIOENCODING": "ascii"})
        assert (done.code, done.err) == (0, "")
    told = command("ps", "-a", "--json", "--label", "test=\u00fc\u2192", variables={"PYTHONIOENCODING": "ascii"}).out
    assert json.loads(told)["labels"] == {"test": "\u00fc\u2192"}


# ---------------------------------------------------------------- The library


@pytest.fixture
def client(shared: Daemon) -> lightrun.Client:
    return lightrun.Client(url_of(shared))


def test_a_run_by_the_library(client: lightrun.Client, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"from disk")
    outcome = client.run(
        IMAGE, network="none", files={"a": "text", "b/c": b"\0\xff", "d": tmp_path / "local"}, stdin=b"\1\2",
        entrypoint="cat a b/c d; cat >&2; mkdir o; echo 1 > o/x; exit 2", extract=["o"], extractOn="exit",
    )  # fmt: skip
    assert (outcome.exit_code, outcome.reason, outcome.complete) == (2, "exited", True)
    assert (outcome.stdout, outcome.stderr) == (b"text\0\xfffrom disk", b"\1\2")
    assert outcome.artifacts == [{"path": "x", "bytes": 2, "type": "file"}]
    assert set(outcome.usage) == {"cpuMs", "memoryPeakBytes"}
    assert outcome.run
    assert outcome.run.read("x") == b"1\n"
    assert outcome.run.save(tmp_path / "saved") == ["x"]
    with pytest.raises(lightrun.NotWritten):
        outcome.run.save(tmp_path / "saved")
    outcome.run.delete()
    with pytest.raises(lightrun.ApiError) as refused:
        outcome.run.state()
    assert (refused.value.status, refused.value.code) == (404, "not_found")


def test_output_as_it_comes(client: lightrun.Client) -> None:
    heard: list[tuple[str, bytes, float]] = []
    outcome = client.run(
        IMAGE, network="none", entrypoint=["sh", "-c", "printf a; sleep 1; printf b >&2"],
        on_output=lambda stream, data: heard.append((stream, data, time.monotonic())),
    )  # fmt: skip
    assert [each[:2] for each in heard] == [("stdout", b"a"), ("stderr", b"b")]
    assert heard[1][2] - heard[0][2] > 0.5
    assert (outcome.stdout, outcome.stderr, outcome.complete) == (b"", b"", True)
    run = client.start(IMAGE, network="none", entrypoint="echo 1; exit 4")
    kinds = [event["event"] for event in run.events()]
    assert (kinds[0], kinds[-1], run.received.taken) == ("accepted", "finished", {"stdout": 2, "stderr": 0})


def test_refusals_are_raised(client: lightrun.Client, shared_tcp: Daemon) -> None:
    with pytest.raises(lightrun.ApiError) as refused:
        client.run(IMAGE, timeout="30s", colour="red")
    assert (refused.value.status, refused.value.code) == (400, "bad_request")
    assert {each["path"][0] for each in refused.value.details} == {"timeout", "colour"}
    assert "colour" in str(refused.value)
    with pytest.raises(lightrun.ApiError) as refused:
        lightrun.Client(shared_tcp.url, "wrong").run(IMAGE)
    assert refused.value.status == 401
    wrong = ["x", "http:", "http://", "ftp://x", "unix://x", "http://u:p@x", "http://x/?q", "http://x:99999", "http://x y"]
    for url in [*wrong, "unix:///" + "x" * 200]:
        with pytest.raises(lightrun.UsageError):
            lightrun.Client(url)
    with pytest.raises(lightrun.Unreachable):
        lightrun.Client("unix:///no/such").run(IMAGE)


def test_a_key_runs_once(client: lightrun.Client) -> None:
    first, second = (client.start(IMAGE, network="none", entrypoint="date +%N", key="test-a-key") for _ in range(2))
    assert first.id == second.id
    assert first.wait().stdout == second.wait().stdout == client.get(first.id[:18]).wait().stdout


@pytest.mark.long
def test_threads_share_a_client(client: lightrun.Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda number: client.run(IMAGE, network="none", entrypoint=["echo", str(number)]), range(12)))
    assert [outcome.stdout for outcome in outcomes] == [f"{number}\n".encode() for number in range(12)]


def test_exec_by_the_library(client: lightrun.Client, sandbox: str) -> None:
    outcome = client.exec(sandbox, "cat; echo err >&2; exit 5", stdin=b"\0in")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr, outcome.reason) == (5, b"\0in", b"err\n", "exited")
    with pytest.raises(lightrun.ApiError):
        client.exec(sandbox, [])


@pytest.mark.long
def test_the_import_is_light(built: Path, tmp_path: Path) -> None:
    path = f"import sys, time; sys.path.insert(0, {str(built)!r}); began = time.process_time(); import lightrun; "
    script = path + f"print(time.process_time() - began, *{{name.split('.')[0] for name in sys.modules}} & {HEAVY})"

    def seconds(*options: str) -> float:
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run([sys.executable, *options, "-c", script], env=env, capture_output=True, text=True, check=True)
        took, *imported = done.stdout.split()
        assert not imported
        return float(took)

    cache = tmp_path / ".cache/lightrun"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    for home in (foreign, ""):  # root, in somebody else's home, or in none
        subprocess.run([sys.executable, "-c", path], env={"HOME": str(home)}, check=True)
    assert (list(foreign.iterdir()), Path("/.cache/lightrun").exists()) == ([], False)
    assert eventually(lambda: seconds("-B") < IMPORT_SECONDS, timeout=20)
    assert not cache.exists()
    seconds()
    (kept,) = cache.iterdir()
    assert (kept.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
    assert eventually(lambda: seconds() < IMPORT_SECONDS / 1.5, timeout=20)
    seconds("-OO")
    for each in cache.iterdir():
        if each != kept:
            each.unlink()
    whole = kept.read_bytes()
    code = marshal.loads(whole[12:])
    for spoilt in (b"", whole[:100], whole[:-1], b"x" * len(whole)):
        kept.write_bytes(spoilt)
        seconds()
        # The same code, but not always the same bytes: marshal's depend on how often an object is in use (Python 3.10).
        assert marshal.loads(kept.read_bytes()[12:]) == code
    kept.write_bytes(whole.replace(b"LIGHT_RUN_", b"EVILS_RUN_"))
    kept.chmod(0o666)  # anybody could have written it
    asked = [sys.executable, "-c", path + "print(lightrun.variable_of('x'))"]
    assert (
        subprocess.run(asked, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True).stdout == "LIGHT_RUN_X\n"
    )


# ---------------------------------------------------------------- README


EVERYWHERE = {"-h", "--help", "--url", "--token", "--token-file"}


@pytest.mark.parametrize("name", list(lightrun.COMMANDS))
def test_help_is_what_readme_says(command: Command, name: str) -> None:
    done = command(name, "--help", variables={"COLUMNS": "100"})
    assert (done.code, done.err) == (0, "")
    section = README.partition("\n## At a shell\n")[2].partition("\n## ")[0]
    told = next(line for line in section.splitlines() if line.startswith(f"| `lightrun {name}"))
    if name == "run":
        told = section.partition("| option of `run` |")[2].partition("| exit code |")[0]
    shown = {
        option for line in re.findall("^  (-.*?)(?:  |$)", done.out.decode(), re.MULTILINE) for option in OPTION.findall(line)
    }
    assert set(OPTION.findall(told)) - {"--body-limit", "-c"} == shown - EVERYWHERE
    assert shown >= EVERYWHERE
    assert all(option in section for option in EVERYWHERE - {"-h", "--help"})


def test_every_field_has_an_option(command: Command) -> None:
    shown = command("run", "--help").out.decode()
    for field in lightrun.request_schema(lightrun.Settings())["properties"]:
        if field not in lightrun.SPECIAL_FIELDS:
            assert re.search(rf"^  .*{lightrun.option_of(field)} ", shown, re.MULTILINE)
    assert re.search(r"--env NAME\[=VALUE\]", shown)
