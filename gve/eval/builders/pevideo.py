"""PE-Video test: keywords of each video (PEV-K), from the tar files as released or from loose files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from gve.eval.builders.files import stem, texts
from gve.eval.builders.layout import Draft, Request, text_set
from gve.items import InputError

KEYWORDS = ("keywords", "keyword", "tags")
"""Names under which the keywords are looked for; the published key was never seen by this project."""


def pev_k(request: Request) -> Draft:
    """Keywords joined by `joiner`; videos without keywords, and equal ones of several videos, stay in the corpus.

    Raises:
        InputError: there is neither a tar file nor a json file of a video, or a video's id contradicts its name.
    """
    tars = [request.files.folder / name for name in request.files.names if name.endswith(".tar")]
    described = dict(_from_tars(request, tars) if tars else _from_files(request))
    if not described:
        raise InputError(f"{request.files.folder} holds no tar of PE-Video; get {request.record.source.obtain}")
    clips = [(f"{key}.mp4", _keywords(key, facts, request.options.joiner)) for key, facts in sorted(described.items())]
    draft = text_set(request, clips)
    draft.decisions["joiner"] = request.options.joiner
    draft.deviations.append(f"keywords are joined by {request.options.joiner!r}; the paper's joiner is not known")
    return draft


def _keywords(key: str, facts: dict[str, Any], joiner: str) -> list[str]:
    known = facts.get("video_id")
    if known is not None and str(known).lstrip("0") != key.lstrip("0"):
        raise InputError(f"PE-Video: the json of {key} says video_id {known}")
    value = next((facts[name] for name in KEYWORDS if facts.get(name)), None)
    joined = joiner.join(texts(value))
    return [joined] if joined else []


def _from_files(request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [name for name in request.files.names if name.endswith(".json")]
    for done, name in enumerate(names, 1):
        yield stem(name.rpartition("/")[2]), request.files.document(request.files.folder / name)
        request.progress("json files", done, len(names))


class _Hashed(io.RawIOBase):
    """A file that is read once from its start, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.digest.update(content)
        self.bytes += len(content)
        return len(content)


def _from_tars(request: Request, tars: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the json members; takes the videos out unless the user names a folder that has them.

    A video inside a tar cannot be linked. Those that are out already, in full size, are left as they are.
    """
    folder = request.root / "media" / request.media.link
    if not request.has_media:
        if folder.is_symlink():
            raise InputError(f"{folder} is a link to {folder.resolve()}: pass that as --media, or remove the link")
        folder.mkdir(parents=True, exist_ok=True)
        request.media.folder = folder
    for done, path in enumerate(tars, 1):
        with open(path, "rb") as file:
            hashed = _Hashed(file)
            stream = io.BufferedReader(hashed, 1 << 20)
            try:
                with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
                    for member in tar:
                        name = member.name.rpartition("/")[2]
                        content = tar.extractfile(member) if member.isfile() else None
                        if content is None or name.startswith("."):
                            continue
                        if name.endswith(".json"):
                            yield stem(name), json.load(content)
                        elif name.endswith(".mp4") and not request.has_media:
                            _take_out(content, member.size, folder / name)
            except (tarfile.TarError, ValueError) as error:
                raise InputError(f"{path} is damaged: {error}; download it again") from None
            while stream.read(1 << 20):
                pass
        name = path.relative_to(request.files.folder).as_posix()
        request.files.used[name] = {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}
        request.progress("tar files", done, len(tars))


def _take_out(content: IO[bytes], size: int, target: Path) -> None:
    if target.is_file() and target.stat().st_size == size:
        return
    draft = target.with_name(f"{target.name}.tmp")
    with open(draft, "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    os.replace(draft, target)
