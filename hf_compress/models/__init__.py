"""Nets of the papers that timm lacks. Importing this room registers them with timm."""

from __future__ import annotations

from .cifar_resnet import CifarResNet, resnet20_cifar, resnet32_cifar, resnet56_cifar

__all__ = ["CifarResNet", "resnet20_cifar", "resnet32_cifar", "resnet56_cifar"]
