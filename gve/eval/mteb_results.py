"""Results of MTEB as rows beside ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gve.items import InputError


@dataclass(frozen=True)
class MtebScore:
    """One subset of one split of a task, as MTEB wrote it.

    Args:
        model, revision: as MTEB knows them; empty where its folders do not say.
        task, split, subset: which data.
        main_score: in [0, 1], by the task's own main metric.
        ndcg_at_10, recall_at_1: in [0, 1]; None where the task has none.
        num_queries: by the installed mteb's statistics of the task; None without them.
        mteb_version: that made the file.
        dataset_revision: commit of the data set.
    """

    model: str
    revision: str
    task: str
    split: str
    subset: str
    main_score: float
    ndcg_at_10: float | None
    recall_at_1: float | None
    num_queries: int | None
    mteb_version: str
    dataset_revision: str


def read_mteb_results(paths: Iterable[str | Path]) -> list[MtebScore]:
    """The scores in result files of MTEB, `<model>/<revision>/<task>.json`; a folder stands for all files below it.

    Its sets are never those of UVRB, even where the source is the same (MSR-VTT there has 879 of the 1,000 clips), so
    these scores never enter UVRB averages.

    Raises:
        InputError: a path is missing, or a file is not a result of MTEB 2 or later 1.x.
    """
    scores: list[MtebScore] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist: give result files of MTEB, or their folder")
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        found = [file for file in files if file.name != "model_meta.json"]
        if not found:
            raise InputError(f"{path} holds no result files (*.json) of MTEB")
        for file in found:
            scores += _read_result(file)
    return scores


def _read_result(path: Path) -> list[MtebScore]:
    try:
        values = json.loads(path.read_text())
        task, splits = values["task_name"], values["scores"]
        rows = [(split, row, float(row["main_score"])) for split, own in splits.items() for row in own]
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise InputError(f"{path} is not a result of MTEB: it needs task_name, and scores with main_score") from None
    meta_file = path.parent / "model_meta.json"
    try:
        meta = json.loads(meta_file.read_text()) if meta_file.is_file() else {}
    except ValueError:
        raise InputError(f"{meta_file} is not JSON") from None
    return [
        MtebScore(
            model=str(meta.get("name") or ""),
            revision=str(meta.get("revision") or ""),
            task=task,
            split=split,
            subset=str(row.get("hf_subset", "default")),
            main_score=main_score,
            ndcg_at_10=row.get("ndcg_at_10"),
            recall_at_1=row.get("recall_at_1"),
            num_queries=_num_queries(task, split, str(row.get("hf_subset", "default"))),
            mteb_version=str(values.get("mteb_version") or ""),
            dataset_revision=str(values.get("dataset_revision") or ""),
        )
        for split, row, main_score in rows
    ]


def _num_queries(task: str, split: str, subset: str) -> int | None:
    """From the statistics that mteb ships as files; without importing it, which takes seconds."""
    found = importlib.util.find_spec("mteb")
    if found is None or not found.origin:
        return None
    for file in (Path(found.origin).parent / "descriptive_stats").rglob(f"{task}.json"):
        statistics = json.loads(file.read_text()).get(split, {})
        statistics = statistics.get("hf_subset_descriptive_stats", {}).get(subset, statistics)
        return statistics.get("num_queries")
    return None
