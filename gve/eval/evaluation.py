"""Runs sets: encode every distinct item once, rank, score."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gve.encode.encoder import Encoder
from gve.encode.store import EmbeddingStore, encode_items
from gve.encode.topk import RankCounts, search
from gve.eval.ablation import PixelAblation, ablated_queries, concerns, pixels_of
from gve.eval.retrieval import chance_recall_at_k, optimistic_recall_at_k, pessimistic_recall_at_k, recall_at_k
from gve.eval.statistics import bootstrap_means, score_interval
from gve.eval.uvrb import RetrievalSet

NEAREST = 10  # retrieved items kept for each query unless told: enough for every metric, and to see what went wrong


@dataclass(frozen=True, eq=False)
class SetScore:
    """One set under one model.

    Args:
        tested: the set.
        counts: where the best positive of each query stands.
        nearest: [Q, depth] int64, corpus rows by falling similarity, -1 beyond the end of a pool.
        similarities: [Q, depth] float32.
        unread: name of a file or item -> why it could not be encoded.
        num_distinct: different vectors among those of the corpus.
        whole_corpus: of a set with pools, the same queries ranked against every item; it enters no average.
    """

    tested: RetrievalSet
    counts: RankCounts
    nearest: np.ndarray
    similarities: np.ndarray
    unread: dict[str, str]
    num_distinct: int
    whole_corpus: SetScore | None = None

    @cached_property
    def hits(self) -> np.ndarray:
        """[Q] float64: score of each query, the expectation over the orders of ties."""
        return recall_at_k(self.counts, self.tested.record.k)

    @property
    def value(self) -> float:
        return float(self.hits.mean())

    @property
    def optimistic(self) -> float:
        return float(optimistic_recall_at_k(self.counts, self.tested.record.k).mean())

    @property
    def pessimistic(self) -> float:
        return float(pessimistic_recall_at_k(self.counts, self.tested.record.k).mean())

    @property
    def chance(self) -> float:
        """What a random order scores on these queries."""
        return set_chance(self.tested)

    @property
    def complete(self) -> bool:
        """Whether it may enter an average: all items were read, and the pools are the protocol's."""
        return not self.unread and self.tested.record.pooled == (self.tested.pools is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know before the number: deviations from the protocol, and a model that sees nothing."""
        if self.num_distinct == 1 < len(self.tested.corpus):
            return (*self.tested.notes, "every item of the corpus has the same embedding: the score is chance")
        return self.tested.notes

    @cached_property
    def clusters(self) -> np.ndarray:
        """[Q] int64: queries whose first positive shows the same files share a number, in this set and in others.

        A file is known by its path inside the folder of a set, so that a video of CRB-G, CRB-S and CRB-T is one also
        where each holds a copy. A label or a text is no clip that could fail all of its queries: they stay apart.
        The first positive by length of id and id (v9 before v10), so that the order of the listing is nothing.
        """
        corpus = self.tested.corpus
        names = []
        for query, rows in zip(self.tested.queries, self.tested.positives, strict=True):
            first = min((corpus[row] for row in rows), key=lambda item: (len(item.id), item.id), default=None)
            files = [medium.name.partition("/")[2] or medium.name for medium in first.media] if first else []
            names.append("\0".join(files) or f"{self.tested.record.name}\0{query.id}")
        numbers = {name: hashlib.sha256(name.encode()).digest()[:8] for name in set(names)}
        return np.array([int.from_bytes(numbers[name], "big", signed=True) for name in names], np.int64)

    def replicates(self, resamples: int) -> np.ndarray:
        """[resamples] bootstrap means."""
        return bootstrap_means(self.hits, self.clusters, resamples=resamples, name=self.tested.record.name)

    def interval(self, resamples: int) -> tuple[float, float]:
        """95% interval of the value over queries."""
        return score_interval(self.hits, self.clusters, self.replicates(resamples))


Scores = Mapping[str, SetScore]
"""Set name -> score, in the order of reports."""


def set_chance(tested: RetrievalSet) -> float:
    """Expected score of a random order: mean(1 - C(C-p, k) / C(C, k)) over the queries."""
    positives = np.array([len(rows) for rows in tested.positives])
    pools = tested.pools or [range(len(tested.corpus))] * len(positives)
    return chance_recall_at_k(positives, np.array([len(pool) for pool in pools]), tested.record.k)


def evaluate(
    encoder: Encoder,
    sets: Sequence[RetrievalSet],
    store: EmbeddingStore | None = None,
    *,
    ablation: str = "",
    whole_corpus: bool = False,
    depth: int = NEAREST,
    progress: str = "",
) -> dict[str, SetScore]:
    """Scores the sets; a collective where ranks exist, with the same result on all of them.

    The items of all sets go through one call of the encoder, so what several sets share is encoded once.

    Args:
        encoder: any model.
        sets: what to run.
        store: of this encoder's fingerprint; None keeps vectors for this call alone.
        ablation: one of ABLATIONS; sets it says nothing about are left out. Empty: as they are.
        whole_corpus: rank the queries of sets with pools against their whole corpus too.
        depth: retrieved items kept for each query.
        progress: title of the progress bar on rank 0; no bar when empty.

    Returns:
        Set name -> score, in the order of `sets`.
    """
    sets = [tested for tested in sets if not ablation or concerns(ablation, tested)]
    if store is None:
        store = EmbeddingStore(None, encoder.fingerprint)
    # Sets whose pictures are changed alike share one call of the encoder.
    groups: dict[PixelAblation | None, list[RetrievalSet]] = {}
    for tested in sets:
        groups.setdefault(pixels_of(ablation, tested), []).append(tested)
    scores: dict[str, SetScore] = {}
    for transform, group in groups.items():
        queries = [ablated_queries(ablation, tested) for tested in group]
        items = [item for own, tested in zip(queries, group, strict=True) for item in (*own, *tested.corpus)]
        encoded = encode_items(encoder, items, store, transform=transform, progress=progress)
        start = 0
        for tested in group:
            end = start + len(tested.queries) + len(tested.corpus)
            unread = {
                ", ".join(medium.name for medium in items[row].media) or items[row].id: reason
                for row, reason in encoded.failures.items()
                if start <= row < end
            }
            score = _score(tested, encoded.vectors[start:end], unread, depth)
            if whole_corpus and tested.pools is not None:
                alone = _score(dataclasses.replace(tested, pools=None), encoded.vectors[start:end], unread, 0)
                score = dataclasses.replace(score, whole_corpus=alone)
            scores[tested.record.name] = score
            start = end
    return {tested.record.name: scores[tested.record.name] for tested in sets}


def _score(tested: RetrievalSet, vectors: np.ndarray, unread: dict[str, str], depth: int) -> SetScore:
    """The score of [Q + C, D] vectors, queries first."""
    query, corpus = vectors[: len(tested.queries)], vectors[len(tested.queries) :]
    found = search(query, corpus, tested.positives, depth, tested.pools)
    return SetScore(tested, found.counts, found.nearest, found.similarities, unread, found.num_distinct)
