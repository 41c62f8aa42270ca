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


def test_rows_go_once_to_each_device_its_own_tokens_first():
    """Two devices of two experts (0, 1 | 2, 3) and three tokens each; 4 is no choice.

    Device 0's tokens choose 0 1 | 2 0 | 4 4, device 1's 3 2 | 1 3 | 0 4. To device 0 come tokens 0, 1, 4, 5 (of all),
    to device 1 tokens 3, 4, 1; six are room for all.
    """
    experts = jnp.array([[0, 1], [2, 0], [4, 4], [3, 2], [1, 3], [0, 4]], jnp.int32)
    find = functools.partial(remote_exchange.routes, experts, mine=2, devices=2)
    first, second = (find(jnp.int32(me)) for me in (0, 1))
    np.testing.assert_array_equal(first.places, [[0, 6], [1, 2], [6, 6]])  # on itself, on the other
    np.testing.assert_array_equal(second.places, [[0, 6], [1, 2], [6, 3]])
    np.testing.assert_array_equal(first.source, [0, 1, 4, 5, 10, 11])
    np.testing.assert_array_equal(second.source, [3, 4, 1, 9, 10, 11])
    np.testing.assert_array_equal([first.starts, first.stops], [[0, 2], [2, 4]])
    np.testing.assert_array_equal([second.starts, second.stops], [[0, 2], [2, 3]])
    # in two parts of three tokens each
    own, other = remote_exchange.split(find(jnp.int32(0), parts=(1, 1)), (1, 1))
    np.testing.assert_array_equal(own.places, [[0], [1], [6]])
    np.testing.assert_array_equal(other.places, [[3], [0], [3]])
    np.testing.assert_array_equal(own.source, [0, 1, 8])
    np.testing.assert_array_equal(other.source, [4, 5, 11])
    assert (own.starts, own.stops, own.first) == (0, 2, 0)
    assert (other.starts, other.stops, other.first) == (0, 2, 1)


def test_choices_past_a_devices_room_are_none():
    """The choices of the case above. Device 0 gets 0 1 0 | 1 0, device 1 3 2 3 | 2: with room for three each, device
    1's last two to device 0 find none, and device 0's to device 1."""
    experts = jnp.array([[0, 1], [2, 0], [4, 4], [3, 2], [1, 3], [0, 4]], jnp.int32)
    found, lost = remote_exchange.within(experts, mine=2, devices=2, rows=3)
    np.testing.assert_array_equal(found, [[0, 1], [4, 0], [4, 4], [3, 2], [4, 3], [4, 4]])
    np.testing.assert_array_equal(lost, [1, 2])
    found, lost = remote_exchange.within(experts, mine=2, devices=2, rows=1)
    np.testing.assert_array_equal(found, [[0, 4], [4, 4], [4, 4], [3, 4], [4, 4], [4, 4]])
    np.testing.assert_array_equal(lost, [3, 4])


