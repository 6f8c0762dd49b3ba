"""What every kernel's running softmax begins with.

With MASKED for what does not count and START for the maximum before anything did, exp(MASKED - START) is 0, and so is
exp(MASKED - x) of any larger x: no logit is infinite, so no difference is NaN.
"""

from __future__ import annotations

import math

MASKED, START = -2e30, -1e30
LAZY = 8.0  # powers of two by which weights may exceed 1 before the maximum that they refer to moves and sums are rescaled
LOG2E = math.log2(math.e)
