"""A Llama's linear layers quantised as compressed-tensors stores them, without any calibration:
each weight to the nearest of its scale's steps. vLLM reads the folders by itself.

    int8  weights in 8 bits with a scale per row; activations in 8 bits per token, when run
    int4  weights in 4 bits with a scale per 32 columns; activations as they are

The output projection and the embedding stay as they are.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
_WEIGHTS = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
}
_FORMATS = {"int8": "int-quantized", "int4": "pack-quantized"}


def quantise(folder: Path, kind: str, into: Path) -> str:
    """Writes the model of `folder` to `into`, quantised; its path."""
    shutil.copytree(folder, into)
    weights, changed = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            changed[name] = weight
            continue
        width = weight.shape[1] if kind == "int8" else GROUP
        grouped = weight.float().view(len(weight), -1, width)
        most = 2 ** (_WEIGHTS[kind]["num_bits"] - 1) - 1
        scale = grouped.abs().amax(2, keepdim=True).clamp_min(1e-12) / most
        steps = (grouped / scale).round().clamp(-most - 1, most).flatten(1)
        changed[f"{name}_scale"] = scale[:, :, 0].to(torch.bfloat16)
        if kind == "int8":
            changed[name] = steps.to(torch.int8)
        else:
            changed[f"{name}_packed"] = packed(steps.long())
            changed[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(changed, into / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                   "dynamic": True}  # fmt: skip
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[kind],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": "int", "symmetric": True, "dynamic": False, **_WEIGHTS[kind]},
                "input_activations": activations if kind == "int8" else None,
            }
        },
    }
    (into / "config.json").write_text(json.dumps(config, indent=1))
    return str(into)


def packed(steps: torch.Tensor) -> torch.Tensor:
    """int32 [R, C/8]: eight columns of [-8, 7] each, the first in the lowest bits."""
    unsigned = (steps + 8).view(len(steps), -1, 8)
    words = (unsigned << (4 * torch.arange(8))).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
