"""``python -m research.largest``: the largest batch that each method fits into a memory limit.

Loss and both gradients at a model's head, everything counted: embeddings, classifier, gradients,
scratch. The peak grows in proportion to the tokens, so two small runs foretell the largest batch;
it is then run, and so is one a twentieth larger, which must not fit. Batches beyond --most are not
tried (they would take long): the table then says how many ran, or more.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.output import write_json
from cut_cross_entropy.benchmark.pool import Clock, Process, WorkerError, processes
from cut_cross_entropy.benchmark.runs import Task
from cut_cross_entropy.benchmark.shapes import SHAPES

UNIT = 128  # tokens: what batches are rounded to
PROBES = (4096, 16384)
METHODS = ("cce", "baseline", "cce_exact", "torch_compile", "chunked")

Ask = Callable[[int, float], dict[str, Any]]


def forecast(points: Sequence[tuple[int, float]], limit_gib: float) -> int:
    """Tokens that reach the limit on the line through two points (tokens, GiB)."""
    (n1, g1), (n2, g2) = points
    slope = max((g2 - g1) / (n2 - n1), 1e-9)
    return max(UNIT, int((limit_gib - g1) / slope + n1) // UNIT * UNIT)


def search(ask: Ask, limit_gib: float, most: int, tries: int = 6) -> dict[str, Any]:
    """The largest batch that ran within the limit.

    Args:
        ask: runs a batch: ``fits`` and ``gib``, None if the device's memory ended.
        most: no batch larger than this is run.

    Returns:
        ``tokens`` that fit, their ``gib``, ``fails`` (the smallest that was seen not to fit, None
        at ``most``) and the ``forecast``.
    """
    points = []
    small = 0
    probes = [n for n in PROBES if n <= most] or [most]
    for tokens in probes:
        answer = ask(tokens, limit_gib)
        if answer["gib"] is None:
            break
        points.append((tokens, answer["gib"]))
        if not answer["fits"]:
            break
        small = tokens
    if len(points) < 2:  # few fit: two small ones tell the slope
        points = [(n, gib) for n in (256, 1024) if (gib := ask(n, limit_gib)["gib"]) is not None]
    if len(points) < 2:
        return {"tokens": 0, "gib": None, "fails": UNIT, "forecast": 0}
    expected = forecast(points[-2:], limit_gib)
    best: dict[str, Any] = {"tokens": small, "gib": dict(points).get(small), "fails": None}
    guess = min(expected, most)
    for _ in range(tries):
        answer = ask(guess, limit_gib)
        if answer["fits"]:
            best.update(tokens=guess, gib=answer["gib"])
            upward = min(most, guess * 21 // 20 // UNIT * UNIT)
            if guess == most or (best["fails"] and best["fails"] <= max(upward, guess + UNIT)):
                break
            guess = max(upward, guess + UNIT)
        else:
            best["fails"] = min(best["fails"] or guess, guess)
            if best["tokens"] >= guess * 19 // 20 // UNIT * UNIT > 0:
                break
            guess = max(UNIT, guess * 19 // 20 // UNIT * UNIT)
    return {**best, "forecast": expected}


def measure(process: Process, arguments: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Rows of one method, one a limit."""
    shape = SHAPES[arguments.data]
    task = Task(f"{shape.name}-structured", "structured", 2048, shape)
    process.ask("load", timeout=clock.left(120), **task.data())
    peaks: dict[int, float | None] = {}

    def ask(tokens: int, limit_gib: float) -> dict[str, Any]:
        if tokens not in peaks:
            limit = clock.left(90)
            peaks[tokens] = process.ask("largest", timeout=limit, tokens=tokens)["gib"]
        gib = peaks[tokens]
        return {"fits": gib is not None and gib <= limit_gib, "gib": gib}

    rows = []
    for limit in arguments.limits:
        found = search(ask, limit, arguments.most)
        rows.append({"method": process.name, "limit_gib": limit, **found})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m research.largest", description=__doc__)
    parser.add_argument("--data", default="gemma2", choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--limits", nargs="+", type=float, default=[16.0, 72.0], help="GiB")
    parser.add_argument("--most", type=int, default=262144, help="largest batch that is run")
    parser.add_argument("--peer", nargs="+", default=[], metavar="METHOD=PATH")
    parser.add_argument("--commit", help="commit to name where there is no history (or COMMIT)")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--time-limit", type=float, default=600.0)
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("python -m research.largest needs a CUDA GPU")
    peers = dict(entry.split("=", 1) for entry in parsed.peer)
    clock = Clock(parsed.time_limit)
    results: dict[str, Any] = {
        "part": "largest",
        "environment": environment(parsed.commit),
        "data": parsed.data,
        "most": parsed.most,
        "rows": [],
        "failures": [],
    }
    own = {"module": "largest_worker", "folder": Path(__file__).resolve().parent}
    with processes(parsed.methods, peers, **own) as pool:  # all of them import at the same time
        for method, process in pool.items():
            try:
                results["rows"] += measure(process, parsed, clock)
                print(*results["rows"][-len(parsed.limits) :], sep="\n", flush=True)
            except WorkerError as error:
                results["failures"].append({"method": method, "error": str(error)})
                print(f"{method}: {error}", flush=True)
            process.close()
            write_json(parsed.json, results)


if __name__ == "__main__":
    main()
