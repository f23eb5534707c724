"""Fine-tunes one model twice, with full logits and with ``linear_cross_entropy``, and compares.

    make demo

Same start, same data, same order. Prints the losses side by side and the measured memory of the
loss, and writes ``summary.md``, ``losses.csv`` and ``demo.png`` to the output folder. The exit code
is 1 if the losses differ by more than the tolerance.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from training.arguments import add_run_arguments, config_from
from training.config import SETUP_ERRORS, TrainConfig
from training.data import Windows, load_text, tokenize
from training.loop import StepLoop, StepRecord
from training.losses import FULL, Loss, hidden_states, make_loss
from training.memory import HOW, peak_bytes
from training.models import load_model
from training.plot import plot_losses

MIB = 2**20

TOLERANCE = 1e-3
"""Largest difference, in nats, at which the two losses still count as the same."""

MEMORY_TOKENS = 4096
"""Tokens of the second memory measurement: logits grow with them, the demo's steps are small."""


@dataclass(frozen=True)
class Comparison:
    """What the demo found."""

    impl: str
    full: list[StepRecord]
    cut: list[StepRecord]
    memory: dict[int, tuple[int, int]]
    """Peak bytes with full and with cut logits, by number of tokens."""
    log_interval: int
    device: torch.device
    parameters: int

    @property
    def largest_difference(self) -> float:
        """Of all steps, in nats."""
        return max(abs(a["loss"] - b["loss"]) for a, b in zip(self.full, self.cut, strict=True))

    def table(self) -> str:
        """The result as Markdown that is also readable as text."""
        name = f"linear_cross_entropy ({self.impl})"
        wide = max(len(name), 20)
        lines = [_row(wide, "step", "full logits", name, "difference"), _rule(wide)]
        for a, b in zip(self.full, self.cut, strict=True):
            if a["step"] in (1, len(self.full)) or a["step"] % self.log_interval == 0:
                full, cut = a["loss"], b["loss"]
                losses = f"{full:.6f}", f"{cut:.6f}", f"{abs(full - cut):.1e}"
                lines.append(_row(wide, f"{a['step']}", *losses))
        times = (f"{_seconds_per_step(log):.3f} s" for log in (self.full, self.cut))
        lines.append(_row(wide, "time a step", *times))
        for tokens, (full_peak, cut_peak) in self.memory.items():
            peaks = f"{full_peak / MIB:.0f} MiB", f"{cut_peak / MIB:.0f} MiB"
            lines.append(_row(wide, f"peak of the loss, {tokens} tokens", *peaks))
        lines += [
            "",
            f"Largest difference of all {len(self.full)} steps: {self.largest_difference:.1e} nats "
            f"(allowed: {TOLERANCE:g}).",
            "Time a step: median, without the first.",
        ]
        if self.memory:
            lines.append(
                "Peak of the loss: forward and backward of the output layer and the loss alone, "
                f"both gradients included; measured: {HOW[self.device.type]}."
            )
        lines.append(
            f"{self.parameters / 1e6:.0f}M parameters, float32, {_device_name(self.device)}, "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}."
        )
        return "\n".join(lines)


def _row(wide: int, first: str, full: str, cut: str, difference: str = "") -> str:
    return f"| {first:<34} | {full:>12} | {cut:>{wide}} | {difference:>10} |"


def _rule(wide: int) -> str:
    return f"|:{'-' * 35}|{'-' * 13}:|{'-' * (wide + 1)}:|{'-' * 11}:|"


