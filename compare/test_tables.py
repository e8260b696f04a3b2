"""python -m pytest -q compare/test_tables.py: seconds, no training."""

import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import four, logs, matrix, tables  # noqa: E402

STUDIES = sorted(path.stem for path in logs.RECORDED.glob("*.jsonl"))


@pytest.mark.parametrize("study", STUDIES)
def test_recorded_tables_are_made_from_the_recorded_rows_alone(study):
    assert tables.text(study) == (logs.RECORDED / f"{study}.md").read_text()


def test_the_readme_prints_the_recorded_table():
    study = logs.Study(logs.recorded("gp"))
    assert four.table(study) in (Path(__file__).resolve().parent.parent / "README.md").read_text()
    tasks, readme = logs.recorded("tasks"), (Path(__file__).resolve().parent / "README.md").read_text()
    ablated = tables.ablations(study, "amft")
    for whole in (tables.ends(study, [name for name in study.names if name not in ablated]),
                  tables.paired(study, ablated, "amft"), tables.together(tasks)[2:]):
        assert "\n".join(whole[1:]) in readme


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", tables.T95)
def test_student_t_leaves_a_fortieth_in_each_tail(seeds):
    df, width = seeds - 1, 1e-3
    density = lambda x: (1 + x * x / df) ** (-(df + 1) / 2)  # noqa: E731
    inside = width * sum(density(width * (i + 0.5)) for i in range(round(tables.T95[seeds] / width)))
    whole = math.sqrt(df * math.pi) * math.gamma(df / 2) / math.gamma((df + 1) / 2) / 2
    assert inside / whole == pytest.approx(0.95, abs=2e-4)


def test_interval_by_hand():
    assert tables.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / sqrt(3)
    assert tables.interval([0.25], ".2f") == "0.25"


def test_interval_covers_19_of_20_times():
    rng = random.Random(0)
    draws = [tables.mean_and_half([rng.gauss(3, 2) for _ in range(5)]) for _ in range(2000)]
    assert 0.935 < statistics.mean(abs(mean - 3) <= half for mean, half in draws) < 0.965


@pytest.mark.parametrize("negative", range(11))
def test_sign_test_counts_sign_patterns(negative):
    as_uneven = sum(abs(sum(signs)) >= abs(10 - 2 * negative) for signs in itertools.product((-1, 1), repeat=10))
    assert tables.sign_test([-1.0] * negative + [1.0] * (10 - negative)) == pytest.approx(as_uneven / 1024)
    assert tables.sign_test([]) == 1


@pytest.mark.parametrize("name, split", [("rl", "id"), ("fixed-0.5", "val"), ("sft", "heldout")])
def test_paired_difference_read_off_the_rows(name, split):
    last = {}
    for row in map(json.loads, (logs.RECORDED / "gp.jsonl").read_text().splitlines()[1:]):
        if row["kind"] == "eval" and row["split"] == split:
            last[row["run"], row["seed"]] = 100 * row["success"]
    values = [last[name, seed] - last["amft", seed] for seed in range(10, 15)]
    mean = sum(values) / 5
    half = 2.776 * math.sqrt(sum((x - mean) ** 2 for x in values) / 4 / 5)
    shown = f"{mean:.1f} ± {half:.1f}"
    paired = (logs.RECORDED / "gp.md").read_text().split("Paired difference in success from amft")[1]
    header, row = (next(line for line in paired.splitlines() if line.startswith(start)).split(" | ")
                   for start in ("| method", f"| {name} "))
    assert row[header.index(split)] == (f"**{shown}**" if abs(mean) > half else shown)


def test_base_interval_is_wilsons_at_some_effective_number():
    """Both ends are rates that are 1.96 of their own standard errors from what was seen, at one number of episodes."""
    for row in logs.Study(logs.recorded("gp")).base.values():
        number = [1.96 ** 2 * rate * (1 - rate) / (row["success"] - rate) ** 2 for rate in (row["low"], row["high"])]
        assert number[0] == pytest.approx(number[1], rel=2e-3) and number[0] < 1.01 * 4 * row["n"]  # of each, four samples


# --- logs and layouts ---------------------------------------------------------------------------------------------


