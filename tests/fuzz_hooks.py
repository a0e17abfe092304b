"""What schemathesis, which test_openapi.py runs, changes in the requests it makes: their containers end soon, nobody
outside is called, and the routes of a run often meet one that is there. What is invalid stays as it is."""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from hypothesis import strategies

import lightrun
from engine import IMAGE

SETTINGS = lightrun.Settings()
FIELDS: dict[str, Any] = lightrun.request_schema(SETTINGS)["properties"]
# Field → what stands in for every valid value of it. Nobody listens on port 9.
TAME: dict[str, Any] = {"image": IMAGE, "timeout": 500, "callbackUrl": "http://127.0.0.1:9/", "network": "none"}
# What stands in for strings of the pattern of `image`: making them of that takes two thirds of the whole test's CPU time.
IMAGES = [IMAGE, "a", "127.0.0.1:1/b-c/d_e:f.0-G", "[::1]/a", f"a/b@sha256:{'0' * 64}", f"sha256:{'a' * 64}"]
schemathesis.openapi.format("image", strategies.sampled_from(IMAGES))


def _valid(name: str, value: Any) -> bool:
    """Whether a field would pass by itself."""
    return not list(lightrun.problems_of(value, FIELDS[name], []))


def _tame(body: dict[str, Any]) -> dict[str, Any]:
    """A request that is as valid as it was. Every fourth image stays, and is not there."""
    kept = {"image"} if len(str(body.get("image"))) % 4 == 0 else set()
    body = {"timeout": TAME["timeout"], **body} if "image" in body else body
    return {name: TAME[name] if name in TAME.keys() - kept and _valid(name, value) else value for name, value in body.items()}


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Called by schemathesis with the document."""
    image = raw_schema["components"]["schemas"]["RunRequest"]["properties"]["image"]
    del image["pattern"]
    image["format"] = "image"


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Called by schemathesis before each request."""
    if case.operation.label == "POST /run" and isinstance(case.body, dict):
        case.body = _tame(case.body)
    known = {"run_id": os.environ.get("LIGHTRUN_FUZZ_RUN"), "path": os.environ.get("LIGHTRUN_FUZZ_PATH")}
    for name, value in (case.path_parameters or {}).items():
        if known.get(name) and case.method != "DELETE" and isinstance(value, str) and len(value) % 2:
            case.path_parameters[name] = known[name]
