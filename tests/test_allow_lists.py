"""--allow-image, --allow-network and --callback-allow: no spelling leads around them, and what they refuse goes nowhere."""

from __future__ import annotations

import ctypes
import os
import socket
import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
import pytest

from conftest import Daemon, DaemonFactory, Receiver, eventually
from engine import IMAGE, EngineApi, engine_host

NAME = "lightrun-lists"
NOWHERE = "lightrun/no-such-image"  # a run of it ends at once where nothing is pulled
DIGEST = "sha256:" + "a" * 64


def answer(daemon: Daemon, **fields: Any) -> tuple[int, str]:
    """Status of the answer to a run, and its error or reason."""
    response = daemon.request("POST", "/run", json={"image": IMAGE, "entrypoint": "true", **fields})
    return response.status, response.json().get("error" if response.status >= 400 else "reason", "")


def image_id(name: str) -> str:
    """The engine's id of an image."""
    return str((EngineApi().inspect_image(name) or {})["Id"])


# ---------------------------------------------------------------- A tap on the engine


class Tap:
    """A Unix socket that leads to the engine and records what is said to it."""

    def __init__(self, folder: Path) -> None:
        self.said = bytearray()
        self.url = f"unix://{folder / 'e'}"
        tap = self

        class Handler(socketserver.BaseRequestHandler):
            """One connection."""

            def handle(self) -> None:
                with socket.socket(socket.AF_UNIX) as engine:
                    engine.connect(urlsplit(engine_host()).path)
                    back = threading.Thread(target=pump, args=(engine, self.request, lambda _: None))
                    back.start()
                    pump(self.request, engine, tap.said.extend)
                    back.join()

        self.server = socketserver.ThreadingUnixStreamServer(str(folder / "e"), Handler)


