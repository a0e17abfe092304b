"""Several teams on one daemon: what each sees, that none waits for another's backlog, and what the operator sees of all."""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import shutil
import signal
import subprocess
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lightrun
from conftest import HELD, ROOT, Daemon, DaemonFactory, Receiver, Response, eventually
from engine import IMAGE

TOKENS = "all-seeing\nteam-a token-a\nteam-b token-b\n"
ALL, A, B = ({"Authorization": f"Bearer {token}"} for token in ("all-seeing", "token-a", "token-b"))
NDJSON = {"Accept": "application/x-ndjson"}
NOBODY = "00000000-0000-4000-8000-000000000000"
Headers = dict[str, str]


@pytest.fixture(scope="module")
def teams(module_daemon: DaemonFactory, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """A daemon of two teams; `run` and `detach` are those of who sees all."""
    return serve(module_daemon, tmp_path_factory.mktemp("tokens"), TOKENS)


def serve(daemon: DaemonFactory, folder: Path, tokens: str, *options: str) -> Daemon:
    (folder / "tokens").write_text(tokens)
    started = daemon("--token-file", str(folder / "tokens"), *options, socket=True)
    started.token = tokens.split()[0] if len(tokens.splitlines()[0].split()) == 1 else tokens.split()[1]
    return started


def post(daemon: Daemon, who: Headers, **fields: Any) -> Response:
    return daemon.request("POST", "/run", json={**daemon.fields, "entrypoint": "true", **fields}, headers=who)


def ids(daemon: Daemon, who: Headers, query: str = "") -> list[str]:
    response = daemon.request("GET", f"/runs?limit=1000{query}", headers=who)
    assert response.status == 200, response.text
    return [state["id"] for state in response.json()]


# ---------------------------------------------------------------- Labels


def test_labels_are_shown_and_found(teams: Daemon) -> None:
    labels = {"course": "cs101", "k8s.io/a-b_C.9": "x=y z", "empty": ""}
    state = post(teams, ALL, labels=labels).json()
    assert state["labels"] == labels
    run = state["id"]
    assert teams.state(run)["labels"] == labels
    for query in ("course=cs101", "k8s.io/a-b_C.9=x%3Dy+z", "empty="):
        assert ids(teams, ALL, f"&label={query}") == [run]
        assert ids(teams, ALL, f"&label={query}&status=succeeded") == [run]
        assert ids(teams, ALL, f"&label={query}&status=failed") == []
    for query in ("course=cs10", "course=", "none=cs101", "Course=cs101"):
        assert ids(teams, ALL, f"&label={query}") == []
    assert "labels" not in post(teams, ALL, labels={}).json()
    for bad in ("course", "=x", "a+b=c", "a%0A=b"):
        assert teams.request("GET", f"/runs?label={bad}", headers=ALL).status == 400


def test_labels_follow_a_run_through_its_states(teams: Daemon) -> None:
    run = post(teams, ALL, detached=True, entrypoint="sleep 60", labels={"job": "7"}).json()["id"]
    assert ids(teams, ALL, "&label=job=7&status=running") == [run]
    teams.request("POST", f"/runs/{run}/cancel", headers=ALL)
    teams.wait(run)
    assert (ids(teams, ALL, "&label=job=7&status=running"), ids(teams, ALL, "&label=job=7&status=cancelled")) == ([], [run])
    assert teams.request("DELETE", f"/runs/{run}", headers=ALL).status == 204
    assert ids(teams, ALL, "&label=job=7") == []


def test_pages_of_a_label(teams: Daemon) -> None:
    runs = [post(teams, ALL, image="lightrun/none:1", labels={"page": "x"}).json()["id"] for _ in range(5)]
    seen, path = [], "/runs?label=page=x&limit=2"
    while path:
        response = teams.request("GET", path, headers=ALL)
        seen += [state["id"] for state in response.json()]
        link = response.headers.get("Link", "")
        path = link[1 : link.index(">")] if link else ""
    assert seen == runs[::-1]


@pytest.mark.long
def test_a_list_by_label_costs_the_same_with_a_long_history(tmp_path: Path) -> None:
    """Counted by SQLite: what it does for a list does not grow with runs that are not in it."""
    store = lightrun.Store(tmp_path / "state")
    steps = []
    for number in range(2000):
        mine = number in {0, 1000, 1999}
        labels, owner = {"team": "mine" if mine else "theirs"}, "b" if mine else "a"
        run = lightrun.Run(f"{number:036d}", "image", float(number), False, labels=labels, owner=owner)
        store.add(run)
        run.reason, run.exit_code, run.finished = "exited", 0, float(number)
        store.finish(run, b"")
        if number in {1001, 1999}:
            done: list[int] = []
            store._reader.set_progress_handler(functools.partial(done.append, 1), 1)
            mine_alone = {"label": ("team", "mine")}
            queries: list[dict[str, Any]] = [mine_alone, {"owner": "b"}, {"owner": "b", **mine_alone}]
            for query in queries:
                for status in (None, "succeeded"):
                    found = store.heads(status, None, 2, **query)
                    assert [json.loads(head)["id"] for head in found][-1] == f"{0 if number == 1001 else 1000:036d}"
            store._reader.set_progress_handler(None, 1)
            steps.append(len(done))
    store.close()
    assert steps[1] < 1.1 * steps[0]


# ---------------------------------------------------------------- Whose runs


@pytest.fixture(scope="module")
def theirs(teams: Daemon) -> dict[str, str]:
    """Runs of team-a: one that has ended, with an artifact, and one that goes on."""
    ended = post(teams, A, entrypoint="echo secret > out", extract=["out"], labels={"of": "a"}).json()
    going = post(teams, A, detached=True, entrypoint="sleep 600", labels={"of": "a"}).json()
    teams.wait_for(going["id"], lambda state: state.get("phase") == "running")
    return {"ended": ended["id"], "going": going["id"]}


def paths() -> list[tuple[str, str]]:
    """Every route of a run."""
    return [(route.method, route.path) for route in lightrun.ROUTES if "<run_id>" in route.path]


@pytest.mark.parametrize("state", ["ended", "going"])
@pytest.mark.parametrize(("method", "path"), paths())
def test_another_teams_run_is_an_unknown_one(teams: Daemon, theirs: dict[str, str], method: str, path: str, state: str) -> None:
    def ask(run: str) -> tuple[int, bytes, str]:
        target = path.replace("<run_id>", run).replace("<path:path>", "out")
        body = {"entrypoint": "true"} if path.endswith("/exec") else None
        response = teams.request(method, target, json=body, headers=B)
        return response.status, response.body, response.headers.get("Content-Type", "")

    assert ask(theirs[state]) == ask(NOBODY)
    assert ask(theirs[state])[0] == 404
    own = teams.request("GET", f"/runs/{theirs[state]}", headers=A)
    assert (own.status, own.json()["status"]) == (200, "running" if state == "going" else "succeeded")


def test_lists_and_references_stop_at_ones_own(teams: Daemon, theirs: dict[str, str]) -> None:
    mine = post(teams, B, labels={"of": "a"}).json()["id"]
    assert {theirs["ended"], theirs["going"], mine} <= set(ids(teams, ALL))
    assert set(ids(teams, A)) & {mine, *theirs.values()} == set(theirs.values())
    assert set(ids(teams, B)) & {mine, *theirs.values()} == {mine}
    assert ids(teams, B, "&label=of=a") == [mine]
    assert ids(teams, B, "&label=of=a&status=running") == []
    assert ids(teams, A, "&label=of=a&status=running") == [theirs["going"]]
    other, none = (teams.request("GET", f"/runs?before={run}", headers=B) for run in (theirs["ended"], NOBODY))
    assert (other.status, other.body) == (400, none.body)
    for field in ({"files": {"x": {"artifact": f"{theirs['ended']}/out"}}}, {"stdin": {"artifact": f"{theirs['ended']}/out"}}):
        refused = post(teams, B, **field)
        assert refused.status == 400
        assert theirs["ended"] in refused.json()["details"][0]["message"]
        assert post(teams, A, **field, entrypoint=["true"]).status == 200
    assert post(teams, ALL, files={"x": {"artifact": f"{theirs['ended']}/out"}}).status == 200


def test_the_owner_is_told_to_those_who_see_all(teams: Daemon, theirs: dict[str, str], receiver: Receiver) -> None:
    run = theirs["ended"]
    assert teams.request("GET", f"/runs/{run}", headers=ALL).json()["owner"] == "team-a"
    assert "owner" not in teams.request("GET", f"/runs/{run}", headers=A).json()
    listed = {state["id"]: state for state in teams.request("GET", "/runs?limit=1000", headers=ALL).json()}
    assert (listed[run]["owner"], listed[theirs["going"]]["owner"]) == ("team-a", "team-a")
    assert all("owner" not in state for state in teams.request("GET", "/runs?limit=1000", headers=A).json())
    assert "owner" not in post(teams, ALL).json()
    body = {**teams.fields, "entrypoint": "true"}
    live = teams.request("POST", "/run", json=body, headers={**A, **NDJSON}).body.splitlines()
    assert "owner" not in json.loads(live[-1])["run"]
    post(teams, A, detached=True, callbackUrl=receiver.url, labels={"a": "b"})
    told = json.loads(receiver.wait(1)[0].body)
    assert (told["labels"], "owner" in told) == ({"a": "b"}, False)


def test_keys_are_of_one_name(teams: Daemon) -> None:
    body = {**teams.fields, "entrypoint": "true"}
    callers = [{**who, "Idempotency-Key": "same"} for who in (A, B, ALL, A)]
    runs = [teams.request("POST", "/run", json=body, headers=who).json()["id"] for who in callers]
    assert (len(set(runs)), runs[0]) == (3, runs[3])


def test_owners_and_labels_survive_kill_9(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS)
    run = post(own, A, detached=True, entrypoint="sleep 1", labels={"a": "b"}).json()["id"]
    own.kill()
    own.start()
    assert own.request("GET", f"/runs/{run}", headers=B).status == 404
    state = own.wait(run)
    assert (state["owner"], state["labels"], state["status"]) == ("team-a", {"a": "b"}, "succeeded")
    assert ids(own, A, "&label=a=b&status=succeeded") == [run]


# ---------------------------------------------------------------- Places


def starts(daemon: Daemon, runs: dict[str, str]) -> str:
    """The teams of runs by the order of their starts."""
    states = {run: daemon.wait(run, 120) for run in runs}
    return "".join(runs[run] for run in sorted(states, key=lambda run: str(states[run]["startedAt"])))


class Work:
    """Places whose jobs run until they are told to end."""

    def __init__(self, most: int) -> None:
        self.places, self._ends = lightrun.Places(most, 100, self._execute), threading.Semaphore(0)
        self.begun: list[str] = []

    def _execute(self, job: Any) -> None:
        self.begun.append(job.run.owner)
        assert self._ends.acquire(timeout=20)

    def add(self, owners: str) -> list[Any]:
        """One job of each of these owners."""
        runs = [types.SimpleNamespace(owner=owner) for owner in owners]
        jobs: list[Any] = [types.SimpleNamespace(run=run, begun=False, asked=None) for run in runs]
        for job in jobs:
            self.places.take(job.run.owner)
            self.places.enqueue(job)
        return jobs

    def end(self) -> str:
        """Let all end, and tell in which order they began."""
        self._ends.release(100)
        assert eventually(lambda: not self.places.taken())
        assert self.places.queued() == 0
        return "".join(self.begun)


def test_names_take_turns() -> None:
    work = Work(1)
    work.add("aaaaabbcb")
    assert work.end() == "aabcababa"


def test_a_name_that_may_not_run_more_is_passed_over() -> None:
    work = Work(3)
    work.places.limit([lightrun.Token("x", "a", (1, 2)), lightrun.Token("y", "b", (2, None))])
    work.add("aaabb")
    with pytest.raises(lightrun.Unavailable, match="2 runs of a may wait"):
        work.places.take("a")
    assert eventually(lambda: sorted(work.begun) == ["a", "b", "b"])
    assert work.places.queued() == 2
    work.places.limit([])
    assert work.end()[3:] == "aa"


def test_a_job_that_only_has_to_end_needs_no_place() -> None:
    work = Work(1)
    jobs = work.add("abc")
    jobs[2].asked = lightrun.Ask("cancelled")
    for _ in range(2):
        work.places.hire()
    assert eventually(lambda: sorted(work.begun) == ["a", "c"])
    assert (work.places.queued(), work.places.taken()) == (1, 3)
    assert work.end()[2:] == "b"


def test_a_job_waits_on_while_there_is_no_thread_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(1)

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", fail)
        work.add("aab")[2].begun = True
        work.places.hire()
    assert (work.begun, work.places.queued(), work.places.taken()) == ([], 3, 3)
    work.places.hire()
    assert work.end() == "baa"


@pytest.mark.long
def test_no_backlog_holds_up_another_team(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS, "--max-concurrent", "1", "--queue", "100")
    gate = post(own, ALL, detached=True, entrypoint="sleep 2").json()["id"]
    runs = {post(own, A, detached=True).json()["id"]: "a" for _ in range(10)}
    runs |= {post(own, B, detached=True).json()["id"]: "b" for _ in range(4)}
    assert own.state(gate)["status"] == "running", "the backlog was not there in time"
    order = starts(own, runs)
    assert order == "ab" * 4 + "a" * 6


@pytest.mark.long
def test_two_backlogs_of_200(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS, "--max-concurrent", "2", "--queue", "500")
    gates = [post(own, ALL, detached=True, entrypoint="sleep 8").json()["id"] for _ in range(2)]
    runs = {post(own, A, detached=True).json()["id"]: "a" for _ in range(200)}
    runs |= {post(own, B, detached=True).json()["id"]: "b" for _ in range(200)}
    assert all(own.state(gate)["status"] == "running" for gate in gates)
    order = starts(own, runs)
    assert all(abs(order[:count].count("a") - count / 2) <= 3 for count in range(1, 400))


def test_limits_of_a_team(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, "all-seeing\nteam-a token-a max=1 queue=2\nteam-b token-b\n", "--max-concurrent", "3")
    long = {"detached": True, "entrypoint": "sleep 60"}
    runs = [post(own, A, **long) for _ in range(4)]
    assert [answer.status for answer in runs] == [202, 202, 202, 503]
    assert (runs[3].json()["error"], "team-a" in runs[3].json()["message"]) == ("busy", True)
    mine = [answer.json()["id"] for answer in runs[:3]]
    assert eventually(lambda: own.state(mine[0]).get("phase") == "running")
    other = post(own, B, **long).json()["id"]
    assert eventually(lambda: own.state(other).get("phase") == "running")
    assert [own.state(run).get("phase") for run in mine] == ["running", "queued", "queued"]
    own.request("POST", f"/runs/{mine[1]}/cancel", headers=A)
    assert eventually(lambda: post(own, A, **long).status == 202)
    (tmp_path / "tokens").write_text("all-seeing\nteam-a token-a max=2 queue=9\n")
    own.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: own.state(mine[2]).get("phase") == "running")
    assert own.request("GET", "/runs", headers=B).status == 401
    for run in ids(own, ALL, "&status=running"):
        own.request("POST", f"/runs/{run}/cancel", headers=ALL)


