"""Request traffic through a heap, every byte checked."""
