"""The model card of an export: what the run's files say about it, and nothing they do not say."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import fidelity, metrics, report, trained
from ftexp.config import STRENGTHS, Format, Kind, Long, Loss, Method, Model, Run, Template, Variant
from ftexp.fidelity import Fidelity
from ftexp.files import read_json
from ftexp.metrics import SCORES
from ftexp.runs import Kept

if TYPE_CHECKING:
    from ftexp.stats.columns import Interval

ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Model whose 4-bit copy, unpacked, is `model=embedded`."""
GGUF = "model.gguf"
"""File of an export as GGUF."""
FORMS = {
    "adapter": "a LoRA adapter; the base model is not in this folder",
    "merged": "a whole model: the adapter is merged into the base model",
    "gguf": "a whole model as one GGUF file: the adapter is merged into the base model",
    "merged4bit": "a whole model in 4 bit (nf4): merged first, then packed",
}


WHOLE = {
    "merged": "a whole model, trained without an adapter",
    "gguf": "a whole model as one GGUF file, trained without an adapter",
    "merged4bit": "a whole model in 4 bit (nf4): trained without an adapter, then packed",
}
"""The same of a run that has no adapter."""


def form_of(kept: Kept, form: str) -> str:
    """Say what an export in a form is."""
    return (WHOLE if kept.whole else FORMS)[form]


def base_name(of: Model) -> str:
    """Name a base model for others: its id on the hub, or the last part of a folder's path.

    >>> base_name(Model(kind=Kind.hub, path="org/name")), base_name(Model(kind=Kind.hub, path="/home/me/my-model"))
    ('org/name', 'my-model')
    """
    match of.kind:
        case Kind.embedded:
            return ORIGINAL
        case Kind.tiny:
            return "ftexp-tiny"
        case Kind.run:
            return f"the run {Path(of.path).name}"
        case Kind.hub:
            return Path(of.path).expanduser().name if _is_folder(of) else of.path


def _is_folder(of: Model) -> bool:
    return of.path.startswith((".", "/", "~")) or Path(of.path).is_dir()


def on_hub(of: Model) -> bool:
    """Whether the name of a base model is an id of the hub."""
    return of.kind is Kind.embedded or (of.kind is Kind.hub and not _is_folder(of))


