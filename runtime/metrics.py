"""Baton's own metrics, beside those that vLLM's front end exports."""

from __future__ import annotations

from prometheus_client import Counter

PLANS = Counter("baton_plans_total", "Requests by the plan they were given and why.", ["plan", "reason"])
LEGS_RETRIED = Counter("baton_legs_retried_total", "Requests planned again after a leg failed, by fault.", ["reason"])
HANDOFFS_RELEASED = Counter(
    "baton_handoffs_released_total", "Handoffs released because nobody would pull them, by reason.", ["reason"]
)
