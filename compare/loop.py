"""Draw Algorithm 1's loop: compare/recorded/loop.png.

    python compare/loop.py
"""

import sys
from pathlib import Path

OUT = Path(__file__).resolve().parent / "recorded" / "loop.png"
WIDTH, HEIGHT = 2.1, 0.9
BOXES = {  # name: (x, y of its middle, text, colour)
    "demos": (1.2, 3.2, "demonstrations\n(x, y*)", "#fde2c4"),
    "prompts": (1.2, 1.2, "prompts x", "#d3e5f7"),
    "samples": (4.0, 1.2, "the policy answers,\nthe task grades: 1 or 0", "#d3e5f7"),
    "sft": (4.0, 3.2, "imitation\ngradient of L_SFT (2)", "#fde2c4"),
    "rl": (6.8, 1.2, "exploration\ngradient of L_RL (1)", "#d3e5f7"),
    "mix": (9.6, 2.2, "(1 - mu) g_RL\n+ mu g_SFT (3)", "#eeeeee"),
    "step": (12.4, 2.2, "AdamW's step:\nthe next policy", "#eeeeee"),
    "val": (12.4, 4.6, "it answers\nvalidation prompts (4)", "#d8efd3"),
    "controller": (9.6, 4.6, "controller: what would\na larger mu do? (5, 6)", "#d8efd3"),
}
ARROWS = [("demos", "sft"), ("prompts", "samples"), ("samples", "rl"), ("sft", "mix"), ("rl", "mix"), ("mix", "step"),
          ("step", "val"), ("val", "controller"), ("controller", "mix")]


def main():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("compare/loop.py: draws with matplotlib: pip install matplotlib")
    figure = Figure((13.6, 5.6), layout="constrained")
    axis = figure.add_subplot()
    for x, y, text, colour in BOXES.values():
        axis.text(x, y, text, ha="center", va="center", fontsize=11,
                  bbox=dict(boxstyle="round,pad=0.6", facecolor=colour, edgecolor="grey"))
    for start, end in ARROWS:
        x, y = BOXES[start][:2]
        to_x, to_y = BOXES[end][:2]
        if x == to_x or {start, end} == {"val", "controller"} or y == to_y:
            dx = (to_x > x) - (to_x < x)
            dy = (to_y > y) - (to_y < y)
            tail = (x + 1.05 * dx, y + 0.45 * dy)
            head = (to_x - 1.05 * dx, to_y - 0.45 * dy)
        else:
            tail = (x + 1.05, y)
            head = (to_x - 1.0, to_y + (0.25 if y > to_y else -0.25))
        axis.annotate("", head, tail, arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.3))
    axis.annotate("", (4.0, 0.55), (12.4, 1.75), arrowprops=dict(
        arrowstyle="-|>", color="black", linewidth=1.3, connectionstyle="angle,angleA=90,angleB=0,rad=8"))
    axis.text(8.4, 0.3, "and again, with the new policy", ha="center", fontsize=10, color="dimgrey")
    axis.text(9.75, 3.4, "mu", fontsize=13, style="italic")
    axis.set(xlim=(0, 13.7), ylim=(0, 5.3))
    axis.axis("off")
    figure.savefig(OUT, dpi=90)
    print(f"drawn: {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")


if __name__ == "__main__":
    main()
