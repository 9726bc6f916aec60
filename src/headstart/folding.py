"""Batch norms folded into the convolutions before them: the same function in fewer passes over memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norms(network: nn.Module, example: torch.Tensor) -> int:
    """Fold each batch norm that directly follows a convolution into its weights, in place; how many there were.

    Pairs are found by running the example and seeing whose output is whose input, so it needs no names. An activation
    that timm keeps inside its batch norm stays. Where the example's output is not what it was (the convolution's own
    output was used elsewhere too), everything is put back.
    """
    expected, pairs = _find_pairs(network, example)
    names = {module: name for name, module in network.named_modules()}
    replaced = []
    for conv, norm in pairs:
        assert norm.running_mean is not None and norm.running_var is not None  # as `_find_pairs` chose them
        replaced.append((conv, conv.weight, conv.bias, norm))
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
        _replace(network, names[norm], nn.Sequential(*(m for m in rest if type(m) is not nn.Identity)))
    found = network(example)
    if (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        return len(pairs)
    for conv, weight, bias, norm in replaced:
        conv.weight, conv.bias = weight, bias
        _replace(network, names[norm], norm)
    return 0


def _find_pairs(
    network: nn.Module, example: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """(the example's output, convolutions and the batch norms with fixed statistics that they alone feed)."""
    producers: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    uses: Counter[nn.Module] = Counter()

    def after(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        uses[module] += 1
        if isinstance(module, nn.Conv2d):
            producers[id(output)] = module, output  # keeping the output keeps its id its own

    # Somebody looks at what these give, or a part of them.
    tapped = {module for module in network.modules() if any(part._forward_hooks for part in module.modules())}

    def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d) and module not in tapped and id(inputs[0]) in producers:
            pairs.append((producers[id(inputs[0])][0], module))

    hooks = [m.register_forward_hook(after) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    hooks += [m.register_forward_pre_hook(before) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    output = network(example)
    for hook in hooks:
        hook.remove()
    shared = Counter(conv for conv, _ in pairs)
    alone = [pair for pair in pairs if shared[pair[0]] == uses[pair[0]] == uses[pair[1]] == 1]
    return output, [(conv, norm) for conv, norm in alone if norm.running_mean is not None]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
