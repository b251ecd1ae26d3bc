"""Images out of the body of a request: multipart/form-data, or JSON with base64."""

import base64
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header

from deploy.service.limits import Refusal

FIELD = "images"
LONGEST_NAME = 200  # characters of a file's name that are given back


class Sent(NamedTuple):
    """One image file as it was sent; its name is a label and never a path that is opened."""

    name: str
    data: bytes


class ImagesJson(BaseModel):
    """Images as base64."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str] = Field(
        min_length=1,
        json_schema_extra={"items": {"type": "string", "contentEncoding": "base64"}},
        description="Image files (PNG, JPEG, BMP, TIFF, WebP, PNM), each as base64",
    )


def images_of(body: bytes, content_type: str, most: int) -> list[Sent]:
    """Return the images in a body, in order; `Refusal` if there is none, or more than `most`."""
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        sent = _from_form(body, options, most)
    elif kind == b"application/json":
        sent = _from_json(body, most)
    else:
        raise Refusal(
            415, "Content-Type must be multipart/form-data (files named 'images') or "
            "application/json",
        )  # fmt: skip
    if not sent:
        raise Refusal(422, f"no image: send at least one file in the field '{FIELD}'")
    return sent


def _from_form(body: bytes, options: dict[bytes, bytes], most: int) -> list[Sent]:
    boundary = options.get(b"boundary")
    if not boundary:
        raise Refusal(400, "multipart/form-data without a boundary in its Content-Type")
    sent: list[Sent] = []
    ended = False

    def on_file(file: Any) -> None:
        if file.field_name != FIELD.encode():
            raise _unknown_field(file.field_name)
        if len(sent) == most:
            raise _too_many(most)
        file.file_object.seek(0)
        sent.append(Sent(_label(file.file_name, len(sent)), file.file_object.read()))

    def on_field(field: Any) -> None:
        if field.field_name != FIELD.encode():
            raise _unknown_field(field.field_name)
        raise Refusal(422, f"the part '{FIELD}' has no filename; send it as a file")

    def on_end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = FormParser(
            "multipart/form-data", on_field, on_file, on_end, boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # never a temporary file
        )  # fmt: skip
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refusal(400, f"damaged multipart/form-data: {_one_line(error)}") from None
    if not ended:
        raise Refusal(400, "multipart/form-data that ends in the middle of a part")
    return sent


def _from_json(body: bytes, most: int) -> list[Sent]:
    try:
        texts = ImagesJson.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refusal(400, f"damaged JSON: {_one_line(first['msg'])}") from None
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Refusal(422, f"{place}: {_one_line(first['msg'])}") from None
    if len(texts) > most:
        raise _too_many(most)
    sent = []
    for number, text in enumerate(texts):
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            raise Refusal(
                422, f"images.{number}: not base64; send the file's bytes alone, without 'data:' "
                "and without line breaks",
            ) from None  # fmt: skip
        sent.append(Sent(_label(None, number), data))
    return sent


def _label(name: bytes | None, number: int) -> str:
    text = (name or b"").decode("utf-8", "replace")
    return "".join(c for c in text if c.isprintable())[:LONGEST_NAME] or f"image {number + 1}"


def _unknown_field(name: bytes | None) -> Refusal:
    shown = _one_line((name or b"").decode("utf-8", "replace"))
    return Refusal(422, f"unknown field '{shown}'; the files go into '{FIELD}'")


def _too_many(most: int) -> Refusal:
    return Refusal(413, f"more than {most} images; send them in several requests")


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return "".join(c for c in text if c.isprintable())[:LONGEST_NAME]
