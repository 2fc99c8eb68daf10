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
_QWEN_MOE = {**_MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}
_WHOLE = {**_SMALL, "num_key_value_heads": 4}  # as many heads of keys as of queries
_LATENT = {
    **_WHOLE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
_SSM = {  # Mamba-2 layers of hybrids
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
_BARE = {k: v for k, v in _SMALL.items() if "head" not in k and k != "max_position_embeddings"}
_HYBRID = ["mamba", "attention"]

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "llama-tied": lambda: tf.LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**_SMALL, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**_SMALL),
    "qwen3": lambda: tf.Qwen3Config(**_SMALL, head_dim=8),
    "smollm3": lambda: tf.SmolLM3Config(**_SMALL, no_rope_layers=[1, 0]),
    "starcoder2": lambda: tf.Starcoder2Config(**_SMALL, sliding_window=16),
    "olmo2": lambda: tf.Olmo2Config(**_SMALL),
    "nemotron": lambda: tf.NemotronConfig(**_SMALL, head_dim=8),
    "phi3": lambda: tf.Phi3Config(**_SMALL, sliding_window=16),
    "phi": lambda: tf.PhiConfig(**_WHOLE),  # a head with a bias
    "falcon": lambda: tf.FalconConfig(**_BARE, num_attention_heads=4),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_WHOLE),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=301, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": lambda: tf.OPTConfig(  # the hidden states are narrower than the layers
        **_WHOLE, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    # Factors and caps on the logits.
    "gemma2": lambda: tf.Gemma2Config(
        **_GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GEMMA, final_logit_softcapping=3.0),
    "cohere": lambda: tf.CohereConfig(**_SMALL, logit_scale=0.25),
    "cohere2": lambda: tf.Cohere2Config(**_SMALL, logit_scale=0.25, sliding_window=16),
    "granite": lambda: tf.GraniteConfig(
        **_SMALL, logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "minicpm3": lambda: tf.MiniCPM3Config(**_LATENT, dim_model_base=10, scale_emb=3),
    "hyperclovax": lambda: tf.HyperCLOVAXConfig(**_SMALL, logits_scaling=4.0),
    "mpt": lambda: tf.MptConfig(
        vocab_size=301, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, logit_scale=0.25
    ),
    "inkling": lambda: tf.InklingTextConfig(
        **_MOE, head_dim=8, n_routed_experts=4, moe_intermediate_size=24,
        logits_mup_width_multiplier=3.0, unpadded_vocab_size=290,
    ),
    # Mixtures of experts.
    "mixtral": lambda: tf.MixtralConfig(**_MOE, num_local_experts=4),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**_QWEN_MOE),
    "olmoe": lambda: tf.OlmoeConfig(**_MOE, num_experts=4),
    "gpt-oss": lambda: tf.GptOssConfig(**_MOE, head_dim=8, num_local_experts=4, sliding_window=16),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **{**_LATENT, **_MOE, "num_key_value_heads": 4}, n_routed_experts=4, n_shared_experts=1,
        n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=24,
    ),
    # State space models, linear attention, and hybrids with attention.
    "mamba": lambda: tf.MambaConfig(**_BARE, state_size=8, time_step_rank=4),
    "mamba2": lambda: tf.Mamba2Config(
        **_BARE, num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8
    ),
    "falcon-h1": lambda: tf.FalconH1Config(
        **_SMALL, **_SSM, head_dim=8, mamba_d_ssm=64, lm_head_multiplier=0.3,
        embedding_multiplier=2.0, key_multiplier=0.5, ssm_out_multiplier=0.7,
        ssm_multipliers=[0.5, 2.0, 0.7, 1.5, 0.9], mlp_multipliers=[0.5, 1.5],
    ),
    "granite-hybrid": lambda: tf.GraniteMoeHybridConfig(
        **_MOE, **_SSM, layer_types=_HYBRID, num_local_experts=4, shared_intermediate_size=32,
        logits_scaling=4.0,
    ),
    "jamba": lambda: tf.JambaConfig(
        **_MOE, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "recurrent-gemma": lambda: tf.RecurrentGemmaConfig(
        **{**_SMALL, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16,
        logits_soft_cap=3.0,
    ),
    "qwen3-next": lambda: tf.Qwen3NextConfig(
        **_QWEN_MOE, shared_expert_intermediate_size=24, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "rwkv": lambda: tf.RwkvConfig(**_BARE, context_length=64, attention_hidden_size=32),
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
