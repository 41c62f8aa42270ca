"""Asynchronous checkpoints (orbax): atomic, checked before they are trusted, readable on another mesh.

    DIRECTORY/checkpoints/300/checkpoint.json    step, data position, the run's config, the size of every file below
                              params/ router_state/ opt_state/    one orbax tree each, so parameters restore alone

A checkpoint is written beside its place and renamed into it when the last byte of `checkpoint.json` stands, so a
folder named by a number was whole once; `restore` compares the sizes of its files before it reads, and goes back to
the newest one that is still whole. A save that fails (a full disk) costs that save and a warning line, nothing older.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moejax.errors import UserError, writing

PyTree = Any
MANIFEST = "checkpoint.json"
_log = logging.getLogger(__name__)
# orbax logs its life's story, tracebacks included, through absl; what matters is raised, and told here in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
# Of several reads or writes that fail together one is raised; asyncio would tell of the others with a traceback each.
_TOLD = ("OCDBT", "OSError(28")  # tensorstore's words, and Python's for a full disk
logging.getLogger("asyncio").addFilter(
    lambda record: "never retrieved" not in record.getMessage() or not any(t in record.getMessage() for t in _TOLD)
)
_END = 4096  # bytes
_ORBAX_OWN = ("_CHECKPOINT_METADATA", "commit_success.txt")  # rewritten after the manifest, never needed


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: trees by name, as the targets asked; `data` and `config` are what was given to `save`."""

    path: Path
    step: int
    trees: dict[str, PyTree]
    data: dict[str, Any]
    config: dict[str, Any]


class Checkpointer:
    """Writes a run's checkpoints in the background and keeps the newest `keep`. Close it, or use it as a context.

    directory: the run's workdir; checkpoints go to directory/checkpoints. What a killed run left half-written there is
    removed. start: the step that the run goes on from; the first save puts later folders aside, for `restore` went past
    them as damaged. Every process of a run makes one and calls every method. Raises UserError where it can't begin.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, *, start: int | None = None):
        if keep < 1:
            raise UserError(f"keep={keep}: keep at least one checkpoint")
        self.root = Path(directory).absolute() / "checkpoints"
        self.keep = keep
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._known = start  # the newest step that is known to be whole: restored from, or saved by this object
        options = ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        if jax.process_index() == 0:
            with writing(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            for entry in self.root.iterdir():
                if ".orbax-checkpoint-tmp" in entry.name or entry.name.endswith(".old"):
                    shutil.rmtree(entry, ignore_errors=True)

    def save(
        self, step: int, trees: Mapping[str, PyTree], *, data: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Begins to write the trees of `step`; returns once they are copied to the host, so buffers may be donated.

        trees: pytrees of arrays by name (params, router_state, opt_state); empty ones are left out. data, config: JSON.
        A save before this one that failed, or this one failing at once, is one warning line and not an error. What this
        object has saved, or the run went on from, is not written again; a folder of `step` that it doesn't know is put
        aside.
        """
        self.wait()
        if step == self._known:
            return
        manifest = {"step": step, "data": dict(data), "config": dict(config)}
        items = {name: ocp.args.StandardSave(_boxed(tree)) for name, tree in trees.items() if jax.tree.leaves(tree)}
        self._pending = (step, manifest)
        try:
            if jax.process_index() == 0:
                self._make_room(step)
            self._writer.save(self.root / str(step), args=ocp.args.Composite(**items))
        except OSError as error:
            self._give_up(error)

    @property
    def newest(self) -> str:
        """The newest checkpoint in words, for the line with which a run stops."""
        return "there is no checkpoint yet" if not self._known else f"the checkpoint of step {self._known} is kept"

    def saved(self, step: int) -> bool:
        """Whether the checkpoint of `step` stands, after waiting for the save under way."""
        self.wait()
        return self._known == step

    def wait(self) -> bool:
        """Waits for the save under way; False if it failed (a warning line says so)."""
        if self._pending is None:
            return True
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # tensorstore tells a full disk as a ValueError
            self._give_up(error)
            return False
        (self._known, _), self._pending = self._pending, None
        if jax.process_index() == 0:
            oldest = min(_whole_steps(self.root)[-self.keep :], default=0)
            for old in (found for found in _steps(self.root) if found < oldest):
                _remove(self.root / str(old))
        return True

    def close(self) -> bool:
        """Waits for the save under way and lets go of orbax's threads; False if that save failed."""
        done = self.wait()
        self._writer.close()
        return done

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_room(self, step: int) -> None:
        """A run that went back to an older checkpoint meets the damaged ones it went past: they are put aside.

        Their files may have the right sizes: `restore` alone has read them.
        """
        first = step if self._known is None else min(step, self._known + 1)
        for later in [found for found in _steps(self.root) if found >= first]:
            aside = self.root / f"{later}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.root / str(later)).rename(aside)

    def _write_manifest(self) -> None:
        """orbax calls this on its thread of process 0 when all is written, just before it renames the folder."""
        assert self._pending is not None
        step, manifest = self._pending
        (folder,) = self.root.glob(f"{step}.orbax-checkpoint-tmp*")
        text = json.dumps({**manifest, "files": file_sizes(folder)}, indent=1)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _give_up(self, error: Exception) -> None:
        step, self._pending = self._pending[0] if self._pending else -1, None
        # orbax raises one error a call: the others of this save would be laid to the next one, or to `close`.
        for _ in range(8):
            with contextlib.suppress(Exception):
                self._writer.wait_until_finished()
                break
        if jax.process_index() == 0:
            for half in self.root.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        whole = _whole_steps(self.root)
        newest = f"the newest is step {whole[-1]}" if whole else "there is none yet"
        _log.warning("checkpoint of step %d was not written (%s); %s in %s", step, _reason(error), newest, self.root)


