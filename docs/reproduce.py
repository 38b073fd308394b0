"""Tables, sweeps and plots of docs/results.md: `python -m docs.reproduce NAME`.

A comparison is rows x seeds. A row is a method, an ablation, or ACTUPose with one value of a setting. What is
missing is trained by train.py, what was interrupted goes on, and each finished run becomes a line of
docs/runs.jsonl. A run whose line is there is not trained again. `--tables` prints the tables that are marked
in README.md and docs/results.md from that file into them, and draws the plots, without training.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import actupose
import data
import kernels
import train
from train import UserError, fmt, make_settings, option_of, show

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "runs.jsonl"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")

# ACTUPose with one thing changed.
ABLATIONS = {
    "no-curriculum": dict(curriculum="off"),
    "curriculum-alone": dict(w_evalpose=0.0, w_cross=0.0),
    "hardest": dict(curriculum="hardest"),          # the samples of udape+vae-hm
    "static": dict(curriculum="static"),            # the same dose of hard poses, without order
    "no-eq4": dict(rescoring="off"),
    "full-eq4": dict(rescoring="full"),             # confidences of all samples, under the same weights
    "literal-eq4": dict(rescoring="literal"),
    "min-max": dict(scale="minmax"),
    "no-evalpose": dict(w_evalpose=0.0),
    "no-cross-domain": dict(w_cross=0.0),
    "centred-cross-domain": dict(centred=True),
    "literal-eq8": dict(map_sums=False),
    "literal-eq8-no-evalpose": dict(map_sums=False, w_evalpose=0.0),
    "literal-eq8-no-cross-domain": dict(map_sums=False, w_cross=0.0),
    "no-style": dict(style="off"),
    "no-occlusion": dict(occlusion=0.0),
}
# Tables of pairs of rows, for `--show`: the header, and {what both rows share: (first row, second row)}. The
# difference is the second minus the first.
PAIRS = {
    "gains": (["actupose against", "its PCK", "actupose's"], {
        "udape": ("udape", "actupose"),
        "udape+vae-hm": ("udape+vae-hm", "actupose"),
    }),
    "losses": (["source samples", "without Eq. 5 and 6", "with"], {
        "all": ("udape", "no-curriculum"),
        "the curriculum's": ("curriculum-alone", "actupose"),
        "the 8 hardest bins": ("udape+vae-hm", "hardest"),
    }),
    "order": (["lambda", "static: the same dose without order", "actupose: in order"], {
        "1": ("static pace=1", "actupose pace=1"),
        "2": ("static pace=2", "actupose pace=2"),
        "6": ("static", "actupose"),
    }),
    "arithmetic": (["method", "in bfloat16", "in float32"], {
        "udape": ("udape", "udape in float32"),
        "udape+vae-hm": ("udape+vae-hm", "udape+vae-hm in float32"),
        "actupose": ("actupose", "actupose in float32"),
    }),
}
# PoseDA has no public code: its figures in the paper's Tables 1 and 2.
QUOTED = {
    ("surreal", "lsp"): dict(shoulder=82.3, elbow=78.4, wrist=73.2, hip=74.8, knee=79.7, ankle=78.7,
                             all=77.9),
    ("surreal", "human36m"): dict(all=79.6),
}
POSEDA = "PoseDA (quoted from the paper)"
# What is said beside a row: by method and target.
REMARKS = {("oracle", "lsp"): " (trained on its test images, unless this is LSP Extended)"}
NOTHING = "(no finished run yet)"
# 97.5 % quantiles of Student's t for 3, 4, ... 10 seeds (NIST/SEMATECH e-Handbook, section 1.3.6.7.2).
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# --- Rows and comparisons -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a table."""
    name: str
    changes: dict       # settings, on top of the comparison's
    swept: str = ""     # in a sweep: the setting whose value is the row


class Comparison(NamedTuple):
    """Rows x seeds."""
    rows: tuple
    seeds: tuple = (0, 1, 2)
    given: dict = {}    # settings of all rows
    preset: str = "demo"


def is_sweep(comparison):
    """Whether all rows are values of settings."""
    return all(row.swept for row in comparison.rows)


def named_row(name):
    """The row of a method or an ablation. UserError for an unknown name."""
    if name in train.METHODS:
        return Row(name, dict(method=name))
    if name in ABLATIONS:
        return Row(name, ABLATIONS[name])
    raise UserError(f"--methods: use {' or '.join([*train.METHODS, *ABLATIONS])}, got {name}")


def named_rows(names):
    """Rows of methods and ablations, by names with commas between them."""
    return tuple(named_row(name) for name in names.split(","))


def sweep_rows(name, values):
    """A row of ACTUPose per value of a setting."""
    return tuple(Row(f"actupose {name}={show(value)}", {name: value}, name) for value in values)


