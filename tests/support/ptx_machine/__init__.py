"""Runs kernels that Triton compiled for a GPU on a CPU: their PTX, thread by thread, in NumPy.

``program`` reads PTX and ``machine`` executes it: ``steps`` says what each instruction does,
``operations`` and ``floats`` what it computes. ``memory`` checks each access, and ``jit`` sends the
launches of Triton's JIT here.

What a launch does is compared with a reference byte by byte. Beyond that, the machine refuses what
would go unnoticed or depend on luck on a GPU: accesses that are misaligned, or outside of what the
test allows to be read and to be written; threads that access the same shared memory without a
barrier between them, or store different values to one address; barriers and shuffles that some
threads do not reach; shared memory that is read before it is written; bulk copies whose bytes are
used before they have arrived, or that nobody waits for. Registers hold garbage until
they are written. The machine knows nothing of time, caches and the order of accesses to global
memory, and only the instructions that these kernels use: any other, or an unknown modifier, is an
error.
"""
