"""Colours of experts, by how far the eye tells them apart (CIEDE2000)."""

import itertools
import math
import operator

import pytest
from reader import settle

pytestmark = [pytest.mark.slow, pytest.mark.page]

Lab = tuple[float, float, float]
APART = 20
"""Of experts side by side; about 2 is just noticed."""
ANY = 6
"""Of any two in one layer."""


def test_experts_side_by_side_are_far_apart(open_page) -> None:
    page = open_page("lang=en&k=64")
    page.get_by_test_id("station-experts").scroll_into_view_if_needed()
    settle(page)
    boxes = page.locator("[data-testid=expert][data-active=true] .box").all()
    colors = [lab(box.get_attribute("fill")) for box in boxes]
    assert len(colors) == 64
    assert min(itertools.starmap(difference, itertools.combinations(colors, 2))) >= ANY
    for columns in (8, 12, 16, 32):
        for expert, color in enumerate(colors):
            beside = [expert + 1] if (expert + 1) % columns else []
            for other in (*beside, expert + columns):
                assert other >= 64 or difference(color, colors[other]) >= APART, (expert, other)


def lab(color: str) -> Lab:
    """`#rrggbb` in CIELAB, under D65."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    rows = (
        ((0.4124564, 0.3575761, 0.1804375), 0.95047),
        ((0.2126729, 0.7151522, 0.0721750), 1.0),
        ((0.0193339, 0.1191920, 0.9503041), 1.08883),
    )
    x, y, z = (math.cbrt(sum(map(operator.mul, row, linear)) / white) for row, white in rows)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(one: Lab, other: Lab) -> float:
    """CIEDE2000 (Sharma, Wu and Dalal 2005)."""
    mean = (math.hypot(*one[1:]) + math.hypot(*other[1:])) / 2
    grey = 1.5 - 0.5 * math.sqrt(mean**7 / (mean**7 + 25**7))
    (l1, a1, b1), (l2, a2, b2) = ((light, a * grey, b) for light, a, b in (one, other))
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = (math.degrees(math.atan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180
    hue = (h1 + turn / 2) % 360
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    wave = 1 + sum(
        size * math.cos(math.radians(times * hue + shift))
        for size, times, shift in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.2, 4, -63))
    )
    far = (light - 50) ** 2
    of_light = (l2 - l1) / (1 + 0.015 * far / math.sqrt(20 + far))
    of_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    of_hue = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * wave)
    tilt = math.radians(60 * math.exp(-(((hue - 275) / 25) ** 2)))
    rotation = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7)) * math.sin(tilt)
    return math.sqrt(of_light**2 + of_chroma**2 + of_hue**2 + rotation * of_chroma * of_hue)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((90.8027, -2.0831, 1.441), (91.1528, -1.6435, 0.0447), 1.4441),
    ],
)
def test_the_difference_is_that_of_the_paper(one: Lab, other: Lab, told: float) -> None:
    assert difference(one, other) == pytest.approx(told, abs=1e-4)
