"""Other engines than the machine's, by name, and a smoke of lightrun on each.

    python3 tests/matrix.py docker-26.1 podman-5.4    # the smoke on these
    python3 tests/matrix.py --all --write             # on all of them, and the README's table
    python3 tests/matrix.py docker-26.1 --suite -x    # pytest with DOCKER_HOST at it
    python3 tests/matrix.py --python 3.10 sid         # the smoke with other Pythons

An engine is Debian's package in a root made by debootstrap, which is kept below `~/.cache/lightrun-engines` (`--fresh` makes it
anew). It runs with mount, process and network namespaces of its own over that root, which it does not change; its API is
a Unix socket outside, and when it is taken down nothing is left. What runs is the built `lightrun.pyz`. Needs root and Debian.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine import EngineApi, EngineError, PrivateEngine, ensure_image, install_missing
from smoke import COUNT, Lightrun, smoke

ROOT = Path(__file__).resolve().parent.parent
README, PYZ = ROOT / "README.md", ROOT / "lightrun.pyz"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightrun-engines"
PACKAGES = (
    "aardvark-dns", "ca-certificates", "catatonit", "dbus-user-session", "docker.io", "fuse-overlayfs", "iproute2", "iptables",
    "netavark", "nftables", "podman", "procps", "python3", "rootlesskit", "runc", "slirp4netns", "uidmap",
)  # fmt: skip
TOOLS = {"busybox-static": "busybox", "debootstrap": "debootstrap", "iproute2": "ip", "tini": "docker-init"}
PYTHONS_ENGINE = "docker-26.1"  # on which Pythons are tried
USER = 1000  # of rootless engines
# Debian's crun refuses hybrid cgroups, and there is no systemd to ask for slices or to log to.
CONTAINERS_CONF = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
[engine.runtimes]
runc = ["{}/runc"]
"""
# Old Podman asks for more files and processes than even root may have on a machine that keeps CAP_SYS_RESOURCE from it.
RUNC = """\
#!/bin/sh
for each; do
    test -f "$each/config.json" && each=$each/config.json
    grep -qs -e '"RLIMIT_' -- "$each" || continue
    sed -i 's/"RLIMIT_NOFILE","hard":1048576,"soft":1048576/"RLIMIT_NOFILE","hard":{0},"soft":{0}/
        s/"RLIMIT_NPROC","hard":1048576,"soft":1048576/"RLIMIT_NPROC","hard":{1},"soft":{1}/' "$each"
done
exec /usr/bin/runc "$@"
"""


@dataclasses.dataclass(frozen=True)
class Kind:
    """An engine that can be had: Debian's suite, the program, its options, and whether it runs without root."""

    suite: str
    program: str
    options: tuple[str, ...] = ()
    rootless: bool = False


KINDS = {
    "docker-20.10": Kind("bookworm", "docker"),
    "docker-26.1": Kind("trixie", "docker"),
    "docker-sid": Kind("sid", "docker", ("--feature", "containerd-snapshotter=false")),
    "docker-sid-containerd": Kind("sid", "docker", ("--feature", "containerd-snapshotter=true")),
    "docker-26.1-rootless": Kind("trixie", "docker", rootless=True),
    "podman-4.3": Kind("bookworm", "podman"),
    "podman-5.4": Kind("trixie", "podman"),
    "podman-sid": Kind("sid", "podman"),
    "podman-5.4-rootless": Kind("trixie", "podman", rootless=True),
}


def debian_root(suite: str, fresh: bool = False) -> Path:
    """A Debian of that suite with every engine's packages, made once. Raises EngineError."""
    root, stamp = CACHE / suite, CACHE / f"{suite}.packages"
    wanted = " ".join(PACKAGES)
    if fresh:
        stamp.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
    if stamp.exists() and stamp.read_text() == wanted:
        return root
    shutil.rmtree(root, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"debootstrap {suite} …", file=sys.stderr, flush=True)
    with (CACHE / f"{suite}.log").open("wb") as log:
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root)]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode != 0:
            raise EngineError(f"debootstrap {suite} failed; see {log.name}")
    stamp.write_text(wanted)
    return root


