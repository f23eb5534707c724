"""Random programs between a head and its loss, as Python source.

In a program ``x`` are logits (..., n), ``y`` their labels (...), ``g`` a number for each token
(..., 1), ``h`` the features (B, T, D). Statements may be removed one by one: none relies on
another, except on what shape it left.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.transformers.chain_expressions import HALF, SINGLE, Expressions


@dataclass
class Program:
    """A forward and how it is called; ``settings`` are those of :func:`make_pair` and a call."""

    settings: dict[str, Any]
    head: str
    statements: list[str]
    output: str
    tolerance: float
    name: str = ""

    def source(self) -> str:
        """The forward of the model, as Python."""
        lines = [
            "def forward(self, input_ids, labels, num_items_in_batch):",
            "    h = self.features(input_ids)  # (B, T, D)",
            *_indent(self.head),
            "    y, g, losses, logs = labels, self.gate(h), [], {}",
        ]
        for statement in self.statements:
            lines += _indent(statement)
        lines += ["    loss = sum(losses)", *_indent(self.output)]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"# {self.name}: {settings}, tolerance={self.tolerance}\n{self.source()}"

    @property
    def logits_at(self) -> str:
        """Place of the logits in the output; nothing else may be replaced by None."""
        return OUTPUTS[self.output][1]

    def without(self, position: int) -> "Program":
        statements = self.statements[:position] + self.statements[position + 1 :]
        return replace(self, statements=statements)


def _indent(text: str) -> list[str]:
    return ["    " + line for line in text.split("\n")]


class Statements(Expressions):
    """Draws statements. Each leaves ``lead`` and ``classes`` as its text makes them."""

    def step(self) -> str:
        return f"x = {self.elementwise('x')}"

    def changed_in_place(self) -> str:
        n = self.classes
        bias = f"self.{self.pick('class_bias', 'prior')}[:{n}]"
        change = self.pick(
            "x.mul_(0.5)",
            "x *= self.scale",
            "x /= 2",
            f"x += {bias}",
            f"x -= {bias}",
            f"x.add_({bias}, alpha=2)",
            f"x.sub_({bias})",
            "x.div_(self.temperature)",
            "x.tanh_()",
            "x.neg_()",
            "x.clamp_(-2, 2)",
            "x *= g",
            "x[..., 0] = -3.0",
            "x[..., :2] *= 0.5",
            "x[0] *= 2",
            "x[0] = 0.0",
            "x[..., 1] += self.scale",
            "x.masked_fill_(y[..., None] == -100, 0.0)",
            "x.copy_(x * 0.5)",
            "x.zero_()",
            "x.data.mul_(2)",
            "x.detach().mul_(0.5)",
            "x.detach_()",
            "torch.mul(x, 2, out=x)" if self.chance(0.2) else "x.mul_(other=2)",
            "x.exp_()" if self.chance(0.3) else "x.square_()",
            "F.relu(x, inplace=True)",
            "F.dropout(x, 0.2, True, True)",
            "torch.relu_(x)",
            "x[y == -100] = 0.0",
            "x.index_fill_(-1, torch.tensor([0, 1]), -1.0)",
            "x.requires_grad_(False)" if self.chance(0.1) else "x.add_(0.5)",
            "with torch.no_grad():\n    x.mul_(0.5)",
        )
        before = self.pick(
            "",
            "x = x.clone()\n",
            "x = x * 1\n",
            "x = x.clone()\nbefore = x.view(-1, x.shape[-1])\n",
            "x = x.clone()\nbefore = x[..., :-1]\n",
            "x = x.contiguous()\nbefore = x\n",
            "x = x.clone()\nbefore = x.detach()\n",
            "before = x.float() if x.dtype == torch.float32 else x.double()\n",
            "before = x\nx = x[:]\n",
        )
        after = ""
        if "before" in before:
            after = self.pick(
                "",
                "\nlogs[f'before{len(logs)}'] = before.detach().sum()",
                "\nlosses.append(0.1 * before.square().mean())",
                "\nx = before.reshape(*y.shape, -1)" if "[..., :-1]" not in before else "",
            )
        return before + change + after

    def without_grad(self) -> str:
        self.may_view = False
        text = self._without_grad()
        self.may_view = True
        return text

    def _without_grad(self) -> str:
        inner = "\n".join("    " + line for line in self.chain(self.pick(1, 1, 2)))
        mode = self.pick(
            "torch.no_grad()",
            "torch.no_grad()",
            "torch.set_grad_enabled(False)",
            "torch.enable_grad()",
            "torch.set_grad_enabled(True)",
            "torch.set_grad_enabled(self.training)",
            "torch.autograd.graph.save_on_cpu()",
            "torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)",
            "torch.autocast('cpu', enabled=False)",
            "torch.device('cpu')",
            "torch.random.fork_rng()",
            "FunctionMode()",
            "DispatchMode()",
        )
        if self.chance(0.15):
            return (
                "before = torch.is_grad_enabled()\ntorch.set_grad_enabled(False)\n"
                f"{self.step()}\ntorch.set_grad_enabled(before)"
            )
        if self.chance(0.2):
            return f"with torch.no_grad(), torch.enable_grad():\n{inner}"
        if self.chance(0.1):
            name = self.name("step")
            return f"@torch.no_grad()\ndef {name}(x):\n{inner}\n    return x\nx = {name}(x)"
        return f"with {mode}:\n{inner}"

    def checkpointed(self) -> str:
        name = self.name("part")
        inner = "\n".join("    " + line for line in self.chain(self.pick(1, 2, 3)))
        call = self.pick(
            f"checkpoint({name}, x, use_reentrant=False)",
            f"checkpoint({name}, x, use_reentrant=True)",
            f"checkpoint({name}, x, use_reentrant=False, preserve_rng_state=False)",
        )
        return f"def {name}(x):\n{inner}\n    return x\nx = {call}"

    def moved(self) -> str:
        """A change of the leading dimensions."""
        lead, n = self.lead, self.classes
        if len(lead) == 2:
            b, t = lead
            choices: list[tuple[str, tuple[int, ...]]] = [
                ("x, y, g = x[:, :-1], y[:, 1:], g[:, :-1]", (b, t - 1)),
                ("x, y, g = x[..., :-1, :].contiguous(), y[..., 1:], g[:, :-1]", (b, t - 1)),
                ("x, y, g = x[:, 0:-1, :], y[:, 1:].contiguous(), g[:, :-1]", (b, t - 1)),
                ("x, y, g = x.narrow(1, 0, x.shape[1] - 1), y[:, 1:], g[:, :-1]", (b, t - 1)),
                ("x, y, g = x[:, 1:], y[:, 1:], g[:, 1:]", (b, t - 1)),
                ("x, y, g = x[0], y[0], g[0]", (t,)),
                ("x, y, g = x.select(0, -1), y[-1], g[-1]", (t,)),
                ("x, y, g = x[:, -1], y[:, -1], g[:, -1]", (b,)),
                ("x, y, g = x[:, -1:], y[:, -1:], g[:, -1:]", (b, 1)),
                ("x, y, g = x[[0]], y[[0]], g[[0]]", (1, t)),
                ("x, y, g = x[:, [0, -1]], y[:, [0, -1]], g[:, [0, -1]]", (b, 2)),
                ("i = np.array([0, 0])\nx, y, g = x[i], y[i], g[i]", (2, t)),
                ("i = np.arange(0, y.shape[1], 2)\nx, y, g = x[:, i], y[:, i], g[:, i]",
                 (b, (t + 1) // 2)),
                ("x, y, g = x[:, ::2], y[:, ::2], g[:, ::2]", (b, (t + 1) // 2)),
                ("i = torch.tensor([0])\nx, y, g = x.index_select(1, i), y[:, i], g[:, i]", (b, 1)),
                ("i = range(1)\nx, y, g = x[i], y[i], g[i]", (1, t)),
                ("x, y, g = x.transpose(0, 1), y.T, g.transpose(0, 1)", (t, b)),
                ("x, y, g = x.permute(1, 0, 2), y.T, g.swapaxes(0, 1)", (t, b)),
                ("x, y, g = torch.cat([x, x]), torch.cat([y, y]), torch.cat([g, g])", (2 * b, t)),
                ("x, y, g = x.flip(0), y.flip(0), g.flip(0)", (b, t)),
                ("x, y, g = torch.roll(x, 1, 1), y.roll(1, 1), g.roll(1, 1)", (b, t)),
                ("x, y, g = x.repeat(2, 1, 1), y.repeat(2, 1), g.repeat(2, 1, 1)", (2 * b, t)),
                ("x, y, g = (z.chunk(2, 1)[0] for z in (x, y, g))", (b, (t + 1) // 2)),
                ("x, y, g = torch.split(x, 1, 1)[-1], y[:, -1:], g[:, -1:]", (b, 1)),
                ("x, y, g = x.unbind(0)[0], y[0], g[0]", (t,)),
                ("x = torch.stack([row for row in x])", (b, t)),
                ("x = torch.stack([x[i, j] for i in range(x.shape[0]) for j in range(x.shape[1])])"
                 ".view_as(x)", (b, t)),
                ("n = torch.full(y.shape[:1], y.shape[1])\n"
                 "x, y, g = (pack_padded_sequence(z, n, batch_first=True).data for z in (x, y, g))",
                 (b * t,)),
                ("x = torch.stack(list(x.unbind(1)), 1)", (b, t)),
                ("(x, *rest), y, g = x, y[0], g[0]", (t,)),
                ("x, y, g = x[None], y[None], g[None]", (1, b, t)),
                ("x, y, g = x.unsqueeze(1), y.unsqueeze(1), g.unsqueeze(1)", (b, 1, t)),
                ("x, y, g = F.pad(x, (0, 0, 0, 1)), F.pad(y, (0, 1), value=-100), "
                 "F.pad(g, (0, 0, 0, 1))", (b, t + 1)),
            ]  # fmt: skip
            masks = [
                "keep = y != -100",
                "keep = (y != -100).numpy()",
                "keep = (y != -100).tolist()",
                "keep = (y != -100).nonzero(as_tuple=True)",
                "keep = tuple(i.tolist() for i in (y != -100).nonzero(as_tuple=True))",
                "keep = tuple(i.numpy() for i in (y != -100).nonzero(as_tuple=True))",
            ]
            flat = [
                f"x.view(-1, {n})",
                "x.reshape(-1, x.shape[-1])",
                "x.reshape((-1, x.size(-1)))",
                "x.flatten(0, 1)",
                "x.flatten(end_dim=1)",
                "torch.flatten(x, 0, -2)",
                "torch.reshape(input=x, shape=(-1, x.size(dim=-1)))",
                "rearrange(x, 'b t v -> (b t) v')",
                "einops.reduce(x, 'b t v -> (b t) v', 'sum')",
                "x.contiguous().view(y.numel(), -1)",
                "x.reshape(-1).view(-1, x.shape[-1])",
                "x.reshape(y.numel(), x.shape[2])",
                "torch.cat(list(x))",
                "x.unfold(0, 1, 1).squeeze(-1).flatten(0, 1)",
            ]
            if self.chance(0.25):
                self.lead = (-1,)
                mask = self.either(masks[:1], masks[1:])
                return f"{mask}\nx, y, g = x[keep], y[keep], g[keep]"
            if self.chance(0.25):
                self.lead = (b * t,)
                x = self.either(flat[:7], flat[7:])
                return f"x, y, g = {x}, y.reshape(-1), g.reshape(-1, 1)"
        elif len(lead) == 1:
            choices = [
                ("x, y, g = x[:-1], y[:-1], g[:-1]", (-1,)),
                ("x, y, g = x[1:], y[1:], g[1:]", (-1,)),
                ("x, y, g = x[y != -100], y[y != -100], g[y != -100]", (-1,)),
                ("keep = (y != -100).tolist()\nx, y, g = x[keep], y[keep], g[keep]", (-1,)),
                ("x, y, g = x[None], y[None], g[None]", (1, -1)),
                ("x, y, g = x.unsqueeze(0), y.unsqueeze(0), g.unsqueeze(0)", (1, -1)),
                ("x, y, g = x.reshape(1, -1, x.shape[-1]), y[None], g[None]", (1, -1)),
                ("i = torch.argsort(y)\nx, y, g = x[i], y[i], g[i]", (-1,)),
                ("x, y, g = x.flip(0), y.flip(0), g.flip(0)", (-1,)),
                ("i = y.argsort()\nx, y, g = x.index_select(0, i), y[i], g[i]", (-1,)),
            ]  # fmt: skip
        else:
            choices = [
                ("x, y, g = x[0], y[0], g[0]", lead[1:]),
                ("x, y, g = x.flatten(0, 1), y.flatten(0, 1), g.flatten(0, 1)",
                 (lead[0] * lead[1], lead[2])),
                ("x, y, g = x.squeeze(), y.squeeze(), g.squeeze()" if min(lead) > 1 else
                 "x, y, g = x[0], y[0], g[0]", lead[1:] if min(lead) == 1 else lead),
            ]  # fmt: skip
        text, self.lead = self.pick(*(choices[:9] if self.is_usual else choices))
        return text

    def reclassed(self) -> str:
        """A change of the classes."""
        n = self.classes
        if n < 6:
            return self.step()
        k = self.random.randint(4, n - 1)
        fewer = f"\ny = y.masked_fill(y >= {k}, -100)"
        choices = [
            (f"x = x[..., :{k}]{fewer}", k),
            (f"x = x.narrow(-1, 0, {k}){fewer}", k),
            (f"x = x.narrow(dim=-1, start=0, length={k}){fewer}", k),
            (f"x = torch.split(x, [{k}, {n - k}], dim=-1)[0]{fewer}", k),
            (f"x = x[..., list(range({k}))]{fewer}", k),
            (f"x = x[..., torch.arange({n}) < {k}]{fewer}", k),
            (f"x = x.index_select(-1, torch.arange({k})){fewer}", k),
            ("x = x[..., 2:]\ny = (y - 2).clamp_min(-100).masked_fill(y < 2, -100)", n - 2),
            (f"x = x[..., np.arange({n})[::-1].copy()]", n),
            ("x = x.flip(-1)", n),
            ("x = F.pad(x, (0, 2), value=-1.0)", n + 2),
            ("x = torch.cat([x, x[..., :1]], dim=-1)", n + 1),
            (f"x = x[..., :{n}]", n),
            (f"x = x[..., 0:{n}:1]", n),
            (f"x = x.unflatten(-1, (1, {n})).flatten(-2)", n),
        ]
        if n > 15:  # the parameters for classes have no more than the head
            choices = [choice for choice in choices if choice[1] <= n]
        text, classes = self.pick(*choices)
        if classes > n:  # they could not follow a second time
            text += f"\nx = x[..., :{n}]"
            classes = n
        self.classes = classes
        return text

    def lost(self) -> str:
        """A statement that adds a loss."""
        weight = self.pick("", "", "", "0.5 * ", "-0.3 * ", "self.scale * ", "2 * ")
        if len(self.lead) == 2 and self.chance(0.2):
            return f"losses.append({weight}{self.model_loss()})"
        if self.chance(0.08):
            name = self.name("loss")
            reentrant = self.pick("True", "False")
            inner = f"    {self.step()}\n" if self.chance(0.5) else ""
            return (
                f"def {name}(x, y):\n{inner}    return {self.loss()}\n"
                f"losses.append({weight}checkpoint({name}, x, y, use_reentrant={reentrant}))"
            )
        if self.chance(0.05):
            return f"losses.append({weight}({self.loss()}).detach())"
        if self.chance(0.08):
            flat = (
                f"F.cross_entropy(x.reshape(-1, {self.classes}), y.reshape(-1), reduction='none')"
            )
            change = self.pick(
                "each[y.reshape(-1) == 0] = 0.0",
                "each *= g.reshape(-1)",
                "each.mul_(0.5).add_(1)",
                "each = each.view(y.shape)",
                "each = each[y.reshape(-1) != -100]",
                "each, _ = each.sort()",
                "each = torch.where(each > 1, each, each.detach())",
            )
            return f"each = {flat}\n{change}\nlosses.append({weight}each.sum())"
        if self.chance(0.04) and len(self.lead) == 2:
            return f"losses.append({weight}sum(F.cross_entropy(a, b) for a, b in zip(x, y)))"
        mixed, changed = f"({self.mixed('x')})", f"({self.elementwise('x')})"
        if self.chance(0.12):
            return f"losses.append({weight}{self.loss(mixed)})"
        if self.chance(0.1):
            return f"losses.append({weight}{self.loss(changed)})"
        if self.chance(0.05):
            return f"losses.append({weight}torch.stack([{self.loss()}, {self.loss()}]).sum())"
        return f"losses.append({weight}{self.loss()})"

    def logged(self) -> str:
        """A statement that looks at the logits and adds to what is returned."""
        key = f"logs['{self.name('log')}']"
        if self.chance(0.4):
            value = self.pick(
                "(x.shape, x.ndim, x.dim(), x.size(-1), x.numel())",
                "tuple(x.size())",
                "(x.dtype, x.device, x.is_cuda, x.layout)",
                "x.requires_grad",
                "(torch.is_tensor(x), isinstance(x, torch.Tensor))",
                "(x.is_leaf, x.grad_fn is None)",
                "(x.is_contiguous(), x.stride())",
                "(torch.is_floating_point(x), x.is_floating_point(), torch.is_complex(x))",
                "len(x)",
                "(x.element_size(), x.itemsize, x.nbytes, x.nelement())",
                "(torch.numel(x), x.get_device())",
                "x is not None and x.shape[:-1] == y.shape",
                "(x.T is not None, x.mT.shape)" if len(self.lead) == 2 else "x.shape",
                "torch.promote_types(x.dtype, torch.float32)",
                "torch.result_type(x, 1)",
                "torch.finfo(x.dtype).max",
                "x.untyped_storage().nbytes() > 0",
                "hash(x) is not None and id(x) > 0",
                "(x.is_sparse, x.is_quantized, x.is_meta)",
                "x.new_zeros(3).dtype",
                "(torch.zeros_like(x).sum(), torch.empty_like(x).shape)",
            )
            if "stride" in value and self.chance(0.7):
                value = "x.is_contiguous()"
            return f"{key} = {value}"
        values = [
            "x.detach().sum()",
            "x.max()",
            "x.softmax(-1).sum(-1)",
            "float(x.detach().mean())",
            "x.sum().item()",
            "x.detach().numpy().mean()",
            "x.detach().cpu().tolist()",
            "np.asarray(x.detach()).shape",
            "x.std(correction=0)",
            "bool(x.isfinite().all())",
            "torch.isnan(x).any()",
            "x.detach().topk(2).values",
            self.loss(),
            f"({self.loss()}).detach()",
            f"({self.loss()}).item()",
            "torch.exp(" + self.loss() + ").detach()",
        ]
        if self.is_smooth:
            values += ["(x.argmax(-1) == y).float().mean()", "x.argsort(-1)", "x.argmax(-1)"]
        text = f"{key} = {self.pick(*values)}"
        mode = self.pick("with torch.no_grad():", "with torch.no_grad():", "", "@")
        if mode == "@":
            name = self.name("look")
            value = text.split(" = ", 1)[1]
            return f"@torch.no_grad()\ndef {name}(x):\n    return {value}\n{key} = {name}(x)"
        return f"{mode}\n    {text}" if mode else text

    def hooked(self) -> str:
        return self.pick(
            "if x.requires_grad:\n    x.register_hook(lambda grad: grad * 2)",
            "if x.requires_grad:\n    x.register_hook(lambda grad: self.seen.append(grad.sum()))",
            "if x.requires_grad:\n    x.retain_grad()\n    self.kept = x",
            "if x.requires_grad:\n    handle = x.register_hook(lambda grad: grad * 2)\n"
            "    handle.remove()",
            "if x.requires_grad:\n    x = x * 1\n    x.register_hook(lambda g: g.clamp(-0.1, 0.1))",
            "assert torch.is_tensor(x) and isinstance(x, torch.Tensor)",
            "assert isinstance(x, torch.Tensor), type(x)",
            "assert x.shape[-1] > 1 and x.requires_grad == h.requires_grad or True",
            "x = copy.copy(x)",
            "x.note = 'kept'\nassert x.note == 'kept' and getattr(x, 'other', None) is None",
            "assert {x: 1}[x] == 1 and x in [x] and weakref.ref(x)() is x",
            "assert torch.equal(x, x) and torch.allclose(x, x.clone())",
            "if x.detach().abs().max() > 1:\n    x = x * 0.5",
            "if x.sum() > 0:\n    x = -x",
            "assert len(repr(x)) > 10 and f'{x.shape}'",
            "try:\n    x.no_such_method()\nexcept AttributeError:\n    x = x * 2",
            "try:\n    x.view(-1, 97)\nexcept RuntimeError:\n    x = x * 2",
            "if losses and losses[-1].requires_grad:\n"
            "    losses[-1].register_hook(lambda grad: 0.5 * grad)",
            "if losses:\n    losses[-1].mul_(0.5)",
            "if losses:\n    losses[-1] = losses[-1].clone()\n    losses[-1] += g.mean()",
            "if losses and losses[-1].requires_grad:\n    (logs['grad'],) = torch.autograd.grad("
            "losses[-1], self.mix.weight, retain_graph=True, allow_unused=True)",
            "self.kept = x.detach()",
            "x.grad_fn and x.grad_fn.register_hook(lambda gi, go: None)",
            "previous, self.kept = self.kept, x\n"
            "if previous is not None:\n    losses.append(0.1 * (x - previous).square().mean())",
            "previous, self.kept = self.kept, x.detach()\n"
            "if previous is not None:\n    losses.append(0.1 * (x - previous).square().mean())",
            "previous, self.kept = self.kept, x.detach().softmax(-1)\n"
            "if previous is not None:\n    losses.append(F.mse_loss(x, previous))",
        )

    def doubled(self) -> str:
        """A loss of another head, or of another call of the same."""
        second = self.pick(
            "self.second(h)",
            "self.lm_head(self.mix(h))",
            "self.lm_head(h * 0.5)",
            "self.lm_head(h.detach())",
            "self.second(h) + self.lm_head(h)",
            "self.second(h) * 0.5",
            "F.linear(h, self.second.weight.detach())",
            "self.second(h).detach() * self.scale",
        )
        loss = self.pick(
            "F.cross_entropy(z.flatten(0, 1), labels.flatten())",
            "F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), labels[:, 1:].reshape(-1))",
            "FusedCrossEntropy.apply(z, labels)",
            "OwnGraph.apply(z, labels)",
            "z.logsumexp(-1).square().mean()",
            "F.cross_entropy(z.flatten(0, 1), labels.flatten(), label_smoothing=0.1)",
            "F.kl_div(z.log_softmax(-1), self.lm_head(h).softmax(-1).detach(), reduction='sum')",
            "F.mse_loss(z, self.lm_head(h).detach())",
        )
        if self.chance(0.2):
            return (
                "z = self.auxiliary(h)\n"
                "losses.append(F.cross_entropy(z.flatten(0, 1), labels.flatten().clamp(max=6)))"
            )
        return f"z = {second}\nlosses.append({self.pick('0.3 * ', '')}{loss})"

    def branched(self) -> str:
        """A loss of another chain from the same logits, which stay as they are."""
        inner = self.elementwise(f"({self.elementwise('x')})")
        return f"z = {inner}\nlosses.append({self.loss('z')})"


PLAIN_HEAD = "x = self.lm_head(h)"

HEADS: tuple[tuple[float, str], ...] = (
    (8, PLAIN_HEAD),
    (0.5, "x = self.lm_head.forward(h)"),
    (0.5, "x = self.lm_head(h[:, : labels.shape[1]])"),
    (0.5, "x = self.lm_head(h.reshape(-1, h.shape[-1])).view(*h.shape[:2], -1)"),
    (0.5, "x = F.linear(h, self.lm_head.weight)"),
    (0.5, "x = F.linear(input=h, weight=self.lm_head.weight, bias=self.class_bias)"),
    (0.5, "x = h @ self.lm_head.weight.T"),
    (0.5, "x = torch.matmul(h, self.lm_head.weight.t())"),
    (0.5, "x = self.lm_head(h) + self.lora_b(self.lora_a(h)) * 0.5"),
    (0.5, "x = self.lm_head(h) + self.second(h)"),
    (0.5, "x = self.lm_head(h) - 0.5 * self.second(h).detach()"),
    (0.5, "x = torch.cat([self.lm_head(h[:, :1]), self.lm_head(h[:, 1:])], dim=1)"),
    (0.5, "x = checkpoint(self.lm_head, h, use_reentrant=False)"),
    (0.5, "x = checkpoint(self.lm_head, h, use_reentrant=True)"),
    (0.5, "with torch.no_grad():\n    x = self.lm_head(h)"),
    (0.5, "x = self.lm_head(h.detach())"),
    (0.5, "with torch.no_grad():\n    h = self.features(input_ids)\nx = self.lm_head(h)"),
    (
        0.5,
        "weights = {name: p * 0.5 for name, p in self.lm_head.named_parameters()}\n"
        "x = torch.func.functional_call(self.lm_head, weights, (h,))",
    ),
    (0.5, "x = self.lm_head(self.mix(h)) * 0.5 + self.lm_head(h)"),
    (0.3, "x = torch.func.vmap(self.lm_head)(h)"),
    (0.3, "x = self.second(h) + self.class_bias"),
    (
        0.5,
        "handle = self.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)\n"
        "x = self.lm_head(h)\nhandle.remove()",
    ),
    (
        0.3,
        "handle = self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))\n"
        "x = self.lm_head(h)\nhandle.remove()",
    ),
)

OUTPUTS: dict[str, tuple[float, str]] = {
    "return CausalLMOutput(loss=loss, logits=x), logs": (3, "[0].logits"),
    "return CausalLMOutput(loss=loss, logits=x)": (2, ".logits"),
    "return loss, x, logs": (1, "[1]"),
    "return [loss, [x, [x]], logs]": (0.5, "[1]"),
    "return {'loss': loss, 'logits': x, 'logs': logs}": (1, "['logits']"),
    "return OrderedDict(loss=loss, logits=x, logs=logs)": (0.5, "['logits']"),
    "return Named(loss, x, logs)": (1, ".logits"),
    "return Record(loss, x, logs)": (0.5, ".logits"),
    "return FrozenRecord(loss, {'last': x[-1:], 'all': x}, logs)": (0.5, ".logits"),
    "return OwnOutput(loss=loss, logits=x, logs=logs)": (1, ".logits"),
    "return OwnOutput(loss=loss, logits=(x, x), logs=logs)": (0.5, ".logits"),
    "return OwnDict(loss=loss, logits=x, logs=logs)": (0.5, "['logits']"),
    "return defaultdict(list, loss=loss, logits=x, logs=logs)": (0.5, "['logits']"),
    "return SimpleNamespace(loss=loss, logits=x, logs=logs)": (0.2, ".logits"),
    "return loss": (0.5, "no logits"),
    "return (loss,) + CausalLMOutput(logits=x, hidden_states=(h,)).to_tuple()": (0.5, "[1]"),
    "return loss, None, (h, (x,))": (0.3, "[2][1]"),
}
"""Outputs of a program: each with its frequency and the place of the logits."""


PARTS = ("embed", "mix", "lm_head", "class_bias", "scale", "temperature", "second", "gate")
"""Parts that may be frozen."""


def draw(seed: int, index: int) -> Program:
    """The program that belongs to a seed and an index."""
    r = random.Random(f"{seed}/{index}")
    settings = {
        "batch": r.choice([1, 2, 2, 3]),
        "time": r.choice([1, 2, 4, 5, 6]),
        "classes": r.choice([11, 13, 23, 40]),
    }
    lead = settings["batch"], settings["time"]
    drawn = Statements(r, lead=lead, classes=settings["classes"], is_usual=r.random() < 0.6)
    settings |= _draw_settings(drawn)
    heads = [
        (text, weight * 12 if drawn.is_usual and text == PLAIN_HEAD else weight)
        for weight, text in HEADS
        if "lm_head.weight" not in text or settings["head"] not in ("lora", "transposed")
    ]
    head = r.choices([text for text, _ in heads], [weight for _, weight in heads])[0]
    statements = _draw_statements(drawn)
    output = r.choices([*OUTPUTS], [weight for weight, _ in OUTPUTS.values()])[0]
    name = f"seed {seed}, index {index}"
    return Program(settings, head, statements, output, drawn.tolerance, name)


def _draw_settings(drawn: Statements) -> dict[str, Any]:
    r = drawn.random
    dtype, autocast = torch.float64, drawn.chance(0.06)
    if autocast or drawn.chance(0.05):
        dtype, drawn.is_smooth = torch.float32, False
        drawn.tolerance = HALF if autocast else SINGLE
    head = r.choices(
        ["linear", "biased", "scaled", "normalized", "lora", "weight_norm", "transposed"],
        [20, 8, 1, 1, 1, 0.5, 0.3] if drawn.is_usual else [8, 4, 1, 1, 1, 0.5, 0.3],
    )[0]
    backward = r.choices(
        ["plain", "grad", "retain", "twice", "higher", "logits"], [20, 2, 1, 1, 0.3, 1]
    )[0]
    return {
        "dtype": dtype,
        "head": head,
        "tied": head in ("linear", "biased", "scaled") and drawn.chance(0.2),
        "frozen": tuple(part for part in PARTS if drawn.chance(0.08)),
        "training": drawn.chance(0.75),
        "labels": r.choices(["some", "all", "none"], [8, 3, 0.4])[0],
        "grad": r.choices(["on", "off", "inference"], [20, 1, 0.5])[0],
        "autocast": autocast,
        "backward": backward,
        "items": r.choice(["tensor", "int", "float"]),
        "calls": r.choice([1] * 9 + [2]),
    }


def _draw_statements(drawn: Statements) -> list[str]:
    # What looks at the values of the logits is rarer where most operations are to be recorded.
    rare = 0.2 if drawn.is_usual else 1
    kinds: list[tuple[Callable[[], str], float]] = [
        (drawn.step, 8),
        (drawn.changed_in_place, 1.5 * rare),
        (drawn.without_grad, 1),
        (drawn.checkpointed, 0.7),
        (drawn.moved, 3),
        (drawn.reclassed, 1),
        (drawn.logged, 1.5 * rare),
        (drawn.hooked, rare),
        (drawn.doubled, 0.8),
        (drawn.branched, 1),
        (drawn.lost, 1.5),
    ]
    functions, weights = [f for f, _ in kinds], [weight for _, weight in kinds]
    lengths = [0, 1, 1, 2, 2, 3] if drawn.is_usual else [0, 1, 1, 2, 2, 3, 3, 4, 5, 7]
    length = drawn.random.choice(lengths)
    statements = [drawn.random.choices(functions, weights)[0]() for _ in range(length)]
    return [*statements, drawn.lost()]
