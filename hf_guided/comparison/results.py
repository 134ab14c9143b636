"""The runs of each family in a comparison: means, spreads and checks over the seeds, for report and plots."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilyRuns:
    """The runs of a family, sorted by seed."""

    runs: list[Mapping[str, Any]]

    @property
    def title(self) -> str:
        return self.runs[0]["title"]

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]

    def values(self, name: str) -> dict[int, float]:
        """A number of each run that has it, by seed; values that are not finite count as missing."""
        values = {run["seed"]: run["metrics"].get(name, run.get(name)) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}

    @property
    def spread(self) -> float | None:
        """The highest FID of the seeds divided by the lowest; `None` with fewer than two."""
        fids = self.values("fid").values()
        return max(fids) / min(fids) if len(fids) > 1 and min(fids) > 0 else None

    @property
    def has_bound(self) -> bool:
        """Whether its bits per dimension are an upper bound."""
        return any(run.get("bits_kind") == "bound" for run in self.runs)

    @property
    def no_bits(self) -> str | None:
        """The reason why it has no bits per dimension; `None` if it has them or no reason is known."""
        if self.values("bits_per_dim"):
            return None
        return next((run["no_bits"].rstrip(".") for run in self.runs if run.get("no_bits")), None)


def families_of(comparison: Mapping[str, Any]) -> dict[str, FamilyRuns]:
    """The runs of each family; families in their order of appearance."""
    runs = sorted(comparison["runs"], key=lambda run: run["seed"])
    names = dict.fromkeys(run["family"] for run in comparison["runs"])
    return {name: FamilyRuns([run for run in runs if run["family"] == name]) for name in names}