def pump(source: socket.socket, target: socket.socket, record: Callable[[bytes], object]) -> None:
    """Copy until the end of one direction, and pass that on."""
    try:
        while data := source.recv(65536):
            record(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(scope="module")
def tap(engine: docker.APIClient) -> Iterator[Tap]:
    """The tap that `lightrun` goes through."""
    with tempfile.TemporaryDirectory(prefix="tap-") as folder:
        made = Tap(Path(folder))
        thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.server.shutdown()
        made.server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def lightrun(tap: Tap, module_daemon: DaemonFactory) -> Daemon:
    """A daemon with every list."""
    return module_daemon(
        "--docker-host", tap.url, "--pull", "never", "--allow-image", "docker.io/lightrun/*", "--allow-network", NAME + "-*",
        "--callback-allow", "127.0.0.1", "--callback-allow", "LocalHost", "--callback-allow", "*.example.com",
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide(module_daemon: DaemonFactory) -> Daemon:
    """A daemon whose lists let much pass."""
    images = "sha256:*", "docker.io/library/*", "docker.io/lightrun/*"
    options = [text for image in images for text in ("--allow-image", image)]
    return module_daemon("--pull", "never", "--allow-network", "*", *options)


@pytest.fixture
def silent(tap: Tap, lightrun: Daemon) -> Iterator[None]:
    """Fails when the engine was asked for an image, a network or a container."""
    before = len(tap.said)
    yield
    asked = bytes(tap.said[before:])
    assert not [word for word in (b"/images", b"/networks", b"/containers/create") if word in asked]


# ---------------------------------------------------------------- --allow-image


@pytest.mark.parametrize("prefix", ["", "docker.io/", "index.docker.io/"])
def test_images_that_the_list_names(lightrun: Daemon, tap: Tap, user_image: str, prefix: str) -> None:
    for tag in ("", ":latest"):
        assert answer(lightrun, image=f"{prefix}lightrun/busybox{tag}") == (200, "exited")
    assert b"/images/docker.io/lightrun/busybox:latest/json" in tap.said
    # A digest is what counts, whatever the tag; and an image's id is no digest.
    for image in (f"busybox@{DIGEST}", f"busybox:latest@{DIGEST}", f"busybox@{image_id(user_image)}"):
        assert answer(lightrun, image=f"{prefix}lightrun/{image}") == (200, "pull_failed")


@pytest.mark.parametrize(
    "image",
    [
        "busybox", "library/busybox", "lightrun", "docker.io/lightrun", "docker.io/library/lightrun", "lightrun2/busybox",
        "DOCKER.IO/lightrun/busybox", "Docker.io/lightrun/busybox", "docker.io:443/lightrun/busybox", "LIGHTRUN/busybox",
        "index.docker.io:443/lightrun/busybox", "registry-1.docker.io/lightrun/busybox", "docker.io.evil.org/lightrun/busybox",
        "evil.org/docker.io/lightrun/busybox", "localhost/x", "localhost/lightrun/busybox", "localhost:5000/lightrun/busybox",
        "127.0.0.1:5000/docker.io/lightrun/busybox", "[::1]:5000/lightrun/busybox", "index.docker.io/docker.io/lightrun/busybox",
        "xdocker.io/lightrun/busybox", "docker.io/docker.io/lightrun/busybox", DIGEST, f"busybox@{DIGEST}", "sha256:lightrun",
        "xn--dcker-jua.io/lightrun/busybox", "a" * 64, "docker.io/" + "a" * 64,
    ],
)  # fmt: skip
def test_images_that_the_list_does_not_name(lightrun: Daemon, silent: None, image: str) -> None:
    assert answer(lightrun, image=image) == (403, "not_allowed")


@pytest.mark.parametrize(
    "image",
    [
        "docker.io./lightrun/busybox", "docker.io//lightrun/busybox", "/lightrun/busybox", "lightrun/../library/busybox",
        "docker.io/lightrun/busybox/../../library/x", "docker.io/lightrun/busybox\n", " lightrun/busybox", "lightrun/busybox ",
        "docker.io/lightrun/./busybox", "docker.io%2Flightrun/busybox", "https://docker.io/lightrun/busybox",
        "lightrun/busybox?x", "lightrun/busybox#x", "u:p@docker.io/lightrun/busybox", "docker.io\\lightrun/busybox",
        "lightrun/Busybox", "lightrun/busybox@sha256:abc", "lightrun/busybox@" + DIGEST.upper(),
        "docker.\u0131o/lightrun/busybox", "lightrun/busybox:", "lightrun/busybox@sha512:" + "a" * 128,
        "lightrun/busybox:a:b", "lightrun/busybox\0",
    ],
)  # fmt: skip
def test_what_is_no_reference(lightrun: Daemon, silent: None, image: str) -> None:
    assert answer(lightrun, image=image) == (400, "bad_request")


def test_an_id_is_another_spelling_of_an_image(lightrun: Daemon, wide: Daemon, silent: None) -> None:
    whole = image_id(IMAGE)
    for image in (whole, whole[7:19], whole[7:23], whole[7:], whole[:19]):
        assert answer(lightrun, image=image) == (403, "not_allowed")
    assert answer(wide, image=whole) == (200, "exited")
    for image in (whole[7:11], whole[7:19], whole[7:], whole[:19], f"busybox@{whole}"):  # names in docker.io/library
        assert answer(wide, image=image) == (200, "pull_failed")


# ---------------------------------------------------------------- --allow-network


@pytest.fixture(scope="module")
def network(engine: docker.APIClient) -> Iterator[str]:
    """The id of a network that the list names."""
    made = str(engine.create_network(NAME + "-a", driver="bridge", internal=True)["Id"])
    yield made
    engine.remove_network(made)


@pytest.fixture(scope="module")
def unnamed(engine: docker.APIClient) -> Iterator[str]:
    """The name of a network that it does not."""
    made = engine.create_network(NAME, driver="bridge", internal=True)
    yield NAME
    engine.remove_network(made["Id"])


def test_networks_that_the_list_names(lightrun: Daemon, wide: Daemon, network: str, unnamed: str) -> None:
    for name in (NAME + "-a", "none", None):
        assert answer(lightrun, **({"network": name} if name else {})) == (200, "exited")
    assert answer(lightrun, network=NAME + "-missing") == (200, "start_failed")
    for name in (NAME + "-a", unnamed, "bridge"):
        assert answer(wide, network=name) == (200, "exited")


def test_networks_that_the_list_does_not_name(
    lightrun: Daemon, engine: docker.APIClient, silent: None, network: str, unnamed: str
) -> None:
    ids = [str(about["Id"]) for about in engine.networks(names=["host", "bridge", "none"])]
    ids += [about[:12] for about in ids]
    spelled = (NAME + "-a").upper(), "x" + NAME + "-a", NAME + "_a", "Host", "HOST", "NONE", "Default"
    for name in (*ids, network, network[:12], *spelled, unnamed, "lightrun", "bridge", "null", "nat", "docker0", "slirp4netns"):
        assert answer(lightrun, network=name) == (403, "not_allowed"), name


@pytest.mark.parametrize(
    "network",
    [
        "host", "default", "container:x", "Container:x", "container:", "ns:/proc/1/ns/net", "NS:/x", "host ", " host", "host\n",
        "host\0", "host\u200b", "\uff48\uff4f\uff53\uff54", "none ", "none\n", NAME + "-a ",
        NAME + "-a\n", "\t" + NAME + "-a", NAME + "-*",
        NAME + "-a/../host", NAME + "-a,host", "-" + NAME, "service:x", "name=host", "host:x", "pasta:--map-gw",
    ],
)  # fmt: skip
def test_what_is_no_network(lightrun: Daemon, wide: Daemon, silent: None, network: str) -> None:
    for daemon in (lightrun, wide):
        assert answer(daemon, network=network) == (400, "bad_request")


def test_an_allowed_name_is_not_an_id_nor_another_case(wide: Daemon, engine: docker.APIClient, network: str) -> None:
    ids = [str(about["Id"]) for about in engine.networks(names=["host", "none"])] + [network]
    for name in (*ids, *(about[:12] for about in ids), "HOST", "Host", "NONE", "null", (NAME + "-a").upper()):
        assert answer(wide, network=name) == (200, "start_failed"), name


# ---------------------------------------------------------------- --callback-allow


def callback(daemon: Daemon, url: str) -> tuple[int, str]:
    """Status of the answer to a run that calls back, and its error or its id."""
    fields = {"image": NOWHERE, "detached": True, "callbackUrl": url}
    response = daemon.request("POST", "/run", json=fields)
    return response.status, response.json()["id" if response.status == 202 else "error"]


def test_callback_hosts_that_the_list_names(lightrun: Daemon, receiver: Receiver) -> None:
    port = receiver.port
    for url in (
        f"http://127.0.0.1:{port}/a", f"HTTP://127.0.0.1:{port}/a", f"http://LOCALHOST:{port}/a", f"http://localhost:0{port}/a",
        f"http://localhost:{port}/a#@evil.org", f"http://127.0.0.1:{port}/a#?x",
    ):  # fmt: skip
        assert callback(lightrun, url)[0] == 202
    assert {request.path for request in receiver.wait(6)} == {"/a"}
    assert callback(lightrun, f"http://127.0.0.1:{port}?@evil.org:80/\\x")[0] == 202
    assert receiver.wait(7)[-1].path == "/?@evil.org:80/\\x"


HOSTS = [
    "localhost.", "127.0.0.1.", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1",
    "127.0.0.01", "127.0.0.001", "0", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]",
    "[::1%25lo]", "127.0.0.2", "127.0.0.1.nip.io", "127.0.0.1.evil.org", "localhost.evil.org", "localhostx", "ip6-localhost",
    "127.0.0.1%2e", "127.0.0.1%00", "127.0.0.1\\.evil.org", "127.0.0.1\\", "localhost\\.evil.org", "example.com", ".example.com.",
    "a.example.com.", "a.example.com.evil.org", "evil.org?.example.com", "evil.org#.example.com", "evil.org/.example.com",
    "127.0.0.1;evil.org", "127.0.0.1,evil.org", "evil.org%23.example.org", "127.0.0.1%20", "127%2e0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_callback_hosts_that_the_list_does_not_name(lightrun: Daemon, receiver: Receiver, host: str) -> None:
    for url in (f"http://{host}:{receiver.port}/", f"https://{host}/#@127.0.0.1"):
        status, error = callback(lightrun, url)
        assert (status, error) in {(403, "not_allowed"), (400, "bad_request")}
    assert not receiver.requests


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1@evil.org/", "http://evil.org@127.0.0.1/", "http://127.0.0.1:80@evil.org/", "http://@127.0.0.1/",
        "http://:@127.0.0.1/", "http://evil.org\\@127.0.0.1/", "http://127.0.0.1\\@evil.org/", "http://127.0.0.1#@evil.org:x@/:0",
        "http://evil.org#@127.0.0.1/", "http://evil.org?@127.0.0.1/", "http:\\\\127.0.0.1/", "http:/\\127.0.0.1/", "http:///127.0.0.1/",
        "http:127.0.0.1/", "//127.0.0.1/", "http:// 127.0.0.1/", "http://127.0.0.1\t.evil.org/", "http://127.0.0.1\r\nHost: x/",
        "http://127.0.0.1:80:80/", "http://127.0.0.1:99999/", "http://[127.0.0.1/", "http://127.0.0.1]/", "http://127.0.0.1\u3002/",
        "http://①②⑦.0.0.1/", "http://localho\u017ft/", "unix:///var/run/docker.sock", "http+unix://127.0.0.1/", " http://127.0.0.1/",
    ],
)  # fmt: skip
def test_urls_that_two_readers_could_take_differently(lightrun: Daemon, url: str) -> None:
    if url.startswith("http://127.0.0.1#"):
        assert callback(lightrun, url)[0] == 202  # a fragment, whatever it holds
    else:
        assert callback(lightrun, url) in [(400, "bad_request"), (403, "not_allowed")]


