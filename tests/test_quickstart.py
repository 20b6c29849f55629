"""The first command of the README, as a user runs it (ten minutes on two cores)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quickstart(out: Path) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "experiments/quickstart.sh"), str(out)],
        capture_output=True,
        text=True,
        timeout=1500,
        env={name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart(tmp_path: Path) -> None:
    """CG, S, PR, VIS and TXT rise above the untrained base and above chance by more than the interval."""
    out = tmp_path / "run"
    shown = quickstart(out)
    data = json.loads((out / "uvrb.json").read_text())
    assert len(data["sets"]) == len(data["untrained"]["sets"]) == 16
    for name in ("CG", "S", "PR", "VIS", "TXT"):
        low, _ = data["ability_intervals"][name]
        _, high = data["untrained"]["ability_intervals"][name]
        assert low > high, f"{name}: {low} against untrained {high}"
        assert low > data["ability_chance"][name]
        assert data["gains"]["abilities"][name]["interval"][0] > 0
        assert f"{name} " in shown
    for row in data["sets"].values():
        assert {"chance", "ceilings", "ablations", "interval", "n_query", "n_corpus"} <= set(row)
        assert {"static", "shuffled"} <= set(row["ablations"])
    assert {"report.md", "radar.png", "tensorboard", "checkpoints"} <= {path.name for path in out.iterdir()}
    # A second call reuses what is there.
    before = (out / "uvrb.json").stat().st_mtime_ns
    assert "reusing" in quickstart(out)
    assert (out / "uvrb.json").stat().st_mtime_ns == before
