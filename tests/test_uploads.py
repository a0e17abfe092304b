"""Files as people have them, before an engine sees them: multipart/form-data, an uploaded tar, trees of files."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import os
import random
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bottle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightrun
from lightrun import MAX_RUN_PART_BYTES, BadRequest, Entry, NotFound, RunRequest, Settings, Tree, Upload

BOUNDARY = "----lightrun-tests"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
RUN = b'{"image": "busybox"}'
UUID = "0e2b3c4d-0000-4000-8000-000000000001"


def form(*parts: tuple[str, bytes], boundary: str = BOUNDARY, end: bool = True) -> bytes:
    """A body as curl writes it."""
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in parts
    ]
    return b"".join(lines) + (f"--{boundary}--\r\n".encode() if end else b"")


def upload(*parts: tuple[str, bytes], kind: str = TYPE) -> Upload:
    """What lightrun makes of some parts."""
    return Upload.parse(io.BytesIO(form(*parts)), kind)


def message(error: pytest.ExceptionInfo[BadRequest]) -> str:
    """Everything that a client is told."""
    return json.dumps(error.value.more["details"])


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> Any:
    """A member of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode, info.mtime = kind, len(content), target, mode, 1_600_000_000
    return info, content


def tar(*members: Any, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tree(*parts: tuple[str, bytes], request: bytes = RUN, artifacts: Any = None, root: Path = Path("/nowhere")) -> Tree:
    """The tree of a request with an upload."""

    def none(_run_id: str) -> list[dict[str, Any]]:
        raise NotFound

    sent = upload(("run", request), *parts)
    return Tree(RunRequest.parse(request, Settings(), upload=sent), sent, root, artifacts or none)


def fastest(call: Callable[[], Any]) -> float:
    """The least processor time, in seconds, that a call takes."""
    times = []
    for _ in range(5):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


# ---------------------------------------------------------------- multipart/form-data


def test_the_parts_are_found_where_they_are() -> None:
    sent = upload(("run", RUN), ("tar", b"T" * 70_000), ("a/b", b""), ("é.txt", b"\r\n--\r\n"))
    assert sent.run
    assert sent.read(sent.run) == RUN
    assert {name: sent.read(part) for name, part in sent.files.items()} == {"a/b": b"", "é.txt": b"\r\n--\r\n"}
    assert sent.tar
    assert sent.tar.size == 70_000
    assert {len(piece) for piece in sent.pieces(sent.tar)} == {70_000}


CONTENTS = st.lists(st.sampled_from([b"\r\n--", BOUNDARY.encode(), b"--", b"\r", b"\n", b"x", b"\0", b"--\r\n", b"a" * 300])).map(
    b"".join
)


@given(st.lists(CONTENTS, max_size=6), st.integers(1, 200))
def test_any_content_comes_through_in_pieces_of_any_size(contents: list[bytes], piece: int) -> None:
    """The same as bottle's own parser says, which reads lines. A content that holds a whole delimiter is nobody's to tell."""
    delimiters = tuple(f"\r\n--{BOUNDARY}{end}".encode() for end in ("\r\n", "--"))
    contents = [each for each in contents if not any(delimiter in b"\r\n" + each + b"\r\n" for delimiter in delimiters)]
    parts = [("run", RUN), *((f"f{index}", each) for index, each in enumerate(contents))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightrun, "COPY_BYTES", piece)
        sent = upload(*parts)
    assert [(name, sent.read(part)) for name, part in sent.files.items()] == parts[1:]
    theirs = bottle._MultipartParser(io.BytesIO(form(*parts)), BOUNDARY)
    assert [part.name for part in theirs.parse()] == [name for name, _ in parts]


@given(st.binary(max_size=400), st.integers(0, 400))
def test_bytes_of_any_kind_are_a_form_or_a_400(noise: bytes, at: int) -> None:
    good = form(("run", RUN), ("x", b"content"))
    for body in (noise, good[:at], good[:at] + noise, good[:at] + noise + good[at:]):
        try:
            sent = Upload.parse(io.BytesIO(body), TYPE)
        except BadRequest:
            continue
        assert sent.run
        assert all(0 <= part.start <= part.start + part.size <= len(body) for part in [sent.run, *sent.files.values()])


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (form(("x", b"")), TYPE, "no part named run"),
        (form(("run", RUN), ("run", RUN)), TYPE, "run stands twice"),
        (form(("run", RUN), ("a", b""), ("a", b"")), TYPE, "a stands twice"),
        (form(("run", RUN), end=False), TYPE, "cut short"),
        (form(("run", RUN)), "multipart/form-data", "no boundary"),
        (form(("run", RUN)), "multipart/form-data; boundary=" + "x" * 71, "no boundary"),
        (form(("run", RUN)), "multipart/form-data; boundary=other", "cut short"),
        (form(("run", RUN), boundary="x"), "multipart/form-data; boundary=x; a*0=1; a*=2", "not what its Content-Type says"),
        (form(("run", RUN), boundary="x"), "multipart/form-data; boundary=x" + "; a=1" * 101, "too many parameters"),
        (form(("run", RUN)).replace(b'"x"', b'"x"; a*0=1; a*=2'), TYPE, "not what its Content-Type says"),
        (form(("run", RUN)).replace(b'"x"', b'"x"' + b"; a=1" * 101), TYPE, "too many parameters"),
        (b"preamble" + form(("run", RUN)), TYPE, "does not begin with its boundary"),
        (form(("run", RUN)) + b"epilogue", TYPE, "follows its last boundary"),
        (form(("run", RUN)).replace(b'name="run"; ', b""), TYPE, "has no name"),
        (form(("run", RUN)).replace(b"form-data", b"attachment"), TYPE, "has no name"),
        (form(("run", RUN)).replace(b'"run"', b'"r\xff"'), TYPE, "not UTF-8"),
        (form(("run", RUN)).replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1), TYPE, "Encoding"),
        (form(("run", RUN)).replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 9000 + b"\r\n\r\n", 1), TYPE, "too long"),
        (b"", TYPE, "cut short"),
    ],
)
def test_what_is_no_form_is_refused_with_a_reason(body: bytes, kind: str, says: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        Upload.parse(io.BytesIO(body), kind)
    assert says in message(refusal)


def test_a_quoted_boundary_and_a_first_empty_line_are_fine() -> None:
    body = b"\r\n" + form(("run", RUN), boundary="a b'c")
    sent = Upload.parse(io.BytesIO(body), 'multipart/form-data; charset=x; boundary="a b\'c"')
    assert sent.run
    assert sent.read(sent.run) == RUN


def test_the_json_beside_an_upload_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "MAX_RUN_PART_BYTES", 10)
    with pytest.raises(BadRequest) as refusal:
        upload(("run", RUN))
    assert "10 bytes" in message(refusal)
    assert MAX_RUN_PART_BYTES == 64 << 20


