"""Where a training writes its numbers: JSON lines, TensorBoard, and the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moescope.config import ModelConfig
from moescope.files import write_text
from moescope.model.decoder import CausalLM

SECONDS_BETWEEN_LINES = 15.0
SMOOTHING = 0.95
"""Share of the past in the loss and speed that are shown."""


def flops_per_token(model: CausalLM, seq: int) -> float:
    """Floating-point operations of forward and backward for one token of a row of `seq`.

    Six for each matrix weight that the token meets (Kaplan et al. 2020, 2.1), and attention over
    half the row on average; norms and other elementwise work count as nothing.
    """
    config = model.config
    matrices = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or (name.endswith("embed_tokens.weight") and not _is_tied(model)):
            continue
        share = 1.0
        if ".experts." in name:
            share = config.required("num_experts_per_tok") / config.required("n_routed_experts")
        matrices += parameter.numel() * share
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    widths = config.qk_head_dim + _value_width(config)
    attention = layers * config.num_attention_heads * widths * seq / 2
    return 6 * (matrices + attention)


def _is_tied(model: CausalLM) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def _value_width(config: ModelConfig) -> int:
    return config.required("v_head_dim") if config.uses_mla else config.qk_head_dim


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and scalars to TensorBoard if installed.

    Rows after `last_step` are dropped first: a resumed training writes them again.
    """

    def __init__(self, out: Path, last_step: int) -> None:
        path = out / "metrics.jsonl"
        write_text(path, "".join(_rows_up_to(path, last_step)))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board: Any = None
        self.has_tensorboard = find_spec("tensorboard") is not None
        if self.has_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Log a row; `step` is its position, numbers (nested too) go to TensorBoard."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self._board is not None:
            for name, value in _scalars(row):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rows_up_to(path: Path, last_step: int) -> Iterator[str]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError):
                continue  # the last line of a run that was killed
            if step <= last_step:
                yield line


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            nested: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
            yield from _scalars(nested, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, float(value)


class TrainingDisplay:
    """A live bar on a terminal; a plain line every few seconds anywhere else."""

    def __init__(self, step: int, steps: int, flops_per_token: float, peak: float | None) -> None:
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._loss: float | None = None
        self._seconds: float | None = None
        self._last_line = -SECONDS_BETWEEN_LINES
        console = Console(file=sys.stdout)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console
            )
            self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Show that `step` steps are done; the last took `seconds` for `tokens` tokens."""
        self._loss = _smooth(self._loss, loss)
        self._seconds = _smooth(self._seconds, seconds)
        rate = tokens / self._seconds
        remaining = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) * self._seconds))
        if (self._steps - step) * self._seconds >= 86400:
            remaining = f"{(self._steps - step) * self._seconds / 86400:.1f} days"
        parts = [f"loss {self._loss:.4f}", f"{rate:,.0f} tokens/s"]
        if self._peak is not None:
            share = rate * self._flops_per_token / self._peak
            parts.append(f"{share:.0%} of the GEMM peak")
        description = ", ".join([*parts, f"{remaining} left"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=description)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = time.monotonic()
            print(f"step {step}/{self._steps}: {description}", flush=True)


def _smooth(past: float | None, value: float) -> float:
    return value if past is None else SMOOTHING * past + (1 - SMOOTHING) * value
