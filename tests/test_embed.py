"""`gve embed`: any input to vectors with ids, in three formats, each content once, and the bad ones named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from gve.cli import main
from gve.encode.clip import ClipEncoder
from gve.encode.pretrained import load_encoder
from gve.items import Image, InputError, Item, Text, Video
from gve.search.listing import list_items
from gve.search.vectors import write_vectors
from gve.video import Sampling
from tiny_clip import write_dual_encoder, write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dual_encoder(tmp_path_factory.mktemp("model"), "clip")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    write_video(root / "a.mp4", 1)
    write_video(root / "b.mp4", 2)
    PIL.Image.fromarray(np.full((40, 50, 3), (200, 30, 30), np.uint8)).save(root / "red.png")
    (root / "readme.md").write_text("no medium")
    (root / "a.mp4.bak").write_bytes((root / "a.mp4").read_bytes()[:3000])
    return root


def embed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    with pytest.raises(SystemExit) as end:
        main(["embed", *map(str, words), "--num-workers", "0", "--json"])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), json.loads(out) if out else {}, err


def test_rows_are_items_and_bad_rows_are_named(media: Path, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "q1", "text": "a red circle", "image": "red.png", "instruction": "Find it."},
        {"video": "a.mp4", "start_s": 1, "end_s": 2.5},
        {"text": "alone"},
        {"id": "none"},
        {"text": 5},
        {"text": "x", "colour": "red"},
        {"video": "a.mp4", "start_s": 2, "end_s": 1},
        [1],
    ]
    listing = media / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    listed = list_items([listing], "Usual.")
    assert [item.id for item in listed.items] == ["q1", f"{listing}:2", f"{listing}:3"]
    first, second, third = listed.items
    assert [type(part) for part in first.parts] == [Image, Text]  # media before text
    assert [item.instruction for item in listed.items] == ["Find it.", "Usual.", "Usual."]
    assert (second.parts[0].source, second.parts[0].span_s) == (media / "a.mp4", (1.0, 2.5))  # type: ignore[union-attr]
    assert third.parts == (Text("alone"),)
    words = ("neither", "no string", "'colour' is unknown", "no span", "no object", "no JSON")
    assert list(listed.failures) == ["none", *(f"{listing}:{number}" for number in (5, 6, 7, 8, 9))]
    for reason, word in zip(listed.failures.values(), words, strict=True):
        assert word in reason
    listing.unlink()

    table = pa.table({"id": ["x", "y"], "text": ["one", None], "image": [None, "red.png"], "other": [1, 2]})
    pyarrow.parquet.write_table(table, media / "list.parquet")
    listed = list_items([media / "list.parquet"])
    assert [(item.id, item.modality) for item in listed.items] == [("x", "T"), ("y", "I")]
    (media / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="no parquet file"):
        list_items([media / "list.parquet"])
    (media / "list.parquet").unlink()
    for name in ("twice.txt", "twice.jsonl"):
        (tmp_path / name).write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    assert len(list_items([tmp_path / "twice.txt"]).items) == 2  # lines of a text have numbers
    with pytest.raises(InputError, match="'a' comes twice"):
        list_items([tmp_path / "twice.jsonl"])


def test_folders_give_what_is_a_medium_by_content(media: Path) -> None:
    listed = list_items([media])
    assert {item.id: item.modality for item in listed.items} == {
        str(media / "a.mp4"): "V",
        str(media / "b.mp4"): "V",
        str(media / "red.png"): "I",
    }
    # Half a film is a damaged film and no stranger, a text is skipped; given by itself a text is a failure.
    assert (listed.skipped, list(listed.failures)) in (
        ([str(media / "readme.md")], [str(media / "a.mp4.bak")]),
        ([str(media / "a.mp4.bak"), str(media / "readme.md")], []),
    )
    assert list(list_items([media / "readme.md"]).failures) == [str(media / "readme.md")]
    with pytest.raises(InputError, match="does not exist"):
        list_items([media / "nothing"])


@pytest.mark.parametrize("kind", ["npy", "parquet", "safetensors"])
def test_formats_are_read_back_by_their_own_libraries(tmp_path: Path, kind: str) -> None:
    ids = ["a", "line\nbreak", "é, \\xff"]
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    path = tmp_path / f"v.{kind}"
    write_vectors(path, ids, vectors, {"model": "m"})
    facts = json.loads((tmp_path / f"v.{kind}.json").read_text())
    if kind == "npy":
        names, read = facts["ids"], np.load(path)
    elif kind == "parquet":
        table = pyarrow.parquet.read_table(path)
        names, read = table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32)
    else:
        tensors = load_file(path)
        names, read = json.loads(tensors["ids"].tobytes()), tensors["embeddings"]
    assert names == ids
    assert (read == vectors).all()
    assert (facts["model"], facts["items"], facts["dim"]) == ("m", 3, 5)
    assert sorted(os.listdir(tmp_path)) == [path.name, f"{path.name}.json"]


def test_the_command(
    media: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are those of the encoder itself; a second run encodes nothing; a bad item costs its row and exit 1."""
    shutil.copy(media / "a.mp4", media / "copy.mp4")
    listing = tmp_path / "q.jsonl"
    composed = {"id": "tv", "text": "a red circle", "video": str(media / "a.mp4"), "start_s": 1.0, "end_s": 2.0}
    listing.write_text("\n".join(json.dumps(row) for row in (composed, {"id": "t", "text": "a blue square"})))
    out = tmp_path / "v.npy"
    words = (media / "a.mp4", media / "copy.mp4", media / "red.png", listing, "--model", model, "--out", out)
    code, told, _ = embed(capsys, *words)
    assert (code, told["items"], told["encoded"], told["failures"]) == (0, 5, 4, {})  # a copy is encoded once
    facts = json.loads((tmp_path / "v.npy.json").read_text())
    assert facts["ids"] == [str(media / name) for name in ("a.mp4", "copy.mp4", "red.png")] + ["tv", "t"]
    vectors = np.load(out)
    encoder = load_encoder(model, inputs={"sampling": Sampling.uniform(8)})
    assert isinstance(encoder, ClipEncoder)
    assert facts["fingerprint"] == encoder.fingerprint
    whole = Item.of(video=media / "a.mp4")
    span = Item((Video(media / "a.mp4", span_s=(1.0, 2.0)), Text("a red circle")))
    want = encoder.encode([whole, whole, Item.of(image=media / "red.png"), span, Item.of("a blue square")]).vectors
    assert np.abs(vectors - want).max() < 1e-5
    assert np.abs(vectors[0] - vectors[3]).max() > 1e-2  # the difference that is measured can be seen

    called: list[int] = []
    plain = ClipEncoder.encode
    monkeypatch.setattr(
        ClipEncoder, "encode", lambda self, items, **o: called.append(len(items)) or plain(self, items, **o)
    )
    code, told, _ = embed(capsys, *words)
    assert (code, told["encoded"], called) == (0, 0, [])
    assert (np.load(out) == vectors).all()

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"id": "lost", "video": "lost.mp4"}) + '\n{"id": "t2", "text": "a blue square"}\n')
    code, told, err = embed(capsys, bad, "--model", model, "--out", tmp_path / "w.parquet")
    assert (code, told["items"], list(told["failures"])) == (1, 1, ["lost"])
    assert "missing" in told["failures"]["lost"]
    assert "gve embed: lost: " in err
    assert embed(capsys, bad, "--model", model, "--out", tmp_path / "w.parquet", "--allow-incomplete")[0] == 0
    assert embed(capsys, bad, "--model", model, "--out", tmp_path / "w.txt")[0] == 2
    (tmp_path / "empty").mkdir()
    assert embed(capsys, tmp_path / "empty", "--model", model, "--out", out)[0] == 2
