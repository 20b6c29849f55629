"""Plants faults in a copy of the project and runs the default tests on each: a fault that no test catches is a gap.

    python tests/mutants.py [--only NAME ...] [--full]

Each fault is one exact replacement in one file. The tests named beside it run first (`-x`); with `--full` the whole
default tier follows where those pass. Prints a table and exits 1 when fewer than eleven of the twelve are caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = 11


@dataclass(frozen=True)
class Mutant:
    """One fault: what it is, where, the text it replaces, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = ()


def plant(mutant: Mutant, folder: Path) -> None:
    """Copies the project to `folder` and applies the fault there.

    Raises:
        SystemExit: the text to replace does not stand exactly once in the file, so the script is out of date.
    """
    for name in ("gve", "tests", "configs", "experiments", "pyproject.toml", "README.md", "requirements.txt"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def caught(folder: Path, tests: tuple[str, ...]) -> str:
    """The first failing test's line, or an empty string when all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.setdefault("GVE_REAL", str(ROOT.parent / "shared" / "real"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu and not slurm", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode == 0:
        return ""
    if done.returncode != 1:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these faults only")
    parser.add_argument("--full", action="store_true", help="run the whole default tier where the named tests pass")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    hits = 0
    for mutant in chosen:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gve-mutant-") as name:
            folder = Path(name)
            plant(mutant, folder)
            verdict = caught(folder, mutant.tests)
            if not verdict and arguments.full:
                verdict = caught(folder, ("tests",))
        hits += bool(verdict)
        print(
            f"{'caught' if verdict else 'MISSED':<7}{mutant.name:<28}{time.monotonic() - start:5.0f} s  {verdict[:120]}",
            flush=True,
        )
    print(f"{hits} of {len(chosen)} faults caught")
    return 0 if hits >= min(REQUIRED, len(chosen)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
