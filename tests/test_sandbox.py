"""The sandbox of every run, seen from inside of its container and on the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest

from conftest import NETWORK, Daemon, DaemonFactory, eventually
from engine import EngineApi
from images import make_image

CAPABILITIES = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7, "NET_BIND_SERVICE": 10,
}  # fmt: skip
OPERATORS_NETWORK = "lightrun-test-network"


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory) -> Daemon:
    """A daemon whose operator allows every network."""
    return module_daemon("--allow-network", "*").online()


def lines(daemon: Daemon, script: str, **fields: Any) -> list[str]:
    """What a script prints in a run that succeeds."""
    state = daemon.run(entrypoint=script, **fields)
    assert state["status"] == "succeeded", state
    printed: list[str] = state["logs"]
    return printed


def status(daemon: Daemon, **fields: Any) -> dict[str, str]:
    """/proc/self/status of a process in a run."""
    pairs = (line.partition(":") for line in lines(daemon, "cat /proc/self/status", **fields))
    return {name: value.strip() for name, _, value in pairs}


def container_of(daemon: Daemon, engine: docker.APIClient, run: str) -> dict[str, Any]:
    """The engine's word on the container of a run that has started."""
    daemon.wait_for(run, lambda state: state.get("phase") == "running")
    about: dict[str, Any] = engine.inspect_container(f"lightrun-{run}")
    return about


def end(daemon: Daemon, *runs: str) -> None:
    """Cancel runs and wait for their end."""
    for run in runs:
        assert daemon.request("POST", f"/runs/{run}/cancel").status == 204
    for run in runs:
        daemon.wait(run)


# ---------------------------------------------------------------- Privileges


