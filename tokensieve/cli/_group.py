"""How every command ends: exit codes, one-line errors, Ctrl-C."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from tokensieve.cli._console import fail, quiet
from tokensieve.errors import TokensieveError

EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130

# Typer brings its own copy of click in newer releases and uses the package in older ones.
_ClickException: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class TokensieveGroup(TyperGroup):
    """The command group; `main` turns every error into one line and an exit code.

    0: done. 1: a bug. 2: something the user can put right. 130: interrupted.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        try:
            with quiet(debug):
                code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            code = _report(error, debug)
        except KeyboardInterrupt:
            code = _interrupted()
        else:
            code = code if isinstance(code, int) else 0
            code = _interrupted() if code == EXIT_INTERRUPTED else code
        sys.exit(code)


def _report(error: Exception, debug: bool) -> int:
    """Say what went wrong on one line of stderr; the exit code."""
    if isinstance(error, typer.Abort):
        return _interrupted()
    if isinstance(error, _ClickException):
        return _report_usage(error)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, TokensieveError):
        fail(str(error))
        return EXIT_USER
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        fail("The memory does not suffice; use fewer --frames, a lower --retention or --dtype bfloat16.")
        return EXIT_USER
    hint = "" if debug else ", run with --debug for the traceback"
    fail(f"{type(error).__name__}: {error} (this is a bug{hint})")
    return EXIT_BUG


def _report_usage(error: Any) -> int:
    """A command line that cannot be understood."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The help has been printed by then.
        return int(error.exit_code)
    path = context.command_path if context is not None else "tokensieve"
    fail(f"{error.format_message().rstrip('.')} (see '{path} --help').")
    return int(error.exit_code)


def _interrupted() -> int:
    fail("Interrupted.")
    return EXIT_INTERRUPTED
