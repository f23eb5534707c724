"""A user's file, which tests/test_types.py hands to ``mypy --strict``; nothing here runs."""

import torch
import transformers
from torch import Tensor
from typing_extensions import assert_type

import cut_cross_entropy
from cut_cross_entropy import (
    DataParallelOptions,
    FilterRecord,
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    VocabParallelOptions,
    cce_patch,
    compute_z_loss,
    linear_cross_entropy,
    record_filter,
)
from cut_cross_entropy.cce_utils import CCEPreset, CCEPresets
from cut_cross_entropy.constants import IGNORE_INDEX
from cut_cross_entropy.tl_utils import is_triton_greater_or_equal
from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy
from cut_cross_entropy.transformers import (
    PatchOptions,
    call_count,
    cce_unpatch,
    is_patched,
)
from cut_cross_entropy.transformers.patch import AXOLOTL_CCE_FORK, PATCH_FNS
from cut_cross_entropy.transformers.utils import apply_lce
from cut_cross_entropy.utils import softcapping
from cut_cross_entropy.vocab_parallel.utils import partition_n_into_range


def losses(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor, flag: bool) -> Tensor:
    loss = linear_cross_entropy(e, c, targets)
    assert_type(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    pair = linear_cross_entropy(e, c, targets, bias, return_lse=True, shift=True)
    assert_type(pair, tuple[Tensor, Tensor])
    either = linear_cross_entropy(e, c, targets, return_lse=flag)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    of_old = linear_cross_entropy(e, c, targets, 0)
    return loss + pair[0] + of_old + compute_z_loss(pair[1], targets, shift=True, reduction="sum")


def options(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(
        e,
        c,
        targets,
        ignore_index=IGNORE_INDEX,
        softcap=30.0,
        reduction="none",
        shift=2,
        filter_eps="high",
        accum_e_fp32=True,
        accum_c_fp32=True,
        filter_e_grad=False,
        filter_c_grad=False,
        impl=LinearCrossEntropyImpl.CCE_EXACT,
        vocab_parallel_options=VocabParallelOptions(0, 5),
        filter_mass=0.1,
        memory_budget=2**20,
        data_parallel_options=DataParallelOptions(torch.bfloat16),
        c_grad_chunk_size=0,
    )


def wrong(e: Tensor, c: Tensor, targets: Tensor) -> None:
    linear_cross_entropy(e, c, targets, impl="cee")  # type: ignore[call-overload]
    linear_cross_entropy(e, c, targets, reduction="avg")  # type: ignore[call-overload]
    linear_cross_entropy(e, c, targets, smoothing=0.1)  # type: ignore[call-overload]
    LinearCrossEntropy(impl="cee")  # type: ignore[arg-type]
    LinearCrossEntropy(colour=3)  # type: ignore[call-arg]
    cce_patch("llama", impl="cee")  # type: ignore[call-overload]


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = LinearCrossEntropy(-100, 30.0, "sum", shift=1, impl="chunked", memory_budget=9)

    def forward(self, e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        result = self.loss.forward(e, c, targets)
        assert_type(result, Tensor | tuple[Tensor, Tensor])
        assert isinstance(result, Tensor)
        return result


def models(model: transformers.LlamaForCausalLM, e: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    patched = cce_patch(model, impl="chunked", reduction="none", train_only=True)
    assert_type(patched, transformers.LlamaForCausalLM)
    assert AXOLOTL_CCE_FORK
    assert is_patched(patched)
    assert call_count(patched) >= 0
    cce_unpatch(patched)
    print(len(PATCH_FNS), cut_cross_entropy.__version__, is_triton_greater_or_equal("3.2.0"))
    return apply_lce(e, c, labels, PatchOptions("cce", "mean", None, train_only=True))


def small(logits: Tensor) -> tuple[int, int]:
    preset: CCEPreset = CCEPresets.build_for_impl(
        "cce_exact",
        {
            "filter_eps": "auto",
            "accum_e_fp32": False,
            "accum_c_fp32": False,
            "filter_e_grad": True,
            "filter_c_grad": True,
        },
    )
    print(preset["filter_eps"], softcapping(logits, 30.0))
    with record_filter() as record:
        assert_type(record, list[FilterRecord])
    print(torch_compile_linear_cross_entropy(logits, logits, logits))
    return partition_n_into_range(10, 0, 3)
