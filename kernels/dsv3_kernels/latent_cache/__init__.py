"""The paged cache of MLA: latent rows in pages of 64 tokens, in BF16 or as FP8 rows of 656 bytes."""
