"""How far the binned R2 of ``grace analyze`` moves with the rows that it is of.

    python benchmarks/analyze_rows.py        # reads benchmarks/results/analyze.json, which analyze_demo.py writes

The bins of the demo's whole data are taken for the truth: a draw of N rows has N first tokens, spread over the bins as
they are there, and each is wrong with its bin's share. Nothing is trained or asked; the means of bins stay where they
are, so the true spread is a little larger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from record import RESULTS

from grace_vlm.evals.charts import Bin
from grace_vlm.evals.why.fit import MIN_POINTS, line_of_bins

NUM_DRAWS = 2000


def drawn_r_squared(
    bins: Sequence[dict[str, Any]], num_rows: int, even: bool, draws: np.random.Generator
) -> list[float]:
    """R2 of each draw that has one. ``even``: every bin has as many tokens, else as many as it happens to get."""
    whole = sum(b["num"] for b in bins)
    found = []
    for _ in range(NUM_DRAWS):
        shares = [b["num"] / whole for b in bins]
        sizes = [round(num_rows * s) for s in shares] if even else draws.multinomial(num_rows, shares)
        drawn = [
            Bin(b["mean"], int(draws.binomial(size, b["num_wrong"] / b["num"])), int(size), 0.0, 1.0)
            for b, size in zip(bins, sizes, strict=True)
            if size >= (1 if even else MIN_POINTS)
        ]
        line = line_of_bins(drawn)
        if line.r_squared is not None:
            found.append(line.r_squared)
    return found


def middle(num_rows: int, kind: str) -> tuple[float, float, float]:
    """2.5 % and 97.5 % quantile of R2 over draws that have one, and the share that has none."""
    first = json.loads((RESULTS / "analyze.json").read_text(encoding="utf-8"))["whole"]["entropy"]["first"]
    found = drawn_r_squared(first[kind]["bins"], num_rows, kind == "equal_counts", np.random.default_rng(0))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high), 1 - len(found) / NUM_DRAWS


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default="256,512,1024,2400,5000", help="with commas; default: %(default)s")
    args = made.parse_args()
    print("rows   bins          R2 of the middle 95 % of draws   draws without R2")
    for num_rows in map(int, args.rows.split(",")):
        for kind in ("equal_widths", "equal_counts"):
            low, high, without = middle(num_rows, kind)
            print(f"{num_rows:5,}  {kind:12}  {low:.2f} to {high:.2f}{without:34.1%}")


if __name__ == "__main__":
    main()
