"""Debian's Chromium without a window, driven through its debugging pipe; installed when missing."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A machine under load may be 20 times slower than an idle one.
PATIENCE = 240.0
_OPTIONS = (
    "--headless=new",
    # Its sandbox refuses root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    # Nothing outside this machine can be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1280,900",
    "--remote-debugging-pipe",
)


def install() -> str | None:
    """Make ``chromium`` available; a reason when that cannot be."""
    # One process of the tests at a time; the others find it there.
    place = Path(tempfile.gettempdir()) / f"mone-chromium-{os.getuid()}.lock"
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if shutil.which("chromium") is None and (reason := _install()):
            return reason
    version = subprocess.run(["chromium", "--version"], capture_output=True, text=True, check=False)
    if version.returncode != 0:
        return f"chromium does not run: {(version.stderr or version.stdout).strip()}"
    return None


def _install() -> str | None:
    if os.geteuid() != 0:
        return "no chromium here, and only root can install it"
    if shutil.which("apt-get") is None:
        return "no apt-get to install chromium with"
    options = ["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", "--quiet", "--yes"]
    for command in (
        ["apt-get", *options, "update"],
        ["apt-get", *options, "install", "--no-install-recommends", "chromium"],
    ):
        # Not killed for being slow: that is how an installation is left half done.
        result = subprocess.run(
            command,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines()
            return f"{' '.join(command)} failed: {said[-1] if said else result.returncode}"
    return None if shutil.which("chromium") else "no chromium after its installation"


class Browser:
    """One Chromium; :func:`open_browser` makes it."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            assert ready, f"{what}: no answer from chromium within {PATIENCE} s"
            data = os.read(self._answers, 1 << 20)
            assert data, f"{what}: chromium ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, path: Path) -> Tab:
        """A page from a file, loaded and drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable", session)
        self.call("Page.navigate", session, url=path.resolve().as_uri())
        tab.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        # Until what is drawn after the layout is drawn.
        tab.evaluate("new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)))")
        return tab


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript; promises are awaited."""
        answer = self.browser.call(
            "Runtime.evaluate",
            self.session,
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition}: not within {PATIENCE} s"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into view."""
        x, y, width, height = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({ block: 'center' }); const r = e.getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        return x, y, width, height

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A true event of the mouse: mouseMoved, mousePressed or mouseReleased."""
        self.browser.call("Input.dispatchMouseEvent", self.session, type=kind, x=x, y=y, **more)

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the mouse over an element, at shares of its width and height."""
        x, y, width, height = self.box(selector)
        self.mouse("mouseMoved", x + across * width, y + down * height)

    def drag(self, selector: str, start: float, stop: float) -> None:
        """Drag across an element, at half its height."""
        x, y, width, height = self.box(selector)
        middle = y + height / 2
        self.mouse("mouseMoved", x + start * width, middle)
        self.mouse("mousePressed", x + start * width, middle, button="left", clickCount=1)
        for share in (0.5 * (start + stop), stop):
            self.mouse("mouseMoved", x + share * width, middle, button="left", buttons=1)
        self.mouse("mouseReleased", x + stop * width, middle, button="left", clickCount=1)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5, times: int = 1) -> None:
        """Click on an element, at shares of its width and height."""
        x, y, width, height = self.box(selector)
        x, y = x + across * width, y + down * height
        for count in range(1, times + 1):
            self.mouse("mousePressed", x, y, button="left", clickCount=count)
            self.mouse("mouseReleased", x, y, button="left", clickCount=count)

    def choose(self, selector: str, value: object) -> None:
        """Give a control a value as its user does."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.value = {json.dumps(str(value))};"
            "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n)); })()"
        )

    def problems(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but files."""
        self.evaluate("1")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(str(details.get("exception", details)))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str([one.get("value") for one in params["args"]]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(f"asked for {url}")
        return found

    def screenshot(self, path: Path, full: bool = True) -> None:
        """A picture, to look at."""
        answer = self.browser.call(
            "Page.captureScreenshot", self.session, captureBeyondViewport=full
        )
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the page."""
        self.browser.call("Target.closeTarget", targetId=self.target)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium of its own, with a profile of its own; ended at the end."""
    program = shutil.which("chromium")
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Its ends of the pipes become 3 and 4, so they must not be these now.
        pipes = [*os.pipe(), *os.pipe()]
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipes]
        for fd in pipes:
            os.close(fd)
        their_in, our_out, our_in, their_out = ends
        log = os.path.join(profile, "log")
        process = os.posix_spawn(
            program,
            [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, their_in, 3),
                (os.POSIX_SPAWN_DUP2, their_out, 4),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setpgroup=0,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Browser(our_out, our_in)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(our_out)
            os.close(our_in)
