"""`python -m ftexp.generate RUN [PROMPT ...]`: what a trained run writes, beside its base model.

A prompt takes the path of a training row up to its answer: the same template and special tokens. The format string
`data.prompt` makes prompts of a file's records; one that is typed, or a line of stdin or of a text file, is whole. No
row of the run is read, held-out and sealed ones neither.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ftexp import config, evaluate, model, trained, verb
from ftexp.config import Data, Long, Method, Run, Shape, Source
from ftexp.data import prompts, reader, shapes
from ftexp.data.shapes import Row
from ftexp.errors import ConfigError, DataError, FtexpError
from ftexp.page.text import visible
from ftexp.progress import quiet_libraries
from ftexp.runs import Kept
from ftexp.trained import Trained

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

LONGEST = 256
"""Tokens of a completion where neither the command nor the run says how many."""
STAND_IN = "x"
"""Answer of a prompt that has none: the render needs one to find where the prompt ends."""
SHOWN = 5
"""Labels of a text that are printed even where they are below their thresholds."""
EPILOG = """examples:
  ftexp generate lora.r-8-16-64 'The pilot laughed over the hill.'       a sweep: its winner
  ftexp generate outputs/sweeps/lora.r-8-16-64/0 --file prompts.txt      one prompt a line
  ftexp generate my-run --file questions.jsonl --json                    columns as the run's rows have them
  ftexp generate my-run --temperature 0.8 --top-p 0.95 --seed 1          without prompts: asks for them
  ftexp generate my-run --file prompts.txt --temperature 1 --samples 4   four draws a prompt, of seeds 0 to 3

Without prompt and file, prompts are asked for on a terminal, each for itself; elsewhere they are lines of stdin.
A classifier prints its labels with their probabilities and the thresholds that were fitted on held-out rows.
"""


@dataclass(frozen=True)
class How:
    """How tokens are chosen."""

    max_new_tokens: int
    """Longest completion."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set with this share of the probability, arXiv:1904.09751."""
    seed: int = 0
    """Of the draw; each prompt begins with it, so neighbours change nothing."""
    samples: int = 1
    """Completions of a prompt; each begins with the next seed, so any of them comes again alone."""

    def __post_init__(self) -> None:
        rules = (
            ("--max-new-tokens", self.max_new_tokens, 1 <= self.max_new_tokens <= 1 << 20, "between 1 and 1048576"),
            ("--temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 (greedy) and 100"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**32, "between 0 and 4294967295"),
            ("--samples", self.samples, 1 <= self.samples <= 10_000, "between 1 and 10000"),
            ("--seed + --samples", self.seed + self.samples, self.seed + self.samples <= 2**32, "at most 4294967296"),
        )
        for key, value, ok, rule in rules:
            config.require(ok, key, value, rule)
        greedy = "1 where --temperature is 0"
        config.require(self.temperature > 0 or self.top_p == 1, "--top-p", self.top_p, greedy)
        config.require(
            self.temperature > 0 or self.samples == 1, "--samples", self.samples, f"{greedy}, all are the same"
        )

    @property
    def draws(self) -> list[How]:
        """One completion each, in order."""
        return [replace(self, seed=self.seed + n, samples=1) for n in range(self.samples)]


