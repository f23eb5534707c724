"""Compiles every kernel for GPUs that need not be present, and reports the resources it uses."""

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cut_cross_entropy.kernels import (
    BLOCK_T,
    class_logits,
    divergence_columns,
    divergence_logits,
    exact_products,
    likely_classes,
    order,
    powers,
    scale,
    tokens,
)
from cut_cross_entropy.kernels.block_sizes import Tiles, tiles_for
from cut_cross_entropy.kernels.filtered import (
    calibrate,
    grad_c,
    grad_e,
    index,
    selection,
    tail_sample,
)
from cut_cross_entropy.kernels.triton import class_logits as class_logits_kernels
from cut_cross_entropy.kernels.triton import (
    counted_products,
    entropy_and_rank,
    exact,
    lse,
    made_rows,
    made_rows_pass,
)
from cut_cross_entropy.kernels.triton import divergence_logits as divergence_kernels
from cut_cross_entropy.kernels.triton import exact_products as exact_products_kernels
from cut_cross_entropy.kernels.triton import likely_classes as likely_classes_kernels
from cut_cross_entropy.kernels.triton import order as order_kernels
from cut_cross_entropy.kernels.triton import powers as powers_kernels
from cut_cross_entropy.kernels.triton import scale as scale_kernels
from cut_cross_entropy.kernels.triton import tokens as tokens_kernels
from cut_cross_entropy.kernels.triton.filtered import calibrate as calibrate_kernels
from cut_cross_entropy.kernels.triton.filtered import captured, class_weights, strips, tail
from cut_cross_entropy.kernels.triton.filtered import grad_c as grad_c_kernels
from cut_cross_entropy.kernels.triton.filtered import grad_e as grad_e_kernels
from cut_cross_entropy.kernels.triton.filtered import index as index_kernels
from cut_cross_entropy.kernels.triton.filtered import selection as selection_kernels
from cut_cross_entropy.kernels.triton.filtered import tail_sample as tail_sample_kernels

TARGETS = {
    # name: (target, shared memory of a block in bytes, Triton's register limit applies)
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 2**10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 2**10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 2**10),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 2**10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 2**10),
}

_INT64 = {"origin_ptr", "all_targets_ptr", "masks_ptr", "order_ptr", "targets_ptr",
          "sorted_ptr"}  # fmt: skip
_INT32 = {"starts_ptr", "block_starts_ptr", "chunk_starts_ptr", "offsets_ptr", "keys_ptr",
          "tile_block_ptr", "tile_start_ptr", "first_tile_ptr", "flag_ptr", "threshold_ptr",
          "classes_ptr", "count_ptr", "slots_ptr", "rank_ptr", "num_rows_ptr", "num_tiles_ptr",
          "num_flat_ptr", "token_counts_ptr", "choice_ptr"}  # fmt: skip
_HALF = {"c_ptr", "e_ptr", "low_c_ptr", "low_e_ptr",
         "grad_ptr", "borrowed_ptr", "rows_ptr", "source_ptr", "bias_ptr", "out_ptr", "e", "c",
         "powers_ptr", "scaled_ptr"}  # fmt: skip
_SIZES = {"N", "V", "D", "M", "K", "stride", "stride_out", "stride_sums", "stride_class",
          "flat_stride", "left_m", "left_k", "right_k", "out_m", "terms"}  # fmt: skip
_FLOATS = {"softcap", "tolerance", "max_mass", "flat_support", "row_strips", "share",
           "flat_share", "most_dropped"}  # fmt: skip
_TUPLES = {
    # parameter: its members, which are named like parameters
    "values": ("lse_ptr", "a_ptr", "b_ptr", "targets_ptr", "scale_ptr"),
    "of_student": ("student_ptr", "bias_ptr", "multiplier_ptr", "softcap"),
    "of_teacher": ("teacher_ptr", "teacher_bias_ptr", "teacher_multiplier_ptr", "teacher_softcap"),
}
_OF_PRODUCTS = (("columns_ptr", "*i32"), ("share", "fp32"), ("rest", "fp32"),
                ("teacher_softcap", "fp32"))  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants; ``boxes`` are the tiles that descriptors load."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    boxes: dict[str, tuple[int, int]]
    num_warps: int = 4
    num_stages: int = 3
    types: tuple[tuple[str, str], ...] = ()
    max_registers: int | None = None  # of a thread, on NVIDIA


