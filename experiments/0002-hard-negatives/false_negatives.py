"""How many mined hard negatives are false: judged by the scene graphs behind a toy world's shards.

    python experiments/0002-hard-negatives/false_negatives.py WORLD PROBER --out false_negatives.json

The world is told again from its seed, which gives the scene behind every row; a mined negative is false if what the
query says holds in what the negative shows (for pictures that ask for texts: the other way round).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gve.data.negatives import MinedNegatives
from gve.data.sources import Source, open_sources
from gve.encode.pretrained import load_encoder
from gve.encode.store import EmbeddingStore
from gve.inputs import InputPolicy
from gve.mining import MiningOptions, mine
from gve.toy import captions
from gve.toy.forms import Story, tells
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


def _clip(side: Side) -> Clip:
    if side.video is not None:
        return side.video.clip
    assert side.image is not None
    return (side.image.scene,)


def judge(
    told: Told, sources: Mapping[str, Source], mined: MinedNegatives, names: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Source -> pairs, mined negatives, and how many of them are false."""
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        tally = defaultdict(int, pairs=len(told.samples[name]))
        for row, sample in enumerate(told.samples[name]):
            for own, other in mined(name, row):
                tally["mined"] += 1
                tally["false"] += told.is_right(sample.query, told.samples[own.name][other].target)
        counts[name] = {key: tally[key] for key in ("pairs", "mined", "false")}
    return counts


def by_chance(told: Told, corpus: str, sources: Mapping[str, Source], draws: int = 20) -> float:
    """Share of false negatives among targets drawn at random (seed 0) that are not the pair's own content."""
    random = np.random.default_rng(0)
    false = total = 0
    for name, samples in told.samples.items():
        task = sources[name].record.task
        pool = [name] if corpus == "own" else [n for n in told.samples if sources[n].record.task == task]
        targets = [sample.target for own in pool for sample in told.samples[own]]
        for sample in samples:
            for pick in random.integers(0, len(targets), draws):
                if targets[pick] != sample.target:
                    total += 1
                    false += told.is_right(sample.query, targets[pick])
    return false / total


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
    wanted = dict.fromkeys(told.samples, 1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for corpus in ("own", "task"):
            results.append({"corpus": corpus, "filter": "chance", "false_share": by_chance(told, corpus, sources)})
            for title, options in FILTERS.items():
                out = Path(folder) / "negatives"
                chosen = replace(options, corpus=corpus)
                policy = encoder.builder.policy
                mined = mine(sources, encoder, out, wanted, chosen, store=store, inputs=policy)
                reader = MinedNegatives()
                reader.use(out, sources)
                counts = judge(told, sources, reader, wanted)
                total = {key: sum(row[key] for row in counts.values()) for key in ("pairs", "mined", "false")}
                row = {"corpus": corpus, "filter": title, **total, "false_share": total["false"] / total["mined"]}
                row["positive"] = float(np.mean([summary.positive for summary in mined.sources.values()]))
                results.append({**row, "sources": counts})
                print(
                    f"{corpus:<5}{title:<20}{total['mined']:>6} of {total['pairs']} pairs have one, "
                    f"{total['false']:>5} false ({row['false_share']:.1%})",
                    flush=True,
                )
    text = json.dumps({"prober": encoder.fingerprint[:16], "results": results}, indent=1)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
