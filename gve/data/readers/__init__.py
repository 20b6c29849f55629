"""Readers: local copies of the published training sets -> pairs whose media are unopened.

Each reader documents the layout that it reads. None holds a whole annotation file in memory, none downloads.
"""

from __future__ import annotations

from gve.data.readers.beir import Beir, MBeir
from gve.data.readers.clips import InternVid, Vast, WebVid
from gve.data.readers.listing import Listing
from gve.data.readers.pe_video import PEVideo
from gve.data.readers.rows import Dropped, FolderReader, Limited, Reader, ReaderOptions, Row, RowError
from gve.data.schema import ShardError

READERS: dict[str, type[FolderReader]] = {
    "beir": Beir,
    "internvid": InternVid,
    "mbeir": MBeir,
    "pe_video": PEVideo,
    "vast": Vast,
    "webvid": WebVid,
}
"""Name -> reader of a published layout; a listing of one's own is read by Listing."""


def open_reader(name: str, options: ReaderOptions) -> FolderReader:
    """The reader of a data set.

    Raises:
        ShardError: there is no such reader, or it does not find its layout.
    """
    if name not in READERS:
        raise ShardError(f"no reader {name!r}: use one of {', '.join(READERS)}, or give a listing")
    return READERS[name](options)


__all__ = [
    "READERS",
    "Dropped",
    "FolderReader",
    "Limited",
    "Listing",
    "Reader",
    "ReaderOptions",
    "Row",
    "RowError",
    "open_reader",
]
