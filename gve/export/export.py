"""Writes an export: draft folder, merged weights, files, proof, card; then the draft takes its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import gve
from gve.encode.encoder import BackboneEncoder, Execution
from gve.encode.pretrained import RECORD, ModelFiles, Trained, load_encoder, read_trained
from gve.export import card, parity
from gve.export.files import write_json, write_processors, write_sentence_transformers, write_tokenizer
from gve.export.weights import hub_config, write_tensors, write_weights
from gve.items import InputError
from gve.model.adapters import SETTINGS, WEIGHTS, to_peft

Stored = Literal["auto", "float32", "bfloat16", "float16"]


class ParityError(RuntimeError):
    """An exported form gives other vectors than the checkpoint; nothing was written.

    Args:
        rows: the whole report.
    """

    def __init__(self, rows: Sequence[parity.Row]) -> None:
        self.rows = list(rows)
        off = parity.failed(rows)
        worst = max(off, key=lambda row: row.difference or 0)
        super().__init__(
            f"{len(off)} of {len(rows)} forms and contents are off, the most {worst.form} on {worst.content}: "
            f"1 - cosine {worst.difference:.1e} is above {parity.LIMIT:.0e}"
        )


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Args:
        adapter_only: write the adapter in PEFT's format, without the base.
        dtype: of the stored weights; "auto": that of the base's files.
        force: replace an earlier export at the same place.
        check: load every form and compare; it needs the memory of the model once more, one form at a time.
        base: where the base lies now; the place it was trained from when empty.
        device: torch device of the check.
        card: what the user adds to the model card.
    """

    adapter_only: bool = False
    dtype: Stored = "auto"
    force: bool = False
    check: bool = True
    base: str = ""
    device: str = "cpu"
    card: card.CardOptions = field(default_factory=card.CardOptions)


def export(
    name: str, out: Path, options: ExportOptions, progress: Callable[[str], object] = lambda step: None
) -> list[parity.Row]:
    """Exports a checkpoint of `gve fit`, or an adapter of PEFT on a Qwen2.5-VL.

    Args:
        name: the checkpoint's file, or the adapter's folder.
        out: folder to write; it appears when all is done and proved, and not at all otherwise.
        options: see there.
        progress: told each step.

    Returns:
        The parity report; empty without the check.

    Raises:
        InputError: the checkpoint, its base or `out` cannot be used.
        ParityError: a form is off.
    """
    if out.exists() and not (options.force and (out / RECORD).is_file()):
        known = (out / RECORD).is_file()
        raise InputError(
            f"{out} exists; " + ("replace it by --force" if known else "and it is no export of gve: choose another")
        )
    progress("loading")
    trained = read_trained(name)
    if trained.kind == "model":
        raise InputError(f"{name} is a whole model: there is nothing to merge; export a checkpoint or an adapter")
    base = options.base or trained.base
    encoder = load_encoder(name, adapter="gve", base=base, execution=Execution(options.device))
    assert isinstance(encoder, BackboneEncoder)
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        work = _Work(encoder, trained, base, Path(name), options, progress)
        rows = work.adapter(draft) if options.adapter_only else work.model(draft, out.name)
        if out.exists():
            shutil.rmtree(out)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return rows


