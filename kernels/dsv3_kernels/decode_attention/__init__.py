"""MLA decoding over a paged cache of latent rows; the op is `dsv3_kernels.mla_decode`."""
