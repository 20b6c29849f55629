"""`gve doctor`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from gve.doctor.check import Check, attempt

_SIGNS = {"ok": "ok", "weak": "weak", "absent": "-", "broken": "BROKEN"}


def main(argv: Sequence[str]) -> int:
    """Looks and reports.

    Args:
        argv: the words after `gve doctor`.

    Returns:
        0 what is needed works, 1 something needed is broken.
    """
    parser = argparse.ArgumentParser(
        prog="gve doctor",
        description="Tries what gve needs on this machine: packages and their pins, torch and its kernels, decoders "
        "and codecs (clips are made and read back), memory, disk, the hub, and the tiny model end to end. Some 20 "
        "seconds. "
        "Exit 1 when something needed is broken; optional things that are absent are told and are no fault.",
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub (else one request, 5 s at most)")
    arguments = parser.parse_args(argv)
    checks: list[Check] = []
    for part, look in _parts(arguments.offline):
        if not arguments.json and sys.stderr.isatty():
            print(f"looking at {part} ...", file=sys.stderr)
        found = attempt(part, look)
        checks += found
        if not arguments.json:
            _print(found)
    broken = [check for check in checks if check.state == "broken"]
    if arguments.json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in checks]}, indent=1))
        return 1 if broken else 0
    for check in checks:
        if check.hint and check.state != "ok":
            print(f"hint    {check.name}: {check.hint}")
    counts = ", ".join(f"{sum(check.state == state for check in checks)} {state}" for state in _SIGNS)
    names = ", ".join(check.name for check in broken)
    print(f"{f'broken: {names}' if broken else 'works'} ({counts})")
    return 1 if broken else 0


def _parts(offline: bool) -> list[tuple[str, Callable[[], Iterable[Check]]]]:
    """Part -> its checks. Their modules are imported when it is their turn: a missing library is then one finding."""

    def named(name: str, *values: bool) -> Callable[[], Iterable[Check]]:
        module, _, function = name.partition(":")
        return lambda: getattr(importlib.import_module(f"gve.doctor.{module}"), function)(*values)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return [
        ("python", named("packages:check_python")),
        ("packages", named("packages:check_packages")),
        ("torch", named("kernels:check_torch")),
        ("video", named("media:check_codecs")),
        ("pictures", named("media:check_pictures")),
        ("model", named("kernels:check_model")),
        ("machine", named("machine:check_cores")),
        ("disk", named("machine:check_disk")),
        ("hub", named("machine:check_hub", offline)),
        ("extras", named("packages:check_extras")),
        ("programs", named("machine:check_programs")),
    ]


def _print(checks: Iterable[Check]) -> None:
    for check in checks:
        print(f"{_SIGNS[check.state]:<7} {check.part:<9} {check.name:<20} {check.detail}", flush=True)
