"""What routes answer, for the OpenAPI schema; the objects themselves are built as plain dictionaries."""

from typing import Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer but those of status 200."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int
    """Found in the prefix cache."""


class UsageAnswer(BaseModel):
    """Tokens of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class LogprobsAnswer(BaseModel):
    """Of a completion; one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: LogprobsAnswer | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    """Of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class TopLogprob(BaseModel):
    """A token in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that stands in a place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a reply."""

    content: list[TokenLogprob]
    refusal: None


class ReplyMessage(BaseModel):
    """A reply."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str | None
    refusal: None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatAnswer(BaseModel):
    """Of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None = None


class TokenizeAnswer(BaseModel):
    """Of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    """Of `POST /detokenize`."""

    prompt: str


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusAnswer(BaseModel):
    """That all is well."""

    status: str


class VersionAnswer(BaseModel):
    """The version of this server."""

    version: str
