"""Runs that differ only in how the loss is computed, several seeds each, and their record.

Every method starts from the same weights and sees the same batches in the same order, which the
seed decides. Text that was held out is measured in the same way for all: by full logits in float32.
Legend: S steps, B sequences, T tokens each, V classes.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cut_cross_entropy.benchmark.environment import commit_of_checkout, processor
from cut_cross_entropy.benchmark.measure import synchronize
from cut_cross_entropy.benchmark.output import command_line, write_json
from cut_cross_entropy.options import ALL_IMPLS
from experiments.corpus import installed_roots
from experiments.largest import largest_batch
from experiments.peers import PEERS, peer_loss
from training.arguments import Parser, add_settings, config_from
from training.loop import Schedule, draw_batches, train_steps
from training.losses import FULL, FullLogits, hidden_states, make_loss

REORDERED = "full_reordered"
"""Full logits with the sequences of every batch in reverse: the same sums in another order.

Its distance from full logits is what floating point alone does to a run; a method can be held
against it.
"""

GPU_METHODS = [FULL, "cce", "cce_exact", REORDERED]
CPU_METHODS = [FULL, "chunked", REORDERED]
MEASUREMENTS = Path("docs/measurements/experiments")
"""Folder of the records that the documentation is made from."""

LABELS = {"sequence_length": "length"}
"""Settings that records name otherwise."""

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "cut-cross-entropy", "liger-kernel")
SETTINGS = ("steps", "batch_size", "sequence_length", "learning_rate", "warmup_steps")
"""Settings of the training script that the experiments have too."""

JUDGED_TOKENS = 4096
"""Tokens whose logits the held-out loss holds at a time."""


class Experiment(ABC):
    """Data and models of an experiment; made from the arguments of its command line.

    Attributes:
        training, held_out: token ids, (n, T), int64; the first on the CPU.
        settings: settings for the record, in addition to :data:`SETTINGS`.
        data: description of the data for the record.
        weight_decay: weight decay of AdamW.
        label: of the record's file, after the name of the experiment; "" without one.
    """

    training: Tensor
    held_out: Tensor
    settings: dict[str, Any]
    data: dict[str, Any]
    weight_decay: float
    label = ""

    @abstractmethod
    def make_model(self, seed: int) -> Any:
        """Return a model with the weights at the start of the runs of ``seed``."""

    def describe(self, batches: Tensor) -> dict[str, Any]:
        """Return what the record of a run on ``batches`` (S, B, T) has in addition."""
        return {}

    def measure(self, model: Any, batches: Tensor) -> dict[str, Any]:
        """Measure a model that trains on ``batches`` (S, B, T) on the text that was held out."""
        return {"held_out_loss": mean(token_losses(model, self.held_out)[0])}

    def loss_of(self, method: str) -> FullLogits:
        """Return the loss of ``method``; see :func:`loss_of`."""
        return loss_of(method, self.device, self.arguments.apple)

    def train(
        self,
        model: Any,
        method: str,
        batches: Tensor,  # (S, B, T), int64, on the model's device
        schedule: Schedule,
        interval: int,
    ) -> dict[str, Any]:
        """Train ``model`` by ``method``; see :func:`train`."""
        return train(
            self,
            model,
            method,
            self.losses[method],
            batches,
            schedule=schedule,
            interval=interval,
        )

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        # Before anything large is loaded, to refuse a method that cannot run.
        self.losses = {method: self.loss_of(method) for method in arguments.methods}
        self.roots: list[Path] = arguments.roots or installed_roots()
        self.characters = int(arguments.megabytes * 1e6)


def mean(losses: Tensor) -> float:
    """Return the mean with the digits that the record keeps."""
    return round(float(losses.double().mean()), 6)


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Return all ``texts`` in one row of token ids, the end-of-text token after each if any."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    rows = [
        torch.tensor([*ids, *end], dtype=torch.int64)
        for start in range(0, len(texts), 2048)
        for ids in tokenizer(list(texts[start : start + 2048]), **options)["input_ids"]
    ]
    return torch.cat(rows)


def cut_windows(tokens: Tensor, length: int, first: int | None = None) -> Tensor:
    """Cut ``tokens`` into windows without overlap, (n, ``length``); the rest is left out.

    Each begins with the token ``first``, if given.
    """
    own = length - (first is not None)
    windows = tokens[: len(tokens) // own * own].view(-1, own)
    return windows if first is None else F.pad(windows, (1, 0), value=first)


def sha256(tokens: Tensor) -> str:
    """Hash ``tokens``, to tell whether two records are of the same data."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


