"""Causal attention of prefill and training with MLA's head sizes, forward and backward."""
