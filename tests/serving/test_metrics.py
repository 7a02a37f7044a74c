"""The metrics in Prometheus' text: names, values, and labels from fixed lists."""

from __future__ import annotations

from phalanx import SamplingParams
from phalanx.engine.protocol.messages import Delta, Failed, Status, Submit
from phalanx.serving.gateway.metrics import EngineSample, GatewayMetrics
from phalanx.tests.serving.fake_engine import finished, model_info, status, two_tokens
from prometheus_client.parser import text_string_to_metric_families


def values(metrics: GatewayMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Each series by its name: its value by the values of its labels, those of vLLM left out."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "fake"
            rest = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found.setdefault(sample.name, {})[tuple(rest.values())] = sample.value
    return found


def _metrics(*engines: Status | None) -> GatewayMetrics:
    def samples() -> list[EngineSample]:
        return [
            EngineSample(str(number), "ready", number, each, None if each is None else model_info())
            for number, each in enumerate(engines)
        ]

    metrics = GatewayMetrics(samples)
    metrics.model_name = "fake"
    return metrics


def test_what_an_engine_says_of_itself_is_under_vllms_names() -> None:
    one = status(
        running=3, waiting=4, preemptions=5, prefix_queries=20, prefix_hits=8, prompt_tokens=12, generation_tokens=30,
        steps=9, stalled_s=0.5, waiting_tokens=77, phase_seconds={"schedule": 1.5, "wait": 2.5},
        rank_wait_seconds=[0.25, 4.0],
    )  # fmt: skip
    metrics = _metrics(one, None)
    metrics.refused = lambda: 5
    metrics.tasks = lambda: 6
    found = values(metrics)
    assert found["phalanx:gateway_tasks"] == {(): 6}
    assert found["phalanx:requests_refused_total"] == {(): 5}
    zero = ("0",)
    assert found["vllm:num_requests_running"] == {zero: 3}
    assert found["vllm:num_requests_waiting"] == {zero: 4}
    assert found["vllm:kv_cache_usage_perc"] == {zero: 0.25}
    assert found["vllm:num_preemptions_total"] == {zero: 5}
    assert found["vllm:prefix_cache_queries_total"] == {zero: 20}
    assert found["vllm:prefix_cache_hits_total"] == {zero: 8}
    assert found["vllm:prompt_tokens_total"] == {zero: 20}
    assert found["vllm:generation_tokens_total"] == {zero: 30}
    assert list(found["vllm:cache_config_info"].values()) == [1]
    assert found["phalanx:step_phase_seconds_total"] == {("0", "schedule"): 1.5, ("0", "wait"): 2.5}
    assert found["phalanx:peak_memory_bytes"] == {("0", "0"): 1000, ("0", "1"): 2000}
    assert found["phalanx:rank_wait_seconds_total"] == {("0", "0"): 0.25, ("0", "1"): 4.0}
    assert found["phalanx:stalled_seconds"] == {zero: 0.5}
    assert found["phalanx:engine_phase"]["1", "ready"] == 1
    assert found["phalanx:engine_phase"]["1", "stopped"] == 0
    assert found["phalanx:open_requests"] == {("0",): 0, ("1",): 1}


def test_an_engine_that_has_stopped_runs_nothing_and_keeps_what_it_has_counted() -> None:
    metrics = GatewayMetrics(lambda: [EngineSample("0", "stopped", 1, status(running=51, steps=9), model_info())])
    metrics.model_name = "fake"
    found = values(metrics)
    assert "vllm:num_requests_running" not in found
    assert found["phalanx:open_requests"] == {("0",): 1}
    assert found["phalanx:steps_total"] == {("0",): 9}


def test_a_requests_times_and_tokens_are_observed_once() -> None:
    metrics = _metrics(None)
    submit = Submit(id="a", token_ids=[1], sampling=SamplingParams(n=1, max_tokens=40))
    request = metrics.request("0", submit)
    for event in two_tokens(submit):
        request.on_event(event)
    found = values(metrics)
    zero = ("0",)
    for name in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_inference_time_seconds", "request_time_per_output_token_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_params_n", "request_params_max_tokens",
    ):  # fmt: skip
        assert found[f"vllm:{name}_count"] == {zero: 1}, name
    assert abs(found["vllm:request_queue_time_seconds_sum"][zero] - 0.1) < 1e-9
    assert abs(found["vllm:request_prefill_time_seconds_sum"][zero] - 0.1) < 1e-9
    assert abs(found["vllm:request_decode_time_seconds_sum"][zero] - 0.3) < 1e-9
    assert abs(found["vllm:request_inference_time_seconds_sum"][zero] - 0.4) < 1e-9
    assert found["vllm:request_prompt_tokens_sum"] == {zero: 3}
    assert found["vllm:request_params_max_tokens_sum"] == {zero: 40}
    assert found["vllm:request_success_total"] == {("0", "stop"): 1}


