"""Write `lightrun.pyz`: the daemon and everything it imports in one file that any CPython 3.10 to 3.14 runs.

`python3 build_zipapp.py` needs nothing beside Python but pip, and PyPI once: the wheels that pyproject.toml locks are
kept in `.cache/wheels`, and the next build works offline. Two builds of one commit are the same bytes, whatever the
Python, the zlib, the umask and the clock: names are sorted, dates, modes and the system field are fixed, and nothing is
compressed, since deflate's output differs between zlib and its replacements.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TARGET = ROOT / "lightrun.pyz"
CACHE = ROOT / ".cache/wheels"
SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = b"""\
import sys

if sys.version_info < (3, 10):
    sys.exit("lightrun needs Python 3.10 or newer, and this is " + sys.version.split()[0])

if sys.argv[1:] == ["--version"]:  # a zip keeps no compiled module, and compiling it takes longer than the answer
    print("lightrun @VERSION@")
    sys.exit(0)

try:
    from lightrun import main

    sys.exit(main())
except KeyboardInterrupt:  # before anything was begun
    sys.exit(130)
"""
# What `import lightrun` finds first in the zip: zipimport compiles a module twice (once to learn its name), and keeps nothing.
LOADER = b"""import importlib.util
import linecache
import marshal
import os
import sys
import types

_SOURCE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "lightrun.py")
_NAME = "lightrun.pyz/lightrun.py"  # in tracebacks


def _source():
    return __loader__.get_data(_SOURCE).decode()


def _compiled():
    return compile(_source(), _NAME, "exec", dont_inherit=True)


def _ours(about):
    return about.st_uid == os.geteuid() and not about.st_mode & 0o022


def _code():
    cache = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and os.path.expanduser("~/.cache")) or ""
    ending = f".{sys.implementation.cache_tag}.opt{sys.flags.optimize}.pyc"
    if not os.path.isabs(cache):
        return _compiled()
    path = os.path.join(cache, "lightrun", "@DIGEST@" + ending)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if _ours(os.fstat(file.fileno())) and file.read(4) == importlib.util.MAGIC_NUMBER:
                size, data = int.from_bytes(file.read(8), "big"), file.read()
                code = marshal.loads(data) if len(data) == size else None
                if isinstance(code, types.CodeType):
                    return code
    except (OSError, ValueError, EOFError, TypeError):
        pass
    code = _compiled()
    if not sys.dont_write_bytecode:
        _keep(code, cache, path, ending)
    return code


def _keep(code, cache, path, ending):
    data, folder = marshal.dumps(code), os.path.dirname(path)
    temporary = path + "." + str(os.getpid())
    try:
        for parent, made in ((os.path.dirname(cache), cache), (cache, folder)):
            if not _ours(os.stat(parent)):
                return  # somebody else's home
            if not os.path.lexists(made):
                os.mkdir(made, 0o700)
        if not _ours(os.lstat(folder)):
            return
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(importlib.util.MAGIC_NUMBER + len(data).to_bytes(8, "big") + data)
        os.replace(temporary, path)
        for name in os.listdir(folder):  # of other builds
            if name.endswith(ending) and os.path.join(folder, name) != path:
                os.unlink(os.path.join(folder, name))
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass


linecache.cache[_NAME] = (_source,)
exec(_code(), globals())
"""
# MS-DOS time, the zip format's clock, begins here.
EPOCH = (1980, 1, 1, 0, 0, 0)
UNIX = 3
FILE_MODE = 0o100644
COMPILED = (".so", ".pyd", ".dylib", ".dll")
PIP_SECONDS = 600


class BuildError(Exception):
    """The build cannot go on; the text says why in one line."""


def locked_wheels(pyproject: str) -> dict[str, str]:
    """Map the SHA-256 of each wheel that pyproject.toml locks to its requirement, such as `idna==3.20`.

    Read with a pattern because Python 3.10 has no TOML parser, and one way for all Pythons is one result.
    """
    table = re.search(r"^\[tool\.lightrun\]$.*?^wheels = '''\n(.*?)^'''$", pyproject, re.DOTALL | re.MULTILINE)
    lines = table[1].splitlines() if table else []
    locked = [re.fullmatch(r"(\S+==\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines]
    if not locked or None in locked:
        raise BuildError("pyproject.toml: [tool.lightrun] wheels must hold lines like name==1.0 --hash=sha256:…")
    return {match[2]: match[1] for match in locked if match}


def fetch_wheels(locked: dict[str, str]) -> list[Path]:
    """Return the locked wheels' files, in the lock's order, downloading those that the cache lacks."""
    CACHE.mkdir(parents=True, exist_ok=True)
    missing = {digest: requirement for digest, requirement in locked.items() if digest not in _cached()}
    if missing:
        _download(missing)
    cached = _cached()
    return [cached[digest] for digest in locked]


def _cached() -> dict[str, Path]:
    """The cache's wheels by what they hold, never by their name: a damaged file is as good as none."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in CACHE.glob("*.whl")}


