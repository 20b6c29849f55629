"""Stage 1 of the synthesis, rules: captions, temporal dynamics, signatures of copies, and which rows are dropped."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest

from gve.items import InputError
from gve.synth.config import build
from gve.synth.media import MediaStore
from gve.synth.quality import (
    REASONS,
    RULES,
    ClipHash,
    Reason,
    ScanOptions,
    Select,
    SelectOptions,
    bits,
    colour_distance,
    judge,
    measure_text,
    near_pairs,
    text_key,
)
from gve.synth.quality.dynamics import GRID, cells, holds, measure
from gve.synth.quality.hashes import MAX_BUCKET
from gve.synth.quality.selection import ROW_RULES
from gve.synth.quality.texts import check_languages
from gve.synth.units import Context, Outcome, Row
from gve.toy import captions
from gve.toy.families import Maker
from gve.toy.language import DIALECTS
from gve.toy.lessons import random_scene
from gve.toy.render import Shot, encode, frames
from gve.toy.scenes import Scene, Thing
from gve.video import Sampling, decode

MOVING = {
    "motion_mean": 9.0,
    "motion_max": 12.0,
    "still_share": 0.0,
    "luminance": 100.0,
    "black_share": 0.0,
    "held_longest": 0.1,
    "held_end": 0.0,
    "slides": 0.0,
    "slide_change": 0.0,
    "slide_share": 0.0,
}


def measured(
    id: str,
    caption: str = "a dog runs over the beach",
    video: int = 0,
    similarity: float | None = None,
    **dynamics: float,
) -> Row:
    """A row as `scan` gives it; `video` seeds its content, so equal numbers are equal files."""
    draw = np.random.default_rng(video or zlib.crc32(id.encode()))
    clip = ClipHash(draw.integers(0, 1 << 63, 8, np.uint64), draw.integers(0, 256, 176, np.uint8))
    quality = {
        "video": {"codec": "h264", "width": 84, "height": 84, "frames": 32, "duration_s": 4.0, "fps": 8.0},
        "sha256": draw.bytes(32).hex(),
        "dynamics": MOVING | dynamics,
        "shots": [0.0],
        "hash": str(clip),
        "text": measure_text(caption, ("en",)).to_dict(),
        "similarity": similarity,
    }
    row = {"id": id, "source": "web", "video": {"file": f"{id}.mp4"}, "caption": caption, "meta": {}}
    return {**row, "start_s": None, "end_s": None, "quality": quality, "frames": [], "clips": []}


def like(row: Row, id: str, flips: int = 0, shift: int = 0) -> Row:
    """A copy of a row's video in another file: so many bits of each frame differ, and colours by so many levels."""
    clip = ClipHash.from_text(row["quality"]["hash"])
    mask = np.uint64(sum(1 << (7 * bit) for bit in range(flips)))
    other = ClipHash(clip.frames ^ mask, (clip.colours.astype(int) + shift).clip(0, 255).astype(np.uint8))
    return {
        **row,
        "id": id,
        "quality": {**row["quality"], "sha256": hashlib.sha256(id.encode()).hexdigest(), "hash": str(other)},
    }


def select(rows: Sequence[Row], **options: Any) -> dict[str, tuple[str, float | None, str]]:
    """Row -> reason, score and detail of its reject, for those that were dropped; there is one outcome for each row."""
    stage = Select(
        SelectOptions(**{"drop_share": 0.0, "max_repeats": 9, **options}),
        Context(MediaStore("x"), 0, _no_encoder, _no_rows),
    )
    outcomes: list[Outcome] = list(stage.run(rows))
    for outcome in outcomes:
        outcome.check()
    assert [outcome.id for outcome in outcomes] == [row["id"] for row in rows]
    assert [row for outcome in outcomes for row in outcome.rows] == [
        row for row, outcome in zip(rows, outcomes, strict=True) if not outcome.rejects
    ]
    rejects = [reject for outcome in outcomes for reject in outcome.rejects]
    assert {reject.stage for reject in rejects} <= {"quality"}
    return {reject.id: (reject.reason, reject.score, reject.detail) for reject in rejects}


