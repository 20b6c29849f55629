"""Is what lies on this disk the benchmark? Every file opened once, every count held against the published one."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gve.eval.records import SetRecord
from gve.eval.uvrb import LISTINGS, RetrievalSet, UVRBReader, find_record, listing_rows
from gve.items import Image, InputError, Video
from gve.video import MediaError, Sampling, decode_guarded, decode_image

VERDICTS = "check.jsonl"
"""What is known of each file, below the root: an interrupted check goes on, and a second one reads only new files."""

_LOOK = Sampling.uniform(8)  # the frames of the protocol: a clip that shows them can be evaluated
_NOTED, _WRONG = 0.05, 0.25  # relative: the paper's word counter is not known; another field or a trim is far off


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        kind: missing, unreadable, short, duplicate-name, duplicate-content, split-duplicate, positives, ids, text,
            repeated-text, leak, count, length, words, listing or changed.
        what: a file, an id, a count.
        detail: one sentence.
        wrong: whether scores are not to be trusted until it is mended; else it is only worth knowing.
    """

    kind: str
    what: str
    detail: str
    wrong: bool = True


@dataclass(frozen=True)
class FileVerdict:
    """What is known of a media file: `problem` is empty when it decodes; frames and length are those of a video."""

    problem: str = ""
    reason: str = ""
    frames: int = 0
    seconds: float = 0.0


@dataclass
class SetCheck:
    """What was found in one set.

    Args:
        name: of the set.
        queries, corpus: counts.
        words: mean words of a query text; 0 without text.
        seconds: mean length of the corpus clips that were read, in seconds; 0 where none was.
        findings: what was found, the wrong first.
    """

    name: str
    queries: int = 0
    corpus: int = 0
    words: float = 0.0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.wrong]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        shown = [
            {"kind": f.kind, "what": f.what, "detail": f.detail, "wrong": f.wrong} for f in self.findings
        ]  # fmt: skip
        return {
            "queries": self.queries,
            "corpus": self.corpus,
            "words": round(self.words, 2),
            "seconds": round(self.seconds, 2),
            "findings": shown,
        }


class MediaInspector:
    """Opens media files once each, in killable children, and remembers the verdicts.

    Args:
        root: where verdicts are kept; on a read-only disk they are not.
        jobs: files opened side by side.
        timeout_s: the longest that one file may take, in seconds.
    """

    def __init__(self, root: Path, jobs: int = 2, timeout_s: float = 120.0) -> None:
        self.path, self.jobs, self.timeout_s = root / VERDICTS, jobs, timeout_s
        self._known: dict[tuple[str, int, int], FileVerdict] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["path"], row["bytes"], row["mtime_ns"]] = FileVerdict(**row["verdict"])
                except (ValueError, KeyError, TypeError):  # the line at which an earlier check was killed
                    continue

    def inspect(self, media: Sequence[Image | Video], progress: Callable[[int, int], None]) -> dict[str, FileVerdict]:
        """Verdict of each file that is there, by the name of the medium."""
        todo = [medium for medium in media if self._recall(medium) is None and Path(str(medium.source)).is_file()]
        with ThreadPoolExecutor(self.jobs) as pool:
            for done, (medium, verdict) in enumerate(zip(todo, pool.map(self._open, todo), strict=True), 1):
                self._remember(medium, verdict)
                progress(done, len(todo))
        known = ((medium.name, self._recall(medium)) for medium in media)
        return {name: verdict for name, verdict in known if verdict is not None}

    def _key(self, medium: Image | Video) -> tuple[str, int, int] | None:
        try:
            stat = Path(str(medium.source)).stat()
        except OSError:
            return None
        return medium.name, stat.st_size, stat.st_mtime_ns

    def _recall(self, medium: Image | Video) -> FileVerdict | None:
        key = self._key(medium)
        return None if key is None else self._known.get(key)

    def _remember(self, medium: Image | Video, verdict: FileVerdict) -> None:
        key = self._key(medium)
        if key is None:
            return
        self._known[key] = verdict
        row = {"path": key[0], "bytes": key[1], "mtime_ns": key[2], "verdict": vars(verdict)}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:  # a read-only release: the next check opens the files again
            return

    def _open(self, medium: Image | Video) -> FileVerdict:
        source = str(medium.source)
        try:
            if isinstance(medium, Image):
                decode_image(source)
                return FileVerdict(frames=1)
            frames = decode_guarded(source, _LOOK, timeout_s=self.timeout_s, name=medium.name)
        except MediaError as error:
            return FileVerdict(str(error), error.reason)
        # uniform() takes the last frame too, so its time is the length but for that frame's own.
        return FileVerdict(frames=frames.num_frames, seconds=float(frames.times_s[-1]) + 1.0 / frames.native_fps)


