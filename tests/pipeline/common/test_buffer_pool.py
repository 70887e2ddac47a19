"""Memory for batches is used again, but never while anything holds it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.buffer_pool import BufferPool


def address(array: np.ndarray | torch.Tensor) -> int:
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.__array_interface__["data"][0]


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = BufferPool(torch.device("cpu"))
    addresses = {address(buffers.empty(64, 1, 28, 28)) for _ in range(5)}
    assert len(addresses) == 1


def test_what_is_held_is_not_given_again() -> None:
    buffers = BufferPool(torch.device("cpu"))
    held = [buffers.empty(4, 7) for _ in range(5)]
    assert len({address(tensor) for tensor in held}) == 5


def test_a_view_holds_the_memory_as_well() -> None:
    buffers = BufferPool(torch.device("cpu"))
    for view_of in (
        lambda tensor: tensor[2:3].permute(1, 0),
        lambda tensor: tensor.numpy()[1],
        lambda tensor: tensor.detach().flatten(),
        lambda tensor: memoryview(tensor.numpy()),
    ):
        view = view_of(buffers.empty(4, 7))
        assert address(buffers.empty(4, 7)) not in range(
            address(np.asarray(view)), address(np.asarray(view)) + 4 * 4 * 7
        )
        del view


def test_what_autograd_has_saved_holds_the_memory() -> None:
    buffers = BufferPool(torch.device("cpu"))
    weight = torch.ones(7, requires_grad=True)
    images = buffers.empty(4, 7).fill_(2)
    loss = (images * weight).sum()
    del images
    buffers.empty(4, 7).fill_(100)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [8] * 7


def test_a_smaller_last_batch_takes_the_same_memory() -> None:
    buffers = BufferPool(torch.device("cpu"))
    whole = address(buffers.array((512, 784)))
    assert address(buffers.array((17, 784))) == whole
    assert buffers.array((17, 784)).shape == (17, 784)


def test_memory_is_aligned() -> None:
    buffers = BufferPool(torch.device("cpu"))
    held = [
        buffers.empty(
            size,
        )
        for size in (1, 7, 1000, 1_000_003)
    ]
    assert [address(tensor) % 64 for tensor in held] == [0] * 4


def test_sizes_that_went_out_of_use_are_let_go() -> None:
    buffers = BufferPool(torch.device("cpu"))
    gone = weakref.ref(buffers.array((1,)).base)
    assert gone() is not None
    for megabytes in range(3, 20, 2):
        buffers.array((megabytes << 20,))
    assert gone() is None


def test_types_and_shapes() -> None:
    buffers = BufferPool(torch.device("cpu"))
    assert buffers.array((3, 4)).dtype == np.uint8
    assert buffers.array((3, 4), np.float32).shape == (3, 4)
    assert buffers.empty(2, 3).dtype == torch.float32
    assert buffers.array((0, 28, 28, 1)).shape == (0, 28, 28, 1)
    assert buffers.array((8, 5)).flags.c_contiguous


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=40))
def test_nobody_elses_content_changes(requests: list[tuple[int, int]]) -> None:
    """Take arrays of random sizes, each filled with its number, and let go of some: what is held stays as it was."""
    buffers = BufferPool(torch.device("cpu"))
    held: list[tuple[int, np.ndarray]] = []
    for number, (size, let_go) in enumerate(requests):
        array = buffers.array((size,))
        array.fill(number)
        held.append((number, array))
        del held[: min(let_go, len(held) - 1)]
        del array
        gc.collect(0)
        for content, kept in held:
            assert (kept == content).all()
