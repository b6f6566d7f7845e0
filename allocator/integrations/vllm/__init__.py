"""kvheap inside vLLM: a host tier in which the chunks of every group take their own bytes."""
