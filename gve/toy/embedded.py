"""The tiny base as the captioner of a synthesis: sees pixels, errs, needs no server; the embedded default.

It was taught the questions of `lessons.REQUESTS` and follows no prompt. So a request is answered slot by slot: each
slot's kind of caption is asked for in the words of the lessons, the answer is bound to what a JSON string may hold, and
the reply is put together from the answers. Slots that are no text (a level, a choice) are bound to their own schema.
Prompts, profiles and word ranges are not heard.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from gve.items import Image, InputError, Item
from gve.synth.chat import Prompt, Said, draws
from gve.synth.grammar import of_schema, of_text
from gve.synth.local import Attempts, in_batches
from gve.synth.records import Reply, Request
from gve.synth.replies import attempt_seed
from gve.toy.captioner import POLICY, Captioner
from gve.toy.lessons import REQUESTS
from gve.toy.slots import CHANGE, Slot, slots, subject
from gve.video import MediaError

LONGEST_CHARS = 1000
"""Of a slot without maxLength; the longest caption of the lessons has some 700."""


@dataclass(frozen=True)
class EmbeddedOptions:
    """How the base is asked.

    Args:
        base: hub folder of another base that was taught the same lessons; empty for the embedded one.
        batch_size: requests that are answered together, each of some five slots.
        temperature: 0 gives all slots of one kind the same words, so five captions of a picture would be one.
    """

    base: str = ""
    batch_size: int = 16
    temperature: float = 0.3

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.temperature < 0:
            raise InputError(
                f"captioner batch_size {self.batch_size}, temperature {self.temperature}: use at least 1, and 0 or more"
            )


class EmbeddedCaptioner:
    """A `gve.synth.records.Captioner` on the tiny base."""

    Options: ClassVar[type] = EmbeddedOptions

    def __init__(self, options: EmbeddedOptions) -> None:
        self.options = options

    @cached_property
    def model(self) -> Captioner:
        """Loaded when it is first needed."""
        return Captioner.from_base(self.options.base or None, batch_size=64)

    @property
    def fingerprint(self) -> str:
        inputs, heat = POLICY.digest(), self.options.temperature
        return f"toy base {self.model.backbone.base_hash} inputs {inputs} t={heat:g}, slots by kind"

    async def check(self) -> None:
        """Loads the base; its weights are compared with their checksums there, and the binding is built in."""
        assert self.model

    def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """One reply to each request, a batch at a time."""
        return in_batches(requests, self.options.batch_size, self._replies)

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        asked: list[tuple[Attempts, list[tuple[Slot, Prompt]]]] = []
        for request in requests:
            attempts, prompts = Attempts(request, time.monotonic()), []
            try:
                prompts = [(slot, self._prompt(request, slot)) for slot in slots(request)]
            except MediaError as error:
                attempts.error, attempts.text = f"media {error.reason}", str(error)
            except OSError as error:
                attempts.error, attempts.text = "media unreadable", str(error)
            asked.append((attempts, prompts))
        every = [prompt for _, prompts in asked for _, prompt in prompts]
        answers = iter(self.model.say(every, self.options.temperature))
        for attempts, prompts in asked:
            if not attempts.error:
                said = [next(answers) for _ in prompts]
                value = {slot.name: _value(slot, one) for (slot, _), one in zip(prompts, said, strict=True)}
                attempts.take(said, json.dumps(value, ensure_ascii=False))
        return [attempts.reply() for attempts, _ in asked]

    def _prompt(self, request: Request, slot: Slot) -> Prompt:
        shown = subject(request)
        # A change is what happens in the target; that its text should need the reference is more than the base knows.
        kind = "temporal" if slot.kind == CHANGE else slot.kind or "short"
        if isinstance(shown, Image) and kind != "static":
            kind = "static"  # no other question on a picture asks for a text
        item = Item.of(REQUESTS[kind]) if shown is None else Item((shown, *Item.of(REQUESTS[kind]).parts))
        grammar = of_schema(slot.schema)
        if slot.kind:
            grammar = of_text(*_bounds(slot))
        generator = None
        if self.options.temperature:
            seed = attempt_seed(request, 1)
            generator = draws(seed, Item.of(f"{request.id}\0{slot.name}"))
        return Prompt(self.model.prepare(item), grammar, request.max_tokens, generator)


def _bounds(slot: Slot) -> tuple[int, int]:
    """Fewest and most characters of the answer; a list is told as one text with commas."""
    fewest, most = slot.items.get("minLength", 1), slot.items.get("maxLength", LONGEST_CHARS)
    if slot.is_list:
        most = min((most + 2) * slot.schema.get("maxItems", 10), LONGEST_CHARS)
    return max(fewest, 1), most


def _value(slot: Slot, said: Said) -> Any:
    """What a slot holds: a text, the entries of a list of keywords, or the JSON that the answer is."""
    if not slot.kind:
        try:
            return json.loads(said.text)
        except ValueError:
            return None  # cut; the reply is refused as such
    text = said.text.strip()
    if not slot.is_list:
        return text
    longest = slot.items.get("maxLength", LONGEST_CHARS)
    entries = [entry.strip() for entry in text.split(",") if 0 < len(entry.strip()) <= longest]
    return list(dict.fromkeys(entries))[: slot.schema.get("maxItems")]
