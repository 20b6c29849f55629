"""What a run's captions and pairs are, in numbers, beside what was asked for; one pass over the rows."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from gve.eval.statistics import CONFIDENCE
from gve.synth.audit.drawn import Drawn
from gve.synth.audit.judge import Told, captions_of
from gve.synth.audit.rates import wilson
from gve.synth.extend import targets
from gve.synth.profiles import PROFILES
from gve.synth.schemas import FRAME_STYLES, VIDEO_STYLES, count_words, styles
from gve.synth.units import Row

TEXTS = 20_000
"""Captions of which n-grams are counted: a share of distinct ones can only be compared at equal numbers."""
NGRAMS = (1, 2, 3)
LOOP_WORDS, LOOP_TIMES = 4, 3
"""A caption loops when so many words stand in it so often."""
OPENING_WORDS, OPENINGS = 3, 8
CUES = ("spatial", "temporal", "theme")
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.casefold())


class Census:
    """Counts rows of `enrich`. Memory: 8 bytes a caption, and TEXTS captions.

    Args:
        options: of the step `enrich`, as its identity has them.
        seed: of the sample whose n-grams are counted.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        self._options = options
        self._videos = 0
        self._spread = 0
        self._drawn: dict[str, Counter[str]] = {key: Counter() for key in ("profile", "readability", "education")}
        self._words: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        self._cues: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(CUES) + 1))
        self._marks = array("Q")
        self._texts: Drawn[str] = Drawn(TEXTS, seed, "n-grams")

    def add(self, row: Row) -> None:
        """Counts one row."""
        enrichment = row["enrichment"]
        self._videos += 1
        for key, counts in self._drawn.items():
            counts[enrichment[key]] += 1
        lengths = [caption["words"] for caption in enrichment["captions"]]
        short, long = self._options.get("short_words", 0), self._options.get("long_words", 0)
        self._spread += (not short or min(lengths) < short) and (not long or max(lengths) > long)
        for caption in enrichment["captions"]:
            sums = self._cues[enrichment["profile"]]
            for place, cue in enumerate(CUES):
                sums[place] += caption["cues"].get(cue, 0.0)
            sums[-1] += any(caption["cues"].values())
        for told in captions_of(row):
            self._count(told)

    def _count(self, told: Told) -> None:
        self._words[told.of, told.style][count_words(told.text)] += 1
        digest = hashlib.blake2b(" ".join(words_of(told.text)).encode("utf-8", "surrogatepass"), digest_size=8)
        self._marks.append(int.from_bytes(digest.digest(), "big"))
        self._texts.offer(told.id, told.text)

    def result(self) -> dict[str, Any]:
        """Plain JSON; see the page for what each number is."""
        target = {**dict.fromkeys(PROFILES, 0.0), **self._options.get("profiles", PROFILES)}
        return {
            "videos": self._videos,
            "captions": sum(map(Counter.total, self._words.values())),
            "profiles": _shares(self._drawn["profile"], target),
            "levels": {key: _shares(self._drawn[key], self._even(key)) for key in ("readability", "education")},
            "styles": {
                "video": self._styles("video", styles(VIDEO_STYLES, self._options.get("words", {}))),
                "frame": self._styles("frame", styles(FRAME_STYLES, self._options.get("frame_words", {}))),
            },
            "spread": self._spread / self._videos if self._videos and self._asks_for_spread else None,
            "cues": {
                profile: dict(zip(CUES, (total / sums[-1] for total in sums[:-1]), strict=True))
                for profile, sums in sorted(self._cues.items())
                if sums[-1]
            },
            "language": self._language(),
        }

    @property
    def _asks_for_spread(self) -> bool:
        return bool(self._options.get("short_words") or self._options.get("long_words"))

    def _even(self, key: str) -> dict[str, float]:
        levels = self._options.get(key, ())
        return {level: levels.count(level) / len(levels) for level in levels}

    def _styles(self, of: str, asked: Sequence[Any]) -> dict[str, Any]:
        found = {}
        for style in asked:
            counts = self._words.get((of, style.label))
            if counts:
                lengths = np.repeat(*map(np.array, (list(counts), list(counts.values()))))
                inside = int(((lengths >= style.fewest) & (lengths <= style.most)).sum())
                found[style.label] = {
                    "count": len(lengths),
                    "asked": [style.fewest, style.most],
                    "inside": inside / len(lengths),
                    "fewest": int(lengths.min()),
                    **{name: float(np.quantile(lengths, share)) for name, share in QUANTILES.items()},
                    "most": int(lengths.max()),
                    "words": {str(length): counts[length] for length in sorted(counts)},
                }
        return found

    def _language(self) -> dict[str, Any]:
        texts = [words_of(text) for text in self._texts.entries()]
        marks = np.sort(np.frombuffer(self._marks, np.uint64)) if self._marks else np.zeros(0, np.uint64)
        _, repeats = np.unique(marks, return_counts=True)
        openings = Counter(" ".join(words[:OPENING_WORDS]) for words in texts if len(words) >= OPENING_WORDS)
        loops = sum(max(_ngrams(words, LOOP_WORDS).values(), default=0) >= LOOP_TIMES for words in texts)
        return {
            "texts": len(texts),
            "words": sum(map(len, texts)),
            "distinct": {str(n): _distinct(texts, n) for n in NGRAMS},
            "repeated": int(repeats[repeats > 1].sum()) / len(marks) if len(marks) else None,
            "looping": loops / len(texts) if texts else None,
            "openings": [[opening, count / len(texts)] for opening, count in openings.most_common(OPENINGS)],
        }


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _distinct(texts: Iterable[Sequence[str]], n: int) -> float | None:
    """Different n-grams for each n-gram."""
    seen, total = set[tuple[str, ...]](), 0
    for words in texts:
        counts = _ngrams(words, n)
        seen.update(counts)
        total += counts.total()
    return len(seen) / total if total else None


def _shares(counts: Mapping[str, int], target: Mapping[str, float]) -> dict[str, Any]:
    """Name -> count, share with its 95% interval as of a draw, and the share that was asked for."""
    total, quantile = sum(counts.values()), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return {
        name: {
            "count": counts.get(name, 0),
            "share": counts.get(name, 0) / total,
            "interval": wilson(counts.get(name, 0) / total, total, quantile),
            "asked": target.get(name, 0.0),
        }
        for name in dict.fromkeys((*target, *sorted(counts)))
        if total
    }


def count_tasks(
    shares: Mapping[str, float], videos: int, made: Iterable[Row], written: Iterable[Row]
) -> dict[str, dict[str, Any]]:
    """Task -> pairs that were asked for, made and written to shards.

    Args:
        shares: pairs for each video, the option of `extend`.
        videos: that `extend` read.
        made, written: rows of `extend` and of `output`.
    """
    counts = [Counter(row["task"] for row in rows) for rows in (made, written)]
    asked = targets(shares, videos)
    return {
        task: {"asked": asked.get(task, 0), "made": counts[0][task], "written": counts[1][task]}
        for task in dict.fromkeys((*asked, *counts[0], *counts[1]))
    }