def log(folder, *rows, end="\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)


def evaluation(step, split="val", success=0.5, **more):
    return dict(kind="eval", step=step, split=split, n=100, success=success, low=success - 0.1, high=success + 0.1,
                outcomes=dict(wrong=1), **more)


def ended(success, mu=0.25, any_of=0.75, greedy=0.5):
    """A finished run of two steps."""
    return [dict(kind="config", commit="0123456789abcdef", torch="2", steps=2), evaluation(0, any=0.6, greedy=0.4),
            *(dict(kind="step", step=i, mu=mu, rollouts=8 * i, entropy=None, success=1 / 3, meta_grad=-0.2, meta_se=0.1)
              for i in (1, 2)),
            evaluation(2, success=success, any=any_of, greedy=greedy), dict(kind="final", step=2, rollouts=16, seconds=3)]


def study(tmp_path, spec, **runs):
    (tmp_path / "toy").mkdir(exist_ok=True)
    (tmp_path / "toy" / "spec.json").write_text(json.dumps(dict(common="--task gp", seeds=[0, 1]) | spec))
    for name, rows in runs.items():
        log(tmp_path / "toy" / name, *rows)
    return tmp_path / "toy"


def test_packing_keeps_finished_runs_and_what_is_read(tmp_path):
    toy = study(tmp_path, dict(runs={"a": ""}), **{"a-0": ended(2 / 3), "a-1": ended(0.5)[:-1], "gp/b-x-7": ended(0.5)})
    log(tmp_path / "toy" / "a-2", *ended(0.5), end='\n{"kind": "st')
    table = logs.collect(toy)
    assert {(row["run"], row["seed"]) for row in table[1:]} == {("a", 0), ("a", 2), ("gp/b-x", 7)}
    step = next(row for row in table if row["kind"] == "step")
    assert step == dict(run="a", seed=0, kind="step", step=1, mu=0.25, rollouts=8, success=0.333333, meta_grad=-0.2,
                        meta_se=0.1)  # six digits, no nulls
    assert "outcomes" not in next(row for row in table if row["kind"] == "eval")
    logs.write(tmp_path / "toy.jsonl", table)
    assert [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()] == table
    assert logs.Study(table, "gp").names == ["b-x"] and logs.Study(table).groups == ["", "gp"]


def test_a_study_is_packed_and_unpacked_without_loss(tmp_path):
    spec = dict(runs={"a": "", "b": ["", ""]}, search=dict(seed=9))
    toy = study(tmp_path, spec, **{"a-0": ended(2 / 3), "a-1": ended(0.5)[:-1], "b-7": ended(0.5),
                                   "search/b.0-9": ended(0.5), "search/b.1-9": ended(0.5)})
    table = logs.collect(toy)
    logs.unpack(table, tmp_path / "other" / "toy")
    assert logs.collect(tmp_path / "other" / "toy") == table and not (tmp_path / "other" / "toy" / "a-1").exists()
    (toy / "a-0" / "metrics.jsonl").write_text("")  # what is there already is not overwritten
    logs.unpack(table, toy)
    assert {row["run"] for row in logs.collect(toy)[1:]} == {"b", "search/b.0", "search/b.1"}


def test_every_nth_step_is_kept_and_all_meta_gradients(tmp_path):
    rows = ended(0.5)
    rows[2:4] = [dict(kind="step", step=i, mu=0.5, rollouts=i, **({"meta_own": 0.1} if i == 7 else {})) for i in range(1, 12)]
    table = logs.collect(study(tmp_path, dict(runs={"a": ""}, every=5), **{"a-0": rows}))
    assert [row["step"] for row in table if row["kind"] == "step"] == [5, 7, 10]
    assert tables.deeds(logs.Study(table))  # what has no last ten steps has its last ten rows


def test_the_layout_of_a_new_study(tmp_path):
    spec = dict(runs={"rl": "", "amft": ["", ""]}, search=dict(seed=9), reach=[0.6])
    toy = study(tmp_path, spec, **{"rl-0": ended(0.7), "rl-1": ended(0.8), "amft-0": ended(0.5), "amft-1": ended(0.5),
                                   "search/amft.0-9": ended(0.4), "search/amft.1-9": ended(0.4)})
    table = logs.collect(toy)
    text = "\n".join(tables.plain([dict(table[0], study="toy"), *table[1:]]))
    assert "Success of sampled responses:" in text and "Solved by any" in text and "Greedy success:" in text
    assert "| base | - | 50.0 [40, 60] |" in text and "| base | - | 60.0 |" in text and "| base | - | 40.0 |" in text
    assert "| rl | 2 | 75.0 ± 63.5 |" in text and "| rl | 25.0 ± 63.5 |" in text  # 12.706 * 5
    assert "| rl | 2 (2 of 2) | 16 |" in text and "| amft | - | - |" in text  # reach
    assert "| amft | 4 of 4 | 0.12 | -2.00 | 0 | 0 of 0 | 1 |" in text  # signs
    assert "**: 40.0**" in text
    assert not any(row["kind"] == "step" for row in table[1:] if row["run"].startswith("search/"))


def test_a_table_of_all_groups(tmp_path):
    toy = study(tmp_path, dict(runs={"gp/rl": "", "virl/rl": "", "virl/amft": ""}),
                **{"gp/rl-0": ended(0.7), "virl/rl-0": ended(0.3), "virl/amft-0": ended(0.4), "virl/amft-1": ended(0.4)})
    table = logs.collect(toy)
    text = tables.plain([dict(table[0], study="toy"), *table[1:]])
    assert text[text.index("| task | split | base | rl | amft |") + 2:][:2] == [
        "| gp | val | 50.0 [40, 60] | 70.0 | - |", "| virl | val | 50.0 [40, 60] | 30.0 | 40.0 ± 0.0 |"]
    assert "## gp" in text and "## virl" in text


def test_ablations_have_a_table_of_their_own(tmp_path):
    toy = study(tmp_path, dict(runs={"gp/amft": "", "gp/rl": "", "gp/cold": "@gp/amft --warmup 0", "gp/half": "@gp/rl --mu 1"}),
                **{f"gp/{name}-{seed}": ended(x) for seed in (0, 1) for name, x in dict(amft=0.5, rl=0.6, cold=0.7, half=0.8).items()})
    table = logs.collect(toy)
    text = "\n".join(tables.plain([dict(table[0], study="toy"), *table[1:]]))
    methods, own = text.split("Ablations, ")
    assert "| half | 2 | 80.0" in methods and "| half | **30.0" in methods and "cold |" not in methods
    assert "| cold | 2 | 70.0 ± 0.0 |" in own and "| cold | **20.0 ± 0.0** |" in own and "| half | 2 | 80.0" not in own


def test_equal_seconds_cut_the_slower_short(tmp_path):
    """By hand: 4 steps of 1.5 seconds are 6; at 2 seconds a step 3 steps, half way from the evaluation after 2, at 20%,
    to that after 4, at 60%."""
    def steps(*success):
        return [dict(kind="config", commit="0", torch="2", steps=4),
                *(evaluation(t, split, x) for t, x in zip((0, 2, 4), success) for split in ("val", "id")), dict(kind="final")]
    spec = dict(runs=dict(rl="", sft="", slow=""), clock="rl", costs=dict(sft=1, rl=1.5, slow=2), pooled=dict(both=["val", "id"]))
    toy = logs.Study(logs.collect(study(tmp_path, spec, **{
        "rl-0": steps(0.1, 0.3, 0.5), "sft-0": steps(0.1, 0.2, 0.3), "slow-0": steps(0.1, 0.2, 0.6)})))
    assert tables.equal_seconds(toy)[3:] == ["| sft | 1.00 | 4 | 30.0 | 30.0 | 30.0 |", "| rl | 1.50 | 4 | 50.0 | 50.0 | 50.0 |",
                                             "| slow | 2.00 | 3 | 40.0 | 40.0 | 40.0 |"]


def test_differences_from_any_run_are_printed(monkeypatch, capsys):
    """The recorded difference of two runs, the other way round."""
    monkeypatch.setattr(sys, "argv", ["tables.py", "gp", "--against", "rl"])
    tables.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| amft |"))
    assert "| -1.2 ± 3.7 | **8.4 ± 1.5** |" in row
    assert "| rl | 1.2 ± 3.7 | **-8.4 ± 1.5** |" in (logs.RECORDED / "gp.md").read_text()


@pytest.mark.parametrize("words, says", [
    (["nonsense"], "those are default, gp, snr, tasks"), (["gp", "--against", "nobody"], "must be one of amft, "),
    (["--against", "rl"], "name one study"), (["tasks", "--against", "rl"], "its groups: 'gp-1e-4', 'gp-vl', 'math', 'math-1e-4'"),
    (["snr", "--against", "rl"], "its groups: none")])
def test_what_is_not_recorded_is_refused_in_a_line(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    with pytest.raises(SystemExit) as refused:
        tables.main()
    assert refused.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words, says, runs", [
    (["--only", "nobody"], "they are rl", "runs"), (["--seeds", "3"], "the spec's, 0 1", "runs"), ([], "it needs", "run")])
