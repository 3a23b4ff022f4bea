"""Kernels of DeepSeek-V3: each op has a plain reference form and, where faster, a form for the device."""
