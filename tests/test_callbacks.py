"""Callbacks: who is told of a run's end, with which bytes, how often; and what is never followed or leaked."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

from conftest import Answer, Daemon, DaemonFactory, Receiver, free_port, longer
from engine import IMAGE
from lightrun import MAX_RETRY_AFTER_SECONDS, CallbackError, deliver, retry_after, signature, webhook_headers

SECRET = "a sécret of some length"
# What most of these runs ask for: their ends are told as any other is, and come at once, without a container.
ABSENT, NO_PULL = "lightrun/no-such-image", ("--pull", "never")
WEBHOOK_SECRET = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZg=="
BAD_TYPE = "multipart/mixed; a*=x; a*0=y"  # for which email raises TypeError


@pytest.fixture(scope="module")
def lightrun(module_daemon: DaemonFactory) -> Daemon:
    """A daemon whose environment names proxies that nobody should use."""
    dead = f"http://127.0.0.1:{free_port()}"
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    return module_daemon(*NO_PULL, env=dict.fromkeys(names, dead))


def settled(daemon: Daemon, run: str, timeout: float = 15) -> dict[str, Any]:
    """The state of a run whose callback is no longer pending."""
    return daemon.wait_for(run, lambda state: state["callback"]["status"] != "pending", timeout)


def without_callback(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a receiver gets it."""
    return {name: value for name, value in state.items() if name != "callback"}


# ---------------------------------------------------------------- What is delivered


def test_the_body_is_the_final_state_and_is_signed(lightrun: Daemon, receiver: Receiver) -> None:
    run = lightrun.detach(
        entrypoint="echo é > f; cat f; exit 3", extract=["f"], extractOn="exit", callbackUrl=receiver.url + "?a=b",
        callbackSecret=SECRET,
    )  # fmt: skip
    (request,) = receiver.wait()
    state = settled(lightrun, run)
    assert state["callback"] == {"status": "delivered", "attempts": 1}
    assert json.loads(request.body) == without_callback(state)
    assert (state["exitCode"], state["logs"], state["artifacts"][0]["path"]) == (3, ["é"], "f")
    assert (request.method, request.path) == ("POST", "/hook?a=b")
    expected = hmac.new(SECRET.encode(), request.body, hashlib.sha256).hexdigest()
    assert request.headers["X-Light-Run-Signature"] == "sha256=" + expected
    assert request.headers["Content-Type"] == "application/json"
    assert (request.headers["X-Light-Run-Id"], request.headers["X-Light-Run-Attempt"]) == (run, "1")
    assert request.headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert not [name for name in request.headers if name.lower().startswith("webhook-")]


def test_without_a_secret_nothing_is_signed(lightrun: Daemon, receiver: Receiver) -> None:
    lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    (request,) = receiver.wait()
    assert "X-Light-Run-Signature" not in request.headers


def test_a_webhook_secret_works_with_off_the_shelf_verifiers(lightrun: Daemon, receiver: Receiver) -> None:
    receiver.answer(500)
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url, callbackSecret=WEBHOOK_SECRET)
    requests = receiver.wait(2)
    for request in requests:
        assert Webhook(WEBHOOK_SECRET).verify(request.body, dict(request.headers.items()))["id"] == run
        expected = hmac.new(WEBHOOK_SECRET.encode(), request.body, hashlib.sha256).hexdigest()
        assert request.headers["X-Light-Run-Signature"] == "sha256=" + expected
        assert request.headers["webhook-id"] == run
    first, second = (int(request.headers["webhook-timestamp"]) for request in requests)
    assert first < second


@pytest.mark.parametrize(("method", "reason"), [("cancel", "cancelled"), ("stop", "stopped")])
def test_a_run_that_is_ended_is_told_too(lightrun: Daemon, receiver: Receiver, method: str, reason: str) -> None:
    run = lightrun.detach(entrypoint="sleep 60", callbackUrl=receiver.url)
    assert lightrun.request("POST", f"/runs/{run}/{method}").status == 204
    (request,) = receiver.wait()
    assert json.loads(request.body)["reason"] == reason


