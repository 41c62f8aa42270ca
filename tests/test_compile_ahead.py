"""What compile_ahead reads out of a compiled program."""

import pytest

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
