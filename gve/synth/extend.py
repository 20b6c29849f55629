"""Stage 3: enriched videos into training pairs of seven tasks, in the proportions that are asked for.

T2V is one caption of each video; every other task has a number of pairs in proportion to the videos. Which videos give
them is drawn from their ids. The text of a composed query must need its picture or clip, which is measured: where the
text alone finds the video already, the pair would teach a model to look away from the reference.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from gve.data.mixture import mixture
from gve.items import InputError, Item, Text
from gve.synth.enrich import COMPOSED
from gve.synth.folder import StepFolder
from gve.synth.profiles import chance, pick
from gve.synth.records import Reject
from gve.synth.units import Context, Outcome, Row, Scope, execution
from gve.video import MediaError

if TYPE_CHECKING:  # it imports torch
    from gve.encode.store import EmbeddingStore

Entry = TypeVar("Entry")

_log = logging.getLogger(__name__)

TASKS: Mapping[str, float] = {
    task: mixture()[f"uvrd_{task.lower()}"].size_7b / mixture()["uvrd_t2v"].size_7b
    for task in ("T2V", "T2I", "I2V", "T2T", "TI2V", "V2V", "TV2V")
}
"""Task -> pairs for each pair of T2V, by the published counts of UVRD."""
PAID = ("T2I", *COMPOSED)
"""Tasks whose texts were written for them alone."""


@dataclass(frozen=True)
class ExtendOptions:
    """What is made of the enriched videos.

    Args:
        tasks: task -> pairs for each video, at most 1; the published proportions where nothing is given.
        text_only_k: a composed query is refused where its text alone ranks its video among the first k of the pool; 0
            measures nothing and needs no encoder.
        pool_videos: videos that are ranked, drawn from the run; of a smaller pool the same share is refused, at least
            the first.
        batch: videos that are in memory together while they are measured.
    """

    tasks: Mapping[str, float] = field(default_factory=lambda: dict(TASKS))
    text_only_k: int = 10
    pool_videos: int = 1000
    batch: int = execution(64)

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise InputError(f"extend: no task {min(unknown)!r}: use {', '.join(TASKS)}")
        if any(not 0 <= share <= 1 for share in self.tasks.values()):
            raise InputError(f"extend: tasks {dict(self.tasks)}: give pairs for each video, from 0 to 1")
        if self.text_only_k < 0 or self.pool_videos <= max(1, self.text_only_k) or self.batch < 1:
            raise InputError(
                f"extend: text_only_k {self.text_only_k}, pool_videos {self.pool_videos}, batch {self.batch}: the pool "
                "must be larger than k, and the batch at least 1"
            )

    @property
    def measures(self) -> bool:
        """Whether an encoder is needed."""
        return bool(self.text_only_k) and any(self.tasks.get(task, 0) for task in COMPOSED)


class Extend:
    """Makes the pairs. It sees the whole run, since proportions are of the whole."""

    Options: ClassVar[type] = ExtendOptions
    scope: ClassVar[Scope] = "run"

    def __init__(self, options: ExtendOptions, context: Context) -> None:
        self._options, self._context, self._seed = options, context, context.seed

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The encoder that measures, where one does."""
        return {"encoder": self._context.encoder().fingerprint} if self._options.measures else {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """A video without a pair is dropped for "no-pair"."""
        found = self._measured(rows) if self._options.measures else {}
        chosen = self._chosen(rows, found)
        model = self._model()
        for row in rows:
            pairs, rejects = [], []
            for task in self._options.tasks:
                if row["id"] in chosen[task]:
                    pairs.append(self._pair(row, task, model))
                elif task in PAID and _offers(row, task):
                    rejects.append(self._refusal(row, task, found))
            parts = len(pairs) + len(rejects)
            if not pairs:
                rejects.insert(0, Reject(row["id"], "extend", "no-pair"))
            yield Outcome(row["id"], tuple(pairs), tuple(rejects), parts, len(pairs))

    def _chosen(self, rows: Iterable[Row], found: Mapping[str, tuple[str, float | None]]) -> dict[str, frozenset[str]]:
        """Task -> ids of the videos that give a pair of it: those with the smallest draws among those that can."""
        count, offers = 0, Counter[str]()
        draws: dict[str, list[tuple[float, str]]] = {task: [] for task in self._options.tasks}
        for row in rows:
            count += 1
            for task, own in draws.items():
                if self._options.tasks[task] and _offers(row, task) and _part(row, task) not in found:
                    own.append((chance(self._seed, row["id"], task, "pair"), row["id"]))
                    offers[task] += 1
        wanted = targets(self._options.tasks, count)
        for task, number in wanted.items():
            if offers[task] < number:
                _log.warning("%s: %d pairs of the %d that were asked for", task, offers[task], number)
        return {task: frozenset(id for _, id in nsmallest(wanted[task], own)) for task, own in draws.items()}

    def _refusal(self, row: Row, task: str, found: Mapping[str, tuple[str, float | None]]) -> Reject:
        """Why a text that was paid for makes no pair."""
        reason, score = found.get(_part(row, task), ("over-target", None))
        text = row["enrichment"]["composed"][task]["text"] if task in COMPOSED else ""
        return Reject(_part(row, task), "extend", reason, score, text)

    def _pair(self, row: Row, task: str, model: str) -> Row:
        enrichment, id = row["enrichment"], row["id"]
        captions = enrichment["captions"]
        video = {"video": row["video"]}
        told = pick(len(captions), self._seed, id, "T2V")
        made: dict[str, Any] = {"stage": "extend", "profile": enrichment["profile"]}
        if task == "T2V":
            query, target, text = [{"text": captions[told]["text"]}], [video], captions[told]
        elif task == "T2T":
            # The two must not hold the caption that T2V has, so the tasks do not repeat each other.
            rest = sorted(
                (caption for place, caption in enumerate(captions) if place != told),
                key=lambda caption: chance(self._seed, id, "T2T", caption["style"]),
            )
            query, target, text = [{"text": rest[0]["text"]}], [{"text": rest[1]["text"]}], rest[0]
            made["target_style"] = rest[1]["style"]
        elif task == "T2I":
            frame = enrichment["frame"]
            text = frame["captions"][pick(len(frame["captions"]), self._seed, id, "T2I")]
            query, target = [{"text": text["text"]}], [{"image": frame["image"]}]
        elif task in COMPOSED:
            text = enrichment["composed"][task]
            query, target = [{COMPOSED[task][2]: text["reference"]}, {"text": text["text"]}], [video]
            made["strategy"] = text["strategy"]
        else:
            references, kind = ("frames", "image") if task == "I2V" else ("clips", "video")
            reference = row[references][pick(len(row[references]), self._seed, id, task)]
            query, target, text = [{kind: reference}], [video], {}
        if text:
            made |= {"style": text["style"], "prompt": text["prompt"], "model": model}
        return {
            "id": _part(row, task),
            "task": task,
            "of": [id],
            "query": query,
            "target": target,
            "provenance": {"source": row["source"], **made},
        }

    def _model(self) -> str:
        """The captioner that wrote the texts, as the step before has it in its identity."""
        identity = StepFolder(self._context.media.root, "enrich").identity()
        return str(identity.fingerprint.get("captioner", "")) if identity else ""

    def _measured(self, rows: Iterable[Row]) -> dict[str, tuple[str, float | None]]:
        """Pair id -> reason and score of the composed queries that are refused.

        Reason "text-finds-it" with the number of pool videos that are nearer to the text than its own; or "unreadable".
        The text is embedded as a query of T2V. Vectors are kept in `embeddings/` of the run, so an interrupted
        measurement goes on.
        """
        from gve.encode.store import EmbeddingStore, encode_items  # imports torch

        wanted = [task for task in COMPOSED if self._options.tasks.get(task)]
        if not any(_offers(row, task) for row in rows for task in wanted):
            return {}
        encoder = self._context.encoder()
        store = EmbeddingStore(self._context.media.root / "embeddings", encoder.fingerprint)
        drawn = ((chance(self._seed, row["id"], "pool"), row["id"], row["video"]) for row in rows)
        pool = nsmallest(self._options.pool_videos, drawn, key=lambda entry: entry[:2])
        videos = np.concatenate([self._vectors(group, store) for group in _groups((v for *_, v in pool), self._batch)])
        readable = np.isfinite(videos).all(1)
        names = np.array([id for _, id, _ in pool], object)[readable]
        videos = videos[readable]
        first = max(1, math.floor(self._options.text_only_k * len(names) / self._options.pool_videos))
        instruction = mixture()["uvrd_t2v"].instruction
        refused: dict[str, tuple[str, float | None]] = {}
        composed = (
            (_part(row, task), row["id"], row["enrichment"]["composed"][task]["text"], row["video"])
            for row in rows
            for task in wanted
            if _offers(row, task)
        )
        for group in _groups(composed, self._batch):
            own = self._vectors([video for *_, video in group], store)
            texts = [Item((Text(text),), instruction) for _, _, text, _ in group]
            queries = encode_items(encoder, texts, store).vectors
            similarities = queries @ videos.T
            similarities[np.array([[id] for _, id, *_ in group], object) == names] = -np.inf
            nearer = (similarities > (queries * own).sum(1, keepdims=True)).sum(1)
            for (part, *_), vector, count in zip(group, own, nearer.tolist(), strict=True):
                if not np.isfinite(vector).all():
                    refused[part] = "unreadable", None
                elif count < first:
                    refused[part] = "text-finds-it", float(count)
        return refused

    @property
    def _batch(self) -> int:
        return self._options.batch

    def _vectors(self, locators: Sequence[Mapping[str, Any]], store: EmbeddingStore) -> np.ndarray:
        """[N, D] of videos; NaN where one cannot be read."""
        from gve.encode.store import encode_items

        encoder = self._context.encoder()
        vectors = np.full((len(locators), encoder.dim), np.nan, np.float32)
        items = {}
        for row, locator in enumerate(locators):
            with suppress(MediaError):  # its tar is damaged; the caller counts it
                items[row] = Item((self._context.media.video(locator),))
        vectors[list(items)] = encode_items(encoder, list(items.values()), store).vectors
        return vectors


def targets(tasks: Mapping[str, float], videos: int) -> dict[str, int]:
    """Task -> pairs that a run of so many enriched videos should give; rounded half up."""
    return {task: math.floor(share * videos + 0.5) for task, share in tasks.items()}


def _groups(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    source = iter(entries)
    while group := list(islice(source, size)):
        yield group


def _offers(row: Row, task: str) -> bool:
    """Whether the video has what a pair of the task is made of."""
    enrichment = row["enrichment"]
    if task in COMPOSED:
        return task in enrichment["composed"]
    if task == "T2I":
        return "frame" in enrichment
    if task in ("T2V", "T2T"):
        return len(enrichment["captions"]) >= (1 if task == "T2V" else 3)
    return bool(row.get("frames" if task == "I2V" else "clips"))


def _part(row: Row, task: str) -> str:
    """Id of the pair of a task."""
    return f"{task.lower()}:{row['id']}"
