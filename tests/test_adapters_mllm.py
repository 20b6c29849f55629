"""Published MLLM embedders: tiny models of the real architectures against their published usage, step by step."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import normalize

from gve.encode.encoder import Execution
from gve.encode.mllm import RECIPES, MLLMEncoder, Settings
from gve.encode.mllm.lora import merge_adapter
from gve.encode.mllm.recipes import recipe_named
from gve.encode.pretrained import load_encoder
from gve.encode.support import SUPPORT, support_table
from gve.eval.ablation import PixelAblation
from gve.inputs import InputPolicy
from gve.items import Frames, Image, InputError, Item, Text, Video
from gve.toy.base import train_tokenizer
from gve.video import Sampling

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a red circle moves left", "a blue square", "Find the video according to the text description"]
CLOSE = {"atol": 2e-5, "rtol": 0}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>{% endif %}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def clip(height: int, width: int, seed: int = 0) -> Frames:
    """Four frames, half a second apart, of 40 at 8 a second."""
    indices = np.array([0, 4, 8, 12])
    return Frames(noise(4, height, width, 3, seed=seed), indices / 8, indices, 40, 8.0)


def enlarged(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights so large that positions, pictures and every word of a prompt show in the vector."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 1.5 * value[0].numel() ** -0.5)
            elif "norm" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


# --- the Qwen-VL family ---

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
}


def qwen_ids(tokenizer: object) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {field: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for field, name in zip(fields, names, strict=True)}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL in a folder, saved as transformers 4 did: LM head included, names of that time."""
    folder = tmp_path_factory.mktemp("qwen2") / "weights"
    tokenizer = train_tokenizer(TEXTS)
    config = transformers.Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 48},
        **qwen_ids(tokenizer),
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    enlarged(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        state[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = value
    assert any(name.startswith("visual.") for name in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "Qwen3-VL-Embedding-2B"
    tokenizer = train_tokenizer(TEXTS)
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        **qwen_ids(tokenizer),
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    enlarged(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def called(folder: Path, name: str, tmp_path: Path) -> str:
    """The same model under a published name."""
    link = tmp_path / name
    link.symlink_to(folder, target_is_directory=True)
    return str(link)


def patches(pixels: np.ndarray, patch: int, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """The processors' patches of frames that need no resize: merged by 2 x 2, frames by 2, an image twice."""
    if len(pixels) == 1:
        pixels = np.repeat(pixels, 2, axis=0)
    scaled = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    t, h, w = len(pixels) // 2, pixels.shape[1] // patch, pixels.shape[2] // patch
    blocks = scaled.reshape(t, 2, 3, h // 2, 2, patch, w // 2, 2, patch).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return torch.from_numpy(blocks.reshape(t * h * w, -1)).float()


CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


@functools.cache
def stock(kind: str, folder: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """The base model by transformers alone, and its tokenizer."""
    logging = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    transformers.logging.set_verbosity(logging)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def qwen2_published(folder: Path, prompt: str, pixels: np.ndarray | None = None, place: int = -1) -> np.ndarray:
    """gme_inference.py, modeling_unite.py: features put among the embeddings, the decoder called without positions."""
    model, tokenizer = stock("Qwen2VLModel", folder)
    config, features = model.config, None
    if pixels is not None:
        grid = torch.tensor([[max(1, len(pixels) // 2), pixels.shape[1] // 14, pixels.shape[2] // 14]])
        features = model.visual(patches(pixels, 14, CLIP_MEAN, CLIP_STD), grid_thw=grid).pooler_output
        for holder in ("<|image_pad|>", "<|video_pad|>"):
            prompt = prompt.replace(holder, holder * len(features))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    embeddings = model.language_model.embed_tokens(ids)
    if features is not None:
        embeddings[(ids == config.image_token_id) | (ids == config.video_token_id)] = features
    states = model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return normalize(states[:, place], dim=-1)[0].numpy()


GME = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
HELPFUL = "You are a helpful assistant."
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def test_gme_as_its_own_code_uses_it(qwen2: Path, tmp_path: Path) -> None:
    still, moving = noise(56, 84, 3), clip(56, 84)
    cases: list[tuple[Item, str, np.ndarray | None]] = [
        (Item.of("a blue square", instruction="Find it"), GME.format("Find it.", "a blue square"), None),
        (Item.of("a blue square"), GME.format(HELPFUL, "a blue square"), None),
        (Item((Image(still),)), GME.format(HELPFUL, IMAGE), still[None]),
        (Item((Video(moving),)), GME.format(HELPFUL, VIDEO), moving.pixels),
        (
            Item((Video(moving), Text("a circle")), "Find it."),
            GME.format("Find it.", f"{VIDEO}a circle"),
            moving.pixels,
        ),
    ]
    encoder = load_encoder(called(qwen2, "gme-Qwen2-VL-2B-Instruct", tmp_path))
    assert isinstance(encoder, MLLMEncoder)
    assert encoder.inputs["adapter"] == "gme"
    vectors = encoder.encode([item for item, _, _ in cases]).vectors  # one padded batch of all lengths
    published = np.stack([qwen2_published(qwen2, prompt, pixels) for _, prompt, pixels in cases])
    np.testing.assert_allclose(vectors, published, **CLOSE)
    # Negative controls: another pooled token, another system turn and M-RoPE fail the same check.
    for _, prompt, pixels in cases:
        assert np.abs(qwen2_published(qwen2, prompt, pixels, place=-2) - published).max(1).min() > 1e-2
    bare = encoder.encode([Item.of("a blue square", instruction="")]).vectors[0]
    assert np.abs(bare - published[0]).max() > 1e-2
    mrope = MLLMEncoder.from_pretrained(str(qwen2), RECIPES["qwen2-vl"]).reader
    assert not torch.equal(mrope(cases[3][0]).positions, encoder.reader(cases[3][0]).positions)


@pytest.mark.parametrize(
    ("item", "user", "pixels"),
    [
        (Item.of("a circle", instruction="Find it."), "a circle\nSummary above sentence in one word:", None),
        (Item((Image(noise(56, 56, 3)),)), f"{IMAGE}\nSummary above image in one word:", noise(1, 56, 56, 3)),
        (Item((Video(clip(56, 56)),)), f"{VIDEO}\nSummary above video in one word:", clip(56, 56).pixels),
        (
            Item((Video(clip(56, 56)), Text("it turns")), "Find it."),
            f"{VIDEO}it turns\nSummary above sentence and video in one word:",
            clip(56, 56).pixels,
        ),
    ],
    ids=["text", "image", "video", "composed"],
)
def test_unite_as_its_demo_uses_it(
    qwen2: Path, tmp_path: Path, item: Item, user: str, pixels: np.ndarray | None
) -> None:
    """The demo's own least sizes (256 tokens an image) are lowered, so that 56 px stay 56 px."""
    changes = {"max_image_tokens": 64, "min_image_tokens": 1, "min_frame_tokens": 1}
    encoder = load_encoder(called(qwen2, "Unite-Base-Qwen2-VL-2B", tmp_path), inputs=changes)
    vector = encoder.encode([item]).vectors[0]
    np.testing.assert_allclose(vector, qwen2_published(qwen2, GME.format(HELPFUL, user), pixels), **CLOSE)
    other = qwen2_published(qwen2, GME.format(HELPFUL, user.replace(" in one word", "")), pixels)
    assert np.abs(vector - other).max() > 1e-2


def write_adapter(qwen2: Path, folder: Path, *, dora: bool) -> transformers.PreTrainedModel:
    """Writes an adapter as its authors did, with transformers 4's names; gives peft's own merged model."""
    import peft

    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(qwen2, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, use_dora=dora, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
    )
    tuned = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                value.add_(torch.rand(value.shape, generator=generator) * 0.3)
    tuned.save_pretrained(folder)
    old = {
        name.replace("model.language_model.", "model."): value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(old, folder / "adapter_model.safetensors", {"format": "pt"})
    return tuned.merge_and_unload().eval()


@pytest.mark.parametrize("dora", [False, True])
def test_vlm2vec_adapter_on_its_base(qwen2: Path, tmp_path: Path, dora: bool) -> None:
    """VLM2Vec-V2's hub folder holds DoRA weights alone; its prompts have no template, so no vision start either."""
    merged = write_adapter(qwen2, tmp_path / "VLM2Vec-V2.0", dora=dora)
    merged.save_pretrained(tmp_path / "merged")
    train_tokenizer(TEXTS).save_pretrained(tmp_path / "merged")
    moving = clip(56, 84)
    cases = [
        (Item((Video(moving),)), "<|video_pad|> Understand the content of the provided video.", moving.pixels),
        (Item.of("a blue square", instruction="Find a video:"), "Find a video: a blue square", None),
        (Item((Video(moving), Text("it turns")), "Find it:"), "<|video_pad|> Find it: it turns", moving.pixels),
    ]
    encoder = load_encoder(str(tmp_path / "VLM2Vec-V2.0"), base=str(qwen2))
    assert encoder.inputs["adapter"] == "vlm2vec-v2"
    vectors = encoder.encode([item for item, _, _ in cases]).vectors
    published = np.stack([qwen2_published(tmp_path / "merged", prompt, pixels) for _, prompt, pixels in cases])
    np.testing.assert_allclose(vectors, published, **CLOSE)
    base = np.stack([qwen2_published(qwen2, prompt, pixels) for _, prompt, pixels in cases])
    assert np.abs(vectors - base).max(1).min() > 1e-2  # the adapter was not dropped
    named = load_encoder(str(tmp_path / "VLM2Vec-V2.0"))  # the base that adapter_config.json names
    assert named.fingerprint == encoder.fingerprint
    assert named.fingerprint != load_encoder(str(qwen2), adapter="vlm2vec-v2").fingerprint


def test_adapters_that_do_not_fit_are_refused(qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_adapter(qwen2, folder, dora=False)
    model = transformers.Qwen2VLModel.from_pretrained(qwen2, dtype=torch.float32)
    assert merge_adapter(model, folder) == 8
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "layers.7"): value for name, value in weights.items()}, folder / "w.safetensors"
    )
    (folder / "w.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="another base's adapter"):
        merge_adapter(model, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="modules_to_save"):
        merge_adapter(model, folder)


QWEN3 = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def qwen3_published(folder: Path, prompt: str, pixels: np.ndarray | None = None) -> np.ndarray:
    """qwen3_vl_embedding.py: the whole model, positions of its own making, the last real token."""
    model, tokenizer = stock("Qwen3VLModel", folder)
    media: dict[str, torch.Tensor] = {}
    if pixels is not None:
        half = np.array([0.5, 0.5, 0.5])
        grid = torch.tensor([[max(1, len(pixels) // 2), pixels.shape[1] // 16, pixels.shape[2] // 16]])
        flat = patches(pixels, 16, half, half)
        kind = ("pixel_values", "image_grid_thw") if len(pixels) == 1 else ("pixel_values_videos", "video_grid_thw")
        media = {kind[0]: flat, kind[1]: grid}
        for holder in ("<|image_pad|>", "<|video_pad|>"):
            prompt = prompt.replace(holder, holder * int(grid[0, 1:].prod() // 4))
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    types = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
    states = model(**inputs, mm_token_type_ids=types, **media, use_cache=False).last_hidden_state
    return normalize(states[:, -1], dim=-1)[0].numpy()


def test_qwen3_vl_embedding_as_its_own_code_uses_it(qwen3: Path) -> None:
    still, moving = noise(64, 96, 3), clip(64, 96)
    # Grid steps of frames (0, 4) and (8, 12) at 8 a second: their means are 0.25 and 1.25 s.
    timed = f"<0.2 seconds>{VIDEO}<1.2 seconds>{VIDEO}"
    cases: list[tuple[Item, str, np.ndarray | None]] = [
        (Item.of("a square", instruction="Find it"), QWEN3.format("Find it.", "a square"), None),
        (Item.of("a square", instruction="Which one?"), QWEN3.format("Which one?", "a square"), None),
        (Item.of("a square"), QWEN3.format("Represent the user's input.", "a square"), None),
        (Item((Image(still),)), QWEN3.format("Represent the user's input.", IMAGE), still[None]),
        (Item((Video(moving),)), QWEN3.format("Represent the user's input.", timed), moving.pixels),
        (Item((Video(moving), Text("turn")), "Find it."), QWEN3.format("Find it.", f"{timed}turn"), moving.pixels),
    ]
    encoder = load_encoder(str(qwen3), inputs={"min_frame_tokens": 1})
    vectors = encoder.encode([item for item, _, _ in cases]).vectors
    published = np.stack([qwen3_published(qwen3, prompt, pixels) for _, prompt, pixels in cases])
    np.testing.assert_allclose(vectors, published, **CLOSE)
    late = Frames(
        moving.pixels, moving.times_s, moving.indices, moving.num_frames, 4.0
    )  # the same frames, half as fast
    assert np.abs(encoder.encode([Item((Video(late),))]).vectors[0] - published[4]).max() > 1e-2


# --- the LLaVA family ---


def llava_tokenizer(folder: Path, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, a beginning of sequence before every text, and the models' own special tokens."""
    from tokenizers.processors import TemplateProcessing

    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "<image>", "<video>", "<instruct>", "<query>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return tokenizer


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAVA_TEXT = {**TEXT, "vocab_size": 272, "max_position_embeddings": 2048, "head_dim": 12}


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next") / "BGE-VL-v1.5-mmeb"
    config = transformers.LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        text_config={**LLAVA_TEXT, "model_type": "mistral"},
        image_token_id=258,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    enlarged(model)
    model.save_pretrained(folder)
    llava_tokenizer(folder)
    transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=config.image_grid_pinpoints,
    ).save_pretrained(folder)
    return folder


def in_tiles(picture: np.ndarray) -> PIL.Image.Image:
    """modeling_llavanext_for_embedding.py: Image.open(...).resize((512, 512))."""
    return PIL.Image.fromarray(picture).resize((512, 512))


@torch.no_grad()
def bge_published(folder: Path, prompt: str, picture: np.ndarray | None = None, place: int = -1) -> np.ndarray:
    """data_process and forward: the stock processor, the decoder's states after the norm, the last token."""
    model, tokenizer = stock("LlavaNextModel", folder)
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil.from_pretrained(folder),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    images = None if picture is None else [in_tiles(picture)]
    inputs = processor(images=images, text=[prompt], return_tensors="pt")
    states = model(**inputs, use_cache=False).last_hidden_state
    return normalize(states[:, place], dim=-1)[0].numpy()


def test_bge_vl_as_its_own_code_uses_it(llava_next: Path) -> None:
    still = noise(30, 50, 3)
    query = "[INST] \n <instruct> Find it: <query> "
    cases: list[tuple[Item, str, np.ndarray | None]] = [
        (Item.of("a square", instruction="Find it:"), f"{query} a square \n [/INST]", None),
        (Item.of("a square"), "[INST]  a square \n [/INST]", None),
        (Item((Image(still),)), "[INST]  <image> [/INST]", still),
        (Item((Image(still), Text("but red")), "Find it:"), f"{query} but red \n <image> [/INST]", still),
    ]
    encoder = load_encoder(str(llava_next))
    assert encoder.inputs["adapter"] == "bge-vl"
    vectors = encoder.encode([item for item, _, _ in cases]).vectors
    published = np.stack([bge_published(llava_next, prompt, picture) for _, prompt, picture in cases])
    np.testing.assert_allclose(vectors, published, **CLOSE)
    for (_, prompt, picture), vector in zip(cases, published, strict=True):
        assert np.abs(bge_published(llava_next, prompt, picture, place=-2) - vector).max() > 1e-2
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


@torch.no_grad()
def test_bge_vl_reads_a_clip_as_images_of_one_tile(llava_next: Path) -> None:
    moving = clip(40, 60)
    encoder = load_encoder(str(llava_next))
    vector = encoder.encode([Item((Video(moving),))]).vectors[0]
    model, tokenizer = stock("LlavaNextModel", llava_next)

    def reference(frames: np.ndarray) -> np.ndarray:
        squeezed = [np.asarray(PIL.Image.fromarray(f).resize((28, 28), PIL.Image.Resampling.BICUBIC)) for f in frames]
        pixels = torch.tensor((np.stack(squeezed) / 255 - CLIP_MEAN) / CLIP_STD).permute(0, 3, 1, 2).float()
        tokens = model.multi_modal_projector(
            model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        )
        packed, sizes = model.pack_image_features(
            [own[None] for own in tokens], torch.tensor([[28, 28]] * 4), "default", model.image_newline
        )
        assert sizes.tolist() == [17] * 4  # 16 patches and a line break
        ids = tokenizer("[INST]  " + "<image>" * 68 + " [/INST]", return_tensors="pt")["input_ids"]
        embeddings = model.language_model.embed_tokens(ids)
        embeddings[ids == 258] = torch.cat(packed)
        states = model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return normalize(states[:, -1], dim=-1)[0].numpy()

    np.testing.assert_allclose(vector, reference(moving.pixels), atol=2e-4, rtol=0)  # Pillow rounds, we compare floats
    assert np.abs(vector - reference(moving.pixels[::-1].copy())).max() > 1e-2


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onevision") / "UniME-LLaVA-OneVision-7B"
    config = transformers.LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7},
        text_config={**LLAVA_TEXT, "model_type": "qwen2"},
        image_token_id=258,
        video_token_id=259,
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=[[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    enlarged(model)
    model.save_pretrained(folder)
    llava_tokenizer(folder, TEMPLATE)
    transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def unime_published(folder: Path, prompt: str, pixels: np.ndarray | None = None) -> np.ndarray:
    """The stock model with what its processors give, the last token. The model refuses a wrong count of tokens."""
    model, tokenizer = stock("LlavaOnevisionModel", folder)
    images = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    media: dict[str, torch.Tensor] = {}
    if pixels is not None and len(pixels) == 1:
        media = dict(images([PIL.Image.fromarray(pixels[0])], return_tensors="pt"))
        features = model.get_image_features(**media, vision_aspect_ratio="anyres_max_2", return_dict=True).pooler_output
        prompt = prompt.replace("<image>", "<image>" * len(features[0]))
        media["vision_aspect_ratio"] = "anyres_max_2"
    elif pixels is not None:
        squeezed = [np.asarray(PIL.Image.fromarray(f).resize((28, 28), PIL.Image.Resampling.BICUBIC)) for f in pixels]
        frames = torch.tensor((np.stack(squeezed) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
        media = {"pixel_values_videos": frames[None]}
        prompt = prompt.replace("<video>", "<video>" * (len(pixels) * 2 * 2 + 1))  # 4 x 4 patches pooled to 2 x 2
    states = model(**tokenizer(prompt, return_tensors="pt"), **media, use_cache=False).last_hidden_state
    return normalize(states[:, -1], dim=-1)[0].numpy()


def test_unime_as_published(onevision: Path) -> None:
    chat = "<|im_start|>user {}\n{}<|im_end|><|im_start|>assistant\n"
    moving = clip(40, 60)
    large, small = noise(90, 61, 3), noise(20, 24, 3)  # 3 x 2 tiles are more than two: shrunk; one tile and its cut
    cases: list[tuple[Item, str, np.ndarray | None]] = [
        (Item.of("a square"), chat.format("", "a square\nSummary above sentence in one word:\n"), None),
        (Item((Image(large),)), chat.format("<image>", "Summary above image in one word:\n"), large[None]),
        (Item((Image(small),)), chat.format("<image>", "Summary above image in one word:\n"), small[None]),
        (Item((Video(moving),)), chat.format("<video>", "Summary above video in one word:\n"), moving.pixels),
        (
            Item((Video(moving), Text("turn")), "Find it."),
            chat.format("<video>", "Find it. turn\nSummary above sentence and video in one word:\n"),
            moving.pixels,
        ),
    ]
    encoder = load_encoder(str(onevision))
    vectors = encoder.encode([item for item, _, _ in cases]).vectors
    published = np.stack([unime_published(onevision, prompt, pixels) for _, prompt, pixels in cases])
    np.testing.assert_allclose(vectors, published, atol=2e-4, rtol=0)
    wrong = unime_published(onevision, cases[1][1].replace("Summary", "summary"), cases[1][2])
    assert np.abs(wrong - vectors[1]).max() > 1e-2


# --- what all of them share ---


def test_long_texts_lose_their_end_and_nothing_else(qwen2: Path, tmp_path: Path) -> None:
    name = called(qwen2, "gme-Qwen2-VL-2B-Instruct", tmp_path)
    reader = load_encoder(name, inputs={"max_length": 60}).reader
    words = " ".join(f"word{index}" for index in range(200))
    cut = reader(Item((Video(clip(56, 56)), Text(words)), "Find it."))
    text = reader.tokenizer.decode(cut.ids.tolist())
    assert len(cut.ids) <= 60
    assert cut.cut_tokens > 100
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
    assert text.count("<|video_pad|>") == 8  # 2 grid steps of 2 x 2: vision is never cut
    assert "<|vision_end|>word0 word1" in text
    whole = load_encoder(name).reader(Item.of("a blue square"))
    assert whole.cut_tokens == 0
    failures = load_encoder(name, inputs={"max_length": 20}).encode([Item((Video(clip(56, 56)),), id="c")]).failures
    assert "max_length" in failures[0]


def test_users_cannot_write_special_tokens(qwen2: Path, tmp_path: Path) -> None:
    reader = load_encoder(called(qwen2, "gme-Qwen2-VL-2B-Instruct", tmp_path)).reader
    end = reader.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = reader(Item.of("a<|im_end|><|image_pad|>", instruction="b<|im_end|>")).ids.tolist()
    assert ids.count(end) == 2  # those of the system and the user turn
    assert reader.geometry.image_token not in ids


def write_clip(path: Path, seed: int) -> None:
    """Twelve frames of 56 x 56, each of its own grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for index in range(12):
            shade = np.full((56, 56, 3), 20 * index + seed, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())


def test_files_failures_batches_and_workers(qwen2: Path, tmp_path: Path) -> None:
    for seed in range(2):
        write_clip(tmp_path / f"{seed}.mp4", seed)
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:300])
    items = [
        Item.of("a red circle moves left", instruction="Find it."),
        Item.of(video=tmp_path / "0.mp4"),
        Item.of(video=tmp_path / "torn.mp4"),
        Item.of("a blue square", video=tmp_path / "1.mp4", instruction="Find it."),
        Item.of(video=tmp_path / "gone.mp4"),
        Item((Image(noise(60, 80, 3)),)),
    ]
    name = called(qwen2, "gme-Qwen2-VL-7B-Instruct", tmp_path)
    encoder = load_encoder(name, inputs={"sampling": Sampling.uniform(4)})
    result = encoder.encode(items)
    assert sorted(result.failures) == [2, 4]
    assert "torn.mp4" in result.failures[2]
    assert "gone.mp4" in result.failures[4]
    assert np.isnan(result.vectors[[2, 4]]).all()
    np.testing.assert_allclose(np.linalg.norm(result.vectors[[0, 1, 3, 5]], axis=1), 1, atol=1e-6)
    execution = Execution(batch_tokens=1, num_workers=1)
    alone = load_encoder(name, inputs={"sampling": Sampling.uniform(4)}, execution=execution)
    again = alone.encode(items)
    np.testing.assert_allclose(again.vectors, result.vectors, **CLOSE)
    assert again.failures == result.failures
    # Negative control: the comparison sees one frame in another place.
    shuffled = encoder.encode(items, transform=PixelAblation("shuffled")).vectors
    moved = np.abs(shuffled - result.vectors).max(1) > 1e-4
    assert moved[[1, 3]].all()
    assert not moved[[0, 5]].any()


def test_fingerprint_follows_weights_recipe_and_settings(qwen2: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path = qwen2, **options: object) -> str:
        return load_encoder(str(folder), **{"adapter": "gme", **options}).fingerprint

    other = tmp_path / "other"
    shutil.copytree(qwen2, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    found = [
        fingerprint(),
        fingerprint(other),
        fingerprint(adapter="unite"),
        fingerprint(inputs={"sampling": Sampling.uniform(16)}),
        fingerprint(inputs={"max_frame_tokens": 400}),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == fingerprint()
    assert found[0] == fingerprint(execution=Execution(batch_tokens=100))  # how it runs is no part of it


def test_settings_take_a_callers_changes() -> None:
    own = RECIPES["unite"].settings
    assert own.changed(None) == own
    lowered = own.changed({"max_image_tokens": 200, "sampling": Sampling.uniform(16)})
    assert (lowered.min_image_tokens, lowered.max_image_tokens, lowered.sampling.num_frames) == (200, 200, 16)
    whole = own.changed(InputPolicy(sampling=Sampling.uniform(4), max_length=77))
    assert whole == Settings(Sampling.uniform(4), max_length=77)
    with pytest.raises(InputError, match="system_prompt"):
        own.changed({"system_prompt": "x"})
    with pytest.raises(InputError, match="max_frame_tokens"):
        own.changed({"max_frame_tokens": 0})


def rename(folder: Path, **config: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_how_an_adapter_is_chosen(qwen2: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / "my-finetune"
    shutil.copytree(qwen2, folder)
    encoder = load_encoder(str(folder))
    assert encoder.inputs["adapter"] == "qwen2-vl"
    assert any("untrained base" in str(warning.message) for warning in recwarn)
    assert load_encoder(str(folder), adapter="unite").inputs["adapter"] == "unite"
    # UNITE's own code leaves a model type of its own in config.json; its weights are plain Qwen2-VL.
    rename(folder, model_type="unite_qwen2_vl")
    twin = load_encoder(str(folder), adapter="unite").encode([Item.of("a circle")]).vectors
    plain = load_encoder(str(qwen2), adapter="unite").encode([Item.of("a circle")]).vectors
    np.testing.assert_array_equal(twin, plain)
    rename(folder, model_type="gpt2")
    with pytest.raises(InputError, match="'gpt2': no adapter is made for it"):
        load_encoder(str(folder))
    with pytest.raises(InputError, match="adapter gme takes qwen2_vl"):
        load_encoder(str(folder), adapter="gme")
    with pytest.raises(InputError, match="adapter 'gmee' is unknown"):
        load_encoder(str(folder), adapter="gmee")
    with pytest.raises(InputError, match="does not exist"):
        load_encoder(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"neither config\.json"):
        load_encoder(str(tmp_path))


def test_missing_weights_are_refused(qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holed"
    shutil.copytree(qwen2, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights"):
        load_encoder(str(folder), adapter="gme")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_records_are_whole(recipe: object) -> None:
    """Each record cites its source, and its prompts for distinct contents differ."""
    from gve.encode.mllm.recipes import Recipe, Turn

    assert isinstance(recipe, Recipe)
    assert recipe.source
    assert recipe.models or recipe.name in ("qwen2-vl", "qwen3-vl")

    def chat(content: list[Mapping[str, str]]) -> str:
        return json.dumps(content)

    render: Callable[..., str] = lambda *turn: recipe.prompt(Turn(*turn, chat))  # noqa: E731
    prompts = [
        render("", "words", "", ()),
        render("", "other", "", ()),
        render("", "", recipe.video, ("video",)),
        render("", "words", recipe.video, ("video",)),
    ]
    assert len(set(prompts)) == len(prompts)
    assert all("words" in prompts[place] for place in (0, 3))


def test_the_table_of_published_models_is_whole_and_stands_in_the_readme() -> None:
    """One row for each row of the published scores; each adapter is the one that a name leads to."""
    published = csv.DictReader((ROOT / "gve" / "eval" / "uvrb_published.csv").read_text().splitlines())
    assert [own.model for own in SUPPORT] == [row["model"] for row in published]
    for own in SUPPORT:
        recipe = recipe_named(own.hub)
        assert own.adapter in ("gve", "clip", "") if recipe is None else own.adapter == recipe.name
        assert own.runs or own.note.startswith("needs: ")
    readme = (ROOT / "README.md").read_text()
    assert support_table() in readme


def test_real_tokenizer_gives_the_published_ids(real: Path) -> None:
    """Qwen's own vocabulary: ids of UNITE's template as a whole string, text in Latin, Chinese and emoji."""
    from gve.encode.mllm.qwen import QwenReader

    tokenizer = transformers.AutoTokenizer.from_pretrained(real / "tokenizer" / "qwen2_5_vl_7b")
    reader = QwenReader(RECIPES["unite"], RECIPES["unite"].settings, tokenizer, transformers.Qwen2VLConfig())
    for text in ("a man  rides", "一个男人骑马", "\n\n spaced ", "\U0001f600 smile"):
        prompt = GME.format(HELPFUL, f"{text}\nSummary above sentence in one word:")
        assert reader(Item.of(text)).ids.tolist() == tokenizer(prompt)["input_ids"]
        assert reader(Item.of(text)).ids[-1] == 151643
