"""What should one choose who does not know how good the demonstrations are? Each method's regret over four settings.

    python compare/regret.py    # the tables, and compare/recorded/regret.png, from recorded/worn.jsonl alone

A method's regret in a setting is how far its outcome is below that of the best run there, in points. The question is
asked twice: with rectified imitation, this project's default, and with the plain loss, the paper's Eq. 2; once more of both
together, with a loss between them; and of mathematics, twice, the second time on seeds of its own. Outcome, settings and
what must be reached were written down before the runs: "settings", "plain", "trsft", "graded", "few", "tasks" and "again"
in worn.json. One learning rate of each method for all settings, found where all demonstrations are right; every mixture has
that of mu = 0.5.
"""

import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import RECORDED, Study, quiet_pipe, recorded  # noqa: E402
from compare.tables import markdown  # noqa: E402

SETTINGS = {"": "all right", "half": "half wrong", "wrong": "all wrong", "weak": "weak base"}
PLAIN = {"right-nll": "all right", "half-nll": "half wrong", "wrong-nll": "all wrong", "weak-nll": "weak base"}
BETWEEN = {"right-trsft": "all right", "half-trsft": "half wrong", "wrong-trsft": "all wrong", "weak-trsft": "weak base"}
MATHEMATICS = {"math": "all right", "math-half": "half wrong", "math-wrong": "all wrong", "math-weak": "weak base"}  # plain loss
AGAIN = 30  # the first of the seeds of "again" in worn.json, judged by themselves
BY_LOSS = {"rectified": SETTINGS, "TrSFT": BETWEEN, "plain": PLAIN}  # a token's -log p times p, min(1, p / 0.1), 1
TITLES = {"all right": "demonstrations right", "half wrong": "half of them wrong", "all wrong": "all of them wrong",
          "weak base": "weak base"}
LOSSES = {"wrong": "all wrong, rectified", "slow-nll": "all wrong, plain", "form": "another form, rectified",
          "nll": "another form, plain"}
FEW = {"few": "32 shown, rectified", "few-nll": "32 shown, plain"}
# RL reads no demonstrations: its runs in a setting are those of another, to the last digit.
RL_OF = dict.fromkeys(["half", "wrong", "form", "nll", "slow-nll", "right-nll", "half-nll", "wrong-nll",
                       "right-trsft", "half-trsft", "wrong-trsft", "few", "few-nll"], "") | {
                           "weak-nll": "weak", "weak-trsft": "weak", "math-half": "math", "math-wrong": "math"}
METHODS = {"rl": "RL", "fixed-0.1": "mu = 0.1", "fixed-0.3": "mu = 0.3", "fixed-0.4": "mu = 0.4", "fixed-0.5": "mu = 0.5",
           "fixed-0.9": "mu = 0.9", "sft": "SFT", "sft-rl": "SFT then RL", "cosine": "mu falling, 0.5 to 0.05",
           "soup": "SFT and RL, merged", "race": "race of three mus", "amft-null": "AMFT told noise",
           "amft-replay": "AMFT, another seed's mu", "amft-cold": "AMFT told success at 0.3", "amft-sum": "AMFT, evidence added up",
           "amft-paper": "AMFT, Eq. 6 as printed", "amft": "AMFT"}
# Of mu: 0 and 1 are RL and SFT, at rates of their own.
CONSTANTS = ["rl", "fixed-0.1", "fixed-0.3", "fixed-0.4", "fixed-0.5", "fixed-0.9", "sft"]
# No run of its own: the held mu that race.py's heats would choose, run in full, a third more steps than the others in all.
CHOSEN = {"choice": "what a race chooses, run in full"}
RACERS = ["fixed-0.1", "fixed-0.5", "fixed-0.9"]
# Demonstrations that the grader rejects are dropped: runs of its own where half are; elsewhere see `stand_in`.
GRADED = {"fixed-0.5-graded": "mu = 0.5, graded demonstrations", "amft-graded": "AMFT, graded demonstrations"}
ROWS = METHODS | GRADED | CHOSEN
MU = {"fixed-0.1": 0.1, "fixed-0.3": 0.3, "fixed-0.4": 0.4, "fixed-0.5": 0.5, "fixed-0.7": 0.7, "fixed-0.9": 0.9}


