"""gve export and the import of weights: every form gives the checkpoint's vectors, or is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from gve.cli import main
from gve.encode.pretrained import load_encoder
from gve.export import parity
from gve.export import weights as weights_module
from gve.export.card import CardOptions, front_matter
from gve.export.weights import hub_config, write_weights
from gve.inputs import InputPolicy
from gve.items import InputError, Item
from gve.model.adapters import WEIGHTS, merged_weights, read_peft, to_peft
from gve.model.backbone import Backbone, Lora
from gve.toy.base import EMBEDDED
from gve.video import Sampling
from tiny import write_tiny_base

BASE = str(EMBEDDED)
POLICY = InputPolicy(
    sampling=Sampling.uniform(8), max_frame_tokens=12, max_image_tokens=12, max_length=300, system_prompt='Say "yes".\\'
)


def trained(base: str, lora: Lora, seed: int = 0) -> Backbone:
    """A base with adapters that do something: B is random, not zero."""
    torch.manual_seed(seed)
    backbone = Backbone.from_pretrained(base, lora=lora).eval()
    for name, value in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    return backbone


def write_checkpoint(path: Path, policy: InputPolicy = POLICY, seed: int = 0) -> Path:
    """As `gve fit` leaves it, with the parts that are read."""
    lora = Lora(rank=4, alpha=8)
    backbone = trained(BASE, lora, seed)
    state = {f"backbone.{name}": value for name, value in backbone.trainable_state().items()}
    record = {
        "version": "0.1.0",
        "base": BASE,
        "base_hash": backbone.base_hash,
        "inputs": policy.to_dict(),
        "lora": {**asdict(lora), "targets": sorted(lora.targets)},
    }
    plan = {"cursors": {"toy_b": 1, "toy_a": 2}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "gve": record, "global_step": 7, "PyramidDataModule": plan}, path)
    return path


def gve(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b.astype(np.float64)).sum(-1).max() / 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def items(checkpoint: Path) -> dict[str, Item]:
    return parity.probes(load_encoder(str(checkpoint)).builder)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def reference(checkpoint: Path, items: dict[str, Item]) -> np.ndarray:
    return load_encoder(str(checkpoint)).encode(list(items.values())).vectors


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert gve("export", checkpoint, out, "--dtype", "float32", "--dataset", "a/b") == 0
    return out


# ------------------------------------------------------------------------------------------------------------- weights


def test_adapters_are_merged_in_float32(tmp_path: Path) -> None:
    """W + (alpha / r) B A, by numpy in float64; merged in bfloat16 a good part of the change is lost."""
    base = write_tiny_base(tmp_path / "base")
    backbone = trained(base, Lora(rank=4, alpha=8))
    plain = dict(Backbone.from_pretrained(base, lora=None).model.named_parameters())
    merged = dict(merged_weights(backbone.model))
    assert set(merged) == set(plain)
    state = backbone.trainable_state()
    adapted = {name.split(".lora_")[0].removeprefix("model.") + ".weight" for name in state}
    assert len(adapted) == 6 * 2
    for name, own in plain.items():
        if name not in adapted:
            assert torch.equal(merged[name], own), name
            continue
        a, b = (state[f"model.{name.removesuffix('.weight')}.lora_{half}.default.weight"].double() for half in "AB")
        change = 2 * (b @ a)
        assert (merged[name].double() - own.double() - change).norm() < 1e-6 * change.norm()
        small = change / 16  # the size of what a short training changes
        rounded = (own.bfloat16() + small.bfloat16()).double() - own.bfloat16().double()
        assert (rounded - small).norm() > 0.05 * small.norm()


@pytest.mark.parametrize("limit", [1 << 30, 20_000])
def test_weights_have_the_names_of_the_released_ones(tmp_path: Path, limit: int) -> None:
    """Of an untied model the LM head is copied; several files with an index read as one does."""
    base = write_tiny_base(tmp_path / "base")
    backbone, out = Backbone.from_pretrained(base, lora=None), tmp_path / "out"
    out.mkdir()
    digest = write_weights(backbone, base, torch.float32, out, limit)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 3) == (out / "model.safetensors.index.json").is_file() == (limit == 20_000)
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    expected = load_file(Path(base) / "model.safetensors")
    assert set(tensors) == set(expected)
    assert {"lm_head.weight", "model.norm.weight", "visual.merger.ln_q.weight"} < set(tensors)
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    (out / "config.json").write_text(json.dumps(hub_config(backbone.model.config, torch.float32)))
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    model, report = kind.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    assert digest != write_weights(Backbone.from_pretrained(base, lora=None), base, torch.bfloat16, out)
    with pytest.raises(InputError, match="neither the language model nor"):
        weights_module.hub_name("lm_head.weight")


def test_config_says_the_same_in_the_layout_of_both_versions(exported: Path) -> None:
    ours = transformers.AutoConfig.from_pretrained(exported)
    base = transformers.AutoConfig.from_pretrained(BASE)
    for part in ("text_config", "vision_config"):
        a, b = (getattr(config, part).to_dict() for config in (ours, base))
        for values in (a, b):
            # The first of them counts at the top level, for both halves.
            for name in ("tie_word_embeddings", "dtype", "_name_or_path", "pad_token_id", "architectures"):
                values.pop(name, None)
        if part == "text_config":
            assert a.pop("rope_parameters").items() >= b.pop("rope_parameters").items()
        assert a == b
    assert ours.tie_word_embeddings == base.tie_word_embeddings is True
    flat = json.loads((exported / "config.json").read_text())
    # What 4.52 reads; from the layout of 5.x it would take its defaults, 1e6 and no sections.
    rope = base.text_config.rope_parameters
    assert (flat["rope_theta"], flat["rope_scaling"]["mrope_section"]) == (rope["rope_theta"], rope["mrope_section"])
    assert flat["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


# -------------------------------------------------------------------------------------------------------------- parity


def test_every_form_gives_the_vectors_of_the_checkpoint(
    exported: Path, items: dict[str, Item], reference: np.ndarray
) -> None:
    report = json.loads((exported / "parity.json").read_text())["rows"]
    verdicts = {(row["form"], row["content"]): row["verdict"] for row in report}
    assert {verdicts["gve", kind] for kind in items} == {"ok"}
    # transformers 5 continues after a clip at another position: stated, and seen to be off by more than the limit.
    for kind in items:
        assert verdicts["transformers", kind] == ("stated" if "video" in kind else "ok"), kind
    stated = [row["difference"] for row in report if row["form"] == "transformers" and row["verdict"] == "stated"]
    assert len(stated) == 4
    assert min(stated) > 10 * parity.LIMIT
    assert all(row["verdict"] == "not run" for row in report if row["form"] == "sentence-transformers")
    # Anew, without the report's own code.
    again = load_encoder(str(exported))
    assert again.inputs == POLICY.to_dict()
    assert difference(again.encode(list(items.values())).vectors, reference) < 1e-9
    base = load_encoder(BASE, inputs=POLICY).encode(list(items.values())).vectors
    assert difference(base, reference) > 10 * parity.LIMIT  # the adapters do something
    assert (exported / "model.safetensors").stat().st_mode == (exported / "config.json").stat().st_mode


def test_a_form_that_is_off_stops_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted fault: the adapters are left out of one layer."""

    def without(backbone: Backbone, *rest: Any) -> str:
        with torch.no_grad():
            for name, value in backbone.named_parameters():
                if "layers.1" in name and "lora_B" in name:
                    value.zero_()
        return write_weights(backbone, *rest)

    monkeypatch.setattr("gve.export.export.write_weights", without)
    assert gve("export", checkpoint, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "OFF" in told.out
    assert "is above 1e-04" in told.err
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_only_an_export(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for words in ([], ["--force"]):
        assert gve("export", checkpoint, out, "--no-check", *words) == 2
    assert "choose another" in capsys.readouterr().err
    assert (out / "thesis.tex").is_file()
    shutil.rmtree(out)
    assert gve("export", checkpoint, out, "--no-check", "--adapter-only") == 0
    assert gve("export", checkpoint, out, "--no-check") == 2
    assert "--force" in capsys.readouterr().err
    assert gve("export", checkpoint, out, "--no-check", "--force") == 0
    assert (out / "config.json").is_file()
    assert not (out / "adapter_config.json").exists()
    assert "Not measured" in (out / "README.md").read_text()
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float16  # as the base's files
    assert gve("export", out, tmp_path / "again") == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert gve("export", tmp_path / "none.ckpt", tmp_path / "again") == 2


# ------------------------------------------------------------------------------------------------------ other engines


def test_tokenizer_and_template_give_the_prompt_of_the_policy(exported: Path, items: dict[str, Item]) -> None:
    builder = load_encoder(str(exported)).builder  # type: ignore[attr-defined]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.padding_side == "left"
    assert (
        tokenizer("a dog")["input_ids"][-1]
        == tokenizer.pad_token_id
        == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    )
    plain = transformers.AutoTokenizer.from_pretrained(BASE)
    assert plain("a dog")["input_ids"] == tokenizer("a dog")["input_ids"][:-1]
    for parts, item in (
        ([{"type": "text", "text": "it's <b>"}], Item.of("it's <b>")),
        # gve reads media first, wherever they stand.
        (
            [{"type": "text", "text": "a dog"}, {"type": "image"}],
            Item.of("a dog", image=items["image"].media[0].source),
        ),
        ([{"type": "image"}], items["image"]),
    ):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        holders = builder.geometry.tokens(builder.prepare(item).images[0].grid) if item.media else 0
        text = text.replace("<|image_pad|>", "<|image_pad|>" * holders)
        assert tokenizer(text)["input_ids"] == builder.prepare(item).ids.tolist()
    as_string = [{"role": "user", "content": "a dog"}]
    own = tokenizer.apply_chat_template(as_string, tokenize=False, add_generation_prompt=True)
    assert own.startswith('<|im_start|>system\nSay "yes".\\<|im_end|>\n<|im_start|>user\na dog<|im_end|>')


def test_without_append_eos_nothing_is_appended(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt", POLICY.replace(append_eos=False, target_text="What is shown?"))
    assert gve("export", path, tmp_path / "out", "--dtype", "float32") == 0  # the report ran: all forms agree
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a dog")["input_ids"][-1] != tokenizer.pad_token_id
    image = [{"role": "user", "content": [{"type": "image"}]}]
    assert "<|vision_end|>What is shown?<|im_end|>" in tokenizer.apply_chat_template(image, tokenize=False)


def test_vllm_finds_its_names_and_its_pooling(exported: Path) -> None:
    """By vLLM's own rules, written out from its sources: `hf_to_vllm_mapper` (models/qwen2_5_vl.py, first prefix that
    fits) and `get_pooling_config` (transformers_utils/config.py)."""
    prefixes = {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    }

    def mapped(name: str) -> str:
        for old, new in prefixes.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    names = {mapped(name) for name in load_file(exported / "model.safetensors")}
    stock = transformers.Qwen2_5_VLModel(transformers.AutoConfig.from_pretrained(exported))
    expected = {
        name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name
        for name, _ in stock.named_parameters()
    }
    assert names == expected
    modules = json.loads((exported / "modules.json").read_text())
    kinds = {module["type"]: module for module in modules}
    pooling = kinds["sentence_transformers.models.Pooling"]
    assert "sentence_transformers.models.Normalize" in kinds
    settings = json.loads((exported / pooling["path"] / "config.json").read_text())
    first = next(name for name, value in settings.items() if value is True)
    assert first.replace("pooling_mode_", "").split("_")[0] == "lasttoken"
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    # The classes that sentence-transformers takes for these names are its own: no code of a folder is run.
    from sentence_transformers.util.misc import import_module_class

    for name in kinds:
        assert import_module_class(name, str(exported)).__module__.startswith("sentence_transformers.")


def test_card(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    _, head, body = (exported / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "sentence-similarity"
    assert values["datasets"] == ["a/b"]
    assert values["license_name"] == "as-the-base-model"
    assert "`toy_a`, `toy_b`" in body
    assert "None recorded" in body
    assert (exported / "parity.md").read_text().strip() in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    record = json.loads((exported / "gve.json").read_text())
    for value in (record["weights"], record["base_hash"], record["inputs_digest"], record["files"]):
        assert value in body
    # Of another base: its licence and its link.
    hub = yaml.safe_load(front_matter("Qwen/Qwen2.5-VL-7B-Instruct", CardOptions()))
    assert (hub["license"], hub["base_model"]) == ("apache-2.0", ["Qwen/Qwen2.5-VL-7B-Instruct"])
    # Results beside the checkpoint: shown if they are of these weights.
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run / "checkpoints")
    row = {
        "metric": "recall_at_1",
        "n_query": 10,
        "n_corpus": 20,
        "value": 0.25,
        "interval": [0.1, 0.5],
        "complete": True,
    }
    data = {
        "weights": record["weights"],
        "protocol": {"hash": "abc", "inputs": POLICY.to_dict()},
        "sets": {"MSRVTT": row},
        "abilities": {"CG": 0.25, "TXT": None},
        "ability_intervals": {"CG": [0.1, 0.5], "TXT": None},
    }
    for weights, shown in ((record["weights"], True), ("0" * 64, False)):
        (run / "uvrb.json").write_text(json.dumps({**data, "weights": weights}))
        assert gve("export", run / "checkpoints" / "best.ckpt", tmp_path / "out", "--no-check", "--force") == 0
        text = (tmp_path / "out" / "README.md").read_text()
        assert ("| MSRVTT | recall_at_1 | 10 | 20 | 0.250 | 0.100 to 0.500 |" in text) == shown
        assert ("stand-ins or parts" in text) == shown  # 10 queries are not the benchmark's 1,000


# -------------------------------------------------------------------------------------------------------------- import


def test_released_weights_under_every_name_they_had(
    exported: Path, reference: np.ndarray, items: dict[str, Item], tmp_path: Path
) -> None:
    """`visual.*` and `model.*` to 4.51, `model.visual.*` and `model.language_model.*` since; with a head or without."""
    tensors = load_file(exported / "model.safetensors")
    newer = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): value
        for name, value in tensors.items()
    }
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    for number, named in enumerate((newer, {**tensors, **head})):
        folder = tmp_path / str(number)
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.safetensors", "gve.json", "modules.json"))
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        vectors = load_encoder(str(folder), inputs=POLICY).encode(list(items.values())).vectors
        assert difference(vectors, reference) < 1e-9
        assert load_encoder(str(folder)).inputs == InputPolicy().to_dict()  # no record: as released
    lacking = {name: value for name, value in newer.items() if not name.endswith("layers.1.mlp.up_proj.weight")}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"):
        load_encoder(str(folder))
    save_file({**newer, "model.extra.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights that are not used.*extra"):
        load_encoder(str(folder))


def test_adapters_in_the_format_of_peft(
    checkpoint: Path, items: dict[str, Item], reference: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert gve("export", checkpoint, out, "--adapter-only") == 0
    capsys.readouterr()
    loaded = load_encoder(str(out))
    assert difference(loaded.encode(list(items.values())).vectors, reference) < 1e-9
    assert loaded.inputs == POLICY.to_dict()
    # PEFT itself, on the stock class: its merged weights are those of our merge.
    import peft

    stock = transformers.AutoModel.from_pretrained(BASE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(stock, out).merge_and_unload()
    ours = dict(merged_weights(loaded.backbone.model))  # type: ignore[attr-defined]
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(value, ours[name], atol=1e-6, rtol=0)
    # The same adapter under the names of other classes and versions.
    tensors, settings = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    prefix = "base_model.model.language_model."
    assert all(name.startswith(prefix) for name in tensors)
    for other in ("base_model.model.model.language_model.", "base_model.model.model.", "language_model.model."):
        save_file(
            {name.replace(prefix, other): value for name, value in tensors.items()}, out / "adapter_model.safetensors"
        )
        assert difference(load_encoder(str(out)).encode([items["text"]]).vectors, reference[:1]) < 1e-9, other
    some = next(name for name in tensors if "layers.1" in name)
    for change, message in (
        ({name: value for name, value in tensors.items() if name != some}, "1 missing"),
        (
            {**tensors, "base_model.model.visual.blocks.0.mlp.up_proj.lora_A.weight": torch.ones(4, 8)},
            "visual.blocks.0",
        ),
    ):
        save_file(change, out / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            load_encoder(str(out))
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    with pytest.raises(InputError, match=r"use_rslora.*merge it with peft"):
        load_encoder(str(out))
    (out / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base"):
        load_encoder(str(out))
    (out / "adapter_config.json").write_text(json.dumps(settings))
    record = json.loads((out / "gve.json").read_text())
    (out / "gve.json").write_text(json.dumps({**record, "base_hash": "0" * 64}))
    with pytest.raises(InputError, match="is another"):
        load_encoder(str(out))
    # A foreign adapter names no policy, and merges into a folder of its own.
    (out / "gve.json").unlink()
    assert gve("export", out, tmp_path / "merged", "--no-check", "--dtype", "float32") == 0
    vectors = load_encoder(str(tmp_path / "merged"), inputs=POLICY).encode(list(items.values())).vectors
    assert difference(vectors, reference) < 1e-9


def test_adapters_on_the_tower_are_merged_and_read_too(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    backbone = trained(base, Lora(rank=2, targets=("q_proj", "v_proj"), tower=True))
    settings, tensors = to_peft(backbone.lora or Lora(), backbone.trainable_state(), base)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    lora, state, named = read_peft(tmp_path)
    again = Backbone.from_pretrained(named, lora=lora)
    again.load_trainable_state(state)
    import peft

    stock = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    theirs = dict(peft.PeftModel.from_pretrained(stock, tmp_path).merge_and_unload().named_parameters())
    for name, value in merged_weights(again.model):
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)
    assert {name.split(".")[0] for name in tensors} == {"base_model"}
    tower = [name for name in tensors if "visual" in name]
    assert len(tower) == 2 * 5 * 2  # two blocks of five layers, A and B each
    save_file({**tensors, "base_model.model.visual.merger.mlp.0.lora_A.weight": torch.ones(2, 8)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="merger"):
        read_peft(tmp_path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_foreign_pickle_is_refused_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, save in enumerate((lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save)):
        path, mark = tmp_path / f"{number}.ckpt", tmp_path / f"mark{number}"
        save({"state_dict": Bomb(mark), "gve": {}}, path)
        assert gve("export", path, tmp_path / "out") == 2
        assert not mark.exists()
        assert "plain tensors" in capsys.readouterr().err
