"""python -m pytest -q compare/test_tables.py: seconds, no training."""

import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compare import four, logs, matrix, plot, regret, tables  # noqa: E402
from harness import screen  # noqa: E402

STUDIES = sorted(path.stem for path in logs.RECORDED.glob("*.jsonl"))


# --- What is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES)
def test_recorded_tables_are_made_from_the_recorded_rows_alone(study):
    """A table that was edited, or made by another tables.py."""
    assert tables.text(study) == (logs.RECORDED / f"{study}.md").read_text()


def test_the_readmes_print_the_recorded_tables():
    """A table in a README that is not the recorded one."""
    worn = logs.recorded("worn")
    study = logs.Study(worn)
    rows = regret.both(worn)
    lines = (ROOT / "README.md").read_text().splitlines()
    shown = lines[lines.index(rows[0]):]  # its table has fewer rows
    shown = shown[:shown.index("")]
    assert set(shown) <= set(rows)
    held = {regret.METHODS[name] for name in regret.CONSTANTS if name not in ("fixed-0.3", "fixed-0.4")}  # not in each setting
    assert {"AMFT", "mu = 0.5, graded demonstrations", *held} <= {row.split(" | ")[0].removeprefix("| ") for row in shown}
    readme = (ROOT / "compare" / "README.md").read_text()
    sections = (logs.RECORDED / "worn.md").read_text().split("\n## ")  # made of the rows, as tested above
    tabled = {section.partition("\n")[0]: [line for line in section.splitlines() if line.startswith("|")] for section in sections}
    for title in ("Regret", "Regret with the plain loss", "Few demonstrations", f"Mathematics again: seeds from {regret.AGAIN} on alone"):
        assert "\n".join(tabled[title]) in readme
    regrets = [row for row in tabled["Mathematics: regret with the plain loss"] if row.count("|") == 8]  # without the seeds' table
    assert "\n".join(regrets) in readme
    rows = tabled["Regret, whichever loss"]
    shown = readme[readme.index("### A loss between"):]
    shown = [line for line in shown[:shown.index("\n### ", 1)].splitlines() if line.startswith("|")]
    assert len(shown) == 14 and set(shown) <= set(rows) and shown == sorted(shown, key=rows.index)
    for group in (study, logs.Study(worn, "virl-vl"), logs.Study(worn, "virl")):
        assert "\n".join(tables.ends(group, group.names, "best")[1:]) in readme


def test_the_figures_keep_each_runs_own_points():
    """Points of one method under another's name; a front with what is below it."""
    study = logs.Study(logs.recorded("gp"))
    left = plot.pareto(study).axes[0]
    labels = left.get_legend_handles_labels()[1]
    means = {text: handle.get_offsets()[0] for handle, text in zip(left.collections[1::2], labels)}
    for name in ("amft", "rl", "luffy"):
        expected = [statistics.mean(study.ends(name, split)) for split in ("id", "ood_rule")]
        assert list(means[name]) == pytest.approx(expected)
    assert plot.front([(1, 3), (2, 2), (3, 1), (1, 1), (2, 1)]) == [(1, 3), (2, 2), (3, 1)]


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", tables.T95)
def test_student_t_leaves_a_fortieth_in_each_tail(seeds):
    """A quantile that is mistyped: the density is summed."""
    df, width = seeds - 1, 1e-3
    points = [width * (i + 0.5) for i in range(round(tables.T95[seeds] / width))]
    inside = width * sum((1 + x * x / df) ** (-(df + 1) / 2) for x in points)
    whole = math.sqrt(df * math.pi) * math.gamma(df / 2) / math.gamma((df + 1) / 2) / 2
    assert inside / whole == pytest.approx(0.95, abs=2e-4)


def test_interval_by_hand():
    """An interval of another width; one of a single seed."""
    assert tables.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / sqrt(3)
    assert tables.interval([3.0, 1.0]) == "2.0 (3.0, 1.0)" and tables.interval([1.0]) == "1.0" and tables.interval([]) == "-"
    assert tables.bold_interval([3.0, 2.9]) == "**3.0 (3.0, 2.9)**" and tables.bold_interval([3.0, 1.0]) == "2.0 (3.0, 1.0)"
    assert tables.interval([0.25], ".2f") == "0.25"


def test_interval_covers_19_of_20_times():
    """An interval that is too narrow for what it is called."""
    rng = random.Random(0)
    samples = [[rng.gauss(3, 2) for _ in range(5)] for _ in range(2000)]
    intervals = [tables.mean_and_half(values) for values in samples]
    covered = statistics.mean(abs(mean - 3) <= half for mean, half in intervals)
    assert 0.935 < covered < 0.965


@pytest.mark.parametrize("negative", range(11))
def test_sign_test_counts_sign_patterns(negative):
    """A one-sided p, or one that leaves out the pattern seen: all are counted."""
    patterns = itertools.product((-1, 1), repeat=10)
    as_uneven = sum(abs(sum(signs)) >= abs(10 - 2 * negative) for signs in patterns)
    values = [-1.0] * negative + [1.0] * (10 - negative)
    assert tables.sign_test(values) == pytest.approx(as_uneven / 1024)
    assert tables.sign_test([]) == 1


