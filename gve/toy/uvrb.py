"""The mini UVRB: sixteen sets with the names, query forms, pool rules and metrics of the real ones, made of toy clips.

Every number that bounds a score follows from the scenes: chance by its formula; the static ceiling as the best score
of any ranking that cannot tell clips with the same middle frame apart, the shuffled one with the same eight frames in
any order; the single-sided ceilings of composed queries as the best score of a judge that reads one side only.
Relevance is the checker run over the whole gallery, so an oracle scores 1.0.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

from gve.eval.uvrb import SETS, find_record
from gve.toy import captions, families
from gve.toy.captions import Caption, Teller
from gve.toy.forms import tells
from gve.toy.language import DIALECTS
from gve.toy.panels import Composed, panel_queries
from gve.toy.render import Shot, Still
from gve.toy.scenes import SAMPLED_FRAMES, SLOTS, Clip, clip_frames, middle_scene, shows, shuffled_state, still_state

MEDIA = "../media"  # one folder for all sets, seen from a set's own


@dataclass(frozen=True)
class Query:
    """A query and what answers it.

    Args:
        positives: rows of the corpus that the checker finds true.
        pool: rows it is ranked against; empty for the whole corpus.
        fits_text, fits_media: rows of the pool that fit one side of a composed query.
    """

    positives: tuple[int, ...]
    text: str = ""
    image: Still | None = None
    video: Shot | None = None
    pool: tuple[int, ...] = ()
    fits_text: tuple[int, ...] = ()
    fits_media: tuple[int, ...] = ()


@dataclass(frozen=True)
class MiniSet:
    """One test set before it is written."""

    name: str
    queries: tuple[Query, ...]
    corpus: tuple[Clip, ...]
    notes: Mapping[str, object] = field(default_factory=dict)

    def shots(self) -> Iterator[Shot | Still]:
        """Everything to be rendered."""
        for clip in self.corpus:
            yield Shot(clip)
        for query in self.queries:
            if query.image:
                yield query.image
            if query.video:
                yield query.video

    def _pool(self, query: Query) -> Sequence[int]:
        return query.pool or range(len(self.corpus))

    def chance(self) -> float:
        """Expected score of a random order: the mean over queries of 1 - C(C - p, k) / C(C, k)."""
        k = find_record(self.name).k
        return _mean(hit_rate(len(self._pool(q)), len(q.positives), k) for q in self.queries)

    def ceilings(self) -> dict[str, float]:
        """Best expected scores of judges that lack something; see the module."""
        middle = _numbered(still_state(middle_scene(clip)) for clip in self.corpus)
        bag = _numbered(shuffled_state(clip) for clip in self.corpus)
        found = {
            "static": self._best(lambda query, row: middle[row]),
            "shuffled": self._best(lambda query, row: bag[row]),
        }
        if self.queries[0].pool:
            found["text_only"] = self._best(lambda query, row: row in query.fits_text)
            found["media_only"] = self._best(lambda query, row: row in query.fits_media)
        return found

    def _best(self, told: Callable[[Query, int], object]) -> float:
        """Mean best score of a judge to whom the rows of a pool differ only in what `told` returns."""
        k = find_record(self.name).k
        return _mean(best_hit_rate([(row, told(q, row)) for row in self._pool(q)], q, k) for q in self.queries)


def _numbered(states: Iterable[object]) -> list[int]:
    """A small number per distinct state: states are deep, and counted once per query."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(state, len(numbers)) for state in states]


def hit_rate(corpus: int, positives: int, k: int) -> float:
    """Probability that one of `positives` is among the first k of a random order of `corpus` items."""
    k = min(k, corpus)  # a tiny corpus is shown whole
    return 1.0 - comb(corpus - positives, k) / comb(corpus, k)


def best_hit_rate(classes: Sequence[tuple[int, object]], query: Query, k: int) -> float:
    """Best expected recall at k of a ranking that cannot tell rows of one class apart.

    It puts a class with positives first. If all of that class fits into the first k, the hit is certain; else the
    first k are a random draw from it.

    Args:
        classes: (row, class) of every candidate.
    """
    sizes = Counter(name for _, name in classes)
    good = Counter(name for row, name in classes if row in query.positives)
    return max((hit_rate(sizes[name], count, k) for name, count in good.items()), default=0.0)


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


