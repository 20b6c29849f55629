"""Two ranks of the whole command give the scores of one (gloo, CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def validate(recipe: Path, out: Path, ranks: int) -> dict[str, Any]:
    """uvrb.json of `gve validate` of the bare base on so many gloo ranks."""
    command = [sys.executable, "-m", "gve", "validate", "--config", str(recipe), "--uvrb.ablations", "[static]"]
    command += ["--trainer.default_root_dir", str(out), "--trainer.devices", str(ranks)]
    command += ["--trainer.strategy", "ddp" if ranks > 1 else "auto"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "uvrb.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_score_as_one(recipe: Path, tmp_path: Path) -> None:
    """Every score of uvrb.json; a clip that is encoded beside others may round otherwise, and turn one query."""
    one, two = (validate(recipe, tmp_path / f"ranks{ranks}", ranks) for ranks in (1, 2))
    assert one["sets"].keys() == two["sets"].keys()
    assert len(one["sets"]) == 16
    for name, expected in one["sets"].items():
        found = two["sets"][name]
        assert found["n_query"] == expected["n_query"]
        assert found["complete"]
        for value, other in (
            (found["value"], expected["value"]),
            (found["ablations"]["static"], expected["ablations"]["static"]),
        ):
            assert value == pytest.approx(other, abs=1.01 / expected["n_query"])
