"""An OpenAI-compatible server on the loopback that answers by the schema, and misbehaves as it is told.

In a test's own loop: `async with SynthServer(...) as server: ... server.url`. As a process, for what must be killed or
measured from outside: `python tests/synth_server.py --latency-s 0.2 --slots 64 --share 0.1`; the first line that it
prints is its URL, and GET <url>/stats says what it has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

# What it can do instead of answering well; "slow" answers well after ten latencies.
FAULTS = ("429", "500", "503", "cut", "drop", "never", "drip", "garbage")  # of the line: nothing about the question
BAD = ("truncated", "length", "prose", "wrong", "refusal", "null")  # replies that are none
KINDS = ("ok", "slow", "fenced", "same id", "400", *FAULTS, *BAD)


@dataclass(frozen=True)
class Seen:
    """A request as it came.

    Args:
        id: of the request, from its header.
        attempt: the how manieth request of this id it is, from 1.
        body: as sent.
        headers: names in lower case.
    """

    id: str
    attempt: int
    body: dict[str, Any]
    headers: dict[str, str]


def well(seen: Seen) -> str:
    return "ok"


def told(plan: dict[str, list[str]]) -> Callable[[Seen], str]:
    """Behaviour by id and attempt; "ok" when the list is at its end."""

    def behave(seen: Seen) -> str:
        kinds = plan.get(seen.id, [])
        return kinds[seen.attempt - 1] if seen.attempt <= len(kinds) else "ok"

    return behave


def drawn(share: float, kinds: tuple[str, ...] = (*FAULTS, *BAD), seed: int = 0) -> Callable[[Seen], str]:
    """Misbehaviour with a probability, drawn by (seed, id, attempt): the same whatever the order of requests."""

    def behave(seen: Seen) -> str:
        chance = random.Random(f"{seed} {seen.id} {seen.attempt}")
        return chance.choice(kinds) if chance.random() < share else "ok"

    return behave


def instance(schema: dict[str, Any], name: str, place: str = "") -> Any:
    """A value that fits a schema of the kinds the project uses, and that names the request it answers."""
    if "enum" in schema:
        digest = hashlib.sha256(f"{name} {place}".encode()).digest()
        return schema["enum"][digest[0] % len(schema["enum"])]
    if "const" in schema:
        return schema["const"]
    kind = schema["type"]
    if kind == "object":
        return {key: instance(value, name, f"{place}.{key}") for key, value in schema["properties"].items()}
    if kind == "array":
        return [instance(schema["items"], name, f"{place}[{i}]") for i in range(max(1, schema.get("minItems", 1)))]
    if kind == "string":
        text = f"a true answer to {name} at {place.strip('.')}"
        return (text * (1 + schema.get("minLength", 0) // len(text)))[: schema.get("maxLength")]
    if kind == "integer":
        return schema.get("minimum", 0)
    return {"number": 0.5, "boolean": True, "null": None}[kind]


@dataclass
class SynthServer:
    """The server.

    Args:
        behave: what to do with each request, one of KINDS.
        latency_s: of an answer.
        slots: requests that are worked on at once; further ones wait.
        bound: whether the schema binds replies; without it every reply is prose, as from a server that ignores
            `response_format`.
        answer: makes the value of a good reply; by default one that fits the schema.
        retry_after_s: sent with a 429 where it is not None.
        remember: keep every request in `seen`, pictures and all.
    """

    behave: Callable[[Seen], str] = well
    latency_s: float = 0.0
    slots: int = 64
    model: str = "toy"
    bound: bool = True
    answer: Callable[[Seen], Any] | None = None
    retry_after_s: float | None = None
    remember: bool = True
    seen: list[Seen] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    most_open: int = 0
    url: str = ""
    _open: int = 0
    _busy: int = 0
    _busy_s: float = 0.0
    _first_s: float = 0.0
    _last_s: float = 0.0

    async def __aenter__(self) -> SynthServer:
        return await self.start()

    async def __aexit__(self, *exit: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> SynthServer:
        self._room = asyncio.Semaphore(self.slots)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 26)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def occupancy(self) -> float:
        """Mean share of busy slots between the first request and the last answer."""
        return self._busy_s / (self.slots * max(self._last_s - self._first_s, 1e-9))

    def stats(self) -> dict[str, Any]:
        return {
            "requests": sum(self.attempts.values()),
            "ids": len(self.attempts),
            "most_open": self.most_open,
            "occupancy": self.occupancy(),
            "seconds": self._last_s - self._first_s,
        }

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection is over."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if lines[0].startswith("GET"):
            known = {"/v1/models": {"data": [{"id": self.model}]}, "/v1/stats": self.stats()}
            await self._send(writer, 200, known.get(lines[0].split()[1], {}))
            return True
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            async with self._work():
                return await self._complete(headers, json.loads(body), writer)
        finally:
            self._open -= 1

    @contextlib.asynccontextmanager
    async def _work(self) -> AsyncIterator[None]:
        """A slot, and the account of how long slots were busy."""
        async with self._room:
            self._pass(+1)
            try:
                yield
            finally:
                self._pass(-1)

    def _pass(self, step: int) -> None:
        now = asyncio.get_running_loop().time()
        self._first_s = self._first_s or now
        self._busy_s += self._busy * (now - (self._last_s or now))
        self._last_s = now
        self._busy += step

    async def _complete(self, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        id = urllib.parse.unquote(headers.get("x-request-id", ""))
        self.attempts[id] += 1
        seen = Seen(id, self.attempts[id], body, headers)
        if self.remember:
            self.seen.append(seen)
        kind = self.behave(seen)
        await asyncio.sleep(self.latency_s * (10 if kind == "slow" else 1))
        if kind == "never":
            await asyncio.Event().wait()
        if kind == "drop":
            return False
        if kind in ("400", "429", "500", "503"):
            wait = (
                {"retry-after": f"{self.retry_after_s:g}"} if kind == "429" and self.retry_after_s is not None else {}
            )
            await self._send(writer, int(kind), {"error": {"message": f"told to answer {kind}"}}, wait)
            return True
        schema = body["response_format"]["json_schema"]["schema"]
        text = json.dumps(self.answer(seen) if self.answer else instance(schema, id))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish = "stop"
        if kind == "prose" or not self.bound:
            message["content"] = "The video shows a {wonderful} afternoon, and everybody is [quite] happy."
        elif kind == "wrong":
            message["content"] = json.dumps({"something": "else"})
        elif kind == "fenced":
            message["content"] = f"Sure! Here it is:\n```json\n{text}\n```"
        elif kind == "truncated":  # cut, and told so
            message["content"], finish = text[: len(text) // 2], "length"
        elif kind == "length":  # whole by chance, and yet cut
            finish = "length"
        elif kind == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        elif kind == "null":
            message["content"] = None
        answer = {
            "id": "chatcmpl-1" if kind == "same id" else f"chatcmpl-{sum(self.attempts.values())}",
            "object": "chat.completion",
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        if kind == "garbage":  # status 200, and the body ends in the middle of its JSON
            await self._send(writer, 200, json.dumps(answer)[:-40])
            return True
        if kind in ("cut", "drip"):
            return await self._half(writer, json.dumps(answer).encode(), kind)
        await self._send(writer, 200, answer)
        return True

    async def _half(self, writer: asyncio.StreamWriter, data: bytes, kind: str) -> bool:
        """The connection ends in the body, or a byte comes every 20 ms for ever."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        size = len(data) if kind == "cut" else 10_000_000
        writer.write(b"content-length: %d\r\n\r\n" % size + data[: len(data) // 2])
        await writer.drain()
        while kind == "drip":
            await asyncio.sleep(0.02)
            writer.write(b" ")
            await writer.drain()
        return False

    @staticmethod
    async def _send(
        writer: asyncio.StreamWriter, status: int, value: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        head = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {text}" for name, text in head.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()


async def _main(arguments: argparse.Namespace) -> None:
    kinds = tuple(arguments.kinds.split(",")) if arguments.kinds else (*FAULTS, *BAD)
    behave = drawn(arguments.share, kinds, arguments.seed) if arguments.share else well
    server = SynthServer(
        behave, arguments.latency_s, arguments.slots, retry_after_s=arguments.retry_after_s, remember=False
    )
    await server.start(arguments.port)
    print(server.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.0, help="of requests that are answered badly")
    parser.add_argument("--kinds", default="", help=f"comma separated, of {', '.join(KINDS)}")
    parser.add_argument("--retry-after-s", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args()))
