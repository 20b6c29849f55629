"""Hard negatives (`gve mine`): targets that a prober places near a query although they are not its answer.

Every query is compared with every distinct target of a corpus, exactly. What is known to be right is left out: the
positive, equal content, the query itself, and whatever is paired with an equal query anywhere in the shard folder, in
either direction. What is probably right is filtered: a candidate that scores nearly as high as the positive is likelier
an unlabelled answer than a hard negative (positive-aware filter, NV-Retriever, arXiv 2407.15831). The result refers to
rows of the shards and copies nothing (gve.data.negatives).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gve.data.loader import thinned
from gve.data.negatives import NONE, NegativesHeader, digest_of_sources, write_negatives
from gve.data.shards import QUERY, TARGET
from gve.data.sources import Source, open_sources
from gve.encode.encoder import Encoder
from gve.encode.store import EmbeddingStore, encode_items
from gve.encode.topk import top_k
from gve.inputs import InputPolicy
from gve.items import InputError, Item

ROWS_AT_ONCE = 512  # samples whose media are in memory together, over all ranks


@dataclass(frozen=True)
class MiningOptions:
    """Which of the nearest targets count as hard negatives.

    Args:
        top_k: nearest candidates that are looked at; fewer than asked for may pass the filter.
        skip_first: nearest candidates that are passed over before them.
        max_share: a negative's cosine is at most this share of the positive's (of a positive p below 0: at most
            p - (1 - share) |p|); 0 for no such limit.
        margin: a negative's cosine is at most the positive's minus this; None for no such limit.
        corpus: "own": targets of the same source; "task": of all sources of its task; else a shard folder, in which
            all targets of the same modality are searched instead.
    """

    top_k: int = 50
    skip_first: int = 0
    max_share: float = 0.95
    margin: float | None = None
    corpus: str = "own"

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.skip_first < 0 or not 0 <= self.max_share <= 1:
            raise InputError(f"{self}: top_k is 1 or more, skip_first 0 or more, max_share from 0 to 1")

    def ceiling(self, positive: np.ndarray) -> np.ndarray:
        """Highest cosine that a negative may have beside positives of these cosines; NaN where that is NaN."""
        ceiling = np.full_like(positive, np.inf)
        if self.max_share:
            ceiling = positive - (1 - self.max_share) * np.abs(positive)
        if self.margin is not None:
            ceiling = np.minimum(ceiling, positive - self.margin)
        return np.where(np.isnan(positive), np.nan, ceiling)


@dataclass(frozen=True)
class SourceSummary:
    """What mining one source gave.

    Args:
        rows: pairs of the source, held-out ones included.
        unreadable: pairs that could not be read or encoded; they have no negatives.
        corpus: distinct targets that were searched.
        per_pair: negatives asked for.
        enough: share of the pairs that have as many.
        mined: negatives found, over all pairs.
        positive: mean cosine of the pairs.
        negative: mean cosine of the mined negatives; NaN without any.
        looked_at: candidates within the nearest top_k, over all pairs.
        filtered: those of them that the positive-aware filter refused.
    """

    rows: int
    unreadable: int
    corpus: int
    per_pair: int
    enough: float
    mined: int
    positive: float
    negative: float
    looked_at: int
    filtered: int


@dataclass(frozen=True)
class Mined:
    """A file of mined negatives, and what it holds by source."""

    path: Path
    digest: str
    sources: dict[str, SourceSummary]


def mine(
    sources: Mapping[str, Source],
    encoder: Encoder,
    out: str | Path,
    per_pair: Mapping[str, int],
    options: MiningOptions | None = None,
    *,
    store: EmbeddingStore | None = None,
    held_out: Mapping[str, np.ndarray] | None = None,
    inputs: InputPolicy | None = None,
) -> Mined:
    """Mines hard negatives for some sources and writes them; a collective where ranks exist.

    Args:
        sources: all sources of the training's shard folder: what is paired in any of them is known to be right.
        encoder: the prober.
        out: file to write.
        per_pair: source -> hard negatives wanted for each pair; sources with 0 are not mined.
        options: how negatives are chosen.
        store: of the encoder's fingerprint; with a folder, interrupted work goes on where it stopped.
        held_out: source -> sorted rows whose targets are no candidates (dev rows are never trained on).
        inputs: the encoder's input policy, which pre-sampled frames are thinned to.

    Returns:
        The file and a summary, the same on every rank.

    Raises:
        InputError: nothing to mine, or shards that the input policy cannot read.
    """
    options, held_out = options or MiningOptions(), held_out or {}
    store = store if store is not None else EmbeddingStore(None, encoder.fingerprint)
    wanted = {name: count for name, count in per_pair.items() if count > 0}
    if unknown := sorted(set(wanted) - set(sources)):
        raise InputError(f"no source {', '.join(unknown)} in the shards; there are {', '.join(sorted(sources))}")
    if not wanted:
        raise InputError("no source asks for hard negatives: set how many per pair")
    outside = options.corpus not in ("own", "task")
    others = open_sources(options.corpus) if outside else sources
    corpora = {name: _corpus(sources[name], others, options.corpus) for name in sorted(wanted)}
    searched = {own for corpus in corpora.values() for own in corpus}
    for source in [*(sources[name] for name in corpora), *(others[name] for name in searched)]:
        _check_presample(source, inputs)
    jobs = [(sources[name], "query") for name in corpora] + [(sources[name], "target") for name in corpora]
    jobs += [(others[name], "target") for name in sorted(searched) if outside or name not in corpora]
    vectors: dict[tuple[Source, str], np.ndarray] = {}
    with _bar(sum(len(source) for source, _ in jobs)) as advance:
        for source, side in jobs:
            vectors[source, side] = _encode(source, side, encoder, store, inputs, advance)
    known = _known_pairs([*sources.values(), *(others.values() if outside else ())])
    tables, summaries = {}, {}
    for name, listed in corpora.items():
        places, contents = _candidates([others[own] for own in listed], vectors, {} if outside else held_out)
        corpus = np.concatenate([vectors[others[own], "target"] for own in listed])[places]
        queries, targets = vectors[sources[name], "query"], vectors[sources[name], "target"]
        positive = np.einsum("qd,qd->q", queries, targets)
        excluded = _excluded(np.asarray(sources[name].index[:, QUERY:]), known, contents)
        rows, scores, considered = _search(queries, corpus, positive, excluded, wanted[name], options)
        tables[name] = (np.where(rows == NONE, NONE, places[rows]), scores)
        summaries[name] = _summary(rows, scores, positive, considered, len(places))
    ours = set(corpora) if outside else set(corpora) | searched
    header = NegativesHeader(
        corpora=corpora,
        manifest=digest_of_sources(sources, ours),
        prober=encoder.fingerprint,
        policy=inputs.digest() if inputs else "",
        corpus_root=options.corpus if outside else "",
        corpus_manifest=digest_of_sources(others, searched) if outside else "",
        parameters={**asdict(options), "per_pair": wanted},
    )
    digest = write_negatives(Path(out), header, tables) if _rank() == 0 else ""
    return Mined(Path(out), _from_rank_0(digest), summaries)


def choose(
    candidates: np.ndarray, scores: np.ndarray, positive: np.ndarray, count: int, options: MiningOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hard negatives among the nearest candidates.

    Args:
        candidates: [Q, K] int64, by falling similarity; -1 for none.
        scores: [Q, K] float32; not finite where there is no candidate, or one that could not be read.
        positive: [Q] float32, cosine of each query and its positive; NaN where one of the two could not be read.
        count: N, negatives wanted.
        options: filter, and how many candidates are passed over.

    Returns:
        candidates [Q, N], -1 where there are fewer; their scores [Q, N], -inf there; and [Q, 2] int64: candidates that
        were looked at, and those that the filter refused.
    """
    candidates, scores = candidates[:, options.skip_first :], scores[:, options.skip_first :]
    there = np.isfinite(scores) & (candidates != NONE) & ~np.isnan(positive)[:, None]
    passed = there & (scores <= options.ceiling(positive)[:, None])
    first = np.argsort(~passed, axis=1, kind="stable")[:, :count]
    chosen, kept = (np.take_along_axis(values, first, axis=1) for values in (candidates, scores))
    good = np.take_along_axis(passed, first, axis=1)
    rows = np.full((len(candidates), count), NONE, np.int64)
    best = np.full((len(candidates), count), -np.inf, np.float32)
    rows[:, : good.shape[1]] = np.where(good, chosen, NONE)
    best[:, : good.shape[1]] = np.where(good, kept, -np.inf)
    return rows, best, np.stack([there.sum(1), (there & ~passed).sum(1)], axis=1)


