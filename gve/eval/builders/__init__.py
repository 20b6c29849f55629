"""Builders: the original files of a source in, a set in UVRB's released layout out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gve.eval.builders import captions, i2v, labels, lovr, momentseeker, pevideo
from gve.eval.builders.files import MediaFolder, SourceFiles
from gve.eval.builders.layout import (
    Draft,
    Options,
    Prepared,
    Progress,
    Request,
    check_writable,
    link_media,
    silent,
    write_set,
)
from gve.eval.classification import CLASSIFICATION
from gve.eval.uvrb import find_record
from gve.items import InputError

__all__ = ["BUILDERS", "Options", "Prepared", "prepare"]

_DEFAULTS = Options()
BUILDERS: dict[str, Callable[[Request], Draft]] = {
    "MSRVTT": captions.msrvtt,
    "DiDeMo": captions.didemo,
    "CRB-G": captions.carebench,
    "CRB-S": captions.carebench,
    "CRB-T": captions.carebench,
    "VDC-O": captions.vdc,
    "VDC-D": captions.vdc,
    "CMRB": captions.camerabench,
    "DREAM-E": captions.dream1k,
    "LoVR-TH": lovr.lovr_th,
    "LoVR-V": lovr.lovr_v,
    "LoVR-C2V": lovr.lovr_c2v,
    "PEV-K": pevideo.pev_k,
    "MS-TI": momentseeker.momentseeker,
    "MS-TV": momentseeker.momentseeker,
    "MSRVTT-I2V": i2v.msrvtt_i2v,
    **{record.name: labels.classification for record in CLASSIFICATION},
}


def prepare(
    name: str,
    root: str | Path,
    source: str | Path,
    *,
    media: str | Path | None = None,
    options: Options = _DEFAULTS,
    progress: Progress = silent,
) -> Prepared:
    """Builds one set below `root` from the original files of its source. Deterministic: same files, same listings.

    Clips are linked, not copied; what must be made (joined videos, cut frames, members of a tar) is made once, and
    interrupted work goes on where it stopped.

    Args:
        name: of a set, in any spelling.
        root: folder of the sets; made where it is not there.
        source: folder with the annotation files, or the file.
        media: folder with the clips, at any depth; `source` when None.
        options: choices that the source leaves open.
        progress: called on long work.

    Raises:
        InputError: unknown set, missing or contradictory files, or a place that holds another's work.
        OSError: something cannot be written.
    """
    record = find_record(name)
    root = Path(root)
    check_writable(record, root, options.replace)
    files = SourceFiles(source)
    clips = Path(media) if media is not None else files.folder
    if not clips.is_dir():
        raise InputError(f"--media {clips}: no such folder")
    folder = MediaFolder(clips, record.source.name)
    request = Request(record, root, files, folder, media is not None, options, progress)
    build = BUILDERS[record.name]
    draft = build(request)
    link_media(request)
    return write_set(request, draft, build.__name__)