class HousedEngine(PrivateEngine):
    """An engine of another Debian. Its root is an overlay that goes with it; `folder` is seen under the same path on both
    sides."""

    def __init__(self, kind: Kind, fresh: bool = False) -> None:
        root = debian_root(kind.suite, fresh)
        super().__init__(*kind.options)
        self.kind, self._lower = kind, root
        for name in ("root", "upper", "work", "data", "home"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        for name in ("home", "data"):
            os.chown(self.folder / name, USER, USER) if kind.rootless else None
        (self.folder / "containers.conf").write_text(CONTAINERS_CONF.format(self.folder))
        limits = [resource.getrlimit(each)[1] for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)]
        most = [1048576 if limit == resource.RLIM_INFINITY else min(limit, 1048576) for limit in limits]
        (self.folder / "runc").write_text(RUNC.format(*most))
        (self.folder / "runc").chmod(0o755)

    def _preparation(self) -> str:
        root, here = f"{self.folder}/root", str(self.folder)
        layers = f"lowerdir={self._lower},upperdir={here}/upper,workdir={here}/work"
        steps = [
            f"mount -t overlay overlay -o {layers} {root}",
            f"mkdir -p {root}{here}",
            f"mount --bind {here} {root}{here}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs tmpfs {root}/run",
            f"cd {root}",
            "mkdir old",
            "pivot_root . old",
            "umount -l /old",
            "mount --make-rprivate /",
        ]
        if self.kind.rootless:
            steps += [
                f"useradd --uid {USER} --no-create-home --home-dir {here}/home engine",
                f"mkdir -p /run/user/{USER}",
                f"chown {USER}:{USER} /run/user/{USER} {here}",
            ]
        return " && ".join(steps)

    def _command(self) -> list[str]:
        here = str(self.folder)
        if self.kind.program == "podman":
            own = [] if self.kind.rootless else ["--root", f"{here}/data", "--runroot", "/run/containers"]
            command = ["podman", *own, *self.options, "system", "service", "--time=0", self.host]
        elif self.kind.rootless:
            command = ["dockerd-rootless.sh", "--data-root", f"{here}/data", "--host", self.host, *self.options]
        else:
            command = [*super()._command()]
        environment = [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/share/docker.io/contrib",
            f"CONTAINERS_CONF={here}/containers.conf", f"TMPDIR={here}",
            f"HOME={here}/home", *([f"XDG_RUNTIME_DIR=/run/user/{USER}"] if self.kind.rootless else []),
        ]  # fmt: skip
        drop = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if self.kind.rootless else []
        return [*drop, "env", "--chdir=/", *environment, *command]

    def beside(self, *more: str) -> list[str]:
        """What to put before a command that is to see the engine's processes, as one beside it on its machine would; `more`
        is nsenter's."""
        seen = ["nsenter", "-t", str(self._init_pid()), "--pid", *more, "unshare", "--mount-proc"]
        return [*seen, "setpriv", "--pdeathsig", "KILL"]

    def close(self) -> None:
        """Take it down, with the cgroups that its containers leave behind."""
        with contextlib.suppress(EngineError):
            for entry in json.loads(self.api.call("GET", "/containers/json?all=1")):
                self.api.request("DELETE", f"/containers/{entry['Id']}?force=1&v=1")
        super().close()

    def _remove_cgroups(self) -> None:
        super()._remove_cgroups()
        for group in sorted(Path("/sys/fs/cgroup").glob("*/libpod_parent/**/"), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one smoke: what was smoked, under what circumstances, and what failed of it, by name."""

    name: str
    about: tuple[str, ...]
    failed: dict[str, str]
    refused: str = ""

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        total = COUNT
        passed = "none" if self.refused else f"{total - len(self.failed)} of {total}"
        missing = self.refused or "; ".join(self.failed) or "nothing"
        return [self.name, *self.about, passed, missing.replace("|", "\\|"), f"{datetime.date.today()}"]


ENGINE_HEAD = ("engine", "version", "storage, cgroup", "checks passed", "can't be had", "date")
PYTHON_HEAD = ("Python", "version", "engine", "checks passed", "can't be had", "date")


def describe(api: EngineApi) -> tuple[str, str]:
    """An engine's exact version, and its storage driver and cgroup version."""
    version, about = json.loads(api.call("GET", "/version")), json.loads(api.call("GET", "/info"))
    names = [each["Name"] for each in version.get("Components") or [{"Name": "Engine"}]]
    maker = "Podman" if any("Podman" in name for name in names) else "Docker"
    return f"{maker} {version['Version']}", f"{about.get('Driver')}, v{about.get('CgroupVersion', '1')}"


def smoke_engine(name: str, fresh: bool) -> Row:
    """Bring an engine up, smoke it and take it down."""
    try:
        engine = HousedEngine(KINDS[name], fresh)
        with engine:
            return smoked(name, describe(engine.api), engine.host, [*engine.beside(), sys.executable])
    except EngineError as error:
        return Row(name, ("none", "none"), {}, f"does not start here: {last_words(str(error))}")


def last_words(text: str) -> str:
    """The last line of a log that says something, in short."""
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1] if lines else text)[-200:]


def smoked(name: str, about: tuple[str, ...], host: str, python: Sequence[str]) -> Row:
    """The smoke's row, and one line for each check that failed."""
    ensure_image(EngineApi(host))
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        try:
            failed = smoke(lambda *options: Lightrun(python, PYZ, host, Path(folder), options), EngineApi(host))
        except AssertionError as error:
            return Row(name, about, {}, f"lightrun does not start: {last_words(str(error))}")
    for check, why in failed.items():
        print(f"{name}: {check}: {why}", file=sys.stderr, flush=True)
    return Row(name, about, failed)


