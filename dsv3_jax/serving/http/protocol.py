"""The bodies of requests, in OpenAI's fields, with vLLM's beside them.

Types are strict: text is no number. Every field but the prompt may be null, which stands for its default. Fields that
are not listed are taken and left alone (`fields.py` names those that would change the answer). Limits that depend on
the engine are checked by it (`openapi.py` documents them).
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

WIDEST = 2**31 - 1


def _spelt(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("text holds half a surrogate pair, which UTF-8 cannot spell; leave it out") from error
    return text


def _whole(value: object) -> object:
    """16.0 is a whole number, too."""
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_spelt)]
Whole = BeforeValidator(_whole)
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=WIDEST)]], Field(fail_fast=True), Whole]
Ids = Annotated[list[Annotated[int, Field(ge=0, le=WIDEST)]], Field(min_length=1, fail_fast=True), Whole]
NotEmpty = Annotated[str, Field(min_length=1), AfterValidator(_spelt)]


class Body(BaseModel):
    """An object whose unknown fields stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    """A last piece that counts tokens."""


class Request(Body):
    """What completions and chat share."""

    model: Annotated[str, Field(min_length=1)]
    """One that `GET /v1/models` lists."""
    max_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=WIDEST), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Token id, as text, to what is added to its logit."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole] | None = None
    n: Annotated[int, Field(ge=1), Whole] | None = None
    stop: NotEmpty | Annotated[list[NotEmpty], Field(fail_fast=True)] | None = None
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Ids of the prompt and of the completion beside the text."""
    priority: Annotated[int, Field(ge=-WIDEST, le=WIDEST), Whole] | None = None
    """The lower, the earlier."""
    cache_salt: NotEmpty | None = None
    """Cached prompts are shared only among requests of the same salt."""


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: (
        NotEmpty
        | Ids
        | Annotated[list[NotEmpty], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    )
    """A text, its token ids, or a list of either."""
    echo: bool | None = None
    """The prompt stands before the completion, with its log-probabilities where they are asked for."""
    logprobs: Annotated[int, Field(ge=0), Whole] | None = None
    """Log-probabilities of the tokens, and of so many likeliest ones in their places."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class Thinking(Body):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class TemplateSettings(Body):
    """vLLM's switch."""

    thinking: bool | None = None


class ChatSettings(Body):
    """What decides a conversation's ids."""

    messages: Annotated[list[Message], Field(min_length=1)]
    thinking: Thinking | None = None
    """Of formats that can: the model thinks before it answers."""
    chat_template_kwargs: TemplateSettings | None = None

    @property
    def thinks(self) -> bool | None:
        """Whether the model should think first; None: as it does by itself."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        return None if self.chat_template_kwargs is None else self.chat_template_kwargs.thinking


class ChatRequest(Request, ChatSettings):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0), Whole] | None = None


class TokenizeText(Body):
    """A text to cut into tokens."""

    model: str | None = None
    prompt: Text
    add_special_tokens: bool | None = None
    """Begin with bos; default true."""
    return_token_strs: bool | None = None


class TokenizeChat(ChatSettings):
    """A conversation to cut into tokens."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Tokens
