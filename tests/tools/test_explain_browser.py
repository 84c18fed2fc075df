"""The page of explain --html in a browser: nothing wider than the window, graphs beside each other, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mxfp4_compile.tools.main import main

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What the page is asked. Its own policy allows no script; the copy that is asked goes without it.
_QUESTIONS = """<script>
const box = selector => document.querySelector(selector).getBoundingClientRect();
const color = name => getComputedStyle(document.body)[name];
const boxes = [...document.querySelectorAll('.pair > div')].map(e => e.getBoundingClientRect());
document.title = JSON.stringify({
  width: innerWidth, content: document.documentElement.scrollWidth, ink: color('color'), back: color('backgroundColor'),
  wider: [...document.querySelectorAll('main *:not(pre *)')].filter(e => e.getBoundingClientRect().right > innerWidth)
    .map(e => e.tagName), beside: boxes[0].top === boxes[1].top, text: boxes[0].width});
</script></body>"""


def _browser() -> str:
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def _asked(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """What the page answers in a window of that many pixels: in a frame, since windows have a least width."""
    outer = page.with_name("outer.html")
    frame = f'<iframe src="{page.name}" width="{width}" height="1000" style="border:0" id="frame"></iframe>'
    read = "onload = () => { document.title = document.getElementById('frame').contentDocument.title; }"
    outer.write_text(f"<!doctype html><html><body>{frame}<script>{read}</script></body></html>", encoding="utf-8")
    command = [_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += [
        "--allow-file-access-from-files",
        "--hide-scrollbars",
        "--window-size=1400,1000",
        *flags,
        "--dump-dom",
        outer.as_uri(),
    ]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", out, re.DOTALL)
    assert title is not None, out[:500]
    return json.loads(unescape(title[1]))


@pytest.mark.slow
def test_the_page_fits_narrow_and_wide_windows(tmp_path: Path) -> None:
    _browser()
    page = tmp_path / "page.html"
    assert main(["explain", "--quiet", "--family", "gpt_oss", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    asked = re.sub(r"<meta http-equiv=.*?>", "", text).replace("</body>", _QUESTIONS)
    assert asked != text
    page.write_text(asked, encoding="utf-8")
    for width, beside in ((420, False), (1200, True)):
        seen = _asked(page, width)
        assert seen["width"] == width
        assert seen["content"] == width and not seen["wider"], seen
        assert seen["beside"] is beside
        assert seen["text"] >= 320  # enough for a line of code
    light, dark = _asked(page, 1200), _asked(page, 1200, "--blink-settings=preferredColorScheme=0")
    assert (light["ink"], light["back"]) == ("rgb(27, 31, 36)", "rgb(255, 255, 255)")
    assert (dark["ink"], dark["back"]) == ("rgb(230, 237, 243)", "rgb(13, 17, 23)")
