"""The model of docs/distributed.md: its table follows from its formulas and rounded constants."""

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/distributed.md"
TOKENS, NODE, ITEM = 8192, 8, 2
GATHER, SCATTER, REDUCE, ADAPTER = 304.3e9, 300.0e9, 341.3e9, 40e9  # bytes a second
HEADS = {"Llama 3 8B": (128256, 4096, 18.9, 1.37), "Gemma 2 2B": (256000, 2304, 18.9, 1.28)}


def gather(size, members, speed):
    """Milliseconds of a ring."""
    if members == 1:
        return 0.0
    return 1e3 * (size * (members - 1) / members / speed + 20e-6 + 3e-6 * (members - 1))


def reduce(size, members, speed):
    return 2 * gather(size, members, speed)


def milliseconds(setup, head, gpus):
    classes, dim, alone, growth = HEADS[head]
    weights, embeddings = classes * dim * ITEM, NODE * TOKENS * dim * ITEM
    over = lambda speed: speed if gpus <= NODE else min(speed, NODE * ADAPTER)
    if setup.startswith("vocabulary-parallel"):
        small = gather(NODE * TOKENS * 8, NODE, GATHER) + reduce(NODE * TOKENS * 4, NODE, REDUCE)
        small += gather(NODE * TOKENS * 12 * NODE, NODE, GATHER)
        path = gather(embeddings, NODE, GATHER) + gather(embeddings, NODE, SCATTER) + small
        return growth * alone + path + reduce(weights / NODE, gpus // NODE, ADAPTER)
    if setup.startswith("HSDP"):
        within = 2 * gather(weights, NODE, GATHER) + gather(weights, NODE, SCATTER)
        return alone + within + reduce(weights / NODE, gpus // NODE, ADAPTER)
    if setup.startswith("FSDP2"):
        path = 2 * gather(weights, gpus, over(GATHER))
        return alone + path + gather(weights, gpus, over(SCATTER))
    return alone + reduce(weights, gpus, over(REDUCE))


def rows():
    text = PAGE.read_text(encoding="utf-8").split("In milliseconds, with 8,192 tokens")[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_follows_from_the_formulas():
    found = rows()
    assert [row[0].split(",")[0].split()[0] for row in found] == [
        "vocabulary-parallel", "HSDP", "FSDP2", "DDP"
    ]  # fmt: skip
    for setup, *cells in found:
        places = [(head, gpus) for head in HEADS for gpus in (8, 64, 1024)]
        for (head, gpus), cell in zip(places, cells, strict=True):
            if cell:
                expected = milliseconds(setup, head, gpus)
                assert float(cell) == pytest.approx(expected, abs=0.2), (setup, head, gpus)
            else:
                assert setup.startswith("HSDP"), "in one node it is FSDP2"
                assert gpus == NODE
