"""The step's benchmark: which routings it times, and that a step can be stopped and begun again."""


import pytest

from experiments import benchmark_step
from experiments.configs import olmoe_1b_7b, olmoe_1b_7b_bias
from experiments.step import Step
from moejax import config as configs
from moejax.errors import UserError
from tests import small


def test_the_routings_that_are_timed():
    config = configs.settle(configs.from_config_dict(olmoe_1b_7b.get_config()))
    assert list(benchmark_step.cases(config, [])) == ["forced", "no losses", "real"]
    some = benchmark_step.cases(config, ["real", "no losses"])
    assert list(some) == ["no losses", "real"]
    assert some["real"] == config
    plain = some["no losses"].model.moe
    assert (plain.load_balance_weight, plain.router_z_weight, plain.router) == (0, 0, config.model.moe.router)
    biased = configs.settle(configs.from_config_dict(olmoe_1b_7b_bias.get_config()))
    assert benchmark_step.cases(biased, [])["no losses"].model.moe.bias_update_rate == 0
    with pytest.raises(UserError, match="--routing=real,even: 'even' is not among forced, no losses, real of this"):
        benchmark_step.cases(config, ["real", "even"])


def test_a_step_begins_anew_after_stop():
    config = small.config()
    step = Step(config, 8, 16)
    first = [int(step()[0].step) for _ in range(2)]
    step.stop()
    assert first == [1, 2]
    assert int(step()[0].step) == 1
    assert step.bytes() > 0
