"""The prototype conformity paper's objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from factory.recipes.part import ObjectivePart, Trait
from keys.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from factory.objective import Objective
    from factory.prototypes.loss import Bound

DepthText = Annotated[float, Field(gt=0, le=1)] | str


class PrototypeConformityPart(ObjectivePart):
    """Cross-entropy plus the prototype conformity loss at several depths (Mustafa et al., ICCV 2019, Eq. 7)."""

    kind: Literal["prototype-conformity"] = "prototype-conformity"
    depths: tuple[DepthText, ...] = Field(
        default=(0.5, 0.75, 1.0), min_length=1, description="parts by name, or shares of the depth; 1.0: the last"
    )
    dimension: int = Field(default=64, ge=1, description="what wider features are projected to, before the last depth")
    tokens: Literal["average", "class"] = Field(default="average", description="which vector stands for a block")
    weight: float = Field(default=1.0, gt=0, description="of each depth's loss beside the cross-entropy")
    auxiliary_cross_entropy: float = Field(default=0.0, ge=0, description="of each depth's own cross-entropy (Eq. 8)")
    bound: Literal["ball", "sphere", "none"] = Field(
        default="ball", description="what ends the push apart: balls that no longer overlap, a sphere, or nothing"
    )
    radius: float = Field(default=1.0, gt=0, description="of the balls, or of the sphere")
    centroid_rate: float = Field(default=10.0, gt=0, description="the centroids' learning rate over the network's")
    warm_up: int = Field(default=0, ge=0, description="epochs of cross-entropy alone (T')")
    inference: Literal["softmax", "nearest-prototype"] = "softmax"

    @model_validator(mode="after")
    def _last_depth(self) -> PrototypeConformityPart:
        if self.inference == "nearest-prototype" and self.depths[-1] != 1.0:
            raise ValueError("inference by the nearest prototype needs 1.0 as the last of the depths")
        return self

    @property
    def changes_network(self) -> bool:
        """Prototypes stand in the place of the classifier."""
        return self.inference == "nearest-prototype"

    def build(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> Objective:
        """The joint loss, with branches and centroids for ``network``.

        Raises InputError for depths it lacks, and where nearest prototypes would have to answer for every patch.
        """
        from factory.networks import traits
        from factory.prototypes.depths import class_tokens, find_depths, plain
        from factory.prototypes.objective import ConformityObjective, Weights

        if classes < 2:
            raise InputError("Prototypes are pushed away from other classes, and the data set has only one class.")
        if self.tokens == "class" and not class_tokens(network):
            raise InputError("This network has no class token; set the prototypes' tokens to average.")
        if self.changes_network and Trait.PATCH_LOGITS in traits(plain(network)):
            raise InputError(
                f"A {type(plain(network)).__name__} answers for every patch, which the nearest prototype cannot; set "
                "the objective's inference to softmax."
            )
        return ConformityObjective(
            find_depths(network, self.depths), classes, dimension=self.dimension, tokens=self.tokens,
            bound=self._bound(), weights=Weights(self.weight, self.auxiliary_cross_entropy, self.centroid_rate),
            warm_up=self.warm_up, label_smoothing=label_smoothing,
        )  # fmt: skip

    def attach(self, network: nn.Module, learned: Mapping[str, Tensor]) -> None:
        """With ``inference`` nearest-prototype, put the last depth's centroids in the classifier's place (Eq. 6)."""
        from factory.prototypes.nearest import attach_nearest_prototype
        from factory.prototypes.objective import centroids_in

        if self.changes_network:
            try:
                centroids = centroids_in(learned, len(self.depths) - 1, self.centroid_rate)
            except KeyError as error:
                raise InputError(f"The model's prototypes are missing ({error}); train it again.") from error
            attach_nearest_prototype(network, centroids, self._bound())

    def _bound(self) -> Bound:
        from factory.prototypes.loss import Bound

        return Bound(self.bound, self.radius)
