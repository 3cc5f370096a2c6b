"""A small transformer that reads an image row by row, as a sequence. Plain torch, without ranks."""

import torch
from digits import NUM_CLASSES
from torch import Tensor, nn
from torch.nn import functional

NUM_ROWS = ROW_WIDTH = 8
WIDTH = 64
HEAD_WIDTH = 16
NUM_BLOCKS = 2


class Attention(nn.Module):
    """Self-attention. Its projections are apart, so that tensor parallelism can give each rank whole heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return a mixture of the rows: float32 (N, rows, WIDTH)."""
        # A rank of a tensor-parallel group has a part of the heads: their number follows from the projection's width.
        heads = (
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed: Tensor = self.project(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_before = nn.LayerNorm(WIDTH)
        self.attend = Attention()
        self.norm_between = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next block's input: float32 (N, rows, WIDTH)."""
        x = x + self.drop(self.attend(self.norm_before(x)))
        widened = functional.gelu(self.widen(self.norm_between(x)))
        narrowed: Tensor = self.drop(self.narrow(widened))
        return x + narrowed


class Transformer(nn.Module):
    """A classifier of digits: 101,834 parameters.

    Example:
        >>> Transformer()(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(ROW_WIDTH, WIDTH)
        self.places = nn.Embedding(NUM_ROWS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classify = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of each class, float32 (N, 10), of images, float32 (N, 1, 8, 8)."""
        x = self.embed(images.squeeze(1)) + self.places(torch.arange(NUM_ROWS, device=images.device))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.classify(self.norm(x).mean(dim=1))
        return scores
