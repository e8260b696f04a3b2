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
from compare.logs import RECORDED, Study, flags_of, recorded, study_of, trial_values  # noqa: E402

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t
MEASURES = {"success": "Success of sampled responses", "any": "Solved by any of the samples", "greedy": "Greedy success",
            "first_try": "Success without a failed attempt",
            "step_accuracy": "Accuracy of single responses (a failed route ends early: what would follow is not counted)",
            "recognition": "Responses that read their picture (in virl: their observation) right"}


# --- statistics ---------------------------------------------------------------------------------------------------


def mean_and_half(values):
    """Mean over seeds and half-width of its 95% t-interval; no number where there is one seed."""
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), half


def interval(values, form=".1f"):
    mean, half = mean_and_half(values)
    return format(mean, form) + ("" if math.isnan(half) else f" ± {format(half, form)}")


def spread(values):
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def differences(study, name, against):
    """{split: paired differences} from another run, over the seeds that both have."""
    seeds = sorted(set(study.seeds(name)) & set(study.seeds(against)))
    return {split: [study.at_end(name, seed, split) - study.at_end(against, seed, split) for seed in seeds]
            for split in study.splits}


def sign_test(values):
    """Two-sided; 1 of no values."""
    n, k = len(values), min(sum(x < 0 for x in values), sum(x >= 0 for x in values))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)


def signals(steps):
    """The meta-gradients that had a signal: on val, over their standard errors, and by the steps' own RL gradients."""
    return ([row["meta_grad"] / row["meta_se"] for row in steps if row["meta_se"]],
            [row["meta_own"] for row in steps if row["meta_own"]])


# --- tables, as lists of lines ------------------------------------------------------------------------------------


def markdown(header, lines):
    header, *lines = ("| " + " | ".join(line) + " |" for line in (header, *lines))
    return ["", header, "|" + " --- |" * (header.count("|") - 1), *lines]


def base(study, split, measure="success"):
    """A measure of the base on a split, with the 95% interval over its problems where the log has one."""
    if split in study.pooled:
        return f"{100 * statistics.mean(study.base[part]['success'] for part in study.pooled[split]):.1f}"
    row = study.base[split]
    share = [row[key] for key in ("success", "low", "high")] if measure == "success" else row[measure]
    return ("{:.1f} [{:.0f}, {:.0f}]".format(*(100 * x for x in share)) if isinstance(share, list)
            else f"{100 * share:.1f}")


def ends(study, names, measure="success"):
    """A measure at the end of the runs of these names, on every split; first the base's."""
    lines = [["base", "-", *(base(study, split, measure) for split in study.splits)]] if study.base else []
    lines += [[name, str(len(study.seeds(name))), *(interval(study.ends(name, split, measure)) for split in study.splits)]
              for name in names]
    return markdown(["method", "seeds", *study.splits], lines)


def paired(study, names, against):
    lines = [[name, *(f"**{interval(values)}**" if abs(mean) > half else interval(values)
                       for values in differences(study, name, against).values()
                       for mean, half in [mean_and_half(values)])] for name in names]
    return markdown(["method", *study.splits], lines)


def equal_seconds(study):
    """Success when the run of spec["clock"] is over, by the seconds that a step takes, spec["costs"]: what is slower is
    cut short, between its evaluations, and what is quicker had ended."""
    costs, clock, lines = study.spec["costs"], study.spec["clock"], []
    steps = {name: study.of(name, "config")[0]["steps"] for name in costs if name in study.names}
    for name in steps:
        step = min(steps[name], costs[clock] * steps[clock] / costs[name])
        lines.append([name, f"{costs[name]:.2f}", f"{step:.0f}", *(
            interval([study.at_step(name, seed, split, step) for seed in study.seeds(name)]) for split in study.splits)])
    return markdown(["method", "seconds a step", "steps", *study.splits], lines)


def reach(study, names):
    """Steps and responses to the first evaluation on val that is at or above each goal."""
    goals, lines = study.spec["reach"], []
    for name in names:
        line = [name]
        for goal in goals:
            hits = []
            for seed in study.seeds(name):
                steps = {row["step"]: row["rollouts"] for row in study.of(name, "step", seed)}
                hits += [(row["step"], steps[row["step"]]) for row in study.of(name, "eval", seed)
                         if row["split"] == "val" and row["success"] >= goal and row["step"]][:1]
            many = f"{len(hits)} of {len(study.seeds(name))}"
            line += [f"{statistics.median(step for step, _ in hits):.0f} ({many})",
                     f"{statistics.median(responses for _, responses in hits):.0f}"] if hits else ["-", "-"]
        lines.append(line)
    return markdown(["method", *(x for goal in goals for x in (f"steps to {100 * goal:.0f}%", "responses"))], lines)


