"""How many mined hard negatives are false: judged by the scene graphs behind a toy world's shards.

    python experiments/0002-hard-negatives/false_negatives.py WORLD PROBER --out false_negatives.json

The world is told again from its seed, which gives the scene behind every row; a mined negative is false if what the
query says holds in what the negative shows (for pictures that ask for texts: the other way round).

Corpora: the source's own targets, those of its task, and "planted": for five text-to-video sources the clips of all
five, each twice: as it is, and with other small shifts that no caption tells. The twin answers as well as the clip, and
nobody has labelled it: what a web corpus is full of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gve.data.negatives import MinedNegatives
from gve.data.shards import ShardWriter
from gve.data.sources import Source, open_sources
from gve.encode.pretrained import load_encoder
from gve.encode.store import EmbeddingStore
from gve.inputs import InputPolicy
from gve.items import Item, Pair
from gve.mining import MiningOptions, mine
from gve.toy import captions
from gve.toy.forms import Story, tells
from gve.toy.render import Shot, render_all
from gve.toy.scenes import Clip
from gve.toy.training import Mixture, Sample, Side, shown
from gve.toy.uvrb import Builder
from gve.video import Sampling

JUDGED = ("T2V", "T2I", "I2T")  # of other tasks the query claims nothing that the checker knows
FILTERS = {
    "none": MiningOptions(max_share=0),
    "share 0.99": MiningOptions(max_share=0.99),
    "share 0.95": MiningOptions(max_share=0.95),
    "share 0.90": MiningOptions(max_share=0.9),
    "share 0.80": MiningOptions(max_share=0.8),
    "margin 0.05": MiningOptions(max_share=0, margin=0.05),
    "first 5 passed over": MiningOptions(max_share=0, skip_first=5),
}
PLANTED = ("toy_short", "toy_object", "toy_general", "toy_keywords", "toy_temporal")


class Told:
    """The samples of a world's sources, and the story of every caption in them."""

    def __init__(self, world: Path) -> None:
        asked = json.loads((world / "world.json").read_text())
        self.stories: dict[str, Story] = {}
        plain = captions.Caption

        def remembered(text: str, story: Story) -> captions.Caption:
            self.stories.setdefault(text, story)
            return plain(text, story)

        sets = Builder(asked["seed"], asked["dialect"], asked["test_scale"]).build()
        tested = {shown(clip) for mini in sets for clip in mini.corpus}
        captions.Caption = remembered  # type: ignore[assignment,misc]
        try:
            sources = list(Mixture(asked["seed"], asked["scale"], tested).sources())
        finally:
            captions.Caption = plain  # type: ignore[misc]
        self.samples: dict[str, tuple[Sample, ...]] = {
            source.name: source.samples for source in sources if source.task in JUDGED
        }

    def is_right(self, query: Side, target: Side) -> bool:
        """Whether a target answers a query: the one that is text claims nothing false of the one that is shown."""
        text, media = (query, target) if query.text else (target, query)
        return tells(self.stories[text.text], _clip(media))


def plant(told: Told, sources: Mapping[str, Source], root: Path) -> list[Side]:
    """Writes the planted corpus as one source of a shard folder; returns what its targets show, in row order."""
    sides: list[Side] = []
    items: list[Item] = []
    twins = {}
    for name in PLANTED:
        for row, sample in enumerate(told.samples[name]):
            clip = _clip(sample.target)
            twins[len(sides) + 1] = Shot(tuple(replace(scene, nuisance=scene.nuisance + 1) for scene in clip))
            sides += [sample.target, Side(video=twins[len(sides) + 1])]
            items += [sources[name].read(row).target, Item(())]
    files = dict(render_all(list(dict.fromkeys(twins.values())), jobs=1))
    with ShardWriter(root, task="T2V", source="planted") as writer:
        for row, item in enumerate(items):
            if row in twins:
                item = Item.of(video=files[twins[row]])
            writer.write(Pair(Item.of(f"row {row}"), item))
    return sides


