"""Video files to frames in this process: one scan, two decoders, the same answer from both."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from gve.items import Frames
from gve.video.sampling import Sampling, frame_indices
from gve.video.source import MAX_PIXELS, Source, called, check_exists, reason_of, reject

Backend = Literal["auto", "decord", "pyav"]

logger = logging.getLogger(__name__)

DECORD_AVAILABLE = importlib.util.find_spec("decord") is not None
"""Whether decord is installed (it has wheels for x86-64 Linux only); without it PyAV decodes everything."""

MAX_CLIP_BYTES = 2 << 30
"""The most bytes of the decoded frames of one clip."""

# Demuxers that may open a file. The list keeps playlists out (hls, concat, image sequences): their text can make FFmpeg
# read other files and addresses.
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,ogg,gif,flv,asf,m4v,h264,hevc,ivf"
_DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})
_DECORD_FORMATS = frozenset({"mov", "matroska"})
_DECORD_MIN_SIDE_PX = 32  # decord 0.6 gives a 96 px wide array for a 1 px wide video
_ESTIMATED_LENGTH = frozenset({"mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc"})  # no length in the header


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    Args:
        codec: FFmpeg's name of the codec, for example "h264".
        width, height: of the upright frames, in pixels.
        num_frames: frames that are shown.
        duration_s: from the first frame to the end of the last one.
        native_fps: average frame rate, in Hz.
        rotation_deg: counter-clockwise turn that was applied to the stored frames: 0, 90, 180 or 270.
        backend: the decoder that `decode` chooses for it, "decord" or "pyav".
    """

    codec: str
    width: int
    height: int
    num_frames: int
    duration_s: float
    native_fps: float
    rotation_deg: int
    backend: str


@dataclass(frozen=True, eq=False)
class _Timeline:
    """When each frame of a stream is shown.

    Args:
        pts: [N] int64, time stamps of the frames in order of showing, in ticks of the stream; not used without `exact`.
        times_s: [N] float64, seconds after the first frame.
        keys: [K] int64, time stamps of the key frames, rising.
        last_s: how long the last frame is shown, in seconds; 0 where the file does not say.
        native_fps: average rate, in Hz.
        exact: every packet of the stream is one frame with a time stamp of its own, so frames can be sought.
        plain: no packet is cut away by an edit list.
    """

    pts: np.ndarray
    times_s: np.ndarray
    keys: np.ndarray
    native_fps: float
    exact: bool
    plain: bool = True
    last_s: float = 0.0

    def __len__(self) -> int:
        return len(self.times_s)


class _NotSought(Exception):
    """Seeking did not land on the frame that the packets promise."""


@contextlib.contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    check_exists(source, name)
    # The absolute path starts with "/", so no name can be read as a protocol ("http:", "concat:").
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    try:
        container = av.open(file, options={"format_whitelist": FORMATS})
    except (av.FFmpegError, ValueError, UnicodeError) as error:
        reject(name, "not-a-video", f"no video format that can be read: {reason_of(error)}")
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            reject(name, "no-video-stream", f"no video in this {container.format.long_name} file")
        stream = streams[0]
        if stream.codec_context is None:
            reject(name, "no-decoder", "this FFmpeg has no decoder for its codec")
        if stream.width * stream.height > MAX_PIXELS:
            reject(name, "too-large", f"{stream.width}x{stream.height} px is more than {MAX_PIXELS} pixels a frame")
        stream.codec_context.thread_count = 1  # loaders run one process a core
        yield container, stream


