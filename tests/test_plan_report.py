"""`gve plan`: counts against the real model, expectations against the real plan, a logged curriculum drawn again."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gve.cli import main
from gve.data.curriculum import Curriculum
from gve.data.datamodule import PyramidDataModule
from gve.data.mixture import mixture
from gve.data.plan import EpochPlan, PlannedSource
from gve.data.sources import open_sources
from gve.inputs import InputBuilder, InputPolicy
from gve.items import EmbedBatch, InputError
from gve.lightning_cli import parse
from gve.model.backbone import Backbone, Lora
from gve.plan_report.costs import (
    Architecture,
    Pictures,
    Sequences,
    Training,
    decoder_flops,
    kept_bytes,
    step_flops,
    step_memory,
    total,
    tower_flops,
)
from gve.plan_report.draws import convert_scores, draw_epochs, expected_steps
from gve.plan_report.lengths import Assumptions, Lengths

ROOT = Path(__file__).resolve().parent.parent
# Two grid steps of 10 x 12 patches: windows of 8 x 8 are cut at both edges.
ROWS, LENGTH, GRID = 3, 96, (2, 10, 12)
CONFIG = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "bos_token_id": None,
        "eos_token_id": 59,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def clips() -> EmbedBatch:
    """Three rows of one clip and some text, without padding."""
    tokens = GRID[0] * GRID[1] * GRID[2] // 4
    row = [1, 62, *[61] * tokens, 63]
    ids = torch.tensor([row + [5] * (LENGTH - len(row))] * ROWS)
    return EmbedBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(LENGTH).expand(3, ROWS, LENGTH).contiguous(),
        pool_index=torch.full((ROWS,), LENGTH - 1),
        content_ids=torch.arange(ROWS),
        valid=torch.ones(ROWS, dtype=torch.bool),
        video_patches=torch.zeros(ROWS * tokens * 4, 3 * 2 * 14 * 14, dtype=torch.uint8),
        video_grid=torch.tensor([GRID] * ROWS),
        video_keys=tuple("abc"),
    )


@pytest.mark.parametrize(("size", "trained"), [("3B", 27_574_272), ("7B", 37_158_912)])
def test_parameters_of_the_published_sizes(size: str, trained: int) -> None:
    """Hand formulas against the parameters of the real model on the meta device, part by part."""
    with torch.device("meta"):
        backbone = Backbone.from_pretrained(f"qwen2_5_vl_{size.lower()}", lora=Lora(), from_scratch=True)
    real = {"tower": 0, "embedding": 0, "decoder": 0, "lora": 0}
    for name, parameter in backbone.named_parameters():
        kinds = (("lora", ".lora_"), ("tower", ".visual."), ("embedding", "embed_tokens"), ("decoder", ""))
        real[next(kind for kind, part in kinds if part in name)] += parameter.numel()
    sizes = Architecture.of(f"Qwen/Qwen2.5-VL-{size}-Instruct")
    assert {**sizes.parameters(), "lora": sizes.lora_parameters(16, Lora().targets)} == real
    assert real["lora"] == trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(tiny: str, checkpointing: bool) -> None:
    """Eager attention computes the masked half too (twice ours) and keeps its scores (backward 2, not 2.5, times)."""
    how = Training(rank=8, dropout=False, dtype_bytes=4, checkpointing=checkpointing)
    sizes, batch, rows = Architecture.of(tiny), clips(), Sequences(ROWS, LENGTH)
    backbone = Backbone.from_pretrained(
        tiny,
        lora=Lora(rank=8, dropout=0.0),
        from_scratch=True,
        attention="eager",
        gradient_checkpointing=checkpointing,
    )
    with FlopCounterMode(display=False) as seeing:
        features = backbone.media_features(batch)
    with FlopCounterMode(display=False) as embedding:
        backbone(batch, features)
    with FlopCounterMode(display=False) as training:
        backbone(batch, features).sum().backward()
    tower, forward = tower_flops(sizes, Pictures(ROWS, GRID)), decoder_flops(sizes, rows, how)
    assert seeing.get_total_flops() == total(tower)
    assert embedding.get_total_flops() == forward["linear"] + forward["lora"] + 2 * forward["attention"]
    step = step_flops(sizes, [rows], [], how)
    again = 3 / 4 if checkpointing else 0  # of the four layers, all but the last
    eager = (2 * (1 + 2 + again) - (1 + 2.5 + again)) * forward["attention"]
    # Recomputing stops short of the second LoRA factor of each layer's down_proj, which no one needs.
    spared = 3 * 2 * ROWS * LENGTH * 8 * 128 if checkpointing else 0
    assert training.get_total_flops() == total(step) + eager - spared
    # Negative control: the other setting does not fit.
    other = step_flops(sizes, [rows], [], replace(how, checkpointing=not checkpointing))
    assert abs(total(other) / total(step) - 1) > 0.2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_activations_are_those_that_autograd_saves(tiny: str, checkpointing: bool, dropout: float) -> None:
    """Distinct storages that autograd saves in a forward pass, the base's weights and features left out."""
    how = Training(rank=8, dropout=dropout > 0, dtype_bytes=4, checkpointing=checkpointing)
    sizes, batch = Architecture.of(tiny), clips()
    backbone = Backbone.from_pretrained(
        tiny, lora=Lora(rank=8, dropout=dropout), from_scratch=True, gradient_checkpointing=checkpointing
    )
    features = backbone.media_features(batch)
    given = {each.untyped_storage().data_ptr() for each in (*backbone.parameters(), *features.values())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(batch, features)
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in given)
    # On CPU dropout keeps its mask as float32; on a GPU, which the formula is for, as bytes.
    masked = Lora().targets[:3] if checkpointing else Lora().targets
    layers = {name: 1 if checkpointing else 4 - (name in Lora().targets[3:]) for name in masked}
    wider = 3 * ROWS * LENGTH * sum(sizes.adapted(name)[0] * count for name, count in layers.items())
    expected = kept_bytes(sizes, ROWS * LENGTH, how) + (wider if dropout else 0)
    assert kept == pytest.approx(expected, rel=0.05)
    assert kept != pytest.approx(
        kept_bytes(sizes, ROWS * LENGTH, replace(how, checkpointing=not checkpointing)), rel=0.5
    )