def _clip(side: Side) -> Clip:
    if side.video is not None:
        return side.video.clip
    assert side.image is not None
    return (side.image.scene,)


def judge(
    told: Told, mined: MinedNegatives, names: Mapping[str, int], planted: Sequence[Side]
) -> dict[str, dict[str, int]]:
    """Source -> pairs, mined negatives, and how many of them are false."""
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        tally = defaultdict(int, pairs=len(told.samples[name]))
        for row, sample in enumerate(told.samples[name]):
            for own, other in mined(name, row):
                tally["mined"] += 1
                target = planted[other] if own.name == "planted" else told.samples[own.name][other].target
                tally["false"] += told.is_right(sample.query, target)
        counts[name] = {key: tally[key] for key in ("pairs", "mined", "false")}
    return counts


def by_chance(told: Told, pools: Mapping[str, Sequence[Side]], draws: int = 20) -> float:
    """Share of false negatives among targets drawn at random (seed 0) that are not the pair's own."""
    random = np.random.default_rng(0)
    judged = [
        told.is_right(sample.query, pool[pick])
        for name, pool in pools.items()
        for sample in told.samples[name]
        for pick in random.integers(0, len(pool), draws)
        if pool[pick] != sample.target
    ]
    return sum(judged) / len(judged)


def pool_of(
    told: Told, sources: Mapping[str, Source], corpus: str, name: str, planted: Sequence[Side]
) -> Sequence[Side]:
    """What is searched for a source."""
    if corpus == "planted":
        return planted
    task = sources[name].record.task
    names = [name] if corpus == "own" else [other for other in told.samples if sources[other].record.task == task]
    return [sample.target for own in names for sample in told.samples[own]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder made by `gve toy make`")
    parser.add_argument("prober", help="checkpoint of gve fit, or a base model")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    told = Told(arguments.world)
    sources = open_sources(arguments.world / "shards")
    for name, samples in told.samples.items():
        stored = [sources[name].read(row).query.text for row in range(len(sources[name]))]
        if stored != [sample.query.text for sample in samples]:
            raise SystemExit(f"{name}: the world was made by another version of the generator; make it again")
    inputs = None
    if not Path(arguments.prober).is_file():  # a base has no policy of its own: that of configs/quickstart.yaml
        inputs = InputPolicy(sampling=Sampling.uniform(8), max_frame_tokens=9, max_length=200)
    encoder = load_encoder(arguments.prober, base=str(arguments.world / "base"), inputs=inputs, batch_tokens=4096)
    store = EmbeddingStore(None, encoder.fingerprint)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        out, root = Path(folder) / "negatives", Path(folder) / "planted"
        planted = plant(told, sources, root)
        for corpus in ("own", "task", "planted"):
            wanted = dict.fromkeys(PLANTED if corpus == "planted" else told.samples, 1)
            chance = by_chance(told, {name: pool_of(told, sources, corpus, name, planted) for name in wanted})
            results.append({"corpus": corpus, "filter": "chance", "false_share": chance})
            print(f"{corpus:<8}{'chance':<20}{chance:.1%}", flush=True)
            for title, options in FILTERS.items():
                chosen = replace(options, corpus=str(root) if corpus == "planted" else corpus)
                mine(sources, encoder, out, wanted, chosen, store=store, inputs=encoder.builder.policy)
                reader = MinedNegatives()
                reader.use(out, sources)
                counts = judge(told, reader, wanted, planted)
                total = {key: sum(row[key] for row in counts.values()) for key in ("pairs", "mined", "false")}
                share = total["false"] / total["mined"] if total["mined"] else 0.0
                results.append({"corpus": corpus, "filter": title, **total, "false_share": share, "sources": counts})
                print(
                    f"{corpus:<8}{title:<20}{total['mined']:>6} of {total['pairs']} pairs have one, "
                    f"{total['false']:>5} false ({share:.1%})",
                    flush=True,
                )
    text = json.dumps({"prober": encoder.fingerprint[:16], "results": results}, indent=1)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
