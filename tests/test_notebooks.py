"""Every notebook is run in a real kernel on small real files, and what it says is compared with a computation by hand.

The default tier runs all of them in one kernel, whose names are cleared in between: a kernel of its own would spend
seconds on imports for each. The slow tier gives each its own, as a user does, with what it falls back on, and a clock.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gve.cli import main
from gve.encode.pretrained import load_encoder
from gve.eval.charts import draw_bands, to_svg
from gve.eval.curves import Curve, moving_band, read_scalars, read_scaling
from gve.eval.uvrb import UVRBReader
from gve.items import InputError, Item
from gve.search.query import usual_instruction
from gve.toy.base import EMBEDDED
from gve.video import Sampling, decode

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "samples"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"image/svg+xml", "image/png"}
SECONDS = 60

Execute = Callable[..., dict[str, Any]]


def read(path: Path) -> Any:
    return nbformat.read(path, 4)


def prepared(path: Path, parameters: Mapping[str, Any], answers: Mapping[str, str]) -> Any:
    """The notebook with other parameters, and a last cell that prints values of its variables as JSON.

    A cell is put behind the one that is tagged `parameters`, as papermill does it.
    """
    book = read(path)
    cells = []
    for cell in book.cells:
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            known = {line.split(" = ")[0] for line in cell.source.splitlines()}
            assert set(parameters) <= known, f"{path.name} has no parameters {set(parameters) - known}"
            own = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            cells.append(nbformat.v4.new_code_cell(own))
    asked = ", ".join(f"{name!r}: {expression}" for name, expression in answers.items())
    cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{asked}}}, default=float))"))
    book.cells = cells
    return book


def outcome(book: Any) -> dict[str, Any]:
    """Answers of the last cell, what was printed, how many figures were shown; nothing went to stderr."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    for output in outputs:
        assert output.get("name") != "stderr", output.text
    printed = [output.text for output in outputs if output.output_type == "stream"]
    figures = sum(bool(FIGURES & set(output.get("data", ()))) for output in outputs)
    return {"text": "".join(printed), "figures": figures, **json.loads("".join(printed).splitlines()[-1])}


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    # Here no ipywidgets are installed, of which tqdm speaks wherever a library imports it.
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    manager, client = start_new_kernel(cwd=str(ROOT / "notebooks"), env=quiet)
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def execute(kernel: KernelManager) -> Execute:
    """Runs a notebook in the shared kernel with these parameters and returns its outcome."""

    def run(name: str, parameters: Mapping[str, Any], answers: Mapping[str, str]) -> dict[str, Any]:
        (path,) = (path for path in NOTEBOOKS if path.name.startswith(name))
        book = prepared(path, {key: str(v) if isinstance(v, Path) else v for key, v in parameters.items()}, answers)
        book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        NotebookClient(book, timeout=SECONDS, km=kernel).execute(reset_kc=True, cleanup_kc=False)
        return outcome(book)

    return run


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six steps."""
    folder = tmp_path_factory.mktemp("notebooks") / "run"
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(folder), "--uvrb.root", "null"])
    assert end.value.code == 0
    return folder


# ------------------------------------------------------------------------------------------------------------ in git


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_the_page_says_what_it_reads(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, "strip the outputs before a commit: jupyter nbconvert --clear-output --inplace"
            assert cell.execution_count is None
    question, *_ = book.cells[0].source.splitlines()
    assert question.startswith("# ")
    assert question.endswith("?")
    assert "**Reads**" in book.cells[0].source
    # The same bytes from whatever editor: keys sorted, one space, no state of a machine.
    text = json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert path.read_text() == text
    assert set(book.metadata) == {"kernelspec", "language_info"}


def test_each_of_the_eight_questions_has_a_notebook_and_the_tour_has_one() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 10)]


# ------------------------------------------------------------------------------------------------------------- curves


def test_moving_band_by_hand() -> None:
    """Logged every fifth step, window of ten: the last two points; the first has only itself."""
    band = moving_band(Curve(np.array([5, 10, 15, 20]), np.array([1.0, 3.0, 7.0, 7.0])), 10)
    assert band.mean.tolist() == [1.0, 2.0, 5.0, 7.0]
    assert band.deviation.tolist() == [0.0, 1.0, 2.0, 0.0]
    # Negative control: a window by points instead of steps would take all four.
    assert band.mean[-1] != np.mean([1.0, 3.0, 7.0, 7.0])
    with pytest.raises(InputError, match="window of 0"):
        moving_band(band[:2], 0)  # type: ignore[arg-type]


def test_scalars_of_a_run_are_what_tensorboard_reads(run: Path) -> None:
    curves = read_scalars(run)
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    assert set(curves) == set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert list(zip(*curves["train/loss"], strict=True)) == found
    assert len(found) == 12
    with pytest.raises(InputError, match="no event files"):
        read_scalars(run, "validate")


def test_a_scaling_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_scaling(tmp_path)
    (tmp_path / "scaling.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no scaling"):
        read_scaling(tmp_path)


def test_bands_are_drawn_where_they_were_measured() -> None:
    band = moving_band(Curve(np.array([1, 2, 3]), np.array([1.0, 3.0, 5.0])), 2)
    figure = draw_bands({"loss": {"": band}, "gap": {"": band}})
    axes = figure.axes[0]
    assert axes.get_title() == "loss"
    assert axes.lines[0].get_ydata().tolist() == [1.0, 2.0, 4.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1.0, 5.0)  # 4 + 1
    assert to_svg(figure, "x", "a").count("<svg") == 1


def test_figures_of_readmes_are_what_their_command_draws(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "experiments" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.main(tmp_path)
    for path in figures.FIGURES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run python experiments/figures.py"
    # Every picture that a README of an experiment shows as SVG is one of them.
    shown = {
        (readme.parent / name).resolve()
        for readme in [ROOT / "README.md", *ROOT.glob("experiments/*/README.md")]
        for name in re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", readme.read_text())
    }
    assert shown <= set(figures.FIGURES)


# ---------------------------------------------------------------------------------------------------------- notebooks


def test_analysis_of_the_published_table(execute: Execute) -> None:
    """Correlations from the csv file by numpy; the claims that hold are those of the project's specification."""
    answers = {"verdicts": "verdicts", "values": "[claim.value for claim in claims]", "rest": "rest['PR'][0]"}
    answers["names"] = "[(c.models, c.first, c.second) for c in claims]"
    found = execute("01", {}, answers)
    with open(ROOT / "gve" / "eval" / "uvrb_published.csv") as file:
        rows = list(csv.DictReader(file))
    pr = ("DREAM-E", "LoVR-TH", "PEV-K")
    sets = list(rows[0])[4:20]
    own = [sum(float(row[name]) for name in pr) / 3 for row in rows]
    others = [sum(float(row[name]) for name in sets if name not in pr) / 13 for row in rows]
    assert found["rest"] == pytest.approx(np.corrcoef(own, others)[0, 1])
    values = {tuple(name): value for name, value in zip(found["names"], found["values"], strict=True)}
    expected = {
        ("all", "S", "T"): 0.61,
        ("all", "T", "FG"): 0.74,
        ("all", "S", "FG"): 0.97,
        ("all", "PR", "AVG-A"): 0.97,
    }
    expected |= {("all", "MSRVTT", "AVG-A"): 0.08, ("CLIP-type", "CMP", "VIS"): -0.80, ("MLLM-type", "PR", "CG"): 0.82}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=0.006), name
    # (equal to two decimals, inside the interval, claims)
    assert list(found["verdicts"].values()) == [[1, 1, 2], [2, 3, 6], [0, 5, 6], [0, 1, 1]]
    assert "Finding 4 quotes VIS 0.702 for Unite-7B" in found["text"]
    assert found["figures"] == 4


