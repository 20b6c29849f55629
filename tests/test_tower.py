"""Adapters on the vision tower, the ablation of the frozen tower: parity with plain transformers and peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch

from gve.encode.encoder import BackboneEncoder
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError
from gve.model.backbone import Backbone, Lora
from gve.model.embedder import VideoEmbedder, _without_dropout
from test_backbone import make_batch, stock, stock_embeddings

TARGETS = (
    r"language_model\.layers\.\d+\.(self_attn\.[qkv]|mlp\.(up|gate|down))_proj"
    r"|visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
)


@pytest.fixture
def adapted(base: str) -> Backbone:
    """A backbone with adapters on the tower too, all of which do something."""
    torch.manual_seed(3)
    backbone = Backbone.from_pretrained(base, lora=Lora(rank=4, alpha=8, tower=True), feature_cache_bytes=1 << 20)
    with torch.no_grad():
        for name, value in backbone.trainable_state().items():
            if "lora_B" in name:
                value.normal_(std=0.3)
    return backbone


def test_embeddings_and_gradients_equal_peft_on_the_stock_model(base: str, adapted: Backbone) -> None:
    """The features carry the gradient into the tower; a tower without gradient (the default) would leave it None."""
    batch = make_batch(base)
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    reference = stock(base)
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS)
    peft.inject_adapter_in_model(settings, reference)
    own = {f"model.{name}": value for name, value in reference.named_parameters()}
    assert {name for name in own if ".lora_" in name} == set(adapted.trainable_state())
    with torch.no_grad():
        for name, value in adapted.trainable_state().items():
            own[name].copy_(value)
    adapted.eval()
    found, expected = adapted(batch), stock_embeddings(reference.eval(), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    moved = 0
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, own[name].grad, atol=2e-5, rtol=1e-4, msg=name)
            moved += "visual" in name and bool(parameter.grad.abs().max() > 1e-5)
    assert moved == sum("visual" in name for name in adapted.trainable_state()) > 0
    with torch.no_grad():
        for name, value in adapted.trainable_state().items():
            if "visual" in name:
                value.zero_()
        assert (adapted(batch) - found).abs().max() > 1e-3, "the tower's adapters matter"


def test_nothing_of_a_changing_tower_is_kept(base: str, adapted: Backbone) -> None:
    """Features of before an optimizer step would be those of another tower: neither cache may hold them."""
    batch = make_batch(base)
    before = adapted.media_features(batch)
    assert all(tokens.requires_grad for tokens in before.values())
    with torch.no_grad():
        for name, value in adapted.trainable_state().items():
            if "visual" in name and "lora_B" in name:
                value.add_(0.1)
    after = adapted.media_features(batch)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in before)
    builder = InputBuilder.__new__(InputBuilder)  # it is not asked for anything here
    assert BackboneEncoder(adapted, builder, memory_bytes=1 << 20)._replay.room == 0
    frozen = Backbone.from_pretrained(base, lora=Lora(rank=4), feature_cache_bytes=1 << 20)
    assert BackboneEncoder(frozen, builder, memory_bytes=1 << 20)._replay.room == 1 << 20
    assert "adapted" in adapted.describe()[1]
    assert "no gradient" in frozen.describe()[1]


def test_the_tower_stays_in_eval_mode_and_the_base_answers_without_adapters(base: str, adapted: Backbone) -> None:
    batch = make_batch(base)
    adapted.train()
    assert not any(module.training for module in adapted.model.visual.modules()), "no dropout in the tower"
    adapted.eval()
    with torch.no_grad(), adapted.adapters_off():
        torch.testing.assert_close(adapted(batch), stock_embeddings(stock(base), batch), atol=1e-5, rtol=0)


def test_what_it_cannot_be_combined_with_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chunk_tokens"):
        VideoEmbedder(base, InputPolicy(), Lora(tower=True), chunk_tokens=64)
    # A checkpoint of before the option existed is one of a frozen tower, and no other.
    old = {name: value for name, value in dataclasses.asdict(Lora()).items() if name != "tower"}
    assert _without_dropout(old) == _without_dropout(dataclasses.asdict(Lora()))
    assert _without_dropout(old) != _without_dropout(dataclasses.asdict(Lora(tower=True)))
