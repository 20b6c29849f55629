"""Schema v1 of a training sample: a Pair as tar members, and back.

A sample is one `json` member and its media members. Tar names are `<key>.<role>.<ext>`, so that the stock webdataset
reader (key = up to the first dot) groups them::

    web_000000_0000.json          {"schema": 1, "key": ..., "source": ..., "task": ..., "level": 2,
                                   "query": {"instruction": ..., "parts": [{"text": "a red ball rolls"}]},
                                   "target": {"parts": [{"video": "target_0.mp4", "sha256": ...}]},
                                   "negatives": [{"parts": [...]}], "provenance": {...}}
    web_000000_0000.target_0.mp4  bytes of the original file

A role is `query`, `target` or `negative<j>`, then the number of the part. A pre-sampled video keeps its distinct
frames as JPEG members and their place in the file in the json::

    {"video": ["target_0_f00.jpg", ...], "sha256": <of the original file>,
     "frames": {"indices": [...], "times_s": [...], "num_frames": 250, "native_fps": 25.0}}
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage

from gve import video
from gve.items import Frames, Image, InputError, Item, Media, Pair, Part, Text, Video

SCHEMA = 1

_NAME = re.compile(r"[a-z0-9_]{1,40}")
# Extensions that webdataset's .decode() would unpickle or unzip must never appear; the decoders sniff content anyway.
_EXTENSION = re.compile(
    "jpe?g|png|webp|gif|bmp|tiff?|ppm|pgm|heic|avif|jp2|tga|ico|mp4|m4v|mov|mkv|webm|avi|mpe?g|m2v|ts|mts|flv|wmv"
    "|3gp|3g2|ogv|vob|mxf|h264|hevc|266|vvc|ivf|y4m"
)


class ShardError(InputError):
    """Shards, their index or their manifest cannot be used; one line that names the file and the fix."""


def check_source_name(name: str) -> None:
    """Raises ShardError unless the name may start a sample key: `[a-z0-9_]`, at most 40 letters."""
    if not _NAME.fullmatch(name):
        raise ShardError(f"source name {name!r}: use 1 to 40 of a-z, 0-9 and _ (it starts every sample key)")


def check_modalities(pair: Pair, task: str) -> None:
    """Raises InputError unless query, target and negatives hold what the task's name says."""
    query, target = task.split("2")
    roles = [("query", pair.query, query), ("target", pair.target, target)]
    roles += [(f"negative {j}", negative, target) for j, negative in enumerate(pair.negatives)]
    for role, item, modality in roles:
        if item.modality != modality:
            raise InputError(f"{role} holds {item.modality or 'nothing'}, task {task} needs {modality}")


