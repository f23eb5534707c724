"""Tables and plots of the documentation: made from what is kept, and not stale."""

import json

import pandas as pd
import pytest

from cut_cross_entropy.benchmark import suite
from cut_cross_entropy.benchmark.kinds import KINDS
from cut_cross_entropy.benchmark.runs import Task
from cut_cross_entropy.benchmark.shapes import Shape
from cut_cross_entropy.benchmark.suite import PARTS, lines_of, tasks_of
from docs import aims, exact_aims, make, plots
from docs import benchmark_runs as tables
from docs.make import BLOCKS, ROOT
from docs.page import fill
from research import figures


def row(method, data="gemma2-structured", kind="loss-fw-bw", **more):
    """As the command writes it."""
    return {
        "method": method, "kind": kind, "runtime_ms": 20.0, "op_mem_mb": 1300.0,
        "test_data": data, "gemms": 1.5, "gemm_ms": 13.3, "tflops": 900.0, "tokens": 8192,
        "classes": 256000, "dim": 2304, "dtype": "bfloat16", "error_e": 0.003,
        "error_c": 0.0025, "rounding_e": 0.0016, "rounding_c": 0.0016, "ignored": 0.0,
        "frozen": None, "cold": True, "first_ms": 9000.0, "repetitions": 9, "q1_ms": 19.0,
        "q3_ms": 21.0, **more,
    }  # fmt: skip


ENVIRONMENT = {"device": "Some GPU", "torch": "2.11", "triton": "3.6", "commit": "abc"}


@pytest.fixture
def found(tmp_path):
    """Measurements of two devices."""
    folder = tmp_path / "measurements"
    folder.mkdir()
    table = {
        "part": "table",
        "environment": ENVIRONMENT,
        "rows": [
            row("cce"),
            row("baseline", runtime_ms=90.0, op_mem_mb=32000.0, error_e=0.0012),
            row("cce", kind="loss-fw"),
        ],
        "failures": [{"method": "liger", "what": "load", "error": "ImportError: no"}],
    }
    (folder / "table.json").write_text(json.dumps(table))
    largest = {
        "part": "largest", "environment": ENVIRONMENT, "most": 1000,
        "rows": [
            {"method": "cce", "limit_gib": 16.0, "tokens": 1000, "forecast": 90000},
            {"method": "baseline", "limit_gib": 16.0, "tokens": 512, "forecast": 520},
        ],
    }  # fmt: skip
    (folder / "largest.json").write_text(json.dumps(largest))
    old = {"environment": {**ENVIRONMENT, "device": "Old GPU"}, "rows": [row("cce_exact")]}
    (folder / "old.json").write_text(json.dumps(old))
    return tables.read(folder)


def with_rows(kept, *rows):
    """The measurements and more rows, of a later file."""
    later = {"part": "table", "environment": ENVIRONMENT, "rows": list(rows)}
    return tables.collect({**kept.files, "z.json": later})


def test_the_documentation_is_what_the_command_makes(capsys):
    assert make.main(["--check"]) == 0, capsys.readouterr().err


def test_what_is_stale_is_named(tmp_path, capsys):
    for page in make.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("<!-- begin failures -->\n<!-- end failures -->\n")
    folder = tmp_path / "docs/measurements"
    folder.mkdir()
    content = {"part": "table", "environment": ENVIRONMENT, "rows": [row("cce")]}
    (folder / "table.json").write_text(json.dumps(content))
    check = ["--root", str(tmp_path), "--check"]
    assert make.main(check) == 1
    err = capsys.readouterr().err
    assert "stale, run python docs/make.py: README.md, " in err
    assert "docs/images/strips.png" in err
    assert make.main(check[:2]) == 0
    assert make.main(check) == 0
    (tmp_path / "README.md").write_text("<!-- begin where -->\n")
    assert make.main(check) == 2
    assert "markers must come in pairs" in capsys.readouterr().err


def test_every_measurement_says_where_it_comes_from():
    for name, content in tables.read(ROOT / "docs/measurements").files.items():
        assert {"device", "torch", "triton", "commit"} <= set(content["environment"]), name


def test_the_device_with_the_most_measurements_comes_first(found):
    assert found.devices == ["Some GPU", "Old GPU"]


