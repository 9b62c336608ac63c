"""Pages as they are written, and in a headless Chromium: what they look like, and what their scripts do."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000",
)  # fmt: skip
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def screenshot(page: Path, picture: Path, *, width: int = 1000, height: int = 1400, dark: bool = False) -> Path:
    """A picture of the top of the page."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(page, width, height, f"--screenshot={picture}", scheme)
    return picture


def evaluate(page: Path, script: str, *, width: int = 1000) -> str:
    """The value of a JavaScript expression in the loaded page, as text; ``document`` is the page's."""
    # The page's own policy admits its own script alone; a copy without it can be looked into. It is put into
    # a frame, since a window is never narrower than 500 pixels.
    inside = html.escape(_POLICY.sub("", page.read_text(encoding="utf-8")))
    probe = (
        f'<title></title><iframe style="width:{width}px;height:1400px;border:0" srcdoc="{inside}"></iframe>'
        "<script>onload = () => { const page = document.querySelector('iframe').contentWindow;"
        f"const found = page.eval({json.dumps(script)}); document.body.textContent = String(found); }};</script>"
    )
    copy = page.with_name("probe.html")
    copy.write_text(probe, encoding="utf-8")
    body = re.search(r"<body>(.*)</body>", _run(copy, 1200, 1400, "--dump-dom"), re.DOTALL)
    copy.unlink()
    assert body is not None
    return html.unescape(body[1]).strip()


def dump(page: Path) -> str:
    """The page's elements after its script has run."""
    return _run(page, 1000, 1400, "--dump-dom")


def _run(page: Path, width: int, height: int, *words: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *words]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


class _Page(HTMLParser):
    """Checks that tags nest, and keeps what a browser would load and show."""

    VOID = frozenset({"meta", "br", "wbr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read_page(path: Path) -> _Page:
    """The page, whose tags nest."""
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page
