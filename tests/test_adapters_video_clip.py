"""LanguageBind, ViCLIP and VideoCLIP-XL: random weights in the releases' own layout, against their forward passes.

The references follow the published code line by line on the raw tensors, with torch's own attention and one frame or
token at a time where that is clearer; they share no module with the encoders.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from gve.encode.clip import ClipEncoder
from gve.encode.pretrained import load_encoder
from gve.encode.video_clip import Bilinear, LanguageBindVideo, LanguageBindVideoConfig, openai_tokenizer
from gve.items import Frames, Image, InputError, Item, Text, Video
from gve.video import Sampling
from tiny_clip import DIM, LENGTH, SIDE, TEXT, VISION, clip

T = 4
MERGES = ["l e", "le f", "lef t</w>", "r i", "ri g", "rig h", "righ t</w>", "r e", "re d</w>"]
VOCAB = 512 + len(MERGES) + 2
EOT = VOCAB - 1
Weights = dict[str, torch.Tensor]


def norm(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear by OpenCV's rule, [H, W, 3] float: output centre (i + 0.5) * scale - 0.5, edges repeated."""

    def axis(values: np.ndarray, size: int) -> np.ndarray:
        place = np.clip((np.arange(size) + 0.5) * len(values) / size - 0.5, 0, len(values) - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape(-1, 1, 1)
        return values[low] * (1 - share) + values[np.minimum(low + 1, len(values) - 1)] * share

    rows = axis(pixels.astype(np.float64), height)
    return axis(rows.transpose(1, 0, 2), width).transpose(1, 0, 2)


def seen(frames: Frames, crop: bool, mean: list[float], std: list[float]) -> torch.Tensor:
    """[T, 3, SIDE, SIDE]; with `crop` the short side becomes SIDE and the middle is kept."""
    shown = []
    for pixels in frames.pixels:
        # Frames of 40 x 50 pixels become 32 x 40, and the middle 32 columns are kept.
        square = resized(pixels, SIDE, 40)[:, 4:36] if crop else resized(pixels, SIDE, SIDE)
        shown.append((square / 255 - mean) / std)
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float()


def words(rows: list[int]) -> list[int]:
    return [VOCAB - 2, *(512 + row for row in rows), EOT]


def write_vocabulary(folder: Path) -> None:
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, "o n", "no tneeded"]
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


# ViCLIP and VideoCLIP-XL: OpenAI's names, towers of 64-wide heads.


def random_release(context: int, long: bool) -> Weights:
    """ViCLIP's tensors; with `long` VideoCLIP-XL's prefixes and its second table of positions."""
    draw = torch.Generator().manual_seed(3)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

    eyes, text = ("vision_model.vision_encoder.", "text_model.") if long else ("vision_encoder.", "text_encoder.")
    state = {
        f"{eyes}class_embedding": make(128),
        f"{eyes}positional_embedding": make(5, 128),
        f"{eyes}temporal_positional_embedding": make(1, T, 128) * 5,
        f"{eyes}proj": make(128, DIM),
        f"{eyes}conv1.weight": make(128, 3, 1, 16, 16),
        f"{text}token_embedding.weight": make(VOCAB, 64) * 5,
        f"{text}positional_embedding": make(context, 64),
        f"{text}text_projection": make(64, DIM),
    }
    if long:
        state[f"{text}positional_embedding_res"] = make(context, 64)
        state[f"{text}logit_scale"] = make(1)[0]
    state["vision_model.temp" if long else "temp"] = torch.tensor(0.01)
    for name, width in ((f"{eyes}ln_pre", 128), (f"{eyes}ln_post", 128), (f"{text}ln_final", 64)):
        state |= {f"{name}.weight": 1 + make(width), f"{name}.bias": make(width)}
    for tower, width in ((eyes, 128), (text, 64)):
        for layer in range(2):
            start = f"{tower}transformer.resblocks.{layer}."
            for name, shape in (
                ("attn.in_proj_", (3 * width, width)),
                ("attn.out_proj.", (width, width)),
                ("mlp.c_fc.", (4 * width, width)),
                ("mlp.c_proj.", (width, 4 * width)),
            ):
                state |= {f"{start}{name}weight": make(*shape), f"{start}{name}bias": make(shape[0])}
            for name in ("ln_1", "ln_2"):
                state |= {f"{start}{name}.weight": 1 + make(width), f"{start}{name}.bias": make(width)}
    return state


