"""Every kernel compiled for an H100 where there is none, and its machine code judged: `python -m dsv3_kernels.aot`."""
