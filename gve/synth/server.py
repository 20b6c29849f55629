"""Asks an OpenAI-compatible server, for example vLLM, many questions at once.

What such servers do to a client, and what is done about it here:

- One that does not know `response_format` drops it in silence and answers in prose. `check` asks for something that no
  prose fits, and every reply is validated.
- A server that samples the frames of a video takes others than training does. Frames are sampled here and sent as
  JPEGs; vLLM gets their indices and the clip's rate beside them (vllm#37301, vllm#40133), any other server reads their
  times.
- A cut reply may be valid JSON. Only finish_reason "stop" is a reply.
- Slow drip-feeding defeats a read time-out. The time of an attempt is bounded as a whole.
- A restart of the server would quarantine everything that is in flight. Faults of the line and bad replies are counted
  apart, and when nothing but faults comes back the run stops instead (`ServerGone`); what was answered is kept.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import aiohttp

from gve.items import InputError, Video
from gve.synth.frames import Framing, JpegStore
from gve.synth.records import Reply, Request
from gve.synth.replies import BadReply, attempt_seed, check_schema, probe, read_reply
from gve.video import MediaError

SHORTEST_WAIT_S = 0.5
"""Before the second attempt, doubled for each further one, and then drawn from the upper half of that."""


class ServerGone(RuntimeError):
    """Nothing but faults came back for so long that the server, not the questions, must be at fault."""


@dataclass(frozen=True)
class ServerOptions:
    """A server and how it is asked.

    Args:
        url: up to and with the version, for example "http://localhost:8000/v1".
        model: as the server calls it.
        concurrency: open requests, 64 to 256 for each GPU.
        prefetch: further requests whose frames are made ready meanwhile.
        temperature, top_p: sampling of tokens.
        framing: which frames are sent, and how large.
        clips_as: "video": as one clip, which vLLM takes; frame indices and rate go beside it in `media_io_kwargs`, of
            which a request has one set, so a request with several clips falls back to "images". "images": frame by
            frame, each with its time in words; any server takes it.
        timeout_s: the longest one attempt may take.
        faults: how often a request may meet a 429, a 5xx, a time-out or a cut connection before it is given up.
        replies: how many bad replies (cut, no JSON, against the schema) a request may get, each with another seed.
        longest_wait_s: between two attempts; a longer Retry-After is honoured as this.
        gone_after: requests in a row that ended in faults, with no answer in between, after which the run stops.
        key_variable: name of the environment variable that holds the API key; no key where it is empty.
        extra: further fields of each request's body, for example {"chat_template_kwargs": {"enable_thinking": False}}.

    Raises:
        InputError: a value is out of its range.
    """

    url: str
    model: str
    concurrency: int = 64
    prefetch: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    framing: Framing = field(default_factory=Framing)
    clips_as: Literal["video", "images"] = "video"
    timeout_s: float = 300.0
    faults: int = 8
    replies: int = 3
    longest_wait_s: float = 60.0
    gone_after: int = 200
    key_variable: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"captioner url {self.url!r} must begin with http:// or https://")
        if not self.model:
            raise InputError("captioner model is empty; name it as the server does, see GET <url>/models")
        if self.clips_as not in ("video", "images"):
            raise InputError(f"captioner clips_as {self.clips_as!r}: use video or images")
        counts = {"concurrency": self.concurrency, "faults": self.faults, "replies": self.replies}
        counts["gone_after"] = self.gone_after
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"captioner {name} {count} must be at least 1")
        if self.prefetch < 0 or self.timeout_s <= 0 or self.longest_wait_s <= 0:
            raise InputError(
                f"captioner prefetch {self.prefetch}, timeout_s {self.timeout_s}, longest_wait_s "
                f"{self.longest_wait_s}: a count from 0, and two positive times"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"captioner temperature {self.temperature} must be 0 or more, top_p {self.top_p} in (0, 1]"
            )
        if reserved := sorted(set(self.extra) & _OWN_FIELDS):
            raise InputError(f"captioner extra may not set {', '.join(reserved)}; the client does")


_OWN_FIELDS = {"model", "messages", "response_format", "seed", "max_tokens", "temperature", "top_p", "stream", "n"}


class _Fault(Exception):
    """An attempt that says nothing about the question: worth another one after a while."""

    def __init__(self, reason: str, text: str = "", wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.text, self.wait_s = reason, text, wait_s


class _Refusal(Exception):
    """The server will never take this question."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text


@dataclass
class _Account:
    """What a request has cost so far."""

    began: float
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""


