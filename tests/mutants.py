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


MUTANTS = (
    Mutant(
        "gather detached",
        "gve/model/infonce.py",
        "            dist.reduce_scatter_single(own, gradient.contiguous())\n        return own",
        "            own.zero_()\n        return own",
        ("tests/test_infonce.py",),
    ),
    Mutant(
        "dropout not replayed",
        "gve/model/gradcache.py",
        "        torch.manual_seed(seed + number)\n        rows = embed(chunk.batch)",
        "        rows = embed(chunk.batch)",
        ("tests/test_gradcache.py",),
    ),
    Mutant(
        "o_proj in LoRA",
        "gve/model/backbone.py",
        '("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")',
        '("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")',
        ("tests/test_backbone.py", "tests/test_configs.py"),
    ),
    Mutant(
        "pool at -2",
        "gve/model/backbone.py",
        "pooled = states[rows, batch.pool_index]",
        "pooled = states[rows, batch.pool_index - 1]",
        ("tests/test_backbone.py",),
    ),
    Mutant(
        "wrong positions rule",
        "gve/inputs/positions.py",
        'if rule == "transformers5" else',
        'if rule != "transformers5" else',
        ("tests/test_inputs.py",),
    ),
    Mutant(
        "one-sided loss",
        "gve/model/infonce.py",
        "(query_loss + target_loss) / 2",
        "query_loss",
        ("tests/test_infonce.py",),
    ),
    Mutant(
        "tie sign",
        "gve/encode/topk.py",
        "np.count_nonzero(candidates > best)",
        "np.count_nonzero(candidates >= best)",
        ("tests/test_retrieval.py",),
    ),
    Mutant(
        "duplicate mask off",
        "gve/model/infonce.py",
        "others = others & ~(own[:, None, :2] == column_ids[None, :, :2]).any(-1)",
        "others = others & True",
        ("tests/test_infonce.py",),
    ),
    Mutant(
        "tower in train mode",
        "gve/model/backbone.py",
        "        self.model.visual.eval()",
        "        self.model.visual.train(mode)",
        ("tests/test_backbone.py",),
    ),
    Mutant(
        "odd frames",
        "gve/video/sampling.py",
        "sampling.num_frames)) // 2 * 2",
        "sampling.num_frames))",
        ("tests/test_video.py",),
    ),
    Mutant(
        "no window shuffle",
        "gve/data/plan.py",
        '        return rows[permutation(len(rows), self._seed, "window", self._source.name, number, window)]',
        "        return rows",
        ("tests/test_plan.py",),
    ),
    Mutant(
        "EXIF off",
        "gve/video/pictures.py",
        "PIL.ImageOps.exif_transpose(picture)",
        "picture",
        ("tests/test_video.py",),
    ),
    Mutant(
        "levels reversed",
        "gve/data/curriculum.py",
        "    return TASKS[task]",
        "    return 4 - TASKS[task]",
        ("tests/test_curriculum.py",),
    ),
)


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
        seconds = time.monotonic() - start
        print(f"{'caught' if verdict else 'MISSED':<7}{mutant.name:<24}{seconds:5.0f} s  {verdict[:110]}", flush=True)
    print(f"{hits} of {len(chosen)} faults caught")
    return 0 if hits >= min(REQUIRED, len(chosen)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
