"""UVRB in the training loop and in `gve validate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from gve.callbacks.randomness import undisturbed
from gve.encode.encoder import BackboneEncoder
from gve.encode.store import EmbeddingStore
from gve.eval.ablation import Ablation, parse_ablations
from gve.eval.cells import Condition, score_ablation, write_cells
from gve.eval.evaluation import Scores, evaluate
from gve.eval.report import ability_table, radar, write_report
from gve.eval.results import Results, write_json
from gve.eval.uvrb import RetrievalSet, UVRBReader, find_record
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError
from gve.model.embedder import VideoEmbedder
from gve.video import Sampling


@dataclass(frozen=True)
class EvaluationInputs:
    """Where the evaluation's input policy differs from training's (paper: 8 uniform frames, 200 tokens each, 8192).

    Args:
        sampling: which frames of a clip are read.
        max_frame_tokens: upper limit of vision tokens for one frame before two frames are merged.
        max_length: tokens of one input.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling.uniform(8))
    max_frame_tokens: int = 200
    max_length: int = 8192

    def policy(self, trained: InputPolicy) -> InputPolicy:
        """The trained policy with these values in place."""
        return trained.replace(
            sampling=self.sampling,
            max_frame_tokens=self.max_frame_tokens,
            min_frame_tokens=min(trained.min_frame_tokens, self.max_frame_tokens),
            max_length=self.max_length,
        )


_INPUTS = EvaluationInputs()


