"""Shapes of the answers, and the description of what /predict takes, for OpenAPI."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.service.body import ImagesJson

# A PNG of 1×1 pixel, so that the example of the documentation can be sent as it is.
TINY_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)
_REGION = {"x": 412, "y": 96, "w": 58, "h": 44, "area": 1630, "peak": 1.92}
RESULT = {
    "name": "bottle_bad.png",
    "width": 900,
    "height": 900,
    "score": 1.87,
    "threshold": 0.81,
    "verdict": "Anomaly",
    "pixel_threshold": 0.79,
    "map_mean": 0.52,
    "map_max": 1.92,
    "nll": 1.31,
    "regions": [_REGION],
}


class Options(BaseModel):
    """What stands behind the question mark."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of the model; needed if there are several")
    map: bool = Field(False, description="Add the heat map as a PNG in base64")


class Region(BaseModel):
    """A connected region above the pixel threshold, in pixels of the image as it was sent."""

    x: int
    y: int
    w: int
    h: int
    area: int
    peak: float


class Result(BaseModel):
    """What is said of one image."""

    name: str = Field(description="The file's name as it was sent, or its number")
    width: int
    height: int
    score: float
    threshold: float
    verdict: Literal["Normal", "Anomaly"] = Field(description="Anomaly: score > threshold")
    pixel_threshold: float
    map_mean: float
    map_max: float
    regions: list[Region] = Field(description="Regions above the pixel threshold")
    nll: float | None = Field(None, description="How unlike normal images, nats per dimension")
    log_nfa: float | None = Field(None, description="log10 of the number of false alarms")
    map: str | None = Field(None, description="PNG in base64, at most 1024 pixels a side")


class Prediction(BaseModel):
    """One result per image, in the order of the request."""

    model: str
    results: list[Result]


class Threshold(BaseModel):
    """A threshold and where it comes from."""

    value: float
    policy: str
    text: str
    target_rate: float | None
    guaranteed_rate: float | None
    measured_rate: float | None
    normals: int


class ModelInfo(BaseModel):
    """What a model is and how it decides."""

    name: str
    state: Literal["starting", "ok", "failed"]
    trained: dict[str, str]
    input_size: tuple[int, int] = Field(description="Height and width that images are scaled to")
    image_threshold: Threshold
    pixel_threshold: Threshold
    color_scale: tuple[float, float] = Field(description="Values at the ends of the heat map")
    drift: str = Field(description="How the latest images compare with normal ones; may be empty")
    drift_alarm: bool = Field(description="The latest images differ: camera or light changed?")
    engine: str


class Models(BaseModel):
    """All models, the first being the first on the command line."""

    models: list[ModelInfo]


class Health(BaseModel):
    """How the service and each model are."""

    status: Literal["starting", "ok", "stopping", "failed"]
    models: dict[str, str]


class Failure(BaseModel):
    """Why there is no result."""

    error: str
    request_id: str


def failures(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's answers of failed requests: `failures(e413="too large")`."""
    return {
        int(code[1:]): {"model": Failure, "description": text} for code, text in reasons.items()
    }


def good(description: str, example: object = None) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's answer 200, which `failures` are added to."""
    content = {} if example is None else {"content": {"application/json": {"example": example}}}
    return {200: {"description": description, **content}}


def predict_extra(token: bool) -> dict[str, Any]:
    """Return OpenAPI's description of the two forms of a body, and calls to copy."""
    header = "-H 'Authorization: Bearer TOKEN' " if token else ""
    address = "http://127.0.0.1:8000/predict"
    calls = [
        f"curl {header}-F images=@photo.png {address}",
        f"curl {header}-F images=@a.png -F images=@b.jpg '{address}?map=true'",
        f'echo "{{\\"images\\": [\\"$(base64 -w0 photo.png)\\"]}}" |\n'
        f"  curl {header}-H 'Content-Type: application/json' --data-binary @- {address}",
    ]
    samples = [{"lang": "Shell", "source": call} for call in calls]
    return {"requestBody": _body(), "x-codeSamples": samples}


def _body() -> dict[str, Any]:
    form = {
        "type": "object",
        "properties": {
            "images": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "string", "format": "binary"},
                "description": "Image files; the field is repeated for several",
            }
        },
        "required": ["images"],
        "additionalProperties": False,
    }
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": form,
                "encoding": {"images": {"contentType": "image/*"}},
            },
            "application/json": {
                "schema": ImagesJson.model_json_schema(),
                "example": {"images": [TINY_PNG]},
            },
        },
    }
