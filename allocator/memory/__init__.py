"""Host memory for a heap: reserving it, page-locking it for CUDA, growing it in the background."""
