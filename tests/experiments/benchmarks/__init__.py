"""The benchmarks, on small shapes."""
