"""The last stage of a pipeline computes the loss from embeddings, as docs/distributed.md says."""

import pytest
import torch
from torch import nn

from cut_cross_entropy import linear_cross_entropy
from tests.distributed.processes import Cases, assert_passed

WORLD = 2
CASES = Cases()
BATCH, TIME, D, V = 8, 5, 16, 50


def model_of():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh())
    last = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    return first, last, nn.Linear(D, V, bias=False)


class LastStage(nn.Module):
    """Ends with embeddings; holds the head, so that its parameters are this stage's."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.body(x)

    def loss(self, e, labels):
        """Summed over a micro-batch: means would weigh micro-batches alike, whatever they hold."""
        return linear_cross_entropy(e, self.head.weight, labels, shift=1, reduction="sum")


@CASES.add("ScheduleGPipe", "Schedule1F1B")
def pipeline(rank, schedule):
    from torch.distributed import pipelining

    tokens = torch.randint(V, (BATCH, TIME), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:3, 2:] = -100
    count = (labels[:, 1:] != -100).sum()
    first, last, head = model_of()
    expected = linear_cross_entropy(last(first(tokens)), head.weight, labels, shift=1)
    expected.backward()
    wanted = [p.grad for p in (*first.parameters(), *last.parameters(), head.weight)]

    first, last, head = model_of()
    module = first if rank == 0 else LastStage(last, head)
    stage = pipelining.PipelineStage(module, rank, 2, torch.device("cpu"))
    loss_fn = module.loss if rank == 1 else (lambda e, labels: e.sum())
    runner = getattr(pipelining, schedule)(
        stage, n_microbatches=4, loss_fn=lambda e, y: loss_fn(e, y) / count, scale_grads=False
    )
    losses = []
    if rank == 0:
        runner.step(tokens)
        mine = [p.grad for p in first.parameters()]
        wanted = wanted[: len(mine)]
    else:
        runner.step(target=labels, losses=losses)
        torch.testing.assert_close(torch.stack(losses).sum().detach(), expected.detach())
        mine = [p.grad for p in (*last.parameters(), head.weight)]
        wanted = wanted[-len(mine) :]
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", CASES)
def test_pipeline(outcomes, name):
    assert_passed(outcomes[name])
