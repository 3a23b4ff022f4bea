"""The parts that the FP8 GEMM kernels for Hopper (sm_90a) are made of."""
