"""The MoE layer's middle part where experts are on several devices: rows go there, are computed and come back.

A device's tokens are taken in chunks, each planned, sent, computed and fetched by itself, so that what the one sends
and another fetches crosses the link while the experts work on a third. A way of exchange (`WAYS`) is a class of five
functions, called in this order inside `expert_parallel`'s shard_map.

Letters: T tokens of a chunk, D model width, E experts, K experts per token, S devices on the expert axis.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moejax import dispatch, exchange, experts, ragged
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.routing import Routing
from moejax.work import Work, sorted_mixture
from pallas_kernels import remote_exchange
from pallas_kernels.grouped_matmul import SPARE, group_metadata
from pallas_kernels.remote_ffn import Part, remote_ffn

_APART = 3  # devices on the expert axis, from which on a device's own rows are a part of their own


def mixture(x, decision, weights, *, num_experts: int, work: Work, way: str, factor: float | None, chunks: int):
    """x (B, L, D), a decision with leading axis B and weights of E/S experts, of one device -> (y (B, L, D), overflow).

    overflow (1,) i32: choices without room; None for gather. UserError where the tokens don't divide by `chunks`, and
    where `factor` leaves a chunk less than one row.
    """
    beside = SPARE if chunks > 1 else 0
    # room for more rows than come, as a rule, and nobody reads the rest
    work = dataclasses.replace(work, spare=beside, tail=False)
    tokens = x.reshape(-1, x.shape[-1])
    if way == "remote" and not beside and work.gates_inside(tokens, weights):
        y, lost = by_parts(tokens, decision, weights, num_experts, factor)
        return y.reshape(x.shape), lost[None]
    run = WAYS[way](weights, num_experts, work, factor, beside)
    results = pipelined(run, split(x, decision, chunks))
    y = jnp.concatenate([y.reshape(-1, x.shape[-1]) for y, _ in results]).reshape(x.shape)
    lost = [lost for _, lost in results if lost is not None]
    return y, jnp.sum(jnp.stack(lost), dtype=jnp.int32, keepdims=True) if lost else None


def by_parts(x, decision, weights, num_experts: int, factor: float | None):
    """`Remote`, with products beside the exchange: x (T, D), a decision with leading axis B -> (y (T, D), overflow ()).

    Of _APART devices and more each has its own tokens' rows as a part of their own. Of two that gains nothing: what an
    exchange takes less, products take more (experiments/LOG.md).
    """
    flat = dispatch.flatten(decision, x.shape[0])
    T, K = flat.experts.shape
    mine = weights["gate"].shape[0]
    devices = num_experts // mine
    room = exchange.rows_received(factor, T, K, mine, devices)
    parts = (1, devices - 1) if devices >= _APART else (devices,)
    with jax.named_scope("dispatch"):
        routes, came, lost = exchange.routes(flat, mine, devices, factor, parts)
        # one plan for both parts: the second has the experts anew
        second = (jnp.arange(devices * T, dtype=jnp.int32) >= parts[0] * T)[:, None]
        chosen = dataclasses.replace(came, experts=came.experts + jnp.where(came.keep & second, mine, 0))
        plan = dispatch.plan(chosen, len(parts) * mine)
    assert plan.slot is not None, "tokens choose"
    found, gates, token, before = [], [], 0, jnp.int32(0)
    of_part = zip(remote_exchange.split(routes, parts), jnp.split(plan.group_sizes, len(parts)), strict=True)
    for its_routes, sizes in of_part:
        tokens = slice(token, token + its_routes.source.shape[0])
        rows = min(room, its_routes.source.shape[0] * min(K, mine))
        metadata = group_metadata(sizes, rows, tail=False)
        metadata = jax.tree.map(lambda a: checkpoint_name(a, "routing"), metadata)
        found.append(Part(its_routes, plan.slot[tokens] - before, metadata, rows))
        gates.append(came.weights[tokens])
        token, before = tokens.stop, jnp.sum(sizes)
    gate, up, down = (weights[name] for name in ("gate", "up", "down"))
    experts.check(x, gate, up, down, plan.group_sizes[:mine], "silu")
    y = remote_ffn(x, gate, up, down, gates, found, axis=exchange.AXIS)
    return y, lost


def check(moe: MoEConfig, devices: int, x, decision) -> None:
    """UserError ahead of `mixture`'s, for x (B, L, D) of one of so many devices and a decision, both shapes alone;
    and where the exchange doesn't run on this platform."""
    B, L, _ = x.shape
    token_choice = isinstance(decision, Routing)
    check_chunks(moe.exchange_chunks, B, L, token_choice)
    way = exchange.pick(moe.exchange, token_choice, x)
    if way != "gather" and not token_choice:
        raise UserError(f"config.model.moe.exchange={way!r} can't move rows of expert choice: give 'gather'")
    tokens, mine = B * L // moe.exchange_chunks, moe.num_experts // devices
    if way == "all_to_all":
        exchange.rows_per_pair(moe.exchange_factor, tokens, decision.experts.shape[-1], mine, devices)
    if way in ("ragged", "remote"):
        exchange.rows_received(moe.exchange_factor, tokens, decision.experts.shape[-1], mine, devices)
    if way == "ragged":
        ragged.check_platform()
    if way == "remote":
        exchange.check_remote(x)


