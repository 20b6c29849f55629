"""A job as a batch script: sbatch lines, the command, and a body that is the same for all (batch.sh)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files

from gve.slurm.job import KINDS, Job, Site

# After the first process has ended, the others may go on for this long. It must exceed SlurmdTimeout (300 s): where a
# node is lost, SLURM has to notice before srun gives up, or the job fails instead of being requeued. For the same
# reason there is no --kill-on-bad-exit.
_WAIT_S = 900

_RENDEZVOUS = """\
# Each attempt of each job meets at a port of its own, below those that the system hands out.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 8) % 22760))"""


def render(job: Job, site: Site, command: Sequence[str]) -> str:
    """The batch script of a job, as sbatch takes it.

    Args:
        command: the words that make it again, named in its first comment.
    """
    lines = [
        "#!/usr/bin/env bash",
        f"# {shlex.join(command)}",
        f"# By hand: mkdir -p {job.state} first, then sbatch this file; it then runs the code that is installed.",
        *(f"#SBATCH {option}" for option in _options(job, site)),
        "# shellcheck disable=SC1091 # files that the lines of the site source",
        f"state={job.state}",
        f"max_restarts={job.max_restarts}",
        "",
        _RENDEZVOUS,
        "",
    ]
    if site.setup:
        lines += ["set -e", *site.setup, "set +e", ""]
    lines += [*_command(job), "", *_start(job, site), ""]
    return "\n".join(lines) + files("gve.slurm").joinpath("batch.sh").read_text()


def _options(job: Job, site: Site) -> list[str]:
    """What follows #SBATCH."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        f"--cpus-per-task={job.cpus_per_task}",
        f"--time={job.time}",
    ]
    # All GPUs of the node for all its processes: GPUs bound to one process each cannot reach their neighbours directly.
    if job.accelerator == "gpu" and site.gpus:
        options.append(site.gpus.format(devices=job.devices))
    for name in ("mem", "partition", "account", "qos"):
        value = getattr(job, name) or getattr(site, name, "")
        if value:
            options.append(f"--{name}={value}")
    if job.array:
        options.append(f"--array=0-{job.array - 1}" + (f"%{job.throttle}" if job.throttle else ""))
    if job.signal_lead_s:
        # To the tasks; "B:" would signal the batch shell alone.
        options.append(f"--signal=USR1@{job.signal_lead_s}")
    # singleton: of jobs with this name one runs at a time, so two never share a run folder.
    options += ["--requeue", "--open-mode=append", "--dependency=singleton", "--kill-on-invalid-dep=yes"]
    options.append(f"--output={job.state}/{'%A_%a' if job.array else '%j'}.log")
    return [*options, *site.sbatch]


def _command(job: Job) -> list[str]:
    """The shell array `command`: the words after `gve`."""
    kind = KINDS[job.kind]
    if not kind.trainer:
        return [f"command=({shlex.join([*kind.command, *job.given_words, *job.own_words])})"]
    given = [word for path in job.configs for word in ("--config", path)]
    return [
        f"command=({shlex.join([*kind.command, *given, *job.given_words])})",
        f'[ -z "${{1:-}}" ] || command=({shlex.join(kind.command)} --config "$1/config.yaml") # as it was submitted',
        f"command+=({shlex.join(job.own_words)})",
    ]


def _start(job: Job, site: Site) -> list[str]:
    """The shell function `start`: it runs the command and gives its exit code."""
    # srun does not take --cpus-per-task over from sbatch since SLURM 22.05.
    launch = shlex.join(["srun", f"--cpus-per-task={job.cpus_per_task}", f"--wait={_WAIT_S}", *site.srun])
    gve = f'{shlex.quote(site.python)} -m gve "${{command[@]}}"'
    if KINDS[job.kind].driver:
        call = f'{gve} --launch {shlex.quote(launch)} >"$logs/driver.log" 2>&1'
    else:
        call = f'{launch} --output="$logs/rank-%t.log" {gve}'
    return ["start() {", f"  exec {call}", "}"]
