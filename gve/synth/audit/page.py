"""The audit as one HTML page that needs nothing but itself: numbers, charts, and videos with their captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gve.eval.charts import to_svg
from gve.eval.gallery import Thumbnails
from gve.eval.results import write_whole
from gve.synth.audit.charts import draw_cues, draw_funnel, draw_lengths, draw_rates, draw_shares, draw_tasks
from gve.synth.audit.judge import captions_of
from gve.synth.audit.run import Audit
from gve.synth.units import Row
from gve.video import MediaError

PAGE = "audit.html"
TEXT_SHOWN = 900  # characters of a caption


def write_page(path: Path, audit: Audit, jobs: int = 2) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the page.
        audit: what was found.
        jobs: threads that wait for the decoders of thumbnails.
    """
    thumbnails = Thumbnails(jobs)
    claims = {caption["id"]: caption["claims"] for caption in (audit.verdicts.judged if audit.verdicts else ())}
    samples = [_sample(row, audit, claims, thumbnails) for row in _chosen(audit)]
    thumbnails.decode()
    content = {
        **{key: audit.report.get(key) for key in ("judge", "contamination")},
        **audit.report,
        "charts": _charts(audit.report),
        "samples": samples,
        "thumbnails": thumbnails,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("gve.synth.audit").joinpath("page.html.j2").read_text())
    write_whole(path, template.render(content).encode("utf-8", "replace"))


def _chosen(audit: Audit) -> list[Row]:
    return list(audit.shown)


def _charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    census = report["census"]
    figures: dict[str, tuple[Any, str]] = {
        "funnel": (draw_funnel(report["funnel"]["steps"]), "Rows in and out of each step"),
        "profiles": (draw_shares(census["profiles"]), "Shares of the information profiles"),
    }
    for key, shares in census["levels"].items():
        figures[key] = draw_shares(shares), f"Shares of the levels of {key}"
    for of, styles in census["styles"].items():
        if styles:
            figures[f"lengths-{of}"] = draw_lengths(styles), f"Words of the captions of each {of} by style"
    if census["cues"]:
        figures["cues"] = draw_cues(census["cues"]), "Spatial, temporal and theme words by profile"
    if report["tasks"]:
        figures["tasks"] = draw_tasks(report["tasks"]), "Pairs of each task"
    if judged := report.get("judge"):
        figures["rates-kind"] = draw_rates({"all": judged["all"], **judged["by_kind"]}), "False claims by kind"
        figures["rates-style"] = draw_rates(judged["by_style"]), "False claims by style"
    return {name: Markup(to_svg(figure, name, said)) for name, (figure, said) in figures.items()}


def _sample(row: Row, audit: Audit, claims: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """One video with its frame and everything that is said of them."""
    captions = defaultdict(list)
    for told in captions_of(row):
        text = told.text if len(told.text) <= TEXT_SHOWN else told.text[:TEXT_SHOWN].rsplit(" ", 1)[0] + " ..."
        captions[told.of].append({"style": told.style, "text": text, "claims": claims.get(told.id)})
    parts = [("video", {"video": row["video"]})]
    if frame := row["enrichment"].get("frame"):
        parts.append(("frame", {"image": frame["image"]}))
    shown = []
    for of, part in parts:
        try:
            keys: tuple[str, ...] = thumbnails.want(audit.media.item([part]))
        except MediaError as error:  # its tar is damaged
            keys = ()
            thumbnails.failures.setdefault(row["id"], error.reason)
        shown.append({"of": of, "picture": keys[0] if keys else row["id"], "captions": captions[of]})
    enrichment = row["enrichment"]
    return {
        "id": row["id"],
        "caption": row["caption"][:TEXT_SHOWN],
        "profile": ", ".join(str(enrichment[key]) for key in ("profile", "readability", "education")),
        "shown": shown,
        "composed": enrichment.get("composed", {}),
    }
