"""Which implementation of an operator runs, and what this installation holds.

Four implementations can exist of an operator:

- ``reference``: the paper's formula in plain PyTorch, dense and slow, differentiated by autograd. Always there.
- ``torch``: the fast form composed of PyTorch operations. Always there, on every device and dtype.
- ``native``: compiled kernels, C++ on CPU tensors and CUDA C++ on CUDA tensors. Registered as ``torch.ops.fastpeft``.
- ``triton``: Triton kernels on CUDA tensors, and on CPU tensors under ``TRITON_INTERPRET=1`` for tests. Registered as
  ``torch.ops.fastpeft_triton``.

An operator picks one per call from device and dtype, the first that can take the tensors in its own order of
preference. ``use_backend`` or the environment variable ``FASTPEFT_BACKEND`` force one, and then an operator that does
not have it, or cannot run it on these tensors, raises instead of falling back.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "native", "triton")

# One library for each lane that registers operators. Both hold the same schemas and the same fakes.
_LIBRARIES = {
    "native": torch.library.Library("fastpeft", "DEF"),
    "triton": torch.library.Library("fastpeft_triton", "DEF"),
}


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        from fastpeft import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if importlib.util.find_spec("fastpeft._C") is None:
            return None, "not built: install fastpeft with a C++ compiler at hand"
        if os.environ.get("FASTPEFT_ISA"):
            raise ValueError(
                f"fastpeft._C does not load with FASTPEFT_ISA={os.environ['FASTPEFT_ISA']}: {error}"
            ) from error
        warnings.warn(f"fastpeft._C was built but does not load, so slower code runs: {error}", stacklevel=2)
        return None, f"does not load: {error}"
    return _C, "loaded"


extension, extension_status = _load_extension()


def _check_name(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = _check_name(os.environ.get("FASTPEFT_BACKEND") or None, "FASTPEFT_BACKEND")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every operator called inside, in all threads; None gives the choice back.

    Raises:
        ValueError: the name is not a backend.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def where_it_fits(backend: str, x: Tensor, fits: Callable[[int], bool]) -> str:
    """The composition in place of a CUDA C++ kernel that has no room for a shape, unless that was asked for by name.

    Args:
        backend: what was chosen.
        x: where it would run.
        fits: whether a shape fits so many bytes of shared memory.
    """
    if backend != "native" or not x.is_cuda or _forced is not None:
        return backend
    return backend if fits(_shared_memory(x.device)) else "torch"


def where_it_pays(backend: str, x: Tensor, pays: Callable[[], bool]) -> str:
    """Triton in place of a CUDA C++ kernel on shapes where it costs less, unless a backend was asked for by name.

    In a graph that is being compiled sizes may be unknown: there it stays with what was chosen.

    Args:
        backend: what was chosen.
        x: where it would run.
        pays: whether Triton costs less.
    """
    if backend != "native" or not x.is_cuda or _forced is not None or torch.compiler.is_compiling():
        return backend
    return "triton" if triton_available() and pays() else backend


@cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def _native_unavailable(op: Operator, x: Tensor) -> str | None:
    if x.dtype not in op.dtypes:
        return f"takes {', '.join(str(dtype) for dtype in op.dtypes)}, not {x.dtype}"
    if extension is None or x.device.type not in op.compiled_for:
        return f"no compiled kernel for {x.device.type} tensors (extension {extension_status})"
    return None


def _triton_unavailable(op: Operator, x: Tensor) -> str | None:
    if x.dtype not in op.dtypes:
        return f"takes {', '.join(str(dtype) for dtype in op.dtypes)}, not {x.dtype}"
    if not triton_available():
        return "triton is not installed"
    if not (x.is_cuda or (interpreting() and x.device.type == "cpu")):
        return f"takes CUDA tensors, or CPU tensors under TRITON_INTERPRET=1, not {x.device.type} tensors"
    return None


def _has_kernel(name: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


_UNAVAILABLE: dict[str, Callable[[Operator, Tensor], str | None]] = {
    "native": _native_unavailable,
    "triton": _triton_unavailable,
}


@dataclass
class Operator:
    """An operator: its schema, its fake, and the order in which its implementations are tried.

    Args:
        schema: the operator's name and signature as PyTorch writes them.
        fake: computes empty outputs of the right shape, dtype and device.
        order: backends by preference, for example ``("native", "torch")``; ``reference`` and ``torch`` need not have an
            operator, the caller runs them itself.
        dtypes: what the compiled lanes take for the first tensor.
    """

    schema: str
    fake: Callable
    order: Sequence[str]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    name: str = field(init=False)
    compiled_for: Sequence[str] = field(init=False, default=())  # devices of the native lane
    _chosen: dict[tuple, str] = field(init=False, default_factory=dict)
    _overloads: dict[str, Callable] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        for lane in _LIBRARIES:
            if lane in self.order:
                _LIBRARIES[lane].define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
                torch.library.register_fake(f"{_LIBRARIES[lane].ns}::{self.name}", self.fake, lib=_LIBRARIES[lane])
                # Looked up once: by name it takes as long as a small kernel.
                self._overloads[lane] = getattr(getattr(torch.ops, _LIBRARIES[lane].ns), self.name).default
        if "native" in self.order:
            # Now, because torch.compile cannot look at the dispatcher when it meets the operator.
            self.compiled_for = [device for device in ("cpu", "cuda") if _has_kernel(f"fastpeft::{self.name}", device)]
        OPERATORS[self.name] = self

    def implement_triton(self, launcher: Callable) -> None:
        """Registers the Triton lane, for CUDA tensors and for the interpreter's CPU tensors."""
        for key in ("CUDA", "CPU"):
            _LIBRARIES["triton"].impl(self.name, launcher, key)

    def choose(self, x: Tensor, adapter: Tensor) -> str:
        """The backend that runs for x and an adapter's tensor; the compiled ones take the latter in up to 32 bits.

        Under the transforms of ``torch.func`` (vmap, grad, jacrev, …) that is the reference, which is made of PyTorch's
        own operations.

        Raises:
            RuntimeError: a backend was forced that this operator lacks or that cannot take the tensors.
            ValueError: x and the adapter are on different devices.
        """
        if torch.compiler.is_compiling():  # a graph that looks into the memory below is compiled again once that grows
            return self._choose(x, adapter)
        if torch._C._are_functorch_transforms_active():
            if _forced not in (None, "reference"):
                raise RuntimeError(
                    f"backend {_forced!r} was asked for, but cannot run {self.name} under a transform of torch.func: "
                    "only the reference can"
                )
            return "reference"
        key = (x.dtype, x.device, adapter.dtype, adapter.device, _forced)
        chosen = self._chosen.get(key)  # one look for all questions: asked one by one they take as long as a layer
        if chosen is None:
            chosen = self._chosen[key] = self._choose(x, adapter)
        return chosen

    def _choose(self, x: Tensor, adapter: Tensor) -> str:
        if x.device != adapter.device:
            raise ValueError(f"x must be on the adapter's device, {adapter.device}, got {x.device}")
        if _forced is None:
            chosen = self._best(x)
            return "torch" if chosen in _UNAVAILABLE and adapter.dtype == torch.float64 else chosen
        if _forced not in (*self.order, "reference"):
            raise RuntimeError(f"backend {_forced!r} was asked for, but {self.name} has only {', '.join(self.order)}")
        if _forced in _UNAVAILABLE and (reason := _UNAVAILABLE[_forced](self, x)) is not None:
            raise RuntimeError(f"backend {_forced!r} was asked for, but cannot run {self.name}: {reason}")
        if _forced in _UNAVAILABLE and adapter.dtype == torch.float64:
            raise RuntimeError(f"backend {_forced!r} was asked for, but cannot run {self.name} with a float64 adapter")
        return _forced

    def _best(self, x: Tensor) -> str:
        for backend in self.order:
            # In interpreter mode the kernels are for tests, which ask for them by name.
            if backend == "triton" and not x.is_cuda:
                continue
            if backend not in _UNAVAILABLE or _UNAVAILABLE[backend](self, x) is None:
                return backend
        return "torch"

    def call(self, backend: str, *args):
        """Calls the operator in one of the compiled lanes."""
        return self._overloads[backend](*args)


OPERATORS: dict[str, Operator] = {}


def backends() -> dict[str, dict[str, str]]:
    """What can run here: for each operator and backend "yes", or the reason why not.

    Asked for a float32 tensor on the CPU and, where there is a GPU, on CUDA: keys are ``"<operator> (cpu)"`` and
    ``"<operator> (cuda)"``.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table = {}
    for name, operator in OPERATORS.items():
        for device in devices:
            probe = torch.empty(0, device=device)
            row = {"reference": "yes", "torch": "yes"}
            for backend, unavailable in _UNAVAILABLE.items():
                lacking = None if backend in operator.order else "not written for this operator"
                row[backend] = lacking or unavailable(operator, probe) or "yes"
            try:
                row["chosen"] = operator.choose(probe, probe)
            except RuntimeError as error:
                row["chosen"] = f"nothing ({error})"
            table[f"{name} ({device})"] = row
    return table
