"""Base model and adapter: what is loaded, how it computes, and what a trial adds to it and takes off again."""

from __future__ import annotations

import difflib
import gc
import hashlib
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin, get_type_hints

from ftexp import config, garbage, handed
from ftexp.config import Attention, Format, Kind, Lora, Method, Model, Quant, Variant
from ftexp.errors import ConfigError, MachineError, Unusable, out_of_memory
from ftexp.files import read_json, write_json
from ftexp.model import compute, embedded, loftq, tiny
from ftexp.model.compute import Compute

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Base:
    """A loaded base model, frozen, and what it was made from. Trials borrow it one after the other."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    compute: Compute
    weights: str
    """sha256 over every weight and buffer that is stored."""
    key: str
    """Digest of the config it was loaded for."""
    made_from: Model
    """What it was loaded from."""
    sums: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """What `checksums` told of it when it was loaded."""
    head: tuple[str, ...] = ()
    """Names of the modules of a fresh head (of a classifier or a reward), which a trial trains whole."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    """First weights of the adapter that is on, where they were taken out of the base (PiSSA)."""
    changed: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    """Weights of the base that the training under way changes, each with what it was before."""


WRITERS = (Method.sft, Method.dpo, Method.rloo)
"""Methods whose models write text, so that a training can go on from them."""


def origin(model: Model) -> tuple[Model, Path | None]:
    """Return what `model.kind=run` stands for: the model below the run, and the adapter to merge into it.

    The adapter is None where the run trained a whole model, which then lies in a folder of its own. Number format and
    attention are those that are asked for now.

    Raises:
        ConfigError: the run's model writes no text.
        MachineError: there is no such run, or its weights are gone.
    """
    kept = handed.stage("model.path", model.path, WRITERS)
    asked: dict[str, Any] = {"dtype": model.dtype, "attention": model.attention}
    if kept.whole:
        return Model(Kind.hub, str(kept.folder.resolve() / "model"), **asked), None
    return replace(kept.config().model, **asked), kept.folder / "adapter"


def rooted(model: Model) -> Model:
    """Return the model whose config and tokenizer a model has: itself, or of a run the one at its root."""
    while model.kind is Kind.run:
        model = origin(model)[0]
    return model


def source(model: Model) -> str:
    """Return the folder or hub id that config and tokenizer are loaded from, and weights unless a run has them.

    Raises:
        MachineError: a folder is named that is not there, or the embedded model cannot be fetched.
    """
    model = rooted(model)
    if model.kind is Kind.embedded:
        return str(embedded.folder())
    if model.path.startswith((".", "/", "~")) or Path(model.path).is_dir():
        path = Path(model.path).expanduser()
        if not (path / "config.json").is_file():
            raise MachineError(f"model.path must be a folder with a config.json, got {model.path!r}")
        if model.revision is not None:
            raise ConfigError(f"model.revision must be null for a folder, got {model.revision!r}")
        _refuse_kernels(path / "config.json")
        for index in path.glob("*.index.json"):
            _refuse_ways_out(index)
        return str(path)
    return model.path


_seen: dict[str, list[Any]] = {}
"""Model folder, as it is named -> its states that this process has seen."""


def version(model: Model) -> str:
    """Tell a state of a model's folder from those that this process saw before; empty for the first, and for others.

    A state is where the folder lies, and name, size and time of each file: weights may be saved there between two runs.
    """
    root = rooted(model)
    folder = Path(root.path).expanduser()
    if root.kind is not Kind.hub or not folder.is_dir():
        return ""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    states, now = _seen.setdefault(root.path, []), (folder.resolve(), files)
    if now not in states:
        states.append(now)
    return f"-{states.index(now)}" if states[0] != now else ""


def _refuse_kernels(path: Path) -> None:
    """Refuse a config that names a repository for its attention: transformers would fetch and run code from it."""
    told = read_json(path)
    parts = [told, *(v for v in told.values() if isinstance(v, dict))] if isinstance(told, dict) else []
    for part in parts:
        for key, value in part.items():
            if "attn_implementation" in key and "/" in str(value):
                raise MachineError(f"{path}: {key} must name an attention of transformers, not code, got {value!r}")


def _refuse_ways_out(path: Path) -> None:
    """Refuse an index of weights that names files outside its folder."""
    told = read_json(path)
    listed = told.get("weight_map") if isinstance(told, dict) else None
    for name in set(map(str, listed.values())) if isinstance(listed, dict) else ():
        if Path(name).name != name:
            raise MachineError(f"{path}: weight_map must name files of its folder, got {name!r}")


def positions(model: Model) -> int | None:
    """Return how many tokens the model can hold in a row, or None where it does not say."""
    if rooted(model).kind is Kind.tiny:
        return tiny.POSITIONS
    return getattr(configuration(model).get_text_config(), "max_position_embeddings", None)


def configuration(model: Model) -> Any:
    """Read the config beside the weights of a model."""
    from transformers import AutoConfig

    with loading(source(model), "model.path="):
        return AutoConfig.from_pretrained(source(model), revision=model.revision, trust_remote_code=False)


def tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer. One without a padding token gets its unknown or end token for padding.

    Which token pads changes nothing: padding is masked by length, never by token, in training and in scoring.
    """
    model = rooted(model)
    if model.kind is Kind.tiny:
        return tiny.tokenizer()
    from transformers import AutoTokenizer

    with loading(source(model), "model.path="):
        loaded = AutoTokenizer.from_pretrained(source(model), revision=model.revision, trust_remote_code=False)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.unk_token or loaded.eos_token
    return cast("PreTrainedTokenizerBase", loaded)