def _seconds_per_step(log: list[StepRecord]) -> float:
    later = sorted(record["seconds"] for record in log[1:] or log)
    return later[len(later) // 2]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"


def compare(config: TrainConfig, window_count: int) -> Comparison:
    """Train twice and measure.

    Args:
        config: settings of both runs; ``loss`` is the one held against full logits.
        window_count: windows of the data that the runs use, from its beginning.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: wrong settings.
        FloatingPointError: a loss is not finite.
    """
    device = config.torch_device()
    losses = {
        FULL: make_loss(FULL, device),
        config.loss: make_loss(config.loss, device),
    }
    text = load_text(config.data, config.data_split, config.data_column)
    print(f"loading {config.model} ...", flush=True)
    started = time.perf_counter()
    model, tokenizer = load_model(config.model, torch.float32, device)
    tokens = tokenize(text, tokenizer)
    length = config.sequence_length
    windows = Windows(tokens[: window_count * length], length, config.seed)
    print(f"loaded in {time.perf_counter() - started:.0f} s: {len(tokens)} tokens on {device}")
    memory = _measure_memory(model, tokens, list(losses.values()), config)

    start = {name: value.clone() for name, value in model.state_dict().items()}
    logs = []
    for name, loss in losses.items():
        model.load_state_dict(start)
        logs.append(_train(StepLoop(model, windows, loss, config), name))
    return Comparison(
        config.loss,
        logs[0],
        logs[1],
        memory,
        config.log_interval,
        device,
        sum(p.numel() for p in model.parameters()),
    )


def _train(loop: StepLoop, name: str) -> list[StepRecord]:
    from tqdm import tqdm

    with tqdm(total=loop.config.steps, desc=f"training, {name:>12}", unit="step") as bar:
        for _ in range(loop.config.steps):
            record = loop.train_step()
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}")
    return loop.log


def _measure_memory(
    model: Any, tokens: Tensor, losses: Sequence[Loss], config: TrainConfig
) -> dict[int, tuple[int, int]]:
    """Peak memory of each loss on real hidden states; empty where it cannot be measured."""
    device: torch.device = next(model.parameters()).device
    if device.type not in HOW:
        return {}
    length = config.sequence_length
    measured = {}
    for sequences in (config.batch_size, max(1, MEMORY_TOKENS // length)):
        if sequences * length > len(tokens):
            continue
        print(f"measuring the memory of the loss on {sequences * length} tokens ...", flush=True)
        labels = tokens[: sequences * length].view(sequences, length).to(device)
        with torch.no_grad():
            hidden = torch.cat([hidden_states(model, row[None]) for row in labels])
        hidden.requires_grad_()
        measured[sequences * length] = tuple(
            _peak_of_head(loss, model, hidden, labels) for loss in losses
        )
    return measured  # type: ignore[return-value]


def _peak_of_head(loss: Loss, model: Any, hidden: Tensor, labels: Tensor) -> int:
    weight = model.get_output_embeddings().weight

    def work() -> None:
        torch.autograd.grad(loss.head(model, hidden, labels), (hidden, weight))

    return peak_bytes(work, hidden.device)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write the table, the losses and the picture to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(comparison.table() + "\n", encoding="utf-8")
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "full", comparison.impl])
        for a, b in zip(comparison.full, comparison.cut, strict=True):
            writer.writerow([a["step"], a["loss"], b["loss"]])
    plot_losses(
        [record["loss"] for record in comparison.full],
        [record["loss"] for record in comparison.cut],
        f"linear_cross_entropy ({comparison.impl})",
        folder / "demo.png",
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line of the demo."""
    parser = argparse.ArgumentParser(
        prog="training/demo.py",
        description="Compare training with full logits and with linear_cross_entropy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser, steps=30, log_interval=5, learning_rate=5e-5)
    parser.add_argument(
        "--loss",
        default="auto",
        metavar="IMPL",
        help="implementation of linear_cross_entropy that is held against full logits",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=20,
        help="sequences of the data that are used: a few, so that every one comes back and the "
        "loss falls in few steps",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/demo"), help="folder for table, losses, picture"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 0 same losses, 1 too far apart, 2 wrong input."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.loss == FULL:
            raise ValueError(f"loss must be an implementation of linear_cross_entropy, got {FULL}")
        if arguments.windows < 1:
            raise ValueError(f"windows must be at least 1, got {arguments.windows}")
        comparison = compare(config_from(arguments), arguments.windows)
    except (*SETUP_ERRORS, FloatingPointError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    write_results(comparison, arguments.output)
    print(f"\n{comparison.table()}\n\nCurves: {arguments.output / 'demo.png'}")
    if not comparison.largest_difference <= TOLERANCE:
        print(f"FAILED: the losses differ by more than {TOLERANCE:g} nats", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
