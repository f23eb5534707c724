"""The model of docs/distributed.md: its arithmetic, and what measurements replace in it."""

import pytest
import torch

from benchmark import distributed_model as model
from benchmark.distributed_traffic import collectives
from benchmark.results import Device

SHAPE = model.SHAPES["gemma2"]


def devices(distributed=True, milliseconds=20.0):
    """An H100 with times of one GPU, and of two if asked for."""
    device = Device("NVIDIA H100 80GB HBM3")
    environment = {"device": device.name, "torch": "2", "triton": "3", "commit": "abc"}
    device.files["table.json"] = {"part": "table", "environment": environment}
    device.rows = [
        {
            "test_data": f"{name}-structured", "method": "cce", "kind": "loss-fw-bw",
            "part": "table", "source": "table.json", "runtime_ms": milliseconds,
        }
        for name in model.HEADS
    ]  # fmt: skip
    if distributed:
        row = {"tokens": 8192, "impl": "cce", "processes": 2, "ms": 30.0}
        device.files["distributed_2.json"] = {
            "part": "distributed", "processes": 2, "environment": environment, "skipped": [],
            "links": {"all_reduce": 200.0, "all_gather": 300.0, "reduce_scatter": 250.0},
            "rows": [
                {**row, "data": "gemma2", "setup": "DDP"},
                {**row, "data": "gemma2", "setup": "FSDP2", "ms": None, "why": "out of memory"},
                {**row, "data": "gemma2", "setup": "DDP", "impl": "cce_exact"},
                {**row, "data": "llama3-8b", "setup": "vocabulary-parallel, own tokens"},
            ],
        }  # fmt: skip
    return [device]


def test_ring():
    cost = model.gather(8e9, 8, 1e9)
    assert cost.bytes == 7e9
    assert cost.seconds == pytest.approx(7 + model.CALL + 7 * model.STEP)
    assert model.reduce(8e9, 8, 1e9).bytes == 14e9
    assert model.gather(8e9, 1, 1e9) == model.Cost(0.0, 0.0)


def test_many_nodes_are_no_faster_than_one():
    for setup in (model.vocab_parallel, model.fsdp, model.hsdp, model.data_parallel):
        times = [setup(SHAPE, 0.02, gpus, model.Speeds()).seconds for gpus in (8, 64, 1024)]
        assert times == sorted(times)


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("setup", model.MEASURED_AS)
def test_the_model_sends_what_the_benchmark_counts(setup, gpus):
    row = setup(SHAPE, 0.02, gpus, model.Speeds())
    sizes = (model.TOKENS, SHAPE.num_classes, SHAPE.dim)
    counted = collectives(model.MEASURED_AS[setup], *sizes, "cce", torch.bfloat16, gpus)
    assert (row.on_path + row.sync).bytes == pytest.approx(sum(one.sent(gpus) for one in counted))


def test_measured_links_replace_the_assumed_ones():
    assert model.speeds_of(devices(False)) == model.Speeds()
    speeds = model.speeds_of(devices())
    assert speeds == model.Speeds(2e11, 3e11, 2.5e11, measured_on=2)
    assert "Measured on 2 GPUs" in model.assumptions(devices())
    assert "all-reduce 200, all-gather 300, reduce-scatter 250" in model.assumptions(devices())
    assert model.assumptions(devices(False)).startswith("Assumed: 8 GPUs in a node, NVLink of 450")
    assert model.table(devices()) != model.table(devices(False))


def test_across_nodes_the_adapters_are_the_limit():
    assert model.Speeds(1e9, 2e9, 1e15).over(64) == model.Speeds(1e9, 2e9, 8 * model.NETWORK)
    assert model.Speeds(1e9, 2e9, 1e15).over(8).reduce_scatter == 1e15


