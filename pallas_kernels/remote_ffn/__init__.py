"""The gated feed-forward of experts that are on several GPUs of one host, with products beside the exchange of rows.

A device's rows are in two parts, its own tokens' and those that come from other devices. While those are on the link,
own rows are computed, by products that leave the exchange the multiprocessors it needs:

    forward    link      others come   .                 others' go home   .
               products  gate, up      gate, up, down    down              .
               of        own           others            own

    backward   link      others' gradients come          .                      the tokens' gradient goes home
               products  down, dlhs                      down, dlhs             gradients of gate and up
               of        own                             others, ddown of both  both

Letters: T tokens of a device, D and F the widths outside and inside, E experts of a device, K experts per token, S
devices; R tokens that can come of a part, and M rows that it has room for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import gated_ffn
from pallas_kernels.combine import combine
from pallas_kernels.gated_ffn import mosaic_gpu as kernels
from pallas_kernels.grouped_matmul import SPARE, GroupMetadata, named
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.remote_exchange import Routes, check_tokens, run_collect, run_send
from pallas_kernels.vary import vary_alike

__all__ = ["COMPILER_OPTIONS", "Part", "remote_ffn"]

# For `jax.jit` of a program with this: no CUDA graphs, in which products wait for the exchange that they were to run
# beside. (XLA's mode "CONCURRENT" is as fast, but half as much memory again is needed for a step of OLMoE.)
COMPILER_OPTIONS = {"xla_gpu_graph_min_graph_size": 1_000_000}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens that come from some of the devices, and where their rows stand, sorted by expert.

    routes: of R tokens (`remote_exchange.split`). slot (R, K) i32: the row of each of their choices, M or more where it
    has none. metadata: `group_metadata` of M rows, without a tail. rows: M.
    """

    routes: Routes
    slot: jax.Array
    metadata: GroupMetadata
    rows: int = dataclasses.field(metadata={"static": True})


def remote_ffn(x, gate, up, down, gates, parts, *, axis: str, activation: str = "silu") -> jax.Array:
    """x (T, D) -> (T, D): each token's experts' results, (activation(x · gate) ∘ (x · up)) · down, times their gates.

    gate, up (E, D, F) and down (E, F, D) of x's dtype: this device's experts, of S·E along mesh axis `axis`. parts: one
    Part of all devices, or the device's own and the others' (`remote_exchange.routes` with parts (1, S − 1)). gates, of
    each part: (R, K) f32, which multiply what goes into `down`.
    A device's results for a token are summed in float32 and rounded to x's dtype, then those of all devices; gradients
    likewise. Called inside a shard_map over the axis. Differentiable in x, weights and gates, in reverse mode, once.
    Products and rows that came have the checkpoint name "experts", for `jax.checkpoint` to keep. Under `jax.jit` give
    `compiler_options=COMPILER_OPTIONS`, without which nothing may run beside the link.

    Raises ValueError where parts and gates don't fit each other or x, NotImplementedError where the kernels can't take
    these: as `gated_ffn` with "mosaic_gpu", and `remote_exchange.send`.
    """
    gated_ffn.check(x, gate, up, down, parts[0].metadata.ends, activation)
    named("mosaic_gpu", x, gate)
    shapes = [gates.shape for gates in gates], [part.slot.shape for part in parts]
    if shapes[0] != shapes[1] or any(part.routes.source.shape != part.slot.shape[:1] for part in parts):
        raise ValueError(
            f"remote_ffn: gates and slot must be (R, K) of each part's routes; got {shapes[0]} and {shapes[1]}"
        )
    for part in parts:
        check_tokens("remote_ffn", x, part.routes, axis)
    y = _mixture(axis, activation, *vary_alike(x, (gate, up, down), tuple(gates), tuple(parts)))
    return checkpoint_name(y, "experts")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture(axis, activation, x, weights, gates, parts):
    return _run(axis, activation, False, x, weights, gates, parts)[0]


def _forward(axis, activation, x, weights, gates, parts):
    y, kept = _run(axis, activation, True, x, weights, gates, parts)
    return y, (weights, parts, kept)


