"""GPT-2 (Radford et al. 2019) as one plain module: 148 tensors and 124 million parameters at its defaults.

Shapes: B sequences, T tokens, D width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        split = self.attention(self.norm_1(x_BTD)).unflatten(-1, (3, self.num_heads, -1))
        q_BHTd, k_BHTd, v_BHTd = (part.transpose(1, 2) for part in split.unbind(2))
        y_BHTd = functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)
        x_BTD = x_BTD + self.projection(y_BHTd.transpose(1, 2).flatten(2))
        mixed: Tensor = self.down(functional.gelu(self.up(self.norm_2(x_BTD)), approximate="tanh"))
        return x_BTD + mixed


class GPT2(nn.Module):
    """Called with tokens [B, T]; returns the mean loss of each token but the first."""

    def __init__(self, num_layers: int = 12, width: int = 768, length: int = 1024, vocabulary: int = 50_257) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, max(width // 64, 1)) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits = self.logits(ids_BT)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the token after each [B, T, vocabulary]."""
        x_BTD = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return functional.linear(self.norm(x_BTD), self.tokens.weight)
