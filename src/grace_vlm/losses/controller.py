"""The adaptive weight of the distillation loss: a Lagrange multiplier moved online (GRACE eq. 18-20).

Training minimises L_CE subject to L_GDKD <= tau. With an exponential moving average m of the measured GDKD,

    m    <- d m + (1 - d) measured           (m starts at the first measurement; no bias correction)
    beta <- clip(beta + eta (m - tau), beta_min, beta_max)

The measurement is the unscaled GDKD of a whole optimizer step: sums over micro-batches and ranks, reduced before they
are divided. An update is in force from the next step on, so every micro-batch of a step sees one weight. (The official
code updates inside the last micro-batch's loss, which alone then uses the new value, and skips its all-reduce on a
rank without finite values, on which the others wait for ever.)

The state is two FP64 scalars on the device of the training, so that a step reads nothing to know its weight.
"""

from __future__ import annotations

import math

import torch

from grace_vlm.errors import CheckpointError, ConfigError, NonFiniteError


class AdaptiveWeight:
    """beta, its moving average, and the rule that moves it.

    Args:
        initial, minimum, maximum: beta_0 and its bounds.
        target: tau, the GDKD to settle at. The published 3.0 fits a vocabulary of 151,936.
        step_size: eta.
        ema_decay: d.
    """

    def __init__(
        self,
        initial: float = 0.5,
        minimum: float = 0.1,
        maximum: float = 1.0,
        target: float = 3.0,
        step_size: float = 0.003,
        ema_decay: float = 0.99,
    ) -> None:
        if not minimum <= initial <= maximum:
            raise ConfigError(f"adaptive weight starts at {initial}; expected within [{minimum}, {maximum}]")
        if not 0.0 <= ema_decay < 1.0:
            raise ConfigError(f"ema_decay is {ema_decay}; expected a number in [0, 1)")
        self.minimum, self.maximum = minimum, maximum
        self.target, self.step_size, self.ema_decay = target, step_size, ema_decay
        self._beta = torch.tensor(initial, dtype=torch.float64)
        self._ema = torch.tensor(math.nan, dtype=torch.float64)
        """NaN before the first measurement."""

    def to(self, device: torch.device) -> AdaptiveWeight:
        """Its state on ``device``, where ``advance`` is given measurements."""
        self._beta, self._ema = self._beta.to(device), self._ema.to(device)
        return self

    @property
    def tensor(self) -> torch.Tensor:
        """beta in force, an FP64 scalar on the device; never written in place."""
        return self._beta

    @property
    def value(self) -> float:
        """beta in force, read from the device."""
        return float(self._beta)

    @property
    def ema(self) -> float | None:
        """The moving average, read from the device; None before the first measurement."""
        ema = float(self._ema)
        return None if math.isnan(ema) else ema

    def advance(self, measured: torch.Tensor, counts: torch.Tensor) -> None:
        """Take one optimizer step's measurement where it is; nothing is read.

        Args:
            measured: FP64 scalar. counts: bool scalar, whether it is to be taken: a step without supervised tokens
                measures nothing, and one that is not finite is not to be remembered.
        """
        ema = torch.where(self._ema.isnan(), measured, self.ema_decay * self._ema + (1.0 - self.ema_decay) * measured)
        moved = (self._beta + self.step_size * (ema - self.target)).clamp(self.minimum, self.maximum)
        self._beta, self._ema = torch.where(counts, moved, self._beta), torch.where(counts, ema, self._ema)

    def update(self, measured: float) -> float:
        """``advance`` by a number of the host; returns beta for the next step."""
        measured = float(measured)
        if not math.isfinite(measured):
            raise NonFiniteError(f"the adaptive weight was given {measured}; weights are those of before the step")
        taken = self._beta.new_tensor(measured)
        self.advance(taken, torch.ones((), dtype=torch.bool, device=taken.device))
        return self.value

    def state_dict(self) -> dict[str, float | None]:
        """What exact resume needs; bounds and rates come from the recipe."""
        return {"value": self.value, "ema": self.ema}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore ``state_dict``; ``CheckpointError`` if a key is missing."""
        if set(state) != {"value", "ema"} or state["value"] is None:
            raise CheckpointError(f"adaptive weight state has {sorted(state)}; expected ['ema', 'value']")
        ema = math.nan if state["ema"] is None else state["ema"]
        self._beta, self._ema = self._beta.new_tensor(state["value"]), self._ema.new_tensor(ema)