def restore(directory: str | os.PathLike[str], targets: Mapping[str, PyTree] | None = None) -> Restored | None:
    """The newest whole checkpoint of a run, or None where there is none at all.

    directory: a workdir, its `checkpoints` folder, one checkpoint's folder, or a copy of any of them.
    targets: for each tree that is wanted a pytree of jax.ShapeDtypeStruct (with shardings: onto whatever mesh they
      name, not only the one it was saved from). A target with no leaves comes back as it is. None: params and
      router_state as numpy arrays.

    Raises:
      UserError: there are checkpoints and none is whole, or the newest whole one is of another model or lacks a tree.
    """
    damaged: list[str] = []
    _say_nothing_of_late_reads()
    for path in reversed(_candidates(Path(directory))):
        manifest, fault = _inspect(path)
        if manifest is not None:
            try:
                _check_trees(path, manifest, targets or {})
                _check_shapes(path, targets or {})
                trees = _read(path, targets)
            except UserError:
                raise
            except Exception as error:  # bytes that changed and kept their number: tensorstore has many words for it
                fault = _reason(error)
            else:
                if damaged:
                    _log.warning("%s; went back to step %d", "; ".join(damaged), manifest["step"])
                return Restored(path, manifest["step"], trees, manifest["data"], manifest["config"])
        damaged.append(f"checkpoint {path} is damaged ({fault})")
    if damaged:
        raise UserError(f"no whole checkpoint in {directory}: {'; '.join(damaged)}")
    return None


@functools.cache
def _say_nothing_of_late_reads() -> None:
    """Where one of orbax's reads fails, those that end later find its event loop closed: tensorstore's threads would
    print a traceback for each, beside the one line that says what is damaged. All else goes where it went."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        frames = [] if error is None else traceback.extract_tb(error.__traceback__)
        late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (late and any(frame.name == "call_soon_threadsafe" for frame in frames)):
            before(unraisable)

    sys.unraisablehook = hook


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of which a run has checkpoints, whole or not, oldest first."""
    return _steps(Path(directory) / "checkpoints")


