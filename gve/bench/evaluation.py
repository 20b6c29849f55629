"""`gve bench evaluation`: items/s from files to scores against mteb's loop, and the ranking alone."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gve.bench.clips import CAPTION, clips_of
from gve.bench.measure import Aim, Contest, Options, Trial
from gve.bench.stock import StockInputs
from gve.encode.encoder import BackboneEncoder
from gve.encode.ranks import available_cores
from gve.encode.topk import search
from gve.eval.evaluation import evaluate
from gve.eval.records import SETS
from gve.eval.uvrb import RetrievalSet
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError, Item
from gve.model.backbone import Backbone
from gve.toy.base import EMBEDDED
from gve.video import Sampling

# The rule of positions is that of the transformers installed, so that both sides give the same vectors.
POLICY = InputPolicy(sampling=Sampling.uniform(8), positions="transformers5", max_length=8192)
BATCH = 4  # clips that mteb's loop hands to the model at once
SHARING = 3  # that share a corpus, as CRB-G, CRB-S and CRB-T do
LARGE = (15_000, 15_000, 3_584)  # queries, corpus, dimensions


def trials(options: Options) -> Iterator[Trial]:
    """Whole evaluations of one set and of three over one corpus, then the ranking of 15,000 by 15,000."""
    yield ranking(*LARGE)
    if importlib.util.find_spec("mteb") is None:
        raise InputError("mteb is not installed: pip install 'gve[mteb]'")
    stock = StockInputs(EMBEDDED, POLICY)
    backbone = Backbone.from_pretrained(str(EMBEDDED), lora=None).to(options.device).eval()
    builder = InputBuilder.from_base(str(EMBEDDED), POLICY)
    workers = min(2, available_cores())
    encoder = BackboneEncoder(backbone, builder, num_workers=workers)
    clips, words = clips_of(options)
    setting = {"clips": words, "frames": 8, "max_frame_tokens": POLICY.max_frame_tokens, "model": "gve/toy/weights"}
    setting |= {"device": options.device, "workers": workers, "batch": BATCH}
    for count in (1, SHARING):
        queries = [[f"{CAPTION} {number} of {part}" for number in range(len(clips))] for part in range(count)]
        yield Contest(
            f"files to scores: {count} set{'s over one corpus' * (count > 1)}",
            {
                "gve": partial(own_loop, encoder, queries, clips),
                "mteb": partial(mteb_loop, StockModel(backbone, stock), queries, clips),
            },
            [Aim("gve", "mteb", "faster")],
            count=2 * count * len(clips),
            unit="items",
            setting=setting,
            # Cosines of the best clip; the stock resize differs by a few levels of 255.
            tolerance=0.02,
        )


def ranking(queries: int, corpus: int, dim: int) -> Contest:
    """Positions and ten nearest of every query against the bare product of the two matrices."""
    random = np.random.default_rng(0)
    q, c = (random.standard_normal((rows, dim), dtype=np.float32) for rows in (queries, corpus))
    positives = [(row % corpus,) for row in range(queries)]

    def bare() -> None:
        """In blocks of one size with the ranking's, so that memory is no part of the comparison."""
        block = np.empty((min(queries, max(1, (1 << 24) // corpus)), corpus), np.float32)
        for start in range(0, queries, len(block)):
            rows = q[start : start + len(block)]
            np.matmul(rows, c.T, out=block[: len(rows)])

    return Contest(
        f"ranking of {queries:,} x {corpus:,} x {dim:,}",
        {"gve": partial(search, q, c, positives, 10), "bare": bare},
        [Aim("gve", "bare", "cost", 1.2)],
        count=queries,
        unit="queries",
        setting={"queries": queries, "corpus": corpus, "dim": dim, "bare": "numpy's float32 matrix product"},
        uncompared=frozenset({"bare"}),
        clock="cpu",
    )


def own_loop(encoder: BackboneEncoder, queries: Sequence[Sequence[str]], clips: Sequence[Path]) -> np.ndarray:
    """`evaluate` of all sets at once; [sets, Q] cosine of each query's best clip."""
    record = next(one for one in SETS if one.name == "MSRVTT")
    corpus = tuple(Item.of(video=path, id=path.name) for path in clips)
    positives = tuple((row,) for row in range(len(clips)))
    sets = []
    for part, texts in enumerate(queries):
        asked = tuple(Item.of(text, id=str(row)) for row, text in enumerate(texts))
        named = dataclasses.replace(record, name=f"{record.name} {part}")
        sets.append(RetrievalSet(named, asked, corpus, positives, None))
    scores = evaluate(encoder, sets)
    return np.stack([score.similarities[:, 0] for score in scores.values()])


def mteb_loop(model: StockModel, queries: Sequence[Sequence[str]], clips: Sequence[Path]) -> np.ndarray:
    """`mteb.evaluate`, a task for each set; [sets, Q] cosine of each query's best clip."""
    import mteb

    best = []
    for texts in queries:
        mteb.evaluate(
            model, _task(texts, clips), cache=None, co2_tracker=False, show_progress_bar=False,
            encode_kwargs={"batch_size": BATCH},
        )  # fmt: skip
        best.append((model.seen["query"] @ model.seen["document"].T).max(1))
    return np.stack(best)


class StockModel:
    """A model of mteb as its users write one: the loop over batches reads, then runs the model, one after the other.

    Args:
        backbone: whose weights are run, by transformers' own forward pass.
        inputs: the stock way of making them.
    """

    def __init__(self, backbone: Backbone, inputs: StockInputs) -> None:
        self.backbone, self.inputs = backbone, inputs
        self.seen: dict[str, np.ndarray] = {}

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        facts = {"name": "bench/stock", "revision": "0", "similarity_fn_name": ScoringFunction.COSINE}
        return ModelMeta.create_empty({**facts, "modalities": ["text", "video"], "framework": ["PyTorch"]})

    @torch.inference_mode()
    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str = "", hf_subset: str = "", prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """[N, D] unit rows."""
        from datasets import Video

        rows = inputs.dataset
        if "video" in rows.column_names:
            rows = rows.cast_column("video", Video(decode=False))
        vectors = []
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            items = (
                [Item.of(video=Path(clip["path"])) for clip in some["video"]]
                if "video" in some
                else [Item.of(text) for text in some["text"]]
            )
            vectors.append(self._embed(self.inputs(items)))
        kind = getattr(prompt_type, "value", prompt_type)
        self.seen[str(kind)] = np.concatenate(vectors)
        return self.seen[str(kind)]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N, M] cosines."""
        return torch.as_tensor(np.asarray(embeddings1)) @ torch.as_tensor(np.asarray(embeddings2)).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N] cosines of row i with row i."""
        return (torch.as_tensor(np.asarray(embeddings1)) * torch.as_tensor(np.asarray(embeddings2))).sum(-1)

    def _embed(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        device = next(self.backbone.parameters()).device
        inputs = {name: torch.as_tensor(value).to(device) for name, value in inputs.items()}
        states = self.backbone.model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1  # padding stands on the right
        pooled = states[torch.arange(len(last), device=device), last].float()
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def _task(texts: Sequence[str], clips: Sequence[Path]) -> Any:
    """A retrieval task of mteb over these clips, the query of a row answered by the clip of the row."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class Clips(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="BenchClips",
            type="Any2AnyRetrieval",
            category="t2v",
            modalities=["text", "video"],
            description="clips of gve bench",
            reference=None,
            dataset={"path": "none", "revision": "none"},
            prompt=None,
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs: Any) -> None:
            asked = datasets.Dataset.from_dict({"id": [f"q{row}" for row in range(len(texts))], "text": list(texts)})
            held = {"id": [f"d{row}" for row in range(len(clips))], "video": [str(path) for path in clips]}
            corpus = datasets.Dataset.from_dict(held).cast_column("video", datasets.Video())
            relevant = {f"q{row}": {f"d{row}": 1} for row in range(len(texts))}
            split = RetrievalSplitData(queries=asked, corpus=corpus, relevant_docs=relevant, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Clips()
