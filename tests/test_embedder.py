"""Training steps of the tiny base: what changes, what stays frozen, what a checkpoint holds and refuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from gve.inputs import InputPolicy
from gve.items import EmbedBatch, InputError, TrainBatch
from gve.model.backbone import Lora
from gve.model.embedder import Optimizer, VideoEmbedder
from gve.model.infonce import Contrast
from tiny import clips, texts, write_tiny_base


class Pairs(L.LightningDataModule):
    """Text i belongs to clip i; every other step brings a hard negative for the even rows. Two dev sources."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def step(self, step: int) -> TrainBatch:
        rows = [(step * 4 + row) % 16 for row in range(4)]
        hard = [(row + 8) % 16 for row in rows[::2]]
        return TrainBatch(
            query=texts(rows),
            target=clips(rows),
            negatives=clips(hard) if step % 2 else None,
            negative_index=torch.tensor([[0], [-1], [1], [-1]]) if step % 2 else torch.empty(4, 0, dtype=torch.int64),
            task="T2V",
            source="toy",
            epoch=0,
            step=step,
            seed=step,
        )

    def dev(self, source: str, rows: list[int]) -> TrainBatch:
        none = torch.empty(len(rows), 0, dtype=torch.int64)
        return TrainBatch(
            texts(rows), clips(rows), None, none, "T2V", source, 0, 0, 0, rows=tuple((0, row) for row in rows)
        )

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            [self.step(step) for step in range(self.steps)],  # type: ignore[arg-type]
            batch_size=None,
        )

    def val_dataloader(self) -> Any:
        batches = [self.dev("a", [0, 1, 2]), self.dev("a", [3, 4]), self.dev("b", [5, 6, 7])]
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.val.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def embedder(base: str, **options: Any) -> VideoEmbedder:
    L.seed_everything(0, verbose=False)
    settings = {"lora": Lora(rank=4, alpha=8), "optimizer": Optimizer(lr=3e-3), **options}
    return VideoEmbedder(base, **settings)


def trainer(folder: Path, **options: Any) -> tuple[L.Trainer, Losses]:
    losses = Losses()
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, **options}
    for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        settings[name] = False
    return L.Trainer(default_root_dir=folder, callbacks=[losses], num_sanity_val_steps=0, **settings), losses


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    yield
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


def test_training_learns_and_frozen_stays_bit_identical(base: str, tmp_path: Path) -> None:
    model, (run, losses) = embedder(base), trainer(tmp_path)
    model.configure_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.fit(model, Pairs(40))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"backbone.{name}" for name in model.backbone.trainable_state()}
    assert all("language_model" in name and "lora" in name for name in moved)
    assert sum(losses.train[-4:]) < 0.5 * sum(losses.train[:4])
    assert set(run.callback_metrics) >= {
        f"train/{name}" for name in ("loss", "mean_relevance", "mean_positive", "max_negative_gap", "accuracy")
    }


