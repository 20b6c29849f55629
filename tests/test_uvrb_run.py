"""`gve uvrb run` on a tiny real model: ranks, interruptions, second runs, settings, damaged clips, files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import runs
from gve.encode.encoder import LoadedEncoder
from gve.encode.pretrained import load_encoder
from gve.encode.ranks import Placement
from gve.eval.results import read_results, read_runs
from gve.eval.run import BenchmarkRun, RunOptions, Setting, settings_of
from gve.eval.uvrb import UVRBReader
from gve.items import InputError
from gve.toy.base import write_base
from gve.uvrb_cli import main
from test_evaluation import permuted
from tiny_clip import write_dual_encoder

SETS = ("CRB-G", "CRB-S", "CRB-T", "MSRVTT-I2V")
SMALL = ("--frames", "2", "--tokens", "4", "--num-workers", "0", "--resamples", "100")
SETTING = "frames2-tokens4"


@pytest.fixture(scope="module")
def worlds(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside each other: the toy sets, and the same in another order."""
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "uvrb").symlink_to(toy_world / "uvrb")
    permuted(toy_world / "uvrb", folder / "permuted", 3)
    return folder


def words(model: Path | str, root: Path, out: Path, *more: str, sets: tuple[str, ...] = SETS) -> list[str]:
    return ["run", "--model", str(model), "--root", str(root), "--out", str(out), "--sets", *sets, *SMALL, *more]


def run(model: Path | str, root: Path, out: Path, *more: str, sets: tuple[str, ...] = SETS) -> int:
    return main(words(model, root, out, *more, sets=sets))


@pytest.fixture(scope="module")
def one(toy_world: Path, worlds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process; others are compared with it."""
    out = tmp_path_factory.mktemp("one")
    assert run(toy_world / "base", worlds / "uvrb", out) == 0
    return out


def result(out: Path, setting: str = SETTING) -> bytes:
    return (out / setting / "uvrb.json").read_bytes()


def encoded(out: Path) -> dict[str, int]:
    return json.loads((out / "run.json").read_text())["encoded"]


def contents(world: Path, sets: tuple[str, ...]) -> tuple[int, int]:
    """(Distinct texts and composed queries, distinct files alone) of the sets, from their listings."""
    media, texts = set(), set()
    for name in sets:
        for listing in ("queries", "corpus"):
            for line in (world / name / "jsonl" / f"{listing}.jsonl").read_text().splitlines():
                row = json.loads(line)
                file = row.get("video") or row.get("image")
                (texts if row.get("text") else media).add((row.get("text"), file, name if row.get("text") else ""))
    return len(texts), len(media)


def test_what_a_run_leaves(one: Path, worlds: Path, capsys: pytest.CaptureFixture[str], toy_world: Path) -> None:
    """Files, contents counted by hand from the listings, and a second run that encodes none of them."""
    texts, media = contents(worlds / "uvrb", SETS)
    facts = json.loads((one / "run.json").read_text())
    assert facts["encoded"] == {SETTING: texts + media}
    assert (facts["model"], facts["root"]) == (str(toy_world / "base"), str(worlds / "uvrb"))
    assert {path.name for path in (one / SETTING).iterdir()} == {
        "uvrb.json",
        "report.md",
        "radar.png",
        "uvrb_positions.npz",
    }
    data = json.loads(result(one))
    assert data["setting"] == {"frames": 2, "tokens": 4, "max_length": 8192}
    assert data["protocol"]["inputs"]["sampling"]["num_frames"] == 2
    assert list(data["sets"]) == list(SETS)
    assert all(row["complete"] for row in data["sets"].values())
    (saved,) = read_runs(one)
    assert saved.run["root"] == facts["root"]
    assert saved.sets["CRB-G"].nearest.shape == (10, 10)
    before, parts = result(one), sorted((one / "embeddings").rglob("*.safetensors"))
    capsys.readouterr()
    assert run(toy_world / "base", worlds / "uvrb", one, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"][SETTING]["encoded"] == 0
    assert printed["settings"][SETTING]["sets"] == {name: row["value"] for name, row in data["sets"].items()}
    assert printed["complete"] is True
    assert result(one) == before
    assert sorted((one / "embeddings").rglob("*.safetensors")) == parts


def test_order_of_the_listings_is_nothing_to_a_real_model(
    one: Path, worlds: Path, toy_world: Path, tmp_path: Path
) -> None:
    """Batches too are the same: the vectors are equal bit for bit, and with them the JSON."""
    assert run(toy_world / "base", worlds / "permuted", tmp_path) == 0
    assert result(tmp_path) == result(one)
    assert vectors(tmp_path) == vectors(one)


def vectors(out: Path) -> dict[bytes, bytes]:
    found = {}
    for path in (out / "embeddings").rglob("*.safetensors"):
        part = load_file(path)
        found |= {bytes(key): row.tobytes() for key, row in zip(part["keys"], part["vectors"], strict=True)}
    return found


def launched(arguments: list[str], log: Path, ranks: int) -> list[Any]:
    """`gve uvrb <arguments>` as torchrun starts it: one process a rank, its place in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**place, "OMP_NUM_THREADS": "1"}
        processes += runs.start(["uvrb", *arguments], Path(f"{log}-rank{rank}"), env=env)
    return processes