def constants(known):
    """Of the constants those that are known."""
    return [name for name in CONSTANTS if name in known]


def outcomes(table, settings=tuple(SETTINGS)):
    """{setting: {run: outcome of each seed}}."""
    found = {}
    for setting in settings:
        study = Study(table, setting)
        found[setting] = {name: study.ends(name, "primary") for name in study.names}
        if setting in RL_OF and (shared := Study(table, RL_OF[setting]).ends("rl", "primary")):
            found[setting]["rl"] = shared
        if choice := chosen(study):
            found[setting]["choice"] = choice
        for name in GRADED:
            if (same := stand_in(setting, name)) in found[setting]:
                found[setting][name] = found[setting][same]
    return found


def stand_in(setting, name):
    """Whose runs those with graded demonstrations are; None: its own.

    Where nothing is rejected, bit for bit those without grading; where all are, RL's, at its own learning rate."""
    kind = setting.split("-")
    if "wrong" in kind:
        return "rl"
    return name.replace("-graded", "") if setting == "math" or {"", "right", "weak"} & {*kind} else None


def chosen(study):
    """Outcome of each seed: of the held mu whose samples were right most often in steps 31 to 50; of equals the lowest."""
    def heat(name, seed):
        return statistics.mean(row["success"] for row in study.of(name, "step", seed) if 30 < row["step"] <= 50)
    seeds = [seed for seed in study.seeds("fixed-0.5") if all((name, seed) in study.runs for name in RACERS)]
    best = [max(RACERS, key=lambda name: heat(name, seed)) for seed in seeds]
    return [study.at_end(name, seed, "primary") for name, seed in zip(best, seeds)]


def runs_of(own):
    """`own` without what is chosen among its runs, or had its demonstrations graded."""
    return {name: values for name, values in own.items() if name.partition(",")[0] not in CHOSEN | GRADED}


def averages(found):
    """{setting: {run: mean outcome}}."""
    return {setting: {name: statistics.mean(values) for name, values in own.items()}
            for setting, own in found.items()}


def everywhere(found):
    """The methods that ran in every setting. ValueError where AMFT, or a constant that ran in more than one, did not."""
    missing = [f"{setting}/{name}" for setting, own in found.items() for name in ROWS if name not in own]
    often = [name for name in CONSTANTS if sum(name in own for own in found.values()) > 1]
    needed = [name for name in missing if name.rpartition("/")[2] in ("amft", *often)]
    if needed:
        raise ValueError(f"there are no runs of {', '.join(needed)}")
    return [name for name in ROWS if not any(one.endswith(f"/{name}") for one in missing)]


def regrets(means, names, found):
    """{method: its regret in each setting} of {setting: {run: outcome}}; the best there has two seeds at least in `found`."""
    best = {setting: max(own[run] for run, values in runs_of(found[setting]).items() if len(values) > 1)
            for setting, own in means.items()}
    return {name: [best[setting] - own[name] for setting, own in means.items()] for name in names}


def deviation(setting, own):
    """Standard deviation over seeds, one for all runs of a setting, but for those where every seed has 0."""
    borrowed = {*CHOSEN, *stood(setting, own), *(["rl"] if setting in RL_OF else [])}
    cells = [values for name, values in own.items() if name not in borrowed and len(values) > 1 and any(values)]
    freedom = sum(len(values) - 1 for values in cells)
    if not freedom:
        raise ValueError(f"setting '{setting}' has no run of two seeds")
    return math.sqrt(sum((len(values) - 1) * statistics.variance(values) for values in cells) / freedom)


def stood(setting, own):
    """{graded row: the run that stands in for it} of a setting."""
    return {name: same for name in own if name.partition(",")[0] in GRADED and (same := stand_in(setting, name))}


