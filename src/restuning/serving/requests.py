"""A request's bytes → items, tasks and what is wanted of them; or one line that says why not."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from restuning.serving.settings import Refused, ServeSettings

Model = TypeVar("Model", bound=BaseModel)
Text = str | Annotated[list[str], Field(min_length=2, max_length=2)]


class PredictRequest(BaseModel):
    """JSON of /v1/predict and /v1/embed: images in base64, or texts (a pair is a list of two)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str] = []
    texts: list[Text] = []
    tasks: list[str] | Literal["all"] = "all"
    top: int = Field(default=1, ge=1, le=10_000)
    logits: bool = False


class EmbeddingsRequest(BaseModel):
    """JSON of /v1/embeddings, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"


class AdapterRequest(BaseModel):
    """JSON of POST /v1/adapters/{name}: a path inside the folder of adapters, or a hub id with a full revision."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str | None = Field(default=None, max_length=1000)
    hub: str | None = Field(default=None, max_length=200)
    revision: str | None = Field(default=None, max_length=64)


@dataclass
class Wanted:
    """What a request asks for. tasks: names, or None for all."""

    images: list[bytes] = field(default_factory=list)
    texts: list[str | list[str]] = field(default_factory=list)
    tasks: list[str] | None = None
    top: int = 1
    logits: bool = False


async def body_of(request: Request, settings: ServeSettings) -> bytes:
    """A request's body. Raises Refused for one that is too long (413), before it is read on, or too slow (408)."""
    limit = settings.max_body
    declared = request.headers.get("content-length")
    if declared is not None and (not declared.isdecimal() or int(declared[:20]) > limit):
        raise Refused(413, f"the request has more than {limit} bytes")
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.read_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise Refused(413, f"the request has more than {limit} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise Refused(408, f"the request took more than {settings.read_seconds:g} s to arrive") from error
    except ClientDisconnect as error:
        raise Refused(400, "the client left") from error
    return b"".join(parts)


def parsed(model: type[Model], body: bytes) -> Model:
    """JSON by its schema. Raises Refused with the first thing that is wrong, and where."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise Refused(422, f"{where or 'the request'}: {first['msg']}") from error
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, "the request is no JSON") from error


async def wanted_of(request: Request, body: bytes, settings: ServeSettings) -> Wanted:
    """What is asked for, as JSON, as a form (`image`, `text`, `tasks`, `top`, `logits`), or as the bytes of one image.
    `tasks`, `top` and `logits` may stand in the address too.

    Raises Refused for what is none of these, and for too many items or texts that are too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        made = parsed(PredictRequest, body)
        if len(made.images) + len(made.texts) > settings.max_items:  # before they are decoded
            raise Refused(413, f"more than {settings.max_items} items in one request")
        tasks = None if made.tasks == "all" else list(made.tasks)
        images = [_base64(text, i) for i, text in enumerate(made.images)]
        wanted = Wanted(images, list(made.texts), tasks, made.top, made.logits)
    elif kind == "multipart/form-data":
        wanted = await _form(request, body, settings)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        wanted = Wanted([body])
    else:
        raise Refused(415, "expected application/json, multipart/form-data, image/* or application/octet-stream")
    _from_fields(wanted, [(name, value) for name, value in request.query_params.multi_items()])
    count = len(wanted.images) + len(wanted.texts)
    if not count:
        raise Refused(422, "expected an image or a text")
    if wanted.images and wanted.texts:
        raise Refused(422, "expected images or texts, not both")
    if count > settings.max_items:
        raise Refused(413, f"{count} items in one request: expected at most {settings.max_items}")
    for i, text in enumerate(wanted.texts):
        parts = text if isinstance(text, list) else [text]
        if not all(part.strip() for part in parts):
            raise Refused(422, f"texts.{i}: it is empty")
        if sum(map(len, parts)) > settings.max_text:
            raise Refused(413, f"texts.{i}: more than {settings.max_text} characters")
        if any("\ud800" <= c <= "\udfff" for part in parts for c in part):
            raise Refused(422, f"texts.{i}: half of a surrogate pair is no character")
    if wanted.tasks is not None and not wanted.tasks:
        raise Refused(422, "tasks: expected a name at least, or all")
    return wanted


async def _form(request: Request, body: bytes, settings: ServeSettings) -> Wanted:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    limits = {"max_files": settings.max_items, "max_fields": settings.max_items + 100}
    parser = MultiPartParser(request.headers, stream(), **limits, max_part_size=4 * settings.max_text)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeDecodeError, AssertionError) as error:
        raise Refused(400, "the form cannot be read") from error
    wanted, fields = Wanted(), []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == "image":
                wanted.images.append(await value.read())
            elif isinstance(value, str):
                fields.append((name, value))
            else:
                raise Refused(422, f"{name[:80]!r}: files are images, in the field 'image'")
    finally:
        await form.close()
    _from_fields(wanted, fields)
    return wanted


def _from_fields(wanted: Wanted, fields: Sequence[tuple[str, str]]) -> None:
    for name, value in fields:
        if name == "text":
            wanted.texts.append(value)
        elif name == "tasks":
            if value != "all":
                wanted.tasks = [*(wanted.tasks or []), *value.split(",")]
        elif name == "top":
            if not (value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 10_000):
                raise Refused(422, "top: expected 1 to 10000")
            wanted.top = int(value[:6])
        elif name == "logits":
            if value not in ("true", "false"):
                raise Refused(422, "logits: expected true or false")
            wanted.logits = value == "true"
        else:
            raise Refused(422, f"unknown field {name[:80]!r}: expected image, text, tasks, top or logits")


def _base64(text: str, i: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        hint = " (addresses are not read)" if text[:8].startswith(("http:", "https:", "file:")) else ""
        raise Refused(422, f"images.{i}: expected an image in base64{hint}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
