"""Writes README's table of measurements from the records in `docs/evidence/`: nobody types a figure.

python -m tandem.benchmarks.readme            rewrites the part between the two markers
python -m tandem.benchmarks.readme --check    says whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, EVIDENCE = ROOT / "README.md", ROOT / "docs" / "evidence"
BEGIN, END = "<!-- written by `make readme` -->", "<!-- end -->"

Record = dict[str, Any]
Line = tuple[str, str, str]  # what, figure, beside it


def startup(figures: Record) -> Iterator[Line]:
    seconds = figures["medians"]["first_token"]
    beside = f"`import torch` alone in the same run: {figures['import_torch']:.2f} s"
    yield (
        f"process start to the first streamed token, bundled models, median of {figures['runs']}",
        f"{seconds:.2f} s",
        beside,
    )


def demo(figures: Record) -> Iterator[Line]:
    policy, reward = figures["policy"], figures["reward"]
    for kind, bar in (
        ("arithmetic", "bar 0.80"),
        ("facts", "bar 0.80"),
        ("react", ""),
        ("tool_calls", ""),
        ("json", ""),
    ):
        name = kind.replace("_", " ")
        shown = f"{policy[f'{kind}_en']:.2f} / {policy[f'{kind}_zh']:.2f}"
        yield f"bundled policy, held-out {name}, English / Chinese", shown, bar
    yield "bundled reward model, the better of two held-out answers wins", f"{reward['pairs']:.3f}", "bar 0.90"


def peers(figures: Record) -> Iterator[Line]:
    for row in figures["rows"]:
        goal = [f"{sign} {row[bound]:g}" for sign, bound in (("≥", "least"), ("≤", "most")) if row[bound] is not None]
        missed = ", **missed**" if row["met"] is False else ""
        beside = "; ".join(
            part for part in (row["beside"], f"goal {' and '.join(goal)}{missed}" if goal else "") if part
        )
        yield row["name"], f"{row['figure']:.2f} {row['unit']}", beside


def clients(figures: Record) -> Iterator[Line]:
    found = figures["clients"]
    for name, package in (("openai", "Python's `openai`"), ("npm openai", "npm's `openai`")):
        passed, failed = len(found[name]["passed"]), len(found[name]["failed"])
        yield f"{package} {found[name]['version']}, checks passed", f"{passed} of {passed + failed}", ""
    agents = found["langchain"]
    for kind, agent in (("react", "ReAct agent"), ("tool_calls", "agent of native tool calls")):
        yield (
            f"LangChain's {agent} on the bundled policy, held-out questions answered rightly",
            f"{agents[kind]} of {agents['count']}",
            "bar 8 of 10",
        )
    evaluated = found["lm-eval"]
    yield (
        f"lm-eval {evaluated['version']}, largest difference of a log-probability, `local-completions` and `hf`",
        f"{evaluated['largest_difference']:.1e}",
        f"bar 1e-3; {evaluated['answers_that_differ']} answers differ",
    )


def ppo(figures: Record) -> Iterator[Line]:
    for run in figures["runs"]:
        accuracy = f"{run['accuracy_before']:.3f} → {run['accuracy_after']:.3f}"
        beside = (
            f"{run['reward_before']:.2f} → {run['reward_after']:.2f}; KL {run['kl']:.1f} nats, accuracy {accuracy}; "
            f"bar ≥ 1 at ≤ 10 nats, accuracy within 0.02{'' if run['met'] else ', **missed**'}"
        )
        name = f"PPO on the bundled policy, {run['seconds'] / 60:.1f} min, seed {run['seed']}: held-out reward"
        yield name, f"{run['gain']:+.2f} SD", beside


def rlhf(figures: Record) -> Iterator[Line]:
    updates, shared, same, beside = (figures[name] for name in ("updates", "shared_prompt", "agreement", "beside"))
    yield (
        f"{updates['updates']} weight updates under {updates['streams']} chat streams: "
        "failed requests, wrong spans, stale answers",
        f"{updates['failed']}, {updates['wrong_spans']}, {updates['stale_answers']}",
        f"{updates['chats_of_several_versions']} of {updates['chats']} chats saw several versions; "
        f"no step for {updates['commit_ms']['max']} ms at most",
    )
    yield (
        f"{shared['k']} answers of {shared['answer_tokens']} tokens to a prompt of {shared['prompt_tokens']}, 125M: "
        "scored as a group",
        f"{shared['times_faster']} × as fast",
        f"{shared['computed_together'][0]:,} tokens computed instead of {shared['computed_apart'][0]:,}; bar 2.5",
    )
    yield (
        "log-probabilities of sampling and of `rollout` against `evaluate`, largest difference",
        f"{max(same['sampling_to_evaluate'], same['rollout_to_evaluate']):.1e}",
        "float32; bar 1e-3",
    )
    yield (
        f"a score alone against the same in {same['batches']} batches, beside chats, largest difference",
        f"{same['scores_alone_to_batch']:.1e}",
        "of max(1, score); bar 1e-5",
    )
    gaps = f"{beside['gap_p99_ms_alone']} → {beside['gap_p99_ms_beside']} ms"
    yield (
        f"{beside['streams']} chats beside {beside['scorers']} scorers of {beside['scored_tokens']} tokens, 125M each: "
        "gap between tokens, p99",
        f"{beside['times_later']} × the gap alone",
        f"{gaps}; bar 2{'' if beside['ok'] else ', **missed**'}",
    )


def quantization(figures: Record) -> Iterator[Line]:
    """Beside bfloat16."""
    bars = {"int8": "bar 1 %, 99 %", "w8a8": "bar 3 %, 97 %"}
    accuracies = figures["accuracy"]
    for model, one in figures["quality"].items():
        name, _, settings = model.partition(",")
        words = settings.replace("quantization=", "").replace(",kv_dtype=int8", " with int8 KV")
        if name == "policy":
            figure = f"{one['perplexity_change']:+.2%}, {one['top1_agreement']:.2%}"
            plain, found = accuracies["bfloat16"], accuracies[settings]
            most = max(abs(found[kind] - plain[kind]) for kind in plain)
            beside = f"{bars[words[:4]]}; accuracy per kind within {100 * most:.1f} points, bar 1"
            yield f"bundled policy in {words}: perplexity, same most likely token", figure, beside
        else:
            yield (
                f"bundled reward model in {words}: pairs in the same order",
                f"{one['ranking_agreement']:.2%}",
                "bar 99 %",
            )
    logits = ", ".join(f"{name} {error:.2%}" for name, error in figures["logits"].items())
    yield "random 125M, relative error of the logits", logits, "of float32"
    for scheme, one in figures["vllm"].items():
        figure = f"{one['mean']:.1e} mean, {one['largest']:.1e} at most"
        beside = f"{one['greedy_same']} of {one['greedy_tokens']} greedy tokens are the same; bar {one['bar']}"
        yield f"vLLM on the same {scheme} checkpoint, difference of a log-probability", figure, beside
    for missed in figures["missed"]:
        yield missed, "**missed**", ""


def trainers(figures: Record) -> Iterator[Line]:
    for name, report in figures["trainers"].items():
        calls = sum(report["routes"].values())
        beside = f"{calls} calls of {len(report['routes'])} routes, {report['seconds']:.0f} s"
        yield f"{name} {report['version']}, unmodified", report["figure"], beside


AREAS: Mapping[str, Callable[[Record], Iterator[Line]]] = MappingProxyType(
    {
        "startup": startup,
        "demo": demo,
        "rlhf": rlhf,
        "ppo": ppo,
        "quantization": quantization,
        "clients": clients,
        "trainers": trainers,
        "peers": peers,
    }
)


def tables() -> str:
    """One table per area that has a record."""
    parts: list[str] = []
    for name, lines in AREAS.items():
        file = EVIDENCE / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        machine = record["machine"]
        where = (
            f"{machine['cores']} cores of {machine['processor']}, {record['date'][:10]}, commit {record['commit'][:10]}"
        )
        parts.append(f"`make evidence-{name}`: {where}\n\n| what | figure | beside it |\n|---|---|---|")
        parts[-1] += "".join(f"\n| {what} | {figure} | {beside} |" for what, figure, beside in lines(record["figures"]))
    return "\n\n".join(parts)


def written(text: str) -> str:
    """README with the tables of now. Raises ValueError where it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if it is out of date")
    options = parser.parse_args()
    text = README.read_text()
    new = written(text)
    if options.check:
        print("README.md is up to date" if new == text else "README.md is out of date: make readme")
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