def test_the_newest_time_of_one_gpu_is_taken():
    found = devices()
    assert model.one_gpu(found, "gemma2") == (0.02, "abc")
    newer = {**found[0].rows[0], "runtime_ms": 10.0, "test_data": "gemma2-structured"}
    found[0].rows.append(newer)
    assert model.one_gpu(found, "gemma2") == (0.01, "abc")
    with pytest.raises(ValueError, match="no measurement on an H100 has loss and gradients"):
        model.one_gpu([Device("Some GPU")], "gemma2")


def test_model_beside_measurement():
    lines = model.check(devices()).splitlines()
    assert len(lines) == 2 + 2  # what did not fit and other implementations are left out
    weights = SHAPE.num_classes * SHAPE.dim * 2
    expected = 20 + 1e3 * model.reduce(weights, 2, 2e11).seconds
    gpus = "2 x NVIDIA H100 80GB HBM3"
    assert lines[2] == (
        f"| Gemma 2 2B | {gpus} | DDP | {expected:.1f} | 30.0 | {30 / expected:.2f} |"
    )
    assert lines[3].startswith(f"| Llama 3 8B | {gpus} | vocabulary-parallel, own tokens | ")
    assert model.check(devices(False)) == ""


def test_without_an_h100_there_is_no_model():
    for make in (model.assumptions, model.table, model.check):
        assert make([Device("Some GPU")]) == ""


def test_kernels_of_shards_take_what_was_measured():
    """The most GPUs count, up to as many as are asked about."""
    (device,) = found = devices()
    assert model.growth(found, "llama3-8b", 8) == (1.0, None), "one GPU was not measured beside"
    row = {"data": "llama3-8b", "tokens": 8192, "impl": "cce"}
    shard = {**row, "setup": "vocabulary-parallel, own tokens"}
    record = device.files["distributed_2.json"]
    device.files["distributed_1.json"] = {
        **record, "processes": 1, "rows": [{**row, "setup": "one GPU", "ms": 20.0}],
    }  # fmt: skip
    for gpus, alone in ((2, 24.0), (4, 28.0)):
        device.files[f"distributed_{gpus}.json"] = {
            **record, "processes": gpus, "rows": [{**shard, "ms": 31.0, "alone_ms": alone}],
        }  # fmt: skip
    assert model.own_time(device, "llama3-8b") == 0.02
    assert model.own_time(device, "gemma2") is None
    for gpus, factor, measured in ((8, 1.4, 4), (2, 1.2, 2)):
        found_factor, of = model.growth(found, "llama3-8b", gpus)
        assert found_factor == pytest.approx(factor)
        assert of["processes"] == measured
    assert model.speeds_of(found).measured_on == 4
    assert "| Llama 3 8B | 8 | vocabulary-parallel in a node" in model.table(found)
    assert " 28.0 | " in model.table(found).splitlines()[2]


def test_each_kind_of_gpu_is_checked_with_its_own_times():
    h100, h200 = devices()[0], devices()[0]
    h200.name = "NVIDIA H200"
    row = {"data": "llama3-8b", "tokens": 8192, "impl": "cce"}
    shard = {**row, "setup": "vocabulary-parallel, own tokens", "ms": 30.0}
    for device, alone in ((h100, 22.0), (h200, 28.0)):
        record = device.files["distributed_2.json"]
        device.files = {
            **device.files,
            "distributed_1.json": {
                **record, "processes": 1, "rows": [{**row, "setup": "one GPU", "ms": 20.0}],
            },
            "distributed_2.json": {**record, "rows": [{**shard, "alone_ms": alone}]},
        }  # fmt: skip
    first, second = model.check([h100, h200]).splitlines()[2:]
    exchange = (
        1e3
        * model.vocab_parallel(model.SHAPES["llama3-8b"], 0.0, 2, model.speeds_of([h100])).seconds
    )
    assert first.split(" | ")[3] == f"{22 + exchange:.1f}"
    assert second.split(" | ")[3] == f"{28 + exchange:.1f}"
