"""Import before torchvision: its compiled part does not load beside a CPU build of PyTorch.

Its Python part only wants two operators to exist; nothing that is measured calls them.
"""

import torch  # type: ignore[import-not-found,unused-ignore]

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
library = torch.library.Library("torchvision", "DEF")  # operators live as long as this
for _name in ("nms", "qnms"):
    library.define(_name + BOXES)
