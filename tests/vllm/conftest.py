"""Real engines, of which each takes some 20 seconds to start: one for each configuration.

What vLLM for CPUs is told here suits a small machine: little room for keys and values, and every
core that the process may use, of which by default it keeps one free.
"""

import os

CORES = [str(core) for core in sorted(os.sched_getaffinity(0))]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(CORES[:2]))
