"""What a run writes beside its checkpoints, and the line it shows while it runs.

    WORKDIR/config.json          the resolved config
            environment.jsonl    one line per start: command, packages, git commit, devices
            metrics.jsonl        one line per logged step (FIELDS); evaluations.jsonl likewise per evaluation
            expert_load.jsonl    tokens per expert since the last line, (MoE layers, E)
            tensorboard/  profile/

The jsonl files are append-only. After a resume each step is there once: `cut_after` drops what the checkpoint has not
seen, and the half line that a kill may leave.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from moejax import accounting, checkpoint, environment, tensorboard
from moejax.config import Config, from_config_dict, to_dict
from moejax.errors import UserError, writing

FIELDS = (
    "step", "loss", "total_loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second",
    "load_balance_loss", "router_z_loss", "mtp_loss", "max_violation", "max_violation_per_layer", "dead_experts",
    "dropped_fraction", "overflow_fraction", "routing_entropy",
)  # fmt: skip
FILES = METRICS, EVALUATIONS, LOADS = "metrics.jsonl", "evaluations.jsonl", "expert_load.jsonl"
QUIET_SECONDS = 15.0  # between progress lines where there is no terminal to redraw
_log = logging.getLogger(__name__)


class Writer:
    """Writes one run's files and shows its progress; a context. Only process 0 of several does anything.

    total_steps: where the progress bar ends. devices: of the mesh, for MFU. progress: show a bar (a line now and then
    where stderr is no terminal); without it the run says nothing. flops_per_token: of a training step, where the model
    is not the one of config.model.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: Config,
        *,
        total_steps: int,
        devices: int = 1,
        progress: bool = True,
        flops_per_token: float | None = None,
    ):
        self.workdir, self.total_steps = Path(workdir), total_steps
        self.main = jax.process_index() == 0
        self.progress = progress and self.main
        self._profile = config.train.profile_steps
        self._profiling = False
        self._start, self._said = 0, -QUIET_SECONDS
        self._step_tokens = config.data.batch_size * config.data.sequence_length
        self._bar: tqdm.tqdm | None = None
        self._board: tensorboard.Board | None = None
        self.other_code = False  # than at the run's last start
        if flops_per_token is None:
            flops_per_token = accounting.account(config.model, config.data.sequence_length).train_flops_per_token
        peak = environment.peak_flops(jax.devices()[0].device_kind)
        self._mfu_per_rate = None if peak is None else flops_per_token / (peak * devices)
        if self.main:
            with writing(self.workdir):
                self.workdir.mkdir(parents=True, exist_ok=True)
            write_whole(self.workdir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
            record = environment.record(None if config.model.moe is None else config.model.moe.router)
            self.other_code = _last_code(self.workdir / "environment.jsonl") not in (None, record["code"])
            _append(self.workdir / "environment.jsonl", record)

    def has_lines(self) -> bool:
        """Whether an earlier call logged anything."""
        return self.main and (self.workdir / METRICS).is_file() and any(read_lines(self.workdir / METRICS))

    def cut_after(self, step: int) -> None:
        """The run continues after `step`: later lines and half lines go, and the progress begins there."""
        self._start = step
        if not self.main:
            return
        for name in FILES:
            path = self.workdir / name
            if path.exists():
                kept = {line["step"]: line for line in read_lines(path) if line["step"] <= step}
                write_whole(path, "".join(json.dumps(line) + "\n" for line in kept.values()))

    def line(self, values: Mapping[str, Any], load: np.ndarray | None = None) -> None:
        """Appends one step's values (those of FIELDS) and its loads (MoE layers, E), and moves the progress on."""
        if not self.main:
            return
        values = plain(values)
        _append(self.workdir / METRICS, values)
        if load is not None:
            _append(self.workdir / LOADS, {"step": values["step"], "load": np.asarray(load).tolist()})
        self._tensorboard(values["step"], values)
        self._show(values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends an evaluation and says it."""
        if not self.main:
            return
        values = {"step": step, **plain(values)}
        _append(self.workdir / EVALUATIONS, values)
        self._tensorboard(step, {f"eval/{name}": value for name, value in values.items()})
        shown = ", ".join(f"{n} {values[n]:.4f}" for n in ("loss", "bits_per_byte", "max_violation") if values.get(n))
        self.say(f"step {step}: held-out {shown}")

    def say(self, text: str) -> None:
        """One line for the reader of the run, beside the progress bar."""
        if self.progress:
            tqdm.tqdm.write(text, file=sys.stderr)
        else:
            _log.info(text)

    def profile(self, step: int) -> None:
        """Call before each step: traces steps train.profile_steps = (first, last) into workdir/profile."""
        if not self._profile:
            return
        if self._profile[0] <= step <= self._profile[1] and not self._profiling:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._profiling = True
        elif step == self._profile[1] + 1:
            self._stop_profile()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_profile()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def _stop_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
            self.say(f"profile of steps {self._profile[0]} to {self._profile[1]}: {self.workdir / 'profile'}")

    def _tensorboard(self, step: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            self._board = tensorboard.Board(self.workdir / "tensorboard", first=self._start + 1)
        self._board.add(step, {name: value for name, value in values.items() if not name.endswith("step")})

    def _show(self, values: Mapping[str, Any]) -> None:
        if not self.progress:
            return
        text, step = self.summary(values), values["step"]
        if sys.stderr.isatty():
            if self._bar is None:
                form = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"
                self._bar = tqdm.tqdm(total=self.total_steps, initial=self._start, bar_format=form, file=sys.stderr)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= QUIET_SECONDS or step >= self.total_steps:
            rate = values.get("tokens_per_second")
            left = f", {duration((self.total_steps - step) * self._step_tokens / rate)} left" if rate else ""
            self.say(f"step {step}/{self.total_steps}  {text}{left}")
            self._said = now

    def summary(self, values: Mapping[str, Any]) -> str:
        """Loss, tokens/s, MFU where the chip's peak is known, MaxVio where the model is sparse, and overflow if any."""
        parts = []
        if values["loss"] is not None:
            parts.append(f"loss {values['loss']:.4f}")
        rate = values.get("tokens_per_second")
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
            if self._mfu_per_rate is not None:
                parts.append(f"MFU {self._mfu_per_rate * rate:.1%}")
        if values.get("max_violation") is not None:
            parts.append(f"MaxVio {values['max_violation']:.2f}")
        if values.get("overflow_fraction"):
            parts.append(f"{values['overflow_fraction']:.2%} of choices overflow in the exchange")
        return ", ".join(parts)


def read_config(workdir: str | os.PathLike[str]) -> Config | None:
    """The config that a run stored, or its checkpoint did where that is all there is; None for a new workdir.

    Raises:
      UserError: config.json can't be read.
    """
    path = Path(workdir) / "config.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not a table of fields")
        except (OSError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
            raise UserError(f"{path} is not whole ({error}); restore it or give another --workdir") from error
        try:
            return from_config_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    stored = checkpoint.read_config(workdir)
    return None if stored is None else from_config_dict(stored.get("run", stored))


def _last_code(path: Path) -> str | None:
    """`code` of the last line of an environment.jsonl, None where there is none."""
    try:
        last = path.read_text(encoding="utf-8").splitlines()[-1]
        return json.loads(last).get("code")
    except (OSError, IndexError, ValueError):
        return None


def read_lines(path: str | os.PathLike[str]) -> Iterable[dict[str, Any]]:
    """The whole lines of a jsonl file as dicts; what is no whole line is passed over."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text) if text.endswith("\n") else None
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and "step" in line:
                yield line


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and arrays as JSON has them: NaN and infinity as None, arrays as lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return convert(np.asarray(value).tolist())
        return value

    return {name: convert(value) for name, value in values.items()}


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a kill leaves the old text or the new. UserError where it can't."""
    beside = path.with_name(path.name + ".new")
    with writing(path):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
