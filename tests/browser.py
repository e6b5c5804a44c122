"""A real Chromium, headless, driven by its DevTools protocol over a WebSocket. Here is no test.

`Browser` is the process, `Page` one tab of it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from websockets.sync.client import ClientConnection, connect

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CHROMIUM", "LIMIT", "Browser", "Page"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LIMIT = 40.0  # seconds in which the browser has to do what is waited for

# Without a sandbox, which root may not have, and without all that looks for a network.
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0
""".split()


class Browser:
    """The process, with a profile of its own.

    Args:
        directory: An empty one.
    """

    def __init__(self, directory: Path) -> None:
        assert CHROMIUM is not None
        log = directory / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        port_file = directory / "profile" / "DevToolsActivePort"
        deadline = time.monotonic() + LIMIT
        while not port_file.exists() or "\n" not in port_file.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"Chromium did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self.port = int(port_file.read_text().split("\n")[0])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, url: str, *, width: int = 1200, height: int = 1000) -> Page:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=LIMIT) as answer:
            target = json.load(answer)
        return Page(target["webSocketDebuggerUrl"], url, width, height)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Page:
    """One tab."""

    def __init__(self, debugger: str, url: str, width: int, height: int) -> None:
        self._stack = contextlib.ExitStack()
        self._socket: ClientConnection = self._stack.enter_context(
            connect(debugger, max_size=None, proxy=None, open_timeout=LIMIT)
        )
        self._numbers = itertools.count(1)
        self.errors: list[str] = []  # uncaught exceptions of the page's scripts
        self.ask("Page.enable")
        self.ask("Runtime.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        # An event stream of a tab that stays open takes one of the six connections that a browser makes to a host.
        self.ask("Page.close")
        self._stack.close()

    def ask(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=LIMIT))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        result = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + LIMIT
        while not (value := self.evaluate(condition)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} was not true within {LIMIT:g} s; the page:\n{self.text()}")
            time.sleep(0.05)
        return value

    def text(self) -> str:
        return str(self.evaluate("document.body.innerText"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def use_theme(self, theme: str) -> None:
        """Show light or dark."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
