"""The settings of webhooks and alerts, as a part of `Settings`."""

from pydantic import BaseModel, Field, field_validator

from apt_jobs.webhook_targets import TargetRules


class WebhookSettings(BaseModel):
    """What may be sent to whom, and for how long it is tried."""

    webhook_allow_targets: tuple[str, ...] = Field(
        (),
        description="Names, addresses or networks that webhooks may be sent to though they are not public, as "
        "`receiver.internal` or `10.0.0.0/8` (JSON list).",
    )
    webhook_timeout_s: float = Field(
        15.0, gt=0, le=60, description="Longest time for one try of a webhook, from the name's look-up to the answer."
    )
    webhook_retry_wait_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Wait after a webhook's first failed try, in seconds; doubles with each one, for 14 tries in all.",
    )
    webhook_disable_after_hours: float = Field(
        24.0, gt=0, le=8760, description="A webhook of which nothing arrives for so many hours is disabled."
    )
    webhook_days: float = Field(14.0, gt=0, le=3650, description="Days that deliveries of webhooks are kept.")
    alert_services: tuple[str, ...] = Field(
        ("slack", "discord", "tgram", "gchat", "pagerduty", "opsgenie", "pover"),
        description="Services of apprise that alerts may go through, as `mailtos` (JSON list). Those that connect to "
        "any host, mail among them, are not checked further, so that they are off by default.",
    )

    @field_validator("webhook_allow_targets")
    @classmethod
    def _webhook_targets_can_be_named(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        TargetRules.parse(targets)
        return targets
