"""A small network as someone else writes one, with what none of ours has: it draws random numbers and keeps statistics."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.layers = nn.Sequential(nn.BatchNorm2d(width), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        if not (self.training and self.drop_path):
            return x + self.layers(x)
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
        return x + self.layers(x) * kept / (1 - self.drop_path)


class ForeignNet(nn.Module):
    """x (B, C, H, W), t (B,) in 0..1000, labels y (B,) -> (B, C, H, W).

    Args:
        drop_path: the rate at which the last block is skipped. Above 0 the constructor calls `.item()`, as timm's networks do.
    """

    def __init__(self, input_size=(8, 8), in_channels=1, num_classes=10, width=8, depth=2, drop_path=0.0):
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        rates = [rate.item() for rate in torch.linspace(0, drop_path, depth)] if drop_path else depth * [0.0]
        self.register_buffer("frequencies", torch.arange(1, width + 1) / 1000, persistent=False)
        self.classes = nn.Embedding(num_classes + 1, width)
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, rate) for rate in rates))
        self.head = nn.Conv2d(width, in_channels, 1)

    def forward(self, x, t, y):
        condition = torch.cos(t[:, None] * self.frequencies) + self.classes(y)
        return self.head(self.blocks(self.stem(x) + condition[:, :, None, None]))
