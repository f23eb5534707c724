"""Relative links of the pages that are read outside of the site lead to files and headings; so do
the names of files in the list for contributors.
"""

import fnmatch
import re
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def links():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target:
                yield page, target


def headings(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slugify(found, "-") for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_link(page, target):
    name, _, anchor = target.partition("#")
    path = ROOT / name if name else ROOT / page
    assert path.exists(), f"{page} links to {name}"
    if anchor:
        assert anchor in headings(path), f"{page} links to {target}"


def test_the_readme_has_links():
    assert sum(page == "README.md" for page, _ in links()) > 10


def test_the_readme_is_one_screen_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_files_that_contributors_are_told_of_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Files")[1]
    names = set(re.findall(r"[\w*]+(?:/[\w*]+)*\.py", text))
    folders = ("cut_cross_entropy", "docs", "examples", "experiments", "research", "training")
    files = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(names) > 25
    assert not {name for name in names if not fnmatch.filter(files, f"*{name}")}
