"""Draw Algorithm 1's loop: compare/recorded/loop.png.

    python compare/loop.py
"""

import sys
from pathlib import Path

OUT = Path(__file__).resolve().parent / "recorded" / "loop.png"
BOXES = {  # name: (x, y of its middle, text, colour); numbers are those of the README's steps
    "demos": (1.2, 2.8, "demonstrations\n(x, y*)", "#fde2c4"),
    "prompts": (1.2, 1.0, "prompts x", "#d3e5f7"),
    "val": (1.2, 4.6, "validation\nprompts", "#d8efd3"),
    "samples": (4.2, 1.0, "2  explore: the policy\nanswers, 1 or 0 for each", "#d3e5f7"),
    "sft": (7.4, 2.8, "3  imitate: gradient\nof L_SFT (Eq. 2)", "#fde2c4"),
    "rl": (7.4, 1.0, "gradient of\nL_RL (Eq. 1)", "#d3e5f7"),
    "look": (4.2, 4.6, "4  look ahead: the policy\nanswers; would a larger mu\nhave helped? (Eqs. 4, 5)", "#d8efd3"),
    "mu": (10.2, 4.6, "5  set mu\n(Eq. 6)", "#d8efd3"),
    "mix": (10.2, 1.9, "(1 - mu) g_RL\n+ mu g_SFT (Eq. 3)", "#eeeeee"),
    "step": (13.0, 1.9, "6  step, by AdamW:\nthe next policy", "#eeeeee"),
}
ARROWS = [("demos", "sft"), ("prompts", "samples"), ("samples", "rl"), ("sft", "mix"), ("rl", "mix"), ("mix", "step"),
          ("val", "look"), ("look", "mu"), ("mu", "mix")]


def main():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("compare/loop.py: draws with matplotlib: pip install matplotlib")
    figure = Figure((13.6, 5.4), layout="constrained")
    axis = figure.add_subplot()
    for x, y, text, colour in BOXES.values():
        axis.text(x, y, text, ha="center", va="center", fontsize=11,
                  bbox=dict(boxstyle="round,pad=0.6", facecolor=colour, edgecolor="grey"))
    for start, end in ARROWS:
        x, y = BOXES[start][:2]
        to_x, to_y = BOXES[end][:2]
        if x == to_x:
            tail, head = (x, y - 0.45), (x, to_y + 0.45)
        else:
            tail = (x + (1.4 if start == "look" else 1.15), y)
            head = (to_x - 1.3, to_y + 0.25 * ((y > to_y) - (y < to_y)))
        axis.annotate("", head, tail, arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.3))
    # From the step, below all else, to where the policy speaks.
    axis.plot([13.0, 13.0, 4.2, 4.2], [1.45, 0.15, 0.15, 0.4], color="black", linewidth=1.3)
    axis.annotate("", (4.2, 0.6), (4.2, 0.3), arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.3))
    axis.text(8.6, -0.2, "and again, with the new policy (in the warm-up, 1, with demonstrations alone)", ha="center",
              fontsize=10, color="dimgrey")
    axis.text(10.35, 3.3, "mu", fontsize=13, style="italic")
    axis.set(xlim=(0, 14.4), ylim=(-0.4, 5.3))
    axis.axis("off")
    figure.savefig(OUT, dpi=90)
    print(f"drawn: {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")


if __name__ == "__main__":
    main()
