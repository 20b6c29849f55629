"""Any SentenceTransformer as an `Encoder`; the extra `sentence-transformers` installs it.

Texts, images and clips go through `encode_query` (items with an instruction) and `encode_document` (the others), with
the model's own prompts. A chat model without a query prompt of its own reads the item's instruction as its prompt,
which it puts into the system turn; other models never see instructions.

What a model cannot take directly is built from what it can:

- clips, where it takes images alone: a chat model reads the frames as images of one message, any other model gives the
  mean of the frames' unit vectors (as CLIP4Clip's meanP);
- mixed items, where it cannot read them at once: the mean of the parts' unit vectors;
- media, where it reads text alone: not at all; the item is reported as unreadable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch

from gve.encode.decoding import Decoding, fingerprint_of, weights_hash
from gve.encode.encoder import Encoded, Transform, progress_bar
from gve.items import Frames, Image, InputError, Item, Part, Text, Video
from gve.video import Sampling

Query = tuple[bool, str]  # goes through encode_query; the prompt that replaces the model's own


class SentenceEncoder:
    """A SentenceTransformer as an `Encoder`: cosine similarity, whatever the model's own one.

    Args:
        model: the loaded SentenceTransformer.
        sampling: frames of a clip; None takes 8 uniform ones, as UVRB does.
        batch_size: most inputs of one forward pass; a frame counts as one while files are decoded.
        num_workers: loader processes that decode.
    """

    def __init__(
        self,
        model: Any,
        *,
        sampling: Sampling | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        self.decoding = Decoding(sampling or Sampling.uniform(8), _as_it_is, batch_size, num_workers)

    @classmethod
    def matches(cls, config: Mapping[str, Any], folder: Path | None) -> bool:
        """Whether a model's folder is that of a SentenceTransformer."""
        return folder is not None and (folder / "modules.json").is_file()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        sampling: Sampling | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> SentenceEncoder:
        """The encoder of a local folder or hub name; no code of the repository is run.

        Args:
            name: folder or hub name.
            sampling: frames of a clip; None: see the class.
            device: torch device.
            dtype: of the weights.
            batch_size: see the class.
            num_workers: loader processes that decode.

        Raises:
            InputError: the package is not installed, no such model, or one that needs code of its own.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                f"model {name!r} needs sentence-transformers: pip install 'gve[sentence-transformers]'"
            ) from None
        try:
            model = SentenceTransformer(name, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise InputError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        return cls(model, sampling=sampling, batch_size=batch_size, num_workers=num_workers)

    @cached_property
    def dim(self) -> int:
        return int(self._vectors([{"text": ""}], (False, "")).shape[1])

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.model)

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "adapter": "sentence-transformers",
            "modules": [type(module).__name__ for module in self.model],
            "modalities": [list(kind) if isinstance(kind, tuple) else kind for kind in self.model.modalities],
            "prompts": dict(self.model.prompts),
            "max_length": self.model.max_seq_length,
            "sampling": str(self.decoding.sampling),
            "clip": "video" if self.model.supports("video") else "images" if self._reads(("image",) * 2) else "mean",
            "composed": "message" if self.model.supports("message") else "mean",
            "instruction": "system turn" if self._takes_instructions else "left out",
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.weights_hash, self.inputs)

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        vectors = np.full((len(items), self.dim), np.nan, np.float32)
        failures: dict[int, str] = {}
        readable = {}
        for row, item in enumerate(items):
            if reason := self._refusal(item):
                failures[row] = reason
            else:
                readable[row] = item
        rows = list(readable)
        with progress_bar(progress, len(items)) as advance:
            advance(len(failures))
            for ready, lost in self.decoding([items[row] for row in rows], transform):
                failures |= {rows[place]: reason for place, reason in lost.items()}
                for place, vector in self._embed(ready).items():
                    vectors[rows[place]] = vector
                advance(len(ready) + len(lost))
        return Encoded(vectors, failures)

    @property
    def _takes_instructions(self) -> bool:
        return self.model.supports("message") and not self.model.prompts.get("query")

    def _reads(self, kinds: tuple[str, ...]) -> bool:
        """Whether the model reads these parts at once, as one input."""
        if len(kinds) == 1:
            return self.model.supports(kinds[0])
        return self.model.supports("message") and all(self.model.supports(kind) for kind in kinds)

    def _refusal(self, item: Item) -> str:
        """Why the model cannot take the item at all; empty if it can."""
        kinds = {"image" if isinstance(part, Image) else "video" for part in item.media}
        lacking = {kind for kind in kinds if not self.model.supports(kind)}
        if not lacking or (lacking == {"video"} and self.model.supports("image")):
            return ""
        return f"the model takes {', '.join(map(str, self.model.modalities))} and no {' and no '.join(sorted(lacking))}"

    def _embed(self, ready: Mapping[int, Item]) -> dict[int, np.ndarray]:
        """Unit vectors by row: every input of the items in as few calls as their prompts allow."""
        calls: dict[Query, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        for row, item in ready.items():
            query = (bool(item.instruction), item.instruction if self._takes_instructions else "")
            for part, inputs in enumerate(self._inputs(item)):
                for single in inputs:
                    calls[query].append((row, part, single))
        parts: dict[int, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for query, asked in calls.items():
            for kind in sorted({tuple(single) for _, _, single in asked}):  # one modality a call: no mixed batches
                alike = [entry for entry in asked if tuple(entry[2]) == kind]
                vectors = self._vectors([single for _, _, single in alike], query)
                for (row, part, _), vector in zip(alike, vectors, strict=True):
                    parts[row][part].append(vector)
        means = {row: [_unit(np.mean(frames, 0)) for frames in own.values()] for row, own in parts.items()}
        return {row: _unit(np.mean(own, 0)) for row, own in means.items()}

    def _inputs(self, item: Item) -> list[list[dict[str, Any]]]:
        """What the model is given: for each part of the mean its inputs, whose mean that part is.

        A text is wrapped, because sentence-transformers takes a bare string that looks like a path or an address for
        the file itself.
        """
        if not item.parts:
            return [[{"text": ""}]]
        video = self.model.supports("video")
        kinds = tuple(dict.fromkeys(_kind(part, video) for part in item.parts))
        shown = [_shown(part, video) for part in item.parts]
        if self._reads(kinds) and (len(shown) > 1 or len(shown[0]) > 1) and self.model.supports("message"):
            content: list[dict[str, Any]] = []
            for part, pieces in zip(item.parts, shown, strict=True):
                kind = _kind(part, video)
                content += [{"type": kind, kind: piece} for piece in pieces]
            if "video" in kinds:  # inside a message sentence-transformers does not see the times of a clip's frames
                grouped = {kind: [part[kind] for part in content if part["type"] == kind] for kind in kinds}
                return [[{kind: own[0] if len(own) == 1 else own for kind, own in grouped.items()}]]
            return [[{"role": "user", "content": content}]]
        return [
            [{_kind(part, video): piece} for piece in pieces] for part, pieces in zip(item.parts, shown, strict=True)
        ]

    def _vectors(self, inputs: Sequence[dict[str, Any]], query: Query) -> np.ndarray:
        """[n, D] float32 unit rows."""
        call = self.model.encode_query if query[0] else self.model.encode_document
        options: dict[str, Any] = {"prompt": query[1]} if query[1] else {}
        if "video" in inputs[0]:
            options["processing_kwargs"] = {"video": {"do_sample_frames": False}}
        # A list of messages would be one conversation, with one vector: each is a conversation of its own.
        batch = [[single] if "role" in single else single for single in inputs]
        vectors = call(batch, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True, **options)
        return _unit(vectors.float().cpu().numpy())


def _as_it_is(item: Item) -> Item:
    return item


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _kind(part: Part, video: bool) -> str:
    return "text" if isinstance(part, Text) else "video" if video and isinstance(part, Video) else "image"


def _shown(part: Part, video: bool) -> list[Any]:
    """A part as sentence-transformers takes it; the frames of a clip one by one where it takes no clips."""
    if isinstance(part, Text):
        return [part.text]
    if isinstance(part.source, np.ndarray):
        return [PIL.Image.fromarray(part.source)]
    frames = part.source
    if not isinstance(frames, Frames):
        raise InputError(f"{part.name or 'a clip'} was not decoded to frames")
    if not video:
        return [PIL.Image.fromarray(frame) for frame in frames.pixels]
    metadata = {
        "fps": frames.native_fps,
        "total_num_frames": frames.num_frames,
        "duration": frames.num_frames / frames.native_fps,
        "frames_indices": frames.indices.tolist(),
    }
    return [{"array": frames.pixels, "video_metadata": metadata}]
