"""What every test shares: no network, few threads, the real files where they are present."""

from __future__ import annotations

import os
from pathlib import Path

# Before any import of torch or transformers: a test never reaches a hub, and 2 cores are shared by ranks and workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real videos, images and annotations; GVE_REAL names it, the default lies beside the checkout."""
    folder = Path(os.environ.get("GVE_REAL", ROOT.parent / "shared" / "real"))
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no real files at {folder} (set GVE_REAL to their folder)")
    return folder
