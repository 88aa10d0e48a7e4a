"""`python -m ftexp.export RUN --to FOLDER`: a run as a folder that others can load, with a model card.

An adapter goes out as it was saved. A whole model is read back from its folder and must answer as the run did
(`fidelity`), or nothing is left of it. Sealed rows are not looked at.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import card, config, data, evaluate, fidelity, model, trained, verb
from ftexp.config import Format, Kind, Method, Run, Template, Variant
from ftexp.data import prompts
from ftexp.errors import ConfigError, DataError, MachineError, Unfaithful
from ftexp.fidelity import Answers, Fidelity
from ftexp.files import read_json, whole, write_json
from ftexp.progress import quiet_libraries, say
from ftexp.runs import Kept
from ftexp.train import answers, classify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftexp.model.compute import Compute

FORMS = ("adapter", "merged", "gguf", "merged4bit")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
EPILOG = """forms:
  adapter     the adapter as the run saved it, with tokenizer and card; needs the base model to be used (default)
  merged      a whole model: adapter added to the base in float32, then stored as the base was computed in (--dtype).
              It is read back, its held-out loss and greedy choices are compared with base and adapter, and it is
              removed again where they moved (exit code 5). A run of lora=none has no adapter: this is its default,
              and the whole model that it trained is stored and compared in the same way
  gguf        merged, as one file for llama.cpp and Ollama: Llama and Qwen2 models with a tokenizer as SmolLM's or
              Qwen2's. Read back by transformers and compared as above; held-out rows must have the same tokens
  merged4bit  merged, then packed to 4 bit (nf4). This changes what the model answers; the change is measured and
              told, and nothing is refused. Where that matters, serve base and adapter, or the merged model

examples:
  ftexp export lora.r-8-16-64 --to my-adapter                   a sweep: its winner
  ftexp export outputs/runs/my-run --to my-model --form merged
  ftexp export my-run --to my-adapter --push me/my-adapter      a private repository; --public for all to see

llama.cpp packs a GGUF file to fewer bits, and its own converter knows more models, from a merged folder:
  llama.cpp/build/bin/llama-quantize my-gguf/model.gguf my-model-q4.gguf Q4_K_M
  python llama.cpp/convert_hf_to_gguf.py my-model --outfile my-model.gguf
"""


@dataclass(frozen=True)
class Exported:
    """What an export came to."""

    run: str
    """Folder of the run."""
    folder: str
    form: str
    what: str
    """The form in words."""
    files: dict[str, int]
    """Name -> bytes."""
    fidelity: Fidelity | None
    """None for an adapter, whose weights are the run's own."""
    pushed: str | None = None
    """Address of the repository."""


def export(kept: Kept, target: Path, form: str | None = None, dtype: str | None = None) -> Exported:
    """Write a run to a folder, whole or not at all.

    Args:
        kept: a complete run.
        target: a folder that is not there yet, or empty.
        form: one of `FORMS`; None takes the adapter, or merged where the run has none.
        dtype: number format of merged weights; None takes the one the base was computed in.

    Raises:
        ConfigError: the target is taken, or the run has nothing in this form.
        DataError: the rows are no longer those of the run, so that a merged model could not be compared.
        MachineError: base, adapter or model cannot be loaded.
        Unfaithful: the merged model does not answer as the run.
    """
    run = kept.config()
    form = form or ("merged" if kept.whole else "adapter")
    if dtype is not None and form == "adapter":
        raise ConfigError(f"--dtype must be left out with --form adapter, got {dtype}: it is as the run saved it")
    with whole(target) as folder:
        told, ends = None, []
        if form == "adapter":
            ends = _adapter(kept, run, folder)
        else:
            told = _merged(kept, run, folder, form, dtype or kept.trial["facts"]["compute"]["dtype"])
        text = card.write(kept, form, told, trained.confirmed(kept), ends)
        (folder / "README.md").write_text(text, encoding="utf-8")
        files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}
    return Exported(str(kept.folder), str(target), form, card.form_of(kept, form), files, told)


