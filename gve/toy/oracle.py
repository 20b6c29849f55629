"""The toy world's rules as the captioner of a synthesis: it knows what every clip shows, so every caption is true. It
also judges captions in an audit, by the checker.

The labelled upper bound beside the tiny base, and, with a dose of planted errors, a captioner whose share of false
claims is known: what an audit should find, and the arms of a dose-response experiment.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

from gve.items import InputError, Video
from gve.synth.audit.judge import CHECK, CLAIMS, read_material
from gve.synth.local import Attempts, in_batches
from gve.synth.records import Reply, Request
from gve.synth.replies import BadReply, read_reply
from gve.toy import captions, judging
from gve.toy.captions import Teller
from gve.toy.flips import Told, flip
from gve.toy.forms import Noun
from gve.toy.language import DIALECTS, Dialect
from gve.toy.scenes import Clip, Scene
from gve.toy.slots import CHANGE, Slot, media, slots, subject
from gve.toy.truth import Truth
from gve.video import MediaError


@dataclass(frozen=True)
class OracleOptions:
    """What it knows and how it lies.

    Args:
        truth: file of `gve.toy.truth.Truth.write`.
        dose: probability that a claim is made false; 0 tells the truth.
        seed: of words and lies.
        dialect: "A" or "B"; empty for that of each scene.
        record: file to which a line is added for each caption: what it claims and which of that is false; empty for
            none. The same can be had from the captions alone, by `gve.toy.flips.Told.read`.
    """

    truth: str
    dose: float = 0.0
    seed: int = 0
    dialect: str = ""
    record: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.dose <= 1:
            raise InputError(f"captioner dose {self.dose} must be a share of claims, 0 to 1")
        if self.dialect not in ("", *DIALECTS):
            raise InputError(f"captioner dialect {self.dialect!r}: use {', '.join(DIALECTS)}, or none")


class Oracle:
    """A `gve.synth.records.Captioner` that looks the scene up. A pure function of options and request."""

    Options: ClassVar[type] = OracleOptions

    def __init__(self, options: OracleOptions) -> None:
        self.options = options

    @cached_property
    def truth(self) -> Truth:
        """Read when it is first needed."""
        return Truth.read(self.options.truth)

    @property
    def fingerprint(self) -> str:
        own = self.options
        label = "" if own.dose else " (knows the scenes: an upper bound)"
        return f"toy oracle{label} dose={own.dose:g} seed={own.seed} dialect={own.dialect or 'own'}, slots by kind"

    async def check(self) -> None:
        """Reads the truth."""
        assert self.truth

    def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """One reply to each request."""
        return in_batches(requests, 16, lambda batch: [self._reply(request) for request in batch])

    def _reply(self, request: Request) -> Reply:
        attempts = Attempts(request, time.monotonic(), count=1)
        try:
            answer = self._verdicts if request.schema_name in (CLAIMS, CHECK) else self._captions
            attempts.text = json.dumps(answer(request), ensure_ascii=False)
            attempts.value = read_reply(attempts.text, request.schema)
        except MediaError as error:
            attempts.error, attempts.text = f"media {error.reason}", str(error)
        except LookupError as error:
            attempts.error, attempts.text = "unknown medium", str(error)
        except BadReply as error:
            attempts.error = str(error)
        return attempts.reply()

    def _captions(self, request: Request) -> dict[str, Any]:
        clips = self._clips(request)
        return {slot.name: self._fill(request, slot, clips) for slot in slots(request)}

    def _verdicts(self, request: Request) -> dict[str, Any]:
        """What a caption claims, or which of its claims are true; a judge never lies."""
        caption, claims = read_material(request)
        if request.schema_name == CLAIMS:
            return judging.split(caption)
        return judging.verdicts(caption, claims, self._clips(request)[-1])

    def _clips(self, request: Request) -> list[Clip]:
        clips = [self.truth.of(part) for part in media(request)]
        if not clips:
            raise LookupError("nothing is shown")
        return clips

    def _fill(self, request: Request, slot: Slot, clips: Sequence[Clip]) -> Any:
        """The value of a slot about the last of the clips."""
        clip = clips[-1]
        chance = random.Random(_key(self.options.seed, request.seed, request.id, slot.name))
        if not slot.kind:
            return _chosen(slot, chance)
        teller = Teller(DIALECTS[self.options.dialect or clip[0].look], chance)
        if slot.kind == CHANGE:
            return _change(clips[0][0], clip[0], teller)
        text = _fitting(slot, clip, teller, isinstance(subject(request), Video))
        told = Told.read(text, clip)
        if self.options.dose:
            lies = random.Random(_key(self.options.seed, request.id, slot.name, "lies"))
            told = flip(text, clip, self.options.dose, lies, teller.dialect)
        self._note(request, slot, told)
        return told.text.split(", ") if slot.is_list else told.text

    def _note(self, request: Request, slot: Slot, told: Told) -> None:
        if not self.options.record:
            return
        row = {"id": request.id, "slot": slot.name, "text": told.text, "made": told.made}
        row["false"] = [asdict(claim) for claim in told.false]
        with open(self.options.record, "a") as file:
            file.write(json.dumps(row) + "\n")


def _key(*words: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, words)).encode()).digest()[:8], "big")


def _fitting(slot: Slot, clip: Clip, teller: Teller, moving: bool) -> str:
    """A caption of the slot's kind; of another kind where the scene has nothing of it to tell, or too much."""
    if slot.kind == "keywords" and not (moving and _tells(clip[0], "keywords")):
        return _keywords(clip[0], teller)
    longest = slot.items.get("maxLength", 1 << 30) * (slot.schema.get("maxItems", 99) if slot.is_list else 1)
    if len(clip) > 1 and slot.kind == "detailed":
        text = captions.story(clip, teller).text
        if len(text) <= longest:
            return text
    text = ""
    for kind in (slot.kind, "short", "theme"):
        if _tells(clip[0], kind):
            text = captions.KINDS[kind](clip[0], teller).text
            if len(text) <= longest:
                break
    return text


