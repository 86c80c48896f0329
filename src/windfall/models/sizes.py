"""What the networks of the zoo share: how a width scales them, and which images they take."""

from typing import Annotated

from pydantic import Field

from windfall.spec import Spec, SpecError, tag

# Multiplies the sizes of hidden layers and the numbers of channels, rounded and at least 1.
Width = Annotated[float, Field(gt=0)]


def scaled(size: int, width: float) -> int:
    """A layer's size, or number of channels, at a width."""
    return max(1, round(size * width))


def check_images(model: Spec, input_shape: tuple[int, ...], num_halvings: int) -> None:
    """Refuse, by a `SpecError`, inputs that are no images or do not survive so many halvings."""
    smallest = 2**num_halvings
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise SpecError(
            f"model {tag(type(model))} must be given images [channel, height, width] of at "
            f"least {smallest} x {smallest} pixels; got {tuple(input_shape)}."
        )
