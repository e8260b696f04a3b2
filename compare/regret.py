"""What should one choose who does not know how good the demonstrations are? Each method's regret over four settings.

    python compare/regret.py    # the table, and compare/recorded/regret.png, from recorded/worn.jsonl alone

A method's regret in a setting is how far its outcome is below the best method's there, in points. The outcome, the
settings and what AMFT must reach were written down before the runs: "settings" in worn.json. One setting of every
method's flags for all: those that the search chose where all demonstrations are right.
"""

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import RECORDED, Study, quiet_pipe, recorded  # noqa: E402
from compare.tables import markdown  # noqa: E402

SETTINGS = {"": "all right", "half": "half wrong", "wrong": "all wrong", "weak": "weak base"}
METHODS = {"rl": "RL", "fixed-0.1": "mu = 0.1", "fixed-0.5": "mu = 0.5", "fixed-0.9": "mu = 0.9", "sft": "SFT",
           "sft-rl": "SFT then RL", "soup": "SFT and RL, merged", "amft": "AMFT"}
CONSTANTS = ["rl", "fixed-0.1", "fixed-0.5", "fixed-0.9", "sft"]  # RL and SFT with the rates that they were given
MU = {"rl": 0.0, "fixed-0.1": 0.1, "fixed-0.3": 0.3, "fixed-0.5": 0.5, "fixed-0.7": 0.7, "fixed-0.9": 0.9, "sft": 1.0}


def outcomes(table):
    """{setting: {run: outcome of each seed}}. RL reads no demonstrations: where they are wrong it is the same run."""
    studies = {setting: Study(table, setting) for setting in SETTINGS}
    found = {}
    for setting, study in studies.items():
        found[setting] = {name: study.ends(name, "primary") for name in study.names}
        if "rl" not in study.names:
            found[setting]["rl"] = studies[""].ends("rl", "primary")
    return found


def everywhere(found):
    """Of outcomes the methods that ran in every setting."""
    names = [name for name in METHODS if all(name in own for own in found.values())]
    return {setting: {name: own[name] for name in names} for setting, own in found.items()}


def regrets(means):
    """{method: its regret in each setting} of {setting: {method: outcome}}."""
    names = next(iter(means.values()))
    return {name: [max(own.values()) - own[name] for own in means.values()] for name in names}


def pooled_deviation(found):
    """Standard deviation over seeds, one for all cells."""
    cells = [values for own in found.values() for values in own.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in cells)
    return math.sqrt(sum((len(values) - 1) * statistics.variance(values) for values in cells) / freedom)


def redrawn(found, draws, seed=0):
    """[means as other seeds might have given them]: each cell's normal, with the pooled deviation."""
    rng, deviation = random.Random(seed), pooled_deviation(found)
    return [{setting: {name: rng.gauss(statistics.mean(values), deviation / math.sqrt(len(values)))
                       for name, values in own.items()} for setting, own in found.items()} for _ in range(draws)]


def middle(values):
    """The 95% in the middle."""
    cuts = statistics.quantiles(values, n=40)
    return cuts[0], cuts[-1]


def table_of(found, draws=2000):
    """Markdown, and the sentence below it."""
    found = everywhere(found)
    means = {setting: {name: statistics.mean(values) for name, values in own.items()}
             for setting, own in found.items()}
    shown, others = regrets(means), [regrets(one) for one in redrawn(found, draws)]
    lines = []
    for name in shown:
        cells = [METHODS[name], *(f"{own[name]:.1f}" for own in means.values())]
        for summary in (statistics.mean, max):
            low, high = middle([summary(one[name]) for one in others])
            cells.append(f"{summary(shown[name]):.1f} [{low:.1f}, {high:.1f}]")
        lines.append(cells)
    least = sum(max(one["amft"]) < min(max(one[name]) for name in CONSTANTS) for one in others)
    mean = sum(sum(one["amft"]) <= min(sum(one[name]) for name in CONSTANTS) for one in others)
    seeds = {len(values) for own in found.values() for values in own.values()}
    header = ["primary, %", *SETTINGS.values(), "mean regret", "worst regret"]
    return "\n".join(markdown(header, lines)[1:]) + (
        f"\n\nMean of id and heldout at the best temperature, {'-'.join(map(str, sorted(seeds)))} seeds a cell, "
        f"deviation over seeds {pooled_deviation(found):.1f} (pooled); brackets: 95% of {draws} redrawings of "
        f"all cells. AMFT's worst regret is below every constant's in {100 * least / draws:.0f}% of them, its mean "
        f"regret not above the best constant's in {100 * mean / draws:.0f}%.")


def draw(table, path):
    """Outcome against mu in each setting, and where AMFT's runs ended."""
    from matplotlib.figure import Figure
    found, figure = outcomes(table), Figure((15, 3.4), layout="constrained")
    for axis, (setting, title) in zip(figure.subplots(1, len(SETTINGS), sharey=True), SETTINGS.items()):
        own, study = found[setting], Study(table, setting)
        known = [name for name in MU if name in own]
        axis.plot([MU[name] for name in known], [statistics.mean(own[name]) for name in known], "o-", color="tab:red")
        for name in known:
            axis.plot([MU[name]] * len(own[name]), own[name], ".", color="tab:red", alpha=0.4)
        ends = [study.of("amft", "step", seed)[-1]["mu"] for seed in study.seeds("amft")]
        axis.plot(ends, own["amft"], "*", color="black", markersize=11)
        axis.set(title=f"demonstrations {title}" if setting != "weak" else "a base too weak for RL",
                 xlabel="mu, held (0: RL, 1: SFT)", ylim=(0, None))
    figure.axes[0].set_ylabel("right at the best temperature, %\n(stars: AMFT, at the mu where it ended)")
    figure.savefig(path, dpi=110)
    print(path)


def main():
    table = recorded("worn")
    with quiet_pipe():
        print(table_of(outcomes(table)))
        draw(table, RECORDED / "regret.png")


if __name__ == "__main__":
    main()