def _scan(container: InputContainer, stream: VideoStream, name: str) -> _Timeline:
    """Reads all packets, decodes none: a few milliseconds for a clip of seconds, 180 ms for 10,883 frames.

    The header's count is no substitute: it is absent in MKV and WebM, and wrong beside edit lists and dropped frames.
    """
    shown: dict[int, int] = {}  # time stamp: duration
    keys: set[int] = set()
    stored, packets, end_s, plain, stamped = 0, 0, -np.inf, True, True
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            stored += packet.pts is not None
            if not packet.size:  # a dropped frame, or the end
                continue
            if packet.pts is None:
                stamped = False
                continue
            if packet.is_keyframe:
                keys.add(packet.pts)
            if packet.is_discard:
                plain = False
            elif stream.codec_context.name != "vp8" or bytes(packet)[0] & 0x10:  # the rest: VP8 frames never shown
                shown[packet.pts] = packet.duration or 0
                packets += 1
    except av.FFmpegError as error:
        reject(name, "truncated", f"its packets cannot be read to the end: {reason_of(error)}")
    pts, tick_s = np.array(sorted(shown), np.int64), float(stream.time_base or 0)
    exact = stamped and 0 < len(pts) == packets and tick_s > 0
    times_s = (pts - pts[0]) * tick_s if exact else np.zeros(len(pts))
    _check_whole(container, stream, stored, end_s, float(np.diff(times_s).max(initial=0.0)), name)
    last_s = shown[int(pts[-1])] * tick_s if exact else 0.0
    known_keys = np.array(sorted(keys), np.int64)
    return _Timeline(pts, times_s, known_keys, _rate(stream, times_s), exact, plain, last_s)


def _check_whole(
    container: InputContainer, stream: VideoStream, stored: int, end_s: float, longest_s: float, name: str
) -> None:
    """Refuses a file that is shorter than its header says.

    Args:
        stored: packets of the stream. The sample table of an MP4 is exact about them; other headers are not.
        end_s: when the last packet of any stream ends.
        longest_s: the longest that a frame is shown: the last one may last as long without saying so.
    """
    form = container.format.name.split(",")[0]
    if form == "mov" and stored < stream.frames:
        reject(name, "truncated", f"its header lists {stream.frames} frames, {stored} are there")
    if not container.duration or form in _ESTIMATED_LENGTH:
        return
    claimed_s, present_s = container.duration / av.time_base, end_s - (container.start_time or 0) / av.time_base
    if present_s < 0.9 * claimed_s - longest_s - 1.0:
        reject(name, "truncated", f"its header claims {claimed_s:.1f} s, its data end at {present_s:.1f} s")


def _rate(stream: VideoStream, times_s: np.ndarray) -> float:
    """The container's average rate (what decord calls get_avg_fps), or that of the times where it states none."""
    rate = float(stream.average_rate or 0)
    if rate > 0:
        return rate
    return (len(times_s) - 1) / float(times_s[-1]) if len(times_s) > 1 and times_s[-1] > 0 else 1.0


def _frames(container: InputContainer, stream: VideoStream, name: str) -> Iterator[VideoFrame]:
    """Decoded frames from where the container stands.

    FFmpeg goes on after a flipped bit with patched-up frames and flags the first of them only: a flag counts also on a
    frame that nobody asked for, since others are built on it.
    """
    for frame in container.decode(stream):
        if frame.is_corrupt:
            reject(name, "garbled", f"the frame at {frame.time or 0.0:.2f} s is damaged")
        yield frame


def _walk(container: InputContainer, stream: VideoStream, name: str) -> _Timeline:
    """Decodes the whole stream: the slow judge for streams whose packets do not tell where their frames are."""
    shown: list[float] = []
    try:
        for frame in _frames(container, stream, name):
            shown.append(np.nan if frame.time is None else frame.time)
    except av.FFmpegError as error:
        if not shown:
            reject(name, "undecodable", f"no frame decodes: {reason_of(error)}")
        reject(name, "truncated", f"only its first {len(shown)} frames decode: {reason_of(error)}")
    if not shown:
        reject(name, "undecodable", "no frame decodes")
    times_s = np.array(shown)
    known = np.flatnonzero(np.isfinite(times_s))
    rate = _rate(stream, times_s[known] - times_s[known[:1]])
    order = np.arange(len(shown))
    if len(known) > 1 and (np.diff(times_s[known]) > 0).all():
        times_s = np.interp(order, known, times_s[known])
    else:
        times_s = order / rate
    nothing = np.zeros(0, np.int64)
    return _Timeline(nothing, times_s - times_s[0], nothing, rate, exact=False)