# ---------------------------------------------------------------- Link-local addresses, in a network of the test's own


ADDRESS, OTHER = "169.254.77.77", "169.254.77.78"
NUMBER = int.from_bytes(socket.inet_aton(ADDRESS), "big")
LITERAL = [ADDRESS, "[::ffff:169.254.77.77]", "[::ffff:a9fe:4d4d]", "[0:0:0:0:0:FFFF:A9FE:4D4D]", "[fe80::77]", "[fe80::77%25lo]"]
DISGUISED = [
    str(NUMBER), hex(NUMBER), f"0x{NUMBER:X}", f"0{NUMBER:o}", f"169.254.{NUMBER & 0xFFFF}", f"169.{NUMBER & 0xFFFFFF}",
    "0xa9.254.77.77", "0251.0376.0115.0115", "169.254.0115.77", "0xA9.0xfe4d4d", "metadata.test", "METADATA.test",
    "metadata.example.com", "mapped.test",
]  # fmt: skip
DOUBTFUL = ["169.254.77.77.", "metadata.test.", "[::169.254.77.77]", "six.test", "169.254.77.77%2e", "169.254.77.77\\.test"]


class Ear(socketserver.ThreadingTCPServer):
    """Hears what is sent to port 80 of any address in the network of a process, and answers 200."""

    address_family, block_on_close = socket.AF_INET6, True

    def __init__(self, pid: int) -> None:
        self.heard: list[bytes] = []
        ear = self

        class Handler(socketserver.BaseRequestHandler):
            """One connection."""

            def handle(self) -> None:
                ear.heard.append(self.request.recv(65536))
                self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" if ear.heard[-1] else b"")

        with Path(f"/proc/{pid}/ns/net").open() as namespace:
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        super().__init__(("::", 80), Handler)


