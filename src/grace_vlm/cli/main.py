"""``grace``: one command, one file. This one wires them and turns errors into lines.

Heavy imports (torch, transformers) happen inside the commands, so that ``grace --help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from grace_vlm import __version__
from grace_vlm.cli.openmp import spin_briefly
from grace_vlm.cli.output import fail
from grace_vlm.errors import GraceError

INTERRUPTED = 128 + 2
app = typer.Typer(
    name="grace",
    help="Distil a vision-language model under an INT4 grid, pack it, prove it, evaluate it.\n\nStart with: grace demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make and check training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
teacher_app = typer.Typer(help="Keep what a teacher says.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(teacher_app, name="teacher")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"grace-vlm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    """Options that stand before the command."""


def _register() -> None:
    from grace_vlm.cli import (
        analyze,
        bench,
        chat,
        compare,
        data_check,
        data_prepare,
        demo,
        doctor,
        evaluate,
        generate,
        inspect,
        pack,
        perplexity,
        plan,
        quantize,
        scores,
        teacher_cache,
        train,
        verify,
    )

    app.command("demo", help=demo.HELP)(demo.demo)
    data_app.command("prepare", help=data_prepare.HELP)(data_prepare.prepare_data)
    data_app.command("check", help=data_check.HELP)(data_check.check_data)
    app.command("plan", help=plan.HELP)(plan.plan_command)
    app.command("train", help=train.HELP)(train.train_model)
    teacher_app.command("cache", help=teacher_cache.HELP)(teacher_cache.cache_teacher)
    app.command("quantize", help=quantize.HELP)(quantize.quantize_model)
    app.command("pack", help=pack.HELP)(pack.pack_model)
    app.command("verify", help=verify.HELP)(verify.verify_models)
    app.command("inspect", help=inspect.HELP)(inspect.inspect_path)
    app.command("eval", help=evaluate.HELP)(evaluate.evaluate)
    app.command("perplexity", help=perplexity.HELP)(perplexity.perplexity)
    app.command("scores", help=scores.HELP)(scores.scores)
    app.command("chat", help=chat.HELP)(chat.chat)
    app.command("generate", help=generate.HELP)(generate.generate)
    app.command("compare", help=compare.HELP)(compare.compare)
    app.command("analyze", help=analyze.HELP)(analyze.analyze)
    app.command("bench", help=bench.HELP, context_settings=bench.SETTINGS)(bench.bench)
    app.command("doctor", help=doctor.HELP)(doctor.doctor)


_register()


def _meant(error: Exception) -> str:
    """What an option or an argument that is missing is for, in its own words; nothing of other errors."""
    about = getattr(getattr(error, "param", None), "help", None)
    return f" ({about.removesuffix('.')})" if about and "Missing" in type(error).__name__ else ""


def _command_of(error: Exception) -> str:
    """The command that a usage error is of, ``grace data check``; of its own words, however it was started."""
    words: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return " ".join(["grace", *words])


def main() -> None:
    """Entry point: user errors are one line on standard error and an exit code; bugs keep their traceback."""
    spin_briefly()
    try:
        code = app(standalone_mode=False)
    except GraceError as error:
        fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        # Typer's own usage errors; which click they come from depends on Typer's version.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        message = format_message()
        if not message.strip() or "Usage:" in message:
            print(message)  # no arguments: the help text
            sys.exit(2)
        said = f"{message.rstrip('.')}{_meant(error)}"
        fail(f"{said}{'' if said.endswith('?') else ';'} see {_command_of(error)} --help", 2)
    if code == INTERRUPTED:  # Typer makes it of a KeyboardInterrupt and says nothing
        fail("interrupted; run the same command with --resume to go on where that is offered", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
