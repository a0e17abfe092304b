"""The log of a run against a naive model: a list of (stream, byte) pairs, of which the newest are kept."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrun import FRAME, LINE_BYTES, STREAMS, LineEvents, Log, frames, last_lines, log_lines, raw_log, whole_frames

Chunks = list[tuple[int, bytes]]
STREAM = st.sampled_from([1, 2])
CHUNKS = st.lists(st.tuples(STREAM, st.binary(max_size=40)), max_size=20)
TEXTS = st.lists(st.tuples(STREAM, st.text("ab\né", max_size=6).map(str.encode)), max_size=20)
CUTS = st.lists(st.integers(0, 60), max_size=30)
LIMITS = st.integers(1, 100)


def framed(chunks: Chunks) -> bytes:
    """What the engine sends for these chunks."""
    return b"".join(FRAME.pack(stream, len(payload)) + payload for stream, payload in chunks)


def flat(chunks: Chunks) -> Chunks:
    """One pair for each byte."""
    return [(stream, payload[at : at + 1]) for stream, payload in chunks for at in range(len(payload))]


def fed(data: bytes, cuts: list[int], limit: int) -> Log:
    """A log that got `data` in pieces of these sizes, and the rest at once."""
    log = Log(limit)
    for size in cuts:
        log.feed(data[:size])
        data = data[size:]
    log.feed(data)
    return log


# ---------------------------------------------------------------- What is kept


@given(CHUNKS, CUTS, LIMITS)
def test_the_newest_bytes_are_kept_however_the_stream_is_cut(chunks: Chunks, cuts: list[int], limit: int) -> None:
    log, expected = fed(framed(chunks), cuts, limit), flat(chunks)
    assert flat(list(frames(log.frames()))) == expected[-limit:]
    assert log.truncated == (len(expected) > limit)


@given(CHUNKS, CUTS, LIMITS, st.integers(0, 30))
def test_looking_changes_nothing(chunks: Chunks, cuts: list[int], limit: int, looks: int) -> None:
    """A log that is looked at in between keeps the same bytes as one that is not."""
    log, data = Log(limit), framed(chunks)
    for size in cuts:
        log.feed(data[:size])
        data = data[size:]
        if size < looks:
            log.frames()
    log.feed(data)
    assert flat(list(frames(log.frames()))) == flat(chunks)[-limit:]


@given(CHUNKS, st.integers(1, 12))
def test_half_a_frame_is_not_shown(chunks: Chunks, missing: int) -> None:
    data = framed(chunks)[:-missing]
    whole = whole_frames(data)
    assert raw_log(fed(data, [], 10_000).frames()) == raw_log(data[:whole])
    assert len(data) - whole < FRAME.size or FRAME.unpack_from(data, whole)[1] > len(data) - whole - FRAME.size


def test_memory_is_bounded_by_the_limit() -> None:
    """Nine bytes for each kept one is the worst case: one-byte frames of alternating streams."""
    log = Log(1000)
    for _ in range(20):
        log.feed(framed([(1, b"x"), (2, b"y")] * 1000))
        assert len(log._data) <= 2 * 9 * 1000
    assert len(log.frames()) <= 9 * 1000
    assert raw_log(log.frames()) == b"xy" * 500


def test_neighbours_of_one_stream_are_merged() -> None:
    log = fed(framed([(1, b"a"), (1, b"b"), (2, b"c"), (1, b"d")]), [], 10)
    assert log.frames() == framed([(1, b"ab"), (2, b"c"), (1, b"d")])


@given(CHUNKS, CHUNKS, CUTS, LIMITS)
def test_a_recovered_log_replaces_what_was_kept(old: Chunks, new: Chunks, cuts: list[int], limit: int) -> None:
    log = fed(framed(old), [], limit)
    log.feed(b"\1")  # half a header, cut off with the stream
    log.replace(framed(new)[at : at + 7] for at in range(0, len(framed(new)), 7))
    assert flat(list(frames(log.frames()))) == flat(new)[-limit:]
    log.feed(framed(old))
    assert flat(list(frames(log.frames()))) == flat(new + old)[-limit:]


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


# ---------------------------------------------------------------- Following


def test_a_follower_gets_what_is_kept_and_all_that_comes() -> None:
    log = Log(100)
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
    assert expected.endswith(b"".join(map(raw_log, got)))  # it may have begun late, when the oldest bytes were gone
    assert log.truncated


def test_a_follower_of_an_ended_log_gets_what_is_kept() -> None:
    log = fed(framed([(1, b"all")]), [], 100)
    log.nudge(ended=True)
    assert b"".join(map(raw_log, log.follow())) == b"all"


def test_the_last_follower_takes_the_spool_away() -> None:
    log = Log(100)
    first, second = log.follow(), log.follow()
    next(first)
    next(second)
    first.close()
    log.feed(framed([(1, b"x")]))
    assert raw_log(next(second)) == b"x"
    second.close()
    assert log._spool is None
