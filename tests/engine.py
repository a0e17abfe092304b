"""Bring up a Docker Engine with one small image on it, using nothing but Python and Debian's packages.

`python3 tests/engine.py` finds an engine (`DOCKER_HOST`, else the default socket) or, as root on Debian or Ubuntu,
installs and starts one that outlives this script, and makes sure that `lightrun/busybox:latest` is on it without any
registry. When it cannot go on it says what is missing in one line and exits with 1.

Tests also take `PrivateEngine` from here: a second `dockerd` that they may stop, freeze and kill.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import platform
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

DEFAULT_HOST = "unix:///var/run/docker.sock"
IMAGE = "lightrun/busybox:latest"
# Raise it when the content of the image changes: an engine that has an older one gets the new one.
IMAGE_RECIPE = "1"
RECIPE_LABEL = "lightrun-tests.recipe"
DEFAULTS = ("ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 'CMD ["sh"]')

ENGINE_PACKAGES = ("docker.io", "iptables", "ca-certificates", "busybox-static")
ENGINE_LOG = Path("/var/log/lightrun-dockerd.log")
ENGINE_PIDFILE = Path("/var/run/docker.pid")
# Garbage is collected less often: a container's start then takes a tenth less CPU, since all the programs that dockerd starts
# for it (containerd, its shims, dockerd itself two times) inherit that.
ENGINE_ENVIRONMENT = {"GOGC": "800"}
START_SECONDS = 60.0
APT_SECONDS = 900.0

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/tmp:/bin/sh
"""
GROUP = "root:x:0:\napp:x:1000:\nnogroup:x:65534:\n"


class EngineError(Exception):
    """There is no engine and none can be had, or it refused a call; the text says which and what to do."""


# ---------------------------------------------------------------- The Engine API


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def engine_host() -> str:
    """Where the engine is that the tests use: DOCKER_HOST, else the default socket."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_HOST


class EngineApi:
    """The few Engine API calls that a machine without the docker SDK needs, over unix or tcp, with TLS too."""

    def __init__(self, host: str | None = None) -> None:
        self.host = host or engine_host()
        if not self.host.startswith(("unix://", "tcp://", "http://", "https://")):
            raise EngineError(f"DOCKER_HOST={self.host}: only unix:// and tcp:// are known here")

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, bytes]:
        """Send one request and return its status and body. Raises EngineError when the engine does not answer."""
        connection = self._connection(timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"no engine answers at {self.host}: {error}") from error
        finally:
            connection.close()

    def call(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """Like `request`, but a status of 400 or more is an EngineError."""
        status, answer = self.request(method, path, body, headers)
        if status >= 400:
            raise EngineError(f"{method} {path}: {status} {answer.decode(errors='replace').strip()}")
        return answer

    def alive(self) -> bool:
        """Whether the engine answers its ping within 5 seconds."""
        try:
            return self.request("GET", "/_ping", timeout=5)[0] == 200
        except EngineError:
            return False

    def version(self) -> str:
        """The engine's version, such as 26.1.5."""
        return str(json.loads(self.call("GET", "/version"))["Version"])

    def inspect_image(self, image: str) -> dict[str, Any] | None:
        """What the engine knows of an image, or None when it does not have it."""
        status, answer = self.request("GET", f"/images/{quote(image)}/json")
        return json.loads(answer) if status == 200 else None

    def import_image(self, tar: bytes, image: str, changes: Sequence[str]) -> None:
        """Make `image` of a root file system; `changes` are Dockerfile instructions."""
        repository, tag = image.rsplit(":", 1)
        query = urlencode({"fromSrc": "-", "repo": repository, "tag": tag, "changes": list(changes)}, doseq=True)
        _raise_stream_error(self.call("POST", f"/images/create?{query}", tar, {"Content-Type": "application/x-tar"}))

    def pull(self, repository: str, tag: str) -> None:
        """Pull an image from its registry."""
        _raise_stream_error(self.call("POST", "/images/create?" + urlencode({"fromImage": repository, "tag": tag})))

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.host)
        if parts.scheme == "unix":
            return UnixConnection(parts.path, timeout)
        address = parts.hostname or "localhost"
        if not os.environ.get("DOCKER_TLS_VERIFY"):
            return http.client.HTTPConnection(address, parts.port or 2375, timeout=timeout)
        certificates = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
        return http.client.HTTPSConnection(address, parts.port or 2376, timeout=timeout, context=context)


def _raise_stream_error(answer: bytes) -> None:
    """Raise the error that an answer of JSON lines carries, if any: the engine says 200 before it fails."""
    for line in answer.splitlines():
        error = json.loads(line).get("error") if line.strip() else None
        if error:
            raise EngineError(str(error))