class Builder:
    """Draws the galleries and asks the questions.

    Args:
        seed: of the whole benchmark.
        look: dialect of the pictures and of the words. "A" holds out scenes, "B" is the transfer.
        scale: share of the mini sizes, for tests; 1 gives them as they stand.
    """

    def __init__(self, seed: int, look: str = "A", scale: float = 1.0):
        self.seed, self.look, self.scale = f"uvrb-{seed}-{look}", look, scale

    def build(self) -> list[MiniSet]:
        """All sixteen sets, in the order of reports."""
        built = {mini.name: mini for maker in SET_MAKERS for mini in maker(self)}
        return [built[record.name] for record in SETS]

    def size(self, count: int) -> int:
        return max(4, round(count * self.scale))

    def gallery(self, family: Callable[[families.Maker], families.Group], count: int, total: int) -> list[Clip]:
        """The first `total` clips of `count` foil groups, shuffled so that a place tells nothing."""
        found = families.groups(family, self.size(count), f"{self.seed}-{family.__name__}", look=self.look)
        clips = [clip for group in found for clip in group][: self.size(total)]
        random.Random(f"{self.seed}-{family.__name__}-order").shuffle(clips)
        return clips

    def teller(self, name: str) -> Teller:
        return Teller(DIALECTS[self.look], random.Random(f"{self.seed}-{name}-words"))

    def ask(self, name: str, kind: str, corpus: list[Clip], count: int, **notes: object) -> MiniSet:
        """A text set: captions of one kind of the first clips, all texts distinct."""
        teller, tell = self.teller(name), captions.KINDS[kind]
        told: dict[str, Caption] = {}
        for clip in corpus:
            for _ in range(40):  # other words for a text that stands already
                caption = tell(clip[0], teller)
                if caption.text not in told:
                    told[caption.text] = caption
                    break
            if len(told) == self.size(count):
                break
        return self.text_set(name, list(told.values()), corpus, **notes)

    def text_set(self, name: str, told: Sequence[Caption], corpus: list[Clip], **notes: object) -> MiniSet:
        """A text set; several captions of one text are one query."""
        queries = tuple(Query(find(caption, corpus), caption.text) for caption in told)
        return MiniSet(name, queries, tuple(corpus), notes)


def find(caption: Caption, corpus: Sequence[Clip]) -> tuple[int, ...]:
    """Rows of the corpus that make the caption true."""
    return tuple(row for row, clip in enumerate(corpus) if tells(caption.story, clip))


def _msrvtt(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.coarse, 40, 200)
    yield builder.ask("MSRVTT", "short", corpus, 200)
    chance = random.Random(f"{builder.seed}-i2v")
    queries = []
    for clip in corpus:
        time = telling_frame(clip, chance)
        rows = tuple(row for row, other in enumerate(corpus) if shows(other[0], clip[0], time))
        queries.append(Query(rows, image=Still(clip[0], time)))
    yield MiniSet("MSRVTT-I2V", tuple(queries), tuple(corpus), {"frames": "at the height of the event, never sampled"})


def telling_frame(clip: Clip, chance: random.Random) -> int:
    """A frame in which something is happening and which uniform(8) does not read."""
    busy = [range(first + 1, last) for slot, (first, last) in enumerate(SLOTS) if _acts(clip, slot)]
    frames = [time for slot in busy for time in slot if time not in SAMPLED_FRAMES]
    return chance.choice(frames or [1, 2, 29, 30])


def _acts(clip: Clip, slot: int) -> bool:
    return any(thing.course[slot] for thing in clip[0].things)


def _didemo(builder: Builder) -> Iterator[MiniSet]:
    yield builder.ask("DiDeMo", "paragraph", builder.gallery(families.paragraph, 40, 200), 200)


def _carebench(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.care, 25, 200)
    for name, kind in (("CRB-G", "general"), ("CRB-S", "spatial"), ("CRB-T", "temporal")):
        yield builder.ask(name, kind, corpus, 200)


def _vdc(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.detail, 41, 205)
    yield builder.ask("VDC-O", "main object", corpus, 205)
    yield builder.ask("VDC-D", "detailed", corpus, 200)


def _camerabench(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.many_cameras, 5, 210)
    copies = len(corpus) // 50
    corpus += corpus[:copies]  # exact duplicates: a query of one has the other as a positive too
    yield builder.ask("CMRB", "camera", corpus, 145, exact_duplicates=copies)


def _dream(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.events, 40, 200)
    teller = builder.teller("DREAM-E")
    told = {}
    for clip in corpus:
        for who, thing in enumerate(clip[0].things):
            for what in thing.events:
                caption = captions.event(clip[0], who, what, teller)
                told[caption.text] = caption
    yield builder.text_set("DREAM-E", list(told.values()), corpus)


def _themes(builder: Builder) -> Iterator[MiniSet]:
    yield builder.ask("LoVR-TH", "theme", builder.gallery(families.theme, 40, 200), 200)


def _keywords(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.keywords, 40, 200)
    copies = len(corpus) // 60
    corpus += corpus[:copies]
    yield builder.ask("PEV-K", "keywords", corpus, 195, exact_duplicates=copies)


