"""A network whose routers decide otherwise for some texts of a batch."""

import hashlib
from collections import OrderedDict
from functools import cached_property
from threading import Lock

from moescope.errors import UserError
from moescope.kernels import cpu
from moescope.model.decoder import CausalLM
from moescope.model.steering import Steering, steered, steered_gates
from moescope.native.decoder import NativeDecoder

KEPT = 16
"""Steerings that are kept ready, those longest unused leaving first."""


class Steered:
    """One steering of one network; weights are shared.

    Args:
        model: the network.
        steering: what its routers do otherwise.

    Attributes:
        salt: texts of other steerings have another, and share nothing of the cache.

    Raises:
        UserError: the network cannot do what is asked.
    """

    def __init__(self, model: CausalLM, steering: Steering, salt: bytes) -> None:
        self._model, self._steering, self.salt = model, steering, salt
        self._gates = steered_gates(model, steering)

    @cached_property
    def network(self) -> CausalLM:
        """The network, steered."""
        return steered(self._model, self._steering)

    @cached_property
    def routers(self) -> "list[cpu.Router | None]":
        """Its routers as data, for a native decoder whose layers are one call."""
        decoder = self._model.model
        assert isinstance(decoder, NativeDecoder)
        return decoder.joined_routers(self._gates)


class Steerings:
    """The steerings of one network that are in use, or were lately."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._kept: OrderedDict[bytes, Steered] = OrderedDict()
        self._lock = Lock()

    def of(self, steering: Steering | None) -> Steered | None:
        """Return a steering, made ready; None where it changes nothing.

        Raises:
            UserError: the network cannot do what is asked, or it is noise.
        """
        if steering is None or steering.changes_nothing:
            return None
        if steering.noise:
            raise UserError(
                "noise on router logits is for all texts of a model; take model.steer(noise=...)"
            )
        salt = _digest(steering)
        with self._lock:
            if salt not in self._kept:
                self._kept[salt] = Steered(self._model, steering, salt)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(salt)
            return self._kept[salt]


def _digest(steering: Steering) -> bytes:
    parts = {name: getattr(steering, name) for name in sorted(Steering.__dataclass_fields__)}
    parts |= {name: sorted(parts[name]) for name in ("disabled", "forced")}
    parts["bias"] = sorted(steering.bias.items())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
