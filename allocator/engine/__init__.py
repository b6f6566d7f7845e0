"""An engine's paged KV cache and the heap: ``store`` and ``load``."""
