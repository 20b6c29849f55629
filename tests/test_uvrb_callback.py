"""Ablations at evaluation time and their cells; evaluation beside training leaves no trace in it.

The model is a tiny one of the real class whose adapters are not zero, the sets are three over four clips.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch.utils.data import DataLoader

import runs
from gve.callbacks import EvaluationInputs, UVRBEvaluation
from gve.encode.encoder import BackboneEncoder, Encoded
from gve.encode.store import EmbeddingStore
from gve.eval.ablation import GENERIC_INSTRUCTION, PLAIN, Ablation, parse_ablations, same_inputs
from gve.eval.cells import CELLS_CSV, CELLS_JSON, Condition, ablation_cells, read_cells, score_ablation, write_cells
from gve.eval.evaluation import evaluate
from gve.eval.report import report
from gve.eval.results import Results
from gve.eval.uvrb import RetrievalSet, UVRBReader
from gve.inputs import InputBuilder, InputPolicy
from gve.items import Image, InputError, Item, Text
from gve.lightning_cli import parse
from gve.model.backbone import Backbone, Lora
from gve.model.embedder import VideoEmbedder
from gve.toy.base import write_base
from gve.video import Sampling
from test_callbacks import COLOURS, loader, trainer, write_clip
from test_uvrb import Constant, oracle, write_world

ROOT = Path(__file__).resolve().parent.parent
POLICY = InputPolicy(sampling=Sampling.uniform(4), max_frame_tokens=4, max_image_tokens=4, max_length=300)
INSTRUCTION = "Find the video according to the temporal description."
INPUTS = EvaluationInputs(Sampling.uniform(4), max_frame_tokens=4, max_length=300)
# Configuration -> name of its rows, changed policy, instruction of the queries, adapters: written out by hand.
CONDITIONS: list[tuple[Any, str, dict[str, Any], str | None, bool]] = [
    ({"frames": 2}, "frames=2", {"sampling": Sampling.uniform(2)}, None, True),
    ({"tokens": 1}, "tokens=1", {"max_frame_tokens": 1, "min_frame_tokens": 1}, None, True),
    (
        {"tokens": 2, "sampling": "fps(6,8)"},
        "sampling=fps(6,8) tokens=2",
        {"sampling": Sampling.every(6.0, 8), "max_frame_tokens": 2, "min_frame_tokens": 2},
        None,
        True,
    ),
    ({"prompt": "none"}, "prompt=none", {}, "", True),
    ({"prompt": "generic"}, "prompt=generic", {}, GENERIC_INSTRUCTION, True),
    ({"prompt": "What turns?", "name": "asked"}, "asked", {}, "What turns?", True),
    ({"target_text": "a clip"}, "target_text=a clip", {"target_text": "a clip"}, None, True),
    ({"append_eos": False}, "append_eos=off", {"append_eos": False}, None, True),
    ({"system_prompt": "Look."}, "system_prompt=Look.", {"system_prompt": "Look."}, None, True),
    ({"adapters": False}, "adapters=off", {}, None, False),
    ({"adapters": False, "frames": 2}, "adapters=off frames=2", {"sampling": Sampling.uniform(2)}, None, False),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and CRB-T (text), MS-TI and MS-TV (composed, in pools) over the same four clips."""
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base", [f"it turns {name}" for name in COLOURS])
    media = root / "uvrb" / "media"
    media.mkdir(parents=True)
    for name, colour in COLOURS.items():
        write_clip(media / f"{name}.mp4", colour)
    Picture.fromarray(np.random.default_rng(0).integers(0, 255, (112, 84, 3)).astype(np.uint8)).save(media / "a.png")
    corpus = [{"id": name, "video": f"../media/{name}.mp4"} for name in COLOURS]
    shown = {"CRB-T": {}, "MS-TI": {"image": "../media/a.png"}, "MS-TV": {"video": "../media/red.mp4"}}
    for set_name, medium in shown.items():
        queries = [{"id": f"q-{name}", "text": f"it turns {name}"} | medium for name in COLOURS]
        instances = [{"qid": f"q-{name}", "pos": [name], "candidates": list(COLOURS)} for name in COLOURS]
        folder = root / "uvrb" / set_name / "jsonl"
        folder.mkdir(parents=True)
        for listing, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
            (folder / f"{listing}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def perturb(backbone: Backbone, seed: int = 1) -> Backbone:
    """LoRA starts at zero: without this the adapters would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in backbone.trainable_state().items():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return backbone


@pytest.fixture(scope="module")
def backbone(world: Path) -> Backbone:
    return perturb(Backbone.from_pretrained(str(world / "base"), lora=Lora(rank=4))).eval()


@pytest.fixture(scope="module")
def sets(world: Path) -> list[RetrievalSet]:
    reader = UVRBReader(world / "uvrb")
    return [reader.read(name) for name in reader.names()]


def builder(world: Path, policy: InputPolicy) -> InputBuilder:
    return InputBuilder.from_base(str(world / "base"), policy)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """What the encoders of this process are asked to encode; they do encode it."""
    seen: list[Item] = []
    real = BackboneEncoder.encode

    def encode(self: BackboneEncoder, items: Sequence[Item], **rest: Any) -> Encoded:
        seen.extend(items)
        return real(self, items, **rest)

    monkeypatch.setattr(BackboneEncoder, "encode", encode)
    return seen


# ---------------------------------------------------------------------------------------------------- one ablation


@pytest.mark.parametrize(("spec", "name", "changes", "instruction", "adapters"), CONDITIONS, ids=lambda v: str(v)[:30])
def test_an_ablation_is_read_from_a_configuration(
    spec: Any, name: str, changes: dict[str, Any], instruction: str | None, adapters: bool
) -> None:
    ablation = Ablation.parse(spec)
    assert (ablation.name, ablation.shown, ablation.instruction, ablation.adapters) == (name, "", instruction, adapters)
    assert ablation.policy(POLICY) == POLICY.replace(**changes)


def test_names_do_not_depend_on_the_order_of_keys() -> None:
    first, second = Ablation.parse({"frames": 16, "tokens": 4}), Ablation.parse({"tokens": 4, "frames": 16})
    assert first.name == second.name == "frames=16 tokens=4"
    assert Ablation.parse("static").name == Ablation.parse({"shown": "static"}).name == "static"
    # The plain run's kind of sampling and floor of tokens stay where they can.
    trained = InputPolicy(sampling=Sampling.every(1.0, 8), min_frame_tokens=3)
    assert first.policy(trained).sampling == Sampling.every(1.0, 16)
    assert first.policy(trained).min_frame_tokens == 3


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["blank"], "no ablation is called 'blank'"),
        ([{"shown": "blank"}], "no ablation is called 'blank'"),
        ([{"frame": 8}], "unknown key 'frame'; known: name, shown"),
        ([{"padding_side": "left"}], "unknown key 'padding_side'"),
        ([{"frames": "8"}], "frames='8' must be of type int"),
        ([{"adapters": 0}], "adapters=0 must be of type bool"),
        ([{"append_eos": "off"}], "append_eos='off' must be of type bool"),
        ([{"prompt": None}], "prompt=None must be of type str"),
        ([{"frames": 7}], "7 frames"),
        ([{"sampling": "all"}], "sampling 'all' is unknown"),
        ([{"positions": "none"}], "inputs.positions='none'"),
        ([{"name": "x"}], "ablation 'x' changes nothing"),
        ([{"shown": "media_only", "prompt": "none"}], "leaves nothing of a query"),
        (["static", {"shown": "static"}], "two ablations are called 'static'"),
        ([{"frames": 4, "name": "plain"}], "two ablations are called 'plain'"),
    ],
)
def test_bad_ablations_stop_before_anything_runs(specs: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", "\\(")):
        UVRBEvaluation(None, ablations=specs)


def test_an_ablation_that_the_policy_forbids_stops_at_setup(world: Path, tmp_path: Path) -> None:
    evaluation = UVRBEvaluation(str(world / "uvrb"), inputs=INPUTS, ablations=[{"max_image_tokens": 3}])
    with pytest.raises(InputError, match="min_image_tokens=4"):
        validate(world, tmp_path, evaluation)


KINDS = {
    "query": Item.of("it turns red", instruction="Find."),
    "text": Item.of("it turns red"),
    "image": Item((Image(np.full((60, 80, 3), 9, np.uint8)),)),
    "image query": Item((Image(np.full((60, 80, 3), 9, np.uint8)), Text("it turns red")), "Find."),
}
REACHED = {
    "sampling": {"clip", "clip query"},
    "max_frame_tokens": {"clip", "clip query"},
    "times": {"clip", "clip query"},
    "max_image_tokens": {"image", "image query"},
    "positions": {"clip", "clip query", "image", "image query"},
    "target_text": {"clip", "image"},
    "max_length": {*KINDS, "clip", "clip query"},
    "system_prompt": {*KINDS, "clip", "clip query"},
    "append_eos": {*KINDS, "clip", "clip query"},
}
OTHER = {
    "sampling": Sampling.uniform(6),
    "max_frame_tokens": 4,
    "times": "timestamps",
    "max_image_tokens": 4,
    "positions": "transformers5",
    "target_text": "a clip",
    "max_length": 100,
    "system_prompt": "Look.",
    "append_eos": False,
}


@pytest.mark.parametrize("key", REACHED)
def test_only_what_a_policy_reaches_is_encoded_again(key: str, world: Path) -> None:
    """Against the real renderer: where `same_inputs` says so, ids, positions and patches are equal."""
    red = world / "uvrb" / "media" / "red.mp4"
    kinds = {**KINDS, "clip": Item.of(video=red), "clip query": Item.of("it turns red", video=red, instruction="Find.")}
    plain = InputPolicy(sampling=Sampling.uniform(4), min_frame_tokens=1, min_image_tokens=1, max_length=300)
    other = plain.replace(**{key: OTHER[key]})
    assert {kind for kind, item in kinds.items() if not same_inputs(item, plain, other)} == REACHED[key]
    assert all(same_inputs(item, plain, plain) for item in kinds.values())
    changed = set()
    for kind, item in kinds.items():
        one, two = (builder(world, policy).prepare(item) for policy in (plain, other))
        pairs = [(one.ids, two.ids), (one.positions, two.positions)]
        pairs += [
            (a.patches, b.patches) for a, b in zip((*one.images, *one.videos), (*two.images, *two.videos), strict=True)
        ]
        if not all(torch.equal(a, b) for a, b in pairs):
            changed.add(kind)
    assert changed <= REACHED[key]
    if key not in ("max_length", "max_frame_tokens", "max_image_tokens", "times", "positions"):
        assert changed == REACHED[key]  # the others change nothing on items as short and small as these


# --------------------------------------------------------------------------------------- what a model scores under it


def run_ablation(
    world: Path, backbone: Backbone, sets: list[RetrievalSet], ablation: Ablation, **rest: Any
) -> Condition:
    encoder = BackboneEncoder(backbone, builder(world, POLICY))
    encoder = encoder if ablation.adapters else encoder.untrained()
    return score_ablation(ablation, encoder, sets, EmbeddingStore(None, encoder.fingerprint), **rest)


def cosines(condition: Condition, name: str) -> np.ndarray:
    """[Q, C] from the ranked lists."""
    score = condition.scores[name]
    out = np.full((len(score.nearest), len(COLOURS)), np.nan)
    np.put_along_axis(out, score.nearest[:, : len(COLOURS)], score.similarities[:, : len(COLOURS)], 1)
    return out


@pytest.fixture(scope="module")
def plain(world: Path, backbone: Backbone, sets: list[RetrievalSet]) -> Condition:
    return run_ablation(world, backbone, sets, Ablation(PLAIN))


@pytest.mark.parametrize(("spec", "name", "changes", "instruction", "adapters"), CONDITIONS, ids=lambda v: str(v)[:30])
def test_the_score_is_that_of_the_changed_inputs(
    spec: Any,
    name: str,
    changes: dict[str, Any],
    instruction: str | None,
    adapters: bool,
    world: Path,
    backbone: Backbone,
    sets: list[RetrievalSet],
    plain: Condition,
) -> None:
    """Cosines against items built and embedded here, step by step; negative control: they are not the plain run's."""
    condition = run_ablation(world, backbone, sets, Ablation.parse(spec))
    own = builder(world, POLICY.replace(**changes))
    media = world / "uvrb" / "media"
    shown: dict[str, dict[str, Path]] = {
        "CRB-T": {},
        "MS-TI": {"image": media / "a.png"},
        "MS-TV": {"video": media / "red.mp4"},
    }
    for tested in sets:
        asks = tested.record.instruction if instruction is None else instruction
        queries = [
            Item.of(f"it turns {clip}", instruction=asks, **shown[tested.record.name])  # type: ignore[arg-type]
            for clip in COLOURS
        ]
        with torch.no_grad():
            if adapters:
                query, target = (backbone(own(items)) for items in (queries, tested.corpus))
            else:
                with backbone.adapters_off():
                    query, target = (backbone(own(items)) for items in (queries, tested.corpus))
        expected = (query @ target.T).numpy()
        np.testing.assert_allclose(cosines(condition, tested.record.name), expected, atol=5e-6)
        assert np.abs(cosines(plain, tested.record.name) - expected).max() > 1e-4
        hits = (expected.argmax(1) == np.arange(len(COLOURS))).astype(float)
        assert condition.scores[tested.record.name].value == hits.mean()


def test_nothing_that_equals_the_plain_run_is_encoded_again(
    world: Path, backbone: Backbone, sets: list[RetrievalSet], asked: list[Item], tmp_path: Path
) -> None:
    encoder = BackboneEncoder(backbone, builder(world, POLICY))
    store = EmbeddingStore(tmp_path, encoder.fingerprint)

    def encoded(spec: Any) -> list[str]:
        """Modalities of what the ablation has encoded."""
        asked.clear()
        score_ablation(Ablation.parse(spec), encoder, sets, store, folder=tmp_path)
        return sorted(item.modality for item in asked)

    score_ablation(Ablation(PLAIN), encoder, sets, store)
    clips, texts, images, composed = ([letters] * 4 for letters in ("V", "T", "TI", "TV"))
    assert sorted(item.modality for item in asked) == sorted([*clips, *texts, *images, *composed])
    assert encoded({"frames": 4}) == []
    assert encoded({"frames": 2}) == sorted([*clips, *composed])
    assert encoded({"frames": 2}) == []  # kept on disk under its own fingerprint
    assert encoded({"tokens": 2, "frames": 8}) == sorted([*clips, *composed])
    assert encoded({"max_image_tokens": 5}) == images
    assert encoded({"target_text": "a clip"}) == clips
    assert encoded({"prompt": "none"}) == sorted([*texts, *images, *composed])
    assert encoded("reversed") == sorted([*clips, *composed])
    assert encoded({"append_eos": False}) == sorted([*clips, *texts, *images, *composed])


def test_what_cannot_be_read_is_named_under_an_ablation_too(
    world: Path, backbone: Backbone, sets: list[RetrievalSet]
) -> None:
    """An image that frames do not touch, and that the plain run could not read either."""
    (tested,) = (one for one in sets if one.record.name == "MS-TI")
    first, *rest = tested.queries
    gone = dataclasses.replace(first, parts=(Image(world / "gone.png"), Text(first.text)))
    broken = dataclasses.replace(tested, queries=(gone, *rest))
    condition = run_ablation(world, backbone, [broken], Ablation.parse({"frames": 2}))
    score = condition.scores["MS-TI"]
    assert score.unread == {str(world / "gone.png"): f"missing: {world / 'gone.png'} (No such file or directory)"}
    assert score.hits[0] == 0
    results = Results({"MS-TI": score}, resamples=50)
    assert [cell.complete for cell in ablation_cells(results, [condition])] == [False, False]
    assert " (incomplete)" in report(results, ablation_cells(results, [condition]))


# ---------------------------------------------------------------------------------------------------------------- cells


def test_cells_of_known_scores(tmp_path: Path) -> None:
    """An oracle against a constant encoder: by hand 1 against the expectation under ties, 1/15 or 2/15 in a pool.

    Q = 12, a third of the queries with two positives: R@1 over 20 clips is (8/20 + 4 * 2/20) / 12 = 1/15, P@1 over
    pools of ten 2/15, so CG = 1/15 and CMP = 2/15.
    """
    reader = UVRBReader(write_world(tmp_path / "uvrb"))
    names = ["MSRVTT", "DiDeMo", "CRB-G", "MS-TI", "MS-TV"]
    sets = [reader.read(name) for name in names]
    results = Results(evaluate(oracle(sets), sets), inputs={"max_length": 9}, weights_hash="a" * 64, resamples=500)
    constant = Condition(Ablation("frames=2"), evaluate(Constant(), sets), POLICY, "a" * 64)
    text_only = Condition(Ablation.parse("text_only"), evaluate(Constant(), sets[3:]), POLICY, "a" * 64)
    cells = {(cell.ablation, cell.on): cell for cell in ablation_cells(results, [constant, text_only])}
    assert [on for ablation, on in cells if ablation == PLAIN] == [*names, "CMP", "CG"]
    assert [on for ablation, on in cells if ablation == "text_only"] == ["MS-TI", "MS-TV", "CMP"]
    for on, expected in (("MSRVTT", 1 / 15), ("MS-TI", 2 / 15), ("CG", 1 / 15), ("CMP", 2 / 15)):
        whole, cell = cells[PLAIN, on], cells["frames=2", on]
        assert (whole.value, whole.difference, whole.difference_low) == (1.0, None, None)
        assert cell.value == pytest.approx(expected)
        assert cell.difference == pytest.approx(expected - 1)
        assert cell.low < cell.value < cell.high
        assert cell.difference_low <= cell.difference <= cell.difference_high < -0.8
        assert cell.n_query == {"CG": 36, "CMP": 24}.get(on, 12)
    # The protocol is the run's: other inputs, and what was not shown, are other protocols.
    hashes = [cells[name, "MS-TI"].protocol for name in (PLAIN, "frames=2", "text_only")]
    assert len(set(hashes)) == 3
    assert hashes[0] == results.data["protocol"]["hash"]
    written = write_cells(tmp_path, results, [constant, text_only])
    assert read_cells(tmp_path) == written == list(cells.values())
    with open(tmp_path / CELLS_CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["ablation"], row["on"], float(row["value"])) for row in rows] == [
        (cell.ablation, cell.on, cell.value) for cell in written
    ]
    assert rows[0]["difference"] == ""
    shown = json.loads((tmp_path / CELLS_JSON).read_text())["ablations"]
    assert shown["text_only"]["shown"] == "text_only"
    assert shown["frames=2"]["inputs"]["max_length"] == POLICY.max_length
    text = report(results, written)
    assert "| frames=2 | 0.133, -0.867* [" in text
    assert "| text_only | 0.133, -0.867* [" in text
    (tmp_path / CELLS_JSON).write_text("{}")
    with pytest.raises(InputError, match="cannot be read as ablation cells"):
        read_cells(tmp_path)
    # A later evaluation without ablations leaves no cells of another run beside its own results.
    assert write_cells(tmp_path, results, []) == read_cells(tmp_path) == []
    assert not (tmp_path / CELLS_CSV).exists()


