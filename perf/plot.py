"""Bars from the rows that another script wrote with --json: python perf/plot.py RUN.json FILE.png --x case --y ms."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def bars(path: Path, rows: list[dict[str, Any]], title: str, *, x: str, y: str, by: str | None = None) -> None:
    """Draw `y` over `x`, in a colour for each `by`; rows without a number are left out."""
    from matplotlib import pyplot

    rows = [row for row in rows if isinstance(row.get(y), (int, float))]
    groups = list(dict.fromkeys(row[by] if by else "" for row in rows))
    places = {value: i for i, value in enumerate(dict.fromkeys(row[x] for row in rows))}
    figure, axes = pyplot.subplots(figsize=(max(6, 0.5 * len(places) * len(groups) ** 0.5), 4), layout="constrained")
    width = 0.8 / max(1, len(groups))
    for i, group in enumerate(groups):
        mine = [row for row in rows if not by or row[by] == group]
        at = [places[row[x]] + (i - (len(groups) - 1) / 2) * width for row in mine]
        axes.bar(at, [row[y] for row in mine], width, label=f"{by} {group}")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.set_xticks(list(places.values()), [str(value) for value in places], rotation=45 if len(places) > 6 else 0)
    if by:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--x", required=True, help="column of the horizontal axis")
    parser.add_argument("--y", required=True, help="column of the vertical axis")
    parser.add_argument("--by", help="column to tell apart by colour")
    args = parser.parse_args()
    run = json.loads(args.json.read_text())
    bars(args.png, run["rows"], f"{run['script']}, {run['machine']['cpu']}", x=args.x, y=args.y, by=args.by)


if __name__ == "__main__":
    main()
