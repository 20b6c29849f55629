"""Measures of each weak pair by itself. Only what cannot be used at all is dropped here; `select` judges the rest, so
that other thresholds need no second scan.

Adds to a row::

    "quality": {
        "video":      {"codec", "width", "height", "frames", "duration_s", "fps"},
        "sha256":     of the video's bytes,
        "dynamics":   see gve.synth.quality.dynamics.measure,
        "shots":      [0.0, 3.2, ...]            where shots begin, in seconds,
        "hash":       str() of gve.synth.quality.hashes.ClipHash,
        "text":       see gve.synth.quality.texts.TextMeasures,
        "similarity": 0.412                      cosine of caption and video; null where it is not measured
    },
    "frames": [{<locator>, "time_s": 1.5}, ...], "clips": [{<locator>, "start_s": 0.0, "end_s": 2.0}, ...]

A row that means a span of its file gets that span as its video, and a damaged file that could be repaired gets the
repaired one; `meta` then says so: {"span": [start_s, end_s], "repaired": "remux", "fault": "truncated", "kept": 0.97,
"original": <locator>}. Repairs are the parts of this step's outcomes: the funnel counts those that were tried, that
were made, and that failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np

from gve.data.mixture import mixture
from gve.items import InputError, Item, Text, Video
from gve.synth.quality.footage import CLIP_SUFFIX, Cutting
from gve.synth.quality.reasons import STAGE
from gve.synth.quality.texts import check_languages, measure_text, phrases_hash
from gve.synth.records import Reject
from gve.synth.units import Context, Outcome, Row, Scope, execution
from gve.video import MediaError, Sampling, call_guarded
from gve.video.source import Source

FOOTAGE = "gve.synth.quality.footage"
REPAIRABLE = frozenset({"truncated", "garbled", "undecodable", "not-a-video"})
LOST = frozenset({"timeout", "crashed", "out-of-memory"})
"""The child was lost: decord may be the cause, so PyAV alone tries the file once more."""
SIMILARITY_DIGITS = 4
MEASURES = 2
"""Raised when a measure or a hash changes its meaning: a folder that was scanned before is then refused."""


@dataclass(frozen=True)
class ScanOptions:
    """What is measured, what a video must have at least, and what is cut out of it.

    Args:
        repair: what is tried with a damaged file: "none"; "remux", its packets in a new container; "reencode", that
            first, and then what decodes of it encoded again.
        min_kept: share of the promised frames that a repaired file must have; under it the captions would tell of
            what is not there.
        min_side_px: of the shorter side.
        min_frames, min_duration_s, max_duration_s: of the video, or of the span that is meant.
        codecs: by FFmpeg's names; empty takes all that decode.
        sampling: of the sparse frames that measures and hashes are taken from; the first two frames count from 8.
        still_level: a picture whose cells all change by less counts as unchanged, of 255. In clips of one picture of
            84 px x264 changes a cell by up to 6, in those that move one changes by 35 or more (0003-synth-filters).
        cutting: shots, frames and clips.
        languages: that captions may be in, ISO 639-1; empty takes all.
        similarity: measure how near caption and video are, by the run's encoder.
        batch: rows whose similarity is measured together.
        timeout_s: the longest one look at a file may take; a minute of 720p takes some 20 s of a core.
    """

    repair: Literal["none", "remux", "reencode"] = "reencode"
    min_kept: float = 0.9
    min_side_px: int = 64
    min_frames: int = 8
    min_duration_s: float = 1.0
    max_duration_s: float = 600.0
    codecs: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    still_level: float = 8.0
    cutting: Cutting = field(default_factory=Cutting)
    languages: tuple[str, ...] = ("en",)
    similarity: bool = True
    batch: int = execution(64)
    timeout_s: float = execution(300.0)

    def __post_init__(self) -> None:
        if not 0 < self.min_kept <= 1 or self.still_level <= 0:
            raise InputError(
                f"scan: min_kept {self.min_kept}, still_level {self.still_level}: use a share over 0, a positive level"
            )
        if self.min_side_px < 1 or self.min_frames < 1 or not 0 <= self.min_duration_s < self.max_duration_s:
            raise InputError(
                f"scan: min_side_px {self.min_side_px}, min_frames {self.min_frames}, {self.min_duration_s} to "
                f"{self.max_duration_s} s: use at least 1 px, 1 frame, and a rising range of lengths"
            )
        if self.batch < 1 or self.timeout_s <= 0:
            raise InputError(f"scan: batch {self.batch}, timeout_s {self.timeout_s}: both must be positive")
        if self.sampling.kind != "uniform":
            raise InputError(f"scan: sampling {self.sampling}: hashes compare equally many frames, use uniform(n)")

    @property
    def limits(self) -> dict[str, Any]:
        return {
            "min_side_px": self.min_side_px,
            "min_frames": self.min_frames,
            "min_duration_s": self.min_duration_s,
            "max_duration_s": self.max_duration_s,
            "codecs": list(self.codecs),
        }


class Scan:
    """The step. Files are opened in a killable child process; workers of the run do it side by side."""

    Options: ClassVar[type] = ScanOptions
    scope: ClassVar[Scope] = "unit"

    def __init__(self, options: ScanOptions, context: Context) -> None:
        check_languages(options.languages)
        self._options, self._context, self._media = options, context, context.media

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The version of the measures, the word lists, and the encoder where one measures."""
        own = {"measures": MEASURES, "phrases": phrases_hash()}
        return own | ({"encoder": self._context.encoder().fingerprint} if self._options.similarity else {})

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        source = iter(rows)
        while group := list(islice(source, self._options.batch if self._options.similarity else 1)):
            looked = [self._look(row) for row in group]
            if self._options.similarity:
                looked = self._with_similarity(looked)
            yield from looked

    def _look(self, row: Row) -> Outcome:
        """The row with all that needs no encoder, or why it is dropped."""
        tried: tuple[Reject, ...] = ()
        made = 0
        try:
            clip = self._media.video(row["video"])
            sha256 = clip.content_hash()
            row, clip, facts, data, made = self._facts(row, clip)
        except _NotRepaired as failure:
            tried = (Reject(f"{row['id']}/repair", STAGE, failure.reason, detail=failure.detail),)
            dropped = Outcome.drop(row, STAGE, failure.error.reason, detail=str(failure.error))
            return Outcome(row["id"], rejects=(*dropped.rejects, *tried), tried=1)
        except MediaError as error:
            return Outcome.drop(row, STAGE, error.reason, detail=str(error))
        except FileNotFoundError as error:
            return Outcome.drop(row, STAGE, "missing", detail=str(error))
        except PermissionError as error:
            return Outcome.drop(row, STAGE, "unreadable", detail=str(error))
        if "refused" in facts:
            reject = Reject(row["id"], STAGE, facts["refused"], facts["score"], facts["detail"])
            return Outcome(row["id"], rejects=(reject,), tried=made, made=made)
        frames, clips = self._keep(facts, data)
        quality = {
            "video": facts["video"],
            "sha256": row["video"].get("sha256", sha256) if "span" in row["meta"] else sha256,
            "dynamics": facts["dynamics"],
            "shots": facts["shots"],
            "hash": facts["hash"],
            "text": measure_text(row["caption"], self._options.languages).to_dict(),
            "similarity": None,
        }
        return Outcome(row["id"], ({**row, "quality": quality, "frames": frames, "clips": clips},), (), made, made)

    def _facts(self, row: Row, clip: Video) -> tuple[Row, Video, dict[str, Any], bytes, int]:
        """The row with the video that is used, its facts and bytes, and the number of repairs.

        Raises:
            MediaError: the file cannot be used.
            _NotRepaired: it is damaged, and could not be mended.
        """
        try:
            return *self._examined(row, clip), 0
        except MediaError as error:
            if self._options.repair == "none" or error.reason not in REPAIRABLE:
                raise
            return *self._repaired(row, clip, error), 1

    def _repaired(self, row: Row, clip: Video, fault: MediaError) -> tuple[Row, Video, dict[str, Any], bytes]:
        why = "nothing-left"
        for how in ("remux", "reencode") if self._options.repair == "reencode" else ("remux",):
            try:
                about, data = self._call("repair", clip, {"how": how})
                if not data:
                    continue
                if about["kept"] < self._options.min_kept:
                    why = "too-little-left"
                    continue
                locator = self._media.put(data, about["suffix"])
                mended = self._media.video(locator)
                said = {"repaired": how, "fault": fault.reason, "kept": about["kept"], "original": row["video"]}
                return self._examined({**row, "video": locator, "meta": {**row["meta"], **said}}, mended)
            except MediaError as error:
                why = f"still-{error.reason}"
        raise _NotRepaired(fault, why)

    def _examined(self, row: Row, clip: Video) -> tuple[Row, Video, dict[str, Any], bytes]:
        if row["start_s"] is not None or row["end_s"] is not None:
            span = [row["start_s"], row["end_s"]]
            about, data = self._call("span", clip, {"start_s": span[0], "end_s": span[1]})
            if not data:
                seconds = about["duration_s"]
                said = {"refused": "span", "score": seconds, "detail": f"{span[0]} to {span[1]} of {seconds:g} s"}
                return row, clip, said, b""
            locator = self._media.put(data, CLIP_SUFFIX)
            meta = {"span": span, "original": row["video"], **row["meta"]}
            row = {**row, "video": locator, "start_s": None, "end_s": None, "meta": meta}
            clip = self._media.video(locator)
        options = self._options
        arguments = {
            "sampling": str(options.sampling),
            "limits": options.limits,
            "level": options.still_level,
            "cutting": asdict(options.cutting),
        }
        try:
            facts, data = self._call("examine", clip, arguments | {"backend": "auto"})
        except MediaError as error:
            if error.reason not in LOST:
                raise
            facts, data = self._call("examine", clip, arguments | {"backend": "pyav"})
        return row, clip, facts, data

    def _call(self, function: str, clip: Video, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        source = clip.source
        assert isinstance(source, Source)
        return call_guarded(
            f"{FOOTAGE}:{function}", source, arguments, timeout_s=self._options.timeout_s, name=clip.name
        )

    def _keep(self, facts: dict[str, Any], data: bytes) -> tuple[list[Row], list[Row]]:
        """Locators of the frames and the clips whose bytes follow each other."""
        kept: dict[str, list[Row]] = {"frames": [], "clips": []}
        at = 0
        for kind, suffix in (("frames", ".jpg"), ("clips", CLIP_SUFFIX)):
            for about in facts[kind]:
                size = about.pop("bytes")
                kept[kind].append({**self._media.put(data[at : at + size], suffix), **about})
                at += size
        return kept["frames"], kept["clips"]

    def _with_similarity(self, looked: list[Outcome]) -> list[Outcome]:
        """The outcomes with the cosine of caption and video in their rows; a caption that is empty has none.

        In another batch the last bits of a vector differ, so the value is rounded.
        """
        wanted = [place for place, outcome in enumerate(looked) if outcome.rows and outcome.rows[0]["caption"].strip()]
        instruction = mixture()["uvrd_t2v"].instruction
        rows = [looked[place].rows[0] for place in wanted]
        items = [Item((Text(row["caption"]),), instruction) for row in rows]
        items += [Item((self._media.video(row["video"]),)) for row in rows]
        if not items:
            return looked
        encoded = self._context.encoder().encode(items)
        texts, videos = np.split(encoded.vectors.astype(np.float64), 2)
        for number, (place, value) in enumerate(zip(wanted, (texts * videos).sum(1).tolist(), strict=True)):
            outcome, row = looked[place], rows[number]
            if math.isfinite(value):
                row["quality"]["similarity"] = round(value, SIMILARITY_DIGITS)
                continue
            failures = encoded.failures
            detail = failures.get(number) or failures.get(number + len(rows)) or "its vector is not finite"
            rejects = (Reject(row["id"], STAGE, "not-embedded", detail=detail), *outcome.rejects)
            looked[place] = Outcome(row["id"], (), rejects, outcome.tried, outcome.made)
        return looked


class _NotRepaired(Exception):
    """A damaged file that could not be mended: its fault, and why not."""

    def __init__(self, error: MediaError, reason: str) -> None:
        super().__init__(reason)
        self.error, self.reason = error, reason
        self.detail = f"{error.reason}: {error}"