def test_the_part_of_ablations_leaves_the_rest_of_a_run_as_it_is() -> None:
    """As the header of configs/eval/ablation.yaml has it: other keys of `uvrb` are the recipe's and the command's."""
    recipe, part = str(ROOT / "configs" / "quickstart.yaml"), str(ROOT / "configs" / "eval" / "ablation.yaml")
    config = parse(["validate", "--config", recipe, "--uvrb.root", "SETS", "--uvrb", part]).uvrb
    assert (config.root, config.batch_tokens, config.inputs.max_frame_tokens) == ("SETS", 2048, 9)
    names = [ablation.name for ablation in parse_ablations(config.ablations)]
    assert {"frames=16", "tokens=100", "prompt=none", "append_eos=off", "adapters=off", "static"} <= set(names)
    words = "[{adapters: off}, {frames: 4}, static]"
    config = parse(["validate", "--config", recipe, "--uvrb.ablations", words]).uvrb
    assert config.ablations == [{"adapters": False}, {"frames": 4}, "static"]


# -------------------------------------------------------------------------------------------------- inside Lightning


def embedder(world: Path) -> VideoEmbedder:
    L.seed_everything(3, verbose=False)  # lora_A is drawn
    model = VideoEmbedder(str(world / "base"), POLICY, Lora(rank=4, dropout=0.2))
    model.configure_model()
    perturb(model.backbone)
    return model