# ---------------------------------------------------------------- Bringing one up


def ensure_engine() -> str:
    """Find an engine, or install and start one; return a line that says which. Raises EngineError."""
    api = EngineApi()
    if api.alive():
        return f"engine {api.version()} at {api.host}"
    if api.host != DEFAULT_HOST:
        raise EngineError(f"no engine answers at {api.host}, which DOCKER_HOST names: start it, or unset DOCKER_HOST")
    if not shutil.which("dockerd"):
        install(ENGINE_PACKAGES, f"no Docker Engine at {DEFAULT_HOST}")
    elif os.geteuid() != 0:
        raise EngineError(
            f"no Docker Engine answers at {DEFAULT_HOST} for this user: start it, join its group, or run this as root"
        )
    how = _start_engine(api)
    return f"engine {api.version()} at {api.host} ({how})"


def install(packages: Sequence[str], why: str) -> None:
    """Install Debian packages with one apt-get call. Raises EngineError, naming them, when it cannot."""
    wanted = " ".join(packages)
    if not {"debian", "ubuntu"} & _system_ids():
        raise EngineError(
            f"{why}, and this is not Debian or Ubuntu: install and start Docker Engine and busybox by hand"
        )
    if os.geteuid() != 0:
        raise EngineError(
            f"{why}, and this user is not root: run this as root, or have root run apt-get install {wanted}"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages],
    ):
        _run(command, environment)


def install_missing(packages: dict[str, str], why: str) -> None:
    """Install those packages whose program is not on PATH, in one call. `packages` maps package to program."""
    missing = [package for package, program in packages.items() if not _which(program)]
    if missing:
        install(missing, why)


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    try:
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=APT_SECONDS)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no message").splitlines()[-1]
        raise EngineError(f"{' '.join(command)} failed: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{' '.join(command)} failed: {error}") from error


def _which(program: str) -> str | None:
    """Find a program, also where a user's PATH may not look for system programs."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def _system_ids() -> set[str]:
    """The names this system goes by in os-release: its own and those it is like."""
    try:
        return {word for key in ("ID", "ID_LIKE") for word in platform.freedesktop_os_release().get(key, "").split()}
    except OSError:
        return set()


def _start_engine(api: EngineApi) -> str:
    """Start the installed engine and wait until it answers; return how it was started."""
    if Path("/run/systemd/system").is_dir():
        _run(["systemctl", "start", "docker"], dict(os.environ))
        _wait(api.alive, lambda: False, "systemctl start docker", lambda: "see journalctl -u docker")
        return "started by systemd"
    _remove_stale_pidfile()
    # A session of its own, no terminal, no pipe: it must not end with the shell or the test run that asked for it. It
    # needs no option here: cgroups are mounted, overlay2 and iptables work.
    with ENGINE_LOG.open("ab") as log:
        process = subprocess.Popen(
            ["dockerd"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**ENGINE_ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
    _wait(
        api.alive, lambda: process.poll() is not None, "dockerd", lambda: f"see {ENGINE_LOG}: {_last_line(ENGINE_LOG)}"
    )
    process.returncode = 0  # It goes on without us: no ResourceWarning about a child that still runs.
    return f"started, log {ENGINE_LOG}"


def _remove_stale_pidfile() -> None:
    """A machine that was cut off leaves dockerd's pidfile; when another program has that number, dockerd refuses."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(ENGINE_PIDFILE.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() != "dockerd":
            ENGINE_PIDFILE.unlink()


def _wait(ready: Callable[[], bool], ended: Callable[[], bool], what: str, hint: Callable[[], str]) -> None:
    """Wait until `ready`, at most START_SECONDS; give up at once when `ended`."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if ended() and not ready():
            raise EngineError(f"{what} ended at once; {hint()}")
        if time.monotonic() > deadline:
            raise EngineError(f"{what} did not answer within {START_SECONDS:.0f} s; {hint()}")
        time.sleep(0.1)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "(empty)"


# ---------------------------------------------------------------- The image


def ensure_image(api: EngineApi) -> str:
    """Make sure that IMAGE is on the engine; return a line that says where it came from."""
    found = api.inspect_image(IMAGE)
    if found and (found["Config"].get("Labels") or {}).get(RECIPE_LABEL) == IMAGE_RECIPE:
        return f"image {IMAGE} is there"
    try:
        binary, source = find_busybox()
    except EngineError as reason:
        return f"image {IMAGE} is there, not of this recipe" if found else _pull_image(api, reason)
    api.import_image(root_filesystem(binary), IMAGE, [*DEFAULTS, f"LABEL {RECIPE_LABEL}={IMAGE_RECIPE}"])
    return f"image {IMAGE} made of {source}"


def _pull_image(api: EngineApi, reason: EngineError) -> str:
    """Without a static busybox there is only the registry's."""
    try:
        api.pull("docker.io/library/busybox", "stable")
        repository, tag = IMAGE.rsplit(":", 1)
        api.call("POST", "/images/busybox:stable/tag?" + urlencode({"repo": repository, "tag": tag}))
    except EngineError as error:
        raise EngineError(f"{reason}; and busybox could not be pulled either: {error}") from error
    return f"image {IMAGE} pulled from docker.io"


