"""python -m pytest -q compare/test_controllers.py: variants of the controller against enumerations."""

import itertools
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
import tasks  # noqa: E402
from compare import controllers, horizon, rivals  # noqa: E402

# torch's own, where it first loads what torch.func.jvp needs
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def expectation(weights, n, p):
    """E over all patterns of n Bernoulli(p) successes of the mean of weight_i d log P(r_i) / dp."""
    total = 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if r else 1 - p for r in pattern)
        row = weights(torch.tensor([pattern], dtype=torch.float64))[0].tolist()
        slopes = [1 / p if r else -1 / (1 - p) for r in pattern]
        total += chance * sum(w * slope for w, slope in zip(row, slopes)) / n
    return total


@pytest.mark.parametrize("n, k", [(2, 1), (4, 1), (4, 3), (5, 2), (6, 4), (8, 7)])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_pass_at_k_advantages_give_its_derivative(n, k, p):
    """Advantages of another utility: pass@k = 1 - (1 - p)^k has the derivative k (1 - p)^(k - 1)."""
    actual = expectation(lambda success: controllers.pass_advantages(success, k), n, p)
    assert actual == pytest.approx(k * (1 - p) ** (k - 1), rel=1e-9)


def enumerated(row, i, k):
    """k times: over the subsets of k with sample i, the share solved, less that of those without."""
    others = [r for j, r in enumerate(row) if j != i]
    with_i = [max((row[i], *rest)) for rest in itertools.combinations(others, k - 1)]
    without = [max(rest) for rest in itertools.combinations(others, k)]
    return k * (sum(with_i) / len(with_i) - sum(without) / len(without))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_advantages_are_means_over_subsets(k):
    """A sample's own advantage with an error that the others' cancel."""
    generator = torch.Generator().manual_seed(0)
    success = (torch.rand(20, 5, generator=generator) < 0.4).double()
    actual = controllers.pass_advantages(success, k).tolist()
    for row, values in zip(success.tolist(), actual):
        expected = [enumerated(row, i, k) for i in range(5)]
        assert values == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_amfts_own_advantage():
    """Another scale than that of the utility that pass@k generalises."""
    success = (torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    values, scale = amft.group_advantages(success)
    own = controllers.pass_advantages(success, 1)
    assert torch.allclose(values * scale, own, atol=1e-6)


def test_k_falls_from_all_but_one_to_one():
    """A k that is left out, rises, or does not end at success itself."""
    controller = controllers.Pass(amft.Config(samples=8, steps=70))
    ks = [controller.k(t) for t in range(1, 71)]
    assert ks[0] == 7 and ks[-1] == 1
    assert sorted(ks, reverse=True) == ks and set(ks) == set(range(1, 8))


def test_the_null_is_told_noise_of_the_estimates_own_error(monkeypatch):
    """A null that knows the slopes, or whose noise is smaller than theirs."""
    monkeypatch.setattr(amft.Controller, "estimates", lambda self, step: [(50.0, 2.0), (0.0, 0.0)])
    null = controllers.Null(amft.Config(seed=3))
    drawn = [null.estimates(amft.Step(t, 0.1, None)) for t in range(2000)]
    assert all(look[1] == (0.0, 0.0) and look[0][1] == 2.0 for look in drawn)
    slopes = torch.tensor([look[0][0] for look in drawn])
    assert abs(slopes.mean()) < 0.2 and 1.9 < slopes.std() < 2.1
    other = controllers.Null(amft.Config(seed=4)).estimates(amft.Step(0, 0.1, None))
    assert other != drawn[0]


def test_the_cold_look_samples_and_differentiates_at_its_own_temperature(monkeypatch):
    """Samples of one temperature and a gradient of another; a run that then trains at 0.3."""
    asked = []
    rollouts = SimpleNamespace(episodes=[0], success=torch.tensor([[0.0, 1.0]] * 3))

    def rollout(model, tokenizer, episodes, samples, max_new_tokens, temperature):
        asked.append(temperature)
        return rollouts

    def meta_gradient(model, d_theta, val, config, advantages):
        asked.append(config.temperature)
        return 1.0, 2.0
    monkeypatch.setattr(amft, "rollout", rollout)
    monkeypatch.setattr(amft, "meta_gradient", meta_gradient)
    cold = controllers.Cold(amft.Config(utility="val", warmup=0), SimpleNamespace(sample=lambda *_: None))
    cold.sensitivity = (None, None, None)
    assert cold.estimates(amft.Step(5, 0.1, random.Random(0))) == [(1.0, 2.0)]
    assert asked == [0.3, 0.3] and cold.config.temperature == 1.0


def write_path(folder, mus):
    """A log of a run whose mu at step 1, 2, ... was so."""
    folder.mkdir()
    rows = [dict(kind="step", step=t, mu=mu) for t, mu in enumerate(mus, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_replay_takes_mu_from_the_next_seeds_run(tmp_path):
    """A replay of its own seed's path, of another run's whose name only begins alike, or a step too late."""
    for name, mus in {"amft-1": [0.1, 0.2], "amft-3": [0.3, 0.4], "amft-null-2": [0.9, 0.9]}.items():
        write_path(tmp_path / name, mus)
    explores, warms_up = SimpleNamespace(entropy=1.0), None

    def mus(seed, rollouts=explores):
        config = rivals.Config(method="amft-replay", seed=seed, steps=2, replay=str(tmp_path / "amft"))
        return [controllers.Replay(config).choose_mu(amft.Step(t, 0.1, None, rollouts=rollouts)) for t in (1, 2)]
    assert mus(1) == mus(2) == [0.3, 0.4]
    assert mus(3) == mus(7) == [0.1, 0.2]
    assert mus(3, warms_up) == [1.0, 1.0]


@pytest.mark.parametrize("flags, what", [
    ("--replay {}/amft --seed 1 --steps 2", "of another seed than 1"),
    ("--replay {}/amft --seed 2 --steps 3", "has not all of --steps 3"),
    ("--seed 2 --steps 2", "needs --replay RUNS")])
def test_a_replay_of_nothing_or_of_a_shorter_run_is_one_line(tmp_path, capsys, flags, what):
    """A run that replays itself, fails at the first step that the log has not, or leaves a folder behind."""
    write_path(tmp_path / "amft-1", [0.1, 0.2])
    write_path(tmp_path / "amft-v2", [0.3, 0.3, 0.3])  # no seed
    with pytest.raises(SystemExit) as stopped:
        rivals.main(f"--task gp --smoke --method amft-replay {flags.format(tmp_path)} --device cpu "
                    f"--out {tmp_path / 'run'}".split())
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert what in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("task", ["math", "virl"])
def test_a_rule_that_a_task_has_not_is_refused(tmp_path, capsys, task):
    """A look that searches for ever for a problem of a split that is not there."""
    with pytest.raises(SystemExit) as stopped:
        rivals.main(f"--task {task} --smoke --method amft-rule --device cpu --out {tmp_path / 'run'}".split())
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "only General Points" in capsys.readouterr().err.splitlines()[-1]


def test_the_sum_adds_up_and_goes_to_an_end(monkeypatch):
    """The rule as it was: z = -2 moves mu by 0.05 (2 Phi(-2) - 1), and goes on doing so."""
    sums = controllers.Sum(amft.Config(warmup=0, **controllers.ADDS_UP))
    monkeypatch.setattr(amft.Controller, "estimates", lambda self, step: [(-4.0, 2.0)])
    sums.sensitivity = (None, None, None)
    rollouts = SimpleNamespace(entropy=1.0)
    mu = sums.choose_mu(amft.Step(1, 0.1, None, rollouts=rollouts))
    assert mu == pytest.approx(0.5 - 0.05 * 0.9544997)
    for t in range(12):
        mu = sums.choose_mu(amft.Step(t, 0.1, None, rollouts=rollouts))
    assert mu == 0.05


def test_the_other_rule_is_asked_of_the_controllers_deals_alone():
    """A utility that trains on deals which are evaluated."""
    task, rng = tasks.GeneralPoints(), random.Random(0)
    for _ in range(50):
        deal = task.sample("val_rule", rng)
        assert tasks.ROLES[tuple(sorted(deal.numbers))] == "val" and "13" in deal.prompt
    assert "val_rule" not in task.splits  # it is no evaluation


def test_the_warm_up_ends_when_the_loss_on_unseen_demonstrations_stops_falling(monkeypatch):
    """A warm-up that ends at the first loss that is not lower, or never; a state that forgets it."""
    losses = iter([3.0, 2.0, 2.5, 1.9, 2.0, 1.95, 1.91, 1.0])
    monkeypatch.setattr(controllers.AutoWarmup, "unseen_loss", lambda self, rng: next(losses))
    controller = controllers.AutoWarmup(amft.Config(steps=1000))
    over = []
    for t in range(1, 81):
        controller.before_update(amft.Step(t, 0.1, None), None, None, first=True)
        over.append(controller.explores(t + 1))
    assert over.index(True) + 1 == 70  # lows at 10, 20, 40; the third look in vain is at 70
    again = controllers.AutoWarmup(amft.Config(steps=1000))
    again.load_state_dict(controller.state_dict())
    assert again.explores(1) and again.low == 1.9


def test_the_loss_on_unseen_demonstrations_is_that_of_the_controllers_deals(monkeypatch):
    """A warm-up that is judged by training deals, or by anything but Eq. 2."""
    asked = []
    task = SimpleNamespace(sample=lambda split, rng: asked.append(split))
    mask = torch.tensor([
        [1.0, 1.0, 0.0],
        [0.0, 1.0, 1.0]])
    logps = torch.tensor([
        [-1.0, -2.0, -9.0],
        [-9.0, -3.0, -4.0]])
    monkeypatch.setattr(amft, "encode_demos", lambda *_: SimpleNamespace(response_mask=mask))
    monkeypatch.setattr(amft, "logps_of", lambda *_: logps)
    controller = controllers.AutoWarmup(amft.Config(), task)
    assert controller.unseen_loss(None) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert asked == ["val"] * 256


@pytest.mark.parametrize("name", sorted(controllers.CONTROLLERS))
def test_every_variant_runs_within_its_budget(name, tmp_path):
    """A variant that fails, samples more than --responses, or evaluates other than --splits."""
    out = tmp_path / "run"
    flags = (f"--task gp --smoke --method {name} --responses 160 --splits val --eval-n 4 --steps 5 "
             "--warmup 0 --device cpu")
    if name == "amft-replay":
        write_path(tmp_path / "amft-9", [0.4] * 5)
        flags += f" --replay {tmp_path / 'amft'}"
    rivals.main([*flags.split(), "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "final" and 100 <= rows[-1]["rollouts"] <= 160
    assert {row["split"] for row in rows if row["kind"] == "eval"} == {"val"}


@pytest.mark.parametrize("task", ["gp", "virl"])
def test_a_split_that_the_task_has_not_is_one_line(task, tmp_path, capsys):
    """A run that is refused only at its first evaluation, or with a traceback."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        flags = f"--task {task} --method amft --smoke --splits val,test --device cpu"
        rivals.main([*flags.split(), "--out", str(out)])
    assert stopped.value.code == 2 and not out.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    known = ", ".join(tasks.TASKS[task].splits)
    assert line.endswith(f"--splits val,test: must be of {known}")


def test_branches_differ_in_mu_alone(tmp_path, monkeypatch, capsys):
    """A branch that does not start where the trunk was, or whose pair has other prompts or noise."""
    monkeypatch.setattr(horizon, "LOG", tmp_path / "horizon.jsonl")
    monkeypatch.setattr(horizon, "FOLDER", tmp_path / "horizon")
    monkeypatch.setattr(horizon, "AT", (2,))
    monkeypatch.setattr(horizon, "HORIZONS", (1, 3))
    monkeypatch.setattr(horizon, "PROMPTS", 3)
    monkeypatch.setattr(horizon, "SAMPLES", 2)
    monkeypatch.setattr(horizon.running, "SAVE_SECONDS", horizon.running.SAVE_SECONDS)  # put back after
    monkeypatch.setattr(
        horizon, "FLAGS", "--task gp --smoke --warmup 0 --model base --method trunk --mu 0.5 --eval-n 4 "
                          "--eval-samples 1 --device cpu")
    seen = []
    real = amft.adamw_step

    def step(theta, grad, adam, **how):
        seen.append((adam.step, theta.clone(), grad.clone()))
        return real(theta, grad, adam, **how)
    monkeypatch.setattr(amft, "adamw_step", step)
    horizon.main(["--pairs", "2", "--only", "plain"])
    rows = horizon.rows_of(horizon.LOG)
    assert len(rows) == 4 + 2 * 2 * 2 and {row["setting"] for row in rows} == {"plain"}
    assert [row["horizon"] for row in rows if row["kind"] == "branch"] == 4 * [1, 3]
    assert all(row["success"] == sum(row["hits"]) / 8 for row in rows if row["kind"] == "branch")
    branches = [i for i, (t, _, _) in enumerate(seen) if t == 2]  # the first update of each; the trunk ends at 2
    assert len(branches) == 4
    thetas = [seen[i][1] for i in branches]
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)
    a, b, c, d = (seen[i][2] for i in branches)
    # One pair: grad = (1 - mu) g_rl + mu g_sft of the same two gradients; the other pair has others.
    assert not torch.equal(a, b) and not torch.allclose(a + b, c + d)
    table = capsys.readouterr().out
    assert "true, T = 1, after 3 steps" in table and "plain, after step 2 (2 pairs)" in table and "trace 0.98" in table
    horizon.main(["--pairs", "2", "--only", "plain"])  # all is there
    assert horizon.rows_of(horizon.LOG) == rows
