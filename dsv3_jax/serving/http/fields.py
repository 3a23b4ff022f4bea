"""Fields of OpenAI's and vLLM's requests that this server does not act on."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.serving.errors import RequestError

_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "web_search_options": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
}
"""What would change the answer, with the values that do not; null never does."""


def refuse(extra: Mapping[str, Any], *, n: int) -> None:
    """Raises `RequestError` for a field that would change the answer if it were acted on."""
    harmless = {**_HARMLESS, "best_of": (1, n), "tools": ([],), "tool_choice": ("none", "auto")}
    if extra.get("tool_choice") == "none":
        harmless.pop("tools")
    for name, values in harmless.items():
        value = extra.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in values):
            raise RequestError(f"{name} is not supported here; leave it out.", param=name)


class Unknown:
    """Remembers which fields were reported."""

    MOST = 256

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def fresh(self, extra: Mapping[str, Any]) -> list[str]:
        """Names that no request had before, as they may stand in a log; none after many."""
        names = [name for name in extra if name not in self._seen][: self.MOST - len(self._seen)]
        self._seen.update(names)
        return [ascii(name)[:80] for name in names]
