"""The TensorBoard page of a run that was interrupted, went on, and was evaluated: read back from its event files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from gve.callbacks.dashboard import FINAL, LAYOUT, hyperparameters
from gve.cli import main


def gve(*words: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


class Crash(L.Callback):
    """Dies as the tenth step begins, once in a run folder; and keeps what AdamW was given."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        marker = Path(trainer.default_root_dir) / "crashed"
        if trainer.global_step == 9 and not marker.exists():
            marker.touch()
            raise RuntimeError("the power is gone")


class Norms(L.Callback):
    """Step -> norm of all gradients, by hand, in norms.yaml."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        squares = [(weight.grad.double() ** 2).sum() for weight in pl_module.parameters() if weight.grad is not None]
        self.norms[trainer.global_step + 1] = float(torch.stack(squares).sum().sqrt())
        (Path(trainer.default_root_dir) / "norms.yaml").write_text(yaml.safe_dump(self.norms))


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six steps, a checkpoint after the eighth, killed in the tenth and continued; then validated."""
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    words = ["--config", recipe, "--trainer.default_root_dir", folder, "--checkpoint.every_n_train_steps", 4]
    words += ["--checkpoint.monitor", "null", "--uvrb.sets", '["MSRVTT", "CMRB"]', "--uvrb.every_n_epochs", 1]
    words += ["--trainer.gradient_clip_val", 0.01]
    fit = ["fit", *words, "--trainer.callbacks+=test_dashboard.Crash", "--trainer.callbacks+=test_dashboard.Norms"]
    with pytest.raises(RuntimeError, match="the power is gone"):
        main([str(word) for word in fit])
    gve(*fit, "--ckpt_path", "auto")
    gve("validate", *words, "--ckpt_path", folder / "checkpoints" / "last.ckpt", "--uvrb.untrained", "false")
    return folder


def steps(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps of its points, as TensorBoard's own reader gives them."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def plugin(folder: Path, tag: str) -> list[Any]:
    """What the hyperparameters' page finds under a tag, one for each event file that has it."""
    found = []
    for file in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == tag:
                    found.append(plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content))
    return found


def test_steps_are_completed_optimizer_steps_and_nothing_is_there_twice(run: Path) -> None:
    files = sorted((run / "tensorboard").glob("events.*"))
    assert len(files) == 2, "one for each attempt"
    logged = Counter(
        (value.tag, event.step)
        for file in files
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    )
    assert logged[("train/loss", 9)] == 2, "the killed attempt had taken the ninth step"
    for tag, found in steps(run / "tensorboard").items():
        expected = {"train": range(1, 13), "throughput": range(1, 13), "val": (6, 12), "uvrb": (6, 12)}
        assert found == list(expected.get(tag.split("/")[0], (0, 6))), tag  # the curriculum's, before each epoch


def test_an_evaluation_has_a_folder_of_its_own_at_the_step_of_its_weights(run: Path) -> None:
    tags = steps(run / "tensorboard" / "validate")
    assert {tag.split("/")[0] for tag in tags} == {"val", "uvrb"}
    assert all(found == [12] for found in tags.values())


def test_learning_rate_and_gradient_norm(run: Path) -> None:
    """The cosine schedule by hand, and the norm before clipping, which would leave 0.01."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    rates = {event.step: event.value for event in events.Scalars("train/learning_rate")}
    assert rates[1] == pytest.approx(3e-3)
    assert rates[7] == pytest.approx(1.5e-3)  # cos(pi / 2) = 0 after six of twelve steps
    norms = {event.step: event.value for event in events.Scalars("train/grad_norm")}
    after = yaml.safe_load((run / "norms.yaml").read_text())  # of the second attempt
    assert sorted(after) == [9, 10, 11, 12]
    for step, norm in after.items():
        assert norms[step] == pytest.approx(norm, rel=1e-5)
        assert norm > 0.05


def test_the_custom_scalars_page_shows_every_tag_once_and_has_no_empty_chart(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (event,) = events.Tensors("custom_scalars__config__")[-1:]
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in page.category for chart in part.chart}
    assert [part.title for part in page.category] == list(LAYOUT)
    assert charts == {title: tags for charts in LAYOUT.values() for title, (_, tags) in charts.items()}
    tags = set(steps(run / "tensorboard"))
    # Two sets make no ability, and negatives were not mined: their tags by name.
    tags |= {tag for _, tag in FINAL} | {"mining/toy_short/enough"}
    shown = Counter(
        tag for tag in tags for patterns in charts.values() if any(re.match(pattern, tag) for pattern in patterns)
    )
    assert set(shown) == tags
    assert set(shown.values()) == {1}
    for title, patterns in charts.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), f"{title} is empty"
    # Negative control: the page would not show a tag that it does not know.
    assert not any(re.match(pattern, "epoch") for patterns in charts.values() for pattern in patterns)


def test_hyperparameters_stand_beside_the_final_values(run: Path) -> None:
    (first, second) = plugin(run / "tensorboard", metadata.SESSION_START_INFO_TAG)
    assert first.session_start_info.hparams == second.session_start_info.hparams
    values = second.session_start_info.hparams
    assert values["model.lora.rank"].number_value == 4
    assert values["model.optimizer.lr"].number_value == 3e-3
    assert values["data.curriculum.schedule"].string_value == "pyramid"
    assert values["seed_everything"].number_value == 7
    assert yaml.safe_load((run / "tensorboard" / "hparams.yaml").read_text())["model.lora.rank"] == 4
    record = plugin(run / "tensorboard", metadata.EXPERIMENT_TAG)[-1].experiment
    assert {info.name for info in record.hparam_infos} == set(values)
    assert [(info.name.group, info.name.tag) for info in record.metric_infos] == list(FINAL)
    written = {("", tag) for tag in steps(run / "tensorboard")}
    written |= {("validate", tag) for tag in steps(run / "tensorboard" / "validate")}
    assert ("", "val/loss") in written
    assert set(FINAL) - written == {name for name in FINAL if name[1].startswith("uvrb/ability/")}, "of two sets"
    (end,) = plugin(run / "tensorboard", metadata.SESSION_END_INFO_TAG)  # the killed attempt has none
    assert end.session_end_info.status == api_pb2.STATUS_SUCCESS


def test_hyperparameters_keep_what_the_page_can_show() -> None:
    _, start = hyperparameters({"a": 1, "b": "x", "c": None, "d": [1], "e": True})
    content = plugin_data_pb2.HParamsPluginData.FromString(start.value[0].metadata.plugin_data.content)
    assert set(content.session_start_info.hparams) == {"a", "b", "e"}
