"""The suite for a bare CUDA machine with tiny shapes on the CPU: the same code paths, whose figures mean nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.benchmarks import gpu_suite
from tandem.benchmarks.gpu import attention, correctness, decisions, engines
from tandem.benchmarks.gpu.goals import GOALS
from tandem.benchmarks.gpu.profile import covered
from tandem.benchmarks.gpu.rows import Absent, Report, Row, read_rows, table
from tandem.benchmarks.gpu.setting import Setting
from tandem.benchmarks.gpu.shapes import (
    BLOOM_7B1,
    LLAMA_3_8B,
    LLAMA_7B,
    TINY,
    config_of,
    kv_bytes,
    matrix_elements,
    prefill_flops,
    rewarding,
    step_bytes,
)
from tandem.benchmarks.gpu.timing import timing_of
from tandem.model.linear import linears
from tandem.model.load import random_model

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"
BARE = """
import sys
class Blocked:
    names = {"msgspec", "zmq", "typer", "rich", "llguidance", "fastapi", "pydantic", "uvicorn", "transformers"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not on a bare image")
sys.meta_path.insert(0, Blocked())
"""


def setting(path: Path) -> Setting:
    return Setting(torch.device("cpu"), path, tiny=True, ends=time.monotonic() + 60)


def measure(section: str, path: Path) -> dict[str, Row]:
    """The section's rows by name, all of them either measured or with the reason why not."""
    report = Report(section, path / f"{section}.rows", "cpu", tiny=True)
    import_module(f"tandem.benchmarks.gpu.{section}").run(setting(path), report)
    assert report.rows == read_rows(path / f"{section}.rows")
    rows = {row.name: row for row in report.rows}
    assert len(rows) == len(report.rows), "two rows of one name"
    for row in report.rows:
        assert row.verdict != "failed", row.reason
        assert (row.figure is not None and math.isfinite(row.figure)) or row.reason, row
        assert row.verdict == ("not judged" if row.goal or row.figure is None else ""), row
    return rows


def write_limits(path: Path) -> None:
    rows = [Row("limits", name, 1.0, "TB/s") for name in ("read", "copy", "float16", "bfloat16", "int8")]
    from dataclasses import asdict

    (path / "limits.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}))


# Sections -----------------------------------------------------------------------------------------------------------


def test_limits_are_found_by_the_other_sections(tmp_path: Path) -> None:
    assert math.isnan(setting(tmp_path).limits.read)
    assert {"read", "copy", "float16", "bfloat16"} <= measure("limits", tmp_path).keys()
    write_limits(tmp_path)
    limits = setting(tmp_path).limits
    assert limits.read == limits.peak(torch.int8) == 1e12


@pytest.mark.parametrize("section", ["kernels", "decode", "prefill", "throughput", "roles", "decisions"])
def test_a_section_measures_what_it_names(tmp_path: Path, section: str) -> None:
    write_limits(tmp_path)
    rows = measure(section, tmp_path)
    for row in rows.values():
        if row.limit is not None and row.share is not None and row.figure is not None:
            assert row.share == pytest.approx(row.limit / row.figure)


def test_scores_equal_those_of_transformers(tmp_path: Path) -> None:
    write_limits(tmp_path)
    rows = measure("scoring", tmp_path)
    differences = [row.detail["largest_difference"] for row in rows.values() if "largest_difference" in row.detail]
    assert len(differences) == 2 and max(differences) < 1e-5
    shared, unshared = (
        next(row for name, row in rows.items() if name.endswith(f", {kind}")) for kind in ("shared", "unshared")
    )
    assert shared.detail["flops"] < unshared.detail["flops"] / 2
    assert rows["scoring, shared against unshared"].figure == pytest.approx(unshared.figure / shared.figure)  # type: ignore[operator]


def test_greedy_text_and_test_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing, failing = tmp_path / "test_one.py", tmp_path / "test_two.py"
    passing.write_text(
        "import tandem.kernels.ops\nimport pytest\n\ndef test_a(): pass\n\n@pytest.mark.gpu\ndef test_b(): pass\n"
    )
    monkeypatch.setattr(correctness, "TESTS", (str(passing),))
    rows = measure("correctness", tmp_path)
    assert rows["failed test cases"].figure == 0 and rows["passed test cases"].figure == 1
    failing.write_text("def test_c():\n    assert 1 == 2\n")
    report = Report("correctness", None, "cuda")
    correctness.tests(setting(tmp_path), report, (str(passing), str(failing)))
    assert report.rows[0].figure == 1 and report.rows[0].verdict == "missed"
    assert "::test_c" in report.rows[0].detail["failed"][0]


def test_a_text_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = setting(tmp_path)
    twins = [random_model(config_of(TINY["llama GQA"]), dtype="float32", seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(correctness, "twins", lambda *given: (*twins, here))
    report = Report("correctness", None, "cuda")
    correctness.greedy(here, report, "text", {}, torch.float32, "greedy fp32")
    assert report.rows[0].verdict == "missed" and report.rows[0].detail["differ"] == report.rows[0].detail["texts"] == 6


def test_a_start_is_timed_from_the_process_on(tmp_path: Path) -> None:
    write_limits(tmp_path)
    rows = measure("start", tmp_path)
    detail = rows["tiny llama GQA bf16, start to first token"].detail
    assert 0 < detail["imported"] < detail["loaded"] < detail["first_token"] < detail["second_first_token"] < 30


def test_peers_that_are_missing_say_so(tmp_path: Path) -> None:
    rows = measure("peers", tmp_path)
    assert rows["vLLM"].reason == "absent: vllm is not installed"
    generated = rows["tiny llama GQA bf16, batch 1, transformers generate, dynamic cache"]
    assert generated.figure is not None and generated.figure > 0


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_runs_on_a_bare_image_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "out"
    command = [sys.executable, str(SUITE), "--out", str(out), "--device", "cpu", "--tiny", "--sections", "decisions"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    whole = json.loads((out / "gpu_suite.json").read_text())
    assert list(whole["sections"]) == ["limits", "decisions"]
    assert all(section["ended"] == "complete" for section in whole["sections"].values())
    assert {"machine", "versions", "commit", "command", "date"} <= whole.keys()
    assert "limits     bfloat16" in first.stdout and "not judged" in first.stdout
    stamps = [(out / f"{name}.json").stat().st_mtime_ns for name in ("limits", "decisions")]
    (out / "decisions.json").write_text((out / "decisions.json").read_text().replace('"complete"', '"stopped"'))
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "limits: at most" not in again.stdout and "decisions: at most" in again.stdout
    assert stamps[0] == (out / "limits.json").stat().st_mtime_ns


def test_a_section_that_hangs_or_breaks_ends_alone(tmp_path: Path) -> None:
    options = SimpleNamespace(out=tmp_path, device="cpu", tiny=True, fa3=None)
    began = time.monotonic()
    assert gpu_suite.run_section(options, "limits", 0.1) == "stopped at its limit of 0 s"  # type: ignore[arg-type]
    assert time.monotonic() - began < 10
    assert gpu_suite.run_section(options, "nothing", 60).startswith("failed with exit status 1")  # type: ignore[arg-type]
    assert read_rows(tmp_path / "nothing.rows")[0].verdict == "failed"


# Parts --------------------------------------------------------------------------------------------------------------


def test_goals_are_judged_on_cuda_only() -> None:
    for device, tiny, verdicts in (
        ("cuda", False, ["met", "missed", "met", "missed"]),
        ("cpu", False, ["not judged"] * 4),
    ):
        report = Report("decode", None, device, tiny)
        for figure in (0.35, 0.351):
            report.add("a", figure, "ms", goal="GPT-2 batch 1", share=0.0)
        for share in (0.85, 0.849):
            report.add("b", 9.0, "ms", goal="batch 1", share=share)
        assert [row.verdict for row in report.rows] == verdicts
    report = Report("decode", None, "cuda")
    assert report.add("c", float("nan"), goal="GPT-2 batch 1").verdict == "not judged"
    assert all(str(goal) for goal in GOALS.values())


def test_what_raises_becomes_a_row(tmp_path: Path) -> None:
    report = Report("kernels", tmp_path / "rows", "cuda")
    for error in (ValueError("no"), Absent("not here")):
        with report.case("one", "batch 1"):
            raise error
    assert [row.verdict for row in report.rows] == ["failed", "not judged"]
    assert "ValueError: no" in report.rows[0].reason and report.rows[1].reason == "absent: not here"
    with (tmp_path / "rows").open("a") as file:
        file.write('{"section": "kern')  # the process was killed while it wrote
    assert read_rows(tmp_path / "rows") == report.rows
    assert "ValueError: no" in table(report.rows)


def test_a_timing_is_its_median_and_the_middle_of_its_samples() -> None:
    timing = timing_of([float(n) for n in range(100, -1, -1)])
    assert (timing.median, timing.low, timing.high, timing.samples) == (50, 10, 90, 101)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("reward", [False, True])
def test_the_formulas_count_the_matrices_of_the_model(name: str, reward: bool) -> None:
    config = config_of(rewarding(TINY[name]) if reward else TINY[name])
    model = random_model(config, dtype="float32")
    assert matrix_elements(config) == sum(linear.weight.numel() for _, linear in linears(model.decoder))
    assert {name for name, _ in engines.named_tensors(model)}


def test_the_formulas_of_real_models() -> None:
    """LLaMA-7B reads 13.2 GB a token and keeps 512 KiB of K and V; Llama-3-8B 15.0 and 128, BLOOM-7B1 14.1 and 480."""
    for shape, gigabytes, cached in ((LLAMA_7B, 13.2, 2**19), (LLAMA_3_8B, 15.0, 2**17), (BLOOM_7B1, 14.1, 491520)):
        config = config_of(shape)
        assert step_bytes(config, 2, torch.float16, 0, 1) / 1e9 == pytest.approx(gigabytes, abs=0.05)
        assert kv_bytes(config, torch.bfloat16) == cached
    config = config_of(TINY["llama GQA"])
    pairs = sum(position + 1 for length in (5, 9) for position in range(3, length))
    expected = 2 * matrix_elements(config) * (2 + 6) + 4 * 2 * 4 * 16 * pairs
    assert prefill_flops(config, [5, 9], cached=3) == expected


def test_covered_time_is_counted_once() -> None:
    assert covered([(5, 7), (1, 3), (2, 4), (2.5, 2.6)]) == (6, 5)
    assert covered([]) == (0, 0)


def test_skipped_prompts_leave_decodes_that_compute(tmp_path: Path) -> None:
    model = random_model(config_of(TINY["llama GQA"]), dtype="float32")
    seen: list[int] = []
    forward = model.forward
    model.forward = lambda batch, cache: (seen.append(len(batch.token_ids)), forward(batch, cache))[1]  # type: ignore
    engines.skip_prompts(model)
    # Steps of 24 tokens: the first prompt is done two steps before the last, and its sequence is ahead of the others.
    # As on a GPU, where the host waits for no step: a CPU's decodes are replayed without the model.
    room = engines.room_for(20, 5)
    engine = engines.make_engine(setting(tmp_path), model, rows=3, context=room, batched=24, run_ahead=True)
    decoded = engines.decode(engine, 3, 20, 5)
    assert len(decoded.seconds) == 5 and seen and set(seen) <= {1, 2, 3} and seen[-5:] == [3] * 5
    assert 20 + engines.WARM + 2.5 <= decoded.context <= 20 + engines.WARM + 2.5 + 3
    assert not engine.has_work and engine.scheduler.pages.used == 0


def test_an_option_that_the_engine_lacks_is_absent(tmp_path: Path) -> None:
    model = random_model(config_of(TINY["llama GQA"]), dtype="float32")
    with pytest.raises(Absent, match="no option teleport"):
        engines.make_engine(setting(tmp_path), model, rows=1, context=8, teleport=True)


def test_a_peer_is_called_by_the_names_that_it_knows() -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    call = attention.by_schema(torch.ops.aten.add.Tensor)
    assert torch.equal(call({"self": a, "other": b, "unknown": 1}), (a + b)[0])


def test_outcomes_are_read_from_both_kinds_of_log() -> None:
    plain = (
        "tests/a.py::test_x[1] PASSED  [ 50%]\ntests/a.py::test_y FAILED [100%]\nFAILED tests/a.py::test_y - assert 0\n"
    )
    workers = "[gw0] [ 50%] PASSED tests/a.py::test_x[1] \n[gw1] [100%] FAILED tests/a.py::test_y \n"
    for log in (plain, workers):
        counts, failed = correctness.count(log)
        assert (counts["PASSED"], counts["FAILED"], failed) == (1, 1, ["tests/a.py::test_y"]), log


def test_the_best_size_is_named_and_a_wrong_result_is_no_candidate(tmp_path: Path) -> None:
    sizes: Any = ModuleType("sizes")
    sizes.size, sizes.wrong = 3, 0.0
    report = Report("decisions", None, "cuda")

    def make() -> decisions.Made:
        def call() -> torch.Tensor:
            time.sleep(0.002 * sizes.size)
            if sizes.size == 9:
                raise RuntimeError("out of resource")
            return torch.ones(4) + sizes.wrong

        return call, 1e-3

    candidates = {
        "1": {(sizes, "size"): 1},
        "9": {(sizes, "size"): 9},
        "0, wrong": {((sizes, "size"), (sizes, "wrong")): 0.5},
    }
    decisions.sweep(setting(tmp_path), report, "size", candidates, make)
    row = report.rows[0]
    assert row.detail["best"] == "1" and row.reason.startswith("1: ")
    assert set(row.detail["failed"]) == {"9", "0, wrong"} and sizes.size == 3
    assert set(row.detail["microseconds"]) == {"as it is", "1"}