def _no_encoder() -> Any:
    raise AssertionError("nothing is to be measured")


def _no_rows(step: str) -> Iterable[Row]:
    return ()


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "caption-missing"),
        ("   ", "caption-missing"),
        ("a dog at the beach, see https://example.org/dog?id=3", "caption-url"),
        ("a dog at the beach www.example.com", "caption-url"),
        ("more dogs at funnydogs.tv every day", "caption-url"),
        ("write to dog.owner@example.org for this dog", "caption-url"),
        ("short.example/abc a dog runs", "caption-url"),
        ("the dog on the beach_final.mp4", "caption-file-name"),
        ("IMG_20210304 dog", "caption-file-name"),
        ("DSC00412", "caption-file-name"),
        ("dog_beach_v2", "caption-file-name"),
        ("9f86d081884c7d659a2feaa0c55ad015", "caption-file-name"),
        ("Subscribe for more dogs on the beach", "caption-advertisement"),
        ("dog beds for sale, shop now", "caption-advertisement"),
        ("waterproof dog coat $19.99 in three colours", "caption-advertisement"),
        ("dog coats, cheap deals on delivery and discount", "caption-advertisement"),
        ("untitled video 3", "caption-non-descriptive"),
        ("New clip (final) 2021", "caption-non-descriptive"),
        ("1080p 60fps", "caption-non-descriptive"),
        ("!!! ??? ...", "caption-non-descriptive"),
        ("Ein Hund läuft über den Strand und springt in das Wasser", "caption-language"),
        ("un chien court sur la plage avec une balle rouge", "caption-language"),
        ("一只狗在海滩上奔跑", "caption-language"),
        ("собака бежит", "caption-language"),  # letters tell at any length
        ("dog", "caption-too-short"),
        ("a dog", "caption-too-short"),
        # What must pass.
        ("a dog runs over the beach", ""),
        ("The dog stops at the water.In the end it turns back", ""),  # a missing blank is no address
        ("dog, beach, ball, running", ""),
        ("Eiffel Tower Paris sunset", ""),  # names: too short to tell a language
        ("slow-motion close-up of a bee", ""),
        ("a woman buys shoes in a store", ""),
        ("aerial view of rice terraces in Bali at sunrise", ""),
        ("crowd cheering at stadium during night football match", ""),
        ("the 100 m final at 10.30 in the evening", ""),
        ("two men lift 20 kg each", ""),
    ],
)
def test_captions(caption: str, reason: str) -> None:
    """By hand: what a person would call each text."""
    assert judge(measured("x", caption), SelectOptions())[0] == reason


def test_captions_of_the_toy_world_pass() -> None:
    """They are true and descriptive, so no rule on the text may turn one away."""
    wrong = Counter[str]()
    count = 0
    kinds = (captions.short, captions.theme, captions.main_object, captions.detailed, captions.camera)
    for number in range(40):
        scene = random_scene(Maker(f"captions {number}"))
        for kind in kinds:
            count += 1
            text = kind(scene, captions.Teller(DIALECTS["A"], random.Random(number))).text
            wrong[judge(measured("x", text), SelectOptions())[0]] += 1
    assert wrong[""] == count, wrong


def test_other_languages_can_be_asked_for() -> None:
    text = "Ein Hund läuft über den Strand und springt in das Wasser"
    assert measure_text(text, ("en",)).language == "de"
    assert measure_text(text, ("de", "en")).foreign == 0.0
    assert measure_text(text, ()).foreign == 0.0
    assert measure_text("一只狗在海滩上奔跑", ("zh",)).foreign == 0.0
    assert measure_text("一只狗在海滩上奔跑", ("zh",)).words == 9  # no blanks: letters are counted
    with pytest.raises(InputError, match="language 'xx' is unknown"):
        check_languages(("en", "xx"))


