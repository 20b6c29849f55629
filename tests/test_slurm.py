"""`gve slurm`: one record gives the sbatch lines and the command's arguments; what is submitted is frozen.

The scripts run on a real SLURM in test_slurm_cluster.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from gve.cli import main
from gve.items import InputError
from gve.slurm import cli as slurm_cli
from gve.slurm.job import KINDS, Job, Site, read_site, seconds_of
from gve.slurm.render import render
from gve.slurm.submit import finished, freeze

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def lines(script: str) -> dict[str, str]:
    """Option -> value of the #SBATCH lines."""
    found = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def command_of(script: str, folder: str = "") -> list[str]:
    """The words after `gve` that a script runs, worked out by bash; `folder` is its argument."""
    start = script.index("command=(")
    text = script[start : script.index("\nstart() {")] + '\nprintf "%s\\n" "${command[@]}"'
    done = subprocess.run(["bash", "-c", text, "script", folder], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# ------------------------------------------------------------------------------------------------------------ rendering


def test_every_kind_of_job_has_a_committed_script() -> None:
    assert {path.stem for path in SCRIPTS} == set(KINDS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_committed_scripts_are_what_the_renderer_gives(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names the command that makes it in its second line."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(path.read_text().splitlines()[1].removeprefix("# gve slurm "))
    assert words[0] == path.stem
    assert slurm_cli.main(words) == 0
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    """Every batch script and shell file of the project; batch.sh is the end of each batch script."""
    paths = [path for folder in ("experiments", "gve", "tests") for path in sorted((ROOT / folder).rglob("*.sh"))]
    paths = [*SCRIPTS, *(path for path in paths if path.name != "batch.sh")]
    assert {"quickstart.sh", "run.sh", "slurm_local.sh", "environment.sh"} <= {path.name for path in paths}
    done = subprocess.run(["shellcheck", "-x", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (1, 8), (4, 8), (3, 2)])
def test_sbatch_and_trainer_are_of_one_size(nodes: int, devices: int) -> None:
    for kind in KINDS:
        if nodes > 1 and not KINDS[kind].ranks:
            continue
        job = Job(kind, "runs/a", nodes=nodes, devices=devices, configs=("a.yaml",) if KINDS[kind].trainer else ())
        script = render(job, Site(), ["gve"])
        options, words = lines(script), command_of(script)
        assert (options["nodes"], options["gpus-per-node"]) == (str(nodes), str(devices))
        # One process a device where there are ranks; a task of synth has all devices for itself.
        assert options["ntasks-per-node"] == str(devices if KINDS[kind].ranks else 1)
        if KINDS[kind].trainer:
            given = dict(pairwise(words))
            assert (given["--trainer.num_nodes"], given["--trainer.devices"]) == (str(nodes), str(devices))
            assert given["--trainer.default_root_dir"] == "runs/a"
        if kind == "sweep":
            assert {f"trainer.num_nodes={nodes}", f"trainer.devices={devices}"} <= set(words[words.index("--set") :])


def test_a_submitted_fit_runs_the_frozen_configuration_and_no_word_twice() -> None:
    words = ("--trainer.callbacks+=runs.Fault", "--data.root", "a folder")
    job = Job("fit", "runs/a", words=words, configs=("a.yaml", "b.yaml"), strategy="ddp")
    script = render(job, Site(), ["gve"])
    own = ["--trainer.num_nodes", "1", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    own += ["--trainer.default_root_dir", "runs/a", "--ckpt_path", "auto"]
    assert command_of(script) == ["fit", "--config", "a.yaml", "--config", "b.yaml", *words, *own]
    assert command_of(script, "/frozen here") == ["fit", "--config", "/frozen here/config.yaml", *own]


def test_what_a_site_says_stands_in_every_script(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    values = {
        "partition": "a100",
        "gpus": "--gres=gpu:{devices}",
        "sbatch": ["--constraint=ib"],
        "srun": ["--mpi=none"],
    }
    path.write_text(yaml.safe_dump(values | {"setup": ["module load cuda"], "python": "/opt/python", "account": 7}))
    site = read_site(path)
    job = Job("uvrb", "runs/a", devices=4, account="mine", array=0)
    options = lines(render(job, site, ["gve"]))
    assert options["partition"] == "a100"
    assert options["account"] == "mine"  # the job's own before the site's
    assert lines(render(replace(job, account=""), site, ["gve"]))["account"] == "7"
    assert options["gres"] == "gpu:4"
    assert options["constraint"] == "ib"
    assert "gpus-per-node" not in options
    script = render(job, site, ["gve"])
    assert "\nmodule load cuda\n" in script
    assert re.search(r"exec srun .*--mpi=none .*/opt/python -m gve", script)
    assert "gres" not in lines(render(replace(job, accelerator="cpu"), site, ["gve"]))


def test_ports_of_jobs_and_attempts_differ() -> None:
    """2,845 jobs in a row and eight attempts of each; all below 32768, where Linux hands out ports, and above 10000."""
    script = render(Job("uvrb", "runs/a"), Site(), ["gve"])
    formula = re.search(r"MASTER_PORT=(\$\(\(.*\)\))", script)
    assert formula
    code = "for SLURM_JOB_ID in $(seq 70000 500 72800) 70001; do for SLURM_RESTART_COUNT in 0 1 7; do "
    code += f"echo {formula[1]}; done; done"
    ports = [int(word) for word in subprocess.check_output(["bash", "-c", code], text=True).split()]
    assert len(set(ports)) == len(ports) == 21
    assert all(10000 <= port < 32768 for port in ports)
    assert ports[0] == 10000 + 70000 * 8 % 22760  # by hand: 560000 - 24 * 22760 = 13760


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("24:00:00", 86400), ("2-12:30:00", 217800), ("1-06:00", 108000), ("90:00", 5400), ("0:45", 45)],
)
def test_times_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


BAD = [
    ({"nodes": 0}, "--nodes 0 must be at least 1"),
    ({"time": "a day"}, "give .days-.hours:minutes:seconds"),
    ({"time": "4:00", "signal_lead_s": 300}, "is not longer than the 300 s"),
    ({"partition": "a\n#SBATCH --x"}, "letters, digits"),
    ({"folder": "runs/a b"}, "without spaces"),
    ({"array": 4}, "fit is one run"),
    ({"kind": "synth", "nodes": 2}, "shares its work by --array"),
    ({"words": ("--trainer.devices", "4")}, "is set by --devices"),
    ({"words": ("--trainer.default_root_dir=x",)}, "is set by --run"),
    ({"kind": "train"}, "unknown kind of job 'train'"),
]


@pytest.mark.parametrize(("values", "reason"), BAD)
def test_jobs_that_cannot_be(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Job(**({"kind": "fit", "folder": "runs/a"} | values))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("partitoin: a", "unknown partitoin; it may have partition, account"),
        ("setup: module load", "setup must be a list"),
        ("gpus: [a]", "gpus must be one text"),
        ("- a", "unknown list"),
        ("a: [", "is no YAML"),
        (None, r"cannot be read .*give one by --site"),
    ],
)
def test_site_files_that_cannot_be_used(text: str | None, reason: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_site(tmp_path / "site.yaml")


def test_bad_words_end_with_2_before_anything_is_submitted(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch here
    fit = ["slurm", "fit", "--run", str(tmp_path / "run"), "--config", "configs/quickstart.yaml"]
    synth = ["slurm", "synth", "--run", str(tmp_path / "run"), "--config", "configs/synth/toy.yaml"]
    for words, reason in [
        ([*fit, "--node", "4"], "node"),  # no option of ours, so a word of gve fit, which knows none of that name
        ([*fit, "--model.lora.rnk", "4"], "rnk"),
        (fit[:4], "give a recipe by --config"),
        (synth, "sbatch is not on this machine"),
        ([*synth, "--after", "my job"], "--after my job"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- freezing


def test_a_submission_keeps_code_configuration_and_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job("fit", "runs/a", configs=("a.yaml",))
    folder = freeze(job, "#!/bin/sh\n", "seed_everything: 1\n")
    assert freeze(job, "#!/bin/sh\n", "seed_everything: 1\n") == folder
    assert folder.is_absolute()
    assert folder.parent == tmp_path / "runs/a/slurm/fit/submitted"
    assert {path.name for path in folder.iterdir()} == {"code", "config.yaml", "job.json", "job.sbatch", "work"}
    assert freeze(job, "#!/bin/sh\n", "seed_everything: 2\n") != folder
    assert not list(folder.parent.glob("*.tmp"))
    assert json.loads((folder / "job.json").read_text())["nodes"] == 1
    # The copy is complete and is what runs, though the current folder has a gve of its own.
    (tmp_path / "gve").mkdir()
    (tmp_path / "gve" / "__init__.py").write_text("raise SystemExit('the wrong code')")
    environment = {**os.environ, "PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"}
    code = "import gve, gve.slurm.render; print(gve.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert Path(done.stdout.strip()) == folder / "code" / "gve" / "__init__.py"
    copied = {str(path.relative_to(folder / "code/gve")) for path in (folder / "code/gve").rglob("*") if path.is_file()}
    sources = {str(path.relative_to(ROOT / "gve")) for path in (ROOT / "gve").rglob("*") if path.is_file()}
    assert {name for name in sources if "__pycache__" not in name} == copied
    # It is told of as without SLURM, so that a sweep has one table wherever it ran.
    from gve.callbacks import run_record

    facts = json.loads((folder / "code" / "snapshot.json").read_text())
    assert facts["commit"] == run_record.commit_of_code()
    # A run's record names the commit the copy was made of, not that of whatever checkout lies around it.
    facts["commit"] = {"hash": "f" * 40, "dirty": False}
    (folder / "code" / "snapshot.json").write_text(json.dumps(facts))
    monkeypatch.setattr(run_record.gve, "__file__", str(folder / "code" / "gve" / "__init__.py"))
    assert run_record.commit_of_code() == facts["commit"]


def test_what_is_done_is_known_by_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More time or another partition is the same work; another configuration or share of an array is not."""
    monkeypatch.chdir(tmp_path)
    job = Job("synth", "runs/a", words=("--config", "a.yaml"), array=2)
    state = Path(job.state)
    state.mkdir(parents=True)
    (state / "done-0").write_text(job.digest() + "\n")
    assert not finished(job, "")
    (state / "done-1").write_text(job.digest() + "\n")
    assert finished(job, "")
    assert finished(replace(job, time="1:00:00", partition="b", max_restarts=1), "")
    assert not finished(replace(job, words=("--config", "b.yaml")), "")
    assert not finished(job, "seed_everything: 1")
    assert replace(job, array=1).digest() != job.digest()


# ----------------------------------------------------------------------------------------------------------- preemption


@pytest.mark.slow
def test_a_signal_during_the_imports_waits_until_the_run_can_save(recipe: Path, tmp_path: Path) -> None:
    """SIGUSR1 comes before torch is imported; without the hold it kills the process (its default action)."""
    words = ["fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "run", "--uvrb.root", "null"]
    for name, expected in [("fit", 85), ("--version", -signal.SIGUSR1)]:
        words_of = words if name == "fit" else [name]
        pause = "" if name == "fit" else "time.sleep(20);"
        code = f"import sys, time; from gve.cli import main; {pause} main(sys.argv[1:])"
        process = subprocess.Popen([sys.executable, "-c", code, *words_of])
        # As soon as it holds the signal back or, for the control, once Python runs.
        status = Path(f"/proc/{process.pid}/status")
        held = 1 << (signal.SIGUSR1 - 1)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = re.search(r"SigBlk:\s*([0-9a-f]+)", status.read_text())
            if name != "fit" or (found and int(found[1], 16) & held):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(200) == expected
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"][-1]
    assert (steps["status"], steps["step"]) == ("preempted: stopped by SIGUSR1, state saved", 1)
