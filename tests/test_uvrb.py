"""The sets, their released layout, the aggregation, ablations, evaluation and reports; encoders here see no pixels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gve.encode.encoder import Encoded, Transform, item_key
from gve.eval.ablation import PixelAblation, ablated_queries, concerns, parse_ablations, pixels_of
from gve.eval.evaluation import evaluate
from gve.eval.report import radar, report, write_report
from gve.eval.results import Results, read_results
from gve.eval.uvrb import (
    ABILITIES,
    ABILITY_PARTS,
    AVERAGES,
    SETS,
    RetrievalSet,
    UVRBReader,
    ability_scores,
    find_record,
    published_scores,
)
from gve.items import Frames, Image, InputError, Item, Text, Video

# Cells of the paper's ability table that do not follow from its own rows (gve.md section 7).
SLIPS = {("GME-2B", "AVG-A"), *(("VLM2Vec-V2", name) for name in ("CG", "TXT", "AVG-A", "AVG-D"))}
Q, C = 12, 20


class Fake:
    """An encoder by rule; counts what it was asked."""

    dim = 64
    fingerprint = "f" * 64

    def __init__(self, vectors: dict[str, np.ndarray] | None = None) -> None:
        self.vectors, self.asked = vectors, 0

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        self.asked += len(items)
        return Encoded(np.stack([self.vector(item) for item in items]))

    def vector(self, item: Item) -> np.ndarray:
        if self.vectors is not None:
            return self.vectors[item_key(item)]
        return np.random.default_rng(int(item_key(item)[:8], 16)).normal(size=self.dim).astype(np.float32)


class Constant(Fake):
    def vector(self, item: Item) -> np.ndarray:
        return np.full(self.dim, self.dim**-0.5, np.float32)


def oracle(sets: Sequence[RetrievalSet]) -> Fake:
    """Knows the truth: an item of the corpus is a direction of its own, a query the sum of its answers'."""
    keys = sorted({item_key(item) for tested in sets for item in tested.corpus})
    vectors = dict(zip(keys, np.eye(len(keys), dtype=np.float32), strict=True))
    for tested in sets:
        for query, rows in zip(tested.queries, tested.positives, strict=True):
            answers = np.zeros(len(keys), np.float32)
            for row in rows:
                answers += vectors[item_key(tested.corpus[row])] / len(rows) ** 0.5
            vectors[item_key(query)] = answers
    fake = Fake(vectors)
    fake.dim = len(keys)
    return fake


