"""Encoding by content: one vector per content and world, the store, the project's encoder on a tiny real model."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from gve.encode.encoder import BackboneEncoder, Encoded, Transform, item_key
from gve.encode.pretrained import load_encoder
from gve.encode.store import EmbeddingStore, encode_items
from gve.eval.ablation import PixelAblation
from gve.inputs import InputBuilder, InputPolicy
from gve.items import Image, InputError, Item, Video
from gve.model.backbone import Backbone, Lora
from gve.toy.base import write_base
from gve.video import Sampling

POLICY = InputPolicy(sampling=Sampling.uniform(4), max_length=512)


class Counting:
    """Vectors from the content alone; keeps what it was asked for."""

    dim = 8
    fingerprint = "c" * 64

    def __init__(self, unreadable: Sequence[str] = ()) -> None:
        self.unreadable, self.asked = unreadable, []

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        self.asked += [item.text for item in items]
        vectors = np.full((len(items), self.dim), np.nan, np.float32)
        for row, item in enumerate(items):
            if item.text not in self.unreadable:
                vectors[row] = np.random.default_rng(int(item_key(item)[:8], 16)).normal(size=self.dim)
        return Encoded(vectors, {row: "torn" for row, item in enumerate(items) if item.text in self.unreadable})


def texts(words: str) -> list[Item]:
    return [Item.of(word, instruction="Find it." if word.isupper() else "") for word in words.split()]


def test_each_content_once_and_never_again() -> None:
    encoder, store = Counting(), EmbeddingStore(None, Counting.fingerprint)
    result = encode_items(encoder, texts("a b a B b a"), store)
    assert sorted(encoder.asked) == ["B", "a", "b"]
    np.testing.assert_array_equal(result.vectors[0], result.vectors[5])
    assert not np.array_equal(result.vectors[1], result.vectors[3])  # the instruction is part of what is encoded
    encode_items(encoder, texts("b c"), store)
    assert encoder.asked[3:] == ["c"]


def test_unreadable_items_are_reported_and_tried_again() -> None:
    encoder, store = Counting(unreadable=["b"]), EmbeddingStore(None, Counting.fingerprint)
    gone = Item.of(video="/nowhere/clip.mp4")
    result = encode_items(encoder, [*texts("a b b"), gone], store)
    assert dict(result.failures) == {1: "torn", 2: "torn", 3: "missing: /nowhere/clip.mp4 (No such file or directory)"}
    assert np.isnan(result.vectors[1:]).all()
    assert np.isfinite(result.vectors[0]).all()
    encode_items(encoder, texts("b"), store)
    assert sorted(encoder.asked) == ["a", "b", "b"]


def test_silent_nan_is_a_failure_of_the_item() -> None:
    class Broken(Counting):
        def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
            vectors = super().encode(items).vectors
            vectors[[item.text == "b" for item in items], 3] = np.inf
            return Encoded(vectors)

    store = EmbeddingStore(None, "x")
    result = encode_items(Broken(), texts("a b c b"), store)
    assert dict(result.failures) == dict.fromkeys((1, 3), "the model gave a vector that is not finite")
    assert np.isnan(result.vectors[[1, 3]]).all()
    assert len(store) == store.added == 2  # never kept


def test_store_survives_and_belongs_to_its_encoder(tmp_path: Path) -> None:
    first = encode_items(Counting(), texts("a b"), EmbeddingStore(tmp_path, "1" * 64))
    again = Counting()
    store = EmbeddingStore(tmp_path, "1" * 64)
    assert len(store) == 2
    np.testing.assert_array_equal(encode_items(again, texts("a b"), store).vectors, first.vectors)
    assert again.asked == []
    assert len(EmbeddingStore(tmp_path, "2" * 64)) == 0
    (part,) = (tmp_path / ("1" * 16)).iterdir()
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match="damaged"):
        EmbeddingStore(tmp_path, "1" * 64)


def test_files_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By size and time of change; a file that is too young to be told by its time is read again."""
    clips = []
    for name in ("old", "young"):
        (tmp_path / name).write_bytes(name.encode())
        clips.append(tmp_path / name)
    os.utime(clips[0], ns=(1, 1_000_000_000))
    read: list[str] = []
    content_hash = Video.content_hash

    def watched(medium: Video) -> str:
        read.extend([] if medium.sha256 else [medium.name])
        return content_hash(medium)

    monkeypatch.setattr(Video, "content_hash", watched)

    def again() -> list[str]:
        read.clear()
        items = [Item.of(video=path) for path in clips]
        encoder = Counting()
        found = encode_items(encoder, items, EmbeddingStore(tmp_path / "store", "1" * 64))
        expected = [np.random.default_rng(int(item_key(item)[:8], 16)).normal(size=8) for item in items]
        np.testing.assert_array_equal(found.vectors, np.float32(expected))
        return [Path(name).name for name in read]

    assert again() == ["old", "young"]
    assert again() == ["young"]
    clips[0].write_bytes(b"new")  # the same size, another time
    assert again() == ["old", "young"]
    clips[0].write_bytes(b"longer")
    os.utime(clips[0], ns=(1, 1_000_000_000))
    assert again() == ["old", "young"]
    assert again() == ["young"]
    (file,) = (tmp_path / "store").glob("file_hashes-*.json")
    file.write_text("[")
    with pytest.raises(InputError, match="damaged"):
        again()


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    encoder = Counting(unreadable=["d"])
    result = encode_items(encoder, texts("a b c d e A b"), EmbeddingStore(Path(folder) / "store", encoder.fingerprint))
    np.savez(f"{folder}/{rank}.npz", vectors=result.vectors, asked=encoder.asked, failed=sorted(result.failures))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_share_the_work_and_hold_the_same(tmp_path: Path) -> None:
    alone = encode_items(Counting(unreadable=["d"]), texts("a b c d e A b"), EmbeddingStore(None, "x"))
    multiprocessing.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    asked = []
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as saved:
            np.testing.assert_array_equal(saved["vectors"], alone.vectors)
            assert saved["failed"].tolist() == [3]
            asked.append(saved["asked"].tolist())
    assert sorted(asked[0] + asked[1]) == ["A", "a", "b", "c", "d", "e"]  # each content on one rank
    assert [len(own) for own in asked] == [4, 2]  # parts of four, dealt in turn
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 1  # one writer
    assert not list((tmp_path / "store").rglob("*.tmp"))


