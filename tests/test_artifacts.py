"""Files on their way into a container and out of it: nothing that comes back may leave its folder or its budget."""

from __future__ import annotations

import io
import os
import posixpath
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightrun
from conftest import ROOT
from lightrun import (
    COPY_BYTES,
    MAX_ARTIFACT_DEPTH,
    ArtifactError,
    Entry,
    Extraction,
    NotFound,
    artifacts_tar,
    byte_range,
    content_disposition,
    open_artifact,
    put_tar,
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


def ready() -> None:
    """A check that has nothing against it."""


def kept(root: Path) -> dict[str, bytes | None]:
    """What lies below a folder: path → content, None for a folder."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))}


@pytest.fixture
def extraction(tmp_path: Path) -> Extraction:
    """The artifacts of the run `r`, at most 1000 bytes."""
    return Extraction(tmp_path, "r", 1000, ready)


# ---------------------------------------------------------------- The tar that goes in


def members(tar: bytes, owner: tuple[int, int]) -> list[tuple[str, int, bytes | None]]:
    """Name, mode and content of each member."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        found = []
        for member in archive:
            source = archive.extractfile(member) if member.isreg() else None
            found.append((member.name, member.mode, source.read() if source else None))
            assert (member.uid, member.gid) == (owner if member.name != "." else (0, 0))
        return found


def tar_for(entries: Iterable[Entry], owner: tuple[int, int] = (0, 0)) -> bytes:
    """What is put for some entries."""

    def pieces(content: Any) -> Iterator[bytes]:
        yield content

    return b"".join(put_tar(entries, owner, pieces, 1_700_000_000))


def test_the_first_member_is_a_folder_and_the_rest_belongs_to_the_user() -> None:
    entries = [Entry("srv/app", tarfile.DIRTYPE), Entry("srv/app/a", content=b"A", size=1), Entry("b", mode=0o600)]
    tar = tar_for(entries, (7, 8))
    assert tar[:2] == b"./"
    assert members(tar, (7, 8)) == [
        (".", 0o755, None), ("srv/app", 0o755, None), ("srv/app/a", 0o755, b"A"), ("b", 0o600, b""),
    ]  # fmt: skip


def test_links_go_in_as_links() -> None:
    entries = [Entry("a/f", content=b"A", size=1), Entry("a/g", tarfile.LNKTYPE, target="a/f"),
               Entry("a/h", tarfile.SYMTYPE, modified=5, target="../x")]  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(tar_for(entries))) as archive:
        found = {member.name: (member.type, member.linkname, member.mtime) for member in archive}
    assert found["a/g"] == (tarfile.LNKTYPE, "a/f", 1_700_000_000)
    assert found["a/h"] == (tarfile.SYMTYPE, "../x", 5)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=120).filter(
    lambda name: name.strip(".")
)


@given(st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=600), min_size=1, max_size=4))
def test_any_file_goes_in(files: dict[str, bytes]) -> None:
    tar = tar_for(Entry(f"app/{path}", content=content, size=len(content)) for path, content in files.items())
    assert len(tar) % tarfile.BLOCKSIZE == 0
    assert {name: content for name, _, content in members(tar, (0, 0)) if content is not None} == {
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


@pytest.mark.parametrize(
    ("mode", "said"), [(0o644, None), (0o755, "755"), (0o100, "100"), (0o6711, "711"), (0o1777, "777"), (0, None)]
)
def test_the_mode_of_an_executable_is_told_and_not_taken_over(
    extraction: Extraction, tmp_path: Path, mode: int, said: str | None
) -> None:
    tool, closed = file("tool"), folder("d/sub")
    tool[0].mode, tool[0].name, closed[0].mode = mode, "d/tool", 0o7777
    extraction.keep(tar_of(folder("d"), closed, tool), True)
    assert [entry.get("mode") for entry in extraction.artifacts] == [None, said]
    assert (tmp_path / "r/tool").stat().st_mode & 0o7777 == 0o600
    with tarfile.open(fileobj=io.BytesIO(b"".join(artifacts_tar(tmp_path / "r", extraction.artifacts)))) as archive:
        assert {member.name: member.mode for member in archive} == {"sub": 0o755, "tool": int(said or "644", 8)}


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
        special("d/x", tarfile.LNKTYPE, "d/last"), special("d/x", tarfile.LNKTYPE, "/etc/passwd"),
        special("d/x", tarfile.LNKTYPE, "good"), special("d/x", tarfile.LNKTYPE, "d"), special("d/x", tarfile.LNKTYPE, ""),
        special("d/x", tarfile.LNKTYPE, "d/x"), special("d/x", tarfile.LNKTYPE, "d/../d/good"), special("d/x", b"V"),
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


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("sub/a", "b"), ("a", "sub/b")])
def test_a_hard_link_is_a_file(extraction: Extraction, tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names
    link = special(f"d/{second}", tarfile.LNKTYPE, f"d/{first}")
    link[0].mode = 0o4755
    assert extraction.keep(tar_of(folder("d"), file(f"d/{first}", b"same"), link, file("d/c")), True) == {"bytes": 9}
    files = {path: content for path, content in kept(tmp_path / "r").items() if content is not None}
    assert files == {first: b"same", second: b"same", "c": b"x"}
    assert {entry["path"]: entry.get("mode") for entry in extraction.artifacts if entry["bytes"] == 4} == {
        first: None, second: "755",
    }  # fmt: skip
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "r").rglob("[a-c]"))