def encode_sample(
    pair: Pair, key: str, level: int, *, jpeg_quality: int = 95, provenance: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """A pair as tar members.

    Args:
        pair: media sources may be paths, bytes, pixels (stored as PNG) or Frames (stored as JPEG).
        key: the sample's key; `pair.key` is not used.
        level: pyramid level of the source.
        jpeg_quality: of pre-sampled frames.
        provenance: JSON-able facts about where the pair came from.

    Returns:
        field -> bytes, `json` first.

    Raises:
        InputError: an item is empty or holds text that is no valid Unicode.
        OSError: a media file cannot be read.
    """
    members: dict[str, bytes] = {"json": b""}
    record = {
        "schema": SCHEMA,
        "key": key,
        "source": pair.source,
        "task": pair.task,
        "level": level,
        "query": _encode_item(pair.query, "query", members, jpeg_quality),
        "target": _encode_item(pair.target, "target", members, jpeg_quality),
        "negatives": [
            _encode_item(item, f"negative{j}", members, jpeg_quality) for j, item in enumerate(pair.negatives)
        ],
        "provenance": dict(provenance or {}),
    }
    try:
        members["json"] = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        raise InputError(f"sample {key} cannot be written as JSON: {error}") from error
    return members


def decode_sample(members: Mapping[str, bytes], *, pixels: bool = True) -> Pair:
    """A pair from its tar members; media keep their bytes, pre-sampled videos become Frames.

    Args:
        members: field -> bytes of exactly one sample.
        pixels: False leaves pre-sampled frames undecoded (content hashes need no pixels).

    Raises:
        ShardError: another schema version, or members that do not match the json.
        gve.video.MediaError: a stored frame cannot be decoded.
    """
    try:
        record = json.loads(members["json"])
        version = record["schema"]
        if version != SCHEMA:
            raise ShardError(f"sample {record.get('key')!r} has schema version {version!r}, this code reads {SCHEMA}")
        used = {"json"}
        query, target, *negatives = (
            _decode_item(item, record["key"], members, used, pixels)
            for item in (record["query"], record["target"], *record["negatives"])
        )
        if used != set(members):
            raise ShardError(
                f"sample {record['key']} has members its json does not name: {sorted(set(members) - used)}"
            )
        return Pair(query, target, tuple(negatives), record["key"], record["source"], record["task"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"sample with members {sorted(members)} is not of schema {SCHEMA}: {error!r}") from error


def content_ids(pair: Pair) -> tuple[int, int]:
    """First 8 bytes of the content hashes of query and target, as unsigned integers."""
    query, target = (int(item.content_hash()[:16], 16) for item in (pair.query, pair.target))
    return query, target


def _encode_item(item: Item, role: str, members: dict[str, bytes], jpeg_quality: int) -> dict[str, Any]:
    if not item.parts:
        raise InputError(f"the {role} is empty")
    parts = [_encode_part(part, f"{role}_{i}", members, jpeg_quality) for i, part in enumerate(item.parts)]
    return {"instruction": item.instruction, "parts": parts} if item.instruction else {"parts": parts}


def _encode_part(part: Part, name: str, members: dict[str, bytes], jpeg_quality: int) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"text": part.text}
    kind = "image" if isinstance(part, Image) else "video"
    if isinstance(part.source, Frames):
        return _encode_frames(part, part.source, name, members, jpeg_quality)
    if isinstance(part.source, np.ndarray):
        buffer = io.BytesIO()
        PilImage.fromarray(part.source).save(buffer, "PNG")
        data, extension = buffer.getvalue(), "png"
    else:
        data = part.source if isinstance(part.source, bytes) else Path(part.source).read_bytes()
        suffix = Path(part.name).suffix[1:].lower()
        extension = suffix if _EXTENSION.fullmatch(suffix) else "bin"
    member = f"{name}.{extension}"
    members[member] = data
    return {kind: member, "sha256": hashlib.sha256(data).hexdigest()}


def _encode_frames(
    media: Media, frames: Frames, name: str, members: dict[str, bytes], jpeg_quality: int
) -> dict[str, Any]:
    _, first = np.unique(frames.indices, return_index=True)
    names = [f"{name}_f{i:02d}.jpg" for i in range(len(first))]
    for member, row in zip(names, first, strict=True):
        members[member] = video.encode_jpeg(frames.pixels[row], jpeg_quality)
    places = {
        "indices": frames.indices.tolist(),
        "times_s": frames.times_s.tolist(),
        "num_frames": frames.num_frames,
        "native_fps": frames.native_fps,
    }
    return {"video": names, "sha256": media.content_hash(), "frames": places}


def _decode_item(
    record: Mapping[str, Any], key: str, members: Mapping[str, bytes], used: set[str], pixels: bool
) -> Item:
    parts: list[Part] = []
    for part in record["parts"]:
        if "text" in part:
            parts.append(Text(part["text"]))
            continue
        kind = "image" if "image" in part else "video"
        named = part[kind]
        names = [named] if isinstance(named, str) else named
        absent = [name for name in names if name not in members]
        if absent:
            raise ShardError(f"sample {key} lacks the members {absent}")
        used.update(names)
        label = f"{key}.{names[0]}"
        if "frames" in part:
            parts.append(_decode_frames(part["frames"], [members[name] for name in names], label, pixels))
        else:
            parts.append((Image if kind == "image" else Video)(members[named], part["sha256"], label))
    return Item(tuple(parts), record.get("instruction", ""))


def _decode_frames(places: Mapping[str, Any], jpegs: list[bytes], label: str, pixels: bool) -> Video:
    # The hash is of what is stored, not of the original file: the same clip pre-sampled in another way looks different.
    digest = hashlib.sha256(json.dumps(places["times_s"]).encode())
    for jpeg in jpegs:
        digest.update(hashlib.sha256(jpeg).digest())
    if not pixels:
        return Video(b"", digest.hexdigest(), label)
    indices = np.asarray(places["indices"], np.int64)
    distinct, place = np.unique(indices, return_inverse=True)
    if len(distinct) != len(jpegs):
        raise ShardError(f"{label}: {len(jpegs)} stored frames for {len(distinct)} distinct indices")
    stored = video.decode_stored_frames(jpegs, label)
    frames = Frames(
        stored if np.array_equal(place, np.arange(len(stored))) else stored[place],
        np.asarray(places["times_s"], np.float64),
        indices,
        places["num_frames"],
        places["native_fps"],
    )
    return Video(frames, digest.hexdigest(), label)
