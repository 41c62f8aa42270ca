"""Sparse Mixture-of-Experts models in JAX and Flax."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """`moejax.models` where `import moejax` is all that was imported; not before, since that takes a second."""
    if name == "models":
        return importlib.import_module("moejax.models")
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
