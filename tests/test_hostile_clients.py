"""Bytes that no decent HTTP client sends: whatever comes, the answer is JSON and no 5xx, and the daemon takes no harm."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from conftest import Daemon, DaemonFactory, Response, eventually
from engine import IMAGE

MIB = 1024 * 1024
TOKEN = "correct-horse-battery-staple"
BODY_LIMIT = 4096
HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
SMUGGLED = b"GET /runs/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
# What a `POST /run` says to a body that is not a request.
BAD_REQUEST = b'{"error":"bad_request"'


def short(value: object) -> str | None:
    """The id of a parameter of any length and bytes."""
    return ascii(value[:40])[1:] if isinstance(value, (bytes, str)) else None


@contextlib.contextmanager
def unharmed(daemon: Daemon) -> Iterator[Daemon]:
    """Hand out a daemon and look, at the end, for what the tests left of it. (Its fixture looks for tracebacks.)"""
    process = psutil.Process(daemon.pid)
    for run in [daemon.detach(entrypoint="true", network="none") for _ in range(3)]:
        daemon.wait(run)
    assert eventually(lambda: not daemon.containers())
    descriptors, threads, memory = process.num_fds(), process.num_threads(), process.memory_info().rss
    yield daemon
    assert daemon.healthy()
    assert eventually(lambda: process.num_fds() <= descriptors + 40), "descriptors stay open"
    assert eventually(lambda: process.num_threads() <= threads + 5), "threads stay"
    assert process.memory_info().rss - memory < 30 * MIB
    assert not re.findall(r"^.* 5\d\d \d+ ms$|^.*: 5\d\d$", daemon.log(), re.MULTILINE)


@pytest.fixture(scope="module")
def lightrun_open(module_daemon: DaemonFactory) -> Iterator[Daemon]:
    """A daemon without a token, on a loopback address."""
    with unharmed(module_daemon("--body-limit", str(BODY_LIMIT))) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def lightrun_guarded(module_daemon: DaemonFactory) -> Iterator[Daemon]:
    """A daemon with a token."""
    with unharmed(module_daemon("--token", TOKEN, "--body-limit", str(BODY_LIMIT))) as daemon:
        yield daemon


def send(connection: socket.socket, raw: bytes) -> None:
    """Send as much as the daemon takes."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(raw)


def exchange(daemon: Daemon, raw: bytes) -> Response:
    """Send bytes and read one answer, which must be JSON if it has a body."""
    with daemon.connect(timeout=10) as connection:
        send(connection, raw)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            answer = Response(response.status, response.headers, response.read())
    if answer.body:
        assert answer.headers["Content-Type"] == "application/json"
        assert isinstance(answer.json(), (dict, list))
    return answer


def everything(daemon: Daemon, raw: bytes, quiet: float = 1) -> bytes:
    """Send bytes and read all that comes until the daemon closes the connection, or says nothing for `quiet` seconds."""
    received = b""
    with daemon.connect(timeout=quiet) as connection:
        send(connection, raw)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                received += piece
    return received


