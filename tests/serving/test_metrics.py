"""Metrics have vLLM's names, types and labels, and count what they are told."""

import threading

from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.serving.metrics import FINISHED_REASONS, Metrics

TYPES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}


def values(metrics: Metrics, **names: str) -> dict[str, float]:
    """Every sample but those of buckets, `name` or `name/finished_reason`, and no other label than the usual ones."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(**names).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == names.get("model_name", "")
            assert labels.pop("engine") == "0"
            if not sample.name.endswith("_bucket"):
                reason = labels.pop("finished_reason", "")
                assert not labels
                found[sample.name + ("/" + reason if reason else "")] = sample.value
    return found


def test_names_and_types_are_those_of_vllm():
    for namespace in ("dsv3", "vllm"):
        families = text_string_to_metric_families(Metrics().render(namespace=namespace, model_name="m").decode())
        assert {family.name: family.type for family in families} == {
            f"{namespace}:{name}": kind for name, kind in TYPES.items()
        }


def test_everything_starts_at_zero_and_counts():
    metrics = Metrics()
    start = values(metrics)
    assert set(start.values()) == {0.0}
    assert {f"dsv3:request_success_total/{reason}" for reason in FINISHED_REASONS} <= start.keys()
    metrics.submitted(7)
    metrics.step(running=2, waiting=1, usage=0.25, prefix_queries=10, prefix_hits=4, preemptions=0)
    metrics.step(running=1, waiting=0, usage=0.125, prefix_queries=17, prefix_hits=4, preemptions=3)
    metrics.first_token(0.5, 0.25)
    metrics.tokens(1, None)
    metrics.tokens(2, 0.0625)
    metrics.finished("stop", seconds=2.0, num_prompt_tokens=7, num_tokens=3)
    metrics.failed()
    changed = {name: value for name, value in values(metrics).items() if value != start[name]}
    assert changed == {
        "dsv3:num_requests_running": 1,
        "dsv3:kv_cache_usage_perc": 0.125,
        "dsv3:prefix_cache_queries_total": 17,
        "dsv3:prefix_cache_hits_total": 4,
        "dsv3:num_preemptions_total": 3,
        "dsv3:prompt_tokens_total": 7,
        "dsv3:generation_tokens_total": 3,
        "dsv3:request_success_total/stop": 1,
        "dsv3:request_success_total/error": 1,
        "dsv3:time_to_first_token_seconds_count": 1,
        "dsv3:time_to_first_token_seconds_sum": 0.5,
        "dsv3:request_queue_time_seconds_count": 1,
        "dsv3:request_queue_time_seconds_sum": 0.25,
        "dsv3:inter_token_latency_seconds_count": 1,
        "dsv3:inter_token_latency_seconds_sum": 0.0625,
        "dsv3:e2e_request_latency_seconds_count": 1,
        "dsv3:e2e_request_latency_seconds_sum": 2,
        "dsv3:request_prompt_tokens_count": 1,
        "dsv3:request_prompt_tokens_sum": 7,
        "dsv3:request_generation_tokens_count": 1,
        "dsv3:request_generation_tokens_sum": 3,
    }


def test_two_engines_count_apart_and_any_model_name_is_a_label():
    first, second = Metrics(), Metrics()
    first.submitted(3)
    assert values(second)["dsv3:prompt_tokens_total"] == 0
    assert values(first, model_name='a "b"\\c\n')["dsv3:prompt_tokens_total"] == 3


def test_threads_lose_no_count():
    metrics = Metrics()
    threads = [threading.Thread(target=lambda: [metrics.tokens(1, 0.01) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.render()
    for thread in threads:
        thread.join()
    found = values(metrics)
    assert found["dsv3:generation_tokens_total"] == found["dsv3:inter_token_latency_seconds_count"] == 2000
