"""What the decoding child does with one raw file: examine it, cut it, repair it. Called by gve.video.call_guarded.

Everything here looks at bytes that nobody has checked, so it runs where it may hang or die. It takes plain values and
gives plain values and bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from gve.synth.quality.dynamics import GRID, cells, measure
from gve.synth.quality.hashes import ClipHash
from gve.video import MediaError, Sampling, decode, encode_jpeg, play, probe, upright
from gve.video.decoders import FORMATS
from gve.video.source import Source, reject

CLIP_SUFFIX = ".mp4"
X264 = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "log=-1"}
"""Of clips that are cut and of files that are encoded again; one thread, so that equal frames give equal bytes."""
CLOCK = Fraction(1, 90_000)
JPEG_QUALITY = 95
SURVEY_PX = 4 * GRID
"""Side of the pictures that shots and holds are measured on."""


@dataclass(frozen=True)
class Cutting:
    """Which frames and clips are cut out of a video.

    A shot that is longer than a clip may be is cut into equal parts; a part shorter than a clip must be gives none.

    Args:
        every_frame: look at every frame for shot boundaries and stills; else the video counts as one shot, and stills
            are measured on the sampled frames alone, which costs a third of the time.
        shot_threshold: of scdet, 0 to 100; lower finds more boundaries.
        max_frames: pictures, from the middles of the longest shots; none is one of the sampled frames, which the
            encoder sees of the video itself.
        max_clips: clips, spread over the parts of all shots.
        min_clip_s, max_clip_s: length of a clip.
        max_clip_share: of the video's length, the most that a clip may have.
        clip_side_px: longer side of a clip; larger videos are scaled down to it, since encoding them would take most
            of the time. 0 keeps their size.
    """

    every_frame: bool = True
    shot_threshold: float = 10.0
    max_frames: int = 4
    max_clips: int = 2
    min_clip_s: float = 1.0
    max_clip_s: float = 10.0
    max_clip_share: float = 0.5
    clip_side_px: int = 640


def examine(
    source: Source,
    name: str,
    *,
    sampling: str,
    backend: str,
    limits: dict[str, Any],
    level: float,
    cutting: dict[str, Any],
) -> tuple[dict[str, Any], bytes]:
    """Facts and measures of a video, and the pictures and clips that are cut out of it.

    Args:
        sampling: of the sparse frames.
        backend: of gve.video.decode.
        limits: min_side_px, min_frames, min_duration_s, max_duration_s, codecs.
        level: a change of a cell under it is none (gve.synth.quality.dynamics).
        cutting: fields of Cutting.

    Returns:
        {"video", "dynamics", "shots", "hash", "frames", "clips"}, and the bytes of frames and clips one after another;
        or {"refused", "score", "detail"} for a video that is beyond a limit.

    Raises:
        MediaError: the file cannot be used.
    """
    cut = Cutting(**cutting)
    info = probe(source, name)
    video = {
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "frames": info.num_frames,
        "duration_s": round(info.duration_s, 3),
        "fps": round(info.native_fps, 3),
    }
    if refusal := beyond(video, limits):
        return refusal, b""
    sampled = decode(source, Sampling.parse(sampling), backend=backend, name=name, verify=True)  # type: ignore[arg-type]
    sparse = cells(sampled.pixels)
    signature = str(ClipHash.of(sampled.pixels))
    end_s = info.duration_s
    if cut.every_frame:
        pictures, times_s, starts = survey(source, name, cut.shot_threshold)
    else:
        times_s = np.arange(info.num_frames) / info.native_fps
        pictures, starts = sparse, [0]
    dynamics = measure(
        sparse, pictures, times_s if cut.every_frame else sampled.times_s, max(end_s, float(times_s[-1]) + 1e-3), level
    )
    middles, parts = plan(times_s, end_s, starts, set(sampled.indices.tolist()), cut)
    media, frames, clips = extract(source, name, middles, parts, cut.clip_side_px)
    facts: dict[str, Any] = {"video": video, "dynamics": dynamics, "hash": signature}
    facts["shots"] = [round(float(times_s[start]), 3) for start in starts]
    facts["frames"] = [
        {"bytes": len(data), "time_s": round(float(times_s[at]), 3)} for at, data in zip(middles, frames, strict=True)
    ]
    bounds = np.append(times_s, end_s)
    facts["clips"] = [
        {"bytes": len(data), "start_s": round(float(bounds[start]), 3), "end_s": round(float(bounds[stop]), 3)}
        for (start, stop), data in zip(parts, clips, strict=True)
    ]
    return facts, media


def beyond(video: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Why a video is refused before it is looked at; empty when it is within the limits."""
    side = min(video["width"], video["height"])
    duration_s = video["duration_s"]
    if limits["codecs"] and video["codec"] not in limits["codecs"]:
        return {"refused": "codec", "score": None, "detail": video["codec"]}
    for reason, score, wrong in (
        ("too-small", side, side < limits["min_side_px"]),
        ("too-few-frames", video["frames"], video["frames"] < limits["min_frames"]),
        ("too-short", duration_s, duration_s < limits["min_duration_s"]),
        ("too-long", duration_s, duration_s > limits["max_duration_s"]),
    ):
        if wrong:
            detail = f"{video['width']}x{video['height']} px, {video['frames']} frames, {duration_s:g} s"
            return {"refused": reason, "score": float(score), "detail": detail}
    return {}


