"""A pile of weakly captioned toy clips with planted faults, so that the filters of a synthesis can be measured.

Layout::

    videos/<id>.mp4     the clips, good and bad
    weak.jsonl          {"id", "video", "caption"}: all that a synthesis is shown
    truth.jsonl         {"id", "fault", "variant", "of"}: what was planted, one fault a row at most
    scenes.jsonl        what the good clips show (gve.toy.truth), for the rule-based captioner
    pile.json           what was asked for; an equal request reuses the folder

Good rows are hard ones too: a share of them are two clips of one foil group, which show the same things in the same
places and differ in what happens; many rest for half of their time; and their captions are of seven kinds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from rich.progress import Progress

from gve.items import InputError
from gve.toy import captions, families
from gve.toy.captions import Teller
from gve.toy.flips import Told
from gve.toy.language import DIALECTS
from gve.toy.render import X264, Shot, encode, frames, mux
from gve.toy.scenes import COLORS, PICTURE_FRAME, SHAPES, SIDE_PX, Clip
from gve.toy.truth import Truth

VERSION = 1  # of the generator: raise it when the same request would give other files

FAULTS: Mapping[str, str] = {
    "url": "the caption holds an address",
    "file-name": "the caption is the name of a file",
    "advertisement": "the caption sells or begs",
    "non-descriptive": "the caption tells nothing of the clip",
    "language": "the caption is in another language than English",
    "too-short": "the caption is one or two words",
    "repeated": "the same caption stands at all rows with this fault",
    "wrong-caption": "the caption is true of another clip",
    "static": "one picture all the time, some with the noise of a camera",
    "slide-show": "three or four still pictures one after another",
    "black": "nothing to be seen, some with the noise of a camera",
    "frozen": "moves for the first quarter or third and stands still from then on",
    "near-duplicate": "a clip of another row, compressed anew, resized or both; its caption is another account",
    "exact-duplicate": "file and caption of another row",
    "damaged": "a file that nothing can be had of, or not enough for its caption to be true",
    "repairable": "a file that lacks a frame or two at its end, or has them garbled",
}
"""Fault -> what it is."""
CAPTION_FAULTS = tuple(FAULTS)[:8]
"""Those that leave the clip as it is."""

TOLD: Mapping[Callable[[families.Maker], families.Group], Sequence[str]] = {
    families.coarse: ("short",),
    families.detail: ("main object", "detailed"),
    families.care: ("spatial", "temporal", "general"),
    families.paragraph: ("paragraph",),
}
"""Family of clips -> kinds of caption that good rows of it have; all move, and every caption tells of something."""


@dataclass(frozen=True)
class PileRequest:
    """What a pile is made from: equal requests give equal files.

    Args:
        seed: of clips, words and faults.
        rows: of the list, at least 20.
        share: of the rows that have a fault; each kind has the same number of them.
        faults: names of FAULTS.
        siblings: share of the good rows whose clip is of the same foil group as that of another good row.
        short: every good caption is one short sentence, instead of one of seven kinds.

    Raises:
        InputError: a value that is none.
    """

    seed: int = 0
    rows: int = 300
    share: float = 0.4
    faults: tuple[str, ...] = tuple(FAULTS)
    siblings: float = 0.1
    short: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.faults) - set(FAULTS):
            raise InputError(f"no fault {min(unknown)!r}: use {', '.join(FAULTS)}")
        if self.rows < 20 or not 0 <= self.share <= 0.8 or not 0 <= self.siblings <= 0.5:
            raise InputError(
                f"rows {self.rows}, share {self.share:g}, siblings {self.siblings:g}: use at least 20 rows, a share of "
                "faults from 0 to 0.8, and of siblings from 0 to 0.5"
            )
        if self.share and not self.each:
            raise InputError(
                f"a share of {self.share:g} of {self.rows} rows is less than one row for each of {len(self.faults)} "
                "faults: ask for more rows or fewer faults"
            )

    @property
    def each(self) -> int:
        """Rows of each fault."""
        return round(self.rows * self.share / len(self.faults)) if self.faults else 0


@dataclass
class Planted:
    """A row of the pile, as it is and as it was meant.

    Args:
        clip: what its file shows, or showed before the fault.
        kinds: of caption that tell something of it.
        caption: as the list has it.
        data: bytes of the file.
        fault, variant: empty for a good row.
        of: the row that it repeats, or whose caption it has; a sibling's other row.
        id: given when the order is settled.
    """

    clip: Clip
    kinds: Sequence[str]
    caption: str
    data: bytes
    fault: str = ""
    variant: str = ""
    of: Planted | None = None
    id: str = field(default="", compare=False)


def make_pile(
    out: str | Path,
    request: PileRequest | None = None,
    *,
    refuse: Callable[[Clip], bool] = families.is_held_out,
    progress: bool = True,
) -> Path:
    """Makes the pile, or reuses the one that was made from an equal request; 10 ms a row.

    Args:
        out: its folder; written to `<out>.tmp` and renamed when it is whole.
        refuse: clips that must not be in it; by default those that training holds out.
        progress: whether to show a bar on the terminal.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    out, request = Path(out), request or PileRequest()
    asked = json.loads(json.dumps({"version": VERSION, **asdict(request)}))
    if _is_made(out, asked):
        return out
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another folder") from None
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("clips", total=request.rows)
        rows = []
        for row in _Planter(request, refuse).rows():
            rows.append(row)
            bar.advance(task)
    _write(partial, _in_order(rows, random.Random(f"pile-{request.seed}-order")))
    (partial / "pile.json").write_text(json.dumps(asked, indent=2) + "\n")
    os.replace(partial, out)
    return out