def check_chunks(chunks: int, rows: int, length: int, token_choice: bool = True) -> None:
    """UserError unless a device's rows of the batch, of `length` tokens each, divide into `chunks` equal parts.

    Where experts choose, inside a row, the parts are of whole rows.
    """
    if token_choice and rows * length % chunks:
        raise UserError(
            f"config.model.moe.exchange_chunks={chunks} does not divide the {rows} rows of {length} tokens that a "
            f"device has at a time: make it a divisor of {rows * length}"
        )
    if not token_choice and rows % chunks:
        raise UserError(
            f"config.model.moe.exchange_chunks={chunks} does not divide the {rows} rows that a device has at a time, "
            "which stay whole in expert choice: make it a divisor of them"
        )


def split(x, decision, chunks: int) -> list[tuple[jax.Array, Any]]:
    """Equal parts of x (B, L, D) and of a decision with leading axis B, in order: of the B·L tokens, or of the B rows
    where experts choose tokens inside a row. A part is again (rows, tokens, D)."""
    if chunks == 1:
        return [(x, decision)]
    B, L, _ = x.shape
    token_choice = isinstance(decision, Routing)
    check_chunks(chunks, B, L, token_choice)
    if token_choice:
        x, decision = jax.tree.map(lambda a: a.reshape(chunks, 1, B * L // chunks, *a.shape[2:]), (x, decision))
    else:
        x, decision = jax.tree.map(lambda a: a.reshape(chunks, B // chunks, *a.shape[1:]), (x, decision))
    return [jax.tree.map(operator.itemgetter(i), (x, decision)) for i in range(chunks)]


def pipelined(way: "Way", parts: list) -> list[tuple[jax.Array, jax.Array | None]]:
    """(y, overflow) of every part (x, decision).

    While the experts work on part i, part i + 1 comes and what is done of part i − 1 goes home: neither needs anything
    of i. After each such stage all of it must be there before the next begins, which XLA has to be told: it would send
    all parts at once, with nothing to run beside and room for all of them, and fetch all at the end.
    """
    planned = [way.plan(*part) for part in parts]
    came: list = [way.send(*plan) for plan in planned[:2]]
    home: list = []
    for i, (_, state) in enumerate(planned):
        done = way.work(came[i], state)
        following = [out for out, _ in planned[i + 2 : i + 3]]
        if len(parts) > 1:
            stage = done, came[i + 1 :], home[-1:], following
            done, came[i + 1 :], home[-1:], following = way.all_there(stage)
        came += [way.send(out, planned[i + 2][1]) for out in following]
        home.append(way.fetch(done, state))
    return [way.finish(rows, state) for rows, (_, state) in zip(home, planned, strict=True)]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of exchange, with what all its chunks share; beside: multiprocessors that it has beside the experts."""

    weights: dict[str, jax.Array]
    num_experts: int
    apply: Work
    factor: float | None = None
    beside: int = 0

    @property
    def mine(self) -> int:
        """How many experts a device holds."""
        return self.weights["gate"].shape[0]

    @property
    def devices(self) -> int:
        return self.num_experts // self.mine

    def plan(self, x, decision) -> tuple[jax.Array, Any]:
        """What leaves the device of x (N, T/N, D), and what stays to be known; counts and choices travel here."""
        raise NotImplementedError

    def send(self, out, state):
        """What comes to this device for its experts."""
        raise NotImplementedError

    def work(self, came, state):
        """What experts make of it."""
        raise NotImplementedError

    def fetch(self, done, state):
        """What other devices made of what left this one."""
        raise NotImplementedError

    def finish(self, home, state) -> tuple[jax.Array, jax.Array | None]:
        """(y (T, D), choices of this device without room () i32)."""
        raise NotImplementedError

    def all_there(self, values):
        """The same, none of it to be used before all is computed."""
        return lax.optimization_barrier(values)


class Gather(Way):
    """All tokens of the expert axis on every one of its devices, which runs those that chose its experts.

    Dropless: the plan has room for every row of every device. Sums over experts are taken in float32, across devices
    too.
    """

    def plan(self, x, decision):
        tokens = x.shape[0] * x.shape[1]
        with jax.named_scope("dispatch"):
            flat = dispatch.flatten(exchange.gather(decision), self.devices * tokens)
            return x, (exchange.of_my_experts(flat, self.mine), x.dtype)

    def send(self, out, state):
        return exchange.gather(out)

    def work(self, came, state):
        tokens = came.reshape(-1, came.shape[-1])
        return sorted_mixture(tokens, state[0], self.weights, self.mine, self.apply, jnp.float32)

    def fetch(self, done, state):
        return exchange.sum_back(done).astype(state[1])

    def finish(self, home, state):
        return home, None


class AllToAll(Way):
    """Rows go to their experts' devices and come back; gates are applied at home, where the sum is in float32."""

    def plan(self, x, decision):
        tokens = x.reshape(-1, x.shape[-1])
        flat = dispatch.flatten(decision, tokens.shape[0])
        T, K = flat.experts.shape
        room = exchange.rows_per_pair(self.factor, T, K, self.mine, self.devices)
        with jax.named_scope("dispatch"):
            parcels = exchange.pack(flat, self.mine, self.devices, room)
            out = dispatch.gather(tokens, parcels.plan)
        here = exchange.arrived(exchange.swap(parcels.expert), self.mine)
        return out, (parcels, here, T)

    def send(self, out, state):
        return exchange.swap(out)

    def work(self, came, state):
        return sorted_mixture(came, state[1], self.weights, self.mine, self.apply, came.dtype)

    def fetch(self, done, state):
        return exchange.swap(done)

    def finish(self, home, state):
        parcels, _, tokens = state
        with jax.named_scope("combine"):
            return dispatch.combine(home, parcels.plan, tokens), parcels.overflow


class Remote(Way):
    """Each token goes once to every device with experts for it, where its rows are summed with their gates in float32;
    the sums come back in x's dtype and are summed in float32 at home. `by_parts` does the same with kernels alone.
    """

    def plan(self, x, decision):
        tokens = x.reshape(-1, x.shape[-1])
        flat = dispatch.flatten(decision, tokens.shape[0])
        with jax.named_scope("dispatch"):
            return tokens, exchange.routes(flat, self.mine, self.devices, self.factor)

    def send(self, out, state):
        with jax.named_scope("exchange"):
            return remote_exchange.send(out, state[0], axis=exchange.AXIS, beside=self.beside)

    def work(self, came, state):
        return sorted_mixture(came, state[1], self.weights, self.mine, self.apply, came.dtype)

    def fetch(self, done, state):
        with jax.named_scope("exchange"):
            return remote_exchange.collect(done, state[0], axis=exchange.AXIS, beside=self.beside)

    def finish(self, home, state):
        return home, state[2]


class Ragged(Way):
    """Rows sorted by expert go straight to their places on the experts' devices, and results back; gates are applied at
    home."""

    def plan(self, x, decision):
        tokens = x.reshape(-1, x.shape[-1])
        flat = dispatch.flatten(decision, tokens.shape[0])
        T, K = flat.experts.shape
        room = exchange.rows_received(self.factor, T, K, self.mine, self.devices)
        with jax.named_scope("dispatch"):
            plan = dispatch.plan(flat, self.num_experts)
            out = dispatch.gather(tokens, plan)
        with jax.named_scope("exchange"):
            counts = lax.all_gather(plan.group_sizes, exchange.AXIS)
            places = ragged.places(counts, lax.axis_index(exchange.AXIS), room)
        return out, (plan, places, room, T)

    def send(self, out, state):
        _, places, room, _ = state
        with jax.named_scope("exchange"):
            return ragged.send(out, places, room, exchange.AXIS)

    def work(self, came, state):
        return self.apply.experts(came, self.weights, state[1].group_sizes)

    def fetch(self, done, state):
        plan, places, _, _ = state
        with jax.named_scope("exchange"):
            return ragged.fetch(done, places, plan.token.shape[0], exchange.AXIS)

    def finish(self, home, state):
        plan, places, _, tokens = state
        with jax.named_scope("combine"):
            return dispatch.combine(home, plan, tokens), places.overflow


WAYS = {"gather": Gather, "all_to_all": AllToAll, "remote": Remote, "ragged": Ragged}