def redrawn(found, draws, seed=0):
    """[means that these seeds leave open]: normal around those seen, with their error; never below 0."""
    rng, made = random.Random(seed), []
    spread = {setting: deviation(setting, own) for setting, own in found.items()}
    for _ in range(draws):
        means, rl = {}, {}
        for setting, own in found.items():
            shared = stood(setting, own)
            error = {name: any(values) * spread[setting] / math.sqrt(len(values)) for name, values in own.items()}
            means[setting] = {name: max(rng.gauss(statistics.mean(values), error[name]), 0)
                              for name, values in own.items() if name not in shared}
            if "rl" in own:  # shared runs are drawn once
                means[setting]["rl"] = rl.setdefault(RL_OF.get(setting, setting), means[setting]["rl"])
            means[setting].update({name: means[setting][same] for name, same in shared.items()})
        made.append(means)
    return made


def middle(values):
    """The 95% in the middle, as text."""
    cuts = statistics.quantiles(values, n=40)
    return f"[{cuts[0]:.1f}, {cuts[-1]:.1f}]"


def earns_its_place(regret):
    """As worn.json says: AMFT's worst regret below every constant's, its mean not above the best constant's."""
    return beats(regret, constants(regret))


def beats(regret, rivals):
    """AMFT's worst regret is below each of the rivals', its mean not above the best of theirs."""
    held = [regret[name] for name in rivals]
    return max(regret["amft"]) < min(map(max, held)) and sum(regret["amft"]) <= min(map(sum, held))


def rows(seen, means, open_ones):
    """Cells of each method: its success, its mean and its worst regret; of "NAME, LOSS", too."""
    lines = []
    for name in seen:
        method, comma, loss = name.partition(", ")
        cells = [ROWS[method] + comma + loss, *(f"{own[name]:.1f}" for own in means.values())]
        for summary in (statistics.mean, max):
            cells.append(f"{summary(seen[name]):z.1f} {middle([summary(one[name]) for one in open_ones])}")
        lines.append(cells)
    return lines


def section(table, settings=SETTINGS, title="Regret", draws=2000):
    """Lines: the table, and what it says of AMFT."""
    found = outcomes(table, settings)
    names = everywhere(found)
    means = averages(found)
    open_ones = [regrets(one, names, found) for one in redrawn(found, draws)]
    seen = regrets(means, names, found)
    lines = rows(seen, means, open_ones)
    differences = []
    for summary, what in ((statistics.mean, "mean"), (max, "worst")):
        best = min(constants(seen), key=lambda name: summary(seen[name]))
        differences.append(f"{what} regret less that of {METHODS[best]}, the least of a constant's: {difference(summary, best, seen, open_ones)}")
    share = 100 * statistics.mean(earns_its_place(one) for one in open_ones)
    spreads = ", ".join(f"{deviation(setting, own):.1f}" for setting, own in found.items())
    counts = ", ".join(str(max(len(values) for values in own.values())) for own in found.values())
    best = ", ".join(max((name for name, values in runs_of(found[setting]).items() if len(values) > 1), key=own.get)
                     for setting, own in means.items())
    header = ["success, %", *settings.values(), "mean regret", "worst regret"]
    return [
        "", f"## {title}", "",
        "Mean of id and heldout, at each policy's best temperature. Regret: points below the setting's best "
        f"run of two seeds or more ({best}). Seeds in the settings, at most: {counts}; standard deviation over seeds: {spreads}. "
        f"Brackets: 95% of {draws} redrawings of all means with their errors; a regret is of a highest mean, so they lie above what is "
        "seen." + " `soup` chose among eight merged policies with 7,040 responses more than the others had." * ("soup" in names),
        *markdown(header, lines), "",
        f"AMFT's {'; its '.join(differences)}. What was to be reached, a worst regret below every constant's and a mean "
        f"not above the best constant's, is {'' if earns_its_place(seen) else 'not '}reached by the means, and reached "
        f"in {share:.0f}% of the redrawings.", *falling(seen, open_ones), *graded(seen, open_ones)]


