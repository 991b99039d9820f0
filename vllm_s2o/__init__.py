"""S2O sparse prefill attention, and the vLLM backend that serves it.

The public names are loaded when they are first used: vLLM imports this package in each of its
processes to find the plugin, and that must cost no CUDA context and no kernel.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_s2o.version import __version__

if TYPE_CHECKING:
    from vllm_s2o.attention import Stats, prefill_attention
    from vllm_s2o.config import ConfigError, S2OParams
    from vllm_s2o.metrics.figures import figures
    from vllm_s2o.metrics.switch import set_switch

__all__ = ["ConfigError", "S2OParams", "Stats", "__version__", "figures", "prefill_attention", "set_switch"]


class _Beside:
    """In a checkout, kernels/ and configs/ stand beside this package: they are found, the rest of it is not."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in ("vllm_s2o.kernels", "vllm_s2o.configs"):
            return None
        return PathFinder.find_spec(name, [str(Path(__file__).parents[1])])


# An installed wheel has them inside the package. The finder goes first: that of an editable install may lead to
# another checkout than the one that this package was imported from.
if not Path(__file__).with_name("kernels").is_dir():
    sys.meta_path.insert(0, _Beside)

_HOME = {
    "ConfigError": "vllm_s2o.config",
    "S2OParams": "vllm_s2o.config",
    "Stats": "vllm_s2o.attention",
    "figures": "vllm_s2o.metrics.figures",
    "set_switch": "vllm_s2o.metrics.switch",
    "prefill_attention": "vllm_s2o.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_s2o' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