def test_capabilities_seccomp_and_no_new_privileges(lightrun: Daemon) -> None:
    inside = status(lightrun)
    mask = sum(1 << number for number in CAPABILITIES.values())
    assert [int(inside[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")] == [mask] * 3
    assert int(inside["CapAmb"], 16) == 0
    assert (inside["NoNewPrivs"], inside["Seccomp"]) == ("1", "2")


def test_another_user_has_no_capability_at_all(lightrun: Daemon, uid_image: str) -> None:
    inside = status(lightrun, image=uid_image)
    assert int(inside["CapEff"], 16) == 0
    assert (inside["NoNewPrivs"], inside["Seccomp"]) == ("1", "2")


FORBIDDEN = (
    "mount -t tmpfs x /mnt", "mknod /x b 8 0", "echo 1 > /proc/sys/vm/drop_caches", "unshare -m true", "hostname x",
    "chroot / true", "cat /dev/kmsg", "ls /dev/mem", "ip link set lo down",
)  # fmt: skip


def test_what_needs_more_fails(lightrun: Daemon) -> None:
    tried = [f"({command}) > /dev/null 2> /dev/null && echo '{command}'" for command in ("true", *FORBIDDEN)]
    assert lines(lightrun, "; ".join([*tried, "true"])) == ["true"]


def test_an_init_is_the_first_process(lightrun: Daemon) -> None:
    assert "init" in lines(lightrun, "cat /proc/1/comm")[0]


def test_what_only_the_engine_knows(lightrun: Daemon, engine: docker.APIClient) -> None:
    run = lightrun.detach(entrypoint="sleep 60", memory="32m")
    about = container_of(lightrun, engine, run)
    host, config = about["HostConfig"], about["Config"]
    assert (host["Memory"], host["MemorySwap"], host["Privileged"]) == (32 << 20, 32 << 20, False)
    assert (host["Binds"], host["Devices"], host["PidMode"], host["UTSMode"]) == (None, None, "", "")
    assert (host["IpcMode"], host["NetworkMode"], host["AutoRemove"]) == ("private", NETWORK, False)
    assert [mount["Type"] for mount in about["Mounts"]] == []
    assert int(host["LogConfig"]["Config"]["max-size"]) <= 10 << 20
    assert set(config["Labels"]) == {"lightrun.state", "lightrun.run", *_image_labels(engine, about["Image"])}
    assert config["Labels"]["lightrun.run"] == run
    end(lightrun, run)


def _image_labels(engine: docker.APIClient, image: str) -> set[str]:
    return set((EngineApi().inspect_image(image) or {})["Config"]["Labels"] or {})


# ---------------------------------------------------------------- Limits


def cgroup(name: str, controller: str, file: str) -> str:
    """A command that prints a limit, of cgroup version 2 or 1."""
    return f"cat /sys/fs/cgroup/{name} 2> /dev/null || cat /sys/fs/cgroup/{controller}/{file}"


def test_limits_are_those_of_the_request(lightrun: Daemon) -> None:
    script = "; ".join([
        cgroup("memory.max", "memory", "memory.limit_in_bytes"), cgroup("pids.max", "pids", "pids.max"),
        cgroup("cpu.max", "cpu", "cpu.cfs_quota_us"),
    ])  # fmt: skip
    assert lines(lightrun, script, memory="32m", pids=20, cpus=0.25)[:2] == [str(32 << 20), "20"]
    assert lines(lightrun, script, memory="32m", pids=20, cpus=0.25)[2].split()[0] == "25000"
    default = lines(lightrun, script)
    assert (default[0], default[1], default[2].split()[0]) == (str(512 << 20), "100", "100000")


def test_processes_are_limited(lightrun: Daemon) -> None:
    state = lightrun.run(entrypoint="for i in $(seq 40); do sleep 1 & done; echo all", pids=10)
    assert "all" not in state["logs"]
    assert any("fork" in line for line in state["logs"])


def test_cpu_is_limited(lightrun: Daemon) -> None:
    printed = lines(lightrun, "time timeout 1 sh -c 'while :; do :; done' || true", cpus=0.2)
    spent = {line.split()[0]: float(line.split()[-1].rstrip("s")) for line in printed if line.startswith(("user", "sys"))}
    assert sum(spent.values()) < 0.5


# ---------------------------------------------------------------- Networks


def test_none_means_no_network(lightrun: Daemon) -> None:
    assert lines(lightrun, "ls /sys/class/net; ip route", network="none") == ["lo"]


def test_the_bridge_is_made_with_inter_container_traffic_off(lightrun: Daemon, engine: docker.APIClient) -> None:
    assert lines(lightrun, "ls /sys/class/net") == ["eth0", "lo"]
    about = engine.inspect_network(NETWORK)
    assert about["Driver"] == "bridge"
    assert about["Options"]["com.docker.network.bridge.enable_icc"] == "false"


def test_two_runs_cannot_reach_each_other(lightrun: Daemon, engine: docker.APIClient) -> None:
    serve = "httpd -p 9000; sleep 0.2; wget -q -O- http://$(hostname -i):9000/f; sleep 60"
    run = lightrun.detach(files={"f": "reached\n"}, entrypoint=serve)
    lightrun.wait_for(run, lambda state: state["logs"] == ["reached"])  # it serves on its address, to itself
    address = container_of(lightrun, engine, run)["NetworkSettings"]["Networks"][NETWORK]["IPAddress"]
    state = lightrun.run(entrypoint=f"wget -q -T 2 -O- http://{address}:9000/f")
    assert state["exitCode"] not in (0, 127)
    assert "reached" not in state["logs"]
    end(lightrun, run)


@pytest.mark.parametrize("network", ["host", "container:x", "ns:/proc/1/ns/net"])
def test_other_name_spaces_are_refused_whatever_is_allowed(lightrun: Daemon, network: str) -> None:
    response = lightrun.request("POST", "/run", json={"image": "x", "network": network})
    assert (response.status, response.json()["details"][0]["path"]) == (400, ["network"])


def test_the_hosts_network_has_no_other_name(lightrun: Daemon, engine: docker.APIClient) -> None:
    host = next(network["Id"] for network in engine.networks() if network["Name"] == "host")
    for name in (host, host[:12]):
        state = lightrun.run(network=name, entrypoint="true")
        assert (state["status"], state["reason"]) == ("failed", "start_failed")


@pytest.fixture
def operators_network(engine: docker.APIClient) -> Iterator[str]:
    """A network that somebody else has made."""
    made = engine.create_network(OPERATORS_NETWORK, driver="bridge", internal=True)
    yield OPERATORS_NETWORK
    engine.remove_network(made["Id"])


def test_an_allowed_network_is_used(lightrun: Daemon, engine: docker.APIClient, operators_network: str) -> None:
    run = lightrun.detach(network=operators_network, entrypoint="sleep 60")
    assert set(container_of(lightrun, engine, run)["NetworkSettings"]["Networks"]) == {operators_network}
    end(lightrun, run)
    assert eventually(lambda: not lightrun.containers())


def test_a_network_that_is_not_there(lightrun: Daemon) -> None:
    state = lightrun.run(network="no-such-network", entrypoint="true")
    assert (state["status"], state["reason"]) == ("failed", "start_failed")
    assert "no-such-network" in state["error"]


# ---------------------------------------------------------------- Nothing is left


@pytest.fixture(scope="module")
def volume_image(engine_api: EngineApi) -> str:
    """An image that wants an anonymous volume."""
    return make_image(engine_api, "lightrun/busybox-volume:latest", "VOLUME /data")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"entrypoint": "echo x > /data/f"}, "exited"),
        ({"entrypoint": "echo x > /data/f", "workdir": "/data", "files": {"g": "x"}, "extract": ["."]}, "exited"),
        ({"entrypoint": "exit 1"}, "exited"),
        ({"entrypoint": ["no-such-program"]}, "exited"),
        ({"entrypoint": "sleep 60", "timeout": 300}, "timeout"),
        ({"entrypoint": "true", "workdir": "/bin/busybox"}, "start_failed"),
    ],
)
def test_nothing_is_left_on_the_engine(
    lightrun: Daemon, engine: docker.APIClient, volume_image: str, fields: dict[str, Any], reason: str
) -> None:
    before = _volumes(engine)
    assert lightrun.run(image=volume_image, **fields)["reason"] == reason
    assert eventually(lambda: not lightrun.containers())
    assert eventually(lambda: not _volumes(engine) - before)