def write_clip(path: Path, seed: int) -> None:
    """Twelve frames of 56 x 56, each of its own grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for index in range(12):
            shade = np.full((56, 56, 3), 20 * index + seed, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, ["a red circle moves left", "a blue square"])
    return str(folder)


@pytest.fixture(scope="module")
def backbone(base: str) -> Backbone:
    model = Backbone.from_pretrained(base, lora=Lora(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.trainable_state().items():
            if "lora_B" in name:  # zero at the start: without this the adapters would change nothing
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_clip(folder / f"{seed}.mp4", seed)
    (folder / "torn.mp4").write_bytes((folder / "0.mp4").read_bytes()[:300])
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    return [
        Item.of("a red circle moves left, then it moves back again", instruction="Find the video."),
        Item.of(video=folder / "0.mp4"),
        Item.of("a blue square"),
        Item.of(video=folder / "torn.mp4", id="torn"),
        Item.of("a red circle", video=folder / "1.mp4", instruction="Find the video."),
        Item((Image(picture),)),
        Item.of(video=folder / "2.mp4"),
        Item.of(video=folder / "gone.mp4"),
    ]


def make(backbone: Backbone, base: str, **settings: int) -> BackboneEncoder:
    return BackboneEncoder(backbone, InputBuilder.from_base(base, POLICY), **settings)


def test_vectors_are_the_backbones_and_do_not_depend_on_batching(
    backbone: Backbone, base: str, items: list[Item]
) -> None:
    encoder = make(backbone, base)
    result = encoder.encode(items)
    assert sorted(result.failures) == [3, 7]
    assert "torn.mp4" in result.failures[3]
    assert result.failures[7].startswith("missing: ")
    readable = [row for row in range(len(items)) if row not in result.failures]
    backbone.eval()
    with torch.no_grad():
        expected = np.concatenate([backbone(encoder.builder([items[row]])).numpy() for row in readable])
    backbone.train()
    np.testing.assert_allclose(result.vectors[readable], expected, atol=2e-6)
    assert np.isnan(result.vectors[[3, 7]]).all()
    # One item a batch, decoded in a worker process: the same.
    small = make(backbone, base, batch_tokens=1, num_workers=1).encode(items)
    np.testing.assert_allclose(small.vectors, result.vectors, atol=2e-6)
    assert small.failures == result.failures
    # Negative control: the comparison sees one frame in another place.
    shuffled = encoder.encode(items, transform=PixelAblation("shuffled"))
    moved = np.abs(shuffled.vectors - result.vectors).max(1) > 2e-6
    assert moved[[1, 4, 6]].all()
    assert not moved[[0, 2, 5]].any()


def test_encoding_disturbs_nothing(backbone: Backbone, base: str, items: list[Item]) -> None:
    backbone.train()
    backbone.model.language_model.layers[1].eval()  # a mode that no train() or eval() call would give back
    modes = [module.training for module in backbone.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    encoder = make(backbone, base, num_workers=1)
    first = encoder.encode(items[:3]).vectors
    np.testing.assert_array_equal(first, encoder.encode(items[:3]).vectors)  # dropout is off
    encoder.untrained().encode(items[:3])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    backbone.train()


def test_untrained_is_the_base_and_reuses_what_was_prepared(
    backbone: Backbone, base: str, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make(backbone, base, memory_bytes=1 << 20)
    trained = encoder.encode(items)
    plain = make(Backbone.from_pretrained(base, lora=None), base)
    expected = plain.encode(items)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the untrained pass must not decode or run the tower")

    with monkeypatch.context() as patched:
        patched.setattr("gve.video.decode_guarded", refuse)
        patched.setattr(backbone, "media_features", refuse)
        untrained = encoder.untrained().encode(items)
        again = encoder.encode(items)
    readable = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(untrained.vectors[readable], expected.vectors[readable], atol=2e-6)
    np.testing.assert_array_equal(again.vectors, trained.vectors)
    assert untrained.failures == again.failures == trained.failures
    assert np.abs(trained.vectors[readable] - untrained.vectors[readable]).max(1).min() > 1e-3
    assert encoder.fingerprint != encoder.untrained().fingerprint


@pytest.mark.parametrize("names", ["transformers 4.49", "transformers 4.52"])
def test_released_weights_open_without_code_of_their_repository(
    base: str, items: list[Item], tmp_path: Path, names: str
) -> None:
    """A folder as that of Alibaba-NLP/GVE-3B: a class of its own in config.json, plain Qwen2.5-VL weights, LM head."""
    folder = tmp_path / "GVE-3B"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoModel": "modeling.Qwen25VLForEmbedding", "AutoConfig": "modeling.Qwen25VLConfig"}
    config |= {"architectures": ["Qwen25VLForEmbedding"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise RuntimeError('code of the repository was run')\n")
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if names == "transformers 4.49":
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        weights[name] = value
    weights["lm_head.weight"] = torch.zeros_like(next(v for k, v in weights.items() if "embed_tokens" in k))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    encoder = load_encoder(str(folder), inputs={"sampling": Sampling.uniform(4)})
    assert isinstance(encoder, BackboneEncoder)
    assert encoder.inputs["append_eos"]  # the released weights pool an appended end of text
    plain = load_encoder(base, inputs={"sampling": Sampling.uniform(4)})
    assert encoder.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(encoder.encode(items[:3]).vectors, plain.encode(items[:3]).vectors)
    ids = encoder.builder.prepare(items[0]).ids
    assert ids[-1] == encoder.builder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    bare = load_encoder(str(folder), inputs={"append_eos": False, "sampling": Sampling.uniform(4)})
    assert np.abs(bare.encode(items[:1]).vectors - plain.encode(items[:1]).vectors).max() > 1e-3


def test_fingerprint_follows_weights_and_policy(backbone: Backbone, base: str) -> None:
    encoder = make(backbone, base)
    other = BackboneEncoder(backbone, InputBuilder.from_base(base, POLICY.replace(max_length=600)))
    before = encoder.fingerprint
    assert before == make(backbone, base).fingerprint != other.fingerprint
    weight = next(value for name, value in backbone.trainable_state().items() if "lora_B" in name)
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert encoder.fingerprint != before
