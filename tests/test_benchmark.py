"""`python -m kernels.benchmark`: its formulas, checks and tables. These tests judge no time."""
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import kernels
from kernels import benchmark, common, compiled
from tiny_runs import record

CUDA = torch.cuda.is_available()
SMALL = benchmark.Plan([((2, 3, 8, 8), torch.float32, "contiguous"),
                        ((2, 3, 8, 8), torch.bfloat16, "channels-last")],
                       [(32, 32, 16, 16, False), (64, 64, 14, 21, True)], seconds=0.01)
# Of `benchmark.CHECK` one shape with special values and one of poses: enough to find a wrong operator.
CHECK = benchmark.Plan([((5, 3, 37, 23), torch.float32, "contiguous")], [(33, 65, 16, 16, True)])
LIMITS = dict(read=1e10, write=5e9, fp32=1e11, launch_us="not measured")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """No interpreter, no compilers (seconds per row) and no large copies to measure limits by.

    Without a GPU also fewer and smaller cases: there the operators run their reference.
    """
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(compiled, "missing", lambda capability: "not in this test")
    monkeypatch.setattr(benchmark, "measure_limits", lambda clock: LIMITS)
    if not CUDA:
        monkeypatch.setattr(benchmark, "CHECK", CHECK)
        monkeypatch.setattr(benchmark, "QUICK", benchmark.TINY)


def test_formulas_against_hand_values():
    def work(*arguments):
        return tuple(benchmark.work(*arguments).values())
    paper = 32 * 16 * 64 * 64
    assert work("heatmap_argmax", benchmark.BODY, 4) == (4 * paper, 0, 0, 512) == (8388608, 0, 0, 512)
    # The maps are read twice and the gradient is written once; rectify draws in float32.
    assert work("soft_argmax_gradient", benchmark.BODY, 2) == (4 * paper, 2 * paper, 0, 512)
    assert work("rectify", benchmark.BODY, 2) == (2 * paper, 4 * paper, 0, 512)
    # 32 x 32 float32, or bool; a difference, a square and a sum per triplet of 16 and per pair.
    assert work("triplet_angle_distance", (32, 32, 16, 16)) == (0, 4096, 49152, 0.25)
    assert work("similar_mask", (32, 32, 16, 16)) == (0, 1024, 49152, 0.25)
    # Reading at 10 GB/s and writing at 5 GB/s; three operations take the time of four at 100 GFLOP/s.
    row = dict(read_bytes=2e7, written_bytes=1e7, operations=3e8)
    assert benchmark.limit_ms(row, LIMITS) == pytest.approx(4)
    assert benchmark.limit_ms(row | dict(operations=3e9), LIMITS) == pytest.approx(40)


def test_adverse_maps():
    """What the check runs on; NumPy decodes as the operator does; decoding that is wrong there is found."""
    inputs = benchmark.map_inputs((5, 3, 37, 23), torch.bfloat16, "channels-last", torch.Generator(), True)
    maps = inputs[0]
    right = kernels.heatmap_argmax
    assert maps[0, 0].isnan().sum() == 2 and (maps[1, 0] == -math.inf).all() and (maps[2, 0] == 0.5).all()
    assert maps[4, 0, -1, -1] == 30 and maps.stride(1) == 1 and not maps[1:].isnan().any()
    decoded = zip(benchmark.decode_on_host(maps), right(maps))
    assert all(np.array_equal(theirs, ours.numpy(), equal_nan=True) for theirs, ours in decoded)
    for wrong in maps.nan_to_num(0.0, neginf=-math.inf), maps.nan_to_num(math.nan, neginf=-9.0), maps.flip(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "heatmap_argmax", lambda _, wrong=wrong: right(wrong))
            assert benchmark.error_of("heatmap_argmax", inputs)[0] > 1


def test_every_operator(monkeypatch, capsys):
    """A run checks and times every operator and prints a table for each."""
    calls = []
    record(monkeypatch, calls, benchmark, "measure_row", "host_times")
    assert benchmark.main(["--seed", "3"], plan=SMALL) == 0
    printed = capsys.readouterr().out
    assert "| seed | 3 |" in printed and "| commit |" in printed
    rows = [arguments[0] for name, arguments, _ in calls if name == "measure_row"]
    hosts = [lines for name, _, lines in calls if name == "host_times"]
    names = ["training_step"]
    for name in benchmark.HEATMAP_OPERATORS | benchmark.POSE_OPERATORS:
        names += [name, name]                       # the two rows of SMALL
    assert sorted(row["operator"] for row in rows) == sorted(names)
    for row in rows:
        eager = row["providers"]["eager"]
        triton = row["providers"]["triton"]
        assert 0 < eager["share"]
        assert ({"torch.max", "NumPy"} <= set(row["providers"])) == (row["operator"] == "heatmap_argmax")
        times = {provider: cell["ms"] for provider, cell in row["providers"].items() if "ms" in cell}
        assert all(times[row["fastest"]] <= times[name] for name in ("triton", "eager") if name in times)
        assert row["fastest"] not in ("torch.max", "NumPy")   # which do not return all that the operator does
        if CUDA:
            assert triton["extra_bytes"] >= row["written_bytes"]
        else:
            assert triton == {"skipped": "not measured"} and row["speedup"] is None
    assert len(hosts) == 1 + common.HAVE_TRITON
    for table in hosts:
        assert {row["operator"] for row in table} == set(benchmark.OPERATORS)
    assert printed.startswith("No CUDA device: the Triton columns are not measured") == (not CUDA)
    assert all(f"## {name}\n" in printed for name in benchmark.OPERATORS)
    assert f"| eager: ms (% of limit), {'cold cache, GPU' if CUDA else 'warm cache, host'} time |" in printed


