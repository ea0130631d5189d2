"""The way to a server: which proxy lies on it, whose certificates are believed. As Ollama's own client goes it.

This machine is never reached through a proxy. An environment variable that can't be used matters only to an address
whose way needs it, and is named.
"""

import importlib.util
import ipaddress
import os
import ssl
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from distill.address import Address, masked
from distill.errors import BadInput

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")


@dataclass(frozen=True)
class Proxy:
    """One that the environment names. told: the variable and its value, without a password."""

    told: str
    server: httpx.Proxy


def open_client(host: Address, timeout: float, key: str) -> httpx.Client:
    """Connections to one server. Raises as `way_to` does."""
    return httpx.Client(**way_to(host, timeout, key))


def way_to(host: Address, timeout: float, key: str) -> dict[str, Any]:
    """What httpx is told of a server; connecting takes no time where one is, an answer may queue for long. key: the
    environment variable of what it may want to see.

    Raises BadInput that names the variable in the way.
    """
    proxy = proxy_of(host)
    needed = host.scheme == "https" or (proxy is not None and proxy.server.url.scheme == "https")
    return {
        "base_url": host.url,
        "auth": host.login,
        "headers": _headers(key),
        "follow_redirects": True,
        "trust_env": False,
        "proxy": None if proxy is None else proxy.server,
        "verify": _certificates(needed, *(os.environ.get(name, "") for name in CERTIFICATES)),
        "timeout": httpx.Timeout(timeout, connect=min(10.0, timeout)),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=256),
    }


def _headers(variable: str) -> dict[str, str]:
    """What a hosted server, or a proxy before one, may want to see."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"{variable}: holds characters that no key has; set it again, or unset it")
    return {"Authorization": f"Bearer {key}"} if key else {}


def proxy_of(host: Address) -> Proxy | None:
    """What the environment says to send requests to `host` through. Raises BadInput that names the variable."""
    if host.is_loopback:
        return None
    scheme = f"{host.scheme}_proxy"
    names = (scheme.upper(), scheme, "ALL_PROXY", "all_proxy")
    name = next((name for name in names if os.environ.get(name, "").strip()), None)
    if name is None or _is_spared(host, os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""):
        return None
    value = os.environ[name].strip()
    told = f"{name}={masked(value)}"
    try:
        server = httpx.Proxy(value if "://" in value else f"http://{value}")
        if not server.url.host or value != "".join(value.split()):
            raise ValueError(value)
    except (ValueError, httpx.InvalidURL) as error:
        raise BadInput(
            f"{told}: is no proxy that can be used (http://, https:// or socks5:// and its address); mend it, or name "
            f"{host.hostname} in NO_PROXY"
        ) from error
    if server.url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise BadInput(f"{told}: needs `pip install socksio`; or name {host.hostname} in NO_PROXY")
    return Proxy(told, server)


def _is_spared(host: Address, rules: str) -> bool:
    """NO_PROXY as Go reads it: addresses, networks, domains, `*`, perhaps with a port; nonsense is passed over."""
    name = host.hostname.lower()
    for rule in filter(None, (part.strip().lower() for part in rules.split(","))):
        if rule == "*":
            return True
        try:
            if ipaddress.ip_address(name) in ipaddress.ip_network(rule.strip("[]"), strict=False):
                return True
            continue
        except ValueError:
            domain, colon, port = rule.rpartition(":")
        if colon and port.isdigit():
            rule = domain if int(port) == host.port else ""
        rule = rule.strip("[]").lstrip("*").lstrip(".")
        if rule and (name == rule or name.endswith(f".{rule}")):
            return True
    return False


@cache
def _certificates(needed: bool, file: str, folder: str, log: str) -> ssl.SSLContext:
    """Authorities that are believed. Where none is needed and the variables are no good: nobody is."""
    try:
        if file or folder:
            return ssl.create_default_context(cafile=file or None, capath=folder or None)
        return httpx.create_ssl_context(trust_env=False)
    except OSError as error:  # ssl.SSLError is one
        if not needed:
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        variable, value = ("SSLKEYLOGFILE", log) if error.filename else ("SSL_CERT_FILE", file)
        raise BadInput(
            f"{variable}={value}: can't be used ({error.strerror or error}); mend it, or unset it"
        ) from error
