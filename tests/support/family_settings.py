"""Settings of the tiny members of many model families, and what --kv-eviction does with each."""

from dataclasses import dataclass, field
from typing import Any

import transformers
from tiny_models import VOCABULARY
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
S, F = "sliding_attention", "full_attention"
LONG_ROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 24, "long_factor": [1.5] * 24, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 1024,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1000000.0}
GDN = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2}
HEAD = {"head_dim": 32}
# A cap that bends the logits of these members; published ones have 50.
CAPPED = {"attn_logit_softcapping": 3.0, "tie_word_embeddings": True}


def layers(*pattern: str, times: int = 1) -> dict[str, Any]:
    """Layers of these types, those that slide with a window of 64 tokens."""
    return {"sliding_window": 64, "layer_types": [*pattern] * times, "num_hidden_layers": len(pattern) * times}


GEMMA4 = layers(S, S, S, S, S, F) | HEAD | {
    "global_head_dim": 64, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0
}  # fmt: skip
LLAMA4 = EXPERTS | HEAD | {
    "num_hidden_layers": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2,
    "attention_chunk_size": 64, "no_rope_layers": [1, 1, 1, 0],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class of vLLM with the settings of its tiny member.

    Attributes:
        config: name of the configuration class in transformers.
        settings: what differs from COMMON.
        special: what is special about its attention, for the table.
        refused: words of the refusal; empty for families that are served.
        by_layers: config.json does not tell why it is refused, its layers do.
        dtype: its layers run in no other on a CPU.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    special: str = ""
    refused: str = ""
    by_layers: bool = False
    dtype: str = "float32"

    @property
    def model_class(self) -> str:
        kind = getattr(transformers, self.config).model_type
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]


NOT_ON_CPUS, WINDOWS = "which vLLM cannot run on a CPU", "nothing to evict"

