"""The probe table: what LoRA makes of the trained base and of its random twin, three seeds each.

    python experiments/0001-toy-base/probe.py [--out runs/toy-base-probe] [--seeds 0 1 2] [--jobs 2]

Every row is `gve fit` and `gve validate` with configs/quickstart.yaml and another seed; rows that are done are kept.
Writes probe.csv (one line per run and ability) and table.md into OUT.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABILITIES = ("AVG-A", "AVG-D", "TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")
TEMPORAL = ("CRB-T", "CMRB")


def gve(*words: str, log: Path) -> None:
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "gve", *words]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)


def passes(base: str, seed: int, first: int) -> dict[str, list[str]]:
    """Evaluations of a row: the untrained base once, the views that break the order of the trained base's rows only."""
    found = {"all": ["--uvrb.ablations", "[]", "--uvrb.untrained", str(base == "trained" and seed == first).lower()]}
    if base == "trained":
        order = ["--uvrb.sets", json.dumps(TEMPORAL), "--uvrb.untrained", "false"]
        found["order"] = [*order, "--uvrb.ablations", "[static,shuffled,reversed]"]
    return found


def run(out: Path, base: str, seed: int, first: int) -> None:
    """Trains and evaluates one row."""
    folder = out / f"{base}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    world = out / "world" if base == "trained" else out / f"random-{seed}-world"
    settings = ["--config", "configs/quickstart.yaml", "--seed_everything", str(seed)]
    settings += ["--trainer.enable_progress_bar", "false"]
    settings += ["--model.base", str(world / "base"), "--data.root", str(out / "world" / "shards")]
    settings += ["--uvrb.root", str(out / "world" / "uvrb"), "--uvrb.num_workers", "0"]
    best = folder / "checkpoints" / "best.ckpt"
    log = folder / "log.txt"
    if not (folder / "fit.done").exists():
        gve("fit", *settings, "--trainer.default_root_dir", str(folder), log=log)
        (folder / "fit.done").touch()
    for name, more in passes(base, seed, first).items():
        if not (folder / name / "uvrb.json").exists():
            words = [*settings, *more, "--ckpt_path", str(best), "--trainer.default_root_dir", str(folder / name)]
            gve("validate", *words, log=log)


def mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def summarise(out: Path, seeds: list[int]) -> str:
    """The table of abilities (mean and standard error over seeds), and the gate on T."""
    results = {
        (base, seed, name): json.loads((out / f"{base}-{seed}" / name / "uvrb.json").read_text())
        for base in ("trained", "random")
        for seed in seeds
        for name in passes(base, seed, seeds[0])
    }
    with open(out / "probe.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["base", "lora", "seed", "ability", "value", "low", "high"])
        for (base, seed, name), result in results.items():
            for lora, part in (("yes", result), ("no", result.get("untrained"))):
                if name != "all" or not part:
                    continue
                for ability in ABILITIES:
                    low, high = part["ability_intervals"][ability]
                    row = [base, lora, seed, ability, *(f"{v:.4f}" for v in (part["abilities"][ability], low, high))]
                    writer.writerow(row)
    lines = ["| ability | base zero-shot | base + LoRA | random twin + LoRA | chance |", "|---|---:|---:|---:|---:|"]
    first = results["trained", seeds[0], "all"]
    for ability in ABILITIES:
        with_lora = {b: [results[b, s, "all"]["abilities"][ability] for s in seeds] for b in ("trained", "random")}
        low, high = first["untrained"]["ability_intervals"][ability]
        zero_shot = f"{first['untrained']['abilities'][ability]:.3f} [{low:.3f}, {high:.3f}]"
        chance = first["ability_chance"][ability]
        lines.append(
            f"| {ability} | {zero_shot} | {mean(with_lora['trained'])} | {mean(with_lora['random'])} | {chance:.3f} |"
        )
    lines += [
        "",
        "| base + LoRA | T | static | shuffled | reversed | static ceiling |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (*TEMPORAL, "T"):
        columns: dict[str, list[float]] = {kind: [] for kind in ("value", "static", "shuffled", "reversed", "ceiling")}
        for seed in seeds:
            sets = results["trained", seed, "order"]["sets"]
            chosen = TEMPORAL if name == "T" else (name,)
            columns["value"].append(statistics.mean(sets[s]["value"] for s in chosen))
            columns["ceiling"].append(statistics.mean(sets[s]["ceilings"]["static"] for s in chosen))
            for kind in ("static", "shuffled", "reversed"):
                columns[kind].append(statistics.mean(sets[s]["ablations"][kind] for s in chosen))
        lines.append(f"| {name} | " + " | ".join(mean(column) for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "toy-base-probe", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of adapters, draws and random twins")
    parser.add_argument("--jobs", type=int, default=2, help="rows that run side by side")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "worlds.txt"
    gve("toy", "make", str(out / "world"), log=log)
    for seed in arguments.seeds:  # only the base of these worlds is used
        small = ["--scale", "0.01", "--test-scale", "0.01", "--base", "random", "--seed", str(seed)]
        gve("toy", "make", str(out / f"random-{seed}-world"), *small, log=log)
    rows = [(base, seed) for seed in arguments.seeds for base in ("trained", "random")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda row: run(out, *row, arguments.seeds[0]), rows))
    table = summarise(out, arguments.seeds)
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
