"""What a run tells a person, from the rows of its log: lines, samples, the table, curves.png."""

import dataclasses
import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

EVERY = 10  # steps that share a line
COLUMNS = {"mu": "mu", "success": "success", "entropy": "entropy", "sft_loss": "sft_loss", "rl_loss": "rl_loss",
           "grad_norm": "grad", "zero_adv": "zero_adv"}  # key of a step's row: heading


class Screen:
    def __init__(self, folder: Path, config: Any, n_parameters: int, verbose: bool = False):
        self.folder, self.config, self.n_parameters = folder, config, n_parameters
        self.every = 1 if verbose else EVERY
        self.rows = []  # of the steps since the last line
        self.keys = None  # the columns, once a step was seen
        self.introduce()

    def introduce(self) -> None:
        """What this run is, in three lines."""
        config, fields = self.config, dataclasses.fields(self.config)
        usual = ("task", "method", "model", "device", "steps")
        changed = [f"{f.name} {getattr(config, f.name)}" for f in fields
                   if getattr(config, f.name) != f.default and f.name not in usual]
        self.print(f"{config.task}, method {config.method}: {config.model}, {self.n_parameters / 1e6:.2f} million parameters,"
                   f" on {config.device}; {config.steps} steps into {self.folder}")
        if changed:
            self.print(f"set for this task or by you: {', '.join(changed)}")

    def print(self, text: str) -> None:
        tqdm.write(text)

    def show(self, row: dict) -> None:
        if row["kind"] == "eval":
            self.print(f"after step {row['step']:5d}: {row['split']:12} {percent(row)}  greedy {100 * row['greedy']:.1f}")
        if row["kind"] == "step":
            self.rows.append(row)
            if row["step"] % self.every == 0 or row["step"] in (1, self.config.steps):
                self.line()

    def line(self) -> None:
        """The means over the steps since the last line."""
        last = self.rows[-1]
        keys = [key for key in COLUMNS if any(key in row for row in self.rows)]
        if keys != self.keys:
            self.keys = keys
            self.print(f"{'step':>6}" + "".join(f"{COLUMNS[key]:>10}" for key in keys) + f"{'responses':>11}{'minutes':>9}")
            if "rl_loss" in keys:
                self.print("(rl_loss is near 0 by construction: on a batch's first update the ratio is 1; its gradient is not 0)")
        means = [statistics.mean(row[key] for row in self.rows if key in row) for key in keys]
        self.print(f"{last['step']:6d}" + "".join(f"{value:10.3f}" for value in means)
                   + f"{last['rollouts']:11d}{last['seconds'] / 60:9.1f}")
        self.rows = []

    def samples(self, episodes: list) -> None:
        """A conversation that was solved and one that was not, if there are."""
        for solved in (True, False):
            episode = next((e for e in episodes if e.success == solved), None)
            if episode is not None:
                self.print(f"  a sample: {shorten(episode.prompt)}\n"
                           f"  response: {shorten(episode.responses[-1])}  -> {episode.history[-1]}")

    def finish(self, rows: list[dict]) -> None:
        """The table, the figure, and a sentence."""
        evals = [row for row in rows if row["kind"] == "eval" and row["whole"]]
        before = [row for row in evals if row["step"] == 0]
        after = [row for row in evals if row["step"] == self.config.steps]
        self.print(table({"before": before, "after": after}))
        figure = curves(rows, self.folder / "curves.png")
        changes = ", ".join(f"{b['split']} {100 * b['success']:.0f} -> {100 * a['success']:.0f}"
                            for b, a in zip(before, after))
        last = [row for row in rows if row["kind"] == "step"][-1]
        self.print(f"sampled success, %: {changes}; mu ended at {last['mu']:.2f}; {last['rollouts']} responses, "
                   f"{last['seconds'] / 60:.1f} minutes of steps; {figure}")


def shorten(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else "... " + line[-most:]


def percent(row: dict) -> str:
    return f"{100 * row['success']:5.1f} [{100 * row['low']:4.1f}, {100 * row['high']:4.1f}]"


def table(columns: dict[str, list[dict]]) -> str:
    """The text of a table of success in percent; columns: {heading: [eval row of each split]}."""
    lines = [f"{'success, %':14}" + "".join(f"{name + ': sampled [95%] any greedy':>36}" for name in columns)]
    for rows in zip(*columns.values()):
        cells = [f"{percent(row):>21}{100 * row['any']:7.0f}{100 * row['greedy']:8.0f}" for row in rows]
        lines.append(f"{rows[0]['split']:14}" + "".join(cells))
    return "\n".join(lines)


def curves(rows: list[dict], path: Path) -> str:
    """Draw a run from the rows of its log; what became of it, in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure: pip install matplotlib"
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    figure = Figure((15, 4), layout="constrained")
    success, sharpness, balance = figure.subplots(1, 3)

    def curve(axis, key, label, total=False, **style):
        points = [(row["step"], row[key]) for row in steps if row.get(key) is not None]
        if points:
            x, y = zip(*points)
            axis.plot(x, list(accumulate(y)) if total else y, label=label, **style)
    curve(success, "success", "the steps' own samples", color="lightgrey")
    for split in dict.fromkeys(row["split"] for row in evals):
        own = [row for row in evals if row["split"] == split]
        x, y = [row["step"] for row in own], [row["success"] for row in own]
        errors = [[row["success"] - row["low"] for row in own], [row["high"] - row["success"] for row in own]]
        success.errorbar(x, y, errors, fmt="o--", label=split, linewidth=0.8, markersize=4, capsize=2)
    curve(sharpness, "entropy", "entropy, nats a token")
    curve(sharpness, "sft_loss", "-log p of a demonstration's token")
    curve(balance, "mu", "mu", color="black")
    curve(balance, "meta_force", "sum of the meta-gradient's moves", total=True, linewidth=0.8)
    curve(balance, "entropy_force", "sum of the entropy's moves", total=True, linewidth=0.8)
    for axis, title in ((success, "success of sampled responses"), (sharpness, "how undecided, how like the expert"),
                        (balance, "mu, and what moved it")):
        axis.set(title=title, xlabel="step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    success.set_ylim(bottom=0)
    sharpness.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return f"figure: {path}"
