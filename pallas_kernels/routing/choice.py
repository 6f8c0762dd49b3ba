"""How a row's experts are chosen, and which choices the kernels for Hopper can make."""

from __future__ import annotations

import dataclasses

LANES = 32
MAX_EXPERTS, MAX_CHOICES, MAX_GROUPS = 512, 32, 32  # of the kernels


@dataclasses.dataclass(frozen=True)
class Choice:
    """How `choices` of the experts of a row are chosen, as `api.route` says it."""

    experts: int
    choices: int
    normalised: bool
    scale: float
    n_group: int = 1
    topk_group: int = 1

    def why_not(self) -> str | None:
        """Why the kernels cannot choose so, None where they can."""
        if self.experts > MAX_EXPERTS or self.experts % LANES or self.choices > MAX_CHOICES:
            limits = f"up to {MAX_EXPERTS} experts in multiples of {LANES}, and up to {MAX_CHOICES} choices"
            return f"it takes {limits}, not {self.experts} and {self.choices}"
        if self.n_group > 1 and (self.n_group > MAX_GROUPS or self.experts % (LANES * self.n_group)):
            limits = f"up to {MAX_GROUPS} groups of experts in multiples of {LANES}"
            return f"it takes {limits}, not {self.n_group} of {self.experts // self.n_group}"
        return None
