"""An op of torch's, whose body picks among implementations at each call: `tintype::<name>`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from tintype_kernels import choice, forward_mode, triton_support
from tintype_kernels import native as extension
from tintype_kernels.dispatch import interpreting, select

# Torch brings OpenMP and its threads, which then do the native kernels' work, too.
extension.share_openmp()
# How many modes watch, such as one that fakes tensors.
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack
# What torch.jit records, and the innermost of functorch's transforms, such as vmap: None where there is none.
_recording: Callable[[], Any] = torch._C._get_tracing_state
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
# The types that numbers come in: those of eight bits are codes, and kernels do not compute in them.
_FLOATING = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_autocasting: Callable[[], bool] = torch._C._is_any_autocast_enabled
_UNCHANGED = nullcontext()  # made once: it is entered at every call

Obstacle = Callable[..., str]
Function = TypeVar("Function", bound=Callable[..., Any])


class TorchOp:
    """`tintype::<name>`, called like a function; opaque to torch.compile and torch.export, which know its shapes.

    Every implementation takes the op's arguments by position and gives new tensors of the shapes and strides that
    `fake` gives; the op's schema is read off the annotations of `reference`. `obstacles` holds, by the name of an
    implementation, a function of the op's arguments that says why it cannot take them, or nothing. `variants` are more
    Triton forms, `triton_...`, which go before `triton`. `library` is what PyTorch's operators make of the numbers that
    the op rounds, unrounded, or a library's own product of codes: on GPUs it may be chosen in the place of a reference
    that sums in float64. `unmeasured` is the form that runs on a GPU where nothing was measured, if not the first that
    can.
    """

    def __init__(
        self,
        name: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        triton: Callable[..., Any],
        native: Callable[..., Any] | None = None,
        variants: dict[str, Callable[..., Any]] | None = None,
        library: Callable[..., Any] | None = None,
        obstacles: dict[str, Obstacle] | None = None,
        unmeasured: str = "",
    ) -> None:
        self.name = name
        self.unmeasured = unmeasured
        self.variants = variants or {}
        self.implementations = {"reference": reference, "triton": triton, **self.variants}
        if native is not None:
            self.implementations["native"] = native
        if library is not None:
            self.implementations["library"] = library
        self.obstacles = obstacles or {}
        self.gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None
        self._op = torch.library.custom_op(
            f"tintype::{name}",
            self._run,
            mutates_args=(),
            schema=torch.library.infer_schema(reference, mutates_args=()),
        )
        self._op.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        # The dispatcher takes longer than a small op, and here it would only find the body.
        if _is_plain(arguments):
            return self._run(*arguments)
        return self._with_tangents(*arguments) if forward_mode.is_active() else self._op(*arguments)

    def differentiate(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> None:
        """Register the gradient, in the two functions that `torch.library.register_autograd` takes."""
        self.gradient = setup_context, backward
        self._op.register_autograd(backward, setup_context=setup_context)

    def form(self, *arguments: Any) -> str:
        """The name of the implementation that these arguments take."""
        device = first_tensor(arguments)
        return select(
            triton=self._obstacle("triton", device, arguments),
            native=self._obstacle("native", device, arguments),
            variants={name: self._obstacle(name, device, arguments) for name in self.variants},
            fastest=lambda able: self._fastest(able, device, arguments),
        )

    def _run(self, *arguments: Any) -> Any:
        tensor = first_tensor(arguments)
        # Triton launches on the current device, also where forms are measured to choose one
        with torch.cuda.device_of(tensor), _as_promised(tensor):  # type: ignore[no-untyped-call]
            return self.implementations[self.form(*arguments)](*arguments)

    def _with_tangents(self, *arguments: Any) -> Any:
        """The plain form, operator by operator: the dispatcher knows no tangents of an op, and takes them for zeros."""
        with _as_promised(first_tensor(arguments)):
            made = self.implementations["reference"](*arguments)
        if not all(map(is_floating, (made,) if isinstance(made, Tensor) else made)):
            raise RuntimeError(
                f"{self.name} rounds to codes, which have no forward-mode derivative; give what reads them numbers"
            )
        return made

    def _fastest(self, able: list[str], tensor: Tensor, arguments: tuple[Any, ...]) -> str:
        if tensor.device.type != "cuda":
            return ""
        if "library" in self.implementations and not self._obstacle("library", tensor, arguments):
            able = ["library" if name == "reference" else name for name in able]
        if len(able) == 1:
            return able[0]
        forms = {name: partial(self.implementations[name], *arguments) for name in able}
        known = choice.on_gpu(self.name, tensor, arguments, forms)
        return known or (self.unmeasured if self.unmeasured in able else "")

    def _obstacle(self, name: str, tensor: Tensor, arguments: tuple[Any, ...]) -> str:
        if name not in self.implementations:
            return f"{self.name} has no {name} form"
        general = _native_obstacle(tensor) if name == "native" else _triton_obstacle(tensor)
        return general or self.obstacle_of(name, arguments)

    def obstacle_of(self, name: str, arguments: tuple[Any, ...]) -> str:
        """Why an implementation cannot take these arguments, wherever they lie, or nothing."""
        return self.obstacles[name](*arguments) if name in self.obstacles else ""


def _as_promised(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast out of an op's body: its products shall have the types that the op's fake gives."""
    kind = tensor.device.type
    if _autocasting() and torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return _UNCHANGED


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether no gradient is asked for, and nothing traces or watches: tensors are what they seem."""
    if torch.is_grad_enabled() or is_watched():
        return False
    tensors = (value for value in arguments if isinstance(value, Tensor))
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


def is_watched() -> bool:
    """Whether something compiles, traces, transforms or differentiates forwards what runs now."""
    return bool(
        torch.compiler.is_compiling()
        or _watchers()
        or _recording() is not None
        or _transform() is not None
        or forward_mode.is_active()
    )


def first_tensor(arguments: Any) -> Tensor:
    """The tensor that stands for the others' device."""
    return next(value for value in arguments if isinstance(value, Tensor))


