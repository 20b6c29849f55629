"""Video files as they lie in folders: found, looked into, named so that no name can harm a terminal or a page.

A path is bytes here, as the system has it: names need be no text, and what looks alike may differ.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gve.items import InputError
from gve.video import MediaError, VideoInfo, probe
from gve.video.guard import call_guarded
from gve.video.source import Source

_SETTLED_NS = 2_000_000_000  # a younger file may change again within the resolution of its clock


def printable(path: bytes) -> str:
    """A path on one line: what is no printable character of UTF-8 stands as a backslash and its code."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def file_id_of(path: bytes) -> str:
    """32 hex digits that name an absolute path in the index."""
    return hashlib.sha256(path).hexdigest()[:32]


@dataclass(frozen=True)
class VideoFile:
    """A video file as it was when it was indexed.

    Args:
        path: absolute.
        size_bytes: of the file.
        mtime_ns: time of its last change; 0 where it was too young to trust that time.
        sha256: hex SHA-256 of its bytes.
        duration_s: from the first frame to the end of the last one.
        width, height: of the upright frames, in pixels.
        fps: average frame rate, in Hz.
        codec: FFmpeg's name of it.
    """

    path: bytes
    size_bytes: int
    mtime_ns: int
    sha256: str
    duration_s: float
    width: int
    height: int
    fps: float
    codec: str

    @property
    def file_id(self) -> str:
        return file_id_of(self.path)

    @property
    def name(self) -> str:
        return printable(self.path)


@dataclass(frozen=True)
class Found:
    """A file of a folder, unopened.

    Args:
        path: absolute.
        size_bytes: its size.
        mtime_ns: time of its last change.
    """

    path: bytes
    size_bytes: int
    mtime_ns: int

    @property
    def file_id(self) -> str:
        return file_id_of(self.path)

    @property
    def name(self) -> str:
        return printable(self.path)

    def settled_ns(self, now_ns: int) -> int:
        """The time of change that may be remembered; 0 where the file is too young."""
        return self.mtime_ns if self.mtime_ns < now_ns - _SETTLED_NS else 0

    def unchanged(self) -> bool:
        """Whether the file is still what was found."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size_bytes, self.mtime_ns)


@dataclass
class Walk:
    """What folders hold.

    Args:
        roots: the folders and files that were asked for, absolute.
        found: regular files, links to them too, by path.
        unreadable: path -> why it could not be looked at.
        blind: folders whose content is unknown: nothing below them counts as vanished.
        hidden: files and folders left out because their names begin with a dot.
    """

    roots: list[bytes] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    unreadable: dict[bytes, str] = field(default_factory=dict)
    blind: list[bytes] = field(default_factory=list)
    hidden: int = 0

    def covers(self, path: bytes) -> bool:
        """Whether a file of this path would have been found."""
        inside = any(_below(path, root) for root in self.roots)
        return inside and not any(_below(path, folder) for folder in self.blind)


def _below(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def walk(roots: Sequence[str | Path], leave_out: Sequence[str | Path] = ()) -> Walk:
    """Finds all regular files below the roots; links to folders are not followed.

    Args:
        roots: folders, or single files.
        leave_out: folders that are not entered, such as the index itself.

    Raises:
        InputError: a root does not exist or cannot be read. An unmounted disk must not look like an empty one.
    """
    result = Walk()
    apart = {os.path.abspath(os.fsencode(folder)) for folder in leave_out}
    for root in dict.fromkeys(os.path.abspath(os.fsencode(root)) for root in roots):
        if not os.path.exists(root):
            raise InputError(f"{printable(root)} does not exist: give a folder of videos or a file")
        if not os.access(root, os.R_OK | (os.X_OK if os.path.isdir(root) else 0)):
            raise InputError(f"{printable(root)} cannot be read: no permission")
        result.roots.append(root)
    seen: set[bytes] = set()
    for root in result.roots:
        for path in _files(root, apart, result) if os.path.isdir(root) else (root,):
            if path in seen:
                continue
            seen.add(path)
            try:
                status = os.stat(path)
            except OSError as error:
                result.unreadable[path] = error.strerror or str(error)
                continue
            if stat.S_ISREG(status.st_mode):
                result.found.append(Found(path, status.st_size, status.st_mtime_ns))
            else:
                result.unreadable[path] = "no regular file"
    result.found.sort(key=lambda found: found.path)
    return result


def _files(root: bytes, apart: set[bytes], result: Walk) -> Iterator[bytes]:
    def failed(error: OSError) -> None:
        folder = os.fsencode(error.filename)
        result.unreadable[folder] = error.strerror or str(error)
        result.blind.append(folder)

    for folder, folders, names in os.walk(root, onerror=failed):
        hidden = [name for name in (*folders, *names) if name.startswith(b".")]
        result.hidden += len(hidden)
        folders[:] = sorted(
            name for name in folders if not name.startswith(b".") and os.path.join(folder, name) not in apart
        )
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith(b"."))


def probe_plain(source: Source, name: str) -> tuple[dict[str, Any], bytes]:
    """`gve.video.probe` as `call_guarded` calls it, in the child."""
    return asdict(probe(source, name)), b""


def look_into(path: bytes, *, timeout_s: float = 300.0) -> VideoInfo:
    """What a file of unknown origin holds, asked in a child process that can be killed.

    Args:
        timeout_s: the longest it may take, in seconds; all packets are read, so a film takes as long as its disk.

    Raises:
        MediaError: it is no video that can be used; `reason` says why.
    """
    function = f"{probe_plain.__module__}:{probe_plain.__name__}"
    answer, _ = call_guarded(function, os.fsdecode(path), {}, timeout_s=timeout_s, name=printable(path))
    return VideoInfo(**answer)


def sha256_of(path: bytes) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        name = printable(path)
        raise MediaError(f"{name}: {error.strerror} (unreadable)", reason="unreadable", name=name) from error
