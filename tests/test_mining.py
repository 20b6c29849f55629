"""Hard negatives: against brute force, one hand-made case for each rule, in training, over ranks and after a resume."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch import multiprocessing

from gve.callbacks import HardNegativeMining
from gve.data.curriculum import Curriculum
from gve.data.datamodule import PyramidDataModule
from gve.data.manifest import Presample
from gve.data.negatives import MinedNegatives, digest_of, read_header
from gve.data.plan import hold_out
from gve.data.shards import QUERY, TARGET, ShardWriter
from gve.data.sources import Source, open_sources
from gve.encode.encoder import Encoded, Transform
from gve.encode.store import EmbeddingStore
from gve.inputs import InputPolicy
from gve.items import Frames, InputError, Item, Pair, TrainBatch, Video
from gve.mining import Mined, MiningOptions, choose, mine
from gve.mining_cli import main, parse_counts
from gve.model.backbone import Lora
from gve.model.embedder import Optimizer, VideoEmbedder
from gve.video import Sampling

UNFILTERED = MiningOptions(max_share=0)


class Words:
    """A prober whose vectors are written in the items: "name|x,y" is (x, y), of unit length; others by their bytes."""

    dim = 2
    fingerprint = "w" * 64

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        self.asked += [item.text for item in items]
        vectors = np.zeros((len(items), 2), np.float32)
        for row, item in enumerate(items):
            _, _, numbers = item.text.partition("|")
            if numbers:
                vectors[row] = [float(number) for number in numbers.split(",")]
            else:
                angle = int(item.content_hash()[:8], 16) / 2**32 * 2 * np.pi
                vectors[row] = (np.cos(angle), np.sin(angle))
        return Encoded(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def write(root: Path, source: str, pairs: Sequence[tuple[str, str]], **settings: Any) -> None:
    with ShardWriter(root, task="T2T", source=source, samples_per_shard=7, **settings) as writer:
        for query, target in pairs:
            writer.write(Pair(Item.of(query), Item.of(target)))


def found(mined: Mined, sources: dict[str, Source], name: str) -> list[list[str]]:
    """The texts of the negatives of every row, nearest first, as training would read them."""
    reader = MinedNegatives()
    reader.use(mined.path, sources, mined.digest)
    return [
        [own.read(other).target.text.partition("|")[0] for own, other in reader(name, row)]
        for row in range(len(sources[name]))
    ]


def mine_texts(root: Path, counts: dict[str, int], options: MiningOptions, **settings: Any) -> list[list[str]]:
    sources = open_sources(root)
    mined = mine(sources, Words(), root / "negatives.safetensors", counts, options, **settings)
    return found(mined, sources, next(iter(counts)))


# ------------------------------------------------------------------------------------------------- against brute force


@pytest.mark.parametrize("options", [UNFILTERED, MiningOptions(top_k=6, skip_first=2, max_share=0.9, margin=0.05)])
def test_choice_equals_brute_force(options: MiningOptions, tmp_path: Path) -> None:
    """40 random pairs, among them 3 equal queries, 4 equal targets and a target that is a query: sorted by hand."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(80, 2))
    texts = [f"{i}|{x:.4f},{y:.4f}" for i, (x, y) in enumerate(vectors)]
    pairs = list(zip(texts[:40], texts[40:], strict=True))
    for other in (3, 9, 11):
        pairs[other] = (pairs[0][0], pairs[other][1])
    for other in (5, 6, 21, 30):
        pairs[other] = (pairs[other][0], pairs[1][1])
    pairs[17] = (pairs[17][0], pairs[18][0])
    write(tmp_path, "talk", pairs)

    def vector(text: str) -> np.ndarray:
        numbers = np.array([float(number) for number in text.partition("|")[2].split(",")])
        return numbers / np.linalg.norm(numbers)

    expected = []
    for query, target in pairs:
        right = {query, target}
        right |= {b for a, b in pairs if a == query} | {a for a, b in pairs if b == query}
        positive = float(vector(query) @ vector(target))
        nearest = sorted({b for _, b in pairs} - right, key=lambda text: -float(vector(query) @ vector(text)))
        kept = []
        for text in nearest[options.skip_first : options.skip_first + options.top_k]:
            score = float(vector(query) @ vector(text))
            share = positive - (1 - options.max_share) * abs(positive)
            if options.max_share and score > share:
                continue
            if options.margin is not None and score > positive - options.margin:
                continue
            kept.append(text.partition("|")[0])
        expected.append(kept[:5])
    answer = mine_texts(tmp_path, {"talk": 5}, options)
    assert answer == expected
    assert any(len(row) < 5 for row in expected) == (options != UNFILTERED)
    # Negative control: without the filter the same comparison fails.
    if options != UNFILTERED:
        assert mine_texts(tmp_path, {"talk": 5}, UNFILTERED) != expected


