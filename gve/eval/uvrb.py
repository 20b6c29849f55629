"""UVRB, the Universal Video Retrieval Benchmark: its sixteen sets, their released layout, and the nine abilities.

Names, counts, instructions, metrics and aggregation are those of arXiv 2510.27571; the layout is that of the release
`Alibaba-NLP/UVRB`: `<root>/<NAME>/jsonl/{queries,corpus,instances}.jsonl` beside the media. Classification sets have
the same layout; their corpus rows are the texts of the labels.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gve.eval.classification import CLASSIFICATION
from gve.eval.records import SETS, SetRecord
from gve.items import Image, InputError, Item, Part, Text, Video

# ability -> its parts: sets (leaves of the tree) or abilities that stand before it
ABILITY_PARTS: dict[str, tuple[str, ...]] = {
    "CG": ("MSRVTT", "DiDeMo", "CRB-G"),
    "S": ("CRB-S", "VDC-O"),
    "T": ("CRB-T", "CMRB"),
    "PR": ("DREAM-E", "LoVR-TH", "PEV-K"),
    "FG": ("S", "T", "PR"),
    "LC": ("LoVR-V", "VDC-D"),
    "TXT": ("CG", "FG", "LC"),
    "CMP": ("MS-TI", "MS-TV"),
    "VIS": ("MSRVTT-I2V", "LoVR-C2V"),
    "AVG-A": ("TXT", "CMP", "VIS", "CG", "FG", "LC"),
    "AVG-D": tuple(record.name for record in SETS),
}
ABILITIES = ("TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")
AVERAGES = ("AVG-A", "AVG-D")


def ability_scores(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nine abilities and the two averages, each an unweighted mean of its parts (paper section 4).

    Args:
        values: set name -> score: a float, or an array of bootstrap replicates. Only whole sets belong here.

    Returns:
        AVG-A, AVG-D and the abilities, in the order of reports; None where a set that it needs is missing, so that an
        average never stands for less than its name says.
    """
    known: dict[str, Any] = {name: values.get(name) for name in ABILITY_PARTS["AVG-D"]}
    for ability, parts in ABILITY_PARTS.items():
        scores = [known[part] for part in parts]
        known[ability] = None if any(score is None for score in scores) else sum(scores) / len(scores)
    return {name: known[name] for name in (*AVERAGES, *ABILITIES)}


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum()).upper()


def find_record(name: str) -> SetRecord:
    """The set of a name, whatever its case and separators: "msr-vtt", "CRB_G"; classification sets too.

    Raises:
        InputError: no set has that name.
    """
    known = (*SETS, *CLASSIFICATION)
    records = {_letters(called): record for record in known for called in (*record.aliases, record.name)}
    if _letters(name) in records:
        return records[_letters(name)]
    near = difflib.get_close_matches(_letters(name), records, 1)
    hint = f"; did you mean {records[near[0]].name}?" if near else ""
    raise InputError(f"no UVRB set is called {name!r}{hint} (sets: {', '.join(record.name for record in known)})")


