"""EleutherAI's lm-eval against Tandem, and against transformers in fp32: the same numbers, or how far apart.

    python benchmarks/clients/lm_eval_local.py [--model DIR] [--server-python .venv/bin/python]
    python benchmarks/clients/lm_eval_local.py [--model DIR] --url http://… --name tandem-demo

Serves the model, or takes a server that computes it in float32, evaluates three small local tasks (multiple choice,
perplexity, generation) once through lm-eval's `local-completions` and once through its `hf`, and compares every answer.
The last line is the result as JSON. Exit status 1 where a log-probability differs by more than 1e-3 or an answer
differs.

It runs where `environments.LM_EVAL`, torch and transformers are installed (`make evidence-clients` makes such a place);
the server may have another Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "model" / "demo" / "policy"
CLOSE = 1e-3  # of a sum of log-probabilities, per request
READY_SECONDS = 60

CHOICES = """\
task: tandem_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: tandem_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATED = """\
task: tandem_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(directory: Path) -> list[str]:
    sums = [(17 + 5 * i, 11 + 3 * i) for i in range(8)]
    choices: list[dict[str, Any]] = [
        {
            "question": f"What is {a} + {b}?",
            "choices": [f" {a + b}", f" {a + b + 10}", " a cat", f" {a - b}"],
            "answer": 0,
        }
        for a, b in sums
    ]
    texts = [
        {"text": "The capital of France is Paris. 猫坐在垫子上。"},
        {"text": "One, two, three. " * 60},  # longer than one window
        {"text": "a"},
    ]
    parts = {
        "choices": (CHOICES, choices),
        "rolling": (ROLLING, texts),
        "generated": (GENERATED, [{"question": one["question"], "answer": one["choices"][0]} for one in choices]),
    }
    for name, (task, rows) in parts.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (directory / f"{name}.yaml").write_text(task.format(data=data))
    return ["tandem_choices", "tandem_perplexity", "tandem_generation"]


def evaluate(model: str, arguments: dict[str, Any], tasks: list[str], directory: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, batch_size=4
    )


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """By task: the metrics of both sides, the largest difference of a log-probability, answers that differ."""
    found: dict[str, Any] = {}
    for task, samples in ours["samples"].items():
        largest, differing = 0.0, 0
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            for own, reference in zip(mine["resps"], other["resps"], strict=True):
                one, two = own[0], reference[0]
                if isinstance(one, str):
                    differing += one != two
                    continue
                pair = [value[0] if isinstance(value, (tuple, list)) else value for value in (one, two)]
                largest = max(largest, abs(pair[0] - pair[1]))
                differing += isinstance(one, (tuple, list)) and one[1] != two[1]
        metrics = {
            name.partition(",")[0]: [value, theirs["results"][task][name]]
            for name, value in ours["results"][task].items()
            if isinstance(value, float) and "stderr" not in name
        }
        found[task] = {"tandem, hf": metrics, "largest difference": largest, "answers that differ": differing}
    return found


class Served:
    """The model behind a `tandem serve` on a free port."""

    def __init__(self, python: str, model: str, log: Path) -> None:
        self._log = log
        command = [python, "-m", "tandem.server", "serve", "--port", "0", f"policy={model}", "--dtype", "float32"]
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)

    def __enter__(self) -> str:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if found := re.search(r"^Serving on (http://\S+)", self._log.read_text(), re.MULTILINE):
                return found[1]
            time.sleep(0.05)
        self._process.kill()
        raise SystemExit(f"the server did not start:\n{self._log.read_text()}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--server-python", default=sys.executable)
    parser.add_argument("--url", help="of a server that has the model already")
    parser.add_argument("--name", default="policy", help="of the model in that server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tasks = write_tasks(directory)
        length = 256  # of a window; local-completions takes two tokens off what it is told
        started = Served(options.server_python, options.model, directory / "server.log") if not options.url else None
        with started or contextlib.nullcontext(options.url) as url:
            arguments = {"model": options.name, "base_url": f"{url}/v1/completions", "tokenizer": options.model}
            arguments |= {"tokenizer_backend": "huggingface", "max_length": length + 2, "num_concurrent": 1}
            ours = evaluate("local-completions", arguments, tasks, directory)
        reference = {"pretrained": options.model, "dtype": "float32", "device": "cpu", "max_length": length}
        theirs = evaluate("hf", reference, tasks, directory)
    found = compare(ours, theirs)
    passed = all(one["largest difference"] <= CLOSE and not one["answers that differ"] for one in found.values())
    print(json.dumps({"client": "lm-eval", "version": version("lm-eval"), "passed": passed, "tasks": found}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