# ---------------------------------------------------------------------------------------------------- rule by rule


EAST = "1,0"


@pytest.mark.parametrize(
    ("rule", "pairs", "others", "expected"),
    [
        # Without a rule the nearest would stand first; what is left out is named after the rule.
        ("the positive", [("q|1,0", "positive|1,0"), ("x|0,1", "far|0,1")], [], ["far"]),
        ("equal content", [("q|1,0", "same|1,0"), ("x|0,1", "same|1,0"), ("y|0,1", "far|0,1")], [], ["far"]),
        ("the query itself", [("q|1,0", "p|1,0"), ("x|0,1", "q|1,0"), ("y|0,1", "far|0,1")], [], ["far"]),
        ("another positive", [("q|1,0", "p|1,0"), ("q|1,0", "too|1,0.1"), ("y|0,1", "far|0,1")], [], ["far"]),
        ("one of another source", [("q|1,0", "p|1,0"), ("x|0,1", "too|1,0.1"), ("y|0,1", "far|0,1")],
         [("q|1,0", "too|1,0.1")], ["far"]),
        ("the pair turned round", [("q|1,0", "p|1,0"), ("x|0,1", "too|1,0.1"), ("y|0,1", "far|0,1")],
         [("too|1,0.1", "q|1,0")], ["far"]),
        ("none of them", [("q|1,0", "p|1,0"), ("x|0,1", "near|1,0.1"), ("y|0,1", "far|0,1")],
         [("x|0,1", "near|1,0.1")], ["near", "far"]),
    ],
)  # fmt: skip
def test_each_exclusion(
    rule: str, pairs: list[tuple[str, str]], others: list[tuple[str, str]], expected: list[str], tmp_path: Path
) -> None:
    write(tmp_path, "talk", pairs)
    write(tmp_path, "other", others or [("a|1,1", "b|1,1")])
    assert mine_texts(tmp_path, {"talk": 2}, UNFILTERED)[0] == expected, rule


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Candidates score 0.99, 0.78 and 0.2, the positive 0.8.
        (MiningOptions(max_share=0), [0, 1]),
        (MiningOptions(max_share=0.95), [2, -1]),
        (MiningOptions(max_share=0.98), [1, 2]),
        (MiningOptions(max_share=0, margin=0.1), [2, -1]),
        (MiningOptions(max_share=0, margin=-0.3), [0, 1]),
        (MiningOptions(max_share=0, skip_first=1), [1, 2]),
        (MiningOptions(max_share=0.98, margin=0.7), [-1, -1]),
    ],
)
def test_positive_aware_filter(options: MiningOptions, expected: list[int]) -> None:
    candidates, scores = np.array([[0, 1, 2]]), np.array([[0.99, 0.78, 0.2]], np.float32)
    rows, best, counts = choose(candidates, scores, np.array([0.8], np.float32), 2, options)
    assert rows.tolist() == [expected]
    assert best.tolist() == [[scores[0, row] if row >= 0 else -np.inf for row in expected]]
    assert counts[0, 0] - counts[0, 1] >= sum(row >= 0 for row in expected)


def test_filter_of_a_negative_positive_and_of_the_unreadable() -> None:
    """Of a positive of -0.2 a share of 0.9 is -0.22, not -0.18; without a positive nothing is mined."""
    scores = np.array([[-0.19, -0.21, -0.23]] * 2, np.float32)
    rows, _, counts = choose(
        np.array([[0, 1, 2]] * 2), scores, np.array([-0.2, np.nan], np.float32), 3, MiningOptions(max_share=0.9)
    )
    assert rows.tolist() == [[2, -1, -1], [-1, -1, -1]]
    assert counts.tolist() == [[3, 2], [0, 0]]


def test_held_out_rows_are_no_candidates(tmp_path: Path) -> None:
    pairs = [("q|1,0", "p|1,0"), ("x|0,1", "dev|1,0.1"), ("y|0,1", "far|0,1"), ("z|0,1", "twin|1,0.2")]
    write(tmp_path, "talk", [*pairs, ("v|0,1", "twin|1,0.2")])
    answer = mine_texts(tmp_path, {"talk": 3}, UNFILTERED, held_out={"talk": np.array([1, 3])})
    assert answer[0] == ["twin", "far"], "a copy of a held-out target that is trained on stays"