def find_busybox() -> tuple[bytes, str]:
    """A statically linked busybox and where it came from: PATH, apt-get install as root, apt-get download otherwise."""
    on_path = _static_busybox_on_path()
    if on_path is None and os.geteuid() == 0 and {"debian", "ubuntu"} & _system_ids():
        install(["busybox-static"], "no static busybox")
        on_path = _static_busybox_on_path()
    if on_path is not None:
        return on_path.read_bytes(), str(on_path)
    return _downloaded_busybox(), "apt-get download busybox-static"


def _static_busybox_on_path() -> Path | None:
    found = _which("busybox")
    return Path(found) if found and is_static(Path(found).read_bytes()) else None


def _downloaded_busybox() -> bytes:
    with tempfile.TemporaryDirectory(prefix="lightrun-busybox-") as folder:
        try:
            subprocess.run(
                ["apt-get", "download", "-qq", "busybox-static"], cwd=folder, capture_output=True, check=True
            )
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", package, folder], capture_output=True, check=True)
            return next(path for path in Path(folder).rglob("bin/busybox") if path.is_file()).read_bytes()
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise EngineError("no static busybox: have root run apt-get install busybox-static") from error


def is_static(binary: bytes) -> bool:
    """Whether a 64-bit little-endian ELF program asks for no interpreter (PT_INTERP), so needs no library."""
    if binary[:6] != b"\x7fELF\x02\x01":
        return False
    table, size, count = struct.unpack_from("<Q", binary, 32)[0], *struct.unpack_from("<HH", binary, 54)
    return all(struct.unpack_from("<I", binary, table + index * size)[0] != 3 for index in range(count))