def test_two_ranks_write_the_same_bytes(one: Path, worlds: Path, toy_world: Path, tmp_path: Path) -> None:
    """A number of contents that two ranks do not share evenly; each content on one of them, one writer."""
    texts, media = contents(worlds / "uvrb", SETS)
    step = max(4, -(-(texts + media) // 8))
    assert (texts + media) % (2 * step)  # a last turn with less work for one of them
    arguments = words(toy_world / "base", worlds / "uvrb", tmp_path / "two")
    assert runs.wait(launched(arguments, tmp_path / "log", 2), 200) == [0, 0], logs(tmp_path)
    assert result(tmp_path / "two") == result(one)
    assert vectors(tmp_path / "two") == vectors(one)
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["hardware"]["ranks"] == 2
    assert facts["encoded"] == encoded(one) or facts["encoded"] == {SETTING: texts + media}
    assert not list((tmp_path / "two").rglob("*.tmp"))


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log*")))


def test_a_killed_run_goes_on(one: Path, worlds: Path, toy_world: Path, tmp_path: Path) -> None:
    """kill -9 as soon as two parts are on disk; the same command encodes the rest, to the same bytes."""
    out = tmp_path / "out"
    (process,) = runs.start(["uvrb", *words(toy_world / "base", worlds / "uvrb", out)], tmp_path / "log")
    deadline = time.monotonic() + 200
    while len(list((out / "embeddings").rglob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert runs.wait([process], 30) == [-signal.SIGKILL], logs(tmp_path)
    kept = len(vectors(out))
    texts, media = contents(worlds / "uvrb", SETS)
    assert 0 < kept < texts + media
    assert not (out / "run.json").exists()
    assert run(toy_world / "base", worlds / "uvrb", out) == 0
    assert encoded(out) == {SETTING: texts + media - kept}
    assert result(out) == result(one)


def test_an_interrupt_ends_with_one_line_and_130(worlds: Path, toy_world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (process,) = runs.start(["uvrb", *words(toy_world / "base", worlds / "uvrb", out)], tmp_path / "log")
    deadline = time.monotonic() + 200
    while not list((out / "embeddings").rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    assert runs.wait([process], 60) == [130], logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)
    assert "gve uvrb: interrupted" in logs(tmp_path)


def test_settings_share_texts_and_nothing_else(worlds: Path, toy_world: Path, tmp_path: Path) -> None:
    """Frames re-encode media alone within one command; another prompt or other weights re-encode all."""
    sets = ("CRB-G", "MSRVTT-I2V")
    texts, media = contents(worlds / "uvrb", sets)
    assert (texts, media) == (10, 30)
    reader = UVRBReader(worlds / "uvrb")
    tested = [reader.read(name) for name in sets]
    prompt = {"system_prompt": "You are a helpful assistant."}

    def load(setting: Setting) -> LoadedEncoder:
        return load_encoder(str(toy_world / "base"), inputs={**setting.inputs, **prompt})

    def score(settings: list[Setting]) -> list[int]:
        run = BenchmarkRun("toy", load, tested, tmp_path, RunOptions(resamples=50))
        return [done.encoded for done in run.run(settings)]

    settings = settings_of([2, 4], [4])
    assert [setting.name for setting in settings] == [SETTING, "frames4-tokens4"]
    assert score(settings) == [texts + media, media]
    assert score(settings) == [0, 0]
    prompt["system_prompt"] = "Another one."
    assert score(settings[:1]) == [texts + media]
    prompt["system_prompt"] = "You are a helpful assistant."
    write_base(tmp_path / "other", ["a red circle moves left", "a blue square"], seed=1)
    other = BenchmarkRun(
        "other",
        lambda setting: load_encoder(str(tmp_path / "other"), inputs=setting.inputs),
        tested[:1],
        tmp_path,
        RunOptions(resamples=50),
    )
    assert [done.encoded for done in other.run(settings[:1])] == [20]


def test_scaling_tables_repeat_the_settings(worlds: Path, toy_world: Path, tmp_path: Path) -> None:
    more = ("--frames", "4", "2", "--tokens", "4", "5", "--trec", "7")
    assert run(toy_world / "base", worlds / "uvrb", tmp_path, *more, sets=("MSRVTT-I2V",)) == 0
    names = ["frames4-tokens4", "frames2-tokens4", "frames4-tokens5"]
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == names
    rows = json.loads((tmp_path / "scaling.json").read_text())
    saved = {run.folder.name: run.data for run in read_runs(tmp_path)}
    assert [row["setting"] for row in rows] == names == list(saved)
    for row in rows:
        own = saved[row["setting"]]
        assert (row["frames"], row["tokens"]) == (own["setting"]["frames"], own["setting"]["tokens"])
        assert row["value"] == own["sets"][row["name"]]["value"]
        assert [row["low"], row["high"]] == own["sets"][row["name"]]["interval"]
    with open(tmp_path / "scaling.csv") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row["value"] for row in rows]
    # Metrics and pictures of what went wrong need ten, so no fewer are kept.
    assert len((tmp_path / names[0] / "trec" / "MSRVTT-I2V.run").read_text().splitlines()) == 10 * 10


def test_settings_of_a_study() -> None:
    """The paper's: frames at 200 tokens, tokens at 8 frames; a grid on request; no setting that cannot be."""
    pairs = [(setting.frames, setting.tokens) for setting in settings_of([8, 16, 48], [200, 400, 800])]
    assert pairs == [(8, 200), (16, 200), (48, 200), (8, 400), (8, 800)]
    assert len(settings_of([8, 16, 24], [200, 400, 600], grid=True)) == 9
    with pytest.raises(InputError, match=r"48 frames of 400 tokens are 9600 tokens of 8192"):
        settings_of([8, 16, 48], [200, 400, 800], grid=True)
    assert len(settings_of([8, 16, 48], [200, 400, 800], grid=True, max_length=20000)) == 9
    with pytest.raises(InputError, match="frames=7 must be even"):
        settings_of([7], [200])


@pytest.fixture
def damaged(toy_world: Path, tmp_path: Path) -> tuple[Path, str]:
    """CRB-G and CRB-S with one clip torn in the middle and one gone, and the names of both."""
    root = tmp_path / "uvrb"
    (root / "media").mkdir(parents=True)
    names = []
    for name in ("CRB-G", "CRB-S"):
        shutil.copytree(toy_world / "uvrb" / name, root / name)
        for line in (root / name / "jsonl" / "corpus.jsonl").read_text().splitlines():
            names.append(Path(json.loads(line)["video"]).name)
    for name in dict.fromkeys(names):
        shutil.copy(toy_world / "uvrb" / "media" / name, root / "media" / name)
    torn, gone = root / "media" / names[0], root / "media" / names[1]
    torn.write_bytes(torn.read_bytes()[:200])
    gone.unlink()
    return root, f"{torn.name} {gone.name}"


def test_damaged_and_missing_clips_are_named_and_counted(
    damaged: tuple[Path, str], toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, names = damaged
    torn, gone = names.split()
    out = tmp_path / "out"
    assert run(toy_world / "base", root, out, sets=("CRB-G", "CRB-S")) == 1
    told = capsys.readouterr()
    assert f"CRB-G lacks 1 files, media/{gone} among them" in told.err
    assert "incomplete, 2 unread" in told.out
    data = json.loads(result(out))
    for name in ("CRB-G", "CRB-S"):
        row = data["sets"][name]
        assert not row["complete"]
        assert len(row["missing"]) == 2
        assert {line.split(":")[0] for line in row["missing"]} == {f"media/{torn}", f"media/{gone}"}
    assert data["abilities"]["S"] is None
    saved = read_results(out / SETTING)
    lost = {row for row, name in enumerate(saved.sets["CRB-G"].corpus) if row < 2 and name}
    assert not np.isfinite(saved.sets["CRB-G"].similarities[:, -2:]).any()  # two of ten are never retrieved
    assert all(
        saved.sets["CRB-G"].hits[q] == 0 for q, rows in enumerate(saved.sets["CRB-G"].positives) if {*rows} <= lost
    )
    assert run(toy_world / "base", root, out, "--allow-incomplete", "--json", sets=("CRB-G", "CRB-S")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"][SETTING]["incomplete"] == {"CRB-G": 2, "CRB-S": 2}
    assert printed["complete"] is False
    # The clips come back: they alone are encoded, and the run is whole.
    for name in (torn, gone):
        shutil.copy(toy_world / "uvrb" / "media" / name, root / "media" / name)
    assert run(toy_world / "base", root, out, sets=("CRB-G", "CRB-S")) == 0
    assert encoded(out) == {SETTING: 2}


def test_classification_runs_by_name_and_enters_no_average(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips against label texts; a hit is a right label. Of UVRB there is nothing to average."""
    root = tmp_path / "uvrb"
    folder = root / "UCF101" / "jsonl"
    folder.mkdir(parents=True)
    shutil.copytree(toy_world / "uvrb" / "media", root / "media", copy_function=os.link)
    clips = sorted(path.name for path in (root / "media").glob("*.mp4"))[:6]
    queries = [{"id": f"q{row}", "video": f"../media/{name}"} for row, name in enumerate(clips)]
    corpus = [{"id": name, "text": f"a {name}"} for name in ("circle", "square", "ring")]
    instances = [{"qid": f"q{row}", "pos": [corpus[row % 3]["id"]]} for row in range(6)]
    for name, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(toy_world / "base", root, tmp_path / "out", sets=("ucf-101",)) == 0
    assert "abilities" not in capsys.readouterr().out
    data = json.loads(result(tmp_path / "out"))
    row = data["sets"]["UCF101"]
    assert (row["metric"], row["n_query"], row["n_corpus"]) == ("accuracy", 6, 3)
    assert row["chance"] == pytest.approx(1 / 3)
    assert set(data["abilities"].values()) == {None}
    assert "UCF101" in (tmp_path / "out" / SETTING / "report.md").read_text()
    score = read_results(tmp_path / "out" / SETTING).sets["UCF101"]
    right = [nearest[0] in rows for nearest, rows in zip(score.nearest, score.positives, strict=True)]
    assert row["value"] == pytest.approx(np.mean(right))


def test_another_kind_of_model_runs_alike(worlds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CLIP by its folder alone. It counts no vision tokens, which is said, and is not encoded twice for them."""
    write_dual_encoder(tmp_path / "clip", "clip")
    sets = ("CRB-G", "CRB-S", "MSRVTT-I2V")
    assert run(tmp_path / "clip", worlds / "uvrb", tmp_path / "out", "--tokens", "4", "8", sets=sets) == 0
    assert "frames2-tokens8 is frames2-tokens4 to this model" in capsys.readouterr().out
    first, second = read_runs(tmp_path / "out")
    assert encoded(tmp_path / "out") == {SETTING: sum(contents(worlds / "uvrb", sets)), "frames2-tokens8": 0}
    assert first.data["sets"] == second.data["sets"]
    assert first.data["weights"] == second.data["weights"] != ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sets", "MSRVT"), "did you mean MSRVTT"),
        (("--untrained", "--sets", "CRB-G", "--frames", "3"), "frames=3 must be even"),
        (("--max-queries", "0"), "--max-queries 0 must be at least 1"),
        (("--root", "/nowhere"), "no UVRB folder"),
        (("--model", "/nowhere/model"), "/nowhere/model"),
        (("--tokens", "9000"), "raise max_length"),
    ],
)
def test_bad_input_is_refused(
    more: tuple[str, ...], message: str, worlds: Path, toy_world: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(toy_world / "base", worlds / "uvrb", tmp_path, *more, sets=("CRB-G",))


def test_fewer_queries_are_a_protocol_of_their_own(worlds: Path, toy_world: Path, one: Path, tmp_path: Path) -> None:
    more = ("--max-queries", "4", "--untrained", "--out", str(tmp_path))
    assert run(toy_world / "base", worlds / "uvrb", tmp_path, *more, sets=("CRB-G",)) == 0
    data = json.loads(result(tmp_path))
    assert data["sets"]["CRB-G"]["n_query"] == 4
    assert data["sets"]["CRB-G"]["notes"] == ["4 of 10 queries, chosen by seed 0"]
    assert data["protocol"]["sets"]["CRB-G"] != json.loads(result(one))["protocol"]["sets"]["CRB-G"]
    # A base without adapters is its own untrained self: equal weights, nothing encoded twice, no gain.
    assert data["untrained"]["weights"] == data["weights"]
    assert data["gains"]["sets"]["CRB-G"]["value"] == 0
    assert encoded(tmp_path) == {SETTING: 4 + 10}


def test_places_of_launchers() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert Placement.of(torchrun) == Placement(3, 4, 1, "a", 7)
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu-a"}
    found = Placement.of({**step, "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "2"})
    assert (found.rank, found.size, found.local_rank, found.address) == (1, 2, 0, "gpu-a")
    other = Placement.of({**step, "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "3"})
    assert other.port != found.port  # two steps of a job on one machine
    # A batch script has SLURM_NTASKS and SLURM_PROCID but is no step of tasks: it must not wait for them.
    assert Placement.of({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "41"}) == Placement()
    assert Placement.of({}) == Placement()
    with pytest.raises(InputError, match="not MASTER_ADDR"):
        Placement.of({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
