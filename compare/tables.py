"""Tables of recorded runs, from compare/recorded/STUDY.jsonl alone, into STUDY.md beside it.

    python compare/tables.py            # of every study
    python compare/tables.py gp         # of this one
    python compare/tables.py gp --against fixed-0.3    # print the paired differences from this run instead
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare.logs import (  # noqa: E402
    RECORDED, Study, first, flags_of, quiet_pipe, recorded, study_of, trial_values)

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
       10: 2.262, 11: 2.228, 12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145}  # number of seeds: Student's t
MEASURES = {
    "best": "Success at each policy's own best temperature, chosen on val",
    "success": "Success of sampled responses at the temperature of training",
    "any": "Solved by any of the samples",
    "greedy": "Greedy success",
    "first_try": "Success without a failed attempt",
    "step_accuracy": "Accuracy of single responses (a failed route ends early: what would follow is "
                     "not counted)",
    "recognition": "Responses that read their picture (in virl: their observation) right",
}


# --- Statistics -----------------------------------------------------------------------------------


def mean_and_half(values):
    """Mean over seeds and half-width of its 95% t-interval; no number where there is one seed. Of more than 15, too wide."""
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return mean, math.nan
    return mean, T95[min(n, max(T95))] * statistics.stdev(values) / math.sqrt(n)


def interval(values, form=".1f"):
    """Mean and interval; of two seeds, whose interval has 12.7 times their error, both values."""
    if not values:
        return "-"
    mean, half = mean_and_half(values)
    if math.isnan(half):
        return format(mean, form)
    if len(values) == 2:
        return f"{format(mean, form)} ({', '.join(format(value, form) for value in values)})"
    return f"{format(mean, form)} ± {format(half, form)}"


def bold_interval(values):
    """Bold where the interval does not hold 0."""
    if not values:
        return "-"
    mean, half = mean_and_half(values)
    return f"**{interval(values)}**" if abs(mean) > half else interval(values)


def spread(values):
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def differences(study, name, against, split):
    """Paired differences from another run, over the seeds that both have."""
    seeds = [seed for seed in sorted(set(study.seeds(name)) & set(study.seeds(against)))
             if study.has(name, seed, split) and study.has(against, seed, split)]
    return [study.at_end(name, seed, split) - study.at_end(against, seed, split) for seed in seeds]


def sign_test(values):
    """Two-sided; 1 of no values."""
    n = len(values)
    negative = sum(x < 0 for x in values)
    fewer = min(negative, n - negative)
    as_uneven = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * as_uneven / 2 ** n)


# --- Tables, as lists of lines --------------------------------------------------------------------


def markdown(header, lines):
    rows = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
    rule = "|" + " --- |" * len(header)
    return ["", rows[0], rule, *rows[1:]]


def base(study, split, measure="success"):
    """A measure of the base on a split, with the 95% interval over its problems if the log has it."""
    if not set(study.pooled.get(split, [split])) <= study.base.keys():
        return "-"
    if split in study.pooled:
        parts = [first(study.base[part][measure]) for part in study.pooled[split]]
        return f"{100 * statistics.mean(parts):.1f}"
    row = study.base[split]
    share = row[measure]
    if measure == "success":
        share = [row["success"], row["low"], row["high"]]
    if isinstance(share, list):
        return "{:.1f} [{:.0f}, {:.0f}]".format(*(100 * x for x in share))
    return f"{100 * share:.1f}"


def ends(study, names, measure="success"):
    """A measure at the end of the runs of these names, on every split; first the base's."""
    lines = []
    if study.base:
        lines.append(["base", "-", *(base(study, split, measure) for split in study.splits)])
    for name in names:
        cells = [interval(study.ends(name, split, measure)) for split in study.splits]
        lines.append([name, str(len(study.seeds(name))), *cells])
    return markdown(["method", "seeds", *study.splits], lines)


def paired(study, names, against):
    lines = []
    for name in names:
        cells = [bold_interval(differences(study, name, against, split)) for split in study.splits]
        lines.append([name, *cells])
    return markdown(["method", *study.splits], lines)


def equal_seconds(study):
    """Success when the run of spec["clock"] is over, by the seconds of a step, spec["costs"].

    What is slower is cut short, between its evaluations, and what is quicker had ended."""
    costs, clock = study.spec["costs"], study.spec["clock"]
    names = [name for name in costs if name in study.names]
    steps = {name: study.of(name, "config")[0]["steps"] for name in names}
    seconds = costs[clock] * steps[clock]
    lines = []
    for name in names:
        step = min(steps[name], seconds / costs[name])
        line = [name, f"{costs[name]:.2f}", f"{step:.0f}"]
        for split in study.splits:
            seeds = study.seeds(name)
            line.append(interval([study.at_step(name, seed, split, step) for seed in seeds]))
        lines.append(line)
    return markdown(["method", "seconds a step", "steps", *study.splits], lines)


