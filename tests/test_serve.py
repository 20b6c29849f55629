"""`gve serve`: what it finds is what the index finds, and it gives nothing else away, to nobody else."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

from gve.cli import main
from gve.encode.encoder import BackboneEncoder, Encoded, decoded
from gve.encode.pretrained import load_encoder
from gve.items import Item, Text
from gve.search.files import file_id_of, printable
from gve.search.index import Hit, Index, IndexRecord
from gve.search.query import ask, make_query
from gve.search.windows import Windows
from gve.serve.app import Server
from gve.serve.engine import Busy, Engine
from gve.serve.gate import Gate
from gve.serve.library import Library
from gve.video import Sampling, decode
from search_runs import Colours, bring_up, record
from tiny_clip import write_video

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [b"<img src=x onerror=alert(1)>.mp4", b"line\nbreak' OR 1=1 --.mp4", b"\xff\xfe&amp;.mp4"]
WEIGHTS = str(ROOT / "gve/toy/weights")
MEBI = 2**20


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server in a thread of this process."""

    port: int
    uri: Path
    folder: Path

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        told = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return told

    def search(self, **fields: Any) -> Answer:
        return self.ask("POST", "/api/search", json.dumps(fields).encode(), Content_Type="application/json")

    def form(self, files: Sequence[tuple[str, bytes]], **fields: str) -> Answer:
        edge = b"--edge\r\nContent-Disposition: form-data; "
        parts = [edge + f'name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
        parts += [edge + f'name="media"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n" for name, data in files]
        body = b"".join(parts) + b"--edge--\r\n"
        return self.ask("POST", "/api/search", body, Content_Type="multipart/form-data; boundary=edge")


@contextmanager
def serving(uri: Path, folder: Path, encoder: Any = None, token: str = "", upload: int = MEBI) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine = Engine(encoder or Colours())
    server = Server(Library(str(uri), engine.encoder.fingerprint), engine, model="colours", max_upload_bytes=upload)

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.application(Gate("127.0.0.1", token)), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield Running(runner.addresses[0][1], uri, folder)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An index of three short videos with hostile names, a long one, and one that no browser plays."""
    root = tmp_path_factory.mktemp("served")
    folder = root / "v"
    folder.mkdir()
    for number, name in enumerate(HOSTILE):
        os.rename(write_video(folder / "draft.mp4", number, 16), os.fsencode(folder) + b"/" + name)
    write_video(folder / "long.mp4", 50, 58)
    with av.open(str(folder / "old.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(16):
            green = np.full((48, 64, 3), (20, 160, 40), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(green, format="rgb24")))
        container.mux(stream.encode())
    for name in os.listdir(folder):
        os.utime(folder / name, (1_700_000_000,) * 2)
    (folder / "long.mp4.gz").write_bytes(b"not indexed")
    (root / "secret.mp4").write_bytes((folder / "long.mp4").read_bytes())
    bring_up(root / "index", folder)
    return root / "index", folder


@pytest.fixture(scope="module")
def server(world: tuple[Path, Path]) -> Iterator[Running]:
    with serving(*world) as running:
        yield running


@pytest.fixture
def changing(world: tuple[Path, Path], tmp_path: Path) -> Iterator[Running]:
    """A server of its own over copies, for tests that change files."""
    folder = Path(shutil.copytree(world[1], tmp_path / "v"))
    bring_up(tmp_path / "index", folder)
    with serving(tmp_path / "index", folder) as running:
        yield running


def frame_of(path: Path, number: int) -> bytes:
    """A frame as PNG."""
    file = io.BytesIO()
    PIL.Image.fromarray(decode(path, Sampling.uniform(58)).pixels[number]).save(file, "PNG")
    return file.getvalue()


def told(answer: Answer) -> list[tuple[str, float, float]]:
    return [(hit["id"], hit["start_s"], hit["end_s"]) for hit in answer.json["hits"]]


def wanted(hits: Sequence[Hit]) -> list[tuple[str, float, float]]:
    return [(hit.file.file_id, hit.start_s, hit.end_s) for hit in hits]


# What is found -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_index_and_hold_no_path(server: Running) -> None:
    index, encoder = Index.open(server.uri), Colours()
    answer = server.search(text="a red circle", k=5)
    hits = ask(index, encoder, make_query("a red circle"), 5)
    assert told(answer) == wanted(hits)
    assert [hit["score"] for hit in answer.json["hits"]] == pytest.approx([hit.score for hit in hits], abs=1e-6)
    assert {hit["folder"] for hit in answer.json["hits"]} == {"v"}
    assert str(server.folder.parent).encode() not in answer.body
    other = server.search(text="a blue square", k=5)
    assert told(other) == wanted(ask(index, encoder, make_query("a blue square"), 5)) != told(answer)


def test_uploads_are_what_a_file_is_and_are_deleted(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, encoder, long = Index.open(server.uri), Colours(), server.folder / "long.mp4"
    (tmp_path / "up").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "up"))
    picture = tmp_path / "frame.png"
    picture.write_bytes(frame_of(long, 20))
    answer = server.form([("../../frame.png", picture.read_bytes())])
    assert told(answer) == wanted(ask(index, encoder, make_query(image=picture), 12))
    clip = server.form([("x", long.read_bytes())], k="3")  # no name tells what it is
    assert told(clip) == wanted(ask(index, encoder, make_query(clip=long), 3))
    hit = clip.json["hits"][0]
    assert hit["id"] == file_id_of(os.fsencode(long))
    like = server.search(like=hit["id"], like_start_s=2.0, like_end_s=4.0, k=2)
    assert told(like) == wanted(ask(index, encoder, make_query(clip=f"{long}@2-4"), 2))
    assert told(like)[0] == (hit["id"], 2.0, 4.0)
    assert server.form([("x.png", b"no picture")]).status == 400
    assert os.listdir(tmp_path / "up") == []


def test_filters_are_values_and_never_conditions(server: Running) -> None:
    def count(**fields: Any) -> int:
        return len(server.search(text="x", k=100, **fields).json["hits"])

    long = {hit["id"] for hit in server.search(text="x", k=100, min_duration_s=5).json["hits"]}
    assert long == {file_id_of(os.fsencode(server.folder / "long.mp4"))}
    every = count()
    assert count(max_duration_s=5) == every - len(server.search(text="x", k=100, min_duration_s=5).json["hits"])
    assert count(min_height_px=49) == 0
    assert count(name="LONG.mp4") == count(min_duration_s=5)
    assert count(name="break' OR 1=1 --") == 1
    for name in ("' OR 1=1 --", "%", "_____", "\\", "') OR (1=1"):
        assert count(name=name) == sum(name in printable(own) for own in HOSTILE) < every


def test_what_is_indexed_later_is_found_and_another_model_is_refused(changing: Running) -> None:
    before = len(changing.search(text="x", k=100).json["hits"])
    write_video(changing.folder / "later.mp4", 9, 16)
    bring_up(changing.uri, changing.folder)
    answer = changing.search(text="x", k=100)
    assert len(answer.json["hits"]) == before + 1
    later = file_id_of(os.fsencode(changing.folder / "later.mp4"))
    assert changing.ask("GET", f"/media/{later}").status == 200  # too young for its time: known by its content
    shutil.rmtree(changing.uri)
    Index.create(changing.uri, IndexRecord("other", "f" * 64, Colours.dim, windows=Windows(2.0, 1.0)))
    answer = changing.search(text="x")
    assert (answer.status, "another model" in answer.json["error"]["message"]) == (503, True)
    assert record().fingerprint == Colours.fingerprint


# What is handed out ------------------------------------------------------------------------------------------------


def test_media_are_handed_out_in_ranges(server: Running) -> None:
    """RFC 9110, section 14: first to last byte, open end, the last so many, and none."""
    data = (server.folder / "long.mp4").read_bytes()
    path = f"/media/{file_id_of(os.fsencode(server.folder / 'long.mp4'))}"
    whole = server.ask("GET", path)
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, data, "video/mp4")
    assert whole.headers["content-security-policy"].startswith("sandbox")
    size = len(data)
    for asked, first, last in (
        ("0-9", 0, 9),
        ("100-", 100, size - 1),
        ("-5", size - 5, size - 1),
        ("7-9999999", 7, size - 1),
    ):
        part = server.ask("GET", path, Range=f"bytes={asked}")
        assert (part.status, part.body) == (206, data[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    for wrong in (f"{size}-", "5-2", "x", "0-1,3-4"):
        part = server.ask("GET", path, Range=f"bytes={wrong}")
        assert (part.status, part.headers["content-range"]) == (416, f"bytes */{size}")
    assert server.ask("GET", path, Range="bytes=0-9", If_Range=whole.headers["etag"]).status == 206
    assert server.ask("GET", path, Range="bytes=0-9", If_Range='"older"').body == data
    head = server.ask("HEAD", path)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(size))
    # aiohttp's own file response would give the neighbour `long.mp4.gz`, which is not indexed.
    assert server.ask("GET", path, Accept_Encoding="gzip").body == data


def test_nothing_but_indexed_files(server: Running) -> None:
    secret = server.folder.parent / "secret.mp4"
    own = file_id_of(os.fsencode(server.folder / "long.mp4"))
    for path in (
        f"/media/{file_id_of(os.fsencode(secret))}", "/media/../../../etc/passwd", "/media/..%2f..%2fsecret.mp4",
        "/media/%2e%2e/secret.mp4", f"/media/{own.upper()}", f"/media/{own}%00", f"/media/{own}'%20OR%20'1'='1",
        f"/media/{own}/../{own[:-1]}", "/media/", "/media", "/", "/page.py", "/../gve/serve/app.py", f"//media/{own}x",
    ):  # fmt: skip
        answer = server.ask("GET", path)
        assert answer.status == (200 if path == "/" else 404), path
        assert b"root:" not in answer.body
    assert server.ask("GET", f"/poster/{file_id_of(os.fsencode(secret))}?t=0").status == 404
    assert server.search(like=file_id_of(os.fsencode(secret))).status == 404
    assert server.ask("PUT", f"/media/{own}").status == 405


def test_a_file_that_changed_is_gone(changing: Running) -> None:
    long = changing.folder / "long.mp4"
    path = f"/media/{file_id_of(os.fsencode(long))}"
    os.utime(long, (1_800_000_000,) * 2)
    assert changing.ask("GET", path).status == 200  # another time, the same content
    data = bytearray(long.read_bytes())
    data[-1] ^= 1
    long.write_bytes(data)
    assert changing.ask("GET", path).status == 410
    assert changing.ask("GET", path.replace("media", "poster") + "?t=1").status == 410
    long.unlink()
    os.symlink("/etc/passwd", long)
    assert changing.ask("GET", path).status == 410
    long.unlink()
    os.mkfifo(long)
    assert changing.ask("GET", path).status == 410
    long.unlink()
    assert changing.ask("GET", path).status == 410
    assert changing.search(text="x").status == 200


def test_posters_are_frames_of_the_moment(server: Running) -> None:
    long = server.folder / "long.mp4"
    every = decode(long, Sampling.uniform(58)).pixels.astype(int)
    for start_s, number in ((2.0, 16), (5.0, 40), (99.0, 50)):  # 8 frames a second; the end is a second before it
        answer = server.ask("GET", f"/poster/{file_id_of(os.fsencode(long))}?t={start_s}")
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        seen = np.asarray(PIL.Image.open(io.BytesIO(answer.body)).convert("RGB"), int)
        apart = np.abs(every - seen).mean((1, 2, 3))
        assert int(apart.argmin()) == number
    for wrong in ("nan", "-1", "x", "1e99"):
        assert server.ask("GET", f"/poster/{'0' * 32}?t={wrong}").status == 400


# Who may ask -------------------------------------------------------------------------------------------------------


def test_other_names_and_other_pages_are_refused(server: Running) -> None:
    port = server.port
    for host, status in (
        (f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("localhost:9", 200), (f"[::1]:{port}", 200),
        ("evil.example", 403), (f"evil.example:{port}", 403), ("127.0.0.1.evil.example", 403), ("192.168.0.9", 403),
        ("", 403), ("[", 403),
    ):  # fmt: skip
        assert server.ask("GET", "/", Host=host).status == status, host
    body = json.dumps({"text": "x"}).encode()
    own = f"http://127.0.0.1:{port}"
    for headers, status in (
        ({"Origin": own}, 200), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{port + 1}"}, 403), ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403), ({"Sec_Fetch_Site": "same-site"}, 403),
    ):  # fmt: skip
        answer = server.ask("POST", "/api/search", body, **headers)
        assert answer.status == status, headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert server.ask("GET", "/", **link).status == 200  # who follows a link
    assert server.ask("GET", "/", **{**link, "Sec_Fetch_Dest": "iframe"}).status == 403
    assert server.ask("GET", "/api/index", **link).status == 403
    for path in ("/", "/page.js", "/nothing", "/health"):
        headers = server.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_a_token_is_asked_for_everywhere(world: tuple[Path, Path]) -> None:
    with serving(*world, token="s3cret") as server:
        media = f"/media/{file_id_of(os.fsencode(server.folder / 'long.mp4'))}"
        for path in ("/", "/page.js", "/api/index", "/v1/models", media):
            assert server.ask("GET", path).status == 401
            assert server.ask("GET", path, Authorization="Bearer wrong").status == 401
            assert server.ask("GET", path, Authorization="Bearer s3cret").status == 200
        assert server.ask("GET", "/health").status == 200
        assert server.search(text="x").status == 401
        assert server.ask("GET", "/?token=wrong").status == 401
        entered = server.ask("GET", "/?token=s3cret")
        assert (entered.status, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert server.ask("GET", media, Cookie=cookie.partition(";")[0]).status == 200
        assert server.ask("GET", media, Cookie="gve=s3cret").status == 401


def test_names_of_a_public_server() -> None:
    public, local = Gate("0.0.0.0", "t", ["videos.example"]), Gate("127.0.0.1")
    assert [public.knows(name) for name in ("192.168.0.9:80", "videos.example", "evil.example")] == [True, True, False]
    assert [local.knows(name) for name in ("192.168.0.9:80", "videos.example", "127.0.0.1")] == [False, False, True]


# What is refused ---------------------------------------------------------------------------------------------------


def test_bad_questions_are_refused_in_one_line(server: Running) -> None:
    for fields, word in (
        ({}, "nothing is asked"), ({"text": 5}, "string"), ({"text": "x", "k": 0}, "k 0"),
        ({"text": "x", "k": "1e9"}, "k 1e+09"),
        ({"text": "x", "k": "nan"}, "k"), ({"text": "x", "where": "1=1"}, "'where' is unknown"),
        ({"text": "x" * 200_001}, "letters"), ({"text": "x", "min_height_px": "tall"}, "no number"),
        ({"like": file_id_of(os.fsencode(server.folder / "long.mp4")), "like_start_s": 5, "like_end_s": 4}, "span"),
    ):  # fmt: skip
        answer = server.search(**fields)
        assert (answer.status, word in answer.json["error"]["message"]) == (400, True), answer.body
        assert "\n" not in answer.json["error"]["message"]
    post = {"Content_Type": "application/json"}
    assert server.ask("POST", "/api/search", b'{"text": "\\ud800"}', **post).status == 400
    assert server.ask("POST", "/api/search", b"[1]", **post).status == 400
    assert server.ask("POST", "/api/search", b"{", **post).status == 400
    assert server.ask("POST", "/api/search", b"junk", Content_Type="multipart/form-data; boundary=e").status == 400
    picture = frame_of(server.folder / "long.mp4", 0)
    assert "more than 2" in server.form([("a", picture)] * 3).json["error"]["message"]
    assert "neither" not in server.form([("a", picture)] * 2).json
    truncated = (server.folder / "long.mp4").read_bytes()[:3000]
    for data in (b"", b"GIF89a", truncated, b"\x00" * 5000, b"<script>"):
        assert server.form([("a.mp4", data)]).status == 400


def test_uploads_are_measured(server: Running) -> None:
    """Refused by the announced length, and while it arrives where none is announced."""
    assert server.form([("a.mp4", b"\0" * (2 * MEBI + 10))]).status == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    part = b'--e\r\nContent-Disposition: form-data; name="media"; filename="a"\r\n\r\n'
    pieces = iter([part, *[b"\0" * 65536] * 24, b"\r\n--e--\r\n"])
    headers = {"Content-Type": "multipart/form-data; boundary=e"}
    connection.request("POST", "/api/search", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_bad_embedding_requests_are_refused(server: Running) -> None:
    def content(kind: str, url: Any) -> dict[str, Any]:
        return {"input": [[{"type": kind, kind: {"url": url}}]]}

    data = "data:image/png;base64," + base64.b64encode(frame_of(server.folder / "long.mp4", 0)).decode()
    for body, word in (
        ([], "object"), ({}, "either"), ({"input": []}, "not empty"), ({"input": "x", "messages": []}, "either"),
        ({"input": [1, 2]}, "token ids"), ({"input": [[1, 2]]}, "token ids"), ({"input": [None]}, "input[0]"),
        ({"input": "x", "dimensions": 8}, "dimensions"), ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "extra": 1}, "'extra' is unknown"), ({"input": ""}, "empty"), ({"input": ["x"] * 2049}, "2048"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "2 turns"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "user"),
        (content("image_url", "http://169.254.169.254/latest"), "Nothing is fetched"),
        (content("image_url", "file:///etc/passwd"), "Nothing is fetched"),
        (content("image_url", "data:image/png;base64,%%"), "no valid base64"),
        (content("image_url", "data:image/png,x"), "must be in base64"),
        (content("image_url", "data:image/png;base64,AAAA"), "part 0"), (content("video_url", data), "holds a image"),
        (content("video_url", "data:video/jpeg;base64,AA,AA"), "frames"), (content("audio_url", data), "audio_url"),
    ):  # fmt: skip
        answer = server.ask("POST", "/v1/embeddings", json.dumps(body).encode())
        assert (answer.status, word in answer.json["error"]["message"]) == (400, True), answer.body
        assert answer.json["error"]["type"] == "invalid_request_error"
    assert server.ask("POST", "/v1/embeddings", b'{"model": "gpt-4", "input": "x"}').status == 404
    assert server.ask("POST", "/v1/embeddings", b"[" * 100_000).status == 400


# The line before the model -----------------------------------------------------------------------------------------


class Slow(Colours):
    """Waits until it is let go; fails on the word "bad"."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.begun = threading.Event(), threading.Event()
        self.calls: list[int] = []

    def encode(self, items: Sequence[Item], **options: Any) -> Encoded:
        self.begun.set()
        self.go.wait(30)
        self.calls.append(len(items))
        if any(item.text == "bad" for item in items):
            raise RuntimeError("out of memory")
        return super().encode(items, **options)


def test_the_line_is_bounded_and_each_is_told_of_its_own() -> None:
    encoder = Slow()
    engine = Engine(encoder, waiting=4)

    async def run() -> list[Any]:
        first = asyncio.ensure_future(engine.encode([Item((Text("first"),))]))
        await asyncio.to_thread(encoder.begun.wait, 30)
        words = (["a"], ["b", "c"], ["bad"], ["left"])
        waiting = [asyncio.ensure_future(engine.encode([Item((Text(own),)) for own in some])) for some in words]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="4 requests"):
            await engine.encode([Item((Text("late"),))])
        waiting[3].cancel()
        await asyncio.sleep(0)
        encoder.go.set()
        return await asyncio.gather(first, *waiting, return_exceptions=True)

    done = asyncio.run(run())
    plain = Colours().encode([Item((Text(own),)) for own in ("first", "a", "b", "c")]).vectors
    assert (done[0].vectors == plain[:1]).all()
    assert (done[1].vectors == plain[1:2]).all()
    assert (done[2].vectors == plain[2:]).all()
    assert isinstance(done[3], RuntimeError)
    assert isinstance(done[4], asyncio.CancelledError)
    assert encoder.calls == [1, 4, 1, 2, 1]  # alone, then together, then each alone as one of them failed
    engine.close()
    with pytest.raises(Busy):
        asyncio.run(engine.encode([Item((Text("x"),))]))


def test_a_full_line_and_a_failing_model_are_told(world: tuple[Path, Path]) -> None:
    encoder = Slow()
    with serving(*world, encoder=encoder) as server:
        encoder.go.set()
        answer = server.search(text="bad")
        assert (answer.status, "memory" in answer.json["error"]["message"]) == (500, False)
        assert server.search(text="good").status == 200
        encoder.go.clear()
        encoder.begun.clear()
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(server.search(text="good"))) for _ in range(34)]
        threads[0].start()
        assert encoder.begun.wait(30)  # alone: what comes together would be encoded together
        for thread in threads[1:]:
            thread.start()
        until(lambda: bool(answers))  # 1 is encoded, 32 wait, the next one is sent away
        assert (answers[0].status, answers[0].headers["retry-after"]) == (503, "1")
        assert server.ask("GET", "/health").status == 200
        encoder.go.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * 33 + [503]