@pytest.fixture(scope="module")
def elsewhere(module_daemon: DaemonFactory) -> Iterator[Callable[..., tuple[Daemon, Ear]]]:
    """A function that starts a daemon in a network of its own, with link-local addresses and names for them."""
    ears: list[tuple[Ear, threading.Thread]] = []
    with tempfile.TemporaryDirectory(prefix="net-") as folder:
        hosts, python = Path(folder) / "hosts", Path(folder) / "python"
        names = f"{ADDRESS} metadata.test metadata.example.com\n::ffff:{ADDRESS} mapped.test\n"
        hosts.write_text(f"127.0.0.1 localhost loop.test\n{names}{OTHER} other.example.com\nfe80::77 six.test\n")
        addresses = "".join(f"ip address add {each} dev lo; " for each in (ADDRESS + "/32", OTHER + "/32", "fe80::77/128"))
        inside = f'set -e; ip link set lo up; {addresses} mount --bind {hosts} /etc/hosts; exec {sys.executable} "$@"'
        python.write_text(f"#!/bin/sh\nexec unshare --net --mount sh -c '{inside}' sh \"$@\"\n")
        python.chmod(0o755)

        def make(*options: str) -> tuple[Daemon, Ear]:
            daemon = module_daemon("--pull", "never", *options, socket=True, python=python)
            with ThreadPoolExecutor(1) as thread:  # which alone changes its network
                ear = thread.submit(Ear, daemon.pid).result()
            ears.append((ear, threading.Thread(target=ear.serve_forever, kwargs={"poll_interval": 0.02})))
            ears[-1][1].start()
            return daemon, ear

        yield make
        for ear, thread in ears:
            ear.shutdown()
            ear.server_close()
            thread.join()


