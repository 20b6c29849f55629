"""`gve uvrb run`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gve.eval.uvrb import ABILITIES, AVERAGES, RetrievalSet, UVRBReader, find_record
from gve.items import InputError

if TYPE_CHECKING:
    from gve.eval.run import SettingRun

WIDTH = 140  # columns of tables where the output is no terminal


def add_parsers(commands: Any) -> None:
    """Adds `run`."""
    run = commands.add_parser(
        "run",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="score any embedder on the sets of a folder",
        description="Encodes every distinct text, image and clip of the sets once, ranks and scores. Embeddings are "
        "kept: the same command goes on where it was interrupted, and encodes nothing when it is run again. Under "
        "torchrun or srun the ranks share the work and give the result of one. Exit 1 when a set is incomplete.",
    )
    run.add_argument("--model", required=True, help="a checkpoint of gve fit, a model's folder, or a hub name")
    run.add_argument("--root", required=True, help="folder of the sets, <root>/<NAME>/jsonl/...")
    run.add_argument("--sets", nargs="+", metavar="NAME", help="sets to run; all of UVRB that the root holds")
    run.add_argument("--out", default="runs/uvrb", help="folder of the results and embeddings")
    run.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[8],
        help="frames of a clip; several are test-time scaling, the first is combined with each number of tokens",
    )
    run.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[200],
        help="most vision tokens of a frame, of models that count them; several as with --frames",
    )
    run.add_argument("--grid", action="store_true", help="every number of frames with every number of tokens")
    run.add_argument("--max-length", type=int, default=8192, help="tokens of one input; longer texts lose their end")
    run.add_argument("--max-queries", type=int, help="most queries of a set, chosen by --seed; all when not given")
    run.add_argument("--seed", type=int, default=0, help="of the choice of queries")
    run.add_argument(
        "--whole-corpus", action="store_true", help="rank MS-TI and MS-TV against all clips too, beside the pools"
    )
    run.add_argument("--untrained", action="store_true", help="also score the base with its adapters off")
    run.add_argument(
        "--allow-incomplete", action="store_true", help="exit 0 where items could not be read; averages stay without"
    )
    run.add_argument(
        "--trec",
        type=int,
        nargs="?",
        const=100,
        default=0,
        metavar="DEPTH",
        help="also write TREC run and qrels files with DEPTH items a query (100 when no number is given)",
    )
    run.add_argument("--adapter", default="auto", help="how the model is used; auto: by its files and name")
    run.add_argument("--base", default="", help="where a checkpoint's base lies; where it was trained from when empty")
    run.add_argument("--device", help="torch device; the GPU of this rank where there is one, else cpu")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; bfloat16 on a GPU, else float32")
    run.add_argument("--attention", default="sdpa", help="kernel: sdpa, eager or flash_attention_2")
    run.add_argument("--batch-tokens", type=int, default=16384, help="most tokens of one forward pass, with padding")
    run.add_argument("--num-workers", type=int, help="processes that decode, of each rank; by its cores, at most 8")
    run.add_argument("--resamples", type=int, default=10000, help="bootstrap replicates behind every interval")
    run.add_argument("--json", action="store_true", help="print the scores as JSON")
    run.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    # Terminated as if interrupted: workers are told, drafts are not renamed.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _ranked_run(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _ranked_run(arguments: argparse.Namespace) -> int:
    """The run of this process' rank."""
    import torch

    from gve.encode.encoder import Execution, LoadedEncoder
    from gve.encode.pretrained import load_encoder
    from gve.encode.ranks import decode_workers, joined
    from gve.eval.run import BenchmarkRun, RunOptions, Setting, settings_of

    for name in ("max_queries", "trec", "resamples", "batch_tokens", "num_workers"):
        least = 0 if name in ("trec", "num_workers") else 1
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    settings = settings_of(arguments.frames, arguments.tokens, max_length=arguments.max_length, grid=arguments.grid)
    sets = _sets(arguments)
    with joined() as place:
        device = arguments.device or (f"cuda:{place.local_rank}" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        execution = Execution(
            device=device,
            dtype=arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
            attention=arguments.attention,
            batch_tokens=arguments.batch_tokens,
            num_workers=decode_workers(arguments.num_workers),
        )

        def load(setting: Setting) -> LoadedEncoder:
            return load_encoder(
                arguments.model,
                adapter=arguments.adapter,
                base=arguments.base,
                inputs=setting.inputs,
                execution=execution,
            )

        if place.rank == 0:
            _warn_of_missing(sets)
            if not sys.stdout.isatty():  # a log file gets lines where a terminal gets bars
                logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
                logging.getLogger("gve").setLevel(logging.INFO)
        benchmark = BenchmarkRun(
            arguments.model,
            load,
            sets,
            Path(arguments.out),
            RunOptions(
                untrained=arguments.untrained,
                whole_corpus=arguments.whole_corpus,
                trec=arguments.trec,
                resamples=arguments.resamples,
            ),
            facts={
                "root": os.path.abspath(arguments.root),
                "adapter": arguments.adapter,
                "base": arguments.base,
                "max_queries": arguments.max_queries,
                "seed": arguments.seed,
            },
            execution=execution,
        )
        try:
            runs = benchmark.run(settings)
        except torch.OutOfMemoryError:
            print(
                f"gve uvrb run: failed: {device} is out of memory; what is encoded is kept. Give fewer --batch-tokens "
                f"than {arguments.batch_tokens}",
                file=sys.stderr,
            )
            return 1
        if place.rank == 0:
            if arguments.json:
                _print_json(runs)
            else:
                _print_tables(runs, Path(arguments.out))
    return 0 if arguments.allow_incomplete or not any(run.incomplete for run in runs) else 1


def _sets(arguments: argparse.Namespace) -> list[RetrievalSet]:
    reader = UVRBReader(arguments.root)
    names = dict.fromkeys(find_record(name).name for name in arguments.sets) if arguments.sets else reader.names()
    sets = [reader.read(name) for name in names]
    if arguments.max_queries is not None:
        sets = [tested.subset(arguments.max_queries, arguments.seed) for tested in sets]
    return sets


def _warn_of_missing(sets: Sequence[RetrievalSet]) -> None:
    """Hours before the result, as the files are looked for first."""
    for tested in sets:
        if tested.missing:
            print(
                f"gve uvrb run: {tested.record.name} lacks {len(tested.missing)} files, {tested.missing[0]} among "
                "them; it will enter no average",
                file=sys.stderr,
            )


def _print_json(runs: Sequence[SettingRun]) -> None:
    settings = {}
    for run in runs:
        data = run.results.data
        settings[run.setting.name] = {
            "sets": {name: row["value"] for name, row in data["sets"].items()},
            "abilities": data["abilities"],
            "incomplete": run.incomplete,
            "encoded": run.encoded,
            "seconds": round(run.seconds, 1),
        }
        whole = {name: row["whole_corpus"]["value"] for name, row in data["sets"].items() if "whole_corpus" in row}
        if whole:
            settings[run.setting.name]["whole_corpus"] = whole
    print(json.dumps({"settings": settings, "complete": not any(run.incomplete for run in runs)}))


def _print_tables(runs: Sequence[SettingRun], out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for run in runs:
        console.print(_set_table(run))
    if any(value is not None for run in runs for value in run.results.abilities.values()):
        console.print(_ability_table(runs))
    for run in runs:
        if run.same_as:
            console.print(f"{run.setting.name} is {run.same_as} to this model: nothing that differs reaches it.")
        for name, row in run.results.data["sets"].items():
            for line in row["missing"][:5]:
                console.print(f"{run.setting.name}, {name}: unread {line}", markup=False)
            if len(row["missing"]) > 5:
                console.print(f"{run.setting.name}, {name}: and {len(row['missing']) - 5} more, see uvrb.json")
            for note in row["notes"]:
                console.print(f"{run.setting.name}, {name}: {note}", markup=False)
        console.print(f"{run.setting.name}: {run.encoded} contents encoded, {run.seconds:.0f} s")
    console.print(f"results: {out}", markup=False)


def _set_table(run: SettingRun) -> Table:
    table = Table(title=f"{run.setting.name}: sets, 95% intervals over queries", title_justify="left")
    for place, head in enumerate(("set", "queries", "candidates", "metric", "score", "ties", "chance", "")):
        table.add_column(head, justify="left" if place in (0, 3, 7) else "right", no_wrap=True)
    for name, row in run.results.data["sets"].items():
        score = run.results.scores[name]
        lines = [(name, row, score.tested.record.metric_label)]
        if "whole_corpus" in row:
            lines.append((f"{name}, whole corpus", row["whole_corpus"], f"R@{score.tested.record.k}"))
        for label, values, metric in lines:
            tied = values["optimistic"] > values["pessimistic"]
            table.add_row(
                label,
                str(values["n_query"]),
                str(values["n_candidates"]),
                metric,
                f"{values['value']:.3f} [{values['interval'][0]:.3f}, {values['interval'][1]:.3f}]",
                f"{values['pessimistic']:.3f} to {values['optimistic']:.3f}" if tied else "",
                f"{values['chance']:.3f}",
                "" if row["complete"] else f"incomplete, {len(row['missing'])} unread",
            )
    return table


def _ability_table(runs: Sequence[SettingRun]) -> Table:
    table = Table(title="abilities", title_justify="left")
    table.add_column("ability", no_wrap=True)
    for run in runs:
        table.add_column(run.setting.name, justify="right", no_wrap=True)
    table.add_column("chance", justify="right")
    chance = runs[0].results.chance
    for number, name in enumerate((*AVERAGES, *ABILITIES), 1):
        cells = []
        for run in runs:
            value, bounds = run.results.data["abilities"][name], run.results.data["ability_intervals"][name]
            cells.append("-" if value is None else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]")
        last = "-" if chance[name] is None else f"{chance[name]:.3f}"
        table.add_row(name, *cells, last, end_section=number == len(AVERAGES))
    return table