def recorded_ends(split):
    """{(run, seed): success at the end in percent}, from the file's lines."""
    lines = (logs.RECORDED / "gp.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    own = [row for row in rows if row["kind"] == "eval" and row["split"] == split]
    return {(row["run"], row["seed"]): 100 * row["success"] for row in own}


@pytest.mark.parametrize("name, split", [("rl", "id"), ("fixed-0.5", "val"), ("sft", "heldout")])
def test_paired_difference_read_off_the_rows(name, split):
    """Differences that are not of the same seed, or an interval that is not theirs."""
    last = recorded_ends(split)
    values = [last[name, seed] - last["amft", seed] for seed in range(10, 15)]
    mean = sum(values) / 5
    half = 2.776 * math.sqrt(sum((x - mean) ** 2 for x in values) / 4 / 5)
    shown = f"{mean:.1f} ± {half:.1f}"
    text = (logs.RECORDED / "gp.md").read_text()
    paired = text.split("Paired difference in success from amft")[1].splitlines()
    header, row = (next(line for line in paired if line.startswith(start)).split(" | ")
                   for start in ("| method", f"| {name} "))
    assert row[header.index(split)] == (f"**{shown}**" if abs(mean) > half else shown)


def test_base_interval_is_wilsons_at_some_effective_number():
    """An interval of the base that is no Wilson's, or counts more episodes than there are.

    Both ends are rates 1.96 of their own standard errors from what was seen, at one number."""
    for row in logs.Study(logs.recorded("gp")).base.values():
        ends = (row["low"], row["high"])
        number = [1.96 ** 2 * rate * (1 - rate) / (row["success"] - rate) ** 2 for rate in ends]
        assert number[0] == pytest.approx(number[1], rel=2e-3)
        assert number[0] < 1.01 * 4 * row["n"]  # of each, four samples


# --- Logs and layouts -----------------------------------------------------------------------------


def write_log(folder, rows, end="\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)


def evaluation(step, split="val", success=0.5, **more):
    return dict(kind="eval", step=step, split=split, n=100, success=success, low=success - 0.1,
                high=success + 0.1, outcomes=dict(wrong=1), **more)


def ended(success):
    """The rows of a finished run of two steps."""
    config = dict(kind="config", commit="0123456789abcdef", torch="2", steps=2)
    step = dict(kind="step", mu=0.25, entropy=None, success=1 / 3, meta_grad=-0.2, meta_se=0.1)
    return [
        config,
        evaluation(0, any=0.6, greedy=0.4),
        dict(step, step=1, rollouts=8),
        dict(step, step=2, rollouts=16),
        evaluation(2, success=success, any=0.75, greedy=0.5),
        dict(kind="final", step=2, rollouts=16, seconds=3)]


def study(tmp_path, spec, runs):
    """The folder of a study: {name-seed: rows}."""
    folder = tmp_path / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    spec = dict(dict(common="--task gp", seeds=[0, 1]), **spec)
    (folder / "spec.json").write_text(json.dumps(spec))
    for name, rows in runs.items():
        write_log(folder / name, rows)
    return folder


def lines_of(folder):
    """The table of a study, as text."""
    table = logs.collect(folder)
    return tables.plain([dict(table[0], study="toy"), *table[1:]])


def test_packing_keeps_finished_runs_and_what_is_read(tmp_path):
    """Unfinished runs, nulls, long floats or columns of no use in a table; half a line read."""
    runs = {"a-0": ended(2 / 3), "a-1": ended(0.5)[:-1], "gp/b-x-7": ended(0.5)}
    toy = study(tmp_path, dict(runs={"a": ""}), runs)
    write_log(tmp_path / "toy" / "a-2", ended(0.5), end='\n{"kind": "st')
    table = logs.collect(toy)
    found = {(row["run"], row["seed"]) for row in table[1:]}
    assert found == {("a", 0), ("a", 2), ("gp/b-x", 7)}
    step = next(row for row in table if row["kind"] == "step")
    assert step == dict(run="a", seed=0, kind="step", step=1, mu=0.25, rollouts=8,
                        success=0.333333, meta_grad=-0.2, meta_se=0.1)
    assert "outcomes" not in next(row for row in table if row["kind"] == "eval")
    logs.write(tmp_path / "toy.jsonl", table)
    lines = (tmp_path / "toy.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == table
    assert logs.Study(table, "gp").names == ["b-x"]
    assert logs.Study(table).groups == ["", "gp"]


def test_a_study_is_packed_and_unpacked_without_loss(tmp_path):
    """A run that changes on the way; one that is there already and is overwritten."""
    spec = dict(runs={"a": "", "b": ["", ""]}, search=dict(seed=9))
    toy = study(tmp_path, spec, {
        "a-0": ended(2 / 3), "a-1": ended(0.5)[:-1], "b-7": ended(0.5),
        "search/b.0-9": ended(0.5), "search/b.1-9": ended(0.5)})
    table = logs.collect(toy)
    other = tmp_path / "other" / "toy"
    logs.unpack(table, other)
    assert logs.collect(other) == table
    assert not (other / "a-1").exists()
    (toy / "a-0" / "metrics.jsonl").write_text("")
    logs.unpack(table, toy)
    left = {row["run"] for row in logs.collect(toy)[1:]}
    assert left == {"b", "search/b.0", "search/b.1"}


def test_the_command_line_packs_and_unpacks(tmp_path, monkeypatch, capsys):
    """A study that is unpacked where matrix.py does not look, or packed elsewhere than recorded/."""
    monkeypatch.setattr(logs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(logs, "RECORDED", tmp_path)
    toy = study(tmp_path / "own", dict(runs={"a": ""}), {"a-0": ended(0.5)})
    for action, path in (("pack", toy), ("unpack", tmp_path / "toy.jsonl")):
        monkeypatch.setattr(sys, "argv", ["logs.py", action, str(path)])
        logs.main()
    assert capsys.readouterr().out.count("1 runs in ") == 2
    assert logs.collect(tmp_path / "runs" / "toy") == logs.collect(toy)


def test_every_nth_step_is_kept_and_all_meta_gradients(tmp_path):
    """A look at validation prompts that is lost, or a table of every step."""
    rows = ended(0.5)
    steps = [dict(kind="step", step=i, mu=0.5, rollouts=i) for i in range(1, 12)]
    steps[6]["meta_own"] = 0.1
    rows[2:4] = steps
    table = logs.collect(study(tmp_path, dict(runs={"a": ""}, every=5), {"a-0": rows}))
    assert [row["step"] for row in table if row["kind"] == "step"] == [2, 5, 7, 10]  # after 2 there is an evaluation
    assert tables.deeds(logs.Study(table))  # what has no last ten steps has its last ten rows


def test_the_layout_of_a_new_study(tmp_path):
    """A measure, an interval, a goal, a sign or a trial that is not shown, or is wrong."""
    spec = dict(runs={"rl": "", "amft": ["", ""]}, search=dict(seed=9), reach=[0.6])
    toy = study(tmp_path, spec, {
        "rl-0": ended(0.7), "rl-1": ended(0.8), "amft-0": ended(0.5), "amft-1": ended(0.5),
        "search/amft.0-9": ended(0.4), "search/amft.1-9": ended(0.4)})
    text = "\n".join(lines_of(toy))
    for part in (
            "Success of sampled responses at the temperature of training:", "Solved by any", "Greedy success:",
            "| base | - | 50.0 [40, 60] |", "| base | - | 60.0 |", "| base | - | 40.0 |",
            "| rl | 2 | 75.0 (70.0, 80.0) |", "| rl | 25.0 (20.0, 30.0) |",
            "| rl | 2 (2 of 2) | 16 |", "| amft | - | - |",  # reach
            "| amft | 4 of 4 | 0.12 | -2.00 | 0 | 0 of 0 | 1 |",  # signs
            "**: 40.0**"):
        assert part in text
    trials = [row for row in logs.collect(toy)[1:] if row["run"].startswith("search/")]
    assert not any(row["kind"] == "step" for row in trials)


def test_a_study_at_the_best_temperature(tmp_path):
    """Success at temperature 1 in the place of the study's measure: in a table, a difference, the choice of a trial."""
    spec = dict(runs={"rl": "--lr 1", "amft": ["--lr 1", "--lr 2"]}, search=dict(seed=9), measure="best")

    def best(success, share):
        return [dict(row, best=[share, share - 0.1, share + 0.1], temperature=0.1) if row["kind"] == "eval" else row
                for row in ended(success)]
    toy = study(tmp_path, spec, {
        "rl-0": best(0.5, 0.7), "rl-1": best(0.5, 0.8), "amft-0": best(0.9, 0.6), "amft-1": best(0.9, 0.6),
        "search/amft.0-9": best(0.9, 0.2), "search/amft.1-9": best(0.1, 0.3)})
    text = "\n".join(lines_of(toy))
    table = text[text.index("own best temperature"):]
    assert "| rl | 2 | 75.0 (70.0, 80.0) |" in table and "| rl | 15.0 (10.0, 20.0) |" in text
    assert "**--lr 2: 30.0**" in text and "- amft: `--lr 2`" in text


def test_a_study_with_holes_has_its_tables(tmp_path):
    """A traceback, and no table at all, for one run that is gone from the spec, has other seeds, fewer splits or no search yet."""
    runs = {"amft": "--lr 1", "rl": ["--lr 2", "--lr 3"], "few": "--lr 4", "late": "--lr 5"}
    spec = dict(runs=runs, search=dict(seed=9), seeds=[0], reach=[0.6], every=10)
    made = {f"amft-{seed}": ended(0.5 + seed / 100) for seed in range(12)}
    made["amft-0"].insert(-1, evaluation(2, split="id", success=0.9, any=0.9, greedy=0.9))
    toy = study(tmp_path, spec, {**made, "gone-0": ended(0.7), "rl-0": ended(0.7), "late-40": ended(0.7),
                                 "search/rl.0-9": ended(0.4)})
    text = "\n".join(lines_of(toy))
    values = list(range(50, 62))
    half = 2.201 * statistics.stdev(values) / math.sqrt(12)  # t of 11 degrees
    for part in ("- gone: of an earlier spec", "- rl: its search is not done", "- late: `--lr 5`",
                 f"| amft | 12 | 55.5 ± {half:.1f} | 90.0 |", "| gone | 1 | 70.0 | - |", "| late | - | - |",
                 "| gone | 2 (1 of 1) | 16 |"):
        assert part in text, part
    with pytest.raises(ValueError, match="late, seed 40: has no evaluations of val around step 3"):
        logs.Study(logs.collect(toy)).at_step("late", 40, "val", 3)


def test_no_front_is_drawn_of_a_split_that_is_not_there(tmp_path):
    toy = study(tmp_path, dict(runs={"amft": ""}, pooled=dict(unseen=["val"])), {"amft-0": ended(0.5)})
    assert list(plot.figures(logs.Study(logs.collect(toy)))) == ["curves"]


def test_a_table_of_all_groups(tmp_path):
    """A group's success under another's name."""
    toy = study(tmp_path, dict(runs={"gp/rl": "", "virl/rl": "", "virl/amft": ""}), {
        "gp/rl-0": ended(0.7), "virl/rl-0": ended(0.3), "virl/amft-0": ended(0.4),
        "virl/amft-1": ended(0.4)})
    text = lines_of(toy)
    start = text.index("| group | split | base | rl | amft |") + 2
    assert text[start:start + 2] == [
        "| gp | val | 50.0 [40, 60] | 70.0 | - |",
        "| virl | val | 50.0 [40, 60] | 30.0 | 40.0 (40.0, 40.0) |"]
    assert "## gp" in text and "## virl" in text


def test_ablations_have_a_table_of_their_own(tmp_path):
    """An ablation among the methods, or another run's variant among the ablations."""
    runs = {"gp/amft": "", "gp/rl": "", "gp/cold": "@gp/amft --warmup 0", "gp/half": "@gp/rl --mu 1"}
    success = dict(amft=0.5, rl=0.6, cold=0.7, half=0.8)
    toy = study(tmp_path, dict(runs=runs), {
        f"gp/{name}-{seed}": ended(x) for seed in (0, 1) for name, x in success.items()})
    methods, own = "\n".join(lines_of(toy)).split("Ablations, ")
    assert "| half | 2 | 80.0" in methods and "| half | **30.0" in methods
    assert "cold |" not in methods
    assert "| cold | 2 | 70.0 (70.0, 70.0) |" in own and "| cold | **20.0 (20.0, 20.0)** |" in own
    assert "| half | 2 | 80.0" not in own


def run_of_four_steps(*success):
    rows = [dict(kind="config", commit="0", torch="2", steps=4)]
    for step, x in zip((0, 2, 4), success):
        rows += [evaluation(step, split, x) for split in ("val", "id")]
    return [*rows, dict(kind="final")]


def test_equal_seconds_cut_the_slower_short(tmp_path):
    """A method that is given more than the clock's seconds.

    By hand: 4 steps of 1.5 seconds are 6; at 2 seconds a step 3 steps, half way from the evaluation
    after 2, at 20%, to that after 4, at 60%."""
    spec = dict(runs=dict(rl="", sft="", slow=""), clock="rl", costs=dict(sft=1, rl=1.5, slow=2),
                pooled=dict(both=["val", "id"]))
    toy = study(tmp_path, spec, {
        "rl-0": run_of_four_steps(0.1, 0.3, 0.5),
        "sft-0": run_of_four_steps(0.1, 0.2, 0.3),
        "slow-0": run_of_four_steps(0.1, 0.2, 0.6)})
    assert tables.equal_seconds(logs.Study(logs.collect(toy)))[3:] == [
        "| sft | 1.00 | 4 | 30.0 | 30.0 | 30.0 |",
        "| rl | 1.50 | 4 | 50.0 | 50.0 | 50.0 |",
        "| slow | 2.00 | 3 | 40.0 | 40.0 | 40.0 |"]


def test_the_first_of_equal_trials_is_chosen(tmp_path):
    """A choice that depends on the order of files, or on the last."""
    spec = dict(runs={"gp/amft": ["--lr 1", "--lr 2", "--lr 3"]}, search=dict(seed=9))
    toy = study(tmp_path, spec, {
        f"search/gp/amft.{i}-9": ended(success) for i, success in enumerate((0.3, 0.6, 0.6))})
    assert logs.flags_of(logs.collect(toy), "gp/amft") == "--lr 2"


# --- Command lines --------------------------------------------------------------------------------


def test_differences_from_any_run_are_printed(monkeypatch, capsys):
    """A difference whose other way round is not its negative."""
    monkeypatch.setattr(sys, "argv", ["tables.py", "gp", "--against", "rl"])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| amft |"))
    assert "| -1.2 ± 3.7 | **8.4 ± 1.5** |" in row
    text = (logs.RECORDED / "gp.md").read_text()
    assert "| rl | 1.2 ± 3.7 | **-8.4 ± 1.5** |" in text


@pytest.mark.parametrize("words, says", [
    (["nonsense"], "those are gp, horizon, snr, tasks, worn"),
    (["gp", "--against", "nobody"], "must be one of amft, "),
    (["--against", "rl"], "name one study"),
    (["tasks", "--against", "rl"], "its groups: 'gp-1e-4', 'gp-vl', 'math', 'math-1e-4'"),
    (["snr", "--against", "rl"], "its groups: none")])
def test_what_is_not_recorded_is_refused_in_a_line(words, says, monkeypatch, capsys):
    """A traceback, or a table of something else."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    with pytest.raises(SystemExit) as refused:
        tables.main()
    assert refused.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words, says, runs", [
    (["--only", "nobody"], "they are rl", "runs"),
    (["--seeds", "3"], "the spec's, 0 1", "runs"),
    ([], "it needs", "run")])
def test_a_matrix_of_nothing_is_refused(words, says, runs, tmp_path, monkeypatch, capsys):
    """A spec or a choice of runs that is none, and yet leaves a folder."""
    monkeypatch.setattr(matrix, "RUNS", tmp_path / "runs")
    spec = dict(common="", seeds=[0, 1], **{runs: dict(rl="")})
    (tmp_path / "toy.json").write_text(json.dumps(spec))
    monkeypatch.setattr(sys, "argv", ["matrix.py", str(tmp_path / "toy.json"), *words])
    with pytest.raises(SystemExit) as refused:
        matrix.main()
    assert refused.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


QUIET = """
import sys
from compare import logs
with logs.quiet_pipe():
    print("much " * 100000)
    sys.exit("more")
"""


def test_a_list_that_nobody_reads_on_ends_quietly():
    """`matrix.py STUDY.json --list | head` with a traceback, or an exception at the interpreter's end."""
    child = subprocess.Popen([sys.executable, "-c", QUIET], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


@pytest.mark.parametrize("words", [["plot.py", "gp"], ["four.py"], ["four.py", "--recorded"]])
def test_without_matplotlib_a_figure_ends_in_one_line(words, tmp_path):
    """A traceback; or minutes of runs before it."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError")
    program = ROOT / "compare" / words[0]
    done = subprocess.run([sys.executable, program, *words[1:]], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"{words[0]}: {plot.NO_MATPLOTLIB}\n"


def test_the_curves_of_one_run_are_the_harnesses(tmp_path, monkeypatch, capsys):
    """plot.py of a run's folder that draws nothing, or cannot read its log."""
    write_log(tmp_path / "run", [*ended(0.5)])
    drawn = []
    monkeypatch.setattr(screen, "curves", lambda rows, path: drawn.append((rows, path)))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "run")])
    plot.main()
    (rows, path), = drawn
    assert rows == ended(0.5) and path == tmp_path / "run" / "curves.png"


# --- The matrix -----------------------------------------------------------------------------------

STUB = """
import json, pathlib, sys
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--resume" if "--resume" in flags else "--out") + 1])
out.mkdir(parents=True, exist_ok=True)
if "--fail" in flags:
    (out / "state.pt").write_text("")
    sys.exit(1)
lr = float(flags[flags.index("--lr") + 1]) if "--lr" in flags else 0.5
rows = [dict(kind="eval", step=1, split="val", n=1, success=lr, low=0, high=1),
        dict(kind="final", flags=flags)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(out / "state.pt").write_text("")
"""


def stub(tmp_path, monkeypatch, program):
    """Let matrix.py start this program, and write below tmp_path."""
    (tmp_path / "stub.py").write_text(program)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "RUNS", tmp_path / "runs" / "compare")
    monkeypatch.setattr(matrix, "PROGRAM", [sys.executable, "stub.py"])


@pytest.fixture
def toy_matrix(tmp_path, monkeypatch):
    """(run matrix.py with these flags, its folder, its spec's file and its runs)."""
    stub(tmp_path, monkeypatch, STUB)
    runs = {"gp/amft": ["--lr 0.1", "--lr 0.9"], "gp/cold": "@gp/amft --warmup 0", "bad": "--fail"}
    spec = dict(common="--task gp", seeds=[0, 1], search=dict(seed=9, flags="--eval-n 5"), runs=runs)
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(spec))

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["matrix.py", str(path), "--jobs", "2", *flags])
        matrix.main()
    return go, tmp_path / "runs" / "compare" / "toy", path, spec


