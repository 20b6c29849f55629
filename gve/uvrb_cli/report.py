"""`gve uvrb compare` and `gve uvrb report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gve.eval.comparison import Comparison, compare, run_labels
from gve.eval.page import PageOptions, page_data, write_page
from gve.eval.published import (
    CORRELATIONS,
    WRONG_QUOTATIONS,
    models_of,
    published_scores,
    recomputed_scores,
    slips,
)
from gve.eval.results import SavedResults, read_runs
from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.items import InputError

WIDTH = 140  # columns of tables where the output is no terminal


def add_parsers(commands: Any) -> None:
    """Adds `compare` and `report`."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    pair = commands.add_parser(
        "compare",
        formatter_class=formatter,
        help="each run minus the first: paired differences with intervals, Holm over the sets",
        description="Subtracts the first run from every other, query by query. Intervals are 95%, by a bootstrap over "
        "queries clustered by video; p-values are two-sided and adjusted by Holm over the sets of one comparison. Runs "
        "on other data are refused. Exit 1 when a set is incomplete in one of the runs.",
    )
    pair.add_argument("runs", nargs="+", metavar="RUN", help="folders or uvrb.json files; the first is the baseline")
    pair.add_argument(
        "--across-settings",
        action="store_true",
        help="compare runs of other frames, tokens a frame or length; the output names what differs",
    )
    pair.add_argument("--resamples", type=int, default=10000, help="bootstrap replicates")
    pair.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    pair.set_defaults(handler=_compare)

    page = commands.add_parser(
        "report",
        formatter_class=formatter,
        help="one HTML page about runs, beside the 16 published models; --published: those alone",
        description="Writes one self-contained page: tables, radar, comparisons, scaling curves, ablations, the "
        "paper's correlations recomputed, best and worst queries with thumbnails. It is read without a network.",
    )
    page.add_argument("runs", nargs="*", metavar="RUN", help="folders or uvrb.json files; the first is the baseline")
    page.add_argument("--out", help="the page to write, for example page.html; report.html unless --json is given")
    page.add_argument("--published", action="store_true", help="report the paper's 16 models alone, recomputed")
    page.add_argument("--root", help="folder of the sets, for queries and thumbnails; the one that each run names")
    page.add_argument("--mteb", nargs="+", default=[], metavar="FILE", help="results of MTEB for a table of their own")
    page.add_argument("--gallery", type=int, default=3, help="best and worst queries shown of each set; 0 for none")
    page.add_argument("--top", type=int, default=5, help="results shown of each query, at most 10")
    page.add_argument("--num-workers", type=int, default=2, help="threads that wait for decoders of thumbnails")
    page.add_argument("--resamples", type=int, default=10000, help="bootstrap replicates")
    page.add_argument(
        "--json",
        action="store_true",
        help="print what the page shows as JSON; with --published {model: {ability: value}}, slips on stderr",
    )
    page.set_defaults(handler=_report)


def _compare(arguments: argparse.Namespace) -> int:
    runs = [run for path in arguments.runs for run in read_runs(path)]
    if len(runs) < 2:
        raise InputError(f"compare needs two runs at least, got {len(runs)}: give the baseline first")
    _check_resamples(arguments.resamples)
    labels = run_labels(runs)
    comparisons = [
        compare(
            runs[0],
            run,
            (labels[0], label),
            across_settings=arguments.across_settings,
            resamples=arguments.resamples,
        )
        for run, label in zip(runs[1:], labels[1:], strict=True)
    ]
    if arguments.json:
        print(json.dumps([comparison.to_dict() for comparison in comparisons], indent=1))
    else:
        for comparison in comparisons:
            _print_comparison(comparison)
    whole = all(row["complete"] for comparison in comparisons for row in comparison.sets.values())
    return 0 if whole else 1


def _check_resamples(resamples: int) -> None:
    if resamples < 100:
        raise InputError(f"--resamples {resamples} is too few for a 95% interval; give at least 100")