def validate(world: Path, folder: Path, evaluation: UVRBEvaluation, model: VideoEmbedder | None = None) -> Any:
    """uvrb.json of a validation."""
    trainer(folder, evaluation).validate(model or embedder(world), loader(world), verbose=False)
    return json.loads((folder / "uvrb.json").read_text())


def test_validate_writes_cells(world: Path, tmp_path: Path, asked: list[Item]) -> None:
    specs = ["static", {"frames": 2}, {"frames": 4}, {"adapters": False}, {"adapters": False, "tokens": 1}]
    settings: dict[str, Any] = {"inputs": INPUTS, "resamples": 100, "store": True}
    evaluation = UVRBEvaluation(str(world / "uvrb"), ablations=specs, **settings)
    data = validate(world, tmp_path / "run", evaluation)
    cells = {(cell.ablation, cell.on): cell for cell in read_cells(tmp_path / "run")}
    names = [PLAIN, "static", "frames=2", "frames=4", "adapters=off", "adapters=off tokens=1"]
    assert list(cells) == [(name, on) for name in names for on in ("CRB-T", "MS-TI", "MS-TV", "CMP")]
    for on in ("CRB-T", "MS-TI", "MS-TV"):
        row, base = data["sets"][on], data["untrained"]["sets"][on]
        assert row["ablations"] == {name: cells[name, on].value for name in names[1:]}
        assert (cells[PLAIN, on].value, [cells[PLAIN, on].low, cells[PLAIN, on].high]) == (
            row["value"],
            row["interval"],
        )
        assert cells["adapters=off", on].value == base["value"]
        assert cells["adapters=off", on].difference == pytest.approx(base["value"] - row["value"])
        assert cells["frames=4", on].difference == 0
    protocols = {name: cells[name, "CMP"].protocol for name in names}
    assert protocols[PLAIN] == protocols["frames=4"] == protocols["adapters=off"] == data["protocol"]["hash"]
    assert len(set(protocols.values())) == 4
    weights = {name: cells[name, "CMP"].weights for name in names}
    assert weights[PLAIN] == weights["static"] == weights["frames=2"] == data["weights"]
    assert weights["adapters=off"] == weights["adapters=off tokens=1"] == data["untrained"]["weights"]
    assert "## Ablations" in (tmp_path / "run" / "report.md").read_text()
    # An ablation of inputs is the evaluation that has these inputs: one protocol, one score, in a run of its own.
    two = EvaluationInputs(Sampling.uniform(2), max_frame_tokens=4, max_length=300)
    alone = validate(world, tmp_path / "two", UVRBEvaluation(str(world / "uvrb"), inputs=two, resamples=100))
    assert alone["protocol"]["hash"] == protocols["frames=2"]
    assert {on: row["value"] for on, row in alone["sets"].items()} == {
        on: cells["frames=2", on].value for on in alone["sets"]
    }
    # A second run encodes nothing and writes the same bytes.
    before = {name: (tmp_path / "run" / name).read_bytes() for name in (CELLS_CSV, CELLS_JSON, "uvrb.json")}
    asked.clear()
    again = UVRBEvaluation(str(world / "uvrb"), ablations=specs, **settings)
    validate(world, tmp_path / "run", again)
    assert asked == []
    assert [path.name for path in (tmp_path / "run" / "embeddings").iterdir()] == ["32-true-float32"]
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


