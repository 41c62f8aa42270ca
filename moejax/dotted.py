"""Dotted names instead of registries: "moejax.routing:switch" and "path/to/file.py:route" become the function."""

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.errors import UserError


def resolve(dotted: str) -> Callable[..., Any]:
    """The function named by "package.module:name", "module:name" (also in the current directory) or "file.py:name".

    Raises UserError when the form is wrong, the module or the name doesn't exist (naming the nearest) or the thing is
    not callable. An error inside the user's own file passes through with its traceback.
    """
    module_name, colon, name = dotted.rpartition(":") if isinstance(dotted, str) else ("", "", "")
    if not (colon and module_name and name):
        raise UserError(f"{dotted!r} is not of the form 'module:function', for example 'moejax.routing:switch'")
    module = _from_file(module_name, dotted) if module_name.endswith(".py") else _from_path(module_name, dotted)
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise UserError(f"{dotted!r}: {module_name} has no {part!r}{_nearest(part, target)}")
        target = getattr(target, part)
    if not callable(target):
        raise UserError(f"{dotted!r} is a {type(target).__name__}, not a function: name a function")
    return target


def file_of(dotted: str) -> Path | None:
    """The file that `resolve` looks a name up in; None where its module has none."""
    module_name = dotted.rpartition(":")[0]
    if module_name.endswith(".py"):
        return Path(module_name).resolve()
    if module_name in sys.modules:  # __main__, a notebook's, has neither a file nor a spec
        file = getattr(sys.modules[module_name], "__file__", None)
    else:
        spec = importlib.util.find_spec(module_name)
        file = None if spec is None else spec.origin
    return None if file is None else Path(file)


def _from_path(module_name: str, dotted: str) -> Any:
    here = os.getcwd()
    # a console script's sys.path lacks the current directory, where a user's own file lies
    sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # only when the named module itself is missing; a missing import inside it is that file's own error
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise UserError(f"{dotted!r}: there is no module {error.name!r} here or installed: check the name") from None
    except (ValueError, TypeError):
        raise UserError(f"{dotted!r}: {module_name!r} is not the name of a module") from None
    finally:
        sys.path.remove(here)


def _from_file(file_name: str, dotted: str) -> Any:
    path = Path(file_name).resolve()
    if not path.is_file():
        raise UserError(f"{dotted!r}: there is no file {path}: check the path")
    # one module per file, however often it is resolved: a function's identity is part of jit's cache key
    key = f"moejax_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def _nearest(name: str, module: Any) -> str:
    own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
