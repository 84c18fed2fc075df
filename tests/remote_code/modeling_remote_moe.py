"""A small causal language model in the style of models that bring their own code: experts in a list, called in a loop.

Written for the tests: dense layers first, then a router limited to groups, experts in order of their tokens, shared
experts beside them.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_remote_moe import RemoteMoEConfig


class RemoteMoEMLP(nn.Module):
    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RemoteMoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x):
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).softmax(dim=-1)
        groups = scores.view(x.shape[0], c.n_group, -1).max(dim=-1).values
        kept = torch.zeros_like(groups).scatter_(1, groups.topk(c.topk_group, dim=-1, sorted=False).indices, 1)
        mask = kept.unsqueeze(-1).expand(-1, c.n_group, c.n_routed_experts // c.n_group).reshape(x.shape[0], -1)
        weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(c.num_experts_per_tok, dim=-1, sorted=False)
        return ids, weights * c.routed_scaling_factor


class RemoteMoEBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList(
            [RemoteMoEMLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = RemoteMoEGate(config)
        self.shared_experts = RemoteMoEMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        x = hidden_states.view(-1, shape[-1])
        ids, weights = self.gate(x)
        return self.moe_infer(x, ids, weights).view(*shape) + self.shared_experts(hidden_states)

    @torch.no_grad()
    def moe_infer(self, x, ids, weights):
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        tokens_per_expert = counts.sum(dim=0).cpu().numpy()
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        outputs, start = [], 0
        for i, count in enumerate(tokens_per_expert):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
        back = torch.empty_like(joined)
        back[order] = joined
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(dim=1).type(back.dtype)


class RemoteMoEAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class RemoteMoELayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.self_attn = RemoteMoEAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)
        dense = index < config.first_k_dense_replace
        self.mlp = RemoteMoEMLP(config, config.intermediate_size) if dense else RemoteMoEBlock(config)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class RemoteMoEPreTrainedModel(PreTrainedModel):
    config_class = RemoteMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["RemoteMoELayer"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.2)
        elif isinstance(module, RemoteMoEGate):
            module.weight.data.normal_(std=0.5)


class RemoteMoEModel(RemoteMoEPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RemoteMoELayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class RemoteMoEForCausalLM(RemoteMoEPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = RemoteMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)))
