"""How much of what the tiny base says is true: its answers and captions on scenes that it has never seen.

    python experiments/0001-toy-base/claims.py [--base FOLDER] [--clips 200] [--dialect A]

Clips are rendered to mp4 files and read back. Captions are judged by the checker, claim by claim; answers by their
words.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

from gve.items import Item
from gve.toy import lessons
from gve.toy.captioner import Captioner
from gve.toy.captions import Teller
from gve.toy.claims import claim_shares
from gve.toy.families import Maker
from gve.toy.language import DIALECTS
from gve.toy.render import Shot, Still, render
from gve.toy.scenes import PICTURE_FRAME

CAPTIONS = ("detailed", "short", "spatial", "temporal", "camera", "theme", "keywords")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="hub folder; the embedded base by default")
    parser.add_argument("--clips", type=int, default=200, help="scenes")
    parser.add_argument("--dialect", default="A", choices=sorted(DIALECTS), help="palette of the scenes")
    arguments = parser.parse_args()
    captioner = Captioner.from_base(arguments.base)
    make, teller = Maker("claims", arguments.dialect), Teller(DIALECTS["A"], random.Random("claims"))
    scenes = [lessons.random_scene(make) for _ in range(arguments.clips)]
    videos = [Item.of(video=render(Shot((scene,)))) for scene in scenes]
    pictures = [Item.of(image=render(Still(scene, PICTURE_FRAME))) for scene in scenes]

    print("| answers | pictures | clips |\n|---|---:|---:|")
    right: dict[str, dict[str, list[bool]]] = {"pictures": defaultdict(list), "clips": defaultdict(list)}
    for name, items, moving in (("pictures", pictures, False), ("clips", videos, True)):
        asked = []
        for scene, item in zip(scenes, items, strict=True):
            turns = list(lessons.still_turns(scene, teller))
            turns += list(lessons.moving_turns(scene, teller)) if moving else []
            asked += [(turn, item) for turn in teller.random.sample(turns, min(6, len(turns)))]
        answers = captioner.answer([item for _, item in asked], [turn.question for turn, _ in asked])
        for (turn, _), answer in zip(asked, answers, strict=True):
            right[name][turn.kind].append(answer == turn.answer)
    for kind in dict.fromkeys([*right["pictures"], *right["clips"]]):
        cells = [right[name].get(kind, []) for name in ("pictures", "clips")]
        print(f"| {kind} | " + " | ".join(f"{sum(c) / len(c):.2f} of {len(c)}" if c else "-" for c in cells) + " |")

    print("\n| claims in captions of clips | true | made |\n|---|---:|---:|")
    texts, clips = [], []
    for kind in CAPTIONS:
        texts += captioner.caption(videos, kind)
        clips += [(scene,) for scene in scenes]
    tally = claim_shares(texts, clips)
    for kind, share in tally.shares.items():
        print(f"| {kind} | {share.value:.2f} | {share.made} |")
    print(f"\n{len(tally.unparsed)} of {tally.sentences} sentences could not be read.")
    for text in texts[:3]:
        print("-", text)


if __name__ == "__main__":
    main()
