"""docs/reproduce.py: what is missing is trained, kept runs are reused, tables and statistics by hand."""
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from docs import reproduce
from tiny_runs import TINY, check_one_line, read, record

# --- Runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reproduce_into(launch, tmp_path, capsys, monkeypatch):
    """`docs.reproduce` with tiny runs into tmp_path -> its status, the rows of its table (cells), its stderr
    without the number of runs to train. Its processes run here, in turn.

    reproduce_into.started: the directory of each, and whether it goes on.
    """
    def process(command, **_):
        out = next(Path(word).name for word in command if word.startswith("--out="))
        started.append((out, "--resume" in command))
        status = train.main(command[2:])
        return Mock(returncode=status, poll=lambda: status)

    def reproduce_into(*options):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(reproduce, "subprocess", SimpleNamespace(Popen=process, run=subprocess.run))
            patch.setattr(reproduce, "time", Mock(time=time.time))
            words = [*TINY, "--cache", launch.cache, "--out", str(tmp_path), *options]
            status = reproduce.main(words)
        said = capsys.readouterr()
        errors = re.sub("docs.reproduce: runs to train, in .*: ([0-9]+), 1 at a time\n", "", said.err)
        rows = [line[2:-2].split(" | ") for line in said.out.splitlines() if line.startswith("| ")]
        return status, rows, errors

    started = []
    reproduce_into.started = started
    return reproduce_into


