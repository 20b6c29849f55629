"""The report page: what it says, that nothing leaves it, and that a browser is content with it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest

from gve.cli import main
from gve.eval.charts import draw_curves, draw_heat_map, to_svg
from gve.eval.gallery import SHEET_PX, Thumbnails, choose_queries, make_gallery
from gve.eval.page import PageOptions, page_data, write_page
from gve.eval.results import read_results, read_runs
from gve.eval.uvrb import SETS, RetrievalSet, UVRBReader
from gve.items import Item
from saved_runs import save_run

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture(scope="module")
def root(toy_world: Path) -> Path:
    return toy_world / "uvrb"


@pytest.fixture(scope="module")
def sets(root: Path) -> list[RetrievalSet]:
    reader = UVRBReader(root)
    return [reader.read(name) for name in reader.names()]


@pytest.fixture(scope="module")
def runs(sets: list[RetrievalSet], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of frames of one model, and another model with a hostile name."""
    folder = tmp_path_factory.mktemp("page runs")
    for frames, noise in ((4, 12.0), (8, 8.0), (16, 5.0)):
        facts = {"setting": {"frames": frames, "tokens": 200}, "inputs": {"sampling": f"uniform({frames})"}}
        save_run(folder / f"frames{frames}", sets, noise, model="toy", weights_hash="a" * 64, root=root, **facts)
    save_run(folder / "other", sets, 7.0, 1, model=HOSTILE, root=root, inputs={"sampling": "uniform(8)"})
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    words = [runs / "frames8", runs / "frames4", runs / "frames16", runs / "other"]
    with pytest.raises(SystemExit) as end:
        main(["uvrb", "report", *map(str, words), "--out", str(path), "--gallery", "1", "--resamples", "200"])
    assert not end.value.code
    return path


class Links(HTMLParser):
    """Everything that a browser would load or follow, and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.loads.append(value or "")
            if key == "id":
                self.ids.append(value or "")


def test_the_page_stands_alone(page: Path) -> None:
    """No address but data and anchors of the page; no file beside it; ids unique, also over charts."""
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.loads
    assert [load for load in links.loads if not load.startswith(("#", "data:"))] == []
    assert all(address.startswith(("data:", "#")) for address in re.findall(r"url\(([^)]*)\)", text))
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(links.ids) == len(set(links.ids))
    assert {load[1:] for load in links.loads if load.startswith("#")} <= set(links.ids)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert page.stat().st_size < 12 << 20


def test_words_of_users_stay_words(page: Path) -> None:
    links = Links()
    links.feed(page.read_text())
    assert links.tags.count("script") == 1
    assert "img" not in links.tags
    assert "&lt;script&gt;alert(" in page.read_text()


def test_stand_ins_never_stand_beside_published_rows(page: Path) -> None:
    text = page.read_text()
    assert "These runs are not comparable with published scores." in text
    tables = re.findall(r'<table class="scores sortable">.*?</table>', text, re.DOTALL)
    assert len(tables) == 4
    for table in tables:
        assert ("GVE-7B" in table) != ("toy (frames 8)" in table)


def test_genuine_runs_stand_beside_published_rows(runs: Path, tmp_path: Path) -> None:
    """The same run with the benchmark's counts in its rows: in one table and one radar with the paper's models."""
    folder = tmp_path / "genuine"
    folder.mkdir()
    data = json.loads((runs / "frames8" / "uvrb.json").read_text())
    for record in SETS:
        row = {"n_query": record.num_queries, "n_corpus": record.num_corpus, "n_candidates": record.num_corpus}
        data["sets"][record.name] |= row
    data["sets"]["MS-TI"]["whole_corpus"] = {**data["sets"]["MS-TI"], "value": 0.123, "interval": [0.1, 0.15]}
    (folder / "uvrb.json").write_text(json.dumps(data))
    write_page(tmp_path / "page.html", [read_results(folder)], PageOptions(gallery=0, resamples=200), progress=False)
    text = (tmp_path / "page.html").read_text()
    tables = re.findall(r'<table class="scores sortable">.*?</table>', text, re.DOTALL)
    assert all("GVE-7B" in table and ">toy<" in table for table in tables[:2])
    assert "MS-TI (whole corpus)" in tables[2]
    assert "GVE-7B" not in tables[2]
    assert "GVE-7B (paper)" in text
    assert "not comparable" not in text


def test_the_published_models_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mteb" / "org__model" / "abc"
    folder.mkdir(parents=True)
    score = {"hf_subset": "default", "main_score": 0.4375, "ndcg_at_10": 0.5, "languages": ["eng-Latn"]}
    result = {"task_name": "SomeT2VRetrieval", "scores": {"test": [score]}, "mteb_version": "2.26.24"}
    (folder / "SomeT2VRetrieval.json").write_text(json.dumps({**result, "dataset_revision": "1"}))
    words = ["--published", "--out", str(tmp_path / "p.html"), "--mteb", str(tmp_path / "mteb")]
    with pytest.raises(SystemExit) as end:
        main(["uvrb", "report", *words])
    assert not end.value.code
    text = (tmp_path / "p.html").read_text()
    assert re.search(r"SomeT2VRetrieval</td>.*>0\.438</td>", text)  # 0.4375; a table apart from UVRB's
    assert "SomeT2VRetrieval" not in "".join(re.findall(r'<table class="scores.*?</table>', text, re.DOTALL))
    assert "0.516*" in capsys.readouterr().out
    for words in ("MLLM-type (10)", "CLIP-type (6)", "all (16)", "GME-2B AVG-A: printed 0.416", "Fisher"):
        assert words in text
    assert 'id="galleries"' not in text


@pytest.mark.parametrize(
    "words", [[], ["--published", "RUN"], ["RUN", "--gallery", "-1"], ["RUN", "--top", "11"], ["nowhere"]]
)
def test_report_refuses_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["uvrb", "report", *(str(runs / "frames8") if word == "RUN" else word for word in words)])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_report_json_says_what_the_page_says(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs / name) for name in ("frames8", "frames4", "frames16")]
    with pytest.raises(SystemExit):
        main(["uvrb", "report", *words, "--json", "--resamples", "200"])
    found = json.loads(capsys.readouterr().out)
    assert [run["label"] for run in found["runs"]] == ["toy (frames 8)", "toy (frames 4)", "toy (frames 16)"]
    assert not any(run["comparable_with_published"] for run in found["runs"])
    assert [pair["model"] for pair in found["comparisons"]] == ["toy (frames 4)", "toy (frames 16)"]
    (curve,) = found["scaling"]
    assert curve["setting"] == "frames"
    assert [point[0] for point in curve["points"]["AVG-D"]] == [4, 8, 16]
    for place, name in enumerate(("frames4", "frames8", "frames16")):
        data = read_results(runs / name).data
        assert curve["points"]["AVG-D"][place][1:] == [data["abilities"]["AVG-D"], *data["ability_intervals"]["AVG-D"]]


def test_a_cross_of_settings_gives_a_curve_for_each(runs: Path, tmp_path: Path) -> None:
    """Frames at 200 tokens and tokens at 8 frames, as the paper's test-time scaling; and no curve of one point."""
    data = json.loads((runs / "frames8" / "uvrb.json").read_text())
    saved = []
    for frames, tokens in ((8, 200), (16, 200), (48, 200), (8, 400), (8, 800)):
        folder = tmp_path / f"{frames}-{tokens}"
        folder.mkdir()
        setting = {"frames": frames, "tokens": tokens, "max_length": 8192}
        (folder / "uvrb.json").write_text(json.dumps({**data, "setting": setting}))
        saved += read_runs(folder)
    found = {curve["series"]: curve for curve in page_data(saved)["scaling"]}
    assert {name: [p[0] for p in curve["points"]["CMP"]] for name, curve in found.items()} == {
        "toy, tokens 200": [8, 16, 48],
        "toy, frames 8": [200, 400, 800],
    }


