"""Where an Ollama server is: addresses as Ollama reads its OLLAMA_HOST, never shown with their passwords."""

import ipaddress
import os
import re
from typing import Self
from urllib.parse import unquote

from distill.errors import BadInput

VARIABLE = "OLLAMA_HOST"
DEFAULT = "http://127.0.0.1:11434"
PORTS = {"http": 80, "https": 443}
HIDDEN = "***"
"""What stands for a password wherever an address is shown or kept."""

_PASSWORD = re.compile(r"(^|//|[\s\"'\[,=])([^\s/:@\"'\[,=]*):(?!//)\S*@")
_ALL_BUT_NAMES = re.compile(r"^((?:\w+://)?[^/:@]*):(?!//).*@", re.DOTALL)


def masked(text: str) -> str:
    """Any text, with what may be the password of an address in it hidden."""
    return _PASSWORD.sub(rf"\1\2:{HIDDEN}@", text)


class Address(str):
    """`gpu-box`, `:11435`, `::1`, `https://user:password@example.com/ollama` …, as text: as it was written, less the
    blanks and quotes around it, and less the password. Raises BadInput for what is no address.

    url: whole, without user and password. hostname: where 0.0.0.0 and :: (what a server listens on) are this machine.
    """

    scheme: str
    hostname: str
    port: int
    url: str
    _login: tuple[str, str] | None

    def __new__(cls, text: str) -> Self:
        if isinstance(text, cls):
            return text
        text = text.strip().strip("\"'").strip() or DEFAULT
        shown = _ALL_BUT_NAMES.sub(rf"\1:{HIDDEN}@", text)
        self = super().__new__(cls, shown)
        try:
            self._read(text)
        except ValueError as error:
            raise BadInput(f"{shown!r}: is no server's address: {error}; write http://NAME:PORT") from error
        return self

    def _read(self, text: str) -> None:
        """Raises ValueError."""
        scheme, found, rest = text.partition("://")
        scheme, rest = (scheme.lower(), rest) if found else ("http", text)
        if not found and text == "ollama.com":
            scheme = "https"
        if scheme not in PORTS:
            raise ValueError(f"Ollama speaks http and https, not {scheme!r}")
        if re.search(r"[\s\x00-\x1f\x7f?#\\]", rest):
            raise ValueError("it holds a blank or one of ? # \\")
        authority, _, path = rest.partition("/")
        if "@" in path:
            raise ValueError("/ and @ in a password are written %2F and %40")
        login, _, place = authority.rpartition("@")
        user, _, password = login.partition(":")
        self._login = (unquote(user), unquote(password)) if login else None
        name, port = _split(place)
        self.scheme, self.hostname = scheme, _hostname(name)
        self.port = _port(port) if port else PORTS[scheme] if found or scheme == "https" else 11434
        shown = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        self.url = f"{scheme}://{shown}:{self.port}/{path.strip('/')}".rstrip("/")

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password. A password is kept nowhere: after it was hidden, OLLAMA_HOST may tell it again.

        Raises BadInput where it doesn't.
        """
        if self._login is None or self._login[1] != HIDDEN:
            return self._login
        told = default_host()
        if told == self and told._login and told._login[1] != HIDDEN:
            return told._login
        raise BadInput(f"{self}: its password isn't kept; give the whole address again with --host, or in {VARIABLE}")

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine's own."""
        try:
            return _ip(self.hostname).is_loopback
        except ValueError:
            return self.hostname.lower() == "localhost"


def default_host() -> Address:
    """$OLLAMA_HOST, else where Ollama listens by default. Raises BadInput that names the variable."""
    try:
        return Address(os.environ.get(VARIABLE, ""))
    except BadInput as error:
        raise BadInput(f"{VARIABLE}={error}") from error


def _split(place: str) -> tuple[str, str]:
    """Name and port; an IPv6 address stands in brackets, or alone without a port."""
    if place.startswith("["):
        name, closed, rest = place[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError("an IPv6 address with a port is written [::1]:11434")
        return str(ipaddress.IPv6Address(name)), rest[1:]
    try:
        return str(ipaddress.IPv6Address(place)), ""
    except ValueError:
        name, _, port = place.partition(":")
        return name, port


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError(f"{text!r} is no port, 1 to 65535")
    return int(text)


def _hostname(name: str) -> str:
    try:
        ip = _ip(name or "127.0.0.1")
    except ValueError:
        if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
            raise ValueError(f"{name!r} is no machine's name") from None
        try:
            return name.encode("idna").decode()
        except UnicodeError as error:
            raise ValueError(f"{name!r} is no machine's name") from error
    if ip.is_unspecified:
        return "::1" if ip.version == 6 else "127.0.0.1"
    return str(ip)


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(name)
    return (ip.version == 6 and ip.ipv4_mapped) or ip
