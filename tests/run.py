"""Run the tests from nothing: `python3 tests/run.py [pytest arguments]`.

Brings up an engine, keeps a virtual environment in `.venv` with the tools that `tests/requirements.txt` locks, builds
`lightrun.pyz`, and returns pytest's exit code. It needs Python with pip and venv, and says what is missing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from engine import EngineError, install, install_missing
from engine import main as bring_up_engine

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "tests/requirements.txt"
PYTHON = VENV / "bin/python"
# Debian package → the program that tests call.
PACKAGES = {
    "binutils": "as",
    "binutils-aarch64-linux-gnu": "aarch64-linux-gnu-as",
    "busybox-static": "busybox",
    "curl": "curl",
    "docker-registry": "docker-registry",
    "faketime": "faketime",
    "haproxy": "haproxy",
    "iproute2": "ip",
    "jq": "jq",
    "prometheus": "promtool",
    "runsc": "runsc",
    "util-linux": "unshare",
}


def ensure_venv() -> None:
    """Make `.venv` for this Python and this lock, anew when either changed; the stamp is written last."""
    stamp = VENV / "lightrun-lock"
    wanted = hashlib.sha256(LOCK.read_bytes() + f"{sys.version} {sys.base_prefix}".encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    _create_venv()
    pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--require-hashes", "-r", str(LOCK)]).returncode != 0:
        raise EngineError("pip could not install tests/requirements.txt; its message is above")
    stamp.write_text(wanted)


def _create_venv() -> None:
    """Debian splits venv's half off its Python, and names the package after the version."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        install(["python3-venv", "python3-pip"], "Python's venv module has no ensurepip")
    try:
        venv.create(VENV, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError(f"cannot make the virtual environment {VENV}: {error}") from error


def main(arguments: list[str]) -> int:
    """Prepare everything, then hand over to pytest."""
    code = bring_up_engine()
    if code != 0:
        return code
    try:
        install_missing(PACKAGES, "the tests need more programs")
        ensure_venv()
    except EngineError as error:
        print(f"tests/run.py: {error}", file=sys.stderr)
        return 1
    code = subprocess.run([PYTHON, ROOT / "build_zipapp.py"], cwd=ROOT).returncode
    if code != 0:
        return code
    sys.stdout.flush()
    return subprocess.run([PYTHON, "-m", "pytest", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
