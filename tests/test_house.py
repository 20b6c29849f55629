"""The house: who may import whom, how large a part may grow, and that documents name things that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "gve").rglob("*.py"))

# Room -> rooms it may import. A room is a top-level module or package of gve; `data.shards` is a room of its own for
# those who only write shards.
TABLE = {
    "items": set(),
    "video": {"items"},
    "inputs": {"items", "video"},
    "model": {"items", "inputs", "video"},
    "encode": {"items", "video", "inputs", "model"},
    "data": {"items", "video", "inputs"},
    "eval": {"items", "video", "inputs", "model", "encode"},
    "callbacks": {"items", "video", "inputs", "model", "encode", "eval", "mining"},
    "uvrb_cli": {"items", "video", "inputs", "encode", "eval"},
    "synth": {"items", "video", "inputs", "model", "encode", "eval", "data"},
    "synth_cli": {"items", "video", "inputs", "encode", "eval", "data", "synth", "toy"},
    "toy": {"items", "video", "inputs", "model", "data.shards", "eval", "encode", "synth"},
    "mining": {"items", "inputs", "data", "encode"},
    "mining_cli": {"items", "video", "inputs", "data", "encode", "mining"},
    "plan_report": {"items", "video", "inputs", "data", "lightning_cli"},
    "lightning_cli": {"items", "callbacks", "data", "model"},
    "slurm": {"items", "lightning_cli", "uvrb_cli"},
    "sweep": {"items", "eval", "callbacks", "lightning_cli", "synth_cli"},
    "search": {"items", "video", "encode", "eval"},
    "serve": {"items", "video", "encode", "search", "search_cli"},
    "search_cli": {"items", "video", "encode", "search"},
    "export": {"items", "video", "inputs", "model", "encode", "eval"},
    "bench": {
        "items",
        "video",
        "inputs",
        "model",
        "encode",
        "eval",
        "data",
        "callbacks",
        "toy",
        "lightning_cli",
        "plan_report",
    },
    "api": {"items", "video", "encode", "search"},
    "doctor": {"items", "video", "encode", "toy"},
    "own_videos": {"items", "video", "encode", "eval", "search", "data"},
    "cli": {"items"},
    "__init__": {"api"},
    "__main__": {"cli"},
}
# The only places that may import these libraries.
HOMES = {
    "decord": {"video", "bench"},
    "webdataset": {"data"},
    "transformers": {"model", "inputs", "toy", "encode", "synth", "export", "bench"},
    "sentence_transformers": {"encode", "bench"},
    "mteb": {"eval", "bench"},
    "qwen_vl_utils": {"bench"},
    "jinja2": {"eval", "export", "synth", "search"},
    "pyarrow": {"eval", "data", "synth", "search"},
    "peft": {"model", "bench"},
    "lancedb": {"search"},
    "aiohttp": {"serve", "synth"},
    "torchvision": {"bench"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "gve").parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute names of all modules a file imports, lazy and typing-only imports too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            if node.module and node.module.startswith("gve"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def edges() -> set[tuple[str, str]]:
    """(room, imported room) pairs of the package."""
    found = set()
    for path in SOURCES:
        here = room(path)
        for name in imports(path):
            if not name.startswith("gve."):
                continue
            parts = name.split(".")[1:]
            # `from gve import __version__` is no room; `gve.data.shards` is one of its own.
            if not ((ROOT / "gve" / parts[0]).is_dir() or (ROOT / "gve" / f"{parts[0]}.py").is_file()):
                continue
            there = ".".join(parts[:2]) if here == "toy" and parts[0] == "data" and len(parts) > 1 else parts[0]
            if there.split(".")[0] != here:
                found.add((here, there))
    return found


def test_every_room_stands_in_the_table() -> None:
    rooms = {room(path) for path in SOURCES} - {"__init__"}
    assert rooms <= set(TABLE), f"a room without a row: {rooms - set(TABLE)}"


def test_imports_follow_the_table() -> None:
    found = edges()
    assert len(found) > 10
    wrong = {(here, there) for here, there in found if there not in TABLE.get(here, set())}
    assert not wrong, f"imports against the direction: {sorted(wrong)}"


def test_libraries_stay_in_their_homes() -> None:
    for path in SOURCES:
        for name in imports(path):
            top = name.split(".")[0]
            if top in HOMES:
                assert room(path) in HOMES[top], f"{path.relative_to(ROOT)} imports {top}"


def test_nothing_imports_experiments_or_tests() -> None:
    for path in SOURCES:
        assert not {"experiments", "configs", "notebooks", "slurm", "tests"} & {n.split(".")[0] for n in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    """File <= 600 lines, function <= 90 lines, signature <= 8 parameters (14 where a class is built from YAML)."""
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno <= 90, f"{node.name} is long"
            count = len([a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")])
            count += len(node.args.kwonlyargs)
            limit = 14 if node.name == "__init__" else 8
            assert count <= limit, f"{path.name}:{node.name} takes {count} parameters"


def test_no_forbidden_names() -> None:
    banned = {"utils", "util", "common", "base_classes", "helpers", "misc"}
    assert not [path for path in SOURCES if path.stem in banned or path.parent.name in banned]
    for path in SOURCES:
        assert "trust_remote_code=True" not in path.read_text()


def test_help_needs_no_torch() -> None:
    """`gve --help` imports neither torch nor Lightning (dispatch before imports)."""
    code = (
        "import sys\nfrom gve.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'lightning', 'transformers', 'numpy.testing'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


def yaml_files() -> list[Path]:
    return sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")])


def test_checkpoints_are_never_chosen_on_the_benchmark() -> None:
    """No monitor of any configuration names a uvrb/* value (design.md section 3, Training)."""
    files = yaml_files()
    assert files
    for path in files:
        for line in path.read_text().splitlines():
            if "monitor" in line:
                assert "uvrb" not in line, f"{path}: {line}"


def test_configs_carry_their_header() -> None:
    """The header of a configuration states the command, the cost and the expected score."""
    for path in yaml_files():
        head = path.read_text().split("\n\n")[0].lower()
        if yaml.safe_load(path.read_text()):
            for word in ("command:", "cost:", "expected:"):
                assert word in head, f"{path.relative_to(ROOT)} lacks {word!r} in its header"


def test_documents_name_files_that_exist() -> None:
    """Every path of the project that README names exists."""
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"`((?:gve|configs|experiments|tests|slurm|notebooks|docs)/[\w./{},-]+)`", text)
    assert names
    for name in names:
        assert (ROOT / name).exists(), f"README names {name}"
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / link.split("#")[0]).exists(), f"README links {link}"