def _adapter(kept: Kept, run: Run, folder: Path) -> list[int]:
    """Copy the adapter, name its base as others know it, and put the tokenizer beside it.

    Returns:
        The tokens that end a completion, where the settings of the base do not name them all.
    """
    from ftexp.model.saved import ADAPTER, WEIGHTS

    if kept.whole:
        raise ConfigError(f"--form must be merged, got adapter: {kept.name} trained its whole model and has none")
    if run.model.kind is Kind.run:
        raise ConfigError(
            f"--form must be merged, got adapter: {kept.name} began with the run {run.model.path}, so its adapter fits "
            "no base that others have"
        )
    source = kept.folder / "adapter"
    told = read_json(source / ADAPTER)
    if told is None or not (source / WEIGHTS).is_file():
        raise MachineError(f"{source}: must hold an adapter; there is no {ADAPTER} with {WEIGHTS}")
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    named = {"base_model_name_or_path": card.base_name(run.model), "revision": run.model.revision}
    write_json(folder / ADAPTER, told | named)
    tokenizer = shipped(model.tokenizer(run.model), run)
    tokenizer.save_pretrained(str(folder))
    if run.trainer.kind not in model.WRITERS:
        return []
    settings = model.writing(run.model)
    own, ends = settings.eos_token_id, evaluate.stops(settings, tokenizer)
    return [] if {*ends} == {*(own if isinstance(own, list) else [own])} else ends


def shipped(tokenizer: PreTrainedTokenizerBase, run: Run) -> PreTrainedTokenizerBase:
    """Give a tokenizer the chat template the run was trained with, none where its prompts stood plain.

    The model's own stays as it is: one that prints the date shall print today's, whatever day the rows were given.
    """
    if run.trainer.kind is not Method.classify and run.data.template is not Template.model:
        template = prompts.template(tokenizer, run.data)
        tokenizer.chat_template = template  # type: ignore
    return tokenizer


def _merged(kept: Kept, run: Run, folder: Path, form: str, dtype: str) -> Fidelity:
    """Merge, write, read back and compare.

    Raises:
        Unfaithful: the model moved beyond its limit.
    """
    import torch

    from ftexp.model import compute, saved

    if form == "gguf":
        _check_gguf(kept, run)
    ask = _questions(kept, run)
    say("asking the run")
    with trained.load(kept) as loaded:
        before = ask(loaded.tuned, loaded.tokenizer, "run")
        _check_recorded(kept, run, before, loaded.compute)
        formats = (dtype, loaded.compute.dtype)  # the coarser of both rounds
        chosen = replace(loaded.compute, dtype=dtype)
    del loaded  # a whole model is let go before it is read again
    model.forget()
    known, heads = trained.names(kept), trained.outputs(kept)
    packed = run.quant if run.lora.variant is Variant.loftq else None
    if kept.whole:
        made = saved.read(kept.folder / "model", replace(chosen, device="cpu", dtype="float32"), heads).model
    else:
        say("merging in float32")
        made = saved.merged(run.model, kept.folder / "adapter", heads, packed)
    tokenizer = shipped(model.tokenizer(run.model), run)
    tokenizer.save_pretrained(str(folder))
    _describe(made, tokenizer, known, run)
    made.to(getattr(torch, dtype)).save_pretrained(str(folder))
    del made
    if form == "merged4bit":
        _pack(kept, folder, chosen, heads)
    if form == "gguf":
        _one_file(folder)
    say("asking the model as it was written")
    compute.apply(chosen)
    again = saved.read(folder, chosen, heads, gguf=card.GGUF if form == "gguf" else None)
    if form == "gguf":
        _check_tokens(kept, run, again.tokenizer)
    after = ask(again.model, again.tokenizer, form)
    rounded = (run.quant.kind is not Format.none and packed is None) or form == "merged4bit"
    coarser = max((fidelity.LIMITS[name] for name in formats), key=lambda limit: limit.loss)
    told = fidelity.compare(before, after, fidelity.PACKED if rounded else coarser)
    if form == "merged4bit":
        return told
    if not told.kept:
        way = "" if dtype == "float32" else f"; --dtype float32 does not round to {dtype}, which may do"
        raise Unfaithful(f"the model as written is not the run {kept.name}: {fidelity.line(told)}; it was removed{way}")
    return told


