"""Jobs on a real SLURM of this machine: requeue, preemption, a lost node, arrays, chains. `bash tests/run.sh slurm`.

tests/slurm_local.sh brings up munged, slurmctld and four nodes. All fits train the same twelve steps on two nodes of
one process each (gloo); whatever happens to one, its losses and rows must be those of the run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from gve.sweep.collect import METRICS, VOLATILE, Row, collect
from gve.sweep.crew import Site, read_state
from gve.sweep.plan import read_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "slurm_local.sh"
PATIENCE_S = 800  # of a job that takes 20 s on a quiet machine of two cores


def why_not() -> str:
    """What is missing for a SLURM on this machine."""
    missing = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path=_PATH)]
    missing += [name for name in ("sbatch", "unshare") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """Four nodes of two cores, n1 to n4."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self("up", "4", str(port))

    def __call__(self, command: str, *words: str) -> None:
        # Time enough for a save on a machine that is busy with other tests.
        environment = {**os.environ, "GRACE": "60", "KILL_WAIT": "30"}
        call = [SCRIPT, command, self.folder, *words]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows about a job."""
        text = subprocess.check_output(["scontrol", "-o", "show", "job", number], text=True)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: str, *states: str, seconds: float = PATIENCE_S) -> dict[str, str]:
        """Waits for one of the states; the test fails with the job's log where another end comes."""
        end = time.monotonic() + seconds
        while True:
            about = self.job(number)
            if about["JobState"] in states:
                return about
            over = about["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if over or time.monotonic() > end:
                log = Path(about.get("StdOut", "/dev/null"))
                raise AssertionError(
                    f"{about['JobState']} {about['ExitCode']}\n" + (log.read_text() if log.is_file() else "")
                )
            time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path("/tmp") / f"gve-slurm-{os.getpid()}"  # short, for the unix sockets in it
    slurm = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            slurm = Cluster(folder, 20000 + os.getpid() % 10000)
            yield slurm
        finally:
            subprocess.run([SCRIPT, "down", folder], check=False, timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def place(recipe: Path, tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """Where jobs are submitted from: a recipe that records its steps, and a site file for pairs of nodes."""
    folder = tmp_path_factory.mktemp("cluster")
    settings = yaml.safe_load(recipe.read_text())
    settings["trainer"]["logger"] = False
    settings["data"] |= {"dev_pairs": 1, "batch_size": 2, "num_workers": 1}
    settings["uvrb"] |= {"root": None}
    settings |= {"record": {"steps": True}, "probe": {"enabled": False}}
    (folder / "fit.yaml").write_text(yaml.safe_dump(settings))
    setup = (
        "export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="
    )
    for name, nodes in {"any": "", "low": "n[1-2]", "high": "n[3-4]"}.items():
        site = {"gpus": "", "python": sys.executable, "setup": [setup, f"export PYTHONPATH={ROOT / 'tests'}"]}
        if nodes:
            site["sbatch"] = [f"--nodelist={nodes}"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(site))
    return folder


def gve(place: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """`gve slurm ...` as a user types it in `place`."""
    return run_gve(place, "slurm", *words)


def run_gve(place: Path, *words: Any, code: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`gve ...` as a user types it in `place`, by this code or by that of a submission."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    if code is not None:
        environment |= {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gve", *map(str, words)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def submit(place: Path, *words: Any, site: str = "any") -> str:
    """The job's number."""
    own = ("--site", f"{site}.yaml", "--time", "20:00", "--cpus-per-task", 1, "--parsable")
    done = gve(place, words[0], *own, *words[1:])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fit(place: Path, run: str, *words: Any, site: str = "any", nodes: int = 2) -> str:
    own = ("--config", "fit.yaml", "--run", f"runs/{run}", "--nodes", nodes, "--devices", 1)
    return submit(place, "fit", *own, *words, site=site)


HOLD = ("--trainer.callbacks+=runs.Hold",)


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, place: Path) -> dict[int, list[dict[str, Any]]]:
    """Twelve steps of two ranks on two nodes, never stopped."""
    job = fit(place, "undisturbed")
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "0"
    history = runs.history(place / "runs/undisturbed", 2)
    assert list(history) == list(range(12))
    return history


def attempts(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["attempts"]


def test_a_fit_on_two_nodes_and_what_it_leaves(
    undisturbed: dict[int, list[dict[str, Any]]], cluster: Cluster, place: Path
) -> None:
    run = place / "runs/undisturbed"
    assert undisturbed[0][0]["rows"] != undisturbed[0][1]["rows"]  # each node has its own share of a batch
    (log,) = run.glob("slurm/fit/*.log")
    assert "attempt 0 of job" in log.read_text()
    logs = sorted(run.glob("slurm/fit/logs/*-0/*.log"))
    assert [path.name for path in logs] == ["rank-0.log", "rank-1.log"]
    assert "MEMBER: 1/2" in logs[0].read_text()
    assert "MEMBER: 2/2" in logs[1].read_text()
    (submission,) = run.glob("slurm/fit/submitted/*")
    frozen = yaml.safe_load((submission / "config.yaml").read_text())
    assert (frozen["trainer"]["num_nodes"], int(frozen["trainer"]["devices"])) == (2, 1)
    entry = attempts(run)[-1]
    assert (entry["status"], entry["world_size"]) == ("done", 2)
    assert entry["commit"] == json.loads((submission / "code" / "snapshot.json").read_text())["commit"]
    # A finished run is not done again: neither through gve nor by its script.
    marker = (run / "slurm/fit/done").read_text()
    words = ("fit", "--config", "fit.yaml", "--run", "runs/undisturbed", "--nodes", 2, "--devices", 1)
    again = gve(place, *words, "--site", "any.yaml", "--time", "20:00", "--cpus-per-task", 1)
    assert (again.returncode, again.stdout) == (0, "")
    assert "done already" in again.stderr
    sent = ["sbatch", "--parsable", str(submission / "job.sbatch"), str(submission)]
    job = subprocess.check_output(sent, cwd=place, text=True).strip()
    about = cluster.wait(job, "COMPLETED", seconds=60)
    assert "done already" in (place / f"runs/undisturbed/slurm/fit/{job}.log").read_text()
    assert about["ExitCode"] == "0:0"
    assert (run / "slurm/fit/done").read_text() == marker
    assert len(attempts(run)) == 1


def test_two_runs_at_once_one_signalled_one_preempted(
    undisturbed: dict[int, list[dict[str, Any]]], cluster: Cluster, place: Path
) -> None:
    """USR1 to one; TERM and no user signal to the other, as a job wants its nodes. Both go on as if never stopped."""
    numbers = {
        "signalled": fit(place, "signalled", *HOLD, site="low"),
        "preempted": fit(place, "preempted", *HOLD, site="high"),
    }
    folders = {name: place / "runs" / name for name in numbers}
    until(lambda: all((folder / "holding").exists() for folder in folders.values()))
    subprocess.run(["scancel", "-s", "USR1", numbers["signalled"]], check=True)
    wanted = ["sbatch", "--parsable", "-p", "urgent", "--exclusive", "--nodelist=n[3-4]", "-N2", "--wrap", "true"]
    urgent = subprocess.check_output([*wanted, "--output=/dev/null"], text=True).strip()
    time.sleep(2)  # both have noted it, in the middle of a step
    for folder in folders.values():
        (folder / "go").touch()
    for name, number in numbers.items():
        about = cluster.wait(number, "COMPLETED")
        assert (about["Restarts"], about["Requeue"]) == ("1", "1")
        found = attempts(folders[name])
        by = {"signalled": "SIGUSR1", "preempted": "SIGTERM"}[name]
        assert [entry["status"] for entry in found] == [f"preempted: stopped by {by}, state saved", "done"]
        assert [entry["first_step"] for entry in found] == [0, 4]
        assert found[1]["resumed_from"] == f"runs/{name}/checkpoints/last.ckpt"
        assert runs.history(folders[name], 2) == undisturbed
        assert {path.name[-2:] for path in (folders[name] / "slurm/fit/logs").iterdir()} == {"-0", "-1"}
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    ports = [
        re.findall(r"rendezvous \S+:(\d+)", next(folder.glob("slurm/fit/*.log")).read_text())
        for folder in folders.values()
    ]
    assert [len(found) for found in ports] == [2, 2]
    assert len({port for found in ports for port in found}) == 4


def test_a_lost_node_costs_what_came_after_the_last_timed_save(
    undisturbed: dict[int, list[dict[str, Any]]], cluster: Cluster, place: Path
) -> None:
    """No signal and no exit code comes from a node without power. The job starts again on the nodes that are left."""
    timed = ("--checkpoint.every_n_train_steps", 0, "--checkpoint.every_n_minutes", 0.0001)
    job = fit(place, "lost", *HOLD, *timed)
    run = place / "runs/lost"
    until(lambda: (run / "holding").exists())
    victim = "n2"  # not the one with the batch shell
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    try:
        cluster("fail", victim)
        (run / "go").touch()
        about = cluster.wait(job, "COMPLETED")
    finally:
        cluster("restore", victim)
    assert about["Restarts"] == "1"
    assert (
        victim not in subprocess.check_output(["scontrol", "show", "hostnames", about["NodeList"]], text=True).split()
    )
    found = attempts(run)
    # The lost rank was at its fourth step; three were done and saved by the clock.
    assert [entry["first_step"] for entry in found] == [0, 3]
    assert found[1]["status"] == "done"
    assert runs.history(run, 2) == undisturbed


def test_a_chain_scores_what_was_trained_and_ends_where_training_fails(
    cluster: Cluster, place: Path, toy_world: Path, recipe: Path
) -> None:
    """afterok: fit on one node, then the benchmark of its checkpoint by two ranks on two nodes."""
    job = fit(place, "chain", nodes=1)
    uvrb = ("--run", "runs/chain-uvrb", "--nodes", 2, "--cpu", "--model", "runs/chain/checkpoints/last.ckpt")
    uvrb += ("--root", toy_world / "uvrb", "--sets", "MSRVTT", "--frames", 2, "--tokens", 4, "--num-workers", 0)
    scored = submit(place, "uvrb", *uvrb, "--resamples", 100, "--after", job)
    assert cluster.job(scored)["Dependency"].startswith(f"afterok:{job}")
    cluster.wait(job, "COMPLETED")
    cluster.wait(scored, "COMPLETED")
    (result,) = (place / "runs/chain-uvrb").glob("*/uvrb.json")
    assert set(json.loads(result.read_text())["sets"]) == {"MSRVTT"}
    # What comes after a job that fails is cancelled, not left waiting for ever.
    failed = subprocess.check_output(["sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 3"], text=True).strip()
    never = submit(place, "uvrb", *uvrb, "--after", failed)
    cluster.wait(never, "CANCELLED", seconds=60)


def test_a_sweep_by_an_array_gives_the_table_of_a_local_one(cluster: Cluster, place: Path, toy_world: Path) -> None:
    """Two cells by two tasks. One cell fails; the same command does it alone once its shards are there."""
    file = place / "sweep" / "sweep.yaml"
    file.parent.mkdir()
    small = {"trainer": {"max_epochs": 1}, "data": {"steps_per_epoch": 2}, "uvrb": {"root": str(toy_world / "uvrb")}}
    cells = {"good": {}, "late": {"set": {"data": {"root": str(place / "later")}, "model": {"temperature": 0.2}}}}
    small["uvrb"] |= {"untrained": False}
    file.write_text(
        yaml.safe_dump({"configs": ["../fit.yaml"], "seeds": [3], "set": small, "cells": cells}, sort_keys=False)
    )

    def rows(out: str) -> list[Row]:
        return collect(read_sweep(file), Site(place / out))

    def by_slurm() -> str:
        return submit(place, "sweep", "--run", "runs/sweep", "--cpu", "--array", 2, "sweep/sweep.yaml", "--out", "out")

    first = by_slurm()
    cluster.wait(f"{first}_0", "COMPLETED")
    assert cluster.wait(f"{first}_1", "FAILED")["ExitCode"] == "1:0"
    good, late = rows("out")
    assert good.done
    assert late.facts["state"] == "failed"
    assert f"{place / 'later'}" in late.facts["reason"]
    (place / "later").symlink_to(toy_world / "shards")
    second = by_slurm()
    for task in (0, 1):
        cluster.wait(f"{second}_{task}", "COMPLETED")
    state = place / "runs/sweep/slurm/sweep"
    assert "done already" in (state / f"{second}_0.log").read_text()
    assert [
        read_state(place / "out" / row.facts["sweep"] / row.facts["run"])["steps"]["fit"]["attempts"]
        for row in rows("out")
    ] == [1, 2]

    (submission,) = state.glob("submitted/*")
    done = run_gve(place, "sweep", "run", "sweep/sweep.yaml", "--out", "here", code=submission / "code")
    assert done.returncode == 0, done.stderr
    tables = [
        [({key: value for key, value in row.facts.items() if key not in VOLATILE}, row.scores) for row in rows(out)]
        for out in ("out", "here")
    ]
    assert tables[0] == tables[1]
    assert all(len(scores) == len(METRICS) for _, scores in tables[0])
    assert tables[0][0][1] != tables[0][1][1], "cells of one score would not show a mix-up"
    commit = json.loads((submission / "code" / "snapshot.json").read_text())["commit"]
    assert {facts["commit"].rstrip("+") for facts, _ in tables[0]} == {commit["hash"][:12]}


# ------------------------------------------------------------------------------------- what the batch script decides


STAND_IN = """#!/usr/bin/env bash
# In place of python -m gve: says who it is and does what its last words ask for.
shift 2 # -m gve
echo "started $SLURM_PROCID restart ${SLURM_RESTART_COUNT:-0}"
case $* in
  *wait*) trap 'exit 85' TERM USR1; sleep 300 & wait ;;
  *odd*) [ $(( SLURM_ARRAY_TASK_ID % 2 )) -eq 0 ] || [ -f mended ] ;;
  *fail*) exit 3 ;;
  *early*) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exec sleep 300 ;; # dies of USR1, as python does in its imports
esac
"""


@pytest.fixture(scope="module")
def stand_in(place: Path) -> Path:
    """A folder whose site runs the stand-in: decisions about signals and exit codes need no training."""
    program = place / "stand-in"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    (place / "stand-in.yaml").write_text(yaml.safe_dump({"gpus": "", "python": str(program)}))
    return place


def synth(place: Path, what: str, *words: Any) -> str:
    return submit(place, "synth", "--run", f"runs/{what}", "--cpu", "--config", what, *words, site="stand-in")


def test_who_is_requeued_and_who_is_not(cluster: Cluster, stand_in: Path) -> None:
    def log(what: str, number: str) -> str:
        return (stand_in / f"runs/{what}/slurm/synth/{number}_0.log").read_text()

    capped = synth(stand_in, "wait", "--max-restarts", 1)
    cancelled = synth(stand_in, "waiting")
    limited = synth(stand_in, "wait-for-the-limit", "--time", "1:00", "--signal-lead", 0)
    failed, early = synth(stand_in, "fail"), synth(stand_in, "early")
    started = {name: stand_in / f"runs/{name}/slurm/synth/logs" for name in ("wait", "waiting", "early")}
    until(lambda: all(list(folder.glob("*-0/rank-0.log")) for folder in started.values()))
    time.sleep(1)
    for number in (capped, early):
        subprocess.run(["scancel", "-s", "USR1", f"{number}_0"], check=True)
    subprocess.run(["scancel", f"{cancelled}_0"], check=True)
    # A failure is a failure: nothing is started again.
    about = cluster.wait(f"{failed}_0", "FAILED", seconds=60)
    assert (about["ExitCode"], about["Restarts"]) == ("3:0", "0")
    # Killed by the signal before it could save: started again, and done.
    assert cluster.wait(f"{early}_0", "COMPLETED", seconds=60)["Restarts"] == "1"
    assert "stopped (exit code 138), requeued" in log("early", early)
    # Saved and stopped: started again, once, as it is capped.
    until(lambda: bool(list(started["wait"].glob("*-1/rank-0.log"))), 60)
    time.sleep(1)
    subprocess.run(["scancel", "-s", "USR1", f"{capped}_0"], check=True)
    about = cluster.wait(f"{capped}_0", "FAILED", seconds=60)
    assert (about["ExitCode"], about["Restarts"]) == ("85:0", "1")
    assert "submit it again to go on" in log("wait", capped)
    # Cancelled by its user: it saves, and stays cancelled. A requeue would have brought it back.
    assert cluster.wait(f"{cancelled}_0", "CANCELLED", seconds=60)["Restarts"] == "0"
    assert "the job is COMPLETING: SLURM requeues it, or it was cancelled" in log("waiting", cancelled)
    # Out of time, TERM only: SLURM looks every 30 s.
    until(lambda: cluster.job(f"{limited}_0")["Restarts"] == "1", 150)
    subprocess.run(["scancel", limited], check=True)
    assert "DUE TO TIME LIMIT" in log("wait-for-the-limit", limited)
    assert "stopped (exit code 85), requeued" in log("wait-for-the-limit", limited)
    assert cluster.wait(f"{cancelled}_0", "CANCELLED", seconds=10)["Restarts"] == "0"  # still


def test_a_failed_task_of_an_array_is_done_by_the_same_command(cluster: Cluster, stand_in: Path) -> None:
    """Tasks that are done end at once; two arrays of one run folder wait for each other."""
    words = ("--array", 4, "--throttle", 2)
    first, second = synth(stand_in, "odd", *words), synth(stand_in, "odd", *words)
    for task, state in enumerate(("COMPLETED", "FAILED", "COMPLETED", "FAILED")):
        cluster.wait(f"{first}_{task}", state, seconds=60)
        cluster.wait(f"{second}_{task}", state, seconds=60)
    seen = [cluster.job(f"{number}_{task}") for number in (first, second) for task in range(4)]
    assert max(about["EndTime"] for about in seen[:4]) <= min(about["StartTime"] for about in seen[4:])
    state = stand_in / "runs/odd/slurm/synth"
    assert {path.name for path in state.glob("done-*")} == {"done-0", "done-2"}
    (stand_in / "mended").touch()
    third = synth(stand_in, "odd", *words)
    for task in range(4):
        cluster.wait(f"{third}_{task}", "COMPLETED", seconds=60)
    began = {path.parent.name for path in state.glob("logs/*/rank-0.log")}
    assert {name for name in began if name.startswith(f"{third}_")} == {f"{third}_1-0", f"{third}_3-0"}
    done = gve(stand_in, "synth", "--run", "runs/odd", "--cpu", "--config", "odd", *words, "--site", "stand-in.yaml")
    assert "done already" in done.stderr
