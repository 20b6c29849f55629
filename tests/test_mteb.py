"""Our encoders under the installed MTEB: its own protocol, its own tasks and evaluator, its files read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tiny_clip import SENTENCES, clip, write_dual_encoder, write_video

pytest.importorskip("mteb", reason="needs the extra mteb")

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol
from mteb.types import PromptType

from gve.cli import main
from gve.encode.clip import ClipEncoder
from gve.encode.encoder import Encoded
from gve.encode.topk import rank_counts
from gve.eval.mteb_bridge import GveMtebEncoder
from gve.eval.mteb_results import read_mteb_results
from gve.eval.retrieval import recall_at_k
from gve.items import Image, InputError, Item, Text, Video
from gve.video import Sampling, decode

COUNT = 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    folder = write_dual_encoder(tmp_path_factory.mktemp("clip"), "clip")
    return ClipEncoder.from_pretrained(folder, sampling=Sampling.uniform(4))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{seed}.mp4", seed) for seed in range(COUNT)]


def queries() -> list[str]:
    words = " ".join(SENTENCES).split()
    return [" ".join(np.random.default_rng(seed).permutation(words)[:6]) for seed in range(COUNT)]


def task(kind: str, corpus: datasets.Dataset, prompt: Any = None, instruction: bool = False) -> AbsTaskRetrieval:
    """A task of twelve queries, each answered by the document of its number, held in memory."""
    letters = {"text": "t", "image": "i", "video": "v"}

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Tiny{kind.capitalize()}",
            type="Retrieval" if kind == "text" else "Any2AnyRetrieval",
            category=f"t2{letters[kind]}",
            modalities=["text"] if kind == "text" else ["text", kind],
            description="made in a test",
            reference=None,
            dataset={"path": "none", "revision": "none"},
            prompt=prompt,
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs: Any) -> None:
            asked = {"id": [f"q{row}" for row in range(COUNT)], "text": queries()}
            if instruction:
                asked["instruction"] = [f"Find number {row}." for row in range(COUNT)]
            relevant = {f"q{row}": {f"d{row:02}": 1} for row in range(COUNT)}
            split = RetrievalSplitData(
                queries=datasets.Dataset.from_dict(asked), corpus=corpus, relevant_docs=relevant, top_ranked=None
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Tiny()


def documents(kind: str, values: list[Any]) -> datasets.Dataset:
    made = datasets.Dataset.from_dict({"id": [f"d{row:02}" for row in range(COUNT)], kind: values})
    if kind == "text":
        return made
    return made.cast_column(kind, datasets.Image() if kind == "image" else datasets.Video())


def evaluate(encoder: Any, tested: AbsTaskRetrieval) -> dict[str, float]:
    model = GveMtebEncoder(encoder, "gve/tiny")
    result = mteb.evaluate(
        model, tested, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs={"batch_size": 5}
    )
    return result.task_results[0].scores["test"][0]


def own_scores(encoder: ClipEncoder, corpus: list[Item], instruction: str = "") -> dict[str, float]:
    """Recall and nDCG from the project's own positions; one positive a query: nDCG is 1 / log2(1 + position)."""
    asked = encoder.encode([Item.of(text, instruction=instruction) for text in queries()]).vectors
    counts = rank_counts(asked, encoder.encode(corpus).vectors, [[row] for row in range(COUNT)])
    assert (counts.tied == 1).all()
    position = counts.greater + 1
    gain = np.where(position <= 10, 1 / np.log2(1 + position), 0.0)
    return {"recall_at_1": recall_at_k(counts, 1).mean(), "recall_at_5": recall_at_k(counts, 5).mean(),
            "ndcg_at_10": gain.mean()}  # fmt: skip


def pictures() -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(clip(seed).pixels[0]) for seed in range(COUNT)]


@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_mteb_scores_are_our_own_ranks(encoder: ClipEncoder, videos: list[Path], kind: str) -> None:
    """A whole task through mteb.evaluate: videos from files without torchcodec, images, texts."""
    values: list[Any] = {
        "text": [f"{text} again" for text in queries()],
        "image": pictures(),
        "video": [{"bytes": path.read_bytes(), "path": None} for path in videos],
    }[kind]
    made = {
        "text": lambda: [Item.of(value) for value in values],
        "image": lambda: [Item((Image(np.asarray(value)),)) for value in values],
        "video": lambda: [Item.of(video=path) for path in videos],
    }[kind]
    scores = evaluate(encoder, task(kind, documents(kind, values)))
    own = own_scores(encoder, made())
    for name, value in own.items():
        assert scores[name] == pytest.approx(value, abs=1e-5), name
    # Negative control: the comparison sees one document in another's place.
    swapped = made()
    assert own_scores(encoder, [*swapped[1:], swapped[0]]) != pytest.approx(own, abs=1e-5)


