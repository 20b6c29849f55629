"""`gve serve`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gve.items import InputError
from gve.search_cli.model import add_model_options, address_of, open_asker

if TYPE_CHECKING:
    from aiohttp.web import Application

TOKEN = "GVE_TOKEN"
"""Environment variable of the token: arguments of a process can be read by every user of the machine."""


def main(argv: Sequence[str]) -> int:
    """Serves an index until it is interrupted.

    Args:
        argv: the words after `gve serve`.

    Returns:
        0.

    Raises:
        InputError: the index, the model, the address or an option cannot be used.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="gve serve: %(message)s")
    return _serve(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve serve",
        description="A page to search an index with: words, dropped pictures and clips, players at the moments. Also "
        "POST /api/search, and embeddings in OpenAI's form at /v1/embeddings. Only files of the index are handed out, "
        "each by an id and only while it is as it was indexed. What gve index adds is found at once.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder or address made by gve index")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another than loopback needs --token")
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free one (default 8080)")
    parser.add_argument(
        "--token",
        action="store_true",
        help=f"ask for a secret: that of the environment variable {TOKEN}, else a new one that is printed",
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server, as of a proxy"
    )
    parser.add_argument(
        "--max-upload-mib", type=float, default=256.0, metavar="MIB", help="media of one question (default 256)"
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's name in /v1; its own when not given")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    add_model_options(parser, stored=True)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from aiohttp import web  # noqa: F401
    except ImportError:
        raise InputError("gve serve needs aiohttp: pip install gve") from None
    from gve.search.index import Index
    from gve.serve.gate import is_loopback

    if not 0 <= arguments.port <= 65535 or arguments.max_upload_mib <= 0:
        raise InputError("--port must be from 0 to 65535 and --max-upload-mib above 0")
    public = not is_loopback(arguments.host)
    if public and not arguments.token:
        raise InputError(f"--host {arguments.host} can be reached by others: add --token, or leave --host out")
    token = (os.environ.get(TOKEN) or secrets.token_urlsafe(24)) if arguments.token else ""
    index = Index.open(address_of(arguments.index))
    listener = _listen(arguments.host, arguments.port)  # before minutes of loading a model

    encoder, model = open_asker(arguments, index)

    from gve.serve.app import Server
    from gve.serve.engine import Engine
    from gve.serve.gate import Gate
    from gve.serve.library import Library

    server = Server(
        Library(index.uri, index.record.fingerprint),
        Engine(encoder),
        model=arguments.served_model_name or (os.path.basename(model) if os.path.exists(model) else model),
        max_upload_bytes=int(arguments.max_upload_mib * 2**20),
    )
    app = server.application(Gate(arguments.host, token, arguments.allow_host))
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    if public:
        print(
            "gve serve: warning: other machines can reach this; what is sent is not encrypted, the token neither. "
            "Safer: leave --host out and use ssh -L",
            file=sys.stderr,
        )
    elif not token:
        print("gve serve: other users of this machine can ask too; --token keeps them out", file=sys.stderr)

    def announce() -> None:
        print(f"gve serve: {len(index)} windows of {index.uri} at {address}", flush=True)
        if arguments.open:
            webbrowser.open(address)

    asyncio.run(_run(app, listener, announce))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror}; another --port, or --port 0 for any free one"
        ) from None
    return listener


async def _run(app: Application, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM; what is under way is answered."""
    from aiohttp import web

    # No log of requests: it would hold what people look for, and the token.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5.0, keepalive_timeout=30.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    announce()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        await runner.cleanup()
