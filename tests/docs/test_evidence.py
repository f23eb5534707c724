"""The page of evidence: every line has a record that is there, by hand, and what lacks one."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from docs import benchmark_runs, evidence_tables, training_runs
from docs.make import ROOT
from docs.training_runs import Record
from tests.benchmark.test_documentation import ENVIRONMENT, row

NONE = {"distill": [], "several_gpus": [], "pretrain": [], "earlier/pretrain": []}
DOCS = ROOT / "docs"
EQUAL = "(differences up to 2% count as none, as do times that overlap between the seeds)"
PAGE = (DOCS / "evidence.md").read_text(encoding="utf-8")


def tables():
    """The lines of the tables of figures, without headings."""
    blocks = re.findall(r"(?s)<!-- begin evidence-[\w-]+ -->(.*?)<!-- end", PAGE)
    return [[line for line in block.splitlines() if line.startswith("|")][2:] for block in blocks]


def test_every_line_names_a_record_with_its_commit():
    lines = [line for table in tables() for line in table]
    assert len(lines) > 20
    for line in lines:
        found = re.search(
            r"\[[\w./-]+\]\((measurements/[\w./-]+\.json)\), ([0-9a-f]{7,}) \|$", line
        )
        assert found, line
        record = json.loads((DOCS / found[1]).read_text(encoding="utf-8"))
        where = record.get("environment") or record["machine"]
        assert where["commit"] == found[2]


def test_every_table_of_figures_has_its_command():
    for name in evidence_tables.BLOCKS:
        block = re.search(rf"(?s)<!-- begin {name} -->(.*?)<!-- end {name} -->", PAGE)
        assert block, name
        # Two are made of the records of the others.
        if "\n|" in block[1] and name not in (
            "evidence-against",
            "evidence-summary",
            "evidence-verdict",
        ):
            assert re.search(r"\nFrom `(python -m|torchrun) ", block[1]), name


def record(name, losses, ms):
    """A record with a held-out loss for each method and seed."""
    rows = [
        {"method": method, "seed": seed, "losses": None, "ms_per_step": ms[method],
         "peak_mib": 10.0, "held-out loss": loss}
        for method, by_seed in losses.items() for seed, loss in enumerate(by_seed)
    ]  # fmt: skip
    content = {
        "machine": {"device": "NVIDIA H200", "commit": "abcdef1", "command": f"{name} --steps 3"},
        "settings": {"batch_size": 8, "length": 125, "model": "some.gguf"},
        "largest": [
            {"method": "cce", "tokens": 123456},
            {"method": "full", "tokens": 1000, "commit": "abc"},
        ],
    }
    return Record(f"{name}_x_h200", content, pd.DataFrame(rows))


@pytest.fixture
def nothing():
    environment = {"device": "NVIDIA H200", "commit": "abcdef1"}
    return benchmark_runs.collect({"table.json": {"environment": environment}})


def test_finetuning(nothing):
    losses = {"full": [2.0, 3.0], "cce": [2.1, 3.3], "full_reordered": [2.0, 2.8]}
    made = record("finetune", losses, {"full": 20.0, "cce": 10.0, "full_reordered": 20.0})
    text = evidence_tables.finetune(nothing, {"finetune": [made], **NONE}, Path())
    assert "| `cce` | 2 | +0.2000 ± 0.1000 | 0.3000 | 100,000 | 10 | 123,456 |" in text
    assert "| `full` | 2 |  |  | 50,000 | 10 | 1,000 (abc) |" in text
    assert "| `full_reordered` | 2 | -0.1000 ± 0.1000 | 0.2000 | 50,000 | 10 |  |" in text
    assert "From `python -m experiments.finetune --steps 3`." in text


def test_records_of_two_texts_are_pooled(nothing):
    """Each run is compared with full logits of its own record, although seeds come twice."""
    ms = {"full": 20.0, "cce": 10.0}
    made = [
        record("pretrain", {"full": [2.0, 3.0], "cce": [2.5, 3.5]}, ms),
        record("pretrain", {"full": [5.0], "cce": [5.2]}, ms),
    ]
    made[1] = replace(made[1], name="pretrain_y_h200")
    for one in made:
        one.runs["seen never"] = one.runs["seen 1 to 9 times"] = one.runs["held-out loss"]
        one.runs["rarest tenth"] = one.runs["held-out loss"]
        one.content["settings"].update(steps=3, width=64)
    made[1].runs["peak_mib"] = 30.0
    runs = {**NONE, "finetune": [], "pretrain": made}
    (line,) = evidence_tables.pretrain(nothing, runs, Path()).splitlines()[2:3]
    assert line.split(" | ")[:6] == ["| NVIDIA H200", "64", "3", "`cce`", "3", "+0.4000 ± 0.1000"]
    assert "pretrain_x_h200.json), abcdef1 and [" in line
    assert line.endswith("pretrain_y_h200.json), abcdef1 |")
    lines = evidence_tables.summary(nothing, runs, Path()).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "+0.4000 ± 0.1000, at most 0.5000 (3 seeds)"
    ] * 2
    assert lines[0].split(" | ")[4] == "30 / 30"
    against = evidence_tables.against(nothing, runs, Path()).splitlines()[2:]
    assert against[0].split(" | ")[1] == "held-out loss, difference of 3 seeds"
    above = "+0.4000 ± 0.1000, at most 0.5000 (3 seeds)"
    counts = evidence_tables.verdict(nothing, runs, Path()).splitlines()
    assert counts[0].startswith(
        "- Losses: in 0 of the 2 lines of training below `cce` ends at most"
    )
    assert counts[0].endswith("do to full logits, or beyond:")
    assert counts[1:] == [
        f"    - beyond: Pretraining from scratch; H200 ({above})",
        f"    - beyond: Pretraining from scratch, targets never seen; H200 ({above})",
        f"- Peak memory: less than full logits in 0 of 2 lines, more in 0 {EQUAL}; "
        "between 1.00 and 1.00 times theirs, 1.00 in the median.",
        f"- Time: less than full logits in 2 of 2 lines, more in 0 {EQUAL}; "
        "between 0.50 and 0.50 times theirs, 0.50 in the median.",
        "- Commits measured, with their lines: abcdef1 (2).",
    ]
    made[1].content["settings"]["steps"] = 4
    assert len(evidence_tables.summary(nothing, runs, Path()).splitlines()[2:]) == 4


def test_costs_that_hardly_differ_are_equal(nothing):
    losses = {"full": [2.0], "cce": [2.0]}
    made = [record("finetune", losses, {"full": 100.0, "cce": ms}) for ms in (97.0, 98.5, 103.0)]
    for steps, one in enumerate(made):
        one.content["settings"]["steps"] = steps  # or they would be pooled
    counts = evidence_tables.verdict(nothing, {**NONE, "finetune": made}, Path()).splitlines()
    assert counts[2] == (
        f"- Time: less than full logits in 1 of 3 lines, more in 1 {EQUAL}; between 0.97 and 1.03 "
        "times theirs, 0.98 in the median."
    )


@pytest.mark.parametrize(
    ("values", "reordered", "place"),
    [
        ([0.1, 0.2, 0.3], [0.1], "above"),
        ([0.1, 0.2, 0.3], [-0.35], "order"),
        ([-0.1, 0.0, 0.3], [], "equal"),  # two standard errors are 0.24
        ([-0.3, -0.2, -0.3], [], "equal"),
        ([0.1], [0.05], "above"),
        ([0.1], [0.2], "order"),
    ],
)
def test_losses_above_full_logits(values, reordered, place):
    as_floats = [pd.Series(x, dtype=float) for x in (values, reordered)]
    assert evidence_tables.place_of(*as_floats) == place


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"beta": 0.0}, "some, forward KL"),
        ({"beta": 0.5}, "some, JSD"),
        ({"beta": 0.3}, "some, generalised JSD, beta 0.3"),
        ({"lora": 4}, "some, LoRA of rank 4 under a frozen head"),
        (
            {"lora": 4, "lora_head": True, "load_in_4bit": True},
            "some, LoRA of rank 4 and of its head, 4-bit weights",
        ),
        ({"batch_size": 24, "processes": 2}, "some on 2 processes, 24 sequences a step"),
    ],
)
def test_names_of_what_is_trained(settings, name):
    made = record("finetune", {"full": [2.0]}, {"full": 1.0})
    made.content["settings"] |= settings
    assert made.model == name


def test_distillation(nothing):
    losses = {"full": [2.0, 3.0], "cce": [2.1, 3.1001], "trl": [2.0, 3.0]}
    made = record("distill", losses, {"full": 20.0, "cce": 10.0, "trl": 9.0})
    made.content["settings"]["beta"] = 0.5
    runs = {**NONE, "finetune": [], "distill": [made]}
    text = evidence_tables.distill(nothing, runs, Path())
    assert "| some, JSD, NVIDIA H200 | `cce` | 2 | +0.1000 ± 0.0000 | 0.1001 | 100,000 |" in text
    assert "From `python -m experiments.distill --steps 3`." in text
    lines = evidence_tables.against(nothing, runs, Path()).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| Distillation of some, JSD, NVIDIA H200", "ms a step"],
        ["| Distillation of some, JSD, NVIDIA H200", "held-out loss, difference of 2 seeds"],
    ]


@pytest.mark.parametrize(
    ("cce", "ms", "figures"),
    [
        ([2.1, 3.1001], 10.0, ["held-out loss, difference of 2 seeds"]),
        ([2.1, 2.9], 10.0, []),
        ([1.9, 2.9], 10.0, []),
        ([2.0, 3.0], 10.3, ["ms a step"]),
        ([2.0, 3.0], 10.1, []),
    ],
)
def test_against(nothing, cce, ms, figures):
    """Slower by more than 2 %, or worse by more than two standard errors."""
    made = record("finetune", {"full": [2.0, 3.0], "cce": cce}, {"full": 10.0, "cce": ms})
    text = evidence_tables.against(nothing, {"finetune": [made], **NONE}, Path())
    lines = text.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == figures


def test_output_layer_of_the_comparison(nothing):
    """It is on the page in place of the table of another device; what is better than it is once."""
    no_errors = {"error_e": None, "error_c": None}
    rows = [
        row("cce", "gemma3-270m", runtime_ms=4.0),
        row("torch_compile", "gemma3-270m", runtime_ms=8.0, error_e=0.006),
        row("cce", "gemma2-broad", runtime_ms=5.0, **no_errors),
        row("torch_compile", "gemma2-broad", runtime_ms=4.0, **no_errors),
        row("cce_exact", "gemma2-broad", runtime_ms=3.0, **no_errors),
    ]
    where = {**ENVIRONMENT, "device": "NVIDIA H200"}
    part = {"part": "comparison", "environment": where, "command": "suite"}
    parts = {f"{i}.json": {**part, "rows": some} for i, some in enumerate((rows[:2], rows[2:]))}
    kept = benchmark_runs.collect({**nothing.files, **parts})
    lines = evidence_tables.summary(kept, {"finetune": [], **NONE}, Path()).splitlines()[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| output layer of Gemma 3 270M, real text; H200",
         "dE 1.9 × rounding, theirs 3.8", "", "4.0 / 8.0"],
        ["| output layer of Gemma 2 2B, broad; H200", "", "", "5.0 / 4.0"],
    ]  # fmt: skip
    lines = evidence_tables.layer(kept, NONE, Path()).splitlines()[2:7]
    assert [line.split(" | ")[2] for line in lines] == ["4.0", "8.0", "3.0", "4.0", "5.0"]
    lines = evidence_tables.against(kept, {"finetune": [], **NONE}, Path()).splitlines()[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| Gemma 2 2B, broad, NVIDIA H200", "time, ms", "5.0", "4.0"]
    ]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "figures"),
    [
        ("logprobs-fw+entropy", {}, {"runtime_ms": 19.7}, []),
        ("logprobs-fw+entropy", {}, {"runtime_ms": 19.0}, [("time, ms", "20.0", "19.0")]),
        ("divergence-fw-bw+jsd", {}, {"op_mem_mb": 900.0}, [("peak, MiB", "1,300", "900")]),
        ("logprobs-fw", {"op_mem_mb": 1.3}, {"op_mem_mb": 0.5}, []),
        (
            "divergence-fw-bw",
            {},
            {"error_c": 0.0016},
            [("error of dC, × rounding", "1.56", "1.00")],
        ),
        (
            "logprobs-fw",
            {"error_logprobs": 8e-5},
            {"error_logprobs": 3e-5},
            [("largest error of a log-probability", "8.0e-05", "3.0e-05")],
        ),
        ("divergence-fw", {"error_divergence": 1e-6}, {}, []),
    ],
)
def test_against_other_packages_for_each_token(kind, ours, theirs, figures):
    rows = [row("cce", kind=kind, **ours), row("chunked", kind=kind, runtime_ms=1.0),
            row("liger", kind=kind, version="0.8.5", **theirs)]  # fmt: skip
    command = "python -m benchmark"
    file = {"environment": ENVIRONMENT, "command": command, "rows": rows}
    found = benchmark_runs.collect({"h200/x.json": file})
    lines = evidence_tables.against(found, {"finetune": [], **NONE}, Path()).splitlines()[2:]
    where = f"| Gemma 2 2B, structured, `{kind}`, Some GPU"
    link = "[h200/x.json](measurements/h200/x.json), abc |"
    assert [line.split(" | ") for line in lines] == [
        [where, *figure, "Liger 0.8.5", link] for figure in figures
    ]


def test_what_is_not_measured_is_named(nothing, tmp_path):
    runs = {"finetune": [], **NONE}
    everything = evidence_tables.missing(nothing, runs, tmp_path)
    assert everything.count("not measured yet (`") == len(evidence_tables.WANTED)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/grpo_h200.json").write_text("{}")
    left = evidence_tables.missing(nothing, runs, tmp_path)
    assert "GRPO" in everything
    assert "GRPO" not in left
    assert left.count("not measured yet (`") == len(evidence_tables.WANTED) - 1


def test_trainers(nothing, tmp_path):
    (tmp_path / "experiments").mkdir()
    runs = [
        {"method": method, "seed": 0, "logs": [{}, {}], "ms_per_step": {"update": 30.4},
         "peak_mib": {"update": 2048.0}}
        for method in ("trl", "token_logprobs")
    ]  # fmt: skip
    content = {
        "experiment": "dpo_bf16", "machine": {"device": "NVIDIA B200", "commit": "abcdef1",
        "command": "dpo --bf16"}, "runs": runs,
        "distances": [{"method": "token_logprobs", "seed": 0, "loss": 0.0013, "equal_steps": 1}],
    }  # fmt: skip
    (tmp_path / "experiments/dpo_bf16_b200.json").write_text(json.dumps(content))
    text = evidence_tables.trainers(nothing, {}, tmp_path)
    line = (
        "| DPO, bf16, NVIDIA B200 | `token_logprobs` | 0 | loss 1.3e-03 | 1 of 2 | update 30 "
        "| update 2,048 | [experiments/dpo_bf16_b200.json]"
    )
    assert line in text
    assert text.count("\n| DPO, bf16") == 2
    assert "From `python -m experiments.dpo --bf16`." in text
    runs[1]["ms_per_step"] = {"update": 31.5}
    (tmp_path / "experiments/dpo_bf16_b200.json").write_text(json.dumps(content))
    assert "| DPO, bf16, NVIDIA B200 | ms a step | 32 | 30 | TRL's output layer |" in (
        evidence_tables.against(nothing, {"finetune": [], **NONE}, tmp_path)
    )
    assert cells(evidence_tables.summary(nothing, {"finetune": [], **NONE}, tmp_path)) == [
        ["DPO, bf16 by TRL, its output layer in place of full logits; B200", "at most 1.3e-03", "",
         "31.5 / 30.4", "2,048 / 2,048"]
    ]  # fmt: skip

    # Of several seeds: the largest distance and peak, the median time.
    runs += [
        {**runs[1], "seed": seed, "ms_per_step": {"update": ms}, "peak_mib": {"update": 2050.0}}
        for seed, ms in ((1, 20.4), (2, 21.4))
    ]
    content["distances"].append({"method": "token_logprobs", "seed": 1, "loss": 0.0005})
    (tmp_path / "experiments/dpo_bf16_b200.json").write_text(json.dumps(content))
    [line] = cells(evidence_tables.summary(nothing, {"finetune": [], **NONE}, tmp_path))
    assert line[1:] == ["at most 1.3e-03", "", "21.4 / 30.4", "2,050 / 2,048"]


def test_rivals_of_fine_tuning(nothing):
    """Apple's package is faster here, and what is neither full logits nor a rival is no line."""
    made = record(
        "finetune",
        {"full": [2.0, 3.0], "cce": [2.0, 3.1], "apple": [2.0, 3.0], "cce_exact": [2.0, 3.0]},
        {"full": 20.0, "cce": 10.0, "apple": 9.0, "cce_exact": 5.0},
    )
    runs = {"finetune": [made], **NONE}
    lines = evidence_tables.against(nothing, runs, Path()).splitlines()[2:]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["ms a step", "10.0", "9.0", "Apple's package"]
    ]


