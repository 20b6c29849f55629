"""The audit of a run: what its captions are, how much of them is true, and what it shares with a benchmark."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gve
from gve.items import InputError
from gve.synth.audit.census import Census, count_tasks
from gve.synth.audit.contamination import (
    Benchmark,
    FrameIndex,
    Match,
    TextIndex,
    Thresholds,
    find_texts,
    hash_all,
    hash_of_scan,
)
from gve.synth.audit.drawn import Drawn
from gve.synth.audit.judge import Check, Told, Verdicts, captions_of, judge
from gve.synth.audit.notes import Notes
from gve.synth.folder import Rows, Slice, StepFolder, encode
from gve.synth.leases import Survey, replace_file
from gve.synth.media import MediaStore
from gve.synth.pipeline import funnel
from gve.synth.records import Captioner
from gve.synth.status import Watch
from gve.synth.units import Row, canonical

FOLDER, REPORT, EXCLUDE = "audit", "audit.json", "exclude.jsonl"
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class AuditOptions:
    """What is looked at.

    Args:
        sample: captions that are judged.
        seed: of the sample, and of what the page shows.
        uvrb: folders of the benchmark.
        thresholds: of contamination.
        videos: whether videos are compared with the benchmark's, which decodes all of them.
        exclude: where the exclusion list goes; `audit/exclude.jsonl` of the run when None.
        shown: videos on the page.
        prompts: name -> a file of one's own, or a version; the newest of the package otherwise.
        jobs: videos that are decoded side by side.
    """

    sample: int = 200
    seed: int = 0
    uvrb: tuple[Path, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    videos: bool = True
    exclude: Path | None = None
    shown: int = 24
    prompts: Mapping[str, str] = field(default_factory=dict)
    jobs: int = 2

    def __post_init__(self) -> None:
        own = self.thresholds
        if self.sample < 1 or self.shown < 0 or self.jobs < 1:
            raise InputError(f"audit: sample {self.sample}, jobs {self.jobs}: use at least 1")
        if own.ngram < 2 or not 1 <= own.min_words <= own.ngram or not 0 <= own.max_bits < 32:
            raise InputError(
                f"audit: n-grams of {own.ngram} words, texts from {own.min_words} words, {own.max_bits:g} bits: use at "
                "least 2, 1 to the n-gram's words, and 0 to 32"
            )


class Progress(Protocol):
    """Shows how far a part of the audit is."""

    def __call__(self, title: str, total: int) -> AbstractContextManager[Callable[[int], object]]: ...


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found.

    Args:
        report: plain JSON, as in audit.json.
        shown: videos for the page: the rows of `enrich`, drawn by the seed.
        verdicts: of the judge; None where none was asked.
        media: of the run.
    """

    report: Mapping[str, Any]
    shown: Sequence[Row]
    verdicts: Verdicts | None
    media: MediaStore


