"""Matrix multiplication with a weight that stays: on a CPU, bfloat16 weights are laid out once for oneDNN's kernels."""

from __future__ import annotations

import torch


class PackedWeight:
    """A (rows, columns) weight in oneDNN's own layout, as large as the plain one."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (T, columns) W^T + bias (rows,) -> (T, rows), accumulated in float32."""
        return self._multiply(x, bias, "none")

    def silu(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu(x W^T + bias), rounded once."""
        return self._multiply(x, bias, "swish")

    def times(self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
        """(x W^T + bias) * factor, for a factor (T, rows), rounded once."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._packed, bias, "mul")
        return y

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, activation, [], "")
        return y


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this weight: bfloat16, on a CPU that computes with it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