def pictures(text: str) -> dict[str, str]:
    return dict(re.findall(r"\.(p\d+)\{background-image:url\(data:image/jpeg;base64,([^)]+)\)\}", text))


def test_galleries_show_what_was_found(page: Path, runs: Path, sets: list[RetrievalSet]) -> None:
    """Each set of each model: the instruction, the query's words, the place of its answer; pictures are JPEGs, once."""
    text = page.read_text()
    found = pictures(text)
    assert len(found) == len(set(found.values()))
    for encoded in found.values():
        with PIL.Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert (picture.format, picture.size) == ("JPEG", SHEET_PX)
    used = re.findall(r'<div class="picture (p\d+)"', text)
    assert set(used) == set(found)
    assert len(used) > len(found)
    part = text[text.index('id="galleries"') :]
    score = read_results(runs / "frames8").sets["PEV-K"]
    _, (worst,) = choose_queries(score, 1)
    (tested,) = [tested for tested in sets if tested.record.name == "PEV-K"]
    assert tested.queries[worst].text[:40].replace("'", "&#39;") in part
    assert f"place {score.greater[worst] + 1:,} of {score.row['n_candidates']:,}" in part
    assert part.count("<details") == 2 * len(SETS)  # the other settings of a model are left out


def test_queries_are_chosen_by_their_margin(runs: Path) -> None:
    """Against the definition written out query by query."""
    score = read_results(runs / "frames4").sets["MSRVTT"]
    best, worst = choose_queries(score, 2)
    hits = [row for row in range(len(score.queries)) if score.hits[row] == 1]
    misses = [row for row in range(len(score.queries)) if score.hits[row] < 1]
    assert hits
    assert misses

    def margin(row: int) -> float:
        answers = set(score.positives[row].tolist())
        own = max(s for place, s in zip(score.nearest[row], score.similarities[row], strict=True) if place in answers)
        other = max(
            s for place, s in zip(score.nearest[row], score.similarities[row], strict=True) if place not in answers
        )
        return float(own - other)

    assert best[0] == max(hits, key=margin)
    assert worst[0] in misses
    assert score.greater[worst[0]] == max(score.greater[row] for row in misses)
    assert not set(best) & set(worst)


