"""`gve fit | validate | test | predict`: LightningCLI over VideoEmbedder and PyramidDataModule.

One run is one folder, `trainer.default_root_dir`: config.yaml, run.json, tensorboard/, checkpoints/, uvrb.json and
report.md.
Values that two parts must share are linked here once, so that they cannot disagree.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from gve.callbacks import RunRecord, UVRBEvaluation
from gve.data.datamodule import PyramidDataModule
from gve.items import InputError
from gve.model.embedder import VideoEmbedder


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder: config.yaml for fit, config_<command>.yaml else.

    A run that is started again overwrites it: the folder belongs to the run, not to the attempt.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else f"config_{stage}.yaml"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        self.parser.save(self.config, draft, skip_none=False, overwrite=True)
        os.replace(draft, path)


class GVECLI(LightningCLI):
    """LightningCLI with the project's links, callbacks and logger."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(UVRBEvaluation, "uvrb")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.inputs", "data.inputs")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("trainer.max_epochs", "data.num_epochs")
        parser.link_arguments("data.steps_per_epoch", "trainer.limit_train_batches")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = Path(config.default_root_dir)
        _require_writable(root)
        if config.logger is None:
            # A fixed name and version: a run that is started again continues its own curves.
            kwargs["logger"] = TensorBoardLogger(save_dir=root, name="tensorboard", version="")
        return super().instantiate_trainer(**kwargs)


def _checkpoint_folder(root: Any) -> str:
    return str(Path(str(root)) / "checkpoints")


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"the run folder {folder} cannot be written ({error.strerror}); set --trainer.default_root_dir"
        ) from None


class _Parsed(Exception):
    """Carries a parsed configuration out of LightningCLI, which has no mode that only parses."""


class _ParseOnly(GVECLI):
    def before_instantiate_classes(self) -> None:
        raise _Parsed(self.config)


def parse(argv: Sequence[str]) -> Namespace:
    """The configuration that `gve <argv>` would run with; nothing is built and no file is written.

    Args:
        argv: the words after `gve`, the subcommand first.

    Raises:
        jsonargparse.ArgumentError: a key or a value is wrong.
    """
    try:
        _run(_ParseOnly, argv)
    except _Parsed as parsed:
        config: Namespace = parsed.args[0]
        return config[config.subcommand]
    raise RuntimeError("LightningCLI ended before its classes")


def _run(cli: type[GVECLI], argv: Sequence[str]) -> None:
    cli(
        VideoEmbedder,
        PyramidDataModule,
        args=list(argv),
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={
            "default_root_dir": "runs/gve",
            "max_epochs": 3,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "callbacks": [RunRecord()],
        },
        parser_kwargs={"exit_on_error": False},
    )


def main(argv: Sequence[str]) -> int:
    """Runs `fit`, `validate`, `test` or `predict`.

    Args:
        argv: the words after `gve`, the subcommand first.

    Returns:
        0. A configuration that does not parse prints one line and returns 2.
    """
    # Loaders are sized by configuration; the advice assumes one run per machine.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    try:
        _run(GVECLI, argv)
    except ArgumentError as error:
        print(f"gve {argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
