"""The processes of one evaluation: who they are, and what they exchange.

Everything exchanged lies in host memory, so processes that meet here use gloo whatever computes the vectors; inside
`gve fit` the group of the training run serves, nccl included.
"""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from gve.items import InputError

Shared = TypeVar("Shared")

# How long a rank waits for the others: a part of an evaluation may take long, and a dead rank ends its launcher.
_PATIENCE = datetime.timedelta(hours=6)


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_workers(asked: int | None) -> int:
    """Decoding processes of this rank: as asked, else one core is left to the model of each rank of the machine."""
    if asked is not None:
        return asked
    return max(0, min(8, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """[n, D] of every rank, n its own, to [sum of n, D] on all: rank 0's rows first."""
    size = world()[1]
    if size == 1:
        return rows
    counts: list[int] = [0] * size
    dist.all_gather_object(counts, len(rows))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    padded = torch.zeros(max(counts), rows.shape[1], device=device)
    padded[: len(rows)] = torch.from_numpy(rows)
    shares = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(shares, padded)
    return np.concatenate([share[:count].cpu().numpy() for share, count in zip(shares, counts, strict=True)])


def union(values: dict[str, str]) -> dict[str, str]:
    """The union of the ranks' dictionaries, the same on all of them."""
    size = world()[1]
    if size == 1:
        return values
    parts: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in sorted(part.items())}


def broadcast(value: Shared) -> Shared:
    """What rank 0 has, on every rank; the others' value is not looked at."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@dataclass(frozen=True)
class Placement:
    """Where this process stands, by its launcher.

    Args:
        rank: among all processes.
        size: number of processes.
        local_rank: among those of this machine; the number of its GPU.
        address, port: where rank 0 listens.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Placement:
        """The place that torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...) gave.

        SLURM_NTASKS is no sign of srun: a batch script has it too, and would wait for tasks that do not exist.

        Raises:
            InputError: variables are missing or no numbers.
        """
        try:
            if "WORLD_SIZE" in environment and "RANK" in environment:
                size = int(environment["WORLD_SIZE"])
                if size == 1:
                    return cls(local_rank=int(environment.get("LOCAL_RANK", "0")))
                address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
                return cls(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]), address, port)
            size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
            if size == 1:
                return cls()
            # Steps of one job, and jobs on one node, must not meet at one port.
            job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
            port = int(environment.get("MASTER_PORT", 15000 + (job * 17 + step) % 10000))
            address = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
            return cls(int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), address, port)
        except KeyError as error:
            raise InputError(f"the launcher set the number of ranks but not {error.args[0]}") from None
        except ValueError as error:
            raise InputError(f"a variable of the launcher is no number: {error}") from None


def _first_host(nodes: str) -> str:
    """The first machine of a SLURM node list such as "gpu[03-05,9]", expanded by SLURM itself."""
    if not set(nodes) & set("[,"):
        return nodes
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"scontrol cannot expand the node list {nodes!r} ({error}); set MASTER_ADDR") from None
    return done.stdout.split()[0]


@contextmanager
def joined(placement: Placement | None = None) -> Iterator[Placement]:
    """Inside, the processes of one launch are a group; nothing to do for a single one.

    Args:
        placement: None reads this process' environment.
    """
    place = placement if placement is not None else Placement.of(os.environ)
    if place.size == 1:
        yield place
        return
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{place.address}:{place.port}",
        rank=place.rank,
        world_size=place.size,
        timeout=_PATIENCE,
    )
    try:
        yield place
        dist.barrier()  # rank 0 may still be writing what the others' exit would seem to confirm
    finally:
        dist.destroy_process_group()