def _corpus(source: Source, sources: Mapping[str, Source], corpus: str) -> list[str]:
    """Names of the sources whose targets are searched for a source."""
    if corpus == "own":
        return [source.name]
    record = source.record
    if corpus == "task":
        return sorted(name for name, other in sources.items() if other.record.task == record.task)
    kind = record.task.split("2")[1]
    names = sorted(name for name, other in sources.items() if other.record.task.split("2")[1] == kind)
    if not names:
        raise InputError(f"{corpus} holds no source with targets of kind {kind}, which {source.name} needs")
    return names


def _check_presample(source: Source, inputs: InputPolicy | None) -> None:
    presample = source.record.presample
    if presample and inputs and not presample.serves(inputs.sampling, presample.max_frame_px):
        raise InputError(
            f"source {source.name} stores {presample.sampling} frames, the prober reads {inputs.sampling}: mine with "
            f"--frames '{presample.sampling}'"
        )


class _Side(Sequence[Item]):
    """The queries or the targets of some rows, read when they are asked for.

    Args:
        source: where they lie.
        side: which of the two.
        rows: which rows.
        inputs: policy that pre-sampled frames are thinned to; None gives items without pixels, cheap to hash.
    """

    def __init__(
        self,
        source: Source,
        side: Literal["query", "target"] | str,
        rows: range,
        inputs: InputPolicy | None,
        pixels: bool,
    ) -> None:
        self._source, self._side, self._rows, self._inputs, self._pixels = source, side, rows, inputs, pixels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        pair = self._source.read(self._rows[place], pixels=self._pixels)
        item: Item = getattr(pair, self._side)
        if self._pixels and self._inputs:
            return thinned(self._source, item, self._inputs.sampling)
        return item


