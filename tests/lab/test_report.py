"""Reports: one page that needs nothing else, in two languages, whose numbers are the data's."""

import html
import re
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from moescope.api import Model
from moescope.catalog import BOX
from moescope.errors import UserError
from moescope.families import read_config
from moescope.lab.compare import Entrant, compare
from moescope.lab.plan import Plan, plan
from moescope.lab.report import write_report
from moescope.lab.routers import BASE, STUDIES
from moescope.lab.study import Row, Study, summarise
from moescope.lab.units import plain
from moescope.lab.words import WORDS
from moescope.scope.ablation import Ablation, ablate
from moescope.scope.specialization import Specialization, specialize
from moescope.text.documents import Document

DOCUMENTS = [
    *(Document(f"the moon before my bed {n} <b>", "english") for n in range(4)),
    *(Document(f"床前明月光 {n} 是", "诗<歌>") for n in range(4)),
]


@pytest.fixture(scope="module")
def files(model: Model, folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out: Path = tmp_path_factory.mktemp("found")
    network, tokenizer = model.network, model.tokenizer
    specialize("small", network, tokenizer, DOCUMENTS).save(out / "specialization.json")
    ablate("small", network, tokenizer, DOCUMENTS).save(out / "ablation.json")
    entrants = [Entrant(name, Path(folder), model.engine) for name in ("one", "other")]
    compare(entrants, DOCUMENTS, rounds=2, progress=lambda _: None).save(out / "comparison.json")
    rows = [
        Row(
            study="balance",
            case=case,
            seed=seed,
            version="0",
            command="moescope study balance --data <x>",
            config={},
            note="",
            total_parameters=9,
            experts_per_token=2,
            held_out_loss={"poems": 3.0 + seed + at},
            bits_per_byte={"poems": 1.0},
            max_violation={1: 0.25},
            dead_share={1: 0.0},
            mutual_information={1: 0.2},
            token_share={1: 0.5},
            tokens=1000,
            tokens_per_second=1234.5 + seed,
        )
        for seed in range(2)
        for at, case in enumerate(("nothing", "bias"))
    ]
    Study("balance", rows, summarise(rows)).save(out / "study.json")
    plan(folder, speed=True, prompt=8).save(out / "plan.json")
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("small")
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["en", "zh"])
def page(request: pytest.FixtureRequest, files: list[Path], tmp_path_factory) -> Path:
    return write_report(files, tmp_path_factory.mktemp("report"), request.param)


class Outline(HTMLParser):
    """Checks that tags close in order, and collects ids and what the page would fetch."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.headings += tag == "h2"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            local = (value or "").startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href") and not local:
                self.fetched.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.fetched == []
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.headings == 6  # five findings, and how two of them go together
    references = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    assert references <= set(outline.ids)


def test_what_comes_from_texts_is_no_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "诗<歌>" not in text
    assert html.escape("诗<歌>") in text
    assert "--data &lt;x&gt;" in text


def test_everything_is_said_in_one_language(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    language = "zh" if 'lang="zh"' in text else "en"
    other = WORDS["en" if language == "zh" else "zh"]
    assert WORDS[language].title in text
    for phrase in (other.title, other.load, other.cost, other.quality, other.speed, other.nats):
        assert phrase not in text


def test_both_languages_say_the_same_things() -> None:
    """The same fields are filled in, and with the same numbers."""
    for name, english in vars(WORDS["en"]).items():
        chinese = getattr(WORDS["zh"], name)
        if name == "own":
            continue
        if isinstance(english, dict):
            assert english.keys() == chinese.keys()
            continue
        fields = r"\{(\w+)"
        assert sorted(re.findall(fields, english)) == sorted(re.findall(fields, chinese)), name


def test_what_moescope_names_itself_is_named_in_chinese() -> None:
    model = read_config(tomllib.loads(BASE.read_text())["model"])
    cases = [case for study in STUDIES.values() for case in study(model)]
    given = [*(case.name for case in cases), *(case.note for case in cases if case.note), *STUDIES]
    given += Specialization.from_file(BOX / "tiny" / "specialization.json").domains
    for name in given:
        told = WORDS["zh"].name(name)
        plain = not re.search("[a-z]{2}", re.sub("ReLU|Sinkhorn|softmax|sigmoid", "", told))
        assert plain, (name, told)
        assert WORDS["en"].name(name) == name


def test_charts_and_data_lie_beside_the_page(page: Path, files: list[Path]) -> None:
    made = {path.name for path in page.parent.iterdir()}
    assert {file.name for file in files} <= made
    charts = sorted(page.parent.glob("*.svg"))
    assert len(charts) == 1 + 2 + 1 + 3 + 2 + 1
    for chart in charts:
        ET.parse(chart)
    if 'lang="en"' in page.read_text(encoding="utf-8"):
        assert (page.parent / "study-1.png").exists()


def test_no_text_is_too_small_to_read(page: Path) -> None:
    """A chart is never shown narrower than the page says; 16 pixels are a rem."""
    html = page.read_text(encoding="utf-8")
    least = 16 * float(re.findall(r"svg {[^}]*min-width: ([\d.]+)rem", html)[0])
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 10
    for chart in charts:
        width = float(re.findall(r'viewBox="0 0 ([\d.]+)', chart)[0])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", chart)]
        assert sizes and min(sizes) * least / width >= 9


def test_axes_have_their_units(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    words = WORDS["zh" if 'lang="zh"' in text else "en"]
    for unit in (words.nats, words.quality_axis, words.milliseconds, words.relative_load):
        assert unit in text


def test_numbers_are_those_of_the_data(page: Path, files: list[Path]) -> None:
    text = page.read_text(encoding="utf-8")
    named = {file.name: file for file in files}
    ablation = Ablation.from_file(named["ablation.json"])
    worst = max(cost for by_expert in ablation.cost[0] for cost in by_expert)
    assert f"{worst:+.4f}" in text
    found = Specialization.from_file(named["specialization.json"])
    assert f"{max(found.mutual_information):.3f}" in text
    load = [share for by_expert in found.load[0] for share in by_expert]
    costs = [cost for by_expert in ablation.cost[0] for cost in by_expert]
    planned = Plan.from_file(named["plan.json"])
    assert planned.speed is not None
    for speed in planned.speed.speeds:
        shown = f"{speed.decode:,.0f}" if speed.decode >= 1000 else f"{speed.decode:.4g}"
        assert f"<td>{shown}</td>" in text
    assert f"english {stats.spearmanr(load, costs).statistic:.2f}" in text


def test_the_same_data_make_the_same_page(files: list[Path], tmp_path: Path) -> None:
    one = write_report(files[3:4], tmp_path / "one", "en").read_text(encoding="utf-8")
    again = write_report(files[3:4], tmp_path / "again", "en").read_text(encoding="utf-8")
    assert one == again


def test_mistakes_are_sentences(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(UserError, match="nothing to report on"):
        write_report([tmp_path / "other.json"], tmp_path, "en")
    with pytest.raises(UserError, match="cannot read"):
        write_report([tmp_path / "no.json"], tmp_path, "en")
    twin = tmp_path / files[0].name
    twin.write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match=r"two files are called ablation\.json"):
        write_report([files[0], twin], tmp_path / "out", "en")


def test_large_numbers_are_written_out() -> None:
    assert [plain(value, 4) for value in (12_990.4, 2_633.2, 135.26, 0.39852)] == [
        *("12,990", "2,633", "135.3", "0.3985")
    ]
    assert [plain(value, 2) for value in (6_300.0, 84.0, 0.0844)] == ["6,300", "84", "0.084"]
