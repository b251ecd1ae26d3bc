"""U-Flow's scorer: its likelihood map is FastFlow's; the latents' energies go to the NFA test."""

from paddle import Tensor

from .fastflow import FastFlowScorer


class UFlowScorer(FastFlowScorer):
    """Return 1 minus the levels' mean of exp(-½·mean z²), up-sampled, and its maximum.

    That is FastFlow's `probability` with `align_corners` and `blur_sigma` off (the defaults of the
    paper); its other scores and the blur serve as they do there.
    """

    def energies(self, latents: list[Tensor]) -> list[Tensor]:
        """Return per level (B, h, w) the squared latents summed over channels, for metrics/nfa."""
        return [(z * z).sum(1) for z in latents]
