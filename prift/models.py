"""Finds and loads a causal language model: safetensors only, attention that honours the config.

Used by both stages. Knows folders and configs; knows no data and no cache.
"""

import json
from pathlib import Path
from typing import Any

from prift.errors import ModelError, first_line

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def locate(name: str, option: str = "--model", trust_remote_code: bool = False) -> Path:
    """The folder of a model: a local folder, or a hub repository downloaded to the hub's cache.

    trust_remote_code  download the repository's Python files too
    Raises ModelError where neither is found, naming the option that asked for it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{option} {name}: no such folder. Give a model folder or a hub name.")
    from huggingface_hub import snapshot_download

    wanted = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise ModelError(
            f"{option} {name}: no such folder, and the hub gave no such repository "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, sorted by name.

    The single file wins over shards, as in transformers. Raises ModelError where files are
    missing, and for a folder that also holds an adapter, which transformers would load with it.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) beside or instead of a model. Merge "
            "it first (peft: model.merge_and_unload().save_pretrained(...)), or move it away."
        )
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole]
    if index.exists() and not whole.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of weights; download it again.") from error
        files = [folder / Path(n).name for n in names]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.safetensors")
        )
        raise ModelError(
            f"{folder} has no {absent[0]} (found: {', '.join(other) or 'no weights'}). prift reads "
            "safetensors only; convert with model.save_pretrained(folder, safe_serialization=True)."
        )
    return files


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's config. Raises ModelError unless it is a text-only, decoder-only model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}/config.json: {first_line(error)}") from error
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{folder} is an encoder-decoder model ({kind}); prift takes causal LMs.")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{folder} is an encoder ({kind}), whose tokens see those behind them; prift takes "
            "causal LMs."
        )
    parts = [n for n in ("vision_config", "audio_config") if getattr(config, n, None) is not None]
    if parts or (
        kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise ModelError(
            f"{folder} is a multimodal model ({kind}: {', '.join(parts) or 'image-text-to-text'}); "
            "prift takes text-only causal LMs."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(f"{folder} ({kind}) is not a causal language model of transformers.")
    return config


def context_length(config: Any) -> int | None:
    """Longest sequence the positions of the model are made for; None where it has no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def ropes(config: Any) -> list[dict[str, Any]]:
    """Parameters of the model's rotary embeddings, of each kind of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [r for r in (found, *found.values()) if isinstance(r, dict) and "rope_type" in r]


def turns_by_length(config: Any) -> bool:
    """Whether positions turn by angles that depend on how long the batch is."""
    return any(r["rope_type"] in ("longrope", "dynamic") for r in ropes(config))


def vocabulary_size(config: Any) -> int:
    """Token ids that have a logit: rows of the output projection, padding rows included, save
    where the architecture drops those (Inkling)."""
    config = config.get_text_config()
    return getattr(config, "unpadded_vocab_size", None) or config.vocab_size


def checkpoint_dtype(folder: Path, config: Any) -> str:
    """'float32', 'bfloat16' or 'float16': the config's dtype, else that of the first tensor."""
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch.")
    from safetensors import safe_open

    with safe_open(weight_files(folder)[0], framework="pt") as file:
        name = next(iter(file.keys()))
        stored = file.get_slice(name).get_dtype()
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")


def attention_for(config: Any, wanted: str = "auto") -> str:
    """The attention implementation to load with.

    Architectures that soft-cap their attention logits get 'eager', since the others ignore the
    cap without saying so. Raises ModelError where such an architecture is asked for another one.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and wanted not in ("auto", "eager"):
        raise ModelError(
            f"{config.model_type} soft-caps its attention, which --attention {wanted} ignores. "
            "Use --attention eager."
        )
    if wanted != "auto":
        return wanted
    if capped:
        return "eager"
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def load_model(
    folder: Path,
    config: Any,
    *,
    dtype: str,
    attention: str,
    trust_remote_code: bool = False,
    device_map: dict[str, str] | str | None = None,
    max_memory: dict[int, int] | None = None,
) -> Any:
    """The model in `dtype`, its weights from safetensors.

    device_map, max_memory  where it goes, as `placement.place` says; by default to the CPU. A
                            model that is spread must not be moved afterwards.

    Raises ModelError, also where weights would be left on the disk.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    files = weight_files(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            device_map=device_map,
            max_memory=max_memory,
        )
    except SafetensorError as error:
        names = ", ".join(f.name for f in files)
        raise ModelError(
            f"cannot read {names} in {folder}: {error}. The file is cut short or damaged: copy or "
            "download it again."
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"cannot load {folder}: {error}") from error
    # transformers fills what a checkpoint lacks with random numbers, and goes on.
    lacking = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{folder}: its weights do not fit its config.json: {len(lacking):,} tensors are "
            f"missing or of another shape, {lacking[0]} among them. Save the model again, whole."
        )
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(
            f"{folder}: its layers do not fit the free memory of the GPUs: {len(left):,} tensors "
            f"are left over, {left[0]} among them. Free some memory, or use more or larger GPUs."
        )
    return model