def test_a_verdict_for_every_column(found):
    assert tables.against_others(found) == "", "eager full logits alone are no contest"
    table = tables.against_others(
        with_rows(found, row("liger", runtime_ms=100.0, op_mem_mb=40000.0))
    )
    assert "**won**: 20.0, full logits, eager 90.0" in table
    assert "**won**: 1,300, full logits, eager 32,000" in table
    assert "lost: 1.88, full logits, eager 0.75" in table


def test_the_comparison_names_the_best_and_what_is_lost(found):
    assert tables.comparison(found) == ""
    no_errors = {"error_e": None, "error_c": None}
    rows = [
        row("cce", "gemma3-270m", runtime_ms=4.0, gemms=2.0),
        row("quack", "gemma3-270m", runtime_ms=8.0, gemms=4.0, op_mem_mb=900.0, error_e=0.006),
        row("cce", "phi3.5-broad", runtime_ms=5.0, **no_errors),
        row("quack", "phi3.5-broad", runtime_ms=4.5, **no_errors),
    ]
    reason = "ValueError: quack has no softcap"
    failures = [{"test_data": "gemma2-broad", "method": "quack", "what": "load", "error": reason}]
    failures.append({**failures[0], "test_data": "phi3.5-broad"})  # and then it was measured
    late = {"what": "loss-fw-bw", "error": "not measured: no time was left"}
    failures += [{**late, "test_data": "llama3-8b-broad", "method": m} for m in ("cce", "quack")]
    failures.append({**late, "test_data": "qwen3-0.6b-broad", "method": "all"})
    environment = {**ENVIRONMENT, "device": "Other GPU"}
    content = {
        "part": "comparison", "environment": environment, "rows": rows, "failures": failures * 2,
    }  # fmt: skip
    kept = tables.collect({**found.files, "comparison.json": content})
    assert kept.devices[0] == "Some GPU", "whose other tables are shown, although it has fewer rows"
    text = tables.comparison(kept)
    assert "| Gemma 3 270M, real text | **4.0 (2.00)** | 8.0 (4.00) |" in text
    assert "| Phi 3.5 Mini, broad | 5.0 (1.50) | **4.5 (1.50)** |" in text
    assert "- Phi 3.5 Mini, broad, time: 5.0 (1.50), quack 4.5 (1.50)\n" in text
    assert "- Gemma 3 270M, real text, peak: 1,300, quack 900\n" in text
    assert "| Gemma 3 270M, real text | **1.9 / 1.6** | 3.8 / 1.6 |" in text
    assert text.count("| Phi") == 2, "no errors were measured there"
    assert text.count(f"- Gemma 2 2B, broad, quack: {reason}") == text.count(reason) == 1
    assert "- Llama 3 8B, broad, all: no time was left\n- Qwen3 0.6B, broad, all: no time" in text
    assert text.endswith("Other GPU, PyTorch 2.11, Triton 3.6, commit abc.")
    newer = {
        "part": "comparison", "environment": {**environment, "commit": "def"},
        "rows": [row("cce", "phi3.5-broad", runtime_ms=4.0, **no_errors)],
    }  # fmt: skip
    both = tables.comparison(tables.collect({**kept.files, "comparison_ours.json": newer}))
    assert "| Phi 3.5 Mini, broad | **4.0 (1.50)** | 4.5 (1.50) |" in both
    assert both.endswith("Other GPU, PyTorch 2.11, Triton 3.6, commits abc and def.")
    headline = tables.headline(kept)
    assert "| Gemma 3 270M, ms | peak, MiB | error of dE / dC |\n" in headline
    assert "| **this package**, `cce` | 4.0 | 1,300 | 1.9 / 1.6 |\n" in headline
    assert "as fast as" not in headline, "there are no compiled full logits"


def test_sentence_above_the_headline_is_of_the_same_records(found):
    environment = {**found.files["table.json"]["environment"], "commit": "abc"}
    rows = [
        row("cce", "gemma3-270m", runtime_ms=4.0, op_mem_mb=500.0),
        row("torch_compile", "gemma3-270m", runtime_ms=10.0, op_mem_mb=12_000.0),
    ]
    content = {"part": "comparison", "environment": environment, "rows": rows}
    aim = {
        "test_data": "gemma3-270m", "time": 2.0, "gemm_ms": [1.5, 1.6], "error_e": 1.62,
        "error_c": 1.14,
    }  # fmt: skip
    headline = lambda commit: tables.headline(
        tables.collect(
            {
                "comparison.json": content,
                "aims.json": {
                    "part": "aims",
                    "environment": {**environment, "commit": commit},
                    "rows": [aim, {**aim, "test_data": "smollm2"}],
                },
            }
        )
    )
    first = (
        "For Gemma 3 270M `cce` is 2.5 times as fast as compiled full logits, "
        "with 1/24 of the memory."
    )
    assert headline("abc").splitlines()[0] == first
    assert headline("def").splitlines()[0] == (
        f"{first} `cce` of commit def, in the run of the "
        "[aims](docs/benchmarks.md#aims-of-the-filter): "
        "3.0 ms (Gemma 3 270M, -25%, errors 1.6 / 1.1). "
        "Runs differ by [several percent](docs/engineering_log.md)."
    )