def _sought(
    container: InputContainer, stream: VideoStream, line: _Timeline, indices: np.ndarray, name: str
) -> Iterator[VideoFrame]:
    """The frames of rising `indices`, jumping over groups of pictures that hold none of them."""
    frames: Iterator[VideoFrame] = iter(())
    here: int | None = None
    for pts in line.pts[indices]:
        before = line.keys[line.keys <= pts]
        key = int(before[-1] if len(before) else line.pts[0])
        if here is None or key > here:
            container.seek(key, stream=stream)
            frames = _frames(container, stream, name)
        for frame in frames:
            if frame.pts is None or frame.pts >= pts:
                break
        else:
            raise _NotSought
        if frame.pts != pts:
            raise _NotSought
        here = frame.pts
        yield frame


def _quarter_turns(frame: VideoFrame, name: str) -> int:
    """Counter-clockwise quarter turns that show the frame upright. PyAV does not apply them, decord does."""
    if not -360 <= frame.rotation <= 360:  # a broken matrix gives -2147483648
        reject(name, "undecodable", "its display matrix is broken")
    return round(frame.rotation / 90) % 4


def upright(frame: VideoFrame, name: str) -> np.ndarray:
    """[H, W, 3] uint8 RGB of a frame that `play` gives.

    Raises:
        MediaError: the file does not say how the frame is turned.
    """
    return np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame, name))


def _within(line: _Timeline, span_s: tuple[float, float] | None, name: str) -> tuple[int, int]:
    """(First frame, number of frames) of a span: those that begin in it, else the one that is shown at its start."""
    if span_s is None:
        return 0, len(line)
    end_s = float(line.times_s[-1]) + (line.last_s or 1 / line.native_fps)
    if span_s[0] >= end_s:
        reject(name, "no-such-span", f"it ends at {end_s:g} s, the span begins at {span_s[0]:g} s")
    first, stop = np.searchsorted(line.times_s, np.array(span_s) - 1e-6)  # ticks are no round numbers in binary
    if first == stop:
        first -= 1
    return int(first), int(stop - first)


def _gather(frames: Iterator[VideoFrame], count: int, name: str) -> np.ndarray:
    """[count, H, W, 3] uint8 of `count` frames, upright."""
    pixels = np.empty(0, np.uint8)
    for row, frame in enumerate(frames):
        turned = upright(frame, name)
        if row == 0:
            _check_clip_size(count, turned.shape[0], turned.shape[1], name)
            pixels = np.empty((count, *turned.shape), np.uint8)
        if turned.shape != pixels.shape[1:]:
            reject(name, "undecodable", f"its frame size changes from {pixels.shape[1:3]} to {turned.shape[:2]}")
        pixels[row] = turned
        if row + 1 == count:
            return pixels
    reject(name, "truncated", "fewer frames decode the second time")


def _check_clip_size(count: int, height: int, width: int, name: str) -> None:
    size = count * height * width * 3
    if size > MAX_CLIP_BYTES:
        reject(name, "too-large", f"{count} frames of {width}x{height} px take {size / 2**30:.1f} GiB; sample fewer")


class _DecordFailed(Exception):
    """decord could not give the frames; PyAV shall judge the file."""


def _suits_decord(container: InputContainer, stream: VideoStream, line: _Timeline) -> bool:
    """Whether decord's FFmpeg 4 shows the same frames with the same pixels as PyAV's (measured bit for bit).

    Left out: codecs it lacks (AV1, VVC), streams it hangs on (bare MPEG-1), counts it gets wrong (edit lists), a second
    video stream (it takes another one), and pixels it converts in another way (10 bits, odd sizes).
    """
    return (
        container.format.name.split(",")[0] in _DECORD_FORMATS
        and stream.codec_context.name in _DECORD_CODECS
        and stream.codec_context.pix_fmt in ("yuv420p", "yuvj420p")
        and container.duration is not None
        and len(container.streams.video) == 1
        and line.exact
        and line.plain
        and min(stream.width, stream.height) >= _DECORD_MIN_SIDE_PX
        and stream.width % 2 == 0
        and stream.height % 2 == 0
    )


