"""Proof of an export: vectors of each exported form beside those of the checkpoint, on every kind of content.

transformers 5 counts positions after a clip in another way than the model was trained with (`InputPolicy.positions`),
and no argument of it changes that. So a row says whether the form gave the model the same positions: if it did, it must
give the same vector; if not, the row states what the difference costs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder
from gve.inputs import InputBuilder
from gve.items import Frames, Image, InputError, Item, Text, Video
from gve.model.backbone import load_weights
from gve.video import frame_indices

LIMIT = 1e-4
"""Most that 1 - cosine may be where the positions are the same."""
CLIP_SECONDS = (4, 15, 60)
_RATE = 25.0  # frames per second of the clips
_SIDES = (252, 336)  # height and width of pictures, in pixels: a whole number of tokens, and more than most budgets


@dataclass(frozen=True)
class Row:
    """One form on one kind of content.

    Args:
        form: "gve", "transformers" or "sentence-transformers".
        content: kind of content.
        difference: 1 - cosine to the checkpoint's vector; None where the form cannot run here.
        same_positions: whether the model was given the positions it was trained with.
        note: what else there is to know.
    """

    form: str
    content: str
    difference: float | None
    same_positions: bool
    note: str = ""

    @property
    def verdict(self) -> str:
        """One of "ok", "OFF" (it must not be), "stated" (other positions) and "not run"."""
        if self.difference is None:
            return "not run"
        if not self.same_positions:
            return "stated"
        return "ok" if self.difference <= LIMIT else "OFF"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cosine = None if self.difference is None else 1 - self.difference
        return {**asdict(self), "cosine": cosine, "verdict": self.verdict}


def probes(builder: InputBuilder) -> dict[str, Item]:
    """Kind of content -> an item of it, the same for every export.

    Clips are moving colour patterns, decoded: the frames of each are those that the policy takes of its length.
    """

    def clip(seconds: int) -> Frames:
        count = int(seconds * _RATE)
        indices = frame_indices(count, _RATE, builder.policy.sampling)
        return Frames(_pictures(indices / count), indices / _RATE, indices, count, _RATE)

    text = "A small dog runs across the yard, then it jumps over a low fence and waits."
    picture = _pictures(np.array([0.3]))[0]
    change = "the same place, but with two dogs"
    found = {"text": Item.of(text), "image": Item.of(image=picture)}
    found |= {f"video {seconds} s": Item.of(video=clip(seconds)) for seconds in CLIP_SECONDS}
    found["text + image"] = Item.of(change, image=picture)
    found["text + video 15 s"] = Item.of(change, video=clip(15))
    return found


def _pictures(times: np.ndarray) -> np.ndarray:
    """[T, H, W, 3] uint8: waves of colour at times in [0, 1)."""
    rows, columns = (np.linspace(0, 1, side) for side in _SIDES)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    waves = [
        np.sin(2 * np.pi * (3 * grid[0] * (channel + 1) + 2 * grid[1] + times[:, None, None] * (channel + 2)))
        for channel in range(3)
    ]
    return (127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)


def check(reference: Mapping[str, np.ndarray], items: Mapping[str, Item], folder: Path, device: str) -> list[Row]:
    """Loads every form of an exported folder and compares.

    Args:
        reference: kind of content -> [D] unit vector of the checkpoint.
        items: what was encoded.
        folder: the export.
        device: torch device.

    Returns:
        A row for each form and kind of content.
    """
    execution = Execution(device)
    loaded = load_encoder(str(folder), adapter="gve", execution=execution)
    own = dict(zip(items, loaded.encode(list(items.values())).vectors, strict=True))
    rows = [compare("gve", kind, reference[kind], vector) for kind, vector in own.items()]
    builder: InputBuilder = loaded.builder  # type: ignore[attr-defined]
    del loaded
    plain = _PlainTransformers(folder, builder, device)
    same = {}
    for kind, item in items.items():
        vector, same[kind] = plain(item)
        rows.append(compare("transformers", kind, reference[kind], vector, same[kind]))
    del plain
    missing = [name for name in ("sentence_transformers", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"needs {' and '.join(missing)}, which is not installed"
        return rows + [Row("sentence-transformers", kind, None, same[kind], reason) for kind in items]
    encoder = load_encoder(
        str(folder), adapter="sentence-transformers", inputs={"sampling": builder.policy.sampling}, execution=execution
    )
    encoded = encoder.encode(list(items.values()))
    for place, (kind, vector) in enumerate(zip(items, encoded.vectors, strict=True)):
        if place in encoded.failures:
            rows.append(Row("sentence-transformers", kind, None, same[kind], encoded.failures[place]))
            continue
        rows.append(compare("sentence-transformers", kind, reference[kind], vector, same[kind]))
    return rows


def compare(form: str, content: str, a: np.ndarray, b: np.ndarray, same_positions: bool = True) -> Row:
    """The row of two vectors [D] of one item."""
    note = "" if same_positions else f"transformers {transformers.__version__} counts other positions after a clip"
    # Of unit vectors this is 1 - cosine, without the rounding of a number near 1.
    a, b = (vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64)) for vector in (a, b))
    return Row(form, content, float(np.square(a - b).sum() / 2), same_positions, note)


def failed(rows: Sequence[Row]) -> list[Row]:
    """Rows that must not be: the same positions, another vector."""
    return [row for row in rows if row.verdict == "OFF"]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| form | content | cosine | 1 - cosine | verdict | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        values = "- | -" if row.difference is None else f"{1 - row.difference:.6f} | {row.difference:.1e}"
        lines.append(f"| {row.form} | {row.content} | {values} | {row.verdict} | {row.note} |")
    return "\n".join(lines)


class _PlainTransformers:
    """An exported folder as a user of transformers reads it: its tokenizer, chat template, model and position -1.

    Pixels come from the folder's processors where torchvision is installed (transformers makes them with it), else
    from `gve.inputs`, whose patches equal theirs within the rounding of a pixel.
    """

    def __init__(self, folder: Path, builder: InputBuilder, device: str) -> None:
        self.builder = builder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = None
        if importlib.util.find_spec("torchvision") is not None:
            self.processor = transformers.AutoProcessor.from_pretrained(folder)
        model = load_weights(transformers.AutoModel, str(folder), {"dtype": torch.float32})
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, item: Item) -> tuple[np.ndarray, bool]:
        """The item's vector, and whether transformers gave the model the positions of the input policy."""
        content = [_content(part) for part in item.parts]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = (self._own_inputs if self.processor is None else self._processed)(prompt, item)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        state = self.model(**inputs, use_cache=False).last_hidden_state[0, -1].float().cpu().numpy()
        expected = self.builder.prepare(item)
        if inputs["input_ids"][0].tolist() != expected.ids.tolist():
            raise InputError(f"{type(self.model).__name__} reads another prompt than gve: {prompt[:200]!r}")
        if not item.media:
            return state, True  # one position a token in every version
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        index = {name: inputs[name] for name in (*names, "attention_mask") if name in inputs}
        positions = self.model.get_rope_index(**index)[0][-3:, 0].cpu()
        return state, torch.equal(positions, expected.positions)

    def _processed(self, prompt: str, item: Item) -> dict[str, torch.Tensor]:
        """By the folder's own processors; frames are decoded already, so their metadata say which they are."""
        images = [part.source for part in item.media if isinstance(part, Image)]
        clips = [part.source for part in item.media if isinstance(part, Video) and isinstance(part.source, Frames)]
        options: dict[str, Any] = {"images": images} if images else {}
        if clips:
            options["videos"] = [torch.from_numpy(clip.pixels).permute(0, 3, 1, 2) for clip in clips]
            options["video_metadata"] = [
                {
                    "total_num_frames": clip.num_frames,
                    "fps": clip.native_fps,
                    "duration": clip.num_frames / clip.native_fps,
                    "frames_indices": clip.indices.tolist(),
                }
                for clip in clips
            ]
            options["do_sample_frames"] = False
        batch = self.processor(text=[prompt], return_tensors="pt", **options)  # type: ignore[misc]
        return {name: torch.as_tensor(value) for name, value in batch.items()}

    def _own_inputs(self, prompt: str, item: Item) -> dict[str, torch.Tensor]:
        """What the processors would give, with the project's own patches."""
        prepared, geometry = self.builder.prepare(item), self.builder.geometry
        inputs: dict[str, torch.Tensor] = {}
        for holder, visions, pixels, grids in (
            ("<|image_pad|>", prepared.images, "pixel_values", "image_grid_thw"),
            ("<|video_pad|>", prepared.videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if visions:
                inputs[pixels] = torch.cat([vision.patches for vision in visions])
                inputs[grids] = torch.tensor([vision.grid for vision in visions])
            pieces = prompt.split(holder)
            counts = [geometry.tokens(vision.grid) for vision in visions]
            prompt = pieces[0] + "".join(
                holder * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
            )
        clips = [part.source for part in item.media if isinstance(part, Video) and isinstance(part.source, Frames)]
        if clips:
            seconds = [geometry.temporal_patch / clip.sampled_fps for clip in clips]
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        text = self.tokenizer(prompt, return_tensors="pt")
        ids = text["input_ids"]
        kinds = (ids == geometry.image_token).long() + 2 * (ids == geometry.video_token).long()
        return {**inputs, **text, "mm_token_type_ids": kinds}


def _content(part: Text | Image | Video) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}
