"""What the networks of the zoo share: how a width scales them, and which images they take."""

from typing import Annotated

from pydantic import AfterValidator, Field

from windfall.spec import Spec, SpecError, tag

# Multiplies the sizes of hidden layers and the numbers of channels, rounded and at least 1.
Width = Annotated[float, Field(gt=0)]


def _counted(number: int, which: str) -> AfterValidator:
    def check(stages: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if stages is not None and len(stages) != number:
            raise ValueError(
                f"must have {number} factors, one for each stage ({which}); got {len(stages)}"
            )
        return stages

    return AfterValidator(check)


# Of each stage, a factor on its channels beside the width; None is 1 for all.
PoolStages = Annotated[tuple[Width, ...] | None, _counted(5, "what stands between two max-pools")]
BlockStages = Annotated[tuple[Width, ...] | None, _counted(3, "the blocks on images of one size")]


def scaled(size: int, width: float) -> int:
    """A layer's size, or number of channels, at a width."""
    return max(1, round(size * width))


def staged(size: int, width: float, stages: tuple[float, ...] | None, stage: int) -> int:
    """A number of channels at a width, times the factor of its stage, which counts from 0.

    Rounded twice, so that the fraction that is kept of a network's channels gives their number.
    """
    whole = scaled(size, width)
    return whole if stages is None else scaled(whole, stages[stage])


def check_images(model: Spec, input_shape: tuple[int, ...], num_halvings: int) -> None:
    """Refuse, by a `SpecError`, inputs that are no images or do not survive so many halvings."""
    smallest = 2**num_halvings
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise SpecError(
            f"model {tag(type(model))} must be given images [channel, height, width] of at "
            f"least {smallest} x {smallest} pixels; got {tuple(input_shape)}."
        )
