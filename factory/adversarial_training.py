"""Adversarial training: every batch is learnt together with attacked copies of it (Algorithm 1, lines 10 to 13).

The attack climbs the whole loss that training minimises, not the cross-entropy alone, with ε drawn anew for every
image. It is made on the model in evaluation mode: it moves no statistics of batch normalisation, and climbs the
function that devices run, without dropout. Clean and attacked images then pass through the model together in training
mode, so that batch normalisation sees, and later uses, the statistics of both.

``FreeAdversarialTraining`` spends no gradient on attacks: a step's own backward pass also gives the images' gradients,
and the next step learns the copies that they make (Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019,
with two replays, of which the first is the plain step).

All randomness comes from torch's global generator, which training seeds at every epoch, so that a run that was
interrupted goes on with the same images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from device_tests.attacks.gradients import at_rest
from factory.classifier import ImageClassifier
from factory.objective import Objective


@dataclass(frozen=True, eq=False)
class Learnt:
    """Images of a step, whose gradient its backward pass leaves in them, with the bounds of their balls."""

    images: Tensor
    labels: Tensor
    epsilon: Tensor
    low: Tensor
    high: Tensor

    def attacked(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` of them, one step of ε along the gradient's sign, inside the ball; and their labels."""
        if self.images.grad is None:
            raise RuntimeError("the loss of the step before was not differentiated")
        moved = self.images.detach()[:count] + self.epsilon[:count] * self.images.grad[:count].sign()
        return torch.clamp(moved, self.low[:count], self.high[:count]), self.labels[:count]


@dataclass(frozen=True)
class TrainingAttack:
    """``steps`` steps of ε/``steps`` along the gradient's sign; ε uniform in [``low``, ``high``] on inputs in [0, 1].

    FGSM is one step from the image itself; PGD begins at a uniform point of the ball (Eqs. 10, 16 and 17).
    """

    low: float
    high: float
    steps: int
    random_start: bool

    def generate(self, objective: Objective, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """Attacked copies of ``images`` N×C×H×W in [0, 1], inside each image's ball and [0, 1]; without a gradient."""
        epsilon, low, high = self._ball(images)
        attacked = self._start(images, epsilon, low, high)
        with at_rest(model), at_rest(objective):
            for _ in range(self.steps):
                leaf = attacked.detach().requires_grad_(True)
                with torch.enable_grad():
                    loss = objective(model, leaf, labels)
                (gradient,) = torch.autograd.grad(loss, leaf)
                # Clipped outside the graph: a clamp has no gradient at its ends, where many pixels lie.
                attacked = torch.clamp(attacked + epsilon / self.steps * gradient.sign(), low, high)
        return attacked.detach()

    def begin(self, images: Tensor, labels: Tensor) -> Learnt:
        """Images where an attack begins, which are given their gradient by the step that learns them."""
        epsilon, low, high = self._ball(images)
        leaf = self._start(images, epsilon, low, high).detach().requires_grad_(True)
        return Learnt(leaf, labels, epsilon, low, high)

    def _ball(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ε of each image, and the ends of its ball within [0, 1]."""
        draw = torch.rand(len(images), *(1 for _ in images.shape[1:]))
        epsilon = (self.low + (self.high - self.low) * draw).to(images)
        return epsilon, (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)

    def _start(self, images: Tensor, epsilon: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if not self.random_start:
            return images
        return torch.clamp(images + epsilon * (2 * torch.rand(images.shape) - 1).to(images), low, high)


class AdversarialTraining(Objective):
    """``objective`` on clean and attacked images at once, after ``warm_up`` epochs on clean images alone.

    ``share``: of the batch, from its beginning, that is attacked in place of the clean images, so that it keeps its
    size (decoys stand at its end); None: attacked copies of all images beside them.
    """

    def __init__(
        self, objective: Objective, attack: TrainingAttack, warm_up: int = 0, share: float | None = None
    ) -> None:
        super().__init__()
        self.objective, self.attack, self.warm_up, self.share = objective, attack, warm_up, share
        self.attacking = warm_up == 0

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Pass it on; attack from epoch ``warm_up`` on."""
        self.attacking = epoch >= self.warm_up
        self.objective.begin_epoch(epoch, epochs)

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """The objective's loss of 2·N images, or of N with a share; see :class:`Objective`."""
        if not self.attacking:
            return self.objective(model, images, labels)
        if self.share is not None:
            count = round(self.share * len(images))
            attacked = self.attack.generate(self.objective, model, images[:count], labels[:count])
            return self.objective(model, torch.cat([attacked, images[count:]]), labels)
        attacked = self.attack.generate(self.objective, model, images, labels)
        return self.objective(model, torch.cat([images, attacked]), torch.cat([labels, labels]))

    def learned(self) -> dict[str, Tensor]:
        """What the objective learned."""
        return self.objective.learned()


class FreeAdversarialTraining(AdversarialTraining):
    """``objective`` on batches of which ``share`` (None: half) are attacked copies of images of the step before.

    The copies replace the batch's first images, so that it keeps its size (decoys stand at its end). They are made from
    the gradient of the step that learned these images, one step of the attack from the point where it was taken: with
    a random start, that step learns noisy images. An epoch's first batch has none.
    """

    _before: Learnt | None = None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """As in :class:`AdversarialTraining`; forget the last epoch's step."""
        super().begin_epoch(epoch, epochs)
        self._before = None

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """The objective's loss of N images; its backward pass must be run before the next call."""
        if not self.attacking:
            return self.objective(model, images, labels)
        copies, truth = images[:0], labels[:0]
        if self._before is not None:
            copies, truth = self._before.attacked(round((self.share or 0.5) * len(images)))
        self._before = self.attack.begin(images[len(copies) :], labels[len(copies) :])
        learnt = self._before
        return self.objective(model, torch.cat([copies, learnt.images]), torch.cat([truth, learnt.labels]))
