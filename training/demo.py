"""Fine-tune one model twice, with full logits and with ``linear_cross_entropy``, and compare.

    make demo

Same start, same data, same order. Prints the losses side by side and the measured memory of the
loss, and writes ``summary.md``, ``losses.csv`` and ``demo.png`` to the output folder. The exit code
is 1 if the losses differ by more than the tolerance. Ctrl-C ends it with the steps done so far.
"""

import csv
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Read when PyTorch is loaded. Threads that wait actively take the cores from those that compute,
# once other programs need them as well. And the profiler is not to announce its start and stop.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor

from cut_cross_entropy.benchmark.measure import peak_mib
from training.arguments import Parser, add_settings, config_from
from training.config import SETUP_ERRORS, TrainConfig, check_output
from training.data import Windows, load_text, tokenize
from training.loop import StepLoop, StepRecord
from training.losses import FULL, FullLogits, hidden_states, make_loss
from training.models import load_model
from training.plot import plot_losses

TOLERANCE = 1e-3
"""Largest difference, in nats, at which the two losses still count as the same."""

MEMORY_TOKENS = 4096
"""Tokens of the first memory measurement: logits grow with them, and the demo's steps are small."""

HOW = {
    "cuda": "torch.cuda.max_memory_allocated less the memory allocated before",
    "cpu": "every allocation and release that torch.profiler records",
}
"""Measurement of the peak, by device type."""

SETTINGS = (
    "model", "data", "data_split", "data_column", "steps", "batch_size", "sequence_length",
    "learning_rate", "seed", "device", "log_interval",
)  # fmt: skip
"""Settings of the training script that the demo has too."""


