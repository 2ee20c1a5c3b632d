"""Names of experts follow from what comes to them, and from nothing else."""

from dataclasses import replace

import pytest

from moescope.catalog import BOX
from moescope.scope.cards import ENOUGH, KINDS, Card, cards_of
from moescope.scope.specialization import Specialization, TypicalToken


@pytest.fixture(scope="module")
def found() -> Specialization:
    return Specialization.from_file(BOX / "tiny" / "specialization.json")


def named(cards: list[Card]) -> list[str]:
    return [card.en for card in cards if card.en is not None]


def test_about_a_dozen_experts_of_a_layer_have_names_in_both_languages(
    found: Specialization,
) -> None:
    for cards in cards_of(found):
        assert 8 <= len(named(cards)) <= len(KINDS)
        assert len(set(named(cards))) == len(named(cards))
        assert all((card.zh is None) == (card.en is None) for card in cards)


def test_a_name_is_earned_by_the_tokens(found: Specialization) -> None:
    kinds = {kind.en: kind for kind in KINDS}
    for at, cards in enumerate(cards_of(found)):
        for expert, card in enumerate(cards):
            if card.en is not None:
                tokens = [token.text for token in found.typical[at][expert]]
                mine = [kinds[card.en].is_one(text) for text in tokens]
                weights = [1 / (rank + 2) for rank in range(len(tokens))]
                share = sum(w for w, one in zip(weights, mine, strict=True) if one) / sum(weights)
                assert share > ENOUGH, (card, tokens)


def test_names_follow_the_tokens_to_another_expert(found: Specialization) -> None:
    turned = replace(found, typical=[layer[::-1] for layer in found.typical])
    for cards, mirrored in zip(cards_of(found), cards_of(turned), strict=True):
        assert sorted(named(cards)) == sorted(named(mirrored))


def test_tokens_of_no_one_kind_give_no_name() -> None:
    tokens = [TypicalToken(i, text, 1, 2.0, "") for i, text in enumerate(("7", "云", " unto", "{"))]
    one = Specialization(
        **{"model": "m", "version": "0", "domains": ["a", "b"], "documents": [1, 1]},
        **{"tokens": [4, 4], "layers": [3], "load": [[[0.2]], [[0.6]]]},
        **{"mutual_information": [0.0], "mutual_information_error": [0.0], "token_share": [0.0]},
        **{"typical": [[tokens]], "together": [[]]},
    )
    ((card,),) = cards_of(one)
    assert (card.zh, card.en, card.domain) == (None, None, 1)
    assert card.tokens == ["7", "云", " unto", "{"]
    assert card.domain_share == pytest.approx(0.75)
