"""Where a training writes its numbers: JSON lines, TensorBoard, and the terminal."""

import json
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.files import write_text
from moescope.model.decoder import CausalLM

SECONDS_BETWEEN_LINES = 15.0
RECENT_STEPS = 50
"""Steps over which the loss and the speed that are shown are taken."""


def flops_per_token(model: CausalLM, seq: int) -> float:
    """Floating-point operations of forward and backward for one token of a row of `seq`.

    Six for each matrix weight that the token meets (Kaplan et al. 2020, section 2.1), and causal
    attention over half the row on average; elementwise work counts as nothing.
    """
    config = model.config
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    matrices = 0.0
    for name, parameter in model.named_parameters():
        looked_up = name.endswith("embed_tokens.weight") and not tied
        if parameter.ndim == 1 or looked_up:
            continue
        share = 1.0
        if ".experts." in name:
            share = config.required("num_experts_per_tok") / config.required("n_routed_experts")
        matrices += parameter.numel() * share
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    widths = config.qk_head_dim + _value_width(config)
    attention = layers * config.num_attention_heads * widths * seq / 2
    return 6 * (matrices + attention)


def _value_width(config: ModelConfig) -> int:
    return config.required("v_head_dim") if config.uses_mla else config.qk_head_dim


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and scalars to TensorBoard if installed.

    Rows after `last_step` are dropped first, of `expert_load.jsonl` too: a resumed training
    writes them again.

    On a full disk rows wait for room; `close` writes the last of them, or says that it cannot.

    Raises:
        UserError: the folder cannot be written or the disk is full, here and in `close`.
    """

    def __init__(self, out: Path, last_step: int) -> None:
        self._waiting: list[str] = []
        self._path = out / "metrics.jsonl"
        for path in (self._path, out / "expert_load.jsonl"):
            write_text(path, "".join(rows_up_to(path, last_step)))
        self._board: Any = None
        self.has_tensorboard = find_spec("tensorboard") is not None
        with self._disk_errors():
            self._file = self._path.open("ab", buffering=0)
            if self.has_tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: dict[str, Any]) -> str | None:
        """Log a row; `step` is its position, numbers (nested too) go to TensorBoard.

        Returns:
            Why the disk did not take it, the first time; the row waits for room.
        """
        was_waiting = bool(self._waiting)
        self._waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self._write_waiting()
            if self._board is not None:
                for name, value in _scalars(row):
                    self._board.add_scalar(name, value, row["step"])
        except OSError as error:
            return None if was_waiting else str(self._cannot_write(error))
        return None

    def _write_waiting(self) -> None:
        """Write whole lines, or none of them: what a full disk took of one is cut off again."""
        end = self._file.tell()
        try:
            lines = "".join(self._waiting).encode()
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError:
            self._file.truncate(end)
            self._file.seek(end)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Write what waits, and close both."""
        with self._disk_errors():
            try:
                if self._waiting:
                    self._write_waiting()
            finally:
                self._file.close()
                if self._board is not None:
                    self._board.close()

    @contextmanager
    def _disk_errors(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self._path} ({error.strerror or error}); free some space: what it "
            "lacks is kept in memory and written as soon as there is room"
        )


def rows_up_to(path: Path, last_step: int) -> Iterator[str]:
    """Yield the lines of a file of JSON objects whose `step` is at most `last_step`.

    A resumed training writes later ones again.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError):
                continue  # half a line, from a run that was killed
            if step <= last_step:
                yield line


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(cast("dict[str, Any]", value), f"{prefix}{name}/")
        elif isinstance(value, list):
            numbered = {str(i): one for i, one in enumerate(cast("list[float]", value))}
            yield from _scalars(numbered, f"{prefix}{name}/")
        elif name != "step" and value is not None:
            yield prefix + name, float(value)


class TrainingDisplay:
    """A live bar on a terminal; a plain line every few seconds anywhere else."""

    def __init__(
        self, console: Console, *, step: int, steps: int, flops_per_token: float, peak: float | None
    ) -> None:
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._losses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_line = float("-inf")
        self._console = console
        self._bar = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
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
        """Print a line, above the bar where there is one."""
        print_line(self._console, message)

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Show that `step` steps are done; the last took `seconds` for `tokens` tokens."""
        self._losses.append(loss)
        self._seconds.append(seconds)
        seconds = statistics.median(self._seconds)
        rate = tokens / seconds
        parts = [f"loss {statistics.fmean(self._losses):.4f}", f"{rate:,.0f} tokens/s"]
        if self._peak is not None:
            parts.append(f"{rate * self._flops_per_token / self._peak:.0%} of the GEMM peak")
        parts.append(f"{timedelta(seconds=round((self._steps - step) * seconds))} left")
        description = ", ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=description)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}: {description}")


def print_line(console: Console, message: str) -> None:
    """Print `message` as it is, on one line however long."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)
    console.file.flush()
