"""Every private name of torch that this package uses, each behind a test that it exists.

Another version of torch may lack a private name. A public fallback is then used where there is one;
otherwise the comment says what is lost. Each says what the private name saves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

__all__ = [
    "FORWARD_AD", "FORWARD_AD_LEVEL", "WRITE_COUNT", "default_store", "forward_hooks", "increment_version", "is_wrapped", "modes_active",
    "release_capture_pool", "shares_storage", "takes_forward_derivatives", "tree_flatten", "tree_map_only", "tree_unflatten",
    "write_count",
]  # fmt: skip

# ---- who else looks at operations ----------------------------------------------------------------


def _one_mode() -> int:
    return 1


try:
    # The documented way to see every operator (notes on "Extending PyTorch") has no other name.
    # Without it, calls of a model that differ from one another go unnoticed.
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = None  # type: ignore[assignment,misc]

modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _one_mode)
"""Return how many modes, such as make_fx's or FakeTensorMode's, look at every operation.

Saves the dispatcher for the steps that no mode looks at. There is no public way to ask: without the
name, every step goes through the dispatcher, the slow way that is right with and without modes.
"""

_infrastructure_mode: Callable[[Any], Any] = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_keys_of_modes = getattr(torch._C, "_TorchDispatchModeKey", None)


def are_fake() -> bool:
    """Return whether tensors are fake, without values, since FakeTensorMode is on.

    There is no public way to ask: without the names, all have values.
    """
    return bool(modes_active()) and _infrastructure_mode(getattr(_keys_of_modes, "FAKE", None)) is not None


def operators_are_watched() -> bool:
    """Return whether somebody traces or counts the operators that are called: make_fx, a counter of
    FLOPs. The mode of fake tensors is nobody.

    There is no public way to ask: without the names, any mode is somebody.
    """
    if not modes_active():
        return False
    return not are_fake() or _infrastructure_mode(getattr(_keys_of_modes, "PROXY", None)) is not None


FORWARD_AD: dict[str, Any] = vars(forward_ad)
FORWARD_AD_LEVEL: str | None = "_current_level" if isinstance(FORWARD_AD.get("_current_level"), int) else None
"""The key in ``FORWARD_AD`` of the level of forward-mode derivatives: -1 where none are taken.

Saves looking at each tensor in Python. Without the name, the extension leaves every step to Python.
"""


def takes_forward_derivatives(tensors: Iterable[Tensor]) -> bool:
    """Return whether forward-mode derivatives are taken, or at least of which tensors they could
    be."""
    if FORWARD_AD_LEVEL is not None:
        return forward_ad._current_level >= 0  # as FORWARD_AD[FORWARD_AD_LEVEL], but torch.compile traces it
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


_functorch = getattr(torch._C, "_functorch", None)
_is_functorch_wrapped = getattr(_functorch, "is_functorch_wrapped_tensor", None)
_is_batched_gradient = getattr(_functorch, "is_legacy_batchedtensor", lambda _: False)  # of is_grads_batched


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for another one, inside a torch.func transform or a batched
    backward pass.

    Saves an exception per such tensor, and tells functionalized tensors, too, which have an address
    that is no memory.
    """
    if _is_functorch_wrapped is not None:
        return _is_functorch_wrapped(tensor) or _is_batched_gradient(tensor)
    try:
        return tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.device.type != "meta"
    except RuntimeError:
        return True


_level = getattr(_functorch, "maybe_get_level", None)


def transform_level(tensor: Tensor) -> int:
    """Return which of the torch.func transforms, one in the other, a tensor belongs to: -1 for none.

    Saves writing to one tensor before torch refuses the next: a transform changes only its own in
    place. There is no public way to ask: without the name, those of any transform are alike.
    """
    return _level(tensor) if _level is not None else int(is_wrapped(tensor)) - 1


# ---- writes and memory ---------------------------------------------------------------------------


def _private_increment() -> Callable[[Iterable[Tensor]], None] | None:
    private = getattr(torch._C, "_increment_version", None)
    with contextlib.suppress(TypeError, RuntimeError):  # older ones take a single tensor
        return private if private is not None and private([]) is None else None
    return None


increment_version: Callable[[list[Tensor]], None] = _private_increment() or torch.autograd.graph.increment_version
"""Tell autograd that tensors have been written. Saves a Python call per step over the public name."""

WRITE_COUNT: str | None = "_version" if hasattr(Tensor, "_version") else None
"""The attribute in which a tensor counts its writes. There is no public one.

Saves comparing contents in order to find out whether a tensor changed. Without the name, the
extension takes every tensor for changed.
"""


