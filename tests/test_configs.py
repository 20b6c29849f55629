"""Every YAML of configs/ and experiments/ parses as the command line does it; the recipes build on the meta device."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gve import uvrb_cli
from gve.cli import COMMANDS
from gve.data.mixture import mixture
from gve.data.shards import ShardWriter
from gve.data.sources import open_sources
from gve.lightning_cli import parse
from gve.model.backbone import Backbone
from gve.model.embedder import VideoEmbedder

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
# Those of `gve synth` are no part of a training run; tests/test_synth_pipeline.py reads them.
PARTS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "synth")
PUBLISHED = [f"{variant}_{size}" for size in ("3b", "7b") for variant in ("gve_i", "gve_s", "gve")]
# Other commands have recipes of their own (gve toy base), which their own tests read.
OVERLAYS = sorted(
    path
    for path in (ROOT / "experiments").rglob("*.yaml")
    if {"model", "data", "trainer"} & set(yaml.safe_load(path.read_text()) or ())
    # Overlays of a sweep say only what they change; tests/test_experiments.py lays them over their recipes.
    and path.name not in ("toy.yaml", "temporal.yaml")
    and not (path.parent / "sweep.yaml").is_file()
)


def test_the_glob_sees_them() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", *PUBLISHED}
    assert {path.parent.name for path in PARTS} == {"data", "eval", "model", "trainer"}


@pytest.mark.parametrize("path", RECIPES + OVERLAYS, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_parse(path: Path) -> None:
    config = parse(["fit", "--config", str(path)])
    assert config.model.base
    assert config.data.base == config.model.base
    assert config.trainer.limit_train_batches == config.data.steps_per_epoch
    assert config.data.num_epochs == config.trainer.max_epochs
    assert config.data.seed == config.seed_everything


@pytest.mark.parametrize("path", PARTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_parts_parse(path: Path) -> None:
    part = {"eval": "uvrb"}.get(path.parent.name, path.parent.name)
    config = parse(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), f"--{part}", str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        if not isinstance(value, dict):
            assert config[part][name] == value, f"{path.name} says {name}: {value}, the run takes {config[part][name]}"


def test_the_overlay_of_order_alone() -> None:
    """It is laid over the quickstart: three sources, and hard negatives for one of them."""
    overlay = ROOT / "experiments" / "0001-toy-base" / "temporal.yaml"
    config = parse(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(overlay)])
    assert config.trainer.limit_train_batches == 250
    assert config.model.temperature == 0.1
    assert {name for name, rows in config.data.batch_size.items() if rows} == {
        "toy_temporal",
        "toy_event",
        "toy_camera",
    }
    assert config.data.negatives == {"default": 0, "toy_temporal": 3}


def test_the_readmes_fit_commands_parse() -> None:
    """Each `gve fit` line of the README, as a user would type it at the root of the project."""
    lines = re.findall(r"^(?:srun )?gve (fit .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        config = parse([str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(line)])
        assert config.model.dtype == "bfloat16"
        if "gpu1" in line:
            assert (config.trainer.devices, config.trainer.num_nodes, config.data.batch_size) == (1, 1, 64)


def test_the_readmes_uvrb_commands_parse() -> None:
    """Each `gve uvrb` line of the README; tests of their own run the commands on toy sets."""
    lines = re.findall(r"^gve uvrb (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    parsed = [uvrb_cli.parse(shlex.split(line, comments=True)) for line in lines]
    assert {own.command for own in parsed} == {"list", "prepare", "check", "run", "compare", "report"}
    grid = next(own for own in parsed if own.command == "run" and len(own.frames) > 1)
    assert (grid.frames, grid.tokens) == ([8, 16, 48], [200, 400, 800])


class _Parsed(Exception):
    """Ends a command once its words are understood."""


_depth = 0


def _stopping(method: Callable[..., Any]) -> Callable[..., Any]:
    """A parser's method that ends the command; those of sub-parsers, which it calls, return as ever."""

    def call(*args: Any, **options: Any) -> Any:
        global _depth
        _depth += 1
        try:
            found = method(*args, **options)
        finally:
            _depth -= 1
        if _depth:
            return found
        raise _Parsed

    return call


