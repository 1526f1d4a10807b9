"""How long OpenMP's threads wait for one another, which is read when torch is imported."""

from __future__ import annotations

import os

SPINS = "1000"


def spin_briefly() -> None:
    """Called by programs before anything imports torch.

    libgomp's threads spin at the end of every parallel loop, for as long as a tenth of a second. Where other work wants
    the same cores they spin while those that they wait for cannot run: a training step then takes ten to forty times as
    long. After ``SPINS`` rounds they sleep; alone on its cores a step takes what it took. What the user says holds.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
