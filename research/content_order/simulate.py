"""Simulates a filter whose blocks hold tokens of like content, with exact probabilities.

    python research/content_order/simulate.py HIDDEN_STATES.pt [--kept 0.02 0.04 0.08]

Compares orders of the tokens, tails and rules of selection by the error that the dropped strips
make: relative to the error of rounding the exact gradient to bfloat16, of dE and dC, and by the
cosine of the rows of dC with the exact ones (percentiles 1, 10 and 50 of all classes). Needs a GPU
with room for two matrices of tokens x classes in float32. The results are in README.md.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 128
ROUNDING = 0.00166  # relative error of rounding a gradient to bfloat16 once


class Head:
    """Embeddings, classifier and exact probabilities of saved hidden states."""

    def __init__(self, path: Path) -> None:
        saved = torch.load(path)
        self.e, self.c = (saved[name].cuda().float() for name in ("e", "c"))
        self.targets = saved["t"].cuda().long()
        self.p = torch.softmax(self.e @ self.c.T, 1)
        self.num_tokens, self.dim = self.e.shape
        self.num_classes = self.c.shape[0]
        self.blocks = self.num_tokens // BLOCK
        rows = torch.arange(self.num_tokens, device="cuda")
        gradient = self.p.clone()
        gradient[rows, self.targets] -= 1
        self.grad_e, self.grad_c = gradient @ self.c, gradient.T @ self.e


def tree(features: Tensor, levels: int) -> Tensor:
    """Halve every group at the median of its projection on its own first principal direction."""
    order = torch.arange(features.shape[0], device="cuda")[None]
    for _ in range(levels):
        x = features[order]
        x = x - x.mean(1, keepdim=True)
        v = torch.ones(x.shape[0], x.shape[2], 1, device="cuda")
        for _ in range(5):
            v = x.transpose(1, 2) @ (x @ (v / v.norm(dim=1, keepdim=True).clamp_min(1e-20)))
        by_key = torch.argsort((x @ v)[..., 0], dim=1, stable=True)
        order = torch.gather(order, 1, by_key).reshape(2 * order.shape[0], -1)
    return order.reshape(-1)


def staged(features: Tensor, stages: tuple[int, ...]) -> Tensor:
    """Compute principal directions only at the start of each stage, one for each of its levels."""
    order = torch.arange(features.shape[0], device=features.device)[None]
    for levels in stages:
        x = features[order]
        x = x - x.mean(1, keepdim=True)
        covariance = x.transpose(1, 2) @ x
        start = torch.Generator(features.device).manual_seed(1)
        shape = (*covariance.shape[:2], levels)
        directions = torch.randn(shape, device=features.device, generator=start)
        for _ in range(6):
            directions = torch.linalg.qr(covariance @ directions)[0]
        keys = features[order] @ directions
        groups = order.shape[0]
        for level in range(levels):
            nodes = groups * 2**level
            by_key = torch.argsort(keys[..., level].reshape(nodes, -1), dim=1, stable=True)
            order = torch.gather(order.reshape(nodes, -1), 1, by_key)
            index = by_key[..., None].expand(-1, -1, levels)
            keys = torch.gather(keys.reshape(nodes, -1, levels), 1, index)
            order, keys = order.reshape(2 * nodes, -1), keys.reshape(2 * nodes, -1, levels)
    return order.reshape(-1)


def strips(head: Head, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return energy, mass and whether a target is in it of every strip, (blocks, V) each."""
    energy, mass = (torch.empty(head.blocks, head.num_classes, device="cuda") for _ in range(2))
    for block, tokens in enumerate(order.view(-1, BLOCK)):
        energy[block], mass[block] = head.p[tokens].square().sum(0), head.p[tokens].sum(0)
    forced = torch.zeros_like(energy, dtype=torch.bool)
    row = torch.arange(head.blocks, device="cuda").repeat_interleave(BLOCK)
    forced[row, head.targets[order]] = True
    return energy, mass, forced


def as_byte(x: Tensor, steps: int = 4, floor: int = -55) -> Tensor:
    """Round to the values that one byte can hold, a power of 2 ** (1 / steps)."""
    code = (steps * (x.clamp_min(1e-30).log2() - floor)).clamp(0, 254).floor()
    return torch.where(code > 0, ((code + 0.5) / steps + floor).exp2(), 0)