SIX = named_rows("source-only,regda,udape,udape+vae-hm,actupose,oracle")
LOSSES = named_rows("udape,no-curriculum,curriculum-alone,actupose,udape+vae-hm,hardest")
WITH_TEACHER = named_rows("udape,udape+vae-hm,actupose")
ORDER = (*named_rows("udape,static,actupose"), *sweep_rows("pace", (1.0, 2.0)),
         Row("static pace=1", dict(curriculum="static", pace=1.0)),
         Row("static pace=2", dict(curriculum="static", pace=2.0)))
LONG = dict(iters_per_epoch=4 * train.Settings.iters_per_epoch)
EVERYDAY = dict(target="mannequin-everyday")
HANDS = dict(source="mannequin-hand")
FLOAT32 = dict(amp="off")    # runs on every processor; the other comparisons' kept runs are in bfloat16

# The comparisons of docs/results.md.
COMPARISONS = {
    "bodies": Comparison(SIX, (0, 1, 2, 3, 4)),
    "everyday": Comparison(SIX, given=EVERYDAY),
    "hands": Comparison(SIX, (0, 1, 2, 3, 4), HANDS),
    "ablations": Comparison(named_rows("actupose,no-curriculum,static,no-eq4,literal-eq4")),
    "parts": Comparison(named_rows("actupose,no-evalpose,no-cross-domain,centred-cross-domain,no-occlusion,"
                                   "no-style,full-eq4,min-max,literal-eq8,literal-eq8-no-evalpose,"
                                   "literal-eq8-no-cross-domain"), given=FLOAT32),
    "everyday-ablations": Comparison(
        named_rows("udape,actupose,no-curriculum,hardest") + sweep_rows("pace", (2.0,)), given=EVERYDAY),
    "float32": Comparison(WITH_TEACHER, given=FLOAT32),
    "everyday-float32": Comparison(WITH_TEACHER, given={**EVERYDAY, **FLOAT32}),
    "arithmetic": Comparison(WITH_TEACHER + tuple(
        Row(f"{row.name} in float32", {**row.changes, **FLOAT32}) for row in WITH_TEACHER)),
    "order": Comparison(ORDER),
    "losses": Comparison(LOSSES),
    "everyday-losses": Comparison(LOSSES, given=EVERYDAY),
    "hands-ablations": Comparison(named_rows("udape,actupose") + sweep_rows("pace", (2.0,)), given=HANDS),
    "pace-spread": Comparison(sweep_rows("pace", (1.0, 2.0, 3.0, 4.0, 6.0))
                              + sweep_rows("spread", (0.12, 0.18, 0.25, 0.5))),
    "long": Comparison(WITH_TEACHER, given=LONG),
    "long-float32": Comparison(WITH_TEACHER, given={**LONG, **FLOAT32}),
    "long-ends": Comparison(named_rows("source-only,udape,udape+vae-hm,actupose,oracle"), (0,), LONG),
    "long-everyday": Comparison(WITH_TEACHER, (0,), {**EVERYDAY, **LONG}),
    "long-hands": Comparison(WITH_TEACHER, (0,), {**HANDS, **LONG}),
    "long-ablations": Comparison(named_rows("actupose,static,no-evalpose,no-cross-domain"), (0,), LONG),
    "weights": Comparison(
        sweep_rows("bins", (5, 10, 25, 50, 100))
        + sweep_rows("w_evalpose", (0.01, 0.03, 0.1, 0.3, 1.0))
        + sweep_rows("w_cross", (0.001, 0.003, 0.01, 0.1, 1.0))
        + sweep_rows("gamma", (0.03, 0.04, 0.06, 0.09, 0.13)), (0,), FLOAT32),
    "photographs": Comparison(
        named_rows("source-only,udape,actupose"), (0,),
        dict(source="mannequin-wild", target="lsp", target_root="lspet", image_size=96)),
}


def run_settings(comparison, row, seed):
    """The Settings of one run."""
    return make_settings(comparison.preset, **run_options(comparison, row, seed))


def run_options(comparison, row, seed):
    """What train.py is given for one run: settings by name."""
    return {**comparison.given, **row.changes, "seed": seed}


# --- Kept runs: a line of JSON each -------------------------------------------------------------------------


def differences(settings):
    """The settings that differ from the demo's. Places are left out, of other paths the names are kept."""
    differing = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in train.CHANGEABLE or value == field.default:
            continue
        if field.name in train.PATHS:
            value = Path(value).name
        differing[field.name] = value
    return json.loads(json.dumps(differing))                    # tuples as lists, as in the file


@functools.cache
def demo_version():
    """A digest of the demo's settings and of the built-in benchmark. Lines with another one do not count.

    What is 0, off or empty is left out: a new setting that the demo does not use leaves the kept runs valid.
    """
    used = {name: value for name, value in dataclasses.asdict(train.Settings()).items() if value}
    version = repr((sorted(used.items()), data.RENDERER_VERSION, data.benchmark_tables()))
    return hashlib.sha256(version.encode()).hexdigest()[:12]


def read_kept(path):
    """The lines of a file of kept runs that are of this version of the demo: {key: line}."""
    return {key_of(line["settings"]): line for line in read_lines(path) if line["demo"] == demo_version()}


