"""AdamW in 8 bytes per parameter: parameters, gradients and both moments in bf16, parameters rounded stochastically.

bf16 has 8 bits: a step smaller than 1/256 of a weight would be rounded away, always. Rounded stochastically, up with the
probability of what is cut off, it arrives in the mean (Zamirai et al., 2020, https://arxiv.org/abs/2010.06192). The step
itself is computed in float32.
"""

from collections.abc import Callable
from typing import Any

from torchao.optim import _AdamW


class Bf16AdamW(_AdamW):
    """torchao's AdamW, whose rounding is a function of (seed, steps taken).

    Ranks have to round alike, or their parameters drift apart; and a resumed run has to round as one that was not stopped.
    """

    def __init__(self, parameters: Any, *, seed_rounding: Callable[[int], None], **options: Any) -> None:
        super().__init__(parameters, bf16_stochastic_round=True, **options)
        self.seed_rounding = seed_rounding  # called with the steps taken, before each

    def step(self, closure: Any = None) -> Any:
        """One step; leaves torch's random generators in another state."""
        steps = next((int(state["step"]) for state in self.state.values()), 0)  # kept on the CPU
        self.seed_rounding(steps)
        return super().step(closure)