@torch.no_grad()
def token_losses(
    model: Any,
    windows: Tensor,  # (n, T), int64, on the model's device
    classes: Tensor | None = None,  # (V,), bool
    autocast: bool = True,
) -> tuple[Tensor, float]:
    """Compute the loss of every token but the first of a window, by full logits in float32.

    Args:
        model: a causal language model with logits that are its output layer's, without softcap
            or scale.
        windows: token ids, (n, T).
        classes: classes whose probability is added up.
        autocast: whether the body computes in bfloat16.

    Returns:
        Losses (n, T - 1) on the CPU, and the mean probability of ``classes`` (0 without them).
    """
    training = model.training
    model.eval()
    head = model.get_output_embeddings()
    found, mass = [], 0.0
    for batch in windows.split(max(1, JUDGED_TOKENS // windows.shape[1])):
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=autocast):
            hidden = hidden_states(model, batch)
        logits = head(hidden[:, :-1].float())
        found.append(F.cross_entropy(logits.mT, batch[:, 1:], reduction="none").cpu())
        if classes is not None:
            mass += float(logits.softmax(-1)[..., classes].sum(dtype=torch.float64))
    model.train(training)
    return torch.cat(found), mass / windows[:, 1:].numel()


def loss_of(method: str, device: torch.device, apple: Path | None = None) -> FullLogits:
    """Return the loss of ``method``; ``apple`` is a folder that holds Apple's package.

    Raises:
        ImportError: the method is another package's, which is not installed.
        RuntimeError: the method cannot run on ``device``.
    """
    if method in PEERS:
        return peer_loss(method, apple)
    return make_loss(FULL if method == REORDERED else method, device)


def train(
    experiment: Experiment,
    model: Any,
    method: str,
    loss: FullLogits,
    batches: Tensor,  # (S, B, T), int64, on the model's device
    schedule: Schedule,
    interval: int,
    autocast: bool = True,
) -> dict[str, Any]:
    """Train ``model`` by the ``loss`` of ``method``, and measure it after every ``interval`` steps
    and at the end.

    Returns:
        Losses of all steps, the measurements, milliseconds per step and peak memory (0 on a CPU).

    Raises:
        RuntimeError: the method cannot run here.
        FloatingPointError: a loss is not finite.
    """
    device, steps = batches.device, len(batches)
    shown = batches.flip(1) if method == REORDERED else batches
    on_gpu = device.type == "cuda"
    gc.collect()  # a patched model is part of cycles, and the last run's would count here
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    losses, judged, peak = torch.zeros(steps, device=device), [], 0
    first_timed = min(10, steps - 1)  # those before compile kernels and choose their settings
    began, measuring = time.perf_counter(), 0.0
    found = train_steps(model, loss, shown, schedule, autocast)
    for done, value in enumerate(found, start=1):
        losses[done - 1] = value
        if done == first_timed:
            synchronize(device)
            began, measuring = time.perf_counter(), 0.0
        if done % interval and done < steps:
            continue
        synchronize(device)
        paused = time.perf_counter()
        peak = max(peak, torch.cuda.max_memory_allocated(device) if on_gpu else 0)
        judged.append({"step": done, **experiment.measure(model, batches)})
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"a loss of {method} is not finite before step {done}")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        measuring += time.perf_counter() - paused
    busy = time.perf_counter() - began - measuring
    return {
        "losses": [round(value, 6) for value in losses.tolist()],
        "judged": judged,
        "ms_per_step": round(1000 * busy / max(1, steps - first_timed), 3),
        "peak_mib": round(peak / 2**20, 1),
    }


def run(name: str, kind: type[Experiment], arguments: argparse.Namespace) -> Path:
    """Do all runs; return the record, which is written after each of them.

    No run starts that would end after the time limit if it took as long as the last of its method
    or, if that is the first, as the longest so far.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: wrong settings, no such model, no text.
        ImportError: a method is another package's, which is not installed.
    """
    end = time.monotonic() + arguments.time_limit
    took: dict[str, float] = {}  # by method; the first run of each compiles kernels
    device = config_from(arguments).torch_device()
    arguments.methods = arguments.methods or (GPU_METHODS if device.type == "cuda" else CPU_METHODS)
    experiment = kind(arguments, device)
    methods, losses = arguments.methods, experiment.losses
    trained, held_out = experiment.training, experiment.held_out
    if arguments.largest and device.type != "cuda":
        raise ValueError(f"--largest needs a CUDA device, got {device}")
    if not (len(trained) and len(held_out)):
        raise ValueError(
            f"megabytes must give more text than {arguments.held_out} sequences of "
            f"{arguments.sequence_length} tokens, which are held out"
        )
    print(f"{trained.numel()} tokens to train on, {held_out.numel()} held out, on {device}")
    schedule = Schedule(
        arguments.learning_rate,
        arguments.warmup_steps,
        experiment.weight_decay,
        final=0.1,
        max_grad_norm=1.0,
        betas=(0.9, 0.95),
    )
    device_name, label = processor(), device.type
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
        label = device_name.lower().removeprefix("nvidia ").split()[0]
    path: Path = arguments.out / f"{'_'.join(filter(None, (name, experiment.label, label)))}.json"
    record: dict[str, Any] = {
        "experiment": name,
        "machine": machine(device_name, arguments.commit),
        "settings": {
            **{LABELS.get(x, x): getattr(arguments, x) for x in SETTINGS},
            **experiment.settings,
            "precision": "float32 parameters, bfloat16 autocast",
        },
        "data": {**experiment.data, "held_out_tokens": held_out.numel()},
        "runs": [],
        "skipped": [],
        "largest": [],
    }
    if arguments.resume and path.exists():
        resume(record, json.loads(path.read_text(encoding="utf-8")), path)
    done = {(run["method"], run["seed"]) for run in record["runs"]}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        batches = draw_batches(trained, arguments.steps, arguments.batch_size, seed).to(device)
        for method in methods:
            began = time.monotonic()
            this = {"method": method, "seed": seed}
            if (method, seed) in done:
                continue
            if began + took.get(method, max(took.values(), default=0.0)) > end:
                reason = f"time limit of {arguments.time_limit:g} s"
                record["skipped"].append({**this, "reason": reason})
            else:
                model = experiment.make_model(seed)
                if "before" not in record:
                    record["before"] = experiment.measure(model, batches)
                torch.manual_seed(seed)
                interval = arguments.judge_interval or arguments.steps
                result = experiment.train(model, method, batches, schedule, interval)
                took[method] = time.monotonic() - began
                record["runs"].append({**this, **result, **experiment.describe(batches)})
                last = {k: v for k, v in result["judged"][-1].items() if isinstance(v, float)}
                print(f"{this}: {last}, {result['ms_per_step']:.1f} ms per step", flush=True)
            write_json(path, record)
    done, longest = {each["method"] for each in record["largest"]}, 0.0
    for method in methods if arguments.largest else ():
        began = time.monotonic()
        if method == REORDERED or method in done or began + longest > end:
            continue
        found = largest_batch(
            experiment.make_model(arguments.first_seed),
            losses[method],
            trained.to(device),
            schedule,
            arguments.batch_size,
        )
        longest = max(longest, time.monotonic() - began)
        record["largest"].append({"method": method, **found})
        print(f"{method}: largest batch {found}", flush=True)
        write_json(path, record)
    return path