def outcomes(daemon: Daemon, *urls: str) -> list[str]:
    """What becomes of the first attempt at each callback: `refused`, `delivered`, `failed` or `pending`."""
    runs = [callback(daemon, url) for url in urls]
    assert {status for status, _ in runs} <= {202, 400, 403}
    results = []
    for status, run in runs:
        state = daemon.wait_for(run, lambda state: state["callback"]["attempts"]) if status == 202 else None
        results.append(state["callback"]["status"] if state else "refused")
        if state:  # some would be tried again
            assert daemon.request("DELETE", f"/runs/{run}").status == 204
    return results


@pytest.fixture(scope="module")
def anywhere(elsewhere: Callable[..., tuple[Daemon, Ear]]) -> tuple[Daemon, Ear]:
    """A daemon without a list."""
    return elsewhere()


@pytest.fixture(scope="module")
def named(elsewhere: Callable[..., tuple[Daemon, Ear]]) -> tuple[Daemon, Ear]:
    """A daemon whose list names one link-local address, beside all."""
    return elsewhere("--callback-allow", "*", "--callback-allow", ADDRESS)


def test_the_ear_hears(anywhere: tuple[Daemon, Ear]) -> None:
    daemon, ear = anywhere
    assert outcomes(daemon, "http://127.0.0.1/1", "http://loop.test/2", "http://2130706433/3") == ["delivered"] * 3
    assert [word in b"".join(ear.heard) for word in (b"POST /1 ", b"POST /2 ", b"POST /3 ")] == [True] * 3


def test_link_local_addresses_hear_nothing_in_any_spelling(anywhere: tuple[Daemon, Ear]) -> None:
    daemon, ear = anywhere
    ear.heard.clear()
    assert outcomes(daemon, *(f"http://{host}/" for host in LITERAL)) == ["refused"] * len(LITERAL)
    for host, outcome in zip(DISGUISED, outcomes(daemon, *(f"http://{host}/" for host in DISGUISED)), strict=True):
        assert outcome == "failed", host
    assert "delivered" not in outcomes(daemon, *(f"http://{host}/" for host in DOUBTFUL))
    assert not any(ear.heard)


def test_a_link_local_address_that_is_named(named: tuple[Daemon, Ear]) -> None:
    daemon, ear = named
    ear.heard.clear()
    assert outcomes(daemon, f"http://{ADDRESS}/", f"http://{NUMBER}/", "http://metadata.test/") == ["delivered"] * 3
    assert len(ear.heard) == 3
    others = (f"http://{host}/" for host in (OTHER, "[fe80::77]", "other.example.com"))
    assert outcomes(daemon, *others) == ["refused", "refused", "failed"]
    assert not any(ear.heard[3:])


def test_ipv6_without_a_port(anywhere: tuple[Daemon, Ear]) -> None:
    daemon, ear = anywhere
    ear.heard.clear()
    assert outcomes(daemon, "http://[::1]/", "http://[::a]/") == ["delivered", "pending"]
    assert eventually(lambda: ear.heard)
    assert b"\r\nHost: [::1]\r\n" in ear.heard[0]