def test_shares_and_speedup_by_hand(monkeypatch):
    """3 ms for Triton, 6 for eager and 2 for torch.max, where the limit is 1.5. torch.max returns less than
    the operator does, so that it is not the fastest."""
    monkeypatch.setattr(common, "HAVE_TRITON", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    clock = Mock(cuda=True, measure=lambda call, timing: dict(ms=call()))
    row = dict(read_bytes=15e6, written_bytes=0, operations=0)
    calls = {"triton": lambda: 3.0, "eager": lambda: 6.0, "torch.max": lambda: 2.0}
    benchmark.measure_row(row, calls, clock, LIMITS)
    assert {name: cell["share"] for name, cell in row["providers"].items()} == pytest.approx(
        {"triton": 0.5, "eager": 0.25, "torch.max": 0.75})
    assert row["speedup"] == pytest.approx(2) and row["fastest"] == "triton"


def test_stand_in_launches_leave_nothing_behind(backend, monkeypatch):
    """With them the operators do not run their reference; afterwards they do what they did before."""
    if backend == "cuda" or not common.HAVE_TRITON:
        pytest.skip("stand-ins are for CPU tensors and Triton's kernels")
    inputs = benchmark.map_inputs((2, 3, 9, 7), torch.float32, "channels-last", torch.Generator())
    call = benchmark.call_of("heatmap_argmax_mean", kernels, inputs)
    with compiled.no_launches(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "max", lambda *arguments, **rest: pytest.fail("ran the reference"))
        call(), call()
    assert benchmark.error_of("heatmap_argmax_mean", inputs)[0] <= 1


@pytest.mark.skipif(not CUDA, reason="device memory needs a CUDA device")
def test_extra_bytes_of_a_call():
    """What a call allocates: its result."""
    clock = benchmark.Clock(torch.device("cuda", torch.cuda.current_device()), 0.05)
    for count in (1 << 20, 1 << 28):
        value = torch.ones(count, device="cuda")
        assert clock.measure(lambda value=value: value + 1, benchmark.COLD)["extra_bytes"] == 4 * count


@pytest.mark.parametrize("operator", benchmark.OPERATORS)
def test_a_wrong_operator_ends_the_run(operator, monkeypatch, capsys):
    """One line says which operator is wrong and with which seed, and nothing is timed."""
    name = operator.replace("similar_mask", "triplet_angle_distance").removesuffix("_gradient")
    name = name.replace("training_step", "heatmap_argmax_mean")
    right = getattr(kernels, name)

    def wrong(*arguments):
        result = right(*arguments)
        if operator == "soft_argmax_gradient":
            return 1.001 * result - 0.001 * result.detach()   # right values, wrong gradient
        if isinstance(result, tuple):
            return result[0] + 1e-2, *result[1:]
        return result + 1e-2

    monkeypatch.setattr(kernels, name, wrong)
    assert benchmark.main(["--only", operator, "--seed", "5"], plan=SMALL) == 1
    said = capsys.readouterr()
    assert operator + " is wrong for" in said.err and f"--only {operator} --seed 5" in said.err
    assert said.err.count("\n") == 1 and f"## {operator}" not in said.out


def test_what_cannot_be_measured_costs_one_cell(monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    assert benchmark.main(["--only", "heatmap_argmax"], plan=SMALL) == 0
    assert capsys.readouterr().out.count("| failed: No working C++ compiler found |") == 2
    row = dict(operator="triplet_angle_distance", operations=3 * 65536**2 * 16)
    assert benchmark.why_skipped(row, "eager", cuda=False) == "too much for a CPU"
    assert benchmark.why_skipped(row, "eager", cuda=True) is None
    assert benchmark.why_skipped(row, "triton", cuda=False) == "not measured"


@pytest.mark.parametrize("arguments, interpreted, said", [
    (["--only", "soft_argmin"], False, "invalid choice: 'soft_argmin'"),
    (["--qiuck"], False, "unrecognized arguments: --qiuck"),
    (["--quick"], True, "unset TRITON_INTERPRET")])
def test_mistakes_end_in_one_line(arguments, interpreted, said, monkeypatch, capsys):
    """Status 2, before anything is measured. So for the interpreter, whose times would say nothing."""
    monkeypatch.setattr(common, "INTERPRET", interpreted)
    monkeypatch.setattr(benchmark, "measure_limits", lambda clock: pytest.fail("measured something"))
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments, plan=SMALL)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error and error.count("\n") == 1


def test_instructions_are_counted_along_the_path_that_a_warp_takes():
    """A loop counts as often as it runs, a guarded exit does not end the path, a call is passed by."""
    texts = ["S2R R0, SR_TID.X", "@P0 EXIT", "@P4 BRA 0x50", "MOV R1, RZ", "BRA 0x80", "FADD R1, R1, R2",
             "BAR.SYNC 0x0", "@P1 BRA 0x50", "@P2 BRA 0xa0", "CALL.REL.NOINC 0xd0", "@P3 BRA 0xc0",
             "STG.E [R2.64], R1", "EXIT", "MUFU.RCP R1, R1"]
    code = [(0x10 * n, text) for n, text in enumerate(texts)]
    path = [text.split()[0] for text in compiled.executed(code, [3])]
    # @P4 leads to the loop, past what stands in for one of no trips; @P2 past the slow path of a division.
    assert path == ["S2R", "@P0", "@P4", *["FADD", "BAR.SYNC", "@P1"] * 3, "@P2", "@P3", "STG.E", "EXIT"]
    for trips in ([], [3, 2]):   # a loop more or less than in the kernel: another compiler unrolled one
        with pytest.raises(ValueError, match="loops than in the kernel"):
            compiled.executed(code, trips)
