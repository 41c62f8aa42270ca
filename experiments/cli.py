"""What the entry points share: flags, help, and one line for a user's mistake.

  _CONFIG = cli.config_flag()
  def main() -> None: ...
  if __name__ == "__main__":
      cli.run(main)

A script's docstring is its help and shows an example that works. A `UserError`, a misspelt or mistyped flag and a
config file that isn't there or fails end the script with one line, `error: …`, and status 2; Ctrl-C ends it quietly
with 130. Any other exception is a bug and keeps its traceback.
"""

import ast
import dataclasses
import logging
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

import tqdm
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moejax import distributed, environment, host_memory, schema
from moejax.config import Config
from moejax.errors import UserError

flags.disclaim_key_flags()  # the flags defined here belong to the script that asks for them
ABLATION_FIELDS = ("arms", "seeds", "classes")
BASE = "experiments/configs/base.py"


def config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[ConfigDict]:
    """--config=FILE.py and its overrides, --config.train.steps=200; None is a value too: --config.model.moe=None."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(); --config.FIELD=VALUE changes a field of it.", flag_values
    )


def run(main: Callable[[], Any], picks: bool = True) -> None:
    """Parses the flags and runs `main`; never returns to a caller who would go on after an error.

    picks: whether it is said which implementation each part picked by platform.
    """
    sys.unraisablehook = _unraisable(sys.unraisablehook)
    host_memory.keep_freed_memory()
    _set_up_logging(picks)
    environment.keep_compiled_programs()
    try:
        if {"--help", "-help", "-h", "--helpshort", "-helpshort"} & set(sys.argv[1:]):
            print((sys.modules["__main__"].__doc__ or "").strip(), flags.FLAGS.main_module_help(), sep="\n\nFlags:")
            sys.exit(0)
        app.run(lambda _: main(), flags_parser=parse)
    except UserError as error:
        line = " ".join(str(error).split())
        print("error:", line, file=sys.stderr)
        distributed.leave(2, line)
        sys.exit(2)
    except KeyboardInterrupt:
        distributed.leave(130, "Ctrl-C")
        sys.exit(130)
    except SystemExit as error:  # app.run ends with one where all went well
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        distributed.leave(code, f"exit status {code}")
        raise
    except Exception as error:
        distributed.leave(1, f"{type(error).__name__}: {error}".splitlines()[0], error)
        raise


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the command line into `flag_values`.

    Raises:
      UserError: whatever is wrong with it.
    """
    for path, value in overrides(argv):
        check_override(path, value)
    files = config_files(argv)
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times ({', '.join(files)}); give one file, and change its "
                        "fields with --config.FIELD=VALUE")  # fmt: skip
    try:
        rest = flag_values(_none_spelled(argv), known_only=False)
        if "config" in flag_values and flag_values["config"].value is not None:
            hasattr(flag_values["config"].value, "model")  # a file that couldn't be opened raises only now
    except UserError:
        raise
    except Exception as error:  # the config file is anyone's code
        raise UserError(_in_config_file(error, files) or _explain(error, argv)) from error
    if "config" in flag_values and flag_values["config"].value is None:
        raise UserError("--config is missing; give one of experiments/configs/*.py or your own, as --help shows")
    if "workdir" in flag_values and flag_values["workdir"].value == "":  # a shell's variable that isn't set
        raise UserError("--workdir= is empty; give a folder, or . for this one")
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} belongs to no flag; write --flag=value (see --help)")
    return rest


def config_files(argv: Sequence[str]) -> list[str]:
    """What --config=FILE or --config FILE name, without the ":argument" of get_config."""
    found = []
    for i, argument in enumerate(argv):
        if argument == "--":
            break
        match = re.match(r"--?config(?:=(.*))?$", argument, re.DOTALL)
        if match:
            found.append(match[1] if match[1] is not None else next(iter(argv[i + 1 : i + 2]), ""))
    return found


def overrides(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """(dotted path, value) of every --config.path=value or --config.path value; the value of a bare flag is None."""
    found: list[tuple[str, str | None]] = []
    for i, argument in enumerate(argv):
        if argument == "--":
            break
        match = re.match(r"--?(no)?config\.([^=]*)(?:=(.*))?$", argument, re.DOTALL)
        if match:
            following = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
            found.append((match[2], match[3] if match[3] is not None else following))
    return found


def check_override(path: str, value: str | None) -> None:
    """Raises UserError for a field that doesn't exist (naming the nearest) or a value of another type."""
    if path.split(".")[0] in ABLATION_FIELDS:
        return
    hint = schema.field_type(Config, path)
    inner = schema.without_none(hint)
    if value is None or inner is Any or (value in ("None", "none") and inner is not hint):
        return
    if inner is bool:
        given: Any = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    elif inner in (int, float):
        try:
            given = inner(value)
        except ValueError:
            given = value
    elif inner is str or typing.get_origin(inner) is typing.Literal:
        given = value
    else:
        try:
            given = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            given = value
        if typing.get_origin(inner) is tuple and not isinstance(given, tuple | list):
            return  # one item of a tuple: --config.train.profile_steps=3 --config.train.profile_steps=4
    schema.parse_value(hint, given, path, Config)


def _in_config_file(error: BaseException | None, files: Sequence[str]) -> str | None:
    """`config file FILE, line N: what went wrong` where `error` came out of its code, else None."""
    for file in files:
        path = os.path.abspath(file.split(":")[0])
        if "has no attribute 'get_config'" in str(error):
            return f"config file {file} has no get_config(); write one that returns a ConfigDict, as in {BASE}"
        while error is not None:
            lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if _is(frame.f_code.co_filename, path)]
            if isinstance(error, SyntaxError) and error.filename and _is(error.filename, path):
                lines, text = [error.lineno or 1], error.msg
            else:
                text = str(error)
            if lines:
                return f"config file {file}, line {lines[-1]}: {type(error).__name__}: {text}"
            error = error.__cause__ or error.__context__
    return None


