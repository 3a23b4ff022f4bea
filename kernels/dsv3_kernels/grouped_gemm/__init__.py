"""FP8 GEMMs of experts: groups along the rows (contiguous or padded) or along the contraction."""
