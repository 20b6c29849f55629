"""The Python API gives the vectors of the encoder behind it, whatever form an input has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from gve import GVE
from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder
from gve.eval.uvrb import find_record
from gve.items import InputError, Item, Video
from gve.toy.base import EMBEDDED
from gve.video import Sampling, decode_image, play, probe, to_pixels, upright

ROOT = Path(__file__).resolve().parent.parent
TEXT = "a red circle moves left"


@pytest.fixture(scope="module")
def model() -> GVE:
    return GVE.from_pretrained(EMBEDDED, device="cpu", frames=8, frame_tokens=9)


@pytest.fixture(scope="module")
def clips(toy_world: Path) -> list[Path]:
    found = sorted((toy_world / "uvrb").rglob("*.mp4"))[:3]
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def picture(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frame of a clip; its name tells nothing."""
    path = tmp_path_factory.mktemp("pictures") / "picture"
    PIL.Image.fromarray(upright(next(iter(play(clips[0]))), "clip")).save(path, "PNG")
    return path


def test_it_is_the_encoder_bit_for_bit(model: GVE, clips: list[Path], picture: Path) -> None:
    """Against load_encoder called by hand; another number of frames is another vector."""
    inputs = {"sampling": Sampling.uniform(8), "max_frame_tokens": 9}
    encoder = load_encoder(str(EMBEDDED), inputs=inputs, execution=Execution())
    items = [Item.of(TEXT), Item.of(video=clips[0]), Item.of(image=picture), Item.of(TEXT, picture, clips[1])]
    wanted = encoder.encode(items).vectors
    found = model.encode([TEXT, clips[0], picture, {"text": TEXT, "image": str(picture), "video": clips[1]}])
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert model.dim == found.shape[1] == 192
    other = GVE.from_pretrained(EMBEDDED, device="cpu", frames=2, frame_tokens=9).encode(clips[0])
    assert not np.allclose(other, wanted[1], atol=1e-3)


def test_pixels_are_what_their_file_is(model: GVE, clips: list[Path], picture: Path) -> None:
    """All frames of a file with its rate give the file's vector; with another rate they do not."""
    info = probe(clips[0])
    frames = [upright(frame, "clip") for frame in play(clips[0])]
    assert len(frames) == info.num_frames > 8
    forms = [
        {"video": np.stack(frames), "fps": info.native_fps},
        {"video": [PIL.Image.fromarray(frame) for frame in frames], "fps": info.native_fps},
        {"video": np.stack(frames), "times_s": 7 + np.arange(len(frames)) / info.native_fps},
        {"video": clips[0].read_bytes()},
        {"video": clips[0], "start_s": 0, "end_s": info.duration_s + 1},
    ]
    alone = np.stack([model.encode(form) for form in [clips[0], *forms]])
    assert np.allclose(alone[1:], alone[0], atol=1e-6)
    slow = model.encode({"video": np.stack(frames), "fps": info.native_fps / 20})
    assert not np.allclose(slow, alone[0], atol=1e-3)
    opened = PIL.Image.open(picture)
    still = np.stack([model.encode(form) for form in (picture, opened, np.asarray(opened), {"image": opened})])
    assert np.array_equal(still[1:], np.repeat(still[:1], 3, 0))
    assert np.array_equal(to_pixels(opened), decode_image(picture))


def test_one_or_many(model: GVE, clips: list[Path]) -> None:
    """One input gives [D], several [N, D] in their order; pieces differ by rounding alone."""
    many = model.encode([TEXT, clips[0], "green", clips[1]], convert_to_tensor=True)
    assert isinstance(many, torch.Tensor)
    assert many.shape == (4, 192)
    one = model.encode(clips[0])
    assert one.shape == (192,)
    assert np.allclose(one, many[1], atol=1e-5)
    pieces = model.encode(iter([TEXT, clips[0], "green", clips[1]]), batch_size=2)
    assert np.allclose(pieces, many, atol=1e-5)
    assert not np.allclose(many[0], many[2], atol=1e-2)
    assert model.encode([]).shape == (0, 192)


def test_queries_carry_the_instruction_that_the_benchmark_gives(model: GVE, picture: Path) -> None:
    asked = model.encode_query([TEXT, {"text": TEXT, "image": picture}, {"text": TEXT, "instruction": "Find:"}])
    by_hand = model.encode(
        [
            Item.of(TEXT, instruction=find_record("DREAM-E").instruction),
            Item.of(TEXT, picture, instruction=find_record("MS-TI").instruction),
            Item.of(TEXT, instruction="Find:"),
        ]
    )
    assert np.array_equal(asked, by_hand)
    assert np.array_equal(model.encode_query(TEXT, instruction=""), model.encode_document(TEXT))
    assert not np.allclose(model.encode_query(TEXT), model.encode_document(TEXT), atol=1e-3)


