"""What do false claims of the captioner cost? Planted at 0, 10 and 30%, beside the weak captions as they were found.

    python experiments/0004-captioner-dose/dose.py OUT [--jobs 1] [--table experiments/0004-captioner-dose/table.md]

One pile of toy clips, four lists of text-to-video pairs for it, each made by `gve synth run`: the rule-based captioner
with a dose of errors, or the weak caption of each clip. On each, for each seed, `gve fit` and `gve validate`: the same
clips, steps and seeds. Every step and every cell is a folder of OUT; what is whole is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gve.eval.results import SavedResults, read_results
from gve.eval.statistics import interval, joint_bootstrap_means
from gve.eval.uvrb import ABILITY_PARTS
from gve.items import Video
from gve.synth.folder import StepFolder
from gve.synth.units import Context, Outcome, Row, Scope
from gve.toy.claims import claim_shares
from gve.toy.families import is_held_out
from gve.toy.faults import CAPTION_FAULTS, PileRequest, make_pile
from gve.toy.training import shown
from gve.toy.truth import Truth
from gve.toy.uvrb import Builder
from gve.toy.world import Request, make_world

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECIPE = ROOT / "configs" / "quickstart.yaml"
DOSES = {"oracle 0%": 0.0, "oracle 10%": 0.1, "oracle 30%": 0.3}
WEAK = "weak captions"
CONDITIONS = (*DOSES, WEAK)
ABILITIES = ("CMP", "S", "T")
SETS = tuple(name for ability in ABILITIES for name in ABILITY_PARTS[ability])
SECONDS = ("fit_s", "validate_s")
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom -> the 97.5% point of Student's t."""


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Args:
        clips: of the pile, a pair each.
        steps: of training, in one epoch.
        batch: pairs of a step.
        test_scale: share of the test sets' sizes; below 1 the scores are for tests of code only.
        seeds: of training.
        judged: captions of the audit's sample.
    """

    clips: int = 800
    steps: int = 100
    batch: int = 32
    test_scale: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    judged: int = 200


@dataclass(frozen=True)
class FoundOptions:
    """The weak caption has no options."""


class Found:
    """In the place of stage 2: the weak caption of a row as its only one."""

    Options: ClassVar[type] = FoundOptions
    scope: ClassVar[Scope] = "unit"

    def __init__(self, options: FoundOptions, context: Context) -> None:
        pass

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        for row in rows:
            caption = {"text": row["caption"], "style": "as found", "prompt": ""}
            enrichment = {"profile": "none", "captions": [caption], "composed": {}}
            yield Outcome(row["id"], ({**row, "enrichment": enrichment},))


def configuration(condition: str, pile: Path) -> dict[str, Any]:
    """The synthesis of a condition: no filter turns a clip away, so that all conditions have the same ones."""
    every = ("concise", "spatio-temporal rich", "abstract", "keywords only", "partially relevant")
    sections: dict[str, Any] = {
        "input": {"sources": [{"path": str(pile / "weak.jsonl"), "name": "toy"}]},
        "scan": {"similarity": False, "cutting": {"every_frame": False, "max_frames": 0, "max_clips": 0}},
        "select": {"rules": []},
        "extend": {"tasks": {"T2V": 1.0}},
        "output": {"presample": "uniform(8)"},
        "run": {"workers": 1, "unit_rows": 200},
    }
    if condition == WEAK:
        return sections | {"enrich": {"class": "dose:Found"}}
    words = {style: [1, 400] for style in every}
    sections["enrich"] = {"ask": {}, "words": words, "short_words": 0, "long_words": 0, "min_captions": 5}
    sections["enrich"]["boilerplate"] = False
    sections["captioner"] = {"kind": "oracle", "truth": str(pile / "scenes.jsonl"), "dose": DOSES[condition]}
    return sections


def name_of(condition: str) -> str:
    return condition.replace("%", "").replace(" ", "-")


def run(words: Sequence[object], log: Path) -> None:
    """Runs a command of gve; its output goes to a file.

    Raises:
        RuntimeError: it failed.
    """
    search = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ | {"PYTHONPATH": search}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        command = [sys.executable, "-m", "gve", *map(str, words)]
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"gve {words[0]} ended with {done.returncode}: see {log}")


class Experiment:
    """All conditions and cells below one folder."""

    def __init__(self, out: Path, sizes: Sizes, conditions: Sequence[str] = CONDITIONS) -> None:
        self.out, self.sizes, self.conditions = out.absolute(), sizes, conditions
        self.world, self.pile = self.out / "world", self.out / "pile"

    def prepare(self) -> None:
        """The base and the test sets; the pile, of which no clip is held out or tested."""
        make_world(self.world, Request(scale=0.02, test_scale=self.sizes.test_scale), jobs=1)
        tested = {shown(clip) for mini in Builder(0, "A", self.sizes.test_scale).build() for clip in mini.corpus}
        request = PileRequest(0, self.sizes.clips, 0.3, CAPTION_FAULTS, siblings=0.0, short=True)
        make_pile(self.pile, request, refuse=lambda clip: is_held_out(clip) or shown(clip) in tested)

    def synthesise(self, condition: str) -> None:
        """The shards of a condition, and the audit of its captions."""
        folder = self.out / name_of(condition)
        config = folder / "synth.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(configuration(condition, self.pile), sort_keys=False))
        out = folder / "synth"
        run(["synth", "run", "--config", config, "--out", out], folder / "synth.log")
        if condition != WEAK and not (out / "audit" / "audit.json").is_file():
            judge = ["--judge", "oracle", f"truth={self.pile / 'scenes.jsonl'}", "--sample", self.sizes.judged]
            run(["synth", "audit", out, *judge, "--texts-only"], folder / "audit.log")

    def cell(self, condition: str, seed: int) -> None:
        """Trains and evaluates one cell, or leaves a whole one as it is.

        Raises:
            RuntimeError: a command failed.
        """
        folder = self.folder(condition, seed)
        if (folder / "seconds.json").is_file():  # the last that is written
            return
        overlay = self._overlay(condition, seed, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
        recipe = ["--config", RECIPE, "--config", folder / "overlay.yaml"]
        started = time.monotonic()
        run(["fit", *recipe, "--ckpt_path", "auto"], folder / "fit.log")
        trained = time.monotonic()
        run(["validate", *recipe, "--ckpt_path", folder / "checkpoints" / "last.ckpt"], folder / "validate.log")
        seconds = dict(zip(SECONDS, (round(trained - started), round(time.monotonic() - trained)), strict=True))
        (folder / "seconds.json").write_text(json.dumps(seconds) + "\n")

    def folder(self, condition: str, seed: int) -> Path:
        return self.out / name_of(condition) / f"seed-{seed}"

    def _overlay(self, condition: str, seed: int, folder: Path) -> dict[str, Any]:
        sizes = self.sizes
        return {
            "seed_everything": seed,
            "trainer": {"default_root_dir": str(folder), "max_epochs": 1, "enable_progress_bar": False},
            "model": {"base": str(self.world / "base")},
            "data": {
                "root": str(self.out / name_of(condition) / "synth" / "shards"),
                "steps_per_epoch": sizes.steps,
                "batch_size": sizes.batch,
                "dev_pairs": sizes.batch,
                "curriculum": {"schedule": "uniform"},
            },
            "uvrb": {
                "root": str(self.world / "uvrb"),
                "sets": list(SETS),
                "untrained": False,
                "ablations": [],
            },
        }

    def claims(self, condition: str, step: str) -> tuple[int, int, int]:
        """What the checker says of the texts that a step made: false claims, those that it can judge, and texts.

        Args:
            step: "enrich" for all captions, "extend" for those of the training pairs.
        """
        scenes = Truth.read(self.pile / "scenes.jsonl")
        texts, clips = [], []
        for outcome in StepFolder(self.out / name_of(condition) / "synth", step).outcomes():
            for row in outcome.rows:
                video = row["video"] if step == "enrich" else row["target"][0]["video"]
                told = row["enrichment"]["captions"] if step == "enrich" else row["query"]
                texts += [text["text"] for text in told]
                clips += [scenes.of(Video(Path(video["file"])))] * len(told)
        shares = claim_shares(texts, clips).shares.values()
        made = sum(share.made for share in shares)
        return made - sum(share.true for share in shares), made, len(texts)

    def audited(self, condition: str) -> str:
        """The audit's rate of false claims, with its interval."""
        path = self.out / name_of(condition) / "synth" / "audit" / "audit.json"
        if not path.is_file():
            return "-"
        found = json.loads(path.read_text())["judge"]["all"]
        return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"

    def audit_table(self) -> str:
        """Markdown: the dose, what the checker finds in all captions, and what the audit's sample says."""
        lines = [
            "| captions | false, of all captions | audit's sample | false, of the training pairs |",
            "|---|---:|---:|---:|",
        ]
        for condition in self.conditions:
            shares = []
            for step in ("enrich", "extend"):
                false, made, _ = self.claims(condition, step)
                shares.append(f"{false / made:.1%} of {made}")
            lines.append(f"| {condition} | {shares[0]} | {self.audited(condition)} | {shares[1]} |")
        return "\n".join(lines) + "\n"

    def work(self, jobs: int) -> list[str]:
        """Everything that is not whole yet; returns what failed, which does not stop the rest."""
        self.prepare()
        failed = []
        cells = [(condition, seed) for seed in self.sizes.seeds for condition in self.conditions]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("synthesis", total=len(self.conditions))
            for condition in self.conditions:
                self.synthesise(condition)
                bar.advance(task)
            task = bar.add_task("cells", total=len(cells))
            with ThreadPoolExecutor(jobs) as pool:
                futures = {pool.submit(self.cell, *cell): cell for cell in cells}
                for future in as_completed(futures):
                    if isinstance(error := future.exception(), RuntimeError):
                        failed.append(f"{futures[future]}: {error}")
                    elif error is not None:
                        raise error
                    bar.advance(task)
        return failed

    def write_results(self, path: Path) -> None:
        """results.csv: a row for each cell and ability; a cell that is not whole has no score."""
        facts = {condition: self.claims(condition, "extend") for condition in self.conditions}
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow("condition seed ability score pairs claims false_claims steps fit_s validate_s".split())  # noqa: SIM905
            for condition, (false, made, pairs) in facts.items():
                for seed in self.sizes.seeds:
                    folder = self.folder(condition, seed)
                    whole = (folder / "seconds.json").is_file()
                    seconds = json.loads((folder / "seconds.json").read_text()) if whole else {}
                    results = read_results(folder) if whole else None
                    for ability in ABILITIES:
                        score = f"{ability_score(results, ability):.6f}" if results else ""
                        told = [pairs, made, false, self.sizes.steps, *(seconds.get(key, "") for key in SECONDS)]
                        writer.writerow([condition, seed, ability, score, *told])

    def table(self) -> str:
        """Markdown: scores, and differences to the captioner without errors, each with two intervals."""
        runs = {
            condition: [read_results(self.folder(condition, seed)) for seed in self.sizes.seeds]
            for condition in self.conditions
        }
        lines = [
            "| captions | ability | score | by seed | minus 0%, interval over queries | over seeds |",
            "|---|---|---:|---:|---:|---:|",
        ]
        first = runs.get(CONDITIONS[0], [])
        for condition, own in runs.items():
            for ability in ABILITIES:
                by_seed = [ability_score(one, ability) for one in own]
                cells = [
                    condition,
                    ability,
                    "{:.3f} [{:.3f}, {:.3f}]".format(*mean(own, ability)),
                ]
                cells += [", ".join(f"{value:.3f}" for value in by_seed), "", ""]
                if first and own is not first:
                    cells[-2] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*mean(own, ability, first))
                    pairs = [value - ability_score(one, ability) for value, one in zip(by_seed, first, strict=True)]
                    cells[-1] = over_seeds(pairs)
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def ability_score(results: SavedResults, ability: str) -> float:
    """The mean of the ability's sets."""
    return float(np.mean([results.sets[name].hits.mean() for name in ABILITY_PARTS[ability]]))