def test_a_queue_of_0_takes_what_starts_at_once(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, "all-seeing\nteam-a token-a queue=0\n", "--max-concurrent", "2")
    first, second, third = (post(own, A, detached=True, entrypoint="sleep 60") for _ in range(3))
    assert (first.status, second.status, third.status) == (202, 202, 503)
    for run in (first, second):
        own.wait_for(run.json()["id"], lambda state: state.get("phase") == "running")
    for run in (first, second):
        own.request("POST", f"/runs/{run.json()['id']}/cancel", headers=A)


# ---------------------------------------------------------------- SIGHUP


def is_let_in(daemon: Daemon, who: Headers) -> bool:
    return daemon.request("GET", "/runs", headers=who).status == 200


def test_rotation_under_load_drops_nothing(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS)
    waiting = own.open("POST", "/run", {**own.fields, "entrypoint": HELD}, headers=A)
    stop, statuses = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(own.request("GET", "/runs?limit=1", headers=ALL).status)

    with ThreadPoolExecutor(4) as pool:
        going = [pool.submit(ask) for _ in range(3)]
        try:
            held = pool.submit(waiting.__enter__)
            for number in range(20):
                (tmp_path / "tokens").write_text(f"all-seeing\nteam-a token-a\nteam-a fresh-{number}\n")
                own.process.send_signal(signal.SIGHUP)
                fresh = {"Authorization": f"Bearer fresh-{number}"}
                assert eventually(functools.partial(is_let_in, own, fresh))
            (tmp_path / "tokens").write_text("team-a secret max=many\n")
            own.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: "line 1" in own.log())
            assert own.request("GET", "/runs", headers=ALL).status == 200  # the old ones stay
        finally:
            stop.set()
        run = ids(own, A, "&status=running")[0]
        own.request("POST", f"/runs/{run}/cancel", headers=A)
        assert held.result().status == 200
        waiting.__exit__(None, None, None)
        for each in going:
            each.result()
    assert set(statuses) == {200}
    assert "secret" not in own.log()


