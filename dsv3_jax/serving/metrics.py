"""Counters of a serving engine, with the names that vLLM's dashboards know."""

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "FINISHED_REASONS", "Metrics"]

FINISHED_REASONS = ("stop", "length", "tool_calls", "abort", "error")

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTHS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))


class Metrics:
    """What an engine counts; its methods may be called from any thread.

    Names and labels belong to `render`: an engine need not know what it is called outside.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._running = self._gauge("num_requests_running", "Sequences that the last step worked on.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a step.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of pages that running sequences hold; 1 is all.")
        self._totals = {
            "prefix_queries": self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            "prefix_hits": self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            "preemptions": self._counter("num_preemptions", "Sequences that gave up their pages to others."),
        }
        self._seen = dict.fromkeys(self._totals, 0)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        for reason in FINISHED_REASONS:
            self._success.labels(reason)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._between = self._histogram("inter_token_latency_seconds", "From token to token.", _BETWEEN_TOKENS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST)
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST)
        self._prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        self._lengths = self._histogram("request_generation_tokens", "Tokens generated for a request.", _LENGTHS)

    def submitted(self, num_prompt_tokens: int) -> None:
        """A sequence was accepted."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def step(
        self, *, running: int, waiting: int, usage: float, prefix_queries: int, prefix_hits: int, preemptions: int
    ) -> None:
        """The engine stands so after a step; the last three are totals since it started. One thread calls this."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._usage.set(usage)
        totals = {"prefix_queries": prefix_queries, "prefix_hits": prefix_hits, "preemptions": preemptions}
        for name, total in totals.items():
            if total > self._seen[name]:
                self._totals[name].inc(total - self._seen[name])
                self._seen[name] = total

    def first_token(self, seconds_since_arrival: float, seconds_in_queue: float) -> None:
        """A sequence got its first token, which `tokens` does not count a second time as a gap."""
        self._first.observe(seconds_since_arrival)
        self._queue.observe(seconds_in_queue)

    def tokens(self, count: int, seconds_since_last: float | None) -> None:
        """`count` tokens came at once, so long after the last ones; None where they are a sequence's first."""
        self._generation_tokens.inc(count)
        if seconds_since_last is not None:
            self._between.observe(seconds_since_last)

    def finished(self, reason: str, *, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """A sequence ended, `seconds` after its arrival."""
        self._success.labels(reason).inc()
        self._latency.observe(seconds)
        self._prompt_lengths.observe(num_prompt_tokens)
        self._lengths.observe(num_tokens)

    def failed(self) -> None:
        """A sequence ended by an error of the engine."""
        self._success.labels("error").inc()

    def render(self, *, namespace: str = "dsv3", model_name: str = "") -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`), as `namespace:name{engine="0",model_name="…"}`.

        Namespace "vllm" gives vLLM's own names.
        """
        named = CollectorRegistry(auto_describe=False)
        named.register(_Named(self._registry, namespace, {"model_name": model_name, "engine": "0"}))
        return generate_latest(named)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)


@dataclasses.dataclass(frozen=True, eq=False)
class _Named(Collector):
    """The metrics of `registry` in a namespace, with labels in front."""

    registry: CollectorRegistry
    namespace: str
    labels: dict[str, str]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            named = Metric(f"{self.namespace}:{metric.name}", metric.documentation, metric.type)
            named.samples = [
                sample._replace(name=f"{self.namespace}:{sample.name}", labels={**self.labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield named