def writing(model: Model) -> GenerationConfig:
    """Read the settings for writing text that a model comes with, of its config where it has no file of them."""
    from transformers import GenerationConfig

    model = rooted(model)
    if model.kind is Kind.tiny:
        return GenerationConfig.from_model_config(tiny.configuration())
    config = configuration(model)
    try:
        return GenerationConfig.from_pretrained(source(model), revision=model.revision or "main")
    except OSError:  # there is no such file, and transformers does the same
        return GenerationConfig.from_model_config(config)


@contextmanager
def loading(place: str, key: str = "") -> Iterator[None]:
    """Say which model could not be loaded, where the library says only why; memory that runs out is not that."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        there = Path(place).is_dir() and getattr(error, "errno", None) is None
        kind = Unusable if there else MachineError  # a mount that is gone is a fault of the machine
        raise kind(f"{key}{place} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


_warm: Base | None = None
_last: Any = None
"""Weak reference to the model of the base that was loaded last."""
_begun = False
"""Whether a base has been loaded in this process."""
_aside = False
"""Whether libraries are set aside from garbage collection."""
_settled = False
"""Whether the base in memory is set aside from garbage collection; `gc.get_freeze_count` takes long to tell."""


def load(model: Model, quant: Quant, labels: int = 0, longest: int = 0) -> Base:
    """Load a base model, or hand out the one in memory when it was made from the same config and the same files.

    One base is kept: a sweep over trials of one model pays for loading once.

    Args:
        model: what to load.
        quant: how to store it.
        labels: outputs of a fresh classification head; 0 loads a language model.
        longest: tokens of the longest row, or pack, that it is to train on.

    Raises:
        MachineError: the model cannot be found or loaded.
    """
    global _warm, _last, _begun, _aside, _settled
    libraries()
    long = longest >= compute.LONG
    key = config.digest(model, quant) + (f"-{labels}" if labels else "") + ("-long" if long else "") + version(model)
    if model.kind is Kind.run:  # a run of that name may have been trained again
        key += str(handed.identity(handed.find(model.path, aloud=False)))
    if _warm is None or _warm.key != key:
        _warm = None  # frees the other model before this one is loaded
        if _begun:
            gc.collect()
        if _settled and _last() is not None:  # something that was set aside with it holds it, and is held by it
            gc.unfreeze()
            gc.collect()
            _aside = False
        if _begun:
            compute.give_back_pages()
        if not _aside:
            gc.freeze()  # libraries, which are there to stay; not the base
        _begun = _aside = True
        _settled = False
        _warm = _load(model, quant, key, labels, longest)
        _last = weakref.ref(_warm.model)
    elif not _settled:  # a second trial: the base is there to stay too
        gc.collect()
        gc.freeze()
        _settled = True
    return _warm


def libraries() -> None:
    """Import peft, and with it torch and transformers: their million objects are not looked through meanwhile.

    Each trial has garbage collected twice, by accelerate and before memory is read. To look through what libraries
    bring takes a quarter of a second or more each time, and an eighth of the time in which they are imported; so they
    are set aside by `load`.
    """
    with garbage.postponed():
        import peft  # noqa: F401


def thaw() -> None:
    """Let all that was set aside be collected again, as at the end of a call from another program."""
    global _aside, _settled
    gc.unfreeze()
    _aside = _settled = False


def forget() -> None:
    """Drop the base model in memory: the next `load` reads it anew."""
    global _warm
    _warm = None


def fresh(model: Model, quant: Quant, labels: int = 0) -> Base:
    """Load a base beside the one that is kept: a small one for a probe, or that of a reward model."""
    return _load(model, quant, "beside", labels)


def _load(model: Model, quant: Quant, key: str, labels: int = 0, longest: int = 0) -> Base:
    from transformers.utils import logging

    logging.disable_progress_bar()  # half a second of bar for a local file
    chosen = compute.policy(model, longest)
    compute.apply(chosen)
    loaded, fresh = stored(model, quant, chosen, labels)
    text = tokenizer(model)
    if labels:
        loaded.config.get_text_config().pad_token_id = cast(int, text.pad_token_id)
    head = fresh_head(loaded, fresh, labels) if labels else ()
    keep_gradients(loaded)
    answer_alone(loaded)
    loaded.requires_grad_(False).eval()
    if not labels:
        loaded.generation_config = _greedy(loaded)
        keep_head_whole(loaded)
    return Base(loaded, text, chosen, fingerprint(loaded), key, model, checksums(loaded), head)


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when a model is first evaluated on a CPU with bfloat16 units.

    Products with repacked weights have no backward pass and do not say so (0.50.2, `matmul_4bit`): after the base was
    scored, adapters would learn from a part of their gradient, or from none.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def answer_alone(model: PreTrainedModel) -> None:
    """Keep a mixture of experts from telling its routers' choices in every pass, as the config of some has it.

    From them transformers computes a loss that nothing reads here, and fails where a part of the row is in a cache.
    """
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


def keep_head_whole(model: PreTrainedModel) -> None:
    """Hand the output head states that lie together in memory.

    When prompts are read, transformers projects the last position of each row, and those lie apart. PyTorch multiplies
    such states row by row, with a copy of the weights for each: 2.7 GB for 48 rows of SmolLM2, and more time than all
    else in reading 48 prompts of 24 tokens.
    """
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))


def fresh_head(model: PreTrainedModel, fresh: set[str], labels: int) -> tuple[str, ...]:
    """Name the modules whose weights came from no file, make them float32, and start the last of them at zero.

    Raises:
        MachineError: the file holds a head of that many outputs: which label each of them is for it does not say.
    """
    import torch

    names = tuple(n for n, _ in model.named_modules() if n in {weight.rpartition(".")[0] for weight in fresh})
    for name in names:
        module = model.get_submodule(name).float()
        module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
    ends = [model.get_submodule(n) for n in names if getattr(model.get_submodule(n), "out_features", 0) == labels]
    if not ends:
        raise MachineError(
            f"model.path must be a base model, {model.name_or_path} holds a classifier of {labels} outputs, and "
            "not which label each is for; model=run goes on with one that was trained here"
        )
    for weight in ends[-1].parameters():
        torch.nn.init.zeros_(weight)
    return names


def stored(model: Model, quant: Quant, chosen: Compute, labels: int = 0) -> tuple[PreTrainedModel, set[str]]:
    """Load the weights of a model wherever they are, and tell which of them came from nowhere (a fresh head).

    Raises:
        MachineError: the model cannot be found or loaded, or this machine has no such attention.
    """
    import torch

    with attending(chosen.attention):
        if model.kind is Kind.tiny:
            made = tiny.model(chosen.attention, labels).to(chosen.device, getattr(torch, chosen.dtype))  # type: ignore
            return made, {"score.weight"}
        with _report_held() as held:
            load = _handed_over if model.kind is Kind.run else _pretrained
            loaded, fresh = load(model, quant, chosen, labels)
            below = [name for name in fresh if name.startswith(f"{loaded.base_model_prefix}.")]
            if labels and all(".pooler." in name for name in below):
                held.clear()  # a head alone is missing, as it is meant to be; BERT's begins with the pooler
        return loaded, fresh


@contextmanager
def _report_held() -> Iterator[list[logging.LogRecord]]:
    """Hold back the table of weights that are missing or left over; what the list has at the end is told."""
    held: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        if " LOAD REPORT" not in str(record.msg):
            return True
        held.append(record)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(passes)
    try:
        yield held
    finally:
        logger.removeFilter(passes)
        for record in held:
            logger.handle(record)


@contextmanager
def attending(attention: str) -> Iterator[None]:
    """Say that this machine lacks an attention, which transformers sees when a model is made, before it reads weights.

    Whether it is there is asked of the machine that computes: the one that launches a sweep need not have a GPU.
    """
    try:
        yield
    except ImportError as error:
        if attention != Attention.flash_attention_2.value:
            raise
        told = " ".join(str(error).split())[:300]
        raise MachineError(
            f"model.attention must be one that this machine has, as auto takes it, got {attention}: {told}"
        ) from error


def _handed_over(model: Model, quant: Quant, chosen: Compute, labels: int) -> tuple[PreTrainedModel, set[str]]:
    """Load what a run learned: its whole model, or its adapter merged in float32 and rounded once to the format in use.

    Raises:
        ConfigError: a merged model is to be quantized.
    """
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    from ftexp.model import saved

    below, adapter = origin(model)
    if adapter is None:
        return stored(below, quant, chosen, labels)
    if quant.kind is not Format.none:
        raise ConfigError(
            f"quant.kind must be none with model=run, whose adapter is merged first, got {quant.kind.value}; "
            f"ftexp export {model.path} --form merged writes a folder that model=hub can quantize"
        )
    dtype = getattr(torch, chosen.dtype)
    whole = saved.merged(below, adapter, attention=chosen.attention)
    if not labels:
        return whole.to(chosen.device, dtype), set()  # type: ignore
    headed = whole.config
    headed.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(headed)]
        loaded, told = kind.from_pretrained(
            None, config=headed, state_dict=whole.state_dict(), output_loading_info=True, dtype=dtype,
            attn_implementation=chosen.attention,
        )  # fmt: skip
    return loaded.to(chosen.device), set(told["missing_keys"])


def _pretrained(model: Model, quant: Quant, chosen: Compute, labels: int = 0) -> tuple[PreTrainedModel, set[str]]:
    """Load a model, and tell which of its weights the files do not have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    given: dict[str, Any] = {
        "output_loading_info": True,
        **({"num_labels": labels} if labels else {}),
        "revision": model.revision,
        "dtype": getattr(torch, chosen.dtype),
        "attn_implementation": chosen.attention,
        "trust_remote_code": False,
        "use_safetensors": True,  # other files of weights are pickles
    }
    with loading(source(model), "model.path="), torch.random.fork_rng():
        spared = _spared(kind, source(model), given) if labels and quant.kind is not Format.none else None
        torch.manual_seed(0)  # hidden layers of a fresh head are drawn
        loaded, told = kind.from_pretrained(
            source(model),
            **given,
            quantization_config=_quantization(quant, chosen, spared),
            device_map={"": torch.cuda.current_device()} if chosen.device == "cuda" else None,
        )
    return loaded, set(told["missing_keys"])


