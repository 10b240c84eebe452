"""A pytest plugin: every model that a test makes with PEFT's functions, or gives adapters, is accelerated.

Only a test run is changed like this, never a program: PEFT's functions are replaced, and what is left to PEFT or to the
model because it is small is computed by the ops, since tests are small. `--plain` leaves all as it is.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_counts: Counter[str] = Counter()
_outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="without fastpeft")
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write each test's outcome there, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--plain"):
        _leave_nothing_small()
        _replace_functions()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--outcomes")
    if file is not None:
        root = session.config.rootpath
        tests = {str(root / test): outcome for test, outcome in _outcomes.items()}
        file.write_text(json.dumps({"tests": tests, "counts": _counts}))


def _leave_nothing_small() -> None:
    from fastpeft.layers import few_tokens, head_call, norm

    few_tokens.FEW = few_tokens.FEW_ELEMENTS = 0
    head_call.FEW_ON_CPU = head_call.FEW_SLOW_ON_CPU = 0
    norm.FEW_ON_CPU = dict.fromkeys(norm.FEW_ON_CPU, 0)


def _replace_functions() -> None:
    import peft
    import transformers
    from peft import mapping_func
    from peft.tuners import tuners_utils

    for holder in (peft, mapping_func):
        holder.get_peft_model = _and_accelerate(holder.get_peft_model)
    peft.inject_adapter_in_model = _and_accelerate(peft.inject_adapter_in_model)
    for owner in (peft.PeftModel, peft.PeftMixedModel):
        owner.from_pretrained = classmethod(_and_accelerate(owner.from_pretrained.__func__))
        for name in ("add_adapter", "load_adapter"):
            setattr(owner, name, _and_accelerate(getattr(owner, name), its_own=True))
    transformers.PreTrainedModel.add_adapter = _and_accelerate(transformers.PreTrainedModel.add_adapter, its_own=True)
    tuners_utils.BaseTuner.__init__ = _and_accelerate(tuners_utils.BaseTuner.__init__, its_own=True)


def _and_accelerate(function: Callable[..., Any], its_own: bool = False) -> Callable[..., Any]:
    """`function`, and then `fastpeft.accelerate` of what it returned, or of the object that it is a method of."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import fastpeft

        made = function(*args, **kwargs)
        model = args[0] if its_own else made
        fastpeft.accelerate(model)
        _counts["accelerated"] += 1
        _counts["adapter layers"] += sum(row.kind == "lora" for row in fastpeft.report(model).accelerated)
        return made

    return wrapped
