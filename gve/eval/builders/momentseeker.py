"""MomentSeeker: text and an image (MS-TI) or a clip (MS-TV) ask for a moment among ten candidates.

Read are the rows of MMEB-V2 (VLM2Vec/MomentSeeker, VLM2Vec/MomentSeeker_1k8: query, input_frames, positive_frames,
negative_frames) and of the first release (qry_text, qry_img_path, qry_video_path, candidate_video_list, gt_indices).
The present release (ti2v.json, tv2v.json) has no candidates, so P@1 cannot be built from it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gve.eval.builders.files import Row, pick, stem
from gve.eval.builders.layout import Draft, Request, corpus_rows
from gve.items import InputError

_SUSPECT = "movie101_77"  # a query clip that VLM2Vec's loader marks as damaged


def momentseeker(request: Request) -> Draft:
    """Queries of the set's form with their own candidates. Repeated queries are kept: their candidates differ.

    Raises:
        InputError: no row has candidates, or a row contradicts itself.
    """
    kind = request.record.query[1]
    found = request.files.need(
        "*momentseeker*.json*", "*momentseeker*.parquet", "test-*.parquet", "test.json*", "ti2v.json", "tv2v.json",
        obtain=request.record.source.obtain,
    )  # fmt: skip
    draft = Draft([], [], [])
    clips: dict[str, None] = {}
    clashes: list[str] = []
    for number, row in enumerate(request.files.rows(found)):
        text, media, positives, negatives = _read(row, f"{found[0]}: row {number}")
        if _kind(media) != kind:
            continue
        if not text:
            raise InputError(f"{found[0]}: row {number} has no text")
        query = f"{request.record.name.lower()}-{number:05d}"  # by place: texts repeat
        if both := [name for name in negatives if name in positives]:
            clashes.append(f"{query}: {both[0]}")
        pool = list(dict.fromkeys([*positives, *negatives]))
        clips.update(dict.fromkeys(pool))
        draft.queries.append(
            {"id": query, "text": text, "image" if kind == "I" else "video": _listed(request, media, kind)}
        )
        own = list(dict.fromkeys(positives))
        draft.instances.append({"qid": query, "pos": [*map(stem, own)], "candidates": [*map(stem, pool)]})
    if not draft.queries:
        raise InputError(f"{found[0]} has no query of text and {'an image' if kind == 'I' else 'a clip'}")
    draft.corpus = corpus_rows(request, clips, unique=False)
    sizes = sorted({len(row["candidates"]) for row in draft.instances})
    draft.decisions["pool"] = f"the row's positives and negatives: {' or '.join(map(str, sizes))} candidates a query"
    if sizes != [request.record.num_corpus]:
        odd = sum(len(row["candidates"]) != request.record.num_corpus for row in draft.instances)
        draft.deviations.append(f"{odd} queries have another number of candidates than {request.record.num_corpus}")
    if clashes:
        draft.decisions["negatives_that_are_positives_too"] = clashes
    if suspects := [row["id"] for row in draft.queries if _SUSPECT in str(row.get("video"))]:
        draft.decisions["query_clip_that_VLM2Vec_calls_damaged"] = suspects
    return draft


def _kind(name: str) -> str:
    if not name:
        return ""
    return "V" if name.lower().endswith((".mp4", ".mkv", ".webm", ".avi")) else "I"


def _read(row: Row, where: str) -> tuple[str, str, list[str], list[str]]:
    """(text, image or clip of the query, positives, negatives) in either form."""
    if "positive_frames" in row:
        media = str(row.get("input_frames") or "")
        return (
            str(row.get("query") or "").strip(),
            media,
            _paths(row["positive_frames"]),
            _paths(row["negative_frames"]),
        )
    if "candidate_video_list" in row:
        candidates, right = _paths(row["candidate_video_list"]), [*map(int, pick(row, "gt_indices"))]
        if not all(0 <= index < len(candidates) for index in right):
            raise InputError(f"{where}: gt_indices {right} of {len(candidates)} candidates")
        media = str(row.get("qry_img_path") or row.get("qry_video_path") or "")
        negatives = [name for index, name in enumerate(candidates) if index not in right]
        return str(row.get("qry_text") or "").strip(), media, [candidates[index] for index in right], negatives
    if "answering_time_interval" in row:
        raise InputError(
            f"{where}: this release of MomentSeeker names time intervals and no candidates, so P@1 over ten cannot be "
            "built from it; take VLM2Vec/MomentSeeker_1k8"
        )
    raise InputError(f"{where} is of no known form; its fields are {', '.join(map(str, row))[:200]}")


def _paths(frames: Sequence[Any] | None) -> list[str]:
    """Clips of a list of paths or of objects that have one."""
    named = [
        pick(frame, "output_path", "frame_path", "video_path") if isinstance(frame, dict) else frame
        for frame in frames or ()
    ]
    return [os.path.normpath(str(name)) for name in named]


def _listed(request: Request, media: str, kind: str) -> str:
    """The query's own file. MMEB-V2 keeps images as `query_images/x.jpg` for a value of `images/x.jpg`."""
    options = (media, f"query_{media}") if kind == "I" else (media,)
    name = next((name for name in options if request.media.find(name, unique=False)), options[-1])
    return request.media.listed(name, unique=False)
