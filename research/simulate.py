"""``python -m research.simulate``: what each part of the filter buys, in plain PyTorch.

A simulation and no measurement of the kernels, which have no switch for the parts: the exact
matrix of probabilities is made (N x V, float32), the parts that a filter drops are dropped from
it, and the error of the gradients is what remains. The fraction of the work that is kept stands
in for time; where a part exists as an implementation, the benchmark times it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.benchmark.data import Problem, make, read
from cut_cross_entropy.benchmark.environment import environment
from cut_cross_entropy.benchmark.output import write_json
from cut_cross_entropy.benchmark.shapes import SHAPES, SMALL
from cut_cross_entropy.dispatch import FILTER_TOLERANCE
from research.command import parse_arguments

BLOCK = 128  # tokens of a strip or a tile, classes of a tile
TILE_THRESHOLD = 2.0**-12  # of Apple's releases for bfloat16


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean loss with respect to the logits, and what it is multiplied with.

    Args:
        p: (N, V) probabilities times the slope of the softcap, without the targets.
        target: (N,) the gradient at the targets, minus the slope.
        missed: (N,) one minus the probability of the target.
    """

    e: Tensor
    c: Tensor
    p: Tensor
    targets: Tensor
    missed: Tensor
    grad_e: Tensor
    grad_c: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "Gradient":
        """Everything in float32."""
        e, c = problem.e.float(), problem.c.float()
        tokens = e.shape[0] // BLOCK * BLOCK
        e, targets = e[:tokens], problem.targets[:tokens]
        p = e @ c.T
        slope = None
        if problem.softcap is not None:
            p.div_(problem.softcap).tanh_()
            slope = 1 - p.square()
            p.mul_(problem.softcap)
        p.sub_(torch.logsumexp(p, 1)[:, None]).exp_()
        rows = torch.arange(tokens, device=e.device)
        missed = 1 - p[rows, targets]
        hit = torch.ones_like(missed)
        if slope is not None:
            p.mul_(slope)
            hit = slope[rows, targets]
        del slope
        grad_e = p @ c - hit[:, None] * c[targets]
        grad_c = p.T @ e
        grad_c.index_add_(0, targets, -hit[:, None] * e)
        return cls(e, c, p, targets, missed, grad_e, grad_c)

    def errors(self, dropped: Tensor, tail: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
        """Of dE and dC when ``dropped`` (N, V) is left out and m w^T / sum(w) put in its place."""
        left_e, left_c = dropped @ self.c, dropped.T @ self.e
        if tail is not None:
            m, w = tail
            total = w.sum().clamp_min(1e-30)
            left_e -= m[:, None] * ((w @ self.c) / total)
            left_c -= (w / total)[:, None] * (m @ self.e)
        return {
            "error_e": float(left_e.norm() / self.grad_e.norm()),
            "error_c": float(left_c.norm() / self.grad_c.norm()),
        }

    def strips(self, values: Tensor) -> Tensor:
        """(N, V) as (blocks, 128, V)."""
        return values.view(-1, BLOCK, values.shape[1])


def tiles_kept(gradient: Gradient, order: Tensor | None) -> tuple[Tensor, float]:
    """Classes that a tile filter drops, (N, V) bool, and the fraction of tiles that it keeps.

    A tile is kept if any logit gradient in it reaches the threshold.
    """
    p, num_classes = gradient.p, gradient.p.shape[1]
    largest = gradient.strips(p).amax(1)  # (blocks, V); a target's own gradient is 1 - p
    blocks = torch.arange(len(gradient.targets), device=p.device) // BLOCK
    at_target = gradient.missed
    largest.index_put_((blocks, gradient.targets), at_target.clamp_min(0), accumulate=True)
    if order is not None:
        largest = largest[:, order]
    pad = -num_classes % BLOCK
    tiles = torch.nn.functional.pad(largest, (0, pad)).view(largest.shape[0], -1, BLOCK).amax(2)
    kept = tiles >= TILE_THRESHOLD
    dropped = ~kept.repeat_interleave(BLOCK, 1)[:, :num_classes]
    if order is not None:
        back = torch.empty_like(order)
        back[order] = torch.arange(num_classes, device=order.device)
        dropped = dropped[:, back]
    return dropped, float(kept.float().mean())


def strips_kept(gradient: Gradient, tolerance: float) -> tuple[Tensor, Tensor]:
    """Strips that are kept, (blocks, V) bool, and the energy of all of them."""
    energy = torch.stack([block.square().sum(0) for block in gradient.strips(gradient.p)])
    blocks = torch.arange(len(gradient.targets), device=energy.device) // BLOCK
    forced = torch.zeros_like(energy, dtype=torch.bool)
    forced[blocks, gradient.targets] = True
    light = energy.masked_fill(forced, float("inf")).flatten().sort().values
    allowed = tolerance**2 * float(gradient.missed.square().sum())
    free = int((light.double().cumsum(0) <= allowed).sum())
    threshold = light[min(free, len(light) - 1)]
    return (energy >= threshold) | forced, energy


def pairs(kept: Tensor, order: Tensor | None) -> float:
    """Return the pairs (tile of classes, token block) of dC, relative to the fewest possible."""
    active = kept.any(0)
    columns = kept[:, active] if order is None else kept[:, order][:, active[order]]
    pad = -columns.shape[1] % BLOCK
    tiles = torch.nn.functional.pad(columns, (0, pad)).view(columns.shape[0], -1, BLOCK)
    return float(tiles.any(2).sum() / (kept.sum() / BLOCK))


def mask_order(kept: Tensor) -> Tensor:
    """Classes sorted by the blocks that keep them, read as a number."""
    order = torch.arange(kept.shape[1], device=kept.device)
    for block in kept:  # stable sorts from the least to the most significant block
        order = order[torch.sort(block[order].int(), stable=True).indices]
    return order


def simulate(problem: Problem, tolerance: float = FILTER_TOLERANCE) -> list[dict[str, Any]]:
    """One row a part: what is kept, and the errors."""
    gradient = Gradient.of(problem)
    rows: list[dict[str, Any]] = [
        {"part": "no filter", "kept": 1.0, "error_e": 0.0, "error_c": 0.0}
    ]

    def drop(dropped: Callable[[int], Tensor]) -> Tensor:
        values = gradient.p.clone()
        for block, part in enumerate(gradient.strips(values)):
            part.mul_(dropped(block))
        return values

    by_mean = (gradient.e.mean(0) @ gradient.c.T).argsort()
    for name, order in (("tiles", None), ("tiles, classes by mean logit", by_mean)):
        dropped, kept = tiles_kept(gradient, order)
        rows.append({"part": name, "kept": kept, **gradient.errors(drop(dropped.__getitem__))})
        del dropped
    strips, energy = strips_kept(gradient, tolerance)
    fraction = float(strips.float().mean())
    values = drop((~strips).__getitem__)
    order = mask_order(strips)
    natural, by_mask = pairs(strips, None), pairs(strips, order)
    rows.append({"part": "strips, the rest dropped", "kept": fraction, **gradient.errors(values)})
    w = energy.sqrt().masked_fill(strips, 0).sum(0)
    errors = gradient.errors(values, (values.sum(1), w))
    rows.append({"part": "strips and tail", "kept": fraction, "pairs": natural, **errors})
    rows.append(
        {
            "part": "strips and tail, classes by mask",
            "kept": fraction,
            "pairs": by_mask,
            "dropped_mass": float(values.sum(1).mean()),
            **errors,
        }
    )
    for row in rows:
        for x, grad in (("e", gradient.grad_e), ("c", gradient.grad_c)):
            row[f"rounding_{x}"] = float((grad.bfloat16().float() - grad).norm() / grad.norm())
    return rows


def main() -> None:
    """Simulate on made data and on saved hidden states."""
    arguments = parse_arguments("simulate", choices=list(SHAPES), default=["gemma2"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "part": "simulate",
        "environment": environment(arguments.commit),
        "tokens": arguments.tokens,
        "tolerance": FILTER_TOLERANCE,
        "rows": [],
    }
    shapes = [SHAPES[name] for name in arguments.data] if device == "cuda" else [SMALL]
    todo: list[tuple[str, Callable[[], Problem]]] = []
    if arguments.file:
        todo.append((arguments.file.name.split(".")[0], partial(read, arguments.file, device)))
    for shape, kind in product(shapes if arguments.data else [], ("structured", "diffuse")):
        made = partial(make, kind, arguments.tokens, shape, device=device)
        todo.append((f"{shape.name}-{kind}", made))
    for name, load in todo:
        problem = load()
        n = arguments.tokens
        problem = Problem(problem.e[:n], problem.c, problem.targets[:n], problem.softcap)
        with torch.no_grad():
            rows = simulate(problem)
        results["rows"] += [{"test_data": name, **row} for row in rows]
        for row in rows:
            print(
                f"{name:20} {row['part']:40} kept {row['kept']:7.2%}  "
                f"dE {row['error_e']:.3%}  dC {row['error_c']:.3%}  pairs {row.get('pairs', '')}",
                flush=True,
            )
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
