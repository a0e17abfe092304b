"""Hostile images and what hostile runs leave: nothing of the image runs while files go in, and what comes back is plain."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest

from conftest import Daemon, DaemonFactory, longer
from engine import DEFAULTS, EngineApi, find_busybox, root_filesystem
from images import remove_image
from lightrun import MAX_ARTIFACT_DEPTH, MAX_ARTIFACT_PATH_BYTES

LIMIT = 64 << 20
MARK = f"lightrun-mark-{uuid.uuid4().hex}"
TOOLS = ("xz", "unxz", "gzip", "gunzip", "pigz", "unpigz", "tar", "bzip2", "bunzip2", "zstd", "unzstd")
TROJAN = f"""#!/bin/sh
echo "$0" >> /{MARK}
echo "$0" >> /tmp/{MARK}
exec /bin/busybox "${{0##*/}}" "$@"
"""

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", target: str = "", mode: int = 0o755) -> Member:
    """An entry of an image; a device is /dev/null."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(content), target, mode
    info.devmajor, info.devminor = 1, 3
    return info, content


def build(api: EngineApi, *members: Member, user: str = "root") -> str:
    """An image of busybox and these entries, under a name that nobody else uses."""
    ours, buffer = {info.name for info, _ in members}, io.BytesIO()
    source = io.BytesIO(root_filesystem(find_busybox()[0]))
    with tarfile.open(fileobj=source) as base, tarfile.open(fileobj=buffer, mode="w") as archive:
        for info in base:
            if info.name not in ours:  # an engine takes no name twice
                archive.addfile(info, base.extractfile(info) if info.isreg() else None)
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    name = f"lightrun/transfers-{uuid.uuid4().hex}:latest"
    api.import_image(buffer.getvalue(), name, [*DEFAULTS, f"USER {user}"])
    return name


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory) -> Daemon:
    """A daemon with a small limit of what a run may keep."""
    return module_daemon("--extract-limit", str(LIMIT))


def artifacts_folder(daemon: Daemon, run: str) -> Path:
    """Where the artifacts of a run are."""
    return daemon.state_dir / "artifacts" / run


def kept(daemon: Daemon, state: dict[str, Any]) -> dict[str, bytes | None]:
    """The artifacts of a run as they are on disk, None for a folder, once they are all plain, private and as listed."""
    root, found = artifacts_folder(daemon, state["id"]), dict[str, bytes | None]()
    assert not list(root.parent.glob("*.partial"))
    assert stat.S_IMODE(root.lstat().st_mode) == 0o700
    for path in root.rglob("*"):
        about, name = path.lstat(), str(path.relative_to(root))
        assert stat.S_ISDIR(about.st_mode) or stat.S_ISREG(about.st_mode), name
        assert stat.S_IMODE(about.st_mode) == (0o700 if path.is_dir() else 0o600), name
        assert path.is_dir() or about.st_nlink == 1, name
        assert about.st_uid == os.getuid(), name
        found[name] = None if path.is_dir() else path.read_bytes()
    listed = {entry["path"]: (entry["type"], entry["bytes"]) for entry in state.get("artifacts", [])}
    assert listed == {name: ("directory", 0) if body is None else ("file", len(body)) for name, body in found.items()}
    return found


def fates(state: dict[str, Any]) -> list[str]:
    """What became of each path to be extracted."""
    return [entry["status"] for entry in state["extracted"]]


# ---------------------------------------------------------------- Trojans in the image


@pytest.fixture(scope="module")
def trojan_image(engine_api: EngineApi) -> Iterator[str]:
    """An image in which every program that unpacks leaves a mark."""
    folders = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin")
    trojans = [member(f"{folder}/{tool}", content=TROJAN.encode()) for folder in folders for tool in TOOLS]
    image = build(engine_api, *trojans)
    yield image
    remove_image(engine_api, image)


