"""Kernels in C for what PyTorch's operators leave on the table on a CPU (see build.py)."""
