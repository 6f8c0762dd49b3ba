"""What needs a GPU: `pytest tests/gpu`, most of it a Hopper one.

Compiling is most of the time, so several processes side by side, a file or a part (-k) each, end sooner; each then needs
XLA_PYTHON_CLIENT_PREALLOCATE=false, and XLA_FLAGS=--xla_gpu_enable_triton_gemm=false spares them trying dozens of products.

Under compute-sanitizer, with every array in an allocation of its own, so that a step beyond its end is one beyond memory:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \\
        compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_sparse_mla.py -k "mosaic_gpu and not radient"

Without the second flag XLA's own Triton products may end the tool. What racecheck says and why: mosaic_gpu_attention.py of
sparse_mla.
"""
