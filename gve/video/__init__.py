"""Pictures, moving and still: a file or its bytes in, upright RGB frames and their true times out.

Two decoders stand behind one interface. decord is the default for the formats that its old FFmpeg handles; PyAV reads
everything else and judges what decord refuses. A scan of the packets decides which, and gives both the same frame
count and the same times, so the choice never changes what is seen.

Video files are hostile: decoders hang, abort and claim gigabytes. `decode_guarded` works in a child process that can
be killed, and belongs wherever raw files enter; `call_guarded` lends the child to other functions that look into them.
`decode` is for files that a build has verified.

Rules, the same for both decoders:

- the video is the first video stream that is no cover picture; rotation is applied, mirrors and non-square pixels are
  ignored (as decord and the released pipeline do); frames cut by an edit list do not count;
- content decides what a file is, never its name;
- a file is rejected as damaged when a frame that is needed does not decode, or when its packets end long before the
  length that its header claims.

Nothing here imports torch, so the child (`python -m gve.video`) starts in 0.5 s.
"""

from gve.video.decoders import DECORD_AVAILABLE, VideoInfo, decode, play, probe, upright
from gve.video.guard import call_guarded, decode_guarded
from gve.video.pictures import decode_image, decode_stored_frames, encode_jpeg, is_picture, to_pixels
from gve.video.sampling import Sampling, frame_indices
from gve.video.source import MediaError

__all__ = [
    "DECORD_AVAILABLE",
    "MediaError",
    "Sampling",
    "VideoInfo",
    "call_guarded",
    "decode",
    "decode_guarded",
    "decode_image",
    "decode_stored_frames",
    "encode_jpeg",
    "frame_indices",
    "is_picture",
    "play",
    "probe",
    "to_pixels",
    "upright",
]