def flags_by_run(folder):
    finals = [row for row in logs.collect(folder) if row["kind"] == "final"]
    return {(row["run"], row["seed"]): row["flags"][:-1] for row in finals}


def test_runs_have_seeds_of_their_own(toy_matrix, capsys):
    """A seed of another run, one that is missing, or a later pattern."""
    go, folder, path, spec = toy_matrix
    spec["runs"].pop("bad")
    spec["more"] = {"gp/c*": [2], "gp/*": [0, 3]}
    path.write_text(json.dumps(spec))
    go()
    assert set(flags_by_run(folder)) == {("search/gp/amft.0", 9), ("search/gp/amft.1", 9), ("gp/amft", 0),
                                         ("gp/amft", 3), ("gp/cold", 2)}
    capsys.readouterr()
    go("--seeds", "3", "--list")
    assert "1 runs, 0 to do" in capsys.readouterr().out


def test_a_matrix_is_searched_run_resumed_and_not_run_again(toy_matrix, capsys):
    """Flags that are not the spec's or the best trial's; a failure that is hidden; work done twice."""
    go, folder, _, _ = toy_matrix
    with pytest.raises(SystemExit, match="not all runs"):
        go()
    out = capsys.readouterr().out
    assert "2 runs, 2 to do" in out and "6 runs, 6 to do" in out and out.count("failed") == 2
    flags = flags_by_run(folder)
    first_trial = "--task gp --lr 0.1 --eval-n 5 --seed 9 --out"
    assert flags["search/gp/amft.0", 9] == first_trial.split()
    assert flags["gp/amft", 0] == "--task gp --lr 0.9 --seed 0 --out".split()
    assert flags["gp/cold", 1] == "--task gp --lr 0.9 --warmup 0 --seed 1 --out".split()
    assert not (folder / "gp" / "amft-0" / "state.pt").exists()
    go()  # the failed ones go on from their states
    capsys.readouterr()
    go("--list")
    assert "6 runs, 0 to do" in capsys.readouterr().out