def test_aims_that_are_missed_are_named_with_by_how_much(found):
    good = {
        "tokens": 8192, "classes": 262144, "dim": 640, "time": 1.55, "forward": 1.1,
        "strips_kept": 0.02, "error_e": 1.9, "error_c": 1.2, "rows": [0.9, 0.98, 0.996],
        "norms": 0.85, "peak_mib": 1.1 * 2 * (8192 + 262144) * 640 / 2**20,
    }  # fmt: skip
    bad = {**good, "time": 2.4, "error_e": 2.11, "rows": [0.8, 0.95, 0.996], "norms": 0.71}
    records = lambda *rows: {"part": "aims", "environment": ENVIRONMENT, "rows": list(rows)}
    shown = lambda *rows: aims.aims(tables.collect({**found.files, "aims.json": records(*rows)}))
    assert aims.aims(found) == ""
    text = shown({**good, "test_data": "gemma3-270m"})
    assert "| Gemma 3 270M, real text | 1.55 | 1.6 | 1.10 | 2.0% | 1.90 / 1.20 |" in text
    assert "Every aim is reached." in text
    text = shown({**good, "test_data": "gemma3-270m"}, {**bad, "test_data": "gemma2-broad"})
    assert "- Gemma 2 2B, broad: loss and gradients by 0.80; dE by 0.11; " in text
    assert "; rows by 0.080 / 0.020 / 0.000; norms by 9%\n" in text
    assert "- Gemma 3" not in text


def test_aims_of_the_exact_sums_and_what_is_missed(found):
    shown = lambda part, *rows: tables.collect(
        {**found.files, "new.json": {"part": part, "environment": ENVIRONMENT, "rows": [*rows]}}
    )
    sizes = {"classes": 151936, "error_e": 0.0016 * 1.1, "error_c": 0.0016 * 1.2}
    qwen = lambda method, **more: row(method, "qwen3-0.6b-broad", **{**sizes, **more})
    good = [
        qwen("cce", gemms=1.9, runtime_ms=7.0), qwen("cce_exact", gemms=3.7, op_mem_mb=900.0),
        qwen("cce_exact_1gib", gemms=3.2, runtime_ms=12.0),
        qwen("cce_exact_c", gemms=2.4, error_e=0.0016 * 1.7),
        qwen("quack", gemms=3.3, runtime_ms=12.5, op_mem_mb=2701.0),
    ]  # fmt: skip
    assert exact_aims.exact(found) == ""
    text = exact_aims.exact(shown("comparison", *good))
    assert "| Qwen3 0.6B, broad | 3.8 | 1.90 | 3.70 | 3.20 | 2.40 |  |  | 3.30 |" in text
    assert "Every aim is reached." in text
    bad = [
        qwen("cce_exact", gemms=4.1, op_mem_mb=1350.5, error_c=0.0016 * 1.5), *good[2:4],
        qwen("cce_exact_e", gemms=2.61),
        qwen("quack", gemms=3.1, runtime_ms=11.0, op_mem_mb=2701.0),
    ]  # fmt: skip
    assert (
        "- Qwen3 0.6B, broad: `cce_exact` 4.10 (at most 3.8); `cce`, dE exact, 1 GiB 2.61 (at most "
        "2.5); `cce_exact`, error of dC 1.5; quack is faster (3.10); 50% of the memory of quack\n"
        in exact_aims.exact(shown("comparison", *bad))
    )
    flat = [{**each, "test_data": "qwen3-0.6b-flat"} for each in good[1:3]]
    slow = row("cce", "qwen3-0.6b-flat", gemms=4.4)
    both = dict(found.files)
    both["flat.json"] = {"part": "tails", "environment": ENVIRONMENT, "rows": [slow, *flat]}
    both["new.json"] = {"part": "comparison", "environment": ENVIRONMENT, "rows": good}
    text = exact_aims.exact(tables.collect(both))
    assert "- Qwen3 0.6B, flat: default 19% slower than `cce_exact`\n" in text