def check_sets(
    root: str | Path,
    names: Sequence[str],
    *,
    decode: bool = True,
    counts: bool = True,
    min_frames: int = 8,
    inspector: MediaInspector | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[SetCheck]:
    """Checks sets below one root; files that sets share are opened once.

    Args:
        root: folder of the sets.
        names: what to check.
        decode: open every media file. Without it lengths are not known either.
        counts: compare counts, lengths and words with the published ones; off for stand-ins such as the toy world.
        min_frames: a clip with fewer frames is noted: the protocol's 8 would repeat some.
        inspector: how files are opened; one with default settings when None.
        progress: called with (set, files done, files to open).

    Raises:
        InputError: the root does not exist, or a name is unknown.
    """
    reader = UVRBReader(root)
    inspector = inspector or MediaInspector(reader.root)
    checks = []
    for name in names:
        record = find_record(name)
        check = SetCheck(record.name)
        checks.append(check)
        try:
            check.findings += _listing_problems(record, reader.root / record.name)
            tested = reader.read(record.name)
        except InputError as error:
            if not check.wrong:  # else the reader names the first of what is listed already
                check.findings.append(Finding("listing", record.name, str(error)))
            continue
        check.queries, check.corpus = len(tested.queries), len(tested.corpus)
        words = [len(query.text.split()) for query in tested.queries if query.text]
        check.words = sum(words) / len(words) if words else 0.0
        media = list(
            {medium.name: medium for item in (*tested.queries, *tested.corpus) for medium in item.media}.values()
        )
        check.findings += _relevance_problems(tested)
        check.findings += _media_problems(tested, media)
        if decode:
            verdicts = inspector.inspect(media, functools.partial(progress, record.name))
            check.findings += _verdict_problems(verdicts, min_frames)
            lengths = [
                verdict.seconds
                for item in tested.corpus
                for medium in item.media
                if (verdict := verdicts.get(medium.name)) and verdict.seconds
            ]
            check.seconds = sum(lengths) / len(lengths) if lengths else 0.0
        if counts:
            check.findings += _count_problems(tested, check)
        check.findings.sort(key=lambda finding: not finding.wrong)
    return checks


def _listing_problems(record: SetRecord, folder: Path) -> Iterator[Finding]:
    """All that the reader would refuse, of which it names the first only; and listings that were changed by hand.

    Raises:
        InputError: a listing cannot be read.
    """
    facts = folder / "set.json"
    stated = json.loads(facts.read_text()).get("listings", {}) if facts.is_file() else {}
    for name in LISTINGS:
        path = folder / "jsonl" / f"{name}.jsonl"
        if name in stated and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != stated[name]:
            yield Finding("changed", path.name, "it is not the file that prepare wrote; prepare the set again")
    rows = {name: listing_rows(folder / "jsonl" / f"{name}.jsonl", hashlib.sha256()) for name in LISTINGS}
    known: dict[str, Counter[str]] = {}
    for name in ("queries", "corpus"):
        known[name] = Counter(str(row.get("id")) for row in rows[name])
        for identifier, count in known[name].items():
            if count > 1:
                yield Finding("ids", identifier, f"stands {count} times in {name}.jsonl")
    if "T" in record.query:
        for row in rows["queries"]:
            if not str(row.get("text") or "").strip():
                yield Finding("text", str(row.get("id")), "the query has no text")
    for row in rows["instances"]:
        query = str(row.get("qid"))
        if query not in known["queries"]:
            yield Finding("positives", query, "instances.jsonl names a query that is not in queries.jsonl")
        for key in ("pos", "candidates"):
            for target in row.get(key) or ():
                if str(target) not in known["corpus"]:
                    yield Finding("positives", query, f"{key} names {target!r}, which is not in corpus.jsonl")


def _relevance_problems(tested: RetrievalSet) -> Iterator[Finding]:
    """What the listings alone show. Ids that stand twice and positives outside the corpus the reader has refused."""
    for query, rows in zip(tested.queries, tested.positives, strict=True):
        if not rows:
            yield Finding("positives", query.id, "no positive: it counts as a miss")
    if tested.record.pooled and tested.pools is None:
        yield Finding("positives", tested.record.name, "no candidate lists: P@1 of a pool cannot be computed")
    allowed = tested.record.num_queries - (tested.record.num_texts or tested.record.num_queries)
    repeats = Counter((query.text, *(medium.name for medium in query.media)) for query in tested.queries)
    extra = sum(repeats.values()) - len(repeats)
    for key, count in repeats.items():
        if count > 1:
            known = tested.record.pooled or extra <= allowed  # candidates differ, or the list is known for them
            yield Finding("repeated-text", key[0][:80] or key[-1], f"asked by {count} queries", wrong=not known)
    shown = [{medium.name for medium in item.media} for item in tested.corpus]
    everywhere = {name for names in shown for name in names}
    for number, query in enumerate(tested.queries):
        own = {name for row in tested.pools[number] for name in shown[row]} if tested.pools else everywhere
        for medium in query.media:
            if medium.name in own:
                yield Finding("leak", medium.name, f"query {query.id} shows a file that is in the corpus")


def _media_problems(tested: RetrievalSet, media: Iterable[Image | Video]) -> Iterator[Finding]:
    """Files that are not there, and files that are there twice, by name or by content."""
    for name in tested.missing:
        yield Finding("missing", name, "not on the disk")
    names: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(tested.corpus):
        for medium in item.media:
            names[medium.name].append(row)
    yield from _duplicates(tested, names, "duplicate-name", "one file")
    contents: dict[str, list[int]] = defaultdict(list)
    asked = {medium.name: query.id for query in tested.queries for medium in query.media}
    for group in _equal_files(media):
        rows = sorted({row for name in group for row in names.get(name, ())[:1]})
        if len(rows) > 1:
            contents[group[0]] = rows
        for name in group:
            if name in asked and rows and name not in names:
                corpus = tested.corpus[rows[0]].id
                yield Finding("leak", name, f"query {asked[name]} shows the same bytes as {corpus} of the corpus")
    yield from _duplicates(tested, contents, "duplicate-content", "the same bytes")


def _duplicates(tested: RetrievalSet, groups: Mapping[str, Sequence[int]], kind: str, what: str) -> Iterator[Finding]:
    """Copies are harmless while every query has all of them for positives, or none. Else no encoder can be right."""
    twins = {row: rows for rows in groups.values() if len(rows) > 1 for row in rows}
    for name, rows in groups.items():
        if len(rows) > 1:
            ids = ", ".join(tested.corpus[row].id for row in rows[:5])
            yield Finding(kind, name, f"{what} for {len(rows)} items of the corpus: {ids}", wrong=False)
    for number, (query, positives) in enumerate(zip(tested.queries, tested.positives, strict=True)):
        pool = tested.pools[number] if tested.pools else None
        for row in positives:
            for twin in twins.get(row, ()):
                if twin not in positives and (pool is None or twin in pool):
                    answer, copy = tested.corpus[row].id, tested.corpus[twin].id
                    yield Finding(
                        "split-duplicate", query.id, f"{copy} is {what} as its positive {answer}, yet no positive"
                    )


def _equal_files(media: Iterable[Image | Video]) -> Iterator[list[str]]:
    """Names of files with equal bytes. Only files of one size are read: a benchmark of 490 GB is not hashed whole."""
    sizes: dict[int, list[Image | Video]] = defaultdict(list)
    for medium in media:
        path = Path(str(medium.source))
        if path.is_file():
            sizes[path.stat().st_size].append(medium)
    for alike in sizes.values():
        if len(alike) < 2:
            continue
        hashes: dict[str, list[str]] = defaultdict(list)
        for medium in alike:
            hashes[medium.content_hash()].append(medium.name)
        yield from (sorted(names) for names in hashes.values() if len(names) > 1)


def _verdict_problems(verdicts: Mapping[str, FileVerdict], min_frames: int) -> Iterator[Finding]:
    for name, verdict in verdicts.items():
        if verdict.problem:
            yield Finding("unreadable", name, verdict.problem)
        elif verdict.seconds and verdict.frames < min_frames:
            yield Finding(
                "short", name, f"{verdict.frames} frames; {min_frames} are sampled, so some repeat", wrong=False
            )


def _count_problems(tested: RetrievalSet, check: SetCheck) -> Iterator[Finding]:
    """Counts and means against the paper's."""
    record = tested.record
    sizes = sorted({len(pool) for pool in tested.pools}) if tested.pools else [len(tested.corpus)]
    for what, sizes_found, published in (
        ("queries", [check.queries], record.num_queries),
        ("candidates a query" if tested.pools else "corpus", sizes, record.num_corpus),
    ):
        for size in sizes_found:
            if size != published:
                reason = record.known_counts.get(size)
                detail = f"{published:,} are published" + (f"; {reason}" if reason else "")
                yield Finding("count", f"{size:,} {what}", detail, wrong=reason is None)
    for kind, found, said in (("length", check.seconds, record.seconds), ("words", check.words, record.words)):
        if found and said and abs(found - said) > _NOTED * said:
            unit = "s a clip" if kind == "length" else "words a query"
            far = abs(found - said) > _WRONG * said
            yield Finding(kind, f"{found:.1f} {unit}", f"{said:,.1f} is published", wrong=far)
