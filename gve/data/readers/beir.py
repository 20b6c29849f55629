"""BEIR and M-BEIR: queries, a corpus or pool of candidates, and which of them are relevant."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gve.data.curriculum import TASKS
from gve.data.plan import permutation
from gve.data.readers.rows import (
    Dropped,
    FolderReader,
    Lookup,
    ReaderOptions,
    Row,
    RowError,
    fields,
    json_rows,
    media_path,
)
from gve.data.schema import ShardError
from gve.items import Image, Item, Pair, Part, Text


class Beir(FolderReader):
    """BEIR (MSMARCO, HotpotQA): `corpus.jsonl`, `queries.jsonl`, `qrels/train.tsv`.

    One pair a query: of several relevant documents one is taken by the seed. A document is its title and text, joined
    by a blank. Memory: the relevant ids and places, about 300 bytes a query; no text is kept.
    """

    tasks = ("T2T",)

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
            if not (options.folder / file).is_file():
                raise ShardError(f"{options.folder} holds no {file}: give a data set in the form of BEIR by --from")
        self._relevant: dict[str, str] = {}
        self._documents: Lookup | None = None

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        if self._documents is None:
            self._relevant = self._read_qrels()
            self._documents = Lookup([self.options.folder / "corpus.jsonl"], "_id", set(self._relevant.values()))
        for number, record in enumerate(json_rows(self.options.folder / "queries.jsonl"), 1):
            try:
                yield number, self._row(record, self._documents)
            except RowError as error:
                yield number, error
        self._documents.close()

    def _row(self, record: Any, documents: Lookup) -> Row:
        key, question = fields(record, "_id", "text")
        if str(key) not in self._relevant:
            return Dropped("no-relevant-document")  # queries of the dev and test splits stand in the same file
        document = documents[self._relevant[str(key)]]
        passage = " ".join(filter(None, ((document.get(name) or "").strip() for name in ("title", "text"))))
        query, target = Item((Text(question.strip()),)), Item((Text(passage),))
        return Pair(query, target, key=str(key), source=self.options.source, task=self.task)

    def _read_qrels(self) -> dict[str, str]:
        """Query id -> its document."""
        relevant: dict[str, list[str]] = {}
        path = self.options.folder / "qrels/train.tsv"
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            for number, line in enumerate(lines, 1):
                if number == 1 and line[:2] == ["query-id", "corpus-id"]:
                    continue
                try:
                    query, document, score = line
                    if float(score) > 0:
                        relevant.setdefault(query, []).append(document)
                except ValueError:
                    raise ShardError(f"{path}, line {number}: {line} is no query-id, corpus-id and score") from None
        return {query: documents[self.pick(len(documents), query)] for query, documents in relevant.items()}


_DATASETS = {
    name: number
    for number, name in enumerate(
        ("visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq", "cirr", "mscoco")
    )
}
"""Name -> number of a data set in M-BEIR, which its ids begin with."""

_MODALITIES = {"T": "text", "I": "image", "TI": "image,text"}


class MBeir(FolderReader):
    """M-BEIR: `query/union_train/*.jsonl`, `cand_pool/{global,local}/*.jsonl` and the pictures that they name.

    The data set is the first word of the source's name ("oven" of oven_ti2t), the task says which of its queries and
    candidates are taken. Of several positives one is taken by the seed; hard negatives are the first ones of the row's
    `neg_cand_list`, in the order of the seed, that have the target's modality. Paths of pictures are relative to
    `media`, by default the folder.
    """

    tasks = tuple(task for task in TASKS if "V" not in task)

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        name = options.source.partition("_")[0]
        if name not in _DATASETS:
            raise ShardError(f"source {options.source}: its first word must be one of {', '.join(_DATASETS)}")
        self._number = str(_DATASETS[name])
        self._media = options.media or options.folder
        self._queries = self.files("query/union_train/*.jsonl", "query/train/*.jsonl")
        pools = sorted(options.folder.glob("cand_pool/*/*.jsonl"))
        if not pools:
            raise ShardError(f"{options.folder} holds no cand_pool/*/*.jsonl: give the folder of M-BEIR by --from")
        # The pool of the training split has the candidates of training queries; the others are tried after it.
        self._pools = sorted(pools, key=lambda path: ("train" not in path.name, str(path)))
        self._query, _, self._target = self.task.partition("2")
        self._candidates: Lookup | None = None

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        if self._candidates is None:
            wanted: set[str] = set()
            for record in self._records():
                if isinstance(record, Mapping) and self._is_ours(record):
                    wanted.update(record.get("pos_cand_list") or ())
                    wanted.update(record.get("neg_cand_list") or () if self.options.negatives else ())
            self._candidates = Lookup(self._pools, "did", wanted)
        for number, record in enumerate(self._records(), 1):
            try:
                yield number, self._row(record, self._candidates)
            except RowError as error:
                yield number, error
        self._candidates.close()

    def _records(self) -> Iterator[Any]:
        for path in self._queries:
            yield from json_rows(path)

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        number = str(record.get("qid")).partition(":")[0]
        return number == self._number and record.get("query_modality") == _MODALITIES[self._query]

    def _row(self, record: Any, candidates: Lookup) -> Row:
        key, positives = fields(record, "qid", "pos_cand_list")
        if not self._is_ours(record):
            return Dropped("other-task")
        query = self._item(self._query, record.get("query_txt"), record.get("query_img_path"), key)
        targets = self._choose(positives, 1, f"{key} positive", candidates)
        if not targets:
            return Dropped("other-task")
        negatives = self._choose(
            record.get("neg_cand_list") or (), self.options.negatives, f"{key} negatives", candidates
        )
        return Pair(query, targets[0], tuple(negatives), key, self.options.source, self.task)

    def _choose(self, dids: Any, count: int, key: str, candidates: Lookup) -> list[Item]:
        """The first `count` candidates of the target's modality, in an order drawn by the seed."""
        chosen: list[Item] = []
        for place in permutation(len(dids), self.options.seed, self.options.source, key) if count else ():
            candidate = candidates[dids[place]]
            if candidate.get("modality") == _MODALITIES[self._target]:
                did = str(candidate["did"])
                chosen.append(self._item(self._target, candidate.get("txt"), candidate.get("img_path"), did))
                if len(chosen) == count:
                    break
        return chosen

    def _item(self, modality: str, text: str | None, image: str | None, key: str) -> Item:
        parts: list[Part] = []
        if "I" in modality:
            if not image:
                raise RowError(f"{key} names no picture", "row")
            parts.append(Image(media_path(Path(self._media), image), name=image))
        if "T" in modality:
            parts.append(Text((text or "").strip()))
        return Item(tuple(parts))
