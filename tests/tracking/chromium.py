"""A headless Chromium for tests of pages, driven over its DevTools protocol, without network or profile."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from itertools import count

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "there is no Chromium; `make test-view` says how to get it"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio"),
    *("--remote-debugging-port=0", "--window-size=1300,1000", "--hide-scrollbars"),
)
_START_S = 60


class Browser:
    """One page at a time; a context manager."""

    def __init__(self, profile):
        self.profile, self.ids, self.said, self.asked = profile, count(1), [], []
        self.loop = asyncio.new_event_loop()

    def __enter__(self):
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.loop.run_until_complete(self._connect())
        except BaseException:
            self.__exit__()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        if hasattr(self, "session"):
            self.loop.run_until_complete(self.session.close())
        self.loop.close()

    async def _connect(self):
        told, deadline = self.profile / "DevToolsActivePort", time.monotonic() + _START_S
        while not (told.is_file() and told.read_text().count("\n")):
            assert self.process.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium did not start"
            await asyncio.sleep(0.05)
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{told.read_text().split()[0]}/json") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method, **parameters):
        """The result of a command; what the page says meanwhile is kept in `said`, what it loads in `asked`."""
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method, parameters):
        number = next(self.ids)
        await self.socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def _note(self, message):
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.said.append(told)

    def open(self, path):
        """Load a file, and wait until it is there."""
        self.said.clear()
        self.asked.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _START_S
        while self.js("document.readyState") != "complete" or self.js("location.href") != path.as_uri():
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.02)

    def js(self, expression):
        """The value of an expression in the page, a promise's included."""
        made = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def key(self, key, text=""):
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def point(self, selector):
        """Move the pointer to the middle of an element."""
        box = self.js(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({_box(selector)})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def theme(self, name):
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def shot(self, path):
        """A picture of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def _box(selector):
    return f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