def falling(seen, open_ones):
    """Lines: does AMFT beat a mu that falls whatever it sees?"""
    if "cosine" not in seen:
        return []
    share = 100 * statistics.mean(beats(one, ["cosine"]) for one in open_ones)
    worst, mean = (difference(summary, "cosine", seen, open_ones) for summary in (max, statistics.mean))
    return ["", f"AMFT's regrets less those of a mu that falls from 0.5 to 0.05 whatever it sees: worst regret {worst}, mean regret {mean}. "
            f"That AMFT's worst is lower and its mean not higher {'holds' if beats(seen, ['cosine']) else 'does not hold'} by the means, "
            f"and holds in {share:.0f}% of the redrawings."]


def difference(summary, rival, seen, open_ones):
    """AMFT's mean or worst regret less a rival's, as text."""
    values = [summary(one["amft"]) - summary(one[rival]) for one in open_ones]
    return f"{summary(seen['amft']) - summary(seen[rival]):+.1f} {middle(values)}"


def graded(seen, open_ones):
    """Lines: what grading the demonstrations is worth."""
    if "fixed-0.5-graded" not in seen:
        return []
    share, ties = (100 * statistics.mean(test(one) for one in open_ones) for test in (grading_is_insurance, grading_changes_nothing))
    return ["", "Graded demonstrations: those that RL's grader rejects are dropped. Where all are right, and from the weak base, that is "
            "none, where all are wrong all, which leaves RL: those cells are the other rows' runs. They set no best. That mu = 0.5 has a "
            f"worst regret below AMFT's and every constant's then {'holds' if grading_is_insurance(seen) else 'does not hold'} by the "
            f"means, and holds in {share:.0f}% of the redrawings; in {ties:.0f}% it has the worst regret that it has without grading."]


def grading_changes_nothing(regret):
    return max(regret["fixed-0.5-graded"]) == max(regret["fixed-0.5"])


def pooled(table):
    """{setting: {"rl" or "NAME, LOSS": outcome of each seed}}, the runs with any of the three losses."""
    found = {setting: {} for setting in SETTINGS}
    for loss, settings in BY_LOSS.items():
        for own, (group, runs) in zip(found.values(), outcomes(table, settings).items()):
            own.update({name if name == "rl" else f"{name}, {loss}": values for name, values in runs.items() if name not in CHOSEN})
    return found


def any_loss(table, draws=2000):
    """Lines: each constant's and AMFT's regret to the best run with any loss."""
    found = pooled(table)
    wanted = ["rl", *(f"{name}, {loss}" for name in [*CONSTANTS[1:], "sft-rl", "amft", *GRADED] for loss in BY_LOSS)]
    names = [name for name in wanted if all(name in own for own in found.values())]
    if "amft, TrSFT" not in names:
        return []
    means = averages(found)
    open_ones = [regrets(one, names, found) for one in redrawn(found, draws)]
    seen = regrets(means, names, found)
    claims = [("That the worst regret of a constant with TrSFT is below that of every constant and of AMFT with another loss", is_insurance),
              ("That AMFT with TrSFT has a worst and a mean regret below those of both constants with it", learns_mu)]
    if "fixed-0.5-graded, TrSFT" in seen:
        claims.append(("That mu = 0.5 with TrSFT and graded demonstrations has a worst regret below those of AMFT and both constants with "
                       "it, and of RL", partial(grading_is_insurance, loss=", TrSFT")))
    verdicts = [f"{what} {'holds' if holds(seen) else 'does not hold'} by the means, and holds in "
                f"{100 * statistics.mean(holds(one) for one in open_ones):.0f}% of the redrawings."
                for what, holds in claims]
    return ["", "## Regret, whichever loss", "",
            "To the setting's best run of two seeds or more with any of the losses. TrSFT: a token's -log p times min(1, p / 0.1), "
            "between rectified (p) and plain (1), as all else at a learning rate of its own."
            + " Rows of graded demonstrations set no best." * any("graded" in name for name in names),
            *markdown(["success, %", *SETTINGS.values(), "mean regret", "worst regret"], rows(seen, means, open_ones)), "",
            " ".join(verdicts)]


