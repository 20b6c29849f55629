"""Runs of the benchmark as files, by an encoder that knows the answers and is disturbed by a known amount of noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gve.encode.encoder import Encoded, Transform, item_key
from gve.eval.evaluation import evaluate
from gve.eval.report import write_report
from gve.eval.results import Results, write_run
from gve.eval.uvrb import RetrievalSet
from gve.items import Item


class NoisyOracle:
    """A query is the mean of its answers' directions plus noise; without noise every query is answered.

    Args:
        sets: whose answers it knows.
        noise: length of the noise, beside answers of length 1.
        seed: of the noise; equal seeds disturb alike.
    """

    dim = 256

    def __init__(self, sets: Sequence[RetrievalSet], noise: float, seed: int) -> None:
        self.fingerprint = f"oracle-{noise}-{seed}"
        self.vectors: dict[str, np.ndarray] = {}
        for tested in sets:
            for item in tested.corpus:
                self.vectors.setdefault(item_key(item), self._direction(item_key(item), 0))
        for tested in sets:
            for query, rows in zip(tested.queries, tested.positives, strict=True):
                answers = sum((self.vectors[item_key(tested.corpus[row])] for row in rows), np.zeros(self.dim))
                vector = answers / len(rows) ** 0.5 + noise * self._direction(item_key(query), seed + 1)
                self.vectors.setdefault(item_key(query), vector)
        self.vectors = {key: (v / np.linalg.norm(v)).astype(np.float32) for key, v in self.vectors.items()}

    def _direction(self, key: str, seed: int) -> np.ndarray:
        vector = np.random.default_rng([int(key[:15], 16), seed]).normal(size=self.dim)
        return vector / np.linalg.norm(vector)

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        return Encoded(np.stack([self.vectors[item_key(item)] for item in items]))


def save_run(folder: Path, sets: Sequence[RetrievalSet], noise: float, seed: int = 0, **facts: Any) -> Path:
    """Evaluates and writes one run; `facts` go to Results, `root` to run.json.

    Returns:
        Its folder.
    """
    root = facts.pop("root", None)
    facts = {"weights_hash": f"{seed:064x}", "resamples": 200, "model": folder.name, **facts}
    write_report(folder, Results(evaluate(NoisyOracle(sets, noise, seed), sets), **facts))
    if root:
        write_run(folder, {"root": str(root), "hardware": {"cores": 2}, "seconds": 1.5})
    return folder
