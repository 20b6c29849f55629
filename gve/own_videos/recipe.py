"""How to tune on few pairs with the machine at hand: an overlay over a recipe of the project."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from gve.data.sources import open_sources
from gve.eval.results import write_whole
from gve.items import InputError

RECIPE = "recipe.yaml"
EPOCHS = 3
_TINY_HIDDEN = 512  # a model narrower than this is one of the toy world's kind
_GPU_BYTES = 20 << 30  # weights of 3B parameters in bfloat16 are 7 GiB; the rest is for clips and gradients


@dataclass(frozen=True)
class Recipe:
    """What `fit`, `index` and the evaluation are told.

    Args:
        config: recipe that is overlaid.
        model: base.
        tokens: most vision tokens of a frame.
        device: torch device of the evaluation.
    """

    config: str
    model: str
    tokens: int
    device: str


def choose(model: str, embedded: Path) -> Recipe:
    """The recipe for a base on this machine.

    Args:
        model: a Qwen2.5-VL folder or hub name; "auto": GVE-3B where a GPU can hold it, else the tiny base.
        embedded: folder of the tiny base.

    Raises:
        InputError: the model is of real size and there is no GPU that can train it.
    """
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    if model == "auto":
        model = "Alibaba-NLP/GVE-3B" if memory >= _GPU_BYTES else str(embedded)
    elif model == "toy":
        model = str(embedded)
    if _is_tiny(Path(model)):
        return Recipe("configs/quickstart.yaml", model, 9, "cpu")
    if memory < _GPU_BYTES:
        raise InputError(
            f"--model {model} needs a GPU of {_GPU_BYTES >> 30} GiB or more, there is "
            f"{f'one of {memory / 2**30:.0f} GiB' if memory else 'none'}; --model toy shows the path on a CPU"
        )
    return Recipe("configs/gve_3b.yaml", model, 200, "cuda:0")


def _is_tiny(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text())
        return int(config.get("text_config", config)["hidden_size"]) < _TINY_HIDDEN
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no config of a model: {error}") from None


def write_recipe(out: Path, shards: Path, recipe: Recipe, *, passes: int, seed: int) -> dict[str, int]:
    """Writes the overlay.

    Every source is drawn by its size, there is no curriculum to be learned from some pairs, and no checkpoint is
    chosen: the last one counts, after a number of passes that was fixed before.

    Args:
        out: folder that gets recipe.yaml.
        shards: training pairs.
        passes: over the pairs, in all epochs together.
        seed: of the run.

    Returns:
        pairs, batch and steps of an epoch.

    Raises:
        InputError: the shards cannot be read, or hold too little.
    """
    if passes < 1:
        raise InputError(f"--passes {passes} must be at least 1")
    sizes = {name: int(sum(source.shard_sizes)) for name, source in open_sources(str(shards)).items()}
    tiny = recipe.tokens < 200
    # A batch holds no pair twice, and a pair alone has nothing to be told from: such a source is left out.
    batches = {name: min(32 if tiny else 64, size) if size > 1 else 0 for name, size in sizes.items()}
    batch = max(batches.values())
    if not batch:
        raise InputError(f"{shards} holds no two pairs of one kind: nothing can be learned from them")
    steps = max(1, math.ceil(passes * sum(sizes.values()) / batch / EPOCHS))
    policy = {
        "sampling": {"kind": "uniform", "num_frames": 8},
        "max_frame_tokens": recipe.tokens,
        "max_image_tokens": recipe.tokens,
    }
    values = {
        "seed_everything": seed,
        "trainer": {
            "default_root_dir": str(out / "fit"),
            "accelerator": "cpu" if tiny else "gpu",
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "precision": "32-true" if tiny else "bf16-mixed",
            "max_epochs": EPOCHS,
            "log_every_n_steps": 1,
        },
        "model": {
            "base": recipe.model,
            "inputs": policy,
            **({} if tiny else {"attention": "sdpa", "chunk_tokens": 16384}),
        },
        "data": {
            "root": str(shards),
            "steps_per_epoch": steps,
            "batch_size": batches,
            "negatives": 0,
            "dev_pairs": 0,
            "num_workers": 1 if tiny else 4,
            "curriculum": {"schedule": "uniform", "unit": "source", "size_exponent": 1.0},
        },
        "uvrb": {"root": None},
    }
    head = (
        f"# Tuning on own videos: {sum(sizes.values())} pairs, {passes} passes; laid over {recipe.config}.\n"
        f"# command:  gve fit --config {recipe.config} --config {out / RECIPE}\n"
        "# cost:     see the progress bar\n"
        "# expected: the comparison that experiments/own_videos.sh prints\n"
    )
    write_whole(out / RECIPE, (head + yaml.safe_dump(values, sort_keys=False)).encode())
    return {"pairs": sum(sizes.values()), "batch": batch, "steps_per_epoch": steps}