def test_a_run_that_never_starts_is_told_too(lightrun: Daemon, receiver: Receiver) -> None:
    run = lightrun.detach(image="127.0.0.1:1/nothing", callbackUrl=receiver.url)
    (request,) = receiver.wait()
    assert json.loads(request.body)["reason"] == "pull_failed"
    assert settled(lightrun, run)["callback"]["status"] == "delivered"


# ---------------------------------------------------------------- Again, or never again


def test_what_may_pass_is_tried_again_with_the_same_bytes(lightrun: Daemon) -> None:
    def retried(answer: Answer) -> None:
        with contextlib.closing(Receiver()) as receiver:
            receiver.answers.append(answer)
            run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url, callbackSecret=SECRET)
            first, second = receiver.wait(2)
            assert first.body == second.body
            assert second.headers["X-Light-Run-Attempt"] == "2"
            assert 0.9 < second.time - first.time < 4
            assert settled(lightrun, run)["callback"] == {"status": "delivered", "attempts": 2}

    with ThreadPoolExecutor() as pool:
        list(pool.map(retried, [*map(Answer, (0, 408, 425, 429, 500, 503)), Answer(headers={"Content-Type": BAD_TYPE})]))


@pytest.mark.long
def test_retry_after_is_honoured(lightrun: Daemon, receiver: Receiver) -> None:
    receiver.answer(503, {"Retry-After": "2"})
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    state = lightrun.wait_for(run, lambda state: state.get("callback", {}).get("attempts") == 1)
    assert (state["callback"]["status"], "503" in state["callback"]["lastError"]) == ("pending", True)
    first, second = receiver.wait(2)
    assert second.time - first.time > 1.9


@pytest.mark.parametrize("status", [204, 299])
def test_every_2xx_is_delivered(lightrun: Daemon, receiver: Receiver, status: int) -> None:
    receiver.answer(status)
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    assert settled(lightrun, run)["callback"] == {"status": "delivered", "attempts": 1}


@pytest.mark.parametrize("status", [302, 304, 308, 400, 410])
def test_anything_else_is_final_and_no_redirect_is_followed(lightrun: Daemon, receiver: Receiver, status: int) -> None:
    receiver.answer(status, {"Location": receiver.url + "/elsewhere"} if status < 400 else {})
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    outcome = settled(lightrun, run)["callback"]
    assert (outcome["status"], outcome["attempts"]) == ("failed", 1)
    assert str(status) in outcome["lastError"]
    assert [request.path for request in receiver.requests] == ["/hook"]


def test_a_connection_that_is_refused_is_tried_again(lightrun: Daemon) -> None:
    run = lightrun.detach(image=ABSENT, callbackUrl=f"http://127.0.0.1:{free_port()}/")
    outcome = lightrun.wait_for(run, lambda state: state["callback"]["attempts"] >= 2)["callback"]
    assert (outcome["status"], bool(outcome["lastError"])) == ("pending", True)
    assert lightrun.request("DELETE", f"/runs/{run}").status == 204


def test_the_answers_body_is_shown_to_nobody(lightrun: Daemon, receiver: Receiver) -> None:
    receiver.answer(404, body=b"from an internal service")
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    assert "internal service" not in str(settled(lightrun, run))
    assert "internal service" not in lightrun.log()


def test_a_deleted_run_is_told_to_nobody(lightrun: Daemon, receiver: Receiver) -> None:
    receiver.answer(503)
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    assert lightrun.request("DELETE", f"/runs/{run}").status == 204
    time.sleep(2)
    assert len(receiver.requests) == 1
    assert lightrun.request("GET", f"/runs/{run}").status == 404


