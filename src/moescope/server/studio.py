"""Answers what the page asks, with one model: messages in, messages out, nothing of HTTP."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch

from moescope.api import Model, load
from moescope.catalog import catalog
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.lab.beside import beside, expert_loads
from moescope.native.decoder import NativeDecoder
from moescope.scope.cards import cards_of
from moescope.scope.detail import Reading, TokenDetail
from moescope.scope.history import History, history_of
from moescope.scope.parts import WHOLE, Parts
from moescope.scope.reasoning import FILE as REASONING, ReasoningHistory
from moescope.scope.specialization import Specialization, TypicalToken
from moescope.scope.steps import End, stream
from moescope.scope.twin_study import FILE as TWINS, TwinStudy
from moescope.server import schema
from moescope.server.companions import Companion, Role, find_companions
from moescope.server.described import (
    cache_info,
    layer_info,
    parameter_count,
    reference_info,
    thinks,
)
from moescope.server.examples import examples, hero_text, question_form
from moescope.server.measured import (
    held_out_losses,
    history_file,
    history_kept,
    specialization_of,
    training_steps,
)
from moescope.server.requests import NotThere
from moescope.server.traffic import Traffic
from moescope.text.deepseek_vocabulary import deepseek_tokenizer

REFERENCE = "deepseek-r1"
SMALL = 200_000_000
"""Parameters at work on a token, below which one thread is as fast as many."""
KEPT = 8
"""Forward passes, steered models and streams that are kept for the next question."""
KEPT_BESIDE = 2
"""The same where memory is for others."""
MAX_PLAYING = 2
"""Texts that are written for the page at a time where memory is for others."""
HERO_TOKENS = 48
"""Tokens that the first screen's text is continued by at most."""


StreamEvent = schema.TokenEvent | schema.EndEvent
Key = TypeVar("Key")
Value = TypeVar("Value")


