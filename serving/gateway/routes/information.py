"""The routes that tell about the server: models, version, load, health."""

from __future__ import annotations

import time

from ....engine.protocol.messages import ModelInfo
from ..config import VERSION
from ..gateway import Gateway
from ..http.exchange import Exchange
from ..schemas.responses import HealthInfo, LoadInfo, ModelCard, ModelList, VersionInfo


async def models(gateway: Gateway, exchange: Exchange) -> None:
    """List the names under which the model is served; none while it is loaded."""
    cards = [_card(gateway, name, model) for name, model in gateway.pool.models().items()]
    first, last = (cards[0].id, cards[-1].id) if cards else (None, None)
    await exchange.respond_json(ModelList(data=cards, first_id=first, last_id=last))


async def model(gateway: Gateway, exchange: Exchange) -> None:
    """Tell about one name."""
    name = str(exchange.scope["path_params"]["model"])
    await exchange.respond_json(_card(gateway, name, gateway.model_named(name)))


def _card(gateway: Gateway, name: str, found: ModelInfo) -> ModelCard:
    return ModelCard(
        id=name,
        created=gateway.created,
        root=found.model,
        max_model_len=found.max_model_len,
        display_name=name,
        max_input_tokens=found.max_model_len,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(gateway.created)),
    )


async def version(gateway: Gateway, exchange: Exchange) -> None:
    """Tell the version of the server."""
    await exchange.respond_json(VersionInfo(version=VERSION))


async def load(gateway: Gateway, exchange: Exchange) -> None:
    """Tell how much the server holds."""
    admission = gateway.admission
    await exchange.respond_json(LoadInfo(server_load=admission.requests, prompt_tokens=admission.tokens))


async def live(gateway: Gateway, exchange: Exchange) -> None:
    """Answer: the gateway's process does."""
    await exchange.respond_json(HealthInfo(status="live"))


async def ready(gateway: Gateway, exchange: Exchange) -> None:
    """Answer 200 while a request sent now would be computed, 503 with the reason otherwise."""
    state = gateway.pool.state
    if gateway.pool.ready():
        await exchange.respond_json(HealthInfo(status="ready"))
        return
    stuck = state.phase == "ready"
    reason = state.reason or ("the engine makes no progress" if stuck else f"the server is {state.phase}")
    await exchange.respond_json(HealthInfo(status="stuck" if stuck else state.phase, reason=reason), 503)
