"""What needs a GPU: `pytest tests/gpu`, most of it a Hopper one.

Compiling is most of the time, so several processes side by side, a file or a part (-k) each, end sooner; each then needs
XLA_PYTHON_CLIENT_PREALLOCATE=false, and XLA_FLAGS=--xla_gpu_enable_triton_gemm=false spares them trying dozens of products.

Under compute-sanitizer, with every array in an allocation of its own, so that a step beyond its end is one beyond memory:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \\
        compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_sparse_mla.py -k "mosaic_gpu and not radient"

XLA's own Triton and cuBLAS kernels, and its trying of them, may end the tool with a segmentation fault or an illegal access;
these flags leave them out, and still a run may have to be repeated:

    XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer= \\
        --xla_disable_hlo_passes=fusion-block-level-rewriter,cublas-gemm-rewriter"

Racecheck, which looks at the kernels' shared memory, is to be kept to them, and takes minutes for more than a few small
cases:

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=... \\
        compute-sanitizer --tool racecheck --racecheck-report all --kernel-name kernel_substring=mosaic_gpu \\
        python -m pytest tests/gpu/test_attention_tasks.py tests/gpu/test_gradient_tiles.py

It had nothing to report on these two files, on test_sparse_mla.py -k "few_heads or (mosaic_gpu and equals_the_reference and
(s301 or s270)) or (unions_hold and (ascending or mixed))", on test_selected_attention.py -k "equal_the and 100", on
test_indexer_topk.py -k "mosaic_gpu and (infinite or (integers and shape0))", on test_grouped_matmul.py -k "many_rows and
128-256" and on a layer of decode_layer.
"""
