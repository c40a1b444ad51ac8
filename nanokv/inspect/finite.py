"""Where the first number that is none comes from (NANOKV_DEBUG=1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def watch(model: nn.Module) -> None:
    """From now on, ValueError names the first module of the model whose output holds NaN or infinity, and whether its
    input did. It reads every output, so a step takes longer and a GPU waits for the host.
    """
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(_hook(name))


def _hook(name: str) -> Callable:
    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        bad = ~output.isfinite()
        if bad.any():
            rows = bad.flatten(1).any(1).nonzero().flatten().tolist()
            x = inputs[0]
            came = "its input did, too" if x.is_floating_point() and not x.isfinite().all() else "its input was finite"
            raise ValueError(
                f"the output of {name} holds NaN or infinity in {int(bad.sum())} of {bad.numel()} places (rows {rows}); {came}"
            )

    return look
