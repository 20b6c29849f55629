"""The backbone against plain transformers, and what must stay frozen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gve.inputs.patches import PIXEL_MEAN, PIXEL_STD
from gve.items import EmbedBatch, InputError
from gve.model.backbone import ARCHITECTURES, Backbone, Lora
from tiny import END, IMAGE, PAD, START, VIDEO

# Rows of one batch: numbers are text tokens, ("image" or "video", key, (t, h, w) in patches) a picture.
CAT, DOG, CLIP = ("image", "cat", (1, 4, 6)), ("image", "dog", (1, 6, 4)), ("video", "clip", (2, 4, 4))
ROWS: list[list[Any]] = [[5, 6, 7, 8], [1, CAT, 2, 3], [9, CLIP, 4], [CLIP, 11, DOG, 12, CAT, 13]]


def pixels(key: str, grid: tuple[int, int, int]) -> torch.Tensor:
    noise = torch.Generator().manual_seed(len(key))
    return torch.randint(256, (grid[0] * grid[1] * grid[2], 3 * 2 * 14 * 14), generator=noise, dtype=torch.uint8)


def make_batch(base: str, rows: list[list[Any]] = ROWS, side: str = "right") -> EmbedBatch:
    """A batch by hand; positions from the stock model, whose rule does not matter here."""
    ids: list[list[int]] = []
    media: dict[str, list[tuple[str, tuple[int, int, int]]]] = {"image": [], "video": []}
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1].append(part)
            else:
                kind, key, (t, h, w) = part
                media[kind].append((key, (t, h, w)))
                ids[-1] += [START, *[IMAGE if kind == "image" else VIDEO] * (t * h * w // 4), END]
    longest = max(map(len, ids))
    input_ids, mask = torch.full((len(ids), longest), PAD), torch.zeros(len(ids), longest, dtype=torch.int64)
    for row_ids, out, out_mask in zip(ids, input_ids, mask, strict=True):
        place = slice(longest - len(row_ids), None) if side == "left" else slice(0, len(row_ids))
        out[place], out_mask[place] = torch.tensor(row_ids), 1
    grids = {kind: torch.tensor([grid for _, grid in found]) if found else None for kind, found in media.items()}
    patches = {kind: torch.cat([pixels(*one) for one in found]) if found else None for kind, found in media.items()}
    positions, _ = stock(base).get_rope_index(
        input_ids,
        1 * (input_ids == IMAGE) + 2 * (input_ids == VIDEO),
        grids["image"],
        grids["video"],
        attention_mask=mask,
    )
    return EmbedBatch(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        pool_index=torch.tensor([int(row.nonzero()[-1]) for row in mask]),
        content_ids=torch.arange(len(rows)),
        valid=torch.ones(len(rows), dtype=torch.bool),
        image_patches=patches["image"],
        image_grid=grids["image"],
        image_keys=tuple(key for key, _ in media["image"]),
        video_patches=patches["video"],
        video_grid=grids["video"],
        video_keys=tuple(key for key, _ in media["video"]),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )


def stock(base: str) -> transformers.Qwen2_5_VLModel:
    return transformers.Qwen2_5_VLModel.from_pretrained(base, dtype=torch.float32)


def stock_embeddings(model: transformers.Qwen2_5_VLModel, batch: EmbedBatch, **changes: Any) -> torch.Tensor:
    """Plain transformers fed the same ids, patches and positions: full masks, full layers, the tower inside."""
    mean, std = (torch.tensor(values).view(3, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    images, videos = (
        None if levels is None else ((levels.view(-1, 3, 392) / 255 - mean) / std).flatten(1)
        for levels in (batch.image_patches, batch.video_patches)
    )
    states = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=changes.get("position_ids", batch.position_ids),
        pixel_values=images,
        image_grid_thw=batch.image_grid,
        pixel_values_videos=videos,
        video_grid_thw=batch.video_grid,
    ).last_hidden_state
    pooled = states[torch.arange(len(batch)), changes.get("pool_index", batch.pool_index)]
    return torch.nn.functional.normalize(pooled, dim=-1)


def trained(base: str, **options: Any) -> Backbone:
    """A backbone whose adapters do something: B starts at zero, so it is moved by hand."""
    torch.manual_seed(1)
    backbone = Backbone.from_pretrained(base, lora=Lora(rank=4, alpha=8), **options)
    with torch.no_grad():
        for name, value in backbone.trainable_state().items():
            if "lora_B" in name:
                value.normal_(std=0.3)
    return backbone


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_equal_plain_transformers(base: str, side: str) -> None:
    """Untrained against the stock model; trained against the stock model with W + alpha / rank * B A by hand."""
    batch, reference, backbone = make_batch(base, side=side), stock(base), trained(base).eval()
    with torch.no_grad():
        with backbone.adapters_off():
            torch.testing.assert_close(backbone(batch), stock_embeddings(reference, batch), atol=1e-5, rtol=0)
        found = backbone(batch)
        assert (found - stock_embeddings(reference, batch)).abs().max() > 0.05  # the adapters matter
        state = backbone.trainable_state()
        for name in [name for name in state if "lora_A" in name]:
            layer = name.removeprefix("model.").removesuffix(".lora_A.default.weight")
            update = state[name.replace("lora_A", "lora_B")] @ state[name]
            reference.get_submodule(layer).weight += 8 / 4 * update
        torch.testing.assert_close(found, stock_embeddings(reference, batch), atol=1e-5, rtol=0)
        # Negative controls: text positions instead of M-RoPE, and the token before the pooled one.
        flat = torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids)
        for wrong in ({"position_ids": flat}, {"pool_index": batch.pool_index - 1}):
            rows = slice(1, None)  # the text-only row has flat positions
            assert (found - stock_embeddings(reference, batch, **wrong))[rows].abs().amax(1).min() > 1e-3, wrong


def test_padding_side_does_not_matter(base: str) -> None:
    backbone = trained(base).eval()
    right, left = make_batch(base, side="right"), make_batch(base, side="left")
    with torch.no_grad():
        torch.testing.assert_close(backbone(right), backbone(left), atol=1e-5, rtol=0)
        # Negative control: the last column is a pad token on every right-padded row but the longest.
        last = dataclasses.replace(right, pool_index=torch.full((4,), right.input_ids.shape[1] - 1))
        assert (backbone(last) - backbone(left))[:3].abs().amax(1).min() > 1e-2


def test_gradients_equal_those_of_the_full_model(base: str) -> None:
    """The tower without gradient, no mask under right padding and the short last MLP leave every gradient as it is."""
    batch, backbone = make_batch(base), trained(base).eval()
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    (backbone(batch) * weights).sum().backward()
    reference = stock(base)
    targets = r"language_model\.layers\.\d+\.(self_attn\.[qkv]|mlp\.(up|gate|down))_proj"
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets), reference
    )
    own = {f"model.{name}": value for name, value in reference.named_parameters()}
    with torch.no_grad():
        for name, value in backbone.trainable_state().items():
            own[name].copy_(value)
    (stock_embeddings(reference.eval(), batch) * weights).sum().backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-4, name
            torch.testing.assert_close(parameter.grad, own[name].grad, atol=2e-5, rtol=1e-4, msg=name)


def test_exactly_six_modules_of_each_decoder_layer_train(base: str) -> None:
    backbone = Backbone.from_pretrained(base, lora=Lora())
    expected = {
        f"model.language_model.layers.{layer}.{module}.lora_{side}.default.weight"
        for layer in (0, 1)
        for module in [
            *(f"self_attn.{letter}_proj" for letter in "qkv"),
            *(f"mlp.{name}_proj" for name in ("up", "gate", "down")),
        ]
        for side in "AB"
    }
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == expected
    assert set(backbone.trainable_state()) == expected
    # Negative control: the plain list of names, a peer's bug, also adapts the tower.
    plain = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(Lora().targets)), stock(base))
    assert any("visual" in name and p.requires_grad for name, p in plain.named_parameters())


def test_tower_stays_in_eval_mode_and_out_of_the_graph(base: str) -> None:
    backbone = Backbone.from_pretrained(base, lora=Lora())
    assert backbone.training
    assert backbone.model.language_model.layers[0].mlp.up_proj.lora_dropout["default"].training
    for mode in (True, False, True):
        backbone.train(mode)
        assert not any(module.training for module in backbone.model.visual.modules())
        assert backbone.model.language_model.training is mode
    features = backbone.media_features(make_batch(base))
    assert all(tokens.grad_fn is None and not tokens.requires_grad for tokens in features.values())
    assert "0 trainable tensors, eval mode" in backbone.describe()[1]


def test_tower_sees_each_picture_once(base: str) -> None:
    seen: list[int] = []
    size = lambda *keys: sum(t * h * w for _, _, (t, h, w) in keys)  # noqa: E731
    batch, other = make_batch(base), make_batch(base, [[CLIP, 1], [DOG, 2]])
    backbone = Backbone.from_pretrained(base, lora=None)
    backbone.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    features = backbone.media_features(batch, other, None)
    assert seen == [size(CAT, DOG, CLIP)]
    together = backbone(batch, features), backbone(other, features)
    assert len(seen) == 1
    torch.testing.assert_close(together, (backbone(batch), backbone(other)), atol=0, rtol=0)

    # Host memory for the clip (8 tokens of 32 float32) and one picture (6): the oldest goes first.
    seen.clear()
    backbone = Backbone.from_pretrained(base, lora=None, feature_cache_bytes=14 * 32 * 4)
    backbone.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    first = backbone.media_features(other)
    again = backbone.media_features(other)
    assert seen == [size(CLIP, DOG)]
    for key, tokens in first.items():
        assert torch.equal(tokens, again[key])
    backbone.media_features(make_batch(base, [[CAT, 3]]))
    kept = backbone.media_features(other)  # DOG had to go for CAT, CLIP not
    assert seen == [size(CLIP, DOG), size(CAT), size(DOG)]
    for key, tokens in first.items():
        assert torch.equal(tokens, kept[key])  # bit-equal, although DOG was computed alone this time


def test_swapped_placeholders_are_refused_though_the_total_is_right(base: str) -> None:
    small, large = ("video", "a", (1, 2, 2)), ("video", "b", (1, 4, 4))
    batch = make_batch(base, [[1, small, 2], [1, large, 2]])
    swapped = dataclasses.replace(batch, input_ids=batch.input_ids.flip(0), attention_mask=batch.attention_mask.flip(0))
    stock_embeddings(stock(base), swapped)  # negative control: the stock model counts the total only
    backbone = Backbone.from_pretrained(base, lora=None)
    with pytest.raises(InputError, match=r"runs of \[4, 1\], the videos have \[1, 4\] tokens"):
        backbone(swapped)
    with pytest.raises(InputError, match=r"runs of \[1, 4\], the videos have \[\] tokens"):
        backbone(dataclasses.replace(batch, video_patches=None, video_grid=None, video_keys=()))


def test_embedding_is_float32_and_unit_under_bf16(base: str) -> None:
    batch = make_batch(base)
    backbone = Backbone.from_pretrained(base, lora=Lora(), dtype="bfloat16")
    assert {value.dtype for value in backbone.trainable_state().values()} == {torch.float32}
    assert backbone.model.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backbone(batch)
    assert found.dtype == torch.float32
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6
    # Negative control: rounded to bfloat16 the rows are no unit vectors.
    assert (found.bfloat16().float().norm(dim=1) - 1).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing(base: str) -> None:
    """Same dropout (RNG replayed), same gradients; the two batches prove that a recompute uses its own pooled rows."""
    batch, other = make_batch(base), make_batch(base, [[3, 1, 4, 1, 5, 9, 2, 6], [CAT, 7]])
    gradients = []
    for checkpointing in (False, True):
        backbone = trained(base, gradient_checkpointing=checkpointing)
        assert backbone.model.language_model.layers[0].gradient_checkpointing is checkpointing
        assert not any(block.gradient_checkpointing for block in backbone.model.visual.blocks)
        torch.manual_seed(3)
        (backbone(batch)[:2] * backbone(other)).sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-6)


def test_trained_weights_round_trip_and_name_themselves(base: str) -> None:
    batch, one = make_batch(base), trained(base).eval()
    other = Backbone.from_pretrained(base, lora=Lora(rank=4, alpha=8)).eval()
    untrained = other.weights_hash()
    assert one.base_hash == other.base_hash
    assert one.weights_hash() != untrained
    other.load_trainable_state(one.trainable_state())
    assert other.weights_hash() == one.weights_hash()
    with torch.no_grad():
        assert torch.equal(other(batch), one(batch))
    with one.adapters_off():
        off = one.weights_hash()
    assert off == Backbone.from_pretrained(base, lora=None).weights_hash() != one.weights_hash()
    assert all(one.get_parameter(name).requires_grad for name in one.trainable_state())

    state = one.trainable_state()
    name = next(iter(state))
    for bad in (
        {key: value for key, value in state.items() if key != name},
        {**state, "extra": state[name]},
        {**state, name: state[name][:1]},
    ):
        with pytest.raises(InputError, match="do not fit this model"):
            other.load_trainable_state(bad)


def test_base_hash_follows_the_weights_not_the_file_or_adapters(base: str, tmp_path: Path) -> None:
    plain = Backbone.from_pretrained(base, lora=None)
    assert plain.base_hash == Backbone.from_pretrained(base, lora=Lora()).base_hash
    model = stock(base)
    with torch.no_grad():
        model.visual.merger.mlp[2].bias[3] += 1e-3
    assert Backbone(model).base_hash != plain.base_hash


def test_bad_bases_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no hub name, folder or config"):
        Backbone.from_pretrained(str(tmp_path / "nothing"), lora=None)
    with pytest.raises(InputError, match="set from_scratch"):
        Backbone.from_pretrained("qwen2_5_vl_3b", lora=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="only qwen2_5_vl is supported"):
        Backbone.from_pretrained(str(tmp_path), lora=None)
    for file in Path(base).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "layers.1.mlp.up_proj" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, for example .*layers\.1\.mlp\.up_proj"):
        Backbone.from_pretrained(str(tmp_path), lora=None)
    with pytest.raises(InputError, match=r"lora.targets q_proj, fc1 match 2 of 4"):
        Backbone.from_pretrained(base, lora=Lora(targets=("q_proj", "fc1")))


# Trained: 16 * sum over the six modules of (inputs + outputs), times the layers, by hand from the public configs.
# Base: the hub's parameter counts of the two models, 7B without its untied LM head (8,292,166,656 - 152,064 * 3,584).
@pytest.mark.parametrize(
    ("name", "trained_parameters", "base_parameters"),
    [
        ("3b", 36 * 16 * (4096 + 2 * 2304 + 3 * 13056), 3_754_622_976),
        ("7b", 28 * 16 * (7168 + 2 * 4096 + 3 * 22528), 7_747_169_280),
    ],
)
def test_published_sizes_on_meta_device(name: str, trained_parameters: int, base_parameters: int) -> None:
    with torch.device("meta"):
        backbone = Backbone.from_pretrained(f"qwen2_5_vl_{name}", lora=Lora(), from_scratch=True)
    counts = {True: 0, False: 0}
    for parameter in backbone.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    assert counts == {True: trained_parameters, False: base_parameters}
    assert backbone.dim == {"3b": 2048, "7b": 3584}[name]


def test_architectures_are_the_public_configs(real: Path) -> None:
    for name in ("3b", "7b"):
        public = transformers.Qwen2_5_VLConfig.from_pretrained(real / "tokenizer" / f"qwen2_5_vl_{name}")
        ours = transformers.Qwen2_5_VLConfig.from_json_file(ARCHITECTURES / f"qwen2_5_vl_{name}.json")
        # Kept for other programs, or without effect while use_sliding_window is off.
        unread = {"dtype", "max_window_layers", "sliding_window", "in_chans", "spatial_patch_size"}
        for part in ("text_config", "vision_config"):
            want, have = getattr(public, part).to_dict(), getattr(ours, part).to_dict()
            (want.get("rope_parameters") or {}).pop("type", None)  # the old name of rope_type
            assert {k: have[k] for k in have if k not in unread} == {k: want.get(k) for k in have if k not in unread}
