"""What schemathesis makes of the OpenAPI document: no failure of the server, and answers as they are declared."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from phalanx.serving.gateway.app import create_app
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.tests.serving.gateway.scripted_pool import ScriptedPool
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

# Not that every request of the right form is accepted: some fields exclude others, and the model has one name.
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]

SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_app(ScriptedPool("hello"), GatewayConfig()))


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_route_answers_as_declared(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