def test_a_matrix_of_nothing_is_refused(words, says, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    (tmp_path / "toy.json").write_text(json.dumps(dict(common="", seeds=[0, 1], **{runs: dict(rl="")})))
    monkeypatch.setattr(sys, "argv", ["matrix.py", str(tmp_path / "toy.json"), *words])
    with pytest.raises(SystemExit) as refused:
        matrix.main()
    assert refused.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_first_of_equal_trials_is_chosen(tmp_path):
    toy = study(tmp_path, dict(runs={"gp/amft": ["--lr 1", "--lr 2", "--lr 3"]}, search=dict(seed=9)),
                **{f"search/gp/amft.{i}-9": ended(success) for i, success in enumerate((0.3, 0.6, 0.6))})
    assert logs.flags_of(logs.collect(toy), "gp/amft") == "--lr 2"


# --- the matrix ---------------------------------------------------------------------------------------------------

STUB = """
import json, pathlib, sys
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--resume" if "--resume" in flags else "--out") + 1])
out.mkdir(parents=True, exist_ok=True)
if "--fail" in flags:
    (out / "state.pt").write_text("")
    sys.exit(1)
lr = float(flags[flags.index("--lr") + 1]) if "--lr" in flags else 0.5
rows = [dict(kind="eval", step=1, split="val", n=1, success=lr, low=0, high=1), dict(kind="final", flags=flags)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(out / "state.pt").write_text("")
"""


def test_a_matrix_is_searched_run_resumed_and_not_run_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PROGRAM", [sys.executable, "stub.py"])
    runs = {"gp/amft": ["--lr 0.1", "--lr 0.9"], "gp/cold": "@gp/amft --warmup 0", "bad": "--fail"}
    spec = tmp_path / "toy.json"
    spec.write_text(json.dumps(dict(common="--task gp", seeds=[0, 1], search=dict(seed=9, flags="--eval-n 5"), runs=runs)))

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["matrix.py", str(spec), "--jobs", "2", *flags])
        matrix.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="not all runs"):
        go()
    out = capsys.readouterr().out
    assert "2 runs, 2 to do" in out and "6 runs, 6 to do" in out and out.count("failed") == 2
    finals = {row["run"] + str(row["seed"]): row["flags"] for row in logs.collect(tmp_path / "runs" / "toy")
              if row["kind"] == "final"}
    assert finals["search/gp/amft.09"][:-1] == "--task gp --lr 0.1 --eval-n 5 --seed 9 --out".split()
    assert finals["gp/amft0"][:-1] == "--task gp --lr 0.9 --seed 0 --out".split()
    assert finals["gp/cold1"][:-1] == "--task gp --lr 0.9 --warmup 0 --seed 1 --out".split()
    assert not (tmp_path / "runs" / "toy" / "gp" / "amft-0" / "state.pt").exists()
    go()  # the failed ones go on from their states
    table = logs.collect(tmp_path / "runs" / "toy")
    logs.unpack(table, tmp_path / "other")  # says what its runs were started with, as the matrix did
    for out in (tmp_path / "other").rglob("metrics.jsonl"):
        name = f"{out.parent.relative_to(tmp_path / 'other')}.txt"
        assert (tmp_path / "other" / name).read_text().split("\n")[0] == (
            tmp_path / "runs" / "toy" / name).read_text().split("\n")[0]
    assert "6 runs, 0 to do" in go("--list")
    runs["gp/cold"] = "--warmup 1"
    spec.write_text(json.dumps(dict(common="", seeds=[0], runs=runs)))
    with pytest.raises(SystemExit, match="other flags"):
        go("--only", "gp/cold")


