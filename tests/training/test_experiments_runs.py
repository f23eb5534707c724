"""Means over the seeds and machines of several records, by hand."""

import json
import shutil

import pandas as pd
import pytest

from docs import training_runs
from docs.make import ROOT

SOURCE = "earlier/pretrain_h200.json"
"""A record with four seeds of four methods."""


def run(loss, rare=None):
    last = {"held_out_loss": loss}
    if rare is not None:
        last |= {
            "rarest_tenth": {"loss": rare},
            "buckets": [
                {"from": 0, "below": 1, "loss": None},
                {"from": 1, "below": None, "loss": rare},
            ],
            "unseen_mass": 1e-3,
        }
    return {"judged": [{"held_out_loss": 99.0}, last]}


def frame(runs):
    """A table of runs as a record has it."""
    rows = [
        training_runs.figures({**each, "method": method, "seed": seed})
        for method, by_seed in runs.items()
        for seed, each in by_seed.items()
    ]
    return pd.DataFrame(rows)


def lines(records):
    """Cells of the table over records."""
    text = training_runs.paired_table([frame(runs) for runs in records])
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    return [rows[0], *rows[2:]]


RECORDS = [
    {"full": {0: run(3.0, 9.0), 1: run(4.0, 8.0)}, "cce": {0: run(3.1, 9.3), 1: run(4.3, 8.0)}},
    {
        "full": {2: run(5.0, 7.0)},
        "cce": {2: run(5.2, 7.3), 3: run(1.0, 1.0)},
        "alone": {3: run(1.0)},
    },
]


def test_pairs_are_of_one_seed_and_one_record():
    heads, cce = lines(RECORDS)  # "alone" has no pair
    found = dict(zip(heads, cce, strict=True))
    assert found["difference"] == "`cce` - `full`"
    assert found["pairs"] == "3"
    assert found["held-out loss"] == "+0.2000 ± 0.0577"  # of 0.1, 0.3, 0.2
    assert found["rarest tenth"] == "+0.2000 ± 0.1000"  # of 0.3, 0, 0.3
    assert found["seen never"] == "", "no target was one"
    assert found["probability on tokens never seen"] == "+0.0000 ± 0.0000"


def test_records_of_finetuning_have_one_number():
    records = [{"full": {0: run(2.0)}, "cce": {0: run(2.5)}}]
    assert lines(records) == [
        ["difference", "pairs", "held-out loss"],
        ["`cce` - `full`", "1", "+0.5000"],
    ]


def test_the_filter_is_compared_with_the_kernels_without_it():
    own = {"cce": {0: run(2.5), 1: run(2.0)}, "cce_exact": {0: run(2.25)}}
    records = [{"full": {0: run(2.0)}, **own}, {"full": {4: run(1.0)}}]
    assert lines(records)[1:] == [
        ["`cce` - `full`", "1", "+0.5000"],
        ["`cce_exact` - `full`", "1", "+0.2500"],
        ["`cce` - `cce_exact`", "1", "+0.2500"],
    ]


def test_means_are_over_the_same_seeds():
    """One run is not averaged with several of another method, nor does it reduce theirs."""
    runs = {"full": {0: run(3.0), 1: run(4.0)}, "cce": {0: run(3.5), 1: run(4.5), 2: run(9.0)}}
    with_single = {**runs, "rare": {1: run(8.0)}}
    for given in (runs, with_single):
        assert training_runs.shared_seeds(frame(given)) == {0, 1}
        assert len(training_runs.comparable(frame(given), "cce")) == 2
        assert "seeds 0, 1," in training_runs.seeds_sentence(frame(given))
    assert training_runs.comparable(frame(with_single), "rare").empty
    single = frame({"full": {0: run(3.0)}, "cce": {1: run(3.0)}})
    assert training_runs.shared_seeds(single) == set()
    assert training_runs.comparable(single, "cce")["seed"].tolist() == [1]


@pytest.fixture
def lenders(tmp_path):
    """A record of a newer commit with one seed of full logits, and the one that it is made of."""
    source = json.loads(
        (ROOT / "docs/measurements/experiments").joinpath(SOURCE).read_text(encoding="utf-8")
    )
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/pretrain_a.json").write_text(json.dumps(source))
    source["machine"] |= {"commit": "newer", "date": "2027-01-01"}
    runs = source["runs"]
    source["runs"] = [
        r for r in runs if r["method"] == "cce" or (r["method"], r["seed"]) == ("full", 0)
    ]
    for one in source["runs"]:
        one["judged"][-1]["held_out_loss"] += 1
    (tmp_path / "pretrain_b.json").write_text(json.dumps(source))
    return tmp_path


def test_runs_without_this_package_are_lent_to_newer_records(lenders):
    found = training_runs.read(lenders)
    (old,), (new,) = found["earlier/pretrain"], found["pretrain"]
    assert (old.name, old.image, old.lent) == ("earlier/pretrain_a", "earlier_pretrain_a", 0)
    lent = {("full", 1), ("full", 2), ("full", 3), *(("full_reordered", i) for i in range(4))}
    methods = zip(new.runs["method"][-7:], new.runs["seed"][-7:], strict=True)
    assert (new.lent, set(methods)) == (7, lent)
    assert new.lender is not None
    assert new.lender.name == "earlier/pretrain_a"
    assert f"From the record of commit {old.content['machine']['commit']}," in (
        training_runs.section("pretrain", found)
    )
    assert len(new.own) == 5
    before = training_runs.differences(old.runs, "cce")["held-out loss"]
    after = training_runs.differences(new.runs, "cce")["held-out loss"]
    assert (after - before).tolist() == pytest.approx([0, 1, 1, 1])  # its own run of seed 0
    text = training_runs.section("pretrain", found)
    assert "`full` of seeds 1, 2, 3; `full_reordered` of seeds 0, 1, 2, 3." in text
    assert "From the record of commit" not in training_runs.section("earlier/pretrain", found)


@pytest.mark.parametrize("part", ["data", "settings", "device"])
def test_runs_of_another_experiment_are_not_lent(lenders, part):
    path = lenders / "pretrain_b.json"
    content = json.loads(path.read_text())
    (content["machine"] if part == "device" else content[part])[part] = "another"
    path.write_text(json.dumps(content))
    (new,) = training_runs.read(lenders)["pretrain"]
    assert (new.lent, new.lender, len(new.runs)) == (0, None, 5)


def test_small_differences_keep_their_digits():
    assert training_runs.mean_and_error(pd.Series([-6e-4, -2e-4])) == "-4.0e-04 ± 2.0e-04"
    assert training_runs.mean_and_error(pd.Series([], dtype=float)) == ""


def test_only_records_of_the_same_settings_and_data_are_put_together(tmp_path):
    source = ROOT / "docs/measurements/experiments" / SOURCE
    one, two, other = (tmp_path / f"pretrain_{name}.json" for name in "abc")
    for path in (one, two):
        shutil.copy(source, path)
    content = json.loads(source.read_text(encoding="utf-8"))
    content["settings"]["steps"] = 7
    other.write_text(json.dumps(content), encoding="utf-8")
    records = {path: training_runs.load(path) for path in (one, two, other)}
    text, table = training_runs.all_together(list(records.values()))
    assert "(NVIDIA H200, NVIDIA H200)" in text
    pairs = 2 * sum(run["method"] == "cce" for run in content["runs"])
    assert f"| `cce` - `full` | {pairs} |" in table
    assert training_runs.all_together([records[one], records[other]]) == []
    other.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a record of an experiment"):
        training_runs.load(other)
