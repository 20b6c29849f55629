"""Real files through the real commands: `gve shards build` of all of them, `gve fit` on the shards, then retrieval.

The files are not part of the repository: without their folder every test here skips and says where it looked.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gve.cli import main
from gve.data.sources import open_sources
from gve.encode.encoder import BackboneEncoder, Encoder
from gve.encode.topk import rank_counts
from gve.eval.retrieval import recall_at_k
from gve.inputs import InputBuilder, InputPolicy
from gve.items import Frames, Item, Pair
from gve.model.backbone import Backbone, Lora
from gve.toy.base import write_base

FRAME_PX = 9 * 28 * 28  # what 9 tokens show
# Frames of any length and size are wanted here: one of the clips is 1x1, one has 3 frames.
BUILD = ["--min-frames", 1, "--min-side-px", 1, "--presample", "uniform(4)", "--presample-px", FRAME_PX]
KINDS = {"videos": "video", "images": "image"}

# The damage of each file is told in the README beside the files; the reasons are the slugs of gve.video.
REASONS = {
    "videos/corrupt/corrupted.mp4": "truncated",
    "videos/corrupt/result.webm": "empty",
    "videos/corrupt/fixture-corrupt.mkv": "not-a-video",
    "videos/corrupt/fixture-moov.mov": "not-a-video",
    "videos/corrupt/media3_sample_with_invalid_nalu.mp4": "truncated",
    "videos/corrupt/invalid-bitstream.webm": "undecodable",
    "videos/corrupt/invalid_vp9_bitstream-bug_1416.webm": "too-large",
    "videos/corrupt/media3_sample_malformed_free_box.mp4": "not-a-video",
    "videos/corrupt/no_timescale.mp4": "garbled",
    "videos/corrupt/block_ends_beyond_cluster.mkv": "truncated",
    "videos/corrupt/fixture2.mkv": "truncated",
    "videos/corrupt/bbb_1ch_16kHz_aac.mp4": "no-video-stream",
    "images/corrupt/truncated_jpeg.jpg": "truncated",
    "images/corrupt/broken_data_stream.png": "undecodable",
    "images/corrupt/fixture-json.webp": "not-an-image",
    "images/corrupt/non-motion-photo-shortened.jpg": "truncated",
    "images/corrupt/decompression_bomb.gif": "too-large",
    "images/corrupt/zero_bytes_foo.png": "empty",
    "images/corrupt/broken.png": "not-an-image",
}
# Odd, but every pixel is there: a Theora clip with the wrong name ending, a picture whose EXIF block alone is damaged.
SOUND_AFTER_ALL = {"videos/corrupt/playable_but_bad_container.mkv", "images/corrupt/hopper_bad_exif.jpg"}


def gve(*words: Any) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code


def records(real: Path, folder: str) -> list[tuple[str, dict]]:
    """(kind of medium, entry of the manifest) of the files in videos/<folder> and images/<folder>."""
    manifest = json.loads((real / "manifest.json").read_text())
    return [
        (kind, entry)
        for group, kind in KINDS.items()
        for entry in manifest[group]
        if entry["file"].startswith(f"{group}/{folder}/")
    ]


def write_listing(path: Path, real: Path, folder: str) -> Path:
    rows = [
        {"query": {"text": entry.get("caption") or "a damaged file"}, "target": {kind: str(real / entry["file"])}}
        for kind, entry in records(real, folder)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def shards(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sound files with their captions, built by the command. 12 s of a core."""
    folder = tmp_path_factory.mktemp("real")
    listing = write_listing(folder / "real.jsonl", real, "good")
    assert gve("shards", "build", listing, folder / "shards", "--source", "real", *BUILD) == 0
    return folder / "shards"


def read(shards: Path) -> list[Pair]:
    return [source.read(row) for source in open_sources(shards).values() for row in range(len(source))]


