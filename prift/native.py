"""Builds and loads native.cpp: on a CPU, products of bfloat16 operands into float32.

Built once per machine and version of torch with the C++ compiler that is there ($CXX, g++, clang++
or c++), kept below the cache's home, and checked against float64 each time it is loaded. Where any
of that fails there is no native product, and callers take another way.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from prift.home import cache_home

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-fopenmp", "-shared", "-fPIC", "-std=c++20"]


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built product, or None where it cannot be built, loaded, or is wrong."""
    cxx = compiler()
    if cxx is None or platform.system() != "Linux":
        return None
    try:
        found = ctypes.CDLL(str(_built(cxx)))
    except (OSError, subprocess.SubprocessError):
        return None
    found.prift_project.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3]
    found.prift_project.restype = None
    return found


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether `project` takes operands of this dtype here."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    found = library()
    if found is None or not found.prift_supported(int(dtype == torch.bfloat16)):
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(131, 1100, generator=generator).to(dtype)
    weight = torch.randn(101, 1100, generator=generator).to(dtype)
    exact = hidden.double() @ weight.double().T
    return bool((project(hidden, weight).double() - exact).abs().max() < 1e-2)


def project(hidden_NH: Tensor, weight_VH: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """hidden @ weight.T in float32 [N, V], in the contiguous `out_NV` where that is given.

    Only for a dtype that `supports` names; bfloat16 wants an even H.
    """
    hidden_NH, weight_VH = hidden_NH.contiguous(), weight_VH.contiguous()
    (N, H), V = hidden_NH.shape, len(weight_VH)
    if out_NV is None:
        out_NV = torch.empty(N, V)
    pointers = hidden_NH.data_ptr(), weight_VH.data_ptr(), out_NV.data_ptr()
    library().prift_project(int(hidden_NH.dtype == torch.bfloat16), N, V, H, *pointers)
    return out_NV


def _built(cxx: str) -> Path:
    """The shared library, from an earlier run or built now. Raises SubprocessError, OSError."""
    root = Path(torch.__file__).parent
    facts = [_SOURCE.read_text(), torch.__version__, str(root), cxx, *_FLAGS]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    target = cache_home() / "native" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        command = [cxx, *_FLAGS, f"-I{root / 'include'}", str(_SOURCE), "-o", str(scratch)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        os.replace(scratch, target)  # whole or not at all, whoever else builds it too
    return target
