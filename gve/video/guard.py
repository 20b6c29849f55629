"""Video files to frames in a child process that can be killed.

Messages both ways: 12 bytes (length of the JSON head, length of the body), the head, the body. The body of a request
is the file's bytes if it has no path, that of a reply the pixels. No pickle; the child's own stdout is turned away,
since decoders print.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gve.items import Frames
from gve.video import decoders
from gve.video.decoders import Backend, decode, say_if_short
from gve.video.sampling import Sampling
from gve.video.source import MediaError, Source, called, check_exists, reject

logger = logging.getLogger(__name__)

CHILD_MEMORY_BYTES = 4 << 30
"""Address space of the child."""

CHILD_CLIPS = 512
"""Clips that one child decodes before a new one takes over: decord leaks."""

_LENGTHS = struct.Struct("<IQ")


def _send(pipe: BinaryIO, head: dict[str, Any], body: bytes | memoryview = b"") -> None:
    text = json.dumps(head).encode()
    pipe.write(_LENGTHS.pack(len(text), len(body)) + text)
    pipe.write(body)
    pipe.flush()


def _receive(pipe: BinaryIO) -> tuple[dict[str, Any], np.ndarray]:
    """Head and body ([bytes] uint8). Raises EOFError when the other side is gone."""
    lengths = pipe.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        raise EOFError
    head_size, body_size = _LENGTHS.unpack(lengths)
    head, body = pipe.read(head_size), np.empty(body_size, np.uint8)
    view, read = memoryview(body.data), 0
    while read < body_size and (count := pipe.readinto(view[read:])):  # type: ignore[attr-defined]
        read += count
    if len(head) < head_size or read < body_size:
        raise EOFError
    return json.loads(head), body


class _Child:
    """A process that decodes for this one: starting it costs 0.5 s, a request a millisecond and the copy of pixels.

    A plain subprocess, because DataLoader workers are daemons and may have no multiprocessing children.
    """

    def __init__(self) -> None:
        package_root = str(Path(__file__).resolve().parent.parent)
        search = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self.served = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gve.video"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the pipe
        )
        try:
            self.ask({}, b"", 60.0)  # a first import may be slow, and is no fault of the file
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError(
                f"the decoding child does not start; `{sys.executable} -m gve.video` says why"
            ) from error

    def ask(self, head: dict[str, Any], body: bytes, timeout_s: float) -> tuple[dict[str, Any], np.ndarray]:
        """One request, one reply.

        Raises:
            EOFError, OSError: the child died.
            TimeoutError: it was killed after `timeout_s`.
        """
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.daemon = True
        timer.start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, head | {"timeout_s": timeout_s}, body)  # type: ignore[arg-type]
            reply = _receive(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            timer.join()
        self.served = CHILD_CLIPS if late.is_set() else self.served + 1  # killed just after it had answered
        return reply

    @property
    def usable(self) -> bool:
        return self.served < CHILD_CLIPS and self._process.poll() is None

    def close(self) -> int:
        """Ends the child; returns its status, which is its own where it had died before."""
        self._process.kill()
        self.abandon()
        return self._process.wait()

    def abandon(self) -> None:
        """Closes this process's ends of the pipes; the child leaves when all ends are closed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Pool:
    """Idle children of this process. A thread takes one and gives it back, so threads decode side by side."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def take(self) -> _Child:
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.usable:
                    return child
                child.close()
        return _Child()

    def give(self, child: _Child) -> None:
        with self._lock:
            self._idle.append(child)

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def forget(self) -> None:
        """After a fork the children are the parent's: two writers on one pipe would garble it."""
        self._lock = threading.Lock()
        while self._idle:
            self._idle.pop().abandon()


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.forget)
atexit.register(_pool.close)


def decode_guarded(
    source: Source,
    sampling: Sampling,
    *,
    timeout_s: float = 30.0,
    backend: Backend = "auto",
    name: str = "",
    span_s: tuple[float, float] | None = None,
) -> Frames:
    """`decode` with `verify` in a child process: killed when it hangs, and its crash or memory hunger ends only itself.

    With backend "auto", a file on which the child is lost is tried once more by PyAV alone. Thread-safe; works in
    DataLoader workers and after a fork.

    Args:
        timeout_s: the longest one attempt may take, in seconds (so "auto" may take twice that).
        span_s: as in `decode`.

    Raises:
        MediaError: as `decode`; also with reason "timeout", "crashed" or "out-of-memory".
    """
    name = called(source, name)
    check_exists(source, name)
    attempts: tuple[Backend, ...] = (backend,)
    if backend == "auto":
        attempts = ("auto", "pyav") if decoders.DECORD_AVAILABLE else ("pyav",)
    for attempt in attempts:
        try:
            head = {"sampling": asdict(sampling), "backend": attempt, "name": name, "span_s": span_s}
            clip = _clip_of_child(source, head, timeout_s, name)
        except MediaError as error:
            if error.reason not in ("timeout", "crashed", "out-of-memory") or attempt == attempts[-1]:
                raise
            logger.warning("%s; PyAV tries it", error)
        else:
            break
    say_if_short(name, clip.num_frames, len(clip.indices))
    return clip


