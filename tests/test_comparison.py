"""Two runs compared, and the published table recomputed: values by hand, refusals by name, the commands themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gve.cli import main
from gve.eval.comparison import compare, run_labels
from gve.eval.published import (
    CORRELATIONS,
    WRONG_QUOTATIONS,
    Correlation,
    correlation_matrix,
    models_of,
    other_sizes,
    published_scores,
    recomputed_scores,
    slips,
)
from gve.eval.results import read_results
from gve.eval.uvrb import ABILITIES, AVERAGES, SETS, RetrievalSet, UVRBReader
from gve.items import InputError
from saved_runs import save_run


@pytest.fixture(scope="module")
def sets(toy_world: Path) -> list[RetrievalSet]:
    reader = UVRBReader(toy_world / "uvrb")
    return [reader.read(name) for name in reader.names()]


@pytest.fixture(scope="module")
def runs(sets: list[RetrievalSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: a and b of another noise, c of b's noise with other queries disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    inputs = {"sampling": "uniform(8)", "max_frame_tokens": 200}
    for name, noise, seed in (("a", 12.0, 0), ("b", 6.0, 0), ("c", 6.0, 1)):
        save_run(folder / name, sets, noise, seed, inputs=inputs)
    return folder


def gve(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def changed(source: Path, target: Path, **values: Any) -> Path:
    """A copy of a run whose uvrb.json differs in `values`, by dotted keys with two underscores for a dot."""
    target.mkdir()
    (target / "uvrb_positions.npz").write_bytes((source / "uvrb_positions.npz").read_bytes())
    data = json.loads((source / "uvrb.json").read_text())
    for key, value in values.items():
        place = data
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    (target / "uvrb.json").write_text(json.dumps(data))
    return target


def test_differences_are_paired_by_id_and_bounded(runs: Path) -> None:
    a, b = read_results(runs / "a"), read_results(runs / "b")
    found = compare(a, b, ("a", "b"), resamples=500)
    assert list(found.sets) == [record.name for record in SETS]
    assert list(found.abilities) == [*AVERAGES, *ABILITIES]
    for name, row in found.sets.items():
        own = b.sets[name].hits - a.sets[name].hits
        assert row["difference"] == pytest.approx(own.mean())
        low, high = row["interval"]
        assert low <= own.mean() <= high
        assert row["p_holm"] >= row["p"]
    assert found.abilities["AVG-D"]["difference"] == pytest.approx(
        b.data["abilities"]["AVG-D"] - a.data["abilities"]["AVG-D"]
    )
    # Half the noise is better, and clearly so in the mean of all sets.
    assert found.abilities["AVG-D"]["interval"][0] > 0
    back = compare(b, a, ("b", "a"), resamples=500)
    assert back.sets["CRB-G"]["difference"] == pytest.approx(-found.sets["CRB-G"]["difference"])


def test_pairing_follows_ids_and_not_rows(runs: Path) -> None:
    """The second run listed its queries in another order: same result. Negative control: hits moved without ids."""
    a, b = read_results(runs / "a"), read_results(runs / "b")
    plain = compare(a, b, ("a", "b"), resamples=300)
    moved, mixed = {}, {}
    for name, score in b.sets.items():
        order = np.random.default_rng(0).permutation(len(score.queries))
        moved[name] = dataclasses.replace(score, queries=score.queries[order], hits=score.hits[order])
        mixed[name] = dataclasses.replace(score, hits=score.hits[order])
    assert compare(a, dataclasses.replace(b, sets=moved), ("a", "b"), resamples=300).to_dict() == plain.to_dict()
    assert compare(a, dataclasses.replace(b, sets=mixed), ("a", "b"), resamples=300).to_dict() != plain.to_dict()


def test_a_run_does_not_differ_from_itself(runs: Path) -> None:
    a = read_results(runs / "a")
    found = compare(a, a, ("a", "again"), resamples=200)
    for row in [*found.sets.values(), *found.abilities.values()]:
        assert row["difference"] == 0
        assert row["interval"][0] < 0 < row["interval"][1]
    assert {row["p_holm"] for row in found.sets.values()} == {1.0}
    assert "both runs have the same weights" in found.notes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol__sets__CMRB": ["0" * 64, 1, "x"]}, "same data: CMRB: data hash"),
        ({"sets__MS-TI__n_candidates": 99}, "MS-TI: n_candidates"),
        ({"sets__CMRB__metric": "recall_at_1"}, "CMRB: metric recall_at_10 against recall_at_1"),
        ({"protocol__inputs__sampling": "uniform(16)"}, r"settings: sampling uniform\(8\) against uniform\(16\)"),
    ],
)
def test_other_protocols_are_refused_by_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    other = changed(runs / "b", tmp_path / "other", **values)
    with pytest.raises(InputError, match=message):
        compare(read_results(runs / "a"), read_results(other), ("a", "b"), resamples=200)
    assert gve("uvrb", "compare", runs / "a", other) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_settings_compare_when_asked(runs: Path, tmp_path: Path) -> None:
    other = changed(runs / "b", tmp_path / "other", protocol__inputs__sampling="uniform(16)")
    found = compare(read_results(runs / "a"), read_results(other), ("a", "b"), across_settings=True, resamples=200)
    assert found.notes[0] == "settings differ: sampling uniform(8) against uniform(16)"


def test_what_makes_up_a_model_is_no_protocol(runs: Path, tmp_path: Path) -> None:
    """Another prompt belongs to another model; to the same weights it is a setting."""
    first = changed(runs / "a", tmp_path / "first", protocol__inputs__target_text="")
    other = changed(runs / "b", tmp_path / "other", protocol__inputs__target_text="Describe.", weights="1" * 64)
    assert compare(read_results(first), read_results(other), ("a", "b"), resamples=200).sets
    same = changed(runs / "b", tmp_path / "same", protocol__inputs__target_text="Describe.")
    with pytest.raises(InputError, match="target_text"):
        compare(read_results(first), read_results(same), ("a", "b"), resamples=200)


def test_incomplete_sets_enter_no_average(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"sets__CRB-G__complete": False, "sets__CRB-G__missing": ["media/7.mp4: truncated"]}
    other = changed(runs / "b", tmp_path / "other", **values)
    assert gve("uvrb", "compare", runs / "a", other, "--json", "--resamples", 200) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert not found["sets"]["CRB-G"]["complete"]
    assert {"CG", "TXT", "AVG-A", "AVG-D"}.isdisjoint(found["abilities"])
    assert "PR" in found["abilities"]
    assert any("CRB-G is incomplete" in note and "media/7.mp4: truncated" in note for note in found["notes"])


def test_compare_prints_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gve("uvrb", "compare", runs / "a", runs / "b", runs / "c", "--resamples", 200) == 0
    text = capsys.readouterr().out
    assert "b minus a" in text
    assert "c minus a" in text
    assert "p (Holm)" in text


@pytest.mark.parametrize("words", [["a"], ["a", "nowhere"], ["a", "b", "--resamples", "5"]])
def test_compare_refuses_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    paths = [str(runs / word) if len(word) == 1 and word.isalpha() else word for word in words]
    assert gve("uvrb", "compare", *paths) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_without_positions_cannot_be_paired(runs: Path, tmp_path: Path) -> None:
    bare = changed(runs / "b", tmp_path / "bare")
    (bare / "uvrb_positions.npz").unlink()
    with pytest.raises(InputError, match="no uvrb_positions"):
        compare(read_results(runs / "a"), read_results(bare), ("a", "b"))


def test_labels_tell_runs_apart(runs: Path, tmp_path: Path) -> None:
    for number, (model, frames) in enumerate([("m", 8), ("m", 16), ("other", 8), ("other", 8)]):
        changed(runs / "a", tmp_path / f"r{number}", model=model, setting={"frames": frames, "tokens": 200})
    labels = run_labels([read_results(tmp_path / f"r{number}") for number in range(4)])
    assert labels[:2] == ["m (frames 8)", "m (frames 16)"]
    assert labels[2].startswith("other in ")
    assert len(set(labels)) == 4


def test_published_json_is_the_recomputed_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert gve("uvrb", "report", "--published", "--json") == 0
    out = capsys.readouterr()
    table = json.loads(out.out)
    assert list(table) == list(published_scores())
    assert {tuple(row) for row in table.values()} == {(*AVERAGES, *ABILITIES)}
    wrong = {(slip.model, slip.name) for slip in slips()}
    for model, row in table.items():
        for name, value in row.items():
            assert (abs(value - published_scores()[model][name]) <= 0.001 + 1e-9) == ((model, name) not in wrong)
    for words in ("GME-2B AVG-A: printed 0.416, its sets give 0.516", "0.702 for Unite-7B", "0.702 is UniME-7B"):
        assert words in out.err
    assert "one of MSRVTT, DiDeMo, CRB-G is printed 0.037 too low" in out.err


def test_the_slips_are_those_that_are_known() -> None:
    """gve.md section 7; a slip that is not there would be ours."""
    assert {(slip.model, slip.name) for slip in slips()} == {
        ("GME-2B", "AVG-A"),
        *(("VLM2Vec-V2", name) for name in ("CG", "TXT", "AVG-A", "AVG-D")),
    }
    assert [slip.explanation for slip in slips() if slip.model == "GME-2B"] == [""]
    assert [quotation.model for quotation in WRONG_QUOTATIONS] == ["Unite-7B"]


# What the printed tables give by gve.md section 7, to two decimals, and what the paper claims.
KNOWN = [
    ("all", "PR", "AVG-A", 0.97, 0.97),
    ("all", "MSRVTT", "AVG-A", 0.58, 0.08),
    ("all", "VIS", "AVG-A", 0.26, 0.06),
    ("MLLM-type", "VIS", "AVG-A", None, 0.29),
    ("all", "S", "T", 0.12, 0.61),
    ("all", "T", "FG", 0.98, 0.74),
    ("all", "S", "FG", 0.39, 0.97),
    ("all", "FG", "PR", 0.90, 0.94),
    ("all", "FG", "LC", 0.90, 0.89),
    ("all", "PR", "LC", 0.90, 0.95),
    ("CLIP-type", "S", "CG", 0.99, 0.93),
    ("CLIP-type", "T", "CG", 0.46, 0.84),
    ("CLIP-type", "CMP", "VIS", -0.71, -0.80),
    ("CLIP-type", "T", "LC", -0.14, 0.31),
    ("CLIP-type", "MSRVTT", "AVG-A", None, 0.59),
    ("MLLM-type", "PR", "CG", 0.98, 0.82),
    ("MLLM-type", "T", "LC", 0.64, 0.70),
]


@pytest.mark.parametrize(("models", "first", "second", "claimed", "value"), KNOWN)
def test_correlations_are_those_of_the_table(
    models: str, first: str, second: str, claimed: float | None, value: float
) -> None:
    (found,) = [c for c in CORRELATIONS if (c.models, c.first, c.second) == (models, first, second)]
    assert found.claimed == claimed
    # Recomputed abilities and printed ones differ by rounding: up to 0.002 in a correlation of six models.
    assert found.value == pytest.approx(value, abs=0.005 + 0.002)
    assert found.interval[0] < found.value < found.interval[1]
    agrees = {("all", "PR", "AVG-A"), ("all", "FG", "PR"), ("all", "PR", "LC")}
    assert found.holds == (None if claimed is None else (models, first, second) in agrees)


def test_every_correlation_is_listed_and_wrong_models_show() -> None:
    """Negative control: over the wrong set of models the same pair has another value."""
    assert len(KNOWN) == len(CORRELATIONS)
    assert Correlation("MLLM-type", "S", "CG").value < 0.8 < Correlation("CLIP-type", "S", "CG").value
    assert [len(models_of(kind)) for kind in ("all", "CLIP-type", "MLLM-type")] == [16, 6, 10]


def test_correlation_matrix_is_numpys() -> None:
    names = ["PR", "VIS", "CMRB", "AVG-A"]
    rows = [published_scores()[model] | recomputed_scores()[model] for model in models_of("MLLM-type")]
    expected = np.corrcoef(np.array([[row[name] for name in names] for row in rows]).T)
    np.testing.assert_allclose(correlation_matrix(names, "MLLM-type"), expected, atol=1e-12)


def test_stand_ins_are_known_by_their_sizes(runs: Path) -> None:
    toy = read_results(runs / "a").data["sets"]
    assert other_sizes(toy) == [record.name for record in SETS]
    real = {
        record.name: {"n_query": record.num_queries, "n_corpus": record.num_corpus, "n_candidates": record.num_corpus}
        for record in SETS
    }
    for name in ("MS-TI", "MS-TV"):
        real[name]["n_corpus"] = 3000  # clips of all pools; the size of one pool counts
    assert other_sizes(real) == []
    real["CMRB"]["n_query"] = 727  # what the public captions give
    assert other_sizes(real) == []
    real["MSRVTT"]["n_query"] = 200  # a subset
    real["MS-TV"]["n_candidates"] = 3000  # without its pools
    assert other_sizes(real) == ["MSRVTT", "MS-TV"]
