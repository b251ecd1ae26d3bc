"""U-Flow's a-contrario test as data: from the evidence of one image to -log10 NFA."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
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
    `probability`. `size` is that of the returned map, (height, width). `nulls` and `tail`, `tests`
    belong to `tree`, the rest to `block`, which may do without nulls.
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
            self._rule(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        self._rule("size", len(self.size) == 2 and _whole(*self.size), "height, width from 1")
        self._rule("channels", self.channels and _whole(*self.channels), "whole numbers from 1")
        positive = all(len(null) == 2 and _positive(*null) for null in self.nulls)
        self._rule("nulls", positive, "pairs of mean and degrees of freedom, above 0")
        self._rule("window", _whole(self.window) and self.window > 1, "a whole number from 2")
        inside = _positive(self.probability) and self.probability < 1
        self._rule("probability", inside, "a number between 0 and 1")
        self._rule("high_precision", isinstance(self.high_precision, bool), "true or false")
        if len(self.nulls) != len(self.channels) and (self.method == "tree" or self.nulls):
            raise UserError(
                f"nfa: {len(self.nulls)} null hypotheses for {len(self.channels)} scales; "
                "give one per scale"
            )

    def _rule(self, name: str, holds: object, rule: str) -> None:
        if not holds:
            raise UserError(f"nfa {name} {getattr(self, name)!r}: must be {rule}")

    def score(self, evidence: Sequence[NDArray]) -> Map:
        """Return -log10 NFA (height, width) of one image; above 0 means detected."""
        if len(evidence) != len(self.channels):
            raise UserError(
                f"evidence of {len(evidence)} scales for an NFA test of {len(self.channels)}; "
                "the network and its test must come from one run"
            )
        if self.method == "tree":
            return tree_score(evidence, self.nulls, self.size, tail=self.tail, tests=self.tests)
        return block_score_of_counts(
            evidence, self.channels, self.size, window=self.window, probability=self.probability,
            high_precision=self.high_precision,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or YAML."""
        plain = asdict(self) | {"nulls": [list(map(float, null)) for null in self.nulls]}
        return plain | {"size": [*map(int, self.size)], "channels": [*map(int, self.channels)]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AContrario":
        """Read what `to_dict` wrote; a UserError names the key that is missing or wrong."""
        if not isinstance(data, Mapping):
            raise UserError(f"nfa {data!r}: must be a mapping of the settings of the test")
        known = [field.name for field in fields(cls)]
        if unknown := [str(key) for key in data if key not in known]:
            raise UserError(f"nfa: unknown key {unknown[0]!r}; known are {', '.join(known)}")
        if missing := [key for key in known if key not in data]:
            raise UserError(f"nfa: key {missing[0]!r} is missing; export or train again")
        lists = {key: _listed(key, data[key]) for key in ("size", "channels", "nulls")}
        pairs = [_listed("nulls", null) for null in lists["nulls"]]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"nfa nulls {data['nulls']!r}: must be pairs of mean and freedom")
        return cls(**{**data, **lists, "nulls": tuple(Null(*pair) for pair in pairs)})


def _listed(key: str, value: Any) -> tuple:
    if not isinstance(value, list | tuple):
        raise UserError(f"nfa {key} {value!r}: must be a list")
    return tuple(value)


def _whole(*values: Any) -> bool:
    return all(isinstance(v, Integral) and not isinstance(v, bool) and int(v) > 0 for v in values)


def _positive(*values: Any) -> bool:
    # stored text such as "0.9" is no number
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
    return numbers and all(math.isfinite(v) and v > 0 for v in values)