def statuses(received: bytes) -> list[int]:
    """The statuses of several answers."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


def post(body: bytes, *headers: bytes) -> bytes:
    """`POST /run` with these headers, as bytes."""
    return b"POST /run HTTP/1.1\r\n" + HOST + JSON + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


# ---------------------------------------------------------------- Requests that are none


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\r\n\r\n",
        bytes(range(14, 256)) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /runs\r\n\r\n",
        b"GET  /runs HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /runs HTTP/1.1 \x00\r\n" + HOST + b"\r\n",
        b"get /runs HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /ru ns HTTP/1.1\r\n" + HOST + b"\r\n",
        b"G\xc3\x89T /runs HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /runs HTTP/1\r\n" + HOST + b"\r\n",
        b"GET /runs HTTP/-1.1\r\n" + HOST + b"\r\n",
        b"GET /runs HTTP/11.1\r\n" + HOST + b"\r\n",
        b"GET /runs FTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://[::1 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://[x]/runs HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET //[/runs HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /runs\rx HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b": empty\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X\t: a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X\0: a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X: a\nY: b\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X: a\rY: b\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n" + HOST + b"X\xe9: a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\n folded: a\r\n" + HOST + b"\r\n",
    ],
    ids=short,
)
def test_what_is_no_request_is_refused(lightrun_open: Daemon, raw: bytes) -> None:
    answer = exchange(lightrun_open, raw)
    assert answer.status in (400, 403, 404)
    assert answer.json()["error"] in ("bad_request", "forbidden", "not_found")


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: \xff\xfe\x80\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"X:\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"".join(b"X-%d: a\r\n" % number for number in range(3000)) + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 3000 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"Range: bytes=" + b"0-1," * 5000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"Accept: " + b"a/b;q=0.1," * 5000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close, keep-alive, upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"Expect: 200-ok\r\n\r\n",
        b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n",
        b"\r\n\r\nGET /health HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://localhost/health HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /%68ealth HTTP/1.1\r\n" + HOST + b"\r\n",
    ],
    ids=short,
)
def test_what_is_strange_but_sound_is_answered(lightrun_open: Daemon, raw: bytes) -> None:
    assert exchange(lightrun_open, raw).status == 200


@pytest.mark.parametrize("method", ["FOO", "!#$%", "TRACE", "CONNECT", "OPTIONS", "PUT", "A" * 5000], ids=short)
def test_other_methods_are_not_taken(lightrun_open: Daemon, method: str) -> None:
    answer = exchange(lightrun_open, f"{method} /runs HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (answer.status, answer.json()["error"]) == (405, "method_not_allowed")
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "path",
    [
        b"/%", b"/%zz", b"/%00", b"/%ff", b"/\xff\xfe", b"/runs/%ff", b"/runs/\xc3\x28", b"/runs/%00",
        b"/runs/%0d%0aX:%20a", b"/runs/" + b"a" * 50_000, b"/runs/" + b"%2e%2e/" * 5000, b"/" * 50_000,
        b"//evil.example/runs", b"*", b"/runs/x/artifacts/" + b"a/" * 20_000, b"/runs/x/artifacts/../../../etc/passwd",
        b"/runs/x/artifacts/%2e%2e/a", b"/runs/x/artifacts/..%2fa", b"/runs/x/artifacts/\xf0\x9f\x92\xa9",
        b"/runs/x/artifacts/%00", b"/RUNS", b"/runs/", b"/runs/..%5c", b"/runs;a=b", b"/health/", b"/run#", b"/run",
    ],
    ids=short,
)  # fmt: skip
def test_strange_paths(lightrun_open: Daemon, path: bytes) -> None:
    answer = exchange(lightrun_open, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.status in (400, 404, 405)


@pytest.mark.parametrize(
    "query",
    [
        b"%", b"%ff", b"=", b"&", b"&&&=", b"limit", b"limit=", b"limit=1&limit=2", b"limit=%00", b"limit=1%00",
        b"limit=\xff", b"limit=1_0", b"limit=+1", b"limit=" + b"9" * 5000, b"limit=0", b"limit=-1", b"limit=1001",
        b"limit=1.0", b"limit=0x10", b"limit=%D9%A1", b"status[]=running", b"status=RUNNING", b"a=" + b"b" * 50_000,
        b"a=1&" * 10_000, b";" * 5000, b"before=" + b"a" * 101, b"before=%00", b"before=nobody", b"LIMIT=1",
        b"limit=1#", b"limit=1?limit=2",
    ],
    ids=short,
)  # fmt: skip
def test_strange_queries(lightrun_open: Daemon, query: bytes) -> None:
    answer = exchange(lightrun_open, b"GET /runs?" + query + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.status in ((200, 400) if query in (b"&", b"limit=1#") else (400,))


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"a" * 100_000 + b": a\r\n\r\n",
        b"GET /runs?" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"a" * 100_000,
        b"\0" * 100_000,
    ],
    ids=["value", "many", "name", "query", "path", "letters", "zeros"],
)
def test_headers_that_are_too_large(lightrun_open: Daemon, lightrun_guarded: Daemon, raw: bytes) -> None:
    for daemon in (lightrun_open, lightrun_guarded):
        answer = exchange(daemon, raw)
        assert (answer.status, answer.json()) == (431, {"error": "headers_too_large"})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"1", b'"a"', b"{", b"[" * 4000, b'{"image":' * 400, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"{}" * 2,
        b"NaN", b'{"image": "a", "image": "b"}', b'{"image": "\\ud800"}', b'{"image": "a\\u0000"}', b'{"timeout": 1e999}',
        b'{"timeout": ' + b"9" * 4000 + b"}", b"\x1f\x8b\x08\0\0\0\0\0", b"image=a", b"--x\r\n\r\n--x--",
    ],
    ids=short,
)  # fmt: skip
def test_bodies_that_are_no_request(lightrun_open: Daemon, body: bytes) -> None:
    answer = exchange(lightrun_open, post(body, b"Content-Length: %d" % len(body)))
    assert (answer.status, answer.json()["error"]) == (400, "bad_request")
    assert answer.json()["details"]


# ---------------------------------------------------------------- Where a body ends


def assert_one_refusal(daemon: Daemon, raw: bytes, *allowed: int) -> None:
    """The daemon refuses a request and closes the connection: what follows is not taken for another request."""
    received = everything(daemon, raw + SMUGGLED)
    assert len(statuses(received)) == 1, received
    assert statuses(received)[0] in allowed, received


@pytest.mark.parametrize(
    "lengths",
    [
        [b"5", b"5"], [b"5", b"6"], [b"5, 5"], [b"-1"], [b"+5"], [b"5_0"], [b"0x5"], [b"5 5"], [b"5;5"], [b"\xd9\xa5"], [b"five"],
        [b"5.0"], [b"1e1"], [b""], [b"5,"], [b"\x0b5"], [b"5\x0c"], [b"9" * 5000], [b"\xb2"],
    ],
)  # fmt: skip
def test_content_lengths_that_are_none(lightrun_open: Daemon, lengths: list[bytes]) -> None:
    headers = [b"Content-Length: " + length for length in lengths]
    assert_one_refusal(lightrun_open, post(b"{}   ", *headers), 400, 413)


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 0"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked, chunked"],
        [b"Transfer-Encoding: chunked, identity"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: xchunked"],
        [b"Transfer-Encoding: \x0bchunked"],
        [b"Transfer-Encoding: chunked\x0c"],
        [b"Transfer-Encoding: chunked;q=1"],
        [b'Transfer-Encoding: "chunked"'],
        [b"Transfer-Encoding: chunk\xe9d"],
        [b"Transfer-Encoding:", b"Content-Length: 5", b"Transfer-Encoding: x"],
        [b"Transfer-Encoding : chunked"],
        [b"X: a\nTransfer-Encoding: chunked"],
    ],
)
def test_transfer_encodings_that_two_servers_could_read_differently(lightrun_open: Daemon, headers: list[bytes]) -> None:
    # RFC 9112, 6.1 has 501 for a coding that is not known; everything else is 400.
    assert_one_refusal(lightrun_open, post(b"5\r\n{}   \r\n0\r\n\r\n", *headers), 400, 501)


@pytest.mark.parametrize(
    "head",
    [b"POST /run HTTP/1.0\r\nConnection: keep-alive\r\n", b"POST /run HTTP/0.9\r\n", b"POST /run HTTP/2.0\r\n"],
    ids=["1.0", "0.9", "2.0"],
)
def test_chunks_are_only_known_to_http_1_1(lightrun_open: Daemon, head: bytes) -> None:
    raw = head + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}   \r\n0\r\n\r\n"
    assert_one_refusal(lightrun_open, raw, 400, 501, 505)


@pytest.mark.parametrize(
    "chunks",
    [
        b"-5\r\n{}   \r\n0\r\n\r\n", b"+5\r\n{}   \r\n0\r\n\r\n", b"0x5\r\n{}   \r\n0\r\n\r\n",
        b"5_0\r\n{}   \r\n0\r\n\r\n", b"g\r\n{}\r\n0\r\n\r\n", b" 5\r\n{}   \r\n0\r\n\r\n", b"5\r\n{}   0\r\n\r\n",
        b"5\r\n{}     \r\n0\r\n\r\n", b";a\r\n{}\r\n0\r\n\r\n", b"\xd9\xa5\r\n{}   \r\n0\r\n\r\n",
        b"5\x0b\r\n{}   \r\n0\r\n\r\n", b"\0\r\n{}\r\n0\r\n\r\n", b"5\n{}   \n0\n\n\r\n\r\n",
        b"5;\n\r\n{}   \r\n0\r\n\r\n", b"5;a=\"\r\n{}   \r\n0\r\n\r\n",
    ],
    ids=short,
)  # fmt: skip
def test_broken_chunks(lightrun_open: Daemon, chunks: bytes) -> None:
    assert_one_refusal(lightrun_open, post(chunks, b"Transfer-Encoding: chunked"), 400)


@pytest.mark.parametrize(
    "chunks",
    [
        b"5\r\n{}   \r\n0\r\n\r\n", b"00000005\r\n{}   \r\n000\r\n\r\n", b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"2;a=b\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nTrailer: a\r\nContent-Length: 100\r\n\r\n",
    ],
    ids=short,
)  # fmt: skip
def test_sound_chunks(lightrun_open: Daemon, chunks: bytes) -> None:
    health = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    received = everything(lightrun_open, post(chunks, b"Transfer-Encoding: chunked") + health)
    assert statuses(received) == [400, 200]
    assert b'"path":["image"]' in received


@pytest.mark.parametrize("size", [b"ffffffffffffffffffffffff", b"%x" % (BODY_LIMIT + 1)])
def test_a_chunked_body_that_passes_the_limit(lightrun_open: Daemon, size: bytes) -> None:
    raw = post(size + b"\r\n" + b" " * (BODY_LIMIT + 1000), b"Transfer-Encoding: chunked")
    said = f"the body has more than {BODY_LIMIT} bytes, which is --body-limit"
    assert exchange(lightrun_open, raw).json() == {"error": "too_large", "message": said}


def test_endless_chunk_headers_and_trailers_end(lightrun_open: Daemon) -> None:
    for chunks in (b"5;" + b"a" * 100_000, b"0\r\n" + b"X: a\r\n" * 20_000, b"1\r\n \r\n" * 20_000):
        assert exchange(lightrun_open, post(chunks, b"Transfer-Encoding: chunked")).status in (400, 413)


@pytest.mark.parametrize("beginning", [b"5;", b"0\r\nX: "], ids=["chunk", "trailer"])
def test_a_line_between_chunks_ends_before_the_limit_of_the_body(daemon: DaemonFactory, beginning: bytes) -> None:
    own = daemon()
    raw = post(beginning + b"a" * 100_000, b"Transfer-Encoding: chunked")
    assert first_answer(own, raw) == b"HTTP/1.1 400 Bad Request"


def test_a_body_of_the_limit_is_read(lightrun_open: Daemon) -> None:
    body = b'{"image": ""' + b" " * (BODY_LIMIT - 13) + b"}"
    assert exchange(lightrun_open, post(body, b"Content-Length: %d" % BODY_LIMIT)).status == 400
    assert exchange(lightrun_open, post(body + b" ", b"Content-Length: %d" % (BODY_LIMIT + 1))).status == 413
    sized = b"%x\r\n%s\r\n0\r\n\r\n" % (BODY_LIMIT, body)
    assert exchange(lightrun_open, post(sized, b"Transfer-Encoding: chunked")).status in (400, 413)


def test_a_body_where_none_belongs_is_not_another_request(lightrun_open: Daemon) -> None:
    raw = b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
    assert statuses(everything(lightrun_open, raw)) == [200]


# ---------------------------------------------------------------- Pipelines


def test_pipelined_requests_are_answered_in_order(lightrun_open: Daemon) -> None:
    paths = ["/health", "/nothing", "/runs", "/runs?limit=x", "/openapi.json"] * 20
    raw = b"".join(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in paths)
    assert statuses(everything(lightrun_open, raw, quiet=3)) == [200, 404, 200, 400, 200] * 20


def test_a_pipeline_ends_with_the_first_broken_request(lightrun_open: Daemon) -> None:
    health = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    received = everything(lightrun_open, health * 2 + b"broken\r\n\r\n" + SMUGGLED)
    assert statuses(received) == [200, 200, 400]


@pytest.mark.long
def test_pipelined_runs_all_run(lightrun_open: Daemon) -> None:
    body = json.dumps({"image": IMAGE, "entrypoint": "true", "network": "none", "detached": True}).encode()
    received = everything(lightrun_open, post(body, b"Content-Length: %d" % len(body)) * 3, quiet=3)
    assert statuses(received) == [202] * 3
    for run in set(re.findall(rb"Location: /runs/([\w-]+)", received)):
        assert lightrun_open.wait(run.decode())["status"] == "succeeded"


# ---------------------------------------------------------------- Connections by the hundred

BEGINNINGS = [
    b"",
    b"\r\n",
    b"G",
    b"GET /runs HTTP/1.1\r\n",
    b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /runs HTTP/1.1\r\n" + HOST + b"\r\nGET /ru",
    post(b"{", b"Content-Length: 1000"),
    post(b"5\r\n{", b"Transfer-Encoding: chunked"),
    post(b"", b"Content-Length: 1000", b"Expect: 100-continue"),
    post(b"{}", b"Content-Length: 2"),
    b"GET /runs HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 60_000,
    b"\xff" * 1000,
]


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Say no more, and listen on."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def stall(connection: socket.socket) -> None:
    """Do nothing more."""


@pytest.mark.parametrize("leave", [reset, half_close, socket.socket.close, stall])
def test_connections_that_break_off(lightrun_open: Daemon, leave: object) -> None:
    assert callable(leave)
    with contextlib.ExitStack() as stack:
        for beginning in BEGINNINGS * 25:
            connection = stack.enter_context(lightrun_open.connect())
            send(connection, beginning)
            leave(connection)
        began = time.monotonic()
        assert lightrun_open.request("GET", "/health").status == 200
        assert lightrun_open.run(entrypoint="echo a", network="none")["logs"] == ["a"]
        assert time.monotonic() - began < 15


# ---------------------------------------------------------------- Host

STRANGERS = [
    "", "evil.com", "localhost.evil.com", "evil-localhost", "notlocalhost", "localhost@evil.com", "evil.com#localhost",
    "127.0.0.1.evil", "127.0.0.1.evil.com:3000", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.1",
    "127.0.1", "127.0.0.256", "127.0.0.1.", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "[::1", "::1", "[::1]x",
    "[0:0:0:0:0:0:0:1%25lo]", "0.0.0.0", "0", "128.0.0.1", "10.0.0.1", "169.254.169.254", "localhost, evil.com",
    "localhost evil.com", "localhost:x", "localhost:", "localhost:3000:3000", "localhost:999999", "localhost/",
    "localhost\\", "localhost?", "http://localhost", ".evil.com", "localhost\u00e9",
    "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", "\u2460\u2461\u2466.0.0.1", "\u0661\u0662\u0667.0.0.1",
    "loc\u0430lhost", "*", "localhost%00",
]  # fmt: skip
FRIENDS = [
    "localhost", "LOCALHOST", "LocalHost:80", "a.localhost", "A.B.LOCALHOST:1", "127.0.0.1", "127.0.0.1:65535",
    "127.255.255.254", "127.1.2.3", "[::1]", "[::1]:3000",
]  # fmt: skip


@pytest.mark.parametrize("host", STRANGERS)
def test_strangers_hosts_are_forbidden(lightrun_open: Daemon, host: str) -> None:
    for line in ("GET /health", "GET /runs", "GET /nothing", "DELETE /health"):
        answer = exchange(lightrun_open, f"{line} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (answer.status, answer.json()["error"]) == (403, "forbidden")


@pytest.mark.parametrize("host", FRIENDS)
def test_this_machines_names_are_welcome(lightrun_open: Daemon, host: str) -> None:
    assert exchange(lightrun_open, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.0\r\n",
        b"GET /health HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.com\r\nHost: localhost\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.com\r\nX-Forwarded-Host: localhost\r\nForwarded: host=localhost\r\n",
        b"GET /health HTTP/1.1\r\nHo_st: localhost\r\nHost: evil.com\r\n",
        b"GET http://localhost/health HTTP/1.1\r\nHost: evil.com\r\n",
    ],
    ids=short,
)
def test_a_missing_or_doubtful_host_is_refused(lightrun_open: Daemon, head: bytes) -> None:
    assert exchange(lightrun_open, head + b"\r\n").status in (400, 403)


def test_a_strangers_page_starts_no_run(lightrun_open: Daemon) -> None:
    body = json.dumps({"image": IMAGE, "detached": True}).encode()
    raw = post(body, b"Content-Length: %d" % len(body))
    before = lightrun_open.request("GET", "/runs").json()
    assert exchange(lightrun_open, raw.replace(HOST, b"Host: evil.com\r\n")).status == 403
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data", b"", b"application/json+x"):
        status = 400 if kind == b"multipart/form-data" else 415  # which a daemon takes, but this is none
        assert exchange(lightrun_open, raw.replace(b"application/json", kind)).status == status
    assert lightrun_open.request("GET", "/runs").json() == before


def test_a_token_makes_every_host_welcome(lightrun_guarded: Daemon) -> None:
    raw = f"GET /runs HTTP/1.1\r\nHost: evil.com\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    assert exchange(lightrun_guarded, raw).status == 200


# ---------------------------------------------------------------- Tokens

GOOD = b"Authorization: Bearer " + TOKEN.encode()
WRONG = [
    b"", b"Authorization:", b"Authorization: Bearer", b"Authorization: Bearer ", b"Authorization: " + TOKEN.encode(),
    b"Authorization: Basic " + TOKEN.encode(), b"Authorization: Bearer" + TOKEN.encode(),
    b"Authorization: Bearer\t" + TOKEN.encode(), b"Authorization: Bearer, " + TOKEN.encode(),
    b"Authorization: Token " + TOKEN.encode(), b'Authorization: Bearer "' + TOKEN.encode() + b'"', GOOD[:-1],
    GOOD + b"x", GOOD.upper(), GOOD + b" x", GOOD + b", " + GOOD[15:], GOOD + b"\r\n" + GOOD,
    GOOD + b"\r\nAuthorization: Bearer x", b"Authorization: Bearer \xff\xfe\x80",
    b"Authorization: \xff " + TOKEN.encode(), b"Authorization: Bearer " + "é".encode(),
    b"Authorization: Bearer " + b"a" * 60_000, b"Authorization: Bearer " * 2000, b"Authorization: " + b" " * 60_000,
    b"X-Authorization: Bearer " + TOKEN.encode(), b"Proxy-Authorization: Bearer " + TOKEN.encode(),
    b"Cookie: token=" + TOKEN.encode(), b"Authorization: Bearer\xc2\xa0" + TOKEN.encode(), GOOD + b"\x85",
    GOOD + b"\xa0", GOOD + b"\x1f", b"Authorizati_on: Bearer " + TOKEN.encode(),
]  # fmt: skip


@pytest.mark.parametrize("header", WRONG, ids=short)
def test_wrong_tokens_are_refused_everywhere(lightrun_guarded: Daemon, header: bytes) -> None:
    header += b"\r\n" if header else b""
    for line in (b"GET /runs", b"GET /nothing", b"DELETE /runs", b"GET /runs?a=b", b"GET /openapi.json", b"GET /runs/%ff"):
        answer = exchange(lightrun_guarded, line + b" HTTP/1.1\r\n" + HOST + header + b"\r\n")
        if answer.status == 400 and re.search(rb"[\x1f]", header):
            continue  # A control character makes it no HTTP at all.
        assert (answer.status, answer.json()["error"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in answer.text


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_the_right_token_is_taken(lightrun_guarded: Daemon, scheme: bytes) -> None:
    raw = b"GET /runs HTTP/1.1\r\n" + HOST + GOOD.replace(b"Bearer", scheme) + b"\r\n\r\n"
    assert exchange(lightrun_guarded, raw).status == 200


def test_health_needs_no_token(lightrun_guarded: Daemon) -> None:
    for header in (b"", b"Authorization: Bearer wrong\r\n"):
        assert exchange(lightrun_guarded, b"GET /health HTTP/1.1\r\n" + HOST + header + b"\r\n").status == 200
    for path in (b"/health/", b"//health", b"/HEALTH", b"/health/../runs", b"/health%2f..%2fruns", b"/runs?/health"):
        assert exchange(lightrun_guarded, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n").status == 401


# ---------------------------------------------------------------- Refusals before the body


def first_answer(daemon: Daemon, raw: bytes) -> bytes:
    """The first line of what the daemon says to bytes after which nothing is sent."""
    with daemon.connect(timeout=5) as connection:
        connection.sendall(raw)
        return connection.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]], ids=["plain", "expect"])
@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"], ids=["length", "chunked"])
def test_a_wrong_token_is_refused_before_the_body(lightrun_guarded: Daemon, length: bytes, expect: list[bytes]) -> None:
    assert first_answer(lightrun_guarded, post(b"", length, *expect)) == b"HTTP/1.1 401 Unauthorized"


@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]], ids=["plain", "expect"])
def test_a_large_body_is_refused_before_it_comes(
    lightrun_open: Daemon, lightrun_guarded: Daemon, expect: list[bytes]
) -> None:
    length = b"Content-Length: %d" % (BODY_LIMIT + 1)
    assert first_answer(lightrun_open, post(b"", length, *expect)).split()[1] == b"413"
    assert first_answer(lightrun_guarded, post(b"", GOOD, length, *expect)).split()[1] == b"413"
    assert first_answer(lightrun_guarded, post(b"", length, *expect)).split()[1] == b"401"


@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]], ids=["plain", "expect"])
def test_a_stranger_is_refused_before_the_body(lightrun_open: Daemon, expect: list[bytes]) -> None:
    raw = post(b"", b"Content-Length: 1000", *expect).replace(HOST, b"Host: evil.com\r\n")
    assert first_answer(lightrun_open, raw) == b"HTTP/1.1 403 Forbidden"


def test_a_welcome_body_is_asked_for(lightrun_guarded: Daemon) -> None:
    raw = post(b"", GOOD, b"Content-Length: 2", b"Expect: 100-continue")
    with lightrun_guarded.connect(timeout=5) as connection:
        connection.sendall(raw)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_no_body_is_not_asked_for(lightrun_guarded: Daemon) -> None:
    cancel = b"POST /runs/none/cancel HTTP/1.1\r\n" + HOST + GOOD + b"\r\nContent-Length: 0\r\nExpect: 100-continue\r\n"
    assert statuses(everything(lightrun_guarded, cancel + b"\r\n" + cancel + b"Connection: close\r\n\r\n")) == [404, 404]


def test_a_refused_head_has_no_body(lightrun_guarded: Daemon) -> None:
    received = everything(lightrun_guarded, b"HEAD /runs HTTP/1.1\r\n" + HOST + b"\r\n")
    assert received.startswith(b"HTTP/1.1 401 ")
    assert received.endswith(b"\r\n\r\n")
    assert received.count(b"\r\n\r\n") == 1


def refusals(daemon: Daemon) -> tuple[Counter[str], Counter[str]]:
    """The statuses of those that the log tells of, and of those that were counted."""
    asked = daemon.log().count("GET /metrics")
    metrics = daemon.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert eventually(lambda: daemon.log().count("GET /metrics") > asked)  # and with it all that was said before
    counted = re.findall(r'^lightrun_requests_total\{route="none",status="(4\d\d)"\} (\d+)', metrics, re.MULTILINE)
    told = re.findall(r" refused .*: (4\d\d)$", daemon.log(), re.MULTILINE)
    return Counter(told), Counter({status: int(count) for status, count in counted})


CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (post(b"2\r\n{}\r\n0\r\n\r\n", CHUNKED), 401),
        (post(b"{}\r\n\r\n", b"Content-Length: 6"), 401),
        (post(b"%x\r\n" % MIB + b" " * (BODY_LIMIT + 1), GOOD, CHUNKED), 413),
        (post(b"g\r\n{}\r\n0\r\n\r\n", GOOD, CHUNKED), 400),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    ],
    ids=["token", "length", "large", "chunks", "headers"],
)
def test_a_refusal_is_told_and_counted_once(lightrun_guarded: Daemon, raw: bytes, status: int) -> None:
    before = refusals(lightrun_guarded)
    assert statuses(everything(lightrun_guarded, raw)) == [status]
    one = Counter([str(status)])
    assert refusals(lightrun_guarded) == (before[0] + one, before[1] + one)


def test_clients_that_reset_what_is_refused_are_not_worth_a_word(lightrun_guarded: Daemon) -> None:
    """Most leave after they were refused, and before they are told."""
    for _ in range(5):
        connections = [lightrun_guarded.connect() for _ in range(50)]
        for connection in connections:
            send(connection, post(b"", b"Content-Length: 1000"))
        assert connections[0].recv(12) == b"HTTP/1.1 401"
        lightrun_guarded.process.send_signal(signal.SIGSTOP)
        for connection in connections:
            reset(connection)
        lightrun_guarded.process.send_signal(signal.SIGCONT)
        assert lightrun_guarded.healthy()
    assert refusals(lightrun_guarded)[0]["401"] > 50
    assert "uncaptured python exception" not in lightrun_guarded.log()


def test_a_client_that_goes_on_sending_a_large_body_does_no_harm(lightrun_open: Daemon) -> None:
    raw = post(b" " * (8 * MIB), b"Content-Length: %d" % (8 * MIB))
    with lightrun_open.connect(timeout=10) as connection:
        connection.sendall(raw)  # and is not reset, so that it reads why
        assert b"".join(iter(lambda: connection.recv(65536), b"")).split()[1] == b"413"
    assert lightrun_open.healthy()


def test_a_refusal_does_not_wait_for_its_body(daemon: DaemonFactory) -> None:
    """Who goes on sending for ever holds up neither others nor the daemon's end."""
    own = daemon()
    with own.connect(timeout=10) as endless, own.connect(timeout=10) as silent:
        endless.sendall(post(b"", b"Content-Length: %d" % (1 << 40)))
        silent.sendall(post(b"", b"Content-Length: %d" % (1 << 40)))
        over = threading.Event()

        def go_on() -> None:
            with contextlib.suppress(OSError):
                while not over.is_set():
                    endless.sendall(bytes(65536))

        sender = threading.Thread(target=go_on)
        sender.start()
        try:
            assert silent.recv(65536).split()[1] == b"413"
            assert own.run(entrypoint=["true"])["exitCode"] == 0
            assert own.stop() == 0
        finally:
            over.set()
            sender.join()
