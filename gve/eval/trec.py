"""Results in the files of TREC, for trec_eval, pytrec_eval, ranx and ir_measures.

A run line is `query Q0 item position similarity tag`, a qrels line `query 0 item 1`, fields separated by one blank.
Positions are ours; trec_eval sorts by similarity again and breaks ties in an order of its own, so on equal similarities
its values may differ from ours, which are exact expectations.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import numpy as np

from gve.eval.evaluation import SetScore
from gve.eval.results import Results, write_whole


def write_trec(folder: Path, results: Results) -> None:
    """Writes `<SET>.run` and `<SET>.qrels` for every set: as deep as the evaluation kept items."""
    tag = trec_id(results.model or results.weights_hash[:12] or "gve")
    for name, score in results.scores.items():
        write_whole(folder / f"{name}.run", run_text(score, tag).encode())
        write_whole(folder / f"{name}.qrels", qrels_text(score).encode())


def trec_id(name: str) -> str:
    """A name without blanks, which separate fields: they and percent signs become %XX, as in addresses."""
    return "".join(quote(letter) if letter.isspace() or letter == "%" else letter for letter in name)


def run_text(score: SetScore, tag: str) -> str:
    """The retrieved items of every query; unread ones are never among them.

    Similarities are the shortest decimals that read back as the same float32.
    """
    items = [trec_id(item.id) for item in score.tested.corpus]
    lines = []
    for query, rows, similarities in zip(score.tested.queries, score.nearest, score.similarities, strict=True):
        for place, (row, similarity) in enumerate(zip(rows.tolist(), similarities, strict=True), 1):
            if np.isfinite(similarity):
                lines.append(f"{trec_id(query.id)} Q0 {items[row]} {place} {similarity!s} {tag}\n")
    return "".join(lines)


def qrels_text(score: SetScore) -> str:
    """The relevant items of every query."""
    items = [trec_id(item.id) for item in score.tested.corpus]
    return "".join(
        f"{trec_id(query.id)} 0 {items[row]} 1\n"
        for query, rows in zip(score.tested.queries, score.tested.positives, strict=True)
        for row in rows
    )
