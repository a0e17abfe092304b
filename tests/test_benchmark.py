"""The short form of tests/benchmark.py, for its table and to see that it works. No absolute time is judged:
other tests run beside it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import docker
import pytest

import benchmark
from conftest import ROOT

HEAVY = {"exec", "memory", "many_runs", "own_cost", "runs", "stored", "tar", "throughput", "upload", "warm"}  # for the long form


@pytest.mark.long
@pytest.mark.timeout(480)
def test_short_form_measures_everything(engine: docker.APIClient, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = set(benchmark.MEASUREMENTS) - HEAVY
    command = [sys.executable, str(ROOT / "tests/benchmark.py"), "--short", "--json", str(file), "--only", *sorted(names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=450)
        finally:
            process.terminate()  # it takes its daemons and containers with it
    print(output)  # CI keeps it
    assert process.returncode == 0, errors
    measured = json.loads(file.read_text("utf-8"))["measurements"]
    assert set(measured) == names
    for name, rows in measured.items():
        assert rows, name
        assert all(f"| {row['what']} |" in output for row in rows), name


def test_pairs_are_compared_one_by_one() -> None:
    row = benchmark.compare("run", [2.0, 20.0, 9.0], "bare calls", [1.0, 10.0, 3.0], bar="≤ 3")
    assert (row.value, row.baseline, row.ratio) == (9.0, 3.0, 2.0)
    assert benchmark.lines([row]) == "| run | 9 ms | bare calls | 3 ms | 2.00 | ≤ 3 |"


def test_every_round_begins_with_another_call() -> None:
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = benchmark.in_turn(3, {name: functools.partial(call, name) for name in "abc"})
    assert "".join(order) == "abcbcacab"
    assert measured == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
