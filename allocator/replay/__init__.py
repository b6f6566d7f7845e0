"""Request traffic through a prefix cache on a heap, every byte checked.

============  ====================================================================================
module        idea
============  ====================================================================================
trace         requests: read from a file, or made up
geometry      how many bytes of KV a chunk has, by model
contents      what each chunk holds, computed from its hash id
engine_cache  an engine's paged KV cache, with the engine's own indexing
copies        how chunks are filled and read: by tensors, or through an engine's cache
timing        how long the heap's calls and the copies take
samples       the heap over time, for a picture
replay        ``Replay``: requests in order through one ``PrefixStore``
============  ====================================================================================
"""
