"""Settings of the engine that converts inside the server."""

from __future__ import annotations

SERVER = {"OM_BACKFILL_ENGINE": "server"}


OFF = {"OM_SYNC_TRIGGER": "off"}