def test_training_dynamics_of_a_run(execute: Execute, run: Path) -> None:
    answers = {"loss": "list(bands['loss'].mean)", "best": "best", "gap": "list(bands['max-negative gap'].deviation)"}
    found = execute("02", {"RUN": run, "WINDOW": 4}, answers)
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["loss"][-1] == pytest.approx(sum(values["train/loss"][-4:]) / 4)
    assert found["loss"][1] == pytest.approx(sum(values["train/loss"][:2]) / 2)
    last = values["train/max_negative_gap"][-4:]
    assert found["gap"][-1] == pytest.approx(math.sqrt(sum((v - sum(last) / 4) ** 2 for v in last) / 4))
    assert found["best"] == (6 if values["val/loss"][0] <= values["val/loss"][1] else 12)
    assert found["figures"] == 2
    assert "no run at" not in found["text"]


def test_curriculum_dynamics_of_a_run(execute: Execute, run: Path) -> None:
    answers = {
        "spread": "spreads[0]",
        "shares": "history.probabilities[0]",
        "losses": "{k: list(v.values) for k, v in losses.items()}",
    }
    found = execute("03", {"RUN": run}, answers)
    record = json.loads((run / "curriculum.json").read_text())["epochs"][0]
    scores = record["scores"]
    assert found["spread"] == pytest.approx(max(scores.values()) - min(scores.values()))
    total = sum(math.exp(score / 0.1) for score in scores.values())
    for unit, score in scores.items():
        assert found["shares"][unit] == pytest.approx(math.exp(score / 0.1) / total, rel=1e-5)
    assert all(len(values) == 2 for values in found["losses"].values())
    assert found["figures"] == 2


