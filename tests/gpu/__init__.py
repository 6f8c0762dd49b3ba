"""What needs a GPU: `pytest tests/gpu`, most of it a Hopper one.

Compiling is most of the time, so several processes side by side, a file or a part (-k) each, end sooner; each then needs
XLA_PYTHON_CLIENT_PREALLOCATE=false, and XLA_FLAGS=--xla_gpu_enable_triton_gemm=false spares them trying dozens of products.

Under compute-sanitizer, with every array in an allocation of its own, so that a step beyond its end is one beyond memory:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \\
        compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_sparse_mla.py -k "mosaic_gpu and not radient"

Without the second flag XLA's own Triton products may end the tool. Racecheck, which looks at the kernels' shared memory, is
to be kept to them, and takes minutes for more than a few small cases:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \\
        compute-sanitizer --tool racecheck --racecheck-report all --kernel-name kernel_substring=mosaic_gpu \\
        python -m pytest tests/gpu/test_attention_tasks.py

It had nothing to report on these launches (that of 20 heads without clusters or packing was not tried), on
test_indexer_topk.py -k "mosaic_gpu and (infinite or (integers and shape0))", on test_grouped_matmul.py -k "many_rows and
128-256", on the forward and backward pass of selected_attention and on a layer of decode_layer. What it says of the kernel
for few heads stands in sparse_mla/mosaic_gpu_few_heads.py.
"""
