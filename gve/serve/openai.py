"""The embeddings route in OpenAI's form, with vLLM's chat form for pictures and videos.

Sources: OpenAI API reference, "Create embeddings"; vLLM documentation, "Chat Embeddings API" (`messages` in place of
`input`, content parts `text`, `image_url`, `video_url`).
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gve.encode.encoder import Encoded
from gve.items import InputError, Item, Part, Text
from gve.serve.uploads import open_medium

MAX_INPUTS = 2048
"""Inputs of one request, as OpenAI's own limit."""
MAX_LETTERS = 200_000
"""Letters of one text: many times what any model reads."""
_KNOWN = {"model", "input", "messages", "encoding_format", "dimensions", "user", "instruction"}
_PLAIN_SYSTEM = "You are a helpful assistant."  # the prompt has it anyway


class NoModel(LookupError):
    """Another model is asked for than the one that runs."""


@dataclass(frozen=True)
class Wanted:
    """A request, read.

    Args:
        items: what is to be embedded.
        base64: vectors as text of little-endian float32 bytes, not as lists of numbers.
    """

    items: list[Item]
    base64: bool


def read_request(body: Any, model: str, dim: int) -> Wanted:
    """What a request asks for; pictures and videos are opened, in a child process.

    Besides OpenAI's fields it may have `instruction`, which says what a query looks for; targets have none. An input
    is a string, a list of content parts, or an object with such a list as `content`.

    Args:
        body: decoded JSON.
        model: the only name that `model` may have.
        dim: the only value that `dimensions` may have.

    Raises:
        InputError: it cannot be answered; says why.
        NoModel: it is for another model.
    """
    if not isinstance(body, Mapping):
        raise InputError("the body must be a JSON object")
    if unknown := sorted(set(body) - _KNOWN):
        raise InputError(f"field {unknown[0]!r:.60} is unknown; known: {', '.join(sorted(_KNOWN))}")
    if body.get("model", model) != model:
        raise NoModel(f"the model {body['model']!r:.200} does not exist here; {model!r} does")
    if body.get("dimensions") not in (None, dim):
        raise InputError(f"dimensions {body['dimensions']!r:.60}: the model was not tuned to be cut, ask for {dim}")
    form = body.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise InputError(f"encoding_format {form!r:.60} must be float or base64")
    instruction = checked_text(body.get("instruction", ""), "instruction")
    if ("input" in body) == ("messages" in body):
        raise InputError("give either input or messages")
    contents = [_of_messages(body["messages"])] if "messages" in body else _of_input(body["input"])
    return Wanted([Item(parts, instruction) for parts in contents], form == "base64")


def checked_text(value: Any, name: str) -> str:
    """A text that can be encoded as UTF-8 and is not endless.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string")
    if len(value) > MAX_LETTERS:
        raise InputError(f"{name} has {len(value)} letters, more than {MAX_LETTERS}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half a surrogate pair: send valid Unicode") from None
    return value


def _of_input(value: Any) -> list[tuple[Part, ...]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError("input must be a string or a list that is not empty")
    if len(value) > MAX_INPUTS:
        raise InputError(f"{len(value)} inputs are more than {MAX_INPUTS}: send them in several requests")
    if isinstance(value[0], int) or (isinstance(value[0], list) and value[0] and isinstance(value[0][0], int)):
        raise InputError(
            "input holds token ids, which are of another tokenizer: send strings "
            "(LangChain: check_embedding_ctx_length=False)"
        )
    if isinstance(value[0], Mapping) and "type" in value[0]:
        return [_parts(value, "input")]
    return [
        _parts(own["content"] if isinstance(own, Mapping) and "content" in own else own, f"input[{place}]")
        for place, own in enumerate(value)
    ]


def _of_messages(value: Any) -> tuple[Part, ...]:
    """One user turn, maybe after the system turn that the prompt has anyway."""
    if not isinstance(value, list) or not all(isinstance(own, Mapping) for own in value):
        raise InputError("messages must be a list of objects")
    turns = []
    for own in value:
        if own.get("role") == "user":
            turns.append(own.get("content"))
        elif own.get("role") != "system" or own.get("content") != _PLAIN_SYSTEM:
            raise InputError("messages must hold one turn of the user; what a query looks for goes into instruction")
    if len(turns) != 1:
        raise InputError(f"messages hold {len(turns)} turns of the user: send one, it becomes one embedding")
    return _parts(turns[0], "messages")


def _parts(content: Any, name: str) -> tuple[Part, ...]:
    """Content parts as parts of an item."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InputError(f"{name} must be a string or a list of content parts")
    return tuple(_part(own, f"{name} part {place}") for place, own in enumerate(content))


def _part(own: Any, name: str) -> Part:
    if not isinstance(own, Mapping):
        raise InputError(f"{name} must be an object with a type")
    kind = own.get("type")
    if kind in ("text", "input_text"):
        text = checked_text(own.get("text"), name)
        if not text.strip():
            raise InputError(f"{name} is empty")
        return Text(text)
    if kind not in ("image_url", "video_url"):
        raise InputError(f"{name} has type {kind!r:.60}; known: text, image_url, video_url")
    value = own.get(kind)
    url = value.get("url") if isinstance(value, Mapping) else value
    medium = open_medium(_data(url, name), name)
    if type(medium).__name__.lower() != kind.partition("_")[0]:
        raise InputError(f"{name} is a {kind} but holds a {type(medium).__name__.lower()}")
    return medium


def _data(url: Any, name: str) -> bytes:
    """Bytes of a data URL. Others are refused: a server that fetches what it is told to reaches where it should not."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InputError(f"{name} must carry its bytes: data:<type>;base64,<bytes>. Nothing is fetched from elsewhere")
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"{name}: the data URL must be in base64")
    if head.startswith("data:video/jpeg"):
        raise InputError(f"{name}: a list of frames has no times: send the bytes of the video file")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name}: the data URL is no valid base64") from None


def answer(wanted: Wanted, encoded: Encoded, model: str) -> dict[str, Any]:
    """The response's object; tokens are 0 of models that do not count them."""
    vectors = np.ascontiguousarray(encoded.vectors, "<f4")
    tokens = 0 if encoded.tokens is None else int(encoded.tokens.sum())
    rows = [base64.b64encode(row.tobytes()).decode() if wanted.base64 else row.tolist() for row in vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def models(model: str, since: float) -> dict[str, Any]:
    """The list of the one model.

    Args:
        since: when it was loaded, in seconds since 1970.
    """
    return {
        "object": "list",
        "data": [{"id": model, "object": "model", "created": int(since or time.time()), "owned_by": "gve"}],
    }
