"""Makes the tiny base: next-token answers and captions on scenes of its own, as a language model with eyes is made.

Short answers come first, pictures before clips, captions last. All weights train, the tower too. Nothing is
contrastive, and no scene of the mini UVRB of seed 0 is shown. `gve toy base` runs it; recipe, log and result stand in
experiments/0001-toy-base.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.eval.uvrb import SETS
from gve.inputs import VisionGeometry
from gve.inputs.patches import patchify
from gve.inputs.positions import VisionSpan, mrope_positions
from gve.items import InputError
from gve.toy import captions, lessons
from gve.toy.base import random_base, save_base, tiny_config, train_tokenizer, write_sums
from gve.toy.captions import Teller
from gve.toy.families import Maker
from gve.toy.language import DIALECTS
from gve.toy.render import draw
from gve.toy.scenes import PICTURE_FRAME, SAMPLED_FRAMES, SIDE_PX, Clip, Scene
from gve.toy.training import shown
from gve.toy.uvrb import Builder

GRID_TIMES_S = np.arange(4, dtype=np.float32)  # 8 of 32 frames at 8 fps: one grid step a second by the released rule
HELD_OUT_LESSONS = 192  # fixed lessons that are only measured on
# Kind of short question -> how likely it is asked before another; 1 where it is not named. There are many questions on
# things in a scene, and one each on its ground and its camera.
WEIGHTS = {"shape": 0.5, "count": 0.5, "size": 0.7, "move": 1.5, "order": 2.0, "ground": 3.0, "camera": 4.0}
TERSE_SHARE = 0.7  # of lessons told in dialect A; the rest in B


@dataclass(frozen=True)
class Stage:
    """What lessons are made of up to a share of the run.

    Args:
        until: share of the run's steps at which the stage ends.
        still, clip, text: weights of lessons on a picture, on a clip, and on a text that tells a clip.
        captions: share of lessons on pictures and clips that begin with a caption.
        lists: share of the others that begin with a list of all nine places or of all four quarters.
    """

    until: float
    still: float
    clip: float
    text: float
    captions: float = 0.0
    lists: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How a tiny base is made; equal recipes give equal weights on one kind of processor.

    Args:
        seed: of weights and lessons.
        steps: optimizer steps.
        batch: lessons a step.
        lr: of embeddings, norms, biases and the patch embedding (Adam).
        matrix_lr: of all other matrices (Muon).
        decay_from: share of the run from which both fall linearly to nothing.
        tokens: of questions and answers in a lesson, about; a first answer is never cut.
        stages: in order; the last one ends at 1.
    """

    seed: int = 0
    steps: int = 3000
    batch: int = 32
    lr: float = 2e-3
    matrix_lr: float = 3e-3
    decay_from: float = 0.6
    tokens: int = 90
    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(1.0, 1, 2, 0.3, 0.0, 0.6),))

    def __post_init__(self) -> None:
        if not self.stages or self.stages[-1].until != 1 or self.steps < 1 or self.batch < 1:
            raise InputError(f"{self}: steps and batch must be at least 1, and the last stage must end at 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a YAML file.

        Raises:
            InputError: an unknown key, or a value out of range.
        """
        try:
            stages = tuple(Stage(**stage) for stage in values.get("stages", ()))
            return cls(**{**values, **({"stages": stages} if stages else {})})
        except TypeError as error:
            raise InputError(f"the recipe cannot be used: {error}") from None

    def stage(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.until * self.steps)

    def rate(self, step: int) -> float:
        """Share of the learning rates at a step: 50 steps of warm-up, a plateau, a linear fall."""
        fall = (1 - step / self.steps) / (1 - self.decay_from)
        return min(1.0, (step + 1) / 50, max(fall, 0.01))


@dataclass(frozen=True, eq=False)
class LessonBatch:
    """Conversations of B lessons, padded on the right.

    Args:
        input_ids: [B, L] int64.
        position_ids: [3, B, L] int64.
        turn: [B, L] int64, on answer tokens the number of their turn in the batch from 1, else 0.
        kinds: kind of each turn.
        patches, grid: of pictures, then of clips; each None without any.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    turn: torch.Tensor
    kinds: tuple[str, ...]
    patches: dict[str, torch.Tensor]
    grid: dict[str, torch.Tensor]

    def to(self, device: str) -> LessonBatch:
        ids, positions, turn = (value.to(device) for value in (self.input_ids, self.position_ids, self.turn))
        patches, grid = ({k: v.to(device) for k, v in group.items()} for group in (self.patches, self.grid))
        return LessonBatch(ids, positions, turn, self.kinds, patches, grid)


class Lessons:
    """Makes batches of lessons, each a pure function of (seed, step).

    Args:
        tokenizer: of the base.
        geometry: of the base.
        recipe: what the lessons are made of.
        refuse: whether a clip must not be shown.
    """

    def __init__(
        self, tokenizer: Any, geometry: VisionGeometry, recipe: Recipe, refuse: Callable[[Clip], bool]
    ) -> None:
        self.tokenizer, self.geometry, self.recipe, self.refuse = tokenizer, geometry, recipe, refuse
        self._known: dict[str, list[int]] = {}
        start, self._end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        newline, user = self._ids("\n"), self._ids("user\n")
        system = self._ids("system\nYou are a helpful assistant.")
        self._head = [start, *system, self._end, *newline, start, *user]
        self._to_answer = [self._end, *newline, start, *self._ids("assistant\n")]
        self._to_question = [*newline, start, *user]

    def batch(self, step: int | str, count: int, stage: Stage) -> LessonBatch:
        """`count` lessons; a step that is a word names lessons that no training step sees."""
        rows = [self._lesson(random.Random(f"{self.recipe.seed}-{step}-{i}"), stage) for i in range(count)]
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((count, longest), self.tokenizer.pad_token_id)
        turn = torch.zeros(count, longest, dtype=torch.int64)
        positions = torch.ones(3, count, longest, dtype=torch.int64)
        kinds: list[str] = []
        for i, row in enumerate(rows):
            length = len(row.ids)
            ids[i, :length] = torch.tensor(row.ids)
            numbers = torch.tensor(row.turns)
            turn[i, :length] = torch.where(numbers > 0, numbers + len(kinds), 0)
            positions[:, i, :length] = row.positions
            kinds += row.kinds
        seen = {name: [row for row in rows if row.medium == name] for name in ("image", "video")}
        patches = {name: torch.cat([row.patches for row in group]) for name, group in seen.items() if group}
        grid = {name: torch.tensor([row.grid for row in group]) for name, group in seen.items() if group}
        return LessonBatch(ids, positions, turn, tuple(kinds), patches, grid)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            self._known[text] = encoded["input_ids"]
        return self._known[text]

    def _lesson(self, chance: random.Random, stage: Stage) -> _Row:
        form = chance.choices(["image", "video", "text"], [stage.still, stage.clip, stage.text])[0]
        make = Maker(f"base-{chance.random()}", chance.choice("AB"))
        scene = lessons.random_scene(make, moving=form != "image")
        while self.refuse((scene,)):
            scene = lessons.random_scene(make, moving=form != "image")
        teller = Teller(DIALECTS["A" if chance.random() < TERSE_SHARE else "B"], chance)
        turns = self._turns(scene, teller, form, stage)
        if form == "text":
            told = self._ids(captions.detailed(scene, teller).text + " ")
            return self._conversation(form, told, [], turns)
        times = (PICTURE_FRAME,) if form == "image" else SAMPLED_FRAMES
        pixels = _compressed(np.stack([draw(scene, time) for time in times]), chance)
        patches, grid = patchify(pixels, SIDE_PX, SIDE_PX, self.geometry)
        token = self.geometry.image_token if form == "image" else self.geometry.video_token
        vision = [token] * self.geometry.tokens(grid)
        span = VisionSpan(grid, None if form == "image" else GRID_TIMES_S)
        row = self._conversation(form, [self.geometry.vision_start, *vision, self.geometry.vision_end], [span], turns)
        row.patches, row.grid = patches, grid
        return row

    def _turns(self, scene: Scene, teller: Teller, form: str, stage: Stage) -> list[lessons.Turn]:
        """Questions in the order they are asked: one caption or list by chance, then short ones."""
        chance, moving = teller.random, form != "image"
        short = list(lessons.still_turns(scene, teller))
        moves = list(lessons.moving_turns(scene, teller)) if moving else []
        if form == "text":  # the text tells every fact but the order
            moves = [turn for turn in moves if turn.kind not in ("order", "list")]
        lists = [turn for turn in (*short, *moves) if turn.kind == "list"]
        first: list[lessons.Turn] = []
        if form != "text" and chance.random() < stage.captions:
            first = [chance.choice(list(lessons.caption_turns(scene, teller, moving)))]
        elif chance.random() < stage.lists:
            first = [chance.choice(lists)]
        others = [turn for turn in (*short, *moves) if turn.kind != "list"]
        # Drawn without putting back, each as likely as its kind weighs (Efraimidis and Spirakis, 2006).
        others.sort(key=lambda turn: chance.random() ** (1 / WEIGHTS.get(turn.kind, 1.0)), reverse=True)
        return first + others

    def _conversation(
        self, medium: str, body: Sequence[int], visions: Sequence[VisionSpan], turns: Iterable[lessons.Turn]
    ) -> _Row:
        ids = [*self._head, *body]
        numbers = [0] * len(ids)
        kinds: list[str] = []
        limit = len(ids) + self.recipe.tokens
        for turn in turns:
            asked = (self._to_question if kinds else []) + self._ids(turn.question) + self._to_answer
            answer = [*self._ids(turn.answer), self._end]
            if kinds and len(ids) + len(asked) + len(answer) > limit:
                break
            kinds.append(turn.kind)
            ids += asked + answer
            numbers += [0] * len(asked) + [len(kinds)] * len(answer)
        before = len(self._head) + 1
        spans: list[int | VisionSpan] = [before, *visions, len(ids) - before - len(body) + 2] if visions else [len(ids)]
        return _Row(medium, ids, numbers, kinds, mrope_positions(spans, self.geometry, "released"))


@dataclass(eq=False)
class _Row:
    medium: str
    ids: list[int]
    turns: list[int]
    kinds: list[str]
    positions: torch.Tensor
    patches: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    grid: tuple[int, int, int] = (0, 0, 0)


def _compressed(frames: np.ndarray, chance: random.Random) -> np.ndarray:
    """Half of the time the marks of a codec: what is judged later comes from files."""
    if chance.random() < 0.5:
        return frames
    quality, subsampling = chance.choice([80, 88, 95]), chance.choice([0, 2])
    seen = []
    for frame in frames:
        buffer = io.BytesIO()
        PILImage.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        seen.append(np.asarray(PILImage.open(buffer)))
    return np.stack(seen)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps (K. Jordan and others, 2024), in float32.

    torch's own computes them in bfloat16, which a CPU without such units does 35 times slower: 5.5 s a step for this
    model instead of 0.15 s.

    Args:
        params: matrices.
        lr: size of an update, as a share of 0.2 times the root of the longer side (the size of Adam's).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = _orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                size = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices to [N, rows, columns], roughly: singular values end in 0.7 to 1.2."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, batch: LessonBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [A, vocabulary], token [A], turn [A]) of all A answer tokens of a batch."""
    tower = model.model.visual
    kinds = list(batch.patches)
    features: dict[str, BaseModelOutputWithPooling] = {}
    if kinds:
        grid = torch.cat([batch.grid[kind] for kind in kinds])
        merged = tower(torch.cat([batch.patches[kind] for kind in kinds]), grid_thw=grid).pooler_output
        pieces = list(merged.split((grid.prod(-1) // tower.spatial_merge_unit).tolist()))
        for kind in kinds:
            count = len(batch.grid[kind])
            features[kind] = BaseModelOutputWithPooling(pooler_output=tuple(pieces[:count]))
            pieces = pieces[count:]
    states = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        mm_encoder_outputs=features,
        use_cache=False,
    ).last_hidden_state
    at = batch.turn[:, 1:] > 0
    return model.lm_head(states[:, :-1][at]).float(), batch.input_ids[:, 1:][at], batch.turn[:, 1:][at]


@torch.no_grad()
def measure(model: Qwen2_5_VLForConditionalGeneration, batches: Mapping[str, LessonBatch]) -> dict[str, float]:
    """Share of answers all of whose tokens are the likeliest ones, as <form>/<kind>, and <form>/loss."""
    model.eval()
    results: dict[str, float] = {}
    for form, batch in batches.items():
        logits, tokens, turns = answer_logits(model, batch)
        results[f"{form}/loss"] = F.cross_entropy(logits, tokens).item()
        wrong = set(turns[logits.argmax(-1) != tokens].tolist())
        counts: dict[str, list[bool]] = defaultdict(list)
        for number, kind in enumerate(batch.kinds, 1):
            counts[kind].append(number not in wrong)
        results.update({f"{form}/{kind}": sum(right) / len(right) for kind, right in sorted(counts.items())})
    model.train()
    return {name: round(value, 4) for name, value in results.items()}


def lesson_texts(seed: int = 0, scenes: int = 1500) -> list[str]:
    """Questions, answers and captions in both dialects, for the tokenizer."""
    texts = list(lessons.REQUESTS.values())
    for look in "AB":
        make, teller = Maker(f"words-{seed}-{look}", look), Teller(DIALECTS[look], random.Random(f"words-{seed}"))
        for _ in range(scenes):
            scene = lessons.random_scene(make)
            for turn in (
                *lessons.still_turns(scene, teller),
                *lessons.moving_turns(scene, teller),
                *lessons.caption_turns(scene, teller, True),
            ):
                texts += [turn.question, turn.answer]
    return texts


def pretrain(
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    save_every: int = 250,
) -> Path:
    """Makes a base and writes it to `out` as a hub folder; begins again where an interrupted run has stopped.

    Args:
        out: the folder; log.jsonl in it has a line every 100 steps, state.pt is what a restart needs.
        recipe: how.
        device: where it runs; on "cuda" in bfloat16.
        report: told every line of the log.
        save_every: steps between states on disk.

    Raises:
        InputError: `out` holds a run of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([*lesson_texts(), *(record.instruction for record in SETS)])
    config = tiny_config(tokenizer)
    model = random_base(config, recipe.seed)
    with torch.no_grad():  # a quiet residual stream: every block begins near the identity
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                parameter.mul_(0.3)
    model.to(device).train()
    optimizers = _optimizers(model, recipe)
    state_file, log_file = out / "state.pt", out / "log.jsonl"
    done = _resume(state_file, recipe, model, optimizers)
    _cut_log(log_file, done)
    tested = {shown(clip) for look in DIALECTS for mini in Builder(0, look, 1.0).build() for clip in mini.corpus}
    taught = Lessons(
        tokenizer, VisionGeometry.from_config(config.to_dict()), recipe, lambda clip: shown(clip) in tested
    )
    held_out = {
        "still": taught.batch("held-out", HELD_OUT_LESSONS, Stage(1, 1, 0, 0)).to(device),
        "clip": taught.batch("held-out", HELD_OUT_LESSONS, Stage(1, 0, 1, 0)).to(device),
        "text": taught.batch("held-out", HELD_OUT_LESSONS, Stage(1, 0, 0, 1)).to(device),
        "caption": taught.batch("held-out", HELD_OUT_LESSONS // 2, Stage(1, 0, 1, 0, 1.0)).to(device),
    }
    began, losses = time.monotonic(), []
    for step in range(done, recipe.steps):
        batch = taught.batch(step, recipe.batch, recipe.stage(step)).to(device)
        losses.append(_step(model, optimizers, batch, recipe.rate(step)))
        last = step + 1 == recipe.steps
        if (step + 1) % 100 == 0 or last:
            line: dict[str, Any] = {"step": step + 1, "loss": round(sum(losses) / len(losses), 4)}
            line["s_per_step"] = round((time.monotonic() - began) / (step + 1 - done), 3)
            losses = []
            if (step + 1) % 500 == 0 or last:
                line |= measure(model, held_out)
            with open(log_file, "a") as file:
                file.write(json.dumps(line) + "\n")
            report(line)
        if (step + 1) % save_every == 0 or last:
            _save(state_file, recipe, step + 1, model, optimizers)
    save_base(out, model.cpu().half(), tokenizer)
    write_sums(out)
    return out


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [adam, Muon(matrices, recipe.matrix_lr)]


def _step(
    model: Qwen2_5_VLForConditionalGeneration, optimizers: list[torch.optim.Optimizer], batch: LessonBatch, rate: float
) -> float:
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.input_ids.is_cuda):
        logits, tokens, _ = answer_logits(model, batch)
    loss = F.cross_entropy(logits, tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError("the loss is not finite; lower matrix_lr")
    return value


def _save(file: Path, recipe: Recipe, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {
        "recipe": json.dumps(asdict(recipe)),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    draft = file.with_suffix(".tmp")
    torch.save(state, draft)
    os.replace(draft, file)


def _cut_log(file: Path, done: int) -> None:
    """Drops the lines of steps that are done again, and one that was torn."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    draft = file.with_suffix(".tmp")
    draft.write_text("".join(kept))
    os.replace(draft, file)


def _resume(file: Path, recipe: Recipe, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Puts the state of an interrupted run in place and returns its steps; 0 where there is none."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True, map_location=next(model.parameters()).device)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise InputError(f"{file.parent} holds a run of another recipe; choose another folder or remove it")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
