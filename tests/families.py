"""Tiny random-weight models of many architectures, weights spread so that logits differ."""

import torch
import transformers as tf

_SMALL = {
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_MOE = {**_SMALL, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "llama-tied": lambda: tf.LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**_SMALL),
    "qwen3": lambda: tf.Qwen3Config(**_SMALL, head_dim=8),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=301, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma2": lambda: tf.Gemma2Config(
        **_GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GEMMA, final_logit_softcapping=3.0),
    "mixtral": lambda: tf.MixtralConfig(**_MOE, num_local_experts=4),
    "cohere": lambda: tf.CohereConfig(**_SMALL, logit_scale=0.25),
    "granite": lambda: tf.GraniteConfig(**_SMALL, logits_scaling=4.0),
    "phi": lambda: tf.PhiConfig(**{**_SMALL, "num_key_value_heads": 4}),  # a head with a bias
}  # fmt: skip


def tiny(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, vocabulary: int = 301
) -> torch.nn.Module:
    """A model of the family in eval mode, with the attention that prift would choose."""
    from prift.models import attention_for

    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.vocab_size = vocabulary
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4 if "embed" in name or "lm_head" in name else 2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


def save(family: str, folder, **options) -> str:
    """Writes the model to `folder`; returns its path."""
    tiny(family, **options).save_pretrained(folder)
    return str(folder)
