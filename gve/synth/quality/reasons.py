"""Why stage 1 drops a row: every code, the step that gives it, and what its score is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

STAGE = "quality"
"""Stage of all these rejects."""


@dataclass(frozen=True)
class Reason:
    """One code.

    Args:
        step: "scan" for what cannot be used at all, "select" for what a rule turns away.
        kind: what the rule looks at: the file, the caption, the pictures, both, or the run.
        about: one line.
        score: what the score of the reject measures, with its unit; empty where there is none.
    """

    step: Literal["scan", "select"]
    kind: Literal["file", "caption", "pictures", "pair", "run"]
    about: str
    score: str = ""


REASONS: Mapping[str, Reason] = {
    # From gve.video, before and while a file is decoded.
    "missing": Reason("scan", "file", "there is no such file"),
    "unreadable": Reason("scan", "file", "the file may not be read, or its tar is damaged"),
    "empty": Reason("scan", "file", "the file has no bytes"),
    "not-a-video": Reason("scan", "file", "no video format that can be read: other content, or no index (moov)"),
    "no-video-stream": Reason("scan", "file", "sound only"),
    "no-decoder": Reason("scan", "file", "there is no decoder for its codec"),
    "undecodable": Reason("scan", "file", "frames do not decode"),
    "truncated": Reason("scan", "file", "frames that its header promises are not there"),
    "garbled": Reason("scan", "file", "frames are damaged"),
    "timeout": Reason("scan", "file", "decoding hung, or took longer than allowed"),
    "crashed": Reason("scan", "file", "the decoder died"),
    "out-of-memory": Reason("scan", "file", "decoding needs too much memory"),
    "too-large": Reason("scan", "file", "its frames have too many pixels"),
    # Limits of the options.
    "too-small": Reason("scan", "file", "its shorter side is under min_side_px", "shorter side in px"),
    "too-few-frames": Reason("scan", "file", "it has under min_frames frames", "frames"),
    "too-short": Reason("scan", "file", "it lasts under min_duration_s", "length in s"),
    "too-long": Reason("scan", "file", "it lasts over max_duration_s", "length in s"),
    "codec": Reason("scan", "file", "its codec is not one of codecs"),
    "span": Reason("scan", "file", "the span that is meant lies outside of the file", "length of the file in s"),
    "not-embedded": Reason("scan", "pair", "the encoder could not read the clip or the caption"),
    # Rules, in the order in which they are asked: a row is dropped by the first that turns it away.
    "caption-missing": Reason("select", "caption", "there is no caption"),
    "caption-url": Reason("select", "caption", "an address of a page or of a mailbox", "addresses"),
    "caption-file-name": Reason("select", "caption", "a name of a file, or of a camera's making", "names"),
    "caption-advertisement": Reason("select", "caption", "phrases that sell or call to subscribe", "weight of phrases"),
    "caption-non-descriptive": Reason("select", "caption", "no word that says what is shown", "such words"),
    "caption-language": Reason("select", "caption", "another language than asked for", "certainty, 0 to 1"),
    "caption-too-short": Reason("select", "caption", "under min_words words", "words"),
    "black-video": Reason("select", "pictures", "black for most of the time", "share of sampled frames"),
    "static-video": Reason("select", "pictures", "one picture that stands still", "share of the time"),
    "slide-show": Reason("select", "pictures", "still pictures one after another", "share of the time"),
    "frozen-video": Reason("select", "pictures", "it stands still until its end", "share of the time"),
    "caption-repeated": Reason("select", "run", "the caption stands with over max_repeats videos", "videos"),
    "inconsistent": Reason("select", "pair", "caption and video are too far apart", "cosine similarity"),
    "duplicate": Reason("select", "run", "the same video as an earlier row that is kept"),
    "near-duplicate": Reason("select", "run", "looks like an earlier row that is kept", "differing bits a frame of 64"),
}
"""Code -> what it means, in the order in which reasons are asked for."""

RULES = tuple(code for code, reason in REASONS.items() if reason.step == "select")
"""The codes that `select: {rules: [...]}` switches on; all by default, in this order."""
