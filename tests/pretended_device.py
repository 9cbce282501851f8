"""A CUDA device that is not there: tensors say `cuda:0` and compute on the CPU.

    with PretendedCuda() as cuda:
        quantize_blocks(weights.to("cuda:0"), calibration)
        assert cuda.waits.total() == 2

What it does as CUDA would, though a CPU does not:

- tensors of two devices do not mix;
- sums of floats, products of matrices and weighted `bincount` add up in an order of their own, each time in
  another;
- a division by a Python number is a product with its reciprocal, and functions that libraries approximate are
  off by an ulp;
- a cast to E4M3 beyond 464 gives 448;
- every thread begins with device 0 as its own, and so on: see `contexts`;
- what one stream has written is not there for another before someone has waited for it: such a read raises
  `RaceError`.

It counts what the host asks of it: kernels (operations that compute, each at least one launch), bytes copied
in both directions and touched by kernels, waits of the host by reason, and the memory in use.

Streams are those of `torch.cuda.stream`; entering one makes the pretence hold in a thread. Under autograd
some operations are taken apart before they get here: use it within `torch.inference_mode` or `torch.no_grad`.
"""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense": 1, "nonzero": 1, "masked_select": 1, "_unique2": 1, "equal": 1, "bincount": 2}
"""Operations of CUDA whose result, or its size, the host waits for; how often. `bincount` looks for the least
and the largest value."""
APPROXIMATED = {"exp", "exp2", "log", "log2", "log10", "pow", "rsqrt", "tanh", "sigmoid"}
TO_PYTHON = {
    getattr(torch.Tensor, name) for name in ("tolist", "__float__", "__int__", "__index__", "__format__")
}
"""Values for Python, which in C++ begin with a call of the driver: a copy to the host, which waits."""


def _attention(query: torch.Tensor, key, value, attn_mask=None, *args, **kwargs) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.ops.aten.new_zeros(query, attn_mask.shape)
        attn_mask = torch.ops.aten.masked_fill(zeros, torch.ops.aten.bitwise_not(attn_mask), -math.inf)
    found = torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **kwargs)
    return found[0]


WITHOUT_DRIVER = {
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not,
    torch.Tensor.contiguous: lambda t: (
        t if t.is_contiguous() else torch.ops.aten.clone(t, memory_format=torch.contiguous_format)
    ),
    torch.Tensor.copy_: torch.ops.aten.copy_,
    torch.Tensor.nonzero: lambda t, as_tuple=False: (
        torch.ops.aten.nonzero(t).unbind(1) if as_tuple else torch.ops.aten.nonzero(t)
    ),
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
"""Methods that in C++ begin with a call of the driver, and what does the same without one."""
NO_KERNEL = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "is_same_size",
}
GROUPED_WITHOUT_WAITING = (9, 10)
"""Compute capabilities, major, on which torch 2.10 reads `grouped_mm`'s offsets on the device."""


class RaceError(AssertionError):
    """A stream used what another one has written, without anyone having waited."""


