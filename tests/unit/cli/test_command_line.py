"""The command as a program: how fast it starts, what it imports, and how it ends."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distckpt.cli import listing, main
from distckpt.cli.output import Column, Output, Table, shorten
from distckpt.cli.progress import Progress
from tests.support.limits import PROGRAM_LIMIT_S
from tests.unit.cli.conftest import Command

ROOT = Path(__file__).resolve().parents[3]


def program(*arguments: str | Path) -> list[str]:
    """Return the command as a program of its own."""
    return [sys.executable, "-m", "distckpt", *map(str, arguments)]


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "{trained}"]])
def test_help_and_ls_import_neither_torch_nor_ignite(trained: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from distckpt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ignite', 'numpy', 'rich') if name in sys.modules])"
    )
    called = [sys.executable, "-c", code, *(one.format(trained=trained) for one in arguments)]
    out = subprocess.check_output(called, cwd=ROOT, text=True, timeout=PROGRAM_LIMIT_S)
    assert out.splitlines()[-1] == "[]"


def test_a_wrong_argument_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ls"])
    assert ended.value.code == 2
    assert "the following arguments are required: DIR" in capsys.readouterr().err


def test_a_pipe_that_closes_ends_it_quietly(trained: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            program("ls", trained),
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PROGRAM_LIMIT_S,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_it_runs_without_a_standard_output(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["ls", str(trained)]) == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/data/a.pt"), 2, "/data/a.pt: Permission denied"),
        (MemoryError(), 2, "there is not enough memory"),
    ],
)
def test_an_error_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(listing, "survey", fail)
    assert command("ls", tmp_path) == (code, "", f"distckpt: {message}\n")


def test_sigterm_ends_a_command_as_an_interrupt_does(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(listing, "survey", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert command("ls", tmp_path) == (143, "", "distckpt: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_after_a_second_and_removed() -> None:
    stream, now_s = Terminal(), [0.0]
    with Progress("verifying", 1000, stream=stream, clock=lambda: now_s[0]) as progress:
        progress.advance(100)
        assert stream.getvalue() == ""
        now_s[0] = 1.5
        progress.advance(400)
        assert stream.getvalue() == "\rverifying [############            ]  50% 333 B/s\033[K"
        progress.advance(100)
        assert stream.getvalue().count("verifying") == 1, "not for every step"
    assert stream.getvalue().endswith("\r\033[K")


def test_progress_is_not_shown_outside_of_a_terminal() -> None:
    stream, now_s = io.StringIO(), [0.0]
    with Progress("verifying", 1000, stream=stream, clock=lambda: now_s[0]) as progress:
        now_s[0] = 5.0
        progress.advance(400)
    assert stream.getvalue() == ""


def test_a_table_in_a_terminal_has_the_same_text_with_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    table = Table(columns=(Column("NAME"), Column("SIZE", is_number=True), Column("STATE")))
    table.rows.extend([("[red]a.pt", "12 B", "damaged"), ("b.pt", "1 B", "complete")])
    plain, styled = io.StringIO(), Terminal()
    Output(plain).table(table)
    Output(styled, width=80).table(table)
    assert "\033[1;31m" in styled.getvalue()
    text = re.sub(r"\033\[[\d;]*m", "", styled.getvalue())
    assert text == plain.getvalue()
    assert plain.getvalue().splitlines()[1] == "[red]a.pt  12 B  damaged"


def test_long_texts_continue_on_lines_of_their_own_before_names_are_cut() -> None:
    columns = (Column("NAME", can_shrink=True), Column("SIZE", is_number=True), Column("WHY", can_wrap=True))
    table = Table(title="the files of a run of five words", columns=columns)
    table.rows.extend([("a" * 24, "17 B", "not kept by LastN(2), EveryNSteps(100)"), ("b.pt", "1 B", "newest")])
    assert table.fitted(58).lines() == [
        "the files of a run of five words",
        "NAME                      SIZE  WHY",
        "aaaaaaaaaaaaaaaaaaaaaaaa  17 B  not kept by LastN(2),",
        "                                EveryNSteps(100)",
        "b.pt                       1 B  newest",
    ]
    assert table.fitted(30).lines() == [
        "the files of a run of five",
        "words",
        "NAME          SIZE  WHY",
        "aaaaaa~aaaaa  17 B  not kept by LastN(2),",
        "                    EveryNSteps(100)",
        "b.pt           1 B  newest",
    ]
    assert len(table.fitted(None).lines()) == 4


def test_a_row_of_one_text_has_the_place_of_all_columns() -> None:
    table = Table(columns=(Column("KEY", can_shrink=True), Column("SIZE", is_number=True)))
    table.rows.extend([("weight", "12 B"), ("a long value = (0.9, 0.999)", ""), ("x" * 30, "")])
    assert table.fitted(28).lines() == [
        "KEY     SIZE",
        "weight  12 B",
        "a long value = (0.9, 0.999)",
        f"{'x' * 14}~{'x' * 13}",
    ]


def test_lines_are_wrapped_in_a_terminal() -> None:
    stream = Terminal()
    Output(stream, width=12).line("a.pt is damaged: /a/long/path/of/it")
    assert stream.getvalue() == "a.pt is\ndamaged:\n/a/long/path/of/it\n"


def test_shortened_names_keep_their_ends() -> None:
    assert [shorten("checkpoint_1000.pt", width) for width in (12, 13, 18)] == [
        "checkp~00.pt",
        "checkp~000.pt",
        "checkpoint_1000.pt",
    ]
