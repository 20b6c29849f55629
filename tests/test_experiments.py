"""Every sweep and overlay of experiments/ parses over its recipe, at both sizes; tables are made from results.csv."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from gve import lightning_cli, uvrb_cli
from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.sweep.cli import _parser
from gve.sweep.collect import FACTS, VOLATILE, Row, write_results
from gve.sweep.crew import Site, write_overlay
from gve.sweep.plan import Cell, Run, Sweep, read_sweep
from gve.sweep.scaling import log_fit

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted((ROOT / "experiments").rglob("sweep.yaml"))
NAMES = [path.parent.name for path in SWEEPS]


def sweeps(path: Path) -> Iterator[Sweep]:
    data = yaml.safe_load(path.read_text())
    for toy in [False] * ("configs" in data) + [True] * ("toy" in data):
        yield read_sweep(path, toy=toy)


def parse_all(requests: Sequence[Sequence[str]]) -> list[Namespace]:
    """The configurations of many `gve fit` lines, by one parser: making it costs more than a line."""
    found: list[Namespace] = []

    class Many(lightning_cli.GVECLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.extend(parser.parse_args(list(words)).fit for words in requests)
            raise lightning_cli._Parsed(None, "")

    with pytest.raises(lightning_cli._Parsed):
        lightning_cli._run(Many, ["fit"])
    return found


def words_of(run: Run, site: Site) -> list[str]:
    return [
        "fit",
        *(word for path in (*run.cell.configs, write_overlay(run, site)) for word in ("--config", str(path))),
    ]


def set_of(values: Any, config: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value asked for, value found) of every leaf of nested values; a mapping that the run takes whole is one."""
    for key, value in values.items():
        found = config[key] if isinstance(config, (dict, Namespace)) else getattr(config, key)
        if isinstance(value, dict) and not isinstance(found, dict):
            yield from set_of(value, found, f"{place}{key}.")
        else:
            yield f"{place}{key}", value, list(found) if isinstance(found, tuple) else found


def test_the_folders_are_those_of_the_issue() -> None:
    assert [name[:4] for name in NAMES] == [f"{number:04d}" for number in range(5, 13)]
    for path in SWEEPS:
        assert (path.parent / "README.md").is_file()
        overlays = {one for sweep in sweeps(path) for cell in sweep.cells for one in cell.configs}
        left = {one for one in path.parent.glob("*.yaml") if one != path} - overlays
        assert not left, f"overlays that no cell uses: {left}"
        assert {sweep.name for sweep in sweeps(path)} == {path.parent.name, f"{path.parent.name}-toy"}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Cell, Namespace]]]:
    """Sweep -> its cells with the configuration that a run gets."""
    site = Site(tmp_path_factory.mktemp("sweeps"))
    found: dict[str, list[tuple[Cell, Namespace]]] = {}
    asked = []
    for path in SWEEPS:
        by_size = list(sweeps(path))
        toy = {cell.name: cell.values for sweep in by_size if sweep.name.endswith("-toy") for cell in sweep.cells}
        for sweep in by_size:
            seen = set()
            for run in sweep.runs():
                cell = run.cell
                # Equal values over the same recipe: once, at toy size.
                own = any(one.parent == path.parent or len(cell.configs) > 1 for one in cell.configs)
                if cell.name in seen or (cell.world is None and not own and toy.get(cell.name) == cell.values):
                    continue
                seen.add(cell.name)
                asked.append((sweep.name, cell, words_of(run, site)))
    for (name, cell, _), config in zip(asked, parse_all([words for *_, words in asked]), strict=True):
        found.setdefault(name, []).append((cell, config))
    return found


def test_every_cell_parses_and_gets_what_it_asks_for(parsed: dict[str, list[tuple[Cell, Namespace]]]) -> None:
    """A misspelt key is refused by the parser; a value that another layer takes back would be seen here."""
    assert sum(map(len, parsed.values())) > 60
    for name, cells in parsed.items():
        for cell, config in cells:
            for key, value, found in set_of(cell.values, config):
                if "{run:" not in str(value):
                    assert found == value, f"{name}, {cell.name}: {key} is {found}"
            for path in cell.configs:
                if "experiments" in path.parts and path.name != "toy.yaml":
                    for key, value, found in set_of(yaml.safe_load(path.read_text()), config):
                        assert found == value, f"{name}, {cell.name}: {path.name} says {key}: {value}, the run {found}"
            assert (config.data.batch_size, config.trainer.max_epochs) != (None, None)


def test_arms_differ_in_what_they_are_named_after(parsed: dict[str, list[tuple[Cell, Namespace]]]) -> None:
    """The arms of the ablation at toy size differ from `uniform` in the curriculum alone, gve_i also in its sources."""
    arms = {cell.name: config for cell, config in parsed["0005-ablation-toy"]}
    base = arms["uniform"].as_flat().__dict__
    for name, config in arms.items():
        other = config.as_flat().__dict__
        differing = {key for key in base if base[key] != other.get(key)}
        allowed = {"data.curriculum.schedule", "data.curriculum.size_exponent"}
        allowed |= {"data.batch_size"} if name == "gve_i" else set()
        allowed |= {"model.lora"} if name == "untrained" else set()
        places = {key for key in differing if "config" in key or "root" in key or "dirpath" in key}
        if name != "untrained":
            assert differing - places <= allowed, name
    assert arms["gve"].data.curriculum.schedule == "pyramid"
    assert {name for name, size in arms["gve_i"].data.batch_size.items() if size == 0} == {
        "toy_change_ti",
        "toy_change_tv",
        "toy_frame",
        "toy_part",
    }
    assert [arms[name].data.curriculum.schedule for name in ("gve_s", "easy_first", "hard_first")] == [
        "uniform",
        "easy_first",
        "hard_first",
    ]