def test_hard_links_count_against_the_budget(extraction: Extraction, tmp_path: Path) -> None:
    links = [special(f"d/{number}", tarfile.LNKTYPE, "d/a") for number in range(3)]
    with pytest.raises(ArtifactError, match="larger"):
        extraction.keep(tar_of(folder("d"), file("d/a", bytes(300)), *links), True)
    assert extraction.keep(tar_of(folder("d"), file("d/a", bytes(300)), *links[:2]), True) == {"bytes": 900}
    with pytest.raises(ArtifactError, match="larger"):
        extraction.keep(tar_of(file("c", bytes(101))), False)


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
        io.BytesIO(tar_of(folder("d"), file("d/a"), file("d/b")).getvalue()[:2560]),
        io.BytesIO(tar_of(folder("d"), file("d/a"), file("d/b")).getvalue()[:512]),
        io.BytesIO(bytes(1024)),
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
    bounded = Extraction(tmp_path, "r", 1000, ready)
    assert bounded.keep(tar_of(folder("d"), file("d/a/b")), True) == {"bytes": 1}
    with pytest.raises(ArtifactError):
        bounded.keep(tar_of(folder("d"), file("d/1"), file("d/2")), True)
    assert bounded.keep(tar_of(file("last")), False) == {"bytes": 1}
    assert kept(tmp_path / "r") == {"a": None, "a/b": b"x", "last": b"x"}


class Endless(io.BytesIO):
    """Some bytes, and zeros for ever; counts what was read."""

    count = 0

    def read1(self, size: int | None = -1) -> bytes:
        assert size
        self.count += size
        return super().read1(size).ljust(size, b"\0")


