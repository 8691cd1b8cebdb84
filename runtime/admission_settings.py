"""The settings of admission: how long the queues may get, and who goes first."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from kv_transfer.settings import Settings
from runtime.policy.admission import AdmissionPolicy

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class TenantSettings(Settings):
    """One tenant."""

    weight: float = Field(1.0, gt=0, le=1000, description="Its share of the tokens, against that of others.")
    best_priority: Literal["high", "normal", "low"] = Field("high", description="The best class that it gets.")
    api_keys_sha256: list[Digest] = Field(
        default_factory=list, description="SHA-256 digests (hex) of the API keys that are this tenant's."
    )


class AdmissionSettings(Settings):
    """Bounds of the queues, and their order."""

    max_wait_s: float = Field(
        120.0,
        ge=0,
        description="Requests that would have to wait longer than this before they begin are refused (429), in "
        "predicted seconds. Nobody is left waiting for twice as long. For interactive use a few seconds.",
    )
    max_waiting_requests: int = Field(2048, ge=0, description="Most requests that wait at one front end.")
    max_waiting_tokens: int = Field(4_000_000, ge=0, description="Most prompt tokens that wait at one front end.")
    max_starting_requests: int = Field(
        512,
        ge=0,
        description="Most requests that wait while there is no worker at all, for `limits.wait_for_worker_s`.",
    )
    engine_queue_s: float = Field(
        0.5,
        gt=0,
        description="A worker with so many predicted seconds of prompts to read, two prompts at least, gets no more; "
        "the rest waits in order at the front end.",
    )
    engine_queue_tokens: int = Field(
        2048, ge=1, description="The same in prompt tokens, for a worker that has not told its speed yet."
    )
    engine_streams: int = Field(
        256, ge=1, description="Most requests on a decode worker that has not told how many it takes."
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="A request that has not begun by then is dropped (504). Clients set their own by "
        "`x-baton-deadline-ms`.",
    )
    ageing_s: float = Field(
        10.0, gt=0, description="Who has waited for so many seconds counts as one class of priority better."
    )
    short_first_s_per_1k: float = Field(
        1.0,
        ge=0,
        description="So many seconds a prompt is put back for each 1,000 tokens that have to be read, behind shorter "
        "ones of the same class and tenant; at most `ageing_s`.",
    )
    tenant_header: str | None = Field(
        None,
        description="Header that names the tenant, where the API key does not. Only behind a proxy that sets it.",
    )
    tenants: dict[str, TenantSettings] = Field(
        default_factory=dict,
        description="Tenants by name, each with `weight`, `best_priority` and `api_keys_sha256`. Others share evenly, "
        "each API key (or value of the header) as one tenant of weight 1.",
    )

    @field_validator("tenant_header")
    @classmethod
    def _lower(cls, header: str | None) -> str | None:
        return header.lower() if header else None

    @model_validator(mode="after")
    def _one_tenant_a_key(self) -> AdmissionSettings:
        digests = [digest for tenant in self.tenants.values() for digest in tenant.api_keys_sha256]
        if len(set(digests)) < len(digests):
            raise ValueError("tenants: an API key belongs to one tenant only")
        return self

    def policy(self) -> AdmissionPolicy:
        """What the policy sees of this."""
        return AdmissionPolicy(
            engine_queue_s=self.engine_queue_s,
            engine_queue_tokens=self.engine_queue_tokens,
            engine_streams=self.engine_streams,
            max_wait_s=self.max_wait_s,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_starting_requests=self.max_starting_requests,
            ageing_s=self.ageing_s,
            handicap_s=self.short_first_s_per_1k / 1000.0,
            weights={name: tenant.weight for name, tenant in self.tenants.items()},
        )
