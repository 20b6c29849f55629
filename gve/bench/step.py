"""A training step beside the stock ways of doing it: the same weights, LoRA, rows and loss, each compared first.

The stock ways are what a user would write without this project. "transformers": the generation class as it is, LM head
and all hidden states (the only way it gives the last one), both sides padded to their longest row, positions computed
in the model. "sentence-transformers": its cached symmetric multiple-negatives loss around the stock model without the
head, in mini-batches of as many tokens as our chunks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gve.bench.measure import Aim, Contest, Options, Trial
from gve.inputs.builder import Prepared, collate
from gve.inputs.patches import VisionInput, normalised
from gve.inputs.policy import VisionGeometry
from gve.inputs.positions import VisionSpan, mrope_positions
from gve.items import EmbedBatch, InputError, TrainBatch
from gve.model.backbone import ARCHITECTURES, Backbone, Lora
from gve.model.embedder import VideoEmbedder
from gve.toy.base import EMBEDDED

BASES = {
    "tiny": EMBEDDED / "config.json",
    "mid": Path(__file__).parent / "mid.json",
    "3b": ARCHITECTURES / "qwen2_5_vl_3b.json",
    "7b": ARCHITECTURES / "qwen2_5_vl_7b.json",
}
"""Sizes of --size. "mid" has 55M parameters in the proportions of 3B: head to decoder 0.11, tower to decoder 0.3."""
TEMPERATURE = 0.05
TEMPLATE = 25  # tokens of the chat template around an item
SECOND_PER_GRID = 2.0  # of clips read at one frame a second


@dataclass(frozen=True)
class Load:
    """The rows of a step: texts as queries, clips as targets, drawn by a seed.

    Args:
        pairs: B.
        text_tokens: least and most tokens of a caption, drawn by the logarithm.
        clip_s: least and most seconds of a clip, drawn by the logarithm; one frame a second is read, 2, 4, 6 or 8.
        frame_grid: (h, w) of a frame in patches.
        chunk_tokens: of GradCache.
    """

    pairs: int
    text_tokens: tuple[int, int]
    clip_s: tuple[float, float]
    frame_grid: tuple[int, int]
    chunk_tokens: int


LOADS = {
    "tiny": Load(32, (8, 120), (2, 20), (6, 6), 1024),
    "mid": Load(8, (8, 120), (2, 20), (8, 8), 512),
}


def texts_and_clips(config: Any, load: Load, seed: int = 0) -> tuple[list[Prepared], list[Prepared]]:
    """Rows of random ids and pixels, with positions by the rule of transformers 5, which the stock model computes."""
    draw, pixels = random.Random(seed), torch.Generator().manual_seed(seed)
    geometry = VisionGeometry.from_config(config.to_dict())
    words = min(geometry.vision_start, geometry.image_token) - 20  # below the special tokens
    patch_values = 3 * geometry.temporal_patch * geometry.patch**2

    def drawn(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    def row(spans: Sequence[int | VisionSpan], ids: list[int], number: int, **media: Any) -> Prepared:
        positions = mrope_positions(spans, geometry, "transformers5")
        return Prepared(torch.tensor(ids), positions, content_id=number, **media)

    queries, targets = [], []
    for pair in range(load.pairs):
        count = TEMPLATE + round(drawn(*load.text_tokens))
        queries.append(row([count], [draw.randrange(words) for _ in range(count)], pair))
        steps = min(max(round(drawn(*load.clip_s)) // 2, 1), 4)
        grid = (steps, *load.frame_grid)
        tokens = geometry.tokens(grid)
        patches = torch.randint(256, (math.prod(grid), patch_values), generator=pixels, dtype=torch.uint8)
        times = torch.arange(steps).numpy() * SECOND_PER_GRID
        head = [draw.randrange(words) for _ in range(15)] + [geometry.vision_start]
        tail = [geometry.vision_end] + [draw.randrange(words) for _ in range(TEMPLATE - 17)]
        spans: list[int | VisionSpan] = [len(head), VisionSpan(grid, times.astype("float32")), len(tail)]
        ids = head + [geometry.video_token] * tokens + tail
        clip = VisionInput(patches, grid, f"clip {pair}")
        targets.append(row(spans, ids, load.pairs + pair, videos=(clip,)))
    return queries, targets


def train_batch(config: Any, load: Load, seed: int = 0) -> TrainBatch:
    """The load as the data module would hand it over."""
    pad = config.text_config.bos_token_id
    query, target = (collate(rows, pad) for rows in texts_and_clips(config, load, seed))
    return TrainBatch(
        query=query,
        target=target,
        negatives=None,
        negative_index=torch.empty(len(query), 0, dtype=torch.int64),
        task="T2V",
        source="bench",
        epoch=0,
        step=0,
        seed=seed,
    )


def embedder(
    base: Path, dtype: str, *, chunk_tokens: int = 0, checkpointing: bool = False, device: str = "cpu"
) -> VideoEmbedder:
    """Our module with random weights; the adapters' second factors too, or the first ones would have no gradient."""
    torch.manual_seed(0)
    with torch.device(device):
        module = VideoEmbedder(
            str(base),
            lora=Lora(dropout=0.0),
            dtype=dtype,  # type: ignore[arg-type]
            temperature=TEMPERATURE,
            chunk_tokens=chunk_tokens,
            gradient_checkpointing=checkpointing,
            from_scratch=True,
        )
        module.configure_model()
        with torch.no_grad():
            for name, value in module.backbone.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(value, std=0.02)
    return module.to(device)