def test_protocol_and_meta(encoder: ClipEncoder) -> None:
    model = GveMtebEncoder(encoder, "gve/tiny")
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.similarity_fn_name.value) == ("gve/tiny", 16, "cosine")
    # Results are filed under the revision: other frames or instructions must not meet in MTEB's cache.
    other = ClipEncoder(encoder.model, encoder.tokenizer, encoder.images, sampling=Sampling.uniform(6))
    revisions = {
        made.mteb_model_meta.revision
        for made in (model, GveMtebEncoder(other, "gve/tiny"), GveMtebEncoder(encoder, "gve/tiny", {"A": "Find it."}))
    }
    assert len(revisions) == 3
    with pytest.raises(InputError, match="organisation/model"):
        GveMtebEncoder(encoder, "tiny")


def test_similarity_is_the_cosine(encoder: ClipEncoder) -> None:
    model = GveMtebEncoder(encoder, "gve/tiny")
    rows = np.random.default_rng(0).normal(size=(3, 16))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(model.similarity(rows, torch.from_numpy(rows)).numpy(), unit @ unit.T, atol=1e-6)
    np.testing.assert_allclose(model.similarity(rows[0], rows).numpy(), (unit @ unit.T)[:1], atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(rows, rows[::-1].copy())[1].item(), 1.0, atol=1e-6)


class Keeping:
    """Keeps the items it is given; vectors without meaning."""

    dim, fingerprint = 4, "f" * 64

    def __init__(self) -> None:
        self.items: list[Item] = []

    def encode(self, items: Any, *, transform: Any = None, progress: str = "") -> Encoded:
        self.items += items
        return Encoded(np.random.default_rng(len(items)).normal(size=(len(items), 4)).astype(np.float32))


@pytest.mark.parametrize(
    ("prompt", "instructions", "own", "expected"),
    [
        (None, None, False, lambda row: ""),
        ({"query": "Find the text."}, None, False, lambda row: "Find the text."),
        ({"query": "Find the text."}, {"TinyText": "Find it."}, False, lambda row: "Find it."),
        ({"query": "Find the text."}, None, True, lambda row: f"Find number {row}."),
    ],
)
def test_queries_read_the_nearest_instruction_and_documents_none(
    prompt: Any, instructions: Any, own: bool, expected: Any
) -> None:
    keeping = Keeping()
    tested = task("text", documents("text", [f"{text} again" for text in queries()]), prompt, own)
    model = GveMtebEncoder(keeping, "gve/keeping", instructions)
    mteb.evaluate(model, tested, cache=None, co2_tracker=False, show_progress_bar=False)
    asked = {item.text: item for item in keeping.items if not item.text.endswith("again")}
    assert [asked[text].instruction for text in queries()] == [expected(row) for row in range(COUNT)]
    answered = [item for item in keeping.items if item.text.endswith("again")]
    assert len(answered) == COUNT
    assert {item.instruction for item in answered} == {""}


class Decoder:
    """What torchcodec's VideoDecoder offers of a file; the frames come from this project's decoder."""

    def __init__(self, path: Path) -> None:
        whole = decode(path, Sampling.uniform(24))
        self.frames, self.asked = whole, []
        self.metadata = SimpleNamespace(num_frames=24, average_fps=8.0, begin_stream_seconds=1.5)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        self.asked += indices
        data = torch.from_numpy(self.frames.pixels[indices]).permute(0, 3, 1, 2)
        return SimpleNamespace(data=data, pts_seconds=torch.from_numpy(self.frames.times_s[indices] + 1.5))


def batch(encoder: Any, rows: dict[str, list[Any]], prompt_type: PromptType | None = None) -> np.ndarray:
    class Loader:
        dataset = SimpleNamespace(features={})

        def __iter__(self) -> Any:
            return iter([rows])

    meta = SimpleNamespace(name="Direct", prompt={"query": "Find the clip."})
    return GveMtebEncoder(encoder, "gve/tiny").encode(Loader(), task_metadata=meta, prompt_type=prompt_type)


