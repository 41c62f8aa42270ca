"""What compile_ahead reads out of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moejax.collectives import collectives


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%a = f32[8,4]{1,0} all-reduce(%x), replica_groups={}", {("all-reduce", "f32[8,4]"): (1, 128)}),
        # A start holds operand and result: 2·4 and 8·4 elements of 2 bytes; the result counts, its done does not.
        (
            "%s = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x)\n%d = bf16[8,4]{1,0} all-gather-done(%s)",
            {("all-gather", "bf16[8,4]"): (1, 64)},
        ),
        (
            "%r = f32[2]{0} reduce-scatter(%x)\n%q = f32[2]{0} reduce-scatter(%y)",
            {("reduce-scatter", "f32[2]"): (2, 16)},
        ),
        ("%f = f32[2]{0} fusion(%all-reduce.1)", {}),
    ],
)
def test_collectives_and_their_bytes(line, found):
    assert collectives(line) == found


LOOPS = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

%below_two (p: (s32[], f32[8])) -> pred[] {
  %two = s32[]{:T(128)} constant(2)
  ROOT %less = pred[] compare(%i, %two), direction=LT
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]{0}) while(%p), condition=%below_two, body=%inner
  %g = f32[16]{0} all-gather(%x), dimensions={0}
}

%below (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%p), condition=%below, body=%outer, backend_config={"known_trip_count":{"n":"61"}}
  %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}
"""


def test_a_loop_counts_its_turns():
    """61 turns of a body that gathers 64 bytes and has two turns of an all-reduce of 32: 122 and the one after it."""
    assert collectives(LOOPS) == {("all-gather", "f32[16]"): (61, 61 * 64), ("all-reduce", "f32[8]"): (123, 123 * 32)}


def test_a_compiled_loop_in_a_loop_counts_both():
    """5 · 3 sums of 8 floats over the devices of an axis, and one of 2."""

    def local(x):
        def inner(x, _):
            return lax.pcast(jnp.tanh(lax.psum(x, "x")), "x", to="varying"), None

        x, _ = lax.scan(lambda x, _: lax.scan(inner, x, length=3), x, length=5)
        return lax.psum(x[:2], "x")

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P()))
    found = collectives(run.lower(jnp.ones(16)).compile().as_text())
    assert found == {("all-reduce", "f32[8]"): (15, 15 * 32), ("all-reduce", "f32[2]"): (1, 8)}
