"""Work beside training that leaves no trace in its random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random generators of python, numpy and torch are afterwards as they were, whatever ran inside."""
    python, numpy = random.getstate(), np.random.get_state()
    # This process's device only: fork_rng warns where it would have to save those of all GPUs of a node.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