def write_world(root: Path) -> Path:
    """All sixteen sets in the released layout: Q queries over C clips, pools of ten, clips shared by every set."""
    (root / "media").mkdir(parents=True)
    for row in range(C):
        (root / "media" / f"{row}.mp4").write_bytes(f"clip {row}".encode())
    for row in range(Q):
        (root / "media" / f"q{row}.mp4").write_bytes(f"query clip {row}".encode())
        (root / "media" / f"q{row}.jpg").write_bytes(f"query image {row}".encode())
    for record in SETS:
        folder = root / record.name / "jsonl"
        folder.mkdir(parents=True)
        queries, instances = [], []
        for row in range(Q):
            query: dict[str, Any] = {"id": f"q{row}", "text": f" {record.name} words {row}\n", "image": "", "video": ""}
            if "T" not in record.query:
                query["text"] = ""
            for letter, key, end in (("I", "image", "jpg"), ("V", "video", "mp4")):
                if letter in record.query:
                    query[key] = f"../media/q{row}.{end}"
            queries.append(query)
            instances.append({"qid": f"q{row}", "pos": [f"v{row}"]})
            # A second row of the same query: positives are merged.
            instances.append({"qid": f"q{row}", "pos": [f"v{row + 1}"] if row % 3 == 0 else []})
            if record.pooled:
                instances[-1]["candidates"] = [f"v{(row + step) % C}" for step in range(10)]
        corpus = [{"id": f"v{row}", "video": f"../media/{row}.mp4"} for row in range(C)]
        for name, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    facts = {"chance": 0.1, "ceilings": {"static": 0.4, "text_only": 0.25}}
    (root / "MS-TI" / "set.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "uvrb")


@pytest.fixture(scope="module")
def sets(world: Path) -> list[RetrievalSet]:
    reader = UVRBReader(world)
    return [reader.read(name) for name in reader.names()]


def test_aggregation_reproduces_the_published_table() -> None:
    checked = 0
    for model, row in published_scores().items():
        scores = ability_scores({name: row[name] for name in ABILITY_PARTS["AVG-D"]})
        for name, value in scores.items():
            agrees = abs(value - row[name]) <= 0.001 + 1e-9
            assert agrees != ((model, name) in SLIPS), f"{model} {name}: {value:.4f}, printed {row[name]}"
            checked += 1
    assert checked == 16 * 11


def test_a_wrong_aggregation_is_caught() -> None:
    """Negative control: FG as the mean of its seven sets instead of its three abilities misses most rows."""
    flat = [*ABILITY_PARTS["S"], *ABILITY_PARTS["T"], *ABILITY_PARTS["PR"]]
    rows = published_scores().values()
    assert sum(abs(np.mean([row[name] for name in flat]) - row["FG"]) > 0.001 for row in rows) > 12


def test_an_average_never_stands_for_less() -> None:
    values = {record.name: 0.5 for record in SETS}
    del values["CMRB"]
    scores = ability_scores(values)
    assert {name for name, value in scores.items() if value is None} == {"T", "FG", "TXT", "AVG-A", "AVG-D"}
    assert list(scores) == [*AVERAGES, *ABILITIES]


def test_records_agree_with_the_paper() -> None:
    assert len(SETS) == 16
    assert {r.name for r in SETS if r.k == 10} == {"CMRB", "LoVR-TH"}
    assert {r.name for r in SETS if r.pooled} == {"MS-TI", "MS-TV"}
    assert sum(r.num_queries for r in SETS) == 39658  # the sum of the paper's column "# query", by hand
    # Every set counts once, for the leaf of its own record.
    leaves = [
        (name, ability) for ability in ("CG", "S", "T", "PR", "LC", "CMP", "VIS") for name in ABILITY_PARTS[ability]
    ]
    assert sorted(leaves) == sorted((record.name, record.ability) for record in SETS)


def test_names_are_normalised_and_unknown_ones_refused() -> None:
    assert find_record("msr-vtt").name == "MSRVTT"
    assert find_record("CRB_G").name == "CRB-G"
    assert find_record("MSRVTT_I2V").name == "MSRVTT-I2V"
    with pytest.raises(InputError, match="did you mean VDC-D"):
        find_record("VDCD1")


def test_reader_reads_the_released_layout(sets: list[RetrievalSet]) -> None:
    by_name = {tested.record.name: tested for tested in sets}
    assert list(by_name) == [record.name for record in SETS]
    text = by_name["CRB-T"]
    assert text.queries[3].text == "CRB-T words 3"
    assert text.queries[3].instruction == "Find the video according to the temporal description."
    assert text.positives[:2] == ((0, 1), (1,))
    assert text.pools is None
    composed = by_name["MS-TV"]
    assert composed.queries[0].modality == "TV"
    assert composed.pools is not None
    assert [len(pool) for pool in composed.pools] == [10] * Q
    assert not composed.missing
    # One file, one object in all sets: it is hashed once.
    assert by_name["MSRVTT"].corpus[4].media[0] is by_name["VDC-D"].corpus[4].media[0]
    assert not any(tested.notes for tested in sets)


def test_reader_notes_what_makes_scores_doubtful(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    edit(world, "LoVR-C2V", "queries", {"video": "../media/3.mp4"})
    edit(world, "CRB-G", "queries", {"text": "CRB-G words 5"})
    edit(world, "CRB-S", "instances", {"pos": []})
    reader = UVRBReader(world)
    assert reader.read("LoVR-C2V").notes == ("1 queries show a file that is also in the corpus",)
    assert reader.read("CRB-G").notes == ("1 queries repeat another; UVRB counts distinct ones",)
    assert reader.read("CRB-S").notes == ()  # its second row still names a positive
    path = world / "CRB-S" / "jsonl" / "instances.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"q0"' not in line))
    lonely = reader.read("CRB-S")
    assert lonely.notes == ("1 queries have no positive and count as misses",)
    assert evaluate(oracle([lonely]), [lonely])["CRB-S"].hits.tolist() == [0.0] + [1.0] * (Q - 1)


def edit(world: Path, name: str, listing: str, change: dict[str, Any]) -> None:
    path = world / name / "jsonl" / f"{listing}.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]))


@pytest.mark.parametrize(
    ("name", "listing", "change", "message"),
    [
        ("CRB-G", "queries", {"id": "q1"}, "q1 stands twice"),
        ("CRB-G", "queries", {"text": "  "}, "q0 is empty, not T"),
        ("MS-TI", "queries", {"image": ""}, "q0 is T, not TI"),
        ("CRB-G", "corpus", {"video": "../../../etc/passwd"}, "leaves the UVRB folder"),
        ("CRB-G", "instances", {"pos": ["v99"]}, "'v99', not in corpus"),
        ("CRB-G", "instances", {"qid": "q99"}, "'q99', which is not in queries"),
        ("MS-TI", "instances", {"pos": ["v15"]}, "not among its candidates"),
    ],
)
def test_reader_refuses(tmp_path: Path, name: str, listing: str, change: dict[str, Any], message: str) -> None:
    world = write_world(tmp_path / "w")
    edit(world, name, listing, change)
    with pytest.raises(InputError, match=message):
        UVRBReader(world).read(name)


def test_reader_refuses_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no UVRB folder"):
        UVRBReader(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no UVRB set"):
        UVRBReader(tmp_path).names()
    with pytest.raises(InputError, match="cannot read"):
        UVRBReader(tmp_path).read("CRB-G")


def test_oracle_scores_one_and_content_is_encoded_once(sets: list[RetrievalSet]) -> None:
    encoder = oracle(sets)
    scores = evaluate(encoder, sets)
    assert {name: score.value for name, score in scores.items()} == {record.name: 1.0 for record in SETS}
    assert all(score.pessimistic == 1.0 for score in scores.values())
    assert set(ability_scores({name: score.value for name, score in scores.items()}).values()) == {1.0}
    assert encoder.asked == 16 * Q + C  # sixteen instructions, one gallery


def test_constant_encoder_scores_chance_exactly(sets: list[RetrievalSet]) -> None:
    # Four of twelve queries have two positives. R@1: (8 * 1/20 + 4 * 2/20) / 12; R@10 by 1 - C(18,10) / C(20,10).
    by_hand = {1: (8 / 20 + 8 / 20) / 12, 10: (8 * 0.5 + 4 * (1 - 10 * 9 / (20 * 19))) / 12}
    for name, score in evaluate(Constant(), sets).items():
        expected = (8 * 0.1 + 4 * 0.2) / 12 if score.tested.record.pooled else by_hand[score.tested.record.k]
        assert score.value == pytest.approx(expected, abs=1e-12), name
        assert score.chance == pytest.approx(expected, abs=1e-12), name
        assert score.optimistic == 1
        assert score.pessimistic == 0


def test_missing_file_marks_the_set_and_its_averages(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    edit(world, "CRB-G", "corpus", {"video": "../media/gone.mp4"})
    reader = UVRBReader(world)
    sets = [reader.read(name) for name in reader.names()]
    results = Results(evaluate(Fake(), sets), step=7)
    score = results.scores["CRB-G"]
    assert score.tested.missing == ("media/gone.mp4",)
    assert list(score.unread) == ["media/gone.mp4"]
    assert not score.complete
    assert results.abilities["CG"] is None
    assert results.abilities["AVG-D"] is None
    assert results.abilities["S"] is not None
    assert "CRB-G is incomplete" in report(results)


def test_pooled_set_without_pools_enters_no_average(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    path = world / "MS-TI" / "jsonl" / "instances.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({key: row[key] for key in ("qid", "pos")}) for row in rows))
    score = evaluate(Fake(), [UVRBReader(world).read("MS-TI")])["MS-TI"]
    assert not score.complete
    assert "not comparable" in score.tested.notes[0]


def test_subset_is_seeded_and_keeps_the_gallery(sets: list[RetrievalSet]) -> None:
    by_name = {tested.record.name: tested for tested in sets}
    small = by_name["CRB-G"].subset(5)
    assert [item.id for item in small.queries] == [item.id for item in by_name["CRB-G"].subset(5).queries]
    assert [item.id for item in small.queries] != [item.id for item in by_name["CRB-G"].subset(5, seed=1).queries]
    assert len(small.corpus) == C
    pooled = by_name["MS-TV"].subset(1)
    assert pooled.pools is not None
    assert len(pooled.corpus) == 10
    assert pooled.corpus[pooled.positives[0][0]].id in {f"v{pooled.queries[0].id[1:]}"}
    scores = evaluate(oracle([small, pooled]), [small, pooled])
    assert [score.value for score in scores.values()] == [1, 1]


def clip(seed: int = 0) -> Video:
    pixels = np.arange(8, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 2, 2, 3), np.uint8) + np.uint8(seed)
    return Video(Frames(pixels, np.arange(8) / 4, np.arange(8), 8, 4.0), sha256=f"{seed:064d}", name="clip")


def shown(item: Item) -> list[int]:
    source = item.media[-1].source
    return [int(frame[0, 0, 0]) for frame in source.pixels] if isinstance(source, Frames) else []


def test_pixel_ablations() -> None:
    still = Image(np.full((2, 2, 3), 9, np.uint8), sha256="5" * 64)
    item = Item((Text("words"), still, clip(1)), "Find it.", "a")
    changed = {name: PixelAblation(name)(item) for name in ("static", "shuffled", "reversed", "black")}
    assert shown(changed["static"]) == [5] * 8  # frame 4 of 0..7, which shows 1 + 4
    assert shown(changed["reversed"]) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert sorted(shown(changed["shuffled"])) == list(range(1, 9))
    assert shown(changed["shuffled"]) == shown(PixelAblation("shuffled")(item)) != shown(item)
    assert shown(changed["black"]) == [0] * 8
    assert not changed["black"].media[0].source.any()  # type: ignore[union-attr]
    assert changed["static"].media[0] is still
    for name, other in changed.items():
        assert other.media[1].content_hash() != item.media[1].content_hash(), f"{name} would be taken for the original"
        assert other.media[1].source.times_s is item.media[1].source.times_s  # type: ignore[union-attr]
        assert (other.text, other.instruction, other.id) == ("words", "Find it.", "a")
    assert not PixelAblation("static").touches(Item.of("words"))
    assert not PixelAblation("static").touches(Item((still,)))
    assert PixelAblation("black").touches(Item((still,)))
    with pytest.raises(TypeError, match="decoded"):
        PixelAblation("static")(Item.of(video="a.mp4"))
    with pytest.raises(InputError, match="no ablation"):
        parse_ablations(["statik"])


def test_query_ablations_reach_sets_with_text(sets: list[RetrievalSet]) -> None:
    by_name = {tested.record.name: tested for tested in sets}
    assert {query.modality for query in ablated_queries("text_only", by_name["MS-TI"])} == {"T"}
    assert {query.modality for query in ablated_queries("media_only", by_name["MS-TV"])} == {"V"}
    assert ablated_queries("media_only", by_name["MS-TV"])[0].instruction.endswith("the given video.")
    told = [name for name in by_name if "T" in by_name[name].record.query]
    assert set(by_name) - set(told) == {"MSRVTT-I2V", "LoVR-C2V"} & set(by_name)
    assert [name for name in by_name if concerns("text_only", by_name[name])] == told
    assert list(evaluate(Fake(), sets, ablation="media_only")) == told
    assert pixels_of("text_only", by_name["MSRVTT"]) == PixelAblation("black")
    assert pixels_of("text_only", by_name["MS-TI"]) is None


def test_results_files(tmp_path: Path, sets: list[RetrievalSet]) -> None:
    trained, untrained = evaluate(oracle(sets), sets), evaluate(Constant(), sets)
    ablations = {"static": untrained, "media_only": {"MS-TI": untrained["MS-TI"]}}
    results = Results(trained, untrained, ablations, {"max_length": 8192}, "a" * 64, "b" * 64, step=30, resamples=200)
    write_report(tmp_path, results)
    assert {path.name for path in tmp_path.iterdir()} == {"uvrb.json", "report.md", "radar.png", "uvrb_positions.npz"}
    data = json.loads((tmp_path / "uvrb.json").read_text())
    assert list(data["abilities"]) == [*AVERAGES, *ABILITIES]
    row = data["sets"]["MS-TI"]
    assert {"metric", "value", "n_query", "n_corpus", "interval", "chance", "ceilings", "ablations"} <= set(row)
    assert (row["metric"], row["value"], row["n_query"], row["n_candidates"]) == ("precision_at_1", 1.0, Q, 10)
    assert row["ablations"] == pytest.approx({"static": 2 / 15, "media_only": 2 / 15})
    assert row["ceilings"] == {"static": 0.4, "text_only": 0.25}
    assert data["sets"]["CRB-G"]["ceilings"] == {}
    assert data["untrained"]["abilities"]["CG"] == pytest.approx(1 / 15)
    assert data["untrained"]["sets"]["CMRB"]["chance"] == data["sets"]["CMRB"]["chance"]
    low, high = data["gains"]["abilities"]["CG"]["interval"]
    assert data["gains"]["abilities"]["CG"]["value"] == pytest.approx(14 / 15)
    assert low <= 14 / 15 <= high
    assert data["gains"]["sets"]["CRB-G"]["p_holm"] == pytest.approx(16 * 2 / 201)
    text = (tmp_path / "report.md").read_text()
    assert "| CRB-T | 12 | 20 | R@1 | 1.000 [0.735, 1.000] |" in text  # 0.025 ** (1 / 12) = 0.735
    assert "equal similarities decide 0.000 to 1.000" in text
    assert "(paper)" not in text  # published scores never stand beside a stand-in's
    with np.load(tmp_path / "uvrb_positions.npz", allow_pickle=False) as arrays:
        assert arrays["CMRB/queries"].tolist() == [f"q{row}" for row in range(Q)]
        assert arrays["MS-TI/model/nearest"].shape == (Q, 10)
        assert arrays["CRB-S/untrained/tied"].tolist() == [C] * Q
    saved = read_results(tmp_path)
    assert saved.data == data
    assert list(saved.sets) == list(saved.untrained) == [record.name for record in SETS]
    score = saved.sets["CRB-G"]
    assert [rows.tolist() for rows in score.positives[:2]] == [[0, 1], [1]]
    assert score.corpus[score.nearest[5, 0]] == "v5"
    np.testing.assert_array_equal(score.similarities, trained["CRB-G"].similarities)
    assert saved.untrained["CRB-G"].hits.mean() == pytest.approx(1 / 15)
    data["sets"]["CRB-G"]["value"] = 0.5  # positions of another run are never read as this one's
    (tmp_path / "uvrb.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="CRB-G has other queries or another value"):
        read_results(tmp_path)


def test_radar_draws_nine_abilities(sets: list[RetrievalSet]) -> None:
    results = Results(evaluate(oracle(sets), sets), evaluate(Constant(), sets))
    (axes,) = radar(results.data).axes
    assert [label.get_text().split("\n")[0] for label in axes.get_xticklabels()] == list(ABILITIES)
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines) == ["chance", "untrained", "model"]
    assert np.asarray(lines["model"]).tolist() == [1.0] * 10


def test_metrics_have_the_projects_tags(sets: list[RetrievalSet]) -> None:
    tags = Results(evaluate(Fake(), sets)).metrics()
    assert {"uvrb/MSRVTT/recall_at_1", "uvrb/CMRB/recall_at_10", "uvrb/MS-TI/precision_at_1"} <= set(tags)
    assert sum(tag.startswith("uvrb/ability/") for tag in tags) == 11
    assert sum(not tag.startswith("uvrb/ability/") for tag in tags) == 16


def test_an_oracle_scores_one_on_the_toy_world(toy_world: Path) -> None:
    """The mini UVRB can be answered whole, through the released layout; one wrong positive is seen."""
    reader = UVRBReader(str(toy_world / "uvrb"))
    toy = [reader.read(name) for name in reader.names()]
    assert len(toy) == 16
    for tested in toy:
        assert evaluate(oracle([tested]), [tested])[tested.record.name].value == pytest.approx(1.0, abs=1e-12)
    first = toy[0]
    moved = (((first.positives[0][0] + 1) % len(first.corpus),), *first.positives[1:])
    wrong = dataclasses.replace(first, positives=moved)
    assert evaluate(oracle([first]), [wrong])[first.record.name].value < 1.0


def test_an_ability_interval_never_collapses_to_a_point(sets: list[RetrievalSet]) -> None:
    """All queries hit: every bootstrap replicate is 1, and the exact lower bound of the sets stands instead."""
    results = Results(evaluate(oracle(sets), sets), resamples=100)
    low, high = results.data["ability_intervals"]["CG"]
    parts = [results.data["sets"][name]["interval"][0] for name in ("MSRVTT", "DiDeMo", "CRB-G")]
    assert (low, high) == (pytest.approx(sum(parts) / 3), 1.0)
    assert low < 1.0