def write_count(tensor: Tensor) -> int | None:
    """Return how often a tensor has been written in place; None where nothing counts."""
    return None if tensor.is_inference() or WRITE_COUNT is None else getattr(tensor, WRITE_COUNT)


_is_zero_tensor = getattr(torch, "_is_zerotensor", None)


def has_no_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is zeros that torch knows without any memory, and cannot write.

    There is no public way to ask: without the name, writing raises torch's own error.
    """
    return _is_zero_tensor is not None and _is_zero_tensor(tensor)


def is_view_of_leaf(tensor: Tensor) -> bool:
    """Return whether autograd knows a tensor as a view of a leaf.

    There is no public way to ask: without the name, writing raises torch's own error.
    """
    base = getattr(tensor, "_base", None)
    return base is not None and base.is_leaf


_creation = getattr(getattr(torch._C, "_autograd", None), "_get_creation_meta", None)


def is_recorded_apart(tensor: Tensor) -> bool:
    """Return whether a tensor is a view whose writes autograd cannot carry over to its base.

    There is no public way to ask: without the name, writing raises torch's own error.
    """
    if _creation is None or getattr(tensor, "_base", None) is None:
        return False
    return _creation(tensor) != torch._C._autograd.CreationMeta.DEFAULT


_is_alias_of = getattr(torch._C, "_is_alias_of", None)


def shares_storage(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of one storage.

    The private name saves asking fake tensors for an address, which warns.
    """
    if _is_alias_of is not None:
        return _is_alias_of(a, b)
    address = a.untyped_storage().data_ptr()
    return address != 0 and address == b.untyped_storage().data_ptr()