def test_what_an_engine_refuses_or_fails_is_no_observation_of_a_request() -> None:
    metrics = _metrics(None)
    submit = Submit(id="a", token_ids=[1], sampling=SamplingParams(n=3, max_tokens=40))
    for error in ("InvalidRequest", "EngineFault"):
        metrics.request("0", submit).on_event(Failed("a", error, "no"))
    for event in two_tokens(submit):
        metrics.request("0", submit).on_event(event)
    found = values(metrics)
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "request_params_n"):
        assert found[f"vllm:{name}_count"] == {("0",): 1}, name
    assert found["vllm:request_params_n_sum"] == {("0",): 3}
    assert found["vllm:request_params_max_tokens_sum"] == {("0",): 40}


def test_each_completion_has_its_own_gaps() -> None:
    metrics = _metrics(None)
    request = metrics.request("0", Submit(id="a", token_ids=[1], sampling=SamplingParams(n=2)))
    for index in (0, 1, 0, 1, 1):
        request.on_event(Delta("a", index, "x", [1]))
    request.on_event(Delta("a", 0, "text alone", []))
    found = values(metrics)
    assert found["vllm:time_to_first_token_seconds_count"] == {("0",): 1}
    assert found["vllm:inter_token_latency_seconds_count"] == {("0",): 3}


def test_labels_never_hold_what_an_engine_or_a_caller_wrote() -> None:
    metrics = _metrics(None)
    for number in range(100):
        submit = Submit(id=str(number), token_ids=[1])
        metrics.request("0", submit).on_event(finished(str(number), f"reason {number}"))
        metrics.request("0", submit).on_event(Failed(str(number), f"Error{number}", "no"))
    metrics.request("0", submit).on_event(Failed("a", "EngineStopped", "no"))
    found = values(metrics)
    assert found["vllm:request_success_total"] == {("0", "other"): 100}
    assert found["phalanx:request_failure_total"] == {("0", "other"): 100, ("0", "EngineStopped"): 1}


def test_tokens_of_a_step_are_the_mean_between_two_polls() -> None:
    metrics = _metrics(None)
    first = status(steps=10, prompt_tokens=100, generation_tokens=10)
    metrics.polled("0", None, first)
    metrics.polled("0", first, first)
    metrics.polled("0", first, status(steps=14, prompt_tokens=160, generation_tokens=30))
    metrics.polled("0", status(steps=14, prompt_tokens=160), status(steps=2, prompt_tokens=1))  # a new engine
    found = values(metrics)
    assert found["vllm:iteration_tokens_total_count"] == {("0",): 4}
    assert found["vllm:iteration_tokens_total_sum"] == {("0",): 80}


def test_two_gateways_in_one_process_share_nothing() -> None:
    one, other = _metrics(None), _metrics(None)
    one.request("0", Submit(id="a", token_ids=[1])).on_event(finished("a"))
    assert "vllm:request_success_total" in values(one)
    assert "vllm:request_success_total" not in values(other)