def test_the_readmes_other_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other `gve` line of the README, up to the moment at which its work would begin."""
    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, _stopping(getattr(argparse.ArgumentParser, method)))
    lines = re.findall(r"^gve (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    seen = set()
    for line in lines:
        name, *words = shlex.split(line, comments=True)
        if name in ("fit", "validate", "uvrb"):
            continue
        with pytest.raises(_Parsed):
            importlib.import_module(COMMANDS[name][0]).main(words)
        seen.add(name)
    assert {"shards", "mine", "plan", "synth", "slurm", "sweep", "export", "index", "search", "embed", "toy"} <= seen
    with pytest.raises(SystemExit):  # control: a word that no command knows
        importlib.import_module(COMMANDS["search"][0]).main(["videos.index", "a dog", "--hmtl", "hits.html"])


@pytest.mark.parametrize(("size", "trained"), [("3b", 27_574_272), ("7b", 37_158_912)])
def test_published_recipes_build(size: str, trained: int) -> None:
    """The recipe as published on the meta device: the LoRA parameters are those of a hand count.

    r (in + out) summed over q, k, v, gate, up, down: 3B: 36 layers, hidden 2048, 2 KV heads of 128, MLP 11,008;
    7B: 28 layers, hidden 3584, 4 KV heads of 128, MLP 18,944.
    """
    hidden, kv, mlp, layers = {"3b": (2048, 256, 11_008, 36), "7b": (3584, 512, 18_944, 28)}[size]
    assert trained == layers * 16 * (2 * hidden + 2 * (hidden + kv) + 3 * (hidden + mlp))
    config = parse(["fit", "--config", str(ROOT / f"configs/gve_{size}.yaml")])
    assert config.model.dtype == "bfloat16"
    assert sum(config.data.batch_size.values()) == 32 * (64 * 19 + 32 * 19)
    assert len(config.data.batch_size) == len(config.data.negatives) == 38
    with torch.device("meta"):
        model = VideoEmbedder(base=f"qwen2_5_vl_{size}", lora=config.model.lora, dtype="bfloat16", from_scratch=True)
        model.configure_model()
    assert isinstance(model.backbone, Backbone)
    assert model.backbone.dim == hidden
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_say_what_the_paper_says(name: str) -> None:
    """Table 9 and section 5 of the paper; GVE-i: no UVRD, no curriculum, GVE-s: UVRD, no curriculum, GVE: both."""
    config = parse(["fit", "--config", str(ROOT / f"configs/{name}.yaml")])
    assert config.model.base == f"Qwen/Qwen2.5-VL-{name[-2:].upper()}-Instruct"
    lora, optimizer, inputs = config.model.lora, config.model.optimizer, config.model.inputs
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert sorted(lora.targets) == ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.schedule) == (3e-5, 0.1, "cosine")
    assert (config.model.temperature, config.model.gradient_checkpointing) == (0.03, True)
    assert (inputs.sampling.kind, inputs.sampling.fps, inputs.sampling.num_frames) == ("fps", 1.0, 8)
    assert (inputs.max_frame_tokens, inputs.max_length) == (200, 1200)
    assert config.trainer.num_nodes * config.trainer.devices == 32
    assert (config.trainer.max_epochs, config.trainer.precision, config.seed_everything) == (3, "bf16-mixed", 42)
    trained = {source for source, batch in config.data.batch_size.items() if batch}
    assert len(trained) == (31 if name.startswith("gve_i") else 38)
    assert any(source.startswith("uvrd_") for source in trained) == (not name.startswith("gve_i"))
    curriculum = config.data.curriculum
    if name in ("gve_3b", "gve_7b"):
        assert (curriculum.schedule, curriculum.sigma_first, curriculum.sigma_last) == ("pyramid", 0.1, 1.0)
    else:
        assert curriculum.schedule == "uniform"


@pytest.fixture(scope="module")
def mixture_shards(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 38 sources by name, task, instruction and hard negatives, with a toy batch of pairs each."""
    root = tmp_path_factory.mktemp("mixture")
    toy = {source.record.task: source for source in open_sources(toy_world / "shards").values()}
    for row in mixture().values():
        count = row.global_batch // 512
        pairs = [toy[row.task].read(i) for i in range(count)]
        others = tuple(toy[row.task].read(count + j).target for j in range(row.negatives))
        level, instruction = row.level, row.instruction
        with ShardWriter(root, task=row.task, source=row.name, level=level, instruction=instruction) as writer:
            for pair in pairs:
                writer.write(replace(pair, query=replace(pair.query, instruction=""), negatives=others))
    return root


HARDWARE = {
    "trainer.accelerator": "cpu",
    "trainer.num_nodes": 1,
    "trainer.devices": 1,
    "trainer.strategy": "auto",
    "trainer.precision": "32-true",  # bfloat16 works on a CPU too, five times slower
    "model.dtype": "float32",
    "model.attention": "sdpa",
    "data.num_workers": 0,
    "data.batch_divisor": 512,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_train_three_steps(name: str, mixture_shards: Path, toy_world: Path, tmp_path: Path) -> None:
    """As published but for the backbone, the data, the hardware, and a 512th of the batch."""
    from gve.cli import main

    changes = {
        "model.base": toy_world / "base",
        "data.root": mixture_shards,
        "trainer.max_steps": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": tmp_path,
        **HARDWARE,
    }
    words = [str(word) for key, value in changes.items() for word in (f"--{key}", value)]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(ROOT / f"configs/{name}.yaml"), *words])
    assert end.value.code == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    record = json.loads((tmp_path / "curriculum.json").read_text())["epochs"][0]
    units = {"gve_3b": 13, "gve_7b": 13, "gve_i_3b": 31, "gve_i_7b": 31, "gve_s_3b": 38, "gve_s_7b": 38}[name]
    assert len(record["probabilities"]) == units
    assert len(record["scores"]) == (13 if units == 13 else 0), "the Modality Pyramid scores its tasks, others do not"
    if units != 13:  # in proportion to the pairs of a source: 4 where the batch is 2048, 2 where it is 1024
        sizes = {row.name: row.global_batch // 512 for row in mixture().values() if row.name in record["probabilities"]}
        shares = {source: size / sum(sizes.values()) for source, size in sizes.items()}
        assert record["probabilities"] == pytest.approx(shares, abs=1e-8)


def test_a_misspelt_key_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gve.cli import main

    bad = tmp_path / "bad.yaml"
    bad.write_text("model:\n  base: x\n  temprature: 0.1\n")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(bad)])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "temprature" in lines[0]
