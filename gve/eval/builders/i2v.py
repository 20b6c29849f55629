"""MSRVTT-I2V: one frame of each test clip asks for the clip."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gve.eval.builders.captions import msrvtt_rows
from gve.eval.builders.files import stem
from gve.eval.builders.layout import Draft, Request, choose, corpus_rows
from gve.items import InputError
from gve.video import MediaError, Sampling, decode_guarded, encode_jpeg, frame_indices

_GRID = Sampling.uniform(32)  # the frames it is drawn from; 8 to 32 of them are decoded anyway
_SEEN = Sampling.uniform(8)  # what the protocol shows of a clip


def msrvtt_i2v(request: Request) -> Draft:
    """Cuts the frames that are not there yet; which frame the paper took is not known.

    Raises:
        InputError: there are no clips.
    """
    names = [clip for _, clip, _ in msrvtt_rows(request)]
    files = {clip: request.media.find(clip) for clip in names}
    if not any(files.values()):
        raise InputError(f"{request.record.name} cuts a frame from every clip: name their folder by --media")
    images = f"images/seed{request.options.seed}"  # frames of another seed are other files
    draft = Draft(
        [{"id": f"{stem(clip)}-frame", "image": f"{images}/{stem(clip)}.jpg"} for clip in names],
        corpus_rows(request, names),
        [{"qid": f"{stem(clip)}-frame", "pos": [stem(clip)]} for clip in names],
    )
    folder = request.folder / images
    folder.mkdir(parents=True, exist_ok=True)

    def cut(clip: str) -> str | None:
        file = files[clip]
        if file is None:
            return "the clip is not on the disk"
        target = folder / f"{stem(clip)}.jpg"
        try:
            if not target.is_file():
                cut_frame(request.media.folder / file, target, request.options.seed)
        except MediaError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(request.options.jobs) as pool:
        for done, (clip, problem) in enumerate(zip(names, pool.map(cut, names), strict=True), 1):
            request.progress("frames", done, len(names))
            if problem:
                draft.failed[f"{images}/{stem(clip)}.jpg"] = problem
    draft.decisions["frame"] = (
        f"drawn by seed {request.options.seed} and the clip's name from the frames of {_GRID} that {_SEEN} does not "
        "take; it stays in the clip; JPEG, quality 95"
    )
    draft.deviations.append(
        f"the query frames were cut by this project with seed {request.options.seed}; which frames the paper took is "
        "not known"
    )
    return draft


def cut_frame(clip: Path, target: Path, seed: int) -> None:
    """Writes one frame of a clip, none that uniform(8) shows unless the clip has no other.

    Raises:
        gve.video.MediaError: the clip cannot be read.
    """
    frames = decode_guarded(clip, _GRID, timeout_s=120.0)
    seen = frame_indices(frames.num_frames, frames.native_fps, _SEEN)
    free = np.flatnonzero(~np.isin(frames.indices, seen))
    if not len(free):
        free = np.arange(len(frames.indices))
    draft = target.with_name(f"{target.name}.tmp")
    draft.write_bytes(encode_jpeg(frames.pixels[free[choose(len(free), "I2V", seed, stem(clip.name))]]))
    os.replace(draft, target)
