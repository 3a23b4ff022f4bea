"""Checkpoints in the official Hugging Face format, in and out."""
