"""The data card of a run: what was made, from what, by which model and prompts, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gve import __version__
from gve.data.manifest import Manifest
from gve.synth.folder import StepFolder
from gve.synth.leases import replace_file
from gve.synth.output import SHARDS
from gve.synth.pipeline import Plan

CARD = "README.md"
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)


def write_card(plan: Plan, funnel: Mapping[str, Any]) -> Path:
    """Writes README.md beside the manifest of the shards: markdown with front matter, as data set hubs read it.

    Args:
        plan: the finished run.
        funnel: its numbers.
    """
    path = plan.out / SHARDS / CARD
    replace_file(path, card(plan, funnel).encode(), durable=True)
    return path


def card(plan: Plan, funnel: Mapping[str, Any]) -> str:
    """The text of the card."""
    sources = Manifest.load(plan.out / SHARDS).sources
    pairs = sum(record.count for record in sources.values())
    licences = {name: str(licence) for name, licence in _licences(plan)}
    head = {
        "pretty_name": f"{plan.out.name}: synthesised pairs for universal video retrieval",
        "license": next(iter(licences.values())) if len(set(licences.values())) == 1 else "other",
        "size_categories": [_size(pairs)],
        "task_categories": ["feature-extraction"],
        "tags": ["video-retrieval", "composed-retrieval", "synthetic", "webdataset"],
    }
    rows = [
        (name, record.task, str(record.level), f"{record.count:,}", f"{record.bytes / 1e6:,.1f}", record.instruction)
        for name, record in sources.items()
    ]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {head['pretty_name']}",
        f"{pairs:,} training pairs in {len(sources)} tasks, made from {funnel['input']:,} weakly captioned videos by "
        f"`gve synth` {__version__}. WebDataset shards of schema 1 with `manifest.json`; texts were written by a model "
        "and may be wrong: `gve synth audit` measures how often.",
        "## Tasks",
        _table(("source", "task", "level", "pairs", "MB", "query instruction"), rows),
        "## Sources and their licences",
        "The videos keep the licence of their source; the texts are derived from them.",
        _table(("source", "licence"), licences.items()),
        "## What became of the input",
        "In every step: in = out + rejected; a reject keeps its reason and score in `rejects.jsonl` of the run.",
        _table(("step", "in", "out", "rejected", "rows to the next step"), map(_funnel_row, funnel["steps"])),
        "Parts are captions that were asked for and pairs that were planned: tried = made + rejected.",
        _table(
            ("step", "tried", "made", "rejected"),
            [_parts_row(step) for step in funnel["steps"] if step["parts"]["tried"]],
        ),
        "## How it was made",
        _table(("step", "what", "value"), _made_with(plan)),
        _usage(funnel["usage"]),
        "## Use",
        "Name this folder by `data.root` of a recipe of `gve fit`; `gve shards check` compares every byte with the "
        "manifest. Pairs are for training: run the audit against the benchmark before you report scores.",
    ]
    return "\n\n".join(parts) + "\n"


def _licences(plan: Plan) -> Iterable[tuple[str, str]]:
    from gve.synth.inputs import InputOptions, source_name

    options = plan.steps[0].options
    if isinstance(options, InputOptions):
        for source in options.sources:
            yield source_name(source), source.licence


def _size(pairs: int) -> str:
    """The hub's name of a size, for example 1K<n<10K."""
    names = ("1K", "10K", "100K", "1M", "10M")
    place = sum(pairs >= size for size in _SIZES)
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>10M"


def _funnel_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    return step["step"], f"{step['in']:,}", f"{step['out']:,}", _reasons(step["rejected"]), f"{step['rows']:,}"


def _parts_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    parts = step["parts"]
    return step["step"], f"{parts['tried']:,}", f"{parts['made']:,}", _reasons(parts["rejected"])


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "0"


def _usage(usage: Mapping[str, int]) -> str:
    return (
        f"Asked {usage['requests']:,} questions in {usage['attempts']:,} attempts: {usage['prompt_tokens']:,} tokens "
        f"read, {usage['completion_tokens']:,} written."
    )


def _made_with(plan: Plan) -> Iterable[tuple[str, str, str]]:
    """Model, prompts' hashes, options: what decided each step, from its folder."""
    yield "all", "seed", str(plan.seed)
    for step in plan.steps[1:]:
        identity = StepFolder(plan.out, step.name).identity()
        assert identity is not None
        yield step.name, "digest", identity.digest
        for what, value in identity.fingerprint.items():
            yield step.name, what, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