class Studio:
    """A model, what is known about it, and the models beside it.

    Attributes:
        model: the one that the page shows.
        companions: models of the same vocabulary, one of each role; loaded when first asked.
        folder: where the model lies, with what was measured of it; None for one made in memory.
        watching: folder of a training that runs now.
        parts: in which texts are computed.
        limit: tokens of a text at most, where memory is for others; None for as many as the
            model's context holds.
        traffic: what others ask of the server that the page stands in; None if nobody watches.
    """

    def __init__(
        self,
        model: Model,
        *,
        companions: Sequence[Companion] = (),
        folder: Path | None = None,
        watching: Path | None = None,
        parts: Parts = WHOLE,
        limit: int | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.model, self.companions = model, list(companions)
        self.folder, self.watching = folder, watching
        self.parts, self.limit, self.traffic = parts, limit, traffic
        self._playing = 0
        kept = KEPT if limit is None else KEPT_BESIDE
        self._steered: _Kept[str, Model] = _Kept(kept)
        self._readings: _Kept[tuple[str, tuple[int, ...]], Reading] = _Kept(kept)
        self._streams: _Kept[str, list[StreamEvent]] = _Kept(kept)
        self._starts: dict[schema.Language, schema.StartAnswer] = {}
        self._beside: dict[str, Model] = {}

    @classmethod
    def open(
        cls,
        name_or_path: str,
        *,
        watching: Path | None = None,
        backend: str | None = None,
        quantize: str | None = None,
        device: str | None = None,
        stream_experts: bool = False,
        expert_memory: int | None = None,
    ) -> "Studio":
        """Load a model, and those beside it: folders whose names begin with its own and a dash.

        Args:
            name_or_path: as for `moescope.load`.
            watching: folder of a training to follow.
            backend: as for `moescope.load`.
            quantize: as for `moescope.load`.
            device: as for `moescope.load`.
            stream_experts: as for `moescope.load`.
            expert_memory: as for `moescope.load`.

        Raises:
            UserError: as for `moescope.load`.
        """
        model = load(
            name_or_path,
            backend=backend,
            quantize=quantize,
            device=device,
            stream_experts=stream_experts,
            expert_memory=expert_memory,
        )
        folder = (model.path or Path(name_or_path)).resolve()
        companions = find_companions(folder, model.config, model.tokenizer)
        return cls(model, companions=companions, folder=folder, watching=watching)

    # --- the model ------------------------------------------------------------------------------

    @cached_property
    def info(self) -> schema.ModelInfo:
        """What the page needs to know before anything is typed."""
        config = self.model.config
        return schema.ModelInfo(
            name=self.model.name,
            layers=[layer_info(config, i) for i in range(config.num_hidden_layers)],
            num_experts_per_tok=config.num_experts_per_tok or 0,
            scoring_func=config.scoring_func,
            topk_method=config.topk_method,
            softmax_after_topk=config.softmax_after_topk,
            sampling=schema.SamplingRequest.model_validate(self.model.engine.defaults.sampling),
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size or 0,
            num_attention_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            context=config.max_position_embeddings,
            parameters=parameter_count(config),
            cache=cache_info(config),
            reference=reference_info(catalog()[REFERENCE].config),
            companions=[schema.CompanionInfo.model_validate(c) for c in self.companions],
            has_training=self._has_training,
            watching=self.watching is not None,
            traffic=self.traffic is not None,
            question_form=self.question_form,
            thinks=thinks(self.model.tokenizer),
            examples=examples(self.question_form),
        )

    def start(self, language: schema.Language) -> schema.StartAnswer:
        """All that the page shows first; computed once."""
        if language not in self._starts:
            prompt = next(e.text for e in self.info.examples if e.language == language)
            self._starts[language] = schema.StartAnswer(
                model=self.info,
                specialization=None if self._specialization is None else self.specialization(),
                prompt=prompt,
                steps=self.trace(schema.TextRequest(prompt=prompt)).steps,
                hero=self.hero,
            )
        return self._starts[language]

    @cached_property
    def hero(self) -> schema.GenerateRequest:
        """What the first screen asks for."""
        text = hero_text(self.question_form)
        return schema.GenerateRequest(prompt=text, max_tokens=HERO_TOKENS)

    @cached_property
    def question_form(self) -> str | None:
        """The model's chat form around a question; None without one."""
        return question_form(self.model.tokenizer)

    @property
    def threads(self) -> int:
        """Threads for PyTorch: one where a second would take longer to wake than to compute.

        So it is with small matrices, and beside native kernels, which have threads of their own.
        """
        packed = isinstance(self.model.network.model, NativeDecoder)
        small = parameter_count(self.model.config).active < SMALL
        return 1 if small or packed else torch.get_num_threads()

    # --- a text -----------------------------------------------------------------------------------

    def generate(self, request: schema.GenerateRequest) -> Iterator[StreamEvent]:
        """Read a text, then continue it; an event for each token and for the end.

        The same question, seed included, has the same answer: the last ones are kept.

        Raises:
            UserError: the text or the steering asks what the model cannot do.
        """
        asked = request.model_dump_json()
        if (known := self._streams.find(asked)) is not None:
            yield from known
            return
        events: list[StreamEvent] = []
        for event in self._generate(request):
            events.append(event)
            yield event
        self._streams.keep(asked, events)

    def _generate(self, request: schema.GenerateRequest) -> Iterator[StreamEvent]:
        engine = self._steer(request.steering).engine
        params = _params(request.sampling, max_tokens=request.max_tokens)
        ids = self._ids(request)
        if self.limit is not None and self._playing >= MAX_PLAYING:
            raise UserError(
                f"{MAX_PLAYING} texts are being written for the page already; wait for one to end",
                "page_busy",
            )
        self._playing += 1
        try:
            for step in stream(engine, ids, params, request.known, self.parts):
                if isinstance(step, End):
                    yield schema.EndEvent(end=step)
                else:
                    yield schema.TokenEvent(step=step)
        finally:
            self._playing -= 1

    def trace(self, request: schema.TextRequest) -> schema.TraceAnswer:
        """All tokens of a text at once; raises as `generate`."""
        return schema.TraceAnswer(steps=self._reading(request).steps())

    def token(self, request: schema.TokenRequest) -> TokenDetail:
        """One token in one layer; raises as `generate`, and where there is none such."""
        params = _params(request.sampling)
        return self._reading(request).token(request.index, request.layer, params)

    def expert(self, request: schema.ExpertRequest) -> schema.ExpertAnswer:
        """One expert at work on a token; raises as `token`."""
        work = self._reading(request).expert(request.index, request.layer, request.expert)
        found, domains = self._specialization, dict[str, float]()
        typical: list[TypicalToken] = []
        if found is not None and request.layer in found.layers:
            at = found.layers.index(request.layer)
            typical = found.typical[at][request.expert]
            domains = {
                domain: load[at][request.expert]
                for domain, load in zip(found.domains, found.load, strict=True)
            }
        return schema.ExpertAnswer(work=work, typical=typical, domains=domains)

    def dense(self, request: schema.DenseRequest) -> schema.DenseAnswer:
        """The same ids to this model and to its dense twins.

        Raises:
            UserError: there is no such twin, or as for `generate`.
        """
        twins = [self._companion("dense", "dense twin")]
        twins += [c for c in self.companions if c.role == "large" and c.problem is None]
        engines = {m.name: m.engine for m in (self.model, *map(self._open, twins))}
        folders = [self.folder, *(twin.folder for twin in twins)]
        return schema.DenseAnswer(
            contestants=beside(engines, self._ids(request)),
            held_out=held_out_losses(folders),
            steps=[training_steps(folder) for folder in folders],
            study=TwinStudy.from_file(TWINS) if TWINS.exists() else None,
        )

    def unbalanced(self, request: schema.UnbalancedRequest) -> schema.UnbalancedAnswer:
        """How the copy that was trained without balancing spreads a text over its experts.

        Raises:
            UserError: there is no such copy, or as for `generate`.
        """
        copy = self._companion("unbalanced", "copy trained without balancing")
        loads = expert_loads(self._open(copy).engine, self._ids(request))
        measured = specialization_of(copy.folder)
        return schema.UnbalancedAnswer(
            name=copy.name,
            steps=training_steps(copy.folder),
            own_steps=training_steps(self.folder),
            layers=list(loads),
            load=list(loads.values()),
            domains=measured.domains if measured else [],
            domain_load=measured.load if measured else [],
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
                "`moescope specialize` measures it",
                "no_specialization",
            )
        return schema.SpecializationAnswer(
            domains=found.domains,
            layers=found.layers,
            load=found.load,
            mutual_information=found.mutual_information,
            cards=cards_of(found),
        )

    def training(self) -> History:
        """The history of the training that is watched, or of the model's own.

        Raises:
            UserError: none was kept, or the watched one has no step yet.
        """
        if self.watching is not None:
            return history_of(self.watching)
        found = history_kept(self.folder)
        if found is None:
            raise NotThere(
                f"the history of the training of {self.model.name} was not kept", "no_history"
            )
        return found

    def reasoning(self) -> ReasoningHistory:
        """How the small mixture of `recipes/reason` learned to reason, whatever model is shown."""
        return ReasoningHistory.from_file(REASONING)

    def _companion(self, role: Role, noun: str) -> Companion:
        for companion in self.companions:
            if companion.role == role:
                if companion.problem:
                    raise NotThere(
                        f"the {noun} cannot be opened: {companion.problem}",
                        f"{role}_broken",
                        problem=companion.problem,
                    )
                return companion
        raise NotThere(f"there is no {noun} beside {self.model.name}", f"no_{role}")

    def _open(self, companion: Companion) -> Model:
        if companion.name not in self._beside:
            model = load(companion.folder)
            model.name = companion.name
            self._beside[companion.name] = model
        return self._beside[companion.name]

    @property
    def _has_training(self) -> bool:
        return self.watching is not None or history_file(self.folder) is not None

    @cached_property
    def _specialization(self) -> Specialization | None:
        return None if self.folder is None else specialization_of(self.folder)

    @property
    def followed(self) -> Path:
        """The folder of a training that runs now.

        Raises:
            NotThere: none is watched.
        """
        if self.watching is None:
            raise NotThere("no training is watched; `moescope train ... --watch` shows one")
        return self.watching

    def answer(self, request: schema.AnswerRequest) -> schema.WatchedAnswer:
        """The tokens of an answer that others were given.

        Raises:
            NotThere: nobody watches, or it is no longer there.
        """
        return self.watched.answer(request.number, request.text)

    @property
    def watched(self) -> Traffic:
        """What others ask.

        Raises:
            NotThere: nobody watches.
        """
        if self.traffic is None:
            raise NotThere("what is asked is not watched; `moescope serve ... --watch` shows it")
        return self.traffic

    # --- what is kept -----------------------------------------------------------------------------

    def _ids(
        self, request: schema.TextRequest | schema.GenerateRequest | schema.DenseRequest
    ) -> tuple[int, ...]:
        """The text's ids; those given go before the prompt."""
        engine, ids = self.model.engine, request.ids
        if ids is None:
            ids = engine.encode(request.prompt)
        engine.check(ids)
        if self.limit is not None and len(ids) > self.limit:
            raise UserError(
                f"this text has {len(ids)} tokens; pictures are made of up to {self.limit}",
                "picture_too_long",
                n=len(ids),
                max=self.limit,
            )
        return tuple(ids)

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
        steering, ids = request.steering.model_dump_json(), self._ids(request)

        def read() -> Reading:
            # A text that is played grows by a token at a time.
            same = (kept for key, kept in self._readings.items() if key[0] == steering)
            begun = max(
                (kept for kept in same if kept.begins(ids)), key=lambda k: len(k.ids), default=None
            )
            return Reading(self._steer(request.steering).engine, ids, self.parts, begun)

        return self._readings.get((steering, ids), read)


def cut(request: schema.CutRequest) -> schema.CutAnswer:
    """A text as DeepSeek-V3 and R1 cut it, whatever the page's model does."""
    tokenizer = deepseek_tokenizer()
    if tokenizer is None:
        return schema.CutAnswer(pieces=None)
    spelled = map(tokenizer.token_bytes, tokenizer.encode(request.text))
    return schema.CutAnswer(
        pieces=[
            schema.Piece(text=piece.decode(errors="replace"), bytes=list(piece))
            for piece in spelled
        ]
    )


class _Kept(Generic[Key, Value]):
    """The values used last, by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made anew if it is not kept."""
        found = self.find(key)
        if found is None:
            self.keep(key, found := make())
        return found

    def find(self, key: Key) -> Value | None:
        """Return the value of a key; None if it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def items(self) -> list[tuple[Key, Value]]:
        """All that is kept."""
        return list(self._values.items())

    def keep(self, key: Key, value: Value) -> None:
        """Keep a value, and no more than so many."""
        self._values[key] = value
        while len(self._values) > self._most:
            self._values.popitem(last=False)


def _params(asked: schema.SamplingRequest, max_tokens: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **asked.model_dump())
