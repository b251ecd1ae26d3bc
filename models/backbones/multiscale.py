"""One tap of a backbone at several sizes of the image, as CS-Flow wants it."""

from paddle import Tensor

from utils.errors import UserError

from .base import Backbone


class MultiScale(Backbone):
    """Run `backbone` on the image at full, half, quarter … size, and return a map of each.

    The smaller images keep every 2nd, 4th … pixel: nearest-neighbour resizing of the normalised
    image, as in the reference code of CS-Flow.
    """

    def __init__(self, backbone: Backbone, scales: int = 3) -> None:
        if len(backbone.strides) != 1:
            raise UserError(
                f"backbone {backbone.name}: strides {backbone.strides} must be one only, since "
                "it sees the image at several sizes"
            )
        steps = [2**scale for scale in range(scales)]
        stride, channels = backbone.strides[0], backbone.channels[0]
        taps = {stride * step: (index, channels) for index, step in enumerate(steps)}
        super().__init__(list(taps), taps)
        self.pixel_steps = steps
        self.backbone = backbone
        self.name, self.mean, self.std = backbone.name, backbone.mean, backbone.std
        self.freeze()

    def parts(self) -> dict[str, Backbone]:
        return self.backbone.parts()

    def check_input_size(self, height: int, width: int) -> None:
        coarsest = self.strides[-1]
        for size in (height, width):
            if size < coarsest or size % coarsest:
                raise UserError(
                    f"backbone {self.name} at {len(self.strides)} image sizes: model.input_size "
                    f"is [{height}, {width}]; both must be multiples of {coarsest}, like "
                    f"{max(coarsest, round(size / coarsest) * coarsest)} instead of {size}"
                )
        for step in self.pixel_steps:
            self.backbone.check_input_size(height // step, width // step)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for step in self.pixel_steps:
            features.append(self.backbone(image[:, :, ::step, ::step])[0])
        return features
