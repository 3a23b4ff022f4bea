"""The usual snippets of transformers on one folder. Runs under another Python, which has torch and transformers.

    PYTHON transformers_program.py FOLDER < {"prompts": [..], "new_tokens": n}

Prints one JSON line: versions; `alone`, new ids of each prompt by itself; `batch`, the same of all prompts padded;
`pipeline`, the text that a pipeline makes of the first; `logged`, what was logged or warned about meanwhile.
"""

import importlib
import json
import logging
import os
import sys
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Collector(logging.Handler):
    """Gathers what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Stores the message."""
        self.lines.append(record.getMessage())


def main() -> None:
    """Does what a model card shows."""
    folder, given = sys.argv[1], json.loads(sys.stdin.readline())
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)
    collector = Collector()
    logging.getLogger().addHandler(collector)
    transformers.logging.get_logger().addHandler(collector)
    transformers.logging.disable_progress_bar()
    settings = {"max_new_tokens": given["new_tokens"], "do_sample": False}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        alone = []
        for prompt in given["prompts"]:
            inputs = tokenizer(prompt, return_tensors="pt")
            alone.append(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist())
        inputs = tokenizer(given["prompts"], return_tensors="pt", padding=True)
        batch = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
        pipeline = transformers.pipeline("text-generation", model=folder, dtype=torch.float32)
        text = pipeline(given["prompts"][0], **settings)[0]["generated_text"]
    answer = {
        "versions": [transformers.__version__, torch.__version__],
        "prompts": [tokenizer(prompt)["input_ids"] for prompt in given["prompts"]],
        "alone": alone,
        "batch": batch,
        "pipeline": text,
        "logged": collector.lines + [f"{each.category.__name__}: {each.message}" for each in warned],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
