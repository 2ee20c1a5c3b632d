"""What a server counts, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope.kernels import cpu
from moescope.server.model_thread import ModelThread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counts of one server.

    Attributes:
        prompt_tokens: of all prompts.
        reused_tokens: those of them that had been read before.
        generated_tokens: made.
        first_token: seconds from a request's arrival to each text's first token.
        each_token: seconds from a text's token to its next.
        request: seconds from a request's arrival to its end.
    """

    def __init__(self, thread: ModelThread) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Now(thread))
        self._requests = Counter(
            "moescope_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "moescope_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.reused_tokens = Counter(
            "moescope_prompt_tokens_reused",
            "Tokens of prompts that an earlier text had left in the cache.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "moescope_generated_tokens", "Tokens made.", registry=registry
        )
        self.first_token = Histogram(
            "moescope_time_to_first_token_seconds",
            "From a request's arrival to a text's first token.",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.each_token = Histogram(
            "moescope_time_per_output_token_seconds",
            "From a token to the next of the same text.",
            buckets=EACH_TOKEN,
            registry=registry,
        )
        self.request = Histogram(
            "moescope_request_seconds",
            "From a request's arrival to its end.",
            buckets=WHOLE,
            registry=registry,
        )

    def text(self) -> bytes:
        """All that is counted, in Prometheus' text format."""
        return generate_latest(self._registry)

    def counted(self, path: str, status: int) -> None:
        """Note an answer."""
        self._requests.labels(path, str(status)).inc()


class _Now(Collector):
    """What is read at the moment that somebody asks."""

    def __init__(self, thread: ModelThread) -> None:
        self._thread = thread

    def collect(self) -> Iterator[Metric]:
        """Yield the thread's state and the kernels' counter."""
        thread = self._thread
        yield GaugeMetricFamily(
            "moescope_requests_running", "Texts that get tokens now.", thread.running
        )
        yield GaugeMetricFamily(
            "moescope_requests_waiting",
            "Texts that wait to be read or continued.",
            thread.waiting,
        )
        yield GaugeMetricFamily(
            "moescope_cache_bytes",
            "Bytes of the cache that texts take which run or wait.",
            thread.held_bytes,
        )
        load = thread.engine.runner.load
        if load.layers:  # as many labels as the model has experts, whatever is asked of it
            tokens = CounterMetricFamily(
                "moescope_expert_tokens",
                "Tokens that each routed expert has served.",
                labels=("layer", "expert"),
            )
            for layer, counts in zip(load.layers, load.tokens.tolist(), strict=True):
                for expert, count in enumerate(counts):
                    tokens.add_metric((str(layer), str(expert)), count)
            yield tokens
        if cpu.available():
            yield CounterMetricFamily(
                "moescope_weight_bytes_read",
                "Bytes of weights that products of the native kernels have read.",
                cpu.weight_bytes_read(),
            )
            experts = cpu.expert_counts()
            yield CounterMetricFamily(
                "moescope_expert_visits", "Streamed experts that layers asked for.", experts.visits
            )
            yield CounterMetricFamily(
                "moescope_expert_hits", "Those of them that were in memory.", experts.hits
            )
            yield CounterMetricFamily(
                "moescope_expert_bytes_read",
                "Bytes of experts read from files.",
                experts.bytes_read,
            )
            yield GaugeMetricFamily(
                "moescope_expert_bytes_held", "Bytes of streamed experts in memory.", experts.held
            )


class CountAnswers:
    """Notes the status of every answer under the path of its route."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at what it is answered with."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._metrics.counted(path, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if not answered:  # it will be, further out, with 500
                self._metrics.counted(path, 500)
            raise
