"""Tiny checkpoints that transformers can split over ranks, and what the tests of several ranks do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def make(family: str, directory: Path, *, experts: int = 4, columns: int = 64, **more: Any) -> Path:
    """A checkpoint of two layers with random weights, hidden size 64, top-2."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {
        "intermediate_size": 128,
        "moe_intermediate_size": columns,
        "n_routed_experts": experts,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "moe_intermediate_size": columns,
            "num_experts": experts,
            "intermediate_size": 128,
            "decoder_sparse_step": 1,
        },
        "mixtral": {"intermediate_size": columns, "num_local_experts": experts},
        "gpt_oss": {
            "intermediate_size": columns,
            "num_local_experts": experts,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "glm4_moe": grouped,
        "deepseek_v3": dict(
            grouped, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16
        ),
    }
    names = {
        "qwen3_moe": "Qwen3Moe",
        "gpt_oss": "GptOss",
        "mixtral": "Mixtral",
        "glm4_moe": "Glm4Moe",
        "deepseek_v3": "DeepseekV3",
    }
    if family == "deepseek_v3":
        common.pop("head_dim")
    config = getattr(transformers, f"{names[family]}Config")(**{**common, **own[family], **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
            elif "norm" not in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(directory)
    return directory


def checkpoint(folder: Path, family: str, **sizes: Any) -> Path:
    """The checkpoint of these sizes in ``folder``, made once."""
    path = folder / "-".join((family, *(f"{k}{v}" for k, v in sizes.items())))
    return path if path.exists() else make(family, path, **sizes)


def ep_sizes() -> bool:
    """Whether transformers knows ``ep_size``; 5.17 has ``enable_expert_parallel`` instead, and one implementation."""
    from transformers.distributed import DistributedConfig

    return hasattr(DistributedConfig, "ep_size")


def load(path: Path, dtype: torch.dtype = torch.float32, **distributed: Any) -> Any:
    """The model as transformers loads it, split over the ranks if ``distributed`` says so."""
    import transformers
    from transformers.distributed import DistributedConfig

    transformers.logging.set_verbosity_error()
    if distributed.get("ep_size") and not ep_sizes():
        distributed = {"tp_size": distributed["tp_size"], "enable_expert_parallel": True}
    split = {"distributed_config": DistributedConfig(**distributed)} if distributed else {}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **split).eval()


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    """On the CPU, wherever the model is."""
    with torch.no_grad():
        return model(tokens().to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def answer(model: Any, batch: int = 2, new: int = 6, **options: Any) -> Tensor:
    """What ``generate`` says, on the CPU."""
    ids = tokens(batch).to(next(model.parameters()).device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids, max_new_tokens=new, **options).cpu()
