"""A backbone's fastest form: on which device, in which number format, with which layers folded."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headstart.backbones import Backbone
from headstart.errors import UsageError
from headstart.images import Preprocess
from headstart.loading import BATCH_SIZE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from headstart.images import View

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Embedder:
    """A backbone made ready to run: batch norms folded, channels-last, in the number format the machine is fast in."""

    network: nn.Module
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype
    views: tuple[View, ...] = ("plain",)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of pixels of `Preprocess.apply`, (n, size, size, 3); on one core of the calling thread.

        They are (n, dim), or of several views side by side, (n, views x dim).
        """
        import torch

        torch.set_num_threads(1)
        with torch.inference_mode():
            plain = self.preprocess.normalise(torch.from_numpy(pixels).to(self.device)).to(self.dtype)
            seen = [plain if view == "plain" else plain.flip(3) for view in self.views]
            found = torch.cat([self.network(batch).float() for batch in seen], 1)
            features: NDArray[np.float32] = found.cpu().numpy()
        return features


def prepare(backbone: Backbone, device: torch.device, precision: str) -> Embedder:
    """The fastest exact form of a backbone: what rounding of the number format leaves of it, and no more.

    Folding and bfloat16 are tried on a random picture; where the features leave the plain network's (cosine under 0.99
    in bfloat16, 0.9999 else), the plain float32 network is used, and that is logged. The trial has the size of the
    batches to come, on one thread as they will be, so that the routines generated for it are theirs.
    """
    import copy

    import torch

    dtype = getattr(torch, precision)
    size = backbone.spec.preprocess.size
    example = torch.randn(BATCH_SIZE, 3, size, size, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    with torch.inference_mode():
        home = next((p.device for p in backbone.network.parameters()), torch.device("cpu"))
        expected = backbone.network(example[:1].to(home)).float().cpu()
        network = copy.deepcopy(backbone.network).cpu()
        fold_batch_norms(network, example[:1])
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        try:
            torch.set_num_threads(1)
            found = network(example.to(device, dtype).contiguous(memory_format=torch.channels_last)).float().cpu()
            nearness = torch.nn.functional.cosine_similarity(found[:1].flatten(1), expected.flatten(1)).item()
        except (RuntimeError, TypeError) as error:  # a layer without a kernel for this number format
            log.info("%s does not run in %s: %s", backbone.spec.name, precision, error)
            nearness = 0.0
        finally:
            torch.set_num_threads(threads)
    if not nearness >= (0.9999 if dtype == torch.float32 else 0.99):  # nor a NaN
        log.info("%s: %s would change the features (cosine %.4f); float32 is used", backbone.spec.name, dtype, nearness)
        network, dtype = backbone.network.to(device), torch.float32
    return Embedder(network, backbone.spec.preprocess, device, dtype, backbone.spec.views)


def fold_batch_norms(network: nn.Module, example: torch.Tensor) -> int:
    """Fold each batch norm that directly follows a convolution into its weights, in place; how many there were.

    Pairs are found by running the example and seeing whose output is whose input, so it needs no names. An activation
    that timm keeps inside its batch norm stays. Where the example's output is not what it was (the convolution's own
    output was used elsewhere too), everything is put back.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

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
    from torch import nn

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


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` is the first of cuda, xpu, mps that is there, else the CPU.

    Raises:
        UsageError: for a device that is unknown or not there.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            name, f"is no device of this machine ({reason})", "Give auto, cpu, cuda:N, mps or xpu."
        ) from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`bfloat16` or `float32`: `auto` is bfloat16 where the processor computes in it."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        fast = False
    return "bfloat16" if fast else "float32"
