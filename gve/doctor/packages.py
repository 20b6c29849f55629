"""Python and its packages: versions against the pins, whether they import, and the optional ones."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import gve
from gve.doctor.check import Check, one_line

ROOT = Path(gve.__file__).resolve().parent.parent
FEWEST_PYTHON = (3, 11)
_MARK = "gve-doctor "  # libraries print on import
_IMPORTS = f"""
import importlib, json, sys
def say(*found):
    print({_MARK!r} + json.dumps(found), flush=True)
for name in sys.argv[1:]:
    say(name, None)
    try:
        importlib.import_module(name)
        say(name, "")
    except BaseException as error:
        say(name, f"{{type(error).__name__}}: {{error}}")
"""


def required() -> list[Requirement]:
    """The pins: of requirements.txt beside the package in a checkout, else of the installed package."""
    path = ROOT / "requirements.txt"
    if path.is_file():
        lines = (re.sub(r"\s#.*|^#.*", "", line).strip() for line in path.read_text().splitlines())
        found = [Requirement(line) for line in lines if line]
    else:
        found = [own for own in map(Requirement, metadata.requires("gve") or ()) if "extra" not in str(own.marker)]
    return [own for own in found if own.marker is None or own.marker.evaluate()]


def extras() -> dict[str, list[Requirement]]:
    """Extra -> its requirements."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        stated = tomllib.loads(path.read_text())["project"].get("optional-dependencies", {})
        return {name: [Requirement(line) for line in lines] for name, lines in stated.items()}
    found: dict[str, list[Requirement]] = {}
    for own in map(Requirement, metadata.requires("gve") or ()):
        for name in metadata.metadata("gve").get_all("Provides-Extra") or ():
            if own.marker is not None and "extra" in str(own.marker) and own.marker.evaluate({"extra": name}):
                found.setdefault(name, []).append(own)
    return found


def installed(name: str) -> str:
    """The version of a distribution; empty where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


@cache
def _modules() -> dict[str, str]:
    """Distribution in lower case -> a module that it installs: not always its name."""
    found: dict[str, str] = {}
    for module, names in metadata.packages_distributions().items():
        if not module.startswith("_"):
            for name in names:
                own = name.lower().replace("_", "-")
                if own not in found or module.lower().replace("_", "-") == own:
                    found[own] = module
    return found


def check_python() -> Iterator[Check]:
    """The interpreter."""
    told = f"{platform.python_version()}, {platform.platform()}"
    good = sys.version_info >= FEWEST_PYTHON
    wanted = ".".join(map(str, FEWEST_PYTHON))
    yield Check("python", "python", "ok" if good else "broken", told, "" if good else f"install Python {wanted}")
    yield Check("python", "gve", "ok", f"{gve.__version__} in {ROOT}")


def check_packages(timeout_s: float = 240.0) -> Iterator[Check]:
    """Every pinned package: there, of the pinned version, and importable. They are imported in a child process, since a
    library of another build may take the process down.

    Args:
        timeout_s: for all imports together.
    """
    present = {own.name: found for own in required() if (found := installed(own.name))}
    modules = {name: _modules().get(name.lower().replace("_", "-"), name) for name in present}
    faults = import_faults(list(modules.values()), timeout_s)
    for own in required():
        version = present.get(own.name, "")
        if not version:
            pip = f"pip install '{own.name}{own.specifier}'"
            yield Check("packages", own.name, "broken", "not installed", pip)
        elif fault := faults.get(modules[own.name], ""):
            pip = f"pip install --force-reinstall '{own.name}{own.specifier}'"
            yield Check("packages", own.name, "broken", f"{version} does not import: {one_line(fault)}", pip)
        elif not own.specifier.contains(version, prereleases=True):
            pip = f"pip install '{own.name}{own.specifier}'"
            yield Check("packages", own.name, "weak", f"{version}, pinned {own.specifier}: not what was tested", pip)
        else:
            yield Check("packages", own.name, "ok", version)


def import_faults(modules: list[str], timeout_s: float) -> dict[str, str]:
    """Module -> why it does not import; the one that takes the child down is named, and the others are tried again."""
    faults: dict[str, str] = {}
    left = list(modules)
    while left:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _IMPORTS, *left], capture_output=True, text=True, timeout=timeout_s, check=False
            )
            printed, end = done.stdout, f"the process died ({done.returncode})"
        except subprocess.TimeoutExpired as error:
            printed, end = (error.stdout or b"").decode(errors="replace"), f"no end after {timeout_s:g} s"
        lines = [line.partition(_MARK)[2] for line in printed.splitlines() if _MARK in line]
        said: dict[str, str | None] = dict(json.loads(line) for line in lines)
        faults |= {name: fault for name, fault in said.items() if fault}
        begun = [name for name, fault in said.items() if fault is None]
        faults |= dict.fromkeys(begun or ([] if said else left[:1]), end)
        left = [name for name in left if name not in said and name not in faults]
    return faults


def check_extras() -> Iterator[Check]:
    """What `pip install 'gve[...]'` adds, and what speeds up a GPU or a cluster."""
    for name, wanted in extras().items():
        absent = [own.name for own in wanted if not installed(own.name)]
        other = [
            f"{own.name} {version}, pinned {own.specifier}"
            for own in wanted
            if (version := installed(own.name)) and not own.specifier.contains(version, prereleases=True)
        ]
        pip = f"pip install 'gve[{name}]'"
        if absent:
            yield Check("optional", name, "absent", f"without {', '.join(absent)}", pip)
        elif other:
            yield Check("optional", name, "weak", "; ".join(other), pip)
        else:
            yield Check("optional", name, "ok", ", ".join(f"{own.name} {installed(own.name)}" for own in wanted))
    for package, use in (
        ("flash-attn", "--attention flash_attention_2 on a GPU; sdpa works without it"),
        ("deepspeed", "configs/trainer/deepspeed_zero2.yaml"),
    ):
        version = installed(package)
        yield Check("optional", package, "ok" if version else "absent", version or f"for {use}")
