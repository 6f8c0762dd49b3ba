"""The latents that kernels are laid out for: C + R = 512 + 64 numbers a token, as in all released models."""

from __future__ import annotations

VALUE_DIM, ROTARY = 512, 64
WIDTH = VALUE_DIM + ROTARY
