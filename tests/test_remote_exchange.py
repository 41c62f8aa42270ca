"""Who sends which row where, as plain arithmetic; and the copies between devices, emulated."""

import functools
import re

import emulated_remote
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import remote_exchange
from pallas_kernels.grouped_matmul import SPARE
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.remote_exchange import mosaic_gpu


def test_rows_go_once_to_each_device_in_the_order_of_tokens():
    """Two devices of two experts (0, 1 | 2, 3) and three tokens each; 4 is no choice.

    Device 0's tokens choose 0 1 | 2 0 | 4 4, device 1's 3 2 | 1 3 | 0 4. To device 0 come tokens 0, 1, 4, 5 (of all),
    to device 1 tokens 1, 3, 4: with three rows each, token 5's one choice finds no room on device 0.
    """
    experts = jnp.array([[0, 1], [2, 0], [4, 4], [3, 2], [1, 3], [0, 4]], jnp.int32)
    first, second = (remote_exchange.routes(experts, jnp.int32(me), mine=2, devices=2, rows=3) for me in (0, 1))
    np.testing.assert_array_equal(first.places, [[0, 3], [1, 0], [3, 3]])
    np.testing.assert_array_equal(second.places, [[3, 1], [2, 2], [3, 3]])
    np.testing.assert_array_equal(first.source, [0, 1, 4])
    np.testing.assert_array_equal(second.source, [1, 3, 4])
    np.testing.assert_array_equal([first.starts, second.starts], [[0, 2, 3], [0, 1, 3]])
    assert (first.overflow, second.overflow) == (0, 1)
    fewer = remote_exchange.routes(experts, jnp.int32(1), mine=2, devices=2, rows=1)
    # token 3's both choices are on device 1, which token 1 has filled; so with 4's two and 5's one, all five are lost
    assert fewer.overflow == 5


