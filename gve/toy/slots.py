"""What a request of the synthesis asks for, in the toy world's terms: a kind of caption for each slot of its schema.

Neither the tiny base nor the rules of the toy world follow prompts. A slot's kind of caption is found by a word in its
name or description, or by its number in the order of the paper's five styles; what a slot asks beyond that (words,
profile, reading level) is not heard. Stated here because it is the one place where the toy world is less than a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gve.items import Image, Part, Video
from gve.synth.records import Request

# Words of a slot -> kind of caption (lessons.REQUESTS); the first line with a word that the slot has is taken.
KINDS = (
    (("keyword", "tags"), "keywords"),
    (("partial", "partly", "loose"), "main object"),
    (("abstract", "theme", "mood", "gist"), "theme"),
    (("concise", "short", "brief"), "short"),
    (("rich", "detail", "dense", "spatio"), "detailed"),
    (("camera",), "camera"),
    (("temporal", "order"), "temporal"),
    (("spatial", "layout"), "spatial"),
)
NUMBERED = {"1": "short", "2": "detailed", "3": "theme", "4": "keywords", "5": "main object"}
"""The paper's five styles (gve.md section 6) where slots are only numbered."""
CHANGE = "change"
"""The text of a composed query: what the target shows and the reference does not. No kind of caption."""


@dataclass(frozen=True)
class Slot:
    """One property of a request's schema.

    Args:
        name: of the property.
        schema: of its value.
        kind: of caption, or CHANGE; empty where it asks for no text.
    """

    name: str
    schema: Mapping[str, Any]
    kind: str = ""

    @property
    def items(self) -> Mapping[str, Any]:
        """Schema of one text: of the slot itself, or of each entry of a list."""
        return self.schema["items"] if self.is_list else self.schema

    @property
    def is_list(self) -> bool:
        return self.schema.get("type") == "array"


def slots(request: Request) -> list[Slot]:
    """The slots of a request in the order of its schema."""
    moving = isinstance(subject(request), Video)
    return [
        Slot(name, schema, _kind(name, schema, moving)) for name, schema in request.schema.get("properties", {}).items()
    ]


def media(request: Request) -> tuple[Image | Video, ...]:
    """What the request shows, in order."""
    return tuple(part for part in request.parts if isinstance(part, (Image, Video)))


def subject(request: Request) -> Part | None:
    """What is to be described: the last medium; what stands before it is a reference."""
    return media(request)[-1] if media(request) else None


def _kind(name: str, schema: Mapping[str, Any], moving: bool) -> str:
    entry = schema.get("items", schema) if schema.get("type") == "array" else schema
    if entry.get("type") != "string" or "enum" in entry:
        return ""
    words = f"{name} {schema.get('description', '')}".lower()
    if name == "query":
        return CHANGE
    if not moving:
        return "keywords" if any(sign in words for sign in KINDS[0][0]) else "static"
    for signs, kind in KINDS:
        if any(sign in words for sign in signs):
            return kind
    return NUMBERED.get(name, "detailed")
