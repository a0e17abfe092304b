"""The command line as a process: help, versions, reasons not to start, the log. README's tables say what the module's do.

How each option is read is tested in test_requests.py, without a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lightrun
from conftest import KEPT_VARIABLES, ROOT, TAMED, DaemonFactory, eventually, free_port
from engine import IMAGE, engine_host
from relay import Relay

README = (ROOT / "README.md").read_text("utf-8")
FIELDS = dataclasses.fields(lightrun.Settings)
HELP_SECONDS = 0.3
MIB = 1 << 20
# What must not be imported before the arguments are right: each costs more than all else together.
LAZY = {"bottle", "docker", "requests", "urllib3", "waitress"}
# What a daemon that does not start leaves open is closed by the end of its process.
QUIET = ("-W", "error", "-W", "ignore::ResourceWarning")
WRONG_WORDS = [(), ("walk",), ("ps", "here"), ("rm",), ("serve", "here"), ("serve", "--nope"), ("serve", "--port")]
ROUTE_VARIABLES = {"<run_id>": "<id>", "<path:path>": "<path>"}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown_default(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["shown"] or ("none" if field.default is None else field.default))


# ---------------------------------------------------------------- README


def _table(first_header: str) -> list[list[str]]:
    """The body of README's table whose first column has this header, cell by cell, without the marks of code."""
    table = re.search(rf"^\| `?{first_header}`? \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table, f"README has no table of {first_header}"
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]


def _code(cell: str) -> str:
    return cell.strip("`")


def test_readme_has_the_options_variables_and_defaults() -> None:
    told = [(_code(option), _code(variable), _code(default)) for option, variable, default, _ in _table("option")]
    assert told == [(_option(field.name), "LIGHT_RUN_" + field.name.upper(), _shown_default(field)) for field in FIELDS]


def test_readme_has_the_fields_of_a_request() -> None:
    schema = lightrun.request_schema(lightrun.Settings())
    assert [_code(row[0]) for row in _table("field")] == list(schema["properties"])


def test_readme_has_the_bounds_of_a_request() -> None:
    told = {_code(name): kind for name, kind, _ in _table("field")}
    for name, schema in lightrun.request_schema(lightrun.Settings())["properties"].items():
        choices = [schema, *schema.get("anyOf", [])]
        for keyword in ("maxLength", "maxItems", "maxProperties", "default"):
            for value in (choice[keyword] for choice in choices if choice.get(keyword)):
                assert str(value) in told[name].replace(",", ""), f"{name}: {keyword}"


def test_readme_has_the_routes() -> None:
    routes = {f"{route.method} {route.path}" for route in lightrun.ROUTES}
    for variable, name in ROUTE_VARIABLES.items():
        routes = {route.replace(variable, name) for route in routes}
    told = [_code(route) for route, _ in _table("route")]
    assert len(told) == len(set(told))
    assert set(told) == routes


def test_readme_has_the_reasons() -> None:
    assert [_code(row[0]) for row in _table("reason")] == lightrun.REASONS


def test_readme_names_the_bounds_that_are_not_options() -> None:
    assert f"{lightrun.MAX_ARTIFACT_ENTRIES:,} entries, {lightrun.MAX_ARTIFACT_DEPTH} folders" in README
    added = re.search(r"capabilities dropped, then ([A-Z_, and]+) added back", README)
    assert added
    assert re.findall("[A-Z_]+", added[1]) == lightrun.CAPABILITIES


