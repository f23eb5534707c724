"""Open every page of the built site in a headless browser; report what is broken for a reader.

    python docs/site/check.py build/site

Needs Debian's ``chromium`` (or another Chromium, named by ``CHROMIUM``) and Playwright, which
drives it. Exit code 1 if the search finds nothing, or if a page

- logs an error to the console,
- asks a server other than this one for anything,
- has a table without style or a picture that does not load,
- shows an example of a docstring as text instead of code,
- has content that is wider than a narrow screen.
"""

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, sync_playwright

NARROW, WIDE = 500, 1280  # pixels

# Each returns a list of descriptions, one for every element that is wrong.
UNSTYLED_TABLES = """() => [...document.querySelectorAll('table')]
    .filter(table => table.rows.length && table.rows[0].cells.length)
    .filter(table => [...table.rows].some(row => [...row.cells].some(cell => {
        const style = getComputedStyle(cell);
        return parseFloat(style.paddingLeft) + parseFloat(style.paddingRight) < 8;
    })))
    .map(table => table.innerText.trim().slice(0, 40).replace(/\\s+/g, ' '))"""
BROKEN_PICTURES = """async () => {
    const pictures = [...document.images];
    for (const picture of pictures) picture.loading = 'eager';
    await Promise.all(pictures.map(picture => picture.decode().catch(() => null)));
    return pictures.filter(picture => !picture.naturalWidth).map(picture => picture.src);
}"""
# An element may be wide inside of a box that scrolls by itself. Hidden overflow is not such a box:
# what it cuts off cannot be read.
TOO_WIDE = """() => {
    const root = document.querySelector('article') || document.body;
    const scrolls = element => {
        for (let box = element; box && box !== document.body; box = box.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return true;
        return false;
    };
    const wide = [...root.querySelectorAll('*')].filter(element => {
        const box = element.getBoundingClientRect();
        return box.width && box.height && box.right > innerWidth + 1 && !scrolls(element);
    }).map(element =>
        element.tagName.toLowerCase() + ' ' + element.textContent.trim().slice(0, 40));
    const page = document.documentElement.scrollWidth;
    if (page > innerWidth) wide.push(`the page, ${page} pixels`);
    return wide.slice(0, 3);
}"""
# Markdown reads ">>>" outside of a code block as quotes within quotes.
EXAMPLES_AS_TEXT = """() => [...document.querySelectorAll('blockquote blockquote')]
    .map(quote => quote.innerText.trim().slice(0, 40))"""


def chromium() -> str:
    """Path of the browser."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        raise SystemExit(
            "chromium must be installed (apt-get install chromium), or CHROMIUM name it"
        )
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; those that fail show in the browser's console."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve ``folder`` on a free local port; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium with an empty profile."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium())
        try:
            yield launched
        finally:
            launched.close()


def check_page(context: BrowserContext, address: str) -> list[str]:
    """Problems of the page at ``address``."""
    found: list[str] = []
    host = urlsplit(address).netloc
    page = context.new_page()
    page.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))

    def request(route: Any) -> None:
        target = urlsplit(route.request.url)
        if target.scheme in {"data", "blob"} or target.netloc == host:
            route.continue_()
        else:
            found.append(f"request to another server: {route.request.url}")
            route.abort()

    page.route("**/*", request)
    page.goto(address, wait_until="networkidle")
    for kind, script in (
        ("picture that does not load", BROKEN_PICTURES),
        ("table without style", UNSTYLED_TABLES),
        (f"wider than {NARROW} pixels", TOO_WIDE),
        ("example that is not rendered as code", EXAMPLES_AS_TEXT),
    ):
        found += [f"{kind}: {what}" for what in page.evaluate(script)]
    page.close()
    return found


def check_search(context: BrowserContext, address: str, query: str = "softcap") -> list[str]:
    """A problem if typing ``query`` into the search of the page finds nothing."""
    page = context.new_page()
    page.goto(address, wait_until="networkidle")
    if not page.locator("[data-md-component=search]").count():
        page.close()
        return ["search: the page has none"]
    page.keyboard.press("/")
    page.keyboard.type(query)
    try:
        page.wait_for_selector(".md-search-result__item", timeout=5_000)
    except Exception:
        return [f"search: {query!r} is not found"]
    finally:
        page.close()
    return []


def check_site(site: Path) -> dict[str, list[str]]:
    """Problems of every page below ``site``, by the page's path."""
    paths = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    if not paths:
        raise SystemExit(f"{site} must hold the built site, found no page in it (run `make docs`)")
    with served(site) as address, browser() as launched:
        narrow = launched.new_context(viewport={"width": NARROW, "height": 900})

        found = {path: check_page(narrow, f"{address}/{path}") for path in paths}
        found["index.html"] += check_search(
            launched.new_context(viewport={"width": WIDE, "height": 900}), f"{address}/index.html"
        )
    return found


def main() -> int:
    """Check the site named on the command line."""
    parser = argparse.ArgumentParser(description="Check the built site in a headless browser.")
    parser.add_argument("site", type=Path, help="folder of the built site")
    options = parser.parse_args()
    found = check_site(options.site)
    for path, problems in found.items():
        for problem in problems:
            print(f"{path}: {problem}")
    wrong = sum(map(bool, found.values()))
    print(f"{len(found)} pages, {wrong} with problems" if wrong else f"{len(found)} pages are good")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
