"""What every test shares: no network, few threads, the real files where they are present."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any import of torch or transformers: a test never reaches a hub, and 2 cores are shared by ranks and workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real videos, images and annotations; GVE_REAL names it, the default lies beside the checkout."""
    folder = Path(os.environ.get("GVE_REAL", ROOT.parent / "shared" / "real"))
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no real files at {folder} (set GVE_REAL to their folder)")
    return folder


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world of some 400 pairs and 16 small sets, made once for all processes of the test run (10 s)."""
    from gve.toy.world import Request, make_world

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each process has a folder of its own below the one of the run
    with open(shared / "toy_world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_world(shared / "toy_world", Request(scale=0.02, test_scale=0.05, base="random"), progress=False)


@pytest.fixture(scope="session")
def recipe(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains on `toy_world`: two epochs of six steps, in two seconds."""
    scores = [0.5, 0.4, 0.45, 0.3, 0.35, 0.6, 0.5, 0.3, 0.35, 0.4, 0.45, 0.2, 0.25]
    tasks = ["T2T", "T2I", "I2T", "T2V", "I2V", "V2V", "I2I", "TI2I", "TI2T", "TI2TI", "T2TI", "TI2V", "TV2V"]
    inputs = {"sampling": {"kind": "uniform", "num_frames": 2}, "max_frame_tokens": 4, "max_length": 200}
    settings = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {
            "base": str(toy_world / "base"),
            "inputs": {**inputs, "max_image_tokens": 4},
            "lora": {"rank": 4, "dropout": 0.1},
            "optimizer": {"lr": 3e-3},
        },
        "data": {
            "root": str(toy_world / "shards"),
            "steps_per_epoch": 6,
            "batch_size": 4,
            "negatives": 1,
            "num_workers": 0,
            "dev_pairs": 4,
            "curriculum": {"scores": dict(zip(tasks, scores, strict=True))},
        },
        "uvrb": {"root": str(toy_world / "uvrb"), "inputs": inputs, "every_n_epochs": 0, "resamples": 100},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny Qwen2.5-VL of tests/tiny.py; it has no tokenizer."""
    from tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, a Debian package; pages themselves need no browser to be made."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser (tests/requirements.txt)"
    )
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()
