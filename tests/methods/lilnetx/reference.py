"""Bits as plain torch writes them, for autograd to derive."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def plain_logits(model, x):
    """f of (slices, channels), from the parameters of an entropy model."""
    slopes, bends = functional.softplus(model.slopes), torch.tanh(model.bends)
    for i in range(3):
        x = x * slopes[i] + model.offsets[i]
        x = x + torch.tanh(x) * bends[i]
    return x * slopes[3] + model.offsets[3]


def plain_bits(model, x):
    """-log2(sigmoid(f(x + 1/2)) - sigmoid(f(x - 1/2))), each sigmoid taken on the side where it is small."""
    lower, upper = plain_logits(model, x - 0.5), plain_logits(model, x + 0.5)
    is_right = (lower + upper > 0).detach()
    low = functional.logsigmoid(torch.where(is_right, -upper, lower))
    high = functional.logsigmoid(torch.where(is_right, -lower, upper))
    share = -torch.expm1(low - high)
    return -(high + torch.log(share.clamp_min(1e-30))) / math.log(2)