def read_lines(path):
    """All lines of a file of kept runs. UserError names one that is damaged."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(f"{path}: line {number} is damaged; remove it, and its run is trained "
                            "again") from None
    return lines


def key_of(differing):
    """Settings as they are looked up."""
    return json.dumps(differing, sort_keys=True)


def keep(path, settings, out, commit):
    """Write the finished run in `out` as a line of the file. commit: of the code that found it finished."""
    config = train.read_json(out / "config.json")
    speed = [json.loads(text) for text in (out / "speed.jsonl").read_text().splitlines()]
    seconds = {row["epoch"]: row["seconds"] for row in speed}   # of the last time that an epoch ran
    line = {"demo": demo_version(), "settings": differences(settings), "commit": commit,
            "processor": config["device"], "threads": config["threads"], "amp": config["amp"],
            "torch": config["torch"], "seconds": round(sum(seconds.values())),
            "result": train.read_json(out / "result.json")}
    kept = read_kept(path)
    kept[key_of(line["settings"])] = line
    others = [other for other in read_lines(path) if other["demo"] != demo_version()]
    train.write_lines(path, [kept[key] for key in sorted(kept)] + others)
    return line


# --- Running what is missing --------------------------------------------------------------------------------


def collect(comparison, kept_in):
    """Results of a comparison from a file of kept runs: {row name: [result per seed]}, without empty rows."""
    kept = read_kept(kept_in)
    results = {}
    for row in comparison.rows:
        found = []
        for seed in comparison.seeds:
            key = key_of(differences(run_settings(comparison, row, seed)))
            if key in kept:
                found.append(kept[key]["result"])
        if found:
            results[row.name] = found
    return results


def run_missing(comparison, kept_in, out, jobs, device):
    """Train what has no line yet, and keep it. Returns what failed.

    kept_in: file of kept runs; out: directory of new runs.
    """
    commit = present_commit()
    kept = read_kept(kept_in)
    commands = {}
    settings_of = {}
    found = []
    for row in comparison.rows:
        for seed in comparison.seeds:
            settings = run_settings(comparison, row, seed)
            run = run_directory(out, row, seed)
            key = key_of(differences(settings))
            if key in kept:
                found.append(kept[key])
                continue
            if settings in settings_of.values():
                continue
            if (run / "config.json").exists():
                train.check_same_settings(run, dataclasses.asdict(settings))
            if (run / "result.json").exists():
                kept[key] = keep(kept_in, settings, run, commit)
                found.append(kept[key])
                continue
            settings_of[run] = settings
            commands[run] = command_of(comparison, row, seed, run, device)
    check_arithmetic(settings_of.values(), found, train.choose_device(device))
    if commands:
        train.warn(f"runs to train, in {out}: {len(commands)}, {jobs} at a time", "docs.reproduce")
    return run_all(commands, jobs, lambda run: keep(kept_in, settings_of[run], run, commit))


def check_arithmetic(settings, lines, device):
    """UserError where a table would mix runs in bf16 and in float32.

    settings: of the runs to be trained; lines: the kept runs of the same table. --amp auto takes what the
    processor has; what a row asks for itself is not looked at.
    """
    theirs = {line["amp"] for line in lines if "amp" not in line["settings"]}
    for each in settings:
        ours = train.resolve_amp(each, device).amp
        if each.amp == "auto" and theirs and theirs != {ours}:
            in_words = {"off": "float32", "bf16": "bfloat16"}
            kept = " and ".join(in_words[amp] for amp in sorted(theirs))
            raise UserError(f"--amp: this machine would train in {in_words[ours]}, the table's kept runs are "
                            f"in {kept}; --out DIR trains all rows anew here, --no-training prints what "
                            "there is")


def present_commit():
    """The commit of the code, with -dirty where it was edited; "" where it is no clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                             # there is no git
        return ""


def run_directory(out, row, seed):
    """Where one run lies."""
    return out / f"{row.name.replace(' ', '-')}-s{show(seed)}"


def command_of(comparison, row, seed, run, device):
    """The command line of one run, which goes on where it was interrupted."""
    words = [sys.executable, str(ROOT / "train.py"), f"--preset={comparison.preset}", f"--device={device}",
             f"--out={run}"]
    for name, value in run_options(comparison, row, seed).items():
        words.append(f"{option_of(name)}={show(value)}")
    if (run / "config.json").exists():
        words.append("--resume")
    return words


def run_all(commands, jobs, finished):
    """Run {directory: command}, `jobs` at a time, their output to output.txt there. Returns what failed.

    finished: called with the directory of each run that ended well.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    progress = train.Progress("runs")
    waiting = list(commands)
    running = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.mkdir(parents=True, exist_ok=True)
                with open(run / "output.txt", "a") as output:
                    running[run] = subprocess.Popen(commands[run], env=environment, stdout=output,
                                                    stderr=output)
            time.sleep(0.5)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode == 0:
                    finished(run)
                else:
                    failed.append(f"{run}: exit status {process.returncode}, see {run / 'output.txt'}")
                progress(len(commands) - len(waiting) - len(running), len(commands), run.name)
    finally:
        for process in running.values():                        # after Ctrl-C
            process.terminate()
            process.wait()
    return failed


# --- Tables -------------------------------------------------------------------------------------------------


def average(values):
    """The mean of the values that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def deviation(values):
    """The sample deviation as text, where there are several values that are not None."""
    values = [value for value in values if value is not None]
    return f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""