def _decode_decord(source: Source, stream: VideoStream, line: _Timeline, indices: np.ndarray, name: str) -> np.ndarray:
    """[T, H, W, 3] uint8 of the rising `indices`."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _DecordFailed(f"decord cannot be loaded: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    # The reader lives in this function only: one that is open over a fork aborts the process. Without fault_tol decord
    # fills a frame that does not decode with a copy of another, silently. DECORD_EOF_RETRY_MAX stays at its 10240:
    # the retries race with decord's own thread, and a limit of 100 loses sound files.
    try:
        reader = decord.VideoReader(file, num_threads=1, fault_tol=1e-9)
        if len(reader) != len(line):
            raise _DecordFailed(f"decord counts {len(reader)} frames, the packets hold {len(line)}")
        pixels = reader.get_batch(indices).asnumpy()
        del reader
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, UnicodeError) as error:
        raise _DecordFailed(str(error).partition("\n")[0]) from error
    if sorted(pixels.shape[1:3]) != sorted((stream.height, stream.width)):
        raise _DecordFailed(f"decord gives frames of shape {pixels.shape[1:]}")
    return pixels


def _decode_all(source: Source, sampling: Sampling, name: str, span_s: tuple[float, float] | None) -> Frames:
    """PyAV without seeking: decodes the stream twice, to count and to keep, and judges damage."""
    with _opened(source, name) as (container, stream):
        line = _walk(container, stream, name)
    within = _within(line, span_s, name)
    indices = within[0] + frame_indices(within[1], line.native_fps, sampling)
    needed = set(indices.tolist())
    with _opened(source, name) as (container, stream):
        frames = (frame for index, frame in enumerate(_frames(container, stream, name)) if index in needed)
        return _clip(_gather(frames, len(needed), name), line, indices, within)


def _clip(pixels: np.ndarray, line: _Timeline, indices: np.ndarray, within: tuple[int, int]) -> Frames:
    """Frames of `indices` from the pixels of the distinct ones, told as of a file that holds what `within` gives."""
    distinct, rows = np.unique(indices, return_inverse=True)
    if len(distinct) < len(indices):
        pixels = pixels[rows]
    first, count = within
    return Frames(pixels, line.times_s[indices] - line.times_s[first], indices - first, count, line.native_fps)


_LINES: OrderedDict[tuple[str, int, int], _Timeline] = OrderedDict()
_LINES_KEPT = 32


def _scan_once(container: InputContainer, stream: VideoStream, source: Source, name: str) -> _Timeline:
    """`_scan`, remembered for the files of the last spans: an hour of video has 720 windows and 108,000 packets."""
    if isinstance(source, bytes):
        return _scan(container, stream, name)
    status = os.stat(source)
    key = (os.path.abspath(source), status.st_size, status.st_mtime_ns)
    line = _LINES.pop(key, None) or _scan(container, stream, name)
    _LINES[key] = line
    while len(_LINES) > _LINES_KEPT:
        _LINES.popitem(last=False)
    return line


def decode(
    source: Source,
    sampling: Sampling,
    *,
    backend: Backend = "auto",
    name: str = "",
    verify: bool = False,
    span_s: tuple[float, float] | None = None,
) -> Frames:
    """Samples frames of a video in this process. For files that a build has verified; see `decode_guarded`.

    Args:
        source: path, or the bytes of a file.
        backend: "auto" takes decord where it is known to agree with PyAV, and PyAV otherwise and where decord fails.
        name: what to call the file in messages.
        verify: decode the frames that decord gave by PyAV too, and refuse the file if one is damaged: decord shows
            patched-up frames and says nothing. Costs a second decoding without conversion.
        span_s: first and last second of the part that is read as if it were the file; None is all. Spans are sought
            by PyAV, since decord reads a whole file before its first frame.

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    name = called(source, name)
    with _opened(source, name) as (container, stream):
        line = _scan(container, stream, name) if span_s is None else _scan_once(container, stream, source, name)
        if backend == "decord" or (
            backend == "auto" and span_s is None and DECORD_AVAILABLE and _suits_decord(container, stream, line)
        ):
            within = _within(line, span_s, name) if len(line) else (0, 1)
            indices = within[0] + frame_indices(within[1], line.native_fps, sampling)
            _check_clip_size(len(indices), stream.height, stream.width, name)
            try:
                clip = _clip(_decode_decord(source, stream, line, np.unique(indices), name), line, indices, within)
                if verify:
                    for _ in _sought(container, stream, line, np.unique(indices), name):
                        pass
                say_if_short(name, clip.num_frames, len(indices))
                return clip
            except (_DecordFailed, _NotSought, av.FFmpegError) as error:
                if backend == "decord":
                    reject(name, "undecodable", f"decord cannot decode it: {error}")
                logger.debug("%s: %s; PyAV takes it", name, error)
        found = _decode_seeking(container, stream, line, sampling, name, span_s)
    clip = found or _decode_all(source, sampling, name, span_s)
    say_if_short(name, clip.num_frames, len(clip.indices))
    return clip


