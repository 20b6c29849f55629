"""The last step: training pairs into shards of schema v1 that `gve fit` reads, one source for each task."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from gve.data.build import shrink
from gve.data.exclusion import CONTAMINATED, read_exclusions
from gve.data.manifest import Presample
from gve.data.mixture import mixture
from gve.data.shards import ShardWriter
from gve.items import InputError, Item, Media, Pair, Part, Video
from gve.synth.records import Reject
from gve.synth.units import Context, Outcome, Row, Scope, execution
from gve.video import MediaError, Sampling, decode_guarded

SHARDS = "shards"
PUBLISHED = "uvrd"
"""How the published sources of synthesised pairs begin (gve.data.mixture)."""


@dataclass(frozen=True)
class OutputOptions:
    """How pairs become shards.

    Args:
        prefix: of the sources' names: `uvrd_t2v`, ... With the default, recipes of the published mixture find them.
        instructions: task -> query instruction; those of the published mixture's UVRD rows where none is given.
        presample: store frames instead of videos, for example "uniform(8)": smaller and far faster to train on, but
            never good for more frames. Empty stores the original files.
        presample_px: most pixels of a stored frame; 0 keeps its size.
        jpeg_quality: of stored frames, 1 to 100.
        samples_per_shard: at most 10,000.
        exclude: exclusion list of ids, of weak pairs or of pairs, that are left out: `gve synth audit` writes one.
        jobs: pairs that are read, or decoded, side by side.
    """

    prefix: str = PUBLISHED
    instructions: Mapping[str, str] = field(default_factory=dict)
    presample: str = ""
    presample_px: int = 0
    jpeg_quality: int = 95
    samples_per_shard: int = 1000
    exclude: Path | None = None
    jobs: int = execution(2)


class Output:
    """Writes the shards; killed in the middle, it writes them anew, over what is there."""

    Options: ClassVar[type] = OutputOptions
    scope: ClassVar[Scope] = "run"

    def __init__(self, options: OutputOptions, context: Context) -> None:
        self._options = options
        self._media = context.media
        self._root = context.media.root / SHARDS
        self._presample = None
        if options.presample:
            self._presample = Presample(Sampling.parse(options.presample), options.presample_px, options.jpeg_quality)
        self._excluded = read_exclusions(options.exclude) if options.exclude else frozenset[str]()

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What is on the exclusion list: the same file may hold other ids at another time."""
        if not self._excluded:
            return {"excluded": 0}
        digest = hashlib.sha256("\n".join(sorted(self._excluded)).encode()).hexdigest()
        return {"excluded": f"{len(self._excluded)} {digest[:16]}"}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Raises InputError when no pair is left to write."""
        reasons = Counter[str]()
        writers: dict[str, ShardWriter] = {}
        try:
            for row, read in self._read(rows):
                outcome = self._written(row, read, writers)
                reasons.update(reject.reason for reject in outcome.rejects)
                yield outcome
            if not any(writer.count for writer in writers.values()):
                why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none was made"
                raise InputError(f"no pair is left to write ({why}): funnel.json says what became of the input")
            for writer in writers.values():
                if writer.count:
                    writer.close()
        finally:
            for writer in writers.values():
                writer.abort()  # harmless where it is closed

    def _written(self, row: Row, read: Pair | Reject, writers: dict[str, ShardWriter]) -> Outcome:
        if isinstance(read, Reject):
            return Outcome(row["id"], rejects=(read,))
        task = row["task"]
        if task not in writers:
            writers[task] = self._writer(task)
        provenance = {**row.get("provenance", {}), "id": row["id"], "of": row["of"]}
        try:
            key = writers[task].write(read, provenance)
        except InputError as error:  # not what its task says, or text that is no valid Unicode
            return Outcome.drop(row, "output", "pair", detail=str(error))
        return Outcome(row["id"], ({"id": row["id"], "task": task, "of": row["of"], "key": key},))

    def _writer(self, task: str) -> ShardWriter:
        options = self._options
        published = mixture().get(f"{PUBLISHED}_{task.lower()}")
        instruction = options.instructions.get(task) or (published.instruction if published else "")
        if not instruction:
            raise InputError(f"task {task} has no instruction: give one by `output: {{instructions: {{{task}: ...}}}}`")
        return ShardWriter(
            self._root,
            task=task,
            source=f"{options.prefix}_{task.lower()}",
            samples_per_shard=options.samples_per_shard,
            instruction=instruction,
            presample=self._presample if "V" in task else None,
            replace=True,
        )

    def _read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Pair | Reject]]:
        """The rows in order, each with its pair in memory, or why there is none; `jobs` at a time."""
        waiting: deque[tuple[Row, Future[Pair | Reject]]] = deque()
        pool = ThreadPoolExecutor(self._options.jobs)
        try:
            for row in rows:
                waiting.append((row, pool.submit(self._pair, row)))
                if len(waiting) > 2 * self._options.jobs:
                    row, future = waiting.popleft()
                    yield row, future.result()
            while waiting:
                row, future = waiting.popleft()
                yield row, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _pair(self, row: Row) -> Pair | Reject:
        if left_out := self._excluded.intersection({row["id"], *row["of"]}):
            return Reject(row["id"], "output", CONTAMINATED, detail=f"{min(left_out)} is on the exclusion list")
        try:
            query, target, *negatives = (
                self._loaded(self._media.item(parts))
                for parts in (row["query"], row["target"], *row.get("negatives", ()))
            )
            return Pair(query, target, tuple(negatives))
        except MediaError as error:
            return Reject(row["id"], "output", error.reason, detail=str(error))
        except FileNotFoundError as error:
            return Reject(row["id"], "output", "missing", detail=str(error))

    def _loaded(self, item: Item) -> Item:
        """The item with its media's bytes in memory, videos as Frames where they are pre-sampled."""
        return replace(item, parts=tuple(self._part(part) for part in item.parts))

    def _part(self, part: Part) -> Part:
        if not isinstance(part, Media):
            return part
        data = part.source.read_bytes() if isinstance(part.source, Path) else part.source
        if isinstance(part, Video) and self._presample is not None:
            assert isinstance(data, bytes)
            frames = decode_guarded(data, self._presample.sampling, name=part.name)
            # The hash of the original, so that the pair can still be traced to it.
            return replace(part, source=shrink(frames, self._presample.max_frame_px), sha256=part.content_hash())
        return replace(part, source=data)
