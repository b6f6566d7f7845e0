"""What each command says of itself with ``--help``."""

from __future__ import annotations

__all__ = [
    "BENCH_HELP",
    "BENCH_NOTES",
    "CALIBRATE_HELP",
    "CALIBRATE_NOTES",
    "DOCTOR_HELP",
    "DOCTOR_NOTES",
    "PLOT_HELP",
    "REPLAY_HELP",
    "REPLAY_NOTES",
]

REPLAY_HELP = """\
Replay request traffic as a serving engine with a prefix cache would, and check every byte.

For each request, the leading chunks that the heap holds are hits: they are gathered and compared
with what was stored. The others are stored by one batched_allocate. When the heap is full, chunks
are evicted first, in the order of --policy, and freed by one batched_free.

With --engine-layout, chunks go through a paged KV cache in the layout of that engine. Hits are
loaded from the heap into random blocks of the cache, and compared at the places where the engine
would read them. Missing chunks are written to random blocks of the cache, and stored from there by
one batched_store.
"""

REPLAY_NOTES = """\
geometries (KV of one chunk of 512 tokens):
  tiny              4 KiB   1 layer, 1 head, head dim 2, fp16
  small            32 KiB   2 layers, 2 KV heads, head dim 4, fp16
  small-nvfp4     144 KiB   2 layers, 2 KV heads, head dim 64, NVFP4: 36 bytes a head
  small-mla        16 KiB   MLA: 2 layers, 8 elements a token, bf16
  small-indexer   132 KiB   2 layers, 132 bytes a token: 128 values and a scale
  small-opaque     12 KiB   2 layers, 32 blocks of 192 bytes
  llama-3-8b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  llama-3-8b-nvfp4 18 MiB   the same in NVFP4: 72 bytes a head
  llama-3-70b     160 MiB   80 layers, 8 KV heads, head dim 128, bf16
  llama-3-70b-tp4  40 MiB   one rank of four
  mistral-7b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  qwen2.5-0.5b      6 MiB   24 layers, 2 KV heads, head dim 64, bf16
  qwen3-8b         72 MiB   36 layers, 8 KV heads, head dim 128, bf16
  gpt-oss-20b      24 MiB   24 layers, 8 KV heads, head dim 64, bf16
  deepseek-v3    34.3 MiB   MLA: 61 layers, 576 elements a token, bf16

engine layouts (blocks of 16 tokens):
  K and V      vllm-flash-nhd, vllm-flash-hnd, vllm-flashinfer-nhd, vllm-flashinfer-hnd,
               vllm-lbhnc, vllm-lbnhc, vllm-lhbnc, vllm-blhnc, vllm-blnhc, vllm-bhlnc,
               vllm-cpu, vllm-cross-layer, sglang-mha, sglang-mha-hnd, trtllm, kv-tuples,
               kv-tuples-hnd, kv-tuples-slots
  NVFP4        vllm-nvfp4, vllm-nvfp4-linear
  MLA          mla, sglang-mla, sglang-rows, vllm-packed, plane-tuples
  other        indexer, values-scales, opaque

policies (which chunks are evicted first):
  lru      the least recently used
  gdsf     those with the fewest uses, where a use counts less the longer ago it was
  s3fifo   those that were not used again soon after they were stored; then the oldest
  arc      the least recently used, of those used once or of those used again: of the list that
           has more than its share, which follows the hits

examples:
  kvheap replay                                        made-up traffic, chunks of a real model
  kvheap replay trace.jsonl --heap 1GiB --json out.json
  kvheap replay --geometry llama-3-8b --heap 40GiB --device cuda --plot heap.png
  kvheap replay trace.jsonl --engine-layout vllm-flash-hnd --heap 512MiB
  kvheap replay trace.jsonl --policy gdsf --heap 64MiB
  kvheap replay trace.jsonl --heap 64MiB --compare --plot policies.png

a trace has one request per line:
  {"timestamp": 0, "input_length": 900, "output_length": 52, "hash_ids": [46, 47]}
  timestamp in ms, lengths in tokens, one hash id for each 512-token chunk of the prompt.

without a trace, geometry, layout and heap: qwen2.5-0.5b (6 MiB a chunk) in 1 GiB, for about 10 s,
if 3 GiB of memory are available; else tiny in 16 MiB.

a reference to a chunk is a hit if it is stored, and all chunks before it in the request are; it is
resident if it is stored, but a chunk before it is missing, or if the request names it twice.

times are measured on the host, from call to return. That of batched_allocate (with an engine
layout, of batched_store) includes the copy, or on a GPU, its launch. GB/s count each byte of KV
once.

exit status: 0 all bytes were right, 1 some were wrong, 2 an argument or the trace is wrong,
3 the machine cannot do it (memory, device, disk, package), 130 interrupted.
"""

CALIBRATE_HELP = """\
Measure which path of a copy is the fastest on a GPU, and store the table for kvheap.transfer.

Copies of scattered pieces of KV, between the device and pinned host memory or within the device,
can take three paths. Which path is the fastest depends on the device, the direction, and the number
and size of the pieces; kvheap.transfer looks it up in the stored table for every copy. Without a
table it uses published figures for an H100, H200 or A30, and a cautious rule for other devices.
"""

