"""What is handed out: formats, layouts, batches and their handles, counts, lifetimes."""
