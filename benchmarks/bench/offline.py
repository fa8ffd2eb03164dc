"""`tandem bench throughput`: requests handed over all at once; how long until the last token.

The lines and JSON keys of vLLM's `bench throughput` come first; everything below the line that begins with `Tandem:`
is ours. A figure is the median of the runs. Engines take turns (`stats.interleaved`), prompts are the same for all, and
answers have exactly the length that was asked for (greedy, end-of-text tokens are passed over).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import datasets, result
from .limits import Asked, Held, Limits, least_seconds
from .models import UsageError, is_null, path_of, text_of, tokenizer_of
from .progress import progress
from .sides import POLICY, REWARD, LimitsOf, Sample, Setup, Side, Watch, held_of, opened
from .stats import Spread, interleaved, percentile, ratio, spread

OUTPUT_LEN, INPUT_LEN = 128, 1024  # of generated data sets, where the context allows
BUSY = 0.1  # cores that others may use before it is said
MANY, FEW = 1000, 32  # prompts: vLLM's number on a GPU, on a CPU what is done within minutes


@dataclass(frozen=True)
class Dataset:
    """None: what `prompts` says for the model and the device."""

    name: str = "random"
    path: Path | None = None
    count: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0
    n: int = 1


@dataclass(frozen=True)
class Load:
    token_ids: list[list[int]]
    output_lens: list[int]
    n: int = 1

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def output_tokens(self) -> int:
        return self.n * sum(self.output_lens)

    def asked(self, cached_share: float = 0.0) -> list[Asked]:
        """For the limit; what the prefix cache gave is spread evenly over the prompts."""
        return [
            Asked(len(ids), length, self.n, round(cached_share * len(ids)))
            for ids, length in zip(self.token_ids, self.output_lens, strict=True)
        ]


def prompts(setup: Setup, dataset: Dataset) -> Load:
    """The data set in the model's token ids. Raises UsageError and DatasetError."""
    path = path_of(setup.model)
    known = path_of("demo") if is_null(path) else path
    context, vocab_size = sizes_of(known)
    if is_null(path):
        context = 1 << 20
    output_len = dataset.output_len
    if dataset.name in ("random", "chat") and output_len is None:
        output_len = min(OUTPUT_LEN, context // 4)
    input_len = dataset.input_len or min(INPUT_LEN, context // 2)
    items = datasets.load(
        dataset.name,
        dataset.path,
        count=dataset.count or (FEW if setup.device == "cpu" else MANY),
        input_len=input_len,
        output_len=output_len,
        range_ratio=dataset.range_ratio,
        prefix_len=dataset.prefix_len,
        seed=dataset.seed,
        tokenizer=None if dataset.name == "random" else tokenizer_of(known),
        vocab_size=vocab_size,
    )
    ids: list[list[int]] = []
    text = None
    for item in items:
        if item.token_ids is not None:
            ids.append(item.token_ids)
            continue
        text = text or text_of(known)
        ids.append(text.render(item.messages) if item.messages is not None else text.encode(item.text or ""))
    load = Load(ids, [item.output_len for item in items], dataset.n)
    longest = max(len(one) + length for one, length in zip(ids, load.output_lens, strict=True))
    if longest > context:
        raise UsageError(
            f"a prompt and its answer have {longest} tokens, but the model's context is {context}: lower --input-len, "
            "--output-len or --range-ratio"
        )
    return load


def sizes_of(path: str) -> tuple[int, int]:
    """Context and vocabulary."""
    from ...model.config import read_config

    config = read_config(path)
    return config.context, config.vocab_size


def throughput(setup: Setup, dataset: Dataset) -> dict[str, Any]:
    """The result as JSON. Raises UsageError and what the engines raise where they cannot be measured."""
    load = prompts(setup, dataset)
    held = held_of(setup)
    limits = LimitsOf(setup, held)
    with opened(setup) as sides:
        samples = run(setup, sides, load)
        told = {name: side.told for name, side in sides.items()}
    return summary(setup, load, samples, told, held, limits.after()) | result.describe(setup.device)


def run(setup: Setup, sides: Mapping[str, Side], load: Load) -> dict[str, list[Sample]]:
    answers = len(load.token_ids) * (1 if setup.reward is None else 1 + load.n)
    with progress("throughput", (setup.runs + setup.warmups) * len(sides) * answers) as show:
        done = 0

        def once(name: str, side: Side) -> Callable[[int], Sample]:
            def call(number: int) -> Sample:
                nonlocal done
                show(done, f"{name}, {'warm-up' if number < 0 else f'run {number + 1} of {setup.runs}'}")
                watch = Watch()
                sample = side.generate(load.token_ids, load.output_lens, n=load.n, tick=lambda n: show(done + n, ""))
                sample = replace(sample, others=watch.others(sample.cpu_seconds))
                done += answers
                if sample.output_tokens != load.output_tokens:
                    raise UsageError(f"{name} gave {sample.output_tokens} tokens, {load.output_tokens} were asked for")
                return sample

            return call

        return interleaved({name: once(name, side) for name, side in sides.items()}, setup.runs, setup.warmups)


def summary(
    setup: Setup,
    load: Load,
    samples: dict[str, list[Sample]],
    told: dict[str, dict[str, Any]],
    held: Held | None,
    limits: Limits | None,
) -> dict[str, Any]:
    """vLLM's keys are those of the first engine's median run; ours follow."""
    first = setup.engines[0]
    elapsed = percentile([sample.seconds for sample in samples[first]], 50)
    total, requests = load.prompt_tokens + load.output_tokens, len(load.token_ids)
    found = {
        "model_id": setup.model,
        "elapsed_time": elapsed,
        "num_requests": requests,
        "total_num_tokens": total,
        "requests_per_second": requests / elapsed,
        "tokens_per_second": total / elapsed,
        "benchmark": "throughput",
        "output_tokens_per_second": load.output_tokens / elapsed,
        "num_prompt_tokens": load.prompt_tokens,
        "num_output_tokens": load.output_tokens,
        "runs": setup.runs,
        "warmups": setup.warmups,
        "engines": {name: told[name] | figures(load, samples[name], held, limits) for name in samples},
        "ratios": ratios({name: [sample.seconds for sample in found] for name, found in samples.items()}),
    }
    if limits is not None:
        found["limits"] = limits.as_json()
    return found


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as fast the first engine is as each other one, by rounds."""
    first, *others = seconds
    return {f"{first} / {other}": asdict(ratio(seconds[other], seconds[first])) for other in others}


def figures(load: Load, samples: Sequence[Sample], held: Held | None, limits: Limits | None) -> dict[str, Any]:
    """Of one engine: spreads over the runs."""
    tokens = load.output_tokens
    share = cached_share(samples)
    found: dict[str, Any] = {
        "elapsed_times": [sample.seconds for sample in samples],
        "output_tokens_per_second": asdict(spread([tokens / sample.seconds for sample in samples])),
        "cpu_seconds_per_output_token": asdict(spread([sample.cpu_seconds / tokens for sample in samples])),
        "prefix_cache_share": share,
        "others_cpu_cores": sum(sample.others for sample in samples) / sum(sample.seconds for sample in samples),
    }
    firsts = [percentile(sample.firsts, 50) for sample in samples if sample.firsts]
    if firsts:
        found["first_token_seconds"] = asdict(spread(firsts))
    steps = [sample.steps for sample in samples if sample.steps is not None]
    if steps:
        found["steps"] = percentile(steps, 50)
    if held is not None and limits is not None:
        least = least_seconds(held, load.asked(share or 0.0), limits)
        found["least_seconds"] = least
        found["fraction_of_limit"] = asdict(spread([least / sample.seconds for sample in samples]))
    if roles := roles_of(samples):
        found["roles"] = roles
    return found


def cached_share(samples: Sequence[Sample]) -> float | None:
    """Of the policy's prompt tokens; None where the engine does not tell."""
    counted = [sample.counted[POLICY] for sample in samples if POLICY in sample.counted]
    if not counted:
        return None
    return sum(one.cached_tokens for one in counted) / max(sum(one.prompt_tokens for one in counted), 1)


def roles_of(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Tokens per second of each hosted model while all of them worked."""
    found: dict[str, dict[str, Any]] = {}
    for role in samples[0].counted if samples else ():
        runs = [(sample.counted[role], sample.seconds) for sample in samples]
        found[role] = {
            "requests_per_second": asdict(spread([one.requests / seconds for one, seconds in runs])),
            "prompt_tokens_per_second": asdict(spread([one.prompt_tokens / seconds for one, seconds in runs])),
            "computed_tokens_per_second": asdict(spread([one.computed_tokens / seconds for one, seconds in runs])),
            "output_tokens_per_second": asdict(spread([one.generated_tokens / seconds for one, seconds in runs])),
            "preemptions": sum(one.preemptions for one, _ in runs),
        }
    return found


# Printing -----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    first, *others = found["engines"]
    own = found["engines"][first]
    shown = [
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s, "
        f"{found['output_tokens_per_second']:.2f} output tokens/s",
        f"Total num prompt tokens:  {found['num_prompt_tokens']}",
        f"Total num output tokens:  {found['num_output_tokens']}",
        headline(found, own),
    ]
    for name in (first, *others):
        shown += of_engine(name if others else "", found["engines"][name])
    return shown + closing(found)


def closing(found: dict[str, Any]) -> list[str]:
    """What belongs to no engine alone."""
    shown = [row("limit of this machine", limit_text(found["limits"]))] if "limits" in found else []
    for name, value in found["ratios"].items():
        shown.append(row(f"speed, {name}", text_of_spread(value, "×")))
    return [*shown, row("versions", versions_text(found["versions"]))]


def headline(found: dict[str, Any], own: dict[str, Any]) -> str:
    return (
        f"Tandem: {found['model_id']}, {own['dtype']}, {own['threads']} threads; median of {found['runs']} runs after "
        f"{warmups_text(found['warmups'])} [10 %, 90 %]"
    )


def warmups_text(count: int) -> str:
    return f"{count} warm-up" if count == 1 else f"{count} warm-ups"


def of_engine(name: str, own: dict[str, Any]) -> list[str]:
    before = f"{name}: " if name else ""
    shown = [
        row(f"{before}output tokens/s", text_of_spread(own["output_tokens_per_second"])),
        row(f"{before}CPU per output token", text_of_spread(own["cpu_seconds_per_output_token"], " µs", 1e6)),
    ]
    if "first_token_seconds" in own:
        shown.append(row(f"{before}median time to first token", text_of_spread(own["first_token_seconds"], " ms", 1e3)))
    if "fraction_of_limit" in own:
        least = f"; at least {own['least_seconds']:.3f} s by bytes and operations"
        shown.append(row(f"{before}share of the limit", text_of_spread(own["fraction_of_limit"], " %", 100) + least))
    if own["prefix_cache_share"] is not None:
        shown.append(row(f"{before}prefix-cache share", f"{own['prefix_cache_share']:.1%} of prompt tokens"))
    for role, rates in own.get("roles", {}).items():
        shown.append(row(f"{before}{role}", role_text(role, rates)))
    if own["others_cpu_cores"] >= BUSY:
        shown.append(row(f"{before}CPU used by others", busy_text(own["others_cpu_cores"])))
    if own.get("note"):
        shown.append(row(f"{before}note", own["note"]))
    if own.get("versions"):
        shown.append(row(f"{before}versions", ", ".join(f"{key} {value}" for key, value in own["versions"].items())))
    if own.get("ignored"):
        shown.append(row(f"{before}options without a counterpart", ", ".join(own["ignored"])))
    return shown


def busy_text(cores: float) -> str:
    return f"{cores:.2f} cores: these are not the figures of a quiet machine"


def role_text(role: str, rates: dict[str, Any]) -> str:
    kinds = ("prompt", "computed") if role == REWARD else ("prompt", "computed", "output")
    parts = [f"{number(rates[f'{kind}_tokens_per_second']['median'])} {kind}" for kind in kinds]
    text = f"{', '.join(parts)} tokens/s"
    if role == REWARD:
        text = f"{number(rates['requests_per_second']['median'])} scores/s, {text}"
    return text + (f"; {rates['preemptions']} preemptions" if rates["preemptions"] else "")


def row(name: str, text: str) -> str:
    return f"  {name + ':':46} {text}"


def number(value: float) -> str:
    """Four digits, without an exponent where that is readable."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text_of_spread(value: dict[str, Any] | Spread, unit: str = "", scale: float = 1.0) -> str:
    given = value if isinstance(value, dict) else asdict(value)
    median, low, high = (number(scale * given[name]) for name in ("median", "low", "high"))
    return f"{median}{unit}" + (f" [{low}, {high}]" if given["samples"] > 1 else "")


def limit_text(limits: dict[str, float]) -> str:
    rates = [
        f"{name.removesuffix('_gflops')} {number(value)} GFLOP/s" for name, value in limits.items() if "gflops" in name
    ]
    return f"reads {limits['read_gb_per_second']:.1f} GB/s, multiplies {', '.join(rates)} (measured in this run)"


def versions_text(versions: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "tandem", "transformers") if name in versions
    )
