"""Where a model goes: the CPU, one GPU, or spread over the GPUs of this machine.

Layers of a model that is spread run one after the other, each on its GPU. Never on the CPU or the
disk beside GPUs: layers would be copied for every batch, and parameters that stay on the disk have
no values that the head could read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prift.errors import ModelError
from prift.models import weight_files

WORKING_BYTES = 2 << 30  # kept free on a GPU for activations, logits and CUDA's own needs
_GIB = 1 << 30
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number


@dataclass(frozen=True, slots=True)
class Placement:
    """What `models.load_model` hands to transformers.

    device_map  None: the CPU; {"": "cuda:0"}: one device; "auto": spread
    max_memory  bytes of weights allowed on each CUDA device, where spread
    """

    device_map: dict[str, str] | str | None = None
    max_memory: dict[int, int] | None = None


def place(folder: Path, dtype: str, device: str | None = None) -> Placement:
    """Where the model in `folder` goes, by its weights in `dtype` and the memory that is free now.

    device  'cpu', or one CUDA device ('cuda:1'; 'cuda' is the current one); None: all of CUDA's
            devices, the CPU where there are none

    Raises ModelError where the CUDA devices have too little free memory.
    """
    import torch

    if device == "cpu" or not (device or torch.cuda.is_available()):
        return Placement()
    chosen = range(torch.cuda.device_count())
    if device is not None:
        index = torch.device(device).index
        chosen = [torch.cuda.current_device() if index is None else index]
    free = {index: torch.cuda.mem_get_info(index)[0] for index in chosen}
    return choose(weight_bytes(folder, dtype), free, f"{folder} in {dtype}")


def device_of(rank: int | None) -> str | None:
    """The CUDA device, made the current one, of a process that has this number among those of its
    machine; None where there is no number or no CUDA."""
    import torch

    if rank is None or not torch.cuda.is_available():
        return None
    index = rank % torch.cuda.device_count()  # some launchers show each process its own alone
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def choose(needed: int, free: dict[int, int], what: str = "the model") -> Placement:
    """The placement of `needed` bytes of weights, given the free bytes of each CUDA device.

    The first device that holds them with room to work; else all of them; the CPU where there are
    no devices. Raises ModelError where they do not fit.
    """
    if not free:
        return Placement()
    room = {index: max(0, size - WORKING_BYTES) for index, size in free.items()}
    for index, size in room.items():
        if needed <= size:
            return Placement({"": f"cuda:{index}"})
    if len(room) > 1 and needed <= sum(room.values()):
        return Placement("auto", {index: size for index, size in room.items() if size})
    raise ModelError(too_large(needed, list(free.values()), what))


def too_large(needed: int, free: Sequence[int], what: str) -> str:
    """The message for weights that the devices cannot hold."""
    sizes = ", ".join(f"{size / _GIB:.1f}" for size in free)
    return (
        f"{what} needs {needed / _GIB:.1f} GiB for its weights and {WORKING_BYTES / _GIB:.0f} GiB "
        f"on each GPU to work in; free: {sizes} GiB on {len(free)} GPU(s). Free some, or use more "
        "or larger GPUs of one machine: layers are spread over them; --backend vllm "
        "--tensor-parallel-size N spreads each layer. CUDA_VISIBLE_DEVICES= runs it on the CPU, "
        "slowly."
    )


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of the model's weights once loaded in `dtype`, from the headers of its files.

    Floating-point tensors count in `dtype`, packed and quantised ones as they are stored.
    Raises ModelError.
    """
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    total = 0
    for file in weight_files(folder):
        for tensor in _header(file).values():
            stored = tensor["data_offsets"][1] - tensor["data_offsets"][0]
            kind = tensor["dtype"]
            total += stored // _FLOATS[kind] * width if kind in _FLOATS else stored
    return total


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name -> dtype, shape, data_offsets."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, 100 << 20)))
        header.pop("__metadata__", None)
        return header
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"cannot read {file.name} in {file.parent}: its header is damaged. Copy or download it "
            "again."
        ) from error
