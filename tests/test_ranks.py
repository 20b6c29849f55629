"""Two ranks of the whole command give the scores of one (gloo, CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gve.toy.world import Request, make_world

ROOT = Path(__file__).resolve().parent.parent


def validate(world: Path, out: Path, devices: int) -> dict[str, dict[str, object]]:
    """uvrb.json of `gve validate` with random adapters on so many gloo ranks."""
    command = [sys.executable, "-m", "gve", "validate", "--config", str(ROOT / "configs/quickstart.yaml")]
    command += ["--trainer.default_root_dir", str(out), "--model.base", str(world / "base")]
    command += ["--data.root", str(world / "shards"), "--uvrb.root", str(world / "uvrb")]
    command += ["--data.batch_size", "8", "--data.dev_pairs", "4", "--data.num_workers", "0"]
    command += ["--uvrb.num_workers", "0", "--uvrb.ablations", "[static]", "--uvrb.resamples", "200"]
    command += ["--trainer.devices", str(devices), "--trainer.strategy", "ddp" if devices > 1 else "auto"]
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
def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    """Every value of uvrb.json is equal; a clip that is encoded beside others may round otherwise."""
    make_world(tmp_path / "world", Request(scale=0.02, test_scale=0.1), jobs=1, progress=False)
    one, two = (validate(tmp_path / "world", tmp_path / f"ranks{n}", n) for n in (1, 2))
    assert one["sets"].keys() == two["sets"].keys()
    assert len(one["sets"]) == 16
    for name, expected in one["sets"].items():
        found = two["sets"][name]
        assert found["n_query"] == expected["n_query"]
        assert found["complete"]
        # One query of the set may fall the other way where two cosines differ in the last bit.
        assert found["value"] == pytest.approx(expected["value"], abs=1.01 / expected["n_query"])
