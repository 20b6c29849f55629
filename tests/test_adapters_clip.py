"""Dual encoders and SentenceTransformers as encoders: tiny weights of the real classes, against their published usage.

The references are written out with transformers' and sentence-transformers' own calls, step by step and one item at a
time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from gve.encode.clip import FAMILIES, ClipEncoder
from gve.encode.pretrained import load_encoder
from gve.encode.store import EmbeddingStore, encode_items
from gve.eval.ablation import PixelAblation
from gve.items import Frames, Image, InputError, Item, Text, Video
from gve.video import Sampling, decode
from tiny_clip import LENGTH, SIDE, clip, tokenizer, write_dual_encoder, write_video

STOCK = sorted(family for family in FAMILIES if family in transformers.CONFIG_MAPPING)  # the others: own test
LONG = "a red circle moves left then right and a blue square stays " * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: write_dual_encoder(tmp_path_factory.mktemp(family), family) for family in STOCK}


def norm(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


def text_vector(folder: str, text: str) -> torch.Tensor:
    """As the model cards have it: the processor's tokens, cut at the tower's length, get_text_features, unit length."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    padding = "max_length" if model.config.model_type.startswith("siglip") else False
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        text, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return norm(output.pooler_output)[0]


def frame_vectors(folder: str, frames: Frames) -> torch.Tensor:
    """[T, D], one picture at a time, each as a PIL image."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    rows = []
    for pixels in frames.pixels:
        inputs = images(PIL.Image.fromarray(pixels), return_tensors="pt")
        with torch.no_grad():
            rows.append(model.get_image_features(**inputs).pooler_output[0])
    return torch.stack(rows)


def clip_vector(folder: str, frames: Frames) -> torch.Tensor:
    """CLIP4Clip meanP: unit frames, mean, unit length. X-CLIP: its own pooling over all frames at once."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type != "xclip":
        return norm(norm(frame_vectors(folder, frames)).mean(0))
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = images([PIL.Image.fromarray(pixels) for pixels in frames.pixels], return_tensors="pt")
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(folder).eval()
        return norm(model.get_video_features(inputs["pixel_values"][None]).pooler_output)[0]


@pytest.mark.parametrize("family", STOCK)
def test_vectors_are_those_of_the_published_usage(folders: dict[str, str], family: str) -> None:
    folder = folders[family]
    count = 4 if family == "xclip" else 6
    shown, still = clip(0, count), clip(1, 1).pixels[0]
    encoder = ClipEncoder.from_pretrained(folder, sampling=Sampling.uniform(count), batch_size=4)
    items = [
        Item.of("a red circle moves left", instruction="Find the clip."),
        Item.of(LONG),
        Item((Video(shown),)),
        Item((Image(still),)),
        Item((Image(still), Text("a blue square stays")), instruction="Find the clip."),
        Item((Video(clip(2, count)), Text("left"))),
    ]
    vectors = encoder.encode(items).vectors
    repeated = Frames(np.stack([still] * (count if family == "xclip" else 1)), np.arange(1), np.arange(1), 1, 1.0)
    picture = clip_vector(folder, repeated)
    expected = [
        text_vector(folder, "a red circle moves left"),  # the instruction is left out
        text_vector(folder, LONG),
        clip_vector(folder, shown),
        picture,
        norm(picture + text_vector(folder, "a blue square stays")),
        norm(clip_vector(folder, clip(2, count)) + text_vector(folder, "left")),
    ]
    np.testing.assert_allclose(vectors, torch.stack(expected).numpy(), atol=2e-6)
    assert encoder.dim == vectors.shape[1]
    # Negative control: the frames in another order (X-CLIP) or unequal weights of the frames (all others) show.
    if family == "xclip":
        backwards = Frames(shown.pixels[::-1].copy(), shown.times_s, shown.indices, count, 4.0)
        wrong = clip_vector(folder, backwards)
    else:
        wrong = norm(frame_vectors(folder, shown).mean(0))
    assert np.abs(vectors[2] - wrong.numpy()).max() > 1e-5


