"""Low-rank adapters through peft; imported only where asked for."""

from typing import Any

from prift.errors import OptionError


def with_lora(model: Any, r: int, alpha: float | None, dropout: float, target: str) -> Any:
    """The model with a LoRA adapter of rank r on `target` modules (comma-separated names, or
    'all-linear': every linear layer but the output projection). alpha: default 2 r."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise OptionError("--lora-r needs peft: pip install 'prift[peft]'") from error
    modules: str | list[str] = target if target == "all-linear" else target.split(",")
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target {target}: {error}") from error
    base = adapted.get_base_model()
    for role, layer in (
        ("input embedding", base.get_input_embeddings()),
        ("output projection", base.get_output_embeddings()),
    ):
        if hasattr(layer, "base_layer"):
            raise OptionError(
                f"--lora-target {target} puts an adapter on the {role}, which prift does not "
                "train or merge correctly. Leave it out."
            )
    return adapted


def base_of(model: Any) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
