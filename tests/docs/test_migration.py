"""Names on the migration page are those of this version; its snippets run in another test."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import cut_cross_entropy
from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from cut_cross_entropy.options import ALL_IMPLS
from cut_cross_entropy.transformers import cce_patch

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text(encoding="utf-8")
OURS = inspect.signature(linear_cross_entropy).parameters


def between(start, end):
    """The part of the page between two texts, which must be there."""
    return PAGE[PAGE.index(start) : PAGE.index(end, PAGE.index(start))]


def table_of(start, end):
    """The cells of the table in that part of the page, without its heading."""
    lines = [line for line in between(start, end).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def offered():
    """Pairs of module and name that the page says are there."""
    for modules, names in table_of("Names beyond those", "Not offered"):
        family = None
        for module in quoted(modules):
            if module.startswith("."):
                module = f"transformers{module}"
            module = module.removeprefix("cut_cross_entropy")
            family = module.rpartition(".")[2]
            for name in quoted(names.partition(",")[0] if module == "" else names):
                name = name.replace("<model>", family)
                if re.fullmatch(r"\w+", name):
                    yield f"cut_cross_entropy.{module}".rstrip("."), name


@pytest.mark.parametrize(("module", "name"), sorted(set(offered())))
def test_an_offered_name_is_there(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_offered_names_are_found():
    names = dict.fromkeys(name for _, name in offered())
    assert {"recommend_c_grad_chunk_size", "CCEParams", "vp_reduce_lse", "patch_gemma2"} <= {*names}
    assert {"apply_lce", "PATCH_FNS", "patch_qwen2", "_PATCH_OPTS"} <= {*names}


def test_names_not_offered_are_not_there():
    text = " ".join(quoted(between("Not offered", "## From Liger")))
    names = [*dict.fromkeys(re.findall(r"\w+", text))]
    assert len(names) > 15
    there = {"cce_patch", "tl_utils", "utils", "_apply"}
    modules = [cut_cross_entropy] + [
        importlib.import_module(f"cut_cross_entropy.{name}")
        for name in ("cce", "cce_utils", "utils", "tl_utils", "torch_compile", "transformers.patch")
    ]
    for name in set(names) - there:
        assert not any(hasattr(module, name) for module in modules), name
        assert importlib.util.find_spec(f"cut_cross_entropy.{name}") is None, name


def test_options_named_for_those_who_come_from_liger():
    rows = table_of("| Liger | here |", "## From full logits")
    named = {name for _, here in rows for name in quoted(here)}
    functions = {"compute_z_loss", "cce_patch", "linear_divergence"}
    assert named >= functions
    implementations = {"cce", "cce_exact", "chunked"}
    assert implementations <= {*ALL_IMPLS}
    options = {name.partition("=")[0] for name in named} - functions - implementations
    assert options == {"shift", "return_lse", "label_smoothing", "class_weights", "token_weights"}
    assert options <= set(OURS)
    assert [*OURS][:2] == ["e", "c"]
    assert [*inspect.signature(LinearCrossEntropy(softcap=30.0).forward).parameters][:2] == [
        "e", "c",
    ]  # fmt: skip


def test_what_is_accepted_without_an_effect():
    for name in ("accum_e_fp32", "accum_c_fp32", "c_grad_chunk_size"):
        assert f"`{name}" in PAGE
        assert name in inspect.signature(cce_patch).parameters or name in OURS
    assert {"filter_eps", "num_items_in_batch"} <= set(OURS)


def test_version():
    assert f"The version here, {cut_cross_entropy.__version__}," in PAGE