COMPRESSED = {
    "gzip": gzip.compress(b"x" * 1000), "xz": lzma.compress(b"x" * 1000), "bzip2": bz2.compress(b"x" * 1000),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(600), "cut gzip": b"\x1f\x8b\x08", "cut xz": b"\xfd7zXZ\0", "cut bzip2": b"BZh9",
}  # fmt: skip


def test_the_trojans_work(lightrun: Daemon, trojan_image: str) -> None:
    state = lightrun.run(image=trojan_image, entrypoint=f"/bin/gzip -h > /dev/null 2>&1; cat /{MARK}")
    assert state["logs"] == ["/bin/gzip"]


@pytest.mark.parametrize("first", ["gzip", *longer("xz", "bzip2", "zstd")])
def test_no_program_of_the_image_unpacks_files(lightrun: Daemon, trojan_image: str, first: str) -> None:
    contents = {f"BZh9 {name}": COMPRESSED[name] for name in [first, *COMPRESSED]}
    state = lightrun.run(
        image=trojan_image, workdir="/BZh91AY&SY", extract=["."], entrypoint=f"test ! -e /{MARK} && test ! -e /tmp/{MARK}",
        files={name: {"base64": base64.b64encode(content).decode()} for name, content in contents.items()},
    )  # fmt: skip
    assert (state["reason"], state["exitCode"]) == ("exited", 0)
    assert kept(lightrun, state) == contents
    assert not [folder for folder in (Path("/"), Path("/tmp"), lightrun.temporary) if (folder / MARK).exists()]


# ---------------------------------------------------------------- A workdir that is a link


@pytest.fixture(scope="module")
def victim() -> Iterator[Path]:
    """A folder of this machine that images point at."""
    folder = Path(tempfile.mkdtemp(prefix="victim-"))
    folder.chmod(0o777)
    (folder / "secret").write_text("of the host")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def link_image(engine_api: EngineApi, victim: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An image of links, for root and for another user, whose folders are root's."""
    targets = {
        "absolute": "/srv/target", "relative": "srv/target", "dangling": "/no/where", "up": "../" * 12 + str(victim)[1:],
        "host": str(victim), "loop": "loop", "passwd": "/etc/passwd", "proc": f"/proc/1/root{victim}", "root": "/",
    }  # fmt: skip
    links = [member(f"links/{name}", tarfile.SYMTYPE, target=target) for name, target in targets.items()]
    folders = [member(name, tarfile.DIRTYPE) for name in ("links", "srv", "srv/target")]
    image = build(engine_api, *folders, *links, user=request.param)
    yield image
    remove_image(engine_api, image)


LINKS = ["absolute", "relative", "dangling", "up", "host", "loop", "passwd", "proc", "root"]


def links_of_images() -> Iterator[Any]:
    """Each link of each image; those that the short form leaves out take the same way as another."""
    for user, name in itertools.product(("root", "1000"), LINKS):
        short = name in ({"absolute", "host", "loop", "passwd"} if user == "root" else {"relative", "root"})
        yield pytest.param(user, user, name, marks=[] if short else [pytest.mark.long])


@pytest.mark.parametrize(("link_image", "link_user", "name"), list(links_of_images()), indirect=["link_image"])
def test_a_workdir_that_is_a_link(lightrun: Daemon, victim: Path, link_image: str, link_user: str, name: str) -> None:
    state = lightrun.run(
        image=link_image, workdir=f"/links/{name}", files={"f": "in", "d/f": "deep"}, extract=["new", "d", "secret"],
        extractOn="exit", entrypoint="cat f d/f; echo new > new",
    )  # fmt: skip
    if state["reason"] == "exited":
        root = state["exitCode"] == 0  # the folder is the user's, unless the image has it for root
        assert [line for line in state["logs"] if "denied" not in line] == ["indeep"]
        assert fates(state) == ["ok" if root else "missing", "ok", "missing"]
        assert kept(lightrun, state) == ({"new": b"new\n"} if root else {}) | {"f": b"deep"}
        assert root == (link_user == "root" or name not in {"absolute", "root"})
    else:
        assert (state["reason"], bool(state["error"])) == ("start_failed", True)
        assert name not in {"absolute", "relative"}
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"secret": "of the host"}
    assert victim.stat().st_mode & 0o7777 == 0o777


