"""2 and 3 ranks against one process (gloo, CPU): training under every strategy, and the scores of `gve validate`."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gve.items import TrainBatch
from gve.model.backbone import Lora
from gve.model.embedder import Optimizer
from gve.model.sharding import ShardedBase
from test_embedder import Pairs, embedder, trainer
from tiny import clips, texts

ROOT = Path(__file__).resolve().parent.parent


class Shares(Pairs):
    """Rank r's rows of steps of 12 pairs, ragged in length, and an unequal share of the dev batches."""

    def __init__(self, steps: int, rank: int, world: int) -> None:
        super().__init__(steps)
        self.rank, self.world = rank, world

    def step(self, step: int) -> TrainBatch:
        rows = [(step * 12 + row) % 16 for row in range(12)][self.rank :: self.world]
        index = torch.arange(len(rows)).where(torch.tensor(rows) % 4 < 2, -1)[:, None]
        hard = clips([(row + 8) % 16 for row in rows])
        batch = dataclasses.replace(super().step(step), query=texts(rows, spread=9), target=clips(rows))
        return dataclasses.replace(batch, negatives=hard, negative_index=index)

    def val_dataloader(self) -> Any:
        batches = [batch for i, batch in enumerate(super().val_dataloader()) if i % self.world == self.rank]
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


LORA = Lora(rank=4, alpha=8, dropout=0.0)  # dropout differs between ranks


def fit(rank: int, world: int, base: str, folder: Path, name: str) -> None:
    """Four steps under a strategy: losses, dev values and trained weights of this rank are written to a file."""
    options: dict[str, Any] = {}
    if world > 1:
        options = {"devices": world, "use_distributed_sampler": False, "strategy": "ddp"}
    settings: dict[str, Any] = {"lora": LORA, "optimizer": Optimizer(lr=3e-3, schedule="constant")}
    if "cached" in name:
        settings |= {"chunk_tokens": 40, "gradient_checkpointing": True, "loss_tile": 5}
    if "sharded" in name:
        options["strategy"] = ShardedBase()
    model, (run, losses) = embedder(base, **settings), trainer(folder, **options)
    data = Shares(4, rank, world)
    run.fit(model, data)
    val = sorted(losses.val[0].items())
    found = {"losses": torch.tensor(losses.train), "val": torch.tensor([value for _, value in val])}
    if "sharded" in name:
        model(data.step(0).query)  # in training mode again: validation had gathered the base
        weight = model.backbone.model.language_model.layers[0].mlp.up_proj.base_layer.weight
        found["share"] = torch.tensor(weight.to_local().numel() / weight.numel())
        run.save_checkpoint(folder / f"{name}.ckpt")
    save_file(found | model.backbone.trainable_state(), folder / f"{name}_{rank}_of_{world}.safetensors")


def fit_all(rank: int, world: int, base: str, folder: str, port: int, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    for name in names:
        fit(rank, world, base, Path(folder), name)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("world", "names"), [(2, ("ddp", "ddp_cached", "sharded", "sharded_cached")), (3, ("ddp", "ddp_cached"))]
)
def test_ranks_train_as_one_process(world: int, names: tuple[str, ...], base: str, tmp_path: Path) -> None:
    """The same 12 pairs a step: equal losses and logged dev values, equal weights after four steps of AdamW.

    DDP and FSDP2, whole and by GradCache with checkpointing and a tiled loss. The negative control, a gather without
    gradient, is in test_infonce.py.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(fit_all, args=(world, base, str(tmp_path), port, names), nprocs=world, join=False)
    deadline = time.monotonic() + 300
    try:
        fit(0, 1, base, tmp_path, "one")
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world} ranks did not finish in 300 s"
    finally:
        for process in context.processes:
            process.kill()
    one = load_file(tmp_path / "one_0_of_1.safetensors")
    assert one["losses"][0] - one["losses"][-1] > 0.01
    for name in names:
        for rank in range(world):
            found = load_file(tmp_path / f"{name}_{rank}_of_{world}.safetensors")
            if "sharded" in name:
                assert found.pop("share") == 0.5  # the base is split, the adapters are not
            torch.testing.assert_close(found, one, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    if "sharded" in names:
        # A checkpoint of the sharded run is like any other, and goes on in one process.
        saved = torch.load(tmp_path / "sharded.ckpt", weights_only=True)
        assert {key: value.shape for key, value in saved["state_dict"].items()} == {
            f"backbone.{key}": value.shape for key, value in one.items() if "lora" in key
        }
        model, (run, losses) = embedder(base, lora=LORA), trainer(tmp_path, max_epochs=2)
        run.fit(model, Shares(4, 0, 1), ckpt_path=tmp_path / "sharded.ckpt")
        assert len(losses.train) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_trains_under_fsdp2_with_gradcache(recipe: Path, tmp_path: Path) -> None:
    """`gve fit` of the toy world on 2 ranks, base sharded and in chunks, against one process without either."""
    curves = []
    for ranks, words in (
        (1, ["--model.chunk_tokens", "0"]),
        (2, ["--model.chunk_tokens", "60", "--trainer.strategy", '{"class_path": "gve.model.sharding.ShardedBase"}']),
    ):
        out = tmp_path / f"ranks{ranks}"
        command = [sys.executable, "-m", "gve", "fit", "--config", str(recipe), "--trainer.default_root_dir", str(out)]
        command += ["--model.lora.dropout", "0", "--trainer.devices", str(ranks), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        events = EventAccumulator(str(out / "tensorboard"), {"scalars": 0}).Reload()
        curves.append([[e.value for e in events.Scalars(tag)] for tag in ("train/loss", "val/loss")])
    assert len(curves[0][0]) == 12
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=2e-3)


def validate(recipe: Path, out: Path, ranks: int) -> bytes:
    """uvrb.json of `gve validate` of the bare base on so many gloo ranks."""
    command = [sys.executable, "-m", "gve", "validate", "--config", str(recipe), "--uvrb.ablations", "[static]"]
    command += ["--trainer.default_root_dir", str(out), "--trainer.devices", str(ranks)]
    command += ["--trainer.strategy", "ddp" if ranks > 1 else "auto"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return (out / "uvrb.json").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_score_as_one(recipe: Path, tmp_path: Path) -> None:
    """The same bytes: batches are made before ranks are dealt theirs, so not one similarity rounds otherwise."""
    one, two = (validate(recipe, tmp_path / f"ranks{ranks}", ranks) for ranks in (1, 2))
    assert one == two
    sets = json.loads(one)["sets"]
    assert len(sets) == 16
    assert all(row["complete"] and 0 <= row["ablations"]["static"] <= 1 for row in sets.values())