def call_guarded(
    function: str, source: Source, arguments: dict[str, Any], *, timeout_s: float = 30.0, name: str = ""
) -> tuple[dict[str, Any], bytes]:
    """Another function that looks into a file, called in the same child process.

    Args:
        function: "module:function"; called as `function(source, name, **arguments)`, it returns plain values for JSON
            and bytes. It must come from the program, never from data.
        arguments: plain values for JSON.
        timeout_s: the longest it may take, in seconds.

    Returns:
        What the function returns.

    Raises:
        MediaError: as the function raises it; also with reason "timeout", "crashed" or "out-of-memory".
    """
    name = called(source, name)
    check_exists(source, name)
    head = {"call": function, "arguments": arguments, "name": name}
    reply, body = _ask_child(source, head, timeout_s, name)
    return reply, body.tobytes()


def _clip_of_child(source: Source, head: dict[str, Any], timeout_s: float, name: str) -> Frames:
    reply, pixels = _ask_child(source, head, timeout_s, name)
    return Frames(
        pixels.reshape(reply["shape"]),
        np.array(reply["times_s"], np.float64),
        np.array(reply["indices"], np.int64),
        reply["num_frames"],
        reply["native_fps"],
    )


def _ask_child(source: Source, head: dict[str, Any], timeout_s: float, name: str) -> tuple[dict[str, Any], np.ndarray]:
    body = source if isinstance(source, bytes) else b""
    if not isinstance(source, bytes):
        head["path"] = os.path.abspath(source)
    child = _pool.take()
    try:
        reply, pixels = child.ask(head, body, timeout_s)
    except TimeoutError:
        child.close()
        reject(name, "timeout", f"decoding took more than {timeout_s:g} s")
    except (EOFError, OSError):
        status = child.close()
        cause = signal.Signals(-status).name if status < 0 else f"exit {status}"
        reject(name, "crashed", f"the decoder died by {cause}")
    except BaseException:  # KeyboardInterrupt: the reply is still on its way, so the child cannot be used again
        child.close()
        raise
    _pool.give(child)
    if "reason" in reply:
        raise MediaError(reply["message"], reason=reply["reason"], name=name)
    return reply["answer"], pixels


def serve() -> None:
    """The child's loop: do what stdin asks for until it closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    with contextlib.suppress(ValueError, OSError):  # a system without this limit still has the time limit
        resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            head, body = _receive(requests)
        except EOFError:
            return
        # The kernel ends a hung child also when the parent is gone: the alarm's default action needs no Python.
        signal.setitimer(signal.ITIMER_REAL, head["timeout_s"] + 5.0)
        reply, data = _answer(head, body) if "name" in head else ({}, b"")
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply, data)


def _answer(head: dict[str, Any], body: np.ndarray) -> tuple[dict[str, Any], bytes | memoryview]:
    source = head.get("path") or body.tobytes()
    name = head["name"]
    try:
        if "call" in head:
            module, _, function = head["call"].partition(":")
            answer, data = getattr(importlib.import_module(module), function)(source, name, **head["arguments"])
            return {"answer": answer}, data
        sampling, span_s = Sampling(**head["sampling"]), head["span_s"]
        clip = decode(source, sampling, backend=head["backend"], name=name, verify=True, span_s=span_s)
    except MediaError as error:
        return {"reason": error.reason, "message": str(error)}, b""
    except MemoryError:
        limit = CHILD_MEMORY_BYTES / 2**30
        message = f"{name}: decoding needs more than {limit:g} GiB (out-of-memory)"
        return {"reason": "out-of-memory", "message": message}, b""
    except Exception as error:  # the boundary of a process that must go on: reported as the file's reason
        message = f"{name}: {type(error).__name__}: {error} (undecodable)"
        return {"reason": "undecodable", "message": message}, b""
    answer = {
        "shape": clip.pixels.shape,
        "times_s": clip.times_s.tolist(),
        "indices": clip.indices.tolist(),
        "num_frames": clip.num_frames,
        "native_fps": clip.native_fps,
    }
    return {"answer": answer}, np.ascontiguousarray(clip.pixels).data.cast("B")
