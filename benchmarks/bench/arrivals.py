"""When requests are sent: seconds since the start of the run, fixed before it begins.

Open loop    `--request-rate R`: gaps from a gamma distribution with mean 1/R. `--burstiness` 1 is a Poisson process,
             below 1 comes in clumps, above 1 is more even, inf is a metronome. A ramp moves R from one rate to another.
Bursts       `--burst N --burst-every S`: N at once, every S seconds.
Closed loop  neither: all are due at once, and `--max-concurrency` lets a request go when another has ended.

Because the times are fixed beforehand, a slow answer cannot postpone what comes after it: latencies of an open loop
hold what users would have waited ("coordinated omission" is leaving that out). With a limit on concurrency as well,
the wait for a free place is kept beside each request.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Ramp = Literal["linear", "exponential"]


class ArrivalsError(ValueError):
    """These arrivals make no sense. The message says which value and what would do."""


@dataclass(frozen=True)
class Arrivals:
    """Checked when made; raises ArrivalsError."""

    request_rate: float = math.inf  # requests per second
    burstiness: float = 1.0  # the gamma distribution's shape
    burst: int | None = None  # requests at once
    burst_every: float | None = None  # seconds
    ramp_up_strategy: Ramp | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None

    def __post_init__(self) -> None:
        paced = self.request_rate != math.inf
        if not self.request_rate > 0:
            raise ArrivalsError(f"--request-rate {self.request_rate:g}: above 0, or inf for all at once")
        if not self.burstiness > 0:
            raise ArrivalsError(f"--burstiness {self.burstiness:g}: above 0; 1 is a Poisson process")
        if (self.burst is None) != (self.burst_every is None):
            raise ArrivalsError("--burst N and --burst-every SECONDS go together")
        if self.burst is not None and self.burst_every is not None:
            if self.burst < 1 or not 0 < self.burst_every < math.inf:
                raise ArrivalsError(f"--burst {self.burst} every {self.burst_every:g} s: at least 1, and above 0 s")
            if paced or self.ramp_up_strategy is not None:
                raise ArrivalsError("--burst has a rate of its own: leave out --request-rate and --ramp-up-strategy")
        self._check_ramp(paced)

    def _check_ramp(self, paced: bool) -> None:
        ends = (self.ramp_up_start_rps, self.ramp_up_end_rps)
        if self.ramp_up_strategy is None:
            if ends != (None, None):
                raise ArrivalsError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
            return
        if self.ramp_up_strategy not in ("linear", "exponential"):
            raise ArrivalsError(f"--ramp-up-strategy {self.ramp_up_strategy}: linear or exponential")
        if paced:
            raise ArrivalsError("a ramp sets the rate: leave out --request-rate")
        first, last = ends
        if first is None or last is None:
            raise ArrivalsError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        if not 0 < first <= last < math.inf:
            raise ArrivalsError(f"a ramp from {first:g} to {last:g} requests per second: above 0, and not downwards")

    def rate(self, progress: float) -> float:
        """Requests per second when this share (0 to 1) of the requests has been sent."""
        if self.ramp_up_strategy is None or self.ramp_up_start_rps is None or self.ramp_up_end_rps is None:
            return self.request_rate
        if self.ramp_up_strategy == "linear":
            return self.ramp_up_start_rps + (self.ramp_up_end_rps - self.ramp_up_start_rps) * progress
        return self.ramp_up_start_rps * (self.ramp_up_end_rps / self.ramp_up_start_rps) ** progress


def schedule(arrivals: Arrivals, count: int, seed: int) -> list[float]:
    """The moments of `count` requests, ascending, the same for the same seed.

    At a fixed rate they are stretched so that the last one is due at count / rate, as vLLM does: the drawn gaps of a
    short run would add up to a few percent more or less, and with them the throughput of a server that keeps up.
    """
    if arrivals.burst is not None and arrivals.burst_every is not None:
        return [index // arrivals.burst * arrivals.burst_every for index in range(count)]
    draw = random.Random(f"arrivals {seed}")
    moments: list[float] = []
    moment = 0.0
    for index in range(count):
        moment += _gap(arrivals.rate(index / max(count - 1, 1)), arrivals.burstiness, draw)
        moments.append(moment)
    if arrivals.ramp_up_strategy is None and moment > 0:
        stretch = count / arrivals.request_rate / moment
        return [moment * stretch for moment in moments]
    return moments


def _gap(rate: float, burstiness: float, draw: random.Random) -> float:
    """Seconds until the next request."""
    if rate == math.inf:
        return 0.0
    if burstiness == math.inf:
        return 1 / rate
    return draw.gammavariate(burstiness, 1 / (rate * burstiness))
