# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Switch experts against fine-grained experts
#
# Two sparse language models that spend the same FLOPs per token. **Switch** sends each token to 1 of 16 large experts;
# **fine-grained** sends it to 3 of 63 experts of a quarter of the width, beside 1 that all tokens share. Here we look
# at what their routers do. The runs are those of `make demo`; where they aren't there, short ones
# are trained first, in a minute or two.
#
# On Colab: `!git clone` the repository, `%cd` into it, and run this notebook; its first cell installs what is missing.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pyproject.toml").is_file())
if importlib.util.find_spec("moejax") is None:  # a clean clone, as on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", str(ROOT)], check=True)
sys.path.insert(0, str(ROOT))

# Another folder of runs, and the length of the runs that are trained where there are none.
RUNS = Path(os.environ.get("MOEJAX_NOTEBOOK_RUNS", ROOT / "runs" / "demo"))
STEPS = int(os.environ.get("MOEJAX_NOTEBOOK_STEPS", 40))

# %%
# %matplotlib inline
import string

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import demo
from moejax import ablation, checkpoint, config, data, figures, routing_stats
from moejax.models.lm import LM

ARMS = ("switch", "fine_grained_aux_free")
runs = {name: ablation.folder_of(RUNS, name, seed=0) for name in ARMS}
if not all((folder / "result.json").is_file() for folder in runs.values()):
    RUNS = RUNS.parent / f"notebook_{STEPS}"
    runs = {name: ablation.folder_of(RUNS, name, seed=0) for name in ARMS}
    for name, folder in runs.items():
        ablation.run_one(demo.plan(STEPS).arms[name], folder)

# %% [markdown]
# ## Loss
# The loss of training, over steps. These are single runs: another seed moves such curves too, so nothing is ranked
# here; `experiments/ablate.py` trains several seeds and says what can be told apart.

# %%
figures.loss_curves(runs)

# %% [markdown]
# ## Load
# Each expert's share of the tokens over training, layer by layer; white is an even share, red more, blue less.
# Switch is held together by a loss that punishes uneven loads, the other by a bias that is added to each expert's
# score for the selection alone, and moved a little after every step: up where the load was low, down where it was high.

# %%
figures.expert_load(runs)

# %% [markdown]
# ## Restoring a run
# A checkpoint holds the run's config; that, the parameters and the router's state are all a model needs. We route one
# batch of the held-out text and keep, for each layer, the experts that every token chose.

# %%
def route(folder):
    """The held-out batch, the tallies of every layer, and the chosen experts (layers, B, L, K) of a run."""
    found = checkpoint.restore(folder)
    settings = config.from_config_dict(found.config)
    batch = next(data.eval_batches(data.prepare(settings.data), settings.data))
    batch.pop("target_bytes")
    model = LM(settings.model)

    @jax.jit  # far faster than layer by layer
    def decide(trees):
        variables = {name: trees[name] for name in ("params", "router_state") if name in trees}
        _, sown = model.apply(
            variables, batch["tokens"], batch["positions"], batch["segment_ids"],
            capture_intermediates=lambda _, method: method == "_route", mutable=["intermediates"],
        )  # fmt: skip
        moe = sown["intermediates"]["layers"]["moe"]
        _, decision = moe["_route"][0]
        return moe["routing"], decision.experts

    tallies, experts = jax.device_get(decide(found.trees))
    return batch, routing_stats.summarise(tallies), experts


routed = {name: route(folder) for name, folder in runs.items()}
for name, (_, statistics, _) in routed.items():
    with np.printoptions(precision=3):
        print(f"{name}: by layer, MaxVio {statistics['max_violation']}, entropy of the load {statistics['entropy']}")

# %% [markdown]
# ## Which experts work together
# With three experts per token one can ask which are chosen together: row i, column j is the share of expert i's tokens
# that chose expert j too. Bright columns are experts that join everything; bright pairs do the same work.

# %%
_, statistics, _ = routed["fine_grained_aux_free"]
figures.coactivation(np.asarray(statistics["coactivation"])[-1], "fine_grained_aux_free, last layer")

# %% [markdown]
# ## What experts specialise in
# The tokens are bytes, so we can ask which kind of byte an expert receives. The lift is the share of a kind among the
# expert's tokens, over its share among all tokens: 1 where the expert does not care.

# %%
KINDS = {
    "letters": string.ascii_letters + "_",
    "digits": string.digits,
    "space": " ",
    "line end": "\n",
    "brackets": "()[]{}",
    "quotes": "\"'",
    "other": "".join(sorted(set(string.punctuation) - set("_()[]{}\"'"))),
}


def lift(batch, experts, num_experts):
    """(kinds, E), from the chosen experts (B, L, K) of one layer."""
    chosen, tokens = experts[batch["mask"]], batch["tokens"][batch["mask"]]
    load = np.maximum(np.bincount(chosen.ravel(), minlength=num_experts), 1)
    rows = []
    for members in KINDS.values():
        hit = np.isin(tokens, np.frombuffer(members.encode(), np.uint8))
        share = np.bincount(chosen[hit].ravel(), minlength=num_experts) / load
        rows.append(share / max(hit.mean(), 1e-9))
    return np.array(rows)


figure = Figure(figsize=(9, 5), layout="constrained")
for axes, (name, (batch, statistics, experts)) in zip(figure.subplots(2), routed.items(), strict=True):
    image = axes.imshow(lift(batch, experts[-1], statistics["load"].shape[-1]), aspect="auto", vmin=0, vmax=6)
    axes.set(title=f"{name}, last layer", xlabel="expert", yticks=range(len(KINDS)), yticklabels=list(KINDS))
    figure.colorbar(image, ax=axes, label="lift", extend="max")
figure
