"""A model, not a measurement: time of loss and gradients of an output layer on many GPUs.

Measured times of one H100 plus bytes over the speeds of links. These speeds, and what a shard of
the classes with the tokens of all GPUs costs beside all classes with those of one, are what
``benchmark.distributed`` measured, or stated ones where it has not run. ``python -m
benchmark.remake`` puts the tables into docs/distributed.md; ``python -m
benchmark.distributed_model`` prints them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.distributed_tables import Record, records
from benchmark.results import Device, Row, read_all
from benchmark.shapes import SHAPES, Shape

GPU = "H100"
SAME_LINKS = (GPU, "H200")
"""Kinds of GPU with NVLink 4, on which what GPUs do together can be measured as well."""
HEADS = ("llama3-8b", "gemma2")

TOKENS = 8192  # of each GPU
NODE = 8  # GPUs of a node
EFFICIENCY = 0.8  # of a link, that a large collective reaches, where that was not measured
NVLINK = 450e9  # bytes a second, a direction of one GPU: NVLink 4
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


@dataclass(frozen=True)
class Speeds:
    """Bytes a second that a GPU sends within a node, by the collective.

    Args:
        measured_on: how many GPUs they were measured on; None if they are assumed.
    """

    all_reduce: float = NVLINK * EFFICIENCY
    all_gather: float = NVLINK * EFFICIENCY
    reduce_scatter: float = NVLINK * EFFICIENCY
    measured_on: int | None = None

    def over(self, gpus: int) -> "Speeds":
        """Of a ring over all GPUs: a node's adapters together carry what leaves it."""
        if gpus <= NODE:
            return self
        most = NODE * NETWORK
        return Speeds(
            min(self.all_reduce, most), min(self.all_gather, most), min(self.reduce_scatter, most)
        )


def several(devices: Sequence[Device]) -> list[tuple[Device, Record]]:
    """Measurements of several GPUs with the model's links, those of the most GPUs last."""
    found = [
        (device, record)
        for device, record in records(devices)
        if record["processes"] > 1 and any(kind in device.name for kind in SAME_LINKS)
    ]
    return sorted(found, key=lambda pair: int(pair[1]["processes"]))


def speeds_of(devices: Sequence[Device]) -> Speeds:
    """Those of the measurement with the most GPUs, or the assumed ones."""
    found = several(devices)
    if not found:
        return Speeds()
    _, most = found[-1]
    in_bytes = {kind: 1e9 * speed for kind, speed in most["links"].items()}
    return Speeds(**in_bytes, measured_on=most["processes"])


def growth(devices: Sequence[Device], name: str, gpus: int) -> tuple[float, Record | None]:
    """What the kernels of a shard of the classes with the tokens of all GPUs take, over those of
    all classes with the tokens of one; and the measurement, the one of most GPUs up to ``gpus``.
    """
    result: tuple[float, Record | None] = (1.0, None)
    for device, record in several(devices):
        wanted = (name, TOKENS, MEASURED_AS[vocab_parallel], "cce")
        shard, whole = _time(record, wanted, "alone_ms"), own_time(device, name)
        if shard is not None and whole is not None and record["processes"] <= gpus:
            result = (shard / (1e3 * whole), record)
    return result


def own_time(device: Device, name: str) -> float | None:
    """Seconds of one GPU of a kind for its own tokens, measured where several were."""
    for _, record in records([device]):
        if record["processes"] == 1:
            found = _time(record, (name, TOKENS, "one GPU", "cce"), "ms")
            return None if found is None else found / 1e3
    return None


def _time(record: Record, wanted: tuple[object, ...], what: str) -> float | None:
    for row in record["rows"]:
        if (row["data"], row["tokens"], row["setup"], row["impl"]) == wanted:
            return None if row.get(what) is None else float(row[what])
    return None


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


