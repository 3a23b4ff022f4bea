"""What torch is timed by: a program of its own, run by any Python that has torch (2.5 or later); jax is not needed.

    echo '{"clock": ..., "seconds": 90, "rows": [...]}' | PYTHONPATH=kernels python -m dsv3_kernels.gpu.torch_peer

torch is no dependency of `dsv3_kernels`, which imports `problems` only. Modules here import one another and nothing
else of `dsv3_kernels`, which would need jax.
"""