def _is(file: str, path: str) -> bool:
    return os.path.abspath(file) == path


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """An error of absl or config_flags in one line that says what to do."""
    text = str(error)
    given = dict(overrides(argv))
    if "Configuration is not available" in text or "Failed loading config file" in text:
        files = config_files(argv) or ["--config"]
        return f"config file {files[0]} can't be opened; give one of experiments/configs/*.py or your own"
    if isinstance(error, flags.Error) and "must have a value other than None" in text:
        return " ".join(text.split()).removeprefix("flag ")  # a flag that is required
    if any(path.startswith("model.moe.") for path in given) and ("None" in text or "NoneType" in text):
        return (
            "config.model.moe is None (a dense model), so its fields can't be set; start from a sparse config such as "
            "--config=experiments/configs/fine_grained.py"
        )
    for path, value in given.items():
        if ".router_options." in path:
            name = path.rpartition(".")[2]
            return f"set options of the router together: --config.model.moe.router_options=\"{{'{name}': {value}}}\""
    for path in given:
        if path.startswith("arms.") and isinstance(error, AttributeError | KeyError):
            return (
                f"--config.{path}: an arm has only the fields in which it differs, so a flag can set no other; change "
                "a copy of the config file, or the field of all arms with --config.FIELD=VALUE"
            )
    unknown = re.search(r"Unknown command line flag '([^']*)'", text)
    if unknown and unknown[1].partition(".")[0] in {field.name for field in dataclasses.fields(Config)}:
        return f"--{unknown[1]} is no flag; a field of the config is --config.{unknown[1]}"
    if given and not config_files(argv):
        return f"--config.{next(iter(given))} is given without --config=FILE.py before it"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1 if "Traceback" in text else 0].strip() if lines else type(error).__name__


def _none_spelled(argv: Sequence[str]) -> list[str]:
    """argv with None for none where a field of the config may be None: elsewhere that is a text, as in model.remat."""
    found = list(argv)
    for path, value in overrides(argv):
        if value != "none" or path.split(".")[0] in ABLATION_FIELDS:
            continue
        hint = schema.field_type(Config, path)
        for i, argument in enumerate(found):
            name, _, given = argument.lstrip("-").partition("=")
            if name == f"config.{path}" and schema.without_none(hint) is not hint:
                at = i if given else i + 1
                found[at] = found[at].removesuffix("none") + "None"
    return found


class _OrNone(flags.ArgumentParser):
    """A parser that takes None too: which fields may be None is the schema's to say."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return f"{self._parser.flag_type()} or None"


class _DictParser(flags.ArgumentParser):
    def parse(self, argument: Any) -> ConfigDict:
        return argument if isinstance(argument, ConfigDict) else ConfigDict(ast.literal_eval(argument))

    def flag_type(self) -> str:
        return "dict"


_PARSERS: dict[type, flags.ArgumentParser] = {
    int: flags.IntegerParser(), float: flags.FloatParser(), str: flags.ArgumentParser(), ConfigDict: _DictParser()
}  # fmt: skip
for _type, _parser in _PARSERS.items():
    config_flags.register_flag_parser_for_type(_type, _OrNone(_parser))


def _unraisable(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keeps quiet about the callbacks that a failed write of a checkpoint leaves behind: it is told in one line."""

    def filtered(event: Any) -> None:
        if "Event loop is closed" not in str(event.exc_value):
            hook(event)

    return filtered


class _Lines(logging.Handler):
    """`warning: …`, or the message alone where it only informs, by process 0; above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno <= logging.INFO and sys.modules["jax"].process_index():
            return
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.tqdm.write(level + record.getMessage(), file=sys.stderr)


def _set_up_logging(picks: bool) -> None:
    for name in ("moejax", "pallas_kernels"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.addHandler(_Lines())
        logger.propagate = False
    if picks:
        for name in ("pallas_kernels", "moejax.exchange", "moejax.attention"):
            logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every backend that isn't there
