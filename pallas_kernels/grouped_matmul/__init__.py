"""Products of expert-sorted rows with their experts' weights.

Letters: M rows, E groups (experts), K and N the widths in and out.

An implementation is a module of this package with `forward(lhs, rhs, group_sizes, metadata, transpose_rhs, out_dtype)`
and `drhs(lhs, grad, group_sizes, metadata, out_dtype)`, both accumulating in float32, and, where it has limits,
`why_not(lhs, rhs, transpose_rhs) -> str | None`: None when it runs these on this machine, forward and backward, else
one clause that says what it would need. (`lhs`, `rhs` may be shapes and dtypes alone.)
"""

import functools
import importlib
import logging
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.metadata import SPARE, GroupMetadata, check_metadata, group_metadata
from pallas_kernels.vary import vary_alike

__all__ = ["SPARE", "GroupMetadata", "group_metadata", "grouped_matmul", "named", "pick"]

IMPLEMENTATIONS = ("reference", "blocks", "xla", "mosaic_gpu", "mosaic_tpu")
# best first; the last one of each takes everything
_PREFERRED = {"cpu": ("blocks",), "gpu": ("mosaic_gpu", "blocks"), "tpu": ("mosaic_tpu", "xla")}
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool = False,
    preferred_element_type=None,
    metadata: GroupMetadata | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out[i] = lhs[i] @ rhs[group of row i], rows sorted by group.

    lhs (M, K) and rhs (E, K, N), or (E, N, K) with transpose_rhs: float32, bfloat16 or float16, both the same.
    group_sizes (E,) i32: how many rows each group has, in order; the sum may be less than M. Returns (M, N) in
    preferred_element_type (one of the three; default: lhs's dtype), summed in float32. Rows past the sum are never
    read, come out as zeros and take no part in a gradient; an empty group's weights get a gradient of exact zeros.
    metadata: `group_metadata(group_sizes, M)`, when several products share it; of other sizes it gives other results,
    and with tail=False rows past the sum are undefined.

    Differentiable in lhs and rhs, once and in reverse mode (no jvp, no gradient of a gradient). Gradients are products
    of the cotangent rounded to lhs's dtype, in which float16 has no numbers beyond 65504.

    implementation: one of `IMPLEMENTATIONS`, which runs or raises; None picks by platform and shape and logs its pick.
    Raises ValueError for shapes or dtypes that don't fit and for an unknown implementation, NotImplementedError where
    the named implementation can't take these operands or this machine.
    """
    lhs, rhs, group_sizes = (jnp.asarray(a) for a in (lhs, rhs, group_sizes))
    _check(lhs, rhs, group_sizes, transpose_rhs)
    out_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    if out_dtype not in _DTYPES:
        raise ValueError(f"grouped_matmul: preferred_element_type={out_dtype} must be float32, bfloat16 or float16")
    name = pick(lhs, rhs, transpose_rhs) if implementation is None else named(implementation, lhs, rhs, transpose_rhs)
    if 0 in (*lhs.shape, *rhs.shape):
        nothing = jnp.zeros((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]), out_dtype)
        return vary_alike(nothing, lhs, rhs)[0]
    if metadata is None:
        metadata = group_metadata(group_sizes, lhs.shape[0])
    check_metadata("grouped_matmul", metadata, group_sizes)
    return _product(name, transpose_rhs, out_dtype, *vary_alike(lhs, rhs, group_sizes, metadata))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(name, transpose_rhs, out_dtype, lhs, rhs, group_sizes, metadata):
    return _module(name).forward(lhs, rhs, group_sizes, metadata, transpose_rhs, out_dtype)


def _forward(name, transpose_rhs, out_dtype, lhs, rhs, group_sizes, metadata):
    out = _module(name).forward(lhs, rhs, group_sizes, metadata, transpose_rhs, out_dtype)
    return out, (lhs, rhs, group_sizes, metadata)


def _backward(name, transpose_rhs, out_dtype, residuals, grad):
    lhs, rhs, group_sizes, metadata = residuals
    grad = grad.astype(lhs.dtype)
    dlhs = _module(name).forward(grad, rhs, group_sizes, metadata, not transpose_rhs, lhs.dtype)
    rows = (grad, lhs) if transpose_rhs else (lhs, grad)
    return dlhs, _module(name).drhs(*rows, group_sizes, metadata, rhs.dtype), None, None


_product.defvjp(_forward, _backward)


def pick(lhs, rhs, transpose_rhs: bool = False) -> str:
    """The implementation that `implementation=None` takes for these operands (or their shapes) on this platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return _pick(
        device.platform,
        device.device_kind,
        jax.ShapeDtypeStruct(lhs.shape, lhs.dtype),
        jax.ShapeDtypeStruct(rhs.shape, rhs.dtype),
        transpose_rhs,
    )


@functools.cache
def _pick(platform, kind, lhs, rhs, transpose_rhs) -> str:
    del kind  # one chip of a platform takes what another does not
    *preferred, last = _PREFERRED.get(platform, ("blocks",))
    name = next((name for name in preferred if _why_not(name, lhs, rhs, transpose_rhs) is None), last)
    _log_once(f"grouped_matmul: {name} on {platform}")
    return name


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger("pallas_kernels").info(line)


def named(name, lhs, rhs, transpose_rhs: bool = False) -> str:
    """`name`, if it runs these operands (or their shapes) on this machine; else raises as `grouped_matmul`."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"grouped_matmul: unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    reason = _why_not(name, lhs, rhs, transpose_rhs)
    if reason is not None:
        other = pick(lhs, rhs, transpose_rhs)
        raise NotImplementedError(
            f"grouped_matmul: {name} can't take lhs {_show(lhs)} and rhs {_show(rhs)}: {reason}; "
            f"implementation={other!r} would"
        )
    return name


def _why_not(name, lhs, rhs, transpose_rhs) -> str | None:
    why_not = getattr(_module(name), "why_not", None)
    return why_not(lhs, rhs, transpose_rhs) if why_not else None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _check(lhs, rhs, group_sizes, transpose_rhs) -> None:
    shapes = f"lhs {_show(lhs)}, rhs {_show(rhs)}, group_sizes {_show(group_sizes)}, transpose_rhs={transpose_rhs}"
    if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(f"grouped_matmul: got {shapes}; lhs must be (M, K), rhs (E, K, N), group_sizes (E,)")
    if rhs.shape[0] != group_sizes.shape[0] or lhs.shape[1] != rhs.shape[2 if transpose_rhs else 1]:
        form = "(E, N, K)" if transpose_rhs else "(E, K, N)"
        raise ValueError(f"grouped_matmul: got {shapes}; with lhs (M, K), rhs must be {form} and group_sizes (E,)")
    if lhs.dtype != rhs.dtype or lhs.dtype not in _DTYPES:
        raise ValueError(f"grouped_matmul: got {shapes}; lhs and rhs must both be float32, bfloat16 or float16")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"grouped_matmul: got {shapes}; group_sizes must be int32")


def _show(array) -> str:
    return f"{array.dtype}{list(array.shape)}"