def between(regret):
    """The constants with TrSFT."""
    return [f"{name}, TrSFT" for name in CONSTANTS if f"{name}, TrSFT" in regret]


def is_insurance(regret):
    """As worn.json says of TrSFT's constants."""
    others = [name for name in runs_of(regret) if not name.endswith("TrSFT") and not name.startswith("sft-rl")]
    return min(max(regret[name]) for name in between(regret)) < min(max(regret[name]) for name in others)


def learns_mu(regret):
    """As worn.json says of AMFT with TrSFT."""
    own = regret["amft, TrSFT"]
    return all(max(own) < max(regret[name]) and sum(own) < sum(regret[name]) for name in between(regret))


def grading_is_insurance(regret, loss=""):
    """As worn.json says of mu = 0.5 with graded demonstrations; loss: "", or as the names in `regret` end."""
    others = [name for name in regret if name.removesuffix(loss) in ("amft", *CONSTANTS)]
    return max(regret["fixed-0.5-graded" + loss]) < min(max(regret[name]) for name in others)


def both(table):
    """Lines: of the methods that ran everywhere with either loss, success and regret, rectified / plain in each cell."""
    sides = [outcomes(table, settings) for settings in (SETTINGS, PLAIN)]
    names = [name for name in everywhere(sides[0]) if name in everywhere(sides[1])]
    columns = []
    for found in sides:
        means = averages(found)
        regret = regrets(means, names, found)
        columns.append([*means.values(), *({name: summary(regret[name]) for name in names}
                                           for summary in (statistics.mean, max))])
    lines = [[ROWS[name], *(f"{one[name]:.1f} / {other[name]:.1f}" for one, other in zip(*columns))] for name in names]
    return markdown(["%, rectified / plain", *SETTINGS.values(), "mean regret", "worst regret"], lines)[1:]


def seed_by_seed(table, settings, names=METHODS):
    """Lines: a table of outcomes, each seed's in brackets."""
    found, lines = outcomes(table, settings), []
    for name in names:
        cells = []
        for own in found.values():
            each = ", ".join(f"{value:.1f}" for value in own.get(name, []))
            cells.append(f"{statistics.mean(own[name]):.1f} ({each})" if each else "-")
        if set(cells) != {"-"}:
            lines.append([METHODS[name], *cells])
    return markdown(["success, %", *settings.values()], lines)


def losses(table):
    """Lines: bad demonstrations by their loss."""
    return ["", "## Bad demonstrations and their loss", "",
            "The same outcome; each seed in brackets. All wrong: formulas that miss 24. Another form: right ones, written 24=... in "
            "place of ...=24, which counts as wrong. Plain: Eq. 2 as printed; rectified: times each token's own probability.",
            *seed_by_seed(table, LOSSES)]


def few(table):
    """Lines: few demonstrations."""
    if not any(Study(table, setting).names for setting in FEW):
        return []
    return ["", "## Few demonstrations", "",
            "The same outcome; each seed in brackets. All demonstrations are right, and only those of 32 problems are shown, a batch.",
            *seed_by_seed(table, FEW)]


def elsewhere(table, draws=2000):
    """Lines: the same question in mathematics."""
    if not Study(table, "math").names:
        return []
    lines = [*section(table, MATHEMATICS, "Mathematics: regret with the plain loss", draws), "", "Each seed in brackets:",
             *seed_by_seed(table, MATHEMATICS)]
    again = since(table, AGAIN)
    if len(again) > 1:
        lines += section(again, MATHEMATICS, f"Mathematics again: seeds from {AGAIN} on alone", draws)
    return lines


def since(table, seed):
    """The spec, and the rows of the runs of mathematics from a seed on."""
    return [table[0], *(row for row in table[1:] if row["seed"] >= seed and row["run"].rpartition("/")[0] in MATHEMATICS)]


