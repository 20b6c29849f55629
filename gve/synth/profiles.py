"""What each video is asked for beside its style: drawn from its id, so that neither order nor worker decides.

Shares and slots are those of gve.md section 6 (arXiv 2510.27571); the words for them are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from gve.items import InputError

PROFILES: Mapping[str, float] = {"spatial": 0.3, "temporal": 0.6, "other": 0.1}
"""Information profile -> share of the videos."""

LEANS: Mapping[str, str] = {
    "spatial": "Lean towards what is where: things, their looks, places and relations; stay within the shares.",
    "temporal": "Lean towards what happens: actions, their order, changes and movement; stay within the shares.",
    "other": "Lean towards theme, style, light and the camera's work as far as the shares allow.",
}
VIDEO_SHARES: Mapping[str, str] = {
    "spatial (things, looks, places, relations)": "30 to 60%",
    "temporal (actions, order, change, motion)": "30 to 60%",
    "theme, style and camera": "at most 20%",
    "other": "at most 10%",
}
FRAME_SHARES: Mapping[str, str] = {
    "spatial (things, looks, places, relations)": "50 to 70%",
    "action that is visible in the moment": "at most 30%",
    "theme, style and camera": "10 to 20%",
    "other": "at most 10%",
}
READABILITY = ("very easy", "easy", "plain", "fairly difficult", "difficult")
EDUCATION = ("primary school", "secondary school", "college", "postgraduate")
STRATEGIES: Mapping[str, Sequence[str]] = {
    "TI2V": ("new action", "new scene", "negative constraint", "relation"),
    "TV2V": ("temporal continuation", "other viewpoint", "other condition", "minor action variation"),
}
"""Task -> kinds of composed query."""


@dataclass(frozen=True)
class ProfileOptions:
    """Of what the captions of a video are asked to be.

    Args:
        profiles: information profile -> share of the videos; their sum is 1.
        readability, education: levels, drawn evenly for each video.

    Raises:
        InputError: shares that are none, an unknown profile, or no level.
    """

    profiles: Mapping[str, float] = field(default_factory=lambda: dict(PROFILES))
    readability: tuple[str, ...] = READABILITY
    education: tuple[str, ...] = EDUCATION

    def __post_init__(self) -> None:
        if unknown := set(self.profiles) - set(LEANS):
            raise InputError(f"profile {min(unknown)!r}: use {', '.join(LEANS)}")
        if min(self.profiles.values(), default=-1) < 0 or abs(sum(self.profiles.values()) - 1) > 1e-6:
            raise InputError(f"profiles {dict(self.profiles)} are no shares: none below 0, sum 1")
        if not self.readability or not self.education:
            raise InputError("profile: give at least one level of readability and of education")


@dataclass(frozen=True)
class Profile:
    """What one video was drawn."""

    information: str
    readability: str
    education: str

    @classmethod
    def of(cls, options: ProfileOptions, seed: int, id: str) -> Profile:
        """The profile of the video with this id."""
        return cls(
            weighted(options.profiles, seed, id, "profile"),
            options.readability[pick(len(options.readability), seed, id, "readability")],
            options.education[pick(len(options.education), seed, id, "education")],
        )


def chance(seed: int, *words: str) -> float:
    """Uniform in [0, 1): the first 53 bits of SHA-256 over seed and words."""
    digest = hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def pick(count: int, seed: int, *words: str) -> int:
    """One of `count` numbers from 0, all as probable."""
    return int(chance(seed, *words) * count)


def weighted(shares: Mapping[str, float], seed: int, *words: str) -> str:
    """One of the names, with its share as the probability."""
    names = [name for name, share in shares.items() if share > 0]
    drawn = chance(seed, *words)
    sums = accumulate(shares[name] for name in names)
    return next((name for name, total in zip(names, sums, strict=True) if drawn < total), names[-1])