def without(pointers: set[str], given: bool | tuple[str, ...] = ()) -> dict[str, None]:
    """Return None for the arguments that a launch leaves out: all, none, or those not given."""
    if given is True:
        return {}
    return dict.fromkeys(sorted(pointers - {f"{name}_ptr" for name in given or ()}))


def variants(tiles: Tiles, everything: bool = True) -> list[Variant]:
    """Return every kernel as it is specialised for a row of the table of block sizes.

    Without ``everything`` those with a softcap and a bias stand for those without, which have a
    part of their code, one with all optional arguments for those with some of them, and one of the
    unrolled levels of an order for all.
    """
    products = {"BLOCK_T": BLOCK_T, "BLOCK_V": tiles.block_v, "BLOCK_D": tiles.block_d}
    e_box, c_box = (BLOCK_T, tiles.block_d), (tiles.block_v, tiles.block_d)
    few = min(3, tiles.num_stages)
    result = []

    def add(name: str, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        boxes = options.pop("boxes", {})
        result.append(Variant(name, kernel, constants, boxes if tiles.use_tma else {}, **options))

    for softcap, bias in ((False, False), (True, True)) if everything else ((True, True),):
        flags = {} if bias else {"bias_ptr": None}
        flags |= {} if softcap else {"softcap": None}
        sums = {"multiplier_ptr", "entropy_ptr", "p_squares_ptr", "rank_ptr", "highest_ptr"}
        energies = {"strips_ptr", "energy_ptr"}
        terms = {"multiplier_ptr", "eta_ptr", "q_ptr", "num_rows_ptr"}
        by_token = {"stride_class": 1}  # the layout of logit gradients
        no_rank = {"low_e_ptr": None, "low_c_ptr": None, "LOW_RANK": 0}
        label = "softcap-bias" if softcap else "plain"
        for online, flagged, strips_too in (
            (False, False, True),
            (False, False, False),
            (True, False, False),
            (True, True, True),
        ):
            add(
                f"lse-{label}-{online:d}{flagged:d}{strips_too:d}",
                lse.vocabulary_pass_kernel,
                {**products, **flags, **without(sums), **without(energies, strips_too),
                 **no_rank, "ONLINE": online, "ONLY_FLAGGED": flagged},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )  # fmt: skip
        add(
            f"exact-{label}",
            exact.chunk_gradients_kernel,
            {**products, **flags, **without(terms), **no_rank, **by_token},
            boxes={"e": e_box, "c": c_box},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        add(
            f"exact-{label}-by_class",  # of flat tokens
            exact.chunk_gradients_kernel,
            {**products, **flags, **without(terms), **no_rank, "stride_out": 1},
            boxes={"e": e_box, "c": c_box},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        add(
            f"exact-{label}-float32",  # of the rows that the measured error takes
            exact.chunk_gradients_kernel,
            {**products, **flags, **without(terms), **no_rank, **by_token},
            boxes={"e": e_box, "c": c_box},
            num_warps=tiles.num_warps,
            num_stages=min(tiles.num_stages, 3),
            types=(("grad_ptr", "*fp32"),),
        )
        for flagged, multiplied, with_strips in itertools.product((False, True), repeat=3):
            if flagged and with_strips:
                continue  # rare, and larger by as much as without strips
            suffix = f"{label}-{flagged:d}{multiplied:d}{with_strips:d}"
            of_strips = without({"squares_ptr"}, with_strips)
            add(
                f"powers-{suffix}",
                powers_kernels.powers_kernel,
                {**products, **flags, **without({"multiplier_ptr"}, multiplied), **of_strips,
                 "ONLY_FLAGGED": flagged, "OVERFLOW": powers.OVERFLOW},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )  # fmt: skip
            of_strips = without({"squares_parts_ptr", "lse_ptr", "support_ptr", "target_grad_ptr"},
                               with_strips)  # fmt: skip
            add(f"chunk_sums-{suffix}", powers_kernels.chunk_sums_kernel,
                {**without({"softcap"}, softcap), **without({"weights_ptr"}, flagged),
                 **without({"multiplier_ptr"}, multiplied), **of_strips,
                 "BLOCK_T": BLOCK_T})  # fmt: skip
        add(f"strip_sums-{label}", powers_kernels.strip_sums_kernel,
            {**without({"softcap"}, softcap), "BLOCK_T": BLOCK_T, "BLOCK_V": powers.STRIPS,
             "ROWS": powers.ROWS})  # fmt: skip
        # Further sums and a temperature.
        for names, energy in (
            (("multiplier",), True),
            (("entropy",), False),
            (("entropy",), True),
            (("rank",), False),
            (("p_squares", "highest"), False),
        ):
            add(
                f"sums-{label}-{'-'.join(names)}-{energy:d}",
                lse.vocabulary_pass_kernel,
                {**products, **flags, **without(sums, names), **without(energies, energy),
                 **no_rank, "ONLINE": False, "ONLY_FLAGGED": False},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )  # fmt: skip
        for names in (("eta",), ("eta", "q", "multiplier"), ("num_rows",)):
            add(
                f"terms-{label}-{'-'.join(names)}",
                exact.chunk_gradients_kernel,
                {**products, **flags, **without(terms, names), **no_rank, **by_token},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )  # fmt: skip
        for rank in (16, 64) if tiles.adds_low_rank else ():  # of an adapter
            add(
                f"adapted_lse-{label}-{rank}",
                lse.vocabulary_pass_kernel,
                {**products, **flags, **without(sums), "ONLINE": False, "ONLY_FLAGGED": False,
                 "LOW_RANK": rank},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )  # fmt: skip
            add(
                f"adapted_exact-{label}-{rank}",
                exact.chunk_gradients_kernel,
                {**products, **flags, **without(terms), **by_token, "LOW_RANK": rank},
                boxes={"e": e_box, "c": c_box},
                num_warps=tiles.num_warps,
                num_stages=few,
            )
            add(
                f"adapted_strips-{label}-{rank}",
                strips.strip_gradients_kernel,
                {**flags, **without({"eta_ptr", "multiplier_ptr", "num_tiles_ptr"}),
                 "BIAS_GRAD": bias, "LOW_RANK": rank, "BLOCK_T": BLOCK_T,
                 "BLOCK_S": index.TILE, "BLOCK_D": tiles.block_d},
                boxes={"e": e_box},
                num_warps=8,
                num_stages=few,
                max_registers=128,
            )  # fmt: skip
        optional = {"eta_ptr", "multiplier_ptr"}
        for suffix, absent in (
            ("", {*optional, "num_tiles_ptr"}),
            ("-terms", {"num_tiles_ptr"}),
            ("-counted", optional),
        ):
            add(
                f"strips-{label}{suffix}",
                strips.strip_gradients_kernel,
                {**flags, **without(absent), **no_rank,
                 "BIAS_GRAD": bias, "BLOCK_T": BLOCK_T,
                 "BLOCK_S": index.TILE, "BLOCK_D": tiles.block_d},
                boxes={"e": e_box},
                num_warps=8,
                num_stages=few,
                max_registers=128,
            )  # fmt: skip
        add(
            f"score-{label}",
            tokens_kernels.score_targets_kernel,
            {
                **flags,
                **without({"multiplier_ptr", "rows_ptr"}),
                "COMPACT": True,
                "SHARDED": bias,
                "LOW_RANK": 32 * bias,
                "BLOCK_D": 1024,
            },
            types=(("logits_ptr", "*fp32"),),
        )
    block_k = min(64, tiles.block_d)
    added, untilted = {"tail_ptr", "centers_ptr", "origin_ptr"}, {"tilts_ptr", "mass_ptr", "e_ptr"}
    for name, absent, kind in (
        ("grad_e", {"multiplier_ptr"}, "*bf16"),
        ("grad_e-multiplier", set(), "*bf16"),
        ("grad_e-untilted", {"multiplier_ptr", *untilted}, "*bf16"),
        ("added_grad_e", {"multiplier_ptr", *untilted, *added}, "*fp32"),
    ):
        is_added = added <= absent
        add(name, grad_e_kernels.grad_e_kernel,
            {"BLOCK_T": BLOCK_T, "BLOCK_K": block_k, "BLOCK_N": tiles.block_n, **without(absent)},
            num_warps=8, max_registers=128, types=(("out_ptr", kind),),
            num_stages=grad_e.STAGES if tiles.block_v > BLOCK_T and not is_added else few,
        )  # fmt: skip
    i32 = (("classes_ptr", "*i32"), ("weights_ptr", "*i32"), ("threshold_ptr", "*i32"))
    add("chunk_masses", tail_sample_kernels.chunk_masses_kernel,
        {"CHUNK": selection.CHUNK, "ROWS": tail_sample.ROWS}, types=i32)  # fmt: skip
    drawn = {"COLUMNS": 256, "DRAWS": tail_sample.DRAWS}
    add("draw_classes", tail_sample_kernels.draw_classes_kernel,
        {"CHUNK": selection.CHUNK, "HERE": tail_sample.AT_ONCE, **drawn}, types=i32)  # fmt: skip
    add("dropped_mass", tail_sample_kernels.dropped_mass_kernel,
        {"SCAN": tokens.SCAN}, num_warps=8, types=(("dropped_ptr", "*i32"),))  # fmt: skip
    terms = {"bias_ptr", "softcap", "multiplier_ptr"}
    for name, values in (
        ("sample_tail", {**without(terms), **no_rank}),
        ("sample_tail-terms", {"LOW_RANK": 16}),
    ):
        add(name, tail_sample_kernels.sample_tail_kernel,
            {**values, **drawn, "BLOCK_T": BLOCK_T, "BLOCK_D": tiles.block_d},
            boxes={"e": e_box}, num_warps=8, types=i32)  # fmt: skip
    # The sums of dC end in registers; are stored in float32; are stored in 16 bits and some more.
    for partial, low_bits, flat in (
        (False, 0, False),
        (False, 0, True),
        (True, 0, False),
        (True, 4, False),
        (True, 4, True),
        (True, 8, False),
    ):
        of_sums = (("out_ptr", "*fp32"), ("high_ptr", "*fp32")) if partial else ()
        if low_bits:
            of_sums = (("out_ptr", "*i16"), ("high_ptr", "*i16"), ("low_ptr", "*u8"))
        of_flat = without({"flat_grads_ptr", "flat_rows_ptr", "num_flat_ptr"}, flat)
        of_rows = (("flat_grads_ptr", "*bf16"), ("flat_rows_ptr", "*bf16"))
        name = f"{partial:d}{low_bits}{'-flat' * flat}"
        if not (partial and flat):  # flat tokens are added once the sums are final
            add(
                f"grad_c-{name}",
                grad_c_kernels.grad_c_kernel,
                {"PARTIAL": partial, "LOW_BITS": low_bits, "BLOCK_C": grad_c.BLOCK_C,
                 "BLOCK_K": block_k, "BLOCK_T": BLOCK_T, "BLOCK_N": tiles.block_n,
                 "SUPERBLOCK": 64, "CHUNK": 1024, "BF16": True, **of_flat},
                boxes={"e": (block_k, tiles.block_n)},
                num_warps=8,
                num_stages=few,
                max_registers=128,
                types=(*of_sums, *of_rows),
            )  # fmt: skip
        if not partial and tiles.block_v > grad_c.BLOCK_C:
            add(
                f"grad_c-0-wide{'-flat' * flat}",
                grad_c_kernels.grad_c_kernel,
                {"PARTIAL": False, "LOW_BITS": 0, "BLOCK_C": grad_c.BLOCK_C,
                 "BLOCK_K": block_k, "BLOCK_T": BLOCK_T, "BLOCK_N": 2 * tiles.block_n,
                 "SUPERBLOCK": 64, "CHUNK": 1024, "BF16": True, **of_flat},
                boxes={"e": (block_k, 2 * tiles.block_n)},
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                types=of_rows,
            )  # fmt: skip
        add(
            f"tail_rows-{name}",
            grad_c_kernels.tail_rows_kernel,
            {"SUMS": partial, "LOW_BITS": low_bits, "BF16": True, "SUPERBLOCK": 64, "BLOCK_R": 64,
             "BLOCK_D": 128, **of_flat},
            types=(
                ("block_sums_ptr", "*bf16"),
                *((of_sums[1], ("low_ptr", "*u8")) if partial else ()),
                *of_rows,
            ),
        )  # fmt: skip
    add("list_dropped", grad_c_kernels.list_dropped_kernel, {"SUPERBLOCK": 64, "BLOCK_R": 64},
        types=(("out_ptr", "*u8"),))  # fmt: skip
    add("list_valid", tokens_kernels.list_valid_kernel, {"BLOCK": tokens.SCAN}, num_warps=8)
    add(
        "backward_tokens",
        tokens_kernels.backward_tokens_kernel,
        {"HAS_SUPPORT": True, "BLOCK_D": 1024},
    )
    add("gradient_scale", tokens_kernels.gradient_scale_kernel, {"BLOCK": tokens.SCAN},
        num_warps=8)  # fmt: skip
    add("without_flat", tokens_kernels.without_flat_kernel, {"BLOCK": tokens.SCAN})
    add("class_products", class_logits_kernels.class_products_kernel,
        {"BLOCK_K": class_logits.BLOCK_K, "BLOCK_D": 256},
        types=(("ids_ptr", "*i64"),))  # fmt: skip
    add("class_grad_e", class_logits_kernels.class_grad_e_kernel,
        {"BLOCK_K": class_logits.BLOCK_K, "BLOCK_D": 256},
        types=(("ids_ptr", "*i64"), ("grad_e_ptr", "*bf16")))  # fmt: skip
    add("class_grad_c", class_logits_kernels.class_grad_c_kernel,
        {"NEED_C": True, "NEED_BIAS": True, "ROWS": class_logits.ROWS, "BLOCK_D": 512},
        types=(("pairs_ptr", "*i64"), ("starts_ptr", "*i64")))  # fmt: skip
    for options in (False, True):
        transforms = without(
            {"bias_ptr", "teacher_bias_ptr", "softcap", "teacher_softcap", "multiplier_ptr",
             "teacher_multiplier_ptr"}, options)  # fmt: skip
        shared = {**transforms, "BLOCK": divergence_kernels.LONG_BLOCK}
        targets = without({"columns_ptr"}, options)
        add(f"divergence_sums-{options:d}", divergence_kernels.sums_kernel,
            {**shared, **targets, "KIND": int(options)}, types=_OF_PRODUCTS)  # fmt: skip
        add(f"mixture_sums-{options:d}", divergence_kernels.mixture_sums_kernel, shared,
            types=_OF_PRODUCTS)  # fmt: skip
        add(
            f"combine_sums-{options:d}",
            divergence_kernels.combine_sums_kernel,
            {"KIND": int(options), "PARTS": 128, "TOKENS": divergence_logits.COMBINED},
        )
        further = without({"g_entropy_ptr", "g_logprob_ptr", "miss_ptr"}, options)
        add(f"divergence_gradients-{options:d}", divergence_kernels.logit_gradients_kernel,
            {**shared, **targets, **further, "KIND": 2}, types=_OF_PRODUCTS)  # fmt: skip
    columns = divergence_columns
    add("column_energies", columns.column_energies_kernel,
        {"ROWS": columns.ROWS, "BLOCK": columns.BLOCK},
        types=(("grad_ptr", "*bf16"),))  # fmt: skip
    add("move_columns", columns.move_columns_kernel, {"BLOCK": 1024},
        types=(("grad_ptr", "*bf16"), ("columns_ptr", "*bf16"), ("ids_ptr", "*i64")))  # fmt: skip
    add("add_rows", columns.add_rows_kernel, {"BLOCK": 1024},
        types=(("rows_ptr", "*fp32"), ("ids_ptr", "*i64"), ("out_ptr", "*fp32")))  # fmt: skip
    add("scale", scale_kernels.scale_kernel, {"BLOCK": scale.BLOCK})
    add("repair_bound", powers_kernels.repair_bound_kernel,
        {"OVERFLOW": powers.OVERFLOW, "BLOCK_T": BLOCK_T})  # fmt: skip
    for unit in (False, True):
        add(f"scale_rows-{unit:d}", exact_products_kernels.scale_rows_kernel,
            {"NEED_E": True, "NEED_C": True, "HAS_UNIT": unit, "BLOCK_D": 1024},
            types=(("out_ptr", "*fp32"),))  # fmt: skip
    for options in (False, True):
        columns = without({"low_e_ptr", "low_c_ptr"}, options)
        add(f"score_chunk-{options:d}", tokens_kernels.score_targets_kernel,
            {"COMPACT": options, "SHARDED": False, "bound_ptr": None, "BLOCK_D": 1024,
             **({} if options else {"softcap": None}), "LOW_RANK": 16 * options, **columns,
             **without({"bias_ptr", "multiplier_ptr", "rows_ptr"}, options)},
            types=(("rows_ptr", "*fp32"),))  # fmt: skip
    add("scale_sums", made_rows_pass.scale_sums_kernel, {"BLOCK_T": BLOCK_T, "BLOCK_D": 128})
    add("finish_rows", made_rows.finish_rows_kernel, {"BLOCK_D": 1024},
        types=(("out_ptr", "*fp32"),))  # fmt: skip
    add("add_targets", exact_products_kernels.add_targets_kernel,
        {"NEED_C": True, "NEED_BIAS": True, "WINDOW": exact_products.WINDOW,
         "RUN": exact_products.RUN, "BLOCK_D": 1024},
        types=(("grad_bias_ptr", "*fp32"),))  # fmt: skip
    add("sum_windows", exact_products_kernels.sum_windows_kernel,
        {"NEED_C": True, "WINDOW": exact_products.WINDOW, "RUN": exact_products.RUN_OF_WINDOW,
         "BLOCK_D": 256})  # fmt: skip
    for set_apart in (False, True):
        add(f"bound{'-apart' * set_apart}", lse.bound_kernel,
            {"BLOCK_T": BLOCK_T, "SET_APART": set_apart})  # fmt: skip
    add("further_sums", entropy_and_rank.further_sums_kernel, {"BLOCK_T": BLOCK_T},
        types=(("rank_parts_ptr", "*i32"),))  # fmt: skip
    add("finish", lse.finish_kernel, {"BLOCK_T": BLOCK_T}, types=(("strips_ptr", "*u8"),))
    add("threshold", selection_kernels.threshold_kernel,
        {"SAMPLES": selection.MOST_CLASSES, "BLOCK_T": BLOCK_T, "BLOCK": 4096},
        types=(("histogram_ptr", "*i64"), ("token_counts_ptr", "*i32"),
               ("num_kept_ptr", "*i64")))  # fmt: skip
    add(
        "tails",
        tail.tails_kernel,
        {"BLOCK": BLOCK_T},
    )
    add(
        "scatter",
        tokens_kernels.scatter_rows_kernel,
        {"BLOCK_D": 1024},
        types=(("rows_ptr", "*fp32"),),
    )
    add("weigh_blocks", selection_kernels.weigh_blocks_kernel, {"BLOCK_T": BLOCK_T, "ROWS": 64},
        num_warps=8,
        types=(("weights_ptr", "*i32"), ("histogram_ptr", "*i64")))  # fmt: skip
    for kernel, options in (
        (selection_kernels.histogram_kernel, selection.HISTOGRAM),
        (selection_kernels.shares_histogram_kernel, selection.SHARES_HISTOGRAM),
    ):
        add(kernel.__name__, kernel, {key: options[key] for key in ("CHUNK", "ROWS")},
            num_warps=options["num_warps"],
            types=(("counts_ptr", "*i64"), ("weights_ptr", "*i32")))  # fmt: skip
    add("kept", selection_kernels.kept_strips_kernel,
        {"SUPERBLOCK": 64, "CHUNK": 1024,
         "ROWS": selection.ROWS_AT_ONCE}, num_warps=4,
        types=(("counts_ptr", "*i32"), ("active_ptr", "*i32"), ("dropped_ptr", "*i64"),
               ("weights_ptr", "*i32"), ("num_kept_ptr", "*i64"),
               ("shares_ptr", "*i64")))  # fmt: skip
    add("list_likely", likely_classes_kernels.list_likely_kernel,
        {"SIZE": likely_classes.MOST, "BLOCK": likely_classes.SCAN}, num_warps=8,
        types=(("counts_ptr", "*i32"), ("classes_ptr", "*i64")))  # fmt: skip
    sampled = (("rows_ptr", "*i64"),)
    add("draw_tokens", calibrate_kernels.draw_tokens_kernel,
        {"SCAN": tokens.SCAN}, num_warps=8, types=sampled)  # fmt: skip
    add("left_factor", calibrate_kernels.left_factor_kernel, {"BLOCK_D": 32}, types=sampled)
    for some in (False, True):
        adapted = some and tiles.adds_low_rank
        add(f"sampled_gradients-{some:d}", calibrate_kernels.sampled_gradients_kernel,
            {**without({"bias_ptr", "softcap", "multiplier_ptr"}, some),
             **without({"low_e_ptr", "low_c_ptr"}, adapted), "LOW_RANK": 16 * adapted,
             "BLOCK_V": tiles.block_v, "BLOCK_D": tiles.block_d},
            boxes={"e": e_box, "c": c_box}, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, types=sampled)  # fmt: skip
    for kind, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
        add(f"sampled_sums-{kind}", calibrate_kernels.sampled_sums_kernel,
            {"SUMS": calibrate_kernels.SUMS, "BLOCK_T": BLOCK_T, "TILE": calibrate.TILE,
             "BLOCK": calibrate.BLOCKS[dtype]}, num_warps=8, num_stages=2,
            types=(*sampled, ("weights_ptr", "*i32"), ("grads_ptr", kind)))  # fmt: skip
    add("choose_threshold", calibrate_kernels.choose_threshold_kernel, {}, num_warps=8,
        types=(*sampled, ("histogram_ptr", "*i64"), ("most_ptr", "*i32"),
               ("num_kept_ptr", "*i64"), ("dropped_ptr", "*i32"), ("target", "fp32"),
               ("lowest_slope", "fp32"), ("highest_slope", "fp32"),
               ("most_below", "fp32")))  # fmt: skip
    add("index", index_kernels.index_kernel,
        {"WHOLE": True, "SUPERBLOCK": 64, "TILE": index.TILE, "ROWS": 16, "COLUMNS": 256},
        num_warps=8, types=(("counts_ptr", "*i32"),))  # fmt: skip
    add("choose_path", captured.choose_path_kernel, {"BLOCK_T": BLOCK_T, "BLOCK": 1024})
    for of_rows in (False, True):
        add(f"counted-{of_rows:d}", counted_products.counted_product_kernel,
            {"COUNTS_ROWS": of_rows, "left_k" if of_rows else "left_m": 1, "BLOCK_M": BLOCK_T,
             "BLOCK_N": tiles.block_v, "BLOCK_K": tiles.block_d},
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            types=(("left_ptr", "*bf16"), ("right_ptr", "*bf16"),
                   ("out_ptr", "*fp32" if of_rows else "*bf16")))  # fmt: skip
    add("list", index_kernels.list_strips_kernel,
        {"BY_CLASS": True, "SUPERBLOCK": 64, "CHUNK": 1024, "TILE": index.TILE,
         "TURN": index.TURN})  # fmt: skip
    for bf16 in (True, False):
        add(f"centers-{bf16:d}", tail.centers_kernel,
            {"BF16": bf16, "SUPERBLOCK": 64, "BLOCK_R": 64,
             "BLOCK_D": 256 if bf16 and tiles.block_v > 128 else 128},
            types=(("out_ptr", "*fp32"), ("c_ptr", "*bf16" if bf16 else "*fp16")))  # fmt: skip
    add("finish_centers", tail.finish_centers_kernel, {"COLUMNS": 256, "BLOCK_D": 128}, num_warps=1,
        types=(("out_ptr", "*fp32"),))  # fmt: skip
    for grouped in (False, True):
        add(f"block_sums-{grouped:d}", tail.block_sums_kernel,
            {**without({"own_ptr", "own_mass_ptr"}, grouped), "BLOCK_T": BLOCK_T,
             "BLOCK_D": 64})  # fmt: skip
    for kind in ("*bf16", "*fp32"):
        add(f"class_weights-{kind}", class_weights.class_weights_kernel,
            {"SUPERBLOCK": 64, "BLOCK_T": BLOCK_T, "BLOCK": 64},
            types=(("grads_ptr", kind),))  # fmt: skip
    add("tail_bias", tail.tail_bias_kernel, {"SUPERBLOCK": 64, "BLOCK": 64})
    add("features", order_kernels.features_kernel, {"ROWS": 32, "BLOCK_D": 128, "FEATURES": 64})
    for first in (True, False):
        add(f"split_nodes-{first:d}", order_kernels.split_nodes_kernel,
            {"LEVEL": 0 if first else 3, "KEYS": 3 if everything else 1,
             "CAPACITY": 8192 if first else 1024,
             "SAMPLES": order.SAMPLES, "STEP": order.STEP,
             "ITERATIONS": order.ITERATIONS, "KEYS_AT_ONCE": order.KEYS_AT_ONCE,
             "KEY_BITS": order.KEY_BITS, "FIRST": first, "FEATURES": 64, "SUPERBLOCK": 64,
             "BLOCK_T": BLOCK_T},
            num_warps=16 if first else 8, num_stages=2,
            types=(("keys_ptr", "*fp32"), ("order_ptr", "*i32"), ("out_ptr", "*i32")))  # fmt: skip
    add("scatter_of_blocks", order_kernels.scatter_kernel, {"FEATURES": 64, "BLOCK_T": BLOCK_T},
        types=(("order_ptr", "*i32"),))  # fmt: skip
    add("choose_order", order_kernels.choose_order_kernel, {"SUPERBLOCK": 64, "BLOCK_T": BLOCK_T},
        types=(("order_ptr", "*i32"), ("out_ptr", "*i64")))  # fmt: skip
    add("sum_classes", strips.sum_classes_kernel, {"CHUNK": 1024, "BLOCK": 128},
        types=(("out_ptr", "*fp32"),))  # fmt: skip
    return result if everything else _with_all_options(result)


def _with_all_options(found: list[Variant]) -> list[Variant]:
    """Make one variant of those that differ in nothing but the arguments that are left out."""
    groups: dict[str, list[Variant]] = {}
    for variant in found:
        given = {name: x for name, x in variant.constants.items() if x is not None}
        alike = replace(variant, name="", constants=dict(sorted(given.items())))
        groups.setdefault(repr(alike), []).append(variant)
    merged = []
    for group in groups.values():
        absent = set.intersection(
            *({k for k, x in v.constants.items() if x is None} for v in group)
        )
        constants = {
            name: x for name, x in group[0].constants.items() if x is not None or name in absent
        }
        merged.append(replace(group[0], constants=constants))
    return merged


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel; those after the first are known for NVIDIA only.

    Args:
        shared: bytes of shared memory.
        registers: of a thread.
        stack: bytes of a thread, where spills land.
        serialised: whether each asynchronous product of sm_90 is waited for before the next.
    """

    shared: int
    registers: int | None
    stack: int | None
    serialised: bool | None


def _type_of(name: str, variant: Variant) -> str:
    special = dict(variant.types)
    if name in variant.constants:
        return "constexpr"
    if name in special:
        return special[name]
    if name in variant.boxes:
        rows, columns = variant.boxes[name]
        return f"tensordesc<bf16[{rows}, {columns}]>"
    for kind, names in (("*bf16", _HALF), ("*i64", _INT64), ("*i32", _INT32), ("fp32", _FLOATS)):
        if name in names:
            return kind
    if name.endswith("_ptr"):
        of_bytes = {"strips_ptr": "*i16", "dropped_ptr": "*u8", "features_ptr": "*fp16"}
        return of_bytes.get(name, "*fp32")
    return "i32"


def compile_variant(variant: Variant, target: GPUTarget) -> Usage:
    """Compile for ``target`` and read the resources used."""
    signature: dict[str, Any] = {}
    constants: dict[str | tuple[int, int], Any] = {}
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(variant.kernel.arg_names):
        members = _TUPLES.get(parameter, (parameter,))
        types = [_type_of(name, variant) for name in members]
        signature[parameter] = tuple(types) if parameter in _TUPLES else types[0]
        for j, (name, kind) in enumerate(zip(members, types, strict=True)):
            path = (i, j) if parameter in _TUPLES else (i,)
            if kind == "constexpr":
                constants[path if parameter in _TUPLES else name] = variant.constants[name]
            known = kind.startswith("*") or name in _SIZES
            if known and parameter not in variant.kernel.do_not_specialize:
                divisible[path] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, divisible)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.max_registers is not None and target.backend == "cuda":
        options["maxnreg"] = variant.max_registers
    kernel = triton.compile(source, target=target, options=options)
    registers = stack = serialised = None
    if target.backend == "cuda":
        usage = _dump(kernel.asm["cubin"], "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        registers, stack = int(found[1]), int(found[2])
        serialised = "wgmma" in kernel.asm["ptx"] and _is_serialised(kernel.asm["cubin"])
    return Usage(kernel.metadata.shared, registers, stack, serialised)


def _is_serialised(cubin: bytes) -> bool:
    products = re.findall(r"HGMMA[^;]*;", _dump(cubin, "-sass"))
    assert products
    return len(products) > 1 and all("gsb0" in product for product in products)


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tiles_of(name: str) -> Tiles:
    """Return the block sizes in use on a target."""
    target, shared = TARGETS[name]
    return tiles_for(shared, target.arch // 10 if target.backend == "cuda" else 9)


def report(name: str) -> None:
    """Print the usage of every kernel for one target."""
    for variant in variants(tiles_of(name)):
        print(name, variant.name, compile_variant(variant, TARGETS[name][0]), flush=True)


if __name__ == "__main__":
    import sys

    for target_name in sys.argv[1:] or TARGETS:
        report(target_name)