def write(kept: Kept, form: str, told: Fidelity | None, confirmed: str | None, ends: Sequence[int] = ()) -> str:
    """Write the card.

    Args:
        kept: the run.
        form: one of `FORMS`.
        told: how the export compares with the run; None for an adapter, whose weights are the run's own.
        confirmed: the line of the sweep's confirmation, where this trial is its winner; None where there is none.
        ends: tokens that end a completion, where the model's own settings do not tell them all.
    """
    run = kept.config()
    parts = [
        _front(kept, run, form), f"# {_plain(kept.name)}", _about(kept, run, form), "## Use",
        _use(kept, run, form, ends), "## Data", _data(kept, run), "## Training", _training(kept, run), "## Scores",
        _scores(kept, confirmed),
        *(["## Faithful to the run", _faithful(told, form)] if told is not None else []),
        "## Again", _again(kept),
        "## License", "Unknown: it follows from the base model and the data, and the run's files do not tell it.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front(kept: Kept, run: Run, form: str) -> str:
    import yaml

    task = "text-classification" if trained.outputs(kept) else "text-generation"
    told: dict[str, Any] = {"base_model": base_name(run.model)} if on_hub(run.model) else {}
    told |= {"library_name": "peft" if form == "adapter" else "transformers", "license": "unknown",
             "pipeline_tag": task, "tags": ["ftexp"] if kept.whole else ["ftexp", "lora"]}  # fmt: skip
    return f"---\n{yaml.safe_dump(told, sort_keys=True).strip()}\n---"


def _about(kept: Kept, run: Run, form: str) -> str:
    facts = kept.trial["facts"]
    origin = {
        Kind.embedded: f"`{ORIGINAL}`, in a copy that was packed to 4 bit (Q4_1) and unpacked again; on the original "
        "weights scores differ a little",
        Kind.tiny: "a random two-layer model that ftexp makes in the process for dry runs; it knows nothing",
        Kind.hub: f"`{_plain(base_name(run.model))}`{_where(run.model)}",
        Kind.run: f"what `{_plain(Path(run.model.path).name)}` learned, an earlier run of ftexp, merged into its base",
    }[run.model.kind]  # fmt: skip
    return (
        f"This is {form_of(kept, form)}. It was trained with ftexp {facts['versions'].get('ftexp', '')} and this card "
        f"was written from the run's files; what they do not tell is not told here.\n\nBase model: {origin} (sha256 of "
        f"its weights as loaded: `{facts['weights_sha256']}`)."
    )


def _where(of: Model) -> str:
    if not on_hub(of):
        return ", a folder of the person who ran it"
    return f" at revision `{of.revision}`" if of.revision else ""


def _use(kept: Kept, run: Run, form: str, ends: Sequence[int]) -> str:
    kind = "AutoModelForSequenceClassification" if trained.outputs(kept) else "AutoModelForCausalLM"
    if form == "adapter":
        packed = run.quant.kind is not Format.none and run.model.kind is not Kind.tiny
        load = [*([_packing(kept, run)] if packed else []), _base(kept, run, kind, packed),
                "model = PeftModel.from_pretrained(base, folder)"]  # fmt: skip
        more = ", BitsAndBytesConfig" if packed else ""
        first = ["from peft import PeftModel", f"from transformers import {kind}, AutoTokenizer{more}"]
        first += ["from ftexp.model import tiny"] if run.model.kind is Kind.tiny else []
    else:
        load = [f"model = {kind}.from_pretrained(folder)"]
        first = [f"from transformers import {kind}, AutoTokenizer"]
    file = f", gguf_file={GGUF!r}" if form == "gguf" else ""
    load = [line.replace("(folder)", f"(folder{file})") for line in load]
    read = f"tokenizer = AutoTokenizer.from_pretrained(folder{file})"
    lines = [*first, "", 'folder = "."  # this folder', *load, read]
    return "```python\n" + "\n".join([*lines, *_asking(run, ends)]) + "\n```" + _decided(kept, run)


def _packing(kept: Kept, run: Run) -> str:
    """Write the line that says how the run packed its base: the adapter learned on what that left of the weights."""
    spared = (read_json(kept.folder / "adapter" / "adapter_config.json") or {}).get("modules_to_save")
    told: dict[str, Any] = {"load_in_8bit": True}
    if run.quant.kind is Format.nf4:
        told = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": run.quant.double,
                "bnb_4bit_compute_dtype": kept.trial["facts"]["compute"]["dtype"]}  # fmt: skip
    told |= {"llm_int8_skip_modules": sorted(spared)} if spared else {}
    return f"packed = BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in told.items())})"


def _base(kept: Kept, run: Run, kind: str, packed: bool) -> str:
    """Write the line that loads the base model."""
    labels = trained.outputs(kept)
    if run.model.kind is Kind.tiny:
        return f'base = tiny.model("eager"{f", {labels}" if labels else ""})'
    more = (f", revision={run.model.revision!r}" if run.model.revision else "") + (
        f", num_labels={labels}" if labels else ""
    )
    if packed:
        more += f", quantization_config=packed, dtype={kept.trial['facts']['compute']['dtype']!r}"
    where = "" if on_hub(run.model) else "  # the folder of the base model"
    return f"base = {kind}.from_pretrained({base_name(run.model)!r}{more}){where}"


