"""What a request to /v1/chat/completions may hold. What would change the answer and is not done here is refused, not
ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmrecipes.inference.batching import Sampling
from mmrecipes.serve.refusals import Refused

TOOLS = ("tools", "tool_choice", "functions", "function_call", "tool_calls", "parallel_tool_calls")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # a hint: the model's processor decides


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Strict):
    include_usage: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """Temperature is 0 where none is given: as `Exported.generate`, not as OpenAI's own models."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] = []
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False  # not OpenAI's: vLLM's name for answers that are as long as they may be, for measuring
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # only as they are by default
    n: int = Field(1, ge=1, le=1)
    top_p: float = Field(1.0, ge=1, le=1)
    top_logprobs: int = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    response_format: ResponseFormat = ResponseFormat(type="text")
    # what no answer depends on
    user: str | None = None
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, most: int) -> Sampling:
        """How to choose tokens, at most so many; Refused for more."""
        tokens = self.max_completion_tokens or self.max_tokens or most
        if tokens > most:
            raise Refused(400, f"max_tokens: {tokens}; this server generates at most {most} an answer", param="max_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > 4 or "" in stop:
            raise Refused(400, "stop: expected at most 4 strings, none of them empty", param="stop")
        seed = None if self.seed is None else self.seed % 2**64
        return Sampling(tokens, self.temperature, seed, stop, self.ignore_eos)


def parse(body: bytes) -> ChatRequest:
    """The request in `body`; Refused, with the place of the mistake, for anything else."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as e:
        # of the kinds that a value might be of, the one that it is nearest to
        error = max(e.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
    place = ".".join(str(each) for each in error["loc"] if "[" not in str(each)) or "the body"
    if error["type"] == "extra_forbidden" and error["loc"][-1] in TOOLS:
        raise Refused(400, f"{place}: tools are not supported, the model answers in text; leave it out", "unsupported", place)
    if error["type"] == "extra_forbidden":
        raise Refused(400, f"{place}: not supported by this server; leave it out", "unsupported", place)
    raise Refused(400, f"{place}: {error['msg']}", param=place)
