"""Runs kernels that Triton compiled for a GPU on a CPU: their PTX, thread by thread, in NumPy.

``program`` reads PTX, ``machine`` executes it with the instructions of ``integers`` and ``floats``,
``memory`` checks each access, and ``jit`` sends the launches of Triton's JIT here.

What a launch does is compared with a reference byte by byte. Beyond that, the machine refuses what
would go unnoticed or depend on luck on a GPU: accesses that are misaligned, or outside of what the
test allows to be read and to be written; threads that access the same shared memory without a
barrier between them, or store different values to one address; barriers and shuffles that some
threads do not reach; registers and shared memory that are read before they are written. It knows
nothing of time, caches and the order of accesses to global memory, and only the instructions that
these kernels use: any other one, or an unknown modifier, is an error.
"""
