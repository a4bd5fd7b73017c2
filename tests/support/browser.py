"""A page in Debian's Chromium without a screen, by its DevTools protocol: clicks, waits and screenshots."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp  # a package that Lightning needs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
# of an element that nothing hides: tables are there twice, once to measure the widths of their columns
MIDDLE = """(kind, text) => {
  for (const e of document.querySelectorAll(kind)) {
    if (e.innerText.trim() != text) continue;
    e.scrollIntoView({block: "nearest"});
    const b = e.getBoundingClientRect(), x = b.x + b.width / 2, y = b.y + b.height / 2;
    if (e.contains(document.elementFromPoint(x, y))) return [x, y];
  }
}"""


class Page:
    """A page that is open.

    Args:
        address: of the page's socket.
        loop: in which it is spoken to.
    """

    def __init__(self, address: str, loop: asyncio.AbstractEventLoop):
        self.loop, self.numbers = loop, itertools.count(1)
        self.session = aiohttp.ClientSession(loop=loop)
        self.socket = loop.run_until_complete(self.session.ws_connect(address, max_msg_size=0))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol; returns its result."""
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), timeout=60))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self.socket.receive_json()).get("id") != number:
            pass  # events
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} has not become true; the page shows {self.text()[:500]}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """What can be read in the page."""
        return self.evaluate("document.body ? document.body.innerText : ''")

    def wait_for_text(self, text: str, seconds: float = 60) -> None:
        """Wait until the page shows a text."""
        self.wait_for(f"!!document.body && document.body.innerText.includes({json.dumps(text)})", seconds)

    def click(self, kind: str, text: str) -> None:
        """Click into the middle of the first element of a kind (CSS) that shows exactly this text."""
        x, y = self.wait_for(f"({MIDDLE})({json.dumps(kind)}, {json.dumps(text)})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def images(self, least: int, seconds: float = 60) -> int:
        """Wait until the page shows so many images that the server has sent; returns their number."""
        shown = "[...document.images].filter(i => i.src.includes('/file=') && i.naturalWidth > 0).length"
        return self.wait_for(f"(n => n >= {least} && n)({shown})", seconds)

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """The window as PNG, or so many pixels of it."""
        size = self.evaluate("[window.innerWidth, window.innerHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def opened(url: str, width: int = 1100, height: int = 1000) -> Iterator[Page]:
    """Open an address in a browser of its own."""
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        browser = subprocess.Popen([*command, f"--window-size={width},{height}", url], stderr=subprocess.DEVNULL)
        try:
            page = Page(_address(Path(profile), url), loop)
            try:
                yield page
            finally:
                loop.run_until_complete(page.session.close())
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            loop.close()


def _address(profile: Path, url: str, seconds: float = 60) -> str:
    """The socket of the page, once the browser has opened it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        file = profile / "DevToolsActivePort"
        if file.is_file() and (lines := file.read_text().split()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json") as answer:
                pages = json.load(answer)
            for page in pages:
                if page["type"] == "page" and page["url"].startswith(url.rstrip("/")):
                    return page["webSocketDebuggerUrl"]
    raise TimeoutError(f"the browser has not opened {url} within {seconds:g} s")
