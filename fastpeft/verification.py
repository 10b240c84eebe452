"""Proof on the user's own model: the accelerated layers against PEFT's and against fp64.

Module by module, with the inputs and output gradients of a real step: our error against PEFT's layer in fp64 may be
twice PEFT's own (in the same dtype and autocast state) plus one rounding, and a little more where few numbers leave
much to chance. For the whole model, where no fp64 copy would fit, the difference between our gradients and PEFT's is
held against what PEFT's own rounding does to them: a twin run of PEFT whose layer outputs carry once more the rounding
error that was measured for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .integrations.transformers import sample_batch
from .layers.experts import FastExperts
from .layers.frozen import FrozenSibling
from .layers.lora import FastLoraLayer
from .layers.mlp import FastMlp
from .layers.requests import Request
from .layers.siblings import Sibling
from .verification_states import calm, in_fp64, noisy, suspended, whole_in_fp64

MODEL_SLACK = 4.0
"""Whole model: our distance from PEFT may be this many times the twin's, which repeats the forward's rounding only."""


@dataclass(frozen=True)
class Check:
    """One compared quantity.

    Attributes:
        path: the module, or "" for the whole model.
        what: output, gradient of x, of a parameter, or loss.
        error: ours; relative to the largest magnitude of the truth (module) or to PEFT's norm (whole model).
        reference: PEFT's own error against fp64 (module), or the twin's distance from PEFT (whole model).
        budget: what the error may be.
    """

    path: str
    what: str
    error: float
    reference: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Verification:
    """The outcome; prints as a short table."""

    checks: tuple[Check, ...]
    loss: float
    loss_peft: float
    unserved: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Every check within its budget, and at least one layer checked."""
        return any(check.path for check in self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        lines = [
            f"fastpeft verify: {'passed' if self.passed else 'FAILED'}, {len(self.checks)} checks",
            f"loss: ours {self.loss:.7g}, PEFT {self.loss_peft:.7g}",
            f"{'':36}{'worst error':>12}{'reference':>12}{'budget':>12}  where",
        ]
        kinds = dict.fromkeys((bool(check.path), _kind(check.what)) for check in self.checks)
        for in_module, kind in kinds:
            mine = [c for c in self.checks if bool(c.path) == in_module and _kind(c.what) == kind]
            worst = max(mine, key=lambda c: c.error / c.budget if c.budget else float(c.error > 0))
            name = f"{'each layer' if in_module else 'whole model'}: {kind}"
            where = worst.path or worst.what
            lines.append(f"{name:36}{worst.error:12.2e}{worst.reference:12.2e}{worst.budget:12.2e}  {where}")
        lines += [f"not served by an op, so not checked: {path}" for path in self.unserved]
        lines += [f"FAILED {c.path} {c.what}: error {c.error:.3e}, budget {c.budget:.3e}" for c in self.failures]
        return "\n".join(lines)


def verify(model: nn.Module, batch: Mapping[str, Any] | None = None, *, seed: int = 0) -> Verification:
    """Compare an accelerated model with PEFT's own computation and with fp64.

    Runs in the autocast state of the caller, in evaluation mode (no dropout). A fresh adapter's zero `lora_B` is given
    random values meanwhile, else half of the gradients would be zero. The model is afterwards as it was, gradients too.

    Args:
        model: a model that `fastpeft.accelerate` was called on.
        batch: keyword arguments of the model's forward; a small random one by default.
        seed: of the random batch and of the twin's rounding.

    Returns:
        A `Verification`: `.passed`, `.checks`, and a table when printed.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model holds no accelerated layer, or no batch can be made up for it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, (FastLoraLayer, FastExperts)) for module in model.modules()):
        raise ValueError("model: no accelerated layer in it; call fastpeft.accelerate(model) first")
    inputs = dict(sample_batch(model, seed) if batch is None else batch)
    with calm(model, seed):
        if any(getattr(module, "fastpeft_watch", None) is not None for module in model.modules()):
            with torch.no_grad():
                model(**inputs)  # tells which frozen projections are to be checked too
        layers = {path: module for path, module in model.named_modules() if isinstance(module, Sibling)}
        mlps = {path: module for path, module in model.named_modules() if isinstance(module, FastMlp)}
        mlps = {path: mlp for path, mlp in mlps.items() if mlp.fastpeft_roles is not None}
        wrappers = {path: module for path, module in model.named_modules() if isinstance(module, FastExperts)}
        inside = {id(wrapper.get_submodule("base_layer")) for wrapper in wrappers.values()}
        experts = {path: wrapper for path, wrapper in wrappers.items() if id(wrapper) not in inside}
        wholes: dict[str, FastMlp | FastExperts] = {**mlps, **experts}
        replaced: dict[str, nn.Module] = {**layers, **mlps, **wrappers}
        _, traffic = _step(model, layers, inputs, record=True)  # a hook on its projections takes an MLP apart
        ours, traffic_of_wholes = _step(model, wholes, inputs, record=True)
        with suspended(replaced):
            peft, _ = _step(model, layers, inputs)
        checks, rounding = _check_layers(layers, traffic)
        of_wholes, rounding_of_wholes = _check_wholes(wholes, traffic_of_wholes)
        rounding |= {path: rms for path, rms in rounding_of_wholes.items() if path in experts}
        with suspended(replaced), noisy({**layers, **experts}, rounding, seed):
            twin, _ = _step(model, layers, inputs)
    checks += of_wholes + _compare_models(ours, peft, twin)
    checked = {check.path for check in checks}
    # A frozen sibling in front of which nothing is trained is not computed by an op.
    served = {**layers, **wholes}
    unserved = tuple(p for p, module in served.items() if p not in checked and not isinstance(module, FrozenSibling))
    return Verification(tuple(checks), ours["loss"].item(), peft["loss"].item(), unserved)


def _step(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: dict[str, Any], record: bool = False
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """(output, loss and gradients of trainable parameters by name, [*inputs, dy] of each layer's first call)."""
    traffic: dict[str, list[Tensor]] = {}
    handles = (
        [layer.register_forward_hook(_recorder(path, traffic)) for path, layer in layers.items()] if record else []
    )
    try:
        with torch.enable_grad():
            output, loss = output_and_loss(model(**inputs))
            named = {name: p for name, p in model.named_parameters() if p.requires_grad and loss.requires_grad}
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else ()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: g.detach() for name, g in zip(named, gradients, strict=True) if g is not None}
    return {"output": output.detach(), "loss": loss.detach(), **found}, traffic


def _recorder(path: str, traffic: dict[str, list[Tensor]]) -> Any:
    def keep(gradient: Tensor | None) -> None:
        if gradient is not None:
            traffic[path].append(gradient.detach())

    def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if path not in traffic and output.requires_grad:
            traffic[path] = [argument.detach() for argument in args if isinstance(argument, Tensor)]
            output.register_hook(keep)

    return record


def output_and_loss(outputs: Any) -> tuple[Tensor, Tensor]:
    """The first floating output that is not the loss (logits, say), and the loss.

    For models without a loss it is a fixed random projection of that output.
    """
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else (outputs,)
    y = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is not None:
        return y, loss.float()
    generator = torch.Generator().manual_seed(0)
    return y, (y.float() * torch.randn(y.shape, generator=generator).to(y.device)).mean()


def _check_layers(layers: dict[str, Sibling], traffic: dict[str, list[Tensor]]) -> tuple[list[Check], dict[str, float]]:
    """Checks of every layer, group by group, and the rms error of PEFT's output by path."""
    checks: list[Check] = []
    rounding: dict[str, float] = {}
    paths = {id(layer): path for path, layer in layers.items()}
    done: set[int] = set()
    for layer in layers.values():
        if id(layer) in done:
            continue
        members = [layer] if layer.fastpeft_group is None else layer.fastpeft_group.members
        done.update(map(id, members))
        members = [member for member in members if len(traffic.get(paths[id(member)], ())) == 2]
        inputs = [traffic[paths[id(member)]] for member in members]
        with torch.enable_grad():
            requests = [m.request(x.requires_grad_()) for m, (x, _) in zip(members, inputs, strict=True)]
        served = [i for i, request in enumerate(requests) if isinstance(request, Request)]
        if served:
            group = [members[i] for i in served]
            x, dys = inputs[served[0]][0], [inputs[i][1] for i in served]
            checks += _check_group([paths[id(m)] for m in group], group, x, dys, rounding)
        for member in members:
            traffic.pop(paths[id(member)])
    return checks, rounding


def _check_group(
    paths: list[str], members: list[Sibling], x: Tensor, dys: list[Tensor], rounding: dict[str, float]
) -> list[Check]:
    parameters = [_trained(member) for member in members]
    ours = _differentiate(members, x, dys, parameters)
    with suspended(dict(zip(paths, members, strict=True))):
        peft = _differentiate(members, x, dys, parameters)
    exact = _Derived([], torch.zeros_like(x, dtype=torch.float64), [])
    for member, dy in zip(members, dys, strict=True):  # one fp64 copy at a time
        wide = in_fp64(member)
        with torch.autocast(x.device.type, enabled=False):
            part = _differentiate([wide], x.double(), [dy.double()], [_trained(wide)])
        exact = _Derived([*exact.outputs, *part.outputs], exact.x + part.x, [*exact.parameters, *part.parameters])
    checks = []
    for i, path in enumerate(paths):
        rounding[path] = _rms(peft.outputs[i], exact.outputs[i])
        checks.append(_check(path, "output", ours.outputs[i], peft.outputs[i], exact.outputs[i]))
        triples = zip(ours.parameters[i], peft.parameters[i], exact.parameters[i], strict=True)
        checks += [_check(path, "gradient of a parameter", *triple) for triple in triples]
    checks.append(_check(paths[0], "gradient of x", ours.x, peft.x, exact.x))
    return checks


def _check_wholes(
    wholes: Mapping[str, FastMlp | FastExperts], traffic: dict[str, list[Tensor]]
) -> tuple[list[Check], dict[str, float]]:
    """Checks of all MLPs and experts that the ops served, each as a whole; the rms error of PEFT's output by path."""
    checks: list[Check] = []
    rounding: dict[str, float] = {}
    for path, module in wholes.items():
        *inputs, dy = traffic.pop(path, [torch.empty(0)])
        if len(inputs) != (3 if isinstance(module, FastExperts) else 1) or isinstance(module.request(*inputs), str):
            continue
        x, *routing = inputs
        parts = {name: part for name, part in module.named_modules() if isinstance(part, (FastLoraLayer, FastExperts))}
        trained = [_trained(module)]
        ours = _differentiate([module], x, [dy], trained, routing)
        with suspended({**parts, path: module}):
            peft = _differentiate([module], x, [dy], trained, routing)
        wide = whole_in_fp64(module)
        routing = [t.double() if t.is_floating_point() else t for t in routing]
        with torch.autocast(x.device.type, enabled=False):
            exact = _differentiate([wide], x.double(), [dy.double()], [_trained(wide)], routing)
        rounding[path] = _rms(peft.outputs[0], exact.outputs[0])
        checks.append(_check(path, "output", ours.outputs[0], peft.outputs[0], exact.outputs[0]))
        triples = zip(ours.parameters[0], peft.parameters[0], exact.parameters[0], strict=True)
        checks += [_check(path, "gradient of a parameter", *triple) for triple in triples]
        checks.append(_check(path, "gradient of x", ours.x, peft.x, exact.x))
    return checks, rounding


def _rms(y: Tensor, exact: Tensor) -> float:
    return (y.double() - exact).square().mean().sqrt().item()


@dataclass
class _Derived:
    outputs: list[Tensor]
    x: Tensor
    parameters: list[list[Tensor]]


def _differentiate(
    layers: Sequence[nn.Module],
    x: Tensor,
    dys: list[Tensor],
    parameters: list[list[nn.Parameter]],
    more: Sequence[Tensor] = (),
) -> _Derived:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        outputs = [layer(x, *more) for layer in layers]
        flat = [p for group in parameters for p in group]
        gradients = iter(torch.autograd.grad(outputs, [x, *flat], dys, allow_unused=True))
    dx = next(gradients)
    grouped = [[_or_zero(next(gradients), p) for p in group] for group in parameters]
    return _Derived([y.detach() for y in outputs], _or_zero(dx, x), grouped)


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _check(path: str, what: str, ours: Tensor, peft: Tensor, exact: Tensor) -> Check:
    """The larger of the two budgets' uses: largest element, and norm.

    Errors of one distribution differ by chance, the more the fewer numbers there are, and their largest element more
    than their norm.
    """
    eps = torch.finfo(ours.dtype).eps
    slack = 2.0 * (1.0 + 4.0 / max(ours.numel(), 1) ** 0.5)
    worst = None
    for measure, allowed in ((lambda t: t.abs().max().item() if t.numel() else 0.0, 2.0 * slack), (_norm, slack)):
        scale = measure(exact) or 1.0
        error = measure(ours.double() - exact) / scale
        reference = measure(peft.double() - exact) / scale
        check = Check(path, what, error, reference, allowed * reference + eps)
        if worst is None or not check.passed or check.error / check.budget > worst.error / worst.budget:
            worst = check
    assert worst is not None
    return worst


def _norm(t: Tensor) -> float:
    return t.norm().item()


def _compare_models(ours: dict[str, Tensor], peft: dict[str, Tensor], twin: dict[str, Tensor]) -> list[Check]:
    checks = []
    rows = max(1, peft["output"].numel() // peft["output"].shape[-1])
    for name in ["output", "loss", *sorted((ours.keys() | peft.keys()) - {"output", "loss"})]:
        if name not in ours or name not in peft:
            checks.append(Check("", f"{_named(name)} has a gradient in one of the two only", float("inf"), 0.0, 0.0))
            continue
        reference = peft[name].double()
        scale = reference.norm().item() or 1.0
        error = (ours[name].double() - reference).norm().item() / scale
        noise = (twin[name].double() - reference).norm().item() / scale
        if name == "output":
            output_noise = noise
        elif name == "loss":  # one number can be close by chance: it is a mean over rows of the output
            noise = max(noise, output_noise / rows**0.5)
        eps = torch.finfo(peft[name].dtype).eps
        checks.append(Check("", _named(name), error, noise, MODEL_SLACK * max(noise, eps)))
    return checks


def _named(name: str) -> str:
    return name if name in ("output", "loss") else f"gradient of {name}"


def _kind(what: str) -> str:
    return "gradients" if "." in what else what


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