def test_what_is_printed_of_a_run_is_what_the_search_judges_it_by(tmp_path):
    """Success at temperature 1 where the best rate by the study's measure is looked for."""
    write_log(tmp_path / "run", [dict(kind="eval", step=1, split="val", success=0.1, best=[0.25, 0.2, 0.3])])
    assert matrix.outcome(tmp_path / "run", 0, "best") == "val 0.250"
    assert matrix.outcome(tmp_path / "run", 0, "success") == "val 0.100"


def test_a_run_that_borrows_searched_flags_is_searched_first(toy_matrix):
    """A traceback, or a first trial's flags, where --only names a run whose flags are another's."""
    go, folder, _, _ = toy_matrix
    go("--only", "gp/cold")
    assert set(flags_by_run(folder)) == {("search/gp/amft.0", 9), ("search/gp/amft.1", 9), ("gp/cold", 0), ("gp/cold", 1)}


def test_an_unpacked_study_says_what_its_runs_were_started_with(toy_matrix, tmp_path):
    """A study that matrix.py cannot go on with."""
    go, folder, _, _ = toy_matrix
    with pytest.raises(SystemExit, match="not all runs"):
        go()
    go()
    other = tmp_path / "other"
    logs.unpack(logs.collect(folder), other)
    found = list(other.rglob("metrics.jsonl"))
    assert len(found) == 8
    for log in found:
        name = f"{log.parent.relative_to(other)}.txt"
        began, again = ((of / name).read_text().split("\n")[0] for of in (folder, other))
        assert began == again


