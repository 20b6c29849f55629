"""The command line as a user meets it: bad input is one line on stderr, exit code 2, and nothing is left behind."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from gve.cli import COMMANDS, main
from gve.toy.base import write_base

Refuse = Callable[..., str]


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its content, folders too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Runs a command that must be refused in one line; returns the line."""

    def run(*argv: Any) -> str:
        capsys.readouterr()
        # Lightning took hold of stderr when it was imported.
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    monkeypatch.setattr(handler, "stream", sys.stderr)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("gve")
        assert "Traceback" not in err
        assert not out
        assert contents(tmp_path) == before, "something was left behind"
        return err.strip()

    return run


def clip(path: Path, num_frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            picture = np.full((56, 56, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


# ------------------------------------------------------------------------------------------------------- the overview


def test_commands_and_their_help(capsys: pytest.CaptureFixture[str], refuse: Refuse) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 120
    line = refuse("trian")
    assert "'trian'" in line
    assert "fit, validate, test, predict, plan, toy, shards" in line


def test_help_of_fit_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    # The usage names the pattern; argparse's own lists all options twice, the first time without a word on any.
    assert lines[0].startswith("usage: gve COMMAND --config RECIPE.yaml")
    assert not lines[1].strip()
    text = "\n".join(lines)
    for option in ("--model.base", "--data.root", "--uvrb.root", "--trainer.default_root_dir", "--ckpt_path"):
        assert sum(line.strip().startswith(option) for line in lines) == 1, option
    assert "hub name, local folder, config file" in text


# ------------------------------------------------------------------------------------------------------------ listings


@pytest.fixture
def listing(tmp_path: Path) -> Callable[..., Path]:
    """Writes a listing of one good row and one more."""
    clip(tmp_path / "good.mp4", 8)
    clip(tmp_path / "frame.mp4", 1)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")

    def write(query: dict[str, str], target: dict[str, str]) -> Path:
        good = {"query": {"text": "it grows light"}, "target": {"video": "good.mp4"}}
        rows = [good, {"query": query, "target": target}]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "pairs.jsonl"

    return write


@pytest.mark.parametrize(
    ("query", "target", "said"),
    [
        ({"text": "a"}, {"video": "absent.mp4"}, "absent.mp4"),
        ({"text": "a"}, {"video": "frame.mp4"}, "frame.mp4: 1 frame(s), at least 2"),
        ({"text": "a"}, {"image": "dot.png"}, "dot.png: 1x1 px, at least 2"),
        ({"text": "word " * 100_000}, {"video": "good.mp4"}, "a text of 100000 words, max_words is 20000"),
    ],
    ids=["missing video", "1-frame video", "1x1 image", "100,000 words"],
)
def test_a_bad_row_refuses_the_build(
    query: dict[str, str], target: dict[str, str], said: str, listing: Any, refuse: Refuse, tmp_path: Path
) -> None:
    line = refuse("shards", "build", listing(query, target), tmp_path / "shards")
    assert "row 2: " in line
    assert said in line
    assert "--on-bad skip" in line


def test_unusable_listings_and_folders(listing: Any, refuse: Refuse, tmp_path: Path) -> None:
    assert "absent.jsonl does not exist" in refuse("shards", "build", tmp_path / "absent.jsonl", tmp_path / "shards")
    (tmp_path / "nothing.jsonl").touch()
    assert "has no rows" in refuse("shards", "build", tmp_path / "nothing.jsonl", tmp_path / "shards")
    good = listing({"text": "b"}, {"video": "good.mp4"})
    # The tests may run as root, for whom every folder is writable; below a file nobody can make one.
    below = tmp_path / "good.mp4" / "out"
    assert "choose another folder" in refuse("shards", "build", good, below)
    assert "choose another folder" in refuse("toy", "make", below, "--quiet")
    assert "use above 0 to 10" in refuse("toy", "make", tmp_path / "world", "--scale", "11")
    assert "holds no manifest.json" in refuse("shards", "check", tmp_path / "absent")


# --------------------------------------------------------------------------------------------------- fit and validate


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def shards(toy_world: Path, tmp_path: Path) -> Path:
    """A copy of the toy world's shards."""
    return shutil.copytree(toy_world / "shards", tmp_path / "shards")


def test_missing_things_are_named(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    fit = ("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "runs" / "a")
    absent = tmp_path / "absent"
    assert f"{absent} holds no manifest.json" in refuse(*fit, "--data.root", absent)
    assert f"'{absent}' does not exist" in refuse(*fit, "--model.base", absent)
    assert f"{absent} cannot be read (No such file" in refuse(*fit, "--ckpt_path", absent)
    assert f"no UVRB folder at {absent}" in refuse(*fit, "--uvrb.root", absent)
    assert f"'{absent}'" in refuse("fit", "--config", absent)
    assert "a recipe is given by --config" in refuse("fit")


def test_an_unwritable_run_folder(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refuse("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "file" / "run")
    assert f"{tmp_path / 'file'} is not a folder" in line


def test_unknown_keys_and_names(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    fit = ("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "run")
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe.read_text().replace("max_frame_tokens", "max_frame_token"))
    assert "max_frame_token" in refuse("fit", "--config", bad)
    assert "--data.rot" in refuse(*fit, "--data.rot", "x")
    bad.write_text("model: [unclosed")
    assert "bad.yaml" in refuse("fit", "--config", bad)
    line = refuse(*fit, "--uvrb.sets", '["MSRVTTT"]')
    assert "'MSRVTTT'" in line
    assert "MSRVTT-I2V" in line
    assert "no ablation" in refuse(*fit, "--uvrb.ablations", '["blank"]')
    assert "rank must be >= 1" in refuse(*fit, "--model.lora.rank", "0")
    assert "even and at least 2" in refuse(*fit, "--model.inputs.sampling.num_frames", "3")
    assert "invalid accelerator name" in refuse(*fit, "--trainer.accelerator", "abacus")
    assert "4000 from" in refuse(*fit, "--data.batch_size", "4000")


def test_shards_that_cannot_be_used(recipe: Path, shards: Path, refuse: Refuse, tmp_path: Path) -> None:
    fit = ("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path / "run", "--data.root", shards)
    record = json.loads((shards / "manifest.json").read_text())["sources"][0]
    tar = shards / record["shards"][0]["file"]
    tar.write_bytes(b"")
    line = refuse(*fit)
    assert tar.name in line
    assert "has 0 bytes" in line

    # A shard without samples whose manifest agrees: an end mark alone, an index of no rows.
    tar.write_bytes(bytes(1024))
    index = io.BytesIO()
    np.save(index, np.empty((0, 5), np.uint64))
    (shards / record["index"]).write_bytes(index.getvalue())

    def empty(manifest: dict[str, Any]) -> None:
        source = manifest["sources"][0]
        source["index_sha256"] = hashlib.sha256(index.getvalue()).hexdigest()
        source["shards"] = [{**source["shards"][0], "count": 0, "bytes": 1024}]

    edit_manifest(shards, empty)
    assert f"{record['shards'][0]['file']} of {shards} holds no sample" in refuse(*fit)
    edit_manifest(shards, lambda manifest: manifest.update(schema=2))
    assert "has schema version 2, this code reads 1" in refuse(*fit)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_foreign_checkpoints(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    validate = ("validate", "--config", recipe, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path")
    path = tmp_path / "foreign.ckpt"
    for foreign in (Trap(tmp_path / "sprung"), {"state_dict": Trap(tmp_path / "sprung")}):
        path.write_bytes(pickle.dumps(foreign))
        assert "no checkpoint that can be loaded" in refuse(*validate, path)
        torch.save(foreign, path)
        assert "no checkpoint that can be loaded" in refuse(*validate, path)
    assert not (tmp_path / "sprung").exists()
    # Negative control: the trap is real.
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()
    path.write_bytes(b"")
    assert "no checkpoint that can be loaded" in refuse(*validate, path)
    # A checkpoint of another program that Lightning would take for a configuration of ours.
    torch.save({"state_dict": {}, "hyper_parameters": {"temperature": 9.0}}, path)
    assert "was not written by gve" in refuse(*validate, path)
    assert "Is a directory" in refuse(*validate, tmp_path)


def test_a_checkpoint_of_another_base(recipe: Path, refuse: Refuse, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    one_step = ("--trainer.default_root_dir", run, "--trainer.max_epochs", "1", "--data.steps_per_epoch", "1")
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("fit", "--config", recipe, *one_step, "--data.dev_pairs", "0")])
    assert end.value.code == 0
    last = run / "checkpoints" / "last.ckpt"
    write_base(other, ["a red ball"], seed=1)
    validate = ("validate", "--config", recipe, "--trainer.default_root_dir", tmp_path / "new", "--ckpt_path", last)
    line = refuse(*validate, "--model.base", other)
    assert "was trained on base" in line
    assert f"not on '{other}'" in line
    assert "lora is" in refuse(*validate, "--model.lora.rank", "8")
    # In a folder that holds a run, the refused attempt is written down, and the configuration stays.
    config = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("fit", "--config", recipe, *one_step, "--model.base", other, "--ckpt_path", last)])
    assert end.value.code == 2
    assert (run / "config.yaml").read_bytes() == config
    first, second = json.loads((run / "run.json").read_text())["attempts"]
    assert first["status"] == "done"
    assert second["status"].startswith("InputError: ")


def test_a_process_of_its_own(recipe: Path, tmp_path: Path) -> None:
    """As a user meets it: warnings, log lines and progress bars would all be on this stderr."""
    words = ["fit", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path / "run"), "--data.root", "gone"]
    command = [sys.executable, "-m", "gve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    wanted = "gve fit: error: gone holds no manifest.json: give a folder that `gve shards build` wrote\n"
    assert (done.stdout, done.stderr) == ("", wanted)
    assert not (tmp_path / "run").exists()
