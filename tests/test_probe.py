"""The prober: known cosines give the formula's mixture; the right weights score each epoch, alike on all ranks."""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gve.callbacks import probe
from gve.callbacks.probe import CHUNK, CurriculumProbe, mixture_figure, score_pairs, table
from gve.cli import main
from gve.data.datamodule import PyramidDataModule
from gve.data.probe import ProbePairs
from gve.data.shards import OFFSET, ShardWriter
from gve.encode.encoder import BackboneEncoder, Encoded, Transform
from gve.encode.pretrained import load_encoder
from gve.items import InputError, Item, Pair, TrainBatch

COSINES = {"T2T": 0.62, "I2T": 0.31, "TI2T": 0.48}


class StubProber:
    """Vectors by hand: a query is [1, 0], a target [c, sqrt(1 - c^2)] where c is written in its text."""

    dim = 2
    fingerprint = "stub"

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        cosines = np.array([float(item.text) if item.text[:2] in ("0.", "1.") else 1.0 for item in items])
        vectors = np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)
        failures = {row: "no such file" for row, item in enumerate(items) if item.text == "lost"}
        vectors[list(failures)] = np.nan
        return Encoded(vectors, failures)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks whose targets are cosines: half 0.1 above the mean of their task, half below."""
    root = tmp_path_factory.mktemp("shards")
    for task, mean in COSINES.items():
        with ShardWriter(root, task=task, source=f"of_{task.lower()}", samples_per_shard=50) as writer:
            for i in range(100):
                image = np.full((28, 28, 3), i, np.uint8) if "I" in task else None
                query = Item.of(f"query {i}" if task.startswith("T") else None, image)
                writer.write(Pair(query, Item.of(f"{mean + (-1) ** i * 0.1:.2f}")))
    return root


def data(root: Path, base: str, **changes: Any) -> PyramidDataModule:
    settings: dict[str, Any] = {"steps_per_epoch": 20000, "batch_size": 1, "num_workers": 0, "dev_pairs": 0}
    module = PyramidDataModule(str(root), base, **{**settings, **changes})
    module.setup()
    return module


def chi_square(counts: dict[str, int], shares: dict[str, float]) -> float:
    total = sum(counts.values())
    return sum((counts[unit] - total * share) ** 2 / (total * share) for unit, share in shares.items())


def test_known_cosines_give_the_mixture_of_the_formula(shards: Path, toy_world: Path) -> None:
    module = data(shards, str(toy_world / "base"))
    found = score_pairs(StubProber(), module.probe_pairs(100))
    # All 100 pairs: half 0.1 above, half 0.1 below. float32 of a cosine is off by up to 3e-8.
    assert {unit: result.score for unit, result in found.items()} == pytest.approx(COSINES, abs=1e-6)
    assert {result.pairs for result in found.values()} == {100}
    for epoch, sigma in ((0, 0.1), (1, 0.55), (2, 1.0)):
        module.set_scores(epoch, {unit: result.score for unit, result in found.items()})
        record = module.curriculum_record(epoch)
        total = sum(math.exp(cosine / sigma) for cosine in COSINES.values())
        shares = {unit: math.exp(cosine / sigma) / total for unit, cosine in COSINES.items()}
        assert record["sigma"] == pytest.approx(sigma, abs=1e-12)
        assert record["probabilities"] == pytest.approx(shares, abs=1e-6)
        # 13.82 is exceeded once in 1,000 seeds (chi-square, 2 degrees of freedom).
        assert sum(record["draws"].values()) == 20000
        assert chi_square(record["draws"], shares) < 13.82
        # Negative control: the same draws do not fit the mixture of a sigma half as large again.
        wrong = sum(math.exp(cosine / (1.5 * sigma)) for cosine in COSINES.values())
        others = {unit: math.exp(cosine / (1.5 * sigma)) / wrong for unit, cosine in COSINES.items()}
        assert chi_square(record["draws"], others) > 13.82


def test_unreadable_pairs_are_left_out_and_counted(shards: Path, toy_world: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    for path in (path for path in shards.rglob("*") if path.is_file()):
        (root / path.relative_to(shards)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(shards)).write_bytes(path.read_bytes())
    module = data(root, str(toy_world / "base"))
    source = module.opened["of_t2t"]
    for row in (3, 60, 61):  # one cosine above the mean, two below and above
        with open(root / source.record.shards[row // 50].file, "r+b") as file:
            file.seek(int(source.index[row, OFFSET]) + 515)
            file.write(b"\xff")
    one, two = (score_pairs(StubProber(), module.probe_pairs(100), num_workers=workers) for workers in (0, 2))
    assert one == two, "reading in workers changes nothing"
    # 97 pairs are left: rows 3 and 61 (-0.1) and 60 (+0.1) are gone, so 49 are above and 48 below.
    assert one["T2T"].score == pytest.approx(0.62 + 0.1 / 97, abs=1e-6)
    assert (one["T2T"].pairs, len(one["T2T"].unreadable), one["I2T"].unreadable) == (97, 3, ())
    assert all("not the ones indexed" in reason for reason in one["T2T"].unreadable)

    class Lost(ProbePairs):
        def __getitem__(self, number: int) -> Pair:
            return Pair(Item.of("q"), Item.of("lost"), key=f"gone_{number}")

    pairs = {**module.probe_pairs(4), "TI2T": Lost([(source, 0)], module.inputs.sampling)}
    with pytest.raises(InputError, match="no probe pair of TI2T can be read: gone_0: no such file"):
        score_pairs(StubProber(), pairs)


def test_a_value_that_is_not_finite_stops_the_run(shards: Path, toy_world: Path) -> None:
    class Broken(StubProber):
        def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
            return Encoded(np.full((len(items), 2), np.nan, np.float32))

    with pytest.raises(RuntimeError, match="cosine of nan for of_"):
        score_pairs(Broken(), data(shards, str(toy_world / "base")).probe_pairs(2))


# ------------------------------------------------------------------------------------------------------------ in a fit

EPOCHS, STEPS, PAIRS = 3, 4, 2
FIT = (
    *("--trainer.max_epochs", EPOCHS, "--data.steps_per_epoch", STEPS, "--data.curriculum.scores", "{}"),
    *("--data.dev_pairs", 0, "--checkpoint.monitor", "null"),  # without a validation, which is half of the time
    *("--probe.pairs", PAIRS, "--trainer.callbacks+=test_probe.Diary"),
)


class Diary(L.Callback):
    """Keeps the weights of every epoch's end, and what each step was fed."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, str, str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: TrainBatch, index: int
    ) -> None:
        self.steps.append((batch.epoch, batch.step, batch.task, batch.source, float(outputs["loss"])))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        trainer.save_checkpoint(root / "diary" / f"epoch{trainer.current_epoch}.ckpt")
        (root / "diary" / f"steps{trainer.global_rank}.json").write_text(json.dumps(self.steps))