def test_a_run_that_was_started_with_other_flags_is_refused(toy_matrix):
    """A study whose runs are of two specs."""
    go, _, path, spec = toy_matrix
    with pytest.raises(SystemExit, match="not all runs"):
        go()
    spec["runs"]["gp/cold"] = "--warmup 1"
    path.write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match="other flags"):
        go("--only", "gp/cold")


def test_a_list_names_commands_below_runs_compare(toy_matrix, capsys):
    """A study that writes into the folder of a run by amft.py, runs/gp."""
    go, folder, _, _ = toy_matrix
    with pytest.raises(SystemExit) as done:  # the search comes first
        go("--list")
    assert not done.value.code
    count, *commands = capsys.readouterr().out.splitlines()
    assert count == "2 runs, 2 to do" and len(commands) == 2
    assert commands[0].endswith("--seed 9 --out runs/compare/toy/search/gp/amft.0-9")
    assert [path.name for path in folder.iterdir()] == ["spec.json"]


FOUR = """
import json, pathlib, sys
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
out.mkdir(parents=True)
rows = [dict(kind="config", flags=flags), dict(kind="step", step=1, mu=0.5), dict(kind="final")] + [
    dict(kind="eval", step=t, split=split, n=9, success=t / 4, low=0, high=1, any=1, best=[t / 2, 0, 1])
    for t in (0, 1) for split in ("val", "id", "heldout", "ood_rule")]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


def test_one_seed_of_the_projects_figure_is_run_with_the_recorded_flags(tmp_path, monkeypatch,
                                                                       capsys):
    """A figure whose runs are not those of the study; one that is written where a run is."""
    stub(tmp_path, monkeypatch, FOUR)
    monkeypatch.setattr(four, "RUNS", tmp_path / "runs" / "compare")
    monkeypatch.setattr(sys, "argv", ["four.py", "--seed", "7"])
    four.main()
    out = capsys.readouterr().out
    n = len(four.METHODS)
    assert f"{n} runs, {n} to do" in out
    assert "| AMFT | 50.0 | 50.0 | 50.0 | 50.0 |" in out and "| base | 0.0 [0, 100] |" in out
    folder = tmp_path / "runs" / "compare" / "four-7"
    assert (folder / "four.png").exists()
    table = logs.recorded("worn")
    for name in four.METHODS:
        flags = " ".join(logs.read(folder / f"{name}-7")[0]["flags"])
        started = f"{table[0]['common']} {logs.flags_of(table, name)} --seed 7 --out "
        assert flags.startswith(started)


# --- Regret ---------------------------------------------------------------------------------------


def settings_of(outcome, seeds=(1, 2), settings=tuple(regret.SETTINGS), graded=()):
    """A table of runs: outcome(setting, method, seed) in percent, the same on both splits of the primary."""
    rows = []
    for setting in settings:
        for name in (*regret.METHODS, *graded):
            if name == "rl" and setting in regret.RL_OF or name in graded and "half" not in setting:
                continue
            run = f"{setting}/{name}".lstrip("/")
            for seed in seeds:
                value = outcome(setting, name, seed) / 100
                rows += [dict(run=run, seed=seed, kind="eval", split=split, step=9, best=[value, 0, 1])
                         for split in ("id", "heldout")]
                rows.append(dict(run=run, seed=seed, kind="step", step=40, success=value, mu=0.5))
    return [dict(runs={}, measure="best", pooled=dict(primary=["id", "heldout"])), *rows]


def test_regret_by_hand():
    """One that is taken from another setting's best, of the mean outcome, or from a single seed's luck."""
    means = {"a": dict(x=10.0, y=12.0, z=3.0, once=99.0), "b": dict(x=8.0, y=1.0, z=9.0, once=99.0)}
    found = {setting: dict(x=[0, 0], y=[0, 0], z=[0, 0, 0], once=[0]) for setting in means}
    assert regret.regrets(means, ["x", "z"], found) == dict(x=[2.0, 1.0], z=[9.0, 0.0])


def test_what_a_race_would_choose():
    """A choice by success at the end, by steps outside of the heats' last twenty, of another seed, or counted as a run."""
    table = settings_of(lambda setting, name, seed: {"fixed-0.1": 30, "fixed-0.5": 20, "fixed-0.9": 10}.get(name, 5) + seed)
    for row in table[1:]:
        if row["kind"] == "step":  # seed 1: 0.9 leads in its heat, seed 2: 0.5 does, and 0.1 only before and after
            row["success"] = {("fixed-0.9", 1): 0.9, ("fixed-0.5", 2): 0.9}.get((row["run"].rpartition("/")[2], row["seed"]), 0.2)
    table += [dict(run="fixed-0.1", seed=seed, kind="step", step=step, success=1.0) for seed in (1, 2) for step in (30, 51)]
    found = regret.outcomes(table)
    assert found[""]["choice"] == found["weak"]["choice"] == [11.0, 22.0]
    assert "choice" not in regret.runs_of(found[""]) and "choice" in regret.everywhere(found)
    best = regret.regrets(regret.averages(found), ["choice", "fixed-0.1"], {
        setting: dict(own, choice=[99.0, 99.0]) for setting, own in found.items()})
    assert best == {"choice": [15.0] * 4, "fixed-0.1": [0.0] * 4}
    without = [row for row in table if (row.get("run"), row.get("seed")) != ("half/fixed-0.9", 1)]
    assert regret.outcomes(without)["half"]["choice"] == [22.0]


