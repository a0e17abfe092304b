"""Where the daemon listens, who may use a state dir, and how it starts and ends as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest
from docker.utils import version_gte

from conftest import NETWORK, WARNINGS, Daemon, DaemonFactory, eventually
from engine import IMAGE, UnixConnection

# Does what systemd does: the socket becomes descriptor 3, and the process knows that it is meant.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = sys.argv[2] or str(os.getpid())
os.execv(sys.argv[3], sys.argv[3:])
"""


def outcome(daemon: Daemon) -> tuple[int, str]:
    """Exit code and standard error of a daemon that does not start, as a user sees them: without Python's warnings."""
    command = [part for part in daemon.command if part not in WARNINGS]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, timeout=20)
    assert done.stdout == ""
    return done.returncode, done.stderr


def assert_does_not_start(daemon: Daemon, *words: str) -> None:
    """It ends with exit code 1 and one line that holds these words."""
    code, message = outcome(daemon)
    assert (code, message.count("\n")) == (1, 1), message
    assert all(word in message for word in words), message


def curl(path: Path, *arguments: str) -> str:
    """What curl gets through a Unix socket."""
    done = subprocess.run(["curl", "-sS", "--unix-socket", path, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- The Unix socket


def test_curl_through_the_socket(daemon: DaemonFactory) -> None:
    lightrun = daemon(socket=True)
    assert lightrun.socket
    assert json.loads(curl(lightrun.socket, "http://any.host/health"))["status"] == "ok"
    body = json.dumps({"image": IMAGE, "entrypoint": "echo hello"})
    state = json.loads(curl(lightrun.socket, "--json", body, "http://localhost/run"))
    assert state["logs"] == ["hello"]
    assert stat.S_IMODE(lightrun.socket.stat().st_mode) == 0o600
    assert lightrun.stop() == 0
    assert not lightrun.socket.exists()


def test_the_socket_mode(daemon: DaemonFactory) -> None:
    lightrun = daemon("--socket-mode", "0666", socket=True)
    assert lightrun.socket
    assert stat.S_IMODE(lightrun.socket.stat().st_mode) == 0o666


def test_the_socket_that_a_killed_daemon_leaves_is_replaced(daemon: DaemonFactory) -> None:
    lightrun = daemon(socket=True)
    lightrun.kill()
    assert lightrun.socket
    assert lightrun.socket.is_socket()
    lightrun.start()
    assert lightrun.healthy()


def test_a_live_socket_is_left_alone(daemon: DaemonFactory) -> None:
    first = daemon(socket=True)
    second = daemon("--socket", str(first.socket), start=False)
    assert_does_not_start(second, str(first.socket))
    assert first.healthy()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(daemon: DaemonFactory, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("precious")
    assert_does_not_start(daemon("--socket", str(path), start=False), str(path))
    assert os.path.lexists(path)
    assert not path.is_socket()
    assert kind != "file" or path.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/s", "x" * 200])
def test_a_path_that_cannot_be_bound(daemon: DaemonFactory, tmp_path: Path, name: str) -> None:
    assert_does_not_start(daemon("--socket", str(tmp_path / name), start=False))


# ---------------------------------------------------------------- TCP


def test_a_port_in_use(daemon: DaemonFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_does_not_start(daemon("--port", port, start=False), port)


def test_an_open_server_says_so(daemon: DaemonFactory) -> None:
    local, everywhere, guarded = daemon(), daemon("--host", "0.0.0.0"), daemon("--token", "long-enough")
    assert eventually(lambda: "token" in local.log())
    assert eventually(lambda: "WARNING" in everywhere.log())
    assert eventually(lambda: "serves on" in guarded.log())  # the last that is said of the start
    assert "token" not in guarded.log()


# ---------------------------------------------------------------- systemd


def activate(daemon: Daemon, listening: socket.socket, pid: str = "") -> subprocess.Popen[bytes]:
    """Start a daemon that gets this socket."""
    command = [sys.executable, "-c", ACTIVATE, str(listening.fileno()), pid, *daemon.command]
    environment = {**daemon.env, "LISTEN_FDS": "1"}
    with (daemon.folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, pass_fds=[listening.fileno()], stderr=log)


def test_a_socket_of_systemd_is_used_and_left(daemon: DaemonFactory, tmp_path: Path) -> None:
    lightrun, path = daemon(start=False), tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        process = activate(lightrun, listening)
    with contextlib.closing(UnixConnection(str(path), 10)) as connection:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    process.terminate()
    assert process.wait(20) == 0, lightrun.log()
    assert path.is_socket()


def test_a_tcp_socket_of_systemd_keeps_the_host_check(daemon: DaemonFactory) -> None:
    lightrun = daemon(start=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        lightrun.port = listening.getsockname()[1]
        process = activate(lightrun, listening)
    assert lightrun.request("GET", "/runs").status == 200
    assert lightrun.request("GET", "/runs", headers={"Host": "evil.example"}).status == 403
    process.terminate()
    assert process.wait(20) == 0, lightrun.log()


def test_sockets_that_are_meant_for_another_process_are_not_used(daemon: DaemonFactory) -> None:
    lightrun = daemon(start=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = activate(lightrun, listening, "1")
        assert eventually(lightrun.healthy)
    process.terminate()
    assert process.wait(20) == 0, lightrun.log()


# ---------------------------------------------------------------- The state dir


def test_a_second_daemon_on_one_state_dir_says_so(daemon: DaemonFactory) -> None:
    first = daemon()
    assert_does_not_start(daemon(state_dir=first.state_dir, start=False), str(first.state_dir))
    assert first.healthy()
    assert first.stop() == 0
    assert daemon(state_dir=first.state_dir).healthy()


def test_an_artifacts_dir_belongs_to_one_state_dir(daemon: DaemonFactory, tmp_path: Path) -> None:
    shared, foreign = tmp_path / "artifacts", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    daemon("--artifacts-dir", str(shared))
    assert_does_not_start(daemon("--artifacts-dir", str(shared), start=False), str(shared))
    assert_does_not_start(daemon("--artifacts-dir", str(foreign), start=False), str(foreign))
    assert (foreign / "precious").exists()


def test_the_state_dir_is_the_users_own(daemon: DaemonFactory) -> None:
    assert stat.S_IMODE(daemon().state_dir.stat().st_mode) == 0o700


# ---------------------------------------------------------------- The end, and the engine that others share


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0(daemon: DaemonFactory, number: signal.Signals) -> None:
    lightrun = daemon()
    lightrun.run(entrypoint="true")
    lightrun.process.send_signal(number)
    assert lightrun.process.wait(5) == 0
    assert list(lightrun.temporary.iterdir()) == []


@pytest.mark.alone("makes a second network of the name that all runs share")
def test_a_second_network_goes_even_if_it_is_the_one_in_use(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    """As two daemons leave it that make it at once, when the first run is on the newer one."""
    with contextlib.suppress(docker.errors.APIError):
        engine.remove_network(NETWORK)
    options = {"com.docker.network.bridge.enable_icc": "false"}
    first = engine.create_network(NETWORK, "bridge", options, check_duplicate=False)["Id"]
    if version_gte(engine.version()["ApiVersion"], "1.44"):
        with pytest.raises(docker.errors.APIError, match="already exists"):
            engine.create_network(NETWORK, "bridge", options, check_duplicate=False)
        pytest.skip("an engine before 25 is missing, which makes two networks of one name")
    made = [first, engine.create_network(NETWORK, "bridge", options, check_duplicate=False)["Id"]]
    user = engine.create_container("lightrun/busybox", ["sleep", "60"])
    try:
        engine.start(user)
        engine.connect_container_to_network(user, made[1])
        state = daemon().online().run(entrypoint="ls /sys/class/net")
        assert state["logs"] == ["eth0", "lo"], state.get("error")
        assert [network["Id"] for network in engine.networks(names=[NETWORK]) if network["Name"] == NETWORK] == made[1:]
    finally:
        engine.remove_container(user, force=True)


@pytest.mark.alone("removes the network that all runs share")
def test_two_daemons_share_the_network(daemon: DaemonFactory, engine: docker.APIClient) -> None:
    with contextlib.suppress(docker.errors.APIError):  # in use by somebody else's run: then it is shared already
        engine.remove_network(NETWORK)
    daemons = [daemon().online(), daemon().online()]
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda each: each.run(entrypoint="ls /sys/class/net"), daemons * 2))
    assert [state["logs"] for state in states] == [["eth0", "lo"]] * 4, [state.get("error") for state in states]
    assert [network["Name"] for network in engine.networks(names=[NETWORK])].count(NETWORK) == 1
    assert not {entry["Id"] for entry in daemons[0].containers()} & {entry["Id"] for entry in daemons[1].containers()}
