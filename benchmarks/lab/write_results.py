"""Writes benchmarks/RESULTS.md from the JSON files of benchmarks/results/.

    python benchmarks/lab/write_results.py            # rewrites the file
    python benchmarks/lab/write_results.py --check    # ends with 1 if the file is not what it would write

Every figure is read from a file and stands as it does there. A file that no table is known for is named at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.common import ROOT
from phalanx.benchmarks.lab.result_tables import single, survival
from phalanx.benchmarks.lab.result_tables.comparisons import comparison
from phalanx.benchmarks.lab.result_tables.gpu import gpu
from phalanx.benchmarks.lab.result_tables.markdown import Blocks, Result, pairs, surroundings

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"

KINDS: dict[str, tuple[str, str, Callable[[Result], Blocks]]] = {
    "compare": (
        "Beside other engines",
        "`compare.py`: all engines on the same weights, in turns, never two at once. Figures are medians over the "
        "rounds. A ratio is the median of the ratios within the rounds; where the machine is too noisy to tell, a text "
        "says so instead. Limits are of the machine as it was measured around each run.",
        comparison,
    ),
    "throughput": (
        "Throughput",
        "`throughput.py`: requests that are all there at once, or come by rate.",
        single.plain,
    ),
    "serve": (
        "A server under load",
        "`serve.py`: servers of OpenAI's API over real connections, in turns. Figures are the median round's.",
        single.serve,
    ),
    "chaos": (
        "Ranks that are killed and stopped",
        "`chaos.py`: each request is judged by what the undisturbed server says. mode=chaos kills and stops at random "
        "amid requests of every kind, bursts and disconnects; mode=kills and mode=stops disturb each rank in turn amid "
        "sixteen requests; mode=saturation has prefills of 4,096 tokens without a pause; mode=beside does the same to "
        "phalanx and to vLLM amid four streams, each time in a server that was just started.",
        survival.chaos,
    ),
    "restarts": (
        "Serving again after a kill",
        "`parts/restarts.py`: a rank is killed while an answer streams; seconds until its next token, phase by phase.",
        single.restarts,
    ),
    "structured_steps": (
        "Steps with grammars",
        "`parts/structured_steps.py`: steps in which half of the rows have a grammar, and the same without, in turns.",
        single.plain,
    ),
    "structured_answers": (
        "Answers that match a schema",
        "`parts/structured_answers.py`: schemas and tools of a public suite, at temperature 1.",
        single.plain,
    ),
    "json_schema_suite": (
        "The official suite of JSON Schema",
        "`parts/json_schema_suite.py`: each schema constrains rightly, or is refused by name.",
        single.plain,
    ),
    "gateway": (
        "What the gateway costs",
        "`gateway.py`: beside AsyncLLM in the same run; from a token to its bytes; memory; time until it is ready.",
        single.plain,
    ),
    "compare_servers": (
        "The same questions to two servers",
        "`parts/compare_servers.py`: text, finish reasons, usage and log-probabilities of both, question by question.",
        single.plain,
    ),
    "latency": ("Latency", "`latency.py`: by requests at once and by ranks.", single.latency),
    "step": ("Where a step's time goes", "`step.py`: the parts of a decode step and of a prompt.", single.steps),
    "linear": ("One linear layer", "`parts/linear.py`: by weight format, rows and instruction set.", single.linear),
    "quantization": (
        "Quantization",
        "`quantization.py`: agreement of the likeliest token, divergence and perplexity on real text, against bf16.",
        single.quantization,
    ),
    "startup": ("Startup", "`startup.py`: from the start of the process to the first token.", single.startup),
    "collectives": (
        "Collectives",
        "`parts/collectives.py`: all-reduce of ranks, in microseconds.",
        single.collectives,
    ),
    "before_after": (
        "Another commit beside this one",
        "`parts/before_after.py`: both commits on the same weights, in turns. A ratio above 1: this commit is faster.",
        single.before_after,
    ),
    "prefix_cache": (
        "Prefix cache",
        "`prefix_cache.py`: what it gains, and costs where nothing is shared.",
        single.plain,
    ),
    "scheduler": ("Scheduler", "`parts/scheduler.py`: scheduling, encoding and committing a step.", single.scheduler),
    "limits": ("Limits of the machine", "`limits.py`: rates of memory and of arithmetic.", single.plain),
    "gpu": ("On one GPU", "`gpu.py`: each section beside what the same run measured of the card.", gpu),
}
"""By the name in a file's `benchmark`: title, what was measured, and what makes the tables."""