def test_pairs_of_the_scaling_curve_are_steps_times_batch() -> None:
    """x of 0007: three epochs of steps of 1,536 pairs (19 sources of 2,048, 19 of 1,024), at toy size of 32."""
    assert (19 * 2048 + 19 * 1024) / 38 == 1536
    for sweep in sweeps(ROOT / "experiments/0007-data-scaling/sweep.yaml"):
        batch = 32 if sweep.name.endswith("toy") else 1536
        for cell in sweep.cells:
            if cell.x is not None:
                assert cell.x == 3 * cell.values["data"]["steps_per_epoch"] * batch, cell.name


def test_commands_of_readmes_and_headers_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `gve sweep` line of a README or a header names a sweep that is there, with options that exist."""
    lines = []
    for path in [one for folder in SWEEPS for one in (folder, folder.parent / "README.md")]:
        lines += re.findall(r"gve sweep ((?:run|status|collect|compare) experiments/[^`;\n]*)", path.read_text())
    assert len(lines) > 2 * len(SWEEPS)
    for line in lines:
        words = re.sub(r"\(.*", "", line).replace('"', "").split()
        arguments = _parser().parse_args(words)
        assert (ROOT / arguments.file / "sweep.yaml").is_file(), line


def test_the_benchmark_step_is_a_command_of_gve_uvrb(tmp_path: Path) -> None:
    for sweep in sweeps(ROOT / "experiments/0008-test-time-scaling/sweep.yaml"):
        for run in sweep.runs():
            site = Site(tmp_path, {"uvrb": {"root": "sets"}} if run.cell.world is None else {})
            arguments = uvrb_cli.parse(site.words(run, "uvrb")[1:])
            assert arguments.model.endswith("checkpoints/last.ckpt")
            assert arguments.frames == ([8, 4, 16] if run.cell.world else [8, 16, 48])


def rows_of(cells: dict[str, float], seeds: int, metric_step: float = 0.0) -> list[Row]:
    """A table of done runs: a cell's score plus what its seed adds, the same for all cells."""
    rows = []
    for seed in range(seeds):
        for cell, score in cells.items():
            facts = dict.fromkeys((*FACTS, *VOLATILE), "")
            facts |= {"cell": cell, "seed": str(seed), "state": "done", "protocol": "p", "run": f"{cell}-s{seed}"}
            noise = 0.01 * (seed % 3) + 0.001 * ((seed * 7 + len(cell)) % 5)
            scores = {name: score + noise + metric_step * place for place, name in enumerate((*AVERAGES, *ABILITIES))}
            rows.append(Row(facts, scores))
    return rows


def test_the_verdict_is_sober_in_both_directions(tmp_path: Path) -> None:
    """A planted effect is found, and an effect of 0 is told as none, with the least that could have been seen."""
    script = runpy.run_path(str(ROOT / "experiments/0005-ablation/verdict.py"))
    arms = dict.fromkeys(("untrained", "gve_i", "gve_s", "gve", "uniform", "easy_first", "hard_first"), 0.30)
    arms |= {"gve_i": 0.10, "untrained": 0.02}
    write_results(tmp_path / "results.csv", rows_of(arms, 6))
    table = script["report"](tmp_path / "results.csv")
    told = dict(re.findall(r"^\| (\w+ - \w+) \| AVG-A \|.*\| ([a-z ]+) \|$", table, re.MULTILINE))
    assert told["gve_s - gve_i"] == "higher"
    assert told["gve - uniform"] == "no detectable effect"
    assert told["easy_first - hard_first"] == "no detectable effect"
    assert all(name in table for name in ABILITIES)
    assert "detectable" in table


def test_the_scaling_fit_is_of_the_curve_alone(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "experiments/0007-data-scaling/fit.py"))
    rows = rows_of({"x1": 0.1, "x3": 0.15, "x10": 0.2, "x1_repeated": 0.9}, 3)
    sizes = {"x1": "960", "x3": "2976", "x10": "9984", "x1_repeated": ""}
    for row in rows:
        row.facts["x"] = sizes[row.cell]
    write_results(tmp_path / "results.csv", rows)
    table = script["report"](tmp_path / "results.csv")
    points = [(float(row.facts["x"]), row.scores["AVG-A"]) for row in rows if row.facts["x"]]
    fit = log_fit(*zip(*points, strict=True))
    line = next(line for line in table.splitlines() if line.startswith("| AVG-A |"))
    assert f"{fit.per_tenfold:+.3f}" in line
    assert "x1_repeated" in table
