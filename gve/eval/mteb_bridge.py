"""Our encoders as models of MTEB.

MTEB hands videos over as torchcodec decoders and lets each model pick frames. Here the files themselves are taken out
of its data sets: they are decoded by `gve.video` in killable children and loader workers, by the encoder's own frame
rule and with true times, and torchcodec is not needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gve.encode.encoder import Encoder
from gve.items import Frames, Image, InputError, Item, Part, Text, Video
from gve.video import Sampling, frame_indices

ROWS = 128  # handed to the encoder at once; the bytes of so many files are held


class GveMtebEncoder:
    """Any `Encoder` under MTEB 2's `EncoderProtocol`: `mteb.evaluate(GveMtebEncoder(encoder, "org/name"), tasks)`.

    Queries read an instruction: that of their own row, else the one given here for the task, else the task's own query
    prompt. Documents read none. Parts stand in the order image, video, text. The revision that MTEB files results under
    is the encoder's fingerprint, so other weights, frames or prompts never meet in its cache.

    Args:
        encoder: any model.
        name: what MTEB calls it, "organisation/model".
        instructions: name of a task -> what its queries are told.

    Raises:
        InputError: mteb is not installed, or the name has no organisation.
    """

    def __init__(self, encoder: Encoder, name: str, instructions: Mapping[str, str] | None = None) -> None:
        if importlib.util.find_spec("mteb") is None:
            raise InputError("MTEB is not installed: pip install 'gve[mteb]'")
        if name.count("/") != 1 or not all(name.split("/")):
            raise InputError(f"name {name!r} must have the form organisation/model")
        self.encoder, self.name = encoder, name
        self.instructions = dict(instructions or {})

    @property
    def mteb_model_meta(self) -> Any:
        """MTEB's record of the model."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        return ModelMeta.create_empty(
            {
                "name": self.name,
                "revision": hashlib.sha256(
                    json.dumps([self.encoder.fingerprint, self.instructions], sort_keys=True).encode()
                ).hexdigest()[:16],
                "embed_dim": self.encoder.dim,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "modalities": ["text", "image", "video"],
                "framework": ["PyTorch"],
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """[N, D] float32 unit rows of a DataLoader's rows, in its order.

        Args:
            inputs: MTEB's DataLoader of text, image and video columns.
            task_metadata: of the task; its name and prompt are used.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: "query" items read the instruction.
            options: `show_progress_bar` is used; the encoder has batch sizes of its own.

        Raises:
            RuntimeError: items that cannot be read; MTEB has no place for them, and a zero vector would be a score.
        """
        query = getattr(prompt_type, "value", prompt_type) == "query"
        instruction = self._instruction(task_metadata) if query else ""
        title = f"{task_metadata.name} {'queries' if query else 'items'}" if options.get("show_progress_bar") else ""
        vectors: list[np.ndarray] = [np.zeros((0, self.encoder.dim), np.float32)]
        for rows in _batches(inputs):
            items = [self._item(row, instruction) for row in rows]
            encoded = self.encoder.encode(items, progress=title)
            if encoded.failures:
                place, reason = next(iter(encoded.failures.items()))
                raise RuntimeError(
                    f"{task_metadata.name}: {len(encoded.failures)} of {len(items)} items cannot be read, for example "
                    f"{rows[place].get('id', place)}: {reason}"
                )
            vectors.append(encoded.vectors)
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N, M] float32 cosines of [N, D] and [M, D]; a vector counts as one row."""
        return _rows_of(embeddings1) @ _rows_of(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N] float32 cosines of row i with row i."""
        return (_rows_of(embeddings1) * _rows_of(embeddings2)).sum(-1)

    def _instruction(self, task_metadata: Any) -> str:
        if task_metadata.name in self.instructions:
            return self.instructions[task_metadata.name]
        prompt = task_metadata.prompt
        return str((prompt.get("query") if isinstance(prompt, Mapping) else prompt) or "")

    def _item(self, row: Mapping[str, Any], instruction: str) -> Item:
        """An item of one row; `text` of a query that has an instruction of its own joins both, `query` does not."""
        parts: list[Part] = []
        if row.get("image") is not None:
            parts.append(Image(np.asarray(row["image"].convert("RGB"))))
        if row.get("video") is not None:
            parts.append(self._video(row["video"], str(row.get("id", ""))))
        own = row.get("instruction")
        text = row.get("query") if own else row.get("text")
        if text:
            parts.append(Text(str(text)))
        return Item(tuple(parts), str(own or instruction), str(row.get("id", "")))

    def _video(self, value: Any, name: str) -> Video:
        """A clip from a file, a torchcodec decoder, or frames [T, C, H, W] uint8 that another program picked.

        Nothing says how far apart frames alone are: they count as one a second.
        """
        if isinstance(value, Mapping):
            source = value["bytes"] if value.get("bytes") is not None else value["path"]
            return Video(source, name=value.get("path") or name)
        sampling = self._sampling
        if hasattr(value, "get_frames_at"):
            count, fps = value.metadata.num_frames, value.metadata.average_fps
            indices = frame_indices(count, fps, sampling)
            batch = value.get_frames_at(indices=indices.tolist())
            pixels, times = batch.data, np.asarray(batch.pts_seconds, np.float64)
            times = times - (getattr(value.metadata, "begin_stream_seconds", 0.0) or 0.0)
        else:
            count, fps = len(value), 1.0
            indices = frame_indices(count, fps, sampling)
            pixels, times = torch.as_tensor(np.asarray(value))[torch.from_numpy(indices)], indices.astype(np.float64)
        frames = np.ascontiguousarray(np.asarray(pixels.permute(0, 2, 3, 1), np.uint8))
        return Video(Frames(frames, times, indices, count, fps), name=name)

    @property
    def _sampling(self) -> Sampling:
        sampling = getattr(self.encoder, "inputs", {}).get("sampling", "uniform(8)")
        return Sampling(**sampling) if isinstance(sampling, Mapping) else Sampling.parse(sampling)


def _batches(inputs: Any) -> Iterator[list[dict[str, Any]]]:
    """Rows of a DataLoader, a few at a time; videos as files where its data set holds files."""
    dataset = inputs.dataset
    files = [name for name, kind in (getattr(dataset, "features", None) or {}).items() if _is_video(kind)]
    if not files:
        for batch in inputs:
            yield _rows(batch)
        return
    from datasets import Video as VideoColumn

    for name in files:
        dataset = dataset.cast_column(name, VideoColumn(decode=False))
    for start in range(0, len(dataset), ROWS):
        yield _rows(dataset[start : start + ROWS])


def _is_video(kind: Any) -> bool:
    return type(kind).__name__ == "Video"


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of one length to rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _rows_of(embeddings: Any) -> torch.Tensor:
    rows = torch.nn.functional.normalize(torch.as_tensor(embeddings).float(), dim=-1)
    return rows[None] if rows.ndim == 1 else rows
