"""The indexed files: found anew at each question, handed out by an id that is no path, and only while unchanged."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from io import BufferedReader

import numpy as np
import PIL.Image

from gve.search.files import VideoFile
from gve.search.index import Hit, Index
from gve.video import Sampling, decode_guarded, encode_jpeg

POSTER_PX = 480
_KEPT = 256  # posters and checked files that are remembered


class Unknown(LookupError):
    """No indexed file has this id."""


class Gone(LookupError):
    """The file is not what was indexed any more."""


class Remade(RuntimeError):
    """The index was made again by another model while the server ran."""


class Library:
    """An index as it is now. Thread-safe: what `gve index` commits is found by the next question.

    Args:
        uri: of the index.
        fingerprint: of the encoder that asks.
    """

    def __init__(self, uri: str, fingerprint: str) -> None:
        self.uri, self.fingerprint = uri, fingerprint
        self._lock = threading.Lock()
        self._posters: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._checked: OrderedDict[tuple[bytes, int, int, int], str] = OrderedDict()

    def index(self) -> Index:
        """The newest state; opening costs some milliseconds.

        Raises:
            Remade: it is of another model now.
            InputError: it is gone.
        """
        index = Index.open(self.uri)
        if index.record.fingerprint != self.fingerprint:
            raise Remade("the index was made again by another model: start gve serve again")
        return index

    def search(self, vector: np.ndarray, k: int, where: str) -> list[Hit]:
        """As `Index.search`, exactly."""
        return self.index().search(vector, k, where=where)

    def file(self, file_id: str) -> VideoFile:
        """The indexed file of an id.

        Raises:
            Unknown: there is none.
        """
        file = self.index().file(file_id)
        if file is None:
            raise Unknown("no indexed file has this id")
        return file

    def open(self, file_id: str) -> tuple[VideoFile, BufferedReader]:
        """The file and its bytes, from a handle that stays on them whatever becomes of the name.

        Raises:
            Unknown: the id is of no indexed file.
            Gone: the file has vanished or changed.
        """
        file = self.file(file_id)
        try:
            # A name that is a pipe by now must not hold the server up.
            descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Gone("the file has vanished since it was indexed") from None
        handle = os.fdopen(descriptor, "rb")
        if not self._unchanged(file, handle):
            handle.close()
            raise Gone("the file has changed since it was indexed: run gve index again")
        return file, handle

    def _unchanged(self, file: VideoFile, handle: BufferedReader) -> bool:
        """By size and time; by content where the time is not known or is another."""
        status = os.fstat(handle.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size_bytes:
            return False
        if file.mtime_ns and status.st_mtime_ns == file.mtime_ns:
            return True
        key = (file.path, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        with self._lock:
            known = self._checked.get(key)
        if known is None:
            known = hashlib.file_digest(handle, "sha256").hexdigest()
            handle.seek(0)
            with self._lock:
                self._checked[key] = known
                while len(self._checked) > _KEPT:
                    self._checked.popitem(last=False)
        return known == file.sha256

    def poster(self, file_id: str, start_s: float) -> bytes:
        """JPEG of the frame at a time, for browsers that cannot play the file.

        Args:
            start_s: in seconds after the first frame.

        Raises:
            Unknown, Gone: as `open`.
            MediaError: the frame cannot be read.
        """
        file, handle = self.open(file_id)
        handle.close()
        key = (file_id, file.sha256, round(start_s * 10))
        with self._lock:
            if key in self._posters:
                self._posters.move_to_end(key)
                return self._posters[key]
        start_s = min(start_s, max(0.0, file.duration_s - 1.0))
        clip = decode_guarded(
            os.fsdecode(file.path),
            Sampling.uniform(2),
            timeout_s=20.0,
            name=file.name,
            span_s=(start_s, start_s + 1.0),
        )
        picture = PIL.Image.fromarray(clip.pixels[0])
        picture.thumbnail((POSTER_PX, POSTER_PX))
        jpeg = encode_jpeg(np.asarray(picture), 80)
        with self._lock:
            self._posters[key] = jpeg
            while len(self._posters) > _KEPT:
                self._posters.popitem(last=False)
        return jpeg


def content_type(head: bytes) -> str:
    """The type of a video file by its first bytes; never one that a browser would run."""
    if head[4:8] == b"ftyp":
        return "video/mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "video/webm"
    return "video/ogg" if head[:4] == b"OggS" else "application/octet-stream"
