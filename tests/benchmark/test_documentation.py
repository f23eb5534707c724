"""Tables and plots of the documentation: made from what is kept, and not stale."""

import json
from pathlib import Path

import pytest

from benchmark import evidence, remake, report
from benchmark.plots import Plot, digest_of, figure
from benchmark.remake import BLOCKS, Measurements, fill, stale
from benchmark.results import complete, of_results, read_all
from benchmark.suite import ALL, PARTS, tasks_of, unpack

ROOT = Path(__file__).parent.parent.parent


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
    return Measurements(read_all(folder))


def test_the_documentation_is_what_the_command_makes():
    kept = Measurements(read_all(ROOT / "docs" / "measurements"))
    assert stale(ROOT, kept) == []


def test_every_measurement_says_where_it_comes_from():
    for device in read_all(ROOT / "docs" / "measurements"):
        for name, content in device.files.items():
            assert {"device", "torch", "triton", "commit"} <= set(content["environment"]), name


def test_the_device_with_the_most_measurements_comes_first(found):
    assert [device.name for device in found.devices] == ["Some GPU", "Old GPU"]


def test_a_verdict_for_every_column(found):
    assert report.against_others(found.main) == "", "eager full logits alone are no contest"
    found.main.rows.append({**row("liger", runtime_ms=100.0, op_mem_mb=40000.0), "part": "table"})
    table = report.against_others(found.main)
    assert "**won**: 20.0, full logits, eager 90.0" in table
    assert "**won**: 1,300, full logits, eager 32,000" in table
    assert "lost: 1.88, full logits, eager 0.75" in table


def test_a_line_shows_one_run(found):
    """The one with most kinds, also if a later one has a part of them; the later of two alike."""
    device = found.main
    assert {r["source"] for r in device.of_problem("gemma2-structured", "cce").values()} == {
        "table.json"
    }
    later = {**row("cce", runtime_ms=10.0), "part": "table", "source": "z.json"}
    device.rows.append(later)
    assert device.of_problem("gemma2-structured", "cce")["loss-fw-bw"]["runtime_ms"] == 20.0
    assert "| 20.0 ms |" in report.headline(device)
    device.rows.append({**later, "kind": "loss-fw"})
    assert device.of_problem("gemma2-structured", "cce")["loss-fw-bw"] is later
    assert "| 10.0 ms |" in report.headline(device)
    assert device.of_problem("gemma2-structured", "liger") == {}


def test_the_readme_compares_every_method_on_each_problem(found):
    found.main.rows.append(
        {**row("apple", data="smollm2", runtime_ms=7.5, op_mem_mb=64.0), "version": "25.1.1"}
    )
    assert report.comparison(found.main).splitlines() == [
        "| loss and both gradients | Gemma 2 2B, ms | peak, MiB | error of dE / dC "
        "| SmolLM2, ms | peak, MiB | error of dE / dC |",
        "|:---|---:|---:|---:|---:|---:|---:|",
        "| **this package**, `cce` | 20.0 | 1,300 | 1.9 / 1.6 |  |  |  |",
        "| full logits, eager | 90.0 | 32,000 | 0.7 / 1.6 |  |  |  |",
        "| Apple's `cut_cross_entropy` 25.1.1 |  |  |  | 7.5 | 64 | 1.9 / 1.6 |",
    ]
    assert "\nSome GPU, PyTorch 2.11, Triton 3.6, commit abc." in remake.headline(found)


def test_tables_show_the_rows(found):
    assert report.all_kinds(found.main.rows).count("\n") == 5
    assert "| 0.30% (1.9) | 0.25% (1.6) |" in report.all_kinds(found.main.rows)
    assert "Gemma 2 2B (V 256,000, D 2,304, softcap) | 20.0 ms | 1.50 |" in report.headline(
        found.main
    )
    largest = remake.largest(found)
    assert "| `cce` | 1,000 or more |" in largest
    assert "| full logits, eager | 512 |" in largest
    assert "| `cce` | 9.0 s |" in evidence.cold_starts(found.main)
    assert evidence.failures(found.main) == "- table.json: Liger (load): ImportError: no\n"
    assert "### Old GPU" in remake.other_devices(found)