def _print_comparison(comparison: Comparison) -> None:
    console = _console()
    for scope, rows in (("ability", comparison.abilities), ("set", comparison.sets)):
        table = Table(title=escape(f"{comparison.model} minus {comparison.baseline}"), title_justify="left")
        table.add_column(scope, no_wrap=True)
        heads = [comparison.baseline, comparison.model, "difference", "95% interval"]
        for head in [*heads, *(["p", "p (Holm)", "queries"] if scope == "set" else [])]:
            table.add_column(escape(head), justify="right")
        for name, row in rows.items():
            low, high = row["interval"]
            marked = name if row.get("complete", True) else f"{name} (incomplete)"
            line = [marked, *_values(row), f"{row['difference']:+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
            if scope == "set":
                line += [f"{row['p']:.4f}", f"{row['p_holm']:.4f}", str(row["n_query"])]
            table.add_row(*line)
        if rows:
            console.print(table)
    for note in comparison.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def _values(row: dict[str, Any] | Any) -> list[str]:
    """The two scores, each with the range that ties leave open where there is one."""
    shown = []
    for value, (low, high) in zip((row["baseline"], row["model"]), row.get("ties", [(0, 0)] * 2), strict=True):
        shown.append(f"{value:.3f}" + (f" ({low:.3f} to {high:.3f} by ties)" if high - low > 0.0005 else ""))
    return shown


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _report(arguments: argparse.Namespace) -> int:
    if arguments.published and arguments.runs:
        raise InputError("--published reports the paper's models alone; leave it out to see runs beside them")
    if not arguments.published and not arguments.runs:
        raise InputError("name a run (the folder of `gve uvrb run --out`), or give --published")
    _check_resamples(arguments.resamples)
    if arguments.gallery < 0 or not 1 <= arguments.top <= 10 or arguments.num_workers < 1:
        raise InputError(
            f"--gallery {arguments.gallery} must be 0 or more, --top {arguments.top} 1 to 10, "
            f"--num-workers {arguments.num_workers} 1 or more"
        )
    runs: list[SavedResults] = [run for path in arguments.runs for run in read_runs(path)]
    out = arguments.out or (None if arguments.json or arguments.published else "report.html")
    if out:
        options = PageOptions(
            root=arguments.root,
            gallery=arguments.gallery,
            top=arguments.top,
            num_workers=arguments.num_workers,
            resamples=arguments.resamples,
            mteb=tuple(arguments.mteb),
        )
        write_page(Path(out), runs, options)
        print(f"report: {out}", file=sys.stderr)
    if arguments.json:
        found: Any = recomputed_scores() if arguments.published else page_data(runs, arguments.resamples)
        print(json.dumps(found, indent=1))
    elif arguments.published:
        _print_published()
    if arguments.published:
        for slip in (*slips(), *WRONG_QUOTATIONS):
            print(f"slip of the paper: {slip}", file=sys.stderr)
        for claim in CORRELATIONS:
            if claim.holds is False:
                print(f"slip of the paper: {claim}", file=sys.stderr)
    return 0


def _print_published(names: Sequence[str] = (*AVERAGES, *ABILITIES)) -> None:
    console = _console()
    table = Table(title="Published models, abilities recomputed from their sets; * is printed otherwise")
    table.add_column("model", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    wrong = {(slip.model, slip.name) for slip in slips()}
    clip = set(models_of("CLIP-type"))
    for place, (model, row) in enumerate(recomputed_scores().items(), 1):
        cells = [f"{row[name]:.3f}{'*' if (model, name) in wrong else ''}" for name in names]
        table.add_row(model, *cells, end_section=place == len(clip))
    console.print(table)
    table = Table(title=f"Pearson correlations over {len(published_scores())} models and two subsets")
    for head in ("models", "pair", "claimed", "recomputed", "95% interval (Fisher z)"):
        table.add_column(head, no_wrap=True)
    for found in CORRELATIONS:
        low, high = found.interval
        claimed = "" if found.claimed is None else f"{'>= ' if found.at_least else ''}{found.claimed:.2f}"
        table.add_row(
            f"{found.models} ({found.count})",
            f"{found.first} - {found.second}",
            claimed,
            f"{found.value:.2f}" + ("" if found.holds in (True, None) else " (differs)"),
            f"[{low:.2f}, {high:.2f}]",
        )
    console.print(table)