def _encode(
    source: Source,
    side: str,
    encoder: Encoder,
    store: EmbeddingStore,
    inputs: InputPolicy | None,
    advance: Callable[[int], object],
) -> np.ndarray:
    """[rows, D] float32 vectors of one side of a source; NaN where a row could not be read."""
    vectors = np.full((len(source), encoder.dim), np.nan, np.float32)
    for start in range(0, len(source), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(source)))
        items, light = (_Side(source, side, rows, inputs, pixels) for pixels in (True, False))
        vectors[rows.start : rows.stop] = encode_items(encoder, items, store, hashable=light).vectors
        advance(len(rows))
    return vectors


def _candidates(
    corpus: Sequence[Source],
    vectors: Mapping[tuple[Source, str], np.ndarray],
    held_out: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(places, content ids [C] uint64, rising) of the distinct readable targets that may be negatives."""
    allowed = [np.isfinite(vectors[source, "target"]).all(1) for source in corpus]
    for source, mask in zip(corpus, allowed, strict=True):
        mask[np.asarray(held_out.get(source.name, ()), np.int64)] = False
    places = np.flatnonzero(np.concatenate(allowed))
    contents, first = np.unique(
        np.concatenate([np.asarray(source.index[:, TARGET]) for source in corpus])[places], return_index=True
    )
    if not len(contents):
        raise InputError(f"no target of {', '.join(source.name for source in corpus)} may be a negative: none was read")
    return places[first], contents


def _known_pairs(sources: Sequence[Source]) -> np.ndarray:
    """[P, 2] uint64: what is paired in any source, both ways round, sorted by the first."""
    pairs = np.concatenate([np.asarray(source.index[:, QUERY:]) for source in sources])
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def _excluded(pairs: np.ndarray, known: np.ndarray, contents: np.ndarray) -> list[np.ndarray]:
    """For each pair the candidates that are the query, its positive, or known to answer an equal query."""
    first, last = (np.searchsorted(known[:, 0], pairs[:, 0], side=side) for side in ("left", "right"))
    excluded = []
    for pair, start, stop in zip(pairs, first, last, strict=True):
        right = np.unique(np.concatenate([pair, known[start:stop, 1]]))
        place = np.searchsorted(contents, right)
        inside = place < len(contents)
        inside[inside] = contents[place[inside]] == right[inside]
        excluded.append(place[inside])
    return excluded


def _search(
    queries: np.ndarray,
    corpus: np.ndarray,
    positive: np.ndarray,
    excluded: Sequence[np.ndarray],
    count: int,
    options: MiningOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `choose`, over the whole corpus; each rank searches for its share of the queries."""
    rank, world = _rank(), _world_size()
    share = slice(rank, None, world)
    depth = options.skip_first + options.top_k
    nearest, scores = top_k(queries[share], corpus, depth, excluded=excluded[share])
    part = choose(nearest, scores, positive[share], count, options)
    if world == 1:
        return part
    parts: list[tuple[np.ndarray, ...]] = [()] * world
    dist.all_gather_object(parts, part)
    whole = tuple(np.empty((len(queries), own.shape[1]), own.dtype) for own in part)
    for other, gathered in enumerate(parts):
        for target, values in zip(whole, gathered, strict=True):
            target[other::world] = values
    return whole[0], whole[1], whole[2]


def _summary(
    rows: np.ndarray, scores: np.ndarray, positive: np.ndarray, considered: np.ndarray, corpus: int
) -> SourceSummary:
    found = rows != NONE
    readable = ~np.isnan(positive)
    return SourceSummary(
        rows=len(rows),
        unreadable=int((~readable).sum()),
        corpus=corpus,
        per_pair=rows.shape[1],
        enough=float(found.all(1).mean()),
        mined=int(found.sum()),
        positive=float(positive[readable].mean()) if readable.any() else float("nan"),
        negative=float(scores[found].mean()) if found.any() else float("nan"),
        looked_at=int(considered[:, 0].sum()),
        filtered=int(considered[:, 1].sum()),
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _from_rank_0(value: str) -> str:
    """The value of rank 0, on all ranks once it has it."""
    if _world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on the terminal of rank 0; yields the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=_rank() != 0 or not console.is_terminal) as bar:
        task = bar.add_task("items", total=total)
        yield lambda count: bar.advance(task, count)