def cells(text):
    """The cells of a table's lines, without heading and record."""
    return [line.strip("| ").split(" | ")[:-1] for line in text.splitlines()[2:]]


def test_the_summary_has_the_scatter_of_reordered_runs(nothing):
    losses = {"full": [2.0, 3.0], "cce": [2.1, 3.1001], "full_reordered": [2.0, 2.8]}
    losses["apple"] = losses["full"]  # which the section has
    ms = {"full": 20.0, "cce": 10.0, "full_reordered": 19.0, "apple": 8.0}
    pretrained = record("pretrain", {"full": [2.0], "cce": [2.5]}, {"full": 20.0, "cce": None})
    pretrained.runs["seen never"] = [9.0, 9.25]
    runs = {**NONE, "finetune": [record("finetune", losses, ms)], "pretrain": [pretrained]}
    assert cells(evidence_tables.summary(nothing, runs, Path())) == [
        ["Fine-tuning some; H200", "+0.1000 ± 0.0000, at most 0.1001 (2 seeds)",
         "-0.1000 ± 0.1000, at most 0.2000 (2 seeds)", "10.0 / 20.0", "10 / 10"],
        ["Pretraining from scratch; H200", "+0.5000", "", "", "10 / 10"],
        ["Pretraining from scratch, targets never seen; H200", "+0.2500", "", "", "10 / 10"],
    ]  # fmt: skip


