"""The configurations of published checkpoints, as their own `config.json` files say them."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_UNET: Config = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}
_FOUR_LEVELS: Config = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNETS: dict[str, Config] = {
    "sd15": {
        **_UNET,
        **_FOUR_LEVELS,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    "sd21": {
        **_UNET,
        **_FOUR_LEVELS,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_UNET,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 2048,
        "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": 2816,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
}

_VAE: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SIXTEEN_CHANNELS: Config = {
    "force_upcast": True,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
VAES: dict[str, Config] = {
    "sd15": {**_VAE, "sample_size": 512},
    "sd21": {**_VAE, "sample_size": 768},
    "sdxl": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3-medium": {**_VAE, **_SIXTEEN_CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux1": {**_VAE, **_SIXTEEN_CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}

_TEXT: Config = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
_VIT_L: Config = {
    **_TEXT,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_VIT_H: Config = {
    **_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_VIT_BIG_G: Config = {
    **_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# name -> (configuration, whether it projects)
TEXT_ENCODERS: dict[str, tuple[Config, bool]] = {
    "sd15": (_VIT_L, False),
    "sd21": (_VIT_H, False),
    "sdxl": (_VIT_L, False),
    "sdxl_2": (_VIT_BIG_G, True),
    "sd3": (_VIT_L, True),
    "sd3_2": (_VIT_BIG_G, True),
    "flux1": (_VIT_L, False),
    "karlo": (_VIT_L, True),
}
_BETAS: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}
# Stable Diffusion 1.5's scheduler_config.json.
SD15_SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **_BETAS,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
# The same betas on DDIM, which asks the UNet once a step where PNDM asks once more.
SD15_DDIM: Config = {
    "_class_name": "DDIMScheduler",
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SDXL_SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    **_BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD3_SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLUX_SCHEDULERS: dict[str, Config] = {
    "flux1-dev": {
        **SD3_SCHEDULER,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "use_dynamic_shifting": True,
    },
    "flux1-schnell": {**SD3_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False},
}

_SD3: Config = {
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
}
SD3_TRANSFORMERS: dict[str, Config] = {
    "sd3-medium": {
        **_SD3,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "num_attention_heads": 24,
        "num_layers": 24,
        "pos_embed_max_size": 192,
    },
    "sd35-medium": {
        **_SD3,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(13)),
        "num_attention_heads": 24,
        "num_layers": 24,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    },
    "sd35-large": {
        **_SD3,
        "attention_head_dim": 64,
        "caption_projection_dim": 2432,
        "dual_attention_layers": [],
        "num_attention_heads": 38,
        "num_layers": 38,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
_FLUX: Config = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
FLUX_TRANSFORMERS: dict[str, Config] = {
    "flux1-dev": {**_FLUX, "guidance_embeds": True},
    "flux1-schnell": {**_FLUX, "guidance_embeds": False},
}
T5_XXL: Config = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}

# Karlo, the open unCLIP of Kakao Brain: components that only such models have.
_KARLO_ENLARGING: Config = {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "block_out_channels": [320, 640, 960, 1280],
    "layers_per_block": 3,
    "add_attention": False,
}
KARLO: dict[str, Config] = {
    "prior": {
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "num_layers": 20,
        "embedding_dim": 768,
        "num_embeddings": 77,
        "additional_embeddings": 4,
    },
    "text_proj": {
        "clip_extra_context_tokens": 4,
        "clip_embeddings_dim": 768,
        "time_embed_dim": 1280,
        "cross_attention_dim": 1536,
    },
    "decoder": {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
        "block_out_channels": [320, 640, 960, 1280],
        "layers_per_block": 3,
        "cross_attention_dim": 1536,
        "attention_head_dim": 64,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    },
    "super_res_first": _KARLO_ENLARGING,
    "super_res_last": _KARLO_ENLARGING,
}
_UNCLIP_SCHEDULER: Config = {"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000}
KARLO_SCHEDULERS: dict[str, Config] = {
    "prior_scheduler": {
        **_UNCLIP_SCHEDULER,
        "prediction_type": "sample",
        "variance_type": "fixed_small_log",
        "clip_sample_range": 5.0,
    },
    "decoder_scheduler": {**_UNCLIP_SCHEDULER, "variance_type": "learned_range"},
    "super_res_scheduler": {**_UNCLIP_SCHEDULER, "variance_type": "fixed_small_log"},
}
