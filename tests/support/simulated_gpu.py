"""A CUDA device without a GPU: shapes and devices of all operators are computed, values are not.

`simulated_gpu()` lets tensors be created on `cuda` (by torch's `FakeTensorMode`) and checks every operator that is
dispatched. Inside `gpu.step()` it fails on what makes the host wait for a device or would not run on one:

- tensors of the CPU and of the GPU in one operator, except scalars (0 dimensions), which torch passes by value;
- a copy between both that is not `non_blocking`, or is made from or to more pageable memory than the driver buffers;
- a value or a shape that the host reads from the device: `item`, `tolist`, `nonzero`, indexing by a mask;
- `synchronize` of the device, of a stream, or of an event of the same step.

`check_streams` also fails on two streams that use a tensor without an order between them.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9, L2_cache_size=50 << 20
)
_BUFFERED = 64 << 10  # bytes of a copy from pageable memory that the driver copies before it returns
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"_to_copy", "copy_", "copy"}


class DeviceError(AssertionError):
    """An operator that would make the host wait for the GPU, or fail on one."""


class SimulatedGpu(TorchDispatchMode):
    """Checks each operator.

    Attributes:
        operators: How often each operator ran on the GPU.
        waits: What made the host wait outside of steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: list[str] = []
        self.steps = 0
        self._step_thread: int | None = None
        self.fake_mode: FakeTensorMode
        self.streams: EventHandler | None = None
        self._current = threading.local()
        self._lock = threading.RLock()  # the state of `fake_mode` belongs to no thread
        self._pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no other storage gets the identity of a pinned one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let `torch.compile` compile, although this mode is active."""
        return True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Fail on whatever makes the host wait."""
        self.steps += 1
        self._step_thread = threading.get_ident()
        try:
            yield
        finally:
            self._step_thread = None

    def check_streams(self) -> None:
        """Check from now on that the streams are ordered, with the race detector of torch."""
        self.streams = EventHandler()

    def stream_stack(self) -> list[int]:
        """The numbers of the streams that this thread has selected; 0 is the default stream."""
        if not hasattr(self._current, "stack"):
            self._current.stack = [0]
        return self._current.stack

    def in_thread(self, items: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator whose items may be computed by another thread, which simulates the same GPU."""
        gpu = self

        class Items:
            def __iter__(self) -> Iterator[Any]:
                return self

            def __next__(self) -> Any:
                # Alone, as `device` of a fake tensor is wrong while another thread is within an operator.
                with gpu._lock, gpu.fake_mode, gpu:
                    return next(items)

        return Items()

    def wait(self, what: str) -> None:
        """Record that the host waits for the GPU; fail in a step."""
        if self._step_thread == threading.get_ident():
            raise DeviceError(what)
        self.waits.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._lock:
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # operators made of others, such as `to`, arrive whole
                return func.decompose(*args, **kwargs)
        if name == "is_pinned":
            return _storage(args[0]) in self._pinned
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        pins = kwargs.pop("pin_memory", None)
        tensors = _tensors((args, kwargs))
        if name in _COPIES:
            self._check_copy(name, args, kwargs)
            for each in tensors:
                each.constant = None  # torch would copy the known value to a real GPU
        elif any(each.is_cuda for each in tensors):
            self._check(func, name, tensors, args)
        result = self._run(func, name, args, kwargs)
        if any(each.is_cuda for each in [*tensors, *_tensors(result)]):
            self.operators[name] += 1
            if self.streams is not None:
                self._check_streams(func, name, args, kwargs, result)
        return self._pin(result) if pins else result

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_fused_sgd_":  # its shape function asks the driver
            return None
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            # Values are not simulated: conditions hold (all weights are finite), numbers are zero.
            return args[0].dtype == torch.bool

    def _check_streams(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Report the tensors that an operator reads and writes to the race detector."""
        assert self.streams is not None
        read, written = set[int](), set[int]()
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            storages = {_storage(each) for each in _tensors(given.get(argument.name)) if each.is_cuda}
            (written if argument.alias_info and argument.alias_info.is_write else read).update(storages)
        new = {_storage(each) for each in _tensors(result) if each.is_cuda} - read - written
        if not new and not written:
            return  # a view
        for storage in new:
            self.streams._handle_memory_allocation(storage)
        names = defaultdict[int, list[str]](list)
        stream = self.stream_stack()[-1]
        errors = self.streams._handle_kernel_launch(stream, read - written, written | new, new, name, names)
        if errors:
            raise DeviceError(f"{name} in stream {stream} is not ordered after what another stream did")

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        self._pinned.add(_storage(tensor))
        return tensor

    def _check(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any) -> None:
        """Check an operator of the GPU."""
        if name in _INDEXING:
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.wait(f"{name} by a mask reads its number of true values from the GPU")
            if any(each.is_cpu for each in indices):
                self.wait(f"{name} copies its indices from the CPU")
                return
        elif _READS & set(func.tags):
            self.wait(f"{name} reads a value from the GPU")
        on_cpu = [each for each in tensors if each.is_cpu]
        if any(each.ndim or name.startswith("_foreach") for each in on_cpu):
            shapes = ", ".join(str(list(each.shape)) for each in on_cpu)
            raise DeviceError(f"{name} takes tensors of the GPU and of the CPU {shapes}")

    def _check_copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        target = None if name == "_to_copy" else args[0]
        device = torch.device(kwargs.get("device") or source.device) if target is None else target.device
        if source.device.type == device.type:
            return
        what = f"{name} of {list(source.shape)} from {source.device.type} to {device.type} waits for the GPU"
        non_blocking = kwargs.get("non_blocking", target is not None and len(args) > 2 and args[2])
        # A new tensor of the CPU is pinned: torch allocates it so.
        host = source if source.is_cpu else target
        if not non_blocking:
            self.wait(what)
        elif host is not None and _storage(host) not in self._pinned and (host is target or host.nbytes > _BUFFERED):
            self.wait(f"{what}: the memory is not pinned")


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _event_class(gpu: SimulatedGpu) -> type:
    class Event:
        """A CUDA event that is complete from the next step on."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self._step: int | None = None

        def record(self, stream: Any = None) -> None:
            self._step = gpu.steps
            if gpu.streams is not None:
                number = gpu.stream_stack()[-1] if stream is None else stream.number
                gpu.streams._handle_event_record(id(self), number)

        def query(self) -> bool:
            return self._step != gpu.steps

        def synchronize(self) -> None:
            if not self.query():
                gpu.wait("Event.synchronize waits for the GPU")

        def wait(self, stream: object = None) -> None:
            """Let a stream wait, not the host."""

        def elapsed_time(self, other: object) -> float:
            return 1.0

    return Event


def _stream_class(gpu: SimulatedGpu, event_class: type) -> Any:
    class Stream:
        """A CUDA stream; operators are not ordered here."""

        cuda_stream = 0
        device = GPU
        all: ClassVar[list[Stream]] = []  # the first one is the default stream

        def __init__(self, *_: Any, **__: Any) -> None:
            self.number = len(Stream.all)
            Stream.all.append(self)

        def __enter__(self) -> Stream:
            gpu.stream_stack().append(self.number)
            return self

        def __exit__(self, *_: object) -> None:
            gpu.stream_stack().pop()

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize waits for the GPU")

        def wait_stream(self, other: Stream) -> None:
            """Let this stream wait for another, not the host."""
            self.wait_event(other.record_event())

        def wait_event(self, event: object) -> None:
            """Let this stream wait for an event, not the host."""
            if gpu.streams is not None:
                gpu.streams._handle_event_wait(id(event), self.number)

        def record_event(self, event: Any = None) -> Any:
            event = event or event_class()
            event.record(self)
            return event

    return Stream


def _convert_module(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply` that replaces parameters; torch's own one exchanges memory, which fake tensors do not have."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(convert(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _copy_tensor(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """`Tensor.__deepcopy__`; torch's own one looks at the memory, which fake tensors do not have."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]


def _set_item(tensor: torch.Tensor, index: Any, value: Any) -> None:
    """`Tensor.__setitem__` before torch 2.15: a number is a tensor of the CPU, and copied if it is for one element."""
    if tensor.is_cuda and not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=tensor.dtype, device="cpu")
    torch.Tensor.__setitem__(tensor, index, value)


