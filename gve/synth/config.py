"""The configuration of a run: one YAML file, a section for each step, every key checked against a frozen dataclass.

Sections::

    seed: 0
    input, scan, select, enrich, extend, output    options of each step, see the class in STEPS
    captioner:  {kind: server, ...}                 who is asked; further keys are that captioner's own options
    encoder:    {model: ..., ...}                   the embedder that measures
    run:        {workers: 2, ...}                   how the work is shared; decides nothing of what comes out

A section of a step may name another class by `class: my.module:MyStage`, and `kind` another captioner in the same form.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from gve.items import InputError
from gve.synth.pipeline import Plan, RunOptions, Step

if TYPE_CHECKING:
    from gve.encode.encoder import LoadedEncoder

Options = TypeVar("Options")

STEPS = {
    "input": "gve.synth.inputs:Input",
    "scan": "gve.synth.quality:Scan",
    "select": "gve.synth.quality:Select",
    "enrich": "gve.synth.enrich:Enrich",
    "extend": "gve.synth.extend:Extend",
    "output": "gve.synth.output:Output",
}
"""Step -> the class that does it, in the order of the flow. A class is imported when its step is run."""


@dataclass(frozen=True)
class EncoderOptions:
    """The embedder of consistency and of composed queries; anything that `gve uvrb run` evaluates.

    Args:
        model: checkpoint of `gve fit`, model folder or hub name.
        adapter: how it is used; "auto" decides by its files.
        base: where the base of a checkpoint lies now.
        frames: of a clip, for example "uniform(8)"; the model's own when empty.
        max_frame_tokens: most visual tokens of a frame; the model's own when 0.
        device: torch device.
        dtype: of the weights.
        attention: kernel: sdpa, eager or flash_attention_2.
        batch_tokens: most tokens of one forward pass.
        num_workers: loader processes that decode; 0 decodes in the worker itself.
    """

    model: str
    adapter: str = "auto"
    base: str = ""
    frames: str = ""
    max_frame_tokens: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sdpa"
    batch_tokens: int = 16384
    num_workers: int = 0

    def load(self) -> LoadedEncoder:
        """Raises InputError when there is no such model."""
        from gve.encode.encoder import Execution
        from gve.encode.pretrained import load_encoder
        from gve.video import Sampling

        inputs: dict[str, Any] = {}
        if self.frames:
            inputs["sampling"] = Sampling.parse(self.frames)
        if self.max_frame_tokens:
            inputs["max_frame_tokens"] = self.max_frame_tokens
        execution = Execution(self.device, self.dtype, self.attention, self.batch_tokens, self.num_workers)
        return load_encoder(
            self.model, adapter=self.adapter, base=self.base, inputs=inputs or None, execution=execution
        )


@dataclass(frozen=True)
class Maker:
    """Builds an object from a class and its options when it is called; pickles."""

    cls: Any
    options: Any

    def __call__(self) -> Any:
        return self.cls(self.options)


def read_config(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a configuration file, with single ones changed.

    Args:
        path: YAML.
        changes: words like `output.prefix=mine`; the value is YAML.

    Raises:
        InputError: the file cannot be read, or a change is none.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} holds no sections")
    for change in changes:
        name, given, text = change.partition("=")
        *above, last = name.split(".")
        if not given or not name:
            raise InputError(f"--set {change}: write section.key=value")
        place = values
        for key in above:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {change}: {key} is no section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {change}: {error}") from error
    return values


def make_plan(values: Mapping[str, Any], out: str | Path, *, captioners: Mapping[str, str], until: str = "") -> Plan:
    """What a configuration asks for.

    Args:
        values: sections.
        out: folder of the run.
        captioners: kind -> "module:Class", built as `Class(options)`.
        until: steps after this one are still named, but their classes need not be there.

    Raises:
        InputError: an unknown section, key, step, kind or class, or a value of the wrong type.
    """
    known = {"seed", "captioner", "encoder", "run", *STEPS}
    if unknown := sorted(set(values) - known):
        raise InputError(f"unknown section {unknown[0]!r}: a configuration has {', '.join(sorted(known))}")
    if until and until not in STEPS:
        raise InputError(f"no step {until!r}: use one of {', '.join(STEPS)}")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed {seed!r}: use a whole number")
    names = list(STEPS)
    steps = []
    for name in names[: names.index(until) + 1] if until else names:
        section = dict(values.get(name) or {})
        cls = find_class(section.pop("class", STEPS[name]), name)
        steps.append(Step(name, cls, build(cls.Options, section, name)))
    captioner = encoder = None
    if values.get("captioner"):
        captioner = make_captioner(values["captioner"], captioners)
    if values.get("encoder"):
        encoder = build(EncoderOptions, values["encoder"], "encoder").load
    run = build(RunOptions, values.get("run") or {}, "run")
    return Plan(Path(out), tuple(steps), seed, captioner, encoder, run, dict(values), tuple(STEPS))


def make_captioner(values: Mapping[str, Any], kinds: Mapping[str, str], section: str = "captioner") -> Maker:
    """What builds a captioner.

    Args:
        values: `kind`, and that captioner's own options.
        kinds: kind -> "module:Class".
        section: what messages call it.

    Raises:
        InputError: an unknown kind, class or key, or a value of the wrong type.
    """
    own = dict(values)
    kind = str(own.pop("kind", ""))
    if kind not in kinds and ":" not in kind:
        raise InputError(f"{section} kind {kind!r}: use one of {', '.join(kinds)}, or module:Class")
    cls = find_class(kinds.get(kind, kind), section)
    return Maker(cls, build(cls.Options, own, section))


def find_class(path: str, section: str) -> Any:
    """The class that "module:Class" names.

    Raises:
        InputError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"section {section}: no class {path!r} ({error})") from error