# ---------------------------------------------------------------- Metrics


def figures(daemon: Daemon, who: Headers) -> dict[str, float]:
    response = daemon.request("GET", "/metrics", headers=who)
    assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics(daemon: DaemonFactory, tmp_path: Path, receiver: Receiver) -> None:
    own = serve(daemon, tmp_path, TOKENS, "--warm", f"{IMAGE}=1/none", "--keep", "3")
    before = figures(own, ALL)
    assert before["lightrun_engine_up"] == 1
    assert before[f'lightrun_build_info{{version="{lightrun.__version__}"}}'] == 1
    post(own, A, entrypoint="exit 3")
    post(own, A, entrypoint="sleep 60", timeout=100)
    run = post(own, A, detached=True, entrypoint="sleep 600", callbackUrl=receiver.url).json()["id"]
    own.wait_for(run, lambda state: state.get("phase") == "running")
    assert own.request("POST", f"/runs/{run}/exec", json={"entrypoint": "true"}, headers=A).status == 200
    during = figures(own, ALL)
    assert during['lightrun_runs{phase="running"}'] == 1
    assert during["lightrun_places_taken"] >= 1
    own.request("POST", f"/runs/{run}/cancel", headers=A)
    receiver.wait(1)
    own.request("GET", f"/runs/{run}", headers={"Authorization": "Bearer wrong"})
    own.request("GET", f"/no/such/{run}", headers=ALL)
    assert eventually(lambda: figures(own, ALL).get('lightrun_callback_attempts_total{outcome="delivered"}') == 1)
    after = figures(own, ALL)
    for reason in ("exited", "timeout", "cancelled"):
        assert after[f'lightrun_runs_total{{reason="{reason}"}}'] == 1
    assert after['lightrun_execs_total{reason="exited"}'] == 1
    assert after['lightrun_run_phase_seconds_count{phase="run"}'] == 3
    assert after['lightrun_run_phase_seconds_bucket{phase="run",le="+Inf"}'] == 3
    assert after['lightrun_requests_total{route="POST /run",status="200"}'] == 2
    assert after['lightrun_requests_total{route="none",status="401"}'] == 1
    assert after['lightrun_requests_total{route="none",status="404"}'] == 1
    assert after["lightrun_stored_runs"] == 3
    assert after["lightrun_callbacks_owed"] == 0
    assert sum(value for name, value in after.items() if name.startswith("lightrun_warm_starts_total")) >= 3
    assert 10e6 < after["process_resident_memory_bytes"] < 1e9
    assert after["process_threads"] > 10
    assert after["process_open_fds"] > 5
    assert not re.search(rf"{run}|team-a|{IMAGE}", own.request("GET", "/metrics", headers=ALL).text)
    for who, status in ((A, 403), ({}, 401)):
        assert own.request("GET", "/metrics", headers=who).status == status
    post(own, A)
    assert eventually(lambda: figures(own, ALL)["lightrun_evictions_total"] >= 1)


