"""What could differ between devices and threads, shown where there is one CPU.

A GPU takes sums in any order, and runs what several threads queue in several streams side by side.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fp8lib.numerics import mse
from fp8lib.numerics.modes import Calibration
from fp8lib.numerics.scales import block_scales
from fp8lib.numerics.tables import table
from test_scales import FAMILIES, bf16, massive

CPU = torch.device("cpu")

# --- tables ----------------------------------------------------------------------------------------

TABLES: dict[str, tuple] = {
    "_mantissas": (16,),
    "_error_table": (16,),
    "_octave_shifts": (),
    "_bin_offsets": (64, 16, torch.int16),
    "_exact_candidates": (16,),
    "_exact_table": (16,),
}
"""Every table that `mse` shares among threads, with arguments to ask for it."""


class Elsewhere(TorchDispatchMode):
    """Notes what is computed on the meta device, which stands for any that is not the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            self.operations.append(func.name())
        return result


def test_all_tables_are_listed_here():
    made_by_table = {name for name in vars(mse) if hasattr(getattr(mse, name), "__wrapped__")}
    assert made_by_table == TABLES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_computed_on_the_cpu_and_copied_last(name: str):
    # The copy waits for itself. What is computed on the device after it does not: another thread would find
    # the table in the cache, and its kernels, in a stream of their own, might read it too early.
    with Elsewhere() as elsewhere:
        found = getattr(mse, name)(*TABLES[name], torch.device("meta"))
    assert found.is_meta
    assert elsewhere.operations == ["aten::_to_copy"]


@pytest.mark.parametrize("name", TABLES)
def test_threads_that_ask_at_once_get_one_table(name: str, monkeypatch: pytest.MonkeyPatch):
    # Were there two, the cache would keep one, and the memory of the other could be given away in use.
    arange, tensor = torch.arange, torch.tensor

    def slowly(make: Callable) -> Callable:
        return lambda *args, **kwargs: (time.sleep(0.02), make(*args, **kwargs))[1]

    monkeypatch.setattr(torch, "arange", slowly(arange))
    monkeypatch.setattr(torch, "tensor", slowly(tensor))
    key = tuple(7 if isinstance(k, int) else k for k in TABLES[name])  # of no other test
    ask = table(getattr(mse, name).__wrapped__)
    with ThreadPoolExecutor(4) as pool:
        found = [f.result() for f in [pool.submit(ask, *key, CPU) for _ in range(4)]]
    assert all(t is found[0] for t in found)
    assert ask(*key, CPU) is found[0]


def test_a_table_is_kept_for_good():
    ask = table(lambda number: torch.zeros(number))
    first = [ask(n, CPU) for n in range(1000)]
    assert all(ask(n, CPU) is t for n, t in enumerate(first))


# --- sums in any order -----------------------------------------------------------------------------


class AnyOrder(TorchFunctionMode):
    """Moves every sum of floats whose order a GPU chooses by as much as another order of it may."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in ("bincount", "matmul", "__matmul__"):
            return result
        if not result.is_floating_point() or bool((result == result.round()).all() & (result < 2**53).all()):
            return result  # sums of integers are exact in every order
        noise = torch.rand(result.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return result * (1 + 2.0**-40 * noise)


def search(weights: torch.Tensor, a: torch.Tensor, seed: int | None) -> float:
    """The exact search's scale for one block, its sums in some order."""
    blocked, amax = weights.reshape(1, -1), weights.float().abs().amax().view(1)
    importance = mse.per_block_column(a)
    if seed is None:
        return mse._exact_search(blocked, amax, 1, importance).item()
    with AnyOrder(seed):
        return mse._exact_search(blocked, amax, 1, importance).item()


def test_exact_search_takes_the_same_of_two_equal_scales_whatever_the_order_of_sums():
    # 227/128 is 448 + 6.4 times 2^-8 and rounds to 448 * 2^-8, under 2^-7 to 224 * 2^-7, the same. The loss
    # of both, a * (3/128)^2 with a = 2^23 + 4, has 27 bits and lies halfway between two float32 numbers:
    # however little an order of summation moves one of the two, rounding takes them apart.
    weights, a = torch.zeros(128, 128, dtype=torch.bfloat16), torch.zeros(128)
    weights[0, 0], a[0] = 227 / 128, 2**23 + 4
    assert (2**23 + 4) * 9 % 8 == 4
    expected = search(weights, a, None)
    assert [search(weights, a, seed) for seed in range(20)] == [expected] * 20
    assert expected == 2.0**-8  # the smaller of two that are equally good


@pytest.mark.parametrize("calibration", [bf16("mse"), Calibration("mse")], ids=str)
@pytest.mark.parametrize("family", ["gaussian", "outliers of 10^4"])
def test_mse_gives_the_same_scales_whatever_the_order_of_sums(family: str, calibration: Calibration):
    weights, a = FAMILIES[family]((128, 256)).bfloat16(), massive(256)
    expected = block_scales(weights, calibration, a)[0]
    with AnyOrder(0):
        found = block_scales(weights, calibration, a)[0]
    assert torch.equal(found, expected)