def huge(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1000 << 30) -> Member:
    """The header of a member of that size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info, b""


def headers(*members: Member) -> bytes:
    """Members without their contents."""
    return b"".join(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") for info, _ in members)


@pytest.mark.parametrize("name", ["d/x", "d/x\udcff", "d/" + "x" * 300, "d/" + "x/" * 100 + "x", "d/../x"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.CONTTYPE, b"V"])
def test_what_is_too_large_is_refused_before_it_is_read(extraction: Extraction, tmp_path: Path, name: str, kind: bytes) -> None:
    source = Endless(headers(folder("d"), huge(name, kind)))
    with pytest.raises(ArtifactError, match="larger"):
        extraction.keep(source, True)
    assert source.count <= COPY_BYTES
    assert not (tmp_path / "r.partial").exists()


def test_what_is_skipped_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "MAX_ARTIFACT_ENTRIES", 5)
    extraction = Extraction(tmp_path, "r", 1000, ready)
    skipped = file("d/\udcff", bytes(600))
    assert extraction.keep(tar_of(folder("d"), skipped, file("d/a", b"abc")), True) == {"bytes": 3, "skipped": 1}
    with pytest.raises(ArtifactError, match="larger"):
        extraction.keep(tar_of(file("b", bytes(398))), False)
    with pytest.raises(ArtifactError, match="more files and folders"):
        extraction.keep(tar_of(folder("d"), *[special(f"d/{n}", tarfile.SYMTYPE, "x") for n in range(4)]), True)
    links = [special(f"d/{number}", tarfile.FIFOTYPE) for number in range(2)]
    assert extraction.keep(tar_of(folder("d"), *links, file("d/b", bytes(397))), True) == {"bytes": 397, "skipped": 2}
    with pytest.raises(ArtifactError, match="more files and folders"):
        extraction.keep(tar_of(file("c", b"")), False)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_is_too_large_is_not_held(extraction: Extraction, kind: bytes) -> None:
    source = Endless(headers(folder("d"), huge("x", kind, 8 << 30)))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="broken"):
        extraction.keep(source, True)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert source.count < 4 << 20


class Ends(Exception):
    """What a check raises."""


@pytest.mark.parametrize("error", [Ends(), ArtifactError("no time"), OSError("of the check"), tarfile.ReadError("of the check")])
@pytest.mark.parametrize("kept_before", [False, True])
def test_a_check_between_pieces_ends_it(tmp_path: Path, error: Exception, kept_before: bool) -> None:
    """At the latest after COPY_BYTES, whatever is read, skipped or copied; and nothing is left."""
    large = [file("d/a", bytes(2 << 20)), file("d/\udcff", bytes(2 << 20)), special("d/b", tarfile.LNKTYPE, "d/a")]
    tar, calls, last = tar_of(folder("d"), *large), 0, 10**9

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls >= last:
            raise error

    before = {"r": None, "r/first": b"x"} if kept_before else {}
    Extraction(tmp_path / "all", "r", 1 << 30, check)
    (tmp_path / "all").mkdir()
    Extraction(tmp_path / "all", "r", 1 << 30, check).keep(tar, True)
    assert calls >= 3 * (2 << 20) // COPY_BYTES
    for number in range(1, calls + 1):
        tar.seek(0)
        root = tmp_path / str(number)
        root.mkdir()
        calls, last = 0, 10**9
        extraction = Extraction(root, "r", 1 << 30, check)
        if kept_before:
            extraction.keep(tar_of(file("first")), False)
        calls, last = 0, number
        with pytest.raises(type(error)) as raised:
            extraction.keep(tar, True)
        assert raised.value is error
        assert kept(root) == before


def test_errors_of_the_engine_pass(extraction: Extraction, tmp_path: Path) -> None:
    error = ConnectionResetError("by the engine")

    class Breaks(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            if self.tell() >= 1024:
                raise error
            return super().read1(512)

    with pytest.raises(ConnectionResetError) as raised:
        extraction.keep(Breaks(tar_of(folder("d"), file("d/a", bytes(900))).getvalue()), True)
    assert raised.value is error
    assert kept(tmp_path) == {}


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=40", "tmpfs", str(tmp_path)], check=True)
    try:
        extraction = Extraction(tmp_path, "r", 1 << 30, ready)
        for tar in (
            tar_of(folder("d"), file("d/a"), file("d/b", bytes(2 << 20))),
            tar_of(folder("d"), *[file(f"d/{number}") for number in range(50)]),
            tar_of(folder("d"), *[folder(f"d/{number}") for number in range(50)]),
            tar_of(folder("d"), file("d/a", bytes(600 << 10)), special("d/b", tarfile.LNKTYPE, "d/a")),
        ):
            with pytest.raises(ArtifactError, match="No space left on device"):
                extraction.keep(tar, True)
            assert kept(tmp_path) == {}
        assert extraction.keep(tar_of(file("a")), False) == {"bytes": 1}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


NAMES_AND_BYTES = r"""
import io, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
from test_artifacts import *
root = Path(sys.argv[2])
extraction = Extraction(root, "r", 1000, ready)
tar = tar_of(folder("d"), file("d/\u00e9", b"1"), folder("d/\u20ac"), file("d/\u20ac/\U0001f600", b"22"), file("d/\udcff"))
assert extraction.keep(tar, True) == {"bytes": 3, "skipped": 1}
assert extraction.keep(tar_of(file("\u00fc", b"3")), False) == {"bytes": 1}
try:
    extraction.keep(tar_of(file("\u00fc", b"3")), False)
except ArtifactError as error:
    assert "\u00fc" in str(error)
for entry in extraction.artifacts:
    opened = open_artifact(root / "r", entry["path"])
    assert len(opened.read() if opened else b"") == entry["bytes"]
