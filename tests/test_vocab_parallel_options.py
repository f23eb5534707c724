"""Options of vocabulary-parallel calls, and the split of a vocabulary over processes."""

from itertools import pairwise

import pytest
import torch.distributed as dist

from cut_cross_entropy import VocabParallelOptions
from cut_cross_entropy.distributed import partition_n_into_range
from cut_cross_entropy.vocab_parallel.utils import VocabParallelOptions as Same


@pytest.fixture
def process_group(tmp_path):
    """A default group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_fields_in_order():
    options = VocabParallelOptions(3, 7, None, False)
    assert (options.start, options.stop, options.group, options.reduce_e_grad) == (
        3,
        7,
        None,
        False,
    )
    assert VocabParallelOptions(3, 7).reduce_e_grad is True
    assert Same is VocabParallelOptions


@pytest.mark.parametrize("explicit", [False, True])
def test_from_vocab(process_group, explicit):
    group = process_group if explicit else None
    options = VocabParallelOptions.from_vocab(1000, group, reduce_e_grad=False)
    assert options == VocabParallelOptions(0, 1000, group, False)


@pytest.mark.parametrize("n", [0, 1, 7, 64, 50257])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_partition_is_whole_ordered_and_even(n, world_size):
    ranges = [partition_n_into_range(n, rank, world_size) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