def until(condition: Any, seconds: float = 30.0) -> None:
    """Waits; a page's policy forbids what a browser's own waiting would evaluate."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_refuses(world: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(*world) as busy:
        for words, word in (
            ([tmp_path / "none"], "no index"), ([world[0], "--host", "0.0.0.0"], "--token"),
            ([world[0], "--port", "70000"], "--port"), ([world[0], "--port", busy.port], "another --port"),
            ([world[0], "--max-upload-mib", "0"], "--max-upload-mib"),
            ([world[0], "--port", "0", "--model", WEIGHTS], "do not compare"),
        ):  # fmt: skip
            with pytest.raises(SystemExit) as end:
                main(["serve", *map(str, words)])
            err = capsys.readouterr().err.splitlines()
            assert (end.value.code, word in err[-1]) == (2, True), err


def test_embeddings_are_those_of_the_encoder(world: tuple[Path, Path], tmp_path: Path) -> None:
    """The toy model on text, picture, video and a mix of them, as numbers and as bytes; tokens as they are counted."""
    long = world[1] / "long.mp4"
    encoder = load_encoder(WEIGHTS, inputs={"sampling": Sampling.uniform(8)})
    assert isinstance(encoder, BackboneEncoder)
    picture = frame_of(long, 3)
    (tmp_path / "p.png").write_bytes(picture)

    def data(kind: str, content: bytes) -> dict[str, Any]:
        url = f"data:{kind}/x;base64,{base64.b64encode(content).decode()}"
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}

    turn = [data("video", long.read_bytes()), {"type": "text", "text": "it"}]
    composed = Item.of("it", video=long, instruction="Find it.")
    bodies: list[tuple[dict[str, Any], list[Item]]] = [
        ({"input": "a red circle"}, [Item.of("a red circle")]),
        ({"input": ["a red circle", "two"], "model": "colours"}, [Item.of("a red circle"), Item.of("two")]),
        ({"input": [[data("image", picture)]]}, [Item.of(image=tmp_path / "p.png")]),
        ({"messages": [{"role": "user", "content": turn}], "instruction": "Find it."}, [composed]),
    ]
    with serving(*world, encoder=encoder) as server:
        for body, items in bodies:
            want = encoder.encode(items)
            counts = [len(encoder.builder.prepare(decoded(item, encoder.builder.policy)).ids) for item in items]
            for form in ("float", "base64"):
                request = json.dumps({**body, "encoding_format": form}).encode()
                answer = server.ask("POST", "/v1/embeddings", request)
                assert answer.status == 200, answer.body
                rows = [row["embedding"] for row in answer.json["data"]]
                if form == "base64":
                    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
                assert np.abs(np.array(rows, np.float32) - want.vectors).max() < 1e-6
                assert answer.json["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        plain = encoder.encode([Item.of("it", video=long)]).vectors  # without its instruction it is another
        assert np.abs(plain - want.vectors).max() > 1e-3


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(world: tuple[Path, Path], tmp_path: Path) -> None:
    setting = {"frames": 8, "tokens": 200, "max_length": 8192}
    encoder = load_encoder(
        WEIGHTS, inputs={"sampling": Sampling.uniform(8), "max_frame_tokens": 200, "max_length": 8192}
    )
    Index.create(tmp_path / "index", IndexRecord(WEIGHTS, encoder.fingerprint, encoder.dim, setting=setting))
    process = subprocess.Popen(
        [sys.executable, "-m", "gve", "serve", str(tmp_path / "index"), "--port", "0", "--token"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "GVE_TOKEN": "t0"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.endswith("/?token=t0\n")
        server = Running(int(said.rpartition(":")[2].partition("/")[0]), world[0], world[1])
        request = json.dumps({"input": "a red circle"}).encode()
        assert server.ask("POST", "/v1/embeddings", request).status == 401
        answer = server.ask("POST", "/v1/embeddings", request, Authorization="Bearer t0").json
        want = encoder.encode([Item.of("a red circle")]).vectors[0]
        assert np.abs(np.array(answer["data"][0]["embedding"], np.float32) - want).max() < 1e-6
        assert answer["model"] == "weights"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(server: Running, browser: Any) -> None:
    """A typed and a dropped question; players at their moments; names that cannot act; a file that does not play."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if f":{server.port}/" not in request.url
            and not request.url.startswith(("blob:", "data:")) else None)  # fmt: skip
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.keyboard.press("/")  # typed, as the words have the focus already
    page.keyboard.press("Backspace")
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    hits = server.search(text="a red circle", k=12).json["hits"]
    assert page.evaluate("[...document.querySelectorAll('.name')].map(e => e.textContent)") == [
        f"v/{hit['name']}" for hit in hits
    ]
    assert page.evaluate("document.querySelectorAll('.name *, article script').length") == 0
    assert len(hits) >= 5

    def players() -> list[Any]:
        return page.evaluate(
            "[...document.querySelectorAll('article')].map(a => a.querySelector('video')).map("
            "v => v && v.readyState >= 1 && !v.seeking ? v.currentTime : null)"
        )

    starts = [None if hit["codec"] == "mpeg4" else hit["start_s"] for hit in hits]
    assert None in starts
    assert any(starts)
    until(lambda: players() == pytest.approx(starts, abs=0.13))
    unplayable = page.locator("article", has_text="old.mp4")
    until(lambda: "cannot play" in unplayable.inner_text())
    until(lambda: unplayable.locator("img").evaluate("i => i.naturalWidth") == 64)
    assert unplayable.locator("img").evaluate(PIXEL) == pytest.approx([20, 160, 40], abs=12)
    page.locator("article").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('article')].indexOf(document.activeElement)") == 1

    picture = base64.b64encode(frame_of(server.folder / "long.mp4", 40)).decode()
    drop = page.evaluate_handle(
        "text => { const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)); const moved = new DataTransfer();"
        "moved.items.add(new File([bytes], '<b>frame</b>.png', {type: 'image/png'})); return moved; }",
        picture,
    )
    page.fill("#text", "")
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": drop})
    page.wait_for_selector(".part:has-text('<b>frame</b>.png')")
    best = server.form([("a.png", base64.b64decode(picture))]).json["hits"][0]
    until(lambda: page.locator(".score").first.inner_text() == f"{best['score']:.3f}")
    assert best["name"] == "long.mp4"
    assert best["start_s"] <= 5.0 < best["end_s"]
    until(lambda: players()[0] == pytest.approx(best["start_s"], abs=0.13))
    assert page.locator(".part img").evaluate("i => i.naturalWidth") == 64
    page.keyboard.press("Escape")
    assert page.locator(".part").count() == 0
    page.click("#go")
    assert "Write something" in page.inner_text("#said")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert wrong == []
    if folder := os.environ.get("GVE_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / "serve.png"), full_page=True)
    page.close()


PIXEL = """image => {
  const canvas = document.createElement("canvas");
  const brush = canvas.getContext("2d");
  brush.drawImage(image, 0, 0);
  return [...brush.getImageData(30, 20, 1, 1).data].slice(0, 3);
}"""
