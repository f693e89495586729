"""The fused operators, a file each: equation, shapes, PyTorch reference, dispatch.

What such a file and its kernel have to keep to, and how to add one, stands in kernels/README.md.
"""