def test_blocks_are_replaced_and_the_rest_is_not(found):
    page = "before\n<!-- begin where -->\nold\n<!-- end where -->\nafter\n"
    made = fill(page, found)
    assert made.startswith("before\n<!-- begin where -->\n\nSome GPU, PyTorch 2.11")
    assert made.endswith("\n\n<!-- end where -->\nafter\n")
    assert "old" not in made
    assert fill(made, found) == made


def test_problems_without_errors_are_not_counted_as_problems_with_small_ones(found):
    device = found.main
    without = {**device.rows[0], "test_data": "N1024", "part": "sweeps"}
    for key in ("error_e", "error_c", "rounding_e", "rounding_c"):
        del without[key]
    device.rows.append(without)
    assert "dE 1.9 to 1.9, dC 1.6 to 1.6 (1 problems)" in remake.errors_sentence(found)


def test_a_part_that_was_not_measured_says_so(found):
    page = "<!-- begin tails -->\n<!-- end tails -->\n"
    assert "Not measured yet." in fill(page, found)


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
def test_wrong_markers_are_named(page, message, found):
    with pytest.raises(ValueError, match=message):
        fill(page, found)


def test_a_measurement_without_a_device_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"x\.json must name environment\.device"):
        read_all(tmp_path)


def test_a_folder_of_a_device_is_newer_than_a_file_beside_it(tmp_path):
    (tmp_path / "gpu").mkdir()
    for path, milliseconds in ((tmp_path / "gpu.json", 30.0), (tmp_path / "gpu/table.json", 20.0)):
        content = {"environment": ENVIRONMENT, "rows": [row("cce", runtime_ms=milliseconds)]}
        path.write_text(json.dumps(content))
    (device,) = read_all(tmp_path)
    assert [found["runtime_ms"] for found in device.select(method="cce")] == [20.0]


def test_what_other_pages_show_is_not_among_the_commits(found):
    other = {"part": "distributed", "environment": {**ENVIRONMENT, "commit": "later"}}
    found.main.files["distributed_2.json"] = other
    assert "later" not in fill("<!-- begin where -->\n<!-- end where -->\n", found)
    assert found.main.all_of("distributed") == [other]


def test_rows_of_older_files_are_completed():
    old = {"test_data": "gemma2-structured", "kind": "loss-fw", "runtime_ms": 16.0}
    made = complete(old)
    assert made["classes"] == 256000
    assert made["tflops"] == pytest.approx(2 * 8192 * 256000 * 2304 / 16.0 / 1e9)


def test_ratios_to_a_product_of_odd_size_are_left_out():
    odd = row("cce", data="gpt2-structured", classes=50257)
    assert complete(odd)["gemms"] is None
    assert complete({**odd, "gemm_even": True})["gemms"] == 1.5
    assert complete(row("cce"))["gemms"] == 1.5


def test_a_picture_carries_the_hash_of_its_points(tmp_path):
    plot = Plot("dot", [1, 2], lambda points: figure()[0])
    assert digest_of(plot.save(tmp_path)) == plot.digest()
    assert Plot("dot", [1, 3], plot.draw).digest() != plot.digest()


def test_parts_of_the_suite_are_problems_that_the_tables_find(tmp_path):
    names = {}
    for part in PARTS:
        if not PARTS[part].command:
            names[part] = [task.name for task in tasks_of(part, tmp_path / "smollm2.pt", True)]
            assert len(set(names[part])) == len(names[part])
            assert set(PARTS[part].methods) <= set(ALL)
    assert names["table"] == ["gemma2-structured", "smollm2", "llama3-8b-structured"]
    rows = [row("cce", data=name, part=part, tokens=8192) for part in names for name in names[part]]
    contents = [
        {"part": part, "environment": ENVIRONMENT, "rows": [r for r in rows if r["part"] == part]}
        for part in names
    ]
    device = of_results(contents)
    assert "90% of the targets ignored" in evidence.options(device)
    assert "`e` needs no gradient" in evidence.options(device)
    assert evidence.sweep(device, "tokens").startswith("| N, µs a token")
    assert report.headline(device).count("\n") == 2 + 12


def test_wheels_are_unpacked_by_method(tmp_path):
    import zipfile

    for name in ("liger_kernel-0.1-py3-none-any.whl", "other-1-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("liger_kernel/__init__.py", "")
    peers = unpack(tmp_path, tmp_path / "out")
    assert list(peers) == ["liger"]
    assert (Path(peers["liger"]) / "liger_kernel" / "__init__.py").is_file()