def audit(
    out: str | Path,
    options: AuditOptions,
    judge_maker: Callable[[], Captioner] | None = None,
    progress: Progress = lambda title, total: nullcontext(lambda count: None),
) -> Audit:
    """Audits a run, finished or not, and writes audit.json, and the exclusion list where there is a benchmark.

    Killed, it goes on with what the judge and the decoders have answered.

    Args:
        out: folder of the run.
        options: see there.
        judge_maker: makes the judge; None judges nothing.
        progress: shows how far it is.

    Raises:
        InputError: there is no run, no caption, or an input cannot be used.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    run = _Run(out)
    benchmark = Benchmark.read(options.uvrb) if options.uvrb else None
    index = TextIndex(benchmark.texts, options.thresholds) if benchmark else None
    census = Census(run.options("enrich"), options.seed)
    sample: Drawn[Told] = Drawn(options.sample, options.seed, "judged captions")
    shown: Drawn[Row] = Drawn(options.shown, options.seed, "shown videos")
    matches: list[Match] = []
    with progress("reading", len(run.enriched)) as advance:
        for row in run.enriched:
            census.add(row)
            shown.offer(row["id"], row)
            for told in captions_of(row):
                sample.offer(told.id, told)
            if index:
                matches += find_texts(row, index)
            advance(1)
    report: dict[str, Any] = {
        "version": gve.__version__,
        "run": out.name,
        "finished": run.finished,
        "open_steps": run.open_steps,
        "funnel": run.funnel,
        "captioner": run.captioner,
        "census": census.result(),
        "tasks": run.tasks(),
    }
    verdicts = None
    if judge_maker:
        captioner = judge_maker()
        check = Check(run.media, options.seed, options.prompts)
        verdicts = _judged(out, captioner, check, sample.entries(), progress)
        report["judge"] = {
            "judge": captioner.fingerprint,
            "prompts": dict(check.fingerprint),
            "seed": options.seed,
            "asked": len(verdicts.judged) + sum(verdicts.failed.values()),
            "judged": len(verdicts.judged),
            "silent": sum(not caption["claims"] for caption in verdicts.judged),
            "failed": dict(verdicts.failed),
            "examples": dict(verdicts.examples),
            "tokens": {"read": verdicts.tokens[0], "written": verdicts.tokens[1]},
            "same_model": captioner.fingerprint == run.captioner,
            **verdicts.rates(),
        }
    if benchmark:
        report["contamination"] = _contamination(out, run, options, benchmark, matches, progress)
    replace_file(out / FOLDER / REPORT, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    return Audit(report, shown.entries(), verdicts, run.media)


class _Run:
    """A run as the audit reads it.

    Raises:
        InputError: there is no run, or it has no caption yet.
    """

    def __init__(self, out: Path) -> None:
        watch = Watch(out)
        if "enrich" not in watch.steps:
            raise InputError(f"{out} has no step `enrich`: there are no captions to audit")
        self._folders = {name: StepFolder(out, name) for name in watch.steps}
        self.media = MediaStore(out)
        self.enriched = Rows(self._slices("enrich"))
        if not len(self.enriched):
            raise InputError(f"{out} has no finished captions yet: `gve synth status {out}` says how far it is")
        self.open_steps = [name for name, folder in self._folders.items() if folder.done() is None]
        self.finished = not self.open_steps
        self.funnel = funnel(out, watch.steps)

    def _slices(self, step: str) -> list[Slice]:
        """The finished units of a step, also while others are open."""
        folder = self._folders.get(step)
        if folder is None or not folder.path.is_dir():
            return []
        if folder.done() is not None:
            return folder.slices()
        units = sorted(Survey.of(folder.path).finished)
        return [Slice(folder.path / name, *place) for unit in units for name, *place in folder.manifest(unit)["slices"]]

    def options(self, step: str) -> Mapping[str, Any]:
        """The options that a step was begun with."""
        identity = self._folders[step].identity() if step in self._folders else None
        return identity.fingerprint.get("options", {}) if identity else {}

    @property
    def captioner(self) -> str:
        identity = self._folders["enrich"].identity()
        return str(identity.fingerprint.get("captioner", "")) if identity else ""

    def tasks(self) -> dict[str, Any]:
        shares = self.options("extend").get("tasks", {})
        extended = self._folders.get("extend")
        videos = int(done["tally"]["rows_in"]) if extended and (done := extended.done()) else 0
        return count_tasks(shares, videos, Rows(self._slices("extend")), Rows(self._slices("output")))


def _judged(out: Path, captioner: Captioner, check: Check, sample: Sequence[Told], progress: Progress) -> Verdicts:
    asked = {"judge": captioner.fingerprint, "prompts": dict(check.fingerprint)}
    name = hashlib.sha256(canonical(asked).encode()).hexdigest()[:12]
    with (
        closing(Notes(out / FOLDER / f"replies-{name}.jsonl")) as notes,
        progress("judging", len(sample)) as advance,
    ):
        return judge(sample, captioner, check, notes, partial(advance, 1))


def _contamination(
    out: Path, run: _Run, options: AuditOptions, benchmark: Benchmark, matches: list[Match], progress: Progress
) -> dict[str, Any]:
    """What is shared with the benchmark; writes the exclusion list."""
    faults: dict[str, Counter[str]] = {"benchmark": Counter(), "run": Counter()}
    compared = 0
    if options.videos:
        with closing(Notes(out / FOLDER / "frames.jsonl")) as notes:
            known: dict[str, str] = {}
            with progress("benchmark's videos", len(benchmark.media)) as advance:
                theirs = ((name, partial(_same, medium)) for name, medium in benchmark.media.items())
                for name, signature, fault in hash_all(theirs, notes, options.jobs, partial(advance, 1)):
                    if fault:
                        faults["benchmark"][fault] += 1
                    else:
                        known[name] = signature
            index = FrameIndex(known, options.thresholds)
            with progress("run's videos", len(run.enriched)) as advance:
                for id, signature, fault in _signatures(run, notes, options.jobs, partial(advance, 1)):
                    if fault:
                        faults["run"][fault] += 1
                        continue
                    compared += 1
                    if hit := index.find(signature):
                        matches.append(Match(id, "video", "video", hit[0], round(hit[1], 3)))
    path = options.exclude or out / FOLDER / EXCLUDE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(encode(match.to_dict()) + b"\n" for match in matches), durable=True)
    by_reason = {
        reason: len({match.id for match in matches if match.reason == reason})
        for reason in ("text-ngram", "text-exact", "video")
    }
    return {
        "list": str(path),
        "thresholds": asdict(options.thresholds),
        "benchmark_texts": len(benchmark.texts),
        "benchmark_media": len(benchmark.media),
        "videos": len(run.enriched),
        "videos_compared": compared,
        "excluded": len({match.id for match in matches}),
        "by_reason": by_reason,
        "by_set": dict(Counter(match.match.split("/")[0] for match in matches).most_common()),
        "not_decoded": {name: dict(counts) for name, counts in faults.items()},
        "matches": [match.to_dict() for match in _first_of_each(matches)][:SHOWN_FAULTS],
    }


def _signatures(run: _Run, notes: Notes, jobs: int, advance: Callable[[], object]) -> Iterator[tuple[str, str, str]]:
    """(id, signature, fault) of the run's videos; those that stage 1 has hashed are not decoded again."""
    for row in run.enriched:
        if stored := hash_of_scan(row):
            advance()
            yield row["id"], stored, ""
    unknown = ((row["id"], partial(run.media.video, row["video"])) for row in run.enriched if not hash_of_scan(row))
    yield from hash_all(unknown, notes, jobs, advance)


def _same(medium: Any) -> Any:
    return medium


def _first_of_each(matches: Sequence[Match]) -> Iterator[Match]:
    """One match of each video."""
    seen = set[str]()
    for match in matches:
        if match.id not in seen:
            seen.add(match.id)
            yield match
