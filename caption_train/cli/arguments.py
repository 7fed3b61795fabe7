"""Makes a command line from a dataclass: parser, `--config file.yaml`, checks."""

import argparse
import itertools
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from caption_train.cli.config_file import read_config_file
from caption_train.cli.flag_names import guess_flag
from caption_train.config.fields import PARSERS, CountOrAuto, kind_of, path
from caption_train.errors import UsageError


def parse_options(
    options_class: type,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    positionals: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    omit: Sequence[str] = (),
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Read the flags of a command: the command line wins, then `--config`, `defaults` and the class.

    Args:
        options_class: the dataclass whose fields are flags.
        argv: the flags; by default those of this process.
        prog: name of the script, for `--help`.
        description: text above the flags in `--help`.
        positionals: fields that may also be given by position.
        defaults: name → default that replaces the field's.
        omit: fields that are not flags of this command.
        choices: name → allowed values that replace the field's.

    Raises:
        UsageError: lists everything that is wrong, one line each.
    """
    flags = {f.name: f for f in fields(options_class) if "help" in f.metadata and f.name not in omit}
    defaults = {name: _default_of(f) for name, f in flags.items()} | dict(defaults or {})
    choices = {name: f.metadata["choices"] for name, f in flags.items()} | dict(choices or {})
    parser = _build_parser(options_class, flags, prog, description, positionals, defaults, choices)
    argv = list(sys.argv[1:] if argv is None else argv)
    _refuse_unknown_flags(parser, argv, flags)
    argv = _complete_bare_flags(argv, flags)
    given = _merge_positionals(vars(parser.parse_intermixed_args(argv)), positionals)
    config_path = given.pop("config", None)
    config = read_config_file(config_path, options_class, flags, choices) if config_path else {}
    for name, flag in flags.items():
        if name in given and flag.metadata["more"] not in given:
            config.pop(flag.metadata["more"], None)  # They follow a value that is replaced.
    sources = dict.fromkeys(config, str(config_path)) | dict.fromkeys(given, "command line")
    options = options_class(**(defaults | config | given), sources=sources)
    problems = options.check()
    if problems:
        raise UsageError("\n".join(problems))
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _build_parser(
    options_class: type,
    flags: Mapping[str, Field],
    prog: str,
    description: str,
    positionals: Sequence[str],
    defaults: Mapping[str, Any],
    choices: Mapping[str, Sequence[str]],
) -> argparse.ArgumentParser:
    usage = f"%(prog)s [flags] {' '.join(positionals)}".rstrip()
    parser = _Parser(
        prog, usage=usage, description=description, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=_CONFIG_HELP)
    hints = typing.get_type_hints(options_class)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in positionals:
        many = typing.get_origin(kind_of(hints[name])) is list
        parser.add_argument(
            name + BY_POSITION,
            nargs="*" if many else "?",
            type=str if many else path,
            default=argparse.SUPPRESS,
            metavar=name,
            help=f"as --{name}",
        )
    for name, flag in flags.items():
        group = flag.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        keywords = _argument(flag, hints[name], defaults[name], choices.get(name))
        groups[group].add_argument(*flag.metadata["aliases"], f"--{name}", dest=name, **keywords)
    return parser


BY_POSITION = " by position"
METAVARS = {int: "N", float: "X", Path: "PATH", CountOrAuto: "N|auto"}
_CONFIG_HELP = "YAML file of flags, by their names without dashes; the command line wins over it"


def _argument(flag: Field, hint: Any, default: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """Return argparse's arguments for one field. A flag not given is left out; defaults are added later."""
    shown = " ".join(default) if isinstance(default, list) else default
    help = flag.metadata["help"].replace("%", "%%")
    if shown not in (None, False, ""):
        help += f" (default: {shown})".replace("%", "%%")
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    kind = kind_of(hint)
    if kind is bool:
        return keywords | {"action": "store_true"}
    if typing.get_origin(kind) is list:
        many = {"action": "append"} if flag.metadata["repeated"] else {"action": "extend", "nargs": "+"}
        metavar = flag.metadata["metavar"] or "NAME"
        return keywords | many | {"type": typing.get_args(kind)[0], "metavar": metavar}
    keywords |= {
        "type": PARSERS.get(kind, kind),
        "metavar": flag.metadata["metavar"] or METAVARS.get(kind, "NAME"),
    }
    if flag.metadata["more"]:
        keywords["action"] = _first_and_more(flag.metadata["more"])
    if choices:
        listed = len(choices) > 5
        keywords |= {"choices": tuple(choices), "metavar": "NAME" if listed else None}
        keywords["help"] += f"; one of {' '.join(choices)}" if listed else ""
    if flag.metadata["const"]:
        keywords |= {"nargs": "?", "const": flag.metadata["const"]}
    return keywords


def _first_and_more(more: str) -> type[argparse.Action]:
    """Return an action for a flag whose further values go to the list `more`."""

    class FirstAndMore(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
        ) -> None:
            if hasattr(namespace, self.dest):
                setattr(namespace, more, [*getattr(namespace, more, []), values])
            else:
                setattr(namespace, self.dest, values)

    return FirstAndMore


def _refuse_unknown_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], flags: Mapping[str, Field]
) -> None:
    """Raise UsageError for the first flag that there is not, with the flag that was probably meant."""
    known = {option for action in parser._actions for option in action.option_strings}
    for token in itertools.takewhile(lambda token: token != "--", argv):
        name = token.partition("=")[0]
        if name.startswith("--") and name not in known:
            meant = guess_flag(name.removeprefix("--"), flags)
            parser.error(f"unrecognized arguments: {name}" + (f"; did you mean --{meant}?" if meant else ""))


def _default_of(flag: Field) -> Any:
    return flag.default if flag.default_factory is MISSING else flag.default_factory()


def _complete_bare_flags(argv: Sequence[str], flags: Mapping[str, Field]) -> list[str]:
    """Write `--quantize DIR` as `--quantize=4bit DIR`: what follows such a flag may not be its value."""
    switches = {f"--{f.name}": f.metadata for f in flags.values() if f.metadata["const"]}
    completed = list(argv)
    for index, token in enumerate(argv):
        following = argv[index + 1 : index + 2]
        if token in switches and not (following and following[0] in switches[token]["choices"]):
            completed[index] = f"{token}={switches[token]['const']}"
    return completed


def _merge_positionals(given: dict[str, Any], positionals: Sequence[str]) -> dict[str, Any]:
    for name in positionals:
        value = given.pop(name + BY_POSITION, None) or None
        if value is not None and given.setdefault(name, value) != value:
            raise UsageError(f"--{name} {given[name]} and {name} {value}: give it once")
    return given
