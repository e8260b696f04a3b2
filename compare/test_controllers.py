"""python -m pytest -q compare/test_controllers.py: variants of the controller against enumerations; seconds."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
import tasks  # noqa: E402
from compare import controllers, rivals  # noqa: E402


def expectation(weights, n, p):
    """E over all patterns of n Bernoulli(p) successes of the mean of weight_i d log P(r_i) / dp."""
    total = 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if r else 1 - p for r in pattern)
        row = weights(torch.tensor([pattern], dtype=torch.float64))[0].tolist()
        total += chance * sum(w * (1 / p if r else -1 / (1 - p)) for w, r in zip(row, pattern)) / n
    return total


@pytest.mark.parametrize("n, k", [(2, 1), (4, 1), (4, 3), (5, 2), (6, 4), (8, 7)])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_pass_at_k_advantages_give_its_derivative(n, k, p):
    """pass@k = 1 - (1 - p)^k, whose derivative is k (1 - p)^(k - 1)."""
    got = expectation(lambda success: controllers.pass_advantages(success, k), n, p)
    assert got == pytest.approx(k * (1 - p) ** (k - 1), rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_advantages_are_means_over_subsets(k):
    """Sample i: over the subsets of k that hold it, are they solved? less the subsets of k of the others, times k."""
    generator = torch.Generator().manual_seed(0)
    success = (torch.rand(20, 5, generator=generator) < 0.4).double()
    for row, got in zip(success.tolist(), controllers.pass_advantages(success, k).tolist()):
        for i, value in enumerate(got):
            others = [r for j, r in enumerate(row) if j != i]
            with_i = [max((row[i], *rest)) for rest in itertools.combinations(others, k - 1)]
            without = [max(rest) for rest in itertools.combinations(others, k)]
            assert value == pytest.approx(k * (sum(with_i) / len(with_i) - sum(without) / len(without)), abs=1e-12)


def test_pass_at_1_is_amfts_own_advantage():
    success = (torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    advantages, scale = amft.group_advantages(success)
    assert torch.allclose(advantages * scale, controllers.pass_advantages(success, 1), atol=1e-6)


def test_k_falls_from_all_but_one_to_one():
    controller = controllers.Pass(amft.Config(samples=8, steps=70))
    ks = [controller.k(SimpleNamespace(t=t)) for t in range(1, 71)]
    assert ks[0] == 7 and ks[-1] == 1 and sorted(ks, reverse=True) == ks and set(ks) == set(range(1, 8))


def test_the_other_rule_is_asked_of_the_controllers_deals_alone():
    import random
    task, rng = tasks.GeneralPoints(), random.Random(0)
    for _ in range(50):
        deal = task.sample("val_rule", rng)
        assert tasks.ROLES[tuple(sorted(deal.numbers))] == "val" and "13" in deal.prompt
    assert "val_rule" not in task.splits  # it is no evaluation


def test_the_warm_up_ends_when_the_loss_on_unseen_demonstrations_stops_falling(monkeypatch):
    controller = controllers.AutoWarmup(amft.Config(steps=1000))
    losses = iter([3.0, 2.0, 2.5, 1.9, 2.0, 1.95, 1.91, 1.0])
    monkeypatch.setattr(controllers.amft, "encode_demos", lambda *_: SimpleNamespace(mask=torch.ones(1, 1)))
    monkeypatch.setattr(controllers.amft, "logps_of", lambda *_: torch.zeros(1, 1))
    monkeypatch.setattr(controllers.amft, "sft_loss", lambda *_: torch.tensor(next(losses)))
    task = SimpleNamespace(sample=lambda split, rng: None)
    over = []
    for t in range(1, 81):
        controller.moved(SimpleNamespace(t=t, rollouts=None, task=task, rng=None, model=None, tokenizer=None, row={}))
        over.append(controller.explores(t + 1))
    assert over.index(True) + 1 == 70  # lows at 10, 20 and 40; the third look in vain is at 70


@pytest.mark.parametrize("name", sorted(controllers.CONTROLLERS))
def test_every_variant_runs_within_its_budget(name, tmp_path):
    rivals.main(["--task", "gp", "--smoke", "--method", name, "--responses", "160", "--splits", "val", "--eval-n", "4",
                 "--steps", "5", "--warmup", "0", "--out", str(tmp_path / "run"), "--device", "cpu"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "final" and 100 <= rows[-1]["rollouts"] <= 160
    assert {row["split"] for row in rows if row["kind"] == "eval"} == {"val"}


def test_a_split_that_the_task_has_not_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        rivals.main(["--task", "gp", "--smoke", "--splits", "val,test", "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert stopped.value.code == 2 and "--splits val,test: must be of val, id" in capsys.readouterr().err
