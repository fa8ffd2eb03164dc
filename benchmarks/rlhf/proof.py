"""All of it, one after another: `make evidence-rlhf`. The last line is JSON; exit status 1 where one did not pass."""

from __future__ import annotations

import json
import sys

from . import agreement, beside, shared_prompt, updates


def main() -> int:
    found = {
        "updates": updates.run(streams=32, count=50),
        "updates_ahead": updates.run(8, 12, "--run-ahead"),
        "shared_prompt": shared_prompt.run(k=9, prompt=1000, answer=250, rounds=3, threads=2),
        "agreement": agreement.run(n=8, count=40, batches=30),
        "beside": beside.run(streams=8, tokens=200, scorers=4, length=500, rounds=3, threads=2),
    }
    for name, figures in found.items():
        print(f"{name:14} {'passed' if figures['ok'] else 'FAILED'}  {figures}")
    print(json.dumps(found))
    return 0 if all(figures["ok"] for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