def deeds(study):
    """What the runs did: mu, responses, successes, entropy, time."""
    def mean(rows, key, form):
        values = [row[key] for row in rows if row[key] is not None]
        return format(statistics.mean(values), form) if values else "-"
    lines = []
    for name in sorted(study.names):
        steps, finals = study.of(name, "step"), study.of(name, "final")
        last = [study.of(name, "step", seed)[-10:] for seed in study.seeds(name)]
        solved = [100 * statistics.mean(own) for own in ([row["success"] for row in rows if row["success"] is not None]
                                                         for rows in last) if own]
        lines.append([name.replace("-", " "), mean(steps, "mu", ".2f"), mean(finals, "rollouts", ".0f"),
                      interval(solved) if solved else "-",
                      mean([row for rows in last for row in rows if row["entropy"]], "entropy", ".3f"),
                      mean(finals, "seconds", ".0f")])
    lines = [["run", "mean mu", "responses", "rollouts correct, last 10 rows, %", "entropy, last 10 rows",
               "seconds, evaluations included"], *lines]
    known = [i for i in range(len(lines[0])) if any(line[i] != "-" for line in lines[1:])]
    header, *lines = ([line[i] for i in known] for line in lines)
    return markdown(header, lines)


SIGNS = ("Signs of the meta-gradients, from conversations on val (with z, their size over their standard error) and from "
         "the steps' own RL gradients; those that are 0, no group having had a signal, are left out. Sign test: probability "
         "of so uneven a split of signs by chance, were they independent (with a trace, neighbours share their d theta/d "
         "mu: they are not).")


def signs(study, names):
    lines = []
    for name in names:
        z, own = signals(study.of(name, "step"))
        if z or own:
            lines.append([name.replace("-", " "), f"{sum(x < 0 for x in z)} of {len(z)}", f"{sign_test(z):.2g}",
                          f"{statistics.mean(z):+.2f}" if z else "-", str(sum(abs(x) > 2 for x in z)),
                          f"{sum(x < 0 for x in own)} of {len(own)}", f"{sign_test(own):.2g}"])
    return markdown(["run", "val: negative", "sign test p", "mean z", "abs(z) > 2", "own: negative", "sign test p"],
                    lines) if lines else []


def search(table, names):
    """Every trial of the search, by the flags in which a method's trials differ; the chosen one bold."""
    lines = []
    for name in names:
        line, pick = [name], flags_of(table, name)
        trials = [flags.split(" --") for flags in table[0]["runs"][name]]
        for flags, parts, value in zip(table[0]["runs"][name], trials, trial_values(table, name)):
            own = [part.removeprefix("--") for part in parts if not all(part in other for other in trials)]
            text = f"{' '.join(f'--{part}' for part in own)}: {value:.1f}"
            line.append(f"**{text}**" if flags == pick else text)
        lines.append(line)
    most = max(map(len, lines))
    return markdown(["method", *[""] * (most - 1)], [line + [""] * (most - len(line)) for line in lines])


def ablations(study, reference):
    """The runs whose flags are the reference's and some more."""
    return [name for name in study.names if str(study.spec["runs"].get(study.full(name))).startswith(
        f"@{study.full(reference)} ")]


def searched(study):
    return [name for name in study.names if isinstance(study.spec["runs"].get(study.full(name)), list)]


def tried(table):
    """The runs whose trials are all done."""
    done = {row["run"] for row in table[1:]}
    return [name for name, own in table[0]["runs"].items()
            if isinstance(own, list) and {f"search/{name}.{i}" for i in range(len(own))} <= done]


def commits(study):
    """Those that matrix.py noted; earlier logs had each its own."""
    found = study.spec.get("commits") or sorted({row["commit"][:12] for name in study.names
                                                 for row in study.of(name, "config")})
    return ", ".join(f"`{commit}`" for commit in found)


def together(table):
    """Success of every group's runs on its splits, a column a run."""
    studies = [Study(table, group) for group in Study(table).groups]
    names = list(dict.fromkeys(name for study in studies for name in study.names))
    return ["", "Success of sampled responses:", *markdown(["task", "split", "base", *names], [
        ["" if i else study.group, split, base(study, split),
         *(interval(study.ends(name, split)) if name in study.names else "-" for name in names)]
        for study in studies for i, split in enumerate(study.splits)])]


# --- studies ------------------------------------------------------------------------------------------------------


