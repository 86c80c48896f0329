import numpy as np
import pytest
import torch

from windfall import seeds
from windfall.batches import CropFlip, Order, batch_indices
from windfall.spec import SpecError


def concatenation(seed, num_train, num_epochs):
    permutations = [
        seeds.stream(seed, "order", epoch).permutation(num_train) for epoch in range(num_epochs)
    ]
    return np.concatenate(permutations)


@pytest.mark.parametrize(
    ("num_train", "batch_size"), [(7, 3), (6, 3), (3, 7), (5, 5), (1, 1), (1, 4), (4, 9)]
)
def test_batches_are_slices_of_the_concatenated_permutations_in_any_order(num_train, batch_size):
    line = concatenation(5, num_train, 60)
    order = Order(5, num_train, batch_size)
    steps = [*range(8), 7, 3, 3, 0, 11, *np.random.default_rng(0).integers(0, 6, 20).tolist()]
    for step in steps:
        expected = line[step * batch_size : (step + 1) * batch_size]
        assert order.batch(step).tolist() == expected.tolist()
        assert batch_indices(5, num_train, batch_size, step).tolist() == expected.tolist()


def test_every_epoch_sees_every_sample_once_and_every_batch_is_full():
    batches = [Order(0, 10, 4).batch(step) for step in range(5)]
    assert {len(batch) for batch in batches} == {4}
    line = np.concatenate(batches)
    assert sorted(line[:10]) == sorted(line[10:]) == list(range(10))
    assert line[:10].tolist() != line[10:].tolist()
    assert line.dtype == np.int64


def test_two_arms_of_one_seed_see_the_same_batches_and_two_seeds_do_not():
    one, same, other = Order(3, 100, 8), Order(3, 100, 8), Order(4, 100, 8)
    assert [one.batch(t).tolist() for t in range(30)] == [same.batch(t).tolist() for t in range(30)]
    assert one.batch(0).tolist() != other.batch(0).tolist()


def test_resuming_at_a_step_goes_on_as_if_unbroken():
    unbroken = Order(1, 10, 3)
    before = [unbroken.batch(step).tolist() for step in range(20)]
    resumed = Order(1, 10, 3)
    assert [resumed.batch(step).tolist() for step in range(9, 20)] == before[9:]


def test_the_cache_holds_the_epochs_of_one_batch_only():
    order = Order(0, 10, 4)
    for step in range(50):
        order.batch(step)
        assert len(order._permutations) <= 2


def test_a_batch_is_the_callers_own():
    order = Order(0, 10, 4)
    before = order.batch(0).tolist()
    order.batch(0)[:] = 0
    assert order.batch(0).tolist() == before


@pytest.mark.parametrize(
    ("arguments", "step", "message"),
    [
        ((0, 0, 4), 0, "`num_train` must be at least 1; got 0"),
        ((0, 4, 0), 0, "`batch_size` must be at least 1; got 0"),
        ((0, 4, 4), -1, "`step` must be at least 0; got -1"),
    ],
)
def test_impossible_orders_are_refused(arguments, step, message):
    with pytest.raises(SpecError, match=message):
        Order(*arguments).batch(step)


# -- augmentation ----------------------------------------------------------------------------------


def one_by_one(inputs, draws, padding):
    """CropFlip as a loop over images and pixels."""
    result = torch.zeros_like(inputs)
    height, width = inputs.shape[2:]
    for image, (down, right, mirrored) in enumerate(draws.tolist()):
        for row in range(height):
            for column in range(width):
                source = width - 1 - column if mirrored else column
                y, x = row + down - padding, source + right - padding
                if 0 <= y < height and 0 <= x < width:
                    result[image, :, row, column] = inputs[image, :, y, x]
    return result


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_crop_flip_equals_a_loop_over_images(padding, flip, dtype):
    inputs = (1 + torch.arange(12 * 3 * 5 * 7) % 255).reshape(12, 3, 5, 7).to(dtype)
    augment = CropFlip(padding=padding, flip=flip)
    moved = augment.apply(inputs, seed=2, step=9)
    assert moved.dtype == dtype
    assert torch.equal(moved, one_by_one(inputs, augment.draw(2, 9, 12), padding))


def test_draws_do_not_depend_on_what_is_in_the_batch():
    augment, coordinates = CropFlip(padding=2), torch.arange(1, 37.0).reshape(1, 1, 6, 6)
    batch = coordinates.repeat(20, 1, 1, 1)
    scale = torch.rand(20, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.apply(batch, 0, 3) * scale, augment.apply(batch * scale, 0, 3))


def test_crops_are_the_same_with_and_without_flips():
    with_flips, without = CropFlip().draw(0, 0, 50), CropFlip(flip=False).draw(0, 0, 50)
    assert torch.equal(with_flips[:, :2], without[:, :2])
    assert with_flips[:, 2].any()
    assert not without[:, 2].any()


def test_draws_cover_their_range_evenly_and_move_with_seed_and_step():
    draws = CropFlip(padding=1).draw(0, 0, 6000)
    for column, values in ((0, 3), (1, 3), (2, 2)):
        shares = draws[:, column].bincount() / 6000
        assert torch.allclose(shares, torch.full((values,), 1 / values).to(shares), atol=0.03)
    assert not torch.equal(draws, CropFlip(padding=1).draw(1, 0, 6000))
    assert not torch.equal(draws, CropFlip(padding=1).draw(0, 1, 6000))


def test_batches_of_many_seeds_move_as_one():
    augment, inputs = CropFlip(), torch.arange(2 * 8 * 3 * 8 * 8).reshape(16, 3, 8, 8) % 251
    draws = torch.cat([augment.draw(seed, 4, 8) for seed in (0, 1)])
    together = augment.move(inputs, draws)
    assert torch.equal(together[:8], augment.apply(inputs[:8], 0, 4))
    assert torch.equal(together[8:], augment.apply(inputs[8:], 1, 4))


def test_only_images_are_augmented():
    with pytest.raises(SpecError, match=r"`augment` must be given 4 images .*shape \(4, 20\)"):
        CropFlip().apply(torch.zeros(4, 20), 0, 0)
