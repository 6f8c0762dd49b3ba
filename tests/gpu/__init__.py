"""Tests that need a GPU, most of them a Hopper one. docs/kernels.md says how to run them, also under compute-sanitizer."""
