"""What is learned from a supervised token, and how a loss of one's own is taken up.

A loss is a pure function of logits (supervised, vocabulary) in float32, the tokens they should predict (supervised,),
and a strength. It returns one term a token (supervised,) and no mean: `sft.token_mean` sums the terms of a forward pass
and divides by the supervised tokens of the whole optimizer step. So 8 rows at once and 2 rows four times are the same
step, whatever the function is, as long as a term depends on its own token alone; `check` asks it.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftexp.config import STRENGTHS, Loss, Trainer
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    import torch

    Terms = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

ALONE = 1e-5
"""Most that a term may change with the tokens beside it, as a share of the largest term: float32 in another order."""


def nll(logits: torch.Tensor, targets: torch.Tensor, strength: float = 0.0) -> torch.Tensor:
    """-log p, nats."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, targets, reduction="none")


def dft(logits: torch.Tensor, targets: torch.Tensor, strength: float = 0.0) -> torch.Tensor:
    """-sg(p) log p, sg without gradient (dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629)."""
    nats = nll(logits, targets)
    return (-nats).exp().detach() * nats


def focal(logits: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """-(1 - p)^strength log p (Lin et al. 2017, arXiv:1708.02002, equation 4). 0 is nll.

    1 - p is kept above 0, where a strength below 1 has no slope.
    """
    nats = nll(logits, targets)
    return (-(-nats).expm1()).clamp(min=1e-12) ** strength * nats


def label_smoothing(logits: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """-(1 - strength) log p - strength * mean of log p over the vocabulary. 0 is nll.

    Szegedy et al. 2015, arXiv:1512.00567, section 7.
    """
    return (1 - strength) * nll(logits, targets) + strength * (logits.logsumexp(-1) - logits.mean(-1))


def z_loss(logits: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """-log p + strength * log(Z)^2 (PaLM, arXiv:2204.02311, section 5). 0 is nll."""
    return nll(logits, targets) + strength * logits.logsumexp(-1) ** 2


def confidence_penalty(logits: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """-log p - strength * H, H the entropy of the prediction in nats. 0 is nll.

    Pereyra et al. 2017, arXiv:1701.06548.
    """
    logs = logits.log_softmax(-1)
    return nll(logits, targets) + strength * (logs.exp() * logs).sum(-1)


LOSSES: dict[Loss, Terms] = {
    Loss.nll: nll,
    Loss.dft: dft,
    Loss.focal: focal,
    Loss.label_smoothing: label_smoothing,
    Loss.z_loss: z_loss,
    Loss.confidence_penalty: confidence_penalty,
}

_given: dict[str, tuple[Callable[[Any, Any], Any], str]] = {}
"""Functions of a person and their sources, by the sha256 of the source."""


def chosen(trainer: Trainer) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the loss of a training as a function of logits and targets.

    Raises:
        ConfigError: `trainer.loss=own`, and the function was not given in this process.
    """
    if trainer.loss is Loss.own:
        return _own(trainer)[0]
    terms, usual = LOSSES[trainer.loss], STRENGTHS.get(trainer.loss, (0.0, 0.0))[0]
    strength = usual if trainer.loss_strength is None else trainer.loss_strength
    return lambda logits, targets: terms(logits, targets, strength)


def given(trainer: Trainer) -> str:
    """Return the source of a person's loss.

    Raises:
        ConfigError: the function was not given in this process.
    """
    return _own(trainer)[1]


def _own(trainer: Trainer) -> tuple[Callable[[Any, Any], Any], str]:
    if trainer.loss_sha256 not in _given:
        raise ConfigError("trainer.loss=own needs the function, which no config holds: ftexp.api.run(loss=function)")
    return _given[trainer.loss_sha256]


def give(function: Callable[[Any, Any], Any]) -> str:
    """Take up a person's loss of logits and targets for trainings of this process; return the sha256 of its source.

    The source must say it all, since it stands for the function in the run's identity: nothing is taken from around it
    but modules.

    Raises:
        ConfigError: the source cannot be read or leaves something out, or a term is not one of its token alone.
    """
    text = source(function)
    check(function)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _given[digest] = function, text
    return digest


def source(function: Callable[[Any, Any], Any]) -> str:
    """Read the source of a function that is to be a loss.

    Raises:
        ConfigError: it cannot be read, or the function takes something from around it that is no module.
    """
    if not inspect.isfunction(function):
        raise ConfigError(f"loss must be a function of logits and targets, got {function!r}")
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ConfigError(f"loss={function.__name__} must be written in a file or notebook: {error}") from error
    if function.__name__ == "<lambda>" and text.count("lambda") > 1:
        raise ConfigError("loss must be alone on its line, this one holds another lambda: they could not be told apart")
    if loose := _loose(function):
        raise ConfigError(
            f"loss={function.__name__} must hold all it uses, it takes {', '.join(sorted(loose))} from around it: "
            "a change there would not be seen"
        )
    return text + _defaults(function)


def _loose(function: Any) -> set[str]:
    """Name what a function, or one within it, takes from around it and is no module."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    found = {name for name, cell in cells.items() if not inspect.ismodule(_content(cell))}
    codes = [function.__code__]
    for code in codes:
        codes += [part for part in code.co_consts if inspect.iscode(part)]
        asked = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        found |= {n for n in asked & function.__globals__.keys() if not inspect.ismodule(function.__globals__[n])}
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _defaults(function: Any) -> str:
    """Write out the values of default arguments, whose names in the source may stand for others tomorrow.

    Raises:
        ConfigError: one is no plain value.
    """
    names = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    values = [inspect.signature(function).parameters[name].default for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, bool | int | float | str | None):
            raise ConfigError(f"loss={function.__name__}: the default of {name} must be a plain value, got {value!r}")
    told = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
    return f"\n# defaults: {told}\n" if told else ""


def check(function: Callable[[Any, Any], Any]) -> None:
    """Refuse a loss whose terms are not one a token, finite, with a gradient, and the same beside other tokens.

    Such a loss would be another one for every `trainer.batch`, and accumulation would change the step.

    Raises:
        ConfigError: tells what was found.
    """
    import torch

    name = f"loss={getattr(function, '__name__', function)}"
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 7, generator=draw)).requires_grad_()
    targets = torch.randint(7, (12,), generator=draw)
    whole = function(logits, targets)
    shape = tuple(whole.shape) if isinstance(whole, torch.Tensor) else type(whole).__name__
    if shape != (12,):
        raise ConfigError(f"{name} must return a term for each of 12 tokens, shape (12,), got {shape}: no mean, no sum")
    if not whole.isfinite().all() or not whole.requires_grad:
        raise ConfigError(f"{name} must return finite terms with a gradient, got {whole.detach().tolist()}")
    parts = torch.cat([function(logits[at : at + 5], targets[at : at + 5]) for at in (0, 5, 10)])
    apart = float((parts - whole).detach().abs().max() / whole.detach().abs().max().clamp(min=1e-12))
    if apart > ALONE:
        raise ConfigError(
            f"{name} must give a token the same term beside any others, it changes by {apart:.1%} of the largest: "
            "divide by no count of its own, ftexp divides by the supervised tokens of the step"
        )
