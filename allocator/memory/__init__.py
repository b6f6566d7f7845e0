"""Where bytes come from: host memory, page-locking for CUDA, growth in the background."""