@functools.lru_cache
def all_routes(devices: int, rows: int):
    """Routes of every device of `devices` with two experts each."""
    find = functools.partial(remote_exchange.routes, mine=2, devices=devices, rows=rows)
    return jax.jit(jax.vmap(find, in_axes=(None, 0)))


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_what_is_sent_is_what_comes(data):
    """For any choices: every wanted pair of token and device has its own place, in order and without gaps, and the
    device finds that token there; lost choices are those of the pairs that come after R others."""
    devices, rows = data.draw(st.sampled_from([(1, 4), (2, 3), (2, 10), (4, 5), (4, 20)]))
    tokens, E = 5, devices * 2
    choice = st.lists(st.integers(0, E), min_size=3, max_size=3)
    experts = np.array(data.draw(st.lists(choice, min_size=devices * tokens, max_size=devices * tokens)), np.int32)
    found = all_routes(devices, rows)(experts, np.arange(devices, dtype=np.int32))
    place, lost = np.full((devices * tokens, devices), rows), np.zeros(devices, int)
    for device in range(devices):
        came = 0
        for token, chosen in enumerate(experts):
            here = int(((chosen // 2) == device).sum())
            if not here:
                continue
            if came < rows:
                place[token, device] = came
                assert found.source[device, came] == token
                came += 1
            else:
                lost[token // tokens] += here
        assert (found.source[device, came:] >= devices * tokens).all()
        before = [(found.source[device] < s * tokens).sum() for s in range(devices + 1)]
        np.testing.assert_array_equal(found.starts[device], before)
        assert len(set(found.source[device].tolist())) == rows
    np.testing.assert_array_equal(found.places.reshape(-1, devices), place)
    np.testing.assert_array_equal(found.overflow, lost)


def over(devices: int, data: int = 1):
    """Runs a function of arrays split over the axis `expert` on that many devices, `data` times side by side."""
    types, all_of_them = (jax.sharding.AxisType.Auto,) * 2, jax.devices()[: data * devices]
    mesh = jax.make_mesh((data, devices), ("data", "expert"), types, devices=all_of_them)
    spec = jax.P(("data", "expert"))
    return lambda run: jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))


def test_sums_come_back_and_each_way_is_the_others_gradient(monkeypatch):
    """⟨send(x), y⟩ = ⟨x, collect(y)⟩ row by row, and both gradients are the other function."""
    emulated_remote.install(monkeypatch)
    rng = np.random.default_rng(0)
    T, D, R = 6, 4, 9
    experts = jnp.asarray(rng.integers(0, 9, (4 * T, 2)), jnp.int32)  # 8 is none
    x, y = (jnp.asarray(rng.normal(size=(4 * n, D)), jnp.float32) for n in (T, R))

    def run(x, y, experts):
        everyone = jax.lax.all_gather(experts, "expert", tiled=True)
        routes = remote_exchange.routes(everyone, jax.lax.axis_index("expert"), mine=2, devices=4, rows=R)
        real = (routes.source < everyone.shape[0])[:, None]
        send = functools.partial(remote_exchange.send, routes=routes, axis="expert")
        collect = functools.partial(remote_exchange.collect, routes=routes, axis="expert")
        came, send_back = jax.vjp(send, x)
        home, collect_back = jax.vjp(collect, y)
        back, again = send_back(jnp.where(real, y, jnp.nan))[0], collect_back(x)[0]
        return jnp.where(real, came, 0), home, back, jnp.where(real, again, 0), routes.source

    came, home, back, again, source = over(4)(run)(x, y, experts)
    for device in range(4):
        rows = slice(device * R, device * R + R)
        wanted = [x[s] if s < 4 * T else jnp.zeros(D) for s in source[rows].tolist()]
        np.testing.assert_array_equal(came[rows], wanted)
    sums = np.zeros((4 * T, D), np.float32)
    for row, s in enumerate(source.tolist()):
        if s < 4 * T:
            sums[s] += y[row]
    np.testing.assert_allclose(home, sums, atol=1e-6)
    np.testing.assert_array_equal(back, home)
    np.testing.assert_array_equal(again, came)


def operands(devices: int, tokens: int, width: int, rows: int, dtype, seed: int = 0):
    """x, y and everyone's choices of 2 of 2 experts a device, some none, split over the devices."""
    rng = np.random.default_rng(seed)
    experts = jnp.asarray(rng.integers(0, 2 * devices + 2, (devices * tokens, 2)), jnp.int32)
    x, y = (jnp.asarray(rng.normal(size=(devices * n, width)), dtype) for n in (tokens, rows))
    return x, y, experts


def there_and_back(x, y, experts, beside=0):
    """What comes, what of it is real, and sums at home."""
    devices, rows = jax.lax.axis_size("expert"), y.shape[0]
    everyone = jax.lax.all_gather(experts, "expert", tiled=True)
    routes = remote_exchange.routes(everyone, jax.lax.axis_index("expert"), mine=2, devices=devices, rows=rows)
    came = remote_exchange.send(x, routes, axis="expert", beside=beside)
    real = (routes.source < everyone.shape[0])[:, None]
    home = remote_exchange.collect(y, routes, axis="expert", beside=beside)
    # each row that comes to two places, the first half of them in the order of rows, the second in the other
    place = jnp.arange(rows, dtype=jnp.int32)
    slot = jnp.where(real, jnp.stack([place, 2 * rows - 1 - place], axis=1), 2 * rows)
    spread = remote_exchange.send_spread(x, routes, slot, axis="expert")[0]
    there, twice = (jnp.concatenate([a, a[::-1]]) for a in (real, y))
    sums = remote_exchange.combine_collect(jnp.where(there, twice, 0), routes, slot, axis="expert")
    return jnp.where(real, came, 0), real, home, jnp.where(there, spread, 0), sums


@pytest.mark.parametrize(("width", "dtype", "aside"), [(128, jnp.float32, 0), (384, jnp.bfloat16, 1)])
def test_pieces_of_rows_in_the_interpreter(width, dtype, aside, monkeypatch, capfd):
    """It knows no remote references and no semaphores: here the devices have one memory. A worker, of two or four,
    takes more pieces of rows than its ring has stages, three to a row of 384."""
    for limit, value in {"BLOCKS": 2, "_WORKERS": 2, "_STAGE": 512, "_PIECE": 256}.items():
        monkeypatch.setattr(mosaic_gpu, limit, value)
    monkeypatch.setattr(plgpu, "remote_ref", lambda ref, device: ref)
    for name in ("get_global", "semaphore_signal", "semaphore_wait"):
        monkeypatch.setattr(pl, name, lambda *_, **__: None)
    index = jax.lax.axis_index
    monkeypatch.setattr(jax.lax, "axis_size", lambda axis: 2)
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: jnp.int32(0) if axis == "expert" else index(axis))
    x, y, _ = operands(1, 5, width, 7, dtype)
    # rows 1, 3, 4 and 0 of two devices of 5 tokens, and three that are none
    source, starts = jnp.array([1, 3, 4, 5, 12, 13, 14], jnp.int32), jnp.array([0, 3, 4], jnp.int32)
    places = jnp.array([[0, 6], [7, 7], [2, 7], [7, 3], [1, 1]], jnp.int32)
    slot = jnp.array([[2, 14], [14, 14], [0, 5], [3, 1], [14, 14], [14, 14], [14, 14]], jnp.int32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        came = jax.block_until_ready(mosaic_gpu.send(x, source, starts, axis="expert", beside=aside))
        spread = jax.block_until_ready(mosaic_gpu.send(x, source, starts, slot, axis="expert", beside=aside))
        home = jax.block_until_ready(mosaic_gpu.collect(y, places, axis="expert", beside=aside))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    np.testing.assert_array_equal(came[:4], x[jnp.array([1, 3, 4, 0])])
    assert spread.shape == (14, width)
    np.testing.assert_array_equal(spread[jnp.array([2, 0, 5, 3, 1])], x[jnp.array([1, 4, 4, 0, 0])])
    y = np.asarray(y.astype(jnp.float32))
    wanted = jnp.asarray(np.stack([y[0] + y[6], 0 * y[0], y[2], y[3], y[1] + y[1]])).astype(dtype)
    np.testing.assert_array_equal(home, wanted)


def test_the_kernels_lower_and_use_no_multicast(monkeypatch):
    monkeypatch.setattr(products, "_hopper", lambda: True)
    x, y, experts = operands(4, 64, 256, 128, jnp.bfloat16)
    text = over(4)(there_and_back).trace(x, y, experts).lower(lowering_platforms=("cuda",)).as_text()
    assert "send_rows" in text and "collect_rows" in text
    assert text.count("uses_xla_collective_metadata = true") == 4  # peers' addresses, from the runtime
    # what Mosaic asks of the runtime for an address of all devices, and the instructions that take one
    assert not re.search("symmetric_memory_parameters|multi(mem|cast)", text)


def test_beside_products_they_lower_for_a_stream_of_their_own(monkeypatch):
    """Forward and backward, each way by a call that XLA may not take apart; on two times four devices."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    x, y, experts = operands(8, 64, 256, 128, jnp.bfloat16)

    def run(x, y, experts):
        return jax.vjp(lambda x, y: there_and_back(x, y, experts, beside=SPARE)[:3:2], x, y)[1]((y, x))

    text = over(4, data=2)(run).trace(x, y, experts).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'call @compute_on.*_xla_stream_annotation = "1", inlineable = "false"', text)
    assert len(calls) == text.count("uses_xla_collective_metadata = true") == 2
    assert not re.search("symmetric_memory_parameters|multi(mem|cast)", text)


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu' or len(jax.devices()) < 2")
@pytest.mark.parametrize(
    ("tokens", "width", "rows", "data"), [(500, 128, 900, 1), (300, 2048, 100, 1), (1, 7168, 4, 1), (300, 2048, 100, 2)]
)
def test_on_the_gpus_of_a_host(tokens, width, rows, data, monkeypatch):
    """Bit for bit what the collectives bring, three times."""
    devices = len(jax.devices()) // data
    if devices == 1:
        pytest.skip("two times two GPUs are needed")
    run = over(devices, data)
    parts = [operands(devices, tokens, width, rows, jnp.bfloat16, seed) for seed in range(data)]
    args = [jnp.concatenate(each) for each in zip(*parts, strict=True)]
    got = run(there_and_back)(*args)
    for _ in range(2):
        again = run(there_and_back)(*args)
        assert all((a == b).all() for a, b in zip(got, again, strict=True))
    aside = run(functools.partial(there_and_back, beside=SPARE))(*args)
    assert all((a == b).all() for a, b in zip(got, aside, strict=True))
    emulated_remote.install(monkeypatch)
    wanted = run(there_and_back)(*args)
    assert all((a == b).all() for a, b in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu'")
def test_on_one_gpu_rows_are_exchanged_with_itself(monkeypatch):
    """By references that aren't remote; on a stream of their own too, by blocks of several warpgroups."""
    args = operands(1, 300, 2048, 400, jnp.bfloat16)
    got = [over(1)(functools.partial(there_and_back, beside=beside))(*args) for beside in (0, SPARE)]
    emulated_remote.install(monkeypatch)
    wanted = over(1)(there_and_back)(*args)
    for each in got:
        assert all((a == b).all() for a, b in zip(each, wanted, strict=True))


def test_off_gpu_it_says_so():
    x = jnp.ones((8, 128), jnp.float32)

    def routes(tokens, devices, rows):
        places, source, starts = (jnp.zeros(shape, jnp.int32) for shape in ((tokens, devices), rows, devices + 1))
        return remote_exchange.Routes(places, source, starts, jnp.int32(0))

    def send(*sizes):
        over(4)(lambda x: remote_exchange.send(x, routes(*sizes), axis="expert"))(x)

    with pytest.raises(NotImplementedError, match=r"float32\[2, 128\] by remote references: it needs Hopper GPUs"):
        send(2, 4, 6)
    with pytest.raises(ValueError, match=r"places \(T, 4\) along axis 'expert'; got \[2, 128\] and \[2, 3\]"):
        send(2, 3, 6)
    with pytest.raises(ValueError, match="2 tokens and places 1"):
        send(1, 4, 6)

    def spread(function, slot, **sizes):
        over(4)(lambda x: function(x, routes(**sizes), jnp.zeros(slot, jnp.int32), axis="expert"))(x)

    with pytest.raises(ValueError, match="send_spread: x has 2 tokens and places 1"):
        spread(remote_exchange.send_spread, (6, 3), tokens=1, devices=4, rows=6)
    with pytest.raises(ValueError, match="send_spread: slot has 5 rows and source 6"):
        spread(remote_exchange.send_spread, (5, 3), tokens=2, devices=4, rows=6)
    with pytest.raises(ValueError, match="combine_collect: 2 rows and 18 places in slot"):
        spread(remote_exchange.combine_collect, (6, 3), tokens=2, devices=4, rows=6)
    with pytest.raises(ValueError, match="2 rows and source 6"):
        over(4)(lambda x: remote_exchange.collect(x, routes(2, 4, 6), axis="expert"))(x)
    assert remote_exchange.why_not(jax.ShapeDtypeStruct((4, 128), jnp.int32)) == "it needs bfloat16, float16 or float32"
    width = remote_exchange.why_not(jax.ShapeDtypeStruct((4, 130), jnp.bfloat16))
    assert width == "it needs rows, and a width in multiples of 128"
