"""Times torch: a request as JSON on standard input, an answer a line on standard output, each as soon as it is known.

The request is {"clock": ..., "seconds": ..., "rows": [problem with "sets", ...]}. The first answer is
{"version": ...}, or {"missing": reason} and nothing more. Then one for each way to each row, {"row": index,
"column": ..., "way": ...} with "seconds", or with "refused": why it cannot, by how much it differs from plain float32,
or that time was up. What torch compiles comes last, so that nothing else is lost to a slow compiler.
"""

import gc
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv3_kernels.gpu.torch_peer import decode, gemm, prefill
from dsv3_kernels.gpu.torch_peer.clock import seconds_per_launch
from dsv3_kernels.gpu.torch_peer.problems import TorchDecode, TorchGemm, TorchPrefill, TorchProblem, from_json
from dsv3_kernels.gpu.torch_peer.way import Way

MODULES: dict[type[TorchProblem], Any] = {TorchGemm: gemm, TorchDecode: decode, TorchPrefill: prefill}
LONGEST_REASON = 120


def main() -> None:
    """Answers one request."""
    started = time.monotonic()
    request = json.load(sys.stdin)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        print(json.dumps({"missing": "torch not installed"}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"missing": f"torch {torch.__version__} sees no GPU"}))
        return
    print(json.dumps({"version": torch.__version__}), flush=True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # "math" would else convert the keys to float32
    rows, stop = request["rows"], started + request["seconds"]
    with torch.cuda.stream(torch.cuda.Stream()):
        for answer in answers(
            [ways(torch, row, "cuda") for row in rows],
            lambda index, way: measured(torch, way, rows[index]["sets"], request["clock"]),
            has_time=lambda: time.monotonic() < stop,
        ):
            print(json.dumps(answer), flush=True)


def answers(
    ways_of_rows: Sequence[Sequence[Way]],
    measure: Callable[[int, Way], dict[str, Any]],
    *,
    has_time: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """An answer for each way of each row; those that are compiled come last."""
    for is_compiled in (False, True):
        for index, each in enumerate(ways_of_rows):
            for way in each:
                if way.is_compiled == is_compiled:
                    found = measure(index, way) if has_time() else {"refused": "no time left"}
                    yield {"row": index, "column": way.column, "way": way.name, **found}


def ways(torch: Any, row: dict[str, Any], device: str) -> list[Way]:
    """torch's ways to a problem of a request."""
    problem = from_json({name: value for name, value in row.items() if name != "sets"})
    return MODULES[type(problem)].ways(torch, problem, device)


def measured(torch: Any, way: Way, sets: int, clock: str) -> dict[str, Any]:
    """Seconds of one launch, or why there are none."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            prepared = way.prepare(sets)
            distance = prepared.error(prepared.launches[0]())
            if distance < way.limit:
                found = {"seconds": seconds_per_launch(torch, prepared.launches, clock)}
            else:
                found = {"refused": f"differs by {distance:.2g} from float32"}
        except torch.OutOfMemoryError:
            found = {"refused": "out of memory"}
        except Exception as error:  # noqa: BLE001  what torch's compilers raise has no common base
            found = {"refused": reason(error, [str(warning.message) for warning in warned])}
    prepared = None
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return found


def reason(error: Exception, warned: list[str]) -> str:
    """One short line: where no kernel is available torch warns of the reason, last of those about kernels."""
    text = f"{error}".strip() or type(error).__name__
    if "No available kernel" in text:
        told = [each for each in warned if "runtime disabled" not in each and "not used because" not in each]
        text = told[-1] if told else text
    line = text.splitlines()[0].split(" (Triggered internally")[0]
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


if __name__ == "__main__":
    main()