def release_capture_pool(device: int, pool: tuple[int, int]) -> bool:
    """Tell CUDA's allocator that the capture into a memory pool is over, and give the pool up;
    return whether this torch can.

    Saves the memory of a failed capture, which torch.cuda.CUDAGraph never gives back. Without the
    names, that memory stays taken until the process ends.
    """
    end, release = (getattr(torch._C, name, None) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    if end is None or release is None:
        return False
    # RuntimeError: the capture did end, and the pool is no longer in the allocator's list.
    with contextlib.suppress(RuntimeError):
        end(device, pool)
        release(device, pool)
    return True


def clear_library_workspaces() -> None:
    """Free cuBLAS's scratch memory, of which it keeps one piece for each stream.

    A graph bakes in the address of the piece that it found. Freed before a capture, the piece is
    made again in the graph's own pool, where nobody frees it. Without the name, the piece may be
    freed under a graph, by the next compilation with mode="reduce-overhead".
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


# ---- settings ------------------------------------------------------------------------------------

_cuda, _cudnn, _matmul = torch.backends.cuda, torch.backends.cudnn, torch.backends.cuda.matmul
_PUBLIC: dict[str, Callable[[], Any] | None] = {
    "_get_flash_sdp_enabled": _cuda.flash_sdp_enabled,
    "_get_mem_efficient_sdp_enabled": _cuda.mem_efficient_sdp_enabled,
    "_get_math_sdp_enabled": _cuda.math_sdp_enabled,
    "_get_cudnn_sdp_enabled": _cuda.cudnn_sdp_enabled,
    "_get_math_sdp_allow_fp16_bf16_reduction": _cuda.fp16_bf16_reduction_math_sdp_allowed,
    "_get_rocm_fa_preferred_backend": _cuda.preferred_rocm_fa_library,
    "_get_blas_preferred_backend": _cuda.preferred_blas_library,
    "_get_linalg_preferred_backend": _cuda.preferred_linalg_library,
    "_get_cublas_allow_fp16_reduced_precision_reduction": lambda: _matmul.allow_fp16_reduced_precision_reduction,
    "_get_cublas_allow_bf16_reduced_precision_reduction": lambda: _matmul.allow_bf16_reduced_precision_reduction,
    "_get_cublas_allow_fp16_accumulation": lambda: _matmul.allow_fp16_accumulation,
    "_get_cudnn_enabled": lambda: _cudnn.enabled,
    "_get_cudnn_benchmark": lambda: _cudnn.benchmark,
    "_get_cudnn_deterministic": lambda: _cudnn.deterministic,
    "_get_deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    "_get_sdp_priority_order": None,  # set by torch.nn.attention.sdpa_kernel(set_priority=True)
}


def _reader(name: str, public: Callable[[], Any] | None) -> Callable[[], Any]:
    found = getattr(torch._C, name, public)
    if name == "_get_sdp_priority_order" and found is not None:
        return lambda: tuple(found())
    return (lambda: None) if found is None else found


def _precisions() -> list[Callable[[], Any]]:
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    if read is None:
        return [lambda: _matmul.allow_tf32, lambda: _cudnn.allow_tf32]
    return [partial(read, "cuda", operation) for operation in ("matmul", "conv", "rnn")]


_SETTINGS = (torch.get_default_dtype, *_precisions(), *(_reader(*pair) for pair in _PUBLIC.items()))


def kernel_settings() -> tuple[Any, ...]:
    """Return torch's settings that decide which kernels an operator takes on CUDA, and how exact they
    are, apart from autocast.

    The private names save several calls for each setting. There is no public way to ask for the
    order in which kernels of attention are tried.
    """
    return tuple([read() for read in _SETTINGS])


def caches_parametrizations() -> bool:
    """Return whether weights are computed once and freed later, by
    torch.nn.utils.parametrize.cached().

    There is no public way to ask: without the name, they are taken for lasting.
    """
    return bool(getattr(parametrize, "_cache_enabled", False))


# ---- modules -------------------------------------------------------------------------------------


GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    getattr(nn_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
)
"""The hooks of all modules, which torch.nn.modules.module.register_module_forward_hook adds.

There is no public way to ask: without the names, they go unnoticed.
"""


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run before and after a module's forward.

    Saves calling what must not be replaced or captured with its hooks ignored. There is no public
    way to ask: without the names, hooks go unnoticed.
    """
    found = (getattr(module, name, {}) for name in ("_forward_hooks", "_forward_pre_hooks"))
    return [hook for hooks in found for hook in hooks.values()]


MODULE_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
"""Attributes in which a module keeps what its forward uses. Saves several generators a module."""


@dataclass(frozen=True)
class Compiler:
    """How torch.compile compiled a module.

    Attributes:
        makes_graphs: whether with CUDA graphs; None if the backend does not say.
        identity: another one for another compilation.
        attributes: those of the module that hold the compilation.
    """

    makes_graphs: bool | None
    identity: Any
    attributes: frozenset[str]


_OF_A_COMPILATION = frozenset(
    {"_super_module_initialized", "dynamo_ctx", "forward", "get_compiler_config"}
    | {"_torchdynamo_orig_callable", "_torchdynamo_wrapper_id"}
)


def compiled_by(module: nn.Module) -> Compiler | None:
    """Return how a module, apart from its submodules, was compiled; None if it was not.

    There is no public way to ask. Without the names, a compiled module is one that holds functions
    which cannot be looked into.
    """
    held = vars(module)
    call, context = held.get("_compiled_call_impl"), held.get("dynamo_ctx")
    if call is None and context is None:
        return None
    attributes = _OF_A_COMPILATION if call is None else frozenset({"_compiled_call_impl"})
    return _compiler(module if call is None else call, context if call is None else call, attributes)


def _compiler(source: Any, identity: Any, attributes: frozenset[str] = frozenset()) -> Compiler:
    asked = getattr(source, "get_compiler_config", None)
    config = asked() if callable(asked) else None
    return Compiler(None if config is None else bool(config.get("triton.cudagraphs")), identity, attributes)


def module_inside(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped; the module itself if it did not.

    There is no public way to ask. Without the name, a wrapped module is known by its wrapper.
    """
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def makes_own_graphs(model: Any) -> bool:
    """Return whether torch.compile gave a model, or a module in it, CUDA graphs."""
    compilers = map(compiled_by, model.modules()) if isinstance(model, nn.Module) else [_compiler(model, None)]
    return any(compiler is not None and bool(compiler.makes_graphs) for compiler in compilers)


def flattened(tensor: Tensor) -> tuple[dict[str, Tensor], Any] | None:
    """Return the tensors inside of one that wraps others, by name, and what else makes it up; None
    if it does not say."""
    names_and_rest = getattr(tensor, "__tensor_flatten__", None)
    if names_and_rest is None:
        return None
    names, rest = names_and_rest()
    return {name: getattr(tensor, name) for name in names}, rest


# ---- nested containers ---------------------------------------------------------------------------

# Saves a walk through containers of our own, which would not know those registered with torch.
# There is no public way.
try:
    from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
except ImportError as error:
    raise ImportError(f"ddim_fast needs torch.utils._pytree, which torch {torch.__version__} lacks") from error

# ---- processes -----------------------------------------------------------------------------------


def default_store() -> dist.Store:
    """Return the store of torch.distributed's default process group.

    Saves opening a second connection to the same store. There is no public way.

    Raises:
        RuntimeError: this torch has no such name.
    """
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    if find is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell its process group's store: start the processes with torchrun, "
            "without init_process_group"
        )
    return find()
