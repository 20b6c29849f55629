"""Evaluation-time ablations: the same weights under other conditions, and the score says what each was worth.

`Ablation` is one condition: other frames, tokens, prompts or pooled token, the adapters off, or less to see. What is
taken from sight has a name:

- static: the middle frame of each clip in place of all: what is left needs no motion.
- shuffled, reversed: the frames of each clip in another order: what is left needs no order.
- black: black pixels for clips and images: what is left is a leak; a text set must fall to chance.
- text_only: the text without pictures. A composed query loses its media; where the query is text alone, the corpus
  turns black, and the score must fall to chance.
- media_only: the pictures without text. A composed query keeps its media; where the query is text alone, nothing but
  the instruction is left of it, and the score must fall to chance.

Pictures are changed on decoded items inside the encoder's workers, queries before anything is decoded. The last two say
nothing about sets whose queries are pictures alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gve.eval.uvrb import RetrievalSet
from gve.inputs import InputPolicy
from gve.items import Frames, Image, InputError, Item, Part, Text, Video
from gve.video import Sampling


def _static(frames: Frames, key: str) -> np.ndarray:
    return np.full(len(frames.pixels), len(frames.pixels) // 2)


def _shuffled(frames: Frames, key: str) -> np.ndarray:
    """A permutation that the clip's content decides; never the identity, which would leave the clip as it is."""
    count = len(frames.pixels)
    words = np.random.Philox(key=int(hashlib.sha256(f"shuffled\0{key}".encode()).hexdigest()[:32], 16)).random_raw(
        count
    )
    order = np.argsort(words, kind="stable")
    return np.roll(order, 1) if np.array_equal(order, np.arange(count)) else order


def _reversed(frames: Frames, key: str) -> np.ndarray:
    return np.arange(len(frames.pixels))[::-1]


_ORDERS: dict[str, Callable[[Frames, str], np.ndarray]] = {
    "static": _static,
    "shuffled": _shuffled,
    "reversed": _reversed,
}
PIXEL_ABLATIONS = (*_ORDERS, "black")
QUERY_ABLATIONS: dict[str, tuple[type[Part], ...]] = {"text_only": (Text,), "media_only": (Image, Video)}
ABLATIONS = (*PIXEL_ABLATIONS, *QUERY_ABLATIONS)


@dataclass(frozen=True)
class PixelAblation:
    """A transform (see gve.encode.encoder) of what decoded clips and images show; times stay as they were.

    Args:
        name: one of PIXEL_ABLATIONS.
    """

    name: str

    def touches(self, item: Item) -> bool:
        return any(isinstance(part, Video) or (self.name == "black" and isinstance(part, Image)) for part in item.parts)

    def __call__(self, item: Item) -> Item:
        return dataclasses.replace(item, parts=tuple(self._part(part) for part in item.parts))

    def _part(self, part: Part) -> Part:
        """The changed part; without the old hash, so that no cache takes it for the original."""
        if isinstance(part, Video) and isinstance(part.source, Frames):
            frames = part.source
            if self.name == "black":
                pixels = np.zeros_like(frames.pixels)
            else:
                pixels = frames.pixels[_ORDERS[self.name](frames, part.content_hash())]
            return Video(dataclasses.replace(frames, pixels=pixels), name=part.name)
        if self.name == "black" and isinstance(part, Image) and isinstance(part.source, np.ndarray):
            return Image(np.zeros_like(part.source), name=part.name)
        if isinstance(part, Text) or (isinstance(part, Image) and self.name != "black"):
            return part
        raise TypeError(f"{self.name} needs a decoded {type(part).__name__}, got {type(part.source).__name__}")


def concerns(name: str, tested: RetrievalSet) -> bool:
    """Whether the ablation says something about the set."""
    return name in PIXEL_ABLATIONS or "T" in tested.record.query


def pixels_of(name: str, tested: RetrievalSet) -> PixelAblation | None:
    """What the ablation does to the pictures of the set; None where they stay as they are."""
    if name == "text_only" and tested.record.query == "T":
        return PixelAblation("black")
    return PixelAblation(name) if name in PIXEL_ABLATIONS else None


def ablated_queries(name: str, tested: RetrievalSet) -> tuple[Item, ...]:
    """The queries with the kept half, instruction included; as they are under an ablation of pixels."""
    if name not in QUERY_ABLATIONS:
        return tested.queries
    kept = QUERY_ABLATIONS[name]
    return tuple(
        dataclasses.replace(item, parts=tuple(part for part in item.parts if isinstance(part, kept)))
        for item in tested.queries
    )


PLAIN = "plain"
"""Name of the run that ablations are compared with."""
GENERIC_INSTRUCTION = "Find the video that matches the query."
PROMPTS = {"none": "", "generic": GENERIC_INSTRUCTION}
_OWN_KEYS = ("name", "shown", "prompt", "adapters", "sampling", "frames", "tokens")
# The sampling and the tokens of a frame have keys of their own; padding decides no embedding.
_POLICY = {
    field.name: getattr(InputPolicy(), field.name)
    for field in dataclasses.fields(InputPolicy)
    if field.name not in ("sampling", "max_frame_tokens", "min_frame_tokens", "padding_side")
}

# Allows every value that some policy allows; limits that depend on each other are checked against the run's own.
_ANY_POLICY = InputPolicy(
    Sampling.uniform(2), max_frame_tokens=1 << 20, min_frame_tokens=1, max_image_tokens=1 << 20, min_image_tokens=1
)


