"""The yardstick: a hand-written transformer of the same shape in plain PyTorch, with nothing parallel about it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_md.config import ModelConfig


class Block(torch.nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = model.heads, model.kv_heads or model.heads
        width = model.head_dim or model.hidden // model.heads
        self.width = width
        self.norm1 = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        self.qkv = torch.nn.Linear(model.hidden, (self.heads + 2 * self.kv_heads) * width, bias=False)
        self.out = torch.nn.Linear(self.heads * width, model.hidden, bias=False)
        self.norm2 = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        self.gate_up = torch.nn.Linear(model.hidden, 2 * model.ffn, bias=False)
        self.down = torch.nn.Linear(model.ffn, model.hidden, bias=False)

    def forward(self, x_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attention, then SwiGLU, each around the residual stream."""
        rows, length, _ = x_BLD.shape
        qkv = self.qkv(self.norm1(x_BLD)).view(rows, length, -1, self.width).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = (rotate(part, cos, sin).to(v.dtype) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads < self.heads)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).reshape(rows, length, -1))
        gate, up = self.gate_up(self.norm2(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, rotate-half form."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainTransformer(torch.nn.Module):
    """Bidirectional transformer; `forward` returns the final hidden states [B, L, D], `output` is its head's weight."""

    def __init__(self, model: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.width, self.theta = model.head_dim or model.hidden // model.heads, model.rope_theta
        self.embedding = torch.nn.Embedding(vocab, model.hidden)
        self.blocks = torch.nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        weight = self.embedding.weight
        self.output = weight if model.tied else torch.nn.Parameter(torch.empty_like(weight))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=model.init_std)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, L, D]."""
        device = tokens_BL.device
        frequencies = self.theta ** (-torch.arange(0, self.width, 2, device=device) / self.width)
        angles = torch.outer(torch.arange(tokens_BL.shape[1], device=device).float(), frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, cos, sin)
        return self.norm(x_BLD)
