"""The training sources: all thirteen modality tasks of the pyramid, in dialect A, with nothing held out in them.

A text source tells the clips of one family of foil groups; its hard negative is a clip of the same group of which the
text is false. Pictures and clips that several sources use are rendered once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gve.eval.uvrb import find_record
from gve.items import Image, Item, Pair, Part, Text, Video
from gve.toy import captions, families
from gve.toy.captions import Caption, Teller
from gve.toy.forms import Noun, tells
from gve.toy.language import DIALECTS
from gve.toy.panels import Panel, panel_queries
from gve.toy.render import Shot, Still
from gve.toy.scenes import PICTURE_FRAME, Clip, Scene, clip_frames
from gve.toy.uvrb import telling_frame


@dataclass(frozen=True)
class Side:
    """A query, target or negative before its media are rendered; media come before text."""

    text: str = ""
    image: Still | None = None
    video: Shot | None = None

    @property
    def media(self) -> Still | Shot | None:
        return self.image or self.video

    def item(self, files: dict[str, bytes]) -> Item:
        parts: list[Part] = []
        if self.image:
            parts.append(Image(files[self.image.name], name=self.image.name))
        if self.video:
            parts.append(Video(files[self.video.name], name=self.video.name))
        if self.text:
            parts.append(Text(self.text))
        return Item(tuple(parts))


@dataclass(frozen=True)
class Sample:
    """One training pair before its media are rendered."""

    query: Side
    target: Side
    negatives: tuple[Side, ...] = ()

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.query, self.target, *self.negatives)

    def pair(self, files: dict[str, bytes]) -> Pair:
        negatives = tuple(side.item(files) for side in self.negatives)
        return Pair(self.query.item(files), self.target.item(files), negatives)


@dataclass(frozen=True)
class Source:
    """One row of the toy mixture."""

    name: str
    task: str
    instruction: str
    samples: tuple[Sample, ...]


def shown(clip: Clip) -> Clip:
    """The clip without what no caption tells: two clips that differ in nuisance only are one scene."""
    return tuple(replace(scene, nuisance=0) for scene in clip)


class Mixture:
    """Makes the sources.

    Args:
        seed: of the whole mixture.
        scale: share of the full sizes (about 4,200 clips and 9,000 pairs).
        tested: clips of the test sets, as `shown`; no training picture or clip shows one of them.
    """

    def __init__(self, seed: int, scale: float, tested: set[Clip]):
        self.seed, self.scale, self.tested = f"train-{seed}", scale, tested
        self.random = random.Random(self.seed)
        self.teller = Teller(DIALECTS["A"], random.Random(f"{self.seed}-words"))

    def groups(
        self, family: Callable[[families.Maker], families.Group], count: int, purpose: str
    ) -> list[families.Group]:
        wanted = max(2, round(count * self.scale))
        return list(families.groups(family, wanted, f"{self.seed}-{purpose}", refuse=self.refuse))

    def panels(self, modality: str, count: int, purpose: str) -> list[Panel]:
        wanted = max(3, round(count * self.scale))
        return list(panel_queries(modality, wanted, f"{self.seed}-{purpose}", refuse=self.refuse))

    def refuse(self, clip: Clip) -> bool:
        """Whether training must not show the clip."""
        return families.is_held_out(clip) or shown(clip) in self.tested

    def sources(self) -> Iterator[Source]:
        """All sources in the order of the pyramid."""
        scenes = [clip[0] for group in self.groups(families.detail, 160, "pictures") for clip in group[:4]]
        scenes += [group[i][0] for group in self.groups(families.care, 120, "pictures") for i in (0, 4)]
        scenes += [group[0][0] for group in self.groups(families.coarse, 200, "pictures")]  # the easy ones
        self.random.shuffle(scenes)
        yield self.paraphrases()
        yield from self.pictures(scenes)
        yield from self.clips()
        yield from self.moments()
        yield from self.composed()

    def told(
        self, family: Callable[[families.Maker], families.Group], count: int, kind: str
    ) -> Iterator[tuple[Clip, Caption, list[Clip]]]:
        """(clip, caption, clips of its group of which the caption is false)."""
        tell = captions.KINDS[kind]
        for group in self.groups(family, count, kind):
            for clip in group:
                caption = tell(clip[0], self.teller)
                yield clip, caption, [other for other in group if not tells(caption.story, other)]

    def paraphrases(self) -> Source:
        """T2T: another account of the same scene; the negative tells a scene that differs in one fact."""
        samples = []
        plans = (
            (families.coarse, 60, "short", "short"),
            (families.detail, 60, "main object", "detailed"),
            (families.care, 30, "temporal", "general"),
        )
        for family, count, kind, other_kind in plans:
            tell = captions.KINDS[other_kind]
            for clip, caption, foils in self.told(family, count, kind):
                foil = tell(self.random.choice(foils)[0], self.teller)
                target = Side(tell(clip[0], self.teller).text)
                samples.append(Sample(Side(caption.text), target, (Side(foil.text),)))
        return Source("toy_paraphrase", "T2T", "Find the text that tells of the same scene.", tuple(samples))

    def pictures(self, scenes: Sequence[Scene]) -> Iterator[Source]:
        """T2I, I2T, T2TI and TI2T on still pictures."""
        thirds = [scenes[i::3] for i in range(3)]
        samples = []
        for scene in scenes:
            samples.append(Sample(Side(captions.static(scene, self.teller).text), Side(image=_still(scene))))
        yield Source("toy_picture", "T2I", "Find the picture that the text describes.", tuple(samples))
        yield Source(
            "toy_legend",
            "I2T",
            "Find the text that describes the picture.",
            tuple(Sample(Side(image=s.target.image), s.query) for s in self.random.sample(samples, len(samples))),
        )
        captioned = []
        for scene in thirds[0]:
            query, other = (captions.static(scene, self.teller).text for _ in range(2))
            captioned.append(Sample(Side(query), Side(other, image=_still(scene))))
        yield Source("toy_page", "T2TI", "Find the page, a picture with its text, on the subject.", tuple(captioned))
        answers = [self._answer(scene) for scene in [*thirds[1], *thirds[2]]]
        yield Source("toy_answer", "TI2T", "Find the answer to the question on the picture.", tuple(answers))

    def _answer(self, scene: Scene) -> Sample:
        d, thing = self.teller.dialect, self.random.choice(scene.things)
        named = d.noun(Noun("", thing.shape), "the")
        question, truth, lie = self.random.choice(
            [
                (f"What colour is {named}?", thing.color, self._other(scene, thing.color)),
                (f"Where is {named}?", d.at(thing.place), d.at(_elsewhere(thing.place))),
            ]
        )
        wrong = Side(f"{named} is {lie}")
        return Sample(Side(question, image=_still(scene)), Side(f"{named} is {truth}"), (wrong,))

    def _other(self, scene: Scene, color: str) -> str:
        others = [thing.color for thing in scene.things if thing.color != color]
        return self.random.choice(others or ["white"])

    def clips(self) -> Iterator[Source]:
        """T2V: a source per kind of caption, named after the test set it prepares for."""
        every = range(8)  # rows of a group
        plans = (
            ("toy_short", families.coarse, 100, "short", "MSRVTT", every, 0),
            ("toy_paragraph", families.paragraph, 60, "paragraph", "DiDeMo", every, 0),
            ("toy_general", families.care, 40, "general", "CRB-G", every, 0),
            ("toy_spatial", families.care, 160, "spatial", "CRB-S", (0, 4), 1),
            ("toy_temporal", families.care, 80, "temporal", "CRB-T", range(4), 1),
            ("toy_object", families.detail, 60, "main object", "VDC-O", every, 1),
            ("toy_detail", families.detail, 40, "detailed", "VDC-D", every, 0),
            ("toy_camera", families.camera, 100, "camera", "CMRB", every, 1),
            ("toy_theme", families.theme, 60, "theme", "LoVR-TH", every, 0),
            ("toy_keywords", families.keywords, 60, "keywords", "PEV-K", every, 0),
        )
        for name, family, count, kind, test_set, rows, negatives in plans:
            samples = []
            for group in self.groups(family, count, name):
                # Only clips with captions of their own: a caption true of two clips of a batch is a false negative.
                for clip in (clip for row, clip in enumerate(group) if row in rows):
                    caption = captions.KINDS[kind](clip[0], self.teller)
                    foils = [other for other in group if not tells(caption.story, other)]
                    chosen = self.random.sample(foils, min(negatives, len(foils)))
                    hard = tuple(Side(video=Shot(foil)) for foil in chosen)
                    samples.append(Sample(Side(caption.text), Side(video=Shot(clip)), hard))
            yield Source(name, "T2V", find_record(test_set).instruction, tuple(samples))
        yield self._events()
        yield self._stories()

    def _events(self) -> Source:
        samples = []
        for group in self.groups(families.events, 60, "events"):
            for clip in group:
                for who in self.random.sample(range(3), 2):
                    what = self.random.choice(clip[0].things[who].events)
                    caption = captions.event(clip[0], who, what, self.teller)
                    samples.append(Sample(Side(caption.text), Side(video=Shot(clip))))
        return Source("toy_event", "T2V", find_record("DREAM-E").instruction, tuple(samples))

    def _long(self) -> list[Clip]:
        return [clip for group in self.groups(families.long, 30, "long") for clip in group]

    def _stories(self) -> Source:
        samples = [
            Sample(Side(captions.story(clip, self.teller).text), Side(video=Shot(clip))) for clip in self._long()
        ]
        return Source("toy_story", "T2V", find_record("LoVR-V").instruction, tuple(samples))

    def moments(self) -> Iterator[Source]:
        """I2V, V2V and I2I: a part asks for its whole, or for another part."""
        moving = [clip for group in self.groups(families.coarse, 100, "toy_short") for clip in group]
        moving += [clip for group in self.groups(families.events, 40, "events") for clip in group]
        frames = [Still(clip[0], telling_frame(clip, self.random)) for clip in moving]
        samples = tuple(Sample(Side(image=still), Side(video=Shot(c))) for still, c in zip(frames, moving, strict=True))
        yield Source("toy_frame", "I2V", find_record("MSRVTT-I2V").instruction, samples)
        parts = []
        long = self._long()
        for clip, which in zip(long, families.own_scenes(long), strict=True):
            length = clip_frames(clip) // len(clip)
            for start in self.random.sample(range(4), 2):  # a shared scene would answer to five long videos
                part = Shot(clip, which * length + start, which * length + start + 12)
                parts.append(Sample(Side(video=part), Side(video=Shot(clip))))
        yield Source("toy_part", "V2V", find_record("LoVR-C2V").instruction, tuple(parts))
        # One clip of a group only: at rest all clips of a group look the same.
        single = [group[0] for group in self.groups(families.events, 300, "pairs of frames")]
        pairs = [
            Sample(Side(image=Still(clip[0], telling_frame(clip, self.random))), Side(image=_still(clip[0])))
            for clip in single
        ]
        yield Source("toy_moment", "I2I", "Find another picture of the same scene.", tuple(pairs))

    def composed(self) -> Iterator[Source]:
        """TI2I and TI2TI on still pictures, TI2V and TV2V on clips; the negative fits one side only."""
        stills, captioned = [], []
        for panel in self.panels("still", 40, "still"):
            for row, query in enumerate(panel.queries):
                scene = panel.clips[query.positive][0]
                foil = panel.clips[self.random.choice(query.fits_text_only + query.fits_media_only)][0]
                asked, text = Side(query.text, image=query.image), captions.static(scene, self.teller).text
                if row % 2:
                    stills.append(Sample(asked, Side(image=_still(scene)), (Side(image=_still(foil)),)))
                else:
                    captioned.append(Sample(asked, Side(text, image=_still(scene))))
        yield Source("toy_edit", "TI2I", "Find the picture that the text makes of this one.", tuple(stills))
        ask = "Find the page, a picture with its text, that the text makes of this picture."
        yield Source("toy_edit_page", "TI2TI", ask, tuple(captioned))
        for modality, name in (("TI", "toy_change_ti"), ("TV", "toy_change_tv")):
            samples = []
            for panel in self.panels(modality, 24, name):
                for query in panel.queries:
                    wrong = panel.clips[self.random.choice(query.fits_text_only + query.fits_media_only)]
                    asked = Side(query.text, query.image, query.video)
                    target = Side(video=Shot(panel.clips[query.positive]))
                    samples.append(Sample(asked, target, (Side(video=Shot(wrong)),)))
            yield Source(name, f"{modality}2V", find_record(f"MS-{modality}").instruction, tuple(samples))


def _still(scene: Scene) -> Still:
    """The picture of a scene at rest."""
    return Still(scene, PICTURE_FRAME)


def _elsewhere(place: tuple[int, int]) -> tuple[int, int]:
    """Another place: the one across the centre, or the top left for the centre itself."""
    return (0, 0) if place == (1, 1) else (2 - place[0], 2 - place[1])