def test_test_time_scaling_of_a_table(execute: Execute, tmp_path: Path) -> None:
    """Two frames settings and two tokens settings that share one; made here, so that the differences are known."""
    lines = ["setting,frames,tokens,kind,name,value,low,high"]
    for frames, tokens, value in ((8, 200, 0.5), (16, 200, 0.6), (48, 200, 0.55), (8, 400, 0.7)):
        lines.append(f"f{frames}-t{tokens},{frames},{tokens},ability,LC,{value},{value - 0.1},{value + 0.1}")
    (tmp_path / "scaling.csv").write_text("\n".join(lines) + "\n")
    found = execute("04", {"RUN": tmp_path}, {"changes": "[[*key, value] for key, value in changes.items()]"})
    changes = {(axis, name): value for axis, name, value in found["changes"]}
    assert changes == {("frames", "LC"): pytest.approx(0.05), ("tokens", "LC"): pytest.approx(0.2)}
    assert "8 -> 48" in found["text"]
    assert "+10.0%" in found["text"]
    assert found["figures"] == 2


def test_data_scaling_of_the_recorded_sweep(execute: Execute) -> None:
    """Against numpy's least squares on the same file."""
    table = SAMPLES / "sweep" / "results.csv"
    found = execute("05", {"RESULTS": table}, {"fits": "{name: [f.a, f.b, *f.a_interval] for name, f in fits.items()}"})
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
    logs = np.log([float(row["x"]) for row in rows])
    for name in ("AVG-A", "LC"):
        slope, offset = np.polyfit(logs, [float(row[name]) for row in rows], 1)
        assert found["fits"][name][:2] == [pytest.approx(slope, abs=1e-9), pytest.approx(offset, abs=1e-9)]
        low, high = found["fits"][name][2:]
        assert low < slope < high
    assert len(rows) == 6
    assert found["figures"] == 1


def test_ablation_of_the_recorded_sweep(execute: Execute) -> None:
    """Two seeds: the mean difference, and Student's t of one degree of freedom, 12.706."""
    table = SAMPLES / "sweep" / "results.csv"
    answers = {"effects": "{arm: [e.value, *e.interval] for arm, e in effects.items()}", "reference": "reference"}
    found = execute("06", {"RESULTS": table, "REFERENCE": "x1", "METRIC": "AVG-D"}, answers)
    with open(table) as file:
        rows = {(row["cell"], row["seed"]): float(row["AVG-D"]) for row in csv.DictReader(file)}
    for arm in ("x3", "x10"):
        one, two = (rows[arm, seed] - rows["x1", seed] for seed in ("0", "1"))
        value, low, high = found["effects"][arm]
        assert value == pytest.approx((one + two) / 2, abs=1e-9)
        assert high - low == pytest.approx(2 * 12.7062 * abs(one - two) / 2, rel=1e-4)
    assert found["reference"] == "x1"
    assert found["figures"] == 1


