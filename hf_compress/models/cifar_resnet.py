"""The residual nets for CIFAR of He et al. (Deep Residual Learning, 2015, section 4.2), registered with timm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__ = ["CifarResNet", "resnet20_cifar", "resnet32_cifar", "resnet56_cifar"]


class CifarResNet(nn.Module):
    """Three stages of n basic blocks, depth 6 n + 2, for images (batch, in_chans, 32, 32) of any size.

    Args:
        depth: 6 n + 2.
        width: channels of the first stage; the others have two and four times as many.
        shortcut: where the shape changes, "A" pads with zero channels and has no parameters, "B" is a 1 x 1
            convolution with batch norm.
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        shortcut: str = "A",
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, such as 20, 32, 56; got {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' (zero padding) or 'B' (convolution), got {shortcut!r}")
        self.num_classes, self.num_features, self.drop_rate = num_classes, 4 * width, drop_rate
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.linear: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """The last layer, as timm asks for it."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one; 0 classes for none."""
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in_chans, h, w) to feature maps (batch, 4 * width, h / 4, w / 4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps to logits (batch, num_classes), or to pooled features."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = (
                _ZeroPadding(channels - channels_in, stride)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _ZeroPadding(nn.Module):
    """Option A: every stride-th row and column, the new channels zero, half of them before and half after the old."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.after = new_channels // 2, new_channels - new_channels // 2
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _stage(channels_in: int, channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = _BasicBlock(channels_in, channels, stride, shortcut)
    return nn.Sequential(first, *(_BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


_CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "linear",
}
default_cfgs = generate_default_cfgs(
    dict.fromkeys(("resnet20_cifar.untrained", "resnet32_cifar.untrained", "resnet56_cifar.untrained"), _CFG)
)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters; `shortcut` "A" (default) or "B", `width` 16."""
    return _create("resnet20_cifar", pretrained, **{"depth": 20, **kwargs})


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters; `shortcut` "A" (default) or "B", `width` 16."""
    return _create("resnet32_cifar", pretrained, **{"depth": 32, **kwargs})


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters; `shortcut` "A" (default) or "B", `width` 16."""
    return _create("resnet56_cifar", pretrained, **{"depth": 56, **kwargs})
