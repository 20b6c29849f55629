"""Hashes of media files, remembered: the released benchmark is 490 GB, and its names must not cost a second reading."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gve.encode.ranks import world
from gve.items import Image, InputError, Item, Video

# A file that changes twice within the resolution of its clock shows one time: what is younger is not remembered.
_SETTLED_NS = 2_000_000_000


class FileHashes:
    """SHA-256 of files by path, size and time of change, as make and rsync trust them.

    Each rank keeps a file of its own in the folder and reads those of all.

    Args:
        folder: where they are kept; None remembers nothing.

    Raises:
        InputError: a file of hashes cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, tuple[int, int, str]] = {}
        self._fresh = False
        for path in sorted(folder.glob("file_hashes-*.json")) if folder else []:
            try:
                self._known |= {name: tuple(entry) for name, entry in json.loads(path.read_text()).items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise InputError(f"hashes of files {path} are damaged ({error}); delete them") from None

    def recall(self, item: Item) -> list[Image | Video]:
        """Gives the item's files the hashes that are known, as if they had been read.

        Returns:
            The others, which `keep` takes when they have been hashed.

        Raises:
            OSError: a file is missing.
        """
        unread = []
        for medium in item.media if self.folder else ():
            if isinstance(medium.source, (str, Path)) and not medium.sha256:
                name = os.path.abspath(medium.source)
                if name in self._known and self._known[name][:2] == _stamp(name):
                    object.__setattr__(medium, "sha256", self._known[name][2])  # as content_hash does
                else:
                    unread.append(medium)
        return unread

    def keep(self, media: Sequence[Image | Video]) -> None:
        """Remembers the hashes of files that were just read."""
        for medium in media:
            name = os.path.abspath(str(medium.source))
            size, changed_ns = _stamp(name)
            if changed_ns < time.time_ns() - _SETTLED_NS:
                self._known[name] = (size, changed_ns, medium.sha256)
                self._fresh = True

    def write(self) -> None:
        """Writes this rank's file if there is something new."""
        if self.folder is None or not self._fresh:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"file_hashes-{world()[0]}.json"
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self._known))
        os.replace(draft, path)
        self._fresh = False


def _stamp(name: str) -> tuple[int, int]:
    """(Size in bytes, time of change in ns)."""
    status = os.stat(name)
    return status.st_size, status.st_mtime_ns
