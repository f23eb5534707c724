"""Fine-tune one model twice, with full logits and with ``linear_cross_entropy``, and compare.

    make demo

Same start, same data, same order. Prints the losses side by side and the measured memory of the
loss, and writes ``summary.md``, ``losses.csv`` and ``demo.png`` to the output folder. The exit code
is 1 if the losses differ by more than the tolerance; the last line says which. Ctrl-C ends it with
the steps done so far.
"""

import csv
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
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
from training.loop import Schedule, draw_batches, train_steps
from training.losses import FULL, FullLogits, hidden_states, make_loss
from training.models import load_model, vocabulary_size
from training.plot import plot_losses
from training.rows import load_windows

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
    "learning_rate", "seed", "device", "log_interval", "loss", "output",
)  # fmt: skip
"""Settings of the training script that the demo has too."""


@dataclass
class Curve:
    """Losses and seconds of the steps done with one loss."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """Results of the demo, filled in as it goes."""

    config: TrainConfig
    device: torch.device
    parameters: int
    full: Curve = field(default_factory=Curve)
    cut: Curve = field(default_factory=Curve)
    memory: dict[int, list[float]] = field(default_factory=dict)
    """Peak MiB with full logits and without, by number of tokens."""

    @property
    def name(self) -> str:
        """Name of the loss without logits."""
        return f"linear_cross_entropy ({self.config.loss})"

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Losses of the steps that both have."""
        return list(zip(self.full.losses, self.cut.losses, strict=False))

    @property
    def largest_difference(self) -> float:
        """Largest difference of all steps, in nats."""
        return max((abs(a - b) for a, b in self.pairs), default=0.0)

    def verdict(self) -> str:
        """Say in one line whether the losses agree, and what the loss without logits needs."""
        same = self.largest_difference <= TOLERANCE
        text = (
            f"{'PASSED: same losses' if same else 'FAILED: the losses differ'}, by "
            f"{self.largest_difference:.1e} nats at most over {len(self.pairs)} steps "
            f"(allowed: {TOLERANCE:g})"
        )
        if self.memory:
            tokens = max(self.memory)
            full, cut = self.memory[tokens]
            text += f"; peak of the loss, {tokens:,} tokens: {cut:.0f} instead of {full:.0f} MiB"
        return text

    def table(self) -> str:
        """Format the result as Markdown that is also readable as text."""
        rows: list[tuple[str, ...]] = [("", "full logits", self.name, "difference")]
        for tokens, peaks in self.memory.items():
            full, cut = (f"{peak:.0f} MiB" for peak in peaks)
            rows.append((f"peak of the loss, {tokens:,} tokens", full, cut, ""))
        for step, (a, b) in enumerate(self.pairs, start=1):
            if step in (1, len(self.pairs)) or step % self.config.log_interval == 0:
                rows.append((f"loss of step {step}", f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}"))
        if self.pairs:
            # The first step also prepares.
            times = (statistics.median(c.seconds[1:] or c.seconds) for c in (self.full, self.cut))
            rows.append(("time per step", *(f"{seconds:.3f} s" for seconds in times), ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = (
            f"| {label:<{widths[0]}} | " + " | ".join(map(str.rjust, cells, widths[1:])) + " |"
            for label, *cells in rows
        )
        rule = f"|:{'-' * (widths[0] + 1)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
        return "\n".join([first, rule, *others, "", *self._notes()])

    def _notes(self) -> list[str]:
        notes, steps = [], len(self.pairs)
        if self.memory:
            notes.append(
                "Peak of the loss: forward and backward of the output layer and the loss alone, "
                f"both gradients included, from {HOW[self.device.type]}. Full logits grow with the "
                "tokens; the loss without them works in chunks of a fixed size, which may exceed "
                f"the logits of a batch as small as {min(self.memory):,} tokens."
            )
        if steps:
            notes.append(
                f"Largest difference of all {steps} steps: {self.largest_difference:.1e} "
                f"nats (allowed: {TOLERANCE:g}). Time per step: median, without the first."
            )
        if steps < self.config.steps:
            notes.append(
                f"Interrupted: {len(self.full.losses)} of {self.config.steps} steps with full "
                f"logits, {len(self.cut.losses)} without."
            )
        where = f"{self.device.type} with {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        notes.append(
            f"{self.parameters / 1e6:.0f}M parameters, float32, {where}, PyTorch "
            f"{torch.__version__}, Python {platform.python_version()}."
        )
        return notes


def compare(config: TrainConfig, count: int) -> tuple[Comparison, bool]:
    """Train twice and measure.

    Args:
        config: settings of both runs; ``loss`` is the one to compare with full logits.
        count: sequences of the data to use, from its beginning.

    Returns:
        The results, and whether Ctrl-C ended it early.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: wrong settings.
        FloatingPointError: a loss is not finite.
        KeyboardInterrupt: Ctrl-C, before there was a result.
    """
    device = config.torch_device()
    losses = [make_loss(FULL, device), make_loss(config.loss, device)]
    print(f"loading {config.model} ...", flush=True)
    started = time.perf_counter()
    model, tokenizer = load_model(config.model, torch.float32, device)
    windows = load_windows(config, tokenizer, vocabulary_size(model))
    print(f"loaded in {time.perf_counter() - started:.0f} s: {windows.numel()} tokens on {device}")
    batches = draw_batches(windows[:count], config.steps, config.batch_size, config.seed)
    schedule = Schedule(config.learning_rate)
    result = Comparison(config, device, sum(p.numel() for p in model.parameters()))
    try:
        if device.type in HOW:
            for sequences in (MEMORY_TOKENS // config.sequence_length, config.batch_size):
                _measure_memory(model, windows[: max(1, sequences)].to(device), losses, result)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for loss, curve in zip(losses, (result.full, result.cut), strict=True):
            model.load_state_dict(start)
            torch.manual_seed(config.seed)
            _train(model, loss, batches.to(device), schedule, curve)
    except KeyboardInterrupt:
        if not (result.memory or result.full.losses):
            raise
        return result, True
    return result, False


def _train(model: Any, loss: FullLogits, batches: Tensor, schedule: Schedule, curve: Curve) -> None:
    from tqdm import tqdm

    name = getattr(loss, "impl", FULL)
    steps = train_steps(model, loss, batches, schedule)
    with tqdm(steps, f"training, {name:>12}", len(batches), unit="step") as bar:
        since = time.perf_counter()
        for value in bar:
            curve.losses.append(float(value))  # waits for the device
            curve.seconds.append(time.perf_counter() - since)
            since += curve.seconds[-1]
            if not math.isfinite(curve.losses[-1]):
                raise FloatingPointError(f"the loss of step {len(curve.losses)} is {float(value)}")
            bar.set_postfix(loss=f"{curve.losses[-1]:.4f}")


def _measure_memory(
    model: Any, labels: Tensor, losses: Sequence[FullLogits], result: Comparison
) -> None:
    """Measure the peak memory of each loss on the hidden states of ``labels`` (B, T)."""
    if labels.numel() in result.memory:
        return
    print(f"measuring the memory of the loss on {labels.numel():,} tokens ...", flush=True)
    with torch.no_grad():
        hidden = torch.cat([hidden_states(model, row[None]) for row in labels])
    hidden.requires_grad_()
    weight = model.get_output_embeddings().weight
    peaks = []
    for loss in losses:

        def work(_: object = None, loss: FullLogits = loss) -> object:
            return torch.autograd.grad(loss.head(model, hidden, labels), (hidden, weight))

        work()  # workspaces that stay
        peaks.append(peak_mib(work, hidden.device))
    result.memory[labels.numel()] = peaks


def write_results(result: Comparison, folder: Path) -> None:
    """Write the table, the losses and the picture to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(result.table() + "\n", encoding="utf-8")
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "full", result.config.loss])
        for step, losses in enumerate(
            zip_longest(result.full.losses, result.cut.losses, fillvalue=""), start=1
        ):
            writer.writerow([step, *losses])
    if result.pairs:
        full, cut = zip(*result.pairs, strict=True)
        plot_losses(full, cut, result.name, folder / "demo.png")


def build_parser() -> Parser:
    """Build the command line of the demo."""
    parser = Parser(
        prog="demo.py",
        description="Compare training with full logits and with linear_cross_entropy.",
    )
    defaults = {"steps": 30, "log_interval": 5, "learning_rate": 5e-5, "output": "out/demo"}
    add_settings(parser, SETTINGS, **defaults)
    parser.add_argument(
        "--windows",
        type=int,
        default=20,
        help="sequences of the data to use: few enough to come back, so that the loss falls",
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
    print(result.verdict())
    return int(not result.largest_difference <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
