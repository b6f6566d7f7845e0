"""What is free: addresses and extents of one virtual address space. No tensor, no device.

Imports neither torch nor triton, so that a process that only decides (a scheduler) stays small.
"""