def plain(table):
    """Any study of runs by matrix.py: for each group success, differences from a reference run, and what was done."""
    name, reference = table[0]["study"], table[0].get("reference", "amft")
    text = [f"# {name}", "", f"Made by `python compare/tables.py {name}` from `{name}.jsonl`. Percent, at the end of the run; "
            "mean over seeds and half-width of its 95% t-interval. Base: the policy before, with the 95% interval over its "
            "problems."]
    groups = Study(table).groups
    text += together(table) if len(groups) > 1 else []
    for group in groups:
        study = Study(table, group)
        text += ["", f"## {group or 'Runs'}", "", f"Commit {commits(study)}, torch "
                 f"{study.of(study.names[0], 'config')[0]['torch']}; `python compare/rivals.py {table[0]['common']}`, and:",
                 "", *(f"- {name}: `{flags_of(table, study.full(name))}`" for name in study.names)]
        ablated = ablations(study, reference)
        methods = [name for name in study.names if name not in ablated]
        for measure, title in MEASURES.items():
            if all(row[measure] is not None for name in study.names for row in study.of(name, "eval")):
                text += ["", f"{title}:", *ends(study, methods, measure)]
        if reference in study.names and len(study.names) > 1:
            text += ["", f"Paired difference in success from {reference}, points; bold where the interval does not hold 0 "
                     "(one in twenty would by chance):"]
            text += paired(study, [name for name in methods if name != reference], reference)
        if ablated:
            text += ["", f"Ablations, {reference} with other flags. Success of sampled responses:", *ends(study, ablated),
                     "", f"Paired difference from {reference}, as above:", *paired(study, ablated, reference)]
        if "costs" in table[0]:
            text += ["", f"Success at equal seconds, those of {table[0]['clock']}, by the seconds a step that `python "
                     "benchmarks/cost.py` gives when it runs all side by side; a method with slower steps is cut short, "
                     "between two of its evaluations (its learning rate had not fallen to 0 there):", *equal_seconds(study)]
        if "reach" in table[0]:
            text += ["", "Steps and responses to the first evaluation on val at or above a rate: median over the seeds that "
                     "got there, and how many did:", *reach(study, study.names)]
        text += ["", "What the runs did:", *deeds(study), "", "mu of the last step, mean over seeds (and range):"]
        text += markdown(["run", "mu"], [[name, spread([study.of(name, "step", seed)[-1]["mu"]
                                                        for seed in study.seeds(name)])] for name in study.names])
        meta = signs(study, study.names)
        text += ["", SIGNS, *meta] if meta else []
    if "search" in table[0]:
        text += ["", "## The search", "", f"Seed {table[0]['search']['seed']}, success in percent after the run, mean over "
                 f"{' and '.join(table[0]['search'].get('splits', ['val']))}. Chosen: the best, the first of equals.",
                 *search(table, tried(table))]
    return text


def snr(table):
    """How large the meta-gradient is against its noise (see snr.py)."""
    spec, rows, lines = table[0], table[1:], []
    many = math.prod(spec["afford"])
    for source in dict.fromkeys(r["source"] for r in rows):
        for trace in sorted({r["trace"] for r in rows if r["source"] == source}):
            own = [r for r in rows if (r["source"], r["trace"]) == (source, trace)]
            signal = statistics.mean(r["value"] ** 2 - r["error"] ** 2 for r in own)
            noise = math.sqrt(statistics.mean(r["afford"] ** 2 for r in own))
            z = math.sqrt(signal) / noise if signal > 0 else 0.0
            need = f"{many * (2 / z) ** 2:,.0f}" if z > 0.01 else "no signal seen"
            lines.append([source, str(trace), f"{statistics.mean(r['value'] for r in own):+.1e}",
                          f"{sum(r['value'] < 0 for r in own)} of {len(own)}", f"{math.sqrt(max(signal, 0)):.1e}",
                          f"{noise:.1e}", f"{z:.2f}", need])
    return ["# Is the meta-gradient a signal?", "", "Made by `python compare/tables.py snr` from `snr.jsonl`: "
            f"{len({r['seed'] for r in rows})} seeds, after steps {', '.join(map(str, sorted({r['step'] for r in rows})))} "
            f"of a fixed mixture (`{spec['common']}`); {spec['prompts']} prompts x {spec['samples']} samples an estimate. "
            "Signal: root mean square of dU/dmu, less what the noise of the estimates adds to it. Noise: standard error of what a run can "
            f"afford, {many} responses. z: their ratio; responses for z = 2: what a meta-gradient would have to sample to "
            "be that sure of its sign.",
            *markdown(["estimated on", "trace", "dU/dmu, mean", "negative", "signal", f"noise of {many}", f"z of {many}",
                       "for z = 2"], lines)]


LAYOUTS = {"snr": snr}  # of the others: plain


def text(study):
    table = recorded(study)
    table[0]["study"] = study
    return "\n".join(LAYOUTS.get(study, plain)(table)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", default=sorted(path.stem for path in RECORDED.glob("*.jsonl")))
    parser.add_argument("--against", metavar="RUN", help="of the one study that is named: print differences, write nothing")
    args = parser.parse_args()
    try:
        if args.against:
            if len(args.study) != 1:
                parser.error("--against: name one study before it")
            group, _, run = args.against.rpartition("/")
            study = study_of(args.study[0], group)
            if run not in study.names:
                parser.error(f"--against {args.against}: must be one of {', '.join(study.names)}")
            return print("\n".join(paired(study, [name for name in study.names if name != run], run)[1:]))
        for study in args.study:
            (RECORDED / f"{study}.md").write_text(text(study))
            print(RECORDED / f"{study}.md")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
