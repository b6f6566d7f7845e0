"""The allocators: an address space over device, host, pinned, growing or paged memory."""
