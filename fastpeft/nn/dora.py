"""DoRA (Liu et al., ICML 2024, arXiv 2402.09353): LoRA with a trained magnitude, ``LoraConfig(use_dora=True)``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastpeft.nn.adapter import Site, dropout_p, parameter_of, same_numbers
from fastpeft.nn.linear import dense_weight
from fastpeft.nn.lora import LoRAAdapter, LoraConfig
from fastpeft.ops.dora import add_dora, apply_dora, row_norms, row_squares


class DoRAAdapter(LoRAAdapter):
    """LoRA's parameters and m, (out,), which starts as ‖W + s · B A‖: m / ‖W + s · B A‖ is exactly one then."""

    file_keys: ClassVar = {**LoRAAdapter.file_keys, "lora_magnitude_vector": "lora_magnitude_vector"}

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        if site.weight is None:
            raise site.error(
                "use_dora=True needs the norm of every row of the weight, and this layer has no dense floating-point "
                "weight to read: load the base model unquantised, or leave use_dora out"
            )
        self.lora_magnitude_vector = site.parameter(site.out_features)
        self.norms = RowNorms()
        if self.lora_magnitude_vector.is_meta or site.weight.is_meta:
            return
        with torch.no_grad():
            norms = row_norms(site.weight, *self.matrices(), self.scaling)
            if not bool(norms.all()):
                zeros = int((norms == 0).sum())
                raise site.error(f"use_dora=True divides by the norm of every row of the weight, and {zeros} are zero")
            self.lora_magnitude_vector.copy_(norms)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply_dora(x, weight, bias, *self._of(weight))

    def add_to(self, y: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        weight = dense_weight(base)
        assert weight is not None  # or there would be no adapter
        return add_dora(y, x, weight, getattr(base, "bias", None), *self._of(weight))

    def split_refusal(self, by_rows: bool) -> str | None:
        return None if by_rows else "the norm of a row of W + s · B A takes all of its columns"

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        lora_A, lora_B = self.matrices()
        lora_B, magnitude = lora_B[rows], parameter_of(self, "lora_magnitude_vector")[rows]
        norms = self.norms(weight, lora_A, lora_B, self.scaling)
        return apply_dora(x, weight, bias, lora_A, lora_B, magnitude, self.scaling, 0.0, norms)

    def _of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float, float, Tensor]:
        """What the operators take of the adapter."""
        lora_A, lora_B = self.matrices()
        p = dropout_p(self.dropout) if self.dropout_p > 0 else 0.0
        norms = self.norms(weight, lora_A, lora_B, self.scaling)
        return lora_A, lora_B, parameter_of(self, "lora_magnitude_vector"), self.scaling, p, norms

    def add_to_weight(self, weight: Tensor, base: Tensor) -> Tensor:
        norms = self.norms(base, *self.matrices(), self.scaling)
        return (self.lora_magnitude_vector / norms)[:, None] * (weight + self.delta_weight())

    def low_rank(self) -> None:
        """m takes part in W as well, so there are no A and B of what is added to it."""


class RowNorms:
    """‖W + s · B A‖ of every row for one layer and adapter, kept from one call to the next while nothing changes.

    - The sums of squares of W are kept until W is another tensor or PyTorch counts a change of it in place. It does not
      count one through ``weight.data``: call ``forget`` after that.
    - The norms are kept on a CPU until a number of A or B differs, which cannot miss a change and costs little beside
      W Aᵀ. Elsewhere that would make the host wait: there they are kept until PyTorch counts a change, and only while A
      and B are not being trained, since optimizers with kernels of their own may not let it count.
    - Nothing is kept by torch.compile, by a CUDA graph, which would replay what it was captured with, or in copies.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._squares: tuple[_Kept, Tensor] | None = None  # W, ‖W‖²
        self._norms: tuple[Tensor, float, _Kept, _Kept, Tensor] | None = None  # ‖W‖², s, A, B, the norms

    def __reduce__(self) -> Any:
        return RowNorms, ()

    def __call__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return row_norms(weight, lora_A, lora_B, scaling)
        squares = self._row_squares(weight)
        kept = self._norms
        numbers = lora_A.is_cpu
        trained = torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)
        if kept is not None and (numbers or not trained) and kept[0] is squares and kept[1] == scaling:
            if kept[2].is_still(lora_A) and kept[3].is_still(lora_B):
                return kept[4]
        with torch.inference_mode(False):  # kept beyond this call, whatever mode it is in
            norms = row_norms(weight, lora_A, lora_B, scaling, squares)
            self._norms = None
            if numbers or not trained:
                self._norms = squares, scaling, _Kept(lora_A, numbers), _Kept(lora_B, numbers), norms
        return norms

    def _row_squares(self, weight: Tensor) -> Tensor:
        kept = self._squares
        if kept is None or not kept[0].is_still(weight):
            with torch.inference_mode(False):
                kept = self._squares = _Kept(weight, False), row_squares(weight)
        return kept[1]


class _Kept:
    """A tensor as it was: a copy of its numbers, or where it lies and how often it had been changed."""

    def __init__(self, tensor: Tensor, numbers: bool) -> None:
        self.numbers = tensor.detach().clone() if numbers else None
        # Does not keep the memory, which may be wanted elsewhere; but its name goes to no other storage meanwhile.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = None if numbers else _place(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        if self.numbers is not None:
            return same_numbers(self.numbers, tensor)
        return self.place is not None and self.place == _place(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    if tensor.is_inference():  # changes of tensors made in inference mode are not counted
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
