"""`gve fit | validate | test | predict`: LightningCLI over VideoEmbedder and PyramidDataModule.

One run is one folder, `trainer.default_root_dir`: config.yaml, run.json, tensorboard/, checkpoints/, uvrb.json and
report.md. `fit --ckpt_path auto` goes on from the newest whole checkpoint of that folder, or begins where there is
none: the same command starts a run and starts it again. A run that is asked to stop (SIGTERM, SIGUSR1) saves its state
and exits with 85.
Values that two parts must share are linked here once, so that they cannot disagree.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gve.callbacks import (
    AtomicCheckpointIO,
    CurriculumProbe,
    Dashboard,
    HardNegativeMining,
    Predictions,
    RunCheckpoints,
    RunRecord,
    Throughput,
    UVRBEvaluation,
    newest_checkpoint,
    require_checkpoint,
)
from gve.data.datamodule import PyramidDataModule
from gve.items import InputError
from gve.model.embedder import VideoEmbedder

AUTO = "auto"
"""Value of --ckpt_path that asks for the newest whole checkpoint of the run folder."""


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder: config.yaml for fit, config_<command>.yaml else.

    It is written when the run begins, that is after shards, base and checkpoint were accepted. A run that is started
    again overwrites it: the folder belongs to the run, not to the attempt. A run that is refused changes no
    configuration, and leaves no folder where there was none.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **settings: Any) -> None:
        super().__init__(parser, config, **settings)
        root = Path(config.trainer.default_root_dir)
        self._made = [folder for folder in (root, *root.parents) if not folder.exists()]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: whether the run can begin is not known."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.already_saved or not isinstance(exception, InputError) or not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        if root in self._made:
            shutil.rmtree(root, ignore_errors=True)
            for folder in self._made[1:]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else f"config_{stage}.yaml"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        self.parser.save(self.config, draft, skip_unset=False, overwrite=True)
        os.replace(draft, path)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved or trainer.state.fn is None:
            return
        self.already_saved = True
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, trainer.state.fn.value)
        rank_zero_info(
            f"{trainer.state.fn.value} in {trainer.default_root_dir}: {trainer.world_size} x {pl_module.device.type}, "
            f"precision {trainer.precision}, seed {self.config.seed_everything}"
        )


class GVECLI(LightningCLI):
    """LightningCLI with the project's links, callbacks and logger."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CurriculumProbe, "probe")
        parser.add_lightning_class_args(HardNegativeMining, "mining")
        parser.add_lightning_class_args(UVRBEvaluation, "uvrb")
        parser.add_lightning_class_args(RunRecord, "record")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.link_arguments("model.base", "data.base")
        # The model's record itself: parse-time links copy single values, not a record of records.
        parser.link_arguments("model.inputs", "data.inputs", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("trainer.max_epochs", "data.num_epochs")
        parser.link_arguments("data.steps_per_epoch", "trainer.limit_train_batches")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        # The usage that argparse makes names all of some 150 options before it explains one.
        settings.setdefault("usage", "gve COMMAND --config RECIPE.yaml [--KEY VALUE ...], each KEY as below")
        return super().init_parser(**settings)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, then refuses what can be refused before anything is built."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        _require_writable(Path(config.trainer.default_root_dir))
        if "ckpt_path" not in config or config.ckpt_path is None:
            return
        if config.ckpt_path == AUTO:
            self._newest = newest_checkpoint(config.checkpoint.dirpath)
            if self._newest is None and self.config.subcommand != "fit":
                raise InputError(f"{config.checkpoint.dirpath} holds no checkpoint: give one by --ckpt_path")
        else:
            require_checkpoint(str(config.ckpt_path))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what an optional record (model.lora) says about its values.
            raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        if config.logger is None:
            # A fixed name and version: a run that is started again continues its own curves. An evaluation has a
            # folder below, or its points would fall among those of the fit.
            stage = "" if self.subcommand == "fit" else str(self.subcommand)
            logger = TensorBoardLogger(save_dir=config.default_root_dir, name="tensorboard", version=stage)
            logger.hparams.update(_hyperparameters(self.config[self.subcommand].as_dict()))
            kwargs["logger"] = logger
        kwargs["plugins"] = _plugins(config.plugins)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise InputError(f"trainer: {error}") from error

    def after_validate(self) -> None:
        self._print_dev("val")

    def after_test(self) -> None:
        self._print_dev("test")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == AUTO:
            # Here and not in the configuration, which is saved: the same command is given again.
            kwargs["ckpt_path"] = self._newest
        return kwargs

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **settings: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **settings)
        # Lightning's table has a row for every source and set, which the report shows better; a checkpoint is data;
        # what predict gives is written by a callback.
        ours = {"verbose": False, "weights_only": True, "return_predictions": False}
        added = self._subcommand_method_arguments[subcommand]
        parser.set_defaults({name: value for name, value in ours.items() if name in added})
        return parser

    def _print_dev(self, stage: str) -> None:
        means = {name: self.trainer.callback_metrics.get(f"{stage}/{name}") for name in ("loss", "recall_at_1")}
        shown = [f"{stage}/{name} {float(value):.4f}" for name, value in means.items() if value is not None]
        if shown:
            rank_zero_info(f"dev split: {', '.join(shown)}")


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's curves, flat: "model.lora.rank" -> 16. Lists and types are words."""
    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{name}.{key}", inner)
        elif value is not None:
            found[name] = value if isinstance(value, (bool, int, float, str)) else str(value)

    for part in ("seed_everything", "model", "data", "probe", "mining"):
        collect(part, config[part])
    for key in ("max_epochs", "num_nodes", "devices", "strategy", "precision", "gradient_clip_val"):
        collect(f"trainer.{key}", config["trainer"][key])
    return found


