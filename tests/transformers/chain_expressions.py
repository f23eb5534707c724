"""Random expressions of logits, as Python source; see ``chain_programs`` for their names."""

import random
from dataclasses import dataclass
from typing import Any

EXACT, SINGLE, HALF = 1e-10, 5e-6, 8e-2
"""Tolerances: of float64, of programs that round to float32, and to bfloat16."""

NUMBERS = ("0.5", "2", "-0.7", "1.5", "3", "0.9", "1e-1", "True", "np.float64(0.6)", "np.int64(2)")
POSITIVE = ("0.5", "2", "1.5", "3.0", "0.9")


@dataclass
class Expressions:
    """Draws expressions; keeps track of the shape that the logits have."""

    random: random.Random
    tolerance: float = EXACT
    lead: tuple[int, ...] = ()
    classes: int = 0
    is_smooth: bool = True  # nothing rounds so much that comparisons may flip
    may_view: bool = True  # not where no gradient is recorded: such views are leaves of the graph
    is_usual: bool = False  # mostly operations that a patched model records
    names: int = 0

    # Pieces of expressions.

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def either(self, usual: list[Any], unusual: list[Any]) -> Any:
        """One of ``usual``, or in programs that may hold anything, one of both."""
        return self.pick(*usual, *(() if self.is_usual else unusual))

    def number(self) -> str:
        return self.pick(*NUMBERS)

    def name(self, stem: str) -> str:
        self.names += 1
        return f"{stem}_{self.names}"

    def cast(self, x: str) -> str:
        if self.chance(0.15):
            self.tolerance = max(self.tolerance, SINGLE)
            return self.pick(
                f"{x}.float()",
                f"{x}.to(torch.float32)",
                f"{x}.to(dtype=torch.float32)",
                f"{x}.type(torch.float32).to(h.dtype)",
                f"{x}.to('cpu', torch.float)",
                f"{x}.type(torch.FloatTensor)",
            )
        if self.chance(0.05):
            self.tolerance, self.is_smooth = HALF, False
            return self.pick(f"{x}.bfloat16()", f"{x}.to(torch.bfloat16).float()")
        views = [
            f"{x}.view_as({x})",
            f"{x}.reshape({x}.shape)",
            f"torch.squeeze(torch.unsqueeze({x}, 0), 0)",
            f"{x}.unsqueeze(dim=0).squeeze(dim=0)",
            f"{x}.expand_as(x)",
            f"{x}.requires_grad_()",
            f"{x}.alias() if hasattr(x, 'alias') else {x}",
        ]
        return self.either(
            [
                f"{x}.double()",
                f"{x}.to(torch.float64)",
                f"{x}.to(dtype=torch.float64)",
                f"{x}.to(self.prior)",
                f"{x}.to(device='cpu')",
                f"{x}.to('cpu', torch.float64, copy=True)",
                f"{x}.to(x.device)",
                f"{x}.to(x)",
                f"{x}.type(x.dtype)",
                f"{x}.contiguous()",
                f"{x}.clone()",
            ],
            [
                f"{x}.cpu()",
                f"torch.as_tensor({x})",
                f"torch.as_tensor({x}, dtype=torch.float64)",
                f"torch.asarray({x})",
                f"torch.clone({x})",
                f"torch.clone(input={x}, memory_format=torch.contiguous_format)",
                f"{x}.type_as(self.scale)",
                *(views if self.may_view else ()),
            ],
        )

    def scaled(self, x: str) -> str:
        bias = f"self.class_scale[: {self.classes}]"
        return self.either(
            [
                f"{x} * {self.number()}",
                f"{self.number()} * {x}",
                f"{x} / {self.pick(*POSITIVE)}",
                f"torch.mul({x}, {self.number()})",
                f"torch.mul(self.scale, {x})",
                f"torch.mul(input={x}, other=self.scale)",
                f"torch.mul(other={x}, input=self.scale)",
                f"torch.multiply({x}, other={self.number()})",
                f"torch.div({x}, self.temperature)",
                f"torch.div(input={x}, other=self.temperature)",
                f"torch.div({x}, 2, rounding_mode=None)",
                f"torch.true_divide({x}, {self.pick(*POSITIVE)})",
                f"{x}.div(self.temperature.exp())",
                f"{x}.mul(torch.tensor(0.5, dtype={x}.dtype))",
                f"{x} * torch.tensor(2)",
                f"{x} * self.scale",
                f"self.scale * {x}",
                f"{x} / self.scale.exp()",
                f"{x} * self.temperature",
                f"self.temperature.detach() * {x}",
                f"{x} * g",
                f"g * {x}",
                f"{x} / (1 + g.square())",
                f"{x} * g.detach()",
                f"{x} * {bias}",
                f"{bias} * {x}",
                f"{x} / {bias}",
                f"torch.multiply({bias}, {x})",
            ],
            [
                f"-{x}",
                f"{x}.neg()",
                f"torch.negative({x})",
                f"+{x}",
                f"{x} * g.mean()",
                f"1.0 / (3 + {x} * {x})",
                f"2 / (3 + {x}.abs())",
                f"torch.div(2, 3 + {x}.abs())" if self.chance(0.3) else f"{x} * 1",
            ],
        )

    def added(self, x: str) -> str:
        bias = self.pick("class_bias", "prior")
        bias = f"self.{bias}[: {self.classes}]"
        return self.either(
            [
                f"{x} + {bias}",
                f"{bias} + {x}",
                f"{x} - {bias}",
                f"{x}.add(other={bias})",
                f"torch.add(other={x}, input={bias})",
                f"{x} + {x} * 0.5",
                f"torch.add({x}, {bias})",
                f"{x} + {x}.detach()",
            ],
            [
                f"{bias} - {x}",
                f"torch.add({x}, {bias}, alpha=0.5)",
                f"torch.add({bias}, {x}, alpha=2)",
                f"torch.add(input={bias}, other={x}, alpha=2)",
                f"torch.add(other={x}, input={bias})",
                f"{x}.add({bias}, alpha=-1)",
                f"{x}.add(other={bias})",
                f"torch.sub({x}, {bias})",
                f"torch.sub({bias}, {x}, alpha=0.3)",
                f"torch.subtract({x}, other={bias})",
                f"torch.rsub({x}, {bias})",
                f"torch.rsub({x}, 1.0)",
                f"{x} + 0.5",
                f"1 - {x}",
                f"{x} + g",
                f"g + {x}",
                f"{x} + self.scale",
                f"torch.add({x}, g, alpha=0.7)",
                f"{x} - {x}.mean(-1, keepdim=True)",
                f"{x} - {x}.logsumexp(-1, keepdim=True)",
                f"{x} - {x}.amax(-1, keepdim=True).detach()",
                f"{x} + {x} * 0.5",
                f"torch.add({x}, {x}, alpha=0.5)",
                f"{x} + {x}.detach()",
                f"torch.lerp({x}, {x} * self.scale, 0.3)",
                f"torch.addcmul({x}, {bias}, g)",
                f"{x} + torch.zeros_like({x})",
                f"{x} + torch.randn_like({x}) * 0.1",
                f"{x} + {x}.new_ones({x}.shape[-1])",
                f"{x} + torch.full_like({x}, 0.3)",
            ],
        )

    def bent(self, x: str) -> str:
        bias = f"self.{self.pick('prior', 'class_bias')}[: {self.classes}]"
        return self.either(
            [
                f"3 * torch.tanh({x} / 3)",
                f"torch.tanh({x} / 2.0) * 2.0",
                f"({x} / 2.5).tanh().mul(2.5)",
                f"2 * ({x} * self.scale).tanh()",
                f"torch.tanh({x} * self.scale) / self.scale",
                f"torch.tanh(input={x} / 4) * 4",
                f"torch.tanh({x})",
                f"-2 * torch.tanh({x})",
                f"3 * F.tanh({x} / 3)",
                f"3 * torch.special.expit({x})",
                f"torch.tanh({x} + {bias}) * 2",
            ],
            [
                f"{x}.clamp(-2, 2)",
                f"torch.clamp({x}, max=1.5)",
                f"F.relu({x})",
                f"{x}.sigmoid()",
                f"torch.where({x} > 0, {x}, 0.1 * {x})",
                f"torch.where(y[..., None] >= 0, {x}, 2 * {x})",
                f"{x}.masked_fill({x} < -1, -1.0)",
                f"torch.masked_fill({x}, torch.arange({self.classes}) == 3, -2.0)",
                f"{x}.softmax(-1)",
                f"F.log_softmax({x}, dim=-1)",
                f"{x}.pow(2)",
                f"{x} ** 2 * 0.3",
                f"F.dropout({x}, 0.2, self.training)",
                f"F.softplus({x})",
                f"F.layer_norm({x}, ({self.classes},))",
                f"F.normalize({x}, dim=-1) * 3",
                f"torch.cumsum({x}, -1) * 0.2",
                f"torch.nan_to_num({x})",
                f"torch.minimum({x}, self.scale * 2)",
                f"nn.Identity()({x})",
                f"nn.Sequential(nn.Tanh(), nn.Dropout(0.0))({x})",
                f"tree_map(lambda t: t * 0.5, {{'a': [{x}]}})['a'][0]",
                f"{x}.as_subclass(OwnTensor) * 2",
                f"{x} * np.linspace(0.5, 1.5, {self.classes})",
                f"{x} + torch.from_numpy({x}.detach().numpy()) * 0.1",
                f"{x} + copy.deepcopy({x}.detach())",
                f"{x}.to(torch.complex128).real.to(h.dtype)",
                f"{x}.new_tensor(2.0) * {x}",
                f"torch.special.log_softmax({x}, -1)",
                f"F.hardtanh({x}, -1, 1)",
                f"{x}.sub({x}.mean())",
                f"{x}.div_(2) if {x}.is_leaf else {x} / 2",
                f"OwnSoftcap.apply({x})",
                f"ScaledGradient.apply({x})",
                f"scripted()({x})",
                f"torch.func.vmap(lambda row: row * 0.5)({x})",
                f"torch.func.vmap(lambda row, s: row * s)({x}, g)",
                f"torch.func.vmap(torch.tanh)({x})",
            ],
        )

    def mixed(self, x: str) -> str:
        other = self.elementwise("x")
        return self.pick(
            f"0.3 * {x} + 0.7 * {x}.detach()",
            f"{x} + ({other} - {x}).detach()",
            f"{x}.detach() + {other}",
            f"({other}).detach() * self.scale + {x}",
            f"{x} * 0.5 - {other} * 0.5",
            f"0.5 * {x} + 0.5 * self.lm_head(h).reshape({x}.shape)",
            f"{x}.detach()",
            f"{x}.data",
            f"{x}.detach().clone().requires_grad_()",
            f"{x}.detach() * self.scale",
            f"{x}.detach() + self.class_bias[: {self.classes}]",
            f"torch.cat([0.5 * {x}, 0.5 * {x}.detach()], 0).unflatten(0, (2, -1)).sum(0)",
            f"torch.stack([{x}, {other}]).mean(0)",
            "torch.stack((x, x.detach()), dim=-1).sum(-1)",
        )

    def elementwise(self, x: str) -> str:
        draw = self.random.choices(
            [self.cast, self.scaled, self.added, self.bent, self.mixed], [3, 5, 4, 4, 1]
        )[0]
        return f"({draw(x)})" if x != "x" else draw(x)

    def chain(self, length: int) -> list[str]:
        return [f"x = {self.elementwise('x')}" for _ in range(length)]

    def loss(self, x: str = "x", y: str = "y") -> str:
        """An expression for a number, the loss of ``x`` at ``y``."""
        n = self.classes
        flat_x = self.pick(
            f"{x}.reshape(-1, {x}.shape[-1])",
            f"{x}.contiguous().view(-1, {x}.size(-1))",
            f"{x}.flatten(0, -2)" if len(self.lead) > 1 else x,
            f"{x}.reshape(-1, {n})",
        )
        if len(self.lead) == 1 and self.chance(0.5):
            flat_x = x
        flat_y = f"{y}.reshape(-1)"
        weight = f"self.class_weight[:{n}]"
        soft = f"F.one_hot({y}.clamp_min(0), {n}).to({x}.dtype)"
        plain = [
            f"F.cross_entropy({flat_x}, {flat_y})",
            f"F.cross_entropy({flat_x}, {flat_y}, reduction='sum')",
            f"F.cross_entropy({flat_x}, {flat_y}, reduction='sum') / num_items_in_batch",
            f"F.cross_entropy({flat_x}, {flat_y}, reduction='none').mean()",
            f"F.cross_entropy({flat_x}, {flat_y}, reduction='none').square().sum()",
            f"(F.cross_entropy({flat_x}, {flat_y}, reduction='none') * g.reshape(-1)).sum()",
            f"F.cross_entropy({flat_x}, {flat_y}, None, None, -100, None, 'sum')",
            f"F.cross_entropy(input={flat_x}, target={flat_y}, ignore_index=-100)",
            f"F.cross_entropy({flat_x}, {flat_y}.clamp_min(-1), ignore_index=-1)",
            f"F.cross_entropy({flat_x}, {flat_y}.clamp_min(0), ignore_index=0)",
            f"F.cross_entropy({flat_x}, {flat_y}.clamp_min(0))",
            f"nn.CrossEntropyLoss()({flat_x}, {flat_y})",
            f"nn.CrossEntropyLoss(reduction='none')({flat_x}, {flat_y}).sum()",
            f"nn.CrossEntropyLoss(reduction='sum')({flat_x}, {flat_y}) / ({y} != -100).sum()",
            f"torch.nn.functional.cross_entropy({flat_x}, {flat_y}.long())",
            f"torch.exp(-F.cross_entropy({flat_x}, {flat_y}, reduction='none')).mean()",
        ]
        if len(self.lead) == 1:
            plain += [
                f"F.cross_entropy({x}, {y})",
                f"F.cross_entropy({x}[0], {y}[0])",
                f"F.cross_entropy({x}.T.T, {y})",
            ]
        rare = [
            f"F.cross_entropy({flat_x}, {flat_y}, label_smoothing=0.1)",
            f"F.cross_entropy({flat_x}, {flat_y}, weight={weight})",
            f"F.cross_entropy({flat_x}, {flat_y}, {weight}, reduction='sum', label_smoothing=0.2)",
            f"F.cross_entropy({flat_x}, {soft}.reshape(-1, {n}))",
            f"F.cross_entropy({flat_x}, {flat_x}.softmax(-1).detach())",
            f"F.cross_entropy({x}.movedim(-1, 1), {y})" if len(self.lead) > 1 else "x.sum()",
            f"F.cross_entropy({x}.transpose(1, 2), {y})" if len(self.lead) == 2 else "x.sum()",
            f"F.nll_loss(F.log_softmax({flat_x}, -1), {flat_y})",
            f"F.nll_loss({flat_x}.log_softmax(dim=-1), {flat_y}, reduction='sum')",
            f"nn.NLLLoss()(nn.LogSoftmax(dim=-1)({flat_x}), {flat_y})",
            f"-{x}.log_softmax(-1).gather(-1, {y}.clamp_min(0)[..., None]).mean()",
            f"({x}.logsumexp(-1) - {x}.gather(-1, {y}.clamp_min(0)[..., None])[..., 0]).mean()",
            f"1e-1 * torch.logsumexp({x}, dim=-1).square().mean()",
            f"F.kl_div({x}.log_softmax(-1), {x}.flip(-1).softmax(-1).detach())",
            f"F.kl_div(F.log_softmax({x}, -1), torch.softmax({x} * 0.5, -1), reduction='sum')",
            f"-(({x}.softmax(-1) * {x}.log_softmax(-1)).sum(-1)).mean()",
            f"F.binary_cross_entropy_with_logits({x}, {soft})",
            f"F.mse_loss({x}, {soft})",
            f"F.multi_margin_loss({flat_x}, {flat_y}.clamp_min(0))",
            f"FusedCrossEntropy.apply({x}, {y})",
            f"OwnGraph.apply({x}, {y})",
            f"torch.func.vmap(F.cross_entropy)({flat_x}, {flat_y}.clamp_min(0)).mean()",
            f"torch.func.grad(lambda z: F.cross_entropy(z, {flat_y}))({flat_x}).square().sum()",
            f"torch.func.grad_and_value(lambda z: z.logsumexp(-1).sum())({x})[1]",
            f"torch.func.jvp(lambda z: F.cross_entropy(z, {flat_y}), ({flat_x},), ({flat_x},))[1]",
            f"torch.autograd.grad({x}.exp().sum(), {x}, create_graph=True)[0].square().sum()",
            f"checkpoint(torch.tanh, {x}, use_reentrant=False).sum()",
            f"{x}.sum() * 0.1",
            f"{x}.mean()",
            f"torch.linalg.vector_norm({x})",
            f"F.cross_entropy({flat_x}, {flat_y}, size_average=False)" if self.chance(0.2) else
            f"{x}.abs().mean()",
            f"torch.einsum('...v,...v->', {x}, {x}) * 0.01",
            f"{x}.square().mean().sqrt()",
        ]  # fmt: skip
        return (
            self.pick(*plain) if self.chance(0.93 if self.is_usual else 0.6) else self.pick(*rare)
        )

    def model_loss(self) -> str:
        """The loss function of transformers, which shifts (B, T)."""
        self.tolerance = max(self.tolerance, SINGLE)
        return self.pick(
            "self.loss_function(x, y, x.shape[-1])",
            "self.loss_function(logits=x, labels=y, vocab_size=x.shape[-1])",
            "self.loss_function(x, y, x.shape[-1], num_items_in_batch=num_items_in_batch)",
            "self.loss_function(x, None, x.shape[-1], shift_labels=F.pad(y[:, 1:], (0, 1)))",
            "self.loss_function(x, y, x.shape[-1], ignore_index=3)",
        )