def suite(name: str, fresh: bool, arguments: Sequence[str]) -> int:
    """pytest with DOCKER_HOST at an engine, beside it in its network, where no PyPI is; its exit code."""
    engine = HousedEngine(KINDS[name], fresh)
    with engine:
        environment = {**os.environ, "DOCKER_HOST": engine.host}
        command = [*engine.beside("--net"), str(ROOT / ".venv/bin/python"), "-m", "pytest", *arguments]
        command += ["--deselect", "tests/test_zipapp.py::test_pip_install_gives_the_command"]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


# ---------------------------------------------------------------- Pythons


@contextlib.contextmanager
def python_command(version: str) -> Iterator[list[str]]:
    """How to run a Python: pyenv's of that version, or that of a Debian suite, in its root, which then sees /tmp and /run."""
    if re.fullmatch(r"[\d.]+", version):
        root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
        found = sorted(root.glob(f"{version}.*/bin/python3")) + sorted(root.glob(f"{version}/bin/python3"))
        if not found:
            raise EngineError(f"there is no Python {version} below {root}")
        yield [str(found[-1])]
        return
    root = debian_root(version)
    seen = " && ".join(f"mount --rbind {each} {root}{each}" for each in ("/dev", "/proc", "/sys", "/tmp", "/run"))
    shell = f'mount --make-rprivate / && {seen} && exec chroot {root} python3 "$@"'
    yield ["unshare", "--mount", "sh", "-c", shell, "sh"]


def smoke_python(version: str, engine: HousedEngine) -> Row:
    """The smoke with that Python."""
    try:
        with python_command(version) as command:
            told = subprocess.run([*command, "-c", "import sys; print(sys.version.split()[0])"], capture_output=True, text=True)
            about = (f"CPython {told.stdout.strip()}", describe(engine.api)[0])
            return smoked(version, about, engine.host, [*engine.beside(), *command])
    except EngineError as error:
        return Row(version, ("none", "none"), {}, str(error))


def smoke_pythons(versions: Sequence[str], fresh: bool) -> list[Row]:
    """The smoke with each, on one engine."""
    if not versions:
        return []
    engine = HousedEngine(KINDS[PYTHONS_ENGINE], fresh)
    with engine:
        return [smoke_python(version, engine) for version in versions]


# ---------------------------------------------------------------- The table


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(marker: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Put rows into the README between two comments; rows of the same name are replaced, the others stay."""
    text = README.read_text()
    before, first, rest = text.partition(f"<!-- {marker} -->\n")
    old, last, after = rest.partition(f"<!-- /{marker} -->\n")
    if not first or not last:
        raise EngineError(f"{README} has no comments <!-- {marker} --> and <!-- /{marker} -->")
    kept = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in old.splitlines()[2:]]
    merged = {row[0]: row for row in [*kept, *map(list, rows)]}
    order = [*KINDS, *sorted(merged.keys() - KINDS.keys(), key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [99])]
    body = table(head, [merged[name] for name in order if name in merged])
    README.write_text(f"{before}{first}{body}{last}{after}")


def main(arguments: Sequence[str]) -> int:
    """Smoke what is named, and print the tables; 1 when something failed."""
    parser = argparse.ArgumentParser(description="lightrun on other engines and Pythons")
    parser.add_argument("names", nargs="*", metavar="NAME", help="an engine; --list says which there are")
    parser.add_argument("--all", action="store_true", help="every engine")
    parser.add_argument("--list", action="store_true", help="print the names, and end")
    parser.add_argument("--fresh", action="store_true", help="make the engines' roots anew")
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    parser.add_argument("--python", nargs="+", default=[], metavar="VERSION", help="pyenv's, such as 3.10, or a Debian suite's")
    parser.add_argument("--suite", nargs=argparse.REMAINDER, help="run pytest instead, with these arguments")
    options = parser.parse_args(arguments)
    names: list[str] = list(KINDS) if options.all else options.names
    if options.list:
        print("\n".join(KINDS))
        return 0
    if unknown := set(names) - set(KINDS):
        parser.error(f"no engine is called {', '.join(sorted(unknown))}; --list says what there is")
    if os.geteuid() != 0:
        parser.error("namespaces and debootstrap need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        install_missing(TOOLS, "the engines need more programs")
        subprocess.run([sys.executable, ROOT / "build_zipapp.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        if options.suite is not None:
            return max(suite(name, options.fresh, options.suite) for name in names)
        engines = [smoke_engine(name, options.fresh) for name in names]
        pythons = smoke_pythons(options.python, options.fresh)
        for marker, head, rows in (("engines", ENGINE_HEAD, engines), ("pythons", PYTHON_HEAD, pythons)):
            if rows:
                print(table(head, [row.cells for row in rows]), flush=True)
                if options.write:
                    write(marker, head, [row.cells for row in rows])
        return int(any(row.failed or row.refused for row in [*engines, *pythons]))
    except EngineError as error:
        print(f"tests/matrix.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