def test_plain_pytorch_is_compared_with_eager_full_logits(found):
    rows = [
        row(method, data + "-float32" * (dtype == "float32"), dtype=dtype, runtime_ms=ms)
        for data, dtype, times in (
            ("gpt2-broad", "bfloat16", (11.0, 9.0, 10.0)),
            ("gpt2-broad", "float32", (42.0, 40.0, 40.0)),
        )
        for method, ms in zip(("chunked", "chunked_1gib", "baseline"), times, strict=True)
    ]  # fmt: skip
    content = {"part": "chunked", "environment": ENVIRONMENT, "rows": rows}
    kept = tables.collect({**found.files, "chunked.json": content})
    text = exact_aims.plain(kept)
    assert "| GPT-2, broad | bfloat16 | 10.0 | 1.10 | 0.90 | 1,300 | 1,300 |" in text
    assert "| GPT-2, broad | float32 | 40.0 | 1.05 | 1.00 |" in text
    assert exact_aims.plain(found) == ""


def test_a_line_shows_one_run(found):
    """The one with most kinds, also if a later one has a part of them; the later of two alike."""
    runs = found.whole_runs("Some GPU")
    assert set(runs[runs["method"] == "cce"]["source"]) == {"table.json"}
    later = with_rows(found, row("cce", runtime_ms=10.0))
    assert "| 20.00 |" in tables.by_problem(later, ["gemma2-structured"], ["cce"])
    later = with_rows(found, row("cce", runtime_ms=10.0), row("cce", kind="loss-fw"))
    assert "| 10.00 |" in tables.by_problem(later, ["gemma2-structured"], ["cce"])
    assert "liger" not in set(later.whole_runs()["method"])


def test_a_problem_measured_twice_is_said_to_be(found):
    """All tables and plots but that of the shapes have the figures of the later run."""
    later = with_rows(found, row("cce", runtime_ms=10.0))
    assert "`cce` took 20.0 ms in the run above" in tables.shapes(later)
    assert "and 10.0 ms in the run of all methods" in tables.shapes(later)
    assert "twice" not in tables.shapes(found)
    assert "| 10.0 ms |" in tables.models(later)
    assert "| **this package**, `cce` | 10.0 |" in tables.headline(later)
    bars = next(p for p in tables.plots_of(later) if p.name == "bars_gemma2-structured")
    assert bars.data["runtime_ms"].iloc[0] == 10.0


def test_the_readme_compares_every_method_on_each_problem(found):
    apple = row("apple", data="smollm2", runtime_ms=7.5, op_mem_mb=64.0, version="25.1.1")
    text = tables.headline(with_rows(found, apple))
    assert text.splitlines()[:5] == [
        "| loss and both gradients | Gemma 2 2B, ms | peak, MiB | error of dE / dC "
        "| SmolLM2, ms | peak, MiB | error of dE / dC |",
        "|:---|---:|---:|---:|---:|---:|---:|",
        "| **this package**, `cce` | 20.0 | 1,300 | 1.9 / 1.6 |  |  |  |",
        "| full logits, eager | 90.0 | 32,000 | 0.7 / 1.6 |  |  |  |",
        "| Apple's `cut_cross_entropy` 25.1.1 |  |  |  | 7.5 | 64 | 1.9 / 1.6 |",
    ]
    assert text.endswith("\nSome GPU, PyTorch 2.11, Triton 3.6, commit abc.")


def test_tables_show_the_rows(found):
    table = tables.all_kinds(found.of())
    assert table.count("\n") == 5
    assert "| 0.30% (1.9) | 0.25% (1.6) |" in table
    assert "Gemma 2 2B (V 256,000, D 2,304, softcap) | 20.0 ms | 1.50 |" in tables.models(found)
    assert "| `cce` | 1,000 or more |" in figures.largest(found)
    assert "| full logits, eager | 512 |" in figures.largest(found)
    assert "| `cce` | 9.0 s |" in tables.cold_starts(found)
    assert tables.failures(found) == "- table.json: Liger (load): ImportError: no"
    assert "### Old GPU" in tables.other_devices(found)


