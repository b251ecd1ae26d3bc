"""U-Flow's a-contrario test as data: from the evidence of one image to -log10 NFA."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from numpy.typing import NDArray

from metrics.nfa import TAILS, TESTS, Map, Null, tree_score
from metrics.nfa_block import block_score_of_counts
from utils.errors import UserError

METHODS = ("tree", "block")


@dataclass(frozen=True)
class AContrario:
    """Hold all settings of the test, and for the tree the null hypothesis of every scale.

    Evidence is (h, w) per scale, for `tree` the squared latents summed over the channels, for
    `block` the number of channels whose squared latent is not below the χ²_1 quantile of
    `probability`. `size` is that of the returned map, (height, width).
    """

    method: str
    size: tuple[int, int]
    channels: tuple[int, ...]  # of the latents
    nulls: tuple[Null, ...]
    tail: str = "upper"
    tests: str = "total"
    window: int = 5
    probability: float = 0.9
    high_precision: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("tail", TAILS), ("tests", TESTS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"nfa {name} {getattr(self, name)!r}: must be one of {', '.join(known)}"
                )
        if len(self.nulls) != len(self.channels):
            raise UserError(
                f"nfa: {len(self.nulls)} null hypotheses for {len(self.channels)} scales"
            )

    def score(self, evidence: Sequence[NDArray]) -> Map:
        """Return -log10 NFA (height, width) of one image; above 0 means detected."""
        if self.method == "tree":
            return tree_score(evidence, self.nulls, self.size, tail=self.tail, tests=self.tests)
        return block_score_of_counts(
            evidence, self.channels, self.size, window=self.window, probability=self.probability,
            high_precision=self.high_precision,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or YAML."""
        plain = asdict(self) | {"nulls": [list(map(float, null)) for null in self.nulls]}
        return plain | {"size": list(self.size), "channels": list(self.channels)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AContrario":
        """Read what `to_dict` wrote; `UserError` for anything else."""
        known = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) - set(known):
            raise UserError(f"nfa {data!r}: must be a mapping with {', '.join(known)}")
        try:
            height, width = (int(side) for side in data["size"])
            nulls = tuple(Null(float(mean), float(freedom)) for mean, freedom in data["nulls"])
            channels = tuple(int(count) for count in data["channels"])
            rest = {key: data[key] for key in known[4:]}
            return cls(data["method"], (height, width), channels, nulls, **rest)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError):
            raise UserError("nfa: a value is missing or wrong; export or train again") from None