def test_nothing_is_left_of_cancelled_runs(lightrun: Daemon, engine: docker.APIClient, volume_image: str) -> None:
    before = _volumes(engine)
    for pause in (0, 0.1, 0.2, 0.5):
        run = lightrun.detach(image=volume_image, entrypoint="sleep 60")
        time.sleep(pause)
        end(lightrun, run)
    assert eventually(lambda: not lightrun.containers())
    assert eventually(lambda: not _volumes(engine) - before)


def _volumes(engine: docker.APIClient) -> set[str]:
    """The volumes that are no container's."""
    return {str(volume["Name"]) for volume in engine.volumes(filters={"dangling": True})["Volumes"] or ()}


# ---------------------------------------------------------------- Nothing secret is told


@pytest.mark.parametrize(
    ("more", "reason"),
    [({}, "exited"), ({"workdir": "/bin/busybox"}, "start_failed"), ({"image": "127.0.0.1:1/x"}, "pull_failed")],
)
def test_secrets_stay_where_they_belong(lightrun: Daemon, more: dict[str, Any], reason: str) -> None:
    secret = "zanzibar"
    state = lightrun.run(env={"S": secret}, stdin=secret, files={"f": secret}, entrypoint="exit 1", **more)
    assert state["reason"] == reason
    assert secret not in str(state)
    assert secret not in lightrun.request("GET", "/runs").text
    assert secret not in lightrun.log()
    kept = [path for path in lightrun.state_dir.rglob("*") if path.is_file()]
    assert not [path.name for path in kept if secret.encode() in path.read_bytes()]


def test_no_label_holds_a_secret(lightrun: Daemon, engine: docker.APIClient) -> None:
    run = lightrun.detach(env={"S": "zanzibar"}, stdin="zanzibar", files={"f": "zanzibar"}, entrypoint="sleep 60")
    assert "zanzibar" not in str(container_of(lightrun, engine, run)["Config"]["Labels"])
    end(lightrun, run)