def test_similarity_by_hand() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    assert np.allclose(GVE.similarity(rows, rows), [[1, 0.8], [0.8, 1]], atol=1e-6)
    assert np.allclose(GVE.similarity(rows[0], rows), [[1, 0.8]], atol=1e-6)
    tensors = GVE.similarity(torch.tensor(rows), torch.tensor(rows[:1]))
    assert isinstance(tensors, torch.Tensor)
    assert tensors.tolist() == [[pytest.approx(1)], [pytest.approx(0.8)]]


def test_an_unreadable_input_is_named(model: GVE, clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(clips[0].read_bytes()[:300])
    inputs = [TEXT, tmp_path / "cut.mp4", Path("no/such.mp4")]
    with pytest.raises(InputError, match=r"^2 of 3 inputs cannot .*input 1: .*cut.mp4.*input 2: missing: no/such"):
        model.encode(inputs)
    for size in (None, 1):
        found = model.encode(inputs, on_error="nan", batch_size=size)
        assert np.isnan(found).all(axis=1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (7, "int is no text, file, picture, dict or Item"),
        ("", "the text is empty"),
        ({}, "neither text nor image nor video"),
        ({"txt": "a"}, "key 'txt' is unknown"),
        ({"text": "a", "fps": 3}, "fps belongs to a video"),
        ({"video": "a.mp4", "start_s": 3}, "needs start_s and end_s"),
        ({"video": "a.mp4", "start_s": 3, "end_s": 3}, "is empty"),
        ({"video": "a.mp4", "fps": 3}, "a file has its own"),
        ({"video": np.zeros((4, 8, 8, 3), np.uint8)}, "needs fps in Hz, or times_s"),
        ({"video": np.zeros((4, 8, 8, 3), np.uint8), "fps": 0}, "fps 0 must be above 0"),
        ({"video": np.zeros((2, 8, 8, 3), np.uint8), "times_s": [1, 1]}, "2 rising times"),
        ({"video": np.zeros((8, 8, 3), np.uint8), "fps": 3}, r"\[T, H, W, 3\] uint8"),
        ({"video": [], "fps": 3}, r"\[T, H, W, 3\] uint8"),
        (np.zeros((4, 8, 8, 3), np.uint8), "frames without times"),
        (np.zeros((8, 8, 3), np.float32), r"\[H, W, 3\] uint8 RGB, not \[8, 8, 3\] float32"),
    ],
)
def test_what_is_no_input_is_refused_by_its_number(model: GVE, content: object, said: str) -> None:
    with pytest.raises(InputError, match=f"input 1: .*{said}"):
        model.encode(["fine", content])  # type: ignore[list-item]


def test_the_name_of_a_file_is_no_text(model: GVE, clips: list[Path]) -> None:
    with pytest.raises(InputError, match="names a file: give Path"):
        model.encode(str(clips[0]))
    assert model.encode({"text": str(clips[0])}).shape == (192,)
    assert model.encode("a clip that is not there.mp4").shape == (192,)


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match="3 frames"):
        GVE.from_pretrained(EMBEDDED, frames=3)
    with pytest.raises(InputError, match="does not exist"):
        GVE.from_pretrained("./nowhere")


def test_the_package_imports_no_torch_until_it_is_asked() -> None:
    code = "import gve, sys; assert 'torch' not in sys.modules; gve.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "module 'gve' has no attribute 'nothing'" in done.stderr


def test_items_of_a_clip_keep_the_decoders_times(model: GVE) -> None:
    """20 frames at 5 Hz: uniform(8) takes 0, 3, 5, 8, 11, 14, 16, 19 (linspace by hand), a fifth of a second each."""
    pixels = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    (item,) = model.items([{"video": pixels, "fps": 5}])
    (part,) = item.parts
    assert isinstance(part, Video)
    frames = part.source
    assert frames.indices.tolist() == [0, 3, 5, 8, 11, 14, 16, 19]
    assert frames.pixels[:, 0, 0, 0].tolist() == [0, 3, 5, 8, 11, 14, 16, 19]
    assert frames.times_s.tolist() == pytest.approx([0, 0.6, 1.0, 1.6, 2.2, 2.8, 3.2, 3.8])
    assert (frames.num_frames, frames.native_fps) == (20, 5)


def test_the_readmes_example(clips: list[Path], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The python block of the README, on toy files under its names and the tiny model in the place of GVE-3B."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [code for code in blocks if "GVE" in code]
    shutil.copy(clips[0], tmp_path / "flower.mp4")
    shutil.copy(clips[1], tmp_path / "film.mp4")
    shutil.copy(picture, tmp_path / "frog.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    assert block.count("Alibaba-NLP/GVE-3B") == 1
    exec(block.replace("Alibaba-NLP/GVE-3B", str(EMBEDDED)), found)  # our own file
    assert found["scores"].shape == (2, 2)
    wanted = found["queries"] @ found["clips"].T
    assert np.allclose(found["scores"], wanted, atol=1e-6)
    assert not np.allclose(found["scores"][0], found["scores"][1], atol=1e-3)
