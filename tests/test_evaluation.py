"""The engine on encoders whose score is known: oracle, random, constant, silent; pools, orders and listings."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gve.encode.encoder import Encoded, Transform, item_key
from gve.eval.evaluation import evaluate
from gve.eval.results import Results
from gve.eval.trec import write_trec
from gve.eval.uvrb import SETS, RetrievalSet, UVRBReader, find_record
from gve.items import Item
from test_uvrb import Constant, Fake, oracle

QUERIES, CORPUS = 150, 60


def invented(name: str, seed: int = 0) -> RetrievalSet:
    """A set of texts alone: an encoder by rule needs no media. Pools of ten, up to three positives, one distractor."""
    record = find_record(name)
    rng = np.random.default_rng(seed)
    positives = [
        tuple(sorted(rng.choice(CORPUS - 1, rng.integers(1, 4), replace=False).tolist())) for _ in range(QUERIES)
    ]
    pools = None
    if record.pooled:
        others = [[row for row in rng.permutation(CORPUS).tolist() if row not in own] for own in positives]
        pools = tuple(
            tuple(sorted([*own, *rest[: 10 - len(own)]])) for own, rest in zip(positives, others, strict=True)
        )
    return RetrievalSet(
        record,
        tuple(Item.of(f"{name} query {row}", instruction=record.instruction, id=f"q{row}") for row in range(QUERIES)),
        tuple(Item.of(f"{name} item {row}", id=f"v{row}") for row in range(CORPUS)),
        tuple(positives),
        pools,
    )


class Seeded(Fake):
    """Vectors of the content and a seed alone: a random order of every corpus."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def vector(self, item: Item) -> np.ndarray:
        words = int(item_key(item)[:12], 16)
        return np.random.default_rng([self.seed, words]).normal(size=self.dim).astype(np.float32)


def test_a_random_encoder_scores_chance_within_its_interval() -> None:
    """Thirty random encoders on one set of each metric: their mean is chance, and 95% of the intervals hold it."""
    for name in ("CRB-G", "CMRB", "MS-TV"):
        tested = invented(name)
        found = [evaluate(Seeded(seed), [tested])[name] for seed in range(30)]
        values = np.array([score.value for score in found])
        chance = found[0].chance
        assert 0.03 < chance < 0.4
        assert abs(values.mean() - chance) < 3.5 * values.std() / 30**0.5
        inside = [score.interval(1000)[0] <= chance <= score.interval(1000)[1] for score in found]
        assert sum(inside) >= 25  # of 30 at 95%: fewer than 25 happen once in 300 times
        # Negative control: one that knows a third of the answers is above.
        wise = evaluate(oracle([tested]), [tested])[name].hits
        half = np.where(np.arange(QUERIES) % 3 == 0, wise, found[0].hits)
        assert half.mean() > found[0].interval(1000)[1]


