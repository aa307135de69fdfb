"""Copies of the playground that run a test's script in headless chromium, and what it returns."""

import html
import json
import os
import re
import subprocess
from pathlib import Path

from html_pages import CHROMIUM, without_policy

SCRIPT = """<pre id="results"></pre>
<script>
"use strict";
let failure = null;
function report(results) {{
  failure = failure || results.error;
  if (failure) results = {{ error: failure }};
  document.getElementById("results").textContent = JSON.stringify(results);
}}
{checks}
const fail = error => report({{ error: String(error.stack) }});
window.addEventListener("error", event => fail(event.error || event));
Promise.resolve({given}).then(check).catch(fail);
</script>
</body>"""


def with_checks(content, name, given=None):
    """A copy of a page (bytes) that ends by calling check(given) of the file `name`.

    check is a function in JavaScript, perhaps an async one; it calls report(results).
    """
    checks = Path(__file__).with_name(name).read_text(encoding="utf-8")
    data = json.dumps(given).replace("<", "\\u003c")
    script = SCRIPT.format(checks=checks, given=data)
    return without_policy(content).replace(b"</body>", script.encode())


def reported(dom):
    """What the checks of a page reported, from the document that chromium returned."""
    text = re.search(r'<pre id="results">(.*?)</pre>', dom, re.S)[1]
    results = json.loads(html.unescape(text))
    assert "error" not in results, results["error"]
    return results


def run(path, profile, budget=None):
    """What the checks of a page reported in chromium; profile: a folder for it.

    budget: ms of virtual time, in which timers fire at once. Without one the clock is real, and a
    check must be done when the page has loaded.
    """
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", f"--user-data-dir={profile}", "--dump-dom"]
    if budget:
        flags.append(f"--virtual-time-budget={budget}")
    command = [CHROMIUM, *flags, f"file://{path}"]
    home = {**os.environ, "HOME": str(profile)}
    process = subprocess.run(command, env=home, capture_output=True, encoding="utf-8", timeout=120)
    assert "</html>" in process.stdout, process.stderr[-2000:]
    return reported(process.stdout)
