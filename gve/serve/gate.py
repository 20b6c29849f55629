"""Who may ask: names of this server, requests of its own pages or of programs, and holders of its token.

Other users of a machine reach its loopback, and a browser sends requests for any page that is open in it. So:

- the Host header must name this server: a foreign name that was pointed at this address (DNS rebinding) is refused;
- a request that a page of another origin caused is refused, other ports of this machine included;
- with a token, every route but /health asks for it: `Authorization: Bearer`, or the cookie that `/?token=` sets;
- nothing is shared with other origins, and no answer may be run as a page but the page.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether an address that is listened on is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Decides over each request before a route sees it.

    Args:
        host: address that is listened on.
        token: secret that is asked for; empty for none.
        names: further names that this server is called by, such as that of a proxy before it.
    """

    def __init__(self, host: str, token: str = "", names: Iterable[str] = ()) -> None:
        self.host, self.token = host, token
        self.names = {"localhost", *(name.lower() for name in names)}
        if not is_loopback(host):
            self.names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        # Cookies are shared by all ports of a machine: two servers must not overwrite each other's.
        self.cookie = "gve_" + hashlib.sha256(token.encode()).hexdigest()[:8]

    def knows(self, header: str) -> bool:
        """Whether a Host header names this server."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        # An address cannot be rebound; one that is not loopback did not come by the loopback.
        return address.is_loopback or not is_loopback(self.host)

    def admits(self, request: web.Request) -> bool:
        """Whether the request has the token, if there is one."""
        if not self.token:
            return True
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.cookies.get(self.cookie, "")
        return hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.token.encode())

    def foreign(self, request: web.Request) -> bool:
        """Whether a page of another origin caused the request; one who follows a link to the page is welcome."""
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin"):
            return not (
                request.method == "GET"
                and request.path == "/"
                and request.headers.get("Sec-Fetch-Mode") == "navigate"
                and request.headers.get("Sec-Fetch-Dest") == "document"
            )
        origin = request.headers.get("Origin")
        return origin is not None and urlsplit(origin).netloc != request.host

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses, or lets pass."""
        if not self.knows(request.headers.get("Host", "")):
            raise web.HTTPForbidden(text="this server is not called so: see --allow-host")
        if self.foreign(request):
            raise web.HTTPForbidden(text="requests of other pages are refused")
        if request.path == "/" and "token" in request.query and self.token:
            if not hmac.compare_digest(request.query["token"].encode("utf-8", "replace"), self.token.encode()):
                raise web.HTTPUnauthorized(text="the token is wrong")
            entered = web.HTTPSeeOther("/")
            entered.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict", path="/")
            raise entered
        if request.path != "/health" and not self.admits(request):
            raise web.HTTPUnauthorized(
                text="a token is asked for: open the address that gve serve printed, or send Authorization: Bearer",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal before an answer is sent: the headers of every answer, errors too."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)
