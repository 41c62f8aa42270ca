"""What the small configs of this folder share: a dense byte-level LM on the Python standard library's source.

  python experiments/train.py --config=experiments/configs/dense.py --workdir=runs/dense

Every field with its default and meaning is in moejax/config.py. Sized for 2 CPU cores: the arms of `make demo` train
in a bit over a minute each.
"""

from typing import Any

from ml_collections import ConfigDict

from moejax.config import Config, MoEConfig
from moejax.schema import to_config_dict


def get_config() -> ConfigDict:
    config = to_config_dict(Config())
    # Without QK-norm, as the models of most of the papers compared; so `fine_grained` is an architecture that others
    # know, DeepSeekMoE's, and its runs can be exported.
    config.model.update(num_layers=4, width=128, num_heads=4, num_kv_heads=4, ffn_width=512, qk_norm=False)
    config.data.update(source="python-stdlib", tokenizer="bytes", sequence_length=256, batch_size=16)
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup_steps=20)
    config.train.update(steps=200, log_every=10, eval_every=100, checkpoint_every=100)
    return config


def moe(**fields: Any) -> ConfigDict:
    """Every field of `model.moe`, these ones set."""
    result = to_config_dict(MoEConfig())
    for name, value in fields.items():  # update() takes no references
        result[name] = value
    return result


def share_of(model: ConfigDict, parts: int) -> Any:
    """`model.ffn_width` / parts, as a reference: it follows when ffn_width is changed on the command line."""
    return model.get_oneway_ref("ffn_width") // parts
