"""Addresses: which extents of one virtual address space are free. No tensor, no device.

Imports neither torch nor triton, so that a process that only manages addresses (a scheduler) stays
small.
"""