def test_decoders_and_frames_of_a_batch(encoder: ClipEncoder, videos: list[Path]) -> None:
    """Protocol calls with what MTEB's collators may hand over: lazy decoders, or frames that they picked."""
    decoder = Decoder(videos[0])
    expected = encoder.encode([Item.of(video=videos[0])]).vectors
    np.testing.assert_allclose(batch(encoder, {"video": [decoder]}), expected, atol=1e-6)
    assert decoder.asked == [0, 8, 15, 23]  # linspace(0, 23, 4), rounded: the tail is not lost
    picked = torch.from_numpy(decoder.frames.pixels[decoder.asked]).permute(0, 3, 1, 2)
    np.testing.assert_allclose(batch(encoder, {"video": [picked]}), expected, atol=1e-6)
    # Negative control: an integer stride, as MTEB's collator used to take, shows.
    strided = torch.from_numpy(decoder.frames.pixels[:24:5]).permute(0, 3, 1, 2)
    assert np.abs(batch(encoder, {"video": [strided]}) - expected).max() > 1e-3


def test_true_times_reach_the_encoder(videos: list[Path]) -> None:
    keeping = Keeping()
    picture = PIL.Image.fromarray(clip(1).pixels[0]).convert("L")
    batch(keeping, {"id": ["a"], "text": ["left"], "image": [picture], "video": [Decoder(videos[0])]}, PromptType.query)
    (item,) = keeping.items
    assert [type(part) for part in item.parts] == [Image, Video, Text]
    assert (item.instruction, item.text, item.id) == ("Find the clip.", "left", "a")
    frames = item.media[1].source
    np.testing.assert_allclose(frames.times_s, np.linspace(0, 23, 8).round() / 8, atol=1e-6)
    assert (frames.num_frames, frames.native_fps, len(frames.pixels)) == (24, 8.0, 8)
    assert item.media[0].source.shape == (40, 50, 3)


def test_unreadable_videos_stop_the_task(encoder: ClipEncoder, videos: list[Path]) -> None:
    torn = {"bytes": videos[1].read_bytes()[:200], "path": None}
    values = [torn, *({"bytes": path.read_bytes(), "path": None} for path in videos[1:])]
    with pytest.raises(RuntimeError, match=r"1 of 12 items cannot be read, for example d00: .*"):
        evaluate(encoder, task("video", documents("video", values)))


def write_results(folder: Path, encoder: ClipEncoder) -> tuple[Path, dict[str, float]]:
    """The file that MTEB itself writes, in its own folders."""
    tested = task("text", documents("text", [f"{text} again" for text in queries()]))
    cache = mteb.ResultCache(cache_path=folder)
    model = GveMtebEncoder(encoder, "gve/tiny")
    result = mteb.evaluate(model, tested, cache=cache, co2_tracker=False, show_progress_bar=False)
    return next(folder.rglob("TinyText.json")), result.task_results[0].scores["test"][0]


def test_results_of_mteb_are_read_back(tmp_path: Path, encoder: ClipEncoder) -> None:
    file, scores = write_results(tmp_path / "mteb", encoder)
    (row,) = read_mteb_results([file])
    assert (row.model, row.task, row.split, row.subset) == ("gve/tiny", "TinyText", "test", "default")
    assert row.revision == GveMtebEncoder(encoder, "gve/tiny").mteb_model_meta.revision
    assert (row.main_score, row.ndcg_at_10, row.recall_at_1) == (
        scores["main_score"],
        scores["ndcg_at_10"],
        scores["recall_at_1"],
    )
    assert (row.num_queries, row.mteb_version) == (None, mteb.__version__)
    assert read_mteb_results([tmp_path / "mteb"]) == [row]
    # A task that mteb ships statistics of: the number of its queries is found.
    known = json.loads(file.read_text()) | {"task_name": "SciFact"}
    (tmp_path / "SciFact.json").write_text(json.dumps(known))
    (row,) = read_mteb_results([tmp_path / "SciFact.json"])
    assert (row.num_queries, row.model) == (300, "")  # SciFact's published test split has 300 queries


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("{", "is not a result of MTEB"), ('{"scores": {}}', "is not a result of MTEB")],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_mteb_results([path])


def gve(*words: Any) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_import_command(tmp_path: Path, encoder: ClipEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    file, scores = write_results(tmp_path / "mteb", encoder)
    capsys.readouterr()
    assert gve("uvrb", "import-mteb", file, "--json", "--out", tmp_path / "rows.json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["task"], row["main_score"]) == ("TinyText", scores["main_score"])
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert gve("uvrb", "import-mteb", file) == 0
    table = capsys.readouterr().out
    assert "TinyText" in table
    assert f"{scores['main_score']:.4f}" in table
    assert gve("uvrb", "import-mteb", tmp_path / "no.json") == 2
    error = capsys.readouterr().err
    assert "does not exist" in error
    assert len(error.strip().splitlines()) == 1
