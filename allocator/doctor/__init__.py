"""What a machine has for kvheap, what kvheap will use of it, and what is missing."""
