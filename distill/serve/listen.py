"""A socket to be asked at, and the loop that answers there until it is told to stop."""

import errno
import ipaddress
import socket
import sys

import uvicorn
from starlette.types import ASGIApp

from distill.errors import BadInput

GRACE = 30
"""Seconds after the first Ctrl-C or SIGTERM in which answers that were begun may end."""
CONNECTIONS = 4096
"""Open ones; more are refused with 503."""
SWITCH = 5e-4
"""Seconds after which one thread lets another go on. The one that writes gives way at each product, and would wait ten
times as long, Python's default, for the loop that sends."""


def bind(host: str, port: int, has_token: bool) -> socket.socket:
    """A socket that listens there; port 0 is any. Raises BadInput where that can't be, or isn't safe."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadInput(f"--host {host}: is no address of this machine ({error.strerror})") from error
    if not is_loopback(str(address[0])) and not has_token:
        raise BadInput(f"--host {host}: others could ask there; give them a token with --token (or $DREAM_TOKEN)")
    # With the protocol named, asyncio sends small pieces at once; else each would wait 40 ms for the one before.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()  # who comes before the students are ready waits for them
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        why = "is taken; give another" if taken else f"can't be listened on ({error.strerror}); give another"
        raise BadInput(f"--port {port}: {why}") from error
    return listening


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Until SIGINT or SIGTERM; a second one doesn't wait for anybody."""
    sys.setswitchinterval(SWITCH)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        limit_concurrency=CONNECTIONS,
    )
    uvicorn.Server(config).run(sockets=[listening])
