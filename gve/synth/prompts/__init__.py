"""The prompts of the synthesis as data: a file for each version, and its SHA-256 travels with what was made by it.

`<name>.v<n>.j2` holds two blocks, `system` and `user`; `lexicon.v<n>.json` the word lists of the rules. A file that has
been used is never changed: a better wording is a new version, so that old results can still be explained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from gve.items import InputError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        name: what it is for.
        version: "v1", or the file's name where it is the user's own.
        text: of the file.
    """

    name: str
    version: str
    text: str

    @property
    def sha256(self) -> str:
        """Hex, of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        try:
            template = environment.from_string(self.text)
        except jinja2.TemplateError as error:
            raise InputError(f"prompt {self.name} {self.version} is no template: {error}") from None
        if lacking := {"system", "user"} - set(template.blocks):
            raise InputError(
                f"prompt {self.name} {self.version} has no block {min(lacking)!r}: it needs system and user"
            )
        return template

    def render(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """System turn and text of the user turn.

        Raises:
            InputError: the file is no template, lacks a block, or asks for a value that is not given.
        """
        template = self._template
        try:
            context = template.new_context(dict(values))
            system, user = ("".join(template.blocks[block](context)).strip() for block in ("system", "user"))
        except jinja2.TemplateError as error:
            raise InputError(f"prompt {self.name} {self.version} cannot be filled in: {error}") from None
        return system, user


def read_prompt(name: str, own: str | Path = "") -> Prompt:
    """A prompt of the package in its newest version, or one of the user's own.

    Args:
        name: "video_captions", "frame_captions", "image_query" or "clip_query".
        own: a file, or a version such as "v1"; empty for the newest.

    Raises:
        InputError: there is no such file.
    """
    versions = _versions(name, ".j2")
    chosen = str(own) or max(versions, key=_number)
    path = versions.get(chosen, Path(chosen))
    try:
        return Prompt(name, chosen if chosen in versions else path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {name} {chosen}: {error}; give a file, or one of {', '.join(versions)}") from None


def read_lexicon() -> tuple[dict[str, list[str]], str]:
    """Word lists by name, and the hex SHA-256 of their file; the newest version."""
    versions = _versions("lexicon", ".json")
    data = versions[max(versions, key=_number)].read_bytes()
    return json.loads(data), hashlib.sha256(data).hexdigest()


def _versions(name: str, suffix: str) -> dict[str, Path]:
    found = {path.name.split(".")[1]: path for path in FOLDER.glob(f"{name}.v*{suffix}")}
    if not found:
        raise InputError(f"the package has no prompt {name!r}")
    return dict(sorted(found.items(), key=lambda entry: _number(entry[0])))


def _number(version: str) -> int:
    return int(version[1:])