def first_hit(study, name, seed, goal):
    """[(step, responses)] of the first evaluation on val, after some step, at or above the goal."""
    responses = {row["step"]: row["rollouts"] for row in study.of(name, "step", seed)}
    for row in study.evaluations(name, seed, "val"):
        if row["success"] >= goal and row["step"]:
            return [(row["step"], responses[row["step"]])]
    return []


def reach(study, names):
    """Steps and responses to the first evaluation on val that is at or above each goal."""
    goals = study.spec["reach"]
    lines = []
    for name in names:
        line, seeds = [name], study.seeds(name)
        for goal in goals:
            hits = sum((first_hit(study, name, seed, goal) for seed in seeds), [])
            if hits:
                steps, responses = (statistics.median(values) for values in zip(*hits))
                line += [f"{steps:.0f} ({len(hits)} of {len(seeds)})", f"{responses:.0f}"]
            else:
                line += ["-", "-"]
        lines.append(line)
    header = ["method"]
    for goal in goals:
        header += [f"steps to {100 * goal:.0f}%", "responses"]
    return markdown(header, lines)


def present(rows, key):
    return [row[key] for row in rows if row[key] is not None]


def mean_of(rows, key, form):
    values = present(rows, key)
    return format(statistics.mean(values), form) if values else "-"


def solved_at_last(study, name):
    """Of each seed the share of its last ten rows' rollouts that were right, in percent."""
    shares = []
    for seed in study.seeds(name):
        success = present(study.of(name, "step", seed)[-10:], "success")
        if success:
            shares.append(100 * statistics.mean(success))
    return shares


def deeds(study):
    """What the runs did: mu, responses, successes, entropy, time."""
    header = ["run", "mean mu", "responses", "rollouts correct, last 10 rows, %",
              "entropy, last 10 rows", "seconds, evaluations included"]
    lines = []
    for name in sorted(study.names):
        steps, finals = study.of(name, "step"), study.of(name, "final")
        solved = solved_at_last(study, name)
        last = sum((study.of(name, "step", seed)[-10:] for seed in study.seeds(name)), [])
        lines.append([
            name.replace("-", " "),
            mean_of(steps, "mu", ".2f"),
            mean_of(finals, "rollouts", ".0f"),
            interval(solved) if solved else "-",
            mean_of([row for row in last if row["entropy"]], "entropy", ".3f"),
            mean_of(finals, "seconds", ".0f")])
    columns = zip(header, *lines)
    known = [column for column in columns if any(cell != "-" for cell in column[1:])]
    header, *lines = zip(*known)
    return markdown(header, lines)


SIGNS = (
    "Signs of the meta-gradients, from conversations on val (with z, their size over their standard "
    "error) and from the steps' own RL gradients; those that are 0, no group having had a signal, are "
    "left out. Sign test: probability of so uneven a split of signs by chance, were they independent "
    "(with a trace, neighbours share their d theta/d mu: they are not).")


def signs(study, names):
    """Of the meta-gradients that had a signal."""
    lines = []
    for name in names:
        steps = study.of(name, "step")
        z = [row["meta_grad"] / row["meta_se"] for row in steps if row["meta_se"]]
        own = [row["meta_own"] for row in steps if row["meta_own"]]
        if z or own:
            lines.append([
                name.replace("-", " "),
                f"{sum(x < 0 for x in z)} of {len(z)}",
                f"{sign_test(z):.2g}",
                f"{statistics.mean(z):+.2f}" if z else "-",
                str(sum(abs(x) > 2 for x in z)),
                f"{sum(x < 0 for x in own)} of {len(own)}",
                f"{sign_test(own):.2g}"])
    header = ["run", "val: negative", "sign test p", "mean z", "abs(z) > 2", "own: negative",
              "sign test p"]
    return markdown(header, lines) if lines else []


def search(table, names):
    """Every trial, by the flags in which a method's trials differ; the chosen one bold."""
    lines = []
    for name in names:
        line, chosen = [name], flags_of(table, name)
        trials = table[0]["runs"][name]
        parts = [flags.split(" --") for flags in trials]
        for flags, own, value in zip(trials, parts, trial_values(table, name)):
            differing = [part for part in own if not all(part in other for other in parts)]
            named = " ".join(f"--{part.removeprefix('--')}" for part in differing)
            text = f"{named}: {value:.1f}"
            line.append(f"**{text}**" if flags == chosen else text)
        lines.append(line)
    if not lines:
        return []
    most = max(map(len, lines))
    padded = [line + [""] * (most - len(line)) for line in lines]
    return markdown(["method", *[""] * (most - 1)], padded)