def _spared(kind: Any, place: str, given: dict[str, Any]) -> list[str]:
    """Name the modules of a classifier that stay as they are in a quantized base: all that no file of it has.

    transformers spares output head and last layer alone, of a head with a bias not even that; what is trained whole
    cannot be packed. On the meta device nothing is read but names.
    """
    found, told = kind.from_pretrained(place, **given, device_map={"": "meta"})
    return not_packed(found, tuple({name.rpartition(".")[0] for name in told["missing_keys"]}))


def not_packed(base: PreTrainedModel, head: tuple[str, ...]) -> list[str]:
    """Name the modules that are not handed to bitsandbytes: those that transformers spares, and a fresh head's."""
    from transformers.quantizers.base import HfQuantizer

    usual = HfQuantizer.get_modules_to_not_convert(base, None, cast(Any, base)._keep_in_fp32_modules)
    return sorted({*usual, *head})


def _quantization(quant: Quant, chosen: Compute, spared: list[str] | None = None) -> Any:
    """Translate the config to transformers'; of both formats `llm_int8_skip_modules` names what is not packed."""
    if quant.kind is Format.none:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if quant.kind is Format.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=spared,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=getattr(torch, chosen.dtype),
    )


def _greedy(model: PreTrainedModel) -> Any:
    """Keep the token ids of a model's generation settings and none of its sampling."""
    from transformers import GenerationConfig

    kept = model.generation_config
    return GenerationConfig(
        bos_token_id=getattr(kept, "bos_token_id", None),
        eos_token_id=getattr(kept, "eos_token_id", None),
        pad_token_id=getattr(kept, "pad_token_id", None),
        do_sample=False,
    )


