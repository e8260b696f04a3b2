"""What a run tells a person, from the rows of its log: lines, samples, the table, curves.png."""

import copy
import dataclasses
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

EVERY = 10  # steps that share a line
COLUMNS = {"mu": "mu", "success": "success", "entropy": "entropy", "sft_loss": "sft_loss", "rl_loss": "rl_loss",
           "grad_norm": "grad", "zero_adv": "zero_adv"}  # key of a step's row: heading
MEANS = "(each line: means since the one before)"
NOTE = MEANS + " (rl_loss near 0 is right: where the ratio is 1 the advantages nearly cancel, their gradients do not)"
WORDS = {"val": "validation", "id": "training problems", "heldout": "unseen problems", "ood_rule": "changed rule",
         "ood_rule_hard": "changed rule, told otherwise", "ood_small": "another rule, small", "ood_visual": "changed look",
         "ood_length": "longer problems", "fake": "a rule that is not graded", "test": "the test file"}


class Screen:
    """Prints as the rows of a run come."""

    def __init__(self, folder: Path, config: Any, n_parameters: int, verbose: bool = False):
        self.folder, self.config = folder, config
        self.every = 1 if verbose else EVERY
        self.rows = []  # of the steps since the last line
        self.keys = None  # the columns of the last heading
        self.first = None  # the first step's row, for the time to expect
        usual = ("task", "method", "model", "device", "steps")
        changed = [f"{field.name} {getattr(config, field.name)}" for field in dataclasses.fields(config)
                   if getattr(config, field.name) != field.default and field.name not in usual]
        self.print(f"{config.task} by {config.method}: {config.model} ({n_parameters / 1e6:.2f} million parameters) on "
                   f"{config.device}, {config.steps} steps, into {folder}")
        if changed:
            self.print(f"set by the task or by you: {', '.join(changed)}")

    def print(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # of a terminal that may lack what a policy says
        tqdm.write(text.encode(encoding, "replace").decode(encoding))

    def show(self, row: dict) -> None:
        if row["kind"] == "eval":
            text = f"after step {row['step']}, {words(row['split'])}: {percent(row)} of samples right"
            if row["whole"]:
                text += f", {100 * row['best'][0]:.1f}% at its best temperature, {row['temperature']:g}"
            self.print(text)
        if row["kind"] == "step":
            self.rows.append(row)
            self.first = self.first or row
            if row["step"] % self.every == 0 or row["step"] in (1, self.config.steps):
                self.line()

    def line(self) -> None:
        """The means over the steps since the last line."""
        keys = [key for key in COLUMNS if any(key in row for row in self.rows)]
        if keys != self.keys:
            self.keys = keys
            headings = "".join(f"{COLUMNS[key]:>10}" for key in keys)
            self.print(f"{'step':>6}{headings}{'responses':>11}   minutes of about")
            self.print(NOTE if "rl_loss" in keys else MEANS)
        last = self.rows[-1]
        means = [statistics.mean(row[key] for row in self.rows if key in row) for key in keys]
        self.print(f"{last['step']:6d}" + "".join(f"{value:10.3f}" for value in means)
                   + f"{last['rollouts']:11d}{last['seconds'] / 60:10.1f} {self.expected(last):>8}")
        self.rows = []

    def expected(self, last: dict) -> str:
        """Minutes until the last step, from the steps that were seen; the evaluation after it comes on top."""
        steps = last["step"] - self.first["step"]
        if steps == 0:
            return ""
        left = (last["seconds"] - self.first["seconds"]) / steps * (self.config.steps - last["step"])
        return f"{(last['seconds'] + left) / 60:.1f}"

    def samples(self, episodes: list) -> None:
        """A conversation that was solved and one that was not, if there are."""
        for solved in (True, False):
            episode = next((episode for episode in episodes if episode.success == solved), None)
            if episode is not None:
                asked = copy.copy(episode)  # a route's prompt is of the point where it stands: of its last response
                asked.point = min(episode.point, episode.points - 1)
                self.print(f"  it was asked     {shorten(asked.prompt)}\n"
                           f"  and said         {shorten(episode.responses[-1])}\n"
                           f"  which is graded  {episode.history[-1]}")

    def finish(self, rows: list[dict]) -> None:
        """The table, the figure, and a sentence."""
        evals = [row for row in rows if row["kind"] == "eval" and row["whole"]]
        before = [row for row in evals if row["step"] == 0]
        after = [row for row in evals if row["step"] == self.config.steps]
        self.print(table({"before": before, "after": after} if before else {"after": after}))
        figure = curves(rows, self.folder / "curves.png")
        temperatures = f"{after[0]['temperature']:g} after"
        if before:
            temperatures = f"{before[0]['temperature']:g} before, {temperatures}"
        starts = {row["split"]: f"{100 * row['best'][0]:.0f} -> " for row in before}
        changes = [f"{words(row['split'])} {starts.get(row['split'], '')}{100 * row['best'][0]:.0f}" for row in after]
        last = [row for row in rows if row["kind"] == "step"][-1]
        self.print(f"Right at its best temperature ({temperatures}), %: {', '.join(changes)}. mu ended at "
                   f"{last['mu']:.2f}; {last['rollouts']} responses in {last['seconds'] / 60:.1f} minutes, the last "
                   f"evaluation apart. {figure}")


def words(split: str) -> str:
    return WORDS.get(split, split)


def shorten(text: str, most: int = 120) -> str:
    """The last line, or the text's end."""
    last = text.rstrip().rpartition("\n")[2]
    line = " ".join((last if len(last) > 20 else text).split())
    return line if len(line) <= most else "... " + line[-most:]


def percent(row: dict, key: str = "") -> str:
    share, low, high = row[key] if key else (row["success"], row["low"], row["high"])
    return f"{100 * share:.1f}% [{100 * low:.0f}, {100 * high:.0f}]"


def table(columns: dict[str, Iterable[dict]]) -> str:
    """The text of a table of success in percent; columns: {heading: eval row of each split}, see harness.evaluation."""
    columns = {heading: list(rows) for heading, rows in columns.items()}
    splits = [row["split"] for row in next(iter(columns.values()))]
    labels = [words(split) + f" ({split})" * (split in WORDS) for split in splits]
    width = max(42, *map(len, labels))
    line = f"{'right, %':{width}}"
    for heading, rows in columns.items():
        at = f"{heading}, at T = {rows[0]['temperature']:g}"
        line += f"{at:>26}{'one of ' + str(rows[0]['samples']):>11}{'as trained':>12}"
    lines = [line]
    for label, *rows in zip(labels, *columns.values()):
        cells = [f"{percent(row, 'best'):>26}{100 * row['any']:11.0f}{100 * row['success']:12.1f}" for row in rows]
        lines.append(f"{label:{width}}" + "".join(cells))
    lines.append("T: each policy's best temperature on the first line's problems; as trained, one of n: at the "
                 "temperature of training")
    return "\n".join(lines)


def curves(rows: list[dict], path: Path) -> str:
    """Draw a run from the rows of its log; what became of it, in a sentence."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No figure: pip install matplotlib"
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    figure = Figure((16, 4.5), layout="constrained")
    grid = figure.add_gridspec(3, 3)
    success, sharpness = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    mu, moves = figure.add_subplot(grid[:2, 2]), figure.add_subplot(grid[2, 2])

    def curve(axis, key, label, **style):
        points = [(row["step"], row[key]) for row in steps if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points), label=label, **style)
    curve(success, "success", "the steps' own samples", color="lightgrey", zorder=0)
    for split in dict.fromkeys(row["split"] for row in evals):
        draw_split(success, [row for row in evals if row["split"] == split])
    curve(sharpness, "entropy", "entropy, nats a token")
    curve(sharpness, "target_entropy", "its target H*", linestyle=":", color="tab:blue")
    curve(sharpness, "sft_loss", "-log p of a demonstration's token")
    curve(mu, "mu", "mu", color="black")
    curve(moves, "meta_force", "by the meta-gradient", linewidth=0.8)
    curve(moves, "entropy_force", "by the entropy", linewidth=0.8)
    success.set(title="share of samples right\nat its best temperature: dotted before training, star after",
                xlabel="step", ylim=(0, None))
    sharpness.set(title="how undecided, how far from the expert", xlabel="step", ylim=(0, None))
    mu.set(title="mu: 0 is RL, 1 is SFT", ylim=(0, 1))
    moves.set(title="what takes mu off its start", xlabel="step")
    for axis in (success, sharpness, moves):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return f"Figure: {path}"


def draw_split(axis: Any, rows: list[dict]) -> None:
    """A split at the temperature of training with its intervals; dotted and star: at the best one, before and after."""
    x = [row["step"] for row in rows]
    y = [row["success"] for row in rows]
    errors = [[row["success"] - row["low"] for row in rows], [row["high"] - row["success"] for row in rows]]
    line = axis.errorbar(x, y, errors, fmt="o-", label=words(rows[0]["split"]), linewidth=0.9, markersize=4, capsize=2)
    colour = line[0].get_color()
    for row in rows:
        if "best" in row and row["step"]:
            axis.plot(row["step"], row["best"][0], "*", markersize=9, color=colour)
        elif "best" in row:
            axis.plot([x[0], x[-1]], [row["best"][0]] * 2, ":", linewidth=0.7, color=colour)
