"""Files on their way into a container and out of it: nothing that comes back may leave its folder or its budget."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightrun
from lightrun import (
    MAX_ARTIFACT_DEPTH,
    ArtifactError,
    Extraction,
    NotFound,
    artifacts_tar,
    byte_range,
    content_disposition,
    files_tar,
    open_artifact,
)

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, content: bytes = b"x") -> Member:
    """A regular file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def special(name: str, kind: bytes, target: str = "") -> Member:
    """A folder, link, device or pipe."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def folder(name: str) -> Member:
    """A folder."""
    return special(name, tarfile.DIRTYPE)


def tar_of(*members: Member) -> io.BytesIO:
    """A tar as an engine sends it: these members, whatever they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def kept(root: Path) -> dict[str, bytes | None]:
    """What lies below a folder: path → content, None for a folder."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))}


@pytest.fixture
def extraction(tmp_path: Path) -> Extraction:
    """The artifacts of the run `r`, at most 1000 bytes."""
    return Extraction(tmp_path, "r", 1000)


# ---------------------------------------------------------------- The tar that goes in


def members(tar: bytes) -> list[tuple[str, int, bytes | None]]:
    """Name, mode and content of each member."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        found = []
        for member in archive:
            source = archive.extractfile(member) if member.isreg() else None
            found.append((member.name, member.mode, source.read() if source else None))
            assert (member.uid, member.gid) == (0, 0)
        return found


def test_the_first_member_is_a_folder_and_everybody_may_change_the_rest() -> None:
    tar = files_tar("/srv/app", {"a.txt": b"A", "d/e/f": b""}, True, 1_700_000_000)
    assert tar[:2] == b"./"
    assert members(tar) == [
        (".", 0o755, None), ("srv/app", 0o777, None), ("srv/app/d", 0o777, None), ("srv/app/d/e", 0o777, None),
        ("srv/app/a.txt", 0o777, b"A"), ("srv/app/d/e/f", 0o777, b""),
    ]  # fmt: skip


def test_a_root_image_keeps_its_workdir_as_it_is() -> None:
    assert [name for name, _, _ in members(files_tar("/app", {"a": b""}, False, 0))] == [".", "app/a"]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=120).filter(
    lambda name: name.strip(".")
)


@given(st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=600), min_size=1, max_size=4))
def test_any_file_goes_in(files: dict[str, bytes]) -> None:
    tar = files_tar("/app", files, True, 0)
    assert len(tar) % tarfile.BLOCKSIZE == 0
    assert {name: content for name, _, content in members(tar) if content is not None} == {
        f"app/{name}".rstrip("/"): content for name, content in files.items()
    }


# ---------------------------------------------------------------- The tar that comes back


def test_a_file_is_kept_under_its_base_name(extraction: Extraction, tmp_path: Path) -> None:
    assert extraction.keep(tar_of(file("out.txt", b"abc")), False) == {"bytes": 3}
    assert extraction.artifacts == [{"path": "out.txt", "bytes": 3, "type": "file"}]
    assert kept(tmp_path) == {"r": None, "r/out.txt": b"abc"}


def test_a_folders_contents_land_at_the_root(extraction: Extraction, tmp_path: Path) -> None:
    tar = tar_of(folder("dist"), file("dist/b", b"B"), folder("dist/a"), file("dist/a/é\n", b"12"), folder("dist/empty"))
    assert extraction.keep(tar, True) == {"bytes": 3}
    assert extraction.artifacts == [
        {"path": "a", "bytes": 0, "type": "directory"}, {"path": "a/é\n", "bytes": 2, "type": "file"},
        {"path": "b", "bytes": 1, "type": "file"}, {"path": "empty", "bytes": 0, "type": "directory"},
    ]  # fmt: skip
    assert kept(tmp_path / "r") == {"a": None, "a/é\n": b"12", "b": b"B", "empty": None}


def test_an_empty_folder_is_fine(extraction: Extraction, tmp_path: Path) -> None:
    assert extraction.keep(tar_of(folder("dist")), True) == {"bytes": 0}
    assert extraction.artifacts == []


def test_what_is_kept_is_the_daemons_own(extraction: Extraction, tmp_path: Path) -> None:
    loose = file("dist/x")
    loose[0].mode, loose[0].uid = 0o6777, 4242
    extraction.keep(tar_of(folder("dist"), loose), True)
    about = (tmp_path / "r/x").stat()
    assert (about.st_mode & 0o7777, about.st_uid) == (0o600, os.getuid())
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "hostile",
    [
        special("d/x", tarfile.SYMTYPE, "/etc/passwd"), special("d/x", tarfile.SYMTYPE, "../../victim"),
        special("d/x", tarfile.LNKTYPE, "d/good"), special("d/x", tarfile.LNKTYPE, "/etc/passwd"),
        special("d/x", tarfile.CHRTYPE), special("d/x", tarfile.BLKTYPE), special("d/x", tarfile.FIFOTYPE),
        file("d/../victim"), file("d/../../victim"), file("d/a/../../../victim"), file("d/./x"), file("d/a//x"), folder("d/.."),
        file("d/x\udcff"), file("d/" + "x" * 256), file("d/" + "é" * 128), file("d/" + "x/" * MAX_ARTIFACT_DEPTH + "x"),
        file("d/" + ("x" * 200 + "/") * 11 + "x"),
    ],
    ids=lambda member: f"{member[0].type!r} {member[0].name[:20]!r}",
)  # fmt: skip
def test_a_hostile_member_is_skipped_and_counted(extraction: Extraction, tmp_path: Path, hostile: Member) -> None:
    (tmp_path / "victim").write_text("untouched")
    assert extraction.keep(tar_of(folder("d"), file("d/good"), hostile, file("d/last")), True) == {"bytes": 2, "skipped": 1}
    assert kept(tmp_path) == {"r": None, "r/good": b"x", "r/last": b"x", "victim": b"untouched"}