def deciding(table):
    """Lines: the two rows that decide."""
    return ["", "## AMFT and mu = 0.5, seed by seed", "", "With the rectified loss; from seed 20 on.",
            *seed_by_seed(table, SETTINGS, ["fixed-0.5", "amft"])]


def everything(table):
    """Lines of all tables."""
    lines = section(table) + section(table, PLAIN, "Regret with the plain loss") + deciding(table) + any_loss(table) + losses(table)
    return lines + few(table) + elsewhere(table)


def draw(table, path):
    """Outcome against mu in each setting, rectified above and plain below, then mathematics, and where AMFT's runs ended."""
    from matplotlib.figure import Figure
    questions = {"General Points, rectified loss": SETTINGS, "General Points, plain loss": PLAIN, "mathematics, plain loss": MATHEMATICS}
    figure = Figure((13, 9.9), layout="constrained")
    axes = figure.subplots(len(questions), len(SETTINGS), sharey="row")
    for row, (what, settings) in zip(axes, questions.items()):
        for axis, (setting, title) in zip(row, settings.items()):
            panel(axis, Study(table, setting), outcomes(table, [setting])[setting])
            axis.set_title(TITLES[title], fontsize=10)
        row[0].set_ylabel(f"{what}:\nright at the best temperature, %")
    for axis in axes[-1]:
        axis.set_xlabel("mu (beyond the line: without one)")
    highest = max(row[0].get_ylim()[1] for row in axes[:2])  # when all is drawn: a limit ends the autoscaling
    for row in axes[:2]:  # General Points, to one scale
        row[0].set_ylim(top=highest)
    for row in axes:
        row[0].set_ylim(bottom=-0.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=9)
    figure.savefig(path, dpi=110)
    print(path)


def panel(axis, study, own):
    """One setting; own: {run: outcome of each seed}."""
    held = [name for name in MU if name in own]
    axis.plot([MU[name] for name in held], [statistics.mean(own[name]) for name in held], "o-", color="tab:red",
              label="mu held")
    ends = {"rl": (0, "RL", "tab:orange", "s"), "sft": (1, "SFT", "tab:blue", "D"),
            "sft-rl": (1.12, "SFT then RL", "tab:green", "^"),
            "soup": (1.2, "SFT and RL, merged", "tab:purple", "v")}
    for name, (place, label, colour, marker) in ends.items():
        if name in own:
            axis.plot(place, statistics.mean(own[name]), marker, color=colour, label=label)
            axis.plot([place] * len(own[name]), own[name], ".", color=colour, alpha=0.5)
    axis.plot([], [], ".", color="grey", label="a seed")
    for name in held:
        axis.plot([MU[name]] * len(own[name]), own[name], ".", color="tab:red", alpha=0.5)
    if "fixed-0.5-graded" in own:
        axis.plot(0.5, statistics.mean(own["fixed-0.5-graded"]), "P", color="tab:cyan", markersize=9, label=GRADED["fixed-0.5-graded"])
    last = [study.of("amft", "step", seed)[-1]["mu"] for seed in study.seeds("amft")]
    axis.plot(last, own["amft"], "*", color="black", markersize=11, label="AMFT, a seed, at its last mu")
    axis.axhline(statistics.mean(own["amft"]), color="black", linewidth=0.8, linestyle=":", label="AMFT, mean")
    axis.axvline(1.06, color="lightgrey", linewidth=0.8)
    axis.set(xticks=[0, 0.1, 0.3, 0.5, 0.7, 0.9, 1], xticklabels=["0", ".1", ".3", ".5", ".7", ".9", "1"])


def main():
    table = recorded("worn")
    with quiet_pipe():
        try:
            print("\n".join(everything(table)[2:]))
            draw(table, RECORDED / "regret.png")
        except (ValueError, ImportError) as error:
            sys.exit(f"regret.py: {error}")


if __name__ == "__main__":
    main()
