"""Where media lie: locators, and the pictures and clips that a run cuts itself.

A locator is a small JSON object that any worker can open::

    {"file": "/data/a.mp4"}                                                       a file of the input
    {"tar": "/data/x.tar", "offset": 1536, "size": 90210, "name": "x.tar/a.mp4"}  a member of a plain tar
    {"made": "3f/3f9a....jpg"}                                                    below `media/` of the run folder

with `sha256` of the bytes where it is known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gve.items import Image, Item, Part, Text, Video
from gve.synth.leases import replace_file
from gve.synth.records import WeakPair
from gve.synth.units import Row
from gve.video import MediaError


class MediaStore:
    """Media that a run makes, named by their content: writing the same bytes twice, or twice at once, is harmless.

    Args:
        root: folder of the run; files lie in `media/` below it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._folder = self.root / "media"

    def put(self, data: bytes, suffix: str) -> dict[str, Any]:
        """Keeps the bytes of a picture or a clip.

        Args:
            suffix: of its name, for example ".jpg".

        Returns:
            Its locator.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest[:2]}/{digest}{suffix}"
        path = self._folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data, durable=True)
        return {"made": name, "sha256": digest}

    def video(self, locator: Mapping[str, Any]) -> Video:
        """The clip of a locator, unopened where it is a file of its own."""
        return Video(self._source(locator), locator.get("sha256", ""), self._name(locator))

    def image(self, locator: Mapping[str, Any]) -> Image:
        """The picture of a locator, unopened where it is a file of its own."""
        return Image(self._source(locator), locator.get("sha256", ""), self._name(locator))

    def item(self, parts: Sequence[Mapping[str, Any]], instruction: str = "") -> Item:
        """The item of a list like [{"text": ...}, {"image": <locator>}, {"video": <locator>}]."""
        return Item(tuple(self._part(part) for part in parts), instruction)

    def weak_pair(self, row: Row) -> WeakPair:
        """The weak pair of a row of the steps from input to enrich."""
        return WeakPair(
            row["id"],
            self.video(row["video"]),
            row["caption"],
            row["source"],
            row["start_s"],
            row["end_s"],
            row["meta"],
        )

    def _part(self, part: Mapping[str, Any]) -> Part:
        if "text" in part:
            return Text(part["text"])
        return self.image(part["image"]) if "image" in part else self.video(part["video"])

    def _source(self, locator: Mapping[str, Any]) -> Path | bytes:
        """A path, or the bytes of a tar's member.

        Raises:
            MediaError: the tar cannot be read, or is shorter than it was when it was listed.
        """
        if "file" in locator:
            return Path(locator["file"])
        if "made" in locator:
            return self._folder / locator["made"]
        try:
            with open(locator["tar"], "rb") as tar:
                data = os.pread(tar.fileno(), locator["size"], locator["offset"])
        except OSError as error:
            raise MediaError(
                f"{locator['tar']}: {error.strerror} (unreadable)", reason="unreadable", name=self._name(locator)
            ) from error
        if len(data) != locator["size"]:
            raise MediaError(
                f"{self._name(locator)}: the tar ends inside of it (truncated)",
                reason="truncated",
                name=self._name(locator),
            )
        return data

    @staticmethod
    def _name(locator: Mapping[str, Any]) -> str:
        return str(locator.get("name") or locator.get("file") or locator.get("made"))
