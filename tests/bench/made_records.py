"""Records for tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any

from fastpeft.bench.records import Environment, Record

HOSTILE = (
    "<script>alert(1)</script>",
    '"onload="alert(1)" x="',
    "' onmouseover='alert(1)",
    "</script><script>alert(1)//",
    "](javascript:alert(1)) [x](javascript:alert(1))",
    "![x](https://example.com/x.png) <https://example.com> https://example.com",
    "a | b || c |",
    "`code` ``` *bold* __strong__ $\\frac{$ &lt; &#60;",
    "line\n\n# heading\n--8<-- 'x'\n::: module\r\n- item",
    "-->\n<!-- test: setup import os -->",
    "../../../x\x00\x1b[31m\u202e\ud800\u2028",
    "]]><svg onload=alert(1)><![CDATA[",
)


def environment(**changes: Any) -> Environment:
    base: dict[str, Any] = {"device": "Some GPU", "device_type": "cuda", "commit": "c" * 40, "dirty": False}
    base |= {"date": "2026-01-02T03:04:05Z", "python": "3.12", "system": "Linux", "versions": {"torch": "2.11"}}
    return Environment(**{**base, **changes})


def record(samples: Sequence[float] = (2.0,), where: Environment | None = None, **changes: Any) -> Record:
    base: dict[str, Any] = {"suite": "ops", "case": "one", "op": "lora", "peer": "fastpeft", "metric": "time"}
    base |= {"unit": "ms", "environment": where or environment(), "samples": list(samples), "median": median(samples)}
    return Record(**{**base, **changes})


def noisy(center: float, seed: int, spread: float = 0.03, count: int = 9) -> list[float]:
    rng = random.Random(seed)
    return [center * rng.lognormvariate(0, spread) for _ in range(count)]
