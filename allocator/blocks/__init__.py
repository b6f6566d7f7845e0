"""Allocated blocks: formats, block layouts, batches and handles, counts, lifetimes."""
