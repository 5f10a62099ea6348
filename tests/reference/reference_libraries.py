"""timm and torchvision beside the CPU build of torch, for which torchvision's compiled operators do not load.

No operator of it is used; but `import torchvision` wants their signatures, so they are declared first.
"""

from __future__ import annotations

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
try:
    import torchvision
except RuntimeError:
    import sys

    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # what the failed import left behind
    _library = torch.library.Library("torchvision", "DEF")
    _library.define(f"nms{_NMS}")
    _library.define(f"qnms{_NMS}")
    import torchvision

import timm

__all__ = ["timm", "torchvision"]
