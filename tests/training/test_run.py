"""A run describes itself, resumes as documented, and leaves its losses however it ends."""

import csv
import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import cut_cross_entropy
from training.arguments import build_parser
from training.checkpoint import list_checkpoints
from training.demo import build_parser as build_demo_parser
from training.train import main

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(
    r"step (\d+): loss [\d.]+, learning rate \S+, [\d.]+ s/step, [1-9]\d* tokens/s, "
    r"peak memory \d+\.\d\d GiB, epoch \d+\.\d\d, \d+:\d\d:\d\d left"
)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below ``folder`` with its time and content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "losses.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestHeader:
    def test_names_model_computation_data_and_steps(self, arguments, capsys, model_folder):
        assert main([*arguments, "--loss", "auto", "--eval-fraction", "0.1", "--no-export"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"model:  {model_folder}, LlamaForCausalLM, 26,784 parameters"
        assert lines[1] == "device: cpu, 1 process, dtype float32"
        assert lines[2].startswith("loss:   linear_cross_entropy, impl='auto' (here 'chunked')")
        assert lines[3].endswith("56 sequences, 896 tokens; held out: 6 sequences, 96 tokens")
        assert lines[4].startswith("steps:  10 of 8 sequences = 1.43 epochs, learning rate 0.01")

    def test_full_logits_and_a_stream(self, arguments, capsys):
        assert main([*arguments, "--loss", "full", "--streaming", "--steps", "1"]) == 0
        out = capsys.readouterr().out
        assert "loss:   full logits;" in out
        assert "read while training" in out
        assert "steps:  1 of 8 sequences, learning" in out

    def test_warm_up_that_never_ends_is_warned_of(self, arguments, capsys):
        assert main([*arguments, "--steps", "3", "--warmup-steps", "3", "--no-export"]) == 0
        assert (
            "train.py: warning: --warmup-steps 3 is not below the number of steps, 3: the "
            "learning rate never reaches 0.01" in capsys.readouterr().err
        )


class TestLines:
    def test_every_line_has_loss_speed_memory_and_time_left(self, arguments, capsys):
        assert main([*arguments, "--steps", "4", "--no-export"]) == 0
        out = capsys.readouterr().out
        assert [int(step) for step in LINE.findall(out)] == [1, 2, 3, 4]

    def test_nothing_else_is_printed(self, arguments, capfd):
        """Neither at the start nor at the end, not by libraries either."""
        common = [*arguments, "--warmup-steps", "0", "--eval-fraction", "0.1"]
        assert main([*common, "--steps", "2"]) == 0
        assert main([*common, "--steps", "3", "--resume"]) == 0
        captured = capfd.readouterr()
        assert captured.err == ""
        starts = (
            "model:",
            "device:",
            "loss:",
            "data:",
            "steps:",
            "step ",
            "model written",
            "resumed",
        )
        for line in captured.out.splitlines():
            assert line.startswith(starts), line

    def test_the_bar_has_the_loss_and_the_time_left(self, arguments, monkeypatch):
        import tqdm

        bars = []

        class Bar(tqdm.tqdm):
            def __init__(self, *rest, **options):
                super().__init__(*rest, **{**options, "file": io.StringIO(), "disable": False})
                bars.append(self)

            def close(self):
                self.last = str(self)
                super().close()

        monkeypatch.setattr(tqdm, "tqdm", Bar)
        monkeypatch.setattr(Bar, "write", staticmethod(lambda line: None))
        assert main([*arguments, "--steps", "3", "--no-export"]) == 0
        assert re.search(r"3/3 \[.*<.*loss=\d\.\d{4}\]", bars[0].last), bars[0].last

    def test_the_table_has_every_column(self, arguments, tmp_path):
        extra = ["--eval-fraction", "0.1", "--checkpoint-interval", "2", "--no-export"]
        assert main([*arguments, *extra, "--steps", "3"]) == 0
        rows = rows_of(tmp_path / "run")
        assert [row["step"] for row in rows] == ["1", "2", "3"]
        for row in rows:
            assert float(row["tokens_per_second"]) > 0
            assert float(row["peak_memory_mib"]) > 50
            assert float(row["epoch"]) == pytest.approx(int(row["step"]) / 7)
        assert [bool(row["eval_loss"]) for row in rows] == [False, True, True]

    def test_the_table_grows_with_every_line(self, arguments, tmp_path, monkeypatch):
        seen = []

        def spy(self, *rest, before=main.__globals__["Trainer"].training_step, **options):
            path = tmp_path / "run/losses.csv"
            seen.append(len(rows_of(path.parent)))
            return before(self, *rest, **options)

        monkeypatch.setattr("training.trainer.Trainer.training_step", spy)
        assert main([*arguments, "--steps", "4", "--no-export"]) == 0
        assert seen == [0, 1, 2, 3]


class TestNotFinite:
    def test_the_message_says_what_to_do_and_the_table_stays(self, arguments, tmp_path, capsys):
        changed = ["--learning-rate", "1e30", "--warmup-steps", "0", "--checkpoint-interval", "100"]
        assert main([*arguments, *changed]) == 1
        error = capsys.readouterr().err
        assert "lower --learning-rate" in error
        assert "--max-grad-norm" in error
        rows = rows_of(tmp_path / "run")
        assert float(rows[0]["loss"]) == pytest.approx(5.5, abs=0.5)
        assert not list_checkpoints(tmp_path / "run/checkpoints")


class TestResume:
    def test_a_finished_run_does_nothing(self, arguments, tmp_path, capsys):
        common = [*arguments, "--eval-fraction", "0.1"]
        assert main(common) == 0
        before = contents(tmp_path / "run")
        for flag in (["--resume"], ["--resume", "auto"]):
            capsys.readouterr()
            assert main([*common, *flag]) == 0
            assert capsys.readouterr().out == "step 10 is done already: nothing to do\n"
            assert contents(tmp_path / "run") == before

    def test_a_finished_run_that_lacks_its_model_gets_it(self, arguments, tmp_path):
        assert main([*arguments, "--steps", "2", "--no-export"]) == 0
        assert main([*arguments, "--steps", "2", "--resume"]) == 0
        saved, model = (tmp_path / "run" / name for name in ("checkpoints/checkpoint-2", "model"))
        name = "model.safetensors"
        assert (model / name).read_bytes() == (saved / name).read_bytes()

    def test_fewer_steps_than_are_done_are_refused(self, arguments, tmp_path, capsys):
        assert main([*arguments, "--steps", "3", "--no-export"]) == 0
        before = contents(tmp_path / "run")
        assert main([*arguments, "--steps", "2", "--resume"]) == 2
        assert "--steps 2 is below the 3 steps done in" in capsys.readouterr().err
        assert contents(tmp_path / "run") == before

    def test_auto_starts_or_goes_on(self, arguments, tmp_path, capsys):
        common = [*arguments, "--resume", "auto", "--no-export"]
        assert main([*common, "--steps", "2"]) == 0
        assert "resumed from" not in capsys.readouterr().out
        assert main([*common, "--steps", "4"]) == 0
        assert "resumed from" in capsys.readouterr().out
        assert [row["step"] for row in rows_of(tmp_path / "run")] == ["1", "2", "3", "4"]

    def test_intervals_may_change(self, arguments, tmp_path, capfd):
        common = [*arguments, "--eval-fraction", "0.1", "--no-export", "--keep-checkpoints", "9"]
        first = ["--steps", "4", "--log-interval", "4", "--checkpoint-interval", "4"]
        assert main([*common, *first]) == 0
        then = ["--steps", "10", "--log-interval", "2", "--checkpoint-interval", "3"]
        assert main([*common, *then, "--resume"]) == 0
        output = tmp_path / "run"
        rows = rows_of(output)
        # Each checkpoint comes with a line; the first and the last step have one in any case.
        assert [row["step"] for row in rows] == ["1", "4", "6", "8", "9", "10"]
        assert [row["step"] for row in rows if row["eval_loss"]] == ["4", "6", "9", "10"]
        names = [path.name for path in list_checkpoints(output / "checkpoints")]
        assert names == [f"checkpoint-{step}" for step in (4, 6, 9, 10)]
        captured = capfd.readouterr()
        assert "trainer_state.json" not in captured.out + captured.err

    def test_a_folder_without_a_manifest_is_not_resumed_from(self, arguments, tmp_path):
        assert main([*arguments, "--steps", "8", "--no-export"]) == 0
        (tmp_path / "run/checkpoints/checkpoint-8/manifest.json").unlink()
        assert main([*arguments, "--resume", "--no-export"]) == 0
        state = tmp_path / "run/checkpoints/checkpoint-10/trainer_state.json"
        assert json.loads(state.read_text())["global_step"] == 10
        assert [row["step"] for row in rows_of(tmp_path / "run")] == [str(i + 1) for i in range(10)]


class TestEpochs:
    @pytest.mark.parametrize(
        ("epochs", "extra", "steps"),
        [("2", [], 16), ("0.5", [], 4), ("1", ["--gradient-accumulation", "3"], 3)],
    )
    def test_become_steps(self, arguments, tmp_path, epochs, extra, steps):
        # 62 sequences in batches of 8.
        words = [word for word in arguments if word not in ("--steps", "10")]
        assert main([*words, "--epochs", epochs, *extra, "--no-export"]) == 0
        assert [row["step"] for row in rows_of(tmp_path / "run")][-1] == str(steps)
        assert main([*words, "--epochs", epochs, *extra, "--no-export", "--resume"]) == 0

    @pytest.mark.parametrize("steps", ["10", "100"], ids=["another", "the default"])
    def test_exclude_steps(self, capsys, steps):
        with pytest.raises(SystemExit, match="2"):
            main(["--steps", steps, "--epochs", "2"])
        assert "--epochs: not allowed with argument --steps" in capsys.readouterr().err

    def test_of_a_resumed_run_must_not_be_fewer(self, arguments, capsys):
        words = [word for word in arguments if word not in ("--steps", "10")]
        assert main([*words, "--epochs", "1", "--no-export"]) == 0
        assert main([*words, "--epochs", "0.5", "--no-export", "--resume"]) == 2
        assert "--epochs 0.5 (4 steps) is below the 8 steps" in capsys.readouterr().err


class TestCommandLine:
    @pytest.mark.parametrize("parser", [build_parser(), build_demo_parser()], ids=lambda p: p.prog)
    def test_version(self, parser, capsys):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args(["--version"])
        expected = f"{parser.prog} (cut-cross-entropy {cut_cross_entropy.__version__})\n"
        assert capsys.readouterr().out == expected

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--dtype", "bf16"], "did you mean bfloat16?"),
            (["--loss", "cee"], "did you mean cce?"),
            (["--larning-rate", "1"], "did you mean --learning-rate?"),
            (["--larning-rate=1"], "did you mean --learning-rate?"),
            (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
            (["--steps"], "argument --steps: expected one argument"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_errors_are_one_line_with_a_suggestion(self, words, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ")
        assert message in error
        assert error.count("\n") == 1

    def test_script_takes_epochs_instead_of_its_steps(self, tmp_path):
        """The shell script only chooses arguments: a stand-in for Python prints them."""
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\necho "$@"\n')
        python.chmod(0o755)
        said = [
            subprocess.run(
                [ROOT / "scripts/train.sh", *words],
                env={**os.environ, "PYTHON": str(python)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for words in (["--epochs", "3"], ["--output", "x"])
        ]
        assert "--steps" not in said[0]
        assert said[0].endswith("--epochs 3\n")
        assert "--steps 1000 " in said[1]
