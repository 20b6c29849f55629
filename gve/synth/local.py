"""A captioner in this process: any Qwen2.5-VL folder with its LM head, bound to the schema token by token.

The embedded default for one machine. It answers a batch at a time, so a batch lasts as long as its longest answer; a
server of its own (gve.synth.server) is faster from the first GPU on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal

from gve.inputs import InputPolicy
from gve.items import InputError, Item
from gve.synth.chat import ChatModel, Prompt, Said, draws
from gve.synth.grammar import of_schema
from gve.synth.records import Reply, Request
from gve.synth.replies import BadReply, attempt_seed, check_schema, probe, read_reply
from gve.video import MediaError, Sampling


@dataclass(frozen=True)
class LocalOptions:
    """A model and how it is asked.

    Args:
        base: hub folder or hub name of a Qwen2.5-VL with its LM head.
        sampling: which frames of a clip it sees.
        frame_tokens: most tokens of one frame, before two are merged in time.
        image_tokens: most tokens of one picture.
        max_length: tokens of a question with its media; a longer text loses its end.
        batch_size: requests that are answered together.
        temperature: of sampling; 0 takes the most probable token, and then a bad reply is not asked for again.
        replies: how many bad replies a request may get, each with another seed.
        device: torch device.
        dtype: of the weights.

    Raises:
        InputError: a value is out of its range.
    """

    base: str
    sampling: Sampling = field(default_factory=Sampling)
    frame_tokens: int = 200
    image_tokens: int = 400
    max_length: int = 8192
    batch_size: int = 8
    temperature: float = 0.7
    replies: int = 3
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.replies < 1 or self.temperature < 0:
            raise InputError(
                f"captioner batch_size {self.batch_size}, replies {self.replies}, temperature {self.temperature}: use "
                "at least 1, at least 1, and 0 or more"
            )

    @property
    def policy(self) -> InputPolicy:
        """Of the model's inputs."""
        return InputPolicy(
            sampling=self.sampling,
            max_frame_tokens=self.frame_tokens,
            max_image_tokens=self.image_tokens,
            max_length=self.max_length,
            append_eos=False,
            padding_side="left",
        )


@dataclass
class Attempts:
    """What has become of one request so far.

    Args:
        request: the question.
        began: time.monotonic() of the first attempt.
    """

    request: Request
    began: float
    count: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    error: str = ""
    value: Any = None

    def take(self, said: Sequence[Said], text: str) -> None:
        """Notes an attempt: what was said for it, and the reply that it makes."""
        self.count += 1
        self.prompt_tokens += sum(one.prompt_tokens for one in said)
        self.completion_tokens += sum(one.completion_tokens for one in said)
        self.text, self.error = text, ""
        try:
            if not all(one.ended for one in said):
                raise BadReply("length")
            self.value = read_reply(text, self.request.schema)
        except BadReply as error:
            self.error = str(error)

    def reply(self) -> Reply:
        return Reply(
            id=self.request.id,
            value=self.value,
            text=self.text,
            error=self.error,
            attempts=self.count,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            seconds=time.monotonic() - self.began,
        )


class LocalCaptioner:
    """A `gve.synth.records.Captioner` on a `ChatModel`. The user turn is its media in order, then its texts."""

    Options: ClassVar[type] = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    @cached_property
    def model(self) -> ChatModel:
        """Loaded when it is first needed."""
        own = self.options
        return ChatModel.load(
            own.base, policy=own.policy, batch_size=own.batch_size, device=own.device, dtype=own.dtype
        )

    @property
    def fingerprint(self) -> str:
        own = self.options
        return f"local {self.model.backbone.base_hash} inputs {own.policy.digest()} {own.dtype} t={own.temperature:g}"

    async def check(self) -> None:
        """Loads the model, and asks for something that no prose would be."""
        async for reply in self.ask([probe()]):
            if reply.error:
                raise InputError(f"{self.options.base} does not answer: {reply.error}: {reply.text[:200]}")

    def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """One reply to each request, a batch at a time.

        Raises:
            ValueError: a schema is none, or says something that a reply cannot be bound to.
        """
        return in_batches(requests, self.options.batch_size, self._replies)

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies to a batch. What is bad is asked again with another seed, and only that."""
        all_attempts = [Attempts(request, time.monotonic()) for request in requests]
        open_ones = all_attempts
        for _ in range(self.options.replies if self.options.temperature else 1):
            open_ones = self._attempt(open_ones)
            if not open_ones:
                break
        return [attempts.reply() for attempts in all_attempts]

    def _attempt(self, all_attempts: Sequence[Attempts]) -> list[Attempts]:
        """One attempt for each; those that are worth another one."""
        prompts: list[tuple[Attempts, Prompt]] = []
        for attempts in all_attempts:
            request = attempts.request
            seed = attempt_seed(request, attempts.count + 1)
            item = Item(request.parts, id=request.id)
            try:
                prepared = self.model.prepare(item, request.system)
                generator = draws(seed, item) if self.options.temperature else None
            except MediaError as error:
                attempts.error, attempts.text = f"media {error.reason}", str(error)
            except OSError as error:
                attempts.error, attempts.text = "media unreadable", str(error)
            except InputError as error:
                attempts.error, attempts.text = "input", str(error)
            else:
                prompts.append((attempts, Prompt(prepared, of_schema(request.schema), request.max_tokens, generator)))
        answers = self.model.say([prompt for _, prompt in prompts], self.options.temperature)
        for (attempts, _), said in zip(prompts, answers, strict=True):
            attempts.take([said], said.text)
        return [attempts for attempts, _ in prompts if attempts.error]


async def in_batches(
    requests: Iterable[Request], size: int, answer: Callable[[Sequence[Request]], Sequence[Reply]]
) -> AsyncIterator[Reply]:
    """Replies by a function of batches, which runs in a thread while the loop goes on.

    Args:
        requests: drawn a batch at a time, when the one before is answered.
        size: of a batch.
        answer: one reply for each request.
    """
    source = iter(requests)
    while batch := list(islice(source, size)):
        for request in batch:
            check_schema(request.schema)
        for reply in await asyncio.to_thread(answer, batch):
            yield reply
