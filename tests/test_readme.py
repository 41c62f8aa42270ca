"""What the README and the commands' own help tell a newcomer: its router runs, and every command shows an example."""

import ast
import re
import subprocess
import sys
from pathlib import Path

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


def test_the_library_imports_no_torch_and_no_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("moejax", "pallas_kernels")
        for path in Path(ROOT, package).rglob("*.py")
        if "peers" not in path.parts and path.name not in ("__main__.py", "__init__.py")
    ]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'tensorflow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr[-800:]
