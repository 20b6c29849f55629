"""Joins the scenes of a long video into one file, without decoding them.

Run as a script: a process of its own, because raw files can crash or hang what reads them. It imports nothing of this
package, so that it starts at once, and reads one JSON object on stdin: {"clips": [paths in order], "target": path}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import av
from av.video.stream import VideoStream

_GAP_TICKS = 1  # decoding times must rise where two clips meet


def _kind(stream: VideoStream) -> tuple[Any, ...]:
    """What two clips must have in common to be one stream."""
    context = stream.codec_context
    return context.name, context.width, context.height, context.pix_fmt, bytes(context.extradata or b"")


def concatenate(clips: Sequence[str], target: str) -> int:
    """Copies the video packets of the clips, one clip after the other, into an MP4 file. Sound is left out.

    Args:
        clips: absolute paths in order.
        target: absolute path.

    Returns:
        Packets written.

    Raises:
        ValueError: a clip has no video, or is coded in another way than the first one.
        av.FFmpegError: a clip cannot be read.
    """
    written, start_s, last = 0, 0.0, None
    with av.open(target, "w", format="mp4") as out:
        made: VideoStream | None = None
        kind: tuple[Any, ...] = ()
        for clip in clips:
            with av.open(clip) as source:
                if not source.streams.video:
                    raise ValueError(f"{clip}: no video stream")
                stream = source.streams.video[0]
                if made is None:
                    made, kind = out.add_stream_from_template(stream), _kind(stream)
                if _kind(stream) != kind:
                    raise ValueError(f"{clip}: coded in another way than {clips[0]}; encode the clips alike")
                packets = [packet for packet in source.demux(stream) if packet.size and packet.pts is not None]
                if not packets or stream.time_base is None:
                    raise ValueError(f"{clip}: no frames")
                tick = float(stream.time_base)
                first = min(packet.pts for packet in packets if packet.pts is not None)
                end = max((packet.pts or 0) + (packet.duration or 0) for packet in packets)
                shift = round(start_s / tick) - first
                for packet in packets:
                    assert packet.pts is not None
                    packet.pts += shift
                    packet.dts = (packet.dts if packet.dts is not None else packet.pts - shift) + shift
                    if last is not None and packet.dts * tick <= last:
                        packet.dts = min(round(last / tick) + _GAP_TICKS, packet.pts)
                    last = packet.dts * tick
                    packet.stream = made
                    out.mux(packet)
                written += len(packets)
                start_s += (end - first) * tick
    return written


if __name__ == "__main__":
    task = json.load(sys.stdin)
    try:
        print(json.dumps({"packets": concatenate(task["clips"], task["target"])}))
    except (ValueError, av.FFmpegError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}))