def read_file(path: Path, data: Data) -> list[Row]:
    """Read prompts: a text file has one a line, another format columns as the run's rows, answers left out or not.

    Raises:
        DataError: the file or a record cannot be used; the message starts with `file:line`.
    """
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # a prompt may hold other ends of lines
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as text: {error}") from error
        rows = [typed(line.rstrip("\r"), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        told, records = replace(data, group_by=None, stratify_by=None), reader.records(path, Source.file)
        if data.shape is Shape.text:
            rows = [typed(row.completion, row.where) for row in shapes.rows(records, told)]
        else:
            given = ((_answered(record, told), where) for record, where in records)
            rows = list(shapes.rows(given, replace(told, shape=Shape.auto)))
    if not rows:
        raise DataError(f"{path}: must have prompts, got none")
    return rows


def typed(text: str, where: str) -> Row:
    """Make a row of a prompt that is as `data.prompt` would have made it.

    Raises:
        ConfigError: it holds bytes that are no UTF-8, which Python reads as letters that nothing else takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} must be text in UTF-8, letter {error.start + 1} is not") from error
    return Row(text, STAND_IN, where)


def _answered(record: dict[str, Any], data: Data) -> dict[str, Any]:
    """Put a stand-in where an answer is missing, so that a record without it is read as a row of the run."""
    made = dict(record)
    answer, stand_in = {"role": "assistant", "content": STAND_IN}, shapes.StandIn(STAND_IN)
    if isinstance(made.get(data.columns.get("prompt", "prompt")), list):
        made.setdefault(data.columns.get("completion", "completion"), [answer])
    renamed = (ours for ours in ("label", "chosen", "rejected") if ours in data.columns)
    for ours in ("output", "labels", *renamed, *config.columns(data.completion)):
        made.setdefault(data.columns.get(ours, ours), stand_in)
    for name in ("messages", "conversations"):
        turns = made.get(data.columns.get(name, name))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1].get("role", turns[-1].get("from"))
            if shapes.ROLES.get(str(last)) == "user":
                made[data.columns.get(name, name)] = [*turns, answer]
    return made


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, run: Run, texts: bool) -> list[tuple[int, ...]]:
    """Tokenise prompts as training did.

    Args:
        rows: the prompts.
        tokenizer: of the run.
        run: its config.
        texts: whether its rows were texts without prompts, which a prompt begins.

    Raises:
        DataError: a prompt cannot be rendered, or begins with two BOS tokens.
    """
    roomy = replace(run.data, max_length=1 << 20)  # the model's own length is what counts here
    given = tuple(replace(row, prompt="", completion=row.prompt, turns=()) for row in rows) if texts else tuple(rows)
    made = [e for e in prompts.examples(given, tokenizer, roomy) if e is not None]
    return [(*e.prompt, *e.completion[:-1]) if texts else e.prompt for e in made]  # the text goes on, it does not end


def check_room(rows: Sequence[Row], asked: Sequence[tuple[int, ...]], run: Run, how: How) -> None:
    """Refuse a prompt that leaves no room for its completion.

    Raises:
        ConfigError: names the prompt and the tokens.
    """
    limit = model.positions(run.model)
    for row, ids in zip(rows, asked, strict=True):
        if limit is not None and len(ids) + how.max_new_tokens > limit:
            raise ConfigError(
                f"--max-new-tokens must leave room for the prompt of {row.where}: the model takes at most {limit} "
                f"tokens, the prompt has {len(ids)} and {how.max_new_tokens} may be written"
            )


def settings(writer: Any, tokenizer: PreTrainedTokenizerBase, how: How) -> GenerationConfig:
    """Translate how tokens are chosen to transformers; no other filter is on."""
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=evaluate.ends(writer, tokenizer),
        **(drawn if how.temperature > 0 else {"do_sample": False}),
    )


def complete(
    writer: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[int, ...]], how: How, batch: int,
    label: str, streamer: Any = None,
) -> list[str]:  # fmt: skip
    """Write the completions of each prompt, prompt by prompt; drawn ones alone, each from its seed."""
    import torch

    chosen = settings(writer, tokenizer, how)
    if how.temperature == 0:
        return evaluate.write(writer, tokenizer, asked, chosen, batch, label, streamer)
    with torch.random.fork_rng():
        written = []
        for ids, draw in product(asked, how.draws):
            torch.manual_seed(draw.seed)
            written += evaluate.write(writer, tokenizer, [ids], chosen, 1, label, streamer)
        return written


def answers(
    loaded: Trained, rows: Sequence[Row], asked: Sequence[tuple[int, ...]], how: How, beside: bool
) -> list[dict[str, Any]]:
    """Write what the tuned model, and the base where it is to stand beside it, answer to prompts.

    Of several samples each is an answer of its own, with the seed that it comes again from.
    """
    tokenizer, batch = loaded.tokenizer, loaded.run.eval.batch
    told: list[dict[str, Any]] = [
        {"prompt": row.prompt} | ({"seed": draw.seed} if how.samples > 1 else {})
        for row, draw in product(rows, how.draws)
    ]
    if beside:
        with loaded.untuned() as base:
            for entry, text in zip(told, complete(base, tokenizer, asked, how, batch, "base"), strict=True):
                entry["base"] = text
    for entry, text in zip(told, complete(loaded.tuned, tokenizer, asked, how, batch, "tuned"), strict=True):
        entry["tuned"] = text
    return told


def classified(loaded: Trained, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Tell the labels of texts, with the probability of each and the threshold it is decided by.

    Raises:
        DataError: a text holds the padding token, or is longer than those of the run and none of them were cut.
    """
    from ftexp import labels
    from ftexp.train import classify

    run, known = loaded.run, trained.names(loaded.kept)
    if run.data.long is Long.drop:
        run = replace(run, data=replace(run.data, long=Long.refuse))  # what was asked for is not left out
    examples = [classify.Example(row, classify.text_ids(row, loaded.tokenizer, run)[0], frozenset()) for row in rows]
    told = classify.logits(loaded.tuned, loaded.tokenizer, examples, run.eval, "tuned")
    many, limits = run.trainer.multi_label, loaded.kept.trial.get("thresholds", {})
    shares = (told.sigmoid() if many else told.softmax(-1)).tolist()
    chosen = labels.decide(shares, limits) if many else labels.choose(shares, known)
    return [
        {"text": row.prompt, "labels": sorted(found), "probabilities": dict(zip(known, line, strict=True)),
         "thresholds": limits}
        for row, line, found in zip(rows, shares, chosen, strict=True)
    ]  # fmt: skip


def show(entries: Iterable[dict[str, Any]], console: Console) -> None:
    """Print answers, or labels, prompt by prompt; control characters are spelled out."""
    for entry in entries:
        shown = _labels(entry) if "labels" in entry else entry
        width = max(map(len, shown))
        for name, text in shown.items():
            style = {"tuned": "bold green", "labels": "bold green", "base": "dim"}.get(name, "")
            lines = visible(str(text)).splitlines() or [""]
            console.print(Text(f"{name:{width}}  {lines[0]}", style), soft_wrap=True)
            for line in lines[1:]:
                console.print(Text(f"{'':{width}}  {line}", style), soft_wrap=True)
        console.print()


def _labels(entry: dict[str, Any]) -> dict[str, str]:
    shares, limits = entry["probabilities"], entry["thresholds"]
    order = sorted(shares, key=lambda name: (name not in entry["labels"], -shares[name]))
    listed = order[: max(SHOWN, len(entry["labels"]))]
    told = [f"{name} {shares[name]:.3f}" + (f" (from {limits[name]:.3f})" if name in limits else "") for name in listed]
    more = f"\nand {len(order) - len(listed)} more" if len(order) > len(listed) else ""
    return {"text": entry["text"], "labels": ", ".join(entry["labels"]) or "none",
            "probabilities": "\n".join(told) + more}  # fmt: skip


def interactive(loaded: Trained, how: How, beside: bool, texts: bool) -> None:
    """Ask for prompts until ctrl-d; ctrl-c ends the answer under way."""
    import readline  # noqa: F401  line editing and history of `input`

    from transformers import TextStreamer

    console = Console()
    console.print(Text(f"{loaded.kept.name}: each line is a prompt of its own; ctrl-d leaves", "dim"))
    streamer: Any = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore
    while True:
        try:
            line = input("prompt> ")
        except EOFError:
            console.print()
            return
        if not line.strip():
            continue
        try:
            row = typed(line, "the prompt")
            if trained.names(loaded.kept):
                show(classified(loaded, [row]), console)
                continue
            asked = encode([row], loaded.tokenizer, loaded.run, texts)
            check_room([row], asked, loaded.run, how)
            for draw in how.draws:
                of = f" (seed {draw.seed})" if how.samples > 1 else ""
                if beside:
                    console.print(Text(f"base{of}", "dim"))
                    with loaded.untuned() as base:
                        complete(base, loaded.tokenizer, asked, draw, 1, "base", streamer)
                console.print(Text(f"tuned{of}", "bold green"))
                complete(loaded.tuned, loaded.tokenizer, asked, draw, 1, "tuned", streamer)
            console.print()
        except KeyboardInterrupt:
            streamer.end()
            console.print(Text("stopped", "dim"))
        except FtexpError as error:
            console.print(Text(str(error), "red"))


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        "ftexp generate", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Print what a trained run writes, beside its base model.",
    )  # fmt: skip
    made.add_argument("run", help=trained.RUN_HELP)
    made.add_argument("prompts", nargs="*", metavar="PROMPT", help="whole prompt, as the run's data.prompt makes it")
    made.add_argument("--file", type=Path,
                      help="prompts: .txt with one a line, as PROMPT; or jsonl, json, csv, tsv, parquet with the "
                           "columns of the run's rows, of which data.prompt makes prompts")  # fmt: skip
    made.add_argument("--max-new-tokens", type=int, metavar="N",
                      help=f"longest completion in tokens (the run's eval.max_new_tokens, else {LONGEST})")  # fmt: skip
    made.add_argument("--temperature", type=float, default=0.0, help="above 0 draws tokens (0: the likeliest)")
    made.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the probability (1)")
    made.add_argument("--seed", type=int, default=0, help="of the draw; every prompt begins with it (0)")
    made.add_argument("--samples", type=int, default=1, metavar="N",
                      help="completions of a prompt, drawn from the seed and those that follow it (1)")  # fmt: skip
    made.add_argument("--no-base", action="store_true", help="leave the base model out")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return made


def main() -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_intermixed_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    config.register()
    return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    kept = trained.find(args.run)
    run = kept.config()
    if run.trainer.kind is Method.reward:
        raise ConfigError(f"{kept.name} is a reward model and writes no text; trainer.reward={kept.name} takes it")
    labelled = bool(trained.names(kept))
    if labelled:
        _check_unused(args)
    longest = run.eval.max_new_tokens or LONGEST if args.max_new_tokens is None else args.max_new_tokens
    how = How(longest, args.temperature, args.top_p, args.seed, args.samples)
    rows, texts = _rows(args, run.data), _texts(kept)
    asked: list[tuple[int, ...]] = []
    if rows is not None and not labelled:
        asked = encode(rows, model.tokenizer(run.model), run, texts)
        check_room(rows, asked, run, how)
    with trained.load(kept) as loaded:
        if rows is None:
            interactive(loaded, how, not args.no_base, texts)
            return 0
        found = classified(loaded, rows) if labelled else answers(loaded, rows, asked, how, not args.no_base)
    if args.json:
        print(verb.as_json({"run": str(kept.folder), "how": None if labelled else asdict(how), "answers": found}))
    else:
        show(found, Console())
    return 0


def _check_unused(args: argparse.Namespace) -> None:
    """Refuse what says how a text is written, with a classifier.

    Raises:
        ConfigError: names the option.
    """
    for name, usual in (("temperature", 0), ("top_p", 1), ("seed", 0), ("samples", 1), ("max_new_tokens", None)):
        value, rule = getattr(args, name), "left out with a classifier, which writes no text"
        config.require(value == usual, f"--{name.replace('_', '-')}", value, rule)


def _rows(args: argparse.Namespace, data: Data) -> list[Row] | None:
    """Gather the prompts of the command line, the file or stdin; None where they are to be asked for."""
    if args.file is not None and args.prompts:
        raise ConfigError(f"--file={args.file} must be left out where prompts stand on the command line")
    if args.file is not None:
        return read_file(args.file, data)
    if not args.prompts and sys.stdin.isatty():
        if args.json:
            raise ConfigError("--json needs prompts: on the command line, with --file, or on stdin")
        return None
    try:
        given = args.prompts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin must be text in UTF-8, byte {error.start} is not") from error
    if not given:
        raise ConfigError("PROMPT must be given: on the command line, with --file, or on stdin; got none")
    for n, text in enumerate(given, 1):
        config.require(bool(text.strip()), f"prompt {n}", text, "a text")
    return [typed(text, f"prompt {n}") for n, text in enumerate(given, 1)]


def _texts(kept: Kept) -> bool:
    """Tell whether a run's rows were texts without prompts."""
    from ftexp import compare

    table = compare.read_table(kept.folder / "examples.parquet")
    return table is not None and not any(table["prompt"])


if __name__ == "__main__":
    sys.exit(main())
