"""How much of what the embedded captioner says is true: shares by kind of claim, on scenes that no lesson shows.

    python experiments/0001-toy-base/captions.py [--base FOLDER] [--scenes 200] [--json FILE]

Every kind of caption is asked of clips (or pictures) of both palettes. Beside the share of true claims stands the share
of the same texts when each is judged by the next clip: what is true of a scene without a look at it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gve.items import Item
from gve.toy import captions, lessons
from gve.toy.captioner import Captioner
from gve.toy.claims import claim_shares
from gve.toy.families import Maker
from gve.toy.render import Shot, Still, render
from gve.toy.scenes import PICTURE_FRAME, Scene


def has_order(scene: Scene) -> bool:
    return len(captions.timeline(scene)) > 1 and lessons.one_at_a_time(scene)


# Kind of caption -> which scenes it can be asked of.
ASKED: dict[str, Callable[[Scene], bool]] = {
    "detailed": lambda scene: True,
    "short": lambda scene: True,
    "camera": lambda scene: True,
    "spatial": lambda scene: len(scene.things) > 1,
    "temporal": has_order,
    "static": lambda scene: True,
}


def draw_scenes(look: str, kind: str, count: int) -> list[Scene]:
    make = Maker(f"captions-{look}-{kind}", look)  # lessons are drawn from "base-..."
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = lessons.random_scene(make, moving=kind != "static")
        scenes += [scene] * ASKED[kind](scene)
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="hub folder; the embedded base by default")
    parser.add_argument("--scenes", type=int, default=200, help="of each kind and palette")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    arguments = parser.parse_args()
    captioner = Captioner.from_base(arguments.base)
    found = []
    print("| palette | caption | claim | true | made | share | blind |\n|---|---|---|---|---|---|---|")
    for look in "AB":
        for kind in ASKED:
            scenes = draw_scenes(look, kind, arguments.scenes)
            clips = [(scene,) for scene in scenes]
            if kind == "static":
                items = [Item.of(image=render(Still(scene, PICTURE_FRAME))) for scene in scenes]
            else:
                items = [Item.of(video=render(Shot(clip))) for clip in clips]
            texts = captioner.caption(items, kind)
            tally = claim_shares(texts, clips)
            blind = claim_shares(texts, clips[1:] + clips[:1]).shares
            for claim, share in tally.shares.items():
                row = f"| {look} | {kind} | {claim} | {share.true} | {share.made} | {share.value:.2f} "
                print(f"{row}| {blind[claim].value:.2f} |")
            lost = len(tally.unparsed)
            print(f"| {look} | {kind} | (unparsed sentences) | {lost} | {tally.sentences} | | |", flush=True)
            shares = {claim: asdict(share) for claim, share in tally.shares.items()}
            found.append({"palette": look, "caption": kind, "sentences": tally.sentences, "unparsed": lost, **shares})
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