def test_clip4clip_repository_without_image_processor(tmp_path: Path) -> None:
    """Its transformers release ships weights and tokenizer; the pictures are CLIP's, and a scale is not needed."""
    folder = write_dual_encoder(tmp_path, "clip", processor=False)
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    del state["logit_scale"]
    save_file(state, weights, {"format": "pt"})
    encoder = ClipEncoder.from_pretrained(folder)
    frames = clip(3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    rows = []
    for pixels in frames.pixels:  # the release's own steps: Resize(32, BICUBIC), CenterCrop(32), ToTensor, Normalize
        picture = PIL.Image.fromarray(pixels)
        wide = int(SIDE * picture.width / picture.height)
        picture = picture.resize((wide, SIDE), PIL.Image.Resampling.BICUBIC)
        left = round((wide - SIDE) / 2.0)
        cropped = np.asarray(picture.crop((left, 0, left + SIDE, SIDE)))
        rows.append(((torch.from_numpy(cropped.copy()) / 255 - mean) / std).permute(2, 0, 1))
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        frames_seen = norm(vision(pixel_values=torch.stack(rows)).image_embeds)
        expected = norm(frames_seen.mean(0))
    np.testing.assert_allclose(encoder.encode([Item((Video(frames),))]).vectors[0], expected.numpy(), atol=2e-5)
    assert (frames_seen[0] - expected).abs().max() > 1e-2  # negative control: one frame is not the clip


def test_files_workers_batches_and_failures(folders: dict[str, str], tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", 0)
    (tmp_path / "torn.mp4").write_bytes(video.read_bytes()[:300])
    PIL.Image.fromarray(clip(5).pixels[0]).save(tmp_path / "a.png")
    items = [
        Item.of("left"),
        Item.of(video=tmp_path / "torn.mp4"),
        Item.of(video=video),
        Item.of(image=tmp_path / "a.png"),
        Item.of(LONG),
        Item.of("a square", video=tmp_path / "gone.mp4"),
        *[Item.of(f"square {word}") for word in ["one", "two", "three", "four", "five"]],
    ]
    encoder = ClipEncoder.from_pretrained(folders["clip"])
    result = encoder.encode(items)
    assert sorted(result.failures) == [1, 5]
    assert "torn.mp4" in result.failures[1]
    assert "gone.mp4" in result.failures[5]
    assert np.isnan(result.vectors[[1, 5]]).all()
    expected = clip_vector(folders["clip"], decode(video, Sampling.uniform(8)))
    np.testing.assert_allclose(result.vectors[2], expected.numpy(), atol=2e-6)
    # One picture a batch, decoded in a worker process: the same, and the callers' random state is left alone.
    state = torch.get_rng_state()
    small = ClipEncoder.from_pretrained(folders["clip"], batch_size=1, num_workers=1).encode(items)
    np.testing.assert_allclose(small.vectors, result.vectors, atol=2e-6)
    assert small.failures == result.failures
    assert torch.equal(torch.get_rng_state(), state)
    # Ablations reach the decoded clip and nothing else.
    black = encoder.encode(items, transform=PixelAblation("black")).vectors
    moved = np.abs(np.nan_to_num(black - result.vectors)).max(1) > 1e-5
    assert moved.nonzero()[0].tolist() == [2, 3]


def test_an_item_without_content_is_the_empty_text(folders: dict[str, str]) -> None:
    encoder = ClipEncoder.from_pretrained(folders["clip"])
    vectors = encoder.encode([Item(()), Item((), "Find the video.")]).vectors
    np.testing.assert_allclose(vectors, [text_vector(folders["clip"], "").numpy()] * 2, atol=2e-6)


def test_bfloat16(folders: dict[str, str]) -> None:
    items = [Item.of("a red circle"), Item((Video(clip(0)),))]
    full = ClipEncoder.from_pretrained(folders["clip"]).encode(items).vectors
    half = ClipEncoder.from_pretrained(folders["clip"], dtype="bfloat16").encode(items).vectors
    cosines = (full * half).sum(1)
    assert (cosines > 0.99).all()
    assert np.abs(full - half).max() > 1e-4  # it did run in another type


def test_fingerprint_follows_frames_and_weights(folders: dict[str, str], tmp_path: Path) -> None:
    first = ClipEncoder.from_pretrained(folders["clip"])
    assert first.fingerprint == ClipEncoder.from_pretrained(folders["clip"], batch_size=3, num_workers=2).fingerprint
    other = ClipEncoder.from_pretrained(folders["clip"], sampling=Sampling.uniform(4))
    assert other.fingerprint != first.fingerprint
    assert other.weights_hash == first.weights_hash
    with torch.no_grad():
        other.model.visual_projection.weight[0, 0] += 1e-3
    changed = ClipEncoder(other.model, other.tokenizer, other.images)
    assert changed.weights_hash != first.weights_hash
    assert changed.fingerprint != first.fingerprint
    # Frames change what is stored: the second run under other frames encodes again.
    item = Item((Video(clip(0), sha256="a" * 64),))
    encode_items(first, [item], EmbeddingStore(tmp_path, first.fingerprint))
    assert len(EmbeddingStore(tmp_path, first.fingerprint)) == 1
    assert len(EmbeddingStore(tmp_path, other.fingerprint)) == 0


def test_refusals(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"uniform\(8\) does not fit this xclip.*uniform\(4\)"):
        ClipEncoder.from_pretrained(folders["xclip"], sampling=Sampling.uniform(8))
    encoder = ClipEncoder.from_pretrained(folders["xclip"])
    assert "has 6 frames, the model needs 4" in encoder.encode([Item((Video(clip(0, 6)),))]).failures[0]
    with pytest.raises(InputError, match="cannot be opened"):
        ClipEncoder.from_pretrained(str(tmp_path))
    bert = transformers.BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert' is no dual encoder"):
        ClipEncoder.from_pretrained(str(tmp_path / "bert"))
    # A projection that is absent would be random.
    folder = Path(write_dual_encoder(tmp_path / "cut", "clip"))
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, for example visual_projection\.weight"):
        ClipEncoder.from_pretrained(str(folder))


# sentence-transformers


@pytest.fixture(scope="module")
def sentence_clip(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A CLIP SentenceTransformer on disk, and the same one loaded by sentence-transformers itself."""
    library = pytest.importorskip("sentence_transformers", reason="needs the extra sentence-transformers")
    from sentence_transformers.base.modules import Transformer

    folder = str(tmp_path_factory.mktemp("sentence_clip"))
    library.SentenceTransformer(modules=[Transformer(folders["clip"])], device="cpu").save(folder)
    return folder, library.SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def sentence_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A text model with mean pooling and prompts of its own."""
    library = pytest.importorskip("sentence_transformers", reason="needs the extra sentence-transformers")
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    inner = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=160
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        transformers.BertModel(config).save_pretrained(inner)
    tokenizer().save_pretrained(inner)
    modules = [Transformer(str(inner)), Pooling(32)]
    prompts = {"query": "left right ", "document": "circle "}
    folder = str(tmp_path_factory.mktemp("sentence_text"))
    library.SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(folder)
    return folder, library.SentenceTransformer(folder, device="cpu")


def test_sentence_clip_equals_the_library(sentence_clip: tuple[str, Any]) -> None:
    folder, model = sentence_clip
    from gve.encode.sentence import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(folder, batch_size=5)
    still, shown = clip(1, 1).pixels[0], clip(0)
    items = [
        Item.of("a red circle", instruction="Find it."),
        Item((Image(still),)),
        Item((Video(shown),)),
        Item((Image(still), Text("a blue square"))),
        Item.of(LONG),
        Item(()),
    ]
    vectors = encoder.encode(items).vectors

    def own(value: Any) -> np.ndarray:
        return model.encode([value], normalize_embeddings=True)[0]

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.linalg.norm(vector)

    picture = own(PIL.Image.fromarray(still))
    expected = [
        own("a red circle"),
        picture,
        unit(np.mean([own(PIL.Image.fromarray(pixels)) for pixels in shown.pixels], 0)),
        unit(picture + own("a blue square")),
        own(LONG),
        own(""),
    ]
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert np.abs(vectors[2] - own(PIL.Image.fromarray(shown.pixels[4]))).max() > 1e-3  # negative control: one frame
    assert encoder.inputs["clip"] == "mean"


def test_text_that_looks_like_a_file_stays_text(sentence_clip: tuple[str, Any], tmp_path: Path) -> None:
    """sentence-transformers opens a string that names a picture; a caption must never do that."""
    folder, model = sentence_clip
    from gve.encode.sentence import SentenceEncoder

    path = tmp_path / "left.png"
    PIL.Image.fromarray(clip(0).pixels[0]).save(path)
    vector = SentenceEncoder.from_pretrained(folder).encode([Item.of(str(path))]).vectors[0]
    np.testing.assert_allclose(vector, model.encode([{"text": str(path)}], normalize_embeddings=True)[0], atol=2e-6)
    assert np.abs(vector - model.encode([str(path)], normalize_embeddings=True)[0]).max() > 1e-3  # the trap is real


def test_sentence_text_uses_its_own_prompts_and_refuses_media(sentence_text: tuple[str, Any]) -> None:
    folder, model = sentence_text
    from gve.encode.sentence import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(folder)
    items = [
        Item.of("a red circle", instruction="Find it."),
        Item.of("a red circle"),
        Item((Video(clip(0)),)),
        Item((Image(clip(0).pixels[0]), Text("left"))),
    ]
    result = encoder.encode(items)
    query = model.encode(["left right a red circle"], prompt="", normalize_embeddings=True)[0]
    document = model.encode(["circle a red circle"], prompt="", normalize_embeddings=True)[0]
    np.testing.assert_allclose(result.vectors[:2], [query, document], atol=2e-6)
    assert np.abs(query - document).max() > 1e-3  # negative control: the prompts do show
    assert dict(result.failures) == {2: "the model takes text and no video", 3: "the model takes text and no image"}
    assert np.isnan(result.vectors[2:]).all()


class Chat:
    """A chat model as far as SentenceEncoder asks: what it supports, and what its calls are given.

    The real ones are vision-language models of gigabytes; what is tested here is which messages are made.
    """

    def __init__(self, *modalities: str, prompts: dict[str, str] | None = None) -> None:
        self.modalities, self.prompts, self.max_seq_length = list(modalities), prompts or {}, 64
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []

    def eval(self) -> Chat:
        return self

    def supports(self, kind: str) -> bool:
        return kind in self.modalities

    def _encode(self, task: str, inputs: list[Any], options: dict[str, Any]) -> torch.Tensor:
        self.calls.append(
            (task, inputs, {name: options[name] for name in ("prompt", "processing_kwargs") if name in options})
        )
        return torch.ones(len(inputs), 4)

    def encode_query(self, inputs: list[Any], **options: Any) -> torch.Tensor:
        return self._encode("query", inputs, options)

    def encode_document(self, inputs: list[Any], **options: Any) -> torch.Tensor:
        return self._encode("document", inputs, options)


def asked(model: Chat, *items: Item) -> list[tuple[str, list[Any], dict[str, Any]]]:
    from gve.encode.sentence import SentenceEncoder

    encoder = SentenceEncoder(model)
    assert encoder.dim == 4
    model.calls.clear()
    assert not encoder.encode(items).failures
    return model.calls


def test_chat_models_read_instructions_and_frames_as_one_message() -> None:
    frames = clip(0)
    composed = Item((Video(frames), Text("left")), instruction="Find the clip.")
    # One conversation of one turn: a bare list of messages would be a single conversation.
    ((task, ([message],), options),) = asked(Chat("text", "image", "message"), composed)
    assert (task, options) == ("query", {"prompt": "Find the clip."})
    kinds = [content["type"] for content in message["content"]]
    assert (message["role"], kinds) == ("user", ["image"] * 8 + ["text"])
    np.testing.assert_array_equal(np.asarray(message["content"][3]["image"]), frames.pixels[3])
    assert message["content"][-1]["text"] == "left"
    # A query prompt of the model's own goes before the instruction.
    ((task, _, options),) = asked(Chat("text", "image", "message", prompts={"query": "Q: "}), composed)
    assert (task, options) == ("query", {})


def test_clips_keep_their_times_where_the_model_reads_clips() -> None:
    frames = clip(0)
    ((task, (single,), options),) = asked(Chat("text", "image", "video", "message"), Item((Video(frames),)))
    assert (task, options) == ("document", {"processing_kwargs": {"video": {"do_sample_frames": False}}})
    np.testing.assert_array_equal(single["video"]["array"], frames.pixels)
    assert single["video"]["video_metadata"] == {
        "fps": 4.0,
        "total_num_frames": 8,
        "duration": 2.0,
        "frames_indices": list(range(8)),
    }


def test_matches_and_dispatch(folders: dict[str, str], sentence_clip: tuple[str, Any]) -> None:
    from gve.encode.sentence import SentenceEncoder

    for folder, kind in ((folders["clip"], ClipEncoder), (folders["siglip"], ClipEncoder)):
        config = json.loads((Path(folder) / "config.json").read_text())
        assert kind.matches(config, Path(folder))
        assert not SentenceEncoder.matches(config, Path(folder))
        assert isinstance(load_encoder(folder), kind)
    assert not ClipEncoder.matches({"model_type": "qwen2_5_vl"}, None)
    assert isinstance(load_encoder(sentence_clip[0]), SentenceEncoder)
    assert (
        str(load_encoder(folders["clip"], inputs={"sampling": Sampling.uniform(4)}).inputs["sampling"]) == "uniform(4)"
    )


def test_models_that_need_their_own_code_are_refused(tmp_path: Path) -> None:
    """InternVideo2 and its like: nothing of the repository is run, and the message says why it cannot be opened."""
    config = {"model_type": "internvideo2", "auto_map": {"AutoModel": "modeling_internvideo2.InternVideo2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_internvideo2.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(InputError, match="needs code of its own repository, which is never run here"):
        load_encoder(str(tmp_path))
    with pytest.raises(InputError, match="'internvideo2' is no dual encoder that runs here"):
        load_encoder(str(tmp_path), adapter="clip")
