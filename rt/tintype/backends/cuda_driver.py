"""The few calls of NVIDIA's driver that running an engine takes; its library comes with the GPU."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from numpy.typing import NDArray

from tintype.errors import BackendUnavailable, TintypeError

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_OUT_OF_MEMORY = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class Device:
    """One GPU with a stream; addresses are plain numbers."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._cuda = ctypes.CDLL(_LIBRARY)
            self._call("cuInit", 0)
            device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), index)
        except (OSError, TintypeError) as error:
            raise BackendUnavailable(
                f"backend='tensorrt' needs NVIDIA GPU {index} and its driver, and found neither or one of them "
                f"({error}); run the bundle's ONNX form with backend='onnxruntime'"
            ) from error
        self._device = device
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.make_current()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # waits for no other stream
        self.stream = int(stream.value or 0)

    @property
    def architecture(self) -> str:
        """Such as sm_89."""
        major, minor = (self._attribute(each) for each in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
        return f"sm_{major}{minor}"

    def make_current(self) -> None:
        """Each thread says once which GPU it means."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, kept as long as the process."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Begin to copy a contiguous array to the GPU."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._copy("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, array.nbytes)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Begin to copy from the GPU into a contiguous array."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._copy("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), array.nbytes)

    def wait(self) -> None:
        """Until everything that was begun is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _copy(self, name: str, target: Any, source: Any, size: int) -> None:
        self._call(name, target, source, ctypes.c_size_t(size), ctypes.c_void_p(self.stream))

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status == _OUT_OF_MEMORY:
            raise TintypeError("the GPU is out of memory; ask for a smaller picture or batch")
        if status:
            raise TintypeError(f"{name} of NVIDIA's driver failed with error {status}")