def test_no_member_is_written_through_a_link(extraction: Extraction, tmp_path: Path) -> None:
    tar = tar_of(folder("d"), special("d/x", tarfile.SYMTYPE, str(tmp_path)), file("d/x/victim"))
    assert extraction.keep(tar, True) == {"bytes": 1, "skipped": 1}
    assert kept(tmp_path) == {"r": None, "r/x": None, "r/x/victim": b"x"}


@pytest.mark.parametrize(
    "tar",
    [
        tar_of(folder("d"), file("d/x"), file("d/x")),
        tar_of(folder("d"), file("d/x"), file("d/x/y")),
        tar_of(folder("d"), file("d/x"), folder("d/x")),
        tar_of(folder("d"), file("d/a", bytes(600)), file("d/b", bytes(401))),
        io.BytesIO(tar_of(folder("d"), file("d/a"), file("d/b", bytes(900))).getvalue()[:2500]),
        io.BytesIO(b"garbage" * 1000),
        io.BytesIO(),
    ],
)
def test_what_cannot_be_kept_whole_leaves_nothing(extraction: Extraction, tmp_path: Path, tar: io.BytesIO) -> None:
    tar.seek(0)
    with pytest.raises(ArtifactError):
        extraction.keep(tar, True)
    assert extraction.artifacts == []
    assert not any((tmp_path / "r").rglob("*"))
    assert not (tmp_path / "r.partial").exists()


def test_a_bad_entry_costs_nothing_of_the_budget(extraction: Extraction) -> None:
    with pytest.raises(ArtifactError):
        extraction.keep(tar_of(folder("d"), file("d/a", bytes(600)), file("d/b", bytes(600))), True)
    assert extraction.keep(tar_of(file("c", bytes(1000))), False) == {"bytes": 1000}
    with pytest.raises(ArtifactError):
        extraction.keep(tar_of(file("d", b"x")), False)
    assert extraction.keep(tar_of(file("empty", b"")), False) == {"bytes": 0}


def test_entries_are_bounded(extraction: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "MAX_ARTIFACT_ENTRIES", 3)
    bounded = Extraction(tmp_path, "r", 1000)
    assert bounded.keep(tar_of(folder("d"), file("d/a/b")), True) == {"bytes": 1}
    with pytest.raises(ArtifactError):
        bounded.keep(tar_of(folder("d"), file("d/1"), file("d/2")), True)
    assert bounded.keep(tar_of(file("last")), False) == {"bytes": 1}
    assert kept(tmp_path / "r") == {"a": None, "a/b": b"x", "last": b"x"}


@pytest.mark.parametrize("second", [tar_of(folder("d"), file("d/b"), file("d/a")), tar_of(folder("d"), folder("d/a"))])
def test_a_name_that_collides_is_an_error_and_the_first_stays(
    extraction: Extraction, tmp_path: Path, second: io.BytesIO
) -> None:
    second.seek(0)
    extraction.keep(tar_of(file("a", b"first")), False)
    with pytest.raises(ArtifactError, match="collides"):
        extraction.keep(second, True)
    assert kept(tmp_path) == {"r": None, "r/a": b"first"}
    assert extraction.artifacts == [{"path": "a", "bytes": 5, "type": "file"}]


def test_discarding_leaves_nothing(extraction: Extraction, tmp_path: Path) -> None:
    extraction.keep(tar_of(file("a")), False)
    extraction.discard()
    extraction.discard()
    assert extraction.artifacts == []
    assert kept(tmp_path) == {}


@given(st.data())
def test_a_damaged_tar_is_kept_in_its_folder_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("damaged")
    tar = bytearray(tar_of(folder("d"), file("d/é" * 60, bytes(700)), special("d/l", tarfile.SYMTYPE, "x")).getvalue()[:6000])
    for at in data.draw(st.lists(st.integers(0, len(tar) - 1), min_size=1, max_size=4)):
        tar[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # with a checksum that fits
        tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + sum(tar[156:512]) + 256)
    try:
        size = Extraction(root, "r", 1000).keep(io.BytesIO(bytes(tar)), data.draw(st.booleans()))["bytes"]
    except ArtifactError:
        size = 0
    assert {path.name for path in root.iterdir()} <= {"r"}
    assert sum(len(content or b"") for content in kept(root).values()) == size <= 1000