@dataclass
class _Work:
    """One export under way. The checkpoint's model is let go before the exported forms are loaded."""

    encoder: BackboneEncoder
    trained: Trained
    base: str
    source: Path
    options: ExportOptions
    progress: Callable[[str], object]

    def adapter(self, folder: Path) -> list[parity.Row]:
        """The adapter alone, in PEFT's format."""
        lora = self.encoder.backbone.lora
        if lora is None:
            raise InputError(f"{self.source} has no adapter: it was trained with lora null")
        self.progress("writing the adapter")
        settings, tensors = to_peft(lora, self.encoder.backbone.trainable_state(), self.base)
        write_tensors(tensors, folder / WEIGHTS)
        write_json(folder / SETTINGS, settings)
        write_json(folder / RECORD, self.record("adapter", self.encoder.weights_hash))
        if not self.options.check:
            return []
        self.progress("checking")
        items = parity.probes(self.encoder.builder)
        kinds, reference = list(items), self.encoder.encode(list(items.values())).vectors
        again = load_encoder(str(folder), adapter="gve", base=self.base, execution=Execution(self.options.device))
        vectors = again.encode(list(items.values())).vectors
        rows = [parity.compare("gve", *own) for own in zip(kinds, reference, vectors, strict=True)]
        return self.proved(rows, folder)

    def model(self, folder: Path, name: str) -> list[parity.Row]:
        """The merged model with all files."""
        encoder, builder = self.encoder, self.encoder.builder
        weights_hash, config, dim = encoder.weights_hash, encoder.backbone.model.config, encoder.dim
        reference = {}
        items = parity.probes(builder)
        if self.options.check:
            self.progress("embedding with the checkpoint")
            vectors = encoder.encode(list(items.values())).vectors
            reference = dict(zip(items, vectors, strict=True))
        dtype = _dtype(self.options.dtype, self.base)
        self.progress(f"merging, {str(dtype).removeprefix('torch.')}")
        files_hash = write_weights(encoder.backbone, self.base, dtype, folder)
        write_json(folder / "config.json", hub_config(config, dtype))
        write_tokenizer(builder.tokenizer, builder.policy, folder)
        write_processors(builder.policy, builder.geometry, folder)
        write_sentence_transformers(builder.policy, dim, folder)
        record = self.record("model", weights_hash) | {"files": files_hash}
        write_json(folder / RECORD, record)
        del self.encoder, encoder
        rows: list[parity.Row] = []
        if self.options.check:
            self.progress("checking every form")
            rows = self.proved(parity.check(reference, items, folder, self.options.device), folder)
        self.progress("model card")
        facts = {"folder": name, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
        (folder / "README.md").write_text(card.render(self.card_facts(record, facts)), encoding="utf-8")
        return rows

    def record(self, kind: str, weights_hash: str) -> dict[str, Any]:
        """gve.json: the input policy, and where the weights come from."""
        policy = self.encoder.builder.policy
        return {
            "format": 1,
            "kind": kind,
            "version": gve.__version__,
            "inputs": policy.to_dict(),
            "inputs_digest": policy.digest(),
            "base": self.base,
            "base_hash": self.encoder.backbone.base_hash,
            "weights": weights_hash,
            "step": self.trained.step,
        }

    def proved(self, rows: list[parity.Row], folder: Path) -> list[parity.Row]:
        """Writes the report, or stops the export."""
        if parity.failed(rows):
            raise ParityError(rows)
        write_json(folder / "parity.json", {"limit": parity.LIMIT, "rows": [row.to_dict() for row in rows]})
        (folder / "parity.md").write_text(parity.table(rows) + "\n")
        return rows

    def card_facts(self, record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """Everything the card's template asks for."""
        sampling = self.trained.inputs.sampling
        saved = card.results_of(self.source, record["weights"]) if self.source.is_file() else None
        hashes = {
            "checkpoint's weights (base and adapters)": record["weights"],
            "base": record["base_hash"],
            "input policy (first 16 digits)": record["inputs_digest"],
            "weight files of this folder": record["files"],
        }
        return {
            **facts,
            "name": self.options.card.name or facts["folder"],
            "front_matter": card.front_matter(self.base, self.options.card),
            "base_name": self.base if not Path(self.base).exists() else Path(self.base).name,
            "version": gve.__version__,
            "step": self.trained.step,
            "inputs": record["inputs"],
            "append_eos": record["inputs"]["append_eos"],
            "sampling": str(sampling),
            "frames_argument": f'"nframes": {sampling.num_frames}'
            if sampling.kind == "uniform"
            else f'"fps": {sampling.fps}, "min_frames": {sampling.min_frames}, "max_frames": {sampling.num_frames}',
            "parity": parity.table(facts["rows"]) if facts["rows"] else "Not measured (`--no-check`).",
            "results": card.results_part(saved) if saved else None,
            "training": card.training_part(self.source, self.trained.sources),
            "hashes": hashes,
        }


def _dtype(wanted: Stored, base: str) -> torch.dtype:
    """The torch dtype of the stored weights.

    Raises:
        InputError: the base's files are of a type that is not exported.
    """
    if wanted == "auto":
        config = ModelFiles.find(base).config
        wanted = config.get("dtype") or config.get("torch_dtype") or "float32"
        if wanted not in get_args(Stored):
            raise InputError(f"the base's weights are {wanted}; say --dtype")
    return getattr(torch, wanted)
