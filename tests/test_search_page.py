"""The page of hits: no name can act, links reach any file, and the players of a browser stand at the moment."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from gve.items import Image, Item, Text, Video
from gve.search.files import VideoFile
from gve.search.index import Hit
from gve.search.page import clock, link, write_page
from tiny_clip import write_video

NAMES = [b"<script>alert(\"1\")<|script> & 'x'.mp4", b"a:b#c?d%20e\nf.mp4", b"\xff\xfe.mp4"]


def hit(path: bytes, start_s: float, end_s: float, score: float = 0.5) -> Hit:
    return Hit(VideoFile(path, 1, 1, "0" * 64, 7.25, 64, 48, 8.0, "h264"), start_s, end_s, score)


def test_times_and_links() -> None:
    assert [clock(value) for value in (0, 9.96, 62.5, 3600, 36610.04)] == [
        "0:00.0", "0:10.0", "1:02.5", "1:00:00.0", "10:10:10.0",
    ]  # fmt: skip
    assert link(b"/v/a b#1.mp4", b"/p") == "./../v/a%20b%231.mp4"
    assert link(b"/p/http:x\xff.mp4", b"/p") == "./http%3Ax%FF.mp4"
    assert link(b"/v/a.mp4", None) == "file:///v/a.mp4"


def test_names_and_questions_are_escaped(tmp_path: Path) -> None:
    item = Item((Image("a.jpg"), Video("b.mp4", span_s=(1.0, 2.0)), Text("</h1><script>alert(2)</script>")))
    hits = [hit(os.fsencode(tmp_path) + b"/" + name, 1.0, 2.5) for name in NAMES]
    page = tmp_path / "pages" / "page.html"
    write_page(page, item, hits, about={"filter": "file LIKE '<b>%'"})
    text = page.read_text()
    assert text.count("<script>") == 1  # the page's own
    assert "alert(2)" in html.unescape(text)
    assert "<b>%" not in text
    sources = re.findall(r'<video [^>]*src="([^"]*)"', text)
    for source, name in zip(sources, NAMES, strict=True):
        path, _, fragment = html.unescape(source).partition("#")
        assert fragment == "t=1.000,2.500"
        found = os.path.normpath(os.fsencode(page.parent) + b"/" + unquote_to_bytes(path))
        assert found == os.fsencode(tmp_path) + b"/" + name
    write_page(page, item, [])
    assert "Nothing was found" in page.read_text()


def test_a_browser_plays_the_moment(browser: Any, tmp_path: Path) -> None:
    """Opened from disk: every player has its file and stands at its moment; nothing acts, nothing exceeds 1280 px."""
    hits = []
    for number, name in enumerate([*NAMES, b"plain.mp4"]):
        path = os.fsencode(tmp_path) + b"/" + name
        os.rename(write_video(tmp_path / "draft.mp4", number, 58), path)
        hits.append(hit(path, 1.0 + number, 2.5 + number))
    (tmp_path / "text.mp4").write_text("no video")
    hits.append(hit(os.fsencode(tmp_path / "text.mp4"), 0.0, 1.0))
    page_file = tmp_path / "page.html"
    write_page(page_file, Item.of("a red circle", instruction="Find it."), hits, about={"index": "/i"})
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(page_file.as_uri())
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every((v, i) => i == 4 ? v.error : v.readyState >= 1)",
        timeout=30000,
    )
    page.wait_for_function("() => [...document.querySelectorAll('video')].slice(0, 4).every(v => v.currentTime >= 1)")
    times = page.evaluate("[...document.querySelectorAll('video')].map(v => v.currentTime)")
    assert times[:4] == pytest.approx([1.0, 2.0, 3.0, 4.0], abs=0.13)
    assert page.evaluate("[...document.querySelectorAll('.unplayable')].map(e => e.offsetHeight > 0)") == [
        False, False, False, False, True,
    ]  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert wrong == []
    if folder := os.environ.get("GVE_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / "search.png"), full_page=True)
    page.close()
