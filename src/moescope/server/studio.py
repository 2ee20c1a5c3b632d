"""Answers what the page asks, with one model: messages in, messages out, nothing of HTTP."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, TypeVar

from moescope.api import Model, load, locate
from moescope.catalog import catalog, count_parameters
from moescope.config import ModelConfig
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.lab.beside import beside
from moescope.scope.detail import Reading
from moescope.scope.history import FILE as HISTORY_FILE
from moescope.scope.history import METRICS, History, history_of
from moescope.scope.specialization import Specialization
from moescope.scope.steps import End, read, stream
from moescope.server import schema
from moescope.server.examples import examples
from moescope.tokenizer import Tokenizer

REFERENCE = "deepseek-r1"
KEPT = 8
"""Forward passes and steered models that are kept for the next question."""


Key = TypeVar("Key")
Value = TypeVar("Value")


class NotThere(UserError):
    """What was asked for does not exist for this model."""


class Studio:
    """A model, what is known about it, and the models beside it.

    Attributes:
        model: the one that the page shows.
        companions: folders of models of the same vocabulary, by name; loaded when first asked.
        folder: where the model lies, with what was measured of it; None for one made in memory.
        watching: folder of a training that runs now.
    """

    def __init__(
        self,
        model: Model,
        *,
        companions: Mapping[str, Path] | None = None,
        folder: Path | None = None,
        watching: Path | None = None,
    ) -> None:
        self.model, self.companions = model, dict(companions or {})
        self.folder, self.watching = folder, watching
        self._steered: _Kept[str, Model] = _Kept(KEPT)
        self._readings: _Kept[tuple[str, tuple[int, ...]], Reading] = _Kept(KEPT)

    @classmethod
    def open(
        cls,
        name_or_path: str,
        *,
        watching: Path | None = None,
        backend: str | None = None,
        quantize: str | None = None,
    ) -> "Studio":
        """Load a model, and those beside it: folders whose names begin with its own and a dash.

        Args:
            name_or_path: as for `moescope.load`.
            watching: folder of a training to follow.
            backend: as for `moescope.load`.
            quantize: as for `moescope.load`.

        Raises:
            UserError: as for `moescope.load`.
        """
        folder = locate(name_or_path).resolve()
        model = load(name_or_path, backend=backend, quantize=quantize)
        companions = {
            path.name: path
            for path in sorted(folder.parent.glob(f"{folder.name}-*"))
            if (path / "config.json").is_file()
            and (path / "tokenizer.json").is_file()
            and Tokenizer.load(path).hash == model.tokenizer.hash
        }
        return cls(model, companions=companions, folder=folder, watching=watching)

    # --- the model ------------------------------------------------------------------------------

    @cached_property
    def info(self) -> schema.ModelInfo:
        """What the page needs to know before anything is typed."""
        config = self.model.config
        return schema.ModelInfo(
            name=self.model.name,
            layers=[_layer_info(config, i) for i in range(config.num_hidden_layers)],
            num_experts_per_tok=config.num_experts_per_tok or 0,
            scoring_func=config.scoring_func,
            topk_method=config.topk_method,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size or 0,
            num_attention_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            context=config.max_position_embeddings,
            parameters=_parameters(config),
            cache=_cache(config),
            reference=_parameters(catalog()[REFERENCE].config),
            companions=list(self.companions),
            has_specialization=self._specialization is not None,
            has_training=self._has_training,
            watching=self.watching is not None,
            examples=examples(self.model.tokenizer),
        )

    # --- a text -----------------------------------------------------------------------------------

    def generate(
        self, request: schema.GenerateRequest
    ) -> Iterator[schema.TokenEvent | schema.EndEvent]:
        """Read a text, then continue it; an event for each token and for the end.

        Raises:
            UserError: the text or the steering asks what the model cannot do.
        """
        engine = self._steer(request.steering).engine
        params = _params(request.sampling, max_tokens=request.max_tokens)
        for step in stream(engine, self._ids(request), params):
            if isinstance(step, End):
                yield schema.EndEvent(
                    finish_reason=step.finish_reason,
                    prompt_tokens=step.prompt_tokens,
                    new_tokens=step.new_tokens,
                    seconds=step.seconds,
                )
            else:
                yield schema.TokenEvent(step=schema.TokenStep.model_validate(step))

    def trace(self, request: schema.TextRequest) -> schema.TraceAnswer:
        """All tokens of a text at once; raises as `generate`."""
        steps = read(self._steer(request.steering).engine, self._ids(request))
        return schema.TraceAnswer(steps=[schema.TokenStep.model_validate(s) for s in steps])

    def token(self, request: schema.TokenRequest) -> schema.TokenDetail:
        """One token in one layer; raises as `generate`, and where there is none such."""
        params = _params(request.sampling)
        detail = self._reading(request).token(request.index, request.layer, params)
        return schema.TokenDetail.model_validate(detail)

    def expert(self, request: schema.ExpertRequest) -> schema.ExpertDetail:
        """One expert at work on a token; raises as `token`."""
        work = self._reading(request).expert(request.index, request.layer, request.expert)
        found, typical, domains = self._specialization, [], dict[str, float]()
        if found is not None and request.layer in found.layers:
            at = found.layers.index(request.layer)
            typical = found.typical[at][request.expert]
            domains = {
                domain: load[at][request.expert]
                for domain, load in zip(found.domains, found.load, strict=True)
            }
        return schema.ExpertDetail(
            gate=work.gate,
            up=work.up,
            activated=work.activated,
            output=work.output,
            typical=[schema.TypicalToken.model_validate(token) for token in typical],
            domains=domains,
        )

    def dense(self, request: schema.DenseRequest) -> schema.DenseAnswer:
        """The same ids to this model and to its dense twin.

        Raises:
            UserError: there is no such twin, or as for `generate`.
        """
        if self._twin is None:
            raise NotThere(f"there is no dense twin beside {self.model.name}")
        engines = {model.name: model.engine for model in (self.model, self._twin)}
        contestants = beside(engines, self._ids(request))
        return schema.DenseAnswer(
            contestants=[schema.Contestant.model_validate(c) for c in contestants]
        )

    # --- what was measured before ---------------------------------------------------------------

    def specialization(self) -> schema.SpecializationAnswer:
        """Who serves whom.

        Raises:
            UserError: it has not been measured.
        """
        found = self._specialization
        if found is None:
            raise NotThere(
                f"nothing is known of what the experts of {self.model.name} specialise in; "
                "`moescope specialize` measures it"
            )
        return schema.SpecializationAnswer(
            domains=found.domains,
            layers=found.layers,
            load=found.load,
            mutual_information=found.mutual_information,
        )

    def training(self) -> schema.TrainingAnswer:
        """The history of the training that is watched, or of the model's own.

        Raises:
            UserError: none was kept, or the watched one has no step yet.
        """
        if self.watching is not None:
            history = history_of(self.watching)
        elif self.folder is not None and (self.folder / HISTORY_FILE).is_file():
            history = History.from_file(self.folder / HISTORY_FILE)
        elif self.folder is not None and (self.folder / METRICS).is_file():
            history = history_of(self.folder)
        else:
            raise NotThere(f"the history of the training of {self.model.name} was not kept")
        return schema.TrainingAnswer.model_validate(history)

    @cached_property
    def _twin(self) -> Model | None:
        """The first companion without routed experts."""
        for name, folder in self.companions.items():
            if ModelConfig.from_file(folder / "config.json").n_routed_experts is None:
                twin = load(folder)
                twin.name = name
                return twin
        return None

    @property
    def _has_training(self) -> bool:
        kept = self.folder is not None and (
            (self.folder / HISTORY_FILE).is_file() or (self.folder / METRICS).is_file()
        )
        return kept or self.watching is not None

    @cached_property
    def _specialization(self) -> Specialization | None:
        if self.folder is None:
            return None
        try:
            return Specialization.from_file(self.folder / "specialization.json")
        except UserError:
            return None  # not there, or a training's own measure of itself

    # --- what is kept -----------------------------------------------------------------------------

    def _ids(
        self, request: schema.TextRequest | schema.GenerateRequest | schema.DenseRequest
    ) -> tuple[int, ...]:
        """The text's ids; those given go before the prompt."""
        if request.ids is None:
            return tuple(self.model.engine.encode(request.prompt))
        self.model.engine.check(request.ids)
        return tuple(request.ids)

    def _steer(self, asked: schema.SteeringRequest) -> Model:
        return self._steered.get(
            asked.model_dump_json(),
            lambda: self.model.steer(
                num_experts_per_tok=asked.num_experts_per_tok,
                rule=asked.rule,
                without_bias=asked.without_bias,
                noise=asked.noise,
                noise_seed=asked.noise_seed,
                bias={(e.layer, e.expert): e.bias for e in asked.bias},
                disabled=[(e.layer, e.expert) for e in asked.disabled],
                forced=[(e.layer, e.expert) for e in asked.forced],
            ),
        )

    def _reading(self, request: schema.TextRequest) -> Reading:
        ids = self._ids(request)
        return self._readings.get(
            (request.steering.model_dump_json(), ids),
            lambda: Reading(self._steer(request.steering).engine, ids),
        )


class _Kept(Generic[Key, Value]):
    """The values used last, by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made anew if it is not kept."""
        if key not in self._values:
            self._values[key] = make()
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def _params(asked: schema.SamplingRequest, max_tokens: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **asked.model_dump())


def _layer_info(config: ModelConfig, layer_idx: int) -> schema.LayerInfo:
    kind: Literal["dense", "moe"] = "moe" if config.is_moe_layer(layer_idx) else "dense"
    return schema.LayerInfo(
        kind=kind,
        n_routed_experts=config.required("n_routed_experts") if kind == "moe" else 0,
        n_shared_experts=config.n_shared_experts if kind == "moe" else 0,
    )


def _parameters(config: ModelConfig) -> schema.ParameterInfo:
    counted = count_parameters(config)
    return schema.ParameterInfo(total=counted.total, active=counted.active)


def _cache(config: ModelConfig) -> schema.CacheInfo:
    if config.uses_mla:
        kept = config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
        width = config.qk_head_dim + config.required("v_head_dim")
    else:
        kept = 2 * config.num_key_value_heads * config.qk_head_dim
        width = 2 * config.qk_head_dim
    return schema.CacheInfo(kept=kept, full=config.num_attention_heads * width)
