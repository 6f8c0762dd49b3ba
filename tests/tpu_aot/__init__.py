"""Kernels and programs compiled by libtpu for TPUs that are not at hand (extra tpu-aot)."""