def test_readme_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\((?!#|https://)([^)]*)\)", README))


# ---------------------------------------------------------------- Help and version


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command that ended by itself has left."""

    code: int
    out: str
    err: str

    def line(self) -> str:
        """Its one line on standard error; nothing on standard output."""
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


Command = Callable[..., Ended]  # with arguments; `before` is put before the command, other keywords are variables


@pytest.fixture
def command(pyz: Path, tmp_path: Path) -> Command:
    """Run lightrun with arguments to its end; keywords are variables of its environment."""

    def run(*arguments: str, python: tuple[str, ...] = QUIET, before: tuple[str, ...] = (), **variables: str) -> Ended:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment = {**kept, "HOME": str(tmp_path), "COLUMNS": "500", **variables}
        line = [*before, sys.executable, *python, str(pyz), *arguments]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def serve(command: Command, tmp_path: Path) -> Command:
    """Run `lightrun serve` on a free port and a state dir of its own, expecting that it does not start."""

    def run(*arguments: str, before: tuple[str, ...] = (), **variables: str) -> Ended:
        options = ("--port", "0", "--state-dir", str(tmp_path / "state"))
        return command("serve", *options, *arguments, before=before, **variables)

    return run


def test_help_lists_every_option_with_its_default(command: Command) -> None:
    done = command("serve", "--help")
    assert (done.code, done.err) == (0, "")
    words = " ".join(done.out.partition("\noptions:")[2].split())
    told = re.findall(r"(--[a-z-]+) [A-Z_]+ .+? \(default: (.+?)\)(?= --|$)", words)
    assert told == [(_option(field.name), _shown_default(field)) for field in FIELDS]


def test_help_names_the_command(command: Command) -> None:
    done = command("--help")
    assert (done.code, done.err) == (0, "")
    assert "serve" in done.out
    assert "--version" in done.out


def test_version(command: Command) -> None:
    assert command("--version") == Ended(0, f"lightrun {lightrun.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--version",), ("serve", "--help")], ids="-".join)
def test_answers_without_heavy_imports(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert ("lightrun" in imported) == (arguments != ("--version",))  # which is too short a question to compile it for
    assert not imported & LAZY


def test_help_is_quick(command: Command) -> None:
    """The least of some tries: what else the machine does costs this process time as well."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command("serve", "--help", python=())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert eventually(lambda: seconds() < HELP_SECONDS, timeout=20)


# ---------------------------------------------------------------- Reasons not to start


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", "http"), ("--memory", "1k"), ("--pull-timeout", "5"), ("--log-format", "xml"), ("--allow-image", " ")],
)
def test_a_bad_value_is_one_line_and_code_2(command: Command, option: str, value: str) -> None:
    variable = "LIGHT_RUN_" + option.strip("-").replace("-", "_").upper()
    for source, done in ((option, command("serve", option, value)), (variable, command("serve", **{variable: value}))):
        assert done.code == 2
        assert source in done.line()


@pytest.mark.parametrize("arguments", WRONG_WORDS)
def test_an_unknown_word_is_one_line_and_code_2(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert done.line().startswith("lightrun: ")


@pytest.mark.parametrize("content", [None, "", " \n\n"])
def test_a_token_file_without_token_is_an_error(serve: Command, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokens").write_text(content)
    done = serve("--token-file", str(tmp_path / "tokens"))
    assert done.code == 2
    assert "--token-file" in done.line()


@pytest.mark.parametrize(("option", "value"), [("--cpus", "9999"), ("--memory", "900t"), ("--runtime", "no-such-runtime")])
@pytest.mark.usefixtures("engine_api")
def test_limits_that_the_engine_cannot_give(serve: Command, option: str, value: str) -> None:
    done = serve(option, value)
    assert done.code == 1
    assert option in done.line()


def test_a_port_in_use(daemon: DaemonFactory, command: Command, tmp_path: Path) -> None:
    port = str(daemon().port)
    done = command("serve", "--port", port, "--state-dir", str(tmp_path / "state"))
    assert done.code == 1
    assert port in done.line()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_here(serve: Command, host: str) -> None:
    done = serve("--host", host)
    assert done.code == 1
    assert host in done.line()


def test_a_live_socket_and_another_kind_of_file(daemon: DaemonFactory, serve: Command, tmp_path: Path) -> None:
    live = daemon(socket=True).socket
    (tmp_path / "file").write_text("mine")
    for path in (live, tmp_path / "file", tmp_path / "no-folder/socket"):
        done = serve("--socket", str(path))
        assert done.code == 1
        assert str(path) in done.line()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_state_dir_in_use(daemon: DaemonFactory, command: Command) -> None:
    state_dir = str(daemon().state_dir)
    done = command("serve", "--port", str(free_port()), "--state-dir", state_dir)
    assert done.code == 1
    assert state_dir in done.line()


def test_an_artifacts_dir_of_another(daemon: DaemonFactory, serve: Command) -> None:
    first = daemon()
    artifacts = first.state_dir / "artifacts"
    first.stop()
    done = serve("--artifacts-dir", str(artifacts))
    assert done.code == 1
    assert str(artifacts) in done.line()


def test_an_artifacts_dir_with_other_files(serve: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = serve("--artifacts-dir", str(tmp_path))
    assert done.code == 1
    assert str(tmp_path) in done.line()
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_state_dir_that_holds_no_database(serve: Command, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/lightrun.db").write_text("not a database\n" * 100)
    done = serve()
    assert done.code == 1
    assert str(tmp_path / "state") in done.line()


CONFIG = ".docker/config.json"
CLOSED = "unix:///nowhere/engine"


@pytest.mark.parametrize(
    ("environment", "options", "code", "said"),
    [
        # Values that are none
        ({"LIGHT_RUN_TOKEN": ""}, [], 2, "LIGHT_RUN_TOKEN: must be"),
        ({"LIGHT_RUN_TOKEN_FILE": ""}, [], 2, "LIGHT_RUN_TOKEN_FILE: must be"),
        ({"LIGHT_RUN_MEMORY": "\udcff"}, [], 2, "LIGHT_RUN_MEMORY: must be"),
        ({}, ["--host", "\udcff"], 2, "--host: must be"),
        ({}, ["\udcff"], 2, "unrecognized arguments"),
        ({}, ["--state-dir", "~nosuchuser/state"], 2, "--state-dir: names a home"),
        ({"LIGHT_RUN_SOCKET": "~nosuchuser/s"}, [], 2, "LIGHT_RUN_SOCKET: names a home"),
        ({}, ["--token-file", "/nowhere"], 2, "--token-file: cannot be read: No such file"),
        ({}, ["--token-file", "/etc"], 2, "--token-file: cannot be read: Is a directory"),
        ({}, ["--token-file", "/dev/zero"], 2, "--token-file: cannot be read: File too large"),
        ({}, ["--token-file", "/dev/null"], 2, "--token-file: holds no token"),
        ({}, ["--token-file", "/bin/sh"], 2, "--token-file: cannot be read: not UTF-8"),
        ({}, ["--drain=-1s"], 2, "--drain: must be"),
        # Where the engine is
        ({"DOCKER_HOST": "ssh://me@far"}, [], 2, "DOCKER_HOST: must be unix:///path or tcp://host:port"),
        ({"DOCKER_HOST": "\udcff"}, [], 2, "DOCKER_HOST: must be"),
        ({"LIGHT_RUN_DOCKER_HOST": "npipe:////./pipe/x"}, [], 2, "LIGHT_RUN_DOCKER_HOST: must be"),
        ({"DOCKER_CERT_PATH": "/nowhere"}, [], 1, "/nowhere/cert.pem cannot be read: No such file"),
        ({"DOCKER_TLS_VERIFY": "1", "DOCKER_HOST": "tcp://127.0.0.1:1"}, [], 1, ".docker/ca.pem cannot be read: No such file"),
        ({"DOCKER_CONTEXT": "gone", "DOCKER_HOST": ""}, [], 1, "the Docker context 'gone' is in use"),
        ({CONFIG: "[]"}, [], 1, f"{CONFIG} is not a configuration"),
        ({CONFIG: "{"}, [], 1, f"{CONFIG} is not JSON"),
        ({CONFIG: '{"currentContext": "gone"}', "DOCKER_HOST": ""}, [], 1, "the Docker context 'gone' is in use"),
        # Places to keep things
        ({}, ["--state-dir", "/etc/passwd"], 1, "/etc/passwd"),
        ({}, ["--state-dir", "/etc/passwd/below"], 1, "/etc/passwd/below"),
        ({}, ["--state-dir", "/proc/nowhere"], 1, "/proc/nowhere"),
        ({}, ["--artifacts-dir", "/etc/passwd"], 1, "/etc/passwd: File exists"),
        ({}, ["--artifacts-dir", "/proc/nowhere"], 1, "/proc/nowhere: No such file"),
        ({"artifacts/.lightrun": "\udcff"}, ["--artifacts-dir", "artifacts"], 1, "artifacts belongs to another state dir"),
        ({"artifacts/.lightrun/x": ""}, ["--artifacts-dir", "artifacts"], 1, "artifacts/.lightrun: Is a directory"),
        # Where to listen
        ({}, ["--socket", "/nowhere/s"], 1, "cannot listen on /nowhere/s: No such file"),
        ({}, ["--socket", "/" + "x" * 107], 1, "path too long"),
        ({}, ["--host", "x" * 70], 1, "cannot listen on xxx"),
    ],
)
@pytest.mark.usefixtures("engine_api")
def test_reasons_not_to_start(
    serve: Command, tmp_path: Path, environment: dict[str, str], options: list[str], code: int, said: str
) -> None:
    """A name with a dot in `environment` is that of a file in the home, which is the working folder as well."""
    for name in filter(lambda name: "." in name, environment):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.fsencode(environment[name]))
    done = serve(*options, **{name: text for name, text in environment.items() if "." not in name})
    assert (done.code, said in done.line()) == (code, True), done.line()


# Nobody's account: without a name and a home, but allowed to read this Python.
NOBODY = ("setpriv", "--reuid=54321", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")


@pytest.mark.parametrize(
    ("before", "options", "said"),
    [
        ((*NOBODY, "prlimit", "--nproc=40"), [], "can't start new thread"),
        ((*NOBODY, "prlimit", "--nproc=1"), [], "can't start new thread"),
        (("prlimit", "--nofile=64"), [], "at most 64 open files"),
        (("prlimit", "--fsize=0"), [], "state: disk I/O error"),
        (NOBODY, ["--port", "80"], "cannot listen on 127.0.0.1:80: Permission denied"),
        ((*TAMED, "sh", "-c", 'mkdir -m 0 shut; exec "$@"', "sh"), ["--state-dir", "shut/s"], "shut/s"),
        ((*TAMED, "sh", "-c", 'mkdir -m 0 shut; exec "$@"', "sh"), ["--artifacts-dir", "shut/a"], "shut/a: Permission denied"),
        ((*TAMED, "sh", "-c", 'mkdir -m 0 shut; exec "$@"', "sh"), ["--socket", "shut/s"], "shut/s: Permission denied"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("engine_api")
def test_what_the_system_refuses(serve: Command, before: tuple[str, ...], options: list[str], said: str) -> None:
    done = serve(*options, before=before)
    assert done.code == 1
    assert said in done.line()


def test_the_folder_that_one_is_in_has_gone(command: Command) -> None:
    gone = ("sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh")
    done = command("serve", "--state-dir", "state", before=gone)
    assert (done.code, "relative to a folder that has gone" in done.line()) == (2, True)


def test_a_user_without_a_home_must_say_where(command: Command) -> None:
    done = command("serve", before=(*NOBODY, "env", "-u", "HOME"))
    assert (done.code, "--state-dir: names a home" in done.line()) == (2, True)


@pytest.mark.parametrize("kind", ["closed", "file", "datagram", "connected", "bound", "two", "words"])
def test_what_systemd_should_not_pass(pyz: Path, tmp_path: Path, kind: str) -> None:
    passed: Any
    if kind == "file":
        passed = (tmp_path / "file").open("w")
    elif kind == "datagram":
        passed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    elif kind == "connected":
        passed, other = socket.socketpair()
        other.close()
    else:
        passed = socket.socket(socket.AF_UNIX)
        passed.bind(str(tmp_path / "s"))
    script = 'exec 3<&"$1"; shift; LISTEN_PID=$$ exec "$@"' if kind != "closed" else 'shift; LISTEN_PID=$$ exec "$@" 3<&-'
    count = {"two": "2", "words": "one"}.get(kind, "1")
    line = [sys.executable, str(pyz), "serve", "--state-dir", str(tmp_path / "state")]
    with passed:
        done = subprocess.run(
            ["bash", "-c", script, "bash", str(passed.fileno()), *line], env={"PATH": os.environ["PATH"], "LISTEN_FDS": count},
            pass_fds=[passed.fileno()], capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "LISTEN_FDS" in done.stderr


# ---------------------------------------------------------------- What is no reason not to start


EMPTY = ("HOST", "PORT", "SOCKET", "BODY_LIMIT", "STATE_DIR", "MEMORY", "ALLOW_IMAGE", "DOCKER_HOST", "LOG_FORMAT", "DRAIN")
DOCKER = ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY", "LISTEN_FDS")


def test_empty_variables_count_as_absent(daemon: DaemonFactory) -> None:
    started = daemon(env={**{f"LIGHT_RUN_{name}": "" for name in EMPTY}, **dict.fromkeys(DOCKER, "")})
    assert started.run(entrypoint="true", network="none")["reason"] == "exited"


def test_a_user_without_a_home(daemon: DaemonFactory) -> None:
    """One that has no name either, so that nothing tells where `~` is; it is not needed."""
    started = daemon(start=False)
    started.command = [*NOBODY, "env", "-u", "HOME", *started.command]
    started.start()
    assert started.run(entrypoint="true", network="none")["reason"] == "exited"


def test_an_empty_home_is_none(daemon: DaemonFactory) -> None:
    """Else `~` would be `/`."""
    started = daemon(env={"HOME": ""}, start=False)
    started.command = [*NOBODY, *started.command[: started.command.index("--state-dir")]]
    with (started.folder / "log").open("wb") as written:
        assert subprocess.run(started.command, env=started.env, stderr=written, timeout=30).returncode == 2
    assert "--state-dir: names a home" in started.log()


def test_an_engine_socket_that_may_not_be_opened(daemon: DaemonFactory, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0)
        started = daemon("--docker-host", f"unix://{path}", start=False)
        started.command = [*TAMED, *started.command]
        started.start()
        assert f"cannot connect to the engine at unix://{path}: Permission denied" in started.log()
        assert started.request("GET", "/health").json()["status"] == "unavailable"


@pytest.mark.parametrize("source", ["config", "variable"])
def test_a_context_in_use_is_honoured(daemon: DaemonFactory, source: str) -> None:
    """It leads to the engine that the tests use, the variable that names none would not."""
    url = engine_host()
    started = daemon(env={"DOCKER_CONTEXT": "far" if source == "variable" else "", "DOCKER_HOST": ""}, start=False)
    _docker_files(started.home, config=USED if source == "config" else b"{}", meta=_meta(url))
    started.start()
    assert started.run(entrypoint="true", network="none")["reason"] == "exited"
    assert f"with the engine at {url} (the Docker context 'far')" in started.log()


def test_proxies_are_none_of_the_engines(daemon: DaemonFactory) -> None:
    """An engine on TCP, beside variables that send every request elsewhere."""
    with contextlib.closing(Relay(socket.create_server(("127.0.0.1", 0)))) as relay:
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:1")
        started = daemon("--docker-host", relay.url, env=proxies)
        assert started.run(entrypoint="true", network="none")["reason"] == "exited"
        assert "serving all the same" not in started.log()
        started.stop()


# ---------------------------------------------------------------- Where the engine is

CONTEXT_ID = hashlib.sha256(b"far").hexdigest()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, as Docker's three files; another's key, and one that is encrypted."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("other", "key"):
        line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=lightrun"
        files = ["-keyout", str(folder / f"{name}.pem"), "-out", str(folder / "cert.pem")]
        subprocess.run([*line.split(), "-addext", "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    shutil.copy(folder / "cert.pem", folder / "ca.pem")
    encrypt = f"openssl ec -aes256 -passout pass:secret -in {folder}/key.pem -out {folder}/locked.pem"
    subprocess.run(encrypt.split(), check=True, capture_output=True)
    return folder


def _docker_files(home: Path, *, config: bytes | None = None, meta: bytes | None = None, tls: Path | None = None) -> None:
    """Docker's configuration in a home: its own file, and what it keeps of the context `far`."""
    files: dict[str, bytes | None] = {"config.json": config, f"contexts/meta/{CONTEXT_ID}/meta.json": meta}
    for name in ("ca.pem", "cert.pem", "key.pem") if tls else ():
        files[f"contexts/tls/{CONTEXT_ID}/docker/{name}"] = (tls / name).read_bytes()  # type: ignore[operator]
    for name, content in files.items():
        if content is not None:
            (home / ".docker" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / ".docker" / name).write_bytes(content)


def _meta(host: str, skip: bool = False) -> bytes:
    endpoint = {"Host": host, "SkipTLSVerify": skip}
    return json.dumps({"Name": "far", "Metadata": {}, "Endpoints": {"docker": endpoint}}).encode()


def _engine(home: Path, option: str | None = None, **environment: str) -> lightrun.EngineAddress:
    return lightrun.engine_address(lightrun.Settings(docker_host=option), {"HOME": str(home), **environment})


USED = b'{"currentContext": "far"}'
FAR = _meta("tcp://far:2375")
SOCKET = ("/var/run/docker.sock", None, None)


@pytest.mark.parametrize(
    ("files", "option", "environment", "found"),
    [
        ({}, None, {}, SOCKET),
        ({}, None, {"DOCKER_HOST": "", "DOCKER_CONTEXT": "", "DOCKER_TLS_VERIFY": "", "DOCKER_CERT_PATH": ""}, SOCKET),
        ({}, None, {"DOCKER_HOST": "unix:///a b%20?#"}, ("/a b%20?#", None, None)),
        ({}, None, {"DOCKER_HOST": "tcp://[::1]:1"}, (None, "::1", 1)),
        ({}, "tcp://near:2/", {"DOCKER_HOST": "unix:///x"}, (None, "near", 2)),
        ({}, "tcp://near:2", {"DOCKER_HOST": "ssh://x"}, (None, "near", 2)),
        ({"config": b"{}"}, None, {}, SOCKET),
        ({"config": b'{"currentContext": null, "auths": null, "anything": 1}'}, None, {}, SOCKET),
        ({"config": b'{"currentContext": "default"}'}, None, {}, SOCKET),
        ({"config": USED, "meta": FAR}, None, {}, (None, "far", 2375)),
        ({"config": USED, "meta": FAR}, None, {"DOCKER_CONTEXT": "default"}, SOCKET),
        ({"config": USED, "meta": FAR}, None, {"DOCKER_HOST": "unix:///x"}, ("/x", None, None)),
        ({"config": USED, "meta": FAR}, "unix:///y", {"DOCKER_CONTEXT": "far"}, ("/y", None, None)),
        ({"meta": FAR}, None, {"DOCKER_CONTEXT": "far"}, (None, "far", 2375)),
        ({"meta": _meta("unix:///z", skip=True)}, None, {"DOCKER_CONTEXT": "far"}, ("/z", None, None)),
        ({"meta": b'{"Endpoints": {"docker": {}}}'}, None, {"DOCKER_CONTEXT": "far"}, SOCKET),
    ],
)
def test_where_the_engine_is(
    tmp_path: Path, files: dict[str, bytes], option: str | None, environment: dict[str, str], found: tuple[Any, ...]
) -> None:
    _docker_files(tmp_path, **files)  # type: ignore[arg-type]
    address = _engine(tmp_path, option, **environment)
    assert (address.path, address.host, address.port, address.tls) == (*found, None)
    assert address.url.startswith("unix://" if address.path else "tcp://")


@pytest.mark.parametrize(
    "url",
    [
        "x", "ssh://me@far", "npipe:////./pipe/docker_engine", "fd://", "http://h:1", "TCP://h:1", "h:1", "/var/run/docker.sock",
        "unix://", "unix://relative", "unix://var/run/docker.sock", "unix:///" + "x" * 107, "tcp://", "tcp://h", "tcp://h:0",
        "tcp://h:x", "tcp://h:99999", "tcp://[::1", "tcp://h:1/base", "tcp://me:secret@h:1", "tcp://h:1?x", "tcp://h:1#x",
        " unix:///x", "a\udcff",
    ],
)  # fmt: skip
def test_a_value_that_names_no_engine(tmp_path: Path, url: str) -> None:
    """The variable and a context are judged as the option is."""
    _docker_files(tmp_path, meta=_meta(url))
    with pytest.raises(lightrun.UsageError, match="--docker-host: must be"):
        lightrun.read_settings({"docker_host": url}, {})
    with pytest.raises(lightrun.UsageError, match="DOCKER_HOST: must be"):
        _engine(tmp_path, DOCKER_HOST=url)
    with pytest.raises(lightrun.UsageError, match="the Docker context 'far': must be"):
        _engine(tmp_path, DOCKER_CONTEXT="far")


@pytest.mark.parametrize(
    ("files", "environment", "said"),
    [
        *[
            ({"config": content}, {}, ".docker/config.json")
            for content in (b"", b"[]", b"3", b"null", b"\xff\x00", b"[" * 10**5, b" " * 2 * MIB, b'{"currentContext": 3}',
                            b'{"auths": []}', b'{"proxies": []}', b'{"credHelpers": 1}', b'{"credsStore": {}}')
        ],
        ({"config": USED}, {}, "the Docker context 'far'"),
        ({}, {"DOCKER_CONTEXT": "far"}, "the Docker context 'far'"),
        ({}, {"DOCKER_CONTEXT": "\udcff"}, "the Docker context"),
        ({"config": b'{"currentContext": "\\ud800"}'}, {}, "the Docker context"),
        *[
            ({"meta": content}, {"DOCKER_CONTEXT": "far"}, CONTEXT_ID)
            for content in (b"", b"[]", b"{}", b'{"Endpoints": []}', b'{"Endpoints": {"docker": 1}}',
                            b'{"Endpoints": {"docker": {"Host": 1}}}')
        ],
        ({}, {"DOCKER_CERT_PATH": "/nowhere"}, "/nowhere/cert.pem"),
        ({}, {"DOCKER_CERT_PATH": "/nowhere", "DOCKER_TLS_VERIFY": "1"}, "/nowhere/ca.pem"),
        ({}, {"DOCKER_CERT_PATH": "/dev/zero", "DOCKER_TLS_VERIFY": "1"}, "/dev/zero/ca.pem"),
        ({}, {"DOCKER_TLS_VERIFY": "1"}, ".docker/ca.pem"),
        ({}, {"DOCKER_TLS": "1"}, ".docker/cert.pem"),
        ({"config": b"{}"}, {"DOCKER_TLS_VERIFY": "1", "DOCKER_HOST": "tcp://h:1"}, ".docker/ca.pem"),
    ],
)  # fmt: skip
def test_files_of_docker_that_are_of_no_use(
    tmp_path: Path, files: dict[str, bytes], environment: dict[str, str], said: str
) -> None:
    _docker_files(tmp_path, **files)  # type: ignore[arg-type]
    with pytest.raises(lightrun.StartError, match=re.escape(said)) as caught:
        _engine(tmp_path, **environment)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / ".docker/config.json").mkdir(parents=True)
    with pytest.raises(lightrun.StartError, match=r"config\.json cannot be read: Is a directory"):
        _engine(tmp_path)


def test_a_configuration_that_is_not_ours_to_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is another user's, perhaps: said, and no reason not to start. Root reads everything, so the reading fails here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightrun, "small_file", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path)))
        assert _engine(tmp_path).path == "/var/run/docker.sock"
    assert f"{tmp_path}/.docker/config.json is not read: Permission denied" in caplog.text


@pytest.mark.parametrize("source", ["variables", "verified context", "context"])
def test_tls_to_the_engine(tmp_path: Path, certificates: Path, source: str) -> None:
    """By the variables or a context; a server with another certificate is not taken for the engine."""
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    server_side.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    server_side.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        url = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        if source == "variables":
            address = _engine(tmp_path, DOCKER_HOST=url, DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(certificates))
        else:
            _docker_files(tmp_path, config=USED, meta=_meta(url, skip=source == "context"), tls=certificates)
            address = _engine(tmp_path)
        assert address.tls
        assert address.tls.verify_mode == (ssl.CERT_NONE if source == "context" else ssl.CERT_REQUIRED)
        serving = pool.submit(lambda: server_side.wrap_socket(listening.accept()[0], server_side=True))
        plain = socket.create_connection((address.host or "", address.port or 0), 10)
        with address.tls.wrap_socket(plain, server_hostname=address.host) as secured:
            serving.result(10).close()
            assert secured.cipher()


@pytest.mark.parametrize("spoiled", ["ca.pem", "cert.pem", "key.pem", "other", "locked"])
def test_certificates_that_are_of_no_use(tmp_path: Path, certificates: Path, spoiled: str) -> None:
    """Garbage, another's key, and one that wants a password (which nobody must be asked for)."""
    folder = Path(shutil.copytree(certificates, tmp_path / "tls"))
    if spoiled.endswith(".pem"):
        (folder / spoiled).write_bytes(b"\xff\x00 no certificate")
    else:
        shutil.copy(folder / f"{spoiled}.pem", folder / "key.pem")
    with pytest.raises(lightrun.StartError, match=re.escape(str(folder))):
        _engine(tmp_path, DOCKER_HOST="tcp://127.0.0.1:1", DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(folder))


# ---------------------------------------------------------------- Variables, and what is said at start


def test_variables_set_up_a_daemon(daemon: DaemonFactory) -> None:
    """Repeatable options take commas."""
    images = "docker.io/library/*, docker.io/lightrun/*"
    started = daemon(env={"LIGHT_RUN_TOKEN": "from-a-variable", "LIGHT_RUN_ALLOW_IMAGE": images, "LIGHT_RUN_PULL": "never"})
    assert started.request("GET", "/runs").status == 401
    assert started.run(entrypoint=["true"])["reason"] == "exited"
    assert started.run(image="no-such-image")["reason"] == "pull_failed"
    refused = started.request(
        "POST", "/run", json={"image": "ghcr.io/lightrun/busybox"}, headers={"Authorization": "Bearer from-a-variable"}
    )
    assert (refused.status, refused.json()["error"]) == (403, "not_allowed")


def test_an_open_server_says_so(daemon: DaemonFactory) -> None:
    lightrun = daemon()
    assert eventually(lambda: "--token" in lightrun.log())
    assert "WARNING" not in lightrun.log()


def test_an_open_server_on_every_address_says_so_loudly(daemon: DaemonFactory) -> None:
    lightrun = daemon("--host", "0.0.0.0")
    assert eventually(lambda: any("--token" in line and "WARNING" in line for line in lightrun.log().splitlines()))


def test_a_server_with_a_token_has_nothing_to_say_about_it(daemon: DaemonFactory) -> None:
    assert "--token" not in daemon("--host", "0.0.0.0", "--token", "s3cret").log()


# ---------------------------------------------------------------- The log


def test_json_logs_have_one_object_a_line(daemon: DaemonFactory) -> None:
    started = daemon("--log-format", "json", "--host", "0.0.0.0")
    started.run(entrypoint="echo one; echo two")
    started.request("GET", "/runs/%0A%22%E2%80%A8x")
    started.request("GET", "/" + "x" * 100_000)
    started.stop()
    lines = [json.loads(line) for line in started.log().splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    assert {line["level"] for line in lines} == {"info", "warning"}


def test_no_path_makes_a_line_of_its_own(daemon: DaemonFactory) -> None:
    started = daemon()
    started.request("GET", "/runs/x%0A2026-01-01%20INFO%20forged%0D%1B%5B2J%E2%80%A8y")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in started.log().splitlines())
    assert "\x1b" not in started.log()


def test_no_secret_is_logged(daemon: DaemonFactory, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("canary-old-token\ncanary-new-token\n")
    started = daemon("--token-file", str(tmp_path / "tokens"))
    started.token = "canary-new-token"
    closed = f"http://127.0.0.1:{free_port()}/canary-url-path?key=canary-url-query"
    secrets: dict[str, Any] = {
        "env": {"SECRET": "canary-env"},
        "files": {"secret": "canary-file"},
        "setup": ["true canary-setup"],
        "entrypoint": "true canary-entrypoint",
    }
    assert started.run(input="canary-input", **secrets)["exitCode"] == 0
    run = started.detach(stdin="canary-stdin", callbackUrl=closed, callbackSecret="canary-callback-secret", **secrets)
    started.wait_for(run, lambda state: state["callback"]["attempts"])
    headers = {"Authorization": "Bearer canary-new-token"}
    for bad in ({"canary-field": "canary-value"}, {"image": "canary image"}, {"stdin": ["canary-list"]}):
        assert started.request("POST", "/run", json={"image": IMAGE, **bad}, headers=headers).status == 400
    assert started.request("GET", "/runs?canary-query=1", headers=headers).status == 400
    assert started.request("GET", "/runs", headers={"Authorization": "Bearer canary-wrong-token"}).status == 401
    _send_garbage(started.port)
    assert f"/runs/{run}" in started.log()
    assert "canary" not in started.log()


def _send_garbage(port: int) -> None:
    """A request that is none, with a secret where a server might quote it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest("GET", "/runs", skip_host=True)
        connection.putheader("Transfer-Encoding", "canary-coding")
        connection.putheader("Authorization", "Bearer canary-new-token")
        connection.endheaders()
        assert connection.getresponse().status >= 400
    finally:
        connection.close()
