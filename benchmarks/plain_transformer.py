"""The yardstick: a hand-written transformer of the same shape in plain PyTorch, with nothing parallel about it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_md.config import ModelConfig


class Block(torch.nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads = model.heads
        self.norm1 = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        self.qkv = torch.nn.Linear(model.hidden, 3 * model.hidden, bias=False)
        self.out = torch.nn.Linear(model.hidden, model.hidden, bias=False)
        self.norm2 = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        self.gate_up = torch.nn.Linear(model.hidden, 2 * model.ffn, bias=False)
        self.down = torch.nn.Linear(model.ffn, model.hidden, bias=False)

    def forward(self, x_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attention, then SwiGLU, each around the residual stream."""
        rows, length, width = x_BLD.shape
        qkv = self.qkv(self.norm1(x_BLD)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        gate, up = self.gate_up(self.norm2(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, rotate-half form."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainTransformer(torch.nn.Module):
    """Bidirectional transformer with a tied head; `forward` returns the final hidden states [B, L, D]."""

    def __init__(self, model: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.width, self.theta = model.hidden // model.heads, model.rope_theta
        self.embedding = torch.nn.Embedding(vocab, model.hidden)
        self.blocks = torch.nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = torch.nn.RMSNorm(model.hidden, eps=model.norm_eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=model.init_std)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, L, D]."""
        frequencies = self.theta ** (-torch.arange(0, self.width, 2) / self.width)
        angles = torch.outer(torch.arange(tokens_BL.shape[1]).float(), frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, cos, sin)
        return self.norm(x_BLD)
