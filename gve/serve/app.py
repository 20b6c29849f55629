"""The routes: page, search, media, posters, embeddings."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from gve.encode.encoder import Encoded
from gve.items import InputError, Item
from gve.search.files import VideoFile, printable
from gve.search.index import Hit
from gve.serve.engine import Busy, Engine
from gve.serve.gate import Gate, Handler, add_headers
from gve.serve.library import Gone, Library, Remade, Unknown, content_type
from gve.serve.openai import NoModel, answer, models, read_request
from gve.serve.questions import item_of, moment_of, read_question

logger = logging.getLogger(__name__)

JSON_BYTES = 64 << 20
"""The largest body of the embeddings route: its media are inside it."""
OPENING = 2
"""Uploads and posters that are decoded at a time, each in a child process of its own."""
WAITING_TO_OPEN = 32
ANSWER_S = 300.0
"""The longest a request may take once it has arrived, in seconds."""
_CHUNK = 1 << 18
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_Result = TypeVar("_Result")


class Server:
    """State and handlers of the application.

    Args:
        library: indexed files.
        engine: the model.
        model: its name in answers; no path.
        max_upload_bytes: of the media of one question.
    """

    def __init__(self, library: Library, engine: Engine, *, model: str, max_upload_bytes: int) -> None:
        self.library, self.engine = library, engine
        self.model, self.max_upload_bytes = model, max_upload_bytes
        self.since = time.time()
        self._opening = ThreadPoolExecutor(OPENING, thread_name_prefix="gve-open")
        self._waiting = 0
        self._page = {
            path: (files("gve.serve").joinpath(name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()
        }

    def application(self, gate: Gate) -> web.Application:
        """The routes behind a gate."""
        app = web.Application(middlewares=[say_errors, gate.middleware], client_max_size=JSON_BYTES)
        app.on_response_prepare.append(add_headers)
        app.on_cleanup.append(self._close)
        app.add_routes(
            [
                *(web.get(path, self.page) for path in self._page),
                web.get("/health", self.health),
                web.get("/api/index", self.about),
                web.post("/api/search", self.search),
                web.get("/media/{id}", self.media),
                web.get("/poster/{id}", self.poster),
                web.get("/v1/models", self.models),
                web.post("/v1/embeddings", self.embeddings),
            ]
        )
        return app

    async def _close(self, app: web.Application) -> None:
        self._opening.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)

    async def page(self, request: web.Request) -> web.Response:
        body, kind = self._page[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def about(self, request: web.Request) -> web.Response:
        """What is searched, for the foot of the page."""
        index = await asyncio.to_thread(self.library.index)
        facts = {
            "model": self.model,
            "windows": await asyncio.to_thread(len, index),
            "cut": str(index.record.windows),
            "max_upload_mib": self.max_upload_bytes / 2**20,
        }
        return web.json_response(facts)

    async def search(self, request: web.Request) -> web.Response:
        """Moments for a question, best first."""
        with tempfile.TemporaryDirectory(prefix="gve-upload-") as folder:
            asked = await read_question(request, Path(folder), self.max_upload_bytes)
            where, k = asked.where, asked.k
            moment = None
            if like := asked.fields.get("like"):
                file, handle = await asyncio.to_thread(self.library.open, str(like))
                handle.close()
                moment = moment_of(asked, file.path, file.duration_s)
            start = time.monotonic()
            # Words do not wait behind what others have to open.
            item = await self._opened(item_of, asked, moment) if asked.uploads else item_of(asked, moment)
            encoded = await self._encode([item])
        if 0 in encoded.failures:
            raise InputError(f"the question cannot be read: {encoded.failures[0]}")
        embedded = time.monotonic()
        hits = await asyncio.to_thread(self.library.search, encoded.vectors[0], k, where)
        seconds = {"embed_s": round(embedded - start, 4), "search_s": round(time.monotonic() - embedded, 4)}
        return web.json_response({"hits": [_told(place, hit) for place, hit in enumerate(hits, 1)], **seconds})

    async def media(self, request: web.Request) -> web.StreamResponse:
        """An indexed file, or a range of it, by its id."""
        file, handle = await asyncio.to_thread(self.library.open, request.match_info["id"])
        with handle:
            return await _send(request, file, handle)

    async def poster(self, request: web.Request) -> web.Response:
        try:
            start_s = float(request.query.get("t", "0"))
        except ValueError:
            start_s = -1.0
        if not 0 <= start_s < 1e9:
            raise InputError("t must be a time in seconds")
        jpeg = await self._opened(self.library.poster, request.match_info["id"], start_s)
        return web.Response(body=jpeg, content_type="image/jpeg")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(models(self.model, self.since))

    async def embeddings(self, request: web.Request) -> web.Response:
        """OpenAI's form of `encode`."""
        raw = await request.read()

        def read() -> Any:
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise InputError(f"the body is no JSON: {error}") from None
            return read_request(body, self.model, self.engine.encoder.dim)

        wanted = await (self._opened if b"_url" in raw else asyncio.to_thread)(read)
        encoded = await self._encode(wanted.items)
        if encoded.failures:
            row, why = min(encoded.failures.items())
            raise InputError(f"input[{row}]: {why}")
        told = await asyncio.to_thread(lambda: json.dumps(answer(wanted, encoded, self.model)))
        return web.Response(text=told, content_type="application/json")

    async def _opened(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Work that may open media, of which only so much is done and waits at a time.

        Raises:
            Busy: too much waits.
        """
        if self._waiting >= WAITING_TO_OPEN:
            raise Busy("too many pictures and clips wait to be opened: try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._opening, work, *arguments)
        finally:
            self._waiting -= 1

    async def _encode(self, items: Sequence[Item]) -> Encoded:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self.engine.encode(items)
        except TimeoutError:
            raise Busy(f"the model did not answer within {ANSWER_S:g} s: try again") from None


def _told(position: int, hit: Hit) -> dict[str, Any]:
    """A hit without its path: names to read, an id to ask for."""
    folder, name = os.path.split(hit.file.path)
    return {
        "position": position,
        "id": hit.file.file_id,
        "name": printable(name),
        "folder": printable(os.path.basename(folder)),
        "start_s": hit.start_s,
        "end_s": hit.end_s,
        "score": hit.score,
        "duration_s": hit.file.duration_s,
        "width": hit.file.width,
        "height": hit.file.height,
        "codec": hit.file.codec,
    }


async def _send(request: web.Request, file: VideoFile, handle: BufferedReader) -> web.StreamResponse:
    """The bytes that were asked for (RFC 9110, section 14: one range of bytes)."""
    size, tag = file.size_bytes, f'"{file.sha256}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Content-Type": content_type(await asyncio.to_thread(handle.read, 16)),
        # A file that is a page too must not act as one of this origin.
        "Content-Security-Policy": "sandbox; default-src 'none'; media-src 'self'; style-src 'unsafe-inline'",
    }
    start, stop, status = 0, size, 200
    if "Range" in request.headers and request.headers.get("If-Range", tag) == tag:
        try:
            asked = request.http_range
            start, stop, _ = asked.indices(size)
        except ValueError:
            start = stop = 0
        if start >= stop:
            raise web.HTTPRequestRangeNotSatisfiable(text="no such range", headers={"Content-Range": f"bytes */{size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = stop - start
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    await asyncio.to_thread(handle.seek, start)
    left = stop - start
    try:
        while left and (data := await asyncio.to_thread(handle.read, min(_CHUNK, left))):
            await response.write(data)
            left -= len(data)
        await response.write_eof()
    except ConnectionError:
        pass  # the player has jumped elsewhere
    return response


@web.middleware
async def say_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in OpenAI's form: one line, and nothing of what happened inside."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kept = {
            name: value
            for name, value in error.headers.items()
            if name in ("WWW-Authenticate", "Content-Range", "Allow")
        }
        return _error(error.status, error.text or error.reason, kept)
    except InputError as error:
        return _error(400, str(error))
    except (Unknown, NoModel) as error:
        return _error(404, str(error))
    except Gone as error:
        return _error(410, str(error))
    except Busy as error:
        return _error(503, str(error), {"Retry-After": "1"})
    except Remade as error:
        return _error(503, str(error))
    except Exception:  # the boundary of a server that must go on
        logger.exception("%s %s failed", request.method, request.path)
        return _error(500, "the server failed on this request; its log says why")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status, headers=headers)