class UVRBEvaluation(L.Callback):
    """Scores the model on the sets of UVRB on all ranks, in fit, validate and test, without disturbing training.

    In fit it logs `uvrb/<set>/<metric>` and `uvrb/ability/<name>`, a radar picture, and writes `uvrb/step_<n>.json`. In
    validate and test it also runs the untrained base and the ablations and writes uvrb.json, report.md, radar.png and
    uvrb_positions.npz into trainer.default_root_dir, with ablations also ablation.csv and ablation.json, the cells of
    ablation tables (gve.eval.cells). It needs a validation loader, as all validation hooks do.
    These scores describe a model and never choose it: checkpoints are chosen on the dev split.

    Args:
        root: folder of the sets, `<root>/<NAME>/jsonl/...`; null switches the evaluation off.
        sets: names of the sets to run; null runs all that are present.
        inputs: where the input policy differs from training's.
        every_n_epochs: how often it runs in fit; the last epoch always counts. 0: not in fit.
        max_queries: most queries of a set in fit, chosen by `seed`; validate runs all. null for all.
        seed: chooses the queries of a subset.
        untrained: validate also scores the base with its adapters off.
        ablations: validate also scores the model under these: static, shuffled, reversed, black, text_only, media_only
            (what is not shown), or mappings of what is changed: {frames: 16}, {tokens: 100}, {prompt: none} (or
            generic, or an instruction), {append_eos: false}, {target_text: "a video"}, {adapters: off}, any other
            field of the input policy, or several: {frames: 16, tokens: 400, shown: shuffled}.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes that decode.
        memory_mb: host memory, in MiB, for prepared inputs and vision features of clips: the untrained base and later
            epochs then need neither decoder nor tower. 0 for none.
        store: keep embeddings under trainer.default_root_dir/embeddings, so that interrupted work goes on.
        resamples: bootstrap replicates behind every interval.
    """

    def __init__(
        self,
        root: str | None = None,
        sets: list[str] | None = None,
        inputs: EvaluationInputs = _INPUTS,
        every_n_epochs: int = 1,
        max_queries: int | None = None,
        seed: int = 0,
        untrained: bool = True,
        ablations: Sequence[str | dict[str, Any]] = (),
        batch_tokens: int = 16384,
        num_workers: int = 0,
        memory_mb: int = 1024,
        store: bool = False,
        resamples: int = 10000,
    ) -> None:
        for name in sets or ():
            find_record(name)
        if max_queries is not None and max_queries < 1:
            raise InputError(
                f"uvrb.max_queries={max_queries} must be at least 1; set every_n_epochs to 0 to switch off"
            )
        self.root, self.set_names, self.inputs = root, sets, inputs
        self.every_n_epochs, self.max_queries, self.seed = every_n_epochs, max_queries, seed
        self.untrained, self.ablations = untrained, parse_ablations(ablations)
        self.batch_tokens, self.num_workers, self.memory_mb = batch_tokens, num_workers, memory_mb
        self.store, self.resamples = store, resamples
        self._sets: list[RetrievalSet] = []
        self._encoder: BackboneEncoder | None = None
        self._evaluated = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reads the listings, so that a wrong folder, set or ablation stops the run before it trains."""
        self._evaluated = False
        if not self.root:
            return
        for ablation in self.ablations:
            ablation.policy(self.inputs.policy(_embedder(pl_module).inputs))
        if not self._sets:
            reader = UVRBReader(self.root)
            self._sets = [reader.read(name) for name in self.set_names or reader.names()]
            for tested in self._sets:
                if tested.missing:
                    rank_zero_warn(
                        f"{tested.record.name}: {len(tested.missing)} media files are missing, for example "
                        f"{tested.missing[0]}; the set is incomplete and enters no average"
                    )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._sets or trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
            if self.every_n_epochs and (last or (trainer.current_epoch + 1) % self.every_n_epochs == 0):
                self._in_fit(trainer, pl_module)
        else:
            self._in_full(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._sets:
            self._in_full(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._encoder = None  # its memory of prepared inputs goes, and another model may come next
        if self._sets and stage in ("validate", "test") and not self._evaluated:
            raise InputError(
                "UVRB was not run: Lightning skips a validation whose dev split has no rows; set data.dev_pairs above "
                "0, or use gve uvrb run"
            )

    def _in_fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sets = self._sets
        if self.max_queries is not None:
            sets = [tested.subset(self.max_queries, self.seed) for tested in sets]
        encoder = self._encoder_of(pl_module)
        with undisturbed(), trainer.precision_plugin.forward_context():
            scores = evaluate(encoder, sets, progress="uvrb")
        results = self._results(trainer.global_step, encoder, scores)
        # From every rank: the values are equal already, and a monitor must find its key on all of them.
        pl_module.log_dict(results.metrics(), sync_dist=False, rank_zero_only=False)
        self._draw(trainer, results)
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "uvrb" / f"step_{results.step}.json", results)

    def _in_full(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluated = True
        encoder = self._encoder_of(pl_module)
        folder = None
        if self.store:
            # The arithmetic rounds the vectors, and stands in no hash of weights or inputs.
            dtype = str(encoder.backbone.model.dtype).removeprefix("torch.")
            folder = Path(trainer.default_root_dir) / "embeddings" / f"{trainer.precision}-{dtype}"
        stores: dict[str, EmbeddingStore] = {}
        with undisturbed(), trainer.precision_plugin.forward_context():
            scores = self._pass(Ablation("model"), encoder, stores, folder).scores
            untrained: Scores = {}
            if self.untrained:
                untrained = self._pass(Ablation("untrained", adapters=False), encoder, stores, folder).scores
            conditions = [self._pass(ablation, encoder, stores, folder) for ablation in self.ablations]
        results = self._results(_embedder(pl_module).trained_steps, encoder, scores, untrained, conditions)
        # Loggers get the step of the weights; Lightning would file all of a validate run under step 0.
        pl_module.log_dict(results.metrics(), logger=False, sync_dist=False, rank_zero_only=False)
        for logger in trainer.loggers:
            logger.log_metrics(results.metrics(), results.step)
        self._draw(trainer, results)
        if trainer.is_global_zero:
            root = Path(trainer.default_root_dir)
            write_report(root, results, write_cells(root, results, conditions))
            # Rich takes 80 columns for a pipe or a log file, which would cut the intervals off.
            Console(width=None if sys.stdout.isatty() else 120).print(ability_table(results))
            rank_zero_info(f"UVRB report: {root / 'report.md'}")
        trainer.strategy.barrier()

    def _pass(
        self, ablation: Ablation, encoder: BackboneEncoder, stores: dict[str, EmbeddingStore], folder: Path | None
    ) -> Condition:
        """All sets once, with a bar on the terminal and a line that stays in logs."""
        start = time.monotonic()
        own = encoder if ablation.adapters else encoder.untrained()
        name = own.fingerprint  # of a model without adapters the same as of its base: one store
        if name not in stores:
            stores[name] = EmbeddingStore(folder, name)
        title = f"uvrb, {ablation.name}"
        condition = score_ablation(ablation, own, self._sets, stores[name], folder=folder, progress=title)
        rank_zero_info(f"{title}: {len(condition.scores)} sets in {time.monotonic() - start:.0f} s")
        return condition

    def _encoder_of(self, pl_module: L.LightningModule) -> BackboneEncoder:
        """One encoder for the whole run: its memory serves every epoch, as the tower never changes."""
        if self._encoder is None:
            embedder = _embedder(pl_module)
            self._encoder = BackboneEncoder(
                embedder.backbone,
                InputBuilder.from_base(embedder.base, self.inputs.policy(embedder.inputs)),
                batch_tokens=self.batch_tokens,
                num_workers=self.num_workers,
                memory_bytes=self.memory_mb << 20,
            )
        return self._encoder

    def _results(
        self,
        step: int,
        encoder: BackboneEncoder,
        scores: Scores,
        untrained: Scores | None = None,
        conditions: Sequence[Condition] = (),
    ) -> Results:
        return Results(
            scores=scores,
            untrained=untrained or {},
            ablations={condition.ablation.name: condition.scores for condition in conditions},
            inputs=encoder.inputs,
            weights_hash=encoder.weights_hash,
            untrained_weights_hash=encoder.untrained().weights_hash,
            step=step,
            resamples=self.resamples,
        )

    def _draw(self, trainer: L.Trainer, results: Results) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_figure("uvrb/radar", radar(results.data), results.step)


def _embedder(pl_module: L.LightningModule) -> VideoEmbedder:
    if not isinstance(pl_module, VideoEmbedder):
        raise TypeError(f"UVRBEvaluation evaluates a VideoEmbedder, got {type(pl_module).__name__}")
    return pl_module
