"""What the server's tests ask, and how they read the answers."""

import json
from pathlib import Path
from typing import Any

TEXT = "the moon before my bed 床前明月光"


def write_run(folder: Path, steps: int) -> None:
    """What a training leaves in its folder, as the trainer writes it."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            stream.write(metrics_line(step))
    load = {"poetry": {"1": [1, 3], "2": [2, 2]}, "prose": {"1": [4, 0], "2": [0, 4]}}
    (folder / "expert_load.jsonl").write_text(
        "".join(json.dumps({"step": s, "load": load}) + "\n" for s in range(2, steps + 1, 2))
    )


def metrics_line(step: int) -> str:
    row: dict[str, Any] = {"step": step, "loss": 3 / step, "max_violation": {"1": 0.5, "2": 0.25}}
    if step % 2 == 0:
        row["held_out_loss"] = {"poetry": 2 / step, "prose": 1 / step}
    return json.dumps(row) + "\n"


def events_of(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]