def openai_tower(state: Weights, tower: str, tokens: torch.Tensor, causal: bool) -> torch.Tensor:
    """[L, W] through the residual blocks of the release, whose attention is torch's own."""
    width = tokens.shape[1]
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1) if causal else None
    for layer in range(2):
        own = {
            key.removeprefix(f"{tower}transformer.resblocks.{layer}."): value
            for key, value in state.items()
            if key.startswith(f"{tower}transformer.resblocks.{layer}.")
        }
        attention = nn.MultiheadAttention(width, width // 64).requires_grad_(False)
        attention.load_state_dict(
            {key.removeprefix("attn."): value for key, value in own.items() if key.startswith("attn.")}
        )
        before = functional.layer_norm(tokens, (width,), own["ln_1.weight"], own["ln_1.bias"])
        tokens = tokens + attention(before, before, before, need_weights=False, attn_mask=mask)[0]
        before = functional.layer_norm(tokens, (width,), own["ln_2.weight"], own["ln_2.bias"])
        inner = gelu(before @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"])
        tokens = tokens + inner @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
    return tokens


def viclip_video(state: Weights, eyes: str, pixels: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """All patches of all frames under one class token; `order` places the frames' embeddings elsewhere."""
    patches = functional.conv2d(pixels, state[f"{eyes}conv1.weight"][:, :, 0], stride=16).flatten(2).transpose(1, 2)
    patches = patches + state[f"{eyes}positional_embedding"][1:]
    times = state[f"{eyes}temporal_positional_embedding"][0][order or list(range(T))]
    patches = torch.stack([patches[frame] + times[frame] for frame in range(T)])
    first = state[f"{eyes}class_embedding"] + state[f"{eyes}positional_embedding"][0]
    # The release orders patches by place and then time; attention does not care.
    tokens = torch.cat([first[None], patches.transpose(0, 1).reshape(-1, 128)])
    tokens = functional.layer_norm(tokens, (128,), state[f"{eyes}ln_pre.weight"], state[f"{eyes}ln_pre.bias"])
    out = openai_tower(state, eyes, tokens, causal=False)
    pooled = functional.layer_norm(out[0], (128,), state[f"{eyes}ln_post.weight"], state[f"{eyes}ln_post.bias"])
    return norm(pooled @ state[f"{eyes}proj"])


def viclip_text(state: Weights, text: str, ids: list[int]) -> torch.Tensor:
    """Zeros fill the context, the largest id is pooled; Long-CLIP's second table from position 20 on."""
    context = len(state[f"{text}positional_embedding"])
    if len(ids) > context:
        ids = [*ids[: context - 1], EOT]
    filled = torch.tensor(ids + [0] * (context - len(ids)))
    positions = state[f"{text}positional_embedding"].clone()
    if f"{text}positional_embedding_res" in state:
        positions[20:] = state[f"{text}positional_embedding_res"][20:]
    tokens = state[f"{text}token_embedding.weight"][filled] + positions
    out = openai_tower(state, text, tokens, causal=True)
    out = functional.layer_norm(out, (64,), state[f"{text}ln_final.weight"], state[f"{text}ln_final.bias"])
    return norm(out[filled.argmax()] @ state[f"{text}text_projection"])


@pytest.fixture(scope="module", params=["viclip", "videoclip-xl"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights, str, str]:
    """(folder, tensors, prefix of the picture tower, prefix of the text tower)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_vocabulary(folder)
    if request.param == "viclip":  # as the hub has it
        state = random_release(8, long=False)
        save_file(state, folder / "model.safetensors")
        config = {"architectures": ["ViCLIP"], "auto_map": {"AutoModel": "viclip.ViCLIP"}, "model_type": "whatever"}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder), state, "vision_encoder.", "text_encoder."
    state = random_release(24, long=True)
    torch.save(state, folder / "VideoCLIP-XL.bin")
    (folder / "config.json").write_text('{"model_type": "viclip"}')
    return str(folder), state, "vision_model.vision_encoder.", "text_model."


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_viclip_and_videoclip_xl(release: tuple[str, Weights, str, str]) -> None:
    folder, state, eyes, text = release
    encoder = load_encoder(folder)
    assert isinstance(encoder, ClipEncoder)
    shown, still = clip(0, T), clip(1, 1)
    context = len(state[f"{text}positional_embedding"])
    items = [
        Item((Video(shown),)),
        Item.of("Left red"),
        Item.of("left right " * context),
        Item((Image(still.pixels[0]), Text("red")), instruction="Find it."),
    ]
    vectors = encoder.encode(items).vectors
    pixels = seen(shown, False, MEAN, STD)
    repeated = seen(Frames(still.pixels.repeat(T, 0), np.arange(T), np.arange(T), T, 1.0), False, MEAN, STD)
    left, right, red = 2, 6, 8
    expected = [
        viclip_video(state, eyes, pixels),
        viclip_text(state, text, words([left, red])),
        viclip_text(state, text, words([left, right] * context)),
        norm(viclip_video(state, eyes, repeated) + viclip_text(state, text, words([red]))),
    ]
    np.testing.assert_allclose(vectors, torch.stack(expected).numpy(), atol=2e-5)
    # Negative controls: the frames' places in time show, and so does every word up to the limit.
    assert np.abs(vectors[0] - viclip_video(state, eyes, pixels, order=[3, 2, 1, 0]).numpy()).max() > 1e-3
    assert np.abs(vectors[2] - viclip_text(state, text, words([left, right])).numpy()).max() > 1e-3
    assert str(encoder.inputs["sampling"]) == f"uniform({T})"
    assert encoder.inputs["text_length"] == context


def test_second_table_of_positions_shows(tmp_path: Path) -> None:
    """Positions after the 20th come from the second table, those before do not."""
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "viclip"}')
    vectors = []
    for change in (None, 5, 22):
        state = random_release(24, long=True)
        if change is not None:
            state["text_model.positional_embedding_res"][change, 0] += 3
        torch.save(state, tmp_path / "VideoCLIP-XL.bin")
        vectors.append(ClipEncoder.from_pretrained(str(tmp_path)).encode([Item.of("left " * 30)]).vectors)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


def test_tokens_are_openais(tmp_path: Path) -> None:
    """256 letters, 256 letters that end a word, the merges, two marks: ids by hand."""
    write_vocabulary(tmp_path)
    tokenizer = openai_tokenizer(tmp_path / "bpe_simple_vocab_16e6.txt.gz", VOCAB)
    assert tokenizer("LEFT  red")["input_ids"] == [VOCAB - 2, 514, 520, EOT]
    # "!" is the first printable letter (id 0) and ends its word (id 256); "b" is the 66th of them.
    assert tokenizer("! b")["input_ids"] == [VOCAB - 2, 256, 256 + ord("b") - ord("!"), EOT]
    with pytest.raises(InputError, match="has 11 merges, the model needs 20"):
        openai_tokenizer(tmp_path / "bpe_simple_vocab_16e6.txt.gz", 534)


# LanguageBind: transformers' names, attention over time in every layer.


@pytest.fixture(scope="module")
def language_bind(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    """A folder as the hub has it: pytorch_model.bin, CLIP's vocabulary, the config of its own type."""
    folder = tmp_path_factory.mktemp("languagebind")
    vision = {**VISION, "num_frames": T, "add_time_attn": True, "lora_r": 0, "force_patch_dropout": 0.5}
    text = {**TEXT, "vocab_size": VOCAB, "eos_token_id": EOT}
    config = LanguageBindVideoConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        state = LanguageBindVideo(config).state_dict()
        for name, value in state.items():
            state[name] = torch.randn(value.shape) * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.2)
            if "norm" in name and name.endswith("weight"):
                state[name] += 1
    torch.save(state, folder / "pytorch_model.bin")
    values = {"model_type": "LanguageBindVideo", "architectures": ["CLIPModel"], "projection_dim": DIM}
    (folder / "config.json").write_text(json.dumps(values | {"text_config": text, "vision_config": vision}))
    write_vocabulary(folder)
    tokenizer = openai_tokenizer(folder / "bpe_simple_vocab_16e6.txt.gz", VOCAB)
    tokenizer.save_pretrained(folder)
    return str(folder), state


def attention(state: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Two heads over [L, 32], head by head."""
    q, k, v = (x @ state[f"{name}.{part}_proj.weight"].T + state[f"{name}.{part}_proj.bias"] for part in "qkv")
    heads = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        heads.append((q[:, part] @ k[:, part].T / 4).softmax(-1) @ v[:, part])
    return torch.cat(heads, 1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def normed(state: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def bound_video(state: Weights, pixels: torch.Tensor, time: bool = True) -> torch.Tensor:
    """LanguageBind's picture tower, place by place in time and frame by frame in space."""
    eyes = "vision_model."
    conv = state[f"{eyes}embeddings.patch_embedding.weight"]
    patches = functional.conv2d(pixels, conv, stride=16).flatten(2).transpose(1, 2)
    first = state[f"{eyes}embeddings.class_embedding"].expand(T, 1, -1)
    x = torch.cat([first, patches], 1) + state[f"{eyes}embeddings.position_embedding.weight"]
    x = normed(state, f"{eyes}pre_layrnorm", x)  # [T, 1 + N, 32]
    for layer in range(2):
        own = f"{eyes}encoder.layers.{layer}."
        if time:
            x = x + state[f"{own}temporal_embedding"][0][:, None]
            moved = [
                attention(state, f"{own}temporal_attn", normed(state, f"{own}temporal_layer_norm1", x[:, place]))
                for place in range(x.shape[1])
            ]
            x = x + torch.stack(moved, 1)
        x = x + torch.stack(
            [attention(state, f"{own}self_attn", normed(state, f"{own}layer_norm1", frame)) for frame in x]
        )
        inner = normed(state, f"{own}layer_norm2", x) @ state[f"{own}mlp.fc1.weight"].T + state[f"{own}mlp.fc1.bias"]
        x = x + gelu(inner) @ state[f"{own}mlp.fc2.weight"].T + state[f"{own}mlp.fc2.bias"]
    pooled = normed(state, f"{eyes}post_layernorm", x[:, 0]).mean(0)
    return norm(pooled @ state["visual_projection.weight"].T)


def test_language_bind(language_bind: tuple[str, Weights]) -> None:
    folder, state = language_bind
    encoder = load_encoder(folder)
    assert isinstance(encoder, ClipEncoder)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    shown, still = clip(0, T), clip(1, 1)
    vectors = encoder.encode([Item((Video(shown),)), Item((Image(still.pixels[0]),)), Item.of("left " * 20)]).vectors
    repeated = Frames(still.pixels.repeat(T, 0), np.arange(T), np.arange(T), T, 1.0)
    pixels = seen(shown, True, mean, std)
    expected = [bound_video(state, pixels), bound_video(state, seen(repeated, True, mean, std))]
    np.testing.assert_allclose(vectors[:2], torch.stack(expected).numpy(), atol=2e-5)
    # Negative control: without the attention over time.
    assert np.abs(vectors[0] - bound_video(state, pixels, time=False).numpy()).max() > 1e-3
    # The text tower is transformers' own CLIP: padded to the limit and cut there, as its processor does.
    plain = transformers.CLIPModel(transformers.CLIPConfig(**json.loads((Path(folder) / "config.json").read_text())))
    plain.load_state_dict({key: value for key, value in state.items() if "temporal" not in key})
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        "left " * 20, max_length=LENGTH, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        said = norm(plain.eval().get_text_features(**tokens).pooler_output)[0]
    np.testing.assert_allclose(vectors[2], said.numpy(), atol=2e-6)


def test_pictures_of_other_shapes() -> None:
    """Upright pictures keep their middle rows; rounding of the long side is downwards, as short_side_scale has it."""
    pixels = np.random.default_rng(0).integers(0, 255, (1, 55, 40, 3)).astype(np.uint8)
    made = Bilinear(SIDE, True, (0.0,) * 3, (1.0,) * 3)(pixels)["pixel_values"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(made, resized(pixels[0], 44, SIDE)[6:38] / 255, atol=1e-5)


def changed(folder: str, target: Path, **vision: Any) -> str:
    """A copy of the configuration with other values of the picture tower; no weights."""
    values = json.loads((Path(folder) / "config.json").read_text())
    values["vision_config"] |= vision
    (target / "config.json").write_text(json.dumps(values))
    return str(target)


def test_refusals(language_bind: tuple[str, Weights], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LoRA of rank 16; give a fully fine-tuned release"):
        ClipEncoder.from_pretrained(changed(language_bind[0], tmp_path, lora_r=16))
    with pytest.raises(InputError, match="no time attention"):
        ClipEncoder.from_pretrained(changed(language_bind[0], tmp_path, add_time_attn=False))
    with pytest.raises(InputError, match=r"uniform\(8\) does not fit"):
        ClipEncoder.from_pretrained(language_bind[0], sampling=Sampling.uniform(8))
    (tmp_path / "config.json").write_text('{"model_type": "viclip"}')
    with pytest.raises(InputError, match=r"needs bpe_simple_vocab_16e6\.txt\.gz and one of model\.safetensors"):
        ClipEncoder.from_pretrained(str(tmp_path))
    write_vocabulary(tmp_path)
    state = random_release(8, long=False)
    del state["vision_encoder.temporal_positional_embedding"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="the embedding of frames is missing"):
        ClipEncoder.from_pretrained(str(tmp_path))
    state = random_release(8, long=False)
    del state["text_encoder.transformer.resblocks.1.ln_2.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lacks 1 weights, for example text_model"):
        ClipEncoder.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": np.float64}, tmp_path / "pytorch_model.bin")  # a pickle of more than tensors
    with pytest.raises(InputError, match="cannot be loaded as plain tensors"):
        ClipEncoder.from_pretrained(str(tmp_path))