@dataclass
class Comparison:
    """Results of the demo, filled in as it goes."""

    config: TrainConfig
    device: torch.device
    parameters: int
    full: list[StepRecord] = field(default_factory=list)
    cut: list[StepRecord] = field(default_factory=list)
    memory: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Peak MiB with full logits and without, by number of tokens."""

    @property
    def name(self) -> str:
        """Name of the loss without logits."""
        return f"linear_cross_entropy ({self.config.loss})"

    @property
    def pairs(self) -> list[tuple[StepRecord, StepRecord]]:
        """Steps that both losses have."""
        return list(zip(self.full, self.cut, strict=False))

    @property
    def largest_difference(self) -> float:
        """Largest difference of all steps, in nats."""
        return max((abs(a["loss"] - b["loss"]) for a, b in self.pairs), default=0.0)

    def table(self) -> str:
        """Format the result as Markdown that is also readable as text."""
        wide = max(len(self.name), 20)
        lines = [_row(wide, "", "full logits", self.name, "difference"), _rule(wide)]
        for tokens, peaks in self.memory.items():
            cells = (f"{peak:.0f} MiB" for peak in peaks)
            lines.append(_row(wide, f"peak of the loss, {tokens:,} tokens", *cells))
        for a, b in self.pairs:
            if a["step"] in (1, len(self.pairs)) or a["step"] % self.config.log_interval == 0:
                full, cut = a["loss"], b["loss"]
                losses = f"{full:.6f}", f"{cut:.6f}", f"{abs(full - cut):.1e}"
                lines.append(_row(wide, f"loss of step {a['step']}", *losses))
        if self.pairs:
            times = (f"{_seconds_per_step(log):.3f} s" for log in (self.full, self.cut))
            lines.append(_row(wide, "time per step", *times))
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        if self.memory:
            small = min(self.memory)
            notes.append(
                "Peak of the loss: forward and backward of the output layer and the loss alone, "
                f"both gradients included, from {HOW[self.device.type]}. Full logits grow with the "
                "tokens; the loss without them works in chunks of a fixed size, which may exceed "
                f"the logits of a batch as small as {small:,} tokens."
            )
        if self.pairs:
            notes.append(
                f"Largest difference of all {len(self.pairs)} steps: {self.largest_difference:.1e} "
                f"nats (allowed: {TOLERANCE:g}). Time per step: median, without the first."
            )
        if len(self.pairs) < self.config.steps:
            notes.append(
                f"Interrupted: {len(self.full)} of {self.config.steps} steps with full logits, "
                f"{len(self.cut)} without."
            )
        where = f"{self.device.type} with {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        notes.append(
            f"{self.parameters / 1e6:.0f}M parameters, float32, {where}, PyTorch "
            f"{torch.__version__}, Python {platform.python_version()}."
        )
        return notes


def _row(wide: int, first: str, full: str, cut: str, difference: str = "") -> str:
    return f"| {first:<34} | {full:>12} | {cut:>{wide}} | {difference:>10} |"


def _rule(wide: int) -> str:
    return f"|:{'-' * 35}|{'-' * 13}:|{'-' * (wide + 1)}:|{'-' * 11}:|"


def _seconds_per_step(log: list[StepRecord]) -> float:
    later = sorted(record["seconds"] for record in log[1:] or log)
    return later[len(later) // 2]


def compare(config: TrainConfig, window_count: int) -> tuple[Comparison, bool]:
    """Train twice and measure.

    Args:
        config: settings of both runs; ``loss`` is the one to compare with full logits.
        window_count: windows of the data to use, from its beginning.

    Returns:
        The results, and whether Ctrl-C ended it early.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: wrong settings.
        FloatingPointError: a loss is not finite.
        KeyboardInterrupt: Ctrl-C, before there was a result.
    """
    device = config.torch_device()
    losses = [make_loss(FULL, device), make_loss(config.loss, device)]
    text = load_text(config.data, config.data_split, config.data_column)
    print(f"loading {config.model} ...", flush=True)
    started = time.perf_counter()
    model, tokenizer = load_model(config.model, torch.float32, device)
    tokens = tokenize(text, tokenizer)
    length = config.sequence_length
    windows = Windows(tokens[: window_count * length], length, config.seed)
    print(f"loaded in {time.perf_counter() - started:.0f} s: {len(tokens)} tokens on {device}")
    result = Comparison(config, device, sum(p.numel() for p in model.parameters()))
    try:
        _measure_memory(model, tokens, losses, result)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for loss, log in zip(losses, (result.full, result.cut), strict=True):
            model.load_state_dict(start)
            _train(StepLoop(model, windows, loss, config), log)
    except KeyboardInterrupt:
        if not (result.memory or result.full):
            raise
        return result, True
    return result, False


def _train(loop: StepLoop, log: list[StepRecord]) -> None:
    from tqdm import tqdm

    name = getattr(loop.loss, "impl", FULL)
    with tqdm(total=loop.config.steps, desc=f"training, {name:>12}", unit="step") as bar:
        for _ in range(loop.config.steps):
            log.append(loop.train_step())
            bar.update()
            bar.set_postfix(loss=f"{log[-1]['loss']:.4f}")


def _measure_memory(
    model: Any, tokens: Tensor, losses: Sequence[FullLogits], result: Comparison
) -> None:
    """Measure the peak memory of each loss on real hidden states, where that is possible."""
    device, length = result.device, result.config.sequence_length
    if device.type not in HOW:
        return
    largest = min(MEMORY_TOKENS, len(tokens)) // length
    for sequences in (max(1, largest), result.config.batch_size):
        count = sequences * length
        if count > len(tokens) or count in result.memory:
            continue
        print(f"measuring the memory of the loss on {count:,} tokens ...", flush=True)
        labels = tokens[:count].view(sequences, length).to(device)
        with torch.no_grad():
            hidden = torch.cat([hidden_states(model, row[None]) for row in labels])
        hidden.requires_grad_()
        full, cut = (_peak_of_head(loss, model, hidden, labels) for loss in losses)
        result.memory[count] = full, cut


def _peak_of_head(loss: FullLogits, model: Any, hidden: Tensor, labels: Tensor) -> float:
    weight = model.get_output_embeddings().weight

    def work(_: object = None) -> object:
        return torch.autograd.grad(loss.head(model, hidden, labels), (hidden, weight))

    work()  # workspaces that stay
    return peak_mib(work, hidden.device)


def write_results(result: Comparison, folder: Path) -> None:
    """Write the table, the losses and the picture to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(result.table() + "\n", encoding="utf-8")
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "full", result.config.loss])
        for index, record in enumerate(result.full):
            cut = result.cut[index]["loss"] if index < len(result.cut) else ""
            writer.writerow([record["step"], record["loss"], cut])
    if result.pairs:
        logs = zip(*result.pairs, strict=True)
        curves = [[record["loss"] for record in log] for log in logs]
        plot_losses(curves[0], curves[1], result.name, folder / "demo.png")


def build_parser() -> Parser:
    """Build the command line of the demo."""
    parser = Parser(
        prog="demo.py",
        description="Compare training with full logits and with linear_cross_entropy.",
    )
    add_settings(parser, SETTINGS, steps=30, log_interval=5, learning_rate=5e-5)
    parser.add_argument(
        "--loss",
        default="auto",
        metavar="IMPL",
        help="implementation of linear_cross_entropy to compare with full logits",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=20,
        help="sequences of the data to use: few enough to come back, so that the loss falls",
    )
    parser.add_argument(
        "--output", default="out/demo", help="folder for the table, the losses and the picture"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 same losses, 1 too far apart, 2 wrong input, 130 Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.loss == FULL:
            raise ValueError(
                f"--loss must be an implementation of linear_cross_entropy, got {FULL}"
            )
        if arguments.windows < 1:
            raise ValueError(f"--windows must be at least 1, got {arguments.windows}")
        config = config_from(arguments)
        check_output(Path(config.output))
        result, interrupted = compare(config, arguments.windows)
    except (*SETUP_ERRORS, FloatingPointError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before there was a result", file=sys.stderr)
        return 130
    output = Path(config.output)
    write_results(result, output)
    print(f"\n{result.table()}\n\nWritten to {output}")
    if interrupted:
        return 130
    if not result.largest_difference <= TOLERANCE:
        print(f"FAILED: the losses differ by more than {TOLERANCE:g} nats", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
