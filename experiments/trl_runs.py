"""Runs of a TRL trainer that differ only in its output layer, and their record.

The methods: ``trl`` is TRL's own function, ``token_logprobs`` this package's by its adapter, and
``trl_reordered`` TRL's with tokens in reverse and classes in smaller tiles. The last adds up the
same numbers in another order, so that its distance from ``trl`` is what floating point alone does
to a run. All start from the same weights, data and random state.
"""

import argparse
import copy
import gc
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from cut_cross_entropy import adapters
from cut_cross_entropy.benchmark.environment import processor
from cut_cross_entropy.benchmark.measure import synchronize
from cut_cross_entropy.benchmark.output import write_json
from experiments.comparison import MEASUREMENTS, machine
from training.models import load_model

TRL, OURS, REORDERED = METHODS = ("trl", "token_logprobs", "trl_reordered")
UPDATE = "update"
"""The part of a step outside of all sections: rewards, forward, backward and optimizer."""

WARM_UP = 4
"""Steps whose time does not count: they compile kernels."""


class _Reordered:
    """TRL's function with the same sums in another order."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        *options: Any,
    ) -> tuple[Tensor | None, ...]:
        tiles = max(1, chunk_size // 4)
        found = ChunkedLogProbFunction.apply(
            hidden.flip(0), weight, bias, targets.flip(0), temperature, tiles, *options
        )
        return tuple(None if x is None else x.flip(0) for x in found)


@contextmanager
def output_layer(method: str) -> Iterator[Any]:
    """Put a method under TRL's trainers; give the adapter, or None."""
    if method == OURS:
        with adapters.trl() as adapter:
            yield adapter
        return
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = _Reordered if method == REORDERED else original
    try:
        yield None
    finally:
        utils._ChunkedLogProbFunction = original


class Sections(transformers.TrainerCallback):
    """Time and peak memory of the parts of each step.

    Attributes:
        seconds: of every step, by section.
        peaks: MiB, the largest of all steps, by section; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[dict[str, float]] = []
        self.peaks: dict[str, float] = {}

    def _keep_peak(self, section: str) -> None:
        if self.device.type == "cuda":
            mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            self.peaks[section] = round(max(mib, self.peaks.get(section, 0.0)), 1)
            torch.cuda.reset_peak_memory_stats(self.device)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def watch(
        self, owner: Any, name: str, section: str, when: Callable[[], bool] = lambda: True
    ) -> None:
        """Count the calls of a method of ``owner`` as a section, unless ``when`` says no."""
        method = getattr(owner, name)

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return method(*args, **kwargs)
            began = self._now()
            self._keep_peak(UPDATE)
            result = method(*args, **kwargs)
            self.seconds[-1][section] += self._now() - began
            self._keep_peak(section)
            return result

        setattr(owner, name, timed)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start a step."""
        self.seconds.append(defaultdict(float))
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a step: what no section has taken is the update's."""
        whole = self._now() - self._began
        self.seconds[-1][UPDATE] = whole - sum(self.seconds[-1].values())
        self._keep_peak(UPDATE)

    def means(self) -> dict[str, float]:
        """Milliseconds a step, by section, after those that warm up."""
        counted = self.seconds[WARM_UP:] or self.seconds
        names = dict.fromkeys(name for step in counted for name in step)
        return {n: round(1e3 * sum(s[n] for s in counted) / len(counted), 2) for n in names}


MakeTrainer = Callable[[argparse.Namespace, Any, Any, int], Any]
"""Makes a trainer of the arguments, a model, its tokenizer and a seed."""

Watch = Callable[[Any, Sections], None]
"""Names the sections of a trainer."""


def build_parser(name: str, **defaults: Any) -> argparse.ArgumentParser:
    """Build the options that both experiments have; ``defaults`` are those that differ."""
    what = f"{name.upper()} with TRL's output layer and with token_logprobs."
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=what)
    add = parser.add_argument
    add("--model", default="smollm2", help="'smollm2', a folder, a GGUF file or a name")
    add("--steps", type=int, help="steps of each run")
    add("--batch-size", type=int, help="sequences a step")
    add("--learning-rate", type=float, default=3e-6)
    add("--bf16", action="store_true", help="bfloat16 autocast; TRL's logits are rounded to it")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="in this order")
    add("--seeds", type=int, default=1)
    add("--out", type=Path, default=MEASUREMENTS, help="folder of the JSON file")
    add("--commit", help="commit of the code, where neither COMMIT nor git says it")
    add("--time-limit", type=float, default=150.0, help="seconds within which runs have to end")
    parser.set_defaults(**defaults)
    return parser