@cache
def published_scores() -> dict[str, dict[str, float]]:
    """Model -> set or ability -> score, as printed in the paper's Tables 1 and 2.

    Two slips of the paper are kept: AVG-A of GME-2B (printed 0.416, its row gives 0.516), and CG, TXT, AVG-A and AVG-D
    of VLM2Vec-V2, which do not follow from its row.
    """
    text = resources.files("gve.eval").joinpath("uvrb_published.csv").read_text()
    names = (*ABILITY_PARTS["AVG-D"], *AVERAGES, *ABILITIES)
    return {row["model"]: {name: float(row[name]) for name in names} for row in csv.DictReader(text.splitlines())}


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Queries, corpus and relevance of one set, ready to encode.

    Args:
        queries: Q items, instruction set.
        corpus: C items.
        positives: corpus rows that answer each query.
        pools: corpus rows each query is ranked against, or None for the whole corpus.
        facts: what the set's own set.json states: `chance`, `ceilings`, `builder`, ...; empty for released data.
        missing: media files that are not on disk.
        notes: deviations from the paper's protocol, one sentence each.
        data_hash: hex SHA-256 of the three listings, whatever the order of their rows.
    """

    record: SetRecord
    queries: tuple[Item, ...]
    corpus: tuple[Item, ...]
    positives: tuple[tuple[int, ...], ...]
    pools: tuple[tuple[int, ...], ...] | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    data_hash: str = ""

    def subset(self, max_queries: int, seed: int = 0) -> RetrievalSet:
        """The same gallery with at most `max_queries` queries, chosen by the seed; pooled sets keep only used clips."""
        if len(self.queries) <= max_queries:
            return self
        key = int.from_bytes(hashlib.sha256(f"subset\0{seed}\0{self.record.name}".encode()).digest()[:16], "big")
        words = np.random.Philox(key=key).random_raw(len(self.queries))
        kept = sorted(np.argsort(words, kind="stable")[:max_queries].tolist())
        used = sorted({row for query in kept for row in self.pools[query]}) if self.pools else range(len(self.corpus))
        place = {row: new for new, row in enumerate(used)}
        return dataclasses.replace(
            self,
            queries=tuple(self.queries[query] for query in kept),
            corpus=tuple(self.corpus[row] for row in used),
            positives=tuple(tuple(place[row] for row in self.positives[query]) for query in kept),
            pools=tuple(tuple(place[row] for row in self.pools[query]) for query in kept) if self.pools else None,
            notes=(*self.notes, f"{max_queries} of {len(self.queries)} queries, chosen by seed {seed}"),
        )


class UVRBReader:
    """Reads sets below one root; media that several sets share become one object, hashed once.

    Args:
        root: the folder that holds `<NAME>/jsonl/` of each set.

    Raises:
        InputError: the folder does not exist.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"no UVRB folder at {self.root}; set uvrb.root, or leave it empty to train without it")
        self._media: dict[tuple[type, Path], Image | Video] = {}

    def names(self, records: Sequence[SetRecord] = SETS) -> list[str]:
        """Sets of these records that are present, in the order of reports.

        Raises:
            InputError: the folder holds none of them.
        """
        present = [record.name for record in records if (self.root / record.name / "jsonl").is_dir()]
        if not present:
            raise InputError(f"{self.root} holds no UVRB set; expected <NAME>/jsonl/queries.jsonl with a name of UVRB")
        return present

    def read(self, name: str) -> RetrievalSet:
        """One set.

        Raises:
            InputError: unknown name, an unreadable listing, a repeated id, a query of another form than the set's, a
                positive that is not in the corpus or not among the query's candidates.
        """
        record = find_record(name)
        folder = self.root / record.name
        digest = hashlib.sha256()
        listings = {kind: listing_rows(folder / "jsonl" / f"{kind}.jsonl", digest) for kind in LISTINGS}
        queries = self._items(folder, listings["queries"], record.instruction)
        corpus = self._items(folder, listings["corpus"], "")
        for item in queries:
            if item.modality != record.query:
                raise InputError(f"{record.name}: query {item.id} is {item.modality or 'empty'}, not {record.query}")
        positives, pools = _relevance(record, queries, corpus, listings["instances"])
        notes = []
        if record.pooled and pools is None:
            notes.append("no candidate lists: ranked against the whole corpus, not comparable with P@1 of a pool")
        if unanswered := sum(not rows for rows in positives):
            notes.append(f"{unanswered} queries have no positive and count as misses")
        shown = {id(medium) for item in corpus for medium in item.media}
        if leaks := sum(any(id(medium) in shown for medium in item.media) for item in queries):
            notes.append(f"{leaks} queries show a file that is also in the corpus")
        repeats = len(queries) - len({(item.text, *map(id, item.media)) for item in queries})
        if repeats > record.num_queries - (record.num_texts or record.num_queries):
            notes.append(f"{repeats} queries repeat another; UVRB counts distinct ones")
        facts_file = folder / "set.json"
        facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
        notes += facts.get("deviations", ())
        media = {medium.name: medium for item in (*queries, *corpus) for medium in item.media}
        missing = tuple(sorted(name for name, medium in media.items() if not Path(str(medium.source)).is_file()))
        return RetrievalSet(record, queries, corpus, positives, pools, facts, missing, tuple(notes), digest.hexdigest())

    def _items(self, folder: Path, rows: Iterable[dict[str, Any]], instruction: str) -> tuple[Item, ...]:
        items: dict[str, Item] = {}
        for row in rows:
            if "id" not in row:
                raise InputError(f"{folder.name}: a row without `id`: {json.dumps(row)[:120]}")
            parts: list[Part] = [self._medium(folder, row[key], kind) for key, kind in MEDIA_KEYS if row.get(key)]
            if text := str(row.get("text") or "").strip():
                parts.append(Text(text))
            identifier = str(row["id"])
            if identifier in items:
                raise InputError(f"{folder.name}: id {identifier} stands twice in one listing")
            items[identifier] = Item(tuple(parts), instruction, identifier)
        if not items:
            raise InputError(f"{folder.name}: a listing has no rows")
        return tuple(items.values())

    def _medium(self, folder: Path, name: str, kind: type[Image] | type[Video]) -> Image | Video:
        """The file of a listing's path, looked for where releases and their users put media."""
        places = [Path(os.path.normpath(folder / where / name)) for where in MEDIA_FOLDERS]
        path = next((place for place in places if place.is_file()), places[0])
        if not path.is_relative_to(os.path.normpath(self.root)):
            raise InputError(f"{folder.name}: media path {name!r} leaves the UVRB folder")
        return self._media.setdefault((kind, path), kind(path, name=str(path.relative_to(os.path.normpath(self.root)))))


