"""What kernels for Hopper share: which device they need, tiles in Pallas' own words, and `ptx` for what Pallas has none."""

from pallas_kernels.hopper.device import NUM_SMS, REGISTER_FILE, WARPGROUP, RegisterSplit, why_not

__all__ = ["NUM_SMS", "REGISTER_FILE", "WARPGROUP", "RegisterSplit", "why_not"]