# ---------------------------------------------------------------- What a run leaves: kinds


@pytest.fixture(scope="module")
def device_image(engine_api: EngineApi) -> Iterator[str]:
    """An image that holds devices, which a run may not make."""
    devices = [member("app/null", tarfile.CHRTYPE, mode=0o666), member("app/disk", tarfile.BLKTYPE, mode=0o666)]
    image = build(engine_api, member("app", tarfile.DIRTYPE), *devices)
    yield image
    remove_image(engine_api, image)


SPECIAL = """
ln -s good link; ln -s /etc/passwd out; ln -s /no/where dangling; ln -s . self; mkfifo pipe
rm -f /dev/log; ln -s /app/socket /dev/log; syslogd; until test -S socket; do sleep 0.01; done
mkdir d; echo good > d/good; ln d/good d/hard; ln -s ../good d/link; mkfifo d/pipe
"""
PLAIN = """
echo good > good; chmod 7777 good; mkdir -m 7777 open; mkdir -m 0 closed; echo in > closed/f; chmod 0 closed/f
"""
SPECIAL_NAMES = ("link", "out", "dangling", "self", "pipe", "socket", "null", "disk")


def test_only_plain_files_come_back(lightrun: Daemon, device_image: str) -> None:
    state = lightrun.run(image=device_image, entrypoint=SPECIAL + PLAIN, extract=["."])
    skipped = state["extracted"][0].pop("skipped")
    assert state["extracted"] == [{"from": ".", "status": "ok", "bytes": len("good\n" * 3 + "in\n")}]
    # And in d: a link and a pipe. An engine may leave out the socket by itself.
    assert skipped in {len(SPECIAL_NAMES) + 2, len(SPECIAL_NAMES) + 1}
    assert kept(lightrun, state) == {
        "good": b"good\n", "open": None, "closed": None, "closed/f": b"in\n", "d": None, "d/good": b"good\n",
        "d/hard": b"good\n",
    }  # fmt: skip
    assert {entry["path"]: entry["mode"] for entry in state["artifacts"] if "mode" in entry} == {"good": "777"}


def test_an_executable_comes_back_with_its_mode_and_both_its_names(lightrun: Daemon) -> None:
    """As Cargo builds them: `target/debug/app` is a hard link to `deps/app-…`."""
    script = """mkdir -p target/debug/deps; cd target/debug; printf '#!/bin/sh\necho built\n' > deps/app-1f
        chmod 750 deps/app-1f; ln deps/app-1f app; ln deps/app-1f zapp; echo > plain"""
    state = lightrun.run(entrypoint=script, extract=["target", "target/debug/app"])
    body = b"#!/bin/sh\necho built\n"
    tool: dict[str, Any] = {"bytes": len(body), "type": "file", "mode": "750"}
    assert [entry for entry in state["artifacts"] if entry["type"] == "file"] == [
        {"path": "app", **tool}, {"path": "debug/app", **tool}, {"path": "debug/deps/app-1f", **tool},
        {"path": "debug/plain", "bytes": 1, "type": "file"}, {"path": "debug/zapp", **tool},
    ]  # fmt: skip
    assert [path for path, content in kept(lightrun, state).items() if content == body] != []
    response = lightrun.request("GET", f"/runs/{state['id']}/artifacts", headers={"Accept": "application/x-tar"})
    with tarfile.open(fileobj=io.BytesIO(response.body)) as archive:
        assert {info.name: info.mode for info in archive if info.isreg()} == {
            "app": 0o750, "debug/app": 0o750, "debug/deps/app-1f": 0o750, "debug/plain": 0o644, "debug/zapp": 0o750,
        }  # fmt: skip


