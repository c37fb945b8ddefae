"""A headless Chromium, driven from Python by the DevTools protocol over a pipe: no package is needed."""

import functools
import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 120  # seconds that a test may keep the browser


class Page:
    """
    A page in a browser that listens on `commands` and answers on `answers`.

    Attributes:
        events (`list[dict]`): what the browser has told without being asked.
    """

    def __init__(self, commands, answers):
        self.commands, self.answers, self.events, self.number, self.session = commands, answers, [], 0, {}
        target = self.call("Target.createTarget", url="about:blank")
        self.session = {"sessionId": self.call("Target.attachToTarget", flatten=True, **target)["sessionId"]}

    def call(self, method: str, **params) -> dict:
        """The result of a method of the protocol; AssertionError with its words where it fails."""
        self.number += 1
        self.commands.write(json.dumps({"id": self.number, "method": method, "params": params, **self.session}) + "\0")
        self.commands.flush()
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict:
        text = ""
        while not text.endswith("\0"):
            character = self.answers.read(1)
            assert character, f"The browser has closed, or was closed after {TIMEOUT} seconds."
            text += character
        return json.loads(text[:-1])

    def value(self, expression: str):
        """Of a JavaScript expression or promise, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")


@contextmanager
def open_page(profile: Path):
    """A [`Page`] of a new browser, whose profile is kept in a folder."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
    (to_read, commands), (answers, to_write) = os.pipe(), os.pipe()

    def as_3_and_4():  # where the browser looks for them
        one, other = os.dup(to_read), os.dup(to_write)
        os.dup2(one, 3)
        os.dup2(other, 4)

    process = subprocess.Popen(
        [CHROMIUM, *options], close_fds=False, preexec_fn=as_3_and_4, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(to_write)
    watch = threading.Timer(TIMEOUT, process.kill)
    watch.start()
    try:
        with open(commands, "w", encoding="utf-8") as writing, open(answers, encoding="utf-8") as reading:
            page = Page(writing, reading)
            yield page
            page.session = {}
            page.call("Browser.close")
    finally:
        watch.cancel()
        process.kill()
        process.wait()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path):
    """The address of a server of a folder's files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