def test_the_corpus_of_a_task_and_of_another_folder(tmp_path: Path) -> None:
    write(tmp_path / "a", "talk", [("q|1,0", "p|1,0"), ("x|0,1", "far|0,1")])
    write(tmp_path / "a", "chat", [("y|0,1", "near|1,0.1")])
    write(tmp_path / "b", "news", [("y|0,1", "outside|1,0.2"), ("w|0,1", "p|1,0"), ("v|1,1", "q|1,0")])
    assert mine_texts(tmp_path / "a", {"talk": 2}, UNFILTERED)[0] == ["far"]
    assert mine_texts(tmp_path / "a", {"talk": 2}, replace(UNFILTERED, corpus="task"))[0] == ["near", "far"]
    outside = replace(UNFILTERED, corpus=str(tmp_path / "b"))
    assert mine_texts(tmp_path / "a", {"talk": 2}, outside)[0] == ["outside"], "the positive and the query are known"


# ------------------------------------------------------------------------------------------------------ file and store


def test_the_file_belongs_to_its_shards(tmp_path: Path) -> None:
    pairs = [(f"query {i}", f"answer {i}") for i in range(20)]
    write(tmp_path / "a", "talk", pairs)
    sources = open_sources(tmp_path / "a")
    out = tmp_path / "negatives.safetensors"
    mined = mine(sources, Words(), out, {"talk": 3}, UNFILTERED)
    assert json.loads(out.with_name("negatives.safetensors.json").read_text())["digest"] == mined.digest
    assert read_header(out).parameters["per_pair"] == {"talk": 3}
    again = mine(sources, Words(), tmp_path / "again.safetensors", {"talk": 3}, UNFILTERED)
    assert again.digest == mined.digest
    write(tmp_path / "a", "more", [("a", "b")])
    MinedNegatives().use(out, open_sources(tmp_path / "a"))  # a source more changes no row of the others
    write(tmp_path / "b", "talk", [*pairs[:-1], ("query", "other")])
    with pytest.raises(InputError, match="belong to other shards"):
        MinedNegatives().use(out, open_sources(tmp_path / "b"))
    with pytest.raises(InputError, match="the run goes on with 0123"):
        MinedNegatives().use(out, sources, "0123")
    out.write_bytes(out.read_bytes()[:100])
    with pytest.raises(InputError, match="holds no mined negatives"):
        MinedNegatives().use(out, sources)
    with pytest.raises(InputError, match="cannot be read"):
        MinedNegatives().use(tmp_path / "absent", sources)


def test_interrupted_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "talk", [(f"query {i}", f"answer {i}") for i in range(30)])
    sources = open_sources(tmp_path)
    monkeypatch.setattr("gve.mining.ROWS_AT_ONCE", 8)

    class Killed(Words):
        def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
            if len(self.asked) >= 40:
                raise KeyboardInterrupt
            return super().encode(items)

    first, second = Killed(), Words()
    out = tmp_path / "negatives.safetensors"
    with pytest.raises(KeyboardInterrupt):
        mine(sources, first, out, {"talk": 1}, store=EmbeddingStore(tmp_path / "store", Words.fingerprint))
    assert not out.exists()
    mined = mine(sources, second, out, {"talk": 1}, store=EmbeddingStore(tmp_path / "store", Words.fingerprint))
    assert sorted(first.asked + second.asked) == sorted(
        f"{word} {i}" for i in range(30) for word in ("query", "answer")
    )
    assert mined.digest == mine(sources, Words(), tmp_path / "whole", {"talk": 1}).digest


def test_a_damaged_row_is_counted_and_never_a_negative(tmp_path: Path) -> None:
    write(tmp_path, "talk", [("q|1,0", "p|1,0"), ("x|0,1", "gone|1,0.1"), ("y|0,1", "far|0,1")])
    source = open_sources(tmp_path)["talk"]
    with open(tmp_path / source.record.shards[0].file, "r+b") as file:
        file.seek(int(source.index[1, 0]) + 512 + 5)
        file.write(b"\xff")
    mined = mine(open_sources(tmp_path), Words(), tmp_path / "out", {"talk": 2}, UNFILTERED)
    assert found(mined, open_sources(tmp_path), "talk")[0] == ["far"]
    assert mined.sources["talk"].unreadable == 1
    assert mined.sources["talk"].corpus == 2


