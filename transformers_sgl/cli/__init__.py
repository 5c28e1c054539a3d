"""The console command `transformers-sgl`: each command parses, calls a function and prints.

What the user has to change leaves as one sentence on standard error and exit code 2; Ctrl-C as exit code 130.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from transformers_sgl import __version__
from transformers_sgl.cli.batch import batch
from transformers_sgl.cli.calibrate import calibrate
from transformers_sgl.cli.evaluate import evaluate
from transformers_sgl.cli.publish import publish
from transformers_sgl.cli.run import run
from transformers_sgl.cli.serve import serve
from transformers_sgl.cli.visualize import visualize

# torch and transformers are imported inside the commands: help and most errors do not wait for them.
__all__ = ["main"]

_NAME = "transformers-sgl"


class _Commands(TyperGroup):
    """The commands; what goes wrong in one becomes a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            return _stop_printing()
        except (OSError, ValueError) as error:
            return _fail(str(error), 2)
        except KeyboardInterrupt as stopped:
            return _fail(str(stopped) or "Stopped.", 128 + signal.SIGINT)


app = typer.Typer(name=_NAME, cls=_Commands, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: also 141 if nobody reads the output."""
    try:
        code = app(argv, prog_name=_NAME, standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except typer.TyperException as error:  # of reading the arguments
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context else _NAME
        return _fail(f"{error.format_message().rstrip('. ')} (see `{help_of} --help`).", 2)
    except BrokenPipeError:
        return _stop_printing()


def _fail(sentence: str, code: int) -> int:
    print(f"{_NAME}: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _stop_printing() -> int:
    """Drops what is left to print: the reader of the output, such as `head`, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + getattr(signal, "SIGPIPE", 13)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A small vision-language model tells a large one which visual tokens to keep."""


_ANSWER, _MEASURE, _OFFER = "Answer questions", "Measure on many questions", "Offer to others"
_GOES_ON = "A run that was stopped goes on when the same command is given again."
_DATA = "Each line of the data is a JSON object with `image` (a path), `question`, and `answers` (a list) or `answer`."
_LINES = (
    "Each line of QUESTIONS is a JSON object with `image` (a path) or `images` (several), `question`, and perhaps "
    "`id`. One worker of each kind works in this process, more in processes of their own. With `--engine vllm`, one "
    "engine does all, and spreads the large model over GPUs itself."
)
_METHODS = (
    "Methods: large, small, sgp, sgl, sgp-first, sgp-facility, sgp-facility-late, sgp-facility-prompt, sgp-dpp, "
    "sgl-facility, sgp-vision, sgl-vision, confirmed, sgl-confirmed, unsure, random, fastv, oracle, divprune, "
    "divprune-late, cdpruner, cdpruner-weighted, visionzip, visionzip-mean, downsample, "
    "sgp-last, sgp-prompt, sgp-generated, sgp-10%, sgp-30%, sgp-50%, sgp-70%. "
    "Under `accelerate launch` or `torchrun` processes share the work."
)
_LOGIN = "Log in before, with `hf auth login` or the environment variable HF_TOKEN."

app.command(rich_help_panel=_ANSWER)(run)
app.command(rich_help_panel=_ANSWER)(visualize)
app.command(rich_help_panel=_ANSWER, epilog=f"{_LINES} {_GOES_ON}")(batch)
app.command(rich_help_panel=_MEASURE, epilog=f"{_DATA} {_GOES_ON}")(calibrate)
app.command(rich_help_panel=_MEASURE, epilog=f"{_METHODS} {_GOES_ON}")(evaluate)
app.command(rich_help_panel=_OFFER)(serve)
app.command(rich_help_panel=_OFFER, epilog=_LOGIN)(publish)
