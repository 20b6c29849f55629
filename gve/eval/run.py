"""A run of the benchmark: one model, one or several settings of frames and tokens, everything kept under one folder.

`<out>/embeddings` holds every vector: an interrupted run goes on, and a second one encodes nothing. Each setting has a
folder with uvrb.json, report.md, radar.png and the positions of every query. `<out>/run.json` names the settings that
are done and says where, how long and on what they ran; `scaling.json` and `scaling.csv` put them side by side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gve
from gve.encode.encoder import Execution, LoadedEncoder
from gve.encode.ranks import available_cores, world
from gve.encode.store import EmbeddingStore
from gve.eval.evaluation import NEAREST, Scores, evaluate
from gve.eval.report import write_report
from gve.eval.results import Results, write_run, write_whole
from gve.eval.trec import write_trec
from gve.eval.uvrb import ABILITIES, AVERAGES, RetrievalSet
from gve.items import InputError
from gve.video import Sampling


@dataclass(frozen=True)
class Setting:
    """What a model is shown of a clip, and how much of a text it reads.

    Args:
        frames: of a clip, uniformly sampled; even.
        tokens: most vision tokens of a frame, before two frames are merged.
        max_length: tokens of one input.
    """

    frames: int = 8
    tokens: int = 200
    max_length: int = 8192

    def __post_init__(self) -> None:
        if self.frames < 2 or self.frames % 2:
            raise InputError(f"frames={self.frames} must be even and at least 2: a grid step merges two frames")
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens} must be at least 1")
        clip = self.frames // 2 * self.tokens
        if clip >= self.max_length:
            raise InputError(
                f"{self.frames} frames of {self.tokens} tokens are {clip} tokens of {self.max_length}: raise max_length"
            )

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"frames{self.frames}-tokens{self.tokens}"

    @property
    def values(self) -> dict[str, int]:
        """As uvrb.json states it."""
        return {"frames": self.frames, "tokens": self.tokens, "max_length": self.max_length}

    @property
    def inputs(self) -> dict[str, Any]:
        """The fields of an input policy that it sets."""
        return {
            "sampling": Sampling.uniform(self.frames),
            "max_frame_tokens": self.tokens,
            "max_length": self.max_length,
        }


def settings_of(
    frames: Sequence[int], tokens: Sequence[int], *, max_length: int = 8192, grid: bool = False
) -> list[Setting]:
    """The settings of a test-time scaling study; the first of each list is the protocol's.

    Args:
        frames: numbers of frames, at the first number of tokens.
        tokens: numbers of tokens a frame, at the first number of frames.
        max_length: tokens of one input.
        grid: every number of frames with every number of tokens.

    Raises:
        InputError: a setting cannot be.
    """
    pairs = [(count, budget) for budget in tokens for count in frames]
    if not grid:  # as in the paper: one varies, the other stays
        pairs = [pair for pair in pairs if pair[0] == frames[0] or pair[1] == tokens[0]]
    return [Setting(count, budget, max_length) for count, budget in dict.fromkeys(pairs)]


@dataclass(frozen=True)
class RunOptions:
    """How a run scores and what it leaves.

    Args:
        untrained: also score the base with its adapters off.
        whole_corpus: rank the queries of sets with pools against their whole corpus too.
        trec: also write TREC run and qrels files with so many items a query; 0 for none.
        resamples: bootstrap replicates behind every interval.
    """

    untrained: bool = False
    whole_corpus: bool = False
    trec: int = 0
    resamples: int = 10000


@dataclass(frozen=True, eq=False)
class SettingRun:
    """One setting, run.

    Args:
        setting: what the model was shown.
        results: the scores.
        seconds: wall time, the model's loading included.
        encoded: contents that went through the model; the others stood in the store, or are texts, which another
            setting shows alike.
        same_as: name of an earlier setting that this model cannot tell from this one; empty for none.
    """

    setting: Setting
    results: Results
    seconds: float
    encoded: int
    same_as: str = ""

    @property
    def incomplete(self) -> dict[str, int]:
        """Set -> items that could not be encoded, of the sets that enter no average."""
        every = {**self.results.untrained, **self.results.scores}
        return {name: len(score.unread) for name, score in every.items() if not score.complete}


@dataclass(eq=False)
class BenchmarkRun:
    """Scores sets under settings, each distinct content once; a collective where ranks exist.

    Args:
        model: its name as the user gave it.
        load: opens the model under a setting.
        sets: what to run.
        out: folder of the run.
        options: how it scores.
        facts: what run.json shall say beside: root of the sets, device, ...
        execution: how the model runs; vectors of another dtype are never taken for these.
    """

    model: str
    load: Callable[[Setting], LoadedEncoder]
    sets: Sequence[RetrievalSet]
    out: Path
    options: RunOptions = field(default_factory=RunOptions)
    facts: dict[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)

    def run(self, settings: Sequence[Setting]) -> list[SettingRun]:
        """All settings in turn; what is done is written before the next begins.

        Raises:
            InputError: the model cannot be opened, or has no adapters that could be off.
        """
        done: list[SettingRun] = []
        names: dict[str, str] = {}  # fingerprint -> setting
        stores: dict[str, EmbeddingStore] = {}  # weights -> of the setting before: texts are shown no frames
        for setting in settings:
            start = time.monotonic()
            encoder = self.load(setting)
            same_as = names.setdefault(encoder.fingerprint, setting.name)
            encoded = 0
            passes: dict[str, Scores] = {}
            for title, answering in self._models(encoder).items():
                store = self._store(answering, stores)
                passes[title] = evaluate(
                    answering,
                    self.sets,
                    store,
                    whole_corpus=self.options.whole_corpus,
                    depth=max(NEAREST, self.options.trec),
                    progress=f"{title}, {setting.name}",
                )
                encoded += store.added
            base = getattr(encoder, "untrained", None) if self.options.untrained else None
            results = Results(
                scores=passes["model"],
                untrained=passes.get("untrained", {}),
                inputs=encoder.inputs,
                weights_hash=encoder.weights_hash,
                untrained_weights_hash=base().weights_hash if base else "",
                resamples=self.options.resamples,
                model=self.model,
                setting=setting.values,
            )
            done.append(
                SettingRun(
                    setting,
                    results,
                    seconds=time.monotonic() - start,
                    encoded=encoded,
                    same_as="" if same_as == setting.name else same_as,
                )
            )
            if world()[0] == 0:
                self._write(done)
        return done

    def _models(self, encoder: LoadedEncoder) -> dict[str, LoadedEncoder]:
        if not self.options.untrained:
            return {"model": encoder}
        base = getattr(encoder, "untrained", None)
        if base is None:
            raise InputError(f"{self.model} has no adapters that could be off: leave out --untrained")
        return {"model": encoder, "untrained": base()}

    def _store(self, encoder: LoadedEncoder, before: dict[str, EmbeddingStore]) -> EmbeddingStore:
        """The store of an encoder, with the texts that the setting before has encoded under the same weights."""
        key = hashlib.sha256(f"{encoder.fingerprint}\0{self.execution.dtype}".encode()).hexdigest()
        store = EmbeddingStore(self.out / "embeddings", key)
        if encoder.weights_hash in before:
            texts = [item for tested in self.sets for item in (*tested.queries, *tested.corpus) if not item.media]
            store.adopt(before[encoder.weights_hash], texts, write=world()[0] == 0)
        before[encoder.weights_hash] = store
        return store

    def _write(self, done: Sequence[SettingRun]) -> None:
        """The folder of the last setting, and what says that it is there."""
        last = done[-1]
        folder = self.out / last.setting.name
        write_report(folder, last.results)
        if self.options.trec:
            write_trec(folder / "trec", last.results)
        if len(done) > 1:
            rows = scaling_rows(done)
            write_whole(self.out / "scaling.json", (json.dumps(rows, indent=1) + "\n").encode())
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            write_whole(self.out / "scaling.csv", text.getvalue().encode())
        facts = {
            "version": gve.__version__,
            "model": self.model,
            **self.facts,
            "settings": [run.setting.name for run in done],
            "seconds": {run.setting.name: round(run.seconds, 1) for run in done},
            "encoded": {run.setting.name: run.encoded for run in done},
            "hardware": hardware(self.execution),
        }
        write_run(self.out, facts)


def scaling_rows(runs: Sequence[SettingRun]) -> list[dict[str, Any]]:
    """One row a setting and set or ability: setting, frames, tokens, kind, name, value, low, high (95%).

    Abilities and averages that lack a set have no row.
    """
    rows = []
    for run in runs:
        data = run.results.data
        found = [
            *(("set", name, row["value"], row["interval"]) for name, row in data["sets"].items()),
            *(
                ("ability", name, data["abilities"][name], data["ability_intervals"][name])
                for name in (*AVERAGES, *ABILITIES)
                if data["abilities"][name] is not None
            ),
        ]
        for kind, name, value, (low, high) in found:
            rows.append(
                {
                    "setting": run.setting.name,
                    "frames": run.setting.frames,
                    "tokens": run.setting.tokens,
                    "kind": kind,
                    "name": name,
                    "value": value,
                    "low": low,
                    "high": high,
                }
            )
    return rows


def hardware(execution: Execution) -> dict[str, Any]:
    """What a reader of the seconds must know: processor, its cores for this process, accelerator, ranks, libraries."""
    cuda = execution.device.startswith("cuda")
    return {
        "machine": platform.machine(),
        "cores": available_cores(),
        "device": torch.cuda.get_device_name(torch.device(execution.device)) if cuda else "cpu",
        "ranks": world()[1],
        "dtype": execution.dtype,
        "torch": torch.__version__,
    }