def _download(locked: dict[str, str]) -> None:
    """Have pip download wheels, and pip check their hashes; move them into the cache when all are there."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for digest, name in locked.items()))
        pip = [_python_with_pip(Path(folder)), "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
        pure = ["--only-binary=:all:", "--implementation=py", "--abi=none", "--platform=any"]
        _run([*pip, *pure, "-d", folder, "-r", str(requirements)])
        for wheel in Path(folder).glob("*.whl"):
            wheel.replace(CACHE / wheel.name)


def _python_with_pip(folder: Path) -> str:
    """A Python that has pip: this one, else one in a throw-away virtual environment, else Debian's, as root."""
    if importlib.util.find_spec("pip"):
        return sys.executable
    if importlib.util.find_spec("ensurepip"):
        venv.create(folder / "venv", with_pip=True)
        return str(folder / "venv/bin/python")
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BuildError("this Python has no pip: install it (on Debian or Ubuntu: apt-get install python3-pip)")
    _run(["apt-get", "update", "-qq"])
    _run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", "python3-pip"])
    return "/usr/bin/python3"


def _run(command: list[str]) -> None:
    """Run a program; its last line about an error becomes ours."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PIP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-1:] or ["no message"]
        program = "pip download" if "pip" in command else command[0]
        raise BuildError(f"{program} failed (is the package registry reachable?): {errors[0]}")


def wheel_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what an import needs of a wheel, and its licence texts and METADATA, which must travel with the code.

    Left out: scripts, entry points and the installer's lists. Raises BuildError for a compiled extension.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            top, _, rest = name.partition("/")
            if name.endswith(COMPILED):
                raise BuildError(f"{wheel.name} holds the compiled file {name}")
            if name.endswith("/") or top.endswith(".data"):
                continue
            if top.endswith(".dist-info") and not re.match(r"METADATA$|licenses/|LICENSE|NOTICE", rest):
                continue
            yield name, archive.read(name)


def archive_bytes(files: dict[str, bytes]) -> bytes:
    """The zip application that holds `files`, path → content: a function of its argument alone."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(name, EPOCH)
            member.create_system = UNIX
            member.external_attr = FILE_MODE << 16
            archive.writestr(member, files[name])
    return buffer.getvalue()


def write_executable(target: Path, content: bytes) -> None:
    """Put `content` in place in one step: a daemon that starts meanwhile never sees half of the file."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def build() -> Path:
    """Write the zip application and return its path. Raises BuildError or OSError."""
    files = {name: (ROOT / name).read_bytes() for name in ("lightrun.py", "LICENSE")}
    version = re.search(rb'^__version__ = "(.+)"$', files["lightrun.py"], re.MULTILINE)
    if version is None:
        raise BuildError("lightrun.py does not say its __version__")
    files["__main__.py"] = MAIN.replace(b"@VERSION@", version[1])
    digest = hashlib.sha256(files["lightrun.py"]).hexdigest()
    files["lightrun/__init__.py"] = LOADER.replace(b"@DIGEST@", digest.encode())
    for wheel in fetch_wheels(locked_wheels((ROOT / "pyproject.toml").read_text("utf-8"))):
        for name, content in wheel_files(wheel):
            if files.setdefault(name, content) != content:
                raise BuildError(f"{wheel.name}: another file is called {name} too")
    write_executable(TARGET, archive_bytes(files))
    return TARGET


def main() -> int:
    """Build, and say what was built."""
    try:
        target = build()
    except (BuildError, OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
        print(f"build_zipapp.py: {error}", file=sys.stderr)
        return 1
    print(f"{target} {target.stat().st_size:,} bytes, sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
