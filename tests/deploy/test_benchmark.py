"""The latency report: what counts, how it adds up, what it looks like."""

import re
import time

import numpy as np
import pytest

from deploy import benchmark
from deploy.benchmark import STAGES, Stopwatch

BLOCKS: dict[str, dict[str, object]] = {
    "Model info": {"model_name": "p", "precision": "fp32"},
    "Data info": {"batch_size": 2},
}


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that the test moves on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def watched(clock, batches: list[tuple[float, float, float]], warmup: int = 0) -> Stopwatch:
    watch = Stopwatch(warmup)
    for times in batches:
        for name, seconds in zip(STAGES, times, strict=True):
            with watch.stage(name):
                clock(seconds)
            clock(7)  # between the stages: counts nowhere
        watch.batch_done(2)
    return watch


def test_stages_and_their_sum(clock):
    watch = watched(clock, [(0.001, 0.010, 0.002), (0.003, 0.020, 0.004)])
    times = watch.milliseconds()
    np.testing.assert_allclose(times["preprocess_time"], [1, 3])
    np.testing.assert_allclose(times["inference_time"], [10, 20])
    np.testing.assert_allclose(times["postprocess_time"], [2, 4])
    np.testing.assert_allclose(times["total_time"], [13, 27])
    assert watch.samples == 4


def test_a_stage_may_come_in_parts(clock):
    watch = Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.stage("inference_time"):
            clock(seconds)
    watch.batch_done(1)
    np.testing.assert_allclose(watch.milliseconds()["inference_time"], [3000])
    np.testing.assert_allclose(watch.milliseconds()["preprocess_time"], [0])


def test_warm_up_batches_do_not_count(clock):
    watch = watched(clock, [(1, 1, 1), (0.001, 0.010, 0.002)], warmup=1)
    np.testing.assert_allclose(watch.milliseconds()["total_time"], [13])
    assert watch.samples == 2
    assert "no batch was counted" in watched(clock, [(1, 1, 1)], warmup=1).report({})


def test_an_error_inside_a_stage_is_not_swallowed(clock):
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.stage("inference_time"):
        raise KeyError


def test_the_report(clock):
    batches = [(0.001, 0.001 * (i + 1), 0.0005) for i in range(10)]
    text = watched(clock, batches).report(BLOCKS)
    titles = re.findall(r"^-+ (.+) -+$", text, re.M)
    assert titles == ["Env info", "Model info", "Data info", "Perf info"]
    assert "model_name: p" in text
    assert "data_num: 20" in text
    total = sum(map(sum, batches))
    assert f"total time spent(s): {total:.4f}" in text
    assert f"throughput(images/s): {20 / total:.2f}" in text
    spent = 1e3 * np.array([b[1] for b in batches])
    p50, p90, p99 = (f"{np.percentile(spent, p):.2f}" for p in (50, 90, 99))
    share = 100 * spent.sum() / (1e3 * total)
    assert (
        f"inference_time(ms): mean: {spent.mean():.2f}, p50: {p50}, p90: {p90}, p99: {p99}, "
        f"share: {share:.1f}%"
    ) in text
    shares = [float(s) for s in re.findall(r"share: ([\d.]+)%", text)]
    assert sum(shares[:3]) == pytest.approx(shares[3], abs=0.3)
    assert shares[3] == 100


def test_memory_is_in_megabytes():
    if benchmark._peak_memory() == "n/a":
        pytest.skip("no resource module")
    before = float(benchmark._peak_memory())
    ballast = np.ones(60 << 17)  # 60 MB
    assert 10 < before < 100_000
    assert float(benchmark._peak_memory()) >= max(before, 60)
    assert ballast.sum()
