"""The check of the built site finds each kind of fault, on small pages that have one each."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser

# A picture of one pixel.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQ"
    "DwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
GOOD = f"""
<style>td, th {{ padding: 8px }} .scrolls {{ overflow-x: auto }}</style>
<p>Text</p>
<table><tr><th>a</th></tr><tr><td>1</td></tr></table>
<img src="data:image/png;base64,{PICTURE}">
<div class="scrolls"><div style="width: 900px">wide, and scrolls by itself</div></div>
"""

BROKEN = {
    "console": ("<script>console.error('no such thing')</script>", "console: no such thing"),
    "script": ("<script>null.backdrop</script>", "script error: Cannot read properties of null"),
    "missing file": ("<script src='gone.js'></script>", "console: Failed to load resource"),
    "table": (
        "<style>.x td {padding: 0}</style><table class=x><tr><td>1</td><td>2</td></tr></table>",
        "table without style: 1 2",
    ),
    "picture": ("<img src='gone.png'>", "picture that does not load: http"),
    "picture below the fold": (
        "<div style='height: 9000px'></div><img loading=lazy src='gone.png'>",
        "picture that does not load: http",
    ),
    "not a picture": ("<img src='data:image/png;base64,AAAA'>", "picture that does not load: data"),
    "script of another server": (
        "<script src='https://cdn.example.com/highlight.js'></script>",
        "request to another server: https://cdn.example.com/highlight.js",
    ),
    "font of another server": (
        "<style>@font-face {font-family: f; src: url(https://fonts.example.com/f.woff2)}"
        "p {font-family: f}</style>",
        "request to another server: https://fonts.example.com/f.woff2",
    ),
    "wide": ("<div style='width: 700px'>long</div>", "wider than 500 pixels: div long"),
    "wide, and cut off": (
        "<div style='overflow-x: hidden'><pre style='width: 700px'>code</pre></div>",
        "wider than 500 pixels: pre code",
    ),
    "example": (
        "<blockquote><blockquote>f(1)</blockquote></blockquote>",
        "example that is not rendered as code: f(1)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def check():
    path = ROOT / "docs" / "site" / "check.py"
    spec = importlib.util.spec_from_file_location("site_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(check, tmp_path_factory):
    """Problems of a site that has a page for every fault, and a good one."""
    site = tmp_path_factory.mktemp("site")
    pages = {name: GOOD + fault for name, (fault, _) in BROKEN.items()} | {"index": GOOD}
    for name, body in pages.items():
        page = f"<!doctype html><html><link rel=icon href=data:,><body>{body}</body></html>"
        (site / f"{name}.html").write_text(page)
    (site / "below").mkdir()
    (site / "below" / "deep.html").write_text("<script>console.error('deep')</script>")
    return check.check_site(site)


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_found(name, found):
    problems = found[f"{name}.html"]
    assert any(problem.startswith(BROKEN[name][1]) for problem in problems), problems


def test_a_good_page_has_no_problem_but_that_it_has_no_search(found):
    assert found["index.html"] == ["search: the page has none"]


def test_a_search_that_finds_nothing_is_a_fault(check, tmp_path):
    body = "<!doctype html><link rel=icon href=data:,><input data-md-component=search>"
    (tmp_path / "index.html").write_text(body)
    assert check.check_site(tmp_path)["index.html"] == ["search: 'softcap' is not found"]


def test_pages_in_folders_are_opened(found):
    assert "console: deep" in found["below/deep.html"]


def test_a_site_without_pages_is_refused(check, tmp_path):
    with pytest.raises(SystemExit, match="must hold the built site, found no page"):
        check.check_site(tmp_path)


def test_the_command_fails_when_a_page_does(check, tmp_path, monkeypatch, capsys):
    (tmp_path / "index.html").write_text("<img src=gone.png>")
    monkeypatch.setattr("sys.argv", ["check.py", str(tmp_path)])
    assert check.main() == 1
    assert "index.html: picture that does not load" in capsys.readouterr().out