def interval(differences):
    """The 95 % t-interval of the mean of n >= 3 differences as text: mean -+ t s / sqrt(n)."""
    n = len(differences)
    if n < 3:
        return ""
    t = T95[min(n, 10) - 3]                                     # beyond 10 seeds a little too wide
    half = t * np.std(differences, ddof=1) / math.sqrt(n)
    mean = average(differences)
    return f" [{mean - half:+.1f}, {mean + half:+.1f}]"


def by_seed(runs):
    """{seed: overall PCK} of the runs of a row, unlabelled test sets left out."""
    return {r["seed"]: r["pck"]["all"] for r in runs if r["pck"]["all"] is not None}


def markdown(rows):
    """Rows of cells, the header first, as a table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def comparison_table(results, ours="actupose", joints=True, val=False):
    """Table 1, of {row: [result, ...]}: means over seeds, overall PCK ± its sample deviation.

    joints: with a column per group of joints; val: with the validation PCK. Where source-only and oracle are
    there: the share of the gap between them that is closed, over the seeds that all three have. Where the row
    `ours` is there: the row minus `ours`, seed by seed (on the built-in benchmarks every seed has its own
    data): mean ± sample deviation of the differences, and the 95 % t-interval of their mean.
    """
    first = next(iter(results.values()))[0]
    groups = [group for group in first["pck"] if group != "all"] if joints else []
    gap = "source-only" in results and "oracle" in results
    header = ["method", "seeds", *groups, "all"]
    if val:
        header.append("val")
    header += ["teacher", "EvalPose"]
    if gap:
        header.append("gap closed")
    if ours in results:
        header.append(f"to {ours}")
    table = [header]
    for name, runs in results.items():
        own = by_seed(runs)
        cells = [name + REMARKS.get((name, first["target"]), ""), len(runs)]
        for group in groups:
            cells.append(fmt(average(r["pck"][group] for r in runs)))
        cells.append(f"**{fmt(average(own.values()))}**{deviation(own.values())}")
        if val:
            cells.append(fmt(average(r["val"] for r in runs)) + deviation(r["val"] for r in runs))
        cells.append(fmt(average(r["teacher"]["pck"]["all"] for r in runs if r["teacher"])))
        cells.append(fmt(average(r["evalpose"] for r in runs)))
        if gap:
            cells.append(gap_closed(own, by_seed(results["source-only"]), by_seed(results["oracle"])))
        if ours in results:
            cells.append(paired(own, by_seed(results[ours])) if runs != results[ours] else "-")
        table.append(cells)
    quoted = QUOTED.get((first["source"], first["target"]))
    if quoted:
        cells = [POSEDA, "-"]
        for group in (*groups, "all"):
            cells.append(fmt(quoted.get(group)))
        table.append(cells + ["-"] * (len(header) - len(cells)))
    return markdown(table)


def gap_closed(own, low, high):
    """The share of the way from source-only to the oracle, over the seeds that all have."""
    shared = [seed for seed in own if seed in low and seed in high]
    if not shared:
        return "-"
    start = average(low[seed] for seed in shared)
    end = average(high[seed] for seed in shared)
    if start == end:
        return "-"
    return f"{100 * (average(own[seed] for seed in shared) - start) / (end - start):.0f} %"


def paired(own, reference):
    """Differences to another row, seed by seed, where both have a score: mean ± sample deviation [95 %
    interval]."""
    differences = [own[seed] - reference[seed] for seed in own
                   if own[seed] is not None and reference.get(seed) is not None]
    if not differences:
        return "-"
    return f"{average(differences):+.1f}{deviation(differences)}{interval(differences)}"


def seeds_table(results, ours="actupose"):
    """Overall PCK seed by seed, and each row minus `ours`."""
    seeds = set()
    for runs in results.values():
        seeds.update(r["seed"] for r in runs)
    seeds = sorted(seeds)
    reference = by_seed(results.get(ours, []))
    table = [["method", *(f"seed {seed}" for seed in seeds)]]
    for name, runs in results.items():
        own = by_seed(runs)
        cells = [name]
        for seed in seeds:
            text = fmt(own.get(seed))
            if seed in own and seed in reference and name != ours:
                text += f" ({own[seed] - reference[seed]:+.1f})"
            cells.append(text)
        table.append(cells)
    return markdown(table)


def pairs_table(results, shown):
    """A table of `PAIRS`: PCK of both rows, and seed by seed the differences of PCK and EvalPose score."""
    header, pairs = PAIRS[shown]
    table = [[*header, "difference", "of EvalPose"]]
    for label, pair in pairs.items():
        if pair[0] not in results or pair[1] not in results:
            continue
        cells = [label]
        for name in pair:
            scores = by_seed(results[name]).values()
            cells.append(f"{fmt(average(scores))}{deviation(scores)} ({len(scores)})")
        first, second = (results[name] for name in pair)
        cells.append(paired(by_seed(second), by_seed(first)))
        evalpose = [{r["seed"]: r["evalpose"] for r in runs} for runs in (second, first)]
        cells.append(paired(*evalpose))
        table.append(cells)
    return markdown(table)


def sweeps_table(comparison, results):
    """Fig. 10 in a row per swept setting: its values, each with the PCK and, in brackets, that on validation.
    """
    cells_of = {}
    for row in comparison.rows:
        if row.swept and row.name in results:
            runs = results[row.name]
            pck = fmt(average(by_seed(runs).values()))
            val = fmt(average(r["val"] for r in runs))
            cells = cells_of.setdefault(row.swept, [])
            cells.append(f"{show(row.changes[row.swept])}: **{pck}** ({val})")
    width = max(map(len, cells_of.values()), default=1)
    table = [["setting", "value: PCK (validation)", *[""] * (width - 1)]]
    for name, cells in cells_of.items():
        table.append([option_of(name), *cells, *[""] * (width - len(cells))])
    return markdown(table)


def bin_ranges(runs, parts):
    """The complexity bins of these results in `parts` ranges of neighbours: {title: slice}."""
    edges = np.linspace(0, len(runs[0]["bins"]), parts + 1).round().astype(int)
    return {f"bins {start}-{end - 1}": slice(start, end) for start, end in zip(edges, edges[1:])}


def bins_table(results, parts=5):
    """PCK by complexity bin of the target's pose, means over seeds and of neighbouring bins."""
    ranges = bin_ranges(next(iter(results.values())), parts)
    table = [["method", *ranges]]
    for name, runs in results.items():
        cells = [name]
        for neighbours in ranges.values():
            values = []
            for r in runs:
                values += r["bins"][neighbours]
            cells.append(fmt(average(values)))
        table.append(cells)
    return markdown(table)