def test_funnel_of_the_recorded_run(execute: Execute) -> None:
    folder = SAMPLES / "synth"
    answers = {"counts": "[[*key, value] for key, value in counts.items()]", "steps": "[s['step'] for s in steps]"}
    found = execute("07", {"RUN": folder}, answers)
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    expected = Counter((line["step"], line["reason"]) for line in lines)
    assert {(step, reason): count for step, reason, count in found["counts"]} == expected
    assert found["steps"] == ["input", "scan", "select", "enrich", "extend", "output"]
    assert found["figures"] == 2


def test_a_funnel_that_does_not_add_up_stops_the_page(execute: Execute, tmp_path: Path) -> None:
    funnel = json.loads((SAMPLES / "synth" / "funnel.json").read_text())
    funnel["steps"][1]["out"] += 1
    (tmp_path / "funnel.json").write_text(json.dumps(funnel))
    (tmp_path / "rejects.jsonl").write_bytes((SAMPLES / "synth" / "rejects.jsonl").read_bytes())
    with pytest.raises(Exception, match="AssertionError"):
        execute("07", {"RUN": tmp_path}, {})


def test_look_at_the_toy_pairs(execute: Execute, toy_world: Path) -> None:
    """A picture of each pair; the last pair's pixels are those that the world's own decoder gives."""
    parameters = {"SHARDS": toy_world / "shards", "MOST_SOURCES": 4, "SEED": 1}
    answers = {
        "looked": "looked",
        "tasks": "[s.record.task for s in sources]",
        "size": "pictures(sources[-1].read(0).target)[0].shape",
    }
    found = execute("08", parameters, answers)
    assert len(set(found["tasks"])) == 13
    assert len(found["looked"]) == 4
    assert found["figures"] == 4
    assert found["size"][2] == 3


def test_tour_of_the_api(execute: Execute, toy_world: Path) -> None:
    """Its similarities are those of the encoder called by hand, and its search finds what they rank first."""
    parameters = {"MODEL": EMBEDDED, "BASE": "", "UVRB": toy_world / "uvrb", "SET": "CRB-G", "CLIPS": 3}
    answers = {"similarity": "similarity.tolist()", "hits": "answer['hits']", "clips": "list(map(str, clips))"}
    answers["asked"] = "asked.tolist()"
    found = execute("09", parameters, answers)
    tested = UVRBReader(toy_world / "uvrb").read("CRB-G")
    corpus = [tested.corpus[rows[0]] for rows in tested.positives[:3]]
    inputs = {"sampling": Sampling.uniform(8), "max_frame_tokens": 9}
    encoder = load_encoder(str(EMBEDDED), inputs=inputs)
    queries = [Item.of(query.text, instruction=usual_instruction(query)) for query in tested.queries[:3]]
    vectors = [encoder.encode(items).vectors for items in (queries, corpus)]
    assert np.allclose(found["similarity"], vectors[0] @ vectors[1].T, atol=1e-5)
    still = Item.of(image=decode(corpus[0].media[0].source, Sampling.uniform(8)).pixels[3])
    asked = encoder.encode([Item(still.parts, usual_instruction(still))]).vectors
    assert np.allclose(found["asked"][0], asked @ vectors[1].T, atol=1e-5)
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert {hit["path"] for hit in found["hits"]} <= set(found["clips"])
    assert found["figures"] == 1


# --------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_runs_as_it_stands_in_a_kernel_of_its_own(path: Path, tmp_path: Path) -> None:
    """With nothing made before: it says so and shows what was recorded. Under a minute."""
    missing = {
        name: str(tmp_path / "nothing")
        for name in ("RUN", "RESULTS", "SHARDS")
        if f"\n{name} = " in "\n" + "\n".join(cell.source for cell in read(path).cells)
    }
    book = prepared(path, missing, {"done": "True"})
    start = time.monotonic()
    NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(path.parent)}}).execute()
    seconds = time.monotonic() - start
    found = outcome(book)
    assert found["figures"] > 0
    assert bool(missing) == (f"at {tmp_path / 'nothing'}" in found["text"])
    assert seconds < SECONDS
