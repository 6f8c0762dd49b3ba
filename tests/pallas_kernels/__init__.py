"""Kernels on a CPU: against their references, in Pallas' interpret mode, or emulated."""