def filtered(
    head: Head, order: Tensor, kept: Tensor, mass: Tensor, first_order: int = 0
) -> tuple[Tensor, Tensor]:
    """Return dE and dC of the kept strips plus a tail for each block, and a first-order term.

    ``first_order`` is the number of directions of that term; its damping is 0.7.
    """
    mass = mass * ~kept
    total = mass.sum(1, keepdim=True).clamp_min(1e-30)
    share = mass / total
    grad_e, grad_c = torch.zeros_like(head.e), torch.zeros_like(head.c)
    blocks = order.view(-1, BLOCK)
    dropped = torch.empty(head.blocks, BLOCK, device="cuda")
    lane = torch.arange(BLOCK, device="cuda")
    for block, tokens in enumerate(blocks):
        gradient = head.p[tokens] * kept[block]
        dropped[block] = (1 - gradient.sum(1)).clamp_min(0)
        gradient[lane, head.targets[tokens]] -= 1
        grad_e[tokens] = gradient @ head.c + dropped[block, :, None] * (share[block] @ head.c)
        grad_c += gradient.T @ head.e[tokens]
    e = head.e[blocks]
    grad_c += share.T @ (dropped[..., None] * e).sum(1)
    if first_order:
        mean = (dropped[..., None] * e).sum(1) / dropped.sum(1, keepdim=True).clamp_min(1e-30)
        residual = e - mean[:, None]
        weighted = (residual * dropped.sqrt()[..., None]).reshape(-1, head.dim)
        directions = torch.linalg.eigh(weighted.T @ weighted)[1][:, -first_order:]
        shares = mass.sum(0) / mass.sum()
        y = (head.c - shares @ head.c) @ directions
        x = dropped[..., None] * (residual @ directions)
        grad_e[order] += 0.7 * (x @ ((y * shares[:, None]).T @ head.c)).reshape(-1, head.dim)
        grad_c += 0.7 * shares[:, None] * (y @ (x.reshape(-1, first_order).T @ head.e[order]))
    return grad_e, grad_c


def report(head: Head, label: str, kept: Tensor, result: tuple[Tensor, Tensor]) -> None:
    """Print errors and rows of one result."""
    errors = [
        float((got - exact).norm() / exact.norm()) / ROUNDING
        for got, exact in zip(result, (head.grad_e, head.grad_c), strict=True)
    ]
    sample = slice(None, None, max(1, head.num_classes // 60_000))
    got, exact = (x[sample].double() * 1e40 for x in (result[1], head.grad_c))  # rows may be tiny
    sizes = got.norm(dim=1), exact.norm(dim=1)
    cosine = (got * exact).sum(1) / (sizes[0] * sizes[1]).clamp_min(1e-300)
    levels = torch.tensor([0.01, 0.1, 0.5], device="cuda", dtype=torch.double)
    rows = " ".join(f"{x:.3f}" for x in torch.quantile(cosine, levels).tolist())
    ratio = sizes[0] / sizes[1].clamp_min(1e-300)
    near = float(((ratio > 0.9) & (ratio < 1.1)).double().mean())
    print(
        f"{label:44} kept {kept.float().mean():6.2%}  dE {errors[0]:5.2f}  dC {errors[1]:5.2f}  "
        f"rows {rows}  norms within a tenth {near:.2f}",
        flush=True,
    )


def heaviest(energy: Tensor, forced: Tensor, fraction: float) -> Tensor:
    """Keep this fraction of the strips, by energy, and those that hold a target."""
    sample = energy.flatten()[:: max(1, energy.numel() // 4_000_000)]
    return (energy > torch.quantile(sample, 1 - fraction)) | forced


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hidden_states", type=Path)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    args = parser.parse_args()
    head = Head(args.hidden_states)
    levels = (head.blocks - 1).bit_length()
    unit = torch.nn.functional.normalize(head.e, dim=1)
    random = torch.Generator("cuda").manual_seed(0)
    signs = torch.randint(0, 2, (head.dim, 64), device="cuda", generator=random) * 2.0 - 1
    orders = {
        "text": torch.arange(head.num_tokens, device="cuda"),
        "tree, all features": tree(head.e, levels),
        "tree, 64 random signs": tree(unit @ signs, levels),
        "stages of 3 levels, 64 signs": staged(unit @ signs, (3, levels - 3)),
    }
    for name, order in orders.items():
        energy, mass, forced = strips(head, order)
        kept = heaviest(energy, forced, 0.04)
        report(head, name, kept, filtered(head, order, kept, mass))
    order = orders["stages of 3 levels, 64 signs"]
    energy, mass, forced = strips(head, order)
    for fraction in args.kept:
        base = heaviest(energy, forced, fraction)
        for share in (None, 0.5, 0.3, 0.2, 0.15, 0.1):
            # Strips that hold a large share of the mass of their class decide a row of dC.
            kept = base if share is None else base | (energy > (share * mass.sum(0)) ** 2)
            result = filtered(head, order, kept, as_byte(mass), first_order=64)
            report(head, f"first order, rows kept from a share of {share}", kept, result)


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    main()
