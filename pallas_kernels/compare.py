"""Times these kernels beside another checkout's, in turns in one process: is a change faster, its results the same?

    python -m pallas_kernels.compare --other PATH [--op forward,drhs,gated_ffn,…] [--shape training] [--sizes dirichlet]
        [--implementation mosaic_gpu]

PATH is a folder with a `pallas_kernels` of its own, such as a git worktree of the commit before. Operations, shapes and
sizes are those of `pallas_kernels.benchmark`; the implementation is what is picked here, unless one is named. Medians
of five rounds, in which both have their turn in an order that changes, each after a tenth of a second of untimed calls.
"""

import argparse
import concurrent.futures
import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import benchmark, block_ops, shapes
from pallas_kernels.timing import rounds

_NAME = "pallas_kernels"


class Tree:
    """A checkout's own `pallas_kernels`, of which several can be loaded: a context in which that name is this one.

    Raises ValueError where `root` holds none, or one without what is compared here.
    """

    def __init__(self, root: Path):
        if not (root / _NAME / "__init__.py").is_file():
            raise ValueError(f"{root} holds no {_NAME}; give the folder of a checkout")
        self._root, self._modules = str(root), dict[str, object]()
        try:
            with self:
                self.benchmark = importlib.import_module(f"{_NAME}.benchmark")
                self.block_ops = importlib.import_module(f"{_NAME}.block_ops")
                self.metadata = importlib.import_module(f"{_NAME}.grouped_matmul").group_metadata
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"the {_NAME} of {root} can't be loaded: {error}; give a newer checkout") from error

    def __enter__(self) -> "Tree":
        self._others = _taken()
        sys.modules.update(self._modules)  # type: ignore[arg-type]
        sys.path.insert(0, self._root)
        return self

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self._root)
        self._modules = _taken()
        sys.modules.update(self._others)  # type: ignore[arg-type]


def _taken() -> dict[str, object]:
    """The package's modules, taken out of sys.modules."""
    names = [name for name in sys.modules if name == _NAME or name.startswith(_NAME + ".")]
    return {name: sys.modules.pop(name) for name in names}


def bench(case, op: str, implementation: str, trees: dict[str, Tree], settle: float = 0.1) -> tuple[dict, float]:
    """name of a tree -> times of one product, and how far the second's results are from the first's: the largest
    ‖a − b‖ / ‖a‖ of an array, 0.0 where all are equal."""
    block = op in block_ops.OPS
    shared = (block_ops if block else benchmark).operands(case)
    lowered, given = {}, {}
    at = 6 if block else 4  # of the metadata among the operands, after the sizes: each tree has its own kind of it
    for name, tree in trees.items():
        with tree:
            metadata = jax.jit(tree.metadata, static_argnums=1)(shared[at - 1], case["product"][0])
            given[name] = *shared[:at], metadata, *shared[at + 1 :]
            one = tree.block_ops.run if block else tree.benchmark.for_each
            lowered[name] = jax.jit(functools.partial(one, op, implementation)).lower(*given[name])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    runs = {name: functools.partial(program, *given[name]) for name, program in compiled.items()}
    first, second = (jax.tree.leaves(run()) for run in runs.values())
    apart = max(_apart(a, b) for a, b in zip(first, second, strict=True))
    del first, second
    times = rounds(runs, launches=case["launches"], settle=settle)
    return {name: tuple(us / case["again"] for us in found) for name, found in times.items()}, apart


@jax.jit
def _difference(a, b):
    equal = jnp.array_equal(a, b)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return equal, jnp.linalg.norm(a - b) / jnp.linalg.norm(a)


def _apart(a, b) -> float:
    equal, difference = _difference(a, b)
    return 0.0 if equal else float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*benchmark.OPS, *block_ops.OPS)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--op", default="forward,dlhs,drhs", type=shapes.listed("op", known))
    parser.add_argument("--shape", default="training", type=shapes.listed("shape", shapes.NAMES))
    parser.add_argument("--sizes", default="dirichlet", choices=shapes.SIZES)
    parser.add_argument("--implementation")
    flags = parser.parse_args()
    names = [flags.implementation] if flags.implementation else []
    todo = benchmark.cases(flags.op, flags.shape, flags.sizes)
    try:
        trees = {"this": Tree(Path(__file__).parents[1]), "other": Tree(flags.other.resolve())}
        planned = benchmark.plan(todo, names)
    except ValueError as error:
        parser.error(str(error))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, sizes {flags.sizes}; [fastest and slowest round]")
    ratios = []
    for case, implementations in planned:
        for op, (implementation, *_) in implementations.items():
            times, apart = bench(case, op, implementation, trees)
            ratios.append(times["other"][0] / times["this"][0])
            told = ", ".join(
                f"{name} {us:.0f} us [{least:.0f}, {most:.0f}]" for name, (us, least, most) in times.items()
            )
            alike = f"{apart:.1e} apart" if apart else "the same"
            print(f"{case['name']} {op} {implementation}: {told}; {ratios[-1]:.3f} times as fast, {alike}", flush=True)
    print(f"all {len(ratios)}: {np.exp(np.mean(np.log(ratios))):.3f} times as fast, by the geometric mean")


if __name__ == "__main__":
    main()
