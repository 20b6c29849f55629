"""How many short answers of the tiny base are right, on pictures and clips that it has never seen.

    python experiments/0001-toy-base/answers.py [--base FOLDER] [--scenes 200] [--palette A]

Clips are rendered to mp4 files and read back. An answer is right if it is the true one word by word; "list" is the
content of all nine places or of all four quarters of the time.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

from gve.items import Item
from gve.toy import lessons
from gve.toy.captioner import Captioner
from gve.toy.captions import Teller
from gve.toy.families import Maker
from gve.toy.language import DIALECTS
from gve.toy.render import Shot, Still, render
from gve.toy.scenes import PICTURE_FRAME


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="hub folder; the embedded base by default")
    parser.add_argument(
        "--scenes", type=int, default=200, help="each asked six questions twice, of a picture and of a clip"
    )
    parser.add_argument("--palette", default="A", choices=sorted(DIALECTS), help="of the scenes")
    arguments = parser.parse_args()
    captioner = Captioner.from_base(arguments.base)
    make, teller = Maker("answers", arguments.palette), Teller(DIALECTS["A"], random.Random("answers"))
    scenes = [lessons.random_scene(make) for _ in range(arguments.scenes)]
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


if __name__ == "__main__":
    main()