def test_a_damaged_clip_is_named_and_not_shown(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    PIL.Image.fromarray(np.full((300, 100, 3), 200, np.uint8)).save(tmp_path / "good.png")
    thumbnails = Thumbnails()
    keys = [*thumbnails.want(Item.of(video=bad)), *thumbnails.want(Item.of(image=tmp_path / "good.png"))]
    thumbnails.decode()
    assert thumbnails.failures == {keys[0]: "not-a-video"}
    assert list(thumbnails.pictures) == [keys[1]]


def test_pictures_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gve.eval.gallery.MAX_PICTURE_BYTES", 6000)
    thumbnails = Thumbnails()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (132, 176, 3), np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{number}.png")
        thumbnails.want(Item.of(image=tmp_path / f"{number}.png"))
    thumbnails.decode()
    assert sum(len(base64.b64decode(uri.split(",")[1])) for uri in thumbnails.pictures.values()) <= 6000
    assert len(thumbnails.failures) == 4 - len(thumbnails.pictures) > 0


def test_changed_listings_show_ids_alone(runs: Path, root: Path, tmp_path: Path) -> None:
    saved = read_results(runs / "frames8")
    copy = tmp_path / "uvrb"
    shutil.copytree(root / "MSRVTT" / "jsonl", copy / "MSRVTT" / "jsonl")
    path = copy / "MSRVTT" / "jsonl" / "queries.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "other words ', 1))
    found = {each.name: each for each in make_gallery(saved, copy, Thumbnails(), count=1, top=3)}
    assert "are not those of the run" in found["MSRVTT"].lacks
    assert found["MSRVTT"].best[0].query.text == ""
    assert "CRB-G" in found["CRB-G"].lacks
    without = make_gallery(saved, None, Thumbnails(), count=1, top=3)
    assert all("give --root" in each.lacks for each in without)


def test_charts_are_svg_with_their_numbers() -> None:
    """Well-formed, the same bytes each time, ids of their own; numbers and doubt are written in the cells."""
    values = np.array([[1.0, -0.5], [-0.5, 1.0]])

    def chart(name: str) -> str:
        return to_svg(draw_heat_map(["a", "b"], ["a", "b"], values, values < 0), name, 'of "a" & b')

    assert chart("one") == chart("one")
    tree = ElementTree.fromstring(chart("one"))
    assert tree.get("aria-label") == 'of "a" & b'
    texts = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("\N{MINUS SIGN}0.50") == 2
    first, second = (set(re.findall(r'\bid="([^"]+)"', chart(name))) for name in ("one", "two"))
    assert first
    assert not first & second
    assert "font-style: italic" in chart("one") or "italic" in chart("one")
    curve = draw_curves({"CG": {"m": [(8, 0.5, 0.4, 0.6), (16, 0.6, 0.5, 0.7)]}}, "frames")
    assert [tick.get_text() for tick in curve.axes[0].get_xticklabels()] == ["8", "16"]


def test_a_browser_is_content(page: Path, browser: Any) -> None:
    """1280 px: no error, no request, no sideways scroll; sections are there; tables sort up, down and by words."""
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(page.as_uri(), wait_until="load")
    view.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert view.evaluate("document.documentElement.scrollWidth") <= 1280
    for table in view.query_selector_all(".wide"):
        assert table.evaluate("part => part.scrollWidth <= part.clientWidth + 1"), table.inner_text()[:60]
    for section in ("runs", "scores", "radar", "comparisons", "scaling", "correlations", "slips", "galleries"):
        assert view.locator(f"section#{section}").is_visible(), section
    assert view.locator("#correlations svg").count() == 4
    table = view.locator("table.scores").nth(2)  # the published abilities

    def column(place: int) -> list[str]:
        return table.locator(f"tbody td:nth-child({place})").all_inner_texts()

    before = column(1)
    table.locator("th button", has_text="CMP").click()
    numbers = [float(text) for text in column(6)]
    assert numbers == sorted(numbers, reverse=True)
    assert column(1)[0] == "GME-2B"
    assert column(1) != before
    assert table.locator("th").nth(5).get_attribute("aria-sort") == "descending"
    table.locator("th button", has_text="CMP").click()
    assert column(1)[0] == "CLIP4Clip"
    table.locator("th button", has_text="model").click()
    assert column(1) == sorted(before, key=str.lower)
    assert view.evaluate("getComputedStyle(document.querySelector('.picture')).backgroundImage").startswith(
        'url("data:'
    )
    assert view.title().startswith("UVRB report: toy (frames 8)")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1
    view.close()
