"""The verb: its table for people, its mistakes in a sentence."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from moescope.cli.main import run
from moescope.cli.progress import progress_bar
from moescope.cli.study_drawing import draw
from moescope.lab.study import Row, Study, summarise


def row(case: str, seed: int, loss: float, note: str = "") -> Row:
    return Row(
        study="balance",
        case=case,
        seed=seed,
        version="0",
        command="moescope study balance",
        config={},
        note=note,
        total_parameters=9,
        experts_per_token=2,
        held_out_loss={"poems": loss - 0.5, "sums": loss + 0.5},
        bits_per_byte={"poems": 1.0, "sums": 1.0},
        max_violation={1: 0.25, 2: 0.75},
        dead_share={1: 0.0, 2: 0.5},
        mutual_information={1: 0.2, 2: 0.4},
        token_share={1: 0.5, 2: 0.5},
        tokens=1000,
        tokens_per_second=1234.5,
    )


def test_a_table_with_every_case_and_its_difference() -> None:
    rows = [row("nothing at all, a long name", 0, 3.0), row("nothing at all, a long name", 1, 3.2)]
    rows += [row("bias", 0, 2.9, "a note"), row("bias", 1, 3.0, "a note")]
    file = io.StringIO()
    draw(Study("balance", rows, summarise(rows)), Console(file=file, width=200, color_system=None))
    shown = file.getvalue()
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "2 seeds each, 1,000 tokens" in shown
    bias = next(line for line in shown.splitlines() if line.startswith("bias *"))
    assert bias.split()[2:] == [
        *("2.950", "±", "0.635", "-0.150", "[-0.785,", "+0.485]"),
        *("0.50", "25%", "0.30", "1,234"),
    ]
    assert "* bias: a note" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["router", "--data", "TEXT", "--out", "OUT"], "there is no study 'router'"),
        (["routers", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["routers", "--data", "TEXT"], "missing option '--out'"),
        (["routers", "--data", "TEXT", "--out", "OUT", "--seeds", "1"], "'--seeds'"),
        (["routers", "--data", "TEXT", "--out", "OUT", "--config", "x.toml"], "there is no x.toml"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "text.txt").write_text("the moon")
    places = {"TEXT": str(tmp_path / "text.txt"), "OUT": str(tmp_path / "out")}
    assert run(["study", *(places.get(a, a) for a in arguments)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_where_there_is_no_terminal_progress_is_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    clock = iter([0.0, 10.0, 40.0, 41.0, 80.0])
    monkeypatch.setattr("moescope.transfer.time.monotonic", lambda: next(clock))
    with progress_bar("steps") as progress:
        for done in (100, 200, 210, 300):  # a resumed run has done 100 before it begins
            progress(done, 500)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 200 of 500, 0:02:00 left",
        "steps: 300 of 500, 0:01:20 left",
    ]