def test_readme_lists_them() -> None:
    told = set(re.findall(r"`((?:lightrun|process)_\w+)", (ROOT / "README.md").read_text("utf-8")))
    assert set(lightrun.METRICS) <= told


def test_the_alerts_are_of_metrics_that_are_there(tmp_path: Path) -> None:
    [rules] = re.findall(r"```yaml\n(groups:\n.*?)```\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "rules.yml").write_text(rules)
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    named = set(re.findall(r"\b((?:lightrun|process)_\w+)", rules))
    assert {re.sub("_(bucket|count)$", "", name) for name in named} <= set(lightrun.METRICS)


def test_promtool_has_nothing_to_say(teams: Daemon) -> None:
    post(teams, ALL)
    text = teams.request("GET", "/metrics", headers=ALL).body
    assert shutil.which("promtool"), "promtool is missing: Debian's prometheus has it"
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    names = set(re.findall(rb"(?m)^# TYPE (\S+) ", text))
    assert names == {name.encode() for name in lightrun.METRICS}


def test_an_absent_engine_shows(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = daemon("--docker-host", f"unix://{tmp_path}/none", socket=True)
    assert eventually(lambda: figures(own, {})["lightrun_engine_up"] == 0)
    assert figures(own, {})['lightrun_engine_errors_total{kind="absent"}'] > 0


# ---------------------------------------------------------------- The log


def logged(daemon: Daemon, **fields: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if fields.items() <= line.items()]


def test_the_log_has_fields(daemon: DaemonFactory, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS, "--log-format", "json")
    state = post(own, A, labels={"a": "b"}, entrypoint="exit 3").json()
    run = state["id"]
    assert eventually(lambda: len(logged(own, run=run)) == 2 and logged(own, path="/run"))
    (accepted, ended) = logged(own, run=run)
    told = {"image": IMAGE, "owner": "team-a", "labels": {"a": "b"}}
    assert {**told, "remote": "localhost", "level": "info"}.items() <= accepted.items()
    assert {**told, "reason": "exited", "exitCode": 3, "status": "failed"}.items() <= ended.items()
    assert {"durationMs", "timings"} <= ended.keys()
    (request,) = logged(own, path="/run")
    assert {"method": "POST", "status": 200, "remote": "localhost"}.items() <= request.items()
    assert request["ms"] >= 0
    own.request("GET", "/runs", headers={"Authorization": "Bearer wrong"})
    assert eventually(lambda: logged(own, path="/runs", status=401, remote="localhost", method="GET"))


def test_the_access_log_can_be_off(daemon: DaemonFactory) -> None:
    own = daemon("--access-log", "off", "--log-format", "json")
    run = own.run(entrypoint="true")["id"]
    assert eventually(lambda: len(logged(own, run=run)) == 2)
    assert logged(own, path="/run") == []


@pytest.mark.parametrize(
    ("trusted", "forwarded", "remote"),
    [
        ((), "1.2.3.4", "127.0.0.1"), (("127.0.0.1",), "1.2.3.4", "1.2.3.4"), (("127.0.0.1",), None, "127.0.0.1"),
        (("127.0.0.0/8",), "9.9.9.9, 1.2.3.4", "1.2.3.4"), (("127.0.0.1", "10.0.0.0/8"), "1.2.3.4, 10.1.1.1", "1.2.3.4"),
        (("127.0.0.1", "10.0.0.0/8"), "10.2.2.2, 10.1.1.1", "10.2.2.2"), (("127.0.0.1",), "1.2.3.4, nonsense", "127.0.0.1"),
        (("127.0.0.1",), "2001:DB8::1", "2001:db8::1"), (("10.0.0.1",), "1.2.3.4", "127.0.0.1"),
        (("127.0.0.1",), "", "127.0.0.1"),
    ],
)  # fmt: skip
def test_who_asks(trusted: tuple[str, ...], forwarded: str | None, remote: str) -> None:
    environ = {"REMOTE_ADDR": "127.0.0.1", **({} if forwarded is None else {"HTTP_X_FORWARDED_FOR": forwarded})}
    assert lightrun.remote(environ, trusted) == remote
    on_socket = {**environ, "REMOTE_ADDR": "localhost"}
    assert lightrun.remote(on_socket, ()) == "localhost"
    if trusted == ("127.0.0.1",):
        assert lightrun.remote(on_socket, ("unix", *trusted)) == remote.replace("127.0.0.1", "localhost")


def test_a_proxy_is_known_on_an_ipv6_socket_too() -> None:
    """There an IPv4 address is written as one of IPv6."""
    environ = {"REMOTE_ADDR": "::ffff:10.0.0.1", "HTTP_X_FORWARDED_FOR": "1.2.3.4"}
    assert lightrun.remote(environ, ("10.0.0.1",)) == "1.2.3.4"
    assert lightrun.remote(environ, ("10.0.0.2",)) == "10.0.0.1"


HOPS = st.ip_addresses().map(str) | st.sampled_from(["10.0.0.1", "127.0.0.1", "::ffff:10.0.0.1", "::1", "localhost", "x", ""])


@given(
    HOPS.filter(bool), st.none() | st.lists(HOPS, max_size=5),
    st.lists(st.sampled_from(["unix", "10.0.0.0/8", "127.0.0.1", "0.0.0.0/0", "::/0"])),
)  # fmt: skip
@example("0.0.0.0", ["::ffff:10.0.0.1"], ["0.0.0.0/0"])
def test_the_remote_is_who_asks_or_one_that_a_proxy_has_named(address: str, hops: list[str] | None, trusted: list[str]) -> None:
    environ = {"REMOTE_ADDR": address, **({} if hops is None else {"HTTP_X_FORWARDED_FOR": " , ".join(hops)})}
    remote, own = lightrun.remote(environ, trusted), address.removeprefix("::ffff:")
    named = [ipaddress.ip_address(hop) for hop in hops or [] if hop not in {"localhost", "x", ""}]
    named = [getattr(hop, "ipv4_mapped", None) or hop for hop in named]
    assert remote == own or ipaddress.ip_address(remote) in named
    assert trusted or remote == own


def test_a_trusted_proxy_is_not_the_remote(daemon: DaemonFactory) -> None:
    own = daemon("--trust-proxy", "127.0.0.1", "--log-format", "json")
    own.request("GET", "/runs", headers={"X-Forwarded-For": "6.6.6.6, 1.2.3.4"})
    assert eventually(lambda: logged(own, remote="1.2.3.4", path="/runs"))


# ---------------------------------------------------------------- Callbacks that failed


def test_a_failed_callback_is_sent_again(daemon: DaemonFactory, receiver: Receiver, tmp_path: Path) -> None:
    own = serve(daemon, tmp_path, TOKENS)
    receiver.default = type(receiver.default)(400)  # which is final
    run = post(own, A, detached=True, callbackUrl=receiver.url, callbackSecret="s" * 16).json()["id"]
    assert eventually(lambda: own.state(run).get("callback", {}).get("status") == "failed")
    assert [ids(own, who, "&callback=failed") for who in (ALL, A, B)] == [[run], [run], []]
    own.kill()
    own.start()
    receiver.default = type(receiver.default)()
    assert own.request("POST", f"/runs/{run}/callback", headers=B).status == 404
    assert own.request("POST", f"/runs/{run}/callback", headers=A).status == 204
    assert eventually(lambda: own.state(run)["callback"] == {"status": "delivered", "attempts": 1})
    first, second = receiver.requests
    assert first.body == second.body
    assert first.headers["X-Light-Run-Signature"] == second.headers["X-Light-Run-Signature"]
    assert ids(own, ALL, "&callback=failed") == []
    for run_id in (run, post(own, A).json()["id"]):
        refused = own.request("POST", f"/runs/{run_id}/callback", headers=A)
        assert (refused.status, refused.json()["error"]) == (409, "no_callback")
    assert own.request("POST", f"/runs/{NOBODY}/callback", headers=ALL).status == 404
    assert not list((own.state_dir / "secrets").glob("*.callback"))
    assert own.request("GET", "/runs?callback=x", headers=ALL).status == 400


def test_a_failed_callback_goes_with_its_run(daemon: DaemonFactory, receiver: Receiver) -> None:
    own = daemon(socket=True)
    receiver.default = type(receiver.default)(400)
    run = own.detach(entrypoint="true", callbackUrl=receiver.url)
    assert eventually(lambda: own.state(run).get("callback", {}).get("status") == "failed")
    assert list((own.state_dir / "secrets").glob("*.callback"))
    assert own.request("DELETE", f"/runs/{run}").status == 204
    assert not list((own.state_dir / "secrets").glob("*.callback"))
    going = own.detach(entrypoint="sleep 60", callbackUrl=receiver.url)
    refused = own.request("POST", f"/runs/{going}/callback")
    assert (refused.status, refused.json()["error"]) == (409, "running")
    own.request("POST", f"/runs/{going}/cancel")
