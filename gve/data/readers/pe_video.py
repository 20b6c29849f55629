"""PE-Video: webdataset tars of clips with human captions."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from gve.data.readers.rows import Dropped, FolderReader, ReaderOptions, Row, RowError, fields
from gve.data.schema import ShardError
from gve.items import Item, Pair, Text, Video


class PEVideo(FolderReader):
    """PE-Video: `train/*.tar` with members `<id>.mp4` and `<id>.json`; the target's text is `human_caption`.

    Clips without a human caption are dropped. `test/` is refused: its keywords are the benchmark PEV-K. `extended/` is
    not read, since it has no human captions.
    """

    tasks = ("T2V",)

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        folder = options.folder
        if "test" in (folder.name, folder.parent.name if folder.is_file() else ""):
            raise ShardError(f"{folder} is the test split, which the benchmark PEV-K is made of: give train")
        self._files = self.files("train/*.tar", "*.tar")

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        number = 0
        for path in self._files:
            try:
                for key, members in self._samples(path, media):
                    number += 1
                    yield number, self._row(path, key, members)
            except (tarfile.TarError, EOFError, OSError) as error:
                number += 1
                yield number, RowError(f"{path}: cannot be read on after {number - 1} rows: {error}", "tar")

    def _samples(self, path: Path, media: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, extension -> bytes) of the samples of a tar; members of a sample stand together."""
        key, members = "", dict[str, bytes]()
        with tarfile.open(path, "r:") as tar:  # uncompressed: a clip that is not wanted is skipped by seeking
            for member in tar:
                if not member.isfile():
                    continue
                name, _, extension = Path(member.name).name.partition(".")
                if name != key and members:
                    yield key, members
                    members = {}
                key = name
                stream = tar.extractfile(member) if media or extension == "json" else None
                members[extension] = stream.read() if stream else b""
        if members:
            yield key, members

    def _row(self, path: Path, key: str, members: dict[str, bytes]) -> Row:
        try:
            absent = {"json", "mp4"} - set(members)
            if absent:
                raise RowError(f"{path.name}: sample {key} lacks {', '.join(sorted(absent))}", "member")
            try:
                record = json.loads(members["json"])
            except ValueError as error:
                raise RowError(f"{path.name}: {key}.json: {error}", "row") from error
            (video,) = fields(record, "video_id")
            # Either may be padded with zeros.
            if str(video).lstrip("0") != key.lstrip("0"):
                raise RowError(f"{path.name}: sample {key} says that its video_id is {video}", "id")
            caption = record.get("human_caption")
            if not isinstance(caption, str) or not caption.strip():
                return Dropped("no-human-caption")
            clip = Video(members["mp4"], name=f"{path.name}/{key}.mp4")
            return Pair(
                Item((Text(caption.strip()),)), Item((clip,)), key=key, source=self.options.source, task=self.task
            )
        except RowError as error:
            return error
