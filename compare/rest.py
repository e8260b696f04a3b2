"""Where does a rule take mu when it is told nothing, something, or that mu is right as it is? No policy, in seconds.

    python compare/rest.py

In each simulated run the controller gets 60 estimates of dU/dmu, as in 300 steps, whose ratio to their standard error
has deviation 1 and, by situation, a mean of: 0; 0.4, as a helpful imitation would; 2 (0.3 - mu), which is 0 at mu = 0.3.
Each rule is the one that runs use: amft.update_mu, and the choose_mu of compare/controllers.py.
"""

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amft  # noqa: E402
from compare import controllers  # noqa: E402
from compare.tables import markdown  # noqa: E402

LOOKS, RUNS, STEPS = 60, 400, 5  # steps from look to look
SITUATIONS = {"no signal": lambda mu: 0.0, "imitation helps": lambda mu: 0.4,
              "mu = 0.3 is best": lambda mu: 2 * (0.3 - mu)}


def path_of(kind, config, mean, noise):
    """mu after each look of one run."""
    told = []

    class Told(kind):
        def estimates(self, step):
            return [told.pop()] if told else []
    method = Told(config)
    method.sensitivity = (None, None, None)
    path = []
    for x in noise:
        told.append((mean(method.mu) + x, 1.0))
        for t in range(STEPS):  # the look comes with the first of them
            method.choose_mu(amft.Step(t, 0.0, None, rollouts=SimpleNamespace(entropy=1.0)))
        path.append(method.mu)
    return path


def main():
    rules = {
        "AMFT": (amft.Controller, amft.Config(warmup=0, eta_h=0.0)),
        "as it was (amft-sum)": (controllers.Sum, amft.Config(warmup=0, eta_h=0.0, eta_mu=0.05))}
    noise = np.random.default_rng(0).normal(size=(RUNS, LOOKS))
    lines = []
    for name, (kind, config) in rules.items():
        for situation, mean in SITUATIONS.items():
            paths = [path_of(kind, config, mean, own) for own in noise]
            last = [path[-1] for path in paths]
            near = statistics.mean(abs(mu - 0.5) < 0.1 for mu in last)
            limit = statistics.mean(mu in (config.mu_min, config.mu_max) or abs(mu - 0.5) > 0.44 for mu in last)
            half = statistics.mean(path[LOOKS // 2 - 1] for path in paths)
            lines.append([name, situation, f"{half:.2f}", f"{statistics.mean(last):.2f} ({statistics.stdev(last):.2f})",
                          f"{100 * near:.0f}%", f"{100 * limit:.0f}%"])
    header = ["rule", "situation", "mu at half, mean", "at the end (deviation)", "within 0.1 of 0.5", "at a limit"]
    print("\n".join(markdown(header, lines)[1:]))


if __name__ == "__main__":
    main()
