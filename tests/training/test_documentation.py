"""The documentation of the script has the arguments that the script has."""

from pathlib import Path

from training.arguments import build_parser, table

PAGE = Path(__file__).resolve().parents[2] / "docs/training.md"


def test_the_table_of_arguments_is_current():
    page = PAGE.read_text(encoding="utf-8")
    written = page.split("<!-- begin arguments -->")[1].split("<!-- end arguments -->")[0]
    # `python docs/make.py` writes it.
    assert written.strip() == table(build_parser())


def test_the_page_names_only_arguments_that_exist():
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    words = PAGE.read_text(encoding="utf-8").replace("`", " ").replace(",", " ").split()
    named = {word.rstrip(".:;") for word in words if word.startswith("--")}
    of_others = {"--nproc-per-node", "--logdir", "--json", "--no-deps", "-->"}
    assert named - known - of_others == set()
    assert {"--resume", "--streaming", "--deepspeed", "--from-scratch"} <= named
