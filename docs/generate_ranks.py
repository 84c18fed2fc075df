"""Write the table of docs/several-gpus.md: how much of a model each card holds, from its configuration alone.

python docs/generate_ranks.py [--check]. No weights are read: the models are built on the meta device. Experts count
4.25 bits a weight, everything else 16. What transformers' own plan splits beside the experts (attention, dense layers,
embeddings) is split where the key/value heads divide by the cards, else attention is whole on each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent / "several-gpus.md"
CARDS = (1, 2, 4, 8)
# Bytes of a card of 80 GB that weights may take: the rest is for activations, caches and the runtime.
ROOM = 72e9

# Sizes as published in the models' own config.json; what is not here is the default of the configuration's class.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768, "vocab_size": 151936}),
    "gpt-oss-120b": ("GptOssConfig", {
        "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 128, "intermediate_size": 2880, "vocab_size": 201088}),
    "GLM-4.5-Air": ("Glm4MoeConfig", {
        "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1, "moe_intermediate_size": 1408,
        "intermediate_size": 10944, "first_k_dense_replace": 1, "vocab_size": 151552}),
    "Mixtral-8x22B": ("MixtralConfig", {
        "hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8,
        "num_local_experts": 8, "intermediate_size": 16384, "vocab_size": 32768}),
    "MiniMax-M2": ("MiniMaxM2Config", {
        "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 256, "intermediate_size": 1536, "vocab_size": 200064}),
    "Qwen3-235B-A22B": ("Qwen3MoeConfig", {
        "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 1536, "vocab_size": 151936}),
    "GLM-4.5": ("Glm4MoeConfig", {
        "hidden_size": 5120, "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "n_routed_experts": 160, "n_shared_experts": 1, "moe_intermediate_size": 1536,
        "intermediate_size": 12288, "first_k_dense_replace": 3, "vocab_size": 151552}),
    "Qwen3-Coder-480B": ("Qwen3MoeConfig", {
        "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "num_experts": 160, "moe_intermediate_size": 2560, "vocab_size": 151936}),
    "DeepSeek-V3": ("DeepseekV3Config", {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "intermediate_size": 18432,
        "first_k_dense_replace": 3, "vocab_size": 129280}),
}  # fmt: skip


def bytes_per_card(name: str) -> tuple[float, float, dict[int, float], dict[int, str]]:
    """Bytes in bf16, bytes with MXFP4 experts, bytes on each card by their number, and how experts are split."""
    import transformers
    from transformers import AutoModelForCausalLM

    from mxfp4_compile.passes.find.discover import packed_parameters
    from mxfp4_compile.ranks.shards import choose

    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    packed = [packed_parameters(module) for module in model.modules()]
    experts = {id(p): p for found in packed for p in found.values()}
    first = next(found for found in packed if found)
    count = next(iter(first.values())).shape[0]
    columns = min(min(p.shape[1:]) for p in first.values())
    columns = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", columns)
    weights = sum(p.numel() for p in experts.values())
    rest = {n: p.numel() * 2 for n, p in model.named_parameters() if id(p) not in experts}
    heads = config.num_key_value_heads
    cards, how = {}, {}
    for number in CARDS:
        split, parts, _ = choose("auto", count, columns, number)
        most = max(stop - start for start, stop in parts) / parts[-1][1]
        own = sum(
            size / (number if _is_split(n, model._tp_plan, heads % number == 0) else 1) for n, size in rest.items()
        )
        cards[number], how[number] = weights * 4.25 / 8 * most + own, split
    return weights * 2 + sum(rest.values()), cards[1], cards, how


def _is_split(name: str, plan: dict[str, str], heads_divide: bool) -> bool:
    """Whether transformers' plan splits a parameter over the cards."""
    wildcard = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    rule = plan.get(wildcard) or plan.get(wildcard.rpartition(".")[0]) or ""
    if ".self_attn." in name and not heads_divide:
        return False
    return "wise" in rule


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| model | bf16, GB | MXFP4 experts, GB | "
        + " | ".join(f"on {n}, GB a card" for n in CARDS[1:])
        + " | fits from |",
        "|---|---|---|" + "---|" * (len(CARDS)),
    ]
    for name in MODELS:
        whole, quantized, cards, _ = bytes_per_card(name)
        fits = next((str(n) for n in CARDS if cards[n] <= ROOM), "more than 8")
        each = " | ".join(f"{cards[n] / 1e9:.0f}" for n in CARDS[1:])
        lines.append(f"| {name} | {whole / 1e9:.0f} | {quantized / 1e9:.0f} | {each} | {fits} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table between the page's marks, or check that it is there."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- generated by generate_ranks.py -->\n", "\n<!-- end -->"
    before, after = text[: text.index(start) + len(start)], text[text.index(end) :]
    new = before + table() + after
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "docs/several-gpus.md is not what docs/generate_ranks.py writes")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
