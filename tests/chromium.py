"""Drives headless Chromium over its DevTools pipe with the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
)


class Page:
    """One page of a browser of its own.

    Attributes:
        events: what the browser told so far, as (method, parameters).
    """

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        assert PROGRAM is not None
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        commands, answers = os.pipe(), os.pipe()
        script = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
        arguments = ["bash", "-c", script, "bash", PROGRAM, *_FLAGS, f"--user-data-dir={self.profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(arguments, pass_fds=(commands[0], answers[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands[0])
        os.close(answers[1])
        self._out, self._in = commands[1], answers[0]
        self._rest, self._last, self._session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def call(self, method: str, timeout: float = 120.0, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path: Path, timeout: float = 120.0) -> float:
        """Opens a file and returns the seconds until its load event."""
        self.events.clear()
        began = time.perf_counter()
        self.call("Page.navigate", url=path.absolute().as_uri())
        until = time.monotonic() + timeout
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive(until)
        return time.perf_counter() - began

    def cpu_seconds(self) -> float:
        """Processor time of the browser and all of its processes so far; unlike the clock, it does not depend on what else runs."""
        total, members = 0, {self.process.pid}
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            stats[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
        for _ in range(4):
            members |= {pid for pid, (parent, _) in stats.items() if parent in members}
        total = sum(ticks for pid, (_, ticks) in stats.items() if pid in members)
        return total / os.sysconf("SC_CLK_TCK")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of the first element that matches."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str, code: int) -> None:
        """A key, by its name and Windows key code."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))
        self.settle()

    def settle(self) -> None:
        """Waits until the page has drawn again."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Writes a PNG of the page, or of what fits into the window."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def errors(self) -> list[str]:
        """What stands on the console as an error, and uncaught exceptions."""
        found = [str(parameters["exceptionDetails"]) for method, parameters in self.events if method == "Runtime.exceptionThrown"]
        found += [str(parameters["entry"]) for method, parameters in self.events if method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning")]
        return found + [
            str(parameters["args"]) for method, parameters in self.events if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert", "warning")
        ]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, data URLs left out."""
        asked = [parameters["request"]["url"] for method, parameters in self.events if method == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def close(self) -> None:
        """Ends the browser and removes its profile."""
        for handle in (self._out, self._in):
            os.close(handle)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise ConnectionError(f"Chromium ended with {self.process.wait()}")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found
