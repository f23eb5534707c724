"""A language model of a few hundred parameters whose forward is a program, and what programs use.

D features, V classes, B rows, T tokens.
"""

import copy
import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

DIM = 5


class ChainConfig(PretrainedConfig):
    model_type = "chain"


class ScaledLinear(nn.Linear):
    """A head that scales what it returns."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.7


class NormalizedLinear(nn.Linear):
    """A head of cosines."""

    def forward(self, input: Tensor) -> Tensor:
        return 4 * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))


class LoraLinear(nn.Module):
    """A head with an adapter."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.base = nn.Linear(dim, classes, bias=False)
        self.a = nn.Linear(dim, 2, bias=False)
        self.b = nn.Linear(2, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        return result + self.b(self.a(x)) * 2.0


class TransposedHead(nn.Module):
    """A head that is not a linear layer."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


HEADS = {
    "linear": lambda dim, classes: nn.Linear(dim, classes, bias=False),
    "biased": nn.Linear,
    "scaled": ScaledLinear,
    "normalized": NormalizedLinear,
    "lora": LoraLinear,
    "weight_norm": lambda dim, classes: nn.utils.parametrizations.weight_norm(
        nn.Linear(dim, classes)
    ),
    "transposed": TransposedHead,
}


class ChainModel(PreTrainedModel):
    """Embeddings, a layer, heads, and parameters that programs apply to logits."""

    config_class = ChainConfig

    def __init__(self, config: ChainConfig, head: str, tied: bool) -> None:
        super().__init__(config)
        classes = config.vocab_size
        self.embed = nn.Embedding(classes, DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.lm_head = HEADS[head](DIM, classes)
        self.second = nn.Linear(DIM, classes)
        self.auxiliary = nn.Linear(DIM, 7)
        self.gate = nn.Linear(DIM, 1)
        self.lora_a, self.lora_b = nn.Linear(DIM, 2), nn.Linear(2, classes, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.temperature = nn.Parameter(torch.tensor([1.3]))
        self.class_bias = nn.Parameter(torch.randn(classes))
        self.class_scale = nn.Parameter(torch.rand(classes) + 0.5)
        self.register_buffer("prior", torch.randn(classes))
        self.register_buffer("class_weight", torch.rand(classes) + 0.1)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.program: Any = None
        self.seen: list[Any] = []
        self.kept: Any = None

    def features(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        e = self.embed(input_ids)
        return 2 * torch.tanh(self.mix(e + 0.5 * e.cumsum(1)))

    def forward(
        self, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None
    ) -> Any:
        return self.program(self, input_ids, labels, num_items_in_batch)


_made = 0


def make_pair(settings: dict[str, Any], program: Any) -> tuple[Any, Any]:
    """Two models with the same state; of a class of their own, so that each warns anew."""
    global _made
    _made += 1
    cls = type(f"Chain{_made}ForCausalLM", (ChainModel,), {"__module__": __name__})
    torch.manual_seed(0)
    model = cls(ChainConfig(vocab_size=settings["classes"]), settings["head"], settings["tied"])
    model.to(settings["dtype"]).train(settings["training"])
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in settings["frozen"]:
            parameter.requires_grad_(False)
    model.program = program
    return model, copy.deepcopy(model)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class OwnSoftcap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x / 3)
        ctx.save_for_backward(y)
        return 3 * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class FusedCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        keep = labels != -100
        probs = torch.softmax(logits, -1)
        target = labels.clamp_min(0)[..., None]
        count = keep.sum().clamp_min(1)
        grad = probs.scatter_add(-1, target, -torch.ones_like(target, dtype=probs.dtype))
        ctx.save_for_backward(grad * keep[..., None] / count)
        return -(probs.gather(-1, target)[..., 0].log() * keep).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None


class OwnGraph(torch.autograd.Function):
    """Cross-entropy whose forward builds a graph of its own, as reentrant checkpoints do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.logits = logits.detach().requires_grad_()
            ctx.loss = F.cross_entropy(
                ctx.logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum"
            )
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.autograd.grad(ctx.loss, ctx.logits, grad, retain_graph=True)[0], None


@functools.cache
def scripted() -> Any:
    """A scripted function, which takes tensors only."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_halve)


def _halve(x: Tensor) -> Tensor:
    return x * 0.5


class OwnTensor(Tensor):
    """A subclass of a tensor that does nothing."""


class FunctionMode(TorchFunctionMode):
    """A mode that does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """A mode that does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


Named = namedtuple("Named", ["loss", "logits", "logs"])


@dataclass
class Record:
    loss: Any
    logits: Any = None
    logs: Any = None


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    loss: Any
    logits: Any = None
    logs: Any = None


@dataclass
class OwnOutput(ModelOutput):
    loss: Any = None
    logits: Any = None
    logs: Any = None


class OwnDict(dict):
    """A dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error
