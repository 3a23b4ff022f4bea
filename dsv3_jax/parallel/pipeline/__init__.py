"""Pipelines: which task each rank runs when, in which order, and the program that runs them."""
