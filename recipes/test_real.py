"""Tests of the comparison on a real model: its budget, its skipping, stopping and going on, its table.

    python -m pytest -q recipes/test_real.py
"""

import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from recipes import real  # noqa: E402

SMALL = ["--model", "base", "--task", "gp", "--device", "cpu", "--bf16", "0", "--responses", "96", "--prompts", "2",
         "--sft-batch", "4", "--eval-n", "2", "--val-every", "5"]


def arguments(out, *more):
    return [*SMALL, "--out", str(out), *more]


def value(flags, name):
    return int(flags[flags.index(name) + 1])


def test_methods_have_one_budget_of_responses(tmp_path):
    """AMFT's samples of val on top of the others', or a method with fewer steps than it may have."""
    args = real.arguments(["--model", "x", "--out", str(tmp_path)])
    for method in real.OWN:
        flags = real.flags_of(method, "1e-5", 0, args)
        warmup = real.WARMUP if method != "rl" else 0
        steps = value(flags, "--steps") - warmup
        looks = sum(t % args.meta_every == 0 for t in range(1, steps + 1)) if method == "amft" else 0
        assert (steps + looks) * args.prompts * 8 == 7680, method


def test_a_comparison_is_stopped_and_goes_on(tmp_path, capfd, monkeypatch):
    """A run that is done twice, or lost; a table without a method; flags that changed meanwhile."""
    out = tmp_path / "real"
    methods = ("--methods", "sft", "amft")
    stopped = real.run(out / "amft-0", real.flags_of("amft", real.LR["amft"], 0, real.arguments(arguments(out))),
                       time.time() + real.GRACE + 25)
    assert stopped in (0, 130)
    real.main(arguments(out, *methods))
    said = capfd.readouterr().out
    assert "| SFT | " in said and "| AMFT | " in said and "| before | " in said
    assert (out / "table.md").read_text().strip() in said
    assert not (out / "amft-0" / "state.pt").exists()
    assert (out / "real.png").exists() or importlib.util.find_spec("matplotlib") is None
    real.main(arguments(out, *methods))
    assert "$ python" not in capfd.readouterr().out  # nothing is left to do
    real.main(arguments(out, *methods, "--list", "--seeds", "0", "1"))
    assert capfd.readouterr().out.count("python compare/rivals.py") == 2  # the other seed
    (out / "rl-0.flags").write_text("--lr 1")
    with pytest.raises(SystemExit, match="2"):
        real.main(arguments(out, "--methods", "rl"))
    assert "other flags" in capfd.readouterr().err


def test_a_search_chooses_by_val(tmp_path):
    """Another split than val, or a choice before all rates were tried."""
    args = real.arguments(["--model", "x", "--out", str(tmp_path)])
    for rate, val in zip(real.RATES, (0.1, 0.4, 0.3)):
        assert real.best_rate("rl", args) == real.LR["rl"]
        folder = tmp_path / "search" / f"rl-{rate}"
        folder.mkdir(parents=True)
        rows = [dict(kind="eval", split="val", best=[0.9, 0, 1]),
                dict(kind="eval", split="val", success=1 - val, best=[val, 0, 1]),
                dict(kind="eval", split="id", best=[1 - val, 0, 1]), dict(kind="final")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert real.best_rate("rl", args) == real.RATES[1]
    assert shlex.join(next(iter(real.jobs_of(args).values()))).count(f"--lr {real.LR['sft']}") == 1


def test_what_was_recorded_gives_the_same_table(tmp_path, monkeypatch, capsys):
    """A key that the table reads and the record lacks; a run that was cut off in the place of a finished one."""
    out, again = tmp_path / "out", tmp_path / "again"
    monkeypatch.setattr(real, "RECORDED", tmp_path / "real.jsonl")
    for run, steps in (("sft-0", 4), ("sft-1", 4), ("amft-0", 2)):
        rows = [dict(kind="config", steps=4, lr=1e-5, model="base")]
        rows += [dict(kind="eval", step=0, split=split, whole=True, success=0.1, best=[0.2, 0, 1], temperature=0.1)
                 for split in ("val", "id") if run == "sft-0"]
        for t in range(1, steps + 1):
            rows.append(dict(kind="step", step=t, mu=0.5, rollouts=8 * t, seconds=30.0 * t, success=0.1, entropy=1.0))
        if steps == 4:
            rows += [dict(kind="eval", step=4, split=split, whole=True, success=0.3, best=[0.4 + int(run[-1]), 0, 1],
                          temperature=0.1) for split in ("val", "id")]
            rows.append(dict(kind="final"))
        (out / run).mkdir(parents=True)
        (out / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real.report(out, out / "real.png")
    real.record(out)
    again.mkdir()
    real.unpack(again)
    real.report(again, again / "real.png")
    table = (out / "table.md").read_text()
    assert table == (again / "table.md").read_text()
    lines = table.splitlines()
    assert lines[2] == "| before | 20.0 [0, 100] | 20.0 [0, 100] |  |  |  |  |"
    assert lines[3] == "| SFT | 90.0 (40.0, 140.0) | 90.0 (40.0, 140.0) | 0.50 | 32 | 1.5 | 1e-05 |"
    assert lines[4] == "| AMFT, cut off at step 2 of 4 | - | - | 0.50 | 16 | 0.5 | 1e-05 |"
    assert len({line.count("|") for line in lines}) == 1


def test_runs_that_cannot_be_recorded_leave_the_record(tmp_path, monkeypatch, capsys):
    """A record that is emptied before anything is found to put there; another folder's runs in it."""
    monkeypatch.setattr(real, "RECORDED", tmp_path / "real.jsonl")
    real.RECORDED.write_text("kept")
    (tmp_path / "rl-0.bak").mkdir()
    (tmp_path / "rl-0.bak" / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(SystemExit, match="2"):
        real.main(["--record", "--out", str(tmp_path)])
    assert "no runs" in capsys.readouterr().err
    assert real.RECORDED.read_text() == "kept"
    real.RECORDED.unlink()
    with pytest.raises(SystemExit, match="2"):
        real.main(["--recorded"])
    assert "real.jsonl" in capsys.readouterr().err


def test_the_readme_has_the_recorded_table(tmp_path, capsys):
    """A figure that no command makes."""
    real.unpack(tmp_path)
    real.report(tmp_path, tmp_path / "real.png")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "recipes" / "README.md").read_text()
