"""Planted faults: each is what its name says, by measures of its own; nothing else is spoiled, and truth tells all."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from gve.items import Frames, InputError, Video
from gve.toy.claims import parse
from gve.toy.faults import CAPTION_FAULTS, FAULTS, PileRequest, make_pile, read_faults
from gve.toy.flips import Told
from gve.toy.toy_cli import main
from gve.toy.truth import Truth
from gve.video import MediaError, Sampling, decode

ROWS, EACH = 200, 6


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = PileRequest(seed=3, rows=ROWS, share=0.48, siblings=0.3)
    assert request.each == EACH  # 200 x 0.48 / 16
    return make_pile(tmp_path_factory.mktemp("piles") / "pile", request, progress=False)


@pytest.fixture(scope="module")
def listed(pile: Path) -> dict[str, dict[str, str]]:
    """Id -> row of the list and of the truth together."""
    weak = [json.loads(line) for line in (pile / "weak.jsonl").read_text().splitlines()]
    truth = read_faults(pile)
    assert [row["id"] for row in weak] == [row["id"] for row in truth]
    return {row["id"]: row | told for row, told in zip(weak, truth, strict=True)}


def clip(pile: Path, row: dict[str, str], frames: int = 32) -> Frames:
    return decode(pile / row["video"], Sampling.uniform(frames))


def of_fault(listed: dict[str, dict[str, str]], fault: str) -> list[dict[str, str]]:
    return [row for row in listed.values() if row["fault"] == fault]


def test_every_fault_is_planted_as_often(listed: dict[str, dict[str, str]]) -> None:
    counts = Counter(row["fault"] for row in listed.values())
    assert counts == {"": ROWS - EACH * len(FAULTS), **dict.fromkeys(FAULTS, EACH)}
    weak_keys = {"id", "video", "caption"}
    assert all(set(row) == weak_keys | {"fault", "variant", "of"} for row in listed.values())


def test_good_rows_move_and_are_told_truly(pile: Path, listed: dict[str, dict[str, str]]) -> None:
    truth = Truth.read(pile / "scenes.jsonl")
    for row in of_fault(listed, ""):
        shown = truth.of(Video(pile / row["video"]))
        told = Told.read(row["caption"], shown)
        assert told.made
        assert not told.false
        assert not parse(row["caption"]).unparsed
        pixels = clip(pile, row).pixels.astype(np.int16)
        assert np.abs(np.diff(pixels, axis=0)).max() > 60  # something moves by far more than compression does
    siblings = [row for row in of_fault(listed, "") if row["variant"]]
    assert 10 <= len(siblings) <= 50
    assert all(listed[row["of"]]["of"] == row["id"] for row in siblings)


def test_captions_are_spoiled_and_their_clips_are_not(pile: Path, listed: dict[str, dict[str, str]]) -> None:
    truth = Truth.read(pile / "scenes.jsonl")
    for fault in CAPTION_FAULTS:
        for row in of_fault(listed, fault):
            shown = truth.of(Video(pile / row["video"]))  # known by its hash: the file is a good one
            if fault == "wrong-caption":
                assert Told.read(row["caption"], shown).false
                assert row["caption"] == listed[row["of"]]["caption"]
            else:
                assert parse(row["caption"]).unparsed or len(row["caption"].split()) <= 2
    assert len({row["caption"] for row in of_fault(listed, "repeated")}) == 1


def test_clips_are_spoiled_as_said(pile: Path, listed: dict[str, dict[str, str]]) -> None:
    """Mean difference of neighbouring frames, and brightness, in levels of 255; bounds set by hand."""
    for fault in ("static", "black", "slide-show", "frozen"):
        for row in of_fault(listed, fault):
            pixels = clip(pile, row).pixels.astype(np.float32)
            steps = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
            quiet = 2.5 if row["variant"] == "noisy" else 0.5
            if fault == "black":
                assert pixels.mean() < 4
            if fault in ("static", "black"):
                assert steps.max() < quiet
            elif fault == "slide-show":
                assert 2 <= (steps > 3).sum() <= 3
                assert np.median(steps) < 0.5
            else:
                assert steps[: len(steps) // 4].max() > 1
                assert steps[len(steps) // 3 + 1 :].max() < 0.5


def test_copies_show_what_their_originals_show(pile: Path, listed: dict[str, dict[str, str]]) -> None:
    for row in of_fault(listed, "exact-duplicate"):
        assert (pile / row["video"]).read_bytes() == (pile / listed[row["of"]]["video"]).read_bytes()
        assert row["caption"] == listed[row["of"]]["caption"]
        assert row["id"] > row["of"]
    sides = set()
    for row in of_fault(listed, "near-duplicate"):
        own, other = clip(pile, row, 8).pixels, clip(pile, listed[row["of"]], 8).pixels
        original = (pile / listed[row["of"]]["video"]).read_bytes()
        assert row["id"] > row["of"]
        assert (pile / row["video"]).read_bytes() != original
        sides.add(own.shape[1])
        if own.shape == other.shape:
            assert 0 < np.abs(own.astype(np.int16) - other).mean() < 6
    assert len(sides) > 1  # some are of another size


def test_damaged_files_give_too_little_and_repairable_ones_nearly_all(
    pile: Path, listed: dict[str, dict[str, str]]
) -> None:
    for row in of_fault(listed, "damaged"):
        with pytest.raises(MediaError):
            decode(pile / row["video"], Sampling.uniform(8), verify=True)
        assert row["variant"] == "half" or not frames_left(pile / row["video"])
        assert frames_left(pile / row["video"]) < 24
    for row in of_fault(listed, "repairable"):
        with pytest.raises(MediaError, match=r"truncated|garbled"):
            decode(pile / row["video"], Sampling.uniform(8), verify=True)
        assert 26 <= frames_left(pile / row["video"]) <= 32


def frames_left(path: Path) -> int:
    """Frames that decode before the first error, of 32."""
    count = 0
    with contextlib.suppress(av.FFmpegError, IndexError), av.open(str(path)) as container:
        for _ in container.decode(container.streams.video[0]):
            count += 1
    return count


def test_an_equal_request_gives_equal_files_and_is_reused(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--seed", "5", "--rows", "24", "--share", "0.5", "--faults", "url", "static", "--quiet"]
    for name in ("one", "two"):
        assert main(["faults", str(tmp_path / name), *words]) == 0
    assert "24 rows, 6 of each of 2 faults" in capsys.readouterr().out
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).rglob("*.*"))}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 24 + 4
    before = (pile / "weak.jsonl").stat().st_mtime_ns
    make_pile(pile, PileRequest(seed=3, rows=ROWS, share=0.48, siblings=0.3), progress=False)
    assert (pile / "weak.jsonl").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another request"):
        make_pile(pile, PileRequest(seed=4, rows=ROWS, share=0.48, siblings=0.3), progress=False)
    with pytest.raises(InputError, match="no fault 'urls'"):
        PileRequest(faults=("urls",))
    with pytest.raises(InputError, match="less than one row"):
        PileRequest(rows=20, share=0.2)
    with pytest.raises(InputError, match="no pile"):
        read_faults(tmp_path)
