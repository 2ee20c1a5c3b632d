"""The kinds of training by name: pretraining, fine-tuning on chats, reinforcement on answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moescope.machine import choose_device
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.config import TrainConfig
from moescope.training.kind import Kind
from moescope.training.parallel.ranks import Ranks
from moescope.training.pretraining import Pretraining
from moescope.training.rl.kind import Reinforcement
from moescope.training.sft import FineTuning
from moescope.training.start import locate_start
from moescope.training.text import prepare_text


def make_kind(
    config: TrainConfig, out: Path, say: Callable[[str], None], ranks: Ranks | None = None
) -> Kind[Any]:
    """Open what a training of the config's kind reads, on one of `ranks`.

    Raises:
        UserError: as for the kind's own reader, or there is no such device.
    """
    ranks = ranks or Ranks()
    device = choose_device(config.training.device)
    if config.kind == "pretrain":
        text = prepare_text(config.data, config.model, out, say, start=config.start.model)
        return Pretraining(config, text, device, ranks)
    start = locate_start(config.required_start())
    tokenizer, remembered = Tokenizer.load(start), TrainedText.load(start)
    kind = FineTuning if config.kind == "sft" else Reinforcement
    return kind(config, tokenizer, remembered, device, ranks)
