"""Convert arrays of any package to tensors: the one place that takes features from outside."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import dlpack

from cka_hooks.errors import OptionError

# And everything else with an array interface: CuPy, JAX, pandas, h5py, zarr.
Features: TypeAlias = Tensor | npt.NDArray[Any]


def as_features(value: Any, name: str, *, counts: bool = False) -> Tensor:
    """Convert a tensor or an array to a tensor (n, ...) of floating-point numbers, sharing memory if possible.

    Args:
        value: a tensor, or an object with ``__dlpack__``, ``__array__`` or ``__cuda_array_interface__``.
        name: what to call it in an error.
        counts: whether to accept whole numbers, too, as float32 if that is exact for all of their dtype, else as
            float64.

    Raises:
        OptionError: this is neither, it has other numbers or no dimension, or it has masked entries.

    Example:
        >>> import numpy
        >>> as_features(numpy.ones((4, 2), ">f4"), "x").dtype
        torch.float32
    """
    tensor = value if isinstance(value, Tensor) else _of_array(value, name)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise OptionError(f"{name} is {tensor.layout}: expected a dense tensor (n, ...); .to_dense() may make one")
    if counts and not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.float32 if tensor.element_size() <= 2 else torch.float64)
    if not tensor.is_floating_point() or tensor.ndim < 1:
        raise OptionError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}: expected floating-point numbers (n, ...), as from "
            '.float() of a tensor or .astype("float32") of an array'
        )
    return tensor


def _of_array(value: Any, name: str) -> Tensor:
    interfaces = ("__cuda_array_interface__", "__dlpack__", "__array__", "__array_interface__")
    if np.ma.is_masked(value):
        raise OptionError(f"{name} has masked entries: leave their samples out, or fill them with .filled(...)")
    try:
        if isinstance(value, type) or not any(hasattr(value, interface) for interface in interfaces):
            raise TypeError("it is no array")
        if not isinstance(value, np.ndarray) and hasattr(value, "__cuda_array_interface__"):
            return torch.as_tensor(value)
        if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
            return dlpack.from_dlpack(value)
        array = np.asarray(value)
        if array.dtype.kind in "iuf":
            # PyTorch does not accept another byte order, negative strides, or numbers of more than 8 bytes. It warns
            # about memory that it may not write to.
            plain = array.flags.writeable and array.flags.aligned and min(array.strides, default=0) >= 0
            size = min(array.dtype.itemsize, 8)
            array = array.astype(f"{array.dtype.kind}{size}", copy=not plain)
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise OptionError(
            f"{name}, {type(value).__module__}.{type(value).__name__}, cannot be taken as a tensor: {error}; "
            "expected a floating-point tensor or array (n, ...)"
        ) from error
