"""Who may ask: whoever is on this machine, and no page of another site in its browser; from elsewhere, with a token."""

import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from distill.errors import BadInput
from distill.serve.http import answer

ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")
"""How browsers name a site; `null` those that have no name, such as a file's page."""


@dataclass(frozen=True)
class Allowed:
    """token: asked of everybody; "" of nobody. origins: sites whose pages may ask, besides our own. Raises BadInput for
    what no request could carry."""

    token: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        token = self.token.strip()  # a file that holds one ends in a line break
        if not (token.isascii() and token.isprintable()):
            raise BadInput(
                "--token (or $DREAM_TOKEN): requests carry printable ASCII alone, and it has other characters"
            )
        object.__setattr__(self, "token", token)
        object.__setattr__(self, "origins", tuple(map(origin_of, self.origins)))

    @property
    def local(self) -> bool:
        """Requests must name this machine, so that no name of another can be made to lead here (DNS rebinding)."""
        return not self.token


class Guard:
    """Refuses what isn't allowed, 401 or 403, before anything of it is read. open: paths that need no token."""

    def __init__(self, app: ASGIApp, allowed: Allowed, open: Collection[str]) -> None:
        self.app, self.allowed, self.open = app, allowed, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(Headers(scope=scope), scope["path"]) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def _refused(self, headers: Headers, path: str) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self.allowed.local and not is_local(host):
            return answer({"error": f"host {host[:80]!r} is not this machine"}, 403)
        if origin and origin not in self.allowed.origins and urlsplit_host(origin) != host:
            return answer({"error": f"pages of {origin[:80]} may not ask; allow them with --origin"}, 403)
        if self.allowed.token and path not in self.open:
            kind, _, token = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.allowed.token.encode()):
                return answer({"error": "unauthorized: send the server's token, `Authorization: Bearer TOKEN`"}, 401)
        return None


def origin_of(site: str) -> str:
    """As a browser names it: in small letters, without the slash or the usual port that its address may end with."""
    origin = site.strip().rstrip("/").lower()
    if not ORIGIN.fullmatch(origin):
        how = "such as https://chat.example" if origin.isascii() else "a host in ASCII (xn--…), as browsers send it"
        raise BadInput(f"--origin {site}: give SCHEME://HOST[:PORT] of each site, {how}")
    usual = {"http": ":80", "https": ":443"}
    return origin.removesuffix(usual.get(origin.partition(":")[0], ""))


def urlsplit_host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def is_local(host: str) -> bool:
    """Whether a Host header, with a port or without, names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