def gains_table(tasks, parts=5):
    """ACTUPose minus UDAPE by the complexity of the target's pose, of {title: {row: [result, ...]}}: means of
    neighbouring bins, seed by seed."""
    table = []
    for title, results in tasks.items():
        if "udape" not in results or "actupose" not in results:
            continue
        ranges = bin_ranges(results["udape"], parts)
        cells = [title]
        for neighbours in ranges.values():
            scores = []
            for name in ("actupose", "udape"):
                scores.append({r["seed"]: average(r["bins"][neighbours]) for r in results[name]})
            cells.append(paired(*scores))
        table.append(cells)
    return markdown([["actupose - udape", *ranges], *table]) if table else NOTHING


def tasks_table(tasks):
    """Table 2, of {title: {row: [result, ...]}}: overall PCK ± its sample deviation (number of seeds).

    mean: of the tasks' means, for a row that has them all.
    """
    names = {}                                                  # in the order of their first task
    for results in tasks.values():
        names.update(dict.fromkeys(results))
    table = [["method", *tasks, "mean"]]
    for name in (*names, POSEDA):
        cells = [name]
        means = []
        for results in tasks.values():
            first = next(iter(results.values()))[0]
            task = (first["source"], first["target"])
            if name == POSEDA:
                cells.append(fmt(QUOTED.get(task, {}).get("all")))
            elif name in results:
                scores = by_seed(results[name]).values()
                remark = REMARKS.get((name, first["target"]), "")
                cells.append(f"{fmt(average(scores))}{deviation(scores)} ({len(scores)}){remark}")
                if scores:
                    means.append(average(scores))
            else:
                cells.append("-")
        cells.append(fmt(average(means)) if len(means) == len(tasks) else "-")
        if set(cells[1:]) != {"-"}:
            table.append(cells)
    return markdown(table)


# --- Pictures -----------------------------------------------------------------------------------------------


def draw_sweep(path, name, rows, results):
    """Fig. 10: PCK over the values of a setting, a dot per seed, lines through the means.

    rows: those that have results.
    """
    rows = sorted(rows, key=lambda row: row.changes[name])
    series = {
        "validation": [[r["val"] for r in results[row.name]] for row in rows],
        "test": [[r["pck"]["all"] for r in results[row.name]] for row in rows],
    }
    every = np.concatenate([*series["validation"], *series["test"]]).astype(float)
    if np.isnan(every).any():                                   # without labels there is nothing to draw
        return
    help_text = train.Settings.__dataclass_fields__[name].metadata["help"]
    canvas, draw = train.blank(1800, 720)
    chart = train.Chart(draw, (110, 80, 1780, 600), (-0.6, len(rows) - 0.4),
                        (every.min() - 1, every.max() + 1), "PCK@0.05", f"{name}: {help_text}",
                        [show(row.changes[name]) for row in rows])
    for scores, colour in zip(series.values(), train.PALETTE):
        chart.line(range(len(rows)), [np.mean(seeds) for seeds in scores], colour)
        for at, seeds in enumerate(scores):
            for value in seeds:
                draw.circle(chart.place(at, value), 7, colour, train.WHITE)
    chart.legend(series)
    train.save_picture(canvas, path)


