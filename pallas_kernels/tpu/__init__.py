"""What kernels for TPUs share: the chips they know, and sets of positions (sets.py)."""

from pallas_kernels.tpu.device import CHIPS, LANES, SUBLANES, Chip, chip, precision, why_not

__all__ = ["CHIPS", "LANES", "SUBLANES", "Chip", "chip", "precision", "why_not"]
