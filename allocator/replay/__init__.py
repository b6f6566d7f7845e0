"""Request traffic through a prefix cache on a heap, every byte checked.

============  =============================================================================