def _long(builder: Builder) -> Iterator[MiniSet]:
    corpus = builder.gallery(families.long, 40, 200)
    teller = builder.teller("LoVR-V")
    own = families.own_scenes(corpus)
    told = [captions.story(clip, teller) for clip in corpus[: builder.size(43)]]
    # A reader of the first w words meets the fact that tells a video from its foils, or does not.
    reach = [_words_to(caption.text, scene) for caption, scene in zip(told, own, strict=False)]
    share = {str(limit): sum(words <= limit for words in reach) / len(reach) for limit in (100, 200, 400, 800)}
    yield builder.text_set("LoVR-V", told, corpus, answerable_within_words=share)
    queries, answered = [], 0
    chance = random.Random(f"{builder.seed}-c2v")
    for row, (clip, which) in enumerate(zip(corpus, own, strict=True)):
        length = clip_frames(clip) // len(clip)
        start = which * length + chance.randint(0, 3)
        shot = Shot(clip, start, start + 12)
        read = {round(i * (clip_frames(clip) - 1) / 7) // length for i in range(8)}
        answered += which in read
        queries.append(Query((row,), video=shot))
    yield MiniSet("LoVR-C2V", tuple(queries), tuple(corpus), {"answerable_share": answered / len(queries)})


def _words_to(text: str, scene: int) -> int:
    """Words of a story up to the end of its account of the scene with this index."""
    ordinals = ("first", "second", "third", "fourth", "fifth", "sixth", "none")
    end = text.find(f"The {ordinals[scene + 1]} scene of the video")
    return len(text[: end if end >= 0 else None].split())


def _moments(builder: Builder) -> Iterator[MiniSet]:
    for name in ("MS-TI", "MS-TV"):
        modality = name.split("-")[1]
        asked = panel_queries(modality, builder.size(13), f"{builder.seed}-{name}", look=builder.look)
        total = builder.size(200)
        corpus: list[Clip] = []
        queries: list[Query] = []
        for panel in asked:
            first = len(corpus)
            corpus += panel.clips
            for composed in panel.queries:
                queries.append(_pooled(composed, first, random.Random(f"{builder.seed}-{len(queries)}")))
        random.Random(f"{builder.seed}-{name}-choice").shuffle(queries)
        yield MiniSet(name, tuple(queries[:total]), tuple(corpus), {"candidates": "1 + 3 text + 3 media + 3 neither"})


def _pooled(query: Composed, first: int, chance: random.Random) -> Query:
    """Ten candidates of a panel: the positive, three that fit each one side only, three that fit neither."""
    neither = chance.sample(query.fits_neither, 3)
    pool = sorted([query.positive, *query.fits_text_only, *query.fits_media_only, *neither])
    positive = (first + query.positive,)
    return Query(
        positive,
        query.text,
        query.image,
        query.video,
        tuple(first + row for row in pool),
        positive + tuple(first + row for row in query.fits_text_only),
        positive + tuple(first + row for row in query.fits_media_only),
    )


SET_MAKERS = (_msrvtt, _didemo, _carebench, _vdc, _camerabench, _dream, _themes, _keywords, _long, _moments)


def write_set(mini: MiniSet, root: Path) -> dict[str, object]:
    """Write the listings and set.json of one set in the released layout; media are written apart. Returns set.json."""
    folder = root / mini.name / "jsonl"
    folder.mkdir(parents=True)
    prefix = mini.name.lower()
    ids = [f"{prefix}_v{row:04d}" for row in range(len(mini.corpus))]
    corpus = [{"id": i, "video": f"{MEDIA}/{Shot(clip).name}"} for i, clip in zip(ids, mini.corpus, strict=True)]
    queries, instances = [], []
    for number, query in enumerate(mini.queries):
        row: dict[str, object] = {"id": f"{prefix}_q{number:04d}"}
        if query.text:
            row["text"] = query.text
        if query.image:
            row["image"] = f"{MEDIA}/{query.image.name}"
        if query.video:
            row["video"] = f"{MEDIA}/{query.video.name}"
        queries.append(row)
        instance: dict[str, object] = {"qid": row["id"], "pos": [ids[i] for i in query.positives]}
        if query.pool:
            instance["candidates"] = [ids[i] for i in query.pool]
        instances.append(instance)
    for name, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    held_out = sum(any(families.is_held_out(mini.corpus[i]) for i in q.positives) for q in mini.queries)
    facts: dict[str, object] = {
        "chance": mini.chance(),
        "ceilings": mini.ceilings(),
        "oracle": 1.0,
        "notes": {
            "queries": len(mini.queries),
            "corpus": len(mini.corpus),
            "mean_positives": sum(len(q.positives) for q in mini.queries) / len(mini.queries),
            "held_out_share": held_out / len(mini.queries),
            **mini.notes,
        },
    }
    (root / mini.name / "set.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts
