"""The model card of an export: front matter of the hub, use, parity, results, data, recipe, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from gve.eval.published import other_sizes
from gve.eval.results import RESULTS, SavedResults, read_results
from gve.eval.uvrb import SETS
from gve.items import InputError

# Licence of the known bases, as their model cards state it.
_LICENCES: Mapping[str, Mapping[str, str]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {"license": "apache-2.0"},
}
_RECIPE = {
    "model": ("temperature", "false_negative_margin", "lora", "optimizer", "dtype", "chunk_tokens"),
    "data": ("steps_per_epoch", "batch_size", "negatives", "curriculum"),
    "trainer": ("max_epochs", "precision", "devices", "num_nodes"),
}


@dataclass(frozen=True)
class CardOptions:
    """What a user adds to the card.

    Args:
        name: its title; the folder's name when empty.
        datasets: hub names of the training data, for the front matter.
        licence: identifier of the hub; by the base when empty.
    """

    name: str = ""
    datasets: tuple[str, ...] = ()
    licence: str = ""


def front_matter(base: str, options: CardOptions) -> str:
    """YAML that the hub reads."""
    hub = not Path(base).exists()
    licence: Mapping[str, str] = {"license": options.licence} if options.licence else _licence(base)
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "sentence-similarity",
        **licence,
        "language": ["en"],
        "tags": ["video-retrieval", "multimodal-embedding", "sentence-transformers", "qwen2.5-vl", "gve"],
        "metrics": ["recall"],
    }
    if hub:
        values["base_model"] = [base]
        values["base_model_relation"] = "finetune"
    if options.datasets:
        values["datasets"] = list(options.datasets)
    return yaml.safe_dump(values, sort_keys=False)


def _licence(base: str) -> Mapping[str, str]:
    """The licence that the base's own card states; unknown ones are named as such."""
    card = Path(base) / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
        try:
            own = yaml.safe_load(parts[1]) if len(parts) > 2 else None
        except yaml.YAMLError:
            own = None
        if isinstance(own, dict) and isinstance(own.get("license"), str):
            return {key: str(own[key]) for key in ("license", "license_name", "license_link") if own.get(key)}
    return _LICENCES.get(base, {"license": "other", "license_name": "as-the-base-model"})


def results_of(checkpoint: Path, weights_hash: str) -> SavedResults | None:
    """The evaluation beside a checkpoint, in its folder or the one above; None unless it is of these weights.

    Raises:
        InputError: there is one that cannot be read.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / RESULTS).is_file():
            saved = read_results(folder / RESULTS)
            return saved if saved.data.get("weights") == weights_hash else None
    return None


def results_part(saved: SavedResults) -> dict[str, Any]:
    """What the card shows of an evaluation."""
    data = saved.data
    lines = ["| ability | score | 95% interval |", "|---|---|---|"]
    for name, value in data["abilities"].items():
        if value is not None:
            low, high = data["ability_intervals"][name]
            lines.append(f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |")
    lines += ["", "| set | metric | queries | corpus | score | 95% interval |", "|---|---|---|---|---|---|"]
    for name, row in data["sets"].items():
        low, high = row["interval"]
        mark = "" if row["complete"] else " (incomplete)"
        lines.append(
            f"| {name}{mark} | {row['metric']} | {row['n_query']} | {row['n_corpus']} | {row['value']:.3f} | "
            f"{low:.3f} to {high:.3f} |"
        )
    sampling = data["protocol"]["inputs"].get("sampling", {})
    frames = f"{sampling.get('num_frames', '?')} frames a clip, protocol `{data['protocol']['hash']}`"
    genuine = {record.name for record in SETS} <= set(data["sets"]) and not other_sizes(data["sets"])
    return {"table": "\n".join(lines), "count": len(data["sets"]), "genuine": genuine, "frames": frames}


def training_part(checkpoint: Path, sources: Sequence[str]) -> str:
    """Data and recipe, from what the run left beside its checkpoint.

    Raises:
        InputError: its configuration cannot be read.
    """
    lines = [f"Sources: {', '.join(f'`{name}`' for name in sources)}." if sources else "Sources: not recorded."]
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        try:
            values = yaml.safe_load(config.read_text())
        except yaml.YAMLError as error:
            raise InputError(f"{config} is no YAML: {str(error).splitlines()[0]}") from None
        chosen = {
            part: {name: own[name] for name in names if own.get(name) is not None}
            for part, names in _RECIPE.items()
            if isinstance(own := values.get(part), dict)
        }
        chosen["seed_everything"] = values.get("seed_everything")
        lines += ["", "```yaml", yaml.safe_dump(chosen, sort_keys=False).rstrip(), "```"]
    return "\n".join(lines)


def render(facts: Mapping[str, Any]) -> str:
    """The card, Markdown."""
    # Markdown, not HTML: nothing is escaped, and no value comes from outside the run.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = resources.files("gve.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(facts)