FOUR = """
import json, pathlib, sys
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
out.mkdir(parents=True)
rows = [dict(kind="config", flags=flags), dict(kind="step", step=1, mu=0.5), dict(kind="final")] + [
    dict(kind="eval", step=t, split=split, n=9, success=t / 2, low=0, high=1, any=1, greedy=1)
    for t in (0, 1) for split in ("val", "id", "heldout", "ood_rule")]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


def test_one_seed_of_the_projects_figure_is_run_with_the_recorded_flags(tmp_path, monkeypatch, capsys):
    (tmp_path / "stub.py").write_text(FOUR)
    for module in (matrix, four):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PROGRAM", [sys.executable, "stub.py"])
    monkeypatch.setattr(sys, "argv", ["four.py", "--seed", "7"])
    drawn = []
    monkeypatch.setattr(four, "draw", lambda study, path: drawn.append(path))
    four.main()
    out, table = capsys.readouterr().out, logs.recorded("gp")
    assert "4 runs, 4 to do" in out and "| AMFT | 50.0 | 50.0 | 50.0 | 50.0 |" in out and "| base | 0.0 [0, 100] |" in out
    assert drawn == [tmp_path / "runs" / "four-7" / "four.png"]
    for name in four.METHODS:
        flags = logs.read(tmp_path / "runs" / "four-7" / f"{name}-7")[0]["flags"]
        assert " ".join(flags).startswith(f"{table[0]['common']} {logs.flags_of(table, name)} --seed 7 --out ")
