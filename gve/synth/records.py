"""What flows through the synthesis: weak pairs in, rejects with their reasons aside, synthesised pairs out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gve.items import Part, Video

STAGES = ("input", "quality", "enrich", "extend", "output")
"""In order; every reject names the one that dropped it."""


@dataclass(frozen=True, eq=False)
class WeakPair:
    """A video and the weak text that came with it.

    Args:
        id: unique in the run; made from the source's own id, never from the text.
        video: the file, or its bytes from a shard.
        caption: as it was found, untouched; empty where there is none.
        source: where it is from, for example "webvid".
        start_s, end_s: the span of the file that is meant; None for its begin and end.
        meta: what else the source says, plain values.
    """

    id: str
    video: Video
    caption: str
    source: str
    start_s: float | None = None
    end_s: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """Something that was left out, and why; every input ends in the output or in one of these.

    Args:
        id: of the weak pair, or of the request.
        stage: one of STAGES.
        reason: short code, for example "caption-url", "static-video", "schema".
        score: the measured value that decided, where there is one.
        detail: what a person needs to check the decision: the text, the reply, the error.
    """

    id: str
    stage: str
    reason: str
    score: float | None = None
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Request:
    """One question to a captioner.

    Args:
        id: unique and a pure function of what is asked, so that an answer can be found again.
        system: the system turn.
        parts: the user turn in order; videos are decoded by the project's own sampler, never by a server.
        schema: JSON schema that the reply must fit; small and flat.
        schema_name: its name, letters and underscores.
        max_tokens: where a reply is cut; a cut one is no reply.
        seed: of sampling; another one for each attempt.
    """

    id: str
    system: str
    parts: tuple[Part, ...]
    schema: Mapping[str, Any]
    schema_name: str
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What became of a request: exactly one for each, in any order.

    Args:
        id: of the request.
        value: the JSON value, valid by the request's schema; None if none was had.
        text: the last reply as it came, for the quarantine.
        error: why there is no value: "http 400", "timeout", "length", "no json", "schema: ...", ...; empty on success.
        attempts: requests sent.
        prompt_tokens, completion_tokens: over all attempts, as reported.
        seconds: from first attempt to the end.
    """

    id: str
    value: Any
    text: str = ""
    error: str = ""
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Captioner(Protocol):
    """Anything that looks at pictures and writes JSON: a server, a local model, the toy world's rules."""

    @property
    def fingerprint(self) -> str:
        """Names the model, its weights where they are known, its sampling of frames and of tokens."""

    async def check(self) -> None:
        """Start-up probe: the model answers, and the schema binds it.

        Raises:
            InputError: it does not; one line says what to mend.
        """

    def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """One reply to every request, as they come; requests are taken only as fast as they are answered."""
