"""Hands a job to SLURM, with the code and the configuration as they are at that moment.

What is changed while the job waits or runs, or before it is requeued, does not reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import gve
from gve.items import InputError
from gve.slurm.job import Job


class SubmitError(Exception):
    """sbatch has refused a job."""


def submit(job: Job, script: str, frozen: str = "", after: Sequence[str] = ()) -> tuple[str, Path]:
    """Writes the submission's folder and submits the script.

    Args:
        job: the record.
        script: its batch script (`gve.slurm.render.render`).
        frozen: resolved configuration of a fit or validate, YAML.
        after: jobs that must have succeeded first.

    Returns:
        (SLURM's number of the job, the submission's folder).

    Raises:
        InputError: sbatch is not here, or `after` names no job.
        SubmitError: sbatch says no.
    """
    for name in after:
        if not re.fullmatch(r"\d+(_\d+)?", name):
            raise InputError(f"--after {name}: give the number of a job, as sbatch prints it")
    if shutil.which("sbatch") is None:
        raise InputError("sbatch is not on this machine: --dry-run prints the script")
    folder = freeze(job, script, frozen)
    dependency = ",".join([f"afterok:{name}" for name in after] + ["singleton"])
    words = ["sbatch", "--parsable", f"--dependency={dependency}", str(folder / "job.sbatch"), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubmitError(" ".join((done.stderr or done.stdout).split()))
    return done.stdout.strip().partition(";")[0], folder


def freeze(job: Job, script: str, frozen: str) -> Path:
    """Writes the submission's folder below the run's; equal submissions share one.

    It holds job.sbatch, job.json (the record), work (what a done marker must say), config.yaml (`frozen`) and code/:
    the package, and snapshot.json with its commit and what it has beyond that.
    """
    package = Path(gve.__file__).resolve().parent
    names = _sources(package)
    code = hashlib.sha256()
    for name in names:
        code.update(f"{name}\0".encode() + hashlib.sha256((package / name).read_bytes()).digest())
    work = job.digest(frozen)
    key = hashlib.sha256(f"{work}\0{script}\0{code.hexdigest()}".encode()).hexdigest()[:12]
    state = Path(job.state)
    folder = state.absolute() / "submitted" / key
    if folder.is_dir():
        return folder
    draft = folder.with_name(f"{key}.{os.getpid()}.tmp")
    for name in names:
        target = draft / "code" / package.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / name, target)
    facts = {**_commit(package), "sha256": code.hexdigest(), "files": len(names)}
    texts = {
        "code/snapshot.json": json.dumps(facts, indent=1) + "\n",
        "job.json": json.dumps(asdict(job), indent=1) + "\n",
        "job.sbatch": script,
        "work": work + "\n",
    }
    if frozen:
        texts["config.yaml"] = frozen
    for name, text in texts.items():
        (draft / name).write_text(text)
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(draft)  # an equal submission was faster
    return folder


def finished(job: Job, frozen: str) -> bool:
    """Whether all of the job's work is done, by its markers."""
    work = job.digest(frozen)
    names = [f"done-{task}" for task in range(job.array)] if job.array else ["done"]
    markers = [Path(job.state) / name for name in names]
    return all(marker.is_file() and marker.read_text().strip() == work for marker in markers)


def _sources(package: Path) -> list[str]:
    """Files of the package, relative to it: those that git knows or would take, all but caches elsewhere."""
    done = _git(package, "ls-files", "--cached", "--others", "--exclude-standard", "-z", ".")
    if done is not None and done:
        names = [name for name in done.split("\0") if name]
    else:
        names = [str(path.relative_to(package)) for path in package.rglob("*")]
    return sorted({name for name in names if "__pycache__" not in name and (package / name).is_file()})


def _commit(package: Path) -> dict[str, object]:
    """Commit, and what the package has beyond it; nothing where it is in no git checkout."""
    head = _git(package, "rev-parse", "HEAD")
    if not head:
        return {"commit": None}
    # "dirty" as RunRecord tells it: a run says the same of its code by SLURM and without.
    status = _git(package, "status", "--porcelain", "--untracked-files=no") or ""
    difference = _git(package, "diff", "HEAD", "--", ".") or ""
    return {"commit": {"hash": head.strip(), "dirty": bool(status.strip())}, "difference": difference}


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command; None where git or a checkout is missing."""
    call = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(call, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout
