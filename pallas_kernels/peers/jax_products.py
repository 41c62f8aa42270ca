"""Grouped products of other JAX libraries on this machine, for `pallas_kernels.benchmark`."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable


def present() -> dict[str, Callable]:
    """name -> function(lhs (M, K), rhs (E, K, N), sizes (E,)) -> (M, N), differentiable; {} where there is none."""
    return {"tokamax": _tokamax} if importlib.util.find_spec("tokamax") else {}


def _tokamax(lhs, rhs, sizes):
    for name in ("xprof", "xprof.cli", "xprof.cli.tools", "tensorboardX"):  # of its profiler alone
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].get_kernel_stats_tool = None  # type: ignore[attr-defined]
    import tokamax

    return tokamax.ragged_dot(lhs, rhs, sizes, implementation="mosaic_gpu")