TOP = """\
# Results

What `benchmarks/` printed, file by file. `python benchmarks/lab/write_results.py` writes this page from the files in
`benchmarks/results`; no figure in it is typed by hand, and a test compares it with them. Each file names machine,
versions and settings; `load_before` is the load average when the benchmark began.

The CPU machines are virtual ones: how fast their cores and their memory are changes within minutes. So each run of
`compare.py` is put beside the rates measured right before and after it, and ratios are of runs of the same round. A
result with `random=` and no `model=` is of a random checkpoint of that preset's shape; `gpu.py` draws its weights too.

The commands, each with `key=value` options and `out=FILE` for the JSON line:

    python benchmarks/lab/peers/install.py ../peers models/qwen2-5-0-5b  # the peers, each in an environment of its own
    python benchmarks/compare.py model=models/qwen2-5-0-5b peers=vllm,openvino,llamacpp ranks=1,2
    python benchmarks/compare.py model=models/qwen2-5-0-5b peers=openvino_int8,llamacpp_q8 "variants=quantization=int8"
    python benchmarks/throughput.py random=qwen2_5_0_5b requests=32 prompt_tokens=128 new_tokens=128 peer=transformers
    python benchmarks/latency.py random=qwen2_5_0_5b                     # by requests at once and ranks
    python benchmarks/step.py random=qwen2_5_0_5b rows=1,32 prompts=1024 # where a step's time goes
    python benchmarks/parts/linear.py rows=1,32,1024                     # one linear layer by itself
    python benchmarks/limits.py                                          # what the machine could do
    python benchmarks/quantization.py model=models/smollm2-135m
    python benchmarks/startup.py random=qwen2_5_0_5b ranks=2
    python benchmarks/parts/before_after.py before=../before/phalanx model=models/qwen2-5-0-5b
    python benchmarks/chaos.py mode=kills times=20                       # what kills cost, and what they do not
    python benchmarks/gpu.py out=gpu.json                                # everything on one GPU, in nine minutes"""


def write_page(folder: Path) -> str:
    """The whole page, of all JSON files in `folder`."""
    found: dict[str, Blocks] = {}
    unknown = []
    for path in sorted(folder.glob("*.json")):
        result = _read(path)
        kind = result.get("benchmark") if isinstance(result, dict) else None
        if kind in KINDS:
            found.setdefault(kind, []).extend(_file(path, result, KINDS[kind][2]))
        else:
            unknown.append(f"* `{path.name}` is " + ("no JSON" if result is None else f"of benchmark={kind}"))

    contents = [f"* [{KINDS[kind][0]}](#{_anchor(KINDS[kind][0])})" for kind in KINDS if kind in found]
    blocks = [TOP, "\n".join(contents)]
    for kind, (title, about, _) in KINDS.items():
        if kind in found:
            blocks += [f"## {title}", about, *found[kind]]
    if unknown:
        blocks += ["## Files that no table is known for", "\n".join(unknown)]
    return "\n\n".join(blocks) + "\n"


def _anchor(title: str) -> str:
    """A heading's address in its page, as GitHub makes it."""
    return title.lower().replace("'", "").replace(" ", "-")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _file(path: Path, result: Result, tables: Callable[[Result], Blocks]) -> Blocks:
    """A file's section. Figures that its tables do not know stand in one of their own at the end."""
    del result["benchmark"]
    blocks = [f"### {path.name}", *surroundings(result), *tables(result)]
    return [*blocks, *(["Further figures of the file:", *pairs(result)] if result else [])]


def main(arguments: list[str]) -> int:
    """The exit status: 1 if --check found another file than it would write."""
    page = write_page(RESULTS)
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text() == page:
            return 0
        print(f"{PAGE} is not what the files in {RESULTS} make: run python benchmarks/lab/write_results.py")
        return 1

    PAGE.write_text(page)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