def _run(axis, activation, keep, x, weights, gates, parts):
    """The result and, of each part, its rows, the products with gate and up if kept, and the gate of every row."""
    gate, up, down = weights
    scales = [_by_row(g, part) for g, part in zip(gates, parts, strict=True)]

    def up_and_gate(i, rows, spare):
        return kernels.hidden(activation, rows, gate, up, _leaving(spare, parts[i]), keep=keep, scale=scales[i])

    came = _as_they_come(axis, x, parts, up_and_gate)
    hidden = [made[0] for _, made in came]
    home = None
    for i in reversed(range(len(parts))):
        spare = SPARE if home is not None else 0
        with jax.named_scope("experts"):
            out = products.forward(hidden[i], down, None, _leaving(spare, parts[i]), False, x.dtype)
        with jax.named_scope("combine"):
            sums = combine(out, parts[i].slot, None)
        if home is not None:
            home, sums = lax.optimization_barrier((home, sums))
        if i:  # in this order: what runs beside the link begins after it
            sums, hidden[0] = lax.optimization_barrier((sums, hidden[0]))
        home = _collect(axis, SPARE if i else 0, [(sums, parts[i].routes)], home, jnp.float32 if i else x.dtype)
    kept = [(rows, *made[1:], scale) for (rows, made), scale in zip(came, scales, strict=True)]
    return home, [[checkpoint_name(a, "experts") for a in part] for part in kept]


def _backward(axis, activation, residuals, grad):
    (gate, up, down), parts, kept = residuals

    def through_down(i, rows, spare):
        """Of part i: what went into down, and the gradients of the products with gate and up and of each row's gate."""
        (_, a, b, scale), metadata = kept[i], _leaving(spare, parts[i])
        dhidden = products.forward(rows, down, None, metadata, True, grad.dtype)
        return gated_ffn.activation_gradients(activation, a, b, scale, dhidden, metadata)

    def of_tokens(i, da, db, spare=0):
        drows = kernels.dlhs((da, db), (gate, up), _leaving(spare, parts[i]))
        with jax.named_scope("dispatch"):
            return combine(drows, parts[i].slot, None)

    def all_beside(i, rows, spare):
        hidden, da, db, dscale = through_down(i, rows, spare)
        return (hidden, da, db, dscale), of_tokens(i, da, db, spare) if spare else None

    came = _as_they_come(axis, grad, parts, all_beside)
    hidden, *grads, dscales = zip(*(made for _, (made, _) in came), strict=True)
    ddown = _weight_gradient(hidden, [rows for rows, _ in came], parts)
    # a kernel that leaves no room would wait for the end of what has the tokens' gradient
    ddown, grads, dscales = lax.optimization_barrier((ddown, grads, dscales))
    da, db = grads
    with jax.named_scope("experts"):
        last = of_tokens(len(parts) - 1, da[-1], db[-1])
    sums = [*(of_own for _, (_, of_own) in came[:-1]), last]
    rows = [part[0] for part in kept]
    sums, rows, grads = lax.optimization_barrier((sums, rows, grads))
    aside = _aside(axis)
    dx = _collect(axis, aside, [(each, part.routes) for each, part in zip(sums, parts, strict=True)], None, grad.dtype)
    dgate, dup = (_weight_gradient(rows, each, parts, aside) for each in grads)
    # all there before one is used: XLA would put those of weights off until the optimizer wants them, and nothing would
    # run beside the link
    dx, dweights = lax.optimization_barrier((dx, (dgate, dup, ddown)))
    dgates = tuple(d.at[part.slot].get(mode="fill", fill_value=0) for d, part in zip(dscales, parts, strict=True))
    return dx, dweights, dgates, None


_mixture.defvjp(_forward, _backward)


def _as_they_come(axis, x, parts, work):
    """[(rows, work(i, rows, multiprocessors to leave))] of every part i, the first of two worked on while the other's
    rows come."""
    rows, *coming = [_send(axis, SPARE if i else 0, x, part) for i, part in enumerate(parts)]
    with jax.named_scope("experts"):
        made = work(0, rows, SPARE if coming else 0)
        if not coming:
            return [(rows, made)]
        made, others = lax.optimization_barrier((made, coming[0]))
        return [(rows, made), (others, work(1, others, 0))]


def _send(axis, beside, x, part):
    with jax.named_scope("exchange"):
        return run_send(axis, beside, x, part.routes, part.slot, part.rows)


def _collect(axis, beside, sums, more, dtype):
    with jax.named_scope("exchange"):
        return run_collect(axis, beside, sums, more, dtype)


def _weight_gradient(lhs, grad, parts, spare=0):
    with jax.named_scope("experts"):
        metadata = [_leaving(spare, part) for part in parts]
        return products.drhs_of(list(zip(lhs, grad, metadata, strict=True)), lhs[0].dtype)


def _leaving(spare: int, part: Part) -> GroupMetadata:
    return dataclasses.replace(part.metadata, spare=spare)


def _by_row(gates, part):
    """(R, K) in the order of rows, (M,); zeros where no row comes."""
    empty = vary_alike(jnp.zeros((part.rows,), jnp.float32), gates)[0]
    return empty.at[part.slot.reshape(-1)].set(gates.reshape(-1), mode="drop", unique_indices=True)


def _aside(axis) -> int:
    """Multiprocessors for the tokens' gradient's way home beside two products: the more devices, the more it has."""
    return min(4 * lax.axis_size(axis), 32)
