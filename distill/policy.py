"""What a page of ours may do in a browser: run its own script, known by its hash, and fetch nothing."""

import base64
import hashlib


def page_policy(script: str, images: bool = True) -> str:
    """The Content-Security-Policy. images: pictures within the page (data:) are shown."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = "img-src data:; " if images else ""
    return f"default-src 'none'; {shown}style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
