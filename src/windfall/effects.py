"""Effects: the comparisons of arms, and what each isolates.

[effect.name for effect in EFFECTS if effect.arm == "ticket"]
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Effect:
    """A comparison and what it isolates.

    Args:
        name: of the effect.
        arm: the arm claimed to be better.
        against: the arm it is compared with.
        reads: the question it answers.
        claim: `superior`, or `non-inferior` within the margin.
        measures: `training` (accuracies, early stop) or `overlap` (of masks).
    """

    name: str
    arm: str
    against: str
    reads: str
    claim: Literal["superior", "non-inferior"] = "superior"
    measures: Literal["training", "overlap"] = "training"


EFFECTS = (
    Effect(
        "matching", "ticket", "dense", "is the ticket as good as the dense network?", "non-inferior"
    ),
    Effect("weights", "finetune", "reinit", "is it what the weights learned?"),
    Effect("weights-e", "finetune", "scratch-e", "is it what the weights learned?"),
    Effect("weights-b", "finetune", "scratch-b", "is it so at the dense budget?"),
    Effect("weights-small-e", "finetune-small", "scratch-e", "and at the papers' small rate?"),
    Effect("weights-small-b", "finetune-small", "scratch-b", "and that at the dense budget?"),
    Effect("weights-b-plus", "finetune", "scratch-b-plus", "and if fine-tuning is paid for too?"),
    Effect("scratch", "scratch-b", "finetune", "is scratch as good at its budget?", "non-inferior"),
    Effect("initialization", "ticket", "reinit", "is it luck?"),
    Effect("initialization", "ticket", "scratch-e", "is it luck?"),
    Effect("connectivity", "reinit", "shuffled", "is it which connections?"),
    Effect("placement", "ticket", "shuffled-ticket", "is it which of theta_0's weights stay?"),
    Effect("allocation", "shuffled", "random", "is it how many in which layer?"),
    Effect("architecture", "reinit", "random", "is it the architecture, the two together?"),
    Effect("guided", "guided", "uniform-width", "is it the allocation over stages?"),
    Effect("transferred", "transferred", "uniform-width", "does that allocation carry over?"),
    Effect("signs", "signed-reinit", "reinit", "is it the signs that theta_0 has?"),
    Effect("constant", "signed-constant", "random-constant", "and where magnitudes are all one?"),
    Effect(
        "signs-alone", "signed-constant", "ticket", "do the signs alone suffice?", "non-inferior"
    ),
    Effect("rewinding", "rewind", "ticket", "is it luck after the first steps?"),
    Effect(
        "same-init", "other-order", "other-init", "does theta_0 fix the mask?", measures="overlap"
    ),
    Effect(
        "above-chance", "other-init", "chance", "is there overlap without it?", measures="overlap"
    ),
)