def fingerprint(directory: str | os.PathLike[str] | None) -> str | None:
    """A hash that tells the newest checkpoint below `directory` from another: of its manifest and each file's ends."""
    places = [] if directory is None else [p for p in _candidates(Path(directory)) if _inspect(p)[0] is not None]
    if not places:
        return None
    found = hashlib.sha256()
    for name in (MANIFEST, *sorted(file_sizes(places[-1]))):
        with open(places[-1] / name, "rb") as file:
            head = file.read(_END)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
            found.update(name.encode() + b"\0" + head + file.read())
    return found.hexdigest()[:12]


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The config in the newest whole checkpoint below `directory` (see `restore` for what that may be), None
    where there is none.

    Raises:
      UserError: there are checkpoints and none is whole.
    """
    faults = []
    for path in reversed(_candidates(Path(directory))):
        manifest, fault = _inspect(path)
        if manifest is not None:
            return manifest["config"]
        faults.append(f"{path.name}: {fault}")
    if faults:
        raise UserError(f"no whole checkpoint in {directory}: {'; '.join(faults)}")
    return None


def _read(path: Path, targets: Mapping[str, PyTree] | None) -> dict[str, PyTree]:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        if targets is None:
            present = [name for name in ("params", "router_state") if (path / name).is_dir()]
            return {name: _read_numpy(path / name) for name in present}
        wanted = {name: tree for name, tree in targets.items() if jax.tree.leaves(tree)}
        items = {name: ocp.args.StandardRestore(_boxed(tree)) for name, tree in wanted.items()}
        found = reader.restore(path, args=ocp.args.Composite(**items)) if items else {}
        return {name: _unboxed(found[name], tree) if name in wanted else tree for name, tree in targets.items()}


def _boxed(tree: PyTree) -> PyTree:
    """orbax takes no bare array as a tree."""
    return {"array": tree} if jax.tree_util.all_leaves([tree]) else tree


def _unboxed(found: PyTree, target: PyTree) -> PyTree:
    return found["array"] if jax.tree_util.all_leaves([target]) else found


def _read_numpy(path: Path) -> PyTree:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _check_trees(path: Path, manifest: Mapping[str, Any], targets: Mapping[str, PyTree]) -> None:
    """A tree that was never saved is no damage: say which."""
    there = sorted({name.split("/")[0] for name in manifest["files"]})
    for name, tree in targets.items():
        if jax.tree.leaves(tree) and name not in there:
            raise UserError(f"checkpoint {path} holds no {name}, which this config needs; it holds {', '.join(there)}")


def _check_shapes(path: Path, targets: Mapping[str, PyTree]) -> None:
    """Another model's checkpoint is no damage: say which parameter differs."""
    if not jax.tree.leaves(targets.get("params")) or not (path / "params" / "_METADATA").is_file():
        return
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(path / "params").item_metadata
    if found is None:
        raise ValueError("the metadata of params can't be read")
    stored = _shapes(found.tree)
    wanted = _shapes(targets["params"])
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {path} is of another model: parameter {name} is {stored.get(name, 'missing')} there, "
                f"{wanted.get(name, 'missing')} in this config"
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _candidates(directory: Path) -> list[Path]:
    """Folders that claim to be checkpoints, oldest first."""
    if (directory / MANIFEST).is_file():
        return [directory.absolute()]
    root = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    return [root.absolute() / str(step) for step in _steps(root)]


def _inspect(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest if every file has the size it was written with; else None and what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        now = file_sizes(path)
        for name, size in manifest["files"].items():
            if now.get(name) != size:
                return None, f"{name} is missing" if name not in now else f"{name} has {now[name]} of {size} bytes"
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"{MANIFEST} can't be read"
    return manifest, ""


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint's folder by its path there, as the manifest lists them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    skipped = (*_ORBAX_OWN, MANIFEST)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files if file.name not in skipped}


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdecimal() and entry.is_dir())


def _whole_steps(root: Path) -> list[int]:
    return [step for step in _steps(root) if _inspect(root / str(step))[0] is not None]


def _remove(path: Path) -> None:
    """Renamed first, so that a kill while it is being deleted leaves nothing that looks like a checkpoint."""
    gone = path.with_name(path.name + ".old")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The telling part of an error in one line: tensorstore appends its whole state."""
    text = str(error)
    if "No space left" in text:
        return "no space left on the disk"
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]
