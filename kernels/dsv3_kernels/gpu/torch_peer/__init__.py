"""What torch is timed by: a program of its own, run by any Python that has torch (2.5 or later); jax is not needed.

    echo '{"clock": ..., "seconds": 90, "rows": [...]}' | PYTHONPATH=kernels/dsv3_kernels/gpu python -m torch_peer

torch is no dependency of `dsv3_kernels`, which imports `problems` only. Modules here import one another relatively and
nothing else of `dsv3_kernels`: under the program's name there is no such package.
"""
