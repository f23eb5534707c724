"""``python -m benchmark``: time, memory and error of the loss on data like a trained model's."""

import argparse
import dataclasses
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmark.data import KINDS as DATA_KINDS
from benchmark.data import SHAPES, Problem, Shape, describe, make
from benchmark.measure import (
    KINDS,
    exact_gradients,
    loss_of,
    measure,
    relative_error,
    time_of_one_gemm,
)
from cut_cross_entropy import __version__, record_filter
from cut_cross_entropy.device_support import triton_version

GPU_METHODS = ("cce", "cce_exact", "torch_compile", "chunked", "baseline")
CPU_METHODS = ("chunked", "baseline")
CPU_SHAPE = Shape("small", 16384, 256)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__)
    parser.add_argument(
        "--data", nargs="+", default=["gemma2"], choices=[*SHAPES, "all", "file"],
        help="classifier shapes to measure; 'file' reads --file",
    )  # fmt: skip
    parser.add_argument("--file", type=Path, help="saved tensors e, c, t for --data file")
    parser.add_argument(
        "--tail", nargs="+", default=["structured"], choices=DATA_KINDS,
        help="kind of data: like a trained model's (structured or diffuse tail), flat, or randn",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a batch (N)")
    parser.add_argument("--methods", nargs="+", help="implementations; default: all that run here")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="passes to measure"
    )
    parser.add_argument("--repetitions", type=int, default=7, help="timed runs of each")
    parser.add_argument("--no-errors", action="store_true", help="skip the float32 reference")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args()


def environment() -> dict[str, str]:
    """Where the figures come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton_version() or ())) or "none",
        "cut_cross_entropy": __version__,
        "commit": commit or "unknown",
    }


def problems(arguments: argparse.Namespace, device: str) -> Any:
    """Name and data of every problem asked for, one at a time."""
    if device == "cpu":
        yield "small", make(arguments.tail[0], 512, CPU_SHAPE, torch.float32)
        return
    names = list(SHAPES) if "all" in arguments.data else arguments.data
    for name in names:
        if name == "file":
            saved = torch.load(arguments.file)
            data = (saved["e"].to(device), saved["c"].to(device), saved["t"].long().to(device))
            yield arguments.file.stem, Problem(*data)
            continue
        for tail in arguments.tail:
            yield f"{name}-{tail}", make(tail, arguments.tokens, SHAPES[name], device=device)


def measure_problem(
    name: str, problem: Problem, methods: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table for one problem."""
    problem = dataclasses.replace(
        problem, e=problem.e.requires_grad_(), c=problem.c.requires_grad_()
    )
    gemm = time_of_one_gemm(problem, arguments.repetitions)
    exact = None if arguments.no_errors else exact_gradients(problem)
    rows = []
    for method in methods:
        errors: dict[str, Any] = {}
        if exact is not None:
            with record_filter() as records:
                loss = loss_of(method, problem)
                grad_e, grad_c = torch.autograd.grad(loss, (problem.e, problem.c))
            errors = {
                "error_e": relative_error(grad_e, exact.grad_e),
                "error_c": relative_error(grad_c, exact.grad_c),
                "rounding_e": exact.rounding_e,
                "rounding_c": exact.rounding_c,
                "loss_error": abs(loss.item() - exact.loss),
                "filter": [dataclasses.asdict(record) for record in records],
            }
            del grad_e, grad_c, loss
        for kind in arguments.kinds:
            result = dataclasses.asdict(measure(method, kind, problem, arguments.repetitions))
            rows.append({**result, "test_data": name, "gemms": result["runtime_ms"] / gemm,
                         "gemm_ms": gemm, **errors})  # fmt: skip
            print(format_row(len(rows) - 1, rows[-1]), flush=True)
    return rows


HEADER = (
    f"{'':>3} {'method':>14} {'kind':>11} {'runtime_ms':>11} {'op_mem_mb':>10} {'test_data':>24} "
    f"{'gemms':>6} {'error dE':>9} {'error dC':>9}"
)


def format_row(index: int, row: dict[str, Any]) -> str:
    """A row as the terminal shows it; errors in percent, and as multiples of rounding."""
    text = (
        f"{index:>3} {row['method']:>14} {row['kind']:>11} {row['runtime_ms']:>11.2f} "
        f"{row['op_mem_mb']:>10.1f} {row['test_data']:>24} {row['gemms']:>6.2f}"
    )
    if "error_e" in row:
        text += f" {row['error_e']:>9.3%} {row['error_c']:>9.3%}"
    return text


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("No GPU: the CPU implementations at a small size, which says nothing about a GPU.")
    methods = arguments.methods or list(GPU_METHODS if device == "cuda" else CPU_METHODS)
    where = environment()
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    results: dict[str, Any] = {"environment": where, "rows": [], "data": {}}
    for name, problem in problems(arguments, device):
        results["data"][name] = describe(problem)
        print(HEADER)
        results["rows"] += measure_problem(name, problem, methods, arguments)
        if device == "cuda":
            torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
