"""The toy world: what captions claim is true, pictures show it, sets measure what their names say, files load."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from gve.data.curriculum import TASKS
from gve.data.manifest import Manifest
from gve.eval.uvrb import SETS, UVRBReader
from gve.inputs import InputBuilder, InputPolicy, normalised
from gve.items import InputError
from gve.model.backbone import Backbone
from gve.toy import captions, families
from gve.toy.base import SPECIAL_TOKENS, copy_base, train_tokenizer
from gve.toy.captions import KINDS, Teller
from gve.toy.forms import Fact, Form, Noun, holds, tells
from gve.toy.language import DIALECTS
from gve.toy.panels import panel_queries
from gve.toy.render import PAINT, Shot, Still, draw, frames, render, render_all
from gve.toy.scenes import (
    CELL_PX,
    COLORS,
    NO_COURSE,
    SAMPLED_FRAMES,
    SHAPES,
    Scene,
    Thing,
    middle_scene,
    shows,
    still_state,
)
from gve.toy.toy_cli import main
from gve.toy.training import Mixture, shown
from gve.toy.uvrb import Builder, Query, best_hit_rate, hit_rate
from gve.toy.world import Request, make_world
from gve.video import Sampling, decode

RED = Thing("red", "square", "large", (0, 1), ("hop up", "", "blink", ""))
BLUE = Thing("blue", "circle", "small", (2, 1), ("", "swell", "", ""))
SCENE = Scene((RED, BLUE), ("grey", "plain"))
TOLD = {
    "short": families.coarse,
    "paragraph": families.paragraph,
    "spatial": families.care,
    "temporal": families.care,
    "general": families.care,
    "main object": families.detail,
    "detailed": families.detail,
    "static": families.detail,
    "camera": families.camera,
    "theme": families.theme,
    "keywords": families.keywords,
}


def one(*facts: Fact, nouns: tuple[Noun, ...] = (Noun("red", "square"), Noun("blue", "circle"))) -> Form:
    return Form(nouns, facts)


@pytest.mark.parametrize(
    ("fact", "true"),
    [  # each judged by hand on SCENE
        (Fact("left of", who=(0, 1)), True),
        (Fact("right of", who=(0, 1)), False),
        (Fact("above", who=(0, 1)), False),
        (Fact("at", (0, 1), (0,)), True),
        (Fact("at", (2, 1), (0,)), False),
        (Fact("does", "blink", (0,)), True),
        (Fact("does", "blink", (1,)), False),
        (Fact("rests", who=(1,)), False),
        (Fact("order", ("hop up", "swell", "blink"), (0, 1, 0)), True),
        (Fact("order", ("swell", "hop up", "blink"), (1, 0, 0)), False),
        (Fact("order", ("hop up", "hop up"), (0, 0)), False),
        (Fact("camera", ("still", "still")), True),
        (Fact("camera", ("pan left", "pan left")), False),
        (Fact("ground", ("grey", "plain")), True),
        (Fact("pattern", "dotted"), False),
        (Fact("palette", "mixed"), True),
        (Fact("density", "moderate"), True),
        (Fact("pace", "steady"), True),
        (Fact("any color", "blue"), True),
        (Fact("any event", "shrink"), False),
    ],
)
def test_the_checker_agrees_with_a_judgement_by_hand(fact, true):
    assert holds(one(fact), SCENE) is true


def test_a_form_gives_each_noun_a_thing_of_its_own():
    assert holds(Form((Noun(), Noun())), SCENE)
    assert not holds(Form((Noun(), Noun(), Noun())), SCENE)
    assert not holds(Form((Noun("red"), Noun("red"))), SCENE)
    assert not holds(Form((Noun("red", "circle"),)), SCENE)  # colour of one thing, shape of the other


@pytest.mark.parametrize("look", ["A", "B"])
@pytest.mark.parametrize("kind", sorted(TOLD))
def test_captions_are_true_of_their_clip_and_read_as_english(kind, look):
    teller = Teller(DIALECTS[look], random.Random(3))
    false_of_foils = 0
    for group in families.groups(TOLD[kind], 6, f"test {kind}", look=look):
        for clip in group:
            caption = KINDS[kind](clip[0], teller)
            assert tells(caption.story, clip), caption.text
            false_of_foils += sum(not tells(caption.story, other) for other in group)
            assert caption.text == caption.text.strip()
            assert not {"  ", " .", " ,", "a orange", "a olive", "{", "an red"} & _pieces(caption.text)
    assert false_of_foils > 0  # the negative control: no caption is true of everything


def _pieces(text: str) -> set[str]:
    wanted = ("  ", " .", " ,", "a orange", "a olive", "{", "an red")
    return {piece for piece in wanted if piece in text}


@pytest.mark.parametrize(
    ("kind", "family", "most"),
    [  # clips of a group of which a caption is true, its own included
        ("short", families.coarse, 1),
        ("paragraph", families.paragraph, 1),
        ("general", families.care, 1),
        ("temporal", families.care, 2),  # the same order in the swapped places
        ("spatial", families.care, 4),  # the four orders of one arrangement
        ("main object", families.detail, 1),
        ("detailed", families.detail, 1),
        ("camera", families.camera, 1),
        ("keywords", families.keywords, 1),
    ],
)
def test_a_caption_tells_its_clip_from_the_foils(kind, family, most):
    teller = Teller(DIALECTS["A"], random.Random(5))
    for group in families.groups(family, 8, f"foils {kind}"):
        for clip in group:
            story = KINDS[kind](clip[0], teller).story
            assert 1 <= sum(tells(story, other) for other in group) <= most


def test_a_story_is_true_of_one_long_video_only():
    teller = Teller(DIALECTS["A"], random.Random(5))
    for group in families.groups(families.long, 3, "long"):
        for clip in group:
            assert [tells(captions.story(clip, teller).story, other) for other in group].count(True) == 1


def paint_at(picture: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    return tuple(int(v) for v in picture[round(y), round(x)])


def near(color: tuple[int, ...], name: str, tolerance: int = 40) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(color, PAINT["A"][name], strict=True))


def test_the_mp4_shows_what_the_scene_says():
    # Cell centres by hand: column 0 is x 14, row 1 is y 42, row 0 is y 14. Frames 4, 9 and 22 are the heights of
    # slots 0, 1 and 2: the square hops up, the circle swells, the square is gone.
    shot = decode(render(Shot((SCENE,))), Sampling.uniform(8)).pixels
    assert near(paint_at(shot[0], 14, 42), "red")
    assert near(paint_at(shot[0], 70, 42), "blue")
    assert near(paint_at(shot[1], 14, 14), "red")
    assert near(paint_at(shot[1], 14, 42), "grey")
    assert near(paint_at(shot[0], 80, 42), "grey")
    assert near(paint_at(shot[2], 80, 42), "blue")  # radius 8 grew to 12
    assert near(paint_at(shot[3], 14, 42), "red")
    assert near(paint_at(shot[5], 14, 42), "grey")
    assert near(paint_at(shot[5], 14, 14), "grey")


def red_centre(picture: np.ndarray) -> tuple[float, float, int]:
    """Mean x, mean y and area of the red pixels."""
    mask = np.abs(picture.astype(int) - PAINT["A"]["red"]).max(-1) < 60
    y, x = np.nonzero(mask)
    return float(x.mean()), float(y.mean()), int(mask.sum())


@pytest.mark.parametrize(
    ("moves", "dx", "dy", "growth"),
    [  # from the first to the last frame; a view that pans left shows its things moving right
        (("pan left", "pan left"), 42, 0, 1.0),
        (("pan right", "pan right"), -42, 0, 1.0),
        (("tilt up", "tilt up"), 0, 42, 1.0),
        (("zoom in", "zoom in"), 0, 0, np.exp(4 * 0.37)),
        (("zoom out", "zoom out"), 0, 0, np.exp(-4 * 0.37)),
        (("pan left", "tilt up"), 21, 21, 1.0),
    ],
)
def test_the_camera_moves_as_told(moves, dx, dy, growth):
    thing = replace(RED, place=(1, 1), course=NO_COURSE)
    first, *_, last = frames(Shot((Scene((thing,), ("grey", "dotted"), moves),)))
    x0, y0, area0 = red_centre(first)
    x1, y1, area1 = red_centre(last)
    assert (x1 - x0, y1 - y0) == pytest.approx((dx, dy), abs=1.5)
    assert area1 / area0 == pytest.approx(growth, rel=0.15)


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_a_slide_crosses_half_the_frame_through_its_home(direction):
    thing = replace(RED, place=(1, 1), course=NO_COURSE, slide=(direction, direction))
    first, *_, last = frames(Shot((Scene((thing,), ("grey", "plain")),)))
    (x0, y0, _), (x1, y1, _) = red_centre(first), red_centre(last)
    way = {"left": (-42, 0), "right": (42, 0), "up": (0, -42), "down": (0, 42)}[direction]
    assert (x1 - x0, y1 - y0) == pytest.approx(way, abs=1)


@pytest.mark.parametrize("family", [families.coarse, families.paragraph, families.camera])
def test_the_middle_frame_hides_what_the_group_differs_in(family):
    for group in families.groups(family, 3, "middle"):
        for time in (13, 15, 16, 18):  # whatever is taken for the middle one
            assert len({draw(clip[0], time).tobytes() for clip in group}) == 1
        told = {b"".join(draw(clip[0], time).tobytes() for time in (4, 9, 22, 27)) for clip in group}
        assert len(told) == len(group)  # the negative control: other frames tell every clip
        assert len({still_state(middle_scene(clip)) for clip in group}) == 1


def test_equal_still_states_are_equal_pictures_and_others_are_not():
    clips = [clip for group in families.groups(families.care, 3, "states") for clip in group]
    pictures = {still_state(clip[0]): draw(clip[0], 15).tobytes() for clip in clips}
    assert all(draw(clip[0], 15).tobytes() == pictures[still_state(clip[0])] for clip in clips)
    assert len(set(pictures.values())) == len(pictures) == 6  # two arrangements in each of three groups


def test_a_frame_is_found_in_the_clips_that_show_it():
    center = replace(RED, place=(1, 1), course=NO_COURSE)
    hop = Scene((replace(center, course=("hop left",) * 4),), ("grey", "plain"))
    other = Scene((replace(center, course=("hop up", "hop left", "", "")),), ("grey", "plain"))
    swell = Scene((replace(center, course=("swell",) * 4),), ("grey", "plain"))
    assert [shows(scene, hop, 3) for scene in (hop, other, swell)] == [True, True, False]
    assert all(shows(scene, hop, 15) for scene in (hop, other, swell))  # at rest they are alike


def test_hit_rates_by_hand():
    assert hit_rate(10, 1, 1) == pytest.approx(0.1)
    assert hit_rate(3, 1, 10) == 1.0  # fewer items than places
    assert hit_rate(4, 2, 2) == pytest.approx(1 - 1 / 6)  # both draws among the two others: 1 of C(4, 2) = 6
    query = Query(positives=(0, 5))
    classes = [(0, "a"), (1, "a"), (2, "a"), (3, "a"), (5, "b"), (6, "b")]
    assert best_hit_rate(classes, query, 1) == pytest.approx(0.5)  # class b: one of two
    assert best_hit_rate(classes, query, 2) == 1.0  # class b fits into the first two
    assert best_hit_rate([(r, "a") for r in range(6)], query, 1) == pytest.approx(2 / 6)
    assert best_hit_rate([(0, "a"), (1, "b")], Query(positives=(0,)), 10) == 1.0


@pytest.mark.parametrize("modality", ["TI", "TV", "still"])
def test_one_side_of_a_composed_query_fits_four_of_ten(modality):
    for panel in panel_queries(modality, 6, "sides"):
        for query in panel.queries:
            assert (len(query.fits_text_only), len(query.fits_media_only), len(query.fits_neither)) == (3, 3, 9)
            scene = panel.clips[query.positive][0]
            assert holds(query.identity | query.change, scene)
            reference = query.image.scene if query.image else query.video.clip[0]
            assert holds(query.identity, reference)
            assert not holds(query.change, reference)  # else the text would be needless


@pytest.fixture(scope="module")
def sets():
    return {mini.name: mini for mini in Builder(0).build()}


def test_the_sixteen_sets_have_the_stated_sizes_and_positives(sets):
    sizes = {name: (len(mini.queries), len(mini.corpus)) for name, mini in sets.items()}
    assert list(sizes) == [record.name for record in SETS]
    assert sizes["VDC-O"] == (205, 205)
    assert sizes["VDC-D"] == (200, 205)
    assert sizes["CMRB"] == (145, 214)
    assert sizes["PEV-K"] == (195, 203)
    assert sizes["LoVR-V"] == (43, 200)
    assert sizes["DREAM-E"][0] >= 600
    assert sizes["DREAM-E"][1] == 200
    for name in ("MSRVTT", "DiDeMo", "CRB-G", "CRB-S", "CRB-T", "LoVR-TH", "MSRVTT-I2V", "LoVR-C2V"):
        assert sizes[name] == (200, 200), name
    for mini in sets.values():
        assert all(query.positives for query in mini.queries)
        texts = [query.text for query in mini.queries if query.text and not query.pool]
        assert len(set(texts)) == len(texts)
    assert sets["CRB-G"].corpus == sets["CRB-S"].corpus == sets["CRB-T"].corpus
    assert sets["VDC-O"].corpus == sets["VDC-D"].corpus


def test_chance_and_ceilings_are_what_the_foils_were_built_for(sets):
    chance = {name: mini.chance() for name, mini in sets.items()}
    ceilings = {name: mini.ceilings() for name, mini in sets.items()}
    for name in ("MSRVTT", "DiDeMo", "CRB-G", "CRB-T", "VDC-O", "VDC-D", "DREAM-E", "PEV-K", "MSRVTT-I2V"):
        assert 0.0045 <= chance[name] <= 0.01, name
    assert chance["MS-TI"] == chance["MS-TV"] == pytest.approx(0.1)
    assert 0.04 <= chance["CMRB"] <= 0.12
    for name in ("MS-TI", "MS-TV"):
        assert ceilings[name]["text_only"] == ceilings[name]["media_only"] == pytest.approx(0.25)
    # Groups of five events, of four orders, and of four actions share their middle frame.
    assert ceilings["MSRVTT"]["static"] == pytest.approx(0.2)
    assert ceilings["DiDeMo"]["static"] == pytest.approx(0.2)
    assert ceilings["CRB-T"]["static"] == pytest.approx(0.25)
    assert ceilings["CRB-S"]["static"] == 1.0  # arrangement is seen in any frame
    assert ceilings["MS-TV"]["static"] == pytest.approx(0.25)
    assert ceilings["CMRB"]["static"] < 0.55  # ten places of twenty-one clips that look alike
    # Shuffled frames: three of the four orders hold the same frames, the one that repeats a move is alone.
    assert ceilings["CRB-T"]["shuffled"] == pytest.approx((3 * 1 / 3 + 1) / 4)
    assert ceilings["DiDeMo"]["shuffled"] == 1.0  # which events there are needs no order
    assert all(found["static"] <= found["shuffled"] for found in ceilings.values())


def test_training_shows_nothing_held_out_and_no_tested_clip(sets):
    tested = {shown(clip) for mini in sets.values() for clip in mini.corpus}
    assert any(families.is_held_out(clip) for clip in tested)
    sources = list(Mixture(0, 0.1, tested).sources())
    assert {source.task for source in sources} == set(TASKS)
    clips = {
        medium.clip if isinstance(medium, Shot) else (medium.scene,)
        for source in sources
        for sample in source.samples
        for medium in (side.media for side in sample.sides)
        if medium
    }
    assert not any(families.is_held_out(clip) for clip in clips)
    assert not {shown(clip) for clip in clips} & tested
    seen = {(thing.color, thing.shape) for clip in clips for scene in clip for thing in scene.things}
    assert len(seen) == len(COLORS) * len(SHAPES) - 6
    negatives = Counter(source.task for source in sources for sample in source.samples if sample.negatives)
    assert {"T2T", "T2V", "TI2T", "TI2I", "TI2V", "TV2V"} == set(negatives)


def test_the_same_seed_draws_the_same_files_in_any_process():
    shots = [Shot(clip) for clip in next(families.groups(families.events, 1, "again"))]
    again = [Shot(clip) for clip in next(families.groups(families.events, 1, "again"))]
    assert [shot.name for shot in shots] == [shot.name for shot in again]
    pooled = [data for _, data in render_all([*shots, Still(SCENE, 4)], jobs=2)]
    assert pooled == [render(spec) for spec in [*shots, Still(SCENE, 4)]]
    other = [Shot(clip) for clip in next(families.groups(families.events, 1, "another"))]
    assert not {shot.name for shot in shots} & {shot.name for shot in other}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(
        tmp_path_factory.mktemp("toy") / "world", Request(scale=0.02, test_scale=0.05, base="random"), progress=False
    )


def test_the_base_is_the_real_class_with_its_special_tokens(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))  # after the vocabulary, in order
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    text = "an olive striped ring \u6f22 zyx<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" a large red circle hops left")["input_ids"]) == 6  # its own words are whole tokens
    model = Qwen2_5_VLModel.from_pretrained(world / "base")
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 <= parameters <= 4e6
    assert model.config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    # The initialisation keeps signals alive: outputs of two different clips differ by a good part of their size.
    builder = InputBuilder.from_base(str(world / "base"), InputPolicy(sampling=Sampling.uniform(8)))
    test_set = UVRBReader(world / "uvrb").read("MSRVTT")
    batch = builder(test_set.corpus[:2])
    assert batch.video_patches is not None
    patches = normalised(batch.video_patches, batch.pixel_mean, batch.pixel_std)
    tokens = model.visual(patches, grid_thw=batch.video_grid).pooler_output
    tokens = torch.cat(list(tokens)) if isinstance(tokens, (tuple, list)) else tokens
    assert tokens.shape == (2 * 4 * 9, model.config.text_config.hidden_size)  # 8 frames in pairs, 3 x 3 cells
    assert 0.02 < tokens.std().item() < 5
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(192**-0.5, rel=0.05)


def test_the_tokenizer_is_the_same_for_the_same_texts():
    texts = ["a red circle hops left", "the camera pans right"] * 3
    one, other = (train_tokenizer(texts).get_vocab() for _ in range(2))
    assert one == other


def test_the_chat_template_is_qwens(world, real):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    config = json.loads((real / "tokenizer" / "qwen2_5_vl_7b" / "tokenizer_config.json").read_text())
    text = {"type": "text", "text": "hello"}
    for content in ("hello", [text], [{"type": "image"}, text], [{"type": "video"}, {"type": "image"}, text]):
        for system in ([], [{"role": "system", "content": "Be brief."}]):
            messages = [*system, {"role": "user", "content": content}]
            options = {"tokenize": False, "add_generation_prompt": True}
            expected = tokenizer.apply_chat_template(messages, chat_template=config["chat_template"], **options)
            assert tokenizer.apply_chat_template(messages, **options) == expected


def test_the_world_is_read_by_the_library(world):
    reader = UVRBReader(world / "uvrb")
    assert len(reader.names()) == 16
    for name in reader.names():
        test_set = reader.read(name)
        assert not test_set.missing
        assert all(test_set.positives)
        assert test_set.facts["oracle"] == 1.0
        assert 0 < test_set.facts["chance"] <= test_set.facts["ceilings"]["static"] <= 1
        if test_set.pools:
            assert {len(pool) for pool in test_set.pools} == {10}
    manifest = Manifest.load(world / "shards")
    assert {record.task for record in manifest.sources.values()} == set(TASKS)
    assert all(record.instruction and record.level == TASKS[record.task] for record in manifest.sources.values())


def test_an_equal_request_is_reused_and_another_is_refused(world):
    before = (world / "world.json").stat().st_mtime_ns
    request = Request(scale=0.02, test_scale=0.05, base="random")
    assert make_world(world, request, progress=False) == world
    assert (world / "world.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="seed 0 instead of 7"):
        make_world(world, replace(request, seed=7), progress=False)
    with pytest.raises(InputError, match="another toy world"):
        main(["make", str(world), "--seed", "7", "--scale", "0.02", "--test-scale", "0.05", "--base", "random"])
    (world.parent / "notes").mkdir()
    with pytest.raises(InputError, match="is no toy world"):
        make_world(world.parent / "notes", request, progress=False)


def test_an_interrupted_world_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gve.toy.world._write_uvrb", stop)
    monkeypatch.setattr("gve.toy.world._write_base", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path / "w", Request(scale=0.01, test_scale=0.01), progress=False)
    assert not (tmp_path / "w").exists()


def test_show_draws_a_contact_sheet(world, tmp_path):
    assert main(["show", str(world), str(tmp_path / "sheet.png"), "--per-set", "1"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="is no toy world"):
        main(["show", str(tmp_path), str(tmp_path / "none.png")])


def test_sampled_frames_are_those_of_uniform_sampling():
    assert tuple(np.linspace(0, 31, 8).round().astype(int)) == SAMPLED_FRAMES
    assert draw(SCENE, 0).shape[0] == CELL_PX * 3
    assert hashlib.sha256(draw(SCENE, 0).tobytes()).digest() == hashlib.sha256(draw(SCENE, 15).tobytes()).digest()


def test_the_embedded_base_is_whole_small_and_loads_like_a_released_one(tmp_path):
    copy_base(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").stat().st_size < 10e6
    backbone = Backbone.from_pretrained(str(tmp_path / "base"), lora=None)
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 4e6
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_an_embedded_base_of_other_bytes_is_refused(tmp_path, monkeypatch):
    copy_base(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr("gve.toy.base.EMBEDDED", tmp_path / "base")
    with pytest.raises(InputError, match=r"model\.safetensors is not the file"):
        copy_base(tmp_path / "copy")