def mine_on_rank(rank: int, port: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    options = MiningOptions(top_k=9)
    mined = mine(open_sources(root), Words(), root / "two.safetensors", {"talk": 3}, options)
    (root / f"{rank}.json").write_text(json.dumps([mined.digest, repr(mined.sources)]))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_ranks_mine_the_same_file(tmp_path: Path) -> None:
    write(tmp_path, "talk", [(f"query {i}", f"answer {i}") for i in range(31)])
    one = mine(open_sources(tmp_path), Words(), tmp_path / "one.safetensors", {"talk": 3}, MiningOptions(top_k=9))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(mine_on_rank, (port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [one.digest, repr(one.sources)]
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------- training


POLICY = InputPolicy(sampling=Sampling.uniform(2), max_length=400)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pre-sampled clips of 4 frames; every third pair has a negative of its own, clip + 100."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)

    def clip() -> Item:
        indices = np.array([0, 3, 6, 9])
        pixels = rng.integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
        return Item((Video(Frames(pixels, indices / 5.0, indices, 10, 5.0)),))

    with ShardWriter(root, task="T2V", source="clips", presample=Presample(Sampling.uniform(4))) as writer:
        for i in range(30):
            writer.write(Pair(Item.of(f"clip {i}"), clip(), (clip(),) if i % 3 == 0 else ()))
    return root


class Clips(Words):
    """A prober of clips: by content; asserts that it sees frames of the policy."""

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        for item in items:
            for medium in item.media:
                assert isinstance(medium.source, Frames)
                assert len(medium.source.indices) == 2
        return super().encode(items)


def batches(module: PyramidDataModule) -> list[TrainBatch]:
    module.setup()
    return list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_own_negatives_first_then_mined_ones(
    workers: int, clips: Path, toy_world: Path, tmp_path: Path
) -> None:
    sources = open_sources(clips)
    mined = mine(sources, Clips(), tmp_path / "file", {"clips": 2}, UNFILTERED, inputs=POLICY)
    settings = {"batch_size": 6, "steps_per_epoch": 4, "dev_pairs": 3, "num_workers": workers, "num_epochs": 1}
    module = PyramidDataModule(
        str(clips), str(toy_world / "base"), POLICY, negatives=2, negatives_file=str(mined.path), **settings
    )
    steps = batches(module)
    reader = MinedNegatives()
    reader.use(mined.path, sources)
    targets = [int(content) for content in np.asarray(sources["clips"].index[:, TARGET]).view(np.int64)]
    held_out = set(module.held_out["clips"].tolist())
    counts = set()
    for step in steps:
        assert step.negatives is not None
        order = module._plan._orders[0]  # type: ignore[union-attr]
        for i, (number, position) in enumerate(step.rows):
            ((_, _, row),) = order([number * order._source.size + position])
            own = [int(n.content_hash()[:16], 16) for n in sources["clips"].read(row).negatives]
            expected = [int(np.uint64(content).view(np.int64)) for content in own]
            expected += [targets[other] for _, other in reader("clips", row) if other not in held_out]
            index = step.negative_index[i]
            assert step.negatives.content_ids[index[index >= 0]].tolist() == expected[:2]
            counts.add((len(own), int((index >= 0).sum())))
        assert bool(step.negatives.valid.all())
    assert {(0, 2), (1, 2)} <= counts
    assert module.state_dict()["negatives"] == mined.digest


NAMES = ["toy_change_tv", "toy_paraphrase", "toy_picture", "toy_short"]
TINY = InputPolicy(sampling=Sampling.uniform(2), max_frame_tokens=4, max_image_tokens=4, max_length=200)


@pytest.fixture(scope="module")
def by_command(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gve mine` by the bare base on texts, pictures, clips and composed items of the toy world."""
    out = tmp_path_factory.mktemp("mined") / "negatives.safetensors"
    words = ["--shards", str(toy_world / "shards"), "--base", str(toy_world / "base"), "--out", str(out)]
    words += ["--frames", "uniform(2)", "--max-frame-tokens", "4", "--max-image-tokens", "4", "--source", *NAMES]
    words += ["--dev-pairs", "4", "--seed", "7", "--per-pair", "1", "--max-share", "0", "--max-length", "200", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0
    summary = json.loads(printed.getvalue())
    assert list(summary["sources"]) == NAMES
    assert all(row["enough"] == 1.0 and row["unreadable"] == 0 for row in summary["sources"].values())
    assert summary["digest"] == digest_of(out)
    return out


def test_the_command_keeps_dev_rows_out_and_its_vectors(by_command: Path, toy_world: Path) -> None:
    sources = open_sources(toy_world / "shards")
    reader = MinedNegatives()
    reader.use(by_command, sources)
    for name in NAMES:
        _, held_out = hold_out(np.asarray(sources[name].index[:, QUERY:]), 4, 7, name)
        used = {row for pair in range(len(sources[name])) for _, row in reader(name, pair)}
        assert len(held_out)
        assert not used & set(held_out.tolist())
    assert read_header(by_command).policy == TINY.digest()
    assert any(by_command.with_name(f"{by_command.name}.embeddings").rglob("*.safetensors"))


class Losses(L.Callback):
    """Keeps what was trained on; saves and stops like a kill: after a step, or around an epoch's end."""

    def __init__(self, step: int = 0, end: bool = False) -> None:
        self.step, self.end, self.seen = step, end, []

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, outputs: Any, batch: TrainBatch, index: int) -> None:
        used = 0 if batch.negatives is None else len(batch.negatives)
        self.seen.append((batch.epoch, batch.step, batch.source, used, float(outputs["loss"])))
        if not self.end:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        if self.end:
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stop.ckpt")
            raise InterruptedError


def fit(
    toy_world: Path, negatives: Path, folder: Path, losses: Losses, *, first: bool = False, path: Any = None
) -> Any:
    world = str(toy_world / "shards")
    names = [NAMES[0], NAMES[1]]
    scores = {name: float(name in names) for name in open_sources(world)}
    curriculum = Curriculum("fixed", unit="source", scores=scores)
    data = PyramidDataModule(
        world,
        str(toy_world / "base"),
        TINY,
        4,
        2,
        4,
        {"default": 2},
        7,
        0,
        curriculum,
        4,
        negatives_file=str(negatives),
    )
    seed_everything(7)
    model = VideoEmbedder(str(toy_world / "base"), TINY, Lora(rank=4), optimizer=Optimizer(lr=3e-3))
    mining = HardNegativeMining(1, names, UNFILTERED)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[losses, mining] if first else [mining, losses],
    )
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    return data.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_mined_again_between_epochs_and_resumed_exactly(by_command: Path, toy_world: Path, tmp_path: Path) -> None:
    """Killed before and after the mining at the end of epoch 0, and inside epoch 1: the losses are bit-equal."""
    whole = Losses()
    state = fit(toy_world, by_command, tmp_path / "whole", whole)
    assert [step[:2] for step in whole.seen] == [(epoch, step) for epoch in range(2) for step in range(4)]
    assert all(used >= 4 for *_, used, _ in whole.seen), "one mined negative for each pair at least"
    file = tmp_path / "whole/negatives/epoch_0001.safetensors"
    assert read_header(file).prober != read_header(by_command).prober, "the trained model mined, not the base"
    assert state["negatives"] == digest_of(file) != digest_of(by_command)
    for case, step, end, first in (("before", 4, True, True), ("after", 4, True, False), ("inside", 6, False, False)):
        folder = tmp_path / case
        stopped, resumed = Losses(step, end), Losses()
        with pytest.raises(InterruptedError):
            fit(toy_world, by_command, folder, stopped, first=first)
        assert (folder / "negatives").exists() == (case != "before")
        assert fit(toy_world, by_command, folder, resumed, path=folder / "stop.ckpt") == state
        assert stopped.seen + resumed.seen == whole.seen, case
    # Negative control: with the negatives of epoch 0 the losses of epoch 1 are others, and the state is refused.
    shutil.rmtree(folder / "negatives")
    with pytest.raises(InputError, match="other mined negatives"):
        fit(toy_world, by_command, folder, Losses(), path=folder / "stop.ckpt")


def test_counts_by_name_task_and_publication(tmp_path: Path) -> None:
    write(tmp_path, "msmarco", [("a", "b")])
    write(tmp_path, "talk", [("a", "b")])
    sources = open_sources(tmp_path)
    assert parse_counts(["3"], sources) == {"msmarco": 3, "talk": 3}
    assert parse_counts(["T2T=1", "talk=4"], sources) == {"msmarco": 1, "talk": 4}
    assert parse_counts(["published"], sources) == {"msmarco": 2, "talk": 0}, "published: 2 for MSMARCO"
    assert parse_counts(["published", "msmarco=5", "1"], sources) == {"msmarco": 5, "talk": 1}
    with pytest.raises(InputError, match="--per-pair x"):
        parse_counts(["x"], sources)
