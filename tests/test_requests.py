"""The body of `POST /run`: what is taken, what is refused, and what becomes of it; and the options of the daemon."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrun import (
    MAX_PROBLEMS,
    BadRequest,
    NotAllowed,
    RunRequest,
    Settings,
    Token,
    UsageError,
    _parser,
    callback_host_allowed,
    is_link_local,
    matches_any,
    normalise_image,
    parse_json,
    parse_size,
    read_settings,
    request_schema,
    shell_script,
)

SETTINGS = Settings()
DIGEST = "sha256:" + "a" * 64


def parse(settings: Settings = SETTINGS, **fields: Any) -> RunRequest:
    """The request with these fields, and an image unless they name one."""
    return RunRequest.parse(json.dumps({"image": "alpine", **fields}).encode(), settings)


def refusal(raw: bytes, settings: Settings = SETTINGS) -> list[dict[str, Any]]:
    """The details of the 400 that a body gets."""
    with pytest.raises(BadRequest) as caught:
        RunRequest.parse(raw, settings)
    body = caught.value.body()
    assert body["error"] == "bad_request"
    details: list[dict[str, Any]] = body["details"]
    assert details
    assert all(detail.keys() == {"path", "message"} and detail["message"] for detail in details)
    return details


def refused_paths(settings: Settings = SETTINGS, **fields: Any) -> list[list[Any]]:
    """The paths of the problems that these fields have."""
    return [detail["path"] for detail in refusal(json.dumps({"image": "alpine", **fields}).encode(), settings)]


# ---------------------------------------------------------------- What is taken


def test_what_is_absent_has_its_default() -> None:
    request = RunRequest.parse(b'{"image": "alpine:3.19"}', Settings(memory=64 << 20, cpus=0.5, pids=7))
    assert (request.image, request.reference) == ("alpine:3.19", "docker.io/library/alpine:3.19")
    assert (request.files, request.command, request.stdin, request.env) == ({}, None, None, {})
    assert (request.workdir, request.network, request.timeout) == (None, None, 1200)  # the image's own workdir
    assert (request.memory, request.cpus, request.pids) == (64 << 20, 0.5, 7)
    assert (request.extract, request.extract_on_exit, request.detached) == ([], False, False)
    assert (request.callback_url, request.callback_secret) == (None, None)


def test_every_field_arrives() -> None:
    request = parse(
        Settings(allow_network=("web",)), files={"a.txt": "ä", "b/c": {"base64": "AP8="}}, entrypoint=["echo", ""],
        stdin="in", env={"A": "1"}, workdir="/srv//x/", network="web", timeout=1, memory="256m", cpus=0.25, pids=5,
        extract=["out", {"from": "/etc/passwd", "to": "users"}], extractOn="exit", detached=True, callbackUrl="https://example.com/x?y",
        callbackSecret="s" * 16,
    )  # fmt: skip
    assert request.files == {"a.txt": "ä".encode(), "b/c": b"\0\xff"}
    assert (request.command, request.stdin, request.env) == (["echo", ""], b"in", {"A": "1"})
    assert (request.workdir, request.network, request.timeout) == ("/srv/x", "web", 0.001)
    assert (request.memory, request.cpus, request.pids) == (256 << 20, 0.25, 5)
    assert (request.extract, request.extract_on_exit, request.detached) == ([("out", None), ("/etc/passwd", "users")], True, True)
    assert (request.callback_url, request.callback_secret) == ("https://example.com/x?y", "s" * 16)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, {"ä": [1.5, None]}, "x" * 100_000])
def test_input_is_the_json_text_of_any_value(value: Any) -> None:
    text = parse(input=value).stdin
    assert isinstance(text, bytes)
    assert json.loads(text) == value


GOOD: list[tuple[str, Any]] = [
    *[("image", image) for image in (
        "a", "alpine:3.19", "library/alpine", "docker.io/library/alpine@" + DIGEST, "localhost:5000/a/b:c", DIGEST,
        "[::1]:5000/a", "registry.example.com/a__b/c--d.e:T.a-g_1", "a:t@" + DIGEST, "x/" * 149 + "xx",
    )],
    *[("files", {path: ""}) for path in (
        "x", " ", "a/b/c", "...", ".hidden", "..a/b..", "x" * 255, "é" * 127, "/".join(["x"] * 512) + "x", "-rf", "a\nb",
    )],
    ("files", {str(number): "" for number in range(10_000)}),
    ("files", {"a": "", "a.b": "", "b/a": "", "b/a.b": ""}),
    ("files", {"a": {"base64": ""}}),
    *[("entrypoint", command) for command in ("x", "é" * 2048, ["x"], ["x"] * 64, ["x", ""], ["x", "y" * 100_000])],
    *[("stdin", text) for text in ("", "x", "é\n")],
    *[("env", env) for env in ({}, {"_": ""}, {"aZ_9": "$(x) `y` 'z' \"\n"}, {f"N{number}": "" for number in range(1000)})],
    *[("workdir", path) for path in ("/a", "/process", "/a/proc", "/" + "x" * 199, "/a b", "/..a", "/a/./b//")],
    ("network", "none"),
    *[("timeout", value) for value in (1, 3_600_000, 1000.0)],
    *[("memory", value) for value in (6 << 20, 512 << 20, "6m", "512M", "524288k", str(512 << 20))],
    *[("cpus", value) for value in (0.01, 0.5, 1, 1.0)],
    *[("pids", value) for value in (2, 100, 5.0)],
    *[("extract", paths) for paths in (["x"], ["x"] * 20, ["x" * 1024], ["/"], ["."], ["..."], ["a\\b"], ["a//b/"])],
    *[("extractOn", value) for value in ("success", "exit")],
    *[("labels", labels) for labels in (
        {}, {"a": ""}, {"x" * 63: "é" * 256}, {"k8s.io/a_b-C.9": "x y=z"}, {str(number): "" for number in range(32)},
    )],
    *[("detached", value) for value in (True, False)],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), GOOD, ids=lambda value: repr(value)[:40])
def test_is_taken(field: str, value: Any) -> None:
    parse(**{field: value})


@pytest.mark.parametrize(
    "labels",
    [
        {"": "a"}, {"x" * 64: "a"}, {"a b": "a"}, {"é": "a"}, {"a=b": "a"}, {"a": "x" * 257}, {"a": "a\nb"}, {"a": 1},
        {"a\n": ""}, {str(number): "" for number in range(33)},
    ],
)  # fmt: skip
def test_labels_are_refused_by_name(labels: dict[str, Any]) -> None:
    assert {path[0] for path in refused_paths(labels=labels)} == {"labels"}


@pytest.mark.parametrize("commands", [["x"], ["x"] * 50, ["x" * 2048]])
def test_setup_is_taken(commands: list[str]) -> None:
    assert (parse(setup=commands, entrypoint="y").command or [])[:2] == ["sh", "-c"]


@pytest.mark.parametrize(
    "fields",
    [
        *[{"callbackUrl": url} for url in ("http://a", "HTTPS://a:1/", "http://[::1]:80/?a=b", "https://a/" + "x" * 2038)],
        *[{"callbackUrl": "http://a", "callbackSecret": secret} for secret in ("s" * 16, "é" * 200, "whsec_" + "QUFB" * 4)],
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_callbacks_are_taken(fields: dict[str, Any]) -> None:
    parse(detached=True, **fields)


# ---------------------------------------------------------------- What is refused


VALUES: dict[str, Any] = {
    "null": None, "boolean": True, "integer": 1, "fraction": 1.5, "string": "x", "array": [], "object": {},
}  # fmt: skip
TYPES = {
    "image": "string", "files": "object", "setup": "array", "entrypoint": "string array", "stdin": "string object",
    "env": "object",
    "workdir": "string", "network": "string", "timeout": "integer", "memory": "integer string", "cpus": "integer fraction",
    "pids": "integer", "extract": "array", "extractOn": "string", "detached": "boolean", "callbackUrl": "string",
    "callbackSecret": "string", "fileSize": "integer string", "cpuTime": "integer", "outputLimit": "integer",
    "splitLogs": "boolean", "idle": "integer", "labels": "object",
}  # fmt: skip
WRONG_TYPES = [(name, VALUES[kind]) for name, kinds in TYPES.items() for kind in VALUES if kind not in kinds.split()]
BAD: list[tuple[str, Any]] = [
    *[("image", image) for image in (
        "", "x" * 301, "Alpine", "alpine ", "alpine\n", "-alpine", "a:", "a@sha256:1", "a b", "/a", "a/", "http://a", "a::b",
        "../a", "a\u017f", "a:\u0661",
    )],
    ("files", {str(number): "" for number in range(10_001)}),
    *[("setup", commands) for commands in (["x"] * 51,)],
    *[("entrypoint", command) for command in ("", "x" * 2049, [], ["x"] * 65)],
    ("env", {f"N{number}": "" for number in range(1001)}),
    *[("workdir", path) for path in (
        "", "a", "/", "//", "/.", "/a/..", "/../a", "/a/../b", "/proc", "/proc/1", "/sys", "/dev", "/dev/shm", "//proc",
        "/./proc", "/" + "x" * 200,
    )],
    *[("network", name) for name in ("host", "container:x", "ns:/proc/1/ns/net", "default", "x" * 101, "a b", "none\n")],
    *[("timeout", value) for value in (0, -1, 3_600_001, 10**300, 1e300)],
    *[("memory", value) for value in (0, -1, (512 << 20) + 1, "513m", "1g", "", "m", "-1m", "1.5m", "1 m", "1x", "6m\n")],
    *[("cpus", value) for value in (0, -1, 1.001, 10**300)],
    *[("pids", value) for value in (0, 1, -1, 101, 10**300)],
    *[("fileSize", value) for value in (-1, (1 << 60) + 1, 10**300, "", "-1m", "1.5m", "9" * 16, "1m\n")],
    *[("cpuTime", value) for value in (0, -1, 3_600_001, 10**300)],
    *[("outputLimit", value) for value in (-1, 10**300)],
    *[("extract", paths) for paths in (["x"] * 21,)],
    *[("extractOn", value) for value in ("", "always", "success\n")],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES + BAD, ids=lambda value: repr(value)[:40])
def test_is_refused_by_name(field: str, value: Any) -> None:
    needed: dict[str, dict[str, Any]] = {"setup": {"entrypoint": "x"}, "callbackUrl": {"detached": True}}
    assert [field] in refused_paths(**needed.get(field, {}), **{field: value})


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/", "/a", "a/", "a//b", "./a", "a/.", "a/./b", "../x", "a/..", "a/../b", "a\\b", "x" * 256,
        "é" * 128, "/".join(["x"] * 513), "..\n/.."
    ],
)  # fmt: skip
def test_a_bad_file_path_is_named(path: str) -> None:
    assert refused_paths(files={path: "", "good": ""}) == [["files", path]]


@pytest.mark.parametrize(
    "content", [None, True, 1, [], {}, {"base64": 1}, {"base64": "", "x": ""}, *[
        {"base64": text} for text in ("A", "AA", "AAA", "AA==A", "A A=", "AAAA\n", "AA-_", "é", "=", "====")
    ]],
)  # fmt: skip
def test_bad_file_content_is_named(content: Any) -> None:
    paths = refused_paths(files={"good": "", "bad": content})
    assert paths
    assert all(path[:2] == ["files", "bad"] for path in paths)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"setup": ["x", "", "y"], "entrypoint": "x"}, ["setup", 1]),
        ({"setup": ["x" * 2049], "entrypoint": "x"}, ["setup", 0]),
        ({"setup": [1], "entrypoint": "x"}, ["setup", 0]),
        ({"entrypoint": ["x", 1]}, ["entrypoint", 1]),
        ({"entrypoint": ["x", "é" * 50_001]}, ["entrypoint", 1]),
        ({"entrypoint": [""]}, ["entrypoint", 0]),
        ({"extract": ["a", ""]}, ["extract", 1]),
        ({"extract": ["x" * 1025]}, ["extract", 0]),
        ({"extract": ["a/../b"]}, ["extract", 0]),
        ({"extract": [{"from": "a", "to": "/".join(["日" * 85] * 5)}]}, ["extract", 0, "to"]),  # 429 characters, 1,279 bytes
        ({"extract": [".."]}, ["extract", 0]),
        ({"extract": ["/.."]}, ["extract", 0]),
        ({"extract": [1]}, ["extract", 0]),
        ({"env": {"1A": ""}}, ["env", "1A"]),
        ({"env": {"": ""}}, ["env", ""]),
        ({"env": {"A-B": ""}}, ["env", "A-B"]),
        ({"env": {"A\n": ""}}, ["env", "A\n"]),
        ({"env": {"É": ""}}, ["env", "É"]),
        ({"env": {"A": 1}}, ["env", "A"]),
        ({"env": {"A": None}}, ["env", "A"]),
        ({"env": {"A": "x" * 131_072}}, ["env", "A"]),  # the kernel would refuse it
        ({"timout": 5}, ["timout"]),
        ({"Image": "x"}, ["Image"]),
        ({"setup": ["x"]}, ["setup"]),
        ({"setup": ["x"], "entrypoint": ["x"]}, ["setup"]),
        ({"input": 1, "stdin": "x"}, ["stdin"]),
        ({"callbackUrl": "http://a"}, ["callbackUrl"]),
        ({"callbackUrl": "http://a", "detached": False}, ["callbackUrl"]),
        ({"callbackSecret": "s" * 16, "detached": True}, ["callbackSecret"]),
    ],
)  # fmt: skip
def test_the_problem_is_named(fields: dict[str, Any], path: list[Any]) -> None:
    assert refused_paths(**fields) == [path]


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "ftp://a", "file:///etc/passwd", "http://", "http:///x", "//a", "http://a:0", "http://a:65536", "http://a:x",
        "http://[::1", "http://a b", "http://a\n", "http://user@a", "http://u:p@a", "http://é", "https://a/" + "x" * 2039,
    ],
)  # fmt: skip
def test_a_bad_callback_url_is_named(url: str) -> None:
    assert refused_paths(detached=True, callbackUrl=url) == [["callbackUrl"]]


@pytest.mark.parametrize("secret", ["", "s" * 15, "s" * 201, "whsec_" + "!" * 16, "whsec_" + "A" * 17])
def test_a_bad_callback_secret_is_named(secret: str) -> None:
    assert refused_paths(detached=True, callbackUrl="http://a", callbackSecret=secret) == [["callbackSecret"]]


@pytest.mark.parametrize("files", [{"a": "", "a/b": ""}, {"a/b/c": "", "a/b": ""}])
def test_no_path_is_both_a_file_and_a_folder(files: dict[str, str]) -> None:
    assert refused_paths(files=files) == [["files", min(files, key=len)]]


@pytest.mark.parametrize("fields", [{"files": {}}, {"setup": []}, {"env": {}}, {"extract": []}, {"network": ""}])
def test_what_is_empty_counts_as_absent(fields: dict[str, Any]) -> None:
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    ("text", "written"),
    [("10384784757677856.14", None), ("-0", None), ("0.10", None), ("1E2", None), ("[]", None),
     ('{"a": [1.50, "\\u00fc", null]}', '{"a": [1.50, "ü", null]}')],
)  # fmt: skip
def test_numbers_of_an_input_are_passed_on_as_written(text: str, written: str | None) -> None:
    raw = f'{{"image": "x", "input": {text}}}'.encode()
    assert RunRequest.parse(raw, SETTINGS).stdin == (written or text).encode()


@pytest.mark.parametrize(
    ("field", "attribute", "text", "number"),
    [("fileSize", "file_size", "0.0", 0), ("fileSize", "file_size", "-0.0", 0), ("outputLimit", "output_limit", "1e3", 1000)],
)  # fmt: skip
def test_a_whole_number_of_bytes_is_an_integer_however_it_is_written(
    field: str, attribute: str, text: str, number: int
) -> None:
    """An engine refuses a float."""
    value = getattr(RunRequest.parse(f'{{"image": "x", "{field}": {text}}}'.encode(), SETTINGS), attribute)
    assert (type(value), value) == (int, number)


def test_stdin_may_be_bytes() -> None:
    assert parse(stdin={"base64": "AP8="}).stdin == b"\0\xff"
    assert refused_paths(stdin={"base64": "A"}) == [["stdin", "base64"]]


def test_a_time_tells_its_unit() -> None:
    with pytest.raises(BadRequest) as caught:
        parse(timeout="10s")
    assert caught.value.more["details"] == [{"path": ["timeout"], "message": "must be of type integer, in milliseconds"}]


def test_every_field_has_its_type_tested() -> None:
    assert {*TYPES, "input"} == set(request_schema(SETTINGS)["properties"])


def test_every_problem_is_told_at_once() -> None:
    fields: dict[str, Any] = {"image": "", "files": {"../x": "", "y": 1}, "timeout": True, "nope": 1, "stdin": "", "input": ""}
    paths = refused_paths(**fields)
    for path in (["image"], ["files", "../x"], ["files", "y"], ["timeout"], ["nope"], ["stdin"]):
        assert path in paths


@pytest.mark.parametrize(("field", "value"), [("setup", b"1"), ("input", b'"\\u0000"')])
def test_more_problems_than_are_told_are_not_even_looked_for(field: str, value: bytes) -> None:
    raw = b'{"image": "a", "%b": [%b]}' % (field.encode(), b",".join([value] * (100_000 // len(value))))
    tracemalloc.start()
    try:
        assert len(refusal(raw)) == MAX_PROBLEMS
        assert tracemalloc.get_traced_memory()[1] < 10 * len(raw)
    finally:
        tracemalloc.stop()


def test_folders_are_bounded_like_files() -> None:
    """Nine megabytes of paths would otherwise become millions of folders and gigabytes of tar."""
    assert refused_paths(files={f"{'a/' * 400}{number}{'/a' * 100}": "" for number in range(1000)}) == [["files"]]


def test_an_image_is_required() -> None:
    assert [detail["path"] for detail in refusal(b"{}")] == [["image"]]


def test_the_operators_limits_bound_a_request() -> None:
    settings = Settings(memory=64 << 20, cpus=2.5, pids=1000)
    parse(settings, memory="64m", cpus=2.5, pids=1000)
    assert len(refused_paths(settings, memory="65m", cpus=2.6, pids=1001)) == 3


# ---------------------------------------------------------------- Strict JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"x", b"{", b'{"image": "a"} x', b"null", b"[]", b'"alpine"', b"1", b"\xff", b'{"image": "\xe9"}',
        b"\xef\xbb\xbf{}",
        b'{"image": "a", "image": "a"}', b'{"image": "a", "input": {"x": 1, "x": 2}}', b'{"image": "a", "input": NaN}',
        b'{"image": "a", "cpus": Infinity}', b'{"image": "a", "cpus": -Infinity}', b'{"image": "a", "cpus": 1e999}',
        b'{"image": "a", "input": 1e999}', b'{"image": "a", "stdin": "\\u0000"}', b'{"image": "a", "stdin": "\\ud800"}',
        b'{"image": "a", "input": ["\\udfff"]}', b'{"image": "a", "input": {"\\u0000": 1}}',
        b'{"image": "a", "files": {"\\ud800": ""}}',
        b'{"image": "a", "input": ' + b"[" * 200 + b"]" * 200 + b"}", b"[" * 1_000_000, b'{"a":' * 200_000,
        b'{"image": "a", "timeout": ' + b"9" * 100_000 + b"}", b'{"image": "a", "env": {"A": "\\u0000"}}', b'{"image": "a\x01"}',
    ],
    ids=lambda raw: repr(raw[:40]),
)  # fmt: skip
def test_such_a_body_is_a_bad_request(raw: bytes) -> None:
    refusal(raw)


def test_surrogate_pairs_are_characters() -> None:
    assert RunRequest.parse(b'{"image": "a", "stdin": "\\ud83d\\ude00"}', SETTINGS).stdin == "😀".encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
BODIES = st.dictionaries(st.sampled_from(sorted(request_schema(SETTINGS)["properties"])) | st.text(max_size=5), JSON)


def _only_known_outcomes(raw: bytes) -> None:
    try:
        RunRequest.parse(raw, SETTINGS)
    except (BadRequest, NotAllowed) as error:
        json.dumps(error.body())


@given(BODIES | JSON)
def test_any_json_is_parsed_or_refused(body: Any) -> None:
    _only_known_outcomes(json.dumps(body).encode())


@given(BODIES)
def test_any_fields_beside_an_image_are_parsed_or_refused(body: dict[str, Any]) -> None:
    _only_known_outcomes(json.dumps({**body, "image": "alpine"}).encode())


@given(st.binary())
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    _only_known_outcomes(raw)
    _only_known_outcomes(b'{"image": "alpine", "input": ' + raw + b"}")


@given(JSON)
def test_strict_json_agrees_with_the_standard_library(value: Any) -> None:
    text = json.dumps(value)
    if any(word in text for word in ("NaN", "Infinity")):
        return
    assert parse_json(text.encode()) == json.loads(text)


@given(st.binary())
def test_any_bytes_arrive_in_files(content: bytes) -> None:
    assert parse(files={"x": {"base64": base64.b64encode(content).decode()}}).files == {"x": content}


# ---------------------------------------------------------------- The shell script


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20), max_size=3))
def test_setup_reaches_the_shell_word_by_word(commands: list[str]) -> None:
    """`eval` takes each command as one argument, whatever is in it; here it prints it instead."""
    script = shell_script(commands, "").replace("eval ", "printf '%s\\0' ")
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    if "eval " not in "".join(commands):
        assert done.stdout == "".join(command + "\0" for command in commands).encode()


@pytest.mark.parametrize(
    ("setup", "code", "out"),
    [
        ([], 0, "end"),
        (["true"], 0, "end"),
        (["x=1", "cd /", "export y=2"], 0, "end"),
        (["echo a", "exit 3", "echo b"], 3, "a\n"),
        (["echo a", "(exit 4)", "echo b"], 4, "a\n"),
        (["false || true"], 0, "end"),
        (["# only a comment"], 0, "end"),
        (["f() { return 5; }", "f"], 5, ""),
        (["true # comment", "echo 'it''s'"], 0, "its\nend"),
        (["cat <<E\nhere\nE", "true"], 0, "here\nend"),
    ],
)
@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"])
def test_the_first_command_that_fails_ends_the_script(setup: list[str], code: int, out: str, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} on this machine")
    command = [shell, "sh"] if shell == "busybox" else [shell]
    done = subprocess.run([*command, "-c", shell_script(setup, "printf end")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out)


def test_a_syntax_error_in_setup_fails() -> None:
    done = subprocess.run(["sh", "-c", shell_script(["echo (", "echo b"], "echo end")], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""


# ---------------------------------------------------------------- Allow-lists


@pytest.mark.parametrize(
    ("reference", "normalised"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.19", "docker.io/library/alpine:3.19"),
        ("me/tool", "docker.io/me/tool:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/me/tool:1", "docker.io/me/tool:1"),
        ("localhost/tool", "localhost/tool:latest"),
        ("localhost:5000/tool", "localhost:5000/tool:latest"),
        ("ghcr.io/me/tool", "ghcr.io/me/tool:latest"),
        ("alpine@" + DIGEST, "docker.io/library/alpine@" + DIGEST),
        ("HOST/tool", "HOST/tool:latest"),
        (DIGEST, DIGEST),
        ("sha256:abc", "docker.io/library/sha256:abc"),  # a name and a tag; never the beginning of an image's id
    ],
)
def test_images_are_written_out(reference: str, normalised: str) -> None:
    assert normalise_image(reference) == normalised


def test_images_that_the_list_does_not_name_are_not_allowed() -> None:
    settings = Settings(allow_image=("docker.io/library/*", "ghcr.io/me/tool:1"))
    for image in ("alpine", "docker.io/library/alpine:3", "ghcr.io/me/tool:1"):
        parse(settings, image=image)
    for image in ("me/tool", "ghcr.io/me/tool", "ghcr.io/me/tool:2", "localhost:5000/docker.io/library/alpine", DIGEST):
        with pytest.raises(NotAllowed) as caught:
            parse(settings, image=image)
        assert (caught.value.status, caught.value.body()["error"]) == (403, "not_allowed")


def test_networks_that_the_list_does_not_name_are_not_allowed() -> None:
    settings = Settings(allow_network=("web-*",))
    parse(settings, network="web-1")
    parse(settings, network="none")
    for name in ("bridge", "lightrun", "web"):
        with pytest.raises(NotAllowed):
            parse(settings, network=name)
    with pytest.raises(NotAllowed):
        parse(network="web-1")
    for name in ("host", "container:x", "ns:/x", "default"):
        assert refused_paths(Settings(allow_network=("*",)), network=name) == [["network"]]


def test_callback_hosts_that_the_list_does_not_name_are_not_allowed() -> None:
    settings = Settings(callback_allow=("*.example.com",))
    for url in ("http://a.example.com", "https://A.EXAMPLE.COM:8080/x"):
        parse(settings, detached=True, callbackUrl=url)
    for url in (
        "http://example.com",
        "http://a.example.com.evil.org",
        "http://evil.org/?a.example.com",
        "http://evil.org#a.example.com",
    ):
        with pytest.raises(NotAllowed):
            parse(settings, detached=True, callbackUrl=url)
    with pytest.raises(NotAllowed):
        parse(detached=True, callbackUrl="http://169.254.169.254/latest/meta-data/")


LINK_LOCAL = ["169.254.169.254", "169.254.0.1", "fe80::1", "febf::1", "fe80::1%eth0", "::ffff:169.254.169.254"]
ELSEWHERE = ["169.253.255.255", "169.255.0.1", "10.0.0.1", "127.0.0.1", "::1", "fec0::1", "example.com", "169.254.1.1.com", ""]


@pytest.mark.parametrize("host", LINK_LOCAL)
def test_link_local_is_refused_unless_named(host: str) -> None:
    assert is_link_local(host)
    assert not callback_host_allowed(host, ())
    assert callback_host_allowed(host, (host,))


@pytest.mark.parametrize("host", ELSEWHERE)
def test_other_hosts_are_not_link_local(host: str) -> None:
    assert not is_link_local(host)
    assert callback_host_allowed(host, ())
    assert not callback_host_allowed(host, ("named.example",))


def test_patterns_match_the_whole_text_and_case() -> None:
    assert matches_any("docker.io/library/a:1", ["x", "docker.io/*:1"])
    assert not matches_any("docker.io/library/a:1", ["library/a", "Docker.io/*"])
    assert not matches_any("a", [])


# ---------------------------------------------------------------- Options


OPTIONS: list[tuple[str, str, Any]] = [
    ("host", "0.0.0.0", "0.0.0.0"), ("port", "0", 0), ("port", "65535", 65535), ("socket", "/s", Path("/s")),
    ("socket_mode", "0660", 0o660), ("socket_mode", "600", 0o600), ("token", "t", "t"), ("token_file", "/t", Path("/t")),
    ("body_limit", "2m", 2 << 20), ("state_dir", "/x", Path("/x")), ("artifacts_dir", "/y", Path("/y")),
    ("max_artifacts_bytes", "0", 0), ("keep", "1", 1), ("extract_limit", "1GiB", 1 << 30), ("log_limit", "64k", 64 << 10),
    ("max_concurrent", "1", 1), ("queue", "0", 0), ("max_waiting", "2", 2), ("memory", "64m", 64 << 20), ("cpus", "0.5", 0.5),
    ("pids", "50", 50), ("file_size", "0", 0), ("file_size", "1m", 1 << 20),
    ("warm", "a=2/none", ("a=2/none",)), ("max_exec", "1", 1), ("max_timeout", "24h", 86400.0), ("max_timeout", "1ms", 0.001),
    ("runtime", "runsc", "runsc"), ("pull", "never", "never"), ("pull_timeout", "1m", 60.0),
    ("pull_timeout", "1.5s", 1.5), ("drain", "0s", 0.0), ("drain", "24h", 86400.0),
    ("allow_image", "a*", ("a*",)), ("allow_network", "n", ("n",)),
    ("callback_allow", "h", ("h",)),
    ("docker_host", "unix:///d", "unix:///d"), ("docker_host", "tcp://h:1", "tcp://h:1"), ("log_format", "json", "json"),
    ("access_log", "off", "off"), ("trust_proxy", "10.0.0.0/8", ("10.0.0.0/8",)), ("trust_proxy", "unix", ("unix",)),
    ("trust_proxy", "::1", ("::1",)), ("node", "a", "a"), ("node", "n-" + "1" * 61, "n-" + "1" * 61), ("leave", "0s", 0.0),
    ("leave", "3s", 3.0),
]  # fmt: skip

BAD_OPTIONS: list[tuple[str, str]] = [
    *[("port", value) for value in ("", "x", "-1", "65536", "1.5", "٣", " 1", "1e3")],
    *[("socket_mode", value) for value in ("", "x", "0900", "77777")],
    *[(name, value) for name in ("body_limit", "memory", "log_limit") for value in ("", "x", "-1", "1.5m", "0", "m", "9" * 30)],
    *[(name, value) for name in ("max_artifacts_bytes", "extract_limit", "file_size") for value in ("", "-1", "x")],
    *[("drain", value) for value in ("", "10", "-1s", "25h", "999999999h")],
    *[("pull_timeout", value) for value in ("", "10", "0s", "999999999h", "-1s", "x", "1d", "nan", "inf")],
    *[("max_timeout", value) for value in ("", "10", "0s", "25h")],
    *[(name, value) for name in ("keep", "max_concurrent", "max_waiting", "max_exec", "pids")
      for value in ("", "0", "-1", "x", "1.5")],
    *[("cpus", value) for value in ("", "0", "-1", "nan", "inf", "x")],
    *[("pull", value) for value in ("", "always ", "Never")],
    ("access_log", "no"), ("trust_proxy", "here"), ("trust_proxy", "10.0.0.1/8"),
    ("log_format", "xml"), ("queue", "-1"), ("token", ""), ("token_file", ""), ("host", ""), ("runtime", ""),
    *[("docker_host", value) for value in ("", "x", "ssh://x")],
    *[("node", value) for value in ("", "A", "-a", "a-", "a_b", "a.b", "a" * 64)],
    *[("leave", value) for value in ("", "10", "-1s", "x")],
]  # fmt: skip


def _variable(name: str) -> str:
    return "LIGHT_RUN_" + name.upper()


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_command_line(*arguments: str, **environment: str) -> Settings:
    return read_settings(vars(_parser().parse_args(["serve", *arguments])), environment)


def test_every_option_is_tested() -> None:
    assert {name for name, _, _ in OPTIONS} == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(("name", "text", "value"), OPTIONS)
def test_an_option_comes_from_the_command_line_or_its_variable(name: str, text: str, value: Any) -> None:
    assert getattr(_from_command_line(_option(name), text), name) == value
    assert getattr(_from_command_line(**{_variable(name): text}), name) == value


@pytest.mark.parametrize(("name", "text"), BAD_OPTIONS)
def test_a_bad_value_names_its_source(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=_option(name)):
        _from_command_line(_option(name) + "=" + text)
    if text or name.startswith("token"):
        with pytest.raises(UsageError, match=_variable(name)):
            _from_command_line(**{_variable(name): text})
    else:
        assert _from_command_line(**{_variable(name): text}) == _from_command_line()


def test_the_option_wins_over_the_variable() -> None:
    assert _from_command_line("--port", "1", LIGHT_RUN_PORT="2").port == 1
    assert _from_command_line("--allow-image", "a", LIGHT_RUN_ALLOW_IMAGE="b").allow_image == ("a",)


def test_repeatable_options_take_commas_in_variables_only() -> None:
    assert _from_command_line("--allow-image", "a", "--allow-image", "b,c").allow_image == ("a", "b,c")
    assert _from_command_line(LIGHT_RUN_ALLOW_IMAGE="a, b,c").allow_image == ("a", "b", "c")
    with pytest.raises(UsageError):
        _from_command_line(LIGHT_RUN_ALLOW_IMAGE="a,,b")


@pytest.mark.parametrize("line", ["", "serve --nope", "serve --por 1", "serve --port", "serve x", "ps x"])
def test_a_wrong_command_line_is_one_line_and_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parser().parse_args(line.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1", 1), ("1k", 1024), ("1K", 1024), ("1kb", 1024), ("1KiB", 1024), ("2t", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_tokens_of_option_and_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("one\n\n  two \n")
    assert Settings().tokens() == []
    assert Settings(token="t").tokens() == [Token("t")]
    assert Settings(token_file=file).tokens() == [Token("one"), Token("two")]
    assert {token.text for token in Settings(token="t", token_file=file).tokens()} == {"one", "t", "two"}


def test_named_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("plain\nteam-a  first max=2 queue=0\nteam-a second queue=0 max=2\nb.9_x third\n")
    named = [Token("first", "team-a", (2, 0)), Token("second", "team-a", (2, 0)), Token("third", "b.9_x")]
    assert Settings(token_file=file).tokens() == [Token("plain"), *named]


@pytest.mark.parametrize(
    "line",
    [
        "a secret max=0", "a secret max=-1", "a secret max=x", "a secret most=1", "a secret max=1 max=2", "a secret more",
        "# secret", "-a secret", "a" * 64 + " secret", "ü secret", "a secret max=", "a secret max=1234567",
        "a secret queue=1,max=1", "a secret\na other max=1", "a secret\nb secret", "secret\nb secret",
        "secret max=2", "secret queue=1", "secret max=2 queue=1",
    ],
)  # fmt: skip
def test_a_bad_line_of_tokens_is_named_and_not_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "tokens").write_text(line + "\n")
    with pytest.raises(UsageError, match="--token-file: ") as caught:
        Settings(token_file=tmp_path / "tokens").tokens()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_token_file_without_a_token_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens").write_bytes(content)
    for token in (None, "t"):
        with pytest.raises(UsageError, match="--token-file"):
            Settings(token=token, token_file=tmp_path / "tokens").tokens()
    with pytest.raises(UsageError, match="--token-file"):
        Settings(token_file=tmp_path / "missing").tokens()