def fingerprint(model: torch.nn.Module) -> str:
    """Hash names, formats and bytes of all weights: sha256, about 0.4 s a GB."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def checksums(model: torch.nn.Module) -> dict[tuple[Any, ...], int]:
    """Sum the bytes of each weight, as numbers of 64 bits that wrap around; by its name, format and shape.

    They tell that a base is what it was when it was loaded, where its weights lie: a tenth of the time of `fingerprint`
    on a CPU, and on a GPU nothing is copied. What moves values about within a weight and changes none goes unseen.
    """
    import torch

    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
            if plain.storage_offset() % 8:
                plain = plain.clone()
            whole = len(plain) // 8 * 8
            found[name, value.dtype, value.shape] = (plain[:whole].view(torch.int64).sum(), plain[whole:].sum())
    return {key: sum(int(part) for part in parts) for key, parts in found.items()}


PISSA = "pissa_niter_16"
"""How peft finds the largest singular values: 16 rounds of a randomised decomposition, drawn from the seed."""
TAKERS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to start an adapter that take its first weights out of the base."""
DRAWN = ("eva",)
"""Ways of peft to start an adapter that need a pass over data."""


HEADS = ("classifier", "score")
"""Ends of the names of modules that peft trains whole in every classifier, asked or not."""


def wrapped(head: tuple[str, ...]) -> tuple[str, ...]:
    """Name the modules that peft is to train whole for a fresh head: where one lies in another, the outer alone.

    peft wraps what it is told and `HEADS`, the outer first: a wrapper of the inner one is then put where no forward
    pass goes, so that the head that answers stays frozen (peft 0.21, `_set_trainable`).

    >>> wrapped(("classifier.dense", "classifier.out_proj")), wrapped(("bert.pooler.dense", "classifier"))
    (('classifier',), ('bert.pooler.dense', 'classifier'))
    """
    found = []
    for name in head:
        words = name.split(".")
        outwards = [".".join(words[:end]) for end in range(1, len(words) + 1)]
        found.append(next(outer for outer in outwards if outer in head or outer.endswith(HEADS)))
    return tuple(dict.fromkeys(found))


