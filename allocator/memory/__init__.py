"""Memory: host memory for a heap, page-locking it for CUDA, and growing in the background."""
