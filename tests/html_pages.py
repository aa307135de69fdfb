"""Pages as a parser and as a browser see them; several folders test pages."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br", "input", "hr", "link"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


class ParsedPage(HTMLParser):
    """Tags and attributes of a page (bytes), its scripts and styles, and the data of its script.

    Raises AssertionError for elements that do not nest.
    """

    def __init__(self, content):
        super().__init__()
        self.open = []
        self.tags = []
        self.attributes = []
        self.scripts = []
        self.styles = []
        self.feed(content.decode())
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "style":
            self.styles.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text
        if self.open and self.open[-1] == "style":
            self.styles[-1] += text


def without_policy(content):
    """A page (bytes) without its content security policy."""
    return re.sub(rb'<meta http-equiv="Content-Security-Policy"[^>]*>\n', b"", content)


def dom(path, profile, fragment=""):
    """The document in headless chromium after the page's script ran; profile: a folder for it."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--virtual-time-budget=2000",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
        "--dump-dom",
        f"file://{path}{fragment}",
    ]
    home = {**os.environ, "HOME": str(profile)}
    process = subprocess.run(command, env=home, capture_output=True, encoding="utf-8", timeout=120)
    assert "</html>" in process.stdout, process.stderr[-2000:]
    return process.stdout


def missing_width(content, folder, fragment="", width=400):
    """Pixels that a page (bytes) lacks on a screen of this width: 0 unless it scrolls sideways."""
    measure = b"""<script>addEventListener("load", () => setTimeout(() => {
    const root = document.documentElement;
    parent.postMessage(root.scrollWidth - root.clientWidth, "*");
    }, 200));</script></body>"""
    assert content.count(b"</body>") == 1
    (folder / "measured.html").write_bytes(without_policy(content).replace(b"</body>", measure))
    frame = f"""<html><title>waiting</title><body><script>
    addEventListener("message", event => document.title = `lacks ${{event.data}}`);</script>
    <iframe src="measured.html{fragment}" width="{width}" height="900" style="border:0"></iframe>
    </body></html>"""
    (folder / "frame.html").write_text(frame)
    title = re.search(r"<title>lacks (\d+)</title>", dom(folder / "frame.html", folder / "profile"))
    assert title, "the page did not report its width"
    return int(title[1])