def together(table):
    """Success of every group's runs on its splits, a column a run."""
    studies = [Study(table, group) for group in Study(table).groups]
    names = list(dict.fromkeys(name for study in studies for name in study.names))
    lines = []
    for study in studies:
        for split in study.splits:
            known = [interval(study.ends(name, split)) if name in study.names else "-"
                     for name in names]
            group = study.group if split == study.splits[0] else ""
            before = base(study, split, study.measure) if study.base else "-"
            lines.append([group, split, before, *known])
    header = ["group", "split", "base", *names]
    title = MEASURES[studies[0].measure]
    return ["", f"{title}:", *markdown(header, lines)]


# --- Which runs -----------------------------------------------------------------------------------


def own_flags(study, name):
    """As the spec has them; None of a run that it has no more."""
    return study.spec["runs"].get(study.full(name))


def stated(table, run):
    """The flags of a run, to be read."""
    try:
        flags = flags_of(table, run)
        return f"`{flags}`" + ", of race.py" * ("--heat" in flags)
    except LookupError:
        return "of an earlier spec" if run not in table[0]["runs"] else "its search is not done"


def ablations(study, reference):
    """The runs whose flags are the reference's and some more."""
    start = f"@{study.full(reference)} "
    return [name for name in study.names if str(own_flags(study, name)).startswith(start)]


def searched(study):
    return [name for name in study.names if isinstance(own_flags(study, name), list)]


def tried(table):
    """The runs whose trials are all done."""
    done = {row["run"] for row in table[1:]}
    names = []
    for name, own in table[0]["runs"].items():
        if isinstance(own, list) and {f"search/{name}.{i}" for i in range(len(own))} <= done:
            names.append(name)
    return names


def commits(study):
    """Those that matrix.py noted; earlier logs had each its own."""
    found = study.spec.get("commits")
    if not found:
        configs = [row for name in study.names for row in study.of(name, "config")]
        found = sorted({row["commit"][:12] for row in configs})
    return ", ".join(f"`{commit}`" for commit in found)


# --- Studies --------------------------------------------------------------------------------------


def plain(table):
    """Any study of runs by matrix.py, group by group, then its search."""
    name = table[0]["study"]
    groups = Study(table).groups
    text = [
        f"# {name}", "",
        f"Made by `python compare/tables.py {name}` from `{name}.jsonl`. Percent, at the end of the "
        "run; mean over seeds and half-width of its 95% t-interval, of two seeds both in brackets. Base: the policy before, with the "
        "95% interval over its problems."]
    if len(groups) > 1:
        text += together(table)
    if "settings" in table[0]:
        from compare import regret  # which takes its markdown from here
        text += regret.everything(table)
    for group in groups:
        text += plain_group(table, Study(table, group))
    if "search" in table[0]:
        seed = table[0]["search"]["seed"]
        splits = " and ".join(table[0]["search"].get("splits", ["val"]))
        text += ["", "## The search", "",
                 f"Seed {seed}, success in percent after the run, mean over {splits}. Chosen: the "
                 "best, the first of equals.",
                 *search(table, tried(table))]
    return text


def plain_group(table, study):
    """What was run, success, differences from a reference run, and what was done."""
    reference = table[0].get("reference", "amft")
    ablated = ablations(study, reference)
    methods = [name for name in study.names if name not in ablated]
    torch = study.of(study.names[0], "config")[0]["torch"]
    text = ["", f"## {study.group or 'Runs'}", "",
            f"Commit {commits(study)}, torch {torch}; `python compare/rivals.py "
            f"{table[0]['common']}`, and:", ""]
    for name in study.names:
        text.append(f"- {name}: {stated(table, study.full(name))}")
    last = [rows[-1] for name, seed in study.runs
            for split in study.splits if (rows := study.evaluations(name, seed, split))]
    for measure, title in MEASURES.items():
        if all(row[measure] is not None for row in last):
            text += ["", f"{title}:", *ends(study, methods, measure)]
    if reference in study.names and len(study.names) > 1:
        text += ["", f"Paired difference in {study.measure} from {reference}, points; bold where the interval "
                 "does not hold 0 (one in twenty would by chance):"]
        text += paired(study, [name for name in methods if name != reference], reference)
    if ablated:
        text += ["", f"Ablations, {reference} with other flags. Success of sampled responses:",
                 *ends(study, ablated), "",
                 f"Paired difference from {reference}, as above:",
                 *paired(study, ablated, reference)]
    if "costs" in table[0]:
        text += ["", f"Success at equal seconds, those of {table[0]['clock']}, by the seconds a step "
                 "that `python benchmarks/cost.py` gives when it runs all side by side; a method with "
                 "slower steps is cut short, between two of its evaluations (its learning rate had "
                 "not fallen to 0 there):", *equal_seconds(study)]
    if "reach" in table[0]:
        text += ["", "Steps and responses to the first evaluation on val at or above a rate: median "
                 "over the seeds that got there, and how many did:", *reach(study, study.names)]
    text += ["", "What the runs did:", *deeds(study)]
    text += ["", "mu of the last step, mean over seeds (and range):", *last_mus(study)]
    meta = signs(study, study.names)
    if meta:
        text += ["", SIGNS, *meta]
    return text