def mean(runs: Sequence[SavedResults], ability: str, minus: Sequence[SavedResults] = ()) -> tuple[float, float, float]:
    """An ability as the mean over the seeds, with the 95% bootstrap interval over queries (clustered by video).

    Args:
        runs: one a seed, of the same queries.
        minus: runs of the same seeds whose scores are subtracted, query by query.
    """
    parts = ABILITY_PARTS[ability]
    scores = {name: np.mean([run.sets[name].hits for run in runs], axis=0) for name in parts}
    if minus:
        scores = {name: own - np.mean([run.sets[name].hits for run in minus], axis=0) for name, own in scores.items()}
    replicates = joint_bootstrap_means(scores, {name: runs[0].sets[name].clusters for name in parts})
    low, high = interval(np.mean([replicates[name] for name in parts], axis=0))
    return float(np.mean([own.mean() for own in scores.values()])), low, high


def over_seeds(differences: Sequence[float]) -> str:
    """Student's 95% interval of the mean of paired differences, over the seeds."""
    freedom = len(differences) - 1
    if freedom not in STUDENT:
        return ""
    reach = STUDENT[freedom] * np.std(differences, ddof=1) / np.sqrt(len(differences))
    return f"[{np.mean(differences) - reach:+.3f}, {np.mean(differences) + reach:+.3f}]"


def main() -> int:
    default = Sizes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all runs; the same command goes on where it stopped")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run side by side")
    parser.add_argument("--clips", type=int, default=default.clips, help="of the pile, a pair each")
    parser.add_argument("--steps", type=int, default=default.steps, help="of training")
    parser.add_argument("--batch", type=int, default=default.batch, help="pairs of a step")
    parser.add_argument("--test-scale", type=float, default=default.test_scale, help="below 1: to try the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds, help="of training")
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=CONDITIONS, help="conditions")
    parser.add_argument("--write", type=Path, default=HERE, help="where results.csv and table.md go")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.clips, arguments.steps, arguments.batch, arguments.test_scale, tuple(arguments.seeds))
    experiment = Experiment(arguments.out, sizes, tuple(arguments.only))
    failed = experiment.work(arguments.jobs)
    arguments.write.mkdir(parents=True, exist_ok=True)
    experiment.write_results(arguments.write / "results.csv")
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    text = f"{experiment.audit_table()}\n{experiment.table()}"
    (arguments.write / "table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
