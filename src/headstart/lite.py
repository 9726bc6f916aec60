"""EfficientNet-Lite (github.com/tensorflow/tpu, efficientnet/lite), built without timm.

timm defines the same network, and a test holds this one against it bit for bit. But importing timm imports all of
torchvision and torch's compiler: two seconds, as long as the features of four hundred pictures, at each start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
_HALVING_STAGES = (1, 2, 3, 5)  # whose first block has stride 2


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME does: with stride 2 one more on the right and at the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, channels, height / stride, width / stride)."""
        padding = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        result: Tensor = self._conv_forward(functional.pad(x, padding), self.weight, self.bias)
        return result


def _convolution(weight: Tensor, stride: int = 1) -> nn.Conv2d:
    """A convolution of a weight's shape; one input channel a group means depthwise."""
    outputs, inputs, kernel, _ = weight.shape
    groups = outputs if inputs == 1 else 1
    kind, padding = (nn.Conv2d, kernel // 2) if stride == 1 else (SameConv2d, 0)
    return kind(inputs * groups, outputs, kernel, stride, padding, groups=groups, bias=False)


def _norm(weight: Tensor) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(len(weight), eps=1e-3)


class Block(nn.Module):
    """An inverted residual block; the first stage's has no expansion. Names are timm's."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        names = ("conv_pw", "conv_dw", "conv_pwl") if f"{prefix}conv_pwl.weight" in state else ("conv_dw", "conv_pw")
        self.steps = [(name, f"bn{number}") for number, name in enumerate(names, 1)]
        for name, norm in self.steps:
            self.add_module(name, _convolution(state[f"{prefix}{name}.weight"], stride if name == "conv_dw" else 1))
            self.add_module(norm, _norm(state[f"{prefix}{norm}.weight"]))
        inputs, outputs = state[f"{prefix}{names[0]}.weight"], state[f"{prefix}{names[-1]}.weight"]
        width = inputs.shape[1] if names[0] == "conv_pw" else inputs.shape[0]
        self.residual = stride == 1 and width == outputs.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same, or halved and widened."""
        y = x
        for number, (name, norm) in enumerate(self.steps, 1):
            y = self.get_submodule(norm)(self.get_submodule(name)(y))
            if number < len(self.steps):
                y = functional.relu6(y, inplace=True)
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """The network of the given weights' shapes, without its last layer: pictures (n, 3, s, s) -> features (n, dim)."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = _convolution(state["conv_stem.weight"], 2), _norm(state["bn1.weight"])
        places = sorted({tuple(map(int, key.split(".")[1:3])) for key in state if key.startswith("blocks.")})
        stages: dict[int, list[Block]] = {}
        for stage, place in places:
            stride = 2 if stage in _HALVING_STAGES and place == 0 else 1
            stages.setdefault(stage, []).append(Block(state, f"blocks.{stage}.{place}.", stride))
        self.blocks = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages.values()))
        self.conv_head, self.bn2 = _convolution(state["conv_head.weight"]), _norm(state["bn2.weight"])

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, dim) of normalised pictures."""
        x = self.blocks(functional.relu6(self.bn1(self.conv_stem(x)), inplace=True))
        return functional.relu6(self.bn2(self.conv_head(x)), inplace=True).mean((2, 3))


def build(state: Mapping[str, Tensor]) -> EfficientNetLite:
    """The network with these weights (timm's names, without `classifier`), not copied."""
    with torch.device("meta"):
        network = EfficientNetLite(state)
    network.load_state_dict(dict(state), assign=True)
    return network