def vocab_parallel(shape: Shape, compute: float, gpus: int, speeds: Speeds) -> Estimate:
    """A node shares the vocabulary, every GPU has tokens of its own; nodes are replicas."""
    node = min(gpus, NODE)
    tokens, weights = TOKENS * node, shape.num_classes * shape.dim * ITEM
    embeddings = tokens * shape.dim * ITEM
    # e, the targets, the bounds, three numbers a token; dE
    path = gather(embeddings, node, speeds.all_gather)
    path += gather(tokens * 8, node, speeds.all_gather)
    path += reduce(tokens * 4, node, speeds.all_reduce)
    path += gather(tokens * 12 * node, node, speeds.all_gather)
    path += gather(embeddings, node, speeds.reduce_scatter)
    return Estimate(
        "vocabulary-parallel in a node, tokens of its own on each GPU",
        compute,
        path,
        reduce(weights / node, gpus // node, NETWORK),
        2 * weights / node + 2 * embeddings,
    )


def fsdp(shape: Shape, compute: float, gpus: int, speeds: Speeds) -> Estimate:
    """Sharded over all GPUs: gathered for the loss and for the gradients."""
    weights, ring = shape.num_classes * shape.dim * ITEM, speeds.over(gpus)
    path = gather(weights, gpus, ring.all_gather) + gather(weights, gpus, ring.all_gather)
    sync = gather(weights, gpus, ring.reduce_scatter)
    return Estimate("FSDP2 over all GPUs", compute, path, sync, 2 * weights / gpus + 2 * weights)


def hsdp(shape: Shape, compute: float, gpus: int, speeds: Speeds) -> Estimate:
    """Sharded within a node, replicated over the nodes."""
    weights = shape.num_classes * shape.dim * ITEM
    path = gather(weights, NODE, speeds.all_gather) + gather(weights, NODE, speeds.all_gather)
    sync = gather(weights, NODE, speeds.reduce_scatter)
    sync += reduce(weights / NODE, gpus // NODE, NETWORK)
    return Estimate(
        "HSDP, sharded within a node", compute, path, sync, 2 * weights / NODE + 2 * weights
    )


def data_parallel(shape: Shape, compute: float, gpus: int, speeds: Speeds) -> Estimate:
    """The whole classifier on every GPU."""
    weights = shape.num_classes * shape.dim * ITEM
    sync = reduce(weights, gpus, speeds.over(gpus).all_reduce)
    return Estimate("DDP", compute, Cost(0.0, 0.0), sync, 2 * weights)


MEASURED_AS = {
    vocab_parallel: "vocabulary-parallel, own tokens",
    fsdp: "FSDP2",
    data_parallel: "DDP",
}
"""What ``benchmark.distributed`` calls them."""


def one_gpu(devices: Sequence[Device], name: str) -> tuple[float, str]:
    """Seconds of loss and gradients of ``TOKENS`` tokens by ``cce``, and the commit measured.

    Raises:
        ValueError: nothing was measured on the model's kind of GPU.
    """
    for device, row in _one_gpu_rows(devices, name):
        commit = device.files[row["source"]]["environment"]["commit"]
        return float(row["runtime_ms"]) / 1e3, str(commit)
    raise ValueError(
        f"no measurement on an {GPU} has loss and gradients of `cce` for {name}-structured"
    )


def _one_gpu_rows(devices: Sequence[Device], name: str) -> list[tuple[Device, Row]]:
    equal = {"test_data": f"{name}-structured", "method": "cce", "kind": "loss-fw-bw"}
    return [
        (device, row) for device in devices if GPU in device.name for row in device.select(**equal)
    ]


def is_known(devices: Sequence[Device]) -> bool:
    """Whether one GPU of the model's kind was measured."""
    return all(_one_gpu_rows(devices, name) for name in HEADS)


def kernels(
    setup: Callable[..., Estimate], devices: Sequence[Device], name: str, gpus: int, alone: float
) -> float:
    """Seconds of a set-up's kernels, where one GPU takes ``alone`` for its own tokens."""
    return alone * growth(devices, name, gpus)[0] if setup is vocab_parallel else alone


def assumptions(devices: Sequence[Device]) -> str:
    """What the tables rest on, in words; nothing without a measurement of one GPU."""
    if not is_known(devices):
        return ""
    speeds = speeds_of(devices)
    links = "NVLink of 450 GB/s a direction, an adapter of 400 Gbit/s for each GPU, 80 % of either"
    text = "Assumed: 8 GPUs in a node, " + links + " reached; "
    if speeds.measured_on is not None:
        found = ", ".join(
            f"{kind.replace('_', '-')} {getattr(speeds, kind) / 1e9:,.0f}"
            for kind in ("all_reduce", "all_gather", "reduce_scatter")
        )
        text = (
            f"Measured on {speeds.measured_on} GPUs, large collectives over NVLink, GB/s: {found}. "
            "Assumed: 8 GPUs in a node that reach the same, an adapter of 400 Gbit/s for each GPU, "
            "80 % of it reached; "
        )
    commits = dict.fromkeys(one_gpu(devices, name)[1] for name in HEADS)
    factors = {SHAPES[name].title: growth(devices, name, NODE) for name in HEADS}
    shards = "the kernels of a shard of V / 8 classes take as long for 8 times the tokens as those "
    shards += "of all classes for the tokens once"
    measured = [(title, factor, record) for title, (factor, record) in factors.items() if record]
    if len(measured) == len(factors):
        shards = "the kernels of a shard of the classes with the tokens of all GPUs take more than "
        shards += "those of all classes with the tokens of one, " + ", ".join(
            f"{factor:.2f} times for {title} ({record['processes']} x "
            f"{record['environment']['device']}, commit {record['environment']['commit']})"
            for title, factor, record in measured
        )
    return (
        f"{text}20 microseconds for a collective and 3 for each member of its ring; {shards}; "
        f"nothing overlaps. Time of one {GPU}: commit {' and '.join(commits)}.\n"
    )


def table(devices: Sequence[Device]) -> str:
    """The model's times in Markdown; nothing without a measurement of one GPU."""
    if not is_known(devices):
        return ""
    lines = [
        "| head | GPUs | set-up | kernels, ms | exchanged on the way, ms | sum of dC, ms "
        "| all, ms | sent by a GPU, MiB | memory at the peak, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    speeds = speeds_of(devices)
    for name in HEADS:
        shape, compute = SHAPES[name], one_gpu(devices, name)[0]
        for gpus in (8, 64, 1024):
            for setup in (vocab_parallel, hsdp, fsdp, data_parallel):
                if setup is hsdp and gpus == NODE:
                    continue  # FSDP2
                row = setup(shape, kernels(setup, devices, name, NODE, compute), gpus, speeds)
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


def check(devices: Sequence[Device]) -> str:
    """The model beside what was measured, for every count of GPUs; nothing without."""
    if not is_known(devices):
        return ""
    lines = []
    speeds = speeds_of(devices)
    for device, record in several(devices):
        gpus = record["processes"]
        for row in record["rows"]:
            for setup, name in MEASURED_AS.items():
                known = (row["setup"], row["impl"], row["tokens"]) == (name, "cce", TOKENS)
                if not known or row["data"] not in HEADS or row["ms"] is None:
                    continue
                alone = own_time(device, row["data"]) or one_gpu(devices, row["data"])[0]
                compute = kernels(setup, [device], row["data"], gpus, alone)
                shape = SHAPES[row["data"]]
                model = 1e3 * setup(shape, compute, gpus, speeds).seconds
                cells = [shape.title, f"{gpus} x {device.name}", name, f"{model:.1f}"]
                cells += [f"{row['ms']:.1f}", f"{row['ms'] / model:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    header = [
        "| head | GPUs | set-up | model, ms | measured, ms | measured / model |",
        "|---|---:|---|---:|---:|---:|",
    ]
    return "\n".join([*header, *lines]) + "\n"


def main() -> None:
    """Print the tables."""
    devices = read_all(Path(__file__).resolve().parent.parent / "docs" / "measurements")
    print(assumptions(devices), table(devices), check(devices), sep="\n")


if __name__ == "__main__":
    main()