def survey(source: Source, name: str, threshold: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Looks at every frame.

    Args:
        threshold: of FFmpeg's scdet, which compares neighbouring frames.

    Returns:
        [N, 16, 16, 3] cells; [N] times in seconds after the first frame; places where shots begin, 0 first.

    Raises:
        MediaError: a frame is damaged.
    """
    graph = av.filter.Graph()
    entry = graph.add_buffer(
        width=SURVEY_PX, height=SURVEY_PX, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25)
    )
    detector, exit_ = graph.add("scdet", f"threshold={threshold:g}"), graph.add("buffersink")
    entry.link_to(detector)
    detector.link_to(exit_)
    graph.configure()
    starts, pictures, times = [0], [], []

    def pull() -> None:
        while True:
            try:
                seen = exit_.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            if "lavfi.scd.time" in seen.metadata and seen.pts:
                starts.append(seen.pts)

    for frame in play(source, name):
        times.append(np.nan if frame.time is None else frame.time)
        small = frame.reformat(SURVEY_PX, SURVEY_PX, "rgb24", interpolation=Interpolation.AREA)
        pictures.append(small.to_ndarray())
        small.pts, small.time_base = len(times) - 1, Fraction(1, 25)
        entry.push(small)
        pull()
    entry.push(None)
    pull()
    if not times:
        reject(name, "undecodable", "no frame decodes")
    return cells(np.stack(pictures)), _rising(np.array(times)), sorted(set(starts))


def _rising(times_s: np.ndarray) -> np.ndarray:
    """Times after the first frame; at 25 Hz where the file states none that rise."""
    shown = times_s - times_s[0]
    if np.isfinite(shown).all() and (np.diff(shown) > 0).all():
        return shown
    return np.arange(len(times_s)) / 25.0


def plan(
    times_s: np.ndarray, end_s: float, starts: Sequence[int], sampled: set[int], cut: Cutting
) -> tuple[list[int], list[tuple[int, int]]]:
    """Which frames and which stretches are cut out.

    Returns:
        Places of frames, and (first, stop) places of clips, both in order of time.
    """
    bounds = np.append(times_s, max(end_s, float(times_s[-1])))
    shots = list(pairwise([*starts, len(times_s)]))
    longest = sorted(shots, key=lambda shot: (bounds[shot[0]] - bounds[shot[1]], shot[0]))[: cut.max_frames]
    middles = []
    for first, stop in longest:
        middle = int(np.searchsorted(times_s, (bounds[first] + bounds[stop]) / 2).clip(first, stop - 1))
        free = [place for place in range(first, stop) if place not in sampled]
        if free:
            middles.append(min(free, key=lambda place: (abs(place - middle), place)))
    limit_s = min(cut.max_clip_s, cut.max_clip_share * float(bounds[-1]))
    parts: list[tuple[int, int]] = []
    for first, stop in shots:
        count = max(1, int(np.ceil((bounds[stop] - bounds[first]) / limit_s - 1e-6))) if limit_s > 0 else 1
        edges = np.searchsorted(times_s, np.linspace(bounds[first], bounds[stop], count + 1) - 1e-6)
        edges = np.append(edges[:-1], stop)
        parts += [
            (int(one), int(other))
            for one, other in pairwise(edges)
            if cut.min_clip_s <= bounds[other] - bounds[one] + 1e-6 and other - one >= 2
        ]
    if len(parts) > cut.max_clips:
        parts = [parts[at] for at in np.linspace(0, len(parts) - 1, cut.max_clips).round().astype(int)]
    return sorted(middles), parts if cut.max_clips else []


def extract(
    source: Source, name: str, middles: Sequence[int], parts: Sequence[tuple[int, int]], clip_side_px: int
) -> tuple[bytes, list[bytes], list[bytes]]:
    """Frames as JPEG and clips as H.264 in MP4, in one decoding.

    Returns:
        All bytes, frames first; the frames; the clips.
    """
    frames: dict[int, bytes] = {}
    writers = [_ClipWriter(clip_side_px) for _ in parts]
    last = max([*middles, *(stop - 1 for _, stop in parts)], default=-1)
    if last >= 0:
        for place, frame in enumerate(play(source, name)):
            if place in middles:
                frames[place] = encode_jpeg(np.ascontiguousarray(upright(frame, name)), JPEG_QUALITY)
            for (first, stop), writer in zip(parts, writers, strict=True):
                if first <= place < stop:
                    writer.write(frame, name)
            if place == last:
                break
        else:
            reject(name, "truncated", "fewer frames decode the second time")
    pictures, clips = [frames[place] for place in middles], [writer.close() for writer in writers]
    return b"".join([*pictures, *clips]), pictures, clips


def span(source: Source, name: str, *, start_s: float | None, end_s: float | None) -> tuple[dict[str, Any], bytes]:
    """The stretch of a video that a weak pair means, as a file of its own.

    Returns:
        {"duration_s"} of the whole file, and the bytes of the stretch; none when no frame lies in it.
    """
    writer, begun_s, time_s = _ClipWriter(), None, 0.0
    for place, frame in enumerate(play(source, name)):
        shown_s = place / 25.0 if frame.time is None else frame.time
        begun_s = shown_s if begun_s is None else begun_s
        time_s = shown_s - begun_s
        if end_s is not None and time_s >= end_s:
            break
        if time_s >= (start_s or 0.0):
            writer.write(frame, name)
    return {"duration_s": round(time_s, 3)}, writer.close()


class _ClipWriter:
    """Encodes frames into an MP4 in memory, upright, with their own times; the first one is at zero.

    Args:
        longest_px: larger pictures are scaled down to it; 0 keeps their size.
    """

    def __init__(self, longest_px: int = 0) -> None:
        self._longest_px = longest_px
        self._shape = (0, 0)  # of the frames that come
        self._file = io.BytesIO()
        self._container: av.container.OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._begun_s = 0.0
        self._last = -1

    def write(self, frame: VideoFrame, name: str) -> None:
        pixels = np.ascontiguousarray(upright(frame, name))
        if self._stream is None:
            self._stream = self._open(pixels.shape[0], pixels.shape[1])
            self._begun_s = frame.time or 0.0
        if pixels.shape[:2] != self._shape:
            reject(name, "undecodable", "its frame size changes")
        made = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        made = made.reformat(self._stream.width, self._stream.height, "yuv420p")
        # Without a time stamp of its own a frame follows the one before by a 25th of a second.
        at = self._last + 3600 if frame.time is None else round((frame.time - self._begun_s) / CLOCK)
        self._last = made.pts = max(at, self._last + 1)
        made.time_base = CLOCK
        self._mux(made)

    def _open(self, height: int, width: int) -> VideoStream:
        self._shape = height, width
        scale = min(1.0, self._longest_px / max(height, width)) if self._longest_px else 1.0
        self._container = av.open(self._file, "w", format="mp4")
        stream = self._container.add_stream("libx264", rate=25, options=X264)
        stream.height, stream.width = (max(2, round(side * scale) // 2 * 2) for side in (height, width))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = CLOCK
        return stream

    def _mux(self, frame: VideoFrame | None) -> None:
        assert self._stream is not None
        assert self._container is not None
        self._container.mux(self._stream.encode(frame))

    def close(self) -> bytes:
        """The file; no bytes when nothing was written."""
        if self._container is None:
            return b""
        self._mux(None)
        self._container.close()
        return self._file.getvalue()


# ------------------------------------------------------------------------------------------------------------- repair


def repair(source: Source, name: str, *, how: str) -> tuple[dict[str, Any], bytes]:
    """A damaged file made whole: its packets in a new container, or what decodes of it encoded again.

    Args:
        how: "remux" or "reencode".

    Returns:
        {"kept", "suffix"}: share of the frames that the file promised, and what the bytes are; and the bytes, none
        when nothing could be saved.
    """
    try:
        with av.open(
            io.BytesIO(source) if isinstance(source, bytes) else str(source),
            mode="r",
            options={"format_whitelist": FORMATS, "err_detect": "ignore_err", "fflags": "+genpts+discardcorrupt"},
        ) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                return {"kept": 0.0, "suffix": ""}, b""
            stream.codec_context.thread_count = 1
            promised = _promised(container, stream)
            count, suffix, data = (_remux if how == "remux" else _reencode)(container, stream, name)
    except (av.FFmpegError, ValueError, MediaError):
        return {"kept": 0.0, "suffix": ""}, b""
    return {"kept": round(min(1.0, count / promised) if promised else 1.0, 4), "suffix": suffix}, data


def _promised(container: av.container.InputContainer, stream: VideoStream) -> int:
    """Frames that the header speaks of; 0 when it does not."""
    if stream.frames:
        return stream.frames
    seconds = container.duration / av.time_base if container.duration else 0.0
    return round(seconds * float(stream.average_rate or 0))


def _packets(container: av.container.InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Packets of a stream up to where the file breaks off."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        return


def _remux(container: av.container.InputContainer, stream: VideoStream, name: str) -> tuple[int, str, bytes]:
    """Packets as they are, in a Matroska file, whose index is made from what is there."""
    file, count = io.BytesIO(), 0
    with av.open(file, "w", format="matroska") as output:
        copy = output.add_stream_from_template(stream)
        for packet in _packets(container, stream):
            if packet.size and packet.dts is not None and not packet.is_corrupt and (count or packet.is_keyframe):
                packet.stream = copy
                output.mux(packet)
                count += 1
    return count, ".mkv", file.getvalue()


def _reencode(container: av.container.InputContainer, stream: VideoStream, name: str) -> tuple[int, str, bytes]:
    """What decodes without damage; the rest is left out, and its time goes to the frame before.

    After damage frames are made of damaged ones and not all of them are flagged, so nothing is taken until the next
    key frame.
    """
    writer, count, sound = _ClipWriter(), 0, False
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            sound = False
            continue
        for frame in frames:
            sound = not frame.is_corrupt and (sound or frame.key_frame)
            if sound:
                writer.write(frame, name)
                count += 1
    return count, CLIP_SUFFIX, writer.close()