def test_what_is_owed_survives_the_daemon(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon(*NO_PULL)
    receiver.answer(503)
    run = lightrun.detach(image=ABSENT, callbackUrl=receiver.url, callbackSecret=SECRET)
    lightrun.wait_for(run, lambda state: state["callback"]["attempts"] == 1)
    lightrun.kill()
    lightrun.start()
    first, second = receiver.wait(2)
    assert (first.body, second.headers["X-Light-Run-Attempt"]) == (second.body, "2")
    assert second.headers["X-Light-Run-Signature"] == signature(SECRET, second.body)
    assert settled(lightrun, run)["callback"] == {"status": "delivered", "attempts": 2}


def test_a_slow_receiver_holds_up_no_run_and_no_other_delivery(lightrun: Daemon, receiver: Receiver) -> None:
    with contextlib.closing(Receiver()) as slow:
        slow.default = Answer(delay=8)
        for _ in range(6):
            lightrun.detach(image=ABSENT, callbackUrl=slow.url)
        slow.wait()
        begun = time.monotonic()
        run = lightrun.detach(entrypoint="true", callbackUrl=receiver.url)
        receiver.wait()
        assert settled(lightrun, run)["callback"]["status"] == "delivered"
        assert time.monotonic() - begun < 7


def test_many_callbacks_all_arrive(lightrun: Daemon, receiver: Receiver) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: lightrun.detach(image=ABSENT, callbackUrl=receiver.url), range(12)))
    assert sorted(request.headers["X-Light-Run-Id"] for request in receiver.wait(12, 30)) == sorted(runs)


# ---------------------------------------------------------------- Answers before the end of the request