def _keywords(scene: Scene, teller: Teller) -> str:
    """What a picture shows, as keywords: colours, shapes and the ground."""
    d = teller.dialect
    words = [d.colors.get(thing.color, thing.color) for thing in scene.things]
    words += [d.shapes.get(thing.shape, thing.shape) for thing in scene.things]
    words += [f"{scene.ground[0]} background", scene.ground[1]]
    return ", ".join(dict.fromkeys(words))


def _tells(scene: Scene, kind: str) -> bool:
    """Whether a scene has what a kind of caption is about."""
    if kind in ("spatial", "paragraph", "keywords"):
        return len(scene.things) > 1
    if kind in ("temporal", "general"):
        steps = captions.timeline(scene)
        alone = all(sum(bool(thing.course[slot]) for thing in scene.things) <= 1 for slot in range(4))
        return bool(steps) and alone and (kind == "temporal" or len(scene.things) > 1)
    return True


def _change(reference: Scene, target: Scene, teller: Teller) -> str:
    """What a target shows that its reference does not, in words that name nothing which the reference shows.

    Where both show the same scene, the reference is a part of the target, and what happens is told.
    """
    d = teller.dialect
    main = target.things[0]
    known = {(thing.color, thing.shape) for thing in reference.things}
    added = [thing for thing in target.things if (thing.color, thing.shape) not in known]
    if reference.ground != target.ground:
        return f"{_same(d)} {d.ground(target.ground)}"
    if added and len(added) < len(target.things):
        return f"{_same(d)} together with {d.noun(Noun(added[0].color, added[0].shape))}"
    if added:
        return f"the same action by {d.noun(Noun(main.color, main.shape))}"
    told_of_camera = reference.things == target.things and reference.camera != target.camera
    if main.events and not told_of_camera:
        return f"{_same(d)}, now it {d.does(tuple(dict.fromkeys(main.events)))}"
    return f"the same scene, now the camera {d.camera(target.camera)}"


def _same(dialect: Dialect) -> str:
    return f"the same {dialect.thing}"


def _chosen(slot: Slot, chance: random.Random) -> Any:
    """Any value of a slot that asks for no text: a level, a number."""
    if "enum" in slot.schema:
        return chance.choice(slot.schema["enum"])
    if slot.schema.get("type") == "integer":
        return chance.randint(slot.schema.get("minimum", 0), slot.schema.get("maximum", 9))
    return {"number": 0.5, "boolean": True}.get(slot.schema.get("type", ""))
