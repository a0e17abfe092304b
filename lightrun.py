#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""lightrun: run a container over HTTP.

The life of a run, from `POST /run` to its last trace:

    accept    the body is checked against one table (Requests), a place is taken (Runner.submit), the run is on disk (Store)
    queue     until one of `--max-concurrent` workers is free
    pull      when the image is missing; concurrent runs share one pull
    create    one container with every hardening, labelled with the state dir and the run
    put       the files, as one plain tar built here (Artifacts), before anything in the container has run
    attach    one stream that carries stdout and stderr, opened before the start so that no byte is missed
    start     recorded first; then the command runs, and stdin is fed from a thread of its own
    read      to the end of the stream and of the container; a deadline, a cancel or a stop only sends a signal in between
    extract   the paths the client asked for come back as a tar of which only checked files and folders are kept
    record    the final state, in one transaction
    answer    whoever waits for the run gets that state
    remove    the container and its anonymous volumes; then old runs are evicted and the callback is sent

That line is `Runner._execute`, one worker thread for each run; after a crash a run re-enters it where it stopped.

Threads: the server's loop; its handlers (waitress), of which a fixed number may wait; one worker for each run that holds
a place, plus one while stdin is fed and one for each image being pulled; the housekeeper, which watches an absent engine
and sweeps what could not be removed; deliveries of callbacks. Each lock stands where it is made, beside the names of
what it guards.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import email.utils
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import hmac
import http.client
import ipaddress
import json
import logging
import math
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
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

__version__ = "0.1.0"
log = logging.getLogger("lightrun")

# --------------------------------------------------------------------------------------------------------------------
# Limits: every bound that is not an option
# --------------------------------------------------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_PROBLEMS = 100  # validation problems told at once; more say nothing new
MAX_JSON_DEPTH = 100  # levels of nesting in a body; far below Python's recursion limit
MAX_FOLDERS = 10_000  # that the files of a request need; each is a member of the tar
MAX_JSON_DIGITS = 1000  # digits of an integer in a body; converting more takes quadratic time
MAX_ARGUMENT_BYTES = 131_071  # Linux refuses longer single arguments and variables (MAX_ARG_STRLEN, with its NUL)
MIN_MEMORY_BYTES = 6 * MIB  # the engine refuses less
MIN_PIDS = 2  # the init and one program
MAX_QUERY_BYTES = 4 * KIB  # of a URL's query

MAX_ARTIFACT_ENTRIES = 50_000  # files and folders one run may keep: each costs an inode and a line of state
MAX_ARTIFACT_DEPTH = 64  # folders inside each other; what lies deeper is skipped
MAX_ARTIFACT_PATH_BYTES = 2048  # a path below the run's root, so that absolute ones stay under PATH_MAX
COPY_BYTES = 256 * KIB  # one piece of a file on its way to or from the disk; with 1 MiB extraction took twice as long

READ_BYTES = 256 * KIB  # one read of the attach stream
LINE_BYTES = 16 * KIB  # longer lines come in pieces, in a live run
MAX_SPOOL_BYTES = GIB  # how far the slowest follower of a log may fall behind before all of them are cut off
COPY_FACTOR = 4  # the engine's own copy of a log, which only recovery reads, to what we keep
PING_SECONDS = 15  # of silence in a live run
ENGINE_SECONDS = 60  # one engine call; an engine that is slower counts as absent
HEALTH_SECONDS = 2  # the same for /health
WAIT_SLICE_SECONDS = 1  # how long a waiting engine call may hide a cancel
RETRY_SECONDS = 2  # pause before an absent engine or a full disk is tried again
DISCONNECT_POLL_SECONDS = 0.25  # how late a client that left is noticed
DRAIN_SECONDS = 10  # what SIGTERM leaves to clients that wait

CALLBACK_SECONDS = 10  # one attempt
CALLBACK_DELAYS = (1, 5, 30, 120, 600)  # seconds before each further attempt
CALLBACK_JITTER = 1.25  # times that, at most
MAX_RETRY_AFTER_SECONDS = 600
MAX_DELIVERIES = 128  # attempts at a time, each on a thread
MAX_DELIVERIES_EACH = 4  # the same to one receiver; one that failed last gets one

CONTROL_THREADS = 16  # handlers beside the waiting ones, so that control routes always find one
MAX_CONNECTIONS = 4096
MAX_HEADER_BYTES = 64 * KIB
M_ARENA_MAX = -8  # of mallopt(3)

JSON, BYTES, TAR, EVENTS = "application/json", "application/octet-stream", "application/x-tar", "application/x-ndjson"

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
    if not match or not float(match[1]):
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


def _names_engine(text: str) -> bool:
    url = urllib.parse.urlsplit(text)
    return bool(url.path) if url.scheme == "unix" else url.scheme == "tcp" and bool(url.hostname and url.port)


_text = _cast(str, lambda text: text == text.strip() != "" and text.isprintable(), "printable text without spaces around it")
_mode = _cast(lambda text: int(text, 8), lambda mode: 0 <= mode <= 0o777, "an octal mode such as 0600")
_cpus = _cast(float, lambda cpus: 0.01 <= cpus <= 10_000, "a number of CPUs such as 0.5 or 2, at least 0.01")
_docker_host = _cast(_text, _names_engine, "unix:///path or tcp://host:port")


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser().absolute()


def option(cast: Callable[[str], Any], default: Any, text: str, shown: str = "") -> Any:
    """A row of the table: how to read it, what it is when absent, what `--help` says (`shown`: the default in words).
    A tuple as default makes it repeatable."""
    return dataclasses.field(default=default, metadata={"cast": cast, "help": text, "shown": shown})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every option of `lightrun serve`. Sizes in bytes, durations in seconds."""

    host: str = option(_text, "127.0.0.1", "address to listen on")
    port: int = option(_integer(0, 65535), 3000, "port to listen on; 0 takes a free one")
    socket: Path | None = option(_path, None, "listen on this Unix socket instead of TCP")
    socket_mode: int = option(_mode, 0o600, "mode of the Unix socket", "0600")
    token: str | None = option(_text, None, "bearer token that every route but /health then needs", "open to everybody")
    token_file: Path | None = option(_path, None, "file with bearer tokens, one a line, read at start")
    body_limit: int = option(_bytes(KIB), 10 * MIB, "largest request body", "10 MiB")
    state_dir: Path = option(_path, Path("~/.light-run"), "database and lock", "~/.light-run")
    artifacts_dir: Path | None = option(_path, None, "where artifacts are kept", "<state-dir>/artifacts")
    max_artifacts_bytes: int = option(_bytes(0), 20 * GIB, "bytes of artifacts, logs and records kept", "20 GiB")
    keep: int = option(_integer(1, 10**9), 100_000, "finished runs kept")
    extract_limit: int = option(_bytes(0), GIB, "bytes of artifacts that one run may keep", "1 GiB")
    log_limit: int = option(_bytes(KIB, 100 * MIB), MIB, "log bytes kept of one run, the newest", "1 MiB")
    max_concurrent: int = option(
        _integer(1, 10_000), max(16, 4 * (os.cpu_count() or 1)), "containers at a time", "max(16, 4 x CPUs)"
    )
    queue: int = option(_integer(0, 100_000), 256, "accepted runs that may wait for a place")
    max_waiting: int = option(_integer(1, 2_000), 320, "requests that may wait or stream at a time")
    memory: int = option(_bytes(MIN_MEMORY_BYTES), 512 * MIB, "memory of every run", "512m")
    cpus: float = option(_cpus, 1.0, "CPUs of every run", "1")
    pids: int = option(_integer(MIN_PIDS, 4_194_304), 100, "processes and threads of every run")
    runtime: str | None = option(_text, None, "OCI runtime, such as runc, crun or runsc", "the engine's default")
    pull: str = option(_one_of("missing", "always", "never"), "missing", "when to pull: missing, always or never")
    pull_timeout: float = option(parse_duration, 600.0, "time limit of a pull", "10m")
    allow_image: tuple[str, ...] = option(_text, (), "image pattern, as in docker.io/library/*; repeatable", "any")
    allow_network: tuple[str, ...] = option(_text, (), "network pattern; repeatable", "none")
    callback_allow: tuple[str, ...] = option(_text, (), "callback host pattern; repeatable", "any but link-local")
    docker_host: str | None = option(_docker_host, None, "engine: unix:///path or tcp://host:port", "DOCKER_HOST or local")
    log_format: str = option(_one_of("text", "json"), "text", "text, or json: one object a line")

    def artifacts_root(self) -> Path:
        """The folder of all artifacts."""
        return self.artifacts_dir or self.state_dir / "artifacts"

    def tokens(self) -> list[str]:
        """The bearer tokens, [] for an open server. Raises UsageError for a file that cannot be read or is empty."""
        tokens = [self.token] if self.token else []
        if self.token_file:
            try:
                lines = self.token_file.read_text("utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise UsageError(f"--token-file: cannot be read: {getattr(error, 'strerror', 'not UTF-8')}") from error
            tokens += [line.strip() for line in lines if line.strip()]
            if not tokens or not any(line.strip() for line in lines):
                raise UsageError("--token-file: holds no token")
        return tokens


# --------------------------------------------------------------------------------------------------------------------
# Requests: one table of fields validates, builds the RunRequest and is the JSON Schema
# --------------------------------------------------------------------------------------------------------------------

_SEGMENTS = r"^(?![\s\S]*(?:^|/)\.{0,2}(?:/|$))[^\\\u0000]+$"  # relative, without empty, `.` and `..` segments
_NO_DOTDOT = r"^(?![\s\S]*(?:^|/)\.\.(?:/|$))[^\u0000]+$"
_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_BASE64 = r"^[A-Za-z0-9+/]*={0,2}$"
_SIZE = r"^[0-9]{1,15}[bkmgBKMG]?$"
_HOST = r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
_HOST += r"|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of github.com/distribution/reference, or the id of an image.
_REFERENCE = rf"^(?:sha256:[a-f0-9]{{64}}|(?:{_HOST}/)?{_NAME}(?:/{_NAME})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[a-f0-9]{{64}})?)$"


def request_schema(settings: Settings) -> dict[str, Any]:
    """JSON Schema (2020-12) of the body of `POST /run` under the operator's limits. `says` is the error for a `pattern`
    or a `format`, where the keyword alone would not tell a person what to do."""
    command = {"type": "string", "minLength": 1, "maxLength": 2048}
    fields: dict[str, dict[str, Any]] = {
        "image": {
            "type": "string", "minLength": 1, "maxLength": 300, "pattern": _REFERENCE,
            "says": "must be an image reference such as alpine:3.19", "description": "Image to run.",
        },
        "files": {
            "type": "object", "minProperties": 1, "maxProperties": 10_000,
            "propertyNames": {
                "minLength": 1, "maxLength": 1024, "pattern": _SEGMENTS, "format": "file-path",
                "says": "must be a relative path without empty, . or .. segments and backslashes, each of 255 bytes at most",
            },
            "additionalProperties": {"anyOf": [
                {"type": "string"},
                {"type": "object", "required": ["base64"], "additionalProperties": False, "properties": {
                    "base64": {"type": "string", "pattern": _BASE64, "format": "base64", "says": "must be base64 with padding"}}},
            ]},
            "description": "Files put into the workdir before the start: path to text, or to {\"base64\": …}.",
        },
        "setup": {
            "type": "array", "minItems": 1, "maxItems": 50, "items": command,
            "description": "Shell commands run in the entrypoint's shell before it; the first that fails ends the run.",
        },
        "entrypoint": {
            "anyOf": [command, {"type": "array", "minItems": 1, "maxItems": 64,
                                "items": {"type": "string", "maxBytes": 100_000}}],
            "description": "A string runs as sh -c, an array without a shell. Absent: the image's own command.",
        },
        "input": {"description": "Any JSON value; its text is the container's stdin."},
        "stdin": {"type": "string", "description": "Raw text for the container's stdin."},
        "env": {
            "type": "object", "maxProperties": 1000,
            "propertyNames": {"pattern": _ENV_NAME, "says": "must be letters, digits and _, not beginning with a digit"},
            "additionalProperties": {"type": "string"}, "description": "Environment variables.",
        },
        "workdir": {
            "type": "string", "minLength": 1, "maxLength": 200, "pattern": r"^/", "format": "workdir", "default": "/app",
            "says": "must be an absolute path other than /, not below /proc, /sys or /dev, without ..",
            "description": "Working directory, made when missing.",
        },
        "network": {
            "type": "string", "minLength": 1, "maxLength": 100, "pattern": r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$", "format": "network",
            "says": "must be none or the name of a network; host, container:… and ns:… are always refused",
            "description": "Absent: the isolated bridge. none: no network. Else a network that --allow-network names.",
        },
        "timeout": {
            "type": "integer", "minimum": 1, "maximum": 3_600_000, "default": 1_200_000,
            "description": "Wall time of the container in ms, from its start.",
        },
        "memory": {
            "anyOf": [
                {"type": "integer", "minimum": MIN_MEMORY_BYTES, "maximum": settings.memory},
                {"type": "string", "pattern": _SIZE, "format": "memory",
                 "says": f"must be a size such as 256m, from {MIN_MEMORY_BYTES} to {settings.memory} bytes"},
            ],
            "description": "Memory, as bytes or 256m; at most the operator's limit.",
        },
        "cpus": {"type": "number", "minimum": 0.01, "maximum": settings.cpus, "description": "CPUs."},
        "pids": {"type": "integer", "minimum": MIN_PIDS, "maximum": settings.pids, "description": "Processes and threads."},
        "extract": {
            "type": "array", "minItems": 1, "maxItems": 20,
            "items": {"type": "string", "minLength": 1, "maxLength": 1024, "pattern": _NO_DOTDOT,
                      "says": "must be a path without .. segments"},
            "description": "Container paths to keep after the exit, absolute or relative to the workdir.",
        },
        "extractOn": {
            "enum": ["success", "exit"], "type": "string", "default": "success",
            "description": "success: keep after exit code 0. exit: also after a failure, a timeout, a stop, out of memory.",
        },
        "detached": {"type": "boolean", "default": False, "description": "Answer 202 and run in the background."},
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


def _formats(settings: Settings) -> dict[str, Callable[[str], bool]]:
    """What `pattern` cannot say, by the name that the schema gives it."""
    return {
        "file-path": lambda path: all(len(segment.encode(errors="replace")) <= 255 for segment in path.split("/")),
        "workdir": _good_workdir,
        "network": lambda name: name not in {"host", "default"},
        "memory": lambda text: MIN_MEMORY_BYTES <= parse_size(text) <= settings.memory,
        "callback-url": _good_url,
        "callback-secret": lambda text: not text.startswith("whsec_") or bool(_is_base64(text[6:])),
        "base64": _is_base64,
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


class Schema:
    """Validation by the part of JSON Schema that lightrun's table uses. Pure."""

    def __init__(self, schema: dict[str, Any], formats: Mapping[str, Callable[[str], bool]] | None = None) -> None:
        self.schema = schema
        self._formats = {"": lambda _: True, **(formats or {})}

    def problems(self, value: Any) -> Iterator[dict[str, Any]]:
        """Everything that is wrong with a value, as `{"path": […], "message": "…"}`."""
        return ({"path": path, "message": message} for path, message in self._check(value, self.schema, []))

    def _check(self, value: Any, schema: dict[str, Any], path: list[Any]) -> Iterator[tuple[list[Any], str]]:
        if "anyOf" in schema:
            fitting = [choice for choice in schema["anyOf"] if _is(value, choice["type"])]
            if fitting:
                yield from self._check(value, fitting[0], path)
            else:
                yield path, "must be of type " + " or ".join(choice["type"] for choice in schema["anyOf"])
        elif "type" in schema and not _is(value, schema["type"]):
            yield path, f"must be of type {schema['type']}"
        elif isinstance(value, str):
            yield from ((path, message) for message in self._text(value, schema))
        elif isinstance(value, dict) and "type" in schema:
            yield from self._members(value, schema, path)
        elif isinstance(value, list) and "type" in schema:
            yield from _count(len(value), schema, "Items", "entries", path)
            for index, item in enumerate(value):
                yield from self._check(item, schema.get("items", {}), [*path, index])
        elif isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield path, f"must be from {schema['minimum']} to {schema['maximum']}"

    def _text(self, value: str, schema: dict[str, Any]) -> Iterator[str]:
        bounds = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if not bounds[0] <= len(value) <= bounds[1]:
            yield f"must have {bounds[0]} to {bounds[1]} characters"
        elif len(value.encode(errors="replace")) > schema.get("maxBytes", math.inf):
            yield f"must have at most {schema['maxBytes']} bytes"
        elif "enum" in schema and value not in schema["enum"]:
            yield "must be one of " + ", ".join(schema["enum"])
        elif not (_regex(schema.get("pattern", "")).search(value) and self._formats[schema.get("format", "")](value)):
            yield schema["says"]

    def _members(self, value: dict[str, Any], schema: dict[str, Any], path: list[Any]) -> Iterator[tuple[list[Any], str]]:
        yield from _count(len(value), schema, "Properties", "entries", path)
        yield from (([*path, name], "is required") for name in schema.get("required", ()) if name not in value)
        known, others = schema.get("properties", {}), schema["additionalProperties"]
        for name, member in value.items():
            if name not in known and others is False:
                yield [*path, name], "is not a field"
                continue
            if name not in known:
                yield from (([*path, name], message) for message in self._text(name, schema.get("propertyNames", {})))
            yield from self._check(member, known.get(name, others), [*path, name])