# fmt: off
FAMILIES = {
    "Llama": Family("LlamaConfig"),
    "Llama 3.1": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}, "llama3 RoPE scaling"),
    "Llama 4": Family("Llama4TextConfig", LLAMA4, "chunked attention beside full, some layers without RoPE"),
    "Llama 4, short context": Family("Llama4TextConfig", LLAMA4 | {"attention_chunk_size": 2048}, "chunks as long as `--max-model-len`"),
    "Mistral": Family("MistralConfig", {"sliding_window": None}),
    "Mistral 0.1": Family("MistralConfig", {"sliding_window": 64}, "every layer slides", WINDOWS, by_layers=True),
    "Ministral 8B": Family("MinistralConfig", HEAD | layers(F, S, S, S), "window 3 : 1"),
    "Ministral 3": Family(
        "Ministral3Config",
        HEAD | {"rope_parameters": YARN | {
            "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "YaRN, scaled queries",
    ),
    "Qwen2": Family("Qwen2Config", special="bias"),
    "Qwen2, window off": Family("Qwen2Config", {"use_sliding_window": False, "sliding_window": 64}, "`use_sliding_window: false`"),
    "Qwen2, late windows": Family(
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        "`max_window_layers` of all layers: none slides",
    ),
    "Qwen2.5": Family("Qwen2Config", {"rope_parameters": YARN}, "YaRN"),
    "Qwen2-MoE": Family("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64}, "experts"),
    "Qwen3": Family("Qwen3Config", HEAD, "query and key norms"),
    "Qwen3-MoE": Family("Qwen3MoeConfig", EXPERTS | HEAD, "experts"),
    "Phi": Family("PhiConfig", {"hidden_size": 320}, "partial RoPE, head size 80"),
    "Phi-3": Family("Phi3Config", {"hidden_size": 384, "sliding_window": None}, "head size 96"),
    "Phi-3-mini-4k": Family(
        "Phi3Config", {"hidden_size": 384, "sliding_window": 2047}, "every layer slides (2,047)", WINDOWS, by_layers=True
    ),
    "Phi-4-mini": Family(
        "Phi3Config",
        {"hidden_size": 256, "sliding_window": 262144, "partial_rotary_factor": 0.75, "rope_parameters": LONG_ROPE,
         "original_max_position_embeddings": 1024},
        "window of 262,144: none; long and partial RoPE",
    ),
    "Gemma": Family("GemmaConfig", {"head_dim": 256}, "head size 256"),
    "Gemma 2": Family("Gemma2Config", layers(S, F, times=2) | HEAD | CAPPED, "soft-capped logits, window 1 : 1"),
    "Gemma 3": Family("Gemma3TextConfig", layers(S, F, times=2) | HEAD, "window 1 : 1"),
    "Gemma 3, 4B": Family("Gemma3TextConfig", layers(*[S] * 5, F, *[S] * 4) | HEAD, "window 9 : 1"),
    "Gemma 3, short context": Family(
        "Gemma3TextConfig", layers(S, F, times=2) | HEAD | {"sliding_window": 2048}, "window as long as `--max-model-len`: none"
    ),
    "Gemma 3n": Family(
        "Gemma3nTextConfig",
        layers(S, S, S, S, F, times=2) | HEAD | {
            "num_kv_shared_layers": 5, "intermediate_size": [128] * 10, "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 32, "altup_num_inputs": 4, "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 10, "tie_word_embeddings": True},
        "layers that share KV",
    ),
    "Gemma 4": Family("Gemma4TextConfig", GEMMA4, "window 5 : 1, full heads twice as wide"),
    "Gemma 4 31B": Family(
        "Gemma4TextConfig",
        GEMMA4 | {"num_key_value_heads": 4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        "window 5 : 1 with twice the KV of full layers, whose keys are values",
    ),
    "Gemma 4 26B": Family(
        "Gemma4TextConfig",
        GEMMA4 | {"num_key_value_heads": 4, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True,
                  "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
        "experts; otherwise like 31B",
    ),
    "Gemma 4, real heads": Family(
        "Gemma4TextConfig",
        GEMMA4 | {"head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        "head sizes 256 and 512",
    ),
    "Gemma 4 E": Family(
        "Gemma4TextConfig",
        GEMMA4 | layers(S, S, S, S, S, F, times=2) | {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 6},
        "layers that share KV",
    ),
    "VaultGemma": Family("VaultGemmaConfig", HEAD | layers(S, F, times=2) | CAPPED, "soft-capped logits, window 1 : 1"),
    "OLMo 2": Family("Olmo2Config", special="norms of whole rows"),
    "OLMo 3": Family("Olmo3Config", layers(S, S, S, F), "window 3 : 1"),
    "OLMo 3, mostly full": Family(
        "Olmo3Config", layers(F, F, S, times=2), "window 1 : 2", "4 full-attention layers and 2 sliding-window layers"
    ),
    "OLMoE": Family("OlmoeConfig", EXPERTS, "experts"),
    "Granite": Family("GraniteConfig", {"attention_multiplier": 0.1}, "scale of its own"),
    "Granite MoE": Family("GraniteMoeConfig", EXPERTS, "experts"),
    "Granite SWA": Family("GraniteSWAConfig", layers(S, S, S, F), "window 3 : 1"),
    "Granite 4": Family(
        "GraniteMoeHybridConfig",
        MAMBA2 | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128,
                  "layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
        "no Mamba layers",
    ),
    "Granite 4 hybrid": Family(
        "GraniteMoeHybridConfig",
        MAMBA2 | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128,
                  "layer_types": ["mamba", "mamba", "attention", "mamba"], "num_hidden_layers": 4},
        "Mamba2 beside attention",
    ),
    "SmolLM3": Family(
        "SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False}, "1 of 4 layers without RoPE"
    ),
    "StableLM": Family("StableLmConfig", special="partial RoPE"),
    "Starcoder2": Family("Starcoder2Config", {"sliding_window": None, "use_bias": True}, "bias"),
    "OPT": Family("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 128}, "learned positions"),
    "Falcon": Family(
        "FalconConfig",
        {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "num_kv_heads": 1},
        "one KV head",
    ),
    "Falcon-H1": Family(
        "FalconH1Config",
        MAMBA2 | HEAD | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_state": 32},
        "Mamba2 and attention in each layer",
    ),
    "Mixtral": Family("MixtralConfig", EXPERTS | {"sliding_window": None}, "experts"),
    "GPT-OSS": Family(
        "GptOssConfig", layers(S, F, times=2) | EXPERTS | {"head_dim": 64}, "experts, attention sinks, window 1 : 1"
    ),
    "EXAONE 4, 1.2B": Family(
        "Exaone4Config", {"sliding_window": None, "sliding_window_pattern": None, "layer_types": [F] * 2}, "query and key norms"
    ),
    "EXAONE 4": Family(
        "Exaone4Config", layers(S, S, S, F) | {"sliding_window_pattern": "LLLG"}, "window 3 : 1, full layers without RoPE"
    ),
    "K-EXAONE": Family(
        "ExaoneMoeConfig",
        EXPERTS | HEAD | layers(S, S, S, F) | {"num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                                               "topk_group": 1, "sliding_window_pattern": "LLLG"},
        "experts, window 3 : 1",
    ),
    "Command R": Family("CohereConfig"),
    "Command A": Family("Cohere2Config", HEAD | layers(S, S, S, F), "window 3 : 1, full layers without RoPE"),
    "GLM-4": Family("Glm4Config", HEAD | {"partial_rotary_factor": 0.5}, "partial RoPE"),
    "GLM-4.5": Family(
        "Glm4MoeConfig",
        HEAD | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
                "first_k_dense_replace": 1, "use_qk_norm": True},
        "experts, partial RoPE",
    ),
    "ERNIE 4.5": Family("Ernie4_5Config", HEAD),
    "ERNIE 4.5 MoE": Family(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        "experts",
    ),
    "Hy3": Family(
        "HYV3Config", EXPERTS | HEAD | {"num_shared_experts": 1, "first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True,
                            "mlp_layer_types": ["dense", "sparse"]}, "experts, query and key norms"
    ),
    "Hunyuan": Family("HunYuanDenseV1Config", HEAD),
    "Hunyuan MoE": Family(
        "HunYuanMoEV1Config",
        HEAD | {"num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [128, 128], "num_shared_expert": [1, 1]},
        "experts",
    ),
    "AFMoE": Family(
        "AfmoeConfig",
        EXPERTS | HEAD | layers(S, S, S, F) | {
            "score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1,
            "mup_enabled": True, "global_attn_every_n_layers": 4, "num_dense_layers": 1, "num_shared_experts": 1},
        "experts, gated attention, window 3 : 1",
    ),
    "Seed-OSS": Family("SeedOssConfig", HEAD, "bias"),
    "Apertus": Family("ApertusConfig", {"hidden_act": "xielu"}, "query and key norms"),
    "Arcee": Family("ArceeConfig"),
    "Nemotron": Family("NemotronConfig", {"partial_rotary_factor": 0.5}, "partial RoPE"),
    "Nemotron-H": Family(
        "NemotronHConfig",
        HEAD | {"num_hidden_layers": 6, "hybrid_override_pattern": "M-M*M-", "ssm_state_size": 64, "mamba_num_heads": 8,
                "mamba_head_dim": 32, "n_groups": 1, "expand": 2, "chunk_size": 64},
        "Mamba2 beside attention",
    ),
    "Jais 2": Family("Jais2Config"),
    "HyperCLOVA X": Family("HyperCLOVAXConfig"),
    "CWM": Family("CwmConfig", HEAD | layers(F, S, S, S), "window 3 : 1"),
    "MiniMax M2": Family(
        "MiniMaxM2Config",
        EXPERTS | HEAD | {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
        "experts, partial RoPE",
        NOT_ON_CPUS,
    ),
    "Mellum": Family("MellumConfig", EXPERTS | HEAD, "experts"),
    "MiMo-V2-Flash": Family(
        "MiMoV2FlashConfig",
        {"head_dim": 64, "v_head_dim": 32, "swa_head_dim": 64, "swa_v_head_dim": 32, "swa_num_attention_heads": 4,
         "swa_num_key_value_heads": 2, "sliding_window_size": 64, "hybrid_layer_pattern": [1, 0, 1, 0],
         "mlp_layer_types": ["dense"] * 4, "moe_layer_freq": [0] * 4, "layernorm_epsilon": 1e-5, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 64, "add_swa_attention_sink_bias": True, "rope_theta": 1e4,
         "swa_rope_theta": 1e4} | layers(S, F, times=2),
        "keys wider than values",
        "value heads of 32",
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        EXPERTS | GDN | {"head_dim": 256, "partial_rotary_factor": 0.25, "shared_expert_intermediate_size": 64,
                         "num_hidden_layers": 8, "layer_types": (["linear_attention"] * 3 + [F]) * 2},
        "gated DeltaNet beside attention",
        dtype="bfloat16",
    ),
    "Qwen3.5": Family(
        "Qwen3_5TextConfig",
        GDN | {"head_dim": 256, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + [F]},
        "gated DeltaNet beside attention",
        dtype="bfloat16",
    ),
    "Qwen3.5-MoE": Family(
        "Qwen3_5MoeTextConfig",
        EXPERTS | GDN | {"head_dim": 256, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4,
                         "layer_types": ["linear_attention"] * 3 + [F]},
        "experts, gated DeltaNet beside attention",
        dtype="bfloat16",
    ),
    "LFM2-MoE": Family(
        "Lfm2MoeConfig",
        EXPERTS | {"num_hidden_layers": 4, "layer_types": ["conv", "conv", F, "conv"], "num_dense_layers": 1},
        "short convolutions beside attention",
    ),
    "LFM2": Family(
        "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", F, "conv"], "block_auto_adjust_ff_dim": False,
         "conv_dim": 128, "block_dim": 128},
        "short convolutions beside attention",
    ),
    "Zamba2": Family(
        "Zamba2Config",
        {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "num_key_value_heads": 4,
         "n_mamba_heads": 8, "mamba_d_state": 64, "mamba_headdim": 32, "num_mem_blocks": 1, "use_mem_rope": True},
        "Mamba2, and attention of shared weights",
    ),
    "OLMo Hybrid": Family(
        "OlmoHybridConfig",
        {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + [F], "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 128},
        "gated DeltaNet beside attention",
        NOT_ON_CPUS,
    ),
    "Jamba": Family(
        "JambaConfig",
        {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2, "mamba_dt_rank": 16},
        "Mamba1 beside attention",
        NOT_ON_CPUS,
    ),
    "DeepSeek V3": Family(
        "DeepseekV3Config",
        {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1},
        "latent attention",
        "MLA",
    ),
    "BLOOM": Family("BloomConfig", {"n_head": 4, "n_layer": 2}, "ALiBi", "ALiBi", by_layers=True),
}
# fmt: on


@dataclass(frozen=True)
class Published:
    """A class of vLLM that also sees or hears, and whose text model is a family's.

    Attributes:
        family: of the text.
        config: name of the configuration class in transformers; empty where tests/support/multimodal_models.py makes the model.
        settings: of the text model, beside the family's.
        parts: of the other parts.
        before: what stands in its checkpoints before the family's names; if empty, `model.` is `model.language_model.`.
        whole: name of the model class in transformers, where vLLM wants the other parts' weights for text too.
        given: what its tests give it.
    """

    family: str
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=lambda: {"vision_config": {"num_hidden_layers": 1}})
    before: str = ""
    whole: str = ""
    given: str = "text"


def mrope(*section: int, **more: float) -> dict[str, Any]:
    """Positions of three numbers, of which so many pairs each turn a head's numbers."""
    return {"rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0} | more}


# fmt: off
PUBLISHED = {
    "Gemma3ForConditionalGeneration": Published("Gemma 3", "Gemma3Config"),
    "Gemma4ForConditionalGeneration": Published("Gemma 4", "Gemma4Config"),
    "Gemma4ForConditionalGeneration (E)": Published("Gemma 4 E", "Gemma4Config"),
    "Gemma4ForConditionalGeneration (26B)": Published("Gemma 4 26B", "Gemma4Config"),
    "Gemma4UnifiedForConditionalGeneration": Published(
        "Gemma 4 31B", "Gemma4UnifiedConfig",
        parts={"vision_config": {"mm_embed_dim": 64, "output_proj_dims": 128}, "audio_config": None},
        whole="Gemma4UnifiedForConditionalGeneration",
    ),
    "Qwen3_5MoeForConditionalGeneration": Published("Qwen3.5-MoE", "Qwen3_5MoeConfig"),
    "Qwen3VLMoeForConditionalGeneration": Published("Qwen3-MoE", "Qwen3VLMoeConfig", mrope(4, 6, 6) | {"norm_topk_prob": False}),
    "Qwen3OmniMoeForConditionalGeneration": Published(
        "Qwen3-MoE", "Qwen3OmniMoeConfig", mrope(4, 6, 6) | {"norm_topk_prob": False},
        parts={
            "audio_config": {"encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 128},
            "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 128,
                              "deepstack_visual_indexes": [0], "image_size": 64, "apply_vit_abs_pos_embed": True}},
        before="thinker.", whole="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "Llama4ForConditionalGeneration": Published("Llama 4", "Llama4Config", before="language_model."),
    "Mistral3ForConditionalGeneration": Published("Ministral 3", "Mistral3Config", {"model_type": "ministral3"}),
    "Glm4vForConditionalGeneration": Published("GLM-4", "Glm4vConfig", mrope(2, 3, 3, partial_rotary_factor=0.5)),
    "Glm4vMoeForConditionalGeneration": Published(
        "GLM-4.5", "Glm4vMoeConfig", mrope(2, 3, 3, partial_rotary_factor=0.5) | {"attention_bias": False}
    ),
    "InternVLForConditionalGeneration": Published("Qwen2", "InternVLConfig", {"model_type": "qwen2"}),
    "Qwen2AudioForConditionalGeneration": Published("Qwen2", given="sounds"),
    "Idefics3ForConditionalGeneration": Published("Llama", given="images"),
    "Qwen2_5_VLForConditionalGeneration": Published("Qwen2", given="images"),
    "Qwen3VLForConditionalGeneration": Published("Qwen3", given="images"),
    "Qwen3_5ForConditionalGeneration": Published("Qwen3.5", given="images"),
}
# fmt: on
TEXT_ONLY = {name: published for name, published in PUBLISHED.items() if published.given == "text"}