@dataclass(frozen=True, eq=False)
class Ablation:
    """One condition under which the same weights are scored again.

    Args:
        name: what its rows are called.
        shown: one of ABLATIONS, what is taken from sight; empty for nothing.
        inputs: changes of the input policy: `sampling` ("uniform(8)", "fps(1,8)"), `frames` (number of the sampling;
            the most of an "fps" one), `tokens` (most of a frame, before two are merged), and fields of InputPolicy,
            `append_eos` (which token is pooled) and `target_text` among them.
        instruction: of every query; "" for none. None keeps each set's own.
        adapters: False: the untrained base answers.
    """

    name: str
    shown: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    instruction: str | None = None
    adapters: bool = True

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any]) -> Ablation:
        """The ablation of a configuration.

        Args:
            spec: one of ABLATIONS, or a mapping with one or more of: `shown` (one of ABLATIONS), `frames`, `tokens`,
                `sampling`, a field of InputPolicy, `prompt` ("none", "generic" or the instruction itself), `adapters`
                (on or off), and `name`, which is made of the others where it is not given.

        Raises:
            InputError: an unknown name or key, or a value that the key cannot have.
        """
        values: dict[str, Any] = {"shown": spec} if isinstance(spec, str) else dict(spec)
        known = (*_OWN_KEYS, *_POLICY)
        for key, value in values.items():
            if key not in known:
                raise InputError(f"ablation: unknown key {key!r}; known: {', '.join(known)}")
            if type(value) is not _kind(key):
                raise InputError(f"ablation: {key}={value!r} must be of type {_kind(key).__name__}")
        name = values.pop("name", "")
        if not values:
            raise InputError(f"ablation {name!r} changes nothing; give it one of: {', '.join(known[1:])}")
        name = name or _label(values)
        shown, prompt, adapters = values.pop("shown", ""), values.pop("prompt", None), values.pop("adapters", True)
        if shown not in ("", *ABLATIONS):
            raise InputError(f"no ablation is called {shown!r}; known: {', '.join(ABLATIONS)}")
        instruction = None if prompt is None else PROMPTS.get(prompt, prompt)
        if shown == "media_only" and instruction == "":
            raise InputError("ablation: shown=media_only with prompt=none leaves nothing of a query that is text alone")
        ablation = cls(name, shown, values, instruction, adapters)
        ablation.policy(_ANY_POLICY)
        return ablation

    def policy(self, plain: InputPolicy) -> InputPolicy:
        """The plain run's policy with the changes in place.

        Raises:
            InputError: a value is out of its range.
        """
        changes = dict(self.inputs)
        sampling = Sampling.parse(changes.pop("sampling")) if "sampling" in changes else plain.sampling
        if "frames" in changes:
            sampling = dataclasses.replace(sampling, num_frames=changes.pop("frames"))
        if "tokens" in changes:
            most = changes.pop("tokens")
            changes |= {"max_frame_tokens": most, "min_frame_tokens": min(plain.min_frame_tokens, most)}
        return plain.replace(sampling=sampling, **changes)

    def sets(self, plain: Sequence[RetrievalSet]) -> list[RetrievalSet]:
        """The plain run's sets, with the instruction in place of each set's own."""
        if self.instruction is None:
            return list(plain)
        return [
            dataclasses.replace(
                tested,
                record=dataclasses.replace(tested.record, instruction=self.instruction),
                queries=tuple(dataclasses.replace(item, instruction=self.instruction) for item in tested.queries),
            )
            for tested in plain
        ]


def parse_ablations(specs: Sequence[str | Mapping[str, Any]]) -> tuple[Ablation, ...]:
    """The ablations of a configuration, each under a name of its own.

    Raises:
        InputError: one cannot be (see Ablation.parse), or two have one name.
    """
    ablations = tuple(Ablation.parse(spec) for spec in specs)
    names = [ablation.name for ablation in ablations]
    if twice := [name for place, name in enumerate(names) if name in (*names[:place], PLAIN)]:
        raise InputError(
            f"two ablations are called {twice[0]!r} ({PLAIN!r} is the run itself); give one another `name`"
        )
    return ablations


def _kind(key: str) -> type:
    kinds = {"frames": int, "tokens": int, "adapters": bool}
    return type(_POLICY[key]) if key in _POLICY else kinds.get(key, str)


def _label(values: Mapping[str, Any]) -> str:
    """A name of the changes, the same for any order of the keys: "static", "frames=16 tokens=400"."""
    words = {True: "on", False: "off"}
    shown = {key: words[value] if isinstance(value, bool) else value for key, value in sorted(values.items())}
    return " ".join(str(value) if key == "shown" else f"{key}={value}" for key, value in shown.items())


# What an item must hold for a field of the policy to matter to it; any other field matters to all items.
_MATTERS_TO: dict[str, Callable[[Item], bool]] = {
    **dict.fromkeys(
        ("sampling", "max_frame_tokens", "min_frame_tokens", "times"),
        lambda item: any(isinstance(part, Video) for part in item.parts),
    ),
    **dict.fromkeys(
        ("max_image_tokens", "min_image_tokens"), lambda item: any(isinstance(part, Image) for part in item.parts)
    ),
    "positions": lambda item: bool(item.media),
    "target_text": lambda item: not item.text and not item.instruction,
}


def same_inputs(item: Item, policy: InputPolicy, other: InputPolicy) -> bool:
    """Whether the model is fed the same for the item under both policies, as far as its kind tells."""
    return not any(
        _MATTERS_TO.get(own.name, lambda item: True)(item)
        for own in dataclasses.fields(InputPolicy)
        if getattr(policy, own.name) != getattr(other, own.name)
    )
