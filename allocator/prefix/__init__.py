"""What is stored under which key, and what is evicted next."""
