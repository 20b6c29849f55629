"""The mixture file against the paper's totals, the configurations and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from gve.data.curriculum import TASKS
from gve.data.mixture import DEVICES, PUBLISHED_TOTALS, MixtureRow, mixture, settings, summary, totals
from gve.data.readers import READERS
from gve.data.shards_cli import main
from gve.items import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_rows_as_published() -> None:
    """Sums by hand from the paper's tables; the totals that the paper prints differ for pictures and for all."""
    rows = mixture()
    assert len(rows) == 38
    found = totals(list(rows.values()))
    assert found == {
        "text": (380_000, 580_000),
        "image": (1_910_000, 2_970_000),
        "video": (8_804_000, 8_804_000),
        "uvrd": (1_549_000, 1_549_000),
        "all": (12_643_000, 13_903_000),
    }
    disagree = {
        kind
        for kind, pair in found.items()
        if max(abs(a - b) for a, b in zip(pair, PUBLISHED_TOTALS[kind], strict=True)) > 5000
    }
    assert disagree == {"image", "all"}
    # Single cells, one from each block of the table.
    assert (rows["msmarco"].size("3b"), rows["msmarco"].size("7b"), rows["msmarco"].negatives) == (300_000, 500_000, 2)
    assert (rows["laion_t2i"].batch, rows["laion_t2i"].negatives) == (32, 3)
    assert (rows["webvid"].size_3b, rows["webvid"].global_batch, rows["webvid"].negatives) == (5_400_000, 1024, 0)
    assert (rows["uvrd_tv2v"].task, rows["uvrd_tv2v"].level, rows["uvrd_tv2v"].global_batch) == ("TV2V", 3, 2048)
    assert sorted({row.batch for row in rows.values()}) == [32, 64]
    assert min(row.global_batch for row in rows.values()) == 1024, "the paper: global batch of at least 1,024"


def test_every_row_is_whole() -> None:
    rows = mixture()
    assert {row.task for row in rows.values()} == set(TASKS), "all thirteen tasks of the pyramid are trained"
    assert len({row.instruction for row in rows.values()}) == 38, "each source has an instruction of its own"
    for row in rows.values():
        assert row.reader in {"listing", *READERS}
        assert row.instruction.endswith(".")
        assert row.get
    good = rows["cirr"]
    for change in (
        {"level": 1},
        {"task": "T2X"},
        {"name": "a b"},
        {"batch": 0},
        {"negatives": -1},
        {"instruction": ""},
    ):
        with pytest.raises(InputError):
            dataclasses.replace(good, **change)


@pytest.mark.parametrize(("name", "uvrd"), [("mixture", True), ("mixture_uniform", True), ("mixture_collected", False)])
def test_configurations_equal_the_mixture(name: str, uvrd: bool) -> None:
    config = yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())
    for setting, values in settings(uvrd=uvrd).items():
        assert config[setting] == values
        assert list(config[setting]) == list(mixture()), "in the order of the table"
    left_out = {name for name, batch in config["batch_size"].items() if batch == 0}
    assert left_out == (set() if uvrd else {name for name in mixture() if name.startswith("uvrd_")})


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixture", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(summary()))
    fields = {field.name for field in dataclasses.fields(MixtureRow)}
    assert set(printed["sources"][0]) == fields | {"global_batch"}
    assert printed["devices"] == DEVICES == 32
    assert main(["mixture"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in mixture())
    assert (
        "all: 12,643,000 (3B) / 13,903,000 (7B); the paper prints 12,550,000 / 13,730,000: the rows disagree" in shown
    )