def test_texts_that_differ_in_form_alone_have_one_key() -> None:
    assert text_key("A dog, running.") == text_key("a  DOG running") == text_key("ａ dog running!")
    assert text_key("a dog running") != text_key("a dog runs")
    assert text_key("...") == text_key("")


# ------------------------------------------------------------------------------------------------------------- dynamics


def scene(*levels: float) -> np.ndarray:
    """[T, 16, 16, 3] pictures of one grey each."""
    return np.stack([np.full((GRID, GRID, 3), level, np.float32) for level in levels])


def test_cells_are_means_of_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 3), np.uint8)
    by_hand = pixels.reshape(2, 16, 4, 16, 2, 3).mean((2, 4))
    assert np.allclose(cells(pixels), by_hand, atol=1e-3)
    assert cells(np.zeros((1, 9, 200, 3), np.uint8)).shape == (1, 16, 16, 3)  # a side shorter than the grid


def test_holds_by_hand() -> None:
    """8 Hz; level 4: 1 s at 50, slow drift that adds up to 5, then 1 s at 90."""
    levels = [50.0] * 8 + [51, 52, 53, 54, 55] + [90.0] * 8
    found = holds(scene(*levels), np.arange(21) / 8, 21 / 8, 4.0)
    # The first hold lasts until the drift reaches 54 (index 11); 54, 55 is too short; the second from index 13.
    assert [(hold.start_s, hold.end_s, hold.picture) for hold in found] == [(0.0, 11 / 8, 0), (13 / 8, 21 / 8, 13)]


def test_a_single_picture_is_no_hold() -> None:
    """At one frame a second each is shown for longer than a hold must be; only frames that stay alike stand still."""
    assert holds(scene(10, 60, 110, 160), np.arange(4.0), 4.0, 4.0) == []
    assert len(holds(scene(10, 10, 110, 160), np.arange(4.0), 4.0, 4.0)) == 1