# ---------------------------------------------------------------- Resolving a request's path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The artifacts of a run, with things in them that lightrun never puts there."""
    run = tmp_path / "run"
    (run / "d").mkdir(parents=True)
    (run / "d/f").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "folder-link").symlink_to(tmp_path)
    (run / "d/up").symlink_to("..")
    os.mkfifo(run / "pipe")
    (tmp_path / "run-link").symlink_to(run)
    return run


def test_files_are_opened_and_folders_are_none(root: Path) -> None:
    opened = open_artifact(root, "d/f")
    assert opened
    with opened:
        assert opened.read() == b"inside"
    assert open_artifact(root, "d") is None


@pytest.mark.parametrize(
    "path",
    [
        "x", "d/x", "d/f/x", "link", "folder-link", "folder-link/secret", "d/up", "d/up/d/f", "pipe", "", "/", "/etc/passwd",
        "d//f", "d\0", "x" * 5000, "é" * 300, "d/f/",
    ],
    ids=lambda path: repr(path[:20]),
)  # fmt: skip
def test_anything_else_is_not_found(root: Path, path: str) -> None:
    with pytest.raises(NotFound):
        open_artifact(root, path)


def test_not_even_the_root_may_be_a_link(root: Path) -> None:
    with pytest.raises(NotFound):
        open_artifact(root.parent / "run-link", "d/f")


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_stays_open(root: Path) -> None:
    before = open_descriptors()
    for path in ("d", "x", "link", "d/f/x"):
        try:
            open_artifact(root, path)
        except NotFound:
            continue
    assert open_descriptors() == before


# ---------------------------------------------------------------- All as one tar


def test_all_artifacts_as_one_tar(extraction: Extraction, tmp_path: Path) -> None:
    extraction.keep(tar_of(folder("d"), file("d/é" * 50, b"12"), folder("d/sub"), file("d/sub/f", bytes(513))), True)
    tar = b"".join(artifacts_tar(tmp_path / "r", extraction.artifacts))
    again = {name: content for name, _, content in members(tar)}
    assert again == kept(tmp_path / "r")


def test_a_missing_artifact_breaks_the_tar(extraction: Extraction, tmp_path: Path) -> None:
    extraction.keep(tar_of(file("a")), False)
    (tmp_path / "r/a").unlink()
    with pytest.raises(NotFound):
        list(artifacts_tar(tmp_path / "r", extraction.artifacts))


# ---------------------------------------------------------------- Headers of a download


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=0-", (0, 10)), ("bytes=3-5", (3, 3)), ("bytes=9-", (9, 1)), ("bytes=5-100", (5, 5)),
        ("bytes=-3", (7, 3)), ("bytes=-100", (0, 10)),
        ("", None), ("bytes", None), ("bytes=", None), ("bytes=-", None), ("bytes=5-3", None), ("bytes=0-1,3-4", None),
        ("lines=0-1", None), ("bytes=a-b", None), ("bytes=0x1-2", None), ("bytes=1.0-2", None), ("bytes=٣-", None),
    ],
)  # fmt: skip
def test_one_range(header: str, part: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == part


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=10-20", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_outside_of_the_file(header: str, size: int) -> None:
    with pytest.raises(ValueError, match="byte"):
        byte_range(header, size)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 40))
def test_ranges_agree_with_slices(size: int, first: int, last: int) -> None:
    content = bytes(range(size))
    headers: dict[str, Callable[[], Any]] = {
        f"bytes={first}-": lambda: content[first:], f"bytes=-{last}": lambda: content[max(0, size - last) :],
    }  # fmt: skip
    if first <= last:
        headers[f"bytes={first}-{last}"] = lambda: content[first : last + 1]
    for header, expected in headers.items():
        try:
            part = byte_range(header, size)
        except ValueError:
            assert expected() == b""
        else:
            assert part
            assert content[part[0] : part[0] + part[1]] == expected()


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a b.txt", "attachment; filename=\"a b.txt\"; filename*=UTF-8''a%20b.txt"),
        ('q"\\;.txt', "attachment; filename=\"q__;.txt\"; filename*=UTF-8''q%22%5C%3B.txt"),
        ("é€.bin", "attachment; filename=\"__.bin\"; filename*=UTF-8''%C3%A9%E2%82%AC.bin"),
        ("a\r\nX: y", "attachment; filename=\"a__X: y\"; filename*=UTF-8''a%0D%0AX%3A%20y"),
        ("100%41", "attachment; filename=\"100_41\"; filename*=UTF-8''100%2541"),
    ],
)
def test_content_disposition(name: str, header: str) -> None:
    assert content_disposition(name) == header


@given(NAMES)
def test_content_disposition_is_one_clean_header_line(name: str) -> None:
    header = content_disposition(posixpath.basename(name))
    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
