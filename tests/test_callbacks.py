"""The evaluation callback inside real Lightning runs of a tiny model, and the record of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import av
import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from gve.callbacks import EvaluationInputs, RunRecord, UVRBEvaluation
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError, Item, TrainBatch
from gve.model.backbone import Lora
from gve.model.embedder import Optimizer, VideoEmbedder
from gve.toy.base import write_base
from gve.video import Sampling

POLICY = InputPolicy(sampling=Sampling.uniform(4))
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
INPUTS = EvaluationInputs(sampling=Sampling.uniform(4), max_length=256)


def write_clip(path: Path, colour: tuple[int, int, int]) -> None:
    """Eight frames of 56 x 56 that go from black to a colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for index in range(8):
            pixels = np.zeros((56, 56, 3), np.uint8) + (np.array(colour) * index // 7).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and two sets over four clips: one of texts, one composed with pools."""
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base", [f"it turns {name}" for name in COLOURS])
    (root / "uvrb" / "media").mkdir(parents=True)
    for name, colour in COLOURS.items():
        write_clip(root / "uvrb" / "media" / f"{name}.mp4", colour)
    corpus = [{"id": name, "video": f"../media/{name}.mp4"} for name in COLOURS]
    for set_name, extra in (("CRB-T", {}), ("MS-TV", {"candidates": list(COLOURS)})):
        queries = [{"id": f"q-{name}", "text": f"it turns {name}"} for name in COLOURS]
        if extra:
            queries = [query | {"video": "../media/red.mp4"} for query in queries]
        instances = [{"qid": f"q-{name}", "pos": [name], **extra} for name in COLOURS]
        folder = root / "uvrb" / set_name / "jsonl"
        folder.mkdir(parents=True)
        for listing, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
            (folder / f"{listing}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


class Steps(Dataset[TrainBatch]):
    """Three steps over the four clips and their texts, as the data module gives them."""

    def __init__(self, world: Path, seed: int = 0) -> None:
        builder = InputBuilder.from_base(str(world / "base"), POLICY)
        self.query = builder([Item.of(f"it turns {name}", instruction="Find the video.") for name in COLOURS])
        self.target = builder([Item.of(video=world / "uvrb" / "media" / f"{name}.mp4") for name in COLOURS])
        self.seed = seed

    def __len__(self) -> int:
        return 3

    def __getitem__(self, step: int) -> TrainBatch:
        rows = tuple((0, row) for row in range(4))
        index = torch.full((4, 0), -1)
        return TrainBatch(self.query, self.target, None, index, "T2V", "toy", 0, step, 100 * self.seed + step, rows)


class Watch(L.Callback):
    """Losses of the training steps, and the generator's state when validation ends."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.states.append(torch.get_rng_state())


def embedder(world: Path) -> VideoEmbedder:
    # The cache proves that features kept by an evaluation may be trained on.
    return VideoEmbedder(
        str(world / "base"), POLICY, Lora(rank=4, dropout=0.2), optimizer=Optimizer(lr=1e-2), feature_cache_mb=8
    )


def trainer(folder: Path, *callbacks: L.Callback, epochs: int = 2) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder, "tensorboard", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def loader(world: Path, seed: int = 0) -> DataLoader[TrainBatch]:
    return DataLoader(Steps(world, seed), batch_size=None)


def fit(world: Path, folder: Path, *callbacks: L.Callback, seed: int = 0) -> tuple[VideoEmbedder, Watch]:
    L.seed_everything(3, verbose=False)
    model, watch = embedder(world), Watch()
    trainer(folder, watch, *callbacks).fit(model, loader(world, seed), loader(world))
    return model, watch


class Run(NamedTuple):
    folder: Path
    model: VideoEmbedder
    watch: Watch


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return Run(folder, *fit(world, folder, UVRBEvaluation(str(world / "uvrb"), inputs=INPUTS), RunRecord()))


def test_evaluation_leaves_training_as_it_is(world: Path, tmp_path: Path, run: Run) -> None:
    _, without = fit(world, tmp_path / "without", UVRBEvaluation(None))
    assert run.watch.losses == without.losses
    assert len(without.losses) == 6
    assert all(torch.equal(a, b) for a, b in zip(run.watch.states, without.states, strict=True))
    assert not (tmp_path / "without" / "uvrb").exists()
    # Negative control: the losses are sensitive to dropout, so another seed of the steps shows.
    assert fit(world, tmp_path / "other", seed=1)[1].losses != without.losses


def test_fit_logs_and_writes_each_epoch(world: Path, run: Run) -> None:
    folder = run.folder
    assert sorted(path.name for path in (folder / "uvrb").iterdir()) == ["step_3.json", "step_6.json"]
    data = json.loads((folder / "uvrb" / "step_6.json").read_text())
    assert data["step"] == 6
    assert "untrained" not in data
    assert data["abilities"]["T"] is None  # CMRB is not there
    builder = InputBuilder.from_base(str(world / "base"), INPUTS.policy(POLICY))
    instruction = "Find the video according to the temporal description."
    with torch.no_grad():
        query = run.model.backbone.eval()(builder([Item.of(f"it turns {c}", instruction=instruction) for c in COLOURS]))
        target = run.model.backbone(builder([Item.of(video=world / "uvrb/media" / f"{c}.mp4") for c in COLOURS]))
    by_hand = (query @ target.T).argmax(1) == torch.arange(4)
    assert data["sets"]["CRB-T"]["value"] == by_hand.float().mean().item()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["uvrb/CRB-T/recall_at_1"][-1] == data["sets"]["CRB-T"]["value"]
    assert len(values["uvrb/MS-TV/precision_at_1"]) == 2
    assert len(events.Images("uvrb/radar")) == 2


def test_validate_reports_untrained_and_ablations(world: Path, tmp_path: Path) -> None:
    model = embedder(world)
    kinds = ["static", "shuffled", "black", "text_only", "media_only"]
    evaluation = UVRBEvaluation(str(world / "uvrb"), inputs=INPUTS, ablations=kinds, resamples=100, store=True)
    trainer(tmp_path, evaluation).validate(model, loader(world), verbose=False)
    data = json.loads((tmp_path / "uvrb.json").read_text())
    assert data["protocol"]["inputs"]["max_length"] == 256
    assert data["protocol"]["inputs"]["sampling"]["num_frames"] == 4
    assert set(data["sets"]["CRB-T"]["ablations"]) == set(data["sets"]["MS-TV"]["ablations"]) == set(kinds)
    # Equal pixels and times tie exactly, and so do queries without their text: chance on both sides.
    for kind in ("black", "text_only", "media_only"):
        assert data["sets"]["CRB-T"]["ablations"][kind] == 0.25
    # LoRA starts at zero, so the untrained row must equal the model's.
    assert data["untrained"]["sets"]["CRB-T"]["value"] == data["sets"]["CRB-T"]["value"]
    assert data["untrained"]["weights"] != data["weights"]
    assert {"report.md", "radar.png", "uvrb_positions.npz", "embeddings"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.rglob("*.tmp*"))
    # A checkpoint's steps are the evaluation's, in the file and in the curves.
    trained = trainer(tmp_path / "ckpt")
    trained.fit(model, loader(world), loader(world))
    trained.save_checkpoint(tmp_path / "a.ckpt")
    short = UVRBEvaluation(str(world / "uvrb"), ["CRB-T"], INPUTS, untrained=False, resamples=100)
    trainer(tmp_path / "ckpt", short).validate(embedder(world), loader(world), str(tmp_path / "a.ckpt"), verbose=False)
    assert json.loads((tmp_path / "ckpt" / "uvrb.json").read_text())["step"] == 6
    events = EventAccumulator(str(tmp_path / "ckpt" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("uvrb/CRB-T/recall_at_1")] == [6]


def test_training_after_an_evaluation(world: Path, tmp_path: Path, run: Run) -> None:
    L.seed_everything(3, verbose=False)
    model, watch = embedder(world), Watch()
    evaluation = UVRBEvaluation(str(world / "uvrb"), inputs=INPUTS, resamples=100)
    trainer(tmp_path, evaluation).validate(model, loader(world), verbose=False)
    # The model can train afterwards, on features that the evaluation has kept, as if it had never been evaluated.
    trainer(tmp_path / "then", watch).fit(model, loader(world), loader(world))
    assert watch.losses == run.watch.losses


def test_last_epoch_always_counts(world: Path, tmp_path: Path) -> None:
    fit(world, tmp_path / "a", UVRBEvaluation(str(world / "uvrb"), ["CRB-T"], inputs=INPUTS, every_n_epochs=5))
    assert [path.name for path in (tmp_path / "a" / "uvrb").iterdir()] == ["step_6.json"]


def test_bad_settings_stop_before_training(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ablation"):
        UVRBEvaluation(None, ablations=["blank"])
    with pytest.raises(InputError, match="no UVRB set"):
        UVRBEvaluation(None, sets=["nonsense"])
    with pytest.raises(InputError, match="no UVRB folder"):
        fit(world, tmp_path, UVRBEvaluation(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="cannot read"):
        fit(world, tmp_path, UVRBEvaluation(str(world / "uvrb"), sets=["CRB-G"]))


def test_run_record_keeps_every_attempt(world: Path, run: Run, tmp_path: Path) -> None:
    (attempt,) = json.loads((run.folder / "run.json").read_text())["attempts"]
    assert (attempt["stage"], attempt["status"], attempt["seed"], attempt["world_size"], attempt["step"]) == (
        *("fit", "done", 3, 1, 6),
    )
    assert attempt["versions"]["torch"] == torch.__version__
    assert attempt["start"] <= attempt["end"]
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(RuntimeError, match="planted"):
        fit(world, tmp_path, RunRecord(), Failing())
    fit(world, tmp_path, RunRecord())
    first, second = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert first["status"] == "RuntimeError: planted"
    assert second["status"] == "done"
    assert second["config"] == {"file": "config.yaml", "sha256": hashlib.sha256(b"a: 1\n").hexdigest()}


class Failing(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("planted")
