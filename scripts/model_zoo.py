# SPDX-License-Identifier: Apache-2.0
"""Serve the tiny models of tests/vllm/zoo.py on the vLLM of this Python, and write the table.

    python scripts/model_zoo.py --results out/zoo.jsonl --table docs/model-zoo.md

Each runs in a process of its own, so that one that crashes is a row and not the end. Results that
the file has already are not measured again; ``--table`` alone writes them anew.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
MARK = "zoo: "
LIMIT = 0.05  # as in tests/vllm/zoo.py, which needs vLLM
INTRO = """<!-- SPDX-License-Identifier: Apache-2.0 -->
# Model zoo

Tiny random models of the text-generation architectures that Transformers can make small and vLLM
serves, written by `scripts/model_zoo.py`. Served means: greedy answers of {tokens} tokens to
prompts of {lengths} tokens, prefill in chunks of 64, `{dtype}` with the newest {window} and first
{sinks} tokens in 16 bits, against the same engine with a 16-bit cache. The error is the mean
difference of the five best log-probabilities, in nats, at most {limit}. "Other tokens" is the same
where the older half of the prompts was another: what reading wrong tokens would do.

{where}

| architecture | served | error | tokens equal | other tokens | |
|---|---|---|---|---|---|
"""


def measured(name: str, seconds: float) -> dict[str, Any]:
    """Return the outcome of one architecture, measured in a process of its own."""
    command = [sys.executable, str(pathlib.Path(__file__)), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failure": f"not done after {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"name": name, "failure": f"the process ended with {done.returncode}: {last[:200]}"}


def row(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    numbers = [found.get(key) for key in ("error", "agreed", "other_tokens")]
    texts = [
        "" if number is None else form.format(number)
        for number, form in zip(numbers, ("{:.3f}", "{:.0%}", "{:.2f}"), strict=True)
    ]
    served, remark = "yes", ""
    if found.get("refusal"):
        served, remark = "refused", found["refusal"]
    elif found.get("no_reference"):
        served, remark = "not here", "vLLM with a 16-bit cache: " + found["no_reference"]
    elif found.get("failure"):
        served, remark = "**no**", found["failure"]
    elif found["error"] > LIMIT:
        served, remark = "yes", "above the limit"
    remark = remark.replace("|", "\\|")
    return f"| `{found['name']}` | {served} | {' | '.join(texts)} | {remark} |"


def write_table(results: dict[str, dict[str, Any]], path: pathlib.Path, where: str) -> None:
    """Write the document whole, or not at all."""
    from tests.vllm import zoo

    text = INTRO.format(
        tokens=zoo.TOKENS,
        lengths=", ".join(map(str, zoo.LENGTHS)),
        dtype=zoo.KV_CACHE_DTYPE,
        limit=zoo.LIMIT,
        where=where,
        **zoo.OPTIONS,
    )
    text += "\n".join(row(results[name]) for name in sorted(results)) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    pathlib.Path(file.name).replace(path)


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures, all by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("out/zoo.jsonl"))
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--where", default="", help="a sentence on vLLM, device and commit")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="of one architecture at most")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.vllm import zoo

    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(MARK + zoo.measure(arguments.one, pathlib.Path(folder)).to_json(), flush=True)
        return
    unknown = sorted(set(arguments.names) - set(zoo.ZOO))
    if unknown:
        parser.error(f"names: wanted some of {', '.join(zoo.ZOO)}, got {', '.join(unknown)}")
    results: dict[str, dict[str, Any]] = {}
    if arguments.results.exists():
        lines = arguments.results.read_text().splitlines()
        results = {found["name"]: found for found in map(json.loads, lines)}
    missing = [name for name in arguments.names or zoo.ZOO if name not in results]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool, arguments.results.open("a") as file:
        for found in pool.map(lambda name: measured(name, arguments.seconds), missing):
            results[found["name"]] = found
            print(json.dumps(found), file=file, flush=True)
            print(row(found), flush=True)
    if arguments.table is not None:
        write_table(results, arguments.table, arguments.where)


if __name__ == "__main__":
    main()