assert len(b"".join(artifacts_tar(root / "r", extraction.artifacts))) > 4000
print(ascii(sys.getfilesystemencoding()))
"""


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "utf-8"])
def test_names_are_utf8_on_the_disk_whatever_the_locale(tmp_path: Path, encoding: str) -> None:
    locales = tmp_path / "locales"
    environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LOCPATH": str(locales)}
    locales.mkdir()
    environment["LC_ALL"] = {"ascii": "POSIX", "iso8859-1": "latin", "utf-8": "C.UTF-8"}[encoding]
    if encoding == "iso8859-1":
        subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locales / "latin")], check=True, capture_output=True)
    (tmp_path / "root").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", NAMES_AND_BYTES, str(ROOT), str(tmp_path / "root")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == (repr(encoding), 0), done.stderr
    assert kept(tmp_path / "root/r") == {"é": b"1", "€": None, "€/😀": b"22", "ü": b"3"}


@pytest.mark.parametrize("second", [tar_of(folder("d"), file("d/b"), file("d/a")), tar_of(folder("d"), folder("d/a"))])
def test_a_name_that_collides_is_an_error_and_the_first_stays(extraction: Extraction, tmp_path: Path, second: io.BytesIO) -> None:
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


HEADERS = st.builds(
    lambda name, kind, size, mode, link, pax, content: _raw(name, kind, size, mode, link, pax) + content,
    st.sampled_from(["d", "d/a", "d/a/b", "d/b", "d/../x", "/d/a", "d/é", "d/\udcff", "", "d/" + "x" * 300, "d/" + "x/" * 70]),
    st.sampled_from([bytes([kind]) for kind in b"01234567xgLKSVX\0"]) | st.binary(min_size=1, max_size=1),
    st.sampled_from([0, 1, 511, 512, 513, 1001, 1 << 40]) | st.integers(0, 1000),
    st.sampled_from([0, 0o644, 0o755, 0o7777]),
    st.sampled_from(["", "d/a", "d/b", "/etc/passwd", "..", "d"]),
    st.dictionaries(
        st.sampled_from(["path", "linkpath", "size", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major",
                         "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name", "GNU.sparse.numblocks", "mtime"]),
        st.sampled_from(["d/a", "-1", "0", "1", "5", "1,2", "x", "-512", "99999999999999", "1e400", "BINARY"]), max_size=4,
    ),
    st.sampled_from([b"", bytes(512), b"x" * 512, b"10 path=a\n".ljust(512, b"\0"), b"1\n0\n5\n".ljust(1024, b"\0")]),
)  # fmt: skip


def _raw(name: str, kind: bytes, size: int, mode: int, link: str, pax: dict[str, str]) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.linkname, info.pax_headers = kind, size, mode, link, pax
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def is_kept_or_refused(root: Path, tar: bytes, folder: bool) -> None:
    """Nothing else happens, and nothing outside of the folder."""
    extraction = Extraction(root, "r", 1000, ready)
    try:
        size = extraction.keep(io.BytesIO(tar), folder)["bytes"]
    except ArtifactError:
        size = 0
        assert extraction.artifacts == []
    assert {path.name for path in root.iterdir()} <= {"r"}
    found = kept(root / "r") if size or extraction.artifacts else {}
    assert {entry["path"]: entry["bytes"] for entry in extraction.artifacts} == {
        path: len(content or b"") for path, content in found.items()
    }
    assert sum(len(content or b"") for content in kept(root).values()) == size <= 1000


@given(st.lists(HEADERS, max_size=6).map(b"".join), st.sampled_from([b"", bytes(1024)]), st.booleans())
def test_any_members_are_kept_or_refused(tmp_path_factory: pytest.TempPathFactory, tar: bytes, end: bytes, folder: bool) -> None:
    is_kept_or_refused(tmp_path_factory.mktemp("any"), tar + end, folder)


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_are_kept_or_refused(tmp_path_factory: pytest.TempPathFactory, tar: bytes, folder: bool) -> None:
    is_kept_or_refused(tmp_path_factory.mktemp("any"), tar, folder)


@given(st.data())
def test_a_damaged_tar_is_kept_in_its_folder_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("damaged")
    tar = bytearray(tar_of(folder("d"), file("d/é" * 60, bytes(700)), special("d/l", tarfile.SYMTYPE, "x")).getvalue()[:6000])
    for at in data.draw(st.lists(st.integers(0, len(tar) - 1), min_size=1, max_size=4)):
        tar[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # with a checksum that fits
        tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + sum(tar[156:512]) + 256)
    is_kept_or_refused(root, bytes(tar), data.draw(st.booleans()))


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
    again = {name: content for name, _, content in members(tar, (0, 0))}
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
        ("a b.txt", 'attachment; filename="a b.txt"'),
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
