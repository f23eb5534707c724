"""The table of docs/distributed.md is what its script computes, and the script's arithmetic."""

import pytest

from benchmark import distributed_model as model


def test_page_has_the_table_of_the_script():
    page = model.PAGE.read_text()
    assert page == model.fill(page), "python -m benchmark.distributed_model --write"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="markers of the model once"):
        model.fill("# A page\n")


def test_ring():
    cost = model.gather(8e9, 8, 1e9)
    assert cost.bytes == 7e9
    assert cost.seconds == pytest.approx(7 + model.CALL + 7 * model.STEP)
    assert model.reduce(8e9, 8, 1e9).bytes == 14e9
    assert model.gather(8e9, 1, 1e9) == model.Cost(0.0, 0.0)


def test_many_nodes_are_no_faster_than_one():
    for setup in (model.vocab_parallel, model.fsdp, model.hsdp, model.data_parallel):
        times = [setup(model.SHAPES["gemma2"], 0.02, gpus).seconds for gpus in (8, 64, 1024)]
        assert times == sorted(times)