def shared_settings(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the settings that the trainers of both experiments have."""
    return {
        "output_dir": str(arguments.out / "trainer"),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": arguments.bf16,
        "seed": seed,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def train(
    make: MakeTrainer,
    watch: Watch,
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    method: str,
    seed: int,
) -> dict[str, Any]:
    """Train a copy of ``model``; return what was logged of each step, times and peaks."""
    trainer = make(arguments, copy.deepcopy(model), tokenizer, seed)
    device = trainer.accelerator.device
    sections = Sections(device)
    watch(trainer, sections)
    trainer.add_callback(sections)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    transformers.set_seed(seed)
    with output_layer(method) as adapter:
        trainer.train()
    times = ("time", "_second", "epoch", "num_tokens")
    logs = [
        {key: value for key, value in entry.items() if not any(x in key for x in times)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {
        "logs": logs,
        "ms_per_step": sections.means(),
        "peak_mib": sections.peaks,
        "calls": adapter.calls if adapter is not None else 0,
    }


def distances(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure how far each run is from TRL's of the same seed.

    Args:
        runs: of the record.
        names: of logged figures.

    Returns:
        For each run but TRL's its method and seed, the largest difference of every figure over
        all steps, by its name, and ``equal_steps``: how many steps at the beginning have figures
        that differ by less than 1e-3 of TRL's largest.
    """
    base = {run["seed"]: run["logs"] for run in runs if run["method"] == TRL}
    found = []
    for run in runs:
        if run["method"] == TRL or run["seed"] not in base:
            continue
        theirs, equal = base[run["seed"]], len(run["logs"])
        line: dict[str, Any] = {"method": run["method"], "seed": run["seed"]}
        for name in names:
            pairs = {
                number: (ours[name], other[name])
                for number, (ours, other) in enumerate(zip(run["logs"], theirs, strict=True))
                if name in ours and name in other
            }
            if not pairs:
                continue
            line[name] = max(abs(a - b) for a, b in pairs.values())
            small = 1e-3 * max(abs(b) for _, b in pairs.values())
            off = [number for number, (a, b) in pairs.items() if abs(a - b) > small]
            equal = min([equal, *off[:1]])
        found.append({**line, "equal_steps": equal})
    return found


def main(
    parser: argparse.ArgumentParser,
    make: MakeTrainer,
    watch: Watch,
    names: Sequence[str],
    argv: Sequence[str] | None,
) -> Path:
    """Do all runs; return the record, which is written after each of them.

    No run starts that would end after the time limit if it took as long as the longest so far.
    """
    arguments = parser.parse_args(argv)
    end, longest = time.monotonic() + arguments.time_limit, 0.0
    model, tokenizer = load_model(arguments.model, torch.float32, None)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else processor()
    name = parser.prog.rpartition(".")[2] + "_bf16" * arguments.bf16
    label = device.lower().removeprefix("nvidia ").split()[0] if on_gpu else "cpu"
    path: Path = arguments.out / f"{name}_{label}.json"
    left_out = ("out", "commit", "methods", "seeds", "time_limit")
    settings = {k: v for k, v in vars(arguments).items() if k not in left_out}
    record: dict[str, Any] = {
        "experiment": name,
        "machine": machine(device, arguments.commit),
        "settings": {**settings, "model": Path(arguments.model).name},
        "runs": [],
        "skipped": [],
    }
    record["machine"]["versions"]["trl"] = trl.__version__
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            this, began = {"method": method, "seed": seed}, time.monotonic()
            if began + longest > end:
                reason = f"time limit of {arguments.time_limit:g} s"
                record["skipped"].append({**this, "reason": reason})
                continue
            result = train(
                make, watch, arguments, model, tokenizer=tokenizer, method=method, seed=seed
            )
            longest = max(longest, time.monotonic() - began)
            record["runs"].append({**this, **result})
            record["distances"] = distances(record["runs"], names)
            write_json(path, record)
            print(f"{this}: {result['ms_per_step']} ms, {result['peak_mib']} MiB", flush=True)
    for line in record.get("distances", []):
        print(line)
    print(f"written to {path}", file=sys.stderr)
    return path