def _asking(run: Run, ends: Sequence[int]) -> list[str]:
    if run.trainer.kind is Method.classify:
        squash = "sigmoid()" if run.trainer.multi_label else "softmax(-1)"
        cut = f", truncation=True, max_length={run.data.max_length}" if run.data.long is Long.cut else ""
        return [f'inputs = tokenizer("a text"{cut}, return_tensors="pt")', f"print(model(**inputs).logits.{squash})"]
    if run.trainer.kind is Method.reward:
        end = "tokenizer.eos_token"
        if run.data.template is Template.plain:
            lines = [f'inputs = tokenizer("a prompt and its answer" + {end}, return_tensors="pt")']
        else:
            turns = '[{"role": "user", "content": "a prompt"}, {"role": "assistant", "content": "an answer"}]'
            lines = [f"text = tokenizer.apply_chat_template({turns}, tokenize=False)",
                     f"text = text.rpartition({end})[0] + {end}  # a reward is read off where an answer ends",
                     'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")']  # fmt: skip
        return [*lines, "print(model(**inputs).logits[0, 0])  # the higher, the better the answer"]
    if run.data.template is Template.plain:
        ask = 'inputs = tokenizer("a prompt", return_tensors="pt")'
    else:
        ask = ('inputs = tokenizer.apply_chat_template([{"role": "user", "content": "a prompt"}], '
               'add_generation_prompt=True, return_dict=True, return_tensors="pt")')  # fmt: skip
    stop = f", eos_token_id={[*ends]}" if ends else ""
    return [
        ask,
        f"out = model.generate(**inputs, max_new_tokens=64, do_sample=False{stop})",
        'print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _decided(kept: Kept, run: Run) -> str:
    """Tell labels and thresholds of a classifier, or what stands around a prompt."""
    if run.trainer.kind is Method.classify:
        limits = kept.trial.get("thresholds", {})
        rows = [[f"`{_plain(name)}`", f"{limits[name]:.4f}" if name in limits else "the likeliest is taken"]
                for name in kept.trial["labels"]]  # fmt: skip
        return "\n\nOutputs in their order, and the threshold of each, fitted on the held-out rows:\n\n" + _table(
            ("label", "threshold"), rows
        )
    told = {
        Template.model: "Prompts were rendered with the chat template of the tokenizer.",
        Template.chatml: "Prompts were rendered with the ChatML template, which is in the tokenizer here.",
        Template.plain: "Prompts stood as they are, without a chat template.",
    }[run.data.template]
    given = f" Each was made from the columns of a row by {_code(run.data.prompt)}."
    return "\n\n" + told + (given if run.data.prompt != "{prompt}" else "")


def _data(kept: Kept, run: Run) -> str:
    rows = kept.trial["facts"]["rows"]
    source = f"{run.data.kind.value} {Path(run.data.path).name}" if run.data.path else run.data.kind.value
    if commit := kept.trial["facts"].get("data_commit"):
        source += f" at commit {commit}"
    dropped = ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items()) or "none"
    return _table(("", ""), [
        ["source", _code(source)], ["rows read", rows["read"]], ["trained on", rows["train"]],
        ["held out", rows["valid"]], ["sealed", rows["test"]], ["left out", dropped],
        ["sha256 of all rows in their splits", f"`{rows['sha256']}`"],
    ])  # fmt: skip


def _training(kept: Kept, run: Run) -> str:
    counts, lora, how = kept.trial["facts"]["parameters"], run.lora, run.trainer
    compute = kept.trial["facts"]["compute"]
    return _table(("", ""), [
        *([["method", f"{how.kind.value}, without an adapter"], ["parts", _code(", ".join(lora.train) or "all")]]
          if lora.variant is Variant.none else
          [["method", f"{how.kind.value}, {lora.variant.value}"], ["rank", lora.r], ["alpha", f"{lora.alpha:g}"],
           ["dropout", f"{lora.dropout:g}"], ["targets", _code(", ".join(lora.targets))]]),
        *_method(run),
        ["trained weights", f"{counts['trainable']:,} of {counts['total']:,}"],
        ["base weights stored as", run.quant.kind.value if run.quant.kind.value != "none" else compute["dtype"]],
        ["steps", kept.trial["steps"]], ["rows a step", how.batch * how.accumulation],
        ["learning rate", f"{how.lr:g}, {how.scheduler.value}, warm-up {how.warmup:g}"],
        ["optimizer", f"{how.optimizer}, weight decay {how.weight_decay:g}"],
        ["NEFTune", f"{how.neftune:g}"], ["seed", run.seed],
    ])  # fmt: skip


def _method(run: Run) -> list[list[Any]]:
    """List what a method alone is told by; a reward model has nothing of the kind."""
    how = run.trainer
    match how.kind:
        case Method.dpo:
            return [["beta", f"{how.beta:g}"]]
        case Method.rloo:
            most = how.max_new_tokens or "a quarter more than the longest reference"
            return [["beta", f"{how.beta:g} a nat away from the model before training"],
                    ["reward model", _code(Path(how.reward).name)], ["completions a prompt", how.generations],
                    ["longest completion", f"{most} tokens" if how.max_new_tokens else most]]  # fmt: skip
        case Method.classify:
            told = "any number" if how.multi_label else "one"
            return [["labels a row", told + (", rare ones weighted" if how.class_weights else "")]]
        case Method.sft if how.loss is not Loss.nll:
            strength = how.loss_strength if how.loss_strength is not None else STRENGTHS.get(how.loss, (None,))[0]
            return [["loss", how.loss.value + ("" if strength is None else f" {strength:g}")]]
    return []