def _describe(made: Any, tokenizer: PreTrainedTokenizerBase, known: list[str], run: Run) -> None:
    """Write into a model's settings what its run knows: labels of a classifier, and where a text ends."""
    if known:
        made.config.id2label = dict(enumerate(known))
        made.config.label2id = {name: n for n, name in enumerate(known)}
        made.config.problem_type = "multi_label_classification" if run.trainer.multi_label else (
            "single_label_classification")  # fmt: skip
    if run.trainer.kind in model.WRITERS:
        ends = evaluate.ends(made, tokenizer)
        made.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _pack(kept: Kept, folder: Path, chosen: Any, labels: int) -> None:
    """Pack the model of a folder to 4 bit, in its place; a head and what was trained whole stay as they are."""
    from ftexp.model import saved

    say("warning: packing a merged model to 4 bit changes its answers; by how much is measured below")
    told = read_json(kept.folder / "adapter" / saved.ADAPTER) or {}
    base = saved.read(folder, chosen, labels, nf4=True, trained=told.get("modules_to_save") or ())
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    base.model.save_pretrained(str(folder))


def _check_gguf(kept: Kept, run: Run) -> None:
    """Refuse what has no place in a GGUF file, before anything is loaded.

    Raises:
        ConfigError: names it.
    """
    from ftexp.model import gguf

    if trained.outputs(kept):
        told = "tells labels" if trained.names(kept) else "is a reward model"
        raise ConfigError(f"--form gguf is for models that write text; {kept.name} {told}: --form merged")
    if run.model.kind is Kind.tiny:
        raise ConfigError("--form gguf must have a tokenizer of byte pairs, model=tiny has none")
    gguf.check(model.configuration(run.model).to_dict())


def _one_file(folder: Path) -> None:
    """Put a GGUF file in the place of a merged model and its tokenizer."""
    from ftexp.model import gguf

    gguf.write(folder, folder / card.GGUF)
    for path in folder.iterdir():
        if path.name != card.GGUF:
            path.unlink()


def _check_tokens(kept: Kept, run: Run, again: PreTrainedTokenizerBase) -> None:
    """Refuse a file whose tokenizer renders held-out rows otherwise than that of the run.

    Raises:
        Unfaithful: names the first row.
    """
    rows = data.load(run.data).valid
    pairs = zip(*(prompts.render(rows, t, run.data) for t in (model.tokenizer(run.model), again)), strict=True)
    other = [mine.row.where for mine, theirs in pairs if mine.ids != theirs.ids]
    if other:
        raise Unfaithful(
            f"{len(other)} of {len(rows)} held-out rows of {kept.name}, as {other[0]}, have other tokens in the GGUF "
            "file; it was removed"
        )


def _check_recorded(kept: Kept, run: Run, found: Answers, chosen: Compute) -> None:
    """Refuse files that do not answer as the run scored; a model is compared with what the files say.

    Text alone, on a device like the run's: elsewhere other kernels round.

    Raises:
        Unfaithful: the held-out loss is another one.
    """
    where, recorded = kept.trial["facts"]["compute"], kept.trial["scores"]["valid/loss"]
    if run.trainer.kind is not Method.sft or (where["device"], where["dtype"]) != (chosen.device, chosen.dtype):
        return
    limit = fidelity.LIMITS[chosen.dtype] if run.quant.kind is Format.none else fidelity.PACKED
    if abs(found.loss - recorded) > limit.loss:
        raise Unfaithful(
            f"the files of {kept.name} answer with a held-out loss of {found.loss:.4f}, and the run recorded "
            f"{recorded:.4f}: they are not what it scored; nothing was written"
        )