def resume(record: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    """Take over the runs of an ``old`` record, read from ``path``.

    Raises:
        ValueError: it is of other settings or data, another device, version or commit.
    """
    machines = [{**one["machine"], "command": "", "date": ""} for one in (record, old)]
    if machines[0] != machines[1] or any(record[x] != old[x] for x in ("settings", "data")):
        raise ValueError(f"--resume: {path} has other settings, data, device, versions or commit")
    for name in ("runs", "before", "largest"):
        if name in old:
            record[name] = old[name]


def machine(device: str, commit: str | None) -> dict[str, Any]:
    """Describe where figures come from: device, versions, commit and command line."""
    installed = {
        one.name.lower().replace("_", "-"): one.version
        for one in importlib.metadata.distributions()
    }
    return {
        "device": device,
        "python": platform.python_version(),
        "versions": {package: installed.get(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": commit or commit_of_checkout(),
        "command": command_line(Path(sys.argv[0]).stem, sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def build_parser(
    name: str, description: str, peers: Sequence[str] = PEERS, **defaults: Any
) -> Parser:
    """Build the options that every experiment has.

    Args:
        name: module of the experiment.
        description: for ``--help``.
        peers: methods that are other packages'.
        defaults: those that differ between experiments.
    """
    parser = Parser(prog=f"python -m experiments.{name}", description=description)
    add_settings(parser, (*SETTINGS, "device"), **defaults)
    add = parser.add_argument
    add("--out", type=Path, default=MEASUREMENTS, help="folder of the JSON file")
    add(
        "--methods",
        nargs="+",
        choices=[FULL, REORDERED, *peers, *ALL_IMPLS],
        metavar="METHOD",
        help=f"what computes the loss, in this order: {FULL}, {REORDERED} (the same with every "
        f"batch reversed), another package ({' '.join(peers)}) or an implementation; unless given: "
        f"{' '.join(GPU_METHODS)} on a GPU, {' '.join(CPU_METHODS)} without one",
    )
    add("--apple", type=Path, metavar="FOLDER", help="folder that holds Apple's package")
    add("--resume", action="store_true", help="keep the runs of the record that is there already")
    add("--largest", action="store_true", help="find the largest batch of each method after that")
    add("--commit", help="commit of the code, where neither COMMIT nor git says it")
    add("--seeds", type=int, help="number of seeds")
    add("--first-seed", type=int, default=0, help="first seed; the others follow")
    add("--time-limit", type=float, default=600.0, help="seconds within which runs have to end")
    add("--roots", type=Path, nargs="+", help="folders of the text; unless given, Python's own")
    add("--megabytes", type=float, help="text to read")
    add("--held-out", type=int, help="sequences held out")
    add("--judge-interval", type=int, help="steps between measurements; the last has one anyway")
    add("--smoke", action="store_true", help="tiny settings that test the code in seconds")
    parser.set_defaults(**defaults)
    return parser


def main(
    parser: Parser, smoke: dict[str, Any], kind: type[Experiment], argv: Sequence[str] | None
) -> int:
    """Run the command line; ``--smoke`` has other defaults. Exit code 0 done, 2 wrong input."""
    name = parser.prog.rpartition(".")[2]
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        parser.set_defaults(**smoke)
        arguments = parser.parse_args(argv)
    try:
        print(f"written to {run(name, kind, arguments)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0
