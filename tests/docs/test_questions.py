"""The table of the questions, held against the stations that the page has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web/src"
COUNT = 25

pytestmark = pytest.mark.skipif(not WEB.is_dir(), reason="the page's source is in a checkout only")


def stations() -> list[str]:
    """The English titles of the page's stations, in their order."""
    index = (WEB / "stations/index.ts").read_text(encoding="utf-8")
    names = re.findall(r"\{ name: '(\w+)', title: '(\w+)\.title'", index)
    assert len(names) == index.count("name: '")
    return [title_of(section) for _, section in names]


def title_of(section: str) -> str:
    messages = (WEB / f"messages/en/{section}.ts").read_text(encoding="utf-8")
    found = re.search(r"^  title: '(.*)',$", messages, re.MULTILINE)
    assert found is not None, section
    return found[1]


def answers() -> dict[int, str]:
    """What the table says of each question."""
    table = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", table, re.MULTILINE)
    return {int(number): answer for number, answer in rows}


def test_every_question_has_an_answer() -> None:
    assert list(answers()) == list(range(1, COUNT + 1))


def test_every_station_has_the_number_and_the_title_that_the_table_says() -> None:
    named = re.findall(r"(\d+) \*([^*]+)\*", "\n".join(answers().values()))
    assert sorted((int(number), title) for number, title in named) == list(enumerate(stations(), 1))


def test_no_answer_is_a_station_that_is_not_there() -> None:
    for answer in answers().values():
        # A number of a station stands at the beginning of a part of the answer, or after a comma.
        for number in re.findall(r"(?:^|[,;] )(\d+)\b", answer):
            assert 1 <= int(number) <= len(stations()), answer


def test_the_tours_steps_are_the_pages() -> None:
    tour = (WEB / "Hero.svelte").read_text(encoding="utf-8")
    parts = dict(re.findall(r"'hero\.tour(\d)', part: '\w+', station: '(\w+)'", tour))
    order = [title_of(name) for name in parts.values()]
    for answer in answers().values():
        if step := re.search(r"step (\d)", answer):
            station = re.match(r"(\d+)", answer)
            assert station is not None, answer
            assert stations()[int(station[1]) - 1] == order[int(step[1]) - 1], answer