def _count(count: int, schema: dict[str, Any], what: str, unit: str, path: list[Any]) -> Iterator[tuple[list[Any], str]]:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    if not low <= count <= high:
        yield path, f"must have {low} to {high} {unit}"


def _together(body: dict[str, Any], bad: set[Any]) -> Iterator[dict[str, Any]]:
    """The rules between fields. They look at the values of fields that are right by themselves, and at all for presence."""

    def problem(message: str, *path: Any) -> dict[str, Any]:
        return {"path": list(path), "message": message}

    sound = {name: value for name, value in body.items() if name not in bad}
    entrypoint, setup, files = sound.get("entrypoint"), sound.get("setup", []), sound.get("files", {})
    if "setup" in body and not isinstance(body.get("entrypoint"), str):
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
    if "callbackUrl" in body and body.get("detached") is not True:
        yield problem("needs detached", "callbackUrl")
    if "callbackSecret" in body and "callbackUrl" not in body:
        yield problem("needs callbackUrl", "callbackSecret")
    folders = folders_of(files)
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


def clean_path(path: str) -> str:
    """An absolute path without doubled, last or `.` slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def parent_folders(path: str) -> Iterator[str]:
    """`a/b/c` → `a`, `a/b`."""
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder above these relative paths; not all of them when they are more than MAX_FOLDERS."""
    folders: set[str] = set()
    for path in paths:
        while (path := posixpath.dirname(path)) and path not in folders and len(folders) <= MAX_FOLDERS:
            folders.add(path)
    return folders


def shell_script(setup: Iterable[str], entrypoint: str) -> str:
    """The setup commands and the entrypoint as one script for `sh -c`. `eval` keeps them in one shell and a syntax error
    in its own command; `case` looks at the exit code without a variable or a parameter that they could see."""
    return "".join(f"eval {shlex.quote(command)}\ncase $? in 0) ;; *) exit $? ;; esac\n" for command in setup) + entrypoint


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
    files: dict[str, bytes]
    command: list[str] | None
    stdin: bytes | None
    env: dict[str, str]
    workdir: str
    network: str | None
    timeout: float  # seconds
    memory: int
    cpus: float
    pids: int
    extract: list[str]
    extract_on_exit: bool
    detached: bool
    callback_url: str | None
    callback_secret: str | None

    @classmethod
    def parse(cls, raw: bytes, settings: Settings) -> RunRequest:
        """Check the body of `POST /run`. Raises BadRequest with every problem, NotAllowed for what a list refuses."""
        body = _checked(raw, Schema(request_schema(settings), _formats(settings)), _together)
        entrypoint, memory = body.get("entrypoint"), body.get("memory", settings.memory)
        if isinstance(entrypoint, str):
            entrypoint = ["sh", "-c", shell_script(body.get("setup", []), entrypoint)]
        stdin = json.dumps(body["input"], ensure_ascii=False) if "input" in body else body.get("stdin")
        request = cls(
            image=body["image"],
            reference=normalise_image(body["image"]),
            files={path: _content(value) for path, value in body.get("files", {}).items()},
            command=entrypoint,
            stdin=None if stdin is None else stdin.encode(),
            env=body.get("env", {}),
            workdir=clean_path(body.get("workdir", "/app")),
            network=body.get("network"),
            timeout=body.get("timeout", 1_200_000) / 1000,
            memory=parse_size(memory) if isinstance(memory, str) else int(memory),
            cpus=body.get("cpus", settings.cpus),
            pids=int(body.get("pids", settings.pids)),
            extract=body.get("extract", []),
            extract_on_exit=body.get("extractOn") == "exit",
            detached=body.get("detached", False),
            callback_url=body.get("callbackUrl"),
            callback_secret=body.get("callbackSecret"),
        )
        request.allowed_by(settings)
        return request

    def allowed_by(self, settings: Settings) -> None:
        """Raises NotAllowed when one of the operator's lists refuses this request."""
        if settings.allow_image and not matches_any(self.reference, settings.allow_image):
            raise NotAllowed(f"image {self.reference} is not one that --allow-image names")
        if self.network not in {None, "none"} and not matches_any(str(self.network), settings.allow_network):
            raise NotAllowed(f"network {self.network} is not one that --allow-network names")
        if self.callback_url:
            host = urllib.parse.urlsplit(self.callback_url).hostname or ""
            if not callback_host_allowed(host, settings.callback_allow):
                raise NotAllowed(f"callback host {host} is not one that --callback-allow names")


Rules = Callable[[dict[str, Any], set[Any]], Iterable[dict[str, Any]]]


def _checked(raw: bytes, schema: Schema, rules: Rules = lambda _body, _bad: ()) -> dict[str, Any]:
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise BadRequest(details=[{"path": [], "message": f"the body is not JSON: {error}"}]) from error
    problems = [*_bad_strings(body, []), *schema.problems(body)]
    if isinstance(body, dict):
        problems += rules(body, {problem["path"][0] for problem in problems if problem["path"]})
    if problems:
        raise BadRequest(details=problems[:MAX_PROBLEMS])
    return body  # type: ignore[no-any-return]  # the schema says it is an object


def _content(value: str | dict[str, str]) -> bytes:
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])


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

REASONS = [
    "exited", "stopped", "timeout", "oom", "cancelled", "interrupted", "pull_failed", "start_failed", "lost", "engine_error",
]  # fmt: skip
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

    @property
    def status(self) -> str:
        """`running`, `succeeded`, `failed` or `cancelled`: it follows from the reason."""
        if self.reason is None:
            return "running"
        if self.reason in {"exited", "stopped"}:
            return "succeeded" if self.exit_code == 0 else "failed"
        return "cancelled" if self.reason == "cancelled" or (self.reason == "interrupted" and self.waited) else "failed"

    def head(self) -> dict[str, Any]:
        """The state without logs, artifacts and extracted, as `/runs` lists it."""
        final = self.finished is not None
        state = {
            "id": self.id,
            "status": self.status,
            "phase": None if final else self.phase,
            "reason": self.reason,
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
            "logsTruncated": self.logs_truncated,
            "callback": self.callback,
        }
        return {name: value for name, value in state.items() if value is not None}

    @classmethod
    def from_head(cls, head: dict[str, Any], waited: bool) -> Run:
        """An unfinished run as it was accepted."""
        return cls(head["id"], head["image"], parse_timestamp(head["createdAt"]), waited, callback=head.get("callback"))

    def tail(self) -> dict[str, Any]:
        """The two parts of the state that can be long, kept apart from the head."""
        parts = {"artifacts": self.artifacts, "extracted": self.extracted}
        return {name: part for name, part in parts.items() if part}