def _to_numpy(tensor: torch.Tensor, **_: Any) -> NDArray:
    """`Tensor.numpy`: zeros, as values are not simulated."""
    if tensor.device.type != "cpu":
        raise DeviceError("numpy reads a tensor of the GPU")
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


@torch.no_grad()
def backward(tensor: torch.Tensor, gradient: torch.Tensor | None = None, **_: Any) -> None:
    """`Tensor.backward` by calls of the graph's nodes: torch's engine runs those of a GPU in a thread of the device."""
    root = tensor.grad_fn
    assert root is not None
    waits_for, seen = Counter[Any](), {root}
    nodes = [root]
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is not None:
                waits_for[node] += 1
                if node not in seen:
                    seen.add(node)
                    nodes.append(node)
    gradients = {root: [torch.ones_like(tensor) if gradient is None else gradient]}
    ready = [root]
    while ready:
        node = ready.pop()
        metadata = node._input_metadata
        given = gradients.pop(node, [None] * len(metadata))
        inputs = [
            torch.zeros(each.shape, dtype=each.dtype, device=each.device)
            if value is None
            else value.sum_to_size(each.shape).to(each.dtype)
            for value, each in zip(given, metadata, strict=True)
        ]
        for value, each in zip(inputs, metadata, strict=True):
            if value.device != each.device:
                raise DeviceError(f"the gradient of {node.name()} is on {value.device}, its tensor on {each.device}")

        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        results = call(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for result, (follower, index) in zip(results, node.next_functions, strict=False):
            if follower is None:
                continue
            if result is not None:
                slots = gradients.setdefault(follower, [None] * len(follower._input_metadata))
                slots[index] = result if slots[index] is None else slots[index] + result
            waits_for[follower] -= 1
            if not waits_for[follower]:
                ready.append(follower)


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Simulate one GPU in this thread. Tensors of the CPU that are used inside lose their values as well.

    The test is skipped with a torch that asks the driver even for simulated tensors, such as 2.6.
    """
    gpu = SimulatedGpu()
    event = _event_class(gpu)
    stream = _stream_class(gpu, event)
    default = stream()
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: None,
        "set_rng_state": lambda *_: None,
        "get_device_properties": lambda *_: PROPERTIES,
        "synchronize": lambda *_: gpu.wait("torch.cuda.synchronize waits for the GPU"),
        "current_stream": lambda *_: stream.all[gpu.stream_stack()[-1]],
        "default_stream": lambda *_: default,
        "stream": lambda stream: stream,
        "Stream": stream,
        "Event": event,
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: False))  # dynamo asks it
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None))  # it asks the driver
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert_module))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(mock.patch.object(FakeTensor, "numpy", _to_numpy, create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copy_tensor, create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "__setitem__", _set_item, create=True))
        stack.enter_context(warnings.catch_warnings())
        # Entered without torch.cuda.is_available, which decides that no driver is asked.
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            gpu.fake_mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            torch.zeros(1).to(GPU).copy_(torch.zeros(1))
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} cannot simulate a GPU: {error}")
        stack.enter_context(gpu)
        yield gpu
