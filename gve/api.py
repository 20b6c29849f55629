"""The Python API: `GVE.from_pretrained(name).encode([...])`, over the encoders that every command uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import PIL.Image
import torch

from gve.encode.encoder import Execution, LoadedEncoder, progress_bar
from gve.encode.pretrained import load_encoder
from gve.items import Frames, Image, InputError, Item, Part, Text, Video
from gve.search.query import usual_instruction
from gve.video import Sampling, frame_indices, is_picture, to_pixels

Content = str | Path | Item | Mapping[str, Any] | PIL.Image.Image | np.ndarray
"""What one vector stands for; `GVE.encode` says how each is read."""
Vectors = TypeVar("Vectors", np.ndarray, torch.Tensor)

_KEYS = ("text", "image", "video", "start_s", "end_s", "fps", "times_s", "instruction")
_MEDIA_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".jpg", ".jpeg", ".png", ".webp", ".bmp")
)
_NAMED = 3  # unreadable inputs named in one message


class GVE:
    """A model that embeds text, images, videos and mixes of them; vectors have unit length.

        model = GVE.from_pretrained("Alibaba-NLP/GVE-3B")
        clips = model.encode([Path("clip.mp4"), {"video": "film.mkv", "start_s": 60, "end_s": 70}])
        model.similarity(model.encode_query("a red bud opens"), clips)

    Args:
        encoder: any encoder, for settings that `from_pretrained` does not name (`gve.encode.pretrained`).
    """

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.encoder = encoder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        frames: int | None = None,
        frame_tokens: int | None = None,
        adapter: str = "auto",
        base: str | Path = "",
        num_workers: int = 0,
    ) -> GVE:
        """Opens a model.

        Args:
            name: a checkpoint of `gve fit`, a folder, or a hub name; any embedder that `gve uvrb run` takes.
            device: torch device; the first GPU where there is one, else the CPU.
            dtype: of the weights; bfloat16 on a GPU, else float32.
            frames: of a clip, spread uniformly over it; even. The model's own number when not given.
            frame_tokens: most vision tokens of a frame, of models that count them; the model's own when not given.
            adapter: how the model is used; "auto" decides by its name and files.
            base: where the base of a checkpoint lies; where it was trained from when empty.
            num_workers: processes that decode; 0 decodes in this one.

        Raises:
            InputError: the model cannot be opened, or a value is out of range.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        inputs: dict[str, Any] = {}
        if frames is not None:
            inputs["sampling"] = Sampling.uniform(frames)
        if frame_tokens is not None:
            inputs["max_frame_tokens"] = frame_tokens
        execution = Execution(
            device=device,
            dtype=dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
            num_workers=num_workers,
        )
        return cls(load_encoder(str(name), adapter=adapter, base=str(base), inputs=inputs, execution=execution))

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self.encoder.dim

    @overload
    def encode(
        self,
        inputs: Content | Iterable[Content],
        *,
        instruction: str = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
        convert_to_tensor: Literal[False] = ...,
        on_error: Literal["raise", "nan"] = ...,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        inputs: Content | Iterable[Content],
        *,
        instruction: str = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
        convert_to_tensor: Literal[True],
        on_error: Literal["raise", "nan"] = ...,
    ) -> torch.Tensor: ...

    def encode(
        self,
        inputs: Content | Iterable[Content],
        *,
        instruction: str = "",
        batch_size: int | None = None,
        show_progress: bool = False,
        convert_to_tensor: bool = False,
        on_error: Literal["raise", "nan"] = "raise",
    ) -> np.ndarray | torch.Tensor:
        """Unit vectors of the inputs, in their order.

        An input is one of

        - str: a text. (The name of a media file that exists is refused: say `Path` or `{"text": ...}`.)
        - Path: a picture or a video, told apart by its content.
        - a picture of Pillow, or its pixels [H, W, 3] uint8 RGB.
        - a dict with `text`, `image`, `video` (at least one; media stand before text) and maybe `instruction`. Media
          are paths (str too), bytes of a file, or pixels. `start_s` and `end_s` take a span of a video file, in
          seconds. A video of pixels is [T, H, W, 3] uint8 or a list of pictures, with `fps` in Hz or `times_s` [T]:
          all its frames, of which the model's own rule takes its share, as from a file.
        - Item: anything else, for example several pictures.

        Args:
            inputs: one input, or several.
            instruction: what is looked for, of inputs that name none; for queries.
            batch_size: inputs that are read and encoded at a time; None leaves it to the encoder, which takes items of
                like length under its budget of tokens. It bounds memory and changes vectors by their rounding alone.
            show_progress: a bar, where the output is a terminal.
            convert_to_tensor: a tensor on the CPU instead of an array.
            on_error: "raise" an unreadable input, or leave a row of "nan".

        Returns:
            [N, D] float32; [D] for one input.

        Raises:
            InputError: an input is of no such kind, or cannot be read.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be at least 1")
        single = isinstance(inputs, (str, Path, Item, Mapping, PIL.Image.Image, np.ndarray))
        items = self.items([inputs] if single else inputs, instruction)  # type: ignore[arg-type,list-item]
        title = "encoding" if show_progress else ""
        if batch_size is None:
            vectors, failures = self._encode(items, title)
        else:
            vectors, failures = np.empty((len(items), self.dim), np.float32), {}
            with progress_bar(title, len(items)) as advance:
                for start in range(0, len(items), batch_size):
                    own, lost = self._encode(items[start : start + batch_size], "")
                    vectors[start : start + batch_size] = own
                    failures |= {start + row: reason for row, reason in lost.items()}
                    advance(len(own))
        if failures and on_error == "raise":
            told = "; ".join(f"input {row}: {failures[row]}" for row in sorted(failures)[:_NAMED])
            more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
            raise InputError(f"{len(failures)} of {len(items)} inputs cannot be read: {told}{more}")
        found = vectors[0] if single else vectors
        return torch.from_numpy(found) if convert_to_tensor else found

    def encode_query(
        self, inputs: Content | Iterable[Content], *, instruction: str | None = None, **options: Any
    ) -> np.ndarray | torch.Tensor:
        """Vectors of questions: `encode` with an instruction.

        Args:
            inputs: as `encode` takes them.
            instruction: None takes, for each input, the one of the benchmark's set that asks alike, which the model was
                tuned to ("Find the video according to the ..."). Empty is none.
            options: of `encode`.
        """
        if instruction is not None:
            return self.encode(inputs, instruction=instruction, **options)
        single = isinstance(inputs, (str, Path, Item, Mapping, PIL.Image.Image, np.ndarray))
        items = self.items([inputs] if single else inputs)  # type: ignore[arg-type,list-item]
        asked = [item if item.instruction else _instructed(item, usual_instruction(item)) for item in items]
        return self.encode(asked[0] if single else asked, **options)

    def encode_document(self, inputs: Content | Iterable[Content], **options: Any) -> np.ndarray | torch.Tensor:
        """Vectors of what is searched: `encode` without an instruction."""
        return self.encode(inputs, instruction="", **options)

    def items(self, inputs: Iterable[Content], instruction: str = "") -> list[Item]:
        """What the encoder is given for inputs of `encode`; no media file is decoded.

        Raises:
            InputError: an input is of no such kind.
        """
        items = []
        for row, content in enumerate(inputs):
            try:
                item = self._item(content)
            except InputError as error:
                raise InputError(f"input {row}: {error}") from None
            items.append(item if item.instruction else _instructed(item, instruction))
        return items

    @staticmethod
    def similarity(first: Vectors, second: Vectors) -> Vectors:
        """Cosines of all pairs.

        Args:
            first: [N, D], or [D] for one.
            second: [M, D], or [D]; of the same kind.

        Returns:
            [N, M] float32, of the kind of the inputs. Rows of NaN give NaN.
        """
        tensors = [torch.as_tensor(side, dtype=torch.float32) for side in (first, second)]
        # Vectors of the model have unit length; means of them, which users rank by too, do not.
        units = [torch.nn.functional.normalize(torch.atleast_2d(side), dim=-1) for side in tensors]
        cosines = units[0] @ units[1].T
        return cosines.numpy() if isinstance(first, np.ndarray) else cosines

    def _encode(self, items: Sequence[Item], title: str) -> tuple[np.ndarray, dict[int, str]]:
        encoded = self.encoder.encode(items, progress=title)
        return encoded.vectors, dict(encoded.failures)

    def _item(self, content: Content) -> Item:
        if isinstance(content, Item):
            return content
        if isinstance(content, Mapping):
            return self._mix(content)
        if isinstance(content, str):
            if Path(content).suffix.lower() in _MEDIA_SUFFIXES and Path(content).is_file():
                raise InputError(f"{content!r} names a file: give Path({content!r}), or {{'text': ...}} for the words")
            if not content.strip():
                raise InputError("the text is empty")
            return Item((Text(content),))
        if isinstance(content, Path):
            return Item((Image(content) if is_picture(content) else Video(content),))
        if isinstance(content, np.ndarray) and content.ndim == 4:
            raise InputError("frames without times: give {'video': frames, 'fps': ...}")
        if isinstance(content, (PIL.Image.Image, np.ndarray)):
            return Item((_picture(content),))
        raise InputError(f"{type(content).__name__} is no text, file, picture, dict or Item")

    def _mix(self, content: Mapping[str, Any]) -> Item:
        given = {key: value for key, value in content.items() if value is not None}
        if unknown := sorted(set(given) - set(_KEYS)):
            raise InputError(f"key {unknown[0]!r} is unknown; known: {', '.join(_KEYS)}")
        parts: list[Part] = []
        if "image" in given:
            parts.append(_picture(given["image"]))
        if "video" in given:
            parts.append(self._clip(given))
        elif extra := [key for key in ("start_s", "end_s", "fps", "times_s") if key in given]:
            raise InputError(f"{extra[0]} belongs to a video, and there is none")
        if given.get("text"):
            parts.append(Text(str(given["text"])))
        if not parts:
            raise InputError("it holds neither text nor image nor video")
        return Item(tuple(parts), str(given.get("instruction", "")))

    def _clip(self, given: Mapping[str, Any]) -> Video:
        source = given["video"]
        if isinstance(source, Frames):
            return Video(source)
        if isinstance(source, (str, Path, bytes)):
            if "fps" in given or "times_s" in given:
                raise InputError("fps and times_s are of pixels; a file has its own")
            span = None
            if "start_s" in given or "end_s" in given:
                if not {"start_s", "end_s"} <= set(given):
                    raise InputError("a span needs start_s and end_s, in seconds")
                span = (float(given["start_s"]), float(given["end_s"]))
            return Video(source, span_s=span)
        if "start_s" in given or "end_s" in given:
            raise InputError("start_s and end_s are of a file; cut the pixels instead")
        return Video(_frames(source, given, self._sampling()))

    def _sampling(self) -> Sampling:
        """Which frames of a clip the model looks at, as its record of inputs says."""
        stated = self.encoder.inputs["sampling"]
        return Sampling(**stated) if isinstance(stated, Mapping) else Sampling.parse(stated)


def _instructed(item: Item, instruction: str) -> Item:
    return Item(item.parts, instruction, item.id)


def _picture(content: Any) -> Image:
    if isinstance(content, PIL.Image.Image):
        return Image(to_pixels(content))
    if isinstance(content, (str, Path, bytes)):
        return Image(content)
    return Image(_pixels(content, 3))


def _pixels(content: Any, dimensions: int) -> np.ndarray:
    """RGB pixels [H, W, 3] or frames [T, H, W, 3], uint8."""
    pixels = np.asarray(content)
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-1] != 3 or not pixels.size:
        shape = "[H, W, 3]" if dimensions == 3 else "[T, H, W, 3]"
        raise InputError(f"pixels must be {shape} uint8 RGB, not {list(pixels.shape)} {pixels.dtype}")
    return pixels


def _frames(content: Any, given: Mapping[str, Any], sampling: Sampling) -> Frames:
    """The model's share of the frames of a clip that is pixels: what decoding a file of these frames would give."""
    if isinstance(content, (list, tuple)):
        shown = [to_pixels(one) if isinstance(one, PIL.Image.Image) else _pixels(one, 3) for one in content]
        if len({one.shape for one in shown}) > 1:
            raise InputError("the frames of a clip must have one size")
        content = np.stack(shown) if shown else np.empty((0, 0, 0, 3), np.uint8)
    pixels = _pixels(content, 4)
    if ("fps" in given) == ("times_s" in given):
        raise InputError("a video of pixels needs fps in Hz, or times_s with a time for each frame")
    if "fps" in given:
        fps = float(given["fps"])
        times_s = np.arange(len(pixels)) / fps if fps > 0 else np.empty(0)
    else:
        times_s = np.asarray(given["times_s"], np.float64)
        length = float(times_s[-1] - times_s[0]) if times_s.ndim == 1 and len(times_s) > 1 else 0.0
        fps = (len(times_s) - 1) / length if length > 0 else 1.0
        if times_s.shape != (len(pixels),) or not np.isfinite(times_s).all() or (np.diff(times_s) <= 0).any():
            raise InputError(f"times_s must be {len(pixels)} rising times in seconds, one for each frame")
    if not (fps > 0 and np.isfinite(fps)):
        raise InputError(f"fps {fps:g} must be above 0")
    indices = frame_indices(len(pixels), fps, sampling)
    return Frames(pixels[indices], (times_s - times_s[0])[indices], indices, len(pixels), fps)