def test_subsets_are_chosen_by_the_seed(world: Path, tmp_path: Path) -> None:
    one = UVRBEvaluation(str(world / "uvrb"), ["CRB-T"], INPUTS, max_queries=2, seed=1, resamples=100)
    trainer(tmp_path, one, epochs=1).fit(embedder(world), loader(world), loader(world))
    (file,) = (tmp_path / "uvrb").iterdir()
    row = json.loads(file.read_text())["sets"]["CRB-T"]
    assert (row["n_query"], row["n_corpus"], row["notes"]) == (2, 4, ["2 of 4 queries, chosen by seed 1"])
    chosen = [UVRBReader(world / "uvrb").read("CRB-T").subset(2, seed).queries for seed in (0, 1)]
    assert {item.id for item in chosen[0]} != {item.id for item in chosen[1]}


def test_one_callback_serves_one_model_after_another(world: Path, tmp_path: Path) -> None:
    """And keeps nothing of a model, or of what was prepared for it, when a run is over."""
    evaluation = UVRBEvaluation(str(world / "uvrb"), ["CRB-T"], INPUTS, untrained=False, resamples=100)
    for seed in (1, 2):
        model = embedder(world)
        perturb(model.backbone, seed)
        found = validate(world, tmp_path / str(seed), evaluation, model)["weights"]
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is BackboneEncoder]
        assert found == BackboneEncoder(model.backbone, builder(world, POLICY)).weights_hash


