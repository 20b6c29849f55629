"""GradCache against the one-shot step, its chunks against collation, and what it costs in memory and tower runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gve.inputs import InputBuilder, InputPolicy
from gve.items import EmbedBatch, Frames, InputError, Item, TrainBatch
from gve.model import gradcache
from gve.model.backbone import Lora
from gve.model.embedder import VideoEmbedder
from gve.model.gradcache import chunks_of, take
from gve.model.infonce import InfoNCE
from gve.toy.base import write_base
from gve.video import Sampling
from tiny import clips, texts

ROOT = Path(__file__).resolve().parent.parent
Gradients = dict[str, torch.Tensor]


def step_batch(pairs: int = 10, step: int = 0) -> TrainBatch:
    """Texts of 6 to 11 tokens with their clips; two pairs share a clip; negatives for two of three pairs, ragged."""
    rows = list(range(pairs))
    index = torch.tensor([[2 * (row - row // 3), -1] if row % 3 == 0 else [-1, -1] for row in rows])
    hard = [row + 20 for row in range(2 * pairs)]
    index = index.where(index < 0, index // 2)
    return TrainBatch(
        query=texts(rows, spread=5),
        target=clips([*rows[:-1], 0]),
        negatives=clips(hard),
        negative_index=index,
        task="T2V",
        source="toy",
        epoch=0,
        step=step,
        seed=1234 + step,
    )


def embedder(base: str, **options: Any) -> VideoEmbedder:
    """In training mode, its adapters moved by hand: B starts at zero, and hides every gradient of A."""
    model = VideoEmbedder(base, **{"lora": Lora(rank=4, alpha=8), "temperature": 0.2, **options})
    torch.manual_seed(1)
    model.configure_model()
    with torch.no_grad():
        for name, value in model.backbone.trainable_state().items():
            if "lora_B" in name:
                value.normal_(std=0.3)
    return model.train()


@pytest.fixture(autouse=True)
def _no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoEmbedder, "log", lambda *args, **kwargs: None)


def gradients(model: VideoEmbedder, batch: TrainBatch) -> tuple[float, Gradients]:
    """Loss and gradients of one training step, as Lightning takes them: one backward."""
    model.zero_grad()
    loss = model.training_step(batch, 0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(model.backbone.trainable_state())
    return float(loss.detach()), found


def one_shot(embed: Any, sides: Any, loss: Callable[..., InfoNCE], parameters: Any, **settings: Any) -> InfoNCE:
    """What GradCache must equal: the same chunks and the same dropout, but all activations kept and one backward."""
    chunks = chunks_of(sides, settings["max_tokens"])
    embeddings = []
    for side in range(len(sides)):
        rows, parts = [], []
        for number, chunk in enumerate(chunks):
            if chunk.side == side:
                torch.manual_seed(settings["seed"] + number)
                parts.append(embed(chunk.batch))
                rows.append(chunk.rows)
        embeddings.append(torch.cat(parts)[torch.cat(rows).argsort()])
    return loss(*embeddings)


def difference(one: Gradients, other: Gradients) -> float:
    """Largest difference of a gradient, as a share of the largest gradient."""
    scale = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[name]).abs().max()) for name, value in one.items()) / scale


ROUNDING = 2e-5
"""Of a few hundred float32 additions in another order."""


@pytest.mark.parametrize("max_tokens", [1, 24, 10_000])
def test_equals_the_step_without_chunks(base: str, max_tokens: int) -> None:
    """Without dropout the plain step needs no chunks to be compared; 1 token: a chunk for every row."""
    batch, lora = step_batch(), Lora(rank=4, alpha=8, dropout=0.0)
    loss, plain = gradients(embedder(base, lora=lora), batch)
    again, cached = gradients(embedder(base, lora=lora, chunk_tokens=max_tokens, loss_tile=3), batch)
    assert again == pytest.approx(loss, abs=1e-5)
    assert difference(plain, cached) < ROUNDING
    assert min(float(value.abs().max()) for value in plain.values()) > 1e-4  # every weight has something to compare


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed(base: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout 0.1 and gradient checkpointing: equal to one backward through all chunks with the same masks."""
    batch, options = step_batch(), {"chunk_tokens": 24, "gradient_checkpointing": checkpointing}
    loss, cached = gradients(embedder(base, **options), batch)
    with monkeypatch.context() as patch:
        patch.setattr("gve.model.embedder.grad_cache", one_shot)
        expected, plain = gradients(embedder(base, **options), batch)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert difference(plain, cached) < ROUNDING

    # Negative control: seeds that go on from pass to pass give the second one masks of its own.
    drawn = iter(range(10_000))
    monkeypatch.setattr(
        gradcache.torch, "manual_seed", lambda seed: torch.random.default_generator.manual_seed(next(drawn))
    )
    _, other = gradients(embedder(base, **options), batch)
    assert difference(plain, other) > 100 * ROUNDING