def adapter(lora: Lora, head: tuple[str, ...] = ()) -> LoraConfig:
    """Translate the config to peft's; the modules of a classification head are trained and saved whole.

    Raises:
        ConfigError: `lora.extra` names a keyword peft does not know, or gives one that the schema has.
    """
    libraries()
    from peft import LoraConfig

    targets: str | list[str] = "all-linear" if lora.targets == ["all-linear"] else list(lora.targets)
    own = {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "use_rslora": lora.variant is Variant.rslora,
        "use_dora": lora.variant is Variant.dora,
        **({"init_lora_weights": PISSA} if lora.variant is Variant.pissa else {}),
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        **({"modules_to_save": list(wrapped(head))} if head else {}),
    }
    asked = str(lora.extra.get("init_lora_weights", "")).lower()
    if asked.startswith(TAKERS):
        raise ConfigError(
            f"lora.extra.init_lora_weights must not change the base, got {asked}: the saved adapter would not fit it; "
            "lora.variant=pissa and loftq save one that does"
        )
    if asked in DRAWN:
        raise ConfigError(
            f"lora.extra.init_lora_weights must not be {asked}: it starts from a pass over rows, of which peft makes "
            "none by itself, so the start would be random"
        )
    if (bias := lora.extra.get("bias", "none")) != "none":
        raise ConfigError(f"lora.extra.bias must be none, got {bias}: it changes the base that a run is compared with")
    return cast("LoraConfig", accept(LoraConfig, own, lora.extra, "lora.extra"))


def accept(made: Any, own: dict[str, Any], extra: dict[str, Any], key: str) -> Any:
    """Call a library's config class with our keywords and the person's, refusing those it does not know."""
    taken = sorted(set(extra) & {*own, *config.RETIRED})
    if taken:
        name = config.RETIRED.get(taken[0])
        has = name or f"{key.split('.')[0]}.{taken[0]}" in set(config.keys())
        owner = f"has a key of its own{f': {name}' if name else ''}" if has else "is set by ftexp"
        raise ConfigError(f"{key}.{taken[0]} must not be set, it {owner}")
    check_types(made, extra, key)
    try:
        return made(**own, **extra)
    except (TypeError, ValueError, OSError) as error:  # a keyword may name a file
        where = key if extra else key.split(".")[0]
        raise ConfigError(f"{where} is refused by {made.__name__}: {error}") from error


PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
"""Types whose values a library takes as they are, in words."""