def stock_inputs(config: Any, batch: EmbedBatch) -> dict[str, Any]:
    """What transformers' processor would hand to the stock model for these rows."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.video_grid is not None:
        inputs["mm_token_type_ids"] = 2 * (batch.input_ids == config.video_token_id).int()
        assert batch.video_patches is not None
        inputs["pixel_values_videos"] = normalised(batch.video_patches, batch.pixel_mean, batch.pixel_std)
        inputs["video_grid_thw"] = batch.video_grid
        inputs["second_per_grid_ts"] = torch.full((len(batch.video_grid),), SECOND_PER_GRID).to(batch.video_grid.device)
    return inputs


class Step:
    """One way of doing the step: called, it does one and returns its loss and gradient.

    Args:
        loss: computes the loss of the load, with its graph.
        model: its adapters train, by AdamW.
        dtype: "bfloat16" runs under autocast, as trainers do it.
    """

    def __init__(self, loss: Callable[[], torch.Tensor], model: nn.Module, dtype: str) -> None:
        # By their place in the language model, whatever class is around it.
        places = {name[name.index("layers.") :]: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained = [places[place] for place in sorted(places)]
        self._loss, self._autocast, self._device = loss, dtype == "bfloat16", self._trained[0].device.type
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5)

    def __call__(self) -> dict[str, torch.Tensor]:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            loss = self._loss()
        loss.backward()
        gradient = torch.cat([value.grad.flatten() for value in self._trained])  # type: ignore[union-attr]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.detach(), "gradient": gradient}


def our_step(module: VideoEmbedder, batch: TrainBatch, dtype: str) -> Step:
    """`VideoEmbedder.training_step` without its log."""
    return Step(lambda: module.contrasted(batch).loss, module.backbone, dtype)


def transformers_step(config: Any, ours: Backbone, batch: TrainBatch, dtype: str) -> Step:
    """The generation class and the usual loss."""
    full = _stock(config, ours, dtype)
    sides = [(stock_inputs(config, side), side.pool_index) for side in (batch.query, batch.target)]

    def loss() -> torch.Tensor:
        rows = []
        for inputs, last in sides:
            states = full(**inputs, output_hidden_states=True).hidden_states[-1]
            rows.append(states[torch.arange(len(last), device=last.device), last])
        query, target = (nn.functional.normalize(each.float(), dim=-1) for each in rows)
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ target.T / TEMPERATURE
            labels = torch.arange(len(logits), device=logits.device)
            return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2

    return Step(loss, full, dtype)


def sentence_step(config: Any, ours: Backbone, batch: TrainBatch, dtype: str, chunk_tokens: int) -> Step:
    """Cached multiple negatives, both directions: what CachedMultipleNegativesSymmetricRankingLoss stands for.

    Raises:
        InputError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    except ImportError:
        raise InputError("the second contest needs sentence-transformers: pip install 'gve[bench]'") from None
    model = _stock(config, ours, dtype).model
    wrapped = SentenceTransformer(modules=[_LastToken(model)], device=str(batch.query.input_ids.device)).train()
    cached = CachedMultipleNegativesRankingLoss(
        wrapped,
        scale=1 / TEMPERATURE,
        mini_batch_num_tokens=chunk_tokens,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    sides = [stock_inputs(config, side) for side in (batch.query, batch.target)]
    return Step(lambda: cached([dict(side) for side in sides], torch.empty(0)), model, dtype)


class _LastToken(nn.Module):
    """A module of sentence-transformers around the stock model without its head: last token, unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states = self.model(**features).last_hidden_state
        last = features["attention_mask"].sum(1) - 1
        rows = states[torch.arange(len(last), device=last.device), last]
        return {**features, "sentence_embedding": nn.functional.normalize(rows.float(), dim=-1)}


def _stock(config: Any, ours: Backbone, dtype: str) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """The stock class in training mode, with the weights and adapters of ours."""
    full = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    Backbone(full.model, ours.lora)
    full.model.load_state_dict(ours.model.state_dict())
    full.tie_weights()
    return full.to(next(ours.parameters()).device).train()


def trials(options: Options) -> Iterator[Trial]:
    """Contests with both stock ways, with random lengths and with equal ones.

    Raises:
        InputError: a size of the accelerator's bench.
    """
    if options.size not in LOADS:
        raise InputError(f"--size {options.size}: the step is compared at {', '.join(LOADS)}; 3b and 7b: accelerator")
    load = LOADS[options.size]
    drawn = "random lengths"
    even = replace(load, text_tokens=(40, 40), clip_s=(8, 8))
    for dtype in _dtypes(options.device):
        yield _contest(options, load, dtype, drawn, Aim("gve", "transformers", value=2.0))
        yield _contest(options, load, dtype, drawn, Aim("gve", "sentence-transformers", value=1.5))
    # What is left without padding, told and not aimed at.
    yield _contest(options, even, "float32", "equal lengths", Aim("gve", "transformers"))
    yield _contest(options, even, "float32", "equal lengths", Aim("gve", "sentence-transformers"))


def _dtypes(device: str) -> tuple[str, ...]:
    """bfloat16 only where the device multiplies it: elsewhere a step would measure its emulation."""
    fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("float32", "bfloat16") if fast else ("float32",)


def _contest(options: Options, load: Load, dtype: str, lengths: str, aim: Aim) -> Contest:
    base = BASES[options.size]
    config = transformers.Qwen2_5_VLConfig.from_json_file(base)
    batch = train_batch(config, load).to(options.device)
    cached = aim.other == "sentence-transformers"
    module = embedder(base, dtype, chunk_tokens=load.chunk_tokens if cached else 0, device=options.device)
    if cached:
        other = sentence_step(config, module.backbone, batch, dtype, load.chunk_tokens)
    else:
        other = transformers_step(config, module.backbone, batch, dtype)
    sides = (batch.query, batch.target)
    attended = sum(int(side.attention_mask.sum()) for side in sides)
    padded = sum(side.attention_mask.numel() for side in sides)
    return Contest(
        what=f"training step{' with GradCache' if cached else ''}, {options.size} model, {dtype}, {lengths}",
        contestants={"gve": our_step(module, batch, dtype), aim.other: other},
        aims=[aim],
        count=load.pairs,
        unit="pairs",
        setting={
            **asdict(load),
            "parameters": sum(p.numel() for p in module.parameters()),
            "attended_tokens": attended,
            "padding_if_each_side_is_one_batch": round(1 - attended / padded, 3),
            "lora": "r=16 on six modules, no dropout",
        },
        # Of gradients of up to 1; bfloat16 keeps 3 digits, and the two ways round in another order.
        tolerance=1e-4 if dtype == "float32" else 0.1,
        clock="cpu" if options.device == "cpu" else "wall",
    )