def test_graded_demonstrations_are_the_ungraded_run_or_rls():
    """A stand-in of another setting, loss or method, drawn anew, or one that sets the best or its deviation."""
    def outcome(setting, name, seed):
        return 10 * everything.index(setting) + dict(rl=1, amft=3).get(name.replace("-graded", ""), 5) + 90 * ("graded" in name) + seed
    everything = [*regret.SETTINGS, *regret.PLAIN, *regret.MATHEMATICS]
    table = settings_of(outcome, settings=everything, graded=list(regret.GRADED))
    found = regret.outcomes(table, everything)
    name = "fixed-0.5-graded"
    assert [round(found[setting][name][0], 6) for setting in everything] == [6, 106, 2, 36, 46, 146, 2, 76, 86, 186, 82, 116]
    assert [round(found[setting]["amft-graded"][0], 6) for setting in everything] == [4, 104, 2, 34, 44, 144, 2, 74, 84, 184, 82, 114]
    draws = regret.redrawn(found, 50)
    for setting, same in {"": "fixed-0.5", "wrong": "rl", "weak": "fixed-0.5", "right-nll": "fixed-0.5", "wrong-nll": "rl"}.items():
        assert all(one[setting][name] == one[setting][same] for one in draws)
    assert draws[0]["half"][name] > 90 and draws[0]["wrong"][name] == draws[0][""]["rl"]
    ungraded = {setting: {run: values for run, values in own.items() if run not in regret.GRADED} for setting, own in found.items()}
    wild = {setting: {**own, name: [0.0, 999.0]} for setting, own in found.items()}
    for setting in everything:  # its own runs count where it has any
        own = 100 if "half" in setting else 0
        assert regret.deviation(setting, wild[setting]) - regret.deviation(setting, ungraded[setting]) >= own
        assert (regret.deviation(setting, wild[setting]) == regret.deviation(setting, ungraded[setting])) == (own == 0)
    plain = {setting: {**own, **{run: [1.0, 2.0] for run in regret.GRADED}} for setting, own in ungraded.items()}
    assert regret.redrawn({"wrong": plain["wrong"]}, 3)[2]["wrong"]["sft"] == regret.redrawn({"wrong": ungraded["wrong"]}, 3)[2]["wrong"]["sft"]
    means = regret.averages(found)
    assert regret.regrets(means, [name], found)[name][1] < 0  # better than the best without grading
    assert regret.regrets(means, ["sft"], found) == regret.regrets(regret.averages(ungraded), ["sft"], ungraded)
    pooled = regret.pooled(table)
    for one in regret.redrawn(pooled, 20):
        assert one["wrong"][name + ", plain"] == one["wrong"]["rl"] and one[""][name + ", plain"] == one[""]["fixed-0.5, plain"]
    assert pooled["half"][name + ", plain"] == [146, 147] and pooled["wrong"][name + ", plain"] == [2, 3]


@pytest.mark.parametrize("half, verdict", [(24, "holds"), (8, "does not hold")])
def test_what_grading_is_worth(half, verdict):
    """A verdict of another row's worst regret, or of one setting alone."""
    def outcome(setting, name, seed):
        if "graded" in name:
            return half + 0.2 * seed
        bad = "wrong" in setting and name.startswith(("fixed", "sft", "amft")) or "weak" in setting and name in ("rl", "sft", "fixed-0.1")
        return (9 if bad else 20) + 0.2 * seed
    table = settings_of(outcome, settings=[*regret.SETTINGS, *regret.PLAIN, *regret.BETWEEN], graded=["fixed-0.5-graded"])
    for lines in (regret.section(table, draws=200), regret.section(table, regret.PLAIN, "Plain", draws=200)):
        assert f"then {verdict} by the means" in lines[-1]
        row = next(line for line in lines if line.startswith("| mu = 0.5, graded demonstrations |"))
        assert row.startswith(f"| mu = 0.5, graded demonstrations | 20.3 | {half}.3 | 20.3 | 20.3 | ")
    lines = regret.any_loss(table, draws=200)
    assert f"and both constants with it, and of RL {verdict} by the means" in lines[-1] and lines[-1].count("raded") == 1
    for loss in regret.BY_LOSS:
        assert any(line.startswith(f"| mu = 0.5, graded demonstrations, {loss} | ") for line in lines)
    without = [row for row in table if "graded" not in row.get("run", "")]
    assert "raded" not in "".join(regret.section(without, draws=20) + regret.any_loss(without, draws=20))
    assert regret.grading_changes_nothing({"fixed-0.5-graded": [2.0, 1.0], "fixed-0.5": [0.0, 2.0]})
    assert not regret.grading_changes_nothing({"fixed-0.5-graded": [2.0, 1.0], "fixed-0.5": [0.0, 3.0]})
    assert regret.grading_is_insurance({"fixed-0.5-graded, plain": [2.0], "rl": [3.0], "amft, plain": [3.0], "amft, TrSFT": [1.0],
                                        "sft-rl, plain": [1.0]}, ", plain")
    assert not regret.grading_is_insurance({"fixed-0.5-graded": [2.0, -9.0], "rl": [1.0, 0.0], "amft": [3.0, 3.0]})