def check_types(made: Any, extra: dict[str, Any], key: str) -> None:
    """Refuse a keyword of another type than the library's config class has; it would break in the midst of training.

    Raises:
        ConfigError: names the keyword; one whose type is not plain, as of a list, is the library's to refuse.
    """
    types = get_type_hints(made)
    for name, value in extra.items():
        kind = types.get(name)
        kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
        if not set(kinds) <= set(PLAIN):
            continue
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join(PLAIN[one] for one in kinds)
            raise ConfigError(f"{key}.{name} must be {wanted}, got {value!r}")


def check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse a target that matches no layer; peft is silent as long as one of them does.

    Raises:
        ConfigError: names the target and the nearest layer.
    """
    if targets == ["all-linear"]:
        return
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(f"lora.targets: {target!r} matches no layer{_near(target, names)}")


def _near(asked: str, names: list[str], fitting: list[str] | None = None, there: str = "the model has") -> str:
    """Tell which of a model's layers may have been meant, or all that would fit."""
    word = (re.findall(r"\w+", asked) or [""])[-1]
    near = difflib.get_close_matches(word, _leaves(names), n=1)
    if near and near[0] != word:
        return f", did you mean {near[0]}?"
    return f"; {there} {', '.join(_leaves(names if fitting is None else fitting))}"


def _leaves(names: list[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})


