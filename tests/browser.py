"""Chromium without a window, driven step by step: real clicks and keys, in real time."""

import json
import os
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage").split()


def program():
    """The browser of this machine; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser on this machine ({', '.join(NAMES)}); install one, on Debian `apt-get install chromium`")
    return found


class Browser:
    """Speaks the DevTools protocol: messages of JSON, each with a NUL behind it, through file descriptors 3 and 4."""

    def __init__(self, profile):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program(), *FLAGS, "--remote-debugging-pipe",
             f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number = b"", 0

    def call(self, method, session=None, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:  # events come, too, and are not needed
            while b"\0" not in self.rest:
                received = os.read(self.answers, 1 << 20)
                assert received, "the browser has ended"
                self.rest += received
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address, width=1280, height=900):
        return Tab(self, address, width, height)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


class Tab:
    def __init__(self, browser, address, width, height):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.resize(width, height)
        self.call("Page.navigate", url=address)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def value(self, script):
        """What an expression of JavaScript is in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < until, f"{script}: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def drag(self, start, *ends, modifiers=0):
        """Press the left button at a point of the window, move over the others and let go at the last; modifiers: 8 is Shift."""
        for kind, (x, y) in (("mousePressed", start), *(("mouseMoved", end) for end in ends), ("mouseReleased", (start, *ends)[-1])):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, modifiers=modifiers,
                      buttons=int(kind != "mouseReleased"))

    def key(self, name, modifiers=0):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, modifiers=modifiers)