def dynamics(levels: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Measures of a clip at 8 Hz, given by its greys or its pictures."""
    pictures = levels if isinstance(levels, np.ndarray) else scene(*levels)
    times_s = np.arange(len(pictures)) / 8
    sparse = pictures[np.linspace(0, len(pictures) - 1, 8).round().astype(int)]
    return measure(sparse, pictures, times_s, len(pictures) / 8, 4.0)


def test_measures_by_hand() -> None:
    still = dynamics([60] * 32)
    assert (still["held_longest"], still["held_end"], still["still_share"], still["slides"]) == (1, 1, 1, 0)
    show = dynamics([20] * 8 + [120] * 8 + [60] * 8 + [200] * 8)
    assert (show["slides"], show["slide_share"], show["slide_change"], show["held_end"]) == (4, 1, 1, 0.25)
    # Sampled at 0 4 9 13 18 22 27 31: 20 20 120 120 60 60 200 200.
    assert show["still_share"] == pytest.approx(4 / 7, abs=1e-4)
    assert show["motion_max"] == 140
    assert show["motion_mean"] == pytest.approx((100 + 60 + 140) / 7, abs=1e-4)
    frozen = dynamics([10.0 * i for i in range(12)] + [120] * 20)
    assert frozen["held_end"] == pytest.approx(20 / 32)  # the picture at 12 is like the last that moved: 120
    assert frozen["slides"] == 0
    dark = dynamics([31] * 16 + [33] * 16)
    assert dark["black_share"] == 0.5


def test_a_fade_is_a_change_of_slides_and_a_pan_is_none() -> None:
    fade = dynamics([20] * 12 + [40, 60, 80, 100] + [120] * 16)
    assert fade["slides"] == 2
    assert fade["slide_share"] == pytest.approx(28 / 32)
    pan = dynamics([20] * 10 + [20 + 10.0 * i for i in range(1, 12)] + [140] * 11)  # 11 frames: longer than a fade
    assert pan["slides"] == 0


def test_a_small_thing_that_moves_is_seen_and_noise_is_not() -> None:
    draw = np.random.default_rng(0)
    noisy = np.clip(100 + draw.normal(0, 6, (32, 160, 160, 3)), 0, 255).astype(np.uint8)
    assert dynamics(cells(noisy))["held_longest"] == 1  # 100 pixels a cell: 0.6 levels
    for time_ in range(32):
        noisy[time_, 70:80, 4 * time_ : 4 * time_ + 10] = 200  # 0.4% of the picture
    moving = dynamics(cells(noisy))
    assert moving["held_longest"] < 0.2
    assert moving["motion_max"] < 2  # the mean over the picture would have called it still


def test_a_blink_is_no_slide_show() -> None:
    pictures = scene(*[100] * 32)
    pictures[12:14, 4:12, 4:12] = 220
    assert dynamics(pictures)["slides"] == 0


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ({"black_share": 0.51}, "black-video"),
        ({"black_share": 0.5}, ""),
        ({"held_longest": 0.96, "held_end": 0.96}, "static-video"),  # frozen too: the first rule names it
        ({"slide_share": 0.9, "slide_change": 0.3}, "slide-show"),
        ({"slide_share": 0.9, "slide_change": 0.2}, ""),  # a part of the picture changes: things that hop
        ({"held_end": 0.51}, "frozen-video"),
        ({"held_longest": 0.9}, ""),  # it moves afterwards
    ],
)
def test_rules_on_pictures(measures: dict[str, float], reason: str) -> None:
    assert judge(measured("x", **measures), SelectOptions())[0] == reason
    assert not judge(measured("x", **measures), SelectOptions(rules=("caption-url",)))[0]


# --------------------------------------------------------------------------------------------------------------- copies


def clip_hash(data: bytes) -> ClipHash:
    return ClipHash.of(decode(data, Sampling()).pixels)


def test_copies_are_near_and_foils_are_not() -> None:
    """Of six toy clips: encoded worse, and twice as large; against each other, reversed, and in another colour."""
    limits = SelectOptions()
    shots = [frames(Shot((random_scene(Maker(f"copies {number}")),))) for number in range(6)]
    originals = [clip_hash(encode(shot)) for shot in shots]

    def near(one: ClipHash, other: ClipHash) -> bool:
        return bool(
            bits(one.frames, other.frames) <= limits.max_bits
            and colour_distance(one.colours, other.colours) <= limits.max_colour
        )

    for shot, original in zip(shots, originals, strict=True):
        assert str(ClipHash.from_text(str(original))) == str(original)
        large = [np.asarray(PIL.Image.fromarray(picture).resize((168, 168))) for picture in shot]
        assert near(original, clip_hash(encode(shot, crf="30")))
        assert near(original, clip_hash(encode(large, side_px=168)))
    assert not any(near(originals[one], originals[other]) for one in range(6) for other in range(one))
    # Another thing hops first: the hashes alone would take it for a copy.
    course = ("hop left", "", "", "")
    orders = [
        Thing("grey", "ring", "small", (1, 1), course),
        Thing("grey", "ring", "small", (1, 1), ("hop up", "", "", "")),
    ]
    one, other = (clip_hash(encode(frames(Shot((Scene((thing,), ("white", "plain")),))))) for thing in orders)
    assert bits(one.frames, other.frames) <= limits.max_bits
    assert not near(one, other)
    # Things and ground in other colours of the same lightness: the hash sees no difference, the colours do.
    other = clip_hash(encode([np.ascontiguousarray(picture[..., ::-1]) for picture in shots[0]]))
    assert not near(originals[0], other)
    backwards = ClipHash(originals[0].frames[::-1], originals[0].colours)
    assert set(backwards.frames.tolist()) == set(originals[0].frames.tolist())  # no order, no difference
    assert not near(originals[0], backwards)


def test_near_pairs_are_those_of_brute_force() -> None:
    """1,000 random signatures, 300 of them copies with 0 to 8 flipped bits a frame and shifted colours."""
    draw = np.random.default_rng(3)
    hashes = draw.integers(0, 1 << 63, (1000, 8), np.uint64)
    colours = draw.integers(20, 230, (1000, 48)).astype(np.uint8)
    for copy in range(700, 1000):
        of = int(draw.integers(0, 700))
        flips = [sum(1 << int(bit) for bit in draw.choice(64, draw.integers(0, 9), replace=False)) for _ in range(8)]
        hashes[copy] = hashes[of] ^ np.array(flips, np.uint64)
        colours[copy] = colours[of] + draw.integers(-12, 13)
    for max_bits in (2.5, 4.0):
        far = np.stack([bits(hashes, row) for row in hashes]) > max_bits
        far |= np.stack([colour_distance(colours, row) for row in colours]) > 10
        expected = np.argwhere(np.triu(~far, 1))
        assert len(expected) > 5
        assert np.array_equal(near_pairs(hashes, colours, max_bits, 10), expected)
    assert near_pairs(hashes[:1], colours[:1], 4, 10).shape == (0, 2)


def test_a_frame_that_thousands_share_costs_a_bounded_time() -> None:
    """All 1,500 clips begin with one black frame, and twelve are copies of each other."""
    draw = np.random.default_rng(4)
    hashes = draw.integers(0, 1 << 63, (1500, 8), np.uint64)
    hashes[:, 0] = 1 << 63
    places = np.sort(draw.choice(1500, 12, replace=False))
    hashes[places] = hashes[places[0]]
    pairs = near_pairs(hashes, np.zeros((1500, 48), np.uint8), 4.0, 10)
    assert len(pairs) == 12 * 11 / 2  # the other frames find them
    assert set(pairs.ravel().tolist()) == set(places.tolist())
    assert MAX_BUCKET * 1500 < 1500**2 / 2  # what the black frame may cost


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_clips_are_compared() -> None:
    """Not quadratic, and within the memory that is stated. 1,000 planted copies are all found."""
    code = (
        "import numpy as np, resource, time\n"
        "from gve.synth.quality import near_pairs\n"
        "draw = np.random.default_rng(0)\n"
        "hashes = draw.integers(0, 1 << 63, (1_000_000, 8), np.uint64)\n"
        "colours = np.zeros((1_000_000, 48), np.uint8)\n"
        "hashes[999_000:] = hashes[:1000] ^ np.uint64(0b10101)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "begun = time.process_time()\n"
        "pairs = near_pairs(hashes, colours, 4.0, 10)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(pairs), time.process_time() - begun, (after - before) / 1e6 * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(done.stdout)
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == 1000
    assert seconds < 300
    assert megabytes < 180


# ----------------------------------------------------------------------------------------------------- rules on the run


def test_the_table_of_reasons_is_whole() -> None:
    assert list(ROW_RULES) == list(RULES[: len(ROW_RULES)])
    assert RULES[len(ROW_RULES) :] == ("caption-repeated", "inconsistent", "duplicate", "near-duplicate")
    assert all(isinstance(reason, Reason) and reason.about for reason in REASONS.values())
    assert {code for code, reason in REASONS.items() if reason.step == "select"} == set(RULES)
    # Every reason that gve.video may give stands in it.
    from gve.video.source import MediaError

    listed = str(MediaError.__doc__).split("a slug:")[1].split("name:")[0].replace("\n", " ").strip(" .")
    slugs = {slug.strip() for slug in listed.split(",")} - {"not-an-image", "no-such-span"}  # `span` is its code here
    assert slugs <= {code for code, reason in REASONS.items() if reason.kind == "file"}


def test_captions_repeated_over_more_than_k_videos() -> None:
    rows = [measured(f"a{i}", "waves at the shore", i + 1) for i in range(4)]
    rows += [measured(f"b{i}", "wind in the trees", i + 10) for i in range(3)]
    rows += [measured(f"c{i}", "one dog at home", 20) for i in range(5)]  # five times, but one video
    rows += [measured(f"d{i}", "", i + 30) for i in range(6)]  # no caption repeats nothing
    off = tuple(rule for rule in RULES if rule not in ("caption-missing", "duplicate", "near-duplicate"))
    found = select(rows, rules=off, max_repeats=3)
    assert found == {f"a{i}": ("caption-repeated", 4.0, "waves at the shore") for i in range(4)}
    assert set(select(rows, rules=off, max_repeats=2)) == {f"{k}{i}" for k, n in (("a", 4), ("b", 3)) for i in range(n)}


def test_consistency_by_threshold_and_by_quantile() -> None:
    rows = [measured(f"v{i}", video=i + 1, similarity=i / 10) for i in range(10)]
    rows += [measured("spam", "click here", 99, similarity=-1.0), measured("none", "", 98)]
    off = tuple(rule for rule in RULES if rule not in ("caption-repeated", "caption-missing"))
    found = select(rows, rules=off, drop_share=0.3)
    # The spam is gone before, and what was not measured counts not: 3 of 10.
    assert {id: why for id, why in found.items() if why[0] == "inconsistent"} == {
        f"v{i}": ("inconsistent", i / 10, "under 0.3: a dog runs over the beach") for i in range(3)
    }
    assert found["spam"][0] == "caption-advertisement"
    assert set(select(rows, rules=off, min_similarity=0.15)) == {"v0", "v1", "spam"}
    assert set(select(rows, rules=off, drop_share=0.0)) == {"spam"}
    with pytest.raises(InputError, match=r"scan\.similarity"):
        select([measured("x")], min_similarity=0.2)


def test_the_first_of_copies_is_kept() -> None:
    first = measured("first", "a cat at the door of a house", 1)
    rows = [
        like(first, "bad", flips=1) | {"caption": "untitled"},
        first,
        {**first, "id": "same file"},
        like(first, "near", flips=3),
        like(first, "far", flips=6),
        like(first, "redder", flips=0, shift=30),
        measured("other", "a cat at the door of a house", 2),
    ]
    rows[0]["quality"]["text"] = measure_text("untitled", ("en",)).to_dict()
    found = select(rows)
    assert found == {
        "bad": ("caption-non-descriptive", 0.0, "untitled"),  # it is no reason to drop its copy
        "same file": ("duplicate", None, "first"),
        "near": ("near-duplicate", 3.0, "first"),
    }
    # "far" differs by 6 bits from "first", and by 3 from "near", which is not kept.
    assert set(select([*rows[:3], rows[4], rows[3]])) == {"bad", "same file", "near"}
    assert set(select(rows, max_bits=6.0)) == {"bad", "same file", "near", "far"}
    assert set(select(rows, rules=())) == set()


def test_a_video_may_keep_several_captions() -> None:
    first = measured("first", "a cat at the door of a house", 1)
    rows = [
        first,
        measured("second", "a tabby waits outside", 1),
        measured("again", "A cat, at the door of a house!", 1),
    ]
    rows.append(like(rows[1], "copy", flips=2))
    assert set(select(rows)) == {"second", "again", "copy"}
    found = select(rows, several_captions=True)
    assert {id: why[::2] for id, why in found.items()} == {
        "again": ("duplicate", "first"),
        "copy": ("near-duplicate", "second"),
    }


def test_nothing_and_options_that_mean_nothing() -> None:
    assert select([]) == {}
    for values, words in (
        ({"rules": ["caption-spam"]}, "no rule 'caption-spam'"),
        ({"drop_share": 1.5}, "drop_share 1.5"),
        ({"max_bits": 40}, "max_bits 40"),
        ({"rule": []}, "no key 'rule'"),
    ):
        with pytest.raises(InputError, match=words):
            build(SelectOptions, values, "select")
    for values, words in (
        ({"repair": "magic"}, "repair 'magic'"),
        ({"min_duration_s": 9, "max_duration_s": 3}, "rising range"),
        ({"sampling": "fps(1,8)"}, "use uniform"),
        ({"cutting": {"max_clip": 1}}, "no key 'max_clip'"),
    ):
        with pytest.raises(InputError, match=words):
            build(ScanOptions, values, "scan")
    assert build(ScanOptions, {"sampling": "uniform(4)", "languages": []}, "scan").sampling == Sampling.uniform(4)
