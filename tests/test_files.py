"""Files as people have them, on a real engine: a tar in, parts of a form, artifacts of other runs; names for what is kept;
and whose all of it is, in images of any user and with folders of any kind."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Daemon, DaemonFactory, Response, eventually, longer
from engine import EngineApi, find_busybox, root_filesystem
from images import remove_image
from test_uploads import member, tar

BOUNDARY = "lightrun"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
MIB = 1 << 20


def form(run: dict[str, Any], parts: dict[str, bytes], boundary: str = BOUNDARY) -> bytes:
    """The body of a form with these parts."""
    every = {"run": json.dumps(run).encode(), **parts}
    return (
        b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n"
            for name, content in every.items()
        )
        + f"--{boundary}--\r\n".encode()
    )


def send(daemon: Daemon, parts: dict[str, bytes], headers: dict[str, str] | None = None, **fields: Any) -> Response:
    """POST a run with an upload."""
    body = form({**daemon.fields, **fields}, parts)
    return daemon.request("POST", "/run", body=body, headers={**FORM, **(headers or {})}, timeout=120)


def run(daemon: Daemon, parts: dict[str, bytes], **fields: Any) -> Any:
    """The same, to its end."""
    response = send(daemon, parts, **fields)
    assert response.status == 200, response.body
    return response.json()


def problems(response: Response) -> str:
    """What a 400 says."""
    assert response.status == 400, response.body
    return json.dumps(response.json()["details"])


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory) -> Daemon:
    """One daemon for all that spoils nothing."""
    return module_daemon("--body-limit", "64m")


# ---------------------------------------------------------------- A tar in


def test_a_tar_and_parts_stand_in_the_workdir_as_they_were(lightrun: Daemon) -> None:
    content = tar(
        member("./", kind=tarfile.DIRTYPE, mode=0o750), member("./a", b"A", mode=0o640),
        member("./d", kind=tarfile.DIRTYPE, mode=0o500), member("./d/tool", b"#!/bin/sh\necho tool\n", mode=0o755),
        member("./empty", kind=tarfile.DIRTYPE, mode=0o711),
        member("./d/link", kind=tarfile.SYMTYPE, target="../a"), member("./hard", kind=tarfile.LNKTYPE, target="./a", mode=0o640),
        member("./b\udcff\n", b"odd"),
    )  # fmt: skip
    script = """stat -c '%n %a %u:%g %Y %F' . a d d/tool empty d/link hard b*; readlink d/link; stat -c %h a; cat hard; d/tool
                stat -c '%a %n' part sub sub/other; cat part sub/other json"""
    state = run(lightrun, {"tar": content, "part": b"P", "sub/other": b"O"}, files={"json": "J"}, entrypoint=script)
    kinds = {"directory": "1600000000 directory", "file": "1600000000 regular file", "link": "1600000000 symbolic link"}
    assert state["logs"] == [
        f". 750 0:0 {kinds['directory']}", f"a 640 0:0 {kinds['file']}", f"d 500 0:0 {kinds['directory']}",
        f"d/tool 755 0:0 {kinds['file']}", f"empty 711 0:0 {kinds['directory']}", f"d/link 777 0:0 {kinds['link']}",
        f"hard 640 0:0 {kinds['file']}", "b\ufffd", f" 644 0:0 {kinds['file']}", "../a", "2", "Atool", "755 part", "755 sub",
        "755 sub/other", "POJ",
    ], state  # fmt: skip


@pytest.mark.parametrize("name", [b"b\xff", b"d\xff/\xfe"])
def test_a_name_that_is_not_utf_8_goes_into_a_folder_of_the_image(lightrun: Daemon, name: bytes) -> None:
    """The engine is asked what the image has at that name."""
    state = run(lightrun, {"tar": tar(member(os.fsdecode(name), b"odd"))}, workdir="/tmp", entrypoint="cat [bd]* [bd]*/*")
    assert (state["reason"], "odd" in state["logs"]) == ("exited", True), state


def test_what_no_run_can_have_is_a_400_and_no_run(lightrun: Daemon) -> None:
    before = len(lightrun.request("GET", "/runs?limit=1000").json())
    assert "../x" in problems(send(lightrun, {"tar": tar(member("../x"))}, entrypoint="true"))
    assert "unpacked" in problems(send(lightrun, {"tar": b"\x1f\x8b\x08" + bytes(600)}, entrypoint="true"))
    assert "not a folder" in problems(send(lightrun, {"tar": tar(member("a/b")), "a": b""}, entrypoint="true"))
    assert "twice" in problems(send(lightrun, {"tar": tar(member("a")), "a": b""}, entrypoint="true"))
    assert "imag" in problems(send(lightrun, {"tar": tar()}, imag="x"))
    assert "no part named run" in problems(lightrun.request("POST", "/run", body=b"--lightrun--\r\n", headers=FORM))
    assert lightrun.request("POST", "/run", body=b"x", headers={"Content-Type": "text/plain"}).status == 415
    assert len(lightrun.request("GET", "/runs?limit=1000").json()) == before
    assert not [path for path in (lightrun.state_dir / "secrets").iterdir() if "upload" in path.name]


def test_a_form_of_a_web_page_is_refused(lightrun: Daemon) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert send(lightrun, {}, headers, entrypoint="true").status == 403


@pytest.mark.parametrize("kind", ["detached", "waiting"])
def test_a_key_and_the_same_parts_are_the_same_run(lightrun: Daemon, kind: str) -> None:
    """Whatever the boundary."""
    fields = {**lightrun.fields, "entrypoint": "cat f g; date +%N", "detached": kind == "detached"}
    ids = set()
    for boundary, content in (("one", b"x"), ("two", b"x")):
        body = form(fields, {"f": content, "tar": tar(member("g", b"y"))}, boundary)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Idempotency-Key": f"k-{kind}"}
        ids.add(lightrun.request("POST", "/run", body=body, headers=headers).json()["id"])
    assert len(ids) == 1
    other = send(lightrun, {"f": b"z"}, {"Idempotency-Key": f"k-{kind}"}, entrypoint="cat f")
    assert (other.status, other.json()["error"]) == (409, "conflict")
    assert lightrun.wait(ids.pop())["logs"][0].startswith("xy")


@pytest.mark.long
def test_an_upload_outlives_the_daemon_until_its_run_has_started(daemon: DaemonFactory) -> None:
    """kill -9 while it waits for its place: the run is started from what was kept, once, and nothing of it stays."""
    lightrun = daemon("--max-concurrent", "1", "--body-limit", "64m")
    first = lightrun.detach(entrypoint="sleep 3")
    big = os.urandom(3 * MIB)
    waiting = [
        send(
            lightrun, {"tar": tar(member("big", content)), "small": b"s"}, entrypoint="sha256sum big small", detached=True
        ).json()["id"]
        for content in (big, b"tiny")
    ]
    secrets = lightrun.state_dir / "secrets"
    assert {f"{each}.upload" for each in waiting} <= {path.name for path in secrets.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o600}
    (secrets / "upload-left-by-a-kill").write_bytes(b"x")
    lightrun.kill()
    lightrun.start()
    for each, content in zip(waiting, (big, b"tiny"), strict=True):
        state = lightrun.wait(each, 60)
        assert state["logs"] == [f"{hashlib.sha256(content).hexdigest()}  big", f"{hashlib.sha256(b's').hexdigest()}  small"]
    lightrun.wait(first)
    assert eventually(lambda: not list(secrets.iterdir()))


def test_a_large_tar_leaves_the_memory_as_it_was(daemon: DaemonFactory, tmp_path: Path) -> None:
    """200 MB in one file and in many, sent by curl as people send it."""
    lightrun = daemon("--body-limit", "1g", "--memory", "1g")
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "big").open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(MIB))
    process = psutil.Process(lightrun.pid)
    send(lightrun, {"tar": tar(member("a", b"x"))}, entrypoint="true")
    before, peak, done = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        request = json.dumps({**lightrun.fields, "entrypoint": "stat -c %s big", "memory": "1g"})
        command = f"tar -c . | curl -sS -F 'run={request}' -F tar=@- {lightrun.url}/run"
        state = json.loads(subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=True).stdout)
    finally:
        done.set()
        watcher.join()
    assert state["logs"] == [str(200 * MIB)], state
    assert peak[0] - before < 24 * MIB
    lightrun.stop()


@pytest.mark.long
def test_an_upload_is_counted_by_the_caps(daemon: DaemonFactory) -> None:
    """What ended is evicted to make room for what is to start."""
    lightrun = daemon("--max-artifacts-bytes", "2m", "--max-concurrent", "1")
    old = lightrun.run(entrypoint="head -c 1000000 /dev/zero > f", extract=["f"])["id"]
    busy = lightrun.detach(entrypoint="sleep 2")
    response = send(lightrun, {"x": b"x" * (3 * MIB // 2)}, entrypoint="stat -c %s x", detached=True)
    assert response.status == 202
    assert lightrun.request("GET", f"/runs/{old}").status == 404
    assert lightrun.wait(response.json()["id"])["logs"] == [str(3 * MIB // 2)]
    lightrun.wait(busy)


# ---------------------------------------------------------------- Any tree


def random_tree(root: Path, chance: random.Random, files: int, text: bool) -> None:
    """Files, folders, links and empty folders of odd names and modes."""
    root.mkdir()
    folders, made = [root], list[Path]()
    letters, noise = "aé ß\n'\"$*;%日🙂-.", [*range(1, 47), *range(48, 256)]
    for number in range(files):
        odd = "".join(chance.choices(letters, k=chance.randint(1, 12))).encode()
        odd = odd if text else bytes(chance.choices(noise, k=chance.randint(1, 20)))
        path = chance.choice(folders) / os.fsdecode(odd + b"%d" % number)
        kind = chance.random()
        if kind < 0.15 and len(path.relative_to(root).parts) < 8:
            path.mkdir()
            folders.append(path)
        elif kind < 0.22 and made:
            path.symlink_to(os.path.relpath(chance.choice(made), path.parent))
        elif kind < 0.28 and made:
            path.hardlink_to(chance.choice(made))
        else:
            path.write_bytes(chance.randbytes(chance.choice([0, 1, 511, 512, 513, 3000])))
            path.chmod(chance.choice([0o644, 0o600, 0o755, 0o711, 0o444]))
            os.utime(path, (1, chance.randint(1, 1 << 31)))
            made.append(path)


TOLD = """find . ! -name . -print0 | LC_ALL=C sort -z | md5sum; find . -type l | wc -l; find . -type d | wc -l
find . -type f -exec stat -c '%a %Y %h' {} + | LC_ALL=C sort | md5sum
find . -type f -exec md5sum {} + | cut -c1-32 | sort | md5sum
find . -type l -exec readlink {} \\; | LC_ALL=C sort | md5sum"""


@pytest.mark.parametrize(("seed", "files", "text"), [(1, 60, True), (2, 60, False), (3, 400, True)])
def test_any_tree_goes_in_and_comes_out(lightrun: Daemon, tmp_path: Path, seed: int, files: int, text: bool) -> None:
    folder = tmp_path / "in"
    random_tree(folder, random.Random(seed), files, text)
    packed = subprocess.run(["tar", "-c", "."], cwd=folder, capture_output=True, check=True).stdout
    expected = subprocess.run(["busybox", "sh", "-c", TOLD], cwd=folder, capture_output=True, check=True).stdout.decode()
    state = run(lightrun, {"tar": packed}, entrypoint=TOLD, extract=[{"from": ".", "to": "out"}])
    assert "\n".join(state["logs"]) == expected.strip(), state
    plain = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    if not text:
        return  # names that are not UTF-8 are skipped, by contract
    kept = {entry["path"]: entry for entry in state["artifacts"]}
    assert {path for path, entry in kept.items() if entry["type"] == "file"} == {
        f"out/{path.relative_to(folder)}" for path in plain
    }
    response = lightrun.request("GET", f"/runs/{state['id']}/artifacts", headers={"Accept": "application/x-tar"})
    with tarfile.open(fileobj=io.BytesIO(response.body)) as archive:
        out = {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}  # type: ignore[union-attr]
    for path in plain:
        entry = kept[f"out/{path.relative_to(folder)}"]
        assert out[entry["path"]] == path.read_bytes()
        assert entry.get("mode") == (f"{path.stat().st_mode & 0o777:o}" if path.stat().st_mode & 0o111 else None)


@pytest.mark.long
def test_five_thousand_files_go_in_and_come_out(lightrun: Daemon, tmp_path: Path) -> None:
    test_any_tree_goes_in_and_comes_out(lightrun, tmp_path, 4, 5000, True)


# ---------------------------------------------------------------- By reference


@pytest.fixture(scope="module")
def source(lightrun: Daemon) -> str:
    """A run that has kept a program, a text and a folder."""
    script = """mkdir -p out/sub; printf '#!/bin/sh\\necho built $1' > out/tool; chmod 755 out/tool
        printf in > out/sub/f; printf t > out/text"""
    return str(lightrun.run(entrypoint=script, extract=["out"])["id"])


def test_what_a_run_has_kept_goes_into_others(lightrun: Daemon, source: str) -> None:
    named = {"bin/t": "tool", "s": "sub", "all": ""}
    state = lightrun.run(
        files={"x": "y", **{path: {"artifact": f"{source}/{name}"} for path, name in named.items()}},
        stdin={"artifact": f"{source}/text"},
        entrypoint="cat; bin/t 1; all/tool 2; cat s/f all/sub/f x; stat -c %a bin/t all/text s",
    )
    assert "".join(state["logs"]) == "tbuilt 1built 2ininy755644755", state
    state = run(lightrun, {"tar": tar(member("z", b"z"))}, files={"t": {"artifact": f"{source}/tool"}}, entrypoint="./t 3; cat z")
    assert state["logs"] == ["built 3", "z"]


def test_a_reference_to_nothing_is_a_400(lightrun: Daemon, source: str) -> None:
    running = lightrun.detach(entrypoint="sleep 2; echo > f", extract=["f"])
    for name in (f"{source}/nothing", "0e2b3c4d-0000-4000-8000-000000000001/x", f"{running}/f"):
        response = lightrun.request("POST", "/run", json={**lightrun.fields, "files": {"x": {"artifact": name}}})
        assert name in problems(response)
    lightrun.wait(running)


def test_what_is_referred_to_cannot_go_before_the_start(daemon: DaemonFactory) -> None:
    """Neither by DELETE nor by eviction, nor over a kill -9; afterwards it can."""
    lightrun = daemon("--max-concurrent", "1", "--keep", "2")
    source = lightrun.run(entrypoint="echo kept > f", extract=["f"])["id"]
    busy = lightrun.detach(entrypoint="sleep 4")
    fields = {"entrypoint": "cat f -", "files": {"f": {"artifact": f"{source}/f"}}, "stdin": {"artifact": f"{source}/f"}}
    waiting = lightrun.detach(**fields)
    for again in (False, True):
        response = lightrun.request("DELETE", f"/runs/{source}")
        assert (response.status, response.json()["error"]) == (409, "in_use"), again
        if not again:
            lightrun.kill()
            lightrun.start()
    assert lightrun.wait(waiting, 60)["logs"] == ["kept", "kept"]
    lightrun.wait(busy)
    assert eventually(lambda: lightrun.request("DELETE", f"/runs/{source}").status in {204, 404})


@pytest.mark.long
def test_eviction_passes_over_what_is_referred_to(daemon: DaemonFactory) -> None:
    lightrun = daemon("--max-concurrent", "2", "--keep", "1")
    source = lightrun.run(entrypoint="echo kept > f", extract=["f"])["id"]
    for _ in range(2):
        lightrun.detach(entrypoint="sleep 3")
    waiting = lightrun.detach(entrypoint="cat f", files={"f": {"artifact": f"{source}/f"}})
    assert lightrun.wait(waiting, 60)["logs"] == ["kept"]
    assert eventually(lambda: not lightrun.request("GET", "/runs?status=running").json())
    assert eventually(lambda: lightrun.request("GET", f"/runs/{source}").status == 404)


# ---------------------------------------------------------------- Extract under a name


def test_names_keep_folders_apart(lightrun: Daemon) -> None:
    state = lightrun.run(
        entrypoint="mkdir -p a b/sub; echo A > a/f; echo B > b/f; echo C > b/sub/g; chmod 755 b/f; echo > taken",
        extract=[{"from": "a", "to": "one"}, {"from": "b", "to": "deep/two"}, {"from": "a/f", "to": "deep/file.txt"}, "taken",
                 {"from": "a", "to": "deep/two/sub"}, {"from": "a/f", "to": "taken/x"}, {"from": "no", "to": "no"},
                 {"from": "a/f", "to": "deep/two/more"}, {"from": "b", "to": "deep"}],
    )  # fmt: skip
    fates = [(entry["from"], entry["status"]) for entry in state["extracted"]]
    assert fates == [
        ("a", "ok"), ("b", "ok"), ("a/f", "ok"), ("taken", "ok"), ("a", "error"), ("a/f", "error"), ("no", "missing"),
        ("a/f", "ok"), ("b", "error"),
    ]  # fmt: skip
    assert "deep/two/sub" in state["extracted"][4]["message"]
    assert {entry["path"]: entry.get("mode") for entry in state["artifacts"] if entry["type"] == "file"} == {
        "deep/file.txt": None, "deep/two/f": "755", "deep/two/more": None, "deep/two/sub/g": None, "one/f": None, "taken": None,
    }  # fmt: skip
    assert [entry["path"] for entry in state["artifacts"] if entry["type"] == "directory"] == [
        "deep",
        "deep/two",
        "deep/two/sub",
        "one",
    ]
    listed = lightrun.request("GET", f"/runs/{state['id']}/artifacts/deep").json()
    assert [entry["path"] for entry in listed] == ["deep/file.txt", "deep/two"]


@pytest.mark.parametrize("to", ["", "/x", "../x", "a/../b", "a//b", "a\\b", "x" * 256, "a/" * 40 + "b", 5, None])
def test_a_name_is_checked(lightrun: Daemon, to: Any) -> None:
    response = lightrun.request("POST", "/run", json={**lightrun.fields, "extract": [{"from": "a", "to": to}]})
    assert '"extract", 0, "to"' in problems(response)


# ---------------------------------------------------------------- Whose it is


def build(api: EngineApi, name: str, *instructions: str) -> str:
    """An image of busybox with folders of several owners, and users in its files."""
    buffer = io.BytesIO(root_filesystem(find_busybox()[0]))
    out = io.BytesIO()
    with tarfile.open(fileobj=buffer) as base, tarfile.open(fileobj=out, mode="w") as archive:
        for each in base:
            if each.name.removeprefix("./") not in {"etc/passwd", "etc/group"}:
                archive.addfile(each, base.extractfile(each) if each.isreg() else None)
        for path, owner, mode in (("srv/own", 1000, 0o700), ("srv/root", 0, 0o755), ("home/maker/.ssh", 1001, 0o700)):
            info, _ = member(path, kind=tarfile.DIRTYPE, mode=mode)
            info.uid = info.gid = owner
            archive.addfile(info)
        for path, content in (("etc/passwd", "root:x:0:0::/root:/bin/sh\nmaker:x:1001:1002::/home/maker:/bin/sh\n"),
                              ("etc/group", "root:x:0:\nstaff:x:50:\n"), ("srv/root/file", "of the image\n")):  # fmt: skip
            archive.addfile(member(path, content.encode())[0], io.BytesIO(content.encode()))
        for path, target in (("srv/link", "own"), ("srv/root/dangling", "/no/where"), ("srv/root/in", "/srv/own"),
                             ("srv/root/linked.txt", "file")):  # fmt: skip
            archive.addfile(member(path, kind=tarfile.SYMTYPE, target=target)[0])
    api.import_image(out.getvalue(), name, list(instructions))
    return name


USERS = {"": "0:0", "1000": "1000:0", "1000:50": "1000:50", "maker": "1001:1002", "maker:staff": "1001:50", "4242": "4242:0"}


@pytest.fixture(scope="module")
def owned_images(engine_api: EngineApi) -> Iterator[dict[str, str]]:
    """Images by user."""
    images = {}
    for number, user in enumerate(USERS):
        instructions = ["VOLUME /vol", *([f"USER {user}"] if user else [])]
        images[user] = build(engine_api, f"lightrun/test-owner{number}:{os.getpid()}", *instructions)
    yield images
    for image in images.values():
        remove_image(engine_api, image)


@pytest.mark.parametrize("user", ["", "1000:50", *longer("1000", "maker", "maker:staff", "4242")])
def test_what_lightrun_makes_is_the_users_and_what_the_image_has_stays(
    lightrun: Daemon, owned_images: dict[str, str], user: str
) -> None:
    image, owner = owned_images[user], USERS[user]
    show = "stat -c '%n %a %u:%g'"
    script = f"""{show} . d d/f g; {show} /srv /srv/own /srv/root /home/maker/.ssh /vol; id -u
        echo more >> d/f && echo > new; ls | wc -l"""
    parts = {"tar": tar(member("g", b"", mode=0o640))}
    state = run(lightrun, parts, image=image, files={"d/f": ""}, entrypoint=script)
    assert state["logs"] == [
        f". 755 {owner}", f"d 755 {owner}", f"d/f 755 {owner}", f"g 640 {owner}", "/srv 755 0:0", "/srv/own 700 1000:1000",
        "/srv/root 755 0:0", "/home/maker/.ssh 700 1001:1001", f"/vol 755 {owner}", owner.partition(":")[0], "3",
    ], state  # fmt: skip
    state = lightrun.run(
        image=image, workdir="/srv/own/new/deep", files={"a/b": "x"}, entrypoint=f"{show} /srv/own . .. a a/b; id -g"
    )
    if user in {"", "1000", "1000:50"}:  # another user cannot even enter
        assert state["logs"][:5] == [
            "/srv/own 700 1000:1000", f". 755 {owner}", f".. 755 {owner}", f"a 755 {owner}", f"a/b 755 {owner}"
        ], state  # fmt: skip
        assert state["logs"][5] == owner.partition(":")[2]


def test_no_folder_of_the_image_changes(lightrun: Daemon, owned_images: dict[str, str]) -> None:
    """`~/.ssh` stays 0700, a workdir its user's, a link of the image a link."""
    maker = owned_images["maker"]
    state = lightrun.run(image=maker, workdir="/home/maker", files={".ssh/config": "x"},
                         entrypoint="stat -c '%a %u:%g' .ssh .ssh/config")  # fmt: skip
    assert state["logs"] == ["700 1001:1001", "755 1001:1002"], state
    root = owned_images[""]
    state = lightrun.run(image=root, workdir="/srv/link", files={"d/f": "x"}, entrypoint="readlink /srv/link; cat /srv/own/d/f")
    assert state["logs"] == ["own", "x"], state
    state = lightrun.run(image=root, workdir="/srv/root", files={"in/f": "x", "file": "new"},
                         entrypoint="readlink in; cat /srv/own/f file; stat -c %a /srv/own")  # fmt: skip
    assert state["logs"] == ["/srv/own", "xnew700"], state


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"dangling/f": b""}, "/srv/root/dangling"), ({"file/f": b""}, "/srv/root/file"),
        ({"linked.txt": b""}, "/srv/root/linked.txt"),
        ({"in": b""}, "/srv/root/in"), ({"tar": tar(member("in", kind=tarfile.SYMTYPE, target="x"))}, "/srv/root/in"),
        ({"tar": tar(member("file", kind=tarfile.DIRTYPE))}, "/srv/root/file"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_named_and_not_replaced(
    lightrun: Daemon, owned_images: dict[str, str], parts: dict[str, bytes], names: str
) -> None:
    state = run(lightrun, parts, image=owned_images[""], workdir="/srv/root", entrypoint="true")
    assert state["reason"] == "start_failed"
    assert names in state["error"]


def test_an_image_runs_in_its_own_workdir(lightrun: Daemon, engine_api: EngineApi) -> None:
    image = build(
        engine_api, f"lightrun/test-workdir:{os.getpid()}", "WORKDIR /srv/root", 'CMD ["sh", "-c", "pwd; ls; echo x > out"]'
    )
    try:
        state = lightrun.run(image=image, extract=["out", {"from": "file", "to": "kept"}])
        assert state["logs"] == ["/srv/root", "dangling", "file", "in", "linked.txt"]
        assert [entry["path"] for entry in state["artifacts"]] == ["kept", "out"]
        assert lightrun.run(image=image, entrypoint="pwd")["logs"] == ["/app"]
        assert lightrun.run(image=image, files={"x": ""})["logs"][0] == "/app"
        detached = lightrun.detach(image=image, extract=["out"])
        assert [entry["path"] for entry in lightrun.wait(detached)["artifacts"]] == ["out"]
    finally:
        remove_image(engine_api, image)


# ---------------------------------------------------------------- Hints


@pytest.mark.parametrize(
    ("setup", "error"),
    [
        (["true", "exit 3"], "setup[1] failed with exit code 3"), (["if"], "setup[0] failed with exit code 2"),
        (["set -eC", "true", "false"], "setup[2] failed with exit code 1"),
        (["exec 2>/dev/null >/dev/null", "no-such"], "setup[1]"),
        (["cd /", "sh -c 'kill -9 $$'"], "setup[1] failed with exit code 137"),
    ],
)  # fmt: skip
def test_a_setup_that_fails_is_named(lightrun: Daemon, setup: list[str], error: str) -> None:
    state = lightrun.run(setup=setup, entrypoint="echo never")
    assert state["reason"] == "exited"
    assert state["error"].startswith(error)
    assert "never" not in state["logs"]


def test_an_entrypoint_that_fails_is_no_setup(lightrun: Daemon, owned_images: dict[str, str]) -> None:
    state = lightrun.run(setup=["true"], entrypoint="exit 4")
    assert (state["exitCode"], "error" in state) == (4, False)
    state = lightrun.run(image=owned_images["maker"], setup=["true", "(exit 5)"], entrypoint="true")
    assert state["error"] == "setup[1] failed with exit code 5"


def test_stdin_comes_as_text_bytes_or_an_artifact(lightrun: Daemon, source: str) -> None:
    content = bytes(range(256)) * 4000
    digest = hashlib.sha256(content).hexdigest()
    assert lightrun.run(stdin={"base64": base64.b64encode(content).decode()}, entrypoint="sha256sum")["logs"] == [f"{digest}  -"]
    assert lightrun.run(stdin={"artifact": f"{source}/text"}, entrypoint="cat")["logs"] == ["t"]


def test_a_client_that_leaves_during_its_upload_leaves_nothing(lightrun: Daemon) -> None:
    body = form({**lightrun.fields, "entrypoint": "sleep 30"}, {"x": b"x" * MIB})
    head = f"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    for sent in (len(body) // 2, len(body)):
        with contextlib.closing(lightrun.connect()) as connection:
            connection.sendall(head.encode() + body[:sent])
            time.sleep(0.3)
    assert eventually(lambda: not lightrun.request("GET", "/runs?status=running").json())
    secrets = lightrun.state_dir / "secrets"
    assert eventually(lambda: not [path for path in secrets.iterdir() if "upload" in path.name])
    os.kill(lightrun.pid, signal.SIGCONT)