def test_bfloat16_autocast(base: str) -> None:
    """bf16-mixed over a bfloat16 base with float32 adapters. Where autocast kept the casts of weights made without
    gradient (torch 2.0 did), the second pass would find them and the adapters' gradients would be 0."""
    batch, lora = step_batch(), Lora(rank=4, alpha=8, dropout=0.0)

    def found(max_tokens: int) -> Gradients:
        model = embedder(base, lora=lora, dtype="bfloat16", chunk_tokens=max_tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.training_step(batch, 0)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = found(0)
    assert {value.dtype for value in plain.values()} == {torch.float32}
    # bfloat16 keeps 8 bits; another shape of a matrix product rounds otherwise.
    assert difference(plain, found(24)) < 0.05
    assert difference(plain, gradients(embedder(base, lora=lora), batch)[1]) > 1e-3  # it is bfloat16 that ran


def test_tower_sees_each_clip_once_a_step(base: str) -> None:
    """28 distinct clips stand in 30 places; two passes over chunks run the tower no second time."""
    batch = step_batch()
    distinct = {key for side in (batch.target, batch.negatives) if side is not None for key in side.video_keys}
    for max_tokens in (0, 24):
        model, seen = embedder(base, chunk_tokens=max_tokens), []
        model.backbone.model.visual.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        gradients(model, batch)
        assert sum(seen) == 8 * len(distinct)
        # The tower keeps to the budget too: 24 merged tokens are 12 clips of 2.
        assert max(seen) == (96 if max_tokens else 8 * len(distinct))


def test_chunks_keep_the_budget_and_lose_no_row() -> None:
    sides = [texts(list(range(40)), spread=17), clips(list(range(7)))]
    chunks = chunks_of(sides, 64)
    for number, side in enumerate(sides):
        rows = torch.cat([chunk.rows for chunk in chunks if chunk.side == number])
        assert rows.sort().values.tolist() == list(range(len(side)))
    assert all(chunk.batch.input_ids.numel() <= 64 for chunk in chunks)
    # Rows of like length stand together: the whole side is 30% padding, its chunks 3%.
    text = [chunk.batch.attention_mask for chunk in chunks if chunk.side == 0]
    assert float(sides[0].attention_mask.float().mean()) < 0.75
    assert sum(int(mask.sum()) for mask in text) / sum(mask.numel() for mask in text) > 0.9
    # A row beyond the budget is a chunk of its own.
    assert [len(chunk.rows) for chunk in chunks_of([clips([1, 2])], 5)] == [1, 1]
    with pytest.raises(ValueError, match="the batch has 2 videos, and video_rows names the rows of 0"):
        take(dataclasses.replace(clips([1, 2]), video_rows=()), [0])
    with pytest.raises(InputError, match="chunk_tokens -1 must be >= 0"):
        VideoEmbedder("unused", chunk_tokens=-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_taken_rows_are_what_collating_them_gives(side: str, tmp_path: Path) -> None:
    """Bit for bit, for texts, images, clips, both in one item, and items that share a clip."""
    write_base(tmp_path, ["a red circle moves to the left", "blue"])
    policy = InputPolicy(sampling=Sampling.uniform(4), max_frame_tokens=8, max_image_tokens=8, padding_side=side)
    builder = InputBuilder.from_base(str(tmp_path), policy)
    rng = np.random.default_rng(0)
    picture = lambda height: rng.integers(0, 255, (height, 56, 3)).astype(np.uint8)  # noqa: E731
    clip = Frames(np.stack([picture(84)] * 4), np.arange(4) / 2, np.arange(4), 4, 2.0)
    items = [
        Item.of("blue"),
        Item.of(video=clip),
        Item.of("a red circle moves to the left", image=picture(56), video=clip, instruction="red"),
        Item.of(image=picture(112)),
        Item.of("a red circle"),
    ]
    prepared = [builder.prepare(item) for item in items]
    whole = builder.collate(prepared)
    for rows in ([0], [4, 0], [3, 1], [2], [1, 2, 3], [4, 3, 2, 1, 0]):
        found, expected = take(whole, rows), builder.collate([prepared[row] for row in rows])
        for field in dataclasses.fields(EmbedBatch):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other, (rows, field.name)


MEMORY = """
import json, torch, transformers
from tiny import CONFIG, clips, texts
from gve.items import TrainBatch
from gve.model.backbone import Backbone, Lora
from gve.model.embedder import VideoEmbedder

CONFIG["text_config"] |= {"hidden_size": 64, "intermediate_size": 2048, "initializer_range": 0.02}
CONFIG["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
CONFIG["vision_config"] |= {"out_hidden_size": 64}
model = VideoEmbedder("unused", loss_tile=64)
model.backbone = Backbone(transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(**CONFIG)), Lora(rank=4))
model.log = lambda *args, **kwargs: None

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

found = []
for chunk_tokens, pairs in [(1024, 8), (1024, 64), (1024, 512), (0, 64), (0, 512)]:
    model.chunk_tokens = chunk_tokens
    rows = [row % 60 for row in range(pairs)]
    query, target, none = texts(rows, spread=18), clips(rows), torch.empty(pairs, 0, dtype=torch.int64)
    rest = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins again at what is resident now
    model.training_step(TrainBatch(query, target, None, none, "T2V", "toy", 0, 0, 7), 0).backward()
    found.append(resident("VmHWM") - rest)
print(json.dumps(found[1:]))
"""


@pytest.mark.slow
def test_memory_of_a_step_does_not_grow_with_the_batch() -> None:
    """Peak of the resident memory over what rests before the step: 512 pairs against 64, in chunks of 1,024 tokens.

    Negative control: without chunks it grows as the batch does.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT / "tests",
        # Freed blocks go back to the system at once, so that what rests does not hide what the next step needs.
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "262144"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    small, large, plain_small, plain_large = json.loads(done.stdout)
    print(f"MiB of a step with 64 and 512 pairs: {small:.0f}, {large:.0f}; plain {plain_small:.0f}, {plain_large:.0f}")
    assert large <= 1.5 * small
    assert plain_large > 4 * plain_small
