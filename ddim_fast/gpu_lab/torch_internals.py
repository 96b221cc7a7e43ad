"""Everything undocumented of torch that the laboratory needs, in one place.

torch 2.13 is known to have all of it. What is missing elsewhere is named by an ``ImportError`` or
``RuntimeError``.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

try:
    # Tensors with a device and no memory. torch.export and torch.compile are built on them; they
    # have no public name.
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    # The documented way to see every operator (notes on "Extending PyTorch") has no other name.
    from torch.utils._python_dispatch import TorchDispatchMode

    # Nested arguments, as torch itself takes them apart. The public optree is another package.
    from torch.utils._pytree import tree_flatten, tree_map_only
except ImportError as error:
    raise ImportError(
        f"a fake CUDA device needs FakeTensorMode, TorchDispatchMode and pytree of torch 2.13, got torch "
        f"{torch.__version__} without them ({error}): install torch 2.13"
    ) from error

__all__ = [
    "CUDA_INITIALISERS",
    "FakeTensor",
    "FakeTensorMode",
    "PretendCudaMode",
    "TorchDispatchMode",
    "WeakStorage",
    "cuda_device_guard",
    "forget_fake_tensors",
    "implementation_of",
    "no_device_memory",
    "same_generator",
    "schema_of",
    "storage_key",
    "tree_flatten",
    "tree_map_only",
]


CUDA_INITIALISERS = tuple(name for name in ("init", "_lazy_init") if hasattr(torch.cuda, name))
"""Functions of torch.cuda that initialise the driver. torch calls the private one by itself."""


class PretendCudaMode(FakeTensorMode):
    """FakeTensorMode that never tries to initialise CUDA, though torch.cuda says that it is
    available."""

    @property
    def avoid_device_init(self) -> bool:
        return True


@contextlib.contextmanager
def no_device_memory() -> Iterator[None]:
    """Keep torch from allocating one element of a device before the first fake tensor there, until
    the end.

    torch 2.10 does so where torch.cuda says that it is available. Later versions ask torch.accelerator.
    """
    if not hasattr(fake_tensor, "init_gpu_context"):
        yield
        return
    with mock.patch.object(fake_tensor, "init_gpu_context", return_value=None):
        yield


def forget_fake_tensors(mode: FakeTensorMode) -> None:
    """Drop the mode's weak references to tensors: ``torch.utils.swap_tensors`` forbids them."""
    converter = getattr(mode.fake_tensor_converter, "meta_converter", None)
    memo = getattr(converter, "tensor_memo", None)
    if memo is not None:  # without it, swap_tensors itself refuses, and says why
        memo.clear()


def schema_of(func: Any) -> Any:
    """Return an operator's schema, which says what it writes and which results are views.

    ``OpOverload`` shows it nowhere else.
    """
    return func._schema


def implementation_of(func: Any, device: str) -> Callable | None:
    """Return the Python function behind an operator of ``torch.library.custom_op``; None for
    others.

    The registry is private, and there is no public way from an operator to its definition. Without
    it an operator of Python counts as one launch, instead of being looked into.
    """
    try:
        from torch._library.custom_ops import OPDEFS
    except ImportError:
        return None
    definition = OPDEFS.get(f"{func.namespace}::{func.overloadpacket.__name__}")
    if definition is None:
        return None
    functions = getattr(definition, "_backend_fns", {})
    return functions.get(device) or functions.get(None) or getattr(definition, "_init_fn", None)


# --- memory ---


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies the storage while it lives.

    An address would not do, because fake and empty storages have none. Python objects of one
    storage may differ, so their ``id`` would not do, either.
    """
    return storage._cdata


def same_generator(a: torch.Generator, b: torch.Generator) -> bool:
    """Return whether two Python objects are one generator.

    Operators may get a new object of the same.
    """
    return a is b or (hasattr(a, "_cdata") and a._cdata == b._cdata)  # type: ignore[attr-defined]  # not in torch's stubs


class WeakStorage:
    """A weak reference to a storage.

    Python's own would die with one Python object, of which a storage may have several.
    """

    def __init__(self, storage: torch.UntypedStorage):
        from torch.multiprocessing.reductions import StorageWeakRef

        self._reference = StorageWeakRef(storage)

    def get(self) -> torch.UntypedStorage | None:
        """Return the storage; None if it was freed."""
        return torch.UntypedStorage._new_with_weak_ptr(self._reference.cdata)


# --- the device guard ---

_CUDA = 1  # c10::DeviceType::CUDA
_REGISTER = "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"
_VIRTUAL_FUNCTIONS = 64  # more than a device guard has


@contextlib.contextmanager
def cuda_device_guard() -> Iterator[None]:
    """Register torch's own do-nothing device guard for CUDA where there is none, until the end.

    ``torch._C._ensureCUDADeviceGuardSet`` does so, but only where torch was built for CUDA and
    finds no device: it asks the registered guard for the number of devices. So a guard is
    registered first whose every virtual function answers 0: a pointer to a table of pointers, which
    is what an object with virtual functions is to the compilers that torch is built with on Linux
    and macOS. It is asked that one question, then replaced. There is no public way to have CUDA
    tensors, fake ones included, on a build of torch without CUDA.

    Raises:
        RuntimeError: This torch has neither CUDA nor these two functions.
    """
    if torch.backends.cuda.is_built():
        yield  # FakeTensorMode does the rest
        return
    folder = Path(torch.__file__).parent / "lib"
    library = next((p for p in (folder / "libc10.so", folder / "libc10.dylib") if p.exists()), None)
    ensure = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    register = None if library is None else getattr(ctypes.CDLL(str(library)), _REGISTER, None)
    if ensure is None or register is None:
        raise RuntimeError(
            "a fake CUDA device needs a torch that can register a device guard (2.13 on Linux or macOS is known to), "
            f"got torch {torch.__version__} on {sys.platform}: use that, or a build of torch with CUDA"
        )
    register.argtypes, register.restype = [ctypes.c_int8, ctypes.c_void_p], None
    answer = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda this: 0)
    table = (ctypes.c_void_p * _VIRTUAL_FUNCTIONS)(*[ctypes.cast(answer, ctypes.c_void_p).value] * _VIRTUAL_FUNCTIONS)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    register(_CUDA, ctypes.addressof(guard))
    try:
        ensure()
        yield
    finally:
        register(_CUDA, None)