def test_a_digest_is_of_the_parts_and_not_of_the_boundary() -> None:
    parts = [("run", RUN), ("tar", tar()), ("a", b"1"), ("b", b"2")]
    mine = upload(*parts).digest()
    other = form(*parts, boundary="other")
    assert Upload.parse(io.BytesIO(other), "multipart/form-data; boundary=other").digest() == mine
    changed = [parts[:3], [*parts[:3], ("b", b"3")], [*parts[:3], ("c", b"2")], [parts[0], *parts[2:]], [*parts, ("c", b"")],
               [parts[0], parts[1], parts[3], parts[2]], [parts[0], ("tar", b"12"), parts[2]]]  # fmt: skip
    digests = {mine, *(upload(*each).digest() for each in changed)}
    assert len(digests) == len(changed) + 1


def test_a_large_part_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "body"
    with path.open("wb") as file:
        head, rest = form(("run", RUN), ("big", b"@")).split(b"@")
        file.write(head)
        for _ in range(64):
            file.write(os.urandom(1 << 20))
        file.write(rest)
    tracemalloc.start()
    with path.open("rb") as file:
        sent = Upload.parse(file, TYPE)
        assert sent.files["big"].size == 64 << 20
        assert sum(map(len, sent.pieces(sent.files["big"]))) == 64 << 20
        sent.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_body_full_of_what_is_almost_its_boundary_takes_time_as_its_size() -> None:
    def took(count: int) -> float:
        body = form(("run", RUN), ("x", b"\r\n--X." * count), boundary="X")
        return fastest(lambda: Upload.parse(io.BytesIO(body), "multipart/form-data; boundary=X"))

    assert took(40_000) < 8 * took(10_000)


