#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""lightrun: run a container over HTTP.

The life of a run, from `POST /run` to its last trace:

    accept    the body is checked against one table (Requests), a place is taken (Places), the run is on disk (Store)
    queue     until one of `--max-concurrent` workers is free
    pull      when the image is missing; concurrent runs share one pull
    create    one container with every hardening, labelled with the state dir and the run, below a cgroup that counts (Usage)
    put       the files, as one plain tar built here (Artifacts), before anything in the container has run
    attach    one stream that carries stdout and stderr, opened before the start so that no byte is missed
    start     recorded first; then the command runs, and stdin is fed from a thread of its own
              (these four are done already in a warm container, to which the run is only handed out: Warm)
    read      to the end of the stream, of the engine's copy of it and of the container, which is looked at now and then; a
              deadline, a cancel or a stop only sends a signal in between
    extract   the paths the client asked for come back as a tar of which only checked files and folders are kept
    record    the final state, in one transaction
    answer    whoever waits for the run gets that state
    remove    the container and its anonymous volumes; then old runs are evicted and the callback is sent

That line is `Runner._line`, one worker thread for each run. What it hears of the container is one state (Hearing), and what
breaks on the way to the engine is tried again from where it stands (Runner._persist); so a run that an earlier daemon left
enters the same line.

Threads: the server's loop; its handlers (waitress), of which a fixed number may wait; one worker for each run that holds
a place, plus one while stdin is fed and one for each image being pulled; one for each command in a run, plus one while its
stdin is fed; the listener to the engine's events, if there are pools; the keeper, which watches an absent engine and
sweeps what could not be removed; the maker of warm containers; deliveries of callbacks; the writer of the log. Each lock
stands where it is made, beside the names of what it guards.

The other end is here as well: Client, which needs nothing of the above but the table of requests, and the commands beside
`serve` (Commands), which are written with it.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import copy
import dataclasses
import datetime
import email.message
import email.parser
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import posixpath
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias, TypeVar

__version__ = "0.1.0"
log = logging.getLogger("lightrun")
Result = TypeVar("Result")

# --------------------------------------------------------------------------------------------------------------------
# Limits: every bound that is not an option
# --------------------------------------------------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_PROBLEMS = 100  # validation problems told at once; more say nothing new
MAX_JSON_DEPTH = 100  # levels of nesting in a body; far below Python's recursion limit
MAX_FOLDERS = 10_000  # that the files of a request need; each is a member of the tar
MAX_RUN_PART_BYTES = 64 * MIB  # of the JSON that comes with an upload; it is read as a whole
MAX_PARTS = 10_002  # of an upload: the JSON, a tar, and as many files as the JSON may have
MAX_PART_HEADER_BYTES = 8 * KIB
MAX_ATTRIBUTES = 100  # of an upload's header, or of a tar as a whole: their parsers' time grows with the square of it
MAX_DIGITS = 256  # in a row, in a tar's header; a regex of older tarfiles takes quadratic time (CVE-2024-6232)
MAX_JSON_DIGITS = 1000  # digits of an integer in a body; converting more takes quadratic time
MAX_ARGUMENT_BYTES = 131_071  # Linux refuses longer single arguments and variables (MAX_ARG_STRLEN, with its NUL)
MAX_OUTPUT_BYTES = 1 << 50  # the largest outputLimit
MAX_FILE_BYTES = 1 << 60  # the largest fileSize
MIN_MEMORY_BYTES = 6 * MIB  # the engine refuses less
SAFE_MEMORY_BYTES = 16 * MIB  # what every runc needs to start a container
MAX_WARM = 100  # warm containers, of all pools
MIN_PIDS = 2  # the init and one program
MAX_QUERY_BYTES = 4 * KIB  # of a URL's query
MAX_SOCKET_PATH_BYTES = 107  # of a Unix socket (unix(7), with its NUL)
MAX_SETTINGS_BYTES = MIB  # of a file of tokens, of Docker's configuration, of a certificate

MAX_ARTIFACT_ENTRIES = 50_000  # files and folders one run may keep: each costs an inode and a line of state
MAX_ARTIFACT_DEPTH = 64  # folders inside each other; what lies deeper is skipped
MAX_ARTIFACT_PATH_BYTES = 2048  # a path below the run's root, so that absolute ones stay under PATH_MAX
MAX_KNOWN_IMAGES, MAX_KNOWN_PATHS = 64, 20_000  # of what images have at the paths of requests
MAX_TAR_HEADER_BYTES = MIB  # of a member's name and attributes
MAX_TAR_PATH_BYTES = 4000  # of a name in an uploaded tar; with the workdir it stays under PATH_MAX
MAX_TREE_CHARACTERS = 32 * MIB  # of the names in a tree that goes in, those of folders that only follow from one included
MAX_LINKS_FOLLOWED, MAX_LINK_STEPS = 40, 10_000_000  # by one link of a tree; by all of them, each as many as it is deep
COPY_BYTES = 256 * KIB  # one piece of a file on its way to or from the disk; with 1 MiB extraction took twice as long

READ_BYTES = 256 * KIB  # one read of the attach stream
MAX_FRAME_BYTES = GIB  # an engine's frames have some 32 KiB; one that says more is garbled
LINE_BYTES = 16 * KIB  # longer lines come in pieces, in a live run
PIECE_BYTES = 16 * KIB  # of output that comes as bytes; a connection that breaks more often brings nothing on
MAX_BEHIND_BYTES = GIB  # how far a follower of a log may fall behind before it is cut off
TAIL_BYTES = 4 * KIB  # of a log, by which the end of another copy of it is known
SEGMENT_BYTES = 64 * MIB  # of a log's followers: the unit in which the disk gets back what all have read
COPY_FACTOR = 4  # the engine's own copy of a log, which only recovery reads, to what we keep of each stream
ENTRY_BYTES = 32  # what that copy spends on a line beside its bytes, at most
PING_SECONDS = 15  # of silence in a live run
ENGINE_SECONDS = 60  # one engine call, or a silence in one that streams; an engine that is slower counts as absent
HEALTH_SECONDS = 2  # the same for /health, and for a connection
HURRY_SECONDS = 1.5  # the same once the run is to be gone; longer after each time that it was not enough
MAX_ANSWER_BYTES = 64 * MIB  # of an engine's answer that is read as a whole: 10,000 containers are 20 MB
CONNECT_SECONDS = 10  # to a daemon
SILENCE_SECONDS = 75  # of a daemon that has something to tell; more than it waits itself for its engine
MAX_STDIN_BYTES = 64 * MIB  # that a client sends: all of it is there before the start
MAX_PACKED_BYTES = 4 * GIB  # of a local folder
PATIENCE_SECONDS = 75  # of a client with a daemon that was there once
RETRY_SECONDS = 2  # pause before an absent engine or a full disk is tried again
MAX_TRIES = 10  # of a step that breaks while the engine answers; the pauses between them are 16 s in all
SLOW_SECONDS = 8  # a try that took longer counts for three
FIRST_LOOK_SECONDS = 0.1  # after the start, and after a signal, the container is looked at; each pause is twice the last
BRIEF_SECONDS = 1  # a run that the engine's own word on its end makes quicker by a share worth having
REFILL_SECONDS = 0.15  # after a warm container was taken, until another is made: what takes time from a quick run
LOOK_SECONDS = 20  # the longest of them: how late the end of a run is noticed whose output never ends
COPY_SECONDS = 10  # of silence in the engine's copy of what a container that has exited printed
STDIN_SLACK_SECONDS = 1  # before the exit, in which a broken connection for stdin may come from that: some engines close it first
QUIET_SECONDS = 2  # of silence in the output of a container that has exited
METER_SECONDS = 0.02  # the shortest pause between two looks at the CPU time of a run that has a limit of it
MEMORY_SLACK_BYTES = 512 * KIB  # of a cgroup's figures of memory: each CPU holds some pages in advance
MAX_EXEC_KILLS = 4  # until it is said that a command cannot be killed
HELD_BACK_BYTES = 64 * KIB  # of raw output, that waits for the exit code of a command that is done soon
HELD_BACK_SECONDS = 0.25  # how long it waits
HEAR_SECONDS = 10  # for a shim to say what it is asked
ENVIRONMENT_PIECE = 16 * KIB  # of a command's environment, as the shim tells it
KILL_SECONDS = 2  # after SIGKILL, until it is sent again; each pause is twice the last
MAX_KILLS = 12  # until it is said that the container cannot be killed
MAX_FAILED_KILLS = 2  # until a cancelled run's container is removed instead
EXTRACT_SECONDS = 900  # for all that one run wants to keep
INTERRUPT_SECONDS = 5  # for the ends of runs that are killed because lightrun goes down
REMOVE_SECONDS = 15  # until the removal of a container is left to the keeper, and its run's place given back
MAX_SWEEP_SECONDS = 60  # the longest pause before a container that could not be removed is tried again
DISCONNECT_POLL_SECONDS = 0.25  # how late a client that left is noticed
LEAVE_SECONDS = 3  # for a balancer that looks at /health each second
CATCH_UP_SECONDS = 5  # after a restart, for the output of a run that was taken up to be read again
LINGER_SECONDS = 30  # for the rest of a body that was refused
LAST_ANSWERS_SECONDS = 1  # for answers on their way when lightrun goes down
SETTLE_POLL_SECONDS = 0.02  # how often it is looked whether they are gone

CALLBACK_SECONDS = 10  # one attempt
CALLBACK_DELAYS = (1, 5, 30, 120, 600)  # seconds before each further attempt
CALLBACK_JITTER = 1.25  # times that, at most
MAX_RETRY_AFTER_SECONDS = 600
MAX_DELIVERIES = 128  # attempts at a time, each on a thread
MAX_DELIVERIES_EACH = 4  # the same to one receiver; one that failed last gets one

CONTROL_THREADS = 16  # handlers beside the waiting ones, so that control routes always find one
MAX_CONNECTIONS = 4096
MIN_DESCRIPTORS = 128  # a daemon that may open fewer files could not do a run
BACKLOG = 1024  # of connections that are not accepted yet
ACCEPT_PAUSE_SECONDS = 1  # when there is no descriptor for a connection
COMPLAIN_SECONDS = 60  # how often it is said again
MAX_HEADER_BYTES = 64 * KIB
MAX_HOPS = 20  # of X-Forwarded-For that are looked at
MAX_UNREAD_BYTES = 64 * KIB  # of an answer that waits for its reader in memory; larger ones wait in a file
MAX_UNREAD_STREAM_BYTES = 512 * KIB  # the same for a stream, which has a place
MAX_LOG_CHARACTERS = MIB  # of lines that wait for whoever reads standard error
LOG_FLUSH_SECONDS = 1  # what they get at the end
M_ARENA_MAX = -8  # of mallopt(3)

JSON, BYTES, TAR, EVENTS = "application/json", "application/octet-stream", "application/x-tar", "application/x-ndjson"
FORM, TEXT = "multipart/form-data", "text/plain"

# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


class LightrunError(Exception):
    """Base of all: what a client is told, as an HTTP status, a code and a sentence."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str = "", code: str | None = None, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.headers = dict(headers or {})
        self.more = more

    def __init_subclass__(cls, status: int | None = None, code: str | None = None) -> None:
        cls.status, cls.code = status or cls.status, code or cls.code

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        message = {"message": str(self)} if str(self) else {}
        return {"error": self.code, **message, **self.more}


# fmt: off
class BadRequest(LightrunError, status=400, code="bad_request"): ...  # not one that lightrun understands
class NotAllowed(LightrunError, status=403, code="not_allowed"): ...  # an operator's allow-list refuses it
class NotFound(LightrunError, status=404, code="not_found"): ...  # there is no such run, artifact or route
class MethodNotAllowed(LightrunError, status=405, code="method_not_allowed"): ...  # the route does not take it
class Conflict(LightrunError, status=409, code="conflict"): ...  # the run is not in a state for this; the code says which
class NoLongerKept(LightrunError, status=410, code="gone"): ...  # bytes of a log that were dropped, or have no order any more
class UnsupportedMediaType(LightrunError, status=415, code="unsupported_media_type"): ...  # the body is not called JSON
class StorageUncertain(LightrunError, code="storage_error"): ...  # nobody can tell what is on disk, or read it
class UsageError(LightrunError): ...  # a bad option: one line on standard error and exit code 2
class StartError(LightrunError): ...  # another reason not to start: one line on standard error and exit code 1
class EngineError(LightrunError, status=502, code="engine_error"): ...  # the engine refused a call
class EngineMissing(EngineError): ...  # it says that there is no such container, image, network or path
class EngineConflict(EngineError): ...  # it says that the container is not in a state for this
class EngineAbsent(EngineError): ...  # it did not answer, or not in time
# fmt: on


class Unavailable(LightrunError, status=503):
    """Not now: the code says why, Retry-After when to come again. Nothing was accepted."""

    def __init__(self, code: str, message: str, retry_after: int = 1) -> None:
        super().__init__(message, code, {"Retry-After": str(retry_after)})


def going_down(settings: Settings) -> Unavailable:
    """What a daemon that stops says to whoever wants something begun."""
    return Unavailable("stopping", "lightrun is going down", math.ceil(settings.drain) or 1)


class RunEnds(Exception):
    """Raised inside a run to end it before its container could: a reason of SPEC 2 and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# --------------------------------------------------------------------------------------------------------------------
# Settings: one table gives option, variable, cast, default and help
# --------------------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of `512m`, `10MiB` or plain `1048576`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18})\s*([kmgt]?)(?:i?b)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError("must be a size such as 512m or 1073741824")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2].lower()]


def parse_duration(text: str) -> float:
    """Seconds of `500ms`, `10s`, `5m` or `1h`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h)", text.strip(), re.ASCII)
    if not match:
        raise ValueError("must be a duration such as 10s or 5m")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2]]


def _cast(convert: Callable[[str], Any], fits: Callable[[Any], bool], says: str) -> Callable[[str], Any]:
    """How to read an option: converted, and then as it says."""

    def cast(text: str) -> Any:
        try:
            if fits(value := convert(text)):
                return value
        except ValueError:
            pass
        raise ValueError(f"must be {says}")

    return cast


def _integer(low: int, high: int) -> Callable[[str], int]:
    return _cast(lambda text: int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1, lambda value: low <= value <= high,
                 f"a whole number from {low} to {high}")  # fmt: skip


def _bytes(low: int, high: int = 1 << 60) -> Callable[[str], int]:
    return _cast(parse_size, lambda value: low <= value <= high, f"a size such as 512m, from {low} to {high} bytes")


def _one_of(*words: str) -> Callable[[str], str]:
    return _cast(str, lambda word: word in words, "one of " + ", ".join(words))


def _split_engine(text: str) -> tuple[str | None, str | None, int | None]:
    """Path, host and port of an engine's address, of which the Docker CLI would take more kinds. Raises ValueError."""
    scheme, _, rest = text.partition("://")
    if scheme == "unix" and rest.startswith("/") and len(rest.encode()) <= MAX_SOCKET_PATH_BYTES:
        return rest, None, None
    url = urllib.parse.urlsplit(text)
    if scheme != "tcp" or rest.rstrip("/") != url.netloc or "@" in rest or not url.hostname or not url.port:
        raise ValueError
    return None, url.hostname, url.port


def _duration(low: float) -> Callable[[str], float]:
    return _cast(parse_duration, lambda seconds: low <= seconds <= 86_400, f"a duration such as 10s or 5m, {low:g}s to 24h")


_NODE = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_text = _cast(str, lambda text: text == text.strip() != "" and text.isprintable(), "printable text without spaces around it")
_mode = _cast(lambda text: int(text, 8), lambda mode: 0 <= mode <= 0o777, "an octal mode such as 0600")
_cpus = _cast(float, lambda cpus: 0.01 <= cpus <= 10_000, "a number of CPUs such as 0.5 or 2, at least 0.01")
_node = _cast(
    str, lambda text: bool(re.fullmatch(_NODE, text)),
    "1 to 63 of a to z, 0 to 9 and -, with none of these dashes at its ends",
)  # fmt: skip
_docker_host = _cast(_text, lambda text: any(_split_engine(text)), "unix:///path or tcp://host:port")


def parse_warm(text: str) -> tuple[str, int, str | None]:
    """Image, number and network of a value of --warm. Raises ValueError."""
    match = re.fullmatch(r"(\S+)=(\d{1,4})(?:/(\S+))?", text, re.ASCII)
    if not match or not 1 <= int(match[2]) <= MAX_WARM:
        raise ValueError
    return match[1], int(match[2]), match[3]


def _is_network(text: str) -> bool:
    return text == "unix" or bool(ipaddress.ip_network(text))


_proxy = _cast(_text, _is_network, "an IP address, a network such as 10.0.0.0/8, or unix")
_warm = _cast(_text, lambda text: bool(parse_warm(text)), f"IMAGE=N or IMAGE=N/NETWORK, with N from 1 to {MAX_WARM}")


def _path(text: str) -> Path:
    try:
        return Path(_text(text)).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ValueError("names a home that is not known, or is relative to a folder that has gone") from error


def small_file(path: Path) -> bytes:
    """A file that somebody wrote for us. Raises OSError, also for one that is too large for that."""
    with path.open("rb") as file:
        data = file.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def option(cast: Callable[[str], Any], default: Any, text: str, shown: str = "") -> Any:
    """A row of the table: how to read it, what it is when absent, what `--help` says (`shown`: the default in words).
    A tuple as default makes it repeatable."""
    return dataclasses.field(default=default, metadata={"cast": cast, "help": text, "shown": shown})


@dataclasses.dataclass(frozen=True)
class Token:
    """A bearer token, and the name whose runs alone it sees; None sees all. A name may have several, so that they rotate."""

    text: str
    owner: str | None = None
    limits: tuple[int | None, int | None] = (None, None)  # its containers at a time, and its runs that wait

    @classmethod
    def parse(cls, line: str, where: str) -> Token:
        """`TOKEN`, or `NAME TOKEN [max=N] [queue=N]`. Raises UsageError, which tells nothing of a token."""
        name, *rest = line.split()
        if not rest:
            return cls(name)
        pairs = [word.partition("=")[::2] for word in rest[1:]]
        limits = {option: int(text) for option, text in pairs if re.fullmatch("[0-9]{1,6}", text)}
        sound = limits.keys() <= {"max", "queue"} and len(limits) == len(pairs) and limits.get("max") != 0
        sound = sound and not rest[0].startswith(("max=", "queue="))  # a plain token has no limits, and that is none
        if not sound or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise UsageError(f"{where}: must be TOKEN, or NAME TOKEN [max=N] [queue=N]")
        return cls(rest[0], name, (limits.get("max"), limits.get("queue")))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every option of `lightrun serve`. Sizes in bytes, durations in seconds."""

    host: str = option(_text, "127.0.0.1", "address to listen on")
    port: int = option(_integer(0, 65535), 3000, "port to listen on; 0 takes a free one")
    socket: Path | None = option(_path, None, "listen on this Unix socket instead of TCP")
    socket_mode: int = option(_mode, 0o600, "mode of the Unix socket", "0600")
    token: str | None = option(_text, None, "bearer token that every route but /health then needs", "open to everybody")
    token_file: Path | None = option(
        _path, None, "file with a TOKEN, or a NAME TOKEN [max=N] [queue=N], in each line; read at start and on SIGHUP"
    )
    body_limit: int = option(_bytes(KIB), 10 * MIB, "largest request body", "10 MiB")
    state_dir: Path = option(_path, Path("~/.light-run"), "database and lock", "~/.light-run")
    artifacts_dir: Path | None = option(_path, None, "where artifacts are kept", "<state-dir>/artifacts")
    max_artifacts_bytes: int = option(_bytes(0), 20 * GIB, "bytes of artifacts, logs and records kept", "20 GiB")
    keep: int = option(_integer(1, 10**9), 100_000, "finished runs kept")
    extract_limit: int = option(_bytes(0), GIB, "bytes of artifacts that one run may keep", "1 GiB")
    log_limit: int = option(_bytes(KIB, 100 * MIB), MIB, "log bytes kept of each stream of one run, the newest", "1 MiB")
    max_concurrent: int = option(
        _integer(1, 10_000), max(16, 4 * (os.cpu_count() or 1)), "containers at a time", "max(16, 4 x CPUs)"
    )
    queue: int = option(_integer(0, 100_000), 256, "accepted runs that may wait for a place")
    max_waiting: int = option(_integer(1, 2_000), 320, "requests that may wait or stream at a time")
    max_exec: int = option(_integer(1, 1_000), 16, "commands that may go on in one run at a time, beside its own")
    max_timeout: float = option(_duration(0.001), 3600.0, "longest timeout that a request may ask for", "1h")
    memory: int = option(_bytes(MIN_MEMORY_BYTES), 512 * MIB, "memory of every run", "512m")
    cpus: float = option(_cpus, 1.0, "CPUs of every run", "1")
    pids: int = option(_integer(MIN_PIDS, 4_194_304), 100, "processes and threads of every run")
    warm: tuple[str, ...] = option(_warm, (), "IMAGE=N[/NETWORK]: keep N started containers of an image; repeatable", "none")
    file_size: int | None = option(_bytes(0), None, "largest file that a program may write", "no limit")
    runtime: str | None = option(_text, None, "OCI runtime, such as runc, crun or runsc", "the engine's default")
    pull: str = option(_one_of("missing", "always", "never"), "missing", "when to pull: missing, always or never")
    pull_timeout: float = option(_duration(0.001), 600.0, "time limit of a pull", "10m")
    allow_image: tuple[str, ...] = option(_text, (), "image pattern, as in docker.io/library/*; repeatable", "any")
    allow_network: tuple[str, ...] = option(_text, (), "network pattern; repeatable", "none")
    callback_allow: tuple[str, ...] = option(_text, (), "callback host pattern; repeatable", "any but link-local")
    docker_host: str | None = option(_docker_host, None, "engine: unix:///path or tcp://host:port", "DOCKER_HOST or local")
    drain: float = option(_duration(0), 10.0, "what SIGTERM leaves to clients that wait", "10s")
    node: str | None = option(_node, None, "name of this daemon among several: ids of its runs are NODE_UUID")
    leave: float | None = option(
        _duration(0), None, "how long after SIGTERM requests are still taken, while /health is 503", "3s with --node, else 0s"
    )
    trust_proxy: tuple[str, ...] = option(
        _proxy, (), "address or network of a proxy whose X-Forwarded-For counts, or unix for the socket; repeatable", "none"
    )
    access_log: str = option(_one_of("on", "off"), "on", "a line of the log for each request: on or off")
    log_format: str = option(_one_of("text", "json"), "text", "text, or json: one object a line")

    def artifacts_root(self) -> Path:
        """The folder of all artifacts."""
        return self.artifacts_dir or self.state_dir / "artifacts"

    def new_id(self) -> str:
        """The id of a new run."""
        return f"{self.node}_{uuid.uuid4()}" if self.node else str(uuid.uuid4())

    def __post_init__(self) -> None:
        if sum(parse_warm(text)[1] for text in self.warm) > MAX_WARM:
            raise UsageError(f"--warm: must be at most {MAX_WARM} containers in all")

    def tokens(self) -> list[Token]:
        """The bearer tokens, [] for an open server. Raises UsageError for a file that cannot be read, understood or is empty."""
        tokens = [Token(self.token)] if self.token else []
        if self.token_file:
            try:
                lines = small_file(self.token_file).decode().splitlines()
            except (OSError, UnicodeError) as error:
                raise UsageError(f"--token-file: cannot be read: {getattr(error, 'strerror', 'not UTF-8')}") from error
            read = [Token.parse(line, f"--token-file: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
            if not read:
                raise UsageError("--token-file: holds no token")
            tokens += read
        texts, limits = dict[str, Token](), dict[str | None, Token]()
        for token in tokens:
            if texts.setdefault(token.text, token) != token:
                raise UsageError("--token-file: a token stands there twice, for different names")
            if limits.setdefault(token.owner, token).limits != token.limits:
                raise UsageError(f"--token-file: the lines of {token.owner} have different limits")
        return tokens


DEFAULT_URL = f"http://{Settings.host}:{Settings.port}"  # of a daemon without options


# --------------------------------------------------------------------------------------------------------------------
# Requests: one table of fields validates, builds the RunRequest and is the JSON Schema
# --------------------------------------------------------------------------------------------------------------------

_SEGMENTS = r"^(?![\s\S]*(?:^|/)\.{0,2}(?:/|$))[^\\\u0000]+$"  # relative, without empty, `.` and `..` segments
_NO_DOTDOT = r"^(?![\s\S]*(?:^|/)\.\.(?:/|$))[^\u0000]+$"
_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_LABEL = r"^[A-Za-z0-9._/-]{1,63}$"
_ARTIFACT = r"^[a-z0-9_-]{36,100}/(?:(?!\.{1,2}(?:/|$))[^/\u0000]+/)*(?:(?!\.{1,2}$)[^/\u0000]+)?$"
RUN_ID = re.compile(rf"(?:{_NODE}_)?[0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}")
_BASE64 = r"^[A-Za-z0-9+/]*={0,2}$"
_SIZE = r"^[0-9]{1,15}[bkmgBKMG]?$"
_HOST = r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
_HOST += r"|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of github.com/distribution/reference, or the id of an image.
_REFERENCE = rf"^(?:sha256:[a-f0-9]{{64}}|(?:{_HOST}/)?{_NAME}(?:/{_NAME})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[a-f0-9]{{64}})?)$"


def _size_field(low: int, high: int, description: str) -> dict[str, Any]:
    """A field in bytes, as a number or as `256m`."""
    says = f"must be a size such as 256m, from {low} to {high} bytes"
    text = {"type": "string", "pattern": _SIZE, "bytes": [low, high], "says": says}
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, text], "description": description}


def request_schema(settings: Settings, metered: bool = True) -> dict[str, Any]:
    """JSON Schema (2020-12) of the body of `POST /run` under the operator's limits, and where CPU time can be `metered` or
    not. `says` is the error for a `pattern`, a `format` or a `not`, where the keyword alone would not tell a person what to
    do."""
    command = {"type": "string", "minLength": 1, "maxLength": 2048}
    path = {"type": "string", "minLength": 1, "maxLength": 1024, "pattern": _NO_DOTDOT,
            "says": "must be a path without .. segments"}  # fmt: skip
    base64_text = {"type": "string", "pattern": _BASE64, "format": "base64", "says": "must be base64 with padding"}
    reference = {
        "type": "string", "minLength": 1, "maxLength": 2200, "pattern": _ARTIFACT,
        "says": "must be the id of a run, a slash and the path of an artifact of it, or nothing for all of them",
    }  # fmt: skip
    elsewhere = {"type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 1,
                 "properties": {"base64": base64_text, "artifact": reference}}  # fmt: skip
    content = {"anyOf": [{"type": "string"}, elsewhere]}
    longest = round(settings.max_timeout * 1000)
    largest = MAX_FILE_BYTES if settings.file_size is None else settings.file_size
    fields: dict[str, dict[str, Any]] = {
        "image": {
            "type": "string", "minLength": 1, "maxLength": 300, "pattern": _REFERENCE,
            "says": "must be an image reference such as alpine:3.19", "description": "Image to run.",
        },
        "files": {
            "type": "object", "maxProperties": 10_000,
            "propertyNames": {
                "minLength": 1, "maxLength": 1024, "pattern": _SEGMENTS, "format": "file-path",
                "says": "must be a relative path without empty, . or .. segments and backslashes, each of 255 bytes at most",
            },
            "additionalProperties": content,
            "description": "Files put into the workdir before the start: path to text, to {\"base64\": …}, or to "
            "{\"artifact\": \"<run id>/<path>\"}, a file or folder that a finished run has kept.",
        },
        "setup": {
            "type": "array", "maxItems": 50, "items": command,
            "description": "Shell commands run in the entrypoint's shell before it; the first that fails ends the run.",
        },
        "entrypoint": {
            "anyOf": [command, {"type": "array", "minItems": 1, "maxItems": 64,
                                "items": {"type": "string", "maxBytes": 100_000}}],
            "description": "A string runs as sh -c, an array without a shell. Absent: the image's own command.",
        },
        "input": {"description": "Any JSON value; its text is the container's stdin."},
        "stdin": {**content, "description": "Text, {\"base64\": …} or {\"artifact\": …} for the container's stdin."},
        "env": {
            "type": "object", "maxProperties": 1000,
            "propertyNames": {"pattern": _ENV_NAME, "says": "must be letters, digits and _, not beginning with a digit"},
            "additionalProperties": {"type": "string"}, "description": "Environment variables.",
        },
        "workdir": {
            "type": "string", "minLength": 1, "maxLength": 200, "pattern": r"^/", "format": "workdir", "default": DEFAULT_WORKDIR,
            "says": "must be an absolute path other than /, not below /proc, /sys or /dev, without ..",
            "description": "Working directory, made when missing; the image's own without entrypoint, setup and files.",
        },
        "network": {
            "type": "string", "maxLength": 100, "pattern": r"^(?:[a-zA-Z0-9][a-zA-Z0-9_.-]*)?$", "format": "network",
            "says": "must be none or the name of a network; host, container:… and ns:… are always refused",
            "description": "Absent or empty: the isolated bridge. none: no network. Else a network that --allow-network names.",
        },
        "timeout": {
            "type": "integer", "minimum": 1, "maximum": longest, "default": min(DEFAULT_TIMEOUT_MS, longest),
            "unit": "milliseconds", "description": "Wall time of the container in ms, from its start.",
        },
        "memory": _size_field(MIN_MEMORY_BYTES, settings.memory, "Memory, as bytes or 256m."),
        "cpus": {"type": "number", "minimum": 0.01, "maximum": settings.cpus, "description": "CPUs."},
        "pids": {"type": "integer", "minimum": MIN_PIDS, "maximum": settings.pids, "description": "Processes and threads."},
        "fileSize": _size_field(0, largest, "Largest file that a program may write."),
        "cpuTime": {
            **({"type": "integer", "minimum": 1, "maximum": 3_600_000, "unit": "milliseconds"} if metered else {"not": {}}),
            "says": "cannot be kept to here: lightrun does not see the cgroups of its engine",
            "description": "CPU time in ms of all processes, user and system, after which the run is killed.",
        },
        "outputLimit": {
            "type": "integer", "minimum": 0, "maximum": MAX_OUTPUT_BYTES,
            "description": "Bytes of stdout and stderr together; with more the run is killed, and only so many are told.",
        },
        "splitLogs": {"type": "boolean", "default": False, "description": "The state has stdout and stderr in place of logs."},
        "labels": {
            "type": "object", "maxProperties": 32,
            "propertyNames": {"pattern": _LABEL, "says": "must be 1 to 63 letters, digits or any of . _ / -"},
            "additionalProperties": {
                "type": "string", "maxLength": 256, "format": "printable", "says": "must be printable characters",
            },
            "description": "Shown in the state, in lists, callbacks and the log; ?label=name=value filters lists. Never secret.",
        },
        "extract": {
            "type": "array", "maxItems": 20,
            "items": {"anyOf": [path, {
                "type": "object", "required": ["from", "to"], "additionalProperties": False,
                "properties": {"from": path, "to": {
                    "type": "string", "minLength": 1, "maxLength": 1024, "pattern": _SEGMENTS, "format": "artifact-path",
                    "maxBytes": MAX_ARTIFACT_PATH_BYTES // 2,
                    "says": "must be a relative path without empty, . or .. segments and backslashes, of at most "
                    f"{MAX_ARTIFACT_DEPTH // 2} segments of 255 bytes",
                }},
            }]},
            "description": "Container paths to keep after the exit, absolute or relative to the workdir; {\"from\", \"to\"} "
            "keeps a file, or the contents of a folder, under another name.",
        },
        "extractOn": {
            "enum": ["success", "exit"], "type": "string", "default": "success",
            "description": "success: keep after exit code 0. exit: also after a failure, a timeout, a stop, out of memory.",
        },
        "detached": {"type": "boolean", "default": False, "description": "Answer 202 and run in the background."},
        "idle": {
            "type": "integer", "minimum": 1000, "maximum": 86_400_000, "unit": "milliseconds",
            "description": "The run ends when no exec has gone on in it for that long. Needs detached. Without entrypoint it "
            "does nothing but wait for them.",
        },
        "callbackUrl": {
            "type": "string", "maxLength": 2048, "pattern": r"^[hH][tT][tT][pP][sS]?://[!-~]+$", "format": "callback-url",
            "says": "must be an http or https URL of printable ASCII without credentials",
            "description": "Gets the final state. Needs detached.",
        },
        "callbackSecret": {
            "type": "string", "minLength": 16, "maxLength": 200, "format": "callback-secret",
            "says": "must be base64 after whsec_", "description": "Signs the callback. Needs callbackUrl.",
        },
    }  # fmt: skip
    return {"type": "object", "required": ["image"], "additionalProperties": False, "properties": fields}


def exec_schema(settings: Settings) -> dict[str, Any]:
    """The same of the body of `POST /runs/<id>/exec`, from the same table."""
    fields = request_schema(settings)["properties"]
    own = {"workdir": "Working directory, made when missing. Absent: that of the run.",
           "timeout": "Wall time in ms, from the start of the command."}  # fmt: skip
    chosen = {name: {**fields[name], **({"description": own[name]} if name in own else {})} for name in EXEC_FIELDS}
    chosen["workdir"].pop("default")
    return {"type": "object", "required": ["entrypoint"], "additionalProperties": False, "properties": chosen}


def _short_segments(path: str) -> bool:
    return all(len(segment.encode(errors="replace")) <= 255 for segment in path.split("/"))


def _good_workdir(path: str) -> bool:
    clean = clean_path(path)
    return ".." not in path.split("/") and clean != "/" and clean.split("/")[1] not in {"proc", "sys", "dev"}


def _good_url(text: str) -> bool:
    try:
        url = urllib.parse.urlsplit(text)
        return bool(url.hostname) and url.username is None and url.password is None and url.port != 0
    except ValueError:  # a port out of range, a bracket without its pair
        return False


def _is_base64(text: str) -> bool:
    return len(text) % 4 == 0 and bool(_regex(_BASE64).search(text))


FORMATS: dict[str, Callable[[str], bool]] = {  # what `pattern` cannot say, by the name that the schema gives it
    "": lambda _: True,
    "file-path": _short_segments,
    "artifact-path": lambda path: _short_segments(path) and path.count("/") < MAX_ARTIFACT_DEPTH // 2,
    "workdir": _good_workdir,
    "network": lambda name: name not in {"host", "default"},
    "callback-url": _good_url,
    "callback-secret": lambda text: not text.startswith("whsec_") or _is_base64(text[6:]),
    "base64": _is_base64,
    "printable": str.isprintable,
}


@functools.lru_cache(maxsize=64)
def _regex(pattern: str) -> re.Pattern[str]:
    """A JSON Schema pattern for Python, whose `$` would also match before a last newline and `\\w` beyond ASCII."""
    return re.compile(pattern.replace("$", r"\Z"), re.ASCII)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "array": (list,), "object": (dict,), "boolean": (bool,), "integer": (int,), "number": (int, float),
}  # fmt: skip


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def problems_of(value: Any, schema: dict[str, Any], path: list[Any]) -> Iterator[dict[str, Any]]:
    """Everything that is wrong with a value, by the part of JSON Schema that lightrun's table uses, as `problem` has it. Pure."""
    if "not" in schema:
        yield problem(schema["says"], *path)
    elif "anyOf" in schema:
        fitting = [choice for choice in schema["anyOf"] if _is(value, choice["type"])]
        if fitting:
            yield from problems_of(value, fitting[0], path)
        else:
            yield problem("must be of type " + " or ".join(choice["type"] for choice in schema["anyOf"]), *path)
    elif "type" in schema and not _is(value, schema["type"]):
        yield problem(f"must be of type {schema['type']}" + (f", in {schema['unit']}" if "unit" in schema else ""), *path)
    elif isinstance(value, str):
        yield from _text_problems(value, schema, path)
    elif isinstance(value, dict) and "type" in schema:
        yield from _member_problems(value, schema, path)
    elif isinstance(value, list) and "type" in schema:
        yield from _count(len(value), schema, "Items", "entries", path)
        for index, item in enumerate(value):
            yield from problems_of(item, schema.get("items", {}), [*path, index])
    elif isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield problem(f"must be from {schema['minimum']} to {schema['maximum']}", *path)


def _text_problems(value: str, schema: dict[str, Any], path: list[Any]) -> Iterator[dict[str, Any]]:
    low, high = schema.get("bytes", (0, math.inf))
    if wrong := [*_count(len(value), schema, "Length", "characters", path)]:
        yield from wrong
    elif len(value.encode(errors="replace")) > schema.get("maxBytes", math.inf):
        yield problem(f"must have at most {schema['maxBytes']} bytes", *path)
    elif "enum" in schema and value not in schema["enum"]:
        yield problem("must be one of " + ", ".join(schema["enum"]), *path)
    elif not (_regex(schema.get("pattern", "")).search(value) and FORMATS[schema.get("format", "")](value)) or (
        "bytes" in schema and not low <= parse_size(value) <= high
    ):
        yield problem(schema["says"], *path)


def _member_problems(value: dict[str, Any], schema: dict[str, Any], path: list[Any]) -> Iterator[dict[str, Any]]:
    yield from _count(len(value), schema, "Properties", "entries", path)
    yield from (problem("is required", *path, name) for name in schema.get("required", ()) if name not in value)
    known, others = schema.get("properties", {}), schema["additionalProperties"]
    for name, member in value.items():
        if name not in known and others is False:
            yield problem("is not a field", *path, name)
            continue
        if name not in known:
            yield from _text_problems(name, schema.get("propertyNames", {}), [*path, name])
        yield from problems_of(member, known.get(name, others), [*path, name])


def _count(count: int, schema: dict[str, Any], what: str, unit: str, path: list[Any]) -> Iterator[dict[str, Any]]:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    if not low <= count <= high:
        yield problem(f"must have {low} to {high} {unit}", *path)


def problem(message: str, *path: Any) -> dict[str, Any]:
    """What is wrong, and where, as a client is told."""
    return {"path": list(path), "message": message}


def _together(body: dict[str, Any], bad: set[Any]) -> Iterator[dict[str, Any]]:
    """The rules between fields. They look at the values of fields that are right by themselves, and at all for presence."""
    sound = {name: value for name, value in body.items() if name not in bad}
    entrypoint, setup, files = sound.get("entrypoint"), sound.get("setup", []), sound.get("files", {})
    if body.get("setup") and not isinstance(body.get("entrypoint"), str):
        yield problem("needs an entrypoint that is a string", "setup")
    elif isinstance(entrypoint, str) and len(shell_script(setup, entrypoint).encode()) > MAX_ARGUMENT_BYTES:
        yield problem(f"is, with entrypoint and shell quoting, over {MAX_ARGUMENT_BYTES} bytes", "setup")
    if isinstance(entrypoint, list) and not entrypoint[0]:
        yield problem("must name a program", "entrypoint", 0)
    for name, value in sound.get("env", {}).items():
        if len(name) + len(value.encode()) + 1 > MAX_ARGUMENT_BYTES:
            yield problem(f"must have, with its name, at most {MAX_ARGUMENT_BYTES} bytes", "env", name)
    if "input" in body and "stdin" in body:
        yield problem("cannot go together with input", "stdin")
    for name in ("callbackUrl", "idle"):
        if name in body and body.get("detached") is not True:
            yield problem("needs detached", name)
    for name in ("input", "stdin"):
        if name in body and "idle" in body and "entrypoint" not in body:
            yield problem("needs an entrypoint when there is idle", name)
    if "callbackSecret" in body and "callbackUrl" not in body:
        yield problem("needs callbackUrl", "callbackSecret")
    folders = folders_of(files, MAX_FOLDERS)
    if len(folders) > MAX_FOLDERS:
        yield problem(f"must not need more than {MAX_FOLDERS} folders", "files")
    yield from (problem("is both a file and a folder", "files", path) for path in files if path in folders)


def parse_json(raw: bytes) -> Any:
    """A JSON text, strictly (RFC 8259): UTF-8, no duplicate keys, no NaN, bounded numbers. Raises ValueError."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) < len(pairs):
            raise ValueError("the same key stands twice in one object")
        return result

    def integer(text: str) -> int:
        if len(text) > MAX_JSON_DIGITS:
            raise ValueError("a number has too many digits")
        return int(text)

    def fraction(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError("a number is out of range")
        return number

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    hooks: dict[str, Any] = {"parse_int": integer, "parse_float": fraction, "parse_constant": constant}
    try:
        return json.loads(raw.decode(), object_pairs_hook=members, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def as_written(raw: bytes, name: str) -> str:
    """The JSON text of a member of an object that is known to be good, with its numbers as they stand there."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(text, value)) + "]"
        return value.decode() if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False)

    return text(json.loads(raw, parse_int=str.encode, parse_float=str.encode)[name])  # a float has not room for every number


_BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")


def _is_bad(text: str) -> bool:
    return "\0" in text if text.isascii() else bool(_BAD_CHARACTERS.search(text))


def _bad_strings(value: Any, path: list[Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """NULs and lone surrogates, which neither a file system nor a process takes, anywhere in a body; and its depth. What
    stands in `input` is not told, not even its names: it is the program's own."""
    if depth > MAX_JSON_DEPTH:
        yield {"path": path, "message": "is nested too deeply"}
    elif isinstance(value, str) and _is_bad(value):
        yield {"path": path, "message": "must not hold NUL characters or lone surrogates"}
    elif isinstance(value, (list, dict)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str) and _is_bad(name):
                yield {"path": path, "message": "must not have names with NUL characters or lone surrogates"}
            else:
                yield from _bad_strings(item, path if path == ["input"] else [*path, name], depth + 1)


def printable(text: str) -> str:
    """A client's text for the log, where no character may look like another line."""
    return "".join(character if character.isprintable() else "?" for character in text[:1024])


def clean_path(path: str) -> str:
    """An absolute path without doubled, last or `.` slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def parent_folders(path: str) -> Iterator[str]:
    """`a/b/c` → `a`, `a/b`."""
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def way_to(workdir: str) -> list[str]:
    """The folders of the way to an absolute path, and itself, from the top; none for the root."""
    return [f"/{folder}" for folder in [*parent_folders(workdir[1:]), workdir[1:]] if folder]


def folders_of(paths: Iterable[str], most: float = math.inf) -> set[str]:
    """Every folder above these relative paths; not all of them when they are more than `most`."""
    folders: set[str] = set()
    for path in paths:
        while (path := posixpath.dirname(path)) and path not in folders and len(folders) <= most:
            folders.add(path)
    return folders


DEFAULT_WORKDIR = "/app"
DEFAULT_TIMEOUT_MS = 1_200_000
EXEC_FIELDS = ("entrypoint", "input", "stdin", "env", "workdir", "timeout", "outputLimit", "splitLogs")
SETUP_MARK = "/.lightrun.setup"  # in a container: which setup command is at work, as far as its script came


def shell_script(setup: Sequence[str], entrypoint: str) -> str:
    """The setup commands and the entrypoint as one script for `sh -c`. `eval` keeps them in one shell and a syntax error
    in its own command; `case` looks at the exit code without a variable or a parameter that they could see. Before each
    it notes which one it is, whatever options or output the last one has left behind."""

    def note(which: object) -> str:
        return f"{{ echo {which} >|{SETUP_MARK}; }} 2>/dev/null\n"

    steps = (
        f"{note(index)}eval {shlex.quote(command)}\ncase $? in 0) ;; *) exit $? ;; esac\n" for index, command in enumerate(setup)
    )
    return "".join(steps) + (note("done") if setup else "") + entrypoint


def normalise_image(reference: str) -> str:
    """A reference with registry, repository and tag or digest written out: `alpine` → `docker.io/library/alpine:latest`.
    The same text goes to the allow-list and to the engine, so that no short form (an id's prefix, say) means two things.
    Rules: github.com/distribution/reference, ParseNormalizedNamed."""
    if is_image_id(reference):
        return reference
    domain, slash, rest = reference.partition("/")
    if not slash or not (set(".:") & set(domain) or domain == "localhost" or domain != domain.lower()):
        domain, rest = "docker.io", reference
    domain = "docker.io" if domain == "index.docker.io" else domain
    if domain == "docker.io" and "/" not in rest:
        rest = "library/" + rest
    tagged = "@" in rest or ":" in rest
    return f"{domain}/{rest}" if tagged else f"{domain}/{rest}:latest"


def is_image_id(reference: str) -> bool:
    """Whether a reference is an image's whole id; `sha256:abc` is a name with a tag."""
    return bool(re.fullmatch(r"sha256:[a-f0-9]{64}", reference))


def matches_any(text: str, patterns: Iterable[str]) -> bool:
    """Whether one of the operator's shell patterns fits."""
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """A checked request. `command` is the container's Entrypoint, None for the image's own; `stdin` None for none."""

    image: str  # as the client wrote it
    reference: str  # written out
    files: dict[str, Content]
    command: list[str] | None
    stdin: Content | None
    env: dict[str, str]
    workdir: str | None  # None for the image's own
    network: str | None
    timeout: float  # seconds
    memory: int
    cpus: float
    pids: int
    extract: list[tuple[str, str | None]]  # a container's path, and the name under which it is kept
    extract_on_exit: bool
    detached: bool
    callback_url: str | None
    callback_secret: str | None
    file_size: int | None = None
    cpu_time: float | None = None  # seconds
    output_limit: int | None = None
    split_logs: bool = False
    tar: Part | None = None  # of the upload, to be unpacked in the workdir
    setup: int = 0  # commands before the entrypoint
    idle: float | None = None  # seconds without an exec
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, raw: bytes, settings: Settings, metered: bool = True, upload: Upload | None = None) -> RunRequest:
        """Check the body of `POST /run`, of which `raw` is the JSON. Raises BadRequest with every problem, NotAllowed for what
        a list refuses."""
        uploaded: dict[str, Part] = upload.files if upload else {}
        body = _checked(raw, request_schema(settings, metered), _together, uploaded)
        request = cls._of(body, raw, settings, upload)
        request.allowed_by(settings)
        return request

    @classmethod
    def parse_exec(cls, raw: bytes, settings: Settings, image: str) -> RunRequest:
        """Check the body of `POST /runs/<id>/exec`, for a run of that image. Raises BadRequest."""

        def rules(body: dict[str, Any], bad: set[Any]) -> Iterator[dict[str, Any]]:
            return (each for each in _together(body, bad) if each["path"][0] in EXEC_FIELDS)

        body = _checked(raw, exec_schema(settings), rules)
        request = cls._of({"image": image, **body}, raw, settings)
        return request if "workdir" in body else dataclasses.replace(request, workdir=None)

    @classmethod
    def _of(cls, body: dict[str, Any], raw: bytes, settings: Settings, upload: Upload | None = None) -> RunRequest:
        """What a checked body says."""
        uploaded: dict[str, Part] = upload.files if upload else {}
        entrypoint, setup = body.get("entrypoint"), body.get("setup", [])
        if isinstance(entrypoint, str):
            entrypoint = ["sh", "-c", shell_script(setup, entrypoint)]
        stdin = as_written(raw, "input") if "input" in body else body.get("stdin")
        files = {path: uploaded.get(path) or _content(value) for path, value in body.get("files", {}).items()}
        tar = upload.tar if upload else None
        own, waits = entrypoint is None and "workdir" not in body and not files and tar is None, False
        if entrypoint is None and "idle" in body:
            entrypoint, waits = [SHIM], True
        longest = round(settings.max_timeout * 1000)
        return cls(
            image=body["image"],
            reference=normalise_image(body["image"]),
            files=files,
            command=entrypoint,
            stdin=None if stdin is None else _content(stdin),
            env=body.get("env", {}),
            workdir=None if own else clean_path(body.get("workdir", DEFAULT_WORKDIR)),
            network=body.get("network") or None,
            timeout=body.get("timeout", longest if waits else min(DEFAULT_TIMEOUT_MS, longest)) / 1000,
            memory=_size(body.get("memory", settings.memory)),
            cpus=body.get("cpus", settings.cpus),
            pids=int(body.get("pids", settings.pids)),
            extract=[(each, None) if isinstance(each, str) else (each["from"], each["to"]) for each in body.get("extract", [])],
            extract_on_exit=body.get("extractOn") == "exit",
            detached=body.get("detached", False),
            callback_url=body.get("callbackUrl"),
            callback_secret=body.get("callbackSecret"),
            file_size=_size(body.get("fileSize")),
            cpu_time=body["cpuTime"] / 1000 if "cpuTime" in body else None,
            output_limit=_size(body.get("outputLimit")),
            split_logs=body.get("splitLogs", False),
            tar=tar,
            setup=len(setup),
            idle=body["idle"] / 1000 if "idle" in body else None,
            labels=body.get("labels", {}),
        )

    @property
    def waits(self) -> bool:
        """Whether the run does nothing but wait for execs."""
        return self.command == [SHIM]

    def allowed_by(self, settings: Settings) -> None:
        """Raises NotAllowed when one of the operator's lists or limits refuses this request."""
        for name in ("memory", "cpus", "pids", "file_size"):
            limit, asked = getattr(settings, name), getattr(self, name)
            if None not in {limit, asked} and asked > limit:
                raise NotAllowed(f"{name} is over the limit of today")
        if self.timeout > settings.max_timeout:
            raise NotAllowed("timeout is over the limit of today")
        if settings.allow_image and not matches_any(self.reference, settings.allow_image):
            raise NotAllowed(f"image {self.reference} is not one that --allow-image names")
        if self.network not in {None, "none"} and not matches_any(str(self.network), settings.allow_network):
            raise NotAllowed(f"network {self.network} is not one that --allow-network names")
        if self.callback_url:
            host = urllib.parse.urlsplit(self.callback_url).hostname or ""
            if not callback_host_allowed(host, settings.callback_allow):
                raise NotAllowed(f"callback host {host} is not one that --callback-allow names")

    def contents(self) -> Iterator[Content]:
        """Where everything comes from that goes into the container."""
        yield from self.files.values()
        yield from (each for each in (self.stdin, self.tar) if each is not None)

    def pack(self) -> bytes:
        """What the store keeps of a request that is to survive the daemon; what was uploaded is kept beside it."""
        files = {path: _packed(content) for path, content in self.files.items()}
        return to_json({**vars(self), "files": files, "stdin": _packed(self.stdin), "tar": _packed(self.tar)})

    @classmethod
    def unpack(cls, packed: bytes | None, image: str) -> RunRequest:
        """A request as it was accepted once; one of no reference, not to be started, when it is gone or spoilt."""
        try:
            fields = json.loads(packed or b"")
            if "reference" not in fields:  # the first build kept the client's body
                return cls.parse(packed or b"", BOUNDLESS)
            files = {path: _unpacked(content) for path, content in fields.pop("files").items()}
            extract = [(each, None) if isinstance(each, str) else tuple(each) for each in fields.pop("extract")]
            stdin, tar = _unpacked(fields.pop("stdin")), _unpacked(fields.pop("tar", None))
            return cls(**fields, files=files, stdin=stdin, tar=tar, extract=extract)
        except (ValueError, TypeError, LookupError, AttributeError, LightrunError):
            return dataclasses.replace(cls.parse(to_json({"image": image}), BOUNDLESS), reference="")


BOUNDLESS = Settings(
    memory=1 << 50, cpus=1e6, max_timeout=86_400, pids=1 << 22, allow_network=("*",), callback_allow=("*", "169.254.*", "fe80*"),
)  # fmt: skip
Rules = Callable[[dict[str, Any], set[Any]], Iterable[dict[str, Any]]]


def _checked(raw: bytes, schema: Any, rules: Rules = lambda _body, _bad: (), uploaded: Iterable[str] = ()) -> dict[str, Any]:
    """A body by its schema, and by the names of files that came beside it. Raises BadRequest."""
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise BadRequest(details=[problem(f"the body is not JSON: {error}")]) from error
    problems = []
    if isinstance(body, dict) and uploaded and isinstance(files := body.setdefault("files", {}), dict):
        problems = [problem("stands in the JSON too", "files", name) for name in uploaded if name in files]
        files |= dict.fromkeys(uploaded, "")
    problems += itertools.islice(itertools.chain(_bad_strings(body, []), problems_of(body, schema, [])), MAX_PROBLEMS)
    if isinstance(body, dict) and len(problems) < MAX_PROBLEMS:
        problems += rules(body, {problem["path"][0] for problem in problems if problem["path"]})
    if problems:
        raise BadRequest(details=problems[:MAX_PROBLEMS])
    return body  # type: ignore[no-any-return]  # the schema says it is an object


def _size(value: Any) -> Any:
    """Bytes of a field that is checked; None for None."""
    return parse_size(value) if isinstance(value, str) else None if value is None else int(value)


@dataclasses.dataclass(frozen=True)
class Reference:
    """An artifact of a run, or below `""` all of them."""

    run_id: str
    path: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the upload that came with a request, in bytes."""

    start: int
    size: int


Content = bytes | Reference | Part  # what goes into a container, or where it lies


def _content(value: str | dict[str, str]) -> Content:
    if isinstance(value, str):
        return value.encode()
    if "base64" in value:
        return base64.b64decode(value["base64"])
    run_id, _, path = value["artifact"].partition("/")
    return Reference(run_id, path.rstrip("/"))


def _packed(content: Content | None) -> Any:
    return base64.b64encode(content).decode() if isinstance(content, bytes) else content and dataclasses.astuple(content)


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return Reference(*value) if isinstance(value[0], str) else Part(*value)
    return value if value is None else base64.b64decode(value)


# -- uploads: multipart/form-data (RFC 7578)


class Upload:
    """The body of a request that is multipart/form-data, where the server has put it: its parts are found, and nothing is
    copied. One named `run` is the JSON, one may be a `tar`, and each other is a file of that name."""

    def __init__(self, file: IO[bytes], name: str | None = None) -> None:
        self._file, self.name = file, name  # in the state dir, as long as the request lasts
        self.size = file.seek(0, os.SEEK_END)
        self.files: dict[str, Part] = {}
        self.run: Part | None = None
        self.tar: Part | None = None

    @classmethod
    def parse(cls, body: IO[bytes], content_type: str) -> Upload:
        """The parts of a body. Raises BadRequest."""
        name = getattr(body, "name", None)
        upload = cls(Path(name).open("rb") if name else io.BytesIO(body.read()), name)  # noqa: SIM115  # for the run's life
        try:
            parts = upload.files = upload._parts(multipart_boundary(content_type))
            upload.run, upload.tar = parts.pop("run", None), parts.pop("tar", None)
            if upload.run is None:
                raise ValueError("there is no part named run, which is the JSON of the request")
            if upload.run.size > MAX_RUN_PART_BYTES:
                raise ValueError(f"the part run has more than {MAX_RUN_PART_BYTES} bytes; send files as parts of their own")
        except (ValueError, TypeError) as error:  # the second is email's
            upload.close()
            why = error if isinstance(error, ValueError) else "a parameter comes in pieces that cannot be joined"
            raise BadRequest(details=[problem(f"the body is not what its Content-Type says: {why}")]) from error
        return upload

    def read(self, part: Part) -> bytes:
        """All of a part; for a small one."""
        return b"".join(self.pieces(part))

    def pieces(self, part: Part) -> Iterator[bytes]:
        """A part, piece by piece."""
        at, end = part.start, part.start + part.size
        while at < end:
            self._file.seek(at)
            piece = self._file.read(min(COPY_BYTES, end - at))
            if not piece:
                raise OSError(errno.EIO, "the upload has become shorter")
            at += len(piece)
            yield piece

    def digest(self) -> str:
        """What another upload has if its parts are the same, whatever its boundary."""
        digest = hashlib.sha256(b"multipart")
        parts = {"run": self.run, "tar": self.tar, **self.files}
        for name, part in sorted(parts.items(), key=lambda item: item[1].start if item[1] else 0):
            content = hashlib.sha256()
            for piece in self.pieces(part) if part else ():
                content.update(piece)
            digest.update(hashlib.sha256(name.encode()).digest() + content.digest() + bytes([part is None]))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def _parts(self, boundary: bytes) -> dict[str, Part]:
        """Each part's name and place. Raises ValueError."""
        parts: dict[str, Part] = {}
        delimiter = b"\r\n--" + boundary
        at = self._delimited(0, delimiter[2:])
        if self.read(Part(0, min(at, 3))) not in {b"", b"\r\n"}:
            raise ValueError("it does not begin with its boundary")
        at += len(delimiter) - 2
        while self.read(Part(at, 2)) != b"--":
            head = self.read(Part(at, min(MAX_PART_HEADER_BYTES, self.size - at)))
            if (length := head.find(b"\r\n\r\n")) < 0:
                raise ValueError("the head of a part has no end, or is too long")
            name, start = part_name(head[:length]), at + length + 4
            if name in parts:
                raise ValueError(f"the part {printable(name)} stands twice")
            if len(parts) >= MAX_PARTS:
                raise ValueError(f"it has more than {MAX_PARTS} parts")
            end = self._delimited(start, delimiter)
            parts[name] = Part(start, end - start)
            at = end + len(delimiter)
        if self.size - at > 4 or self.read(Part(at + 2, self.size - at - 2)).strip(b"\r\n"):
            raise ValueError("something follows its last boundary")
        return parts

    def _delimited(self, start: int, delimiter: bytes) -> int:
        """Where the next delimiter of parts stands, at or after `start`. Raises ValueError."""
        window, at, kept = b"", start, len(delimiter) + 1  # it counts with the two bytes that follow it
        self._file.seek(start)
        while piece := self._file.read(COPY_BYTES):
            window += piece
            found = window.find(delimiter)
            while 0 <= found < len(window) - kept:
                if window[found + len(delimiter) : found + len(delimiter) + 2] in {b"\r\n", b"--"}:
                    return at + found
                found = window.find(delimiter, found + 1)
            at, window = at + max(0, len(window) - kept), window[-kept:]
        raise ValueError("its last boundary is missing; it was cut short")


def multipart_boundary(content_type: str) -> bytes:
    """The boundary that a Content-Type names (RFC 2046, 5.1.1). Raises ValueError."""
    if content_type.count(";") > MAX_ATTRIBUTES:
        raise ValueError("it has too many parameters")
    head = email.message.Message()
    head["Content-Type"] = content_type
    boundary = head.get_param("boundary")
    if not isinstance(boundary, str) or not re.fullmatch(r"[ -~]{0,69}[!-~]", boundary):
        raise ValueError("it names no boundary of 1 to 70 characters")
    return boundary.encode()


def part_name(head: bytes) -> str:
    """The name of a part of a form, of its header lines. Raises ValueError."""
    if head.count(b";") > MAX_ATTRIBUTES:
        raise ValueError("the head of a part has too many parameters")
    about = email.parser.HeaderParser().parsestr(head.decode("latin-1").strip("\r\n") + "\r\n\r\n")
    name = about.get_param("name", header="Content-Disposition")
    if about.get_content_disposition() != "form-data" or not isinstance(name, str) or not name:
        raise ValueError("a part has no name")
    if about.get("Content-Transfer-Encoding", "binary").strip().lower() not in {"binary", "8bit", "7bit"}:
        raise ValueError("a part has a Content-Transfer-Encoding, which forms do not have")
    try:
        return name.encode("latin-1").decode()
    except UnicodeError as error:
        raise ValueError("a part has a name that is not UTF-8") from error


def callback_host_allowed(host: str, patterns: tuple[str, ...]) -> bool:
    """Whether a callback may go to this host: any without patterns, but a link-local address only when a pattern that does
    not begin with a wildcard names it."""
    if is_link_local(host):
        return matches_any(host.lower(), [pattern.lower() for pattern in patterns if pattern[0] not in "*?["])
    return not patterns or matches_any(host.lower(), map(str.lower, patterns))


def is_link_local(host: str) -> bool:
    """Whether a host is a literal address where clouds serve their metadata (169.254.0.0/16, fe80::/10)."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_link_local)


# --------------------------------------------------------------------------------------------------------------------
# Run: the record of a run
# --------------------------------------------------------------------------------------------------------------------

EXTRACTED = ["exited", "stopped", "timeout", "cpu_limit", "output_limit", "idle", "oom"]  # with `extractOn: exit`
REASONS = [*EXTRACTED, "cancelled", "interrupted", "pull_failed", "start_failed", "lost", "engine_error"]
STDIN_BROKE = "the connection that carried its stdin broke; it may have taken that for the end of its input"
EXEC_REASONS = ["exited", "timeout", "output_limit", "cancelled", "run_ended", "engine_error"]
PHASES = {"queued": "queue", "pulling": "pull", "starting": "start", "running": "run", "extracting": "extract"}


def timestamp(seconds: float) -> str:
    """Unix seconds as `2026-01-31T10:00:00.184Z`."""
    moment = datetime.datetime.fromtimestamp(math.floor(seconds * 1000 + 0.5) / 1000, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_timestamp(text: str) -> float:
    """Unix seconds of an engine's or lightrun's own time, of which Go prints up to nine decimals."""
    match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", text)
    if not match:
        raise ValueError(f"not a time: {text!r}")
    whole = datetime.datetime.fromisoformat(match[1]).replace(tzinfo=datetime.timezone.utc)
    return whole.timestamp() + float(match[2] or 0)


@dataclasses.dataclass
class Run:
    """What is known of a run (SPEC 2). Times in Unix seconds, timings in ms. Written by the run's worker only."""

    id: str
    image: str
    created: float
    waited: bool  # a client waits for it and nobody else could receive the result
    phase: str = "queued"
    reason: str | None = None
    image_id: str | None = None
    started: float | None = None
    finished: float | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    error: str | None = None
    timings: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES.values(), 0))
    logs_truncated: bool = False
    artifacts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extracted: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    callback: dict[str, Any] | None = None
    usage: dict[str, int] = dataclasses.field(default_factory=dict)
    warm: bool = False  # its container was started before
    split_logs: bool = False  # the state has stdout and stderr apart
    log_bytes: list[int] = dataclasses.field(default_factory=list)  # of stdout and of stderr, dropped ones too; 1 if in order
    owner: str | None = None  # the name of the token that it came with; told to those who see all
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def status(self) -> str:
        """`running`, `succeeded`, `failed` or `cancelled`: it follows from the reason."""
        if self.reason is None:
            return "running"
        if self.reason in {"exited", "stopped"}:
            return "succeeded" if self.exit_code == 0 else "failed"
        if self.reason == "idle":
            return "succeeded"
        return "cancelled" if self.reason == "cancelled" or (self.reason == "interrupted" and self.waited) else "failed"

    def head(self) -> dict[str, Any]:
        """The state without logs, artifacts and extracted, as `/runs` lists it."""
        final = self.finished is not None
        state = {
            "id": self.id,
            "status": self.status,
            "phase": None if final else self.phase,
            "reason": self.reason,
            "owner": self.owner,
            "labels": self.labels or None,
            "image": self.image,
            "imageId": self.image_id,
            "createdAt": timestamp(self.created),
            "startedAt": None if self.started is None else timestamp(self.started),
            "finishedAt": None if self.finished is None else timestamp(self.finished),
            "exitCode": self.exit_code,
            "oomKilled": self.oom_killed or None,
            "error": self.error,
            "durationMs": None if self.finished is None else max(0, round((self.finished - self.created) * 1000)),
            "timings": self.timings if final else None,
            "usage": self.usage or None,
            "warm": self.warm or None,
            "logsTruncated": self.logs_truncated,
            "callback": self.callback,
        }
        return {name: value for name, value in state.items() if value is not None}

    @classmethod
    def from_head(cls, head: dict[str, Any], waited: bool) -> Run:
        """An unfinished run as it was accepted."""
        run = cls(head["id"], head["image"], parse_timestamp(head["createdAt"]), waited, callback=head.get("callback"))
        return dataclasses.replace(run, owner=head.get("owner"), labels=head.get("labels", {}))

    def tail(self) -> dict[str, Any]:
        """What the state shows beside the head, kept apart from it since it can be long."""
        parts = {
            "artifacts": self.artifacts, "extracted": self.extracted, "splitLogs": self.split_logs, "logBytes": self.log_bytes,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part}


def whole_state(head: dict[str, Any], tail: dict[str, Any], kept: bytes) -> dict[str, Any]:
    """The state as `GET /runs/<id>` and a callback show it. `kept` is the log, as Log.frames()."""
    tail = dict(tail)
    tail.pop("logBytes", None)
    if tail.pop("splitLogs", False):
        state = {**head, **{name: raw_log(kept, name).decode(errors="replace") for name in STREAMS.values()}}
    else:
        state = {**head, "logs": log_lines(kept)}
    state["logsTruncated"] = state.pop("logsTruncated")
    callback = state.pop("callback", None)
    return {**state, **tail, **({"callback": callback} if callback else {})}


def to_json(value: Any) -> bytes:
    """The one way in which lightrun writes JSON: UTF-8, no spaces to spare."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


# --------------------------------------------------------------------------------------------------------------------
# Store: runs in SQLite; the only section that writes SQL
# --------------------------------------------------------------------------------------------------------------------

SCHEMA = (  # what each version adds to the one before; the first build's is the first
    """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of acceptance
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,        -- bytes of artifacts, logs and record, counted when the run ended
    waited INTEGER NOT NULL,                -- nobody but a waiting client could receive the result
    begun INTEGER NOT NULL DEFAULT 0,       -- its container may have been started
    fed INTEGER NOT NULL DEFAULT 0,         -- its stdin was written whole
    asked TEXT,                             -- JSON of the Ask, when somebody wanted it to end
    owed INTEGER NOT NULL DEFAULT 0,        -- a callback is still to be delivered
    due REAL NOT NULL DEFAULT 0,            -- Unix seconds of its next attempt
    key TEXT UNIQUE,                        -- Idempotency-Key
    digest TEXT NOT NULL DEFAULT '',        -- SHA-256 of the body, when there is a key
    head TEXT NOT NULL                      -- JSON of Run.head()
);
CREATE INDEX runs_by_status ON runs (status, seq);
CREATE INDEX runs_owed ON runs (seq) WHERE owed;
CREATE TABLE details (                      -- apart, so that lists never read past it
    id TEXT PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE,
    tail TEXT NOT NULL,                     -- JSON of Run.tail()
    frames BLOB NOT NULL                    -- the kept log, as Log.frames()
);
""",
    """
CREATE TABLE kept AS  -- one row, part of every transaction that changes it
    SELECT coalesce(sum(size), 0) AS bytes, count(*) AS runs FROM runs WHERE status != 'running';
""",
    "ALTER TABLE runs ADD COLUMN meter TEXT;  -- JSON of Slot.begin(): what was counted before its container started\n",
    "ALTER TABLE runs ADD COLUMN warm TEXT;  -- JSON of HandOut: the warm container that its program may have begun in\n",
    """
CREATE TABLE execs (  -- those that go on: what the next daemon needs to end them, since nobody waits for them any more
    id TEXT PRIMARY KEY,  -- the engine's
    run TEXT NOT NULL,
    pid INTEGER NOT NULL  -- in the run's container
) WITHOUT ROWID;
""",
    """
ALTER TABLE runs ADD COLUMN owner TEXT;  -- the name of the token that it came with
CREATE TABLE facets (facet TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (facet, seq)) WITHOUT ROWID;  -- see facets()
INSERT INTO facets SELECT '[null,null,null,"failed"]', seq FROM runs WHERE head LIKE '%"callback":{"status":"failed"%';
INSERT INTO facets SELECT '[null,"' || status || '",null,"failed"]', seq FROM runs
    WHERE head LIKE '%"callback":{"status":"failed"%';
""",
)


Execute = Callable[..., sqlite3.Cursor]  # a statement of a transaction, and its values
WEIGH = "UPDATE kept SET bytes = bytes + ?, runs = runs + ?"


def facet(owner: str | None, status: str | None, label: tuple[str, str] | None, callback: str | None) -> str:
    """What a list is filtered by, as one text."""
    return to_json([owner, status, label, callback]).decode()


def facets(head: Mapping[str, Any] | None) -> set[str]:
    """All that lists can be filtered by to have a run in them, but nothing and a status alone, which are columns. So each list
    is one range of one index, however much there is; a run without owner and labels has none."""
    if head is None:
        return set()
    failed = {"failed"} & {head.get("callback", {}).get("status")}
    owners, labels = {None, head.get("owner")}, [None, *head.get("labels", {}).items()]
    found = itertools.product(owners, {None, head["status"]}, labels, {None, *failed})
    return {facet(*each) for each in found} - {facet(None, status, None, None) for status in (None, head["status"])}


class Store:
    """The record of every run. A write that was acknowledged to a client survives a power loss (`durable`: an fsync of
    the write-ahead log); the others survive any end of the daemon. Readers have a connection of their own, so that
    they never wait for a disk. Source: sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous.

    What is secret (a request that may have to be started again, a callback that is owed) lies in a file of its own, which
    is unlinked when it is no longer needed: a database would keep its pages, and its log a copy."""

    def __init__(self, state_dir: Path) -> None:
        self._write_lock = threading.Lock()  # guards _writer
        self._read_lock = threading.Lock()  # guards _reader
        self._secrets, database = state_dir / "secrets", state_dir / "lightrun.db"
        with contextlib.ExitStack() as opened:
            try:
                for folder in (state_dir, self._secrets):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    folder.chmod(0o700)
                opened.enter_context(_locked(state_dir))
                self._writer = opened.enter_context(contextlib.closing(self._open(database)))
                self._prepare()
                self._reader = opened.enter_context(contextlib.closing(self._open(database)))
                self.id = str(self._one("SELECT value FROM meta WHERE name = 'state'")[0])
            except (OSError, sqlite3.Error, Unavailable) as error:
                raise StartError(f"{state_dir}: {error}") from error
            self._opened = opened.pop_all()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        try:
            for pragma in ("journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON", "wal_autocheckpoint=1000"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()  # what is no database is noticed by the first of these
            raise
        return connection

    def _prepare(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(SCHEMA):
            raise StartError(f"the state dir was made by a newer lightrun (schema {version}, known {len(SCHEMA)})")
        identity = "" if version else f"INSERT INTO meta VALUES ('state', '{uuid.uuid4().hex}');"
        if version < len(SCHEMA):
            steps = ";".join(SCHEMA[version:])
            self._writer.executescript(f"BEGIN;{steps};{identity}PRAGMA user_version={len(SCHEMA)};COMMIT;")

    @contextlib.contextmanager
    def _transaction(self, durable: bool) -> Iterator[Execute]:
        """One transaction; rolled back, and raised as Unavailable, when it cannot be written (a full disk, say). Raises
        StorageUncertain when even that is not known."""
        with self._write_lock:
            certain = True
            try:
                self._writer.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield lambda sql, *values: self._writer.execute(sql, values)
                    certain = False
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                        certain = True
                    raise
            except sqlite3.Error as error:
                if certain or "full" in str(error):  # SQLITE_FULL: the end of the transaction found no room
                    raise Unavailable("storage_unavailable", f"the state dir cannot be written: {error}", 5) from error
                raise StorageUncertain(f"the state dir may not have been written: {error}") from error

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._read_lock:
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise Unavailable("storage_unavailable", f"the state dir cannot be read: {error}", 5) from error

    def _one(self, sql: str, *values: Any) -> Any:
        rows = self._all(sql, *values)
        if not rows:
            raise NotFound("there is no such run")
        return rows[0]

    def add(
        self, run: Run, key: str | None = None, digest: str = "", request: bytes | None = None, upload: Upload | None = None
    ) -> None:
        """Record an accepted run, with its request, and what was uploaded, if it is to survive the daemon: on disk when this
        returns then."""
        try:
            if request is not None:
                if upload:
                    self._keep_upload(f"{run.id}.upload", upload)
                self._write_secret(run.id, request)
            with self._transaction(durable=request is not None) as execute:
                execute(
                    "INSERT INTO runs (id, status, waited, owed, key, digest, head, owner)"
                    " VALUES (?, 'running', ?, ?, ?, ?, ?, ?)",
                    run.id, run.waited, run.callback is not None, key, digest, to_json(run.head()).decode(), run.owner,
                )  # fmt: skip
                self._file(execute, run.id, None, run.head())
        except (Unavailable, StorageUncertain):  # should it be there all the same, the next start refuses it
            self._drop_secret(run.id)
            self._drop_secret(f"{run.id}.upload")
            raise

    @staticmethod
    def _file(execute: Execute, run_id: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
        """Part of a transaction that changes a run's head: in which lists it is."""
        old, new = facets(before), facets(after)
        if old != new:
            seq = execute("SELECT seq FROM runs WHERE id = ?", run_id).fetchone()[0]
            for each in old - new:
                execute("DELETE FROM facets WHERE facet = ? AND seq = ?", each, seq)
            for each in new - old:
                execute("INSERT INTO facets VALUES (?, ?)", each, seq)

    def _keep_upload(self, name: str, upload: Upload) -> None:
        """Keep an upload, without a copy when it is in a file already. Raises Unavailable."""
        if upload.name is None:
            self._write_secret(name, upload.read(Part(0, upload.size)))
            return
        try:
            with Path(upload.name).open("rb") as file:
                os.fsync(file.fileno())
            os.link(upload.name, self._secrets / name)
        except OSError as error:
            raise Unavailable("storage_unavailable", f"the state dir cannot be written: {error.strerror}", 5) from error

    def upload(self, run_id: str) -> Upload | None:
        """What was kept of an upload with an unfinished run."""
        with contextlib.suppress(OSError):
            return Upload((self._secrets / f"{run_id}.upload").open("rb"))
        return None

    def _write_secret(self, name: str, data: bytes) -> None:
        """Write a private file, durably. Raises Unavailable."""
        try:
            with open(self._secrets / name, "wb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(self._secrets, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._drop_secret(name)
            raise Unavailable("storage_unavailable", f"the state dir cannot be written: {error.strerror}", 5) from error

    def _drop_secret(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._secrets / name).unlink()

    def request(self, run_id: str) -> bytes | None:
        """The stored body of an unfinished run."""
        with contextlib.suppress(OSError):
            return (self._secrets / run_id).read_bytes()
        return None

    def callback(self, run_id: str) -> bytes | None:
        """What `finish` was given for a callback that is still owed. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return (self._secrets / f"{run_id}.callback").read_bytes()
        return None

    def tidy(self, artifacts_root: Path) -> None:
        """Remove the files and folders of runs that are not there (any more), as a crash can leave them."""
        known = {run_id for (run_id,) in self._all("SELECT id FROM runs")}
        needed = {run_id for (run_id,) in self._all("SELECT id FROM runs WHERE status = 'running'")}
        needed |= {f"{run_id}.upload" for run_id in needed}
        owed, failed = self.owed(), facet(None, None, None, "failed")  # in this order: what is owed may just fail
        failures = self._all("SELECT id FROM facets JOIN runs USING (seq) WHERE facet = ?", failed)
        needed |= {f"{run_id}.callback" for run_id, *_ in (*owed, *failures)}
        for path in self._secrets.iterdir():
            if path.name not in needed:
                self._drop_secret(path.name)
        for path in artifacts_root.iterdir():
            if RUN_ID.fullmatch(path.name.removesuffix(".partial")) and path.name not in known:
                remove_tree(path)

    def find_key(self, key: str) -> tuple[str, str] | None:
        """Id and digest of the run with this idempotency key."""
        rows = self._all("SELECT id, digest FROM runs WHERE key = ?", key)
        return rows[0] if rows else None

    def begin(self, run_id: str, meter: str | None = None, warm: str | None = None, durable: bool = False) -> None:
        """Record that the run's container is about to be started, what counts its usage, and which one it is if that is not
        in its name."""
        with self._transaction(durable) as execute:
            execute("UPDATE runs SET begun = 1, meter = ?, warm = ? WHERE id = ?", meter, warm, run_id)

    def take_back(self, run_id: str) -> None:
        """Record that the run has not begun after all."""
        with self._transaction(durable=False) as execute:
            execute("UPDATE runs SET begun = 0, meter = NULL, warm = NULL WHERE id = ?", run_id)

    def fed(self, run_id: str) -> None:
        """Record that the run's stdin was written whole."""
        with self._transaction(durable=False) as execute:
            execute("UPDATE runs SET fed = 1 WHERE id = ?", run_id)

    def begin_exec(self, exec_id: str, run_id: str, pid: int) -> None:
        """Record that a command is about to begin in a run's container."""
        with self._transaction(durable=False) as execute:
            execute("INSERT INTO execs VALUES (?, ?, ?)", exec_id, run_id, pid)

    def end_exec(self, exec_id: str) -> None:
        """Record that there is nothing left of it to end."""
        with self._transaction(durable=False) as execute:
            execute("DELETE FROM execs WHERE id = ?", exec_id)

    def execs(self) -> list[tuple[str, str, int]]:
        """id, run and pid of those that an earlier daemon left."""
        return self._all("SELECT id, run, pid FROM execs")

    def ask(self, run_id: str, recorded: Callable[[str | None], str]) -> None:
        """Record what is asked of an unfinished run; `recorded` makes it of what was asked before."""
        with self._transaction(durable=True) as execute:
            if row := execute("SELECT asked FROM runs WHERE id = ? AND status = 'running'", run_id).fetchone():
                execute("UPDATE runs SET asked = ? WHERE id = ?", recorded(row[0]), run_id)

    def unfinished(self) -> list[tuple[str, int, int, int, str | None, str | None, str | None]]:
        """head, waited, begun, fed, asked, meter and warm of every unfinished run, in the order of acceptance."""
        return self._all("SELECT head, waited, begun, fed, asked, meter, warm FROM runs WHERE status = 'running' ORDER BY seq")

    def finish(self, run: Run, frames: bytes, callback: bytes | None = None) -> None:
        """Record the end of a run, whole, in one transaction, with what its callback needs."""
        head, tail = to_json(run.head()).decode(), to_json(run.tail()).decode()
        size = len(head) + len(tail) + len(frames) + sum(entry.get("bytes", 0) for entry in run.artifacts)
        if callback is not None:
            self._write_secret(f"{run.id}.callback", callback)
        with self._transaction(durable=True) as execute:
            end = "UPDATE runs SET status = ?, size = ?, head = ?, asked = NULL WHERE id = ? AND status = 'running'"
            if execute(end, run.status, size, head, run.id).rowcount:  # not so when an earlier try was written after all
                execute("INSERT INTO details VALUES (?, ?, ?)", run.id, tail, frames)
                self._file(execute, run.id, {**run.head(), "status": "running"}, run.head())
                execute(WEIGH, size, 1)
        self._drop_secret(run.id)
        self._drop_secret(f"{run.id}.upload")

    def owed(self) -> list[tuple[str, float, str]]:
        """Id, time of the next attempt and head of every finished run whose callback is owed."""
        return self._all("SELECT id, due, head FROM runs WHERE owed AND status != 'running' ORDER BY seq")

    def attempted(self, run_id: str, callback: dict[str, Any], due: float | None) -> None:
        """Record an attempt at a callback; `due` is None when there will be no other."""
        with self._transaction(durable=callback["status"] == "delivered") as execute:  # then its secret goes
            row = execute("SELECT head FROM runs WHERE id = ?", run_id).fetchone()
            if row:
                self._note_callback(execute, run_id, json.loads(row[0]), callback, due or 0)
        if callback["status"] == "delivered":  # a failed one may be sent again
            self._drop_secret(f"{run_id}.callback")

    def owe_again(self, run_id: str) -> bool:
        """Record that a callback that has failed is owed again; false when it has not."""
        with self._transaction(durable=True) as execute:
            row = execute("SELECT head FROM runs WHERE id = ? AND status != 'running'", run_id).fetchone()
            before = json.loads(row[0]) if row else {}
            if before.get("callback", {}).get("status") != "failed":
                return False
            self._note_callback(execute, run_id, before, {"status": "pending", "attempts": 0}, 0)
        return True

    def _note_callback(self, execute: Execute, run_id: str, before: dict[str, Any], callback: dict[str, Any], due: float) -> None:
        """Part of a transaction: how a run's callback is, and when it is due next."""
        after, owed = {**before, "callback": callback}, callback["status"] == "pending"
        execute("UPDATE runs SET owed = ?, due = ?, head = ? WHERE id = ?", owed, due, to_json(after).decode(), run_id)
        self._file(execute, run_id, before, after)

    def delete(self, run_id: str) -> None:
        """Forget a finished run. Raises NotFound, Conflict."""
        with self._transaction(durable=True) as execute:
            row = execute("SELECT status, size, head FROM runs WHERE id = ?", run_id).fetchone()
            if row is None:
                raise NotFound("there is no such run")
            if row[0] == "running":
                raise Conflict("the run is still running", "running")
            self._file(execute, run_id, json.loads(row[2]), None)
            execute("DELETE FROM runs WHERE id = ?", run_id)
            execute(WEIGH, -row[1], -1)
        self._drop_secret(f"{run_id}.callback")

    def head(self, run_id: str) -> str:
        """The JSON of a run's head. Raises NotFound."""
        return str(self._one("SELECT head FROM runs WHERE id = ?", run_id)[0])

    def tail(self, run_id: str) -> dict[str, Any]:
        """Run.tail() of a finished run. Raises NotFound."""
        tail: dict[str, Any] = json.loads(self._one("SELECT tail FROM details WHERE id = ?", run_id)[0])
        return tail

    def frames(self, run_id: str) -> bytes:
        """The kept log of a finished run. Raises NotFound."""
        return bytes(self._one("SELECT frames FROM details WHERE id = ?", run_id)[0])

    def owner(self, run_id: str) -> str | None:
        """Whose run it is. Raises NotFound."""
        owner: str | None = self._one("SELECT owner FROM runs WHERE id = ?", run_id)[0]
        return owner

    def heads(
        self, status: str | None, before: str | None, limit: int, owner: str | None = None,
        label: tuple[str, str] | None = None, callback: str | None = None, start: str | None = None,
    ) -> list[str]:  # fmt: skip
        """The JSON of up to `limit` heads, newest first, of runs whose id begins with `start`. Raises NotFound for a `before`
        that is unknown, or another owner's."""
        known = "SELECT seq FROM runs WHERE id = ? AND (? IS NULL OR owner = ?)"
        top = self._one(known, before, owner, owner)[0] if before else sys.maxsize
        source, where, order, values = "runs", "seq < ?", "seq", [top]
        if start:  # they are few: found by their ids, and sorted
            where, order, values = "+seq < ? AND id >= ? AND id < ?", "+seq", [top, start, start + "~"]
        if owner is not None or label or callback:
            source = "runs CROSS JOIN facets USING (seq)" if start else "facets JOIN runs USING (seq)"
            where += " AND facet = ?"
            values.append(facet(owner, status, label, callback))
        elif status:
            where, values = where + " AND status = ?", [*values, status]
        rows = self._all(f"SELECT head FROM {source} WHERE {where} ORDER BY {order} DESC LIMIT ?", *values, limit)
        return [head for (head,) in rows]

    def callbacks_owed(self) -> int:
        """How many finished runs owe a callback."""
        return int(self._one("SELECT count(*) FROM runs WHERE owed AND status != 'running'")[0])

    def usage(self) -> tuple[int, int]:
        """Bytes and number of finished runs."""
        size, count = self._one("SELECT bytes, runs FROM kept")
        return size, count

    def removable(self) -> Iterator[tuple[str, int]]:
        """Id and size of finished runs that owe nothing, oldest first."""
        top = 0
        while rows := self._all(
            "SELECT seq, id, size FROM runs WHERE seq > ? AND status != 'running' AND NOT owed ORDER BY seq LIMIT 100", top
        ):
            for top, run_id, size in rows:  # noqa: B007  # the last one is where the next page begins
                yield run_id, size

    def close(self) -> None:
        """Close the database and let another daemon have the state dir."""
        with self._write_lock, self._read_lock:
            self._opened.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _locked(state_dir: Path) -> IO[str]:
    """Take the state dir for this process; the kernel gives it back however the process ends."""
    file = (state_dir / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StartError(f"another lightrun serves from {state_dir}") from error
    return file


# --------------------------------------------------------------------------------------------------------------------
# Logs: frames of the attach stream → kept bytes, lines
# --------------------------------------------------------------------------------------------------------------------

STREAMS = {1: "stdout", 2: "stderr"}
FRAME = struct.Struct(">BxxxL")  # stream and length: Engine API, "Attach to a container", stream format


class FrameReader:
    """Reads a text of frames that comes in pieces cut anywhere. It holds no more than a header: a payload goes on as it
    comes, in pieces of its own, however long its frame says that it is."""

    def __init__(self) -> None:
        self._header, self._stream, self._left = b"", 0, 0
        self.garbled = False  # from some byte on it is no text of frames; the rest is dropped
        self.weight = 0  # bytes that an engine spends at most on its copy of these frames

    @property
    def cut(self) -> bool:
        """Whether the text so far is not a number of whole frames."""
        return bool(self._header or self._left or self.garbled)

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """The (stream, payload) pairs of a piece; a stream may be one that nobody knows."""
        data = self._header + data
        view, at, end, stream, left = memoryview(data), 0, len(data), self._stream, self._left
        while at < end and not self.garbled:
            if left:
                payload = view[at : at + left]
                at += len(payload)
                left -= len(payload)
                yield stream, payload
            elif end - at < FRAME.size:
                break
            else:
                stream, left = FRAME.unpack_from(data, at)
                self.garbled = data[at + 1 : at + 4] != b"\0\0\0" or left > MAX_FRAME_BYTES
                self.weight += 0 if self.garbled else ENTRY_BYTES + left
                at += FRAME.size
        self._header, self._stream, self._left = b"" if self.garbled else data[at:], stream, left


def _joined(pairs: Iterator[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """The same with what follows on the same stream as one payload: an engine's copy has a frame for each line."""
    for stream, group in itertools.groupby(pairs, operator.itemgetter(0)):
        yield stream, memoryview(b"".join(payload for _, payload in group))


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (stream, payload) pairs of a text of whole frames."""
    return ((stream, bytes(payload)) for stream, payload in FrameReader().feed(data) if stream in STREAMS)


def total_of(taken: Mapping[int, int], stream: str | None) -> int:
    """How many bytes of a stream, or of both, there were."""
    return sum(count for number, count in taken.items() if stream in {None, STREAMS[number]})


def raw_log(data: bytes, stream: str | None = None) -> bytes:
    """The bytes of one stream, or of both in the order in which they were read."""
    return b"".join(payload for number, payload in frames(data) if stream in {None, STREAMS[number]})


def last_lines(data: bytes, count: int | None) -> bytes:
    """The last lines of a text, all of it for None."""
    if count is None:
        return data
    start = len(data)
    for _ in range(count):
        if start <= 0:
            break
        start = data.rfind(b"\n", 0, start - 1) + 1
    return data[start:]


class Lines:
    """Assembles lines, each from its own stream."""

    def __init__(self) -> None:
        self.rest = {stream: bytearray() for stream in STREAMS}  # what has no end yet

    def feed(self, data: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """For each frame of a text of whole ones, its stream and the lines that it completes."""
        for stream, payload in frames(data):
            *lines, last = payload.split(b"\n")
            if lines:
                lines[0] = bytes(self.rest[stream]) + lines[0]
                self.rest[stream].clear()
            self.rest[stream] += last
            yield stream, lines


def log_lines(data: bytes) -> list[str]:
    """The lines of a log in the order in which they were complete."""
    assembler = Lines()
    lines = [line for _, lines in assembler.feed(data) for line in lines]
    lines += [bytes(rest) for rest in assembler.rest.values() if rest]
    return [line.decode(errors="replace") for line in lines]


class PieceEvents:
    """Turns frames into log events with the bytes themselves, and where in their stream they begin, if that is known: then
    those before `since` are passed over."""

    def __init__(self, at: Mapping[int, int], since: Mapping[str, int]) -> None:
        self._at, self._since = dict(at), since

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events of some whole frames."""
        for stream, payload in frames(data):
            at, name = self._at.get(stream), STREAMS[stream]
            first = 0 if at is None else max(0, self._since.get(name, 0) - at)
            for start in range(first, len(payload), PIECE_BYTES):
                text = base64.b64encode(payload[start : start + PIECE_BYTES]).decode()
                yield {"event": "log", "stream": name, **({} if at is None else {"at": at + start}), "base64": text}
            if at is not None:
                self._at[stream] = at + len(payload)

    def end(self) -> Iterator[dict[str, Any]]:
        """No more: nothing is held back."""
        return iter(())


class LineEvents:
    """Turns frames into the log events of a live run: lines by stream, long ones in pieces."""

    def __init__(self) -> None:
        self._lines = Lines()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events of some whole frames."""
        for stream, lines in self._lines.feed(data):
            for line in lines:
                *pieces, last = _pieces(line)
                yield from (self._event(stream, piece, partial=True) for piece in pieces)
                yield self._event(stream, last)
            *pieces, self._lines.rest[stream] = _pieces(self._lines.rest[stream])
            yield from (self._event(stream, piece, partial=True) for piece in pieces)

    def end(self) -> Iterator[dict[str, Any]]:
        """The events of lines without an end."""
        return (self._event(stream, rest) for stream, rest in self._lines.rest.items() if rest)

    @staticmethod
    def _event(stream: int, line: bytes | bytearray, **more: bool) -> dict[str, Any]:
        return {"event": "log", "stream": STREAMS[stream], "line": line.decode(errors="replace"), **more}


def _pieces(line: bytes | bytearray) -> list[Any]:
    """A line in pieces of at most LINE_BYTES, none of which ends within a character."""
    pieces, start = [], 0
    while len(line) - start > LINE_BYTES:
        end = start + LINE_BYTES
        end = next((at for at in range(end, end - 4, -1) if line[at] & 0xC0 != 0x80), end)
        pieces.append(line[start:end])
        start = end
    return [*pieces, line[start:]]


class Kept:
    """The newest `limit` payload bytes of each stream as one text of frames, in the order in which they were read. Plain
    bytes: with the headers 9 for each kept one at the very worst, and twice as many between two trims."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()  # whole frames; neighbours of one stream are merged
        self._last = 0  # where the last frame begins
        self._payload = dict.fromkeys(STREAMS, 0)

    def append(self, stream: int, payload: memoryview) -> None:
        """Add some bytes of a stream."""
        if self._data and self._data[self._last] == stream:
            length = FRAME.unpack_from(self._data, self._last)[1] + len(payload)
        else:
            self._last, length = len(self._data), len(payload)
            self._data += bytes(FRAME.size)
        FRAME.pack_into(self._data, self._last, stream, length)
        self._data += payload
        self._payload[stream] += len(payload)
        if self._payload[stream] > 2 * self._limit:  # in large steps, since each moves what is kept
            self._trim()

    def _trim(self) -> None:
        """Drop the oldest payload over the limit. What is passed on the way and stays is then one frame of the other
        stream, so that no frame is passed twice."""
        excess = {stream: max(0, count - self._limit) for stream, count in self._payload.items()}
        passed, at = Kept(self._limit), 0
        with memoryview(self._data) as data:
            while any(excess.values()):
                stream, length = FRAME.unpack_from(data, at)
                dropped = min(length, excess[stream])
                excess[stream] -= dropped
                self._payload[stream] -= dropped
                if dropped < length:
                    passed.append(stream, data[at + FRAME.size + dropped : at + FRAME.size + length])
                at += FRAME.size + length
        self._last = passed._last if at > self._last else self._last - at + len(passed._data)
        self._data[:at] = passed._data

    def text(self) -> bytes:
        """What is kept, as whole frames."""
        self._trim()
        return bytes(self._data)


class Spool:
    """What followers have yet to read, in files without a name; each goes when all have read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments: dict[int, IO[bytes]] = {}
        self.end = 0  # bytes that were ever written

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        while data:
            number, at = divmod(self.end, SEGMENT_BYTES)
            if number not in self._segments:
                self._segments[number] = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115
            count = os.pwrite(self._segments[number].fileno(), data[: SEGMENT_BYTES - at], at)
            self.end, data = self.end + count, data[count:]

    def read(self, start: int) -> bytes:
        """Some of what stands from `start` on, b"" at the end. Raises OSError."""
        number, at = divmod(start, SEGMENT_BYTES)
        return os.pread(self._segments[number].fileno(), READ_BYTES, at) if start < self.end else b""

    def forget(self, start: int) -> None:
        """Give back what stands before `start`."""
        for number in [number for number in self._segments if (number + 1) * SEGMENT_BYTES <= start]:
            self._segments.pop(number).close()


class LogGap(Exception):
    """A follower fell too far behind, or something of the log is missing."""


class Log:
    """The output of a run: what is kept of it, and what followers have yet to read, so that one may be slow without holding
    up the program or filling the memory. Written by one thread, read by any.

    It comes from the attach stream and then from the engine's own copy, which tells all from the beginning: what was taken
    is skipped, and whatever comes after that was missed. The copy is in two files of COPY_FACTOR times the limit; one that
    weighs less than a file is whole.

    With `most`, that many bytes are all that is taken: the rest is dropped, and `full` says so."""

    def __init__(self, limit: int, folder: Path, most: int | None = None) -> None:
        self._limit, self._most = limit, math.inf if most is None else most
        self.full = False
        self._prefix = self.hidden = 0  # bytes with which stdout begins that are not the program's; how many have yet to come
        self._changed = threading.Condition()  # guards all below
        self._reader = FrameReader()
        self._kept = Kept(limit)
        self._taken = dict.fromkeys(STREAMS, 0)  # payload bytes of each stream
        self._known = dict.fromkeys(STREAMS, 0)  # of these, how many the engine's copy has yet to repeat
        self._expected = dict.fromkeys(STREAMS, b"")  # what is kept of these
        self._repeated = dict.fromkeys(STREAMS, b"")  # the end of what it has repeated
        self._copying = self._lost = False  # whether what comes is the copy, and the program ran on without its stream
        self._agrees, self._rotated, self._doubt = True, False, False  # of the copy: never differed; may lack its beginning
        self._news = False  # it told something that was not taken before
        self.counted = True  # whether what was taken is all since the first byte
        self._spool = Spool(folder)
        self._followers: dict[object, int] = {}  # how far each has read
        self._ended = False
        self.truncated = False

    @property
    def cut(self) -> bool:
        """Whether what was fed ends within a frame or is garbled, so that some is missing if no more comes."""
        return self._reader.cut

    def taken(self) -> dict[int, int]:
        """Bytes of each stream so far."""
        with self._changed:
            return dict(self._taken)

    def feed(self, data: bytes) -> None:
        """Take a piece of the output, cut anywhere. What can't be understood is dropped, and `truncated` says so."""
        with self._changed:
            if self.full:
                return
            fresh: list[bytes | memoryview] = []
            for stream, payload in _joined(self._reader.feed(data)) if self._copying else self._reader.feed(data):
                if stream not in STREAMS:  # 0 is stdin, 3 an error of the engine
                    self._gap()
                    continue
                if self.hidden and stream == 1:
                    count = min(self.hidden, len(payload))
                    self.hidden, payload = self.hidden - count, payload[count:]
                if self._copying and not (payload := self._unknown(stream, payload)):
                    continue
                room = self._most - sum(self._taken.values())
                if len(payload) > room:
                    self.full = self.truncated = True
                    if not (payload := payload[: int(room)]):
                        break
                self._kept.append(stream, payload)
                self._taken[stream] += len(payload)
                if self._followers:
                    fresh += FRAME.pack(stream, len(payload)), payload
                if self.full:
                    break
            if self._reader.garbled:
                self._gap()
            if self._copying and self._reader.weight > (COPY_FACTOR - 1) * self._limit:
                self._reader.weight, self._rotated, self._doubt = 0, True, True
            self._judge()
            self.truncated = self.truncated or max(self._taken.values()) > self._limit
            self._tell(b"".join(fresh))

    def _judge(self) -> None:
        """A copy that is not what was expected is only a shorter one when the program has ended. When it runs on, or the copy
        tells more, there may be a hole: the copy is the log from here on."""
        if self._doubt and (self._lost or self._news):
            self._gap()
            self._doubt, self._news, self.counted = False, True, False
            if any(self._known.values()):
                self._kept = Kept(self._limit)
                for stream in STREAMS:
                    self._taken[stream] -= self._known[stream]
                    self._known[stream], self._expected[stream] = 0, b""

    def hide(self, count: int) -> None:
        """So many bytes at the beginning of stdout are not the program's."""
        with self._changed:
            self._prefix = self.hidden = count

    def lost(self) -> None:
        """The program runs on without the stream that brought its output."""
        with self._changed:
            self._lost = True
            self._judge()

    @property
    def missed(self) -> bool:
        """Whether the engine's copy told something that the stream before it did not: more, or another end of a copy that
        may lack its beginning. That it has less is no sign: some engines lose the end of a long line, or its newline."""
        texts = [(self._expected[stream], self._repeated[stream]) for stream in STREAMS]
        tails = [[text[-TAIL_BYTES:].replace(b"\n", b"") for text in each] for each in texts]
        differ = any(ours[-len(its) :] != its[-len(ours) :] for ours, its in tails if ours and its)
        return self._news or (self._lost and any(self._known.values())) or (self._rotated and differ)

    def _unknown(self, stream: int, piece: memoryview) -> memoryview:
        """What of a piece of the engine's copy was not taken before."""
        expected, count = self._expected[stream], min(len(piece), self._known[stream])
        at = len(expected) - self._known[stream]  # negative for what is no longer kept
        if expected[max(0, at) : max(0, at + count)] != piece[max(0, -at) : count]:
            self._agrees, self._doubt = False, True
            self._judge()
            if self._lost or self._news:
                return piece
        self._known[stream] -= count
        self._repeated[stream] = (self._repeated[stream] + piece[max(0, count - TAIL_BYTES) : count])[-TAIL_BYTES:]
        self._news = self._news or count < len(piece)
        return piece[count:]

    def _gap(self) -> None:
        self.truncated = True
        self._followers.clear()
        self._forget()

    def _tell(self, data: bytes) -> None:
        if self._followers:
            try:
                self._spool.write(data)
            except OSError as error:  # better than a log with a hole
                log.warning("followers of a log are cut off: %s", error.strerror)
                self._followers.clear()
            oldest = self._spool.end - MAX_BEHIND_BYTES
            self._followers = {each: read for each, read in self._followers.items() if read >= oldest}
        self._forget()

    def _forget(self) -> None:
        """Give back what nobody has yet to read, and wake all."""
        self._spool.forget(min(self._followers.values(), default=self._spool.end + SEGMENT_BYTES))
        self._changed.notify_all()

    def resume(self) -> None:
        """What comes now is the engine's copy from its beginning. As much as was taken is skipped, and compared with what is
        still kept; when it differs, and tells more, followers are cut off, since there may be a hole."""
        with self._changed:
            kept = self.frames()
            self._known, self._repeated = dict(self._taken), dict.fromkeys(STREAMS, b"")
            self._expected = {number: raw_log(kept, name) for number, name in STREAMS.items()}
            self._reader, self._copying, self.hidden = FrameReader(), True, self._prefix

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Take the engine's whole copy for all that was kept, unless it is whole and has less; followers get what they did
        not have."""
        copy = Log(self._limit, self._spool.folder, None if self._most == math.inf else int(self._most))
        copy.hide(self._prefix)
        copy.resume()
        self.resume()
        for piece in pieces:
            self.feed(piece)
            copy.feed(piece)
        with self._changed:
            if any(self._known.values()) and not copy._rotated:
                self._gap()
            else:
                self.truncated = copy.truncated or copy.cut or copy._rotated or not self._agrees
                self._kept, self._taken, self.counted = copy._kept, copy._taken, self.counted and not copy._rotated

    def release(self) -> None:
        """Give the disk back what followers have yet to read: they are cut off, but for those that have read all."""
        with self._changed:
            self._followers = {each: read for each, read in self._followers.items() if read == self._spool.end}
            self._spool.end += -self._spool.end % SEGMENT_BYTES
            self._followers = dict.fromkeys(self._followers, self._spool.end)
            self._forget()

    def frames(self) -> bytes:
        """What is kept."""
        with self._changed:
            return self._kept.text()

    def nudge(self, ended: bool = False) -> None:
        """Wake followers for news of another kind, or for the end of the log."""
        with self._changed:
            if ended and self._lost and any(self._known.values()) and not self.full:
                self._gap()
            self._ended = self._ended or ended
            self._changed.notify_all()

    def follow(self, taken: dict[int, int] | None = None) -> Generator[bytes, None, None]:
        """What is kept, then all that comes, as whole frames; b"" now and then, and when nudged. With what is kept, how many
        bytes of each stream there were up to there, as far as that is known. Raises LogGap."""
        follower, reader = object(), FrameReader()
        try:
            yield self._join(follower, {} if taken is None else taken)
            while (data := self._read(follower)) is not None:
                yield b"".join(FRAME.pack(stream, len(payload)) + payload for stream, payload in reader.feed(data))
        except OSError as error:
            raise LogGap from error
        finally:
            with self._changed:
                self._followers.pop(follower, None)
                self._forget()

    def _join(self, follower: object, taken: dict[int, int]) -> bytes:
        with self._changed:
            taken.clear()
            taken |= self._taken if self.counted else {}
            self._followers[follower] = self._spool.end
            return self.frames()

    def _read(self, follower: object) -> bytes | None:
        """What comes next for a follower, None at the end. Raises LogGap, OSError."""
        with self._changed:
            if self._followers.get(follower) == self._spool.end and not self._ended:
                self._changed.wait(DISCONNECT_POLL_SECONDS)
            if follower not in self._followers:
                raise LogGap
            data = self._spool.read(self._followers[follower])
            self._followers[follower] += len(data)
            self._spool.forget(min(self._followers.values()))
            return data if data or not self._ended else None


# --------------------------------------------------------------------------------------------------------------------
# Artifacts: the tree that goes in, the trees that come back, what is kept on disk
# --------------------------------------------------------------------------------------------------------------------


class ArtifactError(Exception):
    """An `extract` entry that cannot be kept, in words for the client."""


class BrokenArchive(ArtifactError):
    """What came of an archive is none, or has no end. An engine sends no such thing, but a connection may break so."""

    def __init__(self) -> None:
        super().__init__("the engine sent a broken archive")


def _tar_header(
    name: str, size: int = 0, mode: int = 0o755, modified: float = 0, kind: bytes = tarfile.DIRTYPE,
    owner: tuple[int, int] = (0, 0), target: str = "",
) -> bytes:  # fmt: skip
    """One member's header, in the format that takes names of any bytes as they are."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    info.mode, info.mtime, (info.uid, info.gid) = mode, int(modified), owner
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


TAR_END = bytes(2 * tarfile.BLOCKSIZE)


# -- the tree that goes in


@dataclasses.dataclass(frozen=True)
class Entry:
    """A member of the tree that is put into a container, by its path below the workdir, `""` for that itself."""

    path: str
    kind: bytes = tarfile.REGTYPE  # or DIRTYPE, SYMTYPE, LNKTYPE
    mode: int = 0o755
    modified: float | None = None  # Unix seconds; None for now
    content: Content = b""
    size: int = 0
    target: str = ""  # of a link; a hard one's is another path below the workdir

    @property
    def is_folder(self) -> bool:
        """Whether others may lie in it."""
        return self.kind == tarfile.DIRTYPE


class Tree:
    """All that goes into the workdir of one run: what its request holds, parts of its upload and what is in the tar among
    them, and artifacts of other runs. `artifacts` tells those of a run. Nothing of any size is held in memory."""

    def __init__(
        self, request: RunRequest, upload: Upload | None, root: Path, artifacts: Callable[[str], list[dict[str, Any]]]
    ) -> None:
        self.request, self._upload, self._root, self._artifacts = request, upload, root, artifacts

    def entries(self) -> Iterator[Entry]:
        """What it holds, as it comes, folders that only follow from a path left out. Raises BadRequest."""
        run_id, kept = "", None
        for path, content in sorted(self.request.files.items(), key=lambda item: getattr(item[1], "run_id", "")):
            if isinstance(content, Reference):
                if content.run_id != run_id:  # they are many, and come from the disk
                    run_id, kept = content.run_id, self._kept(content)
                yield from self._referred(path, content, kept)
            else:
                yield Entry(path, content=content, size=content.size if isinstance(content, Part) else len(content))
        if self.request.tar and self._upload:
            yield from tar_entries(self._upload, self.request.tar)

    def check(self) -> None:
        """Raises BadRequest for what no folder can hold, and for artifacts that are not there. Of files alone the request's own
        rules have told."""
        if self.request.tar is None and not any(isinstance(each, Reference) for each in self.request.contents()):
            return
        stdin = self.request.stdin
        named = self._named(stdin, self._kept(stdin), "stdin") if isinstance(stdin, Reference) else ()
        if named and [each.kind for each in named] != [tarfile.REGTYPE]:
            raise BadRequest(details=[problem("must name a file", "stdin", "artifact")])
        if problems := [*itertools.islice(tree_problems(self.entries()), MAX_PROBLEMS)]:
            raise BadRequest(details=problems)

    def pieces(self, content: Content) -> Iterator[bytes]:
        """Content, piece by piece. Raises OSError, NotFound."""
        if isinstance(content, Part):
            assert self._upload
            yield from self._upload.pieces(content)
        elif isinstance(content, Reference):
            file = open_artifact(self._root / content.run_id, content.path)
            with file or io.BytesIO() as file:
                while piece := file.read(COPY_BYTES):
                    yield piece
        else:
            yield content

    def _kept(self, reference: Reference) -> list[dict[str, Any]] | None:
        """The artifacts of the run that a reference names, by path; None for a run that has gone."""
        try:
            return sorted(self._artifacts(reference.run_id), key=operator.itemgetter("path"))
        except NotFound:
            return None

    def _referred(self, path: str, reference: Reference, kept: list[dict[str, Any]] | None) -> Iterator[Entry]:
        """What a reference stands for, under a path."""
        below = len(reference.path) + 1 if reference.path else 0
        for each in self._named(reference, kept, "files", path):
            rest = each.path[below:]
            yield dataclasses.replace(each, path=f"{path}/{rest}" if rest else path)

    def _named(self, reference: Reference, kept: list[dict[str, Any]] | None, *where: str) -> Iterator[Entry]:
        """The artifact that is named, and what is in it, under their own paths; `kept` is all that its run has."""
        path, chosen = reference.path, kept or []
        if path:
            bounds = (path, path + "\0", path + "/", path + "0")  # "0" follows "/"
            own, after, inside, end = (bisect.bisect_left(chosen, each, key=operator.itemgetter("path")) for each in bounds)
            chosen = chosen[own:after] + chosen[inside:end]
        if kept is None or (path and not chosen):
            message = f"there is no artifact {reference.run_id}/{path} of a run that has ended"
            raise BadRequest(details=[problem(message, *where, "artifact")])
        if not path:
            yield Entry("", tarfile.DIRTYPE)
        for each in chosen:
            folder = each["type"] == "directory"
            mode, content = int(each.get("mode", "755" if folder else "644"), 8), Reference(reference.run_id, each["path"])
            yield Entry(each["path"], tarfile.DIRTYPE if folder else tarfile.REGTYPE, mode, None, content, each["bytes"])


COMPRESSED = {  # by what it begins with
    b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
}  # fmt: skip


class _TarWindow:
    """A tar in an upload for tarfile to read the headers of."""

    def __init__(self, upload: Upload, part: Part) -> None:
        self._upload, self._part, self._at = upload, part, 0

    def read(self, size: int) -> bytes:
        """The next bytes. Raises ValueError, BadRequest for what no header needs."""
        if size > MAX_TAR_HEADER_BYTES:
            raise ValueError("a header is too long")
        data = self._upload.read(Part(self._part.start + self._at, max(0, min(size, self._part.size - self._at))))
        if re.search(rb"(?<![0-9])[0-9]{%d}" % MAX_DIGITS, data):
            raise BadRequest(details=[problem(f"has {MAX_DIGITS} digits in a row in a header", "tar")])
        self._at += len(data)
        return data

    def seek(self, at: int) -> None:
        """Go on from another place."""
        self._at = at

    def tell(self) -> int:
        """Where it stands."""
        return self._at


def tar_entries(upload: Upload, part: Part) -> Iterator[Entry]:
    """The members of a tar that was uploaded, in its order. Raises BadRequest with those that cannot be taken."""
    window, problems = _TarWindow(upload, part), []
    start = window.read(tarfile.BLOCKSIZE)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise BadRequest(details=[problem(f"is compressed ({name}); send it unpacked, as `tar -c` writes it", "tar")])
    window.seek(0)
    try:
        with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:  # type: ignore[call-overload]
            while member := archive.next():
                archive.members = []  # tarfile remembers every member otherwise
                if len(archive.pax_headers) > MAX_ATTRIBUTES:
                    raise BadRequest(details=[problem(f"has more than {MAX_ATTRIBUTES} attributes for all its members", "tar")])
                if why := _unfit(member, part.size):
                    problems.append(problem(why, "tar", printable(member.name)))
                elif not problems:
                    yield _tar_entry(member, part)
                if len(problems) >= MAX_PROBLEMS:
                    break
            window.seek(archive.offset)
            if not problems and window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it has no end")
    except BadRequest:
        raise
    except Exception as error:  # tarfile raises nearly anything for what is none
        raise BadRequest(details=[problem("is not a tar, or was cut short", "tar")]) from error
    if problems:
        raise BadRequest(details=problems)


def _unfit(member: tarfile.TarInfo, size: int) -> str:
    """Why a member of an uploaded tar of some bytes is refused; "" for a good one."""
    segments = member.name.split("/")
    if member.name.startswith("/"):
        return "is an absolute name"
    if ".." in segments:
        return "has a .. segment"
    if not _plain_path(member.name) and not member.isdir():
        return "is the workdir itself, which is a folder"
    encoded = member.name.encode(errors="surrogateescape")
    if len(encoded) > MAX_TAR_PATH_BYTES or any(len(each.encode(errors="surrogateescape")) > 255 for each in segments):
        return f"is a name of more than {MAX_TAR_PATH_BYTES} bytes, or has a segment of more than 255"
    if "\0" in member.name + member.linkname:
        return "holds a NUL"
    if member.issparse():
        return "is a sparse file; write the tar without -S"
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return "is neither a file, a folder nor a link"
    if member.isreg() and not (member.size >= 0 and member.offset_data + member.size <= size):
        return "is cut short"
    if not math.isfinite(member.mtime):
        return "has a time that is none"
    if (member.issym() or member.islnk()) and not 0 < len(member.linkname.encode(errors="surrogateescape")) <= MAX_TAR_PATH_BYTES:
        return f"is a link to nothing, or to a name of more than {MAX_TAR_PATH_BYTES} bytes"
    return ""


def _tar_entry(member: tarfile.TarInfo, part: Part) -> Entry:
    kind = tarfile.REGTYPE if member.isreg() else member.type
    content = Part(part.start + member.offset_data, member.size if member.isreg() else 0)
    target = _plain_path(member.linkname) if member.islnk() else member.linkname if member.issym() else ""
    modified = min(max(member.mtime, 0), 1 << 33)
    return Entry(_plain_path(member.name), kind, member.mode & 0o777, modified, content, content.size, target)


def _plain_path(path: str) -> str:
    """A relative path without doubled, last or `.` segments; `""` for none."""
    return "/".join(segment for segment in path.split("/") if segment not in {"", "."})


def tree_problems(entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
    """What is wrong with a tree as a whole: names that stand twice or cannot lie in each other, links that lead out of it."""
    kinds: dict[str, bytes] = {}  # of what stands there; folders that only follow from a path are b""
    links: dict[str, str] = {}
    size = 0
    for entry in entries:
        where = ("tar" if isinstance(entry.content, Part) and entry.kind != tarfile.REGTYPE else "files", printable(entry.path))
        if len(kinds) > MAX_ARTIFACT_ENTRIES or size > MAX_TREE_CHARACTERS:
            most = f"{MAX_ARTIFACT_ENTRIES} files and folders, nor more than {MAX_TREE_CHARACTERS} characters of names"
            yield problem(f"must not hold more than {most}", "files")
            return
        if kinds.get(entry.path) and not (entry.is_folder and entry.path == ""):
            yield problem("stands twice", *where)
            continue
        if entry.path in kinds and not entry.is_folder:
            yield problem("is both a file and a folder", *where)
            continue
        for folder in parent_folders(entry.path):
            size += len(folder) if folder not in kinds else 0
            if kinds.setdefault(folder, b"") not in {b"", tarfile.DIRTYPE}:
                yield problem(f"lies in {printable(folder)}, which is not a folder", *where)
                break
        if entry.kind == tarfile.LNKTYPE and kinds.get(entry.target) != tarfile.REGTYPE:
            yield problem("is a hard link to what is not a file before it in the tar", *where)
        if entry.kind == tarfile.SYMTYPE:
            links[entry.path] = entry.target
        kinds[entry.path], size = entry.kind, size + len(entry.path) + len(entry.target)
    yield from (problem("is a link that leads out of the workdir", "tar", printable(path)) for path in _leading_out(links))


def _leading_out(links: Mapping[str, str]) -> Iterator[str]:
    """The symbolic links of a tree that do not stay in it, other links on their way included, or of which that would take too
    long to tell."""
    steps = 0
    for path in links:
        place, ahead, followed = path.split("/")[:-1], links[path].split("/")[::-1], 0
        outside = links[path].startswith("/")
        while ahead and not outside:
            steps, segment = steps + len(place) + 1, ahead.pop()
            outside = steps > MAX_LINK_STEPS
            if segment == "..":
                outside = outside or not place
                del place[-1:]
            elif segment not in {"", "."}:
                place.append(segment)
                if target := links.get("/".join(place)):
                    followed += 1
                    outside = outside or target.startswith("/") or followed > MAX_LINKS_FOLLOWED
                    ahead += target.split("/")[::-1]
                    del place[-1:]
        if outside:
            yield path


def put_tar(
    entries: Iterable[Entry], owner: tuple[int, int], pieces: Callable[[Content], Iterator[bytes]], now: float
) -> Iterator[bytes]:
    """The tar to be put at `/`, piece by piece, of entries by their paths in the container. Its first member is a folder, so
    that no engine takes it for a compressed one and runs a program of the image to unpack it (CVE-2026-41567)."""
    yield _tar_header("./", mode=0o755, modified=now)
    for entry in entries:
        modified = now if entry.modified is None else entry.modified
        yield _tar_header(entry.path, entry.size, entry.mode, modified, entry.kind, owner, entry.target)
        if entry.kind == tarfile.REGTYPE:
            yield from pieces(entry.content)
            yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield TAR_END


# -- the trees that come back


class ArchiveSource:
    """The tar of an engine for tarfile to read, in pieces with a call of `check` before each."""

    def __init__(self, tar: IO[bytes], check: Callable[[], None]) -> None:
        self._read = getattr(tar, "read1", tar.read)  # which does not wait for more than is there
        self._check = check
        self.left = MAX_TAR_HEADER_BYTES  # that may come before another member
        self.error: Exception | None = None  # what the check or the engine raised

    def read(self, size: int) -> bytes:
        """The next bytes. Raises ArtifactError when there are none, since a tar says where it ends, or too many."""
        self.check()
        data: bytes = self._passing(lambda: self._read(size))
        self.left -= len(data)
        if self.left < 0 or not data:
            raise BrokenArchive
        return data

    def check(self) -> None:
        """What `check` does."""
        self._passing(self._check)

    def _passing(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self.error = error
            raise


class Extraction:
    """What one run keeps: the paths it asked for, one after the other, into one folder, within one budget of bytes and
    entries, against which counts what is skipped too. A path is unpacked beside the folder and moved in when it is whole,
    so that a bad one leaves nothing. `check` is called between any two pieces; what it raises ends that."""

    def __init__(self, root: Path, run_id: str, limit: int, check: Callable[[], None]) -> None:
        self._folder, self._staging, self._check = root / run_id, root / f"{run_id}.partial", check
        self._bytes_left, self._entries_left = limit, MAX_ARTIFACT_ENTRIES
        self.artifacts: list[dict[str, Any]] = []

    def keep(self, tar: Any, folder: bool, to: str | None = None) -> dict[str, Any]:
        """Keep what an engine sent for one path: a file under its name, a folder's contents without the folder; or either
        under another name. Returns `{"bytes": …}`, with `skipped` when something was left out. Raises ArtifactError, and what
        `check` and `tar` raise."""
        source = ArchiveSource(tar, self._check)
        remove_tree(self._staging)
        try:
            self._staging.mkdir(mode=0o700)
            entries, skipped, bytes_left = self._unpack(source, folder, to)
            self._move_in({to} if to else {path.partition("/")[0] for path in entries})
        except Exception as error:
            if error is source.error or isinstance(error, ArtifactError):
                raise
            if isinstance(error, OSError):
                raise ArtifactError(f"cannot be kept: {error.strerror or 'input/output error'}") from error
            log.warning("a broken archive: %r", error)  # for which tarfile raises nearly anything
            raise BrokenArchive from error
        finally:
            remove_tree(self._staging)
        self._bytes_left = bytes_left
        self._entries_left -= len(entries) + skipped
        kept = {entry["path"]: entry for entry in self.artifacts} | entries
        self.artifacts = sorted(kept.values(), key=lambda entry: str(entry["path"]))
        return {"bytes": sum(entry["bytes"] for entry in entries.values()), **({"skipped": skipped} if skipped else {})}

    def discard(self) -> None:
        """Drop all that was kept."""
        self.artifacts = []
        remove_tree(self._folder)

    def _unpack(self, source: ArchiveSource, folder: bool, to: str | None) -> tuple[dict[str, dict[str, Any]], int, int]:
        """The entries by path, how many members were skipped, and the bytes left."""
        entries: dict[str, dict[str, Any]] = {}
        skipped, bytes_left, top = 0, self._bytes_left, None
        if to:
            self._make_folders([*parent_folders(to), *([to] if folder else [])], entries)
        with tarfile.open(fileobj=source, mode="r|", bufsize=COPY_BYTES, encoding="utf-8") as archive:  # type: ignore[call-overload]
            while member := archive.next():
                archive.members = []  # tarfile remembers every member otherwise
                first = entries.get(_kept_path(member.linkname, top, to)) if member.islnk() else None
                has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                size = first["bytes"] if first else member.size if has_content else 0
                if not 0 <= size <= bytes_left:
                    raise ArtifactError("is larger than what this run may still keep")
                bytes_left -= size
                source.left = size + COPY_BYTES + MAX_TAR_HEADER_BYTES
                if folder and top is None:
                    top = member.name  # the folder itself comes first
                    continue
                path = _kept_path(member.name, top, to)
                if path and member.isdir():
                    self._make_folders([*parent_folders(path), path], entries)
                elif path and (member.isreg() or (first and first["type"] == "file")):
                    self._make_folders(parent_folders(path), entries)
                    content = (self._staging / _on_disk(first["path"])).open("rb") if first else archive.extractfile(member)
                    self._write(path, content, source)
                    entries[path] = {"path": path, "bytes": size, "type": "file"}
                    entries[path] |= {"mode": f"{member.mode & 0o777:o}"} if member.mode & 0o111 else {}
                else:
                    skipped += 1
                if len(entries) + skipped > self._entries_left:
                    raise ArtifactError("holds more files and folders than a run may keep")
        if top is None and not any(entry["type"] == "file" for entry in entries.values()):
            raise BrokenArchive
        return entries, skipped, bytes_left

    def _make_folders(self, paths: Iterable[str], entries: dict[str, dict[str, Any]]) -> None:
        for path in paths:
            if entries.get(path, {}).get("type") != "directory":
                (self._staging / _on_disk(path)).mkdir(mode=0o700)
                entries[path] = {"path": path, "bytes": 0, "type": "directory"}

    def _write(self, path: str, content: IO[bytes], source: ArchiveSource) -> None:
        with content, open(self._staging / _on_disk(path), "xb", opener=_private) as file:
            while piece := content.read(COPY_BYTES):
                source.check()
                file.write(piece)

    def _move_in(self, paths: Iterable[str]) -> None:
        """All that is staged under these paths, or none. Folders above them may be there already."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as undone:
            for path in sorted(paths):
                for folder in map(_on_disk, parent_folders(path)):
                    if not (self._folder / folder).is_dir():
                        self._collide_not(folder)
                        (self._folder / folder).mkdir(mode=0o700)
                        undone.callback((self._folder / folder).rmdir)
                self._collide_not(_on_disk(path))
                staged, target = self._staging / _on_disk(path), self._folder / _on_disk(path)
                staged.rename(target)
                undone.callback(target.rename, staged)
            undone.pop_all()

    def _collide_not(self, path: str) -> None:
        if os.path.lexists(self._folder / path):
            raise ArtifactError(f"collides with an earlier entry's {os.fsencode(path).decode()}")


def _kept_path(name: str, top: str | None, to: str | None) -> str:
    """The artifact's path for a name from a container, below `top` or, without one, its last part, and then below `to` or
    just that; "" when it may not become one on this disk."""
    path = posixpath.basename(name) if top is None else name[len(top) :].strip("/") if name.startswith(top) else ""
    if to and path:
        path = to if top is None else f"{to}/{path}"
    try:
        segments = path.encode().split(b"/")
    except UnicodeEncodeError:  # bytes that were not UTF-8
        return ""
    sound = all(segment not in {b"", b".", b".."} and len(segment) <= 255 and b"\0" not in segment for segment in segments)
    short = len(segments) <= MAX_ARTIFACT_DEPTH and sum(map(len, segments)) + len(segments) - 1 <= MAX_ARTIFACT_PATH_BYTES
    return path if sound and short else ""


def _on_disk(path: str) -> str:
    """An artifact's path for a function of the system: UTF-8 on the disk, whatever the locale's encoding."""
    return os.fsdecode(path.encode())


def remove_tree(folder: Path) -> None:
    """Remove a folder that may not be there, and say so in the log when it cannot be."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error.strerror)


def open_artifact(root: Path, path: str) -> IO[bytes] | None:
    """The file kept under a path below a run's root, None for a folder; no step follows a link. Raises NotFound."""
    with contextlib.ExitStack() as opened:

        def step(name: str | Path, flags: int, folder: int | None = None) -> int:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
            opened.callback(os.close, descriptor)
            return descriptor

        try:
            *parents, name = _on_disk(path).split("/")
            folder = step(root, os.O_DIRECTORY)
            for parent in parents:
                folder = step(parent, os.O_DIRECTORY, folder)
            descriptor = step(name, os.O_NONBLOCK, folder)
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                return os.fdopen(os.dup(descriptor), "rb")
            if stat.S_ISDIR(mode):
                return None
        except (OSError, ValueError):  # not there, a link, a NUL
            pass
    raise NotFound("there is no such artifact")


def artifacts_tar(root: Path, artifacts: Iterable[dict[str, Any]], folder: str = "") -> Generator[bytes, None, None]:
    """Artifacts of a run as one tar, in pieces, with names relative to a folder of them. Raises NotFound when one has gone."""
    for entry in artifacts:
        file, name = open_artifact(root, entry["path"]), entry["path"][len(folder) :].lstrip("/")
        kind, modified = (tarfile.REGTYPE, os.fstat(file.fileno()).st_mtime) if file else (tarfile.DIRTYPE, 0.0)
        with file or io.BytesIO() as content:
            yield _tar_header(name, entry["bytes"], int(entry.get("mode", "644" if file else "755"), 8), modified, kind)
            while piece := content.read(COPY_BYTES):
                yield piece
            yield bytes(-entry["bytes"] % tarfile.BLOCKSIZE)
    yield TAR_END


# --------------------------------------------------------------------------------------------------------------------
# Engine: the only section that talks to the Docker Engine, over its HTTP API
# --------------------------------------------------------------------------------------------------------------------

LABEL_STATE, LABEL_RUN = "lightrun.state", "lightrun.run"
NETWORK = "lightrun"
NETWORK_OPTIONS = {"com.docker.network.bridge.enable_icc": "false"}
ISOLATE = ("strict", "true")  # how a network of Podman's is kept apart: from all others, or before 5 from those that are so, too
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"]
GO_MODE_FOLDER, GO_MODE_LINK = 1 << 31, 1 << 27  # of Go's fs.FileMode, in X-Docker-Container-Path-Stat
TCP_OPTIONS = {  # a far side that has gone without a word is noticed within a minute (tcp(7))
    getattr(socket, name): value
    for name, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}
GO_MODE_OTHER = 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19  # devices, pipes, sockets, anything else
BOTH_STREAMS = {"stdout": 1, "stderr": 1}
GO_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}  # as Podman tells them, to what Docker and Linux call them
WRONG_STATE = "container state improper"  # why Podman refuses what Docker calls a conflict


@dataclasses.dataclass(frozen=True)
class Image:
    """An image on the engine: its id, its user and working folder, its environment and its own command."""

    id: str
    user: str
    workdir: str
    env: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def root(self) -> bool:
        """Whether its program starts as root."""
        return self.user.partition(":")[0] in {"", "0", "root"}

    def has(self, name: str) -> bool:
        """Whether its environment has this variable."""
        return any(each.startswith(f"{name}=") for each in self.env)


@dataclasses.dataclass(frozen=True)
class Traits:
    """What an engine does in its own way, as Docker does it or as Podman does."""

    log_driver: str  # that keeps its copy of a container's output, within a bound
    tells_rotation: bool  # whether that copy, of all but its oldest part, is told from a whole one
    keeps_apart: bool  # whether it keeps the containers of one bridge apart; else it can do so with bridges
    drops_ambient: bool  # whether users other than root do not get the capabilities that are added
    makes_workdir: bool  # whether the workdir is there when the container is created, and not only when it is started
    splits_attach: bool  # whether a connection for stdin need not take the output too, and ends no earlier than the container;
    # else at most STDIN_SLACK_SECONDS earlier
    orders_environment: bool  # whether a container's variables come in an order that can be told
    answers_early: bool  # whether its answer of a log to be followed begins before the log

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Traits:
        """By `/info`, where only Podman tells of its library for builds."""
        docker = "BuildahVersion" not in about
        return cls("local" if docker or "local" in about["Plugins"]["Log"] else "json-file", *[docker] * 7)


@dataclasses.dataclass(frozen=True)
class ContainerState:
    """What the engine says of a container. Times in Unix seconds of the engine's clock; None when they were never."""

    image_id: str
    workdir: str
    running: bool
    started: float | None
    finished: float | None
    exit_code: int
    oom_killed: bool
    told: float  # when the engine said so, in whole seconds


class Patience:
    """How long somebody waits for the engine: as long as each call may take, and once hurried, `grace` seconds for each.
    `wake` is readable when there is news for whoever waits. Rung from any thread, without waiting.

    `beside` is a connection that is read all the while, and what reads it. Until somebody takes a container's output, an engine
    holds that container's lock, and answers nothing that needs it: not a look at it, and not its kill."""

    def __init__(self, grace: float) -> None:
        self.beside: Beside | None = None  # of whoever waits, and for no other thread
        self._lock = threading.Lock()  # guards all below
        self._grace, self._hurried = grace, math.inf
        self.wake, self._waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self._waker, False)  # a full pipe wakes just as well

    def ring(self, hurry: bool = False) -> None:
        """Wake whoever waits, and perhaps hurry him from now on."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if hurry:
                self._hurried = min(self._hurried, time.monotonic())
            if self.wake >= 0:
                os.write(self._waker, b"!")

    def heard(self) -> None:
        """Wait for the next ring."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, 4096)

    def sleep(self, seconds: float) -> None:
        """A pause, which is short for whoever is in a hurry, and ends with the next ring."""
        self.heard()
        poll = select.poll()
        if self._hurried == math.inf:
            poll.register(self.wake, select.POLLIN)
        poll.poll(min(seconds, HURRY_SECONDS / 6 if self._hurried < math.inf else seconds) * 1000)

    def lengthen(self) -> None:
        """Give the next calls more time: a busy engine needs it, and a hung one costs no more than twice as much."""
        self._grace = min(2 * self._grace, ENGINE_SECONDS)

    def deadline(self, began: float) -> float:
        """Monotonic time until which a call that began then may take."""
        return max(began, self._hurried) + self._grace

    def close(self) -> None:
        """Let go of the pipe."""
        with self._lock:
            os.close(self.wake)
            os.close(self._waker)
            self.wake = -1


Beside: TypeAlias = "tuple[Wire, Callable[[], object]]"


class Wire:
    """A connection for one request. No wait on it is without an end: not for the answer, nor for the next piece of one that
    streams, nor once patience is at its end. As much of a file as http.client.HTTPResponse reads from; what was read when a
    wait ends is kept."""

    def __init__(self, sock: socket.socket, seconds: float, patience: Patience | None = None) -> None:
        sock.setblocking(False)
        self._sock, self.patience = sock, patience
        self._began = time.monotonic()
        self._buffer = bytearray()
        self._ended = False
        self._lock = threading.Lock()  # held by each call of the socket, none of which waits: TLS takes one at a time
        self.stream(seconds)

    def stream(self, silence: float) -> None:
        """From now on only a silence may be too long."""
        self._seconds, self._late = silence, math.inf

    def limit(self) -> None:
        """From now on all that is to come may take no longer than one silence."""
        self._late = min(self._late, time.monotonic() + self._seconds)

    def secure(self, tls: ssl.SSLContext, host: str) -> None:
        """Speak TLS from now on, with a host of that name."""
        self._sock = secured = tls.wrap_socket(self._sock, server_hostname=host, do_handshake_on_connect=False)
        self._persist(secured.do_handshake)

    def makefile(self, _mode: str) -> Wire:
        """The file that HTTPResponse asks a socket for."""
        return self

    def _wait(self, event: int) -> None:
        """Until the socket is ready. Raises TimeoutError."""
        late, step = min(self._late, time.monotonic() + self._seconds), math.inf
        while True:
            if self.patience:  # a hurry may be yet to come
                late, step = min(late, self.patience.deadline(self._began)), DISCONNECT_POLL_SECONDS
            if (left := late - time.monotonic()) <= 0:
                raise TimeoutError
            beside = self.patience.beside if self.patience else None
            if beside and (beside[0] is self or not beside[0].alive):
                beside = None
            if self._poll(event, beside[0]._sock.fileno() if beside else -1, min(left, step)):
                return
            if beside:
                beside[1]()

    def _poll(self, event: int, wake: int, seconds: float) -> bool:
        """Whether the socket is ready within some seconds; false at once when `wake` is readable first."""
        poll = select.poll()  # select() fails on descriptors over 1023
        try:
            poll.register(self._sock, event)
        except ValueError as error:  # another thread has let it go
            raise ConnectionAbortedError from error
        if wake >= 0:
            poll.register(wake, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(min(max(0, seconds), ENGINE_SECONDS) * 1000)]
        return self._sock.fileno() in ready

    def _persist(self, step: Callable[[], Result]) -> Result:
        """Do what sends, when the socket takes it; TLS may have to hear something before."""
        while True:
            try:
                return step()
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._wait(select.POLLOUT)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._persist(functools.partial(self._send, rest[:COPY_BYTES])) :]

    def _send(self, data: memoryview) -> int:
        with self._lock:
            return self._sock.send(data)

    def _receive(self) -> bool:
        """Take what has come, if anything has."""
        try:
            with self._lock:
                data = self._sock.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        self._buffer += data
        self._ended = not data
        return True

    def _fill(self) -> bool:
        """Wait for more; false at the end."""
        while not self._ended and not self._receive():
            self._wait(select.POLLIN)
        return not self._ended

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def ready(self, wake: int, seconds: float, lines: int = 0) -> bool:
        """Whether there is something to be read, so many whole lines at least, or the end, within some seconds; false at once
        when `wake` is readable."""
        late = time.monotonic() + seconds
        while not self._ended and (not self._buffer or self._buffer.count(b"\n") < lines):
            if not self._receive() and not self._poll(select.POLLIN, wake, late - time.monotonic()):
                return False
        return True

    def read1(self, count: int) -> bytes:
        """What there is, at least a byte; b"" at the end."""
        if count and not self._buffer:
            self._fill()
        return self._take(count)

    def read(self, count: int) -> bytes:
        """That many bytes, fewer at the end."""
        while len(self._buffer) < count and self._fill():
            pass
        return self._take(count)

    def readline(self, limit: int) -> bytes:
        """A line with its end, or `limit` bytes."""
        while (end := self._buffer.find(b"\n") + 1) == 0 and len(self._buffer) < limit and self._fill():
            pass
        return self._take(min(end or limit, limit))

    def chunks(self) -> bytes:
        """What is in the chunks that have come whole, after one that was read but for its end (RFC 9112, 7.1). An engine sends
        each line of a log as one."""
        data, at, found = self._buffer, 0, []
        while (head := data.find(b"\r\n", at + 2)) > 0:
            size = int(data[at + 2 : head].partition(b";")[0], 16)
            if size <= 0 or (end := head + 2 + size) > len(data):
                break
            found.append(data[head + 2 : end])
            at = end
        del data[:at]
        return b"".join(found)

    def flush(self) -> None:
        """There is nothing to flush."""

    def half_close(self) -> None:
        """Send the end of what is sent."""
        socket.socket.shutdown(self._sock, socket.SHUT_WR)  # a TLS socket's own would forget its state

    def drain(self) -> None:
        """Wait for the end of what is received."""
        while self.read1(READ_BYTES):
            pass

    def shut(self) -> None:
        """End the connection under whoever waits on it, from any thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    @property
    def alive(self) -> bool:
        """Whether it has not come to its end, nor was let go."""
        return not self._ended and self._sock.fileno() >= 0

    def close(self) -> None:
        """Let the connection go. HTTPResponse calls this at the end of an answer; to say it twice is harmless."""
        self._sock.close()


def exchange(
    wire: Wire, method: str, target: str, headers: Mapping[str, Any], body: bytes | Iterator[bytes]
) -> http.client.HTTPResponse:
    """Send a request; its final answer, of which the head was read, and which must come in time once all was sent."""
    length = {"Content-Length": len(body)} if isinstance(body, bytes) else {"Transfer-Encoding": "chunked"}
    lines = {"User-Agent": "lightrun", "Content-Type": JSON, **length, **headers}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {text}\r\n" for name, text in lines.items()) + "\r\n"
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # who answers may close before it has read all (RFC 9112, 9.6)
        wire.send(head.encode())
        for piece in [body] if isinstance(body, bytes) else _chunked(body):
            wire.send(piece)
    wire.limit()
    response = http.client.HTTPResponse(wire, method=method)  # type: ignore[arg-type]  # as much of a socket as it needs
    response.begin()
    while response.status < 200 and response.status != 101:  # an interim one (RFC 9110, 15.2): http.client knows 100 only
        response.headers = None  # type: ignore[assignment]  # as it is before the first
        response.begin()
    return response


def _chunked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """A body of no known length (RFC 9112, 7.1); small pieces go together."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) >= COPY_BYTES:
            yield b"%x\r\n%b\r\n" % (len(chunk), bytes(chunk))
            chunk.clear()
    yield (b"%x\r\n%b\r\n" % (len(chunk), bytes(chunk)) if chunk else b"") + b"0\r\n\r\n"


# What an answer that is not what was documented raises here.
NOT_UNDERSTOOD = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


class Refused(Exception):
    """The engine's own word that it does not do what it was asked to."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def asked_to(action: str) -> Iterator[None]:
    """Around what asks the engine to do something, or as its decorator: turn every failure into an EngineError. The engine's
    refusals, and into EngineAbsent whatever goes wrong on the way to it and back: a connection that breaks or is too slow, an
    answer that no engine would give, as a proxy before it may."""
    try:
        yield
    except Refused as error:
        kind = {404: EngineMissing, 409: EngineConflict}.get(error.status, EngineError)
        raise kind(f"the engine cannot {action}: {error}") from error
    except TimeoutError as error:
        raise EngineAbsent(f"the engine did not answer in time (to {action})") from error
    except (OSError, http.client.HTTPException) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise EngineAbsent(f"the engine did not answer (to {action}): {what}") from error
    except NOT_UNDERSTOOD as error:
        raise EngineAbsent(f"the engine's answer cannot be understood (to {action})") from error


class Reply:
    """An answer of the engine whose head was read, and the connection it comes on."""

    def __init__(self, wire: Wire, response: http.client.HTTPResponse) -> None:
        self.wire, self._response = wire, response

    def header(self, name: str) -> str:
        """A header's text, `""` when absent."""
        return self._response.headers.get(name, "")

    def json(self) -> Any:
        """The body as JSON. Raises ValueError."""
        with contextlib.closing(self):
            return json.loads(self._response.read(MAX_ANSWER_BYTES))

    def nothing(self) -> None:
        """Raises ValueError for a body where none is documented."""
        with contextlib.closing(self):
            if int(self.header("Content-Length") or 0) or self._response.read(1):
                raise ValueError("a body")

    def streamed(self, silence: float = ENGINE_SECONDS) -> Reply:
        """The same as one whose body may take any time, if no piece takes longer than some seconds."""
        self.wire.stream(silence)
        return self

    @asked_to("go on with its answer")
    def read(self, count: int) -> bytes:
        """That many bytes of the body; fewer at its end. Raises EngineAbsent."""
        return self._response.read(count)

    @asked_to("go on with its answer")
    def read1(self, count: int) -> bytes:
        """What there is of the body, that many bytes at most; b"" at its end. Raises EngineAbsent."""
        return self._response.read1(count)

    @asked_to("go on with its answer")
    def piece(self) -> bytes:
        """What there is of the body, all that has come whole; b"" at its end. Raises EngineAbsent."""
        data = self._response.read1(READ_BYTES)
        return data + self.wire.chunks() if data and getattr(self._response, "chunk_left", None) == 0 else data

    @asked_to("go on with its answer")
    def next(self, wake: int = -1, seconds: float = ENGINE_SECONDS) -> bytes | None:
        """The next bytes of the body; b"" at its end, None when `seconds` have passed or `wake` is readable. Raises
        EngineAbsent."""
        if self._response.length == 0:  # as Podman says of a log without a line
            return b""
        chunk = getattr(self._response, "chunk_left", None)  # between two chunks stand the end of one and the size of another
        lines = 0 if chunk or not self._response.chunked else 1 if chunk is None else 2
        return self.piece() if self.wire.ready(wake, seconds, lines) else None

    def pieces(self) -> Iterator[bytes]:
        """The body, piece by piece. Raises EngineAbsent."""
        with contextlib.closing(self):
            while piece := self.piece():
                yield piece

    def events(self) -> Iterator[dict[str, Any]]:
        """The body as lines of JSON, each when it has come. Raises EngineAbsent."""
        rest = b""
        for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in filter(bytes.strip, lines):
                with asked_to("go on with its answer"):
                    event = dict(json.loads(line))
                yield event

    def close(self) -> None:
        """Let the connection go; an engine keeps a container busy with one that is forgotten."""
        self.wire.shut()
        self.wire.close()


# -- where the engine is

DEFAULT_ENGINE = "unix:///var/run/docker.sock"


@dataclasses.dataclass(frozen=True)
class EngineAddress:
    """Where the engine listens: the path of a Unix socket, or a host and a port, with TLS or without; as a URL, and who said
    so, for people."""

    path: str | None
    host: str | None
    port: int | None
    tls: ssl.SSLContext | None
    url: str
    source: str

    def connect(self) -> socket.socket:
        """A connection, without TLS yet. Raises OSError."""
        with contextlib.ExitStack() as opened:
            if self.path:
                sock = opened.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(HEALTH_SECONDS)
                sock.connect(self.path)
            else:
                address = self.host or "", self.port or 0
                sock = opened.enter_context(socket.create_connection(address, HEALTH_SECONDS))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in TCP_OPTIONS.items():
                    sock.setsockopt(socket.IPPROTO_TCP, name, value)
            opened.pop_all()
            return sock

    def trouble(self) -> str:
        """Why nobody can connect to it, in the system's words ("Permission denied"); "" if one can."""
        try:
            self.connect().close()
        except OSError as error:
            return f"cannot connect to the engine at {self.url}: {error.strerror or error}"
        return ""


def engine_address(settings: Settings, environment: Mapping[str, str]) -> EngineAddress:
    """Found as the Docker CLI finds it: --docker-host, DOCKER_HOST, the context in use, the default socket. Raises
    UsageError for a value that names no engine, StartError for a file that is needed and missing or of no use."""
    folder = _docker_folder(environment)
    current = _docker_json(folder / "config.json").get("currentContext")
    context = environment.get("DOCKER_CONTEXT") or current or "default"
    if settings.docker_host:
        address = _address("--docker-host", settings.docker_host)
    elif url := environment.get("DOCKER_HOST"):
        address = _address("DOCKER_HOST", url)
    elif context != "default":
        return _context_address(folder / "contexts", context)
    else:
        address = _address("the default", DEFAULT_ENGINE)
    verify, certificates = bool(environment.get("DOCKER_TLS_VERIFY")), environment.get("DOCKER_CERT_PATH")
    if not verify and not certificates and not environment.get("DOCKER_TLS"):
        return address
    tls = _tls(Path(certificates or folder), verify, needed=not verify)
    return dataclasses.replace(address, tls=None if address.path else tls)


def _context_address(contexts: Path, name: str) -> EngineAddress:
    """What `docker context create` has stored: a file of JSON, and certificates if there are any."""
    digest, source = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest(), f"the Docker context {name!r}"
    meta, certificates = contexts / "meta" / digest / "meta.json", contexts / "tls" / digest / "docker"
    endpoint = (_docker_json(meta).get("Endpoints") or {}).get("docker")
    if not isinstance(endpoint, dict) or not isinstance(endpoint.get("Host", ""), str):
        raise StartError(f"{source} is in use, and {meta} names no engine")
    address = _address(source, endpoint.get("Host") or DEFAULT_ENGINE)
    verify = not endpoint.get("SkipTLSVerify")
    if address.path or (verify and not os.access(certificates, os.F_OK)):
        return address
    return dataclasses.replace(address, tls=_tls(certificates, verify))


def _address(source: str, url: str) -> EngineAddress:
    try:
        path, host, port = _split_engine(_docker_host(url))
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    return EngineAddress(path, host, port, None, url, source)


def _docker_folder(environment: Mapping[str, str]) -> Path:
    """Where Docker's configuration is."""
    if folder := environment.get("DOCKER_CONFIG"):
        return Path(folder)
    try:
        return Path(environment.get("HOME") or Path.home()) / ".docker"
    except RuntimeError:
        return Path(os.devnull)  # this user has no home: a place where nothing is


def _docker_json(path: Path) -> dict[str, Any]:
    """One of Docker's files; {} when there is none, or none that we may read. Raises StartError."""
    try:
        value: Any = json.loads(small_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        log.warning("%s is not read: %s", path, error.strerror)
        return {}
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path} is not JSON") from error
    kinds = {"auths": dict, "credHelpers": dict, "proxies": dict, "Endpoints": dict, "credsStore": str, "currentContext": str}
    none = type(None)
    if not isinstance(value, dict) or not all(isinstance(value.get(name), (kind, none)) for name, kind in kinds.items()):
        raise StartError(f"{path} is not a configuration of Docker's")
    return {**value}


def _tls(folder: Path, verify: bool, needed: bool = False) -> ssl.SSLContext:
    """With the certificates of a folder, under Docker's names: its CA if the engine is to be verified, and our own if there
    is one or it is needed. Raises StartError."""
    ca, ours, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    known = needed or any(os.access(path, os.F_OK) for path in (ours, key))
    try:
        for path in [ca] * verify + [ours, key] * known:
            small_file(path)  # OpenSSL does not say which one is missing
        context = ssl.create_default_context(cafile=ca if verify else None)
        context.check_hostname = verify
        context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
        if known:
            context.load_cert_chain(ours, key, password=lambda: "")  # else OpenSSL would ask at a terminal
    except ssl.SSLError as error:
        raise StartError(f"TLS to the engine: the files in {folder} are of no use: {error.reason}") from error
    except OSError as error:
        raise StartError(f"TLS to the engine: {error.filename} cannot be read: {error.strerror}") from error
    return context


class Engine:
    """The Docker Engine. Every method raises EngineError or one of its kinds, and nothing else. One connection for each
    call: none is ever stale, and each can be dropped. Source: docs.docker.com/reference/api/engine."""

    def __init__(self, settings: Settings, state_id: str) -> None:
        self._settings, self._state_id = settings, state_id
        self._address = engine_address(settings, os.environ)
        self.local = self._address.path is not None  # it is spoken to over a Unix socket
        self._shared = types.SimpleNamespace(api="", about={}, network_ready=False, weakly=False)  # by all views, once known
        self.count_failure: Callable[[str], None] = lambda _: None  # told of calls without an answer (absent) or of a 5xx (error)
        self._network_lock = threading.Lock()  # held while the network is looked for
        self._patience: Patience | None = None

    def for_one(self, patience: Patience | None) -> Engine:
        """The same engine for somebody who may come to be in a hurry."""
        view = copy.copy(self)
        view._patience = patience
        return view

    def _call(
        self, method: str, path: str, *expected: int, query: Mapping[str, Any] | None = None,
        body: bytes | dict[str, Any] | Iterator[bytes] | None = None, seconds: float = ENGINE_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:  # fmt: skip
        """Send a request; its answer, of which the head was read, for the caller to close. Raises Refused, or what a broken
        connection and an answer of another kind raise."""
        data = to_json(body) if isinstance(body, dict) else body or b""
        target = urllib.parse.quote(self._versioned(path), safe="/:@")
        target += f"?{urllib.parse.urlencode(query, errors='surrogateescape')}" if query else ""
        try:
            with contextlib.ExitStack() as opened:
                wire = opened.enter_context(contextlib.closing(Wire(self._address.connect(), HEALTH_SECONDS, self._patience)))
                if self._address.tls:
                    wire.secure(self._address.tls, self._address.host or "")
                wire.stream(seconds)
                response = exchange(wire, method, target, {"Host": "docker", **(headers or {})}, data)
                if response.status not in (expected or (200,)):
                    if method == "HEAD" and "Api-Version" in response.headers:  # which has no body, and no words
                        raise Refused(response.status, response.reason)
                    said = json.loads(response.read(MAX_ANSWER_BYTES))
                    message = said["message"]  # which only an engine says like this
                    if response.status < 400 or response.status in {502, 503, 504} or not isinstance(message, str):
                        raise ValueError("not an engine's answer")
                    if response.status == 400 and message.startswith("client version"):
                        self._shared.api = ""  # it is another engine since the last call: which it speaks is asked again
                        raise ValueError("not the same engine's answer")
                    raise Refused(409 if said.get("cause") == WRONG_STATE else response.status, message)
                if response.headers.get_content_type() == "text/html":
                    raise ValueError("a page")
                opened.pop_all()
                return Reply(wire, response)
        except Refused as error:
            if error.status >= 500:
                self.count_failure("error")
            raise
        except (OSError, http.client.HTTPException, *NOT_UNDERSTOOD):
            self.count_failure("absent")
            raise

    def _versioned(self, path: str) -> str:
        if path == "/version" or path.startswith("/v4"):
            return path
        api = self._shared.api or self.version()["apiVersion"]
        return f"/v{api}{path}"

    @asked_to("tell its version")
    def version(self) -> dict[str, str]:
        """Version and API version; the quick question whether the engine answers."""
        about = self._call("GET", "/version", seconds=HEALTH_SECONDS).json()
        if not re.fullmatch(r"\d+\.\d+", about["ApiVersion"]):
            raise ValueError("not a version")
        self._shared.api = about["ApiVersion"]
        return {"version": str(about["Version"]), "apiVersion": about["ApiVersion"]}

    @asked_to("tell what it has")
    def about(self) -> dict[str, Any]:
        """What it says of itself (`/info`); asked again when it was away."""
        if not (about := self._shared.about):
            patient = ENGINE_SECONDS if self._patience else HEALTH_SECONDS
            about = dict(self._call("GET", "/info", seconds=patient).json())
            if "Architecture" not in about:  # which every engine tells
                raise ValueError("not an engine's description")
            self._shared.about = about
        return about  # type: ignore[no-any-return]

    @property
    @asked_to("tell what it has")
    def traits(self) -> Traits:
        """What it does in its own way, as long as it was not away."""
        return Traits.of(self.about())

    @asked_to("tell what it has")
    def check_limits(self) -> None:
        """Raises StartError for an option that this engine cannot give, and warns of what it does not do as one would think."""
        about = self.about()
        rootless = "name=rootless" in about["SecurityOptions"]
        if rootless and str(about.get("CgroupVersion")) == "1":  # whatever it says of that: Podman claims that it can
            raise StartError("a rootless engine limits nothing on cgroup v1; it needs v2")
        for name, kept in {"memory": "MemoryLimit", "cpus": "CpuCfsQuota", "pids": "PidsLimit"}.items():
            if not about.get(kept, True):
                why = "; a rootless engine needs cgroup v2, delegated to its user" if rootless else ""
                raise StartError(f"--{name}: the engine cannot limit that (its {kept} is false{why})")
        if not about.get("SwapLimit", True):
            log.warning("the engine does not limit swap: runs may use it beyond their memory")
        if self._settings.cpus > about["NCPU"]:
            raise StartError(f"--cpus {self._settings.cpus:g}: the engine has {about['NCPU']}")
        if self._settings.memory > about["MemTotal"]:
            raise StartError(f"--memory {self._settings.memory}: the engine has {about['MemTotal']} bytes")
        if self._settings.runtime and self._settings.runtime not in about["Runtimes"]:
            raise StartError(f"--runtime {self._settings.runtime}: the engine knows {', '.join(sorted(about['Runtimes']))}")
        name = self._settings.runtime or about.get("DefaultRuntime", "")
        runtime = about["Runtimes"].get(name) or {}
        is_gvisor = "runsc" in {name, posixpath.basename(runtime.get("path", ""))}
        if is_gvisor and "--overlay2=none" not in (runtime.get("runtimeArgs") or []):
            remedy = 'add "--overlay2=none" to its runtimeArgs in the engine\'s /etc/docker/daemon.json, if it knows that'
            log.warning("runtime %s: files that a run has changed may be kept old, or not at all; %s", name, remedy)

    @asked_to("find the image")
    def image(self, reference: str) -> Image:
        """What is known of an image that is on the engine. Raises EngineMissing."""
        about = self._call("GET", f"/images/{reference}/json").json()
        config = about.get("Config") or {}
        command = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
        user, workdir = str(config.get("User") or ""), clean_path(config.get("WorkingDir") or "/")
        return Image(str(about["Id"]), user, workdir, tuple(config.get("Env") or []), tuple(command))

    def pull(self, reference: str, seconds: float) -> Generator[dict[str, Any], None, None]:
        """Pull an image, with the credentials of the daemon user's Docker configuration; yields the engine's progress.
        `seconds` bounds a silence."""
        name, sign, digest = reference.partition("@")
        repository, _, tag = (name, sign, digest) if sign else reference.rpartition(":")
        credentials = _credentials(repository)
        with asked_to("pull the image"):
            reply = self._call(
                "POST", "/images/create", query={"fromImage": repository, "tag": tag}, seconds=seconds,
                headers={"X-Registry-Auth": credentials} if credentials else {},
            )  # fmt: skip
        with contextlib.closing(reply.streamed(seconds)):
            for event in reply.events():
                if "error" in event:
                    raise EngineError(f"the engine cannot pull the image: {event['error']}")
                yield event

    def _network_mode(self, run_id: str, name: str | None) -> str:
        """What a run's `network` means to the engine; a named one must be just that, not an id or the host's."""
        if name is None:
            return self._isolated_network() if self.traits.keeps_apart else self._own_network(run_id)
        if name != "none":
            about = self._call("GET", f"/networks/{name}").json()
            if about["Name"] != name or about["Driver"] in {"host", "null"}:
                raise EngineMissing(f"there is no network named {name} that a run may use")
        return name

    @asked_to("make a network for the run (with network none it needs none)")
    def _own_network(self, run_id: str) -> str:
        """A bridge for one container, under its name, which goes with it; for Podman, which keeps bridges apart that ask for it,
        by a call of its own. Source: docs.podman.io/en/latest/_static/api.html, NetworkCreateLibpod."""
        name, labels = container_name(run_id), {LABEL_STATE: self._state_id, LABEL_RUN: run_id}
        about = {"name": name, "driver": "bridge", "labels": labels, "dns_enabled": True}
        how = ISOLATE[self._shared.weakly]
        try:
            made = self._call("POST", "/v4.0.0/libpod/networks/create", body=about | {"options": {"isolate": how}}).json()
            if made["options"] != {"isolate": how}:
                raise EngineError("the engine does not keep networks apart; use network none")
        except Refused as error:
            if "already exists" in str(error):  # of an earlier try
                return name
            if "invalid syntax" not in str(error) or self._shared.weakly:
                raise
            log.warning("the engine keeps runs apart from each other, and not from containers in other networks")
            self._shared.weakly = True
            return self._own_network(run_id)
        return name

    @asked_to("make the network")
    def _isolated_network(self) -> str:
        """The isolated bridge, made when missing. Two daemons may make it at once, and older engines then have two."""
        while not self._network_lock.acquire(timeout=DISCONNECT_POLL_SECONDS):
            if self._patience and self._patience.deadline(0) < time.monotonic():
                raise TimeoutError
        try:
            if not self._shared.network_ready:
                about = {"Name": NETWORK, "Driver": "bridge", "Options": NETWORK_OPTIONS, "Labels": {LABEL_STATE: ""}}
                if not self._networks():
                    with contextlib.suppress(EngineConflict), asked_to("make the network"):
                        self._call("POST", "/networks/create", 201, body={**about, "CheckDuplicate": True}).json()
                found = sorted(self._networks(), key=lambda network: (network["Created"], network["Id"]))
                for network in found[::-1]:  # the newest goes, but for one that a container has already
                    with contextlib.suppress(EngineError):
                        if len(found) > 1:
                            self._remove(f"/networks/{network['Id']}")
                            found.remove(network)
                first = found[0]
                options = first.get("Options") or {}
                if first["Driver"] != "bridge" or any(options.get(name) != value for name, value in NETWORK_OPTIONS.items()):
                    raise EngineError(f"the network {NETWORK} is not an isolated bridge; remove it")
                self._shared.network_ready = True
        finally:
            self._network_lock.release()
        return NETWORK

    def _networks(self) -> list[dict[str, Any]]:
        found = self._call("GET", "/networks", query={"filters": json.dumps({"name": [NETWORK]})}).json()
        return [network for network in found if network["Name"] == NETWORK]

    def forget(self) -> None:
        """Ask again for what it has, and for the isolated bridge, before the next use: it may be another, or was pruned."""
        self._shared.about, self._shared.network_ready = {}, False

    @asked_to("create the container")
    def create(self, run_id: str, image: Image, request: RunRequest, parent: str = "") -> str:
        """Create a run's container with every hardening of SPEC 5, below a cgroup or the engine's own (""); its id."""
        config = {
            "Image": image.id,
            "Env": [f"{name}={value}" for name, value in request.env.items()],
            "WorkingDir": request.workdir or "",
            "Labels": {LABEL_STATE: self._state_id, LABEL_RUN: run_id},
            "OpenStdin": request.stdin is not None or request.waits,  # a shim waits for what nobody sends
            "StdinOnce": request.stdin is not None,
            "Healthcheck": {"Test": ["NONE"]},  # an image's own would run beside the run
            "HostConfig": self._host_config(run_id, image, request) | ({"CgroupParent": parent} if parent else {}),
        }
        if request.command is not None:
            config |= {"Entrypoint": request.command, "Cmd": []}
        query = {"name": container_name(run_id)}
        try:
            return str(self._call("POST", "/containers/create", 201, query=query, body=config).json()["Id"])
        except Refused as error:
            if error.status == 409:  # an earlier try's has come to be after all
                raise EngineAbsent("the engine is still at an earlier try to create the container") from error
            raise

    def _host_config(self, run_id: str, image: Image, request: RunRequest) -> dict[str, Any]:
        traits = self.traits
        copy = {"max-size": str(COPY_FACTOR * self._settings.log_limit), "max-file": "2", "compress": "false"}
        limits = {"core": 0, "fsize": self._settings.file_size if request.file_size is None else request.file_size}
        return {
            "CapDrop": ["ALL"],
            "CapAdd": CAPABILITIES if image.root or traits.drops_ambient else [],
            "SecurityOpt": ["no-new-privileges"],
            "Privileged": False,
            "Init": True,
            "IpcMode": "private",
            "Memory": request.memory,
            "MemorySwap": request.memory,
            "NanoCpus": round(request.cpus * 1e9),
            "PidsLimit": request.pids,
            "Ulimits": [{"Name": name, "Soft": most, "Hard": most} for name, most in limits.items() if most is not None],
            "NetworkMode": self._network_mode(run_id, request.network),
            "LogConfig": {"Type": traits.log_driver, "Config": copy},
            **({"Runtime": self._settings.runtime} if self._settings.runtime else {}),
        }

    @asked_to("put the files")
    def put(self, container: str, tar: Iterator[bytes]) -> None:
        """Unpack a tar at the root of a container that has not been started; no folder takes a file's place, nor the other way
        round."""
        path, query = f"/containers/{container}/archive", {"path": "/", "noOverwriteDirNonDir": 1}
        self._call("PUT", path, query=query, body=tar, headers={"Content-Type": TAR}).nothing()

    def stat(self, container: str, path: str) -> tuple[int, str] | None:
        """Go file mode and, of a link, the target of what stands at a path of a container, links on the way to it followed;
        None for nothing."""
        with contextlib.suppress(EngineMissing), asked_to("look at the files of the image"):
            reply = self._call("HEAD", f"/containers/{container}/archive", query={"path": path})
            reply.close()
            about = json.loads(base64.b64decode(reply.header("X-Docker-Container-Path-Stat")))
            return int(about["mode"]), str(about.get("linkTarget", ""))
        return None

    @asked_to("look at the files of the image")
    def added(self, container: str) -> set[str]:
        """The paths that a container has and its image has not."""
        changes = self._call("GET", f"/containers/{container}/changes").json() or []
        return {str(change["Path"]) for change in changes if change["Kind"] == 1}

    def text(self, container: str, path: str) -> str:
        """A small text file of a container, a link to it followed; "" for none."""
        with contextlib.suppress(EngineMissing), asked_to("look at the files of the image"):
            mode, target = self.stat(container, path) or (GO_MODE_OTHER, "")
            if mode & GO_MODE_LINK:
                mode, path = 0, target
            if mode & (GO_MODE_OTHER | GO_MODE_FOLDER):
                return ""
            reply = self._call("GET", f"/containers/{container}/archive", query={"path": path}).streamed()
            try:
                with contextlib.closing(reply), tarfile.open(fileobj=reply, mode="r|") as archive:  # type: ignore[call-overload]
                    member = archive.next()
                    file = archive.extractfile(member) if member else None
                    return file.read(MAX_SETTINGS_BYTES).decode(errors="replace") if file else ""
            except tarfile.TarError as error:
                raise ValueError("not a tar") from error
        return ""

    def _attach(self, container: str, streams: Mapping[str, int], headers: Mapping[str, str] | None = None) -> Reply:
        """A stream from or to a container. Raises ValueError for an answer that is none."""
        expected, query = (101, 200) if headers else (200,), {"stream": 1, **streams}
        return self._stream(self._call("POST", f"/containers/{container}/attach", *expected, query=query, headers=headers))

    @staticmethod
    def _stream(reply: Reply) -> Reply:
        """An answer that is a container's or a command's stream. Raises ValueError for one that is none."""
        if not reply.header("Content-Type").startswith("application/vnd.docker."):
            reply.close()
            raise ValueError("not a container's stream")
        return reply.streamed()

    @asked_to("attach")
    def attach(self, container: str, stdin: int = 0) -> Reply:
        """The container's output from now on, as frames cut anywhere; with `stdin` its stdin too, as what is sent: its end is
        the end of file."""
        return self._attach(container, {"stdin": stdin, **BOTH_STREAMS} if stdin else BOTH_STREAMS)

    @asked_to("read the log")
    def kept_output(self, container: str, follow: bool) -> Reply:
        """The engine's own copy of the output from its beginning; to follow, until the container has exited."""
        query = {"follow": int(follow), **BOTH_STREAMS}
        silence = ENGINE_SECONDS if follow else COPY_SECONDS
        return self._call("GET", f"/containers/{container}/logs", query=query, seconds=silence).streamed(silence)

    @asked_to("attach stdin")
    def open_stdin(self, container: str) -> Reply:
        """A connection to the container's stdin; the end of it is the end of file. A program that does not read makes it
        wait as long as it runs."""
        query = {"stdin": 1} if self.traits.splits_attach else {"stdin": 1, **BOTH_STREAMS}
        reply = self._attach(container, query, {"Connection": "Upgrade", "Upgrade": "tcp"}).streamed(math.inf)
        reply.wire.patience = None
        return reply

    def machine(self) -> Machine | None:
        """What the shim is made for; None on an architecture without one."""
        architecture = self.about()["Architecture"]
        return MACHINES.get(GO_ARCHITECTURES.get(architecture, architecture))

    @asked_to("start the container")
    def start(self, container: str) -> None:
        """Start the container; to say it twice is harmless while it runs."""
        try:
            self._call("POST", f"/containers/{container}/start", 204, 304).nothing()
        except Refused as error:
            if "is ambiguous" in str(error):  # two daemons have made the network at once
                self._shared.network_ready = False
                with contextlib.suppress(EngineError):
                    self._isolated_network()
                raise EngineAbsent(f"the engine does not know which network is meant: {error}") from error
            raise

    @asked_to("inspect the container")
    def inspect(self, container: str) -> ContainerState:
        """The engine's word on a container, by id or name. Raises EngineMissing."""
        reply = self._call("GET", f"/containers/{container}/json")
        about = reply.json()
        state, date = about["State"], reply.header("Date")
        started, finished = (
            None if state[name].startswith("0001-") else parse_timestamp(state[name]) for name in ("StartedAt", "FinishedAt")
        )
        if not isinstance(state["Running"], bool) or not isinstance(state["ExitCode"], int):
            raise ValueError("not a state")
        told = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
        workdir, exit_code, oom_killed = about["Config"].get("WorkingDir") or "/", state["ExitCode"], bool(state["OOMKilled"])
        return ContainerState(str(about["Image"]), workdir, state["Running"], started, finished, exit_code, oom_killed, told)

    @asked_to("wait for the container")
    def wait(self, container: str, wake: int, seconds: float) -> None:
        """Return when the container has exited, `seconds` have passed or `wake` is readable: look then."""
        with (
            contextlib.suppress(TimeoutError),
            contextlib.closing(self._call("POST", f"/containers/{container}/wait", seconds=seconds)) as reply,
        ):
            reply.wire.ready(wake, seconds)

    def kill(self, container: str, signal_name: str) -> bool:
        """Send a signal; whether the container was there to take it."""
        with contextlib.suppress(EngineMissing, EngineConflict), asked_to("send a signal"):
            self._call("POST", f"/containers/{container}/kill", 204, query={"signal": signal_name}).nothing()
            return True
        return False

    @asked_to("run a command in the container")
    def create_command(self, container: str, argv: Sequence[str], env: Mapping[str, str], workdir: str) -> str:
        """A command to be run in a running container; its id."""
        config: dict[str, Any] = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True}
        config |= {"Cmd": [*argv], "Env": [f"{name}={value}" for name, value in env.items()], "WorkingDir": workdir}
        return str(self._call("POST", f"/containers/{container}/exec", 201, body=config).json()["Id"])

    @asked_to("run a command in the container")
    def start_command(self, exec_id: str) -> Reply:
        """Start it: one stream of its stdin and of its output as frames."""
        return self._stream(self._call("POST", f"/exec/{exec_id}/start", body={"Detach": False, "Tty": False}))

    @asked_to("look at the command")
    def command(self, exec_id: str) -> tuple[int | None, int, str]:
        """The exit code of a command, None while it goes on or has yet to be started; its pid where the engine is, 0 before; its
        container's id."""
        about = self._call("GET", f"/exec/{exec_id}/json").json()
        running, code = about["Running"], about["ExitCode"]
        if not isinstance(running, bool) or not isinstance(code, (int, type(None))):
            raise ValueError("not a state")
        return None if running else code, int(about["Pid"]), str(about["ContainerID"])

    @asked_to("tell its events")
    def has_sent(self, container: str, signal_name: str, since: float, until: float) -> bool | None:
        """Whether the engine sent the container a signal between its start and another time, both of the engine's clock; None
        when it does not know any more: it remembers its last events, and the start was before the signal."""
        number = str(signal.Signals[signal_name].value)
        filters = json.dumps({"container": [container], "event": ["kill", "start"]})
        query = {"since": f"{since:.9f}", "until": f"{until:.9f}", "filters": filters}
        reply = self._call("GET", "/events", query=query).streamed(COPY_SECONDS)
        reply.wire.patience = None  # it may be `until` that is waited for
        told = [(event["Action"], event["Actor"]["Attributes"].get("signal", number)) for event in reply.events()]
        if ("kill", number) in told:  # Podman does not say which
            return True
        return False if any(action == "start" for action, _ in told) else None

    def deaths(self) -> Iterator[tuple[str, int, float]]:
        """Name, exit code and time (Unix seconds of the engine's clock) of each of our containers that exits from now on."""
        filters = json.dumps({"event": ["die"], "label": [f"{LABEL_STATE}={self._state_id}"]})
        with asked_to("tell its events"):
            reply = self._call("GET", "/events", query={"filters": filters}).streamed()
        for event in reply.events():
            with asked_to("tell its events"):
                about = event["Actor"]["Attributes"]
                death = str(about["name"]), int(about["exitCode"]), int(event["timeNano"]) / 1e9
            yield death

    @asked_to("copy out")
    def archive(self, container: str, path: str) -> tuple[Reply, int]:
        """A path of an exited container as a tar stream, and its Go file mode. Raises EngineMissing."""
        reply = self._call("GET", f"/containers/{container}/archive", query={"path": path}).streamed()
        return reply, int(json.loads(base64.b64decode(reply.header("X-Docker-Container-Path-Stat")))["mode"])

    def remove(self, container: str) -> None:
        """Remove a container by its name, running or not, with its anonymous volumes and its network if it has one of its own;
        gone already is as good."""
        self._remove(f"/containers/{container}", v=1, force=1)
        if not self.traits.keeps_apart:
            self._remove(f"/networks/{container}")

    def _remove(self, path: str, **query: int) -> None:
        with contextlib.suppress(EngineMissing), asked_to(f"remove the {path.split('/')[1][:-1]}"):
            self._call("DELETE", path, 204, query=query, seconds=REMOVE_SECONDS).nothing()

    @asked_to("list the containers")
    def left(self) -> set[str]:
        """Run ids of all containers of this state dir, and of networks of their own."""
        query = {"all": 1, "filters": json.dumps({"label": [f"{LABEL_STATE}={self._state_id}"]})}
        found = self._call("GET", "/containers/json", query=query).json()
        runs = [(about["Labels"].get(LABEL_RUN, ""), about["Names"]) for about in found]
        if not self.traits.keeps_apart:
            networks = self._call("GET", "/networks", query=query).json()
            runs += [(about["Labels"].get(LABEL_RUN, ""), [f"/{about['Name']}"]) for about in networks]
        # An image can carry any label, and somebody else may run it; but the name is ours alone.
        return {run_id for run_id, names in runs if names == [f"/{container_name(run_id)}"]}


def container_name(run_id: str) -> str:
    """The name of a run's container, which is ours alone."""
    return f"lightrun-{run_id}"


def _credentials(repository: str) -> str | None:
    """X-Registry-Auth for a registry, from the daemon user's Docker configuration; none when that cannot be read, since a
    public image needs none. The log names what failed, and no secret."""
    registry, where = repository.partition("/")[0], "the Docker configuration"
    try:
        import docker.auth

        configuration = docker.auth.load_config()
        if helper := configuration.get_credential_store(registry):
            where = f"docker-credential-{helper}"
            server = docker.auth.INDEX_URL if registry == docker.auth.INDEX_NAME else registry
            told = subprocess.run([where, "get"], input=server.encode(), capture_output=True, timeout=ENGINE_SECONDS)
            if told.returncode and b"credentials not found" not in told.stdout:
                raise subprocess.CalledProcessError(told.returncode, where)
            name, secret = ("", "") if told.returncode else operator.itemgetter("Username", "Secret")(json.loads(told.stdout))
            if name or secret:  # docker-credential-pass says in this way that there are none
                entry = {"IdentityToken": secret} if name == "<token>" else {"Username": name, "Password": secret}
                return docker.auth.encode_header({"ServerAddress": server, **entry}).decode()
            configuration |= {"credsStore": None, "credHelpers": None}
        found = configuration.resolve_authconfig(registry)
        return docker.auth.encode_header(found).decode() if found else None
    except Exception as error:  # whatever a helper or a file of somebody else's may bring about
        log.warning("no credentials for %s: %s cannot be used (%s)", registry, where, type(error).__name__)
        return None


# --------------------------------------------------------------------------------------------------------------------
# Layout: what of a tree goes where in a container, and to whom it belongs
# --------------------------------------------------------------------------------------------------------------------


class Standing(enum.Enum):
    """What an image has at a path."""

    NOTHING = "nothing"
    FOLDER = "a folder"
    LINKED = "a link to a folder"
    LINK = "a link that leads to no folder"
    OTHER = "not a folder"


class Layout:
    """How trees come to lie in containers. What an image has stays as it is; what lightrun makes belongs to the image's user.
    What images have is asked once for each and remembered by their ids, of a container of theirs in which nothing has run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the order of _known
        self._known: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()

    def _fact(self, image: Image, name: str, ask: Callable[[], Result]) -> Result:
        """What is known of an image by some name, asked now if need be."""
        with self._lock:
            known = self._known.setdefault(image.id, {})
            self._known.move_to_end(image.id)
            if len(self._known) > MAX_KNOWN_IMAGES:
                self._known.popitem(last=False)
        if (found := known.get(name)) is None:
            if len(known) > MAX_KNOWN_PATHS:
                known.clear()
            found = known[name] = ask()
        return found

    def owner(self, engine: Engine, container: str, image: Image) -> tuple[int, int]:
        """User and group that the image's program runs as."""
        if image.user in {"", "0", "root", "0:0", "root:root"}:
            return 0, 0

        def look() -> tuple[int, int]:
            return user_and_group(image.user, engine.text(container, "/etc/passwd"), engine.text(container, "/etc/group"))

        return self._fact(image, "user", look)

    def made(self, engine: Engine, container: str, image: Image, workdir: str) -> list[str]:
        """What of the way to the workdir the engine makes, since the image has it not, in a container made with it."""

        def look() -> list[str]:
            if engine.traits.makes_workdir:
                return sorted(engine.added(container))
            return [way for way in way_to(workdir) if self.standing(engine, container, image, way) is Standing.NOTHING]

        return self._fact(image, f"made {workdir}", look)

    def standing(self, engine: Engine, container: str, image: Image, path: str) -> Standing:
        """What an image has at a path."""

        def look() -> Standing:
            if (found := engine.stat(container, path)) is None:
                return Standing.NOTHING
            if found[0] & GO_MODE_LINK:
                behind = engine.stat(container, found[1]) if found[1] else None
                return Standing.LINKED if behind and behind[0] & GO_MODE_FOLDER else Standing.LINK
            return Standing.FOLDER if found[0] & GO_MODE_FOLDER else Standing.OTHER

        return self._fact(image, path, look)

    def plan(
        self, engine: Engine, container: str, image: Image, workdir: str, made: Sequence[str], entries: Iterable[Entry],
        check: Callable[[], None],
    ) -> list[Entry]:  # fmt: skip
        """What is to be put for a tree to stand in the workdir, by paths below `/`: folders first, `made` above all, and links
        last. Raises RunEnds for what is in its way, and what `check` raises."""
        root, missing = workdir[1:], {path[1:] for path in made}
        placed = {posixpath.join(root, each.path).rstrip("/"): each for each in entries}
        folders = dict.fromkeys([path for path in folders_of(placed) if path.startswith(f"{root}/")], Entry("", tarfile.DIRTYPE))
        folders |= {path: each for path, each in placed.items() if each.is_folder and path != root}
        wanted = {path: placed.get(path, Entry("", tarfile.DIRTYPE)) for path in missing}
        for path in [*sorted(folders, key=lambda path: path.count("/")), *(placed.keys() - folders.keys() - {root})]:
            check()
            stands = Standing.NOTHING
            if posixpath.dirname(path) not in missing:
                stands = self.standing(engine, container, image, f"/{path}")
            if stands is Standing.NOTHING and path in folders:
                missing.add(path)
            elif stands not in ({Standing.FOLDER, Standing.LINKED} if path in folders else {Standing.NOTHING, Standing.OTHER}):
                raise RunEnds("start_failed", f"files: /{printable(path)} is {stands.value} in the image")
            if path in missing or path not in folders:
                wanted[path] = folders.get(path) or placed[path]
        order = {tarfile.DIRTYPE: 0, tarfile.REGTYPE: 1, tarfile.LNKTYPE: 2, tarfile.SYMTYPE: 3}
        return [
            dataclasses.replace(each, path=path, target=f"{root}/{each.target}" if each.kind == tarfile.LNKTYPE else each.target)
            for path, each in sorted(wanted.items(), key=lambda item: (order[item[1].kind], item[0].count("/"), item[0]))
        ]


def user_and_group(user: str, passwd: str, group: str) -> tuple[int, int]:
    """The numbers that a runtime finds for an image's USER, `name`, `number`, or either with `:group`, in the image's files;
    root's for what they do not tell, with which it would refuse to start. Source: passwd(5), group(5), runc's user package."""
    name, _, group_name = user.partition(":")
    rows = [row for line in passwd.splitlines() if len(row := line.split(":")) >= 4 and name in {row[0], row[2]}]
    numbers = [(int(row[2]), int(row[3])) for row in rows if row[2].isdecimal() and row[3].isdecimal()][:1]
    uid, gid = numbers[0] if numbers else (int(name) if name.isdecimal() else 0, 0)
    if group_name:
        rows = [row for line in group.splitlines() if len(row := line.split(":")) >= 3 and group_name in {row[0], row[2]}]
        found = [int(row[2]) for row in rows if row[2].isdecimal()]
        gid = found[0] if found else int(group_name) if group_name.isdecimal() else 0
    return uid, gid


# --------------------------------------------------------------------------------------------------------------------
# Usage: what a run used, counted by a cgroup that its container has for a parent
# --------------------------------------------------------------------------------------------------------------------


def cgroup_mounts() -> dict[str, Path]:
    """Where the whole hierarchy of each controller can be seen, by its name; "" is version 2's. See proc(5), cgroups(7)."""
    mounts: dict[str, Path] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().decode(errors="replace").split("\n")[:-1]:
            (_, _, _, root, where, *_), (kind, _, options, *_) = (part.split(" ", 5) for part in line.split(" - ", 1))
            if root == "/" and kind in {"cgroup", "cgroup2"}:
                mounts |= dict.fromkeys(options.split(",") if kind == "cgroup" else [""], Path(where))
    return mounts


def _figure(path: Path, name: str = "") -> int | None:
    """The number in a file of a cgroup, or in its line of that name; None when it cannot be had."""
    try:
        words = path.read_text().split()
        return int(words[words.index(name) + 1 if name else 0])
    except (OSError, ValueError, IndexError):
        return None


class Slot:
    """A cgroup that is the parent of one container at a time, so that the difference of its counters is what that one used,
    orphans and all, also when it is gone. The engine makes it. Version 1 has a hierarchy for each controller, and counts
    kills for want of memory in the container's own cgroup only, which goes with it; but it rings for them.
    Source: docs.kernel.org/admin-guide/cgroup-v2.html, cgroup-v1/memory.html, cgroup-v1/cpuacct.html."""

    def __init__(self, parent: str, cpu: Path, memory: Path, before: dict[str, Any]) -> None:
        self.parent, self.before = parent, before  # which slot it is, and what was counted when a container was to be started
        self._cpu, self._memory, self._v2 = cpu, memory, cpu == memory
        names = ("memory.current", "memory.peak") if self._v2 else ("memory.usage_in_bytes", "memory.max_usage_in_bytes")
        self._now, self._most = (memory / name for name in names)
        self._opened = contextlib.ExitStack()
        self._peak: IO[str] | None = None  # through which the peak was reset: version 2 does that for one descriptor only
        self._bell_lock, self._rung = threading.Lock(), 0  # guards what has rung so far
        self._bell, self._own = -1, memory  # rings for each such kill, and once when the container's own cgroup goes

    def begin(self, again: bool = False) -> str:
        """Count from now on; what a daemon that adopts the run needs to know of that. `again`: for a container that is there
        already, whose memory is the run's."""
        self.end()
        counted = {"made": self._made(), "cpu": self._cpu_time(), "oom": self._oom_kills(), "memory": None}
        with contextlib.suppress(OSError):
            left = self.before.get("memory") if self._made() == self.before.get("made") else 0
            self._peak = self._opened.enter_context(self._most.open("r+", buffering=1))
            self._peak.write("0\n")
            counted["memory"] = left if again else _figure(self._now)
        self.before = {name: self.before[name] for name in ("driver", "slot")} | counted
        return to_json(self.before).decode()

    def started(self) -> None:
        """There is a container now: have the bell hung up."""
        if self._v2 or self._bell >= 0:
            return
        with contextlib.suppress(OSError, StopIteration, AttributeError):
            own = next(path for path in self._memory.iterdir() if path.is_dir())
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._opened.callback(os.close, bell)
            with (own / "memory.oom_control").open() as control:
                (own / "cgroup.event_control").write_text(f"{bell} {control.fileno()}")
            self._bell, self._own = bell, own
            os.eventfd_write(bell, _figure(own / "memory.oom_control", "oom_kill") or 0)  # those that came before

    def end(self) -> None:
        """Let go of what was opened."""
        with self._bell_lock:
            self._opened.close()
            self._peak, self._bell, self._rung = None, -1, 0

    def _made(self) -> int | None:
        """What tells this folder from one that was here before under its name."""
        with contextlib.suppress(OSError):
            return self._cpu.stat().st_ino
        return None

    def _cpu_time(self) -> int | None:
        if self._v2:
            used = _figure(self._cpu / "cpu.stat", "usage_usec")
            return None if used is None else 1000 * used
        return _figure(self._cpu / "cpuacct.usage")

    def _oom_kills(self) -> int | None:
        return _figure(self._memory / "memory.events", "oom_kill") if self._v2 else None

    def _since(self, name: str, now: int | None) -> int | None:
        """A counter's difference: all of it when the cgroup was made for this container."""
        before = self.before.get(name) if self._made() == self.before.get("made") else 0
        return None if now is None or before is None or now < before else now - before

    def cpu_time(self) -> int | None:
        """Nanoseconds of CPU time so far."""
        return self._since("cpu", self._cpu_time())

    def memory_peak(self) -> int | None:
        """Bytes. What was left by earlier containers, pages of the image most likely, is not the run's; when some of that has
        gone meanwhile, the peak cannot be told."""
        fresh, now, peak = self._made() != self.before.get("made"), _figure(self._now), None
        left = 0 if fresh else self.before.get("memory")
        if left is None or now is None or now < left - MEMORY_SLACK_BYTES:
            return None
        if fresh or not self._v2:
            peak = _figure(self._most)
        elif self._peak:
            with contextlib.suppress(OSError, ValueError):
                self._peak.seek(0)
                peak = int(self._peak.read())
        return None if peak is None else max(0, peak - left)

    def oom_killed(self, limit: int) -> bool:
        """Whether the kernel has killed something of a run with this limit (bytes) for want of memory, as far as it tells."""
        return not self.spared(limit) and bool(self.kills())

    def spared(self, limit: int) -> bool:
        """Whether it is certain, and quickly told, that nothing was."""
        if self._v2:
            return self.kills() == 0
        peak = self.memory_peak()
        return peak is not None and peak < limit - MEMORY_SLACK_BYTES

    def kills(self) -> int | None:
        """How often it has, or on version 1 has been about to; None when that cannot be seen."""
        if self._v2:
            return self._since("oom", self._oom_kills())
        with self._bell_lock:
            if self._bell < 0:
                return None
            poll = select.poll()
            poll.register(self._bell, select.POLLIN)
            while poll.poll(0 if self._own.exists() or not self._rung else FIRST_LOOK_SECONDS * 1000):
                self._rung += os.eventfd_read(self._bell)
            return max(0, self._rung - (not self._own.exists()))

    def usage(self) -> dict[str, int]:
        """`cpuMs` and `memoryPeakBytes`, each if it can be had."""
        cpu, peak = self.cpu_time(), self.memory_peak()
        figures = {"cpuMs": None if cpu is None else round(cpu / 1e6), "memoryPeakBytes": peak}
        return {name: value for name, value in figures.items() if value is not None}


class Slots:
    """The slots of one daemon, of which each run that has a worker holds one. They are below a cgroup of the state dir's own
    (with systemd's driver slices, whose names say what they are in), and go with the daemon but for those that still hold a
    container."""

    def __init__(self, engine: Engine, state_id: str) -> None:
        self._engine, self._names = engine, ("lightrun", state_id[:12])
        self._lock = threading.Lock()  # guards _held and _stuck
        self._held: set[int] = set()
        self._stuck: set[int] = set()  # of these those whose containers are left to the keeper
        self._mounts = cgroup_mounts()
        self._driver = self._usable_driver()  # that was asked for last
        self.seen = True  # the cgroup of the last run was where it should be

    def _usable_driver(self) -> str:
        """The engine's, if its cgroups are likely to be those that we see; "" if not, or as long as it is away."""
        try:
            about = self._engine.about()
        except EngineError:
            return ""
        here = self._engine.local and about.get("MemTotal") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rootless = "name=rootless" in (about.get("SecurityOptions") or [])
        version = {"cpuacct", "memory"} if str(about.get("CgroupVersion", "1")) == "1" else {""}
        driver = about.get("CgroupDriver")
        return driver if here and not rootless and version <= set(self._mounts) and driver in {"cgroupfs", "systemd"} else ""

    def able(self) -> bool:
        """Whether usage can be had, as far as is known."""
        return self.seen and bool(self._usable_driver())

    def take(self, meter: str | None = None) -> Slot | None:
        """A free slot, or the one that an adopted run has; None where there can be none."""
        before: dict[str, Any] = json.loads(meter) if meter else {"driver": self._usable_driver()}
        if not (driver := str(before["driver"])):
            return None
        with self._lock:
            self._driver = driver
            number: int = before.get("slot", next(n for n in itertools.count() if n not in self._held))
            self._held.add(number)
        path = self._path(driver, number)
        parent = path.name if driver == "systemd" else f"/{path}"
        cpu, memory = (self._mounts.get(name, self._mounts.get("", Path())) for name in ("cpuacct", "memory"))
        return Slot(parent, cpu / path, memory / path, {**before, "slot": number})

    def _path(self, driver: str, *number: int) -> Path:
        """A slot's cgroup below a hierarchy's root, or without a number the folder of all."""
        names = [*self._names, *map(str, number)]
        if driver == "cgroupfs":
            return Path(*names)
        return Path(*("-".join(names[:depth]) + ".slice" for depth in range(1, len(names) + 1)))

    def give_back(self, slot: Slot) -> None:
        """Give a slot back that no container is in any more."""
        slot.end()
        with self._lock:
            self._held.discard(slot.before["slot"])

    def vacate(self, slot: Slot | None, container: str) -> bool:
        """Remove a container, and give back the slot that it was in; false when that is left to the keeper."""
        if slot:
            slot.end()
        try:
            self._engine.remove(container)
        except EngineError as error:
            log.warning("container %s: %s", container, error)
            with self._lock:
                self._stuck |= {slot.before["slot"]} if slot else set()
            return False
        if slot:  # else the container may still be in it
            self.give_back(slot)
        return True

    def stuck(self) -> set[int]:
        """The slots whose containers are left to the keeper."""
        with self._lock:
            return set(self._stuck)

    def loosen(self, slots: set[int]) -> None:
        """The containers that these were left with have gone."""
        with self._lock:
            self._held -= slots
            self._stuck -= slots

    def sweep(self) -> None:
        """Remove those that nobody holds and no container is in."""
        for root in set(self._mounts.values()) if self._driver else ():
            own = root / self._path(self._driver)
            with self._lock, contextlib.suppress(OSError):
                for folder in list(own.iterdir()):
                    number = folder.name.removesuffix(".slice").rpartition("-")[2]
                    if number.isdecimal() and int(number) not in self._held:
                        self._remove(folder)
                self._remove(own)
                own.parent.rmdir()  # when no other state dir has one

    def _remove(self, folder: Path) -> None:
        """Remove a cgroup without others in it; systemd is told, or would believe that it is there."""
        if any(entry.is_dir() for entry in folder.iterdir()):
            return
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if self._driver == "systemd":
                told = ["systemctl", "stop", folder.name]
                subprocess.run(told, stdin=subprocess.DEVNULL, capture_output=True, timeout=HEALTH_SECONDS)
            folder.rmdir()


# --------------------------------------------------------------------------------------------------------------------
# Warm: containers that are started and wait for a run
# --------------------------------------------------------------------------------------------------------------------

# Most of what a run costs is the engine's start. A warm container is one that is started before, with a shim of ours for its
# program, in which no code of the image has run. The shim reads frames from its standard input: the length of the frame (8
# bytes, little-endian), then system calls of 64 bytes each (number, six arguments, the least result that is good, below
# which it ends with 125), up to a negative number, then what these point to. It does them, and goes on to the next frame.
# So all that a run needs is written here, in Python: its folders and files, and at last the execve of its program, with the
# arguments and environment that the engine would have given it. What follows on standard input is the program's. When
# lightrun goes away, the input ends, and so does the shim.
#
# Which container a run was given is recorded when all but the last frame is sent; so a run without that record has not begun,
# and starts cold. One with it has begun if its container has printed anything: the shim says HANDED_OUT just before the execve,
# and nothing when it gives up.

SHIM = "/.lightrun"  # where it lies in a container, until it is handed out
NO_SHIM = "lightrun has no shim for the architecture of this engine"
SHIM_BASE, SHIM_ROOM = 0x20000000, 4 * MIB  # where it puts a frame, and the room there
SHIM_PIECE = MIB  # of a file, in one call
SHIM_GAVE_UP = 125  # its exit code
AT_FDCWD, AT_SYMLINK_NOFOLLOW, EEXIST = -100, 0x100, 17
ANY_RESULT = -(1 << 63)
HANDED_OUT = b"\0\n"  # the shim prints this before the program: all was done up to there. Engines keep their copies by lines
PIPE_BYTES = 64 * KIB  # of stdin, that a pipe holds which nobody reads from yet


@dataclasses.dataclass(frozen=True)
class Machine:
    """The shim for an architecture: its number in ELF, its code (GNU as makes it of the source; a test does), and the numbers
    of the system calls."""

    elf: int
    source: str
    code: str
    calls: dict[str, int]


_CALLS = (
    "read", "write", "close", "openat", "mkdirat", "unlinkat", "symlinkat", "linkat", "fchmodat", "utimensat", "dup3", "pipe2",
    "fcntl", "chdir", "umask", "execve", "exit_group", "readlinkat", "kill",
)  # fmt: skip
MACHINES = {
    "x86_64": Machine(
        62,
        """
        .intel_syntax noprefix
        mov     r12d, 0x20000000        # where frames are put
frame:  mov     rsi, rsp                # a length is put over argc, which nobody needs
        mov     edx, 8                  # it has 8 bytes
        call    take                    # read it
        mov     rsi, r12                # a frame is put in its place
        mov     rdx, [rsp]              # it has as many bytes as the length says
        call    take                    # read it
        mov     rbx, r12                # the first of its system calls
again:  mov     rax, [rbx]              # the number of the call
        test    rax, rax                # is it negative?
        js      frame                   # then there are no more in this frame
        mov     rdi, [rbx+8]            # the first of six arguments
        mov     rsi, [rbx+16]           # the second
        mov     rdx, [rbx+24]           # the third
        mov     r10, [rbx+32]           # the fourth
        mov     r8, [rbx+40]            # the fifth
        mov     r9, [rbx+48]            # the sixth
        syscall                         # do it
        cmp     rax, [rbx+56]           # is that less than it may return?
        jl      fail                    # then give up
        add     rbx, 64                 # the next call
        jmp     again                   # of this frame
more:   xor     edi, edi                # from descriptor 0
        xor     eax, eax                # read, whose number is 0
        syscall                         # into rsi, as many as rdx
        test    rax, rax                # how many were they?
        jle     fail                    # none, or an error: whoever wrote has gone
        add     rsi, rax                # the rest goes behind them
        sub     rdx, rax                # and is so much less
take:   test    rdx, rdx                # from here: read rdx bytes to rsi; are any left?
        jnz     more                    # then read on
        ret                             # all are there
fail:   mov     edi, 125                # with this exit code
        mov     eax, 231                # exit_group
        syscall                         # end
        """,
        "41bc000000204889e6ba08000000e84e0000004c89e6488b1424e8420000004c89e3488b034885c078dc488b7b08488b7310488b53184c"
        "8b53204c8b43284c8b4b300f05483b43387c1d4883c340ebd231ff31c00f054885c07e0c4801c64829c24885d275eac3bf7d000000b8e7"
        "0000000f05",
        dict(zip(_CALLS, (0, 1, 3, 257, 258, 263, 266, 265, 268, 280, 292, 293, 72, 80, 95, 59, 231, 267, 62), strict=True)),
    ),
    "aarch64": Machine(
        183,
        """
        mov     x20, #0x20000000        // where frames are put
frame:  mov     x1, sp                  // a length is put over argc, which nobody needs
        mov     x2, #8                  // it has 8 bytes
        bl      take                    // read it
        mov     x1, x20                 // a frame is put in its place
        ldr     x2, [sp]                // it has as many bytes as the length says
        bl      take                    // read it
        mov     x19, x20                // the first of its system calls
again:  ldr     x8, [x19]               // the number of the call
        tbnz    x8, #63, frame          // a negative one: there are no more in this frame
        ldp     x0, x1, [x19, #8]       // the first two of six arguments
        ldp     x2, x3, [x19, #24]      // two more
        ldp     x4, x5, [x19, #40]      // the last two
        svc     #0                      // do it
        ldr     x9, [x19, #56]          // the least that it may return
        cmp     x0, x9                  // is it less?
        b.lt    fail                    // then give up
        add     x19, x19, #64           // the next call
        b       again                   // of this frame
more:   mov     x0, #0                  // from descriptor 0
        mov     x8, #63                 // read
        svc     #0                      // into x1, as many as x2
        cmp     x0, #0                  // how many were they?
        b.le    fail                    // none, or an error: whoever wrote has gone
        add     x1, x1, x0              // the rest goes behind them
        sub     x2, x2, x0              // and is so much less
take:   cbnz    x2, more                // from here: read x2 bytes to x1, as long as any are left
        ret                             // all are there
fail:   mov     x0, #125                // with this exit code
        mov     x8, #94                 // exit_group
        svc     #0                      // end
        """,
        "1400a4d2e1030091020180d217000094e10314aae20340f914000094f30314aa680240f908ffffb7608640a9628e41a9649642a9010000"
        "d4691e40f91f0009eb8b01005473020191f6ffff17000080d2e80780d2010000d41f0000f1ad0000542100008b420000cb22ffffb5c003"
        "5fd6a00f80d2c80b80d2010000d4",
        dict(zip(_CALLS, (63, 64, 57, 56, 34, 35, 36, 37, 53, 88, 24, 59, 25, 49, 166, 221, 94, 78, 129), strict=True)),
    ),
}


def shim(machine: Machine) -> bytes:
    """The shim as an executable: its code, and room for a frame. Source: elf(5)."""
    load, begin = 0x400000, 64 + 2 * 56
    code = bytes.fromhex(machine.code)
    size = begin + len(code)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine.elf, 1, load + begin, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    text = struct.pack("<IIQQQQQQ", 1, 5, 0, load, load, size, size, 1 << 16)
    room = struct.pack("<IIQQQQQQ", 1, 6, 0, SHIM_BASE, SHIM_BASE, 0, SHIM_ROOM, 1 << 16)
    return head + text + room + code


def shim_frame(machine: Machine, calls: Iterable[tuple[Any, ...]]) -> bytes:
    """Calls as (name, least good result, arguments …) in one frame; an argument is a number, bytes, or a list of bytes, which
    stands for an array of pointers with a NULL at its end. Raises ValueError when that is too much."""
    calls, data = list(calls), bytearray()
    known: dict[int, int] = {}  # where what is named again lies, by its identity

    def placed(value: Any) -> int:
        if isinstance(value, int):
            return value % (1 << 64)
        if id(value) not in known:
            packed = struct.pack(f"<{len(value) + 1}Q", *map(placed, value), 0) if isinstance(value, list) else value
            data.extend(bytes(-len(data) % 8))
            known[id(value)] = SHIM_BASE + 64 * (len(calls) + 1) + len(data)
            data.extend(packed)
        return known[id(value)]

    packed = [
        struct.pack("<q6Qq", machine.calls[name], *map(placed, (*arguments, *[0] * (6 - len(arguments)))), least)
        for name, least, *arguments in calls
    ]
    frame = b"".join([*packed, struct.pack("<q", -1), bytes(56), data])
    if len(frame) > SHIM_ROOM:
        raise ValueError("more than a warm container takes at once")
    return struct.pack("<Q", len(frame)) + frame


# What a run that only waits is given on stdin in a warm container: the shim, as its program, calls ppoll(2) without an end. That
# is 73 on aarch64; on x86-64, where 73 is flock(2) and fails, 271.
WAIT_FRAME = shim_frame(
    dataclasses.replace(MACHINES["x86_64"], calls={"aarch64": 73, "x86_64": 271}),
    [("aarch64", ANY_RESULT, 0, 0, 0, 0), ("x86_64", ANY_RESULT, 0, 0, 0, 0)],
)


def shim_entry(machine: Machine) -> Entry:
    """The shim in its place."""
    program = shim(machine)
    return Entry(SHIM[1:], content=program, size=len(program))


def put_shim(engine: Engine, container: str, needed: bool) -> None:
    """Put the shim into a container that has not been started. Raises RunEnds, EngineError."""
    if (machine := engine.machine()) is None:
        if needed:
            raise RunEnds("start_failed", f"{NO_SHIM}: a run with idle needs an entrypoint")
        return
    engine.put(container, put_tar([shim_entry(machine)], (0, 0), lambda _: iter([shim(machine)]), time.time()))


def _c(text: str) -> bytes:
    return text.encode(errors="surrogateescape") + b"\0"


def hand_out_frames(
    machine: Machine, planned: Iterable[Entry], pieces: Callable[[Content], Iterator[bytes]], workdir: str, stdin: Content | None,
    argv: Sequence[str], environment: list[str], stays: bool,
) -> Iterator[bytes]:  # fmt: skip
    """What makes the shim this run's program: what a Layout has planned, and what the engine's init would do, with
    execvp(3). A program that cannot be run is left to that init, which says so. `stays`: its file is needed again. Raises
    ValueError."""
    calls: list[tuple[Any, ...]] = [("umask", 0, 0)]
    size, folders = 0, list[Entry]()
    for entry in planned:
        path = _c(f"/{entry.path}")
        if entry.kind == tarfile.DIRTYPE:
            calls.append(("mkdirat", -EEXIST, AT_FDCWD, path, entry.mode | 0o700))
            folders.append(entry)
            continue
        calls.append(("unlinkat", ANY_RESULT, AT_FDCWD, path, 0))
        if entry.kind == tarfile.SYMTYPE:
            calls.append(("symlinkat", 0, _c(entry.target), AT_FDCWD, path))
        elif entry.kind == tarfile.LNKTYPE:
            calls.append(("linkat", 0, AT_FDCWD, _c(f"/{entry.target}"), AT_FDCWD, path, 0))
        else:
            calls.append(("openat", 3, AT_FDCWD, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, entry.mode))
            for piece in pieces(entry.content):
                for start in range(0, len(piece), SHIM_PIECE):
                    part = piece[start : start + SHIM_PIECE]
                    calls.append(("write", len(part), 3, part, len(part)))
                    size += len(part)
                    if size > SHIM_PIECE:
                        yield shim_frame(machine, calls)
                        calls, size = [], 0
            calls.append(("close", 0, 3))
        calls += _dated(entry)
        if len(calls) > 1000:
            yield shim_frame(machine, calls)
            calls, size = [], 0
    for entry in reversed(folders):  # when nothing more is put into them
        if entry.mode & 0o700 != 0o700 or entry.path == workdir[1:]:  # which may have been there
            calls.append(("fchmodat", 0, AT_FDCWD, _c(f"/{entry.path}"), entry.mode))
        calls += _dated(entry)
    calls += [("umask", 0, 0o022), ("chdir", 0, _c(workdir))]
    if stdin is None:
        calls += [("openat", 3, AT_FDCWD, _c(os.devnull), os.O_RDONLY), ("dup3", 0, 3, 0, 0), ("close", 0, 3)]
    elif isinstance(stdin, bytes) and is_fed_before(stdin):  # into a pipe, read from by 3: it holds all, or the shim gives up
        calls += [("pipe2", 0, bytes(8), os.O_NONBLOCK), ("write", len(stdin), 4, stdin, len(stdin))]
        calls += [("close", 0, 4), ("fcntl", 0, 3, fcntl.F_SETFL, 0), ("dup3", 0, 3, 0, 0), ("close", 0, 3)]
    calls += [] if stays else [("unlinkat", ANY_RESULT, AT_FDCWD, _c(SHIM), 0)]
    calls.append(("write", len(HANDED_OUT), 1, HANDED_OUT, len(HANDED_OUT)))
    arguments, variables = list(map(_c, argv)), list(map(_c, environment))
    search = next((variable[5:] for variable in environment if variable.startswith("PATH=")), DEFAULT_PATH)
    places = [argv[0]] if "/" in argv[0] else [f"{folder or '.'}/{argv[0]}" for folder in search.split(":")]
    init = "/sbin/docker-init"
    calls += [("execve", ANY_RESULT, _c(place), arguments, variables) for place in places]
    calls.append(("execve", ANY_RESULT, _c(init), [_c(init), _c("-s"), _c("--"), *arguments], variables))
    calls.append(("exit_group", 0, 126))
    yield shim_frame(machine, calls)


def _dated(entry: Entry) -> list[tuple[Any, ...]]:
    """The call that gives an entry its time."""
    if entry.modified is None:
        return []
    times = struct.pack("<4q", *2 * (int(entry.modified), 0))
    return [("utimensat", 0, AT_FDCWD, _c(f"/{entry.path}"), times, AT_SYMLINK_NOFOLLOW)]


def is_fed_before(stdin: Content | None) -> bool:
    """Whether a run's stdin is all there when a warm container becomes its program. What is longer is written to that."""
    return stdin is None or (isinstance(stdin, bytes) and len(stdin) <= PIPE_BYTES)


def container_environment(image: Image, hostname: str, given: Mapping[str, str], env: Mapping[str, str]) -> list[str]:
    """The environment of a container's program, in its order: what the engine sets, what the request and then the image say,
    and the home that the runtime adds when there is none; that, and what an engine of another kind sets, are `given`. Sources:
    moby, CreateDaemonEnvironment; runc, setupUser."""
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname} | {name: given[name] for name in given if name != "HOME"}
    merged |= env
    merged |= {name: value for name, _, value in (each.partition("=") for each in image.env) if name not in env}
    if not merged.get("HOME"):
        merged["HOME"] = given["HOME"]
    return [f"{name}={value}" for name, value in merged.items()]


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of a container whose image has none


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """What `--warm` asks for, and the request that its containers are made of."""

    image: str  # written out
    count: int
    request: RunRequest


@dataclasses.dataclass(frozen=True)
class HandOut:
    """What is recorded of a hand-out before its last frame is sent: to which warm container, and when by the engine's clock."""

    warm: str
    at: float


@dataclasses.dataclass(eq=False)
class Warm:
    """A warm container. `started`: when its start was sent and answered (monotonic), and when it was by the engine's clock;
    `clock`: our clock at the monotonic zero. The copy is asked for before the run, since an engine makes whoever asks wait when
    a container has exited, until its network is gone."""

    id: str
    container: str
    pool: Pool
    image: Image
    given: Mapping[str, str]
    slot: Slot | None
    output: Reply
    copy: Reply | None  # the engine's copy of it, from its beginning
    started: tuple[float, float, float]
    clock: float = dataclasses.field(default_factory=lambda: time.time() - time.monotonic())

    @property
    def alive(self) -> bool:
        """Whether nothing has come of it, for a shim that waits prints nothing, and no clock was moved meanwhile."""
        try:
            return not self.output.wire.ready(-1, 0) and abs(time.time() - time.monotonic() - self.clock) < 1
        except OSError:
            return False

    def close(self) -> None:
        """Let go of its streams; that ends it."""
        for stream in filter(None, (self.output, self.copy)):
            stream.close()


class Deaths:
    """What the engine's events tell of the ends of containers that somebody expects. It need not come: then the container is
    looked at, and an engine answers no question about one that has exited until its network is gone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()  # guards _told
        self._told: dict[str, tuple[int, float] | None] = {}  # exit code, and when by the engine's clock

    def start(self) -> None:
        """Begin to listen."""
        threading.Thread(target=self._listen, name="deaths", daemon=True).start()

    def expect(self, container: str) -> None:
        """Somebody will ask for the end of this container, by its name."""
        with self._lock:
            self._told[container] = None

    def forget(self, container: str) -> None:
        """Nobody asks any more."""
        with self._lock:
            self._told.pop(container, None)

    def of(self, container: str) -> tuple[int, float] | None:
        """Exit code and time of an end that was told."""
        with self._lock:
            return self._told.get(container)

    def _listen(self) -> None:
        while True:
            began = time.monotonic()
            with contextlib.suppress(EngineError):
                for container, exit_code, at in self._engine.deaths():
                    with self._lock:
                        if container in self._told:
                            self._told[container] = exit_code, at
            if time.monotonic() < began + RETRY_SECONDS:  # else it was the silence that was too long
                time.sleep(RETRY_SECONDS)


MISSES = ("image", "network", "limits", "user", "command", "environment", "stdin", "empty", "failed")


class Pools:
    """The warm containers, filled by a thread of their own, one at a time, when runs leave it time. `counts` has how many
    runs got one (`hit`), and how many did not, by what was in the way (MISSES)."""

    def __init__(
        self, settings: Settings, engine: Engine, layout: Layout, slots: Slots, is_busy: Callable[[], bool],
        tidy_up: Callable[[], None],
    ) -> None:  # fmt: skip
        self._settings, self._engine, self._layout, self._slots = settings, engine, layout, slots
        self._is_busy, self._tidy_up = is_busy, tidy_up
        self._roomy: set[str] = set()  # ids of images for whose user the usual workdir was made
        self._pools = [self._pool(*parse_warm(text)) for text in settings.warm]
        self._machine: Machine | None = None  # the engine's
        self._lock = threading.Lock()  # guards all below
        self._ready: list[Warm] = []
        self._ids: set[str] = set()  # of all that are being made, wait, or were handed out
        self.counts: collections.Counter[str] = collections.Counter()
        self._images: dict[str, str] = {}  # today's id of each pool's
        self._given: dict[str, dict[str, str] | None] = {}  # variables, by image; None where it is no environment that we know
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="warm", daemon=True)

    def _pool(self, image: str, count: int, network: str | None) -> Pool:
        body = {"image": image, "entrypoint": [SHIM], "stdin": "", **({"network": network} if network else {})}
        try:
            request = RunRequest.parse(to_json(body), self._settings)
        except LightrunError as error:
            raise UsageError(f"--warm {image}: {error.more.get('details', error)}") from error
        return Pool(request.reference, count, dataclasses.replace(request, workdir=None))

    def start(self) -> None:
        """Begin to fill."""
        self._thread.start()

    def knows(self, warm_id: str) -> bool:
        """Whether this is not a run's id but a warm container's, and that is not to be removed."""
        with self._lock:
            return warm_id in self._ids

    def adopt(self, warm_id: str) -> None:
        """Know a warm container that an earlier daemon handed out."""
        with self._lock:
            self._ids.add(warm_id)

    def take(self, image: Image, request: RunRequest, lasting: bool) -> Warm | None:
        """A warm container that is just what the run would have made, for it alone; None when there is none. `lasting`: the run
        survives lightrun."""
        misfits = {pool: self._misfit(pool, image, request, lasting) for pool in self._pools}
        while misfits:
            with self._lock:
                found = next((warm for warm in self._ready if warm.image.id == image.id and not misfits[warm.pool]), None)
                self._news.set()
                if found is None:
                    self.counts[max((why or "empty" for why in misfits.values()), key=MISSES.index)] += 1
                    return None
                self._ready.remove(found)
            if found.alive:
                return found
            self.discard(found)
        return None

    def _misfit(self, pool: Pool, image: Image, request: RunRequest, lasting: bool) -> str:
        """What keeps a run from a pool, the first of MISSES; "" for nothing."""
        ours = pool.request
        roomy = image.root or (image.id in self._roomy and request.workdir == DEFAULT_WORKDIR and not request.setup)
        misses = {
            "image": pool.image != request.reference and self._images.get(pool.image) != image.id,
            "network": ours.network != request.network,
            "limits": any(getattr(ours, name) != getattr(request, name) for name in ("memory", "cpus", "pids", "file_size")),
            "user": not roomy,  # its files and folders cannot be made
            "command": not (request.command or image.command),
            "environment": request.env.get("HOME") == "" and image.has("HOME"),
            "stdin": lasting and not is_fed_before(request.stdin),
        }
        return next((miss for miss, holds in misses.items() if holds), "")

    def count(self, what: str) -> None:
        """Note what became of a run that was given a warm container."""
        with self._lock:
            self.counts[what] += 1

    def hand_out(
        self, warm: Warm, request: RunRequest, planned: Iterable[Entry], pieces: Callable[[Content], Iterator[bytes]],
        record: Callable[[], None],
    ) -> bool:  # fmt: skip
        """Send a run to a warm container, with what a Layout has planned, and `record` that before the last frame; false when
        it did not get all of that, so that no program has begun."""
        assert self._machine
        environment = container_environment(warm.image, warm.container[:12], warm.given, request.env)
        argv, last = request.command or warm.image.command, b""
        try:
            for frame in hand_out_frames(
                self._machine, planned, pieces, request.workdir or "/", WAIT_FRAME if request.waits else request.stdin, argv,
                environment, request.idle is not None,
            ):  # fmt: skip
                warm.output.wire.send(last)
                last = frame
            record()
            warm.output.wire.send(last)
        except (OSError, ValueError) as error:
            log.warning("a warm container cannot be used: %s", error)
            return False
        return True

    def waiting(self) -> int:
        """How many containers wait."""
        with self._lock:
            return len(self._ready)

    def discard(self, warm: Warm) -> None:
        """Let go of a warm container. What cannot be removed is left to the keeper."""
        warm.close()
        self._drop(warm.id, warm.slot)

    def _drop(self, warm_id: str, slot: Slot | None) -> None:
        self.forget(warm_id)
        if not self._slots.vacate(slot, container_name(warm_id)):
            self._tidy_up()

    def forget(self, warm_id: str) -> None:
        """It is gone, or the keeper may remove it."""
        with self._lock:
            self._ids.discard(warm_id)

    def stop(self, deadline: float) -> None:
        """Remove them all, or as many as there is time for (monotonic); the others end by themselves."""
        with self._lock:
            left, self._ready = self._ready, []
            self._ending.set()
        self._news.set()
        for warm in left:
            if time.monotonic() < deadline:
                self.discard(warm)
            else:
                warm.close()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))  # which has one in the making, perhaps

    def _keep(self) -> None:
        pauses, due = dict.fromkeys(self._pools, RETRY_SECONDS), dict.fromkeys(self._pools, 0.0)
        while not self._ending.is_set():
            for pool in self._pools:
                if time.monotonic() >= due[pool]:
                    well = self._tend(pool)
                    pauses[pool] = RETRY_SECONDS if well else min(2 * pauses[pool], MAX_SWEEP_SECONDS)
                    due[pool] = 0.0 if well else time.monotonic() + pauses[pool]
            self._news.wait(max(0.0, min([LOOK_SECONDS, *(at - time.monotonic() for at in due.values() if at)])))
            self._news.clear()
            self._ending.wait(REFILL_SECONDS)

    def _tend(self, pool: Pool) -> bool:
        """Bring a pool to its number, of today's image; whether that can be done."""
        try:
            self._machine = self._engine.machine()
            if self._machine is None:
                log.warning("--warm: runs start cold: %s", NO_SHIM)
                self._ending.set()
                return True
            self._refill(pool, self._image(pool.image))
        except (EngineError, OSError) as error:
            log.warning("no warm container of %s: %s", pool.image, error)
            return False
        except Exception:
            log.exception("warm")
            return False
        return True

    def _refill(self, pool: Pool, image: Image) -> None:
        with self._lock:
            self._images[pool.image] = image.id
            stale = [warm for warm in self._ready if warm.pool is pool and (warm.image.id != image.id or not warm.alive)]
            self._ready = [warm for warm in self._ready if warm not in stale]
        for warm in stale:
            self.discard(warm)
        given = self._variables(pool, image)
        while given is not None and not self._ending.is_set():
            with self._lock:
                if sum(warm.pool is pool for warm in self._ready) >= pool.count:
                    return
            if self._is_busy():
                time.sleep(DISCONNECT_POLL_SECONDS)
                continue
            warm = self._make(pool, image, given)
            with self._lock:
                if not self._ending.is_set():
                    self._ready.append(warm)
                    continue
            self.discard(warm)

    def _image(self, reference: str) -> Image:
        try:
            return self._engine.image(reference)
        except EngineMissing:
            if self._settings.pull == "never" or is_image_id(reference):
                raise
            for _ in self._engine.pull(reference, self._settings.pull_timeout):
                pass
            return self._engine.image(reference)

    def _variables(self, pool: Pool, image: Image) -> dict[str, str] | None:
        """What the runtime and the engine give to an image's user, HOME above all, told by a shim that never becomes another
        program; None when its environment is another one than we would give to a run."""
        if image.id not in self._given:
            assert self._machine
            probe, told = self._make(pool, image, {}), b""
            try:
                room = SHIM_BASE + SHIM_ROOM // 2
                calls = [("openat", 3, AT_FDCWD, b"/proc/self/environ\0", 0), ("read", 1, 3, room, 64 * KIB - 1)]
                probe.output.wire.send(shim_frame(self._machine, [*calls, ("write", 64 * KIB, 1, room, 64 * KIB)]))
                reader = FrameReader()
                while len(told) < 64 * KIB and (data := probe.output.next(seconds=ENGINE_SECONDS)):
                    told += b"".join(bytes(payload) for _, payload in reader.feed(data))
                if len(told) < 64 * KIB:
                    raise EngineAbsent("a shim does not tell its environment")
            finally:
                self.discard(probe)
            has = [each.decode("utf-8", "surrogateescape") for each in told.partition(b"\0\0")[0].split(b"\0")]
            found = {name: value for name, _, value in (each.partition("=") for each in has)}
            given = {name: found[name] for name in found if name not in {"PATH", "HOSTNAME"} and not image.has(name)}
            given["HOME"] = found.get("HOME", "")
            ours, ordered = container_environment(image, probe.container[:12], given, {}), self._engine.traits.orders_environment
            same = ours == has if ordered else sorted(ours) == sorted(has)
            self._given[image.id] = given if same else None
            if not same:
                log.warning("--warm %s: runs start cold: its environment is not one that lightrun knows how to give", pool.image)
        return self._given[image.id]

    def _make(self, pool: Pool, image: Image, given: Mapping[str, str]) -> Warm:
        """create, put, attach, start: a container whose program is the shim."""
        machine = self._machine
        assert machine
        run_id, slot, opened = str(uuid.uuid4()), self._slots.take(), contextlib.ExitStack()
        with self._lock:
            self._ids.add(run_id)
        try:
            container = self._engine.create(run_id, image, pool.request, slot.parent if slot else "")
            placed = [shim_entry(machine)]
            stands = self._layout.standing(self._engine, container, image, DEFAULT_WORKDIR)
            if not image.root and stands is Standing.NOTHING:
                placed.append(Entry(DEFAULT_WORKDIR[1:], tarfile.DIRTYPE))
                self._roomy.add(image.id)
            owner = self._layout.owner(self._engine, container, image)
            self._engine.put(container, put_tar(placed, owner, lambda _: iter([shim(machine)]), time.time()))
            output = opened.enter_context(contextlib.closing(self._engine.attach(container, stdin=1)))
            if slot:
                slot.begin()
            sent = time.monotonic()
            self._engine.start(container)
            answered, state = time.monotonic(), self._engine.inspect(container)
            if not state.running or state.started is None:
                raise EngineError("a warm container has ended before it was used")
            copy = None
            if self._engine.traits.answers_early:
                copy = opened.enter_context(contextlib.closing(self._engine.kept_output(container, follow=True)))
            opened.pop_all()
            return Warm(run_id, container, pool, image, given, slot, output, copy, (sent, answered, state.started))
        except BaseException:
            opened.close()
            self._drop(run_id, slot)
            raise


# --------------------------------------------------------------------------------------------------------------------
# Callbacks
# --------------------------------------------------------------------------------------------------------------------


def signature(secret: str, body: bytes) -> str:
    """The value of X-Light-Run-Signature: `sha256=` and the hex HMAC-SHA256 of the raw body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def webhook_headers(secret: str, run_id: str, body: bytes, now: float) -> dict[str, str]:
    """The headers of the Standard Webhooks specification, for a secret of the form `whsec_<base64>`."""
    content = f"{run_id}.{int(now)}.".encode() + body
    digest = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), content, hashlib.sha256).digest()
    return {
        "webhook-id": run_id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


class CallbackError(Exception):
    """An attempt that was not answered with 2xx, in words for `lastError`; `retry` when another one may succeed, not
    before `after` seconds."""

    def __init__(self, message: str, retry: bool, after: float = 0) -> None:
        super().__init__(message)
        self.retry, self.after = retry, after


def deliver(url: str, body: bytes, headers: Mapping[str, str], allow: tuple[str, ...]) -> None:
    """POST once. Redirects and the environment's proxies are not followed, the answer's body is not read. Raises
    CallbackError."""
    parts = urllib.parse.urlsplit(url)
    tls, host = parts.scheme == "https", parts.hostname or ""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        with contextlib.closing(Wire(_connect(host, parts.port or (443 if tls else 80), allow), CALLBACK_SECONDS)) as wire:
            wire.limit()
            if tls:
                wire.secure(ssl.create_default_context(), host)
            response = exchange(wire, "POST", target, {"Host": parts.netloc, **headers}, body)
    except (OSError, http.client.HTTPException, *NOT_UNDERSTOOD) as error:
        raise CallbackError(f"no answer ({type(error).__name__})", retry=True) from error
    if not 200 <= response.status < 300:
        retry = response.status in {408, 425, 429} or response.status >= 500
        now = http_date(response.headers.get("Date", "")) or time.time()  # by its own clock, if it shows that
        raise CallbackError(f"answered {response.status}", retry, retry_after(response.headers.get("Retry-After", ""), now))


def _connect(host: str, port: int, allow: tuple[str, ...]) -> socket.socket:
    """A connection whose address was judged after its name was resolved, so that no name leads to a metadata service."""
    if not callback_host_allowed(host, allow):
        raise CallbackError("the host is not one that --callback-allow names", retry=False)
    sock = socket.create_connection((host, port), CALLBACK_SECONDS)
    address = sock.getpeername()[0]
    if is_link_local(address) and not callback_host_allowed(address, allow):
        sock.close()
        raise CallbackError("the host's address is link-local", retry=False)
    return sock


def http_date(text: str) -> float | None:
    """Unix seconds of a date in a header (RFC 9110, 5.6.7), None for what is no date."""
    import bottle

    return bottle.parse_date(text)  # type: ignore[no-any-return]


def retry_after(header: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, bounded; 0 for none (RFC 9110, 10.2.3)."""
    seconds = float(header) if re.fullmatch(r"\d{1,9}", header, re.ASCII) else (http_date(header) or 0) - now
    return min(max(seconds, 0), MAX_RETRY_AFTER_SECONDS)


@dataclasses.dataclass(eq=False)
class Receiver:
    """Who is called back at one host and port. Nothing but what is owed to it refers to it, so it goes with the last."""

    busy: int = 0  # attempts
    failing: bool = False  # the last attempt failed
    parked: collections.deque[Delivery] = dataclasses.field(default_factory=collections.deque)  # due, and no room for it

    def room(self) -> int:
        """How many more attempts it may have at a time."""
        return (1 if self.failing else MAX_DELIVERIES_EACH) - self.busy


@dataclasses.dataclass(order=True)
class Delivery:
    """A callback that is owed, in the order in which they fall due by the monotonic clock."""

    due: float
    run_id: str
    attempts: int = dataclasses.field(compare=False)
    receiver: Receiver | None = dataclasses.field(default=None, compare=False)  # known when it first fell due


class Callbacks:
    """The outbox: every finished run that asked for it is told, in attempts that outlive the daemon. A receiver that is
    slow or dead fills only its own few places."""

    def __init__(self, store: Store, allow: tuple[str, ...]) -> None:
        self._store, self._allow = store, allow
        self._changed = threading.Condition()  # guards all below
        self._due: list[Delivery] = []  # a heap of all that are neither parked nor attempted now
        self._busy = 0  # attempts
        self.counts = dict.fromkeys(("delivered", "retried", "failed"), 0)  # attempts by outcome
        self._receivers: weakref.WeakValueDictionary[str, Receiver] = weakref.WeakValueDictionary()
        longest = max(CALLBACK_DELAYS[-1] * CALLBACK_JITTER, MAX_RETRY_AFTER_SECONDS)
        for run_id, due, head in store.owed():  # `due` is of a clock that may have been set since
            self.owe(run_id, min(due - time.time(), longest), json.loads(head)["callback"]["attempts"])
        threading.Thread(target=self._dispatch, name="callbacks", daemon=True).start()

    @staticmethod
    def packed(request: RunRequest, body: bytes) -> bytes:
        """What the store keeps for a callback."""
        return to_json({"url": request.callback_url, "secret": request.callback_secret}) + b"\n" + body

    def owe(self, run_id: str, delay: float = 0, attempts: int = 0) -> None:
        """Deliver what the store keeps for this run, in `delay` seconds."""
        with self._changed:
            self._put(Delivery(0, run_id, attempts), delay)

    def send_again(self, run_id: str) -> None:
        """Deliver a callback that has failed once more, in a new series of attempts. Raises Conflict where none has."""
        try:
            kept = self._store.callback(run_id)
        except OSError as error:
            raise Unavailable("storage_unavailable", f"the state dir cannot be read: {error.strerror}", 5) from error
        if kept is None:
            raise Conflict("the run has no callback that is kept, or it was delivered", "no_callback")
        if self._store.owe_again(run_id):
            self.owe(run_id)

    def _put(self, delivery: Delivery, delay: float) -> None:
        """Under the lock."""
        delivery.due = time.monotonic() + delay
        heapq.heappush(self._due, delivery)
        self._changed.notify()

    def _dispatch(self) -> None:
        while True:
            with self._changed:
                while self._busy >= MAX_DELIVERIES or not self._due or self._due[0].due > time.monotonic():
                    idle = self._busy >= MAX_DELIVERIES or not self._due
                    self._changed.wait(None if idle else self._due[0].due - time.monotonic())
                delivery = heapq.heappop(self._due)
            try:
                self._send(delivery)
            except Exception:  # no descriptor or no thread to be had, say
                log.exception("callback of run %s", delivery.run_id)
                with self._changed:
                    self._put(delivery, RETRY_SECONDS)
                    self._unpark(delivery.receiver)

    def _send(self, delivery: Delivery) -> None:
        """Attempt a delivery, or park it behind others to the same receiver."""
        packed = self._store.callback(delivery.run_id)
        with self._changed:
            if packed and delivery.receiver is None:
                name = urllib.parse.urlsplit(json.loads(packed.partition(b"\n")[0])["url"]).netloc.lower()
                delivery.receiver = self._receivers.setdefault(name, Receiver())
            receiver = delivery.receiver
            if packed is None or receiver is None:  # deleted meanwhile
                self._unpark(receiver)
            elif receiver.room() <= 0:
                receiver.parked.append(delivery)
            else:
                arguments = (delivery, receiver, packed)
                threading.Thread(target=self._attempt, args=arguments, name="callback", daemon=True).start()
                self._busy, receiver.busy = self._busy + 1, receiver.busy + 1

    def _unpark(self, receiver: Receiver | None) -> None:
        """Under the lock: let as many deliveries to a receiver come up again as there is room for."""
        if receiver:
            for _ in range(min(receiver.room(), len(receiver.parked))):
                heapq.heappush(self._due, receiver.parked.popleft())
        self._changed.notify()

    def _attempt(self, delivery: Delivery, receiver: Receiver, packed: bytes) -> None:
        """One attempt, on a thread of its own, and what comes of it."""
        delivery.attempts += 1
        outcome: dict[str, Any] = {}
        delay: float | None = CALLBACK_DELAYS[-1]  # after what nobody thought of
        try:
            outcome, delay = self._outcome(delivery, packed)
            with self._changed:
                self.counts["retried" if delay is not None else outcome["status"]] += 1
            self._record(delivery.run_id, outcome, delay)
        finally:
            with self._changed:
                self._busy, receiver.busy = self._busy - 1, receiver.busy - 1
                receiver.failing = outcome.get("status") != "delivered"
                if delay is not None:
                    self._put(delivery, delay)
                self._unpark(receiver)

    def _outcome(self, delivery: Delivery, packed: bytes) -> tuple[dict[str, Any], float | None]:
        """The callback as the state shows it after an attempt, and seconds until the next one, if there is one."""
        head, _, body = packed.partition(b"\n")
        about, run_id = json.loads(head), delivery.run_id
        headers = {"X-Light-Run-Id": run_id, "X-Light-Run-Attempt": str(delivery.attempts)}
        if secret := about["secret"]:
            headers["X-Light-Run-Signature"] = signature(secret, body)
            headers |= webhook_headers(secret, run_id, body, time.time()) if secret.startswith("whsec_") else {}
        try:
            deliver(about["url"], body, headers, self._allow)
        except CallbackError as error:
            log.warning("callback of run %s, attempt %d: %s", delivery.run_id, delivery.attempts, error)
            delay = None
            if error.retry and delivery.attempts <= len(CALLBACK_DELAYS):
                delay = max(CALLBACK_DELAYS[delivery.attempts - 1] * random.uniform(1, CALLBACK_JITTER), error.after)
            status = "failed" if delay is None else "pending"
            return {"status": status, "attempts": delivery.attempts, "lastError": str(error)}, delay
        return {"status": "delivered", "attempts": delivery.attempts}, None

    def _record(self, run_id: str, outcome: dict[str, Any], delay: float | None) -> None:
        """Put the outcome of an attempt on disk, however long that takes: else it would be made again, and not be known."""
        due = None if delay is None else time.time() + delay
        while True:
            try:
                return self._store.attempted(run_id, outcome, due)
            except LightrunError as error:
                log.error("callback of run %s: %s", run_id, error)
                time.sleep(RETRY_SECONDS)


# --------------------------------------------------------------------------------------------------------------------
# Evictor
# --------------------------------------------------------------------------------------------------------------------


def choose_victims(candidates: Iterable[tuple[str, int]], excess_bytes: int, excess_runs: int) -> Iterator[str]:
    """The oldest runs whose removal brings both excesses to zero. Pure; as lazy as its input."""
    for run_id, size in candidates:
        if excess_bytes <= 0 and excess_runs <= 0:
            return
        excess_bytes, excess_runs = excess_bytes - size, excess_runs - 1
        yield run_id


class Evictor:
    """Removes whole runs, record and folder, but those to whose artifacts an accepted run refers that has not started."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._root = store, settings.artifacts_root()
        self._max_bytes, self._max_runs = settings.max_artifacts_bytes, settings.keep
        self._lock = threading.Lock()  # one eviction at a time, or two would count the same excess
        self._held_lock = threading.Lock()  # guards all below; no record is removed without it
        self._held: collections.Counter[str] = collections.Counter()
        self.evicted = 0  # runs
        self._uploads = 0  # bytes of uploads of runs that have not started
        self._latest, self._pending = "", set[str]()  # of runs that have ended, the last, and those whose own eviction is to come

    def hold(self, request: RunRequest, upload: Upload | None) -> contextlib.ExitStack:
        """Keep the artifacts that a request refers to, and count an upload, until that is closed."""
        held = collections.Counter({each.run_id for each in request.contents() if isinstance(each, Reference)})
        size = upload.size if upload else 0
        with self._held_lock:
            self._held += held
            self._uploads += size
        until = contextlib.ExitStack()
        until.callback(self._let_go, held, size)
        if upload:
            until.callback(upload.close)
        return until

    def _let_go(self, held: collections.Counter[str], size: int) -> None:
        with self._held_lock:
            self._held -= held
            self._uploads -= size

    def ended(self, run_id: str) -> None:
        """A run ends: it stays until another one has, and then until its own eviction."""
        with self._held_lock:
            self._latest = run_id
            self._pending.add(run_id)

    def evict(self, run_id: str = "") -> None:
        """Bring what is kept under the caps, for a run that has ended or for an upload."""
        with self._lock:
            with self._held_lock:
                self._pending.discard(run_id)
                spared = {*self._pending, self._latest if run_id else ""}  # for an upload the last may go as well
            size, count = self._store.usage()
            excess = size + self._uploads - self._max_bytes, count - self._max_runs
            if max(excess) <= 0:
                return
            candidates = (each for each in self._store.removable() if each[0] not in self._held and each[0] not in spared)
            for victim in choose_victims(candidates, *excess):
                with contextlib.suppress(NotFound, Conflict):  # deleted by a client meanwhile, or held
                    self.remove(victim)
                    self.evicted += 1
                    log.info("evicted run %s", victim, extra={"fields": {"run": victim}})

    def remove(self, run_id: str) -> None:
        """Remove a finished run. The record goes first: a folder without one is recognised and removed at the next
        start, a record without its folder would promise artifacts that are not there. Raises NotFound, Conflict."""
        with self._held_lock:
            if run_id in self._held:
                raise Conflict("a run that has not started refers to its artifacts", "in_use")
            self._store.delete(run_id)
        remove_tree(self._root / run_id)


# --------------------------------------------------------------------------------------------------------------------
# Metrics: what an operator counts
# --------------------------------------------------------------------------------------------------------------------

METRICS = {  # name: kind, label, help. No label has values that a client can choose
    "lightrun_build_info": ("gauge", "version", "1, with the version of lightrun."),
    "lightrun_runs": ("gauge", "phase", "Runs in progress by phase."),
    "lightrun_runs_total": ("counter", "reason", "Runs that have ended, by reason."),
    "lightrun_run_phase_seconds": ("histogram", "phase", "Time that runs which have ended spent in each phase."),
    "lightrun_places": ("gauge", "", "Places for runs: containers at a time, and runs that may wait."),
    "lightrun_places_taken": ("gauge", "", "Places that runs have."),
    "lightrun_waiting_places": ("gauge", "", "Places for requests that wait or stream."),
    "lightrun_waiting_places_taken": ("gauge", "", "Places that such requests have."),
    "lightrun_execs_total": ("counter", "reason", "Commands in running runs that have ended, by reason."),
    "lightrun_warm_starts_total": ("counter", "outcome", "Runs by what the pools had for them: hit, or what was in the way."),
    "lightrun_warm_containers": ("gauge", "", "Warm containers that wait."),
    "lightrun_requests_total": ("counter", "route status", "Answers by route and status; 499 is a client that left."),
    "lightrun_callback_attempts_total": ("counter", "outcome", "Attempts at a callback: delivered, retried later, failed."),
    "lightrun_callbacks_owed": ("gauge", "", "Callbacks that are still to be delivered."),
    "lightrun_stored_runs": ("gauge", "", "Finished runs that are kept."),
    "lightrun_stored_bytes": ("gauge", "", "Bytes of artifacts, logs and records that are kept."),
    "lightrun_evictions_total": ("counter", "", "Runs that were removed to stay under the caps."),
    "lightrun_engine_up": ("gauge", "", "Whether the engine answered when it was last asked."),
    "lightrun_engine_errors_total": ("counter", "kind", "Calls to the engine without an answer (absent), or with a 5xx (error)."),
    "process_resident_memory_bytes": ("gauge", "", "Resident memory."),
    "process_open_fds": ("gauge", "", "Open file descriptors."),
    "process_max_fds": ("gauge", "", "File descriptors that may be open."),
    "process_threads": ("gauge", "", "Threads."),
    "process_cpu_seconds_total": ("counter", "", "CPU time, user and system."),
}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200, 3600)  # seconds


class Metrics:
    """Counters and histograms since the start, and the text that Prometheus reads. Source: prometheus.io/docs/instrumenting/
    exposition_formats."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._counts: collections.Counter[tuple[str, tuple[object, ...]]] = collections.Counter()
        self._times: dict[tuple[str, object], list[float]] = {}  # for each bucket how many fell into it, and the sum

    def count(self, name: str, *values: object) -> None:
        """One more, with these values of its labels."""
        with self._lock:
            self._counts[name, values] += 1

    def observe(self, name: str, seconds: float, value: object) -> None:
        """One more that took so long."""
        at = next((number for number, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
        with self._lock:
            times = self._times.setdefault((name, value), [0.0] * (len(BUCKETS) + 2))
            times[at] += 1
            times[-1] += seconds

    def text(self, figures: Mapping[str, Mapping[tuple[object, ...], float]]) -> str:
        """All of them, and figures by name and values of labels."""
        with self._lock:
            counts, times = dict(self._counts), {key: list(times) for key, times in self._times.items()}
        lines = []
        for name, (kind, label, text) in METRICS.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            names = label.split()
            found = {values: number for (known, values), number in counts.items() if known == name} | dict(figures.get(name, {}))
            lines += [f"{name}{_labels(names, values)} {_number(number)}" for values, number in found.items()]
            for (known, value), spent in times.items():
                if known == name:
                    sums = itertools.accumulate(spent[:-1])
                    bounds = (*map(_number, BUCKETS), "+Inf")
                    lines += [f"{name}_bucket{_labels([*names, 'le'], (value, bound))} {_number(total)}"
                              for bound, total in zip(bounds, sums, strict=True)]  # fmt: skip
                    lines.append(f"{name}_sum{_labels(names, (value,))} {_number(spent[-1])}")
                    lines.append(f"{name}_count{_labels(names, (value,))} {_number(sum(spent[:-1]))}")
        return "\n".join(lines) + "\n"


def _labels(names: Sequence[str], values: Sequence[object]) -> str:
    pairs = [f'{name}="{value}"' for name, value in zip(names, values, strict=True)]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def process_figures() -> dict[str, dict[tuple[object, ...], float]]:
    """Of this process, as Linux tells them. Source: proc(5)."""
    used, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    figures: dict[str, float] = {"process_cpu_seconds_total": used.ru_utime + used.ru_stime}
    figures["process_threads"] = threading.active_count()
    figures |= {"process_max_fds": most} if most >= 0 else {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds"] = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return {name: {(): value} for name, value in figures.items()}


# --------------------------------------------------------------------------------------------------------------------
# Job: a run in progress
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ask:
    """What somebody wants of a run: to end, for a reason, by a signal and then, after `grace` seconds, by SIGKILL."""

    reason: str
    signal: str = "SIGKILL"
    grace: float = KILL_SECONDS
    why: str = "the run was ended before its command started"  # said when that is so, or for a reason without a sentence

    @property
    def rank(self) -> int:
        """A limit that was passed overrides a stop, as a later stop does, and a cancel both; nothing overrides a cancel."""
        return {"stopped": 0, "idle": 0, "cpu_limit": 1, "output_limit": 1}.get(self.reason, 2)

    @property
    def drops(self) -> bool:
        """Whether nobody wants what the run leaves."""
        return self.rank == 2

    def prevails(self, other: Ask | None) -> bool:
        """Whether this counts when the other was asked before."""
        return other is None or other.rank == 0 or self.rank > other.rank

    @classmethod
    def parse(cls, text: str | None) -> Ask | None:
        """What the store keeps."""
        return cls(**json.loads(text)) if text else None

    def recorded(self, before: str | None) -> str:
        """What the store is to keep when it has kept that."""
        return to_json(dataclasses.asdict(self)).decode() if before is None or self.prevails(self.parse(before)) else before


class Killing:
    """The signals that a run still has to get: SIGKILL when its time is up, or what is asked of it and then SIGKILL, again
    and again, with growing pauses, until it has exited."""

    def __init__(self) -> None:
        self.at = self._deadline = math.inf  # monotonic
        self.signal, self.reason = "SIGKILL", "timeout"
        self.asked: Ask | None = None  # what this signal was asked for by; None for one that follows
        self.tries = self.failures = 0
        self.unanswered: str | None = None  # a signal of which the engine did not say whether it took it
        self._heeded: Ask | None = None

    def by(self, deadline: float) -> None:
        """The run's time is up then."""
        self._deadline = deadline
        self.at = min(self.at, deadline)

    def due(self, asked: Ask | None) -> bool:
        """Whether a signal is due, by what is asked now."""
        if asked and asked is not self._heeded:
            self.asked = self._heeded = asked
            self.signal, self.reason, self.at = asked.signal, asked.reason, time.monotonic()
            self.tries = self.failures = 0
        return time.monotonic() >= self.at

    def next(self, answered: bool) -> None:
        """The signal was sent, or could not be: what follows, and when."""
        now = time.monotonic()
        self.tries += 1
        if not answered:
            self.failures += 1
            self.unanswered = self.signal
            self.at = now + min(FIRST_LOOK_SECONDS * 2**self.failures, LOOK_SECONDS)
            return
        if self.asked:
            self.at = min(now + self.asked.grace, self._deadline if self._deadline > now else math.inf)
        else:
            self.at = now + min(KILL_SECONDS * 2**self.tries, LOOK_SECONDS)
        self.asked, self.signal, self.failures = None, "SIGKILL", 0


class Hearing(enum.Enum):
    """What we have of a container's output. Each line says what may come after it; Job.hear is the one place where it does.

    Both streams of an end of the attach stream look alike, the container's end and a broken connection. So what follows the
    attach stream is always the engine's copy, from its beginning: the log skips what it has, and a run that was heard whole
    ends when the copy does, with nothing new. A run that is taken up, or whose connection broke, goes the same way."""

    NOTHING = "not attached"  # the container, if any, never ran: LIVE, COPY
    LIVE = "live"  # one attach stream since before the start: COPY; NOTHING when the container is made anew; ENDED when the log
    # is full, and nothing more is wanted of it
    COPY = "copy"  # read from the engine's copy, or about to be: COPY again when that breaks; ENDED
    ENDED = "ended"  # the copy came to its end: COPY when the container runs all the same


HEARD_NEXT = {
    Hearing.NOTHING: {Hearing.LIVE, Hearing.COPY},
    Hearing.LIVE: {Hearing.COPY, Hearing.NOTHING, Hearing.ENDED},
    Hearing.COPY: {Hearing.COPY, Hearing.ENDED},
    Hearing.ENDED: {Hearing.COPY},
}


class Job:
    """A run in progress: its record, its request, its log, what is heard of its container, and what is asked of it."""

    def __init__(self, run: Run, request: RunRequest, settings: Settings, tree: Tree, held: contextlib.ExitStack) -> None:
        self.run, self.request, self.tree = run, request, tree
        self.held = held  # what goes into its container, until it is there
        run.split_logs = request.split_logs
        self.log = Log(settings.log_limit, settings.state_dir, request.output_limit)
        self.slot: Slot | None = None  # what counts its usage
        self.hand_out: HandOut | None = None  # to the warm container that it has
        self.meter_at = math.inf if request.cpu_time is None else 0.0  # when (monotonic) that is next compared with its limit
        self.done = threading.Event()
        self.container = container_name(run.id)
        self.clients = 0  # that wait for the end; guarded by the runner's lock
        self.begun = False  # recorded: the container may have been started
        self.fed = request.stdin is None  # stdin was written whole
        self.starved: float | None = None  # when the connection that carries stdin broke; the run's clock
        self.taken_up = self.touched = False  # an earlier daemon's; there may be a container
        self.relaunched = self.chilled = False  # its image was forgotten; it was given to a warm container in vain
        self.starting: tuple[float, float] | None = None  # between when it was started, by the run's clock
        self.shift = 0.0  # seconds from the engine's clock to the run's
        self.hearing = Hearing.NOTHING
        self.output: Reply | None = None
        self.copy: Reply | None = None  # the engine's, of the output of a warm container, opened before the run
        self.listen_at, self.deaf_seconds = 0.0, FIRST_LOOK_SECONDS  # when the engine's copy is tried again, and the pause after
        self.failures = 0  # of the step that is tried, since something of it went well
        self.in_doubt = False  # the container may have ended while no engine took its output
        self.killing = Killing()
        self.ran: int | None = None  # ms from the container's start to its exit
        self._caught_up_by = 0.0  # monotonic: when its log is there again, if an earlier daemon had it
        self.stdin: Reply | None = None
        self.pull: Pull | None = None
        self.taken: str | None = None  # the reason whose signal the engine took
        self.asked: Ask | None = None
        self.execs: set[Patience] = set()  # of commands that go on in it
        self.quiet_since = math.inf  # monotonic: since when there is none
        self.has_shim = request.idle is not None  # in its container, for commands; as far as is known
        self._lock = threading.Lock()  # guards asked, execs and quiet_since
        self._born = self._entered = time.monotonic()
        self.patience = Patience(HURRY_SECONDS)

    def now(self) -> float:
        """Unix seconds by the run's own clock: ours at its acceptance, and from then on the monotonic one. A run that was
        taken up has ours of today, but never an earlier one than its acceptance."""
        return self.run.created + (time.monotonic() - self._born)

    def take_up(self, begun: bool, fed: bool) -> None:
        """Go on with what an earlier daemon began."""
        self.taken_up, self.touched, self.begun, self.fed = True, True, begun, fed or self.fed
        self._born -= max(0.0, time.time() - self.run.created)
        self._caught_up_by = time.monotonic() + CATCH_UP_SECONDS

    def catch_up(self, start: int, stream: str | None) -> None:
        """Just after a restart, wait for a byte of the log that an earlier daemon may have told."""
        while time.monotonic() < self._caught_up_by and not self.done.is_set() and total_of(self.log.taken(), stream) < start:
            time.sleep(SETTLE_POLL_SECONDS)

    def give_to(self, hand_out: HandOut | None) -> None:
        """It has a warm container, or again one of its own, or none yet."""
        self.hand_out = hand_out
        self.container = container_name(hand_out.warm if hand_out else self.run.id)
        self.fed = self.request.stdin is None or (hand_out is not None and is_fed_before(self.request.stdin))
        self.log.hide(len(HANDED_OUT) if hand_out else 0)

    def ask(self, ask: Ask) -> None:
        """Ask for an end, from any thread and without waiting. Whoever must go now has no time for a slow engine."""
        with self._lock:
            if not ask.prevails(self.asked):
                return
            self.asked = ask
            commands = list(self.execs) if ask.drops else []
        for patience in (self.patience, *commands):
            patience.ring(hurry=ask.drops or not self.begun)

    def admit(self, command: Patience, most: int) -> None:
        """A command is to go on in it, of so many at a time. Raises Conflict, Unavailable."""
        with self._lock:
            if self.run.phase != "running" or self.done.is_set() or (self.asked and self.asked.reason != "stopped"):
                raise Conflict("the run is not running", "not_running")
            if len(self.execs) >= most:
                raise Unavailable("busy", f"{most} commands go on in the run, as many as --max-exec allows")
            self.execs.add(command)

    def dismiss(self, command: Patience) -> None:
        """It has ended."""
        with self._lock:
            self.quiet_since = time.monotonic()  # first: idle_at looks at both without the lock
            self.execs.discard(command)
        self.patience.ring()

    def idle_at(self) -> float:
        """When (monotonic) it has been idle for too long, if no command comes."""
        busy = self.request.idle is None or self.execs or self.asked
        return math.inf if busy else self.quiet_since + (self.request.idle or 0)

    def is_forgotten(self) -> bool:
        """Whether that is so: it is to end then."""
        with self._lock:
            if time.monotonic() < self.idle_at():
                return False
            self.asked = Ask("idle", "SIGTERM")
            return True

    def pieces(self, content: Content) -> Iterator[bytes]:
        """Content that goes into the container, piece by piece. Raises RunEnds."""
        try:
            for piece in self.tree.pieces(content):
                self.check()
                yield piece
        except (OSError, ValueError, NotFound) as error:
            raise RunEnds("start_failed", f"its files cannot be read: {error}") from error

    def check(self) -> None:
        """Raises RunEnds when the run should not go on to its start."""
        if self.asked:
            raise RunEnds(self.asked.reason, self.asked.why)

    @property
    def dropped(self) -> bool:
        """Whether nobody wants what the run leaves."""
        return self.asked is not None and self.asked.drops

    def hear(self, hearing: Hearing, output: Reply | None = None) -> None:
        """Go on to another state of the output, with another stream or none. Of the engine's copy the log skips what it has."""
        if hearing not in HEARD_NEXT[self.hearing]:
            raise AssertionError(f"{self.hearing} → {hearing}")
        if self.output:
            self.output.close()
        self.hearing, self.output = hearing, output
        if hearing is Hearing.COPY:
            self.log.resume()

    def enter(self, phase: str) -> None:
        """Go on to a phase; the time spent in the last one is noted."""
        now = time.monotonic()
        self.run.timings[PHASES[self.run.phase]] += round((now - self._entered) * 1000)
        self.run.phase, self._entered = phase, now
        self.log.nudge()

    def state(self) -> dict[str, Any]:
        """The state as it is now."""
        kept = self.log.frames()
        head = dataclasses.replace(self.run, logs_truncated=self.run.logs_truncated or self.log.truncated).head()
        return whole_state(head, self.run.tail(), kept)

    def close_streams(self) -> None:
        """Let go of the output, and of stdin: an engine leaves whoever feeds it waiting when the container has ended."""
        for stream in filter(None, (self.output, self.copy)):
            stream.close()
        self.output = self.copy = None
        if self.stdin:
            self.stdin.wire.shut()


# --------------------------------------------------------------------------------------------------------------------
# Places: who may run and who waits
# --------------------------------------------------------------------------------------------------------------------


class Places:
    """The places of runs: so many at a time, and so many that wait behind them. A place is taken before a run is recorded and
    given back when its container is gone. Each run that has one runs on a thread.

    Places go round the names that wait (runs without a name are one more), and for each in the order of acceptance: so no
    backlog holds up another name."""

    def __init__(self, most: int, waiting: int, execute: Callable[[Job], None]) -> None:
        self._most, self._waiting, self._execute = most, waiting, execute
        self._limits: dict[str | None, tuple[int | None, int | None]] = {}  # of names: how many may run, and wait; replaced whole
        self._lock = threading.Lock()  # guards all below
        self._taken: collections.Counter[str | None] = collections.Counter()  # by name
        self._running: collections.Counter[str | None] = collections.Counter()
        self._queues: dict[str | None, collections.deque[Job]] = {}  # of names that wait, that whose turn it is first

    def limit(self, tokens: Iterable[Token]) -> None:
        """From now on these are the limits of names."""
        self._limits = {token.owner: token.limits for token in tokens}
        self.hire()

    def take(self, owner: str | None, unasked: bool = False) -> None:
        """Take a place, even if there is none. Raises Unavailable, which says whose limit it was."""
        with self._lock:
            waiting = self._limits.get(owner, (None, None))[1]
            if not unasked and self._taken.total() >= self._most + self._waiting:
                raise Unavailable("busy", "all places for running and queued runs are taken")
            waits = self._taken[owner] - self._running[owner]
            if not unasked and waiting is not None and waits >= waiting and not self._starts_at_once(owner):
                raise Unavailable("busy", f"{waiting} runs of {owner} may wait, and as many do")
            self._taken[owner] += 1

    def _starts_at_once(self, owner: str | None) -> bool:
        """Under the lock: whether one more run of this name would not have to wait."""
        free = self._running.total() < self._most
        return free and self._room(owner) > 0 and not any(self._room(each) > 0 for each in self._queues)

    def _room(self, owner: str | None) -> float:
        """Under the lock: how many more runs of a name may have a thread."""
        most = self._limits.get(owner, (None, None))[0]
        return math.inf if most is None else max(0, most - self._running[owner])

    def give_back(self, owner: str | None) -> None:
        """Give a place back."""
        with self._lock:
            self._taken[owner] -= 1

    def enqueue(self, job: Job) -> None:
        """Run a job that has a place when its turn comes."""
        with self._lock:
            self._queues.setdefault(job.run.owner, collections.deque()).append(job)
        self.hire()

    def hire(self) -> None:
        """Run as many of those that wait as may run, and all whose container is there already, or which only have to end."""
        with self._lock:
            for urgent in [each for waiting in self._queues.values() for each in waiting if each.begun or each.asked]:
                if not self._spawn(self._leaves_queue(urgent)):
                    return
            while (job := self._next()) and self._spawn(job):
                pass

    def _next(self) -> Job | None:
        """Under the lock: the job whose turn it is, which runs from now on; None when none may run."""
        owner = next((owner for owner in self._queues if self._room(owner) > 0), "")
        if owner == "" or self._running.total() >= self._most:
            return None
        self._queues[owner] = self._queues.pop(owner)  # last, until its next turn
        return self._leaves_queue(self._queues[owner][0])

    def _leaves_queue(self, job: Job) -> Job:
        self._queues[job.run.owner].remove(job)
        if not self._queues[job.run.owner]:
            del self._queues[job.run.owner]
        self._running[job.run.owner] += 1
        return job

    def _spawn(self, job: Job) -> bool:
        """Under the lock: run it on a thread; false when there is none to be had: then it waits on."""
        try:
            threading.Thread(target=self._work, args=([job],), name="run", daemon=True).start()
        except RuntimeError as error:
            log.error("no worker for a run: %s", error)
            self._running[job.run.owner] -= 1
            self._queues.setdefault(job.run.owner, collections.deque()).appendleft(job)
            return False
        return True

    def _work(self, jobs: list[Job]) -> None:
        """A worker: one run after the other until there is none for it."""
        job: Job | None = jobs.pop()  # which the thread would keep otherwise
        while job:
            try:
                self._execute(job)
            except Exception:
                log.exception("run %s", job.run.id)
            with self._lock:
                self._taken[job.run.owner] -= 1
                self._running[job.run.owner] -= 1
                job = self._next()

    def taken(self) -> int:
        """How many places are taken."""
        with self._lock:
            return self._taken.total()

    def queued(self) -> int:
        """How many runs wait."""
        with self._lock:
            return sum(map(len, self._queues.values()))


# --------------------------------------------------------------------------------------------------------------------
# Pulls: one for all that want the image
# --------------------------------------------------------------------------------------------------------------------


class Pull:
    """One pull, shared by all runs that want the image meanwhile."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.patience = Patience(0)  # rung when nobody waits any more
        self.waiting = 0  # guarded by the lock of Pulls
        self.error: EngineError | None = None
        self.progress: dict[str, Any] = {}  # the engine's latest word

    def run(self, events: Generator[dict[str, Any], None, None]) -> None:
        """Follow the engine's progress to the end."""
        try:
            with contextlib.closing(events):
                for self.progress in events:
                    pass
        except EngineError as error:
            self.error = error
        except Exception as error:
            log.exception("pull")
            self.error = EngineError(f"the pull failed: {type(error).__name__}")
        finally:
            self.done.set()
            self.patience.close()


class Pulls:
    """The pulls in progress; a connection whose image nobody waits for is dropped."""

    def __init__(self, engine: Engine, seconds: float, always: bool) -> None:
        self._engine, self._seconds, self._always = engine, seconds, always
        self._lock = threading.Lock()  # guards _pulls and what they count
        self._pulls: dict[str, Pull] = {}

    def pull(self, job: Job) -> None:
        """Pull a run's image, or wait for somebody else's pull of it. Raises RunEnds, EngineError."""
        reference, deadline = job.request.reference, time.monotonic() + self._seconds
        job.pull = pull = self._join(reference)
        try:
            while not pull.done.wait(DISCONNECT_POLL_SECONDS):
                job.check()
                if time.monotonic() > deadline:
                    raise RunEnds("pull_failed", f"the pull took longer than {self._seconds:g} s")
        finally:
            self._leave(reference, pull)
        if pull.error:
            raise pull.error

    def _join(self, reference: str) -> Pull:
        with self._lock:
            pull = self._pulls.get(reference)
            if pull is None or pull.done.is_set():
                try:
                    with contextlib.ExitStack() as undone:
                        pull = Pull()
                        undone.callback(pull.patience.close)
                        events = self._events(self._engine.for_one(pull.patience), reference)
                        threading.Thread(target=pull.run, args=(events,), name="pull", daemon=True).start()
                        undone.pop_all()
                except (OSError, RuntimeError) as error:
                    raise EngineAbsent(f"lightrun has no room for a pull: {error}") from error
                self._pulls[reference] = pull
            pull.waiting += 1
            return pull

    def _events(self, engine: Engine, reference: str) -> Generator[dict[str, Any], None, None]:
        """What the engine says of a pull; nothing when the image has come since the run saw that it was missing."""
        if not self._always:
            with contextlib.suppress(EngineMissing):
                engine.image(reference)
                return
        yield from engine.pull(reference, self._seconds)

    def _leave(self, reference: str, pull: Pull) -> None:
        with self._lock:
            pull.waiting -= 1
            if not pull.waiting:
                pull.patience.ring(hurry=True)
                if self._pulls.get(reference) is pull:
                    del self._pulls[reference]


# --------------------------------------------------------------------------------------------------------------------
# Runner: one run as one line
# --------------------------------------------------------------------------------------------------------------------


class Runner:
    """Sees every run to its end: one line for each, which can be entered where an earlier try or daemon left it."""

    def __init__(
        self, settings: Settings, store: Store, engine: Engine, evictor: Evictor, callbacks: Callbacks, metrics: Metrics
    ) -> None:
        self._settings, self._store, self._engine, self.metrics = settings, store, engine, metrics
        self._evictor, self._callbacks, self.keeper = evictor, callbacks, Keeper(engine)
        self.leaving = False  # what comes is still taken, but better goes elsewhere
        self.places = Places(settings.max_concurrent, settings.queue, self._execute)
        self._pulls = Pulls(engine, settings.pull_timeout, settings.pull == "always")
        self._layout = Layout()
        self.slots = Slots(engine, store.id)
        self._deaths = Deaths(engine)
        self.pools = Pools(settings, engine, self._layout, self.slots, self._is_busy, self.keeper.tidy_up)
        self._key_lock = threading.Lock()  # held while a keyed run is looked up and accepted
        self._lock = threading.Lock()  # guards _jobs and the clients they count
        self._jobs: dict[str, Job] = {}  # accepted, not yet recorded as ended
        self.stopping = False

    # -- taking runs in, and looking at them

    def submit(
        self, request: RunRequest, key: str | None, digest: Callable[[], str], upload: Upload | None = None,
        owner: str | None = None, remote: str = "",
    ) -> tuple[str, Job | None]:  # fmt: skip
        """Accept a run, and take its upload over: its id, which is recorded then, and itself, None when it has ended. With the
        idempotency key of another run, that one, if what was sent has the same digest. Raises Unavailable, Conflict,
        BadRequest for a tree that cannot be put."""
        if key is None:
            job = self._accept(request, None, "", upload, owner, remote)
            return job.run.id, job
        mine = digest()
        key = key if owner is None else f"{owner}\n{key}"  # keys are of one name; none holds a newline
        with self._key_lock:
            known = self._store.find_key(key)
            if known is None:
                job = self._accept(request, key, mine, upload, owner, remote)
                return job.run.id, job
        run_id, known_digest = known
        if known_digest != mine:
            raise Conflict("the Idempotency-Key belongs to a run with another body")
        if upload:
            upload.close()
        return run_id, self.job(run_id)

    def _accept(
        self, request: RunRequest, key: str | None, digest: str, upload: Upload | None, owner: str | None, remote: str
    ) -> Job:
        if self.stopping:
            raise going_down(self._settings)
        if not self.keeper.engine_up:
            raise Unavailable("engine_unavailable", "the container engine does not answer", 5)
        callback = {"status": "pending", "attempts": 0} if request.callback_url else None
        waited = not request.detached and key is None
        run_id, labels = self._settings.new_id(), request.labels
        run = Run(run_id, request.image, time.time(), waited, callback=callback, owner=owner, labels=labels)
        with contextlib.ExitStack() as undone:
            held = undone.enter_context(self._evictor.hold(request, upload))
            tree = self.tree(request, upload, owner)
            tree.check()
            self.places.take(owner)
            undone.callback(self.places.give_back, owner)
            job = self._enter(run, request, tree, held)
            undone.callback(self._leave, job)
            self._store.add(run, key, digest, None if waited else request.pack(), upload)
            undone.pop_all()
        told = {"run": run.id, "image": run.image, "owner": owner, "labels": run.labels, "remote": remote}
        fields = {name: value for name, value in told.items() if value}
        log.info("run %s accepted from %s: %s", run.id, remote or "nobody", run.image, extra={"fields": fields})
        if upload:
            with contextlib.suppress(LightrunError):  # the next run tries again
                self._evictor.evict()
        self.places.enqueue(job)
        return job

    def tree(self, request: RunRequest, upload: Upload | None, owner: str | None) -> Tree:
        """What goes into a container of this owner's."""

        def artifacts(run_id: str) -> list[dict[str, Any]]:
            if owner is not None and self._store.owner(run_id) != owner:
                raise NotFound("there is no such run")
            return list(self._store.tail(run_id).get("artifacts", []))

        return Tree(request, upload, self._settings.artifacts_root(), artifacts)

    def _enter(self, run: Run, request: RunRequest, tree: Tree, held: contextlib.ExitStack) -> Job:
        """A job for everybody to see, before there is a record, of which half would be here. Raises Unavailable."""
        try:
            job = Job(run, request, self._settings, tree, held)
        except OSError as error:
            raise Unavailable("busy", f"lightrun has no room for another run: {error.strerror}") from error
        with self._lock:
            self._jobs[run.id] = job
        return job

    def _leave(self, job: Job) -> None:
        """It was not accepted after all."""
        with self._lock:
            del self._jobs[job.run.id]
        job.done.set()
        job.patience.close()

    def recover(self) -> None:
        """Take up every run that an earlier daemon left unfinished: those that may have a container at once, the others
        in their order."""
        for head, waited, begun, fed, asked, meter, warm in self._store.unfinished():
            run = Run.from_head(json.loads(head), bool(waited))
            request = RunRequest.unpack(self._store.request(run.id), run.image)  # a waiting client's is not stored
            upload = self._store.upload(run.id)
            tree, held = self.tree(request, upload, run.owner), self._evictor.hold(request, upload)
            job = Job(run, request, self._settings, tree, held)
            job.take_up(bool(begun), bool(fed))
            if warm:
                job.give_to(hand_out := HandOut(**json.loads(warm)))
                self.pools.adopt(hand_out.warm)
            job.slot = self.slots.take(meter) if meter else None
            if ask := Ask.parse(asked) or self._refusal(job):
                job.ask(ask)
            self._jobs[run.id] = job  # nobody else is there yet
        for job in sorted(self._jobs.values(), key=lambda job: not (job.begun or job.asked)):  # now that each has what it holds
            self.places.take(job.run.owner, unasked=True)
            self.places.enqueue(job)
        self.slots.sweep()
        self.keeper.start(lambda run_id: self.job(run_id) or self.pools.knows(run_id), self.slots, self.places.hire)
        if self._settings.warm:
            self.pools.start()
            self._deaths.start()

    def _refusal(self, job: Job) -> Ask | None:
        """Why a run that was taken up must not go on: nobody waits for it any more, or it has not begun and today's limits
        refuse it."""
        if job.run.waited:
            return Ask("interrupted")
        if job.begun:
            return None
        try:
            if not job.request.reference:
                raise BadRequest("its request is gone")
            job.request.allowed_by(self._settings)
        except LightrunError as error:
            return Ask("start_failed", why=f"refused when it was taken up again: {error}")
        return None

    def metered(self) -> bool:
        """Whether usage can be had, as far as is known; an engine that is away is not asked, and refuses the run anyway."""
        return not self.keeper.engine_up or self.slots.able()

    def job(self, run_id: str) -> Job | None:
        """The run in progress with this id."""
        with self._lock:
            return self._jobs.get(run_id)

    def _is_busy(self) -> bool:
        """Whether runs wait for a place, or as many start as the engine has CPUs: a warm container would cost them as much time
        as it saves."""
        return self.places.queued() > 0 or self.phases().get("starting", 0) >= self._engine.about().get("NCPU", 1)

    def phases(self) -> dict[str, int]:
        """How many runs in progress are in each phase."""
        with self._lock:
            return collections.Counter(job.run.phase for job in self._jobs.values())

    def counts(self) -> tuple[int, int]:
        """Runs that have a worker, and runs that wait for one."""
        queued = self.places.queued()
        with self._lock:
            return max(0, len(self._jobs) - queued), queued

    def ask(self, run_id: str, ask: Ask) -> None:
        """Ask a run to end; a queued one ends at once, without a place. Raises NotFound, Conflict."""
        job = self.job(run_id)
        if job is None:
            self._store.head(run_id)
            raise Conflict("the run has ended", "not_running")
        try:
            if not job.run.waited:
                self._store.ask(run_id, ask.recorded)
        finally:  # with a full disk too: what ends a run makes room
            job.ask(ask)
            self.places.hire()

    @contextlib.contextmanager
    def attended(self, job: Job | None) -> Iterator[None]:
        """A client waits for this run. With the last one goes the reason to run it, unless it can be asked for later."""
        if job is None:
            yield
            return
        with self._lock:
            job.clients += 1
        try:
            yield
        finally:
            with self._lock:
                job.clients -= 1
                deserted = not job.clients and job.run.waited and not job.dropped and not job.done.is_set()
            if deserted:
                with contextlib.suppress(Conflict, NotFound):  # it has ended
                    self.ask(job.run.id, Ask("cancelled"))

    # -- one run

    def _execute(self, job: Job) -> None:
        """One run from its place to its last trace."""
        engine = self._engine.for_one(job.patience)
        try:
            ending = self._line(job, engine)
        except RunEnds as end:
            ending = {"reason": end.reason, "error": str(end)}
        except EngineError as error:  # of a run that was killed only how it ended is not known
            ending = {"reason": job.taken if job.dropped and job.taken else "engine_error", "error": str(error)}
        except Exception:
            log.exception("run %s", job.run.id)
            ending = {"reason": "engine_error", "error": "lightrun failed; its log says how"}
        try:
            self._record(job, ending)
        except Exception:
            log.exception("run %s", job.run.id)
            self._record(job, {"reason": "engine_error", "error": "lightrun failed; its log says how"})
        self._let_go(job)
        job.patience.close()
        with contextlib.suppress(LightrunError):  # the next run tries again
            self._evictor.evict(job.run.id)

    def _let_go(self, job: Job) -> None:
        """Remove the run's container, or have the keeper do it."""
        if job.hand_out:
            self.pools.forget(job.hand_out.warm)
            self._deaths.forget(job.container)
        if not self.slots.vacate(job.slot, job.container):
            self.keeper.tidy_up()

    def _line(self, job: Job, engine: Engine) -> dict[str, Any]:
        """pull … start, read to the end, extract: what became of the run."""
        self._persist(job, lambda: self._launch(job, engine))
        state = self._persist(job, lambda: self._watch(job, engine))
        return self._conclude(job, engine, state)

    def _persist(self, job: Job, step: Callable[[], Result], tries: int = MAX_TRIES) -> Result:
        """Do a step of the line, and again while the engine is away. When it answers but the step breaks all the same, a
        few times more. Raises EngineError in the end, RunEnds for a run that is not to wait."""
        job.failures = 0
        while True:
            began = time.monotonic()
            try:
                return step()
            except EngineAbsent as error:
                log.warning("run %s: %s", job.run.id, error)
                away = self._sit_out(job, error)
                slow = time.monotonic() - began > SLOW_SECONDS
                job.failures = 0 if away else job.failures + (MAX_TRIES // 2 if slow else 1)
                if job.failures >= (min(tries, 2) if job.dropped else tries):
                    if not job.begun:
                        job.check()
                    raise EngineError(f"{error}, again and again") from error
                if not job.dropped:
                    job.patience.lengthen()
                job.patience.sleep(min(RETRY_SECONDS, FIRST_LOOK_SECONDS * 4**job.failures))

    def _sit_out(self, job: Job, error: EngineAbsent) -> bool:
        """Wait until the engine answers; whether it did not at once. Raises RunEnds, EngineAbsent for a run that cannot wait or
        need not."""
        away = False
        while not self.keeper.answers():
            away = True
            job.in_doubt |= job.begun and job.hearing is not Hearing.ENDED
            job.killing.tries = job.killing.failures = 0
            if not job.begun:
                job.check()
                if job.run.waited:
                    raise error
            job.patience.sleep(RETRY_SECONDS)
        return away

    # -- to the start

    def _launch(self, job: Job, engine: Engine) -> None:
        """pull, create, put, attach, start: what of it is not done yet. What the engine refuses now ends the run."""
        try:
            try:
                self._bring_up(job, engine)
            except EngineMissing:
                if job.relaunched:
                    raise
                engine.forget()  # pruned since it was last used, most likely
                if job.begun:
                    self._insist(job, lambda: self._store.take_back(job.run.id))
                job.begun, job.relaunched = False, True
                self._bring_up(job, engine)
        except EngineAbsent:
            raise
        except EngineError as error:
            low = "memory" in str(error) and job.request.memory < SAFE_MEMORY_BYTES
            hint = "; some engines need 16 MiB of memory to start a container" if low else ""
            raise RunEnds("start_failed", f"{error}{hint}") from error

    def _bring_up(self, job: Job, engine: Engine) -> None:
        request = job.request
        if job.touched and self._has_started(job, engine):
            return
        job.check()
        job.enter("starting")
        if job.begun and job.hearing is Hearing.NOTHING:
            job.hear(Hearing.COPY)  # told to start by an earlier daemon: it may do so before we could attach
        if job.hearing is Hearing.NOTHING:
            image = self._image(job, engine)
            job.run.image_id = image.id
            if request.workdir is None and image.workdir != "/":
                request = job.request = dataclasses.replace(request, workdir=image.workdir)
            if self._hand_out(job, engine, image):
                return
            job.touched = True
            job.slot = job.slot or self.slots.take()
            engine.create(job.run.id, image, request, job.slot.parent if job.slot else "")
            self._put(job, engine, image)
            job.hear(Hearing.LIVE, engine.attach(job.container))
            job.stdin = None if request.stdin is None else engine.open_stdin(job.container)
            job.check()
        if not job.begun:
            meter = job.slot.begin() if job.slot else None
            self._insist(job, lambda: self._store.begin(job.run.id, meter), job.check)
        job.begun, sent = True, job.now()
        engine.start(job.container)
        job.starting = sent, job.now()
        if job.slot:
            job.slot.started()
        job.killing.by(time.monotonic() + request.timeout)
        self._feed(job)

    def _put(self, job: Job, engine: Engine, image: Image) -> None:
        """Put the run's tree into its container, and the shim if that is its program."""
        owner = self._layout.owner(engine, job.container, image)
        made = self._layout.made(engine, job.container, image, job.request.workdir or "")
        planned = self._plan(job, engine, job.container, image, made)
        if [entry for entry in planned if owner != (0, 0) or not entry.is_folder or entry.modified is not None]:
            engine.put(job.container, put_tar(planned, owner, job.pieces, time.time()))
        if job.request.idle is not None:  # last: what the engine has added to the image by itself was asked before
            put_shim(engine, job.container, job.request.waits)

    def _plan(self, job: Job, engine: Engine, container: str, image: Image, made: Sequence[str]) -> list[Entry]:
        """What is to be put for the run's tree, beside what the engine has made. Raises RunEnds."""
        mark = [Entry(SETUP_MARK[1:], mode=0o644)] if job.request.setup else []
        try:
            entries = job.tree.entries()
            return self._layout.plan(engine, container, image, job.request.workdir or "/", made, entries, job.check) + mark
        except BadRequest as error:  # an earlier daemon's run, whose artifacts have gone since
            raise RunEnds("start_failed", f"its files cannot be had any more: {error.more}") from error

    def _hand_out(self, job: Job, engine: Engine, image: Image) -> bool:
        """The twin of create, put, attach and start: give the run to a warm container. False when it is to start cold; then no
        program of it has begun."""
        warm = None if job.chilled else self.pools.take(image, job.request, lasting=not job.run.waited)
        if warm is None:
            return False
        now, (earliest, latest, started) = job.now() - time.monotonic(), warm.started
        job.shift, sent = _shift(started, started, earliest + now, latest + now), job.now()
        job.give_to(HandOut(warm.id, sent - job.shift))
        assert job.hand_out
        job.slot, job.touched, job.copy = warm.slot, True, warm.copy
        self._deaths.expect(job.container)
        job.hear(Hearing.LIVE, warm.output)
        job.stdin = None if job.fed else warm.output
        planned = self._plan(job, engine, job.container, image, self._way(job, engine, warm, image))
        if not self._became(job, warm, planned):
            job.close_streams()
            self.pools.count("failed")
            return self._has_started(job, engine)
        self.pools.count("hit")
        job.run.warm, job.run.started = True, job.hand_out.at + job.shift
        job.starting = sent, job.now()
        job.killing.by(time.monotonic() + job.request.timeout)
        self._feed(job)
        return True

    def _way(self, job: Job, engine: Engine, warm: Warm, image: Image) -> list[str]:
        """The folders of the way to the workdir that the shim has to make, as the engine would have."""
        workdir, standing = job.request.workdir or "", self._layout.standing
        if not image.root:
            return [workdir]  # which was made for its user, and is empty
        missing = workdir and standing(engine, warm.container, image, workdir) is Standing.NOTHING
        return way_to(workdir) if missing else []

    def _became(self, job: Job, warm: Warm, planned: Sequence[Entry]) -> bool:
        """Send a run to a warm container, and wait for the word that all was done up to its program. Which container it has is
        recorded before what makes it the program is sent: a run without that record has not begun."""
        meter = warm.slot.begin(again=True) if warm.slot else None

        def record() -> None:
            job.hand_out = HandOut(warm.id, job.now() - job.shift)
            packed = to_json(dataclasses.asdict(job.hand_out)).decode()
            begin = functools.partial(self._store.begin, job.run.id, meter, packed, durable=not job.run.waited)
            self._insist(job, begin, job.check)
            job.begun = True

        wire = warm.output.wire
        wire.patience = job.patience
        if warm.copy:
            warm.copy.wire.patience = job.patience
        whole = self.pools.hand_out(warm, job.request, planned, job.pieces, record)
        late = time.monotonic() + ENGINE_SECONDS
        if warm.slot:
            warm.slot.started()
        while whole and job.log.hidden:
            job.patience.heard()
            job.check()
            try:
                data = warm.output.next(job.patience.wake, late - time.monotonic())
            except EngineError as error:
                log.warning("run %s: %s", job.run.id, error)
                return False
            whole = data != b"" and time.monotonic() < late
            job.log.feed(data or b"")
        wire.patience = None
        wire.stream(math.inf)  # for stdin, which the program may leave waiting
        return whole

    def _has_become(self, job: Job, engine: Engine) -> bool:
        """Whether a warm container has become the run's program. That is what it says first; a shim that gives up, as it does
        when lightrun goes away, says nothing."""
        for follow in (True, False):  # again when it has ended: no stream is trusted to come to its end
            reader = FrameReader()
            with contextlib.closing(engine.kept_output(job.container, follow)) as copy:
                while data := copy.next(seconds=QUIET_SECONDS):
                    if any(stream in STREAMS for stream, _ in reader.feed(data)):
                        return True
            if (state := engine.inspect(job.container)).running:
                raise EngineAbsent("the engine does not say whether a warm container has become the run's program")
        if state.exit_code >= 128:  # a signal, which may have met either
            job.check()
            raise RunEnds("engine_error", "the warm container was lost while the run was handed to it")
        return state.exit_code != SHIM_GAVE_UP

    def _take_back(self, job: Job) -> None:
        """Let go of a warm container that has not become the run's program. The run is to start cold, if it still may."""
        if job.begun:
            self._insist(job, lambda: self._store.take_back(job.run.id))
        job.begun, job.chilled = False, True
        job.close_streams()
        job.check()
        if job.hearing is Hearing.LIVE:
            job.hear(Hearing.NOTHING)
        self._let_go(job)
        job.give_to(None)
        job.slot = None
        if job.taken_up and (ask := self._refusal(job)):
            job.ask(ask)

    def _has_started(self, job: Job, engine: Engine) -> bool:
        """Look at what an earlier try or daemon left: whether the container ever ran. One that was never told to is removed."""
        try:
            if job.hand_out:
                started = job.run.warm = job.begun and self._has_become(job, engine)
            else:
                started = engine.inspect(job.container).started is not None
            if started:
                if job.hearing is Hearing.NOTHING:
                    job.hear(Hearing.COPY)
                job.begun = True  # a power loss can take the record back
                if job.slot:
                    job.slot.started()
                self._feed(job)
                return True
            if job.hand_out:
                self._take_back(job)
            elif not job.begun:
                engine.remove(job.container)
        except EngineMissing as error:
            if job.begun:
                raise RunEnds("lost", "the container vanished") from error
        except EngineAbsent:
            if job.hand_out:  # what cannot be told need not be, of a run that is to end
                job.check()
            raise
        if not job.begun and job.hearing is Hearing.LIVE:
            job.hear(Hearing.NOTHING)
        return False

    def _feed(self, job: Job) -> None:
        """Have the stdin of a started run written, by a thread of its own; let go of what the run's start needed."""
        mixed = job.stdin is not None and job.hand_out is None and not self._engine.traits.splits_attach
        data, job.request = job.request.stdin, dataclasses.replace(job.request, files={}, stdin=None, tar=None)  # may be large
        job.tree.request = job.request
        if not isinstance(data, Reference):
            job.held.close()
        if job.stdin and data is not None:
            threading.Thread(target=self._write_stdin, args=(job, job.stdin, data), name="stdin", daemon=True).start()
            if mixed:  # an engine may stop a program whose output nobody takes
                threading.Thread(target=self._ignore, args=(job.stdin,), name="stdin", daemon=True).start()
        elif not job.fed:  # by an earlier daemon, and not whole: the program may take that for the end of its input
            job.ask(Ask("interrupted"))

    @staticmethod
    def _ignore(stdin: Reply) -> None:
        """Take the output that comes on a connection for stdin."""
        with contextlib.suppress(OSError):
            stdin.wire.drain()

    def _write_stdin(self, job: Job, stdin: Reply, data: Content) -> None:
        """Write a run's stdin. An engine takes it, or waits, as long as the container runs, so that a connection that breaks
        before has cut the program's input."""
        try:
            for piece in job.tree.pieces(data):
                stdin.wire.send(piece)
            stdin.wire.half_close()
            if job.hand_out is None:  # the engine ends it when all was taken; a warm container's carries the output as well
                with contextlib.closing(stdin):
                    stdin.wire.drain()
            job.fed = True
            if not job.run.waited:
                self._insist(job, lambda: self._store.fed(job.run.id))
        except (OSError, NotFound):
            job.starved = job.now()
            job.patience.ring()
        finally:
            job.held.close()

    def _image(self, job: Job, engine: Engine) -> Image:
        """The run's image, pulled if need be. Raises RunEnds."""
        reference = job.request.reference
        try:
            if self._settings.pull != "always":
                with contextlib.suppress(EngineMissing):
                    return engine.image(reference)
            if self._settings.pull == "never" or is_image_id(reference):
                raise RunEnds("pull_failed", f"there is no image {reference} and it is not to be pulled")
            job.enter("pulling")
            self._pulls.pull(job)
            job.enter("starting")
            try:
                return engine.image(reference)
            except EngineMissing as error:
                raise EngineAbsent("the pull ended without the image") from error
        except EngineAbsent:
            raise
        except EngineError as error:
            raise RunEnds("pull_failed", str(error)) from error

    def _insist(self, job: Job, write: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
        """Write to the store, again and again while its disk is full."""
        while True:
            check()
            try:
                return write()
            except (Unavailable, StorageUncertain) as error:
                log.error("run %s: %s", job.run.id, error)
                job.log.release()  # a follower that does not read must not keep the disk full
                time.sleep(RETRY_SECONDS)

    # -- to the end

    def _watch(self, job: Job, engine: Engine) -> ContainerState:
        """Read to the end of the output and of the container, send the signals that fall due, and look at the container now
        and then: nothing here trusts a stream to come to its end."""
        if job.run.phase != "running":
            job.quiet_since = time.monotonic()
            job.enter("running")
        if job.output and job.hearing is Hearing.LIVE:
            job.patience.beside = job.output.wire, lambda: self._listen(job, engine, 0)
        pause = FIRST_LOOK_SECONDS
        look_at = time.monotonic() + (pause if job.starting else 0)
        while True:
            job.patience.heard()
            self._enforce(job)
            if job.killing.due(job.asked):
                self._kill(job, engine)
                pause, look_at = FIRST_LOOK_SECONDS, time.monotonic() + FIRST_LOOK_SECONDS
            if time.monotonic() >= look_at or job.hearing is Hearing.ENDED:
                live = job.hearing is Hearing.LIVE
                state = self._told(job) or self._look(job, engine)
                if not state.running:
                    return self._hear_out(job, engine, state)
                if job.starved is not None and job.now() > job.starved + 1:  # it goes on, and may take that for the end of file
                    job.ask(Ask("engine_error", why=STDIN_BROKE))
                if not live:
                    job.log.lost()
                pause = min(2 * pause, LOOK_SECONDS if job.starved is None else 1)
                look_at = time.monotonic() + pause
                if job.hearing is Hearing.ENDED:  # too early, or the engine is late to say that it has exited
                    self._lose(job)
            waits = job.output is None
            left = min(look_at, job.killing.at, job.meter_at, job.idle_at()) - time.monotonic()
            if not self._listen(job, engine, left) and waits:  # perhaps for its end
                look_at = time.monotonic()
            elif job.starved is not None:
                look_at = min(look_at, time.monotonic() + FIRST_LOOK_SECONDS)

    def _enforce(self, job: Job) -> None:
        """End a run that has passed its CPU time or the bound of its output, or in which nothing happens any more."""
        if job.log.full:
            job.ask(Ask("output_limit"))
        if job.is_forgotten() and (ask := job.asked):
            try:
                self._store.ask(job.run.id, ask.recorded)
            except (Unavailable, StorageUncertain) as error:  # with a full disk too: what ends a run makes room
                log.error("run %s: %s", job.run.id, error)
        if job.request.cpu_time is not None and time.monotonic() >= job.meter_at:
            used = job.slot.cpu_time() if job.slot else None
            left = math.inf if used is None else job.request.cpu_time - used / 1e9
            if used is None:
                self.slots.seen = False
                job.ask(Ask("engine_error", why="its cpuTime cannot be kept to: its cgroup cannot be seen"))
            elif left <= 0:
                job.ask(Ask("cpu_limit"))
            job.meter_at = time.monotonic() + max(METER_SECONDS, left / job.request.cpus) if left > 0 else math.inf

    def _look(self, job: Job, engine: Engine) -> ContainerState:
        """The container's state. What the engine refuses ends no run that has begun: it counts as an absence."""
        try:
            state = engine.inspect(job.container)
            if state.started is None:
                raise EngineAbsent("the engine does not say when the container started")
        except EngineMissing as error:
            raise RunEnds("lost", "the container vanished") from error
        except EngineError as error:
            raise EngineAbsent(str(error)) from error
        if job.run.started is None:
            self._note_start(job, state, job.hand_out.at if job.hand_out else state.started)
        if state.running:
            job.in_doubt = False
        job.failures = 0
        return state

    def _told(self, job: Job) -> ContainerState | None:
        """The end of a brief warm run of which all was heard, if the engine's events have told it, and nothing else is to be
        asked: its stdin was written, nobody wanted it to end, and nothing of it was killed for want of memory."""
        end = self._deaths.of(job.container) if job.hand_out and job.hearing is Hearing.ENDED else None
        if not (end and job.hand_out and job.starting) or end[1] > job.hand_out.at + BRIEF_SECONDS:
            return None
        if not job.fed or job.asked or job.killing.tries or job.in_doubt:
            return None
        if job.slot is None or not job.slot.spared(job.request.memory):
            return None
        return ContainerState(job.run.image_id or "", "", False, job.hand_out.at, end[1], end[0], False, end[1])

    @staticmethod
    def _note_start(job: Job, state: ContainerState, started: float) -> None:
        """Take the container's start over into the run's clock, whatever the engine's says; and the deadline of a run that we
        did not start ourselves from it, never too early."""
        if job.starting:
            job.shift = _shift(started, started, *job.starting)
        else:
            now = job.now()  # a Date has whole seconds: of another clock, the earliest that it may be
            job.shift = now - state.told if _shift(state.told, state.told + 1, now, now) else 0.0
            elapsed = max(0.0, now - job.shift - started)
            job.killing.by(time.monotonic() + job.request.timeout - elapsed)
        job.run.image_id, job.run.started = state.image_id, max(job.run.created, started + job.shift)
        if job.request.workdir is None:
            job.request = dataclasses.replace(job.request, workdir=state.workdir)
        job.log.nudge()

    def _listen(self, job: Job, engine: Engine, seconds: float) -> bool:
        """Take the next piece of the output; false when none comes in time, or when there is nothing to listen to for now.
        Whatever ends or breaks is followed by the engine's copy; that this cannot be had either shows when somebody looks."""
        try:
            if job.output is None:
                if time.monotonic() < job.listen_at:
                    engine.wait(job.container, job.patience.wake, max(0.001, min(seconds, job.listen_at - time.monotonic())))
                    return False
                job.hear(Hearing.COPY, engine.kept_output(job.container, follow=True))
                return True
            data = job.output.next(job.patience.wake, seconds)
        except EngineError:
            self._lose(job)
            return False
        if data:
            job.log.feed(data)
        elif data is not None and job.hearing is Hearing.LIVE and not job.log.full:
            early, job.copy = job.copy, None
            if early and sum(job.log.taken().values()) > PIPE_BYTES:  # the engine could not send all of it as it came, and its
                early.close()  # files may have gone since
                early = None
            job.hear(Hearing.COPY, early)
        elif data is not None:
            job.hear(Hearing.ENDED)
        return data is not None

    @staticmethod
    def _lose(job: Job) -> None:
        """What carried the output broke: read the engine's copy, after a pause if that was it."""
        if job.hearing is not Hearing.LIVE:
            job.patience.sleep(FIRST_LOOK_SECONDS)
            job.listen_at = time.monotonic() + job.deaf_seconds
            job.deaf_seconds = min(2 * job.deaf_seconds, LOOK_SECONDS)
        job.hear(Hearing.COPY)

    def _hear_out(self, job: Job, engine: Engine, state: ContainerState) -> ContainerState:
        """Read what is left of the output of a container that has exited, from the attach stream and then from the engine's
        copy, as long as it comes."""
        for _ in range(1 if job.dropped else 2):
            began = time.monotonic()
            while job.hearing is not Hearing.ENDED:
                job.patience.heard()
                late = time.monotonic() - began > (HURRY_SECONDS if job.dropped else ENGINE_SECONDS)
                if late or not self._listen(job, engine, QUIET_SECONDS / 2 if job.dropped else QUIET_SECONDS):
                    break
            if job.hearing is Hearing.LIVE:
                job.hear(Hearing.COPY)
        return state

    def _kill(self, job: Job, engine: Engine) -> None:
        """Send the signal that is due. Raises EngineError for a container that cannot be killed, RunEnds for one that was
        removed instead."""
        killing = job.killing
        if killing.failures >= MAX_FAILED_KILLS and job.asked and job.dropped:
            engine.remove(job.container)
            raise RunEnds(job.asked.reason, "removed, since the engine did not answer when it was to be killed")
        if killing.tries > MAX_KILLS:
            raise RunEnds("engine_error", "the container cannot be killed")
        try:
            if engine.kill(job.container, killing.signal):
                job.taken = killing.reason if killing.asked else job.taken or killing.reason
            killing.next(answered=True)
        except EngineError as error:
            log.warning("run %s: %s", job.run.id, error)
            killing.next(answered=False)

    def _conclude(self, job: Job, engine: Engine, state: ContainerState) -> dict[str, Any]:
        """What became of a container that has exited, and what it leaves."""
        usage = job.slot.usage() if job.slot else {}
        self.slots.seen = self.slots.seen if job.slot is None else "cpuMs" in usage
        self._complete_log(job, engine)
        if job.slot and not state.oom_killed and job.slot.oom_killed(job.request.memory):
            state = dataclasses.replace(state, oom_killed=True)
        if state.exit_code == 137 and not (state.oom_killed or job.taken):  # an engine may be late to say what killed it
            time.sleep(2 * FIRST_LOOK_SECONDS)
            state = self._persist(job, lambda: self._look(job, engine))
        began = job.run.started - job.shift if job.run.warm and job.run.started else state.started
        if began is not None and state.finished is not None:  # as the engine tells both
            job.ran = round(max(0.0, state.finished - began) * 1000)
        reason = self._reason(job, engine, state)
        ending: dict[str, Any] = {"reason": reason, "exit_code": state.exit_code, "oom_killed": state.oom_killed, "usage": usage}
        ending["error"] = {
            "timeout": f"killed after its timeout of {job.request.timeout * 1000:.0f} ms",
            "cpu_limit": f"killed after its {(job.request.cpu_time or 0) * 1000:.0f} ms of CPU time",
            "output_limit": f"killed after its {job.request.output_limit} bytes of output",
            "oom": "killed for using more memory than its limit",
            "stopped": "stopped on request",
            "idle": f"ended after {(job.request.idle or 0) * 1000:.0f} ms in which nothing was run in it",
            "cancelled": "cancelled",
            "interrupted": "killed because lightrun went away under it",
            "engine_error": job.asked.why if job.asked and job.taken else STDIN_BROKE,
        }.get(reason)
        if reason == "exited" and state.exit_code and job.request.setup:
            ending["error"] = self._failed_setup(job, engine, state.exit_code)
        kept_anyway = reason == "idle" or (job.request.extract_on_exit and reason in EXTRACTED)
        if job.request.extract and (kept_anyway or (state.exit_code == 0 and reason in {"exited", "stopped"})):
            job.enter("extracting")
            ending |= self._extract(job, engine)
        return ending

    @staticmethod
    def _failed_setup(job: Job, engine: Engine, exit_code: int) -> str | None:
        """Which setup command a run came to and not past; None when it came to its entrypoint."""
        with contextlib.suppress(EngineError):
            which = engine.text(job.container, SETUP_MARK).strip()
            if which.isdecimal() and len(which) < 3:
                return f"setup[{which}] failed with exit code {exit_code}"
        return None

    def _reason(self, job: Job, engine: Engine, state: ContainerState) -> str:
        name, reason = job.killing.unanswered, job.killing.reason  # the engine may have taken it all the same
        if not name and job.taken_up:  # or that of an earlier daemon, which did not live to record the end
            name, reason = (job.asked.signal, job.asked.reason) if job.asked else ("SIGKILL", self._overrun(job))
        if not job.taken and name and reason:
            sent = None
            with contextlib.suppress(EngineError):
                sent = engine.has_sent(job.container, name, state.started or 0, state.told + 1)
            if sent is None:
                sent = state.exit_code == 128 + signal.Signals[name] and not state.oom_killed
            job.taken = reason if sent else None
        if job.taken:
            return job.taken
        if job.taken_up and not job.fed and job.stdin is None:  # it may have taken the loss for the end of its input
            return "interrupted"
        if job.starved is not None:
            slack = 0 if engine.traits.splits_attach else STDIN_SLACK_SECONDS
            if state.finished is None or job.starved < state.finished + job.shift - slack:
                return "engine_error"
        return "oom" if state.oom_killed and state.exit_code else "exited"

    @staticmethod
    def _overrun(job: Job) -> str:
        """The limit that a run has passed, as the reason for its end; "" for none."""
        if job.ran is not None and job.ran >= job.request.timeout * 1000:
            return "timeout"
        used = job.slot.cpu_time() if job.slot else None
        if used is not None and job.request.cpu_time is not None and used >= job.request.cpu_time * 1e9:
            return "cpu_limit"
        return "output_limit" if job.log.full else ""

    def _complete_log(self, job: Job, engine: Engine) -> None:
        """Take the engine's copy as a whole when the log is not what one attach stream brought; say what may be missing."""
        whole = True
        try:
            whole = not job.taken_up or engine.traits.tells_rotation
            if not job.log.full and (job.hearing is not Hearing.ENDED or job.log.missed or job.log.cut):
                self._persist(job, lambda: job.log.replace(self._copy(job, engine)), tries=1 if job.dropped else MAX_TRIES)
        except EngineError as error:
            log.warning("run %s: %s", job.run.id, error)
            job.in_doubt = True
        job.run.logs_truncated = job.in_doubt or not whole

    @staticmethod
    def _copy(job: Job, engine: Engine) -> Iterator[bytes]:
        """The engine's copy of the output of a container that has exited, for whoever has time for it."""
        began = time.monotonic()
        for piece in engine.kept_output(job.container, follow=False).pieces():
            yield piece
            if job.dropped and time.monotonic() - began > HURRY_SECONDS:
                raise EngineAbsent("the engine takes too long to tell its copy of the log")

    def _extract(self, job: Job, engine: Engine) -> dict[str, Any]:
        """Keep what was asked for, in a bounded time and only for somebody who still wants it."""
        late = time.monotonic() + EXTRACT_SECONDS

        def check() -> None:
            if job.dropped:
                raise RunEnds("cancelled", "cancelled")
            if time.monotonic() > late:
                raise ArtifactError(f"was not copied within {EXTRACT_SECONDS} s of extraction")

        extraction = Extraction(self._settings.artifacts_root(), job.run.id, self._settings.extract_limit, check)
        extraction.discard()  # of an earlier try, which the engine's absence cut short
        try:
            extracted = [
                {"from": path, **self._keep(job, engine, extraction, path, to, check)} for path, to in job.request.extract
            ]
            if job.dropped:
                raise RunEnds("cancelled", "cancelled")
        except RunEnds as end:
            extraction.discard()
            return {"extracted": [{"from": path, "status": "error", "message": str(end)} for path, _ in job.request.extract]}
        return {"artifacts": extraction.artifacts, "extracted": extracted}

    def _keep(
        self, job: Job, engine: Engine, extraction: Extraction, path: str, to: str | None, check: Callable[[], None]
    ) -> dict[str, Any]:
        """One entry of `extract`."""
        absolute = clean_path(posixpath.join(job.request.workdir or "/", path))

        def copy_out() -> dict[str, Any]:
            check()
            tar, mode = engine.archive(job.container, absolute)
            with contextlib.closing(tar):
                if mode & GO_MODE_LINK:
                    raise ArtifactError("is a link")
                if mode & GO_MODE_OTHER:
                    raise ArtifactError("is neither a file nor a folder")
                try:
                    return extraction.keep(tar, bool(mode & GO_MODE_FOLDER), to)
                except BrokenArchive as error:
                    raise EngineAbsent(str(error)) from error

        try:
            return {"status": "ok", **self._persist(job, copy_out)}
        except EngineMissing:
            self._persist(job, lambda: self._look(job, engine))  # ends the extraction when it is the container that is missing
            return {"status": "missing"}
        except EngineAbsent:
            raise
        except EngineError as error:  # whose text may name paths of the host
            log.warning("run %s: %s", job.run.id, error)
            return {"status": "error", "message": "the engine cannot copy it out"}
        except ArtifactError as error:
            return {"status": "error", "message": str(error)}

    def _record(self, job: Job, ending: dict[str, Any]) -> None:
        """Put the end on disk, however long that takes, and only then tell it."""
        job.enter(job.run.phase)
        unknown = ("queue", "pull", *(() if job.starting else ("start",))) if job.taken_up else ()  # spent by an earlier daemon
        if job.ran is not None:
            job.run.timings["run"] = job.ran
            if job.run.started is not None:
                job.run.started = max(job.run.created, min(job.run.started, job.now() - job.ran / 1000))
        frames = job.log.frames()
        if job.request.extract and "extracted" not in ending:
            ended = "exit_code" in ending  # else it never ran
            why = f"exit code {ending['exit_code']}" if ended and ending["reason"] in {"exited", "stopped"} else ending["reason"]
            why += ", and extractOn is success" if ended and ending["reason"] in EXTRACTED else ""
            ending["extracted"] = [{"from": path, "status": "skipped", "message": why} for path, _ in job.request.extract]
        taken = job.log.taken()
        unheard = job.begun and "exit_code" not in ending and ending["reason"] != "start_failed"
        run = dataclasses.replace(
            job.run, finished=job.now(), logs_truncated=job.run.logs_truncated or job.log.truncated or unheard,
            timings={name: spent for name, spent in job.run.timings.items() if name not in unknown},
            log_bytes=[taken[1], taken[2], int(not job.taken_up)] if job.log.counted else [], **ending,
        )  # fmt: skip
        state = whole_state({**run.head(), "callback": None}, run.tail(), frames) if run.callback else {}
        state.pop("owner", None)
        packed = Callbacks.packed(job.request, to_json(state)) if state else None
        self._evictor.ended(run.id)
        self._insist(job, lambda: self._store.finish(run, frames, packed))
        if not run.artifacts:
            remove_tree(self._settings.artifacts_root() / run.id)  # of an extraction that was cut short
        with self._lock:
            del self._jobs[run.id]
        job.run = run
        job.done.set()
        job.log.nudge(ended=True)
        job.close_streams()
        job.held.close()
        self._tell_end(run)
        if run.callback:
            self._callbacks.owe(run.id)

    def _tell_end(self, run: Run) -> None:
        """One line of the log, and what is counted of it."""
        self.metrics.count("lightrun_runs_total", run.reason)
        for phase, spent in run.timings.items():
            self.metrics.observe("lightrun_run_phase_seconds", spent / 1000, phase)
        head = run.head()
        told = ("status", "reason", "image", "owner", "labels", "exitCode", "error", "durationMs", "timings", "usage", "warm")
        fields = {"run": run.id, **{name: head[name] for name in told if name in head}}
        usage = "".join(f" {name}={n}" for name, n in run.usage.items())
        code = "" if run.exit_code is None else f" exitCode={run.exit_code}"
        took = f" durationMs={head['durationMs']}"
        log.info("run %s %s (%s)%s%s%s", run.id, run.status, run.reason, code, took, usage, extra={"fields": fields})

    def stop(self, deadline: float) -> None:
        """Give runs with a waiting client until then (monotonic), then kill them and wait a little for their ends, and for what
        runs that have ended leave. The others go on without us."""
        with self._lock:
            attended = [job for job in self._jobs.values() if not job.request.detached]
        for job in attended:
            job.done.wait(max(0.0, deadline - time.monotonic()))
        left = [job for job in attended if job.run.waited and not job.done.is_set()]
        for job in left:
            with contextlib.suppress(LightrunError):
                self.ask(job.run.id, Ask("interrupted"))
        last = time.monotonic() + INTERRUPT_SECONDS
        for job in left:
            job.done.wait(max(0.0, last - time.monotonic()))
        while self.places.taken() > len(self._jobs) and time.monotonic() < last:
            time.sleep(SETTLE_POLL_SECONDS)


def _shift(low: float, high: float, earliest: float, latest: float) -> float:
    """Seconds to be added to another clock's times so that what it told, between `low` and `high`, lies between two of
    ours: none when it may well do so."""
    return max(0.0, earliest - high) or min(0.0, latest - low)


# --------------------------------------------------------------------------------------------------------------------
# Exec: a second command in a run that stays
# --------------------------------------------------------------------------------------------------------------------

# An engine runs a command in a container, and can't kill it. On this machine lightrun kills its process group itself, if it sees
# it and may. On a machine far away it can't; so in a run with `idle`, which has the shim (Warm) in its container from before its
# start, the shim is what is run: it tells its pid and its environment, and then becomes the command as it becomes a run's
# program, as the leader of a process group. To kill that, another shim is run, which calls kill(2). That needs no program of the
# image. Nothing is put into a container that runs: in a run without `idle`, or whose shim was tampered with, the command is run
# as it is.


class Exec:
    """A command in the container of a run in progress: what Job is to a run. Nothing of it outlives lightrun."""

    def __init__(self, job: Job, request: RunRequest, settings: Settings, tree: Tree, held: contextlib.ExitStack) -> None:
        self.job, self.request, self.tree, self.held = job, request, tree, held
        self.log = Log(settings.log_limit, settings.state_dir, request.output_limit)
        self.patience = Patience(HURRY_SECONDS)
        self.settled, self.done = threading.Event(), threading.Event()  # it has begun, or it has ended before; it has ended
        self.refusal: LightrunError | None = None  # why it has not begun
        self.born, self.began, self.ended = time.monotonic(), math.inf, math.inf
        self.pid = 0  # in the container; 0 where that cannot be told
        self.environment: list[str] = []
        self.reason, self.error, self.oom_killed = "engine_error", "", False  # as far as is known
        self.exit_code: int | None = None
        self.deaf = self.doubt = False  # its output has come to its end; some of it may be missing
        self.asked: tuple[str, str] | None = None  # reason and sentence of why it is to be killed
        self.starved = False  # the connection that carried its stdin broke
        self._lock = threading.Lock()  # guards asked

    def ask(self, reason: str, why: str) -> None:
        """Have it killed, from any thread and without waiting. What was asked first counts."""
        with self._lock:
            self.asked = self.asked or (reason, why)
        self.patience.ring(hurry=not self.settled.is_set())

    def listen(self, stream: Reply, seconds: float) -> None:
        """Take the next piece of the output, or wait so long."""
        if self.deaf:
            self.patience.sleep(max(0.001, seconds))
            return
        try:
            data = stream.next(self.patience.wake, seconds)
        except EngineError:
            data, self.doubt = b"", True
        self.log.feed(data or b"")
        self.deaf = data == b""

    def state(self) -> dict[str, Any]:
        """What became of it (SPEC 11)."""
        head = {
            "reason": self.reason, "exitCode": self.exit_code, "oomKilled": self.oom_killed or None, "error": self.error or None,
            "durationMs": round((self.ended - self.born) * 1000), "logsTruncated": self.doubt or self.log.truncated,
        }  # fmt: skip
        told = {name: value for name, value in head.items() if value is not None}
        return whole_state(told, {"splitLogs": self.request.split_logs}, self.log.frames())


BAD_WORKDIR = "cannot be made, or is not a folder that the run's user may enter"
ATTACH_BROKE = 126  # what an engine says of a command whose output it could not send, running or not


class Execs:
    """Runs commands in containers of runs, each on a thread from its start to its end."""

    def __init__(
        self, settings: Settings, store: Store, engine: Engine, evictor: Evictor,
        tree: Callable[[RunRequest, None, str | None], Tree], metrics: Metrics,
    ) -> None:  # fmt: skip
        self._settings, self._store, self._engine, self._evictor, self._tree = settings, store, engine, evictor, tree
        self._metrics, self.stopping = metrics, False
        self._lock = threading.Lock()  # guards _going_on
        self._going_on: set[Exec] = set()

    def admit(self, job: Job, request: RunRequest) -> Exec:
        """A command that has a place in its run, and is to be started. Raises Conflict, Unavailable, BadRequest."""
        if self.stopping:
            raise going_down(self._settings)
        with contextlib.ExitStack() as undone:
            held = undone.enter_context(self._evictor.hold(request, None))
            tree = self._tree(request, None, job.run.owner)
            tree.check()
            try:
                command = Exec(job, request, self._settings, tree, held)
            except OSError as error:
                raise Unavailable("busy", f"lightrun has no room for another command: {error.strerror}") from error
            undone.callback(command.patience.close)
            job.admit(command.patience, self._settings.max_exec)
            undone.pop_all()
            return command

    def start(self, command: Exec) -> None:
        """Start it. Raises Unavailable."""
        with self._lock:
            if not (stopping := self.stopping):
                self._going_on.add(command)
        if stopping:
            self._let_go(command)
            raise going_down(self._settings)
        try:
            threading.Thread(target=self._execute, args=(command,), name="exec", daemon=True).start()
        except RuntimeError as error:
            self._let_go(command)
            raise Unavailable("busy", f"lightrun has no room for another command: {error}") from error

    def stop(self, deadline: float) -> None:
        """Take no more, leave them time until then (monotonic), then kill them and wait a little for their ends."""
        with self._lock:
            self.stopping, left = True, list(self._going_on)
        for command in left:
            command.done.wait(max(0.0, deadline - time.monotonic()))
        last = time.monotonic() + INTERRUPT_SECONDS
        for command in left:
            command.ask("cancelled", "killed because lightrun goes down")
        for command in left:
            command.done.wait(max(0.0, last - time.monotonic()))

    def recover(self, job_of: Callable[[str], Job | None]) -> None:
        """Kill what an earlier daemon left of commands, for which nobody waits any more."""
        if left := self._store.execs():
            threading.Thread(target=self._recover, args=(left, job_of), name="exec", daemon=True).start()

    def _recover(self, left: list[tuple[str, str, int]], job_of: Callable[[str], Job | None]) -> None:
        kills: collections.Counter[str] = collections.Counter()
        pause = FIRST_LOOK_SECONDS
        while left:
            for exec_id, run_id, pid in list(left):
                job = job_of(run_id)
                if job is None or kills[exec_id] == MAX_EXEC_KILLS or self._is_over(job, exec_id, pid, kills):
                    left.remove((exec_id, run_id, pid))
                    with contextlib.suppress(LightrunError):  # the next daemon sees to it
                        self._store.end_exec(exec_id)
            time.sleep(pause)
            pause = RETRY_SECONDS

    def _is_over(self, job: Job, exec_id: str, pid: int, kills: collections.Counter[str]) -> bool:
        """Whether an earlier daemon's command has ended; it is killed if not."""
        try:
            if self._engine.command(exec_id)[0] is not None:
                return True
            self._kill(job, exec_id, pid)
            kills[exec_id] += 1
        except EngineMissing:  # an engine that was restarted under its containers knows of no commands in them
            self._kill(job, exec_id, pid)
            return True
        except EngineError as error:
            log.warning("exec in run %s: %s", job.run.id, error)
        return False

    # -- one command

    def _execute(self, command: Exec) -> None:
        """One command from its place to its end."""
        try:
            self._line(command, self._engine.for_one(command.patience))
        except LightrunError as error:
            command.error = str(error)
            if not command.settled.is_set():
                command.refusal = self._refusal(error)
        except Exception:
            log.exception("exec in run %s", command.job.run.id)
            command.error = "lightrun failed; its log says how"
        finally:
            self._let_go(command)
        if command.refusal is None:
            self._metrics.count("lightrun_execs_total", command.reason)
            fields = {"run": command.job.run.id, "reason": command.reason, "exitCode": command.exit_code}
            log.info("exec in run %s ended (%s)", command.job.run.id, command.reason, extra={"fields": fields})

    @staticmethod
    def _refusal(error: LightrunError) -> LightrunError | None:
        """What is told of a command that has not begun; None for a failure that is a result."""
        if isinstance(error, (EngineMissing, EngineConflict)):
            return Conflict(f"the run is not running any more: {error}", "not_running")
        if isinstance(error, EngineAbsent):
            return Unavailable("engine_unavailable", str(error), 5)
        return error if error.status < 500 or error.status == 503 else None

    def _let_go(self, command: Exec) -> None:
        command.job.dismiss(command.patience)  # before its client can ask for another
        command.ended = time.monotonic()
        command.settled.set()
        command.done.set()
        command.log.nudge(ended=True)
        command.held.close()
        command.patience.close()
        with self._lock:
            self._going_on.discard(command)

    def _line(self, command: Exec, engine: Engine) -> None:
        """shim, command, stdin, output, exit."""
        slot = command.job.slot
        kills = slot.kills() if slot else None
        exec_id, stream = self._enter(command, engine) or self._enter_plainly(command, engine)
        try:
            with contextlib.closing(stream):
                command.began = time.monotonic()
                command.settled.set()
                self._feed(command, stream)
                command.patience.beside = stream.wire, lambda: command.listen(stream, 0)
                try:
                    self._see_out(command, engine, exec_id, stream)
                except EngineMissing:
                    self._judge(command, engine, exec_id, None)
        except Exception:
            self._kill(command.job, exec_id, command.pid)
            raise
        finally:
            self._forget(command, exec_id)
        command.oom_killed = command.exit_code != 0 and kills is not None and slot is not None and (slot.kills() or 0) > kills

    def _record(self, command: Exec, exec_id: str) -> None:
        """For the next daemon to kill. A run that a client waits for is killed as a whole then."""
        if not command.job.run.waited:
            self._store.begin_exec(exec_id, command.job.run.id, command.pid)

    def _forget(self, command: Exec, exec_id: str) -> None:
        if not command.job.run.waited:
            with contextlib.suppress(LightrunError):  # the next daemon sees that it is gone
                self._store.end_exec(exec_id)

    def _enter(self, command: Exec, engine: Engine) -> tuple[str, Reply] | None:
        """Have the shim become the command; None when there is none, or it is not what it was."""
        machine = engine.machine() if command.job.has_shim else None
        if machine is None:
            return None
        exec_id = engine.create_command(command.job.container, [SHIM], self._env(command), "/")
        with contextlib.ExitStack() as opened:
            stream, heard = opened.enter_context(contextlib.closing(engine.start_command(exec_id))), False
            with contextlib.suppress(EngineAbsent):  # if it is not the shim that takes nothing, that shows in a moment
                heard = self._hear(command, stream, machine)
            if not heard:
                self._must_run(command, engine)
                command.job.has_shim = False
                return None
            opened.callback(self._forget, command, exec_id)
            self._become(command, engine, exec_id, stream, machine)
            opened.pop_all()
            return exec_id, stream

    def _enter_plainly(self, command: Exec, engine: Engine) -> tuple[str, Reply]:
        """Run the command itself. Raises BadRequest for a workdir that is not there: nothing can make it."""
        request, job = command.request, command.job
        workdir = request.workdir or job.request.workdir or "/"
        self._must_have(command, engine, workdir)
        command.pid = 0
        exec_id = engine.create_command(job.container, request.command or [], self._env(command), workdir)
        self._check(command)
        self._record(command, exec_id)
        try:
            return exec_id, engine.start_command(exec_id)
        except EngineAbsent as error:  # it may have begun
            self._kill(job, exec_id, 0)
            raise EngineError(f"it may not have begun, and was killed if it had: {error}") from error
        except LightrunError:
            self._forget(command, exec_id)
            raise

    @staticmethod
    def _env(command: Exec) -> dict[str, str]:
        """The run's variables, which a warm container was not made with, and its own over them."""
        return {**command.job.request.env, **command.request.env}

    def _must_have(self, command: Exec, engine: Engine, workdir: str) -> None:
        """Raises BadRequest for a workdir that is no folder in its container, Conflict when its run has ended."""
        mode = (engine.stat(command.job.container, workdir) or (0, ""))[0]
        if not mode & (GO_MODE_FOLDER | GO_MODE_LINK):
            self._must_run(command, engine)
            raise BadRequest(details=[problem(BAD_WORKDIR, "workdir")])

    @staticmethod
    def _must_run(command: Exec, engine: Engine) -> None:
        """Raises Conflict when its run has ended."""
        if not engine.inspect(command.job.container).running:
            raise Conflict("the run has ended", "not_running")

    @staticmethod
    def _check(command: Exec) -> None:
        """Raises Unavailable for one that is to be killed before it has begun: its shim ends with its connection."""
        if command.asked or command.job.dropped:
            raise Unavailable("stopping", command.asked[1] if command.asked else "its run is about to end")

    def _hear(self, command: Exec, stream: Reply, machine: Machine) -> bool:
        """Ask the shim for its pid and its environment; false when it does not answer as a shim does."""
        stream.wire.stream(HEAR_SECONDS)
        late = time.monotonic() + HEAR_SECONDS
        room, reader, told = SHIM_BASE + SHIM_ROOM // 2, FrameReader(), b""
        frame: list[tuple[Any, ...]] = [("readlinkat", 1, AT_FDCWD, _c("/proc/self"), room, 32), ("write", 32, 1, room, 32)]
        frame.append(("openat", 3, AT_FDCWD, _c("/proc/self/environ"), os.O_RDONLY))
        size, room = 32, room + 32
        while size == 32 or told[-2:] != bytes(2):  # an environment ends with one zero, and the room has no other bytes
            if room + ENVIRONMENT_PIECE > SHIM_BASE + SHIM_ROOM or time.monotonic() > late:
                return False
            frame += [("read", 0, 3, room, ENVIRONMENT_PIECE), ("write", ENVIRONMENT_PIECE, 1, room, ENVIRONMENT_PIECE)]
            size, room = size + ENVIRONMENT_PIECE, room + ENVIRONMENT_PIECE
            with asked_to("run a command in the container"):
                stream.wire.send(shim_frame(machine, frame))
            frame = []
            while len(told) < size:
                self._check(command)
                command.patience.heard()
                data = stream.next(command.patience.wake, late - time.monotonic())
                if data == b"" or time.monotonic() > late:
                    return False
                told += b"".join(bytes(payload) for number, payload in reader.feed(data or b"") if number == 1)
        stream.streamed()
        pid = told[:32].rstrip(b"\0")
        if len(told) > size or not re.fullmatch(rb"[0-9]{1,7}", pid) or int(pid) < 2:  # 1 is the init
            return False
        command.pid = int(pid)
        command.environment = [each.decode("utf-8", "surrogateescape") for each in told[32:].rstrip(b"\0").split(b"\0")]
        return True

    def _become(self, command: Exec, engine: Engine, exec_id: str, stream: Reply, machine: Machine) -> None:
        """Have the shim become the command. It is recorded before, for the next daemon to kill."""
        request, job = command.request, command.job
        workdir = request.workdir or job.request.workdir or "/"
        ways = way_to(workdir) if request.workdir else []
        folders = [("mkdirat", ANY_RESULT, AT_FDCWD, _c(way), 0o755) for way in ways]
        try:
            frames = [shim_frame(machine, [("close", 0, 3), *folders]), *hand_out_frames(
                machine, [], command.tree.pieces, workdir, request.stdin, request.command or [], command.environment, stays=True
            )]  # fmt: skip
        except ValueError as error:
            raise BadRequest(details=[problem("is too long, with env", "entrypoint")]) from error
        self._check(command)
        self._record(command, exec_id)
        command.log.hide(len(HANDED_OUT))
        with asked_to("run a command in the container"):
            for frame in frames:
                stream.wire.send(frame)
        late = time.monotonic() + ENGINE_SECONDS
        while command.log.hidden and not command.log.full and not command.asked:  # one that is to end may have begun
            command.patience.heard()
            data, code = None, None
            with contextlib.suppress(EngineAbsent, EngineMissing):
                data = stream.next(command.patience.wake, late - time.monotonic())
                code = self._exit(engine, exec_id) if data == b"" else None
            if data == b"" and code in {SHIM_GAVE_UP, 137, None}:
                self._must_run(command, engine)
            if code == SHIM_GAVE_UP:  # any other code may be the command's
                self._must_have(command, engine, workdir)
                raise EngineError("the command could not be started in the container")
            if not data and (data == b"" or time.monotonic() > late or not stream.wire.alive):
                command.ask("engine_error", "the engine did not say whether it has begun")
            command.log.feed(data or b"")

    @staticmethod
    def _exit(engine: Engine, exec_id: str) -> int | None:
        """The exit code of what has just closed its output, as soon as the engine has it; None when it goes on all the same."""
        pause = SETTLE_POLL_SECONDS
        while (code := engine.command(exec_id)[0]) is None and pause < QUIET_SECONDS:
            time.sleep(pause)
            pause *= 2
        return code

    def _feed(self, command: Exec, stream: Reply) -> None:
        """Write its stdin, by a thread of its own when it did not go before it."""
        data, wire = command.request.stdin, stream.wire
        wire.patience = None
        wire.stream(math.inf)  # the program may leave it waiting

        def write() -> None:
            try:
                for piece in command.tree.pieces(data) if data is not None else ():
                    wire.send(piece)
                wire.half_close()
            except (OSError, NotFound):
                command.starved = True
                command.patience.ring()

        if data is None or (is_fed_before(data) and command.pid):  # which the shim has got with the rest
            with contextlib.suppress(OSError):
                wire.half_close()
        else:
            threading.Thread(target=write, name="stdin", daemon=True).start()

    def _see_out(self, command: Exec, engine: Engine, exec_id: str, stream: Reply) -> None:
        """Read to the end of its output and of itself, and see to its limits. Nothing here trusts the stream to end."""
        kills, kill_at, killed_at = 0, command.began + command.request.timeout, math.inf
        pause, look_at = FIRST_LOOK_SECONDS, time.monotonic() + FIRST_LOOK_SECONDS
        while True:
            deaf = command.deaf
            command.patience.heard()
            if command.log.full and not command.asked:
                command.ask("output_limit", f"killed after its {command.request.output_limit} bytes of output")
            if time.monotonic() >= kill_at and not command.asked:
                command.ask("timeout", f"killed after its timeout of {command.request.timeout * 1000:.0f} ms")
            if command.asked and (not kills or time.monotonic() >= kill_at):
                self._kill_again(command, exec_id, kills)
                killed_at = min(killed_at, time.monotonic())
                kills, kill_at = kills + 1, time.monotonic() + KILL_SECONDS * 2**kills
                pause, look_at = FIRST_LOOK_SECONDS, time.monotonic() + SETTLE_POLL_SECONDS
            if time.monotonic() >= look_at or (command.starved and not command.asked):
                if (code := self._look(engine, exec_id)) is not None:
                    break
                command.doubt |= deaf and pause > FIRST_LOOK_SECONDS
                if command.starved:
                    command.ask("engine_error", STDIN_BROKE)
                pause = min(2 * pause, 1 if deaf else LOOK_SECONDS)
                look_at = time.monotonic() + pause
            if command.deaf == deaf:
                command.listen(stream, min(look_at, kill_at) - time.monotonic())
            if command.deaf != deaf:
                pause, look_at = SETTLE_POLL_SECONDS, time.monotonic()
        late = time.monotonic() + QUIET_SECONDS + 1  # longer than an engine waits for what others keep open
        while not command.deaf and (left := late - time.monotonic()) > 0:
            command.patience.heard()
            command.listen(stream, left)
        command.doubt |= not command.deaf or command.log.cut
        self._judge(command, engine, exec_id, code, killed_at)

    @staticmethod
    def _look(engine: Engine, exec_id: str) -> int | None:
        """Its exit code, None while it goes on or the engine does not say. Raises EngineMissing."""
        try:
            return engine.command(exec_id)[0]
        except EngineMissing:
            raise
        except EngineError as error:
            log.warning("exec: %s", error)
            return None

    def _judge(self, command: Exec, engine: Engine, exec_id: str, code: int | None, killed_at: float = math.inf) -> None:
        """Why it ended; its exit code if that is its own."""
        command.exit_code = code
        if command.asked and (command.log.hidden or (killed_at < math.inf and code == 137)):
            command.reason, command.error = command.asked
            command.exit_code = None if command.log.hidden else code  # the shim's, which has not become it
        elif code in {137, None} and self._has_run_ended(command, engine):
            command.reason, command.error, command.exit_code = "run_ended", "killed because its run ended", None
        elif code is None:
            command.error = "the engine does not know it any more"
            self._kill(command.job, exec_id, command.pid)
        elif code == ATTACH_BROKE and (self._kill(command.job, exec_id, command.pid) or command.doubt):
            command.exit_code, command.doubt = None, True
            command.error = "the connection that carried its output broke, and it was killed"
        else:
            command.reason = "exited"
            if command.asked and time.monotonic() > killed_at + KILL_SECONDS:
                command.error = f"it ended by itself, and could not be killed when it was to be ({command.asked[1]})"

    @staticmethod
    def _has_run_ended(command: Exec, engine: Engine) -> bool:
        """Whether its run is over, or in a moment: all that is in a container is killed before the engine says so."""
        job = command.job
        for pause in (0, 0.05, 0.1, 0.2):
            time.sleep(pause)
            if job.done.is_set() or job.dropped or job.run.phase != "running":
                return True
            try:
                if not engine.inspect(job.container).running:
                    return True
            except EngineMissing:
                return True
            except EngineError as error:
                log.warning("exec in run %s: %s", job.run.id, error)
        return False

    def _kill_again(self, command: Exec, exec_id: str, kills: int) -> None:
        """Kill what should end, for so many times before. Raises EngineError when that is of no use."""
        assert command.asked
        self._kill(command.job, exec_id, command.pid, command.patience.beside)
        if kills == MAX_EXEC_KILLS or not (self._engine.local or command.pid):
            command.reason, command.doubt = command.asked[0], True
            raise EngineError(f"{command.asked[1]}; but it could not be killed, and may go on until its run ends")

    def _kill(self, job: Job, exec_id: str, pid: int, beside: Beside | None = None) -> bool:
        """Have a command's process group killed: by us, or by a shim in its container, where it has this pid; whether it was
        seen to go on."""
        patience = Patience(KILL_SECONDS)  # for each call: whoever waits for the end has waited
        patience.beside = beside
        patience.ring(hurry=True)
        engine, seen, over = self._engine.for_one(patience), False, False
        try:
            with contextlib.suppress(EngineMissing):
                code, pid_here, container = engine.command(exec_id)
                over = code is not None  # as the engine says
                seen = code in {None, ATTACH_BROKE} and engine.local and kill_here(pid_here, container)
            if not seen and pid and (machine := engine.machine()):
                seen = self._kill_there(engine, machine, job.container, pid, over)
        except EngineError as error:
            log.warning("exec in run %s: %s", job.run.id, error)
        finally:
            patience.close()
        return seen

    @staticmethod
    def _kill_there(engine: Engine, machine: Machine, container: str, pid: int, over: bool = False) -> bool:
        """Have a shim kill a process group in its container, and if its leader is an init, that of the program it started;
        whether there is such a leader. Without one nothing is killed if the command may be `over`: what it left may go on."""
        room, told = SHIM_BASE + SHIM_ROOM // 2, b""
        with contextlib.closing(engine.start_command(engine.create_command(container, [SHIM], {}, "/"))) as stream:
            frame: list[tuple[Any, ...]] = [("readlinkat", ANY_RESULT, AT_FDCWD, _c(f"/proc/{pid}/exe"), room, 128)]
            frame.append(("openat", ANY_RESULT, AT_FDCWD, _c(f"/proc/{pid}/task/{pid}/children"), os.O_RDONLY))
            frame += [("read", ANY_RESULT, 3, room + 128, 128), ("write", 256, 1, room, 256)]
            with asked_to("kill a command"):
                stream.wire.send(shim_frame(machine, frame))
            reader, late = FrameReader(), time.monotonic() + KILL_SECONDS
            while len(told) < 256 and (data := stream.next(seconds=late - time.monotonic())):
                told += b"".join(bytes(payload) for _, payload in reader.feed(data))
            leader = told[:128].rstrip(b"\0")  # its program's path
            with asked_to("kill a command"):
                groups = [pid] if leader or not over else []
                groups += map(int, told[128:256].rstrip(b"\0").split()) if is_init(leader) else ()
                killing = [("kill", ANY_RESULT, -group, signal.SIGKILL) for group in groups]
                stream.wire.send(shim_frame(machine, [*killing, ("exit_group", 0, 0)]))
            stream.next(seconds=KILL_SECONDS)
        return bool(leader)


def is_init(path: bytes) -> bool:
    """Whether this is the init that an engine gives its containers, which puts its child into a group of its own."""
    return posixpath.basename(path.rstrip(b"\0")) in {b"docker-init", b"tini"}


def kill_here(pid: int, container: str) -> bool:
    """Kill a process group on this machine, and if its leader is an init, that of the program it started; false when it is not
    seen, is not that container's, or is not ours to kill."""
    process = Path(f"/proc/{pid}")
    try:
        if pid < 2 or not container or container not in (process / "cgroup").read_text():
            return False
        groups = [pid]
        if is_init(bytes((process / "exe").readlink())):
            groups += map(int, (process / f"task/{pid}/children").read_text().split())
        for group in groups:
            os.killpg(group, signal.SIGKILL)
    except (OSError, ValueError):
        return False
    return True


# --------------------------------------------------------------------------------------------------------------------
# Keeper: the engine's absence, and what must go
# --------------------------------------------------------------------------------------------------------------------


class Keeper:
    """Knows whether the engine answers, and removes the containers that no run in progress has."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._untidy = threading.Event()  # there may be such containers, or the engine is away
        self.engine_up = True

    def start(self, in_progress: Callable[[str], Any], slots: Slots, hire: Callable[[], None]) -> None:
        """Begin, with what an earlier daemon left. `in_progress` knows the ids of runs, `slots` is what their containers are in,
        `hire` runs those that wait."""
        self.tidy_up()
        threading.Thread(target=self._keep, args=(in_progress, slots, hire), name="keeper", daemon=True).start()

    def tidy_up(self) -> None:
        """Look for containers to be removed, as soon as the engine answers."""
        self._untidy.set()

    def answers(self) -> bool:
        """Whether the engine answers now; new runs are refused from a no until it does again."""
        try:
            self._engine.version()
        except EngineError:
            self.engine_up = False
            self._engine.forget()
            self.tidy_up()
            return False
        return True

    def _keep(self, in_progress: Callable[[str], Any], slots: Slots, hire: Callable[[], None]) -> None:
        pause = RETRY_SECONDS
        while True:
            if not self._untidy.wait(LOOK_SECONDS):
                hire()  # there may have been no thread when one was needed
                continue
            self._untidy.clear()
            try:
                left = self._sweep(in_progress, slots)
            except EngineError as error:
                if self.engine_up:  # an absence is told once
                    log.warning("%s; trying again", error)
                self.engine_up, left = not isinstance(error, EngineAbsent), 1
            except Exception:
                log.exception("keeper")
                left = 1
            hire()
            if left:
                for _ in range(round(pause / RETRY_SECONDS)):  # no longer than that while the engine is away
                    time.sleep(RETRY_SECONDS)
                    if not self.engine_up:
                        break
                pause = min(2 * pause, MAX_SWEEP_SECONDS) if self.engine_up else RETRY_SECONDS
                self.tidy_up()
            else:
                pause = RETRY_SECONDS

    def _sweep(self, in_progress: Callable[[str], Any], slots: Slots) -> int:
        """Remove what no run in progress has; how many could not be. One that cannot be removed stops no other."""
        stuck, runs, left = slots.stuck(), self._engine.left(), 0
        self.engine_up = True
        for run_id in runs:
            if not in_progress(run_id):
                try:
                    self._engine.remove(container_name(run_id))
                except EngineError as error:
                    log.warning("container of run %s: %s", run_id, error)
                    left += 1
        if not left:
            slots.loosen(stuck)
        return left


# --------------------------------------------------------------------------------------------------------------------
# HTTP API: parse, call, shape the answer
# --------------------------------------------------------------------------------------------------------------------


def while_there(call: Call, pieces: Generator[bytes, None, None], place: contextlib.ExitStack) -> Generator[bytes, None, None]:
    """Pieces for a client as they come, until it leaves; gives its place back in the end. First comes b"": a generator that
    has not begun would not, when it is closed."""
    import waitress.channel

    with place, contextlib.closing(pieces):
        yield b""
        try:
            for piece in pieces:
                if call.gone():
                    raise waitress.channel.ClientDisconnected
                if piece:
                    yield piece
        except (LogGap, LightrunError, OSError) as error:  # too late for a status: the connection just ends
            raise waitress.channel.ClientDisconnected from error


def _followed(output: Log, at: dict[int, int] | None = None) -> Iterator[bytes | None]:
    """What is kept of a log and all that comes; None where something is missing. `at`: see Log.follow."""
    followed = output.follow(at)
    while True:
        try:
            yield from followed
            return
        except LogGap:
            yield None
            followed = output.follow(at)
            next(followed)  # what is kept was told, but for the gap


def _log_events(
    followed: Iterable[bytes | None], at: Mapping[int, int], query: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The events of what is followed of a log, with an empty one after each piece: lines, or as the query may ask the bytes
    themselves. `at` tells how many bytes of each stream came up to the end of the first piece, and after a gap before the
    next."""
    shown: LineEvents | PieceEvents | None = None
    gap, before = False, True
    for kept in followed:
        if kept is None and not gap:
            yield from shown.end() if shown else ()
            yield {"event": "gap"}
            shown, before = None, False
        gap = kept is None or (gap and not kept)
        if shown is None and kept is not None:
            sizes = {number: len(raw_log(kept, name)) if before else 0 for number, name in STREAMS.items()}
            starts = {number: count - sizes[number] for number, count in at.items()}
            shown = PieceEvents(starts, query) if "encoding" in query else LineEvents()
        yield from shown.feed(kept or b"") if shown else ()
        yield {}
    yield from shown.end() if shown else ()


def _live(events: Iterator[dict[str, Any]]) -> Generator[bytes, None, None]:
    """Events as they happen, a line for each."""
    told = time.monotonic()
    for event in events:
        silent = time.monotonic() - told > PING_SECONDS
        if event or silent:
            told = time.monotonic()
        yield to_json(event or {"event": "ping"}) + b"\n" if event or silent else b""


def remote(environ: Mapping[str, Any], trusted: Sequence[str]) -> str:
    """The address that a request comes from: the last in X-Forwarded-For that no proxy we trust has, if a trusted one sent it."""
    networks = [ipaddress.ip_network(each) for each in trusted if each != "unix"]
    far = str(environ["REMOTE_ADDR"]).removeprefix("::ffff:")  # so an IPv4 address is called on an IPv6 socket
    hops = str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")[-MAX_HOPS:]
    with contextlib.suppress(ValueError, IndexError):  # what a proxy we trust was told by somebody else, or no more of it
        while (far == "localhost" and "unix" in trusted) or any(ipaddress.ip_address(far) in each for each in networks):
            hop = ipaddress.ip_address(hops.pop().strip())
            far = str(getattr(hop, "ipv4_mapped", None) or hop)
    return far


def _since(kept: bytes, start: int, stream: str | None, taken: Mapping[int, int], in_order: bool) -> bytes:
    """What is kept of a log from a byte of it on; `taken` tells how much there was of each stream, if that is known. Raises
    NoLongerKept."""
    if not taken:
        raise NoLongerKept("how much there was before what is kept is not known")
    total = total_of(taken, stream)
    first = total - len(kept)
    if stream is None and (first or not in_order):
        raise NoLongerKept("the order of the two streams may be another, or some was dropped; ask for one stream")
    if not first <= start <= total:
        raise NoLongerKept(f"bytes {first} to {total} are kept")
    return kept[start - first :]


def _for(call: Call, state: dict[str, Any]) -> dict[str, Any]:
    """A run's state, or its head, as this caller may see it."""
    if call.owner is not None:
        state.pop("owner", None)
    return state


def _outcome(command: Exec) -> dict[str, str]:
    """What became of a command, as header fields."""
    code = {} if command.exit_code is None else {"X-Exit-Code": str(command.exit_code)}
    return {**code, "X-Reason": command.reason, **({"X-Logs-Truncated": "true"} if command.doubt else {})}


@dataclasses.dataclass
class Answer:
    """What goes back to a client: bytes, a file (which holds no thread while it is sent), or pieces as they come."""

    status: int = 200
    body: bytes | IO[bytes] | Generator[bytes, None, None] = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON."""
    return Answer(status, to_json(value), {"Content-Type": JSON, **headers})


class Gone(Exception):
    """There is nobody to answer any more, or no time to have an answer."""


class Call:
    """One request to a route."""

    def __init__(self, environ: dict[str, Any], query: dict[str, Any], ending: threading.Event) -> None:
        self.environ, self.query, self._ending = environ, query, ending

    @property
    def owner(self) -> str | None:
        """The name of the token that it came with, whose runs alone it sees; None sees all."""
        owner: str | None = self.environ.get("lightrun.owner")
        return owner

    def header(self, name: str, default: Any = "") -> Any:
        """A header's text, the default when absent."""
        return self.environ.get("HTTP_" + name.upper().replace("-", "_"), default)

    def gone(self) -> bool:
        """Whether nobody may wait any longer: the client has closed its side of the connection, or lightrun ends."""
        return self._ending.is_set() or bool(self.environ["waitress.client_disconnected"]())

    def body(self, kinds: Sequence[str] = (JSON,)) -> tuple[str, IO[bytes]]:
        """The kind of the body, which must be one of these, and the body. Raises UnsupportedMediaType."""
        kind = self.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind not in kinds:
            raise UnsupportedMediaType(f"the body must be {' or '.join(kinds)}")
        return kind, self.environ["wsgi.input"]


STOP_SCHEMA = {
    "type": "object", "additionalProperties": False, "properties": {
        "signal": {"type": "string", "enum": sorted(known.name for known in signal.Signals), "default": "SIGTERM"},
        "grace": {"type": "integer", "minimum": 0, "maximum": 300_000, "default": 10_000, "description": "ms until SIGKILL"},
    },
}  # fmt: skip
RAN = {"running", "extracting"}  # phases in which a program has begun
STATUSES = ["running", "succeeded", "failed", "cancelled"]
LOG_QUERY: dict[str, dict[str, Any]] = {
    "stream": {"type": "string", "enum": list(STREAMS.values())},
    "tail": {"type": "integer", "minimum": 0, "maximum": 1_000_000_000},
    "follow": {"type": "boolean"},
    "from": {"type": "integer", "minimum": 0, "maximum": 1 << 50},
}
LIST_QUERY: dict[str, dict[str, Any]] = {
    "status": {"type": "string", "enum": STATUSES},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
    "before": {"type": "string", "minLength": 1, "maxLength": 100},
    "label": {
        "type": "string", "maxLength": 320, "pattern": _LABEL[:-1] + "=", "says": "must be the name of a label, = and its value",
    },
    "callback": {"type": "string", "enum": ["failed"]},
    "id": {"type": "string", "pattern": "^[a-z0-9_-]{1,100}$", "says": "must be the beginning of an id"},
}
EVENTS_QUERY: dict[str, dict[str, Any]] = {"encoding": {"type": "string", "enum": ["base64"]}}
WAIT_QUERY = {"wait": {"type": "integer", "minimum": 0, "maximum": 60_000}}


@dataclasses.dataclass(frozen=True)
class Route:
    """A row of the table of routes: what is served, and what OpenAPI says of it. `query` holds JSON Schema properties,
    `answers` what each status brings, but for those that follow by rule: media types and the names of their schemas."""

    method: str
    path: str
    handler: str
    summary: str
    answers: dict[int, dict[str, str]]
    query: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    body: str = ""  # name of its schema


RUNS, ARTIFACTS = "/runs/<run_id>", "/runs/<run_id>/artifacts"
ROUTES = (
    Route("GET", "/health", "health", "Whether lightrun and its engine are well", {200: {JSON: "Health"}, 503: {JSON: "Health"}}),
    Route(
        "POST", "/run", "run", "Run a container",
        {200: {JSON: "Run", EVENTS: "Event"}, 202: {JSON: "Accepted"}, 409: {}}, EVENTS_QUERY, body="RunRequest",
    ),
    Route("GET", "/runs", "runs", "List runs, newest first", {200: {JSON: "Runs"}}, LIST_QUERY),
    Route("GET", RUNS, "state", "The state of a run", {200: {JSON: "Run"}}, WAIT_QUERY),
    Route("DELETE", RUNS, "delete", "Delete a finished run and its artifacts", {204: {}, 409: {}}),
    Route("GET", f"{RUNS}/logs", "logs", "The raw bytes of a run's output", {200: {BYTES: "Bytes"}, 410: {}}, LOG_QUERY),
    Route(
        "GET", f"{RUNS}/events", "events", "A run as it happens, or happened", {200: {EVENTS: "Event"}},
        {**EVENTS_QUERY, "follow": {"type": "boolean", "default": True}, **dict.fromkeys(STREAMS.values(), LOG_QUERY["from"])},
    ),
    Route("POST", f"{RUNS}/cancel", "cancel", "Kill a run", {204: {}, 409: {}}),
    Route("POST", f"{RUNS}/stop", "stop", "Signal a run, and kill it if it does not end", {204: {}, 409: {}}, body="Stop"),
    Route("GET", ARTIFACTS, "artifacts", "List artifacts, or get them as one tar", {200: {JSON: "Artifacts", TAR: "Bytes"}}),
    Route("POST", f"{RUNS}/callback", "callback", "Send a callback that has failed again", {204: {}, 409: {}}),
    Route("GET", "/metrics", "metrics", "Figures for Prometheus", {200: {TEXT: "Text"}, 403: {}}),
    Route(
        "POST", f"{RUNS}/exec", "exec", "Run a second command in a run that goes on",
        {200: {JSON: "Exec", EVENTS: "Event", BYTES: "Bytes"}, 409: {}}, EVENTS_QUERY, body="ExecRequest",
    ),
    Route(
        "GET", f"{ARTIFACTS}/<path:path>", "artifact", "Download a file, list a folder, or get either as a tar",
        {200: {BYTES: "Bytes", JSON: "Artifacts", TAR: "Bytes"}, 206: {BYTES: "Bytes"}, 304: {}, 412: {}, 416: {}},
    ),
    Route("GET", "/openapi.json", "openapi", "This description", {200: {JSON: "Any"}}),
)  # fmt: skip


def parse_query(text: str, properties: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of a URL's query by a route's table. Raises BadRequest."""
    try:
        if len(text) > MAX_QUERY_BYTES:
            raise ValueError(f"has more than {MAX_QUERY_BYTES} bytes")
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError as error:
        raise BadRequest(details=[{"path": ["query"], "message": str(error)}]) from error
    values: dict[str, Any] = {}
    problems: list[dict[str, Any]] = []
    for name, value in pairs:
        kind = properties.get(name, {}).get("type")
        if name in values:
            problems.append({"path": ["query", name], "message": "stands twice"})
        numeric = kind == "integer" and re.fullmatch(r"-?\d{1,15}", value, re.ASCII)
        values[name] = int(value) if numeric else value == "true" if kind == "boolean" and value in {"true", "false"} else value
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    problems += problems_of(values, schema, ["query"])
    if problems:
        raise BadRequest(details=problems)
    return values


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and length of a Range header with one range, None for one to be ignored (RFC 9110, 14.2). Raises
    ValueError for one that no byte of the file is in."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip(), re.ASCII)
    if not match or match[1] == match[2] == "" or (match[1] and match[2] and int(match[2]) < int(match[1])):
        return None
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        raise ValueError("no such byte")
    return first, last - first + 1


def _has_etag(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in header.split(",")]


def _status_by_conditions(call: Call, etag: str, modified: int) -> int:
    """What a conditional request comes to: 412, 304 or 200 (RFC 9110, 13.2.2)."""
    tags, since = call.header("If-Match"), http_date(call.header("If-Unmodified-Since"))
    if not _has_etag(tags, etag) if tags else since is not None and since < modified:
        return 412
    tags, since = call.header("If-None-Match"), http_date(call.header("If-Modified-Since"))
    return 304 if (_has_etag(tags, etag) if tags else since is not None and since >= modified) else 200


def file_answer(call: Call, file: IO[bytes], name: str) -> Answer:
    """A file with RFC 9110's conditional requests and one range. Takes the file over."""
    about = os.fstat(file.fileno())
    modified, size, etag = int(about.st_mtime), about.st_size, f'"{about.st_mtime_ns:x}-{about.st_size:x}"'
    headers = {"ETag": etag, "Last-Modified": email.utils.formatdate(modified, usegmt=True)}
    status, part = _status_by_conditions(call, etag, modified), None
    if status == 200 and call.header("If-Range") in {"", etag, headers["Last-Modified"]}:
        try:
            part = byte_range(call.header("Range"), size)
        except ValueError:
            status, headers["Content-Range"] = 416, f"bytes */{size}"
    if status != 200:
        file.close()
        codes = {412: "precondition_failed", 416: "range_not_satisfiable"}
        return Answer(304, headers=headers) if status == 304 else json_answer({"error": codes[status]}, status, **headers)
    headers |= {"Content-Type": BYTES, "Content-Disposition": content_disposition(name), "Accept-Ranges": "bytes"}
    if part is None:
        return Answer(200, file, {**headers, "Content-Length": str(size)})
    first, length = part
    file.seek(first)
    headers |= {"Content-Length": str(length), "Content-Range": f"bytes {first}-{first + length - 1}/{size}"}
    return Answer(206, file, headers)


def content_disposition(name: str) -> str:
    """`attachment` with a name of any characters: RFC 6266 with RFC 8187, and an ASCII one for old clients."""
    plain = re.sub(r"[^ !#-\[\]-~]|%", "_", name)
    extended = "" if plain == name else f"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"
    return f'attachment; filename="{plain}"{extended}'


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


REFERENCE = "#/components/schemas/"
_TEXT, _COUNT, _MOMENT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}
_TRUE = {"const": True}
_NUMBERS = {"type": "object", "additionalProperties": _COUNT}
_HEAD_REQUIRED = "id status image createdAt logsTruncated"
_HEAD = {
    "id": _TEXT, "owner": _TEXT, "labels": {"type": "object", "additionalProperties": _TEXT},
    "status": {"enum": STATUSES}, "phase": {"enum": list(PHASES)}, "reason": {"enum": REASONS}, "image": _TEXT,
    "imageId": _TEXT, "createdAt": _MOMENT, "startedAt": _MOMENT, "finishedAt": _MOMENT, "exitCode": {"type": "integer"},
    "oomKilled": _TRUE, "error": _TEXT, "durationMs": _COUNT, "timings": _NUMBERS,
    "usage": {"type": "object", "properties": {"cpuMs": _COUNT, "memoryPeakBytes": _COUNT}}, "warm": _TRUE,
    "logsTruncated": {"type": "boolean"},
    "callback": _object("status attempts", status={"enum": ["pending", "delivered", "failed"]}, attempts=_COUNT, lastError=_TEXT),
}  # fmt: skip
ANSWERS = {
    "Run": _object(
        _HEAD_REQUIRED, **_HEAD, logs=_list(_TEXT), stdout=_TEXT, stderr=_TEXT, artifacts={"$ref": REFERENCE + "Artifacts"},
        extracted=_list(_object("from status", **{"from": _TEXT}, status={"enum": ["ok", "missing", "error", "skipped"]},
                                bytes=_COUNT, skipped=_COUNT, message=_TEXT)),
    ),
    "Runs": _list(_object(_HEAD_REQUIRED, **_HEAD)),
    "Artifact": _object("path bytes type", path=_TEXT, bytes=_COUNT, type={"enum": ["file", "directory"]}, mode=_TEXT),
    "Artifacts": _list({"$ref": REFERENCE + "Artifact"}),
    "Accepted": _object("id status url", id=_TEXT, status={"enum": STATUSES}, url=_TEXT),
    "Exec": _object(
        "reason durationMs logsTruncated", reason={"enum": EXEC_REASONS}, exitCode={"type": "integer"}, oomKilled=_TRUE,
        error=_TEXT, durationMs=_COUNT, logsTruncated={"type": "boolean"}, logs=_list(_TEXT), stdout=_TEXT, stderr=_TEXT,
    ),
    "Event": _object(
        "event", event={"enum": ["accepted", "pulling", "started", "log", "gap", "ping", "finished", "running"]}, id=_TEXT,
        stream={"enum": list(STREAMS.values())}, line=_TEXT, partial=_TRUE, at=_COUNT, base64=_TEXT,
        run={"$ref": REFERENCE + "Run"}, exec={"$ref": REFERENCE + "Exec"},
    ),
    "Health": _object(
        "status docker version runs", status={"enum": ["ok", "unavailable", "stopping"]}, version=_TEXT, node=_TEXT,
        runs=_NUMBERS, usage=_TRUE,
    ),
    "Error": _object(
        "error", error=_TEXT, message=_TEXT, details=_list(_object("path message", path={"type": "array"}, message=_TEXT))
    ),
    "Bytes": {"type": "string", "contentMediaType": BYTES},
    "Text": _TEXT,
    "Any": {"type": "object"},
}  # fmt: skip


def _operation(route: Route) -> dict[str, Any]:
    """A route as OpenAPI describes it."""

    def content(kinds: Mapping[str, str]) -> dict[str, Any]:
        return {"content": {kind: {"schema": {"$ref": REFERENCE + name}} for kind, name in kinds.items()}} if kinds else {}

    rules = {404: "<run_id>" in route.path, 415: route.body, 503: route.path.startswith(("/run", "/metrics"))}
    answers = {}
    for status in sorted({400, 401, 403, 413, 431, 500, *(status for status in rules if rules[status]), *route.answers}):
        kinds = route.answers.get(status) or ({JSON: "Error"} if status >= 400 else {})
        answers[str(status)] = {"description": http.client.responses[status], **content(kinds)}
    parameters = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in re.findall(r"<(\w+)", route.path)]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if route.handler == "run":
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": {**_TEXT, "minLength": 1, "maxLength": 200}})
    bodies = {JSON: route.body, **({FORM: "RunForm"} if route.handler == "run" else {})}
    body = {"requestBody": {"required": route.handler != "stop", **content(bodies)}} if route.body else {}
    open_to_all: dict[str, Any] = {"security": []} if route.path == "/health" else {}
    about = {"operationId": route.handler, "summary": route.summary, "parameters": parameters, "responses": answers}
    return {**about, **body, **open_to_all}


def openapi(settings: Settings, metered: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of all routes, from the table that serves them and the one that validates requests."""
    example = {"image": "alpine:3.19", "entrypoint": "echo hello"}
    form = {
        "type": "object", "required": ["run"], "additionalProperties": {"type": "string", "contentMediaType": BYTES},
        "properties": {"run": {"$ref": REFERENCE + "RunRequest"}, "tar": {"type": "string", "contentMediaType": TAR}},
        "description": "The request as run, files to be unpacked in the workdir as tar, and any others each under its path.",
    }  # fmt: skip
    request = {**request_schema(settings, metered), "examples": [example]}
    schemas = {"RunRequest": request, "RunForm": form, "ExecRequest": exec_schema(settings), "Stop": STOP_SCHEMA}
    schemas |= ANSWERS
    schemes = {"token": {"type": "http", "scheme": "bearer"}} if settings.token or settings.token_file else {}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(re.sub(r"<(\w+)(:path)?>", r"{\1}", route.path), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lightrun", "version": __version__, "license": {"name": "AGPL-3.0-or-later"}},
        "paths": paths,
        "components": {"schemas": schemas, **({"securitySchemes": schemes} if schemes else {})},
        "security": [{name: []} for name in schemes],
    }


@contextlib.contextmanager
def _accepted(run_id: str) -> Iterator[None]:
    """From here on a request has had its effect: no 503, at which a balancer would try elsewhere, leaves it."""
    try:
        yield
    except Unavailable as error:
        raise StorageUncertain(f"the run was accepted, and how it is cannot be told: {error}", id=run_id) from error


class Api:
    """The routes, as a WSGI application on waitress; bottle's router finds them."""

    def __init__(
        self, settings: Settings, store: Store, engine: Engine, runner: Runner, execs: Execs, evictor: Evictor,
        callbacks: Callbacks, metrics: Metrics,
    ) -> None:  # fmt: skip
        import bottle

        self._settings, self._store, self._engine = settings, store, engine
        self._runner, self._execs, self._evictor, self._callbacks, self._metrics = runner, execs, evictor, callbacks, metrics
        self._root = settings.artifacts_root()
        self._waiting_places = threading.BoundedSemaphore(settings.max_waiting)  # of requests that wait or stream
        self._health_lock = threading.Lock()  # held while the engine is asked
        self._engine_about: tuple[dict[str, str] | None, bool] | None = None  # its answer, if any, and whether usage can be had
        self.ending = threading.Event()  # tells all who wait or stream that the time is up
        self._router = bottle.Bottle()
        self._router.router.add_filter("path", lambda _: (r"[\s\S]+", None, None))  # a name may hold a newline
        for route in ROUTES:
            self._router.route(route.path, route.method, callback=route)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI (PEP 3333)."""
        import waitress.channel

        began, answer = time.monotonic(), Answer(499)  # as nginx calls it in its log: no client
        try:
            answer = self._answer(environ)
        except LightrunError as error:
            answer = json_answer(error.body(), error.status, **error.headers)
        except Gone as error:
            raise waitress.channel.ClientDisconnected from error
        except Exception:
            log.exception("%s %s", environ["REQUEST_METHOD"], printable(environ["PATH_INFO"]))
            answer = json_answer({"error": LightrunError.code}, 500)
        finally:
            method, path, took = environ["REQUEST_METHOD"], printable(environ["PATH_INFO"]), time.monotonic() - began
            self._metrics.count("lightrun_requests_total", environ.get("lightrun.route", "none"), answer.status)
            if self._settings.access_log == "on":
                fields = {"remote": remote(environ, self._settings.trust_proxy), "method": method, "path": path}
                fields |= {"status": answer.status, "ms": round(took * 1000)}
                log.info("%s %s %s %d %d ms", *fields.values(), extra={"fields": fields})
        body, headers = answer.body, {"X-Content-Type-Options": "nosniff", **answer.headers}
        if isinstance(body, bytes) and answer.status not in {204, 304}:
            headers["Content-Length"] = str(len(body))
        write = start_response(f"{answer.status} {http.client.responses[answer.status]}", list(headers.items()))
        if method == "HEAD":
            if not isinstance(body, bytes):
                body.close()
            return []
        if isinstance(body, bytes):
            body = self._spooled(body)
        if isinstance(body, bytes):
            return [body]
        if not isinstance(body, Generator):
            return environ["wsgi.file_wrapper"](body, COPY_BYTES)  # type: ignore[no-any-return]
        try:
            write(b"")  # the headers, which a follower of a silent run would otherwise wait for
        except BaseException:
            body.close()
            raise
        return body

    def _spooled(self, body: bytes) -> bytes | IO[bytes]:
        """A large answer as a file that has no name: thousands that nobody reads would fill the memory."""
        if len(body) <= MAX_UNREAD_BYTES:
            return body
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(tempfile.TemporaryFile(dir=self._settings.state_dir))
                file.write(body)
                file.seek(0)
            except OSError:  # a full disk, say: who asks for the state of things must have it all the same
                return body
            opened.pop_all()
            return file

    def _answer(self, environ: dict[str, Any]) -> Answer:
        import bottle

        try:
            environ["PATH_INFO"] = environ["PATH_INFO"].encode("latin-1").decode()
        except UnicodeError as error:
            raise BadRequest("the path is not UTF-8") from error
        try:
            found, arguments = self._router.match(environ)
        except bottle.HTTPError as error:
            if error.status_code == 405:
                raise MethodNotAllowed(
                    "the route does not take this method", headers={"Allow": error.headers["Allow"]}
                ) from error
            raise NotFound("there is no such route") from error
        if environ["PATH_INFO"].endswith("\n") and "path" not in arguments:  # which the router's `$` lets pass
            raise NotFound("there is no such route")
        route: Route = found.callback
        environ["lightrun.route"] = f"{route.method} {route.path}"
        call = Call(environ, parse_query(environ.get("QUERY_STRING", ""), route.query), self.ending)
        if call.owner is not None and "run_id" in arguments and self._owner(arguments["run_id"]) != call.owner:
            raise NotFound("there is no such run")
        answer: Answer = getattr(self, route.handler)(call, **arguments)
        return answer

    def _owner(self, run_id: str) -> str | None:
        """Whose run it is. Raises NotFound."""
        job = self._runner.job(run_id)
        return job.run.owner if job else self._store.owner(run_id)

    def _waiting_place(self) -> contextlib.ExitStack:
        """A place to wait or stream, which is given back when this is closed. Raises Unavailable when all are taken."""
        if not self._waiting_places.acquire(blocking=False):
            raise Unavailable("busy", "all places for waiting requests are taken")
        with contextlib.ExitStack() as place:
            place.callback(self._waiting_places.release)
            return place.pop_all()

    def metrics(self, call: Call) -> Answer:
        """GET /metrics"""
        if call.owner is not None:
            raise NotAllowed("metrics are told to a token that sees all", "forbidden")
        size, count = self._store.usage()
        runner = self._runner
        phases = runner.phases()
        figures: dict[str, dict[tuple[object, ...], float]] = {
            "lightrun_build_info": {(__version__,): 1},
            "lightrun_runs": {(phase,): phases.get(phase, 0) for phase in PHASES},
            "lightrun_places": {(): self._settings.max_concurrent + self._settings.queue},
            "lightrun_places_taken": {(): runner.places.taken()},
            "lightrun_waiting_places": {(): self._settings.max_waiting},
            "lightrun_waiting_places_taken": {(): self._settings.max_waiting - self._waiting_places._value},
            "lightrun_warm_starts_total": {(why,): number for why, number in runner.pools.counts.copy().items()},
            "lightrun_warm_containers": {(): runner.pools.waiting()},
            "lightrun_callback_attempts_total": {(how,): number for how, number in self._callbacks.counts.items()},
            "lightrun_callbacks_owed": {(): self._store.callbacks_owed()},
            "lightrun_stored_runs": {(): count}, "lightrun_stored_bytes": {(): size},
            "lightrun_evictions_total": {(): self._evictor.evicted},
            "lightrun_engine_up": {(): runner.keeper.engine_up},
        }  # fmt: skip
        text = self._metrics.text(figures | process_figures())
        return Answer(200, text.encode(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def callback(self, call: Call, run_id: str) -> Answer:
        """POST /runs/<id>/callback"""
        if self._runner.job(run_id):
            raise Conflict("the run is still running", "running")
        self._store.head(run_id)
        self._callbacks.send_again(run_id)
        return Answer(204)

    def health(self, call: Call) -> Answer:
        """GET /health"""
        if self._health_lock.acquire(timeout=0 if self._engine_about else HEALTH_SECONDS):
            try:  # one question at a time: a hung engine must not take all threads
                self._engine_about = self._engine.version(), self._runner.slots.able()
            except EngineError:
                self._engine_about = None, False
            finally:
                self._health_lock.release()
        running, queued = self._runner.counts()
        engine, metered = self._engine_about or (None, False)
        status = "stopping" if self._runner.leaving else "ok" if engine else "unavailable"
        about = {"status": status, "docker": bool(engine), "version": __version__, "runs": {"running": running, "queued": queued}}
        about |= {"node": self._settings.node} if self._settings.node else {}
        about |= {"engine": engine, **({"usage": True} if metered else {})} if engine else {}
        return json_answer(about, 200 if status == "ok" else 503)

    def openapi(self, call: Call) -> Answer:
        """GET /openapi.json"""
        return json_answer(openapi(self._settings, self._runner.metered()))

    def run(self, call: Call) -> Answer:
        """POST /run"""
        with contextlib.ExitStack() as place:
            run_id, job, detached = self._submit(call, place)
            place.enter_context(_accepted(run_id))
            if detached:
                status = job.run.status if job else json.loads(self._store.head(run_id))["status"]
                return json_answer({"id": run_id, "status": status, "url": f"/runs/{run_id}"}, 202, Location=f"/runs/{run_id}")
            place.enter_context(self._runner.attended(job))
            if EVENTS in call.header("Accept"):
                return self._streamed(call, _live(self._events(call, run_id, job, True)), EVENTS, place.pop_all())
            self._wait(call, job.done if job else None, math.inf)
            return json_answer(self._state(call, run_id, job))

    def _submit(self, call: Call, place: contextlib.ExitStack) -> tuple[str, Job | None, bool]:
        """The accepted run, and whether it is detached; the body, which may be large, is not held longer."""
        key = call.header("Idempotency-Key", None)
        if key is not None and not (1 <= len(key) <= 200 and key.isascii() and key.isprintable()):
            raise BadRequest("Idempotency-Key must have 1 to 200 printable ASCII characters")
        kind, body = call.body((JSON, FORM))
        upload: Upload | None = None
        with contextlib.ExitStack() as undone:
            if kind == FORM:
                place.enter_context(self._waiting_place())  # while it is checked, or for as long as the client waits
                upload = Upload.parse(body, call.environ["CONTENT_TYPE"])
                undone.callback(upload.close)
            raw = upload.read(upload.run) if upload and upload.run else body.read()
            request = RunRequest.parse(raw, self._settings, self._runner.metered(), upload)
            if not request.detached and not upload:
                place.enter_context(self._waiting_place())
            digest = upload.digest if upload else lambda: hashlib.sha256(raw).hexdigest()
            far = remote(call.environ, self._settings.trust_proxy)
            accepted = self._runner.submit(request, key, digest, upload, call.owner, far)
            undone.pop_all()
            return *accepted, request.detached

    @staticmethod
    def _wait(call: Call, event: threading.Event | None, seconds: float) -> None:
        """Until that happens, if it is not past, or the time is up. Raises Gone when the client goes before."""
        deadline = time.monotonic() + seconds
        while event and (left := deadline - time.monotonic()) > 0 and not event.wait(min(left, DISCONNECT_POLL_SECONDS)):
            if call.gone():
                raise Gone

    def _events(self, call: Call, run_id: str, job: Job | None, follow: bool) -> Iterator[dict[str, Any]]:
        """The events of a run, with an empty one now and then; those so far without `follow`."""
        at: dict[int, int] = {} if job else self._log_bytes(run_id)[0]
        followed = _followed(job.log, at) if job else iter([self._store.frames(run_id)])
        yield {"event": "accepted", "id": run_id}
        head = {} if job else json.loads(self._store.head(run_id))
        progress, started = None, False
        lacks = job.log.truncated if job else head["logsTruncated"]
        if lacks:
            yield {"event": "gap"}  # not from the beginning
        for event in _log_events(followed if follow else itertools.islice(followed, 1), at, call.query):
            if job and job.pull and job.pull.progress is not progress:
                progress = job.pull.progress
                yield {"event": "pulling", **progress}
            if not started and (event or "startedAt" in head or (job and (job.run.phase in RAN or job.run.started))):
                started = True
                yield {"event": "started"}
            yield event
        if not started and job and job.run.started:  # it was over before a word was told
            yield {"event": "started"}
        short = max((job.log.taken() if job else at).values(), default=math.inf) <= self._settings.log_limit
        if job:
            missing = follow and not job.log.full and (job.in_doubt or (short and job.run.logs_truncated and not lacks))
        else:
            missing = short and lacks and head["reason"] != "output_limit"
        if missing:
            yield {"event": "gap"}  # at the end, where no follower could be cut off
        if follow or job is None:
            yield {"event": "finished", "run": self._untold(call, self._state(call, run_id, job))}
        else:
            yield {"event": "running"}

    @staticmethod
    def _untold(call: Call, state: dict[str, Any]) -> dict[str, Any]:
        """A state at the end of events, without the output if that was told in bytes."""
        told = ("logs", *STREAMS.values()) if "encoding" in call.query else ()
        return {name: value for name, value in state.items() if name not in told}

    def exec(self, call: Call, run_id: str) -> Answer:
        """POST /runs/<id>/exec"""
        job, accept = self._runner.job(run_id), call.header("Accept")
        image = job.run.image if job else json.loads(self._store.head(run_id))["image"]
        request = RunRequest.parse_exec(call.body()[1].read(), self._settings, image)
        if job is None:
            raise Conflict("the run has ended", "not_running")
        with contextlib.ExitStack() as place:
            place.enter_context(self._waiting_place())
            command = self._execs.admit(job, request)
            followed: Iterator[bytes | None] = iter(())
            at: dict[int, int] = {}
            if EVENTS in accept or BYTES in accept:  # from before the start, so that nothing is missing
                followed = _followed(command.log, at)
                followed = itertools.chain([next(followed)], followed)
            place.callback(command.ask, "cancelled", "its client left")
            self._execs.start(command)
            self._wait(call, command.settled, math.inf)
            if command.refusal:
                raise command.refusal
            if EVENTS in accept:
                return self._streamed(call, _live(self._exec_events(call, command, followed, at)), EVENTS, place.pop_all())
            if BYTES in accept:
                return self._raw(call, command, followed, place)
            self._wait(call, command.done, math.inf)
            return json_answer(command.state())

    def _exec_events(
        self, call: Call, command: Exec, followed: Iterator[bytes | None], at: Mapping[int, int]
    ) -> Iterator[dict[str, Any]]:
        if command.began < math.inf:
            yield {"event": "started"}
        yield from _log_events(followed, at, call.query)
        if command.doubt:
            yield {"event": "gap"}
        yield {"event": "finished", "exec": self._untold(call, command.state())}

    def _raw(self, call: Call, command: Exec, followed: Iterator[bytes | None], place: contextlib.ExitStack) -> Answer:
        """Its stdout as bytes. What ended it stands in the head if it is over soon, and in any case behind a body that is sent as
        it comes."""
        held, late, piece = b"", time.monotonic() + PING_SECONDS, None
        for piece in followed:
            new = raw_log(piece or b"", "stdout")
            if new and not held:
                late = min(late, time.monotonic() + HELD_BACK_SECONDS)
            held += new
            if call.gone():
                raise Gone
            if piece is None or len(held) > HELD_BACK_BYTES or time.monotonic() > late:
                break
        else:
            return Answer(200, held, {"Content-Type": BYTES, **_outcome(command)})

        def pieces(first: bytes | None) -> Generator[bytes, None, None]:
            yield held
            if first is None:
                raise LogGap
            for each in followed:
                if each is None:
                    raise LogGap
                yield raw_log(each, "stdout")
            call.environ["lightrun.trailers"] = _outcome(command)  # header fields behind the body (RFC 9110, 6.5)

        answer = self._streamed(call, pieces(piece), BYTES, place.pop_all())
        answer.headers["Trailer"] = "X-Exit-Code, X-Reason, X-Logs-Truncated"
        return answer

    def runs(self, call: Call) -> Answer:
        """GET /runs"""
        limit, label = call.query.get("limit", 100), call.query.get("label", "").partition("=")
        status, before, callback, start = (call.query.get(name) for name in ("status", "before", "callback", "id"))
        try:
            heads = self._store.heads(status, before, limit + 1, call.owner, label[::2] if label[1] else None, callback, start)
        except NotFound as error:
            raise BadRequest(details=[{"path": ["query", "before"], "message": "is not the id of a run"}]) from error
        states = [json.loads(head) for head in heads[:limit]]
        running = {state["id"]: self._runner.job(state["id"]) for state in states if state["status"] == "running"}
        shown = [job.run.head() if (job := running.get(state["id"])) else state for state in states]
        answer = json_answer([_for(call, state) for state in shown])
        if len(heads) > limit:
            query = urllib.parse.urlencode({**call.query, "before": states[-1]["id"]})
            answer.headers["Link"] = f'</runs?{query}>; rel="next"'
        return answer

    def state(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>"""
        job = self._runner.job(run_id)
        if job and call.query.get("wait"):
            with self._waiting_place(), self._runner.attended(job), contextlib.suppress(Gone):
                self._wait(call, job.done, call.query["wait"] / 1000)
        return json_answer(self._state(call, run_id, job))

    def _state(self, call: Call, run_id: str, job: Job | None) -> dict[str, Any]:
        if job:
            return _for(call, job.state())
        head = json.loads(self._store.head(run_id))
        return _for(call, whole_state(head, self._store.tail(run_id), self._store.frames(run_id)))

    def logs(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>/logs"""
        stream, tail, start = (call.query.get(name) for name in ("stream", "tail", "from"))
        if tail is not None and start is not None:
            raise BadRequest(details=[problem("cannot go together with from", "query", "tail")])
        job, at = self._runner.job(run_id), dict[int, int]()
        if job and start is not None and total_of(job.log.taken(), stream) < start:
            with self._waiting_place():
                job.catch_up(start, stream)
        followed = job.log.follow(at) if job else None
        kept = raw_log(next(followed) if followed else self._store.frames(run_id), stream)
        if start is not None:
            taken, in_order = (at, not job.taken_up) if job else self._log_bytes(run_id)
            kept = _since(kept, start, stream, taken, in_order)
        kept = last_lines(kept, tail)
        if followed is None or not call.query.get("follow"):
            return Answer(200, kept, {"Content-Type": BYTES})

        def pieces(followed: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
            with contextlib.closing(followed):
                yield kept
                yield from (raw_log(piece, stream) for piece in followed)

        return self._streamed(call, pieces(followed), BYTES)

    def _log_bytes(self, run_id: str) -> tuple[dict[int, int], bool]:
        """How many bytes each stream of a finished run had, if that is known, and whether what is kept has them in the order
        they were read in."""
        if found := self._store.tail(run_id).get("logBytes"):
            return {1: found[0], 2: found[1]}, bool(found[2])
        if json.loads(self._store.head(run_id))["logsTruncated"]:
            return {}, False
        kept = self._store.frames(run_id)  # an earlier build's
        return {number: len(raw_log(kept, name)) for number, name in STREAMS.items()}, False

    def events(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>/events"""
        job = self._runner.job(run_id)
        if job is None:
            self._store.head(run_id)
        if "encoding" not in call.query and call.query.keys() & set(STREAMS.values()):
            raise BadRequest("stdout and stderr, the bytes from which on to tell, need encoding=base64")
        return self._streamed(call, _live(self._events(call, run_id, job, call.query.get("follow", True))), EVENTS)

    def delete(self, call: Call, run_id: str) -> Answer:
        """DELETE /runs/<id>"""
        self._evictor.remove(run_id)
        return Answer(204)

    def cancel(self, call: Call, run_id: str) -> Answer:
        """POST /runs/<id>/cancel"""
        self._runner.ask(run_id, Ask("cancelled"))
        return Answer(204)

    def stop(self, call: Call, run_id: str) -> Answer:
        """POST /runs/<id>/stop"""
        sent = call.environ.get("CONTENT_LENGTH") not in {None, "", "0"}
        wanted = _checked(call.body()[1].read(), STOP_SCHEMA) if sent else {}
        self._runner.ask(run_id, Ask("stopped", wanted.get("signal", "SIGTERM"), wanted.get("grace", 10_000) / 1000))
        return Answer(204)

    def artifacts(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>/artifacts"""
        kept = self._artifacts(run_id)
        if TAR not in call.header("Accept"):
            return json_answer(kept)
        return self._tar(call, run_id, kept, "", run_id)

    def artifact(self, call: Call, run_id: str, path: str) -> Answer:
        """GET /runs/<id>/artifacts/<path>"""
        if ".." in path.split("/"):
            raise BadRequest("a path must not have .. segments")
        kept, path = self._artifacts(run_id), path.removesuffix("/")
        if all(entry["path"] != path for entry in kept):
            raise NotFound("there is no such artifact")
        if TAR in call.header("Accept"):
            below = [entry for entry in kept if f"{entry['path']}/".startswith(f"{path}/")]
            return self._tar(call, run_id, below, posixpath.dirname(path), posixpath.basename(path))
        if file := open_artifact(self._root / run_id, path):
            return file_answer(call, file, posixpath.basename(path))
        return json_answer([entry for entry in kept if posixpath.dirname(entry["path"]) == path])

    def _tar(self, call: Call, run_id: str, kept: Iterable[dict[str, Any]], folder: str, name: str) -> Answer:
        answer = self._streamed(call, artifacts_tar(self._root / run_id, kept, folder), TAR)
        answer.headers["Content-Disposition"] = content_disposition(f"{name}.tar")
        return answer

    def _artifacts(self, run_id: str) -> list[dict[str, Any]]:
        return [] if self._runner.job(run_id) else list(self._store.tail(run_id).get("artifacts", []))

    def _streamed(
        self, call: Call, pieces: Generator[bytes, None, None], kind: str, place: contextlib.ExitStack | None = None
    ) -> Answer:
        """Pieces for a client, from a thread that they hold: one of the places, taken before the headers are sent."""
        body = while_there(call, pieces, place or self._waiting_place())
        next(body)
        return Answer(200, body, {"Content-Type": kind})


# --------------------------------------------------------------------------------------------------------------------
# Serving: sockets, the gate, signals, logs
# --------------------------------------------------------------------------------------------------------------------


class Gate:
    """What is judged as soon as a request's headers are complete."""

    def __init__(
        self, tokens: Iterable[Token], check_host: bool, check_origin: bool, metrics: Metrics, trusted: Sequence[str] = ()
    ) -> None:
        self._metrics, self._trusted = metrics, trusted
        self._check_host, self._check_origin = check_host, check_origin
        self.closing = False  # then every answer is the last one of its connection
        self.take(tokens)

    def take(self, tokens: Iterable[Token]) -> None:
        """Know these tokens, and no others, from now on."""
        self._known = [(hashlib.sha256(token.text.encode()).digest(), token) for token in tokens]

    def judge(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> tuple[tuple[int, dict[str, Any], dict[str, str]] | None, str | None]:
        """Status, body and headers of a refusal, None for none; and the name of the token that it came with. `headers` as WSGI
        names them, their bytes as latin-1."""
        token = self._token(headers.get("AUTHORIZATION", "")) if self._known else None
        if self._known and token is None and path != "/health":
            message = "needs Authorization: Bearer <token>"
            return (401, {"error": "unauthorized", "message": message}, {"WWW-Authenticate": "Bearer"}), None
        forbidden = ""
        if self._check_host and not is_loopback_host(headers.get("HOST", "")):
            forbidden = "Host must name this machine; set a token to serve others"
        foreign = "ORIGIN" in headers or headers.get("SEC_FETCH_SITE", "none") not in {"same-origin", "none"}
        if self._check_origin and method in {"POST", "DELETE"} and foreign:  # a page's form needs nobody's leave to post
            forbidden = "a web page may not do that; set a token to allow it"
        refusal = (403, {"error": "forbidden", "message": forbidden}, dict[str, str]()) if forbidden else None
        return refusal, token.owner if token else None

    def tell_refusal(self, far: str, method: str, path: str, headers: Mapping[str, str], status: int) -> None:
        """One line of the log, and one more to count, for what comes no further."""
        far = remote({"REMOTE_ADDR": far, "HTTP_X_FORWARDED_FOR": headers.get("X_FORWARDED_FOR", "")}, self._trusted)
        self._metrics.count("lightrun_requests_total", "none", status)
        fields = {"remote": far, "method": printable(method), "path": printable(path), "status": status}
        log.info("refused %s %s from %s: %d", fields["method"], fields["path"], far, status, extra={"fields": fields})

    def _token(self, authorization: str) -> Token | None:
        """Compares with every token, and digests of one length, so that time tells nothing of either."""
        scheme, _, text = authorization.partition(" ")
        digest = hashlib.sha256(text.strip(" \t").encode("latin-1", "replace")).digest()
        found = [token for known, token in self._known if hmac.compare_digest(digest, known)]
        return found[0] if found and scheme.lower() == "bearer" else None


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine, with any port: no name that somebody else's DNS could point here."""
    match = re.fullmatch(r"(\[::1\]|[a-z0-9.-]+)(:\d{1,5})?", host.strip().lower(), re.ASCII)
    if not match:
        return False
    name = match[1]
    if name in {"localhost", "[::1]"} or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


def is_length_certain(header: bytes, version: str, content_length: bool) -> bool:
    """Whether no other server on the way could find another end of this request's body (RFC 9112, 6.1 and 6.3)."""
    encodings = re.findall(rb"(?im)^transfer-encoding[ \t]*:[ \t]*(.*?)[ \t]*\r?$", header)
    return not encodings or ([name.lower() for name in encodings] == [b"chunked"] and version == "1.1" and not content_length)


def _spooling_parser(folder: Path) -> type:
    """waitress's reading of requests, where a large body becomes a file of this folder: the system's own for temporary files
    may be memory."""
    import waitress.buffers
    import waitress.parser

    class Spool(waitress.buffers.OverflowableBuffer):
        file: Any = None

        def _set_large_buffer(self) -> None:
            self.file = tempfile.NamedTemporaryFile("w+b", dir=folder, prefix="upload-")  # noqa: SIM115
            self.buf: Any = waitress.buffers.FileBasedBuffer(self.file, self.buf)
            self.overflowed = True

        def drop(self) -> None:
            # A close tries again what found no room. Python's own, when the file is forgotten, would show a traceback.
            if self.file is not None:
                with contextlib.suppress(OSError):
                    self.file.close()

    class Parser(waitress.parser.HTTPRequestParser):
        spool: Spool | None = None

        def parse_header(self, header_plus: bytes) -> None:
            try:
                super().parse_header(header_plus)
            except (ValueError, waitress.parser.TransferEncodingNotImplemented) as error:
                raise waitress.parser.ParsingError("a header cannot be understood") from error
            if not is_length_certain(header_plus, self.version, "CONTENT_LENGTH" in self.headers):
                raise waitress.parser.ParsingError("the length of the body is not certain")
            if self.body_rcv is None:
                self.expect_continue = False  # there is nothing to wait for
            else:
                self.body_rcv.buf = self.spool = Spool(self.adj.inbuf_overflow)

        def received(self, data: bytes) -> int:
            refusal: Any = None
            try:
                consumed = int(super().received(data))
                body: Any = self.body_rcv
                if self.chunked and len(body.control_line) + len(body.trailer) > MAX_HEADER_BYTES:
                    refusal = BadRequest("the line before a chunk, or what follows the last one, is too long")
            except OSError as error:
                if self.spool is not None:
                    self.spool.drop()
                why = f"the body cannot be written to the state dir: {error.strerror}"
                refusal = Unavailable("storage_unavailable", why, 5)
            if refusal is None:
                return consumed
            self.error, self.completed = refusal, True
            return len(data)

    return Parser


def _parser_class(gate: Gate, folder: Path) -> type:
    """waitress's reading of requests with this gate, and JSON for the errors that it answers by itself."""
    import waitress.utilities

    base: Any = _spooling_parser(folder)

    class JsonError(waitress.utilities.Error):
        def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str]) -> None:
            self.code, self._json, self._headers = status, to_json(body), headers

        def to_response(self, ident: str | None = None) -> Any:
            headers = [("Content-Type", JSON), *self._headers.items()]
            return f"{self.code} {http.client.responses[self.code]}", headers, self._json

    class Parser(base):  # type: ignore[misc]  # a class made here
        _error: JsonError | None = None
        _judged = False
        command = path = ""
        owner: str | None = None  # the name of its token
        remote = ""  # the other end of its connection

        @property
        def error(self) -> JsonError | None:
            return self._error

        @error.setter
        def error(self, error: Any) -> None:
            if isinstance(error, LightrunError):
                error = JsonError(error.status, error.body(), error.headers)
            elif error is not None and not isinstance(error, JsonError):
                codes = {400: "bad_request", 413: "too_large", 431: "headers_too_large", 501: "not_implemented"}
                limit = self.adj.max_request_body_size - 1
                more = {"message": f"the body has more than {limit} bytes, which is --body-limit"} if error.code == 413 else {}
                error = JsonError(error.code, {"error": codes.get(error.code, LightrunError.code), **more}, {})
            if error is not None and self.command == "HEAD":
                error._json = b""
            self._error = error
            self.expect_continue = False  # no "100 Continue" before a refusal

        def received(self, data: bytes) -> int:
            consumed: int = super().received(data)
            if self.headers_finished and not self._judged and not self.empty:
                self._judged = True
                malformed = self.error and self.error.code != 413
                refusal, self.owner = (None, None) if malformed else gate.judge(str(self.command), self.path, self.headers)
                if refusal:
                    self.error, self.completed = JsonError(*refusal), True
            if self.error:  # and so it is complete: what follows is no request
                gate.tell_refusal(self.remote, str(self.command), self.path, self.headers, self.error.code)
                return len(data)
            return consumed

    return Parser


def _lingering_class(base: Any) -> type:
    """waitress's connections, of which none is closed while its client still sends what was refused. That would reset it, and
    the client might never read the refusal: RFC 9112, 9.6."""

    class Lingering(base):  # type: ignore[misc]  # what is overridden is not in waitress's types
        lingers = 0.0  # until then (monotonic) what still comes is thrown away
        _refused = False

        @property
        def last_activity(self) -> float:
            return self._active

        @last_activity.setter
        def last_activity(self, _: float) -> None:  # waitress tells that of a clock which may be set
            self._active = time.monotonic()

        def received(self, data: bytes) -> bool:
            return bool(self.requests and self.requests[-1].error) or bool(super().received(data))  # nothing after a refusal

        def service(self) -> None:
            self._refused = self.requests[0].error is not None
            super().service()

        def handle_write(self) -> None:
            if self._refused and self.close_when_flushed and not self.requests:
                self._flush_exception(self._flush_some)
                if not (self.total_outbufs_len or self.will_close):
                    self._linger()
                    return
            super().handle_write()

        def _linger(self) -> None:
            self.close_when_flushed, self.lingers = False, time.monotonic() + LINGER_SECONDS
            with contextlib.suppress(OSError, AttributeError):  # it was closed just now
                self.socket.shutdown(socket.SHUT_WR)

        def handle_read(self) -> None:
            if not self.lingers:
                super().handle_read()
            elif not self._more() or time.monotonic() > self.lingers:
                self.handle_close()

        def _more(self) -> bytes:
            with contextlib.suppress(OSError):
                return bytes(self.recv(self.adj.recv_bytes))
            return b""

    return Lingering


def _channel_class(gate: Gate, folder: Path) -> type:
    """waitress's connections, of which none may hold a thread by not reading, but a stream that has its place for that."""
    import waitress.channel
    import waitress.task

    base: Any = _lingering_class(waitress.channel.HTTPChannel)

    class Task(waitress.task.WSGITask):
        def get_environment(self) -> dict[str, Any]:
            environ: dict[str, Any] = super().get_environment()
            environ["lightrun.owner"] = self.request.owner  # type: ignore[attr-defined]  # it is a Parser of ours
            return environ

        def finish(self) -> None:
            trailers = (self.environ or {}).get("lightrun.trailers")
            if not (self.chunked_response and trailers):
                super().finish()
                return
            fields = "".join(f"{name}: {text}\r\n" for name, text in trailers.items())
            self.channel.write_soon(f"0\r\n{fields}\r\n".encode("latin-1"))

    parser_class = _parser_class(gate, folder)

    class Channel(base):  # type: ignore[misc]  # what is overridden is not in waitress's types
        def parser_class(self, adj: Any) -> Any:
            parser = parser_class(adj)
            parser.remote = str(self.addr[0]) if isinstance(self.addr, tuple) else "localhost"
            return parser

        task_class = Task
        _writing = False

        def service(self) -> None:
            if gate.closing:
                self.requests[0].headers["CONNECTION"] = "close"
            super().service()

        def write_soon(self, data: Any) -> int:
            self._writing = True
            try:
                return int(super().write_soon(data))
            finally:
                self._writing = False

        def _flush_outbufs_below_high_watermark(self) -> None:
            if self._writing:
                super()._flush_outbufs_below_high_watermark()
            elif self.total_outbufs_len > MAX_UNREAD_BYTES:  # a client that pipelines and does not read
                with self.requests_lock:
                    del self.requests[1:]
                self.close_when_flushed = True

    return Channel


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on: systemd's, a Unix one, or TCP. Raises StartError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS"):
        return _passed_socket(os.environ["LISTEN_FDS"])
    place = settings.socket or f"{settings.host}:{settings.port}"
    try:
        if settings.socket:
            return _listen_unix(settings.socket, settings.socket_mode)
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return _bound(socket.socket(family), address)
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot listen on {place}: {getattr(error, 'strerror', None) or error}") from error


def _passed_socket(count: str) -> socket.socket:
    """The socket that systemd passes; see sd_listen_fds(3) and systemd.socket(5). Raises StartError."""
    if count != "1":
        raise StartError(f"LISTEN_FDS is {count}: lightrun takes one socket of systemd")
    try:
        passed = socket.socket(fileno=3)
        listens = passed.type == socket.SOCK_STREAM and passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"LISTEN_FDS: what systemd passes is not a socket: {error.strerror}") from error
    if not listens or passed.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}:
        raise StartError("LISTEN_FDS: what systemd passes must be a TCP or Unix socket that listens")
    return passed


def _listen_unix(path: Path, mode: int) -> socket.socket:
    """A Unix socket that nobody can connect to before it has its mode. Only a dead one is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(f"{path} is there and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise StartError(f"another server listens on {path}")
    previous = os.umask(0o777)
    try:
        sock = _bound(socket.socket(socket.AF_UNIX), str(path))
    finally:
        os.umask(previous)
    path.chmod(mode)
    return sock


def _bound(sock: socket.socket, address: Any) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Server:
    """waitress on one socket: it pauses when it can accept no more connections, and it can end."""

    def __init__(self, settings: Settings, sock: socket.socket, api: Api, gate: Gate) -> None:
        import waitress.server

        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % sys.maxsize  # -1 is no limit
        self._resume = 0.0  # when to accept again, in monotonic seconds
        self._told = -math.inf  # when it was last said that it pauses
        server: Any = waitress.server.create_server(
            api,
            sockets=[sock],
            threads=settings.max_waiting + CONTROL_THREADS,
            connection_limit=min(MAX_CONNECTIONS, descriptors // 3),  # each may have a file as well, and runs need some
            backlog=BACKLOG,
            recv_bytes=64 * KIB,
            max_request_body_size=settings.body_limit + 1,  # waitress refuses what is not below
            max_request_header_size=MAX_HEADER_BYTES,
            inbuf_overflow=MAX_UNREAD_BYTES,
            outbuf_high_watermark=MAX_UNREAD_STREAM_BYTES,
            ident=None,
            log_socket_errors=False,  # of clients that vanish
            asyncore_use_poll=True,  # select() fails on descriptors over 1023
            clear_untrusted_proxy_headers=False,  # --trust-proxy says whose count
            channel_request_lookahead=1,  # so that a client that left is noticed
        )
        self._server = server
        self._loop = threading.Thread(target=server.run, name="server", daemon=True)
        server.adj.socket_options = [*server.adj.socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        server.channel_class = _channel_class(gate, settings.state_dir / "secrets")
        server.accept, server.readable, server.maintenance = self._accept, self._readable, self._close_stalled

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._loop.start()

    def settle(self, until: float) -> bool:
        """Wait (monotonic seconds) for the moment when nobody waits for an answer; whether it came."""
        return self._reach(self._is_quiet, until)

    def end(self, until: float) -> None:
        """Accept no more connections, leave until then (monotonic seconds) to the last answers, and close everything. All
        but the waiting is done by the thread of the loop, which then ends."""
        server = self._server
        server.trigger.pull_trigger(self._stop_accepting)
        if not self._reach(lambda: not server.accepting and self._is_quiet(), until):
            log.warning("some clients did not take their answers in time")
        server.trigger.pull_trigger(self._close_all)
        server.task_dispatcher.set_thread_count(0)
        if self._reach(lambda: not (server.task_dispatcher.threads or self._loop.is_alive()), until):
            server.trigger.close()  # which a thread that comes too late would still pull

    @staticmethod
    def _reach(condition: Callable[[], bool], until: float) -> bool:
        while not (reached := condition()) and time.monotonic() < until:
            time.sleep(SETTLE_POLL_SECONDS)
        return reached

    def _is_quiet(self) -> bool:
        """Whether no request is being received, waits in a socket, or has an answer that is not sent."""
        poll = select.poll()
        for channel in list(self._server.active_channels.values()):
            incoming = channel.request
            if channel.lingers:
                continue
            if channel.requests or channel.total_outbufs_len or (incoming and incoming.headers_finished):
                return False
            with contextlib.suppress(TypeError, ValueError):  # it was closed just now
                poll.register(channel.socket, select.POLLIN)
        return not poll.poll(0)

    def _stop_accepting(self) -> None:
        import waitress.wasyncore

        for _ in range(BACKLOG):  # who has connected has a right to an answer
            self._server.handle_accept()
        waitress.wasyncore.dispatcher.close(self._server)

    def _close_all(self) -> None:
        for channel in list(self._server.active_channels.values()):
            channel.handle_close()
        self._server._map.clear()  # which ends the loop

    def _readable(self) -> bool:
        """Called once in each round of the loop: whether to accept connections."""
        server, now = self._server, time.monotonic()
        if now >= server.next_channel_cleanup:
            server.next_channel_cleanup = now + server.adj.cleanup_interval
            server.maintenance(now)
        if len(server.active_channels) >= server.adj.connection_limit:
            self._pause(f"{server.adj.connection_limit} are open")
        return server.accepting and now >= self._resume

    def _accept(self) -> Any:
        import waitress.wasyncore

        try:
            return waitress.wasyncore.dispatcher.accept(self._server)
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                self._pause(str(error.strerror))
            return None  # or it was the connection's fault: accept(2)

    def _pause(self, why: str) -> None:
        now = time.monotonic()
        self._resume = now + ACCEPT_PAUSE_SECONDS
        if now > self._told + COMPLAIN_SECONDS:
            self._told = now
            log.warning("new connections must wait: %s", why)

    def _close_stalled(self, now: float) -> None:
        """waitress's regular look at its connections, and an end for those whose full buffer nobody reads: each would hold
        the thread that fills it."""
        server = self._server
        type(server).maintenance(server, now)
        for channel in server.active_channels.values():
            full = channel.total_outbufs_len > server.adj.outbuf_high_watermark
            if full and channel.last_activity < now - server.adj.channel_timeout:
                channel.will_close = True


class Daemon:
    """Everything, put together. Several fit in one process."""

    def __init__(self, settings: Settings) -> None:
        tokens, engine_is = settings.tokens(), engine_address(settings, os.environ)
        self._settings = settings
        self._socket = listen(settings)
        with contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            undo.callback(self._remove_socket)
            self._store = Store(settings.state_dir)
            undo.callback(self._store.close)
            _claim_artifacts_dir(settings.artifacts_root(), self._store.id)
            metrics, self._engine = Metrics(), Engine(settings, self._store.id)
            self._engine.count_failure = functools.partial(metrics.count, "lightrun_engine_errors_total")
            try:
                self._engine.check_limits()
            except EngineError as error:
                log.warning("%s; serving all the same", engine_is.trouble() or error)
            evictor = Evictor(self._store, settings)
            callbacks = Callbacks(self._store, settings.callback_allow)
            self._runner = Runner(settings, self._store, self._engine, evictor, callbacks, metrics)
            self._runner.places.limit(tokens)
            local = self._socket.family == socket.AF_UNIX
            loopback = local or ipaddress.ip_address(self._socket.getsockname()[0]).is_loopback
            check_origin = not tokens and not local
            self._gate = Gate(tokens, not tokens and loopback and not local, check_origin, metrics, settings.trust_proxy)
            self._execs = Execs(settings, self._store, self._engine, evictor, self._runner.tree, metrics)
            self._api = Api(settings, self._store, self._engine, self._runner, self._execs, evictor, callbacks, metrics)
            self._server = Server(settings, self._socket, self._api, self._gate)
            self._store.tidy(settings.artifacts_root())
            self._runner.recover()
            self._execs.recover(self._runner.job)
            undo.pop_all()
        self._about = f"lightrun {__version__} serves on {self.address}, with the engine at {engine_is.url} ({engine_is.source})"
        if not tokens:
            log.log(logging.INFO if loopback else logging.WARNING, "no --token: whoever can connect can run containers")

    @property
    def address(self) -> str:
        """Where the daemon listens, as a URL."""
        if self._socket.family == socket.AF_UNIX:
            return f"unix://{self._socket.getsockname()}"
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve from threads of its own."""
        self._server.start()
        log.info("%s", self._about)

    def reload(self) -> None:
        """Read the token file again; a bad one changes nothing."""
        path = self._settings.token_file
        try:
            if path is None or not path.is_file():  # a pipe, say, that was read to its end
                log.warning("SIGHUP is ignored: there is no --token-file to read again")
                return
            tokens = self._settings.tokens()
            self._gate.take(tokens)
            self._runner.places.limit(tokens)
            log.info("%s was read again", path)
        except (UsageError, OSError) as error:
            log.error("%s; the tokens stay as they were", _sentence(error))

    def stop(self) -> None:
        """Take no more runs, let clients that wait have their results, and let go of everything. All that takes at most
        --leave, --drain, what Runner.stop allows for the ends of runs that it kills, and twice LAST_ANSWERS_SECONDS: to tell
        them, and then to tell those who wait for runs that go on."""
        self._runner.leaving = True  # a balancer that looks at /health sends no more from now on
        usual = LEAVE_SECONDS if self._settings.node else 0
        time.sleep(usual if self._settings.leave is None else self._settings.leave)
        deadline = time.monotonic() + self._settings.drain
        self._runner.stopping = True
        self._gate.closing = True
        self._execs.stop(deadline)
        self._runner.stop(deadline)
        self._server.settle(max(deadline, time.monotonic() + LAST_ANSWERS_SECONDS))
        self._api.ending.set()
        self._remove_socket()
        self._server.end(time.monotonic() + LAST_ANSWERS_SECONDS)
        self._runner.pools.stop(time.monotonic() + INTERRUPT_SECONDS)
        self._runner.slots.sweep()
        self._store.close()

    def _remove_socket(self) -> None:
        """While it still listens: a dead one may be another daemon's already."""
        if self._settings.socket and self._socket.getsockname() == str(self._settings.socket):  # not systemd's
            with contextlib.suppress(OSError):
                self._settings.socket.unlink()


def _claim_artifacts_dir(root: Path, state_id: str) -> None:
    """Make the artifacts dir this state dir's own. Raises StartError for one that belongs to somebody else."""
    marker, fresh = root / ".lightrun", root / ".lightrun.new"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if marker.exists():
            owner = small_file(marker).strip()
        elif any(path != fresh for path in root.iterdir()):
            raise StartError(f"{root} holds other files; an artifacts dir must be empty or lightrun's own")
        else:
            owner = state_id.encode()
            fresh.write_bytes(owner)
            fresh.rename(marker)
    except OSError as error:
        raise StartError(f"the artifacts dir cannot be used: {error.filename}: {error.strerror}") from error
    if owner != state_id.encode():
        raise StartError(f"{root} belongs to another state dir")


class TextFormatter(logging.Formatter):
    """A line for a person. Tracebacks do without source text: the zip may have been replaced under the daemon."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  # a name of logging
        """See logging.Formatter."""
        frames = [f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}" for frame, line in traceback.walk_tb(ei[2])]
        return "\n".join(["Traceback (most recent call last):", *frames, f"{ei[0].__name__}: {ei[1]}"])


class JsonFormatter(TextFormatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {"time": timestamp(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return to_json(line).decode()


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of it, also to a terminal or pipe that another process has made not to block. Raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


class LogWriter(logging.Handler):
    """Standard error, written by a thread of its own: whoever reads it may stop, and would then hold every thread that has
    something to say. What finds no room, or cannot be written, is counted; the count is told when there is room again."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._changed = threading.Condition()  # guards all below
        self._lines: collections.deque[str] = collections.deque()
        self._size = self._lost = 0  # characters that wait or are being written, lines that nobody will see
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            line = self.format(record)
        except Exception:
            line = f"a line of the log cannot be written: {record.msg!r}"
        with self._changed:
            if self._size + len(line) > MAX_LOG_CHARACTERS:
                self._lost += 1
            else:
                self._size += len(line)
                self._lines.append(line)
                self._changed.notify()

    def close(self) -> None:
        """Leave what is queued a moment to be written."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify()
        if first:
            self._thread.join(LOG_FLUSH_SECONDS)
        super().close()

    def _work(self) -> None:
        words = "%d lines of the log were lost: nobody took them"
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                line = self._lines.popleft()
            written = self._write(line)
            with self._changed:
                self._size -= len(line)
                self._lost += not written
                lost = self._lost if written and self._size < MAX_LOG_CHARACTERS // 2 else 0
            if lost and self._write(self.format(log.makeRecord(log.name, logging.WARNING, "", 0, words, (lost,), None))):
                with self._changed:
                    self._lost -= lost

    def _write(self, line: str) -> bool:
        try:
            write_whole(self._descriptor, (line + "\n").encode("utf-8", "backslashreplace"))
        except OSError:
            return False
        return True


def _set_up_logging(log_format: str) -> LogWriter:
    """Everything that any library, or the end of a thread, has to say goes to one handler, which this returns."""
    logging.raiseExceptions = False
    handler = LogWriter(2)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # its depth warning is our way of working
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    threading.excepthook = lambda ended: log.error(
        "a thread broke", exc_info=(ended.exc_type, ended.exc_value or ended.exc_type(), ended.exc_traceback)
    )
    return handler


# --------------------------------------------------------------------------------------------------------------------
# Client: the other end of the HTTP API, as a library; the standard library alone
# --------------------------------------------------------------------------------------------------------------------


class ApiError(LightrunError):
    """What a daemon refused: `status` is the HTTP status, `code` the error of its answer, `details` what is wrong with fields."""

    def __init__(self, status: int, body: Mapping[str, Any], retry_after: float = 0) -> None:
        self.details: list[dict[str, Any]] = body.get("details") or []
        what = [f"{'.'.join(map(str, each['path']))}: {each['message']}".lstrip(": ") for each in self.details]
        code = str(body.get("error") or http.client.responses.get(status, status))
        super().__init__("; ".join(what) or str(body.get("message") or code), code)
        self.status, self.retry_after = status, retry_after


class Unreachable(LightrunError):
    """No daemon answers at the URL, or none any more."""


class ConnectionLost(Unreachable):
    """A connection broke that may be had again."""


class NotLightrun(LightrunError):
    """What answers says what no daemon of lightrun would."""

    def __init__(self, what: object = "") -> None:
        super().__init__("what answers there is not lightrun" + (f": {printable(str(what))}" if what else ""))


class NotWritten(LightrunError):
    """Artifacts that were not written: something is in the way, or they are not what a run may hand out."""


class _Patience:
    """How long a client bears with a daemon that was there: PATIENCE_SECONDS since it was last heard of."""

    def __init__(self) -> None:
        self._deadline = self._pause = 0.0

    def bear(self, error: LightrunError) -> None:
        """Wait before another try. Raises the error when that would be of no use."""
        if not isinstance(error, ConnectionLost) and error.status not in {502, 503, 504}:
            raise error
        self._deadline = self._deadline or time.monotonic() + PATIENCE_SECONDS
        self._pause = min(2 * self._pause + 0.05, RETRY_SECONDS)
        pause = max(self._pause * random.uniform(0.5, 1), getattr(error, "retry_after", 0))
        if time.monotonic() + pause > self._deadline:
            raise error
        time.sleep(pause)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, **options: Any) -> None:
        super().__init__("localhost", **options)
        self._path = path

    def connect(self) -> None:
        """To the socket, in place of a host and a port."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connector(url: str) -> tuple[Callable[[], http.client.HTTPConnection], str]:
    """What makes a connection to a daemon, and what its paths begin with. Raises UsageError."""
    wrong = UsageError("the URL must be http://HOST[:PORT], https://HOST[:PORT] or unix:///PATH")
    options: dict[str, Any] = {"timeout": CONNECT_SECONDS, "blocksize": COPY_BYTES}
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        if not rest.startswith("/") or len(os.fsencode(rest)) > MAX_SOCKET_PATH_BYTES:
            raise wrong
        return functools.partial(_UnixConnection, rest, **options), ""
    if scheme not in {"http", "https"} or not _good_url(url) or not url.isprintable() or re.search(r"[\s?#]", url):
        raise wrong
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return functools.partial(kind, str(parts.hostname), parts.port or kind.default_port, **options), parts.path.rstrip("/")


def _heard(read: Callable[[], bytes]) -> bytes:
    """Some of an answer. Raises ConnectionLost."""
    try:
        return read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionLost(f"the connection to the daemon broke: {error or type(error).__name__}") from error


class Client:
    """A client of one daemon, for any number of threads.

    `url` is `http://…`, `https://…` or `unix:///…`, by default LIGHT_RUN_URL or the address that `serve` listens on without
    options; `token` by default that of LIGHT_RUN_TOKEN or the first of the file LIGHT_RUN_TOKEN_FILE. Fields of a request have
    the names and units of `POST /run`.

    A daemon that was there once and goes away, or says 503, is asked again for a minute; what it was asked is done once all the
    same. Every method raises ApiError for what it refuses, Unreachable when it is not there, and UsageError for a bad URL."""

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        self.url = url or os.environ.get(variable_of("url")) or DEFAULT_URL
        self._connect, self._prefix = _connector(self.url)
        token = token or token_of(*(os.environ.get(variable_of(name)) for name in ("token", "token_file")))
        if token and not (token.isascii() and token.isprintable()):
            raise UsageError("the token must be printable ASCII")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._met = self._spoke = False  # whether somebody was there, and has answered in HTTP

    # -- one request

    @contextlib.contextmanager
    def _ask(
        self, method: str, path: str, body: bytes | IO[bytes] | None = None, headers: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
        """One request, once. Raises ApiError, Unreachable, ConnectionLost."""
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.connect()
            except (OSError, UnicodeError) as error:  # a name that DNS cannot have
                kind = ConnectionLost if self._met else Unreachable
                raise kind(f"no daemon answers at {self.url}: {getattr(error, 'strerror', None) or error}") from error
            self._met = True
            connection.sock.settimeout(SILENCE_SECONDS)
            length = {} if body is None or isinstance(body, bytes) else {"Content-Length": str(body.seek(0, os.SEEK_END))}
            if length:
                body.seek(0)  # type: ignore[union-attr]
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it had read all
                    connection.request(method, self._prefix + path, body, {**self._headers, **length, **(headers or {})})
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                if not (self._spoke or isinstance(error, OSError) or str(getattr(error, "line", "HTTP/")).startswith("HTTP/")):
                    raise NotLightrun(error) from error
                raise ConnectionLost(f"the connection to the daemon broke: {error or type(error).__name__}") from error
            self._spoke = True
            with answer:
                if answer.status >= 300:
                    raise self._refusal(answer)
                yield answer

    @staticmethod
    def _refusal(answer: http.client.HTTPResponse) -> ApiError:
        text = _heard(lambda: answer.read(MIB))
        try:
            body = json.loads(text)
        except ValueError:  # a proxy's
            body = None
        after = re.fullmatch("[0-9]{1,4}", answer.headers.get("Retry-After", ""))
        return ApiError(answer.status, body if isinstance(body, dict) else {}, float(after[0]) if after else 0)

    def _persist(self, step: Callable[[], Result]) -> Result:
        """A step that may be done twice, again and again while the daemon is away."""
        patience = _Patience()
        while True:
            try:
                return step()
            except (ConnectionLost, ApiError) as error:
                patience.bear(error)

    def _json(self, method: str, path: str, body: bytes | IO[bytes] | None = None, **headers: str) -> Any:
        """The JSON of an answer, None for an empty one."""

        def step() -> Any:
            with self._ask(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}) as answer:
                text = _heard(answer.read)
            try:
                return json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise NotLightrun from error

        return self._persist(step)

    def _order(self, method: str, path: str, body: bytes | None = None) -> None:
        """Have something done that cannot be done twice: once it was asked for, that it is done already is as good."""
        lost = False

        def step() -> None:
            nonlocal lost
            try:
                with self._ask(method, path, body, {"Content-Type": JSON} if body else None):
                    pass
            except (ConnectionLost, ApiError) as error:
                if lost and error.code in {"not_found", "not_running"}:
                    return
                lost = lost or isinstance(error, ConnectionLost) or error.status in {502, 504}  # a proxy's, whose node has gone
                raise

        self._persist(step)

    def _events(self, method: str, path: str, body: bytes | None = None) -> Iterator[dict[str, Any]]:
        """The events of an answer as they come, once. The last one is `finished` or `running`. Raises ConnectionLost."""
        headers = {"Accept": EVENTS, **({"Content-Type": JSON} if body else {})}
        with self._ask(method, path, body, headers) as answer:
            while line := _heard(answer.readline):
                try:
                    event = json.loads(line)
                    last = event["event"] in {"finished", "running"}
                except ValueError as error:
                    raise ConnectionLost("the connection to the daemon broke within an event") from error
                except (LookupError, TypeError, RecursionError) as error:
                    raise NotLightrun from error
                if event["event"] == "finished":
                    _sound(event)
                yield event
                if last:
                    return
        raise ConnectionLost("the connection to the daemon broke")

    # -- runs

    @contextlib.contextmanager
    def prepared(
        self, image: str, *, folder: str | os.PathLike[str] | None = None,
        files: Mapping[str, str | bytes | os.PathLike[str] | dict[str, str]] | None = None,
        stdin: str | bytes | dict[str, str] | None = None, key: str | None = None, **fields: Any,
    ) -> Iterator[Callable[[], RemoteRun]]:  # fmt: skip
        """All that `start` does but the request, which the function makes that comes back."""
        local = {path: content for path, content in (files or {}).items() if isinstance(content, os.PathLike)}
        plain = {path: _transferable(content) for path, content in (files or {}).items() if path not in local}
        request = {"image": image, **fields, **({"files": plain} if plain else {}), "detached": True}
        if stdin is not None:
            request["stdin"] = _transferable(stdin)
        headers = {"Content_Type": JSON, "Idempotency_Key": str(uuid.uuid4()) if key is None else key}
        if not re.fullmatch("[ -~]{1,200}", headers["Idempotency_Key"]):
            raise UsageError("key: must be 1 to 200 printable ASCII characters")
        content = _packed_json(request)
        body: bytes | IO[bytes] = content
        with contextlib.ExitStack() as opened:
            if folder is not None or local:
                form, boundary = opened.enter_context(tempfile.TemporaryFile()), uuid.uuid4().hex
                _write_form(form, boundary, content, None if folder is None else Path(folder), local)
                body, headers["Content_Type"] = form, f"{FORM}; boundary={boundary}"

            def send() -> RemoteRun:
                answer = self._json("POST", "/run", body, **headers)
                if not isinstance(answer, dict) or not RUN_ID.fullmatch(str(answer.get("id"))):
                    raise NotLightrun
                return RemoteRun(self, answer["id"])

            yield send

    def start(self, image: str, **options: Any) -> RemoteRun:
        """Start a run that does not need its client. Options, beside the fields of a request:

        `folder` is put into the workdir, without what its .dockerignore names, and without .git; `files` maps paths in the
        workdir to text, bytes, local files (`pathlib.Path`) or what the API takes; `stdin` is text, bytes or what the API takes;
        `key` is the Idempotency-Key, by default a new one. Raises ApiError, Unreachable, UsageError for what cannot be sent,
        OSError for what cannot be read."""
        with self.prepared(image, **options) as send:
            return send()

    def run(self, image: str, *, on_output: Callable[[str, bytes], None] | None = None, **options: Any) -> Outcome:
        """Run a container to its end. `options` are those of `start`. `on_output` gets the pieces of stdout and stderr as they
        come; without it they are collected. When it fails, or Ctrl-C ends the waiting, the run is cancelled. Raises what
        `start` does."""
        run = self.start(image, **options)
        try:
            return run.wait(on_output)
        except LightrunError:
            raise
        except BaseException:
            with contextlib.suppress(LightrunError):
                run.cancel()
            raise

    def exec(
        self, run_id: str, entrypoint: str | Sequence[str], *, stdin: str | bytes | dict[str, str] | None = None,
        on_output: Callable[[str, bytes], None] | None = None, **fields: Any,
    ) -> Outcome:  # fmt: skip
        """Run a second command in a run that goes on. It ends when its client does: raises ConnectionLost when that is so."""
        request = {"entrypoint": entrypoint, **fields, **({} if stdin is None else {"stdin": _transferable(stdin)})}
        received = Received()
        events = self._events("POST", f"/runs/{run_id}/exec?encoding=base64", _packed_json(request))
        return Outcome.of(received.new(events), received, on_output)

    def get(self, run_id: str) -> RemoteRun:
        """A run by its id, or by a beginning that is its own."""
        if not RUN_ID.fullmatch(run_id):
            found = [state["id"] for state in self.runs(id=run_id, limit=2)] if re.fullmatch("[a-z0-9_-]{1,100}", run_id) else []
            if len(found) != 1:
                many = "more than one run begins with" if found else "there is no run"
                raise ApiError(404, {"error": "not_found", "message": f"{many} {printable(run_id)}"})
            run_id = found[0]
        return RemoteRun(self, run_id)

    def runs(self, limit: int = 100, **query: Any) -> Iterator[dict[str, Any]]:
        """The states of up to so many runs, newest first; `query` as for `GET /runs`."""
        while limit > 0:
            page = self._json("GET", "/runs?" + urllib.parse.urlencode({**query, "limit": min(limit, 1000)}))
            yield from page
            if len(page) < min(limit, 1000):
                return
            query["before"], limit = page[-1]["id"], limit - len(page)


class Received:
    """How much of each stream a client has, and whether that is all up to there."""

    def __init__(self) -> None:
        self.taken = dict.fromkeys(STREAMS.values(), 0)
        self.complete = True

    def new(self, events: Iterable[dict[str, Any]], first: int = 0) -> Iterator[dict[str, Any]]:
        """What is new of the events of one connection. A gap before the `first` only says that the beginning is not kept."""
        untouched = {stream for stream, taken in self.taken.items() if not taken}
        for index, event in enumerate(events):
            if event["event"] == "gap" and index >= first:
                self.complete = False
            if event["event"] != "log" or self._take(event, untouched):
                yield event

    def _take(self, event: dict[str, Any], untouched: set[str]) -> bool:
        """Add to a log event what of its bytes is new, as `data`; whether that is anything. Bytes of which the daemon cannot tell
        where they stand are new only where there were none before. Raises NotLightrun."""
        try:
            stream, data = event["stream"], base64.b64decode(event["base64"], validate=True)
            taken = self.taken[stream]
            at = event.get("at", taken)
            if not isinstance(at, int) or at < 0:
                raise ValueError("at")
        except (LookupError, TypeError, ValueError) as error:
            raise NotLightrun from error
        self.complete = self.complete and "at" in event and at <= taken
        if "at" not in event and stream not in untouched:
            return False
        self.taken[stream] = max(taken, at + len(data))
        event["data"] = data[max(0, taken - at) :]
        return bool(event["data"])


def _sound(event: dict[str, Any]) -> dict[str, Any]:
    """How a run or a command ended, if its last event tells that at all. Raises NotLightrun."""
    state = event.get("run", event.get("exec"))
    if not isinstance(state, dict) or not isinstance(state.get("reason"), str) or state.get("exitCode", 0) not in range(256):
        raise NotLightrun
    return state


class RemoteRun:
    """A run as its client sees it."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._client, self.id = client, run_id
        self._path = f"/runs/{run_id}"
        self.received = Received()

    def events(self, follow: bool = True) -> Iterator[dict[str, Any]]:
        """The run's events, from where the last call left off; `log` has `stream` and `data`, its bytes. A connection that breaks
        is had again: no byte comes twice, and when one is missing `received.complete` is false."""
        patience = _Patience()
        while True:
            query = urllib.parse.urlencode({"encoding": "base64", "follow": str(follow).lower(), **self.received.taken})
            began = time.monotonic()
            try:
                for event in self.received.new(self._client._events("GET", f"{self._path}/events?{query}"), first=2):
                    yield event
                    if event["event"] == "log" or time.monotonic() - began > CONNECT_SECONDS:
                        patience = _Patience()  # it has brought something on
                return
            except (ConnectionLost, ApiError) as error:
                patience.bear(error)

    def wait(self, on_output: Callable[[str, bytes], None] | None = None) -> Outcome:
        """Follow it to its end."""
        return Outcome.of(self.events(), self.received, on_output, self)

    def state(self, wait: int = 0) -> dict[str, Any]:
        """Its state, as `GET /runs/<id>`; after at most `wait` ms, or when it has ended."""
        state: dict[str, Any] = self._client._json("GET", f"{self._path}?wait={wait}")
        return state

    def ended(self) -> dict[str, Any]:
        """Its state when it has ended."""
        while (state := self.state(wait=30_000))["status"] == "running":
            pass
        return state

    def cancel(self) -> None:
        """Kill it."""
        self._client._order("POST", f"{self._path}/cancel")

    def stop(self, **fields: Any) -> None:
        """Signal it, and kill it when it does not end: `signal`, `grace` (ms)."""
        self._client._order("POST", f"{self._path}/stop", to_json(fields))

    def delete(self) -> None:
        """Have it and its artifacts forgotten."""
        self._client._order("DELETE", self._path)

    def read(self, path: str) -> bytes:
        """The bytes of a file that it kept."""
        with self._tar(path) as file, _opened_tar(file) as tar:
            member = tar.next()
            content = tar.extractfile(member) if member else None
            if content is None:
                raise ApiError(404, {"error": "not_found", "message": f"{printable(path)} is a folder"})
            return content.read()

    def save(self, folder: str | os.PathLike[str], path: str = "", overwrite: bool = False) -> list[str]:
        """Write what it kept, or what of that has this path, below a folder; returns the names. Nothing is written when something
        is there already (but for `overwrite`), and never through a link. Raises NotWritten, OSError."""
        with self._tar(path) as file:
            return unpack(file, Path(folder), overwrite)

    @contextlib.contextmanager
    def _tar(self, path: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:

            def step() -> None:
                file.seek(0)
                file.truncate()
                where = f"{self._path}/artifacts" + (f"/{urllib.parse.quote(os.fsencode(path))}" if path else "")
                end = b""
                with self._client._ask("GET", where, headers={"Accept": TAR}) as answer:
                    while piece := _heard(lambda: answer.read(COPY_BYTES)):
                        file.write(piece)
                        end = (end + piece)[-len(TAR_END) :]
                if end != TAR_END:  # whatever the way said: HTTP has more than one that does not tell
                    raise ConnectionLost("the connection to the daemon broke within the artifacts")

            self._client._persist(step)
            file.seek(0)
            yield file


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run or a command in one ended. `stdout` and `stderr` are empty when a callback got them; `complete` tells whether
    these are all bytes that it wrote. `state` is all that the daemon says."""

    state: dict[str, Any]
    stdout: bytes
    stderr: bytes
    complete: bool
    run: RemoteRun | None = None  # to read or save artifacts

    @classmethod
    def of(
        cls, events: Iterable[dict[str, Any]], received: Received, tell: Callable[[str, bytes], None] | None,
        run: RemoteRun | None = None,
    ) -> Outcome:  # fmt: skip
        """What events come to, whose bytes are kept, or told to whoever wants them."""
        kept, event = {stream: bytearray() for stream in STREAMS.values()}, dict[str, Any]()
        for event in events:
            if event["event"] == "log":
                (tell or (lambda stream, data: kept[stream].extend(data)))(event["stream"], event["data"])
        return cls(_sound(event), bytes(kept["stdout"]), bytes(kept["stderr"]), received.complete, run)

    @property
    def exit_code(self) -> int | None:
        """Of the program; None when it did not run to an end."""
        return self.state.get("exitCode")

    @property
    def reason(self) -> str:
        """Why it ended: `exited`, `timeout` and so on."""
        return str(self.state["reason"])

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """What the run kept: path, bytes and type of each."""
        return list(self.state.get("artifacts", []))

    @property
    def usage(self) -> dict[str, int]:
        """What the run used, as far as that can be had."""
        return dict(self.state.get("usage", {}))


def _packed_json(request: dict[str, Any]) -> bytes:
    """The body of a request. Raises UsageError for what JSON cannot carry."""
    try:
        return json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        near = printable(error.object[max(0, error.start - 20) : error.end + 20])
        raise UsageError(f"names, arguments and variables must be UTF-8, and this is not: {near}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the request cannot be written as JSON: {error}") from error


def _transferable(content: Any) -> Any:
    """What JSON can carry of a content."""
    return {"base64": base64.b64encode(content).decode()} if isinstance(content, (bytes, bytearray, memoryview)) else content


# -- trees out of and into local folders


def _write_form(
    file: IO[bytes], boundary: str, request: bytes, folder: Path | None, local: Mapping[str, os.PathLike[str]]
) -> None:
    """The body of a request whose files are sent as a tar."""
    for name, kind in (("run", JSON), ("tar", TAR)):
        file.write(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}\r\n\r\n'.encode())
        if name == "run":
            file.write(request + b"\r\n")
    pack(file, folder, local)
    file.write(f"\r\n--{boundary}--\r\n".encode())


def pack(out: IO[bytes], folder: Path | None, files: Mapping[str, os.PathLike[str]]) -> None:
    """Write a tar of a folder, without what its .dockerignore names and without .git (`!.git` there keeps it), and of single
    files under other names. Raises OSError, UsageError for what is neither file, folder nor link, and for bad names."""
    # GNU's format has names as they are, in whatever encoding
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, bufsize=COPY_BYTES) as tar:
        for path, name in _below(folder) if folder is not None else ():
            if name not in files:
                _pack_one(tar, path, name, tar.gettarinfo(path, name))
        for name, local in files.items():
            path = Path(local)
            if not _regex(_SEGMENTS).search(name):
                raise UsageError(f"{printable(name)}: the path in the workdir must be relative, without .., as in PATH=LOCAL")
            if not stat.S_ISREG(path.stat().st_mode):
                raise UsageError(f"{printable(str(path))} is not a file")
            with path.open("rb") as file:
                info = tar.gettarinfo(arcname=name, fileobj=file)
            info.type = tarfile.REGTYPE  # a second name of one that is there already would be a link
            _pack_one(tar, path, name, info)


def _pack_one(tar: tarfile.TarFile, path: Path, name: str, info: tarfile.TarInfo | None) -> None:
    if info is None or not (info.isfile() or info.isdir() or info.issym() or info.islnk()):
        raise UsageError(f"{printable(str(path))} is neither a file, a folder nor a link")
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode, info.mtime = info.mode & 0o777, int(info.mtime)
    if not info.isreg():
        tar.addfile(info)
        return
    info.size = path.stat().st_size
    if tar.offset + info.size > MAX_PACKED_BYTES:
        raise UsageError(f"{printable(name)} would make it more than {MAX_PACKED_BYTES} bytes")
    with path.open("rb") as file:
        tar.addfile(info, file)


def _below(root: Path) -> Iterator[tuple[Path, str]]:
    """What is in a folder and not left out, each folder before what is in it."""
    ignored, folders = DockerIgnore(root), [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in sorted(os.scandir(folder), key=lambda each: each.name):
            name, left_out = prefix + entry.name, ignored.matches(prefix + entry.name)
            if not left_out:
                yield Path(entry.path), name
            if entry.is_dir(follow_symlinks=False) and not (left_out and ignored.simple):
                folders.append((Path(entry.path), name + "/"))


class DockerIgnore:
    """The patterns of a folder's .dockerignore, as `docker build` reads them; the last one that matches a path, or a folder
    that it is in, decides. Before them stands one for `.git`."""

    def __init__(self, folder: Path) -> None:
        lines, path = [".git"], folder / ".dockerignore"
        if path.is_file():
            lines += os.fsdecode(small_file(path).removeprefix(b"\xef\xbb\xbf")).split("\n")
        self._patterns = [self._compiled(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
        self.simple = all(leaves_out for leaves_out, _ in self._patterns)  # nothing in a folder that is left out comes back

    @staticmethod
    def _compiled(line: str) -> tuple[bool, re.Pattern[str]]:
        leaves_out, pattern = not line.startswith("!"), clean_path(line.lstrip("!").strip())[1:]
        special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

        def translated(found: re.Match[str]) -> str:
            if len(found[0]) < 3 or found[0] == "**/":
                return special.get(found[0]) or re.escape(found[0][-1])
            inside = found[0][1:-1].removeprefix("^")
            inside = re.sub(r"\\?(.)", lambda each: "-" if each[0] == "-" else re.escape(each[1]), inside)
            return ("[^" if found[0][1] == "^" else "[") + inside + "]"

        text = re.sub(r"\*\*/|\*\*|\*|\?|\[\^?(?:\\.|[^]\\/])+\]|\\.|.", translated, pattern, flags=re.DOTALL)
        try:
            return leaves_out, re.compile(text + r"(?:/.*)?\Z", re.DOTALL)
        except re.error as error:
            raise UsageError(f".dockerignore: the pattern {printable(line)} cannot be understood: {error}") from error

    def matches(self, name: str) -> bool:
        """Whether this path is left out."""
        return next((leaves_out for leaves_out, pattern in reversed(self._patterns) if pattern.match(name)), False)


def unpack(file: IO[bytes], folder: Path, overwrite: bool = False) -> list[str]:
    """Write the files and folders of a tar below a folder, which is made when missing; returns their names. All is judged before
    anything is written: nothing outside of the folder, no links, nothing through a link, nothing over what is there unless
    `overwrite`. Raises NotWritten, OSError."""
    with _opened_tar(file) as tar:
        members = [(member, member.name.rstrip("/")) for member in tar]
        files = {name for member, name in members if not member.isdir()}
        for member, name in members:
            segments = name.split("/")
            if not (member.isreg() or member.isdir()) or {"", ".", ".."} & set(segments) or "\0" in name:
                raise NotWritten(f"{printable(name)} is not a file or folder that a run may hand out")
            if files & set(parent_folders(name)) or (member.isdir() and name in files):
                raise NotWritten(f"{printable(name)} is a file and a folder")
        if len({name for _, name in members}) < len(members):
            raise NotWritten("a name stands twice")
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_Place(folder)) as place:
            for member, name in members:
                place.judge(name, member.isdir(), overwrite)
            for member, name in members:
                content = tar.extractfile(member)
                if content is None:
                    place.enter(name.split("/"), make=True)
                else:
                    place.write(name, content, member.mode & 0o111 != 0, overwrite)
    return [name for _, name in members]


@contextlib.contextmanager
def _opened_tar(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """A tar from a daemon. Raises NotWritten for one that cannot be read."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, ValueError, UnicodeError) as error:
        raise NotWritten("the artifacts came as a tar that cannot be read") from error


class _Place:
    """A folder into which things are written that nobody vouches for. Every step down is one open of one name that must be a
    folder, so that no link, however it came there, leads elsewhere."""

    def __init__(self, folder: Path) -> None:
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._last: tuple[list[str], int] = [], self._root  # where we are, since neighbours follow each other

    def close(self) -> None:
        """Let go of it."""
        self._leave()
        os.close(self._root)

    def _leave(self) -> None:
        if self._last[1] != self._root:
            os.close(self._last[1])
        self._last = [], self._root

    def enter(self, folders: list[str], make: bool = False) -> int | None:
        """A descriptor of a folder in here, None when it is missing. Raises NotWritten."""
        if folders == self._last[0]:
            return self._last[1]
        self._leave()
        for depth, name in enumerate(folders, 1):
            above = self._last[1]
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=above)
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            except FileNotFoundError:
                if make:
                    raise
                return None
            except OSError as error:
                if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
                    raise
                raise NotWritten(f"{printable('/'.join(folders[:depth]))} is there already, and is not a folder") from error
            if above != self._root:
                os.close(above)
            self._last = folders[:depth], below
        return self._last[1]

    def judge(self, name: str, is_folder: bool, overwrite: bool) -> None:
        """Raises NotWritten when this cannot be written."""
        *folders, last = name.split("/")
        if is_folder:
            self.enter([*folders, last])
        elif (above := self.enter(folders)) is not None:
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(last, dir_fd=above, follow_symlinks=False)
                if not overwrite or stat.S_ISDIR(there.st_mode):
                    hint = "" if overwrite else ", and is not overwritten without being asked"
                    raise NotWritten(f"{printable(name)} is there already{hint}")

    def write(self, name: str, content: IO[bytes], executable: bool, overwrite: bool) -> None:
        """Write a file, which is there when it is whole; one that was there is replaced, not written to. Raises OSError."""
        *folders, last = name.split("/")
        above, temporary, new = self.enter(folders, make=True), f".lightrun-{uuid.uuid4().hex}", os.O_CREAT | os.O_EXCL
        mode = 0o777 if executable else 0o666
        descriptor = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | new, mode, dir_fd=above)
        try:
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(content, file, COPY_BYTES)
            if not overwrite:
                os.close(os.open(last, os.O_WRONLY | os.O_NOFOLLOW | new, mode, dir_fd=above))  # there was none
            os.replace(temporary, last, src_dir_fd=above, dst_dir_fd=above)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=above)
            raise


# --------------------------------------------------------------------------------------------------------------------
# Commands: the client at a shell
# --------------------------------------------------------------------------------------------------------------------

TIMED_OUT, OWN_FAILURE, PIPE_CLOSED = 124, 125, 141  # exit codes, as of timeout(1), `docker run` and a shell
OPTION_NAMES = {"labels": "label", "detached": "detach", "tar": "dir"}  # where habit has another name than the field
SHORT_OPTIONS = {"detached": "-d", "env": "-e", "workdir": "-w"}  # as of `docker run`
SPECIAL_FIELDS = {"image", "files", "entrypoint", "input", "stdin", "splitLogs"}  # these have arguments of their own
NEVER_EMPTY = {"token", "token_file"}  # an empty variable counts as absent, but must not open the server by mistake


def variable_of(name: str) -> str:
    """The environment variable of an option's field: `body_limit` → `LIGHT_RUN_BODY_LIMIT`."""
    return "LIGHT_RUN_" + name.upper()


def token_of(token: str | None, path: str | None) -> str | None:
    """The token that is given, else the first of the file that is. Raises UsageError."""
    if token or not path:
        return token
    try:
        lines = small_file(_path(path)).decode().splitlines()
    except (OSError, ValueError) as error:  # a home that is not known, what is not UTF-8
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not (first := next(filter(str.strip, lines), "")):
        raise UsageError(f"{path}: holds no token")
    return Token.parse(first, path).text


# -- options, of which those of a request come from its table


def option_of(field: str) -> str:
    """The option of a request's field: `fileSize` → `--file-size`."""
    return "--" + re.sub(r"(?=[A-Z])", "-", OPTION_NAMES.get(field, field)).lower()


def _argument(cast: Callable[[str], Any]) -> Callable[[str], Any]:
    """A cast as argparse wants it."""

    def read(text: str) -> Any:
        try:
            return cast(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _milliseconds(text: str) -> int:
    return round(parse_duration(text) * 1000)


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise ValueError("must be NAME=VALUE")
    return name, value


def _variable(text: str) -> tuple[str, str | None]:
    name, sign, value = text.partition("=")
    return name, value if sign else os.environ.get(name)


def _extracted(text: str) -> str | dict[str, str]:
    path, sign, to = text.rpartition(":")
    return {"from": path, "to": to} if sign and to else path or text


def _file(text: str) -> tuple[str, Path]:
    name, sign, local = text.partition("=")
    if not name or (sign and not local):
        raise ValueError("must be PATH or PATH=LOCAL")
    return name, Path(local if sign else name)


def _folder(text: str) -> Path:
    if not text:
        raise ValueError("must be a folder, and is empty")
    return Path(text)


FIELD_ARGUMENTS: dict[str, tuple[Callable[[str], Any], str]] = {  # how to read those that are given again and again
    "env": (_variable, "NAME[=VALUE]"),
    "labels": (_pair, "NAME=VALUE"),
    "extract": (_extracted, "FROM[:TO]"),
    "setup": (str, "COMMAND"),
}


def _add_fields(parser: argparse.ArgumentParser, schema: dict[str, Any]) -> None:
    """An option for each field of a request."""
    for name, about in schema["properties"].items():
        if name in SPECIAL_FIELDS:
            continue
        kind, more = about.get("type") or about["anyOf"][-1]["type"], dict[str, Any]()
        text = about["description"].replace(" in ms", "").replace("%", "%%")
        if name in FIELD_ARGUMENTS:
            cast, metavar = FIELD_ARGUMENTS[name]
            more, text = {"action": "append", "type": _argument(cast), "metavar": metavar}, text + " Repeatable."
        elif about.get("unit") == "milliseconds":
            more = {"type": _argument(_milliseconds), "metavar": "DURATION"}
        elif kind == "boolean":
            more = {"action": "store_const", "const": True}
        elif kind in {"integer", "number"}:
            more = {"type": {"integer": int, "number": float}[kind], "metavar": "N"}
        else:
            more = {"metavar": "|".join(about["enum"]) if "enum" in about else "SIZE" if "anyOf" in about else "TEXT"}
        parser.add_argument(*SHORT_OPTIONS.get(name, "").split(), option_of(name), dest=f"field {name}", help=text, **more)


def _fields(options: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The fields of a request that the options give."""
    fields = {name[6:]: value for name, value in options.items() if name.startswith("field ") and value is not None}
    for name in {"env", "labels"} & fields.keys():
        fields[name] = {each: value for each, value in fields[name] if value is not None}
    if options["shell"] is not None and command:
        raise UsageError("--shell and a command behind -- are two commands")
    if command or options["shell"] is not None:
        fields["entrypoint"] = list(command) or options["shell"]
    return fields


def _add_client_options(parser: argparse.ArgumentParser) -> None:
    shown = {"url": f"daemon: http://…, https://… or unix:///PATH (default: LIGHT_RUN_URL, or {DEFAULT_URL})",
             "token": "bearer token (default: LIGHT_RUN_TOKEN)",
             "token-file": "file whose first line is the token (default: LIGHT_RUN_TOKEN_FILE)"}  # fmt: skip
    for name, text in shown.items():
        parser.add_argument(f"--{name}", metavar=name.upper().replace("-", "_"), help=text)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="send standard input, all of it, before the start")
    parser.add_argument("--shell", metavar="SCRIPT", help="run sh -c SCRIPT in place of a COMMAND")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="image to run")
    parser.add_argument("--dir", metavar="DIR", type=_argument(_folder),
                        help="put a local folder into the workdir, without .git and what its .dockerignore names")  # fmt: skip
    parser.add_argument("--file", metavar="PATH[=LOCAL]", action="append", default=[], type=_argument(_file),
                        help="put a local file there in the workdir. Repeatable.")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", default=Path(), type=_argument(_folder),
                        help="where what --extract names is written (default: .)")  # fmt: skip
    _add_output(parser)
    _add_input(parser)
    parser.add_argument("--usage", action="store_true", help="say at the end, on standard error, what the run took and used")
    _add_fields(parser, request_schema(Settings()))


def _add_exec(parser: argparse.ArgumentParser) -> None:
    _add_id(parser)
    _add_input(parser)
    _add_fields(parser, exec_schema(Settings()))


def _add_id(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("id", metavar="ID", nargs=nargs, help="id of a run, or a beginning that no other has")


def _add_ids(parser: argparse.ArgumentParser) -> None:
    _add_id(parser, "+")


def _add_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="runs that have ended as well")
    parser.add_argument("-n", "--limit", metavar="N", type=int, default=100, help="so many at most, the newest (default: 100)")
    parser.add_argument("--label", metavar="NAME=VALUE", help="only those with this label")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids alone")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    _add_id(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="and what comes, until the run ends")


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_ids(parser)
    parser.add_argument("--signal", metavar="NAME", help="first signal (default: SIGTERM)")
    parser.add_argument("--grace", metavar="DURATION", type=_argument(_milliseconds), help="time until SIGKILL (default: 10s)")


def _add_cp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="ID[:PATH]", help="run, and what of its artifacts (default: all)")
    parser.add_argument("folder", metavar="DIR", type=_argument(_folder), help="folder to write it in")
    _add_output(parser)


# -- what they do


def say(text: str) -> None:
    """A line of lightrun's own on standard error."""
    with contextlib.suppress(OSError):
        write_whole(2, f"lightrun: {''.join(each if each.isprintable() else '?' for each in text)}\n".encode(errors="replace"))


class Terminal:
    """Where output goes, as it comes; and, when standard error is a terminal, one line of progress that is gone before it."""

    def __init__(self) -> None:
        self._shows, self._line = os.isatty(2), False

    def output(self, stream: str, data: bytes) -> None:
        """Bytes of a stream. Raises OSError."""
        self.progress("")
        write_whole(1 if stream == "stdout" else 2, data)

    def progress(self, text: str) -> None:
        """Replace the line; with nothing, remove it."""
        if self._shows and (text or self._line):
            width = (os.get_terminal_size(2).columns or 80) - 1
            write_whole(2, b"\r\x1b[K" + printable(text)[:width].encode(errors="replace"))
            self._line = bool(text)

    def tell(self, event: dict[str, Any]) -> None:
        """An event of a run."""
        if event["event"] == "log":
            self.output(event["stream"], event["data"])
        elif event["event"] == "pulling":
            self.progress(" ".join(str(event[name]) for name in ("status", "id", "progress") if event.get(name)))
        elif event["event"] in {"started", "finished"}:
            self.progress("")


class Signals:
    """SIGINT, SIGTERM and SIGHUP, but for those that were ignored when we came (nohup): the first one ends the command, with what
    it has begun undone; while it waits for a run, it cancels that. A second one leaves at once."""

    def __init__(self) -> None:
        self.number = 0
        self._waits = False  # for a run that there is, or is about to be
        self._run: RemoteRun | None = None
        self._known = threading.Event()
        self._cancelling = threading.Thread(target=self._cancel, daemon=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: Any) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        if not self._waits:
            sys.exit(128 + number)
        say("cancelling; a second signal leaves it")
        self._cancelling.start()

    def _cancel(self) -> None:
        self._known.wait()
        if self._run:
            with contextlib.suppress(LightrunError):  # it has ended, or cannot be reached, which its follower sees as well
                self._run.cancel()

    @contextlib.contextmanager
    def cancel(self) -> Iterator[Callable[[RemoteRun], None]]:
        """While this lasts, they cancel the run that the function is told."""

        def tell(run: RemoteRun) -> None:
            self._run = run
            self._known.set()

        self._waits = True
        try:
            yield tell
        finally:
            self._known.set()
            if self.number:
                self._cancelling.join()
            self._waits = False


def _standard_input(options: Mapping[str, Any]) -> bytes | None:
    """All of it, if it is to be sent. Raises UsageError."""
    if not options["interactive"]:
        return None
    data = bytearray()
    while len(data) <= MAX_STDIN_BYTES:
        try:
            piece = os.read(0, COPY_BYTES)
        except BlockingIOError:  # another process has made it so
            select.select([0], [], [])
            continue
        if not piece:
            return bytes(data)
        data += piece
    raise UsageError(f"standard input has more than {MAX_STDIN_BYTES} bytes; put it into a file and send that with --file")


def _named(error: ApiError) -> ApiError:
    """A refusal in the words of the options."""
    details = [
        {**each, "path": [option_of(str(field)) if field not in SPECIAL_FIELDS else field, *rest]}
        for each in error.details
        for field, *rest in [each["path"] or ["request"]]
    ]
    return ApiError(error.status, {"error": error.code, "message": str(error), "details": details})


def run_command(client: Client, options: dict[str, Any], command: Sequence[str], signals: Signals) -> int:
    """`lightrun run`: the exit code of the program, 124 after its timeout, 125 for what went wrong otherwise."""
    fields, terminal, files = _fields(options, command), Terminal(), dict(options["file"])
    if len(files) < len(options["file"]):
        raise UsageError("--file: a path stands twice")
    if "extract" in fields:
        fields.setdefault("extractOn", "exit")
    detach = fields.pop("detached", False)
    stdin = _standard_input(options)
    prepared = client.prepared(options["image"], folder=options["dir"], files=files, stdin=stdin, **fields)
    with prepared as send, signals.cancel() as cancels:
        try:
            run = send()
        except ApiError as error:
            raise _named(error) from error
        cancels(run)
        state = {} if detach else _followed_to_its_end(run, terminal)
    if detach and not signals.number:
        print(run.id, flush=True)
        return 0
    if signals.number:
        if state and options["usage"]:
            say(_usage(state))
        return 128 + signals.number
    return _concluded(run, state, options)


def _followed_to_its_end(run: RemoteRun, terminal: Terminal) -> dict[str, Any]:
    """The state of a run that has ended, after its output was shown. It is cancelled when that cannot be."""
    state: dict[str, Any] = {}
    try:
        for event in run.events():
            terminal.tell(event)
            state = event.get("run", {})
    except Unreachable as error:
        raise Unreachable(f"{error}; run {run.id} may go on") from error
    except OSError as error:
        with contextlib.suppress(LightrunError):  # it has ended
            run.cancel()
        if isinstance(error, BrokenPipeError):
            raise
        raise LightrunError(f"the output cannot be written: {error.strerror}") from error
    return state


def _concluded(run: RemoteRun, state: dict[str, Any], options: Mapping[str, Any]) -> int:
    """Fetch what a run kept, say what is to be said, and tell the exit code."""
    failures = [] if run.received.complete else [f"some of the output is missing; what is kept of it: lightrun logs {run.id}"]
    lacking = [each for each in state.get("extracted", []) if each["status"] != "ok"]
    failures += [f"--extract {each['from']}: {each.get('message') or each['status']}" for each in lacking]
    try:
        if state.get("artifacts"):
            run.save(options["output"], overwrite=options["overwrite"])
    except (LightrunError, OSError) as error:
        failures.append(f"{_sentence(error)}; the files are still to be had with: lightrun cp {run.id} DIR")
    _say_why(state)
    for failure in failures:
        say(failure)
    if options["usage"]:
        say(_usage(state))
    return _exit_code(state) or (OWN_FAILURE if failures else 0)


def _say_why(state: Mapping[str, Any]) -> None:
    """Why a run or a command ended, if that was not by itself."""
    if state["reason"] != "exited" or state.get("error"):
        say(": ".join(filter(None, [state["reason"], state.get("error")])))


def _sentence(error: Exception) -> str:
    """What an error says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _exit_code(state: Mapping[str, Any]) -> int:
    """What a run's or a command's end is to a shell."""
    if state["reason"] == "timeout":
        return TIMED_OUT
    if state["reason"] in {"interrupted", "engine_error", "lost"}:  # whatever code there is is not the program's own
        return OWN_FAILURE
    code: int = state.get("exitCode", OWN_FAILURE)
    return code


def _usage(state: Mapping[str, Any]) -> str:
    timings = ", ".join(f"{name} {took} ms" for name, took in state["timings"].items())
    used = state.get("usage", {})
    figures = [f"run {state['id']}", state["reason"], f"exit code {state['exitCode']}" if "exitCode" in state else ""]
    figures += [f"{state['durationMs']} ms ({timings})", f"{used['cpuMs']} ms of CPU" if "cpuMs" in used else ""]
    figures += [f"{used['memoryPeakBytes'] / MIB:.1f} MiB of memory" if "memoryPeakBytes" in used else ""]
    return ", ".join(filter(None, figures))


def exec_command(client: Client, options: dict[str, Any], command: Sequence[str], _signals: Signals) -> int:
    """`lightrun exec`: the exit code of the command, as for `run`. It ends with its client."""
    fields, terminal = _fields(options, command), Terminal()
    if "entrypoint" not in fields:
        raise UsageError("there is no command: put it behind --, or behind --shell")
    try:
        run_id, stdin = client.get(options["id"]).id, _standard_input(options)
        outcome = client.exec(run_id, stdin=stdin, on_output=terminal.output, **fields)
    except ApiError as error:
        raise _named(error) from error
    if not outcome.complete:
        say("some of the output is missing")
    _say_why(outcome.state)
    return _exit_code(outcome.state) or (0 if outcome.complete else OWN_FAILURE)


def ps_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun ps`"""
    query = {"label": options["label"], "status": None if options["all"] else "running"}
    found = client.runs(max(0, options["limit"]), **{name: value for name, value in query.items() if value is not None})
    if options["json"] or options["quiet"]:
        for state in found:
            print(json.dumps(state) if options["json"] else printable(state["id"]))
        return 0
    rows = [("ID", "IMAGE", "STATUS", "EXIT", "CREATED", "TOOK", "LABELS"), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(state: Mapping[str, Any]) -> tuple[str, ...]:
    how = state.get("phase") or state.get("reason", "")
    took = f"{state['durationMs'] / 1000:.1f}s" if "durationMs" in state else ""
    labels = " ".join(f"{name}={value}" for name, value in state.get("labels", {}).items())
    status = state["status"] if how in {state["status"], "exited"} else f"{state['status']} ({how})"
    short = state["id"][: -len("-0000-0000-0000-000000000000")]
    cells = short, state["image"], status, str(state.get("exitCode", "")), state["createdAt"], took, labels
    return tuple(map(printable, cells))


def logs_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun logs`"""
    run, terminal = client.get(options["id"]), Terminal()
    for event in run.events(follow=options["follow"]):
        if event["event"] == "log":
            terminal.tell(event)
    if not run.received.complete:
        say("not all of the output is kept")
    return 0


def _each(client: Client, options: Mapping[str, Any], do: Callable[[RemoteRun], None], ends: bool = True) -> int:
    """Do something to some runs, wait until it has ended them, and print the ids of those with which it could be done."""
    code = 0
    for given in options["id"]:
        try:
            run = client.get(given)
            do(run)
            if ends:
                run.ended()
        except ApiError as error:
            say(f"{given}: {error}")
            code = 1
        else:
            print(run.id, flush=True)
    return code


def stop_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun stop`"""
    fields = {name: options[name] for name in ("signal", "grace") if options[name] is not None}
    return _each(client, options, lambda run: run.stop(**fields))


def cancel_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun cancel`"""
    return _each(client, options, RemoteRun.cancel)


def rm_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun rm`"""
    return _each(client, options, RemoteRun.delete, ends=False)


def cp_command(client: Client, options: dict[str, Any], _command: Sequence[str], _signals: Signals) -> int:
    """`lightrun cp`"""
    run_id, _, path = options["source"].partition(":")
    run = client.get(run_id)
    if run.state()["status"] == "running":
        raise Conflict(f"run {run.id} has not ended: what it keeps is there when it has")
    run.save(options["folder"], path.strip("/"), options["overwrite"])
    return 0


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the client: what its arguments are, and what it does."""

    does: Callable[[Client, dict[str, Any], Sequence[str], Signals], int]
    add: Callable[[argparse.ArgumentParser], None]
    help: str
    usage: str = ""  # of one that has a COMMAND behind --, and that program's exit code

    def failing(self, code: int) -> int:
        """Its exit code where that of other commands is `code`: 1 for what goes wrong by itself, 2 for a wrong command line."""
        return OWN_FAILURE if self.usage else code


COMMANDS = {
    "run": Command(run_command, _add_run, "run a container as docker run does", "IMAGE [-- COMMAND …]"),
    "exec": Command(exec_command, _add_exec, "run a second command in a run", "ID -- COMMAND …"),
    "ps": Command(ps_command, _add_ps, "list runs"),
    "logs": Command(logs_command, _add_logs, "print the output of a run"),
    "stop": Command(stop_command, _add_stop, "signal runs, and kill those that do not end"),
    "cancel": Command(cancel_command, _add_ids, "kill runs"),
    "rm": Command(rm_command, _add_ids, "forget runs that have ended"),
    "cp": Command(cp_command, _add_cp, "copy what a run kept"),
}


def client_main(name: str, options: dict[str, Any], behind: Sequence[str]) -> int:
    """A command of the client; its exit code."""
    command, signals = COMMANDS[name], Signals()
    try:
        client = Client(options["url"], token_of(options["token"], options["token_file"]))
        code = command.does(client, options, behind, signals)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code, why = PIPE_CLOSED, ""
    except UsageError as error:
        code, why = command.failing(2), str(error)
    except (LightrunError, OSError) as error:
        code, why = command.failing(1), _sentence(error)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:  # of what a daemon said
        code, why = command.failing(1), str(NotLightrun(f"{type(error).__name__}: {error}"))
    try:
        sys.stdout.flush()
    except OSError:  # nothing is to be flushed there when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not why:
        return code
    say(why)
    return 128 + signals.number if signals.number else code


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    misuse = 2  # exit code for a wrong command line

    def error(self, message: str) -> NoReturn:
        """One line, as SPEC 4 has it."""
        self.exit(self.misuse, f"lightrun: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="lightrun", description="Run a container over HTTP.")
    parser.add_argument("--version", action="version", version=f"lightrun {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve the HTTP API", allow_abbrev=False,
        description="Serve the HTTP API. Each option can also be given as a variable, as in "
        "LIGHT_RUN_BODY_LIMIT; repeatable ones take commas there. The option wins.",
    )  # fmt: skip
    for field in dataclasses.fields(Settings):
        many = isinstance(field.default, tuple)
        shown = field.metadata["shown"] or ("none" if field.default is None else field.default)
        serve.add_argument(
            "--" + field.name.replace("_", "-"), action="append" if many else "store", metavar=field.name.upper(),
            help=f"{field.metadata['help']} (default: {shown})",
        )  # fmt: skip
    for name, command in COMMANDS.items():
        about = f"{command.help[0].upper()}{command.help[1:]}, on a lightrun daemon."
        client = commands.add_parser(name, help=command.help, description=about, allow_abbrev=False)
        assert isinstance(client, _Parser)
        client.misuse = command.failing(2)
        if command.usage:
            client.usage = f"lightrun {name} [options] {command.usage}"
        command.add(client)
        _add_client_options(client)
    return parser


def _parsed(argv: Sequence[str]) -> tuple[dict[str, Any], Sequence[str]]:
    """The options of a command line, and what stands behind `--`. Leaves with one line when it is wrong."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    options, more = parser.parse_known_args(argv[:at])
    command = COMMANDS.get(options.command)
    if command:
        parser.misuse = command.failing(2)
    if more and command and command.usage:
        parser.error(f"what to do with {more[0]}? The command stands behind --: lightrun {options.command} {command.usage}")
    if more or (at < len(argv) and not (command and command.usage)):
        parser.error("unrecognized arguments: " + " ".join(more or argv[at:]))
    return vars(options), argv[at + 1 :]


def read_settings(options: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Settings from parsed options and variables. Raises UsageError."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        name, many = field.name, isinstance(field.default, tuple)
        source, text, given = "--" + name.replace("_", "-"), options.get(name), environment.get(variable_of(name))
        if text is None and (given or (given is not None and name in NEVER_EMPTY)):
            source, text = variable_of(name), [part.strip() for part in given.split(",")] if many else given
        if text is None and name == "state_dir":
            text = str(field.default)  # to expand its "~"
        if text is None:
            continue
        try:
            cast = field.metadata["cast"]
            values[name] = tuple(map(cast, text)) if many else cast(text)
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from error
    return Settings(**values)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends it at once. SIGHUP has the tokens read again."""
    ending = threading.Event()

    def tell(number: int, _frame: Any) -> None:
        if number != signal.SIGHUP:
            if ending.is_set():
                os._exit(1)
            ending.set()

    signals, told = os.pipe()  # a signal that comes just before a wait would not end it; what lies in a pipe does
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, tell)
    with contextlib.closing(_set_up_logging(settings.log_format)):
        _set_up_process()
        daemon = Daemon(settings)
        daemon.start()
        while os.read(signals, 1) == bytes([signal.SIGHUP]):
            daemon.reload()
        log.info("going down")
        daemon.stop()
    return 0


def _set_up_process() -> None:
    """Limits of the process. Raises StartError when it may not open enough files."""
    import ctypes  # not sooner: libffi may keep a file open, which would get the number of a standard stream that is closed

    with contextlib.suppress(OSError, AttributeError):  # glibc: else hundreds of threads each hoard what they freed
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # more than fs.nr_open, say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= descriptors < MIN_DESCRIPTORS:
        raise StartError(f"at most {descriptors} open files (ulimit -n) are too few: {MIN_DESCRIPTORS} are needed")


def _open_standard_streams() -> None:
    """Whatever is closed becomes /dev/null: a database must not get the number of standard error."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w", closefd=False), sys.stderr or os.fdopen(2, "w", closefd=False)


def main(argv: list[str] | None = None) -> int:
    """The command `lightrun`; its exit code."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what it has no character for
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # "~" would be "/"
    options, behind = _parsed(sys.argv[1:] if argv is None else argv)
    if options["command"] in COMMANDS:
        return client_main(options.pop("command"), options, behind)
    try:
        return serve(read_settings(options, os.environ))
    except (LightrunError, OSError, RuntimeError) as error:  # the last for a limit of threads
        print(f"lightrun: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