def test_nothing_else_comes_back_by_name(lightrun: Daemon, device_image: str) -> None:
    extract = [*SPECIAL_NAMES, "closed/f", "good", "d/hard"]
    state = lightrun.run(image=device_image, entrypoint=SPECIAL + PLAIN, extract=extract)
    assert fates(state) == ["error"] * len(SPECIAL_NAMES) + ["ok"] * 3
    assert all(entry["message"] for entry in state["extracted"] if entry["status"] == "error")
    assert kept(lightrun, state) == {"f": b"in\n", "good": b"good\n", "hard": b"good\n"}


def test_paths_to_extract_stay_in_the_container(lightrun: Daemon, victim: Path) -> None:
    script = f"""ln -s d inside; mkdir d; echo in > d/f; ln -s {victim} host; ln -s {"../" * 20}{str(victim)[1:]} up
        ln -s /proc/1/root{victim} proc; ln -s /etc/passwd d/l; ln -s loop loop; ln -s / root"""
    extract = [
        "host/secret", "up/secret", "proc/secret", "/proc/self/root", f"/proc/1/root{victim}/secret", "/dev/null", "/dev/sda",
        "loop/f", "d/f/g", str(victim), "f" * 256, "d/" * 400 + "f", "/proc", "inside/f", "root/etc/group",
        "d/l", "root/app/d", "/", "/proc/self/root/etc/shadow", "/var/run/docker.sock",
    ]  # fmt: skip
    state = lightrun.run(entrypoint=script, extract=extract)
    fate = {entry["from"]: entry["status"] for entry in state["extracted"]}
    found = kept(lightrun, state)
    assert {path for path, status in fate.items() if status == "ok"} == {"/proc", "inside/f", "root/etc/group", "/"}
    assert {fate[path] for path in ("host/secret", "up/secret", "/dev/null", "/proc/self/root", "/var/run/docker.sock")} == {
        "missing"
    }
    assert fate["d/l"] == fate["root/app/d"] == "error"
    assert (found["f"], found["etc/group"], found["app/d/f"]) == (b"in\n", found["group"], b"in\n")
    assert "secret" not in "".join(found)
    assert b"of the host" not in found.values()


# ---------------------------------------------------------------- What a run leaves: names

NAMES: list[bytes] = [
    *(name.encode() for name in (
        'q"uo\'te', "line\nend\n", "tab\t", "%", "%41", "%2e%2e", "%2e%2e%2fx", "%00", "-rf", "--", " ", " a ", "...", ".hidden",
        "\r\nX-Evil: 1", "\r", 'x"; filename="y', ";filename=x", "*", "a\\b", "..\\..\\x", "\\", "?q=1", "#f", "a&b=c+d", "~",
        "$(id)", "`id`", "\x7f", "\x01\x1b[2J", "é", "e\u0301", "😀", "\u202egnp.exe", "\ufeff", "\u2028", "\x85", "\uffff",
        "CON", "C:", ".lightrun", ".partial", "x" * 255, "é" * 127, "%f" * 127, "con\x0b\x0c", "A", "a",
        "null", "pax_global_header",
    )),
]  # fmt: skip
NOT_TEXT = [b"\xff", b"\xc3", b"a\xed\xa0\x80", b"\xc0\xae\xc0\xae", b"\xff" * 255, b"ok\xfe\n"]


def shell_word(name: bytes) -> str:
    """A shell variable `f` set to any bytes but NUL."""
    return "f=$(printf '" + "".join(f"\\{byte:03o}" for byte in name) + ".'); f=${f%.}"