def draw_panel(path, runs, device):
    """Fig. 8: the first test images in rows; the ground truth and each method's prediction in columns.

    runs: {method: directory}. One without a readable last.pt is left out.
    """
    titles = []
    columns = []
    for name, run in runs.items():
        try:
            settings = train.saved_settings(run)
            checkpoint = train.load_run(run / "last.pt")
            if not columns:                                     # the data of all runs
                test = train.open_split(settings, "target", "test")
                shown = range(min(6, len(test)))
                titles.append("ground truth")
                columns.append([train.truth_panel("", test, i) for i in shown])
            trainer = train.make_trainer(settings, test.skeleton, device)
            train.load_networks(trainer, checkpoint, run / "last.pt")
        except (UserError, data.DataError) as error:
            train.warn(f"{error}; {path} is without {name}")
            continue
        keypoints, confidence = train.decode(trainer.student, test[torch.tensor(shown)][0], settings, device)
        titles.append(name)
        columns.append([train.prediction_panel(trainer, test, i, keypoints[i], confidence[i]) for i in shown])
    if columns:
        train.draw_panels(path, list(zip(*columns)), test.skeleton, titles)


# --- How difficult the benchmarks are -----------------------------------------------------------------------

DISTANCES = (0.01, 0.05, 0.1, 0.25, 0.5)   # quantiles of Eq. 7 between random poses


def difficulty_table():
    """Easy poses of both domains, complexity of the target's, Eq. 7 between random poses of the source."""
    tasks = {"bodies": ("target", False), "everyday": ("everyday", False), "hands": ("target", True)}
    columns = []
    for domain, hand in tasks.values():
        source = data.Mannequin("source", "train", count=6000, hand=hand)
        target = data.Mannequin(domain, "test", hand=hand)
        rows = source.skeleton.stand_in_rows
        vae = actupose.train_pose_vae(source.keypoints, source.visible, rows, train.Settings.vae_steps)
        complexity = actupose.pose_complexity(vae, source.keypoints, source.visible, rows)
        of_target = actupose.pose_complexity(vae, target.keypoints, target.visible, rows)
        chosen = torch.randperm(6000, generator=torch.Generator().manual_seed(0))[:4000]
        a, b = chosen.split(2000)
        distance = kernels.triplet_angle_distance(
            source.keypoints[a], source.keypoints[b], torch.tensor(source.skeleton.triplets),
            source.visible[a] > 0, source.visible[b] > 0).flatten()[::4]
        hardest = complexity.quantile(17 / 25)
        near = hard_neighbours(source, target, complexity >= hardest)
        fifths = near[of_target.argsort()].chunk(5)
        quantiles = distance.quantile(torch.tensor(DISTANCES)).tolist()
        columns.append({
            "easy poses in the source": percent(source.easy),
            "easy poses in the target": percent(target.easy),
            "target poses as complex as the hardest 8 of the source's 25 bins": percent(of_target >= hardest),
            "random source pairs below 0.06 rad": percent(distance < 0.06),
            "random source pairs below 0.019 rad": percent(distance < 0.019),
            "nearest source poses in the hardest 8 bins": percent(near),
            "the same, by fifths of the target's poses, simple to complex":
                ", ".join(f"{100 * fifth.mean():.0f}" for fifth in fifths) + " %",
            f"Eq. 7 between random source poses, quantiles {show(DISTANCES)}, rad":
                ", ".join(f"{value:.3f}" for value in quantiles),
        })
    table = [["", *tasks]]
    for label in columns[0]:
        table.append([label, *(column[label] for column in columns)])
    return markdown(table)


def percent(shares):
    """The mean of shares, or of what is true or false, as text."""
    return f"{100 * shares.float().mean():.1f} %"


def hard_neighbours(source, target, hard):
    """For each target pose: of the ten source poses nearest by Eq. 7, the share that is hard. (N,)

    hard: bool (M,), of the source's poses.
    """
    distance = kernels.triplet_angle_distance(
        target.keypoints, source.keypoints, torch.tensor(source.skeleton.triplets),
        target.visible > 0, source.visible > 0)
    nearest = distance.topk(10, largest=False).indices
    return hard[nearest].float().mean(1)


# --- Documents ----------------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- python -m docs\.reproduce (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text):
    """A document with every block between `<!-- python -m docs.reproduce ... -->` and `<!-- end -->` printed
    anew from the kept runs."""
    def printed(match):
        begin, words, _, end = match.groups()
        options = make_parser().parse_args(shlex.split(words))
        return f"{begin}{table_of(options)}\n{end}"

    return BLOCK.sub(printed, text)


def fill_documents():
    """`--tables`: the tables of the documents, and the plots beside them."""
    for path in DOCUMENTS:
        train.write_text(path, fill(path.read_text()))
    for comparison in COMPARISONS.values():
        if is_sweep(comparison):
            draw_sweeps(ROOT / "docs", comparison, collect(comparison, KEPT))