def last_mus(study):
    lines = []
    for name in study.names:
        mus = present([study.of(name, "step", seed)[-1] for seed in study.seeds(name)], "mu")
        if mus:  # merged policies have none
            lines.append([name, spread(mus)])
    return markdown(["run", "mu"], lines)


def snr(table):
    """How large the meta-gradient is against its noise (see snr.py)."""
    spec, rows = table[0], table[1:]
    many = math.prod(spec["afford"])
    seeds = len({row["seed"] for row in rows})
    after = ", ".join(map(str, sorted({row["step"] for row in rows})))
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        of_source = [row for row in rows if row["source"] == source]
        for trace in sorted({row["trace"] for row in of_source}):
            own = [row for row in of_source if row["trace"] == trace]
            lines.append([source, str(trace), *signal_cells(own, many)])
    header = ["estimated on", "trace", "dU/dmu, mean", "negative", "signal", f"noise of {many}",
              f"z of {many}", "for z = 2"]
    return [
        "# Is the meta-gradient a signal?", "",
        f"Made by `python compare/tables.py snr` from `snr.jsonl`: {seeds} seeds, after steps {after} "
        f"of a fixed mixture (`{spec['common']}`); {spec['prompts']} prompts x {spec['samples']} "
        "samples an estimate. Signal: root mean square of dU/dmu, less what the noise of the estimates "
        f"adds to it. Noise: standard error of what a run can afford, {many} responses. z: their "
        "ratio; responses for z = 2: what a meta-gradient would have to sample to be that sure of its "
        "sign.", *markdown(header, lines)]


def signal_cells(rows, many):
    """Of estimates of dU/dmu: their mean, signs, size, the noise of `many` responses, their ratio."""
    values = [row["value"] for row in rows]
    signal = statistics.mean(row["value"] ** 2 - row["error"] ** 2 for row in rows)
    size = math.sqrt(max(signal, 0))
    noise = math.sqrt(statistics.mean(row["afford"] ** 2 for row in rows))
    z = size / noise
    need = f"{many * (2 / z) ** 2:,.0f}" if z > 0.01 else "no signal seen"
    return [f"{statistics.mean(values):+.1e}", f"{sum(x < 0 for x in values)} of {len(values)}",
            f"{size:.1e}", f"{noise:.1e}", f"{z:.2f}", need]


def horizon(rows):
    """What mu does to success at each horizon, and what the meta-gradient says of it (see horizon.py)."""
    from compare import horizon as study  # which takes its markdown from here
    runs = "; ".join(f"{name}: `{flags}`" for name, flags in study.SETTINGS.items())
    return [
        "# What mu does, and what the meta-gradient says", "",
        f"Made by `python compare/tables.py horizon` from `horizon.jsonl`: runs of `python amft.py "
        f"{study.FLAGS.replace('--method trunk', '--method fixed --warmup 0')} --seed {study.SEED}` and ({runs}), branched "
        f"at mu = {study.SIDES[0]} and {study.SIDES[1]} with the same prompts, demonstrations and noise; success of "
        f"{study.SAMPLES} samples of every validation deal at temperature T. Estimates: {study.PROMPTS} prompts x "
        f"{study.SAMPLES} samples.", "",
        study.table(rows)]


# --- Command line ---------------------------------------------------------------------------------

LAYOUTS = {"snr": snr, "horizon": horizon}  # of the others: plain


def text(study):
    table = recorded(study)
    table[0]["study"] = study
    return "\n".join(LAYOUTS.get(study, plain)(table)) + "\n"


def print_differences(parser, study, against):
    """Those from a run, which may have its group before a slash."""
    group, _, run = against.rpartition("/")
    study = study_of(study, group)
    if run not in study.names:
        parser.error(f"--against {against}: must be one of {', '.join(study.names)}")
    others = [name for name in study.names if name != run]
    print("\n".join(paired(study, others, run)[1:]))


def main():
    known = sorted(path.stem for path in RECORDED.glob("*.jsonl"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", default=known)
    parser.add_argument("--against", metavar="RUN",
                        help="of the one study that is named: print differences, write nothing")
    args = parser.parse_args()
    if args.against and len(args.study) != 1:
        parser.error("--against: name one study before it")
    try:
        with quiet_pipe():
            if args.against:
                return print_differences(parser, args.study[0], args.against)
            for study in args.study:
                (RECORDED / f"{study}.md").write_text(text(study))
                print(RECORDED / f"{study}.md")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