@functools.lru_cache
def all_routes(devices: int, rows: int, parts: tuple[int, ...]):
    """Choices that find room, how many don't, and the routes of every device of `devices` with two experts each."""

    def run(experts):
        there, lost = remote_exchange.within(experts, mine=2, devices=devices, rows=rows)
        find = functools.partial(remote_exchange.routes, there, mine=2, devices=devices, parts=parts)
        return there, lost, jax.vmap(find)(jnp.arange(devices, dtype=jnp.int32))

    return jax.jit(run)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_what_is_sent_is_what_comes(data):
    """For any choices: a device keeps as many as it has room for, nearest devices' first; every wanted pair of token
    and device has its own place, in the same order and without gaps in each part, where the device finds the token."""
    cases = [(1, 4, ()), (2, 3, ()), (2, 10, (1, 1)), (4, 5, ()), (4, 8, (1, 3)), (4, 60, (2, 2))]
    devices, room, parts = data.draw(st.sampled_from(cases))
    tokens, E = 5, devices * 2
    rows, begins = devices * tokens, {sum(parts[:p]): tokens * sum(parts[:p]) for p in range(len(parts))} or {0: 0}
    choice = st.lists(st.integers(0, E), min_size=3, max_size=3)
    experts = np.array(data.draw(st.lists(choice, min_size=rows, max_size=rows)), np.int32)
    there, lost, found = all_routes(devices, room, parts)(experts)
    place, missed = np.full((devices, tokens, devices), rows), np.zeros(devices, int)
    for device in range(devices):
        come, free, row = [], room, 0
        for j in range(devices):
            owner = (device + j) % devices
            row = begins.get(j, row)
            assert found.starts[device, j] == row
            for token in range(tokens):
                (chosen,) = np.nonzero(experts[owner * tokens + token] // 2 == device)
                kept, left = chosen[:free], chosen[free:]
                free -= len(kept)
                missed[owner] += len(left)
                now, before = (choices[owner * tokens + token] for choices in (there, experts))
                assert (now[left] == E).all() and (now[kept] == before[kept]).all()
                if len(kept):
                    place[owner, token, j] = row
                    assert found.source[device, row] == owner * tokens + token
                    come.append(row)
                    row += 1
            assert found.stops[device, j] == row
        rest = np.delete(found.source[device], come)
        assert (rest >= rows).all()
        assert len(set(found.source[device].tolist())) == rows
    np.testing.assert_array_equal(found.places, place)
    np.testing.assert_array_equal(lost, missed)


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
    T, D, R = 6, 4, 4 * 6
    experts = jnp.asarray(rng.integers(0, 9, (4 * T, 2)), jnp.int32)  # 8 is none
    x, y = (jnp.asarray(rng.normal(size=(4 * n, D)), jnp.float32) for n in (T, R))

    def run(x, y, experts):
        everyone = jax.lax.all_gather(experts, "expert", tiled=True)
        routes = remote_exchange.routes(everyone, jax.lax.axis_index("expert"), mine=2, devices=4)
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


def operands(devices: int, tokens: int, width: int, dtype, seed: int = 0):
    """x, y and everyone's choices of 2 of 2 experts a device, some none, split over the devices."""
    rng = np.random.default_rng(seed)
    experts = jnp.asarray(rng.integers(0, 2 * devices + 2, (devices * tokens, 2)), jnp.int32)
    x, y = (jnp.asarray(rng.normal(size=(devices * n, width)), dtype) for n in (tokens, devices * tokens))
    return x, y, experts


def routes_here(experts, parts=()):
    everyone, devices = jax.lax.all_gather(experts, "expert", tiled=True), jax.lax.axis_size("expert")
    find = functools.partial(remote_exchange.routes, mine=2, devices=devices, parts=parts)
    return find(everyone, jax.lax.axis_index("expert")), everyone.shape[0]


def there_and_back(x, y, experts, beside=0):
    """What comes, what of it is real, and sums at home."""
    routes, tokens = routes_here(experts)
    came = remote_exchange.send(x, routes, axis="expert", beside=beside)
    real = (routes.source < tokens)[:, None]
    return jnp.where(real, came, 0), real, remote_exchange.collect(y, routes, axis="expert", beside=beside)


def in_parts(x, y, experts, beside=0):
    """Each row that comes to two places, the first half of them in the order of rows, the second in the other, of a
    device's own tokens and of others' apart; and sums at home of y, of both and of one after the other."""
    devices = jax.lax.axis_size("expert")
    parts = (1, devices - 1) if devices > 1 else (1,)
    routes, tokens = routes_here(experts, parts)
    came, back = [], []
    for p, part in enumerate(remote_exchange.split(routes, parts)):
        rows, first = part.source.shape[0], p * (y.shape[0] // devices)
        real = (part.source < tokens)[:, None]
        place = jnp.arange(rows, dtype=jnp.int32)
        slot = jnp.where(real, jnp.stack([place, 2 * rows - 1 - place], axis=1), 2 * rows)
        spread = remote_exchange.run_send("expert", beside, x, part, slot, 2 * rows)
        came.append(jnp.where(jnp.concatenate([real, real[::-1]]), spread, 0))
        back.append((y[first : first + rows], part))
    home = remote_exchange.run_collect("expert", beside, back)
    if devices > 1:
        others = remote_exchange.run_collect("expert", beside, back[1:], dtype=jnp.float32)
        return *came, home, remote_exchange.run_collect("expert", beside, back[:1], others, y.dtype)
    return *came, home


@pytest.mark.parametrize(("width", "dtype", "aside"), [(128, jnp.float32, 0), (384, jnp.bfloat16, 2)])
def test_pieces_of_rows_in_the_interpreter(width, dtype, aside, monkeypatch, capfd):
    """It knows no remote references and no semaphores: here the devices have one memory. A worker, of four,
    takes more pieces of rows than its ring has stages, three to a row of 384."""
    for limit, value in {"BLOCKS": 2, "SPARE": 0, "_WORKERS": 2, "_STAGE": 512, "_PIECE": 256}.items():
        monkeypatch.setattr(mosaic_gpu, limit, value)
    monkeypatch.setattr(plgpu, "remote_ref", lambda ref, device: ref)
    for name in ("get_global", "semaphore_signal", "semaphore_wait"):
        monkeypatch.setattr(pl, name, lambda *_, **__: None)
    index = jax.lax.axis_index
    monkeypatch.setattr(jax.lax, "axis_size", lambda axis: 2)
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: jnp.int32(0) if axis == "expert" else index(axis))
    (x, _, _), (y, _, _) = operands(1, 5, width, dtype), operands(1, 7, width, dtype, seed=1)
    # rows 1, 3, 4 and 0 of two devices of 5 tokens, and three that are none
    source = jnp.array([1, 3, 4, 5, 12, 13, 14], jnp.int32)
    starts, stops = jnp.array([0, 3], jnp.int32), jnp.array([3, 4], jnp.int32)
    places = jnp.array([[0, 6], [7, 7], [2, 7], [7, 3], [1, 1]], jnp.int32)
    slot = jnp.array([[2, 14], [14, 14], [0, 5], [3, 1], [14, 14], [14, 14], [14, 14]], jnp.int32)
    more = jnp.arange(5 * width, dtype=jnp.float32).reshape(5, width)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        options = {"axis": "expert", "beside": aside}
        came = jax.block_until_ready(mosaic_gpu.send(x, source, starts, stops, **options))
        spread = jax.block_until_ready(mosaic_gpu.send(x, source, starts, stops, slot, **options, rows=14))
        # of the second device alone, which is here the first one's memory: its token 0 is token 5 of all
        one = jax.block_until_ready(mosaic_gpu.send(x, source, starts[1:], stops[1:], first=1, **options))
        own = jax.block_until_ready(mosaic_gpu.send(x, source, starts[:1], stops[:1], slot, axis=None, rows=14))
        home = jax.block_until_ready(mosaic_gpu.collect([(y, places, 0)], **options))
        parts = [(y, places[:, :1], 0), (y, places[:, 1:], 1)]
        both = jax.block_until_ready(mosaic_gpu.collect(parts, more, **options, dtype=jnp.float32))
        # one row of a token, so that several tokens are in a stage
        alone = jax.block_until_ready(mosaic_gpu.collect(parts[:1], **options))
        again = jax.block_until_ready(mosaic_gpu.collect(parts[:1], more, axis=None))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    np.testing.assert_array_equal(came[:4], x[jnp.array([1, 3, 4, 0])])
    assert spread.shape == (14, width)
    np.testing.assert_array_equal(spread[jnp.array([2, 0, 5, 3, 1])], x[jnp.array([1, 4, 4, 0, 0])])
    np.testing.assert_array_equal(one[3], x[0])
    np.testing.assert_array_equal(own[jnp.array([2, 0, 5])], x[jnp.array([1, 4, 4])])
    y = np.asarray(y.astype(jnp.float32))
    wanted = np.stack([y[0] + y[6], 0 * y[0], y[2], y[3], y[1] + y[1]])
    np.testing.assert_array_equal(home, jnp.asarray(wanted).astype(dtype))
    np.testing.assert_allclose(both, more + wanted, rtol=1e-6)
    wanted = np.stack([y[0], 0 * y[0], y[2], 0 * y[0], y[1]])
    np.testing.assert_array_equal(alone, jnp.asarray(wanted).astype(dtype))
    np.testing.assert_array_equal(again, jnp.asarray(more + wanted).astype(dtype))


def test_the_kernels_lower_and_use_no_multicast(monkeypatch):
    monkeypatch.setattr(products, "_hopper", lambda: True)
    x, y, experts = operands(4, 64, 256, jnp.bfloat16)
    for run, count in (there_and_back, 2), (in_parts, 3):
        text = over(4)(run).trace(x, y, experts).lower(lowering_platforms=("cuda",)).as_text()
        assert "send_rows" in text and "collect_rows" in text
        assert text.count("uses_xla_collective_metadata = true") == count  # peers' addresses, from the runtime
        # what Mosaic asks of the runtime for an address of all devices, and the instructions that take one
        assert not re.search("symmetric_memory_parameters|multi(mem|cast)", text)


def test_beside_products_they_lower_for_a_stream_of_their_own(monkeypatch):
    """Forward and backward, each way by a call that XLA may not take apart; on two times four devices."""
    monkeypatch.setattr(products, "_hopper", lambda: True)
    x, y, experts = [jnp.concatenate([a, a]) for a in operands(4, 64, 256, jnp.bfloat16)]

    def run(x, y, experts):
        return jax.vjp(lambda x, y: there_and_back(x, y, experts, beside=SPARE)[:3:2], x, y)[1]((y, x))

    text = over(4, data=2)(run).trace(x, y, experts).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'call @compute_on.*_xla_stream_annotation = "1", inlineable = "false"', text)
    assert len(calls) == text.count("uses_xla_collective_metadata = true") == 2
    assert not re.search("symmetric_memory_parameters|multi(mem|cast)", text)


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu' or len(jax.devices()) < 2")
@pytest.mark.parametrize(
    ("tokens", "width", "data"), [(500, 128, 1), (300, 2048, 1), (1, 7168, 1), (300, 2048, 2)]
)
def test_on_the_gpus_of_a_host(tokens, width, data, monkeypatch):
    """Bit for bit what the collectives bring, three times."""
    devices = len(jax.devices()) // data
    if devices == 1:
        pytest.skip("two times two GPUs are needed")
    run = over(devices, data)
    parts = [operands(devices, tokens, width, jnp.bfloat16, seed) for seed in range(data)]
    args = [jnp.concatenate(each) for each in zip(*parts, strict=True)]
    exchanges = [functools.partial(f, beside=beside) for f in (there_and_back, in_parts) for beside in (0, SPARE)]
    got = [[run(*args) for _ in range(3)] for run in map(run, exchanges)]
    emulated_remote.install(monkeypatch)
    wanted = [run(exchange)(*args) for exchange in (there_and_back, in_parts)]
    assert_equal([found for times in got for found in times], [found for found in wanted for _ in range(6)])


