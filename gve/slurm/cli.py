"""`gve slurm fit | validate | uvrb | sweep | synth`: a command of gve as a job of a cluster."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gve.items import InputError
from gve.slurm.job import KINDS, Job, read_site
from gve.slurm.render import render
from gve.slurm.submit import SubmitError, finished, submit

_ABOUT = {
    "fit": "train; goes on from the run's newest checkpoint after a requeue",
    "validate": "dev split and UVRB of the run's best checkpoint, or of --ckpt_path",
    "uvrb": "the benchmark of any embedder, on all processes",
    "sweep": "many runs from one file, shared by the tasks of an array",
    "synth": "V-SynFlow, shared by the tasks of an array",
}


def main(argv: Sequence[str]) -> int:
    """Prints or submits a job.

    Args:
        argv: the words after `gve slurm`.

    Returns:
        0 printed, submitted or done already; 1 sbatch has refused it.

    Raises:
        InputError: the words, the site file or the configuration cannot be used.
    """
    arguments, words = _parser().parse_known_args(argv)
    words = [word for word in words if word != "--"]
    site = read_site(arguments.site)
    job = _job(arguments, words)
    script = render(job, site, ["gve", "slurm", *argv])
    if arguments.dry_run:
        print(script, end="")
        return 0
    frozen = _frozen(job)
    if finished(job, frozen):
        print(f"{job.folder}: done already; remove {job.state}/done* to do it again", file=sys.stderr)
        return 0
    try:
        number, folder = submit(job, script, frozen, arguments.after)
    except SubmitError as error:
        print(f"gve slurm {job.kind}: failed: {error}", file=sys.stderr)
        return 1
    log = f"{job.state}/{number}{'_<task>' if job.array else ''}.log"
    if arguments.json:
        facts = {"job": number, "run": job.folder, "submission": str(folder), "log": log}
        print(json.dumps(facts))
    elif arguments.parsable:
        print(number)
    else:
        size = f"{job.nodes} x {job.devices}" + (f", {job.array} tasks" if job.array else "")
        print(f"job {number}: {job.kind} in {job.folder} on {size}; log {log}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve slurm",
        description="Submits a command of gve to SLURM, or prints its batch script. Words that are not listed under a "
        "job are those of the command itself.",
    )
    commands = parser.add_subparsers(dest="kind", required=True)
    for kind, about in _ABOUT.items():
        options = commands.add_parser(
            kind,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
            help=about,
            usage=f"gve slurm {kind} [OPTION ...] WORD ... (the words of gve {shlex.join(KINDS[kind].command)})",
            description=about,
        )
        _add_options(options, kind)
    return parser


def _add_options(options: argparse.ArgumentParser, kind: str) -> None:
    trainer, arrays = KINDS[kind].trainer, not KINDS[kind].ranks or KINDS[kind].driver
    if trainer:
        options.add_argument("--config", action="append", default=[], help="recipe; several are laid over each other")
    options.add_argument(
        "--run",
        required=not trainer,
        help="run folder, which names the run over requeues and resubmissions"
        + ("; runs/<name of the last --config> when not given" if trainer else ""),
    )
    own = "; as the recipe says when not given" if trainer else ""
    if KINDS[kind].ranks:
        options.add_argument("--nodes", type=int, default=None if trainer else 1, help=f"machines{own}")
    options.add_argument(
        "--devices", type=int, default=None if trainer else 1, help=f"GPUs of a node, without GPUs processes{own}"
    )
    if trainer:
        options.add_argument("--strategy", default="", help="of the Trainer; the recipe's own, ddp for many devices")
    else:
        options.add_argument("--cpu", action="store_true", help="ask for no GPUs")
    options.add_argument("--time", default=Job.time, help="limit of one attempt, [days-]hours:minutes:seconds")
    options.add_argument("--cpus-per-task", type=int, default=Job.cpus_per_task, help="cores of each process")
    options.add_argument("--mem", default="", help="memory of a node, such as 200G; what the cluster gives when empty")
    for name in ("partition", "account", "qos"):
        options.add_argument(f"--{name}", default="", help="as of sbatch; that of the site file when empty")
    if arrays:
        options.add_argument("--array", type=int, default=1, help="tasks that share the work")
        options.add_argument("--throttle", type=int, default=0, help="most of them at a time; 0: no bound")
    options.add_argument(
        "--signal-lead",
        type=int,
        default=Job.signal_lead_s,
        metavar="SECONDS",
        help="how long before the limit the run is asked to save and stop: at least twice a save and a step",
    )
    options.add_argument("--max-restarts", type=int, default=Job.max_restarts, help="requeues, for whatever reason")
    options.add_argument(
        "--after", action="append", default=[], metavar="JOB", help="begin when this job has succeeded; repeatable"
    )
    options.add_argument("--site", default="slurm/site.yaml", help="what differs between clusters")
    options.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    form = options.add_mutually_exclusive_group()
    form.add_argument("--parsable", action="store_true", help="print the job's number only")
    form.add_argument("--json", action="store_true", help="print the job's number and places as JSON")


def _job(arguments: argparse.Namespace, words: list[str]) -> Job:
    """The record of what was asked for."""
    common: dict[str, Any] = {
        "kind": arguments.kind,
        "words": tuple(words),
        "time": arguments.time,
        "cpus_per_task": arguments.cpus_per_task,
        "mem": arguments.mem,
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
        "signal_lead_s": arguments.signal_lead,
        "max_restarts": arguments.max_restarts,
    }
    if KINDS[arguments.kind].trainer:
        return _trainer_job(arguments, common)
    if arguments.kind == "uvrb":
        from gve.uvrb_cli import parse

        parse(["run", *words, "--out", arguments.run])  # exits with 2 where the words are wrong
    common |= {"array": arguments.array, "throttle": arguments.throttle} if "array" in arguments else {}
    common |= {"nodes": arguments.nodes} if "nodes" in arguments else {}
    accelerator = "cpu" if arguments.cpu else "gpu"
    return Job(folder=arguments.run, devices=arguments.devices, accelerator=accelerator, **common)


def _trainer_job(arguments: argparse.Namespace, common: dict[str, Any]) -> Job:
    from gve.lightning_cli import resolve

    if not arguments.config:
        raise InputError(f"gve slurm {arguments.kind}: give a recipe by --config")
    folder = arguments.run or f"runs/{Path(arguments.config[-1]).stem}"
    common |= {"configs": tuple(arguments.config), "folder": folder}
    # The record first: it refuses words that the job sets itself.
    trainer = resolve(_words(Job(**common)))[0].trainer
    nodes, devices = arguments.nodes or trainer.num_nodes, arguments.devices or trainer.devices
    if not isinstance(devices, int) and not str(devices).isdigit():
        raise InputError(f"trainer.devices={devices}: how many devices a node gives must be known, by --devices")
    strategy = arguments.strategy
    if not strategy and trainer.strategy == "auto" and nodes * int(devices) > 1:
        strategy = "ddp"
    accelerator = "cpu" if trainer.accelerator == "cpu" else "gpu"
    return Job(**common, nodes=nodes, devices=int(devices), strategy=strategy, accelerator=accelerator)


def _words(job: Job) -> list[str]:
    """The words of a fit or validate as they were given."""
    return [job.kind, *(word for path in job.configs for word in ("--config", path)), *job.words]


def _frozen(job: Job) -> str:
    """The resolved configuration of a fit or validate, YAML; empty for other jobs."""
    if not KINDS[job.kind].trainer:
        return ""
    from gve.lightning_cli import resolve

    return resolve([*_words(job), *job.own_words])[1]
