"""The linter and the type checker, set up in pyproject.toml, have nothing to say about any Python file."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import ROOT

CHECKED = ("lightrun.py", "build_zipapp.py", "tests")


@pytest.mark.timeout(600)  # mypy takes its time on a machine that has no cache yet
@pytest.mark.parametrize(
    "tool", [("ruff", "check", "--quiet"), ("mypy", "--no-error-summary")], ids=lambda tool: tool[0]
)
def test_style(tool: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *tool, *CHECKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
