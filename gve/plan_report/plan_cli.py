"""`gve plan CONFIG [--KEY VALUE ...]`: steps, passes, tokens, memory, disk and GPU-hours of a run, without a GPU.

The recipe and its overrides are parsed exactly as `gve fit` parses them. No weight is loaded, no clip is decoded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from rich.console import Console
from rich.table import Column, Table

from gve.data.curriculum import Curriculum
from gve.inputs import InputPolicy
from gve.items import InputError
from gve.lightning_cli import parse
from gve.plan_report.costs import Architecture
from gve.plan_report.draws import History, compare, draw_epochs, read_prober, replayed_scores, sizes_of
from gve.plan_report.lengths import Assumptions, Lengths
from gve.plan_report.report import Machines, Planned, Speed, rows_of, training_of, warnings_of


def main(argv: Sequence[str]) -> int:
    """Prints the plan of a run.

    Args:
        argv: the words after `gve plan`.

    Returns:
        0.

    Raises:
        InputError: the configuration, or a file it names, cannot be used.
    """
    arguments, words = _parser().parse_known_args(_config_first(argv))
    for name, value in (("num_nodes", arguments.nodes), ("devices", arguments.devices)):
        if value is not None:
            words += [f"--trainer.{name}", str(value)]
    try:
        config = parse(["fit", "--config", arguments.config, *words])
    except ArgumentError as error:
        raise InputError(f"{arguments.config}: {error}") from None
    report = plan(config, arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def plan(config: Namespace, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of a parsed configuration, in JSON-able form.

    Args:
        config: of `gve.lightning_cli.parse`.
        arguments: the command's own options.
    """
    sizes = Architecture.of(config.model.base)
    machines = Machines.of(config.trainer)
    assumed = Assumptions(arguments.clip_s, arguments.frame, arguments.image, arguments.text_words)
    lengths = Lengths(config.model.base, InputPolicy.from_dict(config.model.inputs.as_dict()), assumed)
    published = arguments.size or ("7b" if sizes.hidden == 3584 else "3b")
    rows, said = rows_of(config.data, lengths, machines.world, published, arguments.sample)
    sources = [row.source for row in rows]
    curriculum = _curriculum(config.data.curriculum, arguments)
    history = History.load(arguments.replay) if arguments.replay else None
    prober = read_prober(arguments.prober) if arguments.prober else None
    scores = replayed_scores(history, prober, curriculum.unit, sources)
    rows_by_unit = sizes_of(sources, curriculum.unit)
    if history and history.unit == curriculum.unit and set(history.sizes) == set(rows_by_unit):
        rows_by_unit = history.sizes
    epochs = draw_epochs(curriculum, rows_by_unit, config.data.num_epochs, scores)
    if not any(epoch.scores for epoch in epochs) and curriculum.needs_scores:
        said.append("no scores yet: the prober measures them before each epoch; here all units are drawn alike")
    planned = Planned(
        sizes=sizes,
        machines=machines,
        how=training_of(config, machines),
        unit=curriculum.unit,
        steps=config.data.steps_per_epoch,
        epochs=epochs,
        rows=rows,
        assumed=assumed,
        speed=Speed(arguments.mfu, arguments.peak_tflops),
    )
    report = {"config": arguments.config, "base": config.model.base, **planned.to_dict()}
    if history:
        report["replay"] = compare(history, epochs, curriculum.unit)
    report["warnings"] = warnings_of(report, arguments.max_passes, arguments.gpu_gb * 1e9)
    report["notes"] = said
    return report


def _curriculum(settings: Namespace, arguments: argparse.Namespace) -> Curriculum:
    """That of the configuration, with what the command asks to try."""
    curriculum = Curriculum(**settings.as_dict())
    if arguments.unit and arguments.unit != curriculum.unit:
        # Scales and scores by unit are those of the old one.
        curriculum = replace(curriculum, unit=arguments.unit, sigma_scale={}, scores={})
    if arguments.sigma:
        first, last = arguments.sigma
        curriculum = replace(curriculum, sigma_first=first, sigma_last=last)
    return curriculum