CALIBRATE_NOTES = """\
paths:
  kernel        an SM kernel over a list of pointers
  copy_engine   cuMemcpyBatchAsync, or an asynchronous copy for each piece
  staged        through an extent on the device, with large copies across the link (h2d, d2h)

directions:
  h2d           pinned host memory to the device
  d2h           the device to pinned host memory
  d2d           within the device

what is measured:
  the fewest SMs with which the kernel saturates the host link, in each direction; copies between
  host and device have no more unless max_sms= says so. The paths are then measured with them. If
  a tenth of the budget does not suffice for this, the defaults stay: 3 h2d, 2 d2h.

  every path in every direction; pieces of 1, 4, 8, 16, 32, 64, 128, 256 KiB, 1 and 4 MiB,
  1, 4, 16, ... 65,536 of them at a time, up to 1 GiB in all, or less if memory is short. Pieces are
  scattered on the device and contiguous on the host. If the time jumps between two sizes, sizes
  between them are measured too. Noisy cells, in which the middle half of the times spreads over
  more than 5 % of the median, are measured again; those that stay noisy are marked. Times of larger
  copies are extrapolated.

  a time is how long a caller waits on an idle stream, including the submission by the host. Run
  nothing else on the GPU meanwhile.

where it is stored:
  in $KVHEAP_CACHE_DIR, else $XDG_CACHE_HOME/kvheap, else ~/.cache/kvheap; one file for each device
  name and driver version, so calibrate again after a driver update. An interrupted calibration
  stores nothing.

the table and the map:
  the table shows the path for each number of pieces: "engine, kernel 31+" means the copy engine
  for up to 30 pieces, and the kernel for 31 or more. The colour of the map shows the fastest path;
  the strength of the colour and the numbers show its speedup over the second fastest path. Noisy
  cells are hatched; bars are published crossovers. The map needs matplotlib:
  pip install matplotlib.

examples:
  kvheap calibrate                                     measure cuda:0 for about a minute
  kvheap calibrate --device cuda:1 --budget 20 --json table.json
  kvheap calibrate --show                              the table that copies use on this machine
  kvheap calibrate --show --device-name "NVIDIA H100 80GB HBM3" --plot h100.png
  kvheap calibrate --show --table table.json           a table from another machine

exit status: 0 done, 2 an argument or a table is wrong, 3 the machine cannot do it (no CUDA device,
memory, disk, package), 130 interrupted.
"""

DOCTOR_HELP = """\
Look at this machine, and say what it has for kvheap, what kvheap will use, and what is missing.

Looks at packages and their versions, CUDA, GPUs and their driver, memory, huge pages, NUMA nodes,
a C compiler for Triton, and the engines that kvheap has adapters for. Changes nothing. Engines are
not imported: only the versions of what is installed are read.
"""

DOCTOR_NOTES = """\
states:
  ok        there, and fit for use
  absent    kvheap works without it
  untested  a version that kvheap's tests never met; it may work
  wrong     something that kvheap needs is missing or fails

exit status: 0 nothing is wrong, 1 something is, 3 the report could not be made or printed.
"""

BENCH_HELP = """\
Run kvheap's benchmarks on this machine, and print one table of what they found beside their peers.

Each benchmark measures kvheap and its peers in the same rounds, in a process of its own. Those that
need a package that is not installed are left out, and named. Run nothing else meanwhile: figures
that vary much between rounds are marked as noisy.
"""

BENCH_NOTES = """\
benchmarks:
  address_manager  allocating and freeing addresses and batches, beside LMCache
  allocators       the life and the options of each allocator, beside LMCache
  block_copy       scatter and gather of blocks, beside copy_ and indexing
  paged_copy       store and load of paged KV caches, beside copy_, indexing and LMCache
  transfer         scattered pieces between heaps, devices and host memory, beside loops
  small_calls      calls with 1 to 64 blocks, beside loops and LMCache
  utilization      how full a heap gets, beside LMCache and Mooncake's published figures
  prefix_index     an index of prefixes and its policies, beside an OrderedDict
  eviction         hit rates of eviction orders, beside the best that is possible
  files            chunks in files, beside plain calls; needs lmdb and xxhash
  vllm_tier        the tier for vLLM beside vLLM's own; needs vllm
  vllm_engine      the same in vLLM's engine on a CPU; needs vllm_cpu

all of them take about 3 minutes with --quick, else half an hour.

what is written to --out:
  NAME-DATE.json   all figures; 'kvheap plot' draws them again
  NAME-DATE.png    the picture, if matplotlib is installed
  NAME.log         what the benchmark printed: its tables
  summary.json     the table

exit status: 0 all ran, 1 a benchmark failed, 2 an argument is wrong, 3 the machine cannot do it,
130 interrupted.
"""

PLOT_HELP = """\
Draw a file of results: of 'kvheap bench' or a benchmark's script, of 'kvheap replay --json', of
'kvheap calibrate --json', or a heap's map, from heap.snapshot().save("FILE.json"). What the file
holds is recognized by its contents.
"""
