"""What a builder makes and how it is written: the released layout, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gve import __version__
from gve.eval.builders.files import MediaFolder, Row, SourceFiles, stem
from gve.eval.classification import LABEL_TEXT
from gve.eval.records import SetRecord
from gve.items import InputError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, all)."""


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Options:
    """Choices that the sources leave open.

    Args:
        seed: of the frame of MSRVTT-I2V and the clip of LoVR-C2V.
        joiner: stands between the keywords of PEV-K; the paper's is not known.
        label_text: text of a label in classification, with {name} for the label's words.
        split: list of UCF101 and HMDB51: 1, 2 or 3.
        skip_missing: classification: leave clips out that are not on the disk (Kinetics vanishes), and say how many.
        replace: take the place of a set that `prepare` did not write.
        jobs: files worked on side by side.
    """

    seed: int = 0
    joiner: str = ", "
    label_text: str = LABEL_TEXT
    split: int = 1
    skip_missing: bool = False
    replace: bool = False
    jobs: int = 2


@dataclass(frozen=True)
class Request:
    """What a builder is given.

    Args:
        record: the set to build.
        root: folder of the sets.
        files: the source's annotation files.
        media: the source's clips.
        has_media: whether the user named a folder of clips.
        progress: called on long work.
    """

    record: SetRecord
    root: Path
    files: SourceFiles
    media: MediaFolder
    has_media: bool
    options: Options = Options()
    progress: Progress = silent

    @property
    def folder(self) -> Path:
        """The set's own folder."""
        return self.root / self.record.name


@dataclass
class Draft:
    """A set before it is written.

    Args:
        queries, corpus, instances: rows of the listings.
        decisions: what was chosen where the source leaves a choice.
        deviations: where the set differs, or may differ, from the published one: one sentence each. Every result of
            the set repeats them.
        failed: file -> why it could not be made.
    """

    queries: list[Row]
    corpus: list[Row]
    instances: list[Row]
    decisions: dict[str, Any] = field(default_factory=dict)
    deviations: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def choose(count: int, *key: object) -> int:
    """A number below `count`, drawn by a key alone: neither order nor number of other draws changes it."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") * count >> 64


def text_set(request: Request, clips: Iterable[tuple[str, Sequence[str]]]) -> Draft:
    """Text queries over clips: each distinct text once, all its clips positive; clips without a text are distractors.

    Texts are equal when their characters are: neither case nor full stops are touched.

    Args:
        clips: (file name of a clip, its texts), stripped and not empty.
    """
    listed = list(clips)
    answers: dict[str, list[str]] = {}
    for name, said in listed:
        for text in said:
            answers.setdefault(text, [])
            if stem(name) not in answers[text]:
                answers[text].append(stem(name))
    prefix = request.record.name.lower()
    numbered = [(f"{prefix}-q{number:05d}", text, own) for number, (text, own) in enumerate(answers.items())]
    draft = Draft(
        [{"id": query, "text": text} for query, text, _ in numbered],
        corpus_rows(request, [name for name, _ in listed]),
        [{"qid": query, "pos": own} for query, _, own in numbered],
    )
    draft.decisions["texts"] = "equal texts are one query, and every clip that has the text is a positive"
    if several := sum(len(own) > 1 for own in answers.values()):
        draft.decisions["queries_with_several_positives"] = several
    if silent := sum(not said for _, said in listed):
        draft.decisions["clips_without_text"] = silent
    return draft


def corpus_rows(request: Request, names: Iterable[str], *, unique: bool = True) -> list[Row]:
    """Listing rows of clips; the id is the name without its suffix.

    Raises:
        InputError: a clip stands twice.
    """
    rows = {}
    for name in names:
        if stem(name) in rows:
            raise InputError(f"{request.record.name}: clip {name} stands twice in {request.files.where}")
        rows[stem(name)] = {"id": stem(name), "video": request.media.listed(name, unique=unique)}
    return list(rows.values())


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did for one set.

    Args:
        facts: its set.json.
        absent: clips of the listing that are not on the disk.
        failed: file -> why it could not be made.
    """

    facts: dict[str, Any]
    absent: tuple[str, ...]
    failed: dict[str, str]


def check_writable(record: SetRecord, root: Path, replace: bool) -> None:
    """Refuses to write over a set that is not the project's own work, such as the released one."""
    folder = root / record.name
    if not (folder / "jsonl").exists() or replace:
        return
    facts = folder / "set.json"
    if not facts.is_file() or "builder" not in json.loads(facts.read_text()):
        raise InputError(f"{folder} holds a set that prepare did not write; take another --root, or pass --replace")


def link_media(request: Request) -> None:
    """Links the clips' folder as `<root>/media/<source>`.

    Raises:
        InputError: another folder is linked there, on which other sets may stand.
    """
    place = request.root / "media" / request.media.link
    if not request.media.found or place.resolve() == request.media.folder.resolve():
        return
    if place.is_symlink() and not place.exists():
        place.unlink()
    if place.exists():
        raise InputError(
            f"{place} already shows {place.resolve()}, not {request.media.folder}; other sets may read it: remove "
            "it to change the folder"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(request.media.folder.resolve(), target_is_directory=True)


def write_set(request: Request, draft: Draft, builder: str) -> Prepared:
    """Writes listings and set.json; a reader meets the old set or the new one, never a mixture."""
    folder = request.folder
    folder.mkdir(parents=True, exist_ok=True)
    fresh, stale = folder / "jsonl.tmp", folder / "jsonl.old"
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    hashes = {}
    for name, rows in (("queries", draft.queries), ("corpus", draft.corpus), ("instances", draft.instances)):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (fresh / f"{name}.jsonl").write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    used = sorted(request.files.used.items())
    facts = {
        "set": request.record.name,
        "builder": builder,
        "code": __version__,
        "source": request.record.source.name,
        "licence": request.record.licence,
        "files": [{"name": name, **known} for name, known in used],
        "counts": {"queries": len(draft.queries), "corpus": len(draft.corpus)},
        "seed": request.options.seed,
        "decisions": draft.decisions,
        "deviations": draft.deviations,
        "listings": hashes,
    }
    (folder / "set.json.tmp").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if (folder / "jsonl").exists():
        os.rename(folder / "jsonl", stale)
    os.rename(fresh, folder / "jsonl")
    os.replace(folder / "set.json.tmp", folder / "set.json")
    shutil.rmtree(stale, ignore_errors=True)
    return Prepared(facts, tuple(sorted(request.media.absent)), draft.failed)
