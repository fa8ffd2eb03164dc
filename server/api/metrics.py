"""GET /metrics, in Prometheus' text format: what the engine measured by model, and what all API workers counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..engine.counts import Histogram, ModelStats
from .service import Service
from .traffic import PREFIX

router = APIRouter()

ENGINE_SECONDS = 2.0  # an engine that does not answer by then is down, as far as this goes
LABELS = ("model_name", "role")

Number = Callable[[ModelStats], float]
ByLabel = Callable[[ModelStats], Mapping[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Gauge:
    name: str
    about: str
    value: Number


@dataclass(frozen=True, slots=True)
class Labelled:
    """A number for each value of further labels; a counter, or an information that is always 1."""

    name: str
    about: str
    labels: tuple[str, ...]
    values: ByLabel
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Count:
    name: str
    about: str
    value: Number


@dataclass(frozen=True, slots=True)
class Spread:
    name: str
    about: str
    value: Callable[[ModelStats], Histogram]


def _by_reason(found: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(reason,): float(count) for reason, count in found.items()}


# Names and meanings are vLLM's where it has the metric.
METRICS: tuple[Gauge | Labelled | Count | Spread, ...] = (
    Gauge("num_requests_running", "Choices that run.", lambda m: m.running),
    Gauge(
        "num_requests_waiting", "Choices that wait for pages or a slot, preempted ones included.", lambda m: m.waiting
    ),
    Gauge(
        "kv_cache_usage_perc",
        "Used part of the KV cache's pages that the model has or could be lent, 0 to 1.",
        lambda m: m.pages_used / (m.pages_used + m.pages_available),
    ),
    Gauge("kv_slabs", "Slabs of the arena that are lent to the model.", lambda m: m.slabs),
    Gauge("weight_version", "Of the weights in use.", lambda m: m.weight_version),
    Labelled(
        "num_requests_waiting_by_reason",
        "Choices that wait: for capacity, or deferred while the model is paused.",
        ("reason",),
        lambda m: {("capacity",): 0.0 if m.paused else m.waiting, ("deferred",): m.waiting if m.paused else 0.0},
        counts=False,
    ),
    Labelled(
        "cache_config_info",
        "How the KV cache is divided; always 1.",
        ("block_size", "num_gpu_blocks"),
        lambda m: {(str(m.page_size), str(m.pages)): 1.0},
        counts=False,
    ),
    Count("prompt_tokens", "Tokens of the prompts of requests and groups that ran.", lambda m: m.counts.prompt_tokens),
    Count("prompt_tokens_cached", "Of these found in the prefix cache.", lambda m: m.counts.cached_tokens),
    Labelled(
        "prompt_tokens_by_source",
        "Of these computed, and found in the prefix cache.",
        ("source",),
        lambda m: {
            ("local_compute",): m.counts.prompt_tokens - m.counts.cached_tokens,
            ("local_cache_hit",): m.counts.cached_tokens,
        },
    ),
    Count("prefix_cache_queries", "Prompt tokens that were looked up.", lambda m: m.counts.prompt_tokens),
    Count("prefix_cache_hits", "Prompt tokens that were found.", lambda m: m.counts.cached_tokens),
    Count("generation_tokens", "Tokens drawn.", lambda m: m.counts.generated_tokens),
    Count(
        "num_preemptions", "Times that a choice gave up its pages to be computed again.", lambda m: m.counts.preemptions
    ),
    Labelled(
        "request_success",
        "Choices by how they ended for the engine, which hears of a stop string once the text is read and may have "
        "drawn the last token by then; abort: the client left, error: no answer.",
        ("finished_reason",),
        lambda m: _by_reason(m.counts.finished),
    ),
    Labelled(
        "admission_rejections",
        "Requests refused because too much waits, by the bound that was hit.",
        ("reason",),
        lambda m: _by_reason(m.counts.rejected),
    ),
    Count("corrupted_requests", "Requests for which the model gave NaN or infinity.", lambda m: m.counts.corrupted),
    Count("computed_tokens", "Tokens of all steps, recomputed ones included.", lambda m: m.counts.computed_tokens),
    Count("scores", "Scores given.", lambda m: m.counts.scores),
    Count(
        "shared_prefix_tokens_saved",
        "Prompt tokens not computed again, because further choices and members of groups share them.",
        lambda m: m.counts.forked_tokens,
    ),
    Count("weight_updates", "Times that the weights were replaced.", lambda m: m.counts.weight_updates),
    Spread(
        "weight_update_seconds",
        "To read, check and put in place new weights, most of it while the old ones served.",
        lambda m: m.counts.weight_update_seconds,
    ),
    Spread("weight_commit_seconds", "No step was taken meanwhile.", lambda m: m.counts.weight_commit_seconds),
    Spread("request_prompt_tokens", "Prompt tokens of a request.", lambda m: m.counts.request_prompt_tokens),
    Spread("request_generation_tokens", "Tokens of a choice.", lambda m: m.counts.generation_tokens),
    Spread(
        "request_max_num_generation_tokens",
        "Tokens of a request's longest choice.",
        lambda m: m.counts.request_longest,
    ),
    Spread(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens of a request that were not in the prefix cache.",
        lambda m: m.counts.request_computed_tokens,
    ),
    Spread("request_params_n", "Choices that a request asks for.", lambda m: m.counts.request_n),
    Spread("request_params_max_tokens", "The most tokens a request may get.", lambda m: m.counts.request_max_tokens),
    Spread("request_num_preemptions", "Preemptions of a request.", lambda m: m.counts.request_preemptions),
    Spread("iteration_tokens_total", "Tokens of a step.", lambda m: m.counts.step_tokens),
    Spread("time_to_first_token_seconds", "From receipt by the engine.", lambda m: m.counts.first_token_seconds),
    Spread("inter_token_latency_seconds", "Between two tokens of a choice.", lambda m: m.counts.next_token_seconds),
    Spread(
        "request_time_per_output_token_seconds",
        "Mean over the tokens of a choice after its first.",
        lambda m: m.counts.token_seconds,
    ),
    Spread("request_queue_time_seconds", "From receipt until it runs.", lambda m: m.counts.queue_seconds),
    Spread("request_prefill_time_seconds", "From there to the first token.", lambda m: m.counts.prefill_seconds),
    Spread("request_decode_time_seconds", "From there to the last.", lambda m: m.counts.decode_seconds),
    Spread("request_inference_time_seconds", "Prefill and decode.", lambda m: m.counts.inference_seconds),
    Spread("e2e_request_latency_seconds", "From receipt to the end.", lambda m: m.counts.request_seconds),
    Spread("score", "Scores given by models with one output.", lambda m: m.counts.score),
)


class _Collected(Collector):
    def __init__(self, models: Sequence[ModelStats] | None) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + "engine_up", "Whether the engine answers.")
        up.add_metric([], self._models is not None)
        yield up
        for metric in METRICS:
            yield _family(metric, self._models or ())


def _family(metric: Gauge | Labelled | Count | Spread, models: Sequence[ModelStats]) -> Metric:
    name, own = PREFIX + metric.name, [(m, [m.name, m.role]) for m in models]
    if isinstance(metric, Spread):
        spread = HistogramMetricFamily(name, metric.about, labels=LABELS)
        for model, labels in own:
            found = metric.value(model)
            edges = [*map(str, found.bounds), "+Inf"]
            buckets = list(zip(edges, map(float, accumulate(found.counts)), strict=True))
            spread.add_metric(labels, buckets, found.sum)
        return spread
    if isinstance(metric, Labelled):
        kind = CounterMetricFamily if metric.counts else GaugeMetricFamily
        family = kind(name, metric.about, labels=(*LABELS, *metric.labels))
        for model, labels in own:
            for more, value in metric.values(model).items():
                family.add_metric([*labels, *more], value)
        return family
    kind = CounterMetricFamily if isinstance(metric, Count) else GaugeMetricFamily
    family = kind(name, metric.about, labels=LABELS)
    for model, labels in own:
        family.add_metric(labels, metric.value(model))
    return family


def render(models: Sequence[ModelStats] | None) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Collected(models))
    return generate_latest(registry)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    service = Service.of(request)
    models = await service.client.stats(ENGINE_SECONDS)
    return Response(render(models) + service.traffic.text(), media_type=CONTENT_TYPE_LATEST)
