"""Configs: round trips, what is refused and in which words, what counts as a change, and the command line."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from moejax import config as configs
from moejax import config_checks, schema
from moejax.config import Config, MoEConfig, ablation_from_config_dict, diff, from_config_dict, settle
from moejax.errors import UserError

SMALL = ["dense", "hash", "switch", "gshard", "fine_grained", "fine_grained_aux_free", "expert_choice"]
ABLATIONS = ["switch_vs_fine_grained", "deepseekmoe_validation", "balance"]


def load(name: str):
    values = importlib.import_module(f"experiments.configs.{name}").get_config()
    values.lock()
    return values


@pytest.mark.parametrize("name", SMALL)
def test_the_small_configs_are_valid_and_go_through_json(name):
    config = from_config_dict(load(name))
    assert from_config_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    assert from_config_dict(configs.to_config_dict(config)) == config
    assert (config.model.moe is None) == (name == "dense")


def test_defaults_alone_are_a_config():
    assert from_config_dict({}) == Config()


def test_expert_widths_follow_the_ffn_width():
    values = load("fine_grained")
    values.model.ffn_width = 256
    assert from_config_dict(values).model.moe.expert_width == 64


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_apply_a_change_of_the_base_to_every_arm(name):
    values = load(f"ablations.{name}")
    values.train.steps, values.model.ffn_width, values.seeds = 7, 128, (5,)
    ablation = ablation_from_config_dict(values)
    assert ablation.seeds == (5,)
    assert name == "balance" or ablation.arms["dense"].model.moe is None
    for arm in ablation.arms.values():
        assert (arm.train.steps, arm.model.ffn_width) == (7, 128)
        assert arm.model.moe is None or arm.model.moe.expert_width in (32, 64, 128)


@pytest.mark.parametrize(
    ("router", "options", "line"),
    [
        ("top_k", {"renormalize": "no"}, r"renormalize='no': router moejax.routing:top_k needs True or False"),
        ("sigmoid_top_k", {"scale": "2.5"}, r"scale='2.5': .* needs a number"),
        ("group_limited_sigmoid", {"groups": "4", "groups_kept": 2}, r"groups='4': .* needs an int"),
        ("group_limited_sigmoid", {"groups": 4.0, "groups_kept": 2}, r"groups=4.0: .* needs an int"),
        ("hash", {"seed": 1.5}, r"seed=1.5: .* needs an int"),
        ("vmoe", {"noise_std": "x"}, r"noise_std='x': .* needs a number or None"),
    ],
)
def test_mistyped_router_options(router, options, line):
    moe = MoEConfig(router=f"moejax.routing:{router}", num_experts=8, experts_per_token=2, router_options=options)
    with pytest.raises(UserError, match=r"config\.model\.moe\.router_options\." + line):
        config_checks.check_moe(moe)
    config_checks.check_moe(MoEConfig(router="moejax.routing:vmoe", router_options={"noise_std": None}))
    config_checks.check_moe(MoEConfig(router="moejax.routing:sigmoid_top_k", router_options={"scale": 2}))


def test_options_of_a_users_router(tmp_path):
    """Checked as far as its signature tells; a list of ints is no int."""
    (tmp_path / "mine.py").write_text(
        "from moejax.routing import top_k\n"
        "def route(logits, *, experts_per_token, mask, layers: list[int] = (), any=None, temperature=1.0):\n"
        "    return top_k(logits, experts_per_token=experts_per_token, mask=mask)\n"
    )
    moe = MoEConfig(router=f"{tmp_path}/mine.py:route", router_options={"layers": [1], "any": "x", "temperature": 2})
    config_checks.check_moe(moe)
    with pytest.raises(UserError, match=r"temperature='x': router .*mine\.py:route needs a number"):
        config_checks.check_moe(dataclasses.replace(moe, router_options={"temperature": "x"}))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range(seed):
    with pytest.raises(UserError, match=rf"config\.seed={seed} must be at least 0 and below 2\^63"):
        config_checks.check_seed(seed, "config.seed")


def test_the_balance_ablation_changes_balancing_alone():
    arms = ablation_from_config_dict(load("ablations.balance")).arms
    found = {name: (arm.model.moe.load_balance_weight, arm.model.moe.bias_update_rate) for name, arm in arms.items()}
    assert found == {
        "none": (0, 0), "aux_0001": (0.001, 0), "aux_001": (0.01, 0), "aux_01": (0.1, 0),
        "bias_0001": (0, 0.001), "bias_001": (0, 0.01), "bias_01": (0, 0.1),
    }  # fmt: skip
    rest = {dataclasses.replace(a.model.moe, load_balance_weight=0.0, bias_update_rate=0.0) for a in arms.values()}
    assert len(rest) == 1


def test_an_ablations_mistakes():
    good = {"seeds": [0], "arms": {"a": {"train": {"steps": 3}}}}
    assert ablation_from_config_dict(good).arms["a"].train.steps == 3
    for change, words in (
        ({"arms": {"a": {"train": {"step": 3}}}}, "arm 'a': config.train.step does not exist"),
        ({"arms": {"a": 3}}, "config.arms: 'a' is 3; give a dict"),
        ({"seeds": []}, "config.seeds is missing or empty"),
        ({"seeds": ["x"]}, "config.seeds='x': it needs an int"),
        ({"classes": {"one": ["b"]}}, "config.classes must hold every arm once"),
    ):
        with pytest.raises(UserError, match=words):
            ablation_from_config_dict({**good, **change})
    with pytest.raises(UserError, match=r"run it with experiments/ablate\.py"):
        from_config_dict(good)


MOE = {"num_experts": 8, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {"steps": 5}}, "config.trian does not exist; the nearest is config.train"),
        ({"train": {"step": 5}}, "config.train.step does not exist; the nearest is config.train.steps"),
        ({"steps": 5}, "config.steps does not exist; there is config.train.steps"),
        ({"model": {"moe": {"routr": "x"}}}, "the nearest is config.model.moe.router"),
        ({"train": {"steps": "abc"}}, "config.train.steps='abc': it needs an int"),
        ({"train": {"steps": 2.0}}, "config.train.steps=2.0: it needs an int"),
        ({"train": {"steps": True}}, "config.train.steps=True: it needs an int"),
        ({"train": {"steps": None}}, "config.train.steps=None: it needs an int"),
        ({"train": 3}, "config.train=3: it needs a dict with the fields steps"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "it needs a float"),
        ({"optimizer": {"betas": [0.9]}}, "config.optimizer.betas=[0.9]: it needs 2 floats"),
        ({"optimizer": {"clip_norm": "x"}}, "config.optimizer.clip_norm='x': it needs a float or None"),
        ({"optimizer": {"name": "adam"}}, "it needs one of: adamw, adafactor, muon"),
        ({"optimizer": {"learning_rate": float("nan")}}, "config.optimizer.learning_rate=nan must be finite"),
        ({"optimizer": {"learning_rate": 0}}, "must be finite and more than 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"must both lie in [0, 1)"),
        ({"train": {"steps": -1}}, "config.train.steps=-1 must be at least 1"),
        ({"train": {"profile_steps": [3]}}, "must be (first, last)"),
        ({"train": {"accumulation_steps": 3}, "data": {"batch_size": 8}}, "is no multiple of"),
        ({"data": {"eval_fraction": 1.5}}, "config.data.eval_fraction=1.5 must be at least 0 and less than 1"),
        ({"mesh": {"data": -1, "expert": -1}}, "only one axis may be -1"),
        ({"mesh": {"data": 0}}, "config.mesh.data=0 must be at least 1, or -1"),
        ({"model": {"num_heads": 4, "num_kv_heads": 3}}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"model": {"width": 130}}, "width=130 is no multiple of num_heads=4"),
        ({"model": {"width": 12}}, "head_dim=3 is odd"),
        ({"model": {"first_dense_layers": 9}}, "first_dense_layers=9 must lie in 0 … num_layers=4"),
        ({"model": {"moe": MOE, "moe_every": 3}}, "must be a positive multiple of moe_every=3"),
        ({"model": {"moe": {**MOE, "experts_per_token": 9}}}, "experts_per_token=9 is more than num_experts=8"),
        ({"model": {"moe": {**MOE, "experts_per_token": 0}}}, "must be at least 1"),
        ({"model": {"moe": {**MOE, "capacity_factor": 0.0}}}, "config.model.moe.capacity_factor=0.0 must be"),
        ({"model": {"moe": {**MOE, "eval_capacity_factor": -1}}}, "config.model.moe.eval_capacity_factor=-1.0 must"),
        ({"model": {"moe": MOE}, "mesh": {"expert": 3}}, "num_experts=8 can't be shared evenly by mesh.expert=3"),
        ({"model": {"moe": {**MOE, "router": "moejax.routing:swich"}}}, "did you mean 'switch'"),
        ({"model": {"moe": {**MOE, "router": "no.such:router"}}}, "no.such"),
        ({"model": {"moe": {**MOE, "router_options": {"renormalise": True}}}}, "router_options.renormalize"),
        ({"model": {"moe": {**MOE, "implementation": "x"}}}, "implementation='x' must be one of reference, blocks"),
        ({"model": {"attention_implementation": "x"}}, "attention_implementation='x' must be one of plain"),
        ({"model": {"moe": {**MOE, "load_weight": 0.1}}}, "the load loss needs a noisy router"),
        ({"model": {"moe": {**MOE, "bias_update_rate": 0.1}}}, "needs a router with a selection bias"),
        (
            {"model": {"moe": {**MOE, "router": "moejax.routing:group_limited_sigmoid", "router_options":
                               {"groups": 3, "groups_kept": 1}}}},
            "num_experts=8 is no multiple of router_options.groups=3",
        ),
        (
            {"model": {"moe": {**MOE, "router": "moejax.routing:group_limited_sigmoid", "router_options":
                               {"groups": 8, "groups_kept": 1}}}},
            "give groups_kept between 2 and 8",
        ),
        ({"model": {"moe": {**MOE, "router": "moejax.routing:dense_mixture"}}}, "set experts_per_token=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line_that_says_so(values, words):
    with pytest.raises(UserError) as error:
        from_config_dict(values)
    assert words in str(error.value) and "\n" not in str(error.value)


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from([path for path, _ in schema.leaves(configs.to_dict(Config()))]), data=st.data())
def test_any_misspelt_field_is_named_with_its_true_name(name, data):
    parent, _, field = name.rpartition(".")
    at = data.draw(st.integers(0, len(field) - 1))
    wrong = field[:at] + field[at] + field[at:]  # a doubled letter
    values: dict = {wrong: 1}
    for part in reversed(parent.split(".") if parent else []):
        values = {part: values}
    with pytest.raises(UserError, match=f"nearest is config.{name}$"):
        from_config_dict(values)


def test_more_steps_another_mesh_and_other_intervals_are_no_change():
    stored = settle(from_config_dict(load("fine_grained")))
    model = dataclasses.replace(stored.model, vocab_size=257)
    stored = dataclasses.replace(stored, model=model)
    new = load("fine_grained")
    new.train.update(steps=999, log_every=3, eval_every=5, checkpoint_every=6, keep_checkpoints=9, eval_batches=2)
    new.mesh.update(data=1, expert=3)
    new.model.remat = "full"
    assert diff(stored, from_config_dict(new)) == []


def test_changes_are_listed_with_both_values():
    stored = settle(from_config_dict(load("fine_grained")))
    new = load("fine_grained")
    new.optimizer.learning_rate = 0.5
    new.model.moe.experts_per_token = 4
    new.model.moe.router_options = {"renormalize": False}
    new.optimizer.decay_steps = 77
    assert diff(stored, from_config_dict(new)) == [
        "model.moe.experts_per_token: 3 -> 4",
        "model.moe.router_options.renormalize: None -> False",
        "optimizer.decay_steps: 200 -> 77",
        "optimizer.learning_rate: 0.002 -> 0.5",
    ]
    new.model.moe = None
    changed = diff(stored, from_config_dict(new))
    assert "model.moe.num_experts: 63 -> None" in changed


def test_the_horizon_is_the_first_runs():
    first = settle(from_config_dict({"train": {"steps": 100}}))
    assert first.optimizer.decay_steps == 100
    longer = from_config_dict({"train": {"steps": 300}})
    assert settle(longer, first).optimizer.decay_steps == 100
    assert diff(first, settle(longer, first)) == []


def test_other_experts_per_token_at_evaluation():
    config = from_config_dict({"model": {"moe": MOE}})
    assert configs.with_experts_per_token(config, 4).model.moe.experts_per_token == 4
    choice = from_config_dict({"model": {"moe": {**MOE, "router": "moejax.routing:expert_choice"}}})
    for refused, number, words in (
        (config, 9, "more than num_experts"),
        (choice, 1, "experts choose tokens"),
        (Config(), 1, "for a dense model"),
    ):
        with pytest.raises(UserError, match=words):
            configs.with_experts_per_token(refused, number)


OWN_ROUTER = textwrap.dedent("""
    import dataclasses
    import functools
    import jax.numpy as jnp
    from moejax import routing

    def route(logits, *, experts_per_token, mask, c=1.5):
        return routing.expert_choice(logits, experts_per_token=experts_per_token, mask=mask, capacity_factor=c)

    def decides_nothing(logits, *, experts_per_token):
        return logits, experts_per_token

    def no_experts_per_token(logits, *, mask):
        return routing.top_k(logits, experts_per_token=2, mask=mask)

    def misspelt(logits, *, experts_per_token, mask):
        return routing.top_q(logits, experts_per_token=experts_per_token, mask=mask)

    partly = functools.partial(misspelt, mask=None)

    def one_more(logits, *, experts_per_token, mask):
        return routing.top_k(logits, experts_per_token=experts_per_token + 1, mask=mask)

    def changed(logits, experts_per_token, mask, **fields):
        decision = routing.top_k(logits, experts_per_token=experts_per_token, mask=mask)
        return dataclasses.replace(decision, **{name: change(decision) for name, change in fields.items()})

    def counts_from_one(logits, *, experts_per_token, mask):
        return changed(logits, experts_per_token, mask, experts=lambda made: made.experts + 1)

    def twice(logits, *, experts_per_token, mask):
        return changed(logits, experts_per_token, mask, experts=lambda made: made.experts // 2)

    def over_nothing(logits, *, experts_per_token, mask):
        return changed(logits, experts_per_token, mask, weights=lambda made: made.weights / 0)

    def gives_up_a_choice(logits, *, experts_per_token, mask):
        first = lambda made: jnp.broadcast_to(jnp.arange(experts_per_token) == 0, made.keep.shape)
        return changed(logits, experts_per_token, mask, keep=lambda made: made.keep & first(made),
                       experts=lambda made: jnp.where(first(made), made.experts, 9))
""")


@pytest.fixture
def own_router(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_ROUTER)
    return path


def test_expert_choice_refuses_what_it_would_ignore_a_users_own_too(own_router):
    for router, hint in (("moejax.routing:expert_choice", "its own is router_options.capacity_factor"),
                         (f"{own_router}:route", "")):  # fmt: skip
        for name, value in (("capacity_factor", 1.25), ("eval_capacity_factor", 2.0), ("load_balance_weight", 0.01),
                            ("sequence_balance_weight", 0.01)):  # fmt: skip
            with pytest.raises(UserError, match=f"config.model.moe.{name}={value} does nothing with ") as error:
                from_config_dict({"model": {"moe": {**MOE, "router": router, name: value}}})
            assert hint in str(error.value) or "capacity" not in name
        config = from_config_dict({"model": {"moe": {**MOE, "router": router, "router_z_weight": 0.1}}})
        with pytest.raises(UserError, match="experts choose tokens"):
            configs.with_experts_per_token(config, 1)


@pytest.mark.parametrize("router", ["hash", "random"])
def test_a_router_that_learns_nothing_refuses_what_would_do_nothing(router):
    given = {**MOE, "router": f"moejax.routing:{router}", "capacity_factor": 1.25}
    assert from_config_dict({"model": {"moe": given}}).model.moe.capacity_factor == 1.25
    for name in ("load_balance_weight", "router_z_weight", "importance_weight", "input_jitter"):
        with pytest.raises(UserError, match=f"config.model.moe.{name}=0.1 does nothing with .*no router is learned"):
            from_config_dict({"model": {"moe": {**given, name: 0.1}}})


def test_a_function_that_is_no_router_is_refused(own_router):
    with pytest.raises(UserError, match="returns a tuple: it must return a Routing or an ExpertChoice"):
        from_config_dict({"model": {"moe": {**MOE, "router": f"{own_router}:decides_nothing"}}})


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_experts_per_token", r"fails: TypeError: .*argument 'experts_per_token'; it is called as router\("),
        ("misspelt", r"misspelt fails \(.*mine.py:17\): AttributeError: .* no attribute 'top_q'"),
        ("partly", r"partly fails: AttributeError: .* no attribute 'top_q'"),
        ("one_more", r"returns experts of shape \(16, 4\) for T=16, K=3 and E=8: it must be \(T, K\)"),
    ],
)
def test_a_routers_own_mistake_is_one_line(own_router, name, words):
    moe = {**MOE, "router": f"{own_router}:{name}", "num_experts": 8, "experts_per_token": 3}
    with pytest.raises(UserError, match=words) as error:
        from_config_dict({"model": {"moe": moe}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("counts_from_one", r"counts_from_one chooses expert 8: there are 0 to 7"),
        ("twice", r"twice chooses \[\d, \d, \d\]: each expert may be there once"),
        ("over_nothing", "over_nothing gives weights that are not finite"),
        ("gives_up_a_choice", None),
        ("route", None),
    ],
)
def test_a_routers_choices_are_tried_before_training(own_router, name, words):
    moe = MoEConfig(num_experts=8, experts_per_token=3, expert_width=8, router=f"{own_router}:{name}")
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        config_checks.check_choices(moe)


def test_configs_hash_although_options_are_a_dict():
    assert hash(MoEConfig(router_options={"a": 1})) == hash(MoEConfig(router_options={"a": 1}))


SWITCH, DENSE = "experiments/configs/switch.py", "experiments/configs/dense.py"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse(monkeypatch, *arguments: str):
    monkeypatch.chdir(ROOT)
    argv = ["script", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    holder = cli.config_flag(values)
    cli.parse(argv, values)
    return from_config_dict(holder.value)


# ml_collections loads config files by an importlib function that Python 3.15 will drop (ml_collections 1.1, 2026-11).
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
class TestCommandLine:
    def test_overrides(self, monkeypatch):
        config = parse(
            monkeypatch, f"--config={SWITCH}", "--config.train.steps", "7", "--config.model.moe.capacity_factor=None",
            "--config.optimizer.betas=(0.8, 0.9)", "--noconfig.model.qk_norm", "--config.data.cache_dir=x",
            "--config.model.moe.router_options={}", "--config.optimizer.learning_rate=1",
        )  # fmt: skip
        assert (config.train.steps, config.model.moe.capacity_factor, config.model.qk_norm) == (7, None, False)
        assert (config.optimizer.betas, config.data.cache_dir) == ((0.8, 0.9), "x")
        none = parse(
            monkeypatch, f"--config={SWITCH}", "--config.model.remat=none", "--config.train.init_from=none",
            "--config.model.moe.capacity_factor", "none", "--config.data.cache_dir=None",
        )  # fmt: skip
        assert (none.model.remat, none.train.init_from, none.data.cache_dir) == ("none", None, None)
        assert none.model.moe.capacity_factor is None
        assert config.optimizer.learning_rate == 1.0

    def test_dense_to_sparse_and_back(self, monkeypatch):
        assert parse(monkeypatch, f"--config={SWITCH}", "--config.model.moe=None").model.moe is None
        sparse = parse(monkeypatch, f"--config={DENSE}", "--config.model.moe={'num_experts': 4}")
        assert sparse.model.moe == MoEConfig(num_experts=4)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--config.trian.steps=5"], "config.trian.steps does not exist; the nearest is config.train.steps"),
            (["--config.train.setps", "5"], "the nearest is config.train.steps"),
            (["--config.train.steps=abc"], "config.train.steps='abc': it needs an int"),
            (["--config.train.steps=None"], "it needs an int"),
            (["--config.model.qk_norm=maybe"], "config.model.qk_norm='maybe': it needs a bool"),
            (["--config.optimizer.name=adam"], "it needs one of: adamw, adafactor, muon"),
            (["--config.train.steps"], "--config.train.steps"),
            (["--config.model.moe.router_options.scale=2"], "--config.model.moe.router_options=\"{'scale': 2}\""),
            (["--config.train.steps.x=2"], "config.train.steps has no fields"),
            (["--wokdir=x"], "wokdir"),
            (["--train.steps=4"], "--train.steps is no flag; a field of the config is --config.train.steps"),
            (["stray"], "'stray' belongs to no flag"),
        ],
    )
    def test_mistakes(self, monkeypatch, arguments, words):
        with pytest.raises(UserError) as error:
            parse(monkeypatch, f"--config={SWITCH}", *arguments)
        assert words in str(error.value)

    def test_mistakes_about_the_file(self, monkeypatch):
        with pytest.raises(UserError, match=r"config file nope\.py can't be opened"):
            parse(monkeypatch, "--config=nope.py")
        with pytest.raises(UserError, match=r"given without --config=FILE\.py"):
            parse(monkeypatch, "--config.train.steps=3")
        ablation = "--config=experiments/configs/ablations/switch_vs_fine_grained.py"
        with pytest.raises(UserError, match=r"^--config\.arms\.switch\.seed: an arm has only the fields"):
            parse(monkeypatch, ablation, "--config.arms.switch.seed=3")
        with pytest.raises(UserError, match=r"config\.model\.moe is None \(a dense model\)"):
            parse(monkeypatch, f"--config={DENSE}", "--config.model.moe.num_experts=4")

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("def get_config():\n    config = dict(\n", r"line 2: SyntaxError: '\(' was never closed"),
            ("x = 1\nfrom experiments.configs import basee\n", "line 2: ImportError: cannot import name 'basee'"),
            ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
            ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
            ("def get_config():\n    raise ValueError('odd')\n", "line 2: ValueError: odd"),
            ("from experiments.configs import base\n\ndef get_config():\n    return base.moe(routr=1).routr.x\n",
             "line 4: AttributeError"),
            ("x = 1\n", r"has no get_config\(\)"),
        ],
    )  # fmt: skip
    def test_a_broken_config_file_is_named_with_its_line(self, monkeypatch, tmp_path, code, words):
        path = tmp_path / "mine.py"
        path.write_text(code)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # a file of before, and its get_config
        for arguments in ([f"--config={path}"], ["--config", str(path)]):
            with pytest.raises(UserError, match=f"config file {path}.*{words}") as error:
                parse(monkeypatch, *arguments)
            assert "\n" not in str(error.value)

    def test_two_config_files_are_refused(self, monkeypatch):
        for second in ([f"--config={DENSE}"], ["--config", DENSE], [f"--config={SWITCH}"]):
            with pytest.raises(UserError, match=rf"given 2 times \({SWITCH}, {second[-1].removeprefix('--config=')}\)"):
                parse(monkeypatch, f"--config={SWITCH}", *second)


SCRIPT = textwrap.dedent('''
    """Says hello.

    python hello.py --config=experiments/configs/switch.py --config.train.steps=5
    """
    import signal, time
    from experiments import cli
    from moejax.errors import UserError
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup and a shell's & take away
    CONFIG = cli.config_flag()
    def main():
        steps = CONFIG.value.train.steps
        print("ready", flush=True)
        if steps == 1:
            raise UserError("two\\nlines")
        while steps == 2:  # signal.pause() would miss an interrupt that came just before it
            time.sleep(0.05)
    if __name__ == "__main__":
        cli.run(main)
''')


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--config.train.steps=5"], 0, "ready\n", ""),
        (["--config.train.steps=1"], 2, "ready\n", "error: two lines\n"),
        (["--config.trian.steps=1"], 2, "",
         "error: config.trian.steps does not exist; the nearest is config.train.steps\n"),
        (["--config.train.steps=2"], 130, "ready\n", ""),
        (["--help"], 0, "--config.train.steps=5", ""),
    ],
)  # fmt: skip
def test_a_script_ends_with_one_line_and_a_status(tmp_path, arguments, status, out, err):
    path = tmp_path / "hello.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), f"--config={SWITCH}", *arguments]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        first = ""
        if status == 130:
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
        try:
            rest, said = process.communicate(timeout=60)
        finally:
            process.kill()  # else leaving this block waits for one that hangs
    assert process.returncode == status, said
    assert out in first + rest
    assert said == err


@pytest.mark.parametrize("router", ["noisy_top_k", "vmoe"])
def test_the_load_loss_is_taken_from_a_noisy_router(router):
    values = {"model": {"moe": {**MOE, "router": f"moejax.routing:{router}", "load_weight": 0.1}}}
    parsed = from_config_dict(values)
    assert parsed.model.moe is not None and parsed.model.moe.load_weight == 0.1