class Pretended(torch.Tensor):
    """Says that it is on a CUDA device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: "_Memory") -> "Pretended":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=memory.device,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, memory: "_Memory") -> None:
        self.inner, self.memory = inner, memory

    def __repr__(self, **_: object) -> str:
        return f"Pretended({list(self.shape)}, {self.dtype}, {self.device})"

    def record_stream(self, stream: "Stream") -> None:
        self.memory.recorded.add(stream)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        owner = next(t for t in _tensors((args, kwargs)) if isinstance(t, Pretended))
        return owner.memory.cuda.run(func, args, kwargs or {})


class _Memory:
    """What views of one tensor share: who has written it last, and when."""

    def __init__(self, cuda: "PretendedCuda", device: torch.device, storage: torch.UntypedStorage) -> None:
        self.cuda, self.device, self.nbytes = cuda, device, storage.nbytes()
        self.storage = storage  # held, or another thread's tensor might get its address, and be taken for it
        self.stream: Stream | None = None
        self.syncs = 0
        self.home, self.used, self.recorded = cuda.stream(), {}, set()
        cuda.in_use(self.nbytes)

    def __del__(self) -> None:
        self.cuda.in_use(-self.nbytes)
        for stream, syncs in self.used.items():
            # Its home stream's next tensor may get this memory, while a kernel of another still reads it.
            if stream is not self.home and stream not in self.recorded and stream.syncs == syncs:
                self.cuda.freed_early += 1


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, cuda: "PretendedCuda", device: torch.device) -> None:
        self.cuda, self.device, self.syncs = cuda, device, 0

    def synchronize(self) -> None:
        self.cuda.wait("synchronize", self)


class PretendedCuda:
    """While it is entered, there are CUDA devices.

    Args:
        devices: how many.
        capability: of each.
        seed: of the order in which things are added up.

    Attributes:
        counts: `kernels`, `bytes up`, `bytes down`, `bytes touched`.
        waits: times the host waited, by reason.
        contexts: devices on which a context was made, as something was done there.
        freed_early: tensors given up while a stream other than their own still used them, without
            `record_stream`. The caching allocator does not know about that.
        peak: most bytes in use at a time, without what operations need inside.
    """

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (9, 0), seed: int = 0) -> None:
        self.devices, self.capability = devices, capability
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.contexts: set[int] = set()
        self.used = self.peak = self.freed_early = 0
        self._memory: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
        self._pinned: list[tuple[int, int, torch.Tensor]] = []
        self._thread = threading.local()
        self._lock = threading.RLock()
        self._generator = torch.Generator().manual_seed(seed)
        self._default = [Stream(self, torch.device("cuda", i)) for i in range(devices)]

    def __enter__(self) -> "PretendedCuda":
        self._stack = ExitStack()
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: self.devices, "Stream": self._make_stream,
            "stream": self._in_stream, "set_device": self._set_device, "current_device": self._current_device,
            "get_device_capability": lambda *_: self.capability, "get_device_name": lambda *_: "pretended",
            "current_stream": lambda *_: self.stream(),
            "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        }.items():  # fmt: skip
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(self._pretence())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def in_use(self, nbytes: int) -> None:
        with self._lock:
            self.used += nbytes
            self.peak = max(self.peak, self.used)

    # --- torch.cuda ----------------------------------------------------------------------------

    def _current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def _set_device(self, device: torch.device | int | str) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        assert 0 <= index < self.devices
        self._thread.device = index
        self.contexts.add(index)

    def _make_stream(self, device: torch.device | None = None) -> Stream:
        index = self._current_device() if device is None else torch.device(device).index
        self.contexts.add(index)
        return Stream(self, torch.device("cuda", index))

    def stream(self) -> Stream:
        """The calling thread's."""
        return getattr(self._thread, "stream", None) or self._default[self._current_device()]

    @contextmanager
    def _in_stream(self, stream: Stream):
        """As torch's: on leaving it, the device that was the thread's own before is so again."""
        before = self._current_device(), getattr(self._thread, "stream", None)
        self._set_device(stream.device)
        self._thread.stream = stream
        try:
            with self._pretence():
                yield
        finally:
            self._set_device(before[0])
            self._thread.stream = before[1]

    def _pretence(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(_Calls(self))
        stack.enter_context(_Operations(self))
        return stack

    # --- copies --------------------------------------------------------------------------------

    def pinned(self, size: int) -> torch.Tensor:
        """Pinned memory, uint8; kept for good, so that no other tensor gets its address."""
        self.contexts.add(self._current_device())
        whole = torch.empty(size + 4096, dtype=torch.uint8)
        found = whole[-whole.data_ptr() % 4096 :][:size]
        self._pinned.append((found.data_ptr(), found.data_ptr() + size, whole))
        return found

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < end for start, end, _ in self._pinned)

    def upload(self, host: torch.Tensor, device: torch.device, non_blocking: bool) -> Pretended:
        """A host tensor on the device."""
        device = torch.device("cuda", self._current_device() if device.index is None else device.index)
        found = self._wrap(host.clone(memory_format=torch.contiguous_format), device)
        self.counts["bytes up"] += host.nbytes
        self._written(found)
        if non_blocking and self.is_pinned(host):
            self.uploading(host, self.stream())
        else:
            reason = "copy from pageable memory" if non_blocking else "copy from the host"
            self.wait(reason, self.stream())
        return found

    def download(self, values: torch.Tensor, host: torch.Tensor, non_blocking: bool) -> None:
        """Values of a device tensor to a host tensor."""
        self.counts["bytes down"] += values.nbytes
        if non_blocking and self.is_pinned(host):
            self.downloading(values, host, self.stream())
        else:
            host.copy_(values)
            self.wait("copy to pageable memory" if non_blocking else "copy to the host", self.stream())

    def uploading(self, host: torch.Tensor, stream: Stream) -> None:
        """A copy from pinned memory was queued; here it is made at once."""

    def downloading(self, values: torch.Tensor, host: torch.Tensor, stream: Stream) -> None:
        """A copy to pinned memory is queued; here it is made at once."""
        host.copy_(values)

    def wait(self, reason: str, stream: Stream, times: int = 1) -> None:
        """The host waits for all that is queued in a stream."""
        self.waits[reason] += times
        stream.syncs += 1

    # --- operations ----------------------------------------------------------------------------

    def run(self, func, args: tuple, kwargs: dict) -> object:
        name = func.overloadpacket.__name__
        if name != "where" and _is_composite(func):
            with torch._C.DisableTorchFunction(), _Operations(self):
                return func.decompose(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        mine = [t for t in tensors if isinstance(t, Pretended)]
        if name in ("_to_copy", "copy_") and (done := self._copy(name, args, kwargs)) is not NotImplemented:
            return done
        device = kwargs.get("device")
        device = mine[0].device if mine else torch.device(device)
        for tensor in tensors:
            if tensor.device != device and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
                raise RuntimeError(f"{func}: tensors on {tensor.device} and {device}")
        if func.is_view:
            # Not looked up: what is viewed may be a table that was made under an earlier pretence.
            memory, found = mine[0].memory, func(*_inner(args), **_inner(kwargs))
            return _map(lambda t: Pretended(t, memory) if isinstance(t, torch.Tensor) else t, found)
        for tensor in mine:
            self._refuse_race(tensor, func)
            tensor.memory.used[self.stream()] = self.stream().syncs
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        by_number = name in ("div", "div_") and len(args) == 2 and not kwargs and _is_number(args[1])
        compute = self._times_reciprocal if by_number else self._compute
        found = self._results(compute(func, name, _inner(args), _inner(kwargs)), mine, device)
        self._account(name, mine, found, args)
        return found

    def _compute(self, func, name: str, args: tuple, kwargs: dict) -> object:
        """What an operation gives, as CUDA may compute it."""
        if name in ("add", "add_", "sub", "sub_") and math.frexp(kwargs.get("alpha", 1))[0] not in (
            0.5,
            -0.5,
        ):
            raise AssertionError(f"{func}: CUDA may round a product with {kwargs['alpha']} and the sum once")
        if name == "bincount" and len(args) > 1 and args[1] is not None:
            order = self._order(len(args[0]))
            return func(args[0][order], args[1][order], *args[2:], **kwargs)
        if name == "mm":
            order = self._order(args[0].shape[1])
            return func(args[0][:, order], args[1][order], **kwargs)
        if name in ("sum", "mean") and args[0].is_floating_point():
            values = args[0]
            for dim in range(values.dim()):
                values = (
                    values.index_select(dim, self._order(values.shape[dim]))
                    if self._reduces(dim, args)
                    else values
                )
            return func(values, *args[1:], **kwargs)
        if name == "_to_copy" and kwargs.get("dtype") == torch.float8_e4m3fn:
            return func(args[0].clamp(-448, 448), *args[1:], **kwargs)
        found = func(*args, **kwargs)
        if name in APPROXIMATED and found.is_floating_point():
            found = found.nextafter(torch.full_like(found, math.inf))
        return found

    @staticmethod
    def _reduces(dim: int, args: tuple) -> bool:
        dims = args[1] if len(args) > 1 and args[1] is not None else None
        return dims is None or dim in [d % args[0].dim() for d in dims]

    @staticmethod
    def _times_reciprocal(func, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        values, divisor = args
        dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        product = (values.to(wide) * (torch.ones((), dtype=wide) / float(divisor))).to(dtype)
        return values.copy_(product) if name == "div_" else product

    def _order(self, count: int) -> torch.Tensor:
        with self._lock:
            return torch.randperm(count, generator=self._generator)

    def _copy(self, name: str, args: tuple, kwargs: dict) -> object:
        """A copy between devices; NotImplemented within one."""
        if name == "copy_":
            target, source = args[:2]
            non_blocking = (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False)
            if isinstance(target, Pretended) == isinstance(source, Pretended):
                return NotImplemented
            if isinstance(target, Pretended):
                with torch.utils._python_dispatch._disable_current_modes():
                    target.inner.copy_(source)
                self.counts["bytes up"] += source.nbytes
                self._written(target)
                self.wait("copy from the host", self.stream())
            else:
                self._refuse_race(source, name)
                self.download(source.inner, target, non_blocking)
            return target
        device = torch.device(kwargs.get("device") or args[0].device)
        if not isinstance(args[0], Pretended) or device.type == "cuda":
            return NotImplemented
        self._refuse_race(args[0], name)
        rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        found = torch.ops.aten._to_copy(args[0].inner, **rest)
        self.download(found, torch.empty_like(found), kwargs.get("non_blocking", False))
        return found

    # --- bookkeeping ---------------------------------------------------------------------------

    def _wrap(self, inner: torch.Tensor, device: torch.device) -> Pretended:
        storage = inner.untyped_storage()
        with self._lock:
            memory = self._memory.get(storage._cdata)
            if memory is None:
                memory = self._memory[storage._cdata] = _Memory(self, device, storage)
        return Pretended(inner, memory)

    def _results(self, found: object, mine: list[Pretended], device: torch.device) -> object:
        known = {id(t.inner): t for t in mine}  # an operation in place gives back what it got

        def wrap(value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else self._wrap(value, device)

        return _map(wrap, found)

    def _account(self, name: str, mine: list[Pretended], found: object, args: tuple) -> None:
        results = list(_tensors(found))
        for tensor in results:
            self._written(tensor)
        if name in NO_KERNEL:
            return
        self.contexts.add(self._current_device())
        self.counts["kernels"] += 1
        self.counts["bytes touched"] += sum(min(t.inner.nbytes, t.memory.nbytes) for t in [*mine, *results])
        times = WAITS.get(name, 0)
        if name in ("index", "index_put", "index_put_"):
            times = sum(t is not None and t.dtype == torch.bool for t in args[1])
        elif name == "_grouped_mm" and self.capability[0] not in GROUPED_WITHOUT_WAITING:
            times = 1
        if times:
            self.wait(name, self.stream(), times)

    def _written(self, tensor: Pretended) -> None:
        tensor.memory.stream = self.stream()
        tensor.memory.syncs = tensor.memory.stream.syncs

    def _refuse_race(self, tensor: Pretended, what: object) -> None:
        writer = tensor.memory.stream
        if writer not in (None, self.stream()) and writer.syncs == tensor.memory.syncs:
            raise RaceError(f"{what} reads {list(tensor.shape)} before another stream has written it")


def _is_number(value: object) -> bool:
    """Whether a kernel gets it as an argument and not from the device's memory."""
    return not isinstance(value, torch.Tensor) or (value.dim() == 0 and not isinstance(value, Pretended))


def _inner(values: object) -> object:
    return _map(lambda t: t.inner if isinstance(t, Pretended) else t, values)


def _map(function: Callable[[object], object], values: object) -> object:
    """Arguments or results of an operation, with a function applied to what lists in them hold."""
    if isinstance(values, (tuple, list)):
        return [_map(function, v) for v in values]
    if isinstance(values, dict):
        return {k: _map(function, v) for k, v in values.items()}
    return function(values)


def _tensors(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


@cache
def _is_composite(func) -> bool:
    """Whether an operation is made of others."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


class _Calls(TorchFunctionMode):
    """Takes the calls that torch would answer by looking for a CUDA driver."""

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretended):
            return _indexed(*args)
        if func in TO_PYTHON and isinstance(args[0], Pretended):
            return func(args[0].cpu(), *args[1:])
        if func in WITHOUT_DRIVER and any(isinstance(t, Pretended) for t in _tensors(args)):
            return WITHOUT_DRIVER[func](*args, **kwargs)
        if func is torch.Tensor.is_pinned:
            return self.cuda.is_pinned(args[0])
        if func is torch.Tensor.pin_memory:
            buffer = self.cuda.pinned(args[0].nbytes).view(args[0].dtype).view(args[0].shape)
            return buffer.copy_(args[0])
        if kwargs.get("pin_memory"):
            return self.cuda.pinned(args[0]) if args else None
        if func is torch.Tensor.cuda:
            func, kwargs = torch.Tensor.to, {**kwargs, "device": "cuda"}
        device, rest = _device_of(func, args, kwargs)
        if device is None or device.type != "cuda":
            return func(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if func is torch.Tensor.to:
            if isinstance(args[0], Pretended):
                if device.index not in (None, args[0].device.index):
                    raise NotImplementedError("copies between devices")
                return func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
            host = args[0]
            non_blocking = kwargs.pop("non_blocking", False)
            if rest or kwargs:
                host = func(host, *rest, **kwargs)
            return self.cuda.upload(host, device, non_blocking)
        if func is torch.tensor:
            return self.cuda.upload(func(*args, **kwargs), device, False)
        device = torch.device("cuda", self.cuda._current_device() if device.index is None else device.index)
        if any(isinstance(t, Pretended) for t in _tensors(args)):
            return func(*args, **kwargs)  # like one that is there
        found = self.cuda._wrap(func(*args, **kwargs, device="cpu"), device)  # a factory
        self.cuda._account(func.__name__, [], found, args)
        return found


def _indexed(tensor: torch.Tensor, index: object, value: object = None) -> torch.Tensor | None:
    """`tensor[index]`, or `tensor[index] = value`, which in C++ begin with a call of the driver."""
    parts = index if isinstance(index, tuple) else (index,)
    dim, tensors = 0, []
    for number, part in enumerate(parts):
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor, dim = tensor.select(dim, part), dim - 1
        elif part is Ellipsis:
            dim = tensor.dim() - sum(map(_taken, parts[number + 1 :])) - 1
        else:
            tensors += [None] * (dim - len(tensors)) + [part]
            dim += _taken(part) - 1
        dim += 1
    if value is None:
        return torch.ops.aten.index(tensor, tensors) if tensors else tensor
    if tensors:
        if not isinstance(value, torch.Tensor):
            value = torch.ops.aten.new_full(tensor, [], value)
        torch.ops.aten.index_put_(tensor, tensors, value)
    elif isinstance(value, torch.Tensor):
        torch.ops.aten.copy_(tensor, value)
    else:
        tensor.fill_(value)
    return None


def _taken(part: object) -> int:
    """Dimensions of a tensor that a part of an index speaks for."""
    if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
        return part.dim()
    return part is not None


def _device_of(func, args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple]:
    """The device that a call names, and its other positional arguments but the first."""
    if "device" in kwargs:
        device = kwargs["device"]
        return (None if device is None else torch.device(device)), args[1:]
    if func is torch.Tensor.to:
        named = [a for a in args[1:] if isinstance(a, (torch.device, str))]
        if named:
            return torch.device(named[0]), tuple(a for a in args[1:] if isinstance(a, torch.dtype))
    return None, args[1:]


class _Operations(TorchDispatchMode):
    """Takes the operations that say by their device only that they are meant."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler for each test run

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = kwargs.get("device")
        on_cuda = named is not None and torch.device(named).type == "cuda"
        if on_cuda or any(isinstance(t, Pretended) for t in _tensors((args, kwargs))):
            return self.cuda.run(func, args, kwargs)
        return func(*args, **kwargs)
