"""Random uses of ``linear_cross_entropy`` under transforms."""

import pytest

from tests.random_transforms import FAULTS, draw, judge

SEED, CALLS, BATCHES = 7, 300, 5


@pytest.mark.parametrize("batch", range(BATCHES))
def test_transforms_give_what_the_reference_gives_or_are_refused(batch):
    kinds = []
    for index in range(batch, CALLS, BATCHES):
        call = draw(SEED, index)
        kind, reason = judge(call)
        kinds.append(kind)
        if kind in FAULTS:
            pytest.fail(f"index {index}, {kind}: {reason}\n{call}", pytrace=False)
    assert kinds.count("equal") >= CALLS / BATCHES / 3, "a sample that is refused proves little"
