"""Quantisation to E4M3 fused with what comes before it: the per-token cast, SwiGLU, the transposition for Wgrad."""