def assert_equal(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu'")
def test_on_one_gpu_rows_are_exchanged_with_itself(monkeypatch):
    """By references that aren't remote; on a stream of their own too, by blocks of several warpgroups."""
    args = operands(1, 300, 2048, jnp.bfloat16)
    exchanges = [functools.partial(f, beside=beside) for f in (there_and_back, in_parts) for beside in (0, SPARE)]
    got = [over(1)(exchange)(*args) for exchange in exchanges]
    emulated_remote.install(monkeypatch)
    assert_equal(got, [over(1)(exchange)(*args) for exchange in (there_and_back, in_parts) for _ in range(2)])


def test_off_gpu_it_says_so():
    x = jnp.ones((8, 128), jnp.float32)

    def routes(tokens, devices, rows):
        shapes = (tokens, devices), rows, devices, devices
        return remote_exchange.Routes(*(jnp.zeros(shape, jnp.int32) for shape in shapes))

    def send(*sizes):
        over(4)(lambda x: remote_exchange.send(x, routes(*sizes), axis="expert"))(x)

    with pytest.raises(NotImplementedError, match=r"float32\[2, 128\] by remote references: it needs Hopper GPUs"):
        send(2, 4, 6)
    with pytest.raises(ValueError, match=r"at most 4 devices along axis 'expert'; got \[2, 128\], \[2, 5\]"):
        send(2, 5, 6)
    with pytest.raises(ValueError, match="2 tokens and places 1"):
        send(1, 4, 6)
    with pytest.raises(ValueError, match="2 rows and source 6"):
        over(4)(lambda x: remote_exchange.collect(x, routes(2, 4, 6), axis="expert"))(x)
    assert remote_exchange.why_not(jax.ShapeDtypeStruct((4, 128), jnp.int32)) == "it needs bfloat16, float16 or float32"
    width = remote_exchange.why_not(jax.ShapeDtypeStruct((4, 130), jnp.bfloat16))
    assert width == "it needs rows, and a width in multiples of 128"
