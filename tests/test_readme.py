"""What the README and the commands' own help tell a newcomer: its router runs, and every command shows an example."""

import ast
import re

import jax
import jax.numpy as jnp
import pytest
from processes import ROOT

from moejax import moe
from moejax.config import MoEConfig

COMMANDS = sorted(path for path in (ROOT / "experiments").glob("*.py") if "\n    cli.run(main)" in path.read_text())


def test_the_readmes_router_decides(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_router.py").write_text(code)
    options = {"temperature": 2.0}
    config = MoEConfig(
        router=f"{tmp_path}/my_router.py:route", num_experts=4, experts_per_token=2, router_options=options
    )
    logits, ids = jnp.array([[[0.0, 3.0, 1.0, 2.0]]]), jnp.zeros((1, 1), jnp.int32)
    decision = moe.decide(config, logits, tokens=ids, mask=jnp.ones((1, 1), bool))
    assert decision.experts.tolist() == [[[1, 3]]]
    assert jnp.allclose(decision.weights, jax.nn.softmax(logits / 2.0)[..., jnp.array([1, 3])])


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_commands_help_shows_an_example(path):
    """`cli.run` prints the docstring for --help."""
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(rf"^ *(\.venv/bin/)?python experiments/{path.name}", said, re.MULTILINE)


def imported(tree):
    """The top names of everything that a module imports, also inside functions and try."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_nothing_but_the_peers_imports_torch_or_tensorflow():
    folders = [ROOT / name for name in ("moejax", "pallas_kernels", "experiments", "tests")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = {path for path in files if {"torch", "tensorflow"} & set(imported(ast.parse(path.read_text())))}
    assert found  # the peers do: what would find others works
    assert all(path.parent.name == "peers" for path in found), found