def test_every_sound_file_becomes_a_pair(shards: Path, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gve("shards", "check", shards) == 0
    assert capsys.readouterr().out.strip() == "all shards match their indexes and the manifest"
    assert not (shards / "rejects.jsonl").exists()
    expected = records(real, "good")
    counts = Counter(f"real_t2{kind[0]}" for kind, _ in expected)
    assert (
        {name: len(source) for name, source in open_sources(shards).items()}
        == counts
        == {
            "real_t2v": 69,
            "real_t2i": 23,
        }
    )
    # Each sample names the original file by its hash, also where frames are stored in its place.
    found = {}
    for path in shards.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and (stream := tar.extractfile(member)):
                    sample = json.load(stream)
                    found[sample["target"]["parts"][0]["sha256"]] = sample["query"]["parts"][0]["text"]
    assert found == {entry["sha256"]: entry["caption"] for _, entry in expected}
    for pair in read(shards):
        source = pair.target.media[0].source
        assert isinstance(source, Frames if pair.task == "T2V" else bytes)
        if isinstance(source, Frames):
            assert len(source.pixels) == 4
            assert source.pixels[0, :, :, 0].size <= FRAME_PX


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.timeout(120)
def test_every_damaged_file_is_rejected_by_name(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing = write_listing(tmp_path / "damaged.jsonl", real, "corrupt")
    names = {str(real / entry["file"]): entry["file"] for _, entry in records(real, "corrupt")}
    assert set(names.values()) == REASONS.keys() | SOUND_AFTER_ALL

    out = tmp_path / "shards"
    assert gve("shards", "build", listing, out, "--source", "odd", "--on-bad", "skip", *BUILD) == 0
    assert "see " in capsys.readouterr().out
    targets = [json.loads(line)["target"] for line in listing.read_text().splitlines()]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    got = {names[next(iter(targets[reject["row"] - 1].values()))]: reject for reject in rejects}
    assert {name: reject["reason"] for name, reject in got.items()} == REASONS
    assert len(rejects) == len(REASONS)
    for name, reject in got.items():
        assert reject["message"].startswith(f"{real / name}: ")
        assert "\n" not in reject["message"]
    sizes = {name: len(source) for name, source in open_sources(out).items()}
    assert sizes == {"odd_t2v": 1, "odd_t2i": 1}
    assert gve("shards", "check", out) == 0

    # By default one bad row refuses the build: every one is named, nothing is written.
    capsys.readouterr()
    assert gve("shards", "build", listing, tmp_path / "refused", "--source", "odd", *BUILD) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" row ")[2].partition(":")[0] for line in lines[:-1]] == [str(r["row"]) for r in rejects]
    assert "nothing was written: 19 bad rows" in lines[-1]
    assert not (tmp_path / "refused").exists()


def recall_both_ways(encoder: Encoder, pairs: list[Pair]) -> tuple[float, float]:
    """R@1 of every caption over all clips and pictures, and back. Positive is what has the same caption."""
    captions = sorted({pair.query.text for pair in pairs})
    own = [captions.index(pair.query.text) for pair in pairs]
    texts = encoder.encode([Item.of(caption) for caption in captions])
    media = encoder.encode([pair.target for pair in pairs])
    assert not texts.failures
    assert not media.failures
    answers = [[row for row, caption in enumerate(own) if caption == k] for k in range(len(captions))]
    there = rank_counts(texts.vectors, media.vectors, answers)
    back = rank_counts(media.vectors, texts.vectors, [[caption] for caption in own])
    return float(recall_at_k(there, 1).mean()), float(recall_at_k(back, 1).mean())


def test_a_fit_on_real_files_overfits(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random base learns the captions of all 92 files by `gve fit`: R@1 >= 0.95 both ways.

    1.0 is not asked for: a 10x10 patch and a 1x1 picture are both white, 1/255 apart. A step trains one task, so clips
    and pictures are never contrasted with one another; ranking them together is the stricter test. 50 s of a core.
    """
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")  # fit sets it; this puts it back afterwards
    pairs = read(shards)
    write_base(tmp_path / "base", [pair.query.text for pair in pairs])
    settings = {
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
        "model.base": tmp_path / "base",
        "model.inputs": {
            "sampling": {"kind": "uniform", "num_frames": 4},
            "max_frame_tokens": 9,
            "max_image_tokens": 9,
            "system_prompt": "",
        },
        "model.lora": {"dropout": 0.0},
        "model.temperature": 0.1,
        "model.optimizer": {"lr": 4e-3, "weight_decay": 0.0, "warmup_fraction": 0.05},
        "model.feature_cache_mb": 16,
        "data.root": shards,
        "data.steps_per_epoch": 110,
        "data.batch_size": {"real_t2v": 32, "real_t2i": 12},
        "data.num_workers": 0,
        "data.dev_pairs": 0,
        "data.curriculum": {"schedule": "fixed", "scores": {"T2V": 0.7, "T2I": 0.3}},
        "checkpoint.monitor": "null",
    }
    words = [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in settings.items()]
    assert gve("fit", *words) == 0

    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    record = checkpoint["gve"]
    backbone = Backbone.from_pretrained(record["base"], lora=Lora(**record["lora"]))
    backbone.load_trainable_state(
        {name.removeprefix("backbone."): value for name, value in checkpoint["state_dict"].items()}
    )
    builder = InputBuilder.from_base(record["base"], InputPolicy.from_dict(record["inputs"]))
    encoder = BackboneEncoder(backbone, builder)
    there, back = recall_both_ways(encoder, pairs)
    print(f"R@1 text to media {there:.4f}, media to text {back:.4f}")
    assert min(there, back) >= 0.95
    # Negative control: the same base without what it learned is near chance, 1 in 84.
    assert max(recall_both_ways(encoder.untrained(), pairs)) < 0.1