def test_a_settings_deviation_weighs_each_run_by_its_freedom():
    """One that counts RL's borrowed run twice, or a run that is stuck at 0 as quiet."""
    own = dict(x=[1.0, 3.0], y=[5.0], z=[0.0, 3.0, 6.0], stuck=[0.0, 0.0], rl=[0.0, 90.0])
    squares = 2 + 18  # freedom 1 + 2
    assert regret.deviation("wrong", own) == pytest.approx(math.sqrt(squares / 3))
    assert regret.deviation("weak", own) == pytest.approx(math.sqrt((squares + 4050) / 4))
    with pytest.raises(ValueError, match="two seeds"):
        regret.deviation("", dict(x=[1.0]))


def test_redrawn_means_have_the_error_of_a_mean():
    """Means redrawn with the deviation of a single seed, around another run's mean, below 0, or a shared run twice."""
    found = {setting: dict(amft=[31.0, 33.0, 32.0, 32.0], sft=[49.0, 51.0], rl=[8.0, 9.0])
             for setting in regret.SETTINGS}
    found["weak"]["rl"] = [0.0, 0.0]
    draws = regret.redrawn(found, 4000)
    for name, mean, n in (("amft", 32.0, 4), ("sft", 50.0, 2)):
        values = [one["half"][name] for one in draws]
        assert statistics.mean(values) == pytest.approx(mean, abs=0.08)
        expected = regret.deviation("half", found["half"]) / math.sqrt(n)
        assert statistics.stdev(values) == pytest.approx(expected, rel=0.05)
    assert all(one["weak"]["rl"] == 0 for one in draws)
    assert all(one["half"]["rl"] == one["wrong"]["rl"] == one[""]["rl"] for one in draws)
    assert len({one["half"]["sft"] for one in draws}) == 4000


def test_rl_is_the_same_run_where_only_the_demonstrations_differ():
    settings = [*regret.SETTINGS, *regret.PLAIN, *regret.MATHEMATICS]
    everything = settings_of(lambda setting, name, seed: 10 * ("weak" not in setting) + 20 * ("math" in setting) + seed, settings=settings)
    found = regret.outcomes(everything, settings)
    right, weak, sums = [11.0, 12.0], [1.0, 2.0], [31.0, 32.0]
    assert {setting: own["rl"] for setting, own in found.items()} == {
        "": right, "half": right, "wrong": right, "weak": weak,
        "right-nll": right, "half-nll": right, "wrong-nll": right, "weak-nll": weak,
        "math": sums, "math-half": sums, "math-wrong": sums, "math-weak": [21.0, 22.0]}
    for one in regret.redrawn({setting: found[setting] for setting in regret.PLAIN}, 50):
        assert one["right-nll"]["rl"] == one["half-nll"]["rl"] == one["wrong-nll"]["rl"] != one["weak-nll"]["rl"]


def test_the_table_of_bad_demonstrations_has_each_seed():
    """RL of another setting than the first, whose runs it shares; a run under another loss; a method that did not run."""
    table = settings_of(lambda setting, name, seed: dict(form=10, nll=5).get(setting, 30) + seed,
                        settings=["", *regret.LOSSES])
    table = [row for row in table if row.get("run") != "nll/sft" and "soup" not in row.get("run", "")]
    lines = regret.losses(table)
    same = "31.5 (31.0, 32.0)"
    assert f"| RL | {same} | {same} | {same} | {same} |" in lines
    assert f"| AMFT | {same} | {same} | 11.5 (11.0, 12.0) | 6.5 (6.0, 7.0) |" in lines
    assert f"| SFT | {same} | {same} | 11.5 (11.0, 12.0) | - |" in lines
    assert not any("merged" in line for line in lines)
    assert regret.few(table) == []
    lines = regret.few(settings_of(lambda setting, name, seed: 20 * (setting == "few-nll") + seed, settings=["", *regret.FEW]))
    assert "| RL | 1.5 (1.0, 2.0) | 1.5 (1.0, 2.0) |" in lines and "| AMFT | 1.5 (1.0, 2.0) | 21.5 (21.0, 22.0) |" in lines


@pytest.mark.parametrize("amft, verdict", [(20, "is reached"), (14, "is not reached")])
def test_the_regret_table_is_what_the_runs_say(amft, verdict):
    """A regret of another method, a verdict that does not follow from it."""
    def outcome(setting, name, seed):
        good = dict(sft=setting != "wrong", rl=setting == "wrong").get(name, True)
        return (amft if name == "amft" else 16 if good else 2) + 0.1 * seed
    text = "\n".join(regret.section(settings_of(outcome), draws=200))
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    best = max(amft, 16)
    assert [float(cell) for cell in rows["| AMFT"][1:5]] == pytest.approx([amft + 0.15] * 4, abs=0.06)
    assert rows["| AMFT"][5].startswith(f"{best - amft:.1f} [")  # mean
    assert rows["| SFT"][6].startswith(f"{best - 2:.1f} [")  # worst
    assert verdict in text


def test_the_plain_loss_is_judged_by_its_own_runs():
    """Rectified runs in the plain question's table, or a best method that ran with the other loss."""
    def outcome(setting, name, seed):
        return 5 if name == "rl" else (10 if setting in regret.PLAIN else 30) + (name == "amft") + 0.1 * seed
    table = settings_of(outcome, seeds=(1, 3), settings=[*regret.SETTINGS, *regret.PLAIN])
    rows = [line for line in regret.section(table, regret.PLAIN, "Plain", draws=50) if line.startswith("| ")]
    cells = next(row.split(" | ") for row in rows if row.startswith("| mu = 0.5"))
    assert [float(cell) for cell in cells[1:5]] == pytest.approx([10.2] * 4)
    assert cells[5].startswith("1.0 [")
    rows = regret.both([row for row in table if row.get("run") != "weak-nll/soup"])
    assert "| mu = 0.5 | 30.2 / 10.2 | 30.2 / 10.2 | 30.2 / 10.2 | 30.2 / 10.2 | 1.0 / 1.0 | 1.0 / 1.0 |" in rows
    assert "| RL | 5.0 / 5.0 |" in "".join(rows) and "merged" not in "".join(rows)


@pytest.mark.parametrize("wrong, verdicts", [
    (dict(constant=24, amft=25), ["holds", "holds"]),
    (dict(constant=24, amft=21.5), ["holds", "does not hold"]),
    (dict(constant=6, amft=24), ["does not hold", "holds"])])
