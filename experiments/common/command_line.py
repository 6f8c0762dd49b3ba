"""The command line of experiments.run: verbs, help by what a verb reads, and errors that name what is nearest."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Sequence

from absl import flags

from experiments.common.options import EXPERIMENTS

COMMAND = "python -m experiments.run"
SCRIPT = "indexcache"  # what the installed package calls the same
CONVERT = "convert"  # a verb that is a program of its own, with flags of its own
CONVERTER = "checkpoints_convert"
HELP = ("--help", "-help", "-h", "--h", "--helpshort", "-helpshort", "--helpfull", "-helpfull", "help")
VERSION = ("--version", "-version", "version")
USAGE_ERROR = 2  # the exit status
_WIDTH = 110
_OF_EVERY_VERB = "experiments.run"


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.57)
    return f"; the nearest is {found[0]}" if found else ""


def command() -> str:
    """How this program was started, for a reader to type."""
    return SCRIPT if pathlib.Path(sys.argv[0]).stem == SCRIPT else COMMAND


def with_flag(arguments: Sequence[str]) -> list[str]:
    """The arguments with --experiment=VERB in place of a verb that stands first, or behind the word "help".

    ValueError for a verb that is none, with the nearest, and for one beside another --experiment.
    """
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0].startswith("-") or arguments[0] in HELP:
        return list(arguments)
    verb, rest = arguments[0], list(arguments[1:])
    if verb not in EXPERIMENTS:
        known = [*EXPERIMENTS, CONVERT]
        raise ValueError(f"{verb!r} is none of {', '.join(known)}{_nearest(verb, known)}")
    if (other := named(rest)) not in (None, verb):
        raise ValueError(f"{verb}: --experiment={other} names another")
    return [f"--experiment={verb}", *rest]


def named(arguments: Sequence[str]) -> str | None:
    """What --experiment says, None where it is not there."""
    joined = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("experiment=")]
    apart = [b for a, b in itertools.pairwise(arguments) if a in ("-experiment", "--experiment")]
    return next(iter([*joined, *apart]), None)


def experiment_of(arguments: Sequence[str]) -> str:
    """The experiment that flags name, the first one without. ValueError, with the nearest, for a name that is none."""
    name = named(arguments) or next(iter(EXPERIMENTS))
    if name not in EXPERIMENTS:
        raise ValueError(f"--experiment={name}: is none of {', '.join(EXPERIMENTS)}{_nearest(name, EXPERIMENTS)}")
    return name


def wants_version(arguments: Sequence[str]) -> bool:
    return any(argument in VERSION for argument in arguments[:1])


def wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in HELP for argument in arguments)


def summary(module: str) -> str:
    """The first line of a module's docstring, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def overview() -> str:
    """The verbs, a line each."""
    lines = [f"usage: {command()} [VERB] [--FLAG=VALUE ...]; without a verb: {next(iter(EXPERIMENTS))}", ""]
    column = max(map(len, EXPERIMENTS)) + 1
    for name, module in EXPERIMENTS.items():
        first, others = f"  {name:<{column}}", " " * (column + 2)
        lines += textwrap.wrap(summary(module), _WIDTH, initial_indent=first, subsequent_indent=others)
    about = summary(f"{CONVERTER}.__main__").partition(": ")[2]
    lines.append(f"  {CONVERT:<{column}}SRC DST: {about}")
    return "\n".join([*lines, "", f"{command()} VERB --help shows the flags that a verb reads."])


def help_of(name: str) -> str:
    """What a verb does and the flags that it reads, those of its own first. Its module has been imported."""
    module = EXPERIMENTS[name]
    by_module = flags.FLAGS.flags_by_module_dict()
    own = {flag.name for where, found in by_module.items() if where.startswith(module) for flag in found}
    key = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
    every = _every_verbs()
    lines = [f"usage: {command()} {name} [--FLAG=VALUE ...]", "", summary(module)]
    for title, names in ((f"of {name}", own), ("shared with other verbs", key - own), ("of every verb", every - own - key)):
        if names:
            lines += ["", f"{title}:"]
            for flag in sorted(names):
                lines += _described(flag)
    return "\n".join(lines)


def _described(name: str) -> list[str]:
    flag = flags.FLAGS[name]
    values = f"={'|'.join(flag.parser.enum_values)}" if hasattr(flag.parser, "enum_values") else ""
    default = (flag.default_as_str or "").strip("'") if flag.default not in (None, "", []) else ""
    words = flag.help.partition(">: ")[2] if flag.help.startswith("<") else flag.help
    text = f"{words}{f' (default {default})' if default else ''}"
    head = f"  --{'[no]' if flag.boolean else ''}{name}{values}"
    return [head, *textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def parse(argv: list[str]) -> list[str]:
    """absl's flags from the arguments: the program's name is what is left. Exits with one line where they are wrong."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is no flag; flags look like --checkpoint=DIR")
        check_read(experiment_of(argv[1:]))
    except (flags.Error, ValueError) as error:
        sys.exit(_said(error, experiment_of(argv[1:])))
    return rest


def _said(error: Exception, name: str) -> int:
    text = str(error).replace("('Non-boolean argument to boolean flag', ", "neither true nor false (")
    if isinstance(error, flags.UnrecognizedFlagError):
        if others := _readers(error.flagname.removeprefix("no")) or _readers(error.flagname):
            text = _not_read(error.flagname, name, others)
        else:
            known = [f"--{flag}" for flag in _read_by(name)]
            text = f"--{error.flagname}: no flag of {name}{_nearest(f'--{error.flagname}', known)}"
    print(f"error: {text}; {command()} {name} --help shows what it reads", file=sys.stderr)
    return USAGE_ERROR


def _every_verbs() -> set[str]:
    """The flags that experiments.run defines, whether it was started or imported."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return {flag.name for where in (_OF_EVERY_VERB, sys.argv[0]) for flag in by_module.get(where, [])}


def _read_by(name: str) -> set[str]:
    """The flags that a verb reads. Its module has been imported."""
    return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[name])} | _every_verbs()


def _readers(flag: str) -> list[str]:
    """The verbs that read a flag. Their modules are imported, which takes a moment: for an error."""
    for module in EXPERIMENTS.values():
        importlib.import_module(module)
    return [name for name in EXPERIMENTS if flag in _read_by(name)]


def _not_read(flag: str, name: str, readers: Sequence[str]) -> str:
    return f"--{flag}: {name} does not read it; {', '.join(readers)} {'does' if len(readers) == 1 else 'do'}"


def check_read(name: str) -> None:
    """ValueError for a flag that was given and that the verb does not read, which would count for nothing, or that is NaN."""
    read = _read_by(name)
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        for flag in found if module.startswith("experiments.") else ():
            if flag.present and flag.name not in read:
                raise ValueError(_not_read(flag.name, name, _readers(flag.name)))
            if flag.value != flag.value:  # absl lets NaN pass whatever the bounds
                raise ValueError(f"--{flag.name}={flag.value}: not a number")
