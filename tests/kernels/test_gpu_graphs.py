"""The default step in a CUDA graph, filter included: replays on new data."""

import pytest
import torch

from cut_cross_entropy import linear_cross_entropy, record_filter
from tests.kernels.gpu import requires_kernels
from tests.kernels.test_gpu_host import capture, sharp

pytestmark = [
    pytest.mark.gpu,
    requires_kernels,
    # The leaves' gradient nodes belong to the stream of the warm-up; PyTorch says so.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
]


def data(kind, seed=1):
    """Return tensors for a step; of each flat token one of 16 blocks keeps all its strips."""
    problem = sharp(tokens=2048, seed=seed)
    if kind == "few flat tokens":
        problem.e[5:7].mul_(0.01)
    if kind == "flat":
        problem.e.mul_(0.01)
    if kind == "some ignored":
        problem.targets[::3] = -100
    if kind == "all ignored":
        problem.targets[:] = -100
    return problem


@pytest.fixture(scope="module")
def graph():
    """Return the inputs of a captured step, the step, its graph and its results."""
    first = sharp(tokens=2048)
    e, c, targets = first.e.requires_grad_(), first.c.requires_grad_(), first.targets

    def step():
        loss = linear_cross_entropy(e, c, targets, impl="cce")
        return loss.detach(), *torch.autograd.grad(loss, (e, c))

    return (e, c, targets), step, *capture(step)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("sharp", "filtered"),
        ("few flat tokens", "filtered"),
        ("flat", "dense"),
        ("some ignored", "filtered"),
        ("all ignored", "filtered"),
    ],
)
def test_a_replay_on_new_data_is_an_eager_step(kind, path, graph):
    """Bit for bit on the filtered path, but for dE of flat tokens; else within two roundings."""
    (e, c, targets), step, captured, results = graph
    new = data(kind)
    with torch.no_grad():
        e.copy_(new.e)
        c.copy_(new.c)
        targets.copy_(new.targets)
    captured.replay()
    torch.cuda.synchronize()
    with record_filter() as records:
        expected = step()
    assert [record.path for record in records] == [path]
    same = path == "filtered" and kind != "few flat tokens"
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want) or not same
        error = (got.float() - want.float()).norm()
        assert error <= 2 * 0.00166 * want.float().norm()


# PyTorch's own, of the memory that it reserves by a graph of nothing.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_compiled_step_is_captured():
    """By the graphs of torch.compile(mode="reduce-overhead")."""
    problem = sharp(tokens=512, classes=4096)
    e, c = problem.e.requires_grad_(), problem.c.requires_grad_()

    def loss_of(e, c, targets):
        return linear_cross_entropy(e * 2, c, targets, impl="cce")

    compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        with torch.no_grad():
            e.copy_(sharp(tokens=512, seed=seed).e)
        torch.compiler.cudagraph_mark_step_begin()
        grads = torch.autograd.grad(compiled(e, c, problem.targets), (e, c))
        expected = torch.autograd.grad(loss_of(e, c, problem.targets), (e, c))
        for got, want in zip(grads, expected, strict=True):
            error = (got.float() - want.float()).norm()
            assert error <= 2 * 0.00166 * want.float().norm()
