"""A headless Chromium for tests of the page, driven over the DevTools protocol by its pipe: no driver, no package."""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60.0  # seconds for anything; a machine that trains at the same time is slow

# Chromium reads commands from descriptor 3 and writes answers to 4; descriptors in between are moved out of the way.
_LAUNCHER = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class PageError(AssertionError):
    """The page did not do what was waited for; the message says what it was doing."""


def find_chromium() -> str | None:
    """Gives the path of an installed Chromium, None if there is none."""
    own = os.environ.get("CHROMIUM")
    return own or next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab.

    Args:
        profile: An empty folder.
        width: Of the window in pixels.
        height: Of the window in pixels.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        command = [
            str(find_chromium()),
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--force-color-profile=srgb",
            "--hide-scrollbars",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # as in containers, where it refuses to start otherwise
        ]
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(to_read), str(to_write), *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.requests: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._numbers = itertools.count(1)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._session: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        # A worker makes requests of its own; it waits until they are listened to, see `_take`.
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.resize(width, height)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol, and waits for its answer."""
        number = self._send(method, params, self._session)
        end = time.monotonic() + WAIT
        while True:
            try:
                answer = self._answers.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                raise PageError(f"{method}: no answer within {WAIT:g} s") from None
            if answer["id"] == number:
                break
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, address: str) -> None:
        """Opens an address; see `wait_for` for when it is ready."""
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """Gives the JSON value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise PageError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until an expression is true, and gives its value."""
        end = time.monotonic() + WAIT
        while True:
            try:
                value = self.evaluate(expression)
            except PageError as error:  # as while the page is still loading
                value = None
                if time.monotonic() > end:
                    raise error
            if value:
                return value
            if time.monotonic() > end:
                told = self.evaluate("document.getElementById('message')?.textContent")
                raise PageError(f"waited {WAIT:g} s for {expression}; message {told!r}, errors {self.errors}")
            time.sleep(0.05)

    def set_files(self, selector: str, *paths: Path) -> None:
        """Chooses files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve()) for path in paths])

    def press(self, key: str) -> None:
        """Presses and releases a key, by its name in the DOM."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Sets the size of the view and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Ends the browser."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._to)

    def _send(self, method: str, params: dict[str, Any], session: str | None) -> int:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return number

    def _listen(self) -> None:
        """Sorts what comes into answers and events, until the pipe closes."""
        with os.fdopen(self._from, "rb") as stream:
            rest = b""
            while chunk := stream.read1(1 << 16):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in map(json.loads, messages):
                    self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers.put(message)
            return
        method, params = message["method"], message["params"]
        if method == "Target.attachedToTarget" and params["waitingForDebugger"]:
            for wanted in ("Network.enable", "Runtime.runIfWaitingForDebugger"):
                self._send(wanted, {}, params["sessionId"])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A plain static server that keeps a list of what it was asked for."""

    def __init__(self, *args: Any, asked: list[tuple[str, str]], headers_more: dict[str, str], **kwargs: Any) -> None:
        self.asked, self.headers_more = asked, headers_more
        super().__init__(*args, **kwargs)

    def parse_request(self) -> bool:
        """Notes the request."""
        understood = super().parse_request()
        if understood:
            self.asked.append((self.command, self.path))
        return understood

    def end_headers(self) -> None:
        """Adds the headers that were wished for."""
        for name, value in self.headers_more.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serve(folder: Path, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serves a folder on a free port of this machine.

    Args:
        folder: What to serve.
        headers: Sent with every answer.

    Yields:
        The address, and the list that collects (method, path) of every request.
    """
    asked: list[tuple[str, str]] = []
    handler: Callable[..., Any] = functools.partial(
        _Handler, directory=str(folder), asked=asked, headers_more=headers or {}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def pixels(browser: Browser, selector: str) -> Sequence[int]:
    """Reads the RGBA bytes of a canvas."""
    return browser.evaluate(
        f"(() => {{ const c = document.querySelector({json.dumps(selector)});"
        " return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); })()"
    )