def intervals(kept: Kept) -> list[tuple[str, float, Interval | None, float | None]]:
    """List the held-out scores: name, value, 95 % interval over rows where there is one, and the rival's score."""
    from ftexp import compare  # numpy and scipy, after the command line is checked
    from ftexp.stats import columns

    told, content = kept.trial["scores"], compare.read_table(kept.folder / "examples.parquet")
    rival = "base" if "base/loss" in told else "tfidf"
    groups = None if content is None else compare.units(content)
    found = []
    for name in (name for name in SCORES if f"valid/{name}" in told):
        column = None if content is None else compare.column(content, f"valid/{name}")
        ends = None if column is None else columns.interval(column, groups)
        if ends is not None and name == "perplexity":
            ends = columns.Interval(*(math.exp(min(v, 700)) for v in (ends.value, ends.low, ends.high)))
        if ends is not None and not all(map(math.isfinite, (ends.low, ends.high))):
            ends = None
        found.append((name, told[f"valid/{name}"], ends, told.get(f"{rival}/{name}")))
    return found


def _scores(kept: Kept, confirmed: str | None) -> str:
    rival = "base model" if "base/loss" in kept.trial["scores"] else "TF-IDF"
    rows = [
        [name.replace("_", " "), "" if other is None else metrics.written(other), metrics.written(value),
         "" if ends is None else f"{metrics.written(ends.low)} to {metrics.written(ends.high)}"]
        for name, value, ends, other in intervals(kept)
    ]  # fmt: skip
    unit = metrics.LOSS_UNITS[kept.config().trainer.kind]
    lines = [
        f"On {kept.trial['facts']['rows']['valid']} held-out rows; loss is {unit}. Intervals are over rows of the "
        "kind; they know nothing of the noise of training.", "", _table(("", rival, "this run", "95 % interval"), rows),
    ]  # fmt: skip
    if kept.folder.parent.name == "confirm":
        lines += [
            "",
            "The run confirms a sweep's point with a fresh seed: these rows chose the point, not this run.",
        ]
    elif kept.of_sweep:
        lines += ["", "The run is a trial of a sweep that these rows ranked, so its scores look better than they are."]
    if confirmed is not None:
        lines += ["", f"The same config was trained again: {_plain(confirmed)}"]
    return "\n".join(lines)


def _faithful(told: Fidelity, form: str) -> str:
    text = f"The files of this folder were read back and compared with the run: {fidelity.line(told)}."
    if form == "merged4bit":
        text += " Packing to 4 bit after training changes what the model answers; nothing was done to win it back."
    return text


def _again(kept: Kept) -> str:
    facts, words = kept.trial["facts"], report.command(kept.folder, kept.trial)
    lines = [f"```sh\n{shlex.join(map(_local, words))}\n```", ""] if words else []
    if any(_local(word) != word for word in words):
        lines += ["Of absolute paths only the last part is shown.", ""]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    git = facts["git"].get("commit") if facts.get("git") else None
    lines += [f"Versions: {versions}." + (f" Commit of ftexp: {git}." if git else "")
              + f" sha256 of its code: `{facts['code_sha256']}`."]  # fmt: skip
    return "\n".join(lines)


def _local(word: str) -> str:
    """Cut an absolute path in an override to its last part: where files lie is nobody else's business.

    >>> _local("data.path=/home/me/rows.jsonl"), _local("lora.r=8")
    ('data.path=rows.jsonl', 'lora.r=8')
    """
    key, sign, value = word.partition("=") if "=" in word else ("", "", word)
    bare = value.strip("'\"")
    return f"{key}{sign}{Path(bare).name}" if bare.startswith(("/", "~")) else word


def _plain(text: str) -> str:
    return report.markdown(text)


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
