"""The allocators: address spaces over device, host, pinned, growing or paged memory."""
