"""A headless Chromium that a test drives: DevTools' protocol through a pipe, with nothing to install."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
START = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def found() -> str | None:
    """Where a Chromium is: $CHROMIUM, or on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


#: Of a module whose tests need one.
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(found() is None, reason="needs Chromium: apt install chromium, or CHROMIUM=path"),
]
#: The document of the Latents tab.
TAB = "[...document.querySelectorAll('iframe')].map((f) => f.contentDocument).find((d) => d?.querySelector('.panels'))"


class Page:
    """One page of one browser. Raises AssertionError where a script fails, and RuntimeError when the browser is gone."""

    def __init__(self, profile: Path, width: int = 1480, height: int = 1000) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        command = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), str(found()), *flags]
        self._browser = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, None
        #: What went wrong in the page: exceptions that nothing caught, and errors of the console.
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.errors.append(json.dumps(answer["params"]["entry"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], 120)
            part = os.read(self._in, 2**20) if ready else b""
            if not part:
                raise RuntimeError("The browser does not answer.")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")  # the same address with another hash would not load anew
        self.call("Page.navigate", url=url)

    def run(self, script: str, by_value: bool = True) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=by_value)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value") if by_value else answer["result"]["objectId"]

    def until(self, script: str, seconds: float = 300, accepted: Callable[[Any], Any] = bool) -> Any:
        """The first accepted value of an expression, asked for again and again."""
        end = time.monotonic() + seconds
        while not accepted(value := self.run(script)):
            assert time.monotonic() < end, f"{script} is still {value!r}"
            time.sleep(0.1)
        return value

    def drag(self, *spots: tuple[float, float]) -> None:
        """Press the mouse at the first spot, move it by the others, and let go at the last."""
        self.hover(*spots[0])
        for kind, (x, y) in [
            ("mousePressed", spots[0]),
            *[("mouseMoved", s) for s in spots],
            ("mouseReleased", spots[-1]),
        ]:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def upload(self, element: str, file: Path) -> None:
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=self.run(element, by_value=False))

    def download(self, folder: Path, act: Callable[[], None], seconds: float = 120) -> Path:
        """The file that an act saves into an empty folder."""
        session, self._session = self._session, None  # the browser's setting, not the page's
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = session
        act()
        end = time.monotonic() + seconds
        while not (there := [file for file in folder.glob("*") if file.suffix != ".crdownload"]):
            assert time.monotonic() < end, f"nothing was saved into {folder}"
            time.sleep(0.1)
        return there[0]

    def open_latents(self, tensorboard: str) -> Page:
        """Open the Latents tab of a TensorBoard, until its first run has its picture and its legend."""
        self.open(f"{tensorboard}#latents")
        self.until(
            f"{TAB}?.querySelector('.panel .shown')?.src?.length > 30 && {TAB}.querySelectorAll('.legend span').length"
        )
        return self

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._browser.terminate()
        self._browser.wait(30)
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def tensorboard(logdir: Path, site: Path) -> Iterator[str]:
    """The address of a TensorBoard that finds the plugin by the entry point that pyproject.toml declares.

    site: a new folder.
    """
    root = Path(__file__).parents[1]
    declared = re.search(
        r'\[project\.entry-points\."tensorboard_plugins"\]\n(.*?)\n\n', (root / "pyproject.toml").read_text(), re.S
    )
    (site / "vae-0.dist-info").mkdir()
    (site / "vae-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vae\nVersion: 0\n")
    (site / "vae-0.dist-info" / "entry_points.txt").write_text(
        f"[tensorboard_plugins]\n{declared[1].replace(chr(34), '')}\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    seen = ""
    try:
        for line in server.stderr:
            seen += line
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                break
        else:
            raise RuntimeError(seen)
        yield address[0]
    finally:
        server.terminate()
        server.wait(30)