def root_filesystem(busybox: bytes) -> bytes:
    """A root file system, as a tar, around one static busybox: its applets, three users, and a /tmp for everyone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode, owner in (
            ("bin", 0o755, 0),
            ("etc", 0o755, 0),
            ("home", 0o755, 0),
            ("home/app", 0o755, 1000),
            ("root", 0o700, 0),
            ("tmp", 0o1777, 0),
            ("usr", 0o755, 0),
            ("usr/bin", 0o755, 0),
            ("var", 0o755, 0),
        ):
            _add(tar, name, tarfile.DIRTYPE, mode, owner=owner)
        _add(tar, "etc/passwd", tarfile.REGTYPE, 0o644, PASSWD.encode())
        _add(tar, "etc/group", tarfile.REGTYPE, 0o644, GROUP.encode())
        _add(tar, "bin/busybox", tarfile.REGTYPE, 0o755, busybox)
        _add(tar, "usr/bin/env", tarfile.SYMTYPE, 0o777, link="../../bin/busybox")
        for applet in _applets(busybox):
            _add(tar, f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
    return buffer.getvalue()


def _add(
    tar: tarfile.TarFile, name: str, kind: bytes, mode: int, content: bytes = b"", link: str = "", owner: int = 0
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, len(content)
    member.uid = member.gid = owner
    tar.addfile(member, io.BytesIO(content))


def _applets(busybox: bytes) -> list[str]:
    """The names that this busybox goes by. It runs from a file of its own: the bytes may not be on PATH."""
    with tempfile.TemporaryDirectory(prefix="lightrun-busybox-") as folder:
        program = Path(folder, "busybox")
        program.write_bytes(busybox)
        program.chmod(0o755)
        listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return [applet for applet in listed if applet != "busybox"]


# ---------------------------------------------------------------- An engine that tests may break


class PrivateEngine:
    """A second dockerd in namespaces of its own (network, mount, process), for tests that stop, freeze or kill one.

    The machine's engine is not disturbed, because nothing is shared but the kernel and the cgroup tree: two dockerds
    in one network namespace would share docker0 and empty each other's iptables chains. And nothing stays behind,
    because the namespaces die with their first process, and every container, shim, mount and bridge with them. The
    price: no network but among its own containers. Its API is the Unix socket `host`.

    `with PrivateEngine("--live-restore") as engine:` enters it started, with IMAGE on it.
    """

    def __init__(self, *options: str) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.socket = self.folder / "s"
        self.host = f"unix://{self.socket}"
        self.api = EngineApi(self.host)
        self._holder: subprocess.Popen[bytes] | None = None
        self._dockerd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateEngine:
        if os.geteuid() != 0:
            raise EngineError("a private engine needs root")
        try:
            self._make_namespaces()
            self.start()
            ensure_image(self.api)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of dockerd as this process sees it (its parent is `nsenter`)."""
        assert self._dockerd is not None, "the private engine is not running"
        return children(self._dockerd.pid)[0]

    def start(self) -> None:
        """Start dockerd and wait until it answers."""
        assert self._dockerd is None, "the private engine is running"
        inside = ["nsenter", "-t", str(self._init_pid()), "--net", "--mount", "--pid", "--root"]
        with (self.folder / "log").open("ab") as log:
            self._dockerd = process = subprocess.Popen(
                [*inside, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # containerd leaves its stacks in TMPDIR when it is killed
                env={**ENGINE_ENVIRONMENT, **os.environ, "TMPDIR": str(self.folder)},
            )
        _wait(self.api.alive, lambda: process.poll() is not None, "the private engine", lambda: self.log()[-2000:])

    def _command(self) -> list[str]:
        """What to start."""
        arguments = ["--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec"]
        return ["dockerd", *arguments, "--pidfile", f"{self.folder}/pid", "--host", self.host, *self.options]

    def _preparation(self) -> str:
        """What a shell does first in the namespaces. /run is hidden by an empty one, since containerd's shims and iptables'
        lock have fixed places there."""
        return "mount -t tmpfs tmpfs /run"

    def stop(self, timeout: float = 60) -> None:
        """SIGTERM, and wait for the end. Containers end with it, unless it was started with --live-restore."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """SIGKILL: no clean-up at all. Its containerd goes on, as after a real crash, and the next start finds it."""
        self._end(signal.SIGKILL, 10)

    def pause(self) -> None:
        """SIGSTOP: it accepts connections and never answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`. nsenter stops itself along with its child, and so is woken too."""
        os.kill(self.pid, signal.SIGCONT)
        assert self._dockerd is not None
        os.kill(self._dockerd.pid, signal.SIGCONT)

    def log(self) -> str:
        """What dockerd has written so far."""
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """End everything in the namespaces and remove the folder. Harmless when repeated."""
        if self._dockerd is not None:
            # Only nsenter. It goes first: dockerd is its child, and while it is stopped (see `pause`) nobody would reap
            # dockerd, and the namespace would wait for that for ever.
            self._dockerd.kill()
            self._dockerd.wait(30)
            self._dockerd = None
        if self._holder is not None:
            with contextlib.suppress(EngineError, ProcessLookupError):
                os.kill(self._init_pid(), signal.SIGKILL)
            self._holder.wait(30)
            self._holder = None
        self._remove_cgroups()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_namespaces(self) -> None:
        """Start the process whose end ends the namespaces: docker's own init, which also reaps what dockerd leaves."""
        script = f"{self._preparation()} && ip link set lo up && touch /run/ready && exec sleep infinity"
        init = ["docker-init", "-s", "--"]
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", *init, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        holder = self._holder
        _wait(
            self._namespaces_ready,
            lambda: holder.poll() is not None,
            "unshare",
            lambda: "namespaces need root and iproute2",
        )

    def _namespaces_ready(self) -> bool:
        try:
            return Path(f"/proc/{self._init_pid()}/root/run/ready").exists()
        except (EngineError, OSError):
            return False

    def _init_pid(self) -> int:
        assert self._holder is not None, "the private engine is closed"
        found = children(self._holder.pid)
        if not found:
            raise EngineError("the private engine's namespaces are gone")
        return found[0]

    def _end(self, signum: signal.Signals, timeout: float) -> None:
        assert self._dockerd is not None, "the private engine is not running"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)
        self._dockerd.wait(timeout)
        self._dockerd = None

    def _remove_cgroups(self) -> None:
        """Containers that ended with their namespace leave empty cgroups: nobody was there to remove them."""
        containers = {folder.name for folder in (self.folder / "data/containers").glob("*")}
        for parent, names, _ in os.walk("/sys/fs/cgroup"):  # which, unlike glob, bears that others go meanwhile
            for name in containers.intersection(names):
                with contextlib.suppress(OSError):
                    Path(parent, name).rmdir()


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    return [child for child, parent in _processes() if parent == pid]


def _processes() -> Iterator[tuple[int, int]]:
    """Every process with its parent. The name between parentheses may hold anything, also spaces and parentheses."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def main() -> int:
    """Bring up the engine and the image, and say so."""
    try:
        print(ensure_engine(), flush=True)
        print(ensure_image(EngineApi()), flush=True)
    except EngineError as error:
        print(f"tests/engine.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