def test_grad_cache_bounds_activations_and_costs_a_forward_pass() -> None:
    sizes, batches = Architecture.of("qwen2_5_vl_3b"), [Sequences(64, 100.0), Sequences(64, 762.0)]
    clip = [Pictures(64, (4, 20, 36))]
    plain, cached = Training(), Training(chunk_tokens=8192)
    step, chunked = (step_flops(sizes, batches, clip, how) for how in (plain, cached))
    assert chunked["cached"] == step["forward"]
    assert total(chunked) == total(step) + step["forward"]
    large, small = (step_memory(sizes, batches, clip, how, pairs=64, world=32) for how in (plain, cached))
    # 55,168 tokens at once against 8,192.
    assert large["activations"] / small["activations"] == pytest.approx(55_168 / 8192, rel=0.15)
    assert small["features"] == large["features"]
    assert small["tower"] < large["tower"]


def test_lengths_are_those_of_the_batches(toy_world: Path) -> None:
    """Tokens and grids read from headers equal what the builder makes of the decoded rows."""
    policy = InputPolicy.from_dict({"max_frame_tokens": 9, "max_image_tokens": 9, "max_length": 200})
    lengths = Lengths(str(toy_world / "base"), policy, Assumptions())
    builder = InputBuilder.from_base(str(toy_world / "base"), policy)
    modalities = set()
    for source in open_sources(toy_world / "shards").values():
        query, target, negatives = lengths.measure(source, [0, 1], 1)
        pairs = [source.read(row) for row in (0, 1)]
        for side, items in ((query, [pair.query for pair in pairs]), (target, [pair.target for pair in pairs])):
            prepared = [builder.prepare(item) for item in items]
            assert side.tokens == np.mean([len(each.ids) for each in prepared])
            assert side.padded == max(len(each.ids) for each in prepared)
            assert side.grids == tuple(seen.grid for each in prepared for seen in (*each.images, *each.videos))
            modalities.add(items[0].modality)
        assert negatives == np.mean([min(len(pair.negatives), 1) for pair in pairs])
    assert modalities >= {"T", "I", "V", "TI", "TV"}


def planned(sizes: dict[str, tuple[str, int, int]]) -> list[PlannedSource]:
    return [PlannedSource(name, task, 1, batch, np.array([rows])) for name, (task, rows, batch) in sizes.items()]