def _triton_obstacle(tensor: Tensor) -> str:
    if triton_support.reason:
        return triton_support.reason
    if tensor.device.type == "cpu" and not interpreting():
        return "on CPU tensors Triton needs TRITON_INTERPRET=1"
    if tensor.device.type not in {"cpu", "cuda"}:
        return f"Triton's kernels take cuda tensors, not {tensor.device.type}"
    return ""


def _native_obstacle(tensor: Tensor) -> str:
    if extension.reason:
        return extension.reason
    if tensor.device.type != "cpu":
        return f"the native kernels take cpu tensors, not {tensor.device.type}"
    return ""


def public(reference: Callable[..., Any]) -> Callable[[Function], Function]:
    """Hang the plain implementation on the function that users call, as `.reference`."""

    def mark(function: Function) -> Function:
        function.reference = reference  # type: ignore[attr-defined]
        return function

    return mark


def check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `tensor` has `shape` and the dtype and device of `like`."""
    right = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape
    if not right or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} is {describe(tensor)}, expected {like.dtype}{list(shape)} on {like.device}"
        )


def is_floating(tensor: Any) -> bool:
    """Whether it is a tensor of a type that kernels compute in."""
    return isinstance(tensor, Tensor) and tensor.dtype in _FLOATING


def check_floating(name: str, tensor: Tensor, ndim: int, channels: int = -1) -> None:
    """Raise unless `tensor` is of a floating type and has `ndim` dimensions, with something in that of `channels`."""
    if not is_floating(tensor) or tensor.ndim != ndim or not tensor.shape[channels]:
        raise ValueError(
            f"{name} is {describe(tensor)}, expected a floating tensor of {ndim} dimensions with channels"
        )


def describe(tensor: Any) -> str:
    """Dtype, shape and device, in the words of an error message; or the type of what is no tensor."""
    if not isinstance(tensor, Tensor):
        return "None" if tensor is None else type(tensor).__name__
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that sums are made in: float32, or float64 where the tensor is that already."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the type that its sums are made in."""
    return tensor.to(wide_type(tensor))


def per_sample(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """Check a vector that all tokens of a sample share, [b, c] or [b, 1, c] for x [b, t, c]; give it as [b, c]."""
    b, _, c = x.shape
    middle = isinstance(tensor, Tensor) and tensor.ndim == 3
    check(name, tensor, (b, 1, c) if middle else (b, c), x)
    return tensor.reshape(b, c)


def unit_stride(tensor: Tensor) -> Tensor:
    """Give the tensor itself, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty(x: Tensor) -> Tensor:
    """A new contiguous tensor of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
