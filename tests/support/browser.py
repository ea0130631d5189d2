"""A real browser without a window, driven over its debugging pipe with nothing but the standard library.

    with Browser() as browser:
        page = browser.open(path_of_a_page, width=390)
        page.click("#go")
        page.press("ArrowRight")
        assert page.eval("document.title") == "Done"
        assert page.errors == []

Protocol: https://chromedevtools.github.io/devtools-protocol/, NUL-terminated JSON on file descriptors 3 and 4.
A file's page is offline: it can load nothing but itself, and what it tries is in `page.requests`. A server's page
reaches this machine alone.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root may not have, and a page of our own doesn't need
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)
LAUNCH = """
import fcntl, os, sys
there, back = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(there, 3)
os.dup2(back, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Puts the two pipes where the browser looks for them: a shell may have single digits only."""

KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Escape": 27,
    "Tab": 9,
    "Enter": 13,
    "Home": 36,
    "End": 35,
}


def find_browser() -> str | None:
    """The program, or None where there is none on PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser said no, or nothing within the time-out."""


class Browser:
    """One process with a profile of its own in a temporary folder; both are gone at the end of `with`."""

    def __init__(self, timeout: float = 20.0) -> None:
        program = find_browser()
        assert program is not None, f"none of {', '.join(NAMES)} on PATH"
        self.timeout = timeout
        self.pages: dict[str, Page] = {}
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._number = 0
        self._read = b""
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        command = [sys.executable, "-ISc", LAUNCH, str(there), str(back), program, *FLAGS]
        command += [f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._profile.name},
        )
        os.close(there)
        os.close(back)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(5)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def open(self, path: Path | str, *, width: int = 1280, height: int = 800, dark: bool = False) -> "Page":
        """A file or an address of this machine, loaded; `errors` and `requests` are complete from its first byte on."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        slow = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        if isinstance(path, Path):
            page.call("Network.emulateNetworkConditions", offline=True, **slow)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.call("Emulation.setEmulatedMedia", features=scheme)
        page.resize(width, height)
        address = path if isinstance(path, str) else path.absolute().as_uri()
        page.call("Page.navigate", url=address)
        page.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")
        return page

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command's result; what happens meanwhile is noted at its page."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if page := self.pages.get(answer.get("sessionId", "")):
                page.note(answer["method"], answer["params"])

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BrowserError(f"{method}: no answer within {self.timeout:g} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise BrowserError(f"{method}: the browser is gone")
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


class Page:
    """One tab. errors: what its console shows as errors and what was thrown; requests: every address asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert", "warning"):
                self.errors.append(" ".join(str(arg.get("value", arg)) for arg in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case _:
                pass

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON. Raises BrowserError for what it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + self.browser.timeout
        while not self.eval(expression):
            if time.monotonic() > deadline:
                raise BrowserError(f"never true within {self.browser.timeout:g} s: {expression}")
            time.sleep(0.02)

    def settle(self) -> None:
        """Two frames on: what an event changed has been laid out and drawn."""
        self.eval("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _middle(self, selector: str) -> tuple[float, float]:
        found = self.eval(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); if (!node) return null;"
            "node.scrollIntoView({block: 'center', inline: 'center'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        if found is None:
            raise BrowserError(f"nothing matches {selector}")
        return found[0], found[1]

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first match, wherever that is: what covers it gets the click."""
        x, y = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def hover(self, selector: str) -> None:
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def press(self, key: str) -> None:
        """A key (KEYS), to whatever has the focus."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind, more in (("keyDown" if text else "rawKeyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **more)
        self.settle()

    def write(self, text: str) -> None:
        """Text, into whatever has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def attach(self, selector: str, path: Path) -> None:
        """A file, to an input of files."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])
        self.settle()

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """A PNG of the whole page, or of the window."""
        self.settle()
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
