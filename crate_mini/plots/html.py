"""Self-contained HTML pages: data, style and script in one file that opens from disk.

A page makes no network request and runs only its own script: a content security policy names the
hash of the script and forbids everything else. Corpus text is data everywhere: escaped in the HTML,
and set as text, never as markup, by the script.
"""

import base64
import hashlib
import json
from html import escape
from importlib import resources


def asset(package, name):
    """Text of a file in the folder of `package`, such as crate_mini.neurons."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def shared_script():
    """The script that all pages begin with."""
    return asset("crate_mini.plots", "shared.js")


def quiz_script():
    """The script that all survey pages begin with."""
    return shared_script() + asset("crate_mini.plots", "quiz.js")


def inline(data):
    """Data as JSON that cannot end its <script> element: <, > and & are escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def embedded(path, alt):
    """A PNG as an <img> that holds it; "" if there is no such file. alt: what it shows."""
    if not path.exists():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="drawn" alt="{escape(alt)}" src="data:image/png;base64,{content}">'


def html(title, body, data, script, style="", images=False):
    """A whole page, as UTF-8 bytes.

    body: HTML. With an empty `script` the page holds no data either. style: CSS to append to the
    shared one. images: allow images embedded as data: URIs.
    """
    style = asset("crate_mini.plots", "page.css") + style
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    image_policy = "img-src data:; " if images else ""
    policy = (
        f"default-src 'none'; {image_policy}style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'"
    )
    scripts = ""
    if script:
        scripts = (
            '<noscript><p class="notice">This page needs its script (but no network) '
            "to show its data.</p></noscript>\n"
            f'<script type="application/json" id="data">{inline(data)}</script>\n'
            f"<script>{script}</script>\n"
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n{scripts}</body>\n</html>\n"
    )
    return page.encode("utf-8", "backslashreplace")