class Abrupt:
    """A receiver that reads no more than the head of a request, sends what it is told to, and leaves. While something is
    unread, the kernel resets the connection then."""

    def __init__(self, said: bytes, leave: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self._said, self._leave = said, leave
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a reset can overtake what was said
        self._tls = tls
        self.requests = 0
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client = self._server.accept()[0]
                with self._tls.wrap_socket(client, server_side=True) if self._tls else client as connection:
                    while b"\r\n\r\n" not in connection.recv(65536):
                        pass
                    self.requests += 1
                    connection.sendall(self._said)
                    self._leave(connection)

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()


def close(_client: socket.socket) -> None:
    """Leave without reading."""


def reset(client: socket.socket) -> None:
    """Leave with a reset even if all was read (socket(7): SO_LINGER)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_close(client: socket.socket) -> None:
    """Say that there is no more to come, and read for a moment, as careful servers do."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(0.2)
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass


@pytest.fixture(scope="module")
def server_tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    """TLS for 127.0.0.1, and the file of the certificate to trust."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key"), str(folder / "certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=x"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


@pytest.fixture
def trusted(server_tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """TLS that this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", server_tls[1])
    return server_tls[0]


EARLY: list[tuple[bytes, str, bool, float]] = [
    (b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n", "answered 413", False, 0),
    (b"HTTP/1.0 401 No\r\n\r\nwho are you?", "answered 401", False, 0),
    (b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", "answered 302", False, 0),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", "answered 500", True, 0),
    (b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\n\r\n", "answered 429", True, 7),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 413 No\r\n\r\n", "answered 413", False, 0),
    (b"HTTP/1.1 103 Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 102 On it\r\n\r\nHTTP/1.1 410 Gone\r\n\r\n", "answered 410", False, 0),
    (b"HTTP/1.1 100 Continue\r\n\r\n", "no answer", True, 0),
    (b"", "no answer", True, 0), (f"HTTP/1.1 200 OK\r\nContent-Type: {BAD_TYPE}\r\n\r\n".encode(), "no answer", True, 0),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", *longer("https")])
@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize("size", [1, 20_000_000])
def test_an_answer_counts_however_early(
    scheme: str, leave: Callable[[socket.socket], None], size: int, trusted: ssl.SSLContext
) -> None:
    for said, message, retry, after in EARLY:
        with contextlib.closing(Abrupt(said, leave, trusted if scheme == "https" else None)) as abrupt:
            with pytest.raises(CallbackError, match=message) as caught:
                deliver(abrupt.url, bytes(size), {}, ())
            assert (caught.value.retry, caught.value.after, abrupt.requests) == (retry, after, 1), said


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_early_2xx_is_delivered(scheme: str, trusted: ssl.SSLContext) -> None:
    said = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n"
    for size in (1, 20_000_000):
        with contextlib.closing(Abrupt(said, close, trusted if scheme == "https" else None)) as abrupt:
            deliver(abrupt.url, bytes(size), {}, ())


def trickle(client: socket.socket) -> None:
    """Leave when nobody takes another byte any more."""
    with contextlib.suppress(OSError):
        while True:
            client.sendall(b"x")
            time.sleep(0.05)


@pytest.mark.parametrize("scheme", ["http", *longer("https")])
def test_an_answer_that_trickles_comes_too_late(scheme: str, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightrun.CALLBACK_SECONDS", 1)
    for said in (b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 20", b"HTTP/1.1 103 Hints\r\nX: "):
        begun = time.monotonic()
        with contextlib.closing(Abrupt(said, trickle, trusted if scheme == "https" else None)) as abrupt:
            with pytest.raises(CallbackError, match="no answer") as caught:
                deliver(abrupt.url, b"x", {}, ())
            assert caught.value.retry
            assert 0.9 < time.monotonic() - begun < 4


def test_a_state_that_is_too_large_for_its_receiver_is_told_once(lightrun: Daemon) -> None:
    with contextlib.closing(Abrupt(b"HTTP/1.1 413 Content Too Large\r\n\r\n", close)) as abrupt:
        run = lightrun.detach(entrypoint="head -c 1000000 /dev/zero", callbackUrl=abrupt.url)  # each is six bytes of JSON
        assert settled(lightrun, run)["callback"] == {"status": "failed", "attempts": 1, "lastError": "answered 413"}
        assert abrupt.requests == 1


# ---------------------------------------------------------------- Who may be called


def refusal(daemon: Daemon, url: str) -> tuple[int, str]:
    """Status and code of the answer to a run that wants this callback."""
    response = daemon.request("POST", "/run", json={"image": IMAGE, "detached": True, "callbackUrl": url})
    return response.status, response.json().get("error", "")


def test_only_hosts_that_the_operator_names(daemon: DaemonFactory, receiver: Receiver) -> None:
    lightrun = daemon(*NO_PULL, "--callback-allow", "127.0.0.1", "--callback-allow", "*.example.com")
    for url in ("http://localhost/", "http://example.com/", "http://127.0.0.2/", "http://127.0.0.1.evil.org/", "http://[::1]/"):
        assert refusal(lightrun, url) == (403, "not_allowed")
    lightrun.detach(image=ABSENT, callbackUrl=receiver.url)
    receiver.wait()


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"])
def test_link_local_addresses_are_refused(lightrun: Daemon, host: str) -> None:
    assert refusal(lightrun, f"http://{host}/latest/meta-data/") == (403, "not_allowed")


@pytest.mark.parametrize("host", ["2852039166", "0xA9FEA9FE", "169.254.43518"])
def test_link_local_addresses_in_disguise_are_never_talked_to(lightrun: Daemon, host: str) -> None:
    """Names are judged by the address that they lead to, when they are connected to."""
    response = lightrun.request(
        "POST", "/run", json={"image": ABSENT, "detached": True, "callbackUrl": f"http://{host}/"}
    )
    if response.status == 403:
        return
    state = lightrun.wait_for(response.json()["id"], lambda state: state["callback"]["attempts"] == 1)
    assert state["callback"]["lastError"]
    lightrun.request("DELETE", f"/runs/{state['id']}")


# ---------------------------------------------------------------- Signatures and Retry-After, without a daemon


@given(st.text(st.characters(codec="utf-8"), min_size=16, max_size=40), st.binary(max_size=100))
def test_signatures(secret: str, body: bytes) -> None:
    assert signature(secret, body) == "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


@given(st.text(max_size=100))
def test_webhook_headers_are_accepted_by_the_reference_verifier(text: str) -> None:
    body = json.dumps({"text": text})
    headers = webhook_headers(WEBHOOK_SECRET, "the-id", body.encode(), time.time())
    assert Webhook(WEBHOOK_SECRET).verify(body, headers) == {"text": text}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0), ("5", 5), ("0", 0), ("100000", MAX_RETRY_AFTER_SECONDS), ("-5", 0), ("x", 0), ("1.5", 0), ("9" * 50, 0),
        ("Thu, 01 Jan 1970 00:20:00 GMT", 200), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("Thu, 01 Jan 2099 00:00:00 GMT", 600),
    ],
)  # fmt: skip
def test_retry_after(header: str, seconds: float) -> None:
    assert retry_after(header, 1000) == seconds
