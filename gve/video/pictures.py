"""Still pictures: any mode of Pillow to upright RGB, and frames to JPEG."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import simplejpeg

from gve.video.source import MAX_PIXELS, MediaError, Source, called, check_exists, reason_of, reject

_PICTURES = (
    "JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO",
)  # fmt: skip  # not EPS and the like: Pillow hands those to outside programs; MPO comes as JPEG

# What Pillow's readers raise on damaged files.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
                  NotImplementedError, struct.error, zlib.error)  # fmt: skip


def decode_image(source: Source | np.ndarray, name: str = "") -> np.ndarray:
    """A picture as RGB, upright by its EXIF orientation, on white where it is transparent.

    Grey of 16 bits is scaled to 8, not clipped; of several frames or pages the first is taken; damaged EXIF data are
    ignored, and the picture is shown as stored.

    Args:
        source: path, bytes of a file, or pixels that are decoded already ([H, W, 3] uint8, returned as they are).

    Returns:
        [H, W, 3] uint8.

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            reject(name or "<array>", "not-an-image", f"{source.dtype} {source.shape} is not [H, W, 3] uint8")
        return source
    return np.array(_picture(source, name))


def decode_stored_frames(jpegs: Sequence[bytes], name: str = "") -> np.ndarray:
    """Frames of one clip that were stored as pictures, [T, H, W, 3] uint8. Each is decoded into its place.

    Plain JPEGs go through libjpeg-turbo itself, which writes RGB where it is wanted: the same bits as by Pillow, which
    uses the same library, at 0.6 of its time. Everything else, and what fails there, is Pillow's to decode or to name.

    Raises:
        MediaError: one cannot be decoded, or has another size than the first.
    """
    frames = np.empty((0, 0, 0, 3), np.uint8)
    for number, jpeg in enumerate(jpegs):
        size = _plain_jpeg_size(jpeg)
        picture = None if size else _picture(jpeg, name)
        height, width = size or (picture.height, picture.width)  # type: ignore[union-attr]
        if number == 0:
            frames = np.empty((len(jpegs), height, width, 3), np.uint8)
        if frames.shape[1:3] != (height, width):
            reject(name, "not-an-image", f"stored frame {number} has another size than the first")
        if picture is None:
            try:
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=frames[number])
                continue
            except ValueError:  # damaged: Pillow says how
                picture = _picture(jpeg, name)
        frames[number] = np.asarray(picture)
    return frames


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG in grey or colour that stands upright; None for anything else."""
    if not data.startswith(b"\xff\xd8") or b"Exif\0\0" in data[:65536]:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "Gray") and 0 < height * width <= MAX_PIXELS else None


def _picture(source: Source, name: str) -> PIL.Image.Image:
    """A picture in mode RGB, upright, its pixels loaded."""
    name = called(source, name)
    check_exists(source, name)
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_PICTURES) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                reject(name, "too-large", f"{picture.width}x{picture.height} px is more than {MAX_PIXELS} pixels")
            picture.load()
            PIL.ImageOps.exif_transpose(picture, in_place=True)
            return _to_rgb(picture)
    except PIL.Image.DecompressionBombError as error:
        reject(name, "too-large", str(error))
    except PIL.UnidentifiedImageError:
        reject(name, "not-an-image", "no picture format that can be read")
    except MediaError:
        raise
    except _PILLOW_ERRORS as error:
        reject(name, "truncated" if "truncated" in str(error) else "undecodable", reason_of(error))


def to_pixels(picture: PIL.Image.Image) -> np.ndarray:
    """A picture of Pillow as RGB, upright by its EXIF orientation, on white where it is transparent.

    Returns:
        [H, W, 3] uint8.
    """
    return np.array(_to_rgb(PIL.ImageOps.exif_transpose(picture)))


def is_picture(source: Source) -> bool:
    """Whether a file or its bytes are a still picture of a format that Pillow knows, by content; damaged ones too.

    False where it is moving, something else or cannot be opened: whoever decodes it says what is wrong with it.
    """
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return not getattr(picture, "is_animated", False)
    except (PIL.Image.DecompressionBombError, *_PILLOW_ERRORS):
        return False


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture  # convert() would copy it: a tenth of the cost of a stored frame
    if picture.mode.startswith(("I", "F")):
        picture = _to_8_bits(picture)
    if picture.mode == "LAB":
        lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
        picture = PIL.ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB") or picture
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Deep grey (modes I;16, I, F) to L, or to LA where one value is transparent. convert() would clip at 255."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = values.max()
    # Floats state no white level: the first usual one that holds them. Integers are of 16 bits, unless they are larger.
    usual = (1.0, 255.0, 65535.0) if picture.mode == "F" else (65535.0,)
    white = next((level for level in usual if top <= level), top)
    grey = PIL.Image.fromarray(np.clip(values / white * 255.0, 0.0, 255.0).round().astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(PIL.Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """JPEG bytes of one frame, [H, W, 3] uint8, with colour at full size (4:4:4): video has halved it once already."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