def _questions(kept: Kept, run: Run) -> Callable[[Any, PreTrainedTokenizerBase, str], Answers]:
    """Render the held-out rows, and return a function that asks a model about them with its own tokenizer.

    Raises:
        DataError: the rows are no longer those of the run.
    """
    splits = data.load(run.data)
    told = kept.trial["facts"]["rows"]["sha256"]
    if splits.digest() != told:
        more = "" if kept.whole else "; --form adapter needs no rows"
        raise DataError(
            f"{run.data.path or run.data.kind.value}: the rows are no longer those of {kept.name}, so that a whole "
            f"model cannot be compared with it{more}"
        )
    known, limits, judge = trained.names(kept), kept.trial.get("thresholds", {}), run.trainer.kind is Method.reward

    def ask(asked: Any, tokenizer: PreTrainedTokenizerBase, label: str) -> Answers:
        if known:
            rows = classify.render(splits.valid, tokenizer, run)
            return fidelity.decisions(asked, tokenizer, rows, run.eval, label, known, limits, run.trainer.multi_label)
        if judge:
            pairs = answers.render(splits.valid, tokenizer, run.data)
            return fidelity.rewards(asked, tokenizer, pairs, run.eval, label)
        return fidelity.texts(asked, tokenizer, prompts.render(splits.valid, tokenizer, run.data), run.eval, label)

    return ask


def check_push(name: str) -> None:
    """Refuse a repository name that the hub would, and a machine that has no token for it.

    Raises:
        ConfigError: the name is not one of a repository.
        MachineError: there is no token.
    """
    from huggingface_hub import get_token

    config.require(REPOSITORY.fullmatch(name) is not None, "--push", name, "OWNER/NAME of a repository of the hub")
    if get_token() is None:
        raise MachineError("--push needs a token of the hub with the right to write: HF_TOKEN in the environment, or "
                           "hf auth login")  # fmt: skip


def push(folder: Path, name: str, public: bool) -> str:
    """Upload a folder to the hub and return the address of the repository; a new one is private unless `public`.

    Raises:
        MachineError: the hub cannot be reached or refuses; the folder stays as it is.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported with ftexp")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        told = " ".join(str(error).split())[:300].replace(get_token() or "\0", "***")
        raise MachineError(
            f"--push {name}: {told}; {folder} is whole, send it again with: hf upload {name} {folder}"
        ) from None
    return str(made)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        "ftexp export", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Write a run to a folder that others can load, with tokenizer and model card.",
    )  # fmt: skip
    made.add_argument("run", help=trained.RUN_HELP)
    made.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new or empty folder to write to")
    made.add_argument("--form", choices=FORMS, help="see below (adapter, of a run of lora=none merged)")
    made.add_argument("--dtype", choices=tuple(fidelity.LIMITS), help="number format of merged weights")
    made.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    made.add_argument("--public", action="store_true", help="make a new repository public; private without it")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return made


def main() -> int:
    """Run the command line; return the exit code."""
    from ftexp.train import control

    args = parser().parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    config.register()
    with control.listening():
        return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    if args.public and args.push is None:
        raise ConfigError("--public must be left out without --push")
    if args.push is not None:
        check_push(args.push)
    told = export(trained.find(args.run), args.to, args.form, args.dtype)
    if args.push is not None:
        told = replace(told, pushed=push(args.to, args.push, args.public))
    print(verb.as_json(asdict(told))) if args.json else print("\n".join(lines(told)))
    return 0


def lines(told: Exported) -> list[str]:
    """Tell an export in plain lines."""
    size = sum(told.files.values())
    text = [f"{told.folder}: {told.what}; {len(told.files)} files, {size / 2**20:.1f} MiB"]
    if told.fidelity is not None:
        text.append(fidelity.line(told.fidelity))
        if told.form == "merged4bit" and not told.fidelity.kept:
            text.append("warning: that is far from the run; do not take its scores for those of this model")
    return text + ([f"pushed to {told.pushed}"] if told.pushed else [])


if __name__ == "__main__":
    sys.exit(main())