class ServerCaptioner:
    """A `gve.synth.records.Captioner` behind HTTP. Use it in one event loop; `close` it at the end of that."""

    Options: ClassVar[type] = ServerOptions

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._jpegs = JpegStore(options.framing)
        self._line: _Line | None = None
        self._faulty = 0

    @property
    def fingerprint(self) -> str:
        own = self.options
        settings = {
            "model": own.model,
            "temperature": own.temperature,
            "top_p": own.top_p,
            "clips_as": own.clips_as,
            "extra": dict(own.extra),
        }
        return f"server {json.dumps(settings, sort_keys=True)} {own.framing}"

    async def check(self) -> None:
        """The server answers, has the model, takes pictures, and the schema binds it.

        Two nonsense words are offered as the only answers; no prose, no other JSON and no guess would be one of them.
        """
        line = self._connected()
        try:
            async with asyncio.timeout(30.0):
                status, listed = await line.get("models")
            names = [str(model["id"]) for model in json.loads(listed)["data"]] if status == 200 else []
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InputError(
                f"no server at {self.options.url}: {_words(error)}; start it, or mend captioner url"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.options.url}/models is no list of models; is this an OpenAI-compatible server?"
            ) from None
        if names and self.options.model not in names:
            raise InputError(f"the server has no model {self.options.model!r}; it has {', '.join(names)}")
        reply = await self._answer(probe(), line)
        if reply.error.startswith(("no json", "schema")):
            raise InputError(
                f"the server does not bind replies to the schema: it wrote {reply.text[:80]!r}; it must support "
                "response_format json_schema (vLLM from 0.12 on, with its structured outputs not turned off)"
            )
        if reply.error:
            raise InputError(f"the server at {self.options.url} cannot be used: {reply.error}: {reply.text[:200]}")

    async def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """One reply to each request, as they come.

        A request is drawn when one of `concurrency` + `prefetch` places is free.

        Raises:
            ServerGone: the server has stopped to answer.
            ValueError: a request's schema is no JSON schema.
        """
        line, source = self._connected(), iter(requests)
        places = self.options.concurrency + self.options.prefetch
        pending: set[asyncio.Task[Reply]] = set()
        # Not asyncio.wait: it puts a callback on every open task and takes it off again for each reply.
        finished: asyncio.Queue[asyncio.Task[Reply]] = asyncio.Queue()
        try:
            while True:
                while len(pending) < places and (request := next(source, None)) is not None:
                    check_schema(request.schema)
                    task = asyncio.ensure_future(self._answer(request, line))
                    pending.add(task)
                    task.add_done_callback(finished.put_nowait)
                if not pending:
                    return
                task = await finished.get()
                pending.discard(task)
                yield task.result()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections and the threads that decode."""
        if self._line is not None:
            await self._line.close()
            self._line = None
        self._jpegs.close()

    def _connected(self) -> _Line:
        if self._line is None:
            self._line = _Line(self.options)
        return self._line

    async def _answer(self, request: Request, line: _Line) -> Reply:
        """Asks until there is a good reply or the bounds are met."""
        account = _Account(time.monotonic())
        try:
            messages, beside = await self._messages(request)
        except MediaError as error:
            return _closed(request, account, f"media {error.reason}", text=str(error))
        except OSError as error:
            return _closed(request, account, "media unreadable", text=str(error))
        faults = bad = 0
        while True:
            account.attempts += 1
            body = self._body(request, messages, beside, account.attempts)
            try:
                answer = await line.post(body, request.id)
                self._faulty = 0
                value = _read(answer, request, account)
            except _Refusal as refusal:
                self._faulty = 0
                return _closed(request, account, refusal.reason, text=refusal.text)
            except BadReply as error:
                bad += 1
                if bad >= self.options.replies:
                    return _closed(request, account, str(error))
            except _Fault as fault:
                faults += 1
                if faults >= self.options.faults:
                    self._count_fault(fault)
                    return _closed(request, account, fault.reason, text=fault.text)
                await asyncio.sleep(self._wait_s(faults, fault.wait_s))
            else:
                return _closed(request, account, "", value=value)

    def _count_fault(self, fault: _Fault) -> None:
        self._faulty += 1
        if self._faulty >= self.options.gone_after:
            raise ServerGone(
                f"{self.options.url} has answered none of {self._faulty} requests in a row, the last one: "
                f"{fault.reason}; what was answered is kept: start the server again, then this command"
            )

    def _wait_s(self, faults: int, asked_s: float) -> float:
        """How long to wait after a fault: what the server asks for, else doubling.

        With jitter, so that requests that failed together do not come back together.
        """
        longest = self.options.longest_wait_s
        if asked_s:
            return min(asked_s, longest) * random.uniform(1.0, 1.1)
        return min(SHORTEST_WAIT_S * 2 ** (faults - 1), longest) * random.uniform(0.5, 1.0)

    async def _messages(self, request: Request) -> tuple[bytes, dict[str, Any]]:
        """The conversation as JSON bytes, and what vLLM is told beside it.

        Pictures are nearly all of a request, so they are not encoded again for each attempt.
        """
        clips = sum(isinstance(part, Video) for part in request.parts)
        as_video = self.options.clips_as == "video" and clips == 1
        content: list[bytes] = []
        beside: dict[str, Any] = {}
        for part in request.parts:
            fragments, about = await self._jpegs.content(part, as_video)
            content += fragments
            beside.update(about)
        system = json.dumps({"role": "system", "content": request.system}).encode()
        return b"[" + system + b', {"role": "user", "content": [' + b", ".join(content) + b"]}]", beside

    def _body(self, request: Request, messages: bytes, beside: dict[str, Any], attempt: int) -> bytes:
        shape = {"name": request.schema_name, "schema": request.schema, "strict": True}
        fields = {
            "model": self.options.model,
            "response_format": {"type": "json_schema", "json_schema": shape},
            "max_tokens": request.max_tokens,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "seed": attempt_seed(request, attempt),
            **beside,
            **self.options.extra,
        }
        return json.dumps(fields).encode()[:-1] + b', "messages": ' + messages + b"}"


class _Line:
    """One session of kept connections to the server, at most `concurrency` of them."""

    def __init__(self, options: ServerOptions) -> None:
        self._url = options.url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if options.key_variable:
            key = os.environ.get(options.key_variable, "")
            if not key:
                raise InputError(f"captioner key_variable: the environment has no {options.key_variable}")
            self._headers["authorization"] = f"Bearer {key}"
        self._timeout_s = options.timeout_s
        self._slots = asyncio.Semaphore(options.concurrency)
        # No time-outs but the one over the whole attempt; no proxies of the environment: they would hold the frames up.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        async with self._session.get(f"{self._url}/{path}", headers=self._headers) as response:
            return response.status, await response.read()

    async def post(self, body: bytes, id: str) -> Mapping[str, Any]:
        """Sends one completion request.

        Raises:
            _Fault, _Refusal: as the status says.
        """
        headers = self._headers | {"x-request-id": urllib.parse.quote(id, safe=":/")}
        async with self._slots:
            try:
                async with (
                    asyncio.timeout(self._timeout_s),
                    self._session.post(
                        f"{self._url}/chat/completions", data=body, headers=headers, allow_redirects=False
                    ) as response,
                ):
                    answer = await response.read()
            except TimeoutError:
                raise _Fault("timeout") from None
            except aiohttp.ClientError as error:
                raise _Fault(f"connection: {_words(error)}") from None
        return _opened(response.status, response.headers.get("retry-after", ""), answer)

    async def close(self) -> None:
        await self._session.close()


def _opened(status: int, retry_after: str, body: bytes) -> Mapping[str, Any]:
    """The JSON of a response with status 200."""
    if status == 429 or status >= 500:
        raise _Fault(f"http {status}", body.decode(errors="replace")[:2000], _retry_after_s(retry_after))
    if status != 200:
        raise _Refusal(f"http {status}", body.decode(errors="replace")[:2000])
    try:
        answer = json.loads(body)
    except ValueError:
        raise _Fault("body is no json") from None
    if not isinstance(answer, dict):
        raise _Fault("body is no object")
    return answer


def _retry_after_s(value: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 where there is none that can be read."""
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _read(answer: Mapping[str, Any], request: Request, account: _Account) -> Any:
    """The value of a completion; its text and tokens are put to the account.

    Raises:
        BadReply: cut, refused, no JSON, or against the schema.
        _Fault: the answer is no completion.
    """
    try:
        usage = answer.get("usage") or {}
        account.prompt_tokens += int(usage.get("prompt_tokens") or 0)
        account.completion_tokens += int(usage.get("completion_tokens") or 0)
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise _Fault("body is no completion") from None
    account.text = str(text if text is not None else refusal or "")
    if finish != "stop":
        raise BadReply(str(finish or "no finish reason"))
    if refusal:
        raise BadReply("refusal")
    return read_reply(account.text, request.schema)


def _closed(request: Request, account: _Account, error: str, *, value: Any = None, text: str = "") -> Reply:
    return Reply(
        id=request.id,
        value=value,
        text=text or account.text,
        error=error,
        attempts=account.attempts,
        prompt_tokens=account.prompt_tokens,
        completion_tokens=account.completion_tokens,
        seconds=time.monotonic() - account.began,
    )


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