def draw_sweeps(folder, comparison, results):
    """sweep-NAME.png of each swept setting of which a comparison has several values."""
    for name in dict.fromkeys(row.swept for row in comparison.rows if row.swept):
        rows = [row for row in comparison.rows if row.swept == name and row.name in results]
        if len(rows) > 1:
            draw_sweep(folder / f"sweep-{name}.png", name, rows, results)


# --- Command line -------------------------------------------------------------------------------------------

HELP = f"""Tables, sweeps and plots, of the comparisons of docs/results.md or of your own.

  python -m docs.reproduce bodies                          train what docs/runs.jsonl lacks, print Table 1
  python -m docs.reproduce bodies --no-training            print what there is of it
  python -m docs.reproduce bodies --seeds 0 --out mine     train again what the table's seed 0 rests on
  python -m docs.reproduce --methods udape,actupose --out mine --lr 0.003
  python -m docs.reproduce --sweep pace=1,2,3,4,6 --out mine         Fig. 10 b
  python -m docs.reproduce --tasks bodies,hands,mine       Table 2
  python -m docs.reproduce --tables                        README.md and docs/results.md, without training
  python -m docs.reproduce --difficulty                    what the built-in benchmarks consist of

Pictures lie beside the new runs: panel.png (Fig. 8), bins.png (Fig. 9), sweep-NAME.png (Fig. 10). Finished
runs are reused, wherever their data lie: after editing code or changing data give a new --out.

names:     {', '.join(COMPARISONS)}
methods:   {', '.join(train.METHODS)}
ablations: {', '.join(ABLATIONS)} (ACTUPose with one thing changed)"""