def test_what_is_missing_is_trained_and_kept(launch, reproduce_into, tmp_path, monkeypatch):
    """A finished run is kept as it is, an interrupted one goes on. Lines are reused without the directories;
    other settings train again."""
    options = ["--style", "off", "--epochs", "2", "--zoom", "0.6123456,1.3"]
    rows = ["--methods", "source-only,no-eq4", "--seeds", "0,1", *options]
    assert launch(tmp_path / "source-only-s0", "--method", "source-only", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_speed", Mock(side_effect=KeyboardInterrupt))      # after the first epoch
        assert launch(tmp_path / "no-eq4-s1", "--rescoring", "off", "--seed", 1, *options) == 130
    status, table, errors = reproduce_into(*rows)
    new = [("source-only-s1", False), ("no-eq4-s0", False), ("no-eq4-s1", True)]
    assert (status, errors) == (0, "") and reproduce_into.started == new
    results = [read(tmp_path / f"source-only-s{seed}" / "result.json") for seed in (0, 1)]
    first, second = [result["pck"]["all"] for result in results]
    assert [cells[:2] for cells in table[1:]] == [["source-only", "2"], ["no-eq4", "2"]]
    assert f"**{(first + second) / 2:.1f}** ± {abs(first - second) / math.sqrt(2):.1f}" in table[1]

    assert reproduce_into(*rows, "--seeds", "0,1,2", "--no-training") == (0, table, "")

    text = (tmp_path / "runs.jsonl").read_text()
    lines = read(tmp_path / "runs.jsonl")
    assert len(lines) == 4 and str(tmp_path.parent) not in text and launch.cache not in text
    kept = [line["result"] for line in lines if line["settings"].get("method") == "source-only"]
    assert sorted(kept, key=lambda result: result["seed"]) == results
    for line in lines:
        assert {"demo", "commit", "processor", "threads", "amp", "torch", "seconds"} <= line.keys()
        assert line["settings"]["zoom"] == [0.6123456, 1.3] and "cache" not in line["settings"]

    for run in tmp_path.glob("*-s[01]"):
        shutil.rmtree(run)
    assert reproduce_into(*rows) == (0, table, "") and reproduce_into.started == new
    one = ["--methods", "source-only", "--seeds", "0", *options]
    assert reproduce_into(*one, "--lr", "0.5")[0] == 0
    assert reproduce_into.started[3:] == [("source-only-s0", False)]
    assert len(read(tmp_path / "runs.jsonl")) == 5
    status, _, errors = reproduce_into(*one, "--lr", "0.25")            # its directory holds another run
    assert status == 2 and len(reproduce_into.started) == 4
    check_one_line(errors, "--lr: the run in ", "0.5, not 0.25")


def test_a_finished_run_serves_all_rows_with_its_settings(tmp_path, monkeypatch):
    """lambda = 6 and sigma = 0.25 are both the demo: nothing is left to train. Lines of another demo do not
    count, and are not lost."""
    rows = reproduce.sweep_rows("pace", (6.0,)) + reproduce.sweep_rows("spread", (0.25,))
    run = tmp_path / "actupose-pace=6-s0"
    run.mkdir()
    config = {**dataclasses.asdict(train.Settings(amp="off")), "device": "", "threads": 1, "torch": ""}
    train.write_json(run / "config.json", config)
    train.write_lines(run / "speed.jsonl", [dict(epoch=0, seconds=1.0)])
    train.write_json(run / "result.json", result(50.0, 0))
    trained = Mock(return_value=[])
    monkeypatch.setattr(reproduce, "run_all", trained)
    kept = tmp_path / "runs.jsonl"
    for demos in (["present"], ["another", "present"]):
        monkeypatch.setattr(reproduce, "demo_version", lambda demo=demos[0]: demo)
        assert reproduce.read_kept(kept) == {}
        reproduce.run_missing(reproduce.Comparison(rows, (0,)), kept, tmp_path, 1, "cpu")
        assert trained.call_args.args[0] == {} and [line["demo"] for line in read(kept)] == demos


def test_a_damaged_line_is_named(tmp_path):
    """As after two people's runs were merged."""
    kept = tmp_path / "runs.jsonl"
    kept.write_text('{"demo": "another"}\n<<<<<<< HEAD\n')
    with pytest.raises(train.UserError, match="runs.jsonl: line 2 is damaged"):
        reproduce.read_kept(kept)


def test_a_table_is_of_one_arithmetic(monkeypatch):
    """Runs in float32 are not trained into a table of runs in bfloat16, unless a row asks for it."""
    cpu = torch.device("cpu")
    off = dataclasses.replace(train.make_settings(), amp="off")
    monkeypatch.setattr(train, "resolve_amp", lambda settings, device: off)
    chosen = {"amp": "bf16", "settings": {"amp": "bf16"}}
    kept = {"amp": "bf16", "settings": {}}
    reproduce.check_arithmetic([train.make_settings()], [chosen, {**kept, "amp": "off"}], cpu)
    reproduce.check_arithmetic([train.make_settings(amp="off")], [kept], cpu)
    with pytest.raises(train.UserError, match="--amp: .* in float32, .* kept runs are in bfloat16; --out"):
        reproduce.check_arithmetic([train.make_settings()], [kept], cpu)


@pytest.mark.parametrize("name, default, same", [
    ("w_limb", 0.0, True), ("smooth", False, True), ("lr", 0.5, False)])
def test_what_makes_another_demo(name, default, same, monkeypatch):
    """Another default, or other figures; not a new setting that is off."""
    before = reproduce.demo_version.__wrapped__()
    fields = [(name, type(default), train.option(default, ""))]
    more = dataclasses.make_dataclass("More", fields, bases=(train.Settings,))
    monkeypatch.setattr(train, "Settings", more)
    assert (reproduce.demo_version.__wrapped__() == before) == same
    monkeypatch.setitem(reproduce.data.WILD, "noise", 0.9)
    assert reproduce.demo_version.__wrapped__() != before


def test_what_failed_is_named(reproduce_into, monkeypatch):
    """The other runs are trained, kept and printed."""
    monkeypatch.setattr(train.RegDATrainer, "step", Mock(side_effect=train.UserError("too hot")))
    status, rows, errors = reproduce_into("--methods", "regda,source-only", "--seeds", "0", "--epochs", "2")
    assert status == 2 and "regda-s0: exit status 2, see" in errors.splitlines()[-1]
    assert [name for name, _ in reproduce_into.started] == ["regda-s0", "source-only-s0"]
    assert [cells[0] for cells in rows[1:]] == ["source-only"]


def test_sweeps_and_the_panel(reproduce_into, tmp_path, monkeypatch):
    """Fig. 10: a row, run and point per value; the default's is ACTUPose itself, which the others are
    compared with, and is not trained twice. Fig. 8: test images by those whose last.pt is there."""
    one = ["--seeds", "0", "--style", "off"]
    status, rows, errors = reproduce_into(*one, "--sweep", "pace=1,6", "--sweep", "w-cross=0.01,0")
    assert (status, errors) == (0, "")
    values = ["pace=1", "pace=6", "w_cross=0.01", "w_cross=0"]
    assert [cells[0] for cells in rows[1:]] == [f"actupose {value}" for value in values]
    assert [out for out, _ in reproduce_into.started] == [
        "actupose-pace=1-s0", "actupose-pace=6-s0", "actupose-w_cross=0-s0"]
    assert rows[0][-1] == "to actupose pace=6"
    assert rows[1][-1] != "-" and rows[2][-1] == rows[3][-1] == "-"
    result = read(tmp_path / "actupose-pace=6-s0" / "result.json")
    at = rows[0].index("val")
    assert rows[2][at - 1:at + 1] == [f"**{result['pck']['all']:.1f}**", f"{result['val']:.1f}"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"sweep-pace.png", "sweep-w_cross.png"}

    panels = []
    record(monkeypatch, panels, train, "draw_panels")
    assert reproduce_into(*one, "--methods", "source-only,oracle", "--epochs", "1")[0] == 0
    _, (_, drawn, _, titles), _ = panels[-1]
    assert titles == ["ground truth", "source-only", "oracle"] and len(drawn) == 6
    assert all(len(row) == 3 and row[1].caption.startswith("PCK ") for row in drawn)
    assert Image.open(tmp_path / "panel.png").size == ((12 + 3 * 52) // 2, (44 + 8 + 6 * 92) // 2)
    (tmp_path / "source-only-s0" / "last.pt").unlink()
    status, _, errors = reproduce_into(*one, "--methods", "source-only,oracle", "--epochs", "1")
    assert status == 0 and "panel.png is without source-only" in errors
    assert panels[-1][1][3] == ["ground truth", "oracle"]


# --- Tables by hand -----------------------------------------------------------------------------------------


def result(value, seed, teacher=None, source="surreal", target="mannequin-wild"):
    """A result with this overall PCK; None: nothing is labelled."""
    made = dict(source=source, target=target, seed=seed, evalpose=50.0 + seed, teacher=None)
    if value is None:
        made.update(pck=dict.fromkeys(("elbow", "wrist", "all")), val=None, bins=[None] * 5)
    else:
        made.update(pck={"elbow": value - 1, "wrist": None, "all": value}, val=value + 2,
                    bins=[value] * 4 + [None])
    if teacher is not None:
        made["teacher"] = {"pck": {"all": teacher}}
    return made


ROWS = {
    "source-only": [result(30.0, 0), result(32.0, 1)],
    "oracle": [result(61.0, 0), result(61.0, 9)],
    "udape": [result(42.0, 0, 43.0), result(44.0, 1, 45.0)],
    "actupose": [result(47.0, 1), result(41.0, 0), result(90.0, 2)],
}


def table_lines(rows, *arguments, **options):
    """The comparison table of rows of ROWS, or of others, as lines."""
    if not isinstance(rows, dict):
        rows = {name: ROWS[name] for name in rows}
    return reproduce.comparison_table(rows, *arguments, **options).splitlines()


def test_means_deviations_and_the_gap():
    """The deviation of 42 and 44 is sqrt(2); on the one seed that all have, (42 - 30) / (61 - 30) of the gap
    are closed. Columns stand where there is something to say."""
    table = table_lines(["source-only", "oracle", "udape"])
    assert table[0] == "| method | seeds | elbow | wrist | all | teacher | EvalPose | gap closed |"
    assert table[4] == "| udape | 2 | 42.0 | - | **43.0** ± 1.4 | 44.0 | 50.5 | 39 % |"
    only = table_lines({"udape": ROWS["udape"][:1]})
    assert only[0].endswith("| EvalPose |") and only[2] == "| udape | 1 | 41.0 | - | **42.0** | 43.0 | 50.0 |"
    short = table_lines(["udape"], joints=False, val=True)
    assert short[2] == "| udape | 2 | **43.0** ± 1.4 | 45.0 ± 1.4 | 44.0 | 50.5 |"


def test_differences_are_paired_by_seed():
    """Seed 0: 42 - 41, seed 1: 44 - 47: mean -1, deviation 2.8. With seed 2, 95 - 90: mean 1, deviation 4,
    and the t-interval of three: 4.303 x 4 / sqrt(3) = 9.94 to both sides."""
    table = table_lines(ROWS)
    assert table[0].endswith("| gap closed | to actupose |") and table[4].endswith("| 39 % | -1.0 ± 2.8 |")
    assert table[5].startswith("| actupose | 3 |") and table[5].endswith("| - |")
    three = {**ROWS, "udape": [*ROWS["udape"], result(95.0, 2)]}
    assert table_lines(three)[4].endswith("| +1.0 ± 4.0 [-8.9, +10.9] |")
    assert reproduce.seeds_table(ROWS).splitlines()[4] == "| udape | 42.0 (+1.0) | 44.0 (-3.0) | - | - |"


def test_the_quantiles_of_students_t():
    """One-sided 2.5 % lie beyond each, by numerical integration of the density."""
    for n, quantile in enumerate(reproduce.T95, 3):
        x = np.linspace(quantile, 400, 400_000)
        density = (1 + x * x / (n - 1)) ** (-n / 2) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        area = (density[:-1] + density[1:]).sum() * (x[1] - x[0]) / 2
        assert area / math.sqrt(math.pi * (n - 1)) == pytest.approx(0.025, abs=3e-5)


def test_a_table_without_labels():
    """A cell without a value is a dash."""
    rows = dict.fromkeys(("oracle", "udape", "source-only", "actupose"), [result(None, 0), result(None, 1)])
    assert "| udape | 2 | - | - | **-** | - | - | 50.5 | - | - |" in table_lines(rows, val=True)
    assert reproduce.bins_table(rows).splitlines()[2] == "| oracle | - | - | - | - | - |"
    assert reproduce.gains_table({"lsp": rows}).splitlines()[2] == "| lsp | - | - | - | - | - |"


@pytest.mark.parametrize("target, quoted", [
    ("lsp", "78.4 | 73.2 | 77.9"), ("human36m", "- | - | 79.6"), ("h3d", None)])
def test_quoted_figures_and_remarks(target, quoted):
    """PoseDA's figures are the paper's, where it has some. The oracle on LSP has seen its test images."""
    table = table_lines({"oracle": [result(9.0, 0, target=target)]})
    assert ("trained on its test images" in table[2]) == (target == "lsp")
    assert table[3:] == ([f"| PoseDA (quoted from the paper) | - | {quoted} | - | - |"] if quoted else [])


def test_neighbouring_bins_are_averaged():
    rows = {"udape": [result(40.0, 0), result(50.0, 1)]}
    assert reproduce.bins_table(rows, 2).splitlines() == [
        "| method | bins 0-1 | bins 2-4 |", "|---|---|---|", "| udape | 45.0 | 45.0 |"]


def test_gains_by_bin_by_hand():
    """ACTUPose minus UDAPE, of the seeds that both have: (3 + 5) / 2 in the first bins, 0 in the others."""
    rows = {"udape": [result(40.0, 0), result(50.0, 1)], "actupose": [result(60.0, 1), result(41.0, 0)]}
    rows["actupose"][0]["bins"] = [53.0, 53.0, 50.0, 50.0, 50.0]
    rows["actupose"][1]["bins"] = [45.0, 45.0, 40.0, 40.0, 40.0]
    assert reproduce.gains_table({"bodies": rows, "hands": {"udape": rows["udape"]}}, 2).splitlines() == [
        "| actupose - udape | bins 0-1 | bins 2-4 |", "|---|---|---|",
        "| bodies | +4.0 ± 1.4 | +0.0 ± 0.0 |"]


def test_what_eq5_and_6_bring_by_hand():
    """Differences of the seeds that both have: +2 and +4. EvalPose scores are 50 + seed in both."""
    rows = {"udape": [result(40.0, 0), result(50.0, 1), result(99.0, 2)], "actupose": [result(60.0, 0)],
            "no-curriculum": [result(42.0, 0), result(54.0, 1)]}
    assert reproduce.pairs_table(rows, "losses").splitlines()[2:] == [
        "| all | 63.0 ± 31.6 (3) | 48.0 ± 8.5 (2) | +3.0 ± 1.4 | +0.0 ± 0.0 |"]


def test_sweeps_in_a_row_each():
    """The mean of seeds 40 and 50, validation in brackets. A row may lack runs, or sweep nothing."""
    comparison = reproduce.Comparison(reproduce.sweep_rows("pace", (1.0, 2.0, 3.0))
                                      + reproduce.sweep_rows("gamma", (0.5,)) + reproduce.named_rows("udape"))
    results = {"actupose pace=1": [result(40.0, 0), result(50.0, 1)], "actupose pace=3": [result(7.0, 0)],
               "actupose gamma=0.5": [result(9.0, 0)], "udape": [result(1.0, 0)]}
    assert reproduce.sweeps_table(comparison, results).splitlines() == [
        "| setting | value: PCK (validation) |  |", "|---|---|---|",
        "| --pace | 1: **45.0** (47.0) | 3: **7.0** (9.0) |", "| --gamma | 0.5: **9.0** (11.0) |  |"]


def test_tasks_side_by_side(tmp_path, capsys, monkeypatch):
    """Table 2 by hand: of finished runs alone; PoseDA's row is quoted where the paper has a figure."""
    def finish(folder, name, value, target, source="surreal"):
        (tmp_path / folder / name).mkdir(parents=True)
        content = dict(source=source, target=target, seed=int(name[-1]), pck={"all": value})
        (tmp_path / folder / name / "result.json").write_text(json.dumps(content))

    monkeypatch.chdir(tmp_path)
    for seed, value in enumerate((60.0, 62.0)):
        finish("a", f"actupose-s{seed}", value, "lsp")
        finish("a", f"actupose-spread=2-s{seed}", 99.0, "lsp")                         # a sweep is no method
    finish("a", "oracle-s0", 80.0, "lsp")
    finish("b", "actupose-s0", 50.0, "mannequin-wild", "mannequin")
    (tmp_path / "b" / "udape-s0").mkdir()                                            # not finished
    assert reproduce.main(["--tasks", "a,b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| method | a | b | mean |", "|---|---|---|---|",
        "| actupose | 61.0 ± 1.4 (2) | 50.0 (1) | 55.5 |",
        "| oracle | 80.0 (1) (trained on its test images, unless this is LSP Extended) | - | - |",
        "| PoseDA (quoted from the paper) | 77.9 | - | - |"]
    assert reproduce.main(["--tasks", "b"]) == 0
    assert "PoseDA" not in capsys.readouterr().out
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")                        # without ±
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", narrow)
        assert reproduce.main(["--tasks", "a"]) == 0
    assert narrow.buffer.getvalue().count(b"\n") == 5
    finish("b", "actupose-s1", 50.0, "lsp")
    assert reproduce.main(["--tasks", "b"]) == 2
    check_one_line(capsys.readouterr().err, "--tasks: b has finished runs of 2 tasks")


# --- Documents ----------------------------------------------------------------------------------------------


def test_blocks_of_a_document(tmp_path, monkeypatch):
    """Printed anew between their marks, from the kept lines; the text around them stays."""
    monkeypatch.setattr(reproduce, "KEPT", tmp_path / "runs.jsonl")
    settings = reproduce.run_settings(reproduce.COMPARISONS["bodies"], reproduce.named_row("udape"), 3)
    line = {"demo": reproduce.demo_version(), "settings": reproduce.differences(settings),
            "result": result(42.0, 3, 43.0)}
    old = dict(line, demo="older", settings={**line["settings"], "seed": 4}, result=result(1.0, 4))
    train.write_lines(tmp_path / "runs.jsonl", [line, old])
    begin = "<!-- python -m docs.reproduce bodies --show short -->"
    text = (f"Before.\n\n{begin}\nold\n<!-- end -->\n\n"
            "Between. <!-- python -m docs.reproduce hands -->\n<!-- end -->\n")
    filled = reproduce.fill(text)
    assert filled.startswith(f"Before.\n\n{begin}\n| method | seeds | all |")
    assert "| udape | 1 | **42.0** | 43.0 | 53.0 |\n<!-- end -->\n\nBetween. <!--" in filled
    assert filled.endswith("-->\n(no finished run yet)\n<!-- end -->\n") and "old" not in filled
    assert reproduce.fill(filled) == filled


def test_the_share_of_hard_poses_among_the_nearest():
    """Ten source poses bend the arm by about 85 degrees, ten by 15. Like poses are the nearest."""
    def poses(*degrees):
        bent = torch.tensor([[0.0, 0.0]] * 2 + [[1.0, 0.0]]).repeat(len(degrees), 1, 1)
        for pose, angle in zip(bent, torch.tensor(degrees).deg2rad()):
            pose[0] = torch.stack([angle.cos(), angle.sin()])
        return SimpleNamespace(keypoints=bent, visible=torch.ones(len(degrees), 3),
                               skeleton=SimpleNamespace(triplets=((0, 1, 2),)))

    source = poses(*range(81, 91), *range(11, 21))
    hard = torch.zeros(20, dtype=torch.bool)
    hard[:7] = True
    hard[10] = True
    assert reproduce.hard_neighbours(source, poses(80, 22), hard).tolist() == pytest.approx([0.7, 0.1])


def test_the_documents_hold_what_the_kept_runs_give():
    """README.md and docs/results.md as `--tables` prints them."""
    if reproduce.KEPT.exists() and not reproduce.read_kept(reproduce.KEPT):
        pytest.skip("the demo is no longer that of docs/runs.jsonl: run docs.reproduce again")
    for path in reproduce.DOCUMENTS:
        text = path.read_text()
        assert reproduce.fill(text) == text, path


@pytest.mark.parametrize("name", reproduce.COMPARISONS)
def test_named_comparisons_are_valid(name):
    """Every row's settings can be made, no two rows of a kind are the same, and no place decides a key."""
    comparison = reproduce.COMPARISONS[name]
    assert len({row.name for row in comparison.rows}) == len(comparison.rows)
    for seed in comparison.seeds:
        for row in comparison.rows:
            settings = reproduce.run_settings(comparison, row, seed)
            moved = dataclasses.replace(settings, cache="elsewhere", workers=3)
            assert reproduce.differences(moved) == reproduce.differences(settings)
    assert reproduce.our_row(comparison).startswith("actupose")


# "=>": what the answer says. Without it, it names the first option.
MISTAKES = """
bodie => bodies; --methods udap --out x => --methods: use; --seeds a --out x; --seeds nan --out x;
--jobs 0 --out x; bodies --to udap => --to: use source-only or;
bodies --show sweeps => --show sweeps: none; hands --show order => --show order: needs the rows static pace=1;
--tasks bodies --show seeds => --tasks;
--method udape => did you mean --methods?; --sweep pase=1 --out x => --sweep: 'pase' is no setting;
--sweep pace=1,x --out x => --sweep: use NAME=; --sweep seed=1 --out x => 'seed' is no setting;
--sweep pace --out x => --sweep; --sweep source=lsp --out x => 'source' is no setting;
--seeds -1 --out x => --seed; --sweep pace=0 --out x => --pace: must be above 0; --tasks a --lr 1 => --tasks;
--tasks no/run => --tasks: no/run is neither a comparison; bodies --tables => --tables;
bodies --methods udape => --methods; --lr 1 => --out; bodies --preset paper => --style-weights;
--methods udape --w-cross 1 --out x => --w-cross: --method udape has 0"""


@pytest.mark.parametrize("mistake", [" ".join(mistake.split()) for mistake in MISTAKES.split(";")])
def test_mistakes_are_answered_in_one_line(mistake, capsys, tmp_path, monkeypatch):
    """On stderr, naming the option; exit status 2; nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("runs were started"))
    arguments, _, text = mistake.partition(" => ")
    assert reproduce.main(arguments.split()) == 2
    said = capsys.readouterr()
    check_one_line(said.err, text or arguments.split()[0])
    assert not said.out and not list(tmp_path.iterdir())