def read_faults(pile: str | Path) -> list[dict[str, str]]:
    """The rows of truth.jsonl in the order of the list.

    Raises:
        InputError: the folder is no pile.
    """
    try:
        return [json.loads(line) for line in (Path(pile) / "truth.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{pile} is no pile with planted faults ({error}); make one with `gve toy faults`") from None


def _is_made(out: Path, asked: Mapping[str, Any]) -> bool:
    if not out.exists():
        return False
    try:
        found = json.loads((out / "pile.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{out} exists and is no pile with planted faults; choose another folder") from None
    if found != asked:
        raise InputError(f"{out} holds a pile of another request ({found}); remove it or choose another folder")
    return True


def _in_order(rows: Sequence[Planted], chance: random.Random) -> list[Planted]:
    """Shuffled, but what repeats a row stands behind it, as a copy does in a list that grew."""
    copies = [row for row in rows if row.fault.endswith("duplicate")]
    ordered = [row for row in rows if not row.fault.endswith("duplicate")]
    chance.shuffle(ordered)
    for copy in copies:
        first = next(place for place, row in enumerate(ordered) if row is copy.of) + 1
        ordered.insert(chance.randint(first, len(ordered)), copy)
    return ordered


def _write(folder: Path, rows: Sequence[Planted]) -> None:
    for number, row in enumerate(rows):
        row.id = f"clip-{number:05d}"
    scenes: dict[str, Clip] = {}
    with open(folder / "weak.jsonl", "w") as weak, open(folder / "truth.jsonl", "w") as truth:
        for row in rows:
            video = f"videos/{row.id}.mp4"
            (folder / video).write_bytes(row.data)
            weak.write(json.dumps({"id": row.id, "video": video, "caption": row.caption}) + "\n")
            told = {"id": row.id, "fault": row.fault, "variant": row.variant, "of": row.of.id if row.of else ""}
            truth.write(json.dumps(told) + "\n")
            if row.fault in ("", *CAPTION_FAULTS, "near-duplicate", "exact-duplicate"):
                scenes[hashlib.sha256(row.data).hexdigest()] = row.clip
    Truth(scenes).write(folder / "scenes.jsonl")


class _Planter:
    """Draws clips, tells of them and spoils some.

    Every spoiled clip is one of its own, so that no fault makes a good row a duplicate.
    """

    def __init__(self, request: PileRequest, refuse: Callable[[Clip], bool]) -> None:
        self.request = request
        self.random = random.Random(f"pile-{request.seed}")
        self.teller = Teller(DIALECTS["A"], random.Random(f"pile-{request.seed}-words"))
        drawn = (
            families.groups(family, 2 * request.rows, f"pile-{request.seed}-{family.__name__}", refuse=refuse)
            for family in TOLD
        )
        kinds = [("short",)] * len(TOLD) if request.short else TOLD.values()
        self._families = cycle(zip(kinds, drawn, strict=True))

    def rows(self) -> Iterator[Planted]:
        """Good rows first, then the faults in their order."""
        wanted = self.request.rows - self.request.each * len(self.request.faults)
        good: list[Planted] = []
        while len(good) < wanted:
            kinds, group = self._group()
            siblings = len(good) + 2 <= wanted and self.random.random() < self.request.siblings / 2
            made = [self._row(kinds, clip) for clip in self.random.sample(group, 1 + siblings)]
            if siblings:
                for row, other in zip(made, made[::-1], strict=True):
                    row.variant, row.of = "sibling", other
            good += made
            yield from made
        lone = [row for row in good if not row.variant]
        originals = iter(self.random.sample(lone, len(lone)))
        for fault in self.request.faults:
            for _ in range(self.request.each):
                yield self._spoiled(fault, good, originals)

    def _group(self) -> tuple[Sequence[str], families.Group]:
        """Kinds of caption of the next family, and its next group of clips."""
        kinds, groups = next(self._families)
        return kinds, next(groups)

    def _row(self, kinds: Sequence[str], clip: Clip) -> Planted:
        return Planted(clip, kinds, self._tell(kinds, clip), encode(frames(Shot(clip))))

    def _tell(self, kinds: Sequence[str], clip: Clip) -> str:
        return captions.KINDS[self.random.choice(kinds)](clip[0], self.teller).text

    def _spoiled(self, fault: str, good: Sequence[Planted], originals: Iterator[Planted]) -> Planted:
        if fault.endswith("duplicate"):
            of = next(originals)
            if fault == "exact-duplicate":
                return replace(of, fault=fault, of=of)
            variant, crf, side_px = self.random.choice(COPIES)
            data = encode(frames(Shot(of.clip)), crf=crf, side_px=side_px)
            return Planted(of.clip, of.kinds, self._tell(of.kinds, of.clip), data, fault, variant, of)
        kinds, group = self._group()
        clip = self.random.choice(group)
        if fault not in CAPTION_FAULTS:
            data, variant = self._file(fault, frames(Shot(clip)))
            return Planted(clip, kinds, self._tell(kinds, clip), data, fault, variant)
        row = replace(self._row(kinds, clip), fault=fault)
        if fault == "wrong-caption":
            row.of = next(other for other in self._drawn(good) if Told.read(other.caption, clip).false)
            row.caption = row.of.caption
        else:
            row.caption = _text(fault, row.caption, self.random)
        return row

    def _drawn(self, rows: Sequence[Planted]) -> Iterator[Planted]:
        while True:
            yield self.random.choice(rows)

    def _file(self, fault: str, pictures: list[np.ndarray]) -> tuple[bytes, str]:
        """The file of a spoiled clip, and how it was spoiled."""
        chance = self.random
        if fault in BREAKS:
            variant = chance.choice(list(BREAKS[fault]))
            return BREAKS[fault][variant](pictures, chance), variant
        noise = 0
        if fault in ("static", "black"):
            picture = pictures[PICTURE_FRAME] if fault == "static" else np.zeros_like(pictures[0])
            pictures, noise = [picture] * len(pictures), chance.choice((0, 2))
        elif fault == "slide-show":
            others = [
                frames(Shot(chance.choice(self._group()[1])))[PICTURE_FRAME] for _ in range(chance.choice((2, 3)))
            ]
            shown = [pictures[PICTURE_FRAME], *others]
            pictures = [picture for picture in shown for _ in range(36 // len(shown))]
        else:  # frozen
            moved = chance.randint(10, 13)
            pictures = pictures[:moved] + [pictures[moved - 1]] * (3 * moved)
        if noise:
            grain = np.random.default_rng(chance.randrange(1 << 30))
            grainy = (picture + grain.normal(0, noise, picture.shape) for picture in pictures)
            pictures = [np.clip(picture, 0, 255).astype(np.uint8) for picture in grainy]
        return encode(pictures), "noisy" if noise else ""


COPIES = (("compressed", "32", SIDE_PX), ("resized", X264["crf"], 112), ("compressed and resized", "28", 64))
"""Kinds of near duplicate: name, quality (higher is worse), width and height in pixels."""


def _text(fault: str, caption: str, chance: random.Random) -> str:
    """The caption of a row whose caption is spoiled."""
    number, site = chance.randint(100, 99999), chance.choice(("clipbarn", "stockvault", "viewly", "tubeden"))
    color, shape = chance.choice(COLORS), chance.choice(SHAPES)
    words = {"caption": caption, "number": number, "site": site, "color": color, "shape": shape}
    return chance.choice(TEXTS[fault]).format(**words)


TEXTS: Mapping[str, Sequence[str]] = {
    "url": (
        "{caption} more at www.{site}.com/v/{number}",
        "https://{site}.net/watch?v={number}",
        "{caption} (source: http://{site}.org)",
        "{site}.tv/{number} {caption}",
    ),
    "file-name": (
        "IMG_{number}.MOV",
        "DSC0{number}.mp4",
        "VID_20190412_{number}",
        "final_cut_v{number}.avi",
        "{color}-{shape}-{number}-hd.webm",
        "Screen Recording 2021-03-04 at 10.22.31.mov",
    ),
    "advertisement": (
        "Subscribe to my channel and hit the bell for more {shape} clips",
        "Buy now and get 50% off every {color} {shape}, offer ends soon",
        "Follow us for daily clips, link in bio",
        "Free shipping worldwide, order your {color} {shape} today",
        "Royalty free {shape} footage, download the full clip now for only $9",
        "{caption} Like and share this video!",
    ),
    "non-descriptive": (
        "Untitled video {number}",
        "my favourite clip ever",
        "no description available",
        "test test test {number}",
        "!!! wow !!! omg !!!",
        "{number} {number} {number}",
        "video clip number {number}",
        "asdf qwer zxcv asdf",
    ),
    "language": (
        "ein blaues Dreieck bewegt sich langsam nach links und bleibt dann stehen",
        "un cercle se trouve au milieu et disparait un instant sur un fond gris",
        "una estrella grande salta hacia la derecha sobre un fondo oscuro",
        "il quadrato rosso si muove verso l'alto e poi torna al suo posto",
        "een grote ster springt naar rechts en de cirkel blijft in het midden staan",
        "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433 "
        "\u043f\u0440\u044b\u0433\u0430\u0435\u0442 \u0432\u0432\u0435\u0440\u0445",
        "\u7ea2\u8272\u7684\u5706\u5411\u5de6\u79fb\u52a8\uff0c\u7136\u540e\u505c\u4e0b\u6765",
    ),
    "too-short": ("{shape}", "{color}", "{color} {shape}", "a {shape}"),
    "repeated": ("some coloured shapes move about on a patterned background",),
}
"""Fault -> captions; Russian and Chinese say: a red circle hops up; a red circle moves left and stops."""


def _whole(pictures: Sequence[np.ndarray]) -> bytes:
    """The file with its index in front, so that a cut one can still be read."""
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg moves the index by reading the file again
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            mux(container, pictures)
        return path.read_bytes()


def _cut(pictures: Sequence[np.ndarray], chance: random.Random) -> bytes:
    return _whole(pictures)[: -chance.randint(10, 40)]


def _halved(pictures: Sequence[np.ndarray], chance: random.Random) -> bytes:
    data = _whole(pictures)
    return data[: len(data) // 2]


def _garbled(pictures: Sequence[np.ndarray], chance: random.Random) -> bytes:
    data = _whole(pictures)
    place = len(data) - chance.randint(60, 90)
    return data[:place] + chance.randbytes(30) + data[place + 30 :]


def _without_index(pictures: Sequence[np.ndarray], chance: random.Random) -> bytes:
    data = encode(pictures)  # its index is the end of the file
    return data[: int(len(data) * chance.uniform(0.4, 0.8))]


def _sound(pictures: Sequence[np.ndarray], chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    rate = 8000
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate)
        assert isinstance(stream, AudioStream)
        stream.layout = "mono"
        tone = np.sin(np.arange(2 * rate) * chance.uniform(0.1, 0.4)).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        sound.sample_rate = rate
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return buffer.getvalue()


Break = Callable[[Sequence[np.ndarray], random.Random], bytes]
BREAKS: Mapping[str, Mapping[str, Break]] = {
    "damaged": {
        "empty": lambda pictures, chance: b"",
        "no index": _without_index,
        "half": _halved,
        "web page": lambda pictures, chance: b"<html><body>403 Forbidden</body></html>\n" * chance.randint(1, 40),
        "sound only": _sound,
        "noise": lambda pictures, chance: chance.randbytes(chance.randint(2000, 20000)),
    },
    "repairable": {"cut": _cut, "garbled": _garbled},
}
"""Fault -> variant -> what makes such a file of the pictures."""