def test_constant_and_silent_encoders_are_named() -> None:
    tested = invented("MSRVTT")
    collapsed = evaluate(Constant(), [tested])["MSRVTT"]
    by_hand = np.mean([len(rows) / CORPUS for rows in tested.positives])  # R@1 of a random order
    assert collapsed.value == pytest.approx(by_hand, abs=1e-12)
    assert collapsed.notes == ("every item of the corpus has the same embedding: the score is chance",)
    row = Results({"MSRVTT": collapsed}, resamples=100).data["sets"]["MSRVTT"]
    assert row["notes"] == list(collapsed.notes)
    assert (row["pessimistic"], row["optimistic"]) == (0.0, 1.0)

    class Broken(Fake):
        """Half of the corpus overflows, as in half precision."""

        def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
            result = super().encode(items)
            result.vectors[[item.text.endswith(("1", "3", "5", "7", "9")) for item in items]] = np.nan
            return result

    broken = evaluate(Broken(), [tested])["MSRVTT"]
    assert not broken.complete
    assert not broken.notes
    assert Counter(broken.unread.values()) == {"the model gave a vector that is not finite": QUERIES // 2 + CORPUS // 2}
    assert not np.isin(broken.nearest[:, 0], np.arange(1, CORPUS, 2)).any()  # never retrieved


def test_pools_and_whole_corpus_are_two_numbers() -> None:
    """By a loop over queries; the second never takes the place of the first, nor enters an average."""
    tested, encoder = invented("MS-TI"), Seeded(3)
    score = evaluate(encoder, [tested], whole_corpus=True)["MS-TI"]
    whole = score.whole_corpus
    assert whole is not None
    assert tested.pools is not None
    similar = (
        np.stack([encoder.vector(item) for item in tested.queries])
        @ np.stack([encoder.vector(item) for item in tested.corpus]).T
    )
    in_pool = [
        max(pool, key=lambda row, q=q: similar[q, row]) in tested.positives[q] for q, pool in enumerate(tested.pools)
    ]
    in_all = [int(np.argmax(line)) in own for line, own in zip(similar, tested.positives, strict=True)]
    assert score.hits.tolist() == in_pool
    assert whole.hits.tolist() == in_all
    assert in_pool != in_all
    results = Results({"MS-TI": score, "MS-TV": evaluate(encoder, [invented("MS-TV")])["MS-TV"]}, resamples=100)
    row = results.data["sets"]["MS-TI"]
    assert (row["metric"], row["n_candidates"], row["value"]) == ("precision_at_1", 10, np.mean(in_pool))
    assert (row["whole_corpus"]["metric"], row["whole_corpus"]["n_candidates"]) == ("recall_at_1", CORPUS)
    assert row["whole_corpus"]["value"] == np.mean(in_all)
    assert results.abilities["CMP"] == pytest.approx((row["value"] + results.data["sets"]["MS-TV"]["value"]) / 2)
    assert "whole_corpus" not in results.data["sets"]["MS-TV"]
    assert evaluate(encoder, [invented("CRB-G")], whole_corpus=True)["CRB-G"].whole_corpus is None


def permuted(root: Path, target: Path, seed: int) -> Path:
    """The same sets with the rows of every corpus and of every list of instances in another order."""
    target.mkdir()
    (target / "media").symlink_to(root / "media")
    rng = np.random.default_rng(seed)
    for folder in sorted(root.glob("*/jsonl")):
        own = target / folder.parent.name / "jsonl"
        own.mkdir(parents=True)
        for path in folder.iterdir():
            lines = path.read_text().splitlines()
            order = range(len(lines)) if path.stem == "queries" else rng.permutation(len(lines))
            (own / path.name).write_text("\n".join(lines[row] for row in order) + "\n")
        if (folder.parent / "set.json").is_file():
            (own.parent / "set.json").write_text((folder.parent / "set.json").read_text())
    return target


def read_all(root: Path) -> list[RetrievalSet]:
    reader = UVRBReader(root)
    return [reader.read(name) for name in reader.names()]


def test_order_of_listings_leaves_the_json_byte_equal(toy_world: Path, tmp_path: Path) -> None:
    """All sixteen sets, a random encoder and a constant one beside it, intervals and gains included."""
    texts = []
    for number, root in enumerate((toy_world / "uvrb", permuted(toy_world / "uvrb", tmp_path / "other", 5))):
        sets = read_all(root)
        assert len(sets) == 16
        scores = evaluate(Seeded(1), sets, whole_corpus=True)
        results = Results(scores, evaluate(Constant(), sets), resamples=300)
        texts.append(json.dumps(results.data, indent=1).encode())
        if number:
            ids = [[item.id for item in tested.corpus] for tested in sets]
            assert ids != [[item.id for item in tested.corpus] for tested in read_all(toy_world / "uvrb")]
    assert texts[0] == texts[1]
    # Negative control: one positive moved, or another encoder, is another text.
    sets = read_all(toy_world / "uvrb")
    assert json.dumps(Results(evaluate(Seeded(2), sets), resamples=300).data, indent=1).encode() != texts[0]
    path = tmp_path / "other" / "CRB-G" / "jsonl" / "instances.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["pos"] = rows[1]["pos"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other, same = UVRBReader(tmp_path / "other"), UVRBReader(toy_world / "uvrb")
    assert other.read("CRB-G").data_hash != same.read("CRB-G").data_hash
    assert other.read("CRB-S").data_hash == same.read("CRB-S").data_hash


def test_sets_that_share_clips_encode_them_once(toy_world: Path) -> None:
    """CRB-G, CRB-S and CRB-T of the toy world show the same ten clips, under thirty queries."""

    class Counting(Fake):
        def __init__(self) -> None:
            super().__init__()
            self.clips: Counter[str] = Counter()
            self.texts = 0

        def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
            self.clips.update(item.media[0].name for item in items if item.media)
            self.texts += sum(not item.media for item in items)
            return super().encode(items)

    reader, encoder = UVRBReader(toy_world / "uvrb"), Counting()
    sets = [reader.read(name) for name in ("CRB-G", "CRB-S", "CRB-T")]
    evaluate(encoder, sets)
    assert sum(len(tested.corpus) for tested in sets) == 3 * len(sets[0].corpus) == 30
    assert len(encoder.clips) == 10
    assert set(encoder.clips.values()) == {1}
    assert encoder.texts == len({(item.text, item.instruction) for tested in sets for item in tested.queries})


def test_trec_files_are_judged_to_the_same_value(tmp_path: Path) -> None:
    """pytrec_eval on the files alone: success at k is ours, in pools too; names with blanks survive."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    sets = [invented(name, seed) for seed, name in enumerate(("CRB-G", "LoVR-TH", "MS-TI"))]
    renamed = tuple(dataclasses.replace(item, id=f"a {item.id} 100%\t") for item in sets[0].corpus)
    sets[0] = dataclasses.replace(sets[0], corpus=renamed)
    results = Results(evaluate(Seeded(8), sets, depth=25), model="an org/model name")
    write_trec(tmp_path, results)
    assert len(list(tmp_path.iterdir())) == 6
    for name, score in results.scores.items():
        record = next(record for record in SETS if record.name == name)
        run_lines = [line.split(" ") for line in (tmp_path / f"{name}.run").read_text().splitlines()]
        qrel_lines = [line.split(" ") for line in (tmp_path / f"{name}.qrels").read_text().splitlines()]
        assert {len(line) for line in run_lines} == {6}
        assert {line[5] for line in run_lines} == {"an%20org/model%20name"}
        assert len(run_lines) == QUERIES * (10 if record.pooled else 25)
        run: dict[str, dict[str, float]] = {}
        qrels: dict[str, dict[str, int]] = {}
        for query, _, item, _, similarity, _ in run_lines:
            run.setdefault(query, {})[item] = float(similarity)
        for query, _, item, relevance in qrel_lines:
            qrels.setdefault(query, {})[item] = int(relevance)
        judged = pytrec_eval.RelevanceEvaluator(qrels, {f"success.{record.k}"}).evaluate(run)
        theirs = [judged[item.id][f"success_{record.k}"] for item in score.tested.queries]
        assert theirs == score.hits.tolist()
        assert 0 < np.mean(theirs) < 1
        # The similarities are the very float32 numbers.
        first = [np.float32(line[4]) for line in run_lines if line[0] == "q0"]
        assert first == score.similarities[0][: len(first)].tolist()
