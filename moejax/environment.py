"""What a run ran on: packages, commit and devices, and the peak rates of known chips."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from moejax import data_cache, dotted

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")
# Dense bf16 FLOP/s of one jax device, from the makers' data sheets; the first name found in device_kind counts.
# A TPU7x chip (2.307e15) is two jax devices. A T4 has no bf16: its rate is float16's.
PEAKS = {
    "h100 pcie": 756e12, "h100 nvl": 835e12, "h100": 989e12, "h200": 989e12, "a100": 312e12, "l40": 362e12,
    "l4": 121e12, "t4": 65e12, "tpu v4": 275e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12, "tpu v5": 459e12,
    "tpu v6": 918e12, "tpu7x": 1153.5e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device by jax's `device_kind`; None where it is not known."""
    kind = device_kind.lower()
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def keep_compiled_programs() -> None:
    """Keeps XLA's compiled programs under $MOEJAX_CACHE/xla, unless JAX_COMPILATION_CACHE_DIR says where (or "")."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(data_cache.default_folder(), "xla"))


def record(router: str | None = None) -> dict[str, Any]:
    """This process's command, packages, git commit, `code_hash` and devices, fit for JSON."""
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(Path(__file__).parent),
        "code": code_hash(router),
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_hash(router: str | None) -> str:
    """Of the files that a run's numbers come from: moejax, pallas_kernels and the one that `router` names."""
    root = Path(__file__).parent.parent
    files = sorted(file for package in ("moejax", "pallas_kernels") for file in (root / package).rglob("*.*"))
    named = [(str(file.relative_to(root)), file) for file in files if file.suffix in (".py", ".json")]
    file = dotted.file_of(router) if router else None
    if file is not None:
        named.append(("router", file))
    found = hashlib.sha256()
    for name, file in named:
        found.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that holds `folder`, "+changes" behind it if files differ; None outside of one."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
