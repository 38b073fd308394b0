"""`python -m kernels.benchmark`: its formulas, its checks and its files. These tests judge no time."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import benchmark, common

CUDA = torch.cuda.is_available()
SMALL = benchmark.Plan([((2, 3, 8, 8), torch.float32, "contiguous"),
                        ((2, 3, 8, 8), torch.bfloat16, "channels-last")],
                       [(32, False), (64, True)], seconds=0.01, patience=5.0)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """No interpreter, no compiler (seconds per row) and no large copies to measure limits by."""
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(benchmark, "measure_limits",
                        lambda clock: dict(copy_bytes_per_second=1e10, fp32_operations_per_second=1e11))


def test_formulas_against_hand_values():
    paper = 32 * 16 * 64 * 64
    assert benchmark.heatmap_work("heatmap_argmax", (32, 16, 64, 64), 4) == 4 * paper == 8388608
    assert benchmark.heatmap_work("soft_argmax", (32, 16, 64, 64), 2) == 2 * paper
    # The maps are read twice and the gradient is written once.
    assert benchmark.heatmap_work("soft_argmax_gradient", (32, 16, 64, 64), 2) == 3 * 2 * paper
    # 32 x 32 float32; a difference, a square and a sum per triplet of 16 and per pair.
    assert benchmark.pose_work("triplet_angle_distance", 32, 32, 16) == (4096, 49152)
    # One pair in a hundred is written, as two int64.
    assert benchmark.pose_work("similar_pairs", 1000, 500, 14) == (5000 * 16, 21_000_000)
    # Seconds become a median and quartiles in milliseconds.
    summary = benchmark.summary([0.003, 0.001, 0.002, 0.005, 0.004])
    assert summary["ms"] == pytest.approx(3) and summary["quartiles"] == pytest.approx([2, 4])
    assert summary["repetitions"] == 5


def test_one_pair_in_a_hundred_is_similar():
    poses = benchmark.random_poses(300, 400, 16, 16, torch.Generator().manual_seed(0))
    gamma = benchmark.similarity_threshold(poses)
    source, target, triplets, source_valid, target_valid, least = poses
    part = (kernels.triplet_angle_distance(*poses) < gamma).float().mean().item()
    assert part == pytest.approx(benchmark.SIMILAR, abs=2e-4)
    assert 0.85 < source_valid.float().mean() < 0.95 and least == benchmark.MIN_TRIPLETS
    assert (triplets.sort(dim=1).values.diff(dim=1) > 0).all()   # three different keypoints


def test_numpy_decoding_agrees_with_the_operator():
    """The "numpy" column of the table decodes as the operator does."""
    generator = torch.Generator().manual_seed(0)
    maps = benchmark.random_maps((2, 3, 7, 5), torch.bfloat16, "channels-last", generator)
    coords, confidence = benchmark.decode_on_host(maps)
    ours, value = kernels.heatmap_argmax(maps)
    assert (coords == ours.numpy()).all() and (confidence == value.numpy()).all()


def test_every_operator_with_json(tmp_path, capsys):
    """A run checks and times every operator, prints a table for each, and writes the figures."""
    file = tmp_path / "figures.json"
    assert benchmark.main(["--json", str(file), "--seed", "3"], plan=SMALL) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]            # no temporary file is left
    assert result["header"]["seed"] == 3 and result["header"]["copy_bytes_per_second"] == 1e10
    assert {check["operator"] for check in result["checks"]} == set(benchmark.OPERATORS)
    assert all(check["largest_error"] <= check["allowed"] for check in result["checks"])
    assert len(result["rows"]) == 3 * 2 + 2 * 2 * 2
    for row in result["rows"]:
        eager, triton = row["providers"]["eager"], row["providers"]["triton"]
        assert eager["quartiles"][0] <= eager["ms"] <= eager["quartiles"][1] and eager["repetitions"] >= 3
        seconds = eager["ms"] / 1000
        bound = max(row["useful_bytes"] / 1e10, row["operations"] / 1e11)
        assert eager["share"] == pytest.approx(bound / seconds)
        assert eager["gb_per_second"] == pytest.approx(row["useful_bytes"] / seconds / 1e9)
        assert ("numpy" in row["providers"]) == (row["operator"] == "heatmap_argmax")
        if not CUDA:
            assert triton == {"skipped": "not measured"} and row["speedup"] is None
        else:
            assert row["speedup"] == pytest.approx(eager["ms"] / triton["ms"])
            assert triton["extra_bytes"] >= row["output_bytes"] * (row["operator"] != "similar_pairs")
    assert {row["operator"] for row in result["dispatch"]} == set(benchmark.OPERATORS)
    assert all(row["ratio"] > 0 for row in result["dispatch"])
    assert printed.startswith("No CUDA device: the Triton column is not measured") == (not CUDA)
    assert all(f"## {title}\n" in printed for title in benchmark.TITLES.values())


@pytest.mark.skipif(not CUDA, reason="device times need a CUDA device")
def test_device_time_grows_with_the_work():
    clock = benchmark.Clock(torch.device("cuda", torch.cuda.current_device()), 0.05)
    small, large = (torch.ones(count, device="cuda") for count in (1 << 20, 1 << 28))
    first, second = (clock.measure(lambda value=value: value + 1) for value in (small, large))
    assert first["ms"] < second["ms"] and first["extra_bytes"] == 4 << 20 and second["extra_bytes"] == 4 << 28


@pytest.mark.parametrize("operator", benchmark.OPERATORS)
def test_a_wrong_operator_ends_the_run(operator, monkeypatch, capsys):
    """One line says which operator is wrong and with which seed, and nothing is timed."""
    name = "soft_argmax" if operator == "soft_argmax_gradient" else operator
    right = getattr(kernels, name)

    def wrong(*arguments):
        result = right(*arguments)
        if operator == "heatmap_argmax":
            return result[0].flip(2), result[1]   # (y, x)
        if operator == "soft_argmax_gradient":
            return 1.001 * result - 0.001 * result.detach()   # right values, wrong gradient
        return result[:-1] if operator == "similar_pairs" else result + 1e-3

    monkeypatch.setattr(kernels, name, wrong)
    assert benchmark.main(["--only", operator, "--seed", "5"], plan=SMALL) == 1
    said = capsys.readouterr()
    assert benchmark.TITLES[operator] + " is wrong for" in said.err and "--seed 5" in said.err
    assert said.err.count("\n") == 1 and "##" not in said.out


def test_cells_beyond_memory_or_patience_are_skipped(monkeypatch):
    row = dict(shape=[65536, 65536, 16, 16], output_bytes=4 * 65536**2, eager_bytes=10 * 65536**2 * 16)
    cpu = torch.device("cpu")
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 6e9)
    # (4 + 160) bytes per pair of 65536^2 are 704.4 GB.
    assert benchmark.why_skipped(row, "eager", cpu, 20.0, 0.0) == "needs 704 GB"
    assert benchmark.why_skipped(row, "triton", cpu, 20.0, 0.0) == "not measured"
    row = dict(shape=[1000, 1000, 16, 16], output_bytes=4, eager_bytes=4)
    assert benchmark.why_skipped(row, "eager", cpu, 20.0, 1e-5) is None   # 10 s
    assert benchmark.why_skipped(row, "eager", cpu, 2.0, 1e-5) == "about 10 s a call"


def test_a_compiler_that_fails_costs_one_cell(monkeypatch, tmp_path):
    def fails(*arguments):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    file = tmp_path / "figures.json"
    assert benchmark.main(["--only", "heatmap_argmax", "--json", str(file)], plan=SMALL) == 0
    cells = [row["providers"]["compile"] for row in json.loads(file.read_text())["rows"]]
    assert {cell["skipped"] for cell in cells} == {"failed: No working C++ compiler found"}


@pytest.mark.parametrize("arguments, said", [
    (["--json", "no/such/x.json"], "cannot write no/such/x.json: No such file or directory"),
    (["--json", "."], "cannot write .: it is a directory"),
    (["--only", "soft_argmin"], "invalid choice: 'soft_argmin'"),
    (["--jsno", "x.json"], "unrecognized arguments: --jsno")])
def test_mistakes_end_in_one_line_before_anything_is_measured(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure_limits", lambda clock: pytest.fail("measured something"))
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments, plan=SMALL)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.skipif(not common.HAVE_TRITON, reason="Triton is not installed")
def test_the_interpreter_is_refused():
    """Its times would say nothing: the command exits with status 2 and measures nothing."""
    command = [sys.executable, "-m", "kernels.benchmark", "--quick"]
    run = subprocess.run(command, text=True, capture_output=True,
                         cwd=Path(__file__).resolve().parents[1], env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 2 and "unset TRITON_INTERPRET" in run.stderr and run.stdout == ""