def test_expected_steps_are_the_means_of_the_plan() -> None:
    """Means over 40 seeded epochs of the real plan, within 5 standard errors of a multinomial draw."""
    sources = planned({"a": ("T2V", 900, 4), "b": ("T2V", 100, 8), "c": ("T2T", 500, 16)})
    curriculum = Curriculum(sigma_first=0.5, sigma_last=0.5)
    (epoch,) = draw_epochs(curriculum, {"T2V": 1000, "T2T": 500}, 1, {0: {"T2V": 0.1, "T2T": 0.6}})
    # P(T2T) / P(T2V) = exp((0.6 - 0.1) / 0.5) = e
    assert epoch.probabilities["T2T"] == pytest.approx(math.e / (1 + math.e), abs=1e-9)
    steps = expected_steps(epoch, sources, "task", 500)
    drawn = np.zeros(3)
    for number in range(40):
        plan = EpochPlan(sources, seed=number, epoch=0, num_steps=500, weights=epoch.probabilities)
        drawn += np.bincount(plan.source_of, minlength=3)
    for count, source in zip(drawn / 40, sources, strict=True):
        share = steps[source.name] / 500
        assert abs(count - steps[source.name]) < 5 * math.sqrt(500 * share * (1 - share) / 40)
    assert abs(drawn[0] / 40 - steps["b"]) > 20  # negative control: another source's expectation fails


def test_scores_of_another_unit() -> None:
    sources = planned({"a": ("T2V", 300, 4), "b": ("T2V", 100, 4), "c": ("T2T", 50, 4)})
    by_task = convert_scores({"a": 0.4, "b": 0.8, "c": 0.1}, "source", "task", sources)
    assert by_task == pytest.approx({"T2V": (3 * 0.4 + 0.8) / 4, "T2T": 0.1})
    assert convert_scores(by_task, "task", "source", sources) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.1})
    with pytest.raises(InputError, match="no score for source b"):
        convert_scores({"a": 0.4, "c": 0.1}, "source", "task", sources)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *map(str, words), "--json"])
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_published_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """No shards, no weights, no network: sizes of the paper, lengths as assumed, sums by hand."""
    recipe = ROOT / "configs/gve_3b.yaml"
    report = run(capsys, recipe, "--data.root", "nowhere", "--data.dev_pairs", 0)
    sources = {source["name"]: source for source in report["sources"]}
    assert report["steps"] == 12_000
    assert report["machines"]["world"] == 32
    assert sum(sum(source["steps"]) for source in sources.values()) == pytest.approx(12_000, abs=1)
    # No scores: 13 tasks alike; WebVid has 5.4 of T2V's 9.683 M pairs and a global batch of 1,024.
    assert sum(entry.size_3b for entry in mixture().values() if entry.task == "T2V") == 9_683_000
    assert sources["webvid"]["passes_total"] == pytest.approx(12_000 / 13 * (5.4e6 / 9.683e6) * 1024 / 5.4e6, abs=1e-3)
    # 8 frames of 1280 x 720 at most 200 tokens: 280 x 504 px, so 4 grid steps of 20 x 36 patches: 720 tokens.
    assert sources["webvid"]["vision_tokens_per_step"] == 1024 * 720
    assert sources["webvid"]["tokens_target"] == 720 + 22
    assert (sources["pe_video"]["negatives_per_query"], sources["webvid"]["negatives_per_query"]) == (2048, 1023)
    # 2.77 G + 0.67 G + 0.31 G parameters in bfloat16.
    assert report["memory"]["weights"] == 2 * 3_754_622_976
    assert report["memory"]["peak"] == report["memory"]["peak_with_checkpointing"]
    assert report["memory"]["peak"] < 80e9 < report["memory"]["peak_without_checkpointing"]
    assert any("nights 72.7" in warning for warning in report["warnings"])
    hours = report["flops"]["total"] / (312e12 * 0.35) / 3600
    assert report["gpu_hours"] == pytest.approx(hours)
    assert report["wall_hours"] == pytest.approx(hours / 32)


def test_another_machine_keeps_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """One node instead of four: the same global batches and operations, four times the rows on a GPU."""
    recipe = ROOT / "configs/gve_3b.yaml"
    four, one = (run(capsys, recipe, "--nodes", nodes, "--data.root", "nowhere") for nodes in (4, 1))
    assert one["machines"]["world"] == 8
    assert one["pairs"] == four["pairs"]
    assert one["flops"]["total"] == pytest.approx(four["flops"]["total"])
    assert one["memory"]["activations"] == pytest.approx(4 * four["memory"]["activations"])
    assert one["warnings"][-1].startswith("a step of uvrd_tv2v needs about")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(recipe), "--nodes", "3"])
    assert end.value.code == 2
    assert "cannot be split over 24 GPUs" in capsys.readouterr().err


