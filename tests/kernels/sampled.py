"""The sample of tokens from which a threshold follows, checked against plain PyTorch."""

import math
from dataclasses import fields, replace

import torch

from cut_cross_entropy.kernels.filtered import calibrate
from cut_cross_entropy.kernels.filtered.selection import Threshold
from cut_cross_entropy.kernels.tokens import BackwardTokens
from cut_cross_entropy.kernels.triton.filtered import calibrate as kernels
from cut_cross_entropy.kernels.triton.primitives import FORCED
from cut_cross_entropy.problem import AdaptedProblem, Problem


def sampled(num_tokens, weights):
    """Return tokens with some upstream gradients and dropped masses, to draw from."""
    random = torch.Generator().manual_seed(0)
    mass = torch.rand(num_tokens, generator=random)
    empty = torch.zeros(num_tokens)
    tokens = BackwardTokens(
        e=torch.randn(num_tokens, 24, generator=random),
        targets=torch.randint(0, 500, (num_tokens,), generator=random),
        origin=torch.arange(num_tokens),
        lse=empty + 12,
        a=weights,
        b=weights * 0.5,
        target_grad=weights.abs(),
        scale=torch.ones(()),
        shard_mass=None,
        num_valid=None,
    )
    return tokens, mass


def threshold_for(num_tokens, num_classes=500, num_kept=10**6, **fields):
    """Return a threshold of tokens without strips."""
    one = torch.tensor([130], dtype=torch.int32)
    blocks = -(-num_tokens // 128)
    values = {
        "strips": torch.zeros((blocks, num_classes), dtype=torch.int16),
        "weights": torch.zeros(blocks, dtype=torch.int32),
        "value": one,
        "most": one + 100,
        "num_kept": torch.tensor(num_kept),
        "histogram": torch.zeros(272, dtype=torch.int64),
        "class_mass": torch.zeros(num_classes),
        "mean_mass": torch.zeros(1),
        "mass_deviation": torch.zeros(1),
        "statistics": torch.full((10,), num_tokens, dtype=torch.int32),
    }
    return Threshold(**{**values, **fields})


def moved(holder, device):
    """Return a dataclass of tensors on a device."""
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return replace(holder, **{k: x.to(device) for k, x in values.items() if torch.is_tensor(x)})


def check_sums(device, dtype, softcap, tolerance, low_rank=0):
    """Compare sums of dropped gradients and masses with the same in float64.

    Logits have further terms from ``low_rank`` columns of an adapter, if there are any.
    """
    tokens, dropped_mass = sampled(200, torch.rand(200))
    multiplier = 0.5 + torch.rand(200)
    tokens = replace(tokens, e=tokens.e.to(dtype), multiplier=multiplier)
    c, bias = torch.randn(500, 24).to(dtype), torch.randn(500).to(dtype)
    low_e, low_c = (torch.randn(n, low_rank).to(dtype) for n in (200, 500))
    energy = torch.randint(60, 200, (2, 500))
    energy[0, tokens.targets[:128]] = FORCED.value
    energy[1, tokens.targets[128:]] = FORCED.value
    mass = torch.randint(1, 250, (2, 500))
    weights = torch.tensor([0, 9], dtype=torch.int32)
    strips = (energy | (mass << 8)).to(torch.int16)
    threshold = moved(threshold_for(200, strips=strips, weights=weights), device)
    kind, options = Problem, {}
    if low_rank:
        tokens = replace(tokens, low_e=low_e)
        kind, options = AdaptedProblem, {"low_e": low_e.to(device), "low_c": low_c.to(device)}
    on_device = moved(tokens, device)
    problem = kind(
        on_device.e, c.to(device), on_device.targets, bias.to(device), -100, softcap, dtype, 2**28,
        **options,
    )  # fmt: skip
    rows, _, _ = calibrate.draw_tokens(on_device, dropped_mass.to(device))
    found = calibrate.sampled_sums(problem, on_device, rows, threshold).double().cpu()
    rows = rows[: kernels.SAMPLES.value].cpu()

    e, wide, scale = tokens.e[rows].double(), c.double(), multiplier[rows, None].double()
    logits = e @ wide.T + low_e[rows].double() @ low_c.double().T + bias.double()
    slope = torch.ones_like(logits)
    if softcap is not None:
        slope = 1 - (logits / softcap).tanh().square()
        logits = softcap * (logits / softcap).tanh()
    grad = (logits * scale - 12 * math.log(2)).exp() * tokens.a[rows, None].double()
    grad[torch.arange(len(rows)), tokens.targets[rows]] -= tokens.b[rows].double()
    grad *= slope
    block = rows // 128
    own = torch.where(energy == FORCED.value, energy, energy - weights[:, None]).clamp_min(0)
    values = ((mass + 0.5) / 4 - 55).exp2().double()
    signs = random_signs_of(24, device)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    projected = wide @ signs.double().T
    projected[:, -1] = 1
    assert found.shape == (kernels.SUMS, kernels.SAMPLES.value, kernels.SKETCH.value)
    for i, limit in enumerate((130 - kernels.STEP.value, 130, 1000)):
        dropped = (own < limit)[block]
        expected = {i: grad} if i == 2 else {i: grad, i + 3: values[block]}
        for place, of_sample in expected.items():
            wanted_sum = (of_sample * dropped) @ projected
            error = (found[place] - wanted_sum).norm() / wanted_sum.norm()
            # Masses are those of bytes, a mantissa for each.
            assert error < (tolerance if place < 3 else max(tolerance, 0.01)), (place, error)


def random_signs_of(dim, device):
    """Return the signs (SKETCH, D) by which rows of c are projected."""
    left = torch.empty(kernels.ROWS.value, dim, device=device)
    calibrate.launch(
        kernels.left_factor_kernel,
        (1,),
        e_ptr=torch.zeros(1, dim, device=device),
        rows_ptr=torch.zeros(kernels.ROWS.value, dtype=torch.int64, device=device),
        out_ptr=left,
        D=dim,
        BLOCK_D=32,
    )
    return left[kernels.SAMPLES.value :].cpu()
