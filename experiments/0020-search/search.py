"""Does the index find what an exact search finds, and how long does a question take?

    python experiments/0020-search/search.py OUT [--windows 10000] [--dims 128 2048 3584] [--questions 100]
    python experiments/0020-search/search.py OUT --index INDEX --texts LIST.jsonl

The second asks an index that `gve index` made of real files, with the captions of a list as questions.

Vectors are drawn, not encoded: a search costs the same, and recall against brute force does not ask what a vector
means. They lie around 200 centres, so that the inverted file has something to miss. OUT gets results.csv and the
indexes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import time
from pathlib import Path

import lancedb
import numpy as np

from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder
from gve.encode.topk import top_k
from gve.search.files import VideoFile
from gve.search.index import Clips, Index, IndexRecord
from gve.search.query import embed_query, make_query

K = 10
WINDOWS_OF_A_FILE = 10
SPANS = [(30.0 * number, 30.0 * number + 30.0) for number in range(WINDOWS_OF_A_FILE)]  # no two overlap: none is merged


def drawn(windows: int, dim: int, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """([windows, dim], [questions, dim]) float32 unit rows."""
    noise = np.random.default_rng(0)
    centres = noise.normal(size=(200, dim)).astype(np.float32)
    vectors = centres[noise.integers(0, 200, windows)] + 2.0 * noise.normal(size=(windows, dim)).astype(np.float32)
    asked = vectors[noise.integers(0, windows, questions)]
    asked = asked + noise.normal(size=asked.shape).astype(np.float32)
    return (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        asked / np.linalg.norm(asked, axis=1, keepdims=True),
    )


def build(uri: Path, vectors: np.ndarray) -> Index:
    """An index of the vectors, committed as `gve index` does: some thousand windows at a time."""
    index = Index.create(uri, IndexRecord("drawn", "0" * 64, vectors.shape[1]))
    per_commit = 200 * WINDOWS_OF_A_FILE
    for start in range(0, len(vectors), per_commit):
        files = range(start, min(start + per_commit, len(vectors)), WINDOWS_OF_A_FILE)
        index.add([Clips(file_at(row), SPANS, vectors[row : row + WINDOWS_OF_A_FILE]) for row in files])
    index.compact()
    return index


def file_at(row: int) -> VideoFile:
    return VideoFile(b"/drawn/%08d.mp4" % row, 1, 1, "0" * 64, 300.0, 320, 240, 25.0, "h264")


def measure(index: Index, asked: np.ndarray, nearest: np.ndarray, nprobes: int | None) -> tuple[float, float, float]:
    """(Recall of the first ten, median and 95th percentile of a question in ms)."""
    index.search(asked[0], K, nprobes=nprobes)
    seconds, kept = [], 0
    for question, rows in zip(asked, nearest, strict=True):
        start = time.perf_counter()
        hits = index.search(question, K, nprobes=nprobes)
        seconds.append(time.perf_counter() - start)
        found = {int(hit.file.path[7:15]) + SPANS.index((hit.start_s, hit.end_s)) for hit in hits}
        kept += len(found & set(rows.tolist()))
    return kept / nearest.size, 1000 * float(np.median(seconds)), 1000 * float(np.quantile(seconds, 0.95))


def ask(index: Index, texts: list[str]) -> dict[str, object]:
    """The same of an index of files: its own model embeds the texts, its own vectors are the reference.

    Files of equal content have equal scores, so a hit counts when its score is among the ten best, whatever its name.
    """
    encoder = load_encoder(index.record.model, execution=Execution(num_workers=0))
    start = time.perf_counter()
    asked = [embed_query(encoder, make_query(text)) for text in texts]
    embed_ms = 1000 * (time.perf_counter() - start) / len(texts)
    column = lancedb.connect(index.uri).open_table("clips").to_arrow()["vector"]
    vectors = np.asarray(column.combine_chunks().flatten()).reshape(len(index), index.record.dim)
    seconds, kept = [], 0
    index.search(asked[0], K)
    for question in asked:
        tenth = np.sort(vectors @ question)[-K]
        start = time.perf_counter()
        hits = index.search(question, K)
        seconds.append(time.perf_counter() - start)
        kept += sum(hit.score >= tenth - 1e-6 for hit in hits)
    median, late = 1000 * float(np.median(seconds)), 1000 * float(np.quantile(seconds, 0.95))
    return {
        "windows": len(index), "dim": index.record.dim, "mode": "exact, files",
        "recall_at_10": float(kept / (K * len(asked))),
        "median_ms": round(median, 1), "p95_ms": round(late, 1), "embed_ms": round(embed_ms, 1),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> int:
    """Measures and writes results.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=10_000, help="vectors of the index (default 10000)")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 2048, 3584], help="toy, 3B and 7B")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--index", type=Path, help="an index of gve index, in place of drawn vectors")
    parser.add_argument("--texts", type=Path, help="jsonl with captions to ask it")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    if arguments.index:
        lines = arguments.texts.read_text().splitlines()[: arguments.questions]
        rows.append(ask(Index.open(arguments.index), [json.loads(line)["caption"] for line in lines]))
        print(rows[-1], flush=True)
    for dim in () if arguments.index else arguments.dims:
        vectors, asked = drawn(arguments.windows // WINDOWS_OF_A_FILE * WINDOWS_OF_A_FILE, dim, arguments.questions)
        nearest, _ = top_k(asked, vectors, K)
        uri = arguments.out / f"index-{dim}"
        shutil.rmtree(uri, ignore_errors=True)
        start = time.perf_counter()
        index = build(uri, vectors)
        build_s = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(10):
            Index.open(uri)
        open_ms = 100 * (time.perf_counter() - start)
        index.build_ivf()
        for mode, nprobes in (("exact", None), ("ivf, 10 of 100 cells", 10), ("ivf, 1 of 100 cells", 1)):
            recall, median, late = measure(index, asked, nearest, nprobes)
            rows.append(
                {
                    "windows": len(index), "dim": dim, "mode": mode, "recall_at_10": round(recall, 4),
                    "median_ms": round(median, 1), "p95_ms": round(late, 1), "build_s": round(build_s, 1),
                    "open_ms": round(open_ms, 1), "load": round(os.getloadavg()[0], 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    with open(arguments.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return 0 if all(row["recall_at_10"] == 1.0 for row in rows if str(row["mode"]).startswith("exact")) else 1


if __name__ == "__main__":
    sys.exit(main())
