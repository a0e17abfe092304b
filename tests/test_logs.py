"""The log of a run against a naive model: a list of (stream, byte) pairs, of which the newest of each stream are kept."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightrun
from conftest import ROOT, eventually
from lightrun import FRAME, LINE_BYTES, STREAMS, LineEvents, Log, LogGap, frames, last_lines, log_lines, raw_log

Chunks = list[tuple[int, bytes]]
STREAM = st.sampled_from([1, 2])
CHUNKS = st.lists(st.tuples(STREAM, st.binary(max_size=40)), max_size=20)
TEXTS = st.lists(st.tuples(STREAM, st.text("ab\né", max_size=6).map(str.encode)), max_size=20)
CUTS = st.lists(st.integers(0, 60), max_size=30)
LIMITS = st.integers(1, 100)
NOWHERE = Path("/dev/null/nowhere")  # for logs that nobody follows


def framed(chunks: Chunks) -> bytes:
    """What the engine sends for these chunks."""
    return b"".join(FRAME.pack(stream, len(payload)) + payload for stream, payload in chunks)


def flat(chunks: Chunks) -> Chunks:
    """One pair for each byte."""
    return [(stream, payload[at : at + 1]) for stream, payload in chunks for at in range(len(payload))]


def newest(chunks: Chunks, limit: int) -> Chunks:
    """What is kept of them: of each stream, the last bytes."""
    left, found = {1: limit, 2: limit}, []
    for stream, byte in reversed(flat(chunks)):
        if left[stream]:
            left[stream] -= 1
            found.append((stream, byte))
    return found[::-1]


def is_long(chunks: Chunks, limit: int) -> bool:
    """Whether a stream has more than that."""
    return len(newest(chunks, limit)) < len(flat(chunks))


def pieces_of(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """`data` in pieces of these sizes, and the rest at once."""
    for size in cuts:
        yield data[:size]
        data = data[size:]
    yield data


def fed(data: bytes, cuts: list[int], limit: int, log: Log | None = None) -> Log:
    """A log that got `data` in these pieces."""
    log = log or Log(limit, NOWHERE)
    for piece in pieces_of(data, cuts):
        log.feed(piece)
    return log


# ---------------------------------------------------------------- What is kept


@given(CHUNKS, CUTS, LIMITS)
def test_the_newest_bytes_of_each_stream_are_kept_however_it_is_cut(chunks: Chunks, cuts: list[int], limit: int) -> None:
    log = fed(framed(chunks), cuts, limit)
    assert flat(list(frames(log.frames()))) == newest(chunks, limit)
    assert log.truncated == is_long(chunks, limit)
    assert not log.cut


@given(CHUNKS, CUTS, LIMITS, st.integers(0, 30))
def test_looking_changes_nothing(chunks: Chunks, cuts: list[int], limit: int, looks: int) -> None:
    """A log that is looked at in between keeps the same bytes as one that is not."""
    log = Log(limit, NOWHERE)
    for piece in pieces_of(framed(chunks), cuts):
        log.feed(piece)
        if len(piece) < looks:
            log.frames()
    assert flat(list(frames(log.frames()))) == newest(chunks, limit)


def test_a_flood_on_one_stream_takes_nothing_from_the_other() -> None:
    log = fed(framed([(1, b"precious"), *[(2, b"noise\n")] * 1000, (1, b" words")]), [], 100)
    assert raw_log(log.frames(), "stdout") == b"precious words"
    assert raw_log(log.frames(), "stderr") == (b"noise\n" * 1000)[-100:]


@given(CHUNKS, st.integers(1, 12))
def test_a_text_that_ends_within_a_frame_says_so(chunks: Chunks, missing: int) -> None:
    whole, cut = framed(chunks), framed(chunks)[:-missing]
    log = fed(cut, [], 10_000)
    assert raw_log(framed(chunks)).startswith(raw_log(log.frames()))
    assert log.cut == (cut not in {whole[:end] for end in ends_of(chunks)})
    log.feed(whole[len(cut) :])
    assert (log.cut, log.truncated, flat(list(frames(log.frames())))) == (False, False, flat(chunks))


def ends_of(chunks: Chunks) -> list[int]:
    """Where their frames end."""
    return [len(framed(chunks[:count])) for count in range(len(chunks) + 1)]


def test_memory_is_bounded_by_the_limit() -> None:
    """Nine bytes for each kept one is the worst case: one-byte frames of alternating streams."""
    log = Log(1000, NOWHERE)
    for _ in range(20):
        log.feed(framed([(1, b"x"), (2, b"y")] * 1000))
        assert len(log._kept._data) <= 2 * 2 * 9 * 1000
    assert len(log.frames()) <= 2 * 9 * 1000
    assert raw_log(log.frames()) == b"xy" * 1000


def test_neighbours_of_one_stream_are_merged() -> None:
    log = fed(framed([(1, b"a"), (1, b"b"), (2, b"c"), (1, b"d")]), [], 10)
    assert log.frames() == framed([(1, b"ab"), (2, b"c"), (1, b"d")])


# ---------------------------------------------------------------- What no engine should send


@pytest.mark.parametrize("stream", [0, 3, 4, 77, 255])
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_a_frame_of_an_unknown_stream_is_dropped_and_said(stream: int, step: int) -> None:
    data = framed([(1, b"before"), (stream, b"what is this"), (2, b"after")])
    log = Log(100, NOWHERE)
    followed = log.follow()
    assert next(followed) == b""
    for at in range(0, len(data), step):
        log.feed(data[at : at + step])
    assert log.frames() == framed([(1, b"before"), (2, b"after")])
    assert log.truncated
    with pytest.raises(LogGap):  # it may have been a frame of a known one
        list(followed)
    copy = Log(100, NOWHERE)
    copy.replace([data])
    assert (copy.frames(), copy.truncated) == (log.frames(), True)


@pytest.mark.parametrize("header", [b"\1\0\0\1\0\0\0\4", b"\1line\0\0\4", b"\2\0\0\0\xff\xff\xff\xff", b"plain text"])
def test_what_is_no_frame_is_dropped_with_all_that_follows(header: bytes) -> None:
    log = fed(framed([(1, b"good")]) + header + framed([(1, b"bad")]) * 10, [], 100)
    assert (log.frames(), log.truncated, log.cut) == (framed([(1, b"good")]), True, True)
    log.feed(framed([(1, b"worse")]))
    assert raw_log(log.frames()) == b"good"
    log.replace([framed([(1, b"good and new")])])
    assert (raw_log(log.frames()), log.truncated, log.cut) == (b"good and new", False, False)


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"\0", b"\1", b"\2", b"\3", b"x"])).map(b"".join), CUTS)
def test_any_bytes_are_taken_alike_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    log, other = fed(data, cuts, 100), fed(data, [], 100)
    assert (log.frames(), log.truncated, log.cut) == (other.frames(), other.truncated, other.cut)
    assert "".join(log_lines(log.frames())).count("x") == raw_log(log.frames()).count(b"x")
    copy = Log(100, NOWHERE)
    copy.replace(pieces_of(data, cuts))
    assert copy.truncated or list(frames(copy.frames())) == list(frames(data))


def test_a_record_with_a_frame_of_an_unknown_stream_can_be_read() -> None:
    """The first build kept such frames."""
    data = framed([(1, b"a\n"), (3, b"error"), (2, b"b")])
    assert (raw_log(data), log_lines(data)) == (b"a\nb", ["a", "b"])


@pytest.mark.parametrize("announced", [1 << 28, (1 << 30) + 1, (1 << 32) - 1])
def test_a_huge_frame_is_not_held(announced: int) -> None:
    log = Log(1000, NOWHERE)
    log.feed(FRAME.pack(1, announced))
    tracemalloc.start()
    for _ in range(100):
        log.feed(bytes(1 << 20))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
    assert most < 4 << 20
    assert log.truncated


@pytest.mark.long
@pytest.mark.parametrize(("size", "step"), [(8 << 20, 64), (200_000, 1), (64 << 20, 4096)])
def test_large_frames_in_tiny_pieces_take_linear_time(size: int, step: int) -> None:
    """A frame that was joined at each piece took hours."""
    log, data, began = Log(1 << 20, NOWHERE), framed([(1, bytes(size))]), time.process_time()
    for at in range(0, len(data), step):
        log.feed(data[at : at + step])
    assert raw_log(log.frames()) == bytes(min(size, 1 << 20))
    assert time.process_time() - began < 30


# ---------------------------------------------------------------- As bytes


@given(CHUNKS)
def test_raw_bytes_of_one_stream_or_both(chunks: Chunks) -> None:
    data = fed(framed(chunks), [], 10_000).frames()
    assert raw_log(data) == b"".join(payload for _, payload in chunks)
    for number, name in STREAMS.items():
        assert raw_log(data, name) == b"".join(payload for stream, payload in chunks if stream == number)


@given(st.text("a\n", max_size=12).map(str.encode), st.integers(0, 14))
def test_last_lines(text: bytes, count: int) -> None:
    lines = text.splitlines(keepends=True)
    assert last_lines(text, count) == b"".join(lines[len(lines) - count if count < len(lines) else 0 :])
    assert last_lines(text, None) == text


# ---------------------------------------------------------------- As lines


def naive_lines(chunks: Chunks) -> list[str]:
    """Byte by byte: a line counts when it ends, and what has no end comes last, stdout first."""
    lines, rest = [], {1: b"", 2: b""}
    for stream, byte in flat(chunks):
        if byte == b"\n":
            lines.append(rest[stream])
            rest[stream] = b""
        else:
            rest[stream] += byte
    return [line.decode(errors="replace") for line in [*lines, *filter(None, rest.values())]]


@given(TEXTS | CHUNKS)
def test_lines_are_assembled_by_stream(chunks: Chunks) -> None:
    assert log_lines(framed(chunks)) == naive_lines(chunks)


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([], []),
        ([(1, b"a\n")], ["a"]),
        ([(1, b"a")], ["a"]),
        ([(1, b"\n\n")], ["", ""]),
        ([(1, b"a\r\n")], ["a\r"]),
        ([(1, b"a\xff\n")], ["a\ufffd"]),
        ([(1, b"\xc3"), (2, b"x\n"), (1, b"\xa9\n")], ["x", "é"]),
        ([(1, b"a"), (2, b"b\n"), (1, b"c\n")], ["b", "ac"]),
    ],
)
def test_lines(chunks: Chunks, lines: list[str]) -> None:
    assert log_lines(framed(chunks)) == lines


# ---------------------------------------------------------------- As events of a live run


@given(TEXTS, st.lists(st.integers(0, 3), max_size=20))
def test_events_tell_the_same_lines(chunks: Chunks, sizes: list[int]) -> None:
    events, left, told = LineEvents(), list(chunks), []
    for size in sizes:
        told += list(events.feed(framed(left[:size])))
        left = left[size:]
    told += [*events.feed(framed(left)), *events.end()]
    assert [event["line"] for event in told] == naive_lines(chunks)
    for number, name in STREAMS.items():
        own = [event["line"] for event in told if event["stream"] == name]
        assert own == naive_lines([chunk for chunk in chunks if chunk[0] == number])


@pytest.mark.parametrize("length", [LINE_BYTES - 1, LINE_BYTES, LINE_BYTES + 1, 5 * LINE_BYTES + 3])
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("step", [1000, LINE_BYTES, 1 << 20])
def test_long_lines_come_in_marked_pieces(length: int, end: bytes, step: int) -> None:
    text = ("é" * length).encode()[:length // 2 * 2] + b"x" * (length % 2)
    events, data, told = LineEvents(), text + end, []
    for at in range(0, len(data), step):
        told += list(events.feed(framed([(1, data[at : at + step])])))
    told += list(events.end())
    assert "".join(event["line"] for event in told) == text.decode()
    assert all(len(event["line"].encode()) <= LINE_BYTES for event in told)
    assert [event.get("partial", False) for event in told] == [True] * (len(told) - 1) + [False]


@pytest.mark.long
def test_a_long_line_takes_linear_time() -> None:
    began, events = time.process_time(), LineEvents()
    assert len(list(events.feed(framed([(1, bytes(64 << 20))])))) == (64 << 20) // LINE_BYTES - 1
    assert len([0 for _ in range(100_000) for _ in events.feed(framed([(2, b"x")]))]) == 100_000 // LINE_BYTES
    assert len(log_lines(framed([(1, b"x")] * 300_000))) == 1
    assert time.process_time() - began < 20


# ---------------------------------------------------------------- Following


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """A log that may be followed."""
    return Log(100, tmp_path)


def rest_of(followed: Generator[bytes, None, None]) -> Chunks:
    """All that a follower of an ended log has yet to get, byte by byte."""
    return [pair for piece in followed for pair in flat(list(frames(piece)))]


def read(followed: Generator[bytes, None, None], size: int) -> bytes:
    """So many bytes that a follower gets next."""
    got = b""
    while len(got) < size:
        got += raw_log(next(followed))
    return got


def spool_bytes(folder: Path) -> int:
    """What the nameless files of this process take there."""
    assert list(folder.iterdir()) == []
    size = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.readlink().is_relative_to(folder):
                size += descriptor.stat().st_blocks * 512
    return size


def test_a_follower_gets_what_is_kept_and_all_that_comes(log: Log) -> None:
    log.feed(framed([(1, b"before")]))
    got: list[bytes] = []
    follower = threading.Thread(target=lambda: got.extend(log.follow()))
    other = log.follow()
    assert raw_log(next(other)) == b"before"
    follower.start()
    expected = b"before"
    for number in range(300):
        data = framed([(1 + number % 2, str(number).encode())])
        log.feed(data[:5])
        log.feed(data[5:])
        expected += str(number).encode()
    log.nudge(ended=True)
    follower.join(10)
    assert not follower.is_alive()
    assert b"before" + b"".join(map(raw_log, other)) == expected
    assert expected.endswith(b"".join(map(raw_log, got))[-100:])  # it may have begun late, when the oldest bytes were gone
    assert log.truncated


def test_a_follower_of_an_ended_log_gets_what_is_kept() -> None:
    log = fed(framed([(1, b"all")]), [], 100)
    log.nudge(ended=True)
    assert b"".join(map(raw_log, log.follow())) == b"all"


@given(CHUNKS, CUTS, st.integers(1, 60))
def test_followers_get_all_across_segments(
    tmp_path_factory: pytest.TempPathFactory, chunks: Chunks, cuts: list[int], segment: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightrun, "SEGMENT_BYTES", segment)
        log = Log(100, tmp_path_factory.getbasetemp())
        followed = log.follow()
        next(followed)
        fed(framed(chunks), cuts, 100, log)
        log.nudge(ended=True)
        assert rest_of(followed) == flat(chunks)


def test_what_all_have_read_is_given_back(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "SEGMENT_BYTES", 1 << 20)
    monkeypatch.setattr(lightrun, "MAX_BEHIND_BYTES", 1 << 30)
    quick, slow = log.follow(), log.follow()
    next(quick)
    next(slow)
    block = framed([(1, b"x" * (1 << 18))])
    for count in range(1, 41):
        log.feed(block)
        read(quick, 1 << 18)
        assert spool_bytes(tmp_path) >= count * (1 << 18)
    read(slow, 40 << 18)
    assert spool_bytes(tmp_path) <= 1 << 20
    for _ in range(100):
        log.feed(block)
        read(quick, 1 << 18)
        read(slow, 1 << 18)
        assert spool_bytes(tmp_path) <= 2 << 20
    slow.close()
    log.feed(block)
    assert read(quick, 1 << 18) == b"x" * (1 << 18)
    quick.close()
    assert spool_bytes(tmp_path) == 0
    log.feed(block)
    assert spool_bytes(tmp_path) == 0


def test_only_those_that_are_too_far_behind_are_cut_off(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightrun, "SEGMENT_BYTES", 1 << 16)
    monkeypatch.setattr(lightrun, "MAX_BEHIND_BYTES", 1 << 20)
    monkeypatch.setattr(lightrun, "READ_BYTES", 10_000)
    quick, slow, stuck = log.follow(), log.follow(), log.follow()
    for each in (quick, slow, stuck):
        next(each)
    got = {quick: bytearray(), slow: bytearray()}
    for number in range(1000):
        log.feed(framed([(1, b"%05d" % number * 2000)]))
        got[quick] += read(quick, 10_000)
        if number >= 50:  # always half a megabyte behind
            got[slow] += read(slow, 10_000)
        assert spool_bytes(tmp_path) <= (1 << 20) + (1 << 17)
    log.nudge(ended=True)
    for each in (quick, slow):
        got[each] += b"".join(map(raw_log, each))
        assert got[each] == b"".join(b"%05d" % number * 2000 for number in range(1000))
    with pytest.raises(LogGap):
        next(stuck)
    assert spool_bytes(tmp_path) == 0


def test_a_full_disk_cuts_followers_off_and_not_the_log(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        followed = [log.follow() for _ in range(2)]
        for each in followed:
            next(each)
        for _ in range(30):
            log.feed(framed([(1, b"x" * 99_999 + b"y")]))
        for each in followed:
            with pytest.raises(LogGap):
                list(each)
        assert raw_log(log.frames()) == b"x" * 99 + b"y"
        again = log.follow()
        assert raw_log(next(again)) == b"x" * 99 + b"y"
        log.feed(framed([(2, b"there is room again")]))
        assert read(again, 19) == b"there is room again"
        again.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("fault", ["no folder", "no descriptors"])
def test_a_spool_that_cannot_be_made_cuts_off_and_not_the_log(fault: str, tmp_path: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lightrun import *
log = Log(100, Path({str(tmp_path)!r}) / ("absent" if {fault!r} == "no folder" else ""))
followed = log.follow()
next(followed)
if {fault!r} == "no descriptors":
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
log.feed(FRAME.pack(1, 4) + b"text")
assert raw_log(log.frames()) == b"text"
try:
    list(followed)
except LogGap:
    print("cut off")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "cut off\n", done.stderr


def test_a_kill_leaves_no_spool(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lightrun import *
log = Log(100, Path({str(tmp_path)!r}))
followed = log.follow()
next(followed)
log.feed((FRAME.pack(1, 1 << 20) + bytes(1 << 20)) * 50)
print(next(followed)[:1], flush=True)
os.kill(os.getpid(), 9)
"""
    before = os.statvfs(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("b'\\x01'\n", -9)
    assert list(tmp_path.iterdir()) == []
    assert eventually(lambda: os.statvfs(tmp_path).f_bfree * before.f_frsize > before.f_bfree * before.f_frsize - (40 << 20))


def test_the_last_follower_takes_the_spool_away(log: Log, tmp_path: Path) -> None:
    first, second = log.follow(), log.follow()
    next(first)
    next(second)
    first.close()
    log.feed(framed([(1, b"x")]))
    assert spool_bytes(tmp_path) > 0
    assert raw_log(next(second)) == b"x"
    second.close()
    assert spool_bytes(tmp_path) == 0


# ---------------------------------------------------------------- A stream that was lost, and the engine's copy


def recut(chunks: Chunks, data: Any) -> Chunks:
    """The same bytes of each stream in other frames, and in another order between the streams."""
    rest = {stream: b"".join(payload for number, payload in chunks if number == stream) for stream in STREAMS}
    found: Chunks = []
    while any(rest.values()):
        stream, size = data.draw(st.sampled_from([stream for stream in rest if rest[stream]])), data.draw(st.integers(1, 50))
        found.append((stream, rest[stream][:size]))
        rest[stream] = rest[stream][size:]
    return found


def by_stream(pairs: Chunks) -> dict[int, bytes]:
    """The bytes of each stream."""
    return {stream: b"".join(byte for number, byte in pairs if number == stream) for stream in STREAMS}


@given(CHUNKS, st.lists(st.floats(0, 1), max_size=4), CUTS, st.integers(1, 2000), st.data())
def test_a_lost_stream_is_taken_up_where_it_was_lost(
    tmp_path_factory: pytest.TempPathFactory, chunks: Chunks, losses: list[float], cuts: list[int], limit: int, data: Any
) -> None:
    """However often, and wherever: before the first byte, within a frame, while the copy repeats what is known."""
    text, copy = framed(chunks), framed(recut(chunks, data))
    log = Log(limit, tmp_path_factory.getbasetemp())
    followed = log.follow()
    next(followed)
    for loss in losses:
        fed(text[: int(loss * len(text))], cuts, limit, log)
        log.resume()
        log.lost()
        text = copy
    fed(text, cuts, limit, log)
    log.nudge(ended=True)
    if len(copy) + len(chunks) * lightrun.ENTRY_BYTES * 40 <= 3 * limit or not losses:  # it can't have rotated
        assert by_stream(rest_of(followed)) == by_stream(flat(chunks))
        assert by_stream(flat(list(frames(log.frames())))) == by_stream(newest(chunks, limit))
        assert log.truncated == is_long(chunks, limit)
    else:
        with contextlib.suppress(LogGap):
            assert by_stream(rest_of(followed)) == by_stream(flat(chunks))
    log.replace(pieces_of(copy, cuts))
    assert by_stream(flat(list(frames(log.frames())))) == by_stream(newest(chunks, limit))


SAID = [(1, b"line %d\n" % number) for number in range(20)] + [(2, b"error\n")]
NEW = [(1, b"new\n"), (2, b"more\n")]
LAST = [(1, b"goes on")]
Lost = tuple[Log, Generator[bytes, None, None]]


@pytest.fixture
def lost(tmp_path: Path) -> Lost:
    """A log with a follower that has read all, whose stream was lost."""
    log = Log(1000, tmp_path)
    followed = log.follow()
    next(followed)
    log.feed(framed(SAID) + b"\1\0\0")  # half a header, cut off with the stream
    read(followed, len(raw_log(framed(SAID))))
    log.resume()
    log.lost()
    return log, followed


def gap(log: Log, followed: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """See that a follower was cut off; another one, of what comes now."""
    with pytest.raises(LogGap):
        list(followed)
    assert log.truncated
    again = log.follow()
    next(again)
    return again


def test_what_is_new_in_the_copy_is_told_once(lost: Lost) -> None:
    log, followed = lost
    log.feed(framed(SAID + NEW))
    assert read(followed, 9) == b"new\nmore\n"
    log.feed(framed(NEW))
    assert read(followed, 9) == b"new\nmore\n"
    log.replace([framed(SAID + NEW + NEW + NEW)])
    assert read(followed, 9) == b"new\nmore\n"
    log.nudge(ended=True)
    assert rest_of(followed) == []
    assert (log.frames(), log.truncated) == (fed(framed(SAID + NEW * 3), [], 1000).frames(), False)


@pytest.mark.parametrize(
    "copy",
    [
        SAID[3:], SAID[:-1] + NEW, [(1, b"line 0line 1\n"), *SAID[2:]], [(1, b"LINE 0\n"), *SAID[1:]], [(2, b"terror\n")],
    ],
    ids=["rotated", "without a line", "without a newline", "other bytes", "other error"],
)  # fmt: skip
def test_a_copy_that_differs_is_a_gap(lost: Lost, copy: Chunks) -> None:
    """And is not trusted later: an engine that lost a newline once will not find it."""
    log, followed = lost
    log.feed(framed(copy + NEW))
    again = gap(log, followed)
    log.feed(framed(LAST))
    assert read(again, 7) == b"goes on"
    log.replace([framed(copy + NEW + LAST)])
    log.nudge(ended=True)
    assert rest_of(again) == []
    assert by_stream(flat(list(frames(log.frames())))) == by_stream(flat(copy + NEW + LAST))
    assert log.truncated


@pytest.mark.parametrize("copy", [framed([*SAID[:5], (3, b"error"), *SAID[5:]]), framed(SAID[:3]) + b"garbled, all of it"])
def test_a_copy_that_cannot_be_understood_is_a_gap_until_it_can(lost: Lost, copy: bytes) -> None:
    log, followed = lost
    log.feed(copy + framed(NEW))
    again = gap(log, followed)
    log.resume()
    log.feed(framed(SAID + NEW + LAST))
    assert read(again, 7).endswith(b"goes on")
    log.replace([framed(SAID + NEW + LAST)])
    assert (raw_log(log.frames()), log.truncated) == (raw_log(framed(SAID + NEW + LAST)), False)


@pytest.mark.parametrize(
    "copy", [b"", framed(SAID)[:-1], framed(SAID[:3]), framed(SAID)[:4], framed(SAID[:3]) + b"<html></html>", b"null"]
)
def test_a_copy_that_is_cut_short_takes_nothing_away(lost: Lost, copy: bytes) -> None:
    log, followed = lost
    log.replace([copy])
    gap(log, followed)
    assert (raw_log(log.frames()), log.truncated) == (raw_log(framed(SAID)), True)


def test_a_copy_that_is_still_behind_at_the_end_is_a_gap(lost: Lost) -> None:
    log, followed = lost
    log.feed(framed(SAID[:3]))
    log.nudge(ended=True)
    gap(log, followed)


@pytest.mark.parametrize("copy", [SAID[3:], SAID[:-1], [(1, b"line 0line 1\n"), *SAID[2:]], SAID * 9, []])
def test_a_copy_that_tells_no_more_takes_nothing_away(tmp_path: Path, copy: Chunks) -> None:
    """The stream came to its end by itself; what an engine drops from its copy was heard all the same."""
    log = Log(1000, tmp_path)
    followed = log.follow()
    next(followed)
    log.feed(framed(SAID * 10))
    log.resume()
    log.feed(framed(copy))
    kept, truncated = log.frames(), log.truncated
    log.nudge(ended=True)
    assert not log.missed
    assert b"".join(map(raw_log, followed)) == raw_log(framed(SAID * 10))
    assert (kept, truncated) == (fed(framed(SAID * 10), [], 1000).frames(), True)


@pytest.mark.parametrize("copy", [[*SAID, *NEW], [(2, b"a long line that was not heard at all, on the other stream\n")]])
def test_a_copy_that_tells_more_was_missed(tmp_path: Path, copy: Chunks) -> None:
    log = Log(1000, tmp_path)
    log.feed(framed(SAID))
    log.resume()
    log.feed(framed(copy))
    assert log.missed


@pytest.mark.parametrize("end", [[], [(1, b"short\n")], [(1, b"short")]])
def test_a_copy_without_the_newlines_of_long_lines_tells_no_more(end: Chunks) -> None:
    """As `local` of Docker 20.10 writes it; a copy of that size may be one that has rotated, and is judged by its end."""
    long = [(1, b"%d" % number + b"x" * 16_384 + b"\n") for number in range(10)]
    copy = [(stream, line.rstrip(b"\n")) for stream, line in long]

    def missed(copy: Chunks) -> bool:
        log = fed(framed(long + end), [], 20_000)
        log.resume()
        log.feed(framed(copy))
        log.nudge(ended=True)
        return log.missed

    assert not missed(copy + end)
    assert not missed(long + end)
    assert missed([*copy[:-1], (1, copy[-1][1][:-1] + b"y")])


def test_a_copy_that_ends_within_a_frame_is_said() -> None:
    log = Log(1000, NOWHERE)
    log.replace([framed(SAID), framed(NEW)[:-1]])
    assert (raw_log(log.frames()), log.truncated) == (raw_log(framed(SAID + NEW))[:-1], True)


def test_a_copy_that_may_have_rotated_is_a_gap_even_where_it_agrees(tmp_path: Path) -> None:
    """A program that prints the same for ever: where its copy begins can't be told."""
    log, yes = Log(1000, tmp_path), framed([(1, b"y\n")])
    followed = log.follow()
    next(followed)
    log.feed(yes * 5000)
    read(followed, 10_000)
    log.resume()
    log.lost()
    log.feed(yes * 80)  # no more than fits into one file
    assert next(followed) == b""
    for _ in range(4000):
        log.feed(yes)
    again = gap(log, followed)
    log.feed(framed([(1, b"news\n")]))
    assert read(again, 5) == b"news\n"
    assert raw_log(log.frames()) == (b"y\n" * 500 + b"news\n")[-1000:]


def test_both_streams_of_a_copy_are_kept_to_the_limit() -> None:
    log = Log(1000, NOWHERE)
    log.replace([framed([(1, b"o" * 1000), (2, b"e" * 1000)])])
    assert (len(raw_log(log.frames())), log.truncated) == (2000, False)
    log.replace([framed([(1, b"o" * 1001), (2, b"e" * 1000)])])
    assert (len(raw_log(log.frames())), log.truncated) == (2000, True)
