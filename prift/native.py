"""Builds and loads native.cpp: on a CPU, products of float32 or bfloat16 operands into float32.

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
_FLAGS = ["-O3", "-fopenmp", "-shared", "-fPIC", "-std=c++20", "-fno-strict-aliasing"]


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
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: nobody's home
        return None
    sizes, pointer, flag = [ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int
    found.prift_wide.argtypes = [flag, *sizes, pointer, pointer, flag, flag, pointer]
    found.prift_tall.argtypes = [flag, *sizes, pointer, pointer, pointer]
    found.prift_message.restype = ctypes.c_char_p
    return found


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether `project` takes operands of this dtype here."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    found = library()
    if found is None or not found.prift_supported(int(dtype == torch.bfloat16)):
        return False
    try:
        return _is_right(dtype)
    except RuntimeError:  # what a processor lacks may show at some sizes only
        return False


def _is_right(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 1100, generator=generator).to(dtype) for n in (131, 101))
    given = torch.randn(131, 101, generator=generator)
    exact = a.double() @ b.double().T
    found = [
        (project(a, b), exact),
        (add_product(given.clone(), a, b.T.contiguous()), exact + given.double()),
        (add_turned(given.clone(), a.T.contiguous(), b.T.contiguous()), exact + given.double()),
    ]
    return all((x.double() - y).abs().max() < 1e-2 for x, y in found)


def project(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """a @ b.T in float32 [M, N], in the contiguous `out_MN` where that is given.

    Only for a dtype that `supports` names; bfloat16 wants an even K. Raises RuntimeError for
    another, and MemoryError, as the two below do.
    """
    if out_MN is None:
        out_MN = torch.empty(len(a_MK), len(b_NK))
    _wide(a_MK, b_NK.contiguous(), out_MN, turned=True, add=False)
    return out_MN


def add_product(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """out += a @ b, with `out` contiguous float32; bfloat16 wants an even K."""
    _wide(a_MK, b_KN.contiguous(), out_MN, turned=False, add=True)
    return out_MN


def add_turned(out_MN: Tensor, a_KM: Tensor, b_KN: Tensor) -> Tensor:
    """out += a.T @ b, with `out` contiguous float32."""
    a_KM, b_KN = a_KM.contiguous(), b_KN.contiguous()
    (K, M), N = a_KM.shape, b_KN.shape[1]
    half = int(a_KM.dtype == torch.bfloat16)
    pointers = a_KM.data_ptr(), b_KN.data_ptr(), out_MN.data_ptr()
    _check(library().prift_tall(half, M, N, K, *pointers))
    return out_MN


def _wide(a_MK: Tensor, b: Tensor, out_MN: Tensor, *, turned: bool, add: bool) -> None:
    a_MK = a_MK.contiguous()
    (M, K), N = a_MK.shape, out_MN.shape[1]
    half = int(a_MK.dtype == torch.bfloat16)
    pointers = a_MK.data_ptr(), b.data_ptr(), int(turned), int(add), out_MN.data_ptr()
    _check(library().prift_wide(half, M, N, K, *pointers))


def _check(answer: int) -> None:
    if answer == 1:
        raise MemoryError("out of memory in a native product")
    if answer:
        message = library().prift_message().decode(errors="replace")
        raise RuntimeError(f"native product: {message or 'unknown exception'}")


def _built(cxx: str) -> Path:
    """The shared library, from an earlier run or built now. Raises SubprocessError, OSError."""
    root = Path(torch.__file__).parent
    facts = [_SOURCE.read_text(), torch.__version__, str(root), platform.machine(), cxx, *_FLAGS]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    target = cache_home() / "native" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{platform.node()}-{os.getpid()}.tmp")
        command = [cxx, *_FLAGS, f"-I{root / 'include'}", str(_SOURCE), "-o", str(scratch)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        os.replace(scratch, target)  # whole or not at all, whoever else builds it too
    return target
