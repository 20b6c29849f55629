"""The doctor finds what is broken: every check meets something that works and something that does not."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from packaging.requirements import Requirement

from gve.cli import main
from gve.doctor import packages
from gve.doctor.check import attempt
from gve.doctor.kernels import check_device, check_model
from gve.doctor.machine import check_cores, check_disk, check_hub, core_limit, memory_limit
from gve.doctor.media import FRAMES, check_codec, check_pictures, difference, drawn, write_clip

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------------ packages


def test_pins_are_those_of_the_requirements_file() -> None:
    """Against pip's own reading of the file, line by line, by hand."""
    names = {own.name for own in packages.required()}
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert {line.partition("==")[0].partition("[")[0] for line in lines if line} >= names
    assert {"torch", "av", "PyYAML"} <= names
    assert all(str(own.specifier).startswith("==") for own in packages.required())
    assert [own.name for own in packages.extras()["mteb"]] == ["mteb"]


def test_wrong_and_absent_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Requirement("PyYAML==0.1"), Requirement("no-such-thing-of-gve==1"), Requirement("httpx>=0.1")]
    monkeypatch.setattr(packages, "required", lambda: wanted)
    found = {check.name: check for check in packages.check_packages()}
    assert {name: check.state for name, check in found.items()} == {
        "PyYAML": "weak",
        "no-such-thing-of-gve": "broken",
        "httpx": "ok",
    }
    assert found["PyYAML"].hint == "pip install 'PyYAML==0.1'"


def test_a_library_that_takes_the_process_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones behind it are still tried."""
    for name, code in (
        ("d_fine", "print('I talk')"),
        ("d_dies", "import os; os._exit(3)"),
        ("d_raises", "raise ImportError('no symbol x')"),
        ("d_hangs", "import time; time.sleep(60)"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert packages.import_faults(["d_fine", "d_dies", "d_raises", "json"], 60) == {
        "d_dies": "the process died (3)",
        "d_raises": "ImportError: no symbol x",
    }
    assert packages.import_faults(["d_hangs"], 3) == {"d_hangs": "no end after 3 s"}


def test_what_a_part_dies_of_is_its_finding() -> None:
    (check,) = attempt("video", lambda: [][0])
    assert (check.state, check.detail) == ("broken", "IndexError: list index out of range")


# --------------------------------------------------------------------------------------------------------------- media


def test_frames_must_be_nearest_to_their_own() -> None:
    noise = np.random.default_rng(0).integers(-8, 9, drawn().shape)
    noisy = np.clip(drawn().astype(int) + noise, 0, 255).astype(np.uint8)
    assert difference(noisy) == ""
    swapped = noisy[[0, 2, 1, *range(3, FRAMES)]]
    assert difference(swapped).startswith("reads the frames [0, 2, 1, 3")
    assert difference(noisy[:4]).startswith("reads [4, ")
    bright = np.clip(drawn().astype(int) + 40, 0, 255).astype(np.uint8)
    assert difference(bright).endswith("levels of 255 off")


def test_a_codec_is_read_back_and_a_damaged_file_is_found(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    assert check_codec("h264", clip).state == "ok"
    clip.write_bytes(clip.read_bytes()[:-900])
    assert check_codec("h264", clip).state == "broken"
    other = tmp_path / "other.mp4"
    assert write_clip(other, "mpeg4")
    other.write_bytes(b"no video")
    assert check_codec("mpeg4", other).state == "weak"  # it is not needed
    assert {check.state for check in check_pictures()} == {"ok"}


# ------------------------------------------------------------------------------------------------------------- machine


def test_limits_of_containers_of_both_versions(tmp_path: Path) -> None:
    assert (memory_limit(tmp_path), core_limit(tmp_path)) == (None, None)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (memory_limit(tmp_path), core_limit(tmp_path)) == (None, None)
    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert (memory_limit(tmp_path), core_limit(tmp_path)) == (2 << 30, 1.5)
    old = tmp_path / "v1"
    for name, text in (
        ("memory/memory.limit_in_bytes", "9223372036854771712"),
        ("cpu/cpu.cfs_quota_us", "50000"),
        ("cpu/cpu.cfs_period_us", "100000"),
    ):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(text)
    assert (memory_limit(old), core_limit(old)) == (None, 0.5)
    (old / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert core_limit(old) is None


def test_this_machine_is_described() -> None:
    checks = [*check_cores(), *check_disk()]
    assert {check.name for check in checks} >= {"cores", "memory", "open files", "this folder"}
    assert not [check for check in checks if check.state == "broken"]
    assert all("\n" not in check.detail for check in checks)


class _Hub(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """A hub on this machine whose address holds a password, and a token in the environment."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://me:hidden@127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (401, "weak"), (503, "weak")])
def test_the_hub_is_asked_and_no_secret_is_told(
    hub: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, state: str
) -> None:
    monkeypatch.setattr(_Hub, "status", status)
    *_, check = check_hub(offline=False)
    assert (check.name, check.state) == ("127.0.0.1", state)
    assert check.detail == f"answers {status}, with a token"
    assert "hidden" not in str(list(check_hub(offline=False)))


def test_a_hub_that_is_not_there(hub: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    *_, check = check_hub(offline=False, timeout_s=2)
    assert (check.state, check.detail) == ("weak", "cannot be reached (ConnectError)")
    *_, check = check_hub(offline=True)
    assert (check.state, check.detail) == ("absent", "not asked: --offline")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    *_, check = check_hub(offline=False)
    assert check.detail == "not asked: HF_HUB_OFFLINE"


# --------------------------------------------------------------------------------------------------------------- model


def test_the_kernels_and_the_tiny_model_run() -> None:
    device = check_device("cpu")
    assert device.state == "ok"
    assert device.detail.endswith("plain")
    (model,) = check_model()
    assert model.state == "ok"
    assert "embeds a text and a clip" in model.detail


def test_bad_options_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--nonsense"])
    assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--help"])
    assert end.value.code == 0
    assert "--offline" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path: Path) -> None:
    """In a process of its own; and in one where PyAV cannot be imported, which is found and ends in 1."""
    words = [sys.executable, "-m", "gve", "doctor", "--json", "--offline"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert told["ok"] is True
    parts = {check["part"] for check in told["checks"]}
    assert parts >= {"python", "packages", "torch", "video", "pictures", "model", "machine", "hub", "optional"}
    assert {check["name"] for check in told["checks"]} >= {"h264", "hevc", "vp9", "av1", "cpu", "tiny base"}


@pytest.mark.slow
def test_without_a_decoder_it_says_so_and_fails(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise ImportError('libavcodec.so.62: no such file')")
    done = subprocess.run(
        [sys.executable, "-m", "gve", "doctor", "--offline"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "does not import: ImportError: libavcodec.so.62" in done.stdout
    # What rests on it is broken too; the cause stands first.
    assert done.stdout.splitlines()[-1].startswith("broken: av, ")
    assert "video" in done.stdout.splitlines()[-1]
