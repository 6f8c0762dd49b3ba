"""The experiments, run small."""