def test_kept_strips_are_drawn_in_both_orders(found):
    masks = {"text": ["8000000000000000", "3"], "content": ["ffffffffffffffff"]}
    problem = {
        "tokens": 8192, "classes": 1000, "ranks": [1, 10], "outside": [0.5, 0.1],
        **{order: {"kept": 0.02, "masks": of} for order, of in masks.items()},
    }  # fmt: skip
    made = {**problem, "text": {"kept": 0.1}, "content": {"kept": 0.1}}
    content = {"problems": {"broad:1000:64": made}}
    assert figures.kept_strips(content) is None
    content["problems"]["gemma3-270m"] = problem
    plot = figures.kept_strips(content)
    assert plot.title.startswith("Gemma 3 270M, real text: strips kept in 64 blocks")
    text, ordered = (ax.images[0].get_array() for ax in plot.figure().axes)
    assert text.shape == (64, 2)
    assert text[:, 0].nonzero()[0].tolist() == [0], "the first block is the highest bit"
    assert text[:, 1].nonzero()[0].tolist() == [62, 63]
    assert ordered.shape == (64, 1)
    assert ordered.all()
    (ax,) = figures.tails(content).figure().axes
    styles = {line.get_label(): line.get_linestyle() for line in ax.lines}
    assert styles == {"made, broad (V 1,000)": "--", "Gemma 3 270M, real text (V 1,000)": "-"}


def test_blocks_are_replaced_and_the_rest_is_not(found):
    blocks = {"where": lambda: tables.where(found), "tails": lambda: ""}
    page = "before\n<!-- begin where -->\nold\n<!-- end where -->\nafter\n"
    made = fill(page, blocks)
    assert made.startswith("before\n<!-- begin where -->\n\nSome GPU, PyTorch 2.11")
    assert made.endswith("\n\n<!-- end where -->\nafter\n")
    assert "old" not in made
    assert fill(made, blocks) == made
    page = "<!-- begin tails -->\n<!-- end tails -->\n"
    assert "Not measured yet: there is no record." in fill(page, blocks)


def test_problems_without_errors_are_not_counted_as_problems_with_small_ones(found):
    without = row("cce", data="N1024")
    for key in ("error_e", "error_c", "rounding_e", "rounding_c"):
        del without[key]
    sentence = tables.errors_sentence(with_rows(found, without))
    assert "dE 1.9 to 1.9, dC 1.6 to 1.6 (1 problems)" in sentence


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_can_be_made_from_little(name, found):
    assert isinstance(BLOCKS[name](found), str)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- begin where -->\n", "markers must come in pairs"),
        ("<!-- begin nothing -->\n<!-- end nothing -->", "blocks must be of .* got nothing"),
    ],
)
def test_wrong_markers_are_named(page, message):
    with pytest.raises(ValueError, match=message):
        fill(page, {"where": str})


def test_a_measurement_without_a_device_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"x\.json must name environment\.device"):
        tables.read(tmp_path)


def test_a_folder_of_a_device_is_newer_than_a_file_beside_it(tmp_path):
    (tmp_path / "gpu").mkdir()
    for path, milliseconds in ((tmp_path / "gpu.json", 30.0), (tmp_path / "gpu/table.json", 20.0)):
        content = {"environment": ENVIRONMENT, "rows": [row("cce", runtime_ms=milliseconds)]}
        path.write_text(json.dumps(content))
    assert tables.read(tmp_path).of(method="cce")["runtime_ms"].tolist() == [20.0]


def test_ratios_to_a_product_of_odd_size_are_left_out(found):
    odd = row("cce", data="gpt2-structured", classes=50257)
    kept = lambda row: with_rows(found, row).of(test_data="gpt2-structured")["gemms"]
    assert kept(odd).isna().all()
    assert kept({**odd, "gemm_even": True}).tolist() == [1.5]
    assert found.of(method="cce", kind="loss-fw-bw")["gemms"].tolist() == [1.5]


def test_a_plot_carries_a_digest_of_its_points_and_its_code(tmp_path):
    def draw(figure, points):
        figure.set_size_inches(2, 1)

    def draw_otherwise(figure, points):
        figure.set_size_inches(1, 1)

    one, other = pd.DataFrame({"x": [1, 2]}), pd.DataFrame({"x": [1, 3]})
    plot = plots.Plot("dot", "Dots", draw, one)
    assert not plot.is_current(tmp_path)
    plot.save(tmp_path)
    assert plot.is_current(tmp_path)
    assert not plots.Plot("dot", "Spots", draw, one).is_current(tmp_path)
    assert not plots.Plot("dot", "Dots", draw, other).is_current(tmp_path)
    assert not plots.Plot("dot", "Dots", draw_otherwise, one).is_current(tmp_path)


