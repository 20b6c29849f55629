"""Vectors with their ids in one file, in the formats that others read: npy, parquet, safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gve.items import InputError

FORMATS = (".npy", ".parquet", ".safetensors")


def check_format(path: str | Path) -> None:
    """Refuses a file name that no format belongs to, before hours of work.

    Raises:
        InputError: names the formats.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--out {path}: the name must end in one of {', '.join(FORMATS)}")


def write_vectors(path: str | Path, ids: Sequence[str], vectors: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Writes vectors, ids, and `<path>.json` with what a reader must know of them; each whole or not at all.

    - npy: the matrix; the ids stand in the JSON file beside it, in the order of the rows.
    - parquet: columns `id` (string) and `embedding` (fixed-size list of float32).
    - safetensors: tensors `embeddings` [N, D] float32 and `ids`, uint8: the UTF-8 bytes of a JSON list.

    Args:
        path: of the file; its suffix chooses the format.
        ids: N names.
        vectors: [N, D] float32.
        facts: plain values: model, fingerprint, inputs, failures.
    """
    path = Path(path)
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = np.ascontiguousarray(vectors, np.float32)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    kind = path.suffix.lower()
    if kind == ".npy":
        with open(draft, "wb") as file:
            np.save(file, vectors)
    elif kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pyarrow.parquet.write_table(pa.table({"id": pa.array(ids, pa.string()), "embedding": column}), draft)
    else:
        words = np.frombuffer(json.dumps(list(ids), ensure_ascii=False).encode(), np.uint8)
        save_file({"embeddings": vectors, "ids": words.copy()}, draft)
    facts = {**facts, "items": len(ids), "dim": int(vectors.shape[1])}
    if kind == ".npy":
        facts["ids"] = list(ids)
    side = path.with_name(f"{path.name}.json")
    side_draft = side.with_name(f"{side.name}.{os.getpid()}.tmp")
    side_draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    # The vectors last: who sees them finds their ids beside them.
    os.replace(side_draft, side)
    os.replace(draft, path)