def test_two_runs_are_bit_equal_and_dropout_follows_the_plan(base: str, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        run, losses = trainer(tmp_path)
        run.fit(embedder(base), Pairs(6))
        runs.append(losses.train)
        torch.randn(3)  # the state of the global generator must not matter
    assert runs[0] == runs[1]
    # Negative control: the second loss has dropout in it, so another seed of the step gives another value.
    data = Pairs(6)
    data.step = lambda step: TrainBatch(**{**vars(Pairs.step(data, step)), "seed": step + 100})  # type: ignore[method-assign]
    run, losses = trainer(tmp_path)
    run.fit(embedder(base), data)
    assert losses.train[1:] != runs[0][1:]


def test_resume_is_bit_equal(base: str, tmp_path: Path) -> None:
    """Four steps, a checkpoint, four more, against eight in one go: adapters, moments and dropout continue."""
    # A cosine would know only of its part's length.
    options = {"optimizer": Optimizer(lr=3e-3, schedule="constant")}
    run, whole = trainer(tmp_path, max_epochs=2)
    run.fit(embedder(base, **options), Pairs(4))
    run, first = trainer(tmp_path, max_epochs=1)
    run.fit(embedder(base, **options), Pairs(4))
    run.save_checkpoint(tmp_path / "half.ckpt")
    run, second = trainer(tmp_path, max_epochs=2)
    run.fit(embedder(base, **options), Pairs(4), ckpt_path=tmp_path / "half.ckpt")
    assert (len(first.train), len(second.train)) == (4, 4)
    assert first.train + second.train == whole.train


def test_checkpoint_holds_the_trained_weights_only(base: str, tmp_path: Path) -> None:
    model, (run, _) = embedder(base), trainer(tmp_path)
    run.fit(model, Pairs(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"backbone.{name}" for name in model.backbone.trainable_state()}
    assert saved["gve"]["inputs"] == InputPolicy().to_dict()
    assert saved["gve"]["base_hash"] == model.backbone.base_hash

    again, (run, _) = embedder(base), trainer(tmp_path)
    run.validate(again, Pairs(2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert again.backbone.weights_hash() == model.backbone.weights_hash()


def test_checkpoint_refuses_what_does_not_fit(base: str, tmp_path: Path) -> None:
    model, (run, _) = embedder(base), trainer(tmp_path)
    run.fit(model, Pairs(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    write_tiny_base(tmp_path / "other", seed=5)

    def load(model: VideoEmbedder, path: Path = tmp_path / "a.ckpt") -> None:
        trainer(tmp_path)[0].validate(model, Pairs(2), ckpt_path=path, verbose=False, weights_only=True)

    load(embedder(base, lora=Lora(rank=4, alpha=8, dropout=0.0)))  # dropout may differ: it is not in the weights
    with pytest.raises(InputError, match="was trained on base"):
        load(embedder(str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"lora is .*'alpha': 8.* this model's is .*'alpha': 16"):
        load(embedder(base, lora=Lora(rank=4, alpha=16)))
    with pytest.warns(UserWarning, match=r"inputs differ .*max_length 1200 -> 8192"):
        load(embedder(base, inputs=InputPolicy(max_length=8192)))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    saved["state_dict"].popitem()
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="1 missing, 0 unknown"):
        load(embedder(base), tmp_path / "b.ckpt")
    del saved["gve"]
    torch.save(saved, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match="was not written by gve"):
        load(embedder(base), tmp_path / "c.ckpt")


class Fixed(torch.nn.Module):
    """Stands in for the backbone: the embedding of content c is row c of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, batch: EmbedBatch) -> torch.Tensor:
        return self.table[batch.content_ids]


def test_dev_recall_and_loss_by_hand(tmp_path: Path) -> None:
    """Source a: right, wrong, tie of two (one right) -> 1.5 / 3. Source b: both queries share one target -> 1."""
    e = torch.eye(4)
    half = (e[2] + e[3]) / math.sqrt(2)
    table = torch.stack([e[0], e[0], half, e[0], e[1], e[2], e[3], e[3]])
    # Queries 0, 1, 2 are e0, e0, (e2 + e3) / sqrt 2; their targets 3, 4, 5 are e0, e1, e2; 6 and 7 look the same.
    model = embedder("unused")
    model.backbone = Fixed(table)  # type: ignore[assignment]

    def batch(source: str, query: list[int], target: list[int], valid: list[bool]) -> TrainBatch:
        def side(rows: list[int]) -> EmbedBatch:
            whole = texts(rows)
            return EmbedBatch(**{**vars(whole), "valid": torch.tensor(valid)})

        none = torch.empty(len(query), 0, dtype=torch.int64)
        rows = tuple((0, row) for row in query)
        return TrainBatch(side(query), side(target), None, none, "T2T", source, 0, 0, 0, rows=rows)

    batches = [
        batch("a", [0, 1], [3, 4], [True, True]),
        # Pair 2 ties with 6, which is the target of an unreadable query's neighbour; the last row is not valid.
        batch("a", [2, 6, 7], [5, 6, 3], [True, True, False]),
        batch("b", [0, 1], [3, 3], [True, True]),
    ]
    run, losses = trainer(tmp_path)
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    run.validate(model, loader, verbose=False)
    found = losses.val[0]
    (tested,) = run.test(model, loader, verbose=False)
    assert tested == {name.replace("val/", "test/"): value for name, value in found.items()}
    pairs = run.predict(model, loader)
    assert pairs is not None
    torch.testing.assert_close(pairs[0], torch.stack([table[[0, 1]], table[[3, 4]]], 1), atol=0, rtol=0)
    # a: query 0 (e0) -> target 3 (e0) right; query 1 (e0) -> target 4 (e1) wrong; query 2 ties between 5 and 6: 1/2;
    # query 6 (e3) -> target 6 (e3) right: (1 + 0 + 1/2 + 1) / 4. b: one distinct target, right for both.
    assert found["val/a/recall_at_1"] == pytest.approx(2.5 / 4)
    assert found["val/b/recall_at_1"] == 1
    assert found["val/recall_at_1"] == pytest.approx((2.5 / 4 + 1) / 2)
    # b: each pair is masked against the other (equal targets), so nothing is left to contrast with: loss 0.
    assert found["val/b/loss"] == pytest.approx(0, abs=1e-6)
    # a, at temperature 0.03 (cosines 0, 1, 1/sqrt 2): only ties count, all else is below 1e-9. Query side: log 1,
    # 1 / 0.03, log 2, log 1; target side (targets 3, 4, 5, 6 against queries 0, 1, 2, 6): log 2, log 4,
    # 0 (exact match is the pair's own 0.7071), (1 - 0.7071) / 0.03 below the own 1: 0.
    expected = (0 + 1 / 0.03 + math.log(2) + 0 + math.log(2) + math.log(4) + 0 + 0) / 2 / 4
    assert found["val/a/loss"] == pytest.approx(expected, abs=1e-3)
    assert found["val/loss"] == pytest.approx(expected / 2, abs=1e-3)


def test_schedule_by_hand() -> None:
    settings = Optimizer(warmup_fraction=0.1)
    # 100 steps, 10 of warm-up: 1/11 at the first, 10/11 at the tenth, the peak at step 10, a half midway, 0 at the end.
    for step, rate in ((0, 1 / 11), (9, 10 / 11), (10, 1.0), (55, 0.5), (100, 0.0), (120, 0.0)):
        assert settings.rate(step, 100) == pytest.approx(rate, abs=1e-12), step
    assert Optimizer().rate(0, 100) == 1
    assert Optimizer(schedule="constant").rate(99, 100) == 1
    for wrong in (lambda: Optimizer(lr=0), lambda: Optimizer(warmup_fraction=1.0)):
        with pytest.raises(InputError, match="lr must be > 0"):
            wrong()


def test_settings_that_cannot_train_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing trains"):
        trainer(tmp_path)[0].fit(embedder(base, lora=None), Pairs(2))
    with pytest.raises(InputError, match="temperature 0 must be > 0"):
        embedder(base, temperature=0)
    with pytest.raises(InputError, match="length of the run is unknown"):
        trainer(tmp_path, max_epochs=-1)[0].fit(embedder(base), Pairs(2))


def test_start_up_lines_say_what_trains(base: str) -> None:
    model = embedder(base, inputs=InputPolicy(append_eos=False))
    model.configure_model()
    first = model.backbone
    model.configure_model()
    assert model.backbone is first  # Lightning calls it for every fit, validate and test
    text = "\n".join(model.describe())
    # Per layer 4 * (32 + 32) for q, 2 * 4 * (32 + 16) for k and v, 3 * 4 * (32 + 48) for the MLP; two layers.
    assert f"trainable parameters: {2 * 4 * (64 + 2 * 48 + 3 * 80):,} of" in text
    assert "LoRA r=4 on 12 layers" in text
    assert "0 trainable tensors, eval mode" in text
    assert "end of the generation prompt" in text
    assert "at most 200 a frame" in text
    assert "a step: all rows at once, the loss whole, temperature 0.03" in text
    model.chunk_tokens, model.contrast = 4096, Contrast(tile=64)
    assert "a step: GradCache, 4096 tokens at a time, the loss in tiles of 64 columns" in model.describe()[-1]
