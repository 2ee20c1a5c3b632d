import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

import moescope
from moescope.cli import main as cli
from moescope.errors import UserError

VERBS = [command.callback.__name__ for command in cli.app.registered_commands]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], list[str]]:
    """Return a way to add, for one test, a verb that raises."""
    monkeypatch.setattr(cli.app, "registered_commands", [*cli.app.registered_commands])

    def add(error: BaseException) -> list[str]:
        @cli.app.command("probe")
        def probe() -> None:
            raise error

        return ["probe"]

    return add


def test_a_users_mistake_is_one_sentence_and_exit_code_two(probe, capsys) -> None:
    assert cli.run(probe(UserError("there is no x.toml; name a file that exists"))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "moescope: there is no x.toml; name a file that exists\n"


def test_an_interruption_exits_with_130(probe) -> None:
    assert cli.run(probe(KeyboardInterrupt())) == 130


def test_a_verbs_own_exit_code_is_kept(probe) -> None:
    assert cli.run(probe(typer.Exit(7))) == 7


def test_a_defect_keeps_its_traceback(probe) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(probe(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-verb"], "no-such-verb"),
        (["doctr"], "doctor"),
        (["doctor", "--no-such-option"], "--no-such-option"),
        (["doctor", "surplus"], "surplus"),
        (["tokenizer"], "missing command (`moescope tokenizer -h` shows how)"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_culprit(arguments, named, capsys) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("moescope: ")
    assert named in captured.err


def test_a_usage_error_points_to_the_help_of_its_verb(capsys) -> None:
    assert cli.run(["doctor", "--no-such-option"]) == 2
    assert "`moescope doctor -h`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_every_verb_shows_an_example(verb: str, flag: str, capsys) -> None:
    assert cli.run([verb, flag]) == 0
    assert f"moescope {verb}" in capsys.readouterr().out.split("Example:")[1]


def test_help_lists_every_verb(capsys) -> None:
    assert cli.run(["-h"]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in VERBS)


def test_the_bare_command_opens_the_page(monkeypatch) -> None:
    opened = []
    monkeypatch.setattr(cli, "open", lambda: opened.append(True))
    assert cli.run([]) == 0
    assert opened == [True]


def test_version_is_the_packages(capsys) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"moescope {moescope.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from moescope.cli.main import run; run(['-h']);"
        "sys.exit(not {'torch', 'transformers', 'tokenizers'}.isdisjoint(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_chinese_prints_where_the_terminal_knows_only_ascii() -> None:
    script = "from moescope.cli.main import run; run(['-h']); print('床前明月光')"
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert finished.stdout.endswith(b"?????\n")


def test_doctor_tells_machines_what_it_found(capsys) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1
    assert 0 < found["memory_available"] <= found["memory_total"]
    assert found["gemm_bfloat16_flops"] > 1e8
    assert found["read_bytes_per_second"] > 1e8


def test_doctor_tells_people_the_same(capsys) -> None:
    assert cli.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "GFLOP/s" in shown
    assert "GiB" in shown
