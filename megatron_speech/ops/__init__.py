"""Operators with one dispatch each: a CUDA kernel, C++ for the CPU, and one readable PyTorch reference."""
