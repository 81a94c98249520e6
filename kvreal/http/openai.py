"""Bodies as OpenAI's API and vLLM's server have them. What a synthetic engine has no use for (temperature) is taken and
ignored, as vLLM does with what it does not know."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(Body):
    include_usage: bool = False


class CompletionBody(Body):
    """A prompt is text, token ids, or a list of either."""

    model: Optional[str] = None
    prompt: Union[StrictStr, List[StrictInt], List[StrictStr], List[List[StrictInt]]]
    max_tokens: int = Field(default=16, ge=0, le=1 << 20)
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: Optional[StreamOptions] = None
    stop: Union[StrictStr, List[StrictStr], None] = None
    echo: bool = False
    cache_salt: Optional[str] = None
    add_special_tokens: bool = True
    return_token_ids: bool = False

    def prompts(self) -> List[Union[str, List[int]]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    def stops(self) -> List[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TokenizeBody(Body):
    model: Optional[str] = None
    prompt: StrictStr
    add_special_tokens: bool = True
    return_token_strs: Optional[bool] = False


class DetokenizeBody(Body):
    model: Optional[str] = None
    tokens: List[StrictInt]


def usage(prompt: int, completion: int, cached: int) -> Dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def choice(index: int, text: str, finish: Optional[str], stop: Optional[str]) -> Dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": stop,
        "prompt_logprobs": None,
    }


def error(status: int, message: str, param: Optional[str] = None) -> Dict[str, Any]:
    """As vLLM says it."""
    kinds = {400: "BadRequestError", 401: "UnauthorizedError", 404: "NotFoundError", 413: "RequestTooLargeError"}
    return {"error": {"message": message, "type": kinds.get(status, "InternalServerError"), "param": param,
                      "code": status}}  # fmt: skip