def test_every_name_comes_back_and_downloads(lightrun: Daemon) -> None:
    lines = [f'{shell_word(name)}; printf {number} > "./$f"' for number, name in enumerate([*NAMES, *NOT_TEXT])]
    make = "\n".join(["mkdir /out /out/d; cd /out/d", *lines])
    state = lightrun.run(files={"make": make}, entrypoint="sh -e make", extract=["/out", "/out/d/" + NAMES[0].decode()])
    bodies = {f"d/{name.decode()}": str(number).encode() for number, name in enumerate(NAMES)}
    assert state["extracted"][0] == {
        "from": "/out", "status": "ok", "bytes": sum(map(len, bodies.values())), "skipped": len(NOT_TEXT),
    }  # fmt: skip
    assert kept(lightrun, state) == {"d": None, **bodies, NAMES[0].decode(): b"0"}
    assert lightrun.state(state["id"])["artifacts"] == state["artifacts"]
    for path, body in bodies.items():
        response = lightrun.request("GET", f"/runs/{state['id']}/artifacts/{quote(path, safe='')}")
        assert (response.status, response.body) == (200, body), path
        assert lightrun.request("GET", f"/runs/{state['id']}/artifacts/{quote(path)}").body == body, path
        assert name_of(str(response.headers["Content-Disposition"])) == path[2:]
    response = lightrun.request("GET", f"/runs/{state['id']}/artifacts", headers={"Accept": "application/x-tar"})
    with tarfile.open(fileobj=io.BytesIO(response.body)) as archive:
        assert {info.name for info in archive if info.isreg()} == {*bodies, NAMES[0].decode()}


def name_of(disposition: str) -> str:
    """The file name of a Content-Disposition, by the grammars of RFC 6266 and RFC 8187."""
    plain, encoded = r"[ !#-\[\]-~]*", r"(?:%[0-9A-F]{2}|[A-Za-z0-9!#$&+.^_`|~-])+"
    match = re.fullmatch(f"attachment; filename=\"({plain})\"(?:; filename\\*=UTF-8''({encoded}))?", disposition)
    assert match, disposition
    assert "/" not in match[1]
    return unquote_to_bytes(match[2]).decode() if match[2] else str(match[1])


# ---------------------------------------------------------------- What a run leaves: limits


def test_depth_and_length_at_the_limit_and_one_over(lightrun: Daemon) -> None:
    deep, name = "/".join(["d"] * (MAX_ARTIFACT_DEPTH - 1)), "n" * 255
    long = "/".join([name] * 7) + "/e/"
    fits, over = long + "f" * (MAX_ARTIFACT_PATH_BYTES - len(long)), long + "o" * (MAX_ARTIFACT_PATH_BYTES - len(long) + 1)
    script = f"""
        d=$(yes d/ | head -n 200 | tr -d '\\n'); n=$(yes n | head -n 255 | tr -d '\\n')
        mkdir -p $d; echo over > {"d/" * MAX_ARTIFACT_DEPTH}f; echo fits > {deep}/f; echo far > ${{d}}f
        l=$n/$n/$n/$n/$n/$n/$n/e; mkdir -p $l/$n/$n/$n; echo far > $l/$n/$n/$n/f
        echo fits > $l/$(yes f | head -n {len(fits) - len(long)} | tr -d '\\n')
        echo over > $l/$(yes o | head -n {len(over) - len(long)} | tr -d '\\n')"""
    state = lightrun.run(entrypoint=script, extract=["."])
    assert fates(state) == ["ok"], state["extracted"]
    found = kept(lightrun, state)
    assert {path for path, body in found.items() if body is not None} == {f"{deep}/f", fits}
    # Folders below the 64th and its file; the three names of 255 bytes, what is in them, and the one that is over.
    assert state["extracted"][0]["skipped"] == (200 - MAX_ARTIFACT_DEPTH + 2) + 5
    for path in (f"{deep}/f", fits):
        assert lightrun.request("GET", f"/runs/{state['id']}/artifacts/{path}").body == b"fits\n"


