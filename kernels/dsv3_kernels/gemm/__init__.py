"""Dense FP8 GEMM: forward and the gradients of a linear layer."""