def fit(recipe: Path, folder: Path, *words: Any) -> Path:
    command = ["fit", "--config", recipe, "--trainer.default_root_dir", folder, *FIT, *words]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    assert end.value.code == 0
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "curriculum.json").read_text())


def steps(folder: Path, rank: int = 0) -> list[list[Any]]:
    return json.loads((folder / "diary" / f"steps{rank}.json").read_text())


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(recipe, tmp_path_factory.mktemp("probed") / "run")


def test_logged_probabilities_follow_the_logged_scores(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    tasks = sorted(tag.split("/")[1] for tag in logged if tag.startswith("curriculum/") and tag.endswith("/score"))
    assert len(tasks) == 13
    kept = record(run)
    assert [epoch["epoch"] for epoch in kept["epochs"]] == list(range(EPOCHS))
    for epoch, sigma in enumerate((0.1, 0.55, 1.0)):
        at = epoch * STEPS
        scores = {task: logged[f"curriculum/{task}/score"][at] for task in tasks}
        total = sum(math.exp(score / sigma) for score in scores.values())
        shares = {task: math.exp(score / sigma) / total for task, score in scores.items()}
        found = kept["epochs"][epoch]
        for task in tasks:
            # TensorBoard keeps float32.
            assert logged[f"curriculum/{task}/probability"][at] == pytest.approx(shares[task], abs=1e-6)
            assert found["scores"][task] == pytest.approx(scores[task], abs=1e-7)
            assert found["probabilities"][task] == pytest.approx(shares[task], abs=1e-6)
        assert found["sigma"] == pytest.approx(sigma, abs=1e-12)
        spread = max(scores.values()) - min(scores.values())
        assert logged["curriculum/score_spread"][at] == pytest.approx(spread, abs=1e-6)
        # What was trained on is what the record says was drawn.
        drawn = Counter(task for e, _, task, *_ in steps(run) if e == epoch)
        assert found["draws"] == {task: drawn[task] for task in tasks}
        assert {logged[f"curriculum/{task}/draws"][at] == drawn[task] for task in tasks} == {True}
        assert found["pairs"] == dict.fromkeys(tasks, PAIRS)
    assert len({json.dumps(epoch["scores"]) for epoch in kept["epochs"]}) == EPOCHS
    assert len(events.Images("curriculum/mixture")) == 3
    text = events.Tensors("curriculum/table/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(f"| {task} |" in text for task in tasks)


def test_every_epoch_is_scored_by_the_weights_before_it(run: Path, recipe: Path) -> None:
    """The fingerprint, and the scores computed anew, pair by pair, from the checkpoint of that moment."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    probers = [epoch["prober"] for epoch in record(run)["epochs"]]
    ends = [load_encoder(str(run / "diary" / f"epoch{epoch}.ckpt")) for epoch in range(EPOCHS)]
    assert probers == [ends[0].untrained().fingerprint, ends[0].fingerprint, ends[1].fingerprint]
    assert len({*probers, ends[2].fingerprint}) == 4
    module = data(Path(settings["data"]["root"]), settings["model"]["base"], seed=7, inputs=ends[0].builder.policy)
    for epoch, encoder in ((0, ends[0].untrained()), (2, ends[1])):
        scores = record(run)["epochs"][epoch]["scores"]
        for task, pairs in module.probe_pairs(PAIRS).items():
            cosines = []
            for number in range(len(pairs)):
                pair = pairs[number]
                with torch.no_grad(), encoder._weights():
                    query, target = (encoder.backbone(encoder.builder([side])) for side in (pair.query, pair.target))
                cosines.append(float((query * target).sum()))
            assert scores[task] == pytest.approx(np.mean(cosines), abs=2e-6), task
    # Negative control: the epoch's own end would have given other scores.
    other = score_pairs(ends[2], module.probe_pairs(PAIRS))
    assert max(abs(other[task].score - score) for task, score in scores.items()) > 1e-4


def test_a_probe_leaves_training_as_it_is(recipe: Path, tmp_path: Path) -> None:
    """A uniform schedule takes no scores, so probing must change no loss."""
    uniform = ("--data.curriculum.schedule", "uniform", "--trainer.max_epochs", 2)
    off = fit(recipe, tmp_path / "off", *uniform)
    on = fit(recipe, tmp_path / "on", *uniform, "--probe.enabled", "true", "--probe.num_workers", 1)
    assert steps(on) == steps(off)
    assert [len(epoch["scores"]) for epoch in record(on)["epochs"]] == [13, 13]
    assert [(epoch["scores"], epoch["prober"]) for epoch in record(off)["epochs"]] == [({}, "")] * 2
    assert record(on)["epochs"][1]["probabilities"] == record(off)["epochs"][1]["probabilities"]


class Power(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["inside the probe", pytest.param("in mid epoch", marks=pytest.mark.slow)])
def test_a_killed_run_repeats_its_probe(
    when: str, run: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = BackboneEncoder.encode, Counter[str]()

    def die(*words: Any, **named: Any) -> Encoded:
        calls["encode"] += 1
        if calls["encode"] == 13 + 5:  # one call a task: in the probe before the second epoch
            raise Power
        return encode(*words, **named)

    def die_in_step(*words: Any) -> None:
        calls["step"] += 1
        if calls["step"] == STEPS + 3:
            raise Power

    with monkeypatch.context() as patched:
        if when == "inside the probe":
            patched.setattr(BackboneEncoder, "encode", die)
        else:
            patched.setattr(Diary, "on_train_batch_start", die_in_step)
        with pytest.raises(Power):
            fit(recipe, tmp_path / "run", "--checkpoint.every_n_train_steps", 1)
    assert len(record(tmp_path / "run")["epochs"]) == (1 if when == "inside the probe" else 2)
    (tmp_path / "run" / "curriculum.json").unlink()
    fit(recipe, tmp_path / "run", "--checkpoint.every_n_train_steps", 1, "--ckpt_path", "auto")
    assert record(tmp_path / "run") == record(run)
    resumed = steps(tmp_path / "run")
    assert resumed == steps(run)[-len(resumed) :]
    assert len(resumed) == (2 * STEPS + 1 if when == "inside the probe" else STEPS + 2)


def test_a_checkpoint_may_score_first(run: Path, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    one = ("--trainer.max_epochs", 1)
    scored = fit(recipe, tmp_path / "run", *one, "--probe.prober", run / "diary" / "epoch0.ckpt")
    assert record(scored)["epochs"][0]["prober"] == record(run)["epochs"][1]["prober"]
    assert record(scored)["epochs"][0]["scores"] == record(run)["epochs"][1]["scores"]
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    command = ["fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "refused", *FIT]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in [*command, "--probe.prober", tmp_path / "broken.ckpt"]])
    assert end.value.code == 2
    assert "broken.ckpt is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def rank_main(rank: int, port: int, recipe: Path, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"NODE_RANK": "0"}
    torch.set_num_threads(1)
    given = probe.CurriculumProbe._probe

    def kept(self: CurriculumProbe, *words: Any) -> dict[str, Any]:
        found = given(self, *words)
        (folder / f"probe{rank}.{words[-1]}.json").write_text(json.dumps([found, words[2]._state.scores]))
        return found

    probe.CurriculumProbe._probe = kept  # type: ignore[method-assign]
    fit(recipe, folder, "--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_epochs", 2)


@pytest.mark.timeout(180)
def test_two_ranks_share_the_probe_and_agree(run: Path, recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: a spawned rank would import torch and Lightning again.
    mp.start_processes(rank_main, (port, recipe, tmp_path), nprocs=2, start_method="fork")
    for epoch in range(2):
        one, other = (json.loads((tmp_path / f"probe{rank}.{epoch}.json").read_text()) for rank in range(2))
        assert one == other
    first, second = ([step[:4] for step in steps(tmp_path, rank)] for rank in range(2))
    assert first == second, "all ranks train on the same task and source at every step"
    assert len(first) == 2 * STEPS
    # The untrained scores are those of one rank to the last digit: what shares a batch does not depend on the ranks.
    assert record(tmp_path)["epochs"][0]["scores"] == record(run)["epochs"][0]["scores"]


def test_chunks_are_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks by hand: each encodes its chunks only, and together they give what one rank finds."""
    pairs = {
        unit: [Pair(Item.of("q"), Item.of(f"{mean + i / 1000:.3f}"), key=f"{i}") for i in range(CHUNK + 6)]
        for unit, mean in COSINES.items()
    }
    alone = score_pairs(StubProber(), pairs)  # type: ignore[arg-type]
    shares: list[dict[Any, Any]] = []
    for rank in range(3):
        monkeypatch.setattr(probe, "_share", lambda encoder, rank=rank: (rank, 3))
        monkeypatch.setattr(probe.dist, "all_gather_object", lambda parts, own: shares.append(own))
        with pytest.raises(InputError, match="no probe pair"):  # nothing was gathered
            score_pairs(StubProber(), pairs)  # type: ignore[arg-type]
    assert [sorted(share) for share in shares] == [
        [("I2T", 0), ("T2T", CHUNK)],
        [("I2T", CHUNK), ("TI2T", 0)],
        [("T2T", 0), ("TI2T", CHUNK)],
    ]
    monkeypatch.setattr(probe.dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), shares))
    assert score_pairs(StubProber(), pairs) == alone  # type: ignore[arg-type]


def test_picture_and_table_of_a_curriculum() -> None:
    epochs = [
        {
            "epoch": epoch,
            "mixture": {"T2T": share, "T2V": 1 - share},
            "scores": {"T2T": 0.5} if epoch else {},
            "probabilities": {"T2T": share},
            "draws": {"T2T": 10 * epoch},
        }
        for epoch, share in enumerate((0.75, 0.5))
    ]
    axes = mixture_figure(epochs, 40).axes[0]
    assert axes.get_xlim() == (0, 80)
    top = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections]
    assert top == pytest.approx([0.75, 1.0])
    assert table(epochs).splitlines() == [
        "| unit | epoch 0: R / P / draws | epoch 1: R / P / draws |",
        "| --- | --- | --- |",
        "| T2T | - / 0.7500 / 0 | 0.5000 / 0.5000 / 10 |",
    ]


def test_settings() -> None:
    for name in ("pairs", "batch_tokens"):
        with pytest.raises(InputError, match=f"probe.{name} is 0"):
            CurriculumProbe(**{name: 0})
    with pytest.raises(TypeError, match="VideoEmbedder"):
        CurriculumProbe().encoder(0, L.LightningModule())
