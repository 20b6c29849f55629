"""Classification as retrieval: lists of the five sets, label texts, accuracy."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gve.encode.encoder import item_key
from gve.eval.builders import prepare
from gve.eval.classification import BREAKFAST, CLASSIFICATION, PUBLISHED_ACCURACY, label_words, macro_accuracy
from gve.eval.evaluation import evaluate
from gve.eval.uvrb import ABILITY_PARTS, RetrievalSet, UVRBReader, ability_scores, find_record
from gve.items import InputError
from test_builders import built, jsonl, touch, write
from test_uvrb import Fake


def labels_of(tested: RetrievalSet) -> dict[str, str]:
    """Clip -> text of its label."""
    return {q.id: tested.corpus[rows[0]].text for q, rows in zip(tested.queries, tested.positives, strict=True)}


def test_records() -> None:
    assert [record.name for record in CLASSIFICATION] == ["K700", "UCF101", "HMDB51", "SSV2", "Breakfast"]
    for name in ("kinetics-700", "SmthSmthV2", "ssv2", "ucf_101", "breakfast"):
        assert find_record(name) in CLASSIFICATION
    assert {record.metric for record in CLASSIFICATION} == {"accuracy"}
    assert not {record.name for record in CLASSIFICATION} & set(ABILITY_PARTS["AVG-D"])


def test_published_accuracies_have_the_printed_means() -> None:
    """The paper prints a mean beside the five; each is that of its row within rounding."""
    printed = {
        "GVE-3B": 0.476, "GVE-7B": 0.526, "Unite-7B": 0.519, "InternVideo2-6B": 0.526, "VLM2Vec-V2": 0.393,
        "GME-7B": 0.374, "UniME-7B": 0.306, "CLIP4Clip": 0.378,
    }  # fmt: skip
    assert {model: pytest.approx(np.mean([*row.values()]), abs=0.001) for model, row in PUBLISHED_ACCURACY.items()} == (
        printed
    )


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("UCF101", "HandstandPushups", "handstand pushups"),
        ("UCF101", "CleanAndJerk", "clean and jerk"),
        ("UCF101", "YoYo", "yo yo"),
        ("HMDB51", "brush_hair_test", "brush hair"),
        ("SSV2", "Putting [something similar to other things] on [something]", "Putting something similar to other "
         "things on something"),
        ("K700", "tying knot (not on a tie)", "tying knot (not on a tie)"),
        ("K700", "massaging person's_head", "massaging person's head"),
        ("Breakfast", "salat", "salad"),
        ("Breakfast", "fried_egg", "fried egg"),
        ("Breakfast", "scrambledegg", "scrambled egg"),
    ],
)  # fmt: skip
def test_label_words(name: str, label: str, words: str) -> None:
    assert label_words(find_record(name), label) == words


def test_an_unknown_activity_is_refused() -> None:
    with pytest.raises(InputError, match="no activity 'soup'"):
        label_words(find_record("Breakfast"), "soup")


def test_real_hmdb51(real: Path, tmp_path: Path) -> None:
    folder = real / "annotations" / "hmdb51"
    for split in (1, 2, 3):
        tested = built("HMDB51", tmp_path / str(split), folder, split=split)
        assert (len(tested.queries), len(tested.corpus)) == (1530, 51)
        # 30 clips of each class in the test part of every split, by the set's definition.
        assert np.bincount([rows[0] for rows in tested.positives]).tolist() == [30] * 51
    names = (folder / "label_map.txt").read_text().split()
    assert sorted(item.text for item in tested.corpus) == sorted(name.replace("_", " ") for name in names)
    # The 51 text files of the release say the same as the csv.
    with open(folder / "hmdb51.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in names:
        own = [row for row in rows if row["label"] == f"{name}_test"]
        lines = [f"{row['video_id']} {row['split3']} \n" for row in own]
        write(tmp_path / "txt" / f"{name}_test_split3.txt", "".join(lines))
    other = built("HMDB51", tmp_path / "txt_root", tmp_path / "txt", split=3)
    assert labels_of(other) == labels_of(tested)
    assert labels_of(built("HMDB51", tmp_path / "one", folder)) != labels_of(tested)  # negative control: another split


def test_real_ucf101(real: Path, tmp_path: Path) -> None:
    source = shutil.copytree(real / "annotations" / "ucf101", tmp_path / "src")
    (source / "testlist01.excerpt.txt").rename(source / "testlist01.txt")
    with open(source / "testlist01.txt", "ab") as file:  # as the list has it further down, with CRLF
        file.write(b"HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n")
    media = touch(tmp_path / "media", "flat/v_HandStandPushups_g01_c01.avi")
    tested = built("UCF101", tmp_path / "root", source, media)
    assert (len(tested.queries), len(tested.corpus)) == (51, 101)
    assert len({item.text for item in tested.corpus}) == 101
    assert tested.queries[-1].id == "HandstandPushups/v_HandStandPushups_g01_c01"
    assert labels_of(tested)[tested.queries[-1].id] == "handstand pushups"
    assert labels_of(tested)["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01"] == "apply eye makeup"
    assert len(tested.missing) == 50  # the flat file was found by its own name
    with pytest.raises(InputError, match=r"testlist02\.txt"):
        built("UCF101", tmp_path / "root", source, media, split=2)


def test_real_kinetics_labels(real: Path, tmp_path: Path) -> None:
    """The csv format of the 600 excerpt with the 700 label list: all its labels are among the 700."""
    source = tmp_path / "src"
    folder = real / "annotations" / "kinetics"
    write(source / "kinetics-700_val.csv", (folder / "kinetics-600_val.excerpt.csv").read_bytes())
    write(source / "label_map_k700.txt", (folder / "label_map_k700.txt").read_bytes())
    media = touch(tmp_path / "media", "yq_M1PMw2hY_000038_000048.mp4")
    tested = built("K700", tmp_path / "root", source, media)
    assert (len(tested.queries), len(tested.corpus)) == (50, 700)
    assert labels_of(tested)["yq_M1PMw2hY_000038_000048"] == "abseiling"
    assert len(tested.missing) == 49
    kept = built("K700", tmp_path / "root", source, media, skip_missing=True)
    assert [query.id for query in kept.queries] == ["yq_M1PMw2hY_000038_000048"]
    assert "49 of 50 clips are not on this disk and were left out" in kept.notes
    with pytest.raises(InputError, match="none of its 50 clips"):
        built("K700", tmp_path / "root", source, touch(tmp_path / "none", "x.mp4"), skip_missing=True)


def test_real_ssv2_labels(real: Path, tmp_path: Path) -> None:
    templates = (real / "annotations" / "ssv2" / "label_map.txt").read_text().splitlines()
    assert len(templates) == 174
    bracketed = templates[1].replace("something", "[something]")
    rows = [
        {"id": "78687", "label": "x", "template": bracketed, "placeholders": ["a tube"]},
        {"id": "42326", "label": "y", "template": templates[0], "placeholders": []},
    ]
    source = tmp_path / "src"
    write(source / "something-something-v2-validation.json", json.dumps(rows))
    write(source / "something-something-v2-labels.json", json.dumps({t: str(n) for n, t in enumerate(templates)}))
    tested = built("SSV2", tmp_path / "root", source)
    assert labels_of(tested) == {"78687": templates[1], "42326": templates[0]}
    assert len(tested.corpus) == 174
    assert tested.queries[0].media[0].name.endswith("78687.webm")
    write(source / "something-something-v2-validation.json", json.dumps([rows[0] | {"template": "Eating [something]"}]))
    with pytest.raises(InputError, match="not among the 174 labels"):
        prepare("SSV2", tmp_path / "root", source)


def test_breakfast_is_camera_one(tmp_path: Path) -> None:
    nested = touch(tmp_path / "a", "P03/cam01/P03_cereals.avi", "P03/cam02/P03_cereals.avi", "P04/cam01/P04_salat.avi",
                   "P04/stereo/P04_salat_ch0.avi")  # fmt: skip
    tested = built("Breakfast", tmp_path / "ra", nested, nested)
    assert labels_of(tested) == {"P03/cam01/P03_cereals": "cereal", "P04/cam01/P04_salat": "salad"}
    assert sorted(item.text for item in tested.corpus) == sorted(BREAKFAST.values())
    flat = touch(tmp_path / "b", "P03_cam01_P03_cereals.avi", "P03_webcam01_P03_tea.avi")
    assert labels_of(built("Breakfast", tmp_path / "rb", flat, flat)) == {"P03_cam01_P03_cereals": "cereal"}


def test_rows_of_mmeb(tmp_path: Path) -> None:
    rows = [
        {"video_id": "12", "pos_text": "Closing_something", "neg_text": ["Opening_something", "Closing_something"]},
        {"video_id": "13", "pos_text": "Opening_something", "neg_text": []},
    ]
    source = jsonl(tmp_path / "src" / "mmeb.jsonl", rows).parent
    tested = built("SSV2", tmp_path / "root", source, label_text="a video of {name}")
    assert labels_of(tested) == {"12": "a video of Closing something", "13": "a video of Opening something"}
    assert "2 labels where the set has 174" in tested.notes
    with pytest.raises(InputError, match=r"must hold \{name\}"):
        built("SSV2", tmp_path / "root", source, label_text="a video")


class Scripted(Fake):
    """Puts every clip beside the label that a table names."""

    def __init__(self, tested: RetrievalSet, said: dict[str, str]) -> None:
        axes = {item.text: vector for item, vector in zip(tested.corpus, np.eye(len(tested.corpus)), strict=True)}
        vectors = {item_key(item): axes[item.text].astype(np.float32) for item in tested.corpus}
        for query in tested.queries:
            vectors[item_key(query)] = axes[said[query.id]].astype(np.float32)
        super().__init__(vectors)
        self.dim = len(axes)


def test_accuracy_is_recall_at_one(tmp_path: Path) -> None:
    """Six clips of three labels, four named rightly: accuracy 4/6; by label 3/3, 1/2 and 0/1: macro 0.5."""
    right = {"a": "tea", "b": "tea", "c": "tea", "d": "milk", "e": "milk", "f": "juice"}
    rows = [{"video_id": clip, "pos_text": label} for clip, label in right.items()]
    media = touch(tmp_path / "media", *(f"{clip}.mp4" for clip in right))
    source = jsonl(tmp_path / "src" / "mmeb.jsonl", rows)
    tested = built("Breakfast", tmp_path / "root", source.parent, media)
    score = evaluate(Scripted(tested, right | {"e": "tea", "f": "tea"}), [tested])["Breakfast"]
    assert score.value == pytest.approx(4 / 6)
    assert macro_accuracy(score.hits, tested.positives) == pytest.approx(0.5)
    assert score.chance == pytest.approx(1 / 3)
    assert all(value is None for value in ability_scores({"Breakfast": score.value}).values())
    assert UVRBReader(tmp_path / "root").names(CLASSIFICATION) == ["Breakfast"]
    with pytest.raises(InputError, match="holds no UVRB set"):
        UVRBReader(tmp_path / "root").names()