@pytest.mark.parametrize(
    ("name", "says"),
    [("../x", "relative path"), ("/etc/passwd", "relative path"), ("a//b", "relative path"), ("a\\b", "relative path"),
     ("x" * 256, "255 bytes"), ("there", "JSON too"), ("there/x", "both a file and a folder")],
)  # fmt: skip
def test_a_part_has_the_name_of_a_file(name: str, says: str) -> None:
    request = b'{"image": "busybox", "files": {"there": ""}}'
    sent = upload(("run", request), (name.replace("\\", "\\\\"), b""))
    with pytest.raises(BadRequest) as refusal:
        RunRequest.parse(request, Settings(), upload=sent)
    assert says in message(refusal)


# ---------------------------------------------------------------- An uploaded tar


def refused(*members: Any, form: int = tarfile.GNU_FORMAT) -> str:
    """What is said of a tar of these members."""
    with pytest.raises(BadRequest) as refusal:
        tree(("tar", tar(*members, form=form))).check()
    return message(refusal)


def sparse() -> Any:
    """A file with a hole, as `tar -S` writes it: old GNU's own type."""
    info, content = member("holes")
    info.type = tarfile.GNUTYPE_SPARSE
    return info, content


@pytest.mark.parametrize(
    ("members", "name", "says"),
    [
        ([member("/etc/x")], "/etc/x", "absolute"),
        ([member("../x")], "../x", ".. segment"),
        ([member("a/../../x")], "a/../../x", ".. segment"),
        ([member("n", kind=tarfile.CHRTYPE)], "n", "neither a file"),
        ([member("n", kind=tarfile.BLKTYPE)], "n", "neither a file"),
        ([member("n", kind=tarfile.FIFOTYPE)], "n", "neither a file"),
        ([sparse()], "holes", "sparse"),
        ([member("l", kind=tarfile.SYMTYPE, target="/etc")], "l", "leads out"),
        ([member("l", kind=tarfile.SYMTYPE, target="../..")], "l", "leads out"),
        ([member("a/l", kind=tarfile.SYMTYPE, target="../../x")], "a/l", "leads out"),
        ([member("l", kind=tarfile.SYMTYPE, target="l")], "l", "leads out"),
        ([member("h", kind=tarfile.LNKTYPE, target="none")], "h", "hard link"),
        ([member("h", kind=tarfile.LNKTYPE, target="../x")], "h", "hard link"),
        ([member("d", kind=tarfile.DIRTYPE), member("h", kind=tarfile.LNKTYPE, target="d")], "h", "hard link"),
        ([member("a"), member("./a")], "a", "twice"),
        ([member("a", kind=tarfile.DIRTYPE), member("a/", kind=tarfile.DIRTYPE)], "a", "twice"),
        ([member("a"), member("a/b")], "a/b", "not a folder"),
        ([member("a/b"), member("a")], "a", "both a file and a folder"),
        ([member("l", kind=tarfile.SYMTYPE, target="d"), member("l/x")], "l/x", "not a folder"),
        ([member("x" * 256)], "x" * 20, "255"),
        ([member("/".join(["d" * 200] * 21))], "d" * 20, "4000 bytes"),
        ([member(".")], ".", "workdir itself"),
        ([member("./")], "./", "workdir itself"),
        ([member("./", kind=tarfile.SYMTYPE, target="x")], "./", "workdir itself"),
        ([member("./.", kind=tarfile.LNKTYPE, target="fine")], "./.", "workdir itself"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_cannot_be_taken_is_refused_by_member(members: list[Any], name: str, says: str, form: int) -> None:
    said = refused(member("fine"), *members, form=form)
    assert json.dumps(name)[1:-1] in said
    assert says in said


def test_a_link_through_another_link_is_followed_to_the_end() -> None:
    """`s` goes up two folders, so what looks like `a/b/x` leads out."""
    up = member("a/b/s", kind=tarfile.SYMTYPE, target="../..")
    assert "a/b/e" in refused(up, member("a/b/e", kind=tarfile.SYMTYPE, target="s/../x"))
    tree(("tar", tar(up, member("a/b/e", kind=tarfile.SYMTYPE, target="s/a/x")))).check()


def test_many_links_that_lead_into_each_other_take_no_time() -> None:
    links = [member(f"l{n}", kind=tarfile.SYMTYPE, target=f"l{n + 1}/" * 30 + "x") for n in range(500)]
    assert "leads out" in refused(*links)


@pytest.mark.parametrize(
    ("content", "says"),
    [(gzip.compress(tar(member("a")), mtime=0), "gzip"), (lzma.compress(tar(member("a"))), "xz"),
     (b"(\xb5/\xfd" + b"x" * 600, "zstd"),
     (b"BZh9" + b"x" * 600, "bzip2"), (b"PK\3\4" + b"x" * 600, "zip"), (b"", "not a tar"), (b"x" * 2000, "not a tar"),
     (b"\0" * 100, "not a tar")],
)  # fmt: skip
def test_what_is_no_tar_is_said_to_be_none(content: bytes, says: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        tree(("tar", content)).check()
    assert says in message(refusal)
    assert says == "not a tar" or "unpacked" in message(refusal)


def test_a_tar_that_was_cut_short_is_refused_wherever_it_ends() -> None:
    whole = tar(member("a", b"x" * 700), member("b", b"y" * 700), member("d", kind=tarfile.DIRTYPE))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    assert len([*tree(("tar", whole)).entries()]) == 3
    for cut in [*range(0, end, 512), *range(100, end, 333)]:
        with pytest.raises(BadRequest):
            tree(("tar", whole[:cut])).check()


@given(st.binary(max_size=700), st.integers(0, 6000), st.randoms())
def test_a_spoilt_tar_is_good_or_a_400(noise: bytes, at: int, chance: random.Random) -> None:
    whole = bytearray(tar(member("a", b"x" * 700), member("é" * 60, b"y"), member("l", kind=tarfile.SYMTYPE, target="a"),
                          form=chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))  # fmt: skip
    whole[at : at + len(noise)] = noise
    sent = tree(("tar", bytes(whole)))
    try:
        sent.check()
    except BadRequest as error:
        lightrun.to_json(error.body())
        return
    for entry in sent.entries():
        assert sum(map(len, sent.pieces(entry.content))) == entry.size
        assert not entry.path.startswith("/")
        assert ".." not in entry.path.split("/")


def test_a_header_that_says_it_is_huge_is_not_read() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(BadRequest) as refusal:
        tree(("tar", info.tobuf() + b"x" * 4096)).check()
    assert "not a tar" in message(refusal)


def attributes(kind: bytes, content: bytes) -> bytes:
    """A tar of one file, under attributes of this kind."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE) + tar(member("a"))


def test_a_header_of_digits_only_is_refused_at_once() -> None:
    """CVE-2024-6232: an older tarfile takes time with the square of it, for the last of these half an hour."""
    for count in (4096, 1 << 20):
        with pytest.raises(BadRequest) as refusal:
            tree(("tar", attributes(tarfile.XHDTYPE, b"1" * count))).check()
        assert "digits in a row" in message(refusal)


def test_a_tar_has_few_attributes_of_its_own() -> None:
    """tarfile copies them all for each member."""
    few, many = (b"".join(b"12 k%05d=v\n" % number for number in range(count)) for count in (100, 5000))
    tree(("tar", attributes(tarfile.XGLTYPE, few))).check()
    with pytest.raises(BadRequest) as refusal:
        tree(("tar", attributes(tarfile.XGLTYPE, many))).check()
    assert "more than 100 attributes" in message(refusal)


def test_what_a_tar_says_is_kept() -> None:
    members = [member("./", kind=tarfile.DIRTYPE, mode=0o750), member("./a", b"A", mode=0o6755), member("b\udcff", b"B"),
               member("e", kind=tarfile.DIRTYPE, mode=0o700), member("h", kind=tarfile.LNKTYPE, target="./a"),
               member("s", kind=tarfile.SYMTYPE, target="./a")]  # fmt: skip
    sent = tree(("tar", tar(*members)), ("more.txt", b"more"))
    sent.check()
    found = {entry.path: entry for entry in sent.entries()}
    assert {path: (entry.kind, entry.mode, entry.target) for path, entry in found.items()} == {
        "more.txt": (tarfile.REGTYPE, 0o755, ""), "": (tarfile.DIRTYPE, 0o750, ""), "a": (tarfile.REGTYPE, 0o755, ""),
        "b\udcff": (tarfile.REGTYPE, 0o644, ""), "e": (tarfile.DIRTYPE, 0o700, ""), "h": (tarfile.LNKTYPE, 0o644, "a"),
        "s": (tarfile.SYMTYPE, 0o644, "./a"),
    }  # fmt: skip
    assert {path: b"".join(sent.pieces(entry.content)) for path, entry in found.items() if entry.size} == {
        "more.txt": b"more", "a": b"A", "b\udcff": b"B"
    }  # fmt: skip
    assert found["a"].modified == 1_600_000_000


def test_a_tree_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "MAX_ARTIFACT_ENTRIES", 50)
    tree(("tar", tar(*(member(f"f{n}") for n in range(50))))).check()
    for deep in (False, True):
        assert "more than 50" in refused(*(member(f"{n}/f" if deep else f"f{n}") for n in range(60 if not deep else 30)))


def test_the_names_of_a_tree_have_a_bound_with_all_their_folders() -> None:
    """Each of these has four megabytes of them."""
    deep = [member(f"{number}/" + "d/" * 1990 + "f") for number in range(12)]
    tree(("tar", tar(*deep[:2]))).check()
    assert "characters of names" in refused(*deep)


def test_links_that_take_too_long_to_follow_are_refused() -> None:
    """Though they lead through no other link: each takes two million steps."""
    links = [member(f"l{number}", kind=tarfile.SYMTYPE, target="d/" * 1990 + "f") for number in range(8)]
    tree(("tar", tar(*links[:3]))).check()
    assert "leads out" in refused(*links)


# ---------------------------------------------------------------- References


ARTIFACTS = [
    {"path": "d", "bytes": 0, "type": "directory"}, {"path": "d/f", "bytes": 3, "type": "file", "mode": "755"},
    {"path": "dd", "bytes": 3, "type": "file"},
]  # fmt: skip


def referring(request: dict[str, Any], root: Path = Path("/nowhere")) -> Tree:
    """The tree of a request that refers to a run with these artifacts."""

    def artifacts(run_id: str) -> list[dict[str, Any]]:
        if run_id != UUID:
            raise NotFound
        return ARTIFACTS

    parsed = RunRequest.parse(json.dumps({"image": "busybox", **request}).encode(), Settings())
    return Tree(parsed, None, root, artifacts)


def shown(entries: Iterator[Entry]) -> dict[str, tuple[bytes, int]]:
    """Kinds and modes by path."""
    return {entry.path: (entry.kind, entry.mode) for entry in entries}


def test_references_take_no_names_beside_their_own() -> None:
    """Names that sort around a folder and what is in it, in the order in which they were kept."""
    names = ["a0", "ab", "a-b", "a/b", "a/c/d", "a.b", "a", "a/c", "b", "A"]
    folders = {"a", "a/c"}
    artifacts = [{"path": name, "bytes": 0, "type": "directory" if name in folders else "file"} for name in names]

    def found(path: str) -> set[str]:
        request = {"image": "busybox", "files": {"x": {"artifact": f"{UUID}/{path}"}}}
        sent = tree(request=json.dumps(request).encode(), artifacts=lambda _: artifacts)
        sent.check()
        return set(shown(sent.entries()))

    assert found("") == {"x", *(f"x/{name}" for name in names)}
    assert found("a") == {"x", "x/b", "x/c", "x/c/d"}
    assert found("a/c") == {"x", "x/d"}
    for name in set(names) - folders:
        assert found(name) == {"x"}
    for name in ("a/bb", "a/b/c", "c", "0", "a-", "a/c/d/e"):
        with pytest.raises(BadRequest):
            found(name)


def test_many_references_to_a_run_ask_for_its_artifacts_once() -> None:
    asked, others = list[str](), UUID.replace("1", "2")

    def artifacts(run_id: str) -> list[dict[str, Any]]:
        asked.append(run_id)
        return [{"path": str(number), "bytes": 0, "type": "file"} for number in range(3000)]

    files = {f"f{number}": {"artifact": f"{(UUID, others)[number % 2]}/{number}"} for number in range(3000)}
    sent = tree(request=json.dumps({"image": "busybox", "files": files}).encode(), artifacts=artifacts)
    assert set(shown(sent.entries())) == files.keys()
    assert sorted(asked) == [UUID, others]


def test_a_reference_stands_for_a_file_a_folder_or_all(tmp_path: Path) -> None:
    (tmp_path / UUID / "d").mkdir(parents=True)
    (tmp_path / UUID / "d/f").write_bytes(b"abc")
    named = {"x": "d/f", "y": "d/", "z": ""}
    sent = referring({"files": {path: {"artifact": f"{UUID}/{name}"} for path, name in named.items()}}, tmp_path)
    sent.check()
    directory, plain = (tarfile.DIRTYPE, 0o755), (tarfile.REGTYPE, 0o644)
    assert shown(sent.entries()) == {
        "x": (tarfile.REGTYPE, 0o755), "y": directory, "y/f": (tarfile.REGTYPE, 0o755), "z": directory, "z/d": directory,
        "z/d/f": (tarfile.REGTYPE, 0o755), "z/dd": plain,
    }  # fmt: skip
    first = next(sent.entries())
    assert b"".join(sent.pieces(first.content)) == b"abc"
    referring({"stdin": {"artifact": f"{UUID}/d/f"}}).check()


@pytest.mark.parametrize(
    ("request_body", "names"),
    [
        ({"files": {"x": {"artifact": f"{UUID}/e"}}}, f"{UUID}/e"),
        ({"files": {"x": {"artifact": f"{UUID}/d/f/g"}}}, f"{UUID}/d/f/g"),
        ({"files": {"x": {"artifact": UUID.replace("1", "2") + "/"}}}, UUID.replace("1", "2")),
        ({"stdin": {"artifact": f"{UUID}/d"}}, "must name a file"),
        ({"stdin": {"artifact": f"{UUID}/"}}, "must name a file"),
        ({"stdin": {"artifact": f"{UUID}/no"}}, f"{UUID}/no"),
        ({"files": {"x": {"artifact": f"{UUID}/"}, "x/dd": "y"}}, "both a file and a folder"),
        ({"files": {"x": {"artifact": UUID}}}, "id of a run"),
        ({"files": {"x": {"artifact": f"{UUID}/../y"}}}, "id of a run"),
        ({"files": {"x": {"artifact": f"{UUID}//y"}}}, "id of a run"),
        ({"files": {"x": {"artifact": 5}}}, "type string"),
        ({"files": {"x": {"artifact": f"{UUID}/", "base64": ""}}}, "entries"),
        ({"files": {"x": {}}}, "entries"),
    ],
)
def test_a_reference_to_nothing_is_named(request_body: dict[str, Any], names: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        referring(request_body).check()
    assert names in message(refusal)


def test_a_request_with_all_kinds_of_content_is_kept() -> None:
    sent = upload(("run", RUN), ("tar", tar()), ("up", b"x"))
    body = {"image": "busybox", "files": {"a": "b", "r": {"artifact": f"{UUID}/x"}}, "stdin": {"artifact": f"{UUID}/y"},
            "extract": ["x", {"from": "y", "to": "z"}], "setup": ["true"], "entrypoint": "true"}  # fmt: skip
    request = RunRequest.parse(json.dumps(body).encode(), Settings(), upload=sent)
    assert RunRequest.unpack(request.pack(), "other") == request


def test_users_and_groups_are_found_as_a_runtime_finds_them() -> None:
    passwd = "root:x:0:0::/:\nmaker:x:1001:1002:::\nodd:x:no:1::\n:::\nmaker:x:5:5::\n"
    group = "root:x:0:\nstaff:x:50:\n"
    expected = {
        "maker": (1001, 1002), "1001": (1001, 1002), "1001:7": (1001, 7), "77": (77, 0), "77:staff": (77, 50),
        "maker:staff": (1001, 50), "maker:50": (1001, 50), "root:staff": (0, 50), "0:5": (0, 5), "nobody": (0, 0),
        "maker:no": (1001, 0),
    }  # fmt: skip
    assert {user: lightrun.user_and_group(user, passwd, group) for user in expected} == expected
    assert lightrun.user_and_group("5", "", "") == (5, 0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), st.booleans()), max_size=8))
def test_a_tree_is_one_that_a_folder_can_hold(names: list[tuple[str, str, bool]]) -> None:
    """The same answer as a folder of the system gives when the entries are made one after the other."""
    entries = [Entry(f"{top}/{name}" if deep else top) for top, name, deep in names]
    files, folders, good = set[str](), set[str](), True
    for entry in entries:
        above = set(lightrun.parent_folders(entry.path))
        good &= entry.path not in files | folders and not above & files
        files, folders = files | {entry.path}, folders | above
    assert good == (not list(itertools.islice(lightrun.tree_problems(entries), 1)))