def test_a_validation_without_rows_is_not_taken_for_an_evaluation(world: Path, tmp_path: Path) -> None:
    """Lightning runs no validation hook then; silence would look like success."""
    evaluation = UVRBEvaluation(str(world / "uvrb"), inputs=INPUTS)
    with pytest.raises(InputError, match=r"UVRB was not run: .* set data\.dev_pairs above 0"):
        trainer(tmp_path, evaluation).validate(embedder(world), DataLoader([], batch_size=None), verbose=False)


# ---------------------------------------------------------------------------- evaluation leaves training as it is


class Trace(L.Callback):
    """Writes the states of all generators and the modes of all modules at the end of each epoch: trace-<rank>.json."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"trace-{trainer.global_rank}.json"
        known = json.loads(path.read_text()) if path.exists() else []
        states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        modes = [module.training for module in pl_module.modules()]
        path.write_text(json.dumps([*known, [hashlib.sha256(repr(states).encode()).hexdigest(), modes]]))


class Untidy(L.Callback):
    """The planted fault: after a validation one adapter drops nothing out any more."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.backbone.model.language_model.layers[0].mlp.up_proj.lora_dropout["default"].p = 0.0


class Fitted(NamedTuple):
    losses: list[list[float]]
    rest: tuple[Any, ...]


