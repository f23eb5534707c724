"""A model, not a measurement: time of loss and gradients of an output layer on many GPUs.

Measured times of one GPU (docs/measurements/h100.json) plus bytes over stated link speeds. ``python
-m benchmark.distributed_model`` prints the table of docs/distributed.md, ``--write`` puts it there.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmark.shapes import SHAPES, Shape

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/distributed.md"
MEASURED = ROOT / "docs/measurements/h100.json"

TOKENS = 8192  # of each GPU
NODE = 8  # GPUs of a node
EFFICIENCY = 0.8  # of a link, that a large collective reaches
NVLINK = 450e9 * EFFICIENCY  # bytes a second, a direction of one GPU: NVLink 4
NETWORK = 50e9 * EFFICIENCY  # bytes a second of one GPU's adapter: 400 Gbit/s
STEP = 3e-6  # seconds that a ring needs for each of its members
CALL = 20e-6  # seconds that any collective needs
ITEM = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Cost:
    """What a GPU sends, and how long that takes."""

    bytes: float
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.seconds + other.seconds)


def gather(size: float, members: int, bandwidth: float) -> Cost:
    """All-gather to, or reduce-scatter from, ``size`` bytes in a ring."""
    if members == 1:
        return Cost(0.0, 0.0)
    sent = size * (members - 1) / members
    return Cost(sent, sent / bandwidth + CALL + STEP * (members - 1))


def reduce(size: float, members: int, bandwidth: float) -> Cost:
    """All-reduce of ``size`` bytes: a reduce-scatter and an all-gather."""
    return gather(size, members, bandwidth) + gather(size, members, bandwidth)


def across(gpus: int) -> float:
    """Bandwidth of a ring over all GPUs: a node's adapters together carry what leaves it."""
    return NVLINK if gpus <= NODE else min(NVLINK, NODE * NETWORK)


@dataclass(frozen=True)
class Estimate:
    """One row.

    Args:
        on_path: exchanges that the loss or its gradients wait for.
        sync: sums of the classifier's gradient, which the rest of the backward can hide.
        memory: bytes of the classifier, its gradient, and what is gathered, at the peak.
    """

    name: str
    compute: float
    on_path: Cost
    sync: Cost
    memory: float

    @property
    def seconds(self) -> float:
        """With nothing hidden behind anything."""
        return self.compute + self.on_path.seconds + self.sync.seconds


def vocab_parallel(shape: Shape, compute: float, gpus: int) -> Estimate:
    """A node shares the vocabulary, every GPU has tokens of its own; nodes are replicas."""
    tokens, weights = TOKENS * NODE, shape.num_classes * shape.dim * ITEM
    embeddings = tokens * shape.dim * ITEM
    # e, the targets, the bounds, three numbers a token; dE, and the gradients of the losses
    path = gather(embeddings, NODE, NVLINK) + gather(tokens * 8, NODE, NVLINK)
    path += reduce(tokens * 4, NODE, NVLINK) + gather(tokens * 12 * NODE, NODE, NVLINK)
    path += gather(embeddings, NODE, NVLINK)
    sync = reduce(weights / NODE, gpus // NODE, NETWORK)
    return Estimate(
        "vocabulary-parallel in a node, tokens of its own on each GPU",
        compute,
        path,
        sync,
        2 * weights / NODE + 2 * embeddings,
    )


def fsdp(shape: Shape, compute: float, gpus: int) -> Estimate:
    """Sharded over all GPUs: gathered for the loss and for the gradients."""
    weights, speed = shape.num_classes * shape.dim * ITEM, across(gpus)
    path = gather(weights, gpus, speed) + gather(weights, gpus, speed)
    sync = gather(weights, gpus, speed)
    return Estimate("FSDP2 over all GPUs", compute, path, sync, 2 * weights / gpus + 2 * weights)


def hsdp(shape: Shape, compute: float, gpus: int) -> Estimate:
    """Sharded within a node, replicated over the nodes."""
    weights = shape.num_classes * shape.dim * ITEM
    path = gather(weights, NODE, NVLINK) + gather(weights, NODE, NVLINK)
    sync = gather(weights, NODE, NVLINK) + reduce(weights / NODE, gpus // NODE, NETWORK)
    return Estimate(
        "HSDP, sharded within a node", compute, path, sync, 2 * weights / NODE + 2 * weights
    )


def data_parallel(shape: Shape, compute: float, gpus: int) -> Estimate:
    """The whole classifier on every GPU."""
    weights = shape.num_classes * shape.dim * ITEM
    return Estimate(
        "DDP", compute, Cost(0.0, 0.0), reduce(weights, gpus, across(gpus)), 2 * weights
    )


def measured(name: str) -> float:
    """Seconds of loss and gradients of ``TOKENS`` tokens on one H100 by ``cce``."""
    wanted = ("cce", "loss-fw-bw", f"{name}-structured")
    for row in json.loads(MEASURED.read_text())["rows"]:
        if (row["method"], row["kind"], row["test_data"]) == wanted:
            return float(row["runtime_ms"]) / 1e3
    raise ValueError(f"{MEASURED.name} has no row {wanted}")


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| head | GPUs | set-up | kernels, ms | exchanged on the way, ms | sum of dC, ms "
        "| all, ms | sent by a GPU, MiB | memory at the peak, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("llama3-8b", "gemma2"):
        shape, compute = SHAPES[name], measured(name)
        for gpus in (8, 64, 1024):
            for setup in (vocab_parallel, hsdp, fsdp, data_parallel):
                if setup is hsdp and gpus == NODE:
                    continue  # FSDP2
                row = setup(shape, compute, gpus)
                sent = (row.on_path + row.sync).bytes / 2**20
                milliseconds = [row.compute, row.on_path.seconds, row.sync.seconds, row.seconds]
                cells = [
                    shape.title,
                    f"{gpus:,}",
                    row.name,
                    *(f"{1e3 * s:.1f}" for s in milliseconds),
                ]
                cells += [f"{sent:,.0f}", f"{row.memory / 2**20:,.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fill(page: str) -> str:
    """The page with the table between its markers."""
    begin, end = "<!-- begin model -->\n", "<!-- end model -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if len(re.findall(pattern, page, re.DOTALL)) != 1:
        raise ValueError(f"{PAGE.name} must have the markers of the model once")
    return re.sub(pattern, lambda _: begin + table() + end, page, flags=re.DOTALL)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/distributed.md")
    if parser.parse_args().write:
        PAGE.write_text(fill(PAGE.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