def _checkpoint_folder(root: Any) -> str:
    return str(Path(str(root)) / "checkpoints")


def _require_writable(folder: Path) -> None:
    """Makes nothing: a run that is refused for another reason leaves no folder."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "not writable" if there.is_dir() else "not a folder"
        raise InputError(
            f"the run folder {folder} cannot be written ({there} is {reason}): set --trainer.default_root_dir"
        )


def _plugins(given: Any) -> list[Any]:
    """The trainer's plugins: what is given, atomic checkpoints, and under SLURM no requeue by Lightning.

    Lightning's own saves inside a signal handler: that hangs with several ranks, and saves a loader worker's state.
    """
    plugins = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


class _Parsed(Exception):
    """Carries a parsed configuration out of LightningCLI, which has no mode that only parses."""


class _ParseOnly(GVECLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        LightningCLI.parse_arguments(self, parser, args)
        config = self.config[self.config.subcommand]
        raise _Parsed(config, self._parser(self.config.subcommand).dump(config, skip_unset=False))


def parse(argv: Sequence[str]) -> Namespace:
    """The configuration that `gve <argv>` would run with; nothing is built, no file is written or looked for.

    Args:
        argv: the words after `gve`, the subcommand first.

    Raises:
        jsonargparse.ArgumentError: a key or a value is wrong.
    """
    return _parsed(argv)[0]


def resolve(argv: Sequence[str]) -> tuple[Namespace, str]:
    """The configuration that `gve <argv>` would run with, and as YAML that --config takes.

    Args:
        argv: the words after `gve`, the subcommand first.

    Raises:
        InputError: a key or a value is wrong.
    """
    _quieten()
    try:
        return _parsed(argv)
    except ArgumentError as error:
        raise InputError(_complaint(error, argv)) from None


def _parsed(argv: Sequence[str]) -> tuple[Namespace, str]:
    try:
        _run(_ParseOnly, argv)
    except _Parsed as parsed:
        config, text = parsed.args
        return config, text
    raise RuntimeError("LightningCLI ended before its configuration was parsed")


def _run(cli: type[GVECLI], argv: Sequence[str]) -> None:
    # LightningCLI warns when it is given words while the process has words of its own; here they are the same.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
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
            "enable_model_summary": False,  # the self-check of VideoEmbedder says it in words
            "callbacks": [Throughput(), Predictions(), Dashboard()],
        },
        parser_kwargs={"exit_on_error": False},
    )


def main(argv: Sequence[str]) -> int:
    """Runs `fit`, `validate`, `test` or `predict`.

    Args:
        argv: the words after `gve`, the subcommand first.

    Returns:
        0.

    Raises:
        InputError: the configuration, or something it names, cannot be used.
    """
    _quieten()
    try:
        _run(GVECLI, argv)
    except ArgumentError as error:
        raise InputError(_complaint(error, argv)) from None
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    return 0


def _complaint(error: ArgumentError, argv: Sequence[str]) -> str:
    """What the parser says, and where it said it."""
    message = str(error)
    files = [word.rpartition("=")[2] for word in argv if word.endswith((".yaml", ".yml"))]
    if not files and not {"--config", "-c"} & set(argv):
        message += "; a recipe is given by --config"
    elif message.startswith("Problems parsing config"):
        message = f"{', '.join(files)}: {message}"  # the parser does not say which file
    return message


_CHATTER = (
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "\U0001f4a1 Tip",
    "Loading `train_dataloader`",
    "Restoring states",
)
"""First words of Lightning's lines that say what our first line says, or advertise."""


def _quieten() -> None:
    """Hides what a user of the command can do nothing about. Our own lines and warnings stay."""
    # Loaders are sized by configuration; the advice assumes one run per machine.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A run that is started again goes on in its own folder.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    # A machine with SLURM's commands runs small things without them too.
    warnings.filterwarnings("ignore", message=r".*`srun` command is available on your system but is not used.*")
    # Lightning's own use of torch.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_no_chatter)


def _is_no_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)