def _config_first(argv: Sequence[str]) -> list[str]:
    """Lets `--config FILE` stand for FILE, as with `gve fit`."""
    words = list(argv)
    return words[1:] if words[:1] in (["--config"], ["-c"]) else words


def _pair(text: str, separator: str, kind: type) -> tuple[Any, Any]:
    left, found, right = text.partition(separator)
    try:
        if not found:
            raise ValueError
        return kind(left), kind(right)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A{separator}B") from None


def _size(text: str) -> tuple[int, int]:
    return _pair(text, "x", int)


def _sigma(text: str) -> tuple[float, float]:
    return _pair(text, ":", float)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve plan",
        description="What a run does and costs, before any GPU is taken. Any key of the recipe is an option, as with "
        "`gve fit`: --data.root DIR --trainer.devices 8.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="recipe, for example configs/gve_3b.yaml")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--nodes", type=int, help="short for --trainer.num_nodes")
    parser.add_argument("--devices", type=int, help="short for --trainer.devices: GPUs of a node")
    parser.add_argument("--max-passes", type=float, default=3.0, help="warn of more passes of a source (%(default)s)")
    draw = parser.add_argument_group("draw a logged curriculum again")
    draw.add_argument(
        "--replay", type=Path, metavar="FILE", help="curriculum.json of a run, or its folder: its scores are used"
    )
    draw.add_argument("--sigma", type=_sigma, metavar="A:B", help="sigma of the first and of the last epoch")
    draw.add_argument("--unit", choices=("task", "source", "level"), help="what is drawn; scores are converted")
    draw.add_argument(
        "--prober",
        type=Path,
        metavar="FILE",
        help="scores before the first epoch: {unit: score}, or the curriculum.json of another run",
    )
    cost = parser.add_argument_group("costs")
    cost.add_argument(
        "--mfu", type=float, default=0.35, help="share of the peak that is reached, assumed (%(default)s)"
    )
    cost.add_argument(
        "--peak-tflops", type=float, default=312.0, help="bf16 peak of a GPU, in TFLOP/s (%(default)s: A100)"
    )
    cost.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU, in GB of 1e9 bytes (%(default)s)")
    rows = parser.add_argument_group("lengths")
    rows.add_argument("--sample", type=int, default=16, help="rows read of each source for their lengths (%(default)s)")
    rows.add_argument(
        "--size", choices=("3b", "7b"), help="mixture where there are no shards; by the base when not given"
    )
    rows.add_argument("--clip-s", type=float, default=15.0, help="assumed length of a clip, in seconds (%(default)s)")
    rows.add_argument(
        "--frame", type=_size, default=(1280, 720), help="assumed WIDTHxHEIGHT of a clip, in px (1280x720)"
    )
    rows.add_argument(
        "--image", type=_size, default=(640, 480), help="assumed WIDTHxHEIGHT of an image, in px (640x480)"
    )
    rows.add_argument("--text-words", type=float, default=40.0, help="assumed words of a text (%(default)s)")
    return parser


def _print(report: Mapping[str, Any]) -> None:
    # Rich takes 80 columns for a pipe or a log file, which would cut the columns off.
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(_sources(report))
    if "replay" in report:
        console.print(_replay(report))
    for name, text in _lines(report):
        console.print(f"[bold]{name:<12}[/bold]{text}", soft_wrap=True)
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)


