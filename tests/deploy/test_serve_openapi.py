"""The description of the service, and requests that schemathesis makes from it."""

import contextlib
import json

import pytest

from tests.deploy.serving import Running

pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")
REASON = "pip install -r requirements-dev.txt"
schemathesis = pytest.importorskip("schemathesis", reason=REASON)
checks = pytest.importorskip("schemathesis.specs.openapi.checks", reason=REASON)
hypothesis = pytest.importorskip("hypothesis", reason=REASON)


EXAMPLES = 60


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/predict"), ("GET", "/health"), ("GET", "/models"), ("GET", "/metrics")],
)
def test_answers_are_as_described(service: Running, method, path, mode):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    operation = schema[path][method]
    asked = []

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True, database=None,
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        # a schema cannot say that text is an image, so most of what it allows is refused
        asked.append(case.call_and_validate(excluded_checks=[checks.positive_data_acceptance]))

    if mode is schemathesis.GenerationMode.NEGATIVE and method == "GET":
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # there is nothing to do wrong
            run()
    else:
        run()
        assert asked
    assert service.ask("GET", "/health").status == 200


def test_every_operation_has_examples_or_needs_none(service):
    described = service.ask("GET", "/openapi.json").json
    assert set(described["paths"]) == {"/predict", "/health", "/models", "/metrics"}
    predict = described["paths"]["/predict"]["post"]
    assert predict["responses"]["200"]["content"]["application/json"]["example"]["results"]
    assert len(predict["x-codeSamples"]) == 3
    example = predict["requestBody"]["content"]["application/json"]["example"]
    answer = service.ask(
        "POST", "/predict?model=fast", json.dumps(example).encode(),
        content_type="application/json",
    )  # fmt: skip
    assert answer.status == 200
    assert answer.json["results"][0]["width"] == 1