LISTINGS = ("queries", "corpus", "instances")
MEDIA_KEYS: tuple[tuple[str, type[Image] | type[Video]], ...] = (("image", Image), ("video", Video))
MEDIA_FOLDERS = (".", "videos", "images")


def listing_rows(path: Path, digest: Any) -> list[dict[str, Any]]:
    """The objects of a jsonl file, whose lines go into the digest.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    # Sorted: the order of a listing is no part of the data, and a hash that held it would tell equal scores apart.
    digest.update(b"\n".join([path.name.encode(), *sorted(content.splitlines())]))
    rows = []
    # Not str.splitlines: it also breaks at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows


def _relevance(
    record: SetRecord, queries: Sequence[Item], corpus: Sequence[Item], rows: Iterable[dict[str, Any]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...] | None]:
    """(positives, pools) as corpus rows; several rows of one query are merged."""
    place = {item.id: row for row, item in enumerate(corpus)}
    wanted = {item.id for item in queries}
    merged: dict[str, dict[str, set[int]]] = {"pos": {}, "candidates": {}}
    for row in rows:
        query = str(row.get("qid"))
        if query not in wanted:
            raise InputError(f"{record.name}: instances name query {query!r}, which is not in queries.jsonl")
        for key, lists in merged.items():
            for target in row.get(key) or ():
                if str(target) not in place:
                    raise InputError(f"{record.name}: {key} of query {query} names {target!r}, not in corpus.jsonl")
                lists.setdefault(query, set()).add(place[str(target)])
    positives = tuple(tuple(sorted(merged["pos"].get(item.id, ()))) for item in queries)
    if not record.pooled or not merged["candidates"]:
        return positives, None
    pools = tuple(tuple(sorted(merged["candidates"].get(item.id, ()))) for item in queries)
    for item, own, pool in zip(queries, positives, pools, strict=True):
        if not set(own) <= set(pool):
            raise InputError(f"{record.name}: query {item.id} has a positive that is not among its candidates")
    return positives, pools
