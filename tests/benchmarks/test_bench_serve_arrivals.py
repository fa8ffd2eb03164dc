"""When requests are sent: rates, distributions, bursts, ramps, and the same moments for the same seed."""

from __future__ import annotations

import math
import statistics

import pytest

from tandem.benchmarks.bench.arrivals import Arrivals, ArrivalsError, schedule

MANY = 20_000


def gaps(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]


def test_without_a_rate_all_are_due_at_once() -> None:
    assert schedule(Arrivals(), 5, seed=0) == [0.0] * 5


def test_a_poisson_process_has_exponential_gaps() -> None:
    found = gaps(schedule(Arrivals(request_rate=50.0), MANY, seed=1))
    assert statistics.fmean(found) == pytest.approx(1 / 50)
    assert statistics.pstdev(found) == pytest.approx(1 / 50, rel=0.03)
    for times in (0.5, 1.0, 2.0):  # P(gap > t · mean) = exp(-t)
        assert sum(gap > times / 50 for gap in found) / MANY == pytest.approx(math.exp(-times), abs=0.01)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    found = gaps(schedule(Arrivals(request_rate=10.0, burstiness=burstiness), MANY, seed=2))
    assert statistics.fmean(found) == pytest.approx(0.1)
    assert statistics.pstdev(found) == pytest.approx(0.1 / math.sqrt(burstiness), rel=0.05)


def test_infinite_burstiness_is_a_metronome() -> None:
    assert schedule(Arrivals(request_rate=4.0, burstiness=math.inf), 3, seed=0) == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize("seed", range(5))
def test_a_run_of_any_seed_takes_as_long_as_its_rate_says(seed: int) -> None:
    assert schedule(Arrivals(request_rate=7.0), 21, seed)[-1] == pytest.approx(3.0)


def test_the_seed_decides() -> None:
    one, other = (schedule(Arrivals(request_rate=5.0), 50, seed) for seed in (3, 4))
    assert one == schedule(Arrivals(request_rate=5.0), 50, 3)
    assert one != other


def test_bursts() -> None:
    assert schedule(Arrivals(burst=3, burst_every=2.0), 7, seed=0) == [0, 0, 0, 2, 2, 2, 4]


@pytest.mark.parametrize("strategy, middle", [("linear", 55.0), ("exponential", math.sqrt(1000.0))])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy: str, middle: float) -> None:
    arrivals = Arrivals(ramp_up_strategy=strategy, ramp_up_start_rps=10, ramp_up_end_rps=100)  # type: ignore[arg-type]
    assert [arrivals.rate(progress) for progress in (0, 0.5, 1)] == pytest.approx([10, middle, 100])
    found = gaps(schedule(arrivals, MANY, seed=5))
    assert MANY // 20 / sum(found[: MANY // 20]) < 16
    assert MANY // 20 / sum(found[-MANY // 20 :]) > 85


@pytest.mark.parametrize(
    "values, words",
    [
        ({"request_rate": 0.0}, "--request-rate 0"),
        ({"request_rate": math.nan}, "--request-rate nan"),
        ({"burstiness": -1.0}, "--burstiness -1"),
        ({"burst": 3}, "go together"),
        ({"burst": 0, "burst_every": 1.0}, "--burst 0"),
        ({"burst": 1, "burst_every": 1.0, "request_rate": 2.0}, "leave out --request-rate"),
        ({"ramp_up_strategy": "cubic"}, "linear or exponential"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0}, "--ramp-up-end-rps"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 0.0, "ramp_up_end_rps": 5.0}, "above 0"),
        ({"ramp_up_start_rps": 1.0, "ramp_up_end_rps": 5.0}, "need --ramp-up-strategy"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(values: dict[str, object], words: str) -> None:
    with pytest.raises(ArrivalsError, match=words.replace("--", r"\-\-")):
        Arrivals(**values)  # type: ignore[arg-type]