def _decode_seeking(
    container: InputContainer,
    stream: VideoStream,
    line: _Timeline,
    sampling: Sampling,
    name: str,
    span_s: tuple[float, float] | None,
) -> Frames | None:
    """PyAV with jumps between key frames; None where the stream must be read from its start."""
    if not line.exact:
        return None
    within = _within(line, span_s, name)
    indices = within[0] + frame_indices(within[1], line.native_fps, sampling)
    distinct = np.unique(indices)
    try:
        pixels = _gather(_sought(container, stream, line, distinct, name), len(distinct), name)
        return _clip(pixels, line, indices, within)
    except (_NotSought, av.FFmpegError):
        return None


def play(source: Source, name: str = "") -> Iterator[VideoFrame]:
    """Every frame in the order of showing, as PyAV decodes it in this process: for what must see all of them.

    Raises:
        MediaError: the file cannot be opened, or a frame is damaged; `reason` says why.
    """
    name = called(source, name)
    with _opened(source, name) as (container, stream):
        try:
            yield from _frames(container, stream, name)
        except av.FFmpegError as error:
            reject(name, "undecodable", f"a frame does not decode: {reason_of(error)}")


@functools.lru_cache(maxsize=4096)  # once a file
def say_if_short(name: str, num_frames: int, wanted: int) -> None:
    """Warns that a clip is too short for its sampling."""
    if num_frames < wanted:
        logger.warning("%s: %d frames are fewer than the %d sampled; frames are repeated", name, num_frames, wanted)


def probe(source: Source, name: str = "") -> VideoInfo:
    """What a video file holds: reads all packets and decodes one frame (all frames where packets do not tell).

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    name = called(source, name)
    with _opened(source, name) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        line = _scan(container, stream, name)
        backend = "decord" if DECORD_AVAILABLE and _suits_decord(container, stream, line) else "pyav"
    if not line.exact:
        with _opened(source, name) as (container, stream):
            line = _walk(container, stream, name)
    with _opened(source, name) as (container, stream):
        try:
            frame = next(container.decode(stream))
        except (av.FFmpegError, StopIteration) as error:
            reject(name, "undecodable", f"no frame decodes: {reason_of(error)}")
        turns = _quarter_turns(frame, name)
        width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    duration_s = float(line.times_s[-1]) + (line.last_s or 1 / line.native_fps)
    return VideoInfo(codec, width, height, len(line), duration_s, line.native_fps, 90 * turns, backend)
