"""Python runs this file at the start of every process of a server, because its folder is on the server's PYTHONPATH.

It stands in for two packages that SGLang 0.5.23 imports on every machine and that only work with CUDA; README.md says
more. Where the real ones are there, nothing is done.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from plain_fp8 import PatchFp8


def stand_in_for_triton() -> None:
    """SGLang brings an importable imitation of triton for Apple machines; use it here too."""
    sglang = importlib.util.find_spec("sglang")
    if sglang is None or not sglang.submodule_search_locations or importlib.util.find_spec("triton") is not None:
        return
    path = Path(sglang.submodule_search_locations[0]) / "_platform_stubs.py"
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing: these stand-ins are for SGLang 0.5.23")
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    sys.meta_path.insert(0, stubs._TritonFinder())
    triton = stubs._make_mock("triton")
    triton.__version__ = "3.0.0"
    triton.cdiv, triton.next_power_of_2, triton.Config = stubs._cdiv, stubs._next_power_of_2, stubs._Config


class DeclareVisionOperators:
    """torchvision's library of operators does not load without CUDA, and importing it then fails where it looks for two
    of them. Declares those two, without an implementation, when torchvision is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", signature)
        return None  # the ordinary finders go on to find torchvision


stand_in_for_triton()
sys.meta_path.insert(0, DeclareVisionOperators())
sys.meta_path.insert(0, PatchFp8())