def whole_state(head: dict[str, Any], tail: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    """The state as `GET /runs/<id>` and a callback show it."""
    state = {**head, "logs": lines}
    state["logsTruncated"] = state.pop("logsTruncated")
    callback = state.pop("callback", None)
    return {**state, **tail, **({"callback": callback} if callback else {})}


def to_json(value: Any) -> bytes:
    """The one way in which lightrun writes JSON: UTF-8, no spaces to spare."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


# --------------------------------------------------------------------------------------------------------------------
# Store: runs in SQLite; the only section that writes SQL
# --------------------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 1
SCHEMA = """
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
"""


class Store:
    """The record of every run. A write that was acknowledged to a client survives a power loss (`durable`: an fsync of
    the write-ahead log); the others survive any end of the daemon. Readers have a connection of their own, so that
    they never wait for a disk. Source: sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous.

    What is secret (a request that may have to be started again, a callback that is owed) lies in a file of its own, which
    is unlinked when it is no longer needed: a database would keep its pages, and its log a copy."""

    def __init__(self, state_dir: Path) -> None:
        self._write_lock = threading.Lock()  # guards _writer, _total and _count
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
                finished = "SELECT coalesce(sum(size), 0), count(*) FROM runs WHERE status != 'running'"
                self._total, self._count = self._one(finished)
            except (OSError, sqlite3.Error, Unavailable) as error:
                raise StartError(f"{state_dir}: {error}") from error
            self._opened = opened.pop_all()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON", "wal_autocheckpoint=1000"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _prepare(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StartError(f"the state dir was made by a newer lightrun (schema {version}, known {SCHEMA_VERSION})")
        if version == 0:
            identity = f"INSERT INTO meta VALUES ('state', '{uuid.uuid4().hex}')"
            self._writer.executescript(f"BEGIN;{SCHEMA}{identity};PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    @contextlib.contextmanager
    def _transaction(self, durable: bool) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """One transaction; rolled back, and raised as Unavailable, when it cannot be written (a full disk, say)."""
        with self._write_lock:
            try:
                self._writer.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield lambda sql, *values: self._writer.execute(sql, values)
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise Unavailable("storage_unavailable", f"the state dir cannot be written: {error}", 5) from error

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

    def add(self, run: Run, key: str | None = None, digest: str = "", request: bytes | None = None) -> None:
        """Record an accepted run, with its request if it is to survive the daemon: on disk when this returns then."""
        if request is not None:
            self._write_secret(run.id, request)
        try:
            with self._transaction(durable=request is not None) as execute:
                execute(
                    "INSERT INTO runs (id, status, waited, owed, key, digest, head) VALUES (?, 'running', ?, ?, ?, ?, ?)",
                    run.id, run.waited, run.callback is not None, key, digest, to_json(run.head()).decode(),
                )  # fmt: skip
        except Unavailable:
            self._drop_secret(run.id)
            raise

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
        needed |= {f"{run_id}.callback" for run_id, _, _ in self.owed()}
        for path in self._secrets.iterdir():
            if path.name not in needed:
                self._drop_secret(path.name)
        for path in artifacts_root.iterdir():
            if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(\.partial)?", path.name) and path.name not in known:
                remove_tree(path)

    def find_key(self, key: str) -> tuple[str, str] | None:
        """Id and digest of the run with this idempotency key."""
        rows = self._all("SELECT id, digest FROM runs WHERE key = ?", key)
        return rows[0] if rows else None

    def begin(self, run_id: str) -> None:
        """Record that the run's container is about to be started."""
        with self._transaction(durable=False) as execute:
            execute("UPDATE runs SET begun = 1 WHERE id = ?", run_id)

    def fed(self, run_id: str) -> None:
        """Record that the run's stdin was written whole."""
        with self._transaction(durable=False) as execute:
            execute("UPDATE runs SET fed = 1 WHERE id = ?", run_id)

    def ask(self, run_id: str, asked: str) -> None:
        """Record what is asked of an unfinished run."""
        with self._transaction(durable=True) as execute:
            execute("UPDATE runs SET asked = ? WHERE id = ?", asked, run_id)

    def unfinished(self) -> list[tuple[str, int, int, int, str | None]]:
        """head, waited, begun, fed and asked of every unfinished run, in the order of acceptance."""
        return self._all("SELECT head, waited, begun, fed, asked FROM runs WHERE status = 'running' ORDER BY seq")

    def finish(self, run: Run, frames: bytes, callback: bytes | None = None) -> None:
        """Record the end of a run, whole, in one transaction, with what its callback needs."""
        head, tail = to_json(run.head()).decode(), to_json(run.tail()).decode()
        size = len(head) + len(tail) + len(frames) + sum(entry.get("bytes", 0) for entry in run.artifacts)
        if callback is not None:
            self._write_secret(f"{run.id}.callback", callback)
        with self._transaction(durable=True) as execute:
            execute("UPDATE runs SET status = ?, size = ?, head = ?, asked = NULL WHERE id = ?", run.status, size, head, run.id)
            execute("INSERT OR REPLACE INTO details VALUES (?, ?, ?)", run.id, tail, frames)
        self._weigh(size, 1)
        self._drop_secret(run.id)

    def _weigh(self, size: int, count: int) -> None:
        with self._write_lock:
            self._total, self._count = self._total + size, self._count + count

    def owed(self) -> list[tuple[str, float, str]]:
        """Id, time of the next attempt and head of every finished run whose callback is owed."""
        return self._all("SELECT id, due, head FROM runs WHERE owed AND status != 'running' ORDER BY seq")

    def attempted(self, run_id: str, callback: dict[str, Any], due: float | None) -> None:
        """Record an attempt at a callback; `due` is None when there will be no other."""
        with self._transaction(durable=False) as execute:
            row = execute("SELECT head FROM runs WHERE id = ?", run_id).fetchone()
            if row:
                head = to_json({**json.loads(row[0]), "callback": callback}).decode()
                execute("UPDATE runs SET owed = ?, due = ?, head = ? WHERE id = ?", due is not None, due or 0, head, run_id)
        if due is None:
            self._drop_secret(f"{run_id}.callback")

    def delete(self, run_id: str) -> None:
        """Forget a finished run. Raises NotFound, Conflict."""
        status, size = self._one("SELECT status, size FROM runs WHERE id = ?", run_id)
        if status == "running":
            raise Conflict("the run is still running", "running")
        with self._transaction(durable=True) as execute:
            gone = execute("DELETE FROM runs WHERE id = ? AND status != 'running'", run_id).rowcount
        self._weigh(-size * gone, -gone)
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

    def heads(self, status: str | None, before: str | None, limit: int) -> list[str]:
        """The JSON of up to `limit` heads, newest first. Raises NotFound for an unknown `before`."""
        top = self._one("SELECT seq FROM runs WHERE id = ?", before)[0] if before else sys.maxsize
        where, values = ("AND status = ?", [status]) if status else ("", [])
        rows = self._all(f"SELECT head FROM runs WHERE seq < ? {where} ORDER BY seq DESC LIMIT ?", top, *values, limit)
        return [head for (head,) in rows]

    def usage(self) -> tuple[int, int]:
        """Bytes and number of finished runs."""
        return self._total, self._count

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


def frames(data: bytes | bytearray) -> Iterator[tuple[int, bytes]]:
    """The (stream, payload) pairs of a text of whole frames."""
    offset = 0
    while offset < len(data):
        stream, length = FRAME.unpack_from(data, offset)
        yield stream, bytes(data[offset + FRAME.size : offset + FRAME.size + length])
        offset += FRAME.size + length


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


def log_lines(data: bytes) -> list[str]:
    """The lines of a log, each assembled from its own stream, in the order in which they were complete."""
    lines: list[bytes] = []
    rest: dict[int, list[bytes]] = {1: [], 2: []}  # pieces, since joining at each one would take quadratic time
    for stream, payload in frames(data):
        first, *others = payload.split(b"\n")
        rest[stream].append(first)
        for piece in others:
            lines.append(b"".join(rest[stream]))
            rest[stream] = [piece]
    lines += filter(None, map(b"".join, rest.values()))
    return [line.decode(errors="replace") for line in lines]


def whole_frames(data: bytes | bytearray) -> int:
    """How many of these bytes, of a text of frames cut anywhere, are whole frames."""
    end = 0
    while len(data) - end >= FRAME.size:
        after = end + FRAME.size + FRAME.unpack_from(data, end)[1]
        if after > len(data):
            break
        end = after
    return end


class LineEvents:
    """Turns frames into the log events of a live run: lines by stream, long ones in pieces."""

    def __init__(self) -> None:
        self._rest = {1: b"", 2: b""}

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events of some whole frames."""
        for stream, payload in frames(data):
            *lines, rest = (self._rest[stream] + payload).split(b"\n")
            for line in lines:
                *pieces, last = _pieces(line)
                yield from (self._event(stream, piece, partial=True) for piece in pieces)
                yield self._event(stream, last)
            *pieces, self._rest[stream] = _pieces(rest)
            yield from (self._event(stream, piece, partial=True) for piece in pieces)

    def end(self) -> Iterator[dict[str, Any]]:
        """The events of lines without an end."""
        return (self._event(stream, rest) for stream, rest in self._rest.items() if rest)

    @staticmethod
    def _event(stream: int, line: bytes, **more: bool) -> dict[str, Any]:
        return {"event": "log", "stream": STREAMS[stream], "line": line.decode(errors="replace"), **more}


def _pieces(line: bytes) -> list[bytes]:
    """A line in pieces of at most LINE_BYTES, none of which ends within a character."""
    pieces = []
    while len(line) > LINE_BYTES:
        cut = next((at for at in range(LINE_BYTES, LINE_BYTES - 4, -1) if line[at] & 0xC0 != 0x80), LINE_BYTES)
        pieces.append(line[:cut])
        line = line[cut:]
    return [*pieces, line]


class Log:
    """The newest `limit` payload bytes of a run, as one text of frames: 9 bytes for each kept one at the very worst, and
    what is stored is what is kept. Written by one thread, read by any. While somebody follows, what arrives also goes to
    a temporary file, so that a follower may be slow without holding up the program or filling the memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()  # guards all below
        self._data = bytearray()  # whole frames; neighbours of one stream are merged
        self._last = 0  # where the last frame begins
        self._payload = 0
        self._partial = b""  # of a frame still being received
        self._followers = 0
        self._spool: IO[bytes] | None = None
        self._spooled = 0
        self._ended = False
        self.truncated = False

    def feed(self, data: bytes) -> None:
        """Take a piece of the attach stream, cut anywhere."""
        pending = self._partial + data
        end = whole_frames(pending)
        whole, self._partial = pending[:end], pending[end:]
        if whole:
            with self._changed:
                offset = 0
                while offset < end:
                    stream, length = FRAME.unpack_from(whole, offset)
                    offset += FRAME.size
                    self._append(stream, memoryview(whole)[offset : offset + length])
                    offset += length
                self._to_followers(whole)

    def _append(self, stream: int, payload: memoryview) -> None:
        if self._data and self._data[self._last] == stream:
            length = FRAME.unpack_from(self._data, self._last)[1] + len(payload)
        else:
            self._last, length = len(self._data), len(payload)
            self._data += bytes(FRAME.size)
        FRAME.pack_into(self._data, self._last, stream, length)
        self._data += payload
        self._payload += len(payload)
        if self._payload > 2 * self._limit:  # in large steps, since each moves what is kept
            self._trim()

    def _trim(self) -> None:
        """Drop the oldest payload over the limit; a frame that is cut keeps its header."""
        excess = self._payload - self._limit
        if excess <= 0:
            return
        self.truncated = True
        self._payload -= excess
        cut = 0
        while excess:
            stream, length = FRAME.unpack_from(self._data, cut)
            dropped = min(length, excess)
            excess -= dropped
            cut += dropped if dropped < length else FRAME.size + length
        del self._data[:cut]
        self._last = max(0, self._last - cut)
        if dropped < length:
            FRAME.pack_into(self._data, 0, stream, length - dropped)

    def _to_followers(self, whole: bytes) -> None:
        if self._spool:
            try:
                if self._spooled + len(whole) > MAX_SPOOL_BYTES:
                    raise OSError("too far behind")
                self._spool.write(whole)
                self._spool.flush()
                self._spooled += len(whole)
            except OSError as error:  # its followers are cut off: better than a log with a hole
                log.warning("followers of a log are cut off: %s", error)
                self._close_spool()
        self._changed.notify_all()

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Take the engine's copy for all that was kept; followers go on with what comes. The copy has room for COPY_FACTOR
        times the limit and spends up to 28 bytes on a line, so that one that is longer than the limit may have rotated."""
        copy, copied = Log(self._limit), 0
        for piece in pieces:
            copy.feed(piece)
            copied += len(piece)
        with self._changed:
            self._data, self._last, self._payload = copy._data, copy._last, copy._payload
            self._partial, self.truncated = b"", copy.truncated or copied > self._limit

    def frames(self) -> bytes:
        """What is kept."""
        with self._changed:
            self._trim()
            return bytes(self._data)

    def nudge(self, ended: bool = False) -> None:
        """Wake followers for news of another kind, or for the end of the log."""
        with self._changed:
            self._ended = self._ended or ended
            self._changed.notify_all()

    def follow(self) -> Generator[bytes, None, None]:
        """What is kept, then all that comes, as whole frames; b"" now and then, and when nudged. Raises LogGap."""
        with self._changed:
            self._followers += 1
            if self._spool is None:
                self._spool, self._spooled = tempfile.TemporaryFile(), 0  # noqa: SIM115  # closed below
            kept, spool, offset, rest = self.frames(), self._spool, self._spooled, b""
        try:
            yield kept
            while True:
                with self._changed:
                    if offset == self._spooled and not self._ended:
                        self._changed.wait(DISCONNECT_POLL_SECONDS)
                    if self._spool is not spool:
                        raise LogGap
                    data, ended = os.pread(spool.fileno(), READ_BYTES, offset), self._ended
                if not data and ended:
                    return
                offset += len(data)
                pending = rest + data
                end = whole_frames(pending)
                rest = pending[end:]
                yield pending[:end]
        finally:
            with self._changed:
                self._followers -= 1
                if not self._followers:
                    self._close_spool()

    def _close_spool(self) -> None:
        with contextlib.suppress(OSError):
            if self._spool:
                self._spool.close()
        self._spool = None


class LogGap(Exception):
    """A follower fell too far behind."""


# --------------------------------------------------------------------------------------------------------------------
# Artifacts: the tar that goes in, the tar that comes back, what is kept on disk
# --------------------------------------------------------------------------------------------------------------------


class ArtifactError(Exception):
    """An `extract` entry that cannot be kept, in words for the client."""


def _tar_header(name: str, size: int | None = None, mode: int = 0o777, modified: float = 0) -> bytes:
    """One member's header, owned by root; a folder's when there is no size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = (tarfile.DIRTYPE, 0) if size is None else (tarfile.REGTYPE, size)
    info.mode, info.mtime = mode, int(modified)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _tar_padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def files_tar(workdir: str, files: Mapping[str, bytes], shared: bool, now: float) -> bytes:
    """The tar to be put at `/`: its first member is a folder, so that no engine takes it for a compressed one and runs a
    program of the image to unpack it (CVE-2026-41567). Everybody may change what it holds, since the image may run as
    any user; `shared` opens the workdir too. Without it the workdir is left as the image has it, a link included."""
    root = workdir[1:]
    parts = [_tar_header("./", mode=0o755, modified=now)]
    if shared or not files:
        parts.append(_tar_header(f"{root}/", modified=now))
    parts += [_tar_header(f"{root}/{folder}/", modified=now) for folder in sorted(folders_of(files))]
    for path, content in files.items():
        parts += [_tar_header(f"{root}/{path}", len(content), modified=now), content, _tar_padding(len(content))]
    return b"".join([*parts, TAR_END])


class Extraction:
    """What one run keeps: the paths it asked for, one after the other, into one folder, within one budget of bytes and
    entries. A path is unpacked beside the folder and moved in when it is whole, so that a bad one leaves nothing."""

    def __init__(self, root: Path, run_id: str, limit: int) -> None:
        self._folder, self._staging = root / run_id, root / f"{run_id}.partial"
        self._bytes_left, self._entries_left = limit, MAX_ARTIFACT_ENTRIES
        self.artifacts: list[dict[str, Any]] = []

    def keep(self, tar: IO[bytes], folder: bool) -> dict[str, Any]:
        """Keep what an engine sent for one path: a file under its name, a folder's contents without the folder. Returns
        `{"bytes": …}`, with `skipped` when something was left out. Raises ArtifactError."""
        remove_tree(self._staging)
        try:
            self._staging.mkdir(mode=0o700)
            entries, skipped = self._unpack(tar, folder)
            self._move_in(entries)
        except tarfile.TarError as error:
            raise ArtifactError("the engine sent a broken archive") from error
        except OSError as error:
            raise ArtifactError(f"cannot be kept: {error.strerror or 'input/output error'}") from error
        finally:
            remove_tree(self._staging)
        size = sum(entry["bytes"] for entry in entries)
        self._bytes_left -= size
        self._entries_left -= len(entries)
        self.artifacts = sorted(self.artifacts + entries, key=lambda entry: str(entry["path"]))
        return {"bytes": size, **({"skipped": skipped} if skipped else {})}

    def discard(self) -> None:
        """Drop all that was kept."""
        self.artifacts = []
        remove_tree(self._folder)

    def _unpack(self, tar: IO[bytes], folder: bool) -> tuple[list[dict[str, Any]], int]:
        entries: dict[str, dict[str, Any]] = {}
        bytes_left, skipped, top = self._bytes_left, 0, None
        with tarfile.open(fileobj=tar, mode="r|", bufsize=COPY_BYTES) as archive:
            for member in archive:
                if folder and top is None:
                    top = member.name  # the folder itself comes first
                    continue
                path = member.name[len(top) :].strip("/") if top is not None else posixpath.basename(member.name)
                if not (member.isdir() or member.isreg()) or not _keepable(path):
                    skipped += 1
                    continue
                if member.isreg():
                    if member.size > bytes_left:
                        raise ArtifactError("is larger than what this run may still keep")
                    bytes_left -= member.size
                    self._write(archive, member, path)
                else:
                    (self._staging / path).mkdir(mode=0o700, parents=True, exist_ok=True)
                for name in [*parent_folders(path), path]:
                    entries.setdefault(name, {"path": name, "bytes": 0, "type": "directory"})
                if member.isreg():
                    entries[path] = {"path": path, "bytes": member.size, "type": "file"}
                if len(entries) > self._entries_left:
                    raise ArtifactError("holds more files and folders than a run may keep")
                archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every member otherwise
        return list(entries.values()), skipped

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        target = self._staging / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        source = archive.extractfile(member)
        with open(target, "xb", opener=_private) as file:
            shutil.copyfileobj(source, file, COPY_BYTES)  # type: ignore[arg-type]  # a regular file has a source

    def _move_in(self, entries: list[dict[str, Any]]) -> None:
        names = sorted({entry["path"].partition("/")[0] for entry in entries})
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            if os.path.lexists(self._folder / name):
                raise ArtifactError(f"collides with an earlier entry's {name}")
        for name in names:
            (self._staging / name).rename(self._folder / name)


def _keepable(path: str) -> bool:
    """Whether a name from a container may become a name on this disk."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:  # bytes that were not UTF-8
        return False
    segments = path.split("/")
    sound = all(segment not in {"", ".", ".."} and len(segment.encode()) <= 255 for segment in segments)
    return sound and "\0" not in path and len(segments) <= MAX_ARTIFACT_DEPTH and len(encoded) <= MAX_ARTIFACT_PATH_BYTES


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
            *parents, name = path.split("/")
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


def artifacts_tar(root: Path, artifacts: Iterable[dict[str, Any]]) -> Generator[bytes, None, None]:
    """All artifacts of a run as one tar, in pieces. Raises NotFound when one has gone."""
    for entry in artifacts:
        file = open_artifact(root, entry["path"])
        if file is None:
            yield _tar_header(entry["path"] + "/", mode=0o755)
            continue
        with file:
            yield _tar_header(entry["path"], entry["bytes"], 0o644, os.fstat(file.fileno()).st_mtime)
            while piece := file.read(COPY_BYTES):
                yield piece
            yield _tar_padding(entry["bytes"])
    yield TAR_END


# --------------------------------------------------------------------------------------------------------------------
# Engine: the only section that names docker or requests
# --------------------------------------------------------------------------------------------------------------------

LABEL_STATE, LABEL_RUN = "lightrun.state", "lightrun.run"
NETWORK = "lightrun"
NETWORK_OPTIONS = {"com.docker.network.bridge.enable_icc": "false"}
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID"]
GO_MODE_FOLDER, GO_MODE_LINK = 1 << 31, 1 << 27  # of Go's fs.FileMode, in X-Docker-Container-Path-Stat
GO_MODE_OTHER = 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19  # devices, pipes, sockets, anything else


@dataclasses.dataclass(frozen=True)
class Image:
    """An image on the engine: its id, and whether its program starts as root."""

    id: str
    root: bool


@dataclasses.dataclass(frozen=True)
class ContainerState:
    """What the engine says of a container. Times in Unix seconds; `started` None when it never was."""

    image_id: str
    running: bool
    started: float | None
    exit_code: int
    oom_killed: bool


class Output:
    """The attach stream of one container."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.open = True

    def read(self, wake: int, seconds: float) -> bytes:
        """The next bytes; b"" when `seconds` have passed, `wake` is readable or, with `open` then False, at the end."""
        poll = select.poll()  # select() fails on descriptors over 1023
        poll.register(self._response.raw.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(max(0, seconds) * 1000)]
        if self._response.raw.fileno() not in ready:
            return b""
        with translated("read the output"):
            data: bytes = self._response.raw.read1(READ_BYTES)
        if not data:
            self.close()
        return data

    def close(self) -> None:
        """Let the connection go; an engine keeps a container busy with one that is forgotten."""
        self.open = False
        self._response.close()


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """Turn every failure of the SDK into an EngineError: the one place where its exceptions are known."""
    import docker.errors
    import requests
    import urllib3

    try:
        yield
    except docker.errors.APIError as error:
        kind = {404: EngineMissing, 304: EngineConflict, 409: EngineConflict}.get(error.status_code or 500, EngineError)
        raise kind(f"the engine cannot {action}: {error.explanation or error}") from error
    except (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise EngineAbsent(f"the engine did not answer (to {action})") from error
    except (OSError, http.client.HTTPException) as error:
        raise EngineAbsent(f"the connection to the engine broke (to {action})") from error


class Engine:
    """The Docker Engine. Every method raises EngineError or one of its kinds, and nothing else of the SDK's."""

    def __init__(self, settings: Settings, state_id: str) -> None:
        self._settings, self._state_id = settings, state_id
        self._client: Any = None
        self._network_lock = threading.Lock()  # held while the network is looked for
        self._network_ready = False

    def _api(self) -> Any:
        """The SDK's client, made when the engine first answers; by two at once rather than under a lock that a hung engine
        would hold."""
        import docker.utils

        if self._client is None:
            host = self._settings.docker_host
            environment = {**os.environ, **({"DOCKER_HOST": host} if host else {})}
            options = docker.utils.kwargs_from_env(environment=environment)
            with translated("be reached"):
                client = docker.APIClient(version="auto", timeout=HEALTH_SECONDS, max_pool_size=64, **options)
            client.timeout = ENGINE_SECONDS
            client.trust_env = False  # requests looks for proxies and .netrc at each call otherwise
            self._client = client
        return self._client

    @contextlib.contextmanager
    def _call(self, action: str) -> Iterator[Any]:
        api = self._api()
        with translated(action):
            yield api

    def _stream(self, method: str, path: str, seconds: float = ENGINE_SECONDS, **options: Any) -> Any:
        """A call whose answer is read piece by piece; the SDK's own would not let go of a connection half-way."""
        headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}  # the engine would gzip an archive
        import docker.errors
        import requests

        api = self._api()
        url = f"{api.base_url}/v{api.api_version}{path}"
        response = api.request(method, url, headers=headers, stream=True, timeout=seconds, **options)
        try:
            response.raise_for_status()
        except requests.HTTPError as error:
            with contextlib.closing(response):
                docker.errors.create_api_error_from_http_exception(error)
        return response

    def version(self) -> dict[str, str]:
        """Version and API version; the quick question whether the engine answers."""
        with self._call("tell its version") as api, contextlib.closing(
            api.get(f"{api.base_url}/version", timeout=HEALTH_SECONDS)
        ) as response:
            about = response.json()
        return {"version": about["Version"], "apiVersion": about["ApiVersion"]}

    def check_limits(self) -> None:
        """Raises StartError for an option that this engine cannot give."""
        with self._call("tell what it has") as api:
            about = api.info()
        if self._settings.cpus > about["NCPU"]:
            raise StartError(f"--cpus {self._settings.cpus:g}: the engine has {about['NCPU']}")
        if self._settings.memory > about["MemTotal"]:
            raise StartError(f"--memory {self._settings.memory}: the engine has {about['MemTotal']} bytes")
        if self._settings.runtime and self._settings.runtime not in about["Runtimes"]:
            raise StartError(f"--runtime {self._settings.runtime}: the engine knows {', '.join(sorted(about['Runtimes']))}")

    def image(self, reference: str) -> Image:
        """What is known of an image that is on the engine. Raises EngineMissing."""
        with self._call("find the image") as api:
            about = api.inspect_image(reference)
        user = (about.get("Config") or {}).get("User", "").partition(":")[0]
        return Image(about["Id"], user in {"", "0", "root"})

    def pull(self, reference: str, seconds: float) -> Generator[dict[str, Any], None, None]:
        """Pull an image, with the credentials of the daemon user's Docker configuration; yields the engine's progress.
        `seconds` bounds a silence."""
        import docker.auth
        import docker.errors
        import docker.utils

        with self._call("pull the image") as api:
            repository, tag = docker.utils.parse_repository_tag(reference)
            try:
                api.reload_config()
                credentials = docker.auth.get_config_header(api, docker.auth.resolve_repository_name(repository)[0])
            except (docker.errors.DockerException, ValueError, LookupError, TypeError, AttributeError) as error:  # secret
                raise EngineError("the Docker configuration holds credentials that cannot be read") from error
            with contextlib.closing(self._stream(
                "POST", "/images/create", seconds, params={"fromImage": repository, "tag": tag},
                headers={"X-Registry-Auth": credentials} if credentials else {},
            )) as response:  # fmt: skip
                for line in response.iter_lines():
                    event = json.loads(line)
                    if "error" in event:
                        raise EngineError(f"the engine cannot pull the image: {event['error']}")
                    yield event

    def _ensure_network(self) -> str:
        """The isolated bridge, made when missing. Two daemons may make it at once, and older engines then have two."""
        with self._network_lock:
            if not self._network_ready:
                with self._call("make the network") as api:
                    if not self._networks(api):
                        with contextlib.suppress(EngineConflict), translated("make the network"):
                            api.create_network(
                                NETWORK, driver="bridge", options=NETWORK_OPTIONS, check_duplicate=True, labels={LABEL_STATE: ""}
                            )
                    first, *others = sorted(self._networks(api), key=lambda network: (network["Created"], network["Id"]))
                    for other in others:
                        with contextlib.suppress(EngineError), translated("remove a second network"):
                            api.remove_network(other["Id"])
                options = first.get("Options") or {}
                if first["Driver"] != "bridge" or any(options.get(name) != value for name, value in NETWORK_OPTIONS.items()):
                    raise EngineError(f"the network {NETWORK} is not an isolated bridge; remove it")
                self._network_ready = True
        return NETWORK

    @staticmethod
    def _networks(api: Any) -> list[dict[str, Any]]:
        return [network for network in api.networks(names=[NETWORK]) if network["Name"] == NETWORK]

    def forget_network(self) -> None:
        """Look for the isolated bridge again before its next use: it may have been pruned."""
        self._network_ready = False

    def _network_mode(self, name: str | None) -> str:
        """What a run's `network` means to the engine; a named one must be just that, not an id or the host's."""
        if name is None:
            return self._ensure_network()
        if name != "none":
            with self._call("find the network") as api:
                about = api.inspect_network(name)
            if about["Name"] != name or about["Driver"] in {"host", "null"}:
                raise EngineMissing(f"there is no network named {name} that a run may use")
        return name

    def create(self, run_id: str, image: Image, request: RunRequest) -> str:
        """Create a run's container with every hardening of SPEC 5; its id."""
        config = {
            "Image": image.id,
            "Env": [f"{name}={value}" for name, value in request.env.items()],
            "WorkingDir": request.workdir,
            "Labels": {LABEL_STATE: self._state_id, LABEL_RUN: run_id},
            "OpenStdin": request.stdin is not None,
            "StdinOnce": request.stdin is not None,
            "Healthcheck": {"Test": ["NONE"]},  # an image's own would run beside the run
            "HostConfig": self._host_config(request),
        }
        if request.command is not None:
            config |= {"Entrypoint": request.command, "Cmd": []}
        with self._call("create the container") as api:
            return str(api.create_container_from_config(config, f"lightrun-{run_id}")["Id"])

    def _host_config(self, request: RunRequest) -> dict[str, Any]:
        copy_bytes = COPY_FACTOR * self._settings.log_limit
        return {
            "CapDrop": ["ALL"],
            "CapAdd": CAPABILITIES,
            "SecurityOpt": ["no-new-privileges"],
            "Privileged": False,
            "Init": True,
            "IpcMode": "private",
            "Memory": request.memory,
            "MemorySwap": request.memory,
            "NanoCpus": round(request.cpus * 1e9),
            "PidsLimit": request.pids,
            "NetworkMode": self._network_mode(request.network),
            "LogConfig": {"Type": "local", "Config": {"max-size": str(copy_bytes), "max-file": "2", "compress": "false"}},
            **({"Runtime": self._settings.runtime} if self._settings.runtime else {}),
        }

    def put(self, container: str, tar: bytes) -> None:
        """Unpack a tar at the root of a container that has not been started."""
        with self._call("put the files") as api:
            api.put_archive(container, "/", tar)

    def attach(self, container: str) -> Output:
        """The container's output from now on."""
        with self._call("attach"):
            parameters = {"stream": 1, "stdout": 1, "stderr": 1}
            return Output(self._stream("POST", f"/containers/{container}/attach", params=parameters))

    def open_stdin(self, container: str) -> Any:
        """A socket to the container's stdin; the end of it is the end of file."""
        with self._call("attach stdin") as api:
            sock = api.attach_socket(container, {"stdin": 1, "stream": 1})
            sock = getattr(sock, "_sock", sock)  # the SDK wraps all but a TLS socket for reading
            sock.settimeout(None)
            return sock

    def start(self, container: str) -> None:
        """Start the container; to say it twice is harmless while it runs."""
        with self._call("start the container") as api:
            api.start(container)

    def inspect(self, container: str) -> ContainerState:
        """The engine's word on a container, by id or name. Raises EngineMissing."""
        with self._call("inspect the container") as api:
            about = api.inspect_container(container)
        state = about["State"]
        started = None if state["StartedAt"].startswith("0001-") else parse_timestamp(state["StartedAt"])
        return ContainerState(about["Image"], state["Running"], started, state["ExitCode"], state["OOMKilled"])

    def wait(self, container: str, seconds: float) -> ContainerState:
        """Wait up to `seconds` for the container's exit; its state then."""
        with contextlib.suppress(EngineAbsent), self._call("wait") as api:
            api.wait(container, timeout=max(seconds, 0.001))
        return self.inspect(container)

    def kill(self, container: str, signal_name: str) -> bool:
        """Send a signal; whether the container was there to take it."""
        try:
            with self._call("send a signal") as api:
                api.kill(container, signal_name)
        except (EngineMissing, EngineConflict):
            return False
        return True

    def logs(self, container: str) -> Iterator[bytes]:
        """The engine's own copy of the log, as frames cut anywhere."""
        with self._call("read the log"):
            parameters = {"stdout": 1, "stderr": 1}
            with contextlib.closing(self._stream("GET", f"/containers/{container}/logs", params=parameters)) as response:
                yield from response.iter_content(READ_BYTES)

    @contextlib.contextmanager
    def archive(self, container: str, path: str) -> Iterator[tuple[IO[bytes], int]]:
        """A path of an exited container as a tar stream, and its Go file mode. Raises EngineMissing."""
        with self._call("copy out"), contextlib.closing(
            self._stream("GET", f"/containers/{container}/archive", params={"path": path})
        ) as response:
            about = json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
            yield response.raw, about["mode"]

    def remove(self, container: str) -> None:
        """Remove a container, running or not, with its anonymous volumes; gone already is as good."""
        with contextlib.suppress(EngineMissing), self._call("remove the container") as api:
            api.remove_container(container, v=True, force=True)

    def containers(self) -> list[tuple[str, str]]:
        """Id and run id of every container of this state dir."""
        with self._call("list the containers") as api:
            found = api.containers(all=True, filters={"label": [f"{LABEL_STATE}={self._state_id}"]})
        runs = [(about["Id"], about["Labels"].get(LABEL_RUN, ""), about["Names"]) for about in found]
        # An image can carry any label, and somebody else may run it; but the name is ours alone.
        return [(container, run_id) for container, run_id, names in runs if names == [f"/lightrun-{run_id}"]]

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
    port = parts.port or (443 if tls else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    try:
        with contextlib.closing(kind(host, port)) as connection, _connect(host, port, allow) as sock, _cut_off(sock):
            connection.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host) if tls else sock
            with contextlib.suppress(OSError):  # who answers may close before it has read all (RFC 9112, 9.6)
                connection.request("POST", target, body, {"Content-Type": JSON, "User-Agent": "lightrun", **headers})
            response = _final_response(connection)
    except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:
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


@contextlib.contextmanager
def _cut_off(sock: socket.socket) -> Iterator[None]:
    """An end to an attempt that takes longer, were it only trickling. Raises TimeoutError then: what was cut short can look
    complete."""
    deadline = time.monotonic() + CALLBACK_SECONDS
    with sock.dup() as twin:  # TLS takes the first one away
        guard = threading.Timer(CALLBACK_SECONDS, _shut, [twin])
        guard.start()
        try:
            yield
        finally:
            guard.cancel()
            if time.monotonic() >= deadline:
                raise TimeoutError


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _final_response(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """The answer after all interim ones (RFC 9110, 15.2), of which http.client knows 100 only."""
    response = connection.getresponse()
    while response.status < 200:
        response.headers = None  # type: ignore[assignment]  # as it is before the first
        response.begin()
    return response


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
        delay = None
        try:
            outcome, delay = self._outcome(delivery, packed)
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
        try:
            self._post(delivery, packed)
        except CallbackError as error:
            log.warning("callback of run %s, attempt %d: %s", delivery.run_id, delivery.attempts, error)
            delay = None
            if error.retry and delivery.attempts <= len(CALLBACK_DELAYS):
                delay = max(CALLBACK_DELAYS[delivery.attempts - 1] * random.uniform(1, CALLBACK_JITTER), error.after)
            status = "failed" if delay is None else "pending"
            return {"status": status, "attempts": delivery.attempts, "lastError": str(error)}, delay
        return {"status": "delivered", "attempts": delivery.attempts}, None

    def _post(self, delivery: Delivery, packed: bytes) -> None:
        head, _, body = packed.partition(b"\n")
        about, run_id = json.loads(head), delivery.run_id
        headers = {"X-Light-Run-Id": run_id, "X-Light-Run-Attempt": str(delivery.attempts)}
        if secret := about["secret"]:
            headers["X-Light-Run-Signature"] = signature(secret, body)
            headers |= webhook_headers(secret, run_id, body, time.time()) if secret.startswith("whsec_") else {}
        deliver(about["url"], body, headers, self._allow)

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


def choose_victims(candidates: Iterable[tuple[str, int]], spared: str, excess_bytes: int, excess_runs: int) -> Iterator[str]:
    """The oldest runs whose removal brings both excesses to zero, never the `spared` one. Pure; as lazy as its input."""
    for run_id, size in candidates:
        if excess_bytes <= 0 and excess_runs <= 0:
            return
        if run_id != spared:
            excess_bytes, excess_runs = excess_bytes - size, excess_runs - 1
            yield run_id


class Evictor:
    """Removes whole runs, record and folder."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._root = store, settings.artifacts_root()
        self._max_bytes, self._max_runs = settings.max_artifacts_bytes, settings.keep
        self._lock = threading.Lock()  # one eviction at a time, or two would count the same excess

    def evict(self, just_finished: str) -> None:
        """Bring what is kept under the caps."""
        with self._lock:
            size, count = self._store.usage()
            excess = size - self._max_bytes, count - self._max_runs
            if max(excess) <= 0:
                return
            for run_id in choose_victims(self._store.removable(), just_finished, *excess):
                with contextlib.suppress(NotFound):  # deleted by a client meanwhile
                    self.remove(run_id)
                    log.info("evicted run %s", run_id)

    def remove(self, run_id: str) -> None:
        """Remove a finished run. The record goes first: a folder without one is recognised and removed at the next
        start, a record without its folder would promise artifacts that are not there. Raises NotFound, Conflict."""
        self._store.delete(run_id)
        remove_tree(self._root / run_id)


# --------------------------------------------------------------------------------------------------------------------
# Runner: one run as one function; admission, cancel
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ask:
    """What somebody wants of a run: to end, for a reason, by a signal and then, after `grace` seconds, by SIGKILL."""

    reason: str
    signal: str = "SIGKILL"
    grace: float = RETRY_SECONDS
    why: str = "the run was ended before its command started"  # said when that is so


BOUNDLESS = Settings(memory=1 << 50, cpus=1e6, pids=1 << 22, allow_network=("*",), callback_allow=("*", "169.254.*", "fe80*"))


def _stored_request(raw: bytes, image: str) -> RunRequest:
    """A request as it was accepted once; the least that runs the image when it is gone or spoilt."""
    try:
        return RunRequest.parse(raw, BOUNDLESS)
    except LightrunError:
        return RunRequest.parse(to_json({"image": image}), BOUNDLESS)


class Job:
    """A run in progress: its record, its request, its log, and what is asked of it."""

    def __init__(self, run: Run, request: RunRequest, log_limit: int) -> None:
        self.run, self.request, self.log = run, request, Log(log_limit)
        self.done = threading.Event()
        self.container = f"lightrun-{run.id}"
        self.clients = 0  # that wait for the end; guarded by the runner's lock
        self.begun = False  # the container may have been started
        self.fed = request.stdin is None  # stdin was written whole
        self.recovered = False  # there may be a container already, whose output nobody has read
        self.relaunched = False
        self.unheard = False  # it may have ended while no engine took its output
        self.output: Output | None = None
        self.stdin: Any = None  # a socket
        self.pull: Pull | None = None
        self.taken: str | None = None  # the reason whose signal the engine took
        self._entered = time.monotonic()
        self._lock = threading.Lock()  # guards asked and the pipe
        self.asked: Ask | None = None
        self.wake, self._waker = os.pipe()
        os.set_blocking(self.wake, False)

    def ask(self, ask: Ask) -> None:
        """Ask for an end, from any thread and without waiting. A cancel overrides a stop; nothing overrides a cancel."""
        with self._lock:
            if self._waker >= 0 and (self.asked is None or self.asked.reason == "stopped"):
                self.asked = ask
                os.write(self._waker, b"!")

    def heed(self) -> Ask | None:
        """What is asked, once the worker has been woken for it."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake, 16)
            return self.asked

    def check(self) -> None:
        """Raises RunEnds when the run should not go on to its start."""
        if self.asked:
            raise RunEnds(self.asked.reason, self.asked.why)

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
        return whole_state(head, self.run.tail(), log_lines(kept))

    def close(self) -> None:
        """Let go of what a finished run does not need."""
        with self._lock:
            os.close(self.wake)
            os.close(self._waker)
            self._waker = -1
        self.close_streams()

    def close_streams(self) -> None:
        """Let go of the attach stream, and of stdin: an engine leaves whoever feeds it waiting when the container has ended."""
        if self.output:
            self.output.close()
        if self.stdin:
            with contextlib.suppress(OSError):
                self.stdin.shutdown(socket.SHUT_RDWR)


class Pull:
    """One pull, shared by all runs that want the image meanwhile; given up when none of them is left."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.waiting = 0
        self.error: str | None = None
        self.progress: dict[str, Any] = {}  # the engine's latest word

    def run(self, events: Generator[dict[str, Any], None, None]) -> None:
        """Follow the engine's progress to the end."""
        try:
            with contextlib.closing(events):
                for self.progress in events:
                    if not self.waiting:
                        raise EngineError("nobody waits for the image any more")
        except EngineError as error:
            self.error = str(error)
        finally:
            self.done.set()


class Runner:
    """Takes runs in, runs each on a worker thread of its own, and sees every one of them to its end."""

    def __init__(self, settings: Settings, store: Store, engine: Engine, evictor: Evictor, callbacks: Callbacks) -> None:
        self._settings, self._store, self._engine = settings, store, engine
        self._evictor, self._callbacks = evictor, callbacks
        self._key_lock = threading.Lock()  # held while a keyed run is looked up and accepted
        self._lock = threading.Lock()  # guards all below
        self._jobs: dict[str, Job] = {}  # accepted, not yet recorded as ended
        self._queue: collections.deque[Job] = collections.deque()
        self._places = 0  # taken in the queue or by a worker, from before the record until the container is gone
        self._workers = 0
        self._pulls: dict[str, Pull] = {}
        self._stopping = False
        self._engine_up = True
        self._untidy = threading.Event()  # tells the housekeeper that the engine is absent or holds what should be gone

    # -- taking runs in, and looking at them

    def submit(self, request: RunRequest, raw: bytes, key: str | None = None) -> str:
        """Accept a run, whose id this returns: it is recorded then. With the idempotency key of another run, that one's
        id, if the body is the same. Raises Unavailable, Conflict."""
        if key is None:
            return self._accept(request, raw, None, "")
        digest = hashlib.sha256(raw).hexdigest()
        with self._key_lock:
            known = self._store.find_key(key)
            if known is None:
                return self._accept(request, raw, key, digest)
        run_id, known_digest = known
        if known_digest != digest:
            raise Conflict("the Idempotency-Key belongs to a run with another body")
        return run_id

    def _accept(self, request: RunRequest, raw: bytes, key: str | None, digest: str) -> str:
        with self._lock:
            if self._stopping:
                raise Unavailable("stopping", "lightrun is going down", DRAIN_SECONDS)
            if not self._engine_up:
                raise Unavailable("engine_unavailable", "the container engine does not answer", 5)
            if self._places >= self._settings.max_concurrent + self._settings.queue:
                raise Unavailable("busy", "all places for running and queued runs are taken")
            self._places += 1
        callback = {"status": "pending", "attempts": 0} if request.callback_url else None
        waited = not request.detached and key is None
        run = Run(str(uuid.uuid4()), request.image, time.time(), waited=waited, callback=callback)
        job = Job(run, request, self._settings.log_limit)
        try:
            self._store.add(run, key, digest, None if waited else raw)
        except BaseException:
            job.close()
            with self._lock:
                self._places -= 1
            raise
        with self._lock:
            self._jobs[run.id] = job
            self._queue.append(job)
            self._hire()
        return run.id

    def _hire(self) -> None:
        """Under the lock: one more worker, if there may be one."""
        if self._workers < self._settings.max_concurrent:
            self._workers += 1
            self._spawn(self._work)

    def recover(self) -> None:
        """Take up every run that an earlier daemon left unfinished: those that may have a container at once, the others
        in their order."""
        for head, waited, begun, fed, asked in self._store.unfinished():
            run = Run.from_head(json.loads(head), bool(waited))
            raw = self._store.request(run.id) or b""  # a waiting client's is not stored
            job = Job(run, _stored_request(raw, run.image), self._settings.log_limit)
            job.begun, job.fed, job.recovered = bool(begun), bool(fed) or job.request.stdin is None, True
            if asked:
                job.ask(Ask(**json.loads(asked)))
            elif waited:
                job.ask(Ask("interrupted"))
            elif not begun:
                self._judge_again(job, raw)
            with self._lock:
                self._places += 1
                self._jobs[run.id] = job
                if job.begun or job.asked:
                    self._workers += 1
                    self._spawn(self._work, job)
                else:
                    self._queue.append(job)
                    self._hire()
        self._untidy.set()  # an earlier daemon may have left containers without a run
        threading.Thread(target=self._housekeeping, name="housekeeper", daemon=True).start()

    def _judge_again(self, job: Job, raw: bytes) -> None:
        """A run that was accepted under other limits must keep to those of today, as long as it has not begun."""
        try:
            job.request = RunRequest.parse(raw, self._settings)
        except LightrunError as error:
            job.ask(Ask("start_failed", why=f"refused when it was taken up again: {error or error.more}"))

    @staticmethod
    def _spawn(target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name="run", daemon=True).start()

    def job(self, run_id: str) -> Job | None:
        """The run in progress with this id."""
        with self._lock:
            return self._jobs.get(run_id)

    def counts(self) -> tuple[int, int]:
        """Runs that have a worker, and runs that wait for one."""
        with self._lock:
            return len(self._jobs) - len(self._queue), len(self._queue)

    def ask(self, run_id: str, ask: Ask) -> None:
        """Ask a run to end; a queued one ends at once, without a place. Raises NotFound, Conflict."""
        job = self.job(run_id)
        if job is None:
            self._store.head(run_id)
            raise Conflict("the run has ended", "not_running")
        try:
            if not job.run.waited:
                self._store.ask(run_id, to_json(dataclasses.asdict(ask)).decode())
        finally:  # with a full disk too: what ends a run makes room
            job.ask(ask)
        with self._lock:
            queued = job in self._queue
            if queued:
                self._queue.remove(job)
        if queued:
            self._spawn(self._execute, job)

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
                deserted = not job.clients and job.run.waited
            if deserted:
                with contextlib.suppress(Conflict, NotFound):  # it has ended
                    self.ask(job.run.id, Ask("cancelled"))

    # -- one run

    def _work(self, job: Job | None = None) -> None:
        """A worker: one run after the other until none is queued."""
        while True:
            if job:
                self._execute(job)
            with self._lock:
                if not self._queue or self._workers > self._settings.max_concurrent:
                    self._workers -= 1
                    return
                job = self._queue.popleft()

    def _execute(self, job: Job) -> None:
        """One run from its place to its last trace."""
        try:
            while not job.begun:
                self._launch(job)
            ending = self._see_to_end(job)
        except RunEnds as end:
            ending = {"reason": end.reason, "error": str(end)}
        except EngineError as error:
            ending = {"reason": "engine_error", "error": str(error)}
        except Exception:
            log.exception("run %s", job.run.id)
            ending = {"reason": "engine_error", "error": "lightrun failed; its log says how"}
        self._record(job, ending)
        try:
            self._engine.remove(job.container)
        except EngineError as error:
            log.warning("run %s: %s", job.run.id, error)
            self._untidy.set()
        with self._lock:
            self._places -= 1
        with contextlib.suppress(Unavailable):  # the next run tries again
            self._evictor.evict(job.run.id)

    def _launch(self, job: Job) -> None:
        """pull, create, put, attach, start. When this returns without `begun`, it is to be done again: the engine went
        away, or the network did, before the command could start."""
        request, engine = job.request, self._engine
        try:
            job.check()
            job.enter("starting")
            if job.recovered and self._has_started(job):  # a power loss can take `begun` back
                job.begun = True
                return
            job.recovered = False
            image = self._image(job)
            job.run.image_id = image.id
            job.container = engine.create(job.run.id, image, request)
            if request.files or not image.root:
                engine.put(job.container, files_tar(request.workdir, request.files, not image.root, time.time()))
            job.output = engine.attach(job.container)
            job.stdin = None if request.stdin is None else engine.open_stdin(job.container)
            job.check()
            self._insist(job, lambda: self._store.begin(job.run.id))
            job.begun, job.request = True, dataclasses.replace(request, files={}, stdin=None)  # which may be large
            engine.start(job.container)
            if job.stdin:
                self._spawn(self._feed, job, request.stdin)
        except EngineAbsent as error:
            self._mind_absence(job, error)  # if it was asked to start, what follows looks whether it did
        except EngineError as error:
            if job.relaunched or not isinstance(error, EngineMissing):
                raise RunEnds("start_failed", str(error)) from error
            engine.forget_network()  # pruned since it was last used, most likely
            job.close_streams()
            job.begun, job.request, job.recovered, job.relaunched = False, request, True, True

    def _has_started(self, job: Job) -> bool:
        """Whether there is a container of this run that ever ran; one that never did is removed."""
        with contextlib.suppress(EngineMissing):
            if self._engine.inspect(job.container).started is not None:
                return True
            self._engine.remove(job.container)
        return False

    def _insist(self, job: Job, write: Callable[[], None]) -> None:
        """Write to the store, again and again while its disk is full."""
        while True:
            try:
                return write()
            except Unavailable as error:
                log.error("run %s: %s", job.run.id, error)
                time.sleep(RETRY_SECONDS)

    def _mind_absence(self, job: Job, error: EngineAbsent) -> None:
        """Wait until the engine is back. Raises RunEnds, EngineAbsent for a run that cannot wait or need not."""
        log.warning("run %s: %s", job.run.id, error)
        self._untidy.set()
        job.recovered = job.unheard = True
        job.close_streams()
        while not self._answers():
            if not job.begun:
                job.check()
            if job.run.waited and not job.begun:
                raise error
            time.sleep(RETRY_SECONDS)

    def _feed(self, job: Job, data: bytes) -> None:
        """Write a run's stdin. A program that ends before it has read all of it breaks the pipe, which is its right."""
        with contextlib.closing(job.stdin) as stdin, contextlib.suppress(OSError, Unavailable):
            stdin.sendall(data)
            stdin.shutdown(socket.SHUT_WR)
            job.fed = True
            if not job.run.waited:
                self._store.fed(job.run.id)

    def _image(self, job: Job) -> Image:
        """The run's image, pulled if need be. Raises RunEnds."""
        try:
            if self._settings.pull != "always":
                with contextlib.suppress(EngineMissing):
                    return self._engine.image(job.request.reference)
            if self._settings.pull == "never" or is_image_id(job.request.reference):
                raise RunEnds("pull_failed", f"there is no image {job.request.reference} and it is not to be pulled")
            job.enter("pulling")
            self._pull(job)
            job.enter("starting")
            return self._engine.image(job.request.reference)
        except EngineAbsent:
            raise
        except EngineError as error:
            raise RunEnds("pull_failed", str(error)) from error

    def _pull(self, job: Job) -> None:
        reference, seconds = job.request.reference, self._settings.pull_timeout
        deadline = time.monotonic() + seconds
        with self._lock:
            pull = self._pulls.get(reference)
            fresh = pull is None or pull.done.is_set()
            if pull is None or fresh:
                pull = self._pulls[reference] = Pull()
            pull.waiting += 1
        job.pull = pull
        if fresh:
            self._spawn(pull.run, self._engine.pull(reference, seconds))
        try:
            while not pull.done.wait(DISCONNECT_POLL_SECONDS):
                job.check()
                if time.monotonic() > deadline:
                    raise RunEnds("pull_failed", f"the pull took longer than {seconds:g} s")
        finally:
            with self._lock:
                pull.waiting -= 1
                if not pull.waiting and self._pulls.get(reference) is pull:
                    del self._pulls[reference]
        if pull.error:
            raise RunEnds("pull_failed", pull.error)

    def _see_to_end(self, job: Job) -> dict[str, Any]:
        """read to the end → wait → extract, as often as the engine goes away in between."""
        while True:
            try:
                return self._conclude(job, self._watch(job))
            except EngineMissing as error:
                raise RunEnds("lost", "the container vanished") from error
            except EngineAbsent as error:
                self._mind_absence(job, error)

    def _readopt(self, job: Job, state: ContainerState) -> None:
        """Take up a container whose output nobody has read for a while, or which may not have been started."""
        if not job.fed:
            job.ask(Ask("interrupted"))
        if state.started is None:
            job.check()
            job.output = self._engine.attach(job.container)
            self._engine.start(job.container)
        elif state.running:  # for those who look now; what is kept is read again at the end
            job.log.replace(self._engine.logs(job.container))
            job.output = self._engine.attach(job.container)

    def _watch(self, job: Job) -> ContainerState:
        """Read to the end of the output and of the container, and send the signals that fall due meanwhile."""
        state = self._engine.inspect(job.container)
        if job.recovered:
            job.unheard = job.unheard and not state.running
            self._readopt(job, state)
            state = self._engine.inspect(job.container)
            if not state.running:  # attached too late, and an engine may then never say that it was the end
                job.close_streams()
        if state.started is None:
            raise RunEnds("engine_error", "the engine does not say when the container started")
        job.run.image_id, job.run.started = state.image_id, state.started
        job.enter("running")
        kill_at = time.monotonic() + state.started + job.request.timeout - time.time()
        heeded: Ask | None = None
        while True:
            if (asked := job.heed()) is not heeded and asked:
                if self._engine.kill(job.container, asked.signal):
                    job.taken = asked.reason
                heeded, kill_at = asked, min(kill_at, time.monotonic() + asked.grace)
            if (left := kill_at - time.monotonic()) <= 0:
                if self._engine.kill(job.container, "SIGKILL"):
                    job.taken = job.taken or "timeout"
                left = RETRY_SECONDS
                kill_at = time.monotonic() + left
            if job.output and job.output.open:
                job.log.feed(job.output.read(job.wake, left))
            elif not (state := self._engine.wait(job.container, min(left, WAIT_SLICE_SECONDS))).running:
                return state

    def _conclude(self, job: Job, state: ContainerState) -> dict[str, Any]:
        """What became of a container that has exited, and what it leaves."""
        if job.recovered:
            job.log.replace(self._engine.logs(job.container))
            job.log.truncated = job.log.truncated or job.unheard
        if job.recovered and not job.fed:  # it may have taken the loss for the end of its input
            job.taken = job.taken or "interrupted"
        reason = job.taken or ("oom" if state.oom_killed and state.exit_code else "exited")
        ending: dict[str, Any] = {"reason": reason, "exit_code": state.exit_code, "oom_killed": state.oom_killed}
        ending["error"] = {
            "timeout": f"killed after its timeout of {job.request.timeout * 1000:.0f} ms",
            "oom": "killed for using more memory than its limit",
            "stopped": "stopped on request",
            "cancelled": "cancelled",
            "interrupted": "killed because lightrun went away under it",
        }.get(reason)
        kept_anyway = job.request.extract_on_exit and reason in {"exited", "stopped", "timeout", "oom"}
        if job.request.extract and (kept_anyway or (state.exit_code == 0 and reason in {"exited", "stopped"})):
            job.enter("extracting")
            ending |= self._extract(job)
        return ending

    def _extract(self, job: Job) -> dict[str, Any]:
        extraction = Extraction(self._settings.artifacts_root(), job.run.id, self._settings.extract_limit)
        extraction.discard()  # of an earlier try, which the engine's absence cut short
        extracted = []
        for path in job.request.extract:
            if job.asked and job.asked.reason != "stopped":
                extraction.discard()
                return {"extracted": [{"from": path, "status": "error", "message": "cancelled"} for path in job.request.extract]}
            extracted.append({"from": path, **self._keep(job, extraction, path)})
        return {"artifacts": extraction.artifacts, "extracted": extracted}

    def _keep(self, job: Job, extraction: Extraction, path: str) -> dict[str, Any]:
        """One entry of `extract`."""
        try:
            with self._engine.archive(job.container, clean_path(posixpath.join(job.request.workdir, path))) as (tar, mode):
                if mode & GO_MODE_LINK:
                    raise ArtifactError("is a link")
                if mode & GO_MODE_OTHER:
                    raise ArtifactError("is neither a file nor a folder")
                return {"status": "ok", **extraction.keep(tar, bool(mode & GO_MODE_FOLDER))}
        except EngineMissing:
            self._engine.inspect(job.container)  # raises when it is the container that is missing
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
        frames = job.log.frames()
        run = dataclasses.replace(job.run, finished=time.time(), logs_truncated=job.log.truncated, **ending)
        state = whole_state({**run.head(), "callback": None}, run.tail(), log_lines(frames)) if run.callback else None
        packed = Callbacks.packed(job.request, to_json(state)) if state else None
        self._insist(job, lambda: self._store.finish(run, frames, packed))
        if job.recovered and not run.artifacts:
            remove_tree(self._settings.artifacts_root() / run.id)  # of an extraction that was cut short
        with self._lock:
            del self._jobs[run.id]
        job.run = run
        job.done.set()
        job.log.nudge(ended=True)
        job.close()
        log.info("run %s %s (%s)", run.id, run.status, run.reason)
        if run.callback:
            self._callbacks.owe(run.id)

    # -- the engine's absence

    def _answers(self) -> bool:
        try:
            self._engine.version()
        except EngineError:
            return False
        return True

    def _housekeeping(self) -> None:
        """Whenever something is untidy: wait for the engine, then remove the containers that no run in progress has."""
        while self._untidy.wait():
            self._untidy.clear()
            try:
                for container, run_id in self._engine.containers():
                    if self.job(run_id) is None:
                        self._engine.remove(container)
                self._engine_up = True
            except EngineError as error:
                absent = isinstance(error, EngineAbsent)
                if self._engine_up or not absent:  # an absence is told once
                    log.warning("%s; trying again", error)
                self._engine_up = not absent
                self._untidy.set()
                time.sleep(RETRY_SECONDS)

    def stop(self, seconds: float) -> None:
        """Take no more runs, give those with a waiting client some seconds, then kill them. The others go on without us."""
        with self._lock:
            self._stopping = True
            attended = [job for job in self._jobs.values() if not job.request.detached]
        deadline = time.monotonic() + seconds
        for job in attended:
            job.done.wait(max(0.0, deadline - time.monotonic()))
        left = [job for job in attended if job.run.waited and not job.done.is_set()]
        for job in left:
            with contextlib.suppress(LightrunError):
                self.ask(job.run.id, Ask("interrupted"))
        for job in left:
            job.done.wait(seconds)


# --------------------------------------------------------------------------------------------------------------------
# HTTP API: parse, call, shape the answer
# --------------------------------------------------------------------------------------------------------------------


class Stream:
    """Pieces for a client as they come, until it leaves; gives its place back when closed, begun or not."""

    def __init__(self, call: Call, pieces: Generator[bytes, None, None], place: contextlib.ExitStack) -> None:
        self._call, self._pieces, self._place = call, pieces, place

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        import waitress.channel

        try:
            for piece in self._pieces:
                if self._call.gone():
                    break
                if piece:
                    return piece
        except (LogGap, LightrunError, OSError) as error:  # too late for a status: the connection just ends
            raise waitress.channel.ClientDisconnected from error
        raise StopIteration

    def close(self) -> None:
        """See PEP 3333."""
        with self._place:
            self._pieces.close()


@dataclasses.dataclass
class Answer:
    """What goes back to a client: bytes, a file (which holds no thread while it is sent), or pieces as they come."""

    status: int = 200
    body: bytes | IO[bytes] | Stream = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON; bytes are taken as JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    return Answer(status, body, {"Content-Type": JSON, **headers})


class Call:
    """One request to a route."""

    def __init__(self, environ: dict[str, Any], query: dict[str, Any]) -> None:
        self._environ, self.query = environ, query

    def header(self, name: str, default: Any = "") -> Any:
        """A header's text, the default when absent."""
        return self._environ.get("HTTP_" + name.upper().replace("-", "_"), default)

    def gone(self) -> bool:
        """Whether the client has closed its side of the connection."""
        return bool(self._environ["waitress.client_disconnected"]())

    def json_body(self) -> bytes:
        """The raw body, which must call itself JSON. Raises UnsupportedMediaType."""
        kind = self._environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise UnsupportedMediaType("the body must be application/json")
        return bytes(self._environ["wsgi.input"].read())

    def optional_json(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The body by its schema; {} for none. Raises BadRequest, UnsupportedMediaType."""
        if self._environ.get("CONTENT_LENGTH") in {None, "", "0"}:
            return {}
        return _checked(self.json_body(), Schema(schema))


STOP_SCHEMA = {
    "type": "object", "additionalProperties": False, "properties": {
        "signal": {"type": "string", "enum": sorted(known.name for known in signal.Signals), "default": "SIGTERM"},
        "grace": {"type": "integer", "minimum": 0, "maximum": 300_000, "default": 10_000, "description": "ms until SIGKILL"},
    },
}  # fmt: skip
STATUSES = ["running", "succeeded", "failed", "cancelled"]
LOG_QUERY: dict[str, dict[str, Any]] = {
    "stream": {"type": "string", "enum": list(STREAMS.values())},
    "tail": {"type": "integer", "minimum": 0, "maximum": 1_000_000_000},
    "follow": {"type": "boolean"},
}
LIST_QUERY: dict[str, dict[str, Any]] = {
    "status": {"type": "string", "enum": STATUSES},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
    "before": {"type": "string", "minLength": 1, "maxLength": 100},
}
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
        {200: {JSON: "Run", EVENTS: "Event"}, 202: {JSON: "Accepted"}, 409: {}}, body="RunRequest",
    ),
    Route("GET", "/runs", "runs", "List runs, newest first", {200: {JSON: "Runs"}}, LIST_QUERY),
    Route("GET", RUNS, "state", "The state of a run", {200: {JSON: "Run"}}, WAIT_QUERY),
    Route("DELETE", RUNS, "delete", "Delete a finished run and its artifacts", {204: {}, 409: {}}),
    Route("GET", f"{RUNS}/logs", "logs", "The raw bytes of a run's output", {200: {BYTES: "Bytes"}}, LOG_QUERY),
    Route("POST", f"{RUNS}/cancel", "cancel", "Kill a run", {204: {}, 409: {}}),
    Route("POST", f"{RUNS}/stop", "stop", "Signal a run, and kill it if it does not end", {204: {}, 409: {}}, body="Stop"),
    Route("GET", ARTIFACTS, "artifacts", "List artifacts, or get them as one tar", {200: {JSON: "Artifacts", TAR: "Bytes"}}),
    Route(
        "GET", f"{ARTIFACTS}/<path:path>", "artifact", "Download a file, or list a folder",
        {200: {BYTES: "Bytes", JSON: "Artifacts"}, 206: {BYTES: "Bytes"}, 304: {}, 412: {}, 416: {}},
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
    schema = Schema({"type": "object", "properties": properties, "additionalProperties": False})
    problems += [{**problem, "path": ["query", *problem["path"]]} for problem in schema.problems(values)]
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
    plain = re.sub(r'[^ !#-\[\]-~]|%', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


REFERENCE = "#/components/schemas/"
_TEXT, _COUNT, _MOMENT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}
_NUMBERS = {"type": "object", "additionalProperties": _COUNT}
_HEAD_REQUIRED = "id status image createdAt logsTruncated"
_HEAD = {
    "id": _TEXT, "status": {"enum": STATUSES}, "phase": {"enum": list(PHASES)}, "reason": {"enum": REASONS}, "image": _TEXT,
    "imageId": _TEXT, "createdAt": _MOMENT, "startedAt": _MOMENT, "finishedAt": _MOMENT, "exitCode": {"type": "integer"},
    "oomKilled": {"const": True}, "error": _TEXT, "durationMs": _COUNT, "timings": _NUMBERS, "logsTruncated": {"type": "boolean"},
    "callback": _object("status attempts", status={"enum": ["pending", "delivered", "failed"]}, attempts=_COUNT, lastError=_TEXT),
}  # fmt: skip
ANSWERS = {
    "Run": _object(
        f"{_HEAD_REQUIRED} logs", **_HEAD, logs=_list(_TEXT), artifacts={"$ref": REFERENCE + "Artifacts"},
        extracted=_list(_object("from status", **{"from": _TEXT}, status={"enum": ["ok", "missing", "error"]}, bytes=_COUNT,
                                skipped=_COUNT, message=_TEXT)),
    ),
    "Runs": _list(_object(_HEAD_REQUIRED, **_HEAD)),
    "Artifact": _object("path bytes type", path=_TEXT, bytes=_COUNT, type={"enum": ["file", "directory"]}),
    "Artifacts": _list({"$ref": REFERENCE + "Artifact"}),
    "Accepted": _object("id status url", id=_TEXT, status={"enum": STATUSES}, url=_TEXT),
    "Event": _object("event", event={"enum": ["accepted", "pulling", "started", "log", "ping", "finished"]}),
    "Health": _object("status docker version runs", status={"enum": ["ok", "unavailable"]}, version=_TEXT, runs=_NUMBERS),
    "Error": _object(
        "error", error=_TEXT, message=_TEXT, details=_list(_object("path message", path={"type": "array"}, message=_TEXT))
    ),
    "Bytes": {"type": "string", "contentMediaType": BYTES},
    "Any": {"type": "object"},
}  # fmt: skip


def _operation(route: Route) -> dict[str, Any]:
    """A route as OpenAPI describes it."""

    def content(kinds: Mapping[str, str]) -> dict[str, Any]:
        return {"content": {kind: {"schema": {"$ref": REFERENCE + name}} for kind, name in kinds.items()}} if kinds else {}

    rules = {404: "<run_id>" in route.path, 415: route.body, 503: route.path.startswith("/run")}
    answers = {}
    for status in sorted({400, 401, 403, 413, 431, 500, *(status for status in rules if rules[status]), *route.answers}):
        kinds = route.answers.get(status) or ({JSON: "Error"} if status >= 400 else {})
        answers[str(status)] = {"description": http.client.responses[status], **content(kinds)}
    parameters = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in re.findall(r"<(\w+)", route.path)]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if route.handler == "run":
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": {**_TEXT, "minLength": 1, "maxLength": 200}})
    body = {"requestBody": {"required": route.handler == "run", **content({JSON: route.body})}} if route.body else {}
    open_to_all: dict[str, Any] = {"security": []} if route.path == "/health" else {}
    about = {"operationId": route.handler, "summary": route.summary, "parameters": parameters, "responses": answers}
    return {**about, **body, **open_to_all}


def openapi(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1 of all routes, from the table that serves them and the one that validates requests."""
    example = {"image": "alpine:3.19", "entrypoint": "echo hello"}
    schemas = {"RunRequest": {**request_schema(settings), "examples": [example]}, "Stop": STOP_SCHEMA, **ANSWERS}
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

    def __init__(self, settings: Settings, store: Store, engine: Engine, runner: Runner, evictor: Evictor) -> None:
        import bottle

        self._settings, self._store, self._engine = settings, store, engine
        self._runner, self._evictor = runner, evictor
        self._root = settings.artifacts_root()
        self._waiting_places = threading.BoundedSemaphore(settings.max_waiting)  # of requests that wait or stream
        self._health_lock = threading.Lock()  # held while the engine is asked
        self._engine_about: dict[str, str] | None = None
        self._router = bottle.Bottle()
        self._router.router.add_filter("path", lambda _: (r"[\s\S]+", None, None))  # a name may hold a newline
        for route in ROUTES:
            self._router.route(route.path, route.method, callback=route)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI (PEP 3333)."""
        began = time.monotonic()
        try:
            answer = self._answer(environ)
        except LightrunError as error:
            answer = json_answer(error.body(), error.status, **error.headers)
        except Exception:
            log.exception("%s %s", environ["REQUEST_METHOD"], printable(environ["PATH_INFO"]))
            answer = json_answer({"error": LightrunError.code}, 500)
        method, path, took = environ["REQUEST_METHOD"], printable(environ["PATH_INFO"]), time.monotonic() - began
        log.info("%s %s %s %d %.0f ms", environ["REMOTE_ADDR"], method, path, answer.status, took * 1000)
        body, headers = answer.body, {"X-Content-Type-Options": "nosniff", **answer.headers}
        if isinstance(body, bytes) and answer.status not in {204, 304}:
            headers["Content-Length"] = str(len(body))
        write = start_response(f"{answer.status} {http.client.responses[answer.status]}", list(headers.items()))
        if isinstance(body, bytes):
            return [] if method == "HEAD" else [body]
        if method == "HEAD":
            body.close()
            return []
        if not isinstance(body, Stream):
            return environ["wsgi.file_wrapper"](body, COPY_BYTES)  # type: ignore[no-any-return]
        try:
            write(b"")  # the headers, which a follower of a silent run would otherwise wait for
        except BaseException:
            body.close()
            raise
        return body

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
        call = Call(environ, parse_query(environ.get("QUERY_STRING", ""), route.query))
        answer: Answer = getattr(self, route.handler)(call, **arguments)
        return answer

    def _waiting_place(self) -> contextlib.ExitStack:
        """A place to wait or stream, which is given back when this is closed. Raises Unavailable when all are taken."""
        if not self._waiting_places.acquire(blocking=False):
            raise Unavailable("busy", "all places for waiting requests are taken")
        with contextlib.ExitStack() as place:
            place.callback(self._waiting_places.release)
            return place.pop_all()

    def health(self, call: Call) -> Answer:
        """GET /health"""
        if self._health_lock.acquire(blocking=False):  # one question at a time: a hung engine must not take all threads
            try:
                self._engine_about = self._engine.version()
            except EngineError:
                self._engine_about = None
            finally:
                self._health_lock.release()
        running, queued = self._runner.counts()
        about = {"version": __version__, "runs": {"running": running, "queued": queued}}
        if self._engine_about is None:
            return json_answer({"status": "unavailable", "docker": False, **about}, 503)
        return json_answer({"status": "ok", "docker": True, **about, "engine": self._engine_about})

    def openapi(self, call: Call) -> Answer:
        """GET /openapi.json"""
        return json_answer(openapi(self._settings))

    def run(self, call: Call) -> Answer:
        """POST /run"""
        with contextlib.ExitStack() as place:
            run_id, detached = self._submit(call, place)
            place.enter_context(_accepted(run_id))
            job = self._runner.job(run_id)
            if detached:
                status = "running" if job else json.loads(self._store.head(run_id))["status"]
                return json_answer({"id": run_id, "status": status, "url": f"/runs/{run_id}"}, 202, Location=f"/runs/{run_id}")
            place.enter_context(self._runner.attended(job))
            if EVENTS in call.header("Accept"):
                return self._streamed(call, self._live(run_id, job), EVENTS, place.pop_all())
            self._wait(call, job, math.inf)
            return json_answer(self._state(run_id, job))

    def _submit(self, call: Call, place: contextlib.ExitStack) -> tuple[str, bool]:
        """Id of the accepted run, and whether it is detached; the body, which may be large, is not held longer."""
        raw = call.json_body()
        request = RunRequest.parse(raw, self._settings)
        key = call.header("Idempotency-Key", None)
        if key is not None and not (1 <= len(key) <= 200 and key.isascii() and key.isprintable()):
            raise BadRequest("Idempotency-Key must have 1 to 200 printable ASCII characters")
        if not request.detached:
            place.enter_context(self._waiting_place())
        return self._runner.submit(request, raw, key), request.detached

    def _wait(self, call: Call, job: Job | None, seconds: float) -> None:
        """Until the run has ended, the time is up or the client has gone."""
        deadline = time.monotonic() + seconds
        while job and (left := deadline - time.monotonic()) > 0 and not job.done.wait(min(left, DISCONNECT_POLL_SECONDS)):
            if call.gone():
                return

    def _live(self, run_id: str, job: Job | None) -> Generator[bytes, None, None]:
        """A run as it happens, a line for each event."""
        told = time.monotonic()
        for event in self._events(run_id, job):
            silent = time.monotonic() - told > PING_SECONDS
            if event or silent:
                told = time.monotonic()
            yield to_json(event or {"event": "ping"}) + b"\n" if event or silent else b""

    def _events(self, run_id: str, job: Job | None) -> Iterator[dict[str, Any]]:
        """The events of a run, with an empty one now and then."""
        yield {"event": "accepted", "id": run_id}
        lines, progress, started = LineEvents(), None, False
        for kept in job.log.follow() if job else [self._kept(run_id)]:
            if job and job.pull and job.pull.progress is not progress:
                progress = job.pull.progress
                yield {"event": "pulling", **progress}
            if not started and (job is None or job.run.started):
                started = True
                yield {"event": "started"}
            yield from lines.feed(kept)
            yield {}
        yield from lines.end()
        yield {"event": "finished", "run": job.state() if job else self._state(run_id)}

    def runs(self, call: Call) -> Answer:
        """GET /runs"""
        limit = call.query.get("limit", 100)
        try:
            heads = self._store.heads(call.query.get("status"), call.query.get("before"), limit + 1)
        except NotFound as error:
            raise BadRequest(details=[{"path": ["query", "before"], "message": "is not the id of a run"}]) from error
        states = [json.loads(head) for head in heads[:limit]]
        running = {state["id"]: self._runner.job(state["id"]) for state in states if state["status"] == "running"}
        answer = json_answer([job.run.head() if (job := running.get(state["id"])) else state for state in states])
        if len(heads) > limit:
            query = urllib.parse.urlencode({**call.query, "before": states[-1]["id"]})
            answer.headers["Link"] = f'</runs?{query}>; rel="next"'
        return answer

    def state(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>"""
        job = self._runner.job(run_id)
        if job and call.query.get("wait"):
            with self._waiting_place(), self._runner.attended(job):
                self._wait(call, job, call.query["wait"] / 1000)
        return json_answer(self._state(run_id, job))

    def _state(self, run_id: str, job: Job | None = None) -> dict[str, Any]:
        if job := job or self._runner.job(run_id):
            return job.state()
        head = json.loads(self._store.head(run_id))
        return whole_state(head, self._store.tail(run_id), log_lines(self._store.frames(run_id)))

    def _kept(self, run_id: str) -> bytes:
        """The frames kept of a run's log."""
        job = self._runner.job(run_id)
        return job.log.frames() if job else self._store.frames(run_id)

    def logs(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>/logs"""
        stream, tail = call.query.get("stream"), call.query.get("tail")
        job = self._runner.job(run_id)
        if not job or not call.query.get("follow"):
            kept = last_lines(raw_log(self._kept(run_id), stream), tail)
            return Answer(200, kept, {"Content-Type": BYTES, "X-Content-Type-Options": "nosniff"})

        def pieces(followed: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
            with contextlib.closing(followed):
                yield last_lines(raw_log(next(followed), stream), tail)
                yield from (raw_log(piece, stream) for piece in followed)

        return self._streamed(call, pieces(job.log.follow()), BYTES)

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
        wanted = call.optional_json(STOP_SCHEMA)
        self._runner.ask(run_id, Ask("stopped", wanted.get("signal", "SIGTERM"), wanted.get("grace", 10_000) / 1000))
        return Answer(204)

    def artifacts(self, call: Call, run_id: str) -> Answer:
        """GET /runs/<id>/artifacts"""
        kept = self._artifacts(run_id)
        if TAR not in call.header("Accept"):
            return json_answer(kept)
        answer = self._streamed(call, artifacts_tar(self._root / run_id, kept), TAR)
        answer.headers["Content-Disposition"] = content_disposition(f"{run_id}.tar")
        return answer

    def artifact(self, call: Call, run_id: str, path: str) -> Answer:
        """GET /runs/<id>/artifacts/<path>"""
        if ".." in path.split("/"):
            raise BadRequest("a path must not have .. segments")
        kept, path = self._artifacts(run_id), path.removesuffix("/")
        if all(entry["path"] != path for entry in kept):
            raise NotFound("there is no such artifact")
        if file := open_artifact(self._root / run_id, path):
            return file_answer(call, file, posixpath.basename(path))
        return json_answer([entry for entry in kept if posixpath.dirname(entry["path"]) == path])

    def _artifacts(self, run_id: str) -> list[dict[str, Any]]:
        return [] if self._runner.job(run_id) else list(self._store.tail(run_id).get("artifacts", []))

    def _streamed(
        self, call: Call, pieces: Generator[bytes, None, None], kind: str, place: contextlib.ExitStack | None = None
    ) -> Answer:
        """Pieces for a client, from a thread that they hold: one of the places, taken before the headers are sent."""
        return Answer(200, Stream(call, pieces, place or self._waiting_place()), {"Content-Type": kind})


def printable(text: str) -> str:
    """A client's text for the log, where no character may look like another line."""
    return "".join(character if character.isprintable() else "?" for character in text[:1024])


# --------------------------------------------------------------------------------------------------------------------
# Serving: sockets, the gate, signals, logs
# --------------------------------------------------------------------------------------------------------------------


class Gate:
    """What is judged as soon as a request's headers are complete."""

    def __init__(self, tokens: Iterable[str], check_host: bool) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._check_host = check_host

    def judge(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, Any], dict[str, str]] | None:
        """Status, body and headers of a refusal. `headers` as WSGI names them, their bytes as latin-1."""
        if self._digests and path != "/health" and not self._knows(headers.get("AUTHORIZATION", "")):
            message = "needs Authorization: Bearer <token>"
            return 401, {"error": "unauthorized", "message": message}, {"WWW-Authenticate": "Bearer"}
        if self._check_host and not is_loopback_host(headers.get("HOST", "")):
            return 403, {"error": "forbidden", "message": "Host must name this machine; set a token to serve others"}, {}
        return None

    def _knows(self, authorization: str) -> bool:
        """Compares with every token, and digests of one length, so that time tells nothing of either."""
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip(" \t").encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


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


def _parser_class(gate: Gate) -> type:
    """waitress's reading of requests with this gate, and JSON for the errors that it answers by itself."""
    import waitress.parser
    import waitress.utilities

    class JsonError(waitress.utilities.Error):
        def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str]) -> None:
            self.code, self._json, self._headers = status, to_json(body), headers

        def to_response(self, ident: str | None = None) -> Any:
            headers = [("Content-Type", "application/json"), *self._headers.items()]
            return f"{self.code} {http.client.responses[self.code]}", headers, self._json

    class Parser(waitress.parser.HTTPRequestParser):
        _error: JsonError | None = None
        _judged = False
        path = ""

        @property  # type: ignore[override]  # a plain attribute there
        def error(self) -> JsonError | None:
            return self._error

        @error.setter
        def error(self, error: Any) -> None:
            if error is not None and not isinstance(error, JsonError):
                codes = {400: "bad_request", 413: "too_large", 431: "headers_too_large", 501: "not_implemented"}
                error = JsonError(error.code, {"error": codes.get(error.code, LightrunError.code)}, {})
            self._error = error
            self.expect_continue = False  # no "100 Continue" before a refusal

        def parse_header(self, header_plus: bytes) -> None:
            try:
                super().parse_header(header_plus)
            except (ValueError, waitress.parser.TransferEncodingNotImplemented) as error:
                raise waitress.parser.ParsingError("a header cannot be understood") from error
            if not is_length_certain(header_plus, self.version, "CONTENT_LENGTH" in self.headers):
                raise waitress.parser.ParsingError("the length of the body is not certain")

        def received(self, data: bytes) -> int:
            consumed: int = super().received(data)
            if self.headers_finished and not self._judged and not self.empty:
                self._judged = True
                malformed = self.error and self.error.code != 413
                if not malformed and (refusal := gate.judge(self.path, self.headers)):
                    self.error, self.completed = JsonError(*refusal), True
                if self.error:
                    log.info("refused %s: %d", printable(self.path), self.error.code)
            return consumed

    return Parser


def _channel_class(gate: Gate) -> type:
    """waitress's connections, of which none may hold a thread by not reading, but a stream that has its place for that."""
    import waitress.channel

    base: Any = waitress.channel.HTTPChannel

    class Channel(base):  # type: ignore[misc]  # what is overridden is not in waitress's types
        parser_class = _parser_class(gate)
        _writing = False

        def write_soon(self, data: Any) -> int:
            self._writing = True
            try:
                return int(super().write_soon(data))
            finally:
                self._writing = False

        def _flush_outbufs_below_high_watermark(self) -> None:
            if self._writing:
                super()._flush_outbufs_below_high_watermark()
            elif self.total_outbufs_len > self.adj.outbuf_high_watermark:  # a client that pipelines and does not read
                with self.requests_lock:
                    del self.requests[1:]
                self.close_when_flushed = True

    return Channel


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on: systemd's, a Unix one, or TCP. Raises StartError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS"):
        if os.environ["LISTEN_FDS"] != "1":
            raise StartError("systemd passes more than one socket")
        return socket.socket(fileno=3)  # sd_listen_fds(3): SD_LISTEN_FDS_START
    try:
        if settings.socket:
            return _listen_unix(settings.socket, settings.socket_mode)
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return _bound(socket.socket(family), address)
    except (OSError, UnicodeError) as error:
        place = settings.socket or f"{settings.host}:{settings.port}"
        raise StartError(f"cannot listen on {place}: {getattr(error, 'strerror', None) or error}") from error


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
    except OSError:
        sock.close()
        raise
    return sock


class Daemon:
    """Everything, put together. Several fit in one process."""

    def __init__(self, settings: Settings) -> None:
        tokens = settings.tokens()
        self._settings = settings
        self._store = Store(settings.state_dir)
        _claim_artifacts_dir(settings.artifacts_root(), self._store.id)
        self._engine = Engine(settings, self._store.id)
        try:
            self._engine.check_limits()
        except EngineError as error:
            log.warning("%s; serving all the same", error)
        evictor = Evictor(self._store, settings)
        self._runner = Runner(settings, self._store, self._engine, evictor, Callbacks(self._store, settings.callback_allow))
        self._socket = listen(settings)
        self._store.tidy(settings.artifacts_root())
        self._runner.recover()
        loopback = self._socket.family == socket.AF_UNIX or ipaddress.ip_address(self._socket.getsockname()[0]).is_loopback
        if not tokens:
            log.log(logging.INFO if loopback else logging.WARNING, "no --token: whoever can connect can run containers")
        gate = Gate(tokens, check_host=not tokens and loopback and self._socket.family != socket.AF_UNIX)
        self._server = self._make_server(Api(settings, self._store, self._engine, self._runner, evictor), gate)

    def _make_server(self, api: Api, gate: Gate) -> Any:
        import waitress.server

        server: Any = waitress.server.create_server(
            api,
            sockets=[self._socket],
            threads=self._settings.max_waiting + CONTROL_THREADS,
            connection_limit=MAX_CONNECTIONS,
            backlog=1024,
            recv_bytes=64 * KIB,
            max_request_body_size=self._settings.body_limit + 1,  # waitress refuses what is not below
            max_request_header_size=MAX_HEADER_BYTES,
            outbuf_high_watermark=512 * KIB,  # what waits for a slow reader of a stream, in memory
            outbuf_overflow=2 * MIB,  # what is larger, an answer with a long log, waits in a temporary file
            ident=None,
            asyncore_use_poll=True,  # select() fails on descriptors over 1023
            channel_request_lookahead=1,  # so that a client that left is noticed
        )
        server.channel_class = _channel_class(gate)
        server.adj.socket_options = [*server.adj.socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        server.maintenance = functools.partial(_close_stalled, server)
        return server

    @property
    def address(self) -> str:
        """Where the daemon listens, as a URL."""
        if self._socket.family == socket.AF_UNIX:
            return f"unix://{self._socket.getsockname()}"
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve from threads of its own."""
        threading.Thread(target=self._server.run, name="server", daemon=True).start()
        log.info("lightrun %s serves on %s", __version__, self.address)

    def stop(self) -> None:
        """Take no more runs, let clients that wait have their results, and let go of everything."""
        self._runner.stop(DRAIN_SECONDS)
        time.sleep(0.1)  # the last answers are on their way
        if self._settings.socket and self._socket.getsockname() == str(self._settings.socket):  # not systemd's
            with contextlib.suppress(OSError):
                self._settings.socket.unlink()
        self._socket.close()
        self._store.close()


def _close_stalled(server: Any, now: float) -> None:
    """waitress's regular look at its connections, and an end for those whose full buffer nobody reads: each would hold the
    thread that fills it."""
    type(server).maintenance(server, now)
    for channel in server.active_channels.values():
        full = channel.total_outbufs_len > server.adj.outbuf_high_watermark
        if full and channel.last_activity < now - server.adj.channel_timeout:
            channel.will_close = True


def _claim_artifacts_dir(root: Path, state_id: str) -> None:
    """Make the artifacts dir this state dir's own. Raises StartError for one that belongs to somebody else."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker, fresh = root / ".lightrun", root / ".lightrun.new"
    try:
        owner = marker.read_text("utf-8").strip()
    except FileNotFoundError:
        if any(path != fresh for path in root.iterdir()):
            raise StartError(f"{root} holds other files; an artifacts dir must be empty or lightrun's own") from None
        fresh.write_text(state_id, "utf-8")
        fresh.rename(marker)
        return
    if owner != state_id:
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
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return to_json(line).decode()


def _set_up_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # its depth warning is our way of working
    logging.getLogger("urllib3").setLevel(logging.ERROR)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as SPEC 4 has it."""
        self.exit(2, f"lightrun: {message}\n")


def variable_of(name: str) -> str:
    """The environment variable of an option's field: `body_limit` → `LIGHT_RUN_BODY_LIMIT`."""
    return "LIGHT_RUN_" + name.upper()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightrun", description="Run a container over HTTP.")
    parser.add_argument("--version", action="version", version=f"lightrun {__version__}")
    serve = parser.add_subparsers(dest="command", required=True, metavar="serve").add_parser(
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
    return parser


def read_settings(options: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Settings from parsed options and variables. Raises UsageError."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        source, text = "--" + field.name.replace("_", "-"), options.get(field.name)
        many = isinstance(field.default, tuple)
        if text is None and (text := environment.get(variable_of(field.name))) is not None:
            source = variable_of(field.name)
            text = [part.strip() for part in text.split(",")] if many else text
        if text is None:
            continue
        try:
            cast = field.metadata["cast"]
            values[field.name] = tuple(map(cast, text)) if many else cast(text)
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from error
    values.setdefault("state_dir", Path("~/.light-run").expanduser())
    return Settings(**values)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends it at once."""
    _set_up_logging(settings.log_format)
    with contextlib.suppress(OSError, AttributeError):  # glibc: else hundreds of threads each hoard what they freed
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    daemon = Daemon(settings)
    told = threading.Event()

    def tell(_number: int, _frame: Any) -> None:
        if told.is_set():
            os._exit(1)
        told.set()

    daemon.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    told.wait()
    log.info("going down")
    daemon.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command `lightrun`; its exit code."""
    options = vars(_parser().parse_args(argv))
    try:
        return serve(read_settings(options, os.environ))
    except UsageError as error:
        print(f"lightrun: {error}", file=sys.stderr)
        return 2
    except (LightrunError, OSError) as error:
        print(f"lightrun: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
