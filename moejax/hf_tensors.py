"""Which tensors of a checkpoint make up which parameters, in both directions: one list of rules for import and export.

A `Rule` ties parameters, by path ("params/layer_0/attention/query"), to tensors, by name. Every parameter stands in one
rule and every tensor in one: `check` names what is missing, unused or of a wrong shape.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from moejax.errors import UserError

Shape = tuple[int, ...]
Arrays = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """paths ↔ names. `shapes` gives the tensors' shapes from the parameters'; `read` the parameters from (their shapes,
    tensors); `write` the tensors from the parameters. Arrays are numpy's.

    parts: so many rows of the parameters' first axis can be read apart from the others, each from a tensor of its own
    or from the same row of the one tensor.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    shapes: Callable[[Sequence[Shape]], Sequence[Shape]]
    read: Callable[[Sequence[Shape], Arrays], Arrays]
    write: Callable[[Arrays], Arrays]
    parts: int = 1


def copy(path: str, name: str, tensor_shape: Shape | None = None, parts: int = 1) -> Rule:
    """The same numbers in the same order; `tensor_shape` where the tensor has another shape. parts: see `Rule`."""

    def shapes(s):
        return [tensor_shape or s[0]]

    def write(params):
        return [params[0].reshape(tensor_shape or params[0].shape)]

    return Rule((path,), (name,), shapes, lambda s, t: [t[0].reshape(s[0])], write, parts)


def flat(path: str, name: str) -> Rule:
    """A parameter of several axes that is one vector there: a bias (H, hd)."""
    return Rule(
        (path,),
        (name,),
        lambda s: [(math.prod(s[0]),)],
        lambda s, t: [t[0].reshape(s[0])],
        lambda p: [p[0].reshape(-1)],
    )


def _to_linear(param: Any, inputs: int) -> Any:
    return param.reshape(math.prod(param.shape[:inputs]), -1).T


def linear(path: str, name: str, inputs: int = 1) -> Rule:
    """A torch Linear weight (out, in) for a parameter (*in, *out), whose first `inputs` axes are `in`."""

    def shapes(s):
        return [(math.prod(s[0][inputs:]), math.prod(s[0][:inputs]))]

    return Rule((path,), (name,), shapes, lambda s, t: [t[0].T.reshape(s[0])], lambda p: [_to_linear(p[0], inputs)])


def experts(path: str, pattern: str, count: int) -> Rule:
    """One Linear weight (out, in) per expert, named by `pattern.format(expert)`, for a parameter (E, in, out)."""

    def read(s, tensors):
        stacked = np.empty(s[0], tensors[0].dtype)
        for row, tensor in zip(stacked, tensors, strict=True):
            row[...] = tensor.T
        return [stacked]

    def write(params):
        return [expert.T for expert in params[0]]

    names = tuple(pattern.format(expert) for expert in range(count))
    return Rule((path,), names, lambda s: [(s[0][2], s[0][1])] * count, read, write, parts=count)


def swapped(path: str, name: str) -> Rule:
    """Experts (E, in, out) for a tensor (E·out, in), one expert after another (DBRX)."""

    def shapes(s):
        return [(s[0][0] * s[0][2], s[0][1])]

    def read(s, t):
        return [t[0].reshape(s[0][0], s[0][2], s[0][1]).swapaxes(1, 2)]

    def write(p):
        return [p[0].swapaxes(1, 2).reshape(-1, p[0].shape[1])]

    return Rule((path,), (name,), shapes, read, write)


def joined(paths: Sequence[str], name: str, axis: int, *, transpose: bool = False) -> Rule:
    """Several parameters one after another in one tensor, along `axis` of it.

    With `transpose` the parameters are (in, …out) and the tensor is a Linear weight (all outs, in).
    """

    def forms(params):
        return [_to_linear(p, 1) for p in params] if transpose else list(params)

    def shapes(s):
        each = [(math.prod(one[1:]), one[0]) if transpose else one for one in s]
        whole = list(each[0])
        whole[axis] = sum(one[axis] for one in each)
        return [tuple(whole)]

    def read(s, tensors):
        each = [(math.prod(one[1:]), one[0]) if transpose else one for one in s]
        ends = np.cumsum([one[axis] for one in each])[:-1]
        parts = np.split(tensors[0], ends, axis=axis)
        return [(part.T if transpose else part).reshape(one) for part, one in zip(parts, s, strict=True)]

    return Rule(tuple(paths), (name,), shapes, read, lambda p: [np.concatenate(forms(p), axis=axis)])


def interleaved(paths: tuple[str, str], name: str, parts: int = 1) -> Rule:
    """Two parameters (…, F) that take turns on the last axis of one tensor (…, 2F). parts: see `Rule`."""

    def shapes(s):
        return [(*s[0][:-1], 2 * s[0][-1])]

    def write(params):
        return [np.stack(list(params), axis=-1).reshape(*params[0].shape[:-1], -1)]

    return Rule(paths, (name,), shapes, lambda s, t: [t[0][..., ::2], t[0][..., 1::2]], write, parts)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as {"a/b/c": leaf}."""
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat_tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(dict(flat_tree), sep="/")


def expected(rules: Iterable[Rule], parameters: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shape of every tensor that the rules name, from the shapes of the parameters by path.

    A rule list that doesn't cover each parameter once is a defect of ours, and asserts.
    """
    rules = list(rules)
    paths = [path for rule in rules for path in rule.paths]
    missing, extra = parameters.keys() - set(paths), set(paths) - parameters.keys()
    assert len(paths) == len(set(paths)) and not missing and not extra, f"rules: missing {missing}, extra {extra}"
    found: dict[str, Shape] = {}
    for rule in rules:
        for name, shape in zip(rule.names, rule.shapes([parameters[path] for path in rule.paths]), strict=True):
            assert name not in found, f"two rules read {name}"
            found[name] = tuple(shape)
    return found


def check(source: str, wanted: Mapping[str, Shape], present: Mapping[str, Shape]) -> None:
    """UserError unless `present` has exactly the tensors `wanted`, in their shapes; names the first few that differ."""
    missing = [name for name in wanted if name not in present]
    unused = [name for name in present if name not in wanted]
    wrong = [
        f"{name} is {present[name]}, the config asks for {shape}"
        for name, shape in wanted.items()
        if name in present and present[name] != shape
    ]
    faults = []
    for label, names in (("missing", missing), ("unused", unused), ("wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{len(names)} {label}: {', '.join(names[:3])}{more}")
    if faults:
        raise UserError(f"{source} does not fit its config.json; tensors {'; '.join(faults)}")
