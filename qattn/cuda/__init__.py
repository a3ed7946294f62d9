"""Kernels for NVIDIA GPUs: Numba compiles them to PTX, CuPy loads and launches them on its arrays.

The twins of `qattn.cpu`: a file here has the name of that over there, and so has a function.  Kernels take raw pointers
to C-contiguous arrays, and numbers; what they may assume is checked above, in `qattn.ops`.
"""
