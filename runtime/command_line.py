"""From the command line to a `Config`.

A config file is Python: `config = Config(...)`, with what differs from configs/base.py. It is optional:

    train_grpo.py --config configs/arithmetic_cpu.py --learning_rate 3e-4
    train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data problems.csv --reward my_reward.py:score

Config files are code: run only those that you trust.
"""

import argparse
import dataclasses
import difflib
import runpy
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from configs.base import Config
from configs.checks import LIMITS


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are ValueErrors of one line."""

    def error(self, message: str) -> None:
        raise ValueError(message)

    def add_argument(self, *names: str, group: str = "", **options: Any) -> argparse.Action:
        """Adds an option to the last section of `--help`; `group` begins a new one. `Config` checks limits."""
        options = {name: value for name, value in options.items() if name not in LIMITS}
        if group:
            self.section = self.add_argument_group(group)
        if hasattr(self, "section"):
            return self.section.add_argument(*names, **options)
        return super().add_argument(*names, **options)


def parse_config(arguments: list[str], description: str) -> Config:
    """The `Config` of a command line: that of the file after `--config`, changed by each `--field value`.

    Raises ValueError or OSError (one line); `--help` prints all fields and exits.
    """
    parser = OneLineParser(Config, description=description, allow_abbrev=False)
    parser.add_argument("--config", default="", help="A file of configs/.", group="The config file")
    known, _ = parser.parse_known_args(arguments)
    if "--resume=" in arguments:  # of an empty variable; it would start anew
        raise ValueError("--resume= names no checkpoint; leave out the = for the newest one")
    config = read_config_file(known.config) if known.config else Config()
    return parse_over(dataclasses.asdict(config), parser, arguments)


def parse_over(settings: dict[str, Any], parser: OneLineParser, arguments: list[str]) -> Config:
    """The `Config` of these settings, changed by the command line's options."""
    parser.set_defaults(**settings)
    lists = [field.name for field in dataclasses.fields(Config) if field.default_factory is not dataclasses.MISSING]
    for name in lists:  # argparse would keep only the last one
        if sum(argument.split("=")[0].replace("-", "_") == f"__{name}" for argument in arguments) > 1:
            raise ValueError(f"--{name} is given twice; give it once, with several values after it")
    config, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        options = [action.option_strings[0] for action in parser._actions]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1, cutoff=0.0)
        raise ValueError(f"unknown option {unknown[0]!r}; the nearest there is: {nearest[0]}")
    return config


def read_config_file(path: str) -> Config:
    """Runs a config file and returns its `config`. Raises ValueError or FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path!r}; see configs/ for those there are")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can import configs.base from anywhere
    try:
        config = runpy.run_path(path).get("config")
    except (Exception, SystemExit) as error:
        raise ValueError(f"config file {path!r} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, Config):
        raise ValueError(f"config file {path!r} must define config = Config(...), found {type(config).__name__}")
    return config
