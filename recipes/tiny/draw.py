"""Draw what the two trainings did: `python recipes/tiny/draw.py MOE_OUT DENSE_OUT`.

Writes beside this file: `loss.svg` (training and held-out loss of the model and its dense twin),
`balance.svg` (the routers' measures over the training), `domains.svg` (which experts each domain
uses, layer by layer), and `results.json` with the numbers behind them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
DOMAIN_COLOURS = dict(
    zip(
        ("arithmetic", "code", "poetry", "prose", "translation"),
        ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"),  # Okabe & Ito 2008
        strict=True,
    )
)


def main() -> None:
    moe_out, dense_out = map(Path, sys.argv[1:3])
    mpl.rcParams.update({"svg.hashsalt": "moescope", "font.size": 9, "axes.spines.top": False})
    moe, dense = rows(moe_out), rows(dense_out)
    load = json.loads((moe_out / "expert_load.json").read_text(encoding="utf-8"))["load"]
    draw_loss(moe, dense)
    draw_balance(moe)
    draw_domains(load)
    summaries = {
        name: json.loads((out / "training.json").read_text(encoding="utf-8"))
        for name, out in (("moe", moe_out), ("dense", dense_out))
    }
    keys = ("step", "tokens", "seconds", "held_out_loss", "bits_per_byte", "router")
    results = {
        name: {key: summary[key] for key in keys if summary.get(key)}
        for name, summary in summaries.items()
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_loss(moe: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    figure, (training, held_out) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, run, style in (("MoE", moe, "-"), ("dense twin", dense, "--")):
        tokens = np.array([row["tokens"] for row in run]) / 1e6
        loss = np.array([row["loss"] for row in run])
        window = min(20, len(loss))
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        training.plot(tokens[window - 1 :], smooth, style, color="black", label=name)
        measured = [row for row in run if "held_out_loss" in row]
        for domain, colour in DOMAIN_COLOURS.items():
            held_out.plot(
                [row["tokens"] / 1e6 for row in measured],
                [row["held_out_loss"][domain] for row in measured],
                style,
                color=colour,
                marker="." if style == "-" else None,
                label=domain if style == "-" else None,
            )
    training.set(xlabel="million tokens", ylabel="nats per token", title="training loss")
    training.set_ylim(top=8)
    training.legend(frameon=False)
    held_out.set(
        xlabel="million tokens",
        ylabel="nats per token",
        title="held-out loss (solid: MoE, dashed: dense twin)",
    )
    held_out.legend(frameon=False, loc=(0.42, 0.1))
    save(figure, "loss.svg")


def draw_balance(moe: list[dict[str, Any]]) -> None:
    measured = [row for row in moe if row.get("router")]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = {
        "max_violation": "MaxVio (0 is even)",
        "entropy": "entropy of the load (1 is even)",
        "dead_share": "share of dead experts",
    }
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for shade, layer in enumerate(measured[0]["router"]):
            axis.plot(
                [row["tokens"] / 1e6 for row in measured],
                [row["router"][layer][measure] for row in measured],
                color=str(0.1 + 0.14 * shade),
                marker=".",
                label=f"layer {layer}",
            )
        axis.set(xlabel="million tokens", title=title)
    axes[0].legend(frameon=False)
    save(figure, "balance.svg")


def draw_domains(load: dict[str, dict[str, list[int]]]) -> None:
    """Share of each expert's tokens that came from each domain, all domains weighing the same."""
    domains, layers = list(load), list(next(iter(load.values())))
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(10, 1.1 * len(layers) + 0.6), layout="constrained", sharex=True
    )
    picture = None
    for axis, layer in zip(axes, layers, strict=True):
        counts = np.array([load[domain][layer] for domain in domains], dtype=float)
        shares = counts / counts.sum(axis=1, keepdims=True)
        shares /= shares.sum(axis=0, keepdims=True).clip(min=1e-12)
        order = np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))
        picture = axis.imshow(shares[:, order], aspect="auto", cmap="Greys", vmin=0, vmax=1)
        axis.set_yticks(range(len(domains)), domains, fontsize=7)
        axis.set_ylabel(f"layer {layer}", fontsize=8)
        axis.tick_params(length=0)
    axes[-1].set_xlabel("experts, sorted by the domain they serve most")
    figure.suptitle("Where each expert's tokens come from")
    figure.colorbar(picture, ax=axes, label="share of the expert's tokens")
    save(figure, "domains.svg")


def save(figure: Any, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None})
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    """The held-out losses as Markdown."""
    lines = ["| domain | MoE | dense twin | difference |", "|---|---|---|---|"]
    for domain, loss in results["moe"]["held_out_loss"].items():
        other = results["dense"]["held_out_loss"][domain]
        lines.append(f"| {domain} | {loss:.3f} | {other:.3f} | {loss - other:+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