def parse_sweep(text):
    """argparse's type of --sweep: NAME=V1,V2,... -> rows."""
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    kinds = {f.name: type(f.default) for f in dataclasses.fields(train.Settings)}
    if name == "seed" or kinds.get(name) not in (int, float, bool):
        raise argparse.ArgumentTypeError(f"{name!r} is no setting to sweep")
    convert = train.PARSERS.get(kinds[name], kinds[name])
    try:
        return sweep_rows(name, [convert(value) for value in values.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(f"use NAME=V1,V2,... with numbers, got {text!r}") from None


def parse_seeds(text):
    """argparse's type of --seeds: "0,1,2"."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"use whole numbers with commas, got {text!r}") from None


def make_parser():
    """The command line."""
    parser = train.Parser(prog="python -m docs.reproduce", description=HELP)
    add = parser.add_argument
    add("name", nargs="?", choices=COMPARISONS, metavar="NAME", help="a comparison of docs/results.md")
    add("--methods", help="rows: methods and ablations, with commas [all methods; with --sweep none]")
    add("--sweep", action="append", default=[], type=parse_sweep, metavar="NAME=V1,V2,...",
        help="a row of actupose per value of a setting, and a plot; can be given again")
    add("--seeds", type=parse_seeds, help="seeds of each row [0,1,2, or those of NAME]")
    add("--show", choices=("all", "short", "bins", "seeds", "sweeps", *PAIRS), default="all",
        help="all: every column; short: without joints; bins: PCK by complexity bin; seeds: seed by seed; "
        "sweeps: a row per swept setting; gains: actupose against others, also by EvalPose score; "
        "losses: what Eq. 5 and 6 bring; order: what the samples' order brings; arithmetic: bfloat16 "
        "against float32")
    add("--to", metavar="ROW", help="the row with which the others are compared [actupose]")
    add("--tasks", metavar="NAME,DIR,...", help="Table 2, of comparisons by name or directory; with --show "
        "bins actupose - udape by complexity bin")
    add("--difficulty", action="store_true", help="how difficult the built-in benchmarks are")
    add("--tables", action="store_true", help="print the tables of README.md and docs/results.md into them")
    add("--out", type=train.parse_path,
        help="directory of new runs and of their runs.jsonl [runs/NAME, docs/runs.jsonl]")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores [1]")
    add("--no-training", action="store_true", help="print and draw what is finished")
    add("--preset", choices=tuple(train.PRESETS), default="demo", help="values of options that are not given")
    parser.add_settings(skip=("method", "seed"))
    return parser


def comparison_of(options):
    """The comparison that the options ask for."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(train.Settings)
             if hasattr(options, f.name)}
    if options.name:
        comparison = COMPARISONS[options.name]
        if options.methods is not None or options.sweep:
            raise UserError(f"--methods, --sweep: {options.name} has its own rows; leave one of them out")
    else:
        rows = named_rows(options.methods) if options.methods is not None else ()
        for swept in options.sweep:
            rows += swept
        comparison = Comparison(rows or SIX)
    comparison = comparison._replace(given={**comparison.given, **given}, preset=options.preset)
    if options.seeds:
        comparison = comparison._replace(seeds=tuple(dict.fromkeys(options.seeds)))
    names = [row.name for row in comparison.rows]
    if options.to and options.to not in names:
        raise UserError(f"--to: use {' or '.join(names)}, got {options.to}")
    if options.show == "sweeps" and not any(row.swept for row in comparison.rows):
        raise UserError("--show sweeps: none of these rows sweeps a setting; add --sweep NAME=V1,V2")
    if options.show in PAIRS:
        pairs = PAIRS[options.show][1].values()
        if not any(set(pair) <= set(names) for pair in pairs):
            asked = ", or ".join(f"{first} and {second}" for first, second in pairs)
            raise UserError(f"--show {options.show}: needs the rows {asked}")
    return comparison


def our_row(comparison):
    """The row that is ACTUPose itself, with which the others are compared; "" where there is none."""
    try:
        ours = run_settings(comparison, named_row("actupose"), 0)
    except UserError:  # --epochs 20, say, is enough for the oracle alone
        return ""
    for row in comparison.rows:
        if run_settings(comparison, row, 0) == ours:
            return row.name
    return ""


def results_of(task):
    """Finished runs of a comparison by name, or of a directory: {row: [result, ...]}, of one task."""
    if task in COMPARISONS:
        return collect(COMPARISONS[task], KEPT)
    results = {}
    for name in (*train.METHODS, *ABLATIONS):
        paths = sorted(Path(task).expanduser().glob(f"{name}-s[0-9]*/result.json"))
        if paths:
            results[name] = [train.read_json(path) for path in paths]
    if not results:
        raise UserError(f"--tasks: {task} is neither a comparison ({', '.join(COMPARISONS)}) nor a "
                        "directory with finished runs")
    tasks = set()
    for runs in results.values():
        tasks.update((r["source"], r["target"]) for r in runs)
    if len(tasks) != 1:
        raise UserError(f"--tasks: {task} has finished runs of {len(tasks)} tasks; give directories of "
                        "one each")
    return results


def kept_file(options):
    """Where the runs that the options ask for are kept."""
    return KEPT if options.name and not options.out else options.out / "runs.jsonl"


def table_of(options):
    """The table that the options ask for, of finished runs."""
    if options.tasks:
        tasks = {task: results_of(task) for task in options.tasks.split(",")}
        finished = {task: results for task, results in tasks.items() if results}
        if options.show == "bins":
            return gains_table(finished)
        return tasks_table(finished) if finished else NOTHING
    comparison = comparison_of(options)
    results = collect(comparison, kept_file(options))
    if not results:
        return NOTHING
    ours = options.to or our_row(comparison)
    if options.show == "bins":
        return bins_table(results)
    if options.show == "sweeps":
        return sweeps_table(comparison, results)
    if options.show in PAIRS:
        return pairs_table(results, options.show)
    if options.show == "seeds":
        return seeds_table(results, ours)
    swept = any(row.swept for row in comparison.rows)
    return comparison_table(results, ours, joints=options.show == "all", val=swept)


def draw_pictures(out, comparison, results, device):
    """Fig. 8, 9 and 10 of a comparison, beside its runs."""
    draw_sweeps(out, comparison, results)
    if is_sweep(comparison) or len(results) < 2:
        return
    paper = ("udape", "udape+vae-hm", "actupose")               # the rows of the paper's Fig. 9
    shown = [name for name in paper if name in results]
    if len(shown) < 2:
        shown = results
    series = {name: np.array([r["bins"] for r in results[name]], float).mean(0) for name in shown}
    train.draw_bars(out / "bins.png", series, "PCK@0.05")
    runs = {}
    for row in comparison.rows:
        run = run_directory(out, row, comparison.seeds[0])
        if run.exists():
            runs[row.name] = run
    draw_panel(out / "panel.png", runs, train.choose_device(device))


def command(arguments):
    """What the command line asks for. Returns the exit status."""
    options = make_parser().parse_args(arguments)
    alone = {                                                   # each of them stands alone
        "--tables": options.tables,
        "--difficulty": options.difficulty,
        f"--tasks={options.tasks}": options.tasks,
    }
    for word, given in alone.items():
        words = [word, "--show=bins"] if options.tasks and options.show == "bins" else [word]
        if given and options != make_parser().parse_args(words):
            raise UserError(f"{word}: stands alone; leave the other options out")
    if options.tables:
        fill_documents()
        return 0
    if options.difficulty:
        train.say(difficulty_table())
        return 0
    if options.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, got {options.jobs}")
    if not options.name and not options.out and not options.tasks:
        raise UserError(f"give the NAME of a comparison ({', '.join(COMPARISONS)}), or the --out of your own")
    failed = []
    if not options.tasks:
        comparison = comparison_of(options)
        out = options.out or Path("runs") / options.name
        if not options.no_training:
            failed = run_missing(comparison, kept_file(options), out, options.jobs, options.device)
        draw_pictures(out, comparison, collect(comparison, kept_file(options)), options.device)
    train.say(table_of(options))
    if failed:
        raise UserError("; ".join(failed))
    return 0


def main(arguments):
    """The program. Returns the exit status."""
    return train.guarded(command, arguments, "docs.reproduce", "; the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