def outlined(model: PreTrainedModel, lora: Lora, head: tuple[str, ...] = ()) -> PeftModel:
    """Put an adapter on a model of which there are shapes alone, and refuse names in `lora.extra` that do nothing.

    peft leaves them out without a word, so that trials with and without them are the same. Each is looked for by its
    own rule in peft: a pattern among the layers that get an adapter, others by the ends of names.

    Raises:
        ConfigError: names the key, what it was given and the nearest layer; or peft refuses the adapter.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [name for name, _ in model.named_modules() if name]
    weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layers = sorted({name.rpartition(".")[0] for name in weights})
    wanted, extra = adapter(lora, head), lora.extra
    whole = extra.get("modules_to_save")
    config.require(not isinstance(whole, str), "lora.extra.modules_to_save", whole, "a list of names")
    wanted.init_lora_weights = False  # shapes do not depend on it, and some ways of it need the weights
    try:
        tuned: Any = get_peft_model(model, wanted)
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora is refused by peft: {error}") from error
    on = tuned.base_model.targeted_module_names
    spares = re.fullmatch if isinstance(extra.get("exclude_modules"), str) else _ends
    rules: dict[str, tuple[list[str], Callable[[str, str], Any], str, str]] = {
        "rank_pattern": (on, _fits, "layer with an adapter", "adapters are on"),
        "alpha_pattern": (on, _fits, "layer with an adapter", "adapters are on"),
        "exclude_modules": (layers, spares, "layer with weights", "there are"),
        "modules_to_save": (modules, lambda end, name: name.endswith(end), "module", "the model has"),
        "target_parameters": (weights, _ends, "weight", "names end with"),
    }
    for key, (names, fits, what, there) in rules.items():
        given = extra.get(key) or []
        for asked in [given] if isinstance(given, str) else given:
            if not any(fits(asked, name) for name in names):
                raise ConfigError(f"lora.extra.{key}: {asked!r} matches no {what}{_near(asked, modules, names, there)}")
    asked = extra.get("layers_to_transform")
    for number in asked if isinstance(asked, list) else []:
        one = replace(wanted, layers_to_transform=number)
        if not any(check_target_module_exists(one, name) for name in modules):
            raise ConfigError(f"lora.extra.layers_to_transform: no layer {number} has one of lora.targets")
    return tuned


def _fits(pattern: str, name: str) -> Any:
    """Whether a pattern of ranks is that of a layer (peft's `get_pattern_key`)."""
    return re.match(rf"(.*\.)?({pattern})$", name)


def _ends(end: str, name: str) -> bool:
    """Whether the last words of a dotted name are those of another."""
    return name == end or name.endswith(f".{end}")


def check_rank(model: PreTrainedModel, lora: Lora, head: tuple[str, ...] = ()) -> None:
    """Refuse a rank that is larger than the smaller side of a layer: PiSSA takes that many singular vectors out of it.

    peft takes as many as there are without a word, and saves a config of more. Refused, too, is the output head of a
    tied model: what is taken out of it is missing in the embedding, whose matrix it is.

    Args:
        model: of which shapes are enough.
        lora: the adapter.
        head: modules of a classification head, which are trained whole.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    last, first = model.get_output_embeddings(), model.get_input_embeddings()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding) or name in head:
            continue
        every = lora.targets == ["all-linear"] and not isinstance(layer, nn.Embedding) and layer is not last
        if not every and not any(name == t or name.endswith(f".{t}") for t in lora.targets):
            continue
        if layer is last and cast(Any, layer).weight is cast(Any, first).weight:
            raise ConfigError(
                f"lora.targets must not name {name} with lora.variant=pissa: its matrix is the embedding's too, which "
                "would miss what PiSSA takes out of it"
            )
        least = min(cast(Any, layer).weight.shape)
        config.require(
            lora.r <= least, "lora.r", lora.r, f"at most {least} with lora.variant=pissa: {name} has no more"
        )


@contextmanager
def adapted(base: Base, lora: Lora, seed: int) -> Iterator[PeftModel | PreTrainedModel]:
    """Lend out the base for training, with a fresh adapter or with its own weights thawed, and undo it all after.

    The first weights follow from `seed` alone. Base weights that a trial changes are kept in host memory and put back;
    a base that is not what it was in spite of that is dropped, so the next trial loads it anew.

    Raises:
        ConfigError: peft refuses the adapter, a name fits no layer or weight, or nothing is left to train.
    """
    global _warm
    from transformers import set_seed

    whole = lora.variant is Variant.none
    heads = {} if whole else {name: base.model.get_submodule(name) for name in wrapped(base.head)}
    forward, hooks = base.model.__dict__.get("forward"), _hooks(base.model)
    mine = thawed(base.model, lora.train, base.head) if whole else []
    changed = [(weight, weight.detach().cpu().clone()) for weight in mine]
    set_seed(seed)
    tuned: Any = base.model
    try:
        for weight in mine:
            weight.requires_grad_(True)
        if not whole:
            tuned, changed = _with_adapter(base, lora)
        if not count(tuned).trainable:
            raise ConfigError(f"lora.extra={lora.extra} leaves no weight to train")
        base.changed = changed
        yield tuned
    finally:
        base.start, base.changed = {}, []
        _strip(base, tuned, forward, hooks)
        for name, module in heads.items():  # peft leaves the trained one
            base.model.set_submodule(name, module.requires_grad_(False))
        for weight, value in changed:
            weight.data, weight.grad = value.to(weight.device), None
        if checksums(base.model) != base.sums:
            _warm = None


@contextmanager
def untrained(base: Base, tuned: Any) -> Iterator[None]:
    """Make a model that `adapted` lends answer as its base did before training, while the block runs."""
    now = [(weight, weight.data) for weight, _ in base.changed]
    try:
        for weight, before in base.changed:
            weight.data = before.to(weight.device)
        with nullcontext() if tuned is base.model else tuned.disable_adapter():
            yield
    finally:
        for weight, value in now:
            weight.data = value


def thawed(model: PreTrainedModel, parts: list[str], head: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """Return the weights to train without an adapter: all, or a fresh head and those whose names have one of the parts.

    Raises:
        ConfigError: a part is in no name; tells names near it.
    """
    weights = dict(model.named_parameters())
    for part in parts:
        if not any(has_part(name, part) for name in weights):
            words = sorted({word for name in weights for word in name.split(".") if not word.isdigit()})
            near = difflib.get_close_matches(part.split(".")[-1], words, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; names are made of {', '.join(words)}"
            raise ConfigError(f"lora.train: {part!r} is in the name of no weight{hint}")
    heads = tuple(f"{name}." for name in head)
    return [
        weight for name, weight in weights.items()
        if not parts or name.startswith(heads) or any(has_part(name, part) for part in parts)
    ]  # fmt: skip


def has_part(name: str, part: str) -> bool:
    """Tell whether words of a dotted name, one after the other, are those of a part; `*` stands for any letters.

    >>> has_part("model.layers.4.mlp.up.weight", "layers.4"), has_part("model.layers.14.mlp.up.weight", "layers.4")
    (True, False)
    """
    words, wanted = name.split("."), part.split(".")
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(fnmatchcase, words[start:], wanted)) for start in starts)


def _with_adapter(base: Base, lora: Lora) -> tuple[PeftModel, list[tuple[torch.nn.Parameter, torch.Tensor]]]:
    """Put a fresh adapter on; returns the weights too that it was taken out of (PiSSA), each as it was before."""
    from peft import get_peft_model, get_peft_model_state_dict

    check_targets(base.model, lora.targets)
    was = [(weight, weight.data) for weight in base.model.parameters()]
    try:
        tuned = cast("PeftModel", get_peft_model(base.model, adapter(lora, base.head)))
    except ValueError as error:
        raise ConfigError(f"lora is refused by peft: {error}") from error
    if lora.variant is Variant.loftq:
        loftq.start(tuned, base.made_from, source(base.made_from))
    if lora.variant is Variant.pissa:
        kept = get_peft_model_state_dict(tuned)
        _check_taken(tuned)
        base.start = {name: value.detach().cpu().clone() for name, value in kept.items() if "lora_" in name}
    # peft puts another tensor into the weight that it changes, so the old one is kept without a copy on a CPU
    return tuned, [(weight, old.cpu()) for weight, old in was if weight.data_ptr() != old.data_ptr()]


def _check_taken(tuned: Any) -> None:
    """Refuse ranks of a pattern that a layer has not; `check_rank` has seen `lora.r`."""
    for name, layer in tuned.named_modules():
        for adapter, half in getattr(layer, "lora_A", {}).items():
            asked, found = layer.r[adapter], half.weight.shape[0]
            config.require(asked == found, "lora.extra.rank_pattern", asked, f"at most {found} at {name}")


def save(base: Base, tuned: Any, folder: Path) -> None:
    """Write what was trained: `adapter/`, which loads on the untouched base, or `model/` where there is no adapter.

    `model/` holds the tokenizer too, so that `model=hub model.path=<folder>/model` takes it up.
    """
    if tuned is base.model:
        tuned.save_pretrained(str(folder / "model"))
        base.tokenizer.save_pretrained(str(folder / "model"))
        return
    tuned.save_pretrained(str(folder / "adapter"))
    if base.start:
        _against_untouched(base.start, folder / "adapter")


def _against_untouched(start: dict[str, torch.Tensor], folder: Path) -> None:
    """Make of a saved PiSSA adapter one for the untouched base, of twice the rank.

    The base lost B0 A0 when training began, so what was learned is B A - B0 A0 = [B, -B0] [A; A0]. peft's own
    conversion does the same and loses a head that was trained beside the adapter.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = load_file(file)
    for name, first in start.items():
        at = 0 if "lora_A" in name or "lora_embedding_A" in name else 1
        kept[name] = torch.cat([kept[name], -first if at else first], dim=at).contiguous()
    save_file(kept, file, metadata={"format": "pt"})
    told = read_json(about) or {}
    twice = {key: 2 * told[key] for key in ("r", "lora_alpha")}
    patterns = ("rank_pattern", "alpha_pattern")
    twice |= {key: {name: 2 * value for name, value in (told.get(key) or {}).items()} for key in patterns}
    write_json(about, told | twice | {"init_lora_weights": True})


def _hooks(model: torch.nn.Module) -> set[tuple[int, int]]:
    """Identify every hook on a forward pass, by its module's table and its number there."""
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    return {(id(table), number) for table in tables for number in table}


def _strip(base: Base, tuned: Any, forward: Any, hooks: set[tuple[int, int]]) -> None:
    """Undo what peft, transformers and TRL leave on a model: adapter, patched forward, checkpointing, hooks.

    Hooks by which transformers captures outputs stay: it puts them on once, and they do nothing unless asked.
    """
    if tuned is not base.model:
        tuned.unload()
    model = base.model
    model.__dict__.pop("forward", None)  # TRL replaces it on the instance
    if forward is not None:
        model.__dict__["forward"] = forward
    model.gradient_checkpointing_disable()
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for number in [n for n, hook in table.items() if (id(table), n) not in hooks and not _captures(hook)]:
                del table[number]
    model.requires_grad_(False).eval()


def _captures(hook: Any) -> bool:
    """Tell whether a hook is one by which transformers captures outputs, such as those of a router."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@dataclass(frozen=True)
class Counts:
    """Parameters by what happens to them."""

    trainable: int
    """Weights the optimizer changes."""
    total: int
    """All weights, each once; a packed 4-bit weight counts as the weight it stands for."""


def count(model: torch.nn.Module) -> Counts:
    """Count parameters; 4-bit storage is undone, where `numel` would count two weights as one byte."""
    trainable = total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        size = state.shape.numel() if state is not None else p.numel()
        total += size
        trainable += size if p.requires_grad else 0
    return Counts(trainable, total)
