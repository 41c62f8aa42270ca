"""What the step's benchmark times: which routings, and that a step can be stopped and begun again."""

import pytest
import small

from experiments.configs import olmoe_1b_7b, olmoe_1b_7b_bias
from experiments.step import Step, cases
from moejax import config as configs
from moejax.errors import UserError


def test_the_routings_that_are_timed():
    config = configs.settle(configs.from_config_dict(olmoe_1b_7b.get_config()))
    assert list(cases(config, [])) == ["forced", "no losses", "real"]
    some = cases(config, ["real", "no losses"])
    assert list(some) == ["no losses", "real"]
    assert some["real"] == config
    plain = some["no losses"].model.moe
    assert (plain.load_balance_weight, plain.router_z_weight, plain.router) == (0, 0, config.model.moe.router)
    biased = configs.settle(configs.from_config_dict(olmoe_1b_7b_bias.get_config()))
    assert cases(biased, [])["no losses"].model.moe.bias_update_rate == 0
    with pytest.raises(UserError, match="--routing=real,even: 'even' is not among forced, no losses, real of this"):
        cases(config, ["real", "even"])


def test_a_step_begins_anew_after_stop():
    config = small.config()
    step = Step(config, 8, 16)
    first = [int(step()[0].step) for _ in range(2)]
    step.stop()
    assert first == [1, 2]
    assert int(step()[0].step) == 1
    assert step.bytes() > 0
