"""The zip application: the same bytes from every build, one file that runs everywhere, clear words when it fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import build_zipapp
from conftest import ROOT, DaemonFactory
from lightrun import __version__

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SOURCES = ("LICENSE", "build_zipapp.py", "lightrun.py", "pyproject.toml")
UMASKS = (0o000, 0o022, 0o077)
EPOCH = 1_000_000_000
PIP_SECONDS = 300


@pytest.fixture(params=[*VERSIONS[::4], *(pytest.param(each, marks=pytest.mark.long) for each in VERSIONS[1:4])])
def python(request: pytest.FixtureRequest) -> str:
    """Each CPython that lightrun supports and this machine has."""
    version: str = request.param
    installed = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for candidate in (sys.executable, shutil.which(f"python{version}"), *map(str, installed)):
        if candidate and _version_of(candidate) == version:
            return candidate
    pytest.skip(f"no CPython {version} on this machine")


def _version_of(python: str) -> str:
    """Ask it: a pyenv shim has a name and may still refuse to run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def pyz(built: Path) -> Path:
    """The zip application as it is, which the daemons run here."""
    return built


@pytest.fixture
def checkout(pyz: Path, tmp_path: Path) -> Path:
    """A copy of the sources, made long ago, with the wheels that building `pyz` has left in the cache."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
        os.utime(folder / name, (EPOCH, EPOCH))
    shutil.copytree(build_zipapp.CACHE, folder / ".cache/wheels")
    return folder


def _build(checkout: Path, python: str = sys.executable, umask: int = 0o022, **env: str) -> tuple[int, str]:
    """Run the build; return its exit code and what it wrote to standard error."""
    command = [python, "-W", "error", "build_zipapp.py"]
    done = subprocess.run(command, cwd=checkout, env={**os.environ, **env}, umask=umask, capture_output=True, text=True)
    return done.returncode, done.stderr


# ---------------------------------------------------------------- One file, the same bytes, everywhere


def test_every_python_and_umask_builds_the_same_bytes(pyz: Path, checkout: Path, python: str) -> None:
    for umask in UMASKS:
        assert _build(checkout, python, umask) == (0, "")
        assert (checkout / "lightrun.pyz").read_bytes() == pyz.read_bytes()
        assert (checkout / "lightrun.pyz").stat().st_mode & 0o777 == 0o755


def test_version_and_help_on_every_python(pyz: Path, python: str) -> None:
    for option, expected in (("--version", __version__), ("--help", "serve")):
        done = subprocess.run([python, "-W", "error", pyz, option], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_a_run_on_every_python(daemon: DaemonFactory, python: str) -> None:
    lightrun = daemon(python=python)
    state = lightrun.run(entrypoint="echo hello")
    assert (state["status"], state["logs"]) == ("succeeded", ["hello"])
    assert lightrun.stop() == 0
    assert list(lightrun.temporary.iterdir()) == []


def test_is_a_program_that_keeps_the_exit_code_of_main(pyz: Path) -> None:
    done = subprocess.run([pyz, "serve", "--no-such-option"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""


def test_an_older_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10"):
        exec(build_zipapp.MAIN, {})


# ---------------------------------------------------------------- What is in it


def test_members_are_sorted_dated_and_plain(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        members = archive.infolist()
        assert archive.read("lightrun.py") == (ROOT / "lightrun.py").read_bytes()
    names = [member.filename for member in members]
    assert names == sorted(set(names))
    assert {member.date_time for member in members} == {build_zipapp.EPOCH}
    assert {(member.create_system, member.external_attr >> 16, member.compress_type) for member in members} == {
        (build_zipapp.UNIX, build_zipapp.FILE_MODE, zipfile.ZIP_STORED)
    }


def test_holds_nothing_compiled_and_every_licence(pyz: Path) -> None:
    names = zipfile.ZipFile(pyz).namelist()
    assert not [name for name in names if name.endswith((*build_zipapp.COMPILED, ".pyc"))]
    assert "LICENSE" in names
    packages = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert len(packages) == len(build_zipapp.locked_wheels((ROOT / "pyproject.toml").read_text()))
    for package in packages:
        assert [name for name in names if re.match(rf"{re.escape(package)}/(licenses/)?LICENSE", name)], package


def test_the_locks_agree() -> None:
    """The command, the zip application and the tests run the same versions."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    zipped = set(build_zipapp.locked_wheels(pyproject).values())
    dependencies = re.search(r"^dependencies = \[(.*)\]$", pyproject, re.MULTILINE)
    assert dependencies
    assert set(re.findall(r'"(.+?)"', dependencies[1])) <= zipped
    assert zipped <= set(re.findall(r"^(\S+==\S+)", (ROOT / "tests/requirements.txt").read_text(), re.MULTILINE))


# ---------------------------------------------------------------- Building it


def test_the_second_build_is_offline(checkout: Path) -> None:
    assert _build(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS="") == (0, "")


def test_no_registry_is_one_line(checkout: Path) -> None:
    shutil.rmtree(checkout / ".cache")
    _assert_one_line(_build(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=""), "pip download failed")


def test_a_wheel_with_another_hash_is_refused(checkout: Path) -> None:
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(re.sub(r"(idna==\S+ --hash=sha256:)\S+", r"\g<1>" + "0" * 64, pyproject.read_text()))
    wheels = str(build_zipapp.CACHE)
    _assert_one_line(_build(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels), "pip download failed")
    assert not (checkout / "lightrun.pyz").exists()


def test_a_damaged_cache_is_repaired(pyz: Path, checkout: Path) -> None:
    next((checkout / ".cache/wheels").glob("idna*")).write_bytes(b"cut off")
    assert _build(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(build_zipapp.CACHE)) == (0, "")
    assert (checkout / "lightrun.pyz").read_bytes() == pyz.read_bytes()


def test_a_missing_source_is_one_line(checkout: Path) -> None:
    (checkout / "LICENSE").unlink()
    _assert_one_line(_build(checkout), "LICENSE")


def _assert_one_line(outcome: tuple[int, str], expected: str) -> None:
    code, message = outcome
    assert code == 1
    assert message.count("\n") == 1
    assert expected in message


def test_a_compiled_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "fast-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fast/_speedups.so", b"\x7fELF")
    with pytest.raises(build_zipapp.BuildError, match=r"fast/_speedups\.so"):
        list(build_zipapp.wheel_files(wheel))


@pytest.mark.parametrize(
    "pyproject",
    [
        "",
        "[tool.lightrun]\n",
        "[tool.lightrun]\nwheels = '''\n'''\n",
        "[tool.lightrun]\nwheels = '''\nidna==3.20\n'''\n",
    ],
)
def test_a_lock_without_hashes_is_refused(pyproject: str) -> None:
    with pytest.raises(build_zipapp.BuildError, match="sha256"):
        build_zipapp.locked_wheels(pyproject)


# ---------------------------------------------------------------- The command


@pytest.mark.long
@pytest.mark.timeout(PIP_SECONDS)
def test_pip_install_gives_the_command(tmp_path: Path) -> None:
    source, environment = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in (*SOURCES, "README.md"):
        shutil.copy(ROOT / name, source)
    venv.create(environment)
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        environment / "bin/python",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-compile",
        source,
    ]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([environment / "bin/lightrun", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