def test_regret_whichever_the_loss(wrong, verdicts):
    """One that is taken from the best of its own loss, a verdict of another loss's rows, runs that are not there."""
    right = {"": 20, "wrong": 18, "right-nll": 28, "wrong-nll": 8, "right-trsft": 26, "half-trsft": 24}
    def outcome(setting, name, seed):
        if name == "rl" or (name == "fixed-0.1" and setting in regret.BETWEEN):
            return 4
        if setting == "wrong-trsft":
            return wrong["amft" if name == "amft" else "constant"] + 0.1 * seed
        return right.get(setting, 25) - (name == "sft") + 0.1 * seed + (name == "amft" and setting in regret.BETWEEN)
    table = settings_of(outcome, settings=[*regret.SETTINGS, *regret.PLAIN, *regret.BETWEEN])
    ran = [row for row in table
           if "-trsft/" not in row.get("run", "") or row["run"].rpartition("/")[2] in ("fixed-0.1", "fixed-0.5", "amft")]
    lines = regret.any_loss(ran, draws=200)
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| ")}
    best = max(18, *wrong.values())
    assert [float(cell) for cell in cells["| mu = 0.5, plain"][1:5]] == pytest.approx([28.15, 25.15, 8.15, 25.15], abs=0.06)
    assert cells["| mu = 0.5, plain"][6].startswith(f"{best - 8:.1f} [")
    assert cells["| SFT, rectified"][5].startswith(f"{(9 + 1 + best - 17 + 2) / 4:.1f} [")
    assert cells["| RL"][1:5] == ["4.0"] * 4 and "| mu = 0.9, TrSFT" not in cells
    assert [part.split(" by the means")[0] for part in lines[-1].split(". ")] == [
        "That the worst regret of a constant with TrSFT is below that of every constant and of AMFT with another loss " + verdicts[0],
        "That AMFT with TrSFT has a worst and a mean regret below those of both constants with it " + verdicts[1]]
    assert regret.any_loss([row for row in table if "-trsft/" not in row.get("run", "")], draws=20) == []
    others = {"fixed-0.5, plain": [3.0], "fixed-0.5-graded, plain": [0.5], "sft-rl, plain": [0.0], "fixed-0.5, TrSFT": [2.0], "amft, TrSFT": [0.0]}
    assert [regret.is_insurance({**others, "amft, plain": [worst]}) for worst in (1.0, 4.0)] == [False, True]


def test_a_regret_table_without_amft_is_refused_in_a_line():
    table = settings_of(lambda setting, name, seed: 10 + seed)
    with pytest.raises(ValueError, match="no runs of wrong/amft"):
        regret.section([row for row in table if row.get("run") != "wrong/amft"])
    without_soup = [row for row in table if row.get("run") != "half/soup"]
    assert "merged" not in "".join(regret.section(without_soup, draws=50)[5:])


@pytest.mark.parametrize("best", ["rl", "fixed-0.1", "sft"])
def test_a_question_with_fewer_constants_is_judged_by_those(best):
    """A verdict that asks for a constant that never ran, or overlooks one that ran; one that failed in a setting, left out."""
    def outcome(setting, name, seed):
        return (30 if name == best else 10 if name in regret.CONSTANTS else 20) + 0.2 * seed
    ran = [row for row in settings_of(outcome, settings=regret.MATHEMATICS)
           if "fixed-0.9" not in row.get("run", "") or row["run"] == "math/fixed-0.9"]  # in a single setting
    text = "\n".join(regret.section(ran, regret.MATHEMATICS, "Mathematics", draws=50))
    assert "mu = 0.9" not in text and f"less that of {regret.METHODS[best]}, the least of a constant's: +10.0" in text
    assert "is not reached" in text
    for setting in regret.MATHEMATICS:
        with pytest.raises(ValueError, match=f"no runs of {setting}/fixed-0.1"):
            regret.section([row for row in ran if row.get("run") != f"{setting}/fixed-0.1"], regret.MATHEMATICS)


def test_mathematics_has_a_table_of_its_own_where_it_ran():
    """Runs of General Points in it; an error where there are none."""
    def outcome(setting, name, seed):
        return 10 * (setting in regret.MATHEMATICS) + (name == "amft") + 0.2 * seed
    ran = settings_of(outcome, settings=[*regret.SETTINGS, *regret.MATHEMATICS])
    lines = regret.elsewhere([row for row in ran if "fixed-0.1" not in row.get("run", "")])
    assert "is reached by the means" in "".join(lines)
    assert "| RL | 10.3 (10.2, 10.4) | 10.3 (10.2, 10.4) | 10.3 (10.2, 10.4) | 10.3 (10.2, 10.4) |" in lines
    assert regret.elsewhere(settings_of(outcome)) == [] and "again" not in "".join(lines)


@pytest.mark.parametrize("cosine, verdict", [
    (40, "not higher holds by the means, and holds in 100% of"), (60, "does not hold by the means, and holds in 0% of")])
def test_fresh_seeds_of_mathematics_are_judged_by_themselves(cosine, verdict):
    """Older seeds in their table, runs that they do not have, General Points' seeds, a verdict of the falling mu's that is another's."""
    def outcome(setting, name, seed):
        if seed < regret.AGAIN:
            return 10
        return dict(amft=50, cosine=cosine if setting == "math-wrong" else 50).get(name, 30) + 0.2 * (seed - regret.AGAIN)
    first, last = regret.AGAIN - 2, regret.AGAIN
    everything = settings_of(outcome, seeds=(first, first + 1, last, last + 1), settings=[*regret.SETTINGS, *regret.MATHEMATICS])
    ran = [row for row in everything if row.get("seed", 0) < last or row["run"].rpartition("/")[2] not in ("rl", "race", "soup")]
    lines = regret.elsewhere(ran, draws=200)
    again = lines[next(i for i, line in enumerate(lines) if "again" in line):]
    rows = {line.split(" | ")[0]: line.split(" | ") for line in again if line.startswith("| ")}
    assert rows["| AMFT"][1:5] == ["50.1"] * 4 and rows["| mu = 0.4"][1:5] == ["30.1"] * 4
    assert not {"| RL", "| race of three mus"} & set(rows)
    assert "Seeds in the settings, at most: 2, 2, 2, 2" in "".join(again) and verdict in "".join(again)
    for what, expected in (("worst", cosine - 50), ("mean", (cosine - 50) / 4)):
        difference, low, high = map(float, re.search(rf"{what} regret ([+-].*?) \[(.*?), (.*?)\]", "".join(again[-4:])).groups())
        assert difference == expected and low < difference < high and high - low < 1
    before = [row for row in everything if row.get("seed", 0) < last or row["run"].rpartition("/")[0] not in regret.MATHEMATICS]
    assert "again" not in "".join(regret.elsewhere(before, draws=20))
