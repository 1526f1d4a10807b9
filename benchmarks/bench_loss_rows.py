"""The row kernels of the fused loss over block sizes and warps, beside the bytes they move (needs a GPU).

    python benchmarks/bench_loss_rows.py            # -> benchmarks/results/loss_rows.csv

512 rows of 151,936 FP32 logits of each model, a BF16 gradient; a case is ``b4096_w32``: words held at a time, warps.
``gdkd`` reads both logits twice and writes the gradient (18 bytes a word), ``entropy`` reads the teacher's once (4).
``floor`` is a device-to-device copy of as many bytes read and written in the same process.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from record import gpu, place_of, results_file, row_of, time_interleaved, write_rows

ROWS, WORDS = 512, 151_936
CONFIGURATIONS = [(b, w) for b in (512, 1024, 2048, 4096, 8192) for w in (4, 8, 16, 32) if 128 <= b // w <= 512]


def main() -> None:
    from grace_vlm.kernels.gdkd_rows import entropy_rows, gdkd_rows

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    device = gpu()
    torch.manual_seed(0)
    z, y = (torch.randn(ROWS, WORDS, device=device) * 2 for _ in range(2))
    gradient = torch.empty(ROWS, WORDS, dtype=torch.bfloat16, device=device)
    targets, weights = torch.randint(WORDS, (ROWS,), device=device), torch.rand(ROWS, device=device)
    gdkd = partial(gdkd_rows, temperature=2.0, tckd_weight=1.0, nckd_weight=4.0, decoupled=True, gradient=gradient)
    both = torch.empty(9 * ROWS * WORDS, dtype=torch.uint8, device=device)
    half = torch.empty(2 * ROWS * WORDS, dtype=torch.uint8, device=device)
    calls = {
        ("all", "floor", "gdkd_us"): partial(torch.clone, both),
        ("all", "floor", "entropy_us"): partial(torch.clone, half),
    }
    for block, warps in CONFIGURATIONS:
        case = f"b{block}_w{warps}"
        calls[case, "ours", "gdkd_us"] = partial(
            gdkd, z, y, targets, weights, weights, block_words=block, num_warps=warps
        )
        calls[case, "ours", "entropy_us"] = partial(entropy_rows, y, block_words=block, num_warps=warps)
    samples = time_interleaved({" ".join(key): call for key, call in calls.items()}, device)
    place = place_of(device)
    rows = []
    for case, impl, metric in calls:
        micro = [1000 * value for value in samples[f"{case} {impl} {metric}"]]
        rows.append(row_of("loss_rows", case, impl, metric, micro, "us", place))
        print(f"{case} {impl} {metric} {rows[-1]['p50']}", flush=True)
    write_rows(args.out or results_file("loss_rows", device), rows)


if __name__ == "__main__":
    main()