def test_bars_start_at_zero_and_titles_are_words(found):
    (bars,) = [plot for plot in tables.plots_of(found) if plot.name.startswith("bars")]
    assert bars.title == "Gemma 2 2B head, 8,192 tokens, bfloat16, Some GPU"
    for ax, unit in zip(bars.figure().axes, ("ms", "MiB"), strict=True):
        assert ax.get_xscale() == "linear"
        assert ax.get_xlim()[0] == 0
        assert ax.get_xlabel().endswith(f", {unit}")


def test_parts_of_the_suite_are_problems_that_the_tables_find(tmp_path):
    hidden = [tmp_path / "gemma3-270m.pt", tmp_path / "smollm2.pt"]
    every = {part: tasks_of(part, hidden, True) for part in PARTS}
    of_tokens = ("logprobs", "additions", "divergences")  # other tables
    tasks = {part: found for part, found in every.items() if part not in of_tokens}
    assert all(set(task.kinds) <= set(KINDS) for found in tasks.values() for task in found)
    names = {part: [task.name for task in found] for part, found in tasks.items()}
    for part in PARTS:
        assert len({task.name for task in every[part]}) == len(every[part])
        first, *others = map(vars, lines_of(part, hidden))
        of_part = ("methods", "repetitions", "time_limit", "soak", "peer")
        assert all(first[name] == other[name] for other in others for name in of_part)
    named = [name for found in names.values() for name in found]
    twice = ["gemma2-broad", "gemma3-270m", "llama3-8b-structured", "phi3.5-broad", "smollm2"]
    assert sorted(x for x in set(named) if named.count(x) > 1) == twice
    real = ["gemma3-270m", "smollm2"]
    assert names["table"] == [*real, "gemma2-structured", "llama3-8b-structured"]
    assert names["comparison"][:3] == [*real, "gemma2-broad"]
    assert [task.errors for task in tasks["comparison"]] == [True] * 7
    assert [task.name for task in tasks_of("table", [], True)] == names["table"][2:]
    rows = [
        row("cce", data=task.name, part=part, ignored=task.ignored, frozen=task.frozen,
            tokens=task.tokens, classes=task.shape.num_classes)
        for part in tasks for task in tasks[part]
    ]  # fmt: skip
    contents = [
        {"part": part, "environment": ENVIRONMENT, "rows": [r for r in rows if r["part"] == part]}
        for part in names
    ]
    kept = tables.collect({content["part"]: content for content in contents})
    assert "90% of the targets ignored" in tables.options(kept)
    assert "`e` needs no gradient" in tables.options(kept)
    assert tables.sweep(kept, "tokens").startswith("| N, µs a token")
    assert "\n| 131,072 | 0.153 |\n" in tables.sweep(kept, "tokens")
    classes = tables.sweep(kept, "classes").splitlines()[2:-4]  # less heading, source and plot
    assert [line.split(" | ")[0] for line in classes] == [
        f"| {size:,}" for size in (32768, 65536, 98304, 131072, 196608, 262144)
    ]
    assert tables.models(kept).count("\n") == 2 + 11 + 1


def test_a_part_of_the_suite_is_measured_with_a_folder_of_other_packages(
    tmp_path, capsys, monkeypatch
):
    tiny = Task("ignored-0.9", "flat", 8, Shape("tiny", 64, 8), "float32", ignored=0.9,
                kinds=("loss-fw-bw",), errors=False)  # fmt: skip
    monkeypatch.setattr(suite, "tasks_of", lambda part, hidden, on_gpu: [tiny])
    for name in ("liger", "notes"):
        (tmp_path / "peers" / name).mkdir(parents=True)
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--peers",
        str(tmp_path / "peers"),
        "--one-process",
    ]
    arguments.append("--parts")
    suite.main([*arguments, "options", "--methods", "baseline", "liger", "--commit", "abc"])
    assert "== options: 1 rows, 0 failures" in capsys.readouterr().out
    kept = tables.read(tmp_path / "out")
    assert "90% of the targets ignored" in tables.options(kept)
    assert kept.files["options.json"]["environment"]["commit"] == "abc"
    suite.main([*arguments, "tails", "--time-limit", "10"])
    assert "== tails: not run, no time left" in capsys.readouterr().out
    assert not (tmp_path / "out/tails.json").exists()
