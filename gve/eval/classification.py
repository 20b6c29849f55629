"""Video classification as retrieval: a clip is the query, the corpus is the text of every label, recall@1 is accuracy.

Five sets stand beside UVRB as the paper does it. They never enter an average of UVRB. Neither the subsets of the clips
nor the wording of the labels behind the published numbers is known: counts here are those of the official lists, and
the label text is an option of `gve uvrb prepare`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from gve.eval.records import SetRecord, Source
from gve.items import InputError

LABEL_TEXT = "{name}"
"""The bare name. mteb writes "a video of {name}", VLM2Vec the bare name with underscores."""

_ASK = "Find the label that names what happens in the video."  # the project's own: the paper prints none
_SUBSET = {1000: "the subset of MMEB-V2"}
_MMEB = "; rows of 1,000 clips as in MMEB-V2 (video_id, pos_text) in data set VLM2Vec/"

CLASSIFICATION: tuple[SetRecord, ...] = (
    SetRecord(
        "K700", "", "V", 34824, 700, _ASK, "validation list",
        Source(
            "Kinetics-700",
            "validation csv (label,youtube_id,time_start,time_end,split) and tar files of the CVDF mirror, "
            f"label_map_k700.txt of mmaction2{_MMEB}Kinetics-700",
            "annotations CC-BY-4.0",
        ),
        known_counts=_SUBSET,
        aliases=("Kinetics-700", "Kinetics700"),
    ),
    SetRecord(
        "UCF101", "", "V", 3783, 101, _ASK, "test list 1, or 2 or 3",
        Source("UCF101", f"UCF101TrainTestSplits-RecognitionTask.zip and UCF101.rar of UCF{_MMEB}UCF101", "not stated"),
        known_counts={3734: "test list 2", 3696: "test list 3", **_SUBSET},
    ),
    SetRecord(
        "HMDB51", "", "V", 1530, 51, _ASK, "test part of split 1, or 2 or 3",
        Source("HMDB51", f"test_train_splits.rar and hmdb51_org.rar of Brown University{_MMEB}HMDB51", "CC-BY-4.0"),
        known_counts=_SUBSET,
    ),
    SetRecord(
        "SSV2", "", "V", 24777, 174, _ASK, "validation list",
        Source(
            "SSv2",
            "something-something-v2-{labels,validation}.json and the 20bn archive from Qualcomm's page, after "
            f"registration{_MMEB}SmthSmthV2",
            "research only, no redistribution",
        ),
        known_counts=_SUBSET,
        aliases=("SmthSmthV2", "Something-Something-V2"),
    ),
    SetRecord(
        "Breakfast", "", "V", 433, 10, _ASK, "the clips of camera 1",
        Source("Breakfast", f"BreakfastII_15fps_qvga_sync.tar.gz of Serre Lab{_MMEB}Breakfast", "not stated"),
    ),
)  # fmt: skip  # as the records of UVRB

_NAMES = tuple(record.name for record in CLASSIFICATION)
PUBLISHED_ACCURACY: Mapping[str, Mapping[str, float]] = {
    model: dict(zip(_NAMES, scores, strict=True))
    for model, scores in {
        "GVE-3B": (0.489, 0.661, 0.483, 0.471, 0.277),
        "GVE-7B": (0.540, 0.757, 0.525, 0.521, 0.289),
        "Unite-7B": (0.537, 0.752, 0.534, 0.513, 0.261),
        "InternVideo2-6B": (0.554, 0.572, 0.480, 0.569, 0.453),
        "VLM2Vec-V2": (0.380, 0.600, 0.409, 0.428, 0.148),
        "GME-7B": (0.397, 0.547, 0.479, 0.306, 0.143),
        "UniME-7B": (0.388, 0.377, 0.407, 0.190, 0.166),
        "CLIP4Clip": (0.395, 0.596, 0.413, 0.308, 0.176),
    }.items()
}
"""Model -> set -> zero-shot accuracy, as printed in the paper."""

# What the files of Breakfast call their ten activities -> words. The archive's names are partly German or run together.
BREAKFAST = {
    "cereals": "cereal",
    "coffee": "coffee",
    "friedegg": "fried egg",
    "juice": "juice",
    "milk": "milk",
    "pancake": "pancake",
    "salat": "salad",
    "sandwich": "sandwich",
    "scrambledegg": "scrambled egg",
    "tea": "tea",
}


def label_words(record: SetRecord, label: str) -> str:
    """A label as its list writes it -> plain words: "HandstandPushups" -> "handstand pushups".

    Args:
        record: the set whose lists write it.
        label: for example "brush_hair_test" (HMDB51) or "Putting [something] on a surface" (SSv2).

    Raises:
        InputError: Breakfast has no such activity.
    """
    label = label.strip()
    if record.name == "UCF101":
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label.replace("_", " ")).lower()
    if record.name == "HMDB51":
        return label.removesuffix("_test").replace("_", " ")
    if record.name == "SSV2":
        return label.replace("[", "").replace("]", "").replace("_", " ")
    if record.name == "Breakfast":
        known = {**BREAKFAST, **{words.replace(" ", ""): words for words in BREAKFAST.values()}}
        key = re.sub(r"[ _]", "", label.lower())
        if key not in known:
            raise InputError(f"Breakfast has no activity {label!r}; it has {', '.join(BREAKFAST)}")
        return known[key]
    return label.replace("_", " ")


def macro_accuracy(hits: np.ndarray, positives: Sequence[Sequence[int]]) -> float:
    """Mean over labels of the accuracy on the clips of each: a frequent label counts no more than a rare one.

    Args:
        hits: [Q] float64, score of each clip.
        positives: the label row of each clip.
    """
    rows = np.array([row[0] for row in positives])
    counts = np.bincount(rows)
    return float((np.bincount(rows, hits)[counts > 0] / counts[counts > 0]).mean())