@pytest.fixture
def logged(recipe: Path, tmp_path: Path) -> tuple[Path, dict[str, dict[str, float]]]:
    """A curriculum.json as the probe writes it, made by the real DataModule from hand-set scores."""
    config = parse(["fit", "--config", str(recipe)])
    values = config.data.as_dict()
    values.pop("inputs", None)
    values["curriculum"] = Curriculum(**values["curriculum"])
    data = PyramidDataModule(**values, inputs=InputPolicy.from_dict(config.model.inputs.as_dict()))
    data.setup("fit")
    scores = {"0": {task: 0.1 + 0.05 * k for k, task in enumerate(data.tasks)}}
    scores["1"] = {task: 0.9 - 0.03 * k for k, task in enumerate(data.tasks)}
    for epoch in (0, 1):
        data.set_scores(epoch, scores[str(epoch)])
    path = tmp_path / "curriculum.json"
    epochs = [{**data.curriculum_record(epoch), "prober": "abc"} for epoch in (0, 1)]
    path.write_text(json.dumps({**data.curriculum_settings(), "epochs": epochs}))
    return path, scores


def test_a_logged_curriculum_is_drawn_again(
    recipe: Path, logged: tuple[Path, dict[str, dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, scores = logged
    same = run(capsys, recipe, "--replay", path, "--sample", 2)
    assert [entry["distance"] for entry in same["replay"]["epochs"]] == [0.0, 0.0]
    assert [epoch["sigma"] for epoch in same["epochs"]] == [0.1, 1.0]

    narrow = run(capsys, recipe, "--replay", path, "--sample", 0, "--sigma", "0.2:0.05")
    for epoch, sigma in ((0, 0.2), (1, 0.05)):
        weights = {task: math.exp(score / sigma) for task, score in scores[str(epoch)].items()}
        by_hand = {task: weight / sum(weights.values()) for task, weight in weights.items()}
        assert narrow["epochs"][epoch]["probabilities"] == pytest.approx(by_hand, abs=1e-6)
        assert narrow["replay"]["epochs"][epoch]["distance"] > 0.05

    other = tmp_path / "prober.json"
    other.write_text(json.dumps(dict.fromkeys(scores["0"], 0.5)))
    flat = run(capsys, recipe, "--replay", path, "--sample", 0, "--prober", other)
    assert set(flat["epochs"][0]["probabilities"].values()) == {round(1 / 13, 9)}
    assert flat["replay"]["epochs"][1]["distance"] == 0.0  # later epochs were scored by the run itself

    levels = run(capsys, recipe, "--replay", path, "--sample", 0, "--unit", "level")
    assert set(levels["epochs"][0]["probabilities"]) == {"1", "2", "3"}
    assert levels["replay"]["epochs"][0]["distance"] is None
    assert sum(levels["epochs"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_the_toy_run_is_planned_as_it_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real shards: sizes, tokens and negatives against what one epoch of the DataModule really yields."""
    report = run(capsys, recipe, "--sample", 10_000, "--data.steps_per_epoch", 30, "--data.dev_pairs", 0)
    config = parse(["fit", "--config", str(recipe), "--data.steps_per_epoch", "30", "--data.dev_pairs", "0"])
    values = config.data.as_dict()
    values["curriculum"] = Curriculum(**values["curriculum"])
    data = PyramidDataModule(**values, inputs=InputPolicy.from_dict(config.model.inputs.as_dict()))
    data.setup("fit")
    planned = {source["name"]: source for source in report["sources"]}
    assert set(planned) == set(data.sources)
    tokens = expected = 0.0
    for batch in data.train_dataloader():
        sides = [side for side in (batch.query, batch.target, batch.negatives) if side is not None]
        tokens += sum(int(side.attention_mask.sum()) for side in sides)
        expected += planned[batch.source]["tokens_per_step"]
    # Rows of a source differ in length: the mean of 30 steps of 4 pairs is within 5 %.
    assert tokens == pytest.approx(expected, rel=0.05)
    assert report["disk"]["shards"] == sum(path.stat().st_size for path in Path(config.data.root).rglob("*.tar"))


def test_bad_input_is_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "curriculum.json"
    broken.write_text('{"epochs": []}')
    for words, said in (
        (["--replay", str(broken)], "holds no epoch yet"),
        (["--replay", str(tmp_path / "none.json")], "cannot be read"),
        (["--mfu", "1.5"], "mfu 1.5"),
        (["--model.temprature", "1"], "temprature"),
    ):
        with contextlib.suppress(SystemExit):
            main(["plan", str(recipe), "--sample", "0", *words])
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