def build(options: type[Options], values: Any, section: str) -> Options:
    """An instance of a frozen dataclass from plain values; no key and no type passes unchecked.

    Nested dataclasses, lists, mappings, choices and optional values are understood; a class with a `parse` takes text
    too. jsonargparse could do it, but evaluates the `if TYPE_CHECKING` blocks of every module it meets, which imports
    torch: 6 s for each of hundreds of workers.

    Raises:
        InputError: one line that names the section and the key.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"section {section}: {values!r} is no mapping of keys to values")
    own = {item.name: item for item in fields(options) if item.init}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(values) - set(own))):
        raise InputError(f"section {section} has no key {unknown[0]!r}: it has {', '.join(own)}")
    absent = [
        name
        for name, item in own.items()
        if name not in values and item.default is MISSING and item.default_factory is MISSING
    ]
    if absent:
        raise InputError(f"section {section} lacks the key {absent[0]!r}")
    types = get_type_hints(options)
    return options(**{name: _value(types[name], value, f"{section}.{name}") for name, value in values.items()})


def _value(wanted: Any, value: Any, where: str) -> Any:
    """The value as the type that is wanted. Raises InputError when it is none."""
    kind, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if kind in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _value(next(own for own in arguments if own is not NoneType), value, where)
    if kind is Literal:
        if value not in arguments:
            raise InputError(f"{where} {value!r}: use one of {', '.join(map(str, arguments))}")
        return value
    if is_dataclass(wanted):
        if isinstance(value, str) and hasattr(wanted, "parse"):
            return wanted.parse(value)
        return build(wanted, value, where)  # type: ignore[arg-type]
    if kind in (tuple, list, Sequence) and isinstance(value, list):
        if kind is tuple and arguments[-1] is not Ellipsis:
            if len(arguments) != len(value):
                raise InputError(f"{where} {value!r}: give {len(arguments)} values")
            return tuple(_value(own, *pair) for own, *pair in zip(arguments, value, _names(where, value), strict=True))
        found = [_value(arguments[0], *pair) for pair in zip(value, _names(where, value), strict=True)]
        return tuple(found) if kind is tuple else found
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): _value(arguments[1], own, f"{where}.{key}") for key, own in value.items()}
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if wanted in (bool, int, str) and type(value) is wanted:
        return value
    raise InputError(f"{where} {value!r} is no {getattr(wanted, '__name__', wanted) if kind is None else wanted}")


def _names(where: str, values: Sequence[Any]) -> list[str]:
    return [f"{where}[{place}]" for place in range(len(values))]
