"""Cores, memory, disk, programs and the hub."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from gve.doctor.check import WIDTH, Check, State, size
from gve.items import one_line

CGROUP = Path("/sys/fs/cgroup")
_MEMORY_BYTES = 4 << 30  # the quickstart's tests stay below it
_DISK_BYTES = 2 << 30
_SHM_BYTES = 1 << 30
_FILES = 1024
_UNLIMITED = 1 << 60  # version 1 of cgroups writes a huge number for "no limit"
_MODELS = ("Alibaba-NLP/GVE-3B", "Alibaba-NLP/GVE-7B", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")


def memory_limit(root: Path = CGROUP) -> int | None:
    """The limit of this process' control group in bytes; None where there is none.

    Args:
        root: where control groups are mounted.
    """
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None
    return None


def core_limit(root: Path = CGROUP) -> float | None:
    """The cores that the control group grants; None where it grants all."""
    try:
        granted, period = (root / "cpu.max").read_text().split()
        return None if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return quota / int((root / "cpu/cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None


def check_cores() -> Iterator[Check]:
    """Cores and memory, with the limits of a container or a job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = core_limit()
    few = granted is not None and granted < cores
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    yield Check(
        "machine",
        "cores",
        "weak" if few else "ok",
        f"{cores}{f', the container grants {granted:g}' if granted is not None else ''}{load}",
        f"set OMP_NUM_THREADS={max(1, int(granted or 1))}: more threads would wait for each other" if few else "",
    )
    limit, free = memory_limit(), _available_bytes()
    usable = min(number for number in (limit, free, _UNLIMITED) if number is not None)
    told = f"{size(free)} free" if free is not None else "unknown"
    told += f", limit of the container {size(limit)}" if limit is not None else ""
    low = usable < _MEMORY_BYTES
    hint = f"the toy world wants {size(_MEMORY_BYTES)}, 3B parameters on a CPU some 16 GiB" if low else ""
    yield Check("machine", "memory", "weak" if low else "ok", told, hint)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files < _FILES
    yield Check(
        "machine", "open files", "weak" if few else "ok", f"at most {files}", f"ulimit -n {4 * _FILES}" if few else ""
    )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def check_disk() -> Iterator[Check]:
    """Room where files go, and the shared memory that loader workers hand batches over by."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (
        ("this folder", Path.cwd()),
        ("temporary files", Path(tempfile.gettempdir())),
        ("models of the hub", Path(HF_HUB_CACHE)),
    ):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        state: State = "weak" if free < _DISK_BYTES or not writable else "ok"
        hint = f"less than {size(_DISK_BYTES)}: shards, checkpoints and vectors need more" if free < _DISK_BYTES else ""
        yield Check(
            "machine",
            name,
            state,
            f"{size(free)} free in {folder}{'' if writable else ', not writable'}",
            hint if writable else f"no permission to write to {there}",
        )
    shared = Path("/dev/shm")
    if sys.platform.startswith("linux"):
        free = shutil.disk_usage(shared).free if shared.is_dir() else 0
        low = free < _SHM_BYTES
        hint = "docker run --shm-size 8g (or --ipc host); without it use --data.num_workers 0" if low else ""
        yield Check("machine", "/dev/shm", "weak" if low else "ok", f"{size(free)} free", hint)


def check_programs() -> Iterator[Check]:
    """Programs that some tests or commands use; nothing needs them."""
    for program, names, use in (
        ("chromium", ("chromium", "chromium-browser", "google-chrome"), "opens pages in tests"),
        ("ffmpeg", ("ffmpeg",), "not used: decoders come in the wheels of av and decord"),
        ("SLURM", ("sbatch",), "gve slurm"),
    ):
        path = next((found for name in names if (found := shutil.which(name))), None)
        yield Check("optional", program, "ok" if path else "absent", f"{path or 'not found'} ({use})")
    from matplotlib.font_manager import findfont

    try:
        font = findfont("DejaVu Sans", fallback_to_default=False)
        yield Check("machine", "fonts", "ok", f"{Path(font).name} for figures")
    except ValueError:
        yield Check("machine", "fonts", "weak", "no DejaVu Sans: figures take another font", "reinstall matplotlib")


def check_hub(offline: bool, timeout_s: float = 5.0) -> Iterator[Check]:
    """Whether hub names can be resolved, and which of the models are there already. No secret is printed.

    Args:
        offline: do not ask.
        timeout_s: for the one request.
    """
    from huggingface_hub import get_token, try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    kept = [name for name in _MODELS if isinstance(try_to_load_from_cache(name, "config.json"), str)]
    yield Check("hub", "cached models", "ok" if kept else "absent", ", ".join(kept) or f"none of {', '.join(_MODELS)}")
    host = urlsplit(ENDPOINT).hostname or "no host"
    hint = "only hub names need it: local folders, checkpoints and the toy world work without"
    if offline or HF_HUB_OFFLINE:
        yield Check("hub", host, "absent", "not asked: --offline" if offline else "not asked: HF_HUB_OFFLINE", hint)
        return
    import httpx

    token = "with a token" if get_token() else "without a token"
    try:
        answer = httpx.head(f"{ENDPOINT}/api/models/{_MODELS[0]}", timeout=timeout_s, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # The library's message may quote an address with a password in it.
        yield Check("hub", host, "weak", f"cannot be reached ({type(error).__name__})", hint)
        return
    good = answer.is_success
    told = one_line(f"answers {answer.status_code}, {token}", WIDTH)
    yield Check("hub", host, "ok" if good else "weak", told, "" if good else hint)
