"""Draw what the trainings in the box did: `python recipes/tiny/draw.py`.

Reads the histories that lie beside `tiny` and its dense twin, and writes beside this file:
`loss.svg` (training and held-out loss over the tokens that were read), `balance.svg` (how uneven
the routers' work was) and `domains.svg` (which experts each domain uses at the end, by layer).
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from moescope.catalog import BOX
from moescope.scope.history import FILE, History

HERE = Path(__file__).parent
STEP_TOKENS = 16_384
"""Of both editions alike."""
SMOOTHED = 20
"""Steps whose losses make one point."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8D94", "#8C5A2B")
"""Okabe & Ito 2008, then a grey and a brown."""


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "moescope", "font.size": 9, "axes.spines.top": False})
    tiny = History.from_file(BOX / "tiny" / FILE)
    draw_loss(tiny, History.from_file(BOX / "tiny-dense" / FILE))
    draw_balance(tiny)
    draw_domains(tiny)


def draw_loss(tiny: History, dense: History) -> None:
    figure, (training, held_out) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, history, style in (("MoE", tiny, "-"), ("dense twin", dense, "--")):
        steps = np.array([row.step for row in history.rows])
        loss = np.array([row.loss for row in history.rows])
        smooth = [loss[(steps > at - SMOOTHED) & (steps <= at)].mean() for at in steps]
        training.plot(steps * STEP_TOKENS / 1e6, smooth, style, color="black", label=name)
        for domain, colour in zip(tiny.domains, COLOURS[: len(tiny.domains)], strict=True):
            measured = [row for row in history.rows if domain in row.held_out]
            held_out.plot(
                [row.step * STEP_TOKENS / 1e6 for row in measured],
                [row.held_out[domain] for row in measured],
                style,
                color=colour,
                marker=".",
                label=domain if style == "-" else None,
            )
    for axis, title in ((training, "training loss"), (held_out, "held-out loss (dashed: twin)")):
        for step in tiny.sittings:
            axis.axvline(step * STEP_TOKENS / 1e6, color="0.8", zorder=0)
        axis.set(xlabel="million tokens", ylabel="nats per token", title=title)
        axis.set_ylim(top=8)
    training.legend(frameon=False)
    held_out.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "loss.svg")


def draw_balance(tiny: History) -> None:
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for shade, layer in enumerate(tiny.rows[-1].max_violation):
        axis.plot(
            [row.step * STEP_TOKENS / 1e6 for row in tiny.rows],
            [row.max_violation[layer] for row in tiny.rows],
            color=str(0.1 + 0.14 * shade),
            linewidth=0.8,
            label=f"layer {layer}",
        )
    axis.set(xlabel="million tokens", title="MaxVio (0 is even)")
    axis.legend(frameon=False)
    save(figure, "balance.svg")


def draw_domains(tiny: History) -> None:
    """Share of each expert's tokens that came from each domain, all domains weighing the same."""
    load = np.array(tiny.snapshots[-1].load)  # (domains, layers, experts)
    layers = [*tiny.rows[-1].max_violation]
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(10, 1.4 * len(layers) + 0.6), layout="constrained", sharex=True
    )
    picture: Any = None
    for at, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        shares = load[:, at] / load[:, at].sum(axis=0, keepdims=True).clip(min=1e-12)
        order = np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))
        picture = axis.imshow(shares[:, order], aspect="auto", cmap="Greys", vmin=0, vmax=1)
        axis.set_yticks(range(len(tiny.domains)), tiny.domains, fontsize=6)
        axis.set_ylabel(f"layer {layer}", fontsize=8)
        axis.tick_params(length=0)
    axes[-1].set_xlabel("experts, sorted by the domain they serve most")
    figure.suptitle("Where each expert's tokens come from")
    figure.colorbar(picture, ax=axes, label="share of the expert's tokens")
    save(figure, "domains.svg")


def save(figure: Any, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