def _sources(report: Mapping[str, Any]) -> Table:
    heading = "by source: hard negatives a pair, expected steps and passes, tokens of an input, peak memory of a GPU"
    epochs = [f"pass {epoch['epoch'] + 1}" for epoch in report["epochs"]]
    numbers = ["rows", "batch", "hard", "steps", *epochs, "passes", "query", "target", "GB"]
    columns = [Column(name, justify="right") for name in numbers]
    table = Table(Column("source", no_wrap=True), "task", "level", *columns, title=heading)
    for source in report["sources"]:
        table.add_row(
            source["name"],
            source["task"],
            str(source["level"]),
            f"{source['rows']:,}",
            f"{source['batch']:,}",
            f"{source['hard_negatives']:.3g}",
            f"{sum(source['steps']):,.0f}",
            *(f"{count:.2f}" for count in source["passes"]),
            f"{source['passes_total']:.2f}",
            f"{source['tokens_query']:,.0f}",
            f"{source['tokens_target']:,.0f}",
            f"{source['peak_bytes'] / 1e9:.1f}",
        )
    return table


def _replay(report: Mapping[str, Any]) -> Table:
    replay = report["replay"]
    title = f"share of each {replay['unit']}: logged (L), planned (P)"
    heads = [f"{kind}{entry['epoch'] + 1}" for entry in replay["epochs"] for kind in "LP"]
    table = Table(Column(replay["unit"], no_wrap=True), *(Column(head, justify="right") for head in heads), title=title)
    names = sorted({name for entry in replay["epochs"] for name in (*entry["logged"], *entry["planned"])})
    for name in names:
        shares = [entry[kind].get(name) for entry in replay["epochs"] for kind in ("logged", "planned")]
        table.add_row(name, *("" if share is None else f"{share:.4f}" for share in shares))
    distances = [entry["distance"] for entry in replay["epochs"]]
    table.add_section()
    table.add_row("distance", *(cell for d in distances for cell in ("", "" if d is None else f"{d:.4f}")))
    return table


def _lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    machines, memory, disk, flops = (report[name] for name in ("machines", "memory", "disk", "flops"))
    parameters, assumed = report["parameters"], report["assumptions"]
    base = sum(count for name, count in parameters.items() if name != "trained")
    widths = [f"{epoch['epoch'] + 1}: {epoch['sigma']:.2f}" for epoch in report["epochs"] if epoch["sigma"] is not None]
    per_step = [source["negatives_per_query"] for source in report["sources"]]
    parts = ("weights", "trained", "pixels", "features", "activations", "logits")
    held = ", ".join(f"{name} {memory[name] / 1e9:.2f}" for name in parts)
    work = ", ".join(
        f"{name} {value / flops['total']:.0%}" for name, value in flops.items() if name != "total" and value
    )
    lines = [
        ("machines", f"{machines['nodes']} x {machines['devices']} devices, {machines['strategy']}"),
        ("model", f"{base:,} parameters frozen, {parameters['trained']:,} trained"),
        ("run", f"{report['steps']:,} steps, {report['pairs']:,} pairs, {_short(report['tokens'])} tokens"),
        ("negatives", f"{min(per_step):,.0f} to {max(per_step):,.0f} for each query of a step, hard ones included"),
        (
            "memory",
            f"{memory['peak'] / 1e9:.1f} GB a GPU at most, in a step of {memory['source']} ({held}; tower "
            f"{memory['tower'] / 1e9:.2f} before the language model runs); "
            f"{memory['peak_with_checkpointing'] / 1e9:.1f} with and "
            f"{memory['peak_without_checkpointing'] / 1e9:.1f} without gradient checkpointing",
        ),
        ("disk", f"shards {_short(disk['shards'])}B; a checkpoint {_short(disk['checkpoint'])}B"),
        (
            "compute",
            f"{_short(flops['total'])}FLOP ({work}): {report['gpu_hours']:,.3g} GPU-hours, "
            f"{report['wall_hours']:,.3g} h on all GPUs, at {assumed['mfu']:.0%} of {assumed['peak_tflops']:g} TFLOP/s "
            "(assumed; decoding and evaluation not counted)",
        ),
    ]
    return lines + ([("sigma", ", ".join(widths))] if widths else [])


def _short(number: float) -> str:
    """Three digits and an SI prefix: 19.8 G."""
    power = min(int(math.log10(number) // 3), 7) if number >= 1 else 0
    return f"{number / 1000**power:.3g} {' kMGTPEZ'[power].strip()}"