def traced(recipe: Path, folder: Path, *words: Any, ranks: int = 1) -> Fitted:
    """Losses of every step and rank; rows, generators and modes after every epoch, trained weights: of a `gve fit`."""
    command = ["fit", "--config", recipe, "--trainer.default_root_dir", folder, "--record.steps", "true"]
    command += ["--data.num_workers", 2, "--trainer.callbacks+=test_uvrb_callback.Trace", *words]
    assert runs.run(command, folder.with_suffix(".log"), ranks=ranks, seconds=240) == [0] * ranks
    traces = [json.loads((folder / f"trace-{rank}.json").read_text()) for rank in range(ranks)]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    history = runs.history(folder, ranks)
    losses = [[rank["loss"] for rank in step] for step in history.values()]
    return Fitted(losses, (history, traces, {name: value.tolist() for name, value in state.items()}))


EVALUATE = (
    *("--uvrb.every_n_epochs", 1, "--uvrb.num_workers", 2, "--uvrb.max_queries", 3),
    *("--uvrb.sets", '["CRB-T","MS-TI"]'),
)


@pytest.mark.timeout(800)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_does_not_know_that_it_is_evaluated(ranks: int, recipe: Path, tmp_path: Path) -> None:
    """Every epoch, two decode workers on both sides, dropout 0.1: losses, generators, modes, weights are bit-equal."""
    evaluated = traced(recipe, tmp_path / "with", *EVALUATE, ranks=ranks)
    alone = traced(recipe, tmp_path / "without", ranks=ranks)
    assert sorted(path.name for path in (tmp_path / "with" / "uvrb").iterdir()) == ["step_12.json", "step_6.json"]
    assert not (tmp_path / "without" / "uvrb").exists()
    assert len(alone.losses) == 12
    assert evaluated == alone
    if ranks > 1:
        # Negative control: what a validation left behind is seen, in the steps that follow it alone.
        untidy = traced(recipe, tmp_path / "untidy", "--trainer.callbacks+=test_uvrb_callback.Untidy", ranks=ranks)
        assert untidy.losses[:6] == alone.losses[:6]
        assert all(a != b for a, b in zip(untidy.losses[6:], alone.losses[6:], strict=True))
