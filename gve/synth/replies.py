"""What a captioner wrote, and whether it is the JSON that was asked for: nothing that a model says is trusted."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np

from gve.items import Frames, Text, Video
from gve.synth.records import Request


class BadReply(ValueError):
    """A reply that cannot be used; the message says why in a few words, for the quarantine and its counts."""


def read_reply(text: str | None, schema: Mapping[str, Any]) -> Any:
    """The JSON value of a reply.

    A reply that is JSON as a whole is taken as such. Otherwise a code fence or words around it are passed over, and
    the first object or list in it that fits the schema is taken: a model that greets first has still answered.

    Args:
        text: as it came; None where a server sent no content.
        schema: JSON schema that the value must fit.

    Raises:
        BadReply: "no json", or "schema: ..." with the place and what is wrong there.
    """
    fault = "no json"
    for value in _values(text or ""):
        error = jsonschema.exceptions.best_match(_validator(_canonical(schema)).iter_errors(value))
        if error is None:
            return value
        if fault == "no json":
            fault = f"schema: {error.json_path}: {error.message[:200]}"
    raise BadReply(fault)


def _values(text: str) -> Iterator[Any]:
    """The text as one JSON value; failing that, each outermost object or list that stands in it."""
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except ValueError:
        pass
    else:
        if not text[end:].strip():
            yield value
            return
    at = 0
    while (begin := min((place for mark in "{[" if (place := text.find(mark, at)) >= 0), default=-1)) >= 0:
        try:
            value, at = _DECODER.raw_decode(text, begin)
        except ValueError:
            at = begin + 1
        else:
            yield value


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises ValueError where the schema itself is none; that is a fault of who asks, so it is no reply's error."""
    _validator(_canonical(schema))


def attempt_seed(request: Request, attempt: int) -> int:
    """31 bits: the request's own seed first, then others that follow from it and from the id."""
    if attempt == 1:
        return request.seed & 0x7FFFFFFF
    digest = hashlib.sha256(f"{request.seed}\0{attempt}\0{request.id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def probe() -> Request:
    """A start-up question about two grey frames: prose is asked for, and one of two nonsense words is allowed."""
    words = [f"zq{random.randrange(16**6):06x}" for _ in range(2)]
    grey = np.full((2, 56, 56, 3), 128, np.uint8)
    clip = Frames(grey, np.array([0.0, 1.0]), np.array([0, 1]), 2, 1.0)
    return Request(
        id="probe",
        system="You are a helpful assistant. Answer in prose.",
        parts=(Video(clip), Text("Describe what you see in one plain English sentence.")),
        schema={
            "type": "object",
            "properties": {"word": {"type": "string", "enum": words}},
            "required": ["word"],
            "additionalProperties": False,
        },
        schema_name="probe",
        max_tokens=256,
    )


def _canonical(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, sort_keys=True)


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """A run has a few schemas and a million replies."""
    own = json.loads(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(own)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON schema: {error.json_path}: {error.message}") from None
    return jsonschema.Draft202012Validator(own)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that is given twice is refused, since which of the two was meant cannot be known."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_once)