def test_several_gpus(nothing):
    """Costs are next to those of full logits spread in the same way, losses to one GPU's."""
    losses = {"full": [2.0], "cce": [2.1], "full_fsdp2": [2.0], "cce_fsdp2": [2.2],
              "cce_vocab_parallel": [2.3]}  # fmt: skip
    ms = {"full": 20.0, "cce": 10.0, "full_fsdp2": 12.0, "cce_fsdp2": 6.0, "cce_vocab_parallel": 5}
    made = record("several_gpus", losses, ms)
    made.content["settings"]["processes"] = 2
    runs = {**NONE, "finetune": [], "several_gpus": [made]}
    title = "Fine-tuning some on 2 processes"
    assert cells(evidence_tables.summary(nothing, runs, Path())) == [
        [f"{title}, FSDP2; H200", "+0.2000", "", "6.0 / 12.0", "10 / 10"],
        [f"{title}, rows of the head divided; H200", "+0.3000", "", "5.0 / 12.0", "10 / 10"],
    ]
    text = evidence_tables.several_gpus(nothing, runs, Path())
    assert text.count("| some on 2 processes, NVIDIA H200 | ") == 5
    assert "From `torchrun --nproc-per-node 2 -m experiments.several_gpus --steps 3`." in text


def test_the_records_of_the_page_can_be_read():
    runs = training_runs.read(DOCS / "measurements/experiments")
    assert runs["finetune"]
    assert runs["pretrain"]


def test_figures_of_the_text_are_in_a_table():
    """Every decimal of the sentences is a cell of the page, rounded, or of the aims.

    Counts of products, such as 2.4e11, are constants of the code.
    """
    block = r"(?s)<!-- begin ([\w-]+) -->(.*?)<!-- end \1 -->"
    aims = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    cells = " ".join(x[1] for x in re.findall(block, PAGE))
    cells += next(x[1] for x in re.findall(block, aims) if x[0] == "aims")
    known = [float(x) for x in re.findall(r"\d+\.\d+(?:e-\d+)?|\d+", cells.replace(",", ""))]
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", re.sub(block, "", PAGE))
    figures = re.findall(r"\d+\.\d+(?!\d*e\d)", text)
    assert len(figures) > 20
    for figure in figures:
        half = 0.501 * 10.0 ** -len(figure.partition(".")[2])
        assert figure == "1.0" or any(abs(x - float(figure)) <= half for x in known), figure
