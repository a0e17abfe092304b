"""Images for tests, made on demand without a registry, and a registry of our own to pull them from."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, urlencode

from engine import DEFAULTS, IMAGE_RECIPE, RECIPE_LABEL, EngineApi, EngineError, find_busybox, root_filesystem

USER_ID_IMAGE = "lightrun/busybox-uid:latest"
USER_NAME_IMAGE = "lightrun/busybox-user:latest"


def make_image(api: EngineApi, name: str, *instructions: str) -> str:
    """Make image `name` of busybox with Dockerfile `instructions`, unless it is there; return the name.

    An import takes CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, VOLUME and WORKDIR. PATH is set and the command is `sh`,
    unless they say otherwise.
    """
    recipe = hashlib.sha256("\n".join([IMAGE_RECIPE, *instructions]).encode()).hexdigest()
    found = api.inspect_image(name)
    if not found or (found["Config"].get("Labels") or {}).get(RECIPE_LABEL) != recipe:
        changes = [*DEFAULTS, *instructions, f"LABEL {RECIPE_LABEL}={recipe}"]
        api.import_image(root_filesystem(find_busybox()[0]), name, changes)
    return name


def remove_image(api: EngineApi, name: str) -> None:
    """Remove an image; one that is not there is fine."""
    status, answer = api.request("DELETE", f"/images/{quote(name)}?force=true")
    if status not in (200, 404):
        raise EngineError(f"cannot remove {name}: {answer.decode(errors='replace')}")


def user_id_image(api: EngineApi) -> str:
    """Busybox that runs as user 1000, by number."""
    return make_image(api, USER_ID_IMAGE, "USER 1000")


def user_name_image(api: EngineApi) -> str:
    """Busybox that runs as user `app`, by name, in a work directory that belongs to root."""
    return make_image(api, USER_NAME_IMAGE, "USER app", "WORKDIR /srv")


class Registry:
    """Debian's docker-registry on a free port of 127.0.0.1, which every engine takes without TLS; a context manager.

    With `user` and `password` it asks for them. The machine's engine reaches it; a PrivateEngine has no way to.
    """

    def __init__(self, user: str = "", password: str = "") -> None:
        self.user, self.password = user, password
        self.folder = Path(tempfile.mkdtemp(prefix="registry-"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pushed: list[tuple[EngineApi, str]] = []

    def __enter__(self) -> Registry:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the registry and wait until it accepts connections. What was pushed before is still there."""
        configuration = self.folder / "config.json"  # JSON is YAML.
        configuration.write_text(json.dumps(self._configuration()))
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", configuration], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while not _accepts(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"docker-registry did not start: {(self.folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the registry, when it has logged what it was asked. Its port refuses connections from now on."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def pulls(self) -> int:
        """How often it was asked for a manifest by its tag: newer engines ask for one by its digest only when they do not have
        it. That is logged after the answer, but before the registry ends."""
        self.stop()
        log = (self.folder / "log").read_text()
        self.start()
        return len(re.findall(r'"(?:GET|HEAD) /v2/\S+/manifests/(?!sha256:)', log))

    def close(self) -> None:
        """Stop it and remove its folder, and from the engines the names that `push` gave."""
        self.stop()
        for api, name in self._pushed:
            remove_image(api, name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def push(self, image: str, name: str, api: EngineApi | None = None) -> str:
        """Push `image` as `name` (`folder/image:tag`) and return the full reference, which the engine then forgets."""
        api = api or EngineApi()
        repository, tag = f"{self.address}/{name}".rsplit(":", 1)
        api.call("POST", f"/images/{quote(image)}/tag?" + urlencode({"repo": repository, "tag": tag}))
        self._pushed.append((api, f"{repository}:{tag}"))
        credentials = {"username": self.user, "password": self.password, "serveraddress": self.address}
        header = base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()
        answer = api.call("POST", f"/images/{repository}/push?tag={quote(tag)}", headers={"X-Registry-Auth": header})
        for line in answer.splitlines():
            if b'"error"' in line:
                raise EngineError(f"push of {repository}:{tag}: {line.decode()}")
        remove_image(api, f"{repository}:{tag}")
        return f"{repository}:{tag}"

    def write_docker_config(self, home: Path) -> None:
        """Give the user whose home this is the credentials, as `docker login` would."""
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        (home / ".docker").mkdir(exist_ok=True)
        (home / ".docker/config.json").write_text(json.dumps({"auths": {self.address: {"auth": token}}}))

    def _configuration(self) -> dict[str, object]:
        configuration: dict[str, object] = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(self.folder / "data")}, "delete": {"enabled": True}},
            "http": {"addr": self.address, "draintimeout": "10s"},
        }
        if self.user:
            import bcrypt  # which the scripts that run from nothing do without

            hashed = bcrypt.hashpw(self.password.encode(), bcrypt.gensalt(4))
            (self.folder / "htpasswd").write_bytes(self.user.encode() + b":" + hashed + b"\n")
            configuration["auth"] = {"htpasswd": {"realm": "tests", "path": str(self.folder / "htpasswd")}}
        return configuration


# Below those that the kernel gives away by itself, each process from a place of its own: who asks for a port binds it a
# moment later, and nobody else may get it meanwhile.
_PORTS = itertools.count(10_000 + os.getpid() * 97 % 20_000)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
