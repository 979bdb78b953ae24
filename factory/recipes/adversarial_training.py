"""Training on attacked images beside the clean ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from factory.recipes.part import AugmentationPart

if TYPE_CHECKING:
    from factory.objective import Objective


class AdversarialTrainingPart(AugmentationPart):
    """Clean and attacked images together, the attack made on the joint loss (Mustafa et al., ICCV 2019, Algorithm 1).

    The paper draws ε from [0.1, 0.5] for Fashion-MNIST and from [0.01, 0.05] for CIFAR-10, the default. It trains on
    attacked copies beside all clean images. With a ``share`` s a batch stays as large as it is, and one step from a
    random point (``pgd`` with one step) costs about 1 + s plain steps. ``free`` takes each attack's gradient from the
    step before (Shafahi et al., NeurIPS 2019) and costs hardly more than plain steps; an epoch then learns 1 − s of the
    images, and s of these again as they are attacked.
    """

    kind: Literal["fgsm", "pgd", "free"] = "pgd"
    epsilon_low: float = Field(default=0.01, ge=0, le=1, description="smallest ε, on inputs in [0, 1]")
    epsilon_high: float = Field(default=0.05, gt=0, le=1, description="largest ε")
    steps: int = Field(default=10, ge=1, description="of PGD, ε/steps each; a batch costs about this many times more")
    warm_up: int = Field(default=0, ge=0, description="epochs on clean images alone (T')")
    share: float | None = Field(
        default=None, gt=0, le=1,
        description="of a batch that is attacked, in place of the clean images; unset: attacked copies beside all "
        "(free: 0.5, its largest)",
    )  # fmt: skip

    @model_validator(mode="after")
    def _ordered(self) -> AdversarialTrainingPart:
        if self.epsilon_low > self.epsilon_high:
            raise ValueError("epsilon_low must not be above epsilon_high")
        if self.kind == "free" and (self.share or 0) > 0.5:
            raise ValueError("free attacks are copies of the step before: their share is at most 0.5")
        return self

    @property
    def name(self) -> str:
        """``fgsm``, ``pgd`` or ``free``."""
        return self.kind

    def build(self, objective: Objective) -> Objective:
        """``objective`` on clean and attacked images."""
        from factory.adversarial_training import AdversarialTraining, FreeAdversarialTraining, TrainingAttack

        if self.kind == "free":
            attack = TrainingAttack(self.epsilon_low, self.epsilon_high, 1, random_start=False)
            return FreeAdversarialTraining(objective, attack, self.warm_up, self.share)
        pgd = self.kind == "pgd"
        attack = TrainingAttack(self.epsilon_low, self.epsilon_high, self.steps if pgd else 1, random_start=pgd)
        return AdversarialTraining(objective, attack, self.warm_up, self.share)
