"""Shapes of published hybrid models, as far as they decide how large vLLM's blocks are."""

F = "full_attention"
GDN_3_1 = ["linear_attention"] * 3 + [F]

PUBLISHED = {
    "Qwen3-Next-80B-A3B": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {}),
    "Qwen3.5-4B, 9B": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {}),
    "Qwen3.5-27B, 3.6, 3.8": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24, "linear_num_value_heads": 48},
    ),
    "Nemotron-Nano-9B-v2": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {"hidden_size": 4480, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128,
         "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8},
    ),
    "Nemotron-3-Nano-30B-A3B": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {"hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64,
         "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8},
    ),
    "Granite-4.0-H-Small": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {"hidden_size": 4096, "num_hidden_layers": 4, "layer_types": ["mamba"] * 3 + ["attention"], "num_attention_heads": 32,
         "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
    ),
    "Granite-4.0-H-Tiny": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {"hidden_size": 1536, "num_hidden_layers": 4, "layer_types": ["mamba"] * 3 + ["attention"], "num_attention_heads": 12,
         "num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
    ),
    "LFM2-8B-A1B": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "Falcon-H1-7B": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {"hidden_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072,
         "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_d_state": 256, "mamba_n_groups": 1},
    ),
}  # fmt: skip