@pytest.mark.alone("looks at what is used of the disk")
def test_bytes_at_the_limit_and_one_over(lightrun: Daemon) -> None:
    script = f"""mkdir a b c huge; echo first > huge/a; truncate -s 3G huge/b; truncate -s 3G sparse
        truncate -s {LIMIT - 1} c/most; truncate -s {LIMIT + 1} over; echo > a/1; echo > b/2; echo > b/3"""
    began, before = time.monotonic(), shutil.disk_usage(lightrun.state_dir).used
    state = lightrun.run(entrypoint=script, extract=["sparse", "huge", "over", "c", "b", "a", "a/1"])
    assert fates(state) == ["error", "error", "error", "ok", "error", "ok", "error"]
    assert set(artifacts_folder(lightrun, state["id"]).iterdir()) == {
        artifacts_folder(lightrun, state["id"]) / name for name in ("most", "1")
    }
    assert kept(lightrun, state).keys() == {"most", "1"}
    assert shutil.disk_usage(lightrun.state_dir).used - before < 2 * LIMIT
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["$(printf '\\377')", "$(yes d/ | head -n 70 | tr -d '\\n')f", "plain"])
def test_a_sparse_file_that_is_skipped_is_not_read_to_its_end(lightrun: Daemon, name: str) -> None:
    script = f'f="many/{name}"; mkdir -p "$(dirname "$f")"; truncate -s 1000G "$f"; echo > other'
    began = time.monotonic()
    state = lightrun.run(entrypoint=script, extract=["many", "other"])
    assert fates(state) == ["error", "ok"]
    assert "larger" in state["extracted"][0]["message"]
    assert kept(lightrun, state) == {"other": b"\n"}
    assert time.monotonic() - began < 30


def test_names_come_back_whatever_the_locale(daemon: DaemonFactory) -> None:
    lightrun = daemon(env={"LC_ALL": "POSIX", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    script = "mkdir -p é/ü; printf 1 > é/ü/😀; printf 2 > \"$(printf 'é/\\377')\"; printf 3 > ö"
    state = lightrun.run(entrypoint=script, extract=["é", "ö", "/app"])
    assert [(entry["status"], entry.get("skipped")) for entry in state["extracted"]] == [("ok", 1), ("ok", None), ("error", None)]
    assert kept(lightrun, state) == {"ü": None, "ü/😀": b"1", "ö": b"3"}
    assert lightrun.request("GET", f"/runs/{state['id']}/artifacts/{quote('ü/😀')}").body == b"1"
    assert lightrun.request("DELETE", f"/runs/{state['id']}").status == 204
    assert not artifacts_folder(lightrun, state["id"]).exists()


@pytest.mark.long
def test_thirty_thousand_files(lightrun: Daemon) -> None:
    script = "mkdir many one; echo > one/7; cd many; i=0; while [ $i -lt 30000 ]; do : > $i; i=$((i + 1)); done"
    began = time.monotonic()
    state = lightrun.run(entrypoint=script, extract=["many", "one", "many/8"])
    assert fates(state) == ["ok", "error", "error"], f"after {time.monotonic() - began:.1f} s: {state['timings']}"
    assert [entry["path"] for entry in state["artifacts"]] == sorted(map(str, range(30_000)))
    assert {path.name for path in artifacts_folder(lightrun, state["id"]).iterdir()} == {
        entry["path"] for entry in state["artifacts"]
    }
    assert lightrun.request("DELETE", f"/runs/{state['id']}").status == 204
    assert not artifacts_folder(lightrun, state["id"]).exists()


def test_entries_that_collide(lightrun: Daemon) -> None:
    script = """mkdir -p a/s b/s c/s/x d; echo 1 > a/s/x; echo 2 > b/s/y; echo 3 > b/alone; echo 4 > d/s; echo 5 > d/other
        echo 6 > S; echo 7 > alone"""
    state = lightrun.run(entrypoint=script, extract=["a", "b", "c", "d", "alone", "d/s", "a", "S"])
    assert fates(state) == ["ok", "error", "error", "error", "ok", "error", "error", "ok"]
    assert all("collides" in entry["message"] for entry in state["extracted"] if entry["status"] == "error")
    assert kept(lightrun, state) == {"s": None, "s/x": b"1\n", "alone": b"7\n", "S": b"6\n"}
