"""Draw what recipes cost in clean accuracy and keep under attack: one point per recipe of a file of screenings.

Run ``python scripts/draw_frontier.py docs/results/protection/screening.json docs/results/protection/frontier.svg``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Clean accuracy against retention in the worst case, means over models and targets; size by the cost."""
    with mpl.rc_context({"svg.hashsalt": "keyfoundry", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        axes = figure.subplots()
        for number, row in enumerate(rows, start=1):
            x, y = fmean(row["clean"]), fmean(row["worst"])
            face = "tab:blue" if row["keyed"] else "white"
            label = f"{number}: {row['name']}; {row['base']}, {row['images']:,} × {row['epochs']}"
            axes.scatter(x, y, s=40 * row["passes"] ** 2, facecolor=face, edgecolor="tab:blue", label=label)
            axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 4))
        axes.set(
            xlabel="clean accuracy (5,000 validation images)", ylabel="retention, worst case (300 to 1,000 of them)"
        )
        figure.legend(loc="outside lower center", frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"], Path(sys.argv[2]))
