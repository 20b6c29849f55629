"""Every YAML of configs/ and experiments/ parses as the command line does it; the recipes build on the meta device."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from gve.lightning_cli import parse
from gve.model.backbone import Backbone
from gve.model.embedder import VideoEmbedder

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))
OVERLAYS = sorted((ROOT / "experiments").rglob("*.yaml"))


def test_the_glob_sees_them() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "gve_3b", "gve_7b"}
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


def test_the_readmes_fit_commands_parse() -> None:
    """Each `gve fit` line of the README, as a user would type it at the root of the project."""
    lines = re.findall(r"^(?:srun )?gve (fit .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        config = parse([str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(line)])
        assert config.model.dtype == "bfloat16"
        if "gpu1" in line:
            assert (config.trainer.devices, config.trainer.num_nodes, config.data.batch_size) == (1, 1, 64)


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